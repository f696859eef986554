"""The passes are the forward: training on a mixed context without computing its forward again.

When a generation has reached its fixed point, every position has been computed under its final context. What entered
each decoder layer then is what an ordinary forward over the mixed context would hand to that layer, and just what
gradient checkpointing (Chen et al. 2016, arXiv 1604.06174) would save. So it is kept, and the training pass *replays*
it: a layer's forward returns what is kept, and its backward computes the layer again from what entered it, as any
checkpointed layer's does. transformers' models offer the place for it, the checkpointing function of
``GradientCheckpointingLayer``, so a model needs no change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


class ReplayError(ValueError):
    """The model can't be replayed; the ordinary training pass works for it."""


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The decoder layers of ``model`` in order.

    Raises:
        ReplayError: they can't be told, or a training pass computes something else in them than inference does.
    """
    config = model.config.get_text_config(decoder=True)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if len(layers) != config.num_hidden_layers:
        raise ReplayError(
            f"{type(model).__name__} has {len(layers)} layers that gradient checkpointing knows of, and "
            f"{config.num_hidden_layers} decoder layers"
        )
    for name in ("output_router_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            raise ReplayError(f"{name} is on, which needs more of a layer than its output")
    noise = _noise(model)
    if noise is not None:
        raise ReplayError(f"{noise}: training and inference compute different things; set it to 0")
    return layers


def _noise(model: nn.Module) -> str | None:
    """What makes a model random in training, in its layers or before them; None if nothing does."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{name} is a dropout of {module.p}"
        for attribute, value in vars(module).items():
            if isinstance(value, float) and value > 0 and ("dropout" in attribute or "jitter" in attribute):
                return f"{attribute} of {name or type(module).__name__} is {value}"
    return None


def check_like(states: Tensor, hidden: Tensor) -> None:
    """Raises ReplayError if the hidden states of a layer have another dtype than those of the layers before it."""
    if hidden.dtype != states.dtype:
        raise ReplayError(f"hidden states are {states.dtype} in one layer and {hidden.dtype} in another")


class HiddenStates:
    """What entered each decoder layer, and what left the last one, at every slot of a generation.

    ``states`` is [layers + 1, S + 1, hidden_size] once there are any; the last slot holds zeros, for padding.
    """

    states: Tensor

    def __init__(self, model: PreTrainedModel, num_slots: int):
        self.layers = decoder_layers(model)
        self.num_slots = num_slots
        self._left: Tensor | None = None  # the last layer

    @contextmanager
    def capture(self, keep: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Inside, ``keep`` gets what enters each decoder layer, and last what leaves the last one, each [1, N, H]."""
        handles = []
        for index, layer in enumerate(self.layers):
            handles.append(layer.register_forward_pre_hook(partial(self._enters, index, keep)))
            handles.append(layer.register_forward_hook(partial(self._leaves, index, keep)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enters(self, index: int, keep: Callable[[int, Tensor], None], _layer: nn.Module, args: tuple) -> None:
        if not args or not isinstance(args[0], Tensor) or (index > 0 and args[0] is not self._left):
            raise ReplayError("a decoder layer's first argument is not the hidden states that left the one before it")
        keep(index, args[0])

    def _leaves(self, index: int, keep: Callable[[int, Tensor], None], _layer: nn.Module, _args: tuple, output) -> None:
        if not isinstance(output, Tensor):
            raise ReplayError(f"a decoder layer returns a {type(output).__name__}, not hidden states alone")
        self._left = output
        if index + 1 == len(self.layers):
            self._left = None
            keep(index + 1, output)

    def put(self, slots: Tensor, hidden: Tensor, index: int | None = None) -> None:
        """Keep what enters layer ``index``, [N, hidden_size], or all layers, [layers + 1, N, hidden_size]."""
        if not hasattr(self, "states"):
            self.states = hidden.new_zeros(len(self.layers) + 1, self.num_slots + 1, hidden.shape[-1])
        check_like(self.states, hidden)
        (self.states if index is None else self.states[index]).index_copy_(-2, slots, hidden)

    def at(self, index: int, slots: Tensor) -> Tensor:
        """[B, L, hidden_size] of ``slots`` [B, L], where slot S is padding."""
        return self.states[index][slots]

    @contextmanager
    def replay(self, slots: Tensor) -> Iterator[None]:
        """Inside, training forwards over [B, L] tokens whose slots are ``slots`` [B, L] replay what is kept.

        Their backward may come later, outside.
        """
        before = [{name: value for name, value in vars(layer).items() if name in _SWITCHES} for layer in self.layers]
        try:
            for index, layer in enumerate(self.layers):
                trainable = [parameter for parameter in layer.parameters() if parameter.requires_grad]
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(self._replay_layer, index, slots, trainable)
            yield
        finally:
            for layer, switches in zip(self.layers, before, strict=True):
                for name in _SWITCHES:
                    vars(layer).pop(name, None)
                vars(layer).update(switches)

    def _replay_layer(
        self, index: int, slots: Tensor, trainable: list[Tensor], forward: Callable, hidden: Tensor, *args
    ) -> Tensor:
        given = args, getattr(forward, "keywords", {})
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(given)):
            raise ReplayError("a decoder layer has more than one input with a gradient")
        entering, leaving = partial(self.at, index, slots), partial(self.at, index + 1, slots)
        return _Replay.apply(lambda states: forward(states, *args), entering, leaving, hidden, *trainable)


_SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func")


class _Replay(torch.autograd.Function):
    """A layer whose output is known; its backward computes it again, with gradients.

    Its parameters are inputs, so gradients reach them in the outer graph: hooks on them (DDP's) see nothing unusual.
    """

    @staticmethod
    def forward(ctx, layer, entering, leaving, hidden, *trainable):
        device = hidden.device.type
        ctx.layer, ctx.entering, ctx.trainable = layer, entering, trainable
        ctx.autocast = nullcontext
        if torch.is_autocast_enabled(device):
            ctx.autocast = partial(torch.autocast, device, dtype=torch.get_autocast_dtype(device))
        return leaving()

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad(), ctx.autocast():
            hidden = ctx.entering().requires_grad_()
            output = ctx.layer(hidden)
        inputs = hidden, *ctx.trainable
        with _without_hooks(ctx.trainable):
            gradients = torch.autograd.grad(output, inputs, gradient.to(output.dtype), allow_unused=True)
        return None, None, None, *gradients


@contextmanager
def _without_hooks(parameters: list[Tensor]) -> Iterator[None]:
    """Inside, hooks on ``parameters`` do not run: they do in the outer graph, once."""
    hooked = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    try:
        for parameter, _ in hooked:
            parameter._backward_hooks = None
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks
