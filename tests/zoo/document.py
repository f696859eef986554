"""docs/models.md: each table is written by a slow test, and leaves the others as they are."""

from __future__ import annotations

import re
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


def reason(error: BaseException) -> str:
    """What an error says, without numbers that change from machine to machine and what to do instead."""
    text = " ".join(str(error).split()).replace("|", "/").replace("<", "(").replace(">", ")")
    text = re.sub(r"; (use|give) .*|: the ragged path of .*| \(logits differ by [^)]*\)", "", text)
    text = re.sub(r" by [0-9.]+% of their standard deviation.*", "", text)
    text = re.sub(r"^\w+ (uses|computes|looks|does|can't|restricts)", r"\1", text)
    return text[:140] or type(error).__name__
