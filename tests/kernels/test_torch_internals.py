"""What changes under a torch that lacks an undocumented name: less is looked at and checked, and nothing else."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from calls import CALLS, EXAMPLES, as_tuple, call, copied
from torch.autograd import forward_ad

from selfgen_kernels import torch_internals

NEEDED_TO_LOOK = [
    (torch._C, "DispatchKey"),
    (torch._C, "_dispatch_tls_is_dispatch_key_included"),
    (torch._C, "_len_torch_dispatch_stack"),
    (torch._C._functorch, "is_functorch_wrapped_tensor"),
]


def under_a_torch_without(owner, name, monkeypatch):
    """The module as it would be imported there."""
    with monkeypatch.context() as patched:
        patched.delattr(owner, name)
        spec = importlib.util.find_spec(torch_internals.__name__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("owner", "name"), NEEDED_TO_LOOK, ids=lambda value: value if isinstance(value, str) else "")
def test_no_value_is_looked_at_where_tracing_cannot_be_told(owner, name, monkeypatch):
    module = under_a_torch_without(owner, name, monkeypatch)
    assert module.is_traced(torch.zeros(2))
    assert not torch_internals.is_traced(torch.zeros(2))


def test_vmap_over_a_shared_status_is_refused_by_torch(monkeypatch):
    module = under_a_torch_without(torch._C._functorch, "is_batchedtensor", monkeypatch)
    monkeypatch.setattr("selfgen_kernels.ops.rows.is_batchedtensor", module.is_batchedtensor)
    arguments = {**EXAMPLES["sample_mix"][1], "status": torch.zeros((), dtype=torch.int64)}
    references = torch.stack([arguments["reference"]] * 2)
    with pytest.raises(RuntimeError, match=r"vmap: inplace|match the broadcast shape"):
        torch.func.vmap(lambda reference: call("sample_mix", **arguments | {"reference": reference}))(references)


def test_tangents_and_storages_are_told_apart_all_the_same(monkeypatch):
    x = torch.zeros(2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones(2))
        monkeypatch.setattr(torch_internals, "forward_ad", SimpleNamespace(unpack_dual=forward_ad.unpack_dual))
        assert torch_internals.has_tangent(dual)
        assert not torch_internals.has_tangent(x)
    assert not torch_internals.has_tangent(x)

    def nameless(tensor):
        storage = tensor.untyped_storage()
        return SimpleNamespace(untyped_storage=lambda: SimpleNamespace(data_ptr=storage.data_ptr))

    one, view, other = (torch_internals.storage_of(nameless(tensor)) for tensor in (x, x[1:], torch.zeros(2)))
    assert one == view != other


WITHOUT_THEM = """
import sys
import torch
import torch.utils._python_dispatch
from torch._C import _functorch

for name in ("DispatchKey", "_dispatch_tls_is_dispatch_key_included", "_len_torch_dispatch_stack"):
    delattr(torch._C, name)
for name in ("is_functorch_wrapped_tensor", "is_batchedtensor"):
    delattr(_functorch, name)
from calls import CALLS, EXAMPLES, call, copied
results = []
for name, i in CALLS:
    arguments = copied(EXAMPLES[name][i])
    results.append((call(name, **arguments), arguments))
torch.save(results, sys.argv[1])
"""


def test_without_any_of_them_it_imports_and_gives_the_same(tmp_path):
    folder = Path(__file__).parent
    path = os.pathsep.join(filter(None, [str(folder), str(folder.parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", WITHOUT_THEM, str(tmp_path / "results")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for (name, i), (got, written) in zip(CALLS, torch.load(tmp_path / "results"), strict=True):
        arguments = copied(EXAMPLES[name][i])
        want = call(name, **arguments)
        tensors = [key for key, value in arguments.items() if isinstance(value, torch.Tensor)]
        for a, b in zip(
            (*as_tuple(got), *(written[key] for key in tensors)),
            (*as_tuple(want), *(arguments[key] for key in tensors)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
