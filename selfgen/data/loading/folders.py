"""Which files of a folder are rows of which split, by the rules of `datasets`, and which files are left out."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from .row_files import ENDINGS, format_of

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\b.*")  # in data/, with a split of any name
_KEYWORD = {
    split: re.compile(rf"(?:.*[-._ 0-9])?(?:{'|'.join(words)})(?:[-._ 0-9].*)?", re.IGNORECASE)
    for split, words in _KEYWORDS.items()
}
# Written next to rows by `datasets` and by this package.
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json",
             "provenance.json"}  # fmt: skip
_DOCUMENTS = {"", ".md", ".txt", ".rst", ".html", ".pdf", ".py", ".sh", ".ipynb", ".yaml", ".yml", ".toml", ".cfg",
              ".ini", ".png", ".jpg", ".jpeg", ".svg", ".gif", ".bib", ".cff", ".log", ".lock"}  # fmt: skip


def find_splits(folder: Path) -> tuple[dict[str, list[Path]], dict[Path, str]]:
    """The files of each split, and why each file that looks like data and is of no split is left out.

    Files `data/SPLIT-00000-of-00001.*` are the splits, where there are any. Otherwise a folder's or a file's name tells
    the split ("train", "my-dev_2", "test.v1"); where none does, all files are of the split "train". Hidden files and
    folders, those that begin with two underscores, metadata and documents are no data.
    """
    left_out, files = {}, []
    for file in sorted(_walk(folder)):
        if file.name in _METADATA:
            continue
        if format_of(file):
            files.append(file)
        elif file.suffix.lower() not in _DOCUMENTS:
            left_out[file] = f"read are {ENDINGS}"

    named: dict[Path, list[str]] = {}
    for file in files:
        match = _SHARD.fullmatch(file.name) if file.parent == folder / "data" else None
        named[file] = [match[1]] if match else []
    why = "it is not among the files data/SPLIT-00000-of-00001.*, which are the splits"
    if not any(named.values()):
        named = {file: _by_keyword(file.relative_to(folder)) for file in files}
        why = "neither its name nor a folder's says which split it is of, as that of other files does"
    if not any(named.values()):
        # Next to rows of another kind, a .json is most often about them.
        rows = [file for file in files if file.suffix.lower() != ".json"] or files
        left_out |= dict.fromkeys(set(files) - set(rows), "a .json next to other kinds of files may be about them")
        named = {file: ["train"] for file in rows}

    splits: dict[str, list[Path]] = {}
    for file, names in named.items():
        for name in names:
            splits.setdefault(name, []).append(file)
        if not names:
            left_out[file] = why
    order = [*(name for name in _KEYWORDS if name in splits), *sorted(splits.keys() - _KEYWORDS.keys())]
    return {name: splits[name] for name in order}, left_out


def _by_keyword(file: Path) -> list[str]:
    """The splits that the names of folders tell, or else that of the file; more than one if they name several."""
    for parts in (file.parts[:-1], file.parts[-1:]):
        splits = [split for split, pattern in _KEYWORD.items() if any(map(pattern.fullmatch, parts))]
        if splits:
            return splits
    return []


def _walk(folder: Path) -> Iterator[Path]:
    """All files but hidden ones; links to folders are followed, each folder once."""
    seen: set[Path] = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        if Path(place).resolve() in seen:
            folders.clear()
            continue
        seen.add(Path(place).resolve())
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _fail(error: OSError) -> None:
    raise error
