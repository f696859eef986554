"""What a section sees of the run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NoReturn

from . import results


class Skip(Exception):
    """This machine can't run the section; the message says why."""


class Lab:
    """Where a section writes what it finds, and how long it may take.

    ``rehearsal`` asks for tiny sizes on the CPU, whose times mean nothing.
    """

    def __init__(self, name: str, folder: Path, seconds: float, *, rehearsal: bool):
        self.name, self.folder, self.rehearsal = name, folder, rehearsal
        self._file = results.file_of(folder, name)
        self._deadline = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the section is killed."""
        return self._deadline - time.monotonic()

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    def row(self, table: str, columns: dict[str, Any], **values: Any) -> None:
        """A measurement. One of the same table and columns replaces an earlier one in the summary."""
        results.append(self._file, "row", table=table, columns=columns, values=values)

    def note(self, text: str) -> None:
        results.append(self._file, "note", text=text)

    def skip(self, reason: str) -> NoReturn:
        raise Skip(reason)
