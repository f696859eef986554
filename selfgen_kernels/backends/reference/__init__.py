"""Torch reference: the specification of every op, and the kernel of devices that have no other."""

from importlib import import_module

import torch

from selfgen_kernels.ops import OPS, SEED_TENSOR
from selfgen_kernels.ops.registration import qualified


def _register_with_seed_in_memory(op: str) -> None:
    """A look at the seed, and then the operator with a number: of a device whose kernels can't read it themselves."""
    by_number = getattr(torch.ops.selfgen, op).default
    place = [argument.name for argument in by_number._schema.arguments].index("seed")

    def kernel(*args):
        return by_number(*args[:place], int(args[place]), *args[place + 1 :])

    torch.library.impl(f"selfgen::{qualified(op, SEED_TENSOR)}", "CompositeExplicitAutograd", kernel)


for _name, _op in OPS.items():
    _kernel = getattr(import_module(f"{__name__}.{_op.module}"), _name)
    torch.library.impl(f"selfgen::{_name}", "CompositeExplicitAutograd", _kernel)
    if SEED_TENSOR in _op.overloads and _op.kernels:
        _register_with_seed_in_memory(_name)
    elif SEED_TENSOR in _op.overloads:
        torch.library.impl(f"selfgen::{qualified(_name, SEED_TENSOR)}", "CompositeExplicitAutograd", _kernel)
