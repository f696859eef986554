"""Padded batches of tokenized rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORE_INDEX = -100  # the label that the loss skips
ROWS = ("sample_id", "prompt_length", "answer_length")  # columns of a batch that tell where its rows are


@dataclass
class Collator:
    """Pad examples of `tokenize_rows` on the right into a batch of B rows and the length L of the longest.

    `pad_token_id` is the tokenizer's, or its `eos_token_id` where it has none: padding is masked either way.

    Returns a dict of int64 tensors:
        `input_ids` [B, L]: prompt, answer, padding;
        `attention_mask` [B, L]: 1 on prompt and answer, 0 on padding;
        `labels` [B, L]: the answer's ids in place, -100 on prompt and padding, and where `is_learned` is false in rows
            that have it;
        `sample_id`, `prompt_length`, `answer_length` [B].

    With rows of a stream that is trained on, `read` tells what was read for this batch (`data.streams.Read`).
    """

    pad_token_id: int

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        prompts, answers = ([torch.as_tensor(f[name]) for f in features] for name in ("prompt_ids", "answer_ids"))
        batch = self.pad(prompts, answers, [f["sample_id"] for f in features])
        for labels, row, prompt in zip(batch["labels"], features, prompts, strict=True):
            if row.get("is_learned") is not None:
                learned = torch.as_tensor(row["is_learned"], device=labels.device)
                labels[len(prompt) :][: len(learned)][~learned] = IGNORE_INDEX
        if read := [row["read"] for row in features if "read" in row]:
            batch["read"] = reduce(add, read)
        return batch

    def pad(self, prompts: list[Tensor], answers: list[Tensor], sample_ids: list[int]) -> dict[str, Tensor]:
        """The batch of B rows that are prompts [P_i] and answers [T_i], int64 on one device."""
        prompt_length, answer_length = (torch.tensor([len(row) for row in rows]) for rows in (prompts, answers))  # [B]
        rows = [torch.cat(row) for row in zip(prompts, answers, strict=True)]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)  # [B, L]

        position = torch.arange(input_ids.shape[1])  # [L]
        attention_mask = position < (prompt_length + answer_length)[:, None]  # [B, L]
        is_answer = attention_mask & (position >= prompt_length[:, None])  # [B, L]
        columns = {
            "attention_mask": attention_mask.long(),
            "sample_id": torch.tensor(sample_ids),
            "prompt_length": prompt_length,
            "answer_length": answer_length,
        }
        labels = input_ids.masked_fill(~is_answer.to(input_ids.device), IGNORE_INDEX)
        there = {name: column.to(input_ids.device) for name, column in columns.items()}
        return {"input_ids": input_ids, "labels": labels, **there}


@dataclass
class Row:
    """One row of a collated batch: views of its columns."""

    sample_id: int
    prompt: Tensor  # [P]
    answer: Tensor  # [T]: what ``input_ids`` have there, the reference or a mixed context
    labels: Tensor  # [T]: the reference, or -100 where it is not learned

    @property
    def reference(self) -> Tensor:
        """[T]: where tokens are not learned, contexts have the reference, too."""
        return torch.where(self.labels == IGNORE_INDEX, self.answer, self.labels)


def rows_of(batch: dict[str, Tensor]) -> list[Row]:
    """Views of the rows of a collated batch, but for those without an answer, whose lengths are 0."""
    missing = [name for name in ROWS if name not in batch]
    if missing:
        raise ValueError(f"the collated batch lacks {', '.join(missing)}; use selfgen.data.Collator or extend it")
    places = torch.arange(batch["labels"].shape[1], device=batch["labels"].device)
    first, learned = batch["prompt_length"][:, None], batch["labels"] != IGNORE_INDEX
    last = first + batch["answer_length"][:, None] - 1
    ends = (places == first) | (places == last)  # what is between them need not be learned
    if ((ends & ~learned & (last >= 0)) | ((places == first - 1) & learned)).any():
        raise ValueError("the collated batch has no answer where its prompt_length ends: pad on the right only")
    rows = []
    bounds = zip(*(batch[name].tolist() for name in ROWS), strict=True)
    for index, (sample_id, prompt, answer) in enumerate(bounds):
        ids, labels = batch["input_ids"][index], batch["labels"][index]
        span = slice(prompt, prompt + answer)
        if prompt + answer:
            rows.append(Row(sample_id, ids[:prompt], ids[span], labels[span]))
    return rows


def write_contexts_into(
    batch: dict[str, Tensor], contexts: Sequence[Tensor | Sequence[int]], column: str = "input_ids"
) -> None:
    """Write the context of each row, [T_i], over its answer in a column [B, L] of a collated batch."""
    spans = zip(batch["prompt_length"].tolist(), batch["answer_length"].tolist(), strict=True)
    for row, context, (prompt, answer) in zip(batch[column], contexts, spans, strict=True):
        row[prompt : prompt + answer] = torch.as_tensor(context, device=row.device)


def lengths_of(batch: dict[str, list]) -> dict[str, list[int]]:
    pairs = zip(batch["prompt_ids"], batch["answer_ids"], strict=True)
    return {"length": [len(prompt) + len(answer) for prompt, answer in pairs]}


def pad_token_id(tokenizer) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("the tokenizer has neither a pad nor an eos token; set tokenizer.eos_token")
