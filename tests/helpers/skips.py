"""A model that skips a layer in training, which nothing about it tells before it does."""

from __future__ import annotations

from models import tiny_model
from torch import nn
from transformers import PreTrainedModel, TrainerCallback


class _Layers(nn.ModuleList):
    def __init__(self, layers):
        super().__init__(layers)
        self.skipping = []  # in a list, no setting of the module

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return found[1:] if isinstance(index, slice) and self.training and self.skipping else found


def skips_later() -> PreTrainedModel:
    model = tiny_model("llama")
    model.model.layers = _Layers([*model.model.layers])
    return model


class Skips(TrainerCallback):
    """From the second step on."""

    def __init__(self, trainer):
        self.layers = trainer.generator.model.model.layers

    def on_step_end(self, *args, **kwargs):
        self.layers.skipping.append(True)
