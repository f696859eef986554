"""What mkdocs.yml builds the site from besides docs/: its hooks.

- Pages of the repository that lie outside docs/ (README.md, ARCHITECTURE.md, ...) are pages of the site, too, and so is
  every file or folder that a page links to. Links stand as GitHub needs them, and are turned round here.
- What is known elsewhere is made from there: between ``<!-- generated: NAME -->`` and ``<!-- end -->`` a page has a few
  words for readers on GitHub, in whose place the site has all fields, commands or the API; each command has a page.
- Below each entry of docs/troubleshooting.md stand its messages (``tools.messages``).
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from html import escape
from inspect import formatannotation, get_annotations
from io import StringIO
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools import messages

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {"README.md": "index.md", **{name: name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")}}
"""Pages outside docs/ -> their names on the site. Other files have the place that they have in the repository."""
LEXERS = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".json": "json", ".toml": "toml"}
PICTURES = (".png", ".svg")
LARGEST = 40_000  # bytes of a text that gets a page of its own
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
GENERATED = re.compile(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
SOURCE = re.compile(r"^<!-- source: .*? -->\n", re.MULTILINE)


def on_config(config: MkDocsConfig) -> None:
    """Put a page per command into the navigation."""
    from selfgen.cli import COMMANDS

    for section in config.nav or ():
        for entries in section.values():
            for entry in entries if isinstance(entries, list) else ():
                if entry.get("Commands") == "commands.md":
                    entry["Commands"] = [{"Overview": "commands.md"}, *(f"commands/{name}.md" for name in COMMANDS)]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages outside docs/, what pages link to, and the pages of the commands."""
    from selfgen.cli import COMMANDS

    for name in COMMANDS:
        files.append(File.generated(config, f"commands/{name}.md", content=command_page(name)))
    todo = [*(ROOT / name for name in PAGES), *DOCS.rglob("*.md")]
    while todo:
        path = todo.pop()
        where = place_of(path)
        if where not in files.src_uris:
            if path.suffix in (".md", *PICTURES):
                files.append(File.generated(config, where, abs_src_path=str(path)))
            else:
                files.append(File.generated(config, where, content=text_page(path)))
        if path.suffix == ".md" and path.exists():
            todo += [target for target in targets_of(path) if place_of(target) not in files.src_uris]
        elif path.is_dir():
            todo += [file for file in files_of(path) if is_shown(file) and place_of(file) not in files.src_uris]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill a page with what is made for it, and turn its links to where files are on the site."""
    place = page.file.src_uri
    if place.partition("/")[0] in ("benchmarks", "examples", "tests", "tools"):
        page.meta["search"] = {"exclude": True}
    if page.file.abs_src_path:
        markdown = with_links_of_the_site(markdown, Path(page.file.abs_src_path), place)
    if place == "troubleshooting.md":
        markdown = with_messages(markdown)
    markdown = GENERATED.sub(lambda found: PARTS[found[1]](), markdown)
    return SOURCE.sub("", markdown)


# ---------------------------------------------------------------------------------------------------------------------
# Files and links


def place_of(path: Path) -> str:
    """Where a file or folder of the repository is on the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        return f"{name}/index.md"
    return PAGES.get(name, name if path.suffix in (".md", *PICTURES) else f"{name}.md")


def targets_of(page: Path) -> list[Path]:
    """The files and folders of the repository that a page links to."""
    prose = FENCED.sub("", page.read_text(encoding="utf-8"))
    found = [(page.parent / link.partition("#")[0]).resolve() for link in LINK.findall(prose) if is_local(link)]
    return [path for path in found if path.exists() and path.is_relative_to(ROOT)]


def is_local(link: str) -> bool:
    return not link.startswith("#") and "://" not in link


def with_links_of_the_site(markdown: str, source: Path, place: str) -> str:
    def turned(found: re.Match[str]) -> str:
        path, hash_, anchor = found[0].partition("#")
        target = (source.parent / path).resolve()
        if not is_local(found[0]) or not target.exists():
            return found[0]  # which mkdocs refuses, if it leads nowhere
        return posixpath.relpath(place_of(target), posixpath.dirname(place) or ".") + hash_ + anchor

    parts = re.split(f"({FENCED.pattern})", markdown, flags=FENCED.flags)
    return "".join(part if part.startswith("```") else LINK.sub(turned, part) for part in parts)


def files_of(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.is_file() and file.stat().st_size]


def is_shown(file: Path) -> bool:
    return file.suffix in PICTURES or file.stat().st_size <= LARGEST


def text_page(path: Path) -> str:
    """A file as it is, or a folder as the list of its files."""
    title = f"# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir():
        here = place_of(path)
        names = [
            f"[{file.name}]({posixpath.relpath(place_of(file), posixpath.dirname(here))})" if is_shown(file)
            else f"{file.name} (in the repository)"
            for file in files_of(path)
        ]  # fmt: skip
        return title + "\n".join(f"- {name}" for name in names)
    return f"{title}````{LEXERS.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}\n````\n"


# ---------------------------------------------------------------------------------------------------------------------
# What is made from code


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]])", r"\\\1", escape(" ".join(text.split()), quote=False))


def command_page(name: str) -> str:
    """All that ``selfgen NAME --help-all`` says."""
    parser = parser_of(name)
    formatter = parser._get_formatter()
    usage = parser.format_usage().removeprefix("usage: ").strip()
    lines = [f"# selfgen {name}", "", plain(parser.description or ""), "", "```", usage, "```", ""]
    lines += [plain(parser.epilog or ""), ""]
    for group in parser._action_groups:
        actions = [one for one in group._group_actions if one.help != argparse.SUPPRESS and one.dest != "help"]
        if not actions:
            continue
        title = group.title or "options"
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        for action in actions:
            lines += [f"#### `{formatter._format_action_invocation(action)}`", ""]
            lines += [plain(formatter._expand_help(action)) if action.help else "", ""]
    return "\n".join(lines)


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a command, taken where it would print all its help or read arguments."""
    from selfgen import cli

    found: list[argparse.ArgumentParser] = []

    def take(parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        found.append(parser)
        raise SystemExit

    asked = patch.multiple(argparse.ArgumentParser, print_help=take, parse_known_args=take)
    with asked, logging_as_it_is(), redirect_stdout(StringIO()), redirect_stderr(StringIO()), suppress(SystemExit):
        cli.main([name, "--help-all"])
    (parser,) = found
    return parser


@contextmanager
def logging_as_it_is() -> Iterator[None]:
    """Commands set up the log, which is that of mkdocs here."""
    ours, handlers = logging.getLogger("selfgen"), list(logging.root.handlers)
    level, root_level = ours.level, logging.root.level
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        ours.setLevel(level)
        logging.root.setLevel(root_level)


def fields_part() -> str:
    """Every field of the configurations, under the class that has it."""
    from transformers import TrainingArguments

    from selfgen import BSSConfig, RACConfig

    ours = [(BSSConfig, one) for one in BSSConfig.__mro__ if one is not TrainingArguments]
    lines: list[str] = []
    for config, owner in (*ours, (RACConfig, RACConfig), (BSSConfig, TrainingArguments)):
        fields = {field.name: field for field in dataclasses.fields(config)}
        kinds = {name: kind for name, kind in get_annotations(owner).items() if name in fields}
        if not kinds:
            continue
        about = "See transformers." if owner is TrainingArguments else (owner.__doc__ or "").partition("\n\n")[0]
        lines += [f"## {owner.__name__}", "", about.replace("``", "`"), ""]
        for name, kind in kinds.items():
            if next(one for one in config.__mro__ if name in get_annotations(one)) is owner:
                lines += field_lines(fields[name], kind if isinstance(kind, str) else formatannotation(kind))
    return "\n".join(lines)


def field_lines(field: dataclasses.Field, kind: str) -> list[str]:
    default = "made anew" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
    told = plain(field.metadata.get("help") or "See transformers.")
    return [f"#### `{field.name}`", "", f"`{kind}`, default {default}. {told}", ""]


def commands_part() -> str:
    """All commands, with what each does."""
    from selfgen.cli import COMMANDS

    told = {name: plain(parser_of(name).description or "") for name in COMMANDS}
    return "\n".join(f"- [`selfgen {name}`](commands/{name}.md): {text}" for name, text in told.items())


def api_part() -> str:
    """What the packages export, for mkdocstrings to fill in."""
    import selfgen
    import selfgen_kernels

    lines: list[str] = []
    for package in (selfgen, selfgen_kernels):
        lines += [f"## {package.__name__}", ""]
        for name in package.__all__:
            lines.append(f"::: {package.__name__}.{name}")
            if name.endswith("Config"):
                lines += ["    options:", "      members: false", "", "Its fields: [every field](options.md)."]
            lines.append("")
    return "\n".join(lines)


PARTS = {"fields": fields_part, "commands": commands_part, "api": api_part}


def with_messages(page: str) -> str:
    """docs/troubleshooting.md with all messages of each entry in the place of its patterns."""
    found, left = messages.by_entry(page, messages.messages())
    if left:
        raise PluginError("messages without an entry in docs/troubleshooting.md: see python -m tools.messages")
    lists = iter(found.values())

    def listed(_: re.Match[str]) -> str:
        return "\n".join(["**Messages**", "", *(f"- {plain(text)}" for text in next(lists))])

    return messages.COMMENT.sub(listed, page)
