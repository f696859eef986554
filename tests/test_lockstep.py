"""Weights that stay sharded while contexts are made: every pass gathers them, and all processes run equally many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers.cli import ROOT, flags, save_model
from helpers.contexts import assert_equal
from helpers.processes import WORLD, in_ranks
from helpers.runs import ALL, CASES, EVEN, assert_same, compare, make_expected, run, under_fsdp2
from helpers.sharded import Collectives, fsdp_on_cpus, whole_state
from helpers.training import make_trainer
from helpers.versions import APART, has, needs
from models import SINCE, VOCAB, tiny_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BloomConfig, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.scaling import collectives
from selfgen import ContextGenerator, UnsupportedModelError, lockstep
from selfgen.cli import main
from selfgen.context.hidden_states import ReuseError
from selfgen.context.sharding import ALONE, local_part
from selfgen.training import reuse, weight_memory
from selfgen.training.weight_memory import chosen_weights

QUICK = under_fsdp2(("many", "rac, lora"))
FAMILY = "gpt2" if has("transformers", SINCE["gpt2"]) else "llama"
ROWS = {"prompts": [[3, 4, 5], [6, 7]], "references": [[5, 6, 7, 8, 9, 10, 11], [4, 5, 6]], "sample_ids": [0, 1]}


def sharded(model, **options):
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            fully_shard(layer, **options)
    return fully_shard(model)


def bloom():
    """Its attention is its own: it fails in the middle of the ragged path's first probe."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config).eval()


def rows_of(rank: int) -> dict:
    return {name: column[rank:] for name, column in ROWS.items()}


def each_its_own(rank):
    """Also what it costs."""
    model, whole = sharded(tiny_model("llama")), ContextGenerator(tiny_model("llama"))
    generator = ContextGenerator(model, token_budget=6, balance=2)
    for seed in range(3):
        options = {**rows_of(rank), "self_prob": 0.7, "seed": seed}
        with Collectives() as calls, lockstep(model) as steps:
            found = generator.contexts(**options)
        assert_equal(found, whole.contexts(**options, method="sequential"))
        if seed:  # what the model is like is known, so that all forwards are passes
            once = 1  # embedding, norm and head
            gathers = len(model.model.layers) * steps.forwards
            assert calls.counts == {"all_reduce": steps.forwards + 1, "all_gather": once + gathers}, calls.counts
            groups = len(model.model.layers) + once
            formula = collectives(groups, micro_batches=0, passes=steps.forwards, how="sharded")
            assert (formula.gathers, formula.all_reduces) == (gathers, steps.forwards + 1)
            assert steps.gathers == gathers
            most = torch.tensor(found.stats.passes)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            assert steps.forwards == most
        model(input_ids=torch.arange(3, 7)[None], labels=torch.arange(3, 7)[None]).loss.backward()


def one_has_nothing(rank):
    """Another one looks at the model, answers and decodes in several ways meanwhile."""
    options = {"self_prob": 0.7, "seed": 0}
    model, whole = sharded(tiny_model(FAMILY)), ContextGenerator(tiny_model(FAMILY))
    generator = ContextGenerator(model)
    for working in range(WORLD):
        rows = ROWS if rank == working else {name: [] for name in ROWS}
        for method in ("fixed_point", "sequential"):
            with lockstep(model):
                found = generator.contexts(**rows, **options, method=method)
            assert_equal(found, whole.contexts(**rows, **options, method="sequential"))
        with lockstep(model):
            found = generator.answer(rows["prompts"], max_new_tokens=7)
        assert list(map(list, found.tokens)) == list(map(list, whole.answer(rows["prompts"], max_new_tokens=7).tokens))


def broken_off(rank):
    """A pass of one process ends within a layer; the other has nothing to do, and gathers with it to the end."""
    options = {"self_prob": 0.7, "seed": 0}
    model, whole = sharded(bloom()), ContextGenerator(bloom())
    generator = ContextGenerator(model)
    rows = {name: [] for name in ROWS} if rank else ROWS
    with lockstep(model):
        if rank == 0:
            with pytest.raises(UnsupportedModelError):
                generator.contexts(**rows, **options)
        found = generator.contexts(**rows, **options, method="sequential")
        answers = generator.answer(rows["prompts"], max_new_tokens=7)
    assert_equal(found, whole.contexts(**rows, **options, method="sequential"))
    assert list(map(list, answers.tokens)) == list(map(list, whole.answer(rows["prompts"], max_new_tokens=7).tokens))
    with pytest.raises(RuntimeError if rank else UnsupportedModelError, match="does not support"), lockstep(model):
        generator.contexts(**rows, **options)
    with lockstep(model):  # all is as it was
        generator.contexts(**ROWS, **options, method="sequential")


def failed_in_one(rank):
    model = sharded(tiny_model("llama"))
    generator = ContextGenerator(model)
    with pytest.raises(ValueError, match=r"whole_weights.*lockstep"):
        generator.contexts(**ROWS, self_prob=0.7, seed=0)
    for place in ("before", "after"):
        expected = (ValueError, f"^{place}$") if rank else (RuntimeError, f"process 1 has failed .ValueError: {place}.")
        with pytest.raises(expected[0], match=expected[1]), lockstep(model):  # the other one is in its first probe
            raises_in_one(rank, generator, place)
    with lockstep(model):
        generator.contexts(**rows_of(rank), self_prob=0.7, seed=0)


def raises_in_one(rank, generator, place):
    if place == "after" or not rank:
        generator.contexts(**ROWS, self_prob=0.7, seed=0)
    if rank:
        raise ValueError(place)


def never_sharded_again(rank):
    """After a forward, at least: then all weights are whole, and nobody waits."""
    model, options = sharded(tiny_model("llama"), reshard_after_forward=False), {"self_prob": 0.7, "seed": 0}
    with lockstep(model) as steps:
        found = ContextGenerator(model).contexts(**rows_of(rank), **options)
    assert steps.forwards == steps.gathers == 0
    assert_equal(found, ContextGenerator(tiny_model("llama")).contexts(**rows_of(rank), **options))


def root_sharded_again(rank):
    """After a forward, too, as Accelerate had it before 1.13: passes compute what is in it, and not itself."""
    model, options = tiny_model("llama"), {"self_prob": 0.7, "seed": 0}
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=True)
    with lockstep(model, keep=True):
        found = ContextGenerator(model).contexts(**rows_of(rank), **options)
    assert_equal(found, ContextGenerator(tiny_model("llama")).contexts(**rows_of(rank), **options))
    loss = model(input_ids=torch.arange(3, 7)[None], labels=torch.arange(3, 7)[None]).loss
    loss.backward()
    assert all(isinstance(weight, DTensor) for weight in model.parameters())


def interrupted_in_all(rank):
    """While weights are on their way: they must not be taken for those that a later forward needs."""
    model, whole = sharded(bloom()), bloom()
    generator = ContextGenerator(model)
    most = []

    def interrupt(*_):
        layers = model.transformer.h
        most.append(sum(not isinstance(layer.mlp.dense_h_to_4h.weight, DTensor) for layer in layers))
        if len(most) == 9:
            raise KeyboardInterrupt

    hook = model.transformer.h[0].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), lockstep(model):
        generator.contexts(**ROWS, self_prob=0.7, seed=0, method="sequential")
    hook.remove()
    assert set(most) == {1}  # of three layers; the next one is on its way
    with torch.no_grad():
        for weight in (*model.parameters(), *whole.parameters()):
            local_part(weight).mul_(0.9)
    options = {**rows_of(rank), "self_prob": 0.7, "seed": 0, "method": "sequential"}
    with lockstep(model):
        found = generator.contexts(**options)
    assert_equal(found, ContextGenerator(whole).contexts(**options))


def in_ones_own_loop(rank, folder):
    interrupted_in_all(rank)
    never_sharded_again(rank)
    root_sharded_again(rank)
    each_its_own(rank)
    one_has_nothing(rank)
    broken_off(rank)
    failed_in_one(rank)


@pytest.mark.slow  # test_training is the fast one of the kind
def test_in_a_loop_of_ones_own(tmp_path):
    in_ranks(in_ones_own_loop, tmp_path)


def trained(rank, folder, names, world, engine):
    fsdp_on_cpus()
    compare(rank, folder, names, world, fsdp=True, weights="sharded", **engine)


def check(folder, names, world=WORLD, **engine):
    names = under_fsdp2(names)
    make_expected(folder, names, world)
    in_ranks(trained, folder, names, world, engine, world=world)


class OfSteps(TrainerCallback):
    """The collectives of each optimizer step."""

    def __init__(self, calls: Collectives):
        self.calls, self.before, self.steps = calls, Counter(), []

    def on_step_end(self, *_, **__):
        self.steps.append(self.calls.counts - self.before)
        self.before = Counter(self.calls.counts)


def trained_and_counted(rank, folder):
    """A step has the collectives of fine-tuning, and those of its passes."""
    trained(rank, folder, QUICK, WORLD, {})
    found, logs = [], []
    for changes in ({"weights": "sharded"}, {"self_prob": 0.0}):
        trainer = CASES["plain"].trainer(folder / "counted", 1, fsdp=True, max_steps=4, **changes)
        with Collectives() as calls:
            trainer.add_callback(counts := OfSteps(calls))
            trainer.train()
        found.append(counts.steps[-1])  # nothing is tried in it
        told = trainer._engine.describe()
        assert ("gathered in every context pass" in told) == ("weights" in changes), told
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry][-1])
    of_step, of_fine_tuning = found
    passes, parts = int(logs[0]["passes_in_step"]), trainer.model.config.num_hidden_layers + APART  # the embedding
    assert passes >= logs[0]["passes"]
    assert of_step - of_fine_tuning == {"all_gather": passes * parts, "all_reduce": passes + 1}
    assert not of_fine_tuning - of_step


def test_training(tmp_path):
    make_expected(tmp_path, QUICK, WORLD)
    in_ranks(trained_and_counted, tmp_path)


@pytest.mark.slow
def test_all_training(tmp_path):
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


def loaded_in_shards(rank, folder):
    """By transformers itself, which trains on CPUs, too."""
    from transformers.distributed import DistributedConfig

    shards = DistributedConfig(fsdp_size=WORLD)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=shards, dtype="float32")
    found = run(replace(CASES["plain"], model=model.eval), folder / "several", weights="sharded")
    expected = torch.load(folder / "plain.pt", weights_only=True)
    assert_same(found, expected, CASES["plain"], rank, WORLD)


@needs("transformers", "5.23", "it shards no model as it loads it")
@pytest.mark.slow
def test_loaded_in_shards(tmp_path):
    CASES["plain"].model().save_pretrained(tmp_path / "model")
    make_expected(tmp_path, ["plain"], WORLD)
    in_ranks(loaded_in_shards, tmp_path)


def resumed(rank, folder):
    """Bit for bit, also what is logged."""
    fsdp_on_cpus()
    case = replace(CASES["plain"], changes={"save_strategy": "steps", "save_steps": 2, "max_steps": 4})
    found = []
    for checkpoint in (None, str(folder / "run" / "checkpoint-2")):
        trainer = case.trainer(folder / "run", 1, fsdp=True, weights="sharded")
        trainer.train(checkpoint)
        names = ("loss", "grad_norm", *(() if rank else ("passes", "self_share")))  # those of the first process
        log = [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]
        found.append((log, whole_state(trainer.model)))
        dist.barrier()
    (log, weights), (log_again, weights_again) = found
    assert log == log_again
    assert all(torch.equal(weights_again[name], weight) for name, weight in weights.items())


@needs("accelerate", "1.13", "FSDP2 loses the optimizer's state of a checkpoint")
@pytest.mark.slow
def test_resumed(tmp_path):
    in_ranks(resumed, tmp_path)


def in_half_precision(rank, folder):
    """Losses are near those in fp32; nothing can be equal."""
    fsdp_on_cpus()
    found = run(CASES["plain"], folder / "several", fsdp=True, weights="sharded", bf16=True)
    expected = torch.load(folder / "plain.pt", weights_only=True)
    for got, want in zip(found["log"], expected["log"], strict=True):
        assert abs(got["loss"] / want["loss"] - 1) < 0.05


@pytest.mark.slow
def test_bf16(tmp_path):
    make_expected(tmp_path, ["plain"], WORLD)
    in_ranks(in_half_precision, tmp_path)


def reused_in_one(rank, folder):
    """One process finds that it can't compute a layer again; both train on, as they did in one process."""
    fsdp_on_cpus()
    verify = reuse._verify

    def refuse(index, *args):
        if rank and index == 1:
            raise ReuseError("not this layer")
        verify(index, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse, "_verify", refuse)
        case = replace(CASES["plain"], reused=False, after=lambda trainer: 1.0 + trainer._reuse.on)
        found = run(case, folder / "several", fsdp=True, weights="sharded")
    assert found.pop("others") == [2.0 - rank]
    expected = torch.load(folder / "plain.pt", weights_only=True)
    assert_same({**found, "others": []}, expected, case, rank, WORLD)


@needs("transformers", "5.23", "no pass is reused under FSDP2")
@pytest.mark.slow
def test_reused_in_one_process(tmp_path):
    make_expected(tmp_path, ["plain"], WORLD)
    in_ranks(reused_in_one, tmp_path)


@pytest.mark.parametrize(
    ("free", "asked", "chosen"), [(10, "auto", "gathered"), (4, "auto", "sharded"), (4, "gathered", "gathered")]
)
def test_what_fits_is_chosen(free, asked, chosen, monkeypatch, caplog):
    model = tiny_model("llama")
    size = 4 * sum(one.numel() for one in model.parameters())
    monkeypatch.setattr(weight_memory, "gathered_bytes", lambda model: [size])
    monkeypatch.setattr(weight_memory, "free_bytes", lambda device: free * size)  # 3 go to gradients and Adam
    with caplog.at_level("INFO"):
        assert chosen_weights(asked, model, model.device, ALONE) == chosen
    assert (f"weights=auto: {chosen}" in caplog.text) == (asked == "auto")


def test_weights_refused(tmp_path):
    with pytest.raises(ValueError, match="weights is 'whole'; accepted: auto, gathered, sharded"):
        make_trainer(tmp_path, weights="whole")
    with pytest.raises(ValueError, match="weights is sharded, but FSDP2 does not shard"):
        make_trainer(tmp_path, weights="sharded")


ENDS = """
import os, signal, sys
import torch, torch.distributed as dist
from models import tiny_model
from torch.distributed.fsdp import fully_shard
from selfgen import ContextGenerator, lockstep

dist.init_process_group("gloo")
rank, how = dist.get_rank(), sys.argv[1]
model = tiny_model("llama")
for layer in model.model.layers:
    fully_shard(layer)
generator = ContextGenerator(fully_shard(model), token_budget=6, balance=2)
passes = 0

def ends(*_):
    global passes
    passes += rank
    if passes == 25 and how == "raised":
        raise ValueError("this row is odd")
    if passes == 25:
        os.kill(os.getpid(), signal.SIGINT)

model.model.layers[0].mlp.register_forward_hook(ends)
for seed in range(100):
    with lockstep(model):
        rows = range(1 + rank)
        generator.contexts([[3, 4] for _ in rows], [[5, 6, 7, 8] for _ in rows], 0.7, seed=seed, sample_ids=rows)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"), [("raised", "ValueError: this row is odd"), ("interrupted", "KeyboardInterrupt")]
)
def test_all_end_with_one(how, said, tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*torchrun, str(tmp_path / "ends.py"), how]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)  # it takes seconds
    assert ended.returncode
    assert said in ended.stderr


def environment_of(launch_file) -> dict[str, str]:
    """What ``accelerate launch`` tells the processes that it starts."""
    given = ["--config_file", str(launch_file), "--main_process_port", "0", "-m", "selfgen"]
    arguments, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(given))
    told = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def launched(rank, folder, environment):
    os.environ |= environment
    fsdp_on_cpus()
    given = {"model": folder / "model", "dataset": folder / "rows.jsonl", "output-dir": folder / "out", "max-steps": 2}
    given |= {"use-cpu": "yes", "weights": "sharded", "max-length": 32, "per-device-train-batch-size": 1}
    assert main(["train", *flags({**given, "report-to": "none", "logging-steps": 1, "bf16": "yes"})]) == 0


@pytest.mark.slow
def test_launch_file(tmp_path):
    save_model(tmp_path / "model")
    rows = [{"prompt": "a b", "completion": "c d e"}, {"prompt": "h", "completion": "g f"}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    in_ranks(launched, tmp_path, environment_of(ROOT / "examples" / "launch" / "fsdp2_low_memory.yaml"))
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert all(entry["passes_in_step"] > 0 for entry in log if "loss" in entry)
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("model", "out"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before if "proj" in name)
