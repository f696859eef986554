"""The gate of a decoder's MLP."""

from typing import Literal

import torch
from torch import Tensor

from selfgen_kernels.ops.arguments import check_tensor, leading, refuse_grad
from selfgen_kernels.ops.registration import define

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu_tanh")


@define("act_mul", "(Tensor gate, Tensor up, bool gelu) -> Tensor")
def _(gate, up, gelu):
    return gate.new_empty(gate.shape)


def act_mul(gate: Tensor, up: Tensor, *, activation: Literal["silu", "gelu_tanh"] = "silu") -> Tensor:
    """activation(gate) * up, as in the MLPs of decoders (Shazeer, arXiv 2002.05202). For inference only.

    The activation is computed in fp32 and rounded to the dtype, then the product is, as by two ops of torch. Its exp is
    written out (`backends/reference/elementary.py`), so every backend gives the same bits.

    Args:
        gate: fp32, bf16 or fp16 [..., D], any strides.
        up: same dtype and shape.
        activation: "silu", x / (1 + exp(-x)); or "gelu_tanh", GELU by tanh, as in Gemma.

    Returns:
        [..., D], contiguous, in the same dtype.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a value, shape or device outside of the above.
        RuntimeError: a tensor that requires grad while gradients are recorded, or has a tangent; the op has no
            derivative.

    Example:
        >>> import torch
        >>> from selfgen_kernels import act_mul
        >>> act_mul(torch.tensor([0.0, 1.0, -1.0]), torch.tensor([5.0, 5.0, 5.0]))
        tensor([ 0.0000,  3.6553, -1.3447])
    """
    check_tensor("gate", gate, (*leading(gate), "D"), DTYPES, None)
    check_tensor("up", up, tuple(gate.shape), (gate.dtype,), gate.device)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f'activation={activation!r} is not accepted; pass "silu" or "gelu_tanh"')
    refuse_grad("act_mul", gate, up)
    rows = (torch.atleast_2d(x).flatten(0, -2) for x in (gate, up))  # views where that is possible
    return torch.ops.selfgen.act_mul(*rows, activation == "gelu_tanh").view(gate.shape)
