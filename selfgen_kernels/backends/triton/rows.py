"""Arguments that are per row: tensors [N], or numbers for all rows, which nothing is launched for.

A number comes as an integer of its bits, shifted so that Triton, which types an integer by its value, always takes 64
bits: else p = 0.6 would compile kernels anew after p = 0.4. Floats it would round to fp32. Kernels must not be
specialized on such arguments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SHIFT = tl.constexpr(2**62)


@triton.jit
def int64_of_row(values, row):
    """Of a tensor int64 [N], or a number."""
    return tl.load(values + row) if values.dtype.is_ptr() else values.to(tl.int64) - SHIFT


@triton.jit
def fp32_of_row(values, row):
    """Of a tensor fp32 [N], or a number."""
    if values.dtype.is_ptr():
        return tl.load(values + row)
    else:
        return (values.to(tl.int64) - SHIFT).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def fp64_of_row(values, row):
    """Of a tensor fp64 [N], or a number."""
    return (
        tl.load(values + row) if values.dtype.is_ptr() else (values.to(tl.int64) - SHIFT).to(tl.float64, bitcast=True)
    )


def for_rows(value: Tensor | None) -> Tensor | int | None:
    """What a record of `call.py` has for the rows, as kernels take it; numbers are >= 0."""
    if value is None:
        return None
    if value.dim():
        return value.contiguous()
    if value.is_floating_point():
        bits = value.view(torch.int32 if value.dtype == torch.float32 else torch.int64)
    else:
        bits = value.clamp(max=2**40)
    return int(bits) + SHIFT.value
