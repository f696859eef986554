"""A reference's log probability under an LM head, with few logits in memory or none.

`tile_mass_kernel` keeps the maximum and the mass of each group, and the reference's logit. Of many rows, torch
multiplies a part of the vocabulary at a time, and `span_mass_kernel` does the rest. `log_prob_kernel` puts the groups
together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.triton.configuration import Configuration
from selfgen_kernels.backends.triton.elementary import OPTIONS, group_masses, log_weight, mass_weights
from selfgen_kernels.backends.triton.products import (
    FEW_ROWS,
    REDUCTION,
    SELECTED,
    SPAN,
    chunk_configurations,
    factors,
    keeps_precision,
    load_groups,
    logit_chunks,
    multiply_tile,
    product_arguments,
    product_configurations,
    select_rows,
    spans_of,
    tile_of,
)
from selfgen_kernels.backends.triton.sampling import GROUP_SIZE
from selfgen_kernels.call import Head, Mask, in_rows
from selfgen_kernels.ops import in_records


@triton.jit
def tile_mass_kernel(
    hidden, hidden_stride, weight, weight_stride, bias, hidden_size, logit_scale, softcap, vocab_size, tiles,
    rows, count, reference, peaks, masses, found, groups,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (tile, rows) writes the maxima and masses of a tile's groups into two [capacity, groups].

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
    place = slot[:, None].to(tl.int64) * groups + group[None, :]
    is_group = is_row[:, None] & (group * GROUP_SIZE < vocab_size)[None, :]
    tl.store(peaks + place, peak, mask=is_group)
    tl.store(masses + place, mass, mask=is_group)


@triton.jit(do_not_specialize=["spans"])
def span_mass_kernel(
    logits, row_stride, logit_scale, softcap, chunk_begin, begin, end, spans,
    rows, count, reference, peaks, masses, found, groups, GROUPS: tl.constexpr,
):  # fmt: skip
    """Program (slot, span) writes the maxima and masses of GROUPS groups among ids begin .. end - 1, as above."""
    slot, span = tl.program_id(0).to(tl.int64) // spans, tl.program_id(0) % spans
    if slot >= tl.load(count):
        return
    row = tl.load(rows + slot).to(tl.int64)
    first, z = load_groups(
        logits, row_stride, logit_scale, softcap, row, chunk_begin, begin, end, span, GROUP_SIZE, GROUPS
    )
    group = first + tl.arange(0, GROUPS)
    wanted = tl.load(reference + row)
    ids = group[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    is_first = first * GROUP_SIZE <= wanted
    if is_first & (wanted >= begin) & (wanted < tl.minimum((first + GROUPS) * GROUP_SIZE, end)):
        tl.store(found + slot, tl.max(tl.max(tl.where(ids == wanted, z, float("-inf")), 1)))
    peak, mass = group_masses(z)
    is_group = (group * GROUP_SIZE >= begin) & (group * GROUP_SIZE < end)
    tl.store(peaks + slot * groups + group, peak, mask=is_group)
    tl.store(masses + slot * groups + group, mass, mask=is_group)


@triton.jit
def log_prob_kernel(peaks, masses, found, groups, rows, count, log_probs, LANES: tl.constexpr):
    """Program i writes the log probability of the i-th self row's reference, from the masses of all groups."""
    slot = tl.program_id(0).to(tl.int64)
    if slot >= tl.load(count):
        return
    peaks += slot * groups
    masses += slot * groups
    lane = tl.arange(0, LANES)
    largest = tl.full([LANES], float("-inf"), tl.float32)
    for start in range(0, groups, LANES):
        group = start + lane
        largest = tl.maximum(largest, tl.load(peaks + group, mask=group < groups, other=float("-inf")))
    peak = tl.max(largest)
    log_prob = 0.0
    if tl.abs(peak) != float("inf"):  # of NaN or +inf, or of nothing but -inf
        weight = tl.zeros([LANES], tl.int64)
        for start in range(0, groups, LANES):
            group = start + lane
            own = tl.load(peaks + group, mask=group < groups, other=float("-inf"))
            weight += mass_weights(own, tl.load(masses + group, mask=group < groups, other=0), peak)
        log_prob = tl.load(found + slot) - peak - log_weight(tl.sum(weight))
    tl.store(log_probs + tl.load(rows + slot).to(tl.int64), log_prob)


@in_records
def linear_reference_log_prob(head: Head, reference: Tensor, mask: Mask) -> Tensor:
    """log softmax(logits)[reference] fp32 [N] of the rows that the mask selects, 0 of others."""
    size, vocab_size = len(head.hidden), len(head.weight)
    log_probs = head.hidden.new_zeros(size, dtype=torch.float32)
    if size == 0:
        return log_probs
    rows, count = select_rows(in_rows(mask))
    head = factors(head)
    groups = triton.cdiv(vocab_size, GROUP_SIZE.value)
    peaks = log_probs.new_empty(size, groups)
    masses = torch.empty_like(peaks, dtype=torch.int32)
    found = torch.full_like(log_probs, -torch.inf)
    results = rows, count, reference.contiguous(), peaks, masses, found, groups
    if size <= FEW_ROWS or not keeps_precision(head):
        constants, options = tile_of(head, min(size, FEW_ROWS))
        tiles = triton.cdiv(vocab_size, constants["BLOCK_N"])
        tile_mass_kernel[(tiles * triton.cdiv(size, constants["BLOCK_M"]),)](
            *product_arguments(head), vocab_size, tiles, *results, **constants, **options
        )
    else:
        for begin, end, product in logit_chunks(head, 0):
            spans = spans_of(begin, end)
            span_mass_kernel[(size * spans,)](
                product, product.stride(0), head.logit_scale, head.softcap, begin, begin, end, spans, *results,
                **SPAN, **OPTIONS,
            )  # fmt: skip
    log_prob_kernel[(size,)](peaks, masses, found, groups, rows, count, log_probs, **REDUCTION, **OPTIONS)
    return log_probs


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`."""
    results = {"peaks": "*fp32", "masses": "*i32", "found": "*fp32", "groups": "i32"}
    masses = results | {"reference": "*i64"}
    return [
        Configuration(
            "head_log_prob", log_prob_kernel, results | {"log_probs": "*fp32"} | SELECTED, REDUCTION, OPTIONS
        ),
        *product_configurations(
            target, "tile_mass", tile_mass_kernel, masses | {"vocab_size": "i32", "tiles": "i32"}, ("vocab_size",)
        ),
        *chunk_configurations("span_mass", span_mass_kernel, masses),
    ]
