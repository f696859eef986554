"""torch.func.vmap over the ops: call after call, each as it would be alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _rule(op: Any, written: list[str]) -> Callable[..., Any]:
    """The batching rule of `op`, which writes to its arguments `written`."""
    names = [argument.name for argument in op._schema.arguments]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        for name, dim in zip(names, in_dims, strict=False):  # defaults at the end are not handed over
            if name in written and dim is None:
                raise ValueError(
                    f"{name} is written in place and is one tensor for all the calls that torch.func.vmap makes; give "
                    f"each its own, by a {name} with the batch dimension and in_dims"
                )
        if info.batch_size == 0:
            raise ValueError("torch.func.vmap got a batch dimension of size 0; pass at least one call's tensors")
        moved = [
            arg if dim is None else arg.movedim(dim, 0) for arg, dim in zip(args, in_dims, strict=True)
        ]  # [B, ...], views, so that what is written arrives
        calls = [
            op(*(arg if dim is None else arg[i] for arg, dim in zip(moved, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if calls[0] is None:
            return None, None
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(torch.stack(results) for results in zip(*calls, strict=True)), (0,) * len(calls[0])

    return rule


def register(*names: str) -> None:
    """Teach vmap the operators `names` of this library."""
    for name in names:
        op = getattr(torch.ops.selfgen, name).default
        written = [arg.name for arg in op._schema.arguments if arg.alias_info is not None and arg.alias_info.is_write]
        torch.library.register_vmap(f"selfgen::{name}", _rule(op, written))
