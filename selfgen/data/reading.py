"""A row as text: its prompt, and what is learned after it. What of a row would be lost is told, not passed over."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import Any

from .conversations import (
    REASONING,
    Conversation,
    RowFault,
    continued,
    read_extras,
    read_turns,
    turns_beside,
    weights_of,
)
from .encoding import NOT_MARKED, Encoder
from .found import end_of, first_lost
from .templates import ChatTemplate, common_prefix

EMPTY_ANSWER = "empty answer"
EMPTY_PROMPT = "empty prompt"
NO_ASSISTANT = "no assistant turn at the end"
NEEDS_TEMPLATE = "messages, which need a chat template"


@dataclass
class Texts:
    """A row as text. After the prompt come ``segments``, each a text and whether it is learned, none without answers.

    ``ended`` tells that the last of them ends as answers do, ``control_tokens`` that content spells some, ``lost``
    what the template leaves out of the row, and ``lost_text`` its text.
    """

    prompt: str
    segments: list[tuple[str, bool]] = field(default_factory=list)
    ended: bool = False
    control_tokens: bool = False
    lost: str | None = None
    lost_text: str = ""
    answer_lost: bool = False  # whether something is lost of what is learned


class RowReader:
    """Reads rows given as column -> cell.

    Args:
        encoder: of the tokenizer, which marks control tokens.
        template: the chat template, or None where texts are taken as they are.
        prompt, completion, messages: the columns; ``completion`` and ``messages`` or ``prompt`` may be None.
        ends: spellings of the tokens that end an answer.
        all_turns: whether every assistant turn is learned, or the last one only.
        arrow: the columns in which None stands for keys that an object does not have.
        classes: names of class labels, by column.
        values_as_text: whether numbers, booleans and class labels are taken as text.
    """

    def __init__(
        self,
        encoder: Encoder,
        template: ChatTemplate | None,
        columns: tuple[str | None, str | None, str | None],
        *,
        ends: set[str],
        all_turns: bool = False,
        arrow: frozenset[str] = frozenset(),
        classes: dict[str, list[str]] | None = None,
        values_as_text: bool = False,
    ):
        self.encoder, self.template = encoder, template
        self.prompt, self.completion, self.messages = columns
        self.all_turns, self.arrow = all_turns, arrow
        self.classes, self.values_as_text = classes or {}, values_as_text
        self._end_texts = sorted(filter(None, ends), key=len, reverse=True)
        self._end = re.compile(f"{NOT_MARKED}(?:{'|'.join(map(re.escape, self._end_texts)) or '(?!)'})")
        self._known: dict[tuple, str | None] = {}  # what the template leaves out, by shape

    def answered(self, cells: dict[str, Any]) -> Texts:
        """The prompt of a row, and what is learned of it.

        Raises:
            RowFault: the row can't be used.
        """
        if self.template is None:
            return self._plain(cells)
        conversation = self._conversation(cells, answers=True)
        turns = conversation.turns
        roles = [turn["role"] == "assistant" for turn in turns]
        last = len(turns) - 1
        weights = weights_of(turns)
        for turn in turns if self.all_turns else turns[-1:]:
            if turn["role"] == "assistant":
                turn["content"] = self._without_end(turn["content"])
        adds_nothing = not turns or conversation.parted().is_empty(-1)
        if self.all_turns:
            learned = [n for n in range(1, len(turns)) if roles[n] and weights[n] and not conversation.is_empty(n)]
            told = [n for n in learned if n < last or not adds_nothing]
            if not told:
                raise RowFault("no assistant turn to learn")
            prefix = conversation.prefix if told[-1] == last else ""
            return self._turns(self._marked(replace(conversation, turns=turns[: told[-1] + 1], prefix=prefix)), told)
        if not turns or not roles[last]:
            raise RowFault(NO_ASSISTANT, f"the last turn is of role {turns[last]['role']!r}" if turns else "")
        if adds_nothing:
            raise RowFault(EMPTY_ANSWER)
        if last == 0 and not conversation.prefix:
            raise RowFault(EMPTY_PROMPT)
        if not weights[last]:
            raise RowFault("an answer of weight 0")
        return self._last_turn(self._marked(conversation))

    def asked(self, cells: dict[str, Any]) -> Texts:
        """The prompt of a row, which is that of `answered`; there may be no answer to it."""
        if self.template is None:
            return self._plain(cells, answers=False)
        conversation = self._marked(self._conversation(cells, answers=False))
        if not conversation.turns:
            raise RowFault(EMPTY_PROMPT)
        prompt = self.template.prompt(conversation)
        said = [said for turn in range(len(conversation.turns)) for said in conversation.said(turn)]
        return self._checked(Texts(prompt), conversation, [(prompt, conversation.described() + said)])

    # -- forms of rows

    def _plain(self, cells: dict[str, Any], answers: bool = True) -> Texts:
        """A row of a data set without a chat template: texts."""
        if self.messages is not None:
            raise RowFault(NEEDS_TEMPLATE, "set tokenizer.chat_template, or give prompt and completion as text")
        if extras := read_extras(cells, set(self.arrow)):
            raise RowFault(f"{', '.join(sorted(extras))}, for which there is no chat template")
        if turns_beside(cells, set(self.arrow), []):
            raise RowFault("a column 'system' or 'history', for which there is no chat template")
        prompt = self._text(cells, self.prompt)
        texts = Texts(self.encoder.mark_prompt(prompt))
        if answers:
            answer = self._without_end(self._text(cells, self.completion))
            if not answer.strip():
                raise RowFault(EMPTY_ANSWER)
            texts.segments = [(self.encoder.mark(answer), True)]
        texts.control_tokens = any(map(self.encoder.is_marked, (texts.prompt, *(text for text, _ in texts.segments))))
        return texts

    def _text(self, cells: dict[str, Any], column: str | None) -> str:
        cell = self._cell(cells, column)
        if isinstance(cell, list | dict):
            raise RowFault(NEEDS_TEMPLATE, "set tokenizer.chat_template, or give prompt and completion as text")
        return cell

    def _cell(self, cells: dict[str, Any], column: str | None) -> Any:
        """A cell with text or messages."""
        cell = cells.get(column)  # type: ignore[arg-type]
        if self.values_as_text and isinstance(cell, int | float):
            names = None if isinstance(cell, bool) else self.classes.get(column or "")
            if names and not 0 <= cell < len(names):  # -1 stands for no label
                raise RowFault(f"{column!r} is a class label without a name", f"it is {cell}")
            return names[int(cell)] if names else str(cell)
        more = cells.get("input") if column == self.prompt == "instruction" else None
        if self.values_as_text and isinstance(more, int | float):
            more = str(more)
        if more and not isinstance(more, str):
            raise RowFault("the column 'input' is not text", f"it is {more!r:.60}")
        if isinstance(cell, str) and more and more.strip():
            return f"{cell}\n{more}"
        if isinstance(cell, str | list | dict):
            return cell
        kind = "empty (None)" if cell is None else f"{type(cell).__name__}, neither text nor messages"
        detail = "with values_as_text, numbers and labels are text" if isinstance(cell, int | float) else ""
        raise RowFault(f"{column!r} is {kind}", detail)

    def _conversation(self, cells: dict[str, Any], answers: bool) -> Conversation:
        """A row as a conversation, with the answer as its last turn if ``answers``, else without it."""
        extras = read_extras(cells, set(self.arrow))
        if self.messages is not None:
            turns = read_turns(self._cell(cells, self.messages), self.messages, self.messages in self.arrow)
            before = turns_beside(cells, set(self.arrow), turns)
            if not answers and turns and turns[-1]["role"] == "assistant":
                turns = turns[:-1]
            return Conversation([*before, *turns] if turns else [], **extras)
        turns = self._turns_of(cells, self.prompt, "user")
        turns = [*turns_beside(cells, set(self.arrow), turns), *turns] if turns else []
        told = self._turns_of(cells, self.completion, "assistant") if answers else self._turns_told(cells)
        if answers and not told:
            raise RowFault(EMPTY_ANSWER)
        prefix = ""
        begins = bool(turns) and turns[-1]["role"] == "assistant" and not turns[-1].get("tool_calls")
        if begins and (not told or told[0]["role"] == "assistant"):  # the prompt has the beginning of the answer
            *turns, begun = turns
            if begun["content"].strip():
                prefix = begun["content"] if len(told) == int(answers) else ""
                told = [continued(begun, told[0]), *told[1:]] if told else [begun]
            elif any(begun.get(key) for key in REASONING):
                raise RowFault("a prompt that ends in reasoning without text")
        return Conversation([*turns, *told], prefix, **extras)

    def _turns_of(self, cells: dict[str, Any], column: str | None, role: str) -> list[dict[str, Any]]:
        cell = self._cell(cells, column)
        if isinstance(cell, str):
            return [{"role": role, "content": cell}]
        return read_turns(cell, column or "", column in self.arrow)

    def _turns_told(self, cells: dict[str, Any]) -> list[dict[str, Any]]:
        """Those of the completion before its last, where it has any: of a prompt alone it may be anything."""
        try:
            return self._turns_of(cells, self.completion, "assistant")[:-1] if self.completion else []
        except RowFault:
            return []

    # -- conversations as text

    def _marked(self, conversation: Conversation) -> Conversation:
        return conversation.map(self.encoder.mark)

    def _last_turn(self, conversation: Conversation) -> Texts:
        assert self.template is not None
        parted = conversation.parted()
        prompt, rest = self.template.split(conversation)
        *earlier, told = [parted.said(turn) for turn in range(len(parted.turns))]
        said = [(what.replace("a turn of role 'assistant'", "the answer"), text) for what, text in told]
        answer, ended = self._cut(rest, end_of(rest, said))
        before = [*conversation.described(), *chain(*earlier)]
        return self._checked(Texts(prompt, [(answer, True)], ended), conversation, [(prompt, before), (answer, said)])

    def _turns(self, conversation: Conversation, told: list[int]) -> Texts:
        """Every turn of ``told`` is learned; what the template writes between them is not."""
        assert self.template is not None
        full = self.template.render(conversation)
        starts = [len(self.template.before(conversation, turn, full)) for turn in told] + [len(full)]
        if conversation.prefix:
            starts[-2] = len(self.template.split(conversation)[0])
        sayings = [conversation.said(turn) for turn in told[:-1]] + [conversation.parted().said(-1)]
        segments: list[tuple[str, bool]] = []
        everything = [one for turn in range(len(conversation.turns)) for one in conversation.said(turn)]
        given = [(full, conversation.described() + everything)]
        for turn, said, (start, until) in zip(told, sayings, pairwise(starts), strict=True):
            rest = full[start:until]
            said_until = end_of(rest, said)
            answer, ended = self._cut(rest, said_until)
            if turn != told[-1]:
                known, following = self._bounds(conversation, turn, full)
                if not ended or start + len(answer) > following:  # the end is another turn's
                    answer = rest[: max(said_until, known - start)]
            segments += [(answer, True), (rest[len(answer) :], False)]
            given.append((answer, said))
        segments = [one for one in segments[:-1] if one[0]]
        return self._checked(Texts(full[: starts[0]], segments, ended), conversation, given)

    def _bounds(self, conversation: Conversation, turn: int, full: str) -> tuple[int, int]:
        """Up to where ``full`` surely has this turn and no other, 0 if that is not known, and where the next one is.

        Some templates write a turn in another way when more turns follow.
        """
        assert self.template is not None
        until = self.template.render(conversation, turn + 1)
        for known in (until, self._without_end(until)):
            if full.startswith(known):
                return len(known), len(known)
        turns = list(conversation.turns)
        turns[turn + 1] = turns[turn + 1] | {"content": "?"}
        return 0, len(common_prefix(self.template.render(replace(conversation, turns=turns)), full))

    def _cut(self, text: str, start: int) -> tuple[str, bool]:
        """An answer's text up to the token that the template ends it with, and whether there is one.

        Templates write "\\n" after the end of a turn, or an EOS at the end of all.
        """
        end = self._end.search(text, start)
        return (text[: end.end()], True) if end else (text, False)

    def _without_end(self, text: str) -> str:
        """``text`` without tokens that end answers at its end: one is written after it anyway."""
        while end := next((one for one in self._end_texts if text.rstrip().endswith(one)), None):
            text = text.rstrip()[: -len(end)]
        return text

    def _checked(
        self, texts: Texts, conversation: Conversation, given: list[tuple[str, list[tuple[str, str]]]]
    ) -> Texts:
        """``texts`` with what is lost: a variable, a kind of turn, or what should be in a text, which is ``given``.

        Of the texts, all but the first are answers.
        """
        assert self.template is not None
        shape = self.template.shape(conversation)
        if shape not in self._known:
            self._known[shape] = self.template.lost_variables(conversation) or self.template.lost_by_shape(conversation)
        by_shape = self._known[shape]
        found = (by_shape, "") if by_shape else next(filter(None, (first_lost(*one) for one in given)), None)
        lost, text = found or (None, "")
        every = (texts.prompt, *(text for text, _ in texts.segments))
        spells = any(map(self.encoder.is_marked, every))
        answer_lost = bool(lost) and any(first_lost(*one) for one in given[1:])
        return replace(texts, lost=lost, lost_text=text, answer_lost=answer_lost, control_tokens=spells)
