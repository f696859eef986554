"""Triton kernels, for CUDA and ROCm (torch calls both devices "cuda").

Nothing here imports triton before the first call with a GPU tensor, so a machine without it only lacks these kernels.
On a GPU that no choice of `configuration` is known to fit, the torch reference computes, which is said once.
Under `TRITON_INTERPRET=1`, set before triton is imported, the functions of these modules run on CPU tensors.
"""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

from selfgen_kernels.backends import reference
from selfgen_kernels.backends.triton.configuration import CDNA, target_at
from selfgen_kernels.ops import OPS
from selfgen_kernels.ops.registration import qualified


@cache
def _backend_at(index: int) -> str:
    """The name of the package whose kernels run on torch.device("cuda", index)."""
    if target_at(index) is not None:
        return __name__
    name = torch.cuda.get_device_properties(index).name
    warnings.warn(
        f"selfgen's Triton kernels are not known to fit {name}, so that its torch reference computes, which is slower; "
        f"they run on NVIDIA's GPUs of compute capability 8.0 and higher, and on {', '.join(CDNA)}",
        stacklevel=3,
    )
    return reference.__name__


def _register(op: str, module: str, overloads: tuple[str, ...]) -> None:
    def kernel(*args):
        device = next(arg for arg in args if isinstance(arg, torch.Tensor)).device
        with torch.cuda.device(device):  # Triton launches on the current device
            return getattr(import_module(f"{_backend_at(device.index)}.{module}"), op)(*args)

    for overload in overloads:
        torch.library.impl(f"selfgen::{qualified(op, overload)}", "CUDA", kernel)


if find_spec("triton") is not None:
    for _name, _op in OPS.items():
        if "triton" in _op.kernels:
            _register(_name, _op.module, _op.overloads)
