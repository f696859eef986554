"""Masks: shares, spans, answers, curves and confidence, each drawn as its definition says."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from helpers.contexts import assert_equal, batches
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model

from selfgen import ContextGenerator, Masks
from selfgen.context.masks import rising
from selfgen_kernels import self_mask

model_of = cache(tiny_model)
ROWS, LENGTH = 400, 200


def draw(masks: Masks, p: float, rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Bool [rows, length]."""
    ids, prob = torch.arange(rows), torch.full((rows,), p, dtype=torch.float64)
    return torch.stack(masks.draw(seed, ids, [length] * rows, prob))


def test_single_tokens_are_the_coins_of_the_kernels():
    ids, places = torch.arange(3).repeat_interleave(5), torch.arange(5).repeat(3)
    assert torch.equal(draw(Masks(), 0.3, 3, 5).flatten(), self_mask(0, ids, places, 0.3))


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("masks", [Masks("span", 2.0), Masks("span", 12.0), Masks("sequence"), Masks(curve="rising")])
def test_the_share_of_self_tokens_is_p(masks, p):
    mask = draw(masks, p, rows=4000 if masks.granularity == "sequence" else ROWS)
    runs = {"token": 1, "span": 24, "sequence": LENGTH}[masks.granularity]  # tokens that hang together, about
    deviation = math.sqrt(p * (1 - p) * runs / mask.numel())
    assert abs(mask.double().mean() - p) < 4 * deviation


@pytest.mark.parametrize("length", [3.0, 12.0])
def test_spans_have_their_mean_length_and_are_geometric(length):
    mask = draw(Masks("span", length), 0.25, rows=2000)
    ends = mask[:, 1:-1] & ~mask[:, 2:]  # what follows a self token, of those that something follows
    stops = ends.sum() / mask[:, 1:-1].sum()
    assert abs(float(stops) * length - 1) < 0.05
    after_two = mask[:, :-2] & mask[:, 1:-1]  # the chance to stop is the same in a long span
    stops = (after_two & ~mask[:, 2:]).sum() / after_two.sum()
    assert abs(float(stops) * length - 1) < 0.06


@pytest.mark.parametrize("p", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("length", [8, 64])
def test_spans_follow_a_curve(p, length):
    """At each position the share is the curve's."""
    mask = draw(Masks("span", 8.0, "rising"), p, rows=6000, length=length)
    place = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    want = rising(torch.full((length,), p, dtype=torch.float64), place)
    assert (mask.double().mean(0) - want).abs().max() < 5 * 0.5 / 6000**0.5


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
def test_spans_of_one_token_are_single_tokens(p):
    assert torch.equal(draw(Masks("span", 1.0), p, 50), draw(Masks(), p, 50))


def test_a_sequence_is_one_coin():
    mask = draw(Masks("sequence"), 0.5)
    assert (mask.all(1) | ~mask.any(1)).all()


@given(p=st.floats(0, 1), length=st.integers(1, 50))
def test_rising_keeps_the_mean_and_its_bounds(p, length):
    place = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    curve = rising(torch.full((length,), p, dtype=torch.float64), place)
    assert abs(float(curve.mean()) - p) < 1e-9
    assert (curve >= -1e-12).all()
    assert (curve <= 1 + 1e-12).all()
    assert (curve.diff() >= 0).all()


def test_rising_has_more_self_tokens_later():
    share = draw(Masks(curve="rising"), 0.4).double().mean(0)
    assert abs(float(share[:20].mean()) - 0.04) < 0.03
    assert abs(float(share[-20:].mean()) - 0.76) < 0.03


def test_a_curve_may_be_a_function():
    late = Masks(curve=lambda p, place: torch.where(place > 0.5, 1.0, 0.0))
    mask = draw(late, 0.3, 2, 10)
    assert mask.tolist() == [[False] * 5 + [True] * 5] * 2


def test_a_mask_does_not_depend_on_what_follows():
    """A row that is cut keeps the mask of what is left, as its positions keep their coins; a curve knows the length."""
    masks = Masks("span", 4.0)
    assert torch.equal(draw(masks, 0.3, 9, 30), draw(masks, 0.3, 9, 60)[:, :30])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"granularity": "word"}, "accepted: token, span, sequence"),
        ({"span_length": 0.5}, ">= 1"),
        ({"span_length": math.nan}, ">= 1"),
        ({"curve": "falling"}, "accepted: flat, rising"),
        ({"granularity": "sequence", "curve": "rising"}, "draws once"),
        ({"min_reference_prob": 1.5}, r"in \[0, 1\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Masks(**arguments)


@given(
    batch=batches(max_rows=6),
    masks=st.builds(
        Masks,
        granularity=st.sampled_from(["token", "span"]),
        span_length=st.sampled_from([1.0, 4.0]),
        curve=st.sampled_from(["flat", "rising"]),
        min_reference_prob=st.sampled_from([0.0, 1e-3, 0.01, 0.1]),
    ),
    self_prob=st.sampled_from([0.3, 1.0]),
    budget=st.integers(1, 100),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_fixed_point_equals_sequential(batch, masks, self_prob, budget, temperature):
    prompts, references, ids = batch
    generator = ContextGenerator(
        model_of("llama"), token_budget=budget, balance=budget / 8, masks=masks, temperature=temperature
    )
    arguments = {"seed": 3, "sample_ids": ids}
    expected = generator.contexts(prompts, references, self_prob, method="sequential", **arguments)
    assert_equal(generator.contexts(prompts, references, self_prob, **arguments), expected)


@pytest.mark.parametrize("threshold", [0.001, 0.01, 0.05])
def test_self_tokens_only_where_the_reference_is_likely_enough(threshold):
    """Against the model's own forward over the finished context."""
    model = model_of("llama")
    references = [torch.arange(3 + row, 40 + row) for row in range(6)]
    generator = ContextGenerator(model, masks=Masks(min_reference_prob=threshold))
    mixed = generator.contexts([[1, 2]] * 6, references, 0.7, seed=1, sample_ids=range(6))
    coins = Masks().draw(1, torch.arange(6), [37] * 6, torch.full((6,), 0.7, dtype=torch.float64))
    kept = dropped = 0
    for reference, context, is_self, coin in zip(references, mixed.tokens, mixed.is_self, coins, strict=True):
        row = torch.cat([torch.tensor([1, 2]), context])[None]
        with torch.no_grad():
            probability = model(input_ids=row).logits[0, 1:-1].softmax(-1).gather(1, reference[:, None])[:, 0]
        near = (probability / threshold - 1).abs() < 1e-4
        assert torch.equal(is_self[~near], (coin & (probability >= threshold))[~near])
        assert torch.equal(context[~is_self], reference[~is_self])
        kept, dropped = kept + int(is_self.sum()), dropped + int((coin & ~is_self).sum())
    assert kept
    assert dropped
