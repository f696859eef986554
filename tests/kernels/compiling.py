"""What tests of compiled kernels look at, made in one process: prints it as JSON.

quick: reports of `tools.aot` on one configuration of each kernel, for SOME_TARGETS. specimens: those on kernels with a
fault each. figures: those on one configuration in bf16 of each kernel that streams, for the target that is recorded.
offsets: see `offsets.py`. sizes of a pass: of each argument that changes from pass to pass, whether kernels are never
specialized on it. atomics: of each kernel that has some, their memory orders, first to last.
"""

import dataclasses
import json
import re
from importlib import import_module

SOME_TARGETS = ("sm_90", "gfx942")
"""One of each compiler; the tests on the others are slow ones."""
SIZES = (
    "capacity", "chunks", "first_slot", "num_slots", "places", "queries", "rows", "segments", "size", "slots",
    "token_budget", "tokens",
)  # fmt: skip


def sizes_of_a_pass():
    from tools.aot import shipped_modules

    found = {}
    for module in shipped_modules():
        for one in import_module(module).configurations("sm_80"):
            for parameter in one.kernel.params:
                if parameter.name in SIZES and one.types.get(parameter.name, "*")[0] != "*":
                    found[f"{one.kernel.__name__}: {parameter.name}"] = parameter.do_not_specialize
    return found


def atomics():
    from offsets import ttir

    from tools.aot import shipped_modules

    found = {}
    for module in shipped_modules():
        for one in import_module(module).configurations("sm_90"):
            if (name := one.kernel.__name__) not in found:
                found[name] = re.findall(r"tt.atomic_\w+ (\w+), (\w+), (\w+)", ttir(one))
    return {name: orders for name, orders in found.items() if orders}


def figures():
    """Jobs for one configuration of each kernel that streams, in bf16."""
    from tools.aot import OTHER_DTYPES, jobs, shipped_modules

    found = {}
    for job in jobs(shipped_modules(), ["sm_90"], "", quick=False):
        configuration = job.configuration()
        if configuration.streams and not OTHER_DTYPES.search(configuration.name):
            found.setdefault(configuration.kernel.__name__, job)
    return list(found.values())


if __name__ == "__main__":
    from offsets import all_products

    from tools.aot import compile_all, jobs, shipped_modules

    quick = jobs(shipped_modules(), SOME_TARGETS, "", quick=True)
    wrong = jobs(["specimens"], SOME_TARGETS, "", quick=False) + jobs(["specimens"], ["sm_80"], "spills", quick=False)
    recorded = figures()
    reports = [dataclasses.asdict(report) for report in compile_all(quick + wrong + recorded, processes=1)]
    found = {
        "quick": reports[: len(quick)],
        "specimens": reports[len(quick) : -len(recorded)],
        "figures": reports[-len(recorded) :],
        "offsets": all_products(),
        "sizes of a pass": sizes_of_a_pass(),
        "atomics": atomics(),
    }
    print(json.dumps(found))
