"""`act_mul` and `rotary`: Triton gives the reference's bits, and the reference what torch's own ops compute."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import _TRITON, DEVICE, moved

from selfgen_kernels import act_mul, kv_append, rotary, rotary_append
from selfgen_kernels.backends.reference import activation as reference_activation
from selfgen_kernels.backends.reference import rotary as reference_rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gates(width, dtype):
    """gate and up [6, width]: gates of any size, some of them not finite."""
    gate = normal(6, width, seed=width) * torch.tensor([1.0, 10, 100, 1e-3, 1e4, 1])[:, None]
    gate[5, 0], gate[5, -1] = torch.nan, torch.inf
    gate[4, -1] = -0.9 * torch.finfo(dtype).max
    return gate.to(dtype), normal(6, width, seed=1).to(dtype)


def assert_bits(got, want):
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", [_TRITON])
@pytest.mark.parametrize("width", [1, 65, 2049])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_act_mul_is_equal(dtype, width, backend):
    pytest.importorskip("triton")
    from selfgen_kernels.backends.triton import activation

    given = gates(width, dtype)
    halves = torch.cat(given, 1).chunk(2, 1)  # views of one tensor, as in Phi-3
    for gelu, (gate, up) in itertools.product((False, True), (given, halves)):
        want = reference_activation.act_mul(gate, up, gelu)
        assert_bits(activation.act_mul(*moved((gate, up), DEVICE), gelu), want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_act_mul_is_what_two_ops_compute(dtype, activation):
    """But for the last bits of exp and tanh, and for what torch's GELU cancels far below 0."""
    gate, up = (x[:5] for x in gates(4000, dtype))
    got, want = act_mul(gate, up, activation=activation), ACTIVATIONS[activation](gate) * up
    ulp, size = torch.finfo(dtype).eps, (gate.double() * up.double()).abs()
    lost = 2**-22 * size if activation == "gelu_tanh" else 1e-30
    assert (
        (got.double() - want.double()).abs() <= (8 if dtype == torch.float32 else 2) * ulp * want.abs() + lost
    ).all()
    if dtype != torch.float32:
        wide = ACTIVATIONS[activation](gate.double()) * up.double()
        sizeable = wide.abs() > 1e-6 * size
        assert ((got == want) | ~sizeable).float().mean() > 0.98


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def states(dtype, of_cos, head_dim, tokens=5):
    """query [N, 6, D], key [N, 2, D] as a model transposes it, cos and sin [N, D], whose halves differ."""
    key = normal(2, tokens, head_dim, seed=2).transpose(0, 1)
    angles = normal(2, tokens, head_dim, seed=3)
    return normal(tokens, 6, head_dim).to(dtype), key.to(dtype), *angles.to(of_cos)


CASES = [(dtype, of_cos, size) for dtype in DTYPES for of_cos in DTYPES for size in (2, 20, 64)]


@pytest.mark.parametrize("backend", [_TRITON])
@pytest.mark.parametrize("keep_dtype", [False, True])
def test_rotary_is_equal(keep_dtype, backend):
    pytest.importorskip("triton")
    from selfgen_kernels.backends.triton import rotary as kernels

    for case in CASES:
        given = states(*case)
        want = reference_rotary.rotary(*given, keep_dtype)
        for ours, theirs in zip(kernels.rotary(*moved(given, DEVICE), keep_dtype), want, strict=True):
            assert_bits(ours, theirs)


def test_rotary_is_what_models_compute():
    for dtype, of_cos, size in CASES:
        query, key, cos, sin = states(dtype, of_cos, size)
        for x, keep_dtype in itertools.product((query, key), (False, True)):
            want = x * cos[:, None] + rotate_half(x) * sin[:, None]
            want = want.to(dtype) if keep_dtype else want
            got = rotary(x, x, cos, sin, keep_dtype=keep_dtype)
            assert all(torch.equal(one, want) and one.dtype == want.dtype and one.is_contiguous() for one in got)


def to_append(dtype, of_cos, head_dim, of_cache):
    """key_cache, value_cache [9, 2, D], query, key, value, cos, sin, slots of five tokens, two of them padding."""
    query, key, cos, sin = states(dtype, of_cos, head_dim)
    caches = normal(2, 9, 2, head_dim, seed=4).to(of_cache)
    value = normal(2, 5, head_dim, seed=5).transpose(0, 1).to(of_cache)
    return *caches, query, key, value, cos, sin, torch.tensor([3, -1, 8, 0, -(2**40)])


@pytest.mark.parametrize("backend", [_TRITON])
@pytest.mark.parametrize("keep_dtype", [False, True])
@pytest.mark.parametrize("of_cache", DTYPES, ids=str)
@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "gaps"])
@pytest.mark.each_value
def test_rotary_append_is_equal(gaps, of_cache, keep_dtype, backend):
    pytest.importorskip("triton")
    from selfgen_kernels.backends.triton import rotary as kernels

    for *case, size in CASES:
        if size == 20 or not gaps:
            given = to_append(*case, size, of_cache)
            caches = torch.zeros(9, 2, size, 2, dtype=of_cache).unbind(-1) if gaps else [x.clone() for x in given[:2]]
            there = moved((*caches, *given[2:]), DEVICE)
            got = kernels.rotary_append(*there, keep_dtype)
            want = [torch.zeros_like(x) if gaps else x.clone() for x in given[:2]]
            assert_bits(got, reference_rotary.rotary_append(*want, *given[2:], keep_dtype))
            for ours, theirs in zip(there[:2], want, strict=True):
                assert_bits(ours, theirs)


def test_rotary_append_is_what_two_ops_compute():
    for (*case, size), of_cache, keep_dtype in itertools.product(CASES, DTYPES, (False, True)):
        *caches, query, key, value, cos, sin, slots = to_append(*case, size, of_cache)
        want = [x.clone() for x in caches]
        turned, turned_key = rotary(query, key, cos, sin, keep_dtype=keep_dtype)
        kv_append(*want, turned_key.to(of_cache), value, slots)
        got = rotary_append(*caches, query, key, value, cos, sin, slots, keep_dtype=keep_dtype)
        assert_bits(got, turned)
        assert all(map(torch.equal, caches, want))


def test_what_rotary_append_does_not_take():
    *caches, query, key, value, cos, sin, slots = to_append(torch.float32, torch.float32, 8, torch.float32)
    good = {"value": value, "slots": slots, "key_cache": caches[0]}
    for change, error, message in (
        ({"value": value.half()}, TypeError, "value has dtype torch.float16"),
        ({"slots": slots[1:]}, ValueError, r"slots has shape \[4\], expected \[5\]"),
        ({"slots": slots + 5}, ValueError, "slots holds 13, accepted are slots below 9"),
        ({"key_cache": caches[1]}, ValueError, "key_cache and value_cache share memory"),
        ({"value": caches[0][:5]}, ValueError, "value is a view of key_cache"),
    ):
        how = {"value_cache": caches[1], "query": query, "key": key, "cos": cos, "sin": sin, **good, **change}
        with pytest.raises(error, match=message):
            rotary_append(**how)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: act_mul(*torch.ones(2, 3), activation="relu"), "activation='relu' is not accepted; pass \"silu\""),
        (lambda: act_mul(torch.ones(3), torch.ones(4)), r"up has shape \[4\], expected \[3\]"),
        (lambda: rotary(*torch.ones(2, 3, 1, 7), *torch.ones(2, 3, 7)), "no halves; pass an even head_dim"),
        (lambda: rotary(*torch.ones(2, 3, 1, 8), *torch.ones(2, 3, 4)), r"cos has shape \[3, 4\], expected \[3, 8\]"),
    ],
)
def test_what_they_do_not_take(run, message):
    with pytest.raises(ValueError, match=message):
        run()
