"""`invariant_linear` against the library's product, whose rows depend on their batch.

    pytest benchmarks/bench_linear.py

At the layers of SmolLM2-135M.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from selfgen_kernels import invariant_linear
from tools.real_parts import DEVICE

LAYERS = {"q": (576, 576), "gate": (576, 1536), "down": (1536, 576), "head": (576, 49_152)}  # (in, out)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("rows", [1, 8, 64, 256])
@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_invariant_linear(compare, layer, rows, dtype):
    size, outputs = LAYERS[layer]
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    hidden, weight = (torch.randn(count, size, device=DEVICE, dtype=kind) for count in (rows, outputs))
    sides = {
        "invariant_linear": lambda: invariant_linear(hidden, weight),
        "F.linear": lambda: F.linear(hidden, weight),
    }
    compare("invariant_linear, SmolLM2-135M", sides, {"layer": layer, "rows": rows, "dtype": dtype})
