"""``selfgen train``."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import dataclass, field, fields
from pathlib import Path

from datasets import Dataset
from transformers import TrainingArguments

from ..config import BSSConfig
from ..context import UnsupportedModelError
from ..data import load_rows
from ..trainer import BSSTrainer
from .options import ModelArguments, Parser, fail, make_parser, parse

PROG = "selfgen train"

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

    dataset: str = field(metadata={"help": "Training data: a .jsonl/.json/.parquet/.arrow file, a folder, or the hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on, for example train[:1000]."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Evaluation data; by default dataset's."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; none by default."})

    def load(self) -> tuple[Dataset, Dataset | None]:
        """Rows to train and to evaluate on."""
        train_rows = load_rows(self.dataset, split=self.dataset_split, config_name=self.dataset_config)
        if not self.eval_dataset and not self.eval_split:
            return train_rows, None
        name = self.eval_dataset or self.dataset
        config = self.dataset_config if name == self.dataset else None
        return train_rows, load_rows(name, split=self.eval_split or "train", config_name=config)


def run(arguments: list[str]) -> int:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        model_arguments, data, config = parse(_parser(everything="--help_all" in arguments), arguments)
        train_rows, eval_rows = data.load()
        model, tokenizer = model_arguments.load()
        trainer = BSSTrainer(
            model, config, train_dataset=train_rows, eval_dataset=eval_rows, processing_class=tokenizer
        )
        checkpoint = _checkpoint(config)
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(error, PROG)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except UnsupportedModelError as error:
        fail(error, PROG)
    trainer.save_model()
    trainer.save_state()
    print(f"model and tokenizer are in {config.output_dir}")
    return 0


def _checkpoint(config: BSSConfig) -> str | None:
    """Where to go on from. "last" is the newest checkpoint that was written to its end; the start if there is none."""
    asked = config.resume_from_checkpoint
    if asked != "last":
        if asked and not (Path(asked) / "trainer_state.json").is_file():
            raise FileNotFoundError(f"resume_from_checkpoint is {asked!r}: no checkpoint there (last finds the newest)")
        return asked
    steps = {}
    for state in Path(config.output_dir).glob("checkpoint-*/trainer_state.json"):
        try:
            steps[json.loads(state.read_text())["global_step"]] = state.parent  # the Trainer writes this file last
        except (ValueError, KeyError):
            continue
    return str(steps[max(steps)]) if steps else None


def _parser(everything: bool) -> Parser:
    parser = make_parser(
        (ModelArguments, TrainingData, BSSConfig),
        prog=PROG,
        usage="selfgen train [CONFIG.yaml] --model NAME --dataset NAME --output_dir DIR [options]",
        description="Fine-tune on mixed contexts; see selfgen --help for examples.",
        epilog=None if everything else "More options, all of transformers.TrainingArguments: selfgen train --help_all",
    )
    inherited = {item.name for item in fields(TrainingArguments)}
    hidden = set() if everything else inherited - set(COMMON) - {"logging_steps"}
    ours = parser.add_argument_group("batch-scheduled sampling")
    for action in parser._actions:
        if action.dest in hidden:
            action.help = argparse.SUPPRESS
        if action.dest in {item.name for item in fields(BSSConfig)} - inherited:
            ours._group_actions.append(action)
    for group in parser._action_groups:
        if group.title == BSSConfig._argument_group_name:
            group._group_actions = [action for action in group._group_actions if action not in ours._group_actions]
            parser._action_groups.append(parser._action_groups.pop(parser._action_groups.index(group)))
            break
    return parser
