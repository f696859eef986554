"""Weights that FSDP2 shards in other ways: as transformers loads them, from the first process alone, part by part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate.utils import enable_fsdp_ram_efficient_loading
from helpers.processes import WORLD, in_ranks
from helpers.runs import CASES, Case, assert_same, lora, run
from helpers.sharded import another_run, fsdp_on_cpus, whole_state
from helpers.training import make_trainer
from helpers.versions import needs
from models import tiny_model
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from selfgen.training import parallelism

sized = needs("transformers", "5.23", "it shards no model as it loads it")
PART_BY_PART = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "Linear"]}  # the head, too


def shard_at_load(folder, **options):
    config = DistributedConfig(fsdp_size=WORLD, **options)
    return AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=config)


def check(rank, folder, name, expected=None, **changes):
    engine = {one: changes.pop(one) for one in ("fsdp", "fsdp_config", "bf16", "kl_model") if one in changes}
    case = replace(CASES[name], **changes)
    found = run(case, folder / "several", **engine)
    assert_same(found, torch.load(folder / f"{expected or name}.pt", weights_only=True), case, rank, WORLD)


def in_the_first_process(rank, folder):
    """As versions of transformers load it for fsdp_config's cpu_ram_efficient_loading."""
    enable_fsdp_ram_efficient_loading()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    if rank != 0:
        for weight in model.parameters():
            weight.data.fill_(torch.nan)
    return model


def resumed_as_unbroken(case, folder):
    """transformers' Trainer refuses to save states of optimizers for such models, which it can't load; ours can."""
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = case().trainer(folder, 1, **saved)
    trainer.train()
    again = case().trainer(folder, 1, **saved)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    want, found = whole_state(trainer.model), whole_state(again.model)
    assert all(torch.equal(found[name], want[name]) for name in want)
    kept = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-2").state_dict()
    assert all(torch.equal(kept[name], want[name]) for name in want)


def others(rank, folder):
    check(rank, folder, "plain", model=lambda: shard_at_load(folder))
    with pytest.raises(ValueError, match="give kl_model"):
        make_trainer(folder / "kl", model=shard_at_load(folder), kl_weight=0.1)
    fsdp_on_cpus()
    efficient = {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}
    check(rank, folder, "plain", model=lambda: in_the_first_process(rank, folder), **efficient)
    with pytest.raises(ValueError, match="give kl_model"):
        replace(CASES["kl"], model=lambda: in_the_first_process(rank, folder)).trainer(folder / "kl", 1, **efficient)
    near_a_model_that_is_loaded_later(rank, folder, efficient)
    check(rank, folder, "not reused", fsdp=True, fsdp_config=PART_BY_PART, before=is_part_by_part)


def near_a_model_that_is_loaded_later(rank, folder, efficient):
    """What a run that goes on stays near is known in its first step only."""
    case = replace(CASES["kl"], model=lambda: in_the_first_process(rank, folder))
    options = {**efficient, "kl_model": str(folder / "model"), "save_strategy": "steps", "save_steps": 1}
    case.trainer(folder / "saved", 1, **options).train()
    checkpoint = str(folder / "saved" / "checkpoint-1")
    case.trainer(folder / "saved", 1, **options).train(resume_from_checkpoint=checkpoint)
    trainer = case.trainer(folder / "saved", 1, **options)
    trainer._known_hashes = {"frozen": "another", "teacher": None}
    with pytest.raises(ValueError, match="stays near another model"):
        trainer.train(resume_from_checkpoint=checkpoint)


def is_part_by_part(trainer):
    """Shards the model, so that it can be looked at."""
    trainer._engine.shard(trainer)
    assert isinstance(trainer.model.lm_head, FSDPModule)
    assert isinstance(trainer.model.model.layers[0].mlp.up_proj, FSDPModule)
    assert "parts of a decoder layer" in trainer._engine.why_no_reuse(trainer.model.model.layers)


def make_ready(folder, names):
    tiny_model("llama").save_pretrained(folder / "model")
    for name in names:
        torch.save(run(CASES[name], folder / "one" / name, WORLD), folder / f"{name}.pt")


@sized
def test_other_ways(tmp_path):
    make_ready(tmp_path, ["plain", "not reused"])
    in_ranks(others, tmp_path)


def more(rank, folder):
    for name in ("evaluated", "uneven", "after_self", "by micro-batch", "twice"):
        check(rank, folder, name, model=lambda: shard_at_load(folder))
    check(rank, folder, "kl", model=lambda: shard_at_load(folder), kl_model=str(folder / "model"))
    case = replace(CASES["plain"], model=lambda: shard_at_load(folder, fsdp_mixed_precision=True))
    in_bf16 = run(case, folder / "bf16")
    resumed_as_unbroken(lambda: replace(CASES["plain"], model=lambda: shard_at_load(folder)), folder / "split")
    check(rank, folder, "lora", model=lambda: lora(base=shard_at_load(folder)))
    fsdp_on_cpus()
    by_accelerate = run(CASES["plain"], folder / "bf16", fsdp=True, bf16=True)
    assert [one["loss"] for one in in_bf16["log"]] == [one["loss"] for one in by_accelerate["log"]]
    for name in ("smoothed", "after_self", "kl", "plain"):
        check(rank, folder, name, fsdp=True, fsdp_config=PART_BY_PART, reused=False)
    efficient = {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}
    for name in ("evaluated", "after_self", "many"):
        check(rank, folder, name, model=lambda: in_the_first_process(rank, folder), **efficient)
    options = {**efficient, "kl_model": str(folder / "model")}
    check(rank, folder, "kl", model=lambda: in_the_first_process(rank, folder), **options)
    enable_fsdp_ram_efficient_loading()
    check(rank, folder, "plain", model=lambda: str(folder / "model"), **efficient)


@sized
@pytest.mark.slow
def test_more_other_ways(tmp_path):
    names = ["plain", "evaluated", "uneven", "after_self", "by micro-batch", "twice", "kl", "lora", "smoothed"]
    make_ready(tmp_path, names)
    many = replace(CASES["many"], model=CASES["plain"].model)
    torch.save(run(many, tmp_path / "one" / "many", WORLD), tmp_path / "many.pt")
    in_ranks(more, tmp_path)


def with_targets(rank, folder):
    """The model that is learned from is sharded, too, where the trained one is as it is loaded."""
    CASES["taught"] = Case({"target": "teacher", "teacher_model": str(folder / "model"), "divergence": "jsd"})
    for name in ("teacher_forced", "privileged", "taught"):
        check(rank, folder, name, model=lambda: shard_at_load(folder))
    for name in ("lora, teacher", "lora, teacher_forced"):
        check(rank, folder, name, model=lambda: lora(base=shard_at_load(folder)))
    fsdp_on_cpus()
    efficient = {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}
    for name in ("teacher_forced", "taught"):
        check(rank, folder, name, fsdp=True, fsdp_config=PART_BY_PART, reused=False)
        check(rank, folder, name, model=lambda: in_the_first_process(rank, folder), **efficient)


@sized
@pytest.mark.slow
def test_targets(tmp_path):
    make_ready(tmp_path, ["teacher_forced", "privileged", "lora, teacher", "lora, teacher_forced"])
    taught = Case({"target": "teacher", "teacher_model": str(tmp_path / "model"), "divergence": "jsd"})
    torch.save(run(taught, tmp_path / "one" / "taught", WORLD), tmp_path / "taught.pt")
    in_ranks(with_targets, tmp_path)


def refused(rank, folder):
    parallelism._IGNORED_ON = ()
    with pytest.raises(ValueError, match="Accelerate ignores it on this device"):  # else, fsdp_on_cpus can go
        make_trainer(folder / "one", fsdp=True)
    fsdp_on_cpus()
    another_run()
    with pytest.raises(ValueError, match="version 2, which is FSDP2"):
        make_trainer(folder / "one", fsdp=True, fsdp_config={"version": 1})


def test_refusals(tmp_path):
    in_ranks(refused, tmp_path)
