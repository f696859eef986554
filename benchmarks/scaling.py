"""A model, not a measurement: what a step costs where weights are sharded over many GPUs that are not here.

    python -m benchmarks.scaling [--achievable 0.6] [--json FILE]

Work is as in ``roofline``: 32 rows per GPU (or per group of tensor-parallel GPUs) in micro-batches of 8, p = 0.25,
passes as counted on SmolLM2. This adds what is communicated. FSDP2 gathers a model in G groups (each layer, the
embedding, norm and head), of which K are kept after a forward (norm and head); a step has A micro-batches and P passes:

    SFT         A (2 G - K) gathers, G reduce-scatters
    gathered    G gathers, before the passes, of weights that stay whole until the optimizer's step; as many
                reduce-scatters
    low memory  those of SFT, and the passes': P (G - K) gathers, and P + 1 all-reduces of a number

`tests/test_fsdp_steps.py` and `tests/test_lockstep.py` compare these with what two processes do. A gather of b bytes
over n GPUs takes

    (n - 1) hops + (n - 1) / n b / bandwidth

seconds, as a ring; so does a reduce-scatter. The bandwidth is that of NVLink within a node, and of all network cards of
a node between nodes, times `--achievable`. In training, computing hides communicating, or the other way round: a step
takes the longer of both. So does a pass in low memory. The gather before the passes is hidden by nothing. Tensor
parallelism over T GPUs of a node has 2 (T - 1) hops + 2 (T - 1) / T b / bandwidth for each all-reduce of
b = 2 n hidden bytes, two in a layer's forward and two in its backward, hidden by nothing. Replicas (HSDP) all-reduce
their gradients between nodes. Gradients are reduced in fp32. Memory is that of weights, gradients and AdamW's state,
and of gathered weights in bf16; activations and K/V come on top. Rows per second are those of all GPUs together: splits
that give a step different numbers of rows are compared by them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .costs import BF16, GPUS, SHAPES, Costs, Pass, Shape, micro_batches
from .roofline import PASSES, ROWS, nearest_run, table

H100 = next(gpu for gpu in GPUS if gpu.name == "H100")
PER_NODE = 8
# NVIDIA's data sheets of H100 SXM (NVLink: 900 GB/s, half of it in each direction) and of DGX H100 (eight ConnectX-7 of
# 400 Gb/s). The latencies are assumptions.
NVLINK, NETWORK = 450e9, PER_NODE * 50e9
HOP_IN_NODE, HOP_BETWEEN = 1e-6, 5e-6
SELF_PROB = 0.25
HOST = 100e-6  # seconds a layer and pass, an assumption: between eager passes and CUDA graphs
KEPT = 1
How = Literal["gathered", "sharded"]


class Collectives(NamedTuple):
    """Of one process in one optimizer step."""

    gathers: int
    reduce_scatters: int
    all_reduces: int


def collectives(
    groups: int, micro_batches: int, *, kept: int = KEPT, passes: int = 0, how: How = "gathered"
) -> Collectives:
    """What FSDP2 does in a step: of SFT without ``passes``, of BSS with them."""
    training = micro_batches * (2 * groups - kept)
    if not passes:
        return Collectives(training, groups, 0)
    if how == "gathered":
        return Collectives(groups, groups, 0)
    return Collectives(training + passes * (groups - kept), groups, passes + 1)


class Layout(NamedTuple):
    """How GPUs share the weights: ``tensor`` of a node split each layer, ``shards`` of these hold its parts.

    ``replicas`` groups hold the same.
    """

    shards: int
    tensor: int = 1
    replicas: int = 1

    def ring(self, size: float, achievable: float) -> float:
        """Seconds of a gather or reduce-scatter that ends in ``size`` bytes."""
        n = self.shards
        nodes = math.ceil(n * self.tensor / PER_NODE)
        between, within = (nodes, max(0, n - nodes)) if nodes > 1 else (0, n - 1)
        bandwidth = (NETWORK / self.tensor if nodes > 1 else NVLINK) * achievable
        return between * HOP_BETWEEN + within * HOP_IN_NODE + (n - 1) / n * size / bandwidth

    def among_replicas(self, size: float, achievable: float) -> float:
        """Seconds of all-reducing ``size`` bytes per GPU between nodes, all GPUs of a node at once."""
        r = self.replicas
        return 2 * (r - 1) * HOP_BETWEEN + 2 * (r - 1) / r * size / (NETWORK / PER_NODE * achievable)

    def all_reduce(self, size: float, achievable: float) -> float:
        """Seconds of one of tensor parallelism, within a node."""
        t = self.tensor
        return 2 * (t - 1) * HOP_IN_NODE + 2 * (t - 1) / t * size / (NVLINK * achievable)


class Step(NamedTuple):
    """Seconds of a step, and bytes on a GPU."""

    sft: float
    gathered: float
    sharded: float
    state: float
    copy: float  # gathered weights


def step(shape: Shape, layout: Layout, measured: dict[str, Any], achievable: float) -> Step:
    host = HOST * shape.layers
    costs = Costs(shape, H100.times(achievable * layout.tensor), BF16, host, launching=host)
    batches = micro_batches(measured["lengths"])
    run = nearest_run(measured, SELF_PROB, costs.token_budget())
    passes = [Pass(*work) for work in run["passes"]]
    weights = shape.parameters / layout.tensor
    groups = shape.layers + (1 if shape.tied else 2)
    group = weights / groups

    def gathers(count: int) -> float:
        return count * layout.ring(BF16.width * group, achievable) if layout.shards > 1 else 0.0

    def tensor(work: Sequence[Pass], in_layer: int) -> float:
        if layout.tensor == 1:
            return 0.0
        sizes = [BF16.width * one.tokens * shape.hidden for one in work]
        return sum(in_layer * shape.layers * layout.all_reduce(size, achievable) for size in sizes)

    optimizer = costs.optimizer() / layout.shards
    training = collectives(groups, len(batches))
    reduced = 2 * gathers(training.reduce_scatters)  # of twice the bytes
    reduced += layout.among_replicas(4 * weights / layout.shards, achievable)
    whole = costs.sft(batches, checkpointing=True) - costs.optimizer() + tensor(batches, 6)
    sft = max(whole, gathers(training.gathers) + reduced) + optimizer
    in_passes = [costs.a_pass(work) + tensor([work], 2) for work in passes]
    rest = costs.bss(batches, []) - costs.optimizer() + tensor(batches, 4)
    gathered = gathers(groups) + sum(in_passes) + max(rest, reduced) + optimizer
    agreed = 2 * layout.ring(8, achievable) if layout.shards > 1 else 0.0
    in_step = sum(max(one, gathers(groups - KEPT)) + agreed for one in in_passes)
    sharded = in_step + max(rest, gathers(training.gathers) + reduced) + optimizer
    copy = BF16.width * weights if layout.shards > 1 else 0.0
    return Step(sft, gathered, sharded, BF16.state * weights / layout.shards, copy)


LAYOUTS = {
    8: (Layout(8), Layout(1, 8)),
    64: (Layout(8, 1, 8), Layout(64), Layout(8, 8)),
    512: (Layout(8, 1, 64), Layout(512), Layout(64, 8)),
}


def rows_of(measured: dict[str, Any], achievable: float) -> list[dict[str, Any]]:
    rows = []
    for gpus, layouts in LAYOUTS.items():
        for name in ("Llama-3.1-8B", "Llama-3.1-70B"):
            shape = next(one for one in SHAPES if one.name == name)
            for layout in layouts:
                found = step(shape, layout, measured, achievable)
                names = {"replicas": layout.replicas, "FSDP2": layout.shards, "TP": layout.tensor}
                memory = found.state, found.state + found.copy

                count = ROWS * layout.shards * layout.replicas

                def per_second(seconds: float, needed: float, count: int = count) -> str:
                    return f"{count / seconds:.0f}" if needed <= H100.memory else "does not fit"

                rows.append(
                    {
                        "GPUs": gpus,
                        "model": name,
                        "split": " x ".join(f"{kind} {size}" for kind, size in names.items() if size > 1),
                        "rows per step": count,
                        "GB sharded": round(memory[0] / 1e9, 1),
                        "GB gathered": round(memory[1] / 1e9, 1),
                        "SFT, rows/s": per_second(found.sft, memory[0]),
                        "gathered, rows/s": per_second(found.gathered, memory[1]),
                        "low memory, rows/s": per_second(found.sharded, memory[0]),
                    }
                )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--achievable", type=float, default=0.6, help="share of data sheets' rates that is reached")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    args = parser.parse_args(argv)
    rows = rows_of(json.loads(PASSES.read_text()), args.achievable)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
