"""The K/V cache: attention against dense attention in float64, bit for bit in any batch; appending; every message."""

import doctest
import sys
from types import ModuleType

import conftest
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfgen_kernels import backends, kv_append, ragged_attention
from selfgen_kernels.backends.reference import attention as reference
from selfgen_kernels.ops import attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
needs_cpp = pytest.mark.skipif(backends.cpu.missing is not None, reason=f"no C++ kernels: {backends.cpu.missing}")


@pytest.fixture(params=["reference", pytest.param("cpp", marks=needs_cpp), conftest._TRITON])
def ops(request):
    """The ops of one backend, with the arguments of their schemas."""
    if request.param == "reference":
        return reference
    if request.param == "cpp":
        return torch.ops.selfgen
    return _triton_ops()


@pytest.fixture(params=[conftest._TRITON])
def triton_ops(request):
    """Triton's ops, for what only they do."""
    return _triton_ops()


def _triton_ops():
    pytest.importorskip("triton")
    from selfgen_kernels.backends.triton import attention as triton_attention

    return OnDevice(triton_attention) if conftest.ON_GPU else triton_attention


def interpreted(op) -> bool:
    """Whether `op` is Triton's and runs in its interpreter, which takes a millisecond per block."""
    return op.__module__.endswith("triton.attention")


class OnDevice:
    """Ops on a GPU, called with CPU tensors, whose strides they see."""

    def __init__(self, module):
        self.module = module

    def ragged_attention(self, *args):
        return self.module.ragged_attention(*conftest.moved(args, "cuda")).cpu()

    def kv_append(self, *args):
        on_gpu = conftest.moved(args, "cuda")
        self.module.kv_append(*on_gpu)
        for cache, result in zip(args[:2], on_gpu[:2], strict=True):
            cache.copy_(result)


@pytest.fixture
def attend(ops):
    """Ragged attention of one backend."""
    return ops.ragged_attention


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
FEW_CHUNKS = [(1, 33), (0, 5), (12, 70), (0, 0)]


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
        ({"heads": 2, "kv_heads": 1, "head_dim": 200}, {"sliding_window": 33, "softcap": 5.0, "sinks": True}),
        ({}, {"sliding_window": 1}),
        ({}, {"sliding_window": 2**62, "scale": -3.0}),
    ],
    ids=str,
)
@pytest.mark.each_pair
def test_agrees_with_dense_attention(attend, dtype, shape, options):
    chunks = CHUNKS
    if interpreted(attend):
        chunks = FEW_CHUNKS
    args = problem(chunks, **shape, dtype=dtype)
    sinks = torch.linspace(-3, 3, args[0].shape[1]).to(dtype) if "sinks" in options else None
    how = options.get("scale", 0.3), options.get("sliding_window"), options.get("softcap"), sinks
    got = attend(*args, *how)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), dense(*args, *how), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("chunks", [[], [(0, 0)], [(0, 4), (0, 0)], [(1, 1)], [(1, 300)], [(260, 260)], [(200, 300)]])
def test_few_many_and_no_queries(attend, chunks):
    args = problem(chunks)
    if interpreted(attend) and len(args[0]) > 100:
        args = problem([(queries // 4, keys // 4) for queries, keys in chunks])
    how = 0.25, None, None, None
    got = attend(*args, *how)
    assert got.shape == args[0].shape
    torch.testing.assert_close(got.double(), dense(*args, *how), rtol=0, atol=TOLERANCE[torch.float32])


def test_strides_do_not_matter(attend):
    query, key, value, *chunks = problem(FEW_CHUNKS)
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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sliding_window", [None, 6])
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float32, 16), (torch.bfloat16, 16), (torch.float64, 130)], ids=str
)
@pytest.mark.each_pair
def test_what_is_not_seen_does_no_harm(attend, bad, sliding_window, which, dtype, head_dim):
    """A key or value that is not finite reaches the queries that see it, and no other."""
    query, key, value, *chunks = problem([(12, 45), (5, 5)], heads=6, head_dim=head_dim, dtype=dtype)
    key, value = key.clone(), value.clone()
    how = 0.25, sliding_window, None, None
    clean = attend(query, key, value, *chunks, *how)
    position = 38  # of the first chunk, whose queries are positions 33 to 44
    (key if which == "key" else value)[3 + position, 1] = bad
    got = attend(query, key, value, *chunks, *how)  # [17, 6, 16]
    at = torch.arange(33, 45)
    sees = at >= position if sliding_window is None else (at >= position) & (at - position < sliding_window)
    sees = torch.cat([sees, torch.zeros(5, dtype=torch.bool)])
    assert (~got[sees][:, 3:].isfinite()).any(-1).all()
    torch.testing.assert_close(got[~sees], clean[~sees], rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(got[:, :3], clean[:, :3], rtol=0, atol=TOLERANCE[dtype])


def test_padding_gives_zeros(attend):
    query, key, value, bounds, ranges = problem([(3, 40), (0, 2), (12, 20)])
    how = 0.25, 9, None, torch.randn(6)
    want = attend(query, key, value, bounds, ranges, *how)
    for extra in (1, 70):
        padded = torch.cat([query, torch.full((extra, *query.shape[1:]), torch.nan)])
        got = attend(padded, key, value, bounds, ranges, *how)
        assert torch.equal(got[:15], want)
        assert torch.equal(got[15:], torch.zeros(extra, 6, 16))
    nothing = attend(query, key, value, bounds[:1], ranges[:0], *how)
    assert torch.equal(nothing, torch.zeros_like(query))


@given(
    chunks=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda c: (c[0], c[0] + c[1])), max_size=4),
    group=st.integers(1, 5),
    head_dim=st.integers(1, 33),
    window=st.none() | st.integers(1, 50),
)
def test_any_chunks(attend, chunks, group, head_dim, window):
    if interpreted(attend):
        chunks = [(queries // 5, keys // 5) for queries, keys in chunks[:2]]
    args = problem(chunks, heads=2 * group, kv_heads=2, head_dim=head_dim)
    how = 0.25, window, None, None
    torch.testing.assert_close(attend(*args, *how).double(), dense(*args, *how), rtol=0, atol=TOLERANCE[torch.float32])


def test_more_chunks_than_the_gpu_looks_at_together(attend):
    args = problem([(0, 0)] * 140 + [(1, 2)] * 5, heads=1, kv_heads=1, gap=0)
    how = 0.25, None, None, None
    torch.testing.assert_close(attend(*args, *how).double(), dense(*args, *how), rtol=0, atol=TOLERANCE[torch.float32])


def test_gpu_kernel_never_leaves_the_cache(triton_ops):
    """Ranges that Python can't look at on a GPU: NaN for the chunk, the others as they were."""
    attend = triton_ops.ragged_attention
    query, key, value, bounds, ranges = problem([(2, 9), (3, 8)])
    how = 0.25, None, None, None
    want = attend(query, key, value, bounds, ranges, *how)
    for first, length in ((-1, 5), (2**62, 9), (0, 2**62), (2**62, 2**62), (20, 9), (0, 1), (0, -3)):
        wrong = torch.tensor([[first, length], ranges[1].tolist()])
        got = attend(query, key, value, bounds, wrong, *how)
        assert got[:2].isnan().all()
        assert torch.equal(got[2:], want[2:])


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sliding_window", [None, 50])
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 20), (5, 5, 80), (8, 1, 128), (6, 1, 256)])
@pytest.mark.each_pair
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


@pytest.fixture
def shared_out(triton_ops, monkeypatch):
    """Sets how many keys a segment has and how they are shared out; products add in a fixed order.

    In the interpreter numpy's depend on a row's place in the tile.
    """
    module = triton_ops.module if conftest.ON_GPU else triton_ops
    if not conftest.ON_GPU:
        monkeypatch.setattr(numpy, "matmul", lambda a, b, dtype: (a[:, :, None] * b).sum(1, dtype=dtype))

    def choose(**constants):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)

    return choose


@pytest.mark.parametrize(("head_dim", "sliding_window"), [(16, None), (16, 20), (130, None)])
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float32, torch.float64))],
    ids=str,
)
def test_triton_gives_the_same_bits_in_any_batch(triton_ops, shared_out, dtype, head_dim, sliding_window):
    length = 40 if conftest.ON_GPU or dtype == torch.bfloat16 else 24
    query, key, value, *chunks = problem([(length, length)], head_dim=head_dim, dtype=dtype, gap=11)
    how = 0.1, sliding_window, 20.0, torch.randn(6)
    whole = triton_ops.ragged_attention(query, key, value, *chunks, *how)
    alone = (1,) * length if conftest.ON_GPU else (*(1,) * 4, length - 9, *(1,) * 5)
    for parts in ((1, 2, 10, 3, length - 16), (length - 1, 1), alone):
        bounds = torch.tensor((0, *parts)).cumsum(0)
        ranges = torch.stack([torch.full_like(bounds[1:], 11), bounds[1:]], 1)
        assert torch.equal(triton_ops.ragged_attention(query, key, value, bounds.int(), ranges, *how), whole)


@pytest.mark.parametrize("sliding_window", [None, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.each_value
def test_triton_gives_the_same_bits_however_segments_are_shared_out(triton_ops, shared_out, dtype, sliding_window):
    """One program for all segments or one for each, only for rows with few of them, and cut into other chunks."""
    shared_out(SEGMENT=64)
    query, key, value, *chunks = problem([(3, 230), (1, 20), (5, 130)], head_dim=16, dtype=dtype, heads=4)
    key[11, 0] = torch.nan  # seen by the first row, if it looks that far back
    how = 0.1, sliding_window, 20.0, torch.randn(4)

    def attend(programs, partial_bytes=2**26, cut=chunks):
        shared_out(PROGRAMS=programs, PARTIAL_BYTES=partial_bytes)
        return triton_ops.ragged_attention(query, key, value, *cut, *how)

    segment_bytes = 9 * 4 * (16 + 2) * max(4, dtype.itemsize)
    by_one = attend(1)
    assert by_one[:3].isnan().any() == (sliding_window is None)
    wanted = {"rtol": 0, "atol": 0, "equal_nan": True}
    for programs, partial_bytes in ((1000, 2**26), (20, 2**26), (1000, 3 * segment_bytes)):
        torch.testing.assert_close(attend(programs, partial_bytes), by_one, **wanted)
    starts, ends = chunks[1][:, 0], chunks[1].sum(1)
    cut = (
        torch.tensor([0, 1, 3, 4, 9], dtype=torch.int32),
        torch.stack([starts[[0, 0, 1, 2]], (ends - starts)[[0, 0, 1, 2]] - torch.tensor([2, 0, 0, 0])], 1),
    )
    for programs in (1, 1000):
        torch.testing.assert_close(attend(programs, cut=cut), by_one, **wanted)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [3, 300])
@pytest.mark.each_value
def test_a_value_that_is_not_finite_is_seen_in_any_part_of_a_wide_head(triton_ops, shared_out, column, bad):
    """In its own columns at least, and the same whether segments are shared out or not."""
    shared_out(SEGMENT=64)
    query, key, value, *chunks = problem([(1, 130)], head_dim=320, heads=2)
    value[chunks[1][0, 0] + 5, 0, column] = bad
    found = []
    for programs in (1, 1000):
        shared_out(PROGRAMS=programs)
        found.append(triton_ops.ragged_attention(query, key, value, *chunks, 0.1, None, None, None).isnan())
    assert torch.equal(*found)
    part = slice(0, 256) if column < 256 else slice(256, None)
    assert found[0].nonzero()[:, 2].unique().tolist() == list(range(320))[part]


@pytest.mark.parametrize("programs", [1, 1000])
@pytest.mark.parametrize(
    ("shape", "options"),
    [({}, {}), ({"head_dim": 23}, {"sliding_window": 70, "softcap": 5.0, "sinks": True}), ({"head_dim": 130}, {})],
    ids=str,
)
def test_segments_agree_with_dense_attention(triton_ops, shared_out, shape, options, programs):
    shared_out(SEGMENT=64, PROGRAMS=programs)
    args = problem([(2, 200), (1, 20), (0, 0), (0, 70), (12, 140)], **shape)
    sinks = torch.linspace(-3, 3, 6) if "sinks" in options else None
    how = 0.3, options.get("sliding_window"), options.get("softcap"), sinks
    got = triton_ops.ragged_attention(*args, *how)
    torch.testing.assert_close(got.double(), dense(*args, *how), rtol=0, atol=TOLERANCE[torch.float32])


def test_when_segments_are_shared_out():
    pytest.importorskip("triton")
    from selfgen_kernels.backends.triton.attention import PARTIAL_BYTES, shared_segments

    def shared(slots, chunks=1, queries=1, window=2**30, programs=8):
        query, key = torch.empty(queries, 32, 128, device="meta"), torch.empty(slots, 8, 128, device="meta")
        return shared_segments(query, key, chunks, window, programs, 64)

    assert shared(512) == 1
    assert shared(4 * 512, chunks=4) == 1  # rows of 512 keys each: one launch
    assert shared(4096) == 9
    assert shared(4096, window=512) == 1
    assert shared(2**20, window=1024) == 4
    assert shared(4096, programs=2048) == 1  # programs enough without
    assert shared(4096, programs=512) == 4
    for queries in (1, 64, 4096):
        segments = shared(2**20, queries=queries)
        assert segments * queries * 32 * 130 * 4 <= PARTIAL_BYTES or segments == 1


def test_three_products_of_tf32_lose_what_is_said():
    """Not the tensor cores: their arithmetic, in torch. A product is off by less than 2^-19, a sum by hardly more."""

    def first_bits(x, nearest):  # 11 of the 24 that fp32 has
        bits = x.view(torch.int32) + (0x1000 if nearest else 0)
        return (bits & ~0x1FFF).view(torch.float32)

    a, b = torch.randn(2, 10**6, generator=torch.Generator().manual_seed(0))
    halves = [(large := first_bits(x, True), first_bits(x - large, False)) for x in (a, b)]
    (a_large, a_small), (b_large, b_small) = ([part.double() for part in pair] for pair in halves)
    got, exact = a_large * b_large + a_large * b_small + a_small * b_large, a.double() * b.double()
    error = ((got - exact) / exact).abs()
    assert 2**-22 < error.max() < 2**-19
    assert (a_large * b_large - exact).div(exact).abs().max() > 2**-12  # without the second and third


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [257, 320, pytest.param(512, marks=pytest.mark.slow)])
def test_heads_wider_than_a_program_sums_up(triton_ops, dtype, head_dim):
    """Their columns are parts of the accumulator, and no torch reference stands in."""
    args = problem([(2, 40), (1, 1)], head_dim=head_dim, dtype=dtype)
    how = 0.1, 33, 5.0, torch.linspace(-3, 3, 6).to(dtype)
    got = triton_ops.ragged_attention(*args, *how)
    torch.testing.assert_close(got.double(), dense(*args, *how), rtol=0, atol=TOLERANCE[dtype])


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
    for wrong in ([0, -1], [0, 3], [1, 2], [0, 2, 2]):
        with pytest.raises(ValueError, match="ascending numbers from 0 to at most the 2 queries"):
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


@pytest.mark.parametrize("which", ["query", "key", "value", "sinks"])
def test_there_is_no_forward_derivative_and_it_says_so(which):
    """Else torch.func.jvp would take it for zero."""
    names = "query", "key", "value", "cu_seqlens_q", "kv_ranges"
    args = dict(zip(names, problem(CHUNKS), strict=True)) | {"sinks": torch.zeros(6)}
    with pytest.raises(RuntimeError, match="no forward-mode derivative; detach its tensors"):
        torch.func.jvp(lambda x: ragged_attention(**args | {which: x}), (args[which],), (torch.ones_like(args[which]),))
    result, tangent = torch.func.jvp(lambda x: x * ragged_attention(**args).sum(), (torch.ones(1),), (torch.ones(1),))
    assert torch.equal(result, tangent)


def test_append_has_no_forward_derivative_and_says_so():
    *caches, key, value, slots = append_problem()
    with pytest.raises(RuntimeError, match="kv_append has no backward and no forward-mode derivative"):
        torch.func.jvp(lambda x: kv_append(*caches, x, value, slots), (key,), (key,))


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
    ({"cu_seqlens_q": int32(0, 1, 4)}, ValueError, r"cu_seqlens_q is \[0, 1, 4\], expected .* at most the 3 queries"),
    ({"cu_seqlens_q": int32(1, 1, 3)}, ValueError, r"cu_seqlens_q is \[1, 1, 3\]"),
    ({"cu_seqlens_q": int32(0, 4, 3)}, ValueError, r"cu_seqlens_q is \[0, 4, 3\]"),
    ({"cu_seqlens_q": int32(0, 3)}, ValueError, r"kv_ranges has shape \[2, 2\], expected \[1, 2\]"),
    ({"kv_ranges": int32(0, 4, 4, 5).view(2, 2)}, TypeError, "kv_ranges has dtype torch.int32"),
    ({"kv_ranges": torch.tensor([[0, 4], [-1, 5]])}, ValueError, r"kv_ranges\[1\] is \[-1, 5\]"),
    ({"kv_ranges": torch.tensor([[0, 4], [5, 5]])}, ValueError, r"kv_ranges\[1\] is \[5, 5\], .* inside the 9 slots"),
    ({"kv_ranges": torch.tensor([[0, 4], [4, 1]])}, ValueError, "length >= 2, the queries of the chunk"),
    ({"kv_ranges": torch.tensor([[0, -4], [4, 5]])}, ValueError, r"kv_ranges\[0\] is \[0, -4\]"),
    ({"scale": float("nan")}, ValueError, "scale=nan is not accepted; pass 0 or a float with"),
    ({"scale": 1e300}, ValueError, r"scale=1e\+300 is not accepted"),
    ({"scale": -1e-39}, ValueError, "scale=-1e-39 is not accepted"),
    ({"scale": "1"}, TypeError, "scale must be a float or None, got str"),
    ({"sliding_window": 0}, ValueError, "sliding_window=0 is not accepted; pass an int >= 1"),
    ({"sliding_window": 2.0}, TypeError, "sliding_window must be an int or None"),
    ({"softcap": 0.0}, ValueError, "softcap=0.0 is not accepted"),
    ({"softcap": float("inf")}, ValueError, "softcap=inf"),
    ({"implementation": "fast"}, ValueError, "implementation='fast' is not accepted"),
    ({"implementation": "flash_attn"}, ValueError, "flash-attn does not offer tensors on cpu, dtype torch.float32"),
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


def append_problem(dtype=torch.float32, tokens=7, slots=20, kv_heads=3, head_dim=16):
    """(key_cache, value_cache, key, value, slots): every third token is padding."""
    generator = torch.Generator().manual_seed(0)
    caches = torch.randn(2, slots, kv_heads, head_dim, generator=generator).to(dtype)
    states = torch.randn(2, tokens, kv_heads, head_dim, generator=generator).to(dtype)
    where = torch.randperm(slots, generator=generator)[:tokens]
    where[::3] = -torch.arange(1, len(where[::3]) + 1)
    return *caches, *states, where


def appended(caches, states, slots):
    """What the caches hold afterwards, one token after the other."""
    want = [cache.clone() for cache in caches]
    for cache, rows in zip(want, states, strict=True):
        for slot, row in zip(slots.tolist(), rows, strict=True):
            if slot >= 0:
                cache[slot] = row
    return want


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tokens": 0},
        {"tokens": 1},
        {"kv_heads": 1, "head_dim": 1},
        {"head_dim": 80},
        {"kv_heads": 9, "head_dim": 128},
    ],
    ids=str,
)
def test_append_writes_its_slots_and_nothing_else(ops, dtype, shape):
    *tensors, slots = append_problem(dtype, **shape)
    want = appended(tensors[:2], tensors[2:], slots)
    ops.kv_append(*tensors, slots)
    for got, expected in zip(tensors[:2], want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("which", [(0, 1), (2, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("stride", ["heads first", "gaps in heads", "expanded"])
def test_append_takes_any_strides(ops, which, stride):
    *tensors, slots = append_problem()
    for i in which:
        x = tensors[i]
        if stride == "heads first":
            tensors[i] = x.transpose(0, 1).contiguous().transpose(0, 1)
        elif stride == "gaps in heads":
            tensors[i] = torch.stack([x, x], -1)[..., 0]
        elif i >= 2:
            tensors[i] = x[:, :1].expand_as(x)
    want = appended(tensors[:2], tensors[2:], slots)
    ops.kv_append(*tensors, slots)
    for got, expected in zip(tensors[:2], want, strict=True):
        assert torch.equal(got, expected)


def test_gpu_append_skips_slots_past_the_end(triton_ops):
    *tensors, slots = append_problem()
    slots[1], slots[2] = 20, 2**62
    want = appended(tensors[:2], tensors[2:], slots.where(slots < 20, -1))
    triton_ops.kv_append(*tensors, slots)
    assert all(torch.equal(got, expected) for got, expected in zip(tensors[:2], want, strict=True))


def test_append_in_one_graph():
    def step(key_cache, value_cache, key, value, slots):
        kv_append(key_cache, value_cache, key, value, slots)
        return key_cache.sum() + value_cache.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = append_problem(), append_problem()
    assert torch.equal(compiled(*got), step(*want))
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"slots": torch.tensor([0, 20, 1])}, ValueError, "slots holds 20, accepted are slots below 20"),
        ({"slots": int32(0, 1, 2)}, TypeError, "slots has dtype torch.int32"),
        ({"slots": torch.tensor([0])}, ValueError, r"slots has shape \[1\], expected \[3\]"),
        ({"key": torch.zeros(3, 3, 8)}, ValueError, r"key has shape \[3, 3, 8\], expected \[N, 3, 16\]"),
        ({"value": torch.zeros(3, 3, 16).half()}, TypeError, "value has dtype torch.float16"),
        ({"value_cache": torch.zeros(4, 3, 16)}, ValueError, r"value_cache has shape \[4, 3, 16\], expected \[20"),
        ({"key": torch.zeros(3, 3, 16, requires_grad=True)}, RuntimeError, "kv_append has no backward"),
    ],
    ids=str,
)
def test_append_names_the_mistake(change, error, message):
    names = "key_cache", "value_cache", "key", "value", "slots"
    good = dict(zip(names, append_problem(tokens=3), strict=True))
    kv_append(**good)
    with pytest.raises(error, match=message):
        kv_append(**good | change)


@pytest.mark.parametrize(
    "layout", ["halves", "interleaved slots", "interleaved heads", "interleaved numbers", "buffer"]
)
def test_append_takes_two_caches_of_one_tensor(layout):
    *_, key, value, slots = append_problem()
    storage = torch.zeros(2, 20, 3, 16)
    if layout == "buffer":  # K and V of the new tokens lie after the caches
        buffer = torch.zeros(2 * 20 * 48 + 2 * 7 * 48)
        storage = buffer[: 2 * 20 * 48].view(2, 20, 3, 16)
        key, value = buffer[2 * 20 * 48 :].view(2, 7, 3, 16).copy_(torch.stack([key, value]))
    axis = {"interleaved slots": 1, "interleaved heads": 2, "interleaved numbers": 3}.get(layout, 0)
    caches = storage.movedim(0, axis).contiguous().unbind(axis) if axis else storage.unbind()
    want = appended(caches, (key, value), slots)
    kv_append(*caches, key, value, slots)
    assert all(torch.equal(got, expected) for got, expected in zip(caches, want, strict=True))


def test_append_takes_empty_tensors_of_one_tensor():
    for slots, heads in ((0, 3), (4, 0)):
        cache = torch.zeros(2, slots, heads, 16)
        kv_append(*cache, cache[0, :0], cache[1, :0], torch.zeros(0, dtype=torch.int64))


def test_append_refuses_memory_that_it_would_read_and_write():
    key_cache, value_cache, key, value, slots = append_problem()
    for wrong, message in (
        ((key_cache, key_cache, key, value), "key_cache and value_cache share memory"),
        ((key_cache[:9], key_cache[2:11], key, value), "key_cache and value_cache share memory"),
        ((key_cache, value_cache, key_cache[3:10], value), "key is a view of key_cache"),
        ((key_cache, value_cache, value_cache[3:10], value), "key is a view of value_cache"),
        ((key_cache, value_cache, key, key_cache[:7]), "value is a view of key_cache"),
        ((key_cache[:1].expand(20, 3, 16), value_cache, key, value), "key_cache is expanded"),
        ((key_cache, value_cache[:, :, :1].expand(20, 3, 16), key, value), "value_cache is expanded"),
    ):
        with pytest.raises(ValueError, match=message):
            kv_append(*wrong, slots.clamp(max=8))


@pytest.mark.parametrize("append", [kv_append, torch.ops.selfgen.kv_append])
def test_append_of_negative_views(append):
    """torch's fallback for the negative bit, which .imag of a conjugate has, writes past the end of its stack."""
    *caches, key, value, slots = append_problem()
    want = appended(caches, (-key, -value), slots)
    append(*caches, torch._neg_view(key), torch._neg_view(value), slots)
    assert all(torch.equal(got, expected) for got, expected in zip(caches, want, strict=True))
    for wrong in ((torch._neg_view(caches[0]), caches[1]), (caches[0], torch._neg_view(caches[1]))):
        with pytest.raises(ValueError, match="_cache is a view of its negative"):
            append(*wrong, key, value, slots)


@needs_cpp
def test_append_kernel_refuses_what_python_has_not_seen():
    *tensors, slots = append_problem()
    slots[1] = 20
    with pytest.raises(ValueError, match="slots holds 20, accepted are slots below 20"):
        torch.ops.selfgen.kv_append(*tensors, slots)
    before = tensors[0].clone()
    with pytest.raises(ValueError, match=r"value_cache has shape \[1, 3, 16\], expected \[20, 3, 16\]"):
        torch.ops.selfgen.kv_append(tensors[0], tensors[1][:1], *tensors[2:], slots.clamp(max=0))
    assert torch.equal(tensors[0], before), "written before the error"


def fake_flash_attn(calls):
    """A module flash_attn that computes what flash-attn documents, from the arguments it would be given."""

    def forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        assert {x.dtype for x in (cu_seqlens_q, cu_seqlens_k, seqused_k)} == {torch.int32}
        assert cu_seqlens_k.shape == cu_seqlens_q.shape == (len(seqused_k) + 1,)
        assert all(x.is_contiguous() for x in (cu_seqlens_q, cu_seqlens_k, seqused_k))
        assert causal
        assert dropout_p == 0
        assert max_seqlen_q >= max(2, cu_seqlens_q.diff().max())
        assert max_seqlen_k >= seqused_k.max()
        calls.append((k, v))
        ranges = torch.stack([cu_seqlens_k[:-1], seqused_k], 1).long()
        window = None if window_size_left < 0 else window_size_left + 1
        out = reference.ragged_attention(q, k, v, cu_seqlens_q, ranges, softmax_scale, window, softcap or None, None)
        out[cu_seqlens_q[-1] :] = torch.nan  # flash-attn does not write there
        return out, None, None, None

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = forward
    package.flash_attn_interface = interface
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (7, 5.0)])
def test_flash_attn_is_called_over_the_cache_in_place(monkeypatch, window, softcap):
    calls = []
    for name, module in fake_flash_attn(calls).items():
        monkeypatch.setitem(sys.modules, name, module)
    query, key, value, bounds, ranges = problem(CHUNKS, dtype=torch.bfloat16)
    query = torch.cat([query, query[:3]])  # padding
    how = 0.25, window, softcap, None
    want = reference.ragged_attention(query, key, value, bounds, ranges, *how)
    monkeypatch.setattr(backends.flash_attn, "_device_type", lambda query: "cuda")
    got = ragged_attention(
        query, key, value, bounds, ranges, scale=0.25, sliding_window=window, softcap=softcap,
        implementation="flash_attn",
    )  # fmt: skip
    assert torch.equal(got, want)
    assert calls[0][0] is key
    assert calls[0][1] is value


def test_flash_attn_missing_or_without_the_feature(monkeypatch):
    monkeypatch.setattr(backends.flash_attn, "_device_type", lambda query: "cuda")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    args = problem([(2, 5)], dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"needs flash-attn >= 2.7, which cannot be imported"):
        ragged_attention(*args, implementation="flash_attn")
    with pytest.raises(ValueError, match="does not offer sinks"):
        ragged_attention(*args, sinks=torch.zeros(6), implementation="flash_attn")
    with pytest.raises(ValueError, match=r"does not offer dtype torch.float64, head_dim 264"):
        ragged_attention(*problem([(1, 1)], head_dim=264, dtype=torch.float64), implementation="flash_attn")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 7])
def test_flash_attn_agrees_on_a_gpu(window):
    pytest.importorskip("flash_attn")
    args = problem(CHUNKS, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    how = 0.25, window, None, None
    on_gpu = [x.cuda() for x in args]
    got = ragged_attention(*on_gpu, scale=0.25, sliding_window=window, implementation="flash_attn")
    torch.testing.assert_close(got.cpu().double(), dense(*args, *how), rtol=0, atol=TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.bfloat16, 16), (torch.float32, 256), (torch.float64, 256), (torch.float32, 320)],
    ids=str,
)
def test_a_step_is_captured_in_a_cuda_graph(dtype, head_dim):
    query, key, value, bounds, ranges = (x.cuda() for x in problem(CHUNKS, head_dim=head_dim, dtype=dtype))
    states, slots = torch.randn(2, 4, *key.shape[1:]).to(key).unbind(), torch.tensor([0, 1, -1, 2]).cuda()

    def step():
        kv_append(key, value, *states, slots)
        return ragged_attention(query, key, value, bounds, ranges)

    want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert torch.equal(got, want)
