"""What a model does to its logits, and which loss it has of its own, is found out by running it; also later on."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from helpers.training import gradients, losses_of, make_trainer, rows
from models import CONFIGS, VOCAB, tiny_model
from torch import nn
from transformers import LlamaForCausalLM, TrainerCallback

from selfgen.evaluation import held_out_losses
from selfgen.training.losses import calls_loss_function, learns_its_input, why_not_lean

SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}

AFTER_THE_HEAD = {
    "recurrent_gemma": lambda: t.RecurrentGemmaConfig(**SMALL, **HEADS, lru_width=32, attention_window_size=16),
    "xlstm": lambda: t.xLSTMConfig(
        vocab_size=VOCAB, hidden_size=32, num_blocks=1, num_heads=2, output_logit_soft_cap=30.0, pad_token_id=0
    ),
    "cohere": lambda: t.CohereConfig(**SMALL, **HEADS, logit_scale=0.0625),
    "granite": lambda: t.GraniteConfig(**SMALL, **HEADS, logits_scaling=4.0),
    "gemma2": CONFIGS["gemma2"],
}


@pytest.mark.parametrize("family", AFTER_THE_HEAD)
def test_caps_and_scales_are_found_by_what_they_do(family):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(AFTER_THE_HEAD[family]()).eval()
    assert "does more to its logits than multiply by its head" in why_not_lean(model)


class Changed(LlamaForCausalLM):
    """A Llama whose ``change`` is what it does to its logits."""

    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **inputs):
        output = super().forward(input_ids=input_ids, **inputs)
        output["logits"] = self.change(output.logits)
        if labels is not None:
            more = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            output["loss"] = self.loss_function(
                logits=output.logits, labels=labels, vocab_size=self.config.vocab_size, **more
            )
        return output

    def change(self, logits):
        return logits


def masked(logits, value):
    return torch.cat([logits[..., :-1], torch.full_like(logits[..., -1:], value)], -1)


CHANGES = {
    "a cap at 1000": lambda logits: 1000 * torch.tanh(logits / 1000),
    "a cap at 10,000": lambda logits: 1e4 * torch.tanh(logits / 1e4),
    "a clamp": lambda logits: logits.clamp(-100, 100),
    "a scale": lambda logits: logits * 0.9,
    "a shift": lambda logits: logits + 1.0,
    "padding at the smallest number": lambda logits: masked(logits, torch.finfo(logits.dtype).min),
    "padding at -inf": lambda logits: masked(logits, float("-inf")),
    "fewer ids": lambda logits: logits[..., :-1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_that_small_logits_may_hide(change, dtype):
    torch.manual_seed(0)
    model = Changed(CONFIGS["llama"]()).to(dtype).eval()
    assert why_not_lean(model) is None
    model.change = CHANGES[change]
    assert "does more to its logits" in why_not_lean(model)


def test_a_learned_scale_that_begins_at_one():
    """It would be left out of the loss, and never learn."""
    model = Changed(CONFIGS["llama"]())
    model.scale = nn.Parameter(torch.ones(()))
    model.change = lambda logits: logits * model.scale
    assert "scale has a part in them" in why_not_lean(model)
    model.scale.requires_grad_(False)
    assert why_not_lean(model) is None


def test_a_head_that_runs_twice():
    model = Changed(CONFIGS["llama"]())
    model.change = lambda logits: logits + 0 * model.lm_head(logits[..., :1].expand(*logits.shape[:2], 32))
    assert why_not_lean(model)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(broken):
    model = tiny_model("llama")
    model.lm_head.weight.data.fill_(broken)
    assert why_not_lean(model) is None


def test_a_model_that_begins_to_change_its_logits_is_noticed(tmp_path, caplog):
    """From the step on at which it is looked at again, the loss is the model's."""
    model = Changed(CONFIGS["llama"]())
    model.lm_head.weight.data.mul_(30)
    trainer = make_trainer(tmp_path, model=model, learning_rate=0.0, max_steps=5, self_prob=0.0, lean_loss=True)

    class Cap(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                model.change = lambda logits: 5 * torch.tanh(logits / 5)

    trainer.add_callback(Cap())
    found = losses_of(trainer)
    assert not trainer._answer_loss.lean
    assert "from step 5 on the loss is not lean" in caplog.text  # 4 is a power of two
    for loss, inputs in found[-2:]:
        labels, given = inputs["labels"][:, 1:], {name: inputs[name] for name in ("input_ids", "attention_mask")}
        logits = model(**given).logits[:, :-1][labels != -100]
        want = F.cross_entropy(logits, labels[labels != -100], reduction="sum")
        items = sum(int((inputs["labels"] != -100).sum()) for _, inputs in found[-2:])
        torch.testing.assert_close(loss, (want / items).detach(), rtol=1e-5, atol=0)


def test_looking_leaves_gradients_and_modes_alone():
    model = tiny_model("llama").train()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    assert why_not_lean(model) is None
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(gradients(model)["lm_head.weight"], torch.ones_like(model.lm_head.weight))
    assert "forward" not in vars(model.lm_head)


# Losses of the models' own

SIZES = {
    "vocab_size": VOCAB, "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24,
    "max_position_embeddings": 64, "dropout": 0.0, "is_decoder": True, "is_encoder_decoder": False, "pad_token_id": 0,
}  # fmt: skip
OWN_LOSSES = {
    name: (getattr(t, f"{name}Config"), getattr(t, f"{name}ForCausalLM"))
    for name in ("Bart", "Marian", "Pegasus", "MBart", "Blenderbot", "BlenderbotSmall", "PLBart")
    if hasattr(t, f"{name}ForCausalLM")
}


def own_loss_model(name: str):
    config, model = OWN_LOSSES[name]
    torch.manual_seed(0)
    return model(config(**SIZES)).eval()


@pytest.mark.parametrize("self_prob", [0.0, 0.5])
@pytest.mark.parametrize("name", OWN_LOSSES)
@pytest.mark.each_value
def test_decoders_that_take_shifted_labels_learn_the_next_token(tmp_path, caplog, name, self_prob):
    """Their own loss compares a position with its own token, which they see: they would learn to repeat it."""
    model = own_loss_model(name)
    assert learns_its_input(model)
    trainer = make_trainer(
        tmp_path, model=model, context_method="sequential", self_prob=self_prob, learning_rate=0.0, max_steps=1
    )
    assert f"the loss of {type(model).__name__} itself compares a position with its own token" in caplog.text
    found = losses_of(trainer)
    total, count = torch.zeros(()), 0
    for _, inputs in found:
        labels, given = inputs["labels"][:, 1:], {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = model.eval()(**given).logits[:, :-1][labels != -100]
        total = total + F.cross_entropy(logits, labels[labels != -100], reduction="sum")
        count += len(logits)
    torch.testing.assert_close(sum(loss for loss, _ in found), total / count, rtol=1e-5, atol=1e-6)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(total / count), rel=1e-5)
    want = held_out_losses(
        trainer.generator, rows(5), {"reference": 0.0}, method="sequential", progress=False
    )["reference"].mean  # fmt: skip
    del trainer.compute_loss  # which records
    for size in (8, 2):
        trainer.args.per_device_eval_batch_size = size
        assert trainer.evaluate(rows(5))["eval_loss"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"kl_weight": 0.5},
        {"loss_on": "after_self"},
        {"label_smoothing_factor": 0.1},
        {"target": "dft"},
        {"target": "teacher_forced"},
    ],
)
def test_options_of_the_loss_work_for_them(tmp_path, change):
    trainer = make_trainer(tmp_path, model=own_loss_model("Bart"), context_method="sequential", max_steps=2, **change)
    trainer.train()
    assert trainer.state.global_step == 2


def test_families_with_a_usual_loss():
    for family in ("llama", "gpt2", "gemma2"):
        model = tiny_model(family)
        assert calls_loss_function(model)
        assert not learns_its_input(model)


def test_a_loss_function_of_the_users_is_theirs(tmp_path, caplog):
    """It was replaced in silence where contexts were mixed."""
    model = tiny_model("llama")
    called = []

    def own(logits, labels, vocab_size=None, **kwargs):
        called.append(True)
        return logits.float().square().mean()

    model.loss_function = own
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path, model=model, max_steps=1, self_prob=0.5).train()
    assert called
    with pytest.raises(ValueError, match="the loss_function that LlamaForCausalLM was given takes the place"):
        make_trainer(tmp_path, model=model, kl_weight=0.5)
