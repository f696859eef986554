"""Which tiles a GPU takes, shown on devices that are not here."""

import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from selfgen_kernels.backends import triton as kernels
from selfgen_kernels.backends.triton.configuration import SHARED_MEMORY, TARGETS, current_target, target_at, target_of


def nvidia(major, minor, kib):
    """`kib` of shared memory per multiprocessor."""
    return SimpleNamespace(
        name=f"NVIDIA {major}.{minor}", major=major, minor=minor, shared_memory_per_multiprocessor=kib << 10
    )


def amd(architecture):
    return SimpleNamespace(name=architecture, gcnArchName=architecture, major=9, minor=4)


NVIDIA = {
    (8, 0, 164): "sm_80", (8, 6, 100): "sm_86", (8, 9, 100): "sm_89", (9, 0, 228): "sm_90", (10, 0, 228): "sm_100",
    (12, 0, 100): "sm_120",  # these are targets
    (8, 7, 164): "sm_86", (10, 3, 228): "sm_100", (12, 1, 100): "sm_120",  # kin of one
    (11, 0, 228): "sm_86", (13, 0, 300): "sm_86", (9, 0, 100): "sm_86",  # the table that fits all
    (7, 0, 96): None, (7, 5, 64): None, (13, 0, 64): None,
}  # fmt: skip
AMD = {
    "gfx942:sramecc+:xnack-": "gfx942", "gfx950:sramecc+:xnack-": "gfx942", "gfx90a": "gfx942",
    "gfx908": None, "gfx906": None, "gfx1100": None, "gfx1201": None,
}  # fmt: skip


@pytest.fixture
def device(request):
    """The only one there is, as far as torch tells; what is remembered of others is forgotten."""
    given = request.param
    hip = "6.4" if hasattr(given, "gcnArchName") else None
    cuda = torch.cuda
    with (
        mock.patch.object(torch.version, "hip", hip),
        mock.patch.object(cuda, "is_initialized", return_value=True),
        mock.patch.object(cuda, "current_device", return_value=0),
        mock.patch.object(cuda, "get_device_properties", return_value=given),
    ):
        target_at.cache_clear()
        kernels._backend_at.cache_clear()
        yield given
    target_at.cache_clear()
    kernels._backend_at.cache_clear()


def some(table, make):
    return [pytest.param(make(*given), target, id=str(given)) for given, target in table.items()]


DEVICES = some(NVIDIA, nvidia) + some({(name,): target for name, target in AMD.items()}, amd)


@pytest.mark.parametrize(("device", "target"), DEVICES, indirect=["device"])
def test_a_device_takes_tiles_that_fit_it(device, target):
    assert target_of(device) == target
    if target is None:
        return
    assert current_target() == target
    if torch.version.hip is None:
        assert SHARED_MEMORY[target] <= device.shared_memory_per_multiprocessor - 1024


def test_every_target_is_some_device():
    assert {*NVIDIA.values(), *AMD.values()} - {None} == set(TARGETS)


@pytest.mark.parametrize(("device", "target"), DEVICES, indirect=["device"])
def test_where_nothing_fits_the_reference_computes_and_says_so_once(device, target):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        backends = {kernels._backend_at(0) for _ in range(3)}
    assert backends == {"selfgen_kernels.backends." + ("reference" if target is None else "triton")}
    assert [device.name in str(one.message) for one in said] == ([True] if target is None else [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_the_interpreter_takes_some_target():
    assert current_target() in TARGETS
