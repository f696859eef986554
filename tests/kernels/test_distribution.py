"""The draws have the distribution they claim: chi-square p-values against fp64 softmax, and independence of neighbours.

Seeds are fixed, so the verdict is the same every time: a p-value under 1e-4 means a wrong sampler, not bad luck. About
a hundred p-values are looked at here, so a right sampler with fresh seeds fails one of them in a hundred runs.

Ten million draws, marked slow, are those of the public ops (C++ on CPU, on a GPU Triton) and of the torch reference.
Triton's interpreter takes milliseconds per row: that its numbers and tokens are the reference's, and so have its
distribution, is shown on fewer rows in test_noise_ops.py and test_agreement.py.
"""

import math

import numpy as np
import pytest
import torch
from conftest import GPU_ONLY
from scipy import stats

from selfgen_kernels import (
    backends,
    combine_shards,
    gumbel_noise,
    linear_sample_mix,
    linear_sample_shard,
    sample_mix,
    self_mask,
)
from selfgen_kernels.backends.reference import sampling as reference_sampling
from selfgen_kernels.ops.rows import inverse_temperature

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
    tokens, _ = draws(logits, DRAWS // 2, temperature=temperature)
    assert p_value(tokens, softmax(logits / temperature)) > SMALLEST_P


def test_softmax_along_positions(logits):
    tokens, _ = draws(logits, DRAWS // 2, positions=torch.arange(DRAWS // 2), seed=-5)
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
    n = 40 if backend.name == "triton" and backend.device == "cpu" else 100_000
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


# ---- Ten million draws -----------------------------------------------------------------------------------------------

MANY = 10_000_000
SMALL_V = 300
RARE = np.geomspace(1e-6, 1e-5, 40)  # expected 10 to 100 times in ten million draws: a bin each
RARER = 40 * [5e-8]  # expected 20 times together: one bin
CASES = {
    "none": {},
    "temperature": {"temperature": 0.8},
    "top_k": {"top_k": 250},
    "top_p": {"top_p": 1 - 2e-5},
    "min_p": {"min_p": 4e-5},
    "all": {"top_k": 255, "top_p": 1 - 1e-5, "min_p": 2e-5, "temperature": 1.1},
}


def with_tails(vocab_size, rarest=1e-6):
    """Logits fp32 [V] whose softmax has V - 80 common tokens, 40 of `rarest` to ten times that and 40 rarer, mixed."""
    generator = torch.Generator().manual_seed(4)
    common = (torch.randn(vocab_size - 80, generator=generator) * 2).double().softmax(0).numpy()
    rare = np.concatenate([RARE, RARER]) * rarest / RARE[0]
    probs = np.concatenate([common * (1 - rare.sum()), rare])
    return torch.from_numpy(np.log(probs))[torch.randperm(vocab_size, generator=generator)].float()


@pytest.fixture(scope="module")
def tailed():
    return with_tails(SMALL_V)


def filtered_softmax(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """fp64 [V], by the filters' definitions."""
    probs = softmax(logits.double() / temperature)
    order = np.argsort(-probs)
    kept = probs[order]
    if top_k is not None:
        kept = kept[:top_k]
    if top_p is not None:
        kept = kept[np.cumsum(kept) - kept < top_p * kept.sum()]
    if min_p is not None:
        kept = kept[kept >= min_p * kept[0]]
    expected = np.zeros_like(probs)
    expected[order[: len(kept)]] = kept / kept.sum()
    return expected


def by_logits(logits, ids, how):
    zeros = torch.zeros_like(ids)
    return sample_mix(logits.expand(len(ids), -1), zeros, 1.0, seed=7, sample_ids=ids, positions=zeros, **how)[0]


def by_head(logits, ids, how):
    """hidden of ones and a weight [V, 1] of the logits: products without rounding."""
    zeros, ones = torch.zeros_like(ids), logits.new_ones(len(ids), 1)
    keys = {"seed": 7, "sample_ids": ids, "positions": zeros}
    return linear_sample_mix(ones, logits[:, None], zeros, 1.0, **keys, **how)[0]


def by_shards(logits, ids, how):
    zeros, ones = torch.zeros_like(ids), logits.new_ones(len(ids), 1)
    keys = {"seed": 7, "sample_ids": ids, "positions": zeros, **how}
    shards = [(first, logits[first:last, None]) for first, last in ((0, 100), (100, 130), (130, SMALL_V))]
    parts = [linear_sample_shard(ones, weight, 1.0, first_id=first, **keys) for first, weight in shards]
    values, candidates = (torch.stack(part) for part in zip(*parts, strict=True))
    return combine_shards(values, candidates, zeros, 1.0, **keys)[0]


def by_reference(logits, ids, how):
    n = len(ids)
    values = [
        None if name not in how else torch.full((n,), how[name], dtype=dtype)
        for name, dtype in (("top_k", torch.int64), ("top_p", torch.float64), ("min_p", torch.float64))
    ]
    zeros, rows = torch.zeros_like(ids), logits.expand(n, -1)
    inverse = inverse_temperature(how.get("temperature", 1.0), rows)
    return reference_sampling.sample_mix(rows, zeros, zeros + 2**32, 7, ids, zeros, inverse, *values)[0]


def count(draw, logits, n, how):
    """How often each token is drawn in n draws: int64 [V]."""
    ids = torch.arange(n, device=logits.device).split(200_000)
    return sum(torch.bincount(draw(logits, part, how).cpu(), minlength=len(logits)) for part in ids).numpy()


def p_value_of_counts(counts, probs):
    """Chi-square of counts [V] against fp64 probabilities [V]; tokens expected under 5 times share one bin."""
    return p_value(np.repeat(np.arange(len(counts)), counts), probs)


@pytest.mark.skipif(backends.cpu.missing is not None, reason="minutes on the torch reference")
@pytest.mark.parametrize("n", [MANY // 4, pytest.param(MANY, marks=pytest.mark.slow)])
def test_many_draws(n):
    rarest = 10 / n
    logits = with_tails(120, rarest)  # two groups, one of them short
    counts, probs = count(by_logits, logits, n, {}), filtered_softmax(logits)
    rare = (probs < 10 * rarest) & (probs * n >= 5)
    assert rare.sum() >= 39  # the claim about rare tokens depends on bins of their own
    assert p_value_of_counts(counts, probs) > SMALLEST_P
    among = probs[rare] / probs[rare].sum() * counts[rare].sum()
    assert stats.chisquare(counts[rare], among).pvalue > SMALLEST_P
    assert stats.binomtest(int(counts[rare].sum()), n, probs[rare].sum()).pvalue > SMALLEST_P


def forms(*draws):
    """Each way to draw with each of the CASES that it has; shards have no filters."""
    return pytest.mark.parametrize(
        ("draw", "case"),
        [
            pytest.param(draw, case, id=f"{case}-{draw.__name__}")
            for case, how in CASES.items()
            for draw in draws
            if draw is not by_shards or how.keys() <= {"temperature"}
        ],
    )


@pytest.mark.slow
@forms(by_logits, by_head, by_shards, by_reference)
def test_ten_million_draws_of_every_filter_and_form(tailed, draw, case):
    how = CASES[case]
    assert p_value_of_counts(count(draw, tailed, MANY, how), filtered_softmax(tailed, **how)) > SMALLEST_P


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU_ONLY)])
@forms(by_logits, by_head, by_shards)
def test_ten_million_draws_of_triton(tailed, draw, case, device):
    how = CASES[case]
    counts = count(draw, tailed.to(device), MANY, how)
    assert p_value_of_counts(counts, filtered_softmax(tailed, **how)) > SMALLEST_P


@forms(by_logits, by_head, by_shards)
def test_every_filter_and_form(tailed, draw, case):
    """What the long test above does, on as many draws as are quick: rare tokens share a bin."""
    how = CASES[case]
    n = 10_000 if draw is not by_logits or "top_p" in how else 100_000
    assert p_value_of_counts(count(draw, tailed, n, how), filtered_softmax(tailed, **how)) > SMALLEST_P


def test_the_test_would_see_a_wrong_rare_token(tailed):
    """The measure itself: rare tokens drawn 1.5 times too often fail it; in a hundredth of the draws they would not."""
    probs = filtered_softmax(tailed)
    wrong = np.where(probs < 1e-5, 1.5 * probs, probs)
    generator = np.random.default_rng(0)
    assert p_value_of_counts(generator.multinomial(MANY, wrong / wrong.sum()), probs) < SMALLEST_P
    assert p_value_of_counts(generator.multinomial(MANY // 100, wrong / wrong.sum()), probs) > SMALLEST_P


# ---- Independence ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_logits(logits):
    return logits[:70]  # two groups


@pytest.mark.parametrize("bit", [0, 31, 32, 47, 62, 63])
def test_ids_that_differ_in_one_bit_are_independent(few_logits, bit):
    ids = torch.arange(200_000) * 2
    other = ids ^ (1 << bit if bit < 63 else -(2**63))
    first, second = (by_logits(few_logits, some, {}).numpy() for some in (ids, other))
    assert independent(first, second) > SMALLEST_P


@pytest.mark.parametrize("bit", [0, 15, 31])
def test_positions_that_differ_in_one_bit_are_independent(few_logits, bit):
    n = 200_000
    positions = torch.arange(n) * 2
    first, second = (draws(few_logits, n, positions=some)[0].numpy() for some in (positions, positions ^ (1 << bit)))
    assert independent(first, second) > SMALLEST_P


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 63])
def test_seeds_that_differ_in_one_bit_are_independent(few_logits, bit):
    first, second = (draws(few_logits, 200_000, seed=seed)[0].numpy() for seed in (12, 12 ^ (1 << bit)))
    assert independent(first, second) > SMALLEST_P


def test_mask_and_token_are_independent(logits):
    n = 200_000
    ids, zeros = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    tokens = draws(logits, n)[0].numpy()
    for shift in (0, 1):  # the mask of the same row, and that of the next position
        mask = self_mask(0, ids, zeros + shift, 0.5).numpy()
        table = np.zeros((8, 2))
        np.add.at(table, (tokens % 8, mask.astype(int)), 1)
        assert stats.chi2_contingency(table).pvalue > SMALLEST_P


@pytest.mark.parametrize("along", ["sample_ids", "positions", "seeds", "index"])
def test_noise_has_no_serial_correlation(along):
    """Uniforms of neighbours, 1 to 8 apart: each correlation of 200,000 pairs is normal with deviation n ** -0.5."""
    n = 200_000
    zeros, line = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    if along == "seeds":
        few = torch.arange(400)
        noise = torch.stack([gumbel_noise(seed, few, few, 1, stream=1)[:, 0] for seed in range(n // 400)])  # [500, 400]
    elif along == "index":
        noise = gumbel_noise(0, zeros[:1], zeros[:1], n, stream=1).T  # [n, 1]
    else:
        keys = (line, zeros) if along == "sample_ids" else (zeros, line)
        noise = gumbel_noise(0, *keys, 1, stream=1)  # [n, 1]
    uniform = torch.exp(-torch.exp(-noise.double())) - 0.5
    for lag in range(1, 9):
        products = uniform[lag:] * uniform[:-lag] * 12
        z = products.mean().item() * math.sqrt(products.numel())
        assert 2 * stats.norm.sf(abs(z)) > SMALLEST_P, (lag, z)
