"""The licences of what selfgen depends on, as far as it is installed: docs/licences.md, and a failure by name.

    python -m tools.licences            write the page
    python -m tools.licences --check    compare it with what is installed, and write nothing

Exit status 1: a licence is not permissive, or nobody knows it, and EXCEPTIONS does not have it; or the page is old.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGE = Path(__file__).resolve().parent.parent / "docs" / "licences.md"
RUNTIME, EXTRAS = "needed", ("eval", "cuda", "trl", "peers", "bench", "docs", "dev", "quantized")
PERMISSIVE = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CNRI-Python", "ISC", "MIT", "MIT-CMU", "PSF-2.0", "Unlicense", "Zlib",
}  # fmt: skip
EXCEPTIONS = {
    "certifi": ("MPL-2.0", "a list of certificates, used as it is"),
    "hypothesis": ("MPL-2.0", "runs tests; no part of what is distributed"),
    "pathspec": ("MPL-2.0", "of mypy and mkdocs; no part of what is distributed"),
    "tqdm": ("MPL-2.0 AND MIT", "imported as it is; the MPL asks for the source of changed files only"),
    "zss": ("BSD-2-Clause", "its metadata name no licence, but its LICENSE file does"),
}
_SAID = {  # what metadata say, in lower case and without "license", -> SPDX
    "apache": "Apache-2.0", "apache 2.0": "Apache-2.0", "apache software": "Apache-2.0",
    "apache, version 2.0": "Apache-2.0", "bsd 3-clause": "BSD-3-Clause", "psfl": "PSF-2.0",
    "python software foundation": "PSF-2.0", "isc (iscl)": "ISC", "mozilla public 2.0 (mpl 2.0)": "MPL-2.0",
}  # fmt: skip


class Licence(NamedTuple):
    """What one distribution is licensed under, as an SPDX expression; None where its metadata don't tell."""

    name: str
    needed_by: str  # RUNTIME or an extra
    expression: str | None

    @property
    def fault(self) -> str | None:
        known, _ = EXCEPTIONS.get(self.name, (None, ""))
        if self.expression is None:
            return None if known else f"{self.name}: its metadata name no licence"
        if known == self.expression or is_permissive(self.expression):
            return None
        return f"{self.name}: {self.expression} is not among the permissive licences"


def is_permissive(expression: str) -> bool:
    """Whether all parts of an SPDX expression are, or one of them where it has nothing but OR."""
    parts = [part.strip("() ") in PERMISSIVE for part in re.split(r" AND | OR ", expression)]
    return any(parts) if " AND " not in expression else all(parts)


def expression_of(found: Distribution) -> str | None:
    """An SPDX expression: as it is given, else by the classifiers, else by the field of old metadata."""
    metadata = found.metadata
    if given := metadata.get_all("License-Expression"):
        return given[0]
    classifiers = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or () if "License ::" in line]
    old = (metadata.get_all("License") or [""])[0].split("\n")
    for said in [*classifiers, *(old if len(old) == 1 else ())]:
        short = re.sub(r"\s+", " ", re.sub(r"licen[cs]e", "", said, flags=re.IGNORECASE)).strip(" ,").replace(" ,", ",")
        if short:
            return _SAID.get(short.lower(), short)
    return None


def closure(extras: Iterable[str]) -> dict[str, Distribution]:
    """All installed distributions that selfgen with ``extras`` requires, directly or not, by normalized name."""
    found: dict[str, Distribution] = {}
    todo, done = [("selfgen", extra) for extra in ("", *extras)], set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(requirement.name), one) for one in ("", *requirement.extras)]
    return {name: one for name, one in found.items() if name != "selfgen"}


def licences() -> list[Licence]:
    """Of everything that is installed: what is always needed first, then what the extras add."""
    found: dict[str, Licence] = {}
    for needed_by, extras in [(RUNTIME, []), *((extra, [extra]) for extra in EXTRAS)]:
        for name, one in sorted(closure(extras).items()):
            found.setdefault(name, Licence(name, needed_by, expression_of(one)))
    return list(found.values())


def page(found: list[Licence]) -> str:
    lines = [
        "# Licences",
        "",
        "selfgen is under the Apache License 2.0. This is what it depends on, directly or not, by the metadata of the",
        "installed packages; a plain `pip install selfgen` brings those of the first kind. `python -m tools.licences`",
        "writes this page, and a test fails where a licence is neither permissive nor explained here.",
        "",
        "| package | for | licence |",
        "|---|---|---|",
    ]
    for one in found:
        known, why = EXCEPTIONS.get(one.name, (None, ""))
        told = one.expression or known or "unknown"
        lines.append(f"| {one.name} | {one.needed_by} | {told}{f': {why}' if why else ''} |")
    return "\n".join(lines) + "\n"


def rows_of(text: str) -> dict[str, str]:
    """The rows of a page by package."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {name: told for name, _, told in cells[1:]}


def faults(found: list[Licence], text: str) -> list[str]:
    """What is wrong with the licences, and with the page, on which more may stand than is installed here."""
    wrong = [one.fault for one in found if one.fault]
    known, now = rows_of(text), rows_of(page(found))
    wrong += [
        f"docs/licences.md has {known.get(name, 'no row')} for {name}, which says {told}: python -m tools.licences"
        for name, told in now.items()
        if known.get(name) != told
    ]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="The licences of what selfgen depends on.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    found = licences()
    if not parser.parse_args().check:
        PAGE.write_text(page(found))
    wrong = faults(found, PAGE.read_text())
    print("\n".join(wrong) or f"{len(found)} packages: all licences are permissive, or explained in {PAGE.name}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
