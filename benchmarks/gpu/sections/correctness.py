"""The gate: all tests that need a GPU. Nothing that is measured after it counts where one of them fails."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from .. import results
from ..lab import Lab

# Engine first, as it is what changes; all files with tests of a GPU are in these.
FILES = ["tests/test_on_gpu.py", "tests/kernels"]
REHEARSED = ["tests/test_structure.py", "-k", "fault", "-m", "not gpu"]
WORKERS = 8  # most: each compiles for itself
MARGIN = 8.0  # seconds that are left to pytest for writing down what has run


class GateError(Exception):
    """A test failed, or pytest itself did."""


def run(lab: Lab) -> None:
    xml, log = lab.folder / "correctness.xml", lab.folder / "correctness-pytest.log"
    xml.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", f"--junitxml={xml}"]
    command += REHEARSED if lab.rehearsal else ["-m", "gpu", *FILES]
    workers = min(WORKERS, (os.cpu_count() or 1) // 2)
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(workers if workers > 1 and not lab.rehearsal else 0)]
    seconds, code = lab.left - MARGIN, None
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=results.ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it stops, and writes its results
            lab.note(f"The tests were stopped after {seconds:.0f} s; those below are the ones that had run.")
            process.wait()
    counts, bad = counts_of(xml)
    lab.row("tests", {"command": " ".join(["pytest", *command[3:]]).replace(f"{results.ROOT}/", "")}, **counts)
    for name in bad:
        lab.row("tests that failed", {"test": name})
    if bad or code not in (0, None):
        raise GateError(f"{len(bad)} tests failed, pytest ended with {code}: {log.name} has their output")


def counts_of(xml: Path) -> tuple[dict[str, int], list[str]]:
    """How many tests of a JUnit XML passed, failed and so on, and the names of those that failed.

    Raises:
        GateError: there is no such file, or not all of it, as pytest was killed.
    """
    kinds = {"failure": "failed", "error": "errors", "skipped": "skipped"}
    counts, bad = dict.fromkeys(("passed", *kinds.values()), 0), []
    try:
        cases = list(ElementTree.parse(xml).iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        raise GateError(f"pytest has left no results: {error}") from error
    for case in cases:
        found = next((kind for kind in ("error", "failure", "skipped") if case.find(kind) is not None), None)
        counts[kinds[found] if found else "passed"] += 1
        if found in ("error", "failure"):
            bad.append(f"{kinds[found]}: {case.get('classname')}::{case.get('name')}")
    return counts, bad
