"""The help of the commands without their parsers, which would load torch and transformers for seconds.

``help.json`` has what the parsers show; ``python -m tools.help`` writes it, and a test compares both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from .terminal import HelpFormatter
from .yaml_file import read_file

FILE = Path(__file__).with_suffix(".json")


def known_help(command: str, arguments: list[str]) -> str | None:
    """The text that ``arguments`` of a command, with --help, ask for; None if it is not kept."""
    kinds = json.loads(FILE.read_text(encoding="utf-8"))
    of_method = f"{command} --method {method_of(arguments)}" if command == "train" else command
    found = kinds.get(of_method, kinds.get(command))
    return found and text_of(found)


def text_of(shown: dict[str, Any]) -> str:
    """What ``ArgumentParser.format_help`` makes of the same usage, description, epilog and groups of options."""
    formatter = HelpFormatter("selfgen")
    formatter.add_usage(shown["usage"], [], [])
    formatter.add_text(shown["description"])
    for group in shown["groups"]:
        formatter.start_section(group["title"])
        formatter.add_text(group["description"])
        for option, help in group["options"].items():
            formatter.add_argument(argparse.Action([option], "", nargs=0, help=help.replace("%", "%%")))
        formatter.end_section()
    formatter.add_text(shown["epilog"])
    return formatter.format_help()


def shown_by(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What ``text_of`` takes, of a parser whose formatter is ``HelpFormatter``."""
    formatter = HelpFormatter("selfgen")
    groups = [
        {
            "title": group.title,
            "description": group.description,
            "options": {
                formatter._format_action_invocation(action): formatter._expand_help(action) if action.help else ""
                for action in group._group_actions
                if action.help != argparse.SUPPRESS
            },
        }
        for group in parser._action_groups
    ]
    return {"usage": parser.usage, "description": parser.description, "groups": groups, "epilog": parser.epilog}


def method_of(arguments: list[str]) -> str | None:
    """The method that a flag or the file asks for; it decides which options there are."""
    for place in range(len(arguments) - 1, -1, -1):
        flag, _, value = arguments[place].partition("=")
        if flag == "--method":
            return value or next(iter(arguments[place + 1 :]), None)
    if not arguments or arguments[0].startswith("-"):
        return None
    try:
        entry = read_file(arguments[0]).get("method")
    except (ValueError, OSError):  # which is reported where the file is read as a whole
        return None
    return entry.value.value if entry and isinstance(entry.value, yaml.ScalarNode) else None
