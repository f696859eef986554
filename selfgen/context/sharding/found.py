"""How the weights of a model are split over processes, if they are."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from . import zero
from .tensor import tensor_parallel_size, uneven_heads

Sharding = Literal["fsdp2", "zero3"]


def local_part(tensor: Tensor) -> Tensor:
    """What this process has of a weight or a gradient: all of it, where it is not sharded."""
    if hasattr(tensor, "ds_tensor") and not tensor.numel():  # by ZeRO-3
        return zero.local_part(tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded_now(tensor: Tensor) -> bool:
    """Whether this process has only a part of ``tensor``, along a dimension of the mesh that FSDP2 shards over."""
    return isinstance(tensor, DTensor) and any(one.is_shard() for one in tensor.placements)


_REFUSED = {  # sizes of transformers' DistributedConfig
    "pp_size": "pipeline parallelism",
    "ep_size": "expert parallelism",
}


def sharding_of(model: nn.Module) -> Sharding | None:
    """What shards the weights of ``model``, so that they can be gathered; None if nothing does."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return "fsdp2"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "zero3"
    return None


def check_splits(model: nn.Module) -> None:
    """Raise ValueError if the weights of ``model`` are split in a way in which no contexts can be made."""
    split = _refused(model)
    if split:
        raise ValueError(
            f"the model's weights are split over processes ({split}), and contexts can't be made with them: use FSDP2 "
            "(fully_shard, `--fsdp`, or distributed_config with fsdp_size) or tensor parallelism (distributed_config "
            "with tp_size), or load the model whole in each process (DDP, torchrun) or on one device"
        )


def _refused(model: nn.Module) -> str | None:
    asked = getattr(getattr(model, "config", None), "distributed_config", None)
    mesh = getattr(model, "_device_mesh", None)  # set by from_pretrained(distributed_config=..., tp_plan=...)
    if mesh is not None and mesh.size() > 1:
        sizes = {name: getattr(asked, name, None) or 1 for name in _REFUSED}
        found = [f"{_REFUSED[name]}: {name}={size}" for name, size in sizes.items() if size > 1]
        if found:
            return ", ".join(found)
    parts = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    if (getattr(model, "_tp_size", None) or 1) > 1:
        if not parts:
            return "tensor parallelism of a transformers that keeps parts as plain tensors; 5.23 or later does not"
        if heads := uneven_heads(model):
            return f"{heads}, which tp_size={tensor_parallel_size(model)} does not divide"
    elif parts and sharding_of(model) is None:
        return f"tensor parallelism by hand: {parts[0]} is a DTensor"
    if hasattr(model, "hf_split_points"):
        return "pipeline parallelism: accelerate's prepare_pippy"
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            return f"FSDP1: {name or 'the model'} is wrapped; FSDP2 works (fsdp_version: 2)"
    return None
