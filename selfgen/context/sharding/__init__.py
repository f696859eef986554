"""Models whose weights are split over processes, and how a generation runs on them nevertheless.

Two ways. *Gathered*: for a while each process has all weights, and runs as many passes as its own rows need.
*Together*: forwards stay collectives, so all processes of a group run the same number of them, and agree where they
would differ.
"""

from .found import check_splits, is_sharded_now, local_part, sharding_of
from .fsdp import forget_steps, gathered_bytes, keep_after_forward, processes_of, shard_again
from .gathered import is_whole, kept_whole, whole_weights
from .hooks import OF_SHARDING
from .tensor import agreed, tensor_mesh_of, tensor_parallel_size, together_of
from .together import ALONE, IN_STEP, Together

__all__ = [
    "ALONE",
    "IN_STEP",
    "OF_SHARDING",
    "Together",
    "agreed",
    "check_splits",
    "forget_steps",
    "gathered_bytes",
    "is_sharded_now",
    "is_whole",
    "keep_after_forward",
    "kept_whole",
    "local_part",
    "processes_of",
    "shard_again",
    "sharding_of",
    "tensor_mesh_of",
    "tensor_parallel_size",
    "together_of",
    "whole_weights",
]
