"""What everything else is measured by: the memory, the matrix products, and what a launch costs."""

from __future__ import annotations

import time

import torch

from ..lab import Lab
from ..timing import captured, copy_rate, from_python, product_rate, synchronize, times_of

TABLE = "constants"
NODES = 200, 2000  # of two graphs, whose difference is what a node takes


def run(lab: Lab) -> None:
    device = lab.device
    lab.row(TABLE, {"what": "copy, read and written"}, value=copy_rate(device) / 1e12, unit="TB/s")
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        lab.row(TABLE, {"what": f"matrix product, {name}"}, value=product_rate(dtype, device) / 1e12, unit="TFLOP/s")
    number = torch.zeros(64, device=device)
    add = [lambda: number.add_(1)] * 100
    lab.row(
        TABLE, {"what": "a launch from Python, add_ of 64 numbers"}, value=from_python(add, device) * 1e6, unit="us"
    )
    if lab.rehearsal:
        nodes = {count: times_of([lambda: number.add_(1)] * 2, device).graph * count for count in NODES}
    else:
        nodes = {count: _replay(number, count) for count in NODES}
        with captured([lambda: number.add_(1)]) as (replay, _):
            seconds = from_python([replay] * 100, device)
        lab.row(TABLE, {"what": "a replay of one node, from Python"}, value=seconds * 1e6, unit="us")
    few, many = NODES
    lab.row(TABLE, {"what": "a node of a graph"}, value=(nodes[many] - nodes[few]) / (many - few) * 1e6, unit="us")
    lab.row(TABLE, {"what": "a number read by the host"}, value=_wait(number, device) * 1e6, unit="us")


def _replay(number: torch.Tensor, nodes: int) -> float:
    """Seconds of a graph of so many nodes, each of which waits for the one before it."""
    with captured([lambda: number.add_(1)] * nodes) as (replay, _):
        return min(_timed(replay) for _ in range(10))


def _timed(replay) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    replay()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) * 1e-3


def _wait(number: torch.Tensor, device: str, times: int = 50) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        number.add_(1)
        number[0].item()
    return (time.perf_counter() - started) / times
