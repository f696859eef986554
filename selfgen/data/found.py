"""Whether what a row gave is found in what a template made of it."""

import html
import json
import re
from collections.abc import Iterator, Sequence

_TAG = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{1,40}\]")  # <think>, [/THINK]: templates write them in ways of their own
_TAKEN = "\0"


def first_lost(text: str, given: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """The first of the ``given`` (what it is, its text) that ``text`` does not have, or None.

    Each needs a place of its own. Blanks around it may be lost, and it may be escaped as in JSON or HTML, or written
    line by line.
    """
    place = 0
    for _, piece in given:  # in order, as nearly all templates write them
        piece = piece.strip()
        found = text.find(piece, place)
        if found < 0:
            break
        place = found + len(piece)
    else:
        return None
    for what, piece in sorted(given, key=lambda one: len(one[1]), reverse=True):  # short ones may be parts of long ones
        left = _take(text, piece)
        if left is None:
            return what, piece
        text = left
    return None


def end_of(text: str, given: Sequence[tuple[str, str]]) -> int:
    """The place in ``text`` after the last of the ``given`` that is in it."""
    end = 0
    for _, piece in given:
        for part in (piece, _TAG.split(piece)[-1], (piece.strip() or piece).splitlines()[-1]):
            found = next((text.find(form, end) + len(form) for form in _forms(part) if form in text[end:]), None)
            if found is not None and part.strip():
                end = found
                break
    return end


def _take(text: str, piece: str) -> str | None:
    """``text`` without ``piece``, or None if it is not there."""
    for form in _forms(piece):
        if form in text:
            return text.replace(form, _TAKEN, 1)
    for parts in (_TAG.split(piece), piece.splitlines()):
        if len(parts) < 2:
            continue
        left: str | None = text
        for part in filter(str.strip, parts):
            left = _take(left, part) if left is not None else None
        if left is not None:
            return left
    return None


def _forms(piece: str) -> Iterator[str]:
    """How a text may be written."""
    piece = piece.strip()
    yield piece
    yield json.dumps(piece, ensure_ascii=False)[1:-1]
    yield json.dumps(piece)[1:-1]
    yield html.escape(piece)
    if piece in ("true", "false", "null"):  # of JSON, as Python writes them
        yield {"true": "True", "false": "False", "null": "None"}[piece]
