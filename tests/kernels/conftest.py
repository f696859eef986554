"""Every backend of the ops from one fixture; Triton's kernels run in its interpreter where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from filelock import FileLock

from selfgen_kernels import backends
from selfgen_kernels.backends.reference import philox
from selfgen_kernels.backends.reference import sampling as reference_sampling

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
"""Where Triton's tensors are."""
if not ON_GPU and find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which no import above does
    from interpreting import hurry

    hurry()


def moved(values, device):
    """The `values` with their tensors on `device`, with strides, alignment and what lies between their elements.

    Tensor.to would make a tensor with gaps dense: then no test of strides would reach the kernels of a GPU.
    """
    result = []
    for value in values:
        if isinstance(value, torch.Tensor) and value.device.type != torch.device(device).type:
            size = value.untyped_storage().nbytes() // value.element_size()
            there = value.as_strided((size,), (1,), 0).to(device)
            value = there.as_strided(value.shape, value.stride(), value.storage_offset())
        result.append(value)
    return result


@dataclass
class Backend:
    """The dispatched ops of one backend, with the arguments of their schemas."""

    name: str
    device: str
    noise: Any
    sampling: Any

    def gumbel_noise(self, seed, sample_ids, positions, size, stream):
        args = seed, *moved((sample_ids, positions), self.device), size, stream
        return self.noise.gumbel_noise(*args).cpu()

    def self_mask(self, seed, sample_ids, positions, threshold):
        args = moved((sample_ids, positions, threshold), self.device)
        return self.noise.self_mask(seed, *args).cpu()

    def sample_mix(
        self, logits, reference=None, *, seed=0, sample_ids=None, positions=None, threshold=2**32, inv_temperature=1.0,
        top_k=None, top_p=None, min_p=None,
    ):  # fmt: skip
        """Numbers stand for a tensor [N]; rows are told apart by their sample id unless the caller says otherwise."""
        n = len(logits)

        def row_tensor(value, dtype):
            return value if isinstance(value, torch.Tensor) or value is None else torch.full((n,), value, dtype=dtype)

        args = (
            logits,
            torch.full((n,), -7) if reference is None else reference,
            row_tensor(threshold, torch.int64),
            seed,
            torch.arange(n) if sample_ids is None else sample_ids,
            torch.zeros(n, dtype=torch.int64) if positions is None else positions,
            row_tensor(inv_temperature, torch.float32),
            row_tensor(top_k, torch.int64),
            row_tensor(top_p, torch.float64),
            row_tensor(min_p, torch.float64),
        )
        return tuple(result.cpu() for result in self.sampling.sample_mix(*moved(args, self.device)))

    def reference_log_prob(self, logits, reference=None, threshold=2**32):
        """The same for the reference's log probability; rows expect the tokens 0, 1, .. if no others."""
        ids = torch.arange(len(logits))
        args = logits, ids if reference is None else reference, torch.full_like(ids, threshold), 0, ids, ids * 0
        return self.sampling.reference_log_prob(*moved(args, self.device)).cpu()


def once_per_run(tmp_path_factory, name: str, make: Callable[[], str]) -> str:
    """What `make` returns, made by the first of pytest-xdist's workers to ask, or by the one process that there is."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers
    made = folder / name
    with FileLock(folder / f"{name}.lock"):
        if not made.exists():
            made.write_text(make())
    return made.read_text()


def triton_backend() -> Backend:
    pytest.importorskip("triton")
    from selfgen_kernels.backends.triton import noise, sampling

    return Backend("triton", DEVICE, noise, sampling)


def require_cpp() -> None:
    """Skip without the C++ kernels: they are optional, so an install without a compiler must pass on what it has.

    That they are there where a compiler is, is a test of its own (test_dispatch.py).
    """
    if backends.cpu.missing is not None:
        pytest.skip(f"no C++ kernels: {backends.cpu.missing}", allow_module_level=True)


def cpp_backend() -> Backend:
    require_cpp()
    return Backend("cpp", "cpu", torch.ops.selfgen, torch.ops.selfgen)


REFERENCE = Backend("reference", "cpu", philox, reference_sampling)
_FAST = {"cpp": cpp_backend, "triton": triton_backend}
_INTERPRETED = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # numpy's, on log(0)
TRITON_MARKS = [pytest.mark.gpu if ON_GPU else _INTERPRETED]
"""Of all that launches a Triton kernel: `make test` runs it in the interpreter, `make gpu` on the GPU."""
GPU_ONLY = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")]
INTERPRETER_ONLY = pytest.mark.skipif(ON_GPU, reason="asks the interpreter what a GPU does not tell")
_TRITON = pytest.param("triton", marks=TRITON_MARKS)


@pytest.fixture
def reference() -> Backend:
    """The torch reference, the oracle of the other two."""
    return REFERENCE


@pytest.fixture(params=["cpp", _TRITON])
def fast(request) -> Backend:
    """A backend to be compared with the reference."""
    return _FAST[request.param]()


@pytest.fixture(params=["reference", "cpp", _TRITON])
def backend(request) -> Backend:
    """Each backend."""
    return REFERENCE if request.param == "reference" else _FAST[request.param]()


@pytest.fixture
def rows():
    """Twelve rows (logits [12, 1000], reference, mask threshold, ids, positions) of which about half are sampled."""
    generator = torch.Generator().manual_seed(0)
    n = 12
    return {
        "logits": torch.randn(n, 1000, generator=generator) * 3,
        "reference": torch.arange(n) + 5000,
        "threshold": torch.full((n,), 2**31),
        "sample_ids": torch.randint(-(2**62), 2**62, (n,), generator=generator),
        "positions": torch.randint(0, 2**32, (n,), generator=generator),
    }
