"""The gap between tokens under references and running freely: planted models, plain loops, and `selfgen eval`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from datasets import Dataset
from helpers.cli import flags, run, save_model
from helpers.data import read_jsonl, write_jsonl
from helpers.training import make_trainer
from models import tiny_model

from selfgen import ContextGenerator
from selfgen.cli.eval import EvalArguments
from selfgen.data import load_rows, tokenize_rows
from selfgen.evaluation import Gap, free_running_gap, gap, row_gaps
from selfgen.training.config import RECIPE
from selfgen.training.report import has_mixed

IDS, EOS, ENDS_AFTER = 40, 2, 39


def successor_model() -> t.PreTrainedModel:
    """It says the number after the last one, whatever came before, and ends after ENDS_AFTER."""
    model = t.LlamaForCausalLM(
        t.LlamaConfig(
            vocab_size=IDS, hidden_size=IDS, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, eos_token_id=EOS, pad_token_id=0, bos_token_id=1,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(IDS))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for number in range(IDS):
            model.lm_head.weight[EOS if number == ENDS_AFTER else (number + 1) % IDS, number] = 20.0
    return model


def counting(slip: int | None, length: int = 10, first: int = 10) -> list[int]:
    """Numbers one after the other; at place ``slip`` one is left out."""
    return [first + place + (slip is not None and place >= slip) for place in range(length)]


def rows_of(*answers: list[int], prompt: int = 9) -> Dataset:
    """Rows of ids alone, without a text or a tokenizer."""
    return Dataset.from_list(
        [
            {"sample_id": number, "prompt_ids": [5, prompt], "answer_ids": answer}
            for number, answer in enumerate(answers)
        ]
    )


def found(*answers: list[int], **options) -> Gap:
    return free_running_gap(ContextGenerator(successor_model()), rows_of(*answers), progress=False, **options)


def test_a_model_with_a_known_gap():
    """After a slip at place k all of its own tokens are wrong, but under references only one is."""
    slips = [2, 5, 8, 0] * 5
    gap = found(*map(counting, slips))
    assert gap.under_references.tolist() == [9] * 20
    assert gap.running_freely.tolist() == slips
    assert gap.points == pytest.approx(100 * sum(9 - slip for slip in slips) / 200)
    low, high = gap.interval
    assert low < gap.points < high
    assert gap.whole_answers.count == 0
    said = gap.advice
    assert said.startswith("your model loses 52.5 points when it runs freely (90.0% of tokens right under references, ")
    assert "37.5% running freely; 95% interval" in said
    assert "20 rows): try training with BSS as it is by default, and compare with --self-prob 0 --lean-loss (" in said
    assert f"of its self tokens differ from the reference, so p would be {gap.self_prob:.2g})" in said


def test_a_model_without_a_gap():
    gap = found(*[counting(None)] * 12)
    assert (gap.points, gap.interval, gap.whole_answers.count, gap.agreement) == (0.0, (0.0, 0.0), 12, 1.0)
    assert gap.advice.endswith("12 rows): BSS has little to win")
    gap = found(*[counting(9)] * 12)  # wrong at the last place, also under references
    assert gap.points == 0.0
    assert gap.whole_answers.count == 0


def test_places_after_the_end_of_an_answer_are_wrong():
    """Also where the answer would have gone on as the reference does; more tokens than the reference's don't count."""
    ended = [38, 39, 4, 5, 6]  # the model ends after 39
    (line,) = row_gaps(ContextGenerator(successor_model()), list(rows_of(ended, prompt=37)))
    assert (line["tokens"], line["right_under_references"], line["right_running_freely"]) == (5, 4, 2)
    whole = [38, 39, EOS]
    (line,) = row_gaps(ContextGenerator(successor_model()), list(rows_of(whole, prompt=37)))
    assert line["right_running_freely"] == line["right_under_references"] == line["tokens"] == 3
    (line,) = row_gaps(ContextGenerator(successor_model()), list(rows_of([10, 11])))
    assert line["right_running_freely"] == 2
    (line,) = row_gaps(ContextGenerator(successor_model()), list(rows_of(counting(None))), eos_token_ids=[13])
    assert (line["right_under_references"], line["right_running_freely"]) == (10, 4)


def test_too_few_rows_are_said_to_be():
    assert "2 rows): these are too few rows to tell" in found(counting(2), counting(3)).advice
    gap = found(*[counting(None)] * 30, counting(2))  # one row of 31 has all of it
    assert gap.points > 2
    assert gap.interval[0] <= 0
    assert "31 rows): these are too few rows to tell, so give more (--gap-rows, or more data)" in gap.advice


@torch.no_grad()
def plain_counts(model, row: dict) -> tuple[int, int]:
    """Right under references, and running freely, one token at a time."""
    right = []
    for own in (False, True):
        context, count = list(row["prompt_ids"]), 0
        for token in row["answer_ids"]:
            best = int(model(torch.tensor([context])).logits[0, -1].argmax())
            count += best == token
            if own and best == EOS:
                break
            context.append(best if own else token)
        right.append(count)
    return right[0], right[1]


@pytest.mark.parametrize(("family", "batch_size"), [("llama", 2), ("gpt2", 8)])
def test_counts_are_those_of_plain_loops(family, batch_size):
    model = tiny_model(family)
    prompts = torch.randint(3, 131, (6, 3), generator=torch.Generator().manual_seed(0)).tolist()
    said = ContextGenerator(model, temperature=0.0).answer(prompts, max_new_tokens=9).tokens
    answers = [row.tolist() for row in said]
    for place, answer in enumerate(answers[1:]):
        answer[place % len(answer)] = (answer[place % len(answer)] + 1) % 131
    rows = [
        {"sample_id": 7 * number, "prompt_ids": prompt, "answer_ids": answer}
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    generator = ContextGenerator(model, token_budget=16, balance=2)
    lines = row_gaps(generator, rows, self_prob=0.5, seed=3, batch_size=batch_size, answer_batch_size=3)
    for line, row in zip(lines, rows, strict=True):
        assert (line["right_under_references"], line["right_running_freely"]) == plain_counts(model, row)
        mixed = generator.contexts(
            [row["prompt_ids"]], [row["answer_ids"]], 0.5, seed=3, sample_ids=[row["sample_id"]], method="sequential"
        )
        same = mixed.tokens[0] == torch.tensor(row["answer_ids"])
        assert line["self_tokens"] == int(mixed.is_self[0].sum())
        assert line["self_tokens_right"] == int((same & mixed.is_self[0]).sum())
    assert generator.temperature == 1.0


@pytest.mark.parametrize(
    ("agreement", "self_prob"), [(0.0, 0.5), (0.4, 0.3), (0.9, 0.05), (0.97, 0.015), (1.0, 0.0), (None, None)]
)
def test_the_advice_is_about_tokens_that_differ(agreement, self_prob):
    own = 0 if agreement is None else 100
    lines = {"tokens": 10, "right_under_references": 9, "right_running_freely": 5, "self_tokens": own}
    found = Gap.of([lines | {"self_tokens_right": round(own * (agreement or 0))}] * 10)
    assert found.self_prob == (None if self_prob is None else pytest.approx(self_prob))
    said = "compare with --self-prob 0 --lean-loss" if self_prob is None else f"p would be {self_prob:.2g})"
    assert found.advice.endswith(said)


def test_a_model_that_bss_has_trained_is_not_told_to_try_it(tmp_path):
    for freely, said in ((500, "BSS has little left to win"), (400, "same training with --self-prob 0 --lean-loss")):
        gap = Gap.of([counts(500, freely, 1000, 500)] * 20, after_bss=True)
        assert gap.advice.endswith(said)
        assert gap.to_dict()["advised_self_prob"] is None
    trainers = [make_trainer(tmp_path / str(p), self_prob=p, max_steps=1, logging_steps=1) for p in (0.0, 0.5)]
    for trainer in trainers:
        trainer.train()
        trainer.save_state()
    assert [has_mixed(trainer.args.output_dir) for trainer in trainers] == [False, True]
    (tmp_path / "trainer_state.json").write_text("[]")
    assert not has_mixed(tmp_path)
    assert not has_mixed("a/name-on-the-hub")


def test_the_advice_is_what_training_does_by_default():
    assert RECIPE["self_prob"] == gap.SELF_PROB
    assert RECIPE["self_prob_schedule"] == "disagreement"
    assert RECIPE["sampling_temperature"] == gap.SELF_TEMPERATURE == EvalArguments("out").sampling_temperature


def counts(under: int, freely: int, own: int = 0, right: int = 0) -> dict[str, int]:
    """Of a row with 1000 tokens."""
    return {"tokens": 1000, "right_under_references": under, "right_running_freely": freely, "self_tokens": own,
            "self_tokens_right": right}  # fmt: skip


def test_the_sentences():
    """The interval is of what is lost or gained; nothing is lost by minus zero, and few tokens are not none."""
    for lines, start in (
        ([counts(500, 520 + number, 1000, 500) for number in range(19)], "your model gains 2.9 points when"),
        ([counts(500, 500)] * 20 + [counts(500, 501)], "your model loses 0.0 points when"),
        ([counts(500, 480)], "your model loses 2.0 points when"),
    ):
        gap = Gap.of(lines)
        said = gap.advice
        assert said.startswith(start)
        low, high = map(float, said.partition("95% interval ")[2].partition(",")[0].split(" to "))
        assert low <= abs(round(gap.points, 1)) <= high
        assert "-0.0" not in said
        assert gap.to_dict()["advised_self_prob"] is None
    assert "1 row): these are too few" in said
    gap = Gap.of([counts(500, 400, 1000, 996)] * 20)
    assert gap.to_dict()["advised_self_prob"] == gap.self_prob == pytest.approx(0.002)
    assert gap.advice.endswith("(only 0.4% of its self tokens differ from the reference, so p would be 0.002)")


def test_a_model_that_knows_nothing_has_nothing_to_lose():
    """Which is no reason not to train it with BSS: as by default, one with random weights learns most from it."""
    for under, said in ((0, "the model knows too little"), (99, "the model knows too little"), (101, "BSS has little")):
        assert f"20 rows): {said}" in Gap.of([counts(under, under)] * 20).advice
    assert "try training with BSS" in Gap.of([counts(90, 10)] * 20).advice


def test_the_interval_is_that_of_resampled_rows():
    """About as wide as the normal one, the same each time, and a ratio of sums where rows differ in length."""
    draw = np.random.default_rng(1)
    tokens = draw.integers(5, 40, 300)
    under = draw.binomial(tokens, 0.9)
    freely = draw.binomial(under, 0.8)
    names = ("tokens", "right_under_references", "right_running_freely")
    plain = {"self_tokens": 0, "self_tokens_right": 0}
    lines = [plain | dict(zip(names, map(int, row), strict=True)) for row in zip(tokens, under, freely, strict=True)]
    low, high = Gap.of(lines).interval
    assert (low, high) == Gap.of(lines).interval
    share = (under - freely).sum() / tokens.sum()
    spread = ((under - freely - share * tokens) / tokens.mean()).std() / len(tokens) ** 0.5
    assert low == pytest.approx(100 * (share - 1.96 * spread), abs=0.3)
    assert high == pytest.approx(100 * (share + 1.96 * spread), abs=0.3)
    with pytest.raises(ValueError, match="no rows to evaluate on"):
        Gap.of([])


# The command line


@pytest.fixture
def arguments(tmp_path):
    save_model(tmp_path / "model", initializer_range=0.3)
    rows = [{"prompt": f"{a} {b}", "completion": "c d e f"[: 1 + 2 * (number % 4)]}
            for number, (a, b) in enumerate((a, b) for a in "abcd" for b in "efgh")]  # fmt: skip
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return {
        "model": tmp_path / "model", "dataset": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out",
        "max_length": 32, "use_cpu": True,
    }  # fmt: skip


def evaluate(arguments: dict, capsys, *metrics: str) -> tuple[dict, str]:
    code, out, err = run(["eval", *flags(arguments), *(["--metrics", *metrics] if metrics else [])], capsys)
    assert code == 0, err
    return json.loads((Path(arguments["output_dir"]) / "results.json").read_text()), out


def test_it_is_the_first_line_of_an_evaluation(arguments, capsys):
    """By default, with the other metrics, and as of Python."""
    results, out = evaluate(arguments, capsys)
    assert results["metrics"] == ["gap", "exact_match", "loss", "curve"]
    model = t.AutoModelForCausalLM.from_pretrained(arguments["model"])
    tokenizer = t.AutoTokenizer.from_pretrained(arguments["model"])
    rows, _ = tokenize_rows(load_rows(str(arguments["dataset"])), tokenizer, max_length=32)
    want = free_running_gap(ContextGenerator(model, temperature=gap.SELF_TEMPERATURE), rows, progress=False)
    assert results["gap"] == want.to_dict()
    assert out.splitlines()[0] == want.advice
    assert (
        f"tokens, under references     {results['gap']['under_references']:8.2%}  of {want.tokens.sum()} in 16" in out
    )
    assert f"equal to the reference      {want.agreement:9.2%}  of {want.self_tokens} self tokens" in out


def test_more_rows_can_be_added(arguments, capsys, monkeypatch):
    """Those that were measured are not measured again; fewer leave those that are there."""
    evaluate(arguments | {"gap_rows": 5}, capsys, "gap")
    file = Path(arguments["output_dir"]) / "gap.jsonl"
    assert len(read_jsonl(file)) == 5
    results, _ = evaluate(arguments | {"gap_rows": 11, "batch_size": 2}, capsys, "gap")
    first = read_jsonl(file)
    assert [line["sample_id"] for line in first] == list(range(11))
    assert results["gap"]["rows"] == 11
    monkeypatch.setattr("selfgen.cli.eval.row_gaps", lambda *_, **__: pytest.fail("must not be measured again"))
    results, out = evaluate(arguments | {"gap_rows": 3}, capsys, "gap")
    assert results["gap"]["rows"] == 11
    assert read_jsonl(file) == first
    results, out = evaluate(arguments, capsys, "loss")  # the gap stays the first line
    assert results["gap"]["rows"] == 11
    assert out.startswith("your model ")


def test_a_kill_loses_no_row(arguments, capsys, monkeypatch):
    def dies(generator, rows, **options):
        if rows[0]["sample_id"] >= 8:
            raise KeyboardInterrupt
        return row_gaps(generator, rows, **options)

    monkeypatch.setattr("selfgen.cli.eval.row_gaps", dies)
    with pytest.raises(KeyboardInterrupt):
        run(["eval", *flags(arguments | {"batch_size": 1}), "--metrics", "gap"], capsys)
    file = Path(arguments["output_dir"]) / "gap.jsonl"
    assert len(read_jsonl(file)) == 8
    monkeypatch.setattr("selfgen.cli.eval.row_gaps", row_gaps)
    results, _ = evaluate(arguments | {"batch_size": 1}, capsys, "gap")
    whole, _ = evaluate(arguments | {"batch_size": 1, "output_dir": f"{arguments['output_dir']}2"}, capsys, "gap")
    assert results["gap"] == whole["gap"]


def test_references_that_were_cut_have_a_gap_too(arguments, capsys):
    results, _ = evaluate(arguments | {"max_length": 5}, capsys, "gap")
    assert results["data"]["truncated"]
    assert results["gap"]["rows"] == 16
