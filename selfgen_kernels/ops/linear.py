"""A linear layer whose result for a row depends on that row alone."""

import torch
from torch import Tensor

from selfgen_kernels.ops.arguments import autocast, check_tensor, refuse_grad
from selfgen_kernels.ops.registration import define

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@define("invariant_linear", "(Tensor hidden, Tensor weight, Tensor? bias) -> Tensor")
def _(hidden, weight, bias):
    return hidden.new_empty((hidden.shape[0], weight.shape[0]))


def invariant_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`hidden @ weight.T + bias`, where a row has the same bits in any batch. For inference only.

    A library's product chooses tiles, or splits its sums, by the number of rows, so a row rounds differently in another
    batch. Here a sum runs over D in an order that only `weight` decides, in fp32, and rounds once to the dtype. Which
    order that is differs between backends, levels of x86 and GPUs, so bits are equal on one machine with one backend.
    The idea is that of batch-invariant kernels (Thinking Machines, "Defeating Nondeterminism in LLM Inference", 2025);
    what fixed tiles cost on GPUs is known from studies of split sums (Stream-K, arXiv 2301.03598).

    Args:
        hidden: fp32, bf16 or fp16 [N, D], any strides.
        weight: same dtype [M, D], any strides. Under torch.autocast it, `hidden` and `bias` are cast as in F.linear.
        bias: same dtype [M], or None; it is added in fp32.

    Returns:
        [N, M], the dtype of `hidden`, contiguous.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape or device outside of the above.
        RuntimeError: a tensor that requires grad while gradients are recorded, or has a tangent; the op has no
            derivative.

    Example:
        >>> import torch
        >>> from selfgen_kernels import invariant_linear
        >>> hidden, weight = torch.randn(9, 64).bfloat16(), torch.randn(5, 64).bfloat16()
        >>> torch.equal(invariant_linear(hidden, weight)[7:8], invariant_linear(hidden[7:8], weight))
        True
    """
    hidden, weight, bias = (autocast(tensor) for tensor in (hidden, weight, bias))
    check_tensor("hidden", hidden, ("N", "D"), _DTYPES, None)
    check_tensor("weight", weight, ("M", hidden.shape[1]), (hidden.dtype,), hidden.device)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), (hidden.dtype,), hidden.device)
    refuse_grad("invariant_linear", hidden, weight, bias)
    return torch.ops.selfgen.invariant_linear(hidden, weight, bias)
