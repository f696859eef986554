"""Reference-answer-based correction: what rows become, where own answers come from, what is learned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers.data import EOS, TEMPLATE, make_tokenizer
from helpers.training import OWN_ANSWERS, losses_of, make_rac_trainer
from models import tiny_model

from selfgen import ContextGenerator, Masks, RACConfig, RACTrainer
from selfgen.correction import CorrectionCue
from selfgen.data import RowOptions, tokenize_rows
from selfgen.training.mixing import step_seed
from selfgen.training.rac import _DIRECT


def tokenized(data=OWN_ANSWERS):
    rows, _ = tokenize_rows(Dataset.from_list(data), make_tokenizer(TEMPLATE), max_length=64)
    return {row["sample_id"]: row for row in rows}


def row_of(inputs, index):
    """(sample id, prompt ids, context ids, labels of the answer) of a row of a batch."""
    begin, length = (int(inputs[name][index]) for name in ("prompt_length", "answer_length"))
    ids, labels = inputs["input_ids"][index].tolist(), inputs["labels"][index]
    assert (labels[:begin] == -100).all()
    assert (labels[begin + length :] == -100).all()
    return (
        int(inputs["sample_id"][index]),
        ids[:begin],
        ids[begin : begin + length],
        labels[begin : begin + length].tolist(),
    )


def is_direct(sample_id):
    return bool(sample_id & _DIRECT)


def all_rows(found):
    return [row_of(inputs, index) for _, inputs in found for index in range(len(inputs["input_ids"]))]


@pytest.mark.parametrize("own_answer", ["generated", "mixed", "column"])
def test_a_row_is_prompt_own_answer_cue_and_reference(tmp_path, own_answer):
    """The own answers are the current weights', keyed by seed, step and row; labels are the reference alone."""
    mixed = {"own_answer_self_prob": 0.5} if own_answer == "mixed" else {}
    found = all_rows(losses_of(make_rac_trainer(tmp_path, own_answer=own_answer, **mixed)))
    rows, tokenizer, oracle = tokenized(), make_tokenizer(TEMPLATE), ContextGenerator(tiny_model("llama"))
    between = CorrectionCue.of(tokenizer, "h g")
    assert sorted(row[0] for row in found) == [0, 1, 2, 3]
    for sample_id, prompt, context, labels in found:
        row = rows[sample_id]
        keys = {"seed": step_seed(42, 0, stream=1), "sample_ids": [sample_id]}
        if own_answer == "generated":
            own = oracle.answer([row["prompt_ids"]], max_new_tokens=6, eos_token_ids=[EOS], **keys).tokens[0].tolist()
        elif own_answer == "mixed":
            own = oracle.contexts([row["prompt_ids"]], [row["answer_ids"]], 0.5, method="sequential", **keys)
            own = own.tokens[0].tolist()
        else:
            own = tokenizer(OWN_ANSWERS[sample_id]["own_answer"], add_special_tokens=False).input_ids
        assert prompt == between.prompt(row["prompt_ids"], own)
        assert context == labels == row["answer_ids"]


@pytest.mark.parametrize("own_answer", ["generated", "mixed", "column"])
def test_logs_have_what_own_answers_cost(tmp_path, own_answer):
    trainer = make_rac_trainer(tmp_path, own_answer=own_answer, own_answer_batch_size=1)
    found = losses_of(trainer)
    logs = trainer.state.log_history[0]
    if own_answer == "column":
        assert logs["passes"] == logs["computed_per_token"] == 0
        return
    context_tokens = sum(len(prompt) + len(context) for _, prompt, context, _ in all_rows(found))
    assert logs["passes"] >= 4 * (own_answer == "generated") + 1  # rows one after the other take passes of their own
    assert logs["computed_per_token"] * context_tokens >= sum(len(row["prompt_ids"]) for row in tokenized().values())


def test_own_answers_change_from_step_to_step(tmp_path):
    found = all_rows(losses_of(make_rac_trainer(tmp_path, max_steps=3, learning_rate=0.0)))
    assert len({tuple(prompt) for sample_id, prompt, _, _ in found if sample_id == 0}) > 1


def test_loss_is_that_of_the_correction(tmp_path):
    found = losses_of(make_rac_trainer(tmp_path))
    check_loss(found, lambda row: 1.0)


def test_direct_rows_have_their_weight(tmp_path):
    """Each row comes twice, once as it was; the sum of the weighted losses is over the number of corrected tokens."""
    found = losses_of(make_rac_trainer(tmp_path, direct_weight=0.25))
    rows = tokenized()
    direct = [row for row in all_rows(found) if is_direct(row[0])]
    assert sorted(row[0] ^ _DIRECT for row in direct) == [0, 1, 2, 3]
    for sample_id, prompt, context, labels in direct:
        assert prompt == rows[sample_id ^ _DIRECT]["prompt_ids"]
        assert context == labels == rows[sample_id ^ _DIRECT]["answer_ids"]
    check_loss(found, lambda row: 1.0 if not is_direct(row) else 0.25)


def test_sample_ids_may_be_negative(tmp_path):
    """A row and what is shown of another without a correction are two rows."""
    data = [text | {"sample_id": sample_id} for text, sample_id in zip(OWN_ANSWERS, (-2, -1, 0, 1), strict=True)]
    found = all_rows(losses_of(make_rac_trainer(tmp_path, data=data, self_prob=0.5, direct_weight=0.25)))
    assert len({row[0] for row in found}) == 8


def test_only_corrections_are_counted_where_self_tokens_are_asked_for(tmp_path):
    """The direct rows add to the loss, not to what it is divided by."""
    found = losses_of(make_rac_trainer(tmp_path, self_prob=1.0, direct_weight=0.5, loss_on="after_self"))
    for _, _, _, labels in all_rows(found):
        assert [label == -100 for label in labels] == [True] + [False] * (len(labels) - 1)
    check_loss(found, lambda row: 1.0 if not is_direct(row) else 0.5)


@pytest.mark.parametrize("self_prob", [0.5, 1.0])
def test_only_what_follows_a_prefix_is_learned(tmp_path, self_prob):
    """Of corrections and of direct rows, each with a prefix of its own; where there is nothing, the loss is 0."""
    options = {"granularity": "prefix", "loss_on": "after_switch", "direct_weight": 0.5, "self_prob": self_prob}
    found = losses_of(make_rac_trainer(tmp_path, **options))
    learned = 0
    for sample_id, _, _, labels in all_rows(found):
        masks = Masks("prefix").draw(
            step_seed(42, 0), torch.tensor([sample_id]), [len(labels)], torch.tensor([self_prob], dtype=torch.float64)
        )
        assert [label == -100 for label in labels] == masks[0].tolist()
        learned += sum(label != -100 for label in labels)
    assert bool(learned) == (self_prob < 1)
    losses = torch.stack([loss for loss, _ in found])
    assert losses.isfinite().all()
    assert bool(losses.any()) == bool(learned)


@pytest.mark.slow
def test_direct_rows_are_a_mean_of_their_own_after_self_tokens(tmp_path):
    """They have other self tokens than the corrections, so another number of learned ones; none is no division by 1."""
    seen = set()
    for seed in range(12):
        folder = tmp_path / str(seed)
        found = losses_of(make_rac_trainer(folder, self_prob=0.4, direct_weight=0.5, loss_on="after_self", seed=seed))
        sums, counts = [0.0, 0.0], [0, 0]
        for sample_id, prompt, context, labels in all_rows(found):
            with torch.no_grad():
                logits = tiny_model("llama")(input_ids=torch.tensor([prompt + context])).logits[0, len(prompt) - 1 : -1]
            sums[is_direct(sample_id)] += float(F.cross_entropy(logits, torch.tensor(labels), reduction="sum"))
            counts[is_direct(sample_id)] += sum(label != -100 for label in labels)
        want = sum(
            weight * total / max(1, count) for weight, total, count in zip((1.0, 0.5), sums, counts, strict=True)
        )
        assert float(sum(loss for loss, _ in found)) == pytest.approx(want, rel=1e-5, abs=1e-6)
        seen.add(counts[0] == counts[1])
    assert False in seen


def test_its_loss_is_lean_by_default(tmp_path):
    """Its rows are the longest; fine-tuning at p = 0 keeps the Trainer's own loss."""
    assert make_rac_trainer(tmp_path)._answer_loss.lean
    assert make_rac_trainer(tmp_path, direct_weight=0.5)._answer_loss.lean
    assert make_rac_trainer(tmp_path, lean_loss=False)._answer_loss is None


def test_tokenized_rows_without_room_for_the_cue_are_refused(tmp_path):
    """Text is cut beforehand; what is tokenized already is left as it is."""
    data = [{"sample_id": i, "prompt_ids": [3] * 8, "answer_ids": [4] * 4} for i in range(4)]
    with pytest.raises(ValueError, match="no room for the cue"):
        make_rac_trainer(tmp_path, data=data, max_length=14).train()


def test_all_that_ends_an_answer_ends_it(tmp_path):
    """The model's own stop tokens, too, in training as at inference; what follows one is not shown."""
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [EOS, 9, 10, 11, 12, 13]
    found = all_rows(losses_of(make_rac_trainer(tmp_path, model=model, own_answer="generated", max_new_tokens=40)))
    between = CorrectionCue.of(make_tokenizer(TEMPLATE), "h g", stop_ids=[9, 10, 11, 12, 13])
    rows = tokenized()
    for sample_id, prompt, _, _ in found:
        own = prompt[len(rows[sample_id]["prompt_ids"]) : len(prompt) - len(between.ids)]
        assert not set(own) & {EOS, 9, 10, 11, 12, 13}
    assert between.prompt([1], [5, 10, 6, 7]) == [1, 5, *between.ids]


def test_an_end_of_turn_in_plain_text_comes_once():
    """Where no added token ends a turn, an own answer ends with text that the cue begins with, too."""
    tokenizer = make_tokenizer(TEMPLATE.replace("<eos> <nl>", "h h"))
    between = CorrectionCue.of(tokenizer, "a")
    own = tokenizer("b h h", add_special_tokens=False).input_ids
    assert between.prompt([1], [*own, EOS]) == between.prompt([1], own) == between.prompt([1], own[:1])
    assert between.prompt([1], own[:1]) == [1, own[0], *between.ids]


def test_no_room_for_the_cue_at_all(tmp_path):
    with pytest.raises(ValueError, match="max_length is 9, of which the cue takes"):
        make_rac_trainer(tmp_path, max_length=9)


def test_a_collator_of_the_users_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data_collator"):
        RACTrainer(
            tiny_model("llama"),
            RACConfig(str(tmp_path), max_length=64, use_cpu=True),
            train_dataset=Dataset.from_list(OWN_ANSWERS),
            processing_class=make_tokenizer(TEMPLATE),
            data_collator=lambda rows: rows,
        )


def check_loss(found, weight_of):
    model, total, count = tiny_model("llama"), torch.zeros(()), 0
    for _, inputs in found:
        for index in range(len(inputs["input_ids"])):
            sample_id, prompt, context, labels = row_of(inputs, index)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + context])).logits[0, len(prompt) - 1 : -1]
            loss = F.cross_entropy(logits, torch.tensor(labels), reduction="sum")
            learned = sum(label != -100 for label in labels)
            total, count = total + weight_of(sample_id) * loss, count + learned * (not is_direct(sample_id))
    torch.testing.assert_close(sum(loss for loss, _ in found), total / count, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direct_weight", [0.0, 0.5])
def test_with_self_tokens_it_is_bss_on_corrections(tmp_path, direct_weight):
    """RAC and BSS at once: contexts of the reference are mixed after the correction prompt, and their passes reused."""
    trainer = make_rac_trainer(tmp_path, self_prob=0.6, direct_weight=direct_weight)
    found = losses_of(trainer)
    assert trainer._reuse.verified
    assert trainer._reuse.on
    oracle = ContextGenerator(tiny_model("llama"))
    rows = tokenized()
    different = 0
    for sample_id, prompt, context, labels in all_rows(found):
        assert labels == rows[sample_id & ~_DIRECT]["answer_ids"]
        want = oracle.contexts(
            [prompt], [labels], 0.6, seed=step_seed(42, 0), sample_ids=[sample_id], method="sequential"
        )
        assert context == want.tokens[0].tolist()
        different += context != labels
    assert different
    check_loss(found, lambda row: 1.0 if not is_direct(row) else direct_weight)


def test_rows_keep_to_max_length(tmp_path):
    """The own answer gives way, and the reference leaves room for the cue."""
    between = CorrectionCue.of(make_tokenizer(TEMPLATE), "h g")
    longest = len(between.ids) + 9
    found = all_rows(losses_of(make_rac_trainer(tmp_path, max_length=longest, max_new_tokens=30)))
    lengths = [len(prompt) + len(context) for _, prompt, context, _ in found]
    assert max(lengths) <= longest


@pytest.mark.parametrize(("room", "share"), [(9, 1.0), (50, 0.0)])
def test_own_answers_that_were_cut_are_logged(tmp_path, room, share):
    longest = len(CorrectionCue.of(make_tokenizer(TEMPLATE), "h g").ids) + room
    trainer = make_rac_trainer(tmp_path, max_length=longest, max_new_tokens=30, max_steps=2)
    trainer.train()
    assert [log["own_answers_cut"] for log in trainer.state.log_history if "loss" in log] == [share, share]


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    def run(folder, **changes):
        trainer = make_rac_trainer(
            folder, learning_rate=1e-2, save_strategy="steps", save_steps=2, max_steps=4, **changes
        )
        return trainer

    whole = run(tmp_path / "whole")
    whole.train()
    part = run(tmp_path / "part")
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), part.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluation_is_of_the_answer_right_after_the_prompt(tmp_path):
    trainer = make_rac_trainer(tmp_path)
    rows = tokenized()
    model, total, count = tiny_model("llama"), 0.0, 0
    for row in rows.values():
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
        total += float(F.cross_entropy(logits, torch.tensor(row["answer_ids"]), reduction="sum"))
        count += len(row["answer_ids"])
    assert trainer.evaluate(Dataset.from_list(OWN_ANSWERS))["eval_loss"] == pytest.approx(total / count, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own_answer": "none"}, "accepted: generated, mixed, column"),
        ({"own_answer_self_prob": 1.5}, r"in \[0, 1\]"),
        ({"own_answer_self_prob": 0.5}, "goes with own_answer=mixed"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"own_answer_batch_size": 0}, "at least 1"),
        ({"direct_weight": -1.0}, ">= 0"),
        ({"correction_cue": " "}, "empty"),
        ({"own_answer": "column", "own_answer_column": "there"}, "selfgen generate"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_rac_trainer(tmp_path, **change)


def test_own_answers_must_be_text(tmp_path, caplog):
    """A row without one is dropped and named; it ends a run only where none is left."""
    data = [OWN_ANSWERS[0] | {"own_answer": None}, *OWN_ANSWERS[1:]]
    trainer = make_rac_trainer(tmp_path, data=data, own_answer="column")
    assert trainer.train_dataset["sample_id"][:] == [1, 2, 3]
    assert "1 of 4 rows have no text in 'own_answer': row 0" in caplog.text
    for changes in ({"strict_data": True}, {"data": [row | {"own_answer": None} for row in OWN_ANSWERS]}):
        with pytest.raises(ValueError, match="own answers must be text, so fill or drop these rows"):
            make_rac_trainer(tmp_path, **{"data": data, "own_answer": "column"} | changes)


@pytest.mark.parametrize("begins", [True, False])
def test_answers_as_text_are_answers_as_ids(begins):
    """With or without the beginning of the assistant's turn, which then belongs to the answer."""
    tokenizer = make_tokenizer(TEMPLATE.replace("<assistant> {% endif %}", "<assistant> h {% endif %}"))
    options = RowOptions(max_length=64, add_generation_prompt=begins)
    (ids,) = options.answer_ids(tokenizer, ["a b"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "b"] if begins else ["<assistant>", "a", "b"]
    assert options.answer_texts(tokenizer, [[*ids, 2]]) == ["a b"]


def test_a_cue_follows_the_options_of_the_template():
    """A template whose generation prompt is not what a finished conversation has."""
    thinks = TEMPLATE.replace(
        "<assistant> {% endif %}", "<assistant> {% if think | default(true) %}h {% endif %}{% endif %}"
    )
    tokenizer = make_tokenizer(thinks)
    with pytest.raises(ValueError, match="renders an answer in another way when a turn follows it"):
        CorrectionCue.of(tokenizer, "g")
    cue = CorrectionCue.of(tokenizer, "g", options=RowOptions(add_generation_prompt=False))
    assert tokenizer.convert_ids_to_tokens(cue.ids) == ["<eos>", "<nl>", "<user>", "g", "<eos>", "<nl>"]
    cue = CorrectionCue.of(tokenizer, "g", options=RowOptions(chat_template_kwargs={"think": False}))
    assert tokenizer.convert_ids_to_tokens(cue.ids) == ["<eos>", "<nl>", "<user>", "g", "<eos>", "<nl>", "<assistant>"]
