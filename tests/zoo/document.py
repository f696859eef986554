"""docs/models.md: each table is written by a slow test, and leaves the others as they are."""

from __future__ import annotations

from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"


def write_section(title: str, lines: list[str]) -> None:
    """Put ``lines`` below the heading ``title``."""
    first, *sections = DOCUMENT.read_text().split("\n## ")
    texts = {section.partition("\n")[0]: section for section in sections}
    texts[title] = "\n".join([title, "", *lines, ""])
    DOCUMENT.write_text("\n## ".join([first, *texts.values()]))


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table of markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
