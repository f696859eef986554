"""What must not go wrong in silence when transformers changes under the trainer, or a model is not like the others."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
import torch.nn.functional as F
from helpers.training import make_trainer, rows
from models import CONFIGS, tiny_model
from transformers import LlamaForCausalLM, Trainer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from selfgen import ContextGenerator
from selfgen.context.fallback import Fallback
from selfgen.data import Collator
from selfgen.training.bss import BSSTrainer


def test_a_step_whose_contexts_were_not_made_is_an_error(tmp_path):
    """A Trainer that called get_batch_samples by another name would train on references without a word."""
    trainer = make_trainer(tmp_path)
    with pytest.raises(RuntimeError, match="did not hand this step's micro-batches to get_batch_samples"):
        trainer.training_step(trainer.model, Collator(0)([rows(2)[0]]))


def test_a_trainer_that_takes_its_batches_elsewhere_is_an_error(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(BSSTrainer, "get_batch_samples", Trainer.get_batch_samples)
    with pytest.raises(RuntimeError, match="without contexts"):
        trainer.train()


def test_passes_that_no_layer_takes_are_not_reused(tmp_path, monkeypatch, caplog):
    """Equal losses prove nothing when nothing was reused: an upstream name that moved must show."""
    trainer = make_trainer(tmp_path, max_steps=1)
    # Where a layer asks for its checkpointing function: around its forward, or in older versions around its call.
    monkeypatch.setattr(LlamaDecoderLayer, "forward", inspect.unwrap(LlamaDecoderLayer.forward))
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", torch.nn.Module.__call__)
    trainer.train()
    assert not trainer._reuse.on
    assert "0 of 2 decoder layers took what the passes computed" in caplog.text


@pytest.mark.parametrize(("asked", "level"), [(True, logging.WARNING), (None, logging.INFO)])
def test_a_loss_that_is_not_lean_says_why(tmp_path, caplog, asked, level):
    with caplog.at_level(logging.INFO, "selfgen"):
        make_trainer(tmp_path, model=tiny_model("gemma2"), lean_loss=asked)
    (record,) = [record for record in caplog.records if "not lean" in record.message]
    assert record.levelno == level
    assert "Gemma2ForCausalLM does more to its logits" in record.message


class OwnLoss(LlamaForCausalLM):
    """A model that does not ask transformers' loss_function."""

    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **inputs):
        output = super().forward(input_ids=input_ids, **inputs)
        if labels is not None:
            logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            output["loss"] = F.cross_entropy(logits, targets, reduction="sum") / (num_items_in_batch or 1)
        return output


def test_a_model_with_a_loss_of_its_own_is_trained_with_it(tmp_path, caplog):
    trainer = make_trainer(tmp_path, model=OwnLoss(CONFIGS["llama"]()), max_steps=1, context_method="sequential")
    assert "the loss is not lean, but that of OwnLoss itself" in caplog.text
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("change", [{"kl_weight": 0.1}, {"loss_on": "after_self"}, {"target": "dft"}])
def test_what_would_change_a_loss_that_cannot_be_replaced_is_refused(tmp_path, change):
    (name,) = change
    with pytest.raises(ValueError, match=f"OwnLoss does not compute its loss .* so {name} can't change it"):
        make_trainer(tmp_path, model=OwnLoss(CONFIGS["llama"]()), **change)


def test_each_slower_way_of_answers_is_told(monkeypatch, caplog):
    monkeypatch.setattr(ContextGenerator, "_runs_ragged", lambda *_: False)
    monkeypatch.setattr(Fallback, "_suits", lambda self, *args: len(self._strategies) == 1)
    ContextGenerator(tiny_model("llama")).answer([[3, 4], [5]], max_new_tokens=3)
    slower = [record.message for record in caplog.records if "slower" in record.message]
    assert len(slower) == 3
    assert "LlamaForCausalLM" in slower[0]
    assert slower[-1].startswith("LlamaForCausalLM: answers are computed row by row, without a cache")


def test_another_way_to_make_contexts_is_one_method(tmp_path):
    """``make_contexts`` is the seam: what it returns is what is trained on."""

    class Reversed(BSSTrainer):
        def make_contexts(self, rows, self_prob):
            mixed = super().make_contexts(rows, self_prob)
            for tokens in mixed.tokens:
                tokens.copy_(tokens.flip(0))
            return mixed

    data = rows(2)
    batches = [[Collator(0)([data[0]])] for _ in range(2)]
    plain = make_trainer(tmp_path / "plain", data=data)
    for trainer, batch in zip((plain, make_trainer(tmp_path / "other", data=data)), batches, strict=True):
        trainer.state.max_steps = 4
        if trainer is not plain:
            trainer.__class__ = Reversed
        trainer.mix(batch)
    start = len(data[0]["prompt_ids"])
    want, got = (batch[0]["input_ids"][0, start:] for batch in batches)
    assert torch.equal(got, want.flip(0))
