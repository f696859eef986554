"""FSDP2 (``torch.distributed.fsdp.fully_shard``): all weights at once, outside its hooks.

FSDP2 gathers a module's weights in a hook before its forward and frees them in one after it. Here all modules are
gathered first, and the hooks are taken off: forwards inside are those of a model that was never sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule

from .hooks import hooks_taken_off


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


def _is_fsdps(hook: Callable) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")
