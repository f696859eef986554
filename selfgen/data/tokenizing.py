"""Rows as token ids of a prompt and of an answer; what can't be learned from is dropped and counted."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .loading import require_map_style
from .templates import answer_ends, check_turns, render

# What becomes of a row: one of these two, or a reason to drop it.
_KEPT = "kept"
_TRUNCATED = "truncated"
_EMPTY_ANSWER = "empty answer"
_EMPTY_PROMPT = "empty prompt"
_NO_ASSISTANT = "no assistant turn at the end"
_PROMPT_FILLS = "prompt fills max_length"


@dataclass(frozen=True)
class DataReport:
    """What `tokenize_rows` did: `dropped` maps each reason to its number of rows, and `kept` includes `truncated`."""

    rows: int
    kept: int
    truncated: int
    dropped: dict[str, int]
    max_length: int

    @property
    def level(self) -> int:
        """Of logging: rows that are dropped or cut are worth a warning."""
        return logging.WARNING if self.dropped or self.truncated else logging.INFO

    def __str__(self) -> str:
        parts = [f"{self.rows} rows: {self.kept} kept"]
        if self.truncated:
            parts.append(f"{self.truncated} answers truncated to {self.max_length} tokens")
        if self.dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            parts.append(f"{sum(self.dropped.values())} dropped ({reasons})")
        return ", ".join(parts)


def tokenize_rows(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    messages_column: str = "messages",
    apply_chat_template: bool | None = None,
    num_proc: int | None = None,
) -> tuple[datasets.Dataset, DataReport]:
    """Tokenize every row into a prompt and an answer.

    A row holds a prompt and a completion, each a text or a list of `{"role", "content"}` messages (a text completion of
    a message prompt is an assistant turn), or one list of messages. In messages the last turn must be the assistant's:
    it is the answer, and all before it is the prompt. If a data set has both forms, prompt and completion are used.

    With a chat template, texts become a user and an assistant turn, and the answer ends with the EOS or the special
    token that the template ends it with (`answer_ends`). Without one, the prompt gets the tokenizer's own special
    tokens (a BOS, never an EOS). An answer that nothing ends gets an EOS. One that does not fit into `max_length` loses
    its right end, EOS included. Rows with an empty answer, an empty prompt, a prompt of `max_length` tokens or more, or
    no assistant turn at the end are dropped and counted.

    Args:
        max_length: the most tokens of prompt and answer together, at least 2.
        apply_chat_template: None applies `tokenizer.chat_template` if there is one; False never does.
        num_proc: the number of processes of `Dataset.map`.

    Returns:
        The data set of the kept rows, in order, and the report. Columns: `sample_id` (int64: the data set's own
        `sample_id`, or else the number of the row in `dataset`), `prompt_ids` and `answer_ids` (lists of int64, never
        empty, of at most `max_length` together). The result is cached by `datasets`, as every `map` is.

    Raises:
        ValueError: columns are missing; messages without a chat template; a template that rejects a row or that is not
            prefix preserving; a tokenizer without EOS (a pad token is not needed: pad with EOS, the `Collator` masks
            it); a `sample_id` column that is not unique integers; no row left.
        TypeError: a cell that is None or neither text nor messages, named by row and column; a streaming data set.
    """
    require_map_style(dataset)
    if max_length < 2:
        raise ValueError(f"max_length={max_length} has no room for a prompt and an answer; give at least 2")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so an answer could not end; set tokenizer.eos_token")
    if apply_chat_template and not tokenizer.chat_template:
        raise ValueError("apply_chat_template=True, but the tokenizer has none; set tokenizer.chat_template")

    dataset = dataset.with_format(None)
    columns = _find_columns(dataset.column_names, prompt_column, completion_column, messages_column)
    check_sample_ids(dataset)
    tokenized = dataset.map(
        _tokenize_batch,
        batched=True,
        with_indices=True,
        fn_kwargs={
            "tokenizer": tokenizer,
            "ends": sorted(answer_ends(tokenizer)),  # rows that were cached without them are others
            "columns": columns,
            "use_template": apply_chat_template is not False and bool(tokenizer.chat_template),
            "max_length": max_length,
        },
        remove_columns=dataset.column_names,
        features=datasets.Features(
            sample_id=datasets.Value("int64"),
            prompt_ids=datasets.List(datasets.Value("int64")),
            answer_ids=datasets.List(datasets.Value("int64")),
            outcome=datasets.Value("string"),
        ),
        num_proc=num_proc,
        desc="Tokenizing",
    )

    outcomes = tokenized["outcome"][:]
    kept = [row for row, outcome in enumerate(outcomes) if outcome in (_KEPT, _TRUNCATED)]
    counts = Counter(outcomes)
    report = DataReport(
        rows=len(outcomes),
        kept=len(kept),
        truncated=counts[_TRUNCATED],
        dropped={reason: n for reason, n in counts.most_common() if reason not in (_KEPT, _TRUNCATED)},
        max_length=max_length,
    )
    if not kept:
        raise ValueError(f"no row is left to train on; {report}. Check the columns and max_length={max_length}")
    tokenized = tokenized.remove_columns("outcome")
    return (tokenized if len(kept) == len(outcomes) else tokenized.select(kept)), report


def _find_columns(present: list[str], prompt: str, completion: str, messages: str) -> tuple[str, ...]:
    """(prompt, completion) or (messages,), whichever `present` has."""
    if {prompt, completion} <= set(present):
        return prompt, completion
    if messages in present:
        return (messages,)
    raise ValueError(
        f"the data set has the columns {', '.join(present)}, but neither {prompt!r} and {completion!r} (each text or "
        f"messages) nor {messages!r} (a conversation); name them with prompt_column and completion_column "
        "(GSM8K: --prompt-column question --completion-column answer), or with messages_column"
    )


def check_sample_ids(dataset: datasets.Dataset) -> None:
    """Raise ValueError unless the column `sample_id`, if there is one, holds a different integer in every row."""
    if "sample_id" not in dataset.column_names:
        return
    dtype = str(getattr(dataset.features["sample_id"], "dtype", "no number"))
    unique = set(dataset["sample_id"][:]) if dtype.startswith(("int", "uint")) else set()
    if len(unique) != len(dataset) or None in unique:
        raise ValueError(
            f"the column 'sample_id' ({dtype}, {len(dataset)} rows) must hold a different integer in every row; "
            "rename or remove it to number the rows instead"
        )


def _tokenize_batch(
    batch: Any,
    rows: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    columns: tuple[str, ...],
    use_template: bool,
    max_length: int,
) -> dict[str, list]:
    """A batch of `Dataset.map`: the output columns of `tokenize_rows`, and the `outcome` of each row."""
    cells = zip(*(batch[column] for column in columns), strict=True)
    texts = [
        _read_row(row, dict(zip(columns, values, strict=True)), tokenizer, use_template)
        for row, values in zip(rows, cells, strict=True)
    ]
    prompts, answers, outcomes = map(list, zip(*texts, strict=True))
    all_prompt_ids = tokenizer(prompts, add_special_tokens=not use_template, verbose=False).input_ids
    all_answer_ids = tokenizer(answers, add_special_tokens=False, verbose=False).input_ids

    eos = tokenizer.eos_token_id
    appends_eos = not use_template and tokenizer("a").input_ids[-1:] == [eos]
    for i, (prompt_ids, answer_ids) in enumerate(zip(all_prompt_ids, all_answer_ids, strict=True)):
        if appends_eos:
            prompt_ids.pop()
        end = next((place for place, token in enumerate(answer_ids) if token in ends), None)
        if use_template and end is not None:
            del answer_ids[end + 1 :]  # templates write "\n" after the end of a turn, or an EOS at the end of all
        elif answer_ids and answer_ids[-1] != eos:
            answer_ids.append(eos)
        if outcomes[i] == _KEPT:
            outcomes[i] = _judge_lengths(len(prompt_ids), len(answer_ids), max_length)
            del answer_ids[max(max_length - len(prompt_ids), 0) :]

    return {
        "sample_id": batch.get("sample_id", rows),
        "prompt_ids": all_prompt_ids,
        "answer_ids": all_answer_ids,
        "outcome": outcomes,
    }


def _judge_lengths(prompt_length: int, answer_length: int, max_length: int) -> str:
    if answer_length == 0:
        return _EMPTY_ANSWER
    if prompt_length == 0:
        return _EMPTY_PROMPT
    if prompt_length >= max_length:
        return _PROMPT_FILLS
    return _TRUNCATED if prompt_length + answer_length > max_length else _KEPT


def _read_row(
    row: int, cells: dict[str, Any], tokenizer: PreTrainedTokenizerBase, use_template: bool
) -> tuple[str, str, str]:
    """(prompt text, answer text, outcome) of a row given as column -> cell."""
    match list(cells.values()):
        case [str(prompt), str(answer)] if not use_template:
            return (prompt, answer, _KEPT) if answer.strip() else ("", "", _EMPTY_ANSWER)
        case [str(prompt), str(answer)]:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        case [list(prompt), str(answer)]:
            turns = [*prompt, {"role": "assistant", "content": answer}]
        case [list(prompt), list(completion)]:
            turns = prompt + completion
        case [list(turns)]:
            pass
        case _:
            given = " and ".join(f"{column!r} is {type(cell).__name__}" for column, cell in cells.items())
            raise TypeError(
                f"row {row}: {given}; accepted are a prompt and a completion that are both text or both lists of "
                "messages, a list of messages and a text, or one conversation as a list of messages"
            )
    if not use_template:
        raise ValueError(
            f"row {row} holds messages, which need a chat template: set tokenizer.chat_template (and leave "
            "apply_chat_template unset), or give prompt and completion as text"
        )
    turns = check_turns(row, list(cells), turns)
    if not turns or turns[-1]["role"] != "assistant":
        return "", "", _NO_ASSISTANT
    if not turns[-1]["content"].strip():
        return "", "", _EMPTY_ANSWER
    if len(turns) == 1:
        return "", "", _EMPTY_PROMPT
    return *render(row, turns, tokenizer), _KEPT


@dataclass
class RowOptions:
    """Which columns of a data set are prompts and answers, and what becomes of them; see ``tokenize_rows``."""

    max_length: int = field(
        default=1024, metadata={"help": "Longest row in tokens, prompt included; longer answers are cut and counted."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the prompt (text or messages)."})
    completion_column: str = field(
        default="completion", metadata={"help": "Column with the reference answer (text or messages)."}
    )
    messages_column: str = field(
        default="messages",
        metadata={"help": "Column with a conversation whose last assistant turn is the reference answer."},
    )
    apply_chat_template: bool | None = field(
        default=None, metadata={"help": "Use the tokenizer's chat template; by default if it has one."}
    )

    def tokenize(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
    ) -> tuple[Dataset, DataReport]:
        return tokenize_rows(
            rows,
            tokenizer,
            max_length=self.max_length if max_length is None else max_length,
            prompt_column=self.prompt_column,
            completion_column=self.completion_column,
            messages_column=self.messages_column,
            apply_chat_template=self.apply_chat_template,
        )
