"""Refuses, by name and before anything is loaded, to train weights or rows that are split over processes."""

from __future__ import annotations

import os

from transformers import TrainingArguments

_SPLITS = {  # sizes of accelerate's ParallelismConfig; dp_replicate_size is DDP
    "dp_shard_size": "FSDP",
    "tp_size": "tensor parallelism",
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
}
_LAUNCHED = {  # what `accelerate launch` asks for in the environment
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def check_parallelism(args: TrainingArguments) -> None:
    """Raise ValueError if ``args``, or accelerate's launcher, ask for more than plain data parallelism.

    This includes what Accelerate would ignore: on CPUs it trains with DDP, whatever was asked for, and says nothing.
    """
    asked = [name for name in ("fsdp", "deepspeed") if getattr(args, name, None)]
    asked += [f"{kind} ({name})" for name, kind in _LAUNCHED.items() if _is_true(name)]
    asked += [f"{kind} ({name}={size})" for name, kind, size in _sizes(args) if size > 1]
    if asked:
        raise ValueError(
            f"{', '.join(asked)}: contexts can't be made with weights or rows that are split over processes yet, and "
            "on CPUs Accelerate would ignore it; leave it out and train with DDP (torchrun) or on one device"
        )


def _sizes(args: TrainingArguments) -> list[tuple[str, str, int]]:
    """(name, what it is, size) of each kind of parallelism but DDP."""
    config = getattr(args, "parallelism_config", None)
    if config is not None:
        return [(name, kind, getattr(config, name, None) or 1) for name, kind in _SPLITS.items()]
    if not _is_true("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return []
    names = {name: f"PARALLELISM_CONFIG_{name.upper()}" for name in _SPLITS}
    return [(names[name], kind, int(os.environ.get(names[name], "1"))) for name, kind in _SPLITS.items()]


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")
