"""Models whose weights transformers' tensor parallelism splits over two processes: as in one process."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
import torch.distributed as dist
from helpers.cli import ROOT, flags, refused, save_model
from helpers.contexts import assert_equal, batch
from helpers.data import ROWS, write_jsonl
from helpers.processes import WORLD, in_ranks
from helpers.sharded import whole_state
from helpers.tensor import collectives, split_model, tensor_parallel_on_cpus
from helpers.training import Tokenizer, config, rows
from models import tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from selfgen import BSSTrainer, ContextGenerator
from selfgen.cli import main
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


def run_example(rank, folder):
    tensor_parallel_on_cpus()
    script = (ROOT / "examples/launch/tp.sh").read_text().replace("\\\n", " ").splitlines()[-1]
    before, after = script.split(" -m selfgen ")
    assert before == f"torchrun --nproc-per-node {WORLD}"
    small = {"--model": folder / "model", "--dataset": folder / "rows.jsonl", "--dataset_config": "default",
             "--max_steps": 2, "--max_length": 64, "--output_dir": folder / "run"}  # fmt: skip
    arguments = shlex.split(after)
    for name, value in small.items():
        if name in arguments:
            arguments[arguments.index(name) + 1] = str(value)
        else:
            arguments += [name, str(value)]
    assert main([*arguments, "--use_cpu", "yes", "--report_to", "none"]) == 0


def test_example(tmp_path):
    save_model(tmp_path / "model", num_key_value_heads=2)
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    in_ranks(run_example, tmp_path)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("command", ["generate", "contexts", "eval"])
def test_other_commands_know_where_the_options_go(command, capsys):
    output = "--output-file" if command == "generate" else "--output-dir"
    arguments = [command, "--model", "m", "--dataset", "d", output, "o", "--tp-size", "2"]
    assert "which goes with selfgen train" in refused(arguments, capsys)


def test_more_processes_are_asked_for_than_were_started(tmp_path, capsys):
    arguments = flags({"model": tmp_path, "dataset": tmp_path, "output-dir": tmp_path / "run", "tp-size": 2})
    assert "torchrun --nproc-per-node 2" in refused(["train", *arguments], capsys)
