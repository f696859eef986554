"""A roofline from machine code: the time that bytes, FLOPs and instructions allow the ops of selfgen_kernels on a chip.

It is a bound, not a measurement. Of each kernel that an op launches, the largest of three times counts:

    memory       bytes that have to be read and written once / COPY of the data sheet's bandwidth
    tensor cores FLOPs of the tiles, with the rows that pad them / PRODUCTS of the data sheet's rate
    issue        warp instructions / what the schedulers that have a warp issue, one a cycle each

Instructions are those outside of streaming loops, once per warp, and those in them per round; both sides of a branch
count, and other loops count once. What it can't see: latency (of few programs, of dependent loads, of barriers), cache
misses and hits, bank conflicts, clocks below the boost clock, and launches (a node of a CUDA graph costs 2 to 3 us).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .aot import Report

COPY = 0.9  # of the bandwidth that a copy reaches: an H200's, measured (4.3 TB/s); assumed of the others
PRODUCTS = 0.8  # of the rate that large products reach: the same


class Rates(NamedTuple):
    """Of a chip, by its data sheet."""

    target: str
    multiprocessors: int
    clock: float  # Hz, boost
    tensor: float  # FLOP/s, bf16 with fp32 sums, dense
    bandwidth: float  # bytes/s
    cycles: int = 1  # between two instructions of a scheduler; each multiprocessor has 4


# NVIDIA's data sheets of A100 80GB SXM, A10, L40S, H100 SXM, H200 SXM and HGX B200; the architecture white papers of
# Ada (RTX 4090) and Blackwell (RTX 5090), and of A100 and H100 for clocks; B200's multiprocessors and clock as its
# driver tells them. AMD's data sheet of MI300X; a SIMD of CDNA 3 takes 4 cycles for 64 lanes (its ISA guide).
CHIPS = {
    "A100": Rates("sm_80", 108, 1.41e9, 312e12, 2.039e12),
    "A10": Rates("sm_86", 72, 1.695e9, 125e12, 0.6e12),
    "L40S": Rates("sm_89", 142, 2.52e9, 362e12, 0.864e12),
    "RTX 4090": Rates("sm_89", 128, 2.52e9, 165.2e12, 1.008e12),
    "H100": Rates("sm_90", 132, 1.83e9, 989.4e12, 3.35e12),
    "H200": Rates("sm_90", 132, 1.83e9, 989.4e12, 4.8e12),
    "B200": Rates("sm_100", 148, 1.965e9, 2250e12, 8e12),
    "RTX 5090": Rates("sm_120", 170, 2.407e9, 209.5e12, 1.792e12),
    "MI300X": Rates("gfx942", 304, 2.1e9, 1307.4e12, 5.3e12, cycles=4),
}


class Launch(NamedTuple):
    """A kernel of an op."""

    kernel: str  # the name of its configuration
    programs: int
    elements: tuple[int, ...]  # that all programs load in each streaming loop; one number is the sum over all loops
    nbytes: int  # that memory gives and takes at least
    flops: int = 0  # of tensor cores


Found = Mapping[str, Mapping[str, int]]  # constants by the name of a configuration
Op = Callable[[Found], Iterator[Launch]]


def slots(launch: Launch, report: Report) -> float:
    """Instructions that all warps of a launch issue."""
    rounds = report.slots
    outside = report.size - sum(count for count, _ in report.streams)
    each = launch.elements if len(launch.elements) == len(rounds) else (sum(launch.elements),)
    per_element = rounds if len(each) == len(rounds) else (max(rounds, default=0.0),)
    inside = sum(count * elements for count, elements in zip(per_element, each, strict=True))
    return launch.programs * report.num_warps * outside + inside


def seconds(launch: Launch, report: Report, chip: Rates) -> dict[str, float]:
    """By resource."""
    schedulers = min(4 * chip.multiprocessors, launch.programs * min(4, report.num_warps))
    return {
        "memory": launch.nbytes / (COPY * chip.bandwidth),
        "tensor cores": launch.flops / (PRODUCTS * chip.tensor),
        "issue": slots(launch, report) * chip.cycles / (schedulers * chip.clock),
    }


# ---- What ops launch -------------------------------------------------------------------------------------------------


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def sample_mix(rows: int, vocab: int) -> Op:
    def launches(found: Found) -> Iterator[Launch]:
        group = "sample_mix[bf16]" if "sample_mix[bf16]" in found else "best_group[bf16]"
        spans = ceil_div(vocab, found[group]["SPAN"] * 64)
        yield Launch(group, rows * spans, (rows * vocab,), 2 * rows * vocab)
        if group == "best_group[bf16]":  # older kernels, in two launches
            yield Launch("pick_token[bf16]", rows, (0,), 8 * rows * spans + 128 * rows)

    return launches


def filter_cutoff(rows: int, vocab: int) -> Op:
    """top-k and top-p by sweeps: two bits of a cutoff each, and two more for the largest and for the sum.

    By the peaks of runs: what is looked at within them depends on the logits, and isn't counted.
    """

    def launches(found: Found) -> Iterator[Launch]:
        sweep = rows * vocab
        if "run_peaks[bf16]" in found:
            run = found["run_peaks[bf16]"]
            runs = ceil_div(vocab, run["RUN"])
            yield Launch("run_peaks[bf16]", rows * ceil_div(runs, run["RUNS"]), (sweep,), 2 * sweep)
            yield Launch(
                "run_order[bf16, top_ps]", rows * ceil_div(runs, found["run_order[bf16, top_ps]"]["RUNS"]), (0,), 0
            )
            yield Launch("filter_cutoff[bf16, all]", rows, (0,), 16 * rows * runs)
            return
        yield Launch("filter_cutoff[bf16, all]", rows, (8 * sweep, sweep, sweep, 8 * sweep), 2 * sweep)

    return launches


def reference_log_prob(rows: int, vocab: int) -> Op:
    def launches(found: Found) -> Iterator[Launch]:
        spans = ceil_div(vocab, found["mass[bf16]"]["SPAN"] * 64)
        yield Launch("mass[bf16]", rows * spans, (rows * vocab,), 2 * rows * vocab)
        yield Launch("log_prob[bf16]", rows, (0,), 8 * rows * ceil_div(vocab, 64))

    return launches


def head(tile: str, reduction: str, rows: int, hidden: int, vocab: int) -> Op:
    """Of many rows, torch multiplies: bytes and FLOPs of that count as the span kernel's, its instructions do not."""

    def launches(found: Found) -> Iterator[Launch]:
        span = "score_span[bf16]" if tile == "score_tile" else "span_mass[bf16]"
        if rows > 64 and span in found:
            spans = ceil_div(ceil_div(vocab, 64), found[span]["GROUPS"])
            yield Launch("select_rows", 1, (0,), 32 * rows)
            yield Launch("gumbel_noise[tokens]", rows, (0,), 4 * 64 * rows)
            moved = 2 * hidden * (vocab + rows) + 4 * rows * vocab + 20 * rows * spans
            yield Launch(span, rows * spans, (rows * vocab,), moved, 2 * rows * vocab * hidden)
            yield Launch(reduction, rows, (0,), 20 * rows * spans)
            return
        name = f"{tile}[bf16, {'few' if rows <= 64 else 'many'} rows]"
        height, width = found[name]["BLOCK_M"], found[name]["BLOCK_N"]
        tiles, row_tiles = ceil_div(vocab, width), ceil_div(rows, height)
        read = 2 * hidden * (vocab + rows)
        results = 20 * tiles * rows if tile == "score_tile" else 8 * rows * ceil_div(vocab, 64)
        yield Launch("select_rows", 1, (0,), 32 * rows)
        if tile == "score_tile":
            yield Launch("gumbel_noise[tokens]", rows, (0,), 4 * 64 * rows)
        yield Launch(
            name, tiles * row_tiles, (tiles * row_tiles * (height + width) * hidden,), read + results,
            2 * tiles * width * row_tiles * height * hidden,
        )  # fmt: skip
        yield Launch(reduction, ceil_div(rows, found[reduction].get("SLOTS", 1)), (0,), results)

    return launches


def attention(chunks: int, queries: int, keys: int) -> Op:
    """32 heads, 8 of K/V, of 128 numbers; each of `chunks` rows has `queries`, which see all `keys`."""

    def launches(found: Found) -> Iterator[Launch]:
        name = "ragged_attention bf16 128"
        height = found[name]["ROWS"]
        programs = chunks * 8 * ceil_div(4 * queries, height)
        kv = 2 * keys * 128
        careful = 0  # the second loop, for K/V that are not finite
        flops = 4 * programs * height * keys * 128
        segments = ceil_div(keys, found[name].get("SEGMENT", keys))  # of few long rows, each has a program
        nbytes, sums = 2 * chunks * (8 * kv + 64 * queries * 128), 4 * segments * chunks * queries * 32 * 130
        if segments == 1:
            yield Launch(name, programs, (programs * kv, careful), nbytes, flops)
            return
        yield Launch(name, programs * segments, (programs * kv, careful), nbytes + sums, flops)
        yield Launch("merge bf16 80", programs * 2, (sums // 4,), sums)

    return launches


def kv_append(tokens: int) -> Op:
    def launches(found: Found) -> Iterator[Launch]:
        name, width = "kv_append bf16 128", 8 * 128
        tile = found[name]
        programs = ceil_div(tokens, tile["TOKENS"]) * ceil_div(width, tile["BLOCK"])
        yield Launch(name, programs, (2 * tokens * width,), 8 * tokens * width)

    return launches


QWEN3 = 4096, 151_936  # Qwen3-8B: hidden size, vocabulary
OPS: dict[tuple[str, str], Op] = {
    ("sample_mix", "8 x 151,936"): sample_mix(8, QWEN3[1]),
    ("sample_mix", "64 x 151,936"): sample_mix(64, QWEN3[1]),
    ("filters of sample_mix", "64 x 151,936"): filter_cutoff(64, QWEN3[1]),
    ("reference_log_prob", "64 x 151,936"): reference_log_prob(64, QWEN3[1]),
    **{
        ("linear_sample_mix", f"{rows} x 4096 x 151,936"): head("score_tile", "pick_tokens", rows, *QWEN3)
        for rows in (1, 64, 256)
    },
    ("linear_reference_log_prob", "64 x 4096 x 151,936"): head("tile_mass", "head_log_prob", 64, *QWEN3),
    ("ragged_attention", "4 x 1 query, 1,024 keys"): attention(4, 1, 1024),
    ("ragged_attention", "4 x 1 query, 4,096 keys"): attention(4, 1, 4096),
    ("ragged_attention", "8 x 64 queries, 200 keys"): attention(8, 64, 200),
    ("kv_append", "2,048 tokens"): kv_append(2048),
}
"""By op and size: what is launched in bf16 without features. An op with kernels of other names is left out."""


# ---- The table -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """An op at a size on a chip. Seconds are the sums over its kernels."""

    launches: int
    nbytes: int
    flops: int
    slots: float
    seconds: dict[str, float]  # by resource
    time: float
    bound: str  # the resource that the longest of its kernels waits for


def row(op: Op, reports: Mapping[str, Report], chip: Rates) -> Row | None:
    """None where a kernel is not among the `reports` of the chip's target."""
    try:
        launches = list(op({name: report.constants for name, report in reports.items()}))
        by_launch = [(launch, seconds(launch, reports[launch.kernel], chip)) for launch in launches]
    except KeyError:
        return None
    _, bound = max((time, resource) for _, times in by_launch for resource, time in times.items())
    return Row(
        len(launches),
        sum(launch.nbytes for launch in launches),
        sum(launch.flops for launch in launches),
        sum(slots(launch, reports[launch.kernel]) for launch in launches),
        {name: sum(times[name] for _, times in by_launch) for name in ("memory", "tensor cores", "issue")},
        sum(max(times.values()) for _, times in by_launch),
        bound,
    )


def kernels_of(reports: Iterable[Report], target: str) -> dict[str, Report]:
    return {report.name: report for report in reports if report.target == target}


def table(reports: list[Report], before: list[Report]) -> list[list[str]]:
    """Cells, the head first; `before` are the reports of other code, whose times stand beside these."""
    head = ["chip", "op", "size", "MB", "GFLOP", "M slots", "memory", "tensor", "issue", "launches", "us", "bound by"]
    lines = [head + (["before: launches", "us", "bound by"] if before else [])]
    for name, chip in CHIPS.items():
        now, then = (kernels_of(some, chip.target) for some in (reports, before))
        for (op, size), launches in OPS.items():
            found, old = row(launches, now, chip), row(launches, then, chip)
            if found is None and old is None:
                continue
            cells = [""] * 9 if found is None else [
                f"{found.nbytes / 1e6:.1f}", f"{found.flops / 1e9:.1f}", f"{found.slots / 1e6:.1f}",
                *(f"{1e6 * found.seconds[resource]:.1f}" for resource in found.seconds), *summary(found),
            ]  # fmt: skip
            lines.append([name, op, size, *cells, *(summary(old) if before else [])])
    return lines


def summary(found: Row | None) -> list[str]:
    return ["", "", ""] if found is None else [str(found.launches), f"{1e6 * found.time:.1f}", found.bound]
