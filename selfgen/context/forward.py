"""The passes of a generation, and the forward that runs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .fused import Fused
from .hidden_states import HiddenStates, captured
from .invariant import Invariant
from .packed import fresh_casts_of, packed_linears
from .ragged import RaggedCache, RaggedPass, ragged_logits, ragged_model

PADDING = -1  # the slot of a token that is none; as an index it is the last slot, which is nobody's


class Size(NamedTuple):
    """What a pass computes: so many tokens, and the head at so many places; both are at least those of its plan."""

    tokens: int
    places: int


class Passes(ABC):
    """The passes of one generation over ``num_slots`` slots, of which the last is nobody's.

    All that a pass reads and writes is in tensors that stay where they are, and nothing waits for the device: so a pass
    can be recorded once, and replayed. What the host has to know of it is written to ``numbers``.
    """

    num_slots: int
    is_trial: ClassVar[bool] = False  # nothing but their time is wanted
    hidden_states: HiddenStates | None  # where the passes leave what a training step wants
    numbers: Tensor  # int64, on the host
    PLAN: ClassVar[dict[str, int]] = {}  # the tensors that say what the next pass computes, and what nothing is

    @property
    @abstractmethod
    def settings(self) -> tuple[Hashable, ...]:
        """What a pass depends on besides the model and its tensors."""

    @abstractmethod
    def run(self, forward: Forward, size: Size) -> None:
        """Compute the planned pass and commit what it shows; all that is beyond the plan is padding."""

    def owners(self) -> tuple[object, ...]:
        """The objects that have the tensors of a pass as attributes."""
        return (self,)

    def move_to(self, memory: list[Tensor]) -> None:
        """Go on with tensors of the same kind that lie elsewhere."""
        for (owner, name, tensor), there in zip(self._tensors(), memory, strict=True):
            setattr(owner, name, there.copy_(tensor))

    @property
    def memory(self) -> list[Tensor]:
        return [tensor for *_, tensor in self._tensors()]

    def _tensors(self) -> list[tuple[object, str, Tensor]]:
        return [(own, name, x) for own in self.owners() for name, x in vars(own).items() if isinstance(x, Tensor)]

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Inside, nothing is planned: a pass computes padding and changes nothing."""
        plan = [(getattr(self, name), nothing) for name, nothing in self.PLAN.items()]
        before = [tensor.clone() for tensor, _ in plan]
        for tensor, nothing in plan:
            tensor.fill_(nothing)
        try:
            yield
        finally:
            for (tensor, _), was in zip(plan, before, strict=True):
                tensor.copy_(was)


def numbers_for(count: int, device: torch.device) -> Tensor:
    """int64 [count] on the host, to which ``device`` can write while the host goes on."""
    return torch.zeros(count, dtype=torch.int64, pin_memory=device.type == "cuda")


def seed_for(seed: int, device: torch.device) -> Tensor:
    """int64 [1]: 64 bits of a seed, signed or not, for passes that are recorded under one and replayed under another.

    Raises:
        ValueError: more than 64 bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed} does not fit in 64 bits; pass -2**63 <= seed < 2**64, such as seed % 2**64")
    return torch.full((1,), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def following(of_slots: Tensor) -> Tensor:
    """A view of ``of_slots`` [..., S] by the slot before: of no slot, `PADDING`, it is what nobody's slot has."""
    return of_slots[..., 1:]


@dataclass
class Coverage:
    """How many passes of a generation were CUDA graphs; all others were launched kernel by kernel."""

    captured: int = 0  # passes that were recorded, and then replayed for the first time
    replayed: int = 0  # passes that were a replay of what had been recorded before
    padding: int = 0  # tokens that these passes computed besides the planned ones


class Forward:
    """Passes of ``model`` over a ragged cache; one generation at a time. ``invariant`` runs in them if it is given.

    ``coverage`` is of the generation that runs, or of the last one.
    """

    cache: RaggedCache

    def __init__(self, model: PreTrainedModel, invariant: Invariant | None = None):
        self.model, self.device, self.invariant = model, model.device, invariant
        self._fused = Fused(model)
        self.coverage = Coverage()
        self._busy = False

    def room(self, slots: int, rows: int, *, keeps_hidden_states: bool = False) -> tuple[int, int]:
        """For how many slots and rows `Passes` over so many should have tensors.

        Raises:
            RuntimeError: passes of another generation are being run.
        """
        self._check_free()
        return slots + 1, rows  # the last slot is nobody's

    def most_slots(self, wanted: int) -> int:
        """``wanted`` slots, or the half, a quarter, ... of them, so that passes are recorded if any are."""
        return wanted

    def _check_free(self, remedy: str = "use a second one") -> None:
        if self._busy:
            raise RuntimeError(
                f"this ContextGenerator is at work already, in another thread or inside a pass: {remedy}"
            )

    @contextmanager
    def over(self, passes: Passes) -> Iterator[None]:
        """Inside, ``passes`` can be run.

        Raises:
            RuntimeError: passes of another generation are being run.
        """
        self._check_free()
        self._busy, self.coverage = True, Coverage()
        try:
            self._begin(passes)
            kept = captured(passes.hidden_states, lambda: self.cache.current.slots)
            with ragged_model(self.model), self._weights(), self._fused.used(), kept:
                yield
        except BaseException:
            self._release()
            raise
        finally:
            self._busy = False
            self._end()

    @property
    def is_busy(self) -> bool:
        return self._busy

    def release(self) -> None:
        """Free what is kept for the next generation.

        Raises:
            RuntimeError: passes are being run, which need it.
        """
        self._check_free("release it when that is done")
        self._release()

    def _release(self) -> None:
        """The same, whatever is being run."""

    def _weights(self) -> AbstractContextManager[None]:
        """Inside, passes read weights in the form that is best for them."""
        casts = fresh_casts_of(self.model)
        if self.invariant is not None:
            return self.invariant.used(casts)
        return packed_linears(self.model) if casts is None else casts.used()

    def _begin(self, passes: Passes) -> None:
        self.cache = RaggedCache(self.model, passes.num_slots)

    def _end(self) -> None:
        self._fused.forget()  # as nobody looks whether modules have changed
        vars(self).pop("cache", None)  # and the K/V with it

    def run(self, passes: Passes, size: Size) -> None:
        """Run the pass that is planned, of ``size``."""
        passes.run(self, size)

    def read(self, passes: Passes) -> list[int]:
        """What the last pass has written to the host, once it is done: the one wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return passes.numbers.tolist()

    def logits(self, ragged_pass: RaggedPass, input_ids: Tensor, index: Tensor) -> Tensor:
        """Compute a pass over ``input_ids`` [N]; returns logits [M, V] at its places ``index`` [M].

        The head, with all that a model does to its logits, runs at ``index`` only.
        """
        return ragged_logits(self.model, self.cache, ragged_pass, input_ids, index)
