"""Every op by graph replay, on inputs that are more than the L2 holds, against the rates of the same machine.

``us`` and ``again`` are two medians; ``from Python`` is the host's clock, launches, checks and allocations included.
"""

from __future__ import annotations

import torch

from ..lab import Lab
from ..ops import Case, cases
from ..timing import Rates, copies_for, rates, times_of

SECONDS = 0.15  # of one case


def run(lab: Lab) -> None:
    found = rates(lab.device)
    products = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in found.flops.items())
    lab.note(f"By the copy rate and the products of this section: {found.copy / 1e12:.3g} TB/s, {products}.")
    for case in cases(lab.device, rehearsal=lab.rehearsal):
        try:
            measure(lab, case, found)
        except (RuntimeError, ValueError, TypeError) as error:  # of one op: the others are worth knowing
            lab.row("kernels that did not run", {"op": case.op, **case.columns}, error=str(error)[:200])
            if not lab.rehearsal:
                torch.cuda.synchronize()  # raises where the device is lost, which ends the section


def measure(lab: Lab, case: Case, found: Rates) -> None:
    calls = [case.make() for _ in range(copies_for(case.inputs, lab.device))]
    with torch.no_grad():
        times = times_of(calls, lab.device, seconds=0.01 if lab.rehearsal else SECONDS)
    peak = found.flops.get(str(case.columns.get("dtype")), 0.0)
    lab.row(
        f"kernels: {case.family}",
        {"op": case.op, **case.columns},
        us=times.graph * 1e6,
        again=times.again * 1e6,
        MB=case.nbytes / 1e6,
        GFLOP=case.flops / 1e9,
        **{
            "share of copy rate": case.nbytes / times.graph / found.copy,
            "share of product rate": case.flops / times.graph / peak if peak and case.flops else None,
            "from Python, us": times.python * 1e6,
            "copies of inputs": len(calls),
        },
    )
