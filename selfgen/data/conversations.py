"""A row's cells as one conversation, whatever form they came in: what is given to a chat template, and what is asked.

A row that can't be used is a `RowFault`, whose reason is counted. Nothing here knows tokenizers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a message that hold text besides its content
EXTRAS = ("tools", "documents", "chat_template_kwargs")  # columns of a row that go to the chat template
_TEXT_PARTS = ("text", "input_text", "output_text")
# Columns of other trainers' formats: first turn, earlier turns, more text, and an old form of tools.
BESIDE = ("system", "history", "input", "functions")
NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios", "refusal")  # keys and columns that are no text
_MEDIA = (*NOT_TEXT, "image_url", "video_url", "audio_url", "input_audio")  # keys of messages and of parts
_ELSEWHERE = ("value", "text", "parts")  # keys in which other formats have a message's content
_CALLS_ELSEWHERE = ("tool_call", "function_calls")  # and calls
_ARGUMENTS_ELSEWHERE = ("args", "input", "arguments", "parameters")  # and arguments, or beside the function
_WEIGHTS = ("weight", "train", "training", "loss")  # keys that tell whether a turn is learned
_WEIGHTS_OF_PARTS = ("train_detail", "training_detail")
ROLES = ("user", "assistant")
_ROLES = {  # of ShareGPT
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


class RowFault(ValueError):
    """Why a row can't be used: ``reason`` is counted, ``detail`` says more of this row."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass
class Conversation:
    """What a row gives to a chat template, in the form that templates expect: contents are text, arguments objects."""

    turns: list[dict[str, Any]]
    prefix: str = ""  # the beginning of the last turn's content, which belongs to the prompt
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)  # more variables of the template

    def said(self, turn: int) -> list[tuple[str, str]]:
        """What a turn says, each with what it is, as templates order it: reasoning, content, calls."""
        message = self.turns[turn]
        whose = f"of a turn of role {message['role']!r}"
        said = [(f"the {key} {whose}", message[key]) for key in REASONING if message.get(key)]
        said.append((f"the text {whose}", message["content"]))
        for call in message.get("tool_calls") or ():
            texts = [call["function"]["name"], *leaves(call["function"].get("arguments"))]
            said += [(f"tool_calls {whose}", text) for text in texts]
        return [(what, text) for what, text in said if text.strip()]

    def described(self) -> list[tuple[str, str]]:
        """What tools and documents say: names, descriptions and parameters; titles and texts."""
        said = []
        for tool in self.tools or ():
            function = _object(tool.get("function", tool))
            said += [function.get("name"), function.get("description")]
            said += _object(_object(function.get("parameters")).get("properties"))
        of_documents = [text for document in self.documents or () for text in document.values()]
        pairs = [("'tools'", text) for text in said] + [("'documents'", text) for text in of_documents]
        return [(what, text) for what, text in pairs if isinstance(text, str) and text.strip()]

    def map(self, change: Callable[[str], str]) -> "Conversation":
        """The conversation with every text in it changed."""
        given = (self.turns, self.prefix, self.tools, self.documents, self.kwargs)
        return Conversation(*(map_text(one, change) for one in given))

    def with_turn(self, turn: dict[str, Any]) -> "Conversation":
        return replace(self, turns=[*self.turns, turn])

    def is_empty(self, turn: int) -> bool:
        return not self.said(turn)

    def parted(self) -> "Conversation":
        """The conversation with its last turn as two: what belongs to the prompt, and what follows it."""
        if not self.prefix:
            return self
        *turns, last = self.turns
        begun = {key: value for key, value in last.items() if key != "tool_calls"} | {"content": self.prefix}
        told = {key: value for key, value in last.items() if key not in REASONING}
        told["content"] = last["content"].strip()[len(self.prefix.lstrip()) :]
        return replace(self, turns=[*turns, begun, told])


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def continued(begun: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """One turn of the assistant, of which the prompt has ``begun`` some text."""
    if any(told.get(key) for key in REASONING):
        raise RowFault("reasoning in an answer whose text has begun in the prompt")
    reasoning = {key: begun[key] for key in REASONING if key in begun}
    return told | reasoning | {"content": begun["content"] + told["content"]}


def leaves(value: Any) -> list[str]:
    """Keys and values of nested lists and objects, as JSON writes them without quotes."""
    if isinstance(value, dict):
        return [text for key, one in value.items() for text in (str(key), *leaves(one))]
    if isinstance(value, list | tuple):
        return [text for one in value for text in leaves(one)]
    return [value if isinstance(value, str) else json.dumps(value, default=str)]


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """``value`` with every text in it changed, also that of keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {map_text(key, change): map_text(one, change) for key, one in value.items()}
    return [map_text(one, change) for one in value] if isinstance(value, list) else value  # None, numbers


def without_none(value: Any) -> Any:
    """Objects without the keys whose value is None: Arrow gives every object the keys of all."""
    if isinstance(value, dict):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value


def read_turns(cell: Any, column: str, arrow: bool) -> list[dict[str, Any]]:
    """The messages in a cell: a list, JSON text of one, or an object of lists, as `datasets` makes of sequences.

    ``arrow`` tells that None stands for keys that a message does not have.

    Raises:
        RowFault: they are no messages.
    """
    if isinstance(cell, str):
        cell, arrow = _parsed(cell, list), False
    if isinstance(cell, dict) and ("role" in cell or "from" in cell):
        cell = _of_lists(cell)
    if not isinstance(cell, list):
        raise RowFault(f"{column!r} is no list of messages", f"it is {cell!r:.60}")
    if cell and all(isinstance(one, dict) and "role" not in one and "type" in one for one in cell):
        cell = [{"role": "user" if column != "completion" else "assistant", "content": cell}]  # parts of one message
    return [_message(one, column, arrow) for one in cell]


def _of_lists(value: Any) -> Any:
    """A list of objects, where ``value`` is an object of lists: `datasets` makes these of sequences of objects."""
    lists = list(value.values()) if isinstance(value, dict) else []
    if not lists or not all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
        return value
    return [dict(zip(value, values, strict=True)) for values in zip(*lists, strict=True)]


def _message(message: Any, column: str, arrow: bool) -> dict[str, Any]:
    if isinstance(message, dict) and "role" not in message and isinstance(message.get("from"), str):  # ShareGPT
        message = {("role" if key == "from" else "content" if key == "value" else key): message[key] for key in message}
        if message["role"] == "function_call":
            message = {"role": "assistant", "content": None, "tool_calls": message.get("content")}
        message["role"] = _ROLES.get(message["role"], message["role"])
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowFault(
            f"{column!r} holds something that is no message", f"a message has 'role' and 'content': {message!r:.80}"
        )
    message = without_none(message) if arrow else {k: v for k, v in message.items() if v is not None}
    for key in _MEDIA:
        if message.get(key):
            raise RowFault(f"a message with {key!r}, which is not text")
    if "content" not in message:
        if other := next((key for key in _ELSEWHERE if message.get(key)), None):
            raise RowFault(f"a message with {other!r} in place of 'content'", f"{message!r:.80}")
        if message["role"] == "user":
            raise RowFault("a user turn without content")
    if other := next((key for key in _CALLS_ELSEWHERE if message.get(key)), None):
        raise RowFault(f"a message with {other!r} in place of 'tool_calls'", f"{message!r:.80}")
    turn = dict(message)
    turn["content"], reasoning = _text_of(message.get("content"))
    for key in REASONING:
        if key in turn:
            turn[key] = "".join(_text_of(turn[key]))
    if reasoning:
        turn["reasoning_content"] = turn.get("reasoning_content", "") + reasoning
    if call := turn.pop("function_call", None):
        turn["tool_calls"] = [call]
    if "tool_calls" in turn:
        turn["tool_calls"] = _calls(turn["tool_calls"])
        if not turn["tool_calls"]:
            del turn["tool_calls"]
    return turn


def _text_of(content: Any) -> tuple[str, str]:
    """(text, reasoning) of a message's content: text, or text parts, which are joined."""
    if content is None or isinstance(content, str):
        return content or "", ""
    parts = content
    if isinstance(content, dict) and "text" in content:
        parts = _of_lists(content) if isinstance(content["text"], list) else [content]
        more = [key for key in content if key not in ("type", "text") and content[key] is not None]
        if more and isinstance(content["text"], str):
            raise RowFault("the content of a message is an object with more than text", f"it has {', '.join(more)}")
    if not isinstance(parts, list):
        kind = "an object" if isinstance(parts, dict) else type(parts).__name__
        raise RowFault(f"the content of a message is {kind}, not text")
    texts: list[str] = []
    reasoning: list[str] = []
    for part in parts:
        part = {"text": part} if isinstance(part, str) else part
        kind = (part.get("type") or "text") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else None
        if kind in ("thinking", "reasoning"):
            known = [part[key] for key in ("text", *REASONING, "content", "summary") if part.get(key) is not None]
            if not known:
                raise RowFault(f"a content part of type {kind!r} without text")
            reasoning += _text_of(next(filter(None, known), None))
        elif isinstance(text, str) and kind in _TEXT_PARTS:
            if media := next((key for key in _MEDIA if part.get(key)), None):
                raise RowFault(f"a content part with {media!r}, which is not text")
            texts.append(text)
        elif kind in _TEXT_PARTS:
            raise RowFault("a content part without text", f"{part!r:.60}")
        else:
            raise RowFault(f"a content part of type {kind!r}, which is not text")
    return "".join(texts), "".join(reasoning)


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Tool calls as objects with ``function``, its ``name`` and ``arguments``, which are objects."""
    found = []
    calls = _parsed(calls, (list, dict)) if isinstance(calls, str) else calls
    calls = _of_lists(calls)
    for call in calls if isinstance(calls, list) else filter(None, [calls]):
        call = _parsed(call, dict) if isinstance(call, str) else call
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowFault("a tool call without a function's name", f"{call!r:.80}")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):  # a blank one is of a function that takes none
            arguments = _parsed(arguments, dict) if arguments.strip() else None
        if arguments is None:
            others = [(key, one.get(key)) for key in _ARGUMENTS_ELSEWHERE for one in (function, call)]
            if other := next((key for key, value in others if value and str(value).strip()), None):
                raise RowFault(f"a tool call whose function has no arguments, beside {other!r}", f"{call!r:.80}")
            arguments = {}
        rest = {key: value for key, value in call.items() if key != "function"} if call is not function else {}
        more = {key: value for key, value in function.items() if key not in ("arguments", "parameters")}
        found.append({"type": "function", **rest, "function": more | {"arguments": arguments}})
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise RowFault(
            "JSON text in which an object has a key twice", f"the keys are {[key for key, _ in pairs]!r:.80}"
        )
    return found


def _parsed(text: str, kind: type | tuple[type, ...]) -> Any:
    """The JSON value in ``text``, where it is of this kind; else the text.

    Raises:
        RowFault: an object in it has a key twice, of which JSON readers keep one value.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RowFault:
        raise
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, kind) else text


def read_extras(cells: dict[str, Any], arrow: set[str]) -> dict[str, Any]:
    """``tools``, ``documents`` and ``kwargs`` of a row, as far as it has any; ``arrow`` names columns as above."""
    for name in NOT_TEXT:
        if cells.get(name):
            raise RowFault(f"the column {name!r}, which is not text")
    if cells.get("functions"):
        raise RowFault("the column 'functions', which is not read; rename it to 'tools'")
    found = {}
    for name in EXTRAS:
        value = cells.get(name)
        kind = dict if name == "chat_template_kwargs" else list
        if isinstance(value, str):
            value = _parsed(value, kind) if value.strip() not in ("", "null") else None
        elif name in arrow:
            value = without_none(value)
        if not value:
            continue
        if kind is list and isinstance(value, list):
            value = [_parsed(one, dict) if isinstance(one, str) else one for one in value]
        if not isinstance(value, kind) or (kind is list and not all(isinstance(one, dict) for one in value)):
            wanted = "an object" if kind is dict else "a list of objects"
            raise RowFault(f"{name!r} is not {wanted}, or JSON text of one", f"it is {value!r:.80}")
        found["kwargs" if kind is dict else name] = value
    return found


def turns_beside(cells: dict[str, Any], arrow: set[str], turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns that the columns ``system`` and ``history`` put before those of a row.

    ``history`` is a list of messages, or of pairs of question and answer, or JSON text of one.
    """
    before: list[dict[str, Any]] = []
    system, history = cells.get("system"), cells.get("history")
    if system and not isinstance(system, str):
        raise RowFault("the column 'system' is not text", f"it is {system!r:.60}")
    if system and system.strip():
        given = turns[0]["content"] if turns and turns[0]["role"] == "system" else None
        if given is None:
            before = [{"role": "system", "content": system}]
        elif given.strip() != system.strip():
            raise RowFault("a column 'system' beside another system turn")
    if isinstance(history, str):
        history = _parsed(history, list) if history.strip() not in ("", "null") else None
    if history:
        pairs = history if isinstance(history, list) else [None]
        if all(isinstance(pair, list) and all(isinstance(one, str) for one in pair) for pair in pairs):
            history = [{"role": ROLES[i % 2], "content": one} for pair in history for i, one in enumerate(pair)]
        before += read_turns(history, "history", "history" in arrow)
    return before


def weights_of(turns: list[dict[str, Any]]) -> list[bool]:
    """Per turn, whether it may be learned: none of its ``weight``, ``train``, ``training`` and ``loss`` is 0."""
    learned = []
    for turn in turns:
        weights = [turn[key] for key in _WEIGHTS if key in turn]
        if wrong := [weight for weight in weights if weight not in (0, 1)]:
            raise RowFault("a message with another weight than 0 or 1", f"it is {wrong[0]!r}")
        if parts := next((key for key in _WEIGHTS_OF_PARTS if turn.get(key)), None):
            raise RowFault(f"a message with {parts!r}: a turn is learned as a whole or not at all")
        learned.append(all(weights))
    return learned
