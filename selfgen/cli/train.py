"""``selfgen train``."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from ..context import UnsupportedModelError
from ..context.models import check_there, unpadded_vocab_size
from ..data import DataError, RowOptions, load_rows
from ..files import check_folder
from ..sharing import is_first, let_first_speak, no_bars
from ..stored_contexts import CONTEXT_COLUMNS, OfflineError, load_contexts
from ..training.bash import BASHTrainer
from ..training.bss import BSSTrainer
from ..training.checkpoints import ResumeError, check_resumed, output_of, resumed_checkpoint
from ..training.config import BSSConfig, GeneratorOptions, MaskOptions
from ..training.ending import save_result
from ..training.gap import GapBeforeAndAfter
from ..training.mixing import check_processes
from ..training.parallelism import check_tensor_parallel
from ..training.processes import meet
from ..training.rac import RACConfig, RACTrainer
from ..training.report import write_report
from ..training.rounds import train_rounds
from ..training.streams import check_stream
from ..training.targets import TargetOptions
from ..training.weights import DivergedError
from .help import method_of
from .options import (
    ROWS,
    Parser,
    TrainedModelArguments,
    arrange,
    check_least,
    fail,
    make_parser,
    parse,
    show_log,
    source_of,
    wants_everything,
)

logger = logging.getLogger(__name__)

PROG = "selfgen train"
TRAINERS: dict[str, type[BSSTrainer]] = {"bss": BSSTrainer, "bash": BASHTrainer, "rac": RACTrainer}
MAKE_CONTEXTS = {f.name for f in fields(GeneratorOptions)} | {
    "self_prob",
    "difference_target",
    "self_prob_cap",
    "self_prob_schedule",
    "self_prob_start",
    "self_prob_warmup",
    "context_micro_batches",
    "reuse_passes",
}

# Options by which the self-probability changes during training.
CHANGING = ("self_prob_schedule", "self_prob_start", "self_prob_warmup", "difference_target", "self_prob_cap")

# What `selfgen train --help` shows first.
FIRST = (
    "model",
    *ROWS,
    "max_length",
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "bf16",
    "self_prob",
    "resume_from_checkpoint",
)

# The Trainer's options that `selfgen train --help` shows.
COMMON = (
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "seed",
    "bf16",
    "use_cpu",
    "activation_checkpointing",
    "eval_strategy",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "report_to",
)


@dataclass
class TrainingData:
    """What to train on."""

    _argument_group_name = "data"

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Training data: a .jsonl, .json, .csv, .parquet or .arrow file, a folder of them, or a name on the "
            "hub. Required, except with --contexts."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a data set on the hub, for example main for openai/gsm8k."}
    )
    dataset_split: str = field(
        default="train", metadata={"help": "Split to train on, or a slice of one, for example train[:1000]."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read rows while they are trained or evaluated on, for data that fit neither into memory nor on "
            "disk. The length of a stream is not known: give --max-steps. Not with --method bash."
        },
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Evaluation data, given as --dataset is; by default the same data set."}
    )
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to evaluate on, at the end of training or as --eval-strategy says. By default there is no "
            "evaluation, but with --eval-dataset the split is train."
        },
    )

    def load(self) -> tuple[Dataset | IterableDataset | None, Dataset | IterableDataset | None]:
        """Rows to train and to evaluate on."""
        train_rows, load = None, partial(load_rows, streaming=self.streaming)
        if self.dataset:
            train_rows = load(self.dataset, split=self.dataset_split, config_name=self.dataset_config)
        if not self.eval_dataset and not self.eval_split:
            return train_rows, None
        name = self.eval_dataset or self.dataset
        if not name:
            raise ValueError(
                f"eval_split is {self.eval_split!r}, but there is no data set to take it from: give --eval-dataset"
            )
        config = self.dataset_config if name == self.dataset else None
        return train_rows, load(name, split=self.eval_split or "train", config_name=config)


@dataclass
class MethodArguments:
    """Where the contexts come from."""

    _argument_group_name = "method"

    method: Literal["bss", "bash", "rac"] = field(
        default="bss",
        metadata={
            "help": "bss makes contexts in the training step. bash trains on contexts that were written beforehand: by "
            "selfgen contexts, or in rounds over parts of the data set. rac trains on corrections of the model's own "
            "answers (its options: selfgen train --method rac --help)."
        },
    )
    contexts: str | None = field(
        default=None,
        metadata={"help": "For --method bash: a folder that selfgen contexts wrote; it takes the place of --dataset."},
    )
    rounds: int = field(
        default=1,
        metadata={
            "help": "For --method bash without --contexts: number of parts that the data set is cut into, one per "
            "round. Each round writes the contexts of its part with the model of the round before, and trains on "
            "them. Epochs, steps and the learning-rate schedule count for one round. With 1, all contexts are those "
            "of --model."
        },
    )
    shard_rows: int = field(
        default=512,
        metadata={
            "help": "For --method bash without --contexts: rows per file of contexts, at least 1. A kill loses at "
            "most the work on one file."
        },
    )
    context_batch_size: int = field(
        default=32,
        metadata={
            "help": "For --method bash without --contexts: rows whose contexts are made at once, at least 1. Fewer "
            "take less memory and more passes."
        },
    )

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Replace a model that is in output_dir already, even if it is the one of --model. Without this, "
            "such a folder is refused. Checkpoints and rounds of an earlier run are never written over."
        },
    )

    def __post_init__(self) -> None:
        check_least(self, 1, "rounds", "shard_rows", "context_batch_size")

    def check(self, data: TrainingData) -> None:
        if self.method != "bash" and (self.contexts or self.rounds != 1):
            raise ValueError(f"contexts and rounds need --method bash, but method is {self.method!r}")
        if self.method != "bash" and (self.shard_rows, self.context_batch_size) != (512, 32):
            raise ValueError(f"shard_rows and context_batch_size need --method bash, but method is {self.method!r}")
        if self.contexts and (data.dataset or self.rounds != 1):
            raise ValueError(
                "--contexts takes the place of --dataset, and is trained on in one round: give no --dataset and no "
                "--rounds"
            )
        if self.method == "bash" and data.streaming:
            raise ValueError("--method bash writes the contexts of all rows beforehand: leave out --streaming")
        if not self.contexts and not data.dataset:
            raise ValueError("there is no data: give --dataset (or --method bash and --contexts)")


@dataclass
class ReportArguments:
    """What is written about the training."""

    _argument_group_name = "report"

    report: bool = field(
        default=True,
        metadata={
            "help": "Write report.html, report.png (with matplotlib) and report.json to output_dir when the training "
            "ends, also where it is broken off: loss, p, what contexts are like and cost, and the gap."
        },
    )
    gap_rows: int = field(
        default=16,
        metadata={
            "help": "Rows on which the gap (tokens right under references minus those right running freely) is "
            "measured before and after the training, the first ones of the evaluation data or else of the training "
            "data, up to 128 tokens of each answer. 0 is none. Not in rounds, nor with weights that are split."
        },
    )

    def __post_init__(self) -> None:
        check_least(self, 0, "gap_rows")


def run(arguments: list[str]) -> int:
    show_log()
    let_first_speak()
    command = shlex.join([*PROG.split(), *arguments])
    with ExitStack() as stack:
        try:
            config_class = RACConfig if method_of(arguments) == "rac" else BSSConfig
            of_rac = {f.name: "--method rac" for f in fields(RACConfig)}
            parser = _parser(config_class, everything=wants_everything(arguments))
            if not {"--dataset", "--contexts"} & {one.split("=")[0] for one in arguments}:
                parser.one_of = ("dataset", "contexts")
            options = parse(parser, arguments, of_rac)
            method, config, report = options[2:]
            method.check(options[1])
            config.check_evaluation(bool(options[1].eval_dataset or options[1].eval_split))
            config.disable_tqdm = config.disable_tqdm or not sys.stderr.isatty()  # bars tear lines of a file apart
            if config.disable_tqdm:
                stack.enter_context(no_bars())
            check_folder(config.output_dir, "output_dir")
            if config.resume_from_checkpoint != "last":  # which needs no place to be there
                resumed_checkpoint(config.resume_from_checkpoint, config.output_dir)
            in_rounds = method.method == "bash" and not method.contexts
            if in_rounds:
                train = _prepare_rounds(*options)
            else:
                _take_folder(config, method.overwrite_output_dir, stack)
                train = partial(_prepare(*options), command)
        except (ValueError, TypeError, OSError, ImportError) as error:
            fail(error, PROG)
        try:
            train()
        except (UnsupportedModelError, OfflineError, ResumeError, DivergedError, DataError, OSError) as error:
            fail(error, PROG)
        except ValueError as error:
            if not in_rounds:  # which read and check as they go; elsewhere it is a fault of the program
                raise
            fail(error, PROG)
        finally:
            if report.report and in_rounds and Path(config.output_dir).is_dir():  # others have a trainer's state
                _write_report(config, command)
    if is_first():
        print(f"model and tokenizer are in {config.output_dir}")
    return 0


def _take_folder(config: BSSConfig, overwrite: bool, stack: ExitStack) -> None:
    """Keep other runs out of the output folder until ``stack`` is closed.

    Raises:
        ValueError: in all processes of this run: another run is writing it, or it holds something else.
    """
    check_processes(config.world_size)
    error: Exception | None = None
    if config.process_index == 0:
        try:
            stack.enter_context(output_of(config, overwrite=overwrite))
        except (ValueError, OSError) as reason:
            error = reason
    meet(error)


def _prepare(
    model_arguments: TrainedModelArguments,
    data: TrainingData,
    method: MethodArguments,
    config: BSSConfig,
    report: ReportArguments,
) -> Callable[[str], None]:
    """Do all that can fail before the first step; returns a function that trains, given the command."""
    config.tensor_parallel = model_arguments.tp_size
    if config.tensor_parallel > 1:
        check_tensor_parallel(config, config.tensor_parallel)  # before weights are loaded
    checkpoint = _checkpoint(config)
    if method.contexts:
        _warn_of_what_has_no_effect(config, method.contexts)
    if data.streaming:
        check_stream(config)
    _check_models(model_arguments, config)
    logger.info("reading the data")
    train_rows, eval_rows = _rows(data, config)
    stored = load_contexts(method.contexts) if method.contexts else None
    logger.info("loading the model %s", model_arguments.model)
    tokenizer, model = model_arguments.load_tokenizer(), model_arguments.load_model()
    logger.info("tokenizing the data, and checking what the model computes")
    trainer = TRAINERS[method.method](
        model,
        config,
        train_dataset=train_rows if stored is None else stored,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        trust_remote_code=model_arguments.trust_remote_code,
    )
    if train_rows is not None and set(CONTEXT_COLUMNS) <= set(train_rows.column_names or ()):
        logger.warning(
            "%s has contexts that are written already, which --method %s does not use: --method bash --contexts %s "
            "trains on them",
            data.dataset,
            method.method,
            data.dataset,
        )

    if checkpoint:
        trainer.check_resumed(checkpoint)

    if report.gap_rows:
        trainer.add_callback(GapBeforeAndAfter(trainer, report.gap_rows))

    def train(command: str) -> None:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            save_result(trainer, overwrite=method.overwrite_output_dir)
        finally:
            if report.report:
                _write_report(config, command, trainer.state)

    return train


def _check_models(model_arguments: TrainedModelArguments, config: BSSConfig) -> None:
    """Raise FileNotFoundError if a model that is asked for can't be there."""
    check_there(model_arguments.model, model_arguments.revision)
    for other in filter(None, (config.kl_model, config.teacher_model)):
        check_there(other)


def _rows(data: TrainingData, config: BSSConfig) -> tuple[Dataset | IterableDataset | None, ...]:
    """Rows to train and to evaluate on, which have the columns that ``config`` names."""
    train_rows, eval_rows = data.load()
    for name, rows in (("train", train_rows), ("eval", eval_rows)):
        if rows is not None:
            try:
                config.check_columns(rows)
            except DataError as error:
                raise DataError(f"{name} data: {error}") from error
    if train_rows is not None and isinstance(config, RACConfig):
        config.check_own_answers(train_rows)
    return train_rows, eval_rows


def _write_report(config: BSSConfig, command: str, state: TrainerState | None = None) -> None:
    """Say where the report is; one that fails costs nothing else."""
    if not is_first() or (state is not None and not state.log_history):
        return
    try:
        logger.info("report: %s", ", ".join(map(str, write_report(config.output_dir, state, command=command))))
    except Exception as error:  # of plots, of a log of another program: no fault of a report may cost a trained model
        logger.warning("there is no report: %s: %s", type(error).__name__, error)


def _warn_of_what_has_no_effect(config: BSSConfig, contexts: str) -> None:
    """Name the options for making contexts that were given with contexts that are made already."""
    names = MAKE_CONTEXTS - ({"granularity"} if config.loss_on == "after_switch" else set())  # which needs it
    idle = [field.name for field in fields(config) if field.name in names and config.was_given(field.name)]
    if idle:
        logger.warning(
            "the contexts in %s are trained on as they are, so these options for making contexts have no effect: %s",
            contexts,
            ", ".join(idle),
        )


def _prepare_rounds(
    model_arguments: TrainedModelArguments,
    data: TrainingData,
    method: MethodArguments,
    config: BSSConfig,
    _: ReportArguments,
) -> Callable[[], None]:
    _check_models(model_arguments, config)
    train_rows, eval_rows = _rows(data, config)
    tokenizer = model_arguments.load_tokenizer()

    def load(name: str) -> PreTrainedModel:
        try:
            model = replace(model_arguments, model=name).load_model()
            unpadded_vocab_size(model, tokenizer)  # checks that each token has a row
            return model
        except (OSError, ValueError) as error:
            fail(error, PROG)

    return partial(
        train_rounds,
        load,
        model_arguments.model,
        train_rows,
        config,
        rounds=method.rounds,
        processing_class=tokenizer,
        eval_dataset=eval_rows,
        shard_rows=method.shard_rows,
        batch_size=method.context_batch_size,
        overwrite=method.overwrite_output_dir,
        trust_remote_code=model_arguments.trust_remote_code,
        provenance={
            "pretrained": model_arguments.model,
            "pretrained_revision": model_arguments.commit(),
            **source_of(data),
        },
    )


def _checkpoint(config: BSSConfig) -> str | None:
    """The checkpoint to continue from, or None; what can be told before anything is loaded is checked."""
    found = resumed_checkpoint(config.resume_from_checkpoint, config.output_dir)
    if found:
        check_resumed(found, config)
    elif config.resume_from_checkpoint and is_first():
        logger.info("%s has no checkpoint yet: training begins at its first step", config.output_dir)
    return found


def _parser(config_class: type[BSSConfig], everything: bool) -> Parser:
    parser = make_parser(
        (TrainedModelArguments, TrainingData, MethodArguments, config_class, ReportArguments),
        prog=PROG,
        usage="selfgen train [CONFIG.yaml] --model NAME --dataset NAME --output-dir DIR [options]",
        description="Fine-tune on mixed contexts; see selfgen --help for examples.",
        epilog=None if everything else "More options, all of transformers.TrainingArguments: selfgen train --help-all",
    )
    inherited = {item.name for item in fields(TrainingArguments)}
    hidden = set() if everything else inherited - set(COMMON) - {"logging_steps"}
    for action in parser._actions:
        if action.dest == "output_dir":  # transformers has a default, and says nothing
            action.required, action.help = True, "Folder for checkpoints, the log and the trained model. Required."
        if action.dest in hidden:
            action.help = argparse.SUPPRESS
    arrange(parser, _groups(config_class))
    return parser


def _groups(config_class: type[BSSConfig]) -> dict[str, list[str]]:
    """Titles -> options, as they are shown; those of transformers.TrainingArguments follow in a group of their own."""

    def of(*classes: type) -> list[str]:
        return [item.name for one in classes for item in fields(one)]

    correction = [name for name in config_class.__annotations__ if name not in of(BSSConfig)]
    groups = {
        "what most runs need": list(FIRST),
        "weights on several devices": ["tp_size", "fsdp_size", "weights"],
        "method": ["method", "contexts", "rounds", "shard_rows", "context_batch_size"],
        "correction": correction,
        "how many self tokens, and when": [*CHANGING, "sampling_temperature"],
        "which positions hold self tokens": of(MaskOptions),
        "loss": ["loss_on", *of(TargetOptions), "kl_weight", "kl_model", "lean_loss"],
        "model": of(TrainedModelArguments),
        "data": of(TrainingData, RowOptions),
        "output": ["overwrite_output_dir", *of(ReportArguments)],
        "how contexts are made": [*of(GeneratorOptions), "context_micro_batches", "reuse_passes"],
    }
    taken: set[str] = set()
    for title, names in groups.items():  # an option is in the first group that names it
        groups[title] = [name for name in names if name not in taken]
        taken |= set(names)
    groups["weights on several devices"] = groups.pop("weights on several devices")
    return {title: names for title, names in groups.items() if names}
