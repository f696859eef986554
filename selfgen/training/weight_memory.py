"""Whether weights that are sharded are gathered as a whole while contexts are made, or layer by layer in every pass."""

from __future__ import annotations

import logging
import os
from typing import Literal, get_args

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..context.sharding import Together, local_part
from ..context.sharding.fsdp import parts_in_time

logger = logging.getLogger(__name__)

Weights = Literal["auto", "gathered", "sharded"]
WEIGHTS: tuple[str, ...] = get_args(Weights)
_OPTIMIZER = 12  # bytes per trained number that are still to come: a gradient and Adam's two moments, in fp32
_GIB = 2**30


def chosen_weights(asked: str, model: nn.Module, device: torch.device, together: Together) -> str:
    """ "gathered" or "sharded", as is ``asked`` for; by what fits into the memory of every process where it is "auto".

    All processes call it, and come to the same. The log says what was chosen and what it costs.
    """
    whole, left = whole_bytes(model), free_bytes(device) - _still_to_come(model)
    fits = not together.any(whole > left / 2)  # activations and K/V take memory, too
    chosen = ("gathered" if fits else "sharded") if asked == "auto" else asked
    of = f"{whole / _GIB:.3g} GiB in all, of {max(left, 0) / _GIB:.3g} GiB that are left here"
    if chosen == "gathered":
        logger.info("weights=%s: before contexts are made, each process gathers all weights once (%s)", chosen, of)
    else:
        logger.info(
            "weights=%s: every context pass gathers the weights of %d layers (%s), and all processes take part in it, "
            "with one all-reduce; the log counts these passes as passes_in_step",
            chosen,
            len(parts_in_time(model)),
            of,
        )
    return chosen


def whole_bytes(model: nn.Module) -> int:
    """What all weights take in one process, in the dtype that FSDP2 gathers them in."""
    policies = (module._get_fsdp_state()._mp_policy for module in model.modules() if isinstance(module, FSDPModule))
    dtype = next((policy.param_dtype for policy in policies if policy.param_dtype is not None), None)
    return sum(one.numel() * (dtype or one.dtype).itemsize for one in model.parameters())


def _still_to_come(model: nn.Module) -> int:
    return sum(_OPTIMIZER * local_part(one).numel() for one in model.parameters() if one.requires_grad)


def free_bytes(device: torch.device) -> int:
    """What this process may still take on ``device``; on a CPU, its share of the machine's memory."""
    if device.type == "cpu":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes
    backend = torch.get_device_module(device)
    free, _ = backend.mem_get_info(device)
    return free + backend.memory_reserved(device) - backend.memory_allocated(device)
