"""Rows as records: contexts, the passes that made them, probabilities, losses, and the answer of a free run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...context import ContextGenerator
from ...context.generator import Method
from ..gap import greedy_of
from ..losses import answer_logits, check_columns


@dataclass(frozen=True)
class Place:
    """One place of an answer.

    A ``prob`` is the model's own, the softmax of its logits at temperature 1, after the tokens of the mixed context
    before this place. A ``chance`` is that of being sampled, at the temperature of self tokens.
    """

    reference: int
    token: int  # of the mixed context
    is_self: bool
    settled: int | None  # the pass after which no token up to here could change any more; None where no pass was made
    reference_prob: float
    token_prob: float
    reference_chance: float
    token_chance: float
    likeliest: int
    likeliest_prob: float
    loss: float  # nats: of the reference token after the mixed context
    reference_loss: float  # the same after the reference tokens before it

    @property
    def differs(self) -> bool:
        return self.token != self.reference


@dataclass(frozen=True)
class InspectedRow:
    """One row: the ``places`` of its reference answer, and the ``answer`` that the model gives running freely.

    ``first_slip`` is the first place where that is another token than the reference, None if there is none as far as
    both go. ``finished`` tells whether the answer ended by itself.
    """

    sample_id: int
    prompt: list[int]
    places: list[Place]
    answer: list[int]
    finished: bool
    first_slip: int | None

    @property
    def reference(self) -> list[int]:
        return [place.reference for place in self.places]

    @property
    def self_tokens(self) -> int:
        return sum(place.is_self for place in self.places)

    @property
    def differing(self) -> int:
        return sum(place.differs for place in self.places)

    @property
    def passes(self) -> int | None:
        """The pass that settled the last token; None where the context was made token by token."""
        return self.places[-1].settled

    @property
    def steps(self) -> int:
        """Steps of a loop that makes the context token by token."""
        return len(self.places)

    @property
    def loss(self) -> float:
        """Nats per token, under the mixed context."""
        return math.fsum(place.loss for place in self.places) / len(self.places)

    @property
    def reference_loss(self) -> float:
        """Nats per token, under the reference."""
        return math.fsum(place.reference_loss for place in self.places) / len(self.places)


def first_slip(answer: Sequence[int], reference: Sequence[int]) -> int | None:
    """The first place where the tokens of an answer are not those of the reference; None if there is none in both."""
    both = zip(answer, reference, strict=False)
    return next((place for place, (own, given) in enumerate(both) if own != given), None)


def inspect_rows(
    generator: ContextGenerator,
    rows: Sequence[dict[str, Any]],
    self_prob: float,
    *,
    answering: ContextGenerator | None = None,
    seed: int = 0,
    method: Method = "fixed_point",
    max_new_tokens: int = 256,
    eos_token_ids: Sequence[int] | None = None,
    batch_size: int = 8,
) -> list[InspectedRow]:
    """What contexts of some rows look like, and what the model answers by itself.

    Args:
        generator: of the model, with the temperature and the masks of self tokens.
        rows: tokenized, with ``sample_id``, ``prompt_ids`` and ``answer_ids``.
        self_prob: probability of a self token, in [0, 1].
        answering: what answers: a generator of the same model. By default it is greedy.
        seed: of contexts and answers.
        method: of the contexts. With "sequential" there are no passes to tell of.
        max_new_tokens, eos_token_ids: of the answers, as in ``ContextGenerator.answer``.
        batch_size: rows whose contexts are made at once, and so share their passes.

    Example:
        >>> rows = inspect_rows(ContextGenerator(model, temperature=0.7), tokenized, 0.25)
        >>> rows[0].differing, rows[0].passes, rows[0].first_slip
    """
    check_columns(rows)
    ids = [row["sample_id"] for row in rows]
    answers = (answering or greedy_of(generator)).answer(
        [row["prompt_ids"] for row in rows],
        max_new_tokens=max_new_tokens,
        seed=seed,
        sample_ids=ids,
        eos_token_ids=eos_token_ids,
    )
    places: list[list[Place]] = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        mixed = generator.contexts(
            [row["prompt_ids"] for row in rows[part]],
            [row["answer_ids"] for row in rows[part]],
            self_prob,
            seed=seed,
            sample_ids=ids[part],
            method=method,
            record_settling=method == "fixed_point",
        )
        settled: list[Any] = mixed.settled or [None] * len(mixed.tokens)
        for row, *made in zip(rows[part], mixed.tokens, mixed.is_self, settled, strict=True):
            places.append(_places(generator, row, *made))
    return [
        InspectedRow(
            sample_id=int(row["sample_id"]),
            prompt=list(row["prompt_ids"]),
            places=of_row,
            answer=(own := answer.tolist()),
            finished=finished,
            first_slip=first_slip(own, row["answer_ids"]),
        )
        for row, of_row, answer, finished in zip(rows, places, answers.tokens, answers.finished, strict=True)
    ]


def _places(
    generator: ContextGenerator, row: dict[str, Any], tokens: Tensor, is_self: Tensor, settled: Tensor | None
) -> list[Place]:
    """The places of one row, whose context is ``tokens`` [T]."""
    scores, reference = _scores(generator, row, tokens)
    log_probs = scores.log_softmax(-1)  # [T, V]
    likeliest = log_probs.max(-1)

    def of(values: Tensor, ids: Tensor) -> list[float]:
        return values.gather(-1, ids[:, None])[:, 0].tolist()

    chances = _chances(scores, generator.temperature)
    losses = of(-log_probs, reference)
    plain, _ = _scores(generator, row, reference)
    columns = (
        reference.tolist(),
        tokens.tolist(),
        is_self.tolist(),
        [None] * len(tokens) if settled is None else settled.tolist(),
        of(log_probs.exp(), reference),
        of(log_probs.exp(), tokens),
        of(chances, reference),
        of(chances, tokens),
        likeliest.indices.tolist(),
        likeliest.values.exp().tolist(),
        losses,
        of(-plain.log_softmax(-1), reference),
    )
    return [Place(*values) for values in zip(*columns, strict=True)]


def _scores(generator: ContextGenerator, row: dict[str, Any], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [T, V] of the ids that there are, with ``tokens`` [T] as input, and the reference [T]."""
    logits, reference, _ = answer_logits(generator, [row], [tokens])
    return logits[:, : generator.vocab_size].float(), reference


def _chances(scores: Tensor, temperature: float) -> Tensor:
    """How likely each id is sampled, [T, V]."""
    if temperature:
        return (scores / temperature).softmax(-1)
    return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
