"""The LM head fused with sampling: logits live in registers, tile by tile, and only candidates reach memory.

1. `select_rows_kernel` packs the self rows, so that tiles are full and the others cost nothing.
2. `score_tile_kernel` multiplies BLOCK_M of them with BLOCK_N ids and keeps, of each row, the best group: its
   logsumexp, G1, and its best token with z + G2. The token comes from the accumulators that the group was scored by.
   Of many rows, torch multiplies a part of the vocabulary at a time, and `score_span_kernel` does the rest.
3. A small kernel reduces the tiles' candidates, a program per row: to tokens, or to the three candidates of a shard.

A filter looks at whole rows: `logits_kernel` multiplies the selected rows a block at a time, and `sampling` draws. The
host knows no number of rows; all is launched for N of them, and what lies after the selected ones returns at once.

Tiles begin at multiples of BLOCK_N in the whole vocabulary, also in a shard, so a group never straddles two tiles and
the constants below don't decide a token. The groups that a shard's ends cut are two tiles of their own. NaN becomes
+inf, which max keeps, and makes the logsumexp of its group +inf: that is how a row is found invalid.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.triton import sampling as logits_sampling
from selfgen_kernels.backends.triton.configuration import Configuration
from selfgen_kernels.backends.triton.elementary import OPTIONS, gumbel
from selfgen_kernels.backends.triton.head_log_prob import linear_reference_log_prob
from selfgen_kernels.backends.triton.noise import GROUP, TOKEN, gumbel_noise, random_words
from selfgen_kernels.backends.triton.products import (
    FEW_ROWS,
    REDUCTION,
    SELECTED,
    SPAN,
    chunk_bounds,
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
from selfgen_kernels.backends.triton.sampling import GROUP_SIZE, group_mass
from selfgen_kernels.call import Candidates, Head, Mixed, Sampling, in_rows
from selfgen_kernels.ops import in_records

__all__ = ["linear_reference_log_prob", "linear_sample_mix", "linear_sample_shard"]

LOGITS_BYTES = 2**26  # of filtered rows, in memory at a time


@triton.jit(do_not_specialize=["seed", "capacity"])  # a capacity of 1 would be no tensor
def score_tile_kernel(
    hidden, hidden_stride, weight, weight_stride, bias, hidden_size, logit_scale, softcap,
    first_id, end_id, whole_begin, whole_end, tiles, pieces,
    rows, count, capacity, inv_temperatures, seed, sample_ids, positions, token_noise, values, ids,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (piece, rows) writes its best group into values [3, capacity, pieces] and ids [capacity, pieces].

    The first `tiles` pieces are tiles of the groups in whole_begin .. whole_end - 1, the next two the cut groups.
    """
    selected = tl.load(count)
    row_tiles = tl.maximum(tl.cdiv(selected, BLOCK_M), 1)
    piece = tl.program_id(0) // row_tiles
    slot = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M], neighbours share weights
    if (piece >= pieces) | (selected == 0):
        return
    is_row = slot < selected
    row = tl.load(rows + slot, mask=is_row, other=0).to(tl.int64)  # [BLOCK_M]

    begin, end, tile = whole_begin, whole_end, first_id // BLOCK_N + piece
    if piece == tiles:
        begin, end, tile = first_id, tl.minimum(whole_begin, end_id), first_id // BLOCK_N
    if piece > tiles:
        begin, end, tile = tl.maximum(whole_begin, whole_end), end_id, (end_id - 1) // BLOCK_N
    start = tile.to(tl.int64) * BLOCK_N
    offset = start + tl.arange(0, BLOCK_N)  # [BLOCK_N] ids
    is_id = (offset >= begin) & (offset < end)

    logits = multiply_tile(
        hidden, hidden_stride, weight, weight_stride, bias, hidden_size, logit_scale, softcap, row, is_row,
        offset - first_id, is_id, BLOCK_K,
    )  # fmt: skip
    inv_temperature = tl.load(inv_temperatures + row, mask=is_row, other=1.0)  # [BLOCK_M]
    greedy = inv_temperature == float("inf")
    z = logits * tl.where(greedy, 1.0, inv_temperature)[:, None]
    z = tl.where(z == z, z, float("inf"))
    z = tl.where(is_id[None, :], z, float("-inf"))

    GROUPS: tl.constexpr = BLOCK_N // GROUP_SIZE
    z = tl.reshape(z, [BLOCK_M, GROUPS, GROUP_SIZE])
    mass = group_mass(z, greedy[:, None])  # [BLOCK_M, GROUPS]
    sample_id = tl.load(sample_ids + row, mask=is_row, other=0)[:, None]
    position = tl.load(positions + row, mask=is_row, other=0)[:, None]
    noise = tl.where(greedy[:, None], 0.0, group_noise(seed, sample_id, position, tile, GROUPS))  # [BLOCK_M, GROUPS]
    best = tl.argmax(mass + noise, 1)  # [BLOCK_M], the lowest of equals
    is_best = tl.arange(0, GROUPS)[None, :] == best[:, None]
    best_mass = tl.max(tl.where(is_best, mass, float("-inf")), 1)
    best_noise = tl.max(tl.where(is_best & (mass > float("-inf")), noise, float("-inf")), 1)

    z = tl.max(tl.where(is_best[:, :, None], z, float("-inf")), 1)  # [BLOCK_M, 64]
    in_group = tl.arange(0, GROUP_SIZE)
    noise = tl.load(
        token_noise + slot.to(tl.int64)[:, None] * GROUP_SIZE + in_group[None, :], mask=is_row[:, None], other=0.0
    )
    inner, token = tl.max(z + tl.where(greedy[:, None], 0.0, noise), 1, return_indices=True)
    token = tl.where(best_mass > float("-inf"), start + best * GROUP_SIZE + token, -1)

    place = slot.to(tl.int64) * pieces + piece
    size = capacity.to(tl.int64) * pieces
    tl.store(values + place, best_mass, mask=is_row)
    tl.store(values + size + place, best_noise, mask=is_row)
    tl.store(values + 2 * size + place, inner, mask=is_row)
    tl.store(ids + place, token, mask=is_row)


@triton.jit(do_not_specialize=["seed", "capacity", "first_piece", "spans", "pieces"])
def score_span_kernel(
    logits, row_stride, logit_scale, softcap, chunk_begin, begin, end, first_piece, spans, pieces,
    rows, count, capacity, inv_temperatures, seed, sample_ids, positions, token_noise, values, ids,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Program (slot, span) writes the best of GROUPS groups among ids begin .. end - 1 as piece first_piece + span."""
    slot, span = tl.program_id(0).to(tl.int64) // spans, tl.program_id(0) % spans
    if slot >= tl.load(count):
        return
    row = tl.load(rows + slot).to(tl.int64)
    inv_temperature, sample_id, position = (
        tl.load(inv_temperatures + row), tl.load(sample_ids + row), tl.load(positions + row),
    )  # fmt: skip
    greedy = inv_temperature == float("inf")
    first, z = load_groups(
        logits, row_stride, logit_scale, softcap, row, chunk_begin, begin, end, span, GROUP_SIZE, GROUPS
    )
    z *= tl.where(greedy, 1.0, inv_temperature)
    z = tl.where(z == z, z, float("inf"))  # a temperature may be NaN
    mass = group_mass(z, greedy)  # [GROUPS]
    noise = tl.where(greedy, 0.0, gumbel(random_words(seed, sample_id, position, first, GROUPS, GROUP)))
    best = tl.argmax(mass + noise, 0)  # the lowest of equals
    is_best = tl.arange(0, GROUPS) == best
    best_mass = tl.max(tl.where(is_best, mass, float("-inf")))
    best_noise = tl.max(tl.where(is_best & (mass > float("-inf")), noise, float("-inf")))
    z = tl.max(tl.where(is_best[:, None], z, float("-inf")), 0)  # [64]
    noise = tl.load(token_noise + slot * GROUP_SIZE + tl.arange(0, GROUP_SIZE))
    inner, token = tl.max(z + tl.where(greedy, 0.0, noise), 0, return_indices=True)
    token = tl.where(best_mass > float("-inf"), (first + best).to(tl.int64) * GROUP_SIZE + token, -1)

    place = slot * pieces + first_piece + span
    size = capacity.to(tl.int64) * pieces
    tl.store(values + place, best_mass)
    tl.store(values + size + place, best_noise)
    tl.store(values + 2 * size + place, inner)
    tl.store(ids + place, token)


@triton.jit(do_not_specialize=["first_slot", "slots"])
def logits_kernel(
    hidden, hidden_stride, weight, weight_stride, bias, hidden_size, logit_scale, softcap, vocab_size,
    rows, count, first_slot, slots, out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (ids, rows) writes a tile of out [slots, vocab_size]: the logits of `rows` from `first_slot` on.

    Those from `count` on are left as they are.
    """
    selected = tl.minimum(tl.load(count) - first_slot, slots)
    row_tiles = tl.maximum(tl.cdiv(selected, BLOCK_M), 1)
    start = (tl.program_id(0) // row_tiles).to(tl.int64) * BLOCK_N
    if (start >= vocab_size) | (selected <= 0):
        return
    slot = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M], neighbours share weights
    is_row = slot < selected
    row = tl.load(rows + first_slot + slot, mask=is_row, other=0).to(tl.int64)  # [BLOCK_M]
    token = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    is_token = token < vocab_size
    logits = multiply_tile(
        hidden, hidden_stride, weight, weight_stride, bias, hidden_size, logit_scale, softcap, row, is_row,
        token, is_token, BLOCK_K,
    )  # fmt: skip
    place = out + slot.to(tl.int64)[:, None] * vocab_size + token[None, :]
    tl.store(place, logits.to(out.dtype.element_ty), mask=is_row[:, None] & is_token[None, :])


@triton.jit
def group_noise(seed, sample_id, position, tile, GROUPS: tl.constexpr):
    """G1 [M, GROUPS] of the groups of a tile, for sample_id and position [M, 1]; GROUPS is 1 or even."""
    if GROUPS >= 4:
        words = random_words(seed, sample_id, position, tile * GROUPS, GROUPS, GROUP)
    else:  # a part of the four numbers that come together
        words = random_words(seed, sample_id, position, tile * GROUPS // 4 * 4, 4, GROUP)
        words = tl.reshape(words, [words.shape[0], 4 // GROUPS, GROUPS])
        is_part = tl.arange(0, 4 // GROUPS) == tile % (4 // GROUPS)
        words = tl.max(tl.where(is_part[None, :, None], words, 0), 1)
    return gumbel(words)


@triton.jit
def best_of_row(values, size, first, tiles, LANES: tl.constexpr):
    """The best score among values [3, size] from `first` on, `tiles` of them, and which it is."""
    lane = tl.arange(0, LANES)
    best = tl.full([LANES], float("-inf"), tl.float32)
    best_piece = tl.zeros([LANES], tl.int32)
    for start in range(0, tiles, LANES):
        piece = start + lane
        value = values + first + piece
        score = tl.load(value, mask=piece < tiles, other=float("-inf"))
        score += tl.load(value + size, mask=piece < tiles, other=0.0)
        best_piece = tl.where(score > best, piece, best_piece)
        best = tl.maximum(best, score)
    score = tl.max(best)
    piece = tl.min(tl.where(best == score, best_piece, 2147483647))
    return score, piece.to(tl.int64)


@triton.jit(do_not_specialize=["capacity"])
def pick_token_kernel(values, ids, capacity, tiles, rows, count, tokens, invalids, LANES: tl.constexpr):
    """Program i writes the token of the i-th self row."""
    slot = tl.program_id(0).to(tl.int64)
    if slot >= tl.load(count):
        return
    row = tl.load(rows + slot).to(tl.int64)
    first = slot * tiles
    score, piece = best_of_row(values, capacity.to(tl.int64) * tiles, first, tiles, LANES)
    valid = (score > float("-inf")) & (score < float("inf"))
    tl.store(tokens + row, tl.load(ids + first + piece, mask=valid), mask=valid)
    tl.store(invalids + row, valid == 0)


@triton.jit(do_not_specialize=["capacity"])
def pick_candidates_kernel(values, ids, capacity, tiles, rows, count, out_values, out_ids, LANES: tl.constexpr):
    """Program i writes the three candidates of the i-th self row into [N, 3, 3] and [N, 3]."""
    slot = tl.program_id(0).to(tl.int64)
    if slot >= tl.load(count):
        return
    row = tl.load(rows + slot).to(tl.int64)
    first = slot * (tiles + 2)
    size = capacity.to(tl.int64) * (tiles + 2)
    score, piece = best_of_row(values, size, first, tiles, LANES)
    has_best = score > float("-inf")
    first_mass, last_mass = tl.load(values + first + tiles), tl.load(values + first + tiles + 1)
    bad = (score == float("inf")) | (first_mass == float("inf")) | (last_mass == float("inf"))
    for place in tl.static_range(3):
        source = first + (tiles if place == 0 else (piece if place == 1 else tiles + 1))
        has_any = has_best if place == 1 else slot >= 0
        for part in tl.static_range(3):
            value = tl.load(values + part * size + source, mask=has_any, other=float("-inf"))
            tl.store(out_values + row * 9 + place * 3 + part, tl.where(bad, float("nan"), value))
        tl.store(out_ids + row * 3 + place, tl.load(ids + source, mask=has_any, other=-1))


Pieces = tuple[Tensor, Tensor, int, int]
"""values, ids, their number of slots, and of pieces that are no cut group."""


def score_pieces(head: Head, first_id, whole_begin, whole_end, cut_groups, how: Sampling, rows, count) -> Pieces:
    """The best group of each piece of the vocabulary, whose groups in whole_begin .. whole_end - 1 are whole."""
    head = factors(head)
    keys = how.seed, how.sample_ids.contiguous(), how.positions.contiguous()
    token_noise = gumbel_noise(*keys, GROUP_SIZE.value, TOKEN.value, rows, count)  # [N, 64]
    bounds = first_id, whole_begin, whole_end, cut_groups
    score = score_chunks if len(head.hidden) > FEW_ROWS and keeps_precision(head) else score_tiles
    return score(head, *bounds, rows, count, len(head.hidden), how.inv_temperature.contiguous(), *keys, token_noise)


def new_pieces(head: Head, pieces: int) -> tuple[Tensor, Tensor]:
    """values [3, N, pieces] and ids [N, pieces]."""
    ids = head.hidden.new_empty(len(head.hidden), pieces, dtype=torch.int64)
    return ids.new_empty(3, *ids.shape, dtype=torch.float32), ids


def score_tiles(head: Head, first_id, whole_begin, whole_end, cut_groups, *each_row) -> Pieces:
    """Pieces by `score_tile_kernel`."""
    capacity, end_id = len(head.hidden), first_id + len(head.weight)
    constants, options = tile_of(head, min(capacity, FEW_ROWS))
    tiles = triton.cdiv(end_id, constants["BLOCK_N"]) - first_id // constants["BLOCK_N"]
    pieces = tiles + cut_groups
    results = new_pieces(head, pieces)
    score_tile_kernel[(pieces * triton.cdiv(capacity, constants["BLOCK_M"]),)](
        *product_arguments(head), first_id, end_id, whole_begin, whole_end, tiles, pieces, *each_row, *results,
        **constants, **options,
    )  # fmt: skip
    return *results, capacity, tiles


def score_chunks(head: Head, first_id, whole_begin, whole_end, cut_groups, *each_row) -> Pieces:
    """Pieces by torch's product of a chunk at a time, and `score_span_kernel`."""
    capacity, end_id = len(head.hidden), first_id + len(head.weight)
    whole = [
        (max(begin, whole_begin), max(begin, whole_begin, min(end, whole_end)))
        for begin, end in chunk_bounds(len(head.weight), first_id)
    ]
    tiles = sum(spans_of(*part) for part in whole)
    results = new_pieces(head, tiles + cut_groups)
    piece = 0
    for (chunk_begin, chunk_end, product), part in zip(logit_chunks(head, first_id), whole, strict=True):
        stretches = [(part, piece, spans_of(*part))]
        piece += spans_of(*part)
        if cut_groups and chunk_begin == first_id:
            stretches.append(((first_id, min(whole_begin, end_id)), tiles, 1))
        if cut_groups and chunk_end == end_id:
            stretches.append(((max(whole_begin, whole_end), end_id), tiles + 1, 1))
        for (begin, end), first_piece, spans in stretches:
            if spans:
                score_span_kernel[(capacity * spans,)](
                    product, product.stride(0), head.logit_scale, head.softcap, chunk_begin, begin, end, first_piece,
                    spans, tiles + cut_groups, *each_row, *results, **SPAN, **OPTIONS,
                )  # fmt: skip
    return *results, capacity, tiles


@in_records
def linear_sample_mix(head: Head, reference: Tensor, how: Sampling) -> Mixed:
    """Tokens int64 [N], is_self and invalid bool [N]."""
    tokens = torch.empty_like(reference, memory_format=torch.contiguous_format)  # [N]
    is_self, invalid = (torch.empty_like(tokens, dtype=torch.bool) for _ in range(2))  # [N]
    results = tokens, is_self, invalid
    if len(tokens) == 0:
        return results
    how = in_rows(how)
    if how.filtered:
        order, drawn = draw_filtered(head, reference, how)
        for whole, part in zip(results, drawn, strict=True):
            whole[order] = part
        return results
    selected = select_rows(how.mask, reference.contiguous(), *results)
    pieces = score_pieces(head, 0, 0, len(head.weight), 0, how, *selected)
    pick_token_kernel[(len(tokens),)](*pieces, *selected, tokens, invalid, **REDUCTION, **OPTIONS)
    return results


def draw_filtered(head: Head, reference: Tensor, how: Sampling) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All rows int64 [N], first the self rows, and the results in that order.

    Logits of N / 8 rows are in memory at a time, or `LOGITS_BYTES`, since each time the whole head is read, and one row
    is searched for as long as many.
    """
    rows, count = select_rows(how.mask)
    order = rows.long()
    reference, how = reference[order], how.select(order)
    head = factors(head)
    vocab_size = len(head.weight)
    # What is rounded to 16 bits and left at that needs no more: a filter finds its cutoff in half the sweeps.
    dtype = head.hidden.dtype if head.softcap is None and head.logit_scale == 1.0 else torch.float32
    block = max(1, len(order) // 8, min(len(order), LOGITS_BYTES // (vocab_size * dtype.itemsize)))
    logits = head.hidden.new_empty(block, vocab_size, dtype=dtype)
    constants, options = tile_of(head, block)
    drawn = []
    for start in range(0, len(order), block):
        part = slice(start, min(start + block, len(order)))
        slots = part.stop - start
        grid = triton.cdiv(slots, constants["BLOCK_M"]) * triton.cdiv(vocab_size, constants["BLOCK_N"])
        logits_kernel[(grid,)](
            *product_arguments(head), vocab_size, rows, count, start, slots, logits, **constants, **options,
        )  # fmt: skip
        drawn.append(logits_sampling.sample_mix(logits[:slots], reference[part], *how.select(part)))
    return order, tuple(torch.cat(parts) for parts in zip(*drawn, strict=True))


@in_records
def linear_sample_shard(head: Head, first_id: int, how: Sampling) -> Candidates:
    """Values [N, 3, 3] and ids [N, 3] of a shard of the head, whose weight [V_shard, D] begins with `first_id`."""
    hidden, how = head.hidden, in_rows(how)
    values = torch.full((len(hidden), 3, 3), -torch.inf, device=hidden.device)
    ids = torch.full((len(hidden), 3), -1, device=hidden.device)
    if len(hidden):
        end_id, size = first_id + len(head.weight), GROUP_SIZE.value
        bounds = first_id, triton.cdiv(first_id, size) * size, end_id // size * size
        selected = select_rows(how.mask)
        pieces = score_pieces(head, *bounds, 2, how, *selected)
        pick_candidates_kernel[(len(hidden),)](*pieces, *selected, values, ids, **REDUCTION, **OPTIONS)
    return values, ids


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`."""
    reduced = {"values": "*fp32", "ids": "*i64", "capacity": "i32", "tiles": "i32"}
    results = {"tokens": "*i64", "invalids": "*i1"}
    candidates = {"out_values": "*fp32", "out_ids": "*i64"}
    tiles = {
        "inv_temperatures": "*fp32", "token_noise": "*fp32", "values": "*fp32", "ids": "*i64",
        "seed": "i64", "sample_ids": "*i64", "positions": "*i64",
    }  # fmt: skip
    spans = tiles | dict.fromkeys(("first_piece", "pieces", "capacity"), "i32")
    tiles |= dict.fromkeys(("first_id", "end_id", "whole_begin", "whole_end", "tiles", "pieces", "capacity"), "i32")
    block = dict.fromkeys(("vocab_size", "first_slot", "slots"), "i32")
    return [
        Configuration("pick_tokens", pick_token_kernel, reduced | SELECTED | results, REDUCTION, OPTIONS),
        Configuration("pick_candidates", pick_candidates_kernel, reduced | SELECTED | candidates, REDUCTION, OPTIONS),
        *product_configurations(target, "score_tile", score_tile_kernel, tiles),
        *chunk_configurations("score_span", score_span_kernel, spans),
        *product_configurations(target, "head_logits", logits_kernel, block, ("vocab_size",), out="out"),
    ]
