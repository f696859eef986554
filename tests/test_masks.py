"""Masks: shares, spans, prefixes, answers, curves and confidence, each drawn as its definition says."""

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
from selfgen.context.masks import CURVES, falling, rising
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
@pytest.mark.parametrize(
    "masks",
    [
        Masks("span", 2.0), Masks("span", 12.0), Masks("sequence"), Masks(curve="rising"), Masks(curve="falling"),
        Masks("prefix"),
    ],
)  # fmt: skip
def test_the_share_of_self_tokens_is_p(masks, p):
    mask = draw(masks, p, rows=4000 if masks.granularity in ("prefix", "sequence") else ROWS)
    whole = {"prefix": LENGTH, "sequence": LENGTH}
    runs = {"token": 1, "span": 24, **whole}[masks.granularity]  # tokens that hang together, about
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


@pytest.mark.parametrize(
    ("granularity", "curve", "p", "length"),
    [
        *(("span", "rising", p, length) for p in (0.3, 0.5, 0.8) for length in (8, 64)),
        *(("span", "falling", p, length) for p, length in ((0.3, 8), (0.8, 64))),
        *(("prefix", "falling", p, length) for p, length in ((0.3, 1), (0.5, 64), (0.8, 8))),
    ],
)
def test_runs_follow_a_curve(granularity, curve, p, length):
    """At each position the share is the curve's."""
    masks = Masks(granularity, 8.0, curve)
    mask = draw(masks, p, rows=6000, length=length)
    place = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    want = CURVES[masks.curve](torch.full((length,), p, dtype=torch.float64), place)
    assert (mask.double().mean(0) - want).abs().max() < 5 * 0.5 / 6000**0.5


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
def test_spans_of_one_token_are_single_tokens(p):
    assert torch.equal(draw(Masks("span", 1.0), p, 50), draw(Masks(), p, 50))


def test_a_sequence_is_one_coin():
    mask = draw(Masks("sequence"), 0.5)
    assert (mask.all(1) | ~mask.any(1)).all()


@given(
    p=st.floats(0, 1),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    seed=st.integers(-(2**63), 2**63 - 1),
    curve=st.sampled_from([None, "falling", lambda p, u: p * (u < 0.7), lambda p, u: p * (1 - u) ** 2]),
)
def test_a_prefix_is_where_one_uniform_number_of_the_row_is_below_the_curve(p, lengths, seed, curve):
    ids = torch.arange(len(lengths)) - 2
    prob = torch.full((len(lengths),), p, dtype=torch.float64)
    masks = Masks("prefix", curve=curve)
    drawn = masks.draw(seed, ids, lengths, prob)
    for row, length, mask in zip(ids, lengths, drawn, strict=True):
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        place = (torch.arange(length, dtype=torch.float64) + 0.5) / length
        chance = (falling if curve in (None, "falling") else curve)(
            torch.full((length,), p, dtype=torch.float64), place
        )
        coins = [self_mask(seed, row[None], torch.zeros(1, dtype=torch.int64), float(one))[0] for one in chance]
        assert mask.tolist() == [bool(coin) for coin in coins]
        alone = masks.draw(seed, row[None], [length], prob[:1])[0]
        assert torch.equal(alone, mask)


@pytest.mark.parametrize("length", [1, 7, 40])
def test_at_one_half_each_switch_place_is_as_likely(length):
    """The first and the last of the ``length`` + 1 places are half as wide as the others."""
    rows = 20_000
    places = draw(Masks("prefix"), 0.5, rows, length).sum(1)
    found = torch.bincount(places, minlength=length + 1).double()
    want = torch.full((length + 1,), rows / length, dtype=torch.float64)
    want[[0, -1]] /= 2
    chi2 = float(((found - want) ** 2 / want).sum())
    assert chi2 < length + 4 * math.sqrt(2 * length)  # of `length` degrees of freedom


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_prefixes_at_both_ends_of_p(p):
    assert (draw(Masks("prefix"), p, 20, 9) == bool(p)).all()


def test_prefix_and_sequence_have_one_coin():
    """Where the curve is the probability itself, at the middle of an odd answer, they agree row by row."""
    prefix, sequence = (draw(Masks(name), 0.3, 300, 5)[:, 2] for name in ("prefix", "sequence"))
    assert torch.equal(prefix, sequence)
    assert 0 < prefix.sum() < 300


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        (lambda p, u: p * u, r"from 0\.0500\d+ at token 0 of an answer to 0\.1500"),
        (lambda p, u: p * torch.where(u > 0.5, torch.nan, 1.0), "to nan at the next one"),
        (lambda p, u: (0.5 - u).abs(), "token 2 of an answer"),
    ],
)
def test_a_function_for_prefixes_must_not_rise(curve, words):
    with pytest.raises(ValueError, match=words):
        draw(Masks("prefix", curve=curve), 0.5, 2, 5)
    Masks(curve=lambda p, u: p * u).draw(0, torch.arange(2), [3, 4], torch.full((2,), 0.5))


def test_a_new_row_may_begin_higher_than_the_last_ended():
    prob = torch.tensor([0.1, 0.9], dtype=torch.float64)
    drawn = Masks("prefix", curve=lambda p, u: p * (1 - u)).draw(0, torch.arange(2), [3, 4], prob)
    assert [len(row) for row in drawn] == [3, 4]


@pytest.mark.parametrize("granularity", ["token", "span", "prefix", "sequence"])
def test_the_curve_that_is_used_is_told(granularity):
    masks = Masks(granularity)
    assert masks.describe()["curve"] == masks.curve == ("falling" if granularity == "prefix" else "flat")
    assert masks == Masks(granularity, curve=masks.curve)


@pytest.mark.parametrize("sign", [1, -1])
@given(p=st.floats(0, 1), length=st.integers(1, 50))
def test_lines_keep_the_mean_and_their_bounds(sign, p, length):
    place = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    curve = (rising if sign == 1 else falling)(torch.full((length,), p, dtype=torch.float64), place)
    assert abs(float(curve.mean()) - p) < 1e-9
    assert (curve >= -1e-12).all()
    assert (curve <= 1 + 1e-12).all()
    assert (sign * curve.diff() >= 0).all()


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
        ({"granularity": "word"}, "accepted: token, span, prefix, sequence"),
        ({"span_length": 0.5}, ">= 1"),
        ({"span_length": math.nan}, ">= 1"),
        ({"curve": "steep"}, "accepted: flat, rising, falling"),
        ({"granularity": "sequence", "curve": "rising"}, "draws once"),
        ({"granularity": "prefix", "curve": "rising"}, 'give "falling", or a function'),
        ({"granularity": "prefix", "curve": "flat"}, 'granularity="sequence" for that'),
        ({"granularity": "prefix", "min_reference_prob": 0.1}, "leave gaps"),
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
        curve=st.sampled_from(["flat", "rising", "falling"]),
        min_reference_prob=st.sampled_from([0.0, 1e-3, 0.01, 0.1]),
    )
    | st.just(Masks("prefix")),
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
