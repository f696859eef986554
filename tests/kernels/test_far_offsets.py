"""Elements more than 2^31 apart: rows of a view over a sparse file, of which only a few pages exist."""

import mmap
import tempfile
from importlib import import_module

import pytest
import torch

from selfgen_kernels import sample_mix

FAR = 2**30  # elements from one row to the next: row 3 begins past 2^31
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def far_apart(values):
    """A view [N, ...] with the `values` [N, ...] and FAR elements from row to row, in a range twice as long as needed.

    The other half lies in front, so that an offset that has wrapped reads zeros instead of ending the process.
    """
    span = len(values) * FAR
    size = 2 * span * values.element_size()
    with tempfile.TemporaryFile() as file:  # sparse: what is not written takes no room
        try:
            file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
        except OSError as error:  # a limit of this machine (ulimit -v, a file system without sparse files), not of ours
            pytest.skip(f"{size >> 30} GiB of addresses are refused here: {error}")
    view = torch.frombuffer(memory, dtype=values.dtype)[span:]
    view = view.as_strided(values.shape, (FAR, *values[0].stride()), view.storage_offset())
    view.copy_(values)
    return view


@pytest.fixture
def logits():
    return torch.randn(4, 500, generator=torch.Generator().manual_seed(1)).bfloat16() * 3


def test_sample_mix(backend, logits):
    far = far_apart(logits)
    assert far.stride(0) * 3 > 2**31
    for filters in ({}, {"top_k": 20}):
        near, got = backend.sample_mix(logits, **filters), backend.sample_mix(far, **filters)
        assert all(torch.equal(a, b) for a, b in zip(near, got, strict=True))
        assert not got[2].any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads wherever the wrapped offset leads")
def test_a_wrapped_offset_is_noticed():
    pytest.importorskip("triton")
    import specimens

    rows, out = far_apart(torch.ones(4, 512)), torch.zeros(4, 512)
    specimens.narrow_offset_kernel[(4,)](rows, out, FAR, SIZE=512)
    assert not torch.equal(out, rows)


def test_sample_mix_by_the_public_function(logits):
    ids = torch.arange(4)
    keys = {"seed": 0, "sample_ids": ids, "positions": ids}
    near, got = (sample_mix(x, ids, 1.0, **keys)[0] for x in (logits, far_apart(logits)))
    assert torch.equal(near, got)


REFERENCE_MODULES = {"head": "sampling"}  # where its name is not that of the Triton module


def function_of(backend, module, op):
    """The op of a backend."""
    if backend.name == "cpp":
        return getattr(torch.ops.selfgen, op)
    if backend.name == "reference":
        module = REFERENCE_MODULES.get(module, module)
    return getattr(import_module(f"selfgen_kernels.backends.{backend.name}.{module}"), op)


@pytest.mark.parametrize("far_argument", ["hidden", "weight"])
def test_linear_sample_mix(backend, far_argument):
    linear_sample_mix = function_of(backend, "head", "linear_sample_mix")
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(4, 64, generator=generator) for _ in range(2))
    ids = torch.arange(4)
    how = ids, torch.full((4,), 2**32), 0, ids, ids, torch.ones(4), None, None, None
    near = linear_sample_mix(hidden, weight, None, None, 1.0, *how)
    if far_argument == "hidden":
        hidden = far_apart(hidden)
    else:
        weight = far_apart(weight)
    got = linear_sample_mix(hidden, weight, None, None, 1.0, *how)
    assert all(torch.equal(a, b) for a, b in zip(near, got, strict=True))


@pytest.mark.parametrize("far_argument", ["query", "key", "value"])
def test_ragged_attention(backend, far_argument):
    ragged_attention = function_of(backend, "attention", "ragged_attention")
    generator = torch.Generator().manual_seed(3)
    inputs = {name: torch.randn(4, 2, 64, generator=generator) for name in ("query", "key", "value")}
    chunks, ranges = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([[2, 2], [0, 4]])
    rest = chunks, ranges, 0.125, None, None, None
    near = ragged_attention(*inputs.values(), *rest)
    inputs[far_argument] = far_apart(inputs[far_argument])
    torch.testing.assert_close(ragged_attention(*inputs.values(), *rest), near)


def test_kv_append(backend):
    kv_append = function_of(backend, "attention", "kv_append")
    new = torch.randn(2, 2, 64)
    caches = [far_apart(torch.zeros(4, 2, 64)) for _ in range(2)]
    kv_append(*caches, new, -new, torch.tensor([3, 1]))
    assert torch.equal(caches[0][[3, 1]], new)
    assert torch.equal(caches[1][[3, 1]], -new)
