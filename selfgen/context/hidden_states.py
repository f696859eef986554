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
        if isinstance(module, PreTrainedModel) and (value := getattr(module.config, "layerdrop", 0)):
            return f"layerdrop of the configuration is {value}"  # which a forward may read there
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{name} is a dropout of {module.p}"
        for attribute, value in vars(module).items():
            if isinstance(value, float) and value > 0 and any(one in attribute for one in _RANDOM):
                return f"{attribute} of {name or type(module).__name__} is {value}"
    return None


class HiddenStates:
    """What entered each decoder layer, and what left the last one, at every slot of a generation.

    ``states`` is [layers + 1, S + 1, hidden_size] once there are any; the last slot holds zeros, for padding. It is a
    part of ``memory`` [layers + 1, slots, hidden_size], whose last slot is nobody's: there is what padding computes.
    Take copies (`at`): these attributes may be of other memory once the next generation has begun.
    """

    states: Tensor
    memory: Tensor

    def __init__(self, model: PreTrainedModel, num_slots: int, room: int):
        """``room`` is for how many slots there is memory, more than ``num_slots``."""
        self.layers = decoder_layers(model)
        self.num_slots, self.nobodys_slot = num_slots, room

    def use(self, memory: Tensor) -> None:
        """Leave the states in ``memory``, which is cleared."""
        self.memory = memory.zero_()
        self.states = memory[:, : self.num_slots + 1]

    def move_away(self) -> None:
        """Copy the states, as others will be written to their memory."""
        self.memory = self.states = self.states.clone()

    def write(self, slots: Tensor, hidden: Tensor, layer: int) -> None:
        """Keep what enters ``layer``, [N, hidden_size], at N slots of the memory.

        Raises:
            ReuseError: another dtype than that of what is there already.
        """
        if not hasattr(self, "memory"):
            self.use(hidden.new_empty(len(self.layers) + 1, self.nobodys_slot + 1, hidden.shape[-1]))
        if hidden.dtype != self.memory.dtype:
            raise ReuseError(f"hidden states are {self.memory.dtype} in one layer and {hidden.dtype} in another")
        self.memory[layer].index_copy_(0, slots, hidden)

    def at(self, index: int, slots: Tensor) -> Tensor:
        """[B, L, hidden_size] of ``slots`` [B, L], where slot S is padding."""
        return self.states[index][slots]


@contextmanager
def captured(kept: HiddenStates | None, slots_of_pass: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, every pass leaves in ``kept`` what enters each of its decoder layers, and what leaves the last one.

    ``slots_of_pass`` tells the slots [N] of the pass that is being run, where negative ones are padding.
    """
    if kept is None:
        yield
        return
    left: list[Tensor] = []  # the layer before, in this pass
    slots: list[Tensor] = []  # of this pass

    def enters(index: int, _layer: nn.Module, args: tuple) -> None:
        if not args or not isinstance(args[0], Tensor) or (index > 0 and (not left or args[0] is not left[0])):
            raise ReuseError("a decoder layer's first argument is not the hidden states that left the one before it")
        if index == 0:
            slots[:] = [slots_of_pass() % (kept.nobodys_slot + 1)]
        kept.write(slots[0], args[0][0], index)

    def leaves(index: int, _layer: nn.Module, _args: tuple, output) -> None:
        if not isinstance(output, Tensor):
            raise ReuseError(f"a decoder layer returns a {type(output).__name__}, not hidden states alone")
        left[:] = [output]
        if index + 1 == len(kept.layers):
            left.clear()
            kept.write(slots[0], output[0], index + 1)

    handles = []
    for index, layer in enumerate(kept.layers):
        handles.append(layer.register_forward_pre_hook(partial(enters, index)))
        handles.append(layer.register_forward_hook(partial(leaves, index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
