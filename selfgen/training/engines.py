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
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.modeling_layers import GradientCheckpointingLayer

from ..context.lockstep import Steps, lockstep
from ..context.sharding import (
    Together,
    gathered_bytes,
    processes_of,
    sharding_of,
    tensor_parallel_size,
    together_of,
    whole_weights,
)
from ..context.sharding.fsdp import parts_in_time
from ..context.sharding.zero import hooks_off
from .parallelism import check_accelerate, check_deepspeed, check_fsdp_version
from .tensor import partial_gradients_apart
from .weight_memory import chosen_weights

logger = logging.getLogger(__name__)


class Engine:
    """One process, DDP, or FSDP2, by Accelerate or as transformers has loaded the model."""

    def __init__(self, trainer: Trainer):
        self.accelerator, self._trainer, self._model = trainer.accelerator, trainer, trainer.model
        self._of_accelerate = trainer.is_fsdp_enabled  # Accelerate shards the model, when training begins
        self._weights, self._weights_chosen = trainer.args.weights, False
        self._plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)

    @property
    def weights_are_here(self) -> bool:
        """Whether each process has weights before training; else the first one alone does."""
        return self.accelerator.num_processes == 1 or not getattr(self._plugin, "cpu_ram_efficient_loading", False)

    @property
    def scales_loss(self) -> bool:
        """Whether a step may be left out, as scaled gradients overflow in fp16."""
        return self.accelerator.scaler is not None

    @property
    def steps_in_backward(self) -> bool:
        """Whether gradients are gone when the Trainer asks for the optimizer's step."""
        return False

    def gradient_norm(self) -> float | None:
        """Of the step that was just taken, where `steps_in_backward`."""
        return None

    def check_first(self, *, resumes: bool) -> None:
        """Raise RuntimeError or ValueError where training can't begin (again), or from a checkpoint."""
        if self._of_accelerate and resumes:
            check_accelerate(
                "this accelerate loses the optimizer's state of a checkpoint under FSDP2", "begin a new run"
            )
        if self._of_accelerate and sharding_of(self._model) is not None:
            check_accelerate(
                "the model is sharded already, by an earlier train() or evaluate(), and this accelerate would train "
                "other weights than the model's",
                "make a new trainer with a new model",
            )

    def loading_whole(self) -> AbstractContextManager[None]:
        """Inside, other models are loaded whole, in each process."""
        return nullcontext()

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
        return Together(None, self.accelerator.device) if self.is_sharded else together_of(self._model)

    @property
    def splits_weights(self) -> bool:
        """Whether a process has only a part of some weights."""
        return self.is_sharded or not together_of(self._model).is_alone

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds here or, where weights are split, in one of all processes, which all call this."""
        return self.together.any(flag)

    def backward_apart(self) -> AbstractContextManager[None]:
        """Around the forward and backward of each micro-batch."""
        return partial_gradients_apart(self._model)

    @property
    def stay_sharded(self) -> bool:
        """Whether passes gather weights, so that a forward of one process is one of all."""
        return self._weights == "sharded"

    def choose_weights(self, model: nn.Module) -> None:
        """Once, when ``model`` is as it is trained: whether passes gather weights. All processes call it."""
        if sharding_of(model) == "fsdp2" and not self._weights_chosen:
            self._weights = chosen_weights(self._weights, model, self.accelerator.device, self.together)
            self._weights_chosen = True

    def own_forwards(self, model: nn.Module, *, keep: bool) -> AbstractContextManager[Steps | None]:
        """Inside, each process runs as many forwards as it needs; all enter together."""
        self.choose_weights(model)
        return lockstep(model, keep=keep) if self.stay_sharded else whole_weights(model, keep=keep)

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

    @property
    def reuses_together(self) -> bool:
        """Whether all processes must reuse passes, or none: hooks inside the layers gather weights, and must run."""
        return False

    def describe(self) -> str | None:
        """How weights are held, and what it costs; None in one process."""
        count = self.accelerator.num_processes
        if not self.splits_weights:
            return f"weights: whole in each of {count} processes (DDP)" if count > 1 else None
        if not self.is_sharded:
            return f"weights: each split over {tensor_parallel_size(self._model)} processes (tensor parallelism)"
        model = self._trainer.model  # as it is trained: torch.compile may be around what the trainer was given
        self.choose_weights(model)
        sizes = [*map(sum, map(gathered_bytes, parts_in_time(model)))] if self.stay_sharded else gathered_bytes(model)
        when = "in every context pass, with an all-reduce" if self.stay_sharded else "once a step"
        return (
            f"weights: sharded over {processes_of(model)} processes (FSDP2), gathered {when}: "
            f"{sum(sizes) / 1e9:.3g} GB in {len(sizes)} collectives per process"
        )

    def holds(self, model: nn.Module) -> bool:
        """Whether ``model`` is wrapped so that processes train it together."""
        split = sharding_of(model) is not None or not together_of(model).is_alone
        return split or isinstance(model, DistributedDataParallel | FSDPModule)


class Zero(Engine):
    """DeepSpeed's engine: ZeRO-1, ZeRO-2 or ZeRO-3. It takes the optimizer's step inside the last backward."""

    def __init__(self, trainer: Trainer):
        super().__init__(trainer)
        self._plugin = trainer.accelerator.state.deepspeed_plugin
        self._config = self._plugin.hf_ds_config.config
        check_deepspeed(self._config)

    @property
    def weights_are_here(self) -> bool:
        return True

    @property
    def can_be_copied(self) -> bool:
        return True  # while weights are whole

    @property
    def keeps_names(self) -> bool:
        return True

    @property
    def is_sharded(self) -> bool:
        return self._config["zero_optimization"]["stage"] == 3

    def describe(self) -> str | None:
        stage, count = self._config["zero_optimization"]["stage"], self.accelerator.num_processes
        how = "sharded over" if stage == 3 else "whole in each of"
        again = ", gathered before contexts are made and again in training" if stage == 3 else ""
        return f"weights: {how} {count} processes (DeepSpeed ZeRO-{stage}){again}"

    @property
    def scales_loss(self) -> bool:
        return bool(self._config.get("fp16", {}).get("enabled"))

    @property
    def steps_in_backward(self) -> bool:
        return True

    def gradient_norm(self) -> float | None:
        """Of the step that was just taken, if DeepSpeed computes it; infinite where it left the step out."""
        engine = self._trainer.deepspeed
        if getattr(engine.optimizer, "overflow", False):
            return float("inf")
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def own_forwards(self, model: nn.Module, *, keep: bool) -> AbstractContextManager[Steps | None]:
        return whole_weights(model, keep=keep) if self.is_sharded else hooks_off(model)

    @contextmanager
    def loading_whole(self) -> Iterator[None]:
        unset_hf_deepspeed_config()
        try:
            yield
        finally:
            set_hf_deepspeed_config(self._plugin.hf_ds_config)

    def why_no_reuse(self, layers: Sequence[nn.Module]) -> str | None:
        return None

    @property
    def reuses_together(self) -> bool:
        return self.is_sharded

    def holds(self, model: nn.Module) -> bool:
        return model is self._trainer.deepspeed

    def check_first(self, *, resumes: bool) -> None:
        if self._trainer.deepspeed is not None:
            raise RuntimeError(
                "DeepSpeed has prepared this trainer's model already, by an earlier train() or evaluate(), and "
                "transformers' Trainer would train on with the learning rates of that run: make a new trainer"
            )


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
    if plugin is not None:
        check_fsdp_version(plugin.fsdp_version)
    if plugin is not None and args.fp16:
        raise ValueError("fp16 is given, and contexts can't be made with weights that FSDP2 has in fp16: give bf16")
    if plugin is not None:
        _reduce_in_full_precision(plugin)
        if args.save_strategy != "no":
            check_accelerate(
                "under FSDP2, this accelerate writes no checkpoints that a run can be resumed from",
                "give save_strategy=no: the model is saved at the end",
            )
    if args.weights == "sharded" and not (trainer.is_fsdp_enabled or sharding_of(trainer.model) == "fsdp2"):
        raise ValueError(
            "weights is sharded, but FSDP2 does not shard the weights (ZeRO-3 gathers them in an order of its own): "
            "start with accelerate launch and examples/launch/fsdp2.yaml, or give --fsdp-size, or leave weights out"
        )
    if args.deepspeed and not trainer.is_deepspeed_enabled:
        raise ValueError("deepspeed is given, but Accelerate ignores it on this device; leave it out, or train on GPUs")
    engine = Zero(trainer) if trainer.is_deepspeed_enabled else Engine(trainer)
    if args.auto_find_batch_size and args.world_size > 1:
        split = (
            "weights are split over processes" if engine.splits_weights else f"there are {args.world_size} processes"
        )
        raise ValueError(
            f"auto_find_batch_size is given, and {split}: one that runs out of memory would begin anew while others "
            "wait for it. Give per_device_train_batch_size, and leave auto_find_batch_size out"
        )
    if args.world_size > 1 and trainer.accelerator.dataloader_config.dispatch_batches:
        raise ValueError(
            "dispatch_batches is given (accelerator_config): the first process would read the batches of all, and "
            "can't join those of rows of different lengths, while the others wait for it. Leave it out, so that each "
            "process reads its own"
        )
    return engine


def _reduce_in_full_precision(plugin: Any) -> None:
    """Sum gradients in fp32, and leave the loss as it is, where Accelerate would have both in the weights' dtype."""
    policy = plugin.mixed_precision_policy
    if policy is None or policy.param_dtype in (None, torch.float32):
        return
    if {policy.reduce_dtype, policy.output_dtype} == {policy.param_dtype}:  # none of the user's own
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        kind = str(policy.param_dtype).removeprefix("torch.")
        logger.info("FSDP2 computes with weights in %s; gradients are summed and the loss is kept in float32", kind)
