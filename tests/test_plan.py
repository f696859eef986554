"""The policy of a pass: which chance is worth its price, and what is known of a guess."""

from __future__ import annotations

import itertools

import pytest
import torch
from models import VOCAB, tiny_model

from selfgen import ContextGenerator
from selfgen.context.budget import PassBudget, budget_of
from selfgen.context.plan import Speculation, least_log_chance


def test_a_chance_is_worth_what_a_pass_gives_for_its_price():
    required, self_left = torch.tensor([6]), torch.tensor([20])
    assert least_log_chance(required, self_left, 18.0).exp().tolist() == pytest.approx([6 / 24])
    assert least_log_chance(required, self_left, 0.0).tolist() == [0.0]  # passes for nothing: only what is certain


def test_only_rows_with_as_much_left_count():
    """The longest row stands alone, the shortest has to wait for all."""
    required = torch.tensor([4, 2, 6, 0])
    self_left = torch.tensor([100, 50, 48, 0])  # the second and the third are about as long; the last is done
    got = least_log_chance(required, self_left, 12.0).exp()
    assert got.tolist() == pytest.approx([4 / 16, 12 / 24, 12 / 24, 12 / 24])


def test_a_guess_that_is_kept_gets_surer():
    speculation = Speculation(torch.tensor([False, True, True, False]))
    kinds = [speculation.kind.tolist()]
    slots, everywhere = torch.tensor([0, 1, -1]), torch.tensor([True, True, False])  # and padding
    for changed in ([False, True], [False, False], [False, False], [True, False]):
        before = speculation.log_chance
        speculation.observe(slots, torch.tensor([*changed, False]), everywhere)
        kinds.append(speculation.kind.tolist())
    first, changed, kept, again, given = range(5)
    assert kinds == [
        [given, first, first, given],
        [given, kept, changed, given],
        [given, again, kept, given],
        [given, again, again, given],
        [given, changed, again, given],
    ]
    assert before[0] == 0.0  # what is given is right
    assert before[1] == before[2] < 0.0


def test_rates_follow_what_is_seen():
    speculation = Speculation(torch.ones(101, dtype=torch.bool))
    slots, yes, no = torch.arange(100), torch.ones(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    speculation.observe(slots, yes, no)  # not under a final context: the rates say nothing of it
    prior = Speculation(torch.ones(1, dtype=torch.bool)).counts
    assert torch.equal(speculation.counts, prior)
    speculation.observe(slots, yes, yes)
    right, wrong = speculation.counts[Speculation.CHANGED]
    assert (right, right + wrong) == (prior[Speculation.CHANGED, 0], 110)


@pytest.mark.parametrize(("fixed", "per_token"), [(0.03, 0.0006), (1.0, 0.25)])
def test_budget_of_a_straight_cost_curve(fixed, per_token):
    budget = budget_of(lambda n: fixed + n * per_token)
    assert budget.balance == pytest.approx(1 + fixed / per_token, rel=0.05)


@pytest.mark.parametrize("calls", [1, 4])
@pytest.mark.parametrize("first", range(1, 14))
def test_a_budget_does_not_depend_on_what_else_ran_for_a_moment(first, calls):
    count = itertools.count()
    cost = lambda n: (32 + n) * (90.0 if first <= next(count) < first + calls else 1.0)  # noqa: E731
    found, want = budget_of(cost), budget_of(lambda n: 32.0 + n)
    assert (found.tokens, found.balance) == (want.tokens, pytest.approx(want.balance))


def test_budget_of_a_cost_curve_with_a_corner():
    """A device that is idle up to 200 tokens."""
    assert budget_of(lambda n: max(200, n) * 1e-5).balance == pytest.approx(200)


def test_hopeless_speculation_is_left_out():
    """A random model never agrees with its reference, so with many rows each token is computed about once."""
    rows = torch.randint(3, VOCAB, (16, 48), generator=torch.Generator().manual_seed(0))
    prompts, references = list(rows[:, :8]), list(rows[:, 8:])
    stats = [
        ContextGenerator(tiny_model("llama"), token_budget=budget, balance=budget / 8)
        .contexts(prompts, references, 1.0, seed=0, sample_ids=list(range(16)))
        .stats
        for budget in (64, 10_000)
    ]
    assert stats[0].computed_per_context_token < 1.1
    assert stats[1].computed_per_context_token > 2.0  # passes that cost as much as 1,250 tokens are worth any chance
    assert stats[1].passes <= stats[0].passes


def test_a_smaller_cap_does_not_change_what_speculation_is_weighed_by(monkeypatch):
    """``token_budget`` bounds memory; the balance is the device's, measured whatever the cap is."""
    measured = PassBudget(tokens=96, balance=12.0)
    monkeypatch.setattr("selfgen.context.generator.measure_budget", lambda *args, **kwargs: measured)
    model = tiny_model("llama")
    assert ContextGenerator(model).budget == measured
    assert ContextGenerator(model, token_budget=24).budget == PassBudget(24, 12.0)
    assert ContextGenerator(model, balance=5).budget == PassBudget(96, 5)
    monkeypatch.undo()
    assert ContextGenerator(model, token_budget=24, balance=5).budget == PassBudget(24, 5)  # nothing is measured
