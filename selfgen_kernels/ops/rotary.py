"""Rotary position embeddings."""

import torch
from torch import Tensor

from selfgen_kernels.ops.arguments import check_tensor, is_traced, refuse_grad
from selfgen_kernels.ops.attention import refuse_overlap
from selfgen_kernels.ops.registration import define

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rotated_dtype(x: Tensor, cos: Tensor, keep_dtype: bool) -> torch.dtype:
    return x.dtype if keep_dtype else torch.promote_types(x.dtype, cos.dtype)


@define("rotary", "(Tensor query, Tensor key, Tensor cos, Tensor sin, bool keep_dtype) -> (Tensor, Tensor)")
def _(query, key, cos, sin, keep_dtype):
    dtype = rotated_dtype(query, cos, keep_dtype)
    return query.new_empty(query.shape, dtype=dtype), key.new_empty(key.shape, dtype=dtype)


@define(
    "rotary_append",
    "(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, "
    "Tensor slots, bool keep_dtype) -> Tensor",
)
def _(key_cache, value_cache, query, key, value, cos, sin, slots, keep_dtype):
    return query.new_empty(query.shape, dtype=rotated_dtype(query, cos, keep_dtype))


def check_states(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise unless the tensors fit one another; the reference asks, too, as a CPU has no other kernel."""
    check_tensor("query", query, ("N", "heads", "head_dim"), DTYPES, None)
    tokens, _, head_dim = query.shape
    check_tensor("key", key, (tokens, "kv_heads", head_dim), (query.dtype,), query.device)
    check_tensor("cos", cos, (tokens, head_dim), DTYPES, query.device)
    check_tensor("sin", sin, (tokens, head_dim), (cos.dtype,), query.device)
    if head_dim % 2 or head_dim == 0:
        raise ValueError(f"query has heads of {head_dim} numbers, which have no halves; pass an even head_dim >= 2")


def check_append(
    key_cache: Tensor, value_cache: Tensor, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor,
    slots: Tensor,
) -> None:  # fmt: skip
    """As `check_states`."""
    check_tensor("key_cache", key_cache, ("slots", "kv_heads", "head_dim"), DTYPES, None)
    check_tensor("value_cache", value_cache, tuple(key_cache.shape), (key_cache.dtype,), key_cache.device)
    check_states(query, key, cos, sin)
    check_tensor("key", key, ("N", *key_cache.shape[1:]), DTYPES, key_cache.device)
    check_tensor("value", value, tuple(key.shape), (key_cache.dtype,), key_cache.device)
    check_tensor("slots", slots, (key.shape[0],), (torch.int64,), key_cache.device)


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


def rotary_append(
    key_cache: Tensor, value_cache: Tensor, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor,
    slots: Tensor, *, keep_dtype: bool = False,
) -> Tensor:  # fmt: skip
    """Turn queries and keys as `rotary`, and write the K/V to their slots as `kv_append` (RoFormer, arXiv 2104.09864).

    For inference only. Bit for bit what the two ops give; turned keys are rounded to the dtype of the cache.

    Args:
        key_cache: fp32, bf16 or fp16 [slots, kv_heads, head_dim], any strides but 0; written to.
        value_cache: same dtype and shape, other memory; written to.
        query, key, cos, sin, keep_dtype: as in `rotary`.
        value: [N, kv_heads, head_dim] in the dtype of the caches, any strides; no view of a cache, nor is another
            argument.
        slots: int64 [N], the slot of each token; a negative one is padding, and nothing is written. No slot twice.

    Returns:
        query [N, heads, head_dim], turned, contiguous.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape or device outside of the above, a slot past the end (on a GPU, where values are not
            looked at, nothing is written for it), or memory that is written to and shared.
        RuntimeError: a tensor that requires grad while gradients are recorded, or has a tangent; the op has no
            derivative.

    Example:
        >>> import torch
        >>> from selfgen_kernels import rotary_append
        >>> caches, token, quarter = torch.zeros(2, 3, 1, 2), torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 2)
        >>> rotary_append(*caches, token, token, token, 0 * quarter, quarter, torch.tensor([2]))
        tensor([[[0., 1.]]])
        >>> caches[:, 2, 0]
        tensor([[0., 1.],
                [1., 0.]])
    """
    check_append(key_cache, value_cache, query, key, value, cos, sin, slots)
    if not isinstance(keep_dtype, bool):
        raise TypeError(f"keep_dtype must be a bool, got {type(keep_dtype).__name__}; pass True or False")
    refuse_grad("rotary_append", key_cache, value_cache, query, key, value, cos, sin)
    if not is_traced(key_cache, value_cache, query, key, value, cos, sin):  # which may have no memory
        refuse_overlap(key_cache, value_cache, query=query, key=key, value=value, cos=cos, sin=sin)
    return torch.ops.selfgen.rotary_append(key_cache, value_cache, query, key, value, cos, sin, slots, keep_dtype)
