"""What is drawn is a function of the logits alone: every backend gives the reference's bits, on adversarial rows."""

import pytest
import torch
from adversarial import FILTERS, adversarial_logits, adversarial_rows
from conftest import _TRITON, DEVICE, GPU_ONLY, ON_GPU, TRITON_MARKS, Backend, moved

from selfgen_kernels.backends.reference import elementary, philox
from selfgen_kernels.backends.reference import sampling as reference_sampling
from selfgen_kernels.backends.reference.scaling import filter_cutoff, scaled
from selfgen_kernels.backends.triton.configuration import TARGETS
from selfgen_kernels.call import Sampling

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, FLOATS[0]), (63, FLOATS[1]), (65, FLOATS[2]), *((1001, dtype) for dtype in FLOATS)]
SOME_FILTERS = [name for name in FILTERS if name != "none"]


def with_triton(sizes, filters):
    """Every size with every filter, for Triton; in the interpreter only a quarter is fast, with each of both."""
    return [
        pytest.param(
            "triton", *size, name, marks=[*TRITON_MARKS, *([] if ON_GPU or (i + j) % 4 == 0 else [pytest.mark.slow])]
        )
        for i, size in enumerate(sizes)
        for j, name in enumerate(filters)
    ]


def is_interpreted(backend):
    return backend.name == "triton" and backend.device == "cpu"


def assert_equal(got, want):
    assert got.dtype == want.dtype
    assert torch.equal(got, want), f"{(got != want).nonzero()[:9].tolist()} of {list(want.shape)}"


# ---- The functions themselves ----------------------------------------------------------------------------------------


def test_exp_is_accurate_and_at_most_1():
    x = -torch.cat([torch.linspace(0, 87, 400_001), torch.logspace(-38, 1, 4001), torch.zeros(1)])
    got = elementary.exp_(x.clone())
    want = x.double().exp()
    assert ((got.double() - want) / want).abs().max() < 2**-22
    assert got[-1] == 1
    assert got.max() == 1
    assert elementary.exp_(torch.tensor([-88.0, -1e30, -torch.inf])).max() < 2e-38


def test_log_is_accurate():
    x = torch.cat(
        [torch.logspace(-37, 37, 400_001), 1 + torch.linspace(-0.3, 0.5, 100_001), torch.full((1,), 2.0**-126)]
    )
    got, want = elementary.log(x), x.double().log()
    away = want != 0
    assert ((got.double() - want)[away] / want[away]).abs().max() < 2**-22
    assert (got[~away] == 0).all()
    assert (elementary.log(torch.linspace(1, 70, 100_001)) >= 0).all()


def test_log_of_shares():
    shares = torch.tensor(
        [0.0, 5e-324, 1e-300, 2.0**-127, 2.0**-126, 0.25, 1.0, -1e-300, torch.nan], dtype=torch.float64
    )
    got = elementary.log_of_share(shares)
    assert got[:4].isneginf().all()
    torch.testing.assert_close(got[4:7].double(), shares[4:7].log(), rtol=2**-22, atol=0)
    assert got[7:].isnan().all()


def test_a_group_is_as_heavy_as_its_terms():
    z = adversarial_logits(64 * 50)[:-3].unflatten(1, (-1, 64))  # [R, 50, 64]
    peak, mass = elementary.group_masses(z)
    assert torch.equal(peak, z.amax(-1))
    want = (z.double() - peak.double()[..., None].nan_to_num(neginf=0)).exp().sum(-1)
    finite = peak.isfinite()
    assert ((mass.double() * 2**-23 - want)[finite] / want[finite]).abs().max() < 2**-18
    assert (mass[~finite] == 0).all()
    assert torch.equal(elementary.group_masses(z.flip(-1))[1], mass)  # no order


def test_weights_are_whole_and_near():
    e = torch.cat(
        [torch.rand(10_000), torch.logspace(-38, 0, 4001), torch.tensor([0.0, 2**-11, 2**-35, 3 * 2**-35, 1, 64])]
    )
    weights = elementary.weights(e.clone())
    assert weights.dtype == torch.int64
    assert (weights.double() - e.double() * 2**34).abs().max() <= 0.5
    assert weights[-6:].tolist() == [0, 2**23, 0, 2, 2**34, 2**40]


def test_no_kernel_that_draws_may_fuse_a_multiplication_with_an_addition():
    pytest.importorskip("triton")
    from selfgen_kernels.backends.triton import (
        activation,
        filters,
        head,
        head_log_prob,
        noise,
        norm,
        passes,
        rotary,
        sampling,
    )

    for module in (activation, filters, head, head_log_prob, noise, norm, passes, rotary, sampling):
        for target in TARGETS:
            for choice in module.configurations(target):
                assert choice.options["enable_fp_fusion"] is False, choice.name


# ---- Noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [philox.MASK, philox.GROUP, philox.TOKEN, 15])
@pytest.mark.each_value
def test_noise_is_equal(fast, reference, stream):
    ids, positions = torch.tensor([-(2**63), -1, 2**40 + 5, 7]), torch.tensor([2**32 - 1, 0, 77, 2**31])
    got, want = (b.gumbel_noise(-(2**63) + 11, ids, positions, 2**16, stream) for b in (fast, reference))
    assert_equal(got, want)


@pytest.mark.parametrize("fast", [_TRITON], indirect=True)
def test_noise_of_chosen_words_is_equal(fast):
    """The ends of the range, where 1 - w is rounded, and where its exponent changes."""
    import specimens

    around = [round(share * 2**32) for share in (2**-20, 0.25, 1 - 0.5**0.5, 0.5, 0.75, 1 - 2**-24)]
    words = torch.cat(
        [torch.arange(512), 2**32 - 1 - torch.arange(512), *(torch.arange(x - 256, x + 256) for x in around)]
    )
    out = torch.zeros(len(words), device=DEVICE)
    specimens.gumbel_kernel[(len(words) // 512,)](words.to(DEVICE), out, SIZE=512)
    assert_equal(out.cpu(), philox.gumbel_from_words(words))


# ---- Tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fast", "vocab_size", "dtype", "filters"),
    [*(("cpp", *size, name) for size in SIZES for name in FILTERS), *with_triton(SIZES, FILTERS)],
    ids=str,
    indirect=["fast"],
)
def test_tokens_are_equal(fast, reference, vocab_size, filters, dtype):
    logits, inverse, some = adversarial_rows(vocab_size, dtype, filters, 1 if is_interpreted(fast) else 5)
    got, want = (b.sample_mix(logits, inv_temperature=inverse, seed=vocab_size, **some) for b in (fast, reference))
    for ours, theirs in zip(got, want, strict=True):
        assert_equal(ours, theirs)
    assert want[1].all()
    assert want[2][-3:].all()


@pytest.mark.parametrize("filters", FILTERS)
def test_tokens_of_a_large_odd_vocabulary_are_equal(fast, reference, filters):
    if is_interpreted(fast):
        pytest.skip("minutes in the interpreter")
    for dtype in (torch.float32, torch.bfloat16):
        logits, inverse, some = adversarial_rows(50_257, dtype, filters)
        got, want = (b.sample_mix(logits, inv_temperature=inverse, seed=1, **some) for b in (fast, reference))
        for ours, theirs in zip(got, want, strict=True):
            assert_equal(ours, theirs)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU_ONLY)])
@pytest.mark.parametrize("filters", FILTERS)
def test_the_reference_gives_the_same_on_a_gpu(reference, filters, device):
    there = Backend("reference", device, philox, reference_sampling)
    logits, inverse, some = adversarial_rows(5001, torch.float32, filters)
    got, want = (b.sample_mix(logits, inv_temperature=inverse, seed=3, **some) for b in (there, reference))
    for ours, theirs in zip(got, want, strict=True):
        assert_equal(ours, theirs)
    assert_equal(there.reference_log_prob(logits), reference.reference_log_prob(logits))
    keys = torch.arange(99), torch.arange(99) * 7
    assert_equal(there.gumbel_noise(5, *keys, 5000, 1), reference.gumbel_noise(5, *keys, 5000, 1))


def assert_survivors_are_equal(logits, inverse, some):
    """What Triton's filters `some` keep of valid rows is what the reference's keep."""
    from selfgen_kernels.backends.triton import filters as kernels

    ids = torch.arange(len(logits))
    values = (some.get(name) for name in ("top_k", "top_p", "min_p"))
    how = Sampling(ids * 0 + 2**32, 0, ids, ids, inverse, *values)
    want = filter_cutoff(logits, how)
    got = kernels.filter_cutoff(logits.to(DEVICE), Sampling(*moved(how, DEVICE))).cpu()
    z = scaled(logits, inverse)
    kept, want_kept = ((z >= cutoff[:, None]) & (z > -torch.inf) for cutoff in (got, want))
    assert_equal(kept, want_kept)


@pytest.mark.parametrize(
    ("fast", "vocab_size", "dtype", "filters"), with_triton(SIZES[1:], SOME_FILTERS), ids=str, indirect=["fast"]
)
def test_survivors_of_filters_are_equal(fast, vocab_size, filters, dtype):
    logits, inverse, some = adversarial_rows(vocab_size, dtype, filters, 1 if is_interpreted(fast) else 5)
    valid = slice(-3)
    assert_survivors_are_equal(logits[valid], inverse[valid], {name: value[valid] for name, value in some.items()})


@pytest.mark.parametrize("fast", [_TRITON], indirect=True)
@pytest.mark.parametrize("filters", SOME_FILTERS)
@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(32_001, FLOATS[0]), (50_257, FLOATS[1]), pytest.param(128_257, FLOATS[1], marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.each_value
def test_survivors_of_large_odd_vocabularies_are_equal(fast, vocab_size, dtype, filters):
    """A wide row, one of ties at every cutoff, one with few finite logits, and two with a peak and a flat rest."""
    logits, _, some = adversarial_rows(vocab_size, dtype, filters, 1)
    rows = torch.tensor([1, 6, 16, 19, 25])
    assert_survivors_are_equal(logits[rows], torch.ones(5), {name: value[rows] for name, value in some.items()})


@pytest.mark.parametrize("fast", [_TRITON], indirect=True)
@pytest.mark.parametrize("filters", SOME_FILTERS)
def test_survivors_in_longer_runs_are_equal(fast, filters, monkeypatch):
    """As of vocabularies with more than 4,096 runs of 64."""
    from selfgen_kernels.backends.triton import filters as kernels

    monkeypatch.setattr(kernels, "MOST_RUNS", 4)
    assert kernels.run_length(900) == 256
    logits, inverse, some = adversarial_rows(900, torch.bfloat16, filters, 1)
    valid = slice(0, -3, 2)
    assert_survivors_are_equal(logits[valid], inverse[valid], {name: value[valid] for name, value in some.items()})


@pytest.mark.parametrize("fast", [_TRITON], indirect=True)
def test_what_ties_with_the_kth_counts_in_top_p(fast):
    """Also in runs where nothing is above it: one part in 2,400 is above, here, and not one in 25."""
    logits = torch.zeros(1, 6400)
    logits[0, 3] = 1.0
    some = {"top_k": torch.tensor([5]), "top_p": torch.tensor([0.01], dtype=torch.float64)}
    assert_survivors_are_equal(logits, torch.ones(1), some)


@pytest.mark.parametrize("fast", [_TRITON], indirect=True)
def test_filters_look_at_the_runs_that_can_matter(fast, monkeypatch):
    """At none where all logits are equal, and at all where they are nearly equal."""
    from selfgen_kernels.backends.triton import filters as kernels

    if not is_interpreted(fast):
        pytest.skip("a compiled kernel calls nothing that Python sees")
    looked_at, sweep = [], kernels.weights_not_below

    def spy(logits, order, taken, *rest, **sizes):
        looked_at.append(int(taken.handle.data[0]))
        return sweep(logits, order, taken, *rest, **sizes)

    monkeypatch.setattr(kernels, "weights_not_below", spy)
    monkeypatch.setattr(kernels, "BLOCK", 256)
    runs = 100
    wide = torch.randn(1, 64 * runs, generator=torch.Generator().manual_seed(0)) * 3
    for logits, name, value, most in (
        (wide, "top_k", torch.tensor([5]), 5),
        (wide, "top_p", torch.tensor([0.3]).double(), 24),
        (torch.zeros(1, 64 * runs), "top_k", torch.tensor([5]), 0),
        (1e-3 * wide, "top_p", torch.tensor([0.9]).double(), runs),
    ):
        looked_at.clear()
        assert_survivors_are_equal(logits, torch.ones(1), {name: value})
        assert max(looked_at, default=0) <= most, name
    assert max(looked_at) == runs


# ---- Log probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 63, 65, 9000])
@pytest.mark.each_pair
def test_log_probs_are_equal(fast, reference, vocab_size, dtype):
    logits = adversarial_logits(vocab_size, dtype)
    tokens = torch.arange(len(logits)) * 997 % (vocab_size + 1)
    assert_equal(fast.reference_log_prob(logits, tokens), reference.reference_log_prob(logits, tokens))


@pytest.mark.parametrize("vocab_size", [50_257, 600_000])
def test_log_probs_of_a_large_vocabulary_are_equal(fast, reference, vocab_size):
    if is_interpreted(fast):
        pytest.skip("minutes in the interpreter")
    logits = adversarial_logits(vocab_size)
    tokens = torch.arange(len(logits)) * 99_991 % vocab_size
    assert_equal(fast.reference_log_prob(logits, tokens), reference.reference_log_prob(logits, tokens))
