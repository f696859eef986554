"""Whether what a row gave is found in what a template made of it."""

import html
import json
import re
from collections.abc import Iterator, Sequence

# <think>, [/THINK]: templates write them in ways of their own
_TAG = re.compile(r"<[/|]*(?:think|thinking|thought|reasoning)\|?>|\[/?THINK\]", re.IGNORECASE)
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
        spans = _spans(text, piece)
        if spans is None:
            return what, piece
        ends = [0, *(end for _, end in spans)]
        kept = [text[end:start] for end, (start, _) in zip(ends, spans, strict=False)]
        text = _TAKEN.join([*kept, text[ends[-1] :]])
    return None


def end_of(text: str, given: Sequence[tuple[str, str]]) -> int:
    """The place in ``text`` after the last of the ``given`` that is in it."""
    end = 0
    for _, piece in given:
        spans = _spans(text, piece, end)
        end = spans[-1][1] if spans else end
    return end


def _spans(text: str, piece: str, start: int = 0) -> list[tuple[int, int]] | None:
    """The places (start, end) in ``text`` of a piece's parts, in order: of the whole if it is there, or of its lines."""
    for form in _forms(piece):
        place = text.find(form, start)
        if place >= 0:
            return [(place, place + len(form))]
    for parts in (_TAG.split(piece), piece.splitlines()):
        if len(parts) < 2:
            continue
        spans: list[tuple[int, int]] = []
        for part in filter(str.strip, parts):
            found = _spans(text, part, spans[-1][1] if spans else start)
            if found is None:
                break
            spans += found
        else:
            return spans
    return None


def _forms(piece: str) -> Iterator[str]:
    """How a text may be written."""
    piece = piece.strip()
    yield piece
    quoted = json.dumps(piece, ensure_ascii=False)[1:-1]
    yield quoted
    yield json.dumps(piece)[1:-1]
    yield json.dumps(quoted, ensure_ascii=False)[1:-1]  # arguments that are JSON text within JSON
    yield html.escape(piece)
    if piece in ("true", "false", "null"):  # of JSON, as Python writes them
        yield {"true": "True", "false": "False", "null": "None"}[piece]
