"""What torch is told of each operator when its contract is imported: schema, fake kernel, and what vmap makes of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selfgen_kernels.ops import OPS, SEED_TENSOR


def define(name: str, schema: str) -> Callable[[Callable[..., Any]], None]:
    """Define the operator `name`, one of `OPS`; decorates its fake kernel, which tells shapes and dtypes of results."""
    if name not in OPS:
        raise KeyError(f"{name} is not in selfgen_kernels.ops.OPS, the table of operators; give it a line there")
    schemas = dict.fromkeys(OPS[name].overloads, schema)
    if SEED_TENSOR in schemas:
        schemas[SEED_TENSOR] = schema.replace("SymInt seed", "Tensor seed")
    for overload, its_schema in schemas.items():
        torch.library.define(f"selfgen::{qualified(name, overload)}", its_schema)

    def register(fake: Callable[..., Any]) -> None:
        for overload, its_schema in schemas.items():
            parameters, _, _ = its_schema.rpartition(" -> ")
            operator = f"selfgen::{qualified(name, overload)}"
            torch.library.register_fake(operator)(fake)
            torch.library.register_vmap(operator, _call_after_call(name, overload, parameters[1:-1].split(", ")))

    return register


def qualified(name: str, overload: str) -> str:
    """As torch.library names an overload of an operator."""
    return name if overload == "default" else f"{name}.{overload}"


def _call_after_call(name: str, overload: str, parameters: list[str]) -> Callable[..., Any]:
    """The batching rule of torch.func.vmap: call after call, each as it would be alone."""
    op = getattr(getattr(torch.ops.selfgen, name), overload)
    names = [parameter.split()[1].partition("=")[0] for parameter in parameters]
    written = [name for name, parameter in zip(names, parameters, strict=True) if "!" in parameter.split()[0]]

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
