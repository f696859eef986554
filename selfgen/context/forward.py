"""The forward of a generation's passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from .fused import Fused
from .hidden_states import HiddenStates, captured
from .invariant import Invariant
from .packed import fresh_casts_of, packed_linears
from .ragged import RaggedCache, RaggedPass, ragged_logits, ragged_model


@dataclass
class Coverage:
    """How many passes of a generation were CUDA graphs; all others were launched kernel by kernel."""

    captured: int = 0  # passes that were recorded, and then replayed for the first time
    replayed: int = 0  # passes that were a replay of what had been recorded before
    padding: int = 0  # tokens that these passes, and trial runs of a new size, computed besides the planned ones


class Forward:
    """Passes of ``model`` over a ragged cache; one generation at a time. ``invariant`` runs in them if it is given.

    ``coverage`` is of the generation that runs, or of the last one.
    """

    cache: RaggedCache

    def __init__(self, model: PreTrainedModel, invariant: Invariant | None = None):
        self.model, self.device, self.invariant = model, model.device, invariant
        self._fused = Fused(model)
        self.hidden_states: HiddenStates | None = None
        self.coverage = Coverage()
        self._busy = False

    @contextmanager
    def over(self, num_slots: int, hidden_states: HiddenStates | None = None) -> Iterator[None]:
        """Inside, passes over ``num_slots`` slots can be run; ``hidden_states`` keeps what they compute.

        Raises:
            RuntimeError: passes of another generation are being run.
        """
        if self._busy:
            raise RuntimeError(
                "this ContextGenerator is at work already, in another thread or inside a pass: use a second one"
            )
        self._busy, self.hidden_states, self.coverage = True, hidden_states, Coverage()
        kept = nullcontext() if hidden_states is None else captured(hidden_states.layers, self._target)
        try:
            self._begin(num_slots)
            with ragged_model(self.model), self._weights(), self._fused.used(), kept:
                yield
        except BaseException:
            self.release()
            raise
        finally:
            self._busy, self.hidden_states = False, None
            self._end()

    @property
    def is_busy(self) -> bool:
        return self._busy

    def release(self) -> None:
        """Free what is kept for the next generation."""

    def _weights(self) -> AbstractContextManager[None]:
        """Inside, passes read weights in the form that is best for them."""
        if self.invariant is None:
            return packed_linears(self.model)
        return self.invariant.used(fresh_casts_of(self.model))

    def _begin(self, num_slots: int) -> None:
        self.cache = RaggedCache(self.model, num_slots)

    def _end(self) -> None:
        vars(self).pop("cache", None)  # and the K/V with it

    def _target(self) -> tuple[HiddenStates, Tensor | slice]:
        """Where the pass that is being run leaves its hidden states, and at which slots."""
        assert self.hidden_states is not None
        return self.hidden_states, self.cache.current.slots

    def __call__(self, ragged_pass: RaggedPass, tokens: Tensor, index: Tensor) -> Tensor:
        """Compute a pass of ``tokens`` [slots]; returns logits [M, V] at its places ``index`` [M].

        They are valid until the next pass. The head, with all that a model does to its logits, runs at ``index`` only.
        """
        return ragged_logits(self.model, self.cache, ragged_pass, tokens[ragged_pass.slots], index)
