"""Free-running answers compared with references: the number at the end, as GSM8K is scored, and ROUGE for summaries."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

_Z = NormalDist().inv_cdf(0.975)  # of a two-sided 95% interval

# A minus after a letter, a digit, a bracket or a percent sign subtracts. A whole part may be missing, as in ".5", but
# dots in a row are an ellipsis. Groups of three digits, or of two before the last, are one number: 1,234 and 1,00,000.
_NUMBER = (
    r"(?P<sign>(?<![\w)\]%])[-−]\$?)?"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])|[0-9]+|(?<![\w.])(?=\.[0-9]))"
    r"(?:\.(?P<fraction>[0-9]+))?"
)
_ANYWHERE = re.compile(_NUMBER)
_MARKED = re.compile(r"####[\s*$\\]*" + _NUMBER)


def extract_answer(text: str) -> str | None:
    """The number that answers a problem: after the first ``####``, else the last one in the text, else None.

    Numbers are written in one way, "1234.5" for "$1,234.50." and "-3" for "−3%".

    Example:
        >>> extract_answer("She sells 16 - 7 = 9 eggs at $2.\\n#### $18.00")
        '18'
    """
    marked = _MARKED.search(text)
    numbers = [marked] if marked else list(_ANYWHERE.finditer(text))
    if not numbers:
        return None
    found = numbers[-1]
    whole = found["whole"].replace(",", "").lstrip("0") or "0"
    fraction = (found["fraction"] or "").rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if found["sign"] and number != "0" else number


def exact_match(answer: str, reference: str) -> bool:
    """Whether both texts give the same number; where the reference has none, whether they are the same text."""
    expected = extract_answer(reference)
    if expected is None:
        return answer.strip() == reference.strip()
    return extract_answer(answer) == expected


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
