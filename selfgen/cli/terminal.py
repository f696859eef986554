"""What a command shows in the terminal: help, and errors of one line. Nothing heavy is imported for it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

_FIRST_SPEAKS = 10.0  # seconds that other processes of a machine wait before they tell an error


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling per option, and no metavar that repeats its name; yes and no in place of True and False."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(120, shutil.get_terminal_size().columns))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None:  # the help says what none is
            return action.help
        if isinstance(default, list):
            return f"{action.help} (default: {' '.join(map(str, default))})"
        if isinstance(default, bool):
            return f"{action.help} (default: {'yes' if default else 'no'})"
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flag = max(action.option_strings, key=lambda one: (len(one), "_" not in one))
        if action.nargs == 0:
            return flag
        if getattr(action.type, "__name__", "") == "string_to_bool":  # of transformers; the flag alone is yes
            return f"{flag} [yes|no]"
        return f"{flag} {'|'.join(action.choices) if action.choices else '…'}"


def meant(word: str, known: Iterable[str]) -> str:
    """What to add to the error for a ``word`` that is unknown: the known one that it is most like, if any."""
    names = {one.lstrip("-"): one for one in known}  # dashes make all flags alike
    close = difflib.get_close_matches(word.lstrip("-"), names, n=1)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def fail(message: object, command: str) -> NoReturn:
    """End with one line. Of the processes of a machine the first one says it: torchrun then ends the others."""
    line = f"{command}: error: {' '.join(str(message).split())}"
    if not first_here() and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(_FIRST_SPEAKS)  # after that, the error is this process's alone
    print(line, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun writes what is there at the end
        with contextlib.suppress(OSError):
            told = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": told}), encoding="utf-8")
    raise SystemExit(2)


def first_here() -> bool:
    """Whether this process is alone, or the first one of this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
