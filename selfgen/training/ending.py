"""The end of a run: its model and its state, which are put in their place when all of them is written.

A run that is killed before that goes on from its last checkpoint, or begins anew, and ends in the same way.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from .bss import BSSTrainer
from .checkpoints import STATE, UNFINISHED, remove_model, saving


def save_result(trainer: BSSTrainer, *, overwrite: bool = False) -> None:
    """Save model, tokenizer and state to the output folder of the run, and evaluate as ``evaluate_at_the_end`` does.

    Args:
        overwrite: remove a model that the folder holds. Without, its files are written over one by one.

    Raises:
        SaveError: they can't be written; what the folder held is as it was.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    beside = folder / ".model.partial"
    _save(trainer, beside, _internal_call=True)

    def put_in_place() -> None:
        if args.should_save:
            with saving(folder):
                if trainer.is_world_process_zero():
                    trainer.state.save_to_json(str(beside / STATE))
                _move_into(folder, beside, overwrite)
        if args.push_to_hub:
            trainer.push_to_hub(commit_message="Model save")

    evaluate_and(put_in_place, trainer)


def save_round(trainer: BSSTrainer, folder: Path) -> None:
    """Save model and tokenizer of a round to ``folder/model``, and evaluate likewise."""
    beside = folder / "model.partial"
    _save(trainer, beside)

    def put_in_place() -> None:
        trainer.save_state()
        if trainer.args.should_save:
            beside.rename(folder / "model")

    evaluate_and(put_in_place, trainer)


def _save(trainer: BSSTrainer, folder: Path, **options) -> None:
    """Save a model to a folder of its own, which is not there where that fails. One of several processes does it."""

    def remove() -> None:
        if trainer.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)

    remove()
    try:
        trainer.save_model(str(folder), **options)
    except Exception:
        remove()
        raise


def _move_into(folder: Path, beside: Path, overwrite: bool) -> None:
    whole = folder / UNFINISHED  # while it is there, a model next to it is that of an unfinished run
    shutil.rmtree(whole, ignore_errors=True)
    beside.rename(whole)
    if overwrite:
        remove_model(folder)
    for file in sorted(whole.iterdir()):
        if file.is_dir():  # of one of several adapters
            shutil.rmtree(folder / file.name, ignore_errors=True)
        file.replace(folder / file.name)
    whole.rmdir()


def evaluate_and(put_in_place: Callable[[], None], trainer: BSSTrainer) -> None:
    """Evaluate, and put in place what is saved; an evaluation that fails costs no model."""
    try:
        trainer.evaluate_at_the_end()
    except Exception:
        put_in_place()
        raise
    put_in_place()
