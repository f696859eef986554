"""Inspected rows as one HTML file, which needs nothing else: no network, no framework, and to be read no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby

from .records import InspectedRow, Place
from .token_texts import TokenTexts, visible
from .words import kind_of, number, share, slip_told

MADE_BY = '<meta name="generator" content="selfgen inspect">'
"""By which a file that was written here is known."""
_HIGH = 100  # of a chart, in units of its own


def page(
    rows: Sequence[InspectedRow],
    texts: TokenTexts,
    settings: Mapping[str, str],
    warnings: Sequence[str] = (),
) -> str:
    """The page; ``settings`` says what it shows, and ``warnings`` what it does not."""
    own = files(__package__)
    style, script = (own.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    said = "".join(f'<p class="warning">{_text(one)}</p>\n' for one in warnings)
    pairs = "".join(f"<div><dt>{_text(name)}</dt> <dd>{_text(value)}</dd></div>" for name, value in settings.items())
    body = "\n".join(_section(number, row, texts) for number, row in enumerate(rows))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MADE_BY}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>selfgen inspect: {_text(settings.get("model", ""))}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>Contexts, token by token</h1>
<dl class="settings">{pairs}</dl>
{said}{_LEGEND}
</header>
<main>
{body}
</main>
<div id="tip" role="tooltip" hidden></div>
<script>
{script}</script>
</body>
</html>
"""


_LEGEND = """<dl class="legend">
<dt><span class="t code">token</span></dt><dd>reference token</dd>
<dt><span class="t code agree">token</span></dt><dd>self token, sampled by the model: it agrees with the reference</dd>
<dt><span class="t code differ">token<s>other</s></span></dt><dd>self token that differs, and the reference token in its
place, struck out</dd>
<dt><span class="pass">2</span></dt><dd>what follows settled in pass 2: nothing up to the next such number changed after
it. 0 needed no pass</dd>
<dt><span class="t code slip">token</span></dt><dd>first slip of the free-running answer</dd>
</dl>
<p class="quiet keys">Point at a token, tap it, or go there with the keyboard (Tab, then ← and →; Escape closes). p is
the probability that the model itself gives, at temperature 1.</p>"""


def _section(number: int, row: InspectedRow, texts: TokenTexts) -> str:
    name = f"r{number}"
    settled = "" if row.passes is None else _strip(row)
    return f"""<section aria-labelledby="{name}">
<h2 id="{name}">Row {number + 1} (sample_id {row.sample_id})</h2>
<dl class="summary">{_summary(row)}</dl>
<details><summary>Prompt, {len(row.prompt)} tokens</summary>
<pre dir="auto">{escape(texts.passage(row.prompt))}</pre></details>
<h3>Mixed context</h3>
{_context(name, row, texts)}
<h3>Loss</h3>
{_chart(name, row)}
{settled}
<h3>Running freely</h3>
{_answers(name, row, texts)}
</section>"""


def _summary(row: InspectedRow) -> str:
    passes = "none" if row.passes is None else str(row.passes)
    facts = [
        ("tokens", str(len(row.places)), ""),
        ("self tokens", str(row.self_tokens), ""),
        ("of them differ", str(row.differing), share(row.differing, row.self_tokens)),
        ("passes", passes, f"a loop takes {row.steps} steps"),
        ("first slip", "none" if row.first_slip is None else f"token {row.first_slip + 1}", ""),
        ("loss", f"{number(row.loss)}", f"nats; {number(row.reference_loss)} after the reference"),
    ]
    return "".join(
        f"<div><dt>{name}</dt><dd>{value}{f' <small>{more}</small>' if more else ''}</dd></div>"
        for name, value, more in facts
    )


def _context(name: str, row: InspectedRow, texts: TokenTexts) -> str:
    parts = []
    for settled, group in groupby(enumerate(row.places), key=lambda item: item[1].settled):
        if settled is not None:
            parts.append(f'<span class="pass"><span class="hidden">pass </span>{settled}</span>')
        for index, place in group:
            told = texts.of(place.token)
            inner, kind = escape(told.text), kind_of(place)
            if place.differs:
                inner += f"<s>{escape(texts.of(place.reference).text)}</s>"
            tip = "\n".join([f"token {index + 1} of {len(row.places)}", *_told(row, place, texts)])
            parts.append(_token(inner, [kind, told.kind], tip, f"{name}-{index}", index == 0, told.breaks))
    label = "Mixed context; arrow keys go from token to token"
    return f'<div class="tokens" id="{name}-tokens" role="list" aria-label="{label}">{"".join(parts)}</div>'


def _told(row: InspectedRow, place: Place, texts: TokenTexts) -> list[str]:
    """What is said of one place, a name and a value per line."""

    def of(token: int, prob: float, chance: float | None) -> str:
        sampled = (
            "" if chance is None or math.isclose(chance, prob, rel_tol=1e-6) else f", sampled with {number(chance)}"
        )
        return f"“{texts.of(token).text}”  p {number(prob)}{sampled}  id {token}"

    kinds = {"": "reference token", "agree": "self token, as the reference", "differ": "self token, differs"}
    lines = [f"kind\t{kinds[kind_of(place)]}"]
    if place.is_self:
        lines.append(f"self\t{of(place.token, place.token_prob, place.token_chance)}")
    lines.append(f"reference\t{of(place.reference, place.reference_prob, place.reference_chance)}")
    if place.likeliest not in (place.reference, place.token):
        lines.append(f"likeliest\t{of(place.likeliest, place.likeliest_prob, None)}")
    if place.settled is not None:
        lines.append(f"settled\t{f'in pass {place.settled} of {row.passes}' if place.settled else 'before any pass'}")
    lines.append(f"loss\t{number(place.loss)} nats; {number(place.reference_loss)} after the reference")
    return lines


def _chart(name: str, row: InspectedRow) -> str:
    losses, plain = ([getattr(one, what) for one in row.places] for what in ("loss", "reference_loss"))
    highest = max((one for one in (*losses, *plain) if math.isfinite(one)), default=0.0) or 1.0

    def high(loss: float) -> float:
        return _HIGH * (min(loss / highest, 1.0) if not math.isnan(loss) else 1.0)

    bars = "".join(
        f'<rect id="{name}-{index}-bar" class="{kind_of(place)[:1]}" x="{index + 0.06:g}" width=".88" '
        f'y="{_HIGH - high(place.loss):.1f}" height="{high(place.loss):.1f}"/>'
        + (f'<rect class="d" x="{index + 0.2:g}" width=".6" y="{_HIGH + 3}" height="5"/>' if place.differs else "")
        for index, place in enumerate(row.places)
    )
    line = "".join(f"{'L' if index else 'M'}{index} {_HIGH - high(one):.1f}h1" for index, one in enumerate(plain))
    broken = sum(not math.isfinite(one) for one in losses)
    said = f" {broken} losses are not finite, and drawn as high as the highest." if broken else ""
    return f"""<figure>
<svg class="chart" data-of="{name}-tokens" viewBox="0 0 {len(row.places)} {_HIGH + 10}" preserveAspectRatio="none"
 role="img" aria-label="Loss of each reference token, at most {number(highest)} nats">{bars}<path d="{line}"/></svg>
<figcaption>Nats of each reference token, up to {number(highest)}. Bars: after the mixed context; line: after the
reference. Marks under the bars: self tokens that differ.{said}</figcaption>
</figure>"""


def _strip(row: InspectedRow) -> str:
    runs = [(settled, len(list(group))) for settled, group in groupby(one.settled for one in row.places)]
    spans = "".join(f'<span style="flex-grow:{count}">{settled}</span>' for settled, count in runs)
    return f"""<div class="strip" aria-hidden="true">{spans}</div>
<p class="quiet">The pass in which each token settled.</p>"""


def _answers(name: str, row: InspectedRow, texts: TokenTexts) -> str:
    sides = [("Reference", "reference", row.reference), ("Free-running answer", "answer", row.answer)]
    parts = []
    for title, kind, ids in sides:
        tokens = []
        for index, token in enumerate(ids):
            told, slip = texts.of(token), row.first_slip
            mark = "" if slip is None or index < slip else "slip" if index == slip else "after"
            tip = f"token {index + 1} of {len(ids)}\ntoken\t“{told.text}”  id {token}"
            inner = escape(told.text) + ('<span class="hidden"> (first slip)</span>' if mark == "slip" else "")
            tokens.append(_token(inner, [mark, told.kind], tip, f"{name}-{kind}-{index}", index == 0, told.breaks))
        parts.append(
            f'<div><h4>{title}</h4><div class="tokens" role="list" aria-label="{title}">{"".join(tokens)}</div></div>'
        )
    return f'<p class="quiet">{_text(slip_told(row, texts))}</p>\n<div class="pair">{"".join(parts)}</div>'


def _token(inner: str, kinds: Sequence[str], tip: str, name: str, first: bool, breaks: bool) -> str:
    classes = " ".join(["t", *(one for one in kinds if one not in ("", "text"))])
    stop = 0 if first else -1
    return (
        f'<span class="{classes}" id="{name}" role="listitem" tabindex="{stop}" data-tip="{escape(tip)}">{inner}</span>'
        + ("<br>" if breaks else "")
    )


def _text(text: str) -> str:
    return escape(visible(text))
