"""Held-out loss of reference answers under contexts whose tokens are self tokens with probability p.

p = 0 is teacher forcing; at p = 1 the model has made the whole context, which is called its own. A model that was
trained on references only gets worse along its own contexts (exposure bias: Ranzato et al. 2015, arXiv 1511.06732), so
losses are kept by position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..context import ContextGenerator
from ..context.generator import Method
from ..context.models import arguments_of
from ..data import IGNORE_INDEX, Collator, write_contexts_into
from ..data.streams import refuse_stream

_BUCKETS = 16  # at most, in a curve


@dataclass(frozen=True)
class PositionLoss:
    """Cross-entropy of reference answers in nats, summed over rows at each position of the answer."""

    sums: Tensor  # [T] float64
    counts: Tensor  # [T] int64: rows that reach so far

    @classmethod
    def of(cls, rows: Iterable[Tensor | Sequence[float]]) -> PositionLoss:
        """From the losses of each row's tokens, [T_i]."""
        losses = [torch.as_tensor(row, dtype=torch.float64) for row in rows]
        if not losses:
            raise ValueError("there are no rows to evaluate on; give at least one")
        lengths = torch.tensor([len(row) for row in losses])  # [R]
        sums = pad_sequence(losses, batch_first=True).sum(0)  # [T]
        return cls(sums, (torch.arange(len(sums)) < lengths[:, None]).sum(0))

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.sums.sum()) / self.tokens


def held_out_losses(
    generator: ContextGenerator,
    rows: Dataset,
    self_probs: Mapping[str, float],
    *,
    seed: int = 0,
    batch_size: int = 8,
    method: Method = "fixed_point",
    progress: bool = True,
) -> dict[str, PositionLoss]:
    """Evaluate ``generator.model`` on tokenized rows (columns of ``tokenize_rows``) under several kinds of contexts.

    Args:
        generator: the generator of the model to evaluate, which is run in eval mode.
        rows: with ``sample_id``, ``prompt_ids`` and ``answer_ids``.
        self_probs: a name -> the probability that a context token is a self token, in [0, 1].
        seed: of the contexts; give the same for all models that are compared.
        batch_size: rows per forward.
        method: of the contexts, as in ``ContextGenerator.contexts``.
        progress: show a bar with the time left.

    Example:
        >>> losses = held_out_losses(ContextGenerator(model), rows, {"reference": 0.0, "own": 1.0})
        >>> losses["own"].mean - losses["reference"].mean
    """
    found: dict[str, list[Tensor]] = {name: [] for name in self_probs}
    refuse_stream(rows, "losses")
    for start in tqdm(range(0, len(rows), batch_size), desc="Held-out loss", disable=not progress or None, leave=False):
        part = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        for name, losses in row_losses(generator, part, self_probs, seed=seed, method=method).items():
            found[name] += losses
    return {name: PositionLoss.of(losses) for name, losses in found.items()}


def row_losses(
    generator: ContextGenerator,
    rows: Sequence[dict[str, Any]],
    self_probs: Mapping[str, float],
    *,
    seed: int = 0,
    method: Method = "fixed_point",
) -> dict[str, list[Tensor]]:
    """The losses of one batch token by token: for each kind of context float32 [T_i] per row, on the CPU."""
    check_columns(rows)
    prompts, references, ids = ([row[name] for row in rows] for name in ("prompt_ids", "answer_ids", "sample_id"))
    losses = {}
    for name, self_prob in self_probs.items():
        mixed = generator.contexts(prompts, references, self_prob, seed=seed, sample_ids=ids, method=method)
        losses[name] = _token_losses(generator, rows, mixed.tokens)
    return losses


def check_columns(rows: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError if rows are not tokenized."""
    missing = [name for name in ("prompt_ids", "answer_ids", "sample_id") if rows and name not in rows[0]]
    if missing:
        raise ValueError(f"the rows lack {', '.join(missing)}; tokenize them with selfgen.data.tokenize_rows")


def _token_losses(generator: ContextGenerator, rows: Sequence[dict[str, Any]], contexts: list[Tensor]) -> list[Tensor]:
    """Cross-entropy of each reference token, [T_i] per row, with ``contexts`` as input."""
    logits, labels, lengths = answer_logits(generator, rows, contexts)
    return list(F.cross_entropy(logits.float(), labels, reduction="none").cpu().split(lengths))


def answer_logits(
    generator: ContextGenerator, rows: Sequence[dict[str, Any]], contexts: Sequence[Tensor | Sequence[int]]
) -> tuple[Tensor, Tensor, list[int]]:
    """Logits [N, V] and references [N] of all answer tokens, one row after another, and their number per row.

    The input is the ``contexts``, [T_i] per row.
    """
    model, collate = generator.model, Collator(pad_token_id=0)  # padding is masked
    batch = {key: value.to(model.device) for key, value in collate(list(rows)).items()}
    write_contexts_into(batch, contexts)
    with generator.computing():
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**arguments_of(model, **given, use_cache=False)).logits  # [B, L, V]
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORE_INDEX
    return logits[:, :-1][learned], labels[learned], batch["answer_length"].tolist()


def exposure_bias(reference: PositionLoss, own: PositionLoss, width: int | None = None) -> list[dict[str, float]]:
    """The losses under reference contexts and under own contexts along the answer, in buckets of ``width`` positions.

    Each bucket has its ``first`` and ``last`` position, the number of ``tokens`` there, the mean losses ``reference``
    and ``own``, and their ``gap``. Weighted by ``tokens``, the losses average to ``PositionLoss.mean``. By default
    ``width`` is the power of two from 8 on that gives at most 16 buckets.
    """
    if not torch.equal(reference.counts, own.counts):
        raise ValueError("the losses are of different rows: both must count the same tokens at each position")
    length = len(reference.counts)
    if width is None:
        width = 8
        while width * _BUCKETS < length:
            width *= 2
    if width < 1:
        raise ValueError(f"width is {width}; a bucket has at least one position")
    buckets = []
    for first in range(0, length, width):
        span = slice(first, first + width)
        tokens = int(reference.counts[span].sum())
        losses = [float(loss.sums[span].sum()) / tokens for loss in (reference, own)]
        buckets.append(
            {
                "first": first,
                "last": min(first + width, length) - 1,
                "tokens": tokens,
                "reference": losses[0],
                "own": losses[1],
                "gap": losses[1] - losses[0],
            }
        )
    return buckets
