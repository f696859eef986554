"""From any usual fine-tuning data set to padded batches: load rows, tokenize them into prompt and answer, collate.

>>> rows = load_rows("openai/gsm8k", config_name="main")
>>> examples, report = tokenize_rows(
...     rows, tokenizer, max_length=512, prompt_column="question", completion_column="answer"
... )
>>> batch = Collator(pad_token_id=tokenizer.eos_token_id)([examples[0], examples[1]])
"""

from .batches import IGNORE_INDEX, Collator, pad_token_id, rows_of, write_contexts_into
from .loading import load_rows
from .templates import ChatTemplate, answer_ends, text_after_answer
from .tokenizing import (
    DataError,
    DataReport,
    RowOptions,
    check_sample_ids,
    sample_ids_of,
    tokenize_prompts,
    tokenize_rows,
)

__all__ = [
    "IGNORE_INDEX",
    "ChatTemplate",
    "Collator",
    "DataError",
    "DataReport",
    "RowOptions",
    "answer_ends",
    "check_sample_ids",
    "load_rows",
    "pad_token_id",
    "rows_of",
    "sample_ids_of",
    "text_after_answer",
    "tokenize_prompts",
    "tokenize_rows",
    "write_contexts_into",
]
