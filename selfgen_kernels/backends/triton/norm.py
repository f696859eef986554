"""`rms_norm` in one launch: a program holds whole rows in registers, so they are read once.

Maxima and sums are of integers (`reference/norm.py`): tiles and warps may change, the results do not.
"""

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


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x, x_stride, weight, out, rows, width, eps,
    PLUS_ONE: tl.constexpr, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i writes the rows i * ROWS .. of `out`, contiguous [rows, width]."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    exists = (row < rows) & (column < width)
    given = tl.load(x + row * x_stride + column, mask=exists, other=0.0)
    wide = given.to(tl.float32)  # [ROWS, BLOCK]
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    if PLUS_ONE:
        factor += 1.0

    peak = tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1, keep_dims=True)  # [ROWS, 1]
    exponent = tl.minimum(tl.maximum(peak >> 23, 65), 190)
    scaled = wide * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    back = (exponent << 23).to(tl.float32, bitcast=True)
    total = tl.sum(weights(scaled * scaled), 1, keep_dims=True).to(tl.float32) * UNIT
    largest = peak.to(tl.float32, bitcast=True)
    square_sum = tl.where(peak < (191 << 23), total * back * back, largest * largest)
    mean = tl.math.div_rn(square_sum, tl.zeros_like(square_sum) + width)
    inverse = tl.math.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), tl.sqrt_rn(mean + eps))

    normed = wide * inverse
    if ROUND_FIRST:
        normed = rounded(normed, x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, rounded(normed * factor, out.dtype.element_ty), mask=exists)


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool, round_first: bool) -> Tensor:
    """[N, D]: each row of x [N, D] normed, times the weight or 1 + weight."""
    rows, width = x.shape
    out = torch.empty(x.shape, dtype=normed_dtype(x, weight, round_first), device=x.device)
    if rows == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    constants, options = norm_tile(width)
    grid = (triton.cdiv(rows, constants["ROWS"]),)
    rms_norm_kernel[grid](
        x, x.stride(0), weight.contiguous(), out, rows, width, eps,
        PLUS_ONE=plus_one, ROUND_FIRST=round_first, **constants, **options,
    )  # fmt: skip
    return out


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`."""
    types = {"x_stride": "i64", "rows": "i32", "width": "i32", "eps": "fp32"}
    aligned = "x_stride", "width"
    ships = []
    for width in (128, 4096, 16_384):
        for dtype in ("fp32", "bf16", "fp16"):
            for name, plus_one, round_first in (("llama", False, True), ("gemma", True, False)):
                constants, options = norm_tile(width)
                ships.append(
                    Configuration(
                        f"rms_norm[{name}, {dtype}, {width}]",
                        rms_norm_kernel,
                        types | {"x": f"*{dtype}", "weight": f"*{dtype}", "out": f"*{dtype}"},
                        {"PLUS_ONE": plus_one, "ROUND_FIRST": round_first, **constants},
                        options,
                        aligned,
                        streams=True,
                    )
                )
    return ships
