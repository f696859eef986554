"""`vocab_size`: on every backend the result is bit for bit that of logits, or of a head, with the other ids cut off."""

from functools import partial
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from conftest import moved

import selfgen_kernels
from selfgen_kernels import combine_shards, linear_sample_mix, linear_sample_shard, sample_mix
from selfgen_kernels.ops import OPS

N, V, D = 8, 200, 16
IDS = torch.arange(N)
KEYS = {"seed": 3, "sample_ids": IDS - 4, "positions": IDS}
TEMPERATURE = torch.tensor([0.0, 0.5, 1.0, 2.0] * 2)
FILTERS = [
    {},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.01},
    {"top_p": 0.9, "min_reference_prob": torch.linspace(0, 0.01, N)},
    *(
        pytest.param(one, marks=pytest.mark.slow)
        for one in ({"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"min_reference_prob": 1e-3})
    ),
]


@pytest.fixture
def public(backend, monkeypatch):
    """The public functions, with the operators of one backend."""

    def run(kernel, *args):
        result = kernel(*moved(args, backend.device))
        return result.cpu() if isinstance(result, torch.Tensor) else tuple(part.cpu() for part in result)

    if backend.name != "cpp":  # which is what they run on CPU tensors anyway
        for name, op in OPS.items():
            if op.module in ("sampling", "head") and backend.name in ("reference", *op.kernels):
                module = import_module(f"selfgen_kernels.backends.{backend.name}.{op.module}")
                monkeypatch.setattr(torch.ops.selfgen, name, partial(run, getattr(module, name)))
    return selfgen_kernels


def numbers(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


def poisoned(rows, start):
    """What a kernel that looked at the ids from `start` on would be misled by: the largest of all, +inf or NaN."""
    rows = rows.clone()
    bad = torch.tensor([1e4, torch.inf, torch.nan, 1e4], dtype=rows.dtype)
    rows[..., start:] = bad.repeat(rows.shape[-1])[: rows.shape[-1] - start]
    rows[::2, start:] = 1e4
    return rows


def assert_same(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "+".join(f) or "none")
def test_logits_that_do_not_exist_might_as_well_not_be_there(public, filters):
    for vocab_size, dtype in ((1, torch.float32), (64, torch.bfloat16), (130, torch.float32)):
        logits = poisoned(numbers(N, V, dtype=dtype), vocab_size)
        how = {"temperature": TEMPERATURE, **KEYS, **filters}
        status = torch.zeros((), dtype=torch.int64)
        got = public.sample_mix(logits, IDS % vocab_size, 0.9, vocab_size=vocab_size, status=status, **how)
        assert_same(got, public.sample_mix(logits[:, :vocab_size].clone(), IDS % vocab_size, 0.9, **how))
        assert got[0].max() < vocab_size
        assert got[1].any()
        assert status == 0


@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "+".join(f) or "none")
def test_rows_of_a_head_that_do_not_exist_might_as_well_not_be_there(public, filters):
    for vocab_size, dtype in ((64, torch.bfloat16), (130, torch.float32)):
        hidden, weight, bias = numbers(N, D, dtype=dtype), numbers(V, D, seed=1, dtype=dtype), numbers(V, dtype=dtype)
        weight, bias = poisoned(weight.T, vocab_size).T.contiguous(), poisoned(bias[None], vocab_size)[0]
        how = {"temperature": TEMPERATURE, "softcap": 20.0, **KEYS, **filters}
        got = public.linear_sample_mix(hidden, weight, IDS % vocab_size, 0.9, bias=bias, vocab_size=vocab_size, **how)
        weight, bias = weight[:vocab_size].clone(), bias[:vocab_size].clone()
        assert_same(got, public.linear_sample_mix(hidden, weight, IDS % vocab_size, 0.9, bias=bias, **how))
        assert got[1].any()


def test_shards_in_which_ids_end_and_shards_without_any(public):
    hidden, weight = numbers(N, D), poisoned(numbers(D, V, seed=1), 130).T.contiguous()
    how = {"temperature": TEMPERATURE, **KEYS}
    parts = [
        public.linear_sample_shard(hidden, weight[first:end], 0.9, first_id=first, vocab_size=130, **how)
        for first, end in pairwise((0, 70, 130, 150, V))
    ]
    assert all((ids == -1).all() and (values == -torch.inf).all() for values, ids in parts[2:])
    values, ids = (torch.stack(part) for part in zip(*parts, strict=True))
    got = public.combine_shards(values, ids, IDS, 0.9, vocab_size=130, **how)
    assert_same(got, public.linear_sample_mix(hidden, weight[:130].clone(), IDS, 0.9, **how))
    alone = public.linear_sample_shard(hidden, weight[70:], 0.9, first_id=70, vocab_size=130, **how)
    assert_same(alone, public.linear_sample_shard(hidden, weight[70:130].clone(), 0.9, first_id=70, **how))


def test_without_it_all_ids_are_drawn():
    """What the tests above would not notice: that poison is drawn where it may be."""
    logits = numbers(N, V)
    logits[:, 130:] = 1e4
    assert sample_mix(logits, IDS, 1.0, **KEYS)[0].min() >= 130
    assert_same(sample_mix(logits, IDS, 1.0, vocab_size=V, **KEYS), sample_mix(logits, IDS, 1.0, **KEYS))


@pytest.mark.parametrize("op", ["sample_mix", "linear_sample_mix"])
def test_no_copy_is_made(op, monkeypatch):
    given = {"sample_mix": (numbers(N, V),), "linear_sample_mix": (numbers(N, D), numbers(V, D))}[op]
    seen, original = [], getattr(torch.ops.selfgen, op)
    monkeypatch.setattr(torch.ops.selfgen, op, lambda *args: seen.append(args[len(given) - 1]) or original(*args))
    getattr(selfgen_kernels, op)(*given, IDS, 1.0, vocab_size=130, **KEYS)
    assert seen[0].data_ptr() == given[-1].data_ptr()
    assert 130 in seen[0].shape


@pytest.mark.parametrize(("vocab_size", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError)])
def test_bad_sizes_of_a_split_vocabulary(vocab_size, error):
    with pytest.raises(error, match=r"vocab_size.*pass vocab_size >= 1"):
        linear_sample_shard(numbers(N, D), numbers(V, D), 1.0, first_id=0, vocab_size=vocab_size, **KEYS)
    values, ids = torch.zeros(1, N, 3, 3), torch.zeros(1, N, 3, dtype=torch.int64)
    with pytest.raises(error, match=r"vocab_size.*pass vocab_size >= 1"):
        combine_shards(values, ids, IDS, 1.0, vocab_size=vocab_size, **KEYS)
    with pytest.raises(ValueError, match="reference holds 7"):
        combine_shards(values, ids, IDS, 1.0, vocab_size=7, **KEYS)


def test_a_bad_logit_below_it_is_still_found():
    logits, head = numbers(N, V), numbers(N, D)
    logits[:, 129] = torch.nan
    status = torch.zeros((), dtype=torch.int64)
    assert torch.equal(sample_mix(logits, IDS, 1.0, vocab_size=130, status=status, **KEYS)[0], IDS)
    head[0, 0] = torch.nan
    linear_sample_mix(head, numbers(V, D), IDS, 1.0, vocab_size=130, status=status, **KEYS)
    assert status == N + 1
