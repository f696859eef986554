"""Refuses, by name and before anything is loaded, kinds of parallelism that no contexts can be made under."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import accelerate
import torch
from accelerate.data_loader import BatchSamplerShard
from transformers import TrainingArguments
from transformers.utils import is_accelerate_available

_SPLITS = {  # sizes of accelerate's ParallelismConfig
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
}
_LAUNCHED = {"ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}  # what `accelerate launch` asks for in the environment
_SHARDS = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
_NOT_SPLIT_ON = ("cpu",)  # devices on which Accelerate refuses tensor parallelism, and says something else
_IGNORED_ON = ("cpu",)  # devices on which Accelerate takes DDP in place of them, and says nothing


def check_parallelism(args: TrainingArguments) -> None:
    """Raise ValueError if ``args``, or accelerate's launcher, ask for what contexts can't be made under.

    This includes what Accelerate would ignore: on CPUs it trains with DDP, whatever was asked for, and says nothing.
    """
    refused = [f"{kind} ({name})" for name, kind in _LAUNCHED.items() if _is_true(name)]
    refused += [f"{kind} ({name}={size})" for name, kind, size in _sizes(args) if size > 1]
    if refused:
        raise ValueError(
            f"{', '.join(refused)}: contexts can't be made with rows or layers that are split over processes; leave it "
            "out, and shard weights (FSDP2, DeepSpeed ZeRO, tensor parallelism) or use DDP (torchrun)"
        )
    asked = _shards(args)
    device = "cpu" if args.use_cpu or not torch.accelerator.is_available() else "an accelerator"
    if asked and device in _IGNORED_ON:
        raise ValueError(
            f"{', '.join(asked)}: on CPUs Accelerate would ignore it and train with DDP; leave it out and train with "
            "DDP (torchrun), or have transformers shard the model as it loads it, which works on CPUs, too "
            "(--fsdp-size, or DistributedConfig(fsdp_size=...) in Python)"
        )


def check_tensor_parallel(args: TrainingArguments, size: int) -> None:
    """Raise ValueError if a model that ``size`` processes split can't be trained with ``args``."""
    for name, _, asked in _sizes(args, {"tp_size": "tensor parallelism"}):
        if asked not in (1, size):
            raise ValueError(
                f"{name} is {asked}, but each weight of the model is split over {size} process{'es' * (size > 1)}: "
                f"load the model with distributed_config=DistributedConfig(tp_size={asked}) (--tp-size)"
            )
    if size > 1 and (shards := _shards(args)):
        raise ValueError(
            f"{', '.join(shards)}: the model is tensor parallel, which goes without them: leave them out, and load the "
            "model with distributed_config=DistributedConfig(tp_size=..., fsdp_size=...), which shards it, too"
        )
    if size > 1 and args.device.type in _NOT_SPLIT_ON:
        raise ValueError(
            "the model is tensor parallel (tp_size), which Accelerate trains on accelerators only: leave use_cpu out, "
            "or tp_size"
        )


def check_even(loader: Any) -> None:
    """Raise ValueError if some processes would get fewer batches of an epoch than others."""
    shard: Any = getattr(loader, "batch_sampler", None)
    if not isinstance(shard, BatchSamplerShard) or shard.even_batches or shard.drop_last:
        return
    sampler, processes = shard.batch_sampler, shard.num_processes
    uneven = bool(len(sampler) % processes)
    if shard.split_batches:  # the last one may not have rows for all
        uneven = 0 < len(sampler.sampler) % sampler.batch_size <= sampler.batch_size // processes * (processes - 1)
    if uneven:
        raise ValueError(
            f"even_batches is false (accelerator_config), and {len(sampler.sampler)} rows in batches of "
            f"{sampler.batch_size} are no equal number of batches for each of {processes} processes: those with more "
            "would wait for the others for good. Leave even_batches out, give "
            "dataloader_drop_last=True, or another per_device_train_batch_size"
        )


def check_fsdp_version(version: int) -> None:
    """Raise ValueError for another version of FSDP than 2."""
    if version != 2:
        raise ValueError(
            f"FSDP{version} is given (fsdp_config: version {version}, or fsdp_version {version}; old transformers have "
            "it by default), and contexts can't be made with it: give version 2, which is FSDP2"
        )


def check_accelerate(why: str, remedy: str) -> None:
    """Raise ValueError where Accelerate is older than the first one whose FSDP2 does what is asked for."""
    if not is_accelerate_available("1.13.0"):
        raise ValueError(f"{why} (accelerate {accelerate.__version__}): install accelerate 1.13 or later, or {remedy}")


def _shards(args: TrainingArguments) -> list[str]:
    """What is asked to shard weights, by ``args`` or by accelerate's launcher."""
    asked = [name for name in ("fsdp", "deepspeed") if getattr(args, name, None)]
    return asked + [f"{kind} ({name})" for name, kind in _SHARDS.items() if _is_true(name)]


def _sizes(args: TrainingArguments, kinds: Mapping[str, str] = _SPLITS) -> list[tuple[str, str, int]]:
    """(name, what it is, size) of each of these kinds of parallelism: of those that are refused, where not given."""
    config = getattr(args, "parallelism_config", None)
    if config is not None:
        return [(name, kind, getattr(config, name, None) or 1) for name, kind in kinds.items()]
    if not _is_true("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return []
    names = {name: f"PARALLELISM_CONFIG_{name.upper()}" for name in kinds}
    return [(names[name], kind, int(os.environ.get(names[name], "1"))) for name, kind in kinds.items()]


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")


_GATHERS = ("zero_optimization", "stage3_gather_16bit_weights_on_model_save")
_NOT_WITH_CONTEXTS = {  # what DeepSpeed may be asked for: by the keys in its configuration, and the values that are off
    ("zero_optimization", "zero_hpz_partition_size"): (1,),
    ("zero_optimization", "zero_quantized_weights"): (),
    ("zero_optimization", "zero_quantized_nontrainable_weights"): (),
    ("zero_optimization", "mics_shard_size"): (-1,),
    ("zero_optimization", "zenflow"): (),
    ("zero_optimization", "offload_param", "device"): ("none", "cpu"),
    ("zero_optimization", "offload_optimizer", "device"): ("none", "cpu"),
    ("tensor_parallel", "autotp_size"): (1,),
    ("inference", "tensor_parallel", "tp_size"): (1,),
    ("sequence_parallel_size",): (1,),
    ("expert_parallel", "enabled"): (),
    ("pipeline",): (),
    ("torch_autocast", "enabled"): (),
    ("amp", "enabled"): (),
    ("compile", "deepcompile"): (),
    ("hybrid_engine", "enabled"): (),
    ("curriculum_learning", "enabled"): (),
    ("data_efficiency", "enabled"): (),
    ("progressive_layer_drop", "enabled"): (),
    ("compression_training",): (),
    ("sparse_attention",): (),
    ("weight_quantization",): (),
}


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Raise ValueError if DeepSpeed's ``config`` asks for what contexts can't be made under, or would save no model."""
    stage = _at(config, ("zero_optimization", "stage")) or 0
    if stage not in (1, 2, 3):
        raise ValueError(
            f"deepspeed: zero_optimization.stage is {stage}; accepted: 1, 2 or 3 (without ZeRO it is plain data "
            "parallelism: leave deepspeed out, and torchrun trains with DDP)"
        )
    for keys, off in _NOT_WITH_CONTEXTS.items():
        value = _at(config, keys)
        if value and value not in off:
            raise ValueError(
                f"deepspeed: {'.'.join(keys)} is {value!r}, with which contexts can't be made, or nobody has compared "
                "them with those of one process: leave it out"
            )
    if stage == 3 and _at(config, _GATHERS) is not True:
        raise ValueError(
            f"deepspeed: with stage 3, no model would be saved unless {'.'.join(_GATHERS)} is true: set it to true"
        )


def _at(config: Mapping[str, Any], keys: Sequence[str]) -> Any:
    found: Any = config
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
