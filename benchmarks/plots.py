"""Plots of the benchmarks' JSON, one per question, as PNG files next to it.

python -m benchmarks.plots outputs/bench.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

Entry = dict[str, Any]  # the extra_info of a benchmark

EXACT, OTHER, OWN_NOISE = "tab:blue", "tab:orange", "tab:gray"
SWEEPS = {  # column of the sweep -> file, axis
    "p": ("cost_by_p", "probability of a self token"),
    "rows": ("cost_by_batch", "rows in a batch"),
    "answer tokens": ("cost_by_answer_length", "answer tokens a row"),
    "model size": ("cost_by_model_size", "model"),
}


def main(file: str) -> None:
    results = json.loads(Path(file).read_text())
    info = results["machine_info"]
    machine = f"{info.get('cpu', {}).get('brand_raw', info.get('machine'))}, {info.get('threads')} threads"
    for name, figure in figures([entry["extra_info"] for entry in results["benchmarks"]]):
        path = Path(file).with_name(f"{name}.png")
        figure.supxlabel(f"{machine}, {results['datetime'][:10]}", fontsize=7, color="gray", x=0.99, ha="right")
        figure.savefig(path, dpi=120)
        plt.close(figure)
        print(path)


def figures(entries: list[Entry]) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of each question that something was measured for."""
    methods = [entry for entry in entries if "method" in entry]
    if methods:
        yield "methods", by_method(methods)
    for sweep, (name, axis) in SWEEPS.items():
        points = [entry for entry in entries if entry.get("sweep") == sweep]
        if points:
            yield name, by_sweep(points, axis)


def by_method(entries: list[Entry]) -> Figure:
    """How many times our time each method takes for the same rows."""
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.42 * len(entries)), layout="constrained")
    entries = sorted(entries, key=lambda entry: (-entry["p"], entry["seconds"] / entry["ours_seconds"]))
    for place, entry in enumerate(entries):
        ratio, wrong = entry["seconds"] / entry["ours_seconds"], entry["not_exact"]
        colour, kind = (OWN_NOISE, "own noise") if wrong is None else (EXACT, "exact")
        if wrong:
            colour, kind = OTHER, f"{wrong} of {entry['self tokens']} self tokens not exact"
        axes.barh(place, ratio, color=colour)
        text = f"{ratio:.1f}x ({entry['seconds']:.1f} s), {kind}"
        axes.text(max(ratio, 1) * 1.05, place, text, va="center", fontsize=8)
    labels = [f"{entry['method']}\np = {entry['p']:g}, {entry['rows']} rows" for entry in entries]
    axes.set_yticks(range(len(entries)), labels, fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    largest = max(entry["seconds"] / entry["ours_seconds"] for entry in entries)
    axes.set(xscale="log", xlim=(0.2, largest * 25), xlabel="seconds over ours, for the same rows (line: ours)")
    axes.set_title("Making mixed contexts: what else one could use")
    return figure


def by_sweep(entries: list[Entry], label: str) -> Figure:
    """Milliseconds per context token of the contexts and of one teacher-forced forward; their ratio at the points."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    values = [entry["value"] for entry in entries]
    numbers = all(isinstance(value, int | float) for value in values)
    places = values if numbers else list(range(len(values)))
    for column, name, colour in (
        ("contexts, s", "contexts", EXACT),
        ("one forward, s", "one teacher-forced forward", OWN_NOISE),
    ):
        heights = [entry[column] / entry["context tokens"] * 1e3 for entry in entries]
        axes.plot(places, heights, marker="o", linestyle="-" if numbers else "none", color=colour, label=name)
        if colour == EXACT:
            for place, height, entry in zip(places, heights, entries, strict=True):
                text = f"{entry['contexts / forward']:.2f}x"
                axes.annotate(text, (place, height), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    if numbers:
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    else:
        axes.set_yscale("log")
        axes.set_ylim(top=axes.get_ylim()[1] * 1.3)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(places, [str(value) for value in values])
    axes.xaxis.minorticks_off()
    axes.set(xlabel=label, ylabel="ms a context token", title="Contexts against one forward over the same rows")
    axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main(sys.argv[1])
