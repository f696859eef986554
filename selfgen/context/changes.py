"""Whether a model is still what it was when something was found out, recorded or computed with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from .sharding import OF_SHARDING, local_part

_PLAIN = {bool, str, int, float}
_OF_TRAINING = ("training", "gradient_checkpointing")  # which change nothing in inference
_OF_DEEPSPEED = ("ds_", "_external_params", "applied_pre_backward_ref_cnt")  # what ZeRO-3 counts in modules


def make_of(model: nn.Module) -> object:
    """Unequal before and after modules, hooks or settings of ``model`` have changed; weights may change.

    It is made at every generation and every step, so it looks at each module's own attributes alone, and at no tensor.
    """
    modules = list(model.modules())
    return (
        modules,
        [type(module) for module in modules],
        [  # keys, which never recur
            tuple(key for key, hook in (*before.items(), *after.items()) if not hasattr(hook, OF_SHARDING))
            for module in modules
            for before, after in [(module._forward_pre_hooks, module._forward_hooks)]
        ],
        [vars(module).get("forward") for module in modules],
        [  # such as is_causal, or a window
            value
            for module in modules
            for name, value in vars(module).items()
            if type(value) in _PLAIN and name not in _OF_TRAINING and not name.startswith(_OF_DEEPSPEED)
        ],
        [repr(vars(config)) for config in _configs(modules)],
    )


_UNRELATED = {*vars(nn.Module()), "gradient_checkpointing"}  # to what is computed in inference, or compared by itself


def settings_of(model: nn.Module) -> tuple[object, ...]:
    """Unequal before and after modules, hooks or plain attributes of ``model`` have changed, numbers, too."""
    modules = list(model.modules())
    # Keys of hooks count up and never recur, ids of objects do.
    hooks = [(*module._forward_pre_hooks, *module._forward_hooks) for module in modules]
    forwards = [vars(module).get("forward") for module in modules]
    attributes = [
        {
            name: repr(value)
            for name, value in vars(one).items()
            if name not in _UNRELATED and not name.startswith(_OF_DEEPSPEED) and _is_plain(value)
        }
        for one in (*modules, *_configs(modules))
    ]
    return modules, hooks, forwards, attributes


def _configs(modules: Iterable[nn.Module]) -> list[object]:
    return [*{id(module.config): module.config for module in modules if isinstance(module, PreTrainedModel)}.values()]


def _is_plain(value: object) -> bool:
    """Numbers, text, and small collections of them: settings, such as those of adapters."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def bits_of(model: nn.Module) -> list[int]:
    """Numbers for the weights and buffers of ``model``, of the bits that this process holds and of their places.

    What has been changed and changed back has the numbers that it had. No process waits for another one.
    """
    tensors = (local_part(one) for one in (*model.parameters(), *model.buffers()))
    parts = (part for tensor in tensors for part in _parts(tensor.detach()))
    return on_host([_number_of(bits) for part in parts for bits in _bits(part).split(_AT_ONCE)])


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that ``tensor`` is made of, if it is a quantized one."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor.as_subclass(Tensor)


_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 2**24  # as torch sums small integers in a copy of 64 bits each


def _bits(part: Tensor) -> Tensor:
    return part.contiguous().view(-1).view(_OF_SIZE.get(part.itemsize, torch.uint8))


def _number_of(bits: Tensor) -> Tensor:
    """int64 []: sums of the rows and the columns of a square that has ``bits`` [N], weighted by where they are."""
    width = max(1, math.isqrt(len(bits)))
    whole = len(bits) // width * width
    square, rest = bits[:whole].view(-1, width), bits[whole:]
    rows = torch.cat([square.sum(1, dtype=torch.int64), rest.sum(dtype=torch.int64)[None]])
    columns = square.sum(0, dtype=torch.int64)
    columns[: len(rest)] += rest
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for sums, factor in ((rows, 2654435761), (columns, 40503)):
        total += (sums * torch.arange(1, len(sums) + 1, device=bits.device)).sum() * factor
    return total


def on_host(numbers: list[Tensor]) -> list:
    """Tensors [] as numbers: one copy from each device, not one per tensor."""
    devices = {one.device for one in numbers}
    found = {device: iter(torch.stack([x for x in numbers if x.device == device]).tolist()) for device in devices}
    return [next(found[one.device]) for one in numbers]
