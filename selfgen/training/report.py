"""The report of a training: one page, one picture and one file of numbers, made of what the run has left in its folder.

``report.json`` has every entry of the log; ``report.html`` and ``report.png`` show them as curves.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ..evaluation.report import entitle, figure
from ..files import to_json, write_json, write_whole
from ..provenance import versions
from ..stored_contexts import PROVENANCE
from .checkpoints import SETTINGS, STATE
from .gap import of_logged
from .metrics import METRICS, metric_of
from .report_page import Panel, page

logger = logging.getLogger(__name__)

_PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "nats per token", {"loss": "training", "eval_loss": "evaluation"}),
    ("Self-probability p", "", {"self_prob": "p"}),
    ("Answer tokens of contexts", "%", {"self_share": "self tokens", "differing_share": "differ from the reference"}),
    ("Agreement", "% of self tokens", {"agreement": "equal to the reference"}),
    ("Passes", "per step", {"passes": "passes"}),
    ("Time", "seconds per step", {"context_seconds": "contexts", "training_seconds": "training"}),
    ("Throughput", "tokens per second", {"tokens_per_second": "tokens"}),
    ("Own answers", "%", {"own_answers_right": "right", "own_answers_unfinished": "unfinished"}),
    ("Answers in evaluations", "%", {"eval_first_right": "right at first", "eval_corrected_right": "corrected"}),
    ("Norm of the gradients", "", {"grad_norm": "norm"}),
    ("Learning rate", "", {"learning_rate": "learning rate"}),
)
"""Title, unit, and the metrics that are shown with their labels."""
_OF_CONTEXTS = (
    "self_prob", "self_prob_schedule", "self_prob_warmup", "sampling_temperature", "granularity", "min_reference_prob",
)  # fmt: skip
_SETTINGS = (*_OF_CONTEXTS, "loss_on", "target", "own_answer", "direct_weight", "seed", "max_length")


def write_report(
    output_dir: str | Path, state: TrainerState | None = None, *, command: str | None = None
) -> list[Path]:
    """Write ``report.json``, ``report.html`` and, with matplotlib, ``report.png`` of the run in ``output_dir``.

    They are made of ``trainer_state.json`` in the folder or in its newest checkpoint, whichever is further; rounds are
    joined. So a run that was resumed has all of its steps, and one that has ended long ago gets a report, too.

    Args:
        output_dir: of the run.
        state: of a trainer, in place of these files.
        command: what ran the training, which the report names with the versions of now; by default those of an earlier
            report stay.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: the folder has no state of a run.
        SaveError: they can't be written.

    Example:
        >>> write_report("outputs/bss")
    """
    folder = Path(output_dir)
    data, html, picture = (folder / f"report.{ending}" for ending in ("json", "html", "png"))
    found = _run_of(data, command) | report_of(folder, state)
    panels = _panels(found["log"])
    write_json(data, found)
    content = page(json.loads(to_json(found)), panels, folder.resolve().name).encode()
    write_whole(html, lambda stream: stream.write(content))
    picture.unlink(missing_ok=True)  # of an earlier report
    try:
        drawn = _picture(panels, found)
    except ImportError as error:
        logger.info("%s, so there is no %s", error, picture)
        return [html, data]
    write_whole(picture, lambda stream: drawn.savefig(stream, format="png", dpi=100))
    return [html, picture, data]


def report_of(folder: Path, state: TrainerState | None = None) -> dict[str, Any]:
    """What ``report.json`` has: figures of the whole run, the gap, settings, what the metrics mean, and the log."""
    states = [vars(state)] if state is not None else _states_in(folder)
    log: list[dict[str, Any]] = []
    for one in states:  # of rounds, whose steps count on
        done = log[-1]["step"] if log else 0
        log += [{**entry, "step": entry["step"] + done} for entry in one["log_history"]]
    gaps = [{**gap, "step": entry["step"]} for entry in log if (gap := of_logged(entry))]
    names = dict.fromkeys(name for entry in log for name in entry)
    names = {name: None for name in METRICS if name in names} | names  # in our order, and then the others
    metrics = {name: metric for name in names if (metric := metric_of(name, _sets(log)))}
    step, max_steps = (sum(one[name] for one in states) for name in ("global_step", "max_steps"))
    max_rounds = max(len(states), _rounds_asked_for(folder))
    return {
        "step": step,
        "max_steps": max_steps,
        "complete": step >= max_steps and len(states) == max_rounds,
        "rounds": len(states),
        "max_rounds": max_rounds,
        "loss": _ends(log, "loss"),
        "eval_loss": _ends(log, "eval_loss"),
        "seconds": _seconds(log),
        "gap": {"before": gaps[0] if gaps and gaps[0]["step"] == 0 else None, "after": _after(gaps)},
        "settings": _settings_of(folder, idle=_OF_CONTEXTS if _had_contexts(folder, log) else ()),
        "metrics": {name: {"unit": metric.unit, "meaning": metric.says} for name, metric in metrics.items()},
        "log": log,
    }


def has_mixed(folder: str | Path) -> bool:
    """Whether the run in ``folder`` has trained on self tokens, as far as its state tells."""
    try:
        logs = [entry for state in _states_in(Path(folder)) for entry in state["log_history"]]
    except (OSError, ValueError, KeyError, TypeError):  # of another program, or none
        return False
    return any(entry.get("self_share") for entry in logs)


def _run_of(report: Path, command: str | None) -> dict[str, Any]:
    """How the run was started: now by ``command``, or as an earlier report has it."""
    if command is not None:
        return {
            "command": command,
            "date": date.today().isoformat(),
            "versions": versions("selfgen", "torch", "transformers"),
        }
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: found[name] for name in ("command", "date", "versions") if name in found}


def _states_in(folder: Path) -> list[dict[str, Any]]:
    """The states of a run that is in a folder: one, or one per round."""
    if states := [state for one in _rounds_in(folder) if (state := _furthest(one))]:
        return states
    if state := _furthest(folder):
        return [state]
    raise FileNotFoundError(
        f"{folder} has no {STATE}, nor a checkpoint with one: give the output_dir of a run, or save its state "
        "(trainer.save_state())"
    )


def _rounds_in(folder: Path) -> list[Path]:
    numbers = {int(number): one for one in folder.glob("round-*") if (number := one.name[len("round-") :]).isdecimal()}
    return [numbers[number] for number in sorted(numbers)]


def _rounds_asked_for(folder: Path) -> int:
    """As the contexts of the last round that was begun tell; 0 where nothing does."""
    for one in reversed(_rounds_in(folder)):
        file = one / "contexts" / PROVENANCE
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8")).get("source", {}).get("rounds", 0)
    return 0


def _furthest(folder: Path) -> dict[str, Any] | None:
    files = [file for file in (folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")) if file.is_file()]
    states = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return max(states, key=lambda state: (state["global_step"], len(state["log_history"])), default=None)


def _had_contexts(folder: Path, log: list[dict[str, Any]]) -> bool:
    """Whether the contexts were made beforehand, by another command: its settings are with them."""
    steps = [entry for entry in log if "loss" in entry]
    return bool(steps) and not _rounds_in(folder) and not any("self_prob" in entry for entry in steps)


def _settings_of(folder: Path, idle: Collection[str]) -> dict[str, Any]:
    """The settings that matter most but those without effect, if a model or a checkpoint in the folder tells them."""
    files = sorted(folder.glob(f"checkpoint-*/{SETTINGS}"), key=lambda file: file.stat().st_mtime)
    file = next(filter(Path.is_file, [folder / SETTINGS, *reversed(files)]), None)
    if file is None:
        return {}
    known = json.loads(file.read_text(encoding="utf-8"))
    known |= {name: known.get("trainer", {}).get(name) for name in ("learning_rate", "rows_per_step")}
    names = [name for name in (*_SETTINGS, "learning_rate", "rows_per_step") if name not in idle]
    return {name: known[name] for name in names if known.get(name) is not None}


def _sets(log: list[dict[str, Any]]) -> tuple[str, ...]:
    """The names of evaluation data sets, where there are several."""
    names = {name for entry in log for name in entry if name.startswith("eval_") and name.endswith("_loss")}
    return tuple(sorted(name[len("eval_") : -len("_loss")] for name in names - {"eval_loss"}))


def _ends(log: list[dict[str, Any]], name: str) -> dict[str, float] | None:
    values = [entry[name] for entry in log if name in entry]
    return {"first": values[0], "last": values[-1]} if values else None


def _seconds(log: list[dict[str, Any]]) -> dict[str, float]:
    """Where the time of all steps went, in seconds: each line of the log has means of the steps since the last one."""
    sums = {"contexts": 0.0, "training": 0.0}
    before = 0
    for entry in log:
        if "loss" in entry:
            steps, before = entry["step"] - before, entry["step"]
            sums["contexts"] += steps * entry.get("context_seconds", 0.0)
            sums["training"] += steps * entry.get("training_seconds", 0.0)
    return sums


def _after(gaps: list[dict[str, Any]]) -> dict[str, Any] | None:
    return gaps[-1] if gaps and gaps[-1]["step"] > 0 else None


def _panels(log: list[dict[str, Any]]) -> list[Panel]:
    """What there is to show."""
    found = []
    for title, unit, shown in _PANELS:
        several = {
            f"eval_{one}_{name[len('eval_') :]}": f"{one}: {label}"
            for name, label in shown.items()
            if name.startswith("eval_")
            for one in _sets(log)
        }
        series = {label: list(_points(log, name)) for name, label in {**shown, **several}.items()}
        series = {label: points for label, points in series.items() if points}
        if series:
            found.append(Panel(title, unit, series))
    return found


def _points(log: list[dict[str, Any]], name: str) -> Iterator[tuple[float, float]]:
    """Steps and values; a value that is not finite is a gap in the curve."""
    metric = metric_of(name, _sets(log))
    scale = 100.0 if metric and metric.unit == "%" else 1.0
    for entry in log:
        if name in entry:
            value = entry[name]
            yield entry["step"], math.nan if value is None else scale * value


def _picture(panels: list[Panel], found: dict[str, Any]) -> Any:
    """A figure of matplotlib. Raises ImportError where that is not installed."""
    rows = max(1, math.ceil(len(panels) / 2))
    drawn = figure(figsize=(10, 2.6 * rows))
    axes = drawn.subplots(rows, 2, squeeze=False).ravel()
    for place, panel in zip(axes, panels, strict=False):
        for label, points in panel.series.items():
            place.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
        place.set(xlabel="step", ylabel=panel.unit, ylim=(0, None) if panel.from_zero else None)
        entitle(place, panel.title)
        place.grid(alpha=0.3)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    told = [f"step {found['step']} of {found['max_steps']}"]
    before, after = found["gap"]["before"], found["gap"]["after"]
    if before and after:
        told.append(f"gap {before['gap']:.1f} before, {after['gap']:.1f} points after ({after['gap_rows']} rows)")
    if total := sum(found["seconds"].values()):
        told.append("time: " + ", ".join(f"{name} {one / total:.0%}" for name, one in found["seconds"].items()))
    drawn.suptitle("; ".join(told), fontsize=11)
    return drawn
