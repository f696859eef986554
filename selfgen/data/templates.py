"""What chat templates make of messages: prompts, answers, and what comes after an answer.

No other module applies a chat template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
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
_WAY_OUT = (
    "Give what the template needs as chat_template_kwargs (for example enable_thinking: false), or "
    "add_generation_prompt=False, by which the beginning of the assistant's turn belongs to the answer; or set "
    "tokenizer.chat_template to one that renders both alike, or give text and apply_chat_template=False"
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
    takes_parts: bool = field(init=False)  # and no contents that are text

    def __post_init__(self) -> None:
        if wrong := sorted(RESERVED & set(self.kwargs)):
            raise ValueError(f"chat_template_kwargs can't have {', '.join(wrong)}: selfgen sets them itself")
        self.takes_parts = False
        if not self._shows_answer():
            self.takes_parts = True
            self.takes_parts = self._shows_answer()

    def _shows_answer(self) -> bool:
        return _ANSWER in (self.of_short([_USER, _ASSISTANT]) or "")

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
        turns = conversation.turns[:upto]
        if self.takes_parts:
            turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
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

    def split(self, conversation: Conversation) -> tuple[str, str]:
        """The text of a conversation up to its last turn, which is the answer, and from there on.

        Raises:
            RowFault: the template rejects it, or renders the prompt in another way once the answer follows.
        """
        last = len(conversation.turns) - 1
        full = self.render(conversation)
        if conversation.prefix:
            return self._split_in_turn(conversation, full)
        prompt = self.render(conversation, last, generation_prompt=True) if last else ""
        return prompt, after(prompt, full)

    def prompt(self, conversation: Conversation) -> str:
        """The text up to the answer that comes next; it continues the last turn where that is a prefix.

        Raises:
            RowFault: the template rejects it, or would render it in another way once an answer follows.
        """
        if conversation.prefix:
            return self._split_in_turn(conversation, self.render(conversation))[0]
        prompt = self.render(conversation, generation_prompt=True)
        answered = Conversation([*conversation.turns, _ASSISTANT], "", *_extras(conversation))
        after(prompt, self.render(answered))
        return prompt

    def _split_in_turn(self, conversation: Conversation, full: str) -> tuple[str, str]:
        """``full`` before and after the prefix of its last turn's content."""
        content = conversation.turns[-1]["content"].strip()
        before = self.render(conversation, -1, generation_prompt=True) if len(conversation.turns) > 1 else ""
        start = full.find(content, len(common_prefix(before, full)))
        if start < 0:
            raise RowFault("the chat template leaves out text of an assistant turn that is continued")
        prefix = conversation.prefix.lstrip()
        stays = len(prefix) if len(prefix) < len(content) else len(content)
        return full[: start + stays] + prefix[stays:], full[start + stays :]

    def lost_variables(self, conversation: Conversation) -> str | None:
        """What a row hands to the template that the template does not know, or None."""
        source = self.source(conversation.tools)
        given = {name for name in ("tools", "documents") if getattr(conversation, name) or getattr(self, name)}
        if lost := next((name for name in sorted(given) if not _mentions(source, name)), None):
            return f"the column {lost!r}"
        if wrong := sorted(RESERVED & set(conversation.kwargs)):
            return f"chat_template_kwargs {', '.join(wrong)}, which selfgen sets itself"
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
                name = f"selfgen{number}call"
                words[name] = f"tool_calls of a turn of role {turn['role']!r}"
                marked["tool_calls"] = [{**call, "function": call["function"] | {"name": name}} for call in calls]
            turns.append(marked)
        try:
            text = self.render(Conversation(turns, "", *_extras(conversation)))
        except RowFault:  # it may check contents
            return None
        return next((what for word, what in words.items() if word not in text), None)

    def shape(self, conversation: Conversation) -> tuple:
        """What `lost_by_shape` depends on."""
        keys = ("content", *REASONING)
        turns = [(turn["role"], *sorted(turn), *(bool(turn.get(key)) for key in keys)) for turn in conversation.turns]
        return (*turns, bool(conversation.tools), bool(conversation.documents), repr(conversation.kwargs))


def _extras(conversation: Conversation) -> tuple:
    return conversation.tools, conversation.documents, conversation.kwargs


@cache
def _dated(source: str, date: str) -> str:
    """A template in which today is ``date``: it defines strftime_now itself, for the formats that it has."""
    day = datetime.strptime(date, "%Y-%m-%d")
    formats = dict.fromkeys(found[1] for found in re.findall(r"""(["'])([^"']*%[^"']*)\1""", source))
    cases = "".join(f"{{%- elif format == {text!r} -%}}{{{{ {day.strftime(text)!r} }}}}" for text in formats)
    unknown = "{%- else -%}{{ raise_exception('strftime_now is called with a format that is not in the template') }}"
    body = f"{{%- if false -%}}{cases}{unknown}{{%- endif -%}}"
    return f"{{%- macro strftime_now(format) -%}}{body}{{%- endmacro %}}{{{{ '' }}}}{source}"


def _mentions(source: str, variable: str) -> bool:
    return re.search(rf"\b{re.escape(variable)}\b", source) is not None


def common_prefix(one: str, other: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:same]


def after(prompt: str, full: str) -> str:
    """What ``full`` has after ``prompt``.

    Raises:
        RowFault: it does not begin so.
    """
    if full.startswith(prompt):
        return full[len(prompt) :]
    same = len(common_prefix(prompt, full))
    raise RowFault(
        "the chat template is not prefix preserving",
        f"after {same} characters the prompt alone has {prompt[same : same + 60]!r}, but the prompt with its answer "
        f"{full[same : same + 60]!r}. {_WAY_OUT}",
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
    text = (template.of_short([_USER, _ASSISTANT]) or "") if template else ""
    end = text.rpartition(_ANSWER)[2].lstrip() if _ANSWER in text else ""
    first = tokenizer(end, add_special_tokens=False).input_ids[:1] if end else []
    return frozenset(ends | {token for token in first if token in tokenizer.added_tokens_decoder})


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> frozenset[str]:
    """The spellings of tokens that are not text: special ones, and those that the template writes around turns."""
    added = tokenizer.added_tokens_decoder.values()
    written = (template.of_short([_USER, _ASSISTANT, _USER]) or "") if template else ""
    return frozenset(token.content for token in added if token.special or (token.content and token.content in written))


def text_after_answer(template: ChatTemplate, question: str) -> str:
    """What the chat template writes between an answer and the next one, where the user's turn between is ``question``.

    Raises:
        ValueError: the template renders an answer in another way when more turns follow, or rejects such turns.
    """
    before = template.of_short([_USER], generation_prompt=True)
    asked = [_USER, _ASSISTANT, {"role": "user", "content": question}]
    text = template.of_short(asked, generation_prompt=True)
    if before is None or text is None:
        raise ValueError(f"the chat template rejects a question after an answer. {_WAY_OUT}")
    place = text.find(_ANSWER, len(before))
    own_header = text[len(before) : place] if not template.add_generation_prompt else ""
    if place < 0 or not text.startswith(before + own_header + _ANSWER):
        raise ValueError(
            "the chat template renders an answer in another way when a turn follows it, so a correction can't be asked "
            f"for after it. {_WAY_OUT}"
        )
    return text[place + len(_ANSWER) :]
