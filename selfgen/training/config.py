"""``BSSConfig``: the Trainer's arguments, and those that batch-scheduled sampling adds."""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, integrations

from ..context import ContextGenerator
from ..context.generator import METHODS, PRECISIONS, Method, Precision
from ..context.masks import Masks, check_probability
from ..context.models import transformers_model, unpadded_vocab_size
from ..data import RowOptions
from ..files import expand_home
from .parallelism import check_deepspeed, check_fsdp_version, check_parallelism
from .schedules import SCHEDULES, Schedule
from .targets import TargetOptions
from .weight_memory import WEIGHTS

LOSS_ON = ("all", "after_self", "after_switch")
AUTO = "auto"
"""The ``self_prob`` that follows a budget of differing tokens."""
SETTLED = "settled"
"""The ``self_prob_warmup`` that ends when the loss has settled."""
CONSTANT, DISAGREEMENT = "constant", "disagreement"
"""The ``self_prob_schedule`` of a number, and the one that follows how many self tokens differ."""
WORDS = {"self_prob": AUTO, "self_prob_warmup": SETTLED}
"""Fields that take a number -> the word that they take, too."""
FOLLOWING = {**WORDS, "self_prob_schedule": DISAGREEMENT}
"""Fields -> the word by which the self-probability follows what training steps measure."""
RECIPE: dict[str, float | str] = {
    "self_prob": 0.5,
    "self_prob_schedule": DISAGREEMENT,
    "self_prob_warmup": SETTLED,
    "sampling_temperature": 0.7,
}
"""What is used where neither ``self_prob`` nor another schedule is given; docs/results.md says why."""
PLAIN: dict[str, float | str] = {"self_prob_schedule": CONSTANT, "sampling_temperature": 1.0}
"""What is used of these where ``self_prob`` is given: the paper's."""
GENTLE = 0.1
"""The self-probability where none is given and the recipe can't be used: of other schedules, and of contexts that are
made beforehand."""
_INFINITE = float("inf")
_BETWEEN: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, _INFINITE),
    "per_device_eval_batch_size": (1, _INFINITE),
    "gradient_accumulation_steps": (1, _INFINITE),
    "eval_accumulation_steps": (1, _INFINITE),
    "dataloader_num_workers": (0, _INFINITE),
    "context_micro_batches": (1, _INFINITE),
    "max_length": (2, _INFINITE),
    "learning_rate": (0, _INFINITE),
    "weight_decay": (0, _INFINITE),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, _INFINITE),
    "max_grad_norm": (0, _INFINITE),
    "warmup_steps": (0, _INFINITE),
    "label_smoothing_factor": (0, 1),
    "seed": (0, 2**32 - 1),  # NumPy's range
}
"""The least and the most value of numbers that torch or transformers check late, or not at all; None is no number."""
_PACKAGES = {"azure_ml": ("azureml", "azureml-core"), "comet_ml": ("comet", "comet_ml"), "flyte": ("flytekit",) * 2}
"""Names in ``report_to`` -> what transformers asks for, and what pip installs, where these are not the name itself."""
RENAMED = {"replay": "reuse_passes"}
"""Former names of fields -> their names now."""


@dataclass
class MaskOptions:
    """Which positions hold self tokens; see ``context.Masks``."""

    _argument_group_name = "positions of self tokens"

    granularity: str = field(
        default="token",
        metadata={
            "help": "What self_prob is a probability of: token (each token is drawn by itself), span (runs of self "
            "tokens, of geometric length), prefix (self tokens up to a switch place, the reference after it), or "
            "sequence (the whole answer of a row)."
        },
    )
    span_length: float = field(
        default=8.0,
        metadata={
            "help": "For granularity=span: mean number of tokens per span, at least 1. 1 gives single tokens, a large "
            "value few long runs; the share of self tokens stays self_prob."
        },
    )
    self_prob_curve: str | None = field(
        default=None,
        metadata={
            "help": "Probability along an answer, whose mean is self_prob: flat (the same everywhere), rising (few "
            "self tokens at the beginning, more at the end), or falling (the other way round). By default it is "
            "falling with granularity=prefix, which takes no other, and flat else; granularity=sequence takes flat "
            "only."
        },
    )
    min_reference_prob: float = field(
        default=0.0,
        metadata={
            "help": "Keep the reference token where the model gives it less than this probability, in [0, 1]. 0 is no "
            "such condition; near 1 there are hardly any self tokens. Not with granularity=prefix."
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

    sampling_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature of self tokens: 0 is greedy, 1 is the model's own distribution, and more adds noise."
        },
    )
    context_method: Method = field(
        default="fixed_point",
        metadata={
            "help": "How contexts are made: fixed_point (few parallel passes), or sequential (one token at a time, "
            "which is slower, for models that fixed_point refuses). Both give the same contexts."
        },
    )
    context_precision: Precision = field(
        default="model",
        metadata={
            "help": "model: contexts are made with the products of the model's own forward, so that in bf16 and fp16 "
            "rounding may turn near ties. invariant: with products that give a row the same bits in any batch and at "
            "any budget, in bf16 or fp16 (weights or --bf16); slower, and refused where a model can't have it."
        },
    )
    token_budget: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens computed in one context pass, at least 1. Fewer take less memory and more passes. By "
            "default the number is measured on the device."
        },
    )
    balance: float | None = field(
        default=None,
        metadata={
            "help": "Number of tokens that cost as much as a context pass by itself, above 0. The larger it is, the "
            "more guesses are computed ahead, and the fewer passes there are. By default it is measured on the device."
        },
    )
    cuda_graphs: bool = field(
        default=True,
        metadata={
            "help": "On an NVIDIA GPU, replay context passes as CUDA graphs, which is faster. The graphs keep the K/V "
            "and hidden states of the contexts made at once (see graph_memory), what a pass computes in between and, "
            "with bf16 or fp16, the weights in that dtype (if these take at most an eighth of the memory) in GPU "
            "memory between uses."
        },
    )
    graph_memory: float = field(
        default=0.125,
        metadata={
            "help": "Most of the GPU's memory, as a share from 0 to 1, that CUDA graphs may keep as K/V and hidden "
            "states. Contexts that need more are made kernel by kernel, and their memory is freed."
        },
    )

    def check_generator(self) -> None:
        """Raise ValueError if an option is out of its range."""
        _ = self.masks
        is_number = isinstance(self.sampling_temperature, int | float) and self.sampling_temperature is not True
        if not (is_number and 0.0 <= self.sampling_temperature < float("inf")):
            raise ValueError(f"sampling_temperature is {self.sampling_temperature}; it must be a finite number >= 0")
        if self.context_method not in METHODS:
            raise ValueError(f"context_method is {self.context_method!r}; accepted: {', '.join(METHODS)}")
        if self.context_precision not in PRECISIONS:
            raise ValueError(f"context_precision is {self.context_precision!r}; accepted: {', '.join(PRECISIONS)}")
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"token_budget is {self.token_budget}; it must be at least 1")
        if self.balance is not None and not 0.0 < self.balance < float("inf"):
            raise ValueError(f"balance is {self.balance}; it must be a finite number > 0")
        if not 0.0 <= self.graph_memory <= 1.0:
            raise ValueError(f"graph_memory is {self.graph_memory}; it must be a share of the memory, from 0 to 1")

    def generator(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> ContextGenerator:
        """What makes the contexts of ``model`` as these options ask for, of the ids of ``tokenizer`` if it is given.

        Raises:
            ValueError: a token without a row in the model's embedding, and as of ``ContextGenerator``.
        """
        return ContextGenerator(
            model,
            temperature=self.sampling_temperature,
            token_budget=self.token_budget,
            balance=self.balance,
            masks=self.masks,
            cuda_graphs=self.cuda_graphs,
            graph_memory=self.graph_memory,
            precision=self.context_precision,
            vocab_size=None if tokenizer is None else unpadded_vocab_size(transformers_model(model), tokenizer),
        )


@dataclass
class MixingOptions(GeneratorOptions):
    """How much of contexts is the model's own, and what a trainer that mixes them does in a step.

    It stands before the arguments of a Trainer among the bases of a configuration, so that it checks these, too.

    Raises:
        ValueError: a field out of its range, a NaN, or a parallelism under which no contexts can be made.
    """

    tensor_parallel = 1  # processes that split each weight of the model; set where that is known
    if TYPE_CHECKING:  # of TrainingArguments
        process_index: ClassVar[int]
        world_size: ClassVar[int]

    self_prob: float | str | None = field(
        default=None,
        metadata={
            "help": "Probability p, in [0, 1], that a context token is a self token, which the model samples. 0 is "
            "plain fine-tuning; 1 is a free run of the model, as long as the reference. Or auto: p follows the "
            "training, so that a share of difference_target of the answer tokens are self tokens that differ from the "
            "reference. Where it is not given, it is 0.5 with self_prob_schedule=disagreement, "
            "self_prob_warmup=settled and sampling_temperature=0.7; but 0.1 with another schedule, and where contexts "
            "are made beforehand (--method bash)."
        },
    )
    difference_target: float = field(
        default=0.02,
        metadata={
            "help": "For self_prob=auto, which aims at it: share of the answer tokens that are self tokens and differ "
            "from the reference, above 0 and at most 1. Near 0 it is plain fine-tuning; at 1, self_prob is "
            "self_prob_cap."
        },
    )
    self_prob_cap: float = field(
        default=0.5,
        metadata={
            "help": "For self_prob=auto: largest self-probability, in [0, 1], which it comes to where hardly any self "
            "token differs. 0 is plain fine-tuning; with 1 the target alone counts."
        },
    )
    self_prob_schedule: str | None = field(
        default=None,
        metadata={
            "help": "How the self-probability goes from self_prob_start to self_prob during training: constant "
            "(self_prob throughout), linear, cosine, exponential or inverse_sigmoid. Or disagreement: self_prob times "
            "the share of self tokens that differ from the reference, so that it falls as the model learns. By default "
            "constant, and disagreement if no self_prob is given."
        },
    )
    self_prob_start: float = field(
        default=0.0,
        metadata={
            "help": "Self-probability at the first step, in [0, 1], of a schedule that is neither constant nor "
            "disagreement. If it is above self_prob, the schedule falls."
        },
    )
    self_prob_warmup: float | str | None = field(
        default=None,
        metadata={
            "help": "Steps of plain fine-tuning before contexts are mixed: a number (0 is none, and one below 1 is a "
            "share of all steps), or settled (until the loss has settled, in a short run to its end; a model whose "
            "first loss is that of guessing does not wait). By default settled if self_prob is auto, or if neither "
            "self_prob nor another schedule than disagreement is given; else 0."
        },
    )
    sampling_temperature: float | None = field(  # type: ignore[assignment]  # a number once __post_init__ has run
        default=None,
        metadata={
            "help": "Temperature of self tokens: 0 is greedy, 1 is the model's own distribution, and more adds noise. "
            "By default 0.7 if neither self_prob nor another schedule than disagreement is given, else 1; 1 also where "
            "contexts are made beforehand (--method bash)."
        },
    )
    context_micro_batches: int | None = field(
        default=None,
        metadata={
            "help": "Number of micro-batches whose contexts are made at once, at least 1; by default all of an "
            "optimizer step. Fewer take less memory and more time. The contexts are the same. Not with "
            "loss_on=after_self or after_switch."
        },
    )
    reuse_passes: bool = field(
        default=True,
        metadata={
            "help": "Take what the context passes computed as the forward of the training step; the backward computes "
            "each layer again, as gradient checkpointing does. Where a model does not allow that, the log says why, "
            "and the training step computes its own forward."
        },
    )
    weights: str = field(
        default="auto",
        metadata={
            "help": "Where FSDP2 shards the weights, what each process has of them while contexts are made: gathered "
            "(all, gathered once a step, which is faster), sharded (its part; every pass gathers one layer after the "
            "other, which takes little memory), or auto (gathered if they take at most half of the memory that is left "
            "on every device). docs/scaling.md compares them."
        },
    )
    loss_on: str = field(
        default="all",
        metadata={
            "help": "Answer tokens that are learned: all, after_self (only those with a self token somewhere before "
            "them in the answer; all of them where self_prob is 0), or after_switch (for granularity=prefix: only "
            "those after the self tokens, from the first reference token of the context on)."
        },
    )

    def __post_init__(self):
        check_parallelism(self)
        self._settle_self_prob()
        self._check_numbers()
        super().__post_init__()  # type: ignore[misc]  # of the arguments of a Trainer
        _check_engine(self)
        self._check_self_prob()
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights is {self.weights!r}; accepted: {', '.join(WEIGHTS)}")
        if self.loss_on not in LOSS_ON:
            raise ValueError(f"loss_on is {self.loss_on!r}; accepted: {', '.join(LOSS_ON)}")
        if self.loss_on != "all" and self.context_micro_batches:
            raise ValueError(
                f"loss_on={self.loss_on} counts tokens over the whole step: leave out context_micro_batches, or give "
                "loss_on=all"
            )
        if self.loss_on == "after_switch" and self.granularity != "prefix":
            raise ValueError(
                f"loss_on=after_switch learns what follows a prefix of self tokens, but granularity is "
                f"{self.granularity!r}: give granularity=prefix, or loss_on=after_self"
            )
        self.check_generator()

    def _settle_self_prob(self) -> None:
        """Put numbers in the place of their texts, as transformers' parser gives them, and of what is not given."""
        for name in WORDS:
            if isinstance(value := getattr(self, name), str):
                with suppress(ValueError):
                    setattr(self, name, float(value))
        for name in RECIPE:
            if getattr(self, name) is None:  # the default, which of another method may be another one
                setattr(self, name, getattr(type(self), name))
        missing = [name for name in RECIPE if getattr(self, name) is None]
        used = PLAIN
        if self.self_prob is None:
            is_recipe = self.self_prob_schedule in (None, DISAGREEMENT)
            used = RECIPE if is_recipe else PLAIN | {"self_prob": GENTLE}
        for name in missing:
            setattr(self, name, used.get(name))
        self._by_default = {name: getattr(self, name) for name in missing}

    def was_given(self, name: str) -> bool:
        """Whether a field has another value than it has by itself."""
        return getattr(self, name) != self._by_default.get(name, self.__dataclass_fields__[name].default)

    def _check_numbers(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name, None)
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{one.name} is nan; give a number")
            least, most = _BETWEEN.get(one.name, (-_INFINITE, _INFINITE))
            if isinstance(value, int | float) and not least <= value <= most:
                limit = f"at least {least}" if most == _INFINITE else f"from {least} to {most}"
                raise ValueError(f"{one.name} is {value}; it must be {limit}")

    def _check_self_prob(self) -> None:
        for name in (*WORDS, "self_prob_start", "self_prob_cap", "difference_target"):
            value, word = getattr(self, name), WORDS.get(name)
            no_number = isinstance(value, str | bool) or (value is None and name != "self_prob_warmup")
            if no_number and value != word:
                raise ValueError(f"{name} is {value!r}; accepted: a number{f', or {word}' if word else ''}")
        for name in ("self_prob", "self_prob_start", "self_prob_cap"):
            if getattr(self, name) != AUTO:
                check_probability(name, getattr(self, name))
        if not 0.0 < self.difference_target <= 1.0:
            raise ValueError(f"difference_target is {self.difference_target}; it must be above 0 and at most 1")
        if self.self_prob_schedule not in (known := (*SCHEDULES, DISAGREEMENT)):
            raise ValueError(f"self_prob_schedule is {self.self_prob_schedule!r}; accepted: {', '.join(known)}")
        if self.warm_up != SETTLED and not 0.0 <= float(self.warm_up) < float("inf"):
            raise ValueError(
                f"self_prob_warmup is {self.self_prob_warmup}; give a number of steps >= 0, a share of them below 1, "
                f"or {SETTLED}"
            )
        defaults = {one.name: one.default for one in fields(self)} | {"self_prob_schedule": CONSTANT}
        for name in ("difference_target", "self_prob_cap"):
            if self.self_prob != AUTO and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} goes with self_prob={AUTO}, but self_prob is {self.self_prob}")
        for name in ("self_prob_schedule", "self_prob_start"):
            fits = name == "self_prob_schedule" and self.self_prob != AUTO and self.self_prob_schedule == DISAGREEMENT
            if self.follows_steps and getattr(self, name) != defaults[name] and not fits:
                raise ValueError(self._no_schedule(f"{name} is {getattr(self, name)!r}"))

    def _no_schedule(self, given: str) -> str:
        """Why what is ``given`` does not go with a self-probability that follows the steps."""
        name = next(name for name, word in FOLLOWING.items() if getattr(self, name) == word)
        other = "another one" if name == "self_prob_schedule" else "a number"
        return (
            f"{given}, but {name} is {getattr(self, name)}, which follows what the training steps measure and knows no "
            f"other schedule: leave that out, or give {other} as {name}"
        )

    @property
    def warm_up(self) -> float | str:
        """``self_prob_warmup``, with its default where none is given."""
        if self.self_prob_warmup is None:
            return SETTLED if self.self_prob == AUTO else 0.0
        return self.self_prob_warmup

    @property
    def follows_steps(self) -> bool:
        """Whether the self-probability of a step depends on what the steps before it have measured."""
        return any(value == FOLLOWING[name] for name, value in self._may_follow.items())

    @property
    def _may_follow(self) -> dict[str, float | str]:
        return {name: self.warm_up if name == "self_prob_warmup" else getattr(self, name) for name in FOLLOWING}

    @property
    def told_of_following(self) -> str:
        """The fields by which the self-probability follows the steps."""
        return " and ".join(
            f"{name} is {value}" for name, value in self._may_follow.items() if value == FOLLOWING[name]
        )

    def check_schedule(self, schedule: Schedule | None) -> None:
        """Raise ValueError if a function can't take the place of the schedule."""
        if schedule is not None and self.follows_steps:
            raise ValueError(self._no_schedule("schedule is given"))

    @property
    def row_share(self) -> tuple[int, int]:
        """(number, count): which share of the rows this process has, and of how many.

        Processes that split each weight (tensor parallelism) have the same rows.
        """
        return self.process_index // self.tensor_parallel, self.world_size // self.tensor_parallel

    def first_mixed_step(self, max_steps: int) -> int:
        """The 0-based step after a warm-up that is a number."""
        warmup = float(self.warm_up)
        return round(warmup * max_steps) if warmup < 1 else int(warmup)

    def self_prob_at(self, step: int, max_steps: int, schedule: Schedule | None = None) -> float:
        """Self-probability of optimizer step ``step`` (0-based) of ``max_steps``, by ``schedule`` or the named one.

        Raises:
            ValueError: it depends on what the steps before measure.
        """
        if self.follows_steps:
            raise ValueError(
                f"{self.told_of_following}, so that the self-probability follows what training steps measure, and is "
                "not known beforehand: see self_prob in the log, or give numbers and another schedule"
            )
        first = self.first_mixed_step(max_steps)
        if step < first:
            return 0.0
        last = max_steps - 1
        progress = min(1.0, (step - first) / (last - first)) if last > first else 1.0
        schedule = schedule or SCHEDULES[str(self.self_prob_schedule)]
        self_prob = float(schedule(self.self_prob_start, float(self.self_prob or 0), progress))
        check_probability(f"the self-probability that the schedule gives for step {step}", self_prob)
        return self_prob


@dataclass
class BSSConfig(RowOptions, MixingOptions, TargetOptions, TrainingArguments):
    """Arguments of ``BSSTrainer``: everything of ``transformers.TrainingArguments``, and the fields below.

    Raises:
        ValueError: a field out of its range, a NaN, a name in ``report_to`` or ``optim`` whose package is missing, or a
            parallelism under which no contexts can be made.
    """

    _argument_group_name = "training (transformers.TrainingArguments)"

    def __new__(cls, *args, **kwargs):
        for old in RENAMED.keys() & kwargs.keys():
            raise TypeError(f"{cls.__name__} has no field {old!r}: it is called {RENAMED[old]!r} now")
        return super().__new__(cls)

    kl_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of KL(model || frozen model) at every learned position, added to the loss. 0 is no such "
            "term; a large weight keeps the model near the frozen one."
        },
    )
    kl_model: str | None = field(
        default=None,
        metadata={
            "help": "Frozen model for kl_weight: a folder, or a name on the hub, with the same tokenizer. By default "
            "it is the model as it is before training."
        },
    )
    lean_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the loss chunk by chunk at learned positions, so that the logits of all positions are "
            "never in memory at once; the loss is equal up to rounding. By default this is done where contexts are "
            "mixed, answers are corrected or there is a target, and the model allows it."
        },
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Number of steps between log lines; a number below 1 is a share of all steps."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Leave this False: the collator needs columns that the model does not take."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint that selfgen train continues from: its folder, or last for the newest complete one in "
            "output_dir (the start, if there is none). By default a new run starts, which needs an output_dir without "
            "checkpoints."
        },
    )

    def check_evaluation(self, has_data: bool) -> None:
        """Raise ValueError if an evaluation is asked for, but there is no data for it."""
        if self.eval_strategy != "no" and not has_data:
            raise ValueError(
                f"eval_strategy is {self.eval_strategy.value}, but there is no evaluation data: give eval_dataset "
                "(--eval-dataset, --eval-split), or leave eval_strategy out"
            )

    def __post_init__(self):
        expand_home(self)
        super().__post_init__()
        self.check_rows()
        check_reporters(self.report_to)
        _check_optimizer(self)
        if not 0.0 <= self.kl_weight < float("inf"):
            raise ValueError(f"kl_weight is {self.kl_weight}; it must be a finite number >= 0")
        if self.kl_model and not self.kl_weight:
            raise ValueError(f"kl_model is {self.kl_model!r}, but kl_weight is 0; set kl_weight to use it")
        self.check_target()
        everywhere = self.target in ("dft", "teacher")  # others learn the reference alone where they have no target
        if everywhere and self.weight_of_target == 1.0 and self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, but the target {self.target} has all the "
                "weight, and leaves none to the cross-entropy that is smoothed: give a target_weight below 1, or leave "
                "label_smoothing_factor out"
            )
        if self.target == "privileged" and self.assistant_turns != "last":
            raise ValueError(
                "assistant_turns=all is not for target=privileged, which asks for one answer per row again: the last "
                "turn"
            )
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns must stay False: the collator needs columns that the model does not take"
            )


def _check_engine(args: TrainingArguments) -> None:
    """Raise ValueError for FSDP, DeepSpeed or a precision under which no contexts can be made."""
    if args.fsdp:
        check_fsdp_version((args.fsdp_plugin_args or {}).get("fsdp_version", 2))
    if args.deepspeed_plugin is not None:
        check_deepspeed(args.deepspeed_plugin.hf_ds_config.config)
    if args.fp16 and args.device.type == "cpu" and args.deepspeed_plugin is None:
        raise ValueError(
            "fp16 is given, but on a CPU nothing scales the loss, so that small gradients would vanish: give bf16 "
            "(--bf16 yes), or leave it out"
        )
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # which helps an accelerator alone; without one, torch only warns


def _check_optimizer(args: TrainingArguments) -> None:
    """Raise ValueError if the package of the optimizer is missing."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError, TypeError) as error:
        if not isinstance(error, ImportError) and "install" not in str(error):
            return  # which needs the model
        name = getattr(args.optim, "value", args.optim)
        raise ValueError(
            f"optim is {name!r}, whose package is missing: install it, or leave optim out ({error})"
        ) from error


def with_fixed_self_prob(config: BSSConfig) -> BSSConfig:
    """``config``, for contexts that are made before the steps that learn them, where none can be followed.

    What is not given of them is as for ``selfgen contexts``, in place of RECIPE.
    """
    config = copy.copy(config)
    for name, value in (PLAIN | {"self_prob": GENTLE, "self_prob_warmup": 0.0}).items():
        if name in config._by_default and not config.was_given(name):
            setattr(config, name, value)
    return config


def check_reporters(names: list[str]) -> None:
    """Raise ValueError for a name in ``report_to`` that transformers does not know, or whose package is missing."""
    for name in names:
        asked, package = _PACKAGES.get(name, (name, name))
        if name not in integrations.integration_utils.INTEGRATION_TO_CALLBACK:
            known = ", ".join(integrations.integration_utils.INTEGRATION_TO_CALLBACK)
            raise ValueError(f"report_to has {name!r}; accepted: none, all, {known}")
        available = getattr(integrations.integration_utils, f"is_{asked}_available", None)
        if available is not None and not available():
            raise ValueError(
                f"report_to has {name!r}, but the package {package} is not installed (or not set up): pip install "
                f"{package}, or leave {name} out of report_to"
            )
