"""Root mean square norm, in the forms that models have it in."""

from typing import Literal

import torch
from torch import Tensor

from selfgen_kernels.ops.arguments import check_number, check_tensor, leading, refuse_grad
from selfgen_kernels.ops.registration import define

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_WIDTH = 2**14
FORMS = {"llama": (False, True), "olmo2": (False, False), "gemma": (True, False)}
"""By name, whether the factor is 1 + weight, and whether rows are rounded to their dtype before they meet it."""


def normed_dtype(x: Tensor, weight: Tensor, round_first: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if round_first else x.dtype


@define("rms_norm", "(Tensor x, Tensor weight, float eps, bool plus_one, bool round_first) -> Tensor")
def _(x, weight, eps, plus_one, round_first):
    return x.new_empty(x.shape, dtype=normed_dtype(x, weight, round_first))


@define(
    "add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, float eps, bool plus_one, bool round_first) -> (Tensor, Tensor)",
)
def _(x, residual, weight, eps, plus_one, round_first):
    total = x.new_empty(x.shape, dtype=torch.result_type(x, residual))
    return total, total.new_empty(x.shape, dtype=normed_dtype(total, weight, round_first))


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, form: Literal["llama", "olmo2", "gemma"] = "llama") -> Tensor:
    """Root mean square norm of each row (Zhang and Sennrich, arXiv 1910.07467). For inference only.

    The result is a function of the row, the weight and eps alone, bit for bit: it depends on no other row, and every
    backend gives the same. Squares are summed as integers, so there is no order that could matter
    (`backends/reference/norm.py`). It is what the modules of transformers compute, but for the order
    of their sum, and with 1 / sqrt in place of rsqrt.

    Args:
        x: fp32, bf16 or fp16 [..., D], any strides, 1 <= D <= 16384; computed in fp32.
        weight: fp32, bf16 or fp16 [D].
        eps: 2^-64 <= eps < 2^64, added to the mean of the squares.
        form: "llama" rounds rows to their dtype, then multiplies them by the weight; "olmo2" multiplies in fp32 and
            rounds then; "gemma" is "olmo2" with 1 + weight.

    Returns:
        [..., D], contiguous, in the dtype of `x`; in form "llama" in that of `x * weight`.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a value, shape or device outside of the above.
        RuntimeError: a tensor that requires grad while gradients are recorded, or has a tangent; the op has no
            derivative.

    Example:
        >>> import torch
        >>> from selfgen_kernels import rms_norm
        >>> rms_norm(torch.tensor([[3.0, 4.0], [-30.0, 40.0]]), torch.full((2,), 5.0), 1e-6)
        tensor([[ 4.2426,  5.6569],
                [-4.2426,  5.6569]])
    """
    _check_rows(x, weight, eps, form)
    refuse_grad("rms_norm", x, weight)
    return torch.ops.selfgen.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, *FORMS[form]).view(x.shape)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, form: Literal["llama", "olmo2", "gemma"] = "llama"
) -> tuple[Tensor, Tensor]:
    """x + residual, and `rms_norm` of each row of it (Zhang and Sennrich, arXiv 1910.07467). For inference only.

    Bit for bit what the sum of torch and `rms_norm` give one after the other: the sum is rounded to its dtype, and the
    norm is that of what was rounded.

    Args:
        x: fp32, bf16 or fp16 [..., D], any strides, 1 <= D <= 16384.
        residual: fp32, bf16 or fp16, any strides, same shape.
        weight, eps, form: as in `rms_norm`.

    Returns:
        x + residual, and the rows of it normed: [..., D] each, contiguous, in the dtype of `x + residual`; in form
        "llama" what is normed is in that of `(x + residual) * weight`.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a value, shape or device outside of the above.
        RuntimeError: a tensor that requires grad while gradients are recorded, or has a tangent; the op has no
            derivative.

    Example:
        >>> import torch
        >>> from selfgen_kernels import add_rms_norm
        >>> add_rms_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]), torch.full((2,), 5.0), 1e-6)
        (tensor([[3., 4.]]), tensor([[4.2426, 5.6569]]))
    """
    _check_rows(x, weight, eps, form)
    check_tensor("residual", residual, tuple(x.shape), DTYPES, x.device)
    refuse_grad("add_rms_norm", x, residual, weight)
    rows = (one.reshape(-1, x.shape[-1]) for one in (x, residual))
    total, normed = torch.ops.selfgen.add_rms_norm(*rows, weight, eps, *FORMS[form])
    return total.view(x.shape), normed.view(x.shape)


def _check_rows(x: Tensor, weight: Tensor, eps: float, form: str) -> None:
    check_tensor("x", x, (*leading(x), "D"), DTYPES, None)
    width = x.shape[-1]
    if not 1 <= width <= MOST_WIDTH:
        raise ValueError(f"x has shape {list(x.shape)}, rows of {width} numbers; pass rows of 1 to {MOST_WIDTH}")
    check_tensor("weight", weight, (width,), DTYPES, x.device)
    check_number("eps", eps, "2**-64 <= eps < 2**64", lambda x: 2**-64 <= x < 2**64, or_else="an int")
    if not isinstance(form, str) or form not in FORMS:
        accepted = ", ".join(f'"{name}"' for name in FORMS)
        raise ValueError(f"form={form!r} is not accepted; pass one of {accepted}")
