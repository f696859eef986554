"""The gate of an MLP, specified: exp is written out (`elementary`), and division is that of IEEE 754.

silu(x) = x sigmoid(x); gelu by tanh, x (1 + tanh(u)) / 2 = x sigmoid(2 u), without the cancellation of 1 + tanh(u).
"""

import torch
from torch import Tensor

from selfgen_kernels.backends.reference.elementary import exp_
from selfgen_kernels.ops.activation import DTYPES
from selfgen_kernels.ops.arguments import check_tensor

GELU_CUBE, GELU_SCALE = 0.044715, 1.5957691216057308  # 2 u = 2 sqrt(2 / pi) (x + 0.044715 x^3)


def act_mul(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """[N, D]: activation(gate), rounded to the dtype, times up."""
    check_tensor("gate", gate, ("N", "D"), DTYPES, None)  # as a CPU has no other kernel
    check_tensor("up", up, tuple(gate.shape), (gate.dtype,), gate.device)
    x = gate.float()
    y = (x * x * x * GELU_CUBE + x) * GELU_SCALE if gelu else x
    small = exp_(-y.abs()).masked_fill_(y.abs() > 87, 0)  # `exp_` goes no lower
    activated = x * torch.where(y < 0, small, 1.0) / (small + 1)  # x sigmoid(y)
    return (activated.to(gate.dtype).float() * up.float()).to(gate.dtype).contiguous()
