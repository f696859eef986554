"""Rows as token ids of a prompt and of an answer, or of a prompt alone; what can't be used is dropped and counted."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .loading import require_map_style
from .templates import answer_ends, check_turns, render, render_prompt

# What becomes of a row: one of these two, or a reason to drop it.
_KEPT = "kept"
_TRUNCATED = "truncated"
_EMPTY_ANSWER = "empty answer"
_EMPTY_PROMPT = "empty prompt"
_NO_ASSISTANT = "no assistant turn at the end"
_PROMPT_FILLS = "prompt fills max_length"

_IDS = datasets.List(datasets.Value("int64"))


@dataclass(frozen=True)
class DataReport:
    """What became of rows: `dropped` maps each reason to its number of rows, and `kept` includes `truncated`."""

    rows: int
    kept: int
    truncated: int
    dropped: dict[str, int]
    max_length: int | None

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
    tokens (a BOS, never an EOS). An answer with no such end gets an EOS. One that does not fit into `max_length` loses
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
    _check(tokenizer, max_length, apply_chat_template)
    names = (prompt_column, completion_column, messages_column)
    options = {
        "tokenizer": tokenizer,
        "ends": sorted(answer_ends(tokenizer)),  # rows that were cached without them are others
        "columns": _find_columns(dataset.column_names, *names),
        "use_template": apply_chat_template is not False and bool(tokenizer.chat_template),
        "max_length": max_length,
    }
    return _tokenize(dataset, _tokenize_batch, options, {"prompt_ids": _IDS, "answer_ids": _IDS}, num_proc)


def tokenize_prompts(
    dataset: datasets.Dataset | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    messages_column: str = "messages",
    apply_chat_template: bool | None = None,
    num_proc: int | None = None,
) -> tuple[datasets.Dataset, DataReport]:
    """Tokenize the prompt of every row, token for token as `tokenize_rows` does; there may be no answer to it.

    A row holds a prompt, a text or a list of messages, or a conversation, which is a prompt without the assistant's
    turn at its end. Where a prompt and its completion are both messages, those before the last are of the prompt, too;
    other completions are ignored. Rows with an empty prompt, or one of `max_length` tokens or more, are dropped
    and counted.

    Args:
        dataset: rows, or a list of texts, which are the prompts.
        max_length: the most tokens of prompt and answer together, at least 2; None is no limit.

    Returns, raises: as `tokenize_rows`, without `answer_ids` and what is wrong with answers.
    """
    if isinstance(dataset, Sequence) and not isinstance(dataset, str):
        dataset = datasets.Dataset.from_dict({prompt_column: list(dataset)})
    require_map_style(dataset)
    _check(tokenizer, max_length, apply_chat_template)
    names = (prompt_column, completion_column, messages_column)
    columns = _find_columns(dataset.column_names, *names, answers=False)
    options = {
        "tokenizer": tokenizer,
        "columns": columns,
        "is_conversation": columns[0] != prompt_column,
        "use_template": apply_chat_template is not False and bool(tokenizer.chat_template),
        "max_length": max_length,
    }
    return _tokenize(dataset, _tokenize_prompt_batch, options, {"prompt_ids": _IDS}, num_proc)


def _check(tokenizer: PreTrainedTokenizerBase, max_length: int | None, apply_chat_template: bool | None) -> None:
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length} has no room for a prompt and an answer; give at least 2")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so an answer could not end; set tokenizer.eos_token")
    if apply_chat_template and not tokenizer.chat_template:
        raise ValueError("apply_chat_template=True, but the tokenizer has none; set tokenizer.chat_template")


def _tokenize(
    dataset: datasets.Dataset,
    tokenize_batch: Callable[..., dict[str, list]],
    options: dict[str, Any],
    features: dict[str, Any],
    num_proc: int | None,
) -> tuple[datasets.Dataset, DataReport]:
    """The rows that `tokenize_batch` keeps, with `sample_id` and the columns of `features`, and the report."""
    dataset, max_length = dataset.with_format(None), options["max_length"]
    check_sample_ids(dataset)
    tokenized = dataset.map(
        tokenize_batch,
        batched=True,
        with_indices=True,
        fn_kwargs=options,
        remove_columns=dataset.column_names,
        features=datasets.Features(sample_id=datasets.Value("int64"), **features, outcome=datasets.Value("string")),
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
        raise ValueError(f"no row is left; {report}. Check the columns and max_length={max_length}")
    tokenized = tokenized.remove_columns("outcome")
    return (tokenized if len(kept) == len(outcomes) else tokenized.select(kept)), report


def _find_columns(
    present: list[str], prompt: str, completion: str, messages: str, *, answers: bool = True
) -> tuple[str, ...]:
    """(prompt, completion) or (messages,), whichever `present` has; without `answers` (prompt,) does, too."""
    if {prompt, completion} <= set(present):
        return prompt, completion
    if prompt in present and not answers:
        return (prompt,)
    if messages in present:
        return (messages,)
    wanted = f"{prompt!r} and {completion!r} (each text or messages)" if answers else f"{prompt!r} (text or messages)"
    raise ValueError(
        f"the data set has the columns {', '.join(present)}, but neither {wanted} nor {messages!r} (a conversation); "
        "name them with prompt_column and completion_column (GSM8K: --prompt-column question --completion-column "
        "answer), or with messages_column"
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
    all_prompt_ids = _prompt_ids(prompts, tokenizer, use_template)
    all_answer_ids = tokenizer(answers, add_special_tokens=False, verbose=False).input_ids

    eos = tokenizer.eos_token_id
    for i, (prompt_ids, answer_ids) in enumerate(zip(all_prompt_ids, all_answer_ids, strict=True)):
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


def _tokenize_prompt_batch(
    batch: Any,
    rows: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, ...],
    is_conversation: bool,
    use_template: bool,
    max_length: int | None,
) -> dict[str, list]:
    """A batch of `Dataset.map`: the output columns of `tokenize_prompts`, and the `outcome` of each row."""
    cells = zip(*(batch[column] for column in columns), strict=True)
    prompts = [
        _read_prompt(row, dict(zip(columns, values, strict=True)), tokenizer, use_template, is_conversation)
        for row, values in zip(rows, cells, strict=True)
    ]
    all_prompt_ids = _prompt_ids(prompts, tokenizer, use_template)
    outcomes = [_judge_prompt(len(prompt_ids), max_length) for prompt_ids in all_prompt_ids]
    return {"sample_id": batch.get("sample_id", rows), "prompt_ids": all_prompt_ids, "outcome": outcomes}


def _prompt_ids(prompts: list[str], tokenizer: PreTrainedTokenizerBase, use_template: bool) -> list[list[int]]:
    """Ids of texts; one without a template gets the tokenizer's special tokens, but no EOS at its end."""
    ids = tokenizer(prompts, add_special_tokens=not use_template, verbose=False).input_ids
    if not use_template and tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]:
        return [one[:-1] for one in ids]
    return ids


def _judge_lengths(prompt_length: int, answer_length: int, max_length: int) -> str:
    if answer_length == 0:
        return _EMPTY_ANSWER
    outcome = _judge_prompt(prompt_length, max_length)
    return _TRUNCATED if outcome == _KEPT and prompt_length + answer_length > max_length else outcome


def _judge_prompt(length: int, max_length: int | None) -> str:
    if length == 0:
        return _EMPTY_PROMPT
    return _PROMPT_FILLS if max_length is not None and length >= max_length else _KEPT


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
    turns = _checked_turns(row, list(cells), turns, use_template)
    if not turns or turns[-1]["role"] != "assistant":
        return "", "", _NO_ASSISTANT
    if not isinstance(turns[-1]["content"], str):
        where = f"row {row}, column {' or '.join(map(repr, cells))}"
        raise TypeError(f"{where}: the content of the answer must be text, not {turns[-1]['content']!r}")
    if not turns[-1]["content"].strip():
        return "", "", _EMPTY_ANSWER
    if len(turns) == 1:
        return "", "", _EMPTY_PROMPT
    return *render(row, turns, tokenizer), _KEPT


def _read_prompt(
    row: int, cells: dict[str, Any], tokenizer: PreTrainedTokenizerBase, use_template: bool, is_conversation: bool
) -> str:
    """The prompt's text of a row given as column -> cell; none if there are no turns."""
    match list(cells.values()):
        case [str(prompt), *_] if not is_conversation:
            if not use_template:
                return prompt
            turns = [{"role": "user", "content": prompt}]
        case [list(prompt), list(completion)] if all(isinstance(turn, dict) for turn in completion):
            turns = prompt + completion[:-1]
        case [list(turns), *_]:
            pass
        case [cell, *_]:
            accepted = "a conversation as a list of messages" if is_conversation else "text, or a list of messages"
            raise TypeError(f"row {row}: {next(iter(cells))!r} is {type(cell).__name__}; accepted is {accepted}")
    turns = _checked_turns(row, list(cells), turns, use_template)
    if is_conversation and turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return render_prompt(row, turns, tokenizer) if turns else ""


def _checked_turns(row: int, columns: list[str], turns: list[Any], use_template: bool) -> list[dict[str, Any]]:
    if not use_template:
        raise ValueError(
            f"row {row} holds messages, which need a chat template: set tokenizer.chat_template (and leave "
            "apply_chat_template unset), or give prompt and completion as text"
        )
    return check_turns(row, columns, turns)


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
        default=None, metadata={"help": "Whether to apply the tokenizer's chat template; by default if it has one."}
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

    def tokenize_prompts(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, DataReport]:
        return tokenize_prompts(
            rows,
            tokenizer,
            max_length=self.max_length,
            prompt_column=self.prompt_column,
            completion_column=self.completion_column,
            messages_column=self.messages_column,
            apply_chat_template=self.apply_chat_template,
        )
