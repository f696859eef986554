"""Options from a YAML file: scalars stay the text that stands in the file, and the option's type reads them."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from ..files import at_home

_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "timestamp", "str", "value", "merge", "seq", "map")
}
_YES, _NO = ("yes", "true", "on"), ("no", "false", "off")
_SEVERAL_WAYS = re.compile(
    r"[-+]?(0[0-7_]+|0o[0-7_]+|0b[01_]+|0x[0-9a-f_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)", re.I
)
"""Numbers that some readers of YAML take for octal, binary, hexadecimal or sexagesimal ones, and others do not."""


@dataclass(frozen=True)
class NumberOr:
    """The type of an option that takes a number or one word."""

    word: str

    def __call__(self, text: str) -> float | str:
        if text == self.word:
            return text
        try:
            return float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {self.word}") from None


@dataclass(frozen=True)
class Entry:
    """One line ``key: value`` of the file."""

    key: str  # as it is written
    value: yaml.Node
    line: int


def read_file(file: str) -> dict[str, Entry]:
    """The entries of a YAML file by the names of their options, in which ``-`` is ``_``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, maps nothing, or gives an option twice.
    """
    path = at_home(file)
    try:
        with open(path, "rb") as stream:
            root = yaml.compose(stream, Loader=yaml.SafeLoader)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise FileNotFoundError(
            f"there is no configuration file {file!r}: give a YAML file that exists, or begin each option with --"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{file} must map options to values (one `option: value` per line)")
    try:
        return {_option(entry.key): entry for entry in _entries(file, root, _option)}
    except RecursionError:
        raise ValueError(f"{file} has a mapping that is merged into itself") from None


def _option(key: str) -> str:
    return key.replace("-", "_")


def _entries(file: str, node: yaml.MappingNode, name_of: Callable[[str], str] = str) -> Iterator[Entry]:
    """What a mapping gives, and then what is merged into it (``<<: *other``) and not given."""
    seen: dict[str, Entry] = {}
    merged: list[yaml.Node] = []
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            continue
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{file}, line {line}: a key must be text, not a list or a mapping")
        if before := seen.get(name_of(key.value)):
            raise ValueError(
                f"{file}, line {line}: {key.value} is given already in line {before.line}: leave one of them out"
            )
        seen[name_of(key.value)] = Entry(key.value, value, line)
    for part in merged:
        if not isinstance(part, yaml.MappingNode):
            raise ValueError(f"{file}, line {part.start_mark.line + 1}: << takes a mapping, or a list of them")
        for entry in _entries(file, part, name_of):
            seen.setdefault(name_of(entry.key), entry)
    yield from seen.values()


def value_of(file: str, entry: Entry, action: argparse.Action, kind: str) -> Any:
    """The value of an option, or None where the file has none.

    Args:
        action: of the option.
        kind: "one" value, "number or word", "list", "either", "dict", which is a mapping of YAML, or "json", a list of
            anything.
    """
    where = f"{file}, line {entry.line}: {entry.key}"
    node = entry.value
    if _is_null(file, node):
        return None
    if isinstance(node, {"dict": yaml.MappingNode, "json": yaml.SequenceNode}.get(kind, ())):
        try:
            return _plain(file, entry.key, node)
        except RecursionError:
            raise ValueError(f"{where} is a mapping that holds itself") from None
    if isinstance(node, yaml.MappingNode):
        raise ValueError(f"{where} takes {'a list' if kind == 'list' else 'one value'}, and not a mapping")
    if isinstance(node, yaml.SequenceNode):
        if kind not in ("list", "either"):
            raise ValueError(f"{where} takes {'a mapping' if kind == 'dict' else 'one value'}, and not a list")
        if not node.value:
            raise ValueError(f"{where} is a list with nothing in it: give at least one value, or remove the line")
        return [_scalar(file, where, one, action) for one in node.value]
    value = _scalar(file, where, node, action)
    return [value] if kind == "list" else value


def _is_null(file: str, node: yaml.Node) -> bool:
    if node.tag not in _TAGS:
        line = node.start_mark.line + 1
        raise ValueError(f"{file}, line {line}: the tag {node.tag!r} has no meaning here; leave it out")
    return node.tag == "tag:yaml.org,2002:null"


def _scalar(file: str, where: str, node: yaml.Node, action: argparse.Action) -> Any:
    """A value by the type of its option."""
    from transformers.hf_argparser import string_to_bool  # here, as it takes a second, and `selfgen --help` reads files

    if _is_null(file, node) or not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{where} has an item that is no value, but empty, a list or a mapping")
    text, plain = node.value, node.style is None
    number = action.type in (int, float) or isinstance(action.type, NumberOr)
    if number:
        _refuse_ambiguous(where, text)
    if number and plain:
        text = {".inf": "inf", "-.inf": "-inf", "+.inf": "inf", ".nan": "nan"}.get(text.lower(), text)
    choices = action.choices
    is_switch = action.type is string_to_bool or (choices is not None and text not in choices)
    if plain and is_switch and text.lower() in _YES + _NO:
        text = "yes" if text.lower() in _YES else "no"  # the words of YAML, where the option knows these two
    if action.type is None:
        return text
    try:
        value = action.type(text)  # type: ignore[operator]
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        reason = error if isinstance(error, argparse.ArgumentTypeError) else f"invalid {_name(action)} value: {text!r}"
        raise ValueError(f"{where}: argument --{action.dest}: {reason}") from None
    if choices is not None and value not in choices:
        raise ValueError(f"{where} is {text!r}; accepted: {', '.join(map(str, choices))}")
    return value


def _refuse_ambiguous(where: str, text: str) -> None:
    if _SEVERAL_WAYS.fullmatch(text):
        raise ValueError(
            f"{where} is {text}, which some programs read as an octal, binary, hexadecimal or sexagesimal number, and "
            "others do not: write it as a decimal number, or text in quotes"
        )


def _name(action: argparse.Action) -> str:
    return getattr(action.type, "__name__", repr(action.type))


def _plain(file: str, name: str, node: yaml.Node) -> Any:
    """What a mapping means, where no option tells the types of its values: those of JSON, with yes and no."""
    if isinstance(node, yaml.MappingNode):
        return {entry.key: _plain(file, entry.key, entry.value) for entry in _entries(file, node)}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(file, name, one) for one in node.value]
    if _is_null(file, node):
        return None
    text = node.value
    if node.style is not None:  # in quotes
        return text
    if text.lower() in _YES + _NO:
        return text.lower() in _YES
    _refuse_ambiguous(f"{file}, line {node.start_mark.line + 1}: {name}", text)
    if not _is_number(text):
        return text
    return int(text) if re.fullmatch(r"[-+]?[0-9_]+", text) else float(text)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
