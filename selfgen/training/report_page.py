"""The page of a report: HTML that needs nothing besides itself, in the colours that the reader's system asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .metrics import duration, readable

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 10, 34  # margins of the plotted area
_MOST_POINTS = 300  # of a curve: more are drawn as means of their neighbours
_STYLE = """
:root { --back: #fff; --box: #f5f6f8; --text: #1b1f24; --dim: #59636e; --grid: #d9dee4;
  --c0: #0b62c4; --c1: #c2410c; --c2: #15803d; --c3: #7e22ce }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --box: #1e232b; --text: #e6e9ee; --dim: #9ba6b3;
  --grid: #38414d; --c0: #6cb0ff; --c1: #ff9b63; --c2: #5fd38a; --c3: #cf9bff } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; background: var(--back); color: var(--text);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1.1rem; margin: 1.5rem 0 .5rem } p { margin: .25rem 0 }
.dim, figcaption span, dt { color: var(--dim) }
.boxes, .plots { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)) }
.boxes { grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); margin: 1rem 0 }
.boxes > div, figure { background: var(--box); border-radius: .5rem; padding: .75rem; margin: 0 }
dl, dd { margin: 0 } dt, dd small, th { font-size: .85rem } dd { font-size: 1.2rem } dd small { display: block }
figcaption b { font-weight: 600 } svg { display: block; width: 100%; height: auto }
svg text { fill: var(--dim); font-size: 12px } .grid { stroke: var(--grid); stroke-width: 1 }
.s0 { --c: var(--c0) } .s1 { --c: var(--c1) } .s2 { --c: var(--c2) } .s3 { --c: var(--c3) }
polyline { fill: none; stroke: var(--c); stroke-width: 2 } .s1 polyline { stroke-dasharray: 6 3 }
circle { fill: var(--c) } .key { color: var(--c); white-space: nowrap; margin-right: .75rem; font-size: .85rem }
table { border-collapse: collapse; width: 100% } tr + tr > * { border-top: 1px solid var(--grid) }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; vertical-align: top } th { overflow-wrap: normal }
.bar { display: flex; height: .75rem; border-radius: .4rem; overflow: hidden; margin: .4rem 0 }
.bar i { background: var(--c) }
"""


@dataclass(frozen=True)
class Panel:
    """Curves over steps with one unit, by their labels; a value that is not finite is a gap in its curve."""

    title: str
    unit: str
    series: Mapping[str, Points]

    @property
    def from_zero(self) -> bool:
        """Whether the axis begins at 0: not for losses, whose small differences count."""
        return self.title != "Loss"


def page(found: Mapping[str, Any], panels: Sequence[Panel], name: str) -> str:
    """The HTML page of what ``report.json`` has, of a run that is called ``name``."""
    title = f"selfgen: training report of {name}"
    ended = "complete" if found["complete"] else "ended early"
    done, asked = found["rounds"], found["max_rounds"]
    rounds = f", {done if done == asked else f'{done} of {asked}'} rounds" if asked > 1 else ""
    plots = "\n".join(f"<figure>{_caption(one)}{svg(one)}</figure>" for one in panels)
    settings = "".join(f"<tr><td>{_name(key)}<td>{escape(str(value))}" for key, value in found["settings"].items())
    metrics = "".join(
        f"<tr><td>{_name(key)}<td>{escape(one['unit'] or '-')}<td>{escape(one['meaning'])}"
        for key, one in found["metrics"].items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="dim">step {found["step"]} of {found["max_steps"]}: {ended}{rounds}</p>
{_run(found)}
<div class="boxes">{_boxes(found)}</div>
{_gap(found["gap"])}
<h2>Course</h2>
<div class="plots">
{plots}
</div>
{f"<h2>Settings</h2><table><tr><th>name<th>value{settings}</table>" if settings else ""}
<h2>Metrics</h2>
<p class="dim">Figures are of the process that logs, as means since the log line before. All values are in
report.json.</p>
<table><tr><th>name<th>unit<th>meaning{metrics}</table>
</body>
</html>
"""


def _run(found: Mapping[str, Any]) -> str:
    if "command" not in found:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    told, command = escape(f"{found['date']}, {versions}"), escape(found["command"])
    return f'<p class="dim">{told}</p>\n<p><code>{command}</code></p>'


def svg(panel: Panel) -> str:
    """A plot of a panel, as an SVG element whose colours the style of the page gives."""
    series = [_thinned(points) for points in panel.series.values()]
    finite = [(x, y) for points in series for x, y in points if math.isfinite(y)]
    if not finite:
        return "<p>no finite value</p>"
    xs, ys = ([point[axis] for point in finite] for axis in (0, 1))
    x_ticks = _ticks(min(xs), max(xs), whole=True)
    y_ticks = _ticks(min(0.0, *ys) if panel.from_zero else min(ys), max(ys))
    first, last = min(xs), max(xs)
    low, high = y_ticks[0], y_ticks[-1]

    def across(x: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * (x - first) / ((last - first) or 1), 1)

    def down(y: float) -> float:
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (y - low) / ((high - low) or 1), 1)

    parts = []
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down(y)}" y2="{down(y)}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{down(y) + 4}" text-anchor="end">{_tick(y)}</text>')
    for x in x_ticks:
        anchor = "start" if across(x) < _LEFT + 20 else "end" if across(x) > _WIDTH - 30 else "middle"
        parts.append(f'<text x="{across(x)}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="{anchor}">{_tick(x)}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>')
    for number, points in enumerate(series):
        drawn = []
        for run in _runs(points):
            drawn.append(f'<polyline points="{" ".join(f"{across(x)},{down(y)}" for x, y in run)}"/>')
        if len(points) <= 40:
            drawn += [
                f'<circle r="2.5" cx="{across(x)}" cy="{down(y)}"><title>step {x:g}: {readable(y)}</title></circle>'
                for x, y in points
                if math.isfinite(y)
            ]
        parts.append(f'<g class="s{number % 4}">{"".join(drawn)}</g>')
    said = f"{panel.title}: " + "; ".join(f"{label} {_course(points)}" for label, points in panel.series.items())
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'


def _caption(panel: Panel) -> str:
    keys = [
        f'<span class="key s{number % 4}">{"╌" if number % 4 == 1 else "━"} {escape(label)}</span>'
        for number, label in enumerate(panel.series)
    ]
    unit = f" <span>{escape(panel.unit)}</span>" if panel.unit else ""
    return f"<figcaption><b>{escape(panel.title)}</b>{unit}<div>{''.join(keys)}</div></figcaption>"


def _boxes(found: Mapping[str, Any]) -> str:
    boxes = []
    for name, title in (("loss", "loss, first and last"), ("eval_loss", "evaluation loss, first and last")):
        if ends := found[name]:
            boxes.append(_box(title, " → ".join(_number(ends[end]) for end in ("first", "last")), "nats per token"))
    before, after = found["gap"]["before"], found["gap"]["after"]
    if before and after:
        boxes.append(_box("gap, before and after", f"{before['gap']:.1f} → {after['gap']:.1f}", "points"))
    parts = found["seconds"]
    if (total := sum(parts.values())) > 0:
        shares = {name: seconds / total for name, seconds in parts.items()}
        bar = "".join(
            f'<i class="s{n}" style="width:{100 * share:.1f}%"></i>' for n, share in enumerate(shares.values())
        )
        keys = " ".join(
            f'<span class="key s{n}">■ {name} {one:.0%}</span>' for n, (name, one) in enumerate(shares.items())
        )
        boxes.append(f"<div>{_term('time in steps', duration(total))}<div class=bar>{bar}</div>{keys}</div>")
    return "".join(boxes)


def _box(title: str, value: str, note: str) -> str:
    return f"<div>{_term(title, f'{escape(value)}<small class=dim>{escape(note)}</small>')}</div>"


def _term(title: str, value: str) -> str:
    return f"<dl><dt>{escape(title)}<dd>{value}</dl>"


def _gap(gaps: Mapping[str, Mapping[str, Any] | None]) -> str:
    rows = []
    for when, gap in gaps.items():
        if gap is not None:
            interval = f"[{_number(gap['gap_low'])}, {_number(gap['gap_high'])}]"
            shares = (f"{100 * gap[name]:.1f}%" for name in ("right_under_references", "right_running_freely"))
            cells = [f"{when} (step {gap['step']})", *shares, f"{gap['gap']:.1f} {interval}"]
            rows.append("<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells))
    if not rows:
        return ""
    one = gaps["before"] or gaps["after"] or {}
    return (
        "<h2>Gap</h2><p>Tokens that are right under references, minus those that are right when the model runs "
        f"freely, in points with a 95% interval: on {one['gap_rows']} rows of the {one['of']} data. So few rows show "
        "large changes only; selfgen eval measures it on more.</p>"
        f"<table><tr><th>training<th>under references<th>running freely<th>gap{''.join(rows)}</table>"
    )


def _name(key: str) -> str:
    """Of an option or a metric, which may be broken after each of its words."""
    return escape(key).replace("_", "_<wbr>")


def _number(value: float | None) -> str:
    return "-" if value is None else readable(value)


def _course(points: Points) -> str:
    first, last = points[0], points[-1]
    return f"from {readable(first[1])} at step {first[0]:g} to {readable(last[1])} at step {last[0]:g}"


def _thinned(points: Points) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / _MOST_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _runs(points: Points) -> list[list[tuple[float, float]]]:
    """What lies between values that are not finite."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About four round numbers; they reach from ``low`` to ``high`` or beyond, and with ``whole`` stay within."""
    span = (high - low) or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(span / 4))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor * 4 >= span * 0.999)
    if whole:
        step = max(1.0, step)
        return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    begin, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(begin, max(end, begin + 1) + 1)]


def _tick(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
