"""reference_log_prob and `min_reference_prob`: every backend against fp64, and what the option does to a call."""

import pytest
import torch
from conftest import _TRITON, REFERENCE
from test_sample_mix import random_logits

from selfgen_kernels import linear_sample_mix, sample_mix
from selfgen_kernels.backends.reference.philox import self_mask

INF = torch.inf
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def exact(logits, reference):
    return logits.double().log_softmax(1).gather(1, reference[:, None])[:, 0].float()


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 8192, 8193, 40_000])
@pytest.mark.each_pair
def test_any_dtype_and_vocabulary_size(backend, vocab_size, dtype):
    logits = random_logits(6, vocab_size, dtype)
    logits[1] += 50  # the maximum is subtracted
    logits[2] -= 50
    logits[3, : vocab_size // 2] = -INF  # spans with nothing in them
    reference = torch.tensor([0, vocab_size - 1, vocab_size // 2, vocab_size - 1, vocab_size // 3, 0])
    assert_close(backend.reference_log_prob(logits, reference), exact(logits, reference))


def test_a_flat_row_and_a_steep_one(backend):
    logits = torch.zeros(2, 100_000)
    logits[1] = torch.linspace(-100, 100, 100_000)  # its peak rises all the way
    reference = torch.tensor([77, 99_000])
    assert_close(backend.reference_log_prob(logits, reference), exact(logits, reference))


def test_any_strides(backend):
    dense, reference = random_logits(5, 300), torch.arange(5) * 70
    want = backend.reference_log_prob(dense, reference)
    padded = torch.full((5, 700), torch.nan)
    padded[:, :600:2] = dense
    assert torch.equal(backend.reference_log_prob(padded[:, :600:2], reference), want)
    assert torch.equal(backend.reference_log_prob(dense.T.contiguous().T, reference), want)
    padded[:, 100:400] = dense
    assert torch.equal(backend.reference_log_prob(padded[:, 100:400], reference), want)
    assert torch.equal(backend.reference_log_prob(dense, reference.repeat_interleave(2)[::2]), want)
    expanded = backend.reference_log_prob(dense[:1].expand(5, -1), reference)
    assert torch.equal(expanded, backend.reference_log_prob(dense[:1].repeat(5, 1), reference))


def test_a_reference_outside_of_the_vocabulary_has_no_probability(backend):
    for outside in (-1, 130, -(2**63), 2**63 - 1, 2**32):
        got = backend.reference_log_prob(random_logits(2, 130), torch.tensor([outside, 129]))
        assert got[0] == -INF
        assert got[1].isfinite()


def test_rows_without_probabilities_give_0(backend):
    logits = random_logits(7, 9000)
    logits[0, 8999], logits[1, 0], logits[2], logits[3, 5] = torch.nan, INF, -INF, -INF
    logits[4, 0], logits[4, 1] = torch.nan, INF
    logits[5, torch.arange(9000) != 77] = -INF
    reference = torch.tensor([3, 9000, -1, 5, 1, 77, 3])
    got = backend.reference_log_prob(logits, reference)
    assert got[:6].tolist() == [0, 0, 0, -INF, 0, 0]
    assert got[6] < 0


def test_rows_that_keep_their_reference_give_0(backend):
    logits = random_logits(40, 200)
    ids = torch.arange(40)
    is_self = self_mask(0, ids, ids * 0, torch.full((40,), 2**31))
    got = backend.reference_log_prob(logits, torch.full((40,), 9), threshold=2**31)
    assert (got[~is_self] == 0).all()
    assert_close(got[is_self], exact(logits, torch.full((40,), 9))[is_self])
    assert 0 < is_self.sum() < 40


def test_rows_do_not_see_their_batch(backend):
    logits, reference = random_logits(6, 9000), torch.arange(6)
    whole = backend.reference_log_prob(logits, reference)
    assert torch.equal(backend.reference_log_prob(logits.flip(0), reference.flip(0)), whole.flip(0))
    assert torch.equal(backend.reference_log_prob(logits[2:3], reference[2:3]), whole[2:3])


def test_no_rows(backend):
    assert backend.reference_log_prob(torch.empty(0, 10)).shape == (0,)


@pytest.mark.parametrize("fast", [_TRITON], indirect=True)
@pytest.mark.parametrize("span", [4, 16, 64])
def test_sizes_of_spans_do_not_matter(fast, span, monkeypatch):
    from selfgen_kernels.backends.triton import sampling

    logits = random_logits(4, 4200)
    monkeypatch.setattr(sampling, "SPAN", span)
    assert torch.equal(fast.reference_log_prob(logits), REFERENCE.reference_log_prob(logits))


def test_threads_do_not_change_a_bit():
    ids, threads, results = torch.arange(3), torch.get_num_threads(), []
    args = random_logits(3, 100_000), ids, torch.full((3,), 2**32), 0, ids, ids
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(torch.ops.selfgen.reference_log_prob(*args))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- The option of sample_mix ----------------------------------------------------------------------------------------

N, V = 200, 50
KEYS = {"seed": 4, "sample_ids": torch.arange(N), "positions": torch.arange(N)}


@pytest.fixture
def drawn():
    """logits, reference, and what a call without the option gives."""
    logits, reference = random_logits(N, V), torch.arange(N) % V
    return logits, reference, *sample_mix(logits, reference, 0.6, temperature=0.7, **KEYS)


@pytest.mark.parametrize("least", [1e-4, 0.02, 0.3, torch.linspace(0, 1, N), torch.linspace(0, 0.05, N).double()])
def test_a_row_is_sampled_where_the_reference_is_likely_enough(drawn, least):
    logits, reference, tokens, is_self = drawn
    got, got_self = sample_mix(logits, reference, 0.6, temperature=0.7, min_reference_prob=least, **KEYS)
    assert torch.equal(got_self, is_self & (exact(logits, reference).exp() >= least))
    assert torch.equal(got, torch.where(got_self, tokens, reference))
    assert 0 < got_self.sum() < is_self.sum()


def test_0_changes_nothing(drawn):
    logits, reference, tokens, is_self = drawn
    for some in (reference, reference - 7, reference + V):
        how = {"temperature": 0.7, **KEYS}
        got, got_self = sample_mix(logits, some, 0.6, min_reference_prob=0, **how)
        assert torch.equal(got_self, is_self)
        assert torch.equal(got, torch.where(is_self, tokens, some))


def test_1_leaves_what_is_certain():
    logits = torch.full((3, V), -INF)
    logits[0, 5], logits[1, [5, 6]], logits[2, 6] = 1.0, 1.0, 1.0
    keys = {name: value if name == "seed" else value[:3] for name, value in KEYS.items()}
    _, is_self = sample_mix(logits, torch.full((3,), 5), 1.0, min_reference_prob=1.0, **keys)
    assert is_self.tolist() == [True, False, False]


def test_invalid_rows_are_counted_and_no_others():
    logits = random_logits(5, V)
    logits[0, 7], logits[1, 7], logits[2] = torch.nan, INF, -INF
    keys = {name: value if name == "seed" else value[:5] for name, value in KEYS.items()}
    status, reference = torch.zeros((), dtype=torch.int64), torch.arange(5) + V  # of no probability
    tokens, is_self = sample_mix(logits, reference, 1.0, min_reference_prob=0.5, status=status, **keys)
    assert is_self.tolist() == [True, True, True, False, False]
    assert torch.equal(tokens, reference)
    assert status.item() == 3


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 4, 5, 7, 10, 64, 100])
def test_a_probability_right_at_the_threshold_is_enough(vocab_size):
    """Of uniform logits, by both ops."""
    keys = {"seed": 0, "sample_ids": torch.arange(3), "positions": torch.zeros(3, dtype=torch.int64)}
    reference, least = torch.zeros(3, dtype=torch.int64), 1 / vocab_size
    _, of_logits = sample_mix(torch.zeros(3, vocab_size), reference, 1.0, min_reference_prob=least, **keys)
    head = torch.zeros(3, 4), torch.zeros(vocab_size, 4)
    _, of_head = linear_sample_mix(*head, reference, 1.0, min_reference_prob=least, **keys)
    assert of_logits.all()
    assert of_head.all()
