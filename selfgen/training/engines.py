"""What Accelerate or transformers has put around the model for several processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, StateDictType
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from ..context.sharding import ALONE, Together, gathered_bytes, processes_of, sharding_of

logger = logging.getLogger(__name__)


class Engine:
    """One process, DDP, or FSDP2, by Accelerate or as transformers has loaded the model."""

    def __init__(self, trainer: Trainer):
        self.accelerator, self._model = trainer.accelerator, trainer.model
        self._of_accelerate = trainer.is_fsdp_enabled  # Accelerate shards the model, when training begins
        self._plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)

    @property
    def weights_are_here(self) -> bool:
        """Whether each process has weights before training; else the first one alone does."""
        return self.accelerator.num_processes == 1 or not getattr(self._plugin, "cpu_ram_efficient_loading", False)

    def shard(self, trainer: Trainer) -> None:
        """Shard the model now, where an evaluation comes before training.

        Accelerate takes a model for FSDP2 only together with its optimizer, which the Trainer makes in training.
        """
        if self._of_accelerate and not self.accelerator._models:
            trainer.create_optimizer()
            model, trainer.optimizer = self.accelerator.prepare(trainer.model, trainer.optimizer)
            trainer.model = trainer.model_wrapped = model

    @property
    def can_be_copied(self) -> bool:
        """Whether each process can make a copy of the model before training."""
        return self.weights_are_here and sharding_of(self._model) is None

    @property
    def keeps_names(self) -> bool:
        """Whether checkpoints have weights under the names that the model has for them, and are loaded so."""
        return self._of_accelerate

    @property
    def saves_shards(self) -> bool:
        """Whether each process writes its own part of a checkpoint."""
        return self._of_accelerate and "SHARDED" in str(self._plugin.state_dict_type)

    @contextmanager
    def whole_state_dicts(self) -> Iterator[None]:
        """Inside, the Trainer saves a whole model."""
        if not self.saves_shards:
            yield
            return
        kind = self._plugin.state_dict_type
        self._plugin.state_dict_type = StateDictType.FULL_STATE_DICT
        try:
            yield
        finally:
            self._plugin.state_dict_type = kind

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
        return Together(None, self.accelerator.device) if self.is_sharded else ALONE

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

    def describe(self) -> str | None:
        """How weights are held, and what it costs; None in one process."""
        if not self.is_sharded:
            count = self.accelerator.num_processes
            return f"weights: whole in each of {count} processes (DDP)" if count > 1 else None
        sizes = gathered_bytes(self._model)
        return (
            f"weights: sharded over {processes_of(self._model)} processes (FSDP2), gathered once a step: "
            f"{sum(sizes) / 1e9:.3g} GB in {len(sizes)} collectives per process"
        )

    def holds(self, model: nn.Module) -> bool:
        """Whether ``model`` is wrapped so that processes train it together."""
        return isinstance(model, DistributedDataParallel | FSDPModule) or sharding_of(model) is not None


class TellHowWeightsAreHeld(TrainerCallback):
    """Says it when training begins."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def on_train_begin(self, *args, **kwargs):
        if told := self.engine.describe():
            logger.info(told)


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
    if plugin is not None and args.fp16:
        raise ValueError("fp16 is given, and contexts can't be made with weights that FSDP2 has in fp16: give bf16")
    if plugin is not None:
        _reduce_in_full_precision(plugin)
    if trainer.is_deepspeed_enabled:
        raise ValueError("contexts can't be made with weights that DeepSpeed shards yet; use FSDP2 or DDP")
    return Engine(trainer)


def _reduce_in_full_precision(plugin: Any) -> None:
    """Sum gradients in fp32, and leave the loss as it is, where Accelerate would have both in the weights' dtype."""
    policy = plugin.mixed_precision_policy
    if policy is None or policy.param_dtype in (None, torch.float32):
        return
    if {policy.reduce_dtype, policy.output_dtype} == {policy.param_dtype}:  # none of the user's own
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        kind = str(policy.param_dtype).removeprefix("torch.")
        logger.info("FSDP2 computes with weights in %s; gradients are summed and the loss is kept in float32", kind)
