"""Own answers that are right already: which of them stay among a step's corrections."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from fractions import Fraction

from accelerate.utils import gather_object

from ..evaluation import exact_match

Judge = Callable[[str, str], bool]
"""From an answer and its reference, as texts, to whether the answer is right."""

RIGHT_ANSWERS = ("reference", "keep")
same_as_eval: Judge = exact_match
"""What ``selfgen eval`` counts. It is a function of the two texts alone: a comparison that ends at a time limit, as
`symbolic_match` may, would make a run depend on how busy the machine is."""


def is_right(judge: Judge, answer: str, reference: str) -> bool:
    """What ``judge`` says of an answer.

    Raises:
        ValueError: it says neither yes nor no, but has a score in between, say, which would count as yes.
    """
    said = judge(answer, reference)
    if isinstance(said, str) or said not in (True, False):
        raise ValueError(
            f"judge says {said!r} of the answer {answer!r}, whose reference is {reference!r}: it must say True or "
            "False (of a score, whether it is high enough)"
        )
    return bool(said)


def left_out(right: Iterable[int], wrong: Iterable[int], share: float, seed: int, *, together: bool) -> set[int]:
    """Sample ids of right own answers that a step does without, so that they are at most ``share`` of those that stay.

    Which ones stay depends on the seed and the sample ids alone. With ``together`` the rows are those of all processes,
    which all call this and come to the same ids.
    """
    told: list[tuple[list[int], list[int]]] = [(sorted({*right}), sorted({*wrong}))]
    told = gather_object(told) if together else told
    all_right = {row for rights, _ in told for row in rights}
    all_wrong = {row for _, wrongs in told for row in wrongs}
    if share == 1.0:
        return set()
    exact = Fraction(str(share))  # 0.9 is nine tenths
    most = int(exact * len(all_wrong) / (1 - exact))
    return set(sorted(all_right, key=lambda row: _order(seed, row))[most:])


def _order(seed: int, sample_id: int) -> bytes:
    return hashlib.blake2b(f"{seed} {sample_id}".encode(), digest_size=16).digest()
