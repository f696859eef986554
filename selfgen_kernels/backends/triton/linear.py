"""`invariant_linear`: one tile for any number of rows, and no split of a sum."""

import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.triton.configuration import Configuration, current_target
from selfgen_kernels.backends.triton.dot import rounded
from selfgen_kernels.backends.triton.products import DTYPES, multiply_tile, tile_constants


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    hidden, hidden_stride, weight, weight_stride, bias, hidden_size, out, rows, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program i writes one tile of `out` [rows, columns]."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    row = (tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # neighbours share weights
    column = (tl.program_id(0) // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    is_row, is_column = row < rows, column < columns
    result = multiply_tile(
        hidden, hidden_stride, weight, weight_stride, bias, hidden_size, 1.0, None, row, is_row, column, is_column,
        BLOCK_K,
    )  # fmt: skip
    place = out + row[:, None] * columns + column[None, :]
    tl.store(place, rounded(result, out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def tile_of(target: str, dtype: str, aligned: bool) -> tuple[dict, dict]:
    """Tile and launch options: those of few rows, whatever there are. `aligned` is a matter of the weight alone."""
    return tile_constants(target, dtype, 1, aligned)


def invariant_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N, M] of `hidden` [N, D] and `weight` [M, D]."""
    out = hidden.new_empty((len(hidden), len(weight)))
    if out.numel() == 0:
        return out
    hidden = hidden.contiguous()  # so that no stride of a batch has a say
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    aligned = all(size % 16 == 0 for size in (hidden.shape[1], weight.stride(0)))
    constants, options = tile_of(current_target(), DTYPES[hidden.dtype], aligned)
    tiles = triton.cdiv(len(hidden), constants["BLOCK_M"]) * triton.cdiv(len(weight), constants["BLOCK_N"])
    linear_kernel[(tiles,)](
        hidden, hidden.shape[1], weight, weight.stride(0), None if bias is None else bias.contiguous(),
        hidden.shape[1], out, len(hidden), len(weight), **constants, **options,
    )  # fmt: skip
    return out


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`."""
    ships = []
    for dtype in DTYPES.values():
        types = {
            "hidden": f"*{dtype}", "hidden_stride": "i64", "weight": f"*{dtype}", "weight_stride": "i64",
            "hidden_size": "i32", "out": f"*{dtype}", "rows": "i32", "columns": "i32",
        }  # fmt: skip
        for label, aligned in (("", True), (", odd sizes", False)):
            divisible = ("hidden_stride", "weight_stride", "hidden_size", "columns") if aligned else ()
            constants, options = tile_of(target, dtype, aligned)
            for extra, present, absent in (("", {}, {"bias": None}), (", bias", {"bias": f"*{dtype}"}, {})):
                ships.append(
                    Configuration(
                        f"linear[{dtype}{label}{extra}]", linear_kernel, types | present, absent | constants, options,
                        divisible, streams=aligned, tensor_cores=dtype != "fp32",
                    )
                )  # fmt: skip
    return ships
