"""DeepSpeed ZeRO-3: all weights at once, outside its hooks.

ZeRO-3 gathers a module's weights in a hook before its forward, frees them in one after it, and foresees the next ones
by the order of modules in the last forward. Here all weights are gathered first, and the hooks are taken off: forwards
inside are those of a model that was never partitioned, and the order that DeepSpeed has noted stays that of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .hooks import hooks_taken_off


@contextmanager
def gathered(model: nn.Module, *, keep: bool) -> Iterator[None]:
    """Inside, ``model`` is whole; see ``whole_weights``.

    Weights are never kept: DeepSpeed would not free them before the backward, as it looks ahead for those to gather.
    """
    import deepspeed

    weights = [weight for weight in model.parameters() if hasattr(weight, "ds_id")]
    _settle(model, weights)
    with deepspeed.zero.GatheredParameters(weights), hooks_off(model):
        yield


def hooks_off(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, forwards of a model that DeepSpeed has prepared are its own: no timers, which wait for the device."""
    return hooks_taken_off(model, _is_deepspeeds)


def local_part(weight: Any) -> Tensor:
    """What this process has of a partitioned ``weight``, [N]; the last part may be shorter than DeepSpeed's buffer."""
    part = weight.ds_tensor
    before = dist.get_rank(weight.ds_process_group) * part.numel()
    return part[: max(0, weight.ds_numel - before)]


def _settle(model: nn.Module, weights: list[Any]) -> None:
    """Wait for what DeepSpeed has gathered ahead, and end what it takes to be a module's turn.

    An evaluation leaves weights on their way for a backward that does not come, and a backward leaves modules open
    whose inputs need no gradient.
    """
    for module in model.modules():
        ahead = getattr(module, "ds_inflight_param_registry", {})
        while ahead:
            weight = next(iter(ahead))
            ahead.pop(weight).wait()
    for weight in weights:
        weight.ds_active_sub_modules.clear()


def _is_deepspeeds(hook: Callable) -> bool:
    return getattr(hook, "__module__", "").startswith("deepspeed.")
