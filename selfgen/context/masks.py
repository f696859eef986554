"""Which positions of an answer hold self tokens: single ones, spans, a prefix or all, and where there are more of them.

A mask is drawn before any forward, from the coins of ``selfgen_kernels.self_mask``: a pure function of (seed, sample
id, position). Only confidence has to wait for the model (``min_reference_prob``); it takes positions away, never adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from selfgen_kernels import self_mask

Granularity = Literal["token", "span", "prefix", "sequence"]
GRANULARITIES = ("token", "span", "prefix", "sequence")
Curve = Callable[[Tensor, Tensor], Tensor]
"""(self-probabilities [S], places in their answers [S], from 0 to 1) -> self-probabilities [S]"""


def flat(self_prob: Tensor, place: Tensor) -> Tensor:
    """The same at every position."""
    return self_prob


def rising(self_prob: Tensor, place: Tensor) -> Tensor:
    """A straight line over the answer, as steep as probabilities allow; its mean is ``self_prob``."""
    return self_prob + torch.minimum(self_prob, 1 - self_prob) * (2 * place - 1)


def falling(self_prob: Tensor, place: Tensor) -> Tensor:
    """The mirror of ``rising``: more self tokens at the beginning; its mean is ``self_prob``, too."""
    return self_prob + torch.minimum(self_prob, 1 - self_prob) * (1 - 2 * place)


CURVES: dict[str, Curve] = {"flat": flat, "rising": rising, "falling": falling}


def check_probability(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is in [0, 1]."""
    if not 0.0 <= value <= 1.0:  # NaN is not, either
        raise ValueError(f"{name} is {value}; a probability must be in [0, 1]")


@dataclass(frozen=True)
class Masks:
    """How the positions of self tokens are drawn.

    Args:
        granularity: "token", a coin per token (scheduled sampling, Bengio et al. 2015, arXiv 1506.03099); "span", runs
            of self tokens of geometric length; "prefix", self tokens up to a switch place and the reference after it;
            "sequence", a coin per answer (GKD's lambda, Agarwal et al. 2023, arXiv 2306.13649, for each row).
        span_length: mean number of tokens per span, at least 1. Single tokens already make runs of 1 / (1 - p) tokens
            on average; a ``span_length`` below that has no effect. The share of self tokens is p in any case.
        curve: of the probability over an answer, "flat", "rising", "falling", or a function (see `Curve`). None is
            "falling" with "prefix", and "flat" else. Not with "sequence". With "prefix" it must fall: the prefix of a
            row has the places whose probability is above one uniform number of the row, so that with "falling" and a
            probability of 1/2 each switch place is as likely as any other.
        min_reference_prob: a token is a self token only where the model gives the reference at least this
            probability, in [0, 1], at temperature 1 and under the context so far (confidence-aware scheduled sampling,
            Liu et al. 2021, arXiv 2107.10427). 0 means no condition. Not with "prefix".

    Raises:
        ValueError: an argument out of range.
    """

    granularity: Granularity = "token"
    span_length: float = 8.0
    curve: str | Curve | None = None
    min_reference_prob: float = 0.0

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity is {self.granularity!r}; accepted: {', '.join(GRANULARITIES)}")
        if not 1.0 <= self.span_length < float("inf"):
            raise ValueError(f"span_length is {self.span_length}; it must be a finite number >= 1")
        if self.curve is None:
            object.__setattr__(self, "curve", "falling" if self.granularity == "prefix" else "flat")
        if not callable(self.curve) and self.curve not in CURVES:
            raise ValueError(f"curve is {self.curve!r}; accepted: {', '.join(CURVES)}, or a function")
        if self.granularity == "sequence" and self.curve != "flat":
            raise ValueError(
                'a curve needs granularity="token", "span" or "prefix": granularity="sequence" draws once for the '
                "whole answer"
            )
        if self.granularity == "prefix" and self.curve == "rising":
            raise ValueError(
                'curve is "rising", but the self tokens of granularity="prefix" are the first ones of an answer: give '
                '"falling", or a function that does not rise'
            )
        if self.granularity == "prefix" and self.curve == "flat":
            raise ValueError(
                'curve is "flat", which makes granularity="prefix" a coin per answer: give granularity="sequence" for '
                'that, or the curve "falling"'
            )
        check_probability("min_reference_prob", self.min_reference_prob)
        if self.granularity == "prefix" and self.min_reference_prob:
            raise ValueError(
                f"min_reference_prob is {self.min_reference_prob}, which would leave gaps in the self tokens of "
                'granularity="prefix": leave it out, or give granularity="token" or "span"'
            )

    def describe(self) -> dict[str, Any]:
        """How masks are drawn, in words and numbers, for the provenance of contexts."""
        curve = self.curve if isinstance(self.curve, str) else getattr(self.curve, "__qualname__", repr(self.curve))
        return asdict(self) | {"curve": curve}

    def draw(self, seed: int, sample_ids: Tensor, lengths: list[int], self_prob: Tensor) -> list[Tensor]:
        """Bool [T_i] for each of R answers of ``lengths`` T_i, whose ids and probabilities are [R]."""
        device = sample_ids.device
        repeats = torch.tensor(lengths, device=device)  # [R]
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])  # [S]
        ids, prob = sample_ids.repeat_interleave(repeats), self_prob.repeat_interleave(repeats)  # [S]
        place = (positions + 0.5) / repeats.repeat_interleave(repeats)  # [S]
        curve = self.curve if callable(self.curve) else CURVES[str(self.curve)]
        prob = curve(prob, place).clamp(0.0, 1.0)
        if self.granularity == "prefix" and callable(self.curve):
            _check_falls(prob, positions)
        if self.granularity in ("prefix", "sequence"):  # one uniform number per row
            mask = self_mask(seed, ids, torch.zeros_like(positions), prob)
        elif self.granularity == "span":
            mask = self._spans(seed, ids, positions, prob)
        else:
            mask = self_mask(seed, ids, positions, prob)
        return list(torch.split(mask, lengths))

    def _spans(self, seed: int, ids: Tensor, positions: Tensor, prob: Tensor) -> Tensor:
        """A Markov chain with two states: a self token is followed by another with the chance ``stay``, a reference
        token with the chance ``enter``, by which the share of self tokens at each position is ``prob``.

        One uniform number per position decides, and ``enter`` <= ``stay``: below ``enter`` the position is self, from
        ``stay`` on it is not, and between them it is what the one before it is. So a position is what the last decided
        one is.
        """
        first = positions == 0
        before = torch.where(first, prob, prob.roll(1))  # of the position before
        stay = prob.clamp(min=1 - 1 / self.span_length).minimum(torch.where(before > 0, prob / before, 1.0))
        enter = torch.where(before < 1, (prob - before * stay) / (1 - before), stay).minimum(stay).clamp(min=0.0)
        enter, stay = (torch.where(first, prob, chance) for chance in (enter, stay))
        on, holds = (self_mask(seed, ids, positions, chance) for chance in (enter, stay))  # the same uniform numbers
        decided = on | ~holds | first
        places = torch.arange(len(positions), device=positions.device)
        return on[torch.where(decided, places, 0).cummax(0).values]


def _check_falls(prob: Tensor, positions: Tensor) -> None:
    """Raise ValueError if a curve [S] rises within a row, whose ``positions`` begin at 0."""
    rises = ~(prob[1:] <= prob[:-1]) & (positions[1:] > 0)  # NaN rises, too
    if rises.any():
        at = int(rises.nonzero()[0, 0])
        raise ValueError(
            f"the curve rises from {float(prob[at])} at token {int(positions[at])} of an answer to "
            f'{float(prob[at + 1])} at the next one, but the self tokens of granularity="prefix" are the first ones: '
            'give a function that does not rise, or granularity="token" or "span"'
        )
