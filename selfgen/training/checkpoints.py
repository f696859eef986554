"""What a checkpoint says of the run that wrote it, and which one a run is resumed from."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from transformers import TrainingArguments

from ..provenance import differences
from .config import BSSConfig

SETTINGS = "selfgen.json"  # next to the weights of every checkpoint
_MAY_CHANGE = {
    "context_method", "token_budget", "balance", "context_micro_batches", "own_answer_batch_size", "cuda_graphs",
    "reuse_passes", "lean_loss",
}  # fmt: skip


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in ``folder`` that was written to its end."""
    steps = {}
    for state in Path(folder).glob("checkpoint-*/trainer_state.json"):
        try:
            steps[json.loads(state.read_text())["global_step"]] = state.parent  # the Trainer writes this file last
        except (ValueError, KeyError):
            continue
    return str(steps[max(steps)]) if steps else None


def resumed_settings(args: BSSConfig) -> dict[str, object]:
    """What contexts and losses depend on, which must be the same in a resumed run."""
    of_trainer = {field.name for field in fields(TrainingArguments)} - {"seed"}
    names = [field.name for field in fields(args) if field.name not in of_trainer | _MAY_CHANGE]
    return {name: getattr(args, name) for name in names}


def check_resumed(checkpoint: str | Path, args: BSSConfig) -> None:
    """Raise ValueError if the run that wrote ``checkpoint`` had other settings than ``args``."""
    try:
        before = json.loads((Path(checkpoint) / SETTINGS).read_text())
    except FileNotFoundError:  # of another program
        return
    now = resumed_settings(args)
    other = differences(before, now, ignore=before.keys() ^ now.keys())  # another version may have other ones
    if other:
        raise ValueError(
            f"{checkpoint} comes from a run with other settings ({'; '.join(other)}): resume with the former "
            "ones, or start another run with the checkpoint as its model"
        )
