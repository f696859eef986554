"""The rows of a training step: each once, where their hidden states are, and which of their labels are learned."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from ..context.hidden_states import HiddenStates
from ..data.batches import IGNORE_INDEX, Row


def unique_rows(rows: list[Row]) -> list[Row]:
    """Each row once, as a sampler may repeat rows.

    Raises:
        ValueError: two different rows have the same id.
    """
    unique: dict[int, Row] = {}
    for row in rows:
        known = unique.setdefault(row.sample_id, row)
        if known is row:
            continue
        if not (torch.equal(known.prompt, row.prompt) and torch.equal(known.labels, row.labels)):
            raise ValueError(
                f"two different rows have the sample id {row.sample_id}; ids tell rows apart: number the rows of the "
                "data set anew, or remove its column sample_id before tokenizing"
            )
    return list(unique.values())


def learn_after_self(labels: Tensor, is_self: Tensor) -> None:
    """Ignore those of an answer's ``labels`` [T] that have no self token before them."""
    own = is_self.long()
    labels[own.cumsum(0) == own] = IGNORE_INDEX


def learn_after_switch(labels: Tensor, is_self: Tensor) -> None:
    """Ignore those of an answer's ``labels`` [T] that lie in its prefix of self tokens.

    The prefix ends at the first token that is learned and may be a self token, but is none.
    """
    after = (labels != IGNORE_INDEX) & ~is_self
    labels[after.cumsum(0) == 0] = IGNORE_INDEX


LEARN_ON = {"after_self": learn_after_self, "after_switch": learn_after_switch}
"""What ``loss_on`` ignores, but for "all"."""


@dataclass
class Step:
    """The optimizer step that is being trained on."""

    waiting: list[dict[str, Tensor]] = field(default_factory=list)  # micro-batches without contexts yet
    ready: int = 0  # micro-batches with contexts that are not trained on yet
    runs_passes: bool = False  # whether making their contexts ran the model, in one process as in all
    passes: RowSlots | None = None  # what making their contexts has computed, where it may be reused

    def take(self, count: int | None) -> list[dict[str, Tensor]]:
        """The next micro-batches, all of them by default, whose contexts are made now."""
        self.passes = None
        taken, self.waiting = self.waiting[:count], self.waiting[count:] if count else []
        self.ready = len(taken)
        return taken

    def trained(self) -> None:
        """A micro-batch is done."""
        self.ready -= 1
        if self.ready <= 0:
            self.passes = None


class RowSlots:
    """The hidden states that one context generation left, and where in them its rows are."""

    def __init__(self, hidden_states: HiddenStates, rows: list[Row]):
        self.hidden_states = hidden_states
        starts = accumulate((len(row.prompt) + len(row.reference) for row in rows), initial=0)
        self.first_slot = {row.sample_id: start for row, start in zip(rows, starts, strict=False)}

    def slots(self, batch: dict[str, Tensor]) -> Tensor:
        """int64 [B, L], with the slot after the last one as padding."""
        ids = batch["input_ids"]
        first = torch.tensor([self.first_slot.get(row, 0) for row in batch["sample_id"].tolist()], device=ids.device)
        places = torch.arange(ids.shape[1], device=ids.device)
        lengths = batch["prompt_length"] + batch["answer_length"]
        return torch.where(places < lengths[:, None], first[:, None] + places, self.hidden_states.num_slots)
