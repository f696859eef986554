"""Every op under tensors of any layout, values of any kind and arguments of any type.

The result is the reference's, or the error names the argument. `make sanitize` runs this file on kernels that were
built with AddressSanitizer and UBSan: then a read past a buffer ends the run.
"""

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from selfgen_kernels import (
    add_rms_norm,
    backends,
    combine_shards,
    commit_pass,
    gumbel_noise,
    kv_append,
    linear_sample_mix,
    linear_sample_shard,
    plan_pass,
    ragged_attention,
    rms_norm,
    sample_mix,
    self_mask,
)
from selfgen_kernels.backends.reference import attention as reference_attention
from selfgen_kernels.backends.reference import norm as reference_norm
from selfgen_kernels.backends.reference import passes as reference_passes
from selfgen_kernels.backends.reference import philox
from selfgen_kernels.backends.reference import sampling as reference_sampling
from selfgen_kernels.backends.reference.sampling import scaled_and_filtered
from selfgen_kernels.call import Sampling
from selfgen_kernels.ops.norm import DTYPES, FORMS
from selfgen_kernels.ops.rows import inverse_temperature, signed_seed

INF, NAN = float("inf"), float("nan")
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
SPECIAL = st.sampled_from([NAN, INF, -INF, 3e38, -3e38, 1e-45, 0.0, -0.0])
SEEDS = st.sampled_from([0, -1, -(2**63), 2**63 - 1, 2**63, 2**64 - 1]) | st.integers(-(2**63), 2**64 - 1)
VOCABULARIES = st.sampled_from([1, 2, 15, 63, 64, 65, 127, 128, 300, 4097])


@pytest.mark.skipif("SELFGEN_SANITIZED" not in os.environ, reason="`make sanitize` was not asked for")
def test_the_kernels_are_those_with_sanitizers():
    assert backends.cpu.missing is None
    library = next(Path(backends.cpu.__file__).parent.glob("_C*.so")).read_bytes()
    assert b"__asan_init" in library
    assert b"__ubsan_handle" in library


# ---- Tensors ---------------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw, dense):
    """A view with the values of `dense` and other strides; what lies around it in memory is NaN, or the lowest int."""
    kind = draw(st.sampled_from(["dense", "inside", "every second", "last axis first", "negated"]))
    if kind == "every second" and dense.dim():
        around = _junk([*dense.shape[:-1], 2 * dense.shape[-1]], dense)
        around[..., ::2] = dense
        return around[..., ::2]
    if kind == "inside" and dense.dim():
        around = _junk([size + 3 for size in dense.shape], dense)
        view = around[tuple(slice(2, size + 2) for size in dense.shape)]
        return view.copy_(dense)
    if kind == "last axis first" and dense.dim() > 1:
        return dense.movedim(-1, 0).contiguous().movedim(0, -1)
    if kind == "negated" and dense.is_floating_point():
        return torch._neg_view(-dense)  # a view with its negative bit set, as .imag of a conjugate has it
    return dense.clone()


def _junk(shape, like):
    return torch.full(shape, NAN if like.is_floating_point() else torch.iinfo(like.dtype).min, dtype=like.dtype)


@st.composite
def floats(draw, *shape, dtype=torch.float32, bound=3):
    """Whole numbers up to `bound`, whose products every order of summation gets right, and a few special values."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensor = torch.randint(-bound, bound + 1, shape, generator=generator).to(dtype)
    if tensor.numel():
        for place, value in draw(st.lists(st.tuples(st.integers(0, tensor.numel() - 1), SPECIAL), max_size=3)):
            tensor.view(-1)[place] = value
        if len(shape) == 2 and draw(st.integers(0, 9)) == 0:
            tensor[draw(st.integers(0, shape[0] - 1))] = draw(SPECIAL)  # a whole row of it
    return tensor


@st.composite
def integers(draw, n, low, high):
    """int64 [n], or int32 [n] with the bounds that these have."""
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    limits = torch.iinfo(dtype)
    numbers = st.integers(max(low, limits.min), min(high, limits.max))
    return draw(layouts(torch.tensor(draw(st.lists(numbers, min_size=n, max_size=n)), dtype=dtype)))


@st.composite
def keys(draw, n):
    """seed, sample_ids and positions of n rows."""
    return {
        "seed": draw(SEEDS),
        "sample_ids": draw(integers(n, -(2**63), 2**63 - 1)),
        "positions": draw(integers(n, 0, 2**32 - 1)),
    }


@st.composite
def per_row(draw, n, numbers, dtypes):
    """A number, or a tensor [n] of them."""
    if draw(st.booleans()):
        return draw(numbers)
    values = torch.tensor(draw(st.lists(numbers, min_size=n, max_size=n)), dtype=torch.float64)
    return draw(layouts(values.to(draw(st.sampled_from(dtypes)))))


PROBS = st.sampled_from([0.0, 2**-32, 0.5, 1.0])
TEMPERATURES = st.sampled_from([0.0, 5e-324, 1e-40, 9.9e-6, 1e-5, 0.25, 1.0, 7.5, 1e30, 1e60])


@st.composite
def filters(draw, n):
    """top_k, top_p and min_p, each there or not."""
    choices = {
        "top_k": per_row(n, st.sampled_from([1, 2, 64, 300, 2**31 - 1]), [torch.int32, torch.int64]),
        "top_p": per_row(n, st.sampled_from([1e-6, 0.3, 0.7, 0.999, 1.0]), [torch.float32, torch.float64]),
        "min_p": per_row(n, st.sampled_from([0.0, 1e-6, 0.03, 1.0]), [torch.float32, torch.float64]),
    }
    return {name: draw(strategy) for name, strategy in choices.items() if draw(st.booleans())}


def scalar_or_rows(value, n, dtype):
    return torch.as_tensor(value, dtype=dtype).expand(n)


# ---- Norm ------------------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(0, 9), st.integers(1, 80), st.sampled_from(DTYPES), st.sampled_from([*FORMS]))
def test_rms_norm(data, n, width, dtype, form):
    x = data.draw(layouts(data.draw(floats(n, width, dtype=dtype, bound=9))))
    weight = data.draw(layouts(data.draw(floats(width, dtype=data.draw(st.sampled_from(DTYPES))))))
    want = reference_norm.rms_norm(x.clone().resolve_neg(), weight.clone().resolve_neg(), 1e-6, *FORMS[form])
    torch.testing.assert_close(rms_norm(x, weight, 1e-6, form=form), want, rtol=0, atol=0, equal_nan=True)


@given(st.data(), st.integers(0, 9), st.integers(1, 80), *2 * [st.sampled_from(DTYPES)], st.sampled_from([*FORMS]))
def test_add_rms_norm(data, n, width, dtype, of_residual, form):
    x, residual = (data.draw(layouts(data.draw(floats(n, width, dtype=d, bound=9)))) for d in (dtype, of_residual))
    weight = data.draw(layouts(data.draw(floats(width, dtype=data.draw(st.sampled_from(DTYPES))))))
    dense = (one.clone().resolve_neg() for one in (x, residual, weight))
    want = reference_norm.add_rms_norm(*dense, 1e-6, *FORMS[form])
    got = add_rms_norm(x, residual, weight, 1e-6, form=form)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


# ---- Sampling --------------------------------------------------------------------------------------------------------


def check_mixed(result, status, logits, reference, self_prob, how):
    """Compare (tokens, is_self) and the count of invalid rows with the reference on dense copies of all arguments."""
    n, vocab_size = logits.shape
    tokens, is_self = result
    assert tokens.dtype == torch.int64
    assert is_self.dtype == torch.bool
    sampling = Sampling(
        (scalar_or_rows(self_prob, n, torch.float64) * 2**32).round().long(),
        signed_seed(how["seed"]),
        how["sample_ids"].long(),
        how["positions"].long(),
        inverse_temperature(how.get("temperature", 1.0), logits),
        *(
            None if name not in how else scalar_or_rows(how[name], n, dtype)
            for name, dtype in (("top_k", torch.int64), ("top_p", torch.float64), ("min_p", torch.float64))
        ),
    )
    logits = logits.float().resolve_neg()
    want, want_self, invalid = reference_sampling.sample_mix(logits, reference.long(), *sampling)
    assert torch.equal(is_self, want_self)
    assert status.item() == invalid.sum()
    assert torch.equal(tokens[~is_self | invalid], reference.long()[~is_self | invalid])
    drawn = is_self & ~invalid
    assert ((tokens >= 0) & (tokens < vocab_size))[drawn].all()
    greedy = drawn & sampling.greedy
    assert torch.equal(tokens[greedy], logits[greedy].argmax(1))
    sampled = drawn & ~greedy
    z = scaled_and_filtered(logits, sampling)
    assert not z[sampled, tokens[sampled]].isneginf().any()
    assert torch.equal(tokens, want)


@given(st.data(), st.integers(0, 9), VOCABULARIES, FLOATS)
def test_sample_mix(data, n, vocab_size, dtype):
    logits = data.draw(layouts(data.draw(floats(n, vocab_size, dtype=dtype, bound=9))))
    if n and data.draw(st.integers(0, 5)) == 0:
        logits = logits[:1].expand(n, -1)
    reference = data.draw(integers(n, -(2**63), 2**63 - 1))
    self_prob = data.draw(per_row(n, PROBS, [torch.float32, torch.float64]))
    temperature = data.draw(per_row(n, TEMPERATURES, [torch.float64]))
    how = data.draw(keys(n)) | data.draw(filters(n)) | {"temperature": temperature}
    status = torch.zeros((), dtype=torch.int64)
    result = sample_mix(logits, reference, self_prob, status=status, **how)
    check_mixed(result, status, logits, reference, self_prob, how)


LEAST = st.sampled_from([0.0, 1e-30, 1e-3, 0.1, 1.0])


def check_confident(op, given_, logits, self_prob, least, how):
    """Without filters and invalid rows: is_self is the mask where the reference is likely enough, tokens the same."""
    reference = given_[-1]
    tokens, is_self = op(*given_, self_prob, min_reference_prob=least, **how)
    drawn, mask = op(*given_, self_prob, **how)
    assert torch.equal(tokens, torch.where(is_self, drawn, reference.long()))
    assert not (is_self & ~mask).any()
    logits = logits.double()
    known = (reference >= 0) & (reference < logits.shape[1])
    log_prob = logits.log_softmax(1).gather(1, torch.where(known, reference.long(), 0)[:, None])[:, 0]
    log_prob = log_prob.masked_fill(~known, -INF)
    log_least = scalar_or_rows(least, len(logits), torch.float64).log()
    level = (log_prob - log_least).abs() < 1e-5 * (1 + log_least.abs())
    want = (log_prob >= log_least) | ~logits.logsumexp(1).isfinite()
    assert torch.equal(is_self[mask & ~level], want[mask & ~level])


@given(st.data(), st.integers(0, 9), VOCABULARIES, FLOATS)
def test_min_reference_prob(data, n, vocab_size, dtype):
    logits = data.draw(layouts(data.draw(floats(n, vocab_size, dtype=dtype, bound=9))))
    reference = data.draw(integers(n, 0, vocab_size - 1) | integers(n, -(2**63), 2**63 - 1))
    self_prob = data.draw(per_row(n, PROBS, [torch.float32, torch.float64]))
    least = data.draw(per_row(n, LEAST, [torch.float32, torch.float64]))
    how = data.draw(keys(n))
    check_confident(sample_mix, (logits, reference), logits.float().resolve_neg(), self_prob, least, how)


@given(st.data(), st.integers(0, 9), VOCABULARIES, FLOATS)
def test_min_reference_prob_of_a_head(data, n, vocab_size, dtype):
    hidden, weight, head, logits = data.draw(heads(n, vocab_size, dtype))
    reference = data.draw(integers(n, 0, vocab_size - 1) | integers(n, -(2**63), 2**63 - 1))
    self_prob = data.draw(per_row(n, PROBS, [torch.float32, torch.float64]))
    least = data.draw(per_row(n, LEAST, [torch.float32, torch.float64]))
    how = data.draw(keys(n)) | head
    check_confident(linear_sample_mix, (hidden, weight, reference), logits, self_prob, least, how)


@st.composite
def heads(draw, n, vocab_size, dtype):
    """hidden, weight, the other arguments of a head, and the logits that it gives."""
    hidden_size = draw(st.sampled_from([0, 1, 5, 8, 33]))
    hidden = draw(layouts(draw(floats(n, hidden_size, dtype=dtype, bound=2))))
    weight = draw(layouts(draw(floats(vocab_size, hidden_size, dtype=dtype, bound=2))))
    # Sums that leave fp32 on their way are inf, NaN or finite by the order of their terms, which is no op's promise.
    sizes = (x.double().nan_to_num(0, 0, 0).abs() for x in (hidden, weight))
    assume((torch.nn.functional.linear(*sizes) < 3e38).all())
    bias = draw(st.none() | floats(vocab_size, dtype=dtype).flatmap(layouts))
    head = {"bias": bias, "softcap": draw(st.sampled_from([None, 8.0])), "logit_scale": draw(st.sampled_from([1, 0.5]))}
    logits = torch.nn.functional.linear(hidden, weight, bias).float() * head["logit_scale"]
    if head["softcap"] is not None:
        logits = head["softcap"] * torch.tanh(logits / head["softcap"])
    return hidden, weight, head, logits


@given(st.data(), st.integers(0, 9), VOCABULARIES, FLOATS)
def test_linear_sample_mix(data, n, vocab_size, dtype):
    hidden, weight, head, logits = data.draw(heads(n, vocab_size, dtype))
    reference = data.draw(integers(n, -(2**63), 2**63 - 1))
    self_prob = data.draw(per_row(n, PROBS, [torch.float32, torch.float64]))
    temperature = data.draw(per_row(n, TEMPERATURES, [torch.float64]))
    how = data.draw(keys(n)) | data.draw(filters(n)) | {"temperature": temperature}
    status = torch.zeros((), dtype=torch.int64)
    result = linear_sample_mix(hidden, weight, reference, self_prob, status=status, **head, **how)
    check_mixed(result, status, logits, reference, self_prob, how)


@given(st.data(), st.integers(0, 9), VOCABULARIES, FLOATS)
def test_shards(data, n, vocab_size, dtype):
    hidden, weight, head, logits = data.draw(heads(n, vocab_size, dtype))
    bias = head.pop("bias")
    cuts = data.draw(st.lists(st.integers(1, vocab_size), max_size=4))
    reference = data.draw(integers(n, -(2**63), 2**63 - 1))
    self_prob = data.draw(per_row(n, PROBS, [torch.float32, torch.float64]))
    how = data.draw(keys(n)) | {"temperature": data.draw(per_row(n, TEMPERATURES, [torch.float64]))}
    parts = []
    for begin, end in pairwise(sorted({0, *cuts, vocab_size})):
        shard = {"first_id": begin, "bias": None if bias is None else bias[begin:end]}
        parts.append(linear_sample_shard(hidden, weight[begin:end], self_prob, **shard, **head, **how))
    values, ids = (data.draw(layouts(torch.stack(part))) for part in zip(*parts, strict=True))
    status = torch.zeros((), dtype=torch.int64)
    result = combine_shards(values, ids, reference, self_prob, status=status, **how)
    check_mixed(result, status, logits, reference, self_prob, how)


@given(st.data(), st.integers(0, 5), st.integers(1, 4))
def test_combine_shards_never_invents_an_id(data, n, ranks):
    """Values and ids of no rank at all: the token is one of the row's ids, or its reference."""
    values = data.draw(floats(ranks, n, 3, 3))
    ids = data.draw(integers(ranks * n * 3, -(2**63), 2**63 - 1)).long().view(ranks, n, 3)
    reference = torch.full((n,), -5)
    tokens, _ = combine_shards(values, ids, reference, 1.0, temperature=data.draw(TEMPERATURES), **data.draw(keys(n)))
    for row in range(n):
        assert tokens[row] == -5 or (tokens[row] >= 0 and (tokens[row] == ids[:, row]).any())


WEIRD_FLOATS = st.sampled_from([NAN, INF, -INF, -1.0, 0.0, 2.0, 1e300, -1e-300, 1.0])
WEIRD_INTEGERS = st.sampled_from([-(2**63), -5, 0, 1, 2**32, 2**63 - 1])


@given(st.data(), st.integers(0, 5), VOCABULARIES)
def test_values_that_python_has_not_seen(data, n, vocab_size):
    """Under torch.compile nobody looks into tensors: kernels take any value and give an id or the reference."""

    def rows(values, dtype):
        return torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)), dtype=dtype)

    logits = data.draw(floats(n, vocab_size))
    reference, threshold = torch.full((n,), -5), rows(WEIRD_INTEGERS, torch.int64)
    keys = data.draw(WEIRD_INTEGERS), rows(WEIRD_INTEGERS, torch.int64), rows(WEIRD_INTEGERS, torch.int64)
    sampling = reference, threshold, *keys, rows(WEIRD_FLOATS, torch.float32)
    weird = (WEIRD_INTEGERS, torch.int64), (WEIRD_FLOATS, torch.float64), (WEIRD_FLOATS, torch.float64)
    cuts = [data.draw(st.none() | st.just(rows(*kind))) for kind in weird]
    for op, given_ in (
        ("sample_mix", (logits,)),
        ("linear_sample_mix", (logits[:, :1], logits.T[:, :1], None, None, 1)),
    ):
        if op == "linear_sample_mix" and not n:
            continue
        tokens, is_self, invalid = getattr(torch.ops.selfgen, op)(*given_, *sampling, *cuts)
        assert torch.equal(is_self, philox.self_mask(*keys, threshold))
        kept = ~is_self | invalid
        assert (tokens[kept] == -5).all()
        assert ((tokens[~kept] >= 0) & (tokens[~kept] < vocab_size)).all()


# ---- Noise -----------------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(0, 9), st.sampled_from([0, 1, 3, 63, 64, 65, 200]), st.integers(0, 15))
def test_noise_and_mask(data, n, size, stream):
    key = data.draw(keys(n))
    seed, ids, positions = key.values()
    got = gumbel_noise(seed, ids, positions, size, stream=stream)
    want = philox.gumbel_noise(signed_seed(seed), ids.long(), positions.long(), size, stream)
    assert torch.equal(got, want)
    prob = data.draw(per_row(n, PROBS, [torch.float32, torch.float64]))
    threshold = (scalar_or_rows(prob, n, torch.float64) * 2**32).long()
    assert torch.equal(
        self_mask(seed, ids, positions, prob), philox.self_mask(signed_seed(seed), ids, positions, threshold)
    )


# ---- Attention -------------------------------------------------------------------------------------------------------


@given(
    st.data(),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70), st.integers(0, 3)), max_size=5),
    st.sampled_from([(1, 1), (4, 4), (6, 2), (9, 3), (5, 1)]),
    st.sampled_from([1, 3, 8, 16, 23, 64]),
    FLOATS,
)
def test_ragged_attention(data, chunks, heads, head_dim, dtype):
    """Slots that no chunk owns hold NaN, and never show."""
    (num_heads, kv_heads), slots, ranges = heads, 0, []
    for queries, before, gap in chunks:
        ranges.append((slots + gap, queries + before))
        slots += gap + queries + before
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    bounds = torch.tensor([0, *(queries for queries, _, _ in chunks)]).cumsum(0).int()
    query = torch.randn(int(bounds[-1]), num_heads, head_dim, generator=generator).to(dtype)
    key, value = torch.full((2, slots, kv_heads, head_dim), NAN, dtype=dtype)
    for first, length in ranges:
        for cache in (key, value):
            cache[first : first + length] = torch.randn(length, kv_heads, head_dim, generator=generator).to(dtype)
    ranges = torch.tensor(ranges, dtype=torch.int64).view(-1, 2)
    sinks = data.draw(st.none() | floats(num_heads).filter(lambda x: not (x.isnan() | x.isposinf()).any()))
    how = {
        "scale": data.draw(st.sampled_from([None, 0.0, -0.3, 2.0])),
        "sliding_window": data.draw(st.sampled_from([None, 1, 7, 32, 2**62])),
        "softcap": data.draw(st.sampled_from([None, 3.0])),
        "sinks": sinks,
    }
    tensors = [data.draw(layouts(x)) for x in (query, key, value, bounds, ranges)]
    got = ragged_attention(*tensors, **how)
    how["scale"] = head_dim**-0.5 if how["scale"] is None else how["scale"]
    wide = [x.double() for x in (query, key, value)]
    want = reference_attention.ragged_attention(*wide, bounds, ranges, *how.values())
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@given(st.data(), st.integers(1, 40), FLOATS)
def test_ragged_attention_of_special_values(data, length, dtype):
    """NaN and infinities anywhere: heads and queries that see none of them are as they were without."""
    args = [
        torch.ones(length, 4, 8, dtype=dtype),
        torch.ones(length, 2, 8, dtype=dtype),
        torch.ones(length, 2, 8, dtype=dtype),
    ]
    chunks = torch.tensor([0, length], dtype=torch.int32), torch.tensor([[0, length]])
    clean = ragged_attention(*args, *chunks)
    slot, head, value = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, 1)), data.draw(SPECIAL)
    which = data.draw(st.integers(1, 2))
    args[which][slot, head, data.draw(st.integers(0, 7))] = value
    got = ragged_attention(
        *args, *chunks, sinks=data.draw(st.none() | floats(4)), softcap=data.draw(st.sampled_from([None, 9.0]))
    )
    assert got.shape == clean.shape
    plain = ragged_attention(*args, *chunks)
    assert torch.equal(plain[:, 2 - 2 * head : 4 - 2 * head], clean[:, 2 - 2 * head : 4 - 2 * head])


@given(st.data(), st.integers(0, 12), st.integers(0, 9), st.integers(1, 3), st.sampled_from([1, 3, 8, 64]), FLOATS)
def test_kv_append(data, slots, tokens, heads, head_dim, dtype):
    """What belongs to no slot, and what lies around a cache in memory, stays as it was."""
    tokens = min(tokens, slots)
    order = data.draw(st.permutations(range(slots)))[:tokens]
    where = torch.tensor([data.draw(st.sampled_from([slot, slot, -1, -(2**63)])) for slot in order], dtype=torch.int64)
    caches = [data.draw(floats(slots, heads, head_dim, dtype=dtype)) for _ in range(2)]
    states = [data.draw(floats(tokens, heads, head_dim, dtype=dtype)) for _ in range(2)]
    want = [cache.clone() for cache in caches]
    reference_attention.kv_append(*want, *states, where)
    views = [data.draw(layouts(x).filter(lambda view: not view.is_neg())) for x in caches]
    around = [x if x._base is None else x._base for x in views]
    before = [x.clone() for x in around]
    kv_append(*views, *(data.draw(layouts(x)) for x in (*states, where)))
    for got, expected, base, old in zip(views, want, around, before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        got.copy_(old.as_strided(got.shape, got.stride(), got.storage_offset()))  # then all memory is as it was
        torch.testing.assert_close(base, old, rtol=0, atol=0, equal_nan=True)


# ---- Passes ----------------------------------------------------------------------------------------------------------

LOG_CHANCES = st.sampled_from([0.0, -0.0, -1e-45, -0.5, -1.0, -1e30, -3e38, -INF])


@given(st.data(), st.lists(st.lists(st.booleans(), min_size=1, max_size=9), max_size=6), st.integers(1, 70))
def test_plan_and_commit_pass(data, masks, token_budget):
    """The plan of the reference, and what it makes of any sampled tokens."""
    next_self, starts = [], []
    for mask in masks:
        start = len(next_self)
        starts.append(start)
        for i in range(len(mask)):
            next_self.append(next((start + j for j in range(i + 1, len(mask)) if mask[j]), start + i))
    final = [start + data.draw(st.integers(0, len(mask) - 1)) for start, mask in zip(starts, masks, strict=True)]
    size = len(next_self)
    final, starts, next_self = (torch.tensor(x, dtype=torch.int64) for x in (final, starts, next_self))
    chances = torch.tensor(data.draw(st.lists(LOG_CHANCES, min_size=size, max_size=size)), dtype=torch.float32)
    got = plan_pass(*(data.draw(layouts(x)) for x in (final, starts, next_self, chances)), token_budget)
    plan = reference_passes.plan_pass(final, starts, next_self, chances, token_budget)
    for ours, want in zip(got, plan, strict=True):
        assert ours.dtype == want.dtype
        assert torch.equal(ours, want)

    tokens = data.draw(integers(size, -(2**63), 2**63 - 1)).long().contiguous()
    sampled = data.draw(integers(token_budget, -(2**63), 2**63 - 1)).long()
    same = torch.tensor(data.draw(st.lists(st.booleans(), min_size=token_budget, max_size=token_budget)))
    sampled = sampled.where(~same, torch.cat([tokens, tokens.new_zeros(1)])[(plan[0] + 1).clamp(max=size)])
    rest = plan[0], plan[1], next_self, sampled
    state, want_state = (tokens, final), (tokens.clone(), final.clone())
    got = commit_pass(*state, *(data.draw(layouts(x)) for x in rest))
    want = reference_passes.commit_pass(*want_state, *rest)
    for ours, theirs in zip((*got, *state), (*want, *want_state), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@given(st.data(), st.integers(0, 5), st.integers(0, 7), st.integers(1, 20))
def test_passes_of_values_that_python_has_not_seen(data, rows, size, token_budget):
    """Under torch.compile slots, bounds and chances may be anything: a plan holds slots, a commit writes to slots."""
    numbers = st.sampled_from([-(2**63), -1, 2**40, 2**63 - 1]) | st.integers(0, 8)

    def some(n, dtype=torch.int64, values=numbers):
        return torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)), dtype=dtype)

    chances = some(size, torch.float32, LOG_CHANCES | st.sampled_from([NAN, INF, 1.0]))
    slots, bounds, _ = torch.ops.selfgen.plan_pass(some(rows), some(rows), some(size), chances, token_budget)
    planned = slots[: bounds[-1]]
    assert ((planned >= 0) & (planned < size)).all()
    assert (slots[bounds[-1] :] == -1).all()

    bounds = some(rows + 1, torch.int32, st.sampled_from([-(2**31), -3, 2**31 - 1]) | st.integers(0, 9))
    places, tokens = data.draw(st.integers(0, 9)), torch.full((size + 8,), -5)
    before = tokens.clone()
    rest = some(places), bounds, some(size), some(places)
    torch.ops.selfgen.commit_pass(tokens[4 : size + 4], some(rows), *rest)
    assert torch.equal(tokens[:4], before[:4])
    assert torch.equal(tokens[size + 4 :], before[size + 4 :])
