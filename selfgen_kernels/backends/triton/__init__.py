"""Triton kernels, for CUDA and ROCm (torch calls both devices "cuda").

Nothing here imports triton before the first call with a GPU tensor, so a machine without it only lacks these kernels.
Under `TRITON_INTERPRET=1`, set before triton is imported, the functions of these modules run on CPU tensors.
"""

from importlib import import_module
from importlib.util import find_spec

import torch

from selfgen_kernels.ops import OPS
from selfgen_kernels.ops.registration import qualified


def _register(op: str, module: str, overloads: tuple[str, ...]) -> None:
    def kernel(*args):
        some_tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
        with torch.cuda.device_of(some_tensor):  # Triton launches on the current device
            return getattr(import_module(f"{__name__}.{module}"), op)(*args)

    for overload in overloads:
        torch.library.impl(f"selfgen::{qualified(op, overload)}", "CUDA", kernel)


if find_spec("triton") is not None:
    for _name, _op in OPS.items():
        if "triton" in _op.kernels:
            _register(_name, _op.module, _op.overloads)
