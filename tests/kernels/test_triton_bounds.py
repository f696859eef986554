"""Triton kernels touch their tensors only: random shapes under `guard`, and the guard against kernels that stray.

A kernel joins by a function in `LAUNCHES` that draws arguments and launches it.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the guard is one of the interpreter", allow_module_level=True)

import specimens
from guard import guarded
from triton.runtime.errors import InterpreterError

from selfgen_kernels.backends.triton import noise, sampling

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
SIZES = st.one_of(st.sampled_from([1, 63, 64, 65, 4096, 8191, 8192, 8193]), st.integers(1, 9000))


def padded(draw, shape, dtype):
    """A tensor [.., V] whose rows lie apart and whose last row ends its memory."""
    *rows, size = shape
    gap = draw(st.integers(0, 3))
    data = torch.randn(*rows, size + gap).to(dtype)
    return data[..., :size]


def gumbel_noise(draw):
    n, size = draw(st.integers(0, 3)), draw(st.integers(0, 3000))
    return noise.gumbel_noise(draw(st.integers(-(2**63), 2**63 - 1)), torch.arange(n), torch.arange(n), size, 1)


def self_mask(draw):
    n = draw(st.integers(0, 9))
    return noise.self_mask(1, torch.arange(n), torch.arange(n), torch.full((n,), 2**31))


def sample_mix(draw):
    n, vocab_size = draw(st.integers(0, 3)), draw(SIZES)
    logits = padded(draw, (n, vocab_size), draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    if n and draw(st.booleans()):
        logits[0] = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    threshold = torch.tensor([2**32, 2**31, 0])[:n]
    inv_temperature = torch.tensor([1.0, torch.inf, 0.5])[:n]
    top_k = draw(st.sampled_from([None, torch.full((n,), 5)]))
    ids = torch.arange(n)
    return sampling.sample_mix(logits, ids, threshold, 3, ids, ids, inv_temperature, top_k, None, None)


LAUNCHES = [gumbel_noise, self_mask, sample_mix]


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.__name__)
def test_kernels_stay_within_their_tensors(launch):
    watched = 0

    @settings(deadline=None, max_examples=12)
    @given(st.data())
    def run(data):
        nonlocal watched
        with guarded() as launches:
            launch(data.draw)
        watched += len(launches)

    run()
    assert watched > 0


@pytest.mark.parametrize("kernel", [specimens.past_the_end_kernel, specimens.stray_store_kernel])
@pytest.mark.parametrize("padding", [0, 8])
def test_one_element_past_the_end_is_found(kernel, padding):
    x, out = torch.arange(2 * (40 + padding)).float().view(2, -1)[0, :40], torch.zeros(40)
    with guarded() as launches:
        kernel[(1,)](x, out, 40, REACH=0)
        assert torch.equal(out, x)
        with pytest.raises(InterpreterError, match="outside of every tensor"):
            kernel[(1,)](x, out, 40, REACH=1)
    assert launches == [2, 2]


def test_padding_between_rows_is_outside():
    x, out = torch.zeros(4, 32)[:2, :24], torch.zeros(64)
    with guarded(), pytest.raises(InterpreterError, match="outside of every tensor"):
        specimens.past_the_end_kernel[(1,)](x, out, 56, REACH=0)
