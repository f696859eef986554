"""The benchmarks' peers make the contexts that they are said to make."""

from __future__ import annotations

import pytest
import torch
from models import VOCAB, tiny_model

from benchmarks.bench_sweeps import among_zeros
from benchmarks.peers import Rows, differing, full_recompute, parallel_scheduled_sampling
from selfgen import ContextGenerator


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def rows():
    tokens = torch.Generator().manual_seed(0)
    prompts, references = (
        [torch.randint(3, VOCAB, (size,), generator=tokens).tolist() for size in sizes]
        for sizes in ((5, 1, 9, 3), (20, 7, 31, 1))
    )
    return Rows(prompts, references, [17, 3, 2**40, -1])


def generate(model, rows, self_prob, method):
    generator = ContextGenerator(model, token_budget=32, balance=4)
    return generator.contexts(
        rows.prompts, rows.references, self_prob, seed=7, sample_ids=rows.sample_ids, method=method
    )


@pytest.mark.parametrize("self_prob", [0.0, 0.25, 1.0])
def test_full_recompute_is_the_sequential_loop_and_ours(model, rows, self_prob):
    contexts = full_recompute(model, rows, self_prob, seed=7)
    for method in ("sequential", "fixed_point"):
        assert differing(contexts, generate(model, rows, self_prob, method).tokens) == 0


@pytest.mark.parametrize("self_prob", [0.25, 1.0])
def test_enough_parallel_passes_give_ours(model, rows, self_prob):
    ours = generate(model, rows, self_prob, "fixed_point")
    enough = max(int(is_self.sum()) for is_self in ours.is_self)
    assert differing(parallel_scheduled_sampling(model, rows, self_prob, enough, seed=7), ours.tokens) == 0
    assert differing(parallel_scheduled_sampling(model, rows, self_prob, 1, seed=7), ours.tokens) > 0


def test_the_first_tokens_of_few_parallel_passes_are_ours(model, rows):
    ours = generate(model, rows, 0.5, "fixed_point")
    contexts = parallel_scheduled_sampling(model, rows, 0.5, 3, seed=7)
    for got, want, is_self in zip(contexts, ours.tokens, ours.is_self, strict=True):
        exact = is_self.cumsum(0) <= 3
        assert torch.equal(got[exact], want[exact])
        assert torch.equal(got[~is_self], want[~is_self])


def test_shortened(rows):
    short = rows.shortened(2, 10)
    assert [len(reference) for reference in short.references] == [10, 7]
    assert short.prompts == rows.prompts[:2]
    assert short.sample_ids == [17, 3]


def test_a_model_among_zeros_computes_the_same(model, rows):
    larger = among_zeros(model, (48, 3, 64, 6, 3))
    assert larger.num_parameters() > 1.5 * model.num_parameters()
    tokens = torch.tensor([rows.references[2]])
    with torch.no_grad():
        torch.testing.assert_close(larger(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
