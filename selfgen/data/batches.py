"""Padded batches of tokenized rows."""

from dataclasses import dataclass
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
        `labels` [B, L]: the answer's ids in place, -100 on prompt and padding;
        `sample_id`, `prompt_length`, `answer_length` [B].
    """

    pad_token_id: int

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompt_length = torch.tensor([len(f["prompt_ids"]) for f in features])  # [B]
        answer_length = torch.tensor([len(f["answer_ids"]) for f in features])  # [B]
        rows = [torch.tensor([*f["prompt_ids"], *f["answer_ids"]]) for f in features]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)  # [B, L]

        position = torch.arange(input_ids.shape[1])  # [L]
        attention_mask = position < (prompt_length + answer_length)[:, None]  # [B, L]
        is_answer = attention_mask & (position >= prompt_length[:, None])  # [B, L]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask.long(),
            "labels": input_ids.masked_fill(~is_answer, IGNORE_INDEX),
            "sample_id": torch.tensor([f["sample_id"] for f in features]),
            "prompt_length": prompt_length,
            "answer_length": answer_length,
        }


@dataclass
class Row:
    """One row of a collated batch; ``answer`` is the view of ``input_ids`` that the mixed context goes to."""

    sample_id: int
    prompt: Tensor  # [P]
    answer: Tensor  # [T]
    reference: Tensor  # [T]


def rows_of(batch: dict[str, Tensor]) -> list[Row]:
    """Views of the rows of a collated batch."""
    missing = [name for name in ROWS if name not in batch]
    if missing:
        raise ValueError(f"the collated batch lacks {', '.join(missing)}; use selfgen.data.Collator or extend it")
    places = torch.arange(batch["labels"].shape[1], device=batch["labels"].device)
    first, learned = batch["prompt_length"][:, None], batch["labels"] != IGNORE_INDEX
    answers = (places >= first) & (places < first + batch["answer_length"][:, None])
    if ((answers & ~learned) | ((places == first - 1) & learned)).any():
        raise ValueError("the collated batch has no answer where its prompt_length ends: pad on the right only")
    rows = []
    bounds = zip(*(batch[name].tolist() for name in ROWS), strict=True)
    for index, (sample_id, prompt, answer) in enumerate(bounds):
        ids, labels = batch["input_ids"][index], batch["labels"][index]
        span = slice(prompt, prompt + answer)
        rows.append(Row(sample_id, ids[:prompt], ids[span], labels[span]))
    return rows


def lengths_of(batch: dict[str, list]) -> dict[str, list[int]]:
    pairs = zip(batch["prompt_ids"], batch["answer_ids"], strict=True)
    return {"length": [len(prompt) + len(answer) for prompt, answer in pairs]}


def pad_token_id(tokenizer) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("the tokenizer has neither a pad nor an eos token; set tokenizer.eos_token")
