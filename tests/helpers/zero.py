"""DeepSpeed on CPUs, which Accelerate would leave out there without a word."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from selfgen.context.sharding import whole_weights
from selfgen.training import parallelism

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # which DeepSpeed reads when it is imported


@contextmanager
def deepspeed_on_cpus() -> Iterator[None]:
    """Inside, Accelerate takes a DeepSpeed plugin on CPUs as it does elsewhere, and DeepSpeed compiles nothing."""
    begin = AcceleratorState.__init__

    def patched(state, *args, deepspeed_plugin=None, mixed_precision=None, **kwargs):
        begin(state, *args, deepspeed_plugin=deepspeed_plugin, mixed_precision=mixed_precision, **kwargs)
        if deepspeed_plugin is not None and state.deepspeed_plugins is None:
            state.distributed_type = DistributedType.DEEPSPEED
            deepspeed_plugin.set_mixed_precision(mixed_precision)
            deepspeed_plugin.select(_from_accelerator_state=True)
            state.deepspeed_plugins = deepspeed_plugin

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratorState, "__init__", patched)
        patch.setattr(parallelism, "_IGNORED_ON", ())
        patch.setattr(import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
        yield


def zero_config(stage: int, **changes) -> dict:
    """What users write for a stage, with the sizes that the Trainer fills in."""
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    zero = {"stage": stage}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        zero["stage3_param_persistence_threshold"] = 0  # as the weights of tiny models would all stay whole
    return {**dict.fromkeys(auto, "auto"), "zero_optimization": {**zero, **changes.pop("zero", {})}, **changes}


def whole_weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all weights; all processes call it."""
    with whole_weights(model):
        return {name: weight.detach().clone() for name, weight in model.named_parameters()}
