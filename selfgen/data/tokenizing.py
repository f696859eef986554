"""Rows as token ids of a prompt and of an answer, or of a prompt alone; what can't be used is dropped and counted."""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .conversations import BESIDE, EXTRAS, NOT_TEXT, RowFault
from .encoding import Encoder
from .loading import require_map_style, room_in_cache
from .reading import EMPTY_ANSWER, EMPTY_PROMPT, RowReader, Texts
from .templates import NOT_PREFIX, WAY_OUT, ChatTemplate, answer_ends, control_tokens

# What becomes of a row: one of these two, or a reason to drop it.
_KEPT = "kept"
_TRUNCATED = "truncated"
_PROMPT_FILLS = "prompt fills max_length"

_VERSION = 4  # of what is made of a row; `datasets` keeps what it has mapped, also where this code has changed
_NAMED = 3  # rows per reason that a report names
_SHOWN = 100  # characters of a row without an id by which a report names it
_HASHED = ("prompt_ids", "answer_ids", "is_learned")
_PEEKED = 100  # rows of a stream without features that tell its columns
_USUAL = {
    "prompt_column": ("prompt", "question", "instruction", "query", "input", "problem"),
    "completion_column": ("completion", "answer", "response", "output", "solution", "target"),
    "messages_column": ("messages", "conversations", "conversation", "chosen"),
}
"""Names that columns often have, by the option that names them."""
_IDS = datasets.List(datasets.Value("int64"))
_MASK = datasets.List(datasets.Value("bool"))
_NOTES = {"outcome": datasets.Value("string"), "note": datasets.Value("string"), "spells": datasets.Value("bool")}
ASSISTANT_TURNS = ("last", "all")
TOKENIZED = {"sample_id", "prompt_ids", "answer_ids"}  # columns of rows that are tokenized

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Rows that can't be used: all of them, or with `strict_data` one of them."""


@dataclass(frozen=True)
class DataReport:
    """What became of rows: `dropped` maps each reason to its number of rows, and `kept` includes `truncated`.

    ``control_tokens`` counts kept rows whose text spells control tokens, which are ordinary text there, and
    ``incomplete`` kept rows of which the chat template leaves something out. ``named`` maps reasons to the first rows.
    """

    rows: int
    kept: int
    truncated: int
    dropped: dict[str, int]
    max_length: int | None
    control_tokens: int = 0
    incomplete: int = 0
    named: dict[str, list[str]] = field(default_factory=dict, compare=False)

    @property
    def level(self) -> int:
        """Of logging: rows that are dropped, cut or not what they seem are worth a warning."""
        noted = self.dropped or self.truncated or self.control_tokens or self.incomplete
        return logging.WARNING if noted else logging.INFO

    def __str__(self) -> str:
        parts = [f"{self.rows} row{'s' * (self.rows != 1)}: {self.kept} kept"]
        if self.truncated:
            parts.append(f"{self.truncated} answer{'s' * (self.truncated != 1)} truncated to {self.max_length} tokens")
        if self.control_tokens:
            parts.append(f"{self.control_tokens} spell special tokens in their text (read as ordinary text)")
        if self.incomplete:
            parts.append(
                f"{self.incomplete} kept of which {self._name('incomplete', 'the template leaves out a part')}"
            )
        if self.dropped:
            reasons = ", ".join(f"{count} {self._name(reason, reason)}" for reason, count in self.dropped.items())
            parts.append(f"{sum(self.dropped.values())} dropped ({reasons})")
        return ", ".join(parts)

    def _name(self, reason: str, text: str) -> str:
        rows = self.named.get(reason, [])
        return f"{text}: {', '.join(rows)}" if rows else text

    def __add__(self, other: "DataReport") -> "DataReport":
        """What became of these rows and of those after them."""
        both = {
            reason: [*self.named.get(reason, ()), *other.named.get(reason, ())][:_NAMED]
            for reason in (*self.named, *other.named)
        }
        return DataReport(
            rows=self.rows + other.rows,
            kept=self.kept + other.kept,
            truncated=self.truncated + other.truncated,
            dropped={
                reason: self.dropped.get(reason, 0) + other.dropped.get(reason, 0)
                for reason in (*self.dropped, *other.dropped)
            },
            max_length=self.max_length,
            control_tokens=self.control_tokens + other.control_tokens,
            incomplete=self.incomplete + other.incomplete,
            named=both,
        )

    def check(self, strict: bool) -> None:
        """Raise DataError if a row was dropped though ``strict`` allows none."""
        if strict and self.dropped:
            raise DataError(f"strict_data allows no row to be dropped; {self}")


@dataclass
class RowOptions:
    """Which columns of a data set are prompts and answers, and what becomes of them; see ``tokenize_rows``.

    Without ``max_length`` (None) there is no limit but that of the model.
    """

    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest row in tokens, prompt included; longer answers are cut and counted."},
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
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Variables for the chat template, as JSON, for example '{\"enable_thinking\": false}'. A row's "
            "column chat_template_kwargs wins over them."
        },
    )
    tools: list | str | None = field(
        default=None,
        metadata={
            "help": "Tools that the chat template describes, as a JSON list of functions, in rows that have no column "
            "tools."
        },
    )
    add_generation_prompt: bool = field(
        default=True,
        metadata={
            "help": "Whether the prompt includes the beginning of the assistant's turn. Without it, that beginning "
            "belongs to the answer: a way to train with templates that write it differently once an answer follows."
        },
    )
    template_date: str | None = field(
        default=None,
        metadata={
            "help": "Date, such as 2026-01-31, that chat templates print as today's. By default it is 2024-07-26, as "
            "rows must not change from day to day."
        },
    )
    split_special_tokens: bool | None = field(
        default=None,
        metadata={
            "help": "Whether special tokens that are spelled in a row's text are ordinary text there. By default they "
            "are, except with apply_chat_template=False, by which texts are taken as a template has made them."
        },
    )
    assistant_turns: str = field(
        default="last",
        metadata={
            "help": "Assistant turns of a row that are learned: last, or all (but those of weight 0). Only "
            "learned turns get self tokens."
        },
    )
    values_as_text: bool = field(
        default=False,
        metadata={"help": "Whether numbers, booleans and class labels in prompts and completions are taken as text."},
    )
    keep_incomplete_rows: bool = field(
        default=False,
        metadata={
            "help": "Keep rows of which the chat template leaves something out of the prompt, such as reasoning of "
            "earlier turns, and count them. By default they are dropped and counted."
        },
    )
    strict_data: bool = field(
        default=False, metadata={"help": "Make it an error that a row is dropped, whatever the reason."}
    )

    def check_rows(self) -> None:
        """Raise ValueError if an option is out of its range; JSON text becomes what it stands for."""
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; it must be at least 2, for a prompt and an answer")
        if self.assistant_turns not in ASSISTANT_TURNS:
            raise ValueError(f"assistant_turns is {self.assistant_turns!r}; accepted: {', '.join(ASSISTANT_TURNS)}")
        for name, kind, wanted in (("chat_template_kwargs", dict, "an object"), ("tools", list, "a list of objects")):
            value = getattr(self, name)
            try:
                value = json.loads(value) if isinstance(value, str) else value
            except ValueError as error:
                raise ValueError(f"{name} is {value!r:.80}, which is no JSON ({error}); give {wanted}") from error
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name} is {value!r:.80}; give {wanted}, in JSON")
            if kind is list and not all(isinstance(one, dict) or callable(one) for one in value or ()):
                raise ValueError(f"{name} is {value!r:.80}; give {wanted}, in JSON")
            setattr(self, name, value)
        if self.template_date is not None:
            try:
                datetime.strptime(self.template_date, "%Y-%m-%d")
            except ValueError as error:
                raise ValueError(f"template_date is {self.template_date!r}; give a date as 2026-01-31") from error

    def check_columns(self, rows: Dataset | IterableDataset, *, answers: bool = True) -> None:
        """Raise DataError if ``rows`` have no columns that these options name, and are not tokenized, either."""
        names = columns_of(rows)
        if not set(names) >= TOKENIZED:
            _find_columns(names, self, answers=answers)

    def template(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
        """The tokenizer's chat template with what these options hand to it; None if none is applied.

        Raises:
            ValueError: there is none, though it is asked for; an option that needs one.
        """
        self.check_rows()
        known = getattr(tokenizer, "chat_template", None)
        if self.apply_chat_template and not known:
            raise ValueError("apply_chat_template=True, but the tokenizer has none; set tokenizer.chat_template")
        if self.apply_chat_template is not False and known:
            return ChatTemplate(
                tokenizer,
                self.chat_template_kwargs or {},  # type: ignore[arg-type]
                self.tools,  # type: ignore[arg-type]
                add_generation_prompt=self.add_generation_prompt,
                date=self.template_date,
            )
        defaults = {item.name: item.default for item in RowOptions.__dataclass_fields__.values()}
        needs = ("chat_template_kwargs", "tools", "add_generation_prompt", "template_date")
        if given := [name for name in needs if getattr(self, name) != defaults[name]]:
            raise ValueError(f"{', '.join(given)} is for a chat template, but none is applied; leave it out")
        if self.assistant_turns == "all":
            raise ValueError("assistant_turns=all needs messages and a chat template; none is applied")
        return None

    def answer_ends(self, tokenizer: PreTrainedTokenizerBase, known: Iterable[int] = ()) -> frozenset[int]:
        """Ids that end an answer, ``known`` ones of the model among them; see `data.answer_ends`."""
        return answer_ends(tokenizer, known, self.template(tokenizer))

    def encoder(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> Encoder:
        """What makes ids of texts as these options ask for."""
        split = self.split_special_tokens
        if split is None:  # texts that are given instead of a template have its tokens
            split = not (self.apply_chat_template is False and getattr(tokenizer, "chat_template", None))
        return Encoder(tokenizer, control_tokens(tokenizer, template) if split else (), strict=template is not None)

    def answer_ids(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
        """Ids of answers that are given as text, as they follow a prompt, without the token that ends them."""
        template = self.template(tokenizer)
        encoder = self.encoder(tokenizer, template)
        begins = template.answer_begins() if template else ""
        return encoder.after(["\n"] * len(texts), [begins + encoder.mark(text) for text in texts])

    def answer_texts(self, tokenizer: PreTrainedTokenizerBase, answers: Sequence[Iterable[int]]) -> list[str]:
        """What answers [T_i] say, without special tokens and without what the template writes before an answer."""
        template = self.template(tokenizer)
        begins = template.answer_begins() if template else ""
        (header,) = self.encoder(tokenizer, template).after(["\n"], [begins])
        rows = [[int(one) for one in ids] for ids in answers]
        told = [ids[len(header) :] if ids[: len(header)] == header else ids for ids in rows]
        return tokenizer.batch_decode(told, skip_special_tokens=True)

    def tokenize(
        self,
        rows: Any,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        *,
        answers: bool = True,
        num_proc: int | None = None,
    ) -> tuple[Any, Any]:
        """``rows`` as ``tokenize_rows`` returns them, or as ``tokenize_prompts`` does without ``answers``."""
        options = self.of_rows(max_length)
        if isinstance(rows, IterableDataset) and answers:
            return tokenize_stream(rows, tokenizer, options, usable=True), None
        require_map_style(rows)
        return _tokenize(rows, tokenizer, options, answers, num_proc)

    def of_rows(self, max_length: int | None = None) -> "RowOptions":
        """These options alone, without those of a subclass, and with this ``max_length`` if it is given."""
        plain = {name: getattr(self, name) for name in RowOptions.__dataclass_fields__}
        return RowOptions(**plain | ({"max_length": max_length} if max_length is not None else {}))

    def tokenize_prompts(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None
    ) -> tuple[Dataset, DataReport]:
        """``rows`` as ``tokenize_prompts`` returns them."""
        return self.tokenize(rows, tokenizer, answers=False, num_proc=num_proc)


def tokenize_rows(
    dataset: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    num_proc: int | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Tokenize every row into a prompt and an answer.

    A row holds a prompt and a completion, each a text or a list of `{"role", "content"}` messages (a text completion of
    a message prompt is an assistant turn), or one list of messages. In messages the last turn must be the assistant's:
    it is the answer, and all before it is the prompt. A prompt that ends with an assistant turn is the beginning of the
    answer's turn. If a data set has both forms, prompt and completion are used. docs/data.md lists all forms.

    With a chat template, texts become a user and an assistant turn, and the answer ends with the EOS or the special
    token that the template ends it with (`answer_ends`). Without one, the prompt gets the tokenizer's own special
    tokens (a BOS, never an EOS). An answer with no such end gets an EOS. One that does not fit into `max_length` loses
    its right end, EOS included. The columns `tools`, `documents` and `chat_template_kwargs` go to the template.

    Rows that can't be used are dropped and counted: those with an empty answer or prompt, without an assistant turn at
    the end, whose prompt alone fills `max_length`, that the template rejects, whose content is not text, and those of
    which the template leaves something out. Special tokens that a row's text spells are ordinary text.

    Args:
        max_length: the most tokens of prompt and answer together, at least 2; None is no limit.
        num_proc: the number of processes of `Dataset.map`.
        **options: the other fields of `RowOptions`, such as `prompt_column` and `chat_template_kwargs`.

    Returns:
        The data set of the kept rows, in order, and the report. Columns: `sample_id` (int64: the data set's own
        `sample_id`, or else the number of the row in `dataset`), `prompt_ids` and `answer_ids` (lists of int64, never
        empty, of at most `max_length` together). With `assistant_turns="all"`, `answer_ids` are all that follows the
        first prompt, and `is_learned` (list of bool) tells the tokens of assistant turns. The result is cached by
        `datasets`, as every `map` is.

        Of a stream (`IterableDataset`), a stream and None, as nothing is known of its rows before they are read. The
        first rows that are dropped for a reason are then named in warnings, and the `sample_id` of a row that has none
        is a hash of its tokens: its number would change with `shuffle` and with workers.

    Raises:
        ValueError: columns are missing; options out of their range; a tokenizer without EOS (a pad token is not needed:
            pad with EOS, the `Collator` masks it); a `sample_id` column that is not unique integers; no row left; with
            `strict_data`, a row that is dropped.
    """
    return RowOptions(max_length=max_length, **options).tokenize(dataset, tokenizer, num_proc=num_proc)


def tokenize_prompts(
    dataset: datasets.Dataset | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    num_proc: int | None = None,
    **options: Any,
) -> tuple[datasets.Dataset, DataReport]:
    """Tokenize the prompt of every row, token for token as `tokenize_rows` does; there may be no answer to it.

    A row holds a prompt, a text or a list of messages, or a conversation, which is a prompt without the assistant's
    turn at its end. Where a prompt and its completion are both messages, those before the last are of the prompt, too;
    other completions are ignored. Rows with an empty prompt, or one of `max_length` tokens or more, are dropped
    and counted.

    Args:
        dataset: rows, or a list of texts, which are the prompts.
        max_length: the most tokens of prompt and answer together, at least 2; None is no limit.
        num_proc, **options: as of `tokenize_rows`.

    Returns, raises: as `tokenize_rows`, without `answer_ids` and what is wrong with answers.
    """
    chosen = RowOptions(max_length=max_length, **options)
    if isinstance(dataset, Sequence) and not isinstance(dataset, str):
        dataset = datasets.Dataset.from_dict({chosen.prompt_column: list(dataset)})
    return chosen.tokenize_prompts(dataset, tokenizer, num_proc)


def _tokenize(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, options: RowOptions, answers: bool, num_proc: int | None
) -> tuple[Dataset, DataReport]:
    """The rows that are kept, with `sample_id` and their ids, and the report."""
    dataset = dataset.with_format(None)
    check_sample_ids(dataset)
    with room_in_cache():
        tokenized = dataset.map(
            _tokenize_batch,
            batched=True,
            with_indices=True,
            fn_kwargs=batch_arguments(dataset.column_names, dataset.features, tokenizer, options, answers),
            remove_columns=dataset.column_names,
            features=datasets.Features(**_columns(options, answers), **_NOTES),
            num_proc=num_proc,
            desc="Tokenizing",
        )
    names = [f"row {row}" for row in range(len(tokenized))]
    outcomes = tokenized["outcome"][:]
    report = _report(outcomes, tokenized["note"][:], tokenized["spells"][:], names, options.max_length)
    if not report.kept:
        raise DataError(f"no row is left; {report}. {_remedy(report)}")
    report.check(options.strict_data)
    kept = [row for row, outcome in enumerate(outcomes) if outcome in (_KEPT, _TRUNCATED)]
    tokenized = tokenized.remove_columns(list(_NOTES))
    return (tokenized if len(kept) == len(tokenized) else tokenized.select(kept)), report


def _columns(options: RowOptions, answers: bool) -> dict[str, Any]:
    """The columns of tokenized rows, and their types."""
    columns = {"sample_id": datasets.Value("int64"), "prompt_ids": _IDS}
    columns |= {"answer_ids": _IDS} if answers else {}
    return columns | ({"is_learned": _MASK} if answers and options.assistant_turns == "all" else {})


def _report(
    outcomes: list[str], notes: list[str], spells: list[bool], names: list[str], max_length: int | None
) -> DataReport:
    """Of rows by what became of them, what is to be said of it, and what they are called."""
    counts = Counter(outcomes)
    named: dict[str, list[str]] = defaultdict(list)
    for name, outcome, note in zip(names, outcomes, notes, strict=True):
        reason = outcome if outcome not in (_KEPT, _TRUNCATED) else "incomplete" if note else None
        if reason and len(named[reason]) < _NAMED:
            told = note and (len(note) <= _SHOWN or not named[reason])  # a long one once
            named[reason].append(f"{name} ({note})" if told else name)
    kept = [(outcome in (_KEPT, _TRUNCATED)) for outcome in outcomes]
    return DataReport(
        rows=len(outcomes),
        kept=sum(kept),
        truncated=counts[_TRUNCATED],
        dropped={reason: n for reason, n in counts.most_common() if reason not in (_KEPT, _TRUNCATED)},
        max_length=max_length,
        control_tokens=sum(one and spelled for one, spelled in zip(kept, spells, strict=True)),
        incomplete=sum(bool(one and note) for one, note in zip(kept, notes, strict=True)),
        named={reason: rows for reason, rows in named.items() if rows},
    )


def tokenize_stream(
    stream: IterableDataset, tokenizer: PreTrainedTokenizerBase, options: RowOptions, usable: bool = False
) -> IterableDataset:
    """Every row of a stream, tokenized when it is read: also those that can't be used (`report_of` tells), or `usable`.

    A row without a `sample_id` gets a hash of its tokens: its place identifies nothing, as `shuffle`, workers and
    resuming count rows anew.

    Raises:
        ValueError: as of `tokenize_rows`; there is no row at all.
    """
    stream = stream.with_format(None)
    names = columns_of(stream)
    arguments = batch_arguments(names, stream.features, tokenizer, options, answers=True)
    if stream.features is None and _comes_from_arrow(stream):
        arguments["arrow"] = sorted(names)
    columns = _columns(options, answers=True)
    features = datasets.Features(**columns, **_NOTES, called=datasets.Value("string"))
    tokenized = stream.map(
        _Usable(options) if usable else _tokenize_streamed,
        batched=True,
        with_indices=True,
        features=features,
        fn_kwargs={"arguments": arguments},
    )
    return tokenized.select_columns(list(columns if usable else features))


def report_of(row: dict[str, Any], max_length: int | None) -> DataReport:
    """What became of a row that `tokenize_stream` gives."""
    if row["outcome"] == _KEPT and not row["note"] and not row["spells"]:
        return DataReport(1, 1, 0, {}, max_length)  # as of nearly all
    return _report([row["outcome"]], [row["note"]], [row["spells"]], [row["called"]], max_length)


def columns_of(stream: Dataset | IterableDataset) -> list[str]:
    """The columns of a data set or a stream, by its first rows if nothing else tells them."""
    if stream.column_names is not None:
        return list(stream.column_names)
    names = list(dict.fromkeys(name for row in stream.take(_PEEKED) for name in row))
    if not names:
        raise DataError("the stream has no rows; at least one is needed")
    return names


def _comes_from_arrow(stream: IterableDataset) -> bool:
    """Whether rows are made of Arrow tables, in which None stands for keys that an object does not have."""
    below = [stream._ex_iterable]
    while below:
        source = below.pop()
        inner = [*getattr(source, "ex_iterables", ()), *filter(None, [getattr(source, "ex_iterable", None)])]
        if not inner and source.iter_arrow:
            return True
        below += inner
    return False


class _Usable:
    """As `_tokenize_streamed`, of rows that can be used; the first few of the others are named in a warning."""

    def __init__(self, options: RowOptions):
        self.options = options
        self.named: Counter[str] = Counter()

    def __call__(self, batch: dict[str, list], rows: list[int], *, arguments: dict[str, Any]) -> dict[str, list]:
        found = _tokenize_streamed(batch, rows, arguments=arguments)
        kept = [row for row in range(len(rows)) if self._keeps({name: cells[row] for name, cells in found.items()})]
        return {name: [cells[row] for row in kept] for name, cells in found.items()}

    def _keeps(self, row: dict[str, Any]) -> bool:
        report = report_of(row, self.options.max_length)
        report.check(self.options.strict_data)
        for reason in report.dropped:
            self.named[reason] += 1
            if self.named[reason] <= _NAMED:
                logger.warning("a row of the stream is dropped: %s", report._name(reason, reason))
        return bool(report.kept)


def _tokenize_streamed(batch: dict[str, list], rows: list[int], *, arguments: dict[str, Any]) -> dict[str, list]:
    """A batch of `IterableDataset.map`: as `_tokenize_batch`, with ids that don't depend on places, and names."""
    given = batch.get("sample_id", [None] * len(rows))
    read = [name for name in arguments["columns"] if name]
    whole = {name: [None] * len(rows) for name in read} | {name: batch[name] for name in batch if name != "sample_id"}
    found = _tokenize_batch(whole, rows, **arguments)
    ids, called = [], [""] * len(rows)
    for row, one in enumerate(given):
        own = isinstance(one, int) and not isinstance(one, bool) and -(1 << 63) <= one < 1 << 64
        ids.append(signed(one) if own else _hash([found[name][row] for name in _HASHED if name in found]))
        if one is not None and not own:
            found["outcome"][row], found["note"][row] = "sample_id is no integer of 64 bits", ""
        if found["outcome"][row] not in (_KEPT, _TRUNCATED) or found["note"][row]:
            cells = {name: whole[name][row] for name in read}
            called[row] = f"sample_id {one}" if own else repr(cells)[:_SHOWN]
    others = {name: [None] * len(rows) for name in batch if name not in found}  # `map` would keep them as they are
    return {**found, **others, "sample_id": ids, "called": called}


def _hash(lists: list[list[int]]) -> int:
    """63 bits that tell lists of numbers apart, the same everywhere."""
    digest = blake2b(digest_size=8)
    for one in lists:
        digest.update(np.array([len(one), *one], "<i8").tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def batch_arguments(
    column_names: list[str],
    features: datasets.Features | None,
    tokenizer: PreTrainedTokenizerBase,
    options: RowOptions,
    answers: bool,
) -> dict[str, Any]:
    """What `_tokenize_batch` needs besides rows; an error if these columns or options can't be used."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so an answer could not end; set tokenizer.eos_token")
    options.check_rows()
    prompt, completion, messages = _find_columns(column_names, options, answers=answers)
    features = features or {}
    classes = {name: feature.names for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    exact = (datasets.Value, getattr(datasets, "Json", datasets.Value))  # columns without keys of Arrow's own
    return {
        "tokenizer": tokenizer,
        "ends": sorted(options.answer_ends(tokenizer)),  # rows that were cached without them are others
        "columns": (prompt, completion, messages),
        "options": options,
        "answers": answers,
        "arrow": sorted(name for name, feature in features.items() if not isinstance(feature, exact)),
        "classes": {name: names for name, names in classes.items() if name in (prompt, completion)},
        "version": _VERSION,
    }


def _remedy(report: DataReport) -> str:
    """What to do where no row is left."""
    if NOT_PREFIX in report.dropped:
        return WAY_OUT
    lengths = f" and max_length={report.max_length}" if _PROMPT_FILLS in report.dropped else ""
    return f"Check the columns{lengths}, or what the rows hold"


def _find_columns(
    present: list[str], options: RowOptions, *, answers: bool
) -> tuple[str | None, str | None, str | None]:
    """(prompt, completion, messages or None) or (None, None, messages), whichever `present` has.

    Without `answers` the completion may be missing.
    """
    prompt, completion, messages = options.prompt_column, options.completion_column, options.messages_column
    if {prompt, completion} <= set(present):
        return prompt, completion, messages if messages in present else None
    if prompt in present and not answers:
        return prompt, None, messages if messages in present else None
    lacking = {"prompt_column": prompt, "completion_column": completion} if answers else {"prompt_column": prompt}
    lacking = {option: name for option, name in lacking.items() if name not in present}
    there = f"the data set has the columns {', '.join(present)}, but"
    if messages not in present:
        raise DataError(f"{there} {_missing(present, options, lacking)}")
    defaults = {item.name: item.default for item in RowOptions.__dataclass_fields__.values()}
    columns = ("prompt_column", "completion_column", "messages_column")
    given = [name for name in columns if getattr(options, name) != defaults[name]]
    if given and "messages_column" not in given:  # nothing else is read than what was asked for
        texts = " and ".join(f"no {name!r} ({option})" for option, name in lacking.items())
        by_name = _flags(dict.fromkeys(lacking, "NAME"))
        raise DataError(
            f"{there} {texts}, with {' and '.join(given)} given: say which column to read by {by_name}, or leave "
            f"{' and '.join(given)} out, to read the conversations of {messages!r}"
        )
    return None, None, messages


def _missing(present: list[str], options: RowOptions, lacking: dict[str, str]) -> str:
    """What columns lack, and how to name them: as such data sets often do, where they have these names."""
    usual = {option: next((one for one in names if one in present), None) for option, names in _USUAL.items()}
    of_texts = {option: usual[option] for option in lacking}
    texts = " and ".join(f"no {name!r} ({option})" for option, name in lacking.items())
    said = f"{texts} of texts or messages, and no {options.messages_column!r} (messages_column) of conversations"
    if all(of_texts.values()):
        return f"{said}: to read other columns as these, give {_flags(of_texts)}"
    if usual["messages_column"]:
        return f"{said}: to read another column as such, give {_flags({'messages_column': usual['messages_column']})}"
    by_name = _flags(dict.fromkeys(lacking, "NAME"))
    return f"{said}: say which of the columns to read by {by_name}, or by --messages-column NAME"


def _flags(options: dict[str, Any]) -> str:
    return " ".join(f"--{option.replace('_', '-')} {value}" for option, value in options.items())


def check_sample_ids(dataset: datasets.Dataset) -> None:
    """Raise DataError unless the column `sample_id`, if there is one, holds a different integer in every row."""
    if "sample_id" not in dataset.column_names:
        return
    dtype = str(getattr(dataset.features["sample_id"], "dtype", "no number"))
    integers = dtype.startswith(("int", "uint"))
    seen: dict[int, int] = {}
    for row, one in enumerate(dataset["sample_id"][:]):
        if not integers and not (isinstance(one, int) and not isinstance(one, bool)):
            fault = f"row {row} has {one!r:.40}"
        elif one is None:
            fault = f"row {row} has none"
        elif (before := seen.setdefault(one, row)) != row:
            fault = f"row {row} has {one}, as row {before} has"
        else:
            continue
        break
    else:
        if integers:
            return
        fault = "it is no column of integers"
    raise DataError(
        f"the column 'sample_id' ({dtype}, {len(dataset)} rows) must hold a different integer in every row, but "
        f"{fault}: change it, or rename or remove the column to number the rows instead"
    )


def signed(sample_id: int) -> int:
    """A 64-bit sample id as int64: the upper half of unsigned ones is negative."""
    return sample_id - (1 << 64) if sample_id >= 1 << 63 else sample_id


def sample_ids_of(dataset: datasets.Dataset) -> list[int]:
    """The sample id of every row of a data set as ``tokenize_rows`` gives it."""
    if "sample_id" not in dataset.column_names:
        return list(range(len(dataset)))
    return [signed(one) for one in dataset["sample_id"]]


def _tokenize_batch(
    batch: Any,
    rows: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    columns: tuple[str | None, str | None, str | None],
    options: RowOptions,
    answers: bool,
    arrow: list[str],
    classes: dict[str, list[str]],
    version: int,
) -> dict[str, list]:
    """A batch of `Dataset.map`: the ids of each row, what became of it, and a note on it."""
    template = options.template(tokenizer)
    encoder = options.encoder(tokenizer, template)
    reader = RowReader(
        encoder,
        template,
        columns,
        ends={tokenizer.added_tokens_decoder[one].content for one in ends if one in tokenizer.added_tokens_decoder},
        all_turns=options.assistant_turns == "all",
        arrow=frozenset(arrow),
        classes=classes,
        values_as_text=options.values_as_text,
    )
    read = reader.answered if answers else reader.asked
    used = [name for name in (*columns, *EXTRAS, *BESIDE, *NOT_TEXT) if name and name in batch]
    texts, outcomes, notes = [], [], []  # type: list[Texts], list[str], list[str]
    for cells in zip(*(batch[name] for name in used), strict=True):
        try:
            found = read(dict(zip(used, cells, strict=True)))
            lost = found.lost and f"{found.lost} is not in the chat template's text"
            piece = repr(found.lost_text[:60]) if found.lost_text else ""
            kept = options.keep_incomplete_rows and not found.answer_lost
            fault = RowFault(lost, piece) if lost and not kept else None
        except RowFault as error:
            found, lost, fault = Texts(""), None, error
        except RecursionError:
            found, lost, fault = Texts(""), None, RowFault("a cell that is nested too deep")
        texts.append(found if fault is None else Texts(""))
        outcomes.append(_KEPT if fault is None else fault.reason)
        notes.append((lost if fault is None else fault.detail) or "")

    prompt_ids = (encoder.texts if template else encoder.prompts)([one.prompt for one in texts])
    columns_of_answers: dict[str, list] = {}
    if answers:
        answer_ids, is_learned = _answers(texts, encoder, tokenizer.eos_token_id)
        columns_of_answers = {"answer_ids": answer_ids}
        if options.assistant_turns == "all":
            columns_of_answers["is_learned"] = is_learned
    for row, prompt in enumerate(prompt_ids):
        if outcomes[row] == _KEPT:
            length = len(answer_ids[row]) if answers else None
            outcomes[row] = _judge_lengths(len(prompt), length, options.max_length)
        if answers and options.max_length is not None:
            _cut(answer_ids[row], is_learned[row], max(options.max_length - len(prompt), 0))
    return {
        "sample_id": [signed(one) for one in batch["sample_id"]] if "sample_id" in batch else rows,
        "prompt_ids": prompt_ids,
        **columns_of_answers,
        "outcome": outcomes,
        "note": notes,
        "spells": [one.control_tokens for one in texts],
    }


def _answers(texts: list[Texts], encoder: Encoder, eos: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Ids of what follows each prompt, and which of them are learned; answers that do not end get an EOS."""
    before, after, owner = [], [], []
    for row, one in enumerate(texts):
        written = one.prompt
        for segment, learned in one.segments:
            before.append(written)
            after.append(segment)
            owner.append((row, learned))
            written += segment
    ids: list[list[int]] = [[] for _ in texts]
    is_learned: list[list[bool]] = [[] for _ in texts]
    for (row, learned), found in zip(owner, encoder.after(before, after), strict=True):
        ids[row] += found
        is_learned[row] += [learned] * len(found)
    for row, one in enumerate(texts):
        if one.segments and not one.ended and ids[row][-1:] != [eos]:
            ids[row].append(eos)
            is_learned[row].append(True)
    return ids, is_learned


def _cut(ids: list[int], is_learned: list[bool], length: int) -> None:
    """Cut what follows a prompt to this length, and then what is not learned at its end."""
    del ids[length:], is_learned[length:]
    while is_learned and not is_learned[-1]:
        del ids[-1], is_learned[-1]


def _judge_lengths(prompt: int, answer: int | None, max_length: int | None) -> str:
    if answer == 0:
        return EMPTY_ANSWER
    if prompt == 0:
        return EMPTY_PROMPT
    if max_length is not None and prompt >= max_length:
        return _PROMPT_FILLS
    return _TRUNCATED if answer and max_length is not None and prompt + answer > max_length else _KEPT
