"""Ragged attention over a flat K/V cache against torch's SDPA on the padded equivalent, alternating in one run.

    make bench            (or: pytest benchmarks/bench_attention.py)

SDPA gets its padded, transposed tensors and its mask for free, although making them is part of its cost in use.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from selfgen_kernels import ragged_attention
from selfgen_kernels.backends.reference.attention import ragged_attention as reference_attention
from tools.real_parts import DEVICE

HEADS = {"9/3 x 64": (9, 3, 64), "32/8 x 128": (32, 8, 128)}  # SmolLM2-135M, Llama-3-8B
LENGTHS = {  # K/V of each row; the last `chunk` positions are queries
    "8 x 200": [200] * 8,
    "8 rows, 64 to 256": [64, 91, 119, 146, 174, 201, 229, 256],
    "32 rows, 100 to 400": [100 + 300 * i // 31 for i in range(32)],
    "2 x 1024": [1024, 1024],
}
CHUNKS = (1, 8, 64)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", HEADS)
def test_ragged_attention(compare, heads, lengths, chunk, dtype):
    num_heads, kv_heads, head_dim = HEADS[heads]
    sizes = LENGTHS[lengths]
    rows, longest = len(sizes), max(sizes)
    make: dict[str, Any] = {"device": DEVICE, "dtype": DTYPES[dtype]}
    query = torch.randn(rows * chunk, num_heads, head_dim, **make)
    key, value = (torch.randn(sum(sizes), kv_heads, head_dim, **make) for _ in range(2))
    cu_seqlens_q = torch.arange(0, rows * chunk + 1, chunk, dtype=torch.int32, device=DEVICE)
    ends = torch.tensor(sizes).cumsum(0)
    kv_ranges = torch.stack([ends - torch.tensor(sizes), torch.tensor(sizes)], 1).to(DEVICE)

    padded_query = query.view(rows, chunk, num_heads, head_dim).transpose(1, 2).contiguous()
    padded_key, padded_value = (
        torch.nn.utils.rnn.pad_sequence(x.split(sizes), batch_first=True).transpose(1, 2).contiguous()
        for x in (key, value)
    )
    last = torch.tensor(sizes, device=DEVICE)[:, None] - chunk + torch.arange(chunk, device=DEVICE)  # [rows, chunk]
    mask = (torch.arange(longest, device=DEVICE) <= last[:, :, None])[:, None]  # [rows, 1, chunk, longest]

    ragged = query, key, value, cu_seqlens_q, kv_ranges
    sides = {
        "ragged_attention": lambda: ragged_attention(*ragged),
        "SDPA, padded": lambda: F.scaled_dot_product_attention(
            padded_query, padded_key, padded_value, attn_mask=mask, enable_gqa=True
        ),
        "torch reference": lambda: reference_attention(*ragged, head_dim**-0.5, None, None, None),
    }
    got = sides["ragged_attention"]().view(rows, chunk, num_heads, head_dim).transpose(1, 2)
    torch.testing.assert_close(got, sides["SDPA, padded"](), atol=2e-2 if dtype == "bf16" else 1e-4, rtol=2e-2)
    columns = {"heads": heads, "K/V": lengths, "queries a row": chunk, "dtype": dtype}
    seconds = compare("ragged_attention", sides, columns)
    if DEVICE == "cpu":
        assert seconds["ragged_attention"] <= seconds["SDPA, padded"]
