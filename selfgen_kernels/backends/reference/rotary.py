"""Rotary position embeddings, specified."""

from torch import Tensor

from selfgen_kernels.ops.rotary import check_states, rotated_dtype


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
