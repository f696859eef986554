"""What a kernel needs besides its code to be compiled: the choices that ship, one `Configuration` for each.

Every module of this folder lists its own in `configurations(target)`. The launchers take their tile sizes and warps
from the same tables, so what `tools/aot.py` shows and the tests check is what runs.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""A100, H100, B200, MI300: the GPUs that kernels are compiled for in tests."""


@dataclass(frozen=True)
class Configuration:
    """One kernel with its compile-time choices, as `triton.compile` takes them."""

    name: str
    kernel: Any
    types: dict[str, str]  # of the run-time arguments, such as "*bf16" or "i64"
    constants: dict[str, Any]  # of the constexpr arguments
    options: dict[str, Any]  # num_warps, num_stages, enable_fp_fusion
    aligned: tuple[str, ...] = ()  # integer arguments divisible by 16, as all pointers are
    streams: bool = False  # reads its data 128 bits at a time: `narrow_streams` in tools/aot.py is the rule
    tensor_cores: bool = False  # multiplies matrices


def current_target() -> str:
    """The one of `TARGETS` whose choices the current device takes: its own, or the nearest older one's."""
    return _target_of(torch.cuda.current_device()) if torch.cuda.is_initialized() else "sm_80"  # the interpreter


@cache
def _target_of(device: int) -> str:
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")
