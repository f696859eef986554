"""Contexts pass by pass: how long a pass takes, how much of it is its graph, and which passes were graphs at all."""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager, nullcontext

import torch

from selfgen import ContextGenerator

from ..device import Replays, replays
from ..lab import Lab
from ..parts import Parts, parts_of

ROWS = 8
SELF_PROBS = (0.25, 1.0, 0.5, 0.1)
ROUNDS = 5
WARM_UPS = 3  # runs of a seed: as they are, recorded, replayed


def run(lab: Lab) -> None:
    with replays(lab) as graphs:
        for rows in (2,) if lab.rehearsal else (ROWS, 32):
            for precision in ("bf16 weights", "autocast", "fp32"):
                dtype = torch.bfloat16 if precision == "bf16 weights" else torch.float32
                parts = parts_of(lab.device, rows, dtype, rehearsal=lab.rehearsal)
                casts = torch.autocast(lab.device, torch.bfloat16) if precision == "autocast" else nullcontext()
                measure(lab, parts, precision, rows, casts, graphs)
                if not lab.rehearsal:
                    del parts
                    torch.cuda.empty_cache()


def measure(lab: Lab, parts: Parts, precision: str, rows: int, casts: AbstractContextManager, graphs: Replays) -> None:
    columns = parts.columns(rows)
    small = {"token_budget": 16, "balance": 2.0} if lab.rehearsal else {}
    generator = ContextGenerator(parts.model, **small)  # type: ignore[arg-type]
    prompts, references, ids = columns

    def contexts(self_prob: float):
        return generator.contexts(prompts, references, self_prob, seed=0, sample_ids=ids).stats

    with casts:
        _ = generator.budget
        for self_prob in SELF_PROBS:
            for _ in range(WARM_UPS):
                contexts(self_prob)
            seconds, device = [], []
            for _ in range(2 if lab.rehearsal else ROUNDS):
                seconds.append(contexts(self_prob).seconds)
            for _ in range(2):
                with graphs.counted():
                    stats = contexts(self_prob)
                device.append(graphs.seconds)
            wall, graph = statistics.median(seconds), min(device)
            lab.row(
                f"contexts of {rows} rows, {parts.about}, token budget {generator.budget.tokens}",
                {"precision": precision, "p": self_prob},
                **{
                    "contexts, ms": wall * 1e3,
                    "passes": stats.passes,
                    "pass, ms": wall / max(1, stats.passes) * 1e3,
                    "graph, ms": graph / graphs.count * 1e3 if graphs.count else None,
                    "outside, ms": (wall - graph) / max(1, stats.passes) * 1e3,
                    "captured": stats.captured,
                    "replayed": stats.replayed,
                    "eager": stats.passes - stats.captured - stats.replayed,
                    "padding": stats.padding,
                    "tokens computed": stats.tokens_computed,
                    "agreement": stats.agreement,
                },
            )
    generator.release()
