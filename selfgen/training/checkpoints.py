"""What a checkpoint says of the run that wrote it, which one a run is resumed from, and what a run may write over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from transformers import TrainingArguments

from ..files import alone
from ..provenance import differences
from .config import BSSConfig

SETTINGS = "selfgen.json"  # next to the weights of every checkpoint
_MAY_CHANGE = {
    "context_method", "token_budget", "balance", "context_micro_batches", "own_answer_batch_size", "cuda_graphs",
    "reuse_passes", "lean_loss",
}  # fmt: skip


_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_model*")
_OF_MODELS = (
    *_WEIGHTS, "config.json", "generation_config.json", "adapter_config.json", "tokenizer*", "chat_template*",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", SETTINGS,
    "training_args.bin", "trainer_state.json",
)  # fmt: skip
_TELLING = (*_WEIGHTS, "config.json", "adapter_config.json", SETTINGS, "training_args.bin", "trainer_state.json",
            "provenance.json")  # fmt: skip
"""Files by which a folder is known to hold a model, what a run left, or contexts."""


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


@contextmanager
def output_of(
    args: BSSConfig, *, overwrite: bool = False, rounds: bool = False, error: type[ValueError] = ValueError
) -> Iterator[None]:
    """Keep other runs out of ``args.output_dir`` until the block ends.

    Args:
        overwrite: allow a model there, but no checkpoints and no rounds, which would be taken for those of this run.
        rounds: this run has rounds.

    Raises:
        error: another run is writing there, or it holds something else than the run that ``args`` continues, if any.
    """
    folder = Path(args.output_dir)
    if not (folder / ".lock").exists():  # so that a folder that is refused gets none
        _check_output(args, overwrite, rounds, error)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder, error):
        _check_output(args, overwrite, rounds, error)
        yield


def _check_output(args: BSSConfig, overwrite: bool, rounds: bool, error: type[ValueError]) -> None:
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    earlier = {
        "rounds already": any(folder.glob("round-*")),
        "checkpoints of an earlier run": any(folder.glob("checkpoint-*/trainer_state.json")),
    }
    own, other = earlier if rounds else reversed(earlier)
    if earlier[other]:
        raise error(f"{folder} has {other}, of another method: give another output_dir, or remove them")
    if earlier[own] and resume is None:
        raise error(
            f"{folder} has {own}; continue them (--resume-from-checkpoint last), or give another output_dir, or remove "
            "them"
        )
    if (earlier[own] and resume == "last") or (resume and Path(resume).resolve().parent == folder.resolve()):
        return
    found = [file.name for file in _files(folder, _TELLING)]
    if found and not overwrite:
        raise error(
            f"{folder} holds a model or another run ({', '.join(found[:3])}{', ...' * (len(found) > 3)}), which this "
            "run would write over: give another output_dir, or --overwrite-output-dir yes to lose what is there"
        )


def remove_model(folder: str | Path) -> None:
    """Remove the files of a model from ``folder``: what is left of one would be taken for a part of the next."""
    for file in _files(Path(folder), _OF_MODELS):
        file.unlink()


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
