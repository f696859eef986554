"""The draws have the distribution they claim: chi-square p-values against fp64 softmax, and independence of neighbours.

Seeds are fixed, so the verdict is the same every time: a p-value under 1e-4 means a wrong sampler, not bad luck.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from selfgen_kernels import sample_mix

DRAWS = 1_000_000
SMALLEST_P = 1e-4


def draws(logits, n, *, seed=0, positions=None, self_prob=1.0, **how):
    """n tokens [n] of one row of logits [V], told apart by their sample id."""
    positions = torch.zeros(n, dtype=torch.int64) if positions is None else positions
    reference = torch.full((n,), len(logits))
    rows = logits.expand(n, -1)
    return sample_mix(rows, reference, self_prob, seed=seed, sample_ids=torch.arange(n), positions=positions, **how)


def p_value(tokens, probs):
    """Chi-square of int64 [n] against fp64 probabilities [V]; tokens expected under 5 times share one bin."""
    counts, expected = np.bincount(tokens, minlength=len(probs)), probs * len(tokens)
    assert (counts[probs == 0] == 0).all()
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
        counts, expected = counts[:-1], expected[:-1]
    return stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


def softmax(logits):
    return logits.double().softmax(-1).numpy()


@pytest.fixture(scope="module")
def logits():
    return torch.randn(300, generator=torch.Generator().manual_seed(3)) * 2  # [300]: four groups and a short one


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_softmax(logits, temperature):
    tokens, _ = draws(logits, DRAWS, temperature=temperature)
    assert p_value(tokens, softmax(logits / temperature)) > SMALLEST_P


def test_softmax_along_positions(logits):
    tokens, _ = draws(logits, DRAWS, positions=torch.arange(DRAWS), seed=-5)
    assert p_value(tokens, softmax(logits)) > SMALLEST_P


def test_rare_tokens(logits):
    """One token has 99.8% of the mass; the other 299 live on the tails of the noise."""
    peaked = logits.clone()
    peaked[130] = float(logits.logsumexp(0)) + 6.2
    tokens, _ = draws(peaked, DRAWS)
    assert 0.997 < softmax(peaked)[130] < 0.999
    others = tokens[tokens != 130]
    probs = softmax(peaked)
    assert stats.binomtest(len(others), DRAWS, 1 - probs[130]).pvalue > SMALLEST_P
    probs[130] = 0
    assert p_value(others, probs / probs.sum()) > SMALLEST_P


def test_groups_without_a_chance_of_their_own():
    """Mass spread over thousands of unlikely tokens in many groups, against one likely token."""
    logits = torch.zeros(6400)
    logits[6399] = 8.0
    tokens, _ = draws(logits, DRAWS // 5)
    probs = softmax(logits)
    groups = probs.reshape(100, 64).sum(1)
    assert p_value(tokens // 64, groups) > SMALLEST_P
    assert p_value(tokens % 64, probs.reshape(100, 64).sum(0)) > SMALLEST_P


def test_filtered(logits):
    tokens, _ = draws(logits, 100_000, top_k=40, top_p=0.9, min_p=0.02, temperature=1.5)
    probs = softmax(logits / 1.5)
    order = np.argsort(-probs)
    kept = probs[order[:40]]
    kept = kept[np.cumsum(kept) - kept < 0.9 * kept.sum()]
    kept = kept[kept >= 0.02 * kept[0]]
    expected = np.zeros_like(probs)
    expected[order[: len(kept)]] = kept / kept.sum()
    assert p_value(tokens, expected) > SMALLEST_P


def test_every_backend(backend, logits):
    n = 120 if backend.name == "triton" and backend.device == "cpu" else 100_000
    tokens, _, _ = backend.sample_mix(logits[:130].expand(n, -1), seed=9)
    assert p_value(tokens, softmax(logits[:130])) > SMALLEST_P


def independent(a, b, classes=8):
    """p-value of the contingency table of two sequences of tokens, folded into a few classes of similar size."""
    table = np.zeros((classes, classes))
    np.add.at(table, (a % classes, b % classes), 1)
    return stats.chi2_contingency(table).pvalue


def test_neighbours_are_independent(logits):
    n = 200_000
    base = draws(logits, n)[0].numpy()
    assert independent(base[:-1], base[1:]) > SMALLEST_P  # sample ids i and i + 1
    next_position = draws(logits, n, positions=torch.ones(n, dtype=torch.int64))[0].numpy()
    assert independent(base, next_position) > SMALLEST_P
    next_seed = draws(logits, n, seed=1)[0].numpy()
    assert independent(base, next_seed) > SMALLEST_P
    assert independent(next_position[:-1], next_seed[1:]) > SMALLEST_P


def test_the_mask_does_not_bias_the_token(logits):
    tokens, is_self = draws(logits, DRAWS, self_prob=0.2)
    assert stats.binomtest(is_self.sum().item(), DRAWS, 0.2).pvalue > SMALLEST_P
    assert p_value(tokens[is_self], softmax(logits)) > SMALLEST_P
