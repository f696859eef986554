"""Batch-scheduled sampling in TRL's ``SFTTrainer``: ``from selfgen.trl import SFTConfig, SFTTrainer`` is all it takes.

Data, loss, metrics, adapters and checkpoints are TRL's. What changes is the ids that a step learns under: before each
optimizer step, self tokens take the place of learned ones in ``input_ids``, as in ``BSSTrainer``. Tested with TRL 1.16
and 0.25.1, which is a year older.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import trl
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainingArguments
from trl.trainer import sft_trainer

from .context.models import vocab_size_of
from .data.batches import IGNORE_INDEX, ROWS
from .training.config import MixingOptions
from .training.engines import engine_of
from .training.mixing import MixesContexts
from .training.schedules import Schedule

__all__ = ["SFTConfig", "SFTTrainer"]

logger = logging.getLogger(__name__)

_TAKEN = {"input_ids", "labels", "attention_mask"}  # columns of a batch that can be mixed
_REFUSED = {
    "packing": "several rows of a batch would be one, and the contexts of a row would see the row before it",
    "padding_free": "the rows of a batch would be one, and the contexts of a row would see the row before it",
    "use_liger_kernel": "nobody has compared contexts of Liger's layers with those of the model's own",
}
_MEASURES_LEARNED = hasattr(sft_trainer, "add_fused_lm_head")  # else all places, also those that passes leave out


@dataclass
class SFTConfig(MixingOptions, trl.SFTConfig):
    """``trl.SFTConfig``, and the options of ``BSSConfig`` that tell how contexts are mixed: ``self_prob``, ...

    Raises:
        ValueError: as of ``BSSConfig``; or ``packing``, ``padding_free`` or ``use_liger_kernel``.
    """

    _argument_group_name = "training (trl.SFTConfig)"

    def __post_init__(self):
        super().__post_init__()
        for name, why in _REFUSED.items():
            if getattr(self, name):
                raise ValueError(f"{name} is given, but {why}: leave {name} out (context passes have no padding)")


class SFTTrainer(MixesContexts, trl.SFTTrainer):
    """``trl.SFTTrainer`` whose training steps have contexts that are partly the model's own.

    A token may be a self token if it is learned, which TRL's options decide: the completion of a prompt, the turns of
    the assistant, or all of a text after its first token. The loss is TRL's: each label is the reference. Rows are told
    apart by what is in them, so that a row has the same context in any order of the data.

    The log has the figures of ``BSSTrainer`` beside TRL's, which are measured under the contexts. Evaluation is TRL's,
    under references.

    Args:
        model, **kwargs: of ``trl.SFTTrainer``.
        args: ``SFTConfig``; one of TRL's gets the options of mixing with their defaults.
        schedule: as of ``BSSTrainer``.

    Raises:
        ValueError: what contexts can't be made with, by name: options as of ``SFTConfig``, images, or a model whose
            weights are split over processes; and, by ``train``, batches of a ``data_collator`` that are not padded on
            the right, have other columns than ``input_ids``, ``labels`` and ``attention_mask``, or other labels than
            their ids.

    Example:
        >>> config = SFTConfig("outputs/bss", self_prob=0.1, max_steps=100)
        >>> SFTTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", config, train_dataset=rows).train()
    """

    def __init__(
        self, model: Any, args: TrainingArguments | None = None, *more, schedule: Schedule | None = None, **kwargs
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = SFTConfig(f"{name.split('/')[-1]}-SFT")
        elif not isinstance(args, SFTConfig):
            args = _with_options(args)
        super().__init__(model, args, *more, **kwargs)
        if self._is_vision_dataset:
            raise ValueError("the rows have images, and contexts can't be made with them: train on text alone")
        self._take_model(
            self.model, self.args, getattr(self.processing_class, "tokenizer", self.processing_class), schedule
        )
        self._engine = engine_of(self)
        if self._engine.splits_weights or self.is_deepspeed_enabled:
            raise ValueError(
                "the weights are split over processes (FSDP, DeepSpeed, tensor parallelism), which was not tried with "
                "TRL's trainer: use DDP, or selfgen.BSSTrainer"
            )
        self._begin_mixing()
        if not (self.completion_only_loss or self.args.assistant_only_loss):
            logger.warning(
                "all tokens of a row are learned, so self tokens take the place of a prompt's, too: to mix answers "
                "alone, give rows with prompt and completion, or assistant_only_loss=True"
            )

    def _learn_of_loss(self) -> None:
        """Whether passes may be the forward of TRL's loss."""
        reasons = {
            "activation_offloading moves what a layer keeps": self.args.activation_offloading,
            "this loss has a second forward": self.compute_loss_func is not None or self.label_smoother is not None,
            "this version of TRL measures entropy where passes compute nothing": not _MEASURES_LEARNED,
        }
        for reason, holds in reasons.items():
            if holds and self._reuse.on:
                self._reuse.off(reason)

    def _ids_guessed_from(self) -> int | None:
        args = self.args
        is_plain = args.loss_type != "dft" and self.compute_loss_func is None and not args.label_smoothing_factor
        return vocab_size_of(self.generator.model) if is_plain and not self.aux_loss_enabled else None

    def prepare_batches(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Tell where in each row the answer is, and which row it is."""
        return [batch | _rows_in(batch) for batch in batches]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        compute_loss = super().compute_loss
        given = {name: value for name, value in inputs.items() if name not in ROWS}
        measured = {mode: {name: [*values] for name, values in of.items()} for mode, of in self._metrics.items()}
        tokens: int = self._total_train_tokens  # type: ignore[has-type]

        def loss(used):
            for mode, of in measured.items():  # a trial of the passes counts nothing
                self._metrics[mode].clear()
                self._metrics[mode].update({name: [*values] for name, values in of.items()})
            self._total_train_tokens = tokens
            with nullcontext() if used is model else _gathers_nothing(self.accelerator):
                return compute_loss(used, dict(given), return_outputs, num_items_in_batch)

        return self._loss_of_step(model, loss, inputs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._go_on_from(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


@contextmanager
def _gathers_nothing(accelerator: Accelerator) -> Iterator[None]:
    """Inside, a process computes TRL's metrics of its own rows: it may be the only one that tries the passes."""
    accelerator.gather_for_metrics = lambda mine, *_: mine
    try:
        yield
    finally:
        del accelerator.gather_for_metrics


def _with_options(args: TrainingArguments) -> SFTConfig:
    """``args`` of TRL or transformers with the options of mixing, by default."""
    given = args.to_dict()
    given |= {name: getattr(args, name) for name in given if name.endswith("_token")}  # which to_dict hides
    try:
        return SFTConfig(**given)
    except TypeError as error:
        raise TypeError(
            f"args is a {type(args).__name__}, and {error}: give a selfgen.trl.SFTConfig, or a subclass of it"
        ) from error


def _rows_in(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns ROWS of a collated batch: the prompt ends at the first learned token, the answer at the last one.

    A row without learned tokens has none. The first token of a row is never learned, as nothing stands before it, and
    its label says so.
    """
    if more := sorted(batch.keys() ^ _TAKEN):
        raise ValueError(
            f"the batch has, or lacks, {', '.join(more)}; accepted: {', '.join(sorted(_TAKEN))}. Contexts are made of "
            "text alone, in rows of their own"
        )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = batch["labels"].clone()  # a collator may give the ids themselves, over which contexts are written
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError("the rows of the batch are padded on the left: pad on the right, as TRL's own collator does")
    labels[:, 0] = IGNORE_INDEX
    learned = labels != IGNORE_INDEX
    if (learned & ((labels != ids) | (mask == 0))).any():
        raise ValueError("the batch has labels that are not its input_ids: contexts are mixed with the labels")
    learns = learned.any(1)
    first = learned.int().argmax(1)
    end = ids.shape[1] - learned.flip(1).int().argmax(1)
    lengths = {"prompt_length": first * learns, "answer_length": (end - first) * learns}
    keys = zip(ids.tolist(), labels.tolist(), (end * learns).tolist(), strict=True)
    sample_ids = torch.tensor([_hash_of(row[:size], of[:size]) for row, of, size in keys], device=ids.device)
    return {"labels": labels, "sample_id": sample_ids, **lengths}


def _hash_of(ids: list[int], labels: list[int]) -> int:
    """One int64 for each row: what is in it."""
    text = f"{ids}{labels}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
