"""The command line: ``selfgen train``."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import shutil
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NoReturn

import yaml
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from .config import BSSConfig
from .context import UnsupportedModelError
from .data import load_rows
from .trainer import BSSTrainer

OVERVIEW = """\
selfgen - train language models on their own tokens, online and exact

usage: selfgen train [CONFIG.yaml] --model NAME --dataset NAME --output_dir DIR [options]

Each training example's context is mixed, token by token, from the reference answer and from what the model itself says
there (batch-scheduled sampling, arXiv 2410.14655); the model learns to go on with the reference.

  # a local file with prompt/completion columns, one quarter of the context the model's own
  selfgen train --model ./SmolLM2-135M-Instruct --dataset train.jsonl --output_dir out --self_prob 0.25

  # GSM8K from the hub, from plain fine-tuning to one half over the training
  selfgen train --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset openai/gsm8k --dataset_config main \\
      --prompt_column question --completion_column answer \\
      --self_prob 0.5 --self_prob_schedule linear --learning_rate 2e-5 --output_dir out

  # the same options from a file; flags win over it
  selfgen train bss.yaml --max_steps 20

  # go on after a kill
  selfgen train bss.yaml --resume_from_checkpoint last

Data: columns prompt and completion (text or messages), or messages; .jsonl, .json, .parquet, .arrow, a folder, or the
hub. The chat template is applied when the tokenizer has one.

selfgen train --help       the options that most runs need
selfgen train --help_all   every option of transformers.TrainingArguments too
"""

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
class RunArguments:
    """What to train, on what."""

    _argument_group_name = "model and data"

    model: str = field(metadata={"help": "Model: a folder, or a name on the hub."})
    dataset: str = field(metadata={"help": "Training data: a .jsonl/.json/.parquet/.arrow file, a folder, or the hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on, for example train[:1000]."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Evaluation data; by default dataset's."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; none by default."})
    dtype: str = field(
        default="auto", metadata={"help": "Dtype of the weights: auto (the checkpoint's), float32, bfloat16, float16."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of the training pass, for example sdpa or flash_attention_2."}
    )


class _Parser(HfArgumentParser):
    """One line and exit code 2 for an error, whatever the number of options."""

    def error(self, message: str) -> NoReturn:
        fail(message)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling an option, and no metavar as long as its name."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(120, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flag = max(action.option_strings, key=len)
        return flag if action.nargs == 0 else f"{flag} {'|'.join(action.choices) if action.choices else '…'}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0
    command, *rest = arguments
    if command != "train":
        fail(f"unknown command {command!r}; there is: train", command="selfgen")
    return train(rest)


def train(arguments: list[str]) -> int:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        run, config = parse(arguments)
        trainer = build_trainer(run, config)
        checkpoint = _checkpoint(config)
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(error)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except UnsupportedModelError as error:
        fail(error)
    trainer.save_model()
    trainer.save_state()
    print(f"model and tokenizer are in {config.output_dir}")
    return 0


def parse(arguments: list[str]) -> tuple[RunArguments, BSSConfig]:
    """Flags, or a YAML file and flags, to the two argument groups."""
    parser = _parser(everything="--help_all" in arguments)
    if "--help_all" in arguments:
        parser.print_help()
        raise SystemExit(0)
    if arguments and not arguments[0].startswith("-"):
        file, *arguments = arguments
        arguments = _from_yaml(parser, file) + arguments  # the last one of two flags wins
    run, config = parser.parse_args_into_dataclasses(arguments)
    return run, config


def build_trainer(run: RunArguments, config: BSSConfig) -> BSSTrainer:
    train_rows = load_rows(run.dataset, split=run.dataset_split, config_name=run.dataset_config)
    eval_rows = None
    if run.eval_dataset or run.eval_split:
        name = run.eval_dataset or run.dataset
        eval_config = run.dataset_config if name == run.dataset else None
        eval_rows = load_rows(name, split=run.eval_split or "train", config_name=eval_config)
    if run.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {run.dtype!r}; accepted: auto, float32, bfloat16, float16")
    try:
        tokenizer = AutoTokenizer.from_pretrained(run.model)
        model = AutoModelForCausalLM.from_pretrained(
            run.model, dtype=run.dtype, attn_implementation=run.attn_implementation
        )
    except (OSError, SafetensorError) as error:
        raise FileNotFoundError(
            f"model {run.model!r} is neither a folder with a checkpoint nor could it be loaded from the hub: {error}"
        ) from error
    return BSSTrainer(model, config, train_dataset=train_rows, eval_dataset=eval_rows, processing_class=tokenizer)


def fail(message: object, command: str = "selfgen train") -> NoReturn:
    print(f"{command}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


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


def _parser(everything: bool) -> _Parser:
    parser = _Parser(
        (RunArguments, BSSConfig),
        prog="selfgen train",
        usage="selfgen train [CONFIG.yaml] --model NAME --dataset NAME --output_dir DIR [options]",
        description="Fine-tune on mixed contexts; see selfgen --help for examples.",
        epilog=None if everything else "More options, all of transformers.TrainingArguments: selfgen train --help_all",
        formatter_class=_HelpFormatter,
    )
    inherited = {item.name for item in fields(TrainingArguments)}
    hidden = set() if everything else inherited - set(COMMON) - {"logging_steps"}
    ours = parser.add_argument_group("batch-scheduled sampling")
    for action in parser._actions:
        if action.dest in hidden or any(flag.startswith("--no_") for flag in action.option_strings):
            action.help = argparse.SUPPRESS
        if action.dest in {item.name for item in fields(BSSConfig)} - inherited:
            ours._group_actions.append(action)
    for group in parser._action_groups:
        if group.title == BSSConfig._argument_group_name:
            group._group_actions = [action for action in group._group_actions if action not in ours._group_actions]
            parser._action_groups.append(parser._action_groups.pop(parser._action_groups.index(group)))
            break
    return parser


def _from_yaml(parser: _Parser, file: str) -> list[str]:
    """The flags that a YAML file stands for."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no configuration file {file!r} (options begin with --)")
    try:
        values = yaml.safe_load(Path(file).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must map options to values (one `option: value` a line)")
    known = {action.dest: action for action in parser._actions}
    flags = []
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(f"{file}: unknown option {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if value is None:
            if known[key].default is not None:
                raise ValueError(f"{file}: {key} has no value; remove the line for its default, {known[key].default!r}")
            continue
        if isinstance(value, bool) and known[key].type is not string_to_bool:
            value = "yes" if value else "no"  # YAML reads the words yes and no as booleans
        values_of_key = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{key}", *map(str, values_of_key)]
    return flags
