"""Checkpoints of runs whose weights FSDP2 shards: whole or in shards, resumed bit for bit, and never taken in part."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.processes import WORLD, in_ranks
from helpers.runs import CASES
from helpers.sharded import fsdp_on_cpus, whole_state
from helpers.versions import needs
from torch.multiprocessing import ProcessExitedException
from transformers import AutoModelForCausalLM

from selfgen.files import SaveError
from selfgen.training.checkpoints import ResumeError, fault_of, last_checkpoint
from selfgen.training.ending import save_result

pytestmark = needs("accelerate", "1.13", "FSDP2 loses the optimizer's state of a checkpoint")
KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


def make(name, folder, kind, **changes):
    fsdp_on_cpus()
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "fsdp_config": {"state_dict_type": kind}}
    return CASES[name].trainer(folder, 1, fsdp=True, **saved, **changes)


def resumed_as_unbroken(rank, folder, name):
    for kind in KINDS:
        trainer = make(name, folder / kind, kind)
        trainer.train()
        want = whole_state(trainer.model)
        save_result(trainer)
        settings = json.loads((folder / kind / "checkpoint-1" / "selfgen.json").read_text())
        assert settings["trainer"]["processes"] == WORLD
        trainer = make(name, folder / kind, kind)
        trainer.train(resume_from_checkpoint=str(folder / kind / "checkpoint-1"))
        found = whole_state(trainer.model)
        assert all(torch.equal(found[one], want[one]) for one in want)
        if name == "plain":
            saved = AutoModelForCausalLM.from_pretrained(folder / kind).state_dict()
            assert all(torch.equal(saved[one], want[one]) for one in want)
            assert not list((folder / kind).glob("*.distcp"))
    other = make(name, folder / kind, kind, self_prob=0.25)
    with pytest.raises(ResumeError, match="self_prob"):
        other.train(resume_from_checkpoint=str(folder / kind / "checkpoint-1"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def plant(file: Path) -> None:
    file.write_bytes(pickle.dumps(shutil.rmtree))


BROKEN = [
    ("FULL_STATE_DICT", "pytorch_model_fsdp.bin", cut),
    ("FULL_STATE_DICT", "optimizer.bin", cut),
    ("FULL_STATE_DICT", "optimizer.bin", Path.unlink),
    ("SHARDED_STATE_DICT", "pytorch_model_fsdp_0/__1_0.distcp", cut),
    ("SHARDED_STATE_DICT", "pytorch_model_fsdp_0/__0_0.distcp", Path.unlink),
    ("SHARDED_STATE_DICT", "pytorch_model_fsdp_0/.metadata", cut),
    ("SHARDED_STATE_DICT", "optimizer_0/.metadata", Path.unlink),
    ("SHARDED_STATE_DICT", "optimizer_0/.metadata", plant),
    ("SHARDED_STATE_DICT", "optimizer_0", shutil.rmtree),
    ("SHARDED_STATE_DICT", "rng_state_1.pth", Path.unlink),
]


def test_resumed_as_unbroken(tmp_path, caplog):
    in_ranks(resumed_as_unbroken, tmp_path, "plain")
    for number, (kind, name, breaks) in enumerate(BROKEN):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / kind, folder)
        assert fault_of(folder / "checkpoint-2") is None
        breaks(folder / "checkpoint-2" / name)
        assert Path(name).name.removesuffix(".bin") in fault_of(folder / "checkpoint-2"), (name, breaks)
        with caplog.at_level(logging.WARNING):
            assert last_checkpoint(folder) == str(folder / "checkpoint-1")
    assert "would run shutil.rmtree" in caplog.text


@pytest.mark.slow
def test_adapters_resumed_as_unbroken(tmp_path):
    in_ranks(resumed_as_unbroken, tmp_path, "lora")


def full_disk(rank, folder):
    """One process can't write its part: all end."""
    from torch.distributed.checkpoint import filesystem

    def no_room(*args, **kwargs):
        raise OSError(28, "No space left on device")

    trainer = make("plain", folder / "run", "SHARDED_STATE_DICT")
    if rank == 1:
        filesystem._write_item = no_room
    with pytest.raises(SaveError, match="No space left on device"):
        trainer.train()


def fewer(rank, folder, kind, checkpoint):
    accumulated = {"gradient_accumulation_steps": 4} if torch.distributed.get_world_size() == 2 else {}
    fsdp_on_cpus()
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "fsdp_config": {"state_dict_type": kind}}
    trainer = CASES["plain"].trainer(folder / kind, 2 if accumulated else 1, fsdp=True, **saved)
    trainer.train(resume_from_checkpoint=checkpoint)
    weights = whole_state(trainer.model)
    if checkpoint is None and rank == 0:
        torch.save(weights, folder / f"{kind}.pt")
    elif checkpoint:
        for name, weight in torch.load(folder / f"{kind}.pt").items():
            assert (weights[name] - weight).abs().max() <= 1e-5 * weight.abs().max()


@pytest.mark.slow
def test_resumed_in_fewer_processes(tmp_path):
    for kind in KINDS:
        in_ranks(fewer, tmp_path, kind, None, world=4)
        (tmp_path / "rendezvous").unlink(missing_ok=True)
        in_ranks(fewer, tmp_path, kind, str(tmp_path / kind / "checkpoint-1"), world=2)
        (tmp_path / "rendezvous").unlink(missing_ok=True)


def killed_while_saving(rank, folder):
    trainer = make("plain", folder / "run", "SHARDED_STATE_DICT")
    save = trainer._save_rng_state

    def save_or_die(output_dir):
        if rank == 1 and trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        save(output_dir)

    trainer._save_rng_state = save_or_die
    trainer.train()


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        in_ranks(killed_while_saving, tmp_path)
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")


@pytest.mark.slow
def test_full_disk_of_one_process(tmp_path):
    in_ranks(full_disk, tmp_path)
    assert fault_of(tmp_path / "run" / "checkpoint-1")
