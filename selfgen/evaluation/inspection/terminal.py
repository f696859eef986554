"""Inspected rows as text for a terminal, in colours where it has them; signs say the same without."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from .records import InspectedRow
from .token_texts import TokenTexts, visible
from .words import kind_of, number, share, slip_told

MOST_TOKENS = 400
"""Tokens of an answer that are shown; the page has all."""
_STYLES = {"agree": "underline blue", "differ": "bold dark_orange", "slip": "bold reverse", "after": "dim"}
_LEVELS = "▁▂▃▄▅▆▇█"
_SMALL = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def show(
    rows: Sequence[InspectedRow], texts: TokenTexts, settings: Mapping[str, str], console: Console | None = None
) -> None:
    """Print the rows."""
    console = console or Console(highlight=False)
    console.print(Text(visible(", ".join(f"{name} {value}" for name, value in settings.items())), style="dim"))
    console.print(_legend(any(row.passes is not None for row in rows)))
    for count, row in enumerate(rows, start=1):
        console.print(Rule(Text(f"Row {count} (sample_id {row.sample_id})"), align="left", style="dim"))
        console.print(Text(_summary(row)))
        console.print(Padding(_context(row, texts), (1, 0, 1, 2)))
        console.print(Padding(_losses(row, console.width - 2), (0, 0, 1, 2)))
        console.print(Text(slip_told(row, texts)))
        console.print(_answers(row, texts))


def _legend(has_passes: bool) -> Text:
    text = Text().append("‹token›", _STYLES["agree"])
    text.append(" self token that agrees with the reference   ")
    text.append("‹self≠reference›", _STYLES["differ"])
    text.append(" self token that differs")
    if has_passes:
        text.append("   ² what follows settled in pass 2")
    return text


def _summary(row: InspectedRow) -> str:
    made = f"made token by token in {row.steps} steps"
    if row.passes is not None:
        made = f"{row.passes} passes, where a loop takes {row.steps} steps"
    return (
        f"{len(row.places)} tokens, {row.self_tokens} self tokens, of which {row.differing} differ"
        f"{share(row.differing, row.self_tokens, ' ({})')}; {made}; loss {number(row.loss)} nats per token, "
        f"{number(row.reference_loss)} after the reference"
    )


def _context(row: InspectedRow, texts: TokenTexts) -> Text:
    text = Text()
    shown = row.places[:MOST_TOKENS]
    for settled, group in groupby(shown, key=lambda place: place.settled):
        if settled is not None:
            text.append(str(settled).translate(_SMALL), "dim")
        for place in group:
            told, kind = texts.of(place.token), kind_of(place)
            if kind == "agree":
                text.append(f"‹{told.text}›", _STYLES[kind])
            elif kind:
                text.append(f"‹{told.text}≠{texts.of(place.reference).text}›", _STYLES[kind])
            else:
                text.append(told.text, "dim" if told.kind != "text" else "")
            if told.breaks:
                text.append("\n")
    _tell_of_more(text, len(row.places))
    return text


def _losses(row: InspectedRow, width: int) -> Text:
    """The losses as bars, each of as many tokens as there must be for them to fit into a line."""
    losses = [place.loss if math.isfinite(place.loss) else math.inf for place in row.places]
    per_bar = -(-len(losses) // max(1, width - 24))
    means = [math.fsum(losses[i : i + per_bar]) / len(losses[i : i + per_bar]) for i in range(0, len(losses), per_bar)]
    highest = max((one for one in means if math.isfinite(one)), default=0.0) or 1.0
    bars = "".join(_LEVELS[min(7, int(8 * one / highest))] if math.isfinite(one) else "!" for one in means)
    broken = sum(not math.isfinite(one) for one in losses)
    of = "" if per_bar == 1 else f", {per_bar} tokens per bar"
    return Text(f"{bars}  loss, up to {number(highest)}{of}{f'; ! {broken} not finite' if broken else ''}")


def _answers(row: InspectedRow, texts: TokenTexts) -> Table:
    table = Table(expand=True, header_style="dim", border_style="dim")
    cells = []
    for title, ids in (("reference", row.reference), ("free-running answer", row.answer)):
        table.add_column(title, ratio=1, overflow="fold")
        text = Text()
        for index, token in enumerate(ids[:MOST_TOKENS]):
            told, slip = texts.of(token), row.first_slip
            is_slip = index == slip
            style = "slip" if is_slip else "after" if slip is not None and index > slip else ""
            text.append(f"▸{told.text}◂" if is_slip else told.text, _STYLES.get(style, ""))
            if told.breaks:
                text.append("\n")
        _tell_of_more(text, len(ids))
        cells.append(text)
    table.add_row(*cells)
    return table


def _tell_of_more(text: Text, count: int) -> None:
    if count > MOST_TOKENS:
        text.append(f"\n({count - MOST_TOKENS} more tokens are not shown here, but in the page)", "italic")
