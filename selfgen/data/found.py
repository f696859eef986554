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
    if _in_order(text, given) is not None:
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
    """The place in ``text`` after all of the ``given``, in their order; 0 if it does not have them."""
    return _in_order(text, given) or 0


def _in_order(text: str, given: Sequence[tuple[str, str]]) -> int | None:
    end = 0
    for _, piece in given:
        spans = _spans(text, piece, end)
        if spans is None:
            return None
        end = spans[-1][1] if spans else end
    return end


def _spans(text: str, piece: str, start: int = 0) -> list[tuple[int, int]] | None:
    """The places (start, end) in ``text`` of a piece, or of its parts around tags, in order."""
    if span := _span(text, piece, start):
        return [span]
    parts = _TAG.split(piece)
    spans: list[tuple[int, int]] = []
    for part in filter(str.strip, parts):
        span = _span(text, part, spans[-1][1] if spans else start)
        if span is None or len(parts) == 1:
            return None
        spans.append(span)
    return spans


def _span(text: str, piece: str, start: int) -> tuple[int, int] | None:
    """The place of a piece, in one of its forms, or with something before each of its lines."""
    for form in _forms(piece):
        place = text.find(form, start)
        if place >= 0:
            return place, place + len(form)
    *before, last = (line.rstrip() for line in piece.strip().splitlines())
    if not before or before[0] not in text:
        return None
    written = text[start:].splitlines(keepends=True)
    for number in range(len(written) - len(before)):
        end = written[number + len(before)].find(last)
        if end >= 0 and all(_ends_with(written[number + n], line) for n, line in enumerate(before)):
            first, length = sum(map(len, written[:number])), sum(map(len, written[number : number + len(before)]))
            return start + first + written[number].rindex(before[0]), start + first + length + end + len(last)
    return None


def _ends_with(written: str, line: str) -> bool:
    """Whether a line has another one, with its indentation, at its end; blank lines are blank."""
    written = written.rstrip()
    return written.endswith(line) and bool(line) == bool(written)


def _forms(piece: str) -> Iterator[str]:
    """How a text may be written."""
    piece = piece.strip()
    yield piece
    quoted = json.dumps(piece, ensure_ascii=False)[1:-1]
    yield quoted
    yield json.dumps(piece)[1:-1]
    yield json.dumps(quoted, ensure_ascii=False)[1:-1]  # arguments that are JSON text within JSON
    yield html.escape(piece)
    yield html.escape(piece).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")  # as Jinja does
    if piece in ("true", "false", "null"):  # of JSON, as Python writes them
        yield {"true": "True", "false": "False", "null": "None"}[piece]
