"""The fused LM head: `linear_sample_mix` against the bare matrix product and against products with a sampler after.

    make bench            (or: pytest benchmarks/bench_head.py)

On a CPU, SmolLM2-135M's head and hidden states at the answer tokens of GSM8K. On a GPU, random weights in the shape of
Qwen3-8B's head, at which FlashSampling (arXiv 2603.15854) was measured; its Table 3 is
shown for comparison.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selfgen_kernels import linear_sample_mix, sample_mix
from tools.real_parts import DEVICE, recorded_head

from .bench_sampling import exponential_race, multinomial

ON_GPU = DEVICE == "cuda"
ROWS = (1, 8, 64, 256) if ON_GPU else (1, 8, 64, 512)
DTYPES = {"bf16": torch.bfloat16} if ON_GPU else {"fp32": torch.float32, "bf16": torch.bfloat16}

# Table 3 of arXiv 2603.15854v1: FlashSampling's speed-up over a product with a compiled softmax and multinomial, at
# D = 4096, V = 151,936.
PUBLISHED = {
    "H100": {1: 1.25, 8: 1.27, 64: 1.60},
    "H200": {1: 1.28, 8: 1.31, 64: 1.60},
    "B200": {1: 1.46, 8: 1.53, 64: 1.84},
}


@pytest.fixture(scope="module")
def head():
    """hidden fp32 [rows, D], weight fp32 [V, D]."""
    if not ON_GPU:
        return recorded_head(max(ROWS))
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(max(ROWS), 4096, generator=generator, device=DEVICE)
    return hidden, torch.randn(151_936, 4096, generator=generator, device=DEVICE) / 16


@torch.compile(dynamic=True)
def compiled_race(hidden, weight):
    return exponential_race(hidden @ weight.T)


@torch.compile(dynamic=True)
def compiled_multinomial(hidden, weight):
    return multinomial(hidden @ weight.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_linear_sample_mix(compare, head, rows, dtype):
    hidden, weight = (x.to(DTYPES[dtype]) for x in head)
    hidden = hidden[:rows].contiguous()
    ids = torch.arange(rows, device=DEVICE)
    keys: dict[str, Any] = {"seed": 0, "sample_ids": ids, "positions": ids}

    def fused(self_prob=1.0, **how):
        return lambda: linear_sample_mix(hidden, weight, ids, self_prob, **keys, **how)

    sides = {
        "linear_sample_mix": fused(),
        "p=0.25": fused(0.25),
        "top-k 50 + top-p 0.95": fused(top_k=50, top_p=0.95),
        "matrix product": lambda: hidden @ weight.T,
        "product, sample_mix": lambda: sample_mix(hidden @ weight.T, ids, 1.0, **keys),
        "product, exponential race, torch.compile": lambda: compiled_race(hidden, weight),
        "product, multinomial(softmax)": lambda: multinomial(hidden @ weight.T),
        "product, multinomial(softmax), torch.compile": lambda: compiled_multinomial(hidden, weight),
    }
    columns = {"rows": rows, "dtype": dtype}
    seconds = compare(f"linear_sample_mix, D = {weight.shape[1]}, V = {weight.shape[0]}", sides, columns, own=3)
    if (rows, dtype) == (64, "fp32"):
        assert seconds["linear_sample_mix"] <= 1.15 * seconds["matrix product"]


def test_published_figures(report):
    if ON_GPU:
        rows = [
            {"GPU": gpu, **{f"{n} rows": f"{gain:.2f}x" for n, gain in gains.items()}}
            for gpu, gains in PUBLISHED.items()
        ]
        report(
            "for comparison, not measured here: FlashSampling over product and compiled multinomial (its Table 3)", rows
        )
