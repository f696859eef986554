"""What Triton's compiler makes of every configuration that ships, for GPUs that are not here."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import once_per_run

pytest.importorskip("triton")
from compiling import SOME_TARGETS

from selfgen_kernels.backends.triton.configuration import TARGETS
from tools.aot import CHIPS, RECORDED, Report, read

FOLDER = Path(__file__).parent
SLACK = {"registers": 8, "instructions": 16}  # beside 5%: registers are given in eights


def run_compiled(*command):
    """stdout of a Python that compiles kernels, as this one, in which they are interpreted, cannot."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(FOLDER.parents[1] / ".cache/triton"))
    path = [str(FOLDER), str(FOLDER.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [sys.executable, "-W", "ignore", *map(str, command)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr[-4000:]
    assert done.returncode == 0 or "Traceback" not in done.stderr, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """What `compiling.py` finds, in one process for all tests."""
    return json.loads(once_per_run(tmp_path_factory, "compiled.json", lambda: run_compiled(FOLDER / "compiling.py")))


def reports_of(folder, *arguments):
    """Reports of `tools.aot`, which has the rules and checks kernels by them."""
    result = folder / "reports.json"
    run_compiled("-m", "tools.aot", "--json", result, *arguments)
    reports = json.loads(result.read_text())
    assert reports
    return reports


def all_faults(reports):
    return [f"{report['target']} {report['name']}: {fault}" for report in reports for fault in report["faults"]]


def test_some_configurations_of_every_kernel(compiled):
    reports = compiled["quick"]
    assert all_faults(reports) == []
    assert {report["target"] for report in reports} == set(SOME_TARGETS)


def test_no_kernel_has_become_dearer(compiled):
    """In registers, and in instructions for each element that it streams: `python -m tools.aot --record`."""
    recorded = {report.name: report for report in read(RECORDED)}
    if {report.triton for report in recorded.values()} != {version("triton")}:
        pytest.skip("recorded with another Triton")
    remedy = "run python -m tools.aot --record, and look at what has changed in the file"
    assert len(compiled["figures"]) >= 5
    for found in (Report(**fields) for fields in compiled["figures"]):
        assert found.name in recorded, f"{found.name} is not in {RECORDED.name}: {remedy}"
        before = recorded[found.name]
        figures = {"registers": (found.registers, before.registers), "instructions": (found.size, before.size)}
        figures |= {f"slots of loop {i}": pair for i, pair in enumerate(zip(found.slots, before.slots, strict=False))}
        dearer = {name: pair for name, pair in figures.items() if pair[0] > 1.05 * pair[1] + SLACK.get(name, 0)}
        assert dearer == {}, f"{found.name}, now and recorded: {dearer}; if it has to be, {remedy}"
        assert len(found.slots) == len(before.slots), f"{found.name} has other loops: {remedy}"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration(target, tmp_path):
    assert all_faults(reports_of(tmp_path, "--target", target)) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(CHIPS.keys() - set(TARGETS)))
def test_every_configuration_for_gpus_that_take_the_choices_of_a_target(target, tmp_path):
    assert all_faults(reports_of(tmp_path, "--target", target)) == []


UNITS = {target: CHIPS[target].tensor_core for target in TARGETS}


def assert_faults_are_found(reports, target):
    """The kernels of `specimens` are named for their fault."""
    found = {r["name"]: r for r in reports if r["target"] == target}
    faults = {name: " ".join(report["faults"]) for name, report in found.items()}
    assert faults["nothing"] == ""
    assert UNITS[target].removeprefix("v_") in found["nothing"]["instructions"]
    assert faults["narrow loads"].startswith("no load of 128 bits")
    assert re.fullmatch(r"\d+ narrow loads in a loop beside \d+ of 128 bits", faults["mixed loads"])
    assert re.fullmatch(r"\d+ narrow loads beside \d+ of 128 bits", faults["mixed loads, no loop"])
    assert "narrow loads in a loop" in faults["odd sizes"]
    assert "bytes of shared memory" in faults["shared memory"]
    assert faults["tensor cores"] == f"no {UNITS[target]} instruction"


@pytest.mark.parametrize("target", SOME_TARGETS)
def test_what_is_wrong_is_found(compiled, target):
    assert_faults_are_found(compiled["specimens"], target)


@pytest.mark.slow
def test_what_is_wrong_is_found_on_every_target(tmp_path):
    reports = reports_of(tmp_path, "--module", "specimens")
    for target in TARGETS:
        assert_faults_are_found(reports, target)


def test_spills_are_found(compiled):
    (spills,) = (report for report in compiled["specimens"] if report["name"] == "spills")
    assert spills["target"] == "sm_80"
    assert "spills registers" in " ".join(spills["faults"])
    assert "local memory" in " ".join(spills["faults"])


def test_offsets_do_not_wrap(compiled):
    found = compiled["offsets"].copy()
    specimens = found.pop("specimens")
    assert {name: lines for configurations in found.values() for name, lines in configurations.items() if lines} == {}

    assert specimens["nothing"] == []
    assert "arith.muli %row, %stride : i32" in specimens["offsets"][0]
    assert len(specimens["steps"]) == 1


def test_sizes_that_change_from_pass_to_pass_compile_nothing_anew(compiled):
    """A kernel specialized on whether a size is 1 or a multiple of 16 takes seconds more, several times."""
    found = compiled["sizes of a pass"]
    assert len(found) > 10
    specialized = {name for name, never in found.items() if not never}
    assert specialized == {"gumbel_noise_kernel: size"}  # the width of a row of noise, which is one of two


def test_programs_that_meet_order_their_memory(compiled):
    """What the interpreter, which runs one program after another, does not show: the count is added to in order."""
    assert compiled["atomics"] == {
        "sample_mix_kernel": [["max", "relaxed", "gpu"], ["add", "acq_rel", "gpu"], ["max", "relaxed", "gpu"]]
    }
