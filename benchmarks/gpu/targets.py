"""What is run under NVIDIA's tools: a few calls, without any clock. A profiler sees the second one of each.

python -m benchmarks.gpu.targets head|ops [--fake]
"""

from __future__ import annotations

import sys

import torch

from .ops import Case, cases, head_cases


def calls(what: str, *, rehearsal: bool) -> list[Case]:
    """``head``: the fused head at 64 rows of its largest shape. ``ops``: one small call of every op."""
    device = "cpu" if rehearsal else "cuda"
    if what == "ops":
        return list(cases(device, rehearsal=True))
    rows = 2 if rehearsal else 64
    found = (case for case in head_cases(device, rehearsal=rehearsal) if case.columns["rows"] == rows)
    return [case for case, _ in zip(found, range(3), strict=False)]  # fused, product, product and sampler


def main(argv: list[str]) -> None:
    rehearsal = "--fake" in argv
    with torch.no_grad():
        for case in calls(argv[0], rehearsal=rehearsal):
            call = case.make()
            call()  # compiles
            if not rehearsal:
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            call()
            if not rehearsal:
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            print("called", case.op, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
