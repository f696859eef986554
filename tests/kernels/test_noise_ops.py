"""gumbel_noise and self_mask: the generator's known answers, and every backend against the reference."""

import math

import pytest
import torch
from scipy import stats

from selfgen_kernels import gumbel_noise, self_mask
from selfgen_kernels.backends.reference import philox

SEEDS = [0, 1, -1, 2**62 + 12345, -(2**63), 2**63 - 1]
SAMPLE_IDS = torch.tensor([0, 1, -1, 2**40 + 3, -(2**63), 2**63 - 1])
POSITIONS = torch.tensor([0, 2**32 - 1, 7, 2**31, 1, 12345])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, (2**32 - 1, 2**32 - 1), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers_of_random123(counter, key, words):
    given = tuple(torch.tensor([word]) for word in counter)
    assert [word.item() for word in philox.philox4x32(given, key)] == words


def test_counter_layout_reaches_the_known_answer():
    """The second vector's counter as (stream 15, the last index), position, sample id; its key as a seed."""
    last = gumbel_noise(2**64 - 1, torch.tensor([-1]), torch.tensor([2**32 - 1]), 8, stream=15)
    words = philox.random_words(-1, torch.tensor([-1]), torch.tensor([2**32 - 1]), 8, 15)
    assert torch.equal(last, philox.gumbel_from_words(words))
    c0 = torch.tensor([(15 << 28) | 1])
    ones = torch.tensor([2**32 - 1])
    second_block = philox.philox4x32((c0, ones, ones, ones), (2**32 - 1, 2**32 - 1))
    assert words[0, 4:].tolist() == [word.item() for word in second_block]


def test_gumbel_of_every_kind_of_word_is_finite_and_accurate():
    words = torch.cat(
        [torch.arange(4096), 2**32 - 1 - torch.arange(4096), 2 ** torch.arange(32), torch.arange(0, 2**32, 999983)]
    )
    gumbel = philox.gumbel_from_words(words)
    assert gumbel.isfinite().all()
    assert -2.82 < gumbel.min() < -2.8
    assert 22.87 < gumbel.max() < 22.88
    # Against fp64 the upper half, which decides an argmax, is exact to a few ulp; the lower has w's own resolution.
    uniform = (words.double() + 0.5) * 2**-32
    exact = -torch.log(-torch.log1p(-uniform))
    upper = uniform < 0.5
    assert (gumbel - exact)[upper].abs().div(exact[upper].abs().clamp(min=1)).max() < 3e-7


@pytest.mark.parametrize("seed", SEEDS)
def test_words_agree_bit_for_bit(fast, seed):
    """A threshold of r excludes r, one of r + 1 includes it: only r itself passes both."""
    word = philox.random_words(seed, SAMPLE_IDS, POSITIONS, 1, philox.MASK)[:, 0]
    assert not fast.self_mask(seed, SAMPLE_IDS, POSITIONS, word).any()
    assert fast.self_mask(seed, SAMPLE_IDS, POSITIONS, word + 1).all()


@pytest.mark.parametrize("size", [0, 1, 3, 64, 1030])
def test_noise_agrees_bit_for_bit(fast, reference, size):
    for seed in SEEDS:
        got, want = (b.gumbel_noise(seed, SAMPLE_IDS, POSITIONS, size, 1) for b in (fast, reference))  # [6, size]
        assert got.shape == (6, size)
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


def test_noise_is_that_of_its_key_alone(backend):
    whole = backend.gumbel_noise(3, SAMPLE_IDS, POSITIONS, 200, 2)  # [6, 200]
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(backend.gumbel_noise(3, SAMPLE_IDS[order], POSITIONS[order], 200, 2), whole[order])
    assert torch.equal(backend.gumbel_noise(3, SAMPLE_IDS[2:3], POSITIONS[2:3], 70, 2), whole[2:3, :70])


def test_noise_is_gumbel():
    noise = gumbel_noise(0, torch.arange(1000), torch.zeros(1000, dtype=torch.int32), 1000, stream=2)
    assert stats.kstest(noise.flatten().numpy()[:100_000], "gumbel_r").pvalue > 1e-3
    tail = (noise > 6).sum().item()  # P = 1 - exp(-exp(-6)) = 0.0024757
    assert stats.binomtest(tail, noise.numel(), -math.expm1(-math.exp(-6))).pvalue > 1e-3


def test_every_part_of_the_key_matters():
    ids, positions = torch.tensor([5]), torch.tensor([9])
    base = gumbel_noise(1, ids, positions, 4096, stream=1)
    others = [
        gumbel_noise(2, ids, positions, 4096, stream=1),
        gumbel_noise(1 + 2**32, ids, positions, 4096, stream=1),
        gumbel_noise(1, ids + 1, positions, 4096, stream=1),
        gumbel_noise(1, ids + 2**32, positions, 4096, stream=1),
        gumbel_noise(1, ids, positions + 1, 4096, stream=1),
        gumbel_noise(1, ids, positions, 4096, stream=2),
    ]
    for other in others:
        assert abs(stats.pearsonr(base[0].numpy(), other[0].numpy()).statistic) < 5 / math.sqrt(4096)


@pytest.mark.parametrize("prob", [0.0, 2**-20, 0.1, 0.5, 0.999, 1.0])
def test_mask_frequency(prob):
    n = 1_000_000
    mask = self_mask(11, torch.arange(n) // 1000, torch.arange(n) % 1000, prob)
    if prob in (0.0, 1.0):
        assert mask.all() if prob else not mask.any()
    assert stats.binomtest(mask.sum().item(), n, prob).pvalue > 1e-3


def test_mask_takes_a_probability_per_row_and_int32():
    ids, positions = torch.arange(6, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    prob = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 0.5])
    mask = self_mask(0, ids, positions, prob)
    assert mask.tolist() == self_mask(0, ids.long(), positions.long(), prob.double()).tolist()
    assert mask[[1, 4]].all()
    assert not mask[[0, 3]].any()


def test_masks_are_nested_in_the_probability():
    ids = torch.arange(1000)
    low, high = (self_mask(0, ids, ids, prob) for prob in (0.3, 0.6))
    assert not (low & ~high).any()


def test_signed_and_unsigned_seeds_are_the_same_bits():
    noise = [gumbel_noise(seed, SAMPLE_IDS, POSITIONS, 8, stream=0) for seed in (-1, 2**64 - 1)]
    assert torch.equal(*noise)


def test_no_rows():
    empty = torch.empty(0, dtype=torch.int64)
    assert gumbel_noise(0, empty, empty, 5, stream=0).shape == (0, 5)
    assert self_mask(0, empty, empty, 0.5).shape == (0,)
