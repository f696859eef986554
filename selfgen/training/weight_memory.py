"""Whether weights that are sharded are gathered as a whole while contexts are made, or layer by layer in every pass."""

from __future__ import annotations

import logging
import os
from typing import Literal, get_args

import torch
from torch import nn

from ..context.sharding import Together, gathered_bytes, local_part

logger = logging.getLogger(__name__)

Weights = Literal["auto", "gathered", "sharded"]
WEIGHTS: tuple[str, ...] = get_args(Weights)
_OPTIMIZER = 12  # bytes per trained number that are still to come: a gradient and Adam's two moments, in fp32


def chosen_weights(asked: str, model: nn.Module, device: torch.device, together: Together) -> str:
    """Gathered or sharded, as is ``asked`` for; where it is "auto", by what fits into the memory of every process.

    All processes call it, and come to the same.
    """
    if asked != "auto":
        return asked
    whole, left = sum(gathered_bytes(model)), free_bytes(device) - _still_to_come(model)
    fits = not together.any(whole > left / 2)  # activations and K/V take memory, too
    chosen = "gathered" if fits else "sharded"
    logger.info(
        "weights=auto: %s, as the whole weights take %.3g GB of %.3g that will be left here",
        chosen,
        whole / 1e9,
        left / 1e9,
    )
    return chosen


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
