"""A reference's log probability under an LM head, with no logits in memory.

`tile_mass_kernel` keeps the maximum and the mass of each group, and the reference's logit; `log_prob_kernel` puts the
groups together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.triton.configuration import Configuration
from selfgen_kernels.backends.triton.elementary import OPTIONS, group_masses, log_weight, mass_weights
from selfgen_kernels.backends.triton.products import (
    REDUCTION,
    SELECTED,
    SLOTS,
    factors,
    multiply_tile,
    product_arguments,
    product_configurations,
    select_rows,
    tile_of,
)
from selfgen_kernels.backends.triton.sampling import GROUP_SIZE
from selfgen_kernels.call import Head, Mask, in_rows
from selfgen_kernels.ops import in_records


@triton.jit(do_not_specialize=["capacity"])
def tile_mass_kernel(
    hidden, hidden_stride, weight, weight_stride, bias, hidden_size, logit_scale, softcap, vocab_size, tiles,
    rows, count, capacity, reference, peaks, masses, found,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (tile, rows) writes the maxima and masses of a tile's groups into two [groups, capacity].

    It writes the logits of those references that are in its tile into found [capacity].
    """
    selected = tl.load(count)
    row_tiles = tl.maximum(tl.cdiv(selected, BLOCK_M), 1)
    tile = tl.program_id(0) // row_tiles
    slot = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M], neighbours share weights
    if (tile >= tiles) | (selected == 0):
        return
    is_row = slot < selected
    row = tl.load(rows + slot, mask=is_row, other=0).to(tl.int64)  # [BLOCK_M]
    start = tile.to(tl.int64) * BLOCK_N
    in_tile = tl.arange(0, BLOCK_N)
    size = tl.minimum(BLOCK_N, vocab_size - start).to(tl.int32)
    wanted = tl.load(reference + row, mask=is_row, other=-1) - start  # [BLOCK_M]
    wanted = tl.where((wanted >= 0) & (wanted < size), wanted, -1).to(tl.int32)
    z = multiply_tile(
        hidden, hidden_stride, weight, weight_stride, bias, hidden_size, logit_scale, softcap, row, is_row,
        start + in_tile, in_tile < size, BLOCK_K,
    )  # fmt: skip
    z = tl.where(z == z, z, float("inf"))
    z = tl.where((in_tile < size)[None, :], z, float("-inf"))
    logit = tl.max(tl.where(in_tile[None, :] == wanted[:, None], z, float("-inf")), 1)
    tl.store(found + slot, logit, mask=is_row & (wanted >= 0))

    GROUPS: tl.constexpr = BLOCK_N // GROUP_SIZE
    peak, mass = group_masses(tl.reshape(z, [BLOCK_M, GROUPS, GROUP_SIZE]))  # [BLOCK_M, GROUPS]
    group = tile.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    place = group[None, :] * capacity + slot[:, None]
    is_group = is_row[:, None] & (group * GROUP_SIZE < vocab_size)[None, :]
    tl.store(peaks + place, peak, mask=is_group)
    tl.store(masses + place, mass, mask=is_group)


@triton.jit(do_not_specialize=["capacity"])
def log_prob_kernel(
    peaks, masses, found, capacity, groups, rows, count, log_probs,
    PIECES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The log probabilities of the references of SLOTS of the self rows, from the masses of all groups."""
    selected = tl.load(count)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    is_row = slot < selected
    row = tl.load(rows + slot, mask=is_row, other=0).to(tl.int64)
    lane = tl.arange(0, PIECES)[:, None]
    groups = tl.where(tl.program_id(0) * SLOTS < selected, groups, 0)  # no row, no work
    largest = tl.full([PIECES, SLOTS], float("-inf"), tl.float32)
    for start in range(0, groups, PIECES):
        exists = (start + lane < groups) & is_row[None, :]
        place = (start + lane).to(tl.int64) * capacity + slot[None, :]
        largest = tl.maximum(largest, tl.load(peaks + place, mask=exists, other=float("-inf")))
    peak = tl.max(largest, 0)  # [SLOTS]
    has_any = tl.abs(peak) != float("inf")  # else NaN or +inf, or nothing but -inf
    peak = tl.where(has_any, peak, 0.0)
    weight = tl.zeros([PIECES, SLOTS], tl.int64)
    for start in range(0, groups, PIECES):
        exists = (start + lane < groups) & (is_row & has_any)[None, :]
        place = (start + lane).to(tl.int64) * capacity + slot[None, :]
        own = tl.load(peaks + place, mask=exists, other=float("-inf"))
        weight += mass_weights(own, tl.load(masses + place, mask=exists, other=0), peak[None, :])
    logit = tl.load(found + slot, mask=is_row, other=0.0)
    log_prob = logit - peak - log_weight(tl.maximum(tl.sum(weight, 0), 1))
    tl.store(log_probs + row, tl.where(has_any, log_prob, 0.0), mask=is_row)


@in_records
def linear_reference_log_prob(head: Head, reference: Tensor, mask: Mask) -> Tensor:
    """log softmax(logits)[reference] fp32 [N] of the rows that the mask selects, 0 of others."""
    size = len(head.hidden)
    log_probs = head.hidden.new_zeros(size, dtype=torch.float32)
    if size == 0:
        return log_probs
    rows, count = select_rows(in_rows(mask))
    head = factors(head)
    constants, options = tile_of(head, size)
    vocab_size = len(head.weight)
    tiles = triton.cdiv(vocab_size, constants["BLOCK_N"])
    groups = triton.cdiv(vocab_size, GROUP_SIZE.value)
    peaks = log_probs.new_empty(groups, size)
    masses = torch.empty_like(peaks, dtype=torch.int32)
    found = torch.full_like(log_probs, -torch.inf)
    tile_mass_kernel[(tiles * triton.cdiv(size, constants["BLOCK_M"]),)](
        *product_arguments(head), vocab_size, tiles, rows, count, size, reference.contiguous(), peaks, masses, found,
        **constants, **options,
    )  # fmt: skip
    grid = (triton.cdiv(size, SLOTS),)
    log_prob_kernel[grid](peaks, masses, found, size, groups, rows, count, log_probs, **REDUCTION, **OPTIONS)
    return log_probs


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`."""
    masses = dict.fromkeys(("vocab_size", "tiles", "capacity"), "i32") | {
        "reference": "*i64", "peaks": "*fp32", "masses": "*i32", "found": "*fp32",
    }  # fmt: skip
    log_probs = {
        "peaks": "*fp32", "masses": "*i32", "found": "*fp32", "capacity": "i32", "groups": "i32", "log_probs": "*fp32",
    }  # fmt: skip
    return [
        Configuration("head_log_prob", log_prob_kernel, log_probs | SELECTED, REDUCTION, OPTIONS),
        *product_configurations(target, "tile_mass", tile_mass_kernel, masses, ("vocab_size",)),
    ]
