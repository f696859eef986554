"""Rows of JSON and CSV files, exactly as they stand in the file, in memory that does not grow with the file.

The readers of `datasets` take types from the first block of a file, make dates of text and numbers of cells, and count
lines within blocks. Here a row is what Python's `json` or `csv` makes of it, and a fault is named by file and line.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pyarrow as pa

FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
ROW_FORMATS = ("json", "csv", "tsv")  # those that are read here; they may be packed
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_CHUNK = 1 << 20  # bytes


def _open_zstd(file: Path) -> BinaryIO:
    if not pa.Codec.is_available("zstd"):
        raise ValueError(f"{file}: this build of pyarrow can't unpack .zst; unpack the file, or pack it with gzip")
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"))


_PACKED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
ENDINGS = f"{', '.join(FORMATS)} (the first five also with {', '.join(_PACKED)} after that)"


def format_of(path: str | Path) -> str | None:
    """The format that the ending of a file's name tells, whatever its case; None where none is read."""
    *_, inner, last = ["", "", *(suffix.lower() for suffix in Path(path).suffixes)]
    if last in _PACKED:
        return FORMATS.get(inner) if FORMATS.get(inner) in ROW_FORMATS else None
    return FORMATS.get(last)


def read_rows(file: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of one JSON or CSV file, in order.

    A JSON file holds objects, one per line or over several lines each, or one array of objects. A CSV file begins with
    the names of its columns; all its cells are text. A byte order mark and line ends of any system are no part of rows.

    Raises:
        ValueError: broken JSON or CSV, bytes that are not UTF-8, a row that is not an object, a key that is there
            twice, half a surrogate pair, a row with more or fewer cells than the header: named by file and line.
    """
    file = Path(file)
    kind, opener = format_of(file), _PACKED.get(file.suffix.lower())
    with opener(file) if opener else open(file, "rb") as stream:
        if kind == "json":
            yield from _json_rows(file, _unpacked(file, iter(lambda: stream.read(_CHUNK), b""), bool(opener)))
        else:
            yield from _csv_rows(file, _unpacked(file, stream, bool(opener)), _DELIMITERS[kind or "csv"])


def _unpacked(file: Path, pieces: Iterator[bytes], packed: bool) -> Iterator[bytes]:
    try:
        yield from pieces
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if not packed:
            raise OSError(*error.args[:2], str(file)) from error  # which file, as reading alone does not say it
        raise ValueError(f"{file} can't be unpacked ({error}); it is broken, cut off, or named wrongly") from error


def _not_utf8(file: Path, line: int, error: UnicodeDecodeError) -> ValueError:
    byte = error.object[error.start]
    return ValueError(f"{file}, line {line}: byte {byte:#x} is not UTF-8; save the file as UTF-8")


# JSON


class _RepeatedKeyError(ValueError):
    """An object has a key twice: Python's json keeps the last value, and another reader the first."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKeyError(f"the key {twice!r} is there twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_SPACE = re.compile(r"[ \t\r\n]*")


def _json_rows(file: Path, pieces: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    text = _JsonText(file, _decoded(file, pieces))
    if text.peek() != "[":
        while text.peek():
            yield text.row()
        return
    text.advance(1)
    end = text.peek()
    while end != "]":
        yield text.row()
        end = text.peek()
        if end not in (",", "]"):
            text.fail("broken JSON (expecting ',' or ']' after a row of the array)")
        if end == ",":
            text.advance(1)
    text.advance(1)
    if text.peek():
        text.fail("broken JSON (there is more after the end of the array)")


def _decoded(file: Path, pieces: Iterator[bytes]) -> Iterator[str]:
    decoder, lines = codecs.getincrementaldecoder("utf-8-sig")(), 1
    for piece, final in _marked(pieces):
        try:
            text = decoder.decode(piece, final)
        except UnicodeDecodeError as error:
            raise _not_utf8(file, lines + error.object.count(b"\n", 0, error.start), error) from error
        lines += text.count("\n")
        yield text


def _marked(pieces: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    for piece in pieces:
        yield piece, False
    yield b"", True


class _JsonText:
    """The text of a JSON file, of which a part is in memory: what was read and is not yet rows."""

    def __init__(self, file: Path, chunks: Iterator[str]):
        self.file, self.chunks = file, chunks
        self.text, self.place = "", 0  # all before `place` is done
        self.line, self.column = 1, 0  # of `place`

    def advance(self, count: int) -> None:
        end = self.place + count
        newlines = self.text.count("\n", self.place, end)
        self.line += newlines
        self.column = end - 1 - self.text.rfind("\n", self.place, end) if newlines else self.column + count
        self.place = end

    def peek(self) -> str:
        """The next character that is not white space; none at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.place)
            self.advance(match.end() - self.place if match else 0)
            if self.place < len(self.text):
                return self.text[self.place]
            if not self._read_on():
                return ""

    def _read_on(self) -> bool:
        """Read at least as much as waits to be parsed, so that a long row is parsed a few times and not many."""
        read, wanted = [], max(len(self.text) - self.place, 1)
        for chunk in self.chunks:
            read.append(chunk)
            wanted -= len(chunk)
            if wanted <= 0:
                break
        if not any(read):
            return False
        self.text, self.place = "".join([self.text[self.place :], *read]), 0
        return True

    def row(self) -> dict[str, Any]:
        self.peek()
        value, end = self._parse()
        given = self.text[self.place : end]
        if not isinstance(value, dict):
            self.fail(f"not an object but {given:.40}; rows are JSON objects in UTF-8")
        if "\\ud" in given or "\\uD" in given:
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                self.fail(f"{error.object[error.start]!a} is half of a surrogate pair, which is no text")
        self.advance(len(given))
        return value

    def _parse(self) -> tuple[Any, int]:
        while True:
            try:
                return _DECODER.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                # Only a string has no end without an error there; an escape or a word may be cut after a few letters.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
                if not (cut and self._read_on()):
                    self._fail_at(error)
            except RecursionError:
                self.fail("this row is nested too deep to be read")
            except _RepeatedKeyError as error:
                self.fail(str(error))
            except ValueError:  # more digits than Python turns into an integer
                self.fail("a number has thousands of digits; write it as text")

    def _fail_at(self, error: json.JSONDecodeError) -> NoReturn:
        before = self.text[self.place : error.pos]
        if error.pos >= len(self.text):
            before = before.rstrip()
        newlines = before.count("\n")
        column = len(before) - before.rfind("\n") if newlines else self.column + len(before) + 1
        if newlines and self.text.startswith("{", error.pos) and not before[before.rfind("\n") :].strip():
            self.fail(f"broken JSON (the object has no end before the one that begins in line {self.line + newlines})")
        self.line += newlines
        self.fail(f"broken JSON ({error.msg.removesuffix(' at')} at column {column}); rows are JSON objects in UTF-8")

    def fail(self, fault: str) -> NoReturn:
        raise ValueError(f"{self.file}, line {self.line}: {fault}")


# CSV


def _csv_rows(file: Path, lines: Iterator[bytes], delimiter: str) -> Iterator[dict[str, str]]:
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # a cell may be a book
    reader = csv.reader(_decoded_lines(file, lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{file}, line {line}: broken CSV ({error})") from error
        if not cells:  # an empty line
            continue
        if not header:
            header = cells
            if twice := [name for name in header if header.count(name) > 1]:
                raise ValueError(f"{file}, line {line}: two columns have the name {twice[0]!r}; rename one")
        elif len(cells) != len(header):
            raise ValueError(
                f"{file}, line {line}: {len(cells)} cells, but the header has {len(header)}; put a cell that holds "
                f"{delimiter!r}, a quote or a new line into double quotes"
            )
        else:
            yield dict(zip(header, cells, strict=True))


def _decoded_lines(file: Path, lines: Iterator[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(file, number, error) from error
