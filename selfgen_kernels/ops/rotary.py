"""Rotary position embeddings."""

import torch
from torch import Tensor

from selfgen_kernels.ops.arguments import check_tensor, refuse_grad
from selfgen_kernels.ops.registration import define

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rotated_dtype(x: Tensor, cos: Tensor, keep_dtype: bool) -> torch.dtype:
    return x.dtype if keep_dtype else torch.promote_types(x.dtype, cos.dtype)


@define("rotary", "(Tensor query, Tensor key, Tensor cos, Tensor sin, bool keep_dtype) -> (Tensor, Tensor)")
def _(query, key, cos, sin, keep_dtype):
    dtype = rotated_dtype(query, cos, keep_dtype)
    return query.new_empty(query.shape, dtype=dtype), key.new_empty(key.shape, dtype=dtype)


def check_states(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise unless the tensors fit one another; the reference asks, too, as a CPU has no other kernel."""
    check_tensor("query", query, ("N", "heads", "head_dim"), DTYPES, None)
    tokens, _, head_dim = query.shape
    check_tensor("key", key, (tokens, "kv_heads", head_dim), (query.dtype,), query.device)
    check_tensor("cos", cos, (tokens, head_dim), DTYPES, query.device)
    check_tensor("sin", sin, (tokens, head_dim), (cos.dtype,), query.device)
    if head_dim % 2 or head_dim == 0:
        raise ValueError(f"query has heads of {head_dim} numbers, which have no halves; pass an even head_dim >= 2")


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, keep_dtype: bool = False) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by the angles of their positions (RoFormer, arXiv 2104.09864). For inference only.

    x * cos + [-x2, x1] * sin, where x1 and x2 are the halves of a head. The products and their sum are rounded as by
    ops of torch, so the result is that of transformers' `apply_rotary_pos_emb`, bit for bit.

    Args:
        query: fp32, bf16 or fp16 [N, heads, head_dim], any strides; head_dim is even.
        key: same dtype [N, kv_heads, head_dim], any strides.
        cos: fp32, bf16 or fp16 [N, head_dim], any strides.
        sin: same dtype and shape as `cos`.
        keep_dtype: results have the dtype of `query`; else that of `query * cos`, in which all is computed.

    Returns:
        query [N, heads, head_dim] and key [N, kv_heads, head_dim], contiguous.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape or device outside of the above.
        RuntimeError: a tensor that requires grad while gradients are recorded, or has a tangent; the op has no
            derivative.

    Example:
        >>> import torch
        >>> from selfgen_kernels import rotary
        >>> query, quarter = torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 2)
        >>> rotary(query, query, 0 * quarter, quarter)[0]
        tensor([[[0., 1.]]])
    """
    check_states(query, key, cos, sin)
    if not isinstance(keep_dtype, bool):
        raise TypeError(f"keep_dtype must be a bool, got {type(keep_dtype).__name__}; pass True or False")
    refuse_grad("rotary", query, key, cos, sin)
    return torch.ops.selfgen.rotary(query, key, cos, sin, keep_dtype)
