"""What the terminal and the page say of rows, and how they write numbers."""

from __future__ import annotations

import math

from .records import InspectedRow, Place
from .token_texts import TokenTexts


def kind_of(place: Place) -> str:
    """ "" of a reference token, "agree" or "differ" of a self token."""
    return ("differ" if place.differs else "agree") if place.is_self else ""


def slip_told(row: InspectedRow, texts: TokenTexts) -> str:
    """The first slip in a sentence, and whether the answer ended."""
    ended = "" if row.finished else f" It was broken off after {len(row.answer)} tokens."
    if row.first_slip is None:
        if row.answer == row.reference:
            return f"The free-running answer is the reference, token by token.{ended}"
        both = min(len(row.answer), len(row.places))
        return f"The free-running answer has no slip in the {both} tokens that both have.{ended}"
    own, given = (texts.of(ids[row.first_slip]).text for ids in (row.answer, row.reference))
    at = row.first_slip + 1
    return f"The free-running answer slips first at token {at}: “{own}”, where the reference has “{given}”.{ended}"


def share(part: int, whole: int, form: str = "{}") -> str:
    """A share in percent, written into ``form``; "" of nothing."""
    return form.format(f"{part / whole:.0%}") if whole else ""


def number(value: float) -> str:
    """Three significant digits."""
    return "not a number" if math.isnan(value) else "infinite" if math.isinf(value) else f"{value:.3g}"
