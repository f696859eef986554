"""A model that training changes so that it no longer computes what was found out of it: noticed, and told by step."""

from __future__ import annotations

import pytest
import torch
from helpers.training import make_trainer
from models import tiny_model
from torch import nn
from transformers import TrainerCallback

from selfgen import UnsupportedModelError


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
        tmp_path, model=model, max_steps=9, self_prob=self_prob, context_method=method, learning_rate=0.0
    )
    trainer.add_callback(OpenGate(model, at=3))
    with pytest.raises(UnsupportedModelError, match="at step 5: LlamaForCausalLM looks ahead"):
        trainer.train()


def test_a_model_that_begins_to_compute_something_else_over_the_ragged_cache(tmp_path):
    model = mixing(ahead=False)
    trainer = make_trainer(tmp_path, model=model, max_steps=9, learning_rate=0.0)
    trainer.add_callback(OpenGate(model, at=5))
    with pytest.raises(UnsupportedModelError, match="something else over the ragged cache"):
        trainer.train()
    assert trainer.state.global_step == 8


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
    trainer = make_trainer(tmp_path, model=model, max_steps=9, learning_rate=0.0)
    trainer.add_callback(OpenGate(model, at=3, to=50.0))
    trainer.train()
    assert "passes are not reused" in caplog.text
    assert "the loss would be off" in caplog.text
    assert not trainer._reuses
