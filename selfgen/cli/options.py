"""What the commands share: dataclasses as flags, YAML files of options, errors of one line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import string_to_bool
from transformers.utils.hub import cached_file, extract_commit_hash

from ..context.models import auto_class_of
from ..data import RowOptions, load_rows
from ..files import PATHS, expand_home
from ..training.config import RENAMED, WORDS
from .pretrained import from_pretrained
from .terminal import HelpFormatter, fail, meant
from .yaml_file import NumberOr, read_file, value_of

DTYPES: tuple[str, ...] = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    """A model and its tokenizer."""

    _argument_group_name = "model"

    model: str = field(metadata={"help": "Model: a folder, or a name on the Hugging Face hub. Required."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the weights: auto (that of the checkpoint), float32, bfloat16 or float16. selfgen train "
            "has another default, float32: half precision is enough to run a model, but rounds small updates away."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention in the model's own forward, for example sdpa or flash_attention_2; by default "
            "transformers chooses. The passes of selfgen have their own attention."
        },
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the hub."})
    trust_remote_code: bool = field(
        default=False,
        metadata={
            "help": "Run the code that comes with a model or a tokenizer which transformers does not have. It can do "
            "all that you can do: say yes to code that you have read."
        },
    )

    accepted_dtypes = DTYPES

    def __post_init__(self):
        if self.dtype not in self.accepted_dtypes:
            raise ValueError(f"dtype is {self.dtype!r}; accepted: {', '.join(self.accepted_dtypes)}")

    def load_model(self) -> PreTrainedModel:
        options = {"dtype": self.dtype, "attn_implementation": self.attn_implementation}
        hub = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        try:
            return self._from_pretrained(auto_class_of(self.model, **hub), **options, **self.split())
        except ImportError as error:
            if "flash" not in (self.attn_implementation or "") or "flash" not in str(error).lower():
                raise
            raise ImportError(
                f"attn_implementation is {self.attn_implementation!r}, which can't run here: leave "
                f"--attn-implementation out, or install flash-attn (NVIDIA GPUs) ({error})"
            ) from error

    def split(self) -> dict[str, Any]:
        """How weights are split over processes as they are loaded; each has all of them, here."""
        return {}

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._from_pretrained(AutoTokenizer)

    def _from_pretrained(self, auto_class, **options):
        return from_pretrained(
            auto_class, self.model, revision=self.revision, trust_remote_code=self.trust_remote_code, **options
        )

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
            "help": "Dtype of the weights that are trained: float32, auto (that of the checkpoint) or bfloat16; "
            "float16 is refused. Half precision rounds small updates away; --bf16 keeps float32 weights and computes "
            "in bfloat16."
        },
    )
    tp_size: int = field(
        default=1,
        metadata={
            "help": "Processes that each weight is split over (tensor parallelism, by transformers), for models that "
            "don't fit one GPU: start as many with torchrun, on GPUs of one machine. They have the same rows. Not with "
            "adapters."
        },
    )
    fsdp_size: int = field(
        default=1,
        metadata={
            "help": "Processes, or groups of --tp-size processes, that weights are sharded over by FSDP2: transformers "
            "shards them as it loads the model, so torchrun is enough. Each has rows of its own. Start tp_size * "
            "fsdp_size processes. (An FSDP2 configuration of accelerate launch does without this option.)"
        },
    )
    accepted_dtypes = tuple(name for name in DTYPES if name != "float16")

    def __post_init__(self) -> None:
        if self.dtype == "float16":
            raise ValueError(
                "dtype is 'float16', in which small updates are rounded away: leave --dtype out; --bf16 or --fp16 "
                "compute in mixed precision"
            )
        super().__post_init__()
        check_least(self, 1, "tp_size", "fsdp_size")
        asked, started = self.tp_size * self.fsdp_size, int(os.environ.get("WORLD_SIZE", "1"))
        if asked > 1 and started != asked:
            raise ValueError(
                f"tp_size is {self.tp_size} and fsdp_size is {self.fsdp_size}, which is for {asked} processes, but "
                f"there {'is' if started == 1 else 'are'} {started}: start it with `torchrun --nproc-per-node {asked} "
                "-m selfgen train ...`"
            )

    def split(self) -> dict[str, Any]:
        if self.tp_size * self.fsdp_size == 1:
            return {}
        try:
            from transformers.distributed import DistributedConfig

            return {"distributed_config": DistributedConfig(tp_size=self.tp_size, fsdp_size=self.fsdp_size)}
        except (ImportError, TypeError):  # an old one knows no sizes
            raise ValueError("tp_size and fsdp_size need transformers 5.23 or later") from None


@dataclass
class DataArguments(RowOptions):
    """Rows with prompts and reference answers."""

    _argument_group_name = "data"

    dataset: str = field(
        kw_only=True,
        metadata={
            "help": "Data: a .jsonl, .json, .csv, .parquet or .arrow file, a folder of them, or a name on the hub. "
            "Required."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a data set on the hub, for example main for openai/gsm8k."}
    )
    dataset_split: str = field(
        default="train", metadata={"help": "Split, or a slice of one, for example test or train[:1000]."}
    )
    assistant_turns: str = field(default="last", metadata={"help": argparse.SUPPRESS})  # all is for selfgen train

    def __post_init__(self) -> None:
        self.check_rows()

    def load(self) -> Dataset:
        """The rows as they are."""
        return load_rows(self.dataset, split=self.dataset_split, config_name=self.dataset_config)


def source_of(data: Any) -> dict[str, str | None]:
    """The names of the rows, for the provenance of what is made from them."""
    return {name: getattr(data, name) for name in ("dataset", "dataset_config", "dataset_split")}


class Parser(HfArgumentParser):
    """Dataclasses as flags. One line and exit code 2 for an error, whatever the number of options.

    ``~`` in a path is the home folder, and an option that takes text or a list of texts takes both.
    """

    one_of: tuple[str, ...] = ()
    """Fields of which one is needed, too: where required options are missing and none of these is there, the first."""

    unknown: str | None = None
    """The error for an option that does not exist, which is told rather than that others are missing."""

    def error(self, message: str) -> NoReturn:
        start, found, names = message.partition("arguments are required: ")
        if found and self.unknown:
            message = self.unknown
        elif found:
            spelled = [name.split("/")[-1] for name in names.split(", ")]
            if self.one_of and all(self.get_default(name) is None for name in self.one_of):
                spelled.append(_shown(self.one_of[0]))
            message = f"{start}{found}{', '.join(spelled)}"
        fail(message, self.prog)

    def parse_known_args(self, args=None, namespace=None):
        args = _values_with_a_dash(self, list(sys.argv[1:] if args is None else args))
        found, unknown = super().parse_known_args(args, namespace)
        for name in (name for name, kind in self.kinds().items() if kind == "either"):
            value = getattr(found, name)
            if isinstance(value, list) and len(value) == 1:
                setattr(found, name, value[0])
        expand_home(found)
        return found, unknown

    def kinds(self) -> dict[str, str]:
        """What each option takes.

        "one" value, a "number or word", a "list", "either" of one and a list, a "dict", or "json", a list of anything.
        """
        found = {}
        for one in self.dataclass_types:
            for name, hint in get_type_hints(one).items():
                parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
                kinds = {get_origin(part) or part for part in parts}
                kind = "one" if list not in kinds else "either" if {str, list[str]} <= {*parts} else "list"
                kind = "number or word" if {float, str} <= kinds and name in WORDS else kind
                found[name] = "dict" if dict in kinds else "json" if list in parts else kind
        return found


def show_log() -> None:
    """Write the log of selfgen from INFO on, and that of other libraries from WARNING on, to stderr."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("selfgen").setLevel(logging.INFO)


def wants_everything(arguments: list[str]) -> bool:
    """Whether ``--help-all`` is given, which shows every option."""
    return any(_name_of(one) == "help_all" for one in arguments)


def _name_of(flag: str) -> str:
    """The field that a flag or a key of a file sets: ``-`` and ``_`` are alike in them."""
    return flag.split("=")[0].removeprefix("--").replace("-", "_")


def _shown(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def _unknown(shown: str, parser: Parser, elsewhere: Mapping[str, str]) -> str:
    """The error for an option that does not exist, with what may be meant."""
    option = _name_of(shown)

    def spelled(name: str) -> str:
        return _shown(name) if shown.startswith("--") else name

    if option in RENAMED:
        return f"the option {shown!r} is called {spelled(RENAMED[option])!r} now"
    elsewhere = {**dict.fromkeys(("tp_size", "fsdp_size"), "selfgen train"), **elsewhere}
    if option in elsewhere:
        return f"unknown option {shown!r}, which goes with {elsewhere[option]}"
    return f"unknown option {shown!r}{meant(spelled(option), (spelled(action.dest) for action in parser._actions))}"


def _values_with_a_dash(parser: Parser, arguments: list[str]) -> list[str]:
    """Join options with values that begin with a dash, such as -1e-5, which argparse would take for options."""
    one_value = {
        flag for action in parser._actions if action.nargs is None and action.option_strings
        for flag in action.option_strings
    }  # fmt: skip
    flags = {flag for action in parser._actions for flag in action.option_strings}
    joined: list[str] = []
    for argument in arguments:
        is_value = argument.startswith("-") and not argument.startswith("--") and argument not in flags
        if is_value and joined and joined[-1] in one_value:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def json_object(text: str) -> dict[str, Any]:
    """The JSON object that ``text`` is."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object such as '{{\"key\": 1}}' ({error})") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object such as '{{\"key\": 1}}'")
    return found


def json_text(text: str) -> str:
    """``text``, which must be a JSON object."""
    json_object(text)
    return text


def defaults_from_file(parser: Parser, file: str, elsewhere: Mapping[str, str]) -> None:
    """Make the values of a YAML file the defaults of the parser, so that flags win over them."""
    kinds = parser.kinds()
    known = {action.dest: action for action in reversed(parser._actions) if action.dest in kinds}
    values = {}
    for name, entry in read_file(file).items():
        if name not in known:
            raise ValueError(f"{file}, line {entry.line}: {_unknown(entry.key, parser, elsewhere)}")
        value = value_of(file, entry, known[name], kinds[name])
        if value is not None:
            values[name] = value
        elif known[name].default is not None:
            raise ValueError(
                f"{file}, line {entry.line}: {name} has no value; give one, or remove the line: default "
                f"{known[name].default!r}"
            )
    parser.set_defaults(**values)
    for action in parser._actions:
        action.required = action.required and action.dest not in values


def parse(parser: Parser, arguments: list[str], elsewhere: Mapping[str, str] | None = None) -> tuple[Any, ...]:
    """The parser's dataclasses from flags, or from a YAML file and flags. ``--help-all`` shows every option.

    ``elsewhere`` maps options that this parser does not have to what they need, such as "--method rac".
    """
    if wants_everything(arguments):
        parser.print_help()
        raise SystemExit(0)
    if arguments and not arguments[0].startswith("-"):
        file, *arguments = arguments
        defaults_from_file(parser, file, elsewhere or {})
    elif late := next((one for one in arguments if one.endswith((".yaml", ".yml")) and Path(one).is_file()), None):
        raise ValueError(f"give the configuration file {late} first, and the options after it")
    if old := next((one for one in arguments if _name_of(one) in RENAMED), None):
        raise ValueError(_unknown(old.split("=")[0], parser, {}))
    given = [one.split("=")[0] for one in arguments if one.startswith("--")]
    given = [one for one in given if " " not in one and one != "--"]  # which argparse takes for values
    flags = {flag for action in parser._actions for flag in action.option_strings}
    if other := next((one for one in given if one not in flags), None):
        parser.unknown = _unknown(other, parser, elsewhere or {})
    *found, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if parser.unknown:
        raise ValueError(parser.unknown)
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not an option, and no option takes it as a value: begin options with --")
    return tuple(found)


ROWS = ("dataset", "dataset_config", "dataset_split", "prompt_column", "completion_column", "messages_column")
"""What most commands need to know of the data."""


def make_parser(
    groups: Iterable[type],
    prog: str,
    usage: str,
    description: str,
    epilog: str | None = None,
    first: Iterable[str] = (),
) -> Parser:
    """A parser of dataclasses, which shows each flag in one spelling, and the options named in ``first`` first."""
    parser = Parser(
        tuple(groups),
        prog=prog,
        usage=usage,
        description=description,
        epilog=epilog,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    kinds = parser.kinds()
    for action in parser._actions:
        if any(flag.startswith("--no_") for flag in action.option_strings):
            action.help = argparse.SUPPRESS
        kind = kinds.get(action.dest)
        if action.type is string_to_bool and action.nargs is None:  # None or a bool: the flag alone is yes, too
            action.nargs, action.const = "?", True
        if kind == "either":
            action.nargs = "+"
        elif kind == "number or word":
            action.type = NumberOr(WORDS[action.dest])
        elif kind == "dict" and action.dest not in PATHS:  # where it may be a file
            action.type = json_text if action.type is str else json_object
    arrange(parser, {"what most runs need": first})
    return parser


def arrange(parser: Parser, groups: Mapping[str, Iterable[str]]) -> None:
    """Show the options of these groups (title -> fields) before all others, which stay in their own groups."""
    help_group, ours = parser._action_groups[:2], {action.dest: action for action in reversed(parser._actions)}
    rest, new = parser._action_groups[2:], []
    for title, names in groups.items():
        new.append(parser.add_argument_group(title))
        for action in (ours[name] for name in names if name in ours):
            for group in (*rest, *new):
                if action in group._group_actions:
                    group._group_actions.remove(action)
            new[-1]._group_actions.append(action)
    parser._action_groups[:] = [one for one in (*help_group, *new, *rest) if one in help_group or one._group_actions]


def check_least(options: object, least: int, *names: str) -> None:
    """Raise ValueError if one of these options is a number below ``least``; None is none."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def check_temperature(options: object, *names: str) -> None:
    """Raise ValueError if one of these options is no temperature."""
    for name in names:
        if not 0.0 <= getattr(options, name) < float("inf"):
            raise ValueError(f"{name} is {getattr(options, name)}; it must be a finite number >= 0")


def check_seed(seed: int) -> None:
    """Raise ValueError unless ``seed`` has 64 bits, with or without a sign."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be a 64-bit integer, from -2**63 to 2**64 - 1")


def device(use_cpu: bool) -> torch.device:
    """The device to run on: the accelerator, if there is one and ``use_cpu`` is not given.

    Each of several processes on a machine, which `torchrun` numbers, takes its own.
    """
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and "LOCAL_RANK" in os.environ:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
    return accelerator or torch.device("cpu")
