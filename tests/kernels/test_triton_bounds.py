"""Triton kernels touch their tensors only: random shapes under `guard`, and the guard against kernels that stray.

A kernel joins with its name in `LAUNCHES`, next to a function that draws arguments and launches it.
"""

import contextlib
from importlib import import_module
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the guard is one of the interpreter", allow_module_level=True)

import specimens
import triton.language as tl
from guard import guarded
from test_passes import next_self_of
from triton.runtime.errors import InterpreterError

from selfgen_kernels.backends.triton import (
    activation,
    attention,
    filters,
    head,
    head_log_prob,
    linear,
    noise,
    norm,
    passes,
    products,
    rotary,
    sampling,
)
from selfgen_kernels.call import Sampling
from tools.aot import shipped_modules

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
GAPS = st.sampled_from([0, 1, 3, 16])
BAD = st.sampled_from([torch.nan, torch.inf, -torch.inf])
FAR = st.sampled_from([-(2**63), -(2**40), -2, -1, 2**31, 2**62, 2**63 - 1])


@contextlib.contextmanager
def small_constants():
    """Tiles and steps so small that small tensors have several: the interpreter takes its time for each."""
    names = "BLOCK_M", "BLOCK_N", "BLOCK_K"
    tile = dict(zip(names, (16, 64, 16), strict=True)), {"num_warps": 4, "num_stages": 2}
    with (
        mock.patch.multiple(sampling, SPAN=8, BLOCK=4),
        mock.patch.multiple(filters, SPAN=256, BLOCK=128, STEP=4),
        mock.patch.object(products, "tile_constants", return_value=tile),
        mock.patch.object(linear, "tile_constants", return_value=tile),
        mock.patch.object(products, "ROWS", 16),
        mock.patch.object(passes, "SCAN", 16),
        mock.patch.object(head, "FEW_ROWS", 16),
        mock.patch.object(head_log_prob, "FEW_ROWS", 16),
        mock.patch.dict(products.REDUCTION, LANES=2),
        mock.patch.dict(products.SPAN, GROUPS=4),
    ):
        yield


def vocabulary_of(draw):
    """Up to a little more than a program of `sampling` looks at."""
    span = sampling.SPAN * 64
    return draw(st.sampled_from([1, 63, 64, 65, span // 2, span - 1, span, span + 1]) | st.integers(1, span * 9 // 8))


def padded(draw, shape, dtype):
    """A tensor whose rows lie apart, in any order of all axes but the last; the last row ends its memory."""
    *rows, size = shape
    order = draw(st.permutations(range(len(rows))))
    data = torch.randn(*(rows[axis] + draw(GAPS) for axis in order), size + draw(GAPS)).to(dtype)
    for axis, place in enumerate(order):
        data = data.narrow(axis, 0, rows[place])
    return data.permute(*(order.index(axis) for axis in range(len(rows))), len(rows))[..., :size]


def spoilt(draw, x):
    """`x` with a number that is not finite, or without."""
    if x.numel() and draw(st.booleans()):
        x[tuple(draw(st.integers(0, n - 1)) for n in x.shape)] = draw(BAD)
    return x


def how_of(draw, n, *names):
    """A `Sampling` of n rows with the filters `names`: some rows are self rows, some greedy."""
    values = {"top_k": [-1, 1, 5, 2**40], "top_p": [1e-9, 0.9, 1.0], "min_p": [0.0, 0.1, 1.0]}
    dtypes = {"top_k": torch.int64, "top_p": torch.float64, "min_p": torch.float64}
    cuts = {name: torch.full((n,), draw(st.sampled_from(values[name])), dtype=dtypes[name]) for name in names}
    threshold = torch.tensor(draw(st.lists(st.sampled_from([2**32, 2**31, 0]), min_size=n, max_size=n)))
    inv_temperature = torch.tensor([1.0, torch.inf, 0.5]).repeat(n)[:n]
    return Sampling(threshold.long(), 3, torch.arange(n), torch.arange(n), inv_temperature, **cuts)


def some_filters(draw):
    return draw(st.lists(st.sampled_from(["top_k", "top_p", "min_p"]), unique=True))


def gumbel_noise(draw):
    n, size = draw(st.integers(0, 3)), draw(st.integers(0, 3000))
    return noise.gumbel_noise(draw(st.integers(-(2**63), 2**63 - 1)), torch.arange(n), torch.arange(n), size, 1)


def self_mask(draw):
    n = draw(st.integers(0, 9))
    return noise.self_mask(1, torch.arange(n), torch.arange(n), torch.full((n,), 2**31))


def sample_mix(draw):
    n = draw(st.integers(0, 3))
    logits = spoilt(draw, padded(draw, (n, vocabulary_of(draw)), draw(DTYPES)))
    return sampling.sample_mix(logits, torch.arange(n), *how_of(draw, n, *some_filters(draw)))


def reference_log_prob(draw):
    n = draw(st.integers(0, 3))
    logits = spoilt(draw, padded(draw, (n, vocabulary_of(draw)), draw(DTYPES)))
    ids = st.integers(0, logits.shape[1] - 1) | st.just(logits.shape[1]) | FAR
    tokens = torch.tensor(draw(st.lists(ids, min_size=n, max_size=n)), dtype=torch.int64)
    return sampling.reference_log_prob(logits, tokens, *how_of(draw, n).mask)


def filter_cutoff(draw):
    n = draw(st.integers(0, 2))
    logits = spoilt(draw, padded(draw, (n, vocabulary_of(draw)), draw(DTYPES)))
    for names in (["top_k"], ["top_p"], ["min_p"], ["top_k", "top_p", "min_p"]):
        filters.filter_cutoff(logits, how_of(draw, n, *names))


def rows_of(draw):
    """None, a few, or around as many as a tile has."""
    tile = products.tile_constants("sm_80", "fp32", 1, True)[0]["BLOCK_M"]
    return draw(st.integers(0, 9) | st.sampled_from([16, 17, tile, tile + 1]))


def a_head(draw, n):
    """hidden [n, D], weight [V, D], bias [V] or none, softcap and scale; V is up to a few tiles."""
    dtype, size = draw(DTYPES), draw(st.sampled_from([0, 1, 5, 16, 33, 48, 64, 67]))
    vocab_size = draw(st.one_of(st.sampled_from([1, 63, 64, 65, 127, 128, 129, 256]), st.integers(1, 300)))
    bias = spoilt(draw, torch.randn(vocab_size).to(dtype)) if draw(st.booleans()) else None
    if bias is not None and draw(st.integers(0, 5)) == 0:
        bias[:] = -torch.inf
    hidden, weight = padded(draw, (n, size), dtype), padded(draw, (vocab_size, size), dtype)
    return spoilt(draw, hidden), weight, bias, draw(st.sampled_from([None, 5.0])), draw(st.sampled_from([1.0, 0.3]))


def linear_sample_mix(draw):
    names = some_filters(draw) if draw(st.integers(0, 3)) == 0 else []
    n = draw(st.integers(0, 9)) if names else rows_of(draw)
    return head.linear_sample_mix(*a_head(draw, n), torch.arange(n), *how_of(draw, n, *names))


def linear_reference_log_prob(draw):
    n = rows_of(draw)
    given = a_head(draw, n)
    ids = st.integers(0, len(given[1])) | FAR
    tokens = torch.tensor(draw(st.lists(ids, min_size=n, max_size=n)), dtype=torch.int64)
    return head.linear_reference_log_prob(*given, tokens, *how_of(draw, n).mask)


def linear_sample_shard(draw):
    n, first_id = rows_of(draw), draw(st.sampled_from([0, 64, 128, 2**20]) | st.integers(0, 300))
    return head.linear_sample_shard(*a_head(draw, n), first_id, *how_of(draw, n).draw)


def invariant_linear(draw):
    hidden, weight, bias, *_ = a_head(draw, rows_of(draw))
    return linear.invariant_linear(hidden, weight, bias)


def a_batch(draw):
    """(query, key, value, cu_seqlens_q, kv_ranges): chunks one after the other in a cache that the last one ends."""
    chunks = [(0, 0)] * draw(st.integers(0, 5))
    chunks += [(draw(st.integers(0, 40)), draw(st.integers(0, 40))) for _ in range(draw(st.integers(0, 3)))]
    queries, before = torch.tensor(chunks, dtype=torch.int64).view(-1, 2).unbind(1)
    lengths, bounds = queries + before, torch.cat([torch.zeros(1), queries.cumsum(0)]).int()
    kv_heads, dtype, head_dim = draw(st.integers(1, 2)), draw(DTYPES), draw(st.sampled_from([1, 16, 20, 64, 80]))
    padding, heads = draw(st.sampled_from([0, 1, 70])), kv_heads * draw(st.integers(1, 3))
    query = padded(draw, (int(queries.sum()) + padding, heads, head_dim), dtype)
    key, value = (spoilt(draw, padded(draw, (int(lengths.sum()), kv_heads, head_dim), dtype)) for _ in range(2))
    return query, key, value, bounds, torch.stack([lengths.cumsum(0) - lengths, lengths], 1)


def attend(draw, query, *batch):
    sinks = draw(st.sampled_from([None, torch.randn(query.shape[1])]))
    how = 0.3, draw(st.sampled_from([None, 1, 7, 40])), draw(st.sampled_from([None, 5.0])), sinks
    search, segments = draw(st.sampled_from([4, attention.SEARCH.value])), draw(st.sampled_from([1, 2, 9]))
    constants = {"SEARCH": tl.constexpr(search), "SEGMENT": 32, "shared_segments": lambda *_: segments}
    with mock.patch.multiple(attention, **constants):
        return attention.ragged_attention(query, *batch, *how)


def ragged_attention(draw):
    return attend(draw, *a_batch(draw))


def ragged_attention_of_nonsense(draw):
    """Ranges that leave the cache, also by one slot only, and bounds of no chunks."""
    query, key, value, bounds, ranges = a_batch(draw)
    slots = len(key)
    for wrong in ranges[-3:]:
        start, length = wrong.tolist()
        before, behind, long = (-1, length + 1), (slots - length + 1, length), (start, slots - start + 1)
        far = draw(FAR), draw(FAR)
        wrong[:] = torch.tensor(draw(st.sampled_from([before, behind, long, (start, -length), (0, far[0]), far])))
    if draw(st.integers(0, 2)) == 0:
        some = st.integers(-3, len(query) + 3) | st.sampled_from([-(2**31), 2**31 - 1])
        first = draw(st.sampled_from([-1, 0, len(query), 2**31 - 1]))
        bounds = torch.tensor([first] + [draw(some) for _ in bounds[1:]], dtype=torch.int32)
    return attend(draw, query, key, value, bounds, ranges)


def kv_append(draw):
    n, slots, dtype = draw(st.integers(0, 70)), draw(st.integers(0, 9)), draw(DTYPES)
    where = torch.randint(-2, slots + 2, (n,))
    where[::7] = draw(FAR)
    width = draw(st.integers(1, 5)), draw(st.sampled_from([1, 5, 16, 80, 256]))
    caches = [padded(draw, (slots, *width), dtype) for _ in range(2)]
    return attention.kv_append(*caches, *(padded(draw, (n, *width), dtype) for _ in range(2)), where)


def rms_norm(draw):
    rows, width = draw(st.integers(0, 40)), draw(st.integers(1, 80) | st.sampled_from([512, 1025]))
    x = spoilt(draw, padded(draw, (rows, width), draw(DTYPES)))
    weight = torch.randn(width).to(draw(DTYPES))
    with mock.patch.object(norm, "TILE", draw(st.sampled_from([64, norm.TILE]))):
        return norm.rms_norm(x, weight, 1e-6, draw(st.booleans()), draw(st.booleans()))


def add_rms_norm(draw):
    rows, width = draw(st.integers(0, 40)), draw(st.integers(1, 80) | st.sampled_from([512, 1025]))
    x, residual = (spoilt(draw, padded(draw, (rows, width), draw(DTYPES))) for _ in range(2))
    weight = torch.randn(width).to(draw(DTYPES))
    with mock.patch.object(norm, "TILE", draw(st.sampled_from([64, norm.TILE]))):
        return norm.add_rms_norm(x, residual, weight, 1e-6, draw(st.booleans()), draw(st.booleans()))


def act_mul(draw):
    rows, width, dtype = (
        draw(st.integers(0, 5)),
        draw(st.integers(0, 300) | st.sampled_from([2048, 2049])),
        draw(DTYPES),
    )
    gate, up = (spoilt(draw, padded(draw, (rows, width), dtype)) for _ in range(2))
    with mock.patch.object(activation, "BLOCK", draw(st.sampled_from([64, activation.BLOCK]))):
        return activation.act_mul(gate, up, draw(st.booleans()))


def turn(draw):
    tokens, heads, kv_heads = (draw(st.integers(0, 5)) for _ in range(3))
    head_dim, dtype, of_cos = draw(st.sampled_from([2, 16, 20, 64, 96])), draw(DTYPES), draw(DTYPES)
    states = (spoilt(draw, padded(draw, (tokens, count, head_dim), dtype)) for count in (heads, kv_heads))
    angles = (padded(draw, (tokens, head_dim), of_cos) for _ in range(2))
    with mock.patch.object(rotary, "TILE", draw(st.sampled_from([16, rotary.TILE]))):
        return rotary.rotary(*states, *angles, draw(st.booleans()))


def turn_and_append(draw):
    tokens, heads, kv_heads, slots = (draw(st.integers(0, 5)) for _ in range(4))
    head_dim, dtype, of_cos, of_cache = draw(st.sampled_from([2, 16, 20, 64, 96])), *(draw(DTYPES) for _ in range(3))
    where = torch.randint(-2, slots + 2, (tokens,))
    where[::3] = draw(FAR)
    caches = [padded(draw, (slots, kv_heads, head_dim), of_cache) for _ in range(2)]
    states = (spoilt(draw, padded(draw, (tokens, count, head_dim), dtype)) for count in (heads, kv_heads))
    value = padded(draw, (tokens, kv_heads, head_dim), of_cache)
    angles = (padded(draw, (tokens, head_dim), of_cos) for _ in range(2))
    with mock.patch.object(rotary, "TILE", draw(st.sampled_from([16, rotary.TILE]))):
        return rotary.rotary_append(*caches, *states, value, *angles, where, draw(st.booleans()))


def a_state(draw):
    """(final, row_starts, next_self, log_chance) of rows of slots; half of the time it holds numbers of no slot."""
    rows = draw(st.sampled_from([0, 1, 2, 3, 63, 64, 65]))
    size = draw(st.integers(1, 9 if rows > 3 else 300))
    next_self, row_starts = (x.long() for x in next_self_of((torch.rand(rows, size) < 0.4).tolist()))
    final = row_starts + torch.randint(0, size, (rows,))
    log_chance = torch.tensor([0.0, -0.5, -torch.inf])[torch.randint(0, 3, next_self.shape)]
    if rows and draw(st.booleans()):
        next_self[final[::3]] = draw(FAR | st.sampled_from([0, rows * size]))
    if rows and draw(st.booleans()):
        final[draw(st.integers(0, rows - 1))] = draw(FAR | st.sampled_from([rows * size - 1, rows * size]))
    return final, row_starts, next_self, log_chance


BUDGETS = st.integers(1, 9) | st.sampled_from([127, 128, 129, 300])


def plan_pass(draw):
    state = a_state(draw)
    least = draw(st.sampled_from([None, -0.3, torch.nan]))
    least = None if least is None else torch.full(state[0].shape, least)
    return passes.plan_pass(*state, draw(BUDGETS), least)


def plan_pass_of_many_rows(draw):
    """The kernel for more rows than registers hold, as if they held 1, and few rows at a time."""
    with mock.patch.multiple(passes, LANES=(1,), ROWS=draw(st.sampled_from([2, 8]))):
        return plan_pass(draw)


def commit_pass(draw):
    """What a plan of the same state holds, or slots and windows of no plan."""
    state, token_budget = a_state(draw), draw(BUDGETS)
    final, _, next_self, _ = state
    slots, cu_seqlens_q, _ = passes.plan_pass(*state, token_budget)
    if draw(st.booleans()):
        next_self = torch.arange(1, len(next_self) + 1)  # the last one has no next slot
    if draw(st.booleans()):
        slots[::3], slots[1::3] = len(next_self) - 1, draw(FAR | st.just(len(next_self)))
    if draw(st.booleans()):
        some = st.integers(-3, token_budget + 3) | st.sampled_from([-(2**31), 2**31 - 1])
        cu_seqlens_q = torch.tensor([draw(some) for _ in cu_seqlens_q], dtype=torch.int32)
    tokens, sampled = torch.zeros_like(next_self), torch.randint(0, 2, slots.shape)
    return passes.commit_pass(tokens, final, slots, cu_seqlens_q, next_self, sampled)


HEAD = [noise.gumbel_noise_kernel, products.select_rows_kernel, head.score_tile_kernel, head.score_span_kernel]
LAUNCHES = {
    gumbel_noise: [noise.gumbel_noise_kernel],
    self_mask: [noise.self_mask_kernel],
    sample_mix: [filters.filter_cutoff_kernel, sampling.sample_mix_kernel],
    reference_log_prob: [sampling.mass_kernel, sampling.log_prob_kernel],
    filter_cutoff: [filters.run_peaks_kernel, filters.run_order_kernel, filters.filter_cutoff_kernel],
    linear_sample_mix: [*HEAD, head.pick_token_kernel, head.logits_kernel, sampling.sample_mix_kernel],
    linear_sample_shard: [*HEAD, head.pick_candidates_kernel],
    linear_reference_log_prob: [
        products.select_rows_kernel,
        head_log_prob.tile_mass_kernel,
        head_log_prob.span_mass_kernel,
        head_log_prob.log_prob_kernel,
    ],
    ragged_attention: [attention.ragged_attention_kernel, attention.merge_kernel],
    invariant_linear: [linear.linear_kernel],
    ragged_attention_of_nonsense: [attention.ragged_attention_kernel],
    kv_append: [attention.kv_append_kernel],
    plan_pass: [passes.free_end_kernel, passes.window_kernel, passes.slots_kernel],
    plan_pass_of_many_rows: [passes.free_end_kernel, passes.many_windows_kernel, passes.slots_kernel],
    rms_norm: [norm.rms_norm_kernel],
    add_rms_norm: [norm.add_rms_norm_kernel],
    act_mul: [activation.act_mul_kernel],
    turn: [rotary.rotary_kernel],
    turn_and_append: [rotary.rotary_append_kernel],
    commit_pass: [passes.commit_pass_kernel],
}


def name_of(kernel):
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}"


@pytest.mark.parametrize("constants", ["small", pytest.param("shipped", marks=pytest.mark.slow)])
@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.__name__)
def test_kernels_stay_within_their_tensors(launch, constants):
    watched = set()

    @given(st.data())
    def run(data):
        torch.manual_seed(0)
        with small_constants() if constants == "small" else contextlib.nullcontext(), guarded() as launches:
            launch(data.draw)
        watched.update(name for name, tensors in launches if tensors)

    run()
    assert watched >= {name_of(kernel) for kernel in LAUNCHES[launch]}


def test_every_kernel_is_launched():
    shipped = {
        name_of(choice.kernel) for name in shipped_modules() for choice in import_module(name).configurations("sm_80")
    }
    assert {name_of(kernel) for kernels in LAUNCHES.values() for kernel in kernels} == shipped


@pytest.mark.parametrize("kernel", [specimens.past_the_end_kernel, specimens.stray_store_kernel])
@pytest.mark.parametrize("padding", [0, 8])
def test_one_element_past_the_end_is_found(kernel, padding):
    x, out = torch.arange(2 * (40 + padding)).float().view(2, -1)[0, :40], torch.zeros(40)
    with guarded() as launches:
        kernel[(1,)](x, out, 40, REACH=0)
        assert torch.equal(out, x)
        with pytest.raises(InterpreterError, match="outside of every tensor"):
            kernel[(1,)](x, out, 40, REACH=1)
    assert launches == [(name_of(kernel), 2)] * 2


def test_padding_between_rows_is_outside():
    x, out = torch.zeros(4, 32)[:2, :24], torch.zeros(64)
    with guarded(), pytest.raises(InterpreterError, match="outside of every tensor"):
        specimens.past_the_end_kernel[(1,)](x, out, 56, REACH=0)
