"""`invariant_linear`: the reference's results up to rounding, and a row's bits whatever else is in the batch."""

import numpy
import pytest
import torch
from conftest import GPU_ONLY, ON_GPU, REFERENCE, TRITON_MARKS, cpp_backend, moved, require_cpp
from hypothesis import given
from hypothesis import strategies as st
from test_far_offsets import function_of

from selfgen_kernels import invariant_linear

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
SIZES = [(1, 1, 1), (3, 5, 70), (9, 64, 130), (2, 0, 3), (0, 4, 5), (4, 3, 0)]  # rows, width, outputs
LARGE = [(1, 576, 1536), (197, 300, 65), (400, 1030, 192)]  # several blocks of rows, of the depth, and of outputs


def a_layer(rows, width, outputs, dtype, *, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return normal(rows, width), normal(outputs, width), normal(outputs) if bias else None


def op_of(backend):
    function = function_of(backend, "linear", "invariant_linear")
    return lambda *args: function(*moved(args, backend.device)).cpu()


def assert_close(got, hidden, weight, bias):
    """To exact products, up to the rounding of sums in fp32 and of the result to its dtype."""
    exact = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = hidden.double().abs() @ weight.double().abs().T
    assert got.dtype == hidden.dtype
    assert got.is_contiguous()
    assert ((got.double() - exact).abs() <= ROUNDING[hidden.dtype] * exact.abs() + 1e-5 * size).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_exact_up_to_rounding(backend, dtype, sizes, bias):
    layer = a_layer(*sizes, dtype, bias=bias)
    assert_close(op_of(backend)(*layer), *layer)


@pytest.mark.parametrize("sizes", LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_products(dtype, sizes):
    layer = a_layer(*sizes, dtype)
    assert_close(invariant_linear(*layer), *layer)


def assert_rows_stand_alone(op, hidden, weight, bias, cuts):
    """Each of the runs of rows `cuts` (begin, end), and all rows in reverse, give the bits of all rows together."""
    whole = op(hidden, weight, bias)
    for begin, end in cuts:
        assert torch.equal(op(hidden[begin:end], weight, bias), whole[begin:end]), (begin, end)
    assert torch.equal(op(hidden.flip(0), weight, bias).flip(0), whole)


@pytest.mark.parametrize("name", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    width=st.integers(1, 40), outputs=st.integers(1, 70), rows=st.integers(1, 20), seed=st.integers(0, 99),
    cut=st.tuples(st.integers(0, 19), st.integers(1, 20)),
)  # fmt: skip
def test_a_row_does_not_depend_on_its_batch(name, dtype, width, outputs, rows, seed, cut):
    layer = a_layer(rows, width, outputs, dtype, seed=seed)
    begin = cut[0] % rows
    op = op_of(REFERENCE if name == "reference" else cpp_backend())
    assert_rows_stand_alone(op, *layer, [(begin, begin + cut[1]), (begin, begin + 1)])


@pytest.mark.parametrize("sizes", [(70, 20, 130), (9, 64, 70)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=TRITON_MARKS)], indirect=True)
def test_triton_rows_do_not_depend_on_their_batch(backend, dtype, sizes, monkeypatch):
    """In the interpreter with products that add in a fixed order: numpy's depend on a row's place in the tile."""
    op, layer = op_of(backend), a_layer(*sizes, dtype)
    if not ON_GPU:
        monkeypatch.setattr(numpy, "matmul", lambda a, b, dtype: (a[:, :, None] * b).sum(1, dtype=dtype))
    last = sizes[0] - 1
    assert_rows_stand_alone(op, *layer, [(0, 1), (last, last + 1), (3, last)])


@pytest.mark.parametrize("sizes", LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_large_products_stand_alone_on_any_number_of_threads(dtype, sizes):
    require_cpp()
    layer = a_layer(*sizes, dtype)
    threads = torch.get_num_threads()
    whole = invariant_linear(*layer)
    rows = len(whole)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(invariant_linear(*layer), whole)
            cuts = [(0, 1), (rows - 1, rows), (rows // 3, rows // 3 + 17), (5, rows)]
            assert_rows_stand_alone(invariant_linear, *layer, cuts)
    finally:
        torch.set_num_threads(threads)


def test_strides_of_a_batch_have_no_say(backend):
    hidden, weight, bias = a_layer(7, 32, 70, torch.bfloat16)
    wide = torch.full((7, 100), torch.nan, dtype=torch.bfloat16)
    wide[:, 1:65:2] = hidden
    op = op_of(backend)
    assert torch.equal(op(wide[:, 1:65:2], weight, bias), op(hidden, weight, bias))


def test_what_is_not_finite_stays_in_its_row(backend):
    hidden, weight, bias = a_layer(5, 16, 70, torch.bfloat16)
    op = op_of(backend)
    want = op(hidden, weight, bias)
    hidden[1], hidden[3, 2] = torch.nan, torch.inf
    got = op(hidden, weight, bias)
    assert torch.equal(got[[0, 2, 4]], want[[0, 2, 4]])
    assert not got[[1, 3]].isfinite().any()


def test_no_gradient_is_lost_silently():
    hidden, weight, _ = a_layer(2, 3, 4, torch.float32)
    with pytest.raises(RuntimeError, match="invariant_linear has no backward; call it under"):
        invariant_linear(hidden.requires_grad_(), weight)


class TestOnAGpu:
    pytestmark = GPU_ONLY

    @pytest.mark.parametrize("sizes", [(300, 576, 1536), (300, 77, 130)], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_rows_stand_alone(self, dtype, sizes):
        layer = [x.cuda() for x in a_layer(*sizes, dtype)]
        assert_close(invariant_linear(*layer).cpu(), *(x.cpu() for x in layer))
        cuts = [(0, 1), (299, 300), (100, 117), (63, 129), (1, 300)]
        assert_rows_stand_alone(invariant_linear, *layer, cuts)
