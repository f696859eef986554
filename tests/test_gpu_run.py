"""`make gpu` as far as it can be told without a GPU: which tests it would run, what it reports, how it ends."""

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
    "linear_sample_mix": (
        "test_triton_head.py::test_tokens_are_those_of_the_reference",
        "test_triton_head.py::test_cutoffs_are_those_of_the_reference",
        "test_gpu.py::test_public_head_gives_the_tokens_of_the_cpu",
    ),
    "linear_sample_shard": ("test_triton_head.py::test_candidates_of_a_shard_are_those_of_the_reference",),
    "linear_reference_log_prob": ("test_triton_head.py::test_log_probs_are_those_of_the_reference",),
    "kv_append": ("test_attention.py::test_append_writes_its_slots_and_nothing_else[triton",),
    "ragged_attention": ("test_attention.py::test_agrees_with_dense_attention[triton",),
}
OFF_THE_GPU = (  # what names Triton, but launches no kernel or asks the interpreter
    "test_triton_bounds.py",
    "test_triton_compile.py",
    "test_triton_launch.py",
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
    echo "$@" >> calls
    case "$*" in
        *"-m gpu"*) exit $TESTS;;
        *bench_*) exit $BENCHMARKS;;
    esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(("tests", "benchmarks"), [(0, 0), (1, 0), (5, 0), (0, 1), (1, 2)])
def test_benchmarks_follow_failed_tests_and_the_failure_is_told(tmp_path, tests, benchmarks):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(textwrap.dedent(PYTHON))
    python.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    environment = os.environ | {"TESTS": str(tests), "BENCHMARKS": str(benchmarks)}
    done = subprocess.run(["make", "gpu"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    _, ran, measured = (tmp_path / "calls").read_text().splitlines()
    assert (done.returncode == 0) == (tests == benchmarks == 0), done.stderr
    assert "-m pytest -m gpu --junitxml=outputs/gpu-tests.xml" in ran
    assert "--test-results outputs/gpu-tests.xml" in measured
    for name in ("step", "contexts", "head"):
        assert f"benchmarks/bench_{name}.py" in measured


SUITE = """
    import pytest

    def test_fine(): pass
    def test_wrong(): assert False
    def test_out(): pytest.skip("x")
    @pytest.fixture
    def broken(): raise ValueError
    def test_broken(broken): pass
"""


def run_pytest(*arguments: str) -> int:
    return int(pytest.main(["-q", "-p", "no:cacheprovider", *arguments]))


def test_the_report_tells_what_passed_and_failed(tmp_path):
    suite, results, report = (tmp_path / name for name in ("test_some.py", "results.xml", "report.md"))
    suite.write_text(textwrap.dedent(SUITE))
    in_suite = ["--rootdir", str(tmp_path), str(suite)]
    assert apart(run_pytest, *in_suite, f"--junitxml={results}", folder=tmp_path) == 1

    def lines(file):
        reporting = ["-k", "fine", "-p", "benchmarks.conftest", f"--report={report}", "--test-results", str(file)]
        assert apart(run_pytest, *in_suite, *reporting, folder=tmp_path) == 0
        return report.read_text().splitlines()

    assert lines(results)[2:] == [
        "tests: 1 passed, 1 failed, 1 errors, 1 skipped",
        "- failed: test_some::test_wrong",
        "- errors: test_some::test_broken",
    ]
    assert lines(tmp_path / "none.xml")[2].startswith("tests: no results, the run did not get to its end")
