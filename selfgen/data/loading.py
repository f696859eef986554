"""Rows of any usual fine-tuning data set: a file, a folder, a name on the Hub, or a data set in memory."""

import glob
import json
from pathlib import Path
from typing import Any

import datasets

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


def load_rows(
    name_or_path: "str | Path | datasets.Dataset | datasets.DatasetDict",
    *,
    split: str = "train",
    config_name: str | None = None,
) -> datasets.Dataset:
    """Load one split of a data set, unchanged.

    Args:
        name_or_path: a `.jsonl`, `.json`, `.parquet` or `.arrow` file, a folder of such files, a `save_to_disk` folder,
            or else the name of a data set on the Hub. A `Dataset` is returned as it is, a `DatasetDict` gives a split.
        split: a split or a slice of splits, in the notation of `datasets` ("train", "train[:1000]", "train+test").
            A single file, or a single data set saved with `save_to_disk`, is the split "train".
        config_name: the configuration of a data set on the Hub ("main" for `openai/gsm8k`) or of a folder.

    Raises:
        FileNotFoundError: `name_or_path` is not here and cannot be loaded from the Hub.
        ValueError: an unreadable file (broken JSON is named by file and line), an unknown split, no rows.
        TypeError: a streaming data set, or something that is no data set at all.
    """
    if isinstance(name_or_path, (str, Path)):
        source, loaded = str(name_or_path), _load(name_or_path, config_name)
    else:
        source, loaded = "the data set", name_or_path
    if isinstance(loaded, datasets.DatasetDict):
        loaded = _take_split(source, loaded, split)
    require_map_style(loaded)
    if len(loaded) == 0:
        raise ValueError(f"{source} has no rows in split {split!r}; at least one is needed")
    return loaded


def _load(name_or_path: str | Path, config_name: str | None) -> datasets.DatasetDict:
    path = Path(name_or_path).expanduser()
    if path.exists():
        return _load_local(path, config_name)
    missing = f"{str(name_or_path)!r} is neither a file or folder here nor could it be loaded from the Hub"
    if path.is_absolute() or path.suffix in _BUILDERS:  # not the name of a data set: do not wait for the network
        raise FileNotFoundError(f"{missing} (it can't be a data set's name); check the path, relative to {Path.cwd()}")
    try:
        return datasets.load_dataset(str(name_or_path), config_name)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{missing} ({error}); check the path or name, and the network") from error


def _load_local(path: Path, config_name: str | None) -> datasets.DatasetDict:
    if path.is_file() and path.suffix not in _BUILDERS:
        raise ValueError(f"{path} has the suffix {path.suffix!r}; accepted are {', '.join(_BUILDERS)}, or a folder")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    # With other kinds of data files around, a broken-looking .json may be metadata and not what failed to load.
    all_json = {_BUILDERS.get(file.suffix, "json") for file in files} == {"json"}
    try:
        if path.is_file():
            loaded = datasets.load_dataset(_BUILDERS[path.suffix], data_files=glob.escape(str(path)))
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # written by save_to_disk
            loaded = datasets.load_from_disk(path)
        else:
            known = datasets.get_dataset_config_names(str(path))
            # A folder of plain files has one configuration, which has no name to be asked for.
            loaded = datasets.load_dataset(str(path), config_name if known != ["default"] else None)
        if isinstance(loaded, datasets.Dataset):
            loaded = datasets.DatasetDict(train=loaded)
        if all_json:
            for rows in loaded.values():
                rows.data.validate(full=True)  # the JSON reader lets bytes through that are not UTF-8
    except Exception as error:  # `datasets` has no common base class for what a bad file can do to its readers
        for file in files:
            if all_json and file.suffix in _BUILDERS and (fault := _find_json_fault(file)):
                raise ValueError(f"{file}, {fault}; rows are JSON objects in UTF-8") from error
        raise ValueError(f"{path} holds no rows that `datasets` can read: {error.__cause__ or error!r}") from error
    return loaded


def _find_json_fault(file: Path) -> str | None:
    """Where and how a `.json` or `.jsonl` file is broken, or None."""
    raw = file.read_bytes()
    try:
        content = raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        return f"line {number}: byte {raw[error.start]:#x} is not UTF-8"
    if content.lstrip().startswith("["):  # one array of objects rather than one object per line
        try:
            json.loads(content)
        except json.JSONDecodeError as error:
            return f"line {error.lineno}: broken JSON ({error.msg})"
        return None
    for number, text in enumerate(content.split("\n"), start=1):
        try:
            if text.strip() and not isinstance(json.loads(text), dict):
                return f"line {number}: not an object but {text:.40}"
        except json.JSONDecodeError as error:
            return f"line {number}: broken JSON ({error.msg} at column {error.colno})"
    return None


def _take_split(source: str, splits: datasets.DatasetDict, split: str) -> datasets.Dataset:
    sizes = {name: len(rows) for name, rows in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (AssertionError, ValueError) as error:
        available = ", ".join(f"{name} ({size} rows)" for name, size in sizes.items())
        raise ValueError(f"{source} has no split {split!r}: {error} Available: {available}") from error
    return datasets.concatenate_datasets([splits[p.splitname].select(range(p.from_, p.to)) for p in parts])


def require_map_style(dataset: Any) -> None:
    if isinstance(dataset, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise TypeError(
            "a streaming data set has no row numbers or length; load it without streaming=True, "
            "or keep a part of it with datasets.Dataset.from_list(list(stream.take(n)))"
        )
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"expected a name, a path or a datasets.Dataset, not {type(dataset).__name__}")
