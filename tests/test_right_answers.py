"""RAC and own answers that are right already: which they are, what is learned of them, and what becomes of answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from helpers.data import EOS, TEMPLATE, make_tokenizer
from helpers.processes import in_ranks
from helpers.training import OWN_ANSWERS, losses_of, make_rac_trainer, weights
from models import VOCAB, tiny_model

from selfgen import RACConfig, RACTrainer, generate_corrected
from selfgen.correction import CorrectionCue
from selfgen.evaluation import Corrections
from selfgen.training.rac import _DIRECT
from selfgen.training.right_answers import left_out

RIGHT = ("e", "b")  # own answers of rows 0 and 2


def says_so(answer: str, reference: str) -> bool:
    return answer in RIGHT


def every_third(answer: str, reference: str) -> bool:
    """Of what the tiny model says, about a third."""
    return (len(answer.split()) + len(answer)) % 3 == 0


def make(folder, judge=says_so, data=OWN_ANSWERS, **changes) -> RACTrainer:
    return make_rac_trainer(folder, data=data, judge=judge, **{"own_answer": "column"} | changes)


def learned_of(found) -> dict[int, tuple[list[int], float]]:
    """Labels and weight of each row by sample id."""
    rows = {}
    for _, inputs in found:
        for index, sample_id in enumerate(inputs["sample_id"].tolist()):
            labels = inputs["labels"][index]
            weight = inputs["loss_weight"][index] if "loss_weight" in inputs else 1.0
            rows[sample_id] = labels[labels != -100].tolist(), float(weight)
    return rows


def sums_of(found) -> tuple[torch.Tensor, int, torch.Tensor, int]:
    """Cross-entropy and tokens of the corrections that have a weight, and of the direct rows."""
    sums, counts, model = torch.zeros(2), [0, 0], tiny_model("llama")
    for _, inputs in found:
        for index, sample_id in enumerate(inputs["sample_id"].tolist()):
            direct = bool(sample_id & _DIRECT)
            if not direct and "loss_weight" in inputs and not inputs["loss_weight"][index]:
                continue
            labels, ids = inputs["labels"][index], inputs["input_ids"][index]
            there = labels != -100
            length = int(there.nonzero()[-1]) + 1
            with torch.no_grad():
                logits = model(input_ids=ids[None, :length]).logits[0, :-1]
            sums[int(direct)] += F.cross_entropy(logits, labels[1:length], ignore_index=-100, reduction="sum")
            counts[direct] += int(there.sum())
    return sums[0], counts[0], sums[1], counts[1]


def ids_of(text: str) -> list[int]:
    return [*make_tokenizer(TEMPLATE, size=VOCAB)(text, add_special_tokens=False).input_ids, EOS]


def test_first_answers_are_learned_by_default(tmp_path):
    """With the weight of corrections, so that the loss needs no weights and any model's own loss will do."""
    assert RACConfig(str(tmp_path), use_cpu=True).direct_weight == 1.0
    found = losses_of(make_rac_trainer(tmp_path, direct_weight=1.0))
    assert {row & ~_DIRECT for row in learned_of(found)} == {0, 1, 2, 3}
    assert len(learned_of(found)) == 8
    assert all("loss_weight" not in inputs for _, inputs in found)
    corrections, count, direct, same = sums_of(found)
    assert count == same
    torch.testing.assert_close(sum(loss for loss, _ in found), (corrections + direct) / count, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direct_weight", [0.0, 1.0])
def test_a_right_answer_is_kept_as_it_is(tmp_path, direct_weight):
    trainer = make(tmp_path, right_answers="keep", direct_weight=direct_weight)
    found = losses_of(trainer)
    learned = learned_of(found)
    for number, row in enumerate(OWN_ANSWERS):
        kept = row["own_answer"] in RIGHT
        assert learned[number][0] == ids_of(row["own_answer"] if kept else row["completion"])
        if direct_weight:
            assert learned[number ^ _DIRECT][0] == ids_of(row["completion"])
    corrections, count, direct, of_direct = sums_of(found)
    want = corrections / count + (direct_weight * direct / of_direct if direct_weight else 0)
    torch.testing.assert_close(sum(loss for loss, _ in found), want, rtol=1e-5, atol=1e-6)
    assert trainer.state.log_history[0]["own_answers_right"] == 0.5


def test_a_right_answer_is_kept_beside_a_reference_that_ends_as_the_cue_begins(tmp_path):
    """As texts that end in a new line do, where the cue is a paragraph."""
    data = [
        {"prompt": "a", "completion": "f g h", "own_answer": "b"},
        {"prompt": "a", "completion": "f g", "own_answer": "b h"},
    ] * 2
    trainer = make(tmp_path, lambda *_: True, data=data, right_answers="keep", apply_chat_template=False)
    learned = learned_of(losses_of(trainer))
    assert trainer._cue.ids == ids_of("h g")[:-1]
    assert [learned[number][0] for number in range(4)] == [ids_of(row["own_answer"]) for row in data]


def test_by_default_the_reference_is_learned_and_right_answers_are_counted(tmp_path):
    trainer = make(tmp_path)
    learned = learned_of(losses_of(trainer))
    assert [learned[number][0] for number in range(4)] == [ids_of(row["completion"]) for row in OWN_ANSWERS]
    logs = trainer.state.log_history[0]
    assert logs["own_answers_right"] == 0.5
    assert "own_answers_left_out" not in logs


def test_it_counts_as_an_evaluation_does(tmp_path):
    """By exact match, where no judge is given; a generated answer that is broken off is never right."""
    data = [row | {"own_answer": row["completion"]} for row in OWN_ANSWERS]
    trainer = make(tmp_path, judge=None, data=data)
    trainer.train()
    assert trainer.state.log_history[0]["own_answers_right"] == 1.0
    half = [row | {"finished": number % 2 == 0} for number, row in enumerate(data)]
    trainer = make(tmp_path, judge=None, data=half)
    trainer.train()
    assert trainer.state.log_history[0]["own_answers_right"] == 0.5
    cut = len(CorrectionCue.of(make_tokenizer(TEMPLATE), "h g").ids) + 9
    for changes in ({"own_answer": "generated", "max_new_tokens": 1}, {"max_length": cut}):
        trainer = make(tmp_path, judge=lambda *_: True, data=OWN_ANSWERS, **changes)
        trainer.train()
        logs = trainer.state.log_history[0]
        assert logs["own_answers_right"] == 1 - max(logs.get("own_answers_unfinished", 0.0), logs["own_answers_cut"])
        assert logs["own_answers_right"] < 1


@pytest.mark.parametrize(("share", "stay"), [(0.0, 0), (0.2, 0), (0.34, 1), (0.4, 1), (0.5, 2)])
@pytest.mark.parametrize("direct_weight", [0.0, 0.5])
@pytest.mark.each_value
def test_the_share_of_right_answers(tmp_path, share, stay, direct_weight):
    """Corrections that are left out count neither in the loss nor in what it is divided by."""
    trainer = make(tmp_path, right_answer_share=share, direct_weight=direct_weight)
    found = losses_of(trainer)
    learned = learned_of(found)
    assert sum(learned[number][1] for number in (0, 2)) == stay
    assert learned[1][1] == learned[3][1] == 1.0
    corrections, count, direct, of_direct = sums_of(found)
    want = corrections / count + (direct_weight * direct / of_direct if direct_weight else 0)
    torch.testing.assert_close(sum(loss for loss, _ in found), want, rtol=1e-5, atol=1e-6)
    assert trainer.state.log_history[0]["own_answers_left_out"] == (2 - stay) / 4


@pytest.mark.parametrize(
    "changes",
    [
        {"right_answer_share": 0.0},
        {"right_answer_share": 0.4, "direct_weight": 0.5},
        {"right_answers": "keep", "direct_weight": 1.0},
        {"direct_weight": 2.0},
    ],
)
@pytest.mark.one_case
def test_models_that_take_no_count_of_tokens(tmp_path, changes):
    """As Gemma 3's of text and images don't: transformers then takes the mean over each micro-batch, left out or not.

    The rows, all in one micro-batch or two in each of two, have the loss that they have with any other model.
    """
    for rows in ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}, {}):
        model = tiny_model("llama")
        model.accepts_loss_kwargs = False
        trainer = make(tmp_path, model=model, **changes, **rows)
        found = losses_of(trainer)
        corrections, count, direct, of_direct = sums_of(found)
        want = corrections / count + changes.get("direct_weight", 0.0) * direct / max(1, of_direct)
        torch.testing.assert_close(sum(loss for loss, _ in found), want, rtol=1e-5, atol=1e-6)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(float(want), rel=1e-5)


def test_a_step_without_a_correction(tmp_path):
    """The weights stay where they are; with direct rows, these alone are learned."""
    changes = {"right_answer_share": 0.0, "learning_rate": 0.1, "judge": lambda *_: True, "optim": "sgd"}
    trainer = make(tmp_path, **changes)
    before = weights(trainer.model).clone()
    trainer.train()
    assert torch.equal(weights(trainer.model), before)
    found = losses_of(make(tmp_path, **changes | {"learning_rate": 0.0}, direct_weight=0.5))
    _, count, direct, of_direct = sums_of(found)
    assert count == 0
    torch.testing.assert_close(sum(loss for loss, _ in found), 0.5 * direct / of_direct, rtol=1e-5, atol=1e-6)


def test_what_is_left_out():
    """At most the share of what stays, and the same whatever the order; another seed leaves out others."""
    right, wrong = range(0, 40, 2), range(1, 21, 2)
    for share in (0.0, 0.1, 0.5, 0.6, 0.9):
        out = left_out(right, wrong, share, 7, together=False)
        stay = len(right) - len(out)
        assert out < {*right, -1}
        assert stay <= share * (stay + len(wrong)) + 1e-9
        assert stay == len(right) or stay + 1 > share * (stay + 1 + len(wrong))
        assert out == left_out([*reversed(right)], [*wrong, *wrong], share, 7, together=False)
    assert len({frozenset(left_out(right, wrong, 0.5, seed, together=False)) for seed in range(8)}) > 1
    assert left_out(right, wrong, 1.0, 7, together=False) == set()
    assert left_out(right, [], 0.9, 7, together=False) == set(right)


@pytest.mark.parametrize("own_answer", ["generated", "mixed"])
@pytest.mark.one_case
def test_a_resumed_run_is_the_unbroken_one(tmp_path, own_answer):
    """Weights and log, in the middle of what the log counts."""
    data = [row | {"prompt": f"{row['prompt']} {more}"} for row in OWN_ANSWERS for more in "abc"]
    changes = {
        "own_answer": own_answer, "right_answers": "keep", "right_answer_share": 0.4, "direct_weight": 0.5,
        "self_prob": 0.5, "learning_rate": 1e-2, "max_steps": 6, "logging_steps": 4, "save_strategy": "steps",
        "save_steps": 2, "max_new_tokens": 12, "judge": every_third, "data": data,
    }  # fmt: skip
    changes |= {"own_answer_self_prob": 0.5} if own_answer == "mixed" else {}
    whole, part = make(tmp_path / "whole", **changes), make(tmp_path / "part", **changes)
    whole.train()
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(whole.model), weights(part.model))
    counted = [
        {name: value for name, value in entry.items() if name.startswith("own_answers") or name == "loss"}
        for trainer in (whole, part)
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    assert counted[: len(counted) // 2] == counted[len(counted) // 2 :]
    assert any(entry["own_answers_left_out"] for entry in counted)


def test_answers_and_corrections_in_evaluations(tmp_path):
    """Those of `generate_corrected` on the first rows, as shares of these."""
    data = Dataset.from_list([{"prompt": f"{a} {b}", "completion": "c d"} for a in "abcd" for b in "efgh"])
    options = {"eval_corrections": 12, "max_new_tokens": 12, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make(
        tmp_path,
        every_third,
        eval_dataset=data,
        metric_for_best_model="corrected_right",
        save_strategy="best",
        max_steps=2,
        **options,
    )
    trainer.train()
    assert trainer.args.greater_is_better
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    tokenizer = trainer.processing_class
    prompts = [row["prompt_ids"] for row in trainer.eval_dataset][:12]
    found = generate_corrected(tiny_model("llama"), tokenizer, prompts, cue="h g", max_new_tokens=12)
    said = [tokenizer.batch_decode(part, skip_special_tokens=True) for part in (found.first, found.corrected)]
    pairs = [tuple(every_third(text, "c d") for text in pair) for pair in zip(*said, strict=True)]
    want = Corrections.of(pairs).of_all
    assert len(set(pairs)) > 2
    for entry in entries:
        assert {name: entry[f"eval_{name}"] for name in want} == want
    assert want["corrected_right"] == pytest.approx(
        want["first_right"] + want["wrong_to_right"] - want["right_to_wrong"]
    )
    assert trainer.evaluate({"one": data}).keys() >= {f"eval_one_{name}" for name in want}
    assert trainer.generator.temperature == 1.0


def test_rows_that_can_not_be_judged_are_passed_over(tmp_path, caplog):
    """`selfgen eval` refuses references that were cut; here the next rows take the place of such ones."""
    trainer = make(tmp_path, lambda answer, reference: reference == "c d")
    whole = {"prompt_ids": [9, 10], "answer_ids": ids_of("c d")}
    rows = [whole | {"answer_ids": ids_of("c d e f")[:3]}, whole, whole | {"prompt_ids": [9] * 250}, whole, whole]
    found = trainer.measure_corrections(Dataset.from_list(rows), 2)
    assert (found["first_right"], found["corrected_right"]) == (1.0, 1.0)
    assert trainer.measure_corrections(Dataset.from_list(rows), 3)["first_right"] == 1.0
    assert trainer.measure_corrections(Dataset.from_list(rows[:1]), 3)["first_right"] == 0.0
    assert "no row has room" in caplog.text


def test_metrics_that_no_evaluation_has_are_refused(tmp_path):
    data, options = Dataset.from_list(OWN_ANSWERS), {"eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match="which no evaluation has; accepted: eval_loss, or"):
        make(tmp_path, eval_dataset=data, metric_for_best_model="corrected_right", **options)
    with pytest.raises(ValueError, match="accepted: eval_loss, eval_first_right, eval_corrected_right"):
        make(tmp_path, eval_dataset=data, metric_for_best_model="right", eval_corrections=4, **options)
    stream = IterableDataset.from_generator(lambda: iter(OWN_ANSWERS))
    with pytest.raises(ValueError, match="give evaluation data that is no stream"):
        make(tmp_path, eval_dataset=stream, eval_corrections=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"right_answers": "drop"}, "accepted: reference, keep"),
        ({"right_answer_share": 1.5}, r"right_answer_share is 1.5; it must be a share in \[0, 1\]"),
        ({"right_answers": "keep", "right_answer_share": 0.0}, "leaves all right answers out"),
        ({"eval_corrections": -1}, "eval_corrections is -1; it must be at least 0"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **change)


@pytest.mark.parametrize("said", [0.3, "no", None, float("nan")])
def test_a_judge_that_says_neither_yes_nor_no(tmp_path, said):
    """A score above 0, or a text, would else be a yes."""
    with pytest.raises(ValueError, match=rf"judge says {said!r} of the answer 'c c c', whose reference is 'g f'"):
        make(tmp_path, judge=lambda answer, _: said if answer == "c c c" else np.bool_(True)).train()
    data = Dataset.from_list([{"prompt": "a b", "completion": "c d"}])
    trainer = make(tmp_path, judge=lambda *_: said, eval_corrections=2, eval_dataset=data)
    with pytest.raises(ValueError, match="it must say True or False"):
        trainer.evaluate()


def test_what_weighs_rows_is_named(tmp_path):
    for change in ({"right_answers": "keep"}, {"direct_weight": 0.5}, {"right_answer_share": 0.5}):
        options = {"direct_weight": 1.0, "use_liger_kernel": True, **change}
        with pytest.raises(ValueError, match=f"takes the place of the loss that {next(iter(change))} would change"):
            make(tmp_path, **options)


def _in_two(rank, folder, want):
    data = Dataset.from_list([{"prompt": f"{a} {b}", "completion": "c d"} for a in "abc" for b in "efg"])
    options = {"right_answer_share": 0.5, "right_answers": "keep", "direct_weight": 1.0, "learning_rate": 1e-2}
    trainer = make(
        folder, says_so, eval_dataset=data, per_device_train_batch_size=1, gradient_accumulation_steps=2, **options
    )
    found = learned_of(losses_of(trainer))
    told: list = [None, None]
    dist.all_gather_object(told, (found, weights(trainer.generator.model).tolist()))
    assert told[0][1] == told[1][1]
    right = [{0, 2, 4, 6}, {1, 3, 5, 7, 9}]
    out = left_out(right[rank], {20 + rank}, 0.5, 3, together=True)
    assert out == left_out(right[0] | right[1], {20, 21}, 0.5, 3, together=False)
    both = told[0][0] | told[1][0]
    assert sorted(row & ~_DIRECT for row in both) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [both[row][1] for row in range(4)] == [1.0] * 4  # two of four are right: a half, in all processes
    trainer._judge = every_third
    with torch.no_grad():
        for held, plain in zip(trainer.generator.model.parameters(), tiny_model("llama").parameters(), strict=True):
            held.copy_(plain)
    assert trainer.measure_corrections(trainer.eval_dataset, 7) == want


@pytest.mark.slow
def test_in_two_processes(tmp_path):
    """They leave out the same, learn the same, and measure what one process measures."""
    data = Dataset.from_list([{"prompt": f"{a} {b}", "completion": "c d"} for a in "abc" for b in "efg"])
    trainer = make(tmp_path / "one", every_third, eval_dataset=data)
    in_ranks(_in_two, tmp_path, trainer.measure_corrections(trainer.eval_dataset, 7))
