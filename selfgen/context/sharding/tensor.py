"""Tensor parallelism, as transformers does it when it loads a model: each process has a part of every large weight.

A forward sums parts over the processes of a group, and all of them then have the same hidden states and logits. They
make the same contexts, of the same rows, in the same passes: nothing of a pass depends on the process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .together import ALONE, Together

T = TypeVar("T")


def tensor_mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The processes that split each weight of ``model``; None if it is not tensor parallel."""
    mesh = getattr(model, "_device_mesh", None)  # set by from_pretrained(distributed_config=..., tp_plan=...)
    if mesh is None or (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    return mesh["tp"] if mesh.ndim > 1 else mesh


def tensor_parallel_size(model: nn.Module) -> int:
    """How many processes split each weight of ``model``; 1 if it is not tensor parallel."""
    mesh = tensor_mesh_of(model)
    return 1 if mesh is None else mesh.size()


_OF_HEADS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")


def uneven_heads(model: nn.Module) -> str | None:
    """The number of heads that can't be split evenly, if the plan splits heads; transformers fails in the forward."""
    given: Any = model.config
    size, config = tensor_parallel_size(model), given.get_text_config(decoder=True)
    plan = getattr(model, "tp_plan", None) or {}
    if not any(style == "colwise" and name.endswith(_OF_HEADS) for name, style in plan.items()):
        return None
    known = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    found = [f"{name} is {count}" for name, count in known.items() if isinstance(count, int) and count % size]
    return found[0] if found else None


def together_of(model: nn.Module) -> Together:
    """The processes that take every forward of ``model`` together, because of what the model is."""
    mesh = tensor_mesh_of(model)
    return ALONE if mesh is None else TensorGroup(mesh.get_group(), model.device)  # type: ignore[arg-type]


class TensorGroup(Together):
    """The processes that split each weight: they are given the same rows, and come to the same results."""

    def differs(self, number: float) -> bool:
        """Whether ``number`` is another one in some process."""
        found = torch.tensor([number, -number], dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return bool(found[0] != -found[1])

    def errors(self, error: Exception | None) -> list[str]:
        """What the processes have met, each once, by rank."""
        told: list[str | None] = [None] * dist.get_world_size(self.group)
        said = None if error is None else f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        dist.all_gather_object(told, said, group=self.group)
        return [one for one in told if one is not None]


def agreed(together: Together, check: Callable[[], T], told: Callable[[T], Iterable[Any]] = lambda _: ()) -> T:
    """What ``check`` returns, if the processes that split each weight come to the same.

    ``check`` may run forwards, as long as it runs as many in each process. ``told`` is what must be equal of what it
    returns: tensors, lists of tensors, and what has a ``repr``.

    Raises:
        Exception: what ``check`` raises, in this process or, as its kind or a ValueError, in another one.
        ValueError: the processes were given different things, and would wait for each other for good.
    """
    if not isinstance(together, TensorGroup):
        return check()
    error, found = None, None
    try:
        found = check()
        number = _checksum(told(found))
    except Exception as reason:
        if isinstance(reason, torch.OutOfMemoryError):  # in the middle of a forward: nobody can wait for this process
            raise
        error, number = reason, 0
    differs = together.differs(number)
    if differs and (errors := together.errors(error)) and error is None:
        raise ValueError(f"in a process that splits the same weights, {errors[0]}")
    if error is not None:
        raise error
    if differs:
        raise ValueError(
            "processes that split the same weights (tensor parallelism) have different rows, settings or results here: "
            "give all of them the same rows, ids and seed, and run them on devices of one kind"
        )
    return found  # type: ignore[return-value]


def _checksum(parts: Iterable[Any]) -> int:
    """From 1 on, exact in fp64."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, list) and part and isinstance(part[0], Tensor):
            digest.update(repr([len(row) for row in part]).encode())
            part = torch.cat(part)  # one copy from the device
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return 1 + int.from_bytes(digest.digest()[:6], "little")
