"""Faults that are planted into a copy of the packages are caught by the tests that should catch them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tools.planted_faults import FAULTS, ROOT, Fault, Outcome, outcome_of, replaced

TWO = "commit: final one too short", "commit: the guess after a change is not carried on"


def table(*arguments: str) -> list[str]:
    """What the command prints, if nothing survives."""
    command = [sys.executable, "-m", "tools.planted_faults", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[1:]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_its_lines_are_there(fault):
    compile(replaced(fault), fault.file, "exec")


def test_names_differ():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_lines_that_are_gone_are_an_error():
    with pytest.raises(ValueError, match=r"'gone' can't be planted: .* has 'no such line' 0 times"):
        replaced(Fault("gone", "selfgen/files.py", "no such line", "", ()))


def test_tests_that_do_not_run_have_caught_nothing(tmp_path):
    (tmp_path / "output.txt").write_text("ImportError")
    assert not outcome_of(tmp_path, 4, 1.0).caught
    assert outcome_of(tmp_path, 0, 1.0) == Outcome("none", False, 1.0)
    assert outcome_of(tmp_path, None, 1.0).caught
    (tmp_path / "failed.txt").write_text("tests/test_a.py::test_a\n")
    assert outcome_of(tmp_path, 1, 1.0) == Outcome("tests/test_a.py::test_a", True, 1.0)


def test_two_are_caught():
    *found, clean = table("--only", *TWO)
    assert {line.split("|")[1].strip() for line in found} == set(TWO)
    assert all("| yes" in line and "test_commit_place_by_place" in line for line in found)
    assert "| -" in clean


@pytest.mark.slow
def test_all_are_caught():
    assert len(table()) == len(FAULTS) + 2
