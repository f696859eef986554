"""Torch reference: the specification of every op, and the kernel of devices that have no other."""

from importlib import import_module

import torch

from selfgen_kernels.ops import OPS

for _name, _op in OPS.items():
    _kernel = getattr(import_module(f"{__name__}.{_op.module}"), _name)
    torch.library.impl(f"selfgen::{_name}", "CompositeExplicitAutograd", _kernel)
