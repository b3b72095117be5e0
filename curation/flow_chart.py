"""The river: one band as wide as the list, from which every step takes its rows away. SVG as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from curation.charts import share

WIDTH, THICK, TOP = 1080.0, 104.0, 34.0
_BEND, _FALL = 16.0, 58.0
_LEAST = 1.6  # px of the thinnest strip
MOST_STEPS = 6
_LETTERS = 6.3  # px of an average letter of a label


@dataclass(frozen=True)
class Branch:
    """Rows that leave at one step. `tone` is the CSS class of their colour: bad (no image), lost (a rule)."""

    name: str
    rows: int
    tone: str = "lost"


def fewer(branches: Sequence[Branch], most: int = MOST_STEPS) -> list[Branch]:
    """Branches with rows, in order; where there are more than `most`, the smallest are put together at the end."""
    there = [b for b in branches if b.rows]
    if len(there) <= most:
        return there
    ranked = sorted(range(len(there)), key=lambda i: -there[i].rows)
    large, small = sorted(ranked[: most - 1]), [there[i] for i in ranked[most - 1 :]]
    return [there[i] for i in large] + [Branch(f"{len(small)} more", sum(b.rows for b in small), small[-1].tone)]


def river_svg(whole: int, branches: Sequence[Branch], start: str, end: str) -> str:
    """The figure; "" without rows.

    whole     rows at the source, called `start`; what the branches leave is called `end`
    branches  in order of the way; no more than about six can be told apart
    """
    if whole <= 0:
        return ""
    step = WIDTH / (len(branches) + 1.25)
    tall = TOP + THICK + _FALL + 44
    left, body, edge = whole, [], ""
    for i, b in enumerate(branches):
        before, after = _thick(left, whole), _thick(left - b.rows, whole)
        x = step * (i + 0.75)
        edge += f" V{TOP + before:.2f} H{x:.1f}"
        body.append(_branch(x, before, after, b, whole, step))
        left -= b.rows
    edge += f" V{TOP + _thick(left, whole):.2f} H{WIDTH:g} V{TOP:g} Z"
    body.insert(0, f'<path class="kept" d="M0,{TOP:g}{edge}"/>')
    body.append(f'<text class="flow-start" x="0" y="{TOP - 12:g}">{whole:,} {escape(start)}</text>')
    told = f"{left:,} {escape(end)} <tspan>{escape(share(left, whole))}</tspan>"
    body.append(f'<text class="flow-end" x="{WIDTH:g}" y="{TOP - 12:g}" text-anchor="end">{told}</text>')
    label = f"{whole:,} {start}, {left:,} {end}"
    return (
        f'<svg class="chart flow" viewBox="0 0 {WIDTH:g} {tall:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(body)}</svg>"
    )


def _thick(rows: int, whole: int) -> float:
    return max(_LEAST, rows / whole * THICK) if rows else 0.0


def _branch(x: float, before: float, after: float, branch: Branch, whole: int, step: float) -> str:
    """A strip of the band's lower edge that bends down, and its name below it."""
    outer, thick = TOP + before, max(_LEAST, before - after)
    inner = outer - thick
    bottom = TOP + THICK + _FALL
    near, far = x + _BEND, x + _BEND + thick
    round_far = _BEND + thick
    path = (
        f"M{x:.1f},{inner:.2f} A{round_far:.2f},{round_far:.2f} 0 0 1 {far:.2f},{outer + _BEND:.2f} V{bottom:g} "
        f"H{near:.2f} V{outer + _BEND:.2f} A{_BEND:g},{_BEND:g} 0 0 0 {x:.1f},{outer:.2f} Z"
    )
    title = f"{branch.name}: {branch.rows:,} rows, {share(branch.rows, whole)}"
    at, anchor = (near, "start")
    return (
        f'<path class="{escape(branch.tone)}" d="{path}"><title>{escape(title)}</title></path>'
        f'<text class="flow-lost" x="{at:.1f}" y="{bottom + 17:g}" text-anchor="{anchor}">−{branch.rows:,}</text>'
        f'<text class="tick" x="{at:.1f}" y="{bottom + 33:g}" text-anchor="{anchor}">'
        f"{escape(_short(branch.name, step))}<title>{escape(title)}</title></text>"
    )


def _short(name: str, width: float) -> str:
    most = max(6, int((width - 14) / _LETTERS))
    return name if len(name) <= most else name[: most - 1].rstrip() + "…"


def branches_of(causes: Iterable[tuple[str, int]], rules: Iterable[tuple[str, int]]) -> list[Branch]:
    """What failed, by cause, then what rules dropped. With rules the causes are one branch."""
    failed, dropped = list(causes), [Branch(name, rows) for name, rows in rules]
    if not dropped:
        return fewer([Branch(name, rows, "bad") for name, rows in failed])
    lost = sum(rows for _, rows in failed)
    name = failed[0][0] if len(failed) == 1 else "no image"
    return [*([Branch(name, lost, "bad")] if lost else []), *fewer(dropped, MOST_STEPS - 1)]
