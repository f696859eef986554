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
    beside = folder / UNFINISHED
    shutil.rmtree(beside, ignore_errors=True)
    trainer.save_model(str(beside), _internal_call=True)

    def put_in_place() -> None:
        if args.should_save:
            with saving(folder):
                if trainer.is_world_process_zero():
                    trainer.state.save_to_json(str(beside / STATE))
                if overwrite:
                    remove_model(folder)
                for file in sorted(beside.iterdir()):
                    if file.is_dir():  # of one of several adapters
                        shutil.rmtree(folder / file.name, ignore_errors=True)
                    file.replace(folder / file.name)
                beside.rmdir()  # until then, the files of a model next to it are those of an unfinished run
        if args.push_to_hub:
            trainer.push_to_hub(commit_message="Model save")

    evaluate_and(put_in_place, trainer)


def save_round(trainer: BSSTrainer, folder: Path) -> None:
    """Save model and tokenizer of a round to ``folder/model``, and evaluate likewise."""
    beside = folder / "model.partial"
    shutil.rmtree(beside, ignore_errors=True)
    trainer.save_model(str(beside))

    def put_in_place() -> None:
        trainer.save_state()
        beside.rename(folder / "model")

    evaluate_and(put_in_place, trainer)


def evaluate_and(put_in_place: Callable[[], None], trainer: BSSTrainer) -> None:
    """Evaluate, and put in place what is saved; an evaluation that fails costs no model."""
    try:
        trainer.evaluate_at_the_end()
    except Exception:
        put_in_place()
        raise
    put_in_place()
