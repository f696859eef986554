"""Evaluation: losses against a plain computation, answers and corrections by hand, and `selfgen eval`."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import transformers as t
from datasets import Dataset
from helpers.cli import flags, run, save_model
from helpers.data import read_jsonl, write_jsonl
from helpers.processes import kill_command
from models import VOCAB, tiny_model

from selfgen import ContextGenerator
from selfgen.data import load_rows, tokenize_rows
from selfgen.evaluation import (
    Corrections,
    PositionLoss,
    Share,
    answers,
    exact_match,
    exposure_bias,
    extract_answer,
    held_out_losses,
    report,
    rouge,
)
from selfgen.evaluation.symbolic import Undecided

# Answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("#### 18\nQuestion: how many are 3 and 4?\n#### 7", "18"),  # the model went on asking itself
        ("####18 dollars, not 20", "18"),
        ("#### $1,234.50.", "1234.5"),
        ("#### **$70,000**", "70000"),
        ("#### -5", "-5"),
        ("#### -$5.00", "-5"),
        ("#### $-5", "-5"),
        ("#### −3%", "-3"),
        ("#### 1,00,000 rupees", "100000"),
        ("#### \\$12", "12"),
        ("#### Step 1\nAdd 2 and 3.\n#### 5", "5"),
        ("#### none\nIt is 4.", "4"),
        ("The answer is 42.", "42"),
        ("It costs $3 or 4%.", "4"),
        ("1,234,567", "1234567"),
        ("2, 3, 4", "4"),
        ("it is 10-5", "5"),
        ("it is (2+3)-4", "4"),
        ("it is 10% -5", "-5"),
        ("from -2 to -7.", "-7"),
        ("0.50", "0.5"),
        ("it is .5", "0.5"),
        ("so it is...18", "18"),
        ("done.5", "5"),
        ("007", "7"),
        ("18.0", "18"),
        ("-0.0", "0"),
        ("100", "100"),
        ("\\boxed{12}", "12"),
        ("12345678901234567890123456789012345.25", "12345678901234567890123456789012345.25"),
        ("no number at all", None),
        ("", None),
        ("####", None),
    ],
)
def test_extracted_answers(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("so it is $18.00.", "#### 18", True),
        ("1,000", "#### 1000", True),
        ("#### 18", "... #### 81", False),
        ("-18", "18", False),
        ("18.5", "18", False),
        ("I don't know", "#### 18", False),
        ("", "#### 18", False),
        (" yes \n", "yes", True),
        ("yes 1", "yes", False),
        ("no", "yes", False),
    ],
)
def test_exact_match(answer, reference, right):
    assert exact_match(answer, reference) is right


def test_rouge_by_hand():
    """5 of 6 words, 3 of 5 pairs, a common subsequence of 5; what is only in the answer counts against it."""
    scores = rouge("the cat on the mat", "the cat sat on the mat")
    assert scores == pytest.approx({"rouge1": 10 / 11, "rouge2": 2 / 3, "rougeL": 10 / 11})
    assert rouge("mat the on", "on the mat") == pytest.approx({"rouge1": 1.0, "rouge2": 0.0, "rougeL": 1 / 3})
    assert rouge("", "a") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


def test_rouge_says_what_to_install(monkeypatch):
    answers._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'selfgen[eval]'")):
        rouge("a", "b")


def test_intervals_are_wilsons():
    for total in (1, 2, 10, 37):
        for count in range(total + 1):
            expected = scipy.stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
            assert Share(count, total).interval == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert Share(0, 0).to_dict() == {"count": 0, "total": 0, "value": None, "interval": [0.0, 1.0]}


def test_corrections_by_hand():
    first, corrected = "0001111111", "0110000111"
    found = Corrections.of((a == "1", b == "1") for a, b in zip(first, corrected, strict=True))
    assert found == Corrections(wrong_to_right=2, right_to_wrong=4, stayed_right=3, stayed_wrong=1)
    shares = {name: (share.count, share.total) for name, share in found.shares.items()}
    assert shares == {
        "before": (7, 10),
        "after": (5, 10),
        "wrong_to_right": (2, 3),
        "right_to_wrong": (4, 7),
        "stayed_right": (3, 7),
        "stayed_wrong": (1, 3),
    }
    assert Corrections.of([(True, True)]).to_dict()["wrong_to_right"]["value"] is None


# Losses


def token_rows(count: int = 5, longest: int = 9) -> Dataset:
    torch.manual_seed(count)
    rows = []
    for number in range(count):
        prompt, answer = torch.randint(1, 6, ()), torch.randint(1, longest + 1, ())
        ids = torch.randint(3, VOCAB, (int(prompt + answer),)).tolist()
        rows.append({"sample_id": 7 * number, "prompt_ids": ids[:prompt], "answer_ids": ids[prompt:]})
    return Dataset.from_list(rows)


@torch.no_grad()
def plain_losses(model, row: dict, own: bool) -> list[float]:
    """One row, one token at a time: the loss of the reference, then the greedy token or the reference goes on."""
    context, losses = list(row["prompt_ids"]), []
    for token in row["answer_ids"]:
        logits = model(torch.tensor([context])).logits[0, -1]
        losses.append(float(-F.log_softmax(logits, -1)[token]))
        context.append(int(logits.argmax()) if own else token)
    return losses


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_losses_are_those_of_a_plain_loop(family, batch_size):
    model, rows = tiny_model(family), token_rows()
    generator = ContextGenerator(model, temperature=0.0, token_budget=16, balance=2)
    found = held_out_losses(generator, rows, {"reference": 0.0, "own": 1.0}, batch_size=batch_size, progress=False)
    for name, loss in found.items():
        expected = [plain_losses(model, row, own=name == "own") for row in rows]
        for position in range(max(map(len, expected))):
            there = [row[position] for row in expected if position < len(row)]
            assert int(loss.counts[position]) == len(there)
            assert float(loss.sums[position]) == pytest.approx(sum(there), rel=1e-5)
        assert loss.mean == pytest.approx(sum(map(sum, expected)) / sum(map(len, expected)), rel=1e-5)
    assert found["own"].mean != pytest.approx(found["reference"].mean, rel=1e-3)


def test_mixed_contexts():
    """p = 0 is the reference; the mask and the noise are those of the generator; both methods agree."""
    model, rows = tiny_model("llama"), token_rows()
    generator = ContextGenerator(model, token_budget=16, balance=2)
    found = held_out_losses(generator, rows, {"reference": 0.0, "zero": 0.0, "mixed": 0.5}, seed=3, progress=False)
    assert torch.equal(found["reference"].sums, found["zero"].sums)
    losses = []
    for row in rows:
        ids = [row["prompt_ids"]], [row["answer_ids"]]
        context = generator.contexts(*ids, 0.5, seed=3, sample_ids=[row["sample_id"]]).tokens[0].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([row["prompt_ids"] + context])).logits[0, len(row["prompt_ids"]) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(row["answer_ids"]), reduction="none"))
    assert found["mixed"].sums == pytest.approx(PositionLoss.of(losses).sums, rel=1e-5)
    sequential = held_out_losses(generator, rows, {"mixed": 0.5}, seed=3, method="sequential", progress=False)
    assert sequential["mixed"].sums == pytest.approx(found["mixed"].sums, rel=1e-5)


@pytest.mark.parametrize("width", [1, 2, 4, 100, None])
def test_curve_averages_to_the_mean(width):
    torch.manual_seed(0)
    lengths = torch.randint(1, 60, (20,)).tolist()
    reference, own = (PositionLoss.of([torch.rand(length) for length in lengths]) for _ in range(2))
    curve = exposure_bias(reference, own, width)
    tokens = sum(bucket["tokens"] for bucket in curve)
    assert tokens == sum(lengths) == reference.tokens
    for name, loss in (("reference", reference), ("own", own)):
        assert sum(bucket["tokens"] * bucket[name] for bucket in curve) / tokens == pytest.approx(loss.mean)
    assert all(bucket["gap"] == bucket["own"] - bucket["reference"] for bucket in curve)
    assert curve[0]["first"] == 0
    assert curve[-1]["last"] == max(lengths) - 1
    assert all(after["first"] == before["last"] + 1 for before, after in pairwise(curve))


def test_buckets_by_hand():
    reference, own = PositionLoss.of([[1.0, 2.0, 3.0], [5.0]]), PositionLoss.of([[2.0, 2.0, 6.0], [6.0]])
    assert exposure_bias(reference, own, 2) == [
        {"first": 0, "last": 1, "tokens": 3, "reference": 8 / 3, "own": 10 / 3, "gap": 10 / 3 - 8 / 3},
        {"first": 2, "last": 2, "tokens": 1, "reference": 3.0, "own": 6.0, "gap": 3.0},
    ]
    long = PositionLoss.of([[0.0] * 300])
    assert [bucket["last"] for bucket in exposure_bias(long, long)][:2] == [31, 63]
    assert len(exposure_bias(long, long)) <= 16


def test_bad_losses():
    with pytest.raises(ValueError, match="no rows to evaluate on"):
        held_out_losses(ContextGenerator(tiny_model("llama")), token_rows().select([]), {"own": 1.0})
    one, two = PositionLoss.of([[1.0]]), PositionLoss.of([[1.0, 2.0]])
    with pytest.raises(ValueError, match="different rows"):
        exposure_bias(one, two)
    with pytest.raises(ValueError, match="width is 0"):
        exposure_bias(one, one, 0)


# The report


def test_plots_show_the_numbers(tmp_path, monkeypatch):
    curve = exposure_bias(PositionLoss.of([[1.0, 2.0], [3.0]]), PositionLoss.of([[2.0, 5.0], [4.0]]), 1)
    losses = {"reference": {"self_prob": 0.0, "loss": 2.0}, "own": {"self_prob": 1.0, "loss": 3.5}}
    upper, lower = report._curve_lines(curve).axes
    assert {line.get_label(): list(line.get_ydata()) for line in upper.lines} == {
        "reference context": [2.0, 2.0],
        "self context": [3.0, 5.0],
    }
    assert [bar.get_height() for bar in lower.patches] == [2, 1]
    assert [bar.get_height() for bar in report._loss_bars(losses).axes[0].patches] == [2.0, 3.5]
    written = report.write_plots({"loss": losses, "curve": curve}, tmp_path)
    assert [file.name for file in written] == ["loss.png", "curve.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)
    assert report.write_plots({}, tmp_path) == []
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'selfgen[eval]'")):
        report.write_plots({"loss": losses}, tmp_path)


# The command line

MODEL = {"words": ["####", "1", "2", "18"], "max_position_embeddings": 128, "initializer_range": 0.3}
ROWS = [{"prompt": "a b", "completion": "c d #### 18"}, {"prompt": "e", "completion": "f 1 #### 2"}]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, **MODEL)
    return folder


@pytest.fixture
def arguments(model_dir, tmp_path):
    file = tmp_path / "test.jsonl"
    write_jsonl(file, ROWS * 5)
    return {
        "model": str(model_dir),
        "dataset": str(file),
        "output_dir": str(tmp_path / "out"),
        "max_length": 32,
        "max_new_tokens": 8,
    }


def results_of(arguments: dict) -> dict:
    return json.loads((Path(arguments["output_dir"]) / "results.json").read_text())


def lines_of(arguments: dict, name: str) -> list[dict]:
    return read_jsonl(Path(arguments["output_dir"]) / f"{name}.jsonl")


def evaluate(arguments: dict, capsys, *metrics: str) -> tuple[int, str, str]:
    return run(["eval", *flags(arguments), *(["--metrics", *metrics] if metrics else [])], capsys)


def saying(answer: str, seen: list[int] | None = None, dies_after: int | None = None):
    """A stand-in for `answer`: the same answer to every prompt, noting the rows; a kill after so many of them."""

    def generate(generator, prompts, *, sample_ids, **options):
        if dies_after is not None and len(seen) >= dies_after:
            raise KeyboardInterrupt
        if seen is not None:
            seen.extend(sample_ids)
        tokenizer = t.AutoTokenizer.from_pretrained(generator.model.name_or_path)
        tokens = torch.tensor(tokenizer(f"{answer} <eos>", add_special_tokens=False).input_ids)
        return SimpleNamespace(tokens=[tokens] * len(prompts), finished=[True] * len(prompts))

    return generate


def test_everything(arguments, capsys, terminal):
    metrics = ["exact_match", "rouge", "loss", "curve", "correction"]
    code, out, err = evaluate({**arguments, "sampling_temperature": 0}, capsys, *metrics)
    assert code == 0
    folder, results = Path(arguments["output_dir"]), results_of(arguments)
    assert set(metrics) <= set(results)
    assert len(results["commands"]) == 1
    assert results["commands"][0].startswith("selfgen eval --model ")
    assert set(results["versions"]) == {"selfgen", "torch", "transformers"}
    assert results["settings"]["answers"]["max_new_tokens"] == 8
    assert results["data"]["kept"] == 10

    model = t.AutoModelForCausalLM.from_pretrained(arguments["model"])
    tokenizer = t.AutoTokenizer.from_pretrained(arguments["model"])
    rows, _ = tokenize_rows(load_rows(arguments["dataset"]), tokenizer, max_length=32)
    self_probs = {"reference": 0.0, "mixed": 0.25, "own": 1.0}
    losses = held_out_losses(ContextGenerator(model, temperature=0.0), rows, self_probs, progress=False)
    for name, loss in losses.items():
        assert results["loss"][name] == {
            "self_prob": self_probs[name],
            "loss": pytest.approx(loss.mean, abs=1e-5),
            "tokens": loss.tokens,
        }
        assert f"{results['loss'][name]['loss']:.4f}" in out
    assert results["curve"][0]["own"] == pytest.approx(losses["own"].mean, abs=1e-5)  # all in one bucket

    lines = lines_of(arguments, "answers")
    assert [line["sample_id"] for line in lines] == list(range(10))
    for line, row in zip(lines, ROWS * 5, strict=True):
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        said = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        text = tokenizer.decode(said, skip_special_tokens=True)
        assert line == {
            "sample_id": line["sample_id"],
            "prompt": f"<bos> {row['prompt']}",
            "reference": row["completion"],
            "reference_answer": row["completion"].split()[-1],
            "generated": text,
            "generated_answer": extract_answer(text),
            "generated_right": exact_match(text, row["completion"]),
            "finished": int(said[-1]) == tokenizer.eos_token_id,
        }
    right = sum(line["generated_right"] for line in lines)
    assert results["exact_match"] == Share(right, 10).to_dict()
    assert results["rouge"]["rouge1"] == pytest.approx(
        sum(rouge(line["generated"], line["reference"])["rouge1"] for line in lines) / 10
    )

    corrected = lines_of(arguments, "corrections")
    pairs = [(line["first_right"], line["corrected_right"]) for line in corrected]
    assert [line["first"] for line in corrected] == [line["generated"] for line in lines]
    assert results["correction"] == Corrections.of(pairs).to_dict()
    for name in ("loss.png", "curve.png"):
        assert (folder / name).stat().st_size > 5000
    assert "%" in err  # progress bars, with the time left
    assert "<" in err


def test_right_and_wrong(arguments, monkeypatch, capsys):
    monkeypatch.setattr("selfgen.cli.answers.answer", saying("c 2 #### 18"))
    corrected = {"first": "c #### 18", "corrected": "c #### 2"}

    def generate_corrected(generator, tokenizer, prompts, *, rounds, cue, **options):
        assert (rounds, cue) == (2, "Sure?")
        said = {name: saying(text)(generator, prompts, **options).tokens for name, text in corrected.items()}
        return SimpleNamespace(**said, finished=[True] * len(prompts))

    monkeypatch.setattr("selfgen.cli.answers.generate_corrected", generate_corrected)
    options = {**arguments, "rounds": 2, "correction_cue": "Sure?"}
    code, out, _ = evaluate(options, capsys, "exact_match", "correction")
    assert code == 0
    results = results_of(arguments)
    assert results["exact_match"]["count"] == 5
    assert results["finished"]["value"] == 1.0
    assert "exact match                    50.00%  [23.66%, 76.34%]  5 of 10" in out
    correction = {name: (share["count"], share["total"]) for name, share in results["correction"].items()}
    assert correction["wrong_to_right"] == correction["right_to_wrong"] == (5, 5)
    assert not {"loss", "curve", "rouge"} & set(results)


def test_math_verify_is_asked_too_where_it_is_installed(arguments, monkeypatch, capsys):
    pytest.importorskip("math_verify")
    monkeypatch.setattr("selfgen.cli.answers.answer", saying("c #### 18"))
    code, out, _ = evaluate(arguments, capsys, "exact_match")
    assert code == 0
    assert results_of(arguments)["symbolic_match"] == {**results_of(arguments)["exact_match"], "undecided": 0}
    assert "symbolic match                 50.00%" in out


def test_math_verify_may_be_missing_or_take_too_long(arguments, monkeypatch, capsys, caplog):
    caplog.set_level("INFO", logger="selfgen")

    def undecided(*texts):
        raise Undecided

    monkeypatch.setattr("selfgen.cli.answers.answer", saying("c #### 18"))
    monkeypatch.setattr("selfgen.cli.eval.has_math_verify", lambda: True)
    monkeypatch.setattr("selfgen.cli.eval.decide", undecided)
    assert evaluate(arguments, capsys, "exact_match")[0] == 0
    assert "10 answers could not be compared in time" in caplog.text
    found = results_of(arguments)["symbolic_match"]
    assert (found["count"], found["total"], found["undecided"]) == (0, 10, 10)
    monkeypatch.setattr("selfgen.cli.eval.has_math_verify", lambda: False)
    code, out, _ = evaluate(arguments, capsys, "exact_match")
    assert code == 0
    assert "no symbolic_match, as math-verify is not installed: pip install 'selfgen[eval]'" in caplog.text
    assert "symbolic_match" not in results_of(arguments)
    assert "symbolic" not in out


def test_a_broken_off_evaluation_goes_on(arguments, monkeypatch, capsys):
    """No row is generated twice, none is missing, and the results are those of an evaluation in one go."""
    seen: list[int] = []
    monkeypatch.setattr("selfgen.cli.answers.answer", saying("c #### 18", seen, dies_after=8))
    options = {**arguments, "batch_size": 1}
    with pytest.raises(KeyboardInterrupt):
        evaluate(options, capsys, "exact_match")
    file = Path(arguments["output_dir"]) / "answers.jsonl"
    assert len(file.read_text().splitlines()) == 8
    with file.open("a") as lines:
        lines.write('{"sample_id": 8, "prom')  # what a kill may leave
    assert not (file.parent / "results.json").exists()

    monkeypatch.setattr("selfgen.cli.answers.answer", saying("c #### 18", seen))
    assert evaluate({**options, "batch_size": 2}, capsys, "exact_match")[0] == 0
    assert seen == list(range(10))
    lines = lines_of(arguments, "answers")
    assert [line["sample_id"] for line in lines] == seen
    page = (Path(__file__).resolve().parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in lines[0])
    first = results_of(arguments)
    assert evaluate(options, capsys, "exact_match", "loss")[0] == 0  # another metric on top of it
    assert len(seen) == 10
    assert results_of(arguments)["exact_match"] == first["exact_match"]
    whole = {**options, "output_dir": arguments["output_dir"] + "2"}
    assert evaluate(whole, capsys, "exact_match")[0] == 0
    assert lines_of(whole, "answers") == lines_of(arguments, "answers")


def test_what_was_measured_before_stays(arguments, capsys):
    """Other metrics in a folder join those that it has, each with the settings that it was made with."""
    assert evaluate({**arguments, "rounds": 2, "self_prob": 0.5}, capsys, "correction", "rouge", "loss")[0] == 0
    first = results_of(arguments)
    assert evaluate(arguments, capsys, "exact_match")[0] == 0
    assert evaluate(arguments, capsys, "exact_match")[0] == 0
    both = results_of(arguments)
    assert {name: both[name] for name in ("correction", "rouge", "loss", "finished")} == {
        name: first[name] for name in ("correction", "rouge", "loss", "finished")
    }
    assert both["settings"]["corrections"]["rounds"] == 2
    assert both["settings"]["losses"]["self_prob"] == both["loss"]["mixed"]["self_prob"] == 0.5
    assert both["metrics"] == ["exact_match", "rouge", "loss", "correction"]
    assert [line.rsplit(" --metrics ")[1] for line in both["commands"]] == ["correction rouge loss", "exact_match"]


@pytest.mark.parametrize("why", ["weights", "unfinished", "gone"])
def test_nothing_of_another_model_or_of_fewer_rows_is_kept(arguments, capsys, why):
    """Numbers stand in results.json only where the lines that they are made from do."""
    assert evaluate(arguments, capsys, "exact_match")[0] == 0
    file = Path(arguments["output_dir"]) / "answers.jsonl"
    if why == "weights":
        settings = file.with_name(file.name + ".settings.json")
        settings.write_text(settings.read_text().replace('"weights": "', '"weights": "other'))
    elif why == "unfinished":
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    else:
        file.unlink()
    assert evaluate(arguments, capsys, "loss")[0] == 0
    results = results_of(arguments)
    assert results["metrics"] == ["loss"]
    assert not {"exact_match", "finished"} & set(results)
    assert "answers" not in results["settings"]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(arguments, capsys):
    """SIGKILL while it answers, then while it measures: the third time it has the files and figures of one go."""
    rows = ROWS * 15
    write_jsonl(Path(arguments["dataset"]), rows)
    options = {**arguments, "batch_size": 1, "temperature": 1.0}
    for name in ("answers", "losses"):
        file = Path(arguments["output_dir"]) / f"{name}.jsonl"
        kill_command(["eval", *flags(options)], lambda file=file: file.exists() and file.stat().st_size > 0)
        assert 0 < file.read_bytes().count(b"\n") < len(rows)
    assert evaluate(options, capsys)[0] == 0
    whole = {**options, "output_dir": arguments["output_dir"] + "2"}
    assert evaluate(whole, capsys)[0] == 0
    for each in ("answers", "losses"):
        assert lines_of(options, each) == lines_of(whole, each)
    for each in ("exact_match", "loss", "curve"):
        assert results_of(options)[each] == results_of(whole)[each]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "gap.jsonl holds rows that were made with other settings (seed was 0, is 1)"),
        ({"max_new_tokens": 9}, "(max_new_tokens was 8, is 9)"),
        ({"temperature": 0.5}, "(temperature was 0.0, is 0.5)"),
        ({"limit": 3}, "(limit was None, is 3)"),
        ({"self_prob": 0.5}, "gap.jsonl holds rows that were made with other settings (self_prob was 0.25, is 0.5)"),
    ],
)
def test_other_settings_need_another_folder(changes, words, arguments, monkeypatch, capsys):
    monkeypatch.setattr("selfgen.cli.answers.answer", saying("c #### 18"))
    assert evaluate(arguments, capsys)[0] == 0
    before = results_of(arguments)
    code, _, err = evaluate({**arguments, **changes}, capsys)
    assert code == 2
    assert words in err
    assert results_of(arguments) == before


def test_contexts_and_answers_that_do_not_depend_on_their_batch(arguments, tmp_path, capsys):
    arguments |= {"context_precision": "invariant"}
    assert "is for bf16 and fp16" in evaluate(arguments, capsys, "loss")[2]
    results = []
    for batch_size in (1, 7):
        given = arguments | {"output_dir": str(tmp_path / str(batch_size)), "dtype": "bfloat16"}
        code, _, err = evaluate(given | {"batch_size": batch_size}, capsys, "gap", "exact_match")
        assert code == 0, err
        results.append([results_of(given)[name] for name in ("gap", "exact_match")])
    assert results[0] == results[1]


def test_measurements_of_other_noise_need_another_folder(arguments, monkeypatch, capsys):
    assert evaluate(arguments, capsys, "loss")[0] == 0
    monkeypatch.setattr("selfgen.cli.eval.NOISE_VERSION", 3)
    assert "noise_version was 2, is 3" in evaluate(arguments, capsys, "loss")[2]


def test_other_weights_and_rows_need_another_folder(arguments, tmp_path, capsys):
    arguments["model"] = str(tmp_path / "model")
    save_model(tmp_path / "model", **MODEL)
    assert evaluate(arguments, capsys, "loss")[0] == 0
    assert evaluate(arguments, capsys, "curve")[0] == 0
    write_jsonl(Path(arguments["dataset"]), ROWS[::-1] * 5)
    assert "(rows was" in evaluate(arguments, capsys, "loss")[2]
    write_jsonl(Path(arguments["dataset"]), ROWS * 5)
    save_model(tmp_path / "model", seed=1, **MODEL)
    assert "(weights was" in evaluate(arguments, capsys, "loss")[2]


def test_limit(arguments, capsys):
    assert evaluate({**arguments, "limit": 3}, capsys)[0] == 0
    assert [line["sample_id"] for line in lines_of(arguments, "answers")] == [0, 1, 2]
    assert len(lines_of(arguments, "losses")) == 3


def test_cut_references_are_not_answers(arguments, capsys):
    options = {**arguments, "max_length": 6}  # five tokens and an EOS behind the prompt's
    code, _, err = evaluate(options, capsys)
    assert code == 2
    assert "10 reference answers do not fit into max_length=6" in err
    assert evaluate(options, capsys, "loss")[0] == 0


def test_without_matplotlib_there_are_no_plots(arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, _ = evaluate(arguments, capsys, "loss")
    assert code == 0
    assert "loss, self contexts" in out
    assert "loss" in results_of(arguments)
    assert not list(Path(arguments["output_dir"]).glob("*.png"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": "bleu"}, "metrics are bleu; accepted: gap, exact_match, rouge, loss, curve, correction"),
        ({"self_prob": 2}, "self_prob is 2.0; a probability must be in [0, 1]"),
        ({"temperature": -1}, "temperature is -1.0; it must be a finite number >= 0"),
        ({"sampling_temperature": "inf"}, "sampling_temperature is inf"),
        ({"context_method": "magic"}, "magic"),
        ({"context_precision": "exact"}, "exact"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"max_length": 1000}, "max_length is 1000, but the model has 128 positions"),
        ({"dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"dataset_split": "validation"}, "no split 'validation'"),
        ({"prompt_column": "question"}, "columns prompt, completion"),
        ({"model": "nowhere/model"}, "nowhere/model"),
        ({"bogus": 1}, "--bogus"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(changes, words, arguments, capsys):
    code, out, err = evaluate({**arguments, **changes}, capsys)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("selfgen eval: error: ")
    assert words in last
    assert "Traceback" not in err
    assert out == ""
    assert not Path(arguments["output_dir"]).exists()


def test_a_missing_package_shows_before_anything_is_loaded(arguments, monkeypatch, capsys):
    answers._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setattr("selfgen.cli.options.load_rows", lambda *a, **k: pytest.fail("must not read the data"))
    code, _, err = evaluate(arguments, capsys, "rouge")
    assert code == 2
    assert "pip install 'selfgen[eval]'" in err


def test_help_and_yaml(arguments, tmp_path, capsys):
    code, out, _ = run(["eval", "--help"], capsys)
    assert code == 0
    for option in ("--model", "--dataset", "--metrics", "--self-prob", "--limit"):
        assert option in out
    assert "selfgen eval" in run([], capsys)[1]
    file = tmp_path / "eval.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in arguments.items()) + "metrics: [loss, curve]\n")
    assert run(["eval", str(file), "--limit", "2"], capsys)[0] == 0
    assert {"loss", "curve"} <= set(results_of(arguments))
    assert "exact_match" not in results_of(arguments)
