"""What mkdocs.yml builds the site from besides docs/: its hooks.

- Pages of the repository that lie outside docs/ (README.md, ARCHITECTURE.md, ...) are pages of the site, too, and so is
  every file or folder that a page links to. Links stand as GitHub needs them, and are turned round here.
- Docstrings are shown here alone: between ``<!-- site: NAME -->`` and ``<!-- end: NAME -->`` a page has what readers on
  GitHub see in their place. What else is known to the code stands in docs/ itself (``tools.reference``).
- Below each entry of docs/troubleshooting.md stand its messages (``tools.messages``).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools import messages, reference

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {"README.md": "index.md", **{name: name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")}}
"""Pages outside docs/ -> their names on the site. Other files have the place that they have in the repository."""
LEXERS = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".json": "json", ".toml": "toml"}
PICTURES = (".png", ".svg")
LARGEST = 40_000  # bytes of a text that gets a page of its own
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
REPLACED = re.compile(r"<!-- site: (\w+) -->\n.*?<!-- end: \1 -->", re.DOTALL)
COMMENT = re.compile(r"^<!-- (source|generated|end): .*? -->\n?", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages outside docs/, and what pages link to."""
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
    markdown = REPLACED.sub(lambda found: PARTS[found[1]](DOCS / place), markdown)
    return COMMENT.sub("", markdown)


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
    prose = REPLACED.sub("", FENCED.sub("", page.read_text(encoding="utf-8")))
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


def api_part(_: Path) -> str:
    """What `selfgen` exports, for mkdocstrings to fill in."""
    import selfgen

    lines: list[str] = []
    for name in (*selfgen.__all__, "trl.SFTConfig", "trl.SFTTrainer"):
        lines.append(f"::: selfgen.{name}")
        if name.endswith("Config"):
            lines += ["    options:", "      members: false", "", "Its fields: [every field](options.md)."]
        lines.append("")
    return "\n".join(lines)


def ops_part(page: Path) -> str:
    """The ops of a page of docs/kernels, likewise."""
    return "\n\n".join(f"::: selfgen_kernels.{name}" for name in reference.ops()[page.stem])


PARTS: dict[str, Callable[[Path], str]] = {
    "api": api_part,
    "ops": ops_part,
    "trainer_fields": lambda _: reference.trainer_fields(),
}


def with_messages(page: str) -> str:
    """docs/troubleshooting.md with all messages of each entry in the place of its patterns."""
    found, left = messages.by_entry(page, messages.messages())
    if left:
        raise PluginError("messages without an entry in docs/troubleshooting.md: see python -m tools.messages")
    lists = iter(found.values())

    def listed(_: re.Match[str]) -> str:
        return "\n".join(["**Messages**", "", *(f"- {reference.plain(text)}" for text in next(lists))])

    return messages.COMMENT.sub(listed, page)
