"""`rms_norm`: every backend gives the reference's bits, and the reference what the modules of transformers compute."""

import itertools

import pytest
import torch
from conftest import GPU_ONLY, ON_GPU, moved
from torch import Tensor
from torch.utils._pytree import tree_map

from selfgen_kernels import add_rms_norm, rms_norm
from selfgen_kernels.backends.reference import norm as reference_norm
from selfgen_kernels.ops.norm import FORMS, MOST_WIDTH

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
EPS = 1e-6


def op_of(backend, name="rms_norm"):
    """An operator of a backend, on tensors of the CPU."""
    if backend.name == "cpp":
        return getattr(torch.ops.selfgen, name)
    if backend.name == "reference":
        return getattr(reference_norm, name)
    from selfgen_kernels.backends.triton import norm

    return lambda *args: tree_map(Tensor.cpu, getattr(norm, name)(*moved(args, backend.device)))


def llama(x, weight):
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def olmo2(x, weight):
    wide = x.to(torch.float32)
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS))).to(x.dtype)


def gemma(x, weight):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + weight.float())).type_as(x)


MODULES = {"llama": llama, "olmo2": olmo2, "gemma": gemma}
"""The forwards of LlamaRMSNorm, Olmo2RMSNorm and Gemma2RMSNorm in transformers."""


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adversarial(width, dtype):
    """Rows [14, width]: usual ones, some whose sum is hard to get right, and some with numbers that are not finite."""
    rows = normal(14, width, seed=width)
    rows[1] *= 1e-3
    rows[2] *= 1e4
    rows[3, 0] = 2000  # as hidden states have them: others count for little
    rows[4] = 0
    rows[5] *= 1e-30
    rows[6] *= 2.0**-63
    rows[7] = 2.0**-140
    rows[8] = 1.0
    rows[9] *= 1e20
    rows[10, -1] = 3e38
    rows[11, 0] = -torch.inf
    rows[12, -1] = torch.nan
    rows[13, 0], rows[13, -1] = torch.inf, torch.nan
    return rows.to(dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [1, 2, 63, 64, 100, 576, 1031])
@pytest.mark.each_pair
def test_backends_are_equal(fast, reference, width, form):
    for dtype, of_weight in itertools.product(DTYPES, DTYPES):
        x, weight = adversarial(width, dtype), normal(width, seed=1).to(of_weight)
        for eps in (EPS, 2.0**-64) if dtype == of_weight else (EPS,):
            args = x, weight, eps, *FORMS[form]
            got, want = (op_of(backend)(*args) for backend in (fast, reference))
            assert got.dtype == want.dtype == MODULES[form](x, weight).dtype
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("width", [8192, 12_345, MOST_WIDTH])
def test_backends_are_equal_on_wide_rows(fast, reference, width):
    x, weight = adversarial(width, torch.bfloat16), normal(width).bfloat16()
    got, want = (op_of(backend)(x, weight, EPS, False, True) for backend in (fast, reference))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [1, 63, 576, 1031])
@pytest.mark.each_pair
def test_a_sum_and_its_norm_are_those_of_two_ops(backend, width, form):
    """Of any two dtypes; sums overflow, vanish and are not finite, too."""
    for dtype, of_residual, of_weight in itertools.product(DTYPES, DTYPES, DTYPES[:2]):
        x, residual = adversarial(width, dtype), adversarial(width, torch.float32)
        residual[:6] = normal(6, width, seed=2)
        residual[6] = -x[6].float()
        residual, weight = residual.to(of_residual), normal(width, seed=1).to(of_weight)
        want = x + residual
        total, normed = op_of(backend, "add_rms_norm")(x, residual, weight, EPS, *FORMS[form])
        assert_equal(total, want)
        assert_equal(normed, reference_norm.rms_norm(want, weight, EPS, *FORMS[form]))


def assert_equal(got, want):
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_a_sum_of_views():
    """Of any layout, and of any leading dimensions."""
    x, residual = normal(2, 3, 4, 24).bfloat16(), normal(2, 3, 24, 4, seed=1).transpose(2, 3)
    got = add_rms_norm(x.transpose(0, 1), residual.transpose(0, 1), torch.ones(24), EPS)
    want = x.transpose(0, 1) + residual.transpose(0, 1)
    assert_equal(got[0], want)
    assert_equal(got[1], rms_norm(want, torch.ones(24), EPS))
    assert got[0].is_contiguous()
    assert add_rms_norm(x[:, :0], residual[:, :0], torch.ones(24), EPS)[1].shape == (2, 0, 4, 24)
    with pytest.raises(ValueError, match=r"residual has shape \[3\], expected \[4\]"):
        add_rms_norm(torch.ones(4), torch.ones(3), torch.ones(4), EPS)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU_ONLY)])
def test_the_reference_gives_the_same_on_a_gpu(reference, device):
    for dtype in DTYPES:
        args = adversarial(1031, dtype), normal(1031).to(dtype), EPS, True, False
        want = op_of(reference)(*args)
        got = reference_norm.rms_norm(*moved(args, device)).cpu()
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_what_modules_compute(dtype, form):
    """But for the order of a sum in fp32, which may round to a neighbour in 16 bits, too."""
    for width, of_weight in itertools.product((1, 64, 576, 4096), (dtype, torch.float32)):
        x, weight = adversarial(width, dtype), (normal(width, seed=1) / 10 + 1).to(of_weight)
        want = MODULES[form](x, weight)
        got = rms_norm(x, weight, EPS, form=form)
        assert got.dtype == want.dtype
        ulps = 8 if dtype == torch.float32 else 2  # the result of the llama form is rounded twice
        close = torch.isclose(got.float(), want.float(), rtol=ulps * ULP[dtype], atol=1e-20, equal_nan=True)
        assert close.all(), (got[~close], want[~close])
        if dtype != torch.float32:
            assert (got == want).logical_or(want.isnan()).float().mean() > 0.99


def test_the_sum_of_squares_is_rounded_once():
    for width in (1, 100, 4096, MOST_WIDTH):
        rows = adversarial(width, torch.float32)[:7]
        rows[1] = 2.0**-11 * 1.001  # one large number, and many whose squares are all rounded to the same side
        rows[1, 0] = 1
        got, want = reference_norm._square_sum(rows), rows.double().square().sum(1)
        assert (((got.double() - want).abs() / want)[want > 2.0**-120] < 2.0**-23 + width * 2.0**-35).all()


def test_no_order_changes_a_bit(backend):
    x, weight = adversarial(1031, torch.float32)[:11], normal(1031)
    order = torch.randperm(1031, generator=torch.Generator().manual_seed(0))
    norm = op_of(backend)
    want = norm(x, weight, EPS, False, True)
    got = norm(x[:, order], weight[order], EPS, False, True)
    assert torch.equal(got, want[:, order])


def test_a_row_depends_on_no_other(backend):
    for width in (24, 576):
        x, weight = normal(70, width).bfloat16(), normal(width).bfloat16()
        norm = op_of(backend)
        want = norm(x, weight, EPS, False, True)
        for rows in (slice(0, 1), slice(3, 5), slice(1, 70)):
            assert torch.equal(norm(x[rows], weight, EPS, False, True), want[rows])
        around = torch.full((70, width + 9), torch.nan).bfloat16()
        around[:, 3 : width + 3] = x
        for view in (around[:, 3 : width + 3], x.T.contiguous().T):
            assert torch.equal(norm(view, weight, EPS, False, True), want)


def test_threads_do_not_matter():
    x, weight = normal(500, 576), normal(576)
    want, before = rms_norm(x, weight, EPS), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(rms_norm(x, weight, EPS), want)
    finally:
        torch.set_num_threads(before)


def test_any_leading_dimensions():
    x, weight = normal(2, 3, 4, 24), normal(24)
    got = rms_norm(x.transpose(1, 2), weight, EPS)
    assert got.is_contiguous()
    assert torch.equal(got, rms_norm(x, weight, EPS).transpose(1, 2))
    assert torch.equal(rms_norm(x[0, 0, 0], weight, EPS), rms_norm(x, weight, EPS)[0, 0, 0])
    assert rms_norm(x[:, :0], weight, EPS).shape == (2, 0, 4, 24)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"form": "t5"}, 'form=\'t5\' is not accepted; pass one of "llama", "olmo2", "gemma"'),
        ({"eps": 0.0}, "eps=0.0 is not accepted; pass 2"),
        ({"x": torch.zeros(3, 0), "weight": torch.zeros(0)}, "rows of 0 numbers; pass rows of 1 to 16384"),
        ({"weight": torch.zeros(7)}, r"weight has shape \[7\], expected \[8\]"),
    ],
)
def test_what_it_does_not_take(changed, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(**{"x": torch.zeros(3, 8), "weight": torch.zeros(8), "eps": EPS} | changed)


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.gpu
def test_it_is_captured_in_a_cuda_graph():
    x, weight = normal(5, 576).cuda(), normal(576).cuda()
    rms_norm(x, weight, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rms_norm(x, weight, EPS)
    x.copy_(normal(5, 576, seed=1))
    graph.replay()
    assert torch.equal(out, rms_norm(x, weight, EPS))
