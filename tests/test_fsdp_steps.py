"""What one step of training costs with weights that FSDP2 shards, and which dtypes it computes in."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers.processes import in_ranks
from helpers.sharded import Collectives, another_run, fsdp_on_cpus
from helpers.training import SMALL, distance, losses_of, make_trainer, rows
from helpers.versions import APART, REUSED_IN_SHARDS, asked_for, needs
from models import tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.scaling import collectives
from selfgen import ContextGenerator
from selfgen.data import Collator
from selfgen.training.mixing import step_seed
from selfgen.training.processes import meet

STEPS = 3
RUNS = {  # changes, the first step with passes, and how many more times tokens are counted
    "reused": ({}, 0, 0),
    "not reused": ({"reuse_passes": False}, 0, 0),
    "scheduled": ({"self_prob_warmup": 2}, 2, 0),
    "after_self": ({"loss_on": "after_self"}, 0, 1),
    "by micro-batch": ({"context_micro_batches": 1}, 0, 0),
}
GROUPS = 4  # of the model: two layers, the embedding, norm and head
apart = needs("accelerate", "1.15", "it gathers the embedding, and norm and head, with the rest of the model")


class ByStep(TrainerCallback):
    """The collectives of each step."""

    def __init__(self, mode: Collectives):
        self.mode, self.steps = mode, []

    def on_train_begin(self, *args, **kwargs):
        self.before = Counter(self.mode.counts)

    def on_step_end(self, *args, **kwargs):
        self.steps.append(dict(self.mode.counts - self.before))
        self.before = Counter(self.mode.counts)


def counted(trainer) -> list[dict[str, int]]:
    with Collectives() as mode:
        steps = ByStep(mode)
        trainer.add_callback(steps)
        if hasattr(trainer, "generator"):
            make = trainer.generator.contexts

            def contexts(*args, **kwargs):
                before = Counter(mode.counts)
                mixed = make(*args, **kwargs)
                assert not mode.counts - before
                return mixed

            trainer.generator.contexts = contexts
        trainer.train()
    return steps.steps


def plain_trainer(folder, **changes):
    names = ("token_budget", "balance", "max_length")
    given = {name: value for name, value in SMALL.items() if name not in names}
    args = TrainingArguments(
        str(folder), **given, max_steps=STEPS, remove_unused_columns=False, report_to=[], **asked_for(changes)
    )
    model_inputs = ("input_ids", "attention_mask", "labels")

    def collate(features):
        return {name: column for name, column in Collator(0)(features).items() if name in model_inputs}

    return Trainer(tiny_model("llama"), args, train_dataset=rows(), data_collator=collate)


def collectives_of_steps(rank, folder, names):
    """Without passes, a step takes those of plain fine-tuning; with them, fewer: weights are gathered once.

    The first one with passes agrees on whether they can be reused; what fits into memory is agreed on before.
    """
    fsdp_on_cpus()
    another_run()
    plain = counted(plain_trainer(folder / "plain", fsdp=True))
    others = [1, 3, 3]  # gathers of the Trainer: the number of tokens, and two of the line of the log before
    for one, more in zip(plain, others, strict=True):
        gathers, reduce_scatters, _ = collectives(GROUPS, 2)
        assert one["all_gather"] == gathers + more, plain
        assert one["reduce_scatter"] == reduce_scatters
    for name in names:
        another_run()
        changes, first, more = RUNS[name]
        found = counted(make_trainer(folder / name, fsdp=True, report_to=[], max_steps=STEPS, **changes))
        for step, (got, want) in enumerate(zip(found, plain, strict=True)):
            gathers, reduce_scatters, _ = collectives(GROUPS, 2, passes=step >= first)
            expected = Counter(want) | Counter()
            expected["all_gather"] = gathers + others[step] + more
            expected["reduce_scatter"] = reduce_scatters
            expected["all_reduce"] += step == first
            assert got == expected, (name, step, got, expected)


@apart
def test_collectives_and_bf16(tmp_path):
    in_ranks(steps_of_two_kinds, tmp_path)


def steps_of_two_kinds(rank, folder):
    collectives_of_steps(rank, folder, ["scheduled"])
    in_bf16(rank, folder)


@pytest.mark.skipif(APART, reason="part of test_collectives_and_bf16")
def test_bf16(tmp_path):
    in_ranks(in_bf16, tmp_path)


@apart
@pytest.mark.slow
def test_collectives_of_other_steps(tmp_path):
    in_ranks(collectives_of_steps, tmp_path, list(RUNS))


def in_bf16(rank, folder):
    """Weights in fp32 are updated; contexts and gradients are those of a copy of them in bf16."""
    fsdp_on_cpus()
    another_run()
    trainer = make_trainer(folder / "bf16", fsdp=True, bf16=True, max_steps=1, max_grad_norm=0.0, report_to=[])
    twin = tiny_model("llama").to(torch.bfloat16)
    make, copies, gradients = trainer.make_contexts, [], []

    def make_contexts(given, self_prob):
        mixed = make(given, self_prob)
        for own, other in zip(twin.parameters(), trainer.model.parameters(), strict=True):
            own.data.copy_(other)
        generator = ContextGenerator(twin, token_budget=32, balance=4)
        want = generator.contexts(
            [row.prompt for row in given],
            [row.reference for row in given],
            self_prob,
            seed=step_seed(trainer.args.seed, trainer.state.global_step),
            sample_ids=[row.sample_id for row in given],
        )
        assert all(map(torch.equal, mixed.tokens, want.tokens))
        copies.append({name: weight.clone() for name, weight in twin.state_dict().items()})
        return mixed

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.append({name: one.grad.full_tensor().clone() for name, one in model.named_parameters()})

    trainer.make_contexts = make_contexts
    trainer.add_callback(Gradients())
    seen = losses_of(trainer)
    assert {loss.dtype for loss, _ in seen} == {torch.float32}
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    assert {one.dtype for one in gradients[0].values()} == {torch.float32}
    assert trainer._reuse.verified
    assert trainer._reuse.on == REUSED_IN_SHARDS
    everyone = meet(say=[batch for _, batch in seen])
    for step, (copy, found) in enumerate(zip(copies, gradients, strict=True)):
        twin.load_state_dict(copy)
        batches = [batch for seen in everyone for batch in seen[2 * step : 2 * step + 2]]
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        want = {name: torch.zeros(one.shape) for name, one in twin.named_parameters()}
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
            twin(**inputs, num_items_in_batch=items).loss.backward()
            for name, one in twin.named_parameters():
                want[name] += one.grad.float()
            twin.zero_grad()
        assert distance(found, want) < 0.05  # rounding: FSDP2 and reuse add up in other orders
