"""Rotary position embeddings, specified."""

from torch import Tensor

from selfgen_kernels.backends.reference.attention import kv_append
from selfgen_kernels.ops.rotary import check_append, check_states, rotated_dtype


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, keep_dtype: bool) -> tuple[Tensor, Tensor]:
    """query [N, heads, head_dim] and key [N, kv_heads, head_dim], turned by cos and sin [N, head_dim]."""
    check_states(query, key, cos, sin)
    (cos_1, cos_2), (sin_1, sin_2) = (angles[:, None].chunk(2, dim=-1) for angles in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        result = x.new_empty(x.shape, dtype=rotated_dtype(x, cos, keep_dtype))
        result[..., : first.shape[-1]] = first * cos_1 - second * sin_1
        result[..., first.shape[-1] :] = second * cos_2 + first * sin_2
        return result

    return turned(query), turned(key)


def rotary_append(
    key_cache: Tensor,  # [slots, kv_heads, head_dim]
    value_cache: Tensor,  # [slots, kv_heads, head_dim]
    query: Tensor,  # [N, heads, head_dim]
    key: Tensor,  # [N, kv_heads, head_dim]
    value: Tensor,  # [N, kv_heads, head_dim]
    cos: Tensor,  # [N, head_dim]
    sin: Tensor,  # [N, head_dim]
    slots: Tensor,  # [N]: negative for padding
    keep_dtype: bool,
) -> Tensor:
    """The query turned; the key, turned and rounded to the dtype of the caches, and the value go to their slots."""
    check_append(key_cache, value_cache, query, key, value, cos, sin, slots)
    turned, turned_key = rotary(query, key, cos, sin, keep_dtype)
    kv_append(key_cache, value_cache, turned_key.to(key_cache.dtype), value, slots)
    return turned
