"""`kv_append` and `ragged_attention`: streaming softmax (flash attention, arXiv 2205.14135) over a flat K/V cache.

A tile holds ROWS rows of one chunk and one K/V head; a row is one query of one of the heads that share the K/V head.
The grid depends on shapes only: a program finds its chunk in `cu_seqlens_q` on the device. Chunk b owns the tiles from
`cu_seqlens_q[b] * group // ROWS + b` on, which are at least as many as its rows fill; queries past the last chunk are
one more chunk that sees nothing.

Keys are taken in segments that start at multiples of SEGMENT from the first key of the range, and in each in blocks of
KEYS. A segment is summed up from nothing, and segments are merged from the first to the last by `merged`, whether one
program has all of them or each has one: then they meet in memory, and `merge_kernel` puts them together. One tile shape
serves chunks of all lengths, what a row does not see adds exact zeros, and no multiply-add is fused, which compilers do
as they like. So a row's bits depend neither on how chunks are cut nor on how segments are shared out.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.triton.configuration import Configuration, current_target
from selfgen_kernels.backends.triton.dot import factor_of_dot, rounded

LOG2_E = tl.constexpr(1.4426950408889634)
SEARCH = tl.constexpr(128)  # chunks looked at together
SEGMENT = 512  # keys that are summed up from nothing; results depend on it
PROGRAMS = 2048  # at most so many may have work in a launch, where segments are shared out
PARTIAL_BYTES = 2**26  # of segments' sums in memory
MOST_COLUMNS = 256  # numbers of a value that a program sums up
MERGED_COLUMNS = 64  # numbers of a value that a program merges
BLOCK = 1024  # most numbers of a token that a program of kv_append copies
TILE = 2048  # numbers of K, and of V, that it copies
APPEND_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
MERGE_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


def attention_tile(head_dim: int, dtype: torch.dtype, target: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tile, options) for a head size and `dtype`: sizes that spill on none of the targets.

    A program sums up COLUMNS numbers of a value, and takes the product of a query and a key PART numbers at a time.
    64 rows are the fewest that tensor cores of sm_90 and sm_100 multiply. A decode step fills few of them, but it waits
    for memory: per byte of K/V the tile does 64 operations, and an H100 could do 295.

    In fp32, NVIDIA's tensor cores multiply three times, 16 rows at a time (`tf32x3`). Of each factor they take 11 bits,
    then the first 11 of the rest; the product of the rests is left out. So a product of two numbers is off by less than
    2^-19 of itself, which is what fp32 may lose in a sum of 32 of them. In fp64, and on AMD, nothing is left out.
    """
    width = max(16, triton.next_power_of_2(head_dim))
    columns, amd = min(width, MOST_COLUMNS), target == "gfx942"
    tile = {
        "ROWS": 64,
        "KEYS": 32,
        "PART": width if width <= 128 else 128 if amd else 64,
        "COLUMNS": columns,
        "PRECISION": "ieee",
    }
    options = {"num_warps": 4 if columns <= 64 else 8, "num_stages": 2, "enable_fp_fusion": False}
    if dtype == torch.float32 and not amd:
        tile |= {"ROWS": 16, "PART": min(width, 64), "PRECISION": "tf32x3"}
        options |= {"num_warps": 4 if columns <= 128 else 8}
    elif dtype.itemsize > 2:
        columns = min(width, MOST_COLUMNS * 4 // dtype.itemsize)
        warps = 8 if columns * dtype.itemsize <= 512 else 16
        part = 128 if dtype == torch.float32 else 4 * warps
        tile |= {"ROWS": 16, "KEYS": 16, "PART": min(width, part), "COLUMNS": columns}
        if amd:  # wavefronts of 64 lanes, warps of 32: 128 bits of K/V for each
            warps //= 2
        else:  # all registers there are: ptxas spills to have room for a second program
            options["maxnreg"] = min(255, 65536 // (32 * warps))
        options |= {"num_warps": warps, "num_stages": 1}
    return tile, options


@triton.jit(do_not_specialize=["tokens", "num_slots"])  # sizes that change from pass to pass
def kv_append_kernel(
    key_cache, key_cache_stride, key_cache_head_stride, value_cache, value_cache_stride, value_cache_head_stride,
    key, key_stride, key_head_stride, value, value_stride, value_head_stride, slots, tokens, num_slots, width,
    HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (t, b) copies numbers b * BLOCK .. of K and V, [kv_heads, HEAD_DIM] each, of tokens t * TOKENS .."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + token, mask=token < tokens, other=-1)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head, column = (number // HEAD_DIM).to(tl.int64)[None, :], (number % HEAD_DIM)[None, :]
    exists = ((slot >= 0) & (slot < num_slots))[:, None] & (number < width)[None, :]
    k = tl.load(key + token[:, None] * key_stride + head * key_head_stride + column, mask=exists)
    v = tl.load(value + token[:, None] * value_stride + head * value_head_stride + column, mask=exists)
    row = slot[:, None]
    tl.store(key_cache + row * key_cache_stride + head * key_cache_head_stride + column, k, mask=exists)
    tl.store(value_cache + row * value_cache_stride + head * value_cache_head_stride + column, v, mask=exists)


@triton.jit
def find_chunk(cu_seqlens_q, chunks, queries, tile, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """(chunk, its first query, its last query + 1, the tile's first row in it); chunk == chunks is the padding."""
    before = 0
    for start in range(0, chunks + 1, SEARCH):
        index = start + tl.arange(0, SEARCH)
        bound = tl.load(cu_seqlens_q + index, mask=index <= chunks, other=0).to(tl.int64)
        before += tl.sum(((index <= chunks) & (bound * GROUP // ROWS + index <= tile)).to(tl.int32))
    chunk = tl.maximum(before - 1, 0)
    begin = tl.load(cu_seqlens_q + chunk).to(tl.int64)
    end = tl.load(cu_seqlens_q + chunk + 1, mask=chunk < chunks, other=queries).to(tl.int64)
    first_row = (tile - begin * GROUP // ROWS - chunk) * ROWS
    return chunk, tl.maximum(begin, 0), tl.minimum(end, queries), tl.maximum(first_row, 0)


@triton.jit
def tile_of_rows(
    cu_seqlens_q, kv_ranges, queries, chunks, slots, window, segments,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """What is known of tile program_id(0) before a key is read.

    Its queries [ROWS] and their heads, counted from the first that shares the K/V head; which of them exist, and the
    last key that each sees; the first slot of the range; whether the range can't be read; the first segment, the number
    of segments, and that of programs that share them: none where there is no row, and one if more than `segments`.
    """
    tile = tl.program_id(0).to(tl.int64)
    chunk, begin, end, first_row = find_chunk(cu_seqlens_q, chunks, queries, tile, GROUP, ROWS)
    start = tl.load(kv_ranges + 2 * chunk, mask=chunk < chunks, other=0)
    length = tl.load(kv_ranges + 2 * chunk + 1, mask=chunk < chunks, other=0)
    # No range is read that leaves the cache: its queries give NaN. Padding has no keys.
    fits = (start >= 0) & (length >= end - begin) & (length <= 2**30) & (start <= slots - length)
    invalid = (chunk < chunks) & ~fits
    length = tl.where(invalid, 0, length).to(tl.int32)
    row = first_row + tl.arange(0, ROWS)  # [ROWS]: query * GROUP + head
    index = begin + row // GROUP
    last = tl.minimum(length - (end - index).to(tl.int32), length - 1)  # [ROWS]
    first_segment = tl.maximum(tl.min(last) - window + 1, 0) // SEGMENT
    count = tl.cdiv(tl.max(last) + 1, SEGMENT) - first_segment
    programs = tl.where((count > 1) & (count <= segments), count, 1)
    programs = tl.where(first_row < (end - begin) * GROUP, programs, 0)
    return index, row % GROUP, index < end, last, start, invalid, first_segment, count, programs


@triton.jit
def attend_blocks(
    query, row_exists, key, key_stride, value, value_stride, begin, end, last, scale, softcap, window, first_column,
    KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Largest logit [ROWS] of keys `begin` .. `end` - 1, weights' sum [ROWS], weighted values' sum [ROWS, COLUMNS].

    Logits are in units of log 2, weights relative to the largest, values those from `first_column` on. `query` is
    [ROWS, PART], or if PART < HEAD_DIM pointers [ROWS, 1], from which PART numbers at a time are read for each block of
    keys. A row sees keys up to `last` [ROWS]. Careful: a value that is not finite makes only the rows that see it NaN.
    Otherwise it meets the zero weights of the others.
    """
    IS_FP64: tl.constexpr = key.dtype.element_ty == tl.float64
    NUMBER: tl.constexpr = tl.float64 if IS_FP64 else tl.float32
    offset, number, column = tl.arange(0, KEYS), tl.arange(0, PART)[None, :], tl.arange(0, COLUMNS)[None, :]
    column += first_column
    largest = tl.full(last.shape, float("-inf"), NUMBER)
    total = tl.zeros(last.shape, NUMBER)
    out = tl.zeros([last.shape[0], COLUMNS], NUMBER)
    for start in tl.range(0, end - begin, KEYS, num_stages=1 if CAREFUL else None):
        at = begin + start + offset
        slot = tl.minimum(at, end - 1).to(tl.int64)[:, None]
        if PART >= HEAD_DIM:
            k = tl.load(key + slot * key_stride + number, mask=number < HEAD_DIM, other=0.0)
            scores = tl.dot(factor_of_dot(query), tl.trans(factor_of_dot(k)), input_precision=PRECISION)
        else:
            scores = tl.zeros([last.shape[0], KEYS], NUMBER)
            for first in tl.range(0, HEAD_DIM, PART):
                part = first + number
                q = tl.load(query + part, mask=row_exists[:, None] & (part < HEAD_DIM), other=0.0)
                k = tl.load(key + slot * key_stride + part, mask=part < HEAD_DIM, other=0.0)
                k = tl.trans(factor_of_dot(k))
                scores = tl.dot(factor_of_dot(q), k, scores, input_precision=PRECISION, out_dtype=NUMBER)
        scores *= scale  # [ROWS, KEYS]
        if softcap is not None:
            scores = softcap * (2 * tl.sigmoid(2 * scores) - 1)  # tanh
        visible = (last[:, None] - at[None, :]).to(tl.uint32) < window  # one comparison: what is negative wraps around
        scores = tl.where(visible, scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(now == float("-inf"), 0.0, now)  # a row that has seen nothing yet
        weights = tl.exp2(scores - shift[:, None])
        factor = tl.exp2(largest - shift)
        largest = now
        total = total * factor + tl.sum(weights, 1)
        from_value = value + slot * value_stride + column
        exists = column < HEAD_DIM
        if CAREFUL:
            zero = tl.sum(tl.load(from_value, mask=exists, other=0.0).to(NUMBER) * 0, 1)  # [KEYS], or NaN
            total += tl.sum(tl.where(visible, zero[None, :], 0.0), 1)
            exists = exists & (zero == 0)[:, None]
        v = tl.load(from_value, mask=exists, other=0.0)
        weights = factor_of_dot(rounded(weights, v.dtype))
        out = tl.dot(weights, factor_of_dot(v), out * factor[:, None], input_precision=PRECISION, out_dtype=NUMBER)
    return largest, total, out


@triton.jit
def merged(largest, total, out, next_largest, next_total, next_out):
    """What `attend_blocks` gives for some keys, and then for those that follow. After nothing, no bit changes."""
    now = tl.maximum(largest, next_largest)
    shift = tl.where(now == float("-inf"), 0.0, now)
    factor, next_factor = tl.exp2(largest - shift), tl.exp2(next_largest - shift)
    out = out * factor[:, None] + next_out * next_factor[:, None]
    return now, total * factor + next_total * next_factor, out


@triton.jit
def before_keys(sinks, head, is_later, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NUMBER: tl.constexpr):
    """What rows of `head` [ROWS] start from: nothing, or their sink, unless it is for others to start from."""
    largest = tl.full([ROWS], float("-inf"), NUMBER)
    total = tl.zeros([ROWS], NUMBER)
    if sinks is not None:
        largest = tl.where(is_later, largest, tl.load(sinks + head).to(NUMBER) * LOG2_E)
        total = tl.where(largest == float("-inf"), total, 1.0)
    return largest, total, tl.zeros([ROWS, COLUMNS], NUMBER)


@triton.jit
def store_rows(out, place, column, row_exists, total, sums, HEAD_DIM: tl.constexpr):
    """Weighted means into rows `place` [ROWS] of out [.., HEAD_DIM]; 0 where there is no weight."""
    result = sums / tl.where(total == 0, 1.0, total)[:, None]
    mask = row_exists[:, None] & (column < HEAD_DIM)
    tl.store(out + place[:, None] * HEAD_DIM + column, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["queries", "chunks", "slots", "segments"])
def ragged_attention_kernel(
    query, query_stride, query_head_stride, key, key_stride, key_head_stride, value, value_stride, value_head_stride,
    cu_seqlens_q, kv_ranges, sinks, out, partial_sums, partial_stats, queries, chunks, slots, segments, scale, softcap,
    window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SEGMENT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile, K/V head and columns, 0) writes up to ROWS rows of out [N, HEADS, HEAD_DIM].

    Where segments are shared out, program (.., .., i) takes the i-th. It writes weighted values to partial_sums
    [segments, N, HEADS, HEAD_DIM], the largest logit and the sum of weights to partial_stats [segments, parts, 2, N,
    HEADS]: of each part of the columns, as the sum is NaN where a value of the part is not finite.
    """
    index, head, row_exists, last, first_slot, invalid, segment, count, programs = tile_of_rows(
        cu_seqlens_q, kv_ranges, queries, chunks, slots, window, segments, GROUP, ROWS, SEGMENT
    )
    if tl.program_id(2) >= programs:
        return
    is_shared = programs > 1
    PARTS: tl.constexpr = (HEAD_DIM + COLUMNS - 1) // COLUMNS
    kv_head = (tl.program_id(1) // PARTS).to(tl.int64)
    part = tl.program_id(1) % PARTS
    first_column = part * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)[None, :]
    head += kv_head * GROUP
    place = index * HEADS + head  # [ROWS]
    q = query + index[:, None] * query_stride + head[:, None] * query_head_stride  # [ROWS, 1]
    if PART >= HEAD_DIM:
        number = tl.arange(0, PART)[None, :]
        q = tl.load(q + number, mask=row_exists[:, None] & (number < HEAD_DIM), other=0.0)  # [ROWS, PART]

    IS_FP64: tl.constexpr = query.dtype.element_ty == tl.float64
    NUMBER: tl.constexpr = tl.float64 if IS_FP64 else tl.float32
    if IS_FP64:  # as an argument, a number would be fp32
        scale = tl.load(scale)
        softcap = tl.load(softcap) if softcap is not None else None
    low, high = tl.maximum(tl.min(last) - window + 1, 0) // KEYS * KEYS, tl.max(last) + 1
    key += first_slot * key_stride + kv_head * key_head_stride
    value += first_slot * value_stride + kv_head * value_head_stride
    largest, total, sums = before_keys(sinks, head, is_shared, ROWS, COLUMNS, NUMBER)
    segment += tl.program_id(2)
    # Loops count from 0 by constants: in nested ones that do not, the compiler forgets how pointers are aligned.
    for _ in range(tl.where(is_shared, 1, count)):
        begin, end = tl.maximum(segment * SEGMENT, low), tl.minimum((segment + 1) * SEGMENT, high)
        its_largest, its_total, its_sums = attend_blocks(
            q, row_exists, key, key_stride, value, value_stride, begin, end, last, scale, softcap, window,
            first_column, KEYS, HEAD_DIM, COLUMNS, PART, PRECISION, CAREFUL=False,
        )  # fmt: skip
        if tl.sum(its_sums * 0) != 0:  # NaN, if one is not finite
            its_largest, its_total, its_sums = attend_blocks(
                q, row_exists, key, key_stride, value, value_stride, begin, end, last, scale, softcap, window,
                first_column, KEYS, HEAD_DIM, COLUMNS, PART, PRECISION, CAREFUL=True,
            )  # fmt: skip
        largest, total, sums = merged(largest, total, sums, its_largest, its_total, its_sums)
        segment += 1
    if is_shared:
        rows = queries.to(tl.int64) * HEADS
        partial = tl.program_id(2) * rows
        mask = row_exists[:, None] & (column < HEAD_DIM)
        tl.store(partial_sums + (partial + place)[:, None] * HEAD_DIM + column, sums, mask=mask)
        stats = partial_stats + 2 * (partial * PARTS + part * rows) + place
        tl.store(stats, largest, mask=row_exists)
        tl.store(stats + rows, total, mask=row_exists)
    else:
        sums = tl.where(invalid, float("nan"), sums)
        store_rows(out, place, column, row_exists, total, sums, HEAD_DIM)


@triton.jit(do_not_specialize=["queries", "chunks", "slots", "segments"])
def merge_kernel(
    cu_seqlens_q, kv_ranges, sinks, out, partial_sums, partial_stats, queries, chunks, slots, segments, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SEGMENT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (tile, K/V head and columns) writes rows of out [N, HEADS, HEAD_DIM] whose segments are shared."""
    index, head, row_exists, _, _, _, _, count, programs = tile_of_rows(
        cu_seqlens_q, kv_ranges, queries, chunks, slots, window, segments, GROUP, ROWS, SEGMENT
    )
    if programs <= 1:
        return
    PARTS: tl.constexpr = (HEAD_DIM + COLUMNS - 1) // COLUMNS
    first_column = tl.program_id(1) % PARTS * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)[None, :]
    head += (tl.program_id(1) // PARTS).to(tl.int64) * GROUP
    place = index * HEADS + head
    mask = row_exists[:, None] & (column < HEAD_DIM)
    rows = queries.to(tl.int64) * HEADS
    STATS: tl.constexpr = (HEAD_DIM + PART_COLUMNS - 1) // PART_COLUMNS
    largest, total, sums = before_keys(sinks, head, False, ROWS, COLUMNS, partial_sums.dtype.element_ty)
    for segment in range(count):
        partial = segment * rows
        its_sums = tl.load(partial_sums + (partial + place)[:, None] * HEAD_DIM + column, mask=mask, other=0.0)
        stats = partial_stats + 2 * (partial * STATS + first_column // PART_COLUMNS * rows) + place
        its_largest = tl.load(stats, mask=row_exists, other=0.0)
        its_total = tl.load(stats + rows, mask=row_exists, other=0.0)
        largest, total, sums = merged(largest, total, sums, its_largest, its_total, its_sums)
    store_rows(out, place, column, row_exists, total, sums, HEAD_DIM)


def _dense(x: Tensor) -> Tensor:
    """`x` [rows, heads, head_dim], or a copy of it, with the numbers of a head side by side."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def append_tile(width: int) -> dict[str, int]:
    """Tile of `kv_append` for tokens of `width` numbers."""
    block = min(BLOCK, triton.next_power_of_2(width))
    return {"TOKENS": TILE // block, "BLOCK": block}


def kv_append(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """key_cache[slots] = key [N, kv_heads, head_dim] and the same of values, where there is such a slot."""
    caches = key_cache, value_cache
    if _dense(key_cache) is not key_cache or _dense(value_cache) is not value_cache:
        keys, values = (_dense(x) for x in caches)  # rare: heads with gaps are written to through copies of the cache
        kv_append(keys, values, key, value, slots)
        key_cache.copy_(keys)
        value_cache.copy_(values)
        return
    width = key.shape[1] * key.shape[2]
    if len(slots) == 0 or width == 0:
        return
    args = [arg for x in (*caches, _dense(key), _dense(value)) for arg in (x, x.stride(0), x.stride(1))]
    tile = append_tile(width)
    grid = triton.cdiv(len(slots), tile["TOKENS"]), triton.cdiv(width, tile["BLOCK"])
    kv_append_kernel[grid](
        *args, slots.contiguous(), len(slots), len(key_cache), width, HEAD_DIM=key.shape[2], **tile, **APPEND_OPTIONS
    )


def shared_segments(
    query: Tensor, key: Tensor, chunks: int, window: int, programs: int, rows: int, parts: int = 1
) -> int:
    """How many segments a chunk has at most, if a program each is to have them, and not one of `programs` all of them.

    It is 1 where ranges that are alike and share no slot would have one, so that a second launch would be for nothing.
    The host knows no lengths: a chunk with fewer segments leaves programs without work, one with more is left to one
    program. The sums of segments take at most `PARTIAL_BYTES`.
    """
    queries, heads, head_dim = query.shape
    slots = len(key)
    if slots <= SEGMENT * chunks or window <= SEGMENT:
        return 1
    most = triton.cdiv(min(slots, window + rows), SEGMENT) + 1
    bytes_each = queries * heads * (head_dim + 2 * parts) * max(4, query.dtype.itemsize)
    return max(1, min(most, PROGRAMS // programs, PARTIAL_BYTES // bytes_each))


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, kv_ranges: Tensor, scale: float,
    sliding_window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """[N, heads, head_dim]: softmax(query key^T * scale) value over the keys that a query sees."""
    queries, heads, head_dim = query.shape
    slots, kv_heads, _ = key.shape
    chunks, group = len(kv_ranges), heads // kv_heads
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if queries == 0:
        return out
    tile, options = attention_tile(head_dim, query.dtype, current_target())
    log2_e: float = LOG2_E.value
    factors: list[Any] = [scale * log2_e, None] if softcap is None else [scale / softcap, softcap * log2_e]
    number = torch.float32
    if query.dtype == torch.float64:
        number = torch.float64
        factors = [None if factor is None else query.new_full((), factor) for factor in factors]
    window = min(2**30, sliding_window or 2**30)
    parts = triton.cdiv(head_dim, tile["COLUMNS"])
    rows, columns = tile["ROWS"], kv_heads * parts
    tiles = queries * group // rows + chunks + 1
    working = queries * group // rows + min(chunks, queries)
    segments = shared_segments(query, key, chunks, window, max(1, working) * columns, rows, parts)
    partials = segments if segments > 1 else 0
    chunk_arguments = cu_seqlens_q.contiguous(), kv_ranges.contiguous(), None if sinks is None else sinks.contiguous()
    sums, stats = ((partials, *out.shape), (partials, parts, 2, queries, heads))
    results = out, *(out.new_empty(shape, dtype=number) for shape in (sums, stats))
    sizes = queries, chunks, slots, segments
    constants = {"HEADS": heads, "GROUP": group, "HEAD_DIM": head_dim, "SEGMENT": SEGMENT}
    ragged_attention_kernel[(tiles, columns, segments)](
        *(arg for x in (query, key, value) for x in [_dense(x)] for arg in (x, x.stride(0), x.stride(1))),
        *chunk_arguments, *results, *sizes, *factors, window, **constants, **tile, **options,
    )  # fmt: skip
    if segments > 1:
        grid = tiles, kv_heads * triton.cdiv(head_dim, MERGED_COLUMNS)
        merge_kernel[grid](
            *chunk_arguments, *results, *sizes, window, **constants, ROWS=rows, COLUMNS=MERGED_COLUMNS,
            PART_COLUMNS=tile["COLUMNS"], **MERGE_OPTIONS,
        )  # fmt: skip
    return out


HEAD_DIMS = (64, 80, 96, 128, 192, 256, 512)  # that tests compile for; others work, too
WIDE = {"fp32": torch.float32, "fp64": torch.float64}


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`: each head size in bf16, with all features and with none; fp16, fp32 and fp64."""
    strides = tuple(f"{name}{kind}" for name in ("query", "key", "value") for kind in ("_stride", "_head_stride"))
    cases = [(head_dim, "bf16", features) for head_dim in HEAD_DIMS for features in (False, True)]
    cases += [(128, "fp16", True), *((head_dim, dtype, True) for dtype in WIDE for head_dim in (64, 80, 128, 256, 512))]
    found = []
    sizes = dict.fromkeys(("queries", "chunks", "slots", "segments", "window"), "i32")
    for head_dim, dtype, features in cases:
        tile, options = attention_tile(head_dim, WIDE.get(dtype, torch.bfloat16), target)
        number = "fp64" if dtype == "fp64" else "fp32"
        shared = {"cu_seqlens_q": "*i32", "kv_ranges": "*i64", "out": f"*{dtype}", **sizes}
        shared |= dict.fromkeys(("partial_sums", "partial_stats"), f"*{number}")
        types = dict.fromkeys(("query", "key", "value"), f"*{dtype}") | dict.fromkeys(strides, "i32") | shared
        factor = "*fp64" if dtype == "fp64" else "fp32"
        constants = {"HEADS": 32, "GROUP": 4, "HEAD_DIM": head_dim, "SEGMENT": SEGMENT}
        sinks, softcap = {"sinks": "*bf16"}, {"softcap": factor}
        absent: dict[str, Any] = {} if features else dict.fromkeys(sinks)
        absent_cap: dict[str, Any] = {} if features else dict.fromkeys(softcap)
        if features:
            shared |= sinks
            types |= sinks | softcap
        name = f"{dtype} {head_dim}{' softcap sinks' if features else ''}"
        found.append(
            Configuration(
                f"ragged_attention {name}",
                ragged_attention_kernel,
                types | {"scale": factor},
                constants | tile | absent | absent_cap,
                options,
                aligned=strides,
                streams=True,
                tensor_cores=dtype not in WIDE or target == "gfx942" or (dtype == "fp32" and target[:4] == "sm_8"),
            )
        )
        if dtype in ("fp64", "bf16") and head_dim == 80:
            tile = {"ROWS": tile["ROWS"], "COLUMNS": MERGED_COLUMNS, "PART_COLUMNS": tile["COLUMNS"]}
            found.append(Configuration(f"merge {name}", merge_kernel, shared, constants | tile | absent, MERGE_OPTIONS))
    tensors = "key_cache", "value_cache", "key", "value"
    stride_names = tuple(f"{name}{kind}" for name in tensors for kind in ("_stride", "_head_stride"))
    for head_dim, dtype in ((128, "bf16"), (80, "bf16"), (64, "fp32")):
        types = dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(stride_names, "i32")
        types |= {"slots": "*i64", "tokens": "i32", "num_slots": "i32", "width": "i32"}
        constants = {"HEAD_DIM": head_dim, **append_tile(8 * head_dim)}
        aligned = (*stride_names, "width")
        name = f"kv_append {dtype} {head_dim}"
        found.append(Configuration(name, kv_append_kernel, types, constants, APPEND_OPTIONS, aligned, streams=True))
    return found
