"""`sample_mix` in one launch: the best group of each span of the vocabulary, then, by a row's last program, its token.
`reference_log_prob` in two: the mass of each group, then of all, and the reference's share of it.

A row's vocabulary is cut into spans so that a few rows still fill a GPU. The noise knows neither spans nor tiles, and
the maximum of maxima is the maximum: the constants below may change, the tokens do not. Rows that keep their reference
return at once.

The programs of a row meet at two numbers of 64 bits, zeros before the launch (in a CUDA graph, by a node that every
replay runs): the largest score with its group, in the bits of one number that `atomic_max` keeps, and how many programs
have come. A scalar atomic is one thread's, the same one in all, and the count is added to with release and acquire: who
finds that the others have come sees what they put in. Nothing else is handed over in memory, so no barrier is needed,
on CUDA as on AMD, and no order of programs is assumed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels import call
from selfgen_kernels.backends.triton.configuration import Configuration
from selfgen_kernels.backends.triton.elementary import (
    OPTIONS,
    group_masses,
    gumbel,
    log,
    log_weight,
    mass_of,
    mass_weights,
)
from selfgen_kernels.backends.triton.filters import filter_cutoff
from selfgen_kernels.backends.triton.noise import GROUP, TOKEN, in_mask, random_words
from selfgen_kernels.backends.triton.rows import for_rows, fp32_of_row, int64_of_row
from selfgen_kernels.call import Mask, Mixed, Sampling
from selfgen_kernels.ops import in_records

GROUP_SIZE = tl.constexpr(call.GROUP_SIZE)
SPAN = 128  # groups per program
BLOCK = 512  # groups whose masses a program adds up at a time


@triton.jit
def load_z(logits, ids, vocab_size, inv_temperature, cutoff):
    """z fp32 of some `ids` of a row: scaled, filtered, -inf past the end, and +inf for NaN, which max ignores."""
    z = tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    if inv_temperature != float("inf"):
        z *= inv_temperature
    z = tl.where(z == z, z, float("inf"))
    if cutoff is not None:
        z = tl.where(z < cutoff, float("-inf"), z)
    return z


@triton.jit
def group_mass(z, greedy):
    """logsumexp over the last dimension, or the maximum where `greedy`; +inf where z, which is never NaN, has one."""
    peak, mass = group_masses(z)
    finite = tl.abs(peak) != float("inf")
    mass = tl.where(finite, mass, 1)  # else of no meaning
    return tl.where(greedy, peak, peak + log(mass_of(mass)))


@triton.jit
def ordered(score, group):
    """int64 > 0: larger for a larger score fp32, which is not NaN, and of equal ones for the lower group."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((bits.to(tl.int64) + 2147483648) << 31) + (2147483647 - group)


@triton.jit
def score_and_group(order):
    """What `ordered` was made of."""
    bits = ((order >> 31) - 2147483648).to(tl.int32)
    score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return score, 2147483647 - (order & 2147483647).to(tl.int32)


@triton.jit(do_not_specialize=["inv_temperatures", "thresholds", "seed"])
def sample_mix_kernel(
    logits, row_stride, inv_temperatures, cutoffs, thresholds, seed, sample_ids, positions,
    reference, tokens, is_selfs, invalids, meetings, vocab_size,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Program (row, span) finds its best group; the last one of a row to do so writes the row's results.

    `meetings` int64 [N, 2] holds zeros.
    """
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sample_id, position = tl.load(sample_ids + row), tl.load(positions + row)
    if not in_mask(seed, sample_id, position, int64_of_row(thresholds, row)):
        if span == 0:
            tl.store(tokens + row, tl.load(reference + row))
            tl.store(is_selfs + row, False)
            tl.store(invalids + row, False)
        return
    inv_temperature = fp32_of_row(inv_temperatures, row)
    greedy = inv_temperature == float("inf")
    cutoff = None if cutoffs is None else tl.load(cutoffs + row)
    logits += row * row_stride

    group = span * SPAN + tl.arange(0, SPAN)
    ids = group[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]  # [SPAN, 64]
    z = load_z(logits, ids, vocab_size, inv_temperature, cutoff)
    noise = gumbel(random_words(seed, sample_id, position, span * SPAN, SPAN, GROUP))
    score = group_mass(z, greedy) + tl.where(greedy, 0.0, noise)  # [SPAN]
    order = tl.max(ordered(score, group), 0)

    meeting = meetings + 2 * row
    tl.atomic_max(meeting, order, sem="relaxed")
    if tl.atomic_add(meeting + 1, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        best, winner = score_and_group(tl.atomic_max(meeting, 0, sem="relaxed"))  # read where it was written
        invalid = tl.abs(best) == float("inf")  # of NaN or +inf, or of nothing but -inf
        token = winner * GROUP_SIZE + tl.arange(0, GROUP_SIZE)
        inner = load_z(logits, token, vocab_size, inv_temperature, cutoff)  # [64]
        inner += tl.where(greedy, 0.0, gumbel(random_words(seed, sample_id, position, 0, GROUP_SIZE, TOKEN)))
        drawn = (winner * GROUP_SIZE + tl.argmax(inner, 0)).to(tl.int64)
        tl.store(tokens + row, tl.where(invalid, tl.load(reference + row), drawn))
        tl.store(is_selfs + row, True)
        tl.store(invalids + row, invalid)


@in_records
def sample_mix(logits: Tensor, reference: Tensor, how: Sampling) -> Mixed:
    """Tokens int64 [N], is_self bool [N], invalid bool [N] from logits [N, V] and reference [N]."""
    rows, vocab_size = logits.shape
    tokens = torch.empty_like(reference, memory_format=torch.contiguous_format)  # [N]
    is_self, invalid = (torch.empty_like(tokens, dtype=torch.bool) for _ in range(2))  # [N]
    if rows == 0:
        return tokens, is_self, invalid
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    sample_mix_kernel[(rows, triton.cdiv(vocab_size, SPAN * GROUP_SIZE.value))](
        logits,
        logits.stride(0),
        for_rows(how.inv_temperature),
        filter_cutoff(logits, how) if how.filtered else None,
        for_rows(how.threshold),
        how.seed,
        how.sample_ids.contiguous(),
        how.positions.contiguous(),
        reference.contiguous(),
        tokens,
        is_self,
        invalid,
        tokens.new_zeros(rows, 2),
        vocab_size,
        SPAN=SPAN,
        **OPTIONS,
    )
    return tokens, is_self, invalid


@triton.jit(do_not_specialize=["thresholds", "seed"])
def mass_kernel(
    logits, row_stride, thresholds, seed, sample_ids, positions, peaks, masses, vocab_size,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Program (row, span) writes its groups' largest logits and masses, each into [N, groups]."""
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if not in_mask(seed, tl.load(sample_ids + row), tl.load(positions + row), int64_of_row(thresholds, row)):
        return
    groups = tl.cdiv(vocab_size, GROUP_SIZE)
    group = span * SPAN + tl.arange(0, SPAN)
    ids = group[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]  # [SPAN, 64]
    peak, mass = group_masses(load_z(logits + row * row_stride, ids, vocab_size, 1.0, None))  # [SPAN]
    tl.store(peaks + row * groups + group, peak, mask=group < groups)
    tl.store(masses + row * groups + group, mass, mask=group < groups)


@triton.jit(do_not_specialize=["thresholds", "seed"])
def log_prob_kernel(
    logits, row_stride, thresholds, seed, sample_ids, positions, peaks, masses, vocab_size, reference, log_probs,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: the reference's log probability from the masses of all groups, BLOCK at a time."""
    row = tl.program_id(0).to(tl.int64)
    log_prob = 0.0
    if in_mask(seed, tl.load(sample_ids + row), tl.load(positions + row), int64_of_row(thresholds, row)):
        groups = tl.cdiv(vocab_size, GROUP_SIZE)
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, groups, BLOCK):
            group = start + tl.arange(0, BLOCK)
            own = tl.load(peaks + row * groups + group, mask=group < groups, other=float("-inf"))
            largest = tl.maximum(largest, own)
        peak = tl.max(largest)
        if tl.abs(peak) != float("inf"):  # of NaN or +inf, or of nothing but -inf
            weight = tl.zeros([BLOCK], tl.int64)
            for start in range(0, groups, BLOCK):
                group = start + tl.arange(0, BLOCK)
                own = tl.load(peaks + row * groups + group, mask=group < groups, other=float("-inf"))
                mass = tl.load(masses + row * groups + group, mask=group < groups, other=0)
                weight += mass_weights(own, mass, peak)
            token = tl.load(reference + row)
            known = (token >= 0) & (token < vocab_size)
            place = logits + row * row_stride + tl.where(known, token, 0)
            z = tl.load(place, mask=known, other=float("-inf")).to(tl.float32)
            log_prob = z - peak - log_weight(tl.sum(weight))
    tl.store(log_probs + row, log_prob)


@in_records
def reference_log_prob(logits: Tensor, reference: Tensor, mask: Mask) -> Tensor:
    """log softmax(logits)[reference] fp32 [N] of the rows that the mask selects, 0 of others; logits are [N, V]."""
    rows, vocab_size = logits.shape
    log_probs = logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return log_probs
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    groups = triton.cdiv(vocab_size, GROUP_SIZE.value)
    peaks = log_probs.new_empty(rows, groups)
    masses = torch.empty_like(peaks, dtype=torch.int32)
    keys = for_rows(mask.threshold), mask.seed, mask.sample_ids.contiguous(), mask.positions.contiguous()
    inputs = logits, logits.stride(0), *keys, peaks, masses, vocab_size
    mass_kernel[(rows, triton.cdiv(groups, SPAN))](*inputs, SPAN=SPAN, **OPTIONS)
    log_prob_kernel[(rows,)](*inputs, reference.contiguous(), log_probs, BLOCK=BLOCK, **OPTIONS)
    return log_probs


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`."""
    types = {"row_stride": "i64", "seed": "i64", "sample_ids": "*i64", "positions": "*i64", "vocab_size": "i32"}
    kinds = {"": {"thresholds": "*i64", "inv_temperatures": "*fp32"}, ", numbers": {"thresholds": "i64"}}
    kinds[", numbers"] |= {"inv_temperatures": "i64"}
    results = {"reference": "*i64", "tokens": "*i64", "is_selfs": "*i1", "invalids": "*i1", "meetings": "*i64"}
    masses, log_probs = {"peaks": "*fp32", "masses": "*i32"}, {"reference": "*i64", "log_probs": "*fp32"}
    aligned = "row_stride", "vocab_size"
    ships = []
    for dtype in ("fp32", "bf16", "fp16"):
        for of_kind, kind in kinds.items():
            inputs = types | masses | {"logits": f"*{dtype}", "thresholds": kind["thresholds"]}
            ships += [
                Configuration(
                    f"mass[{dtype}{of_kind}]", mass_kernel, inputs, {"SPAN": SPAN}, OPTIONS, aligned, streams=True
                ),
                Configuration(
                    f"log_prob[{dtype}{of_kind}]", log_prob_kernel, inputs | log_probs, {"BLOCK": BLOCK}, OPTIONS,
                    aligned,
                ),
            ]  # fmt: skip
            for filtered, cutoffs, absent in (("", {}, {"cutoffs": None}), (", filtered", {"cutoffs": "*fp32"}, {})):
                ships.append(
                    Configuration(
                        f"sample_mix[{dtype}{filtered}{of_kind}]", sample_mix_kernel,
                        types | kind | results | cutoffs | {"logits": f"*{dtype}"}, absent | {"SPAN": SPAN}, OPTIONS,
                        aligned, streams=True,
                    )
                )  # fmt: skip
    return ships
