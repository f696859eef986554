"""Who may import whom: the table in ARCHITECTURE.md, read from there, so that the page and the code can't part."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("selfgen", "selfgen_kernels")
HEADING = "## Who may import whom"
KERNELS_DO_WITHOUT = ("transformers", "datasets", "accelerate", "selfgen")

Table = dict[str, set[str]]
"""Rooms, and the rooms that each of them may import."""


class Import(NamedTuple):
    """One import statement: ``module`` imports ``target``."""

    file: str
    line: int
    module: str
    target: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.module} imports {self.target}"


def read_table(page: str) -> Table:
    """The first two columns under HEADING: a room, and those that it may import; names stand in backticks."""
    _, heading, rest = page.partition(f"\n{HEADING}\n")
    assert heading, f"ARCHITECTURE.md has no heading {HEADING!r}; add it with its table"
    table: Table = {}
    for line in re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0].splitlines():
        cells = [re.findall(r"`([\w.]+)`", cell) for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and cells[0]:
            (room,) = cells[0]
            assert room not in table, f"the table has two rows of {room}; make them one"
            table[room] = set(cells[1])
    assert table, f"there is no table under {HEADING!r}; its rows are | `room` | `room`, `room` |, or - for none"
    return table


def modules_of(root: Path) -> dict[str, Path]:
    """The file of each module of the packages, a package's being its __init__.py."""
    found = {}
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            *folders, name = file.relative_to(root).with_suffix("").parts
            found[".".join(folders if name == "__init__" else [*folders, name])] = file
    return found


def imports_of(module: str, file: Path, root: Path, modules: Iterable[str]) -> Iterator[Import]:
    """All imports of a file: at its top, in functions, and for the type checker only."""
    where = str(file.relative_to(root))
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(where, node.lineno, module, name.name)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            for name in node.names:
                inner = f"{origin}.{name.name}"
                yield Import(where, node.lineno, module, inner if inner in modules else origin)


def room_of(name: str, rooms: Iterable[str]) -> str | None:
    """The longest of the ``rooms`` that a module is in."""
    return max((room for room in rooms if name == room or name.startswith(f"{room}.")), key=len, default=None)


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """Some circle as a list of names, the first one again at its end; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(arrows.get(name, ())):
                if found := visit(other, [*path, name]):
                    return found
            done.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in sorted(arrows))), [])


def faults(root: Path) -> list[str]:
    """What is wrong with the imports under ``root`` by the table of its page, each with what to do."""
    table = read_table((root / "ARCHITECTURE.md").read_text())
    modules = modules_of(root)
    found = []

    for room in sorted({*table, *(other for may in table.values() for other in may)}):
        if not any(room_of(module, [room]) for module in modules):
            found.append(f"{room} is in the table, but not in the code; take its row and name out of the table")
        elif room not in table:
            found.append(f"{room} may be imported by the table, but has no row; give it one")
    for module in modules:
        if module.count(".") < 2 and module not in table:
            found.append(f"{module} has no row; add one to the table with the rooms that it may import")
    if circle := circle_in(table):
        found.append(f"the table has a circle, {' -> '.join(circle)}; take out one of its arrows, and the imports")

    arrows: dict[str, set[str]] = {}
    for module, file in modules.items():
        for one in imports_of(module, file, root, modules):
            if module.startswith("selfgen_kernels") and one.target.split(".")[0] in KERNELS_DO_WITHOUT:
                found.append(f"{one}; the kernels need torch only: hand in what they need, or move this to selfgen")
            if one.target.split(".")[0] not in PACKAGES:
                continue
            arrows.setdefault(module, set()).add(one.target)
            if module.startswith("selfgen.context") and not one.target.startswith(("selfgen.context", "selfgen_k")):
                found.append(f"{one}; the engine stands alone: move what it needs into selfgen.context")
            source, target = room_of(module, table), room_of(one.target, table)
            if source and target and source != target and target not in table[source]:
                found.append(f"{one}; {source} may not import {target}: move what is shared to a room below both,"
                             " or add the arrow to the table where it belongs to the design")  # fmt: skip
    if circle := circle_in(arrows):
        found.append(f"modules import one another in a circle, {' -> '.join(circle)}; move what they share below them")
    return found


def test_imports_go_the_way_that_the_page_allows():
    assert faults(ROOT) == []


# The check itself, on small trees that have one fault each


def tree(folder: Path, table: str, files: dict[str, str]) -> Path:
    (folder / "ARCHITECTURE.md").write_text(f"# Page\n\n{HEADING}\n\n{table}\n\n## Next\n\n| `no.room` | `of.it` |\n")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


TABLE = """| room | may import |
|---|---|
| `selfgen` | `selfgen.top`, `selfgen.context` |
| `selfgen.__main__` | `selfgen.top` |
| `selfgen.top` | `selfgen.context`, `selfgen_kernels` |
| `selfgen.context` | `selfgen_kernels` |
| `selfgen_kernels` | - |"""
FILES = {
    "selfgen/__init__.py": "from selfgen.top import a",
    "selfgen/__main__.py": "import selfgen.top.b",
    "selfgen/top/__init__.py": "",
    "selfgen/top/a.py": "import os\nfrom selfgen.context import engine",
    "selfgen/top/b.py": "from . import a\nfrom .a import os",
    "selfgen/context/__init__.py": "from selfgen.context.engine import torch",
    "selfgen/context/engine.py": "import torch, selfgen_kernels",
    "selfgen_kernels/__init__.py": "import torch",
}


def test_a_tree_without_a_fault(tmp_path):
    assert faults(tree(tmp_path, TABLE, FILES)) == []


@pytest.mark.parametrize(
    ("changes", "table", "message"),
    [
        (
            {"selfgen/top/c.py": "\n\ndef f():\n    import selfgen"},
            TABLE,
            r"selfgen/top/c\.py:4: selfgen\.top\.c imports selfgen; selfgen\.top may not import selfgen: move",
        ),
        (
            {"selfgen_kernels/ops.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"},
            f"{TABLE}\n| `selfgen_kernels.ops` | - |",
            r"selfgen_kernels/ops\.py:3: selfgen_kernels\.ops imports transformers; the kernels need torch only",
        ),
        (
            {"selfgen/context/engine.py": "from ..top import a", "selfgen/top/a.py": ""},
            TABLE.replace("| `selfgen_kernels` |\n", "| `selfgen.top` |\n").replace("`selfgen.context`, `s", "`s"),
            r"selfgen/context/engine\.py:1: selfgen\.context\.engine imports selfgen\.top\.a; the engine stands alone",
        ),
        ({"selfgen/new.py": ""}, TABLE, r"^selfgen\.new has no row; add one"),
        ({}, TABLE.replace("`selfgen_kernels` |\n", "`selfgen.new` |\n"), r"selfgen\.new is in the table, but not in"),
        ({}, f"{TABLE}\n| `selfgen.old` | - |", r"selfgen\.old is in the table, but not in the code; take"),
        ({}, TABLE.replace("| `selfgen_kernels` | - |", ""), r"selfgen_kernels may be imported .* has no row"),
        (
            {},
            TABLE.replace("| - |", "| `selfgen.top` |"),
            r"the table has a circle, (selfgen\S+ -> ){2,}selfgen\S+; take out one of its arrows",
        ),
        (
            {"selfgen/top/a.py": "from selfgen.top import b"},
            TABLE,
            r"circle, selfgen\.top\.a -> selfgen\.top\.b -> selfgen\.top\.a; move what they share",
        ),
    ],
    ids=["wrong arrow", "kernels", "context", "no row", "no such arrow", "no such row", "arrow without a row",
         "circle of rooms", "circle in a room"],
)  # fmt: skip
def test_a_fault_is_found(tmp_path, changes, table, message):
    found = faults(tree(tmp_path, table, FILES | changes))
    assert any(re.search(message, fault) for fault in found), found


def test_a_page_without_the_table(tmp_path):
    with pytest.raises(AssertionError, match="there is no table under"):
        faults(tree(tmp_path, "None.", FILES))
    (tmp_path / "ARCHITECTURE.md").write_text("# Page\n")
    with pytest.raises(AssertionError, match="has no heading"):
        faults(tmp_path)
