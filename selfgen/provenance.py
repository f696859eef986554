"""What tells weights, rows, versions and settings apart, for the record of what was made with them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from .files import to_json

_HASH = re.compile("[0-9a-f]{64}")  # SHA-256


def weights_hash(model: PreTrainedModel) -> str:
    """SHA-256 of the names, dtypes, shapes and values of all weights; where they are DTensors, all processes ask."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        for part, tensor in _parts(name, weight.full_tensor() if isinstance(weight, DTensor) else weight):
            digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _parts(name: str, weight: Any) -> Iterator[tuple[str, Any]]:
    """The tensors that ``weight`` is made of: itself, or those inside a quantized one."""
    if not is_traceable_wrapper_subclass(weight):
        yield name, weight
        return
    for part in weight.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{part}", getattr(weight, part))


def rows_hash(rows: Dataset) -> str:
    """SHA-256 of the ids of tokenized rows, in order; prompts may have no answers."""
    digest = hashlib.sha256()
    for row in rows:
        prompt, answer = row["prompt_ids"], row.get("answer_ids", [])
        for ids in ([row["sample_id"], len(prompt), len(answer)], prompt, answer):
            digest.update(np.asarray(ids, dtype="<i8").tobytes())
    return digest.hexdigest()


def columns_hash(rows: Dataset, names: Collection[str]) -> str:
    """SHA-256 of columns of integers or booleans, or of lists of them, in the order of the rows; fast for many rows."""
    digest = hashlib.sha256()
    names = sorted(set(names) & set(rows.column_names))
    for part in rows.select_columns(names).with_format("arrow").iter(10_000):
        for name in names:
            column = part[name].combine_chunks() if isinstance(part[name], pa.ChunkedArray) else part[name]
            digest.update(name.encode())
            if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                digest.update(_numbers(pc.list_value_length(column)))
                column = pc.list_flatten(column)
            digest.update(_numbers(column))
    return digest.hexdigest()


def _numbers(column: pa.Array) -> bytes:
    numbers = pc.fill_null(pc.cast(column, pa.int64()), -1).to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(numbers, "<i8").tobytes()


def differences(before: Mapping[str, Any], now: Mapping[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """What differs between two settings, such as "seed was 3, is 4"; a setting that one of them lacks is None there.

    ``before`` was read from JSON, so ``now`` is compared as JSON gives it back. What ``ignore`` names may differ.
    """
    now = json.loads(to_json(now))
    return [
        f"{name} was {_told(before.get(name))}, is {_told(now.get(name))}"
        for name in {**before, **now}
        if name not in ignore and before.get(name) != now.get(name)
    ]


def _told(value: Any) -> str:
    """A setting as a message has it; of a hash the beginning."""
    return f"{value[:8]}..." if isinstance(value, str) and _HASH.fullmatch(value) else repr(value)


def versions(*packages: str) -> dict[str, str | None]:
    """The versions of installed packages; None for one that is not installed, such as a source tree on the path."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
