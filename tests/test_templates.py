"""Rows of all kinds under the chat templates of the common families: a row is read whole, or dropped by name."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field, replace
from datetime import datetime

import pytest
from datasets import Dataset
from helpers.templates import CHATML, FAMILIES, QWEN3, Family
from transformers.utils import chat_template_utils

from selfgen.correction import CorrectionCue
from selfgen.data import RowOptions, tokenize_rows, tokenizing
from selfgen.data.templates import NOT_PREFIX, WAY_OUT

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Tells the "weather"\nof a city. <|im_end|></s>',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
DOCUMENTS = [{"title": "Fjords", "text": "A fjord is\nlong & deep."}, {"title": "Oslo", "text": "Oslo has 1 fjord."}]
SPELLED = "a </s><s> b <|im_end|>\n<|im_start|>system c <|eot_id|> d <end_of_turn> <|end|><|return|>[/INST]<eos> e"
CODE = "\tif x < 1:\r\n\r\n\n\n        return '<b>'  # é e\u0301 \U0001f9d1\u200d\U0001f680 \u2028 中文"


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content=None, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def call(arguments, number=1, **more):
    return {"id": f"call{number:05}", "function": {"name": "weather", "arguments": arguments}, **more}


def result(content, number=1):
    return {"role": "tool", "tool_call_id": f"call{number:05}", "name": "weather", "content": content}


@dataclass
class Row:
    """Cells, the texts in them that have to be in the prompt and in the answer, and what a template needs for them."""

    cells: dict
    asked: list[str]
    told: list[str]
    needs: set[str] = field(default_factory=set)


def chat(*turns, needs="", asked=(), told=(), **cells):
    """A row of messages; by default the last turn's content is told, and all other contents are asked."""
    contents = [turn["content"] for turn in turns]
    return Row({"messages": list(turns), **cells}, asked or contents[:-1], told or contents[-1:], _words(needs))


def pair(prompt, completion, asked, told, needs=""):
    return Row({"prompt": prompt, "completion": completion}, asked, told, _words(needs + ", no system"))


def other(messages, asked=("Is it warm?",), told=("Yes, it is.",), needs=""):
    return Row({"messages": messages}, asked, told, _words(needs + ", no system"))


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"city": value}
    return value


def _words(needs):
    return set(filter(None, needs.split(", ")))


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


Q, A = user("Is it warm?"), assistant("Yes, it is.")
OSLO = user("Oslo?")
CALL = assistant(tool_calls=[call({"city": "Oslo"})])
CALLS = assistant(tool_calls=[call({"city": "Oslo"}), call({"city": "Rome"}, 2)])
FROM_HUMAN, FROM_GPT = {"from": "human", "value": "Is it warm?"}, {"from": "gpt", "value": "Yes, it is."}
TAGS = "<think>\nJuly.\n</think>\n\nYes."
ROWS = {
    "plain": chat(Q, A),
    "text": pair("Is it warm?", "Yes.", ["Is it warm?"], ["Yes."]),
    "a space": pair(" ", "Yes.", [], ["Yes."]),
    "blanks around": chat(user("  Is it \n\n warm?\n\n"), assistant("\n\n  Yes,\n\n it is.  \n")),
    "code": chat(user(CODE), assistant(CODE)),
    "one letter": chat(user("e"), assistant("e"), user("s"), assistant("e")),
    "equal turns": chat(Q, A, Q, A, Q, A),
    "answer is the question": chat(user("Yes, it is."), A),
    "headers": chat(user("### Assistant:\nno\n\n### User:\n"), assistant("model\nUser: q\nAssistant: <<SYS>> no")),
    "system": chat(system("Be brief."), Q, A, needs="system"),
    "late system": chat(Q, A, system("Be rude."), user("And now?"), assistant("No!"), needs="late system"),
    "developer": chat({"role": "developer", "content": "Be kind."}, Q, A, needs="developer"),
    "parts": chat(
        user(parts("Is it", " warm?")), assistant(parts("Yes, ", "it is.")), asked=["Is it warm?"], told=["Yes, it is."]
    ),
    "parts with null": chat(
        user([{"type": "text", "text": "Is it ", "image": None}, "warm?", {"type": None, "text": ""}]),
        A,
        asked=["Is it warm?"],
    ),
    "parts as lists": chat(user({"type": ["text", "text"], "text": ["Is it", " warm?"]}), A, asked=["Is it warm?"]),
    "no parts": chat(system([]), Q, A, asked=["Is it warm?"], needs="system"),
    "nothing between": chat(Q, assistant(" \n"), user("Well?"), assistant("No.")),
    "as JSON": other(json.dumps([Q, A])),
    "as lists": other({"role": ["user", "assistant"], "content": ["Is it warm?", "Yes, it is."]}),
    "ShareGPT": other([FROM_HUMAN, FROM_GPT]),
    "ShareGPT calls": other(
        [
            FROM_HUMAN,
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": "7 degrees"},
            FROM_GPT,
        ],
        asked=["Is it warm?", "weather", "Oslo", "7 degrees"],
        needs="calls, calls without id",
    ),
    "reasoning": chat(
        Q, assistant("Yes.", reasoning_content="It is\n\nJuly."), told=["It is\n\nJuly.", "Yes."], needs="reasoning"
    ),
    "thinking": chat(Q, assistant("Yes.", thinking="July."), told=["July.", "Yes."], needs="reasoning"),
    "reasoning parts": chat(
        Q,
        assistant([{"type": "thinking", "thinking": "July."}, *parts("Yes.")]),
        told=["July.", "Yes."],
        needs="reasoning",
    ),
    "blank reasoning": chat(Q, A | {"reasoning_content": "\n"}),
    "reasoning only": chat(Q, assistant("", reasoning_content="July."), told=["July."], needs="reasoning"),
    "tags": chat(Q, assistant(TAGS), told=["July.", "Yes."], needs="tags"),
    "tags only": chat(Q, assistant("<think>July.</think>"), told=["July."], needs="tags"),
    "earlier reasoning": chat(
        Q,
        assistant("Yes.", reasoning_content="July."),
        user("Oh?"),
        A,
        asked=["July.", "Yes."],
        needs="reasoning, earlier reasoning",
    ),
    "earlier tags": chat(Q, assistant(TAGS), user("Oh?"), A, asked=["July.", "Yes.", "Oh?"], needs="earlier tags"),
    "call": chat(
        OSLO,
        assistant(tool_calls=[call({"city": 'Oslo "é"\n', "days": 2})]),
        told=["weather", "city", 'Oslo "é"', "days", "2"],
        needs="calls",
    ),
    "call with text": chat(
        OSLO, CALL | {"content": "I'll look."}, told=["I'll look.", "weather", "Oslo"], needs="calls, calls with text"
    ),
    "calls": chat(OSLO, CALLS, told=["Oslo", "Rome"], needs="calls, several calls"),
    "calls as JSON": chat(
        OSLO, assistant(tool_calls=json.dumps([call('{"city": "Oslo"}')])), told=["weather", "Oslo"], needs="calls"
    ),
    "call with a list": chat(
        OSLO, assistant(tool_calls=[call(["Oslo", 3])]), told=["weather", "Oslo", "3"], needs="calls"
    ),
    "call with nothing": chat(OSLO, assistant(tool_calls=[call(None)]), told=["weather"], needs="calls"),
    "no calls": chat(Q, A | {"tool_calls": []}),
    "result": chat(
        OSLO, CALL, result("7 degrees"), assistant("It is 7."), asked=["Oslo?", "weather", "7 degrees"], needs="calls"
    ),
    "results": chat(
        OSLO,
        CALLS,
        result("7 degrees"),
        result("21 degrees", 2),
        assistant("7 and 21."),
        asked=["Oslo", "Rome", "7 degrees", "21 degrees"],
        needs="calls, several calls",
    ),
    "tools": chat(
        OSLO,
        CALL,
        result("7 degrees"),
        assistant("It is 7."),
        asked=["Tells the", "city", "Oslo?", "7 degrees"],
        needs="calls, tools",
        tools=TOOLS,
    ),
    "tools as JSON": chat(Q, A, asked=["Tells the", "city", "Is it warm?"], needs="tools", tools=json.dumps(TOOLS)),
    "tools and a system": chat(
        system("Be brief."), Q, A, asked=["weather", "city", "Be brief."], needs="tools, system", tools=TOOLS
    ),
    "odd tools": chat(Q, A, needs="tools, odd tools", tools=[{"type": "function", "function": "weather"}]),
    "documents": chat(
        system("Be brief."),
        Q,
        A,
        asked=["Be brief.", "Is it warm?", "A fjord is\nlong & deep.", "1 fjord"],
        needs="documents, system",
        documents=DOCUMENTS,
    ),
    "variables": chat(Q, A, needs="enable_thinking", chat_template_kwargs={"enable_thinking": True}),
    "date": chat(
        Q,
        A,
        asked=["Is it warm?", "7 Feb 1950"],
        needs="date_string",
        chat_template_kwargs='{"date_string": "7 Feb 1950"}',
    ),
    "continued": pair([Q, assistant("Yes, ")], [assistant("it is.")], ["Is it warm?", "Yes,"], ["it is."]),
    "continued, blanks": pair([Q, assistant("  Yes,\n")], "\n it is. ", ["Is it warm?", "Yes,"], ["it is."]),
    "continued, a letter": pair([Q, assistant("a")], [assistant("n")], ["Is it warm?", "a"], ["n"]),
    "continued, nothing": pair([Q, assistant(" ")], "Yes.", ["Is it warm?"], ["Yes."]),
    "continued, reasoning": pair(
        [Q, assistant("Yes, ", reasoning_content="July.")], "it is.", ["July.", "Yes,"], ["it is."], "reasoning"
    ),
    "continued, tags": pair(
        [Q, assistant("<think>\nJuly,")], " sun.\n</think>\n\nYes.", ["July,"], ["sun.", "Yes."], "tags, open tags"
    ),
    "continued, call": pair(
        [Q, assistant("I'll look.")],
        [CALL],
        ["I'll look."],
        ["weather", "Oslo"],
        "calls, calls with text, calls continued",
    ),
    "continued, turns": pair(
        [Q, assistant("Yes,")],
        [assistant(" it is."), user("Oh?"), assistant("Yes.")],
        ["Yes, it is.", "Oh?"],
        ["Yes."],
    ),
    "turns told": pair([Q], [A, user("Oh?"), assistant("Yes.")], ["Yes, it is.", "Oh?"], ["Yes."]),
    "two answers": pair([Q], [A, assistant("Really.")], ["Yes, it is."], ["Really."], "two answers"),
    "end given": chat(Q, assistant("Yes.{eos}\n{eos}"), told=["Yes."]),
    "spelled, question": chat(user(SPELLED), A),
    "spelled, answer": chat(Q, assistant(SPELLED)),
    "spelled, system": chat(system(SPELLED), Q, A, needs="system"),
    "spelled, earlier answer": chat(Q, assistant(SPELLED), user("Oh?"), A),
    "spelled, call": chat(
        OSLO,
        assistant(tool_calls=[call({"</s>city<|im_end|>": SPELLED})]),
        told=["weather", "</s>city<|im_end|>", SPELLED],
        needs="calls",
    ),
    "spelled, result": chat(OSLO, CALL, result(SPELLED), assistant("No."), asked=["Oslo?", SPELLED], needs="calls"),
    "BOS given": chat(user("{bos}{bos}Is it warm?"), A, asked=["Is it warm?"]),
    "weights": chat(Q, assistant("Nope.", weight=0), user("Oh?"), assistant("Yes.", weight=1)),
}
UNUSABLE = {  # under any template
    "an answer of weight 0": chat(Q, assistant("Nope.", weight=0)),
    "content part of type 'image'": chat(user([{"type": "image"}, *parts("What is it?")]), A),
    "empty answer": chat(Q, assistant(" ")),
    "empty answer, continued": pair([Q, A], "", [], []),
    "empty answer, no turn": pair([Q, CALL], [], [], []),
    "no assistant turn": chat(Q, A, Q),
    "no assistant turn, none": other([]),
    "is no list of messages": other({"role": ["user", "assistant"], "content": ["a"]}),
    "content of a message is int": chat(user(7), A),
    "content of a message is an object": chat(user({"answer": 7}), A),
    "'value' in place of 'content'": other([{"role": "user", "value": "Is it warm?"}, A]),
    "'parts' in place of 'content'": other([{"role": "user", "parts": [{"text": "Is it warm?"}]}, A]),
    "a user turn without content": other([{"role": "user", "content": None}, A]),
    "an object with more than text": chat(Q, {"role": "tool", "content": {"text": "7", "score": 3}}, A),
    "a content part with 'image_url'": chat(user([{"type": "text", "text": "What is it?", "image_url": "x.png"}]), A),
    "part of type 'reasoning' without text": chat(
        Q, assistant([{"type": "reasoning", "data": "7"}, *parts("Yes.")]), A
    ),
    "part of type 'summary_text'": chat(
        Q, assistant([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "July."}]}]), A
    ),
    "a content part without text": chat(Q, {"role": "tool", "content": [{"temperature": 7}]}, A),
    "'tool_call' in place of 'tool_calls'": chat(OSLO, assistant(tool_call={"name": "weather"}), A),
    "no arguments, beside 'args'": chat(OSLO, assistant(tool_calls=[{"name": "weather", "args": {"city": "Oslo"}}])),
    "no arguments, beside 'input'": chat(OSLO, assistant(tool_calls=[{"name": "weather", "input": {"city": "Oslo"}}])),
    "no arguments, beside 'arguments'": chat(
        OSLO, assistant(tool_calls=[{"function": {"name": "weather"}, "arguments": {"city": "Oslo"}}])
    ),
    "an object has a key twice": chat(OSLO, assistant(tool_calls=[call('{"city": "Oslo", "city": "Rome"}')])),
    "nested too deep": chat(OSLO, assistant(tool_calls=[call(nested(2000))])),
    "no list of messages, text": other("[" * 100_000),
    "a tool call without a function's name": chat(OSLO, assistant(tool_calls=7)),
    "'tools' is not a list": chat(Q, A, tools="weather"),
    "another weight": chat(Q, assistant("Yes.", weight=0.5)),
    "an answer of weight 0, by one of two": chat(Q, assistant("Nope.", weight=1, train=False)),
    "an answer of weight 0, as training": chat(Q, assistant("Nope.", training=False)),
    "a message with 'train_detail'": chat(Q, assistant("Yes.", train_detail=[{"begin_offset": 0, "train": False}])),
    "something that is no message": other([Q, None]),
    "chat_template_kwargs tokenize": chat(Q, A, chat_template_kwargs={"tokenize": True}),
    "reasoning in an answer whose text has begun": pair(
        [Q, assistant("Yes")], [assistant(".", reasoning_content="July.")], [], []
    ),
}


@dataclass
class Example:
    outcome: str
    note: str
    prompt: list[int]
    answer: list[int] | None = None
    learned: list[bool] | None = None


def read(cells: list[dict], family: Family, answers=True, **options) -> list[Example]:
    """Rows of any cells, mixed as no single Arrow table could be."""
    found = []
    for columns in ({"messages"}, {"prompt", "completion"}):
        rows = [row for row in cells if columns & row.keys()]
        if not rows:
            continue
        names = sorted(set().union(*rows))
        batch = {name: [row.get(name) for row in rows] for name in names}
        chosen = RowOptions(max_length=None, **family.options | options)
        arguments = tokenizing.batch_arguments(names, None, family.tokenizer, chosen, answers)
        made = tokenizing._tokenize_batch(batch, list(range(len(rows))), **arguments)
        keys = ("outcome", "note", "prompt_ids", *(("answer_ids",) if answers else ()))
        keys += ("is_learned",) if "is_learned" in made else ()
        found += [(id(row), Example(*values)) for row, *values in zip(rows, *(made[key] for key in keys), strict=True)]
    return [dict(found)[id(row)] for row in cells]


def cells_of(row, family):
    """A row's cells, with tokens of the family, and a system turn where its template needs one."""
    text = json.dumps(row.cells).replace("{eos}", family.tokenizer.eos_token)
    cells = json.loads(text.replace("{bos}", family.bos or "<s>"))
    turns = cells.get("messages")
    if "no system" in family.lacks and isinstance(turns, list) and turns[0].get("role") not in ("system", None):
        cells["messages"] = [system("Be brief."), *turns]
    return cells


def shown(text, family):
    """A text as it can be found in what ids decode to: SentencePiece adds spaces, and Phi's tokens swallow them."""
    return "".join(text.split()) if family.sentencepiece or family.rstrip else text


def forms(text, family):
    forms = (text.strip(), json.dumps(text.strip(), ensure_ascii=False)[1:-1])
    return [shown(form, family) for form in (*forms, json.dumps(forms[1], ensure_ascii=False)[1:-1])]


def assert_has(ids, texts, family):
    decoded = shown(family.tokenizer.decode(ids), family)
    place = 0
    for text in texts:
        found = [(decoded.find(form, place), form) for form in forms(text, family)]
        found = [(at, form) for at, form in found if at >= 0]
        assert found, f"{text!r} is not in {decoded[place:]!r}"


def whole(cells, family):
    """The ids of a row's conversation as the tokenizer makes them, or None where more than that is asked."""
    turns = cells.get("messages")
    extras = {key: cells[key] for key in ("tools", "documents") if key in cells}
    if not isinstance(turns, list) or any(not isinstance(turn.get("content"), str) for turn in turns):
        return None
    if any("tool_calls" in turn or turn.get("weight") == 0 for turn in turns) or isinstance(extras.get("tools"), str):
        return None
    if family.name == "parts":
        turns = [turn | {"content": parts(turn["content"])} for turn in turns]
    kwargs = cells.get("chat_template_kwargs", {})
    kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
    return family.tokenizer.apply_chat_template(turns, return_dict=False, **extras, **kwargs)


@pytest.fixture
def today(monkeypatch):
    """The date that selfgen gives to templates, also for those who ask the tokenizer."""

    class Day(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, 26)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_whole_or_dropped_for_what_the_template_lacks(name, today):
    family = FAMILIES[name]
    cells = [cells_of(row, family) for row in ROWS.values()]
    ends = RowOptions(**family.options).answer_ends(family.tokenizer)
    asked = read(cells, family, answers=False)
    for (row_name, row), given, found, prompt in zip(ROWS.items(), cells, read(cells, family), asked, strict=True):
        told = f"{row_name}: {found.outcome} ({found.note})"
        assert (found.outcome == "kept") == (not row.needs & family.lacks), told
        if found.outcome != "kept":
            assert re.search("rejects|leaves out|is not in|not prefix|another way", found.outcome), told
            continue
        assert prompt.prompt == found.prompt, told
        assert_has(found.prompt, row.asked, family)
        assert_has(found.answer, row.told, family)
        assert found.answer[-1] in ends, told
        assert not ends.intersection(found.answer[:-1]), told
        if family.bos:
            assert [*found.prompt, *found.answer].count(family.tokenizer.bos_token_id) == 1, told
        ids = whole(given, family)
        if ids and "given" not in row_name and "</s>" not in json.dumps(given):
            made = [*found.prompt, *found.answer]
            length = min(len(made), len(ids))
            assert made[:length] == ids[:length], told
            assert length >= len(made) - 1, told  # an EOS, where the template ends turns with none


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_the_same_without_an_answer(name):
    family = FAMILIES[name]
    rows = [row for row in ROWS.values() if not row.needs & family.lacks]
    cells = [cells_of(row, family) for row in rows]
    asked = []
    for one in cells:
        turns = one.get("messages")
        if isinstance(turns, list):
            asked.append(one | {"messages": turns[:-1]})
        elif isinstance(one.get("completion"), list) and len(one["completion"]) > 1:
            asked.append(one)  # some turns before the answer are there
        else:
            asked.append({key: value for key, value in one.items() if key != "completion"})
    pairs = zip(rows, read(cells, family), read(asked, family, answers=False), strict=True)
    for row, answered, prompt in pairs:
        assert isinstance(row.cells.get("messages", []), list | str | dict)
        assert prompt.prompt == answered.prompt, row


@pytest.mark.parametrize("name", FAMILIES)
def test_what_texts_spell_is_no_control_token(name):
    """A row has as many special tokens as one that spells none."""
    family = FAMILIES[name]
    special = set(family.tokenizer.all_special_ids)
    special |= {number for number, token in family.tokenizer.added_tokens_decoder.items() if token.special}
    for spelled, plain in (
        (chat(user(SPELLED), assistant(SPELLED)), chat(Q, A)),
        (chat(Q, assistant(SPELLED), user(SPELLED), A), chat(Q, A, Q, A)),
        (chat(user("{bos}{eos}x"), assistant("{bos}{eos}x")), chat(Q, A)),
        (chat(system(SPELLED), Q, A, needs="system"), chat(system("x"), Q, A, needs="system")),
    ):
        if spelled.needs & family.lacks:
            continue
        spelled, plain = read([cells_of(row, family) for row in (spelled, plain)], family)
        counts = [[token for token in row.prompt + row.answer if token in special] for row in (spelled, plain)]
        assert counts[0] == counts[1]
    old = read([cells_of(chat(user("{eos}x"), A), family)], family, split_special_tokens=False)[0]
    new = read([cells_of(chat(user("{eos}x"), A), family)], family)[0]
    assert old.prompt.count(family.tokenizer.eos_token_id) == 1 + new.prompt.count(family.tokenizer.eos_token_id)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_turns_are_those_of_the_last(name):
    """Every assistant turn is learned, nothing else is, and the tokens are those of a row whose last turn is."""
    family = FAMILIES[name]
    lasts = {name: row for name, row in ROWS.items() if not row.needs & family.lacks}
    cells = [cells_of(row, family) for row in lasts.values()]
    every = read(cells, family, assistant_turns="all")
    for row_name, given, last, found in zip(lasts, cells, read(cells, family), every, strict=True):
        if found.outcome != "kept":  # the system's turn or the tools are in the last turn of the user
            assert found.outcome == NOT_PREFIX, (row_name, found)
            assert family.name == "mistral" or (family.name, row_name) == ("r1", "late system"), row_name
            continue
        assert found.prompt + found.answer == last.prompt + last.answer, row_name
        turns = given.get("messages")
        if "continued" in row_name and row_name != "continued, turns":
            assert (found.prompt, found.answer) == (last.prompt, last.answer)
            assert all(found.learned)
        if not isinstance(turns, list) or "role" not in turns[0]:
            continue
        learned = [token for token, mask in zip(found.answer, found.learned, strict=True) if mask]
        texts = [
            turn["content"]
            for turn in turns[1:]
            if turn["role"] == "assistant" and isinstance(turn["content"], str) and turn.get("weight", 1)
        ]
        if "given" not in row_name and "tags" not in row_name:
            assert_has(learned, texts, family)
        others = [token for token, mask in zip(found.answer, found.learned, strict=True) if not mask]
        assert "Yes, it is." not in family.tokenizer.decode(others), row_name
        assert "Oh?" not in family.tokenizer.decode(learned), row_name
        assert "degrees" not in family.tokenizer.decode(learned), row_name


@pytest.mark.parametrize("reason", UNUSABLE)
@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_unusable_rows_are_named(reason, name):
    found, fine = read([UNUSABLE[reason].cells, ROWS["plain"].cells, ROWS["text"].cells], FAMILIES[name])[:2]
    assert reason.partition(",")[0] in f"{found.outcome} {found.note}"
    assert found.prompt == []
    assert fine.outcome == "kept"


def test_blank_arguments_are_none():
    """OpenAI's format has an empty text for a function without parameters, which is no JSON."""
    rows = [chat(OSLO, assistant(tool_calls=[call(arguments)])).cells for arguments in ({}, "", " ", None)]
    want, *others = read(rows, FAMILIES["qwen3"])
    assert want.outcome == "kept"
    assert others == [want] * 3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cue_continues_what_was_read(name, today):
    family = FAMILIES[name]
    options = RowOptions(**family.options)
    cue = CorrectionCue.of(family.tokenizer, "Sure? <|im_end|></s>", options=options)
    row = read([cells_of(chat(Q, A), family)], family)[0]
    turns = cells_of(chat(Q, A, user("Sure? <|im_end|></s>"), A), family)
    asked = read([turns], family, answers=False)[0]
    if "qwen3" in name:  # the answer has empty tags that the template leaves out once another turn follows
        assert_has(cue.ids, ["Sure? <|im_end|></s>"], family)
    else:
        assert cue.prompt(row.prompt, row.answer) == asked.prompt


def test_a_template_that_opens_reasoning_names_the_way_out():
    family = replace(FAMILIES["r1"], options={})
    found = read([ROWS["plain"].cells], family)[0]
    assert found.outcome == NOT_PREFIX
    assert "add_generation_prompt=False" in WAY_OUT
    with pytest.raises(ValueError, match="add_generation_prompt=False"):
        CorrectionCue.of(family.tokenizer)


# What families have besides


def chatml(template, **more):
    return Family(template, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", **more)


def test_arrow_invents_nothing():
    """Arrow gives every object the keys of all: None stands for those that it does not have."""
    rows = [
        {
            "messages": [user("a"), assistant(tool_calls=[call({"city": "Oslo"})]), result("7"), assistant("b")],
            "tools": TOOLS,
            "chat_template_kwargs": {"enable_thinking": True},
        },
        {
            "messages": [user("a"), assistant("c", reasoning_content="July.", tool_calls=[call({"days": 2})])],
            "tools": None,
        },
    ]
    family = FAMILIES["qwen3"]
    examples, report = tokenize_rows(Dataset.from_list(rows), family.tokenizer, max_length=None)
    assert report.kept == 2
    alone = read(rows, family)
    assert [(row["prompt_ids"], row["answer_ids"]) for row in examples] == [(one.prompt, one.answer) for one in alone]
    assert "null" not in family.tokenizer.decode(alone[0].prompt + alone[1].answer)


def test_tokenizers_may_have_a_template_for_tools():
    family = chatml({"default": CHATML, "tool_use": QWEN3})
    plain, tools, called = read([ROWS[name].cells for name in ("plain", "tools", "result")], family)
    assert (plain.outcome, tools.outcome) == ("kept", "kept")
    assert "tool_calls" in called.outcome  # no tools, so the default is used


@pytest.mark.parametrize("content", ["''", "None"])
def test_calls_are_given_in_the_form_that_shows_them(content):
    """Some templates write calls only where there is no content, some take arguments as JSON text only."""
    calls = "{% for c in m.tool_calls %}{{ c.id + c.function.arguments }}{% endfor %}"
    has_none = "m.content == ''" if content == "''" else "m.content is not defined or m.content is none"
    body = f"{{% if m.tool_calls and ({has_none}) %}}{calls}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    family = chatml(CHATML.replace(" + m.content + '", " }}" + body + "{{ '"))
    (found,) = read([chat(OSLO, assistant(tool_calls=[call({"city": "Oslo"}, id="weather:0")])).cells], family)
    assert family.tokenizer.decode(found.answer) == 'weather:0{"city": "Oslo"}<|im_end|>'


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% if m == 'x' %}{% endif %}{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ('{%- if x == "%" -%}{%- endif -%}{{ strftime_now("%B %d, %Y") + " it\'s" }}', "July 26, 2024 it's"),
        ("{% set day = '%Y' %}{% if strftime_now is defined %}{{ strftime_now(day) }}{% endif %}", "2024"),
        ("{% macro day() %}{{ strftime_now('%A') }}{% endmacro %}{{ day() }}{{ '50%' }}", "Friday50%"),
    ],
)
def test_dates(source, text):
    family = chatml(source + CHATML)
    (found,) = read([ROWS["plain"].cells], family)
    assert family.tokenizer.decode(found.prompt).startswith(text + "<|im_start|>")


@pytest.mark.parametrize(
    ("filter", "outcome"),
    [
        ("| indent(2)", "kept"),
        ("| e", "kept"),
        ("| tojson", "kept"),
        ("| replace('\\n\\n', '\\n')", "is not in"),
        ("| replace('    ', '')", "is not in"),
        ("| striptags", "is not in"),
        ("| upper", "is not in"),
        ("| truncate(20)", "is not in"),
        (".split('</b>')[-1]", "is not in"),
    ],
)
def test_texts_may_be_escaped_or_indented_but_not_changed(filter, outcome):
    text = "if <b>x</b>:\n\n    return 'y'\n\nOr \"é\" & z."
    row = chat(user(text), assistant(text))
    template = CHATML.replace("m.content +", f"'' }}}}{{{{ m.content {filter} }}}}{{{{")
    assert outcome in read([row.cells], chatml(template))[0].outcome


def test_a_short_text_is_missed_though_the_template_writes_it_elsewhere():
    family = chatml(CHATML.replace("m.content", "('' if m.role == 'user' and loop.index0 else m.content)"))
    lost = read([chat(user("e"), assistant("e"), user("s"), assistant("e")).cells], family)[0]
    assert lost.outcome == "the text of a turn of role 'user' is not in the chat template's text"


def test_ends_of_calls_and_of_turns():
    def ends(name):
        family = FAMILIES[name]
        found = RowOptions(**family.options).answer_ends(family.tokenizer)
        return set(family.tokenizer.convert_ids_to_tokens(found))

    assert ends("harmony") == {"<|return|>", "<|call|>"}
    assert ends("qwen3") == {"<|im_end|>"}
    assert ends("command") == {"<|END|>"}
    assert ends("phi") == {"<|endoftext|>", "<|end|>"}
    assert ends("endless") == {"</s>"}


def test_blanks_are_no_control_tokens():
    """Some tokenizers have added tokens for lines and indentation, and templates write those, too."""
    family = FAMILIES["endless"]
    (found,) = read([chat(user("a\n\nb"), A).cells], family)
    assert found.prompt.count(family.tokenizer.convert_tokens_to_ids("\n\n")) == 2


def test_long_rows_and_large_vocabularies_take_linear_time():
    """Indented texts, control tokens, added tokens, and turns: many of each."""
    names = [f"<unused{number}>" for number in range(6000)]
    family = chatml(CHATML.replace("m.content", "m.content | indent(2)"), added=(*names, "\n\n", "  "))
    lines = "a < b \n" * 15_000
    turns = [turn for number in range(200) for turn in (user(f"{number}?" * 20), assistant(f"{number}."))]
    start = time.perf_counter()
    found = read([chat(user(lines), assistant(lines)).cells, chat(user("<|im_end|>\n" * 10_000), A).cells], family)
    found += read([chat(*turns).cells], family, assistant_turns="all")
    assert [one.outcome for one in found] == ["kept"] * 3
    assert time.perf_counter() - start < 20
