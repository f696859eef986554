"""A flat K/V cache: appending to its slots, and attention of many short chunks of queries over ranges of them."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from selfgen_kernels.ops.arguments import (
    FLOATS,
    check_factor,
    check_number,
    check_softcap,
    check_tensor,
    is_traced,
    refuse_grad,
)
from selfgen_kernels.ops.registration import define
from selfgen_kernels.torch_internals import storage_of

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {}
"""What `ragged_attention` offers by name besides the operator's kernels; the backends enter theirs."""


@define(
    "kv_append",
    "(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, Tensor slots) -> ()",
)
def _(key_cache, value_cache, key, value, slots):
    return None


@define(
    "ragged_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor kv_ranges, float scale, "
    "SymInt? sliding_window, float? softcap, Tensor? sinks) -> Tensor",
)
def _(query, *rest):
    return query.new_empty(query.shape)


@torch.library.impl("selfgen::kv_append", "Negative")
def _(key_cache, value_cache, *states):
    """Views with their negative bit set; torch's fallback corrupts memory where an operator returns nothing."""
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.is_neg():
            raise ValueError(
                f"{name} is a view of its negative (is_neg()), accepted is plain memory; pass a clone of it"
            )
    torch.ops.selfgen.kv_append(key_cache, value_cache, *(x.resolve_neg() for x in states))


def kv_append(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write the K/V of N tokens to their slots of a flat cache, in place. For inference only.

    The append of flash-attn's `flash_attn_with_kvcache`, with a slot for each token as in vLLM (Kwon et al., arXiv
    2309.06180): slots of one row need not follow one another.

    Args:
        key_cache: fp32, bf16, fp16 or fp64 [slots, kv_heads, head_dim], any strides but 0; written to.
        value_cache: same dtype and shape, other memory, be it another part of one tensor; written to.
        key: same dtype [N, kv_heads, head_dim], any strides, so the transposed view that models make is fine; no view
            of a cache.
        value: same dtype and shape as `key`.
        slots: int64 [N], the slot of each token; a negative one is padding, and nothing is written. No slot twice:
            which of two tokens wins is not defined.

    Returns:
        None.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape or device outside of the above, a slot past the end (on a GPU, where values are not
            looked at, nothing is written for it), or memory that is written to and shared.
        RuntimeError: a tensor that requires grad while gradients are recorded, or has a tangent; the op has no
            derivative.

    Example:
        >>> import torch
        >>> from selfgen_kernels import kv_append
        >>> cache = torch.zeros(2, 4, 1, 8)  # K and V: four slots, one head
        >>> token = torch.ones(2, 1, 8)
        >>> kv_append(*cache, token, token, torch.tensor([3, -1]))  # the second is padding
        >>> cache[0, :, 0, 0]
        tensor([0., 0., 0., 1.])
    """
    check_tensor("key_cache", key_cache, ("slots", "kv_heads", "head_dim"), FLOATS, None)
    dtype, device = (key_cache.dtype,), key_cache.device
    check_tensor("value_cache", value_cache, tuple(key_cache.shape), dtype, device)
    check_tensor("key", key, ("N", *key_cache.shape[1:]), dtype, device)
    check_tensor("value", value, tuple(key.shape), dtype, device)
    check_tensor("slots", slots, (key.shape[0],), (torch.int64,), device)
    refuse_grad("kv_append", key_cache, value_cache, key, value)
    if not is_traced(key_cache, value_cache, key, value):  # which may have no memory
        refuse_overlap(key_cache, value_cache, key=key, value=value)
    torch.ops.selfgen.kv_append(key_cache, value_cache, key, value, slots)


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    kv_ranges: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    implementation: Literal["flash_attn"] | None = None,
) -> Tensor:
    """Causal attention of many chunks of queries, each over its own range of a flat K/V cache. For inference only.

    Chunk b holds the queries `cu_seqlens_q[b] : cu_seqlens_q[b + 1]`; they are the last positions of the K/V in slots
    `kv_ranges[b, 0] : kv_ranges[b, 0] + kv_ranges[b, 1]`. Each query sees the keys up to its own position; what it does
    not see does not touch it, NaN included. A value that it sees and that is not finite makes it NaN, or on a GPU such
    columns of it; at least those that the value has. Queries past `cu_seqlens_q[B]` are padding.

    A query over the same keys gives the same bits however the chunks are cut: keys count from the first slot of their
    range. It holds for the C++ kernel on any number of threads, and for the Triton kernel, which adds up 512 keys at a
    time, in one program or in many, and puts these sums together from the first to the last. That one never waits for
    the device, and keeps at most 64 MiB of such sums.

    Args:
        query: fp32, bf16, fp16 or fp64 [N, heads, head_dim], any strides.
        key: same dtype [slots, kv_heads, head_dim], any strides; heads is a multiple of kv_heads, and query head h
            reads K/V head h // (heads // kv_heads).
        value: same dtype and shape as `key`.
        cu_seqlens_q: int32 [B + 1], ascending from 0 to at most N.
        kv_ranges: int64 [B, 2], first slot and number of slots of each chunk; at least as many slots as queries, and
            at most 2^30.
        scale: factor on the logits, finite in fp32; head_dim ** -0.5 if None.
        sliding_window: >= 1: a query sees this many positions, itself included.
        softcap: > 0: logits become softcap * tanh(logits / softcap), as in Gemma 2 (arXiv 2408.00118).
        sinks: floating [heads], a logit per head that takes probability and has no value, as in gpt-oss.
        implementation: None for this library's kernels, "flash_attn" for the one of flash-attn (see
            `backends/flash_attn.py` for what it offers).

    Returns:
        [N, heads, head_dim], the dtype of `query`, contiguous; 0 for padding, NaN for a chunk on a GPU whose range
        leaves the cache.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a value, shape or device outside of the above (values inside GPU tensors are not looked at).
        RuntimeError: a tensor that requires grad while gradients are recorded, or has a tangent; the op has no
            derivative. Or flash-attn was asked for and is not installed.

    Example:
        >>> import torch
        >>> from selfgen_kernels import ragged_attention
        >>> query, cache = torch.randn(3, 4, 8), torch.randn(9, 2, 8)
        >>> chunks = torch.tensor([0, 1, 3], dtype=torch.int32)  # one query, then two
        >>> ragged_attention(query, cache, cache, chunks, torch.tensor([[0, 4], [4, 5]])).shape
        torch.Size([3, 4, 8])
    """
    check_tensor("query", query, ("N", "heads", "head_dim"), FLOATS, None)
    heads, head_dim = query.shape[1:]
    check_tensor("key", key, ("slots", "kv_heads", head_dim), (query.dtype,), query.device)
    check_tensor("value", value, tuple(key.shape), (query.dtype,), query.device)
    if 0 in (heads, head_dim, key.shape[1]) or heads % key.shape[1]:
        raise ValueError(
            f"{heads} query heads of size {head_dim} cannot share {key.shape[1]} K/V heads; "
            "pass heads and head_dim >= 1, and heads a multiple of kv_heads"
        )
    check_tensor("cu_seqlens_q", cu_seqlens_q, ("B + 1",), (torch.int32,), query.device)
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q is empty; pass int32 [B + 1], which is [0] for no chunk")
    check_tensor("kv_ranges", kv_ranges, (cu_seqlens_q.shape[0] - 1, 2), (torch.int64,), query.device)
    if scale is None:
        scale = head_dim**-0.5
    check_factor("scale", scale, or_else="None")
    if sliding_window is not None:
        check_number("sliding_window", sliding_window, "an int >= 1, or None", lambda size: size >= 1, whole=True)
    check_softcap(softcap)
    if sinks is not None:
        check_tensor("sinks", sinks, (heads,), FLOATS, query.device)
    refuse_grad("ragged_attention", query, key, value, sinks)
    args = query, key, value, cu_seqlens_q, kv_ranges, scale, sliding_window, softcap, sinks
    if implementation is None:
        return torch.ops.selfgen.ragged_attention(*args)
    if not isinstance(implementation, str) or implementation not in IMPLEMENTATIONS:
        accepted = " or ".join(["None", *(f'"{name}"' for name in IMPLEMENTATIONS)])
        raise ValueError(f"implementation={implementation!r} is not accepted; pass {accepted}")
    return IMPLEMENTATIONS[implementation](*args)


def refuse_overlap(key_cache: Tensor, value_cache: Tensor, **read: Tensor) -> None:
    """Raise if memory that is written to is also read, or is that of two numbers."""
    key_storage, value_storage = (storage_of(x) for x in (key_cache, value_cache))
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        strides = cache.stride()
        if 0 in strides and any(stride == 0 and size > 1 for size, stride in zip(cache.shape, strides, strict=True)):
            raise ValueError(f"{name} is expanded: several of its numbers share memory; pass {name}.contiguous()")
    for name, states in read.items():
        storage = storage_of(states)
        if storage in (key_storage, value_storage):
            for cache_name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
                if storage == storage_of(cache) and _meet(states, cache):
                    raise ValueError(f"{name} is a view of {cache_name}, which is written to; pass {name}.clone()")
    # Parts of one tensor may interleave, so here only a slot of one cache that is a slot of the other is an overlap.
    if key_storage == value_storage and key_cache.numel() > 0:
        distance = abs(int(key_cache.storage_offset()) - int(value_cache.storage_offset()))
        stride = key_cache.stride()
        slots, rest = divmod(distance, max(1, stride[0]))
        if distance == 0 or (value_cache.stride() == stride and rest == 0 and slots < len(key_cache)):
            raise ValueError("key_cache and value_cache share memory; pass two caches, such as the halves of a tensor")


def _meet(x: Tensor, y: Tensor) -> bool:
    """Whether the stretches from first to last number of two tensors of one storage have a part in common."""
    ends = [x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) for x in (x, y)]
    return x.numel() > 0 and y.numel() > 0 and max(x.storage_offset(), y.storage_offset()) <= min(ends)
