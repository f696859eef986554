"""What Triton's compiler makes of every configuration that ships, for GPUs that are not here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from selfgen_kernels.backends.triton.configuration import TARGETS

FOLDER = Path(__file__).parent


def run_compiled(*command):
    """stdout of a Python that compiles kernels, as this one, in which they are interpreted, cannot."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(FOLDER), str(FOLDER.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [sys.executable, "-W", "ignore", *map(str, command)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr[-4000:]
    assert done.returncode == 0 or "Traceback" not in done.stderr, done.stderr[-4000:]
    return done.stdout


def compiled(folder, *arguments):
    """Reports of `tools.aot`, which has the rules and checks kernels by them."""
    result = folder / "reports.json"
    run_compiled("-m", "tools.aot", "--json", result, *arguments)
    reports = json.loads(result.read_text())
    assert reports
    return reports


def all_faults(reports):
    return [f"{report['target']} {report['name']}: {fault}" for report in reports for fault in report["faults"]]


def test_some_configurations_of_every_kernel(tmp_path):
    reports = compiled(tmp_path, "--quick")
    assert all_faults(reports) == []
    assert {report["target"] for report in reports} == set(TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration(target, tmp_path):
    assert all_faults(compiled(tmp_path, "--target", target)) == []


def test_what_is_wrong_is_found(tmp_path):
    """The kernels of `specimens` are named for their fault."""
    found = {(r["target"], r["name"]): r for r in compiled(tmp_path, "--module", "specimens")}
    faults = {key: " ".join(report["faults"]) for key, report in found.items()}
    unit = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
    for target in TARGETS:
        assert faults[target, "nothing"] == ""
        assert unit[target].removeprefix("v_") in found[target, "nothing"]["instructions"]
        assert faults[target, "narrow loads"].startswith("no load of 128 bits")
        assert re.fullmatch(r"\d+ narrow loads in a loop beside \d+ of 128 bits", faults[target, "mixed loads"])
        assert re.fullmatch(r"\d+ narrow loads beside \d+ of 128 bits", faults[target, "mixed loads, no loop"])
        assert "narrow loads in a loop" in faults[target, "odd sizes"]
        assert "bytes of shared memory" in faults[target, "shared memory"]
        assert faults[target, "tensor cores"] == f"no {unit[target]} instruction"
    assert "spills registers" in faults["sm_80", "spills"]
    assert "local memory" in faults["sm_80", "spills"]


def test_offsets_do_not_wrap():
    found = json.loads(run_compiled(FOLDER / "offsets.py"))
    specimens = found.pop("specimens")
    assert {name: lines for configurations in found.values() for name, lines in configurations.items() if lines} == {}

    assert specimens["nothing"] == []
    assert "arith.muli %row, %stride : i32" in specimens["offsets"][0]
    assert len(specimens["steps"]) == 1


SIZES_OF_A_PASS = """
import importlib, json
from selfgen_kernels.backends.triton.configuration import TARGETS
from tools.aot import shipped_modules

SIZES = "capacity chunks first_slot num_slots places queries rows size slots token_budget tokens".split()
found = {}
for module in shipped_modules():
    for one in importlib.import_module(module).configurations(TARGETS[0]):
        for parameter in one.kernel.params:
            if parameter.name in SIZES and one.types.get(parameter.name, "*")[0] != "*":
                found[f"{one.kernel.__name__}: {parameter.name}"] = parameter.do_not_specialize
print(json.dumps(found))
"""


def test_sizes_that_change_from_pass_to_pass_compile_nothing_anew():
    """A kernel specialized on whether a size is 1 or a multiple of 16 takes seconds more, several times."""
    found = json.loads(run_compiled("-c", SIZES_OF_A_PASS))
    assert len(found) > 10
    specialized = {name for name, never in found.items() if not never}
    assert specialized == {"gumbel_noise_kernel: size"}  # the width of a row of noise, which is one of two
