"""linear_sample_shard and combine_shards: any split of the vocabulary over any ranks gives the token of one rank."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfgen_kernels import combine_shards, linear_sample_mix, linear_sample_shard

N, D = 20, 4


def keys(n=N):
    return {"seed": 5, "sample_ids": torch.arange(n) // 6, "positions": torch.arange(n) % 6}


def sharded(
    hidden, weight, reference, self_prob, cuts, *, bias=None, softcap=None, logit_scale=1.0, status=None, **how
):
    """The tokens from the shards between `cuts`, gathered last rank first."""
    bounds = [0, *sorted(cuts), len(weight)]
    head = {"softcap": softcap, "logit_scale": logit_scale}
    parts = [
        linear_sample_shard(
            hidden,
            weight[begin:end],
            self_prob,
            first_id=begin,
            bias=None if bias is None else bias[begin:end],
            **head,
            **how,
        )
        for begin, end in reversed(list(pairwise(bounds)))
        if begin < end
    ]
    values, ids = (torch.stack(part) for part in zip(*parts, strict=True))
    return combine_shards(values, ids, reference, self_prob, status=status, **how)


def exact_head(vocab_size, generator):
    """hidden [N, D] and weight [V, D] of small whole numbers, whose products every order of summation gets right."""
    return (
        torch.randint(-3, 4, (N, D), generator=generator).float(),
        torch.randint(-3, 4, (vocab_size, D), generator=generator).float(),
    )


@given(
    vocab_size=st.integers(1, 700),
    cuts=st.lists(st.integers(0, 700), max_size=9),
    seed=st.integers(0, 2**32),
    capped=st.booleans(),
)
def test_any_split_gives_the_tokens_of_one_rank(vocab_size, cuts, seed, capped):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = exact_head(vocab_size, generator)
    bias = torch.randint(-3, 4, (vocab_size,), generator=generator).float()
    temperature = torch.linspace(0.5, 1.5, N)
    temperature[::4] = 0
    how = keys() | {"temperature": temperature, "bias": bias, "logit_scale": 0.5, "softcap": 8.0 if capped else None}
    reference = torch.arange(N) + vocab_size
    want, want_self = linear_sample_mix(hidden, weight, reference, 0.7, **how)
    cuts = [min(cut, vocab_size) for cut in cuts]
    got, is_self = sharded(hidden, weight, reference, 0.7, cuts, **how)
    assert torch.equal(is_self, want_self)
    assert torch.equal(got, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_logit_on_one_rank_keeps_the_reference(bad):
    hidden, weight = torch.ones(N, D), torch.ones(300, D)
    bias = torch.zeros(300)
    bias[130] = bad
    status = torch.zeros((), dtype=torch.int64)
    reference = torch.arange(N)
    tokens, is_self = sharded(hidden, weight, reference, 1.0, [100, 200], bias=bias, status=status, **keys())
    assert torch.equal(tokens, reference)
    assert is_self.all()
    assert status.item() == N


def test_a_rank_without_a_chance_and_a_row_without_any():
    hidden, weight = torch.ones(N, D), torch.ones(300, D)
    bias = torch.zeros(300)
    bias[:100] = -torch.inf
    reference = torch.arange(N) + 300
    want, _ = linear_sample_mix(hidden, weight, reference, 1.0, bias=bias, **keys())
    assert (want >= 100).all()
    assert torch.equal(sharded(hidden, weight, reference, 1.0, [100, 200], bias=bias, **keys())[0], want)
    bias[:] = -torch.inf
    assert torch.equal(sharded(hidden, weight, reference, 1.0, [100, 200], bias=bias, **keys())[0], reference)


def test_the_gathered_results_are_small():
    values, ids = linear_sample_shard(torch.ones(N, D), torch.ones(300, D), 1.0, first_id=0, **keys())
    assert values.numel() * values.element_size() + ids.numel() * ids.element_size() == N * 60


@pytest.mark.parametrize(
    ("change", "match"),
    [({"first_id": -1}, "first_id=-1"), ({"first_id": 2**31}, "first_id"), ({"first_id": 0.5}, "first_id must be")],
)
def test_bad_first_id(change, match):
    with pytest.raises((TypeError, ValueError), match=match):
        linear_sample_shard(torch.ones(N, D), torch.ones(300, D), 1.0, **(keys() | change))


def test_no_rows():
    hidden, weight = torch.ones(0, D), torch.ones(300, D)
    empty = torch.empty(0, dtype=torch.int64)
    tokens, is_self = sharded(hidden, weight, empty, 1.0, [100], **keys(0))
    assert tokens.shape == is_self.shape == (0,)
