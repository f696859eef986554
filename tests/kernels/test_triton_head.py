"""Triton's LM head and filters against the reference, on products that every order of summation gets right."""

from itertools import product

import pytest
import torch
from conftest import DEVICE, TRITON_MARKS, moved

from selfgen_kernels.backends.reference import head as reference
from selfgen_kernels.backends.reference.sampling import is_self_of, sample_mix
from selfgen_kernels.backends.reference.scaling import filter_cutoff as reference_cutoff
from selfgen_kernels.call import Head, Sampling

pytest.importorskip("triton")
pytestmark = TRITON_MARKS
INF = float("inf")
SHARDS = ((0, 300), (64, 128), (70, 30), (70, 300), (100, 28), (192, 1))  # first id, ids


def whole_numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def a_head(n, width, vocab_size, dtype=torch.float32, bias=True, softcap=8.0, logit_scale=0.5):
    return (
        whole_numbers(n, width, seed=1, dtype=dtype),
        whole_numbers(vocab_size, width, seed=2, dtype=dtype),
        whole_numbers(vocab_size, seed=3, dtype=dtype) if bias else None,
        softcap,
        logit_scale,
    )


def rows_of(n, prob=0.7, **filters):
    """The arguments of a `Sampling`; every fourth row is greedy."""
    inv_temperature = torch.linspace(0.5, 1.5, max(n, 1))[:n]
    inv_temperature[::4] = INF
    threshold = torch.full((n,), round(prob * 2**32))
    dtypes = {"top_k": torch.int64, "top_p": torch.float64, "min_p": torch.float64}
    values = (torch.full((n,), filters[k], dtype=d) if k in filters else None for k, d in dtypes.items())
    return threshold, 5, torch.arange(n) // 6, torch.arange(n) % 6, inv_temperature, *values


def both(op, *args):
    """Results of Triton and of the reference."""
    from selfgen_kernels.backends.triton import head

    return [result.cpu() for result in getattr(head, op)(*moved(args, DEVICE))], getattr(reference, op)(*args)


def assert_same_tokens(head, rows):
    n = len(head[0])
    got, want = both("linear_sample_mix", *head, torch.arange(n) + 10**6, *rows)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)
    return got


def rounding(head):
    """Of what a head's logits give: none but in its tanh."""
    softcap = head[3]
    return dict.fromkeys(("rtol", "atol"), 0 if softcap is None else 1e-5)


def assert_same_log_probs(head, rows, tokens=None):
    """Those of tokens in the vocabulary, at its end, and outside of it."""
    n, vocab_size = len(head[0]), len(head[1])
    tokens = torch.arange(n) * 37 % (vocab_size + 1) if tokens is None else tokens
    from selfgen_kernels.backends.triton import head as kernels

    got = kernels.linear_reference_log_prob(*moved((*head, tokens, *rows[:4]), DEVICE)).cpu()
    want = reference.linear_reference_log_prob(*head, tokens, *rows[:4])
    torch.testing.assert_close(got, want, **rounding(head))
    return got


def assert_same_candidates(head, first_id, rows):
    (values, ids), (want_values, want_ids) = both("linear_sample_shard", *head, first_id, *rows[:5])
    named = ~want_values.isnan().any(2)  # a row that is all NaN names no token
    assert torch.equal(ids[named], want_ids[named])
    torch.testing.assert_close(values, want_values, **rounding(head), equal_nan=True)


PLAIN = {"bias": False, "softcap": None, "logit_scale": 1.0}
SIZES = (0, 4, 9), (3, 1, 1), (7, 16, 300), (60, 67, 77), (60, 80, 130)  # rows, width, ids


@pytest.fixture(
    params=[
        (dtype, sizes, how)
        for dtype, sizes, how in product(
            (torch.float32, torch.bfloat16, torch.float16, torch.float64), SIZES, (PLAIN, {})
        )
        if len(how) == 0 or sizes != SIZES[-1]  # the last two are alike
    ]
)
def any_head(request):
    dtype, sizes, settings = request.param
    return a_head(*sizes, dtype, **settings)


def test_tokens_are_those_of_the_reference(any_head):
    assert_same_tokens(any_head, rows_of(len(any_head[0])))


def test_log_probs_are_those_of_the_reference(any_head):
    assert_same_log_probs(any_head, rows_of(len(any_head[0])))


@pytest.mark.parametrize("outside", [-1, 300, 2**32, -(2**63), 2**63 - 1])
def test_a_reference_outside_of_the_vocabulary_has_no_probability(outside):
    tokens = torch.tensor([outside, 299])
    got = assert_same_log_probs(a_head(2, 5, 300), rows_of(2, 1.0), tokens)
    assert got[0] == -INF
    assert got[1].isfinite()


@pytest.mark.parametrize(("first_id", "size"), SHARDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.each_value
def test_candidates_of_a_shard_are_those_of_the_reference(first_id, size, dtype):
    for settings in ({}, PLAIN):
        assert_same_candidates(a_head(9, 3, size, dtype, **settings), first_id, rows_of(9))


def test_no_rows_in_a_shard():
    assert_same_candidates(a_head(0, 3, 70), 0, rows_of(0))


@pytest.mark.parametrize("tile", [(32, 128, 32), (16, 64, 16), (64, 256, 16)])
@pytest.mark.one_case
def test_tiles_do_not_matter(tile, monkeypatch):
    from selfgen_kernels.backends.triton import products

    names = "BLOCK_M", "BLOCK_N", "BLOCK_K"
    options = {"num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(products, "tile_constants", lambda *_: (dict(zip(names, tile, strict=True)), options))
    monkeypatch.setattr(products, "ROWS", 16)
    monkeypatch.setitem(products.REDUCTION, "LANES", 2)
    for settings in ({}, PLAIN):
        assert_same_tokens(a_head(35, 20, 400, **settings), rows_of(35))
        assert_same_log_probs(a_head(35, 20, 400, **settings), rows_of(35))
        assert_same_candidates(a_head(9, 3, 400, **settings), 70, rows_of(9))


@pytest.fixture
def in_chunks(monkeypatch):
    """Any number of rows is taken for many; the shapes of what torch multiplies."""
    from selfgen_kernels.backends.triton import head, head_log_prob, products

    shapes = []
    for module in (head, head_log_prob):

        def spied(*args, chunks=module.logit_chunks):
            for begin, end, logits in chunks(*args):
                shapes.append(tuple(logits.shape))
                yield begin, end, logits

        monkeypatch.setattr(module, "FEW_ROWS", 0)
        monkeypatch.setattr(module, "tile_of", None)  # no product of Triton's
        monkeypatch.setattr(module, "logit_chunks", spied)
    monkeypatch.setitem(products.SPAN, "GROUPS", 4)
    return shapes


@pytest.mark.parametrize("settings", [{}, PLAIN], ids=["all", "plain"])
@pytest.mark.parametrize("vocab_size", [1, 130, 4200])  # of the last, a chunk is two spans
@pytest.mark.each_value
def test_an_eighth_of_the_logits_at_a_time(in_chunks, settings, vocab_size):
    """Of what torch's product gives, the chunks are of no matter."""
    head = a_head(8, 5, vocab_size, torch.bfloat16, **settings)
    for op in (assert_same_tokens, assert_same_log_probs):
        in_chunks.clear()
        op(head, rows_of(8, 1.0))
        assert sum(size for _, size in in_chunks) == vocab_size
        assert max(size for _, size in in_chunks) <= max(64, vocab_size / 8)
        assert {rows for rows, _ in in_chunks} == {8}


@pytest.mark.parametrize(("first_id", "size"), [*SHARDS, (70, 1100)])
def test_shards_in_chunks(in_chunks, first_id, size):
    assert_same_candidates(a_head(4, 3, size), first_id, rows_of(4))
    assert in_chunks


@pytest.mark.parametrize("bad", [torch.nan, INF, -INF])
def test_bad_logits_in_chunks(in_chunks, bad):
    check_bad_logits(bad, "one", 5)


def test_chunks_of_any_strides_and_with_gradients(in_chunks):
    test_any_strides()
    hidden, weight, *rest = a_head(3, 5, 100)
    assert_same_tokens((hidden.requires_grad_(), weight.requires_grad_(), *rest), rows_of(3))


def test_how_many_rows_are_few(monkeypatch):
    from selfgen_kernels.backends.triton import head

    ways = []
    for name in ("score_tiles", "score_chunks"):
        monkeypatch.setattr(head, name, lambda head, *_, name=name: ways.append((len(head.hidden), name)) or [])
    monkeypatch.setattr(head, "gumbel_noise", lambda *_: None)
    for n in (1, 64, 65, 256):
        head.score_pieces(Head(*a_head(n, 1, 1)), 0, 0, 1, 0, Sampling(*rows_of(n)), None, None)
    assert ways == [(1, "score_tiles"), (64, "score_tiles"), (65, "score_chunks"), (256, "score_chunks")]


def test_any_strides():
    hidden, weight, bias, *rest = a_head(7, 5, 300)
    wide = torch.full((7, 20), torch.nan)
    wide[:, :10:2] = hidden
    rows = rows_of(7)
    stretched = tuple(value.repeat_interleave(2)[::2] if isinstance(value, torch.Tensor) else value for value in rows)
    strided = wide[:, :10:2], weight.T.contiguous().T, bias.repeat_interleave(2)[::2], *rest
    assert_same_tokens(strided, stretched)
    assert_same_log_probs(strided, stretched)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}], ids=["plain", "filtered"])
def test_rows_that_keep_their_reference_do_no_harm(filters):
    """Their hidden states may hold anything, and all or none may be self rows."""
    head = a_head(8, 5, 100)
    head = head if not filters else a_head(8, 5, 100, torch.bfloat16, **PLAIN)  # fewer bits to search
    for prob, least, most in ((0.0, 0, 0), (0.5, 1, 7), (1.0, 8, 8)):
        rows = rows_of(8, prob, **filters)
        is_self = is_self_of(Sampling(*rows).mask)
        assert least <= is_self.sum() <= most
        head[0][~is_self] = torch.nan
        assert not assert_same_tokens(head, rows)[2].any()
        assert (assert_same_log_probs(head, rows)[~is_self] == 0).all()
        head[0][~is_self] = 1.0


@pytest.mark.parametrize("bad", [torch.nan, INF, -INF])
@pytest.mark.parametrize("where", ["one", "all"])
def test_bad_logits(bad, where):
    check_bad_logits(bad, where, 9)


def check_bad_logits(bad, where, n):
    """NaN and +inf spoil their rows, -inf only if nothing else is there; a NaN temperature spoils its row."""
    hidden, weight, bias, *_ = a_head(n, 5, 150)
    bias[149 if where == "one" else slice(None)] = bad
    rows = rows_of(n, 1.0)
    rows[4][1] = torch.nan
    invalid = assert_same_tokens((hidden, weight, bias, None, 1.0), rows)[2]
    assert_same_log_probs((hidden, weight, bias, None, 1.0), rows)
    assert invalid.all() if bad != -INF or where == "all" else invalid.sum() == 1
    if where == "one":
        assert_same_candidates((hidden, weight, bias, None, 1.0), 70, rows)


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}], ids=lambda f: "+".join(f))
@pytest.mark.parametrize(("n", "dtype", "how"), [(1, torch.float32, {}), (17, torch.bfloat16, PLAIN)])
@pytest.mark.each_value
def test_filtered_tokens_are_those_of_the_reference(monkeypatch, filters, n, dtype, how):
    """A few rows at a time, at least n / 8, or all at once; bf16 has fewer bits to search."""
    from selfgen_kernels.backends.triton import head

    for rows_at_a_time in {1, n}:
        monkeypatch.setattr(head, "LOGITS_BYTES", rows_at_a_time * 200 * 4)
        assert_same_tokens(a_head(n, 5, 200, dtype, **how), rows_of(n, **filters))


@pytest.mark.parametrize(
    ("dtype", "vocab_size"),
    [
        (torch.float32, 3),
        (torch.bfloat16, 2100),
        *(
            pytest.param(*of, marks=pytest.mark.slow)
            for of in ((torch.float32, 2100), (torch.bfloat16, 3), (torch.float16, 3), (torch.float16, 2100))
        ),
    ],
)
@pytest.mark.parametrize(
    "filters",
    [{"top_k": 1}, {"top_k": 7}, {"top_k": 10**6}, {"top_p": 0.9}, {"top_p": 1e-9}, {"top_p": 1.0}, {"min_p": 0.0},
     {"min_p": 0.05}, {"min_p": 1.0}, {"top_k": 50, "top_p": 0.9, "min_p": 0.02}],
    ids=lambda f: "+".join(f"{name}={value}" for name, value in f.items()),
)  # fmt: skip
@pytest.mark.each_value
def test_cutoffs_are_those_of_the_reference(dtype, vocab_size, filters):
    from selfgen_kernels.backends.triton.filters import filter_cutoff

    logits = (torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    logits[1] = logits[1].round()  # ties, and both zeros
    logits[2, : vocab_size // 2] = -INF
    logits[3] = -INF
    rows = rows_of(5, 1.0, **filters)
    rows[4][4] = 100.0
    want = reference_cutoff(logits, Sampling(*rows))
    got = filter_cutoff(logits.to(DEVICE), Sampling(*moved(rows, DEVICE))).cpu()
    assert torch.equal(got, want)


def test_cutoffs_of_long_rows_in_full_precision():
    test_cutoffs_are_those_of_the_reference(torch.float32, 2100, {"top_k": 50, "top_p": 0.9, "min_p": 0.02})


def test_top_p_is_exact_up_to_the_rounding_of_its_sum():
    from selfgen_kernels.backends.triton.filters import filter_cutoff

    n = 12
    logits = torch.randn(n, 600, generator=torch.Generator().manual_seed(1)) * 2
    rows = list(rows_of(n, 1.0, top_p=0.5))
    rows[6] = torch.rand(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    want = reference_cutoff(logits, Sampling(*rows))
    got = filter_cutoff(logits.to(DEVICE), Sampling(*moved(rows, DEVICE))).cpu()
    z = logits.double() * rows[4].double().where(rows[4] < INF, 1.0)[:, None]
    probs = z.softmax(1)
    for row in (got != want).nonzero()[:, 0]:  # both cutoffs may only differ where the sum meets top_p
        larger = torch.maximum(got[row], want[row])
        before = probs[row][z[row].float() >= larger].sum()
        assert abs(before - rows[6][row]) < 1e-6
    assert (got != want).sum() <= 1


@pytest.mark.parametrize("bad", [torch.nan, INF])
def test_bad_rows_stay_invalid_after_filters(bad):
    from selfgen_kernels.backends.triton import sampling

    logits = torch.randn(4, 100)
    logits[0, 3], logits[2] = bad, -INF
    args = torch.arange(4) + 500, *rows_of(4, 1.0, top_k=5, top_p=0.9, min_p=0.1)
    tokens, _, invalid = (result.cpu() for result in sampling.sample_mix(*moved((logits, *args), DEVICE)))
    assert invalid.tolist() == [True, False, True, False]
    assert torch.equal(tokens, sample_mix(logits, *args)[0])
