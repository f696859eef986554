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
            state = module._get_fsdp_state()
            state._lazy_init()  # the first one is the root
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # since torch 2.12
            if len(state._modules) == 1 and all(group is not None and group._reshard_after_forward for group in groups):
                found.append(module)
    return found


def _is_fsdps(hook: Callable) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")
