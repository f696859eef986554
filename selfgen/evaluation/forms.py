"""What texts say that is no single number: several numbers, the letter of a choice, yes or no, formulas.

Each reader takes a text, and whether it must say nothing but that (``exactly``), as a reference does. It returns what
texts that say the same have in common, or None.
"""

from __future__ import annotations

import re
from itertools import pairwise

from .numerals import Number, numbers, plain, plain_powers

# What a model that does not stop goes on with.
NEXT_PROBLEM = re.compile(
    r"(?:^[^\w\n]{0,6}|(?<=[.!?]) +)(?:question|problem|q|user|human|instruction)[ *_]*:",
    re.IGNORECASE | re.MULTILINE,
)
_BOX = re.compile(r"\\(?:boxed|fbox) ?\{")
_BRACE = re.compile(r"\\[{}]|[{}]")
_MARKED = re.compile(r"#{4,}[ \t]*(\S[^\n]*)")
_SAID = re.compile(r"\banswer(?: is|[ *_]*[:=])[\s*_:]*(\S[^\n]*)", re.IGNORECASE)
_LONGEST = 10_000  # characters of what is looked through for formulas
_MATHS = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def first_problem(text: str) -> str:
    """All that is said of the first problem."""
    return next((part for part in NEXT_PROBLEM.split(text) if part.strip()), "")


def boxes(text: str) -> list[tuple[int, int]]:
    """Where what stands in each ``\\boxed{}`` begins and ends; boxes in a box are none."""
    begins = {box.end() for box in _BOX.finditer(text)}
    found: list[tuple[int, int]] = []
    opened: list[int] = []
    for brace in _BRACE.finditer(text) if begins else ():
        if brace[0] == "{":
            opened.append(brace.end())
        elif brace[0] == "}" and opened and (begin := opened.pop()) in begins:
            while found and found[-1][0] > begin:
                found.pop()
            found.append((begin, brace.start()))
    return found


def _told(text: str) -> str | None:
    """What a text marks as its answer: after ``####``, in the last box, or after "answer is": the rest of a line."""
    marked = _MARKED.search(text)
    within = marked[1] if marked else text
    if found := boxes(within):
        return within[slice(*found[-1])]
    if marked:
        return within
    said = list(_SAID.finditer(text))
    return said[-1][1] if said else None


def _bare(text: str) -> str:
    """From the first letter or digit to the last."""
    first, last = re.search(r"\w", text), re.search(r"\w", text[::-1])
    return text[first.start() : len(text) - last.start()] if first and last else ""


def _without_delimiters(text: str) -> str:
    whole = _MATHS.fullmatch(text.strip().rstrip("."))
    return next(filter(None, whole.groups())) if whole else text


# ---- Several numbers

_BETWEEN = re.compile(r"[\s$%°]*(?:[,;]\s*(?:(?:and|or)\b)?|-|\b(?:and|or|to)\b|&)\s*(?:[a-z]\s*=)?[\s$±-]*")
_WIDEST = 20  # characters between two numbers, and before the first
_BEFORE = re.compile(r"(?:(?<!\S)[a-z]\s*=\s*)?(\\?\{|[(\[])?[-\s$±]*\Z")
_AFTER = re.compile(r"[\s$%°]*(\\?\}|[)\]])?((?: ?[a-z]+\b){0,2}[\s$.]*\Z)?", re.IGNORECASE)  # and a unit


def several(text: str, *, exactly: bool) -> str | None:
    """Two or more numbers with nothing but commas, dashes, brackets, "and", "or" or "to" between them.

    Their order counts in round and square brackets.

    Example:
        >>> several("between 7 and 5", exactly=False), several("[5, 7)", exactly=True)
        ('5, 7', '[5, 7)')
    """
    whole = first_problem(plain(text))
    told = _told(whole)
    said = _without_delimiters(whole if told is None else told)
    found = list(numbers(said))
    if len(found) < 2:
        return None
    runs: list[list[Number]] = [[found[0]]]
    for before, number in pairwise(found):
        if number.begin - before.end <= _WIDEST and _BETWEEN.fullmatch(said, before.end, number.begin):
            runs[-1].append(number)
        else:
            runs.append([number])
    run = runs[-1 if told is None else 0]
    near = max(0, run[0].begin - _WIDEST)
    opening, closing = _BEFORE.search(said[near : run[0].begin]), _AFTER.match(said, run[-1].end)
    if len(run) < 2 or closing is None:
        return None
    if exactly and (len(runs) > 1 or opening is None or near + opening.start() or closing[2] is None):
        return None
    written = [number.written for number in run]
    brackets = ((opening and opening[1]) or "", closing[1] or "")
    if brackets[0] in ("(", "[") and brackets[1] in (")", "]"):
        return f"{brackets[0]}{', '.join(written)}{brackets[1]}"
    return ", ".join(sorted(written))


# ---- Choices

_ENDS = r"(?=[^\w\s']|\s*\n|\s*\Z|\s+(?:because|since|as|for|with)\b|\s+\()"  # what a word says
_LETTER_ALONE = re.compile(r"(?:(?:[Oo]ption|[Cc]hoice) ?\(?)?([A-Ja-j])")
_LETTER_FIRST = re.compile(r"\W*(?:(?:[Oo]ption|[Cc]hoice) ?)?\(?([B-HJ](?![\w'])|[AI]" + _ENDS + ")")
_LETTER_LISTED = re.compile(r"\W*([A-J])[).:]")
_LETTER_INSIDE = re.compile(r"\(([A-J])\)|\b(?:[Oo]ption|[Cc]hoice)(?: is)? ([A-J])\b")
_TRUTHS = "(yes|no|true|false)"
_TRUTH_ALONE = re.compile(_TRUTHS, re.IGNORECASE)
_TRUTH_FIRST = re.compile(rf"\W*{_TRUTHS}{_ENDS}", re.IGNORECASE)
_TRUTH_LAST = re.compile(rf"(?<!not )(?<!n't )\b{_TRUTHS}\W{{0,9}}\Z", re.IGNORECASE)


def letter(text: str, *, exactly: bool) -> str | None:
    """The letter of one of up to ten choices, as in "B", "(b)" and "The answer is B, as ..."."""
    whole = first_problem(plain(text))
    told = _told(whole)
    if alone := _LETTER_ALONE.fullmatch(_bare(whole if told is None else told)):
        return alone[1].upper() if not exactly or alone[1].isupper() else None
    if exactly:
        return None
    if found := _LETTER_LISTED.match(whole) if told is None else _LETTER_FIRST.match(told):
        return found[1]
    inside = _LETTER_INSIDE.findall(whole)
    return "".join(inside[-1]) if inside else None


def truth(text: str, *, exactly: bool) -> str | None:
    """Yes, no, true or false: where the text says that this is the answer, or in its first or last word."""
    whole = first_problem(plain(text))
    told = _told(whole)
    said = whole if told is None else told
    if exactly:
        found = _TRUTH_ALONE.fullmatch(_bare(said))
    else:
        found = _TRUTH_FIRST.match(said) or _TRUTH_LAST.search(whole[-20:])
    return found[1].lower() if found else None


# ---- Formulas

_FORMULA = re.compile(r"[A-Za-z\\√π∞]")
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|log|ln|exp|min|max)\b)[A-Za-z]{2,}")
_OF_NUMBER = re.compile(  # what may stand around a number that is all: x = $5 km^2
    r"\s*(?:[A-Za-z]\w{0,2}\s*=)?[-+\s$±(]*", re.ASCII
)
_UNIT = re.compile(r"[\s$%°).,]*(?:\^? ?\{?\\circ\}?)?(?:[\s/]*\b[A-Za-z]+\b)*[\s$).,]*", re.ASCII)
_ALIKE = [
    (re.compile(pattern), one)
    for pattern, one in (
        (r"\\(?:text|mathrm|mathbf|textbf|mbox) ?\{([^{}]*)\}", r"\1"),
        (r"\\(?:left|right|displaystyle)(?![a-z])|\\[!,;: $%]|\s", ""),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\(?:cdot|times)(?![a-z])|·|×|⋅", "*"),
        (r"\\(le|ge|ne)q(?![a-z])", r"\\\1"),
        (r"−|–", "-"),
        (r"π", r"\\pi"),
        (r"∞", r"\\infty"),
        (r"√", r"\\sqrt"),
        (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
        (r"(?<![a-z])\{(\w)\}", r"\1"),
        (r"\\sqrt\{(\w)\}", r"\\sqrt\1"),
        (r"^[A-Za-z](?:\([a-z]\))?=", ""),
    )
]


def formula(text: str, *, exactly: bool) -> str | None:
    """A formula as it is written, but for spaces and for signs that mean the same; nothing is computed.

    A text that is not marked as an answer is one only as a whole between dollar signs or LaTeX's brackets.
    """
    whole = first_problem(text)
    told = _told(whole)
    said = whole if told is None else told
    if exactly:
        inner = _without_delimiters(said[:_LONGEST])
        if told is None and inner == said:
            return None
        if not _FORMULA.search(plain(inner)) or _WORD.search(plain(inner)) or _is_number(plain(inner)):
            return None
    else:
        spans = list(_MATHS.finditer(said[-_LONGEST:] if told is None else said[:_LONGEST]))
        inner = next(filter(None, spans[-1 if told is None else 0].groups())) if spans else said.strip()
    inner = plain_powers(inner).strip(" \t\n$*_").rstrip(".")
    for pattern, one in _ALIKE:
        inner = pattern.sub(one, inner)
    return inner or None


def _is_number(text: str) -> bool:
    """Whether a plain text is one number, perhaps with a unit."""
    found = list(numbers(text))
    if len(found) != 1:
        return False
    (number,) = found
    return bool(_OF_NUMBER.fullmatch(text, 0, number.begin) and _UNIT.fullmatch(text, number.end))
