"""``BASHTrainer``: training on contexts that were written beforehand, as they are (arXiv 2410.14655, BASH).

Where the paper leaves freedom, these are our choices. A row has one context, however often it is trained on. The loss
is that of the online variant: the reference is the target at every answer token, also where the context before it has
self tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from ..context import ContextStats
from ..context.models import vocab_size_of
from ..data import Collator, rows_of, write_contexts_into
from ..data.streams import refuse_stream
from ..stored_contexts import CONTEXT_COLUMNS, ROW_COLUMNS, load_contexts
from .batches import LEARN_ON
from .bss import BSSTrainer
from .config import BSSConfig


@dataclass
class ContextCollator(Collator):
    """``Collator`` for rows that have contexts: ``input_ids`` hold the context in place of the answer.

    ``labels`` are still those of the reference, and ``is_self`` (bool [B, L]) is true on self tokens. Rows without
    contexts give the batch of ``Collator``.
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(features)
        if not set(CONTEXT_COLUMNS) <= set(features[0]):
            return batch
        batch["is_self"] = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for column, name in (("input_ids", "context_ids"), ("is_self", "is_self")):
            write_contexts_into(batch, [row[name] for row in features], column)
        return batch


class BASHTrainer(BSSTrainer):
    """Fine-tune on contexts that were written beforehand (arXiv 2410.14655, Batch-scheduled Sampling).

    The step is that of ``BSSTrainer`` with these contexts. Nothing is generated, and the options of ``BSSConfig`` for
    making contexts have no effect. Logs have the same figures but for ``self_prob``; ``passes`` and
    ``computed_per_token`` are 0.

    Args:
        model, args, **kwargs: as of ``BSSTrainer``. Evaluation rows that have contexts are evaluated under these.
        train_dataset: the folder that ``write_contexts`` wrote, or rows as ``load_contexts`` returns them.

    Raises:
        OfflineError: (a ValueError) a folder without contexts, or whose contexts are not complete.
        ValueError: rows without contexts, longer than ``max_length``, or with ids that the model does not have; or
            ``loss_on`` is "after_switch", but a row's self tokens are no prefix.

    Example:
        >>> config = BSSConfig("outputs/bash", num_train_epochs=1)
        >>> BASHTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", config, train_dataset="contexts").train()
    """

    collator_class = ContextCollator
    _makes_contexts = False

    def __init__(
        self, model: PreTrainedModel | torch.nn.Module | str, args: BSSConfig, *, train_dataset=None, **kwargs
    ):
        if isinstance(train_dataset, str | Path):
            train_dataset = load_contexts(train_dataset)
        refuse_stream(train_dataset, "stored contexts")
        if train_dataset is not None:
            missing = [name for name in (*ROW_COLUMNS, *CONTEXT_COLUMNS) if name not in train_dataset.column_names]
            if missing:
                raise ValueError(f"the rows lack {', '.join(missing)}; give the folder that write_contexts wrote")
            self._has_self_tokens = any(any(row) for row in train_dataset["is_self"])
            if args.loss_on == "after_switch":
                _check_prefixes(train_dataset)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        if train_dataset is not None:
            vocab_size = self.generator.vocab_size or vocab_size_of(self.generator.model)
            _check_fit(train_dataset, vocab_size, args.max_length)

    def mix(self, batches: list[dict[str, Tensor]]) -> tuple[ContextStats, None]:
        """The contexts are in ``input_ids`` already; tell what they are like."""
        self_tokens = agreeing = 0
        for batch in batches:
            is_self = batch["is_self"]
            self_tokens += int(is_self.sum())
            agreeing += int((is_self & (batch["input_ids"] == batch["labels"])).sum())
        lengths = [
            torch.cat([batch[name] for batch in batches]).tolist() for name in ("prompt_length", "answer_length")
        ]
        if (learn := LEARN_ON.get(self.args.loss_on)) and self._has_self_tokens:
            for batch in batches:
                for row, is_self in zip(rows_of(batch), batch["is_self"], strict=True):
                    learn(row.labels, is_self[len(row.prompt) :][: len(row.labels)])
        agreement = agreeing / self_tokens if self_tokens else 1.0
        return replace(ContextStats.untouched(*lengths), self_tokens=self_tokens, agreement=agreement), None

    def _told_of_contexts(self) -> str:
        return "as they were written beforehand"

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = {name: value for name, value in inputs.items() if name != "is_self"}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _runs_passes(self) -> bool:
        return False


def _check_prefixes(rows: Dataset) -> None:
    """Raise ValueError if the self tokens of a row are not the first ones of its context."""
    for sample_id, is_self in zip(rows["sample_id"], rows["is_self"], strict=True):
        if is_self != sorted(is_self, reverse=True):
            raise ValueError(
                f"loss_on is 'after_switch', but in the context of row {sample_id} a self token follows a reference "
                "token: write contexts with granularity=prefix, or give loss_on=all or after_self"
            )


def _check_fit(rows: Dataset, vocab_size: int, max_length: int | None) -> None:
    """Raise ValueError if the contexts have other ids, as those of a model with another tokenizer, or are too long."""
    longest = highest = 0
    columns = ["prompt_ids", "answer_ids", "context_ids"]
    for part in rows.select_columns(columns).with_format("arrow").iter(10_000):
        ids = [part[name] for name in columns]
        longest = max(longest, pc.max(pc.add(*map(pc.list_value_length, ids[:2]))).as_py())
        highest = max(highest, *(pc.max(pc.list_flatten(column)).as_py() for column in ids))
    if highest >= vocab_size:
        raise ValueError(
            f"the contexts have the token id {highest}, but the model has {vocab_size} ids; write them with a "
            "model that has the same tokenizer"
        )
    if max_length is not None and longest > max_length:
        raise ValueError(f"the longest row of the contexts has {longest} tokens; raise max_length ({max_length})")
