"""Contexts in two processes: those of the definition, whatever budget each process has."""

from __future__ import annotations

import torch
from helpers.contexts import assert_equal
from helpers.processes import in_ranks
from helpers.training import losses_of, make_trainer
from models import tiny_model

from selfgen import ContextGenerator
from selfgen.context import MixedContext
from selfgen.data import rows_of
from selfgen.training.mixing import step_seed

BUDGETS = 3, 200


def contexts_of_a_rank(rank, folder):
    model = tiny_model("llama")
    trainer = make_trainer(folder / str(rank), model=model, learning_rate=0.0, token_budget=BUDGETS[rank])
    assert trainer.args.world_size == 2
    seen = losses_of(trainer)
    assert len(seen) == 8  # four steps of two micro-batches
    oracle = ContextGenerator(tiny_model("llama"))
    for number, (_, batch) in enumerate(seen):
        given = rows_of(batch)
        want = oracle.contexts(
            [row.prompt for row in given],
            [row.labels for row in given],
            trainer.args.self_prob,
            seed=step_seed(trainer.args.seed, number // 2),
            sample_ids=[row.sample_id for row in given],
            method="sequential",
        )
        starts, lengths = batch["prompt_length"].tolist(), batch["answer_length"].tolist()
        trained_on = [
            ids[start : start + length] for ids, start, length in zip(batch["input_ids"], starts, lengths, strict=True)
        ]
        assert_equal(MixedContext(trained_on, want.is_self, want.stats), want)
        assert any(torch.cat(want.is_self))


def test_contexts_of_ranks_with_other_budgets(tmp_path):
    in_ranks(contexts_of_a_rank, tmp_path)
