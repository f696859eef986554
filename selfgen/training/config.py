"""``BSSConfig``: the Trainer's arguments and the few that batch-scheduled sampling adds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from ..context import ContextGenerator
from ..context.generator import METHODS, Method
from ..context.masks import Masks, check_probability
from ..data import RowOptions
from .parallelism import check_parallelism
from .schedules import SCHEDULES, Schedule

LOSS_ON = ("all", "after_self")
RENAMED = {"replay": "reuse_passes"}
"""Fields that had another name before -> their name now."""


@dataclass
class MaskOptions:
    """Which positions hold self tokens; see ``context.Masks``."""

    _argument_group_name = "positions of self tokens"

    granularity: str = field(
        default="token",
        metadata={
            "help": "What self_prob is a probability of: a token, a token in a span (runs of geometric length), or a "
            "sequence (whole answers)."
        },
    )
    span_length: float = field(default=8.0, metadata={"help": "Mean tokens of a span, at least 1."})
    self_prob_curve: str = field(
        default="flat", metadata={"help": "Over an answer: flat, or rising (more self tokens later, the same in all)."}
    )
    min_reference_prob: float = field(
        default=0.0,
        metadata={
            "help": "A token is a self token only where the model gives the reference at least this probability."
        },
    )

    @property
    def masks(self) -> Masks:
        """How positions are drawn; a ValueError if an option is out of its range."""
        return Masks(self.granularity, self.span_length, self.self_prob_curve, self.min_reference_prob)  # type: ignore[arg-type]


@dataclass
class GeneratorOptions(MaskOptions):
    """How contexts are made; see ``context.ContextGenerator``."""

    _argument_group_name = "how contexts are made"

    sampling_temperature: float = field(default=1.0, metadata={"help": "Temperature of self tokens; 0 is greedy."})
    context_method: Method = field(
        default="fixed_point",
        metadata={"help": "fixed_point (fast), or sequential (token by token, for models that the fast one refuses)."},
    )
    token_budget: int | None = field(
        default=None, metadata={"help": "Most tokens computed in one context pass; measured on the device by default."}
    )
    balance: float | None = field(
        default=None,
        metadata={
            "help": "Tokens that cost as much as a context pass by itself, by which speculation is weighed; measured "
            "on the device by default."
        },
    )
    cuda_graphs: bool = field(
        default=True,
        metadata={
            "help": "On an NVIDIA GPU, replay context passes as CUDA graphs, which keep the K/V of a step's contexts "
            "and up to 2 GiB of other results from step to step."
        },
    )

    def check_generator(self) -> None:
        """Raise ValueError if an option is out of its range."""
        _ = self.masks
        if not 0.0 <= self.sampling_temperature < float("inf"):
            raise ValueError(f"sampling_temperature is {self.sampling_temperature}; it must be a finite number >= 0")
        if self.context_method not in METHODS:
            raise ValueError(f"context_method is {self.context_method!r}; accepted: {', '.join(METHODS)}")
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"token_budget is {self.token_budget}; it must be at least 1")
        if self.balance is not None and not 0.0 < self.balance < float("inf"):
            raise ValueError(f"balance is {self.balance}; it must be a finite number > 0")

    def generator(self, model: torch.nn.Module) -> ContextGenerator:
        """What makes the contexts of ``model`` as these options ask for."""
        return ContextGenerator(
            model,
            temperature=self.sampling_temperature,
            token_budget=self.token_budget,
            balance=self.balance,
            masks=self.masks,
            cuda_graphs=self.cuda_graphs,
        )


@dataclass
class BSSConfig(RowOptions, GeneratorOptions, TrainingArguments):
    """Arguments of ``BSSTrainer``: everything of ``transformers.TrainingArguments``, and the fields below.

    Raises:
        ValueError: a field out of its range, or FSDP, DeepSpeed or another parallelism than DDP is asked for.
    """

    _argument_group_name = "training (transformers.TrainingArguments)"

    def __new__(cls, *args, **kwargs):
        for old in RENAMED.keys() & kwargs.keys():
            raise TypeError(f"{cls.__name__} has no field {old!r}: it is called {RENAMED[old]!r} now")
        return super().__new__(cls)

    self_prob: float = field(
        default=0.25,
        metadata={
            "help": "Probability that a context token is a self token, sampled by the model, in [0, 1]. 0 is plain "
            "fine-tuning."
        },
    )
    self_prob_schedule: str = field(
        default="constant",
        metadata={
            "help": "From self_prob_start to self_prob over the training: constant (self_prob throughout), linear, "
            "cosine, exponential or inverse_sigmoid."
        },
    )
    self_prob_start: float = field(
        default=0.0, metadata={"help": "Self-probability at the first step of a schedule that is not constant."}
    )
    self_prob_warmup: float = field(
        default=0.0,
        metadata={"help": "Steps of plain fine-tuning before the schedule begins; below 1, a share of all steps."},
    )
    context_micro_batches: int | None = field(
        default=None,
        metadata={
            "help": "Micro-batches whose contexts are made at once, all of an optimizer step by default. Fewer take "
            "less memory and more time; the contexts are the same."
        },
    )
    reuse_passes: bool = field(
        default=True,
        metadata={
            "help": "Train on what the context passes computed in place of another forward, as gradient checkpointing "
            "would. Where a model does not allow it the log says why, and the ordinary training pass runs."
        },
    )
    loss_on: str = field(
        default="all",
        metadata={
            "help": "Answer tokens that are learned: all, or after_self (those with a self token somewhere before them "
            "in the answer; all of them where self_prob is 0)."
        },
    )
    kl_weight: float = field(
        default=0.0, metadata={"help": "Weight of KL(model || frozen model) at every learned position; 0 is none."}
    )
    kl_model: str | None = field(
        default=None, metadata={"help": "The frozen model: a folder or a hub name; by default the model as it begins."}
    )
    lean_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the loss chunk by chunk at learned positions, without logits of all of them in memory; by "
            "default where contexts are mixed or answers corrected, and the model allows it. Equal up to rounding."
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps; below 1, a share of all."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Leave as it is: the collator needs the columns that the model does not."}
    )

    def __post_init__(self):
        check_parallelism(self)
        super().__post_init__()
        for name in ("self_prob", "self_prob_start"):
            check_probability(name, getattr(self, name))
        if self.self_prob_schedule not in SCHEDULES:
            raise ValueError(f"self_prob_schedule is {self.self_prob_schedule!r}; accepted: {', '.join(SCHEDULES)}")
        if not 0.0 <= self.self_prob_warmup < float("inf"):
            raise ValueError(f"self_prob_warmup is {self.self_prob_warmup}; give steps, or a share of them below 1")
        if self.loss_on not in LOSS_ON:
            raise ValueError(f"loss_on is {self.loss_on!r}; accepted: {', '.join(LOSS_ON)}")
        if self.loss_on == "after_self" and self.context_micro_batches:
            raise ValueError("loss_on=after_self counts tokens over the whole step: leave out context_micro_batches")
        if not 0.0 <= self.kl_weight < float("inf"):
            raise ValueError(f"kl_weight is {self.kl_weight}; it must be a finite number >= 0")
        if self.kl_model and not self.kl_weight:
            raise ValueError(f"kl_model is {self.kl_model!r}, but kl_weight is 0; set kl_weight to use it")
        self.check_generator()
        for name in ("context_micro_batches",):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; a prompt and an answer need at least 2 tokens")
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns must stay False: the collator needs the columns sample_id, prompt_ids"
            )

    def self_prob_at(self, step: int, max_steps: int, schedule: Schedule | None = None) -> float:
        """Self-probability of optimizer step ``step`` (0-based) of ``max_steps``, by ``schedule`` or the named one."""
        warmup = self.self_prob_warmup
        first = round(warmup * max_steps) if warmup < 1 else int(warmup)
        if step < first:
            return 0.0
        last = max_steps - 1
        progress = min(1.0, (step - first) / (last - first)) if last > first else 1.0
        schedule = schedule or SCHEDULES[self.self_prob_schedule]
        self_prob = schedule(self.self_prob_start, self.self_prob, progress)
        check_probability(f"the self-probability that the schedule gives for step {step}", self_prob)
        return self_prob
