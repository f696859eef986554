"""Rows of JSON and CSV files as a `Dataset`: every cell comes back as the file has it, and memory stays bounded.

A first pass over all rows finds the type of each column, and a second one writes an Arrow file into the cache of
`datasets`, where it is found again.
"""

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from filelock import FileLock

from .row_files import format_of, read_rows

_VERSION = 1  # of what is written: a file of another version is not read
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 1 << 24
_IS_JSON = {b"selfgen": b"json"}  # metadata of a field
_PLAIN: dict[type, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
_Types = dict[str, pa.DataType | None]  # of columns; None is JSON

# What a column of JSON is in Arrow, and the feature of `datasets` for it; old versions have none.
_BASE: Any = getattr(datasets, "Json", datasets.Value)
_JSON = pa.json_() if hasattr(datasets, "Json") else pa.string()


class Json(_BASE):
    """Any JSON, read by Python's `json`: that of `datasets` changes last digits of floats and has no long integers.

    Rows, columns, iteration and `map` are exact. `Dataset.to_list` reads by itself: with it, floats within lists and
    objects may differ in the last digit, and where `datasets` is older than its own `Json`, such a cell is JSON text.
    """

    def __init__(self) -> None:
        super().__init__(*([] if hasattr(datasets, "Json") else ["string"]))

    def __repr__(self) -> str:
        return "Json()"

    def decode_example(self, text: str | None, token_per_repo_id: Any = None) -> Any:
        return None if text is None else json.loads(text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BASE if hasattr(datasets, "Json") else Json)

    __hash__ = None  # type: ignore[assignment]


class _Id(str):
    """A cell of a CSV file that can be an integer."""


def cache_folder() -> Path:
    """The folder of `datasets` for what it has read.

    Raises:
        OSError: it can't be made or written, so that no data set can be blamed for it.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    remedy = "set HF_DATASETS_CACHE or HF_HOME to a folder that can be written"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"the cache folder of `datasets` can't be made ({error}); {remedy}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"the cache folder of `datasets`, {folder}, can't be written; {remedy}")
    return folder


class CacheError(OSError):
    """The cache folder of `datasets` is full."""


@contextmanager
def room_in_cache() -> Iterator[None]:
    """Raise CacheError where it is full, of which `datasets` may say just that a file is closed."""
    try:
        yield
    except Exception as error:
        reason: BaseException | None = error
        while reason is not None and not _says_full(reason):
            reason = reason.__cause__ or reason.__context__
        if reason is None:
            raise
        raise CacheError(
            f"the cache folder of `datasets`, {datasets.config.HF_DATASETS_CACHE}, is full ({reason}): make room, or "
            "set HF_DATASETS_CACHE or HF_HOME to a folder that has it"
        ) from error


def _says_full(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return full or "Not enough disk space" in str(error)


def rows_dataset(sources: Sequence["Path | datasets.Dataset"], columns: Sequence[str] | None) -> datasets.Dataset:
    """All rows of JSON and CSV files, and of data sets, one after another; of `columns` those that are there.

    A column is text, int64, float64 or bool where all its cells are that (or null), and otherwise `Json`. A CSV file's
    are text, except a `sample_id` of integers. What a row lacks is None.

    Raises:
        ValueError: as `read_rows`; none of `columns` is there; a file that changes while it is read.
    """
    key = _key(sources, columns)
    file = cache_folder() / "selfgen" / key / "rows.arrow"
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(file.with_suffix(".lock")):  # other processes wait for the one that writes
                if not file.exists():
                    with room_in_cache():
                        _write(file, key, sources, columns)
                    if _key(sources, columns) != key:
                        file.unlink()
                        raise ValueError(f"{_name(sources)} changed while it was read; read it when it is complete")
        except OSError as error:
            other = error.filename and not str(error.filename).startswith(str(file.parent))
            if other or isinstance(error, CacheError):
                raise
            raise OSError(f"{_name(sources)} can't be written to the cache folder {file.parent}: {error}") from error
    with pa.memory_map(str(file)) as stream:
        schema = pa.ipc.open_stream(stream).schema
    features = {f.name: Json() if f.metadata == _IS_JSON else datasets.Value(str(f.type)) for f in schema}
    return datasets.Dataset.from_file(str(file), info=datasets.DatasetInfo(features=datasets.Features(features)))


def exact_json(dataset: datasets.Dataset) -> datasets.Dataset:
    """A data set that `datasets` has read, its columns of JSON read exactly, too."""
    if "Json(" not in repr(dataset.features):
        return dataset
    info = dataset.info.copy()
    info.features = datasets.Features({name: _exact(feature) for name, feature in dataset.features.items()})
    return datasets.Dataset(dataset.data, info=info, split=dataset.split, fingerprint=dataset._fingerprint)


def _exact(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _exact(inner) for name, inner in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return dataclasses.replace(feature, feature=_exact(feature.feature))
    return Json() if type(feature) is getattr(datasets, "Json", None) else feature


def _name(sources: Sequence["Path | datasets.Dataset"]) -> str:
    names = [str(source) for source in sources if isinstance(source, Path)]
    return (names[0] if len(names) == 1 else f"{names[0]} or a file next to it") if names else "the data set"


def _key(sources: Sequence["Path | datasets.Dataset"], columns: Sequence[str] | None) -> str:
    parts: list[Any] = [_VERSION, str(_JSON), None if columns is None else sorted(columns)]
    for source in sources:
        if isinstance(source, Path):
            state = source.stat()
            parts.append([str(source.resolve()), state.st_size, state.st_mtime_ns])
        else:
            parts.append(source._fingerprint)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _rows(source: "Path | datasets.Dataset") -> Iterator[dict[str, Any]]:
    if not isinstance(source, Path):
        yield from source
    elif format_of(source) == "json":
        yield from read_rows(source)
    else:
        for row in read_rows(source):
            cell = row.get("sample_id", "")
            yield row | {"sample_id": _Id(cell)} if _is_integer(cell) else row


def _is_integer(cell: str) -> bool:
    digits = cell.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 20 and -(2**63) <= int(cell) < 2**63


def _find_types(rows: Iterable[dict[str, Any]], columns: Sequence[str] | None) -> _Types:
    """The type of each column, in the order in which the rows bring them."""
    seen: dict[str, set[type]] = {}
    for row in rows:
        for column, cell in row.items():
            kind = type(cell)
            if kind is int and not -(2**63) <= cell < 2**63:
                kind = object
            try:
                seen[column].add(kind)
            except KeyError:
                seen[column] = {kind}
    if columns is not None and seen and seen.keys().isdisjoint(columns):
        raise ValueError(f"none of the columns {', '.join(columns)} is there; there are {', '.join(seen)}")
    return {column: _type(kinds) for column, kinds in seen.items() if columns is None or column in columns}


def _type(kinds: set[type]) -> pa.DataType | None:
    kinds = kinds - {type(None)}
    if _Id in kinds:
        kinds = {int} if kinds <= {_Id, int} else kinds - {_Id} | {str}
    if not kinds:
        return pa.string()
    return _PLAIN.get(next(iter(kinds))) if len(kinds) == 1 else None  # 1 and 1.5 are JSON, so that 1 stays 1


def _write(file: Path, key: str, sources: Sequence["Path | datasets.Dataset"], columns: Sequence[str] | None) -> None:
    types = _find_types((row for source in sources for row in _rows(source)), columns)
    fields = [pa.field(name, kind or _JSON, metadata=None if kind else _IS_JSON) for name, kind in types.items()]
    schema = pa.schema(fields, metadata={"huggingface": json.dumps({"fingerprint": key})})
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with pa.OSFile(str(partial), "wb") as stream, pa.ipc.new_stream(stream, schema) as writer:
            for batch in _batches((row for source in sources for row in _rows(source)), types):
                arrays = [_array(cells, types[name]) for name, cells in batch.items()]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _batches(rows: Iterable[dict[str, Any]], types: _Types) -> Iterator[dict[str, list]]:
    """Columns of some rows at a time, with JSON as text."""
    batch: dict[str, list] = {name: [] for name in types}
    count = size = 0
    for row in rows:
        for name, cells in batch.items():
            cell = row.get(name)
            if cell is not None and types[name] is None:
                cell = json.dumps(cell, ensure_ascii=False)
            elif type(cell) is _Id and types[name] == pa.int64():
                cell = int(cell)
            cells.append(cell)
            size += len(cell) if isinstance(cell, str) else 8
        count += 1
        if count == _BATCH_ROWS or size > _BATCH_CHARACTERS:
            yield batch
            batch, count, size = {name: [] for name in types}, 0, 0
    if count:
        yield batch


def _array(cells: list, kind: pa.DataType | None) -> pa.Array:
    if kind is None and isinstance(_JSON, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(_JSON, pa.array(cells, pa.string()))
    return pa.array(cells, kind or _JSON)
