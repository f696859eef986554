"""What the steps of a trainer minimise: the loss that its arguments ask for, and the models that it compares with."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..context.models import auto_class_of, load_whole
from ..provenance import weights_hash
from .losses import AnswerLoss, calls_loss_function, learns_its_input
from .tensor import is_split_at_load

logger = logging.getLogger(__name__)


def make_loss(trainer: Any) -> AnswerLoss | None:
    """The loss that the arguments of a ``BSSTrainer`` ask for; None where it is the Trainer's own."""
    args, model = trainer.args, trainer.generator.model
    lean = (args.self_prob > 0 or trainer._lean_by_default) if args.lean_loss is None else args.lean_loss
    asked = [name for name in ("kl_weight", "lean_loss") if getattr(args, name)]
    if trainer._weighs_rows:
        asked.append("direct_weight")
    name = type(model).__name__
    given = "_loss_function" in vars(model)
    outside = not (trainer.compute_loss_func is not None or given) and learns_its_input(model)
    others = {
        "compute_loss_func": trainer.compute_loss_func is not None,
        f"the loss_function that {name} was given": given,
        "use_liger_kernel": args.use_liger_kernel,
        "training on several GPUs in one process": args.n_gpu > 1,
    }
    for other, holds in others.items():
        if holds and asked:
            raise ValueError(
                f"{other} takes the place of the loss that {', '.join(asked)} would change: give one or the other"
            )
        if holds and not outside:
            return None
    if not (lean or asked or args.loss_on != "all" or outside):
        return None
    if not outside and not calls_loss_function(model):
        _keep_loss_of_model(model, [*asked, *(["loss_on"] if args.loss_on != "all" else [])])
        return None
    loss = AnswerLoss(
        model,
        label_smoothing=args.label_smoothing_factor,
        kl_weight=args.kl_weight,
        frozen=_frozen(trainer),
        lean=lean,
        outside=outside,
    )
    if outside:
        logger.warning(
            "the loss of %s itself compares a position with its own token, not with the next one: it is not used, "
            "and the cross-entropy of the next token is computed of the logits; it is not lean",
            name,
        )
        trainer.compute_loss_func = loss.of_outputs
    if loss.not_lean:
        level = logging.WARNING if args.lean_loss else logging.INFO  # asked for, or a default
        logger.log(level, "the loss is not lean, so the logits of all positions are in memory: %s", loss.not_lean)
    return loss


def _frozen(trainer: Any) -> PreTrainedModel | None:
    """The model to stay near; it is the trained one itself where that has adapters, to be switched off."""
    args, model = trainer.args, trainer.generator.model
    if not args.kl_weight:
        return None
    if args.kl_model:
        with trainer._engine.loading_whole():
            frozen = load_model(args.kl_model, model.dtype, trainer._trust_remote_code, model)
        sizes = [one.get_output_embeddings().weight.shape[0] for one in (frozen, model)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"kl_model has {sizes[0]} ids, but the model has {sizes[1]}: give one with the same tokenizer"
            )
    elif is_split_at_load(model):
        raise ValueError(
            "kl_weight keeps the model near a copy of itself, and weights that transformers has split over "
            "processes can't be copied: give the same model by name as kl_model"
        )
    elif adapters_of(trainer):
        return model
    else:
        frozen = copy.deepcopy(model)
    frozen = frozen if is_split_at_load(frozen) else frozen.to(args.device)
    return frozen.requires_grad_(False).eval()


def _keep_loss_of_model(model: PreTrainedModel, needed: list[str]) -> None:
    """The model's own loss can't be replaced: use it, or refuse the options ``needed`` that must change it."""
    name = type(model).__name__
    needed = [option for option in needed if option != "lean_loss"]
    if needed:
        raise ValueError(
            f"{name} does not compute its loss through transformers' loss_function, so {', '.join(needed)} can't "
            "change it: leave these out"
        )
    logger.warning(
        "the loss is not lean, but that of %s itself: the model does not compute it through transformers' "
        "loss_function, where it could be replaced",
        name,
    )


def adapters_of(trainer: Any) -> Any:
    """The PEFT model whose adapters can be switched off, if it is one."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model if hasattr(model, "disable_adapter") else None


def frozen_states(trainer: Any, inputs: dict[str, Tensor]) -> Tensor | None:
    """What the model to stay near computes under the contexts of a micro-batch, if there is one."""
    loss = trainer._answer_loss
    if loss is None or loss.frozen is None:
        return None
    adapters = adapters_of(trainer) if loss.frozen is trainer.generator.model else None
    with trainer._engine.autocast(), nullcontext() if adapters is None else adapters.disable_adapter():
        return loss.frozen_states(inputs, through=adapters)


def frozen_hash(loss: AnswerLoss | None) -> str | None:
    """Of the weights of another model that the trained one stays near."""
    if loss is None or loss.frozen is None or loss.frozen is loss.model:
        return None
    return weights_hash(loss.frozen)


def load_model(
    name: str, dtype: torch.dtype, trust_remote_code: bool, like: PreTrainedModel | None = None
) -> PreTrainedModel:
    """The model ``name``, split over processes as ``like`` is, if transformers has split that."""
    auto_class = auto_class_of(name, trust_remote_code=trust_remote_code)
    split: dict[str, Any] = {}
    if like is not None and is_split_at_load(like):
        split = {"distributed_config": like.config.distributed_config}
    return load_whole(auto_class, name, dtype=dtype, trust_remote_code=trust_remote_code, **split)
