"""Rows of any usual fine-tuning data set: a file, a folder, a name on the Hub, or a data set in memory."""

import glob
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id

from .folders import find_splits
from .row_files import ENDINGS, ROW_FORMATS, format_of, read_rows
from .row_tables import CacheError, cache_folder, exact_json, room_in_cache, rows_dataset
from .slices import refuse_transform, take_split, take_stream

logger = logging.getLogger(__name__)

_ANSWERS_WITHIN = 10.0  # seconds, of the hub
_STREAMS = (datasets.IterableDataset, datasets.IterableDatasetDict)


def load_rows(
    name_or_path: "str | Path | datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset",
    *,
    split: str = "train",
    config_name: str | None = None,
    columns: Sequence[str] | None = None,
    streaming: bool = False,
) -> "datasets.Dataset | datasets.IterableDataset":
    """Load one split of a data set, unchanged.

    A row of a JSON file is what Python's `json` makes of it; what a row lacks is None (in a stream it stays away). A
    column of lists, objects or mixed types is a `Json` feature. A cell of a CSV file is the text in the file, except
    those of a column `sample_id` of integers. Both are read in two passes, in bounded memory, into an Arrow file in the
    cache of `datasets`, by whichever process comes first.

    Args:
        name_or_path: a `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv` (all of them also with `.gz`, `.bz2`, `.xz`,
            `.zst`), `.parquet` or `.arrow` file, a folder of such files, a `save_to_disk` folder, or else the name of a
            data set on the Hub. A `Dataset` is returned as it is, a `DatasetDict` gives a split.
        split: a split or a slice of splits, in the notation of `datasets` ("train", "train[:1000]", "train+test").
            A single file, or a single data set saved with `save_to_disk`, is the split "train". Files of a folder that
            are of no split are named in a warning.
        config_name: the configuration of a data set on the Hub ("main" for `openai/gsm8k`) or of a folder.
        columns: read only those of these columns that are there, so that no other column can be in the way.
        streaming: return an `IterableDataset`, which reads rows when they are asked for; a stream is returned as it is.
            Slices are `split[:n]`, `split[n:]`, `split[m:n]`. Files are its shards.

    Raises:
        FileNotFoundError: `name_or_path` is not here and cannot be loaded from the Hub.
        OSError: a file can't be opened, or the cache folder can't be written.
        ValueError: an unreadable file (a fault in JSON or CSV is named by file and line), an unknown split, no rows, a
            data set with a transform.
        TypeError: a stream without `streaming`, or something that is no data set at all.
    """
    loaded: Any
    if isinstance(name_or_path, (str, Path)):
        source, loaded = str(name_or_path), _load(name_or_path, config_name, columns, streaming)
    else:
        source, loaded = "the data set", name_or_path
    if isinstance(loaded, datasets.DatasetDict):
        loaded = take_split(source, loaded, split)
    elif isinstance(loaded, datasets.IterableDatasetDict) and streaming:
        loaded = take_stream(source, loaded, split)
    require_map_style(loaded, streaming)
    if not isinstance(loaded, _STREAMS) and len(loaded) == 0:
        raise ValueError(f"{source} has no rows in split {split!r}; at least one is needed")
    if columns is not None and loaded.column_names is not None:
        found = _present(source, loaded.column_names, columns)
        loaded = loaded if found == loaded.column_names else loaded.select_columns(found)
    return loaded.to_iterable_dataset() if streaming and not isinstance(loaded, _STREAMS) else loaded


def _load(name_or_path: str | Path, config_name: str | None, columns: Sequence[str] | None, streaming: bool) -> Any:
    path = Path(name_or_path).expanduser()
    if path.is_file():
        if not format_of(path):
            raise ValueError(f"{path} ends in {path.suffix!r}; accepted are {ENDINGS}, or a folder")
        return _dict({"train": _load_files([path], columns, streaming)})
    if path.is_dir():
        return _load_folder(path, config_name, columns, streaming)
    if path.exists():
        raise ValueError(f"{path} is neither a file nor a folder, so it can't be read twice; save its rows in a file")
    missing = f"{str(name_or_path)!r} is neither a file or folder here nor could it be loaded from the Hub"
    if format_of(path) or not _may_be_on_the_hub(str(name_or_path)):  # do not wait for the network
        raise FileNotFoundError(f"{missing} (it can't be a data set's name); check the path, relative to {Path.cwd()}")
    cache_folder()
    silence = _silence_of_the_hub(str(name_or_path))
    try:
        with room_in_cache(), _cache_alone() if silence else nullcontext():
            loaded = datasets.load_dataset(str(name_or_path), config_name, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        if silence:
            raise FileNotFoundError(
                f"{missing}, which can't be reached ({silence}), and {datasets.config.HF_DATASETS_CACHE} has no copy: "
                "check the path, give a local file, or set HF_HOME to a cache that has the data set"
            ) from error
        raise FileNotFoundError(f"{missing} ({error}); check the path or name, and the network") from error
    return _dict(dict(loaded))


def _silence_of_the_hub(name: str) -> Exception | None:
    """Why the hub does not answer when it is asked once for a data set; None if it does."""
    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return None
    try:
        get_hf_file_metadata(hf_hub_url(name, "README.md", repo_type="dataset"), timeout=_ANSWERS_WITHIN)
    except HfHubHTTPError:  # an answer, too
        return None
    except Exception as error:  # of the network, by whichever client the hub's library has
        return error
    return None


@contextmanager
def _cache_alone() -> Iterator[None]:
    """`datasets` looks for data in its cache alone: it would ask a silent hub six times, for half a minute."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _may_be_on_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _dict(splits: dict[str, Any]) -> Any:
    if any(isinstance(rows, datasets.IterableDataset) for rows in splits.values()):
        return datasets.IterableDatasetDict(splits)
    return datasets.DatasetDict({name: exact_json(rows) for name, rows in splits.items()})


# Folders and files


def _load_folder(folder: Path, config_name: str | None, columns: Sequence[str] | None, streaming: bool) -> Any:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(folder)
        except Exception as error:  # `datasets` has no common base class for what a bad file can do to its readers
            raise ValueError(
                f"{folder} was written by save_to_disk and is not complete or is broken ({error}); write it again"
            ) from error
        return _dict(dict(saved)) if isinstance(saved, datasets.DatasetDict) else _dict({"train": saved})
    splits, left_out = ({}, {}) if _has_card(folder) else find_splits(folder)
    if not splits:
        return _load_by_datasets(folder, config_name, streaming)
    shared = {file: names for file, names in _splits_of(splits).items() if len(names) > 1}
    notes = [
        *(f"{file.relative_to(folder)} is left out ({why})" for file, why in left_out.items()),
        *(f"{file.relative_to(folder)} is in {' and in '.join(names)}, by its name" for file, names in shared.items()),
    ]
    if notes:
        more = f"; and {len(notes) - 50} more files" if len(notes) > 50 else ""
        logger.warning("%s: %s%s", folder, "; ".join(notes[:50]), more)
    return _dict({name: _load_files(files, columns, streaming) for name, files in splits.items()})


def _splits_of(splits: dict[str, list[Path]]) -> dict[Path, list[str]]:
    names: dict[Path, list[str]] = {}
    for name, files in splits.items():
        for file in files:
            names.setdefault(file, []).append(name)
    return names


def _has_card(folder: Path) -> bool:
    """Whether a folder says in the card of a data set, or in a file of its own, which files are its splits."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"\ufeff?---\s*\n(.*?)\n---", text, re.DOTALL)
    return (folder / ".huggingface.yaml").is_file() or bool(front and re.search(r"^configs:", front[1], re.MULTILINE))


def _load_by_datasets(folder: Path, config_name: str | None, streaming: bool) -> Any:
    cache_folder()
    try:
        known = datasets.get_dataset_config_names(str(folder))
        # A folder of plain files has one configuration, which has no name to be asked for.
        name = config_name if known != ["default"] else None
        with room_in_cache():
            loaded = datasets.load_dataset(str(folder), name, streaming=streaming)
    except CacheError:
        raise
    except Exception as error:  # as above
        raise ValueError(
            f"{folder} holds no rows that `datasets` can read: {error.__cause__ or error!r}. Files of a folder "
            f"without a data set card end in {ENDINGS}"
        ) from error
    return _dict(dict(loaded))


def _load_files(files: list[Path], columns: Sequence[str] | None, streaming: bool) -> Any:
    """The rows of one split: of files of any kinds, if their columns agree."""
    kinds: dict[str, list[Path]] = {}
    for file in files:
        kind = format_of(file) or ""
        kinds.setdefault("rows" if kind in ROW_FORMATS else kind, []).append(file)
    parts = [_load_kind(kind, group, columns, streaming) for kind, group in kinds.items()]
    if len(parts) == 1:
        return parts[0]
    names = [sorted(set(next(iter(part), {})) if streaming else part.column_names) for part in parts]
    firsts = [str(group[0]) for group in kinds.values()]
    if any(one != names[0] for one in names):
        given = "; ".join(f"{first}: {', '.join(one)}" for first, one in zip(firsts, names, strict=True))
        raise ValueError(f"files of one split have different columns ({given}); keep one kind of them in the folder")
    if streaming or all(part.features == parts[0].features for part in parts):
        return datasets.concatenate_datasets(parts)
    try:
        return rows_dataset(parts, columns)
    except TypeError as error:  # cells that JSON has no form for, such as dates
        raise ValueError(
            f"files of one split have columns of different types ({' and '.join(firsts)}: {error}); keep one kind of "
            "them in the folder"
        ) from error


def _load_kind(kind: str, files: list[Path], columns: Sequence[str] | None, streaming: bool) -> Any:
    if kind == "rows":
        if not streaming:
            return rows_dataset(files, columns)
        cache_folder()  # `datasets` makes it for a stream, too
        arguments = {"files": [str(file) for file in files], "columns": columns and tuple(columns)}
        return datasets.IterableDataset.from_generator(_stream_rows, gen_kwargs=arguments)
    schemas = [_schema(kind, file) for file in files]  # so that a broken file is named
    chosen = {}
    if columns is not None and kind == "parquet":
        there = list(dict.fromkeys(name for schema in schemas for name in schema.names))
        chosen["columns"] = _present(str(files[0]), there, columns)
    cache_folder()
    escaped = [glob.escape(str(file)) for file in files]
    try:
        with room_in_cache():
            return datasets.load_dataset(kind, data_files=escaped, split="train", streaming=streaming, **chosen)
    except CacheError:
        raise
    except Exception as error:  # as above
        among = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files of its split"
        others = [file for file, schema in zip(files, schemas, strict=True) if not schema.equals(schemas[0])]
        if others:
            among = f"{others[0]} has other columns or types than {files[0]}, of the same split"
        raise ValueError(f"{among}: no rows that `datasets` can read: {error.__cause__ or error!r}") from error


def _schema(kind: str, file: Path) -> pa.Schema:
    try:
        if kind == "parquet":
            return pq.read_schema(file)
        with pa.memory_map(str(file)) as source:
            try:
                return pa.ipc.open_stream(source).schema
            except pa.ArrowInvalid:
                return pa.ipc.open_file(source).schema
    except pa.ArrowException as error:
        raise ValueError(f"{file} can't be read as {kind.capitalize()} ({error}); it is broken or cut off") from error


def _stream_rows(files: list[str], columns: tuple[str, ...] | None) -> Iterator[dict[str, Any]]:
    """Rows of JSON and CSV files, for a stream; a list of files is what `datasets` splits over workers and ranks."""
    for file in files:
        for row in read_rows(file):
            yield row if columns is None else {name: row[name] for name in columns if name in row}


def _present(source: str, there: Sequence[str], columns: Sequence[str]) -> list[str]:
    if found := [name for name in there if name in columns]:
        return found
    raise ValueError(f"{source} has none of the columns {', '.join(columns)}; it has {', '.join(there)}")


def require_map_style(dataset: Any, streaming: bool = False) -> None:
    """Raise unless `dataset` is a `Dataset` whose rows are what it holds, or a stream where `streaming` allows one."""
    if isinstance(dataset, datasets.IterableDataset) and streaming:
        return
    if isinstance(dataset, _STREAMS):
        raise TypeError(
            "a streaming data set has no row numbers or length; give streaming=True (--streaming), load it without "
            "streaming, or keep a part of it with datasets.Dataset.from_list(list(stream.take(n)))"
        )
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"expected a name, a path or a datasets.Dataset, not {type(dataset).__name__}")
    refuse_transform(dataset)
