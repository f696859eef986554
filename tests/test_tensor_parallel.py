"""Models whose weights transformers' tensor parallelism splits over two processes: as in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers.contexts import assert_equal, batch
from helpers.processes import WORLD, in_ranks
from helpers.sharded import whole_state
from helpers.tensor import collectives, split_model, tensor_parallel_on_cpus
from helpers.training import Tokenizer, config, rows
from models import tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from selfgen import BSSTrainer, ContextGenerator
from selfgen.context.models import UnsupportedModelError
from selfgen.context.sharding import agreed, together_of

STEPS = 3
FAMILY = "qwen3"  # which has weights that each process has as a whole, though their gradients are partial


def saved(folder, family: str = FAMILY, **changes):
    """A tiny model, and the folder that it is saved to."""
    model = tiny_model(family, **changes)
    model.save_pretrained(folder / family)
    return model


def trainer_of(folder, model, evaluated=None, **changes):
    options = config(folder, **{"gradient_accumulation_steps": 2, "max_steps": STEPS, **changes})
    return BSSTrainer(model, options, train_dataset=rows(), eval_dataset=evaluated, processing_class=Tokenizer())


def train(folder, model, **changes):
    trainer = trainer_of(folder, model, **changes)
    ids, compute_loss = [], trainer.compute_loss

    def recorded(model, inputs, *args, **kwargs):
        if model.training:
            ids.append(inputs["input_ids"].clone())
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recorded
    trainer.train()
    return trainer, {
        "ids": ids,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "weights": whole_state(trainer.model),
    }


def assert_as_one(found, expected, tolerance: float = 1e-5):
    assert all(map(torch.equal, found["ids"], expected["ids"]))
    for name in ("loss", "grad_norm"):
        for one, other in zip(found["log"], expected["log"], strict=True):
            assert abs(one[name] / other[name] - 1) < tolerance, name
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).abs().max() <= 2 * tolerance * weight.abs().max(), name


def passes_of_one_process(rank, folder):
    whole, model = ContextGenerator(tiny_model(FAMILY)), split_model(folder / FAMILY, tp_size=WORLD)
    generator, (prompts, references, ids) = ContextGenerator(model), batch()
    options = {"self_prob": 0.5, "seed": 1, "sample_ids": ids}
    expected = whole.contexts(prompts, references, **options)
    assert_equal(generator.contexts(prompts, references, **options), expected)
    assert_equal(generator.contexts(prompts, references, **options, method="sequential"), expected)
    budgets = [None] * WORLD
    dist.all_gather_object(budgets, generator.budget)
    assert budgets[0] == budgets[1]
    answers, own = (one.answer(prompts[:3], max_new_tokens=5, seed=2) for one in (generator, whole))
    assert all(map(torch.equal, answers.tokens, own.tokens))

    with collectives() as counted:
        passes = generator.contexts(prompts, references, **options).stats.passes
    # In a pass the embeddings and two products of each layer are summed, and logits are gathered. In a generation two
    # sums more show that all have the same rows, and the same contexts.
    sums = passes * (2 * model.config.num_hidden_layers + 1) + 2
    assert counted == {"gloo:all_reduce": sums, "gloo:all_gather": passes}

    for spoiled in (
        lambda: generator.contexts(prompts[rank:], references[rank:], 0.5, seed=1, sample_ids=ids[rank:]),
        lambda: generator.contexts(prompts, references, 0.5, seed=rank, sample_ids=ids),
        lambda: generator.answer(prompts[rank:], max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="have different rows, settings or results"):
            spoiled()
    with pytest.raises(ValueError, match=r"sample_ids|unique"):
        generator.contexts(prompts, references, 0.5, seed=1, sample_ids=ids if rank else [7] * len(ids))

    def verdict():
        if rank == 1:
            raise UnsupportedModelError("it looks ahead")

    with pytest.raises(ValueError, match="it looks ahead"):
        agreed(together_of(model), verdict)
    assert_equal(generator.contexts(prompts, references, **options), expected)  # all are still in step


def training_of_one_process(rank, folder):
    tensor_parallel_on_cpus()
    expected = torch.load(folder / "expected.pt", weights_only=True)
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    model = split_model(folder / FAMILY, tp_size=WORLD)
    trainer, found = train(folder / "run", model, **options, evaluated=rows(5, seed=1))
    assert trainer._reuse_verified
    assert trainer._reuses
    assert trainer._answer_loss.lean
    assert_as_one(found, expected)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == pytest.approx(expected["evaluated"], rel=1e-5)

    checkpoint = folder / "run" / "checkpoint-2"
    whole = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert load_file(checkpoint / "model.safetensors").keys() == expected["weights"].keys()
    assert type(whole.model.embed_tokens.weight.data) is torch.Tensor
    again = split_model(folder / FAMILY, tp_size=WORLD)
    again = trainer_of(folder / "run", again, **options, evaluated=rows(5, seed=1))
    again.train(resume_from_checkpoint=str(checkpoint))
    for name, weight in whole_state(again.model).items():
        assert torch.equal(weight, found["weights"][name]), name


def two_processes(rank, folder):
    passes_of_one_process(rank, folder)
    training_of_one_process(rank, folder)


def test_as_in_one_process(tmp_path):
    model = saved(tmp_path)
    options = {"eval_strategy": "steps", "eval_steps": 1, "evaluated": rows(5, seed=1)}
    trainer, expected = train(tmp_path / "one", model, **options)
    expected["evaluated"] = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    torch.save(expected, tmp_path / "expected.pt")
    in_ranks(two_processes, tmp_path)
