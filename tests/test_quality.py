"""The comparison of methods: tasks, the record of runs, the statistics."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import random
import signal
import time
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from scipy.stats import t as student
from scipy.stats import ttest_rel

from benchmarks.quality import methods, tasks
from benchmarks.quality import run as quality
from benchmarks.quality.methods import (
    ALL_METHODS,
    METHODS,
    Setting,
    _passes,
    _right_under_references,
    _share_of_rows,
    measure,
    train,
)
from benchmarks.quality.report import CORRECTED, decision, holm, page, passes, rac, seconds, selection, summary
from benchmarks.quality.report import main as report
from benchmarks.quality.tasks import EOS, FIRST, SEP, TASKS, Problems, Task
from selfgen import ContextGenerator
from selfgen.training.config import RECIPE
from tools.real_parts import gsm_symbolic, has_gsm8k, small_llama


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
    for seed in range(20):
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


EVERY_METHOD = [*ALL_METHODS.values()]
ONE_OF_A_KIND = list({method.kind: method.name for method in EVERY_METHOD}.values())


@pytest.mark.parametrize(
    "method",
    [pytest.param(one, marks=[pytest.mark.slow] * (one.name not in ONE_OF_A_KIND)) for one in EVERY_METHOD],
    ids=lambda method: method.name,
)
@pytest.mark.one_case
def test_every_method_trains(method, monkeypatch, tmp_path):
    """Shares are shares; for each kind of method, the same seed gives the same model."""
    monkeypatch.setattr(methods, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(Task, "test_rows", 20)
    monkeypatch.setattr(Task, "pass_rows", 2)
    if method.needs == "base":
        pytest.skip("no base")
    setting = Setting(steps=4, rows=2, width=16, layers=1)
    record = measure(TASKS["words-12"], method, 0, setting)
    found = record["found"]
    assert all(0 <= value <= 1 for name, value in found.items() if name != "tokens_seen")
    assert found["tokens_seen"] > 0
    if method.name in ONE_OF_A_KIND:
        again = measure(TASKS["words-12"], method, 0, setting)
        assert (found, record["curve"]) == (again["found"], again["curve"])
    assert ("passes_per_token" in found) == (method.kind != "correction")
    assert (
        ("first_token" in found) == ("wrong_to_right" in found) == (method.kind == "correction" or method.name == "SFT")
    )
    if method.name == "SFT":
        assert found["first_token"] == found["token"]
        assert 0 < found["passes_per_token_greedy"] <= 1
        assert 0 < found["passes_per_token_unguided_greedy"] <= 1
    assert record["train_seconds"] >= 0 <= record["evaluation_seconds"]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "lora_rank"), [("BASH", 0), ("BSS", 2), ("BSS + RAC", 2)])
def test_a_pretrained_model_trains(method, lora_rank, monkeypatch):
    monkeypatch.setattr(Problems, "test_rows", 2)
    task = Problems("gsm_symbolic-short", "", longest_prompt=96, longest_answer=56, spare=30)
    rows = task.rows(2, seed=1)
    reference = rows["answer_ids"][0]
    number = task.tokenizer.decode(reference, skip_special_tokens=True).rsplit("####")[-1]
    assert task.is_right(task.tokenizer(f"So it is {number}").input_ids, reference)
    assert not task.is_right(task.tokenizer(f"So it is {number}1").input_ids, reference)
    found = measure(task, METHODS[method], 0, Setting(steps=2, rows=3, learning_rate=1e-6, lora_rank=lora_rank))[
        "found"
    ]
    assert 0.5 < found["reference_token"] < 1


def test_passages_stay_as_they_are(monkeypatch):
    """Bit for bit, as records of old runs are compared with new ones."""
    letters = random.Random(0)
    some = ["".join(letters.choices("abcde", k=letters.randrange(1, 5))) for _ in range(300)]
    questions = [{"prompt": " ".join(letters.choices(some, k=60)).capitalize() + "?"} for _ in range(40)]
    monkeypatch.setattr(tasks, "gsm8k", lambda *_: Dataset.from_list(questions))
    monkeypatch.setattr(tasks, "_texts", functools.cache(tasks._texts.__wrapped__))
    rows = json.dumps([*TASKS["words"].rows(50, seed=1000)])
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "6040a76835c64eea"


def test_variants_have_their_length_and_their_data():
    """The setting is that of the task; a training with few rows sees each of them again and again."""
    assert all(quality.setting_of(name) for name in TASKS)
    assert quality.setting_of("wave-24") == quality.setting_of("wave") == quality.SETTINGS["wave"]
    for name, length in (("wave-24", 24), ("wave", 48), ("wave-96", 96), ("words-12", 12), ("words", 24)):
        assert {len(row) for row in TASKS[name].rows(20, seed=0)["answer_ids"]} == {length + 1}


def test_a_task_whose_texts_run_out_says_so(monkeypatch):
    sentences = [f"there are {count * 'so '}many words in it" for count in range(9)]
    monkeypatch.setattr(tasks, "_sentences", lambda: sentences)
    assert len(TASKS["reverse"].rows(9, seed=0)) == 9
    with pytest.raises(ValueError, match="reverse has 9 rows, but 10 are asked for"):
        TASKS["reverse"].rows(10, seed=0)


@pytest.mark.slow
def test_few_rows_are_seen_again_and_again(monkeypatch):
    counts, rows = [], Task.rows

    def noted(task, count, *rest, **named):
        counts.append(count)
        return rows(task, count, *rest, **named)

    monkeypatch.setattr(Task, "rows", noted)
    monkeypatch.setattr(Task, "test_rows", 20)
    monkeypatch.setattr(Task, "pass_rows", 2)
    task = dataclasses.replace(TASKS["wave-few"], train_rows=3)
    found = measure(task, METHODS["BSS"], 0, Setting(steps=4, rows=2, width=16, layers=1))
    assert counts == [task.test_rows, 3]
    assert found["found"]["tokens_seen"] > 3 * 50


@pytest.mark.parametrize("method", ["BSS", "RAC"])
@pytest.mark.one_case
def test_a_learning_curve_leaves_the_training_as_it_is(method, monkeypatch):
    """Weights are equal bit for bit with it and without; its last point is of the trained model."""
    monkeypatch.setattr(Task, "test_rows", 20)
    monkeypatch.setattr(Task, "curve_rows", 20)
    task, setting = TASKS["words-few"], Setting(steps=8, rows=4, width=32, layers=1)
    rows = task.rows(20, seed=1)
    trained = [train(task, METHODS[method], 3, setting, rows, curve) for curve in (None, lambda model: {"token": 0.0})]
    record = measure(task, METHODS[method], 3, setting)
    steps = [point["step"] for point in record["curve"]]
    assert steps == [2, 4, 6, 8]
    assert [point["step"] for point in trained[1].points] == steps[:-1]
    assert record["curve"][-1] == {
        "step": 8,
        **{name: record["found"][name] for name in record["curve"][-1].keys() - {"step"}},
    }
    measured = train(
        task, METHODS[method], 3, setting, rows, lambda model: methods._point(task, METHODS[method], rows, model)
    )
    weights = [one.model.state_dict() for one in (*trained, measured)]
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())
    assert measured.model(torch.tensor([[5]])).logits.isfinite().all()


def test_accuracy_under_references():
    """As that of single rows, without padding, all of whose logits are computed."""
    task = dataclasses.replace(TASKS["wave"], row=ragged)
    rows = task.rows(20, seed=1)
    model = task.model(32, 1).eval()
    found = _right_under_references(task, model, rows)
    for row, pair in zip(rows, found, strict=True):
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        predicted = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].argmax(-1).tolist()
        right = sum(a == b for a, b in zip(predicted, row["answer_ids"], strict=True))
        assert pair == (right, len(row["answer_ids"]))


def ragged(draw):
    prompt, answer = ([draw.randrange(FIRST, 40) for _ in range(draw.randrange(1, 9))] for _ in range(2))
    return prompt, answer


def test_sentences():
    """Sentences are natural, none comes twice, and their words are reversed."""
    task = TASKS["reverse"]
    if not has_gsm8k():
        pytest.skip("no GSM8K")
    texts = task.texts(100, 7)
    assert len(set(texts["prompt"])) == 100
    assert len(task.rows(4000, 7, without=task.rows(100, 1))) == 4000  # nearly all there are
    for row in texts:
        sentence = row["prompt"].split("\n")[0].removeprefix("Sentence: ").split()
        assert row["completion"].split() == sentence[::-1]
        assert 10 <= len(sentence) <= 20


def test_a_killed_comparison_goes_on(tmp_path, monkeypatch):
    """What is written down is not run again, half a line is, and other seeds are added."""
    ran = []

    def fake(task, method, seed, setting, **_):
        ran.append((task.name, method.name, seed))
        return {"found": {"reference_token": 0.9, "token": 0.5 + seed / 100, "exact": 0.1, "rouge_l": 0.7}}

    monkeypatch.setattr(quality, "measure", fake)
    monkeypatch.setattr(quality, "cache_dir", lambda: tmp_path)
    file = tmp_path / "runs.jsonl"
    arguments = ["--tasks", "wave", "--methods", "SFT", "BSS", "--output", str(file)]
    quality.main([*arguments, "--seeds", "2"])
    assert len(ran) == 4
    content = file.read_text().splitlines(keepends=True)
    file.write_text("".join(content[:3]) + content[3][:30] + "\n")
    ran.clear()
    quality.main([*arguments, "--seeds", "3"])
    assert ran == [("wave", "BSS", 1), ("wave", "SFT", 2), ("wave", "BSS", 2)]
    assert not [*(tmp_path / "quality" / "claims").iterdir()]
    assert report(["--runs", str(file)]) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".jsonl", ".json", ".md", ".png"}


@contextmanager
def another_process_at(file, task, method, leaves=""):
    """A process that runs seed 0 of ``method``, and is killed in the end."""
    described = methods.describe(TASKS[task], quality.ALL_METHODS[method], quality.setting_of(task))
    ready, say = os.pipe()
    process = os.fork()
    if process == 0:
        with quality.claimed(file, quality.key_of({"seed": 0, **described})) as is_mine:
            if leaves:
                file.write_text(leaves)
            os.write(say, b"1" if is_mine else b"0")
            time.sleep(60)
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"1"
        yield
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_a_run_is_of_one_process(tmp_path, monkeypatch):
    """Others leave it alone until that process is killed, at any time; half a line it left spoils no other."""
    monkeypatch.setattr(quality, "cache_dir", lambda: tmp_path)
    ran = []
    monkeypatch.setattr(quality, "measure", lambda *run, **_: ran.append(run[1].name) or {"found": {}})
    file = tmp_path / "runs.jsonl"
    arguments = ["--tasks", "wave", "--methods", "SFT", "BSS", "--seeds", "1", "--output", str(file)]
    with another_process_at(file, "wave", "SFT", leaves='{"seed": 0, "ta'):
        assert quality.main(arguments) == 0
        assert ran == ["BSS"]
    assert quality.main(arguments) == 0
    assert ran == ["BSS", "SFT"]
    assert [line["method"]["name"] for line in quality.read(file)] == ["BSS", "SFT"]


def test_the_default_is_what_was_confirmed():
    default = ALL_METHODS["BSS, p falls from 0.5, cooler, waits"]
    assert default.options == RECIPE
    assert default.name in quality.STAGES["confirmation"].methods


def test_a_longer_run_is_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(quality, "measure", lambda *run, **_: {"found": {}})
    file = tmp_path / "runs.jsonl"
    for times in ("1", "2"):
        quality.main(
            ["--tasks", "wave", "--methods", "SFT", "--seeds", "1", "--output", str(file), "--steps-times", times]
        )
    steps = quality.setting_of("wave").steps
    assert [line["setting"]["steps"] for line in quality.read(file)] == [steps, 2 * steps]


def test_a_failing_run_stops_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "cache_dir", lambda: tmp_path)

    def fake(task, method, seed, setting, **_):
        if method.name == "SFT":
            raise ValueError("no such option")
        return {"found": {}}

    monkeypatch.setattr(quality, "measure", fake)
    file = tmp_path / "runs.jsonl"
    arguments = ["--tasks", "cubic", "wave", "--methods", "SFT", "BSS", "--seeds", "1", "--output", str(file)]
    assert quality.main(arguments) == 1
    assert [line["task"] for line in quality.read(file)] == ["cubic", "wave"]
    assert "no such option" in capsys.readouterr().out


def test_what_never_mixed_is_trained_once(tmp_path, monkeypatch):
    """It is SFT to its end, so what was found is SFT's, and that of other methods that wait; of this seed alone."""
    monkeypatch.setattr(quality, "cache_dir", lambda: tmp_path)
    ran = []

    def fake(task, method, seed, setting, **_):
        ran.append((seed, method.name))
        return {"found": {"token": len(ran), "self_prob": 0.1 if seed or not method.waits else 0.0}}

    monkeypatch.setattr(quality, "measure", fake)
    waiting = ["BSS, p falls from 0.5, waits", "BSS, auto"]
    others = ["SFT", "BSS, p falls from 0.5", "SFT + DFT"]
    file = tmp_path / "runs.jsonl"
    arguments = ["--tasks", "reverse", "--methods", *waiting, *others, "--seeds", "2", "--output", str(file)]
    assert quality.main(arguments) == quality.main(arguments) == 0
    assert ran == [(0, name) for name in [waiting[0], *others[1:]]] + [(1, name) for name in [*waiting, *others]]
    same = {line["method"]["name"]: line["found"]["token"] for line in quality.read(file) if "same_as" in line}
    assert same == {"BSS, auto": 1, "SFT": 1}


def test_what_may_turn_out_alike_is_waited_for(tmp_path, monkeypatch):
    """A second training of the same would end elsewhere, by rounding alone, and pass for a difference of methods."""
    monkeypatch.setattr(quality, "cache_dir", lambda: tmp_path)
    ran = []
    found = {"found": {"self_prob": 0.0}}
    monkeypatch.setattr(quality, "measure", lambda *run, **_: ran.append(run[1].name) or found)
    first, second = "BSS, p falls from 0.5, waits", "BSS, p falls from 0.25, waits"
    file = tmp_path / "runs.jsonl"
    arguments = ["--tasks", "reverse", "--methods", "SFT", second, "BSS", "--seeds", "1", "--output", str(file)]
    with another_process_at(file, "reverse", first):
        assert quality.main(arguments) == 0
        assert ran == ["BSS"]
    assert quality.main(arguments) == 0
    assert ran == ["BSS", "SFT", second]


def test_passes_are_counted_with_a_guess_that_knows_nothing_of_the_answer_too():
    """For a model whose answers are references all passes but the first ones are saved by the guess alone."""
    torch.manual_seed(0)
    model = small_llama(64, 16, 1, positions=128, pad=0, bos=SEP, eos=EOS)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10 if weight.dim() > 1 else 1)  # so that tokens depend on those before them
    prompts = [[SEP, FIRST + place, SEP] for place in range(4)]
    loop = ContextGenerator(model, temperature=0.0)
    found = loop.contexts(prompts, [[FIRST] * 24] * 4, 1.0, method="sequential", seed=1, sample_ids=range(4)).tokens
    answers = [row.tolist() for row in found]
    rows = Dataset.from_dict({"sample_id": range(4), "prompt_ids": prompts, "answer_ids": answers})
    passes = _passes(model, rows)
    assert passes["passes_per_token_greedy"] < 0.1
    assert passes["passes_per_token_unguided_greedy"] > 2 * passes["passes_per_token_greedy"]


@pytest.mark.slow
def test_it_is_the_same_model(monkeypatch):
    """A method that waits, in a run too short for its loss to settle, and SFT."""
    monkeypatch.setattr(Problems, "test_rows", 4)
    task = dataclasses.replace(TASKS["gsm_symbolic-few"], longest_prompt=80, longest_answer=40)
    setting = Setting(steps=2, rows=3, learning_rate=1e-3, lora_rank=4)
    waits, sft = (
        measure(task, ALL_METHODS[name], 0, setting) for name in ("BSS, p falls from 0.5, cold, waits", "SFT")
    )
    assert waits["found"]["self_prob"] == 0
    assert (waits["found"], waits["curve"]) == (sft["found"], sft["curve"])


def test_stages_share_no_seed(tmp_path, monkeypatch):
    """Each has a file of its own; methods are left out where a task has not what they need."""
    ran = []
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "quality.jsonl")
    monkeypatch.setattr(
        quality, "run_once", lambda file, task, method, seed, **_: ran.append((file.name, task, seed)) or True
    )
    for stage in quality.STAGES:
        quality.main(
            ["--stage", stage, "--tasks", "reverse", "wave", "--methods", "SFT + KL to base", "GKD, whole answers"]
        )
    files = {
        f"quality_{stage}.jsonl": {seed for name, _, seed in ran if name.endswith(f"{stage}.jsonl")}
        for stage in quality.STAGES
    }
    assert {name for name, _, _ in ran} == set(files)
    assert not set.intersection(*files.values())
    assert len(ran) == 2 * sum(len(stage.seeds) for stage in quality.STAGES.values())


def test_a_stage_has_tasks_methods_and_seeds_of_its_own(tmp_path, monkeypatch):
    """What is confirmed was selected, and waits in place of beginning at the first step."""
    ran = []
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "quality.jsonl")
    monkeypatch.setattr(
        quality, "run_once", lambda file, task, method, seed, **_: ran.append((task, method.name, seed)) or True
    )
    selection, confirmation = quality.STAGES.values()
    assert {name.removesuffix(", waits") for name in confirmation.methods} <= {*selection.methods}
    quality.main(["--stage", "confirmation"])
    assert {task for task, _, _ in ran} == {*confirmation.tasks}
    assert {method for _, method, _ in ran} == {*confirmation.methods}
    assert {seed for task, _, seed in ran if task == "cubic"} == {*range(30, 50)}
    assert {seed for task, _, seed in ran if task != "cubic"} == {*range(30, 35)}


def test_key_ignores_what_a_method_needs():
    """So that records outlive a change of it."""
    record = {"seed": 1, **methods.describe(TASKS["reverse"], ALL_METHODS["SFT + KL to base"], Setting())}
    method = {name: value for name, value in record["method"].items() if name != "needs"}
    assert quality.key_of(record) == quality.key_of(record | {"method": method})


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


def test_holm_is_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def made_up(task, name, shift, *, seeds=5, **more):
    """Records of a method whose tokens are ``shift`` (a number, or one for each seed) above SFT's."""
    shifts = shift if isinstance(shift, list) else [shift + 0.001 * seed for seed in range(seeds)]
    for seed, one in enumerate(shifts):
        exact = 0.2 + more.get("answers", 0.0) * (1 + 0.01 * seed)
        found = {"reference_token": 0.9, "token": 0.5 + 0.01 * seed + one, "exact": exact, "rouge_l": 0.8}
        found |= {"tokens_seen": 10**6, "passes_per_token": 0.5 - one, "passes_per_token_greedy": 0.4}
        found |= more.get("found", {})
        points = [{"step": step, "reference_token": 0.8, "token": step / 20 + one, "exact": 0.1} for step in (5, 10)]
        yield {"task": task, "seed": seed, "setting": {}, "method": {"name": name}, "found": found, "curve": points} | {
            "train_seconds": 30.0,
            "teacher_seconds": more.get("teacher_seconds", 0.0),
        }


def records():
    correction = dict.fromkeys(CORRECTED, 0.3)
    lines = []
    for task in ("wave", "words", "reverse", "gsm_symbolic"):
        lines += made_up(task, "SFT", [0.0] * 5, found=correction | {"wrong_to_right": 0.01})
        lines += made_up(task, "BSS", -0.1)
        lines += made_up(task, "BSS, auto", 0.002 if task == "wave" else 0.08)
        lines += made_up(task, "BSS, p = 0.1", 0.08 if task == "wave" else [-0.2, 0.2, 0.1, -0.1, 0.0])
        lines += made_up(task, "BSS, greedy", 0.08, answers=-0.01 if task == "words" else 0.02)
        lines += made_up(task, "SFT + DFT", 0.5)
    lines += made_up("wave", "RAC, equal rows", -0.05, found=correction)
    lines += made_up("wave", "GKD, whole answers", 0.01, teacher_seconds=70.0)
    lines += made_up("working", "SFT", 0.0)  # a task of old files
    lines += made_up("wave", "a method of old files", 0.0)
    return json.loads(json.dumps(lines))


def test_the_rule_of_decision(monkeypatch):
    rows = summary(records())
    assert decision(rows)[-1][-1].startswith("so far")  # tasks of the plan are missing
    plan = dataclasses.replace(quality.STAGES["confirmation"], tasks=("wave", "words", "reverse", "gsm_symbolic"))
    monkeypatch.setitem(quality.STAGES, "confirmation", plan)
    assert {row["task"] for row in rows} == {"wave", "words", "reverse", "gsm_symbolic"}
    said = {(row["task"], row["method"]): row["verdict"] for row in rows}
    assert said["wave", "BSS"] == "worse"
    assert (said["wave", "BSS, auto"], said["reverse", "BSS, auto"]) == ("not worse", "better")
    assert (said["wave", "BSS, p = 0.1"], said["words", "BSS, p = 0.1"]) == ("better", "open")
    assert said["wave", "SFT + DFT"] == said["wave", "SFT"] == ""  # no candidates
    family = [row for row in rows if row["task"] == "wave" and row["token_corrected_p_value"] is not None]
    assert [row["method"] for row in family] == ["BSS", "BSS, p = 0.1", "BSS, greedy", "BSS, auto"]
    assert [row["token_corrected_p_value"] for row in family] == holm([row["token_p_value"] for row in family])
    fit = {line[0]: line[1:] for line in decision(rows)[1:]}
    assert fit["BSS, auto"] == ["4 of 4", "4", "3", "", "", "yes"]
    assert fit["BSS, greedy"] == ["4 of 4", "4", "4", "", "words", "no"]
    assert fit["BSS"] == ["4 of 4", "0", "0", "wave, words, reverse, gsm_symbolic", "", "no"]
    assert fit["BSS, p = 0.1"][-1] == "no"


def test_what_trains_as_sft_does_is_not_worse():
    lines = [line for name in ("SFT", "BSS, auto") for line in made_up("wave", name, 0.0)]
    row = summary(json.loads(json.dumps(lines)))[1]
    assert (row["token_over_sft"], row["token_p_value"], row["verdict"]) == (0, 1, "not worse")


def test_what_never_mixed_is_not_compared():
    """It is SFT, whose runs may be copies of it; other methods without self tokens, as SFT + DFT, are compared."""
    plain = {"found": {"self_prob": 0.0}}
    lines = [*made_up("reverse", "SFT", [0.0] * 5, **plain), *made_up("reverse", "BSS, auto", 0.03, **plain)]
    lines += [
        *made_up("reverse", "SFT + DFT", 0.03, **plain),
        *made_up("reverse", "BSS, p falls from 0.25, waits", 0.03),
    ]
    rows = {row["method"]: row for row in summary(json.loads(json.dumps(lines)))}
    assert (rows["BSS, auto"]["token_over_sft"], rows["BSS, auto"]["verdict"]) == (None, "nothing was mixed")
    assert rows["SFT"]["verdict"] == ""
    assert rows["SFT + DFT"]["token_over_sft"] == pytest.approx(3.2, abs=0.3)
    assert rows["BSS, p falls from 0.25, waits"]["verdict"] == "not worse"


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_decide_nothing(seeds):
    """They have neither intervals nor tests; candidates are ordered by what they gain."""
    rows = summary([line for line in records() if line["seed"] < seeds])
    assert all(row["verdict"] == "" and row["token_interval"] is row["token_p_value"] is None for row in rows)
    assert len(decision(rows)) == 1
    order = selection(rows)[1:]
    assert [line[:2] for line in order] == [
        ["BSS, greedy", "4"], ["BSS, auto", "3"], ["BSS, p = 0.1", "1"], ["BSS", "0"],
    ]  # fmt: skip
    assert [float(gain) for gain in order[1][2:]] == pytest.approx([6.05, 0.2, 8, 8, 8], abs=0.1)  # mean, and tasks
    assert "The order of the candidates" in page(rows, "some.jsonl")


def test_tables_of_passes_and_corrections():
    rows = summary(records())
    head, *lines = passes(rows)
    found = {tuple(line[:2]): line[2:] for line in lines}
    assert len(head) == len(lines[0])
    assert found["wave", "SFT"][:2] == ["0.500 ± 0.000", ""]
    assert found["reverse", "BSS, auto"][1].startswith("-0.082 ± ")
    lines = rac(rows)[1:]
    assert [line[:2] for line in lines] == [["wave", "SFT"], ["wave", "RAC, equal rows"]]
    assert lines[0][-2:] == ["1.0 ± 0.0", "30.0 ± 0.0"]
    costs = {row["method"]: seconds(row) for row in rows if row["task"] == "wave"}
    assert costs["GKD, whole answers"] == "30 + 70"
    assert costs["SFT"] == "30"
    curve = next(row["curve"] for row in rows if row["method"] == "BSS, auto" and row["task"] == "reverse")
    assert curve == [
        {
            "step": step,
            "reference_token": pytest.approx(80),
            "token": pytest.approx(5 * step + 8.2),
            "exact": pytest.approx(10),
        }
        for step in (5, 10)
    ]


def test_a_report_of_everything(tmp_path):
    """Two plots, a page and its numbers; a page without candidates has no decision."""
    file = tmp_path / "quality_selection.jsonl"
    for line in records():
        quality.append(file, line)
    assert report(["--runs", str(file)]) == 0
    assert (tmp_path / "quality_selection_curves.png").stat().st_size > 10_000
    page = (tmp_path / "quality_selection.md").read_text()
    for title in (
        "The gap: SFT",
        "What the rule says",
        "Candidates: reverse",
        "Methods: wave",
        "Ablations: wave",
        "RAC",
    ):
        assert f"## {title}\n" in page
    assert "| BSS, auto | 4 of 4 | 4 | 3 |  |  | so far; tasks are still to be run |" in page
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    numbers = json.loads((tmp_path / "quality_selection.json").read_text())
    assert numbers[0]["train_seconds"] == 30


def test_old_files_are_read():
    """Of runs before there were curves and seconds."""
    lines = [line for line in records() if line["method"]["name"] in ("SFT", "BSS")]
    for line in lines:
        for name in ("curve", "train_seconds", "teacher_seconds"):
            del line[name]
        for name in ("passes_per_token", "passes_per_token_greedy", *CORRECTED):
            line["found"].pop(name, None)
    rows = summary(lines)
    assert all(row["curve"] == [] and seconds(row) == "" for row in rows)
    assert "Passes" not in page(rows, "quality.jsonl")
