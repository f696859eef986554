"""All warnings and refusals of selfgen, and the entries of docs/troubleshooting.md that they belong to.

    python -m tools.messages    what each entry has, and an error for messages without one and for patterns without any

A message is found in the source: what an exception is made of, what is warned, and what a command fails with. Holes are
written as …. Below an entry's text, a comment names its messages, one pattern a line:

    <!-- messages
    has no chat template
    in selfgen_kernels/ops/
    -->

A message belongs to the entry with the longest pattern that it contains; ``in PATH`` is for those of a file or folder
that no other pattern fits.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TypeGuard

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("selfgen", "selfgen_kernels")
PAGE = ROOT / "docs" / "troubleshooting.md"
HOLE = "…"
WARNS = {"warn": 0, "warning": 0, "error": 0, "log": 1, "fail": 0}
"""Functions and methods that tell something -> which of their arguments it is."""
COMMENT = re.compile(r"<!-- messages\n(.*?)-->", re.DOTALL)

Local = dict[str, list[ast.expr]]
"""Names of a function -> all that they are set to; nothing where that can't be told."""


@dataclass(frozen=True, order=True)
class Message:
    """What is said, with ``…`` for what differs, and the file that says it."""

    text: str
    file: str


class Source:
    """The modules of the packages, and what their names stand for, as far as that is text."""

    def __init__(self, root: Path):
        files = sorted(file for package in PACKAGES for file in (root / package).rglob("*.py"))
        self.trees = {str(file.relative_to(root)): ast.parse(file.read_text(encoding="utf-8")) for file in files}
        self.functions: dict[str, list[ast.expr]] = {}  # name -> what it returns
        self.constants: dict[str, ast.expr] = {}
        for tree in self.trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    found = [one.value for one in ast.walk(node) if isinstance(one, ast.Return) and one.value]
                    self.functions.setdefault(node.name, []).extend(found)
            for node in tree.body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    self.constants[node.targets[0].id] = node.value

    @cached_property
    def exceptions(self) -> set[str]:
        """Names of exceptions: Python's and our own."""
        names = {name for name, one in vars(builtins).items() if isinstance(one, type) and issubclass(one, Exception)}
        classes = [node for tree in self.trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        for _ in range(3):  # subclasses of subclasses
            names |= {one.name for one in classes if any(name_of(base) in names for base in one.bases)}
        return names

    def texts(self, node: ast.expr, local: Local, depth: int = 0) -> list[str]:
        """All that an expression may be, if it is text."""
        if depth > 4:
            return []

        def inner(one: ast.expr, names: Local = local) -> list[str]:
            return self.texts(one, names, depth + 1)

        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=values):
                filled = [one.value if isinstance(one, ast.FormattedValue) else one for one in values]
                parts = [inner(one) if isinstance(one, ast.Constant | ast.Name) else [] for one in filled]
                return ["".join(one) for one in product(*(part or [HOLE] for part in parts))]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [one + other for one in inner(left) or [HOLE] for other in inner(right) or [HOLE]]
            case ast.IfExp(body=body, orelse=orelse):
                return (inner(body) or [HOLE]) + (inner(orelse) or [HOLE])
            case ast.Name(id=name):
                constant = self.constants.get(name)
                found = [inner(one) for one in local.get(name, [] if constant is None else [constant])]
                return [text for texts in found for text in texts] if all(found) else []
            case ast.Call(func=ast.Attribute(attr="join"), args=[ast.GeneratorExp(elt=one) | ast.ListComp(elt=one)]):
                return inner(one)
            case ast.Call(func=function) if name_of(function) in self.functions:
                return [text for one in self.functions[name_of(function)] for text in inner(one, {})]
        return []


def name_of(function: ast.expr) -> str:
    """The last name of ``a.b.c`` or ``a.b(...)``."""
    match function:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=inner):
            return name_of(inner)
    return ""


def told_by(source: Source, tree: ast.Module) -> Iterator[tuple[ast.Call, list[str]]]:
    """Each call of a module that makes an exception or warns, and all that it may say, as format strings."""
    raised = {id(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise)}
    for scope in ast.walk(tree):
        if not isinstance(scope, ast.Module | ast.FunctionDef):
            continue
        local = {} if isinstance(scope, ast.Module) else values_in(scope)
        for node in own_nodes(scope):
            if not isinstance(node, ast.Call):
                continue
            name = name_of(node.func)
            if id(node) in raised or name in source.exceptions:
                yield node, next((found for one in node.args if (found := source.texts(one, local))), [])
            elif name in WARNS and len(node.args) > WARNS[name]:
                yield node, source.texts(node.args[WARNS[name]], local)


def values_in(function: ast.FunctionDef) -> Local:
    """What each name of a function is set to; nothing for a name that is set otherwise than by ``name = ...``, too."""
    given = function.args
    found: Local = {one.arg: [] for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
    nodes = list(own_nodes(function))
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id not in found:
            name = node.targets[0].id
            stores = [one for one in nodes if is_store(one) and one.id == name]
            values = [one.value for one in nodes if isinstance(one, ast.Assign) and one.targets[0] in stores]
            found[name] = values if len(values) == len(stores) else []
    for node in nodes:
        if is_store(node):
            found.setdefault(node.id, [])
    return found


def is_store(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def own_nodes(scope: ast.Module | ast.FunctionDef) -> Iterator[ast.AST]:
    """All of a module or function but what stands in functions inside it."""
    todo: list[ast.AST] = list(ast.iter_child_nodes(scope))
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, ast.FunctionDef):
            todo += ast.iter_child_nodes(node)


def told_by_cpp(text: str) -> Iterator[str]:
    """What the checks of a C++ file say."""
    for check in re.findall(r"TORCH_CHECK\w*\((.*?)\);", text, re.DOTALL):
        literals = list(re.finditer(r'"((?:[^"\\]|\\.)*)"', check))
        said, end = "", None
        for one in literals:
            hole = one[1].startswith(" ") if end is None else check[end : one.start()].strip()  # a name comes first
            said += (HOLE if hole else "") + one[1]
            end = one.end()
        if said:
            yield said + (HOLE if check[end:].strip() else "")


def plain(text: str) -> str:
    """A format string with holes, in one line."""
    text = re.sub(r"%[-+.\d]*[sdfgrxi]", HOLE, text)
    text = re.sub(rf"(?:[\"']?{HOLE}[\"']?){{2,}}", HOLE, text)
    return " ".join(text.split())


def messages(root: Path = ROOT) -> list[Message]:
    """All that the packages may say, but what is only handed on from somewhere else."""
    source = Source(root)
    found = {
        Message(plain(text), file)
        for file, tree in source.trees.items()
        for _, texts in told_by(source, tree)
        for text in texts
    }
    for file in sorted((root / "selfgen_kernels").rglob("*")):
        if file.suffix in (".cpp", ".h"):
            where = str(file.relative_to(root))
            found |= {Message(plain(text), where) for text in told_by_cpp(file.read_text(encoding="utf-8"))}
    return sorted(one for one in found if len(re.findall(r"[A-Za-z]{2,}", one.text)) > 1)


@dataclass
class Entry:
    """A heading of the page with the patterns below it."""

    title: str
    patterns: list[str]

    def weight_of(self, message: Message) -> int:
        """How well the message fits: 0 is not at all."""
        told = [len(one) + 1 for one in self.patterns if one in message.text]
        inside = [1 for one in self.patterns if one.startswith("in ") and message.file.startswith(one[3:])]
        return max(told + inside, default=0)


def entries(page: str) -> list[Entry]:
    """The entries of the page, in its order."""
    found = []
    for section in re.split(r"^#{2,} ", page, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        if comment := COMMENT.search(section):
            found.append(Entry(title, [line for line in comment[1].splitlines() if line]))
    return found


def by_entry(page: str, said: list[Message]) -> tuple[dict[str, list[str]], list[Message]]:
    """Title of an entry -> its messages; and the messages without an entry."""
    known = entries(page)
    found: dict[str, list[str]] = {one.title: [] for one in known}
    left = []
    for message in said:
        best = max(known, key=lambda one: one.weight_of(message), default=None)
        if best is None or not best.weight_of(message):
            left.append(message)
        elif message.text not in found[best.title]:
            found[best.title].append(message.text)
    return found, left


def unused(page: str, said: list[Message]) -> list[str]:
    """Patterns that no message has."""
    return [
        pattern
        for one in entries(page)
        for pattern in one.patterns
        if not any(Entry(one.title, [pattern]).weight_of(message) for message in said)
    ]


def main() -> int:
    page, said = PAGE.read_text(encoding="utf-8"), messages()
    found, left = by_entry(page, said)
    for title, texts in found.items():
        print(f"\n{title}\n" + "\n".join(f"  {text}" for text in texts))
    for one in left:
        print(f"no entry: {one.file}: {one.text}", file=sys.stderr)
    for pattern in unused(page, said):
        print(f"no message has: {pattern}", file=sys.stderr)
    return bool(left or unused(page, said))


if __name__ == "__main__":
    sys.exit(main())
