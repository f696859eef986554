"""Paths as they are given, and files that one process writes at a time, as a whole or not at all, in strict JSON.

Locks are those of the kernel (flock), which end with a process, whatever ends it, and reach over NFS. A file that tells
of a lock by being there would need a clock to find out that its maker has died.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

PATHS = (
    "model", "dataset", "eval_dataset", "contexts", "output_dir", "output_file", "kl_model", "teacher_model",
    "resume_from_checkpoint", "logging_dir", "accelerator_config", "fsdp_config", "deepspeed",
)  # fmt: skip
"""Options whose values are paths, or may be: a name on the hub never begins with ``~``."""

LOCK = ".lock"
"""The name of the lock of a folder."""


def expand_home(options: object) -> None:
    """Put the home folder in place of a ``~`` at the beginning of every option of ``options`` that is a path."""
    for name in PATHS:
        value = getattr(options, name, None)
        if isinstance(value, list):
            setattr(options, name, [at_home(one) for one in value])
        elif isinstance(value, str | Path):
            setattr(options, name, at_home(value))


def at_home(path: Any) -> Any:
    """``path`` with the home folder in place of a ``~`` at its beginning; what is no path stays as it is."""
    if isinstance(path, Path):
        return path.expanduser()
    return os.path.expanduser(path) if isinstance(path, str) else path


def to_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON that any reader takes: NaN and infinities are null, and what JSON does not have is text."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def code_in(file: Path) -> list[str]:
    """What loading an archive of ``torch.save`` would call, besides what tensors and arrays need; nothing is loaded."""
    from torch.serialization import get_unsafe_globals_in_checkpoint  # here, as torch takes seconds

    return sorted(name for name in get_unsafe_globals_in_checkpoint(str(file)) if not name.startswith("numpy."))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key if isinstance(key, str | int | None) else str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if hasattr(value, "tolist"):  # an array or a number of NumPy, a tensor
        return _plain(value.tolist())
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


@contextmanager
def alone(path: Path, error: type[ValueError] = ValueError, wait: float = 0) -> Iterator[None]:
    """Keep other processes from writing ``path``, a folder or a file in a folder that is there, until the block ends.

    The lock ends with the process, too, whatever ends that. Its file stays: in a folder, or next to a file.

    Raises:
        error: another process is writing it, and still is after ``wait`` seconds; below 0, it is waited for.
        SaveError: the file system has no locks.
    """
    held = _held(path, path / LOCK if path.is_dir() else path.with_name(f".{path.name}.lock"), wait)
    if held is None:
        raise error(f"another process is writing {path}: wait for it to end, or give another place")
    with held:
        yield


@contextmanager
def alone_in(folder: Path, error: type[ValueError] = ValueError, wait: float = 0) -> Iterator[None]:
    """`alone` in a folder, which is made where it is missing. An error before anything is in it leaves nothing."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with alone(folder, error, wait):
        try:
            yield
        except BaseException:
            with suppress(OSError):
                if {one.name for one in folder.iterdir()} <= {LOCK}:
                    (folder / LOCK).unlink()
                    for one in made:
                        one.rmdir()
            raise


@contextmanager
def taken(file: Path) -> Iterator[bool]:
    """Whether this process may make ``file``, in a folder that is there: not if another one has taken it and lives.

    The lock is of the kind of `alone`. Its file is gone when the block has ended without an error.
    """
    lock = file.with_name(f".{file.name}.lock")
    held = _held(file, lock)
    if held is None:
        yield False
        return
    with held:
        yield True
        with suppress(OSError):
            lock.unlink()  # who waits for this very file finds that there is nothing left to make


def _held(path: Path, lock: Path, wait: float = 0) -> AbstractContextManager | None:
    """The lock of ``path``, unless another process holds it; SaveError where the file system has none."""
    try:
        with writing(path), suppress(Timeout):
            return FileLock(lock).acquire(timeout=wait)
        return None
    except NotImplementedError as error:
        raise SaveError(
            f"{path} can't be locked ({error}): mount the file system with locks that all machines see (flock), or "
            "give a place on another one"
        ) from error


class SaveError(OSError):
    """A file or a folder can't be written."""


def check_place(path: str | Path, option: str) -> None:
    """Look, before any work, whether a file or a folder can be written at ``path``, which ``option`` has given.

    Raises:
        SaveError: it can't: a part of the path is a file, or there is no right to write there.
    """
    there = next(one for one in (Path(path), *Path(path).absolute().parents) if one.exists() or one.is_symlink())
    if there != Path(path) and not there.is_dir():
        raise SaveError(f"{option} is {str(path)!r}, but {there} is no folder: give another {option}")
    if not os.access(there, os.W_OK | os.X_OK if there.is_dir() else os.W_OK):
        raise SaveError(
            f"{option} is {str(path)!r}, but {there} can't be written to (it is read-only, or of somebody else): give "
            f"another {option}, or the right to write there"
        )


def check_file(path: str | Path, option: str) -> None:
    """``check_place`` of a file."""
    if Path(path).is_dir():
        raise SaveError(f"{option} is {str(path)!r}, which is a folder: give the name of a file")
    check_place(path, option)


def check_folder(path: str | Path, option: str) -> None:
    """``check_place`` of a folder."""
    if Path(path).exists() and not Path(path).is_dir():
        raise SaveError(f"{option} is {str(path)!r}, which is a file: give the name of a folder")
    check_place(path, option)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raise SaveError, with the name of what is written and what to do, where that fails."""
    try:
        yield
    except SaveError:
        raise
    except OSError as error:
        raise SaveError(
            f"{place} can't be written ({error.strerror or error}): make room or give the right to write there, and "
            "give the command again. What was written before is as it was"
        ) from error


def write_whole(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write all of a file or nothing of it: it is written next to its place, and then renamed.

    Raises:
        SaveError: it can't be written, as on a full disk.
    """
    partial = file.with_name(f".{file.name}.partial")  # `datasets` skips hidden files
    with writing(file):
        try:
            with open(partial, "wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(file)
        except OSError:
            with suppress(OSError):
                partial.unlink()  # which would take room
            raise


def write_json(file: Path, value: Any) -> None:
    """Write ``value`` as a whole, as ``to_json`` gives it."""
    content = f"{to_json(value, indent=1)}\n".encode()
    write_whole(file, lambda stream: stream.write(content))
