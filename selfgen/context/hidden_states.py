"""What entered each decoder layer, and what left the last one: the hidden states that passes leave behind.

When a generation has reached its fixed point, every position has been computed under its final context. What entered
each decoder layer then is what an ordinary forward over the mixed context would hand to that layer. It is kept here for
whoever wants it: a training step that reuses the passes (``selfgen.training.reuse``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


class ReuseError(ValueError):
    """The passes of the model can't be reused; the ordinary training pass works for it."""


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The decoder layers of ``model`` in order.

    Raises:
        ReuseError: they can't be told, or a training pass computes something else in them than inference does.
    """
    config = model.config.get_text_config(decoder=True)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if len(layers) != config.num_hidden_layers:
        raise ReuseError(
            f"{type(model).__name__} has {len(layers)} layers that gradient checkpointing knows of, and "
            f"{config.num_hidden_layers} decoder layers"
        )
    for name in ("output_router_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            raise ReuseError(f"{name} is on, which needs more of a layer than its output")
    noise = _noise(model)
    if noise is not None:
        raise ReuseError(f"{noise}: training and inference compute different things; set it to 0")
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
    """Raises ReuseError if the hidden states of a layer have another dtype than those of the layers before it."""
    if hidden.dtype != states.dtype:
        raise ReuseError(f"hidden states are {states.dtype} in one layer and {hidden.dtype} in another")


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
            raise ReuseError("a decoder layer's first argument is not the hidden states that left the one before it")
        keep(index, args[0])

    def _leaves(self, index: int, keep: Callable[[int, Tensor], None], _layer: nn.Module, _args: tuple, output) -> None:
        if not isinstance(output, Tensor):
            raise ReuseError(f"a decoder layer returns a {type(output).__name__}, not hidden states alone")
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
