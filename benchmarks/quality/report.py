"""Tables, JSON and plots of the finished runs: means over seeds, 95% intervals, paired tests against SFT.

    python -m benchmarks.quality.report [--stage selection]

The gap that there is to close comes first: the share of tokens that SFT has right under reference contexts and running
freely. Intervals are Student's t over seeds; the p-value is that of a paired, two-sided t-test on the seeds that both
methods have, as a seed has the same initial weights and rows for every method. Corrected p-values are Holm's, over the
candidates that a task was run with; those of other methods, and of other measures than tokens, are as they are.

The rule: on a task a candidate is *not worse* than SFT if the lower end of the interval of the difference in tokens is
above -1 point, and *better* if the difference is at least 5 points and its corrected p-value below 0.05. Its whole
answers must not be significantly worse (p < 0.05, uncorrected).
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .methods import ALL_METHODS, BASELINES, CANDIDATES, METHODS
from .run import RESULTS, STAGES, read
from .tasks import MAIN, TASKS

Found = dict[int, dict[str, float]]  # seed -> measures
COMPARED = ("token", "exact", "rouge_l")  # with SFT, of answers of models that run freely
PASSES = tuple(f"passes_per_token{what}{how}" for what in ("", "_unguided") for how in ("", "_greedy"))
CORRECTED = ("first_token", "corrected_token", "first_exact", "corrected_exact", "wrong_to_right", "right_to_wrong")
SHARES = ("reference_token", *COMPARED, *CORRECTED)  # in per cent
NUMBERS = ("tokens_seen", *PASSES, "train_seconds", "teacher_seconds")
MAY_BECOME_DEFAULT = ("BSS", *CANDIDATES)
FEWEST_SEEDS = 3  # of fewer, neither an interval nor a test says anything
UNMIXED = "nothing was mixed"
NOT_WORSE, BETTER, WINS = -1.0, 5.0, 3  # points, points, and tasks on which the default has to be better


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--stage", choices=list(STAGES))
    parser.add_argument("--runs", type=Path)
    options = parser.parse_args(arguments)
    runs = options.runs or (RESULTS.with_name(f"quality_{options.stage}.jsonl") if options.stage else RESULTS)
    rows = summary(read(runs))
    if not rows:
        parser.error(f"{runs} has no finished run; make quality")
    text = page(rows, runs.name)
    runs.with_suffix(".md").write_text(text + "\n")
    runs.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, runs.with_suffix(".png"))
    if any(row["curve"] for row in rows):
        plot_curves(rows, runs.with_name(f"{runs.stem}_curves.png"))
    print(text)
    return 0


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task, setting and method; shares of tokens and answers in per cent, SFT's row first.

    Runs of tasks and methods that are no more are left out.
    """
    runs: dict[tuple[str, str, str], Found] = defaultdict(dict)
    curves: dict[tuple[str, str, str], list[list[dict[str, float]]]] = defaultdict(list)
    for line in lines:
        if line["task"] not in TASKS or line["method"]["name"] not in ALL_METHODS:
            continue
        setting = json.dumps(line["setting"] | {"test_rows": line.get("test_rows")}, sort_keys=True)
        key = line["task"], setting, line["method"]["name"]
        seconds = {name: line[name] for name in NUMBERS if name in line}
        runs[key][line["seed"]] = line["found"] | seconds
        curves[key].append(line.get("curve", []))
    places = {name: place for place, name in enumerate(ALL_METHODS)}
    rows = []
    for (task, setting, method), found in sorted(runs.items(), key=lambda item: (item[0][:2], places[item[0][2]])):
        sft = runs.get((task, setting, "SFT"), {})
        row: dict[str, Any] = {"task": task, "method": method, "setting": json.loads(setting), "seeds": sorted(found)}
        # What waited to its end is SFT, whose runs here may be copies of it: there is nothing to compare.
        row["is_sft"] = method == "SFT" or (
            ALL_METHODS[method].waits and not any(one.get("self_prob", 1) for one in found.values())
        )
        common = [] if row["is_sft"] else sorted(found.keys() & sft.keys())
        for measure in (*SHARES, *NUMBERS):
            scale = 100 if measure in SHARES else 1
            values = [scale * one[measure] for one in found.values() if measure in one]
            row[measure], row[f"{measure}_interval"] = mean(values), half_interval(values)
            if measure not in (*COMPARED, *PASSES):
                continue
            both = [(found[seed], sft[seed]) for seed in common if measure in found[seed] and measure in sft[seed]]
            differences = [scale * (ours[measure] - theirs[measure]) for ours, theirs in both]
            row[f"{measure}_over_sft"] = mean(differences)
            row[f"{measure}_over_sft_interval"] = half_interval(differences)
            row[f"{measure}_p_value"] = p_value(differences)
        row["curve"] = mean_curve(curves[task, setting, method])
        rows.append(row)
    judge(rows)
    return rows


def mean_curve(curves: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Means over seeds, in per cent, at each step."""
    points: dict[int, list[dict[str, float]]] = defaultdict(list)
    for curve in curves:
        for point in curve:
            points[int(point["step"])].append(point)
    names = ("reference_token", "token", "exact")
    return [
        {"step": step, **{name: 100 * fmean(point[name] for point in some) for name in names}}
        for step, some in sorted(points.items())
    ]


def judge(rows: list[dict[str, Any]]) -> None:
    """Write corrected p-values and what the rule says into the rows of candidates."""
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        waited = row["is_sft"] and row["method"] != "SFT" and len(row["seeds"]) >= FEWEST_SEEDS
        row["token_corrected_p_value"], row["verdict"] = None, UNMIXED if waited else ""
        if row["method"] in MAY_BECOME_DEFAULT:
            families[json.dumps([row["task"], row["setting"]], sort_keys=True)].append(row)
    for family in families.values():
        known = [row for row in family if row["token_p_value"] is not None]
        for row, p in zip(known, holm([row["token_p_value"] for row in known]), strict=True):
            difference, interval = row["token_over_sft"], row["token_over_sft_interval"]
            row["token_corrected_p_value"] = p
            if difference >= BETTER and p < 0.05:
                row["verdict"] = "better"
            elif difference - interval > NOT_WORSE:
                row["verdict"] = "not worse"
            else:
                row["verdict"] = "worse" if difference + interval < 0 else "open"


def holm(p_values: list[float]) -> list[float]:
    """Corrected for as many tests (Holm 1979), in the order given."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def half_interval(values: list[float]) -> float | None:
    """Half of the 95% interval of the mean."""
    from scipy.stats import t

    if len(values) < FEWEST_SEEDS:
        return None
    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def p_value(differences: list[float]) -> float | None:
    from scipy.stats import ttest_1samp

    if len(differences) < FEWEST_SEEDS:
        return None
    if not any(differences):  # the method has trained as SFT does
        return 1.0
    return float(ttest_1samp(differences, 0.0).pvalue) if stdev(differences) else None


def page(rows: list[dict[str, Any]], runs: str) -> str:
    """The gap, what the rule says, the methods, their passes and corrections."""
    tasks = [name for name in TASKS if any(row["task"] == name for row in rows)]
    gap = [["task", "", "tokens right under references, %", "running freely, %", "answers right, %"]]
    for row in rows:
        if row["method"] == "SFT":
            numbers = [share(row, name) for name in ("reference_token", "token", "exact")]
            gap.append([row["task"], TASKS[row["task"]].about, *numbers])
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    stage = next((name for name in STAGES if runs == f"quality_{name}.jsonl"), None)
    of_runs = f"--stage {stage}" if stage else f"--first-seed {seeds[0]} --output benchmarks/results/{runs}"
    of_report = f"--stage {stage}" if stage else f"--runs benchmarks/results/{runs}"
    about = (
        f"Of {runs}, seeds {seeds[0]} to {seeds[-1]}: `python -m benchmarks.quality.run {of_runs}`, with `--tasks` and "
        f"`--methods` as below; then `python -m benchmarks.quality.report {of_report}`. Means with 95% intervals. "
        "Seconds are processor time of the training, contexts included, on one thread."
    )
    parts = ["# Free-running answers", about, "## The gap: SFT", table(gap)]
    if len(decided := decision(rows)) > 1:
        parts += ["## What the rule says", RULE, table(decided)]
    elif len(ordered := selection(rows)) > 1:
        parts += ["## The order of the candidates", OF_SELECTION, table(ordered)]
    methods = {name for name in METHODS if name not in MAY_BECOME_DEFAULT} | BASELINES.keys()
    others = ALL_METHODS.keys() - methods - {*MAY_BECOME_DEFAULT}
    for title, names in (("Candidates", {*MAY_BECOME_DEFAULT}), ("Methods", methods), ("Ablations", others)):
        for task in tasks:
            some = [row for row in rows if row["task"] == task and (row["method"] in names or row["method"] == "SFT")]
            if any(row["method"] != "SFT" for row in some):
                parts += [f"## {title}: {task}", table([HEAD, *map(cells, some)])]
    for title, text, lines in (("Passes of contexts at p = 1", OF_PASSES, passes(rows)), ("RAC", OF_RAC, rac(rows))):
        if len(lines) > 1:
            parts += [f"## {title}", text, table(lines)]
    return "\n\n".join(parts)


RULE = (
    f"Not worse than SFT: the lower end of the 95% interval of the difference in tokens is above {NOT_WORSE:.0f} "
    f"point. Better: at least {BETTER:.0f} points, p < 0.05 (Holm, over the candidates of the task). The default has "
    f"to be not worse on every task, and better on at least {WINS}; and on no task may significantly fewer whole "
    "answers be right (p < 0.05, uncorrected). Where nothing was mixed, the run was SFT, which is not worse."
)
OF_SELECTION = (
    f"By the tasks on which the mean gains at least {BETTER:.0f} points of tokens over SFT, then by the mean gain of "
    "all tasks."
)
OF_PASSES = (
    "Passes per token of contexts at p = 1, row by row; one token after the other takes 1. Tokens are sampled at "
    "temperature 1 with the same noise for every model, or greedy. The first guess is the reference, so this says what "
    "contexts cost. It says nothing of answers, for which there is no reference: for these, the first guess is the "
    "answer of another row."
)
OF_RAC = (
    "First and corrected answers, and the shares of all rows whose answer became right, or wrong. SFT has not learned "
    "to correct."
)
HEAD = [
    "method", "seeds", "M tokens seen", "seconds", "tokens under references, %", "tokens running freely, %", "over SFT",
    "p", "corrected p", "verdict", "answers, %", "over SFT", "p", "ROUGE-L", "over SFT", "p",
]  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    result = [row["method"], str(len(row["seeds"])), millions(row), seconds(row), share(row, "reference_token")]
    for measure in COMPARED:
        result += [share(row, measure), share(row, f"{measure}_over_sft", "+"), small(row[f"{measure}_p_value"])]
        if measure == "token":
            result += [small(row["token_corrected_p_value"]), row["verdict"]]
    return result


def decision(rows: list[dict[str, Any]]) -> list[list[str]]:
    """On how many of the main tasks each candidate is not worse, and better."""
    lines = [
        ["candidate", "tasks", "not worse", "better", "may be worse on", "answers worse on", "fit for the default"]
    ]
    main_tasks = {task.name for task in MAIN}
    tasks = {row["task"] for row in rows if row["method"] == "SFT"} & main_tasks
    for name in MAY_BECOME_DEFAULT:
        verdicts = {row["task"]: row["verdict"] for row in rows if row["method"] == name and row["task"] in main_tasks}
        verdicts = {task.name: verdicts[task.name] for task in MAIN if verdicts.get(task.name)}
        if not verdicts:
            continue
        bad = [task for task, verdict in verdicts.items() if verdict not in ("better", "not worse", UNMIXED)]
        answers = [row["task"] for row in rows if row["method"] == name and row["task"] in main_tasks and loses(row)]
        wins = sum(verdict == "better" for verdict in verdicts.values())
        fit = "yes" if not bad and not answers and verdicts.keys() >= tasks and wins >= WINS else "no"
        if fit == "yes" and not verdicts.keys() >= {*STAGES["confirmation"].tasks}:
            fit = "so far; tasks are still to be run"
        counts = [f"{len(verdicts)} of {len(tasks)}", str(len(verdicts) - len(bad)), str(wins)]
        lines.append([name, *counts, ", ".join(bad), ", ".join(answers), fit])
    return lines


def selection(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The candidates, best first, where seeds are too few for the rule."""
    gains: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["method"] in MAY_BECOME_DEFAULT and row["token_over_sft"] is not None:
            gains[row["method"]][row["task"]] = row["token_over_sft"]
    found = [
        (sum(gain >= BETTER for gain in some.values()), fmean(some.values()), name) for name, some in gains.items()
    ]
    tasks = [task.name for task in MAIN if any(task.name in some for some in gains.values())]
    lines = [["candidate", f"gains of {BETTER:.0f} points", "mean gain", *tasks]]
    for count, gain, name in sorted(found, reverse=True):
        each = [f"{gains[name][task]:+.1f}" if task in gains[name] else "" for task in tasks]
        lines.append([name, str(count), f"{gain:+.1f}", *each])
    return lines


def loses(row: dict[str, Any]) -> bool:
    """Whether significantly fewer whole answers are right than with SFT."""
    p = row["exact_p_value"]
    return p is not None and p < 0.05 and row["exact_over_sft"] < 0


def passes(rows: list[dict[str, Any]]) -> list[list[str]]:
    kinds = ("sampled", "greedy", "sampled, another row's answer", "greedy, another row's answer")
    lines = [["task", "method", *(name for kind in kinds for name in (kind, "over SFT"))]]
    for row in rows:
        if row[PASSES[0]] is not None:
            found = [
                share(row, name + what, sign, 3) for name in PASSES for what, sign in (("", ""), ("_over_sft", "+"))
            ]
            lines.append([row["task"], row["method"], *found])
    return lines


def rac(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Methods that correct, and SFT on the same tasks."""
    lines = [[
        "task", "method", "M tokens seen", "seconds", "first tokens, %", "corrected tokens, %", "first answers, %",
        "corrected answers, %", "wrong to right, %", "right to wrong, %",
    ]]  # fmt: skip
    correct = [row for row in rows if row["corrected_token"] is not None]
    tasks = {row["task"] for row in correct if row["method"] != "SFT"}
    for row in correct:
        if row["task"] in tasks:
            found = [share(row, name) for name in CORRECTED]
            lines.append([row["task"], row["method"], millions(row), seconds(row), *found])
    return lines


def millions(row: dict[str, Any]) -> str:
    return "" if row["tokens_seen"] is None else f"{row['tokens_seen'] / 1e6:.2f}"


def seconds(row: dict[str, Any]) -> str:
    """Of the training, and of the teacher's before it."""
    if row["train_seconds"] is None:
        return ""
    teacher = row["teacher_seconds"]
    return f"{row['train_seconds']:.0f}" + (f" + {teacher:.0f}" if teacher else "")


def small(p: float | None) -> str:
    return "" if p is None else f"{p:.1g}"


def share(row: dict[str, Any], name: str, sign: str = "", digits: int = 1) -> str:
    if row[name] is None:
        return ""
    interval = row[f"{name}_interval"]
    return f"{row[name]:{sign}.{digits}f}" + ("" if interval is None else f" ± {interval:.{digits}f}")


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


def plot_curves(rows: list[dict[str, Any]], file: Path) -> None:
    """Tokens right running freely over steps: a small plot per task, SFT against the candidates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [row for row in rows if row["curve"] and row["method"] in ("SFT", *MAY_BECOME_DEFAULT)]
    tasks = [name for name in TASKS if any(row["task"] == name for row in drawn)]
    names = [name for name in MAY_BECOME_DEFAULT if any(row["method"] == name for row in drawn)]
    colours = {"SFT": "black"} | {name: plt.get_cmap("tab20")(place % 20) for place, name in enumerate(names)}
    columns = min(4, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(1 + 3.6 * columns, 0.8 + 3 * lines), layout="constrained", squeeze=False
    )
    for axis, task in zip(axes.flat, tasks, strict=False):
        for row in (row for row in drawn if row["task"] == task):
            steps, colour = [point["step"] for point in row["curve"]], colours[row["method"]]
            width = 2.2 if row["method"] == "SFT" else 1.3
            axis.plot(steps, [point["token"] for point in row["curve"]], "o-", color=colour, lw=width, ms=3)
            if row["method"] == "SFT":
                references = [point["reference_token"] for point in row["curve"]]
                axis.plot(steps, references, ":", color="grey", label="SFT under references")
        axis.set(title=task, xlabel="step", ylabel="tokens right running freely, %", ylim=(0, 100))
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    known = [plt.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    known.append(plt.Line2D([], [], color="grey", linestyle=":", label="SFT under references"))
    figure.legend(handles=known, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
