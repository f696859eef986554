"""TRL's SFTTrainer with mixed contexts: exact, as `BSSTrainer` trains, and TRL's own where nothing is mixed."""

from __future__ import annotations

import logging
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers.data import make_tokenizer
from helpers.processes import in_ranks
from helpers.skips import Skips, skips_later
from helpers.training import weights
from models import VOCAB, tiny_model
from torch.multiprocessing.spawn import ProcessRaisedException

from selfgen import BSSConfig, BSSTrainer, ContextGenerator
from selfgen.cli import train
from selfgen.data.batches import rows_of

trl = pytest.importorskip("trl")

from selfgen import trl as ours  # noqa: E402  # needs TRL

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <eos>"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %} <nl> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SMALL = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": [],
}
MIXED = {"self_prob": 0.5, "token_budget": 32, "balance": 4}
TURNS = [
    ("a b", "c d e f"),
    ("e", "f g h a b c"),
    ("b c d", "a d g"),
    ("h", "g f e d c b a"),
    ("c c", "h b"),
    ("d", "e"),
]
PAIRS = Dataset.from_list([{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in TURNS])

EVALUATED = {"eval_dataset": PAIRS}


def turn(role, content):
    return {"role": role, "content": content}


DIALOGUES = [
    {"messages": [turn("user", p), turn("assistant", a), turn("user", a), turn("assistant", p)]} for p, a in TURNS
]
CHATS = [{"prompt": [turn("user", p)], "completion": [turn("assistant", a)]} for p, a in TURNS]
CHATS_ARE_READ = pytest.mark.skipif(
    not ours._MEASURES_LEARNED, reason="this TRL can't read prompts of turns with transformers 5, and labels not at all"
)


def make(folder, rows=PAIRS, model=None, *, trainer=ours.SFTTrainer, config=ours.SFTConfig, args=None, **changes):
    options = {**SMALL, **(MIXED if issubclass(config, ours.SFTConfig) else {}), **changes}
    return trainer(
        model or tiny_model("llama"),
        config(str(folder), **options),
        train_dataset=rows if isinstance(rows, Dataset | IterableDataset) else Dataset.from_list(rows),
        processing_class=make_tokenizer(TEMPLATE, size=VOCAB),
        **(args or {}),
    )


def steps_of(trainer):
    """Train; the micro-batches of each step as they were read, and with contexts, and the weights before it."""
    steps = []
    mix = trainer.mix

    def recorded(batches):
        state = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        before = [{name: column.clone() for name, column in batch.items()} for batch in batches]
        found = mix(batches)
        steps.append((before, [{name: column.clone() for name, column in batch.items()} for batch in batches], state))
        return found

    trainer.mix = recorded
    trainer.train()
    return steps


def check_contexts(trainer, oracle, *, least=1):
    """Each context is what the loop over single tokens makes with the weights of its step; nothing else has changed."""
    steps = steps_of(trainer)
    assert len(steps) == trainer.args.max_steps
    changed = 0
    for step, (before, after, state) in enumerate(steps):
        oracle.load_state_dict(state)
        generator = ContextGenerator(oracle, vocab_size=trainer.generator.vocab_size)
        for was, now in zip(before, after, strict=True):
            assert torch.equal(was["labels"], now["labels"])
            learned = was["labels"] != -100
            assert torch.equal(was["input_ids"][~learned], now["input_ids"][~learned])
            assert torch.equal(was["input_ids"][learned], was["labels"][learned])
            for row, mixed in zip(rows_of(was), rows_of(now), strict=True):
                expected = generator.contexts(
                    [row.prompt],
                    [row.reference],
                    trainer.args.self_prob,
                    seed=42 << 32 | step,
                    sample_ids=[row.sample_id],
                    method="sequential",
                    may_be_self=[row.labels != -100],
                )
                assert torch.equal(mixed.answer, expected.tokens[0])
                changed += int((mixed.answer != row.answer).sum())
    assert changed >= least
    return steps


@pytest.mark.parametrize(
    ("rows", "options", "args"),
    [
        pytest.param(PAIRS, {}, {}, id="prompt and completion"),
        pytest.param(CHATS, {}, {}, id="turns of prompt and completion", marks=CHATS_ARE_READ),
        pytest.param(DIALOGUES, {"assistant_only_loss": True}, {}, id="turns of the assistant"),
        pytest.param(DIALOGUES, {}, {}, id="all turns"),
        pytest.param(PAIRS, {"completion_only_loss": False}, {}, id="prompts learned"),
        pytest.param([{"text": f"{p} {a}"} for p, a in TURNS], {}, {}, id="text"),
        pytest.param(PAIRS, {"max_length": 5}, {}, id="truncated"),
        pytest.param(PAIRS, {"context_micro_batches": 1, "gradient_accumulation_steps": 1}, {}, id="one by one"),
        pytest.param(PAIRS, {"pad_to_multiple_of": 8, "eos_token": "h"}, {}, id="other padding and end"),
        pytest.param(IterableDataset.from_generator(lambda: iter([*PAIRS] * 9)), {}, {}, id="stream"),
        pytest.param(
            [{"q": p, "a": a} for p, a in TURNS],
            {"completion_only_loss": False},
            {"formatting_func": lambda row: f"{row['q']} {row['a']}"},
            id="formatting_func",
        ),
        pytest.param(
            [{"input_ids": [1, 7, 8, 9, 2], "labels": [-100, -100, 8, 9, -100], "seq": i} for i in range(8)],
            {"dataset_kwargs": {"skip_prepare_dataset": True}},
            {},
            id="prepared",
            marks=CHATS_ARE_READ,
        ),
    ],
)
def test_contexts_are_those_of_the_loop(tmp_path, rows, options, args):
    check_contexts(make(tmp_path, rows, args=args, **options), tiny_model("llama"))


def test_a_step_is_that_of_bss_trainer(tmp_path):
    """On the same rows, with the same options: the same contexts, and losses but for roundings."""
    trainer = make(tmp_path / "trl")
    rows = [split(row) for row in read_by(trainer)]
    other = BSSTrainer(
        tiny_model("llama"),
        BSSConfig(str(tmp_path / "bss"), max_length=64, **(SMALL | MIXED)),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(TEMPLATE, size=VOCAB),
    )
    for (_, mine, _), (_, theirs, _) in zip(steps_of(trainer), steps_of(other), strict=True):
        for one, another in zip(mine, theirs, strict=True):
            assert torch.equal(one["input_ids"], another["input_ids"])
            assert torch.equal(one["labels"], another["labels"])
    for one, another in zip(logs_of(trainer), logs_of(other), strict=True):
        assert one["loss"] == pytest.approx(another["loss"], rel=1e-5)
        for name in ("self_share", "agreement", "differing_share", "self_prob"):
            assert one[name] == another[name]
    torch.testing.assert_close(weights(trainer.model), weights(other.model), rtol=1e-3, atol=1e-4)


def read_by(trainer):
    """The rows as a collator has them, each by itself."""
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        yield {name: batch[name][0].tolist() for name in ("input_ids", "labels")}


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("change", [{}, {"loss_type": "dft"}, {"gradient_checkpointing": False}], ids=str)
@pytest.mark.one_case
def test_without_self_tokens_it_is_trl_bit_for_bit(tmp_path, change):
    plain = make(tmp_path / "plain", trainer=trl.SFTTrainer, config=trl.SFTConfig, args=EVALUATED, **change)
    mixed = make(tmp_path / "mixed", self_prob=0.0, args=EVALUATED, **change)
    for trainer in (plain, mixed):
        trainer.train()
    assert torch.equal(weights(plain.model), weights(mixed.model))
    for one, another in zip(logs_of(plain), logs_of(mixed), strict=True):
        assert one == {name: another[name] for name in one}
    assert plain.evaluate()["eval_loss"] == mixed.evaluate()["eval_loss"]


def test_evaluation_is_under_references(tmp_path):
    plain = make(tmp_path, trainer=trl.SFTTrainer, config=trl.SFTConfig, args=EVALUATED)
    found, expected = (one.evaluate() for one in (make(tmp_path, args=EVALUATED), plain))
    assert {name: found[name] for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")} == {
        name: expected[name] for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    }


def test_passes_are_the_forward_of_the_step(tmp_path, caplog):
    """Where this TRL measures at learned tokens alone; and a trial of that counts nothing twice."""
    caplog.set_level(logging.WARNING, "selfgen")
    reused, ordinary = make(tmp_path), make(tmp_path, reuse_passes=False)
    assert reused._reuse.on == ours._MEASURES_LEARNED
    for trainer in (reused, ordinary):
        trainer.train()
    assert reused._reuse.verified == ours._MEASURES_LEARNED
    if not ours._MEASURES_LEARNED:
        assert "measures entropy where passes compute nothing" in caplog.text
    for one, another in zip(logs_of(reused), logs_of(ordinary), strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
            assert one[name] == pytest.approx(another[name], rel=1e-4)


def test_dft_is_the_target_of_the_same_name(tmp_path):
    mine = make(tmp_path / "trl", loss_type="dft", max_steps=1)
    mine.train()
    rows = [split(row) for row in read_by(mine)]
    other = BSSTrainer(
        tiny_model("llama"),
        BSSConfig(str(tmp_path / "bss"), target="dft", max_length=64, **(SMALL | MIXED | {"max_steps": 1})),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(TEMPLATE, size=VOCAB),
    )
    other.train()
    assert logs_of(mine)[0]["loss"] == pytest.approx(logs_of(other)[0]["loss"], rel=1e-5)


def split(row):
    prompt = row["labels"].count(-100)
    columns = {"prompt_ids": row["input_ids"][:prompt], "answer_ids": row["input_ids"][prompt:]}
    return {"sample_id": ours._hash_of(row["input_ids"], row["labels"]), **columns}


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "self_prob": "auto", "self_prob_warmup": 0}
    unbroken = make(tmp_path / "unbroken", **options)
    unbroken.train()
    resumed = make(tmp_path / "resumed", model=tiny_model("llama", seed=1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-2"))
    assert torch.equal(weights(unbroken.model), weights(resumed.model))
    assert logs_of(unbroken)[-1]["self_prob"] == logs_of(resumed)[-1]["self_prob"] > 0


@pytest.mark.parametrize(
    "change", [{"packing": True}, {"padding_free": True, "max_length": None}, {"use_liger_kernel": True}]
)
def test_options_that_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} is given, but .*: leave .* out"):
        make(tmp_path, **change)


class Changed:
    """TRL's collator, and a change to its batches."""

    def __init__(self, change):
        self.collate, self.change = sft_collator(), change

    def __call__(self, rows):
        batch = self.collate(rows)
        return self.change(batch)


def sft_collator():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: {name: column.flip(1) for name, column in batch.items()}, "padded on the left"),
        (lambda batch: batch | {"position_ids": batch["input_ids"]}, "has, or lacks, position_ids"),
        (lambda batch: {name: batch[name] for name in ("input_ids", "labels")}, "has, or lacks, attention_mask"),
        (
            lambda batch: batch | {"labels": batch["labels"] + (batch["labels"] > 0)},
            "labels that are not its input_ids",
        ),
    ],
)
def test_batches_that_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, args={"data_collator": Changed(change)}).train()


@pytest.mark.parametrize("self_prob", [0.0, 0.5])
@pytest.mark.one_case
def test_labels_may_be_the_ids_themselves(tmp_path, self_prob):
    """As in the common batch["labels"] = batch["input_ids"]: references stay in them."""
    rows = [{"text": f"{answer} {prompt} {answer}"[:7]} for prompt, answer in TURNS if len(answer) > 4]
    losses = []
    for change in (lambda batch: batch | {"labels": batch["input_ids"]}, lambda batch: batch):
        trainer = make(tmp_path, rows, args={"data_collator": Changed(change)}, self_prob=self_prob)
        trainer.train()
        losses.append([entry["loss"] for entry in logs_of(trainer)])
    assert losses[0] == losses[1]


@CHATS_ARE_READ
@pytest.mark.parametrize("self_prob", [0.0, 0.5])
@pytest.mark.one_case
def test_steps_that_learn_nothing(tmp_path, self_prob):
    """A data set may have rows without learned tokens, and a step such rows alone."""
    row = {"input_ids": [1, 7, 8, 9, 2], "labels": [-100, -100, 8, 9, -100]}
    rows = [row] * 4 + [{**row, "labels": [-100] * 5}] * 4
    order = {"dataset_kwargs": {"skip_prepare_dataset": True}, "train_sampling_strategy": "sequential", "max_steps": 2}
    plain = make(tmp_path, rows, trainer=trl.SFTTrainer, config=trl.SFTConfig, **order)
    mixed = make(tmp_path, rows, self_prob=self_prob, **order)
    for trainer in (plain, mixed):
        trainer.train()
        assert logs_of(trainer)[1]["loss"] == 0.0
    assert self_prob or torch.equal(weights(plain.model), weights(mixed.model))


def test_other_refusals(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="prompt"):
        make(tmp_path, args={"peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)})
    sees = property(lambda self: hasattr(self, "_metrics"), lambda *_: None)  # as it would be of a model that sees
    monkeypatch.setattr(trl.SFTTrainer, "_is_vision_dataset", sees, raising=False)
    with pytest.raises(ValueError, match="the rows have images"):
        make(tmp_path)


def test_whole_rows_that_are_learned_are_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "selfgen"):
        make(tmp_path)
        assert "all tokens of a row are learned" not in caplog.text
        make(tmp_path, DIALOGUES)
    assert "all tokens of a row are learned" in caplog.text


@pytest.mark.parametrize("args", [None, "trl"])
def test_arguments_of_trl_get_the_default_options(tmp_path, monkeypatch, args):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # TRL's default
    given = trl.SFTConfig(str(tmp_path / "out"), **SMALL) if args else None
    tokenizer = make_tokenizer(TEMPLATE, size=VOCAB)
    trainer = ours.SFTTrainer(tiny_model("llama"), given, train_dataset=PAIRS, processing_class=tokenizer)
    assert args or trainer.args.output_dir == "-SFT"  # as TRL has it, of a model without a name
    assert isinstance(trainer.args, ours.SFTConfig)
    assert (trainer.args.self_prob, trainer.args.self_prob_warmup) == (0.5, "settled")
    assert trainer.args.learning_rate == (1e-2 if args else trl.SFTConfig("x").learning_rate)


def test_arguments_of_another_class_are_refused(tmp_path):
    from dataclasses import dataclass

    @dataclass
    class Own(trl.SFTConfig):
        more: int = 1

    with pytest.raises(TypeError, match=r"args is a Own, .*give a selfgen\.trl\.SFTConfig"):
        make(tmp_path, config=Own)


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make(tmp_path, args={"peft_config": config})
    oracle = peft.get_peft_model(tiny_model("llama"), config).eval()
    steps = check_contexts(trainer, oracle)
    trained = {name for name in steps[0][2] if not torch.equal(steps[0][2][name], trainer.model.state_dict()[name])}
    assert trained
    assert all("lora_" in name for name in trained)


def test_other_losses(tmp_path, caplog):
    """A second forward, and one whose experts have a loss of their own, are computed in the ordinary way."""
    caplog.set_level(logging.WARNING, "selfgen")
    make(tmp_path, label_smoothing_factor=0.1).train()
    make(tmp_path, model=tiny_model("gpt_oss")).train()
    if ours._MEASURES_LEARNED:
        assert "this loss has a second forward" in caplog.text


def test_activations_that_are_moved_keep_passes_from_reuse(tmp_path, monkeypatch, caplog):
    from contextlib import nullcontext

    from trl.trainer import sft_trainer

    monkeypatch.setattr(sft_trainer, "get_act_offloading_ctx_manager", lambda model: nullcontext())
    with caplog.at_level(logging.WARNING, "selfgen"):
        trainer = make(tmp_path, activation_offloading=True)
    assert not trainer._reuse.on
    trainer.train()


def test_each_process_makes_the_contexts_of_its_rows(tmp_path):
    """By DDP: exact in each, with weights that stay the same in both."""
    in_ranks(_trained_in_a_process, tmp_path)
    one, another = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(one["weights"], another["weights"])
    assert not set(one["rows"]) & set(another["rows"])


def _trained_in_a_process(rank, folder):
    trainer = make(folder / f"out-{rank}", max_steps=1, gradient_accumulation_steps=1)
    steps = check_contexts(trainer, tiny_model("llama"), least=0)
    rows = [row for before, _, _ in steps for batch in before for row in batch["sample_id"].tolist()]
    torch.save({"weights": weights(trainer.model), "rows": rows}, folder / f"{rank}.pt")


@CHATS_ARE_READ
def test_one_process_may_have_nothing_to_learn(tmp_path):
    """It tries no passes then, while the other does."""
    in_ranks(_trained_with_masked_rows, tmp_path)
    one, another = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(one["weights"], another["weights"])
    assert one["logs"] == another["logs"]


def _trained_with_masked_rows(rank, folder):
    row = {"input_ids": [1, 7, 8, 9, 2], "labels": [-100, -100, 8, 9, 2]}
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 2}
    options |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "train_sampling_strategy": "sequential"}
    trainer = make(folder / f"out-{rank}", [{**row, "labels": [-100] * 5}, row, row, row], **options)
    trainer.train()
    logs = [[entry[name] for name in ("loss", "entropy", "num_tokens")] for entry in logs_of(trainer)]
    torch.save({"weights": weights(trainer.model), "logs": logs}, folder / f"{rank}.pt")


PAGE = Path(__file__).resolve().parent.parent / "docs" / "coming_from.md"


def test_the_page_names_options_that_there_are():
    """Ours in its second columns, and TRL's in the table of its command."""
    tables = [line.split("|")[1:3] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    known = {f"--{one.name.replace('_', '-')}" for one in fields(BSSConfig)}
    known |= {name for action in train._parser(BSSConfig, True)._actions for name in action.option_strings}
    named = {name for _, our_side in tables for name in re.findall(r"--[a-z][a-z0-9-]+", our_side)}
    assert named
    assert named <= known
    trl_side, _, _ = PAGE.read_text().partition("## LLaMA-Factory")
    _, _, command = trl_side.partition("| `trl sft` |")
    theirs = {one.name for kind in (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments) for one in fields(kind)}
    cells = [line.split("|")[1] for line in command.splitlines() if line.startswith("| ")]
    asked = {name for cell in cells for name in re.findall(r"`--([a-z0-9_]+)", cell)}
    assert asked - theirs - {"dtype"} == set()


def skipped(rank, folder, layerdrop):
    model = skips_later()
    model.config.layerdrop = layerdrop
    trainer = make(folder, model=model, ddp_find_unused_parameters=True)  # without which DDP itself waits for good
    if rank == 1:
        trainer.add_callback(Skips(trainer))
    trainer.train()
    assert not trainer._reuse.on


def test_a_layer_that_one_process_skips(tmp_path):
    """In TRL's loss, processes gather metrics: one that computed it twice would wait for the others for good."""
    for name in ("told", "not told"):
        (tmp_path / name).mkdir()
    in_ranks(skipped, tmp_path / "told", 0.5, limit=120)
    with pytest.raises(ProcessRaisedException, match="has skipped decoder layers: give reuse_passes=False"):
        in_ranks(skipped, tmp_path / "not told", 0.0, limit=120)
