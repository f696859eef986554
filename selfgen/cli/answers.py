"""What ``selfgen generate`` and ``selfgen eval`` share: the answers of tokenized rows as text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..context import ContextGenerator
from ..data import RowOptions
from ..generation import answer, generate_corrected
from ..training.metrics import counted

logger = logging.getLogger(__name__)


def is_empty(text: str) -> bool:
    """Whether an answer says nothing, as of a model that ended it at once."""
    return not text.strip()


def tell_of_answers(lines: Sequence[dict[str, Any]], column: str) -> None:
    """Log how many answers are empty, and how many were broken off; a warning where these are half of them."""
    empty = sum(is_empty(line[column]) for line in lines)
    broken_off = sum(not line["finished"] for line in lines)
    level = logging.WARNING if 2 * max(empty, broken_off) >= len(lines) else logging.INFO
    logger.log(
        level,
        "%s: %d are empty, and %d were broken off at max_new_tokens or the end of the model's positions",
        counted(len(lines), "answer"),
        empty,
        broken_off,
    )


def answer_rows(
    generator: ContextGenerator,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    row_options: RowOptions,
    correction: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, list]:
    """The answer to each row's prompt as ``own_answer``, and whether the last one ended by itself as ``finished``.

    With ``correction``, the options of `generate_corrected`, there is also what the model made of its own answer, as
    ``corrected``. Rows have noise of their own; ``options`` are those of `answer`, and ``row_options`` those by
    which the rows became prompts.
    """
    prompts, sample_ids = ([row[name] for row in rows] for name in ("prompt_ids", "sample_id"))
    if correction is None:
        ends = sorted(row_options.answer_ends(tokenizer, generator.eos_token_ids))
        answers = answer(generator, prompts, sample_ids=sample_ids, eos_token_ids=ends, **options)
        tokens, finished = {"own_answer": answers.tokens}, answers.finished
    else:
        found = generate_corrected(
            generator, tokenizer, prompts, sample_ids=sample_ids, row_options=row_options, **correction, **options
        )
        tokens, finished = {"own_answer": found.first, "corrected": found.corrected}, found.finished
    texts = {name: row_options.answer_texts(tokenizer, ids) for name, ids in tokens.items()}
    return {**texts, "finished": finished}
