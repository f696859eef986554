"""``assistant_turns=all``: every assistant turn of a row is mixed and learned, and nothing between them."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers.data import TEMPLATE, make_tokenizer
from helpers.training import SMALL, weights
from models import VOCAB, tiny_model

from selfgen import BSSConfig, BSSTrainer, ContextGenerator, RACConfig, write_contexts
from selfgen.data import Collator, rows_of, tokenize_rows

ROLES = ("user", "assistant")


def talk(text: str, **last) -> dict:
    """Turns by user and assistant, in turn; ``last`` are more keys of the last."""
    turns = [{"role": ROLES[i % 2], "content": one} for i, one in enumerate(text.split(" | "))]
    turns[-1] |= last
    return {"messages": turns}


ROWS = [talk("a b | c d e | f | g h a"), talk("a | b c"), talk("h | a b c d | e f | g g | a | b")]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEMPLATE, size=VOCAB)


def tokenize(rows, tokenizer, max_length=64):
    return tokenize_rows(Dataset.from_list(rows), tokenizer, max_length=max_length, assistant_turns="all")


def words(tokenizer, ids) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_all_assistant_turns_are_learned(tokenizer):
    examples, report = tokenize(ROWS, tokenizer)
    assert report.kept == 3
    first = examples[0]
    assert words(tokenizer, first["prompt_ids"]) == "<user> a b <eos> <nl> <assistant>"
    assert words(tokenizer, first["answer_ids"]) == "c d e <eos> <nl> <user> f <eos> <nl> <assistant> g h a <eos>"
    assert [bool(x) for x in first["is_learned"]] == [True] * 4 + [False] * 6 + [True] * 4
    whole = tokenizer.apply_chat_template(ROWS[0]["messages"], tokenize=False)
    assert first["prompt_ids"] + first["answer_ids"] == tokenizer(whole, add_special_tokens=False).input_ids[:-1]


def test_the_last_turn_alone_is_the_default(tokenizer):
    examples, _ = tokenize_rows(Dataset.from_list(ROWS), tokenizer, max_length=64)
    assert words(tokenizer, examples[0]["answer_ids"]) == "g h a <eos>"
    assert "is_learned" not in examples.column_names


def test_what_has_weight_0_is_not_learned(tokenizer):
    row = talk("a | b | c | d | e | f")
    row["messages"][3]["weight"] = 0
    examples, _ = tokenize([row], tokenizer)
    ids, learned = examples[0]["answer_ids"], examples[0]["is_learned"]
    assert (
        words(tokenizer, [one for one, is_learned in zip(ids, learned, strict=True) if is_learned]) == "b <eos> f <eos>"
    )
    _, report = tokenize_rows(
        Dataset.from_list([talk("a | b", weight=0), talk("a | b", weight=1)]), tokenizer, max_length=64
    )
    assert report.dropped == {"an answer of weight 0": 1}


def test_a_row_is_cut_to_what_is_learned(tokenizer):
    """What stands between turns is no use at the end."""
    examples, report = tokenize([ROWS[0]], tokenizer, max_length=13)  # the cut is in the second user turn
    assert report.truncated == 1
    assert words(tokenizer, examples[0]["answer_ids"]) == "c d e <eos>"
    assert examples[0]["is_learned"] == [True] * 4


def test_batches_tell_what_is_learned(tokenizer):
    examples, _ = tokenize(ROWS, tokenizer)
    batch = Collator(tokenizer.pad_token_id or 0)([examples[i] for i in range(3)])
    for row, example in zip(rows_of(batch), examples, strict=True):
        learned = torch.tensor(example["is_learned"])
        assert torch.equal(row.labels != -100, learned)
        assert row.reference.tolist() == example["answer_ids"]


@pytest.mark.parametrize("method", ["fixed_point", "sequential"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_self_tokens_are_where_they_may_be(method, model, tokenizer):
    examples, _ = tokenize(ROWS, tokenizer)
    generator = ContextGenerator(tiny_model(model), token_budget=16, balance=2)
    columns = [examples[name][:] for name in ("prompt_ids", "answer_ids")]
    may = [torch.tensor(one) for one in examples["is_learned"]]
    options = {"seed": 3, "sample_ids": [0, 1, 2], "method": method}
    mixed = generator.contexts(*columns, 1.0, may_be_self=may, **options)
    for tokens, is_self, allowed, reference in zip(mixed.tokens, mixed.is_self, may, columns[1], strict=True):
        assert torch.equal(is_self, allowed)
        assert torch.equal(tokens[~allowed], torch.tensor(reference)[~allowed])
    other = generator.contexts(*columns, 1.0, may_be_self=may, **options | {"method": "sequential"})
    assert all(map(torch.equal, mixed.tokens, other.tokens))
    with pytest.raises(ValueError, match="may_be_self must have one bool per token"):
        generator.contexts(*columns, 1.0, may_be_self=may[:2], **options)


def train(folder, tokenizer, rows=ROWS, **changes):
    options = SMALL | {"max_steps": 3, "learning_rate": 1e-2, "report_to": [], "assistant_turns": "all"} | changes
    trainer = BSSTrainer(
        tiny_model("llama"),
        BSSConfig(str(folder), **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    seen = []
    compute_loss = trainer.compute_loss

    def record(model, inputs, *args, **kwargs):
        seen.append({name: value.clone() for name, value in inputs.items()})
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = record
    trainer.train()
    return trainer, seen


def test_training_mixes_all_turns_and_learns_no_other(tmp_path, tokenizer):
    trainer, seen = train(tmp_path / "a", tokenizer, self_prob=1.0, optim="sgd")
    examples = {row["sample_id"]: row for row in trainer.train_dataset}
    changed = 0
    for batch in seen:
        for row in rows_of(batch):
            example = examples[row.sample_id]
            learned = torch.tensor(example["is_learned"])
            assert torch.equal(row.labels != -100, learned)
            assert row.answer[~learned].tolist() == torch.tensor(example["answer_ids"])[~learned].tolist()
            changed += int((row.answer != torch.tensor(example["answer_ids"])).sum())
    assert changed > 0
    reused, _ = train(tmp_path / "b", tokenizer, self_prob=1.0, optim="sgd", reuse_passes=False)
    assert torch.allclose(weights(trainer.model), weights(reused.model), atol=1e-6)


def test_the_loss_is_that_of_the_learned_tokens(tmp_path, tokenizer):
    trainer, seen = train(tmp_path, tokenizer, self_prob=0.0, max_steps=1, learning_rate=0.0)
    losses, count = 0.0, 0
    for batch in seen:
        logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        losses += torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        count += int((labels != -100).sum())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(losses) / count, rel=1e-4)


def test_methods_of_one_answer_refuse_it(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="assistant_turns=all is not for RAC"):
        RACConfig(str(tmp_path), assistant_turns="all", use_cpu=True)
    rows, _ = tokenize(ROWS, tokenizer)
    with pytest.raises(ValueError, match="stored contexts are of one answer per row"):
        write_contexts(ContextGenerator(tiny_model("llama")), rows, tmp_path, self_prob=0.5)
    with pytest.raises(ValueError, match="needs messages and a chat template"):
        tokenize_rows(
            Dataset.from_list([{"prompt": "a", "completion": "b"}]),
            make_tokenizer(size=VOCAB),
            max_length=64,
            assistant_turns="all",
        )
