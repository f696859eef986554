"""What comes out when logits or losses are no numbers, when a model says nothing or never ends, and when it has no more
positions: defined in every place, and counted."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers as t
from datasets import Dataset
from helpers.cli import flags, history, last_line, refused, run, save_model
from helpers.data import TEMPLATE, make_tokenizer, read_jsonl, write_jsonl
from helpers.training import (
    OWN_ANSWERS,
    Tokenizer,
    config,
    losses_of,
    make_rac_trainer,
    make_trainer,
    rows,
)
from models import VOCAB, tiny_model
from transformers import TrainerCallback

from selfgen import BSSTrainer, ContextGenerator, answer, generate_corrected, load_contexts
from selfgen.context import fallback
from selfgen.stored_contexts import read_provenance, write_contexts
from selfgen.training.weights import DivergedError

EOS = 2
PROMPTS = [[5, 6, 7], [9, 10], [11, 12, 13, 14]]
REFERENCES = [[20, 21, 22, 23], [24, 25, 26], [27, 28]]
LOUD = 9  # the token after which everything overflows


def overflowing(family: str, dtype: torch.dtype = torch.float16):
    """A model whose values overflow in rows with the token LOUD, and in no others."""
    if family == "bloom":  # which has no ragged path
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS, "tie_word_embeddings": False}
        model = t.BloomForCausalLM(t.BloomConfig(**sizes, **ids)).eval()
    else:
        model = tiny_model(family)
    model = model.to(dtype)
    for name, weight in model.named_parameters():
        if name.endswith("o_proj.weight"):
            weight.data.mul_(300)
    most = torch.finfo(dtype).max if family != "bloom" else torch.inf  # it normalizes embeddings
    model.get_input_embeddings().weight.data[LOUD] = most * 0.9999
    return model


def is_loud(model, ids: list[int]) -> bool:
    """Whether the model's own forward over a row has no finite logits at its end."""
    with torch.no_grad():
        return not bool(model(input_ids=torch.tensor([ids])).logits[0, -1].isfinite().all())


def generator(model, **options) -> ContextGenerator:
    return ContextGenerator(model, token_budget=16, balance=2, **options)


def constant(model, token: int):
    """The model that always says ``token``."""
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight", "ln_f.weight")):
            weight.data.zero_()
        if name.endswith("ln_f.bias"):
            weight.data.fill_(1.0)
    model.get_input_embeddings().weight.data.fill_(1.0)
    model.lm_head.weight.data[token] = 1000.0 / model.config.hidden_size
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Values that overflow in a few rows


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "fixed_point"), ("llama", "sequential"), ("bloom", "sequential")]
)
def test_contexts_of_rows_that_overflow_are_the_reference(family, method, caplog):
    """They are counted, and the other rows are as without them."""
    model = overflowing(family)
    loud = [is_loud(model, prompt) for prompt in PROMPTS]
    assert loud == [False, True, False]
    mixed = generator(model).contexts(PROMPTS, REFERENCES, 1.0, seed=0, sample_ids=[0, 1, 2], method=method)
    assert mixed.tokens[1].tolist() == REFERENCES[1]
    assert all(mixed.is_self[1])
    invalid = sum(
        is_loud(model, prompt + tokens[:place].tolist())
        for prompt, tokens in zip(PROMPTS, mixed.tokens, strict=True)
        for place in range(len(tokens))
    )
    assert mixed.stats.invalid == invalid >= len(REFERENCES[1])
    assert f"{invalid} self tokens kept the reference, as their logits were not finite" in caplog.text
    quiet = [PROMPTS[0], PROMPTS[2]], [REFERENCES[0], REFERENCES[2]]
    alone = generator(model).contexts(*quiet, 1.0, seed=0, sample_ids=[0, 2], method=method)
    assert [row.tolist() for row in alone.tokens] == [mixed.tokens[0].tolist(), mixed.tokens[2].tolist()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_answers_of_rows_that_overflow_repeat_their_last_token(family, dtype, caplog):
    """Over the ragged cache and by `generate`: each such token is counted once, and slows nothing down."""
    model = overflowing(family, dtype)
    if not is_loud(model, PROMPTS[1]):
        model.get_input_embeddings().weight.data[LOUD] = float("inf")  # fp32 has more room
    found = generator(model).answer(PROMPTS, max_new_tokens=5)
    assert found.tokens[1].tolist() == [PROMPTS[1][-1]] * 5
    assert found.finished[1] is False
    invalid = sum(
        is_loud(model, prompt + tokens[:place].tolist())
        for prompt, tokens in zip(PROMPTS, found.tokens, strict=True)
        for place in range(len(tokens))
    )
    assert found.invalid == invalid >= 5
    assert f"{invalid} tokens of answers are arbitrary, as their logits were not finite" in caplog.text
    assert "slower" not in caplog.text
    alone = generator(model).answer([PROMPTS[0], PROMPTS[2]], sample_ids=[0, 2], max_new_tokens=5)
    assert [row.tolist() for row in alone.tokens] == [found.tokens[0].tolist(), found.tokens[2].tolist()]


def test_a_strategy_that_is_given_up_counts_nothing(monkeypatch):
    model = overflowing("bloom", torch.float32)
    model.get_input_embeddings().weight.data[LOUD] = float("inf")
    want = generator(model).answer(PROMPTS, max_new_tokens=5)
    assert want.invalid
    looks = iter([False, False, True, True, True])
    monkeypatch.setattr(fallback.Fallback, "_suits", lambda *_: next(looks))
    found = generator(model).answer(PROMPTS, max_new_tokens=5)
    assert (found.invalid, [row.tolist() for row in found.tokens]) == (
        want.invalid,
        [row.tolist() for row in want.tokens],
    )


def test_rows_that_have_ended_are_not_counted():
    """`generate` goes on computing them until the last row of the batch has ended."""
    model = constant(overflowing("bloom", torch.float32), 7)
    model.get_input_embeddings().weight.data[LOUD] = float("nan")
    found = generator(model).answer([[5], [5, LOUD, 6]], max_new_tokens=6, eos_token_ids=[6])
    assert found.tokens[1].tolist() == [6]  # its last token again, which ends it
    assert (found.invalid, found.finished) == (1, [False, True])


def test_a_model_that_overflows_is_not_said_to_look_ahead():
    """In attention, a later value that is not finite spoils earlier ones: 0 * NaN is NaN."""
    model = overflowing("llama")
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([[5, 6, 7, LOUD, 8]])).logits[0]
    assert not whole[4].isfinite().all()
    generator(model).check_causal()


def test_stored_contexts_count_what_kept_the_reference(tmp_path, caplog):
    model = overflowing("llama")
    data = {"sample_id": [0, 1, 2], "prompt_ids": PROMPTS, "answer_ids": REFERENCES}
    record = write_contexts(
        generator(model), Dataset.from_dict(data), tmp_path, self_prob=1.0, shard_rows=2, progress=False
    )
    assert record["statistics"]["invalid"] == len(REFERENCES[1])
    assert read_provenance(tmp_path) == record
    assert f"{len(REFERENCES[1])} of 9 self tokens are the reference" in caplog.text
    assert load_contexts(tmp_path)["context_ids"][1] == REFERENCES[1]


# ---------------------------------------------------------------------------------------------------------------------
# Losses that are not finite


class Spoil(TrainerCallback):
    """After the first step, a token's embedding is no number."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.get_input_embeddings().weight.data[LOUD] = float("nan")


def spoiled_rows() -> Dataset:
    """One row of 16 has the token."""
    found = rows().to_list()
    for row in found:
        row["prompt_ids"] = [token if token != LOUD else LOUD + 1 for token in row["prompt_ids"]]
        row["answer_ids"] = [token if token != LOUD else LOUD + 1 for token in row["answer_ids"]]
    return Dataset.from_list(found)


@pytest.mark.parametrize("reuse_passes", [True, False])
@pytest.mark.parametrize("self_prob", [0.0, 0.5])
@pytest.mark.each_value
def test_one_micro_batch_of_several_stops_the_run(tmp_path, self_prob, reuse_passes):
    """With the number of its step, before its gradients are used."""
    data = spoiled_rows().to_list()
    seen: list[list[int]] = []
    trainer = make_trainer(tmp_path / "order", data=Dataset.from_list(data), self_prob=self_prob)
    for _, inputs in losses_of(trainer):
        seen.append(inputs["sample_id"].tolist())
    data[seen[5][0]]["prompt_ids"][0] = LOUD  # in the second micro-batch of step 3
    trainer = make_trainer(
        tmp_path / "out", data=Dataset.from_list(data), self_prob=self_prob, reuse_passes=reuse_passes
    )
    trainer.add_callback(Spoil())
    losses = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: losses.append(compute_loss(*args, **kwargs)) or losses[-1]
    with pytest.raises(DivergedError, match=r"^step 3: the loss is nan"):
        trainer.train()
    assert [bool(loss.isfinite()) for loss in losses] == [True] * 5 + [False]
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("direct_weight", [0.0, 1.0])
@pytest.mark.parametrize("self_prob", [0.0, 0.5])
@pytest.mark.one_case
def test_both_losses_of_rac(tmp_path, direct_weight, self_prob):
    trainer = make_rac_trainer(tmp_path, max_steps=3, direct_weight=direct_weight, self_prob=self_prob)
    model = trainer.generator.model

    class Overflow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            model.lm_head.weight.data[3] = float("nan")

    trainer.add_callback(Overflow())
    with pytest.raises(DivergedError, match=r"^step 2: the loss is nan"):
        trainer.train()
    assert trainer.meter.flush()["invalid"] > 0  # own answers that were arbitrary


def trainer_with_eval(tmp_path: Path, broken: set[int]) -> BSSTrainer:
    """A trainer whose evaluation after these steps is NaN in one batch of two."""
    saving = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    trainer = BSSTrainer(
        tiny_model("llama"),
        config(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2, max_steps=3, **saving),
        train_dataset=rows(),
        eval_dataset=rows(4, seed=3),
        processing_class=Tokenizer(),
    )
    compute_loss, count = trainer.compute_loss, []

    def spoiled(model, inputs, return_outputs=False, **kwargs):
        found = compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if model.training or trainer.state.global_step not in broken:
            return found
        count.append(1)
        factor = float("nan") if len(count) % 2 else 1.0
        return (found[0] * factor, found[1]) if return_outputs else found * factor

    trainer.compute_loss = spoiled
    return trainer


@pytest.mark.parametrize("broken", [{1}, {1, 2}, {2, 3}, {1, 2, 3}])
@pytest.mark.one_case
def test_an_evaluation_that_is_not_finite_is_told_and_never_the_best(tmp_path, caplog, broken):
    trainer = trainer_with_eval(tmp_path, broken)
    trainer.train()
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [loss != loss for loss in found] == [step in broken for step in (1, 2, 3)]
    for step in broken:
        assert f"step {step}: eval_loss is nan, as the loss of 1 of 2 batches is not finite" in caplog.text
    fine = {loss: step for step, loss in enumerate(found, 1) if step not in broken}
    best = trainer.state.best_model_checkpoint
    assert best == (str(tmp_path / f"checkpoint-{fine[min(fine)]}") if fine else None)


def test_fp16_on_a_cpu_is_refused(tmp_path, cli, capsys):
    """It would train with nothing that scales the loss, and say nothing."""
    with pytest.raises(ValueError, match=r"fp16 is given, but on a CPU nothing scales the loss.*give bf16"):
        make_trainer(tmp_path, fp16=True)
    for method in ("bss", "rac", "bash"):
        line = refused(["train", *flags(cli | {"fp16": True, "method": method})], capsys)
        assert "on a CPU nothing scales the loss" in line
    assert not Path(cli["output_dir"]).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Models that say nothing, or never end


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize(("token", "finished"), [(EOS, True), (7, False)])
def test_answers_that_are_empty_or_never_end(family, token, finished):
    model = constant(overflowing(family, torch.float32), token)
    found = answer(model, PROMPTS, max_new_tokens=5)
    assert found.finished == [finished] * 3
    assert [row.tolist() for row in found.tokens] == [[EOS] if finished else [7] * 5] * 3
    assert found.invalid == 0
    mixed = generator(model).contexts(PROMPTS, REFERENCES, 1.0, seed=0, sample_ids=[0, 1, 2], method="sequential")
    assert {token for row in mixed.tokens for token in row.tolist()} == {token}  # as long as the reference


@pytest.mark.parametrize(("token", "empty"), [(EOS, 1.0), (7, 0.0)])
@pytest.mark.parametrize("direct_weight", [0.0, 1.0])
@pytest.mark.one_case
def test_rac_on_empty_and_endless_answers(tmp_path, token, empty, direct_weight):
    """An empty answer is shown as such: the cue follows the prompt."""
    model = constant(tiny_model("llama"), token)
    trainer = make_rac_trainer(tmp_path, model=model, direct_weight=direct_weight)
    found = losses_of(trainer)
    assert all(loss.isfinite() for loss, _ in found)
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["own_answers_empty"] == empty
    assert entry["own_answers_unfinished"] == 1.0 - empty
    assert entry["own_answers_cut"] == 0.0
    if empty:
        cue, inputs = trainer._cue.ids, found[0][1]
        assert inputs["input_ids"][0].tolist()[inputs["prompt_length"][0] - len(cue) :][: len(cue)] == cue


def test_empty_own_answers_of_a_column(tmp_path):
    """Nobody knows whether they were finished."""
    data = [row | {"own_answer": ""} for row in OWN_ANSWERS]
    trainer = make_rac_trainer(tmp_path, data=data, own_answer="column")
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["own_answers_empty"] == 1.0
    assert "own_answers_unfinished" not in entry


def test_corrections_of_empty_answers():
    model = constant(tiny_model("llama"), EOS)
    found = generate_corrected(model, make_tokenizer(TEMPLATE, size=VOCAB), ["a b", "c"], rounds=3, max_new_tokens=4)
    assert [row.tolist() for row in [*found.first, *found.corrected]] == [[EOS]] * 4
    assert (found.finished, found.cut) == ([True, True], [False, False])


ROWS = [{"prompt": "a b", "completion": "c d 5"}, {"prompt": "e", "completion": "f g 7"}] * 4


@pytest.fixture
def cli(tmp_path):
    """Options of `selfgen train` on a tiny checkpoint."""
    save_model(tmp_path / "model", words="57")
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    small = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "use_cpu": True}
    quiet = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1, "max_length": 32, "token_budget": 32}
    names = {"model": tmp_path / "model", "dataset": tmp_path / "train.jsonl", "output_dir": tmp_path / "out"}
    return {**names, **small, **quiet, "balance": 4, "self_prob": 0.5}


def make_constant(folder: Path, token: int) -> None:
    constant(t.AutoModelForCausalLM.from_pretrained(folder), token).save_pretrained(folder)


def of_rows(cli: dict, **changes) -> dict:
    return {name: cli[name] for name in ("model", "dataset", "max_length", "use_cpu")} | changes


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize(("token", "empty", "finished"), [(EOS, 8, True), (7, 0, False)])
def test_generate_counts_them(cli, tmp_path, capsys, caplog, token, empty, finished, correct):
    caplog.set_level(logging.INFO, logger="selfgen")
    make_constant(cli["model"], token)
    file = tmp_path / "answers.jsonl"
    options = of_rows(cli, output_file=file, max_new_tokens=4, correct=correct)
    assert run(["generate", *flags(options)], capsys)[0] == 0
    lines = read_jsonl(file)
    assert [line["own_answer"] for line in lines] == ["" if finished else "a a a a"] * 8
    assert [line["finished"] for line in lines] == [finished] * 8
    assert f"8 answers: {empty} are empty, and {0 if finished else 8} were broken off" in caplog.text


@pytest.mark.parametrize("token", [EOS, 7])
def test_evaluation_of_them_is_defined(cli, tmp_path, capsys, token):
    """Nothing is right, nothing is divided by zero, and both are counted."""
    make_constant(cli["model"], token)
    options = of_rows(cli, output_dir=tmp_path / "eval", max_new_tokens=4)
    metrics = ["exact_match", "rouge", "loss", "curve", "correction"]
    code, out, _ = run(["eval", *flags(options), "--metrics", *metrics], capsys)
    assert code == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["exact_match"]["value"] == 0.0
    assert results["finished"]["count"] == results["empty"]["count"] == (8 if token == EOS else 0)
    assert results["rouge"] == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    assert results["correction"]["stayed_wrong"]["count"] == 8
    assert results["correction"]["right_to_wrong"]["value"] is None  # of none
    assert all("not_finite" not in loss for loss in results["loss"].values())
    assert "empty" in out


def test_evaluation_counts_tokens_without_a_loss(cli, tmp_path, capsys, caplog):
    """A mean over them is none, which the files say as null."""
    model = t.AutoModelForCausalLM.from_pretrained(cli["model"])
    model.get_input_embeddings().weight.data[11] = float("nan")  # "e", of every second prompt
    model.save_pretrained(cli["model"])
    options = of_rows(cli, output_dir=tmp_path / "eval")
    assert run(["eval", *flags(options), "--metrics", "loss", "curve"], capsys)[0] == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    for name in ("reference", "mixed", "own"):
        assert results["loss"][name]["loss"] is None
        broken = sum(loss is None for line in read_jsonl(tmp_path / "eval" / "losses.jsonl") for loss in line[name])
        assert results["loss"][name]["not_finite"] == broken >= 4 * 4
        assert f"loss under {name} contexts: {broken} tokens have none, as it is not finite" in caplog.text
    assert broken < results["loss"]["own"]["tokens"]


@pytest.mark.parametrize("token", [EOS, 7])
@pytest.mark.one_case
def test_rounds_with_such_a_model_train_on(cli, capsys, token):
    """Contexts are as long as the references, whatever the model says."""
    make_constant(cli["model"], token)
    options = cli | {"method": "bash", "rounds": 2, "self_prob": 1.0}
    assert run(["train", *flags(options)], capsys)[0] == 0
    contexts = load_contexts(Path(cli["output_dir"]) / "round-0" / "contexts")
    assert {one for row in contexts["context_ids"] for one in row} == {token}
    assert all(entry["loss"] > 0 for entry in history(Path(cli["output_dir"]) / "round-1"))


@pytest.mark.parametrize("method", ["bss", "rac", "bash"])
def test_rows_that_are_all_empty_end_in_one_line(cli, tmp_path, capsys, method):
    write_jsonl(tmp_path / "empty.jsonl", [{"prompt": "a", "completion": " "}, {"prompt": "b", "completion": ""}] * 4)
    line = refused(["train", *flags(cli | {"dataset": tmp_path / "empty.jsonl", "method": method})], capsys)
    assert "no row" in line or "empty" in line
    assert not list(Path(cli["output_dir"]).rglob("*.parquet"))


# ---------------------------------------------------------------------------------------------------------------------
# Answers that are longer than what there is for them


def short_llama(positions: int = 24):
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(
        t.LlamaConfig(**{**tiny_model("llama").config.to_diff_dict(), "max_position_embeddings": positions})
    ).eval()


def test_answers_end_where_the_positions_end():
    model = constant(short_llama(), 7)
    found = answer(model, [[5] * 20, [5] * 3, [5] * 23], max_new_tokens=9)
    assert [len(row) for row in found.tokens] == [4, 9, 1]
    assert found.finished == [False] * 3
    with pytest.raises(ValueError, match=r"prompts\[1\] has 24 tokens; the model has 24 positions, so none is left"):
        answer(model, [[5], [5] * 24])


@pytest.mark.parametrize("method", ["fixed_point", "sequential"])
def test_contexts_longer_than_the_positions_are_refused(method):
    with pytest.raises(ValueError, match="row 1 has 25 tokens; the model has 24 positions: shorten the row"):
        generator(short_llama()).contexts(
            [[5], [5] * 20], [[6], [6] * 5], 0.5, seed=0, sample_ids=[0, 1], method=method
        )


@pytest.mark.parametrize("new_tokens", [3, 30])
def test_answers_go_on_beyond_a_sliding_window(new_tokens):
    """They are what the model's own forward over each prefix gives."""
    model = tiny_model("mistral")  # a window of 7
    found = answer(model, PROMPTS, max_new_tokens=new_tokens)
    for prompt, tokens in zip(PROMPTS, found.tokens, strict=True):
        context = list(prompt)
        for token in tokens.tolist():
            with torch.no_grad():
                assert int(model(input_ids=torch.tensor([context])).logits[0, -1].argmax()) == token
            context.append(token)


def test_generate_refuses_a_prompt_without_room_before_it_answers_any(cli, tmp_path, capsys, monkeypatch):
    write_jsonl(tmp_path / "long.jsonl", [*ROWS, {"prompt": "a " * 70, "completion": "b"}])
    monkeypatch.setattr("selfgen.cli.generate.answer_rows", lambda *_, **__: pytest.fail("answered"))
    options = of_rows(cli, dataset=tmp_path / "long.jsonl", output_file=tmp_path / "o.jsonl", max_length=128)
    line = refused(["generate", *flags(options)], capsys)
    assert "prompts[8] has 71 tokens; the model has 64 positions, so none is left for an answer" in line
    write_jsonl(tmp_path / "long.jsonl", [*ROWS, {"prompt": "a " * 60, "completion": "b"}])
    line = refused(["generate", *flags(options | {"correct": True, "correction_cue": "a b c d"})], capsys)
    assert "prompts[8] has 61 tokens and the cue" in line
    assert "shorten the prompt or the cue" in line
    assert not (tmp_path / "o.jsonl").exists()


def test_rac_keeps_to_the_positions(tmp_path):
    """Own answers are cut to what prompt, cue and reference leave, and counted."""
    model = constant(short_llama(), 7)
    trainer = make_rac_trainer(tmp_path, model=model, max_length=None, max_new_tokens=50)
    assert trainer.args.max_length == 24
    found = losses_of(trainer)
    assert max(inputs["input_ids"].shape[1] for _, inputs in found) <= 24
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert (entry["own_answers_cut"], entry["own_answers_unfinished"], entry["own_answers_empty"]) == (1.0, 1.0, 0.0)


def test_one_line_where_the_learning_rate_is_absurd(cli, capsys):
    for method in ("rac", "bash"):
        options = cli | {"method": method, "learning_rate": 1e38, "max_steps": 20, "optim": "sgd", "max_grad_norm": 0}
        options |= {"output_dir": cli["output_dir"].with_name(method), "save_steps": 50}
        code, _, err = run(["train", *flags(options)], capsys)
        assert code == 2
        assert last_line(err).startswith("selfgen train: error: step ")
