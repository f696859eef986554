"""``ragged_attention``: the schema, the checks, the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.reference import attention as reference


@torch.library.custom_op("selfgen::ragged_attention", mutates_args=())
def _ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    kv_ranges: Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return reference.ragged_attention(query, key, value, cu_seqlens_q, kv_ranges, scale, sliding_window, softcap, sinks)


@_ragged_attention.register_fake
def _(query, key, value, cu_seqlens_q, kv_ranges, scale, sliding_window, softcap, sinks):
    return torch.empty_like(query)


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
) -> Tensor:
    """Causal attention of many chunks of queries, each over its own range of a flat K/V cache.

    Chunk b holds the queries ``cu_seqlens_q[b] : cu_seqlens_q[b + 1]``; they are the last positions of the K/V in slots
    ``kv_ranges[b, 0] : kv_ranges[b, 0] + kv_ranges[b, 1]``. Each query sees the keys up to its own position.

    Args:
        query: [N, heads, head_dim].
        key, value: [slots, kv_heads, head_dim], the dtype of ``query``; ``heads`` is a multiple of ``kv_heads``.
        cu_seqlens_q: [B + 1] int32, ascending from 0 to N.
        kv_ranges: [B, 2] int64, first slot and number of slots of each chunk (itself included).
        scale: factor on the logits; ``head_dim ** -0.5`` if None.
        sliding_window: a query sees this many positions, itself included.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118, section 2).
        sinks: [heads], a logit a head that takes probability and has no value (gpt-oss).

    Returns:
        [N, heads, head_dim], the dtype of ``query``.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: K/V of another dtype than the queries.

    Example:
        >>> q, kv = torch.randn(3, 4, 8), torch.randn(9, 2, 8)
        >>> chunks = torch.tensor([0, 1, 3], dtype=torch.int32)  # one query, then two
        >>> ragged_attention(q, kv, kv, chunks, torch.tensor([[0, 4], [4, 5]])).shape
        torch.Size([3, 4, 8])
    """
    if query.dim() != 3 or key.dim() != 3 or key.shape != value.shape or query.shape[2] != key.shape[2]:
        raise ValueError(
            "query must be [N, heads, head_dim] and key, value [slots, kv_heads, head_dim], got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads can't share {key.shape[1]} K/V heads evenly")
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise TypeError(f"query, key and value must have one dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    if kv_ranges.shape != (max(0, len(cu_seqlens_q) - 1), 2):
        raise ValueError(
            f"kv_ranges must be [B, 2] for cu_seqlens_q [B + 1], got {tuple(kv_ranges.shape)} and {tuple(cu_seqlens_q.shape)}"
        )
    if scale is None:
        scale = query.shape[2] ** -0.5
    return torch.ops.selfgen.ragged_attention(
        query, key, value, cu_seqlens_q, kv_ranges, scale, sliding_window, softcap, sinks
    )
