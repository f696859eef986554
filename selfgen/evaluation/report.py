"""The results of an evaluation as a table and as plots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LEGEND_COLUMNS = 3
NAMES = {
    "under_references": "tokens, under references",
    "running_freely": "tokens, running freely",
    "whole_answers": "whole answers, freely",
    "agreement": "equal to the reference",
    "exact_match": "exact match",
    "symbolic_match": "symbolic match",
    "finished": "ended by themselves",
    "empty": "empty",
    "rouge1": "ROUGE-1 F1",
    "rouge2": "ROUGE-2 F1",
    "rougeL": "ROUGE-L F1",
    "before": "right before correction",
    "after": "right after correction",
    "wrong_to_right": "wrong -> right",
    "right_to_wrong": "right -> wrong",
    "stayed_right": "right -> right",
    "stayed_wrong": "wrong -> wrong",
}


def table(results: Mapping[str, Any]) -> str:
    """What was measured, as text; its first line is the gap, if that was."""
    lines = []
    if gap := results.get("gap"):
        lines += [gap["advice"], ""]
        for name in ("under_references", "running_freely"):
            lines.append(f"{NAMES[name]:28}{gap[name]:9.2%}  of {gap['tokens']} in {gap['rows']} rows")
        lines.append(_share(NAMES["whole_answers"], gap["whole_answers"]))
        if gap["agreement"] is not None:
            lines.append(f"{NAMES['agreement']:28}{gap['agreement']:9.2%}  of {gap['self_tokens']} self tokens")
    for name in ("exact_match", "symbolic_match", "finished", "empty"):
        if name in results:
            lines.append(_share(NAMES[name], results[name]))
    for name, score in results.get("rouge", {}).items():
        lines.append(f"{NAMES[name]:28}{score:9.4f}")
    for name, share in results.get("correction", {}).items():
        lines.append(_share(NAMES[name], share))
    for name, loss in results.get("loss", {}).items():
        label, made_of = f"loss, {_context(name)} contexts", f"p = {loss['self_prob']:g}, {loss['tokens']} tokens"
        lines.append(f"{label:28}{loss['loss']:9.4f}  nats per token, {made_of}")
    if "curve" in results:
        lines += ["", f"{'loss at position':19}{'tokens':>9}{'reference':>11}{_context('own'):>11}{'difference':>11}"]
        for bucket in results["curve"]:
            losses = "".join(f"{bucket[name]:11.4f}" for name in ("reference", "own", "gap"))
            lines.append(f"{bucket['first']:>7} to {bucket['last']:<8}{bucket['tokens']:9}{losses}")
    return "\n".join(lines)


def _context(name: str) -> str:
    """A kind of context as it is shown: under "own" in the files are those of self tokens alone."""
    return "self" if name == "own" else name


def entitle(axes: Any, title: str) -> None:
    """Put the title above the axes, and the legend of several curves between both, where it hides no point."""
    curves = len(axes.get_legend_handles_labels()[0])
    lines = math.ceil(curves / _LEGEND_COLUMNS) if curves > 1 else 0
    axes.set_title(title, loc="left", fontsize=10, pad=6 + 14 * lines)
    if lines:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
        axes.legend(ncols=_LEGEND_COLUMNS, fontsize=8, frameon=False, **place)


def _share(label: str, share: dict[str, Any]) -> str:
    if share["value"] is None:
        return f"{label:28}{'-':>9}  of none"
    low, high = share["interval"]
    return f"{label:28}{share['value']:9.2%}  [{low:.2%}, {high:.2%}]  {share['count']} of {share['total']}"


def write_plots(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """``loss.png`` and ``curve.png``, where these were measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    written = []
    for name, plot in (("loss", _loss_bars), ("curve", _curve_lines)):
        if name in results:
            file = folder / f"{name}.png"
            plot(results[name]).savefig(file, dpi=120)
            written.append(file)
    return written


def figure(**options: Any) -> Any:
    """An empty figure of matplotlib. Raises ImportError where that is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}): pip install 'selfgen[eval]'") from error
    return Figure(layout="constrained", **options)


def _loss_bars(losses: Mapping[str, Mapping[str, Any]]) -> Any:
    drawn = figure(figsize=(1.5 + 1.5 * len(losses), 4))
    axes = drawn.subplots()
    labels = [f"{_context(name)}\np = {loss['self_prob']:g}" for name, loss in losses.items()]
    bars = axes.bar(labels, [loss["loss"] for loss in losses.values()], color="tab:blue", width=0.6)
    axes.bar_label(bars, fmt="%.3f")
    axes.set(ylabel="nats per token", title="Held-out loss by kind of context")
    return drawn


def _curve_lines(curve: list[dict[str, Any]]) -> Any:
    """Losses along the answer, and below them how many tokens each point stands for."""
    drawn = figure(figsize=(7, 5))
    upper, lower = drawn.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    middles = [(bucket["first"] + bucket["last"]) / 2 for bucket in curve]
    for name, colour in (("reference", "tab:blue"), ("own", "tab:orange")):
        upper.plot(
            middles, [bucket[name] for bucket in curve], marker="o", color=colour, label=f"{_context(name)} context"
        )
    upper.set(ylabel="nats per token", ylim=(0, None))
    entitle(upper, "Held-out loss along the answer")
    widths = [0.9 * (bucket["last"] - bucket["first"] + 1) for bucket in curve]
    lower.bar(middles, [bucket["tokens"] for bucket in curve], width=widths, color="tab:gray")
    lower.set(xlabel="position in the answer", ylabel="tokens")
    return drawn
