"""What the steps of a trainer minimise: the loss that its arguments ask for, and the models that it compares with."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from ..context.models import auto_class_of, load_whole, max_positions, text_positions, transformers_model
from ..context.sharding import sharding_of
from ..correction import CorrectionCue
from ..data import pad_token_id
from ..provenance import weights_hash
from .divergences import Divergence
from .losses import AnswerLoss, Compared, calls_loss_function, learned_weight, learns_its_input
from .targets import Privileged, TargetOptions, after_difference, moved_back, under_references
from .tensor import is_split_at_load

logger = logging.getLogger(__name__)


def make_loss(trainer: Any) -> AnswerLoss | None:
    """The loss that the arguments of a ``BSSTrainer`` ask for; None where it is the Trainer's own."""
    args, model, target = trainer.args, trainer.generator.model, trainer.args.learned_target
    lean = args.lean_loss
    if lean is None:
        lean = args.self_prob != 0 or trainer._lean_by_default
    asked = [*changes_of_loss(trainer), *(["lean_loss"] if args.lean_loss else [])]
    own = not (lean or {*asked} - {"target"} or args.loss_on != "all")  # without a target
    if args.lean_loss is None and target not in ("reference", "teacher_forced"):
        lean = True  # also where nothing is mixed
    name = type(model).__name__
    given = "_loss_function" in vars(model)
    why_outside = None if trainer.compute_loss_func is not None or given else _why_not_the_models(trainer, model)
    outside = why_outside is not None
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
    frozen, ids_of_frozen = _frozen(trainer)
    teacher, ids_of_teacher = _teacher(trainer, frozen, ids_of_frozen)
    loss = AnswerLoss(
        model,
        label_smoothing=args.label_smoothing_factor,
        kl_weight=args.kl_weight,
        frozen=frozen,
        near=Divergence("reverse_kl", ids=ids_of_frozen),
        target=target if target in ("reference", "dft") else "divergence",
        target_weight=args.weight_of_target,
        teacher=teacher,
        divergence=args.divergence_over(ids_of_teacher),
        lean=lean,
        outside=outside,
        for_target_alone=own and not outside,
    )
    if outside:
        logger.warning(
            "%s: it is not used, and the cross-entropy of the next token is computed of the logits; it is not lean",
            why_outside,
        )
        trainer.compute_loss_func = loss.of_outputs
    if loss.not_lean:
        level = logging.WARNING if args.lean_loss else logging.INFO  # asked for, or a default
        logger.log(level, "the loss is not lean, so the logits of all positions are in memory: %s", loss.not_lean)
    return loss


def changes_of_loss(trainer: Any) -> list[str]:
    """The options by which a loss is another one than that of the Trainer."""
    args = trainer.args
    holds = {
        "kl_weight": args.kl_weight,
        trainer._weighing: trainer._weighs_rows,
        "target": args.learned_target != "reference",
    }
    return [name for name, value in holds.items() if value]


def is_cross_entropy(trainer: Any) -> bool:
    """Whether the loss that `make_loss` has left is the cross-entropy to the reference alone where nothing is mixed.

    A loss that only the model or the user knows may be anything, so it counts as none.
    """
    args, model = trainer.args, trainer.generator.model
    changes = {*changes_of_loss(trainer)}
    if args.target == "teacher_forced":  # of contexts that have self tokens
        changes.discard("target")
    more = (
        changes
        or args.label_smoothing_factor
        or "_loss_function" in vars(model)
        or getattr(model.config.get_text_config(decoder=True), "output_router_logits", False)
    )
    if more or not args.follows_steps:
        return False
    ours = trainer._answer_loss is not None or args.use_liger_kernel or args.n_gpu > 1
    return ours or calls_loss_function(model)


def _why_not_the_models(trainer: Any, model: PreTrainedModel) -> str | None:
    """Why the loss has to be computed of the logits, outside of the model; None if the model may compute it."""
    name = type(model).__name__
    if learns_its_input(model):
        return f"the loss of {name} itself compares a position with its own token, not with the next one"
    if trainer._weighs_rows and not trainer.model_accepts_loss_kwargs:
        return f"the loss of {name} takes no num_items_in_batch, which {trainer._weighing} needs"
    return None


def _frozen(trainer: Any) -> tuple[PreTrainedModel | None, int | None]:
    """The model to stay near, and its ids that are shared; it is the trained one itself if that has adapters."""
    args, model = trainer.args, trainer.generator.model
    if not args.kl_weight:
        return None, None
    if args.kl_model:
        return _load_frozen(trainer, "kl_model")
    if is_split_at_load(model):
        raise ValueError(
            "kl_weight keeps the model near a copy of itself, and weights that transformers has split over "
            "processes can't be copied: give the same model by name as kl_model"
        )
    if adapters := adapters_of(trainer):
        _check_stays(adapters, "kl_weight keeps the model near itself", "kl_model")
        return model, None
    return copy.deepcopy(model).to(args.device).requires_grad_(False).eval(), None


def check_target(trainer: Any) -> Privileged | None:
    """Raise ValueError if the target of a ``BSSTrainer`` can't be had; returns what makes privileged rows."""
    args, given = trainer.args, trainer._teacher
    if given is not None and (args.target != "teacher" or args.teacher_model):
        other = f"target is {args.target}" if args.target != "teacher" else f"teacher_model is {args.teacher_model!r}"
        raise ValueError(f"teacher is given, but {other}: give target=teacher and one of teacher and teacher_model")
    if given is None:
        check_has_teacher(args, trainer.accelerator.unwrap_model(trainer.model))
    if given is not None and transformers_model(given) is trainer.generator.model:
        raise ValueError("teacher is the model that is trained, and would change with it: give another one, or a copy")
    if given is not None and (shared := _shared_weight(trainer.model, given)):
        raise ValueError(
            f"teacher shares the weight {shared} with the model that is trained, and would change with it, or freeze "
            "it: give a copy"
        )
    if given is not None and sharding_of(given) is not None:
        raise ValueError("teacher is sharded: give its name as teacher_model, and each process loads it")
    if args.target != "privileged":
        return None
    tokenizer = trainer.processing_class
    stop_ids = trainer.generator.eos_token_ids
    try:
        cue = CorrectionCue.of(tokenizer, args.privileged_cue, stop_ids=stop_ids, options=args)
    except ValueError as error:
        raise ValueError(f"target=privileged asks for the answer again by privileged_cue: {error}") from error
    return Privileged(cue, pad_token_id(tokenizer), args.max_length)


def _shared_weight(model: torch.nn.Module, other: torch.nn.Module) -> str | None:
    """The name of a parameter of ``model`` that ``other`` has, too."""
    of_other = {id(parameter) for parameter in other.parameters()}
    return next((name for name, parameter in model.named_parameters() if id(parameter) in of_other), None)


def check_has_teacher(args: TargetOptions, model: torch.nn.Module) -> None:
    """Raise ValueError if ``model`` has to learn from a teacher, and there is none."""
    if args.target == "teacher" and not args.teacher_model and not has_adapters(model):
        raise ValueError(
            "target is teacher, but there is none: the model has no adapter, without which it could teach itself. Give "
            "teacher_model (--teacher-model), or a model with an adapter"
        )


def _teacher(
    trainer: Any, frozen: PreTrainedModel | None, ids_of_frozen: int | None
) -> tuple[PreTrainedModel | None, int | None]:
    """The model of ``target=teacher`` and its ids that are shared; it is the trained one itself if it has adapters."""
    args, model = trainer.args, trainer.generator.model
    if args.learned_target != "teacher":
        return None, None
    if trainer._teacher is not None:
        teacher, ids = _given_teacher(trainer)
    elif not args.teacher_model:
        _check_stays(adapters_of(trainer), "target=teacher learns from the model", "teacher_model")
        return model, None
    elif args.teacher_model == args.kl_model:
        return frozen, ids_of_frozen
    else:
        teacher, ids = _load_frozen(trainer, "teacher_model")
    limit = max_positions(teacher)
    if limit is not None and args.max_length is not None and limit < args.max_length:
        raise ValueError(
            f"the teacher has {limit} positions, but rows have up to max_length={args.max_length} tokens: lower "
            "max_length, or give another teacher"
        )
    return teacher, ids


def _given_teacher(trainer: Any) -> tuple[PreTrainedModel, int | None]:
    teacher = transformers_model(trainer._teacher)
    ids = _shared_ids(trainer, teacher, teacher.name_or_path, "teacher", local_files_only=True)
    device = trainer.args.device
    teacher = teacher if teacher.device == device else teacher.to(device)
    return teacher.requires_grad_(False).eval(), ids


def _load_frozen(trainer: Any, option: str) -> tuple[PreTrainedModel, int | None]:
    """The model that an option names, on the device, and how many ids it shares with the trained one."""
    name, model, trust = getattr(trainer.args, option), trainer.generator.model, trainer._trust_remote_code
    try:
        with trainer._engine.loading_whole():
            frozen = load_model(name, model.dtype, trust, model)
    except OSError as error:
        raise ValueError(f"{option} is {name!r}, which can't be loaded: {error}") from error
    ids = _shared_ids(trainer, frozen, name, option, trust_remote_code=trust)
    frozen = frozen if is_split_at_load(frozen) else frozen.to(trainer.args.device)
    return frozen.requires_grad_(False).eval(), ids


def _shared_ids(trainer: Any, other: PreTrainedModel, name: str, option: str, **hub: Any) -> int | None:
    """How many ids ``other``, whose tokenizer is found by ``name``, shares with the trained model.

    None if their heads are of one size. Else the larger one is padded, which only their tokenizers can show.

    Raises:
        ValueError: their ids are not the same.
    """
    vocabulary, others = _vocabulary(trainer.processing_class), _vocabulary(_tokenizer_of(name, **hub))
    sizes = [one.get_output_embeddings().weight.shape[0] for one in (other, trainer.generator.model)]
    if vocabulary and others and vocabulary != others:
        token = min(token for token, _ in vocabulary.items() ^ others.items())
        raise ValueError(
            f"{option} has another tokenizer: the token {token!r} has the id {others.get(token)}, but "
            f"{vocabulary.get(token)} in the model's (None is no such token): give one with the same tokenizer"
        )
    if sizes[0] == sizes[1]:
        return None
    ids = max(vocabulary.values()) + 1 if vocabulary and others else None
    if ids is None or ids > min(sizes):
        raise ValueError(f"{option} has {sizes[0]} ids, but the model has {sizes[1]}: give one with the same tokenizer")
    return ids


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    return tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}


def _tokenizer_of(name: str, **hub: Any) -> Any:
    """The tokenizer of the model ``name``; None if it has none, which from_pretrained may make up."""
    folder = Path(name)
    if not name or (folder.is_dir() and not any(any(folder.glob(one)) for one in _OF_TOKENIZERS)):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError, ImportError, KeyError) as error:
        logger.debug("no tokenizer of %s can be loaded: %s", name, error)
        return None


_OF_TOKENIZERS = ("tokenizer*", "*.model", "vocab*", "merges.txt")


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
    return model if has_adapters(model) else None


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether they can be switched off."""
    return hasattr(model, "disable_adapter")


@contextmanager
def _without(adapters: Any) -> Iterator[None]:
    """Inside, the adapters of a PEFT model are off. What of them is trained does not change.

    PEFT has none of them trained, and afterwards all of the active ones, also what the user has frozen. It would tell
    the parameters that are there, and FSDP2 has others while weights are gathered, which would go on untrained.
    """
    off = adapters.disable_adapter()
    with _trained_as_before(adapters):
        off.__enter__()
    try:
        yield
    finally:
        with _trained_as_before(adapters):
            off.__exit__(None, None, None)


@contextmanager
def _trained_as_before(model: torch.nn.Module) -> Iterator[None]:
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, before in trained:
            parameter.requires_grad_(before)


_TAKE_FROM_WEIGHTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""How ``init_lora_weights`` begins where the weights that an adapter is added to are others without it from then on."""


def _check_stays(adapters: Any, does: str, option: str) -> None:
    """Raise ValueError if a PEFT model whose adapters are off is no model to compare with, or training changes it."""
    for config in getattr(adapters, "peft_config", {}).values():
        begun = str(getattr(config, "init_lora_weights", "")).lower()
        if begun.startswith(_TAKE_FROM_WEIGHTS):
            raise ValueError(
                f"{does} without its adapter, but init_lora_weights is {begun!r}, which has taken a part of its "
                f"weights into the adapter, so that the model without it is not the one before: give {option}"
            )
    with _trained_as_before(adapters), adapters.disable_adapter():  # of which PEFT trains nothing then
        trained = learned_weight(transformers_model(adapters))
    if trained:
        raise ValueError(
            f"{does} without its adapter, but {trained}, which is no part of the adapter, is trained, too, so that "
            f"this would not stay as it is: freeze that (the adapter's option bias may train it), or give {option}"
        )


def compared(trainer: Any, batch: dict[str, Tensor]) -> Compared | None:
    """What the loss of a micro-batch takes besides the states of its forward; None where it is the Trainer's own.

    So it is where the target differs nowhere from the reference, and nothing else is asked for.
    """
    loss, target = trainer._answer_loss, trainer.args.learned_target
    frozen = states = has_target = None
    if loss.frozen is not None:
        frozen = _states_without_adapters(trainer, loss.frozen, batch)
    if target == "teacher":
        shared = loss.teacher is loss.frozen
        states = frozen if shared else _states_without_adapters(trainer, loss.teacher, batch)
    elif target == "teacher_forced":
        states, has_target = _under_references(trainer, batch)
        if states is None and loss.for_target_alone:
            return None
    elif target == "privileged":
        states, has_target = _privileged(trainer, batch)
    return Compared(batch.get("loss_weight"), frozen, states, has_target)


def _under_references(trainer: Any, batch: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """States under the reference, and where they are others than under the context; None if they nowhere are."""
    differs = after_difference(batch)
    if not trainer._engine.together.any(bool(differs.any())):  # a forward may be one of all processes
        return None, None
    return _own_states(trainer, under_references(batch)), differs


def _privileged(trainer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """States under the context after a prompt that has the reference, and whether the row is short enough."""
    inputs, moved, fits = trainer._privileged.rows(batch)
    trainer.meter.counts["privileged"] += len(fits)
    trainer.meter.counts["privileged_too_long"] += int((~fits).sum())
    length = batch["input_ids"].shape[1]
    states = moved_back(_own_states(trainer, inputs), moved, length)
    return states, fits.to(states.device)[:, None].expand(-1, length)


def _own_states(trainer: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Of the trained model as it is now, adapters included."""
    model = trainer.generator.model
    with trainer._engine.autocast(), text_positions(model):
        return trainer._answer_loss.states_of(model, inputs, through=adapters_of(trainer))


def _states_without_adapters(trainer: Any, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Those of a frozen model, which is the trained one without adapters or another one."""
    adapters = adapters_of(trainer) if model is trainer.generator.model else None
    with trainer._engine.autocast(), nullcontext() if adapters is None else _without(adapters):
        return trainer._answer_loss.states_of(model, batch, through=adapters)


def hashes_of(loss: AnswerLoss | None) -> dict[str, str | None]:
    """Of the weights of other models that the trained one stays near, or learns from."""
    found: dict[int, str | None] = {}
    models = {} if loss is None else {"frozen": loss.frozen, "teacher": loss.teacher}
    for one in models.values():
        if one is not None and loss is not None and one is not loss.model and id(one) not in found:
            found[id(one)] = weights_hash(one)
    return {name: found.get(id(models.get(name))) for name in ("frozen", "teacher")}


def load_model(
    name: str, dtype: torch.dtype, trust_remote_code: bool, like: PreTrainedModel | None = None
) -> PreTrainedModel:
    """The model ``name``, split over processes as ``like`` is, if transformers has split that."""
    auto_class = auto_class_of(name, trust_remote_code=trust_remote_code)
    split: dict[str, Any] = {}
    if like is not None and is_split_at_load(like):
        split = {"distributed_config": like.config.distributed_config}
    return load_whole(auto_class, name, dtype=dtype, trust_remote_code=trust_remote_code, **split)
