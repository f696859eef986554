"""`rms_norm` and `add_rms_norm` in one launch each: a program holds whole rows in registers, so they are read once.

Maxima and sums are of integers (`reference/norm.py`): tiles and warps may change, the results do not.
"""

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.triton.configuration import Configuration
from selfgen_kernels.backends.triton.dot import rounded
from selfgen_kernels.backends.triton.elementary import UNIT, weights
from selfgen_kernels.ops.norm import normed_dtype

TILE = 1024  # numbers of a program, unless one row has more


def norm_tile(width: int) -> tuple[dict[str, int], dict[str, object]]:
    """(ROWS and BLOCK, options) for rows of `width` numbers: 16 numbers a thread, more from 8192 on."""
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    return {"ROWS": rows, "BLOCK": block}, {"num_warps": min(16, rows * block // 512), "enable_fp_fusion": False}


@triton.jit
def norm_rows(wide, factor, width, eps, NUMBER: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """fp32 [ROWS, BLOCK] of rows `wide`, that hold numbers of the dtype NUMBER, and of `factor` [1, BLOCK]."""
    peak = tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1, keep_dims=True)  # [ROWS, 1]
    exponent = tl.minimum(tl.maximum(peak >> 23, 65), 190)
    scaled = wide * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    back = (exponent << 23).to(tl.float32, bitcast=True)
    total = tl.sum(weights(scaled * scaled), 1, keep_dims=True).to(tl.float32) * UNIT
    largest = peak.to(tl.float32, bitcast=True)
    square_sum = tl.where(peak < (191 << 23), total * back * back, largest * largest)
    mean = tl.math.div_rn(square_sum, tl.zeros_like(square_sum) + width)
    inverse = tl.math.div_rn(tl.zeros_like(mean) + 1.0, tl.sqrt_rn(mean + eps))
    normed = wide * inverse
    if ROUND_FIRST:
        normed = rounded(normed, NUMBER).to(tl.float32)
    return normed * factor


@triton.jit
def factor_of(weight, column, width, PLUS_ONE: tl.constexpr):
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    if PLUS_ONE:
        factor += 1.0
    return factor


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x, x_stride, weight, out, rows, width, eps,
    PLUS_ONE: tl.constexpr, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i writes the rows i * ROWS .. of `out`, contiguous [rows, width]."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    exists = (row < rows) & (column < width)
    wide = tl.load(x + row * x_stride + column, mask=exists, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    factor = factor_of(weight, column, width, PLUS_ONE)
    normed = norm_rows(wide, factor, width, eps, x.dtype.element_ty, ROUND_FIRST)
    tl.store(out + row * width + column, rounded(normed, out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["rows"])
def add_rms_norm_kernel(
    x, x_stride, residual, residual_stride, weight, total, out, rows, width, eps,
    PLUS_ONE: tl.constexpr, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i writes the rows i * ROWS .. of `total` and of `out`, contiguous [rows, width]."""
    NUMBER: tl.constexpr = total.dtype.element_ty
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    exists = (row < rows) & (column < width)
    wide = tl.load(x + row * x_stride + column, mask=exists, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    wide += tl.load(residual + row * residual_stride + column, mask=exists, other=0.0).to(tl.float32)
    summed = rounded(wide, NUMBER)
    tl.store(total + row * width + column, summed, mask=exists)
    factor = factor_of(weight, column, width, PLUS_ONE)
    normed = norm_rows(summed.to(tl.float32), factor, width, eps, NUMBER, ROUND_FIRST)
    tl.store(out + row * width + column, rounded(normed, out.dtype.element_ty), mask=exists)


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool, round_first: bool) -> Tensor:
    """[N, D]: each row of x [N, D] normed, times the weight or 1 + weight."""
    out = torch.empty(x.shape, dtype=normed_dtype(x, weight, round_first), device=x.device)
    _launch(rms_norm_kernel, [x], weight, eps, [out], plus_one, round_first)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool, round_first: bool
) -> tuple[Tensor, Tensor]:
    """[N, D] each: the sum of x and residual [N, D], and its rows normed, times the weight or 1 + weight."""
    total = torch.empty(x.shape, dtype=torch.result_type(x, residual), device=x.device)
    out = torch.empty(x.shape, dtype=normed_dtype(total, weight, round_first), device=x.device)
    _launch(add_rms_norm_kernel, [x, residual], weight, eps, [total, out], plus_one, round_first)
    return total, out


def _launch(
    kernel: Any, inputs: list[Tensor], weight: Tensor, eps: float, results: list[Tensor], plus_one: bool,
    round_first: bool,
) -> None:  # fmt: skip
    rows, width = inputs[0].shape
    if rows == 0:
        return
    dense = [x if x.stride(1) == 1 else x.contiguous() for x in inputs]
    constants, options = norm_tile(width)
    kernel[(triton.cdiv(rows, constants["ROWS"]),)](
        *(one for x in dense for one in (x, x.stride(0))), weight.contiguous(), *results, rows, width, eps,
        PLUS_ONE=plus_one, ROUND_FIRST=round_first, **constants, **options,
    )  # fmt: skip


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`; sums are also of what autocast rounds and what it does not."""
    aligned = "x_stride", "width"
    forms = ("llama", False, True), ("gemma", True, False)
    sizes = {"rows": "i32", "width": "i32", "eps": "fp32"}
    ships = []
    for width in (128, 4096, 16_384):
        constants, options = norm_tile(width)
        for dtype, (name, plus_one, round_first) in product(("fp32", "bf16", "fp16"), forms):
            how = {"PLUS_ONE": plus_one, "ROUND_FIRST": round_first, **constants}
            pointers = dict.fromkeys(("x", "weight", "out"), f"*{dtype}")
            types = {"x_stride": "i64"} | sizes | pointers
            name = f"[{name}, {dtype}, {width}]"
            ships.append(Configuration(f"rms_norm{name}", rms_norm_kernel, types, how, options, aligned, streams=True))
            types = types | {"residual": f"*{dtype}", "total": f"*{dtype}", "residual_stride": "i64"}
            of_sum = *aligned, "residual_stride"
            ships.append(
                Configuration(f"add_rms_norm{name}", add_rms_norm_kernel, types, how, options, of_sum, streams=True)
            )
            if dtype == "fp32":
                types = types | {"residual": "*bf16"}
                name = name.replace("fp32", "fp32 and bf16")
                ships.append(
                    Configuration(f"add_rms_norm{name}", add_rms_norm_kernel, types, how, options, of_sum, streams=True)
                )
    return ships
