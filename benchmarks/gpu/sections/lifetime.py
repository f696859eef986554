"""Graphs that come and go: 40 times recorded anew, and two generators in turn. Contexts must stay, and so must memory.

Since torch 2.13, destroying one graph clears the workspace that cuBLAS has on the stream of every other graph that was
captured there (pytorch 193402).
"""

from __future__ import annotations

import torch

from selfgen import ContextGenerator

from ..device import replays
from ..lab import Lab
from ..parts import TINY, Parts, random_parts

TABLE = "graph lifetime"
TIMES, TURNS = 40, 10


class LifetimeError(Exception):
    """Contexts have changed."""


def run(lab: Lab) -> None:
    shape = TINY if lab.rehearsal else TINY._replace(name="a small model", layers=4, hidden=256, intermediate=512)
    with replays(lab) as graphs:
        parts = random_parts(shape, lab.device, 4, torch.float32)
        seeds = range(3)
        want = [tokens(ContextGenerator(parts.model, token_budget=64, balance=8.0, cuda_graphs=False), parts, seed)
                for seed in seeds]  # fmt: skip
        one, other = (ContextGenerator(parts.model, token_budget=budget, balance=8.0) for budget in (64, 48))
        wrong, memory = 0, []
        times = 3 if lab.rehearsal else TIMES
        with graphs.counted():
            for _ in range(times):
                one.release()
                wrong += sum(not same(tokens(one, parts, seed), want[seed]) for seed in (0, 0, 0))
                memory.append(allocated(lab))
                lab.row(TABLE, {"what": "recorded anew"}, **found(wrong, graphs.count, memory))
        turns, again, memory = 2 if lab.rehearsal else TURNS, 0, []
        with graphs.counted():
            for turn in range(turns):
                for generator in (one, other):
                    if turn % 3 == 2:
                        generator.release()  # while the other one's graphs live
                    again += sum(not same(tokens(generator, parts, seed), want[seed]) for seed in seeds)
                memory.append(allocated(lab))
                lab.row(TABLE, {"what": "two generators in turn"}, **found(again, graphs.count, memory))
    if wrong or again:
        raise LifetimeError(f"{wrong + again} contexts were other ones than without graphs")


def tokens(generator: ContextGenerator, parts: Parts, seed: int) -> list[torch.Tensor]:
    prompts, references, ids = parts.columns()
    return generator.contexts(prompts, references, 0.5, seed=seed, sample_ids=ids).tokens


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, got, want))


def allocated(lab: Lab) -> float:
    return 0.0 if lab.rehearsal else torch.cuda.memory_allocated() / 2**20


def found(wrong: int, replayed: int, memory: list[float]) -> dict[str, float | int]:
    third = len(memory) // 3  # graphs of all sizes are there by then
    return {
        "times": len(memory),
        "wrong contexts": wrong,
        "replays": replayed,
        "MiB more at the end": memory[-1] - memory[third],
    }
