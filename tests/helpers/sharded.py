"""Sharding on CPUs, which Accelerate knows for accelerators alone."""

from __future__ import annotations

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from selfgen.training import parallelism


def fsdp_on_cpus() -> None:
    """From here on, Accelerate shards by FSDP2 on CPUs, too, in this process."""
    parallelism._IGNORED_ON = ()
    real = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model, whole, wherever they are sharded; all processes must call it."""
    named = model.named_parameters()
    return {name: (one.full_tensor() if isinstance(one, DTensor) else one).detach().clone() for name, one in named}
