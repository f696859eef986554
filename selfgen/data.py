"""From any usual fine-tuning data set to padded batches: load rows, tokenize them into prompt and answer, collate.

>>> rows = load_rows("openai/gsm8k", config_name="main")
>>> examples, report = tokenize_rows(
...     rows, tokenizer, max_length=512, prompt_column="question", completion_column="answer"
... )
>>> batch = Collator(pad_token_id=tokenizer.eos_token_id)([examples[0], examples[1]])
"""

import glob
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # the label that the loss skips

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}

# What becomes of a row: one of these two, or a reason to drop it.
_KEPT = "kept"
_TRUNCATED = "truncated"
_EMPTY_ANSWER = "empty answer"
_EMPTY_PROMPT = "empty prompt"
_NO_ASSISTANT = "no assistant turn at the end"
_PROMPT_FILLS = "prompt fills max_length"


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_rows(
    name_or_path: "str | Path | datasets.Dataset | datasets.DatasetDict",
    *,
    split: str = "train",
    config_name: str | None = None,
) -> datasets.Dataset:
    """Load one split of a data set, unchanged.

    Args:
        name_or_path: a `.jsonl`, `.json`, `.parquet` or `.arrow` file, a folder of such files, a `save_to_disk` folder,
            or else the name of a data set on the Hub. A `Dataset` is returned as it is, a `DatasetDict` gives a split.
        split: a split or a slice of splits, in the notation of `datasets` ("train", "train[:1000]", "train+test").
            A single file, or a single data set saved with `save_to_disk`, is the split "train".
        config_name: the configuration of a data set on the Hub ("main" for `openai/gsm8k`) or of a folder.

    Raises:
        FileNotFoundError: `name_or_path` is not here and cannot be loaded from the Hub.
        ValueError: an unreadable file (broken JSON is named by file and line), an unknown split, no rows.
        TypeError: a streaming data set, or something that is no data set at all.
    """
    if isinstance(name_or_path, (str, Path)):
        source, loaded = str(name_or_path), _load(name_or_path, config_name)
    else:
        source, loaded = "the data set", name_or_path
    if isinstance(loaded, datasets.DatasetDict):
        loaded = _take_split(source, loaded, split)
    _require_map_style(loaded)
    if len(loaded) == 0:
        raise ValueError(f"{source} has no rows in split {split!r}; at least one is needed")
    return loaded


def _load(name_or_path: str | Path, config_name: str | None) -> datasets.DatasetDict:
    path = Path(name_or_path).expanduser()
    if path.exists():
        return _load_local(path, config_name)
    missing = f"{str(name_or_path)!r} is neither a file or folder here nor could it be loaded from the Hub"
    if path.is_absolute() or path.suffix in _BUILDERS:  # not the name of a data set: do not wait for the network
        raise FileNotFoundError(f"{missing} (it is no data set name); check the path, relative to {Path.cwd()}")
    try:
        return datasets.load_dataset(str(name_or_path), config_name)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{missing} ({error}); check the path or name, and the network") from error


def _load_local(path: Path, config_name: str | None) -> datasets.DatasetDict:
    if path.is_file() and path.suffix not in _BUILDERS:
        raise ValueError(f"{path} has the suffix {path.suffix!r}; accepted are {', '.join(_BUILDERS)}, or a folder")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    # With other kinds of data files around, a broken-looking .json may be metadata and not what failed to load.
    all_json = {_BUILDERS.get(file.suffix, "json") for file in files} == {"json"}
    try:
        if path.is_file():
            loaded = datasets.load_dataset(_BUILDERS[path.suffix], data_files=glob.escape(str(path)))
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # written by save_to_disk
            loaded = datasets.load_from_disk(path)
        else:
            known = datasets.get_dataset_config_names(str(path))
            # A folder of plain files has one configuration, which has no name to be asked for.
            loaded = datasets.load_dataset(str(path), config_name if known != ["default"] else None)
        if isinstance(loaded, datasets.Dataset):
            loaded = datasets.DatasetDict(train=loaded)
        if all_json:
            for rows in loaded.values():
                rows.data.validate(full=True)  # the JSON reader lets bytes through that are not UTF-8
    except Exception as error:  # `datasets` has no common base class for what a bad file can do to its readers
        for file in files:
            if all_json and file.suffix in _BUILDERS and (fault := _find_json_fault(file)):
                raise ValueError(f"{file}, {fault}; rows are JSON objects in UTF-8") from error
        raise ValueError(f"{path} holds no rows that `datasets` can read: {error.__cause__ or error!r}") from error
    return loaded


def _find_json_fault(file: Path) -> str | None:
    """Where and how a `.json` or `.jsonl` file is broken, or None."""
    raw = file.read_bytes()
    try:
        content = raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        return f"line {number}: byte {raw[error.start]:#x} is not UTF-8"
    if content.lstrip().startswith("["):  # one array of objects rather than one object a line
        try:
            json.loads(content)
        except json.JSONDecodeError as error:
            return f"line {error.lineno}: broken JSON ({error.msg})"
        return None
    for number, text in enumerate(content.split("\n"), start=1):
        try:
            if text.strip() and not isinstance(json.loads(text), dict):
                return f"line {number}: not an object but {text:.40}"
        except json.JSONDecodeError as error:
            return f"line {number}: broken JSON ({error.msg} at column {error.colno})"
    return None


def _take_split(source: str, splits: datasets.DatasetDict, split: str) -> datasets.Dataset:
    sizes = {name: len(rows) for name, rows in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (AssertionError, ValueError) as error:
        available = ", ".join(f"{name} ({size} rows)" for name, size in sizes.items())
        raise ValueError(f"{source} has no split {split!r}: {error} Available: {available}") from error
    return datasets.concatenate_datasets([splits[p.splitname].select(range(p.from_, p.to)) for p in parts])


def _require_map_style(dataset: Any) -> None:
    if isinstance(dataset, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise TypeError(
            "a streaming data set has no row numbers or length; load it without streaming=True, "
            "or keep a part of it with datasets.Dataset.from_list(list(stream.take(n)))"
        )
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"expected a name, a path or a datasets.Dataset, not {type(dataset).__name__}")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizing


@dataclass(frozen=True)
class DataReport:
    """What `tokenize_rows` did: `dropped` maps each reason to its number of rows, and `kept` includes `truncated`."""

    rows: int
    kept: int
    truncated: int
    dropped: dict[str, int]
    max_length: int

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
    _require_map_style(dataset)
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


def answer_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: the EOS, and the added token that the chat template writes right behind an answer.

    They differ where a base model's tokenizer has a chat template: EOS ends documents, and `<|im_end|>` turns.
    """
    ends = {tokenizer.eos_token_id} - {None}
    behind = _behind_an_answer(tokenizer).lstrip() if getattr(tokenizer, "chat_template", None) else ""
    first = tokenizer(behind, add_special_tokens=False).input_ids[:1] if behind else []
    return frozenset(ends | {token for token in first if token in tokenizer.added_tokens_decoder})


def _behind_an_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes behind the last turn's content; nothing where that can't be told."""
    answer = "The answer."
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
    for before in ([], [{"role": "system", "content": "x"}]):
        try:
            text = tokenizer.apply_chat_template([*before, *turns], tokenize=False)
        except Exception:  # a template may raise anything; where it is to be applied, that is reported with the row
            continue
        return text.rpartition(answer)[2] if answer in text else ""
    return ""


def _find_columns(present: list[str], prompt: str, completion: str, messages: str) -> tuple[str, ...]:
    """(prompt, completion) or (messages,), whichever `present` has."""
    if {prompt, completion} <= set(present):
        return prompt, completion
    if messages in present:
        return (messages,)
    raise ValueError(
        f"the data set has the columns {', '.join(present)}, but neither {prompt!r} and {completion!r} (each text or "
        f"messages) nor {messages!r} (a conversation); name them with prompt_column and completion_column "
        "(GSM8K: --prompt_column question --completion_column answer), or with messages_column"
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
    turns = _check_turns(row, list(cells), turns)
    if not turns or turns[-1]["role"] != "assistant":
        return "", "", _NO_ASSISTANT
    if not turns[-1]["content"].strip():
        return "", "", _EMPTY_ANSWER
    if len(turns) == 1:
        return "", "", _EMPTY_PROMPT
    return *_render(row, turns, tokenizer), _KEPT


def _check_turns(row: int, columns: list[str], turns: list[Any]) -> list[dict[str, Any]]:
    """The messages of a conversation, without the keys that Arrow filled with None because other rows have them."""
    where = f"row {row}, column {' or '.join(map(repr, columns))}"
    for turn in turns:
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            raise TypeError(f"{where}: a message is a dict with 'role' and 'content', not {turn!r}")
    if turns and turns[-1]["role"] == "assistant" and not isinstance(turns[-1]["content"], str):
        raise TypeError(f"{where}: the content of the answer must be text, not {turns[-1]['content']!r}")
    return [{key: value for key, value in turn.items() if value is not None or key == "content"} for turn in turns]


def _render(row: int, turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The chat template's text up to the answer, and from there on."""
    try:
        prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
        full = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template may raise anything
        raise ValueError(f"row {row}: the chat template rejects these messages ({error}): {turns!r:.200}") from error
    if not full.startswith(prompt):
        same = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
        raise ValueError(
            f"row {row}: the chat template is not prefix preserving: after {same} characters the prompt alone goes on "
            f"with {prompt[same : same + 60]!r}, but the prompt with its answer with {full[same : same + 60]!r}. Set "
            "tokenizer.chat_template to one that renders both alike, or give text and apply_chat_template=False"
        )
    return prompt, full[len(prompt) :]


# ---------------------------------------------------------------------------------------------------------------------
# Batches


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
