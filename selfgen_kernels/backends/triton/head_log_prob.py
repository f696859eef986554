"""A reference's log probability under an LM head, with no logits in memory.

`tile_mass_kernel` keeps the maximum and the sum of exponentials of each tile, and the reference's logit;
`log_prob_kernel` puts the tiles together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.triton.configuration import Configuration
from selfgen_kernels.backends.triton.noise import OPTIONS
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
from selfgen_kernels.call import Head, Mask
from selfgen_kernels.ops import in_records


@triton.jit(do_not_specialize=["capacity"])
def tile_mass_kernel(
    hidden, hidden_stride, weight, weight_stride, bias, hidden_size, logit_scale, softcap, vocab_size, tiles,
    rows, count, capacity, reference, values, found,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (tile, rows) writes a tile's maximum and sum of exponentials into values [tiles, 2, capacity].

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
    z = multiply_tile(
        hidden, hidden_stride, weight, weight_stride, bias, hidden_size, logit_scale, softcap, row, is_row,
        start + in_tile, in_tile < size, BLOCK_K,
    )  # fmt: skip
    z = tl.where(z == z, z, float("inf"))
    z = tl.where((in_tile < size)[None, :], z, float("-inf"))
    peak = tl.max(z, 1)  # [BLOCK_M]
    shift = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
    place = values + tile.to(tl.int64) * 2 * capacity + slot
    tl.store(place, peak, mask=is_row)
    tl.store(place + capacity, tl.sum(tl.exp(z - shift[:, None]), 1), mask=is_row)
    wanted = tl.load(reference + row, mask=is_row, other=-1) - start  # [BLOCK_M]
    is_here = is_row & (wanted >= 0) & (wanted < size)
    wanted = tl.where(is_here, wanted, -1).to(tl.int32)
    logit = tl.max(tl.where(in_tile[None, :] == wanted[:, None], z, float("-inf")), 1)
    tl.store(found + slot, logit, mask=is_here)


@triton.jit(do_not_specialize=["capacity"])
def log_prob_kernel(
    values, found, capacity, tiles, rows, count, log_probs,
    PIECES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The log probabilities of the references of SLOTS of the self rows, from the masses of all tiles."""
    selected = tl.load(count)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    is_row = slot < selected
    row = tl.load(rows + slot, mask=is_row, other=0).to(tl.int64)
    lane = tl.arange(0, PIECES)[:, None]
    peak = tl.full([PIECES, SLOTS], float("-inf"), tl.float32)  # of each lane, as is the next
    mass = tl.zeros([PIECES, SLOTS], tl.float32)
    tiles = tl.where(tl.program_id(0) * SLOTS < selected, tiles, 0)  # no row, no work
    for start in range(0, tiles, PIECES):
        tile = start + lane
        exists = (tile < tiles) & is_row[None, :]
        place = values + tile.to(tl.int64) * 2 * capacity + slot[None, :]
        new_peak = tl.load(place, mask=exists, other=float("-inf"))
        new_mass = tl.load(place + capacity, mask=exists, other=0.0)
        largest = tl.maximum(peak, new_peak)
        shift = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
        mass = mass * tl.exp(peak - shift) + new_mass * tl.exp(new_peak - shift)
        peak = largest
    largest = tl.max(peak, 0)  # [SLOTS]
    has_any = tl.abs(largest) != float("inf")  # else NaN or +inf, or nothing but -inf
    shift = tl.where(has_any, largest, 0.0)
    mass = tl.sum(mass * tl.exp(peak - shift[None, :]), 0)
    logit = tl.load(found + slot, mask=is_row, other=0.0)
    log_prob = logit - shift - tl.log(tl.where(has_any & is_row, mass, 1.0))
    tl.store(log_probs + row, tl.where(has_any, log_prob, 0.0), mask=is_row)


@in_records
def linear_reference_log_prob(head: Head, reference: Tensor, mask: Mask) -> Tensor:
    """log softmax(logits)[reference] fp32 [N] of the rows that the mask selects, 0 of others."""
    size = len(head.hidden)
    log_probs = head.hidden.new_zeros(size, dtype=torch.float32)
    if size == 0:
        return log_probs
    rows, count = select_rows(mask)
    head = factors(head)
    constants, options = tile_of(head, size)
    vocab_size = len(head.weight)
    tiles = triton.cdiv(vocab_size, constants["BLOCK_N"])
    values = log_probs.new_empty(tiles, 2, size)
    found = torch.full_like(log_probs, -torch.inf)
    tile_mass_kernel[(tiles * triton.cdiv(size, constants["BLOCK_M"]),)](
        *product_arguments(head), vocab_size, tiles, rows, count, size, reference.contiguous(), values, found,
        **constants, **options,
    )  # fmt: skip
    grid = (triton.cdiv(size, SLOTS),)
    log_prob_kernel[grid](values, found, size, tiles, rows, count, log_probs, **REDUCTION, **OPTIONS)
    return log_probs


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`."""
    masses = dict.fromkeys(("vocab_size", "tiles", "capacity"), "i32") | {
        "reference": "*i64", "values": "*fp32", "found": "*fp32",
    }  # fmt: skip
    log_probs = {"values": "*fp32", "found": "*fp32", "capacity": "i32", "tiles": "i32", "log_probs": "*fp32"}
    return [
        Configuration("head_log_prob", log_prob_kernel, log_probs | SELECTED, REDUCTION, OPTIONS),
        *product_configurations(target, "tile_mass", tile_mass_kernel, masses, ("vocab_size",)),
    ]
