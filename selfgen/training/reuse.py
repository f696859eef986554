"""The passes are the forward: training on a mixed context without computing its forward again.

The hidden states that the passes leave (``context.hidden_states``) are exactly what gradient checkpointing (Chen et al.
2016, arXiv 1604.06174) would save. So the training pass *reuses* them: a layer's forward returns what is kept, and its
backward computes the layer again from what entered it, as that of any checkpointed layer does. This is done in the
checkpointing function of transformers' ``GradientCheckpointingLayer``, so a model needs no change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..context.hidden_states import HiddenStates, ReuseError


@contextmanager
def reuse_passes(
    kept: HiddenStates,
    slots: Tensor,
    *,
    bound: float = 0.0,
    checks: dict[int, Callable[[], None]] | None = None,
    unused: set[int] | None = None,
    reenter: bool = False,
) -> Iterator[list[int]]:
    """Inside, training forwards over [B, L] tokens whose slots are ``slots`` [B, L] reuse what is ``kept``.

    Their backward may come later, outside. The yielded list gets the number of each layer that has reused its passes.
    ``checks``, if given, get by the same number what tries the backward of that layer by itself, for a caller that has
    made its weights whole: it raises ReuseError where the layer, computed again, differs by more than ``bound``
    standard deviations, or gives a gradient to what is no part of it. With ``unused``, weights that a layer does not
    use get zeros, where else they get no gradient, and their ids are there until it does. With ``reenter``, weights
    get their gradients in a backward of the layer's own, as those do that are whole only inside it.
    """
    reused: list[int] = []
    before = [{name: value for name, value in vars(layer).items() if name in _SWITCHES} for layer in kept.layers]
    try:
        for index, layer in enumerate(kept.layers):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(
                _reuse_layer, kept, reused, index, slots, bound, checks, unused, reenter
            )
        yield reused
    finally:
        for layer, switches in zip(kept.layers, before, strict=True):
            for name in _SWITCHES:
                vars(layer).pop(name, None)
            vars(layer).update(switches)


def _reuse_layer(
    kept: HiddenStates,
    reused: list[int],
    index: int,
    slots: Tensor,
    bound: float,
    checks: dict[int, Callable[[], None]] | None,
    unused: set[int] | None,
    reenter: bool,
    forward: Callable,
    hidden: Tensor,
    *args,
) -> Tensor:
    given = args, getattr(forward, "keywords", {})
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(given)):
        raise ReuseError("a decoder layer has more than one input with a gradient")
    reused.append(index)
    entering, leaving = partial(kept.at, index, slots), partial(kept.at, index + 1, slots)
    again = _Again(lambda states: forward(states, *args), entering, _autocast_now(hidden.device.type))
    if checks is not None:
        checks[index] = partial(_check, index, again, kept.layers[index], leaving, bound)
    if reenter:
        learns = any(parameter.requires_grad for parameter in kept.layers[index].parameters())
        needs_gradient = torch.empty(0, device=hidden.device, requires_grad=learns)  # as the output does
        return _ReenteredLayer.apply(again, leaving, hidden, needs_gradient)
    # Not before the layer is called, as sharded weights are gathered only then.
    trainable = [parameter for parameter in kept.layers[index].parameters() if parameter.requires_grad]
    return _ReusedLayer.apply(again, leaving, unused, hidden, *trainable)


@dataclass
class _Again:
    """A layer that is computed again, and what enters it; under the autocast of its forward."""

    layer: Callable[[Tensor], Tensor]
    entering: Callable[[], Tensor]
    autocast: Callable[[], AbstractContextManager]

    def __call__(self) -> tuple[Tensor, Tensor]:
        """What enters, and what leaves it, with gradients."""
        with torch.enable_grad(), self.autocast():
            hidden = self.entering().requires_grad_()
            return hidden, self.layer(hidden)


def _autocast_now(device: str) -> Callable[[], AbstractContextManager]:
    if not torch.is_autocast_enabled(device):
        return nullcontext
    return partial(torch.autocast, device, dtype=torch.get_autocast_dtype(device))


def _check(index: int, again: _Again, layer: nn.Module, leaving: Callable[[], Tensor], bound: float) -> None:
    """Try the backward of a layer, whose weights are whole."""
    trainable = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    hidden, output = again()
    _verify(index, output, leaving(), [hidden, *trainable], bound)
    _gradients(output, torch.ones_like(output), hidden, trainable)


def _gradients(output: Tensor, gradient: Tensor, hidden: Tensor, trainable: Sequence[Tensor]) -> list[Tensor | None]:
    """Of what entered the layer, and of its weights."""
    with without_hooks(trainable):
        found = torch.autograd.grad(output, [hidden, *trainable], gradient, allow_unused=True)
    if trainable and all(one is None for one in found[1:]):
        raise ReuseError(
            "the weights of a decoder layer got no gradient, as it computes with others than it has when it is "
            "called: give reuse_passes=False"
        )
    return list(found)


def _verify(index: int, output: Tensor, kept: Tensor, inputs: list[Tensor], bound: float) -> None:
    """Raise ReuseError unless a layer's ``output`` [B, L, D] is what is ``kept``, and computed of ``inputs`` alone.

    Zeros are kept of padding, and of the end of a row, where no token follows.
    """
    computed = kept.any(-1)
    found, want = output.detach()[computed].float(), kept[computed].float()
    difference = float((found - want).abs().mean() / want.std().clamp(min=1e-30))
    if not difference <= bound:  # NaN is a difference, too
        raise ReuseError(
            f"decoder layer {index}, computed again by itself, is off by {difference:.1e} of its standard deviation"
        )
    known, seen, waiting = {id(one) for one in inputs}, set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ReuseError(
                f"decoder layer {index} computes with a tensor of shape {tuple(leaf.shape)} that needs a gradient and "
                "is no part of it"
            )
        waiting.extend(following for following, _ in node.next_functions)


_SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func")


class _ReusedLayer(torch.autograd.Function):
    """A layer whose output is known; its backward computes it again, with gradients.

    Its parameters are inputs, so gradients reach them in the outer graph: hooks on them (DDP's) see nothing unusual.
    """

    @staticmethod
    def forward(ctx, again, leaving, unused, hidden, *trainable):
        ctx.again, ctx.unused, ctx.trainable = again, unused, trainable
        return leaving()

    @staticmethod
    def backward(ctx, gradient):
        hidden, output = ctx.again()
        of_hidden, *found = _gradients(output, gradient.to(output.dtype), hidden, ctx.trainable)
        if ctx.unused is not None:
            found = [*_filled(ctx.trainable, found, ctx.unused)]
        return None, None, None, of_hidden, *found


class _ReenteredLayer(torch.autograd.Function):
    """A layer whose output is known; its backward computes it again, and runs a backward of it right then.

    ZeRO-3 gathers weights in hooks inside the layer, so they can't be inputs of what is outside.
    """

    @staticmethod
    def forward(ctx, again, leaving, hidden, needs_gradient):
        ctx.again = again
        return leaving()

    @staticmethod
    def backward(ctx, gradient):
        hidden, output = ctx.again()
        torch.autograd.backward(output, gradient.to(output.dtype))
        return None, None, hidden.grad, None


def _filled(weights: Sequence[Tensor], gradients: Sequence[Tensor | None], unused: set[int]) -> Iterator[Tensor]:
    for weight, gradient in zip(weights, gradients, strict=True):
        (unused.add if gradient is None else unused.discard)(id(weight))
        yield torch.zeros_like(weight) if gradient is None else gradient


@contextmanager
def without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, hooks on ``parameters`` do not run: they do in the outer graph, once."""
    hooked = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    try:
        for parameter, _ in hooked:
            parameter._backward_hooks = None
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks
