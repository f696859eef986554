"""The offline variant in rounds: write contexts with the model as it is, train on them, continue with the new model.

This follows arXiv 2410.14655 (Algorithm 1, whose inputs are a pre-trained model and a training data set) with these
choices. The rows are shuffled once and cut into one part per round, so that each row is trained on in one round, under
contexts of the model that this round begins with. A self-probability schedule advances once per round.

Each round is a training run of its own: optimizer, warm-up and learning-rate schedule start over, and
``num_train_epochs`` and ``max_steps`` count for one round. So the model that writes the next contexts has been trained
to the end of its learning-rate schedule, and a round is resumed as any training run is.
"""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..context.models import max_positions, transformers_model
from ..files import at_home
from ..provenance import rows_hash
from ..stored_contexts import OfflineError, check_settings, write_contexts
from .bash import BASHTrainer
from .bss import tokenized
from .checkpoints import last_checkpoint, output_of, remove_model
from .config import BSSConfig, with_fixed_self_prob
from .ending import save_round
from .objective import check_has_teacher
from .schedules import Schedule
from .weights import check_finite, check_trainable

logger = logging.getLogger(__name__)


def split_rows(rows: Dataset, rounds: int, seed: int) -> list[Dataset]:
    """Shuffle ``rows`` and cut them into ``rounds`` parts, whose lengths differ by one at most."""
    if not 1 <= rounds <= len(rows):
        raise OfflineError(f"rounds is {rounds}; {len(rows)} rows can be split for 1 to {len(rows)} rounds")
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows.select(part) for part in np.array_split(order, rounds)]


def train_rounds(
    load: Callable[[str], PreTrainedModel],
    model: str,
    rows: Dataset,
    config: BSSConfig,
    *,
    rounds: int,
    processing_class: PreTrainedTokenizerBase,
    eval_dataset: Dataset | None = None,
    schedule: Schedule | None = None,
    shard_rows: int = 512,
    batch_size: int = 32,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Train ``model`` offline in ``rounds`` rounds.

    Round k writes ``round-k/contexts``, ``round-k/checkpoint-*``, ``round-k/trainer_state.json`` and ``round-k/model``
    to ``config.output_dir``, which at the end also holds the last model, as after any training. With
    ``config.resume_from_checkpoint="last"`` a run that was killed continues where it stopped: with the next shard of
    contexts, from the newest checkpoint of a round, or with the next round.

    Args:
        load: from a name or folder to a model, such as ``AutoModelForCausalLM.from_pretrained``; every round loads its
            model anew.
        model: the pre-trained model, for ``load``.
        rows: as ``BSSTrainer`` takes them.
        config: of every round. ``self_prob`` (0.1 if none is given) and its schedule, ``seed``,
            ``sampling_temperature``, ``context_method`` and ``token_budget`` are those of the contexts.
        processing_class: the tokenizer, which is saved with every model.
        eval_dataset, schedule: as in ``BSSTrainer``; here the schedule advances once per round.
        shard_rows, batch_size, provenance: as in ``write_contexts``.
        overwrite: put the last model in place of one that the output folder holds.
        trust_remote_code: as in ``BSSTrainer``, for ``config.kl_model`` and ``config.teacher_model``.

    Raises:
        OfflineError: (a ValueError) the output folder has rounds, and ``config`` does not ask to continue them; its
            rounds have other settings or rows; it holds a model; another process is writing it; or there can't be such
            rounds.
    """
    output, resume = Path(config.output_dir), config.resume_from_checkpoint
    if config.world_size > 1:
        raise OfflineError(
            "rounds run in one process. In several, write contexts with `selfgen contexts --output-dir DIR`, and then "
            "train on them with `selfgen train --method bash --contexts DIR`"
        )
    config = with_fixed_self_prob(config)
    if config.follows_steps:
        raise OfflineError(
            f"{config.told_of_following}: it follows what training steps measure, but the contexts of a round are made "
            "before its steps. Give numbers, and another schedule"
        )
    if float(config.warm_up) >= 1:
        raise OfflineError(
            f"self_prob_warmup is {config.warm_up}; here the schedule advances once per round, so give "
            "the warm-up as a share of the rounds, below 1"
        )
    if resume not in (None, "last"):
        raise OfflineError(f'resume_from_checkpoint is {resume!r}; rounds continue from "last" only')
    with output_of(config, overwrite=overwrite, rounds=True, error=OfflineError):
        parts = split_rows(tokenized("train", rows, processing_class, config, config.max_length), rounds, config.seed)
        last = _train_parts(
            load,
            at_home(model),
            parts,
            config,
            schedule,
            writing={"batch_size": batch_size, "shard_rows": shard_rows},
            provenance=provenance or {},
            training={
                "processing_class": processing_class,
                "eval_dataset": eval_dataset,
                "trust_remote_code": trust_remote_code,
            },
        )
        if overwrite:
            remove_model(output)
        shutil.copytree(last, output, dirs_exist_ok=True)


def _train_parts(
    load: Callable[[str], PreTrainedModel],
    model: str,
    parts: list[Dataset],
    config: BSSConfig,
    schedule: Schedule | None,
    *,
    writing: Mapping[str, Any],
    provenance: Mapping[str, Any],
    training: Mapping[str, Any],
) -> str:
    """One round per part, as far as they are not there; returns the folder of the last model.

    ``writing`` and ``provenance`` are of ``write_contexts``, ``training`` of ``BASHTrainer``.
    """
    output, rounds = Path(config.output_dir), len(parts)
    models = [model, *(str(output / f"round-{number}" / "model") for number in range(rounds))]
    for number, part in enumerate(parts):
        folder = output / f"round-{number}"
        self_prob = config.self_prob_at(number, rounds, schedule)
        if Path(models[number + 1]).is_dir():
            given = {"self_prob": self_prob, "seed": config.seed, "temperature": config.sampling_temperature}
            given |= {"masks": config.masks.describe()}
            check_settings(folder / "contexts", {**given, "rows": rows_hash(part)})
            continue
        logger.info("round %d of %d: %d rows", number + 1, rounds, len(part))
        current = load(models[number]).to(config.device)
        try:
            check_trainable(current)  # before contexts are written
            check_finite(current)
            check_has_teacher(config, current)
            _check_length(current, config)
        except ValueError as error:
            raise OfflineError(f"{models[number]}: {error}") from error
        generator = config.generator(current, training["processing_class"])
        with _autocast(config):
            write_contexts(
                generator,
                part,
                folder / "contexts",
                self_prob=self_prob,
                seed=config.seed,
                method=config.context_method,
                provenance={**provenance, "round": number, "rounds": rounds},
                progress=not config.disable_tqdm,
                **writing,
            )
        own = copy(config)
        own.output_dir = str(folder)
        trainer = BASHTrainer(current, own, train_dataset=folder / "contexts", **training)
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        save_round(trainer, folder)
        del current, trainer
        gc.collect()  # before the next model is loaded
    return models[-1]


def _check_length(model: PreTrainedModel, config: BSSConfig) -> None:
    """Raise ValueError if ``config`` allows rows that ``model`` has no positions for, as the trainer would."""
    limit = max_positions(transformers_model(model))
    if limit is not None and config.max_length is not None and config.max_length > limit:
        raise ValueError(f"max_length is {config.max_length}, but the model has {limit} positions; lower max_length")


def _autocast(config: BSSConfig) -> torch.autocast:
    """Mixed precision for the contexts where training has it."""
    dtype = torch.float16 if config.fp16 else torch.bfloat16
    return torch.autocast(config.device.type, dtype, enabled=config.fp16 or config.bf16)
