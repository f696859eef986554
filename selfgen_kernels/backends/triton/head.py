"""The LM head fused with sampling: logits live in registers, tile by tile, and only candidates reach memory.

1. `select_rows_kernel` packs the rows that are the model's own, so that tiles are full and the others cost nothing.
2. `score_tile_kernel` multiplies BLOCK_M of them with BLOCK_N ids and keeps, of each row, the best group: its
   logsumexp, G1, and its best token with z + G2. The token comes from the accumulators that the group was scored by.
3. A small kernel reduces the tiles' candidates: to tokens, or to the three candidates of a shard.

A reference's probability is found in the same way: `tile_mass_kernel` keeps the maximum and the sum of exponentials of
each tile, and the reference's logit.

A filter looks at whole rows: `logits_kernel` multiplies the selected rows a block at a time, and `sampling` draws. The
host knows no number of rows; all is launched for N of them, and what lies behind the selected ones returns at once.

Tiles begin at multiples of BLOCK_N in the whole vocabulary, also in a shard, so a group never straddles two tiles and
the constants below don't decide a token (a group's sum may round differently, nothing else). The groups that a shard's
ends cut are two tiles of their own. NaN becomes +inf, which max keeps, and makes the logsumexp of its group +inf: that
is how a row is found invalid.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.reference.sampling import Candidates, Mixed, Sampling, unscaled
from selfgen_kernels.backends.triton import sampling as logits_sampling
from selfgen_kernels.backends.triton.configuration import Configuration, current_target
from selfgen_kernels.backends.triton.dot import factor_of_dot, rounded
from selfgen_kernels.backends.triton.noise import GROUP, OPTIONS, TOKEN, gumbel, gumbel_noise, in_mask, random_words
from selfgen_kernels.backends.triton.sampling import GROUP_SIZE, group_mass

FEW_ROWS = 64  # at most these: a smaller tile
ROWS = 1024  # that select_rows_kernel looks at at a time
LOGITS_BYTES = 2**26  # of filtered rows, in memory at a time
PIECES, SLOTS = 64, 16  # candidates that the reductions look at at a time, and rows a program


@triton.jit(do_not_specialize=["seed", "size"])
def select_rows_kernel(
    thresholds, seed, sample_ids, positions, size, rows, count, reference, tokens, is_selfs, invalids,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program writes which rows are the model's own, then which are not, how many are, and the others' results."""
    selected = 0
    for start in range(0, size, ROWS):
        row = start + tl.arange(0, ROWS)
        exists = row < size
        sample_id = tl.load(sample_ids + row, mask=exists, other=0)[:, None]
        position = tl.load(positions + row, mask=exists, other=0)[:, None]
        threshold = tl.load(thresholds + row, mask=exists, other=-1)
        is_self = in_mask(seed, sample_id, position, threshold)  # [ROWS]
        before = selected + tl.cumsum(is_self.to(tl.int32), 0) - is_self.to(tl.int32)  # [ROWS] selected ones
        tl.store(rows + tl.where(is_self, before, size - 1 - (row - before)), row, mask=exists)
        selected += tl.sum(is_self.to(tl.int32))
        if tokens is not None:
            tl.store(tokens + row, tl.load(reference + row, mask=exists), mask=exists)
            tl.store(is_selfs + row, is_self, mask=exists)
            tl.store(invalids + row, tl.zeros_like(is_self), mask=exists)
    tl.store(count, selected)


@triton.jit
def multiply_tile(
    hidden, hidden_stride, weight, weight_stride, bias, hidden_size, logit_scale, softcap,
    row, is_row, column, is_column, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """fp32 [M, N]: the head's logits of `row` [M] at `column` [N], rounded to its dtype as those of a linear layer."""
    k = tl.arange(0, BLOCK_K)
    hidden_tile = hidden + row[:, None] * hidden_stride + k[None, :]  # [M, BLOCK_K]
    weight_tile = weight + column[None, :] * weight_stride + k[:, None]  # [BLOCK_K, N]
    logits = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for first_k in range(0, hidden_size, BLOCK_K):
        is_k = first_k + k < hidden_size
        left = tl.load(hidden_tile + first_k, mask=is_row[:, None] & is_k[None, :], other=0.0)
        right = tl.load(weight_tile + first_k, mask=is_column[None, :] & is_k[:, None], other=0.0)
        logits = tl.dot(factor_of_dot(left), factor_of_dot(right), logits, input_precision="ieee")
    if bias is not None:
        logits += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    logits = rounded(logits, weight.dtype.element_ty).to(tl.float32) * logit_scale
    if softcap is not None:
        logits = softcap * tanh(logits / softcap)
    return logits


@triton.jit(do_not_specialize=["seed", "capacity"])  # a capacity of 1 would be no tensor
def score_tile_kernel(
    hidden, hidden_stride, weight, weight_stride, bias, hidden_size, logit_scale, softcap,
    first_id, end_id, whole_begin, whole_end, tiles, pieces,
    rows, count, capacity, inv_temperatures, seed, sample_ids, positions, token_noise, values, ids,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (piece, rows) writes its best group into values [pieces, 3, capacity] and ids [pieces, capacity].

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

    capacity = capacity.to(tl.int64)
    value = values + piece * 3 * capacity + slot
    tl.store(value, best_mass, mask=is_row)
    tl.store(value + capacity, best_noise, mask=is_row)
    tl.store(value + 2 * capacity, inner, mask=is_row)
    tl.store(ids + piece * capacity + slot, token, mask=is_row)


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
    """The log probabilities of the references of SLOTS of the model's own rows, from the masses of all tiles."""
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
def tanh(x):
    """tanh with the absolute precision of fp32, in two instructions of the special function unit."""
    decay = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -size, size)


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
def best_of_rows(values, capacity, tiles, rows, count, PIECES: tl.constexpr, SLOTS: tl.constexpr):
    """Of this program's slots [SLOTS]: number, whether there is a row, which, its best score and that score's tile."""
    selected = tl.load(count)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    is_row = slot < selected
    row = tl.load(rows + slot, mask=is_row, other=0).to(tl.int64)

    lane = tl.arange(0, PIECES)[:, None]
    best = tl.full([PIECES, SLOTS], float("-inf"), tl.float32)
    best_piece = tl.zeros([PIECES, SLOTS], tl.int32)
    tiles = tl.where(tl.program_id(0) * SLOTS < selected, tiles, 0)  # no row, no work
    for start in range(0, tiles, PIECES):
        piece = start + lane
        exists = (piece < tiles) & is_row[None, :]
        value = values + piece * 3 * capacity + slot[None, :]
        score = tl.load(value, mask=exists, other=float("-inf")) + tl.load(value + capacity, mask=exists, other=0.0)
        best_piece = tl.where(score > best, piece, best_piece)
        best = tl.maximum(best, score)
    score = tl.max(best, 0)
    piece = tl.min(tl.where(best == score[None, :], best_piece, 2147483647), 0)
    return slot, is_row, row, score, piece.to(tl.int64)


@triton.jit(do_not_specialize=["capacity"])
def pick_token_kernel(
    values, ids, capacity, tiles, rows, count, tokens, invalids,
    PIECES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The tokens of SLOTS of the model's own rows."""
    capacity = capacity.to(tl.int64)
    slot, is_row, row, score, piece = best_of_rows(values, capacity, tiles, rows, count, PIECES, SLOTS)
    valid = (score > float("-inf")) & (score < float("inf"))
    tl.store(tokens + row, tl.load(ids + piece * capacity + slot, mask=is_row & valid), mask=is_row & valid)
    tl.store(invalids + row, ~valid, mask=is_row)


@triton.jit(do_not_specialize=["capacity"])
def pick_candidates_kernel(
    values, ids, capacity, tiles, rows, count, out_values, out_ids,
    PIECES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The three candidates of SLOTS of the model's own rows, into [N, 3, 3] and [N, 3]."""
    capacity = capacity.to(tl.int64)
    slot, is_row, row, score, piece = best_of_rows(values, capacity, tiles, rows, count, PIECES, SLOTS)
    has_best = score > float("-inf")
    first_cut, last_cut = tl.zeros_like(piece) + tiles, tl.zeros_like(piece) + tiles + 1
    first_mass = tl.load(values + first_cut * 3 * capacity + slot, mask=is_row, other=0.0)
    last_mass = tl.load(values + last_cut * 3 * capacity + slot, mask=is_row, other=0.0)
    bad = (score == float("inf")) | (first_mass == float("inf")) | (last_mass == float("inf"))
    for place in tl.static_range(3):
        source = first_cut if place == 0 else (piece if place == 1 else last_cut)
        has_any = is_row & has_best if place == 1 else is_row
        for part in tl.static_range(3):
            value = tl.load(values + (source * 3 + part) * capacity + slot, mask=has_any, other=float("-inf"))
            tl.store(out_values + row * 9 + place * 3 + part, tl.where(bad, float("nan"), value), mask=is_row)
        tl.store(
            out_ids + row * 3 + place, tl.load(ids + source * capacity + slot, mask=has_any, other=-1), mask=is_row
        )


def tile_constants(target: str, dtype: str, rows: int, aligned: bool) -> tuple[dict, dict]:
    """Tile and launch options of the products, for `dtype` and at most `rows` of the model's own rows.

    `aligned`: its sizes and strides are divisible by 16. If not, loads are narrow and take more registers.
    """
    if dtype == "fp32":  # no tensor cores
        tile, warps, stages = ((64, 64, 32), 8, 2) if target == "gfx942" else ((64, 64, 16), 4, 2)
    elif not aligned:
        tile, warps, stages = (64, 128, 32), 8, 2
    else:
        few = rows <= FEW_ROWS
        tile, warps = (64 if few else 128, 128, 64), 4 if few else 8
        stages = 2 if target == "gfx942" else 3  # 64 KiB of shared memory
    names = "BLOCK_M", "BLOCK_N", "BLOCK_K"
    return dict(zip(names, tile, strict=True)), OPTIONS | {"num_warps": warps, "num_stages": stages}


_PICK = {"PIECES": PIECES, "SLOTS": SLOTS}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def select_rows(how: Sampling, reference, tokens, is_self, invalid) -> tuple[Tensor, Tensor]:
    """All rows int32 [N], first the model's own, their count [1]; sets the results of the others if they are given."""
    size = len(how.threshold)
    rows = torch.empty_like(how.threshold, dtype=torch.int32, memory_format=torch.contiguous_format)
    count = rows.new_empty(1)
    select_rows_kernel[(1,)](
        how.threshold.contiguous(), how.seed, how.sample_ids.contiguous(), how.positions.contiguous(), size, rows,
        count, reference, tokens, is_self, invalid, ROWS=ROWS, **OPTIONS,
    )  # fmt: skip
    return rows, count


def factors(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three as kernels take them."""
    if hidden.dtype == torch.float64:
        hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    return hidden, weight, None if bias is None else bias.contiguous()


def tile_of(hidden: Tensor, weight: Tensor, rows: int) -> tuple[dict, dict]:
    """`tile_constants` for at most `rows` of the model's own rows."""
    sizes = hidden.shape[1], hidden.stride(0), weight.stride(0)
    aligned = all(size % 16 == 0 for size in sizes)  # as Triton tells them apart
    return tile_constants(current_target(), _NAMES[hidden.dtype], rows, aligned)


def score_tiles(
    hidden, weight, bias, softcap, logit_scale, first_id, whole_begin, whole_end, cut_groups, how: Sampling, rows, count
) -> tuple[Tensor, Tensor, int, int]:
    """Launch `score_tile_kernel`: values, ids, their number of slots, and of pieces that are tiles."""
    hidden, weight, bias = factors(hidden, weight, bias)
    capacity, end_id = len(hidden), first_id + len(weight)
    constants, options = tile_of(hidden, weight, capacity)
    tiles = triton.cdiv(end_id, constants["BLOCK_N"]) - first_id // constants["BLOCK_N"]
    pieces = tiles + cut_groups
    values = hidden.new_empty(pieces, 3, capacity, dtype=torch.float32)
    ids = hidden.new_empty(pieces, capacity, dtype=torch.int64)
    keys = how.seed, how.sample_ids.contiguous(), how.positions.contiguous()
    token_noise = gumbel_noise(*keys, GROUP_SIZE.value, TOKEN.value, rows, count)  # [capacity, 64]
    score_tile_kernel[(pieces * triton.cdiv(capacity, constants["BLOCK_M"]),)](
        hidden, hidden.stride(0), weight, weight.stride(0), bias,
        hidden.shape[1], logit_scale, softcap, first_id, end_id, whole_begin, whole_end, tiles, pieces,
        rows, count, capacity, how.inv_temperature.contiguous(), *keys, token_noise, values, ids,
        **constants, **options,
    )  # fmt: skip
    return values, ids, capacity, tiles


def linear_sample_mix(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    reference: Tensor,
    *sampling,
) -> Mixed:
    """Tokens int64 [N], is_self and invalid bool [N] from hidden [N, D], weight [V, D] and a `Sampling`."""
    how = Sampling(*sampling)
    tokens = torch.empty_like(reference, memory_format=torch.contiguous_format)  # [N]
    is_self, invalid = (torch.empty_like(tokens, dtype=torch.bool) for _ in range(2))  # [N]
    results = tokens, is_self, invalid
    if len(tokens) == 0:
        return results
    if how.filtered:
        order, drawn = draw_filtered(hidden, weight, bias, softcap, logit_scale, reference, how)
        for whole, part in zip(results, drawn, strict=True):
            whole[order] = part
        return results
    selected = select_rows(how, reference.contiguous(), *results)
    pieces = score_tiles(hidden, weight, bias, softcap, logit_scale, 0, 0, len(weight), 0, how, *selected)
    pick_token_kernel[(triton.cdiv(len(tokens), SLOTS),)](*pieces, *selected, tokens, invalid, **_PICK, **OPTIONS)
    return results


def draw_filtered(
    hidden, weight, bias, softcap, logit_scale, reference, how: Sampling
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All rows int64 [N], first the model's own, and the results in that order.

    Logits of N / 8 rows are in memory at a time, or `LOGITS_BYTES`, since each time the whole head is read, and one row
    is searched for as long as many.
    """
    rows, count = select_rows(how, None, None, None, None)
    order = rows.long()
    reference, how = reference[order], how.select(order)
    hidden, weight, bias = factors(hidden, weight, bias)
    vocab_size = len(weight)
    # What is rounded to 16 bits and left at that needs no more: a filter finds its cutoff in half the sweeps.
    dtype = hidden.dtype if softcap is None and logit_scale == 1.0 else torch.float32
    block = max(1, len(order) // 8, min(len(order), LOGITS_BYTES // (vocab_size * dtype.itemsize)))
    logits = hidden.new_empty(block, vocab_size, dtype=dtype)
    constants, options = tile_of(hidden, weight, block)
    drawn = []
    for start in range(0, len(order), block):
        part = slice(start, min(start + block, len(order)))
        slots = part.stop - start
        grid = triton.cdiv(slots, constants["BLOCK_M"]) * triton.cdiv(vocab_size, constants["BLOCK_N"])
        logits_kernel[(grid,)](
            hidden, hidden.stride(0), weight, weight.stride(0), bias, hidden.shape[1], logit_scale, softcap, vocab_size,
            rows, count, start, slots, logits, **constants, **options,
        )  # fmt: skip
        drawn.append(logits_sampling.sample_mix(logits[:slots], reference[part], *how.select(part)))
    return order, tuple(torch.cat(parts) for parts in zip(*drawn, strict=True))


def linear_sample_shard(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    first_id: int,
    *sampling,
) -> Candidates:
    """Values [N, 3, 3] and ids [N, 3] of the shard weight [V_shard, D], whose row 0 is the head of `first_id`."""
    how = Sampling(*sampling)
    values = torch.full((len(hidden), 3, 3), -torch.inf, device=hidden.device)
    ids = torch.full((len(hidden), 3), -1, device=hidden.device)
    if len(hidden):
        end_id, size = first_id + len(weight), GROUP_SIZE.value
        bounds = first_id, triton.cdiv(first_id, size) * size, end_id // size * size
        selected = select_rows(how, None, None, None, None)
        pieces = score_tiles(hidden, weight, bias, softcap, logit_scale, *bounds, 2, how, *selected)
        pick_candidates_kernel[(triton.cdiv(len(hidden), SLOTS),)](*pieces, *selected, values, ids, **_PICK, **OPTIONS)
    return values, ids


def linear_reference_log_prob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    reference: Tensor,
    *keys,
) -> Tensor:
    """log softmax(logits)[reference] fp32 [N] of the rows that the mask selects, 0 of others."""
    size = len(hidden)
    log_probs = hidden.new_zeros(size, dtype=torch.float32)
    if size == 0:
        return log_probs
    rows, count = select_rows(unscaled(*keys), None, None, None, None)
    hidden, weight, bias = factors(hidden, weight, bias)
    constants, options = tile_of(hidden, weight, size)
    tiles = triton.cdiv(len(weight), constants["BLOCK_N"])
    values = hidden.new_empty(tiles, 2, size, dtype=torch.float32)
    found = torch.full_like(log_probs, -torch.inf)
    tile_mass_kernel[(tiles * triton.cdiv(size, constants["BLOCK_M"]),)](
        hidden, hidden.stride(0), weight, weight.stride(0), bias, hidden.shape[1], logit_scale, softcap, len(weight),
        tiles, rows, count, size, reference.contiguous(), values, found, **constants, **options,
    )  # fmt: skip
    log_prob_kernel[(triton.cdiv(size, SLOTS),)](values, found, size, tiles, rows, count, log_probs, **_PICK, **OPTIONS)
    return log_probs


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`."""
    keys = {"seed": "i64", "sample_ids": "*i64", "positions": "*i64"}
    rows = {"rows": "*i32", "count": "*i32"}
    reduced = {"values": "*fp32", "ids": "*i64", "capacity": "i32", "tiles": "i32"}
    log_probs = {"values": "*fp32", "found": "*fp32", "capacity": "i32", "tiles": "i32", "log_probs": "*fp32"}
    mask = {"thresholds": "*i64", **keys, "size": "i32", **rows}
    outputs = {"reference": "*i64", "tokens": "*i64", "is_selfs": "*i1", "invalids": "*i1"}
    candidates = {"out_values": "*fp32", "out_ids": "*i64"}
    results = {"tokens": "*i64", "invalids": "*i1"}
    ships = [
        Configuration("select_rows", select_rows_kernel, mask | outputs, {"ROWS": ROWS}, OPTIONS),
        Configuration("select_rows[shard]", select_rows_kernel, mask, dict.fromkeys(outputs) | {"ROWS": ROWS}, OPTIONS),
        Configuration("pick_tokens", pick_token_kernel, reduced | rows | results, _PICK, OPTIONS),
        Configuration("head_log_prob", log_prob_kernel, log_probs | rows, _PICK, OPTIONS),
        Configuration("pick_candidates", pick_candidates_kernel, reduced | rows | candidates, _PICK, OPTIONS),
    ]
    numbers = ("first_id", "end_id", "whole_begin", "whole_end", "tiles", "pieces", "capacity")
    for dtype in _NAMES.values():
        product = {
            "hidden": f"*{dtype}", "hidden_stride": "i64", "weight": f"*{dtype}", "weight_stride": "i64",
            "hidden_size": "i32", "logit_scale": "fp32", **rows,
        }  # fmt: skip
        tiles = {
            "inv_temperatures": "*fp32", "token_noise": "*fp32", "values": "*fp32", "ids": "*i64", **keys,
            **dict.fromkeys(numbers, "i32"),
        }  # fmt: skip
        block = dict.fromkeys(("vocab_size", "first_slot", "slots"), "i32")
        masses = dict.fromkeys(("vocab_size", "tiles", "capacity"), "i32") | {
            "reference": "*i64", "values": "*fp32", "found": "*fp32",
        }  # fmt: skip
        optional = {"bias": f"*{dtype}", "softcap": "fp32"}
        few = [("few rows", FEW_ROWS, True)] if dtype != "fp32" else []
        for label, rows_at_most, aligned in (*few, ("many rows", FEW_ROWS + 1, True), ("odd sizes", 1, False)):
            for extra, present, absent in (("", {}, dict.fromkeys(optional)), (", bias, softcap", optional, {})):
                constants, options = tile_constants(target, dtype, rows_at_most, aligned)
                divisible = ("hidden_stride", "weight_stride", "hidden_size") if aligned else ()
                for name, kernel, others, sizes in (
                    ("score_tile", score_tile_kernel, tiles, ()),
                    ("tile_mass", tile_mass_kernel, masses, ("vocab_size",)),
                    ("head_logits", logits_kernel, block | {"out": "*fp32" if extra else f"*{dtype}"}, ("vocab_size",)),
                ):
                    ships.append(
                        Configuration(
                            f"{name}[{dtype}, {label}{extra}]", kernel, product | others | present, absent | constants,
                            options, divisible + sizes if aligned else (), streams=aligned,
                            tensor_cores=dtype != "fp32",
                        )
                    )  # fmt: skip
    return ships
