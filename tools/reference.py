"""What the docs have from the code: every field, every command, every op, and what is exported.

``python -m tools.help`` writes it, and a test compares: the pages in docs/commands as a whole, and in other pages what
stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterator
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from selfgen.cli import COMMANDS
from selfgen.cli.help import FILE

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GENERATED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)
GUIDES = {
    "train": "bss.md", "contexts": "bash.md", "generate": "start.md#4-look", "eval": "evaluation.md",
    "inspect": "inspect.md", "doctor": "install.md#selfgen-doctor",
}  # fmt: skip
"""The page that explains a command."""
BACKENDS = {"cpu": "C++ (CPU)", "triton": "Triton (GPU)"}


def pages() -> dict[Path, str]:
    """Every page with something made here, as it should be."""
    found = {DOCS / "commands" / f"{name}.md": command_page(name) for name in COMMANDS}
    for path in sorted(DOCS.rglob("*.md")):
        if path not in found and GENERATED.search(text := path.read_text(encoding="utf-8")):
            found[path] = filled(path, text)
    return found


def filled(page: Path, text: str) -> str:
    return GENERATED.sub(lambda part: f"{part[1]}{PARTS[part[2]](page)}\n{part[3]}", text)


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]])", r"\\\1", escape(" ".join(text.split()), quote=False))


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def command_page(name: str) -> str:
    """What ``selfgen NAME --help`` says."""
    shown = shown_of(name)
    lines = [f"# selfgen {name}", "", plain(shown["description"]), "", "```", shown["usage"], "```", ""]
    lines += [plain(shown["epilog"]), ""] if shown["epilog"] else []
    lines += [f"[{GUIDES[name].partition('#')[0]}](../{GUIDES[name]}) explains what it is for.", ""]
    lines += groups_of(shown)
    known = options_of(shown)
    for kind, more in kept().items():
        if kind.startswith(f"{name} "):
            differ = {option: text for option, text in options_of(more).items() if known.get(option) != text}
            lines += [f"## With {kind.removeprefix(name).strip()}", "", *option_lines(differ)]
    return "\n".join(lines).rstrip() + "\n"


def kept() -> dict[str, Any]:
    """By the command, or the command and its method: what its help has."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def shown_of(name: str) -> dict[str, Any]:
    """The help of a command; one that is fast by itself has none kept, and its parser is asked."""
    if name in kept():
        return kept()[name]
    parser = import_module(f"selfgen.cli.{name}").make_parser()
    formatter = parser._get_formatter()
    options = {formatter._format_action_invocation(one): one.help for one in parser._actions if one.dest != "help"}
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    groups = [{"title": "options", "description": None, "options": options}]
    return {"usage": usage, "description": parser.description, "epilog": parser.epilog, "groups": groups}


def groups_of(shown: dict[str, Any]) -> Iterator[str]:
    for group in shown["groups"]:
        if options := {option: text for option, text in group["options"].items() if option != "--help"}:
            title = group["title"]
            yield from (f"## {title[0].upper()}{title[1:]}", "")
            yield from (plain(group["description"]), "") if group["description"] else ()
            yield from option_lines(options)


def options_of(shown: dict[str, Any]) -> dict[str, str]:
    return {option: text for group in shown["groups"] for option, text in group["options"].items()}


def option_lines(options: dict[str, str]) -> Iterator[str]:
    for option, text in options.items():
        yield from (f"#### `{option}`", "", plain(text), "")


def commands(_: Path) -> str:
    """All commands, with what each does."""
    told = {name: plain(shown_of(name)["description"]) for name in COMMANDS}
    return "\n".join(f"- [`selfgen {name}`](commands/{name}.md): {text}" for name, text in told.items())


# ---------------------------------------------------------------------------------------------------------------------
# Fields of the configurations


def fields(_: Path) -> str:
    """Every field that selfgen adds to transformers' TrainingArguments, under the class that has it."""
    from transformers import TrainingArguments

    from selfgen import BSSConfig, RACConfig

    owners = [(BSSConfig, owner) for owner in BSSConfig.__mro__ if not issubclass(TrainingArguments, owner)]
    parts = (fields_of(config, owner) for config, owner in (*owners, (RACConfig, RACConfig)))
    return "\n".join(line for part in parts for line in part).rstrip()


def trainer_fields() -> str:
    """Those of transformers' TrainingArguments."""
    from transformers import TrainingArguments

    from selfgen import BSSConfig

    return "\n".join(fields_of(BSSConfig, TrainingArguments))


def fields_of(config: type, owner: type) -> Iterator[str]:
    """The fields of ``config`` that ``owner``, a class above it, says last."""
    known = {field.name: field for field in dataclasses.fields(config)}
    kinds = {name: kind for name, kind in inspect.get_annotations(owner).items() if name in known}
    if not kinds:
        return
    yield from (f"## {owner.__name__}", "")
    if owner.__module__.startswith("selfgen"):
        yield from ((owner.__doc__ or "").partition("\n\n")[0].replace("``", "`"), "")
    for name, kind in kinds.items():
        if next(one for one in config.__mro__ if name in inspect.get_annotations(one)) is owner:
            field = known[name]
            default = "made anew" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
            told = plain(field.metadata.get("help") or "See transformers.")
            kind = kind if isinstance(kind, str) else inspect.formatannotation(kind)
            yield from (f"#### `{name}`", "", f"`{kind}`, default {default}. {told}", "")


# ---------------------------------------------------------------------------------------------------------------------
# What is exported


def first_sentence(of: Any) -> str:
    text = " ".join((inspect.getdoc(of) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=[.:])\s(?=[A-Z])", text)[0].rstrip(":.").replace("``", "`").replace("|", r"\|")


def exported(_: Path) -> str:
    """What `selfgen` exports, with where it is."""
    import selfgen

    lines = ["| name | what it is | where |", "|---|---|---|"]
    for name in selfgen.__all__:
        found = getattr(selfgen, name)
        file = f"{found.__module__.replace('.', '/')}.py"
        lines.append(f"| `{name}` | {first_sentence(found)} | [{file}](../{file}) |")
    return "\n".join(lines)


def ops() -> dict[str, list[str]]:
    """The public ops by their module, which is their page in docs/kernels."""
    import selfgen_kernels
    from selfgen_kernels.ops import OPS

    found: dict[str, list[str]] = {}
    for name, op in OPS.items():
        if name in selfgen_kernels.__all__:
            found.setdefault(op.module, []).append(name)
    return found


def all_ops(_: Path) -> str:
    """All public ops, with what each does and its page."""
    import selfgen_kernels

    lines = ["| op | what it does |", "|---|---|"]
    for module, names in ops().items():
        told = {name: first_sentence(getattr(selfgen_kernels, name)) for name in names}
        lines += [f"| [`{name}`](kernels/{module}.md) | {text} |" for name, text in told.items()]
    return "\n".join(lines)


def op_names(_: Path) -> str:
    pages = {name: module for module, names in ops().items() for name in names}
    return ",\n".join(f"[`selfgen_kernels.{name}`](kernels/{pages[name]}.md)" for name in sorted(pages))


def backends(page: Path) -> str:
    """The kernels of the ops of one page."""
    from selfgen_kernels.ops import OPS

    by_kernels: dict[tuple[str, ...], list[str]] = {}
    for name in ops()[page.stem]:
        by_kernels.setdefault(OPS[name].kernels, []).append(f"`{name}`")
    return "\n".join(
        f"- {', '.join(names)}: {', '.join(['torch (any device)', *(BACKENDS[kernel] for kernel in kernels)])}"
        for kernels, names in by_kernels.items()
    )


PARTS: dict[str, Callable[[Path], str]] = {
    "commands": commands,
    "fields": fields,
    "exported": exported,
    "ops": all_ops,
    "op_names": op_names,
    "backends": backends,
}
"""By their names; each takes the path of its page."""
