"""What a model loses when it runs freely: tokens right under references, minus those right after its own tokens.

Token by token, a greedy answer is compared with the reference at the same place. Under references each token is the
model's guess after reference tokens alone, as in teacher forcing; running freely it comes after its own. Where there is
no difference between the two, the model has nothing to learn from its own tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from ..context import ContextGenerator
from ..context.generator import Method
from ..data.streams import refuse_stream
from .answers import Share
from .losses import answer_logits, check_columns

LITTLE = 2.0
"""Points; a gap that is smaller is little to win."""
UNTAUGHT = 10.0
"""Points; a model with fewer tokens right under references has hardly anything to lose yet."""
FEWEST = 10
"""Rows; of fewer, an interval by resampling says nothing."""
SELF_PROB = 0.5
"""What is multiplied by the share of self tokens that differ, in training as it is by default."""
SELF_TEMPERATURE = 0.7
"""Of self tokens, in training as it is by default."""
_RESAMPLES, _AT_ONCE = 2000, 100


def row_gaps(
    generator: ContextGenerator,
    rows: Sequence[dict[str, Any]],
    *,
    greedy: ContextGenerator | None = None,
    self_prob: float = 0.25,
    seed: int = 0,
    method: Method = "fixed_point",
    eos_token_ids: Sequence[int] | None = None,
    batch_size: int = 8,
    answer_batch_size: int = 32,
) -> list[dict[str, int]]:
    """What is counted of each row: its answer's ``tokens``, how many of them are right, and how self tokens do.

    ``right_under_references`` and ``right_running_freely`` count greedy tokens that equal the reference at the same
    place; an answer has none after its end. ``self_tokens`` are those of a context that is mixed with ``self_prob`` as
    in training, and ``self_tokens_right`` those of them that equal the reference.

    Args:
        generator: of the model, with the temperature of self tokens (SELF_TEMPERATURE in training by default).
        rows: tokenized, with ``sample_id``, ``prompt_ids`` and ``answer_ids``.
        greedy: what answers: a generator of the same model, with temperature 0. By default one is made for this call.
        seed, method: of the contexts.
        eos_token_ids: an answer ends with the first of these; by default those of the model.
        batch_size, answer_batch_size: rows at a time, of forwards and of answers.
    """
    check_columns(rows)
    answers = (
        (greedy or greedy_of(generator))
        .answer(
            [row["prompt_ids"] for row in rows],
            max_new_tokens=max((len(row["answer_ids"]) for row in rows), default=1),
            sample_ids=[row["sample_id"] for row in rows],
            eos_token_ids=eos_token_ids,
            batch_size=answer_batch_size,
        )
        .tokens
    )
    counted: list[dict[str, int]] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        prompts, references, ids = ([row[name] for row in part] for name in ("prompt_ids", "answer_ids", "sample_id"))
        mixed = generator.contexts(prompts, references, self_prob, seed=seed, sample_ids=ids, method=method)
        guessed = _right_under_references(generator, part)
        for index, reference in enumerate(references):
            free = answers[start + index].tolist()
            is_self, context = mixed.is_self[index].tolist(), mixed.tokens[index].tolist()
            same = [a == b for a, b in zip(context, reference, strict=True)]
            counted.append(
                {
                    "sample_id": int(ids[index]),
                    "tokens": len(reference),
                    "right_under_references": int(guessed[index].sum()),
                    "right_running_freely": sum(a == b for a, b in zip(free, reference, strict=False)),
                    "self_tokens": sum(is_self),
                    "self_tokens_right": sum(own and right for own, right in zip(is_self, same, strict=True)),
                }
            )
    return counted


def greedy_of(generator: ContextGenerator) -> ContextGenerator:
    """A generator like another one, with temperature 0."""
    greedy = copy.copy(generator)
    greedy.temperature = 0.0
    return greedy


def _right_under_references(generator: ContextGenerator, rows: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Whether the likeliest token after the reference tokens before it is the reference, bool [T_i] per row."""
    logits, labels, lengths = answer_logits(generator, rows, [row["answer_ids"] for row in rows])
    best = logits[:, : generator.vocab_size].max(-1)
    return list(((best.indices == labels) & best.values.isfinite()).cpu().split(lengths))


@dataclass(frozen=True, eq=False)
class Gap:
    """Counts of rows, [R] int64 each, and what follows from them; ``after_bss`` if the model was trained with BSS."""

    tokens: np.ndarray
    under_references: np.ndarray
    running_freely: np.ndarray
    self_tokens: int
    self_tokens_right: int
    after_bss: bool = False

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]], after_bss: bool = False) -> Gap:
        """From what `row_gaps` has counted, of at least one row."""
        lines = list(lines)
        if not lines:
            raise ValueError("there are no rows to evaluate on; give at least one")
        names = ("tokens", "right_under_references", "right_running_freely")
        tokens, under, freely = (np.array([line[name] for line in lines], dtype=np.int64) for name in names)
        own, right = (sum(line[name] for line in lines) for name in ("self_tokens", "self_tokens_right"))
        return cls(tokens, under, freely, own, right, after_bss)

    @property
    def points(self) -> float:
        """Token accuracy under references minus that running freely, in percentage points."""
        return 100.0 * float((self.under_references - self.running_freely).sum() / self.tokens.sum())

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95% interval of ``points``, by resampling rows (Efron 1979); the same whenever it is asked for."""
        drawing, lost = np.random.default_rng(0), self.under_references - self.running_freely
        found = []
        for _ in range(_RESAMPLES // _AT_ONCE):
            drawn = drawing.integers(len(lost), size=(_AT_ONCE, len(lost)))
            found.append(lost[drawn].sum(1) / self.tokens[drawn].sum(1))
        low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
        return 100.0 * float(low), 100.0 * float(high)

    @property
    def whole_answers(self) -> Share:
        """Answers that equal the reference token by token: running freely as under references, so they have no gap."""
        return Share(int((self.running_freely == self.tokens).sum()), len(self.tokens))

    @property
    def agreement(self) -> float | None:
        """Self tokens that equal the reference, as a share of all; None if there are none."""
        return self.self_tokens_right / self.self_tokens if self.self_tokens else None

    @property
    def self_prob(self) -> float | None:
        """The self-probability of training as it is by default, at this agreement; None where that is not known."""
        return None if self.agreement is None else SELF_PROB * (1.0 - self.agreement)

    @property
    def is_known(self) -> bool:
        """Whether there are enough rows to tell whether there is something to win."""
        low, high = self.interval
        return len(self.tokens) >= FEWEST and not (low <= 0.0 and high >= LITTLE)

    @property
    def advice(self) -> str:
        """The gap and what to do, in one sentence."""
        accuracies = [float(right.sum() / self.tokens.sum()) for right in (self.under_references, self.running_freely)]
        low, high = self.interval
        said, between = "loses", (low, high)
        if round(self.points, 1) < 0:
            said, between = "gains", (-high, -low)
        rows = "1 row" if len(self.tokens) == 1 else f"{len(self.tokens)} rows"
        found = (
            f"your model {said} {abs(self.points):.1f} points when it runs freely ({accuracies[0]:.1%} of tokens right "
            f"under references, {accuracies[1]:.1%} running freely; 95% interval {_tenths(between[0])} to "
            f"{_tenths(between[1])}, {rows})"
        )
        if not self.is_known:
            return f"{found}: these are too few rows to tell, so give more (--gap-rows, or more data)"
        if self.points < LITTLE and 100 * accuracies[0] < UNTAUGHT:
            return (
                f"{found}: the model knows too little of these answers to lose any, so measure one that is trained on "
                "such rows"
            )
        if self.points < LITTLE:
            return f"{found}: BSS has little {'left ' if self.after_bss else ''}to win"
        if self.after_bss:
            return f"{found} after training with BSS: compare with the same training with --self-prob 0 --lean-loss"
        said = f"{found}: try training with BSS as it is by default, and compare with --self-prob 0 --lean-loss"
        if self.self_prob is None:
            return said
        differing = 1 - (self.agreement or 0)
        share = f"{differing:.0%}" if differing >= 0.01 else f"only {differing:.1%}"
        return f"{said} ({share} of its self tokens differ from the reference, so p would be {self.self_prob:.2g})"

    def to_dict(self) -> dict[str, Any]:
        total = int(self.tokens.sum())
        advises = self.is_known and self.points >= LITTLE and not self.after_bss
        return {
            "points": self.points,
            "interval": list(self.interval),
            "under_references": int(self.under_references.sum()) / total,
            "running_freely": int(self.running_freely.sum()) / total,
            "rows": len(self.tokens),
            "tokens": total,
            "whole_answers": self.whole_answers.to_dict(),
            "agreement": self.agreement,
            "self_tokens": self.self_tokens,
            "advised_self_prob": self.self_prob if advises else None,
            "after_bss": self.after_bss,
            "advice": self.advice,
        }


def _tenths(points: float) -> str:
    """Without the sign of a number that rounds to 0."""
    return f"{round(points, 1) + 0.0:.1f}"


def free_running_gap(
    generator: ContextGenerator, rows: Dataset, *, chunk_rows: int = 32, progress: bool = True, **options: Any
) -> Gap:
    """The gap of tokenized rows (columns of ``tokenize_rows``); ``options`` are those of `row_gaps`.

    Example:
        >>> gap = free_running_gap(ContextGenerator(model, temperature=SELF_TEMPERATURE), rows)
        >>> print(gap.points, gap.interval, gap.advice)
    """
    refuse_stream(rows, "the gap")
    lines: list[dict[str, int]] = []
    options.setdefault("greedy", greedy_of(generator))  # one for all chunks
    for start in tqdm(range(0, len(rows), chunk_rows), desc="Gap", disable=not progress or None, leave=False):
        part = [rows[i] for i in range(start, min(start + chunk_rows, len(rows)))]
        lines += row_gaps(generator, part, **options)
    return Gap.of(lines)
