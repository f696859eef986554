"""C++ kernels for CPU, built by setup.py. Where they were not built, the reference runs and a warning says so once.

On x86 they are compiled for several instruction sets, of which the best one of the machine is used. The environment
variable SELFGEN_CPU_LEVEL, read when this package is imported, asks for a lesser one: avx512_bf16, avx512, avx2 or
default; the first is avx512 but for the products of bf16 heads. Tokens do not depend on it but at near ties of a head's
products: most often between avx512_bf16 and the others, as only there pairs of products are added and subnormal numbers
of bf16 heads count as 0. A level that the machine does not have is never used.
"""

import os
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from selfgen_kernels.backends import reference
from selfgen_kernels.ops import OPS

NOT_BUILT = "they were not built"
LEVELS = ("avx512_bf16", "avx512", "avx2", "default")


def _load() -> str | None:
    """Load the kernels, which register themselves; None, or why that was not possible."""
    level = os.environ.get("SELFGEN_CPU_LEVEL", "")
    if level and level not in LEVELS:
        raise ValueError(f"SELFGEN_CPU_LEVEL={level} is not accepted; set one of {', '.join(LEVELS)}, or leave it out")
    library = find_spec(f"{__name__}._C")
    if library is None or library.origin is None:
        return NOT_BUILT
    record = Path(library.origin).with_name("_C.torch")
    built_with = record.read_text().strip() if record.is_file() else torch.__version__
    if _release(built_with) != _release(torch.__version__):  # whose C++ interface may be another one
        return f"they were built with torch {built_with}, and this is torch {torch.__version__}"
    try:
        torch.ops.load_library(library.origin)
    except OSError as error:  # a library is missing, or this torch lacks what it calls
        return str(error)
    return None


def _release(version: str) -> list[str]:
    """Major and minor version: patches, and builds for other devices, have the same interface."""
    return version.split(".")[:2]


def level() -> str | None:
    """The one of `LEVELS` that the kernels of this process use; None without them."""
    return None if missing is not None else torch.ops.selfgen._cpu_level()


@cache
def _warn_once() -> None:
    warnings.warn(
        f"selfgen_kernels runs its torch reference on CPU, several times slower than its C++ kernels: {missing}. "
        "With torch and a C++ compiler there, install again from the source: pip install --force-reinstall --no-deps .",
        stacklevel=5,
    )


def _stand_in(op: str, module: str) -> None:
    """Register the reference's kernel of `op`, with the warning."""

    def kernel(*args):
        _warn_once()
        return getattr(import_module(f"{reference.__name__}.{module}"), op)(*args)

    torch.library.impl(f"selfgen::{op}", "CPU", kernel)


missing = _load()
"""Why the C++ kernels are not in use, or None if they are."""

if missing is not None:
    for _name, _op in OPS.items():
        if "cpu" in _op.kernels:
            _stand_in(_name, _op.module)
