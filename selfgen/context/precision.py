"""The dtypes that a model computes in: its weights may have several, or be quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from .sharding import local_part

_FULL = (torch.float32, torch.float64)
_FLOATS = (*_FULL, torch.bfloat16, torch.float16)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on ``device``; None where it is off."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def autocast_inside(prepared: nn.Module, model: PreTrainedModel) -> torch.dtype | None:
    """What autocast computes in inside the forward of ``prepared``, which ends in that of ``model``; None if off."""
    device, seen = model.device, []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda *_: seen.append(autocast_dtype(device)))
    try:
        ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        prepared(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        hook.remove()
    return seen[0]


def is_plain(weight: object) -> bool:
    """Whether ``weight`` is a tensor of floats as they are, and not what a quantizer makes of them."""
    weight = local_part(weight) if isinstance(weight, Tensor) else weight
    return isinstance(weight, Tensor) and type(weight) in (Tensor, nn.Parameter) and weight.dtype in _FLOATS


def is_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether ``module`` is an ``nn.Linear`` of torch, as it is or sharded by FSDP2, and no subclass of it."""
    return type(module) is nn.Linear or type(module).__mro__[1:3] == (FSDPModule, nn.Linear)


def how_quantized(model: nn.Module) -> str | None:
    """The method by which weights of ``model`` are quantized, or the first such weight; None if there is none."""
    method = getattr(model, "quantization_method", None)  # transformers'; some methods keep their weights as buffers
    if method is not None:
        return str(getattr(method, "value", method))
    return next((name for name, weight in model.named_parameters() if not is_plain(weight)), None)


def full_precision(model: PreTrainedModel) -> bool:
    """Whether everything is computed in fp32 or better. Quantized weights may be multiplied in anything."""
    full = autocast_dtype(model.device) is None and all(weight.dtype in _FULL for weight in model.parameters())
    return full and how_quantized(model) is None


def precision_of(model: PreTrainedModel) -> torch.dtype:
    """The dtype that matrix products are computed in; the least precise one where weights have several."""
    found = {weight.dtype for weight in model.parameters() if is_plain(weight)} or {model.dtype}
    return autocast_dtype(model.device) or max(found, key=lambda dtype: torch.finfo(dtype).eps)


def dtype_clash(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Which two weights of ``model`` do not go together, if ``run`` fails; None if it runs, or they have one dtype."""
    weights: dict[nn.Module, tuple[str, torch.dtype]] = {}  # one of each module that has any
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(path, recurse=False):
            if is_plain(weight):
                weights.setdefault(module, (name, weight.dtype))
    first = {dtype: name for name, dtype in reversed(weights.values())}
    if len(first) < 2:
        return None
    entered: list[tuple[nn.Module, torch.dtype | None]] = []  # and not left yet, with the dtype of what they got
    left: list[nn.Module] = []

    def enter(module: nn.Module, args: tuple) -> None:
        given = (arg.dtype for arg in args if isinstance(arg, Tensor) and arg.is_floating_point())
        entered.append((module, next(given, None)))

    def leave(module: nn.Module, *_) -> None:
        entered.pop()
        left.append(module)

    hooks = [module.register_forward_pre_hook(enter) for module in weights]
    hooks += [module.register_forward_hook(leave) for module in weights]
    try:
        run()
        return None
    except (RuntimeError, TypeError, ValueError) as error:
        message = " ".join(str(error).split())[:200]
    finally:
        for hook in hooks:
            hook.remove()
    failed, given = entered[-1] if entered else (None, None)
    name, dtype = weights[failed] if failed is not None else next(iter(weights.values()))
    if given is None or given == dtype:  # it fails between modules, or within one that has several weights
        other, given = next((other, other_dtype) for other_dtype, other in first.items() if other_dtype != dtype)
    else:
        before = (weights[module] for module in reversed(left))
        other = next((other for other, other_dtype in before if other_dtype == given), first.get(given, "what it gets"))
    return f"{name} is {dtype}, and {other} is {given} ({message})"
