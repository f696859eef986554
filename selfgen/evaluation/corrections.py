"""Self-correction (RAC, arXiv 2410.14655): what becomes of right and of wrong answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .answers import Share


@dataclass(frozen=True)
class Corrections:
    """Rows by whether the first and the corrected answer are right."""

    wrong_to_right: int
    right_to_wrong: int
    stayed_right: int
    stayed_wrong: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[bool, bool]]) -> Corrections:
        """From (first answer is right, corrected answer is right) of each row."""
        counts = Counter(pairs)
        return cls(
            wrong_to_right=counts[False, True],
            right_to_wrong=counts[True, False],
            stayed_right=counts[True, True],
            stayed_wrong=counts[False, False],
        )

    @property
    def shares(self) -> dict[str, Share]:
        """The accuracies ``before`` and ``after`` are of all rows, the others of those that began right, or wrong."""
        right, wrong = self.stayed_right + self.right_to_wrong, self.stayed_wrong + self.wrong_to_right
        return {
            "before": Share(right, right + wrong),
            "after": Share(self.stayed_right + self.wrong_to_right, right + wrong),
            "wrong_to_right": Share(self.wrong_to_right, wrong),
            "right_to_wrong": Share(self.right_to_wrong, right),
            "stayed_right": Share(self.stayed_right, right),
            "stayed_wrong": Share(self.stayed_wrong, wrong),
        }

    @property
    def of_all(self) -> dict[str, float]:
        """Shares of all rows, of which ``corrected_right`` is ``first_right + wrong_to_right - right_to_wrong``."""
        counts = {
            "first_right": self.stayed_right + self.right_to_wrong,
            "corrected_right": self.stayed_right + self.wrong_to_right,
            "wrong_to_right": self.wrong_to_right,
            "right_to_wrong": self.right_to_wrong,
        }
        rows = counts["first_right"] + self.wrong_to_right + self.stayed_wrong
        return {name: count / max(1, rows) for name, count in counts.items()}

    def to_dict(self) -> dict[str, Any]:
        return {name: share.to_dict() for name, share in self.shares.items()}
