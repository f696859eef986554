"""The loss of an evaluation is the mean over tokens, whatever the batches and the processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from helpers.processes import in_ranks
from helpers.training import Tokenizer, config, rows, weights
from models import VOCAB, tiny_model
from peft import LoraConfig, get_peft_model

from selfgen import BSSTrainer, ContextGenerator
from selfgen.evaluation import held_out_losses


def uneven(count: int = 9) -> Dataset:
    """Answers of 1 to 33 tokens."""
    tokens = torch.Generator().manual_seed(3)

    def ids(length):
        return torch.randint(3, VOCAB, (length,), generator=tokens).tolist()

    return Dataset.from_list(
        [{"sample_id": i, "prompt_ids": ids(3), "answer_ids": ids(1 + 4 * i)} for i in range(count)]
    )


def trainer_of(folder, model=None, data=None, **changes) -> BSSTrainer:
    return BSSTrainer(
        model or tiny_model("llama"),
        config(folder, **changes),
        train_dataset=rows(),
        eval_dataset=uneven() if data is None else data,
        processing_class=Tokenizer(),
    )


def mean_per_token(model, data) -> float:
    return held_out_losses(ContextGenerator(model), data, {"reference": 0.0}, progress=False)["reference"].mean


@pytest.mark.parametrize("self_prob", [0.0, 0.5])
@pytest.mark.parametrize("size", [1, 2, 4, 9])
@pytest.mark.each_value
def test_it_does_not_depend_on_the_batch_size(tmp_path, size, self_prob):
    trainer = trainer_of(tmp_path, per_device_eval_batch_size=size, self_prob=self_prob)
    want = mean_per_token(tiny_model("llama"), uneven())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)
    assert trainer.predict(uneven()).metrics["test_loss"] == pytest.approx(want, rel=1e-5)


def test_tokens_that_are_not_learned_do_not_count(tmp_path):
    data = uneven()
    learned = [[place in (0, len(answer) - 1) for place in range(len(answer))] for answer in data["answer_ids"]]
    data = data.add_column("is_learned", learned)
    found = [trainer_of(tmp_path, data=data, per_device_eval_batch_size=size).evaluate() for size in (1, 4)]
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-5)
    assert found[0]["eval_loss"] != pytest.approx(mean_per_token(tiny_model("llama"), uneven()), rel=1e-3)


def test_smoothed_and_of_an_adapter(tmp_path):
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    found = [
        trainer_of(tmp_path, model=model, per_device_eval_batch_size=size, label_smoothing_factor=0.2).evaluate()
        for size in (1, 4)
    ]
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-5)


def test_during_training_and_of_several_sets(tmp_path):
    """The step that is being trained on is not disturbed."""
    data = {"a": uneven(5), "b": uneven(2)}
    options = {"learning_rate": 0.0, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(tmp_path, data=data, per_device_eval_batch_size=2, **options)
    trainer.train()
    for name, part in data.items():
        found = [entry[f"eval_{name}_loss"] for entry in trainer.state.log_history if f"eval_{name}_loss" in entry]
        assert found == pytest.approx([mean_per_token(tiny_model("llama"), part)] * 2, rel=1e-5)


def _evaluate_in_ranks(rank, folder, size, count):
    trainer = trainer_of(folder, data=uneven(count), per_device_eval_batch_size=size)
    want = mean_per_token(tiny_model("llama"), uneven(count))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)
    trainer.train()
    sums = [torch.zeros(1, dtype=torch.float64) for _ in range(2)]
    dist.all_gather(sums, weights(trainer.generator.model).double().sum()[None])
    assert sums[0] == sums[1]  # an evaluation before training does not part the processes
    want = mean_per_token(trainer.generator.model, uneven(count))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("size", "count"),
    [(4, 9), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(1, 3), (2, 7), (8, 3), (2, 8)])],
)
def test_rows_that_fill_up_the_batches_of_other_processes_do_not_count(tmp_path, size, count):
    in_ranks(_evaluate_in_ranks, tmp_path, size, count)
