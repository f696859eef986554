"""The specification of `invariant_linear`: no operation of torch that adds more than two numbers."""

import torch
from torch import Tensor


def invariant_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N, M] of `hidden` [N, D] and `weight` [M, D]: fp32 sums over D, from the first to the last."""
    shapes = [list(x.shape) for x in (hidden, weight, *(() if bias is None else (bias,)))]
    outputs, depth = len(weight), hidden.shape[-1]
    if shapes[:2] != [[len(hidden), depth], [outputs, depth]] or shapes[2:] not in ([], [[outputs]]):
        raise ValueError(
            f"hidden, weight and bias have shapes {shapes}, expected [N, D], [M, D] and [M]; reshape or re-select "
            "their rows"
        )
    total = hidden.new_zeros((len(hidden), outputs), dtype=torch.float32)
    for left, right in zip(hidden.float().unbind(1), weight.float().unbind(1), strict=True):
        total += left[:, None] * right
    if bias is not None:
        total += bias.float()
    return total.to(hidden.dtype)
