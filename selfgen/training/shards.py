"""Folders of ``torch.distributed.checkpoint``, where each process wrote its own part of weights or of an optimizer."""

from __future__ import annotations

import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

MODEL, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"  # as Accelerate calls them in a checkpoint
_DIRECTORY = ".metadata"
_NAMED = {
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePosixPath"),
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
}  # fmt: skip


class _Directory(pickle.Unpickler):
    """Reads what these folders have as their directory, and nothing that would run other code."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _NAMED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise _OtherCodeError(f"{module}.{name}")


class _OtherCodeError(Exception):
    pass


def fault_of_shards(folder: Path) -> str | None:
    """The first file of ``folder`` that is broken or missing, and what is wrong with it. Only its directory is read."""
    if not (folder / _DIRECTORY).is_file():
        return f"{folder.name}/{_DIRECTORY} is missing, so writing it was broken off"
    try:
        with (folder / _DIRECTORY).open("rb") as file:
            parts = _Directory(file).load().storage_data.values()
        lengths: dict[str, int] = defaultdict(int)
        for part in parts:
            lengths[part.relative_path] = max(lengths[part.relative_path], part.offset + part.length)
    except _OtherCodeError as code:
        return f"{folder.name}/{_DIRECTORY} is broken (loading it would run {code}, so it isn't loaded)"
    except Exception as error:  # whatever a pickle that was cut off raises
        return f"{folder.name}/{_DIRECTORY} is broken ({error})"
    for name, length in sorted(lengths.items()):
        file_of_process = folder / name
        if not file_of_process.is_file():
            return f"{folder.name}/{name} is missing"
        if file_of_process.stat().st_size < length:
            return f"{folder.name}/{name} is broken ({file_of_process.stat().st_size} bytes of {length})"
    return None
