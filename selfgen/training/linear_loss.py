"""Cross-entropy of a linear head without its logits: chunk by chunk, with the gradients computed on the way.

A chunk's logits are needed for the loss and for its gradients, so both are computed while they are there. That takes
three products per chunk, where computing the logits again in the backward takes four. The gradient of the weight is
added up in one tensor, and not anew for each chunk by autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, smoothing: float, chunk: int
) -> Tensor:
    """Sum over positions of the cross-entropy of ``states @ weight.T + bias``, fp32 scalar.

    Products are computed in the dtype of autocast where that is on, else in that of the states; the loss in fp32.
    Gradients are those of autograd up to rounding. They can be taken once, and not be differentiated again.

    They are computed before anything scales the loss. So this is not for fp16, whose small numbers vanish without the
    scale.

    Args:
        states: [N, D], floating point.
        weight: [V, D], floating point; it may be frozen.
        bias: [V], or None.
        targets: [N] int64, in [0, V).
        smoothing: share of the target that is spread evenly over the vocabulary, in [0, 1].
        chunk: positions at a time, at least 1.
    """
    given = states, weight, bias
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in given):
        total: Tensor = _LinearCrossEntropy.apply(*given, targets, smoothing, chunk)
        return total
    return _computed(*given, targets, smoothing, chunk, (False, False, False)).total


class _Computed(NamedTuple):
    """The sum of the losses, and its gradients, where they are asked for."""

    total: Tensor
    states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def _computed(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    smoothing: float,
    chunk: int,
    of: tuple[bool, bool, bool],
) -> _Computed:
    """``of`` tells which of states, weight and bias need a gradient."""
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    found = _Computed(
        states.new_zeros((), dtype=torch.float32),
        torch.zeros_like(states) if of[0] else None,
        torch.zeros_like(weight) if of[1] else None,
        torch.zeros_like(bias) if bias is not None and of[2] else None,
    )
    with torch.autocast(device, enabled=False):
        head, more = weight.to(dtype), None if bias is None else bias.to(dtype)
        for first in range(0, len(states), chunk):
            part = slice(first, first + chunk)
            inputs, at = states[part].to(dtype), targets[part, None]
            logits = F.linear(inputs, head, more).float()  # [n, V]
            of_target, largest = logits.gather(1, at), logits.amax(-1, keepdim=True)
            smoothed = smoothing * logits.mean(-1, keepdim=True) if smoothing else 0.0
            of_logits = logits.sub_(largest).exp_()  # in the place of the logits, which are not needed any more
            mass = of_logits.sum(-1, keepdim=True)
            found.total.add_((largest + mass.log() - (1 - smoothing) * of_target - smoothed).sum())
            if not any(of):
                continue
            of_logits /= mass  # the probabilities
            if smoothing:
                of_logits -= smoothing / logits.shape[1]
            of_logits.scatter_(1, at, of_logits.gather(1, at) - (1 - smoothing))
            if found.bias is not None:
                found.bias.add_(of_logits.sum(0))
            of_logits = of_logits.to(dtype)
            if found.states is not None:
                found.states[part] = of_logits @ head
            if found.weight is not None and found.weight.dtype == dtype:
                found.weight.addmm_(of_logits.T, inputs)
            elif found.weight is not None:
                found.weight.add_(of_logits.T @ inputs)
    return found


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, targets, smoothing, chunk):
        found = _computed(states, weight, bias, targets, smoothing, chunk, ctx.needs_input_grad[:3])
        ctx.gradients = found[1:]
        return found.total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_total):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss have been taken: compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None  # which are given away, and scaled in place
        return *(None if one is None else one.mul_(of_total) for one in gradients), None, None, None
