"""The report of a run, in Markdown, made from the files that its sections have written and from nothing else.

python -m benchmarks.gpu.summary FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from . import results

FILE = "summary.md"
REHEARSAL = "**This is a rehearsal on a CPU with tiny sizes. No number below is a measurement of anything.**"


def of(folder: Path) -> str:
    run = json.loads((folder / results.RUN).read_text())
    found = {name: results.read(results.file_of(folder, name)) for name in run["sections"]}
    lines = [REHEARSAL, ""] if run["rehearsal"] else []
    lines += [f"`{run['command']}`, code {run['source']}", ""]
    begun = {name: result for name, result in found.items() if result.begin}
    abouts = {name: _about(result.begin) for name, result in begun.items()}
    for about in dict.fromkeys(abouts.values()):
        names = [name for name, one in abouts.items() if one == about]
        lines += [about if len(names) == len(abouts) else f"{about}: {', '.join(names)}", ""]
    lines += _table([_section(name, result) for name, result in found.items()])
    for name, result in found.items():
        if not result.rows and not result.notes:
            continue
        cut = "" if result.state in results.DONE else f" ({result.state}: not all of it)"
        lines += ["", f"## {name}{cut}"]
        for note in result.notes:
            lines += ["", note]
        for title in dict.fromkeys(row.table for row in result.rows):
            rows = [{**row.columns, **row.values} for row in result.rows if row.table == title]
            lines += ["", title, "", *_table(rows)]
    return "\n".join(lines) + "\n"


def _about(begin: dict[str, Any]) -> str:
    machine, versions = begin["machine"], begin["versions"]
    device = f"{machine['gpu']} (driver {machine['driver']}), " if machine["gpu"] else "no GPU, "
    software = ", ".join(f"{name} {number or 'not installed'}" for name, number in versions.items())
    return f"{device}{machine['cores']} cores, {machine['processor']}; {software}"


def _section(name: str, result: results.Result) -> dict[str, Any]:
    return {
        "section": name,
        "state": result.state,
        "seconds": result.end.get("seconds"),
        "limit, s": result.begin.get("limit_s"),
        "rows": len(result.rows),
        "attempts": result.attempts,
        "why": result.end.get("reason"),
    }


def _table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_text(row.get(name)) for name in names] for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(names))]
    cells.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]


def _text(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    print(of(Path(sys.argv[1])), end="")
