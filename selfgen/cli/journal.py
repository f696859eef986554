"""Files of JSON lines, which the same command completes after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from ..files import alone, to_json, write_json, writing
from ..provenance import differences

NAMES = {"model", "revision", "trust_remote_code", "dataset", "dataset_config", "dataset_split"}
"""Settings that lead to weights and rows, which may differ: hashes tell weights and rows apart."""


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


class Journal:
    """A file of rows, written in order and in whole lines, with the settings that they were made with next to it.

    Args:
        file: of JSON lines; what a kill left of a line is removed. Values that JSON does not have become text, and NaN
            and infinities null.
        settings: what must be the same for more rows to be added; kept in ``FILE.settings.json``.

    Raises:
        ValueError: the file holds rows of other settings, or something else.
    """

    def __init__(self, file: Path, settings: dict[str, Any]):
        self.file = file
        if file.is_dir():
            raise ValueError(f"{file} is a folder: give the name of a file")
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_json(_settings_of(file), settings)
        elif not _settings_of(file).exists():
            raise ValueError(f"selfgen did not write {file}, and would add rows to it: give another file or folder")
        elif other := differences(read(file)[0], settings, ignore=NAMES):
            raise ValueError(
                f"{file} holds rows that were made with other settings ({'; '.join(other)}): give the former ones, or "
                "another file or folder, or remove it"
            )

    def _cut_off_half_line(self) -> None:
        if self.file.exists():
            with self.file.open("rb+") as lines:
                lines.truncate(lines.read().rfind(b"\n") + 1)

    def rows(self) -> list[dict[str, Any]]:
        """The rows that are written."""
        return read(self.file)[1]

    def complete(self, rows: Dataset, chunk_rows: int, make: Callable[[list[dict]], list[dict]], title: str) -> None:
        """Write the lines that ``make`` makes of the rows that have none yet, ``chunk_rows`` at a time."""
        with alone(self.file):
            self._cut_off_half_line()
            self._complete(rows, chunk_rows, make, title)

    def _complete(self, rows: Dataset, chunk_rows: int, make: Callable[[list[dict]], list[dict]], title: str) -> None:
        begin = len(self.rows())
        with tqdm(total=len(rows), initial=begin, desc=title) as bar:
            for start in range(begin, len(rows), chunk_rows):
                part = [rows[i] for i in range(start, min(start + chunk_rows, len(rows)))]
                self.append(make(part))
                bar.update(len(part))

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add whole lines, or nothing."""
        before = self.file.stat().st_size if self.file.exists() else 0
        content = "".join(to_json(row) + "\n" for row in rows).encode()
        with writing(self.file):
            try:
                with self.file.open("ab") as lines:
                    lines.write(content)
                    lines.flush()
                    os.fsync(lines.fileno())
            except OSError:
                with suppress(OSError):
                    os.truncate(self.file, before)
                raise
