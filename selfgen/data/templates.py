"""What chat templates make of messages: prompts, answers, and what comes after an answer.

No other module applies a chat template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from .conversations import REASONING, Conversation, RowFault

DATE = "2024-07-26"  # of templates that print today's date: rows must not change from day to day
RESERVED = {
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens", "strftime_now"),
}
_ANSWER = "The answer."
_USER = {"role": "user", "content": "x"}
_ASSISTANT = {"role": "assistant", "content": _ANSWER}
_SYSTEM = {"role": "system", "content": "x"}
_CALL = {  # some templates want an id of nine characters
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "selfgen01", "function": {"name": "f", "arguments": {"x": _ANSWER}}}],
}
NOT_PREFIX = "the chat template writes the prompt in another way when an answer follows (it is not prefix preserving)"
WAY_OUT = (
    "Give what the template needs as chat_template_kwargs (--chat-template-kwargs '{\"enable_thinking\": false}'), or "
    "add_generation_prompt=False (--add-generation-prompt no), by which the beginning of the assistant's turn belongs "
    "to the answer; or set tokenizer.chat_template to one that renders both alike, or give text and "
    "apply_chat_template=False (--apply-chat-template no)"
)


@dataclass
class ChatTemplate:
    """The chat template of ``tokenizer``, and what is handed to it with all rows.

    ``kwargs`` are variables of the template, ``tools`` and ``documents`` what it describes, where a row has none of its
    own. ``date`` is the day ("2024-07-26") that a template prints as today's.
    """

    tokenizer: PreTrainedTokenizerBase
    kwargs: dict[str, Any] = field(default_factory=dict)
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    add_generation_prompt: bool = True
    date: str | None = None
    takes_parts: bool = field(init=False, default=False)  # and no contents that are text
    calls: tuple[str | None, bool] = field(init=False, default=("", False))  # contents of calls; arguments as JSON text

    def __post_init__(self) -> None:
        if wrong := sorted(RESERVED & set(self.kwargs)):
            raise ValueError(f"chat_template_kwargs can't have {', '.join(wrong)}: selfgen sets them itself")
        self.takes_parts = not self._shows(_ASSISTANT, _ANSWER)
        self.takes_parts = self.takes_parts and self._shows(_ASSISTANT, _ANSWER)
        if "tool_calls" in self.sources:
            forms = [(content, as_text) for as_text in (False, True) for content in ("", None)]
            self.calls = next((form for form in forms if self._shows_call(form)), forms[0])

    def _shows_call(self, form: tuple[str | None, bool]) -> bool:
        self.calls = form
        return self._shows(_CALL, _ANSWER)

    def _shows(self, turn: dict[str, Any], text: str) -> bool:
        return text in (self.of_short([_USER, turn]) or "")

    @property
    def sources(self) -> str:
        """The template's text; tokenizers may have several."""
        known = self.tokenizer.chat_template
        return known if isinstance(known, str) else "\n".join((known or {}).values())

    def source(self, tools: list[Any] | None = None) -> str:
        """The template's text; tokenizers may have another one for tools."""
        return self.tokenizer.get_chat_template(None, tools or self.tools)

    def of_short(self, turns: list[dict[str, Any]], generation_prompt: bool = False) -> str | None:
        """The text of turns that no row gave, after a system turn where the template needs one; None if it fails."""
        for before in ([], [_SYSTEM]):
            try:
                return self.render(Conversation([*before, *turns]), generation_prompt=generation_prompt)
            except RowFault:  # where rows need it, that is reported with the row
                continue
        return None

    def render(self, conversation: Conversation, upto: int | None = None, *, generation_prompt: bool = False) -> str:
        """The text of the first ``upto`` turns, of all by default, and the beginning of the answer that comes next.

        Raises:
            RowFault: the template rejects them, as it may for any reason.
        """
        if wrong := sorted(RESERVED & set(conversation.kwargs)):
            raise RowFault(f"chat_template_kwargs {', '.join(wrong)}, which selfgen sets itself")
        turns = [self._in_form(turn) for turn in conversation.turns[:upto]]
        tools, documents = conversation.tools or self.tools, conversation.documents or self.documents
        try:
            source = self.source(tools)
            return self.tokenizer.apply_chat_template(
                turns,
                chat_template=_dated(source, self.date or DATE) if "strftime_now" in source else source,
                tokenize=False,
                tools=tools,
                documents=documents,
                add_generation_prompt=generation_prompt and self.add_generation_prompt,
                **(self.kwargs | conversation.kwargs),
            )
        except Exception as error:  # a template may raise anything
            raise RowFault("the chat template rejects the messages", f"{error}: {turns!r:.200}") from error

    def answer_begins(self) -> str:
        """What the template writes before an answer that is not in the prompt: nothing with a generation prompt."""
        if self.add_generation_prompt:
            return ""
        before, text = self.of_short([_USER]) or "", self.of_short([_USER, _ASSISTANT]) or ""
        return text[len(before) :].partition(_ANSWER)[0] if text.startswith(before) else ""

    def _in_form(self, turn: dict[str, Any]) -> dict[str, Any]:
        """A turn as the template takes it."""
        if not self.takes_parts and not turn.get("tool_calls"):
            return turn
        content = turn["content"]
        if calls := turn.get("tool_calls"):
            no_content, as_text = self.calls
            content = content or no_content
            turn = turn | {"tool_calls": [_with_arguments_as_text(call) for call in calls] if as_text else calls}
        if self.takes_parts and content is not None:
            content = [{"type": "text", "text": content}]
        return turn | {"content": content}

    def split(self, conversation: Conversation) -> tuple[str, str]:
        """The text of a conversation up to its last turn, which is the answer, and from there on.

        Raises:
            RowFault: the template rejects it, or renders the prompt in another way once the answer follows.
        """
        last = len(conversation.turns) - 1
        full = self.render(conversation)
        if conversation.prefix:
            prompt, rest = self._split_in_turn(conversation, full)
            *turns, begun, _ = conversation.parted().turns
            if self.prompt(replace(conversation, turns=[*turns, begun])) != prompt:
                raise RowFault("the chat template writes the beginning of this answer in another way when it goes on")
            return prompt, rest
        prompt = self.before(conversation, last, full)
        return prompt, full[len(prompt) :]

    def before(self, conversation: Conversation, turn: int | None, full: str) -> str:
        """What ``full`` has before a turn's answer: the prompt of the turns before it, with which it begins.

        Raises:
            RowFault: it does not.
        """
        if turn == 0:
            return ""
        prompt = self.render(conversation, turn, generation_prompt=True)
        if not self.add_generation_prompt and not full.startswith(prompt):  # some end conversations with an EOS
            prompt = prompt.removesuffix(self.tokenizer.eos_token or "")
        after(prompt, full)
        return prompt

    def prompt(self, conversation: Conversation) -> str:
        """The text up to the answer that comes next; it continues the last turn where that is a prefix.

        Raises:
            RowFault: the template rejects it, or would render it in another way once an answer follows.
        """
        if conversation.prefix:
            *turns, last = conversation.turns
            opened = conversation.prefix.rpartition("</think>")[2]
            end = f"{_ANSWER}</think>{_ANSWER}" if "<think>" in opened else _ANSWER
            answered = replace(conversation, turns=[*turns, last | {"content": conversation.prefix + end}])
            return self._split_in_turn(answered, self.render(answered))[0]
        try:
            return self.before(conversation, None, self.render(conversation.with_turn(_ASSISTANT)))
        except RowFault:
            reasoned = conversation.with_turn(_ASSISTANT | {REASONING[0]: _ANSWER})  # which some prompts begin
            if not _mentions(self.sources, REASONING[0]):
                raise
            return self.before(conversation, None, self.render(reasoned))

    def _split_in_turn(self, conversation: Conversation, full: str) -> tuple[str, str]:
        """``full`` before and after the prefix of its last turn's content."""
        *turns, last = conversation.turns
        content, prefix = last["content"].strip(), conversation.prefix.lstrip()
        other = self.render(replace(conversation, turns=[*turns, last | {"content": _ANSWER}]))
        start = other.rfind(_ANSWER)
        if start < 0 or not full.startswith(content, start):  # reasoning is in it, which templates write differently
            before = self.render(conversation, -1, generation_prompt=True) if turns else ""
            start = full.find(prefix, len(common_prefix(before, full)))
        if start < 0:
            raise RowFault("the chat template leaves out text of an assistant turn that is continued")
        end = start + min(len(prefix), len(content))
        return full[:end], full[end:]

    def lost_variables(self, conversation: Conversation) -> str | None:
        """What a row hands to the template that the template does not know, or None."""
        source = self.source(conversation.tools)
        given = {name for name in ("tools", "documents") if getattr(conversation, name) or getattr(self, name)}
        if lost := next((name for name in sorted(given) if not _mentions(source, name)), None):
            return f"the column {lost!r}"
        variables = sorted(self.kwargs | conversation.kwargs)
        if unknown := [name for name in variables if not _mentions(source, name)]:
            return f"chat_template_kwargs {', '.join(unknown)}"
        return None

    def lost_by_shape(self, conversation: Conversation) -> str | None:
        """What the template leaves out of any conversation of this shape, or None.

        Short texts may be found in what the template itself writes. Words that occur nowhere else are not.
        """
        words: dict[str, str] = {}
        turns = []
        for number, turn in enumerate(conversation.turns):
            marked = dict(turn)
            for key in ("content", *REASONING):
                if turn.get(key, "").strip():
                    marked[key] = f"selfgen{number}{key}"
                    words[marked[key]] = f"the {'text' if key == 'content' else key} of a turn of role {turn['role']!r}"
            if calls := turn.get("tool_calls"):
                word = f"selfgen{number}call"
                words[word] = f"tool_calls of a turn of role {turn['role']!r}"
                marked["tool_calls"] = [call | {"function": _marked_call(call["function"], word)} for call in calls]
            turns.append(marked)
        try:
            text = self.render(replace(conversation, turns=turns))
        except RowFault:  # it may check contents
            return None
        return next((what for word, what in words.items() if word not in text), None)

    def shape(self, conversation: Conversation) -> tuple:
        """What `lost_by_shape` depends on."""
        keys = ("content", *REASONING)
        turns = [
            (turn["role"], *sorted(turn), *(bool(turn.get(key, "").strip()) for key in keys))
            for turn in conversation.turns
        ]
        return (*turns, bool(conversation.tools), bool(conversation.documents), repr(conversation.kwargs))


def _marked_call(function: dict[str, Any], word: str) -> dict[str, Any]:
    """A call with a word in it: not its name, which some templates take from the call's id."""
    arguments = function["arguments"]
    return function | ({"arguments": arguments | {word: word}} if isinstance(arguments, dict) else {"name": word})


def _with_arguments_as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = (
        function["arguments"]
        if isinstance(function["arguments"], str)
        else json.dumps(function["arguments"], ensure_ascii=False)
    )
    return call | {"function": function | {"arguments": text}}


@cache
def _dated(source: str, date: str) -> str:
    """A template in which today is ``date``: it defines strftime_now itself, for the formats that it has."""
    day = datetime.strptime(date, "%Y-%m-%d")
    quoted = re.findall(r"""(?=(["'])([^"'\n]*%[^"'\n]*)\1)""", source)  # some of it is between two quoted texts
    formats = dict.fromkeys(text for _, text in quoted if "{%" not in text and "%}" not in text)
    cases = "".join(f"{{%- elif format == {text!r} -%}}{{{{ {day.strftime(text)!r} }}}}" for text in formats)
    unknown = "{%- else -%}{{ raise_exception('strftime_now is called with a format that is not in the template') }}"
    body = f"{{%- if false -%}}{cases}{unknown}{{%- endif -%}}"
    return f"{{%- macro strftime_now(format) -%}}{body}{{%- endmacro %}}{{{{ '' }}}}{source}"


def _mentions(source: str, variable: str) -> bool:
    return re.search(rf"\b{re.escape(variable)}\b", source) is not None


def common_prefix(one: str, other: str) -> str:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return one[:low]


def after(prompt: str, full: str) -> str:
    """What ``full`` has after ``prompt``.

    Raises:
        RowFault: it does not begin so.
    """
    if full.startswith(prompt):
        return full[len(prompt) :]
    same = len(common_prefix(prompt, full))
    raise RowFault(
        NOT_PREFIX,
        f"after {same} characters the prompt alone has {prompt[same : same + 60]!r}, but the prompt with its answer "
        f"{full[same : same + 60]!r}",
    )


def answer_ends(
    tokenizer: PreTrainedTokenizerBase, known: Iterable[int] = (), template: ChatTemplate | None = None
) -> frozenset[int]:
    """Ids that end an answer: ``known`` ones, the EOS, and the added token that the template writes right after one.

    EOS and the template's differ where a base model's tokenizer has a template: EOS ends documents, and `<|im_end|>`
    turns. ``known`` are those of a model; ``template`` is the tokenizer's by default.
    """
    ends = {*known, tokenizer.eos_token_id} - {None}
    if template is None and getattr(tokenizer, "chat_template", None):
        template = ChatTemplate(tokenizer)
    if template is None:
        return frozenset(ends)
    added = tokenizer.added_tokens_decoder
    if tokenizer.eos_token_id not in takewhile(added.__contains__, _ids_after_answer(template, _ASSISTANT, _USER)):
        ends.update(token for token in _ids_after_answer(template, _ASSISTANT)[:1] if token in added)
    of_calls = [token for token in _ids_after_answer(template, _CALL) if token in added and added[token].special]
    return frozenset(ends if ends.intersection(of_calls) else {*ends, *of_calls[-1:]})  # the last: calls have brackets


def _ids_after_answer(template: ChatTemplate, *turns: dict[str, Any]) -> list[int]:
    _, found, end = (template.of_short([_USER, *turns]) or "").rpartition(_ANSWER)
    return template.tokenizer(end.strip(), add_special_tokens=False).input_ids if found else []


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> frozenset[str]:
    """The spellings of tokens that are not text: special ones, and those that the template writes around turns."""
    added = tokenizer.added_tokens_decoder.values()
    written = (template.of_short([_USER, _ASSISTANT, _USER]) or "") if template else ""
    sources = template.sources if template else ""
    return frozenset(
        token.content
        for token in added
        if (token.special or (token.content in written and token.content.strip(" \t\n▁")))
        and not _looks_for(sources, token.content)
    )


def _looks_for(source: str, token: str) -> bool:
    """Whether a template searches contents for a token, as those do that tell reasoning by its tags."""
    quoted = f"""["']{re.escape(token)}["']"""
    searches = rf"(?:split|replace|startswith|endswith|find)\(\s*{quoted}|{quoted}\s+(?:not\s+)?in\b"
    return token in source and re.search(searches, source) is not None


def text_after_answer(template: ChatTemplate, question: str) -> str:
    """What the chat template writes between an answer and the next one, where the user's turn between is ``question``.

    Raises:
        ValueError: the template renders an answer in another way when more turns follow, or rejects such turns.
    """
    asked = [_USER, _ASSISTANT, {"role": "user", "content": question}]
    before, text = (template.of_short(turns, generation_prompt=True) for turns in ([_USER], asked))
    if not template.add_generation_prompt:  # some end conversations with an EOS
        eos = template.tokenizer.eos_token or ""
        before, text = ((one and one.removesuffix(eos)) for one in (before, text))
    if before is None or text is None:
        raise ValueError(f"the chat template rejects a question after an answer. {WAY_OUT}")
    place = text.find(_ANSWER, len(before))
    full = template.of_short([_USER, _ASSISTANT]) or ""
    begun = text.startswith(before) and (place == len(before) or full.startswith(text[:place]))
    if place < 0 or not begun:
        raise ValueError(
            "the chat template renders an answer in another way when a turn follows it, so a correction can't be asked "
            f"for after it. {WAY_OUT}"
        )
    return text[place + len(_ANSWER) :]
