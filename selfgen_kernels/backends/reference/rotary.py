"""Rotary position embeddings, specified."""

import torch
from torch import Tensor

from selfgen_kernels.ops.rotary import rotated_dtype


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, keep_dtype: bool) -> tuple[Tensor, Tensor]:
    """query [N, heads, head_dim] and key [N, kv_heads, head_dim], turned by cos and sin [N, head_dim]."""
    cos, sin = cos[:, None], sin[:, None]

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        result = x * cos + torch.cat([-second, first], dim=-1) * sin
        return result.to(rotated_dtype(x, cos, keep_dtype)).contiguous()

    return turned(query), turned(key)
