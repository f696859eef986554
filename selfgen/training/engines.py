"""What Accelerate or transformers has put around the model for several processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from ..context.sharding import Together, sharding_of, together_of
from .tensor import partial_gradients_apart


class Engine:
    """One process, DDP, or FSDP2, by Accelerate or as transformers has loaded the model."""

    def __init__(self, trainer: Trainer):
        self.accelerator, self._model = trainer.accelerator, trainer.model
        self._of_accelerate = trainer.is_fsdp_enabled  # Accelerate shards the model, when training begins

    @property
    def weights_are_here(self) -> bool:
        """Whether each process has weights before training; else the first one alone does."""
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        return self.accelerator.num_processes == 1 or plugin is None or not plugin.cpu_ram_efficient_loading

    def autocast(self) -> AbstractContextManager[None]:
        """The mixed precision of the training forward. FSDP2 has weights cast instead, without autocast."""
        return nullcontext() if self._of_accelerate else self.accelerator.autocast()

    @property
    def is_sharded(self) -> bool:
        """Whether a forward waits for other processes, unless weights are gathered."""
        return self._of_accelerate or sharding_of(self._model) is not None

    @property
    def together(self) -> Together:
        """The processes that must take the same forwards."""
        return Together(None, self.accelerator.device) if self.is_sharded else together_of(self._model)

    @property
    def splits_weights(self) -> bool:
        """Whether a process has only a part of some weights."""
        return self.is_sharded or not together_of(self._model).is_alone

    def backward_apart(self) -> AbstractContextManager[None]:
        """Around the forward and backward of each micro-batch."""
        return partial_gradients_apart(self._model)

    def why_no_reuse(self, layers: Sequence[nn.Module]) -> str | None:
        """Why passes can't be reused with weights that come and go, if they can't."""
        if not self.is_sharded:
            return None
        if "__init_subclass__" not in vars(GradientCheckpointingLayer):
            return (
                "this transformers runs FSDP2's hooks inside a checkpointed layer, where its weights would get no "
                "gradient; transformers 5.23 or later does not"
            )
        for layer in layers:
            if any(isinstance(module, FSDPModule) for module in layer.modules() if module is not layer):
                return "FSDP2 shards parts of a decoder layer by themselves: wrap whole layers"
        return None

    def holds(self, model: nn.Module) -> bool:
        """Whether ``model`` is wrapped so that processes train it together."""
        split = sharding_of(model) is not None or not together_of(model).is_alone
        return split or isinstance(model, DistributedDataParallel | FSDPModule)


def engine_of(trainer: Trainer) -> Engine:
    """Raises ValueError for one that no contexts can be made under."""
    args, state = trainer.args, trainer.accelerator.state
    if args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError("fsdp is given, but Accelerate ignores it on this device; leave it out, or train on GPUs")
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP1 is given (fsdp_config: version 1, or fsdp_version 1), and contexts can't be made with it: give "
            "version 2, which is FSDP2"
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError("contexts can't be made with weights that DeepSpeed shards yet; use FSDP2 or DDP")
    return Engine(trainer)
