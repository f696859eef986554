"""`act_mul` in one launch, a block of a row per program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.reference import activation as reference
from selfgen_kernels.backends.triton.configuration import Configuration
from selfgen_kernels.backends.triton.dot import rounded
from selfgen_kernels.backends.triton.elementary import OPTIONS, exp

GELU_CUBE, GELU_SCALE = tl.constexpr(reference.GELU_CUBE), tl.constexpr(reference.GELU_SCALE)
BLOCK = 2048  # numbers of a program


@triton.jit
def act_mul_kernel(gate, gate_stride, up, up_stride, out, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, block) writes out[row, block * BLOCK :][:BLOCK]; out is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < width
    given = tl.load(gate + row * gate_stride + column, mask=exists, other=0.0)
    factor = tl.load(up + row * up_stride + column, mask=exists, other=0.0).to(tl.float32)
    x = given.to(tl.float32)
    y = (x * x * x * GELU_CUBE + x) * GELU_SCALE if GELU else x
    small = tl.where(tl.abs(y) > 87, 0.0, exp(-tl.abs(y)))  # `exp` goes no lower
    activated = tl.math.div_rn(x * tl.where(y < 0, small, 1.0), small + 1.0)
    activated = rounded(activated, given.dtype).to(tl.float32)
    tl.store(out + row * width + column, rounded(activated * factor, given.dtype), mask=exists)


def act_mul(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """[N, D] of gate and up [N, D]."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    rows, width = gate.shape
    grid = rows, triton.cdiv(width, BLOCK)
    act_mul_kernel[grid](gate, gate.stride(0), up, up.stride(0), out, width, GELU=gelu, BLOCK=BLOCK, **OPTIONS)
    return out


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`."""
    strides = {"gate_stride": "i64", "up_stride": "i64", "width": "i32"}
    return [
        Configuration(
            f"act_mul[{name}, {dtype}]",
            act_mul_kernel,
            strides | dict.fromkeys(("gate", "up", "out"), f"*{dtype}"),
            {"GELU": name == "gelu_tanh", "BLOCK": BLOCK},
            OPTIONS,
            tuple(strides),
            streams=True,
        )
        for name in ("silu", "gelu_tanh")
        for dtype in ("fp32", "bf16", "fp16")
    ]
