"""The ops as torch sees them: opcheck, torch.compile, and a machine that has neither Triton nor a compiler."""

import os
import shutil
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from selfgen_kernels import backends, linear_sample_mix, sample_mix
from selfgen_kernels.call import Mask, Sampling
from selfgen_kernels.ops import OPS, in_records
from selfgen_kernels.ops.registration import define

N, V, D = 5, 130, 8
IDS = torch.arange(N)
FULL = torch.full((N,), 2**31)
FILTERS = torch.full((N,), 9), torch.full((N,), 0.9).double(), torch.full((N,), 0.1).double()
NEXT_SELF = torch.tensor([1, 3, 3, 4, 4])
SAMPLING = IDS, FULL, 3, IDS, IDS, torch.ones(N)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("gumbel_noise", (3, IDS, IDS, 10, 1)),
        ("kv_append", (*torch.randn(2, 9, 3, 16), *torch.randn(2, N, 3, 16), IDS - 1)),
        ("act_mul", (*torch.randn(2, N, D), False)),
        ("rotary", (torch.randn(N, 4, D), torch.randn(N, 2, D), *torch.randn(2, N, D), False)),
        (
            "rotary_append",
            (
                *torch.randn(2, 9, 2, D),
                torch.randn(N, 4, D),
                *torch.randn(2, N, 2, D),
                *torch.randn(2, N, D),
                IDS - 1,
                True,
            ),
        ),
        ("rms_norm", (torch.randn(N, D), torch.randn(D), 1e-6, False, True)),
        ("rms_norm", (torch.randn(N, D).bfloat16(), torch.randn(D), 1e-6, True, False)),
        ("add_rms_norm", (*torch.randn(2, N, D), torch.randn(D), 1e-6, False, True)),
        ("add_rms_norm", (torch.randn(N, D).bfloat16(), torch.randn(N, D), torch.randn(D), 1e-6, True, False)),
        ("self_mask", (3, IDS, IDS, FULL)),
        ("sample_mix", (torch.randn(N, V), *SAMPLING, None, None, None)),
        ("sample_mix", (torch.randn(N, V).bfloat16(), *SAMPLING, *FILTERS)),
        ("linear_sample_mix", (torch.randn(N, D), torch.randn(V, D), None, None, 1.0, *SAMPLING, None, None, None)),
        ("linear_sample_mix", (torch.randn(N, D), torch.randn(V, D), torch.randn(V), 30.0, 0.5, *SAMPLING, *FILTERS)),
        ("linear_sample_shard", (torch.randn(N, D), torch.randn(V, D), None, 30.0, 0.5, 77, *SAMPLING[1:])),
        ("combine_shards", (torch.randn(2, N, 3, 3), torch.arange(2 * N * 3).view(2, N, 3), *SAMPLING)),
        ("reference_log_prob", (torch.randn(N, V), *SAMPLING[:5])),
        ("linear_reference_log_prob", (torch.randn(N, D), torch.randn(V, D), None, 30.0, 0.5, *SAMPLING[:5])),
        ("invariant_linear", (torch.randn(N, D), torch.randn(V, D), torch.randn(V))),
        ("plan_pass", (IDS[:1], IDS[:1], NEXT_SELF, torch.zeros(N), 3)),
        ("commit_pass", (IDS.clone(), IDS[:1].clone(), IDS[:3], torch.tensor([0, 3]).int(), NEXT_SELF, IDS[2:])),
    ],
)
def test_opcheck(op, args):
    torch.library.opcheck(getattr(torch.ops.selfgen, op).default, args)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("sample_mix", (torch.randn(N, V), *SAMPLING, *FILTERS)),
        ("reference_log_prob", (torch.randn(N, V), *SAMPLING[:5])),
        ("linear_sample_mix", (torch.randn(N, D), torch.randn(V, D), None, None, 1.0, *SAMPLING, None, None, None)),
        ("linear_reference_log_prob", (torch.randn(N, D), torch.randn(V, D), None, 30.0, 0.5, *SAMPLING[:5])),
        ("linear_sample_shard", (torch.randn(N, D), torch.randn(V, D), None, 30.0, 0.5, 77, *SAMPLING[1:])),
        ("combine_shards", (torch.randn(2, N, 3, 3), torch.arange(2 * N * 3).view(2, N, 3), *SAMPLING)),
    ],
)
def test_a_seed_in_memory_is_read_when_the_operator_runs(op, args):
    """In the program of a CUDA graph, so to speak: the same call, another seed."""
    packet = getattr(torch.ops.selfgen, op)
    place = [argument.name for argument in packet.default._schema.arguments].index("seed")
    seed = torch.tensor([3])
    in_memory = *args[:place], seed, *args[place + 1 :]
    torch.library.opcheck(packet.seed_tensor, in_memory)
    found = []
    for number in (3, -(2**63), 2**63 - 1):
        seed.fill_(number)
        found.append(packet.seed_tensor(*in_memory))
        want = packet.default(*args[:place], number, *args[place + 1 :])
        assert all(map(torch.equal, found[-1], want)) if isinstance(want, tuple) else torch.equal(found[-1], want)
    assert packet.seed_tensor._schema.name == packet.default._schema.name
    assert {op for op, line in OPS.items() if "seed_tensor" in line.overloads} == {
        name for name in OPS if hasattr(getattr(torch.ops.selfgen, name), "seed_tensor")
    }


def test_no_device_waits_for_the_seed_of_combine_shards():
    """It has no kernels, so that its reference would be captured in a CUDA graph."""
    args = torch.randn(2, N, 3, 3), torch.arange(2 * N * 3).view(2, N, 3), IDS, FULL, torch.tensor([3]), *SAMPLING[3:]
    with torch.profiler.profile() as run:
        torch.ops.selfgen.combine_shards.seed_tensor(*args)
    assert "aten::_local_scalar_dense" not in {event.name for event in run.events()}


def test_public_functions_take_a_seed_in_memory():
    logits, hidden, weight = torch.randn(N, V), torch.randn(N, D), torch.randn(V, D)
    keys = {"sample_ids": IDS, "positions": IDS, "min_reference_prob": 0.001, "top_k": 50}
    for call in (partial(sample_mix, logits), partial(linear_sample_mix, hidden, weight)):
        for seed in (0, -5, 2**62):
            got = call(IDS, 0.9, seed=torch.tensor([seed]), **keys)
            assert all(map(torch.equal, got, call(IDS, 0.9, seed=seed, **keys)))
        with pytest.raises(TypeError, match="seed has dtype"):
            call(IDS, 0.9, seed=torch.zeros(1, dtype=torch.int32), **keys)
        with pytest.raises(ValueError, match="seed has shape"):
            call(IDS, 0.9, seed=torch.zeros(2, dtype=torch.int64), **keys)


def test_a_call_in_records_takes_the_arguments_of_its_schema():
    assert Sampling._fields[: len(Mask._fields)] == Mask._fields
    how = Sampling(*SAMPLING[1:], *FILTERS)
    assert how[: len(how.draw)] == how.draw
    assert how[: len(how.mask)] == how.mask
    for name, op in OPS.items():
        if op.arguments:
            names = [parameter.split()[1] for parameter in op.parameters.split(", ")]
            assert names == [argument.name for argument in getattr(torch.ops.selfgen, name).default._schema.arguments]

    @in_records
    def reference_log_prob(logits, reference, mask):
        return logits, reference, mask

    logits, reference, mask = reference_log_prob("logits", "reference", *SAMPLING[1:5])
    assert (logits, reference) == ("logits", "reference")
    assert mask == Mask(*SAMPLING[1:5])
    with pytest.raises(TypeError, match="reference_log_prob takes 6 arguments, got 7"):
        reference_log_prob("logits", "reference", *SAMPLING[1:])


def test_an_op_without_a_line_in_the_table_is_refused():
    with pytest.raises(KeyError, match="no_such_op is not in"):
        define("no_such_op", "(Tensor x) -> Tensor")


def test_compiles_as_one_graph_whatever_the_seed():
    counter = CompileCounterWithBackend("aot_eager")

    def step(logits, reference, self_prob, ids, seed, status):
        tokens, is_self = sample_mix(
            logits,
            reference,
            self_prob,
            seed=seed,
            sample_ids=ids,
            positions=ids,
            temperature=0.7,
            top_k=20,
            status=status,
        )
        return tokens + 1, is_self

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed in (0, 17, -5, 2**62, 12345, 99, 98, 97, 96, 95, 94):
        logits = torch.randn(N, V)
        logits[0] = torch.nan
        args = logits, IDS, torch.full((N,), 0.5), IDS, seed
        statuses = torch.zeros(2, dtype=torch.int64)
        for got, want in zip(compiled(*args, statuses[0]), step(*args, statuses[1]), strict=True):
            assert torch.equal(got, want)
        assert statuses[0] == statuses[1]
    assert counter.frame_count <= 3


def test_linear_compiles_as_one_graph():
    def step(hidden, weight):
        return linear_sample_mix(hidden, weight, IDS, 0.5, softcap=30.0, seed=1, sample_ids=IDS, positions=IDS)

    args = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*args), step(*args), strict=True):
        assert torch.equal(got, want)
        assert not got.requires_grad


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_the_kernels_of_its_line_in_the_table(op):
    """And the torch reference on all other devices."""
    pytest.importorskip("triton")
    keys = {"cpu": "CPU", "triton": "CUDA"}
    has = {name: torch._C._dispatch_has_kernel_for_dispatch_key(f"selfgen::{op}", key) for name, key in keys.items()}
    assert [name for name in has if has[name]] == list(OPS[op].kernels)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"selfgen::{op}", "CompositeExplicitAutograd")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_the_tokens_of_the_cpu_without_a_synchronisation():
    logits, ids = torch.randn(256, 50_000), torch.arange(256)
    tokens, is_self = sample_mix(logits, ids, 0.5, seed=1, sample_ids=ids, positions=ids)
    gpu_logits, gpu_ids, status = logits.cuda(), ids.cuda(), torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        keys = {"seed": 1, "sample_ids": gpu_ids, "positions": gpu_ids}
        got = sample_mix(gpu_logits, gpu_ids, 0.5, status=status, **keys)
        sample_mix(gpu_logits, gpu_ids, 0.5, min_reference_prob=1e-5, **keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got[1].cpu(), is_self)
    assert (got[0].cpu() != tokens).sum() <= 1
    assert status.item() == 0


@pytest.mark.skipif(os.environ.get("SELFGEN_NO_CPP") == "1", reason="the kernels are unwanted here")
def test_a_machine_with_a_compiler_has_the_cpp_kernels():
    """Tests of the C++ kernels skip without them, which must not hide a build that failed."""
    if shutil.which(os.environ.get("CXX", "c++")):
        assert backends.cpu.missing is None, f"{backends.cpu.missing}; pip install --no-build-isolation -e ."


def test_threads_do_not_matter():
    logits = torch.randn(64, 5000)
    ids = torch.arange(64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(sample_mix(logits, ids, 1.0, seed=0, sample_ids=ids, positions=ids)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_without_triton_and_compiler_it_imports_runs_and_says_so_once():
    script = """
        import importlib.util, sys, warnings
        found = importlib.util.find_spec
        missing = lambda name: name == "triton" or name.endswith("._C")
        importlib.util.find_spec = lambda name, *rest: None if missing(name) else found(name, *rest)
        sys.modules["triton"] = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import torch, selfgen_kernels
            ours = lambda: [str(w.message) for w in caught if "selfgen_kernels" in str(w.message)]
            assert ours() == [], ours()
            ids = torch.arange(4)
            for _ in range(2):
                selfgen_kernels.sample_mix(torch.randn(4, 9), ids, 0.5, seed=0, sample_ids=ids, positions=ids)
                selfgen_kernels.self_mask(0, ids, ids, 0.5)
            assert len(ours()) == 1, ours()
            assert "were not built" in ours()[0], ours()
            assert [w.filename for w in caught if "selfgen_kernels" in str(w.message)] == ["<string>"]
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


IMPORTED_WITHOUT = """
import importlib.abc, importlib.util, os, sys, traceback
import torch

PARTS = ("triton", "flash_attn", "_C")
CASES = [(state, absent) for state in ("missing", "broken") for absent in (*((part,) for part in PARTS), PARTS)]

def check(state, absent):
    class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in absent or name.endswith("._C") and "selfgen" in name and "_C" in absent:
                if state == "missing":
                    raise ModuleNotFoundError(name)
                return importlib.util.spec_from_loader(name, self)

        def exec_module(self, module):
            raise ImportError("undefined symbol")

    before = set(sys.modules)
    sys.meta_path.insert(0, Absent())
    found = importlib.util.find_spec

    def find_spec(name, *rest):
        try:
            return found(name, *rest)
        except ModuleNotFoundError:
            return None

    importlib.util.find_spec = find_spec
    import selfgen_kernels
    assert not {"triton", "flash_attn"} & (set(sys.modules) - before)
    ids = torch.arange(4)
    tokens, is_self = selfgen_kernels.sample_mix(torch.randn(4, 9), ids, 1.0, seed=0, sample_ids=ids, positions=ids)
    assert is_self.all() and ((tokens >= 0) & (tokens < 9)).all()

for case in CASES:
    child = os.fork()
    if child == 0:
        try:
            check(*case)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(*case, "failed" if os.waitpid(child, 0)[1] else "passed", flush=True)
"""


def test_importing_needs_torch_only():
    """Each optional part not installed, or installed and failing when imported; and none is imported too early.

    In a child of one process that has imported torch for each case.
    """
    command = [sys.executable, "-c", IMPORTED_WITHOUT]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert "failed" not in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("passed") == 8
