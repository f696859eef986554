"""Training of models whose weights transformers has split over processes: their gradients and their checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, TrainingArguments

from ..context.sharding import sharding_of, together_of

logger = logging.getLogger(__name__)

_PARTIAL = "replicated_with_grad_allreduce"
"""The style of weights of which each process has all, though its gradient is that of its own heads, such as q_norm."""


def has_partial_gradients(model: nn.Module) -> bool:
    """Whether transformers sums gradients of ``model`` over the processes that split its weights, in hooks."""
    return not together_of(model).is_alone and _PARTIAL in (getattr(model, "tp_plan", None) or {}).values()


@contextmanager
def partial_gradients_apart(model: nn.Module) -> Iterator[None]:
    """Inside, the gradients of one micro-batch are summed over processes without those of the ones before.

    transformers' hook sums what a weight has accumulated. From the second micro-batch of a step on, it would count the
    first ones once per process again. (Under FSDP2 each micro-batch is reduced by itself.)
    """
    if not has_partial_gradients(model) or sharding_of(model) is not None:
        yield
        return
    plan = [name for name, style in model.tp_plan.items() if style == _PARTIAL]  # type: ignore[union-attr,operator]
    weights = [
        weight
        for name, weight in model.named_parameters()
        if any(fnmatchcase(name.rpartition(".")[0], pattern) for pattern in plan)
    ]
    before = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    try:
        yield
    finally:
        for weight, gradient in zip(weights, before, strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else gradient + weight.grad


def is_split_at_load(model: nn.Module) -> bool:
    """Whether transformers has split or sharded ``model`` as it loaded it, so that its weights are DTensors."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


@contextmanager
def allowed_to_resume(args: TrainingArguments, model: nn.Module) -> Iterator[None]:
    """Around the Trainer's constructor, which refuses to save states of optimizers that it could not load."""
    asked = args.save_only_model
    try:
        args.save_only_model = asked or is_split_at_load(model)
        yield
    finally:
        args.save_only_model = asked


@contextmanager
def whole_optimizer(optimizer: torch.optim.Optimizer, *, keep: bool) -> Iterator[None]:
    """Inside, the state of ``optimizer`` that is saved is that of whole weights, and it takes such a state.

    The Trainer saves what the first process has, and gives that to all. All processes must enter, as weights' states
    are gathered here; those without ``keep`` have none inside.
    """
    own: Callable[..., None] = optimizer.load_state_dict
    saved = _gathered(optimizer.state_dict(), keep)

    def load(state: dict[str, Any]) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        by_number = dict(enumerate(weights))
        parts = {number: _parts_of(values, by_number[number]) for number, values in state["state"].items()}
        own({**state, "state": parts})

    replaced: dict[str, Any] = {"state_dict": lambda: saved, "load_state_dict": load}
    vars(optimizer).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            vars(optimizer).pop(name, None)


def _gathered(state: Any, keep: bool) -> Any:
    """``state`` with whole tensors in place of DTensors, one after the other; they are on the CPU, or nowhere."""
    if isinstance(state, dict):
        return {name: _gathered(value, keep) for name, value in state.items()}
    if isinstance(state, list):
        return [_gathered(value, keep) for value in state]
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    return state


def _parts_of(values: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    """The part of each tensor that this process has of ``weight``."""
    if not isinstance(weight, DTensor):
        return values

    def part(value: Tensor) -> DTensor:
        there = value.to(weight.device_mesh.device_type)
        return distribute_tensor(there, weight.device_mesh, weight.placements, src_data_rank=None)

    return {
        name: part(value) if isinstance(value, Tensor) and value.shape == weight.shape else value
        for name, value in values.items()
    }


def load_split(checkpoint: str | Path, model: PreTrainedModel) -> None:
    """Load the weights of ``checkpoint``, whole files, into ``model``, whose weights are DTensors.

    transformers reads them as it reads any model, each process its part; its Trainer knows no way.
    """
    split = model.config.distributed_config
    loaded = type(model).from_pretrained(str(checkpoint), distributed_config=split, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())
