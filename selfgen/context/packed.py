"""Weights as small passes read them: laid out for oneDNN on a CPU, or in the dtype of autocast.

torch multiplies fp32 matrices on the CPU through MKL, which reads the weights as they lie. A generation runs dozens of
small products over the same weights, so it pays to lay them out once for oneDNN, as torch's own inductor does when it
freezes a model. ``python -m benchmarks.packed``, two cores of an AMD EPYC (AVX-512): a [96, 576] x [576, 1536] product
takes 0.44 ms instead of 1.02 ms, the LM head of SmolLM2 over 8 rows 3.5 ms instead of 9.9 ms.

Autocast casts a weight whenever it is used, or keeps its cast for a while: where Accelerate puts it inside the forward,
until that ends. A CUDA graph can't know whether a cast that was kept is still that of the weight, so its replays would
cast all weights anew. `CastWeights` casts them once per generation, for graphs into memory that stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .precision import autocast_dtype, is_linear, is_plain

_BATCH_HINT = 64  # rows of a typical pass; oneDNN chooses the layout by it


def can_pack() -> bool:
    """Whether this torch has oneDNN's packed products."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def plain_linears(model: nn.Module, device: str) -> list[nn.Linear]:
    """The ``nn.Linear`` modules of ``model`` whose product may be replaced.

    Not those whose ``forward`` has been replaced already, and not quantized weights or parts of weights.
    """
    return [
        module
        for module in model.modules()
        if is_linear(module)
        and not isinstance(module.weight, DTensor)
        and is_plain(getattr(module, "weight", None))  # which a compressed one gets at its first forward
        and module.weight.device.type == device
        and "forward" not in vars(module)
    ]


@contextmanager
def replaced(forwards: Iterable[tuple[nn.Module, Callable[..., Tensor]]]) -> Iterator[None]:
    """Inside, modules have other forwards, which are made as they are asked for."""
    changed = []
    try:
        for module, forward in forwards:
            vars(module)["forward"] = forward
            changed.append(module)
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Inside, the fp32 ``nn.Linear`` modules of ``model`` on the CPU multiply packed copies of their weights.

    The copies take as much memory as the weights, and are freed afterwards. Under autocast all modules are left alone,
    as the packed products would ignore it.
    """
    if not can_pack() or torch.is_autocast_enabled("cpu"):
        yield
        return

    def packed() -> Iterator[tuple[nn.Linear, Callable[[Tensor], Tensor]]]:
        for module in plain_linears(model, "cpu"):
            if module.weight.dtype == torch.float32 and (module.bias is None or module.bias.dtype == torch.float32):
                weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), _BATCH_HINT)
                yield module, partial(_multiply, module, weight, module.bias)

    with replaced(packed()):
        yield


def _multiply(module: nn.Linear, packed: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    # torch's parametrize, as adapters of PEFT use it, while it changes the weight; or a dtype that does not fit
    if not is_linear(module) or hidden.dtype != torch.float32:
        return type(module).forward(module, hidden)
    return torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")


class CastWeights:
    """The weights of ``nn.Linear`` modules in the ``dtype`` of autocast; `refresh` writes them where they were.

    Inside `used` the modules multiply these copies, which gives the same numbers as autocast's own casts. A module that
    runs where autocast is off, or in another dtype, multiplies its weight.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.dtype, self.device = dtype, next(model.parameters()).device.type
        self.modules = [module for module in plain_linears(model, self.device) if module.weight.dtype == torch.float32]
        self._copies: dict[nn.Linear, tuple[Tensor, Tensor | None]] = {}

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * sum(weight.numel() for weight in self._weights())

    def _weights(self) -> list[Tensor]:
        return [one.detach() for module in self.modules for one in (module.weight, module.bias) if one is not None]

    def refresh(self) -> None:
        if not self._copies:
            for module in self.modules:
                bias = None if module.bias is None else torch.empty_like(module.bias, dtype=self.dtype)
                self._copies[module] = torch.empty_like(module.weight, dtype=self.dtype), bias
        copies = [one for module in self.modules for one in self._copies[module] if one is not None]
        if copies:
            torch._foreach_copy_(copies, self._weights())

    def of(self, module: nn.Linear) -> tuple[Tensor, Tensor | None] | None:
        """The copies for ``module``, or None: it has none, or its weight is another one for a while (parametrized)."""
        return self._copies.get(module) if is_linear(module) else None

    def used(self) -> AbstractContextManager[None]:
        return replaced((module, partial(self._multiply, module, *self._copies[module])) for module in self.modules)

    def _multiply(self, module: nn.Linear, weight: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
        casts = torch.is_autocast_enabled(self.device) and torch.get_autocast_dtype(self.device) == self.dtype
        if not casts or not is_linear(module) or hidden.dtype == torch.float64:
            return type(module).forward(module, hidden)
        return F.linear(hidden, weight, bias)  # of which autocast casts what is not cast yet


def fresh_casts_of(model: nn.Module) -> CastWeights | None:
    """The weights of ``model`` in autocast's dtype, as they are now; None where autocast is off."""
    dtype = autocast_dtype(next(model.parameters()).device)
    if dtype is None:
        return None
    casts = CastWeights(model, dtype)
    casts.refresh()
    return casts
