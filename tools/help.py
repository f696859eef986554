"""Write selfgen/cli/help.json, which `selfgen COMMAND --help` shows, and what the docs have from the code
(``tools.reference``); run it after a change of an option, a field or a docstring.
"""

from __future__ import annotations

import argparse
import io
import json
from contextlib import redirect_stdout, suppress
from importlib import import_module
from typing import Any
from unittest.mock import patch

from selfgen.cli import COMMANDS
from selfgen.cli.help import FILE, shown_by
from selfgen.cli.options import Parser
from tools import reference

KINDS = [*COMMANDS, "train --method rac"]


def parser_of(kind: str) -> Parser | None:
    """That of a command and its method; None if the command has one of another class, which is fast by itself."""
    command, *arguments = kind.split()
    shows = patch.object(Parser, "print_help", autospec=True)
    with shows as shown, redirect_stdout(io.StringIO()), suppress(SystemExit):
        import_module(f"selfgen.cli.{command}").run([*arguments, "--help"])
    return shown.call_args[0][0] if shown.called else None


def everything() -> dict[str, Any]:
    """By the kind: what its parser shows."""
    return {kind: shown_by(parser) for kind in KINDS if (parser := parser_of(kind))}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    FILE.write_text(json.dumps(everything(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for page, text in reference.pages().items():
        page.parent.mkdir(exist_ok=True)
        page.write_text(text, encoding="utf-8")
