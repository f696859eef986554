"""What all matrix products of this folder need."""

import triton
import triton.language as tl


@triton.jit
def factor_of_dot(x):
    """`x` as `tl.dot` takes it: the interpreter would multiply the bits of bf16."""
    if INTERPRETED and x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


INTERPRETED = tl.constexpr(not isinstance(factor_of_dot, triton.JITFunction))
