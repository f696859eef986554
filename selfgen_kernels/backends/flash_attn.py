"""`ragged_attention` by flash-attn's kernel, where that is installed (github.com/Dao-AILab/flash-attention, 2.7).

Its kernel for chunks of any length finds the keys of chunk b at `cu_seqlens_k[b]` and takes `seqused_k[b]` of them, so
first slots and lengths of our ranges are its arguments and the flat cache is read in place. The function that takes
`seqused_k` is not public: flash-attn may change it. Written from the signature and the checks in its source, and tested
with a stand-in; it has not run on hardware.
"""

import torch
from torch import Tensor

from selfgen_kernels.ops.attention import IMPLEMENTATIONS

_OFFERED = "bf16 or fp16 CUDA tensors, head_dim a multiple of 8 up to 256, and no sinks"


def ragged_attention(
    query: Tensor,  # [N, heads, head_dim]
    key: Tensor,  # [slots, kv_heads, head_dim]
    value: Tensor,  # [slots, kv_heads, head_dim]
    cu_seqlens_q: Tensor,  # [B + 1]
    kv_ranges: Tensor,  # [B, 2]: first slot, number of slots
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[N, heads, head_dim]; a range that leaves the cache is treated as empty, and its queries give 0."""
    refused = {
        f"tensors on {_device_type(query)}": _device_type(query) != "cuda",
        f"dtype {query.dtype}": query.dtype not in (torch.bfloat16, torch.float16),
        f"head_dim {query.shape[2]}": query.shape[2] > 256 or query.shape[2] % 8 != 0,
        "sinks": sinks is not None,
    }
    missing = [feature for feature, wanted in refused.items() if wanted]
    if missing:
        raise ValueError(
            f"flash-attn does not offer {', '.join(missing)}; it takes {_OFFERED}; leave implementation=None"
        )
    try:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward
    except ImportError as error:
        raise RuntimeError(
            f'implementation="flash_attn" needs flash-attn >= 2.7, which cannot be imported ({error}); '
            "install it with pip install flash-attn --no-build-isolation, or leave implementation=None"
        ) from error
    queries, slots = len(query), len(key)
    if queries == 0 or len(kv_ranges) == 0 or slots == 0:
        return query.new_zeros(query.shape)
    first, length = kv_ranges.unbind(1)
    # Values were not looked at: what does not fit is given no keys, so that nothing outside of the cache is read.
    fits = (first >= 0) & (length >= cu_seqlens_q.diff()) & (length <= slots) & (first <= slots - length)
    first, length = first.where(fits, 0), length.where(fits, 0)
    output, *_ = _flash_attn_varlen_forward(
        query,
        key,
        value,
        cu_seqlens_q.contiguous(),
        torch.cat([first, first.new_full((1,), slots)]).int(),
        max(2, queries),  # bounds that hold without asking the device; 1 would promise one query in each chunk
        slots,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=True,
        window_size_left=-1 if sliding_window is None else min(sliding_window - 1, slots),
        window_size_right=0,
        softcap=softcap or 0.0,
        seqused_k=length.int(),
    )
    padding = torch.arange(queries, device=query.device) >= cu_seqlens_q[-1]
    return output.masked_fill(padding[:, None, None], 0)


IMPLEMENTATIONS["flash_attn"] = ragged_attention


def _device_type(query: Tensor) -> str:
    return query.device.type  # a function of its own, for tests on machines without a GPU
