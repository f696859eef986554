"""Weights that stay sharded while contexts are made: every pass gathers them, and all processes run equally many."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from helpers.contexts import assert_equal
from helpers.processes import in_ranks
from models import tiny_model
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from selfgen import ContextGenerator, lockstep

ROWS = {"prompts": [[3, 4, 5], [6, 7]], "references": [[5, 6, 7, 8, 9, 10, 11], [4, 5, 6]], "sample_ids": [0, 1]}


def sharded(family: str = "llama"):
    model = tiny_model(family)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def rows_of(rank: int) -> dict:
    return {name: column[rank:] for name, column in ROWS.items()}


class Calls(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.count[func._schema.name.removeprefix("c10d::").strip("_")] += 1
        return func(*args, **(kwargs or {}))


def each_its_own(rank, folder):
    model, whole = sharded(), ContextGenerator(tiny_model("llama"))
    generator = ContextGenerator(model, token_budget=6, balance=2)
    for seed in range(3):
        options = {**rows_of(rank), "self_prob": 0.7, "seed": seed}
        with Calls() as calls, lockstep(model) as steps:
            found = generator.contexts(**options)
        assert_equal(found, whole.contexts(**options, method="sequential"))
        if seed:  # what the model is like is known, so that all forwards are passes
            once = 1  # embedding, norm and head
            gathers = len(model.model.layers) * steps.forwards
            assert calls.count == {"allreduce": steps.forwards + 1, "allgather_base": once + gathers}, calls.count
            assert steps.gathers == gathers
            most = torch.tensor(found.stats.passes)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            assert steps.forwards == most
        model(input_ids=torch.arange(3, 7)[None], labels=torch.arange(3, 7)[None]).loss.backward()


def test_each_process_makes_its_own_contexts(tmp_path):
    in_ranks(each_its_own, tmp_path)
