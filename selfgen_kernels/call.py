"""The records of a sampling call, in the order in which its operators take what they hold.

What is per row is a tensor [N] or, on every device but the CPU, may be a number for all rows: a CPU tensor of no
dimension, which costs no launch. Kernels that want tensors only call `in_rows`.

Arguments of an operator are flat, as torch wants them. The table of operators (`ops/__init__.py`) says which records
those of a sampling op make, and everything else reads it: schemas are written from it, public functions hand over
`*record`, and kernels get the records back.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

NOISE_VERSION = 2
"""Rises when the same seed, ids and logits give other tokens, so that nothing is resumed with other noise."""
GROUP_SIZE = 64
"""Consecutive ids of the vocabulary that are drawn from as one; see `backends/reference/sampling.py`."""

Mixed = tuple[Tensor, Tensor, Tensor]
"""Tokens int64 [N], is_self bool [N] and invalid bool [N]."""
Candidates = tuple[Tensor, Tensor]
"""Values fp32 [N, C, 3] and ids int64 [N, C] of C candidates per row: logsumexp of the group (its maximum if greedy),
G1 of the group, z + G2 of the best token in it, and that token, or -1 for no candidate. A row with NaN or +inf is all
NaN."""


class Mask(NamedTuple):
    """Which rows take a self token: those whose random number is below their threshold. Tensors are [N], or numbers."""

    threshold: Tensor
    seed: int | Tensor  # int64 [1], in the overload that takes it
    sample_ids: Tensor
    positions: Tensor


class Sampling(NamedTuple):
    """How each row is drawn: its `Mask`, temperature and filters. Tensors are [N], or numbers."""

    threshold: Tensor
    seed: int | Tensor  # int64 [1], in the overload that takes it
    sample_ids: Tensor
    positions: Tensor
    inv_temperature: Tensor  # +inf is greedy
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None

    @property
    def mask(self) -> Mask:
        return Mask(self.threshold, self.seed, self.sample_ids, self.positions)

    @property
    def draw(self) -> tuple[Any, ...]:
        """The fields of an op that offers no filters."""
        return (*self.mask, self.inv_temperature)

    @property
    def greedy(self) -> Tensor:
        return self.inv_temperature.isposinf()

    @property
    def filtered(self) -> bool:
        return any(value is not None for value in (self.top_k, self.top_p, self.min_p))

    def select(self, rows: Tensor | slice) -> "Sampling":
        of_rows = {
            name: value[rows] for name, value in self._asdict().items() if isinstance(value, Tensor) and name != "seed"
        }
        return self._replace(**of_rows)


_Rows = TypeVar("_Rows", Mask, Sampling)


def in_rows(how: _Rows) -> _Rows:
    """`how` with a tensor [N] in place of each number."""
    like = how.positions
    given = {name: x for name, x in how._asdict().items() if name not in ("sample_ids", "positions")}
    numbers = {name: x for name, x in given.items() if isinstance(x, Tensor) and not x.dim()}
    tensors: Any = {name: like.new_full(like.shape, x.item(), dtype=x.dtype) for name, x in numbers.items()}
    return how._replace(**tensors)


class Head(NamedTuple):
    """An LM head, or a part of it by ids, and what it is given."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float


def unscaled(threshold: Tensor, seed: int | Tensor, sample_ids: Tensor, positions: Tensor) -> Sampling:
    """The `Sampling` of a `Mask` at temperature 1."""
    return Sampling(threshold, seed, sample_ids, positions, torch.ones_like(threshold, dtype=torch.float32))


class Part(NamedTuple):
    """Arguments side by side that are handed to `make` together."""

    make: Callable[..., Any]
    parameters: tuple[str, ...]  # as in a schema


_IN_SCHEMAS: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int | Tensor: "SymInt", float: "float", float | None: "float?"
}  # fmt: skip


def _of(record: Any, without: tuple[str, ...] = ()) -> Part:
    kinds = record.__annotations__.items()
    return Part(record, tuple(f"{_IN_SCHEMAS[kind]} {name}" for name, kind in kinds if name not in without))


MASK, SAMPLING, HEAD = (_of(record) for record in (Mask, Sampling, Head))
DRAW = _of(Sampling, without=("top_k", "top_p", "min_p"))
"""A `Sampling` where filters are not offered."""


def one(parameter: str) -> Part:
    """An argument that is in no record."""
    return Part(lambda argument: argument, (parameter,))
