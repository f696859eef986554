"""Kernels for the ops, one folder or file per backend. Importing a folder registers with torch what it can run here."""

from importlib.util import find_spec
from typing import NamedTuple

import torch

from selfgen_kernels.backends import cpu, flash_attn, reference, triton
from selfgen_kernels.backends.triton.configuration import target_at
from selfgen_kernels.ops import OPS

__all__ = ["Chosen", "chosen", "cpu", "flash_attn", "reference", "triton"]


class Chosen(NamedTuple):
    """The backend that computes an op, "cpu" (C++), "triton" or "reference" (torch), and why it is that one."""

    backend: str
    why: str


def chosen(op: str, device: torch.device | str) -> Chosen:
    """Which backend computes `op`, a name of `selfgen_kernels.ops.OPS`, for tensors on `device`.

    Raises:
        KeyError: there is no such op.
    """
    device, kernels = torch.device(device), OPS[op].kernels
    if device.type == "cpu":
        if "cpu" not in kernels:
            return Chosen("reference", "it has no C++ kernel")
        if cpu.missing is not None:
            return Chosen("reference", f"of the C++ kernels, {cpu.missing}")
        return Chosen("cpu", f"the C++ kernels are there, at level {cpu.level()}")
    if device.type != "cuda":
        return Chosen("reference", f"there are no kernels for {device.type}")
    if "triton" not in kernels:
        return Chosen("reference", "it has no Triton kernel")
    if find_spec("triton") is None:
        return Chosen("reference", "Triton is not installed")
    index = torch.cuda.current_device() if device.index is None else device.index
    if (target := target_at(index)) is None:
        name = torch.cuda.get_device_properties(index).name
        return Chosen("reference", f"no sizes of the Triton kernels are known to fit {name}")
    return Chosen("triton", f"the sizes for {target} fit this GPU")
