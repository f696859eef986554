"""What users hand to the ops, checked and brought to the one form that kernels take.

Values inside a tensor are checked only where that costs no device synchronisation: on CPU tensors, and where nothing
traces or transforms the call (`torch.compile`, `torch.export`, `make_fx`, fake tensors, `torch.func`). A bad value that
passes unseen marks its row as invalid, or is refused by the kernel; it is never an illegal address.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selfgen_kernels.torch_internals import autocast_dtype, has_tangent, is_traced

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def values_visible(*tensors: Tensor) -> bool:
    """Whether Python may look at the values of all `tensors` without a device synchronisation or a graph break."""
    return not is_traced(*tensors) and all(tensor.is_cpu for tensor in tensors)


def check_tensor(
    name: str, tensor: Any, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...], device: torch.device | None
) -> None:
    """Raise unless `tensor` has `shape` (a str stands for any size), one of `dtypes`, and lives on `device`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}; wrap it in torch.tensor(...)")
    if hasattr(tensor, "full_tensor"):  # its name: importing the class costs more than all of this package
        raise TypeError(f"{name} is a DTensor, sharded over ranks; gather it first with {name}.full_tensor()")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} is a tensor of another layout ({kind}), accepted are dense ones; pass .to_dense()")
    if tensor.dtype not in dtypes:
        accepted = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} has dtype {tensor.dtype}, accepted are {accepted}; convert it with .to(dtype)")
    sizes_match = all(isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=False))
    if tensor.dim() != len(shape) or not sizes_match:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}]; reshape or re-select its rows")
    if device is not None and tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device}, the other tensors on {device}; move it with .to({str(device)!r})"
        )


def leading(tensor: Any) -> tuple[str, ...]:
    """Names of all axes of `tensor` but the last, for `check_tensor`, which refuses what is no dense tensor."""
    dense = isinstance(tensor, Tensor) and not tensor.is_nested and tensor.dim() > 0
    return ("N",) * (tensor.dim() - 1) if dense else ("...",)


def check_number(
    name: str, value: Any, accepted: str, is_valid: Callable[[Any], Any], *, whole: bool = False, or_else: str = "None"
) -> None:
    """Raise unless `value` is a number (an int if `whole`) that `is_valid`, which is `accepted` in words."""
    numbers: Any = (int, torch.SymInt) if whole else (int, float, torch.SymInt, torch.SymFloat)
    if isinstance(value, bool) or not isinstance(value, numbers):
        kind = "an int" if whole else "a float"
        raise TypeError(f"{name} must be {kind} or {or_else}, got {type(value).__name__}; pass {accepted}")
    too_large = isinstance(value, int) and not -(2**63) <= value < 2**63
    if too_large or not is_valid(value):
        raise ValueError(f"{name}={value} is not accepted; pass {accepted}{', of 64 bits' if too_large else ''}")


def check_softcap(softcap: Any) -> None:
    """Raise unless `softcap` is None or a cap that is neither 0 nor infinite in fp32, in which it is applied."""
    if softcap is not None:
        accepted = "a float > 0, or None, within 2**-126 <= softcap < 2**127"
        check_number("softcap", softcap, accepted, lambda cap: 2**-126 <= cap < 2**127)


def check_factor(name: str, factor: Any, *, or_else: str) -> None:
    """Raise unless `factor` is a number that fp32, in which it is applied, holds: not as inf, nor as 0 what is not."""
    accepted = "0 or a float with 2**-126 <= abs < 2**127"
    check_number(name, factor, accepted, lambda x: x == 0 or 2**-126 <= abs(x) < 2**127, or_else=or_else)


def autocast(tensor: Any) -> Any:
    """What torch.nn.functional.linear makes of an argument under torch.autocast: fp64 stays, other floats are cast."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    dtype = autocast_dtype(tensor.device.type)
    return tensor if dtype is None else tensor.to(dtype)


def refuse_grad(op: str, *tensors: Tensor | None) -> None:
    """Raise if a derivative is asked of an op that has none."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise RuntimeError(f"{op} has no backward; call it under torch.no_grad(), or detach its tensors")
    if any(x is not None and has_tangent(x) for x in tensors):
        raise RuntimeError(f"{op} has no backward and no forward-mode derivative; detach its tensors")
