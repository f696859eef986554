"""Tables, JSON and a plot of the finished runs: means over seeds, 95% intervals, paired tests against SFT.

    python -m benchmarks.quality.report

The gap that there is to close comes first: the share of tokens that SFT has right under reference contexts and running
freely. Intervals are Student's t over seeds; the p-value is that of a paired, two-sided t-test on the seeds that both
methods have, as a seed has the same initial weights and rows for every method.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from .run import RESULTS, read

Found = dict[int, dict[str, float]]  # seed -> measures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rows = summary(read(options.runs))
    if not rows:
        parser.error(f"{options.runs} has no finished run; make quality")
    text = table(rows)
    options.runs.with_suffix(".md").write_text(text + "\n")
    options.runs.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, options.runs.with_suffix(".png"))
    print(text)
    return 0


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task, setting and method; shares of tokens and answers in per cent."""
    runs: dict[tuple[str, str, str], Found] = defaultdict(dict)
    for line in lines:
        runs[line["task"], json.dumps(line["setting"], sort_keys=True), line["method"]["name"]][line["seed"]] = line[
            "found"
        ]
    rows = []
    for (task, setting, method), found in sorted(runs.items(), key=lambda item: (item[0][:2], item[0][2] != "SFT")):
        sft = runs.get((task, setting, "SFT"), {})
        row: dict[str, Any] = {"task": task, "method": method, "setting": json.loads(setting), "seeds": len(found)}
        for measure in ("reference_token", "token", "exact", "first_token"):
            values = [100 * one[measure] for one in found.values() if measure in one]
            row[measure], row[f"{measure}_interval"] = mean(values), half_interval(values)
        common = sorted(found.keys() & sft.keys())
        differences = [100 * (found[seed]["token"] - sft[seed]["token"]) for seed in common]
        row |= {"over_sft": mean(differences), "over_sft_interval": half_interval(differences)}
        row["p_value"] = None if method == "SFT" else p_value(differences)
        rows.append(row)
    return rows


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def half_interval(values: list[float]) -> float | None:
    """Half of the 95% interval of the mean."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    return float(t.ppf(0.975, len(values) - 1)) * deviation(values) / math.sqrt(len(values))


def p_value(differences: list[float]) -> float | None:
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue) if len(differences) > 1 and deviation(differences) else None


def deviation(values: list[float]) -> float:
    centre = sum(values) / len(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def table(rows: list[dict[str, Any]]) -> str:
    def share(row, name):
        if row[name] is None:
            return ""
        interval = row[f"{name}_interval"]
        return f"{row[name]:.1f}" + ("" if interval is None else f" ± {interval:.1f}")

    head = [
        "task",
        "method",
        "seeds",
        "tokens under reference, %",
        "tokens running freely, %",
        "answers, %",
        "over SFT",
        "p",
    ]
    cells = [head, ["---"] * len(head)]
    for row in rows:
        p = row["p_value"]
        over = "" if row["method"] == "SFT" else share(row, "over_sft")
        numbers = [share(row, name) for name in ("reference_token", "token", "exact")]
        cells.append([row["task"], row["method"], str(row["seeds"]), *numbers, over, "" if p is None else f"{p:.2g}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = sorted({row["task"] for row in rows})
    figure, axes = plt.subplots(1, len(tasks), figsize=(1 + 3.4 * len(tasks), 3.6), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        part = [row for row in rows if row["task"] == task]
        places = range(len(part))
        axis.bar(places, [row["token"] for row in part], yerr=[row["token_interval"] or 0 for row in part], capsize=3)
        axis.plot(
            places, [row["reference_token"] for row in part], "k_", markersize=16, label="under reference contexts"
        )
        axis.set_xticks(places, [row["method"] for row in part], rotation=40, ha="right", fontsize=8)
        axis.set(title=task, ylabel="tokens right running freely, %", ylim=(0, 100))
    axes[0][0].legend(fontsize=7)
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
