"""What happens in a few rows: the pass in which each token settles, probabilities, and pages that show them."""

from __future__ import annotations

import pytest
import torch
from helpers.contexts import batch
from models import VOCAB, tiny_model

import selfgen_kernels as kernels
from selfgen import ContextGenerator
from selfgen.context import fixed_point
from selfgen.context.masks import Masks

# ---------------------------------------------------------------------------------------------------------------------
# The pass in which each token settles


def settled_by_full_forwards(model, prompt, reference, candidates, seed: int, sample_id: int):
    """(settled, passes) of one row by the plainest iteration: each pass is a forward over the whole guess."""
    context, settled, passes, first = reference.clone(), torch.zeros_like(reference), 0, len(prompt)
    places = candidates.nonzero().flatten().tolist()
    final = 0  # candidates that are
    while final < len(places):
        passes += 1
        with torch.no_grad():
            logits = model(torch.cat([prompt, context])[None]).logits[0, first - 1 : -1]
        ids, positions = torch.full_like(reference, sample_id), torch.arange(len(reference))
        guess, _ = kernels.sample_mix(
            logits, reference, candidates.double(), seed=seed, sample_ids=ids, positions=positions
        )
        right = [bool(guess[place] == context[place]) for place in places[final:]]
        final += right.index(False) + 1 if False in right else len(right)
        still_open = places[final] if final < len(places) else len(reference)
        settled[places[0] : still_open][settled[places[0] : still_open] == 0] = passes
        context = guess
    return settled, passes


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_tokens_settle_as_in_full_forwards(family):
    """With room for everything, a pass computes all that is left: the iteration in its plainest form."""
    model = tiny_model(family)
    generator = ContextGenerator(model, token_budget=10_000, balance=1e12)
    prompts, references, ids = batch(6)
    draw = Masks().draw(5, torch.tensor(ids), [len(row) for row in references], torch.full((6,), 0.4).double())
    for prompt, reference, one, candidates in zip(prompts, references, ids, draw, strict=True):
        mixed = generator.contexts([prompt], [reference], 0.4, seed=5, sample_ids=[one], record_settling=True)
        want, passes = settled_by_full_forwards(model, prompt, reference, candidates, 5, one)
        assert mixed.settled is not None
        assert mixed.settled[0].tolist() == want.tolist()
        assert mixed.stats.passes == passes


@pytest.mark.parametrize("masks", [Masks(), Masks("span"), Masks(min_reference_prob=0.01)], ids=str)
@pytest.mark.parametrize("budget", [{"token_budget": 5, "balance": 2.0}, {"token_budget": 300, "balance": 50.0}])
def test_what_has_settled_stays(budget, masks, monkeypatch):
    """After each pass, what is said to have settled is the final context."""
    guesses, commit = [], fixed_point.FixedPoint.commit

    def noting(state, *arguments):
        commit(state, *arguments)
        guesses.append(state.contexts)

    monkeypatch.setattr(fixed_point.FixedPoint, "commit", noting)
    generator = ContextGenerator(tiny_model("llama"), masks=masks, **budget)
    prompts, references, ids = batch()
    how = {"seed": 3, "sample_ids": ids}
    mixed = generator.contexts(prompts, references, 0.5, record_settling=True, **how)
    assert len(guesses) == mixed.stats.passes
    assert max(int(row.max()) for row in mixed.settled) == mixed.stats.passes
    for row, (context, settled) in enumerate(zip(mixed.tokens, mixed.settled, strict=True)):
        assert settled.shape == context.shape
        assert (settled.diff() >= 0).all()  # so what has settled after any pass is a prefix, which grows
        for number, guess in enumerate([references, *guesses]):
            assert torch.equal(guess[row][settled <= number], context[settled <= number])
    assert generator.contexts(prompts, references, 0.5, **how).settled is None  # off by default


def test_settling_without_candidates_and_with_hidden_states():
    generator = ContextGenerator(tiny_model("llama"), token_budget=64, balance=8.0)
    prompts, references, ids = batch(3)
    plain = generator.contexts(prompts, references, 0.0, seed=0, sample_ids=ids, record_settling=True)
    assert [row.tolist() for row in plain.settled] == [[0] * len(row) for row in references]
    how = {"seed": 0, "sample_ids": ids, "record_settling": True}
    kept, alone = (
        generator.contexts(prompts, references, 0.5, keep_hidden_states=keep, **how) for keep in (True, False)
    )
    for settled, context in zip(kept.settled, alone.tokens, strict=True):
        assert settled.shape == context.shape
        assert int(settled.max()) <= kept.stats.passes
    assert generator.contexts([], [], 0.5, seed=0, sample_ids=[], record_settling=True).settled == []


def test_settling_is_of_passes():
    generator = ContextGenerator(tiny_model("llama"))
    with pytest.raises(ValueError, match="record_settling goes with method"):
        generator.contexts([[1]], [[2]], 0.5, seed=0, sample_ids=[0], method="sequential", record_settling=True)
