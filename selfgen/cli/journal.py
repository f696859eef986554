"""Files of JSON lines, which the same command completes after a kill."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..files import alone, to_json, write_json, write_whole, writing
from ..provenance import differences
from ..sharing import Parts

Make = Callable[[list[dict], Callable[[int], object]], list[dict]]
"""From rows, and what is called with a number of rows whenever these are done, to the lines of these rows."""
NAMES = {"model", "revision", "trust_remote_code", "dataset", "dataset_config", "dataset_split"}
"""Settings that lead to weights and rows, which may differ: hashes tell weights and rows apart."""


LATER = {"weights", "rows", "vocab_size"}
"""Settings that the model and the rows tell, once they are loaded."""


def _settings_of(file: Path) -> Path:
    return file.with_name(file.name + ".settings.json")


def read(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and rows of a journal, as far as there are any."""
    settings = _settings_of(file)
    content = _text_of(file) if file.exists() else ""
    lines = content[: content.rfind("\n") + 1].split("\n")[:-1]
    found = _loads(settings, 1, _text_of(settings)) if settings.exists() else {}
    return found, [_loads(file, number, line) for number, line in enumerate(lines, start=1)]


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 ({error.reason} at byte {error.start}); give another place, or remove the file"
        ) from None


def _loads(file: Path, line: int, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{file}, line {line}: broken JSON ({error}); give another place, or remove the file"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}, line {line}: not an object but {text:.40}; give another place, or remove the file")
    return found


_AGREED = ("chunk_rows", "batch_size", "method", "token_budget", "balance")
"""What is noted down next to the settings by the first process, for all."""
_WAIT = 600.0  # seconds for which another process may note something down, such as a budget that it measures first


def check_known(file: Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError, before anything is loaded, where `Journal` would with these settings and those of LATER."""
    _check_settings(file, settings, LATER)
    read(file)


def _check_settings(file: Path, settings: Mapping[str, Any], unknown: set[str]) -> dict[str, Any] | None:
    """What the file of settings says; None if it is to be written.

    Raises:
        ValueError: ``file`` holds rows of other settings, but for ``unknown`` ones, or something else.
    """
    if file.is_dir():
        raise ValueError(f"{file} is a folder: give the name of a file")
    noted = _settings_of(file)
    found = _loads(noted, 1, _text_of(noted)) if noted.exists() else None
    other = differences(found or {}, settings, ignore=NAMES.union(_AGREED, unknown))
    if found is not None and not other:
        return found
    if file.exists() or _chunks_of(file).exists():
        if found is None:
            raise ValueError(f"selfgen did not write {file}, and would add rows to it: give another file or folder")
        there = file if file.exists() else _chunks_of(file)
        raise ValueError(
            f"{there} holds rows that were made with other settings ({'; '.join(other)}): give the former ones, or "
            "another file or folder, or remove it"
        )
    return None


def _chunks_of(file: Path) -> Path:
    return file.with_name(f".{file.name}.chunks")


class Journal:
    """A file of rows, written in order and in whole lines, with the settings that they were made with next to it.

    Several processes may write it at once. Each makes chunks of rows, as files in a hidden folder next to it, and adds
    all that are next in order.

    Args:
        file: of JSON lines; what a kill left of a chunk is removed. Values that JSON does not have become text, and NaN
            and infinities null.
        settings: what must be the same for more rows to be added; kept in ``FILE.settings.json``.

    Raises:
        ValueError: the file holds rows of other settings, or something else.
    """

    def __init__(self, file: Path, settings: dict[str, Any]):
        self.file, self.settings = file, settings
        self._chunks = _chunks_of(file)
        self._rows, self._chunk_rows = 0, 1
        self._place, self._written = 0, 0  # where the rows end that were found in the file, and how many these are
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._check_settings()
            self.rows()  # an error shows before hours of work

    def _alone(self) -> AbstractContextManager:
        return alone(self.file, wait=_WAIT)

    def _is_begun(self) -> bool:
        return self.file.exists() or self._chunks.exists()

    def _check_settings(self) -> dict[str, Any]:
        """What the settings file says, which is written if there is none."""
        found = _check_settings(self.file, self.settings, set())
        if found is None:
            found = dict(self.settings)
            write_json(_settings_of(self.file), found)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """The rows that are written."""
        return read(self.file)[1]

    def complete(
        self,
        rows: Dataset,
        chunk_rows: int,
        make: Make,
        title: str,
        agree: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda found: {},
    ) -> None:
        """Write the lines that ``make`` makes of the rows that have none yet, together with other processes.

        Args:
            rows: all rows.
            chunk_rows: rows that are made and written at a time; a file keeps those that it began with.
            make: the lines of some rows.
            title: of the bar.
            agree: from what the first process has noted down to what must be so in all of them, as `sharing.rounding`.
        """
        with self._alone():
            found = self._check_settings()
            if not self._is_begun():
                found = {name: value for name, value in found.items() if name not in _AGREED}
            self._rows, self._chunk_rows = len(rows), found.get("chunk_rows", chunk_rows)
            self._place, self._written = 0, 0
            if self._chunks_written() * self._chunk_rows < len(rows):
                agreed = {"chunk_rows": self._chunk_rows, **agree(found)}
                if not agreed.items() <= found.items():
                    write_json(_settings_of(self.file), found | agreed)
                with writing(self.file):
                    self._chunks.mkdir(exist_ok=True)
        parts = [
            range(start, min(start + self._chunk_rows, len(rows))) for start in range(0, len(rows), self._chunk_rows)
        ]

        def write(number: int, done: Callable[[int], object]) -> None:
            lines = make([rows[i] for i in parts[number]], done)
            content = "".join(f"{to_json(line)}\n" for line in lines).encode()
            write_whole(self._chunk(number), lambda stream: stream.write(content))
            self._gather()

        chunks = Parts(
            [self._chunk(number) for number in range(len(parts))],
            [len(part) for part in parts],
            lambda number: self._chunk(number).exists() or number < self._chunks_written(),  # in this order
        )
        chunks.complete(write, title, progress=True)
        self._gather()
        if self._chunks_written() < len(parts):
            raise ValueError(f"{self.file} was changed by something else meanwhile: give the command again")
        shutil.rmtree(self._chunks, ignore_errors=True)

    def _chunk(self, number: int) -> Path:
        return self._chunks / f"{number:06d}.{self.file.name}"

    def _chunks_written(self) -> int:
        """How many chunks the file has as a whole. Only what comes after those that were found before is read."""
        with suppress(FileNotFoundError), self.file.open("rb") as stream:
            stream.seek(self._place)
            size = count = 0
            for line in stream:
                size, count = size + len(line), count + line.endswith(b"\n")
                if count == min(self._chunk_rows, self._rows - self._written * self._chunk_rows):
                    self._place, self._written = self._place + size, self._written + 1
                    size = count = 0
        return self._written

    def _gather(self) -> None:
        """Add the chunks that are next to the file, in order, and remove what a kill has left after the last one."""
        with self._alone():
            while True:
                chunk = self._chunk(self._chunks_written())
                with writing(self.file):
                    if self.file.exists() and self.file.stat().st_size > self._place:
                        os.truncate(self.file, self._place)
                    try:
                        content = chunk.read_bytes()
                    except FileNotFoundError:
                        return
                    self._append(content)
                    chunk.unlink()

    def _append(self, content: bytes) -> None:
        """Add all of it, or nothing."""
        try:
            with self.file.open("ab") as lines:
                lines.write(content)
                lines.flush()
                os.fsync(lines.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(self.file, self._place)
            raise
