"""What all matrix products of this folder need, and the rounding of their results."""

import triton
import triton.language as tl


@triton.jit
def factor_of_dot(x):
    """`x` as `tl.dot` takes it: the interpreter would multiply the bits of bf16."""
    if INTERPRETED and x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


INTERPRETED = tl.constexpr(not isinstance(factor_of_dot, triton.JITFunction))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 `x` as `dtype`, to the nearest, ties to even: the interpreter would cut off what bf16 has no bits for."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        x = (bits >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return x.to(dtype)
