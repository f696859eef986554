"""`rotary` of queries and keys in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.triton.configuration import Configuration
from selfgen_kernels.backends.triton.dot import rounded
from selfgen_kernels.backends.triton.elementary import OPTIONS
from selfgen_kernels.ops.rotary import rotated_dtype

TILE = 2048  # numbers of each half of some heads that a program turns


def rotary_tile(head_dim: int) -> dict[str, int]:
    width = triton.next_power_of_2(head_dim // 2)
    return {"HEAD_DIM": head_dim, "HEADS": max(1, TILE // width), "WIDTH": width}


@triton.jit
def turn_heads(
    x, x_head_stride, out, cos, sin, heads, first_head,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Turn HEADS heads of a token from `first_head` on; x, out, cos and sin are those of the token."""
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
    turned_1, turned_2 = rounded(turned_1, NUMBER), rounded(turned_2, NUMBER)
    at = out + head.to(tl.int64) * HEAD_DIM + column
    tl.store(at, rounded(turned_1.to(tl.float32), out.dtype.element_ty), mask=exists)
    tl.store(at + HALF, rounded(turned_2.to(tl.float32), out.dtype.element_ty), mask=exists)


@triton.jit
def rotary_kernel(
    query, query_stride, query_head_stride, key, key_stride, key_head_stride, cos, cos_stride, sin, sin_stride,
    query_out, key_out, heads, kv_heads, parts,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (token, part) turns HEADS query heads, or key heads from part `parts` on; results are contiguous."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos += token * cos_stride
    sin += token * sin_stride
    if part < parts:
        out = query_out + token * heads * HEAD_DIM
        turn_heads(
            query + token * query_stride, query_head_stride, out, cos, sin, heads, part * HEADS, HEAD_DIM, HEADS, WIDTH
        )
    else:
        out = key_out + token * kv_heads * HEAD_DIM
        first = (part - parts) * HEADS
        turn_heads(key + token * key_stride, key_head_stride, out, cos, sin, kv_heads, first, HEAD_DIM, HEADS, WIDTH)


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
    return ships
