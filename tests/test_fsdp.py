"""Training with weights that FSDP2 shards: as in one process with the same global batch."""

from __future__ import annotations

import pytest
import torch
from helpers.contexts import assert_equal
from helpers.processes import WORLD, in_ranks
from helpers.runs import ALL, CASES, EVEN, FAST, compare, make_expected, train_on, under_fsdp2
from helpers.sharded import fsdp_on_cpus, whole_state
from helpers.versions import FSDP2_ONCE, needs
from models import tiny_model
from torch.distributed.tensor import DTensor

from selfgen import ContextGenerator, whole_weights


def compared(rank, folder, names, world, engine):
    fsdp_on_cpus()
    compare(rank, folder, names, world, fsdp=True, **engine)


def check(folder, names, world=WORLD, **engine):
    names = under_fsdp2(names)
    make_expected(folder, names, world)
    in_ranks(compared, folder, names, world, engine, world=world)


def test_sharded_by_accelerate(tmp_path):
    check(tmp_path, FAST)


def refused(rank, folder):
    """Other weights than the model's would be trained, or a run would go on with an optimizer that knows nothing."""
    fsdp_on_cpus()
    for name in ("evaluated", "twice"):
        case = CASES[name]
        trainer = case.trainer(folder / name, 1, fsdp=True)
        (case.before or train_on)(trainer)
        with pytest.raises(ValueError, match=r"would train other weights .*: install accelerate 1\.13 or later"):
            trainer.train()
    with pytest.raises(ValueError, match=r"no checkpoints .* accelerate 1\.13 or later, or give save_strategy=no"):
        CASES["best"].trainer(folder / "best", 1, fsdp=True)
    with pytest.raises(ValueError, match=r"loses the optimizer's state .*: install accelerate 1\.13 or later"):
        CASES["plain"].trainer(folder / "resumed", 1, fsdp=True)._engine.check_first(resumes=True)


@pytest.mark.skipif(not FSDP2_ONCE, reason="accelerate 1.13 or later refuses nothing of it")
def test_what_an_old_accelerate_can_not_do(tmp_path):
    in_ranks(refused, tmp_path)


@pytest.mark.slow
def test_all_sharded_by_accelerate(tmp_path):
    check(tmp_path, ALL)


@pytest.mark.slow
def test_four_processes(tmp_path):
    check(tmp_path, EVEN, world=4)


@needs("accelerate", "1.10", "ParallelismConfig")
@pytest.mark.slow
def test_replicas_of_shards(tmp_path):
    """HSDP: two groups of two processes."""
    from accelerate import ParallelismConfig

    check(tmp_path, EVEN, world=4, parallelism_config=ParallelismConfig(dp_replicate_size=2, dp_shard_size=2))


@pytest.mark.slow
def test_checkpointed_by_accelerate(tmp_path):
    check(tmp_path, ("plain", "lora", "rac"), fsdp_config={"activation_checkpointing": True})


@pytest.mark.slow
def test_compiled(tmp_path):
    """The training forward is; passes are not, and can't be reused."""
    check(tmp_path, ("not reused",), torch_compile=True, torch_compile_backend="eager")


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
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.5), whole_state(model)
    with whole_weights(model, keep=True):  # but no forward follows
        pass
    optimizer.step()
    with whole_weights(model):
        assert not any(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


class Broken(Exception):
    pass


def broken_off(rank, folder):
    """An exception of one's own in the middle of a generation: weights are sharded again, and training goes on."""
    from torch.distributed.fsdp import fully_shard

    model, whole = tiny_model("llama"), tiny_model("llama")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    generator = ContextGenerator(model)
    rows = {"prompts": [[3, 4, 5]], "references": [[5, 6, 7, 8]], "self_prob": 0.7, "seed": 1, "sample_ids": [rank]}
    inputs = torch.arange(3, 7)[None]
    for error in (Broken, KeyboardInterrupt):

        def fails(*args, error=error, **kwargs):
            raise error

        handle = model.model.layers[1].register_forward_pre_hook(fails)
        with pytest.raises(error), whole_weights(model, keep=True):
            generator.contexts(**rows)
        handle.remove()
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
        with whole_weights(model, keep=True):
            generator.contexts(**rows)
        loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        want = whole(input_ids=inputs, labels=inputs).loss
        want.backward()
        assert torch.equal(loss, want)
        for own, other in zip(model.parameters(), whole.parameters(), strict=True):
            assert (own.grad.full_tensor() - other.grad).abs().max() <= 1e-5 * other.grad.abs().max()


def test_broken_off_in_a_loop_of_ones_own(tmp_path):
    in_ranks(broken_off, tmp_path)


@pytest.mark.slow  # test_broken_off_in_a_loop_of_ones_own is the fast one of the kind
def test_sharded_by_torch_in_a_loop_of_ones_own(tmp_path):
    in_ranks(sharded_by_torch, tmp_path)
