from inspect import signature

import datasets
import pytest
import torch
from helpers.data import EOS, ID, ROWS, TEMPLATE, make_tokenizer, write_jsonl
from transformers import AutoTokenizer

from selfgen.data import (
    ChatTemplate,
    Collator,
    DataReport,
    answer_ends,
    load_rows,
    text_after_answer,
    tokenize_prompts,
    tokenize_rows,
)
from tools.real_parts import gsm8k_path, has_gsm8k


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def ids(text):
    return [ID[word] for word in text.split()]


def tokenize(rows, tokenizer, max_length=64, **options):
    dataset = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
    return tokenize_rows(dataset, tokenizer, max_length=max_length, **options)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def plain():
    return make_tokenizer()


@pytest.fixture
def chat():
    return make_tokenizer(TEMPLATE)


# Tokenizing


def test_text_without_template(plain):
    examples, report = tokenize(ROWS, plain)
    assert examples.to_list() == [
        {"sample_id": 0, "prompt_ids": ids("<bos> a b"), "answer_ids": ids("c d <eos>")},
        {"sample_id": 1, "prompt_ids": ids("<bos> e"), "answer_ids": ids("f g h <eos>")},
    ]
    assert report == DataReport(rows=2, kept=2, truncated=0, dropped={}, max_length=64)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a b", "completion": "c"},
        {"prompt": [user("a b")], "completion": "c"},
        {"prompt": [user("a b")], "completion": [assistant("c")]},
        {"messages": [user("a b"), assistant("c")]},
    ],
    ids=["text", "messages and text", "messages", "conversation"],
)
def test_every_format_with_template(row, chat):
    examples, _ = tokenize([row], chat)
    assert examples[0]["prompt_ids"] == ids("<user> a b <eos> <nl> <assistant>")
    assert examples[0]["answer_ids"] == ids("c <eos>")  # the template's <nl> after the EOS is cut


def test_only_the_last_turn_is_the_answer(chat):
    turns = [{"role": "system", "content": "h"}, user("a"), assistant("b"), user("c"), assistant("d")]
    expected = ids("<system> h <eos> <nl> <user> a <eos> <nl> <assistant> b <eos> <nl> <user> c <eos> <nl> <assistant>")
    for row in ({"messages": turns}, {"prompt": turns[:2], "completion": turns[2:]}):
        examples, _ = tokenize([row], chat)
        assert examples[0]["prompt_ids"] == expected
        assert examples[0]["answer_ids"] == ids("d <eos>")


def test_template_can_be_switched_off(chat, plain):
    assert tokenize(ROWS, chat, apply_chat_template=False)[0].to_list() == tokenize(ROWS, plain)[0].to_list()


def test_keys_that_only_some_messages_have_are_not_passed_on_as_none():
    template = "{% for m in messages %}{{ m['content'] }} {% if m.name is defined %}h {% endif %}{% endfor %}"
    rows = [{"messages": [user("a") | {"name": "x"}, assistant("b")]}, {"messages": [user("a"), assistant("b")]}]
    examples, _ = tokenize(rows, make_tokenizer(template))
    assert examples["prompt_ids"][:] == [ids("a h"), ids("a")]


def test_other_column_names(plain):
    rows = [{"question": "a", "answer": "b"}]
    examples, _ = tokenize(rows, plain, prompt_column="question", completion_column="answer")
    assert examples.column_names == ["sample_id", "prompt_ids", "answer_ids"]
    assert examples[0]["answer_ids"] == ids("b <eos>")


@pytest.mark.parametrize("special", ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
@pytest.mark.parametrize("prompt", ["a b", "a <eos>"])
def test_prompt_never_gets_an_eos_of_the_tokenizer(special, prompt):
    examples, _ = tokenize([{"prompt": prompt, "completion": "c"}], make_tokenizer(special=special))
    assert examples[0]["prompt_ids"] == ids("<bos> " * special.startswith("<bos>") + prompt)
    assert examples[0]["answer_ids"] == ids("c <eos>")


def test_answer_gets_one_eos(plain):
    examples, _ = tokenize([{"prompt": "a", "completion": "b <eos>"}], plain)
    assert examples[0]["answer_ids"] == ids("b <eos>")


def test_an_answer_that_the_template_does_not_end_gets_an_eos():
    template = "{% for m in messages %}{{ m['content'] }} <nl> {% endfor %}"
    examples, _ = tokenize([{"prompt": "a", "completion": "b"}], make_tokenizer(template))
    assert examples[0]["answer_ids"] == ids("b <nl> <eos>")


NO_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system turn') }}{% endif %}"


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (TEMPLATE.replace("<eos> <nl>", "<end> <nl>"), "b <end>"),
        (TEMPLATE.replace(" <eos> <nl>", "<end><nl>"), "b <end>"),
        (
            TEMPLATE.replace("<eos> <nl>", "<end> <nl>") + "{% if not add_generation_prompt %}<eos>{% endif %}",
            "b <end>",
        ),
        (NO_SYSTEM + TEMPLATE.replace("<eos> <nl>", "<end> <nl>"), "b <end>"),
    ],
    ids=["ChatML", "no space", "EOS at the end of all", "system turn needed"],
)
def test_a_turn_may_end_with_another_token_than_the_eos(template, answer, special):
    """As of a base model with ChatML: its EOS ends documents. What comes first ends a row, as it ends answers."""
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens(["<end>"], special_tokens=special)
    rows = [{"prompt": [{"role": "system", "content": "h"}, user("a")], "completion": [assistant("b")]}]
    examples, _ = tokenize(rows, tokenizer)
    assert tokenizer.convert_ids_to_tokens(examples[0]["answer_ids"]) == answer.split()
    assert answer_ends(tokenizer) == {EOS, tokenizer.convert_tokens_to_ids("<end>")}


def test_what_ends_answers_is_no_token_that_templates_write_elsewhere(chat, plain):
    assert answer_ends(chat) == answer_ends(plain) == {EOS}
    hides = make_tokenizer("<bos> {% for m in messages %}x {% endfor %}")
    assert answer_ends(hides) == {EOS}


def test_a_models_own_ends_join_the_tokenizers(plain):
    assert answer_ends(plain, [7, EOS]) == {7, EOS}


def test_text_between_two_answers(chat):
    assert text_after_answer(ChatTemplate(chat), "h g") == " <eos> <nl> <user> h g <eos> <nl> <assistant> "
    drops = TEMPLATE.replace("{{ m['content'] }}", "{% if loop.last %}{{ m['content'] }}{% endif %}")
    with pytest.raises(ValueError, match="renders an answer in another way when a turn follows it"):
        text_after_answer(ChatTemplate(make_tokenizer(drops)), "h g")


def test_rows_are_tokenized_again_where_other_tokens_end_answers(monkeypatch):
    """`datasets` keeps what it has mapped; rows that were cached with other ends are not these."""
    tokenizer = make_tokenizer(TEMPLATE.replace("<eos> <nl>", "<end> <nl>"))
    tokenizer.add_tokens(["<end>"])
    rows = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    with monkeypatch.context() as patch:
        patch.setattr("selfgen.data.tokenizing.answer_ends", lambda *_: frozenset({EOS}))
        assert tokenize(rows, tokenizer)[0][0]["answer_ids"][-1] == EOS
    assert tokenize(rows, tokenizer)[0][0]["answer_ids"][-1] != EOS


def test_truncation(plain):
    rows = [{"prompt": "a", "completion": text} for text in ("b", "b c", "b c d")]
    examples, report = tokenize(rows, plain, max_length=5)  # <bos> a, and 3 for the answer
    assert examples["answer_ids"][:] == [ids("b <eos>"), ids("b c <eos>"), ids("b c d")]
    assert report == DataReport(rows=3, kept=3, truncated=1, dropped={}, max_length=5)


def test_dropped_rows_are_counted_and_identity_survives(chat):
    rows = [
        {"messages": [user("a"), assistant(" \n")]},
        {"messages": [user("a"), assistant("b")]},
        {"messages": [user("a")]},
        {"messages": []},
        {"messages": [assistant("b")]},
        {"messages": [user("a b c d e f"), assistant("b")]},
        {"messages": [user("c"), assistant("d e f g h")]},
    ]
    examples, report = tokenize(rows, chat, max_length=9)
    assert examples["sample_id"][:] == [1, 6]
    assert examples["answer_ids"][:] == [ids("b <eos>"), ids("d e f g")]
    assert (report.rows, report.kept, report.truncated) == (7, 2, 1)
    assert report.dropped == {
        "empty answer": 1,
        "no assistant turn at the end": 2,
        "empty prompt": 1,
        "prompt fills max_length": 1,
    }


def test_empty_prompt_is_one_without_tokens(plain):
    rows = [{"prompt": "", "completion": "a"}, {"prompt": "b", "completion": ""}, {"prompt": "b", "completion": "a"}]
    assert tokenize(rows, plain)[1].dropped == {"empty answer": 1}  # a BOS is something to start from
    assert tokenize(rows, make_tokenizer(special="$A"))[1].dropped == {"empty prompt": 1, "empty answer": 1}


def test_report_is_one_line():
    report = DataReport(7473, 7470, 12, {"empty answer": 1, "prompt fills max_length": 2}, 512)
    assert str(report) == (
        "7473 rows: 7470 kept, 12 answers truncated to 512 tokens, "
        "3 dropped (1 empty answer, 2 prompt fills max_length)"
    )
    assert str(DataReport(2, 2, 0, {}, 64)) == "2 rows: 2 kept"


def test_own_sample_ids_are_used(plain):
    rows = [{"sample_id": 70, "prompt": "a", "completion": ""}, {"sample_id": 2**40, "prompt": "a", "completion": "b"}]
    assert tokenize(rows, plain)[0]["sample_id"][:] == [2**40]


def test_sample_ids_count_rows_over_batches_and_processes(plain):
    rows = datasets.Dataset.from_list([{"prompt": "a", "completion": "b" if i % 3 else ""} for i in range(2500)])
    expected = [i for i in range(2500) if i % 3]
    assert tokenize(rows, plain)[0]["sample_id"][:] == expected
    assert tokenize(rows, plain, num_proc=2)[0]["sample_id"][:] == expected


def test_a_formatted_data_set_gives_the_same_examples(plain):
    dataset = datasets.Dataset.from_list(ROWS)
    assert tokenize(dataset.with_format("numpy"), plain)[0].to_list() == tokenize(dataset, plain)[0].to_list()


def test_tokenizing_again_reads_the_cache(chat, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl")
    first, _ = tokenize(load_rows(tmp_path / "rows.jsonl"), chat)
    monkeypatch.setattr("selfgen.data.reading.RowReader.answered", lambda *_: pytest.fail("tokenized again"))
    second, _ = tokenize(load_rows(tmp_path / "rows.jsonl"), make_tokenizer(TEMPLATE))
    assert second.to_list() == first.to_list()
    assert second._fingerprint == first._fingerprint


MIXED = [ROWS[0], {"prompt": "a", "completion": None}]
TURNS = [{"messages": [user("a"), assistant("b")]}]


@pytest.mark.parametrize(
    ("rows", "options", "error", "words"),
    [
        ([{"question": "a", "answer": "b"}], {}, ValueError, ["columns question, answer", "--prompt-column question"]),
        (ROWS, {"prompt_column": "x"}, ValueError, ["no 'x' (prompt_column)", "no 'messages'"]),
        (ROWS, {"max_length": 1}, ValueError, ["max_length is 1", "at least 2"]),
        (ROWS, {"max_length": 2}, ValueError, ["no row is left", "2 dropped (2 prompt fills max_length: row 0, row 1"]),
        (MIXED, {"strict_data": True}, ValueError, ["row 1", "'completion' is empty (None)", "strict_data"]),
        ([{"prompt": 1, "completion": "b"}], {}, ValueError, ["row 0", "'prompt' is int", "values_as_text"]),
        ([{"messages": ["a", "b"]}], {}, ValueError, ["row 0", "'messages'", "'role' and 'content': 'a'"]),
        ([{"messages": [user("a"), assistant(None)]}], {}, ValueError, ["1 empty answer: row 0"]),
        (TURNS, {"apply_chat_template": False}, ValueError, ["row 0", "set tokenizer.chat_template"]),
        ([{"messages": [user("c"), assistant("b")]}], {"template": "{{ 1 + messages[0]['content'] }}"}, ValueError,
         ["row 0", "rejects"]),
        (ROWS, {"assistant_turns": "some"}, ValueError, ["assistant_turns is 'some'", "last, all"]),
        (ROWS, {"template_date": "tomorrow"}, ValueError, ["template_date is 'tomorrow'"]),
        (ROWS, {"chat_template_kwargs": "[1"}, ValueError, ["chat_template_kwargs", "no JSON"]),
        (ROWS, {"chat_template_kwargs": {"messages": 1}}, ValueError, ["can't have messages"]),
        (ROWS, {"tools": "{}"}, ValueError, ["tools is {}", "list of objects"]),
        (ROWS, {"tools": '["f"]'}, ValueError, ["tools is ['f']", "list of objects"]),
        (ROWS, {"template": None, "tools": [{"name": "f"}]}, ValueError, ["tools is for a chat template"]),
        (TURNS, {"template": "a {{ messages | length }}"}, ValueError, ["row 0", "prefix preserving", "after 2"]),
        (ROWS, {"template": None, "apply_chat_template": True}, ValueError, ["set tokenizer.chat_template"]),
        (ROWS, {"eos_token": None}, ValueError, ["set tokenizer.eos_token"]),
        ([row | {"sample_id": 1} for row in ROWS], {}, ValueError, ["'sample_id' (int64, 2 rows)", "remove"]),
        ([row | {"sample_id": row["prompt"]} for row in ROWS], {}, ValueError, ["'sample_id' (string, 2 rows)"]),
    ],
)  # fmt: skip
def test_tokenize_errors(rows, options, error, words):
    options = {"template": TEMPLATE, "eos_token": "<eos>", "max_length": 64} | options
    tokenizer = make_tokenizer(options.pop("template"), eos_token=options.pop("eos_token"))
    known = signature(datasets.Dataset.from_list).parameters
    mixed = {"on_mixed_types": "use_json"} if "on_mixed_types" in known else {}
    dataset = datasets.Dataset.from_list(rows, **mixed) if isinstance(rows, list) else rows
    with pytest.raises(error) as caught:
        tokenize_rows(dataset, tokenizer, **options)
    assert all(word in str(caught.value) for word in words), caught.value


# Prompts alone


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("special", ["$A", "<bos> $A", "<bos> $A <eos>"])
@pytest.mark.parametrize("form", ["text", "messages", "conversation", "turns of the completion"])
def test_prompts_are_those_of_rows(template, special, form):
    """Token for token, whatever is known of answers."""
    turns = [user("a b"), assistant("c"), user("d")]
    rows, alone = {
        "text": ({"prompt": "a b", "completion": "c"}, [{"prompt": "a b"}, {"prompt": "a b", "completion": None}]),
        "messages": ({"prompt": turns, "completion": "c"}, [{"prompt": turns}, {"prompt": turns, "completion": ["x"]}]),
        "conversation": ({"messages": [*turns, assistant("e")]}, [{"messages": turns}]),
        "turns of the completion": (
            {"prompt": turns[:1], "completion": [*turns[1:], assistant("e")]},
            [{"prompt": turns}, {"prompt": turns[:1], "completion": [*turns[1:], assistant(" ")]}],
        ),
    }[form]
    tokenizer = make_tokenizer(template, special=special)
    if form != "text" and template is None:
        with pytest.raises(ValueError, match="messages, which need a chat template: row 0"):
            tokenize_prompts(datasets.Dataset.from_list(alone[:1]), tokenizer)
        return
    want = tokenize([rows], tokenizer)[0]["prompt_ids"][:]
    for row in [rows, *alone]:
        examples, report = tokenize_prompts(datasets.Dataset.from_list([row]), tokenizer, max_length=64)
        assert examples.column_names == ["sample_id", "prompt_ids"]
        assert examples["prompt_ids"][:] == want
        assert report == DataReport(rows=1, kept=1, truncated=0, dropped={}, max_length=64)


def test_prompts_that_are_dropped_are_counted(plain, chat):
    conversations = [{"messages": turns} for turns in ([user("a")], [], [assistant("b")], [user("a b c d e")])]
    examples, report = tokenize_prompts(datasets.Dataset.from_list(conversations), chat, max_length=9)
    assert examples["sample_id"][:] == [0]
    assert report == DataReport(4, 1, 0, {"empty prompt": 2, "prompt fills max_length": 1}, 9)
    assert tokenize_prompts(["", "a"], plain)[0]["prompt_ids"][:] == [ids("<bos>"), ids("<bos> a")]
    examples, report = tokenize_prompts(["", "a"], make_tokenizer(special="$A"))
    assert examples.to_list() == [{"sample_id": 1, "prompt_ids": ids("a")}]
    assert str(report) == "2 rows: 1 kept, 1 dropped (1 empty prompt: row 0)"


def test_prompts_are_read_from_the_cache(chat, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl")
    first, _ = tokenize_prompts(load_rows(tmp_path / "rows.jsonl"), chat)
    monkeypatch.setattr("selfgen.data.reading.RowReader.asked", lambda *_: pytest.fail("tokenized again"))
    assert tokenize_prompts(load_rows(tmp_path / "rows.jsonl"), chat)[0]._fingerprint == first._fingerprint


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([{"question": "a"}], ValueError, ["columns question", "no 'prompt' (prompt_column)", "no 'messages'"]),
        ([{"prompt": None}], ValueError, ["row 0", "'prompt' is empty (None)"]),
        ([{"messages": "a"}], ValueError, ["row 0", "'messages' is no list of messages"]),
        ([{"prompt": ["a"]}], ValueError, ["row 0", "'prompt'", "'role' and 'content': 'a'"]),
        ([{"prompt": []}], ValueError, ["no row is left", "1 empty prompt"]),
        ([{"prompt": "a", "sample_id": 1}] * 2, ValueError, ["'sample_id' (int64, 2 rows)"]),
    ],
)
def test_prompt_errors(rows, error, words, chat):
    with pytest.raises(error) as caught:
        tokenize_prompts(datasets.Dataset.from_list(rows), chat)
    assert all(word in str(caught.value) for word in words), caught.value


# Batches


def test_collator(plain):
    examples, _ = tokenize(ROWS, plain)
    batch = Collator(pad_token_id=99)([examples[1], examples[0] | {"answer_ids": ids("c")}])
    expected = {
        "input_ids": [[*ids("<bos> e f g h <eos>")], [*ids("<bos> a b c"), 99, 99]],
        "attention_mask": [[1] * 6, [1, 1, 1, 1, 0, 0]],
        "labels": [[-100, -100, *ids("f g h <eos>")], [-100, -100, -100, ID["c"], -100, -100]],
        "sample_id": [1, 0],
        "prompt_length": [2, 3],
        "answer_length": [4, 1],
    }
    assert {key: value.tolist() for key, value in batch.items()} == expected
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_collator_takes_tensors(plain):
    examples, _ = tokenize(ROWS, plain)
    lists, tensors = (Collator(EOS)([rows[0], rows[1]]) for rows in (examples, examples.with_format("torch")))
    assert all(torch.equal(lists[key], tensors[key]) for key in lists)


# A real tokenizer on real rows


@pytest.mark.skipif(not has_gsm8k(), reason="needs GSM8K")
def test_smollm2_on_gsm8k(smollm2_folder):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    rows = load_rows(gsm8k_path("test")).select(range(200))
    examples, report = tokenize(rows, tokenizer, 256, prompt_column="question", completion_column="answer")
    assert report.kept == len(examples) == report.rows - sum(report.dropped.values())
    assert 0 < report.truncated < 100
    whole = [e for e in examples if len(e["prompt_ids"]) + len(e["answer_ids"]) < 256]
    for example in whole:
        row = rows[example["sample_id"]]
        prompt = tokenizer.decode(example["prompt_ids"])
        assert prompt.endswith(f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer.decode(example["answer_ids"]) == row["answer"] + "<|im_end|>"


# Columns of other trainers' formats


SYSTEM = {"role": "system", "content": "h"}


@pytest.mark.parametrize(
    ("row", "options", "prompt"),
    [
        ({"system": "h", "messages": [user("a"), assistant("b")]}, {}, [SYSTEM, user("a")]),
        ({"system": "h", "messages": [SYSTEM, user("a"), assistant("b")]}, {}, [SYSTEM, user("a")]),
        ({"system": " ", "prompt": "a", "completion": "b"}, {}, [user("a")]),
        (
            {"system": "h", "history": [["c", "d"], ["e", "f"]], "query": "a", "response": "b"},
            {"prompt_column": "query", "completion_column": "response"},
            [SYSTEM, user("c"), assistant("d"), user("e"), assistant("f"), user("a")],
        ),
        ({"history": [], "prompt": "a", "completion": "b"}, {}, [user("a")]),
        ({"history": "", "prompt": "a", "completion": "b"}, {}, [user("a")]),
        (
            {"history": '[["c", "d"]]', "prompt": "a", "completion": "b"},
            {},
            [user("c"), assistant("d"), user("a")],
        ),
        (
            {"instruction": "a", "input": "c", "output": "b"},
            {"prompt_column": "instruction", "completion_column": "output"},
            [user("a\nc")],
        ),
        (
            {"instruction": "a", "input": "", "output": "b"},
            {"prompt_column": "instruction", "completion_column": "output"},
            [user("a")],
        ),
        ({"input": "c", "prompt": "a", "completion": "b"}, {}, [user("a")]),
    ],
)
def test_columns_beside_the_prompt(row, options, prompt, chat):
    examples, _ = tokenize([row], chat, **options)
    (want,) = tokenize_prompts(datasets.Dataset.from_list([{"prompt": prompt}]), chat)[0]["prompt_ids"]
    assert examples[0]["prompt_ids"] == want
    assert examples[0]["answer_ids"] == ids("b <eos>")
    rows = datasets.Dataset.from_list([row])
    assert tokenize_prompts(rows, chat, **options)[0]["prompt_ids"][:] == [want]


def test_columns_beside_the_prompt_that_can_not_be_used(chat, plain):
    other = {"system": "g", "messages": [SYSTEM, user("a"), assistant("b")]}
    fine = {"system": "h", "messages": [SYSTEM, user("a"), assistant("b")]}
    assert tokenize([other, fine], chat)[1].dropped == {"a column 'system' beside another system turn": 1}
    rows = [{"system": "h", "prompt": "a", "completion": "b"}, {"system": None, "prompt": "a", "completion": "b"}]
    dropped = tokenize(rows, plain)[1].dropped
    assert dropped == {"a column 'system' or 'history', for which there is no chat template": 1}


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"system": ["h"]}, "the column 'system' is not text"),
        ({"system": SYSTEM}, "the column 'system' is not text"),
        ({"history": "c d"}, "'history' is no list of messages"),
        ({"history": [["c", None]]}, "'history' holds something that is no message"),
        ({"input": ["c"]}, "the column 'input' is not text"),
        ({"input": 7}, "the column 'input' is not text"),
    ],
)
def test_columns_beside_the_prompt_are_not_passed_over(beside, reason, chat):
    row = {"instruction": "a", "output": "b"}
    columns = {"prompt_column": "instruction", "completion_column": "output"}
    rows = datasets.Dataset.from_list([row | beside, row])
    assert tokenize(rows, chat, **columns)[1].dropped == {reason: 1}


def test_a_number_beside_the_prompt_is_text_on_request(chat):
    row = {"instruction": "a", "input": 7, "output": "b"}
    columns = {"prompt_column": "instruction", "completion_column": "output"}
    examples, _ = tokenize([row], chat, values_as_text=True, **columns)
    wanted, _ = tokenize([row | {"input": "7"}], chat, **columns)
    assert examples["prompt_ids"][:] == wanted["prompt_ids"][:]


def test_a_class_label_without_a_name_is_no_answer(plain):
    """`datasets` writes -1 where there is no label."""
    features = datasets.Features(prompt=datasets.Value("string"), completion=datasets.ClassLabel(names=["c", "d"]))
    rows = datasets.Dataset.from_list([{"prompt": "a", "completion": one} for one in (1, -1)], features=features)
    examples, report = tokenize(rows, plain, values_as_text=True)
    assert report.dropped == {"'completion' is a class label without a name": 1}
    assert examples[0]["answer_ids"] == ids("d <eos>")


def test_a_long_note_is_told_once():
    """Such as that on templates which write prompts in two ways, with the way out."""
    tokenizer = make_tokenizer(TEMPLATE.replace("<assistant> {% endif %}", "<assistant> <nl> {% endif %}"))
    rows = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}] * 3)
    with pytest.raises(ValueError, match=r"row 0 \(after .*row 1.*row 2") as error:
        tokenize_rows(rows, tokenizer, max_length=64)
    assert str(error.value).count("add_generation_prompt") == 1


def test_the_role_of_the_last_turn_is_told(chat):
    rows = [{"messages": [user("a"), {"role": role, "content": "b"}]} for role in ("Assistant", "assistant")]
    report = tokenize(rows, chat)[1]
    assert report.dropped == {"no assistant turn at the end": 1}
    assert "the last turn is of role 'Assistant'" in str(report)


def test_rows_of_which_the_template_drops_something_are_kept_on_request():
    """Only where it is the prompt that lacks something."""
    silent = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    tokenizer = make_tokenizer(silent)
    rows = [{"messages": [SYSTEM, user("a"), assistant("b")]}, {"messages": [user("a"), assistant("b")]}]
    lost = "the text of a turn of role 'system' is not in the chat template's text"
    assert tokenize(rows, tokenizer)[1].dropped == {lost: 1}
    examples, report = tokenize(rows, tokenizer, keep_incomplete_rows=True)
    assert (report.kept, report.incomplete) == (2, 1)
    assert examples["prompt_ids"][0] == examples["prompt_ids"][1]
    assert f"1 kept of which the template leaves out a part: row 0 ({lost})" in str(report)
    rows = [{"messages": [user("a"), {**assistant("b"), "reasoning_content": "g h"}]}, rows[1]]
    assert tokenize(rows, tokenizer, keep_incomplete_rows=True)[1].kept == 1


def test_a_row_has_a_prompt_or_messages(chat):
    rows = [
        {"prompt": "a", "completion": "b", "messages": None},
        {"prompt": None, "completion": None, "messages": [user("c"), assistant("d")]},
        {"prompt": "e", "completion": "f", "messages": [user("g"), assistant("h")]},
        {"prompt": None, "completion": None, "messages": None},
    ]
    examples, report = tokenize(rows, chat)
    assert examples["answer_ids"][:] == [ids("b <eos>"), ids("d <eos>"), ids("f <eos>")]
    assert report.dropped == {"'prompt' is empty (None)": 1}
    prompts, _ = tokenize_prompts(datasets.Dataset.from_list(rows), chat)
    assert prompts["prompt_ids"][:] == examples["prompt_ids"][:]


def test_a_completion_may_begin_with_its_prompt(chat):
    """As preference data has it."""
    whole = [user("a"), assistant("b"), user("c"), assistant("d")]
    rows = [{"prompt": whole[:3], "chosen": whole}, {"prompt": whole[:3], "chosen": whole[3:]}]
    for row in (*rows, {"prompt": "a", "chosen": whole}):
        examples, _ = tokenize([row], chat, completion_column="chosen")
        want, _ = tokenize([{"messages": whole}], chat)
        assert examples.to_list() == want.to_list()


def test_a_slice_without_rows_is_named():
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))
    with pytest.raises(ValueError, match=r"no rows in split 'train\[2:\]'"):
        load_rows(splits, split="train[2:]")


@pytest.mark.parametrize("functions", [[{"name": "f"}], '[{"name": "f"}]'])
def test_an_old_form_of_tools_is_named(functions, chat, plain):
    rows = [{"prompt": "a", "completion": "b", "functions": one} for one in (functions, None)]
    for tokenizer in (chat, plain):
        dropped = {"the column 'functions', which is not read; rename it to 'tools'": 1}
        assert tokenize(rows, tokenizer)[1].dropped == dropped
