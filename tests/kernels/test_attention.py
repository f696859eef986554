"""Ragged attention: against dense attention in float64, bit for bit in any batch, and for every mistake its message."""

import doctest

import pytest
import torch

from selfgen_kernels import backends, ragged_attention
from selfgen_kernels.backends.reference.attention import ragged_attention as reference
from selfgen_kernels.ops import attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
needs_cpp = pytest.mark.skipif(backends.cpu.missing is not None, reason=f"no C++ kernels: {backends.cpu.missing}")


@pytest.fixture(params=["reference", pytest.param("cpp", marks=needs_cpp)])
def attend(request):
    """The op of one backend, with the arguments of its schema."""
    return reference if request.param == "reference" else torch.ops.selfgen.ragged_attention


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def problem(chunks, *, heads=6, kv_heads=2, head_dim=16, dtype=torch.float32, gap=3):
    """(query, key, value, cu_seqlens_q, kv_ranges) of `chunks` [(queries, keys)], `gap` unused slots before each."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0] + [queries for queries, _ in chunks])
    ranges, slots = [], 0
    for _, keys in chunks:
        ranges.append((slots + gap, keys))
        slots += gap + keys
    query = torch.randn(int(sizes.sum()), heads, head_dim, generator=generator).to(dtype)
    key, value = torch.randn(2, slots, kv_heads, head_dim, generator=generator).to(dtype)
    return query, key, value, sizes.cumsum(0).int(), torch.tensor(ranges, dtype=torch.int64).view(-1, 2)


def dense(query, key, value, cu_seqlens_q, kv_ranges, scale, sliding_window, softcap, sinks):
    """One query and one head after the other, in float64."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    bounds = cu_seqlens_q.tolist()
    for begin, end, (start, length) in zip(bounds, bounds[1:], kv_ranges.tolist(), strict=False):
        for i in range(begin, end):
            stop = start + length - (end - i) + 1
            first = start if sliding_window is None else max(start, stop - sliding_window)
            for head in range(query.shape[1]):
                keys, values = (x[first:stop, head // group].double() for x in (key, value))  # [keys, head_dim]
                logits = keys @ query[i, head].double() * scale  # [keys]
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if sinks is not None:
                    logits = torch.cat([logits, sinks[head : head + 1].double()])
                out[i, head] = torch.softmax(logits, 0)[: len(keys)] @ values
    return out


CHUNKS = [(3, 40), (1, 1), (12, 77), (0, 5), (1, 64), (5, 5), (0, 0), (33, 35)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {}),
        ({"heads": 9, "kv_heads": 3, "head_dim": 64}, {}),
        ({"heads": 2, "kv_heads": 2, "head_dim": 128}, {"sliding_window": 7}),
        ({"heads": 8, "kv_heads": 1, "head_dim": 5}, {"softcap": 2.0}),
        ({"heads": 1, "kv_heads": 1, "head_dim": 1}, {"sinks": True}),
        ({"head_dim": 23}, {"sliding_window": 33, "softcap": 5.0, "sinks": True, "scale": 0.7}),
        ({}, {"sliding_window": 1}),
        ({}, {"sliding_window": 2**62, "scale": -3.0}),
    ],
    ids=str,
)
def test_agrees_with_dense_attention(attend, dtype, shape, options):
    args = problem(CHUNKS, **shape, dtype=dtype)
    sinks = torch.linspace(-3, 3, args[0].shape[1]).to(dtype) if "sinks" in options else None
    how = options.get("scale", 0.3), options.get("sliding_window"), options.get("softcap"), sinks
    got = attend(*args, *how)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), dense(*args, *how), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("chunks", [[], [(0, 0)], [(0, 4), (0, 0)], [(1, 1)], [(1, 300)], [(260, 260)], [(200, 300)]])
def test_few_many_and_no_queries(attend, chunks):
    args = problem(chunks)
    how = 0.25, None, None, None
    got = attend(*args, *how)
    assert got.shape == args[0].shape
    torch.testing.assert_close(got.double(), dense(*args, *how), rtol=0, atol=TOLERANCE[torch.float32])


def test_strides_do_not_matter(attend):
    query, key, value, *chunks = problem(CHUNKS)
    how = 0.25, None, None, None
    want = attend(query, key, value, *chunks, *how)
    assert want.is_contiguous()

    def head_first(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    def spread(x):
        return torch.stack([x, x], -1)[..., 0]

    for stride in (head_first, spread):
        got = attend(stride(query), stride(key), stride(value), *chunks, *how)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        assert got.is_contiguous()


def test_large_logits_do_not_overflow_and_nan_is_not_hidden(attend):
    query, key, value, *chunks = problem([(4, 90)])
    how = 0.25, None, None, None
    args = query * 1000, key, value, *chunks, *how
    torch.testing.assert_close(attend(*args).double(), dense(*args), rtol=0, atol=1e-3)
    key[3 + 5, 0] = torch.nan  # the sixth key of the first K/V head
    got = attend(query, key, value, *chunks, *how)  # [4, 6, 16]
    assert got[:, :3].isnan().all()
    assert not got[:, 3:].isnan().any()


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sliding_window", [None, 50])
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 20)])
def test_a_query_gives_the_same_bits_in_any_batch(set_threads, dtype, sliding_window, heads):
    """A row of 150 positions: in one chunk, in chunks of odd sizes beside other rows, and one position at a time."""
    length, sizes = 150, (1, 2, 30, 3, 64, 17, 33)
    num_heads, kv_heads, head_dim = heads
    query, key, value, *chunks = problem(
        [(length, length)], heads=num_heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, gap=11
    )
    how = {"sliding_window": sliding_window, "softcap": 20.0, "sinks": torch.randn(num_heads)}
    set_threads(1)
    whole = ragged_attention(query, key, value, *chunks, **how)  # [150, heads, head_dim]

    for parts in (sizes, (1,) * length, (149, 1), (32, 118)):
        bounds = torch.tensor((0, *parts)).cumsum(0)
        ranges = torch.stack([torch.full_like(bounds[1:], 11), bounds[1:]], 1)
        for threads in (1, 2, 3):
            set_threads(threads)
            assert torch.equal(ragged_attention(query, key, value, bounds.int(), ranges, **how), whole)

    others = torch.randn(40, num_heads, head_dim).to(dtype)
    moved = [torch.cat([torch.randn(7, *x.shape[1:]).to(dtype), x]) for x in (key, value)]
    bounds, ranges = torch.tensor([0, 40, 40 + length], dtype=torch.int32), torch.tensor([[2, 55], [7 + 11, length]])
    got = ragged_attention(torch.cat([others, query]), *moved, bounds, ranges, **how)
    assert torch.equal(got[40:], whole)


def test_opcheck():
    args = *problem(CHUNKS), 0.25
    torch.library.opcheck(torch.ops.selfgen.ragged_attention.default, (*args, None, None, None))
    torch.library.opcheck(torch.ops.selfgen.ragged_attention.default, (*args, 9, 30.0, torch.randn(6)))


def test_compiles_as_one_graph():
    def step(query, key, value, cu_seqlens_q, kv_ranges, sinks):
        return 1 + ragged_attention(query, key, value, cu_seqlens_q, kv_ranges, sliding_window=9, sinks=sinks)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for chunks in (CHUNKS, CHUNKS[:3], CHUNKS[2:]):
        args = *problem(chunks), torch.randn(6)
        assert torch.equal(compiled(*args), step(*args))


@needs_cpp
def test_kernel_refuses_what_python_has_not_seen():
    query, key, value, bounds, ranges = problem([(2, 5)])
    op = torch.ops.selfgen.ragged_attention
    for wrong in ([0, 1], [0, 3], [1, 2], [0, 2, 2]):
        with pytest.raises(ValueError, match="ascend from 0 to the 2 queries"):
            op(query, key, value, torch.tensor(wrong, dtype=torch.int32), ranges, 1.0, None, None, None)
    for first, length in ((-1, 5), (4, 5), (0, 1), (0, 2**62), (2**62, 2**62)):
        with pytest.raises(ValueError, match="inside the 8 slots"):
            op(query, key, value, bounds, torch.tensor([[first, length]]), 1.0, None, None, None)


def test_there_is_no_backward_and_it_says_so():
    query, *rest = problem(CHUNKS)
    query.requires_grad_()
    with pytest.raises(RuntimeError, match="no backward; call it under"):
        ragged_attention(query, *rest)
    with torch.no_grad():
        assert not ragged_attention(query, *rest).requires_grad


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = [
    ({"query": [[[0.0]]]}, TypeError, "query must be a tensor, got list"),
    ({"query": torch.zeros(3, 4, 8, dtype=torch.int64)}, TypeError, "query has dtype torch.int64"),
    ({"query": torch.zeros(3, 32)}, ValueError, r"query has shape \[3, 32\], expected \[N, heads, head_dim\]"),
    ({"query": torch.zeros(3, 3, 8)}, ValueError, "3 query heads of size 8 cannot share 2 K/V heads"),
    ({"query": torch.zeros(3, 0, 8)}, ValueError, "0 query heads"),
    ({"key": torch.zeros(9, 2, 8).half()}, TypeError, "key has dtype torch.float16"),
    ({"key": torch.zeros(9, 2, 7)}, ValueError, r"key has shape \[9, 2, 7\], expected \[slots, kv_heads, 8\]"),
    ({"value": torch.zeros(8, 2, 8)}, ValueError, r"value has shape \[8, 2, 8\], expected \[9, 2, 8\]"),
    ({"value": torch.zeros(9, 2, 8).double()}, TypeError, "value has dtype torch.float64"),
    ({"value": torch.zeros(9, 2, 8, device="meta")}, ValueError, "value is on meta"),
    ({"cu_seqlens_q": torch.tensor([0, 1, 3])}, TypeError, "cu_seqlens_q has dtype torch.int64"),
    ({"cu_seqlens_q": int32()}, ValueError, "cu_seqlens_q is empty"),
    ({"cu_seqlens_q": int32(0, 1, 2)}, ValueError, r"cu_seqlens_q is \[0, 1, 2\], expected .* from 0 to the 3 queries"),
    ({"cu_seqlens_q": int32(1, 1, 3)}, ValueError, r"cu_seqlens_q is \[1, 1, 3\]"),
    ({"cu_seqlens_q": int32(0, 4, 3)}, ValueError, r"cu_seqlens_q is \[0, 4, 3\]"),
    ({"cu_seqlens_q": int32(0, 3)}, ValueError, r"kv_ranges has shape \[2, 2\], expected \[1, 2\]"),
    ({"kv_ranges": int32(0, 4, 4, 5).view(2, 2)}, TypeError, "kv_ranges has dtype torch.int32"),
    ({"kv_ranges": torch.tensor([[0, 4], [-1, 5]])}, ValueError, r"kv_ranges\[1\] is \[-1, 5\]"),
    ({"kv_ranges": torch.tensor([[0, 4], [5, 5]])}, ValueError, r"kv_ranges\[1\] is \[5, 5\], .* inside the 9 slots"),
    ({"kv_ranges": torch.tensor([[0, 4], [4, 1]])}, ValueError, "length >= 2, the queries of the chunk"),
    ({"kv_ranges": torch.tensor([[0, -4], [4, 5]])}, ValueError, r"kv_ranges\[0\] is \[0, -4\]"),
    ({"scale": float("nan")}, ValueError, "scale=nan is not accepted; pass a finite float"),
    ({"scale": "1"}, TypeError, "scale must be a float or None, got str"),
    ({"sliding_window": 0}, ValueError, "sliding_window=0 is not accepted; pass an int >= 1"),
    ({"sliding_window": 2.0}, TypeError, "sliding_window must be an int or None"),
    ({"softcap": 0.0}, ValueError, "softcap=0.0 is not accepted"),
    ({"softcap": float("inf")}, ValueError, "softcap=inf"),
    ({"sinks": torch.zeros(2)}, ValueError, r"sinks has shape \[2\], expected \[4\]"),
    ({"sinks": torch.zeros(4, dtype=torch.int32)}, TypeError, "sinks has dtype torch.int32"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), BAD, ids=lambda v: "-".join(v) if type(v) is dict else None)
def test_names_the_mistake(kwargs, error, message):
    good = {
        "query": torch.zeros(3, 4, 8),
        "key": torch.zeros(9, 2, 8),
        "value": torch.zeros(9, 2, 8),
        "cu_seqlens_q": int32(0, 1, 3),
        "kv_ranges": torch.tensor([[0, 4], [4, 5]]),
    }
    ragged_attention(**good)
    with pytest.raises(error, match=message):
        ragged_attention(**good | kwargs)


def test_example_of_the_docstring_runs():
    result = doctest.testmod(attention)
    assert result.attempted > 0
    assert result.failed == 0
