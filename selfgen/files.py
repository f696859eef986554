"""Files that one process writes at a time, and as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout


@contextmanager
def alone(path: Path, error: type[ValueError] = ValueError) -> Iterator[None]:
    """Keep other processes from writing ``path``, a folder or a file in a folder that is there, until the block ends.

    The lock ends with the process, too, whatever ends that. Its file stays: in a folder, or next to a file.

    Raises:
        error: another process is writing it.
    """
    lock = FileLock(path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock"))
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        raise error(f"another process is writing {path}: wait for it to end") from None
    with held:
        yield


def write_whole(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write all of a file or nothing of it: it is written next to its place, and then renamed."""
    partial = file.with_name(f".{file.name}.partial")  # `datasets` skips hidden files
    with open(partial, "wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
