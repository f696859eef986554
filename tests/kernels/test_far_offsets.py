"""Elements more than 2^31 apart: rows of a view over a sparse file, of which only a few pages exist, or on the GPU."""

import mmap
import tempfile
from importlib import import_module

import pytest
import torch
from conftest import GPU_ONLY, INTERPRETER_ONLY, ON_GPU, moved

from selfgen_kernels import sample_mix

FAR = 2**30  # elements from one row to the next: row 2 begins at 2^31
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # on a GPU all of the range takes room: 10 GiB
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def sparse_file(elements, dtype):
    """Zeros [elements], of which only what is written takes room."""
    size = elements * dtype.itemsize
    with tempfile.TemporaryFile() as file:
        try:
            file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
        except OSError as error:  # a limit of this machine (ulimit -v, a file system without sparse files), not of ours
            pytest.skip(f"{size >> 30} GiB of addresses are refused here: {error}")
    return torch.frombuffer(memory, dtype=dtype)


def gpu_memory(elements, dtype):
    """Whatever it holds [elements]."""
    torch.cuda.empty_cache()  # of the test before
    needed, (free, _) = elements * dtype.itemsize, torch.cuda.mem_get_info()
    if free < needed + 2**30:
        pytest.skip(f"{needed >> 30} GiB and one to work in are needed on the GPU, {free >> 30} are free")
    return torch.empty(elements, dtype=dtype, device="cuda")


def far_apart(values, device="cpu"):
    """A view [N, ...] on `device` with the `values` [N, ...], N <= 4, and FAR elements from row to row.

    Memory begins 2^31 elements before it, and where an offset of 32 bits would lead that has wrapped lie zeros: so it
    reads something else instead of ending the process.
    """
    row, strides = values[0].shape, values[0].stride()
    before, places = 2**31, [i * FAR for i in range(len(values))]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(row, strides, strict=True))
    memory = (gpu_memory if device == "cuda" else sparse_file)(before + places[-1] + extent, values.dtype)
    for place, value in zip(places, values, strict=True):
        wrapped = (place + 2**31) % 2**32 - 2**31
        memory.as_strided(row, strides, before + wrapped).zero_()
        memory.as_strided(row, strides, before + place).copy_(value)
    return memory.as_strided(values.shape, (FAR, *strides), before)


def test_the_view_is_far_apart_and_wrapped_offsets_lead_to_zeros():
    view = far_apart(torch.ones(4, 3))
    assert torch.equal(view, torch.ones(4, 3))
    for offset in (2 * FAR - 2**32, 3 * FAR - 2**32):
        assert not view.as_strided((3,), (1,), view.storage_offset() + offset).any()


@pytest.fixture
def logits():
    return torch.randn(4, 500, generator=torch.Generator().manual_seed(1)).bfloat16() * 3


def test_sample_mix(backend, logits):
    far = far_apart(logits, backend.device)
    assert far.stride(0) * 3 > 2**31
    for filters in ({}, {"top_k": 20}):
        near, got = backend.sample_mix(logits, **filters), backend.sample_mix(far, **filters)
        assert all(torch.equal(a, b) for a, b in zip(near, got, strict=True))
        assert not got[2].any()


def test_reference_log_prob(backend, logits):
    near, got = (backend.reference_log_prob(x) for x in (logits, far_apart(logits, backend.device)))
    assert torch.equal(near, got)
    assert near.isfinite().all()


@INTERPRETER_ONLY
def test_a_wrapped_offset_is_noticed():
    pytest.importorskip("triton")
    import specimens

    rows, out = far_apart(torch.ones(4, 512)), torch.zeros(4, 512)
    specimens.narrow_offset_kernel[(4,)](rows, out, FAR, SIZE=512)
    assert not torch.equal(out, rows)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU_ONLY)])
def test_sample_mix_by_the_public_function(device, logits):
    ids = torch.arange(4, device=device)
    keys = {"seed": 0, "sample_ids": ids, "positions": ids}
    near, got = (sample_mix(x, ids, 1.0, **keys)[0] for x in (logits.to(device), far_apart(logits, device)))
    assert torch.equal(near, got)


def test_rms_norm(backend):
    rms_norm = function_of(backend, "norm", "rms_norm")
    x, weight = torch.randn(4, 500, generator=torch.Generator().manual_seed(1)).to(DTYPE), torch.ones(500)
    near, got = (
        rms_norm(*moved((rows, weight), backend.device), 1e-6, False, True)
        for rows in (x, far_apart(x, backend.device))
    )
    assert torch.equal(near, got)


@pytest.mark.parametrize("far_argument", [0, 1])
def test_add_rms_norm(backend, far_argument):
    add_rms_norm = function_of(backend, "norm", "add_rms_norm")
    terms = [*torch.randn(2, 4, 500, generator=torch.Generator().manual_seed(1)).to(DTYPE)]
    how = torch.ones(500), 1e-6, False, True
    near = add_rms_norm(*moved((*terms, *how), backend.device))
    terms[far_argument] = far_apart(terms[far_argument], backend.device)
    got = add_rms_norm(*moved((*terms, *how), backend.device))
    assert all(torch.equal(a, b) for a, b in zip(near, got, strict=True))


def function_of(backend, module, op):
    """The op of a backend."""
    if backend.name == "cpp":
        return getattr(torch.ops.selfgen, op)
    return getattr(import_module(f"selfgen_kernels.backends.{backend.name}.{module}"), op)


@pytest.mark.parametrize("far_argument", ["hidden", "weight"])
def test_linear_sample_mix(backend, far_argument):
    linear_sample_mix = function_of(backend, "head", "linear_sample_mix")
    generator = torch.Generator().manual_seed(2)
    inputs = {name: torch.randn(4, 64, generator=generator).to(DTYPE) for name in ("hidden", "weight")}
    ids = torch.arange(4)
    how = None, None, 1.0, *moved((ids, ids + 2**32, 0, ids, ids, torch.ones(4), None, None, None), backend.device)
    near = linear_sample_mix(*moved(inputs.values(), backend.device), *how)
    inputs[far_argument] = far_apart(inputs[far_argument], backend.device)
    got = linear_sample_mix(*moved(inputs.values(), backend.device), *how)
    assert all(torch.equal(a, b) for a, b in zip(near, got, strict=True))


@pytest.mark.parametrize("far_argument", ["hidden", "weight"])
def test_invariant_linear(backend, far_argument):
    invariant_linear = function_of(backend, "linear", "invariant_linear")
    inputs = {name: torch.randn(4, 64).to(DTYPE) for name in ("hidden", "weight")}
    near = invariant_linear(*moved(inputs.values(), backend.device), None)
    inputs[far_argument] = far_apart(inputs[far_argument], backend.device)
    assert torch.equal(invariant_linear(*moved(inputs.values(), backend.device), None), near)


@pytest.mark.parametrize("far_argument", ["query", "key", "value"])
def test_ragged_attention(backend, far_argument):
    ragged_attention = function_of(backend, "attention", "ragged_attention")
    generator = torch.Generator().manual_seed(3)
    inputs = {name: torch.randn(4, 2, 64, generator=generator).to(DTYPE) for name in ("query", "key", "value")}
    chunks, ranges = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([[2, 2], [0, 4]])
    rest = moved((chunks, ranges, 0.125, None, None, None), backend.device)
    near = ragged_attention(*moved(inputs.values(), backend.device), *rest)
    inputs[far_argument] = far_apart(inputs[far_argument], backend.device)
    torch.testing.assert_close(ragged_attention(*moved(inputs.values(), backend.device), *rest), near)


@pytest.mark.parametrize("far_argument", ["key_cache", "value_cache"])
def test_kv_append(backend, far_argument):
    kv_append = function_of(backend, "attention", "kv_append")
    new = torch.randn(2, 2, 64).to(DTYPE)
    caches = {name: torch.zeros(4, 2, 64, dtype=DTYPE) for name in ("key_cache", "value_cache")}
    caches[far_argument] = far_apart(caches[far_argument], backend.device)
    keys, values, *rest = moved((*caches.values(), new, -new, torch.tensor([3, 1])), backend.device)
    kv_append(keys, values, *rest)
    assert torch.equal(keys[[3, 1]].cpu(), new)
    assert torch.equal(values[[3, 1]].cpu(), -new)
    assert not keys[[0, 2]].any()
    assert not values[[0, 2]].any()
