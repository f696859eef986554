"""A model that training changes so that it no longer computes what was found out of it: noticed, and told by step."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers.training import make_trainer
from models import tiny_model
from torch import nn
from transformers import TrainerCallback

from selfgen import ContextGenerator, UnsupportedModelError


class Mixing(nn.Module):
    """A layer's output, and ``gate`` times that of other positions; it begins at zero, as adapters do."""

    def __init__(self, of: nn.Module, *, ahead: bool):
        super().__init__()
        self.of, self.ahead, self.gate = of, ahead, nn.Parameter(torch.zeros(()))

    def forward(self, states):
        states = self.of(states)
        others = states.flip(1).cumsum(1).flip(1) if self.ahead else states.cumsum(1)
        return states + self.gate * others


def mixing(*, ahead: bool):
    model = tiny_model("llama")
    model.model.layers[0].mlp = Mixing(model.model.layers[0].mlp, ahead=ahead)
    return model


class OpenGate(TrainerCallback):
    def __init__(self, model, at: int, to: float = 0.5):
        self.gate, self.at, self.to = model.model.layers[0].mlp.gate, at, to

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            with torch.no_grad():
                self.gate.fill_(self.to)


@pytest.mark.parametrize(("self_prob", "method"), [(0.0, "fixed_point"), (0.5, "fixed_point"), (0.5, "sequential")])
def test_a_model_that_begins_to_look_ahead(self_prob, method, tmp_path):
    model = mixing(ahead=True)
    trainer = make_trainer(
        tmp_path, model=model, max_steps=12, self_prob=self_prob, context_method=method, learning_rate=0.0
    )
    trainer.add_callback(OpenGate(model, at=3))
    with pytest.raises(UnsupportedModelError, match="at step 11: LlamaForCausalLM looks ahead"):
        trainer.train()


def test_a_model_that_begins_to_compute_something_else_over_the_ragged_cache(tmp_path):
    model = mixing(ahead=False)
    trainer = make_trainer(tmp_path, model=model, max_steps=12, learning_rate=0.0)
    trainer.add_callback(OpenGate(model, at=5))
    with pytest.raises(UnsupportedModelError, match="something else over the ragged cache"):
        trainer.train()
    assert trainer.state.global_step == 10


def test_a_checkpoint_whose_model_looks_ahead(tmp_path):
    """The trainer is made with other weights than it goes on with."""
    options = {"save_strategy": "steps", "save_steps": 3, "self_prob": 0.0, "learning_rate": 0.0, "max_steps": 3}
    model = mixing(ahead=True)
    trainer = make_trainer(tmp_path, model=model, **options)
    trainer.add_callback(OpenGate(model, at=3))
    trainer.callback_handler.callbacks.reverse()  # before it is saved
    trainer.train()
    resumed = make_trainer(tmp_path, model=mixing(ahead=True), **{**options, "max_steps": 4})
    with pytest.raises(UnsupportedModelError, match="at step 4: LlamaForCausalLM looks ahead"):
        resumed.train(resume_from_checkpoint=True)


class OnlyInTraining(Mixing):
    def forward(self, states):
        states = self.of(states)
        return states + self.gate * states.mean(-1, keepdim=True) if self.training else states


def test_reuse_is_verified_again(tmp_path, caplog):
    """A layer that begins to compute something else in training than where contexts are made."""
    model = tiny_model("llama")
    model.model.layers[0].mlp = OnlyInTraining(model.model.layers[0].mlp, ahead=False)
    trainer = make_trainer(tmp_path, model=model, max_steps=12, learning_rate=0.0)
    trainer.add_callback(OpenGate(model, at=3, to=50.0))
    trainer.train()
    assert "passes are not reused" in caplog.text
    assert "the loss would be off" in caplog.text
    assert not trainer._reuse.on


class InBlocks(nn.Module):
    """A layer that mixes the positions of a block, back and ahead, in rows that are longer than two blocks."""

    def __init__(self, of: nn.Module, block: int):
        super().__init__()
        self.of, self.block = of, block

    def forward(self, states):
        states = self.of(states)
        whole = states.shape[1] // self.block * self.block
        if whole <= self.block:
            return states
        blocks = states[:, :whole].unflatten(1, (-1, self.block))
        mixed = (blocks + blocks.mean(2, keepdim=True)).flatten(1, 2)
        return torch.cat([mixed, states[:, whole:]], dim=1)


def in_blocks(block: int = 30):
    """No number of its configuration says so."""
    model = tiny_model("llama")
    model.model.layers[0].mlp = InBlocks(model.model.layers[0].mlp, block)
    return model


@pytest.mark.parametrize("method", ["fixed_point", "sequential"])
def test_looking_ahead_in_long_rows_only(method):
    generator = ContextGenerator(in_blocks(), token_budget=16, balance=2)
    prompt, reference = list(range(3, 23)), list(range(3, 23)) * 3
    few = generator.contexts([prompt], [reference[:5]], 0.5, seed=0, sample_ids=[0], method=method)
    assert few.stats.rows == 1
    with pytest.raises(UnsupportedModelError, match="looks ahead"):
        generator.contexts([prompt], [reference], 0.5, seed=0, sample_ids=[0], method=method)


@pytest.mark.parametrize("self_prob", [0.0, 0.5])
def test_training_on_long_rows_with_a_model_that_looks_ahead_there(self_prob, tmp_path):
    short = [{"sample_id": i, "prompt_ids": [3, 4], "answer_ids": [5, 6, 7]} for i in range(8)]
    make_trainer(tmp_path / "a", model=in_blocks(), data=Dataset.from_list(short), self_prob=self_prob).train()
    rows = [{**row, "answer_ids": list(range(3, 23)) * 4} for row in short]
    long = Dataset.from_list(rows)
    trainer = make_trainer(
        tmp_path / "b", model=in_blocks(), data=long, self_prob=self_prob, max_length=100, context_method="sequential"
    )
    with pytest.raises(UnsupportedModelError, match=r"at step 1: .*looks ahead"):
        trainer.train()


class CutOff(nn.Module):
    """A layer that hands on no gradient, as some quantized ones do."""

    def __init__(self, of: nn.Module):
        super().__init__()
        self.of = of

    def forward(self, states):
        return self.of(states.detach()).detach()


def test_weights_without_a_gradient_are_told(tmp_path, caplog):
    model = tiny_model("llama")
    model.model.layers[1].mlp = CutOff(model.model.layers[1].mlp)
    make_trainer(tmp_path, model=model, max_steps=2).train()
    assert caplog.text.count("got no gradient in step 1") == 1
    assert "4 of 21 trainable weights" in caplog.text
    assert "model.layers.1.mlp.of.gate_proj.weight" in caplog.text
    caplog.clear()
    make_trainer(tmp_path, model=tiny_model("llama"), max_steps=2).train()
    assert "no gradient" not in caplog.text
