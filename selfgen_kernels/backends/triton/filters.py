"""The cutoffs of top_k, top_p and min_p without a sort: one program searches a row for the bits of its threshold.

Logits are compared as unsigned integers in the same order ("keys"), 16 bits of bf16 and fp16, 32 of fp32. With a weight
of 1 for each logit, the k-th largest is the largest key such that the weights of the keys not below it add up to k;
with probabilities for weights, the same search gives the cutoff of top_p. It finds two bits at a time, from the
highest: a sweep over the row tests the three continuations of the bits known so far. A temperature keeps the order, so
logits serve in place of z. Weights are integers, so no order of a sum matters.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.triton.configuration import Configuration, current_target
from selfgen_kernels.backends.triton.elementary import OPTIONS, exp, finite_or_0, log_of_share, weights
from selfgen_kernels.backends.triton.noise import in_mask
from selfgen_kernels.call import Sampling

BLOCK = 2048  # logits at a time


def launch_options(target: str) -> dict:
    """256 threads of 8 logits each: 128 bits of bf16 and fp16. Half as many where that many spill."""
    few = "gfx942", "sm_86", "sm_89", "sm_90"  # the first as it has wavefronts of 64 lanes
    return {**OPTIONS, "num_warps": 4 if target in few else 8}


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
def load_weights(logits, start, vocab_size, inv_temperature, largest, cutoff, BLOCK: tl.constexpr, PROBS: tl.constexpr):
    """Keys [BLOCK] and their weights: int32 1, or int64 `weights` of those whose z are not below `cutoff`."""
    ids = start + tl.arange(0, BLOCK)
    logit = tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf"))
    key = key_of(logit)
    if PROBS:
        z = logit.to(tl.float32) * inv_temperature
        weight = tl.where(z >= cutoff, weights(exp(z - finite_or_0(largest))), 0)
    else:
        weight = tl.full([BLOCK], 1, tl.int32)
    return key, weight


@triton.jit
def largest_key(logits, vocab_size, inv_temperature, largest, cutoff, needed, BLOCK: tl.constexpr, PROBS: tl.constexpr):
    """uint32: the largest key such that the weights of all keys not below it come to what is `needed`, fp64."""
    BITS: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth
    WIDE: tl.constexpr = tl.int64 if PROBS else tl.int32
    found = tl.full([], 0, tl.uint32)
    for digit in range(1, BITS // 2 + 1):
        step = (found * 0 + 1) << (BITS - 2 * digit)
        weight1 = tl.zeros([BLOCK], WIDE)  # of each lane
        weight2 = tl.zeros([BLOCK], WIDE)
        weight3 = tl.zeros([BLOCK], WIDE)
        for start in range(0, vocab_size, BLOCK):
            key, weight = load_weights(logits, start, vocab_size, inv_temperature, largest, cutoff, BLOCK, PROBS)
            weight1 += tl.where(key >= found + step, weight, 0)
            weight2 += tl.where(key >= found + 2 * step, weight, 0)
            weight3 += tl.where(key >= found + 3 * step, weight, 0)
        reached = (
            (tl.sum(weight1).to(tl.float64) >= needed).to(tl.uint32)
            + (tl.sum(weight2).to(tl.float64) >= needed).to(tl.uint32)
            + (tl.sum(weight3).to(tl.float64) >= needed).to(tl.uint32)
        )
        found += reached * step
    return found


@triton.jit
def raised(cutoff, bound):
    """The larger of both. NaN is no bound; Tritons differ in what a maximum makes of it."""
    return tl.where(bound > cutoff, bound, cutoff)


@triton.jit(do_not_specialize=["seed"])
def filter_cutoff_kernel(
    logits, row_stride, inv_temperatures, top_ks, top_ps, min_ps, thresholds, seed, sample_ids, positions,
    cutoffs, vocab_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row writes the smallest z that the filters keep, if it is a self row."""
    row = tl.program_id(0).to(tl.int64)
    if not in_mask(seed, tl.load(sample_ids + row), tl.load(positions + row), tl.load(thresholds + row)):
        return
    inv_temperature = tl.load(inv_temperatures + row)
    cutoff = float("-inf")
    if inv_temperature != float("inf"):
        DTYPE: tl.constexpr = logits.dtype.element_ty
        logits += row * row_stride
        if top_ks is not None:
            k = tl.maximum(tl.minimum(tl.load(top_ks + row), vocab_size), 1).to(tl.float64)
            kth = largest_key(logits, vocab_size, inv_temperature, 0.0, cutoff, k, BLOCK, False)
            cutoff = logit_of(kth, DTYPE) * inv_temperature
        if (top_ps is not None) | (min_ps is not None):
            keys = tl.full([BLOCK], 0, tl.uint32)
            for start in range(0, vocab_size, BLOCK):
                key, _ = load_weights(logits, start, vocab_size, inv_temperature, 0.0, cutoff, BLOCK, False)
                keys = tl.maximum(keys, key)
            best = tl.max(keys)
            largest = logit_of(best, DTYPE) * inv_temperature
            if top_ps is not None:
                top_p = tl.load(top_ps + row)
                if top_p < 1.0:
                    sums = tl.zeros([BLOCK], tl.int64)
                    for start in range(0, vocab_size, BLOCK):
                        _, weight = load_weights(
                            logits, start, vocab_size, inv_temperature, largest, cutoff, BLOCK, True
                        )
                        sums += weight
                    needed = top_p * tl.sum(sums).to(tl.float64)
                    last = largest_key(logits, vocab_size, inv_temperature, largest, cutoff, needed, BLOCK, True)
                    cutoff = raised(cutoff, logit_of(tl.minimum(last, best), DTYPE) * inv_temperature)
            if min_ps is not None:
                by_min_p = largest + log_of_share(tl.load(min_ps + row))
                cutoff = tl.where(by_min_p == by_min_p, raised(cutoff, by_min_p), float("-inf"))
    tl.store(cutoffs + row, cutoff)


def filter_cutoff(logits: Tensor, how: Sampling) -> Tensor:
    """fp32 [N]: `scaling.filter_cutoff` of the self rows of logits [N, V]; any number of others."""
    cutoffs = logits.new_empty(len(logits), dtype=torch.float32)
    top_k, top_p, min_p = (None if value is None else value.contiguous() for value in (how.top_k, how.top_p, how.min_p))
    if len(logits):
        filter_cutoff_kernel[(len(logits),)](
            logits,
            logits.stride(0),
            how.inv_temperature.contiguous(),
            top_k,
            top_p,
            min_p,
            how.threshold.contiguous(),
            how.seed,
            how.sample_ids.contiguous(),
            how.positions.contiguous(),
            cutoffs,
            logits.shape[1],
            BLOCK=BLOCK,
            **launch_options(current_target()),
        )
    return cutoffs


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`."""
    types = {
        "row_stride": "i64", "inv_temperatures": "*fp32", "thresholds": "*i64", "seed": "i64", "sample_ids": "*i64",
        "positions": "*i64", "cutoffs": "*fp32", "vocab_size": "i32",
    }  # fmt: skip
    filters = {"top_ks": "*i64", "top_ps": "*fp64", "min_ps": "*fp64"}
    aligned = "row_stride", "vocab_size"
    ships = []
    for dtype in ("fp32", "bf16", "fp16"):
        for name, present in [(name, [name]) for name in filters] + [("all", list(filters))]:
            ships.append(
                Configuration(
                    f"filter_cutoff[{dtype}, {name}]", filter_cutoff_kernel,
                    types | {"logits": f"*{dtype}"} | {name: filters[name] for name in present},
                    {name: None for name in filters if name not in present} | {"BLOCK": BLOCK},
                    launch_options(target), aligned, streams=True,
                )
            )  # fmt: skip
    return ships
