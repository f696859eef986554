"""The report of a training: what it says, from files alone, and that measuring the gap changes nothing."""

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.cli import flags, run
from helpers.processes import in_ranks
from helpers.training import make_rac_trainer, make_trainer, rows, weights
from models import tiny_model
from transformers import TrainerState

from selfgen.evaluation import free_running_gap
from selfgen.training import gap, write_report
from selfgen.training.gap import MOST_TOKENS, GapBeforeAndAfter
from selfgen.training.metrics import METRICS, metric_of
from selfgen.training.report import _panels, _picture, report_of
from selfgen.training.report_page import Panel, svg

PAGE = Path(__file__).parents[1] / "docs" / "report.md"


class Elements(HTMLParser):
    """Which tags are closed in their order, and what is referred to."""

    VOID = ("meta", "line", "circle", "polyline", "wbr")
    OPEN_ENDED = ("p", "tr", "td", "th", "dt", "dd")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in (*self.VOID, *self.OPEN_ENDED):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in (*self.VOID, *self.OPEN_ENDED):
            assert self.open.pop() == tag


def logged(step: int, **values) -> dict:
    figures = {"loss": 3.0 / step, "self_prob": 0.5, "context_seconds": 1.0, "training_seconds": 3.0, "agreement": 0.5}
    return {**figures, **values, "step": step}


def state_of(*entries: dict, max_steps: int = 10) -> TrainerState:
    return TrainerState(global_step=entries[-1]["step"], max_steps=max_steps, log_history=list(entries))


def report(folder) -> dict:
    return json.loads((Path(folder) / "report.json").read_text())


def test_a_training_ends_with_a_report(arguments, capsys, caplog):
    options = {**arguments, "report": True, "gap_rows": 3, "eval_split": "train[:4]"}
    code, out, _ = run(["train", *flags(options)], capsys)
    assert code == 0
    found = report(arguments["output_dir"])
    state = json.loads((Path(arguments["output_dir"]) / "trainer_state.json").read_text())
    assert found["log"] == state["log_history"]
    assert (found["step"], found["complete"]) == (3, True)
    assert found["eval_loss"]["last"] > 0  # of the evaluation after the training
    before, after = found["gap"]["before"], found["gap"]["after"]
    assert (before["of"], before["gap_rows"], before["step"], after["step"]) == ("evaluation", 3, 0, 3)
    assert before["gap"] == pytest.approx(
        100 * (before["right_under_references"] - before["right_running_freely"]), abs=1e-9
    )
    assert "gap at step 0: " in out
    assert found["settings"]["self_prob"] == 0.5
    assert set(found["metrics"]) == {name for entry in found["log"] for name in entry}
    assert (Path(arguments["output_dir"]) / "report.png").read_bytes().startswith(b"\x89PNG")
    assert f"report: {arguments['output_dir']}/report.html" in caplog.text


def test_settings_that_had_no_effect_are_not_told(arguments, tmp_path, capsys, no_picture):
    """Stored contexts have settings of their own, which are with them."""
    made = {name: arguments[name] for name in ("model", "dataset", "max_length", "use_cpu")}
    assert run(["contexts", *flags(made | {"output_dir": tmp_path / "contexts", "self_prob": 0.3})], capsys)[0] == 0
    given = {name: value for name, value in arguments.items() if name != "dataset"} | {"report": True}
    given |= {"method": "bash", "contexts": tmp_path / "contexts"}
    assert run(["train", *flags(given)], capsys)[0] == 0
    settings = report(arguments["output_dir"])["settings"]
    assert settings.keys() >= {"loss_on", "seed", "max_length", "learning_rate"}
    idle = {"self_prob", "self_prob_schedule", "self_prob_warmup", "sampling_temperature", "granularity"}
    assert not settings.keys() & idle
    assert "disagreement" not in (Path(arguments["output_dir"]) / "report.html").read_text(encoding="utf-8")


def test_legends_hide_no_point_and_no_title(tmp_path):
    """Of the picture of a training."""
    Text = pytest.importorskip("matplotlib.text").Text
    log = [{"step": step, "loss": 3.0, "self_share": 0.5, "differing_share": 0.2, "context_seconds": 1.0,
            "training_seconds": 2.0} for step in range(1, 30)]  # fmt: skip
    state = TrainerState(log_history=log, global_step=29, max_steps=29)
    drawn = _picture(_panels(log), report_of(tmp_path, state))
    drawn.draw_without_rendering()
    legends = [axes.get_legend() for axes in drawn.axes if axes.get_legend()]
    assert len(legends) == 2
    for legend in legends:
        box, axes = legend.get_window_extent(), legend.axes
        assert not box.overlaps(axes.get_window_extent())
        (title,) = (one for one in axes.findobj(Text) if one.get_text() == axes.get_title(loc="left"))
        assert not box.overlaps(title.get_window_extent())


def test_the_page_needs_nothing_besides_itself(tmp_path, no_picture):
    """Also where names would be markup: nothing of it is run or loaded."""
    evil = '<script>alert(1)</script>&"'
    folder = tmp_path / "a<b>&"
    folder.mkdir()
    entries = [logged(step, **{f"eval_{evil}_loss": 1.0}) for step in (1, 2)]
    write_report(folder, state_of(*entries))
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Elements(text)
    assert page.open == []
    assert page.references == []
    assert "script" not in page.seen
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert page.seen.count("svg") == len([tag for tag in page.seen if tag == "figure"]) > 3
    assert "a&lt;b&gt;&amp;" in text


def test_a_report_names_what_was_run(tmp_path, no_picture):
    write_report(tmp_path, state_of(logged(1)), command="selfgen train --model <m>")
    first = report(tmp_path)
    assert first["command"] == "selfgen train --model <m>"
    assert {"selfgen", "torch", "transformers"} == set(first["versions"])
    write_report(tmp_path, state_of(logged(1), logged(2)))  # later, by somebody else
    assert {name: report(tmp_path)[name] for name in ("command", "date", "versions")}.items() <= first.items()
    assert "<code>selfgen train --model &lt;m&gt;</code>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_a_report_says(tmp_path, no_picture):
    entries = [logged(2), logged(4, loss=math.nan, context_seconds=3.0), logged(5)]
    write_report(tmp_path, state_of(*entries))
    found = report(tmp_path)
    assert (found["step"], found["max_steps"], found["complete"]) == (5, 10, False)
    assert found["loss"] == {"first": 1.5, "last": 0.6}
    assert found["seconds"] == {"contexts": 2 * 1 + 2 * 3 + 1, "training": 3.0 * 5}  # lines have means of their steps
    assert found["log"][1]["loss"] is None  # JSON has no NaN
    assert found["gap"] == {"before": None, "after": None}
    assert found["metrics"]["agreement"] == {"unit": "%", "meaning": METRICS["agreement"].says}
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "step 5 of 10: ended early" in text
    assert "contexts 38%" in text
    assert "<h2>Gap</h2>" not in text


def test_a_report_from_files_alone(tmp_path, no_picture):
    """Of the state that is furthest: that of the folder, or of a checkpoint that a killed run has left."""
    with pytest.raises(FileNotFoundError, match=r"no trainer_state\.json, nor a checkpoint .* give the output_dir"):
        write_report(tmp_path)
    for name, step in (("checkpoint-2", 2), ("checkpoint-10", 10), (".", 4)):
        (tmp_path / name).mkdir(exist_ok=True)
        state_of(logged(1), logged(step)).save_to_json(str(tmp_path / name / "trainer_state.json"))
    write_report(str(tmp_path))
    assert report(tmp_path)["step"] == 10


def test_rounds_are_joined(tmp_path, no_picture):
    for number in range(11):
        (tmp_path / f"round-{number}").mkdir()
        state = state_of(logged(1, loss=float(number)), logged(2), max_steps=2)
        state.save_to_json(str(tmp_path / f"round-{number}" / "trainer_state.json"))
    write_report(tmp_path)
    found = report(tmp_path)
    assert (found["rounds"], found["step"], found["complete"]) == (11, 22, True)
    assert [entry["step"] for entry in found["log"]] == list(range(1, 23))
    assert [entry["loss"] for entry in found["log"][::2]] == list(range(11))


def test_rounds_that_are_yet_to_come(tmp_path, no_picture):
    """The contexts of a round say how many rounds there are to be; other folders are none."""
    for number in range(2):
        (tmp_path / f"round-{number}" / "contexts").mkdir(parents=True)
        told = {"settings": {}, "source": {"round": number, "rounds": 3}}
        (tmp_path / f"round-{number}" / "contexts" / "provenance.json").write_text(json.dumps(told))
    (tmp_path / "round-old").mkdir()
    state_of(logged(1), logged(2), max_steps=2).save_to_json(str(tmp_path / "round-0" / "trainer_state.json"))
    write_report(tmp_path)
    found = report(tmp_path)
    assert (found["rounds"], found["max_rounds"], found["complete"]) == (1, 3, False)
    assert "step 2 of 2: ended early, 1 of 3 rounds" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def no_picture(monkeypatch):
    """As without matplotlib, which takes a second."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.mark.parametrize("fault", ["stopped", "diverged"])
@pytest.mark.one_case
def test_a_training_that_is_broken_off_leaves_a_report(arguments, capsys, monkeypatch, no_picture, fault):
    from selfgen.training.bss import BSSTrainer
    from selfgen.training.weights import DivergedError

    step = BSSTrainer.training_step

    def broken(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt if fault == "stopped" else DivergedError("no number")
        return step(self, *args, **kwargs)

    again = {**arguments, "report": True}
    with monkeypatch.context() as patched:
        patched.setattr(BSSTrainer, "training_step", broken)
        if fault == "stopped":
            with pytest.raises(KeyboardInterrupt):
                run(["train", *flags(again)], capsys)
        else:
            assert run(["train", *flags(again)], capsys)[0] == 2
    found = report(arguments["output_dir"])
    assert (found["step"], found["complete"]) == (2, False)
    assert run(["train", *flags(again)], capsys)[0] == 0  # the report is in nobody's way
    assert report(arguments["output_dir"])["complete"]


@pytest.mark.slow
def test_a_resumed_run_has_all_steps_and_the_first_gap(arguments, capsys, monkeypatch, no_picture):
    options = {**arguments, "report": True, "gap_rows": 2, "save_steps": 2}
    whole = {**options, "output_dir": f"{arguments['output_dir']}-whole"}
    assert run(["train", *flags(whole)], capsys)[0] == 0
    from selfgen.training.bss import BSSTrainer

    step = BSSTrainer.training_step

    def broken(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(BSSTrainer, "training_step", broken)
        with pytest.raises(KeyboardInterrupt):
            run(["train", *flags(options)], capsys)
    assert run(["train", *flags(options), "--resume-from-checkpoint", "last"], capsys)[0] == 0
    want, found = report(whole["output_dir"]), report(arguments["output_dir"])
    assert found["gap"] == want["gap"]
    assert [entry["step"] for entry in found["log"]] == [entry["step"] for entry in want["log"]]
    assert [entry.get("loss") for entry in found["log"]] == [entry.get("loss") for entry in want["log"]]


@pytest.mark.parametrize("options", [{}, {"self_prob": 0.0}, {"optim": "sgd", "reuse_passes": False}], ids=str)
@pytest.mark.one_case
def test_measuring_the_gap_changes_nothing(tmp_path, options):
    """Weights bit for bit, random numbers, modes: of a model with dropout, too, which draws some in training."""
    trained = []
    for measured in (False, True):
        model = tiny_model("gpt2")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        trainer = make_trainer(tmp_path / str(measured), model=model, **options)
        if measured:
            trainer.add_callback(GapBeforeAndAfter(trainer, rows=4))
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        modes = [module.training for module in trainer.model.modules()]
        trained.append((weights(trainer.model), torch.get_rng_state(), losses, modes))
    assert sum("train_gap" in entry for entry in trainer.state.log_history) == 2
    assert torch.equal(trained[0][0], trained[1][0])
    assert torch.equal(trained[0][1], trained[1][1])
    assert trained[0][2:] == trained[1][2:]


def test_the_budget_is_measured_once(tmp_path, monkeypatch):
    """By the gap for the steps, as that takes seconds."""
    from selfgen.context import generator
    from selfgen.context.budget import PassBudget

    measured = []
    monkeypatch.setattr(generator, "measure_budget", lambda *_, **__: measured.append(1) or PassBudget(32, 4.0))
    trainer = make_trainer(tmp_path, token_budget=None, balance=None, max_steps=1)
    trainer.add_callback(GapBeforeAndAfter(trainer, rows=2))
    trainer.train()
    assert measured == [1]


def test_the_gap_is_that_of_eval(tmp_path):
    """Of the first rows of the evaluation data, or else of the training data, and the first tokens of their answers."""
    long = rows(2).map(lambda row: {"answer_ids": (row["answer_ids"] * 60)[: MOST_TOKENS + 9]})
    trainer = make_trainer(tmp_path, data=long, eval_dataset={"one": rows(5, seed=1)}, max_steps=1, learning_rate=0.0)
    trainer.add_callback(GapBeforeAndAfter(trainer, rows=3))
    trainer.train()
    entry = trainer.state.log_history[0]
    gap = free_running_gap(trainer.generator, rows(5, seed=1).select(range(3)), progress=False)
    assert (entry["eval_gap"], entry["eval_gap_rows"]) == (gap.points, 3)
    trainer.eval_dataset = None
    trainer.train()
    entry = trainer.state.log_history[0]
    cut = long.map(lambda row: {"answer_ids": row["answer_ids"][:MOST_TOKENS]})
    assert entry["train_gap"] == free_running_gap(trainer.generator, cut, progress=False).points


def test_the_gap_of_several_turns_is_that_of_the_first(tmp_path):
    """What others say between them is not the model's to tell."""
    data = rows()
    turns = data.map(
        lambda row: {
            "answer_ids": [*row["answer_ids"], 5, 6, *row["answer_ids"]],
            "is_learned": [True] * len(row["answer_ids"]) + [False] * 2 + [True] * len(row["answer_ids"]),
        }
    )
    first, of_turns = (gap._rows_of(make_trainer(tmp_path, data=one), 3) for one in (data, turns))
    assert first == of_turns


def gap_of_training(folder, count: int) -> list[dict]:
    trainer = make_trainer(folder / "out", max_steps=1, learning_rate=0.0, per_device_train_batch_size=count)
    trainer.add_callback(GapBeforeAndAfter(trainer, rows=3))
    trainer.train()
    return [
        {name: value for name, value in entry.items() if name.startswith("train_") and name in METRICS}
        for entry in trainer.state.log_history
        if "train_gap" in entry
    ]


def same_gap(rank, folder):
    assert gap_of_training(folder, 1) == json.loads((folder / "gap.json").read_text())


@pytest.mark.slow
def test_processes_share_the_rows_of_the_gap(tmp_path):
    """Three rows of two processes; each of them knows the gap of all."""
    (tmp_path / "gap.json").write_text(json.dumps(gap_of_training(tmp_path, 2)))
    in_ranks(same_gap, tmp_path)


def test_where_the_gap_is_not_measured(tmp_path, caplog, monkeypatch):
    trainer = make_trainer(tmp_path, data=rows().to_iterable_dataset(), max_steps=1)
    trainer.add_callback(GapBeforeAndAfter(trainer, rows=3))
    trainer.train()
    assert "the gap is not measured, as a stream has no rows" in caplog.text
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.add_callback(GapBeforeAndAfter(trainer, rows=3))
    monkeypatch.setattr(type(trainer._engine), "splits_weights", True)
    trainer.train()
    assert "weights are split over processes" in caplog.text
    with pytest.raises(ValueError, match="rows is 0; it must be at least 1"):
        GapBeforeAndAfter(trainer, rows=0)


def test_a_report_of_corrections(tmp_path, no_picture):
    evaluated = Dataset.from_list([{"prompt": "a b", "completion": "c d"}])
    trainer = make_rac_trainer(tmp_path, eval_dataset=evaluated, eval_corrections=1, max_steps=2)
    trainer.train()
    trainer.evaluate()
    write_report(tmp_path, trainer.state)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for title in ("Own answers", "Answers in evaluations"):
        assert f"<b>{title}</b>" in text


def test_without_matplotlib_there_is_no_picture(tmp_path, caplog, no_picture):
    (tmp_path / "report.png").write_bytes(b"of an earlier run")
    caplog.set_level("INFO", "selfgen")
    files = write_report(tmp_path, state_of(logged(1)))
    assert [file.name for file in files] == ["report.html", "report.json"]
    assert not (tmp_path / "report.png").exists()
    assert "plots need matplotlib" in caplog.text
    assert "pip install 'selfgen[eval]'" in caplog.text


@pytest.mark.parametrize(
    "points",
    [
        [(1, 2.0)], [(1, 0.0), (2, 0.0)], [(1, math.nan)], [(1, math.nan), (2, 1.0), (3, math.inf), (4, 2.0)],
        [(step, math.sin(step)) for step in range(1, 5000)], [(1, 1e-12), (9, 3e12)], [(7, -5.0), (8, -5.0)],
    ],
    ids=["one", "zeros", "nan", "with gaps", "many", "wide", "negative"],
)  # fmt: skip
def test_plots_of_odd_curves(points):
    text = svg(Panel("A", "b", {"c": points}))
    assert "nan" not in text.replace("from nan", "")
    assert len(text) < 20_000
    for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", " ".join(re.findall(r'points="([^"]*)"', text))):
        assert 0 <= float(x) <= 380
        assert 0 <= float(y) <= 210


def test_names_of_evaluation_sets_may_begin_alike():
    sets = ("test", "test_hard")
    assert metric_of("eval_test_hard_first_right", sets) is METRICS["eval_first_right"]
    assert metric_of("eval_test_loss", sets) is METRICS["eval_loss"]
    assert metric_of("eval_test_hard_loss", sets) is METRICS["eval_loss"]


def test_the_page_on_the_report_has_every_metric():
    text = PAGE.read_text(encoding="utf-8")
    rows = {
        row[0]: row for row in (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `"))
    }
    for name, metric in METRICS.items():
        assert rows[f"`{name}`"][1:] == [metric.unit or "-", metric.says], name
    assert len([row for row in rows if row.strip("`") not in METRICS]) == 0
