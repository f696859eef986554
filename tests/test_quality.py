"""The comparison of methods: tasks, the record of runs, the statistics."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
from scipy.stats import t as student
from scipy.stats import ttest_rel

from benchmarks.quality import run as quality
from benchmarks.quality import tasks
from benchmarks.quality.methods import ABLATIONS, METHODS, Setting, _share_of_rows, measure
from benchmarks.quality.report import main as report
from benchmarks.quality.report import summary
from benchmarks.quality.tasks import EOS, FIRST, SEP, TASKS, Problems, Task
from tools.real_parts import gsm_symbolic, has_gsm8k


@pytest.fixture(autouse=True, scope="module")
def texts():
    """`words` are of GSM8K, or of gsm_symbolic where it is not at hand: the tests ask no hub."""
    with pytest.MonkeyPatch.context() as patch:
        if not has_gsm8k():
            patch.setattr(tasks, "gsm8k", lambda *_: gsm_symbolic(1000, seed=0))
        yield


FROM_SCRATCH = [name for name, task in TASKS.items() if isinstance(task, Task)]


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_rows(name):
    """Of their seed; ids are a task's own; other seeds have other rows."""
    rows = TASKS[name].rows(50, seed=3)
    assert [*rows] == [*TASKS[name].rows(50, seed=3)]
    assert not {tuple(row) for row in rows["prompt_ids"]} >= {
        tuple(row) for row in TASKS[name].rows(50, 4)["prompt_ids"]
    }
    for row in rows:
        *prompt, end = row["prompt_ids"]
        *answer, last = row["answer_ids"]
        assert (end, last) == (SEP, EOS)
        assert all(FIRST <= token < TASKS[name].vocab for token in prompt + answer)


def test_answers_by_hand():
    def number(tokens):
        return int("".join(str(token - FIRST) for token in tokens))

    for seed in range(20):
        prompt, answer = TASKS["working"].row(random.Random(seed))
        value = number(prompt[:2])
        for place, (operation, operand) in enumerate(zip(prompt[2::2], prompt[3::2], strict=True)):
            value = eval(f"({value} {'+-*'[operation - FIRST - 10]} {operand - FIRST}) % 100")
            assert number(answer[2 * place : 2 * place + 2]) == value
        prompt, answer = TASKS["words"].row(random.Random(seed))
        assert answer == sorted(prompt)
        assert len(answer) == 24
        prompt, answer = TASKS["cubic"].row(random.Random(seed))
        a, b, c, d = (token - FIRST - 24 - 8 for token in prompt)
        assert all(-8 <= coefficient < 8 for coefficient in (a, b, c, d))
        for end, sign in ((answer[0], -1), (answer[-1], 1)):  # at -1 and at 1
            value = (a + sign * b + 1.5 * c + sign * 2 * d) / 20
            assert end - FIRST == round((value + 1) / 2 * 23)


@pytest.mark.parametrize("task", FROM_SCRATCH)
def test_corrections_see_as_many_tokens(task):
    """But for the rounding to whole rows, and for own answers that end early or late."""
    rows = TASKS[task].rows(300, seed=0)
    direct, correction = (sum(map(len, rows[name])) for name in ("prompt_ids", "answer_ids"))
    seen = 2 * (direct + correction) + correction + 2 * len(rows)
    assert _share_of_rows(TASKS[task], rows) == pytest.approx((direct + correction) / seen)


EVERY_METHOD = [*METHODS.values(), *ABLATIONS.values()]
ONE_OF_A_KIND = list({method.kind: method.name for method in EVERY_METHOD}.values())


@pytest.mark.parametrize(
    "method",
    [pytest.param(one, marks=[pytest.mark.slow] * (one.name not in ONE_OF_A_KIND)) for one in EVERY_METHOD],
    ids=lambda method: method.name,
)
def test_every_method_trains(method, monkeypatch):
    """Shares are shares; for each kind of method, the same seed gives the same model."""
    monkeypatch.setattr(Task, "test_rows", 50)
    setting = Setting(steps=4, rows=2, width=16, layers=1)
    found = measure(TASKS["working"], method, 0, setting)
    assert all(0 <= value <= 1 for name, value in found.items() if name != "tokens_seen")
    assert found["tokens_seen"] > 0
    if method.name in ONE_OF_A_KIND:
        assert found == measure(TASKS["working"], method, 0, setting)
    assert ("first_token" in found) == (method.kind == "correction")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["BASH", "BSS + RAC"])
def test_a_pretrained_model_trains(method, monkeypatch):
    monkeypatch.setattr(Problems, "test_rows", 2)
    task = Problems("gsm_symbolic-short", "", longest_answer=56, spare=30)
    rows = task.rows(2, seed=1)
    reference = rows["answer_ids"][0]
    number = task.tokenizer.decode(reference, skip_special_tokens=True).rsplit("####")[-1]
    assert task.is_right(task.tokenizer(f"So it is {number}").input_ids, reference)
    assert not task.is_right(task.tokenizer(f"So it is {number}1").input_ids, reference)
    found = measure(task, METHODS[method], 0, Setting(steps=2, rows=3, learning_rate=1e-6))
    assert 0.5 < found["reference_token"] < 1


def test_variants_have_their_length_and_their_data():
    """The setting is that of the task; a training with few rows sees each of them again and again."""
    assert all(quality.setting_of(name) for name in TASKS)
    assert quality.setting_of("wave-24") == quality.setting_of("wave") == quality.SETTINGS["wave"]
    for name, length in (("wave-24", 24), ("wave", 48), ("wave-96", 96), ("words-12", 12), ("words", 24)):
        assert {len(row) for row in TASKS[name].rows(20, seed=0)["answer_ids"]} == {length + 1}


def test_few_rows_are_seen_again_and_again(monkeypatch):
    counts, rows = [], Task.rows

    def noted(task, count, *rest, **named):
        counts.append(count)
        return rows(task, count, *rest, **named)

    monkeypatch.setattr(Task, "rows", noted)
    task = dataclasses.replace(TASKS["wave-few"], train_rows=3)
    found = measure(task, METHODS["BSS"], 0, Setting(steps=4, rows=2, width=16, layers=1))
    assert counts == [task.test_rows, 3]
    assert found["tokens_seen"] > 3 * 50


def test_a_killed_comparison_goes_on(tmp_path, monkeypatch):
    """What is written down is not run again, half a line is, and other seeds are added."""
    ran = []

    def fake(task, method, seed, setting):
        ran.append((task.name, method.name, seed))
        return {"reference_token": 0.9, "token": 0.5 + seed / 100, "exact": 0.1, "rouge_l": 0.7}

    monkeypatch.setattr(quality, "measure", fake)
    file = tmp_path / "runs.jsonl"
    arguments = ["--tasks", "wave", "--methods", "SFT", "BSS", "--output", str(file)]
    quality.main([*arguments, "--seeds", "2"])
    assert len(ran) == 4
    content = file.read_text().splitlines(keepends=True)
    file.write_text("".join(content[:3]) + content[3][:30] + "\n")
    ran.clear()
    quality.main([*arguments, "--seeds", "3"])
    assert ran == [("wave", "BSS", 1), ("wave", "SFT", 2), ("wave", "BSS", 2)]
    assert report(["--runs", str(file)]) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".json", ".md", ".png"}


def test_statistics():
    """Means, t-intervals and the paired test are scipy's."""
    sft, bss = [0.4, 0.5, 0.45, 0.52], [0.47, 0.55, 0.55, 0.54]
    others = {"exact": 0.0, "reference_token": 0.9, "rouge_l": 0.8}
    lines = [
        {"task": "wave", "seed": seed, "setting": {}, "method": {"name": name}, "found": {"token": value} | others}
        for name, values in (("SFT", sft), ("BSS", bss))
        for seed, value in enumerate(values)
    ]
    first, second = summary(json.loads(json.dumps(lines)))
    assert (first["method"], second["method"]) == ("SFT", "BSS")
    assert second["token_over_sft"] == pytest.approx(100 * (sum(bss) - sum(sft)) / 4)
    assert second["token_p_value"] == pytest.approx(ttest_rel(bss, sft).pvalue)
    low, high = student.interval(0.95, 3, loc=0, scale=(sum((x - sum(sft) / 4) ** 2 for x in sft) / 3 / 4) ** 0.5)
    assert first["token_interval"] == pytest.approx(100 * (high - low) / 2)
