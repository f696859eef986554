"""Log lines that a person can read: numbers, columns, headers, and who prints."""

from __future__ import annotations

import io
import math
import re
from contextlib import redirect_stdout

import pytest
from datasets import Dataset
from helpers.cli import flags, run
from helpers.training import OWN_ANSWERS, config, make_bash_trainer, make_rac_trainer, make_trainer, rows
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from selfgen.training.log_lines import Lines, PrintedLines, _opening, told_of_mixing
from selfgen.training.metrics import METRICS, duration, metric_of, readable


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (1, "1.00"), (2.6871, "2.69"), (12.345, "12.3"), (123.4, "123"), (999.7, "1.00k"), (1234, "1.23k"),
        (20_500, "20.5k"), (1.5e6, "1.50M"), (7.77e9, "7.77G"), (3e13, "3.00e+13"), (0.0397, "0.0397"),
        (0.00012345, "0.000123"), (5e-5, "5.00e-05"), (-12.34, "-12.3"), (math.nan, "nan"), (math.inf, "inf"),
    ],
)  # fmt: skip
def test_three_significant_digits(value, shown):
    assert readable(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0123, "0.0123 s"), (59.4, "59.4 s"), (200, "3 min 20 s"), (3900, "1 h 5 min")]
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def lines_of(logs: list[dict], width: int | None, monkeypatch, max_steps: int = 1000) -> list[str]:
    """What is printed of these logs, where the terminal has so many columns, or there is none."""
    if width is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(width))
    callback = PrintedLines(lambda: "", lambda: "the loss")
    state, out = TrainerState(max_steps=max_steps), io.StringIO()
    with redirect_stdout(out):
        for step, entry in enumerate(logs, 1):
            state.global_step = step
            callback.on_log(None, state, TrainerControl(), logs=entry)
    return out.getvalue().splitlines()


LOG = {
    "loss": 2.6871, "grad_norm": 1.5, "learning_rate": 5e-5, "self_share": 0.5, "differing_share": 0.25, "passes": 3.0,
    "computed_per_token": 0.83, "invalid": 0, "context_seconds": 0.04, "training_seconds": 12.0, "self_prob": 0.5,
    "agreement": 0.5, "tokens_per_second": 12345.0, "epoch": 0.5, "replayed_share": 0.0,
}  # fmt: skip


def test_columns_are_aligned_under_a_header_that_is_repeated(monkeypatch):
    lines = lines_of([LOG] * 45, None, monkeypatch)
    heads = [number for number, line in enumerate(lines) if line.split()[:2] == ["step", "loss"]]
    rows = [line for line in lines if re.match(r" *\d+/1000 ", line)]
    assert len(rows) == 45
    assert len(heads) == 3  # before the 1st, 21st and 41st
    ends = [match.end() for match in re.finditer(r"\S+", lines[heads[0]])]
    assert all([match.end() for match in re.finditer(r"\S+", row)] == ends for row in rows)
    assert rows[0].split() == [
        "1/1000", "2.69", "0.500", "25.0", "50.0", "3.00", "0.830", "0.0400", "12.0", "12.3k", "1.50", "5.00e-05"
    ]  # fmt: skip
    legend = lines[: heads[0]]
    assert [line.split()[0] for line in legend] == lines[heads[0]].split()[1:]  # what each is, once
    assert "agree     self tokens that equal the reference" in "\n".join(legend)
    assert max(map(len, rows)) <= 120


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_a_narrow_terminal_has_fewer_columns(monkeypatch, width):
    lines = lines_of([LOG] * 3, width, monkeypatch)
    row = lines[-1].split()
    assert row[:2] == ["3/1000", "2.69"]
    assert len(lines[-1]) <= width
    assert len(row) == {20: 2, 40: 4, 60: 7, 80: 9, 200: 12}[width]


def test_odd_values(monkeypatch):
    """NaN and infinities are shown; what is not there is a dash, what is no metric of ours follows the columns."""
    plain = {name: value for name, value in LOG.items() if name != "agreement"}
    lines = lines_of(
        [LOG, plain | {"loss": math.nan, "grad_norm": math.inf, "mine": 7, "invalid": 2}], None, monkeypatch
    )
    cells = lines[-1].split()
    assert cells[1] == "nan"
    assert cells[4] == "-"
    assert cells[10] == "inf"
    assert lines[-1].endswith("invalid 2.00, mine 7.00")
    assert "nan" in lines_of([{"eval_loss": math.nan, "epoch": 1.0}], None, monkeypatch)[0]


def test_plain_steps_show_no_time_for_contexts(monkeypatch):
    lines = lines_of([LOG, LOG | {"context_seconds": 0.0}], None, monkeypatch)
    assert [line.split()[7] for line in lines[-2:]] == ["0.0400", "-"]


def test_a_column_that_comes_later_gets_a_header(monkeypatch):
    first = {name: LOG[name] for name in ("loss", "learning_rate")}
    lines = lines_of([first, first, LOG], None, monkeypatch)
    assert sum(line.split()[:2] == ["step", "loss"] for line in lines) == 2


def test_only_the_first_process_prints(monkeypatch, capsys):
    state = TrainerState(is_world_process_zero=False, is_local_process_zero=True)
    callback = PrintedLines(lambda: "", lambda: "")
    callback.on_log(None, state, TrainerControl(), logs=LOG)
    callback.on_train_begin(config("out"), state, TrainerControl())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", [PrinterCallback, ProgressCallback])
def test_lines_take_the_place_of_dicts(tmp_path, capsys, kind):
    """Also of those that are printed around the bar; who takes transformers' callback away gets none."""
    trainer = make_trainer(tmp_path, disable_tqdm=kind is PrinterCallback, max_steps=2, eval_dataset=rows(2))
    (ours,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, kind)]
    assert isinstance(ours, Lines)
    trainer.train()
    trainer.evaluate()
    out, err = capsys.readouterr()
    assert "{" not in out
    assert "\x1b" not in out
    assert re.search(r"^ +2/2 ", out, re.MULTILINE)
    assert "contexts: p = 0.5; self tokens at temperature 1\n" in out
    assert "trained to step 2 of 2 in " in out
    assert "step 2, evaluation: loss " in out
    assert ("%|" in err) == (kind is ProgressCallback)
    trainer.remove_callback(kind)
    trainer.train()
    assert capsys.readouterr().out == ""


def test_another_printer_stays(tmp_path):
    """That of a notebook, or the user's."""

    class Mine(PrinterCallback):
        pass

    trainer = make_trainer(tmp_path)
    assert trainer.pop_callback(PrinterCallback)
    trainer.add_callback(Mine)
    trainer.train()
    assert [type(one) for one in trainer.callback_handler.callbacks if isinstance(one, PrinterCallback)] == [Mine]


MIXING = [
    ({}, "p = 0.5 * the share of self tokens that differ from the reference; self tokens at temperature 0.7; plain "
         "fine-tuning until the loss has settled (a model that only guesses does not wait)"),
    ({"self_prob": 0.0}, "references alone (p is 0), as in plain fine-tuning"),
    ({"self_prob": 0.25}, "p = 0.25; self tokens at temperature 1"),
    ({"self_prob": 0.3, "self_prob_schedule": "linear", "self_prob_warmup": 10},
     "p from 0 to 0.3 (linear); self tokens at temperature 1; plain fine-tuning in the first 10 steps"),
    ({"self_prob": "auto", "self_prob_warmup": 0.1},
     "p such that 0.02 of answer tokens are self tokens that differ from the reference, at most 0.5; self tokens at "
     "temperature 1; plain fine-tuning in the first 0.1 of all steps"),
    ({"self_prob": 0.25, "granularity": "span", "min_reference_prob": 0.1, "loss_on": "after_self",
      "self_prob_curve": "rising"},
     "p = 0.25; self tokens at temperature 1; in units of a span of 8 tokens on average; p rising along the answer; "
     "none where the reference has a probability below 0.1; loss on after_self"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "told"), MIXING, ids=[str(options) for options, _ in MIXING])
def test_the_opening_tells_how_contexts_are_mixed(options, told):
    assert told_of_mixing(config("out", **{"self_prob": None, **options})) == told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"logging_steps": 1}, "a line every step, with"),
        ({"logging_steps": 5}, "a line every 5 steps, with"),
        ({"logging_strategy": "epoch"}, "a line every epoch, with"),
        ({"logging_strategy": "no"}, "no lines (logging_strategy=no)"),
    ],
)
def test_the_opening_tells_when_lines_come(tmp_path, options, told):
    args = config(tmp_path, **options)
    lines = _opening(args, TrainerState(max_steps=9, logging_steps=args.logging_steps), "")
    assert next(line for line in lines if line.startswith("log: ")).startswith(f"log: {told}")


def test_the_opening_of_each_method(tmp_path):
    assert make_trainer(tmp_path)._told_of_contexts() == "p = 0.5; self tokens at temperature 1"
    assert make_bash_trainer(tmp_path)._told_of_contexts() == "as they were written beforehand"
    rac = make_rac_trainer(tmp_path, direct_weight=0.5)
    assert rac._told_of_contexts().startswith("prompt, own answer (at temperature 1) and cue; corrections: references")
    assert rac._told_of_loss().endswith("of corrections, plus 0.5 (direct_weight) * that of first answers")
    assert "plus 0.1 * KL" in make_trainer(tmp_path, kl_weight=0.1)._told_of_loss()
    assert "weight of 1 on target=dft" in make_trainer(tmp_path, target="dft")._told_of_loss()


def test_no_agreement_without_self_tokens(tmp_path):
    trainer = make_trainer(tmp_path, self_prob=0.0, max_steps=1)
    trainer.train()
    assert "agreement" not in trainer.state.log_history[0]


def test_every_key_of_the_log_is_a_metric(tmp_path):
    """With its unit and its meaning, of each method, of evaluations and of streams."""
    sets = {"near": Dataset.from_list(OWN_ANSWERS[:2]), "far": Dataset.from_list(OWN_ANSWERS[2:])}
    trainers = [
        make_trainer(tmp_path / "bss", max_steps=1, eval_dataset={"a": rows(2)}),
        make_bash_trainer(tmp_path / "bash", max_steps=1),
        make_rac_trainer(tmp_path / "rac", eval_dataset=sets, eval_corrections=2, right_answer_share=0.5),
        make_trainer(tmp_path / "stream", max_steps=1, data=rows().to_iterable_dataset()),
    ]
    for trainer in trainers:
        trainer.train()
        trainer.evaluate_at_the_end()
        found = {name for entry in trainer.state.log_history for name in entry}
        assert {name for name in found if metric_of(name, ("a", "near", "far")) is None} == set()
    assert all(metric.says for metric in METRICS.values())


def test_every_figure_that_code_logs_is_a_metric():
    """Keys that only a GPU, fp16, several processes or odd rows bring."""
    from selfgen.training.meter import Meter

    meter = Meter(scales_loss=True, has_graphs=True)
    meter.counts.update(self_prob=1, privileged=2, privileged_too_long=1)
    names = {*meter.flush(), "passes_in_step", "rows_dropped/too long", "own_answers_left_out"}
    assert {name for name in names if metric_of(name) is None} == set()


def test_no_bars_where_none_are_asked_for(arguments, capsys, caplog):
    """Not for loading, tokenizing or saving, either; what is being done is told."""
    code, out, err = run(["train", *flags({**arguments, "disable_tqdm": True})], capsys)
    assert code == 0
    assert "%|" not in err
    assert f"loading the model {arguments['model']}" in caplog.text
    assert re.search(r"^ +3/3 ", out, re.MULTILINE)


def test_tensorboard_has_every_figure(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make_trainer(tmp_path, max_steps=2, report_to=["tensorboard"], eval_dataset=rows(2))
    trainer.train()
    trainer.evaluate()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    found = events.EventAccumulator(str(folder))
    found.Reload()
    logged = {name for entry in trainer.state.log_history for name in entry} - {"step"}
    expected = {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}" for name in logged
    }
    assert expected <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("train/passes")] == [1, 2]


def test_wandb_has_every_figure(tmp_path, monkeypatch):
    """Through the callback of transformers, without a network."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    trainer = make_trainer(tmp_path, max_steps=2, report_to=["wandb"])
    trainer.train()
    found = {*wandb.run.summary.keys()}
    wandb.finish()
    assert {f"train/{name}" for name in trainer.state.log_history[0] if name != "step"} <= found
