"""Held-out loss under reference contexts and under the model's own mixed contexts: the gap that BSS works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from .context import ContextGenerator
from .context.generator import inference
from .data import IGNORE_INDEX, Collator


@dataclass(frozen=True)
class ContextLoss:
    """Mean cross-entropy to the reference answer, in nats a token.

    ``reference``: each token predicted from the reference before it (teacher forcing). ``mixed``: from a context whose
    tokens are the model's own with probability p, made by the model that is evaluated.
    """

    reference: float
    mixed: float


def context_loss(
    generator: ContextGenerator,
    rows: Dataset,
    self_prob: float,
    *,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> ContextLoss:
    """Evaluate ``generator.model`` on tokenized rows (columns of ``tokenize_rows``) under both kinds of contexts.

    Args:
        generator: of the model to evaluate; it is run in eval mode.
        rows: with ``sample_id``, ``prompt_ids`` and ``answer_ids``.
        self_prob: of the mixed contexts, in [0, 1].
        seed: of the mixed contexts; the same for all models that are compared.
        batch_size: rows a forward.
        progress: show a bar with the time left.
    """
    if len(rows) == 0:
        raise ValueError("there are no rows to evaluate on")
    model = generator.model
    collate = Collator(pad_token_id=0)  # padding is masked
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    starts = range(0, len(rows), batch_size)
    with inference(model):
        for start in tqdm(starts, desc="Held-out loss", disable=not progress, leave=False):
            part = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            reference = [row["answer_ids"] for row in part]
            mixed = generator.generate(
                [row["prompt_ids"] for row in part],
                reference,
                self_prob,
                seed=seed,
                sample_ids=[row["sample_id"] for row in part],
            )
            batch = {key: value.to(model.device) for key, value in collate(part).items()}
            for which, contexts in enumerate((None, mixed.tokens)):
                sums[which] += _answer_loss(model, batch, contexts).double().cpu()
            count += sum(len(answer) for answer in reference)
    return ContextLoss(*(sums / count).tolist())


def _answer_loss(model, batch: dict[str, Tensor], contexts: list[Tensor] | None) -> Tensor:
    """Summed loss of the answers, with ``contexts`` (or the reference) as input."""
    input_ids = batch["input_ids"].clone()
    if contexts is not None:
        for row, prompt, tokens in zip(input_ids, batch["prompt_length"].tolist(), contexts, strict=True):
            row[prompt : prompt + len(tokens)] = tokens
    logits = model(input_ids=input_ids, attention_mask=batch["attention_mask"], use_cache=False).logits  # [B, L, V]
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORE_INDEX
    return F.cross_entropy(logits[:, :-1][learned].float(), labels[learned], reduction="sum")
