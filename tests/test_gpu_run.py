"""`make gpu` as far as it can be told without a GPU: which tests it would run, and what it calls."""

import os
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from helpers.processes import apart

pytest.importorskip("triton")
from selfgen_kernels.ops import OPS

ROOT = Path(__file__).resolve().parent.parent

LAUNCHED_BY = {  # op with a Triton kernel: tests of which one at least must be run on a GPU
    "gumbel_noise": ("test_noise_ops.py::test_noise_agrees_bit_for_bit[triton", "test_gpu.py::"),
    "self_mask": ("test_noise_ops.py::test_words_agree_bit_for_bit[triton",),
    "sample_mix": ("test_sample_mix.py::test_backends_agree[triton",),
    "reference_log_prob": ("test_reference_log_prob.py::test_any_dtype_and_vocabulary_size[triton",),
    "plan_pass": ("test_passes.py::test_plan_is_that_of_a_heap[triton",),
    "commit_pass": ("test_passes.py::test_commit_is_that_of_the_reference[triton",),
    "invariant_linear": ("test_linear.py::test_products_are_exact_up_to_rounding[triton", "test_linear.py::TestOnAGpu"),
    "linear_sample_mix": (
        "test_triton_head.py::test_tokens_are_those_of_the_reference",
        "test_triton_head.py::test_cutoffs_are_those_of_the_reference",
        "test_gpu.py::test_public_head_gives_the_tokens_of_the_cpu",
    ),
    "linear_sample_shard": ("test_triton_head.py::test_candidates_of_a_shard_are_those_of_the_reference",),
    "linear_reference_log_prob": ("test_triton_head.py::test_log_probs_are_those_of_the_reference",),
    "kv_append": ("test_attention.py::test_append_writes_its_slots_and_nothing_else[triton",),
    "act_mul": ("test_layer_ops.py::test_act_mul_is_equal[",),
    "rotary": ("test_layer_ops.py::test_rotary_is_equal[",),
    "rotary_append": ("test_layer_ops.py::test_rotary_append_is_equal[",),
    "rms_norm": ("test_norm.py::test_backends_are_equal[triton",),
    "add_rms_norm": ("test_norm.py::test_a_sum_and_its_norm_are_those_of_two_ops[triton",),
    "ragged_attention": ("test_attention.py::test_agrees_with_dense_attention[triton",),
}
OFF_THE_GPU = (  # what names Triton, but launches no kernel or asks the interpreter
    "test_triton_bounds.py",
    "test_triton_compile.py",
    "test_triton_launch.py",
    "test_triton_targets.py",
    "test_launches_of_triton_are_all_there_is",
    "test_dispatch.py::test_importing_needs_torch_only",
    "test_dispatch.py::test_without_triton_and_compiler",
    "test_far_offsets.py::test_a_wrapped_offset_is_noticed",
)


class Collected:
    """A plugin of pytest: each collected test by its name, and whether it is marked gpu."""

    def pytest_collection_finish(self, session):
        self.tests = {item.nodeid: item.get_closest_marker("gpu") is not None for item in session.items}


def collect_with_a_gpu() -> dict[str, bool]:
    torch.cuda.is_available = lambda: True
    collected, folders = Collected(), ["tests/kernels", "tests/test_on_gpu.py"]
    done = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "", *folders], plugins=[collected])
    assert done == 0
    return collected.tests


@pytest.fixture(scope="module")
def with_a_gpu():
    """Every test of tests/kernels by its name, as collected where there is a GPU, and whether it is marked gpu."""
    return apart(collect_with_a_gpu, folder=ROOT)


def test_every_op_with_a_triton_kernel_is_tested_on_a_gpu(with_a_gpu):
    with_kernels = {name for name, op in OPS.items() if "triton" in op.kernels}
    assert LAUNCHED_BY.keys() == with_kernels, "add the tests of the new op"
    for op, tests in LAUNCHED_BY.items():
        for test in tests:
            assert any(is_gpu and test in name for name, is_gpu in with_a_gpu.items()), f"{op}: none of {test} is run"


def test_all_that_names_triton_is_run_on_a_gpu_or_has_a_reason_not_to_be(with_a_gpu):
    assert [name for name, is_gpu in with_a_gpu.items() if is_gpu and any(part in name for part in OFF_THE_GPU)] == []
    named = [name for name in with_a_gpu if "triton" in name and not any(part in name for part in OFF_THE_GPU)]
    assert len(named) > 200
    assert [name for name in named if not with_a_gpu[name]] == []


def test_graphs_and_draws_are_run_on_a_gpu(with_a_gpu):
    gpu = [name for name, is_gpu in with_a_gpu.items() if is_gpu]
    assert any("test_on_gpu.py::test_training" in name for name in gpu)
    for file in ("test_gpu.py", "test_attention.py", "test_passes.py"):
        assert any(file in name and "captured_in_a_cuda_graph" in name for name in gpu)
    for case in ("none", "temperature", "top_k", "top_p", "min_p", "all"):
        for form in ("by_logits", "by_head"):
            assert any("ten_million_draws_of_triton" in name and f"{case}-{form}" in name for name in gpu)


# ---- make gpu --------------------------------------------------------------------------------------------------------

PYTHON = """#!/bin/sh
    echo "$@" $PYTHONDONTWRITEBYTECODE >> calls
    exit $STATUS
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize(
    ("target", "module"), [("gpu", "benchmarks.gpu --section step"), ("gpu-bundle", "benchmarks.gpu.bundle --most 8")]
)
def test_make_runs_the_module_with_its_arguments_and_tells_of_a_failure(tmp_path, target, module, status):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(textwrap.dedent(PYTHON))
    python.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    command = ["make", target, f"ARGS={module.partition(' ')[2]}"]
    environment = os.environ | {"STATUS": str(status), "PYTHONDONTWRITEBYTECODE": "not handed on"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (status == 0), done.stderr
    assert (tmp_path / "calls").read_text().split() == ["-m", *module.split()]
