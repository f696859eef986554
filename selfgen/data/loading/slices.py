"""Splits by name, and slices of them in the notation of `datasets`."""

import re
from collections.abc import Mapping
from typing import Any

import datasets


def take_split(source: str, splits: Mapping[str, Any], split: str) -> datasets.Dataset:
    """A split, or a slice of splits, of data sets."""
    if split in splits:  # a name need not be in the notation of slices, as "train-v1.0" is not
        return splits[split]
    aliases = {name: name if re.fullmatch(r"\w+", name) else f"split_{i}" for i, name in enumerate(splits)}
    sizes = {aliases[name]: len(rows) for name, rows in splits.items()}
    parts = [re.fullmatch(r"(.*?)(\[.*)?", part.strip(), re.DOTALL) for part in split.split("+")]
    spec = "+".join(aliases.get(part[1], part[1]) + (part[2] or "") for part in parts if part)
    try:
        taken = datasets.ReadInstruction.from_spec(spec).to_absolute(sizes)
    except (AssertionError, ValueError) as error:
        available = ", ".join(f"{name} ({len(rows)} rows)" for name, rows in splits.items())
        raise ValueError(f"{source} has no split {split!r}: {error} Available: {available}") from error
    names = {alias: name for name, alias in aliases.items()}
    chosen = [(splits[names[part.splitname]], part) for part in taken]
    for rows, _ in chosen:
        refuse_transform(rows)  # concatenation would forget a transform
    return datasets.concatenate_datasets([rows.select(range(part.from_, part.to)) for rows, part in chosen])


def take_stream(source: str, splits: Mapping[str, Any], split: str) -> datasets.IterableDataset:
    """A split, or a slice of splits that counts rows from the front, of streams."""
    if split in splits:
        return splits[split]
    taken = []
    for part in split.split("+"):
        match = re.fullmatch(r"(.+?)(?:\[(\d*):(\d*)\])?", part.strip())
        if not match or match[1] not in splits:
            raise ValueError(
                f"{source} has no split {split!r}; there are {', '.join(splits)}. The length of a stream is not known, "
                "so slices of it are NAME[:n], NAME[n:] and NAME[m:n], and may be joined by +"
            )
        start, stop = int(match[2] or 0), int(match[3]) if match[3] else None
        rows = splits[match[1]].skip(start) if start else splits[match[1]]
        taken.append(rows if stop is None else rows.take(max(stop - start, 0)))
    return taken[0] if len(taken) == 1 else datasets.concatenate_datasets(taken)


def refuse_transform(dataset: datasets.Dataset) -> None:
    if dataset.format["type"] == "custom":
        raise ValueError(
            "the data set has a transform (set_transform, with_transform), which changes rows only while they are "
            "looked at; make it part of the rows: dataset.with_format(None).map(transform, batched=True)"
        )
