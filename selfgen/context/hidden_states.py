"""What entered each decoder layer, and what left the last one: the hidden states that passes leave.

When a generation has reached its fixed point, every position has been computed under its final context. What entered
each decoder layer then is what an ordinary forward over the mixed context would hand to that layer. It is kept here for
whoever wants it: a training step that reuses the passes (``selfgen.training.reuse``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .models import arguments_of, decoder_of, inference, is_multimodal, vocab_size_of


class ReuseError(ValueError):
    """The passes of the model can't be reused; a training step that computes its own forward works for it."""


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The decoder layers of ``model`` that rows of text go through, in order.

    Raises:
        ReuseError: they can't be found, or a training pass computes something else in them than inference does.
    """
    config = model.config.get_text_config(decoder=True)
    modules = dict(model.named_modules())
    layers = [module for module in modules.values() if isinstance(module, GradientCheckpointingLayer)]
    of_decoder = len(layers)
    of_images = getattr(config, "cross_attention_layers", None)  # also of Mllama's decoder alone
    if is_multimodal(model) or of_images or len(layers) != config.num_hidden_layers:
        idle = _idle_on_text(model)
        modules = {name: module for name, module in modules.items() if name not in idle}
        layers = [module for module in modules.values() if isinstance(module, GradientCheckpointingLayer)]
        of_decoder = sum(isinstance(module, GradientCheckpointingLayer) for module in decoder_of(model).modules())
    # Text may leave some layers out: those that attend to an image.
    if not layers or config.num_hidden_layers not in (len(layers), of_decoder):
        raise ReuseError(
            f"{type(model).__name__} has {config.num_hidden_layers} decoder layers, but {len(layers)} that support "
            "gradient checkpointing"
        )
    for name in ("output_router_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            raise ReuseError(
                f"{name} is on, which needs more of a layer than the hidden states that are kept; switch it off"
            )
    noise = noise_of(modules)
    if noise is not None:
        raise ReuseError(f"{noise}: training and inference compute different things; set it to 0")
    return layers


_idle: WeakKeyDictionary[PreTrainedModel, frozenset[str]] = WeakKeyDictionary()


def _idle_on_text(model: PreTrainedModel) -> frozenset[str]:
    """The names of the modules that a forward over text does not run, nor any part of them: a vision tower, ..."""
    if model in _idle:
        return _idle[model]
    names = [name for name, _ in model.named_modules()]
    run: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: run.add(name)) for name, module in model.named_modules()
    ]
    ids = torch.arange(1, 3, device=model.device)[None] % vocab_size_of(model)
    try:
        with inference(model):
            model(**arguments_of(model, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False))
    except Exception as error:
        raise ReuseError(f"{type(model).__name__} does not run on tokens alone ({error})") from error
    finally:
        for handle in handles:
            handle.remove()
    above = {name.rsplit(".", parts)[0] for name in run for parts in range(name.count(".") + 1)}
    _idle[model] = frozenset(names) - above - {""}
    return _idle[model]


_RANDOM = ("drop", "jitter", "stochastic")  # dropout, layerdrop, drop_path, router_jitter_noise, ...


def noise_of(modules: dict[str, nn.Module]) -> str | None:
    """A dropout, a jitter or a random depth that makes one of them random in training; None if there is none."""
    for name, module in modules.items():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{name} is a dropout of {module.p}"
        for attribute, value in vars(module).items():
            if isinstance(value, float) and value > 0 and any(one in attribute for one in _RANDOM):
                return f"{attribute} of {name or type(module).__name__} is {value}"
    return None


class HiddenStates:
    """What entered each decoder layer, and what left the last one, at every slot of a generation.

    ``states`` is [layers + 1, S + 1, hidden_size] once there are any; the last slot holds zeros, for padding.
    """

    states: Tensor

    def __init__(self, model: PreTrainedModel, num_slots: int):
        self.layers = decoder_layers(model)
        self.num_slots = num_slots

    def write(self, slots: Tensor | slice, hidden: Tensor, layer: int | slice = slice(None)) -> None:
        """Keep what enters ``layer``, [N, hidden_size], or all layers, [layers + 1, N, hidden_size], at N slots.

        Raises:
            ReuseError: another dtype than that of what is there already.
        """
        if not hasattr(self, "states"):
            self.states = hidden.new_zeros(len(self.layers) + 1, self.num_slots + 1, hidden.shape[-1])
        if hidden.dtype != self.states.dtype:
            raise ReuseError(f"hidden states are {self.states.dtype} in one layer and {hidden.dtype} in another")
        if isinstance(slots, slice):
            self.states[layer, slots] = hidden
        else:
            self.states[layer].index_copy_(-2, slots, hidden)

    def at(self, index: int, slots: Tensor) -> Tensor:
        """[B, L, hidden_size] of ``slots`` [B, L], where slot S is padding."""
        return self.states[index][slots]


Target = Callable[[], tuple[HiddenStates, Tensor | slice]]
"""Where the pass that is being run leaves its hidden states, and at which slots."""


@contextmanager
def captured(layers: list[GradientCheckpointingLayer], target: Target) -> Iterator[None]:
    """Inside, every pass writes what enters each of its decoder layers, and what leaves the last one, to ``target``."""
    left: list[Tensor] = []  # the layer before, in this pass

    def write(index: int, hidden: Tensor) -> None:
        states, slots = target()
        states.write(slots, hidden[0], index)

    def enters(index: int, _layer: nn.Module, args: tuple) -> None:
        if not args or not isinstance(args[0], Tensor) or (index > 0 and (not left or args[0] is not left[0])):
            raise ReuseError("a decoder layer's first argument is not the hidden states that left the one before it")
        write(index, args[0])

    def leaves(index: int, _layer: nn.Module, _args: tuple, output) -> None:
        if not isinstance(output, Tensor):
            raise ReuseError(f"a decoder layer returns a {type(output).__name__}, not hidden states alone")
        left[:] = [output]
        if index + 1 == len(layers):
            left.clear()
            write(index + 1, output)

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(partial(enters, index)))
        handles.append(layer.register_forward_hook(partial(leaves, index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
