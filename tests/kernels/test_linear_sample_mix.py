"""linear_sample_mix: the tokens of sample_mix on the same logits, and the promise on memory."""

import os
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import require_cpp
from torch.utils._python_dispatch import TorchDispatchMode

from selfgen_kernels import linear_sample_mix, sample_mix
from selfgen_kernels.backends.reference import head as reference_head
from selfgen_kernels.backends.reference import sampling as reference_sampling
from selfgen_kernels.call import Mask

N, D, V = 24, 32, 9001
FILTERS = [{}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 500, "top_p": 0.9, "min_p": 0.01}]


@pytest.fixture
def head():
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(N, D, generator=generator),
        "weight": torch.randn(V, D, generator=generator) / 2,
        "bias": torch.randn(V, generator=generator),
    }


def keys():
    return {"seed": 5, "sample_ids": torch.arange(N) // 6, "positions": torch.arange(N) % 6}


@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "+".join(f) or "none")
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_tokens_are_those_of_the_logits(head, filters, softcap, with_bias):
    if not with_bias:
        head["bias"] = None
    reference = torch.arange(N) + V
    logits = torch.nn.functional.linear(head["hidden"], head["weight"], head["bias"])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    temperature = torch.linspace(0.5, 1.5, N)
    temperature[::5] = 0
    how = keys() | filters | {"temperature": temperature}
    got, is_self = linear_sample_mix(
        head.pop("hidden"), head.pop("weight"), reference, 0.7, softcap=softcap, **head, **how
    )
    want, want_self = sample_mix(logits, reference, 0.7, **how)
    assert torch.equal(is_self, want_self)
    assert (got != want).sum() <= 1  # the products may round apart at a near tie
    assert torch.equal(got[~is_self], reference[~is_self])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(head, dtype):
    hidden, weight = head["hidden"].to(dtype), head["weight"].to(dtype)
    reference = torch.zeros(N, dtype=torch.int32)
    got, _ = linear_sample_mix(hidden, weight, reference, 1.0, **keys())
    want, _ = sample_mix(hidden @ weight.T, reference, 1.0, **keys())
    assert (got != want).sum() <= 1


@pytest.mark.parametrize("workspace", [1, 20, 100, 10**6])
@pytest.mark.parametrize("filters", [None, 500])
def test_sizes_of_blocks_do_not_matter(head, workspace, filters, monkeypatch):
    rows = torch.full((N,), 2**32), 5, torch.arange(N), torch.zeros(N, dtype=torch.int64), torch.ones(N)
    top_k = None if filters is None else torch.full((N,), filters)
    args = *head.values(), None, 1.0, torch.zeros(N, dtype=torch.int64), *rows, top_k, None, None
    want, *_ = reference_head.linear_sample_mix(*args)
    monkeypatch.setattr(reference_head, "WORKSPACE", workspace)
    monkeypatch.setattr(reference_head, "FILTER_WORKSPACE", workspace)
    got, *_ = reference_head.linear_sample_mix(*args)
    assert (got != want).sum() <= 1


def test_rows_do_not_see_their_batch(head):
    reference = torch.zeros(N, dtype=torch.int64)
    whole, _ = linear_sample_mix(head["hidden"], head["weight"], reference, 1.0, **keys())
    order = torch.arange(N - 1, -1, -1)
    how = {name: value if name == "seed" else value[order] for name, value in keys().items()}
    shuffled, _ = linear_sample_mix(head["hidden"][order], head["weight"], reference, 1.0, **how)
    assert (shuffled != whole[order]).sum() <= 1


def test_invalid_rows_keep_their_reference_and_are_counted(head):
    head["hidden"][3] = torch.nan
    status = torch.zeros((), dtype=torch.int64)
    reference = torch.full((N,), 4)
    tokens, _ = linear_sample_mix(head["hidden"], head["weight"], reference, 1.0, status=status, **keys())
    assert tokens[3] == 4
    assert status.item() == 1


@pytest.mark.parametrize("workspace", [1, 100, 10**6])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_min_reference_prob_is_that_of_the_logits(head, softcap, workspace, monkeypatch):
    """In chunks of any size; a reference in any of them, or in none."""
    monkeypatch.setattr(reference_head, "WORKSPACE", workspace)
    logits = torch.nn.functional.linear(*head.values()).double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    reference = torch.linspace(0, V - 1, N).long()
    reference[3], reference[4] = -1, V
    rows = torch.full((N,), 2**31), *keys().values()
    is_self = reference_sampling.is_self_of(Mask(*rows))
    got = torch.ops.selfgen.linear_reference_log_prob(*head.values(), softcap, 1.0, reference, *rows)
    want = logits.log_softmax(1).gather(1, reference.clamp(0, V - 1)[:, None])[:, 0].float()
    want[3:5] = -torch.inf
    torch.testing.assert_close(got, want.where(is_self, 0), rtol=2e-6, atol=1e-5)  # the products round, too
    assert 0 < is_self.sum() < N

    hidden, weight, bias = head.values()
    least = want[is_self & want.isfinite()].median().exp() * 1.01
    given_ = hidden, weight, reference, 0.5
    how = {"bias": bias, "softcap": softcap, **keys()}
    tokens, kept = linear_sample_mix(*given_, **how, min_reference_prob=float(least))
    drawn, _ = linear_sample_mix(*given_, **how)
    assert torch.equal(kept, is_self & (want >= least.log()))
    assert torch.equal(tokens, drawn.where(kept, reference))
    assert 0 < kept.sum() < is_self.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("n", "vocab_size"), [(0, 5), (1, 1), (1, 64), (3, 65), (40, 4000)])
def test_log_probs_of_any_size_and_dtype(dtype, n, vocab_size):
    """Of rows in any batch, and with any number of threads, the same bits."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 24, generator=generator).to(dtype) for size in (n, vocab_size))
    ids, threads = torch.arange(n), torch.get_num_threads()
    how = None, None, 0.5, ids % vocab_size, torch.full((n,), 2**32), 0, ids, ids
    got = torch.ops.selfgen.linear_reference_log_prob(hidden, weight, *how)
    want = reference_head.linear_reference_log_prob(hidden, weight, *how)
    torch.testing.assert_close(got, want, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5)
    for row in range(0, n, 13):
        some = [value[row : row + 1] if isinstance(value, torch.Tensor) else value for value in how]
        alone = torch.ops.selfgen.linear_reference_log_prob(hidden[row : row + 1], weight, *some)
        assert torch.equal(alone, got[row : row + 1])
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(torch.ops.selfgen.linear_reference_log_prob(hidden, weight, *how), got)
    finally:
        torch.set_num_threads(threads)


def test_a_row_without_probabilities_is_invalid_whatever_its_reference(head):
    head["hidden"][3] = torch.nan
    status = torch.zeros((), dtype=torch.int64)
    reference = torch.full((N,), V)
    how = keys() | {"status": status, "min_reference_prob": 0.5}
    tokens, is_self = linear_sample_mix(head["hidden"], head["weight"], reference, 1.0, **how)
    assert is_self.nonzero().tolist() == [[3]]
    assert status.item() == 1
    assert torch.equal(tokens, reference)


class PeakMemory(TorchDispatchMode):
    """Remembers the most bytes that the results of operators held at one time, those of `inputs` aside."""

    def __init__(self, *inputs):
        super().__init__()
        self.bytes = self.now = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in inputs}

    def free(self, storage, size):
        self.now -= size
        self.seen.discard(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage()._cdata in self.seen:
                continue
            storage = tensor.untyped_storage()
            self.seen.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.bytes = max(self.bytes, self.now)
        return result


@pytest.mark.parametrize(
    ("filters", "dtype"),
    [
        pytest.param(some, dtype, marks=[pytest.mark.slow] if dtype == torch.bfloat16 or len(some) == 1 else [])
        for some in FILTERS
        for dtype in (torch.float32, torch.bfloat16)
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else "+".join(value) or "none",
)
def test_the_reference_takes_an_eighth_of_the_logits(filters, dtype):
    n, vocab_size, hidden_size = (512 // dtype.itemsize, 1024, 4) if filters else (16, 65536, 4)
    hidden, weight = torch.randn(n, hidden_size).to(dtype), torch.randn(vocab_size, hidden_size).to(dtype)
    zeros = torch.zeros(n, dtype=torch.int64)
    values = [
        None if name not in filters else torch.full((n,), filters[name], dtype=dtype)
        for name, dtype in (("top_k", torch.int64), ("top_p", torch.float64), ("min_p", torch.float64))
    ]
    sampling = zeros + 2**32, 0, torch.arange(n), zeros, torch.ones(n), *values
    logits_bytes = n * vocab_size * dtype.itemsize
    with PeakMemory(hidden, weight, *(value for value in sampling if isinstance(value, torch.Tensor))) as peak:
        reference_head.linear_sample_mix(hidden, weight, None, 30.0, 1.0, zeros, *sampling)
        assert 0 < peak.bytes <= logits_bytes // 8
        if not filters:
            reference_head.linear_reference_log_prob(hidden, weight, None, 30.0, 1.0, zeros, *sampling[:4])
    assert peak.bytes <= logits_bytes // 8
    with PeakMemory(weight) as peak:
        reference_sampling.sample_mix(hidden @ weight.T, zeros, *sampling)
    assert peak.bytes >= 2 * logits_bytes  # the measure itself does see them


# `hidden` and `weight` of the C++ kernel are small beside its logits, so that what the process grows by is its own.
MEASURE = """
import sys
import torch
import selfgen_kernels

torch.set_num_threads(2)
n, vocab_size, dtype, top_k = int(sys.argv[1]), 2**20, getattr(torch, sys.argv[2]), int(sys.argv[3])
hidden, weight = torch.randn(n, 4).to(dtype), torch.randn(vocab_size, 4).to(dtype)

def run(hidden, weight):
    rows = torch.arange(len(hidden))
    filters = {"top_k": top_k, "top_p": 0.9} if top_k else {}
    selfgen_kernels.linear_sample_mix(hidden, weight, rows, 1.0, seed=0, sample_ids=rows, positions=rows, **filters)

def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

run(hidden, weight[:1000])
open("/proc/self/clear_refs", "w").write("5")
before = peak()
run(hidden, weight)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory of a process")
@pytest.mark.parametrize("top_k", [0, 50, 30_000, 500_000], ids=["none", "few", "many", "too many to keep"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("n", [8, 64])
def test_the_kernel_takes_an_eighth_of_the_logits(n, dtype, top_k):
    require_cpp()
    command = [sys.executable, "-c", MEASURE, str(n), dtype, str(top_k)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row = 2**20 * 4  # fp32
    of_logits = n * 2**20 * getattr(torch, dtype).itemsize // 8 if top_k else 0
    assert int(done.stdout) <= of_logits + row // 32 * 2 + 2**21, "2 threads, and 2 MiB for pages of libraries"


def test_no_rows(head):
    empty = torch.empty(0, dtype=torch.int64)
    tokens, is_self = linear_sample_mix(
        head["hidden"][:0], head["weight"], empty, 1.0, seed=0, sample_ids=empty, positions=empty, top_k=3
    )
    assert tokens.shape == is_self.shape == (0,)
