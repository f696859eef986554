"""Sharding on CPUs, which Accelerate knows for accelerators alone."""

from __future__ import annotations

import os
from collections import Counter

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfgen.training import parallelism

_INIT = AcceleratorState.__init__


def fsdp_on_cpus() -> None:
    """From here on, Accelerate shards by FSDP2 on CPUs, too, in this process."""
    parallelism._IGNORED_ON = ()

    def init(self, *args, fsdp_plugin=None, **kwargs):
        _INIT(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init


def another_run() -> None:
    """Forget what the last trainer of this process has asked Accelerate for; the processes stay connected."""
    AcceleratorState._reset_state()
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))]:
        del os.environ[name]
    if PartialState._shared_state.get("distributed_type") == DistributedType.FSDP:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model, whole, under its own names, wherever they are sharded; all processes must call it."""
    found = {}
    for name, one in model.named_parameters():
        for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
            name = name.replace(wrapper, "")
        found[name] = (one.full_tensor() if isinstance(one, DTensor) else one).detach().clone()
    return found


class Collectives(TorchDispatchMode):
    """Inside, counts the collectives that this process takes part in, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:  # what it runs comes here again
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.split(".")[0].strip("_")
            if name != "wait_tensor":
                self.counts[_KINDS.get(name, name)] += 1
        return func(*args, **(kwargs or {}))


_KINDS = {
    "allgather_base": "all_gather",
    "allgather": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce": "all_reduce",
}
