"""Free-running answers compared with references: the number that answers a problem, and ROUGE for summaries."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

from .forms import NEXT_PROBLEM, boxes, first_problem, formula, letter, several, truth
from .numerals import Number, numbers, plain

_Z = NormalDist().inv_cdf(0.975)  # of a two-sided 95% interval

# Each of these ends where the number begins.
_BEFORE = r"[\s*_$\\({\[≈~=-]*"
_MARK = re.compile(r"#{4,}" + _BEFORE)
_SAID = re.compile(r"\banswer(?: is|[ *_]*[:=])" + _BEFORE, re.IGNORECASE)
_STEP = re.compile(
    r"(?:^[^\w\n]*|\(|\b(?:see|in|from|by|per|using|of) (?:the )?)"
    r"(?:step|part|equation|line|problem|question|example|section)s? (?:\(|#)?(?=[0-9])",
    re.IGNORECASE | re.MULTILINE,
)
_LISTED = re.compile(r"^[ \t>*_]*(?=([0-9]{1,3})[.)][ *_]+\S)", re.MULTILINE)
# In a formula: "x + 3", "x < 3", "x_3" and "3x".
_OF_TERM = re.compile(r"(?:[A-Za-z)}\]] ?[-+*/^_]|[<>]|\\(?:[lg]eq?|ne|sin|cos|tan|ln|log)) ?\Z")
_TERM = re.compile(r"[xyz](?![A-Za-z])|\^?\{?[xyz]\b|\(")
# "The answer is 2 + 3 = 5" and "The answer is 5, as 2 + 3 = 5" say it at their end.
_CALCULATES = re.compile(r" *[-+*/÷] *[0-9($]|(?:(?![.!?]\s)[^\n])*=")


def extract_answer(text: str) -> str | None:
    """The number that answers a problem, None if there is none.

    It is the first one after ``####``, else the last one in ``\\boxed{}``, else the last one of which the text says
    that the answer is it, else the last one; numbers of steps count only if there are no others. A next question and
    what follows it are not read. Equal values are written in one way, "1234.5" for "$1,234.50." and "0.5" for "1/2".

    Example:
        >>> extract_answer("She sells 16 - 7 = 9 eggs at $2.\\n#### $18.00")
        '18'
    """
    for part in NEXT_PROBLEM.split(plain(text)):
        if answer := _answer(part):
            return answer.written
    return None


def _answer(text: str) -> Number | None:
    """The number that answers, in a text of one problem."""
    found = list(numbers(text))
    labels = _labels(text)
    told = {number.begin: number for number in found if number.begin not in labels}
    for mark in _MARK.finditer(text):
        if mark.end() in told:
            return told[mark.end()]
    for begin, end in reversed(boxes(text)):
        if boxed := [number for number in found if begin <= number.begin < end]:
            return boxed[-1]
    for said in reversed(list(_SAID.finditer(text))):
        number = told.get(said.end())
        if number and not _CALCULATES.match(text, number.end):
            return number
    counted = list(told.values()) or found
    return counted[-1] if counted else None


def _labels(text: str) -> set[int]:
    """Where numbers begin that only count: "Step 2", "see equation (3)", and of lists with lines "1.", "2.", ..."""
    listed: list[int] = []
    for line in _LISTED.finditer(text):
        if int(line[1]) == len(listed) + 1:
            listed.append(line.end())
    return {step.end() for step in _STEP.finditer(text)}.union(listed if len(listed) > 1 else ())


def exact_match(answer: str, reference: str) -> bool:
    """Whether the answer says exactly what the reference says, as `compared` reads them."""
    found, expected = compared(answer, reference)
    if expected is None:
        return _as_words(answer) == _as_words(reference)
    return found == expected


def compared(answer: str, reference: str) -> tuple[str | None, str | None]:
    """What is compared in an answer and in its reference; both None where it is all of both texts.

    That is one number (`extract_answer`), unless the reference is something else after ``####``, in a box, after
    "the answer is" or as a whole: several numbers, the letter of a choice, yes or no, or a formula. Several numbers are
    compared in any order, but in the given one within round and square brackets; a formula as it is written. A box with
    several numbers or a formula is not one of its numbers.

    Example:
        >>> compared("It is one of 7 and 5.", "#### 5, 7")
        ('5, 7', '5, 7')
        >>> compared("The answer is (B), as 3 < 4.", "B")
        ('B', 'B')
    """
    for read in (several, letter, truth, formula):
        expected = read(reference, exactly=True)
        if expected is not None:
            return read(answer, exactly=False), expected
    expected = _boxed_besides(reference) or extract_answer(reference)
    if expected is None:
        return None, None
    return _boxed_besides(answer) or extract_answer(answer), expected


def _boxed_besides(text: str) -> str | None:
    """What the last box of a text says, without spaces and backslashes, if it is several numbers or a formula."""
    whole = plain(first_problem(text))
    if _MARK.search(whole) or not (found := boxes(whole)):
        return None
    said = whole[slice(*found[-1])].rpartition("=")[2]
    inside = list(numbers(said))
    is_formula = any(_OF_TERM.search(said[: number.begin]) or _TERM.match(said, number.end) for number in inside)
    return re.sub(r"[\s\\]", "", said) if is_formula or len(inside) > 1 else None


def _as_words(text: str) -> str:
    """Without what may differ at the ends of a sentence."""
    return " ".join(text.split()).rstrip(".!").casefold()


def rouge(answer: str, reference: str) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L with stemming (Lin 2004), in [0, 1], by the package ``rouge-score``.

    Its words are made of Latin letters and digits only.

    Raises:
        ImportError: the package is not installed.
    """
    scores = _scorer().score(reference, answer)
    return {name: score.fmeasure for name, score in scores.items()}


@cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(f"ROUGE needs rouge-score ({error}): pip install 'selfgen[eval]'") from error
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


@dataclass(frozen=True)
class Share:
    """``count`` of ``total``."""

    count: int
    total: int

    @property
    def value(self) -> float | None:
        """``count / total``; None if ``total`` is 0."""
        return self.count / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% confidence interval (Wilson 1927, Probable inference)."""
        if not self.total:
            return 0.0, 1.0
        share, spread = self.count / self.total, _Z**2 / self.total
        middle = share + spread / 2
        half = (spread * (share * (1 - share) + spread / 4)) ** 0.5
        return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))

    def to_dict(self) -> dict[str, Any]:
        return {"count": self.count, "total": self.total, "value": self.value, "interval": list(self.interval)}
