"""Training in several processes, each with the whole model (DDP): as in one process with the same global batch."""

from __future__ import annotations

import pytest
from helpers.processes import WORLD, in_ranks
from helpers.runs import CASES, EVEN, FAST, compare, make_expected
from helpers.skips import Skips, skips_later
from helpers.training import make_trainer
from torch.multiprocessing.spawn import ProcessRaisedException


def compared(rank, folder, names, world):
    compare(rank, folder, names, world)


def check(folder, names, world=WORLD):
    make_expected(folder, names, world)
    in_ranks(compared, folder, names, world, world=world)


def test_two_processes(tmp_path):
    check(tmp_path, FAST)


@pytest.mark.slow
def test_all_in_two_processes(tmp_path):
    check(tmp_path, tuple(CASES))


@pytest.mark.slow
def test_four_processes(tmp_path):
    check(tmp_path, EVEN, world=4)


def skipped(rank, folder):
    trainer = make_trainer(folder, model=skips_later(), max_steps=3, report_to=[])
    if rank == 1:
        trainer.add_callback(Skips(trainer))
    trainer.train()


def test_a_layer_that_one_process_skips(tmp_path):
    """At random, by a rule that no setting tells of, after a trial of the passes that has seen nothing of it."""
    with pytest.raises(ProcessRaisedException, match="has skipped decoder layers: give reuse_passes=False"):
        in_ranks(skipped, tmp_path, limit=120)


def layer_drop(rank, folder):
    """What a setting tells of is no ground for waiting."""
    model = skips_later()
    model.config.layerdrop = 0.5
    trainer = make_trainer(folder, model=model, max_steps=3, report_to=[])
    if rank == 1:
        trainer.add_callback(Skips(trainer))
    trainer.train()
    assert not trainer._reuse.on


def test_layer_drop(tmp_path):
    in_ranks(layer_drop, tmp_path, limit=120)
