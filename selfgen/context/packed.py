"""Weights laid out for the matrix products of small passes, for as long as one generation takes.

torch multiplies fp32 matrices on the CPU through MKL, which reads the weights as they lie. A generation runs dozens of
small products over the same weights, so it pays to lay them out once for oneDNN, as torch's own inductor does when it
freezes a model. ``python -m benchmarks.packed``, two cores of an AMD EPYC (AVX-512): a [96, 576] x [576, 1536] product
takes 0.44 ms instead of 1.02 ms, the LM head of SmolLM2 over 8 rows 3.5 ms instead of 9.9 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .precision import is_linear, is_plain

_BATCH_HINT = 64  # rows of a typical pass; oneDNN chooses the layout by it


def can_pack() -> bool:
    """Whether this torch has oneDNN's packed products."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Inside, the fp32 ``nn.Linear`` modules of ``model`` on the CPU multiply packed copies of their weights.

    The copies take as much memory as the weights, and are freed afterwards. Modules whose ``forward`` has been replaced
    already are left alone, and so are quantized weights. So are all modules under autocast, which the packed products
    would ignore.
    """
    linears = [
        module
        for module in model.modules()
        if is_linear(module)
        and not isinstance(module.weight, DTensor)
        and is_plain(getattr(module, "weight", None))  # which a compressed one gets at its first forward
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and (module.bias is None or module.bias.dtype == torch.float32)
        and "forward" not in vars(module)
    ]
    if not linears or not can_pack() or torch.is_autocast_enabled("cpu"):
        yield
        return
    try:
        for module in linears:
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), _BATCH_HINT)
            vars(module)["forward"] = partial(_multiply, module, packed, module.bias)
        yield
    finally:
        for module in linears:
            vars(module).pop("forward", None)


def _multiply(module: nn.Linear, packed: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    # torch's parametrize, as adapters of PEFT use it, while it changes the weight; or a dtype that does not fit
    if not is_linear(module) or hidden.dtype != torch.float32:
        return type(module).forward(module, hidden)
    return torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")
