"""The cutoffs of top_k, top_p and min_p without a sort of the logits: few are looked at, and the cutoff is exact.

A row is cut into runs of consecutive logits. One kernel finds the peak of each run, one the order of the peaks, in
which each program counts how many come before its own, and one, with a program per row, the cutoff:

top_k  The k largest peaks are k logits, so the k-th largest logit is not below the last of these peaks, and what is
       above that lies in runs with a higher peak.
top_p  What is above the peak of the first run left out lies in the runs taken. Runs are taken by falling peaks until
       what is not below that peak weighs enough: at first as many as weigh enough as a whole, then twice as many.
min_p  needs the largest peak only.

Where logits are nearly equal, all runs are taken, which is as exact, and slower. Within the runs taken the cutoff is
searched for among the bits of logits: these are compared as unsigned integers in the same order ("keys"), 16 bits of
bf16 and fp16, 32 of fp32. With a weight of 1 for each logit, the k-th largest is the largest key such that the weights
of the keys not below it add up to k; with probabilities for weights, the same search gives the cutoff of top_p. A sweep
tests three keys. A temperature keeps the order, so logits serve in place of z. Weights are integers, so no order of a
sum matters. A kernel reads what another kernel wrote, and never what another thread of its own wrote.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.triton.configuration import Configuration
from selfgen_kernels.backends.triton.elementary import OPTIONS, exp, finite_or_0, log_of_share, weights
from selfgen_kernels.backends.triton.noise import in_mask
from selfgen_kernels.backends.triton.rows import for_rows, fp32_of_row, fp64_of_row, int64_of_row
from selfgen_kernels.call import Sampling

RUN = 64  # logits; twice as many, and so on, where a row would have too many runs
MOST_RUNS = 4096  # of a row: a program holds as many in registers
SPAN = 8192  # logits whose peaks a program finds
BLOCK = 4096  # logits at a time, of the other kernels
STEP = 128  # runs that a program compares its own with at a time
WIDE_OPTIONS = OPTIONS | {"num_warps": 8}


@triton.jit
def key_of(logit):
    """uint32 in the order of the logits; NaN counts as +inf, -0 as 0."""
    BITS: tl.constexpr = logit.dtype.primitive_bitwidth
    SIGN: tl.constexpr = 1 << (BITS - 1)
    INF: tl.constexpr = 0x7F800000 if BITS == 32 else (0x7F80 if logit.dtype == tl.bfloat16 else 0x7C00)
    bits = logit.to(tl.uint32 if BITS == 32 else tl.uint16, bitcast=True).to(tl.uint32)
    bits = tl.where(logit == logit, bits, INF)
    return tl.where(bits > SIGN, 2 * SIGN - 1 - bits, (bits & (SIGN - 1)) + SIGN)


@triton.jit
def logit_of(key, DTYPE: tl.constexpr):
    """fp32: the logit with that key."""
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    SIGN: tl.constexpr = 1 << (BITS - 1)
    bits = tl.where(key >= SIGN, key - SIGN, 2 * SIGN - 1 - key)
    return bits.to(tl.uint32 if BITS == 32 else tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def logits_of_runs(logits, run, vocab_size, RUN: tl.constexpr):
    """[R, RUN]; -inf where there is none, and for runs past the end."""
    ids = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    return tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf"))


@triton.jit
def is_filtered(inv_temperature, thresholds, seed, sample_ids, positions, row):
    """Whether a row is a self row that is not greedy."""
    is_self = in_mask(seed, tl.load(sample_ids + row), tl.load(positions + row), int64_of_row(thresholds, row))
    return is_self & (inv_temperature != float("inf"))


@triton.jit(do_not_specialize=["inv_temperatures", "thresholds", "seed"])
def run_peaks_kernel(
    logits, row_stride, inv_temperatures, thresholds, seed, sample_ids, positions, peaks, vocab_size,
    RUN: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Program (row, part) writes the largest logits of RUNS runs, +inf for NaN, into peaks [N, runs]."""
    row = tl.program_id(0).to(tl.int64)
    if not is_filtered(fp32_of_row(inv_temperatures, row), thresholds, seed, sample_ids, positions, row):
        return
    run, runs = tl.program_id(1) * RUNS + tl.arange(0, RUNS), tl.cdiv(vocab_size, RUN)
    logit = logits_of_runs(logits + row * row_stride, run, vocab_size, RUN).to(tl.float32)
    peak = tl.max(tl.where(logit == logit, logit, float("inf")), 1)
    tl.store(peaks + row * runs + run, peak.to(peaks.dtype.element_ty), mask=run < runs)


@triton.jit(do_not_specialize=["inv_temperatures", "thresholds", "seed"])
def run_order_kernel(
    logits, row_stride, inv_temperatures, thresholds, seed, sample_ids, positions, peaks, order, masses, vocab_size,
    RUN: tl.constexpr, RUNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Program (row, part) writes RUNS runs to their places by falling peaks, into order int32 [N, runs].

    If there are masses int64 [N, runs], it writes the sums of their weights there, to the same places.
    """
    row = tl.program_id(0).to(tl.int64)
    inv_temperature = fp32_of_row(inv_temperatures, row)
    if not is_filtered(inv_temperature, thresholds, seed, sample_ids, positions, row):
        return
    run, runs = tl.program_id(1) * RUNS + tl.arange(0, RUNS), tl.cdiv(vocab_size, RUN)
    peaks += row * runs
    key = key_of(tl.load(peaks + run, mask=run < runs, other=float("-inf")))  # [RUNS]
    place = tl.zeros([RUNS], tl.int32)
    largest = tl.full([STEP], float("-inf"), tl.float32)
    for start in range(0, runs, STEP):
        other = start + tl.arange(0, STEP)
        peak = tl.load(peaks + other, mask=other < runs, other=float("-inf"))
        largest = tl.maximum(largest, peak.to(tl.float32))
        higher = key_of(peak)[None, :] > key[:, None]
        as_high = (key_of(peak)[None, :] == key[:, None]) & (other[None, :] < run[:, None])
        place += tl.sum((higher | as_high).to(tl.int32), 1)
    exists = run < runs
    tl.store(order + row * runs + place, run, mask=exists)
    if masses is not None:
        logit = logits_of_runs(logits + row * row_stride, run, vocab_size, RUN)
        weight = weights_of(logit, inv_temperature, tl.max(largest) * inv_temperature, float("-inf"))
        tl.store(masses + row * runs + place, tl.sum(weight, 1), mask=exists)


@triton.jit
def weights_of(logit, inv_temperature, largest, cutoff):
    """int64: `weights` of those whose z are not below `cutoff`; `largest` is the largest z."""
    z = logit.to(tl.float32) * inv_temperature
    return tl.where(z >= cutoff, weights(exp(z - finite_or_0(largest))), 0)


@triton.jit
def weights_not_below(
    logits, order, taken, key, step, vocab_size, inv_temperature, largest, cutoff,
    RUN: tl.constexpr, BLOCK: tl.constexpr, PROBS: tl.constexpr,
):  # fmt: skip
    """fp64: how much the logits of the first `taken` runs weigh whose keys are not below key, key + step, key + 2 step.

    PROBS: `weights_of` them; else how many they are.
    """
    WIDE: tl.constexpr = tl.int64 if PROBS else tl.int32
    RUNS: tl.constexpr = BLOCK // RUN
    sum0 = tl.zeros([RUNS], WIDE)
    sum1 = tl.zeros([RUNS], WIDE)
    sum2 = tl.zeros([RUNS], WIDE)
    for start in range(0, taken, RUNS):
        place = start + tl.arange(0, RUNS)
        run = tl.load(order + place, mask=place < taken, other=0)
        run = tl.where(place < taken, run, tl.cdiv(vocab_size, RUN))
        logit = logits_of_runs(logits, run, vocab_size, RUN)
        weight = weights_of(logit, inv_temperature, largest, cutoff) if PROBS else tl.full(logit.shape, 1, tl.int32)
        keys = key_of(logit)
        sum0 += tl.sum(tl.where(keys >= key, weight, 0), 1)
        sum1 += tl.sum(tl.where(keys >= key + step, weight, 0), 1)
        sum2 += tl.sum(tl.where(keys >= key + 2 * step, weight, 0), 1)
    return tl.sum(sum0).to(tl.float64), tl.sum(sum1).to(tl.float64), tl.sum(sum2).to(tl.float64)


@triton.jit
def largest_key(
    logits, order, taken, low, high, vocab_size, inv_temperature, largest, cutoff, needed,
    RUN: tl.constexpr, BLOCK: tl.constexpr, PROBS: tl.constexpr,
):  # fmt: skip
    """uint32: the largest of low .. high that `needed` is not below: the weight of all keys not below it. Or `low`."""
    while low < high:
        step = (high - low) // 4 + 1
        weight1, weight2, weight3 = weights_not_below(
            logits, order, taken, low + step, step, vocab_size, inv_temperature, largest, cutoff, RUN, BLOCK, PROBS
        )
        reached = (
            (weight1 >= needed).to(tl.uint32)
            + ((weight2 >= needed) & (low + 2 * step <= high)).to(tl.uint32)
            + ((weight3 >= needed) & (low + 3 * step <= high)).to(tl.uint32)
        )
        low += reached * step
        high = tl.minimum(high, low + step - 1)
    return tl.minimum(low, high)


@triton.jit
def raised(cutoff, bound):
    """The larger of both. NaN is no bound; Tritons differ in what a maximum makes of it."""
    return tl.where(bound > cutoff, bound, cutoff)


@triton.jit
def key_left_out(peaks, order, taken, runs):
    """uint32: the key of the largest peak of all runs but the first `taken`; 0 if there is none."""
    run = tl.load(order + taken, mask=taken < runs, other=0)
    return tl.where(taken < runs, key_of(tl.load(peaks + run)), 0)


@triton.jit(do_not_specialize=["inv_temperatures", "top_ks", "top_ps", "min_ps", "thresholds", "seed"])
def filter_cutoff_kernel(
    logits, row_stride, inv_temperatures, top_ks, top_ps, min_ps, thresholds, seed, sample_ids, positions,
    peaks, order, masses, cutoffs, vocab_size,
    RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row writes the smallest z that the filters keep, if it is a self row; RUNS holds all its runs."""
    row = tl.program_id(0).to(tl.int64)
    if not in_mask(seed, tl.load(sample_ids + row), tl.load(positions + row), int64_of_row(thresholds, row)):
        return
    inv_temperature = fp32_of_row(inv_temperatures, row)
    cutoff = float("-inf")
    if inv_temperature != float("inf"):
        DTYPE: tl.constexpr = logits.dtype.element_ty
        runs = tl.cdiv(vocab_size, RUN)
        logits += row * row_stride
        peaks += row * runs
        run = tl.arange(0, RUNS)
        peak = tl.load(peaks + run, mask=run < runs, other=float("-inf"))  # [RUNS]
        key = key_of(peak)
        best = tl.max(key)
        largest = logit_of(best, DTYPE) * inv_temperature
        if tl.abs(largest) < float("inf"):  # else the row is invalid
            low = best * 0
            taken = runs
            is_whole = runs > 0  # nothing was dropped
            if top_ks is not None:
                order += row * runs
                k = tl.maximum(int64_of_row(top_ks, row), 1)
                is_whole = k >= vocab_size
                if k <= runs:
                    low = key_of(tl.load(peaks + tl.load(order + k - 1)))
                    taken = tl.sum((key > low).to(tl.int32))
                low = largest_key(
                    logits, order, taken, low, best, vocab_size, inv_temperature, largest, cutoff,
                    tl.minimum(k, vocab_size).to(tl.float64), RUN, BLOCK, False,
                )  # fmt: skip
                cutoff = logit_of(low, DTYPE) * inv_temperature
                as_large = peak.to(tl.float32) * inv_temperature >= cutoff  # once it is scaled
                taken = tl.minimum(tl.sum(as_large.to(tl.int32)), runs)
            if top_ps is not None:
                if top_ks is None:
                    order += row * runs
                top_p = fp64_of_row(top_ps, row)
                if top_p < 1.0:
                    high = best
                    if not is_whole:
                        total, _, _ = weights_not_below(
                            logits, order, taken, best * 0, best * 0, vocab_size, inv_temperature, largest, cutoff,
                            RUN, BLOCK, True,
                        )  # fmt: skip
                        needed = top_p * total
                    else:
                        mass = tl.load(masses + row * runs + run, mask=run < runs, other=0)
                        needed = top_p * tl.sum(mass).to(tl.float64)
                        short = tl.cumsum(mass, 0).to(tl.float64) < needed
                        taken = tl.minimum(tl.sum(short.to(tl.int32)) + 1, runs)
                        high = key_of(tl.load(peaks + tl.load(order + taken - 1)))
                        taken = tl.minimum(tl.maximum(taken, BLOCK // RUN), runs)
                        low = key_left_out(peaks, order, taken, runs)
                        enough = False
                        while not enough:
                            weight, _, _ = weights_not_below(
                                logits, order, taken, low, low * 0, vocab_size, inv_temperature, largest, cutoff,
                                RUN, BLOCK, True,
                            )  # fmt: skip
                            enough = (weight >= needed) | (taken == runs)
                            if not enough:
                                taken = tl.minimum(2 * taken, runs)
                                low = key_left_out(peaks, order, taken, runs)
                    last = largest_key(
                        logits, order, taken, low, high, vocab_size, inv_temperature, largest, cutoff, needed,
                        RUN, BLOCK, True,
                    )  # fmt: skip
                    cutoff = raised(cutoff, logit_of(last, DTYPE) * inv_temperature)
            if min_ps is not None:
                by_min_p = largest + log_of_share(fp64_of_row(min_ps, row))
                cutoff = tl.where(by_min_p == by_min_p, raised(cutoff, by_min_p), float("-inf"))
    tl.store(cutoffs + row, cutoff)


def run_length(vocab_size: int) -> int:
    """Logits in a run."""
    return max(RUN, triton.next_power_of_2(triton.cdiv(vocab_size, MOST_RUNS)))


def filter_cutoff(logits: Tensor, how: Sampling) -> Tensor:
    """fp32 [N]: `scaling.filter_cutoff` of the self rows of logits [N, V]; any number of others."""
    rows, vocab_size = logits.shape
    cutoffs = logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return cutoffs
    run = run_length(vocab_size)
    runs = triton.cdiv(vocab_size, run)
    top_k, top_p, min_p = (for_rows(value) for value in (how.top_k, how.top_p, how.min_p))
    data, inverse = (logits, logits.stride(0)), for_rows(how.inv_temperature)
    keys = for_rows(how.threshold), how.seed, how.sample_ids.contiguous(), how.positions.contiguous()

    peaks, order, masses = logits.new_empty(rows, runs), None, None
    many = max(1, SPAN // run)
    run_peaks_kernel[(rows, triton.cdiv(runs, many))](
        *data, inverse, *keys, peaks, vocab_size, RUN=run, RUNS=many, **OPTIONS
    )
    if top_k is not None or top_p is not None:
        order = torch.empty_like(peaks, dtype=torch.int32)
        masses = None if top_p is None else torch.empty_like(peaks, dtype=torch.int64)
        some = max(1, BLOCK // run)
        run_order_kernel[(rows, triton.cdiv(runs, some))](
            *data, inverse, *keys, peaks, order, masses, vocab_size, RUN=run, RUNS=some, STEP=STEP, **WIDE_OPTIONS
        )
    filter_cutoff_kernel[(rows,)](
        *data, inverse, top_k, top_p, min_p, *keys, peaks, order, masses, cutoffs, vocab_size,
        RUN=run, RUNS=triton.next_power_of_2(runs), BLOCK=max(BLOCK, run), **WIDE_OPTIONS,
    )  # fmt: skip
    return cutoffs


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`."""
    types = {"row_stride": "i64", "seed": "i64", "sample_ids": "*i64", "positions": "*i64", "vocab_size": "i32"}
    tensors = {"inv_temperatures": "*fp32", "thresholds": "*i64"}
    tensors |= {"top_ks": "*i64", "top_ps": "*fp64", "min_ps": "*fp64"}
    numbers = dict.fromkeys(tensors, "i64")
    filters = "top_ks", "top_ps", "min_ps"
    aligned, sizes = ("row_stride", "vocab_size"), {"RUN": RUN, "RUNS": BLOCK // RUN}
    ships = []
    for dtype in ("fp32", "bf16", "fp16"):
        for of_kind, kind in (("", tensors), (", numbers", numbers)):
            rows = {name: kind[name] for name in ("inv_temperatures", "thresholds")}
            inputs = types | rows | {"logits": f"*{dtype}", "peaks": f"*{dtype}"}
            ships.append(
                Configuration(
                    f"run_peaks[{dtype}{of_kind}]", run_peaks_kernel, inputs, {"RUN": RUN, "RUNS": SPAN // RUN},
                    OPTIONS, aligned, streams=True,
                )
            )  # fmt: skip
            for label, masses, absent in ((dtype, {}, {"masses": None}), (f"{dtype}, top_ps", {"masses": "*i64"}, {})):
                ships.append(
                    Configuration(
                        f"run_order[{label}{of_kind}]", run_order_kernel, inputs | {"order": "*i32"} | masses,
                        absent | sizes | {"STEP": STEP}, WIDE_OPTIONS, aligned,
                    )
                )  # fmt: skip
            for label, present in [(name, [name]) for name in filters] + [("all", list(filters))]:
                given = {name: kind[name] for name in present}
                given |= {"order": "*i32"} if label != "min_ps" else {}
                given |= {"masses": "*i64"} if "top_ps" in present else {}
                absent = dict.fromkeys(name for name in (*filters, "order", "masses") if name not in given)
                ships.append(
                    Configuration(
                        f"filter_cutoff[{dtype}, {label}{of_kind}]", filter_cutoff_kernel,
                        inputs | given | {"cutoffs": "*fp32"},
                        absent | {"RUN": RUN, "RUNS": MOST_RUNS, "BLOCK": BLOCK}, WIDE_OPTIONS, aligned,
                    )
                )  # fmt: skip
    return ships
