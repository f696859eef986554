"""Training with weights that FSDP2 shards: as in one process with the same global batch."""

from __future__ import annotations

import torch
from helpers.contexts import assert_equal
from helpers.processes import WORLD, in_ranks
from helpers.sharded import fsdp_on_cpus, whole_state
from helpers.training import losses_of, make_trainer
from models import tiny_model

from selfgen import ContextGenerator, whole_weights

STEPS = 3


def train(folder, micro_batches, **changes):
    trainer = make_trainer(folder, gradient_accumulation_steps=micro_batches, max_steps=STEPS, **changes)
    seen = losses_of(trainer)
    return trainer, {
        "ids": [batch["input_ids"] for _, batch in seen],
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "weights": whole_state(trainer.model),
    }


def sharded_as_one(rank, folder):
    fsdp_on_cpus()
    trainer, found = train(folder / "run", 2, fsdp=True)
    assert trainer._reuse_verified
    assert not trainer._reuse_open
    expected = torch.load(folder / "expected.pt", weights_only=True)
    assert all(map(torch.equal, found["ids"], expected["ids"][rank::WORLD]))
    for name, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5)):
        for one, other in zip(found["log"], expected["log"], strict=True):
            assert abs(one[name] / other[name] - 1) < tolerance
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).abs().max() <= 1e-5 * weight.abs().max()


def test_sharded_by_accelerate(tmp_path):
    _, expected = train(tmp_path / "one", 2 * WORLD)
    torch.save(expected, tmp_path / "expected.pt")
    in_ranks(sharded_as_one, tmp_path)


def sharded_by_torch(rank, folder):
    from torch.distributed.fsdp import fully_shard

    model, whole = tiny_model("llama"), ContextGenerator(tiny_model("llama"))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    generator = ContextGenerator(model)
    rows = {"prompts": [[3, 4, 5], [6, 7]][rank:], "references": [[5, 6, 7, 8, 9, 10, 11], [4, 5, 6]][rank:]}
    for seed in range(2):
        options = {**rows, "self_prob": 0.7, "seed": seed, "sample_ids": range(rank, WORLD)}
        with whole_weights(model, keep=True):
            found = generator.contexts(**options)
        assert_equal(found, whole.contexts(**options, method="sequential"))
        model(input_ids=torch.arange(3, 7)[None], labels=torch.arange(3, 7)[None]).loss.backward()


def test_sharded_by_torch_in_a_loop_of_ones_own(tmp_path):
    in_ranks(sharded_by_torch, tmp_path)
