"""Tensor parallelism, as transformers does it when it loads a model: each process has a part of every large weight.

A forward sums parts over the processes of a group, and all of them then have the same hidden states and logits. They
make the same contexts, of the same rows, in the same passes: nothing of a pass depends on the process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from .together import ALONE, Together

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def tensor_mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The processes that split each weight of ``model``; None if it is not tensor parallel."""
    mesh = getattr(model, "_device_mesh", None)  # set by from_pretrained(distributed_config=..., tp_plan=...)
    if mesh is None or (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    return mesh["tp"] if mesh.ndim > 1 else mesh


def together_of(model: nn.Module) -> Together:
    """The processes that take every forward of ``model`` together, because of what the model is."""
    mesh = tensor_mesh_of(model)
    return ALONE if mesh is None else Together(mesh.get_group(), model.device)
