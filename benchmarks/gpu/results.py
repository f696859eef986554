"""The files of a run: one of JSON lines for each section, written line by line as things are measured, and read back.

A line's ``kind`` is ``begin`` (an attempt: machine, versions, command, limit), ``row`` (a measurement), ``note`` or
``end`` (how the attempt ended). A file may have several attempts, and its last line may be torn: whatever was written
before a kill counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "numpy")
RUN = "run.json"  # what the whole run is: its sections, and the code that it measures
DONE = ("ended", "skipped")  # states that a second run leaves as they are


@dataclass
class Row:
    """A measurement: ``columns`` tell it from the table's others, ``values`` were found."""

    table: str
    columns: dict[str, Any]
    values: dict[str, Any]


@dataclass
class Result:
    """What a section's file says: rows of all attempts, of which a later one replaces an earlier one of its columns."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # of the last attempt
    begin: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)
    attempts: int = 0

    @property
    def state(self) -> str:
        """Of the last attempt. Without a last word, the run was killed from outside."""
        return self.end.get("state", "killed") if self.attempts else "not run"


def read(file: Path) -> Result:
    result, rows = Result(), {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
            kind = entry.pop("kind")
        except (ValueError, KeyError, TypeError, AttributeError):  # torn by a kill
            continue
        if kind == "begin":
            result.begin, result.end, result.notes = entry, {}, []
            result.attempts += 1
        elif kind == "end":
            result.end = entry
        elif kind == "note":
            result.notes.append(entry["text"])
        elif kind == "row":
            rows[entry["table"], json.dumps(entry["columns"], sort_keys=True)] = Row(**entry)
    result.rows = list(rows.values())
    return result


def append(file: Path, kind: str, **entry: Any) -> None:
    """Write one line as a whole; it is in the file when this returns."""
    line = json.dumps({"kind": kind, **_plain(entry)}, allow_nan=False) + "\n"
    with file.open("ab+") as handle:
        if handle.tell() and file.stat().st_size:
            handle.seek(-1, os.SEEK_END)
            line = line if handle.read(1) == b"\n" else "\n" + line  # after a torn one
        handle.write(line.encode())


def file_of(folder: Path, section: str) -> Path:
    return folder / f"{section}.jsonl"


def _plain(value: Any) -> Any:
    """Four digits of a measured number; NaN and infinities are null."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, str | int) else str(value)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """The processor, and the GPU as its driver names it; torch is not asked, as it would open the device."""
    about: dict[str, Any] = {"processor": platform.machine(), "cores": os.cpu_count(), "gpu": None, "driver": None}
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
        if done.returncode == 0 and "," in done.stdout:
            about["gpu"], about["driver"] = (part.strip() for part in done.stdout.splitlines()[0].split(",")[:2])
    return about


def source() -> str:
    """A hash of the code that is measured and of what measures it, so that results of other code are not mixed in."""
    digest = hashlib.sha256()
    for folder in ("selfgen", "selfgen_kernels", "benchmarks", "tools"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".cpp", ".h"):
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
