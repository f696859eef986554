"""`sample_mix` in two launches: the best group of each span of the vocabulary, then the best span and its token.
`reference_log_prob` likewise: the mass of each group, then of all, and the reference's share of it.

A row's vocabulary is cut into spans so that a few rows still fill a GPU. The noise knows neither spans nor tiles, and
the maximum of maxima is the maximum: the constants below may change, the tokens do not. Rows that keep their reference
return at once.
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
from selfgen_kernels.call import Mask, Mixed, Sampling
from selfgen_kernels.ops import in_records

GROUP_SIZE = tl.constexpr(call.GROUP_SIZE)
TILE = 32  # groups that a program scores at a time
SPAN = 128  # groups per program
BLOCK = 512  # groups whose masses a program adds up at a time


@triton.jit
def load_z(logits, ids, vocab_size, inv_temperature, cutoffs, row):
    """z fp32 of some `ids` of a row: scaled, filtered, -inf past the end, and +inf for NaN, which max ignores."""
    z = tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    if inv_temperature != float("inf"):
        z *= inv_temperature
    z = tl.where(z == z, z, float("inf"))
    if cutoffs is not None:
        z = tl.where(z < tl.load(cutoffs + row), float("-inf"), z)
    return z


@triton.jit
def group_mass(z, greedy):
    """logsumexp over the last dimension, or the maximum where `greedy`; +inf where z, which is never NaN, has one."""
    peak, mass = group_masses(z)
    finite = tl.abs(peak) != float("inf")
    mass = tl.where(finite, mass, 1)  # else of no meaning
    return tl.where(greedy, peak, peak + log(mass_of(mass)))


@triton.jit(do_not_specialize=["seed"])
def best_group_kernel(
    logits, row_stride, inv_temperatures, cutoffs, thresholds, seed, sample_ids, positions,
    best_scores, best_groups, vocab_size,
    TILE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Program (row, span) writes its best group's score and that group, each into [N, spans]."""
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sample_id, position = tl.load(sample_ids + row), tl.load(positions + row)
    if not in_mask(seed, sample_id, position, tl.load(thresholds + row)):
        return
    inv_temperature = tl.load(inv_temperatures + row)
    greedy = inv_temperature == float("inf")

    best = tl.full([TILE], float("-inf"), tl.float32)  # of each lane, as is the next
    best_group = tl.zeros([TILE], tl.int32)
    end = tl.minimum((span + 1) * SPAN, tl.cdiv(vocab_size, GROUP_SIZE))
    for start in range(span * SPAN, end, TILE):
        group = start + tl.arange(0, TILE)
        ids = group[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]  # [TILE, 64]
        z = load_z(logits + row * row_stride, ids, vocab_size, inv_temperature, cutoffs, row)
        noise = gumbel(random_words(seed, sample_id, position, start, TILE, GROUP))
        score = group_mass(z, greedy) + tl.where(greedy, 0.0, noise)  # [TILE]
        best_group = tl.where(score > best, group, best_group)
        best = tl.maximum(best, score)

    row_best = tl.max(best)
    out = row * tl.num_programs(1) + span
    tl.store(best_scores + out, row_best)
    tl.store(best_groups + out, tl.min(tl.where(best == row_best, best_group, 2147483647)))


@triton.jit(do_not_specialize=["seed"])
def pick_token_kernel(
    logits, row_stride, inv_temperatures, cutoffs, thresholds, seed, sample_ids, positions,
    best_scores, best_groups, vocab_size, spans, reference, tokens, is_selfs, invalids,
    SPANS: tl.constexpr,
):  # fmt: skip
    """One program per row: the best span's group, the best token in it, and the row's place in the three results."""
    row = tl.program_id(0).to(tl.int64)
    sample_id, position = tl.load(sample_ids + row), tl.load(positions + row)
    is_self = in_mask(seed, sample_id, position, tl.load(thresholds + row))
    token = tl.load(reference + row)
    invalid = False
    if is_self:
        span = tl.arange(0, SPANS)
        exists = span < spans
        score = tl.load(best_scores + row * spans + span, mask=exists, other=float("-inf"))  # [SPANS]
        candidate = tl.load(best_groups + row * spans + span, mask=exists, other=2147483647)
        best = tl.max(score)
        group = tl.min(tl.where(score == best, candidate, 2147483647))
        invalid = tl.abs(best) == float("inf")  # of NaN or +inf, or of nothing but -inf
        if not invalid:
            inv_temperature = tl.load(inv_temperatures + row)
            offset = tl.arange(0, GROUP_SIZE)
            z = load_z(
                logits + row * row_stride, group * GROUP_SIZE + offset, vocab_size, inv_temperature, cutoffs, row
            )
            noise = gumbel(random_words(seed, sample_id, position, 0, GROUP_SIZE, TOKEN))  # [64]
            noise = tl.where(inv_temperature == float("inf"), 0.0, noise)
            token = (group * GROUP_SIZE + tl.argmax(z + noise, 0)).to(tl.int64)
    tl.store(tokens + row, token)
    tl.store(is_selfs + row, is_self)
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
    spans = triton.cdiv(vocab_size, SPAN * GROUP_SIZE.value)
    scores = logits.new_empty(rows, spans, dtype=torch.float32)
    groups = logits.new_empty(rows, spans, dtype=torch.int32)
    inputs = (
        logits,
        logits.stride(0),
        how.inv_temperature.contiguous(),
        filter_cutoff(logits, how) if how.filtered else None,
        how.threshold.contiguous(),
        how.seed,
        how.sample_ids.contiguous(),
        how.positions.contiguous(),
        scores,
        groups,
        vocab_size,
    )
    best_group_kernel[(rows, spans)](*inputs, TILE=TILE, SPAN=SPAN, **OPTIONS)
    outputs = reference.contiguous(), tokens, is_self, invalid
    pick_token_kernel[(rows,)](*inputs, spans, *outputs, SPANS=triton.next_power_of_2(spans), **OPTIONS)
    return tokens, is_self, invalid


@triton.jit(do_not_specialize=["seed"])
def mass_kernel(
    logits, row_stride, thresholds, seed, sample_ids, positions, peaks, masses, vocab_size,
    TILE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Program (row, span) writes its groups' largest logits and masses, each into [N, groups]."""
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if not in_mask(seed, tl.load(sample_ids + row), tl.load(positions + row), tl.load(thresholds + row)):
        return
    groups = tl.cdiv(vocab_size, GROUP_SIZE)
    end = tl.minimum((span + 1) * SPAN, groups)
    for start in range(span * SPAN, end, TILE):
        group = start + tl.arange(0, TILE)
        ids = group[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]  # [TILE, 64]
        peak, mass = group_masses(load_z(logits + row * row_stride, ids, vocab_size, 1.0, None, row))  # [TILE]
        tl.store(peaks + row * groups + group, peak, mask=group < end)
        tl.store(masses + row * groups + group, mass, mask=group < end)


@triton.jit(do_not_specialize=["seed"])
def log_prob_kernel(
    logits, row_stride, thresholds, seed, sample_ids, positions, peaks, masses, vocab_size, reference, log_probs,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: the reference's log probability from the masses of all groups, BLOCK at a time."""
    row = tl.program_id(0).to(tl.int64)
    log_prob = 0.0
    if in_mask(seed, tl.load(sample_ids + row), tl.load(positions + row), tl.load(thresholds + row)):
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
    keys = mask.threshold.contiguous(), mask.seed, mask.sample_ids.contiguous(), mask.positions.contiguous()
    inputs = logits, logits.stride(0), *keys, peaks, masses, vocab_size
    mass_kernel[(rows, triton.cdiv(groups, SPAN))](*inputs, TILE=TILE, SPAN=SPAN, **OPTIONS)
    log_prob_kernel[(rows,)](*inputs, reference.contiguous(), log_probs, BLOCK=BLOCK, **OPTIONS)
    return log_probs


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`."""
    types = {
        "row_stride": "i64", "inv_temperatures": "*fp32", "thresholds": "*i64", "seed": "i64", "sample_ids": "*i64",
        "positions": "*i64", "best_scores": "*fp32", "best_groups": "*i32", "vocab_size": "i32",
    }  # fmt: skip
    results = {"spans": "i32", "reference": "*i64", "tokens": "*i64", "is_selfs": "*i1", "invalids": "*i1"}
    masses = {name: kind for name, kind in types.items() if name in mass_kernel.arg_names} | {
        "peaks": "*fp32", "masses": "*i32",
    }  # fmt: skip
    log_probs = {"reference": "*i64", "log_probs": "*fp32"}
    aligned = "row_stride", "vocab_size"
    ships = []
    for dtype in ("fp32", "bf16", "fp16"):
        inputs = masses | {"logits": f"*{dtype}"}
        ships += [
            Configuration(
                f"mass[{dtype}]", mass_kernel, inputs, {"TILE": TILE, "SPAN": SPAN}, OPTIONS, aligned, streams=True
            ),
            Configuration(
                f"log_prob[{dtype}]", log_prob_kernel, inputs | log_probs, {"BLOCK": BLOCK}, OPTIONS, aligned
            ),
        ]
        for label, cutoffs, absent in (
            (dtype, {}, {"cutoffs": None}),
            (f"{dtype}, filtered", {"cutoffs": "*fp32"}, {}),
        ):
            inputs = types | cutoffs | {"logits": f"*{dtype}"}
            ships += [
                Configuration(
                    f"best_group[{label}]", best_group_kernel, inputs, absent | {"TILE": TILE, "SPAN": SPAN}, OPTIONS,
                    aligned, streams=True,
                ),
                Configuration(
                    f"pick_token[{label}]", pick_token_kernel, inputs | results, absent | {"SPANS": 16}, OPTIONS,
                    aligned,
                ),
            ]  # fmt: skip
    return ships
