"""Peak memory of an optimizer step: online BSS that reuses its passes against SFT with and without checkpointing.

    make bench            (or: pytest benchmarks/bench_memory.py)

The step of ``bench_step.py``, each kind in a process of its own, after a tiny step that allocates the optimizer's state
and does what is done once. The peak is what a user sees: all that the process holds on the CPU (VmHWM: weights,
gradients, AdamW's state, torch itself), or all tensors on a GPU. The steps of one kind alone:

    python -m benchmarks.bench_memory "BSS, 1 micro-batch at a time"
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tools.real_parts import DEVICE, ROOT, WARM_UPS

from .bench_step import MICRO_BATCHES, ROWS, Step

CHECKPOINTED, PLAIN = "SFT, checkpointing", "SFT"
ONE, ALL = "BSS, 1 micro-batch at a time", f"BSS, {MICRO_BATCHES} micro-batches at once"
SELF_PROB = 0.25
KINDS = {  # self-probability, checkpointing, context_micro_batches
    CHECKPOINTED: (0.0, True, None),
    PLAIN: (0.0, False, None),
    ONE: (SELF_PROB, False, 1),
    ALL: (SELF_PROB, False, None),
}
TARGETS = {ONE: 1.10, ALL: 1.30}  # of the peak / that of SFT with checkpointing
RESET = Path("/proc/self/clear_refs")
TINY_ROWS = [{"sample_id": row, "prompt_ids": [1, 2, 3, 4], "answer_ids": [5, 6, 7, 8]} for row in range(2)]


def reset_peak() -> None:
    if DEVICE == "cpu":
        RESET.write_text("5")  # man 5 proc
    else:
        torch.cuda.reset_peak_memory_stats()


def held_bytes(peak: bool) -> int:
    """Bytes that are held now, or were at most since the reset."""
    if DEVICE != "cpu":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(name))
    return int(kilobytes) * 1024


def measure(kind: str) -> dict[str, int]:
    """Bytes: held before the step, at its peak, and in weights, gradients and the optimizer's state."""
    self_prob, checkpointing, context_micro_batches = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        step = Step(folder, makes_contexts=self_prob > 0)
        step.trainer.args.context_micro_batches = context_micro_batches
        tiny = step.trainer.data_collator(TINY_ROWS)
        step.train([{name: column.to(DEVICE) for name, column in tiny.items()}], self_prob, checkpointing=checkpointing)

        def batches():
            return [{name: column.clone().to(DEVICE) for name, column in batch.items()} for batch in step.batches]

        for _ in range(WARM_UPS):
            step.train(batches(), self_prob, checkpointing=checkpointing)
        now = batches()
        before = held_bytes(peak=False)
        reset_peak()
        step.train(now, self_prob, checkpointing=checkpointing)
        peak = held_bytes(peak=True)
    parameters = list(step.trainer.model.parameters())
    state = [value for values in step.trainer.optimizer.state.values() for value in values.values()]
    fixed = sum(tensor.numel() * tensor.element_size() for tensor in [*parameters, *parameters, *state])
    return {"before": before, "peak": peak, "fixed": fixed}


def in_a_process(kind: str) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.bench_memory", kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(DEVICE == "cpu" and not RESET.exists(), reason="the peak is read from Linux's /proc")
def test_memory(benchmark, report):
    found: dict[str, dict[str, int]] = {}
    benchmark.pedantic(lambda: found.update({kind: in_a_process(kind) for kind in KINDS}), rounds=1)
    rows = [
        {
            "step": kind,
            "peak, MiB": held["peak"] >> 20,
            f"/ {CHECKPOINTED}": round(held["peak"] / found[CHECKPOINTED]["peak"], 3),
            "before the step, MiB": held["before"] >> 20,
            "peak beyond weights, gradients and AdamW, MiB": (held["peak"] - held["fixed"]) >> 20,
        }
        for kind, held in found.items()
    ]
    benchmark.extra_info.update(rows=rows)
    report(f"peak memory of an optimizer step, {MICRO_BATCHES} x {ROWS} rows, p = {SELF_PROB}", rows)
    for kind, target in TARGETS.items():
        assert found[kind]["peak"] / found[CHECKPOINTED]["peak"] <= target


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
