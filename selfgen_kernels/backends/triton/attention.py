"""`kv_append` and `ragged_attention`: streaming softmax (flash attention, arXiv 2205.14135) over a flat K/V cache.

A tile holds ROWS rows of one chunk and one K/V head; a row is one query of one of the heads that share the K/V head.
The grid depends on shapes only: a program finds its chunk in `cu_seqlens_q` on the device. Chunk b owns the tiles from
`cu_seqlens_q[b] * group // ROWS + b` on, which are at least as many as its rows fill; queries past the last chunk are
one more chunk that sees nothing.

Keys are taken in blocks that start at multiples of KEYS from the first key of the range, one tile shape serves chunks
of all lengths, and what a row does not see adds exact zeros. So a row's sums do not depend on how chunks are cut.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.reference import attention as reference
from selfgen_kernels.backends.triton.configuration import Configuration, current_target
from selfgen_kernels.backends.triton.dot import factor_of_dot, rounded

LOG2_E = tl.constexpr(1.4426950408889634)
SEARCH = tl.constexpr(128)  # chunks looked at together
BLOCK = 1024  # most numbers of a token that a program of kv_append copies
TILE = 2048  # numbers of K, and of V, that it copies
APPEND_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
FP64_TILES = {("sm_86", 64): (64, 8), ("sm_89", 64): (64, 8), ("sm_120", 64): (64, 8), ("sm_120", 256): (128, 16)}
"""(PART, num_warps) by target and width, where others spill: GPUs with few units for fp64."""


def attention_tile(width: int, dtype: torch.dtype, target: str) -> tuple[dict[str, int], dict[str, object]]:
    """(ROWS, KEYS and PART, options) for a padded head_dim of `width`: sizes that spill on none of the targets.

    64 rows are the fewest that tensor cores of sm_90 and sm_100 multiply. A decode step fills few of them, but it waits
    for memory: per byte of K/V the tile does 64 operations, and an H100 could do 295. In fp32 there is no tensor core
    without rounding to tf32, and a thread holds whole rows of a product's factors: PART numbers of a query and a key.
    """
    if dtype.itemsize > 2:
        part, warps = 512 // dtype.itemsize, 8 if dtype == torch.float32 and width <= 128 else 16
        if dtype == torch.float64:
            part, warps = FP64_TILES.get((target, max(64, width)), (part, warps))
        part = min(width, part)
        warps //= 2 if target == "gfx942" else 1  # wavefronts of 64 lanes, warps of 32: 128 bits of K/V for each
        return {"ROWS": 16, "KEYS": 16, "PART": part}, {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    warps = 4 if width <= 128 else 8
    return {"ROWS": 64, "KEYS": 32, "PART": width}, {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}


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
def attend_blocks(
    query, row_exists, key, key_stride, value, value_stride, begin, end, last, scale, softcap, window, largest, total,
    KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """(weights' sum [ROWS], weighted values' sum [ROWS, WIDTH]) over keys `begin` .. `end` - 1, in units of log 2.

    `query` [ROWS, WIDTH], or if PART < WIDTH pointers [ROWS, 1], from which PART numbers at a time are read for each
    block of keys. A row sees keys up to `last` [ROWS] and starts from `largest` and `total` [ROWS]. Careful: a value
    that is not finite makes only the rows that see it NaN. Otherwise it meets the zero weights of the others.
    """
    offset, column = tl.arange(0, KEYS), tl.arange(0, WIDTH)[None, :]
    NUMBER: tl.constexpr = total.dtype  # fp64 or fp32
    out = tl.zeros([last.shape[0], WIDTH], NUMBER)
    for start in tl.range(begin, end, KEYS, num_stages=1 if CAREFUL else None):
        at = start + offset
        slot = tl.minimum(at, end - 1).to(tl.int64)[:, None]
        exists = column < HEAD_DIM
        if PART == WIDTH:
            k = tl.load(key + slot * key_stride + column, mask=exists, other=0.0)
            scores = tl.dot(factor_of_dot(query), tl.trans(factor_of_dot(k)), input_precision="ieee")
        else:
            scores = tl.zeros([last.shape[0], KEYS], NUMBER)
            for first in tl.range(0, WIDTH, PART):
                part = first + tl.arange(0, PART)[None, :]
                q = tl.load(query + part, mask=row_exists & (part < HEAD_DIM), other=0.0)
                k = tl.load(key + slot * key_stride + part, mask=part < HEAD_DIM, other=0.0)
                k = tl.trans(factor_of_dot(k))
                scores = tl.dot(factor_of_dot(q), k, scores, input_precision="ieee", out_dtype=NUMBER)
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
        if CAREFUL:
            zero = tl.sum(tl.load(from_value, mask=exists, other=0.0).to(NUMBER) * 0, 1)  # [KEYS], or NaN
            total += tl.sum(tl.where(visible, zero[None, :], 0.0), 1)
            exists = exists & (zero == 0)[:, None]
        v = tl.load(from_value, mask=exists, other=0.0)
        weights = factor_of_dot(rounded(weights, v.dtype))
        out = tl.dot(weights, factor_of_dot(v), out * factor[:, None], input_precision="ieee", out_dtype=NUMBER)
    return total, out


@triton.jit(do_not_specialize=["queries", "chunks", "slots"])
def ragged_attention_kernel(
    query, query_stride, query_head_stride, key, key_stride, key_head_stride, value, value_stride, value_head_stride,
    cu_seqlens_q, kv_ranges, sinks, out, queries, chunks, slots, scale, softcap, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Program (tile, K/V head) writes up to ROWS rows of out [N, HEADS, HEAD_DIM]; WIDTH is a power of two."""
    tile, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    chunk, begin, end, first_row = find_chunk(cu_seqlens_q, chunks, queries, tile, GROUP, ROWS)
    if first_row >= (end - begin) * GROUP:
        return
    start = tl.load(kv_ranges + 2 * chunk, mask=chunk < chunks, other=0)
    length = tl.load(kv_ranges + 2 * chunk + 1, mask=chunk < chunks, other=0)
    # No range is read that leaves the cache: its queries give NaN. Padding has no keys.
    fits = (start >= 0) & (length >= end - begin) & (length < 2**30) & (start <= slots - length)
    invalid = (chunk < chunks) & ~fits
    length = tl.where(invalid, 0, length).to(tl.int32)

    row = first_row + tl.arange(0, ROWS)  # [ROWS]: query * GROUP + head
    index = begin + row // GROUP
    head = kv_head * GROUP + row % GROUP
    column = tl.arange(0, WIDTH)[None, :]
    row_exists = (index < end)[:, None]
    exists = row_exists & (column < HEAD_DIM)
    q = query + index[:, None] * query_stride + head[:, None] * query_head_stride  # [ROWS, 1]
    if PART == WIDTH:
        q = tl.load(q + column, mask=exists, other=0.0)  # [ROWS, WIDTH]

    last = tl.minimum(length - (end - index).to(tl.int32), length - 1)  # [ROWS]: the last key that a row sees
    low, high = tl.maximum(tl.min(last) - window + 1, 0) // KEYS * KEYS, tl.max(last) + 1
    IS_FP64: tl.constexpr = query.dtype.element_ty == tl.float64
    NUMBER: tl.constexpr = tl.float64 if IS_FP64 else tl.float32
    if IS_FP64:  # as an argument, a number would be fp32
        scale = tl.load(scale)
        softcap = tl.load(softcap) if softcap is not None else None
    largest = tl.full([ROWS], float("-inf"), NUMBER)
    total = tl.zeros([ROWS], NUMBER)
    if sinks is not None:
        largest = tl.load(sinks + head).to(NUMBER) * LOG2_E
        total = tl.where(largest == float("-inf"), total, 1.0)
    key += start * key_stride + kv_head * key_head_stride
    value += start * value_stride + kv_head * value_head_stride
    weight, sums = attend_blocks(
        q, row_exists, key, key_stride, value, value_stride, low, high, last, scale, softcap, window, largest,
        total, KEYS, HEAD_DIM, WIDTH, PART, CAREFUL=False,
    )  # fmt: skip
    if tl.max(tl.sum(tl.where(sums * 0 == 0, 0, 1), 1)) > 0:
        weight, sums = attend_blocks(
            q, row_exists, key, key_stride, value, value_stride, low, high, last, scale, softcap, window, largest,
            total, KEYS, HEAD_DIM, WIDTH, PART, CAREFUL=True,
        )  # fmt: skip
    result = sums / tl.where(weight == 0, 1.0, weight)[:, None]  # 0: padding, which sees nothing
    result = tl.where(invalid, float("nan"), result)
    to = out + (index[:, None] * HEADS + head[:, None]) * HEAD_DIM + column
    tl.store(to, result.to(out.dtype.element_ty), mask=exists)


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


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, kv_ranges: Tensor, scale: float,
    sliding_window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """[N, heads, head_dim]: softmax(query key^T * scale) value over the keys that a query sees."""
    if query.dtype.itemsize > 2 and query.shape[2] > 256:  # these spill
        args = query, key, value, cu_seqlens_q, kv_ranges, scale, sliding_window, softcap, sinks
        return reference.ragged_attention(*args)
    queries, heads, head_dim = query.shape
    slots, kv_heads, _ = key.shape
    chunks, group = len(kv_ranges), heads // kv_heads
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if queries == 0:
        return out
    width = max(16, triton.next_power_of_2(head_dim))
    tile, options = attention_tile(width, query.dtype, current_target())
    log2_e: float = LOG2_E.value
    factors: list[Any] = [scale * log2_e, None] if softcap is None else [scale / softcap, softcap * log2_e]
    if query.dtype == torch.float64:
        factors = [None if factor is None else query.new_full((), factor) for factor in factors]
    grid = queries * group // tile["ROWS"] + chunks + 1, kv_heads
    ragged_attention_kernel[grid](
        *(arg for x in (query, key, value) for x in [_dense(x)] for arg in (x, x.stride(0), x.stride(1))),
        cu_seqlens_q.contiguous(),
        kv_ranges.contiguous(),
        None if sinks is None else sinks.contiguous(),
        out,
        queries,
        chunks,
        slots,
        *factors,
        min(2**30, sliding_window or 2**30),
        HEADS=heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        WIDTH=width,
        **tile,
        **options,
    )
    return out


HEAD_DIMS = (64, 80, 96, 128, 192, 256)  # that tests compile for; others work, too
WIDE = {"fp32": torch.float32, "fp64": torch.float64}


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`: each head size in bf16, with all features and with none; fp16, fp32 and fp64."""
    strides = {
        "query_stride",
        "query_head_stride",
        "key_stride",
        "key_head_stride",
        "value_stride",
        "value_head_stride",
    }
    cases = [(head_dim, "bf16", features) for head_dim in HEAD_DIMS for features in (False, True)]
    cases += [(128, "fp16", True), *((head_dim, dtype, True) for dtype in WIDE for head_dim in (64, 128, 256))]
    found = []
    for head_dim, dtype, features in cases:
        width = max(16, triton.next_power_of_2(head_dim))
        tile, options = attention_tile(width, WIDE.get(dtype, torch.bfloat16), target)
        types = dict.fromkeys(("query", "key", "value", "out"), f"*{dtype}") | dict.fromkeys(sorted(strides), "i32")
        types |= {"cu_seqlens_q": "*i32", "kv_ranges": "*i64", "queries": "i32", "chunks": "i32", "slots": "i32"}
        factor = "*fp64" if dtype == "fp64" else "fp32"
        types |= {"scale": factor, "window": "i32"}
        constants = {"HEADS": 32, "GROUP": 4, "HEAD_DIM": head_dim, "WIDTH": width, **tile}
        if features:
            types |= {"softcap": factor, "sinks": "*bf16"}
        else:
            constants |= {"softcap": None, "sinks": None}
        found.append(
            Configuration(
                f"ragged_attention {dtype} {head_dim}{' softcap sinks' if features else ''}",
                ragged_attention_kernel,
                types,
                constants,
                options,
                aligned=tuple(sorted(strides)),
                streams=True,
                tensor_cores=dtype not in WIDE,
            )
        )
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
