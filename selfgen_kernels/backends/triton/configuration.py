"""What a kernel needs besides its code to be compiled: the choices that ship, one `Configuration` for each.

Every module of this folder lists its own in `configurations(target)`. The launchers take their tile sizes and warps
from the same tables, so what `tools/aot.py` shows and the tests check is what runs.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

SHARED_MEMORY = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10,
    "sm_120": 99 << 10, "gfx942": 64 << 10,
}  # fmt: skip
"""Bytes that a block may have (CUDA Programming Guide, 5.1 "Compute Capabilities"; LLVM's AMDGPUBaseInfo.cpp)."""
TARGETS = tuple(SHARED_MEMORY)
"""A100, A10 and RTX 30, L4 and RTX 40, H100, B200, RTX 50, MI300: the GPUs that kernels are compiled for in tests."""
LEAST = "sm_86"  # for what is no kin of a target: no GPU since the A100 has less shared memory
CDNA = "gfx90a", "gfx942", "gfx950"  # wavefronts of 64 lanes, matrix cores and at least the LDS of gfx942


@dataclass(frozen=True)
class Configuration:
    """One kernel with its compile-time choices, as `triton.compile` takes them."""

    name: str
    kernel: Any
    types: dict[str, str]  # of the run-time arguments, such as "*bf16" or "i64"
    constants: dict[str, Any]  # of the constexpr arguments
    options: dict[str, Any]  # num_warps, num_stages, maxnreg, enable_fp_fusion
    aligned: tuple[str, ...] = ()  # integer arguments divisible by 16, as all pointers are
    streams: bool = False  # reads its data 128 bits at a time: `narrow_streams` in tools/aot.py is the rule
    tensor_cores: bool = False  # multiplies matrices


def target_of(device: Any) -> str | None:
    """The one of `TARGETS` whose choices fit a device, given as torch.cuda.get_device_properties gives it.

    Its own, or the newest before it of its generation that asks for no more shared memory than it has, or `LEAST`. None
    if nothing is known to fit: then the torch reference computes. Those are NVIDIA GPUs before the A100 and AMD's that
    are not in `CDNA` (waves of RDNA have 32 lanes).
    """
    if torch.version.hip:
        return "gfx942" if device.gcnArchName.split(":")[0] in CDNA else None
    capability = 10 * device.major + device.minor
    room = device.shared_memory_per_multiprocessor - 1024  # which the system has of each block
    older = [target for target in TARGETS if target.startswith("sm_") and int(target[3:]) <= capability]
    fitting = [target for target in older if SHARED_MEMORY[target] <= room]
    kin = [target for target in fitting if int(target[3:]) // 10 == device.major]
    return kin[-1] if kin else LEAST if LEAST in fitting else None


@cache
def target_at(index: int) -> str | None:
    """`target_of` the device torch.device("cuda", index)."""
    return target_of(torch.cuda.get_device_properties(index))


def current_target() -> str:
    """`target_of` the current device, which has one; without a GPU (the interpreter) that of an A100."""
    target = target_at(torch.cuda.current_device()) if torch.cuda.is_initialized() else TARGETS[0]
    assert target is not None  # the reference computes on such a device
    return target
