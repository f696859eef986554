"""Tables, JSON and a plot of the finished runs: means over seeds, 95% intervals, paired tests against SFT.

    python -m benchmarks.quality.report

The gap that there is to close comes first: the share of tokens that SFT has right under reference contexts and running
freely. Intervals are Student's t over seeds; the p-value is that of a paired, two-sided t-test on the seeds that both
methods have, as a seed has the same initial weights and rows for every method. No correction is made for many tests.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .methods import ABLATIONS, METHODS
from .run import RESULTS, read
from .tasks import MAIN, TASKS

Found = dict[int, dict[str, float]]  # seed -> measures
COMPARED = ("token", "exact", "rouge_l")  # with SFT, of answers of models that run freely


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rows = summary(read(options.runs))
    if not rows:
        parser.error(f"{options.runs} has no finished run; make quality")
    text = page(rows, options.runs.name)
    options.runs.with_suffix(".md").write_text(text + "\n")
    options.runs.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, options.runs.with_suffix(".png"))
    print(text)
    return 0


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task, setting and method; shares of tokens and answers in per cent, SFT's row first."""
    runs: dict[tuple[str, str, str], Found] = defaultdict(dict)
    for line in lines:
        setting = json.dumps(line["setting"] | {"test_rows": line.get("test_rows")}, sort_keys=True)
        runs[line["task"], setting, line["method"]["name"]][line["seed"]] = line["found"]
    places = {name: place for place, name in enumerate((*METHODS, *ABLATIONS))}
    rows = []
    for (task, setting, method), found in sorted(runs.items(), key=lambda item: (item[0][:2], places[item[0][2]])):
        sft = runs.get((task, setting, "SFT"), {})
        row: dict[str, Any] = {"task": task, "method": method, "setting": json.loads(setting), "seeds": sorted(found)}
        for measure in ("reference_token", "token", "exact", "rouge_l", "first_token"):
            values = [100 * one[measure] for one in found.values() if measure in one]
            row[measure], row[f"{measure}_interval"] = mean(values), half_interval(values)
        row["tokens_seen"] = mean([one["tokens_seen"] for one in found.values() if "tokens_seen" in one])
        common = sorted(found.keys() & sft.keys()) if method != "SFT" else []
        for measure in COMPARED:
            differences = [100 * (found[seed][measure] - sft[seed][measure]) for seed in common]
            row[f"{measure}_over_sft"] = mean(differences)
            row[f"{measure}_over_sft_interval"] = half_interval(differences)
            row[f"{measure}_p_value"] = p_value(differences)
        rows.append(row)
    return rows


def mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def half_interval(values: list[float]) -> float | None:
    """Half of the 95% interval of the mean."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def p_value(differences: list[float]) -> float | None:
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue) if len(differences) > 1 and stdev(differences) else None


def page(rows: list[dict[str, Any]], runs: str) -> str:
    """The gap, the methods, the ablations."""
    tasks = [name for name in TASKS if any(row["task"] == name for row in rows)]
    gap = [["task", "", "tokens right under references, %", "running freely, %", "answers right, %"]]
    for row in rows:
        if row["method"] == "SFT":
            numbers = [share(row, name) for name in ("reference_token", "token", "exact")]
            gap.append([row["task"], TASKS[row["task"]].about, *numbers])
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    about = (
        f"Of {runs}, seeds {seeds[0]} to {seeds[-1]}: `python -m benchmarks.quality.run --first-seed {seeds[0]}`, with "
        f"`--tasks` and `--methods` as below and `--output benchmarks/results/{runs}`; then `python -m "
        f"benchmarks.quality.report --runs benchmarks/results/{runs}`. Means with 95% intervals."
    )
    parts = ["# Free-running answers", about, "## The gap: SFT", table(gap)]
    for title, names in (("Methods", METHODS), ("Ablations", ABLATIONS)):
        for task in tasks:
            some = [row for row in rows if row["task"] == task and (row["method"] in names or row["method"] == "SFT")]
            if any(row["method"] != "SFT" for row in some):
                parts += [f"## {title}: {task}", table([HEAD, *map(cells, some)])]
    return "\n\n".join(parts)


HEAD = [
    "method", "seeds", "M tokens seen", "tokens under references, %", "tokens running freely, %", "over SFT", "p",
    "answers, %", "over SFT", "p", "ROUGE-L", "over SFT", "p",
]  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    seen = "" if row["tokens_seen"] is None else f"{row['tokens_seen'] / 1e6:.2f}"
    result = [row["method"], str(len(row["seeds"])), seen, share(row, "reference_token")]
    for measure in COMPARED:
        p = row[f"{measure}_p_value"]
        result += [share(row, measure), share(row, f"{measure}_over_sft", "+"), "" if p is None else f"{p:.1g}"]
    return result


def share(row: dict[str, Any], name: str, sign: str = "") -> str:
    if row[name] is None:
        return ""
    interval = row[f"{name}_interval"]
    return f"{row[name]:{sign}.1f}" + ("" if interval is None else f" ± {interval:.1f}")


def table(lines: list[list[str]]) -> str:
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task.name for task in MAIN if any(row["task"] == task.name for row in rows)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(1 + 3.8 * len(tasks), 4.4), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        part = [row for row in rows if row["task"] == task]
        places = range(len(part))
        axis.bar(places, [row["token"] for row in part], yerr=[row["token_interval"] or 0 for row in part], capsize=3)
        axis.plot(
            places, [row["reference_token"] for row in part], "k_", markersize=16, label="under reference contexts"
        )
        axis.set_xticks(places, [row["method"] for row in part], rotation=50, ha="right", fontsize=8)
        axis.set(title=task, ylabel="tokens right running freely, %", ylim=(0, 100))
    axes[0][0].legend(fontsize=7)
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
