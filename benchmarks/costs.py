"""The formula of ``benchmarks.roofline``: seconds of a pass and of an optimizer step from FLOPs, bytes and rates.

A part of a forward over n tokens takes max(FLOPs / rate, bytes / bandwidth) seconds, and there are four:

    layers     2 n W FLOPs with their W weights, which are streamed once
    attention  4 FLOPs for each pair of a query and a key and each number of a head; K/V of each row read once
    head       at m rows: 2 m hidden * vocab FLOPs; its weights, and m rows of logits written and read
    reuse      the hidden states of n tokens, layers + 1 times, copied to where they are kept

With F(n) = layers + attention, H(m) = head, and a host that needs h seconds to launch a training forward:

    pass    F(n) + H(m) + reuse + what its engine takes to launch it
    SFT     3 max(F + H, h) + optimizer, and with checkpointing max(F, h) more: a backward is two forwards
    BSS     all passes + H + max(F, h) + 2 max(F + H, h) + what is kept read twice + optimizer

An engine launches a pass as nodes of a CUDA graph, which take `NODE` seconds each however little they do, and by
launches from the host, which take `LAUNCH`; nothing hides them, as the next pass waits for this one. Where weights are
in fp32 under autocast, F and H of training forwards come with a cast of their weights. Passes read copies that are
written once a generation, or, with `casts`, cast in every pass.

The optimizer is traffic alone, and the same on all sides. Left out on all sides: elementwise operations and the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from selfgen.context.budget import budget_of

MICRO_BATCH = 8  # rows, as in bench_step


class Shape(NamedTuple):
    """A dense decoder with grouped K/V heads and a gated MLP. Norms and biases are too small to count."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # the head is the embedding

    @property
    def layer_weights(self) -> int:
        """Of all layers."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        return self.layer_weights + self.head_weights * (1 if self.tied else 2)


# config.json of each on the Hugging Face hub: HuggingFaceTB/, meta-llama/ and Qwen/ with these names.
SMOLLM2 = Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49152, True)
SHAPES = (
    Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256, True),
    Shape("Llama-3.2-3B", 28, 3072, 8192, 24, 8, 128, 128256, True),
    Shape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, False),
    Shape("Qwen2.5-14B", 48, 5120, 13824, 40, 8, 128, 152064, False),
    Shape("Qwen2.5-32B", 64, 5120, 27648, 40, 8, 128, 152064, False),
    Shape("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, 128256, False),
)


class Device(NamedTuple):
    """Rates that a formula may count on."""

    name: str
    flops: float  # a second, dense
    bandwidth: float  # bytes a second
    memory: float  # bytes

    def times(self, factor: float) -> Device:
        """As many of it, or the part of it that can be had."""
        return self._replace(flops=self.flops * factor, bandwidth=self.bandwidth * factor)


# bf16 on tensor cores without sparsity. NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and DGX B200 (an
# eighth of it); all but A100's print the rate with sparsity, which is twice this.
GPUS = (
    Device("A100", 312e12, 2.039e12, 80e9),
    Device("H100", 989e12, 3.35e12, 80e9),
    Device("H200", 989e12, 4.8e12, 141e9),
    Device("B200", 2250e12, 8.0e12, 180e9),
)


class Engine(NamedTuple):
    """How passes are launched."""

    name: str
    basis: str  # of its counts
    nodes: int  # of a layer in the graph
    other_nodes: int
    launches: int  # of a layer by the host
    other_launches: int

    def seconds(self, shape: Shape) -> float:
        """To launch a pass."""
        nodes, launches = self.nodes * shape.layers + self.other_nodes, self.launches * shape.layers
        return nodes * NODE + (launches + self.other_launches) * LAUNCH


NODE = 2.5e-6
"""Seconds of a small kernel in a CUDA graph: inferred from passes of 4.6 ms (benchmarks/results/gpu.md, H200)."""
LAUNCH = 20e-6
"""Seconds of a launch from Python: inferred from what a pass takes outside of its graph, 1.4 to 1.8 ms, and from passes
without graphs, 27 to 33 ms (the same)."""
ENGINES = (
    Engine("no launch costs", "a bound", 0, 0, 0, 0),
    Engine("one graph, 14 nodes a layer", "counted on a CPU", 14, 56, 0, 1),  # by tests, of Llama: states are kept
    Engine("graph of the model", "measured", 39, 20, 2, 20),  # planning, sampling, committing and copies outside
    Engine("no graph", "measured", 0, 0, 41, 40),
)
MEASURED, NO_GRAPH = ENGINES[-2:]


class Precision(NamedTuple):
    """Bytes."""

    width: int  # of a number
    state: int  # a parameter: weight, gradient, AdamW's state
    step: int  # a parameter: traffic of an optimizer step
    cast: int = 0  # a parameter: traffic of a cast from the dtype of weights


# The gradients' norm reads them; AdamW reads them, and reads and writes weights and two moments. In bf16 these three
# are in fp32, and weights are written in bf16, too.
BF16 = Precision(2, 2 + 2 + 3 * 4, 2 * 2 + 2 * 3 * 4 + 2)
FP32 = Precision(4, 4 * 4, 2 * 4 + 2 * 3 * 4)
AUTOCAST = Precision(2, 4 * 4, 2 * 4 + 2 * 3 * 4, cast=4 + 2)  # weights in fp32, products in bf16


class Pass(NamedTuple):
    """The work of one forward."""

    tokens: int
    sampled: int  # rows of the head
    keys: int  # K/V positions that are read, each row's once
    pairs: int  # of a query and a key that it sees


class Costs(NamedTuple):
    """How long the parts of a step take."""

    shape: Shape
    device: Device
    precision: Precision = BF16
    host: float = 0.0  # seconds a training forward
    launching: float = 0.0  # seconds a pass
    casts: bool = False  # weights in every pass; else once a generation

    def part(self, flops: float, numbers: float) -> float:
        return max(flops / self.device.flops, numbers * self.precision.width / self.device.bandwidth)

    def layers(self, work: Pass) -> float:
        """F: all layers, their attention included."""
        s = self.shape
        attention = s.layers * s.head_dim * self.part(4 * work.pairs * s.heads, 2 * work.keys * s.kv_heads)
        return self.part(2 * work.tokens * s.layer_weights, s.layer_weights) + attention

    def head(self, rows: int) -> float:
        """H."""
        weights = self.shape.head_weights
        return self.part(2 * rows * weights, weights + 2 * rows * self.shape.vocab) if rows else 0.0

    def kept(self, tokens: int) -> float:
        """Hidden states of ``tokens`` copied."""
        return self.part(0, 2 * tokens * (self.shape.layers + 1) * self.shape.hidden)

    def cast(self) -> float:
        """All weights of products."""
        return (self.shape.layer_weights + self.shape.head_weights) * self.precision.cast / self.device.bandwidth

    def a_pass(self, work: Pass, *, reuse: bool = True) -> float:
        computing = self.layers(work) + self.head(work.sampled) + reuse * self.kept(work.tokens)
        return computing + self.casts * self.cast() + self.launching

    def optimizer(self) -> float:
        return self.shape.parameters * self.precision.step / self.device.bandwidth

    def sft(self, batches: Sequence[Pass], *, checkpointing: bool) -> float:
        """Seconds of an SFT step over micro-batches."""
        forwards = sum(3 * max(self.layers(b) + self.head(b.sampled), self.host) + self.cast() for b in batches)
        recomputed = sum(max(self.layers(b), self.host) + self.cast() for b in batches)
        return forwards + checkpointing * recomputed + self.optimizer()

    def bss(self, batches: Sequence[Pass], passes: Sequence[Pass], *, generator: Costs | None = None) -> float:
        """Seconds of a BSS step over micro-batches. ``generator``: costs of the passes, where they are others."""
        generator = generator or self
        once = 0.0 if generator.casts else generator.cast()
        contexts = once + sum(generator.a_pass(work) for work in passes)
        reused = sum(self.head(b.sampled) + 2 * self.kept(b.tokens) for b in batches)  # forward reads, backward reads
        backward = sum(2 * max(self.layers(b) + self.head(b.sampled), self.host) for b in batches)
        recomputed = sum(max(self.layers(b), self.host) + self.cast() for b in batches)
        return contexts + reused + recomputed + backward + self.optimizer()

    def token_budget(self) -> int:
        """What ``measure_budget`` finds if a forward takes what it does here."""
        return budget_of(lambda n: self.a_pass(Pass(n, 1, n, n * (n + 1) // 2), reuse=False)).tokens


def micro_batches(lengths: Sequence[int], *, padded: bool = False) -> list[Pass]:
    """Training forwards over rows of these lengths, the head at every position."""
    groups = [list(lengths[i : i + MICRO_BATCH]) for i in range(0, len(lengths), MICRO_BATCH)]
    groups = [[max(group)] * len(group) for group in groups] if padded else groups
    return [Pass(sum(g), sum(g), sum(g), sum(n * (n + 1) // 2 for n in g)) for g in groups]
