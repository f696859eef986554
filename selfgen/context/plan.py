"""Policy: which tokens the next pass computes.

A pass is a flat batch of tokens, as serving engines batch them: each unfinished row brings one *window* of consecutive
positions, and all windows together fill a *token budget*. What must be computed comes first: each row up to its next
unresolved self position. What is left of the budget goes to speculation: positions behind unresolved self positions,
whose K/V is final only if the guesses in between turn out right.

Positions here count from the first prompt token of a row.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import NamedTuple


class Window(NamedTuple):
    """Positions ``begin <= position < end`` of one row, computed in one pass."""

    row: int
    begin: int
    end: int


@dataclass
class RowProgress:
    """How far a row has come.

    ``final`` positions have K/V computed under the final context; the tokens at positions <= ``final`` are final too.
    ``sampled`` is the position behind the last self token that was sampled at least once.
    """

    self_positions: list[int]  # ascending
    final: int = 0
    sampled: int = 0

    @property
    def done(self) -> bool:
        return not self.self_positions or self.final >= self.self_positions[-1]

    def next_self(self, position: int) -> int:
        """The first self position behind ``position``, or ``position`` itself if there is none."""
        index = bisect_right(self.self_positions, position)
        return self.self_positions[index] if index < len(self.self_positions) else position

    def self_positions_in(self, begin: int, last: int) -> list[int]:
        """Self positions with ``begin <= position <= last``."""
        return self.self_positions[bisect_left(self.self_positions, begin) : bisect_right(self.self_positions, last)]


@dataclass
class AcceptanceRate:
    """Running estimate of how often a guessed self token turns out right; starts from a prior of some observations."""

    right: float
    seen: float

    @property
    def rate(self) -> float:
        return self.right / self.seen

    def observe(self, right: int, seen: int) -> None:
        self.right += right
        self.seen += seen


@dataclass
class Speculation:
    """Chance that a guess is right: at the first visit the guess is the reference, later the model's own last token.

    The priors count as ten observations, so both rates follow the data after a few passes.
    """

    first: AcceptanceRate = field(default_factory=lambda: AcceptanceRate(6.0, 10.0))
    revised: AcceptanceRate = field(default_factory=lambda: AcceptanceRate(7.0, 10.0))


def plan_pass(rows: list[RowProgress], token_budget: int, speculation: Speculation) -> list[Window]:
    """Fill a budget of ``token_budget`` >= 1 tokens; at least one token is planned while any row is unfinished.

    Rows that come first are served first, so under a small budget they finish first.
    """
    windows: dict[int, Window] = {}
    segments: list[tuple[float, int, int]] = []  # (-chance that the segment is final, row, where it begins)
    left = token_budget

    for index, row in enumerate(rows):
        if row.done or left == 0:
            continue
        end = min(row.next_self(row.final), row.final + left)
        windows[index] = Window(index, row.final, end)
        left -= end - row.final
        _push_segment(segments, rows, index, end, 1.0, speculation)

    while left and segments:
        chance, index, begin = heapq.heappop(segments)
        end = min(rows[index].next_self(begin), begin + left)
        windows[index] = windows[index]._replace(end=end)
        left -= end - begin
        _push_segment(segments, rows, index, end, -chance, speculation)
    return list(windows.values())


def _push_segment(
    segments: list[tuple[float, int, int]],
    rows: list[RowProgress],
    index: int,
    begin: int,
    chance: float,
    speculation: Speculation,
) -> None:
    """Offer the positions from the self position ``begin`` up to the one behind it, if the row still needs them."""
    row = rows[index]
    if row.next_self(begin) == begin:
        return
    chance *= (speculation.revised if begin < row.sampled else speculation.first).rate
    heapq.heappush(segments, (-chance, index, begin))
