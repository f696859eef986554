"""The flat K/V cache, specified: appending to it, and attention of ragged chunks, one after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_KEYS = 2**30
"""Of a chunk: kernels count the keys of a range in 32 bits."""


def kv_append(
    key_cache: Tensor,  # [slots, kv_heads, head_dim]
    value_cache: Tensor,  # [slots, kv_heads, head_dim]
    key: Tensor,  # [N, kv_heads, head_dim]
    value: Tensor,  # [N, kv_heads, head_dim]
    slots: Tensor,  # [N]: negative for padding
) -> None:
    """cache[slots[i]] = states[i] where there is such a slot."""
    if slots.device.type == "cpu" and (slots >= len(key_cache)).any():
        raise ValueError(
            f"slots holds {int(slots.max())}, accepted are slots below {len(key_cache)}, the length of the cache, and "
            "negative ones for padding; make the cache longer"
        )
    exists = (slots >= 0) & (slots < len(key_cache))
    key_cache[slots[exists]] = key[exists]
    value_cache[slots[exists]] = value[exists]


def ragged_attention(
    query: Tensor,  # [N, heads, head_dim]
    key: Tensor,  # [slots, kv_heads, head_dim]
    value: Tensor,  # [slots, kv_heads, head_dim]
    cu_seqlens_q: Tensor,  # [B + 1]
    kv_ranges: Tensor,  # [B, 2]: first slot, number of slots
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,  # [heads]
) -> Tensor:
    """[N, heads, head_dim]: softmax(query key^T * scale) value over the keys that a query sees."""
    bounds, ranges = cu_seqlens_q.tolist(), kv_ranges.tolist()
    _check_chunks(bounds, ranges, len(query), len(key))
    output = query.new_empty(query.shape)
    output[bounds[-1] :] = 0  # padding
    for begin, end, (start, length) in zip(bounds, bounds[1:], ranges, strict=False):
        keys, values = key[start : start + length], value[start : start + length]
        # 0 * NaN is NaN: one by one, queries meet only what they see.
        finite = bool(keys.isfinite().all() and values.isfinite().all())
        step = max(1, end - begin) if finite else 1
        for i in range(begin, end, step):
            last = length - (end - i) + step  # one past the last key that a query of this step sees
            first = 0  # keys before it are outside the sliding window of every query of this step
            if sliding_window is not None:
                first = max(0, last - step - sliding_window + 1)
            visible = _visible(step, last - first, sliding_window, query.device)
            attend = _attend if softcap is None and sinks is None else _attend_capped
            part = keys[first:last], values[first:last]
            output[i : i + step] = attend(query[i : i + step], *part, visible, scale, softcap, sinks)
    return output


def _check_chunks(bounds: list[int], ranges: list[list[int]], queries: int, slots: int) -> None:
    """Raise unless `bounds` [B + 1] ascend from 0 to at most `queries`, and `ranges` [B, 2] fit slots and chunks."""
    if bounds[0] != 0 or bounds[-1] > queries or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seqlens_q is {bounds}, expected ascending numbers from 0 to at most the {queries} queries; "
            "pass the running sum of the chunks' lengths, with a 0 in front"
        )
    for chunk, (first, length) in enumerate(ranges):
        size = bounds[chunk + 1] - bounds[chunk]
        if not (0 <= first <= first + length <= slots and size <= length <= MOST_KEYS):
            raise ValueError(
                f"kv_ranges[{chunk}] is [{first}, {length}], expected [first, length] inside the {slots} slots with "
                f"length >= {size}, the queries of the chunk, and at most 2**30; write their K/V first and count them "
                "in"
            )


def _visible(queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """[queries, keys] bool: the causal mask of the last `queries` of `keys` positions; None if all is visible."""
    if queries == 1:
        return None
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    visible = distance >= 0
    return visible if sliding_window is None else visible & (distance < sliding_window)


def _attend(query, key, value, visible, scale, softcap, sinks):
    """Grouped heads are packed into the query axis, so K/V are read in place and never repeated."""
    queries, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    packed = query.view(queries, kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, head_dim)
    mask = None if visible is None else visible.repeat(group, 1)  # [group * queries, keys]
    output = F.scaled_dot_product_attention(
        packed, key.transpose(0, 1)[None], value.transpose(0, 1)[None], attn_mask=mask, scale=scale
    )
    return output.view(kv_heads, group, queries, head_dim).permute(2, 0, 1, 3).reshape(queries, heads, head_dim)


def _attend_capped(query, key, value, visible, scale, softcap, sinks):
    """With the logits in the open, for softcaps (Gemma 2) and sinks (gpt-oss), and in at least fp32."""
    queries, heads, _ = query.shape
    group = heads // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    key, value = (x.to(dtype).repeat_interleave(group, dim=1) for x in (key, value))  # [keys, heads, head_dim]
    logits = torch.einsum("qhd,khd->hqk", query.to(dtype), key) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    if sinks is not None:  # one more logit to give probability to, with no value to it
        logits = torch.cat([logits, sinks.to(dtype)[:, None, None].expand(-1, queries, 1)], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : len(key)]
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)
