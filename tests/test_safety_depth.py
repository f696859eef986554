"""Where a training forward may skip layers, or parts of them, at random, it computes its own forward."""

from __future__ import annotations

from functools import wraps
from itertools import count

import pytest
import torch
import transformers as t
from helpers.training import losses_of, make_trainer
from models import CONFIGS, VOCAB, tiny_model
from transformers import LlamaForCausalLM

from selfgen.context.hidden_states import ReuseError, decoder_layers


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("layerdrop", 0.1), ("drop_path_rate", 0.1), ("drop_prob", 0.2), ("stochastic_depth", 0.3), ("layer_drop", 1.0)],
)
def test_random_depth_is_a_reason_against_reuse(tmp_path, caplog, attribute, value):
    model = tiny_model("llama")
    setattr(model.model.layers[1], attribute, value)
    with pytest.raises(ReuseError, match=f"{attribute} of model.layers.1 is {value}: training and inference compute"):
        decoder_layers(model)
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    assert not trainer._reuse.on
    assert f"{attribute} of model.layers.1" in caplog.text
    setattr(model.model.layers[1], attribute, 0.0)
    assert decoder_layers(model)


@pytest.mark.parametrize("layerdrop", [0.0, 0.3])
def test_layerdrop_of_opt(layerdrop):
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2, "dropout": 0.0}
    config = t.OPTConfig(vocab_size=VOCAB, num_attention_heads=2, layerdrop=layerdrop, **sizes)
    model = t.OPTForCausalLM(config)
    if layerdrop:
        with pytest.raises(ReuseError, match=r"layerdrop of the configuration is 0.3"):
            decoder_layers(model)
    else:
        assert len(decoder_layers(model)) == 2


class Skips(LlamaForCausalLM):
    """A Llama whose training forward skips its last layer from the second step on; no attribute tells."""

    def __init__(self, config):
        super().__init__(config)
        self.calls = count(1)  # no number, which would be a setting

    @wraps(LlamaForCausalLM.forward)
    def forward(self, *args, **kwargs):
        if not (self.training and "labels" in kwargs):
            return super().forward(*args, **kwargs)
        if next(self.calls) <= 4:
            return super().forward(*args, **kwargs)
        layers, self.model.layers = self.model.layers, self.model.layers[:1]
        self.model.config.num_hidden_layers = 1
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.model.layers, self.model.config.num_hidden_layers = layers, 2


def test_a_layer_that_is_skipped_later_is_noticed(tmp_path, caplog):
    """The step in which it happens already has the loss and the gradients of its own forward."""
    found = []
    for reuse in (True, False):
        torch.manual_seed(0)
        model = Skips(CONFIGS["llama"]())
        options = {"context_method": "fixed_point", "reuse_passes": reuse, "learning_rate": 0.0, "max_steps": 3}
        trainer = make_trainer(tmp_path, model=model, **options)
        if not reuse:
            model.calls = count(3)  # the first look at reused passes takes two more
        losses = [loss for loss, _ in losses_of(trainer)]
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        found.append((torch.stack(losses), torch.tensor(norms)))
    assert "only 1 of 2 decoder layers took what the passes computed" in caplog.text
    for reused, own in zip(*found, strict=True):
        torch.testing.assert_close(reused, own, rtol=1e-4, atol=1e-6)
