"""A whole optimizer step: online BSS that reuses its passes against SFT with and without checkpointing, alternating.

    make bench            (or: pytest benchmarks/bench_step.py)

SmolLM2-135M-Instruct in fp32 (on a GPU under bf16 autocast), GSM8K train rows from 1000 on, effective batch 4 x 8,
AdamW at a learning rate of 0, so that all steps see the same weights. Every side is ``BSSTrainer``'s own step; SFT is
p = 0, where it is the Trainer's.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from selfgen import BSSConfig, BSSTrainer
from selfgen.context import ContextStats
from selfgen.data import tokenize_rows
from tools.real_parts import DEVICE, WARM_UPS, gsm8k, load_smollm2

ROUNDS, MICRO_BATCHES, ROWS = 3, 4, 8
if DEVICE != "cpu":
    ROUNDS = 9
CHECKPOINTED, PLAIN = "SFT, checkpointing", "SFT"
TARGETS = {0.1: 1.05, 0.25: 1.10, 0.5: 1.35, 1.0: None}  # of BSS / SFT with checkpointing
PLAIN_TARGETS = {0.25: 1.20}  # of BSS / SFT without


def smollm2_and_gsm8k() -> tuple[PreTrainedModel, Any, Dataset]:
    model, tokenizer = load_smollm2()
    rows, _ = tokenize_rows(gsm8k("train", 1000, 1000 + MICRO_BATCHES * ROWS), tokenizer, max_length=1024)
    return model, tokenizer, rows


class Step:
    """Optimizer steps over the same rows with the same weights.

    ``parts`` are a model, its tokenizer and tokenized rows, by default SmolLM2 and GSM8K's; ``options`` are those of
    ``BSSConfig``.
    """

    def __init__(
        self,
        folder: str,
        *,
        parts: tuple[PreTrainedModel, Any, Dataset] | None = None,
        makes_contexts: bool = True,
        **options: Any,
    ) -> None:
        model, tokenizer, rows = parts or smollm2_and_gsm8k()
        defaults: dict[str, Any] = {
            "per_device_train_batch_size": ROWS,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "report_to": [],
        }
        on_cpu = DEVICE == "cpu"
        defaults |= {"self_prob": 0.25}  # or p would follow the training
        defaults |= {"learning_rate": 0.0, "use_cpu": on_cpu, "bf16": not on_cpu}
        arguments = BSSConfig(folder, **{**defaults, **options})
        self.trainer = BSSTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
        self.trainer.model = self.trainer.accelerator.prepare_model(self.trainer.model)  # autocast, as in `train`
        self.trainer.create_optimizer()
        self.loss = self.trainer._answer_loss
        size = arguments.per_device_train_batch_size
        self.batches = [
            self.trainer.data_collator([*rows.select(range(begin, min(begin + size, len(rows))))])
            for begin in range(0, len(rows), size)
        ]
        if makes_contexts:
            _ = self.trainer.generator.budget.tokens  # measured before the clock starts

    def __call__(self, self_prob: float, *, checkpointing: bool = False) -> tuple[float, float, ContextStats]:
        """Seconds of the step, seconds of them spent on contexts, and what these were like."""
        trainer = self.trainer
        batches = [{name: column.clone().to(DEVICE) for name, column in batch.items()} for batch in self.batches]
        started = time.perf_counter()
        self.train(batches, self_prob, checkpointing=checkpointing)
        seconds = time.perf_counter() - started
        (stats,) = trainer.meter.stats
        contexts = trainer.meter.context_seconds
        trainer.meter.flush()
        return seconds, contexts, stats

    def train(self, batches: list[dict[str, torch.Tensor]], self_prob: float, *, checkpointing: bool = False) -> None:
        """One optimizer step over ``batches``, done on the device when this returns."""
        trainer, model = self.trainer, self.trainer.model
        trainer.args.self_prob = self_prob
        trainer.state.max_steps = trainer.state.global_step + 1  # or nothing would be left to train
        trainer._answer_loss = self.loss if self_prob > 0 else None  # SFT has the Trainer's
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # the older name
        if checkpointing:
            getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(model, f"{kind}_checkpointing_disable")()
        batches, num_items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
        for batch in batches:
            trainer.training_step(model, batch, num_items)
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        if DEVICE != "cpu":
            torch.accelerator.synchronize()


@pytest.fixture(scope="module")
def step(tmp_path_factory) -> Step:
    return Step(str(tmp_path_factory.mktemp("step")))


def test_step(benchmark, step, report):
    """All sides in one alternation; the clock of pytest-benchmark is on BSS at p = 0.25."""
    sides = {
        **{f"BSS, p = {p}": partial(step, p) for p in TARGETS},
        CHECKPOINTED: partial(step, 0.0, checkpointing=True),
        PLAIN: partial(step, 0.0),
    }
    runs: dict[str, list[tuple[float, float, ContextStats]]] = {name: [] for name in sides}
    step(max(TARGETS))  # the optimizer's state, the check of reuse
    for _ in range(3 * WARM_UPS):  # each with other contexts, as in training
        for p in TARGETS:
            step(p)
        step.trainer.state.global_step += 1  # which the seed depends on
    timed = "BSS, p = 0.25"

    def run(name: str) -> None:
        runs[name].append(sides[name]())

    def other_sides() -> None:
        for name in sides:
            if name != timed:
                run(name)
        if DEVICE != "cpu":
            step.trainer.state.global_step += 1

    benchmark.pedantic(run, args=(timed,), setup=other_sides, rounds=ROUNDS)
    seconds = {name: statistics.median(run[0] for run in side) for name, side in runs.items()}
    rows: list[dict[str, float | None]] = []
    ratios: dict[str, float] = {}
    missed: list[str] = []
    for p in TARGETS:
        ours = f"BSS, p = {p}"
        stats = runs[ours][0][2]
        row: dict[str, float | None] = {
            "p": p,
            "BSS, s": round(seconds[ours], 2),
            "of it contexts, s": round(statistics.median(run[1] for run in runs[ours]), 2),
            **{f"{name}, s": round(seconds[name], 2) for name in (CHECKPOINTED, PLAIN)},
        }
        for name, targets in ((CHECKPOINTED, TARGETS), (PLAIN, PLAIN_TARGETS)):
            ratio, target = seconds[ours] / seconds[name], targets.get(p)
            row |= {f"BSS / {name}": round(ratio, 3), f"target / {name}": target}
            ratios[f"{name} / p = {p}"] = 1 / ratio
            if target is not None and ratio > target:
                missed.append(f"p = {p}: BSS / {name} is {ratio:.3f}, target {target}")
        row |= {
            "passes": stats.passes,
            "computed per token": round(stats.computed_per_context_token, 2),
            "agreement": round(stats.agreement, 2),
        }
        rows.append(row)
    benchmark.extra_info.update(steps=rows, ratios=ratios)
    report(f"optimizer step, {MICRO_BATCHES} x {ROWS} rows, medians of {ROUNDS}", rows)
    assert not missed
