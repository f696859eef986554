"""Shared set-up: no hub, one thread per worker, two hypothesis profiles, the tiny and the real model."""

from __future__ import annotations

import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several, and what it starts
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import pytest
import torch
from _pytest.capture import CaptureIO
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(min(2, torch.get_num_threads()))  # the tiny models are slower on more

# `make test` draws the same few examples every time, and `pytest -m slow` more of them, in the same tests;
# HYPOTHESIS_PROFILE=explore draws new ones, and yet more.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("fixed", derandomize=True, max_examples=16, database=None, **_COMMON)
settings.register_profile("thorough", settings.get_profile("fixed"), max_examples=40)
settings.register_profile("explore", max_examples=300, **_COMMON)
# A failure is enough, however long its example is: for `python -m tools.planted_faults`.
settings.register_profile("unshrunk", settings.get_profile("thorough"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def wants_slow(config):
    return config.option.markexpr == "slow"


def pytest_configure(config):
    if wants_slow(config) and "HYPOTHESIS_PROFILE" not in os.environ:
        settings.load_profile("thorough")


# What tests that share one of these in their names set up takes seconds: one worker does it, for all of them.
TOGETHER = ("smollm2", "test_gpu_run.py", "test_cpu_levels.py", "test_triton_launch.py", "test_triton_compile.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give a worker that is idle the next test, or the next that belong together."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return next((name for name in TOGETHER if name in nodeid), nodeid)

    return Scheduling(config, log)


BETWEEN = pytest.StashKey[bool]()
"""Of a case that is neither the first nor the last one of its test."""


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    from helpers.fast import leave_to_slow

    def tests():
        cases = {}
        for item in items:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
        return cases.values()

    for cases in () if torch.cuda.is_available() else tests():
        leave_to_slow(cases)
    for item in items if wants_slow(config) else ():
        if getattr(item.function, "is_hypothesis_test", False):  # with more examples than in the fast suite
            item.add_marker("slow")
    yield  # which leaves out what is slow
    for first_to_last in tests():
        for item in first_to_last[1:-1]:
            item.stash[BETWEEN] = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Measure no coverage in cases between the first and the last one: tracing takes as long as the tests."""
    trace = sys.gettrace()
    if BETWEEN in item.stash:  # no_cover of pytest-cov would wrap os._exit once more at each test
        sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(trace)


def pytest_collection_finish():
    """Collect no garbage among what was imported: every Trainer asks for a collection, which took half of its time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(scope="session")
def smollm2_folder():
    """The checkpoint of SmolLM2-135M-Instruct with its tokenizer."""
    from tools.real_parts import smollm2_path

    return smollm2_path()


@pytest.fixture(scope="session")
def smollm2(smollm2_folder):
    """(model, tokenizer): SmolLM2-135M-Instruct in fp32."""
    from tools.real_parts import load_smollm2

    return load_smollm2()


@pytest.fixture(scope="session")
def math_rows(smollm2):
    """Sixteen tokenized rows of GSM8K, or of gsm_symbolic where GSM8K is not at hand: (prompts, references, ids)."""
    from selfgen.data import tokenize_rows
    from tools.real_parts import gsm8k, gsm_symbolic, has_gsm8k

    if has_gsm8k():  # the tests ask no hub
        rows = gsm8k("train", 1000, 1016)
    else:
        rows = gsm_symbolic(16, seed=0).add_column("sample_id", list(range(16)))
    rows, _ = tokenize_rows(rows, smollm2[1], max_length=1024)
    return list(rows["prompt_ids"]), list(rows["answer_ids"]), list(rows["sample_id"])


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A checkpoint of a tiny Llama and its tokenizer, for the command line; who changes it makes a copy."""
    from helpers.cli import save_model

    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture
def terminal(monkeypatch):
    """What is captured looks like a terminal, where there are progress bars."""
    monkeypatch.setattr(CaptureIO, "isatty", lambda _: True, raising=False)


@pytest.fixture
def arguments(model_dir, tmp_path):
    """Arguments of ``selfgen train`` on sixteen rows."""
    from helpers.data import ROWS, write_jsonl

    file = tmp_path / "train.jsonl"
    write_jsonl(file, ROWS * 8)
    return {
        "model": str(model_dir),
        "dataset": str(file),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "max_length": 32,
        "logging_steps": 1,
        "token_budget": 16,
        "balance": 2,
        "use_cpu": True,
        "report": False,  # it takes longer than these runs
        "gap_rows": 0,
    }
