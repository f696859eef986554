"""FSDP2 (``torch.distributed.fsdp.fully_shard``): all weights at once, outside its hooks.

FSDP2 gathers a module's weights in a hook before its forward and frees them in one after it. Here all modules are
gathered first, and the hooks are taken off: forwards inside are those of a model that was never sharded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@contextmanager
def gathered(model: nn.Module, *, keep: bool) -> Iterator[None]:
    """Inside, ``model`` is whole; see ``whole_weights``."""
    modules = _modules(model)
    whole = False
    try:
        for module in modules:
            module._get_fsdp_state()._lazy_init()  # the first one is the root, which tells the others; once
        for handle in [module.unshard(async_op=True) for module in modules]:
            assert handle is not None
            handle.wait()
        with _hooks_taken_off(model):
            yield
        whole = True
    finally:
        if not (whole and keep):
            shard_again(model)


def shard_again(model: nn.Module) -> None:
    """Free the weights that are whole now, as after a forward that has not come; no communication."""
    for module in _modules(model):
        module.reshard()


def keep_after_forward(module: nn.Module) -> None:
    """Leave the weights of ``module`` whole from its forward to its backward, if it is sharded by itself."""
    if isinstance(module, FSDPModule):
        module.set_reshard_after_forward(False, recurse=False)


def gathered_bytes(model: nn.Module) -> list[int]:
    """What is gathered in each of the collectives that make ``model`` whole."""
    states = dict.fromkeys(module._get_fsdp_state() for module in _modules(model))
    groups = [group for state in states for group in _groups(state) if group.fsdp_params]
    return [
        sum(one.sharded_param.numel() * (group.mp_policy.param_dtype or one.sharded_param.dtype).itemsize
            for one in group.fsdp_params)
        for group in groups
    ]  # fmt: skip


def processes_of(model: nn.Module) -> int:
    """The number of processes that the weights of ``model`` are split over; with replicas, of one of them."""
    weights = (one for one in model.parameters() if isinstance(one, DTensor))
    counts = (
        math.prod(size for size, place in zip(one.device_mesh.shape, one.placements, strict=True) if place.is_shard())
        for one in weights
    )
    return max(counts, default=1)


def _groups(state: Any) -> list[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [state._fsdp_param_group] if state._fsdp_param_group else []  # before torch 2.13


def _modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def _hooks_taken_off(model: nn.Module) -> Iterator[None]:
    taken = [
        (hooks, list(hooks), {key for key, hook in hooks.items() if _is_fsdps(hook)})
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
    ]
    own = [{key: hooks[key] for key in keys} for hooks, _, keys in taken]
    try:
        for hooks, _, keys in taken:
            for key in keys:
                del hooks[key]
        yield
    finally:
        for (hooks, order, _), fsdps in zip(taken, own, strict=True):
            if fsdps:  # each in its place: FSDP's own come first, or last
                now = dict(hooks)
                hooks.clear()
                hooks.update({key: (fsdps | now)[key] for key in order if key in fsdps or key in now})
                hooks.update(now)


def _is_fsdps(hook: Callable) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")
