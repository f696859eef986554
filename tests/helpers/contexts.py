"""Batches to make contexts of, and what it means that two of them are equal."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from models import VOCAB

PER_FAMILY = settings(max_examples=settings.default.max_examples * 3 // 10)
"""For what is drawn anew for each family of models: together they see more examples than one test does."""


@st.composite
def batches(draw, max_rows: int = 16):
    """(prompts, references, sample ids) of a ragged batch."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=max_rows))
    tokens = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def row(length):
        return torch.randint(3, VOCAB, (length,), generator=tokens)

    ids = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=len(sizes), max_size=len(sizes), unique=True))
    return [row(p) for p, _ in sizes], [row(t) for _, t in sizes], ids


def batch(count: int = 12, longest: int = 40):
    """(prompts, references, sample ids) of one ragged batch, the same at every call."""
    tokens = torch.Generator().manual_seed(count)

    def row():
        return torch.randint(3, VOCAB, (int(torch.randint(1, longest, (), generator=tokens)),), generator=tokens)

    return [row() for _ in range(count)], [row() for _ in range(count)], list(range(-3, count - 3))


def checked_as(generator, other):
    """``generator``, for which a model that ``other`` has checked in the same precision need not be checked again."""
    with other.computing():
        _ = other._verification
    generator._make, generator._verified = other._make, other._verified
    return generator


def assert_equal(mixed, expected) -> None:
    for name in ("is_self", "tokens"):
        for index, (got, want) in enumerate(zip(getattr(mixed, name), getattr(expected, name), strict=True)):
            assert torch.equal(got, want), f"row {index}: {name} {got.tolist()} instead of {want.tolist()}"
