"""The benchmarks' report: tables printed after the run, with the machine they were measured on."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from selfgen.provenance import versions

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

PACKAGES = ("torch", "transformers", "triton", "numpy", "selfgen", "trl")
"""Whose versions stand in the JSON; null where one is not installed."""

_TABLES = pytest.StashKey[dict[str, list[dict]]]()


# Of one comparison: how many rounds it has (fewer if one takes long, as sides that are slow are not compared by a few
# per cent), and how long a single timing is at least.
LEAST_ROUNDS, MOST_ROUNDS = 5, 60
SLOW_SECONDS, LEAST_ROUNDS_IF_SLOW = 2.0, 3
LEAST_SECONDS = 2e-3 if torch.cuda.is_available() else 2e-4  # waiting for a GPU takes ten microseconds


def pytest_addoption(parser):
    parser.addoption("--report", metavar="FILE", help="write the report to this file, too")
    parser.addoption("--seconds", type=float, default=2.0, help="how long one comparison may take (default: 2)")


def pytest_configure(config):
    config.stash[_TABLES] = {}


def pytest_benchmark_update_machine_info(machine_info):
    """What pytest-benchmark's JSON lacks beside the processor, the system and Python."""
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info["versions"] = versions(*PACKAGES)


def pytest_benchmark_update_json(config, output_json):
    output_json["command"] = shlex.join(["python", "-m", "pytest", *config.invocation_params.args])


@pytest.fixture
def report(request):
    """Call with a title and rows (dicts of one shape) to have a table in the report."""

    return lambda title, rows: request.config.stash[_TABLES].setdefault(title, []).extend(rows)


@pytest.fixture
def compare(benchmark, request):
    """Time several ways to the same thing, alternating; the first one is ours.

    Call with a title, the sides (functions) and the columns that tell this comparison from the title's others; ``own``
    is how many of the first sides are variants of ours. Returns each side's median seconds, and adds a row to the
    title's table: milliseconds, and how many times ours that is. ``extra_info["ratios"]`` has each peer's time over
    ours, and the first peer's over each further variant.
    """

    def run(
        title: str, sides: dict[str, Callable[[], object]], columns: dict[str, object], *, own: int = 1
    ) -> dict[str, float]:
        names = list(sides)
        inner = {name: _inner_calls(side) for name, side in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in names}

        def time_side(name: str) -> None:
            _synchronize()
            started = time.perf_counter()
            for _ in range(inner[name]):
                sides[name]()
            _synchronize()
            seconds[name].append((time.perf_counter() - started) / inner[name])

        def time_peers() -> None:
            for name in names[1:]:
                time_side(name)

        time_side(names[0])
        time_peers()
        once = sum(times[0] * inner[name] for name, times in seconds.items())
        rounds = LEAST_ROUNDS if once < SLOW_SECONDS else LEAST_ROUNDS_IF_SLOW
        rounds = int(min(MOST_ROUNDS, max(rounds, request.config.getoption("--seconds") / once)))
        for times in seconds.values():
            times.clear()
        benchmark.pedantic(time_side, args=(names[0],), setup=time_peers, rounds=rounds)

        medians = {name: statistics.median(times) for name, times in seconds.items()}
        mine = medians[names[0]]
        row = dict(columns)
        for name, median in medians.items():
            row[f"{name}, ms"] = f"{median * 1e3:.3g}" + ("" if name == names[0] else f" ({median / mine:.2g}x)")
        ratios = {name: medians[name] / mine for name in names[own:]}
        ratios |= {f"{names[own]} / {name}": medians[names[own]] / medians[name] for name in names[1:own]}
        benchmark.extra_info.update(columns, rounds=rounds, median_seconds=medians, ratios=ratios)
        request.config.stash[_TABLES].setdefault(title, []).append(row)
        return medians

    return run


def _inner_calls(side: Callable[[], object]) -> int:
    """How often to call `side` so that the clock's resolution and a launch do not matter; warms it up, too."""
    for call in range(3):
        _synchronize()
        started = time.perf_counter()
        side()
        _synchronize()
        took = time.perf_counter() - started
        if call > 0 and took > SLOW_SECONDS / 10:  # the first call may compile
            break
    return int(max(1, min(200, LEAST_SECONDS / took)))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def pytest_terminal_summary(terminalreporter, config):
    tables = config.stash[_TABLES]
    if not tables:
        return
    device = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device += f"; {torch.cuda.get_device_name()}, CUDA {torch.version.cuda or torch.version.hip}"
    software = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    lines = [f"{device}; {software}"]
    for title, rows in tables.items():
        lines += ["", title, ""]
        if rows:
            cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
            widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
            cells.insert(1, ["-" * width for width in widths])
            lines += ["| " + " | ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    terminalreporter.section("report")
    terminalreporter.write_line("\n".join(lines))
    if file := config.getoption("--report"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("\n".join(lines) + "\n")
        terminalreporter.write_line(f"\nreport: {file}")
