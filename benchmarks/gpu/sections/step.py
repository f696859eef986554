"""The question that all else is for: what a BSS step takes over one of SFT, with and without checkpointing.

Rows are written after every round, as medians of the rounds so far: an early end loses precision, not the answer.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from typing import Any

import torch

from ...bench_step import CHECKPOINTED, MICRO_BATCHES, PLAIN, ROWS, Step
from ..lab import Lab
from ..parts import Parts, parts_of

SELF_PROBS = (0.25, 0.5, 0.1, 1.0)
MOST_ROUNDS, WARM_UPS = 15, 4


def run(lab: Lab) -> None:
    rows = 4 if lab.rehearsal else MICRO_BATCHES * ROWS
    compare_steps(lab, parts_of(lab.device, rows, rehearsal=lab.rehearsal), SELF_PROBS)


def compare_steps(lab: Lab, parts: Parts, self_probs: tuple[float, ...], *, most_rounds: int = MOST_ROUNDS) -> None:
    """Alternate steps of all kinds until the time is up."""
    options: dict[str, Any] = {}
    if lab.rehearsal:
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "token_budget": 16, "balance": 2}
        options |= {"disable_tqdm": True, "max_length": 64}
        most_rounds = 1
    with tempfile.TemporaryDirectory() as folder:
        step = Step(folder, parts=(parts.model, parts.tokenizer, parts.rows), **options)
        sides = {CHECKPOINTED: partial(step, 0.0, checkpointing=True), PLAIN: partial(step, 0.0)}
        sides |= {f"BSS, p = {p}": partial(step, p) for p in self_probs}
        step(max(self_probs))  # the optimizer's state, the check of reuse
        for _ in range(1 if lab.rehearsal else WARM_UPS):
            for side in sides.values():
                side()
            step.trainer.state.global_step += 1  # which the seed depends on
        found: dict[str, list] = {name: [] for name in sides}
        for done in range(1, most_rounds + 1):
            for name, side in sides.items():
                found[name].append(side())
            step.trainer.state.global_step += 1
            write(lab, f"optimizer step of {len(parts.rows)} rows, {parts.about}", self_probs, found, done)
            if lab.left < 1.5 * sum(runs[-1][0] for runs in found.values()) + 2:
                break
    if not lab.rehearsal:
        lab.note(f"Peak memory of this process: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB.")


def write(lab: Lab, table: str, self_probs: tuple[float, ...], found: dict[str, list], rounds: int) -> None:
    seconds = {name: statistics.median(run[0] for run in runs) for name, runs in found.items()}
    for p in self_probs:
        ours, runs = seconds[f"BSS, p = {p}"], found[f"BSS, p = {p}"]
        contexts, stats = statistics.median(run[1] for run in runs), runs[-1][2]
        lab.row(
            table,
            {"p": p},
            **{
                f"BSS / {CHECKPOINTED}": ours / seconds[CHECKPOINTED],
                f"BSS / {PLAIN}": ours / seconds[PLAIN],
                "BSS, ms": ours * 1e3,
                "of it contexts, ms": contexts * 1e3,
                f"{CHECKPOINTED}, ms": seconds[CHECKPOINTED] * 1e3,
                f"{PLAIN}, ms": seconds[PLAIN] * 1e3,
                "passes": stats.passes,
                "captured": stats.captured,
                "replayed": stats.replayed,
                "padding": stats.padding,
                "agreement": stats.agreement,
                "rounds": rounds,
            },
        )
