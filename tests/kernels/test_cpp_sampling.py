"""The C++ filters and LM head: equal to the reference on exact inputs, the same bits in any batch, little memory."""

import pytest
import torch
from conftest import require_cpp
from hypothesis import given
from hypothesis import strategies as st

from selfgen_kernels.backends.reference import head as reference_head
from selfgen_kernels.backends.reference import sampling as reference
from selfgen_kernels.backends.reference.scaling import filter_cutoff
from selfgen_kernels.call import Sampling

require_cpp()

INF = float("inf")
ops = torch.ops.selfgen
SHARDS = ((0, 300), (64, 128), (70, 30), (70, 300), (100, 28), (192, 1))  # first id, ids
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def rows_of(n, *, prob=1.0, inv_temperature=1.0, seed=5, top_k=None, top_p=None, min_p=None):
    """The arguments of a `Sampling` for n rows; numbers stand for a tensor [N]."""

    def per_row(value, dtype):
        return value if value is None or isinstance(value, torch.Tensor) else torch.full((n,), value, dtype=dtype)

    return (
        torch.full((n,), round(prob * 2**32)), seed, torch.arange(n) // 6, torch.arange(n) % 6,
        per_row(inv_temperature, torch.float32), per_row(top_k, torch.int64), per_row(top_p, torch.float64),
        per_row(min_p, torch.float64),
    )  # fmt: skip


def assert_same(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


def assert_same_sampling(logits, **how):
    rows = rows_of(len(logits), **how)
    references = torch.arange(len(logits)) + 10**6
    assert_same(ops.sample_mix(logits, references, *rows), reference.sample_mix(logits, references, *rows))


# ---- Filters: many draws from one row show where its cutoff is -------------------------------------------------------

LOGITS = st.sampled_from([0.0, -0.0, 1.5, 2.0, 2.0, 3.0, -7.0, 1e-40, -1e-40, 2e-45, 1e30, -3e38, -INF]) | st.floats(
    -30, 30, width=32
)


@given(
    row=st.lists(LOGITS, min_size=1, max_size=260),
    repeats=st.integers(1, 3),
    top_k=st.none() | st.integers(1, 400),
    top_p=st.none() | st.sampled_from([1e-12, 0.1234567, 0.5123, 0.91234, 0.9998765, 1.0]),
    min_p=st.none() | st.sampled_from([0.0, 1e-6, 0.123, 0.77, 1.0]),
    inv_temperature=st.sampled_from([1e-2, 0.37, 1.0, 30.0, INF]),
)
def test_any_row_is_filtered_as_by_the_reference(row, repeats, inv_temperature, **filters):
    logits = torch.tensor(row * repeats).expand(100, -1)
    assert_same_sampling(logits, inv_temperature=inv_temperature, **filters)


@pytest.mark.parametrize(
    ("dtype", "spread"), [(torch.float32, 1e-3), (torch.float32, 8.0), (torch.bfloat16, 1.0), (torch.float16, 8.0)]
)
def test_long_rows(dtype, spread):
    """Around the numbers of groups and tokens, and from one token kept to almost all."""
    vocab_size = 4001  # 63 groups
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(1, vocab_size, generator=generator) * spread).to(dtype).expand(30, -1)
    for top_k in (1, 2, 50, 62, 63, 64, 2000, 4000, 4001):
        assert_same_sampling(logits, top_k=top_k, inv_temperature=0.1)
        assert_same_sampling(logits, top_k=top_k, top_p=0.91234)
    for top_p in (1e-9, 0.1, 0.5, 0.95, 0.999, 1 - 1e-9):
        assert_same_sampling(logits, top_p=top_p)
        assert_same_sampling(logits, top_p=top_p, top_k=200, min_p=1e-4)


def test_the_cutoff_itself():
    """A flat draw from a filtered row meets every kept token, and no other."""
    logits = torch.randn(1, 700, generator=torch.Generator().manual_seed(1)) * 1e-3
    logits[0, ::100] = 0.5  # seven that tie
    n = 4000
    for filters in ({"top_k": 3}, {"top_k": 7}, {"top_k": 8}, {"top_k": 40}, {"top_p": 0.00451}, {"top_p": 0.03}):
        rows = rows_of(n, **filters)
        tokens = ops.sample_mix(logits.expand(n, -1), torch.full((n,), -1), *rows)[0]
        cutoff = filter_cutoff(logits, Sampling(*rows).select(slice(1)))
        assert set(tokens.tolist()) == set((logits[0] >= cutoff).nonzero()[:, 0].tolist())


def test_as_many_candidates_as_top_k():
    logits = torch.full((60, 256), -5.0)
    logits[:, [3, 70, 140, 250]] = torch.tensor([1.0, 2.0, 3.0, 4.0])  # one a group
    assert_same_sampling(logits, top_k=4, inv_temperature=0.01)


def test_filters_of_bad_rows():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    logits[0, 7], logits[1, 299], logits[2], logits[3, 5:] = torch.nan, INF, -INF, -INF
    for filters in ({"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9, "min_p": 0.1}):
        assert_same_sampling(logits, **filters)


# ---- The head: small whole numbers, whose products every order of summation gets right -------------------------------


def whole_numbers(*shape, seed, dtype=torch.float32):
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def a_head(n, width, vocab_size, dtype=torch.float32, bias=True, softcap=8.0, logit_scale=0.5):
    return (
        whole_numbers(n, width, seed=1, dtype=dtype),
        whole_numbers(vocab_size, width, seed=2, dtype=dtype),
        whole_numbers(vocab_size, seed=3, dtype=dtype) if bias else None,
        softcap,
        logit_scale,
    )


def some_rows(n, **filters):
    inv_temperature = torch.linspace(0.5, 1.5, max(n, 1))[:n]
    inv_temperature[::4] = INF
    return rows_of(n, prob=0.8, inv_temperature=inv_temperature, **filters)


def assert_same_tokens(head, rows):
    references = torch.arange(len(head[0])) + 10**6
    got, want = (module.linear_sample_mix(*head, references, *rows) for module in (ops, reference_head))
    assert_same(got, want)


def assert_same_candidates(head, got, want):
    """Equal to the bit, but for what a softcap's tanh rounds."""
    valid = ~want[0].isnan().flatten(1).any(1)  # the ids of other rows have no meaning
    assert torch.equal(got[1][valid], want[1][valid])
    tolerance = 0 if head[3] is None else 1e-5
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "width", "vocab_size"), [(0, 4, 9), (1, 1, 1), (3, 0, 70), (7, 5, 300), (40, 67, 77), (150, 600, 130)]
)
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.each_pair
def test_tokens_are_those_of_the_reference(dtype, n, width, vocab_size, plain):
    settings = {"bias": False, "softcap": None, "logit_scale": 1.0} if plain else {}
    head = a_head(n, width, vocab_size, dtype, **settings)
    assert_same_tokens(head, some_rows(n))
    assert_same_tokens(head, some_rows(n, top_k=5, min_p=0.01234))


@pytest.mark.parametrize(("first_id", "size"), SHARDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_candidates_of_a_shard_are_those_of_the_reference(first_id, size, dtype):
    for settings in ({}, {"softcap": None}):
        head = a_head(9, 3, size, dtype, **settings)
        args = *head, first_id, *some_rows(9)[:5]
        assert_same_candidates(head, ops.linear_sample_shard(*args), reference_head.linear_sample_shard(*args))


def test_any_strides():
    hidden, weight, bias, *rest = a_head(7, 5, 300)
    wide = torch.full((7, 20), torch.nan)
    wide[:, :10:2] = hidden
    for dtype in DTYPES:
        same = wide.to(dtype)[:, :10:2], weight.to(dtype).T.contiguous().T, bias.to(dtype).repeat_interleave(2)[::2]
        assert_same_tokens((*same, *rest), some_rows(7))
    hidden, _, *rest = a_head(7, 6, 300)  # even, so that bf16 is multiplied in pairs, whose rows begin at any address
    for offset, stride in ((0, 8), (1, 8), (0, 9), (1, 9)):
        for dtype in DTYPES:
            weight = whole_numbers(300 * stride + offset, seed=2, dtype=dtype)[offset:].view(300, stride)[:, :6]
            assert_same_tokens((hidden.to(dtype), weight, rest[0].to(dtype), *rest[1:]), some_rows(7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 31, 600, 1100])
def test_products_are_those_of_fp64(dtype, width):
    """Greedy shards of one id show the logit."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (70, 1))
    rows = rows_of(70, inv_temperature=INF)[:5]
    logits = ops.linear_sample_shard(hidden, weight, None, None, 1.0, 0, *rows)[0][:, 2, 0]
    want = hidden.double() @ weight.double()[0]
    resolution = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(logits.double(), want, rtol=resolution, atol=3e-6 * width**0.5)


@pytest.mark.parametrize("bad", [torch.nan, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_factors(dtype, bad):
    for place in (0, 1):  # hidden, weight
        for column in (2, 3):  # of a pair
            head = a_head(9, 4, 300, dtype)
            head[place][5, column] = bad
            for filters in ({}, {"top_k": 9, "top_p": 0.91234}):
                assert_same_tokens(head, some_rows(9, **filters))


@pytest.mark.parametrize("bad", [torch.nan, INF, -INF])
@pytest.mark.parametrize("where", [slice(130, 131), slice(None)], ids=["one", "all"])
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_bad_logits(bad, where, softcap):
    hidden, weight, bias, _, scale = a_head(9, 4, 300)
    bias[where] = bad
    head = hidden, weight, bias, softcap, scale
    for filters in ({}, {"top_k": 9, "top_p": 0.91234}):
        assert_same_tokens(head, some_rows(9, **filters))
    args = *head, 100, *some_rows(9)[:5]
    assert_same_candidates(head, ops.linear_sample_shard(*args), reference_head.linear_sample_shard(*args))


def test_softcap_over_the_whole_range():
    """Greedy shards of one id show the capped logit."""
    x = torch.cat([torch.logspace(-30, 30, 997), -torch.logspace(-30, 30, 997), torch.zeros(1)])
    n = len(x)
    head = x[:, None], torch.ones(1, 1), None, 2.0, 1.0
    capped = ops.linear_sample_shard(*head, 0, *rows_of(n, inv_temperature=INF)[:5])[0][:, 2, 0]
    want = 2 * torch.tanh(x.double() / 2).float()
    torch.testing.assert_close(capped, want, rtol=5e-7, atol=0)


# ---- Filters of the head: products of one term are those of torch, so its tokens are those of the logits -------------

ORDERS = {
    "random": lambda x: x,
    "rising": lambda x: x.sort().values,  # no bound of a cutoff holds for long
    "falling": lambda x: x.sort(descending=True).values,
    "flat": torch.zeros_like,  # nothing can be dropped
    "flat at the end": lambda x: torch.where(torch.arange(len(x)) < len(x) // 2, x, 1.5),
    "hardly finite": lambda x: torch.where(torch.arange(len(x)) % 700 == 0, x, -INF),
}


def assert_same_as_its_logits(hidden, weight, rows):
    """`ops.linear_sample_mix` against `ops.sample_mix` for hidden [N] and weight [V]."""
    references = torch.arange(len(hidden)) + 10**6
    got = ops.linear_sample_mix(hidden[:, None], weight[:, None], None, None, 1.0, references, *rows)
    logits = hidden[:, None] * weight
    assert_same(got, ops.sample_mix(logits if logits.dtype != torch.float64 else logits.float(), references, *rows))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [1, 5, 48, 150])
@pytest.mark.each_value
def test_filtered_rows_are_drawn_as_from_their_logits(n, order):
    """Any filters in any row, from one token kept to all but one or all."""
    vocab_size, generator = 9001, torch.Generator().manual_seed(n)
    weight = ORDERS[order](torch.randn(vocab_size, generator=generator) * 3)
    hidden = torch.rand(n, generator=generator) + 0.5

    def any_of(*values):
        return torch.tensor(values)[torch.randint(len(values), (n,), generator=generator)]

    few, any_k = any_of(1, 2, 50, 141, 300), any_of(1, 2, 50, 141, 1000, 4500, 9000, 9001, 10**6)
    any_p, any_min_p = any_of(0.1234567, 0.5123, 0.91234, 1.0).double(), any_of(0.0, 1e-6, 0.123, 1.0).double()
    inv_temperature = any_of(0.7, 1.0, 1.3, INF)
    for dtype in DTYPES:
        for filters in (
            {"top_k": few}, {"top_k": any_k}, {"top_p": any_p}, {"min_p": any_min_p}, {"top_k": few, "top_p": any_p},
            {"top_k": any_k, "top_p": any_p, "min_p": any_min_p}, {"top_k": 50, "top_p": 0.95},
        ):  # fmt: skip
            rows = rows_of(n, prob=0.8, inv_temperature=inv_temperature, **filters)
            assert_same_as_its_logits(hidden.to(dtype), weight.to(dtype), rows)


def test_a_cutoff_that_rounding_decides():
    """The best tokens have just the share that top-p asks for, so the order of a sum decides on the next."""
    weight = torch.full((9001,), -60.0)
    weight[[77, 4000, 8999]] = torch.tensor([1.0, 0.501, 0.499]).log()
    for top_p in (0.5, 0.7505):
        top_p = torch.tensor([top_p, 0.6]).double().repeat(40)
        assert_same_as_its_logits(torch.ones(80), weight, rows_of(80, top_p=top_p))
        assert_same_as_its_logits(torch.ones(80).double(), weight.double(), rows_of(80, top_p=top_p[::2].repeat(2)))


@pytest.mark.parametrize("bad", [torch.nan, INF, -INF])
def test_bad_rows_among_filtered_ones(bad):
    """One bad row of many, and one bad logit in each."""
    hidden, weight = torch.linspace(0.5, 2, 40), torch.randn(9001, generator=torch.Generator().manual_seed(0))
    for filters in ({"top_k": 50}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 8000}):
        some_hidden, some_weight = hidden.clone(), weight.clone()
        some_hidden[7], some_weight[5000] = bad, bad
        assert_same_as_its_logits(some_hidden, weight, rows_of(40, **filters))
        assert_same_as_its_logits(hidden, some_weight, rows_of(40, **filters))


# ---- Invariance and memory -------------------------------------------------------------------------------------------


@pytest.fixture
def random_head():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(100, 300, generator=generator), torch.randn(700, 300, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(random_head, dtype):
    hidden, weight = (tensor.to(dtype) for tensor in random_head)
    rows = rows_of(100)[:5]
    values, ids = ops.linear_sample_shard(hidden, weight, None, None, 1.0, 37, *rows)
    for part in (slice(0, 1), slice(99, 100), slice(3, 20), slice(40, 90)):
        some = (row[part] if isinstance(row, torch.Tensor) else row for row in rows)
        alone = ops.linear_sample_shard(hidden[part], weight, None, None, 1.0, 37, *some)
        assert torch.equal(alone[0], values[part])
        assert torch.equal(alone[1], ids[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(random_head, dtype):
    random_head = [tensor.to(dtype) for tensor in random_head]
    rows, filtered, kept = rows_of(100), rows_of(100, top_p=0.9), rows_of(100, top_k=3, top_p=0.9)
    threads, results = torch.get_num_threads(), []
    wide = random_head[0], random_head[1].repeat(6, 1) + (torch.arange(4200)[:, None] / 4200).to(dtype)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            shard = ops.linear_sample_shard(*random_head, None, None, 1.0, 37, *rows[:5])
            tokens = ops.linear_sample_mix(*random_head, None, None, 1.0, rows[2], *filtered)
            tokens += ops.linear_sample_mix(*wide, None, None, 1.0, rows[2], *kept)
            logits = random_head[0][:2].repeat(1, 200)  # [2, 60000]: fewer rows than threads
            few = (row[:2] if isinstance(row, torch.Tensor) else row for row in filtered)
            results.append((*shard, *tokens, *ops.sample_mix(logits, rows[2][:2], *few)))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def largest_allocation(run):
    """The most bytes that torch's allocator was asked for at once while `run` ran."""
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        run()
    return max(event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("filters", [{}, {"top_k": 20}, {"top_p": 0.8}], ids=lambda f: "+".join(f) or "none")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_in_memory_as_a_whole(filters, dtype):
    n, vocab_size = 64, 49152
    hidden, weight = torch.randn(n, 16).to(dtype), torch.randn(vocab_size, 16).to(dtype)
    rows = rows_of(n, **filters)
    whole = n * vocab_size * 4

    def run():
        ops.linear_sample_mix(hidden, weight, None, 30.0, 1.0, rows[2], *rows)

    assert 0 < largest_allocation(run) <= whole // 8
    assert largest_allocation(lambda: hidden.float() @ weight.float().T) >= whole  # the measure itself does see it
