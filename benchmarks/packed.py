"""What oneDNN's packed weights gain over torch's own fp32 product on this CPU, at the shapes of SmolLM2-135M.

python -m benchmarks.packed
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from selfgen.context.packed import can_pack, packed_linears

SHAPES = ((576, 576), (576, 1536), (1536, 576), (576, 49152))  # (in, out)
ROWS = (1, 8, 32, 96, 256)
ROUNDS = 15


@torch.no_grad()
def main() -> None:
    if not can_pack():
        raise SystemExit("this torch has no oneDNN, so weights are not packed")
    print(f"{'in':>6}{'out':>8}{'rows':>6}{'torch':>12}{'packed':>12}{'gain':>8}")
    for size_in, size_out in SHAPES:
        copies = max(1, 30_000_000 // (size_in * size_out))  # more weights than the caches hold, as in a model
        layers = nn.ModuleList(nn.Linear(size_in, size_out, bias=False) for _ in range(copies))
        for rows in ROWS:
            hidden = torch.randn(rows, size_in)
            plain, packed = [], []
            for _ in range(ROUNDS):  # alternating
                plain.append(seconds(layers, hidden))
                with packed_linears(layers):
                    packed.append(seconds(layers, hidden))
            a, b = (statistics.median(times) / copies * 1e3 for times in (plain, packed))
            print(f"{size_in:6}{size_out:8}{rows:6}{a:9.3f} ms{b:9.3f} ms{a / b:7.1f}x", flush=True)


def seconds(layers: nn.ModuleList, hidden: torch.Tensor) -> float:
    layers[0](hidden)
    started = time.perf_counter()
    for layer in layers:
        layer(hidden)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
