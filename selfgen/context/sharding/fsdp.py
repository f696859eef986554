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
def kept_whole(model: nn.Module, *, keep: bool) -> Iterator[list[ShardedModule]]:
    """Inside, FSDP2's hooks are off, and what it does not shard after a forward is whole: norm, head, what is no layer.

    Gives what it does shard after every forward, which the caller has to gather. With ``keep``, the former are left
    whole for a training forward that follows at once.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    in_time: list[ShardedModule] = []
    done = False
    try:
        for module in modules:
            module._get_fsdp_state()._lazy_init()
            if _is_sharded_after_forward(module):
                in_time.append(module)
        for module in modules:
            if module not in in_time:
                module.unshard()
        with hooks_taken_off(model, _is_fsdps):
            yield in_time
        done = True
    finally:
        for module in modules:
            if not (done and keep) or module in in_time:
                module.reshard()


def _is_sharded_after_forward(module: FSDPModule) -> bool:
    """Those that share a group of weights with another module are no layers."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # several since torch 2.12
    return len(state._modules) == 1 and all(group is not None and group._reshard_after_forward for group in groups)


def _is_fsdps(hook: Callable) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")
