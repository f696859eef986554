"""Weights that can't be trained, and runs whose weights or losses are no numbers any more."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from ..context.changes import on_host
from ..context.precision import how_quantized, is_plain
from ..context.sharding import local_part

logger = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """A run that can't go on, as a loss, a gradient or weights are not finite."""


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError if no weight of ``model`` is trainable, or those that are quantized or fp16."""
    quantized = how_quantized(model)
    learns_quantized = getattr(getattr(model, "hf_quantizer", None), "is_qat_trainable", False)
    if quantized and not hasattr(model, "peft_config") and not learns_quantized:
        raise ValueError(
            f"the model is quantized ({quantized}), and quantized weights can't be trained: train an adapter on them "
            "(peft.prepare_model_for_kbit_training, then peft.get_peft_model), or load the model without quantization"
        )
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "the model has no trainable parameter; PEFT loads adapters frozen: load them with "
            "PeftModel.from_pretrained(..., is_trainable=True), or merge them into the model"
        )
    own = [(name, one) for name, one in trainable if not hasattr(one, "ds_id")]  # else ZeRO-3 has fp32 ones, too
    half = next((name for name, parameter in own if parameter.dtype == torch.float16), None)
    if half is not None:
        raise ValueError(
            f"the weights are float16 ({half}), which can't be trained: small updates are rounded away, and AdamW's "
            "epsilon is 0 there. Load them as float32 (--dtype float32, or model.float()); --bf16 or --fp16 compute "
            "in mixed precision"
        )


def check_finite(model: nn.Module) -> None:
    """Raise ValueError if ``model`` has weights that are not finite."""
    if broken := not_finite(model):
        raise ValueError(
            f"the model can't be trained: {broken} has values that are not finite (NaN or inf), as a run that diverged "
            "or a broken file leaves them; give an earlier checkpoint"
        )


@torch.no_grad()
def not_finite(model: nn.Module, *, trainable_only: bool = False) -> str | None:
    """The first of the weights that has a NaN or an infinity, in what this process has of it."""
    names, found = [], []
    for name, parameter in model.named_parameters():
        here = local_part(parameter)
        if is_plain(here) and here.numel() and (parameter.requires_grad or not trainable_only):
            names.append(name)
            found.append(torch.stack(torch.aminmax(here)).isfinite().all())  # NaN is both
    return next((name for name, fine in zip(names, on_host(found), strict=True) if not fine), None)


class TellOfMissingGradients(TrainerCallback):
    """Says once which trainable weights got no gradient: some layers cut it off in silence, others do not run.

    With ``in_backward`` gradients are watched as they come, as DeepSpeed takes them away.
    """

    def __init__(self, in_backward: bool = False) -> None:
        self.looked, self.in_backward = False, in_backward
        self.unused: set[int] = set()  # the ids of weights whose gradient is a zero that stands for none
        self._came: set[int] = set()  # the ids of weights that got one
        self._hooks: list[RemovableHandle] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.in_backward and not self.looked and not self._hooks:
            weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self._hooks = [weight.register_post_accumulate_grad_hook(self._note) for weight in weights]

    def _note(self, weight: nn.Parameter) -> None:
        if id(weight) not in self.unused:
            self._came.add(id(weight))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.looked:
            return
        self.looked = True
        for hook in self._hooks:
            hook.remove()
        trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        without = [name for name, parameter in trainable if not self._has_gradient(parameter)]
        if without:
            shown = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
            logger.warning(
                "%d of %d trainable weights got no gradient in step %d, and are not trained: %s. A forward over rows "
                "of text does not use them, or a layer after them cuts gradients off, as some quantized ones do",
                len(without),
                len(trainable),
                state.global_step + 1,
                shown,
            )

    def _has_gradient(self, parameter: nn.Parameter) -> bool:
        """Or needs none."""
        if self.in_backward:
            return id(parameter) in self._came or not getattr(parameter, "ds_numel", parameter.numel())
        return parameter.grad is not None or not parameter.numel()


class StopAtBrokenGradients(TrainerCallback):
    """Stops a run before its weights take up gradients that are not finite.

    With ``norm`` that tells of a step already taken: the run stops before anything is saved.
    """

    def __init__(self, norm: Callable[[], float | None] | None = None) -> None:
        self._norm = norm

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self._norm is not None:
            norm = self._norm()
        else:
            gradients = [local_part(one.grad) for one in model.parameters() if one.grad is not None]  # no communication
            norm = float(nn.utils.get_total_norm(gradients))
        if norm is not None and not math.isfinite(norm):
            raise diverged(state.global_step + 1, f"the norm of the gradients is {norm}")


def diverged(step: int, what: str) -> DivergedError:
    """The error that ends a run at optimizer step ``step``, counted from 1."""
    return DivergedError(
        f"step {step}: {what}, so training stopped. Checkpoints before it are as they were. Lower the learning rate, "
        "or raise the precision (float32 weights; --bf16 in place of --fp16)"
    )
