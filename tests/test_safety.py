"""Runs that can't go well are refused by name, or stop with the number of the step; what is saved before stays."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers.cli import flags, last_line, refused, run, save_model
from helpers.data import write_jsonl
from helpers.training import config, make_trainer
from models import tiny_model
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from selfgen.training.checkpoints import last_checkpoint
from selfgen.training.meter import MOST_LEFT_OUT, Meter, StepTimer
from selfgen.training.weights import DivergedError, not_finite

ROWS = [{"prompt": "a b", "completion": "c d"}, {"prompt": "e", "completion": "f g h"}] * 4


@pytest.fixture
def cli(tmp_path):
    """Options of `selfgen train` on a tiny checkpoint."""
    save_model(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    small = {"max_steps": 4, "save_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "use_cpu": True}
    quiet = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1, "max_length": 32, "token_budget": 32}
    names = {"model": tmp_path / "model", "dataset": tmp_path / "train.jsonl", "output_dir": tmp_path / "out"}
    return {**names, **small, **quiet, "balance": 4, "self_prob": 0.5}


class Break(TrainerCallback):
    """Spoils a weight once a step is done, or gradients before it."""

    def __init__(self, step: int, what: str = "weights"):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.what == "weights" and state.global_step == self.step:
            next(model.parameters()).data[3:] = float("nan")

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.what == "gradients" and state.global_step == self.step - 1:
            parameter = next(model.parameters())
            handle = parameter.register_hook(lambda gradient: handle.remove() or gradient * float("inf"))


# Weights


@pytest.mark.parametrize("self_prob", [0.0, 0.5])
def test_fp16_weights_are_refused(tmp_path, self_prob):
    with pytest.raises(ValueError, match=r"float16 \(model.embed.*--dtype float32.*mixed precision"):
        make_trainer(tmp_path, model=tiny_model("llama", dtype=torch.float16), self_prob=self_prob)


def test_fp16_weights_are_refused_on_the_command_line(cli, capsys):
    line = refused(["train", *flags(cli), "--dtype", "float16"], capsys)
    assert "float16" in line
    line = refused(["train", *flags(cli), "--dtype", "float16", "--method", "bash"], capsys)
    assert "float16" in line
    assert not list(Path(cli["output_dir"]).glob("round-0/contexts/data/*"))


def test_adapters_in_fp32_of_an_fp16_model_are_trained(tmp_path):
    """PEFT keeps them in fp32."""
    model = get_peft_model(tiny_model("llama", dtype=torch.float16), LoraConfig(r=2, target_modules=["q_proj"]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    trainer.train()
    assert not_finite(trainer.model) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = tiny_model("llama")
    model.model.norm.weight.data[3] = value
    with pytest.raises(ValueError, match=r"model\.norm\.weight has values that are not finite"):
        make_trainer(tmp_path, model=model)


def test_broken_weights_are_refused_on_the_command_line(cli, capsys):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(cli["model"])
    model.lm_head.weight.data.fill_(float("nan"))
    model.save_pretrained(cli["model"])
    assert "lm_head.weight has values that are not finite" in refused(["train", *flags(cli)], capsys)


# Runs that diverge


def test_weights_that_turn_nan_stop_the_run(tmp_path):
    """The checkpoint of the step is not written, and those before stay."""
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.add_callback(Break(2))
    with pytest.raises(DivergedError, match=r"^step 2: model\.embed_tokens\.weight has values that are not finite"):
        trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-2").exists()


@pytest.mark.parametrize("self_prob", [0.0, 0.5])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, self_prob):
    trainer = make_trainer(tmp_path, self_prob=self_prob)
    trainer.add_callback(Break(2))
    with pytest.raises(DivergedError, match=r"^step 3: the loss is nan"):
        trainer.train()


def test_weights_that_turn_nan_in_the_last_step(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(Break(4))
    with pytest.raises(DivergedError, match=r"^step 4"):
        trainer.train()


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_gradients_that_overflow_stop_the_run_before_the_weights_take_them(tmp_path, max_grad_norm):
    trainer = make_trainer(tmp_path, max_grad_norm=max_grad_norm)
    trainer.add_callback(Break(2, "gradients"))
    with pytest.raises(DivergedError, match=r"^step 2: the norm of the gradients is (nan|inf)"):
        trainer.train()
    assert not_finite(trainer.model) is None


def test_a_learning_rate_that_blows_up_ends_in_one_line(cli, capsys):
    cli |= {"learning_rate": 1e38, "max_steps": 20, "optim": "sgd", "max_grad_norm": 0}
    code, _, err = run(["train", *flags(cli)], capsys)
    assert code == 2
    assert last_line(err).startswith("selfgen train: error: step ")
    assert "Traceback" not in err


def test_steps_that_overflow_in_fp16_are_counted_and_end_some_time(tmp_path):
    class Optimizer:
        step_was_skipped = True

    class State:
        global_step = 7

    meter = Meter(scales_loss=True)
    timer, args = StepTimer(meter), config(tmp_path)
    for _ in range(MOST_LEFT_OUT - 1):
        timer.on_step_end(args, State, None, optimizer=Optimizer)
    assert meter.flush()["skipped_steps"] == MOST_LEFT_OUT - 1
    with pytest.raises(DivergedError, match=f"^step 7: this and the {MOST_LEFT_OUT - 1} steps before it overflowed"):
        timer.on_step_end(args, State, None, optimizer=Optimizer)
    assert "skipped_steps" not in Meter().flush()


def test_self_tokens_that_could_not_be_sampled_are_counted(tmp_path, caplog):
    """Logits of one id are NaN: the references stay, and the log says how many."""
    trainer = make_trainer(tmp_path, max_steps=1, self_prob=1.0)
    assert [entry["invalid"] for entry in _trained(trainer)] == [0]
    trainer = make_trainer(tmp_path, max_steps=1, self_prob=1.0, lean_loss=False)
    trainer.generator.model.lm_head.weight.data[5] = float("nan")
    with caplog.at_level(logging.WARNING), pytest.raises(DivergedError, match=r"^step 1: the loss is nan"):
        trainer.train()
    assert "self tokens kept the reference, as their logits were not finite" in caplog.text
    figures = trainer.meter.flush()
    assert figures["invalid"] > 0
    assert figures["self_share"] == 1.0


def _trained(trainer) -> list[dict]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]
