"""Models whose weights transformers' tensor parallelism splits over two processes: as in one process."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from helpers.cli import ROOT, flags, refused, save_model
from helpers.contexts import assert_equal, batch
from helpers.data import ROWS, make_tokenizer, write_jsonl
from helpers.processes import WORLD, in_ranks
from helpers.sharded import whole_state
from helpers.tensor import collectives, split_model, tensor_parallel_on_cpus
from helpers.training import Tokenizer, config, make_rac_trainer, rows
from helpers.versions import needs
from models import CONFIGS, VOCAB, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from selfgen import BASHTrainer, BSSTrainer, ContextGenerator
from selfgen.cli import main
from selfgen.context.models import UnsupportedModelError
from selfgen.context.sharding import agreed, together_of
from selfgen.stored_contexts import write_contexts
from selfgen.training import parallelism

needs_plans = needs("transformers", "5.23", "before, it kept the parts of split weights as plain tensors")
STEPS = 3
TEXTS = [{"prompt": "a b" if row % 3 else "", "completion": "c d e f"[: 1 + 2 * (row % 4)]} for row in range(40)]
FAMILY = "qwen3"  # which has weights that each process has as a whole, though their gradients are partial


def saved(folder, family: str = FAMILY, **changes):
    """A tiny model, and the folder that it is saved to."""
    model = tiny_model(family, **changes)
    model.save_pretrained(folder / family)
    return model


def trainer_of(folder, model, evaluated=None, **changes):
    # With a small epsilon, Adam makes steps of rounding where a gradient is near zero.
    defaults = {"gradient_accumulation_steps": 2, "max_steps": STEPS, "adam_epsilon": 1e-3}
    options = config(folder, **{**defaults, **changes})
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
    with pytest.raises(ValueError, match="on accelerators only: leave use_cpu out"):
        trainer_of(folder / "never", split_model(folder / FAMILY, tp_size=WORLD))
    tensor_parallel_on_cpus()
    expected = torch.load(folder / "expected.pt", weights_only=True)
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    model = split_model(folder / FAMILY, tp_size=WORLD)
    trainer, found = train(folder / "run", model, **options, evaluated=rows(5, seed=1))
    assert trainer._reuse.verified
    assert trainer._reuse.on
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


@needs_plans
def test_as_in_one_process(tmp_path):
    model = saved(tmp_path)
    options = {"eval_strategy": "steps", "eval_steps": 1, "evaluated": rows(5, seed=1)}
    trainer, expected = train(tmp_path / "one", model, **options)
    expected["evaluated"] = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    torch.save(expected, tmp_path / "expected.pt")
    in_ranks(two_processes, tmp_path)


def trainer_of_kind(kind: str, folder, model):
    """A trainer of each method and loss."""
    output, half = folder / f"{kind}-{is_split(model)}", {"learning_rate": 1e-3, "max_steps": 2}
    if kind == "rac":
        return make_rac_trainer(output, model=model, **half)
    if kind == "rac on mixed answers":
        return make_rac_trainer(output, model=model, own_answer="mixed", self_prob=0.5, direct_weight=0.5, **half)
    if kind == "bash":
        return BASHTrainer(
            model, config(output, **half), train_dataset=folder / "contexts", processing_class=Tokenizer()
        )
    if kind == "stream":
        texts = Dataset.from_list(TEXTS).to_iterable_dataset(num_shards=2)
        options = config(output, max_steps=3, report_to=[])
        return BSSTrainer(model, options, train_dataset=texts, processing_class=make_tokenizer(size=VOCAB))
    return trainer_of(output, model, **{
        "on self tokens, smoothed": {"loss_on": "after_self", "label_smoothing_factor": 0.1},
        "near another model": {
            "kl_weight": 0.3, "kl_model": str(folder / "other" / FAMILY), "save_strategy": "steps", "save_steps": 3
        },
        "near another model, with logits": {
            "kl_weight": 0.3, "kl_model": str(folder / "other" / FAMILY), "lean_loss": False
        },
        "under the reference": {"target": "teacher_forced"},
        "taught": {"target": "teacher", "teacher_model": str(folder / "other" / FAMILY), "teacher_top_k": 5},
        "plain": {"lean_loss": False, "reuse_passes": False, "context_method": "sequential"},
        "clipped": {"max_grad_norm": 0.5, "activation_checkpointing": True},
        "bf16": {"bf16": True},
        "the best": {
            "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
            "load_best_model_at_end": True, "evaluated": rows(5, seed=1),
        },
    }[kind])  # fmt: skip


KINDS = (
    "rac", "rac on mixed answers", "bash", "stream", "on self tokens, smoothed", "near another model",
    "near another model, with logits", "under the reference", "taught", "plain", "clipped", "bf16", "the best",
)  # fmt: skip


def is_split(model) -> bool:
    return not together_of(model).is_alone


def result_of(kind: str, folder, model):
    trainer = trainer_of_kind(kind, folder, model)
    if kind == "the best":
        trainer.evaluate()  # before training
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"ids": [], "log": log, "weights": whole_state(trainer.model)}


def every_kind(rank, folder):
    tensor_parallel_on_cpus()
    for kind in KINDS:
        expected = torch.load(folder / f"{kind}.pt", weights_only=True)
        found = result_of(kind, folder, split_model(folder / FAMILY, tp_size=WORLD))
        assert_as_one(found, expected, 1e-1 if kind == "bf16" else 2e-5)
        for name in ("rows_read", "self_share", "own_answers_unfinished"):
            assert [one.get(name) for one in found["log"]] == [one.get(name) for one in expected["log"]], (kind, name)
    settings = [json.loads(file.read_text()) for file in folder.glob("near another model-*/*/selfgen.json")]
    assert len({one["frozen"] for one in settings}) == 1 < len(settings)
    spoiled = split_model(folder / FAMILY, tp_size=WORLD)
    if rank == 1:
        spoiled.lm_head.weight.data.to_local()[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"lm_head\.weight has values that are not finite"):
        trainer_of(folder / "spoiled", spoiled)
    split = ContextGenerator(split_model(folder / FAMILY, tp_size=WORLD))
    with pytest.raises(ValueError, match="each of its processes would write the same contexts"):
        write_contexts(split, rows(), folder / "never", self_prob=0.5, seed=0)
    with pytest.raises(ValueError, match="give the same model by name as kl_model"):
        trainer_of(folder / "kl", split_model(folder / FAMILY, tp_size=WORLD), kl_weight=0.1)
    adapted = get_peft_model(split_model(folder / FAMILY, tp_size=WORLD), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="tensor parallel and has an adapter"):
        trainer_of(folder / "lora", adapted)


@needs_plans
@pytest.mark.slow
def test_every_method_and_loss(tmp_path):
    saved(tmp_path / "other", seed=1)
    write_contexts(ContextGenerator(tiny_model(FAMILY)), rows(), tmp_path / "contexts", self_prob=0.5, seed=0)
    for kind in KINDS:
        torch.save(result_of(kind, tmp_path, saved(tmp_path)), tmp_path / f"{kind}.pt")
    in_ranks(every_kind, tmp_path)


def every_family(rank, folder):
    for family in FAMILIES:
        prompts, references, ids = batch()
        options = {"self_prob": 0.5, "seed": 1, "sample_ids": ids}
        found = ContextGenerator(split_model(folder / family, tp_size=WORLD)).contexts(prompts, references, **options)
        assert_equal(found, ContextGenerator(tiny_model(family)).contexts(prompts, references, **options))
    for family, said in (
        ("gpt2", "has no `tp_plan`"),
        ("uneven", "num_key_value_heads is 1, which tp_size=2 does not divide"),
    ):
        with pytest.raises(ValueError, match=said):
            ContextGenerator(split_model(folder / family, tp_size=WORLD))


FAMILIES = ("llama", "qwen2", "gemma2", "phi3", "gpt_neox", "olmo2", "gpt_oss")


@needs_plans
@pytest.mark.slow
def test_every_family(tmp_path):
    for family in (*FAMILIES, "gpt2"):
        saved(tmp_path, family)
    uneven = CONFIGS["llama"]()
    uneven.num_key_value_heads = 1
    AutoModelForCausalLM.from_config(uneven).save_pretrained(tmp_path / "uneven")
    in_ranks(every_family, tmp_path)


def sharded_and_split(rank, folder, tp_size, held):
    tensor_parallel_on_cpus()
    expected = torch.load(folder / "expected.pt", weights_only=True)
    options = {"save_strategy": "steps", "save_steps": 2, "weights": held}
    sizes = {"tp_size": tp_size, "fsdp_size": 2}
    trainer, found = train(folder / "run", split_model(folder / FAMILY, **sizes), **options)
    share, shares = trainer.args.row_share
    assert (share, shares) == (rank // tp_size, 2)
    assert trainer._reuse.verified
    assert trainer._reuse.on
    assert trainer._answer_loss.lean
    assert_as_one(found, {**expected, "ids": expected["ids"][share::shares]})
    checkpoint = folder / "run" / "checkpoint-2"
    again = trainer_of(folder / "run", split_model(folder / FAMILY, **sizes), **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    for name, weight in whole_state(again.model).items():
        assert torch.equal(weight, found["weights"][name]), name


@needs_plans
@pytest.mark.slow
@pytest.mark.parametrize(("tp_size", "held"), [(1, "gathered"), (2, "gathered"), (2, "sharded")])
def test_split_and_sharded_by_fsdp2(tmp_path, tp_size, held):
    _, expected = train(tmp_path / "one", saved(tmp_path), gradient_accumulation_steps=4)
    torch.save(expected, tmp_path / "expected.pt")
    in_ranks(sharded_and_split, tmp_path, tp_size, held, world=2 * tp_size)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")


_FAILS = """
import os, signal, sys
import torch.distributed as dist
from helpers.tensor import split_model
from selfgen import ContextGenerator

model, calls = split_model(sys.argv[1], tp_size=2), []

def fail(*_):
    calls.append(1)
    if dist.get_rank() == 1 and len(calls) == 200:
        if sys.argv[2] == "raises":
            raise RuntimeError("rank 1 fails in a pass")
        os.kill(os.getpid(), signal.SIGINT)

model.model.layers[1].register_forward_hook(fail)
while True:
    rows = [[3, 4, 5], [6, 7]], [[5, 6, 7, 8, 9, 10, 11], [4, 5, 6]]
    ContextGenerator(model).contexts(*rows, 0.7, seed=len(calls), sample_ids=range(2))
"""


@needs_plans
@pytest.mark.slow
@pytest.mark.parametrize("how", ["raises", "is interrupted"])
def test_all_end_when_one_fails_in_a_pass(tmp_path, how):
    saved(tmp_path)
    (tmp_path / "fails.py").write_text(_FAILS)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", tmp_path / "fails.py", tmp_path / FAMILY, how]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    began = time.monotonic()
    found = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode
    assert ("rank 1 fails in a pass" if how == "raises" else "KeyboardInterrupt") in found.stderr
    assert time.monotonic() - began < 60


def run_example(rank, folder, arguments):
    tensor_parallel_on_cpus()
    assert main(arguments) == 0


@needs_plans
@pytest.mark.slow
def test_example(tmp_path):
    """What examples/launch/tp.sh gives to torchrun."""
    save_model(tmp_path / "model", num_key_value_heads=2)
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    options = {"model": tmp_path / "model", "dataset": tmp_path / "rows.jsonl", "output-dir": tmp_path / "run"}
    options |= {"max-steps": 2, "max-length": 64, "use-cpu": "yes", "report-to": "none"}
    (tmp_path / "torchrun").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "torchrun").chmod(0o755)
    environment = os.environ | {"GPUS": str(WORLD), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["sh", ROOT / "examples/launch/tp.sh", *flags(options)]
    given = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    assert given[given.index("--nproc-per-node") + 1] == given[given.index("--tp-size") + 1] == str(WORLD)
    in_ranks(run_example, tmp_path, given[given.index("selfgen") + 1 :])
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("command", ["generate", "contexts", "eval"])
def test_other_commands_know_where_the_options_go(command, capsys):
    output = "--output-file" if command == "generate" else "--output-dir"
    arguments = [command, "--model", "m", "--dataset", "d", output, "o", "--tp-size", "2"]
    assert "which goes with selfgen train" in refused(arguments, capsys)


def test_another_sharding_on_top_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parallelism, "_IGNORED_ON", ())
    asked = config(tmp_path, fsdp=True)
    with pytest.raises(ValueError, match=r"^fsdp: the model is tensor parallel, .*fsdp_size="):
        parallelism.check_tensor_parallel(asked, 2)
    parallelism.check_tensor_parallel(asked, 1)


@needs_plans
def test_names_of_transformers_that_are_leaned_on():
    """What breaks without them is wrong in the tests above, too; this tells why."""
    from transformers.distributed import mixin, tensor_parallel

    def says(found, *texts):
        return all(text in inspect.getsource(found) for text in texts)

    assert says(tensor_parallel.TensorParallelLayer.install_forward, "def tp_forward(")  # the head of a lean loss
    assert says(tensor_parallel, '"replicated_with_grad_allreduce"', "dist.all_reduce(param.grad")  # partial gradients
    assert says(mixin, "model._device_mesh =", "model._tp_size =")  # a split model is taken for a whole one
    assert says(Trainer.__init__, "and not args.save_only_model")  # no checkpoint
    assert hasattr(Trainer, "_defer_fsdp_gradient_reduction")  # partial gradients under FSDP2


def test_more_processes_are_asked_for_than_were_started(tmp_path, capsys):
    arguments = flags({"model": tmp_path, "dataset": tmp_path, "output-dir": tmp_path / "run", "tp-size": 2})
    assert "torchrun --nproc-per-node 2" in refused(["train", *arguments], capsys)
