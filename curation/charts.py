"""Charts as text: inline SVG and HTML that need no script and no network. Pure functions; all text is escaped.

Their colours are CSS variables, so one page serves light and dark: `stylesheet()` goes into its `<style>`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from curation.funnel import FunnelStep

Point = tuple[float, float]
_WIDTH = 360.0


def stylesheet() -> str:
    """The CSS of the page and of every chart."""
    return (files("curation") / "templates" / "report.css").read_text(encoding="utf-8")


def number(value: float) -> str:
    """A short number: 1,234, 0.283, 2.5M."""
    if abs(value) < 1e-6:
        return "0"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.3g}" if abs(value) < 1e3 else f"{value:,.0f}"


def share(part: float, whole: float) -> str:
    """A percentage, never rounded to 0 % or 100 % when it is neither."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    text = f"{percent:.1f}" if percent < 99.95 or part == whole else "99.9"
    return "<0.1\u00a0%" if part and text == "0.0" else f"{text.removesuffix('.0')}\u00a0%"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers between low and high, both included where they are round."""
    if not math.isfinite(high - low) or high <= low:
        return [low]
    rough = (high - low) / max(1, wanted - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _svg(height: float, body: Iterable[str], label: str, width: float = _WIDTH) -> str:
    text = escape(label)
    return f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{text}">{"".join(body)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def histogram_svg(
    edges: Sequence[float],
    counts: Sequence[int],
    kept: Sequence[int] | None = None,
    thresholds: Sequence[tuple[float, str]] = (),
    label: str = "",
) -> str:
    """A histogram.

    edges       bins + 1 values, rising
    counts      rows in each bin
    kept        of them kept, drawn over the others
    thresholds  (value, text): a line each; one outside the range is drawn at its end with an arrow
    """
    height, base, top = 150.0, 122.0, 26.0
    low, high = edges[0], edges[-1]
    wide, most = (high - low) or 1.0, max(counts, default=0) or 1
    bar = _WIDTH / max(1, len(counts))

    whole_numbers = all((e - 0.5).is_integer() for e in map(float, edges))

    def bars(values: Sequence[int], kind: str) -> Iterable[str]:
        for i, n in enumerate(values):
            if n:
                tall = max(1.0, n / most * (base - top))
                gap = 0.4 if bar < 30 else 3.0
                x, thick = i * bar + gap, max(0.5, bar - 2 * gap)
                title = ""
                if kind == "all":
                    told = f"{_span(edges[i], edges[i + 1], whole_numbers)}: {n:,} rows"
                    told += f", {kept[i]:,} kept" if kept else ""
                    title = f"<title>{escape(told)}</title>"
                yield (
                    f'<rect class="{kind}" x="{x:.2f}" y="{base - tall:.2f}" width="{thick:.2f}" '
                    f'height="{tall:.2f}">{title}</rect>'
                )

    body = [*bars(counts, "all"), *bars(kept or (), "kept")]
    body.append(f'<line class="axis" x1="0" y1="{base}" x2="{_WIDTH:g}" y2="{base}"/>')
    for value in ticks(low, high):
        if whole_numbers and not float(value).is_integer():
            continue
        x = (value - low) / wide * _WIDTH
        anchor = "start" if x < 14 else "end" if x > _WIDTH - 14 else "middle"
        body.append(_text(x, base + 15, number(value), anchor))
    for i, (value, text) in enumerate(thresholds):
        x = min(max((value - low) / wide, 0.0), 1.0) * _WIDTH
        arrow = "← " if value < low else "→ " if value > high else ""
        y = 11.0 + 12 * (i % 2)
        body.append(f'<line class="threshold" x1="{x:.1f}" y1="{y + 3:.1f}" x2="{x:.1f}" y2="{base}"/>')
        anchor = "start" if x < 60 else "end" if x > _WIDTH - 60 else "middle"
        body.append(_text(x, y, arrow + text, anchor, "mark"))
    return _svg(height, body, label or "histogram")


def _span(low: float, high: float, whole_numbers: bool) -> str:
    """What a bin holds: `3`, `3 to 5` of whole numbers, else its edges."""
    if not whole_numbers:
        return f"{number(low)} to {number(high)}"
    first, last = int(low + 0.5), int(high - 0.5)
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def line_chart_svg(
    curves: Mapping[str, Sequence[Point]],
    x_label: str = "",
    y_label: str = "",
    marks: Sequence[tuple[float, str]] = (),
    from_zero: bool = True,
    width: float = 520.0,
) -> str:
    """Lines over a common x, a legend below; `marks` are (x, text), a dashed line each.

    Points whose y is not finite are left out. The chart is half as high as it is `width`.
    """
    height, left, top = width / 2, 46.0, 22.0
    base = height - 56
    clean = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in curves.items()
    }
    flat = [p for points in clean.values() for p in points]
    if not flat:
        return ""
    x0, x1 = min(p[0] for p in flat), max(p[0] for p in flat)
    y0, y1 = min(p[1] for p in flat), max(p[1] for p in flat)
    y0 = min(0.0, y0) if from_zero else y0
    sx, sy = (width - left - 10) / ((x1 - x0) or 1), (base - top) / ((y1 - y0) or 1)
    body = []
    for value in ticks(y0, y1):
        y = base - (value - y0) * sy
        body.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{width - 10}" y2="{y:.1f}"/>')
        body.append(_text(left - 6, y + 4, number(value), "end"))
    for value in ticks(x0, x1, 6):
        body.append(_text(left + (value - x0) * sx, base + 16, number(value)))
    body.append(f'<line class="axis" x1="{left}" y1="{base}" x2="{width - 10}" y2="{base}"/>')
    for value, text in marks:
        x = left + (min(max(value, x0), x1) - x0) * sx
        body.append(f'<line class="threshold" x1="{x:.1f}" y1="{top - 6}" x2="{x:.1f}" y2="{base}"/>')
        body.append(
            _text(x, top - 10, text, "end" if x > width - 80 else "start" if x < left + 80 else "middle", "mark")
        )
    for i, points in enumerate(clean.values()):
        path = " ".join(f"{left + (x - x0) * sx:.1f},{base - (y - y0) * sy:.1f}" for x, y in points)
        body.append(f'<polyline class="line series{i % 6}" points="{path}"/>')
    body.append(_text((left + width - 10) / 2, base + 33, x_label, kind="label"))
    body.append(_text(0, 11, y_label, "start", "label"))
    chart = _svg(height - 18, body, f"{y_label} over {x_label}", width)
    if len(clean) < 2:
        return chart
    keys = "".join(f'<span><i class="key series{i % 6}"></i>{escape(name)}</span>' for i, name in enumerate(clean))
    return f'{chart}<p class="legend">{keys}</p>'


def size_map_svg(
    edges: Sequence[float],
    cells: Sequence[Sequence[int]],
    columns: tuple[str, str] = ("width", "height"),
    thresholds: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """Images by width (to the right) and height (up), both in ratio: the darker a cell, the more images.

    edges       of the cells, px, rising, the same for both sides
    cells       (column, row, rows, kept or None)
    thresholds  px by column: a line each
    """
    if not cells:
        return ""
    left, side, top = 40.0, 300.0, 8.0
    base, count = top + side, len(edges) - 1
    cell, most = side / count, math.log1p(max(c[2] for c in cells))
    first, span = math.log2(edges[0]), math.log2(edges[-1] / edges[0])

    def place(px: float) -> float:
        return (math.log2(px) - first) / span * side

    body = [f'<rect class="ground" x="{left}" y="{top}" width="{side}" height="{side}"/>']
    for x, y, rows, kept in cells:
        spans = " × ".join(f"{edges[i]:.0f}–{edges[i + 1]:.0f}" for i in (x, y))
        title = f"{spans} px: {rows:,} images" + ("" if kept is None else f", {kept:,} kept")
        body.append(
            f'<rect class="cell" x="{left + x * cell:.1f}" y="{base - (y + 1) * cell:.1f}" width="{cell:.2f}" '
            f'height="{cell:.2f}" fill-opacity="{0.14 + 0.86 * math.log1p(rows) / most:.2f}">'
            f"<title>{escape(title)}</title></rect>"
        )
    body.append(f'<line class="diagonal" x1="{left}" y1="{base}" x2="{left + side}" y2="{top}"/>')
    told = [16 << i for i in range(12) if edges[0] <= 16 << i <= edges[-1]]
    for mark in told if len(told) > 1 else [round(edges[0]), round(edges[-1])]:
        at = min(max(place(mark), 0.0), side)
        body.append(_text(left + at, base + 15, f"{mark:,}"))
        body.append(_text(left - 6, base - at + 4, f"{mark:,}", "end"))
    for name, values in (thresholds or {}).items():
        for px in (v for v in values if edges[0] < v < edges[-1] and name in columns):
            at = place(px)
            x1, y1, x2, y2 = (left + at, top, left + at, base)
            if name == columns[1]:
                x1, y1, x2, y2 = (left, base - at, left + side, base - at)
            body.append(f'<line class="threshold" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    body.append(_text(left + side / 2, base + 31, "width, px", kind="label"))
    return _svg(base + 36, body, "images by width and height", left + side + 10)


def two_bars_html(items: Sequence[tuple[str, int, int | None]], whole: int) -> str:
    """Horizontal bars of (name, rows, of them kept): the kept part dark in the bar of all."""
    most = max((n for _, n, _ in items), default=0) or 1
    rows = []
    for name, n, kept in items:
        inner = "" if kept is None else f'<i class="kept" style="width:{100 * kept / max(1, n):.2f}%"></i>'
        told = f"{n:,} rows" + ("" if kept is None else f", {kept:,} kept")
        rows.append(
            f'<div class="bar-name">{escape(name)}</div>'
            f'<div class="bar" title="{escape(told)}"><i class="all" style="width:{max(0.4, 100 * n / most):.2f}%">'
            f'{inner}</i></div><div class="bar-number">{number(n)} <small>{escape(share(n, whole))}</small></div>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def bars_html(
    items: Sequence[tuple[str, float]], whole: float | None = None, tones: Mapping[str, str] | None = None
) -> str:
    """Horizontal bars with their numbers. `whole` adds percentages; `tones` gives an item a CSS class (good, bad)."""
    most = max((n for _, n in items), default=0) or 1
    rows = []
    for name, n in items:
        tone = (tones or {}).get(name, "")
        percent = f"<small>{escape(share(n, whole))}</small>" if whole else ""
        rows.append(
            f'<div class="bar-name">{escape(name)}</div>'
            f'<div class="bar"><i class="{escape(tone)}" style="width:{max(0.4, 100 * n / most):.2f}%"></i></div>'
            f'<div class="bar-number">{number(n)} {percent}</div>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def stacked_html(parts: Sequence[tuple[str, float, str]]) -> str:
    """One bar of several parts: (name, size, CSS class)."""
    whole = sum(n for _, n, _ in parts) or 1
    cells = "".join(
        f'<i class="{escape(tone)}" style="width:{100 * n / whole:.3f}%" title="{escape(f"{name}: {n:,}")}"></i>'
        for name, n, tone in parts
        if n
    )
    return f'<div class="stacked">{cells}</div>'


def funnel_html(steps: Sequence[FunnelStep], first: str = "rows") -> str:
    """The funnel: what each rule met, dropped and left."""
    if not steps:
        return ""
    whole = steps[0].rows_in or 1
    rows = [
        f'<div class="step"><b>{escape(first)}</b><div class="bar"><i class="kept" style="width:100%"></i></div>'
        f'<span class="left">{steps[0].rows_in:,}</span><span class="why"></span></div>'
    ]
    for s in steps:
        nulls = f", {s.nulls:,} of them for a missing value" if s.nulls else ""
        alone = f" · {s.alone:,} by this rule alone" if s.dropped else ""
        why = f"−{s.dropped:,}{nulls}{alone}" if s.dropped else "dropped nothing"
        rows.append(
            f'<div class="step"><b>{escape(s.rule)}</b><div class="bar">'
            f'<i class="kept" style="width:{100 * s.left / whole:.3f}%"></i>'
            f'<i class="lost" style="width:{100 * s.dropped / whole:.3f}%"></i></div>'
            f'<span class="left">{s.left:,} <small>{escape(share(s.left, whole))}</small></span>'
            f'<span class="why">{why}</span></div>'
        )
    return f'<div class="funnel">{"".join(rows)}</div>'
