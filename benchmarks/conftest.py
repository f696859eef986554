"""The benchmarks' report: tables printed after the run, with the machine they were measured on."""

from __future__ import annotations

import os
import platform

import pytest
import torch
import transformers

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

_LINES = pytest.StashKey[list[str]]()


def pytest_configure(config):
    config.stash[_LINES] = []


@pytest.fixture
def report(request):
    """Call with a title and rows (dicts of one shape) to have a table in the report."""

    def add(title: str, rows: list[dict]) -> None:
        lines = request.config.stash[_LINES]
        lines.append(title)
        if not rows:
            return
        cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines += ["  " + "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]

    return add


def pytest_terminal_summary(terminalreporter, config):
    if not config.stash[_LINES]:
        return
    terminalreporter.section("report")
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    terminalreporter.write_line(f"{machine}; {versions}")
    for line in config.stash[_LINES]:
        terminalreporter.write_line(line)
