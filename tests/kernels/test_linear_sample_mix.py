"""linear_sample_mix: the tokens of sample_mix on the same logits, and the promise on memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selfgen_kernels import linear_sample_mix, sample_mix
from selfgen_kernels.backends.reference import sampling as reference_sampling

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


@pytest.mark.parametrize("chunk", [64, 128, 2048, 2**20])
def test_vocabulary_chunks_do_not_matter(head, chunk, monkeypatch):
    args = head["hidden"], head["weight"], torch.zeros(N, dtype=torch.int64), 1.0
    want, _ = linear_sample_mix(*args, **keys())
    monkeypatch.setattr(reference_sampling, "VOCAB_CHUNK", chunk)
    got, _ = linear_sample_mix(*args, **keys())
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


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operator's result had, views of `inputs` aside."""

    def __init__(self, *inputs):
        super().__init__()
        self.elements = 0
        self.inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.inputs:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "+".join(f) or "none")
def test_logits_are_never_in_memory_as_a_whole(filters):
    n, vocab_size, hidden_size = 16, 65536, 4
    hidden, weight = torch.randn(n, hidden_size), torch.randn(vocab_size, hidden_size)
    zeros = torch.zeros(n, dtype=torch.int64)
    values = (
        None if name not in filters else torch.full((n,), filters[name], dtype=dtype)
        for name, dtype in (("top_k", torch.int64), ("top_p", torch.float64), ("min_p", torch.float64))
    )
    sampling = zeros + 2**32, 0, torch.arange(n), zeros, torch.ones(n), *values
    with LargestTensor(weight) as largest:
        reference_sampling.linear_sample_mix(hidden, weight, None, 30.0, 1.0, zeros, *sampling)
    assert largest.elements <= n * vocab_size // 8
    with LargestTensor(weight) as largest:
        reference_sampling.sample_mix(hidden @ weight.T, zeros, *sampling[:5], None, None, None)
    assert largest.elements == n * vocab_size  # the measure itself does see it


def test_no_rows(head):
    empty = torch.empty(0, dtype=torch.int64)
    tokens, is_self = linear_sample_mix(
        head["hidden"][:0], head["weight"], empty, 1.0, seed=0, sample_ids=empty, positions=empty, top_k=3
    )
    assert tokens.shape == is_self.shape == (0,)
