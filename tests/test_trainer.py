"""Training: the step is an SFT step on mixed inputs, logged, resumable, and unchanged where p = 0."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from helpers.data import ROWS, TEMPLATE, make_tokenizer
from helpers.training import Tokenizer, config, make_trainer, rows, weights
from models import CHECKPOINTING, OPTIONS, VOCAB, tiny_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from selfgen import BSSTrainer, ContextGenerator
from selfgen.data import Collator, rows_of
from selfgen.evaluation import held_out_losses, row_losses
from selfgen.generation import answer
from selfgen.training.checkpoints import ResumeError
from selfgen.training.mixing import check_processes, step_seed
from selfgen_kernels import sample_mix

LOGGED = {"self_share", "agreement", "passes", "computed_per_token", "context_seconds", "training_seconds"}


def test_a_step_trains_on_mixed_inputs_and_reference_labels(tmp_path):
    """The whole accumulated batch is mixed at once, with the current weights, and equals the sequential contexts."""
    trainer = make_trainer(tmp_path)
    seen = []
    trainer.compute_loss = _record(trainer.compute_loss, seen)
    calls = []
    trainer.generator.contexts = _record(trainer.generator.contexts, calls)
    start = tiny_model("llama")
    trainer.train()
    assert len(calls) == 4
    assert [len(call[0]) for call in calls] == [4] * 4  # prompts: 2 micro-batches of 2 rows
    assert len(seen) == 8

    oracle = ContextGenerator(start)
    batch = [call[1] for call in seen[:2]]
    for inputs in batch:
        for row in range(2):
            p, t = int(inputs["prompt_length"][row]), int(inputs["answer_length"][row])
            reference = inputs["labels"][row, p : p + t]
            expected = oracle.contexts(
                [inputs["input_ids"][row, :p]],
                [reference],
                0.5,
                seed=42 << 32,
                sample_ids=[int(inputs["sample_id"][row])],
                method="sequential",
            )
            assert torch.equal(inputs["input_ids"][row, p : p + t], expected.tokens[0])
            assert (inputs["labels"][row, :p] == -100).all()
            assert (inputs["labels"][row, p + t :] == -100).all()


def test_what_ends_training_rows_ends_answers(tmp_path):
    """A template's end of turn that is not the EOS gets into the checkpoint, so that answers end anywhere."""
    tokenizer = make_tokenizer(TEMPLATE.replace("<eos> <nl>", "<end> <nl>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    end = tokenizer.convert_tokens_to_ids("<end>")
    options = {"learning_rate": 3e-2, "max_steps": 60, "self_prob": 0.0}
    trainer = BSSTrainer(
        tiny_model("llama"),
        config(tmp_path, **options),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts = list(trainer.train_dataset["prompt_ids"])
    answers = answer(model, prompts, max_new_tokens=20)
    assert [answer.tolist() for answer in answers.tokens] == list(trainer.train_dataset["answer_ids"])
    assert all(int(answer[-1]) == end for answer in answers.tokens)
    found = model.generate(torch.tensor(prompts[:1]), max_new_tokens=20, do_sample=False)[0, len(prompts[0]) :]
    assert torch.equal(found, answers.tokens[0])


def _record(function, calls):
    def recorded(*args, **kwargs):
        calls.append([{k: v.clone() for k, v in a.items()} if isinstance(a, dict) else a for a in args])
        return function(*args, **kwargs)

    return recorded


def test_self_prob_zero_is_supervised_fine_tuning(tmp_path):
    """p = 0 gives, bit for bit, the weights of the plain Trainer on the same data."""
    bss = make_trainer(tmp_path / "bss", self_prob=0.0)
    bss.train()
    args = config(tmp_path / "sft")
    plain_args = TrainingArguments(
        **{
            name: getattr(args, name)
            for name in (
                "output_dir",
                "max_steps",
                "per_device_train_batch_size",
                "gradient_accumulation_steps",
                "learning_rate",
                "save_strategy",
                "use_cpu",
                "disable_tqdm",
                "remove_unused_columns",
            )
        }
    )

    def collate(features):
        return {
            key: value
            for key, value in Collator(0)(features).items()
            if key in ("input_ids", "attention_mask", "labels")
        }

    plain = Trainer(tiny_model("llama"), plain_args, train_dataset=rows(), data_collator=collate)
    plain.train()
    assert torch.equal(weights(bss.model), weights(plain.model))


def test_methods_train_alike(tmp_path):
    fast, slow = (
        make_trainer(tmp_path, context_method=method, reuse_passes=False) for method in ("fixed_point", "sequential")
    )
    fast.train()
    slow.train()
    assert torch.equal(weights(fast.model), weights(slow.model))


def test_every_training_log_has_the_figures(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert set(entry) >= LOGGED
        assert 0.2 < entry["self_share"] < 0.8
        assert 0.0 <= entry["agreement"] <= 1.0
        assert entry["passes"] >= 1
        assert entry["computed_per_token"] > 0
        assert entry["context_seconds"] > 0
        assert entry["training_seconds"] > 0


def test_linear_schedule(tmp_path):
    args = config(tmp_path, self_prob=0.8, self_prob_start=0.2, self_prob_schedule="linear")
    assert [round(args.self_prob_at(step, 4), 6) for step in range(4)] == [0.2, 0.4, 0.6, 0.8]
    assert args.self_prob_at(0, 1) == 0.8
    trainer = make_trainer(tmp_path, self_prob=1.0, self_prob_start=0.0, self_prob_schedule="linear")
    trainer.train()
    shares = [entry["self_share"] for entry in trainer.state.log_history if "loss" in entry]
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert shares == sorted(shares)


@pytest.mark.parametrize("options", [{}, {"granularity": "prefix", "loss_on": "after_switch"}], ids=str)
def test_resume_repeats_the_uninterrupted_run(tmp_path, options):
    """A run that was stopped at a checkpoint goes on with the very contexts and weights of one that was not."""
    options = {"lr_scheduler_type": "constant", **options}
    whole = make_trainer(tmp_path / "whole", max_steps=6, save_strategy="no", **options)
    whole.train()
    stopped = make_trainer(tmp_path / "run", max_steps=3, save_strategy="steps", save_steps=3, **options)
    stopped.train()
    resumed = make_trainer(tmp_path / "run", model=tiny_model("llama", seed=9), max_steps=6, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)
    logs = [trainer.state.log_history[:6] for trainer in (whole, resumed)]
    for entry in (*logs[0], *logs[1]):
        del entry["context_seconds"], entry["training_seconds"], entry["tokens_per_second"]
    assert logs[0] == logs[1]


def test_a_resumed_run_misses_no_tied_weight(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers.trainer"), "handlers", [caplog.handler])
    saving = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, model=tiny_model("gemma2"), max_steps=1, **saving).train()
    make_trainer(tmp_path, model=tiny_model("gemma2"), max_steps=2).train(resume_from_checkpoint=True)
    assert "missing keys" not in caplog.text


def test_a_checkpoint_names_the_curve_that_is_used(tmp_path):
    """As earlier checkpoints do, so that a run whose options leave it out goes on from them."""
    saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    for granularity, curve in (("token", "flat"), ("prefix", "falling")):
        make_trainer(tmp_path / granularity, granularity=granularity, **saving).train()
        checkpoint = tmp_path / granularity / "checkpoint-1"
        assert json.loads((checkpoint / "selfgen.json").read_text())["self_prob_curve"] == curve
        make_trainer(tmp_path, granularity=granularity).check_resumed(checkpoint)
        make_trainer(tmp_path, granularity=granularity, self_prob_curve=curve).check_resumed(checkpoint)
    with pytest.raises(ResumeError, match="granularity was 'token', is 'prefix'; self_prob_curve was"):
        make_trainer(tmp_path, granularity="prefix").check_resumed(tmp_path / "token" / "checkpoint-1")


def test_repeated_rows_in_a_batch_share_their_context(tmp_path):
    data = rows(2)
    trainer = make_trainer(tmp_path, per_device_train_batch_size=2)
    trainer.state.max_steps = 4
    features = [data[0], data[1]]
    batches = [Collator(0)(features), Collator(0)(features[::-1])]
    trainer.mix(batches)
    first, again = batches[0]["input_ids"][0], batches[1]["input_ids"][1]
    assert torch.equal(first, again)


def test_different_rows_cannot_share_an_id(tmp_path):
    data = rows(2)
    trainer = make_trainer(tmp_path)
    trainer.state.max_steps = 4
    with pytest.raises(ValueError, match="two different rows have the sample id 0"):
        trainer.mix([Collator(0)([data[0], {**data[1], "sample_id": 0}])])
    with pytest.raises(ValueError, match="sample_id"):
        make_trainer(tmp_path, data=concatenate_datasets([data, rows(2, seed=1)]))


def test_the_last_step_of_an_epoch_may_have_fewer_batches(tmp_path):
    trainer = make_trainer(tmp_path, data=rows(5), max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 4  # 2 + 2 rows, then 1


def test_contexts_under_bf16_autocast_are_made_in_it(tmp_path):
    """Mixed precision and activation checkpointing: the contexts equal the sequential ones under the same autocast."""
    trainers = [
        make_trainer(tmp_path, **{CHECKPOINTING: True}, bf16=True, max_steps=2, context_method=method)
        for method in ("fixed_point", "sequential")
    ]
    mixed = []
    for trainer in trainers:
        seen = []
        trainer.compute_loss = _record(trainer.compute_loss, seen)
        trainer.train()
        mixed.append(torch.cat([call[1]["input_ids"].flatten() for call in seen[:2]]))  # the first step's
    assert torch.equal(*mixed)


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "span", "self_prob_curve": "rising", "min_reference_prob": 0.008},
        {"granularity": "span", "span_length": 3.0},
        {"granularity": "sequence"},
        {"granularity": "prefix"},
        {"self_prob_curve": "rising"},
        {"min_reference_prob": 0.008},
    ],
    ids=str,
)
@pytest.mark.one_case
def test_masks_of_the_arguments_are_those_of_the_contexts(tmp_path, options):
    """Every kind, with passes reused: what a step trains on is what the sequential loop makes, not that of tokens."""
    trainer = make_trainer(tmp_path, max_steps=1, self_prob=0.6, per_device_train_batch_size=8, **options)
    seen = []
    trainer.compute_loss = _record(trainer.compute_loss, seen)
    trainer.train()
    assert trainer._reuse.verified
    oracle = ContextGenerator(tiny_model("llama"), masks=config(tmp_path, **options).masks)
    plain = ContextGenerator(tiny_model("llama"))
    differs = False
    for _, inputs, *_ in seen:
        for row in rows_of(inputs):
            given = ([row.prompt], [row.reference], 0.6)
            keys = {"seed": step_seed(42, 0), "sample_ids": [row.sample_id], "method": "sequential"}
            assert torch.equal(row.answer, oracle.contexts(*given, **keys).tokens[0])
            differs |= not torch.equal(row.answer, plain.contexts(*given, **keys).tokens[0])
    assert differs


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.one_case
def test_a_model_trained_in_bf16_autocast_makes_contexts_in_it(tmp_path, adapter):
    """Accelerate leaves autocast inside the forward of the model that it prepared: it stays after training.

    Rounding turns near ties: of 12 such models, 14 to 16 of 16 contexts were equal, and 12 to 16 answers. So each token
    has to be the model's own choice, or nearly so, and losses tell whether the precision is the same.
    """
    model = tiny_model("llama")
    if adapter:
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, lora)
    trainer = make_trainer(tmp_path, model=model, bf16=True, max_steps=1)
    trainer.train()
    assert not torch.is_autocast_enabled("cpu")
    prompts, references = ([torch.tensor(row) for row in rows()[name]] for name in ("prompt_ids", "answer_ids"))
    generator = ContextGenerator(trainer.model.eval())
    fast, slow = (
        generator.contexts(prompts, references, self_prob=0.5, seed=3, sample_ids=range(16), method=method)
        for method in ("fixed_point", "sequential")
    )
    assert sum(map(torch.equal, fast.tokens, slow.tokens)) >= 13
    for found in (fast, slow):
        for row, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
            tokens, at = found.tokens[row], found.is_self[row].nonzero()[:, 0]
            ids = torch.cat([prompt, tokens])[None]
            with torch.no_grad():
                own = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
            own, token = own[at].float(), tokens[at]
            nearly = 0.05 * own.std(-1, keepdim=True)  # of the choice between groups of 64, and within one
            own += nearly * (torch.arange(own.shape[1]) // 64 == token[:, None] // 64)
            own.scatter_add_(1, token[:, None], nearly)
            ids = torch.full_like(at, row)
            chosen, _ = sample_mix(own, reference[at], 1.0, seed=3, sample_ids=ids, positions=at)
            assert torch.equal(chosen, token)
    assert generator.dtype == torch.bfloat16
    same = 0
    for prompt, tokens in zip(prompts, answer(trainer.model, prompts, max_new_tokens=8).tokens, strict=True):
        ids = torch.cat([prompt, tokens])[None]
        with torch.no_grad():
            own = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
        same += torch.equal(own.argmax(-1), tokens)
        lost = own.float().amax(-1) - own.float().gather(1, tokens[:, None])[:, 0]
        assert (lost <= 0.1 * own.float().std(-1)).all()  # a near tie: of 12 such models, the largest is 0.054
    assert same >= 10
    with torch.no_grad():
        own_losses = [
            cross_entropy(trainer.model(input_ids=torch.cat(row)[None]).logits[0, len(row[0]) - 1 : -1].float(), row[1])
            for row in zip(prompts, references, strict=True)
        ]
    found = row_losses(generator, [*rows()], {"reference": 0.0})["reference"]
    assert torch.allclose(torch.stack([row.mean() for row in found]), torch.stack(own_losses), rtol=2e-4)


def test_evaluation_is_teacher_forced(tmp_path):
    model = tiny_model("llama")
    trainer = BSSTrainer(
        model, config(tmp_path), train_dataset=rows(), eval_dataset=rows(6, seed=1), processing_class=Tokenizer()
    )
    metrics = trainer.evaluate()
    expected = held_out_losses(ContextGenerator(model), rows(6, seed=1), {"reference": 0.0}, progress=False)
    loss = expected["reference"].mean
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_several_evaluation_sets_and_text_ones(tmp_path):
    """Data sets are tokenized wherever the Trainer takes one: in the constructor, by name, and handed to evaluate."""
    tokenizer = make_tokenizer()
    text = Dataset.from_list(ROWS)
    trainer = BSSTrainer(
        tiny_model("llama"),
        config(tmp_path),
        train_dataset=text,
        eval_dataset={"a": text, "b": rows(3)},
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= set(metrics)
    assert trainer.evaluate(text)["eval_loss"] == pytest.approx(metrics["eval_a_loss"])
    assert trainer.predict(text).metrics["test_loss"] == pytest.approx(metrics["eval_a_loss"])


def test_a_frozen_model_is_refused(tmp_path):
    model = tiny_model("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        make_trainer(tmp_path, model=model)


def test_processes_that_would_train_apart_are_refused(monkeypatch):
    check_processes(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(2)
    with pytest.raises(ValueError, match="one of 2 processes"):
        check_processes(1)


def test_padding_on_the_left_is_refused(tmp_path):
    def collate(rows):
        batch = Collator(pad_token_id=0)(rows)
        return {name: column.flip(1) if column.dim() == 2 else column for name, column in batch.items()}

    trainer = BSSTrainer(
        tiny_model("llama"),
        config(tmp_path),
        train_dataset=rows(),
        processing_class=Tokenizer(),
        data_collator=collate,
    )
    with pytest.raises(ValueError, match="pad on the right"):
        trainer.train()


def test_a_resumed_run_has_the_settings_of_the_one_before(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match=r"self_prob was 0\.5, is 0\.25"):
        make_trainer(tmp_path, self_prob=0.25).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_every_split_is_evaluated(tmp_path):
    """As transformers.Trainer does; a split called train is one of them."""
    splits = DatasetDict(train=rows(3), test=rows(2, seed=1))
    trainer = BSSTrainer(
        tiny_model("llama"), config(tmp_path), train_dataset=splits, eval_dataset=splits, processing_class=Tokenizer()
    )
    assert len(trainer.train_dataset) == 3
    metrics = trainer.evaluate()
    for name, part in splits.items():
        assert metrics[f"eval_{name}_loss"] == pytest.approx(trainer.evaluate(part)["eval_loss"])
    assert len(trainer.predict(DatasetDict(train=splits["train"])).predictions) == 3


@pytest.mark.parametrize("format", [None, "torch"])
def test_rows_of_one_length_can_be_trained_together(tmp_path, format):
    strategy = {"train_sampling_strategy": "group_by_length"}
    options = config(tmp_path, max_steps=2, **(strategy if strategy.keys() <= OPTIONS else {"group_by_length": True}))
    tokenizer, data = make_tokenizer(size=VOCAB), rows().with_format(format)
    trainer = BSSTrainer(tiny_model("llama"), options, train_dataset=data, processing_class=tokenizer)
    data = trainer.train_dataset
    pairs = zip(data["prompt_ids"], data["answer_ids"], strict=True)
    assert data["length"][:] == [len(prompt) + len(answer) for prompt, answer in pairs]
    trainer.train()
    order = [data["length"][place] for place in trainer._get_train_sampler(data)]
    assert order[:4] == sorted(order[:4], reverse=True)  # one optimizer step's rows, the longest first


def test_a_model_by_name_is_trained_in_fp32(tmp_path):
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert make_trainer(tmp_path, model=str(tmp_path / "half")).model.dtype == torch.float32


def test_checkpoint_is_an_ordinary_one(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(weights(loaded), weights(trainer.model))
    assert "selfgen" not in json.dumps(json.loads((tmp_path / "final" / "config.json").read_text()))


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.1))
    trainer = make_trainer(tmp_path, model=model)
    before = weights(model)
    base = {name: p.clone() for name, p in model.named_parameters() if "lora" not in name}
    trainer.train()
    assert not torch.equal(weights(model), before)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if "lora" not in name)
    assert all(entry["self_share"] > 0 for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"self_prob": 1.5}, r"self_prob is 1\.5; a probability must be in \[0, 1\]"),
        ({"self_prob": float("nan")}, "self_prob is nan"),
        ({"self_prob_start": -0.1}, r"self_prob_start is -0\.1"),
        ({"sampling_temperature": -1.0}, r"sampling_temperature is -1\.0; .* >= 0"),
        ({"self_prob_schedule": "cubic"}, "'cubic'; accepted: constant, linear"),
        ({"context_method": "magic"}, "'magic'; accepted: fixed_point, sequential"),
        ({"token_budget": 0}, "token_budget is 0; it must be at least 1"),
        ({"graph_memory": 1.5}, r"graph_memory is 1\.5; it must be a share"),
        ({"max_length": 1}, "max_length is 1; it must be at least 2"),
        ({"remove_unused_columns": True}, "remove_unused_columns must stay False"),
    ],
)
def test_bad_configuration(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_bad_trainer_arguments(tmp_path):
    with pytest.raises(TypeError, match="BSSTrainer takes a BSSConfig"):
        BSSTrainer(tiny_model("llama"), TrainingArguments(str(tmp_path)), train_dataset=rows())
    with pytest.raises(ValueError, match="max_length is 1000, but the model has 256 positions"):
        make_trainer(tmp_path, max_length=1000)
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="lacks sample_id"):
        trainer.mix([{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}])


def test_an_error_tells_which_data_set_it_is_of(tmp_path):
    """There may be two, of which one has other columns."""
    fine = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 2)
    other = fine.rename_column("prompt", "question")
    sets = {"train_dataset": fine, "eval_dataset": other}
    arguments = {"model": tiny_model("llama"), "args": config(tmp_path), "processing_class": make_tokenizer()}
    with pytest.raises(ValueError, match=r"^eval data: the data set has the columns question, completion"):
        BSSTrainer(**arguments, **sets)
    empty = Dataset.from_list([{"prompt": "a", "completion": ""}])
    with pytest.raises(ValueError, match=r"^train data: no row is left"):
        BSSTrainer(**arguments, **sets | {"train_dataset": empty, "eval_dataset": fine})
