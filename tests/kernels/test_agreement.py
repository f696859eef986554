"""Every backend gives the reference's numbers and tokens, bit for bit: known answers, many noise values, many rows."""

import pytest
import torch
from conftest import DEVICE, TRITON_MARKS, cpp_backend

from selfgen_kernels.backends.reference import philox

V = 300
ROWS, INTERPRETED_ROWS = 10_000, 20

KNOWN = [  # Random123's vectors: counter, key, words
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, (2**32 - 1, 2**32 - 1), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def as_keys(counter, key):
    """stream, first index, position, sample id and seed (both signed) that make this counter and key."""
    c0, c1, c2, c3 = counter
    signed = [word - 2**64 if word >= 2**63 else word for word in (c2 | c3 << 32, key[0] | key[1] << 32)]
    return c0 >> 28, (c0 & (2**28 - 1)) * 4, c1, *signed


@pytest.mark.parametrize(("counter", "key", "words"), [pytest.param(*known, marks=TRITON_MARKS) for known in KNOWN])
def test_known_answers_in_triton(counter, key, words):
    pytest.importorskip("triton")
    import specimens

    stream, first, position, sample_id, seed = as_keys(counter, key)
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    rows = (torch.tensor([value], device=DEVICE) for value in (sample_id, position))
    specimens.words_kernel[(1,)](out, seed, *rows, first, STREAM=stream)
    assert out.tolist() == words


def test_the_first_known_answer_in_every_backend(backend):
    zero = torch.zeros(1, dtype=torch.int64)
    words = torch.tensor([KNOWN[0][2]])
    assert torch.equal(backend.gumbel_noise(0, zero, zero, 4, 0), philox.gumbel_from_words(words))
    assert not backend.self_mask(0, zero, zero, words[0, :1]).any()
    assert backend.self_mask(0, zero, zero, words[0, :1] + 1).all()


@pytest.mark.slow
def test_the_third_known_answer_far_into_a_row():
    """Index 285,059,616 of stream 2: 1.1 GB of noise for its last four numbers."""
    backend = cpp_backend()  # the others are asked for these words directly
    counter, key, words = KNOWN[2]
    stream, first, position, sample_id, seed = as_keys(counter, key)
    noise = backend.gumbel_noise(seed, torch.tensor([sample_id]), torch.tensor([position]), first + 4, stream)
    assert torch.equal(noise[0, -4:], philox.gumbel_from_words(torch.tensor(words)))


@pytest.mark.parametrize("seed", [3, -(2**63)])
def test_a_seed_in_memory_gives_the_same_tokens(backend, seed):
    """Kernels of a GPU read it themselves; the operator of others looks at it first."""
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(6))
    in_memory = torch.tensor([seed], device=backend.device)
    for filters in ({}, {"top_k": 30}):
        got, want = (backend.sample_mix(logits, seed=one, **filters) for one in (in_memory, seed))
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("filters", [{}, {"top_k": 30, "top_p": 0.95, "min_p": 1e-3}], ids=["none", "all"])
@pytest.mark.each_value
def test_tokens_of_many_rows_are_equal(fast, reference, filters):
    n = INTERPRETED_ROWS if fast.name == "triton" and fast.device == "cpu" else ROWS
    logits = torch.randn(n, V, generator=torch.Generator().manual_seed(6)) * 2
    (got, _, invalid), (want, _, _) = (b.sample_mix(logits, **filters) for b in (fast, reference))
    assert not invalid.any()
    assert torch.equal(got, want)
