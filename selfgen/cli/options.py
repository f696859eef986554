"""What the commands share: dataclasses as flags, YAML files of options, errors of one line."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from datasets import Dataset
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import string_to_bool
from transformers.utils.hub import cached_file, extract_commit_hash

from ..data import RowOptions, load_rows
from ..training.config import RENAMED

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    """A model and its tokenizer."""

    _argument_group_name = "model"

    model: str = field(metadata={"help": "Model: a folder, or a name on the Hugging Face hub. Required."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Dtype of the weights: auto (that of the checkpoint), float32, bfloat16 or float16."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention in the model's own forward, for example sdpa or flash_attention_2; by default "
            "transformers chooses. The passes of selfgen have their own attention."
        },
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the hub."})

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; accepted: {', '.join(DTYPES)}")

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        tokenizer = self.load_tokenizer()
        options = {"dtype": self.dtype, "attn_implementation": self.attn_implementation}
        return self._from_pretrained(AutoModelForCausalLM, **options), tokenizer

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._from_pretrained(AutoTokenizer)

    def _from_pretrained(self, auto_class, **options):
        try:
            return auto_class.from_pretrained(self.model, revision=self.revision, **options)
        except (OSError, SafetensorError) as error:
            raise FileNotFoundError(
                f"model {self.model!r} is neither a folder with a checkpoint, nor could it be loaded from the hub; "
                f"check the path or name, the revision and the network: {error}"
            ) from error

    def commit(self) -> str | None:
        """The commit of a model from the hub, which the place of its files in the cache tells; None for a folder."""
        try:
            file = cached_file(self.model, "config.json", revision=self.revision)
        except OSError:
            return None
        return extract_commit_hash(file, None)


@dataclass
class TrainedModelArguments(ModelArguments):
    """A model to train. Half-precision weights round small updates away."""

    dtype: str = field(
        default="float32",
        metadata={
            "help": "Dtype of the weights that are trained: float32, auto (that of the checkpoint), bfloat16 or "
            "float16. Half precision rounds small updates away; with --bf16, float32 weights are computed with in "
            "bfloat16."
        },
    )


@dataclass
class DataArguments(RowOptions):
    """Rows with prompts and reference answers."""

    _argument_group_name = "data"

    dataset: str = field(
        kw_only=True,
        metadata={
            "help": "Data: a .jsonl, .json, .parquet or .arrow file, a folder of such files, or a name on the hub. "
            "Required."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a data set on the hub, for example main for openai/gsm8k."}
    )
    dataset_split: str = field(
        default="train", metadata={"help": "Split, or a slice of one, for example test or train[:1000]."}
    )

    def __post_init__(self) -> None:
        self.check_rows()

    def load(self) -> Dataset:
        """The rows as they are."""
        return load_rows(self.dataset, split=self.dataset_split, config_name=self.dataset_config)


def source_of(data: Any) -> dict[str, str | None]:
    """The names of the rows, for the provenance of what is made from them."""
    return {name: getattr(data, name) for name in ("dataset", "dataset_config", "dataset_split")}


class Parser(HfArgumentParser):
    """One line and exit code 2 for an error, whatever the number of options."""

    def error(self, message: str) -> NoReturn:
        fail(message, self.prog)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling per option, and no metavar that repeats its name."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(120, shutil.get_terminal_size().columns))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)  # the help says what none is

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flag = max(action.option_strings, key=lambda one: (len(one), "_" not in one))
        return flag if action.nargs == 0 else f"{flag} {'|'.join(action.choices) if action.choices else '…'}"


def show_log() -> None:
    """Write the log of selfgen from INFO on, and that of other libraries from WARNING on, to stderr."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("selfgen").setLevel(logging.INFO)


def fail(message: object, command: str) -> NoReturn:
    print(f"{command}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def wants_everything(arguments: list[str]) -> bool:
    """Whether ``--help-all`` is given, which shows every option."""
    return any(_name_of(one) == "help_all" for one in arguments)


def _name_of(flag: str) -> str:
    """The field that a flag or a key of a file sets: ``-`` and ``_`` are alike in them."""
    return flag.split("=")[0].removeprefix("--").replace("-", "_")


def _unknown(shown: str, parser: Parser, elsewhere: Mapping[str, str]) -> str:
    """The error for an option that does not exist, with what may be meant."""
    option = _name_of(shown)

    def spelled(name: str) -> str:
        return repr(f"--{name.replace('_', '-')}" if shown.startswith("--") else name)

    if option in RENAMED:
        return f"the option {shown!r} is called {spelled(RENAMED[option])} now"
    if option in elsewhere:
        return f"unknown option {shown!r}, which goes with {elsewhere[option]}"
    close = difflib.get_close_matches(option, [action.dest for action in parser._actions], n=1)
    return f"unknown option {shown!r}{f'; did you mean {spelled(close[0])}?' if close else ''}"


def from_yaml(parser: Parser, file: str, elsewhere: Mapping[str, str]) -> list[str]:
    """The flags that a YAML file stands for."""
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"there is no configuration file {file!r}: give a YAML file that exists, or begin each option with --"
        )
    try:
        values = yaml.safe_load(Path(file).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must map options to values (one `option: value` per line)")
    known = {action.dest: action for action in parser._actions}
    flags = []
    for written, value in values.items():
        key = str(written).replace("-", "_")
        if key not in known:
            raise ValueError(f"{file}: {_unknown(str(written), parser, elsewhere)}")
        if value is None:
            if known[key].default is not None:
                raise ValueError(
                    f"{file}: {key} has no value; give one, or remove the line: default {known[key].default!r}"
                )
            continue
        if isinstance(value, bool) and known[key].type is not string_to_bool:
            value = "yes" if value else "no"  # YAML reads the words yes and no as booleans
        values_of_key = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{key}", *map(str, values_of_key)]
    return flags


def parse(parser: Parser, arguments: list[str], elsewhere: Mapping[str, str] | None = None) -> tuple[Any, ...]:
    """The parser's dataclasses from flags, or from a YAML file and flags. ``--help-all`` shows every option.

    ``elsewhere`` maps options that this parser does not have to what they need, such as "--method rac".
    """
    if wants_everything(arguments):
        parser.print_help()
        raise SystemExit(0)
    if arguments and not arguments[0].startswith("-"):
        file, *arguments = arguments
        arguments = from_yaml(parser, file, elsewhere or {}) + arguments  # the last one of two flags wins
    elif late := next((one for one in arguments if one.endswith((".yaml", ".yml")) and Path(one).is_file()), None):
        raise ValueError(f"give the configuration file {late} first, and the options after it")
    if old := next((one for one in arguments if _name_of(one) in RENAMED), None):
        raise ValueError(_unknown(old.split("=")[0], parser, {}))
    *found, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        option = next((one for one in unknown if one.startswith("--")), None)
        if option is None:
            raise ValueError(
                f"{unknown[0]!r} is not an option, and no option takes it as a value: begin options with --"
            )
        raise ValueError(_unknown(option.split("=")[0], parser, elsewhere or {}))
    return tuple(found)


def make_parser(groups: Iterable[type], prog: str, usage: str, description: str, epilog: str | None = None) -> Parser:
    """A parser of dataclasses, which shows each flag in one spelling."""
    parser = Parser(
        tuple(groups), prog=prog, usage=usage, description=description, epilog=epilog, formatter_class=HelpFormatter
    )
    for action in parser._actions:
        if any(flag.startswith("--no_") for flag in action.option_strings):
            action.help = argparse.SUPPRESS
    return parser


def device(use_cpu: bool) -> torch.device:
    """The device to run on: the accelerator, if there is one and ``use_cpu`` is not given."""
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")
