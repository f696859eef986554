"""Schedules of the self-probability over training."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from helpers.training import config, make_trainer

from selfgen.training.schedules import SCHEDULES

RISING = sorted(SCHEDULES.keys() - {"constant"})


@pytest.mark.parametrize("name", RISING)
def test_from_start_to_end_and_never_back(name):
    values = [SCHEDULES[name](0.1, 0.9, step / 100) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[-1] == pytest.approx(0.9)
    assert all(a < b for a, b in pairwise(values))
    falling = [SCHEDULES[name](0.9, 0.1, step / 100) for step in range(101)]
    assert [a + b for a, b in zip(values, falling, strict=True)] == pytest.approx([1.0] * 101)


def test_their_shapes():
    at = {name: [SCHEDULES[name](0.0, 1.0, progress) for progress in (0.25, 0.5, 0.75)] for name in SCHEDULES}
    assert at["constant"] == [1.0] * 3
    assert at["linear"] == pytest.approx([0.25, 0.5, 0.75])
    assert at["cosine"] == pytest.approx([(1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2])
    half = (1 - math.exp(-2.5)) / (1 - math.exp(-5))
    assert at["exponential"][1] == pytest.approx(half)
    low, quarter = (1 / (1 + math.exp(x)) for x in (5, 2.5))
    assert at["inverse_sigmoid"] == pytest.approx([x := (quarter - low) / (1 - 2 * low), 0.5, 1 - x])


@pytest.mark.parametrize(("warmup", "first"), [(0.0, 0), (3, 3), (0.2, 2)])
def test_warm_up_is_plain_fine_tuning(tmp_path, warmup, first):
    args = config(tmp_path, self_prob=0.5, self_prob_schedule="linear", self_prob_warmup=warmup)
    values = [args.self_prob_at(step, 11) for step in range(11)]
    assert values[:first] == [0.0] * first
    assert values[first:] == pytest.approx([0.5 * place / (10 - first) for place in range(11 - first)])


def test_a_warm_up_as_long_as_the_training(tmp_path):
    args = config(tmp_path, self_prob_warmup=10)
    assert [args.self_prob_at(step, 10) for step in range(10)] == [0.0] * 10


def test_a_function(tmp_path):
    """Its values are the probabilities that contexts are made with."""
    asked = []
    trainer = make_trainer(tmp_path, self_prob=0.8)
    trainer.schedule = lambda start, end, progress: end * progress**2
    generate = trainer.generator.contexts
    trainer.generator.contexts = lambda *args, **kwargs: (asked.append(args[2]), generate(*args, **kwargs))[1]
    trainer.train()
    assert asked == pytest.approx([0.8 * (step / 3) ** 2 for step in range(1, 4)])


@pytest.mark.parametrize("value", [-0.5, 1.5, math.nan])
def test_a_function_that_gives_no_probability(tmp_path, value):
    trainer = make_trainer(tmp_path)
    trainer.schedule = lambda start, end, progress: value
    with pytest.raises(ValueError, match=f"the schedule gives for step 0 is {value}"):
        trainer.train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"self_prob_warmup": -1}, "share of them"),
        ({"self_prob_schedule": "step"}, "inverse_sigmoid"),
        ({"granularity": "word"}, "span"),
        ({"self_prob_curve": "steep"}, "rising"),
        ({"granularity": "prefix", "self_prob_curve": "rising"}, "falling"),
        ({"min_reference_prob": 2.0}, r"in \[0, 1\]"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **change)
