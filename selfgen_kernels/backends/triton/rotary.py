"""`rotary` of queries and keys, and `rotary_append`, in one launch each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.triton.attention import kv_append
from selfgen_kernels.backends.triton.configuration import Configuration
from selfgen_kernels.backends.triton.dot import rounded
from selfgen_kernels.backends.triton.elementary import OPTIONS
from selfgen_kernels.ops.rotary import rotated_dtype

OF_APPEND = "key_cache", "key_cache_head", "value_cache", "value_cache_head", "value", "value_head"
TILE = 2048  # numbers of each half of some heads that a program turns


def rotary_tile(head_dim: int) -> dict[str, int]:
    width = triton.next_power_of_2(head_dim // 2)
    return {"HEAD_DIM": head_dim, "HEADS": max(1, TILE // width), "WIDTH": width}


@triton.jit
def turn_heads(
    x, x_head_stride, out, out_head_stride, cos, sin, heads, first_head,
    RESULT: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Turn HEADS heads of a token from `first_head` on; x, out, cos and sin are those of the token.

    Numbers are rounded to the dtype RESULT, and then to that of `out`.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    SAME: tl.constexpr = x.dtype.element_ty == cos.dtype.element_ty
    NUMBER: tl.constexpr = x.dtype.element_ty if SAME else tl.float32  # in which torch computes
    column = tl.arange(0, WIDTH)[None, :]
    head = (first_head + tl.arange(0, HEADS))[:, None]
    exists = (head < heads) & (column < HALF)
    place = x + head.to(tl.int64) * x_head_stride + column
    first = tl.load(place, mask=exists, other=0.0).to(tl.float32)  # [HEADS, WIDTH]
    second = tl.load(place + HALF, mask=exists, other=0.0).to(tl.float32)
    cos_1 = tl.load(cos + column, mask=column < HALF, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + column, mask=column < HALF, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    turned_1 = rounded(first * cos_1, NUMBER).to(tl.float32) - rounded(second * sin_1, NUMBER).to(tl.float32)
    turned_2 = rounded(second * cos_2, NUMBER).to(tl.float32) + rounded(first * sin_2, NUMBER).to(tl.float32)
    turned_1 = rounded(rounded(turned_1, NUMBER).to(tl.float32), RESULT)
    turned_2 = rounded(rounded(turned_2, NUMBER).to(tl.float32), RESULT)
    at = out + head.to(tl.int64) * out_head_stride + column
    tl.store(at, rounded(turned_1.to(tl.float32), out.dtype.element_ty), mask=exists)
    tl.store(at + HALF, rounded(turned_2.to(tl.float32), out.dtype.element_ty), mask=exists)


@triton.jit
def copy_heads(
    x, x_head_stride, out, out_head_stride, heads, first_head,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy HEADS heads of a token from `first_head` on."""
    column = tl.arange(0, 2 * WIDTH)[None, :]
    head = (first_head + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    exists = (head < heads) & (column < HEAD_DIM)
    numbers = tl.load(x + head * x_head_stride + column, mask=exists)
    tl.store(out + head * out_head_stride + column, numbers, mask=exists)


@triton.jit
def rotary_kernel(
    query, query_stride, query_head_stride, key, key_stride, key_head_stride, cos, cos_stride, sin, sin_stride,
    query_out, key_out, heads, kv_heads, parts,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (token, part) turns HEADS query heads, or key heads from part `parts` on; results are contiguous."""
    RESULT: tl.constexpr = query_out.dtype.element_ty
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos += token * cos_stride
    sin += token * sin_stride
    if part < parts:
        out = query_out + token * heads * HEAD_DIM
        turn_heads(
            query + token * query_stride, query_head_stride, out, HEAD_DIM, cos, sin, heads, part * HEADS,
            RESULT, HEAD_DIM, HEADS, WIDTH,
        )  # fmt: skip
    else:
        out = key_out + token * kv_heads * HEAD_DIM
        turn_heads(
            key + token * key_stride, key_head_stride, out, HEAD_DIM, cos, sin, kv_heads, (part - parts) * HEADS,
            RESULT, HEAD_DIM, HEADS, WIDTH,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_slots"])
def rotary_append_kernel(
    key_cache, key_cache_stride, key_cache_head_stride, value_cache, value_cache_stride, value_cache_head_stride,
    query, query_stride, query_head_stride, key, key_stride, key_head_stride, value, value_stride, value_head_stride,
    cos, cos_stride, sin, sin_stride, slots, query_out, num_slots, heads, kv_heads, parts, kv_parts,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (token, part) turns HEADS query heads, or key heads from part `parts` on, or copies HEADS value heads.

    The query's result is contiguous.
    """
    RESULT: tl.constexpr = query_out.dtype.element_ty
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos += token * cos_stride
    sin += token * sin_stride
    if part < parts:
        out = query_out + token * heads * HEAD_DIM
        turn_heads(
            query + token * query_stride, query_head_stride, out, HEAD_DIM, cos, sin, heads, part * HEADS,
            RESULT, HEAD_DIM, HEADS, WIDTH,
        )  # fmt: skip
    else:
        slot = tl.load(slots + token)
        count = tl.where((slot >= 0) & (slot < num_slots), kv_heads, 0)
        part -= parts
        if part < kv_parts:
            out = key_cache + slot * key_cache_stride
            turn_heads(
                key + token * key_stride, key_head_stride, out, key_cache_head_stride, cos, sin, count, part * HEADS,
                RESULT, HEAD_DIM, HEADS, WIDTH,
            )  # fmt: skip
        else:
            out = value_cache + slot * value_cache_stride
            copy_heads(
                value + token * value_stride, value_head_stride, out, value_cache_head_stride, count,
                (part - kv_parts) * HEADS, HEAD_DIM, HEADS, WIDTH,
            )  # fmt: skip


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, keep_dtype: bool) -> tuple[Tensor, Tensor]:
    """query [N, heads, head_dim] and key [N, kv_heads, head_dim], turned by cos and sin [N, head_dim]."""
    dtype = rotated_dtype(query, cos, keep_dtype)
    results = tuple(torch.empty(x.shape, dtype=dtype, device=x.device) for x in (query, key))
    query, key, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, cos, sin))
    tokens, heads, head_dim = query.shape
    kv_heads, constants = key.shape[1], rotary_tile(head_dim)
    parts, kv_parts = (triton.cdiv(count, constants["HEADS"]) for count in (heads, kv_heads))
    if tokens and parts + kv_parts:
        strides = (stride for x in (query, key) for stride in (x, *x.stride()[:2]))
        rotary_kernel[(tokens, parts + kv_parts)](
            *strides, cos, cos.stride(0), sin, sin.stride(0), *results, heads, kv_heads, parts, **constants, **OPTIONS
        )
    return results[0], results[1]


def rotary_append(
    key_cache: Tensor, value_cache: Tensor, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor,
    slots: Tensor, keep_dtype: bool,
) -> Tensor:  # fmt: skip
    """query [N, heads, head_dim] turned; key_cache[slots] = key turned, value_cache[slots] = value."""
    if key_cache.stride(2) != 1 or value_cache.stride(2) != 1:  # rare
        turned, turned_key = rotary(query, key, cos, sin, keep_dtype)
        kv_append(key_cache, value_cache, turned_key.to(key_cache.dtype), value, slots)
        return turned
    out = torch.empty(query.shape, dtype=rotated_dtype(query, cos, keep_dtype), device=query.device)
    query, key, value, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, cos, sin))
    tokens, heads, head_dim = query.shape
    kv_heads, constants = key.shape[1], rotary_tile(head_dim)
    parts, kv_parts = (triton.cdiv(count, constants["HEADS"]) for count in (heads, kv_heads))
    if tokens and parts + kv_parts:
        states = key_cache, value_cache, query, key, value
        strides = (stride for x in states for stride in (x, *x.stride()[:2]))
        rotary_append_kernel[(tokens, parts + 2 * kv_parts)](
            *strides, cos, cos.stride(0), sin, sin.stride(0), slots.contiguous(), out, len(key_cache), heads, kv_heads,
            parts, kv_parts, **constants, **OPTIONS,
        )  # fmt: skip
    return out


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`."""
    strides = {f"{name}_stride": "i64" for name in ("query", "query_head", "key", "key_head", "cos", "sin")}
    ships = []
    for head_dim in (64, 128):
        for dtype, of_cos in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32")):
            pointers = dict.fromkeys(("query", "key", "query_out", "key_out"), f"*{dtype}")
            counts = dict.fromkeys(("heads", "kv_heads", "parts"), "i32")
            ships.append(
                Configuration(
                    f"rotary[{dtype} by {of_cos}, {head_dim}]",
                    rotary_kernel,
                    strides | pointers | dict.fromkeys(("cos", "sin"), f"*{of_cos}") | counts,
                    rotary_tile(head_dim),
                    OPTIONS,
                    tuple(strides),
                    streams=True,
                )
            )
            strides_too = strides | {f"{name}_stride": "i64" for name in OF_APPEND}
            pointers = dict.fromkeys(("query", "key", "query_out"), f"*{dtype}")
            pointers |= dict.fromkeys(("key_cache", "value_cache", "value"), f"*{dtype}")
            counts |= dict.fromkeys(("num_slots", "kv_parts"), "i32") | {"slots": "*i64"}
            ships.append(
                Configuration(
                    f"rotary_append[{dtype} by {of_cos}, {head_dim}]",
                    rotary_append_kernel,
                    strides_too | pointers | dict.fromkeys(("cos", "sin"), f"*{of_cos}") | counts,
                    rotary_tile(head_dim),
                    OPTIONS,
                    tuple(strides_too),
                    streams=True,
                )
            )
    return ships
