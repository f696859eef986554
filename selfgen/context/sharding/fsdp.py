"""FSDP2 (``torch.distributed.fsdp.fully_shard``): all weights at once, outside its hooks.

FSDP2 gathers a module's weights in a hook before its forward and frees them in one after it. Here all modules are
gathered first, and the hooks are taken off: forwards inside are those of a model that was never sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from .hooks import hooks_taken_off

ShardedModule = Any
"""A ``Module`` that ``fully_shard`` has made an ``FSDPModule``, too, which no type can say."""


@contextmanager
def gathered(model: nn.Module, *, keep: bool) -> Iterator[None]:
    """Inside, ``model`` is whole; see ``whole_weights``."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    whole = False
    try:
        for module in modules:
            module._get_fsdp_state()._lazy_init()  # the first one is the root, which tells the others; once
        for handle in [module.unshard(async_op=True) for module in modules]:
            assert handle is not None
            handle.wait()
        with hooks_taken_off(model, _is_fsdps):
            yield
        whole = True
    finally:
        if not (whole and keep):
            for module in modules:
                module.reshard()  # which communicates nothing


@contextmanager
def kept_whole(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Inside, a forward and a backward leave gathered weights as they are, for the next micro-batch of the step.

    They are sharded afterwards where that was the ``last`` one, or failed: an optimizer must not find them whole.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in modules for group in _groups(module)]
    before = [(group.post_forward_mesh_info, group.reshard_after_backward) for group in groups]
    done = False
    try:
        for group in groups:
            group.post_forward_mesh_info, group.reshard_after_backward = None, False
        yield
        done = True
    finally:
        for group, (forward, backward) in zip(groups, before, strict=True):
            group.post_forward_mesh_info, group.reshard_after_backward = forward, backward
        if last or not done:
            for module in modules:
                module.reshard()


def _groups(module: FSDPModule) -> list[FSDPParamGroup]:
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)  # since torch 2.12
    if several is not None:
        return several
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


@contextmanager
def gathered_in_time(model: nn.Module, *, keep: bool) -> Iterator[list[ShardedModule]]:
    """Inside, FSDP2's hooks are off, and what it does not shard after a forward is whole: norm, head, what is no layer.

    Gives what it does shard after every forward (`parts_in_time`), which the caller has to gather. With ``keep``, the
    rest is left whole for a training forward that follows at once.
    """
    in_time = parts_in_time(model)
    rest = [module for module in model.modules() if isinstance(module, FSDPModule) and module not in in_time]
    done = False
    try:
        for module in rest:
            module.unshard()
        with hooks_taken_off(model, _is_fsdps):
            yield in_time
        done = True
    finally:
        for module in [*in_time, *([] if done and keep else rest)]:
            module.reshard()


def parts_in_time(model: nn.Module) -> list[ShardedModule]:
    """What FSDP2 shards after a forward, and gathers for each: layers. It is not shared with another module."""
    found: list[ShardedModule] = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state, groups = module._get_fsdp_state(), _groups(module)
            state._lazy_init()  # the first one is the root
            if groups and len(state._modules) == 1 and all(group._reshard_after_forward for group in groups):
                found.append(module)
    return found


def _is_fsdps(hook: Callable) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")
