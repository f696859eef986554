"""Training in several processes, each with the whole model (DDP): as in one process with the same global batch."""

from __future__ import annotations

import pytest
from helpers.processes import WORLD, in_ranks
from helpers.runs import ALL, EVEN, FAST, compare, make_expected
from helpers.skips import Skips, skips_later
from helpers.training import make_trainer, rows
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
    check(tmp_path, ALL)


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


def would_wait(rank, folder):
    """What would have one process wait for another one for good is refused in all of them."""
    for changes, match in (
        ({"auto_find_batch_size": True}, "auto_find_batch_size is given, and there are 2 processes"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches is given"),
    ):
        with pytest.raises(ValueError, match=match):
            make_trainer(folder, report_to=[], **changes)
    uneven = {"accelerator_config": {"even_batches": False}, "num_train_epochs": 1, "max_steps": -1}
    split = {**uneven, "accelerator_config": {"even_batches": False, "split_batches": True}}
    for count, of, options in ((9, 2, uneven), (9, 2, split), (13, 4, {**split, "per_device_train_batch_size": 4})):
        with pytest.raises(ValueError, match=f"{count} rows in batches of {of} are no equal number of batches"):
            make_trainer(folder, data=rows(count), report_to=[], **options).train()
    trainer = make_trainer(folder, data=rows(9), report_to=[], dataloader_drop_last=True, **uneven)
    trainer.train()
    assert trainer.state.global_step == 1


def test_what_would_wait_for_good(tmp_path):
    in_ranks(would_wait, tmp_path, limit=120)
