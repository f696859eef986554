"""Rows of a padded embedding are never sampled, and a token without a row is refused before anything is made."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from datasets import Dataset
from helpers.cli import flags, run, save_model
from helpers.contexts import assert_equal, batch
from helpers.data import ROWS, TEMPLATE, WORDS, make_tokenizer, write_jsonl
from helpers.training import Tokenizer, config, losses_of, make_rac_trainer, rows
from models import VOCAB, tiny_model
from test_generation import REFUSED

from selfgen import BASHTrainer, BSSTrainer, ContextGenerator, answer, generate_corrected, write_contexts
from selfgen.context.masks import Masks
from selfgen.context.models import unpadded_vocab_size
from selfgen.stored_contexts import OfflineError

PADDED = 192
FILTERS = [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}]


def with_padding(model: t.PreTrainedModel, size: int = PADDED) -> t.PreTrainedModel:
    """The model with embedding rows that it would sample most of the time."""
    model.resize_token_embeddings(size, mean_resizing=False)
    head, known = model.get_output_embeddings().weight, model.get_input_embeddings().weight.shape[0]
    assert known == size
    with torch.no_grad():
        head[VOCAB:] = 10 * torch.randn(size - VOCAB, head.shape[1], generator=torch.Generator().manual_seed(1))
    return model


def highest(rows: list[torch.Tensor]) -> int:
    return max(int(row.max()) for row in rows)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("masks", [Masks(), Masks(min_reference_prob=1e-3)], ids=["all", "confident"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # a head of its own, and one that is the embedding
@pytest.mark.each_value
def test_contexts_are_those_of_the_model_without_padding(family, masks, temperature):
    options = {"token_budget": 100, "balance": 12, "masks": masks, "temperature": temperature}
    prompts, references, ids = batch(6, longest=20)
    arguments = {"self_prob": 0.7, "seed": 2, "sample_ids": ids}
    want = ContextGenerator(tiny_model(family), **options).contexts(prompts, references, **arguments)
    model = with_padding(tiny_model(family))
    generator = ContextGenerator(model, vocab_size=VOCAB, **options)
    assert_equal(generator.contexts(prompts, references, **arguments), want)
    assert_equal(generator.contexts(prompts, references, method="sequential", **arguments), want)
    assert any(is_self.any() for is_self in want.is_self)
    assert (
        highest(ContextGenerator(model, temperature=temperature).contexts(prompts, references, **arguments).tokens)
        >= VOCAB
    )


@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "+".join(f) or "none")
def test_answers_are_those_of_the_model_without_padding(filters):
    options = {"temperature": 1.0, "max_new_tokens": 12, "seed": 4, **filters}
    prompts = [[place] for place in range(3, 9)]
    want = answer(tiny_model("llama"), prompts, **options)
    model = with_padding(tiny_model("llama"))
    assert_equal_answers(answer(model, prompts, vocab_size=VOCAB, **options), want)
    assert highest(answer(model, prompts, **options).tokens) >= VOCAB


def assert_equal_answers(found, want):
    assert [row.tolist() for row in found.tokens] == [row.tolist() for row in want.tokens]
    assert found.finished == want.finished


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_answers_of_models_that_the_ragged_path_refuses(family, temperature):
    """By transformers' ``generate``."""
    answers = []
    for pad in (lambda model: model, with_padding):
        torch.manual_seed(0)
        model = pad(t.AutoModelForCausalLM.from_config(REFUSED[family]()).eval())
        generator = ContextGenerator(model, temperature=temperature, vocab_size=VOCAB)
        answers.append(generator.answer([[5, 6], [7], [8, 9, 4]], max_new_tokens=8, seed=3))
    assert_equal_answers(*answers)


def test_corrections_are_of_the_tokenizers_ids():
    model, tokenizer = with_padding(tiny_model("llama")), make_tokenizer(TEMPLATE)
    found = generate_corrected(model, tokenizer, ["a b", "c"], temperature=1.0, max_new_tokens=20)
    assert highest(found.first + found.corrected) < len(WORDS)


def test_ids_that_do_not_exist_are_refused_in_prompts_and_references():
    generator = ContextGenerator(tiny_model("llama"), vocab_size=100)
    with pytest.raises(ValueError, match=r"references\[0\] holds token id 100; .* has ids 0 to 99"):
        generator.contexts([[3]], [[4, 100]], 0.5, seed=0, sample_ids=[0])
    with pytest.raises(ValueError, match=r"prompts\[0\] holds token id 130"):
        generator.answer([[130]])


# ---- What the tokenizer tells ----------------------------------------------------------------------------------------


class Ids:
    """A tokenizer that has these ids."""

    pad_token_id, eos_token_id = 0, 2

    def __init__(self, *ids: int):
        self.ids = ids

    def get_vocab(self) -> dict[str, int]:
        return {f"<{number}>": number for number in self.ids}


def test_ids_are_counted_up_to_the_highest():
    model = tiny_model("llama")
    assert unpadded_vocab_size(model, Ids(*range(VOCAB))) is None
    assert unpadded_vocab_size(model, Ids(*range(99))) == 99
    assert unpadded_vocab_size(model, Ids(0, 70, 3)) == 71  # fewer tokens than that: there are holes
    assert unpadded_vocab_size(model, Ids(VOCAB - 1)) is None
    assert unpadded_vocab_size(model, Tokenizer()) is None  # does not tell
    message = (
        r"'<131>' of the tokenizer has id 131, .* 131 rows \(ids 0 to 130\): call .*resize_token_embeddings\(132\)"
    )
    with pytest.raises(ValueError, match=message):
        unpadded_vocab_size(model, Ids(4, VOCAB, 7))


# ---- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fixed_point", "sequential"])
def test_training_inputs_have_no_ids_of_padding(tmp_path, caplog, method):
    trainer = BSSTrainer(
        with_padding(tiny_model("llama")),
        config(tmp_path, max_steps=1, self_prob=0.9, context_method=method),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
    )
    said = (
        "the model has 192 embedding rows for 15 ids of the tokenizer: the ids 15 to 191 are padding and never sampled"
    )
    assert [record.message for record in caplog.records if "padding" in record.message] == [said]
    assert trainer.generator.vocab_size == len(WORDS)
    for _, inputs in losses_of(trainer):
        assert inputs["input_ids"].max() < len(WORDS)


@pytest.mark.parametrize("own_answer", ["generated", "mixed"])
def test_own_answers_have_none_either(tmp_path, own_answer):
    trainer = make_rac_trainer(tmp_path, model=with_padding(tiny_model("llama")), own_answer=own_answer)
    for _, inputs in losses_of(trainer):
        assert inputs["input_ids"].max() < VOCAB


def test_nothing_is_said_of_an_embedding_without_padding(tmp_path, caplog):
    trainer = BSSTrainer(
        tiny_model("llama"), config(tmp_path), train_dataset=rows(), processing_class=make_tokenizer(size=VOCAB)
    )
    assert trainer.generator.vocab_size is None
    assert "padding" not in caplog.text


def test_contexts_with_ids_of_padding_are_not_trained_on(tmp_path):
    """Written without the tokenizer's size, or with that of another."""
    model, data = with_padding(tiny_model("llama")), rows(4)
    options = {"self_prob": 0.9, "progress": False}
    write_contexts(ContextGenerator(model), data, tmp_path / "all", **options)
    with pytest.raises(ValueError, match="but the model has 131 ids"):
        BASHTrainer(model, config(tmp_path), train_dataset=tmp_path / "all", processing_class=Ids(*range(VOCAB)))
    write_contexts(ContextGenerator(model, vocab_size=VOCAB), data, tmp_path / "contexts", **options)
    BASHTrainer(model, config(tmp_path), train_dataset=tmp_path / "contexts", processing_class=Ids(*range(VOCAB)))
    with pytest.raises(OfflineError, match="vocab_size was 131, is 140"):
        write_contexts(ContextGenerator(model, vocab_size=140), data, tmp_path / "contexts", **options)


# ---- Commands --------------------------------------------------------------------------------------------------------


TRAINING = ["train", "train --method rac", "train --method bash --rounds 2"]
COMMANDS = [*TRAINING, "contexts", "eval", "generate"]


@pytest.fixture
def given(tmp_path):
    """The arguments of each command, by name, but for the model."""
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, ROWS)
    common = {"dataset": file, "use_cpu": True}
    training = {"max_length": 32, "max_steps": 2, "report_to": "none", "token_budget": 16, "balance": 2}
    folder = {"output_dir": tmp_path / "out"}
    return {
        **dict.fromkeys((*TRAINING, "train --self_prob 0"), common | training | folder),
        "contexts": common | folder | {"max_length": 32},
        "eval": common | folder | {"max_length": 32, "max_new_tokens": 2},
        "generate": common | {"output_file": tmp_path / "out" / "answers.jsonl"},
    }


@pytest.mark.parametrize("command", [*COMMANDS, "train --self_prob 0"])
def test_a_token_without_a_row_is_one_line_before_any_output(given, command, tmp_path, capsys):
    save_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "model")
    code, _, err = run([*command.split(), *flags({"model": tmp_path / "model"} | given[command])], capsys)
    assert code == 2, err
    assert "error: the token '<new>' of the tokenizer has id 15" in err.splitlines()[-1]
    assert "resize_token_embeddings(16)" in err
    assert "Traceback" not in err
    assert not [file for file in (tmp_path / "out").rglob("*") if file.name != ".lock"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_sample_no_padding(given, command, tmp_path, capsys, monkeypatch):
    save_model(tmp_path / "model")
    model = t.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.resize_token_embeddings(64, mean_resizing=False)
    model.save_pretrained(tmp_path / "model")
    seen = []

    def record(function):
        def recorded(generator, *args, **options):
            seen.append(generator.vocab_size)
            return function(generator, *args, **options)

        return recorded

    for name in ("contexts", "answer"):
        monkeypatch.setattr(ContextGenerator, name, record(getattr(ContextGenerator, name)))
    code, _, err = run([*command.split(), *flags({"model": tmp_path / "model"} | given[command])], capsys)
    assert code == 0, err
    assert set(seen) == {len(WORDS)}
