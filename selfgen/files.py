"""Files that one process writes at a time, and as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout


def lock(file: Path) -> AbstractContextManager[Any] | None:
    """A lock that is held until its end, or that of the process, whatever ends it; None if another process has it."""
    try:
        return FileLock(file).acquire(blocking=False)
    except Timeout:
        return None


def write_whole(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """All of a file or nothing of it: it is written beside its place and renamed."""
    beside = file.with_name(f".{file.name}.partial")  # `datasets` skips hidden files
    with open(beside, "wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)
