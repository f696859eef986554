"""Checks and unpacks what ``python -m benchmarks.gpu.bundle`` has packed. It needs Python alone.

python unpack.py FOLDER      (beside the archives)
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tarfile
import tempfile
from pathlib import Path

MANIFEST = "manifest.json"
NEEDED = "project"


class BundleError(ValueError):
    """A file is missing or is another one than was packed."""


def unpack(bundle: Path, folder: Path) -> list[str]:
    """Unpack all groups whose files are there; returns the names of the others.

    Raises:
        BundleError: a file is damaged, a group is there in parts only, or the project is missing. Nothing was unpacked.
    """
    manifest = json.loads((bundle / MANIFEST).read_text())
    missing, whole = [], []
    for group in manifest["groups"]:
        there = [(bundle / part["file"]).is_file() for part in group["parts"]]
        if not any(there) and group["name"] != NEEDED:
            missing.append(group["name"])
            continue
        whole.append(group)
        for part in group["parts"]:
            file = bundle / part["file"]
            if not file.is_file():
                raise BundleError(f"{part['file']} is not in {bundle}: carry it, or leave all of {group['name']} out")
            found = hashlib.sha256(file.read_bytes()).hexdigest()
            if found != part["sha256"]:
                raise BundleError(f"{part['file']} has {file.stat().st_size} bytes and not the hash of the manifest")
    folder.mkdir(parents=True, exist_ok=True)
    for group in whole:
        with tempfile.TemporaryFile(dir=folder) as joined:
            for part in group["parts"]:
                joined.write((bundle / part["file"]).read_bytes())
            joined.seek(0)
            with tarfile.open(fileobj=joined) as archive:
                archive.extractall(folder, filter="data")
    return missing


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python unpack.py FOLDER", file=sys.stderr)
        return 2
    bundle, folder = Path(__file__).resolve().parent, Path(argv[0]).resolve()
    try:
        missing = unpack(bundle, folder)
    except BundleError as error:
        print(f"unpack.py: {error}", file=sys.stderr)
        return 1
    if missing:
        print(f"not carried: {', '.join(missing)}")
    packed, here = json.loads((bundle / MANIFEST).read_text())["python"], platform.python_version()
    if packed.split(".")[:2] != here.split(".")[:2]:  # of plain Python, but some are made for each version
        print(f"note: the packages in site are those of a Python {packed}, and this is {here}")
    print(f"all hashes are right; cd {folder}/selfgen && PYTHONPATH={folder}/site python -m benchmarks.gpu")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
