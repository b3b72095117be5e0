import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation import charts
from curation.funnel import FunnelStep

numbers = st.floats(-1e6, 1e6, allow_nan=False)


def parse(html: str) -> ET.Element:
    return ET.fromstring(f"<body>{html}</body>")


def find(html: str, name: str) -> list[ET.Element]:
    return [e for e in parse(html).iter() if e.get("class", "").split()[:1] == [name]]


def test_a_histogram_draws_counts_kept_and_thresholds():
    svg = charts.histogram_svg([0, 1, 2, 3], [4, 0, 2], [1, 0, 2], [(1.5, "a < b"), (9.0, "far")], "scores")
    assert [float(e.get("height")) for e in find(svg, "all") if e.tag == "rect"] == [96.0, 48.0]  # 4 is the tallest
    assert [float(e.get("height")) for e in find(svg, "kept")] == [24.0, 48.0]
    inside, outside = find(svg, "threshold")
    assert (inside.get("x1"), outside.get("x1")) == ("180.0", "360.0")
    assert [e.text for e in find(svg, "mark")] == ["a < b", "→ far"]


@given(edges=st.lists(numbers, min_size=2, max_size=9, unique=True).map(sorted), data=st.data())
def test_any_histogram_is_whole_and_inside_its_frame(edges, data):
    counts = data.draw(st.lists(st.integers(0, 10**9), min_size=len(edges) - 1, max_size=len(edges) - 1))
    svg = charts.histogram_svg(edges, counts, counts, [(data.draw(numbers), "t")])
    rects = [e for e in parse(svg).iter() if e.tag == "rect"]
    assert len(rects) == 2 * sum(1 for c in counts if c)
    for r in rects:
        assert 0 <= float(r.get("x")) <= 360
        assert 26 - 0.01 <= float(r.get("y")) <= 122


@given(low=numbers, high=numbers, wanted=st.integers(2, 9))
def test_ticks_are_inside_and_few(low, high, wanted):
    found = charts.ticks(low, high, wanted)
    assert len(found) > 0 or low < high
    assert len(found) <= 3 * wanted
    for value in found:
        assert high < low or low - abs(low) * 1e-6 - 1e-6 <= value <= max(low, high) + abs(high) * 1e-6 + 1e-6


def test_a_line_chart_leaves_out_what_is_not_finite():
    svg = charts.line_chart_svg(
        {"a": [(0, 1.0), (1, math.nan), (2, 3.0)], "b&c": [(0, 2.0)]}, "x", "y", [(1.0, "here")]
    )
    first, second = (e for e in parse(svg).iter() if e.tag == "polyline")
    assert (len(first.get("points").split()), len(second.get("points").split())) == (2, 1)
    assert "b&amp;c" in svg
    assert charts.line_chart_svg({"a": [(0, math.nan)]}) == ""


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 10, "0"), (1, 3, "33.3"), (1, 10**6, "<0.1"), (10**6 - 1, 10**6, "99.9"), (5, 5, "100")],
)
def test_a_share_is_never_rounded_to_all_or_nothing(part, whole, text):
    assert charts.share(part, whole) == f"{text}\u00a0%"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234, "1,234"), (0.28312, "0.283"), (2.5e6, "2.5M"), (3.1e9, "3.1B"), (1e-9, "0"), (12345.6, "12.3k")],
)
def test_numbers_are_short(value, text):
    assert charts.number(value) == text


def test_funnel_and_bars_escape_their_words_and_keep_proportion():
    evil = "<img src=x>"
    html = charts.funnel_html([FunnelStep(evil, 200, 50, 10, 150, 40)], evil) + charts.bars_html([(evil, 3)], 4)
    html += charts.stacked_html([(evil, 1, "good"), ("b", 3, "bad")])
    assert "<img" not in html
    widths = [e.get("style") for e in parse(html).iter() if e.tag == "i"]
    assert widths == ["width:100%", "width:75.000%", "width:25.000%", "width:100.00%", "width:25.000%", "width:75.000%"]
    assert "10 of them for a missing value" in html
    assert "40 by this rule alone" in html
    assert charts.funnel_html([]) == ""


def test_bins_of_whole_numbers_are_told_as_such():
    svg = charts.histogram_svg([0.5, 1.5, 2.5], [3, 1], [1, 0])
    assert [t.text for t in parse(svg).iter() if t.tag == "title"] == ["1: 3 rows, 1 kept", "2: 1 rows, 0 kept"]
    wide = charts.histogram_svg([0.5, 3.5], [3])
    assert "1 to 3: 3 rows" in wide
    assert {e.text for e in find(svg, "tick")} == {"1", "2"}


@given(data=st.data(), count=st.integers(1, 26))
def test_any_map_of_sizes_is_inside_its_frame(data, count):
    edges = [2 ** (3 + i / 4) for i in range(count + 1)]
    cell = st.tuples(
        st.integers(0, count - 1), st.integers(0, count - 1), st.integers(1, 10**9), st.none() | st.just(0)
    )
    cells = data.draw(st.lists(cell, min_size=1, max_size=30))
    svg = charts.size_map_svg(edges, cells, thresholds={"width": [9, 10**6], "height": [9]})
    shapes = find(svg, "cell")
    assert len(shapes) == len(cells)
    for e in shapes:
        assert 40 - 0.1 <= float(e.get("x")) <= 340
        assert 8 - 0.1 <= float(e.get("y")) <= 308
        assert 0 < float(e.get("fill-opacity")) <= 1
    assert len(find(svg, "threshold")) == (2 if edges[-1] > 9 else 0)
    assert charts.size_map_svg([], []) == ""


def test_bars_of_kept_parts_escape_and_keep_proportion():
    html = charts.two_bars_html([("<b>", 4, 1), ("x", 2, None)], 8)
    assert "<b>" not in html
    widths = [e.get("style") for e in parse(html).iter() if e.tag == "i"]
    assert widths == ["width:100.00%", "width:25.00%", "width:50.00%"]
    assert "50\u00a0%" in html


def test_a_share_below_a_tenth_of_a_percent_is_no_markup():
    html = charts.bars_html([("a", 1)], 10**6) + charts.two_bars_html([("a", 1, None)], 10**6)
    html += charts.funnel_html([FunnelStep("r", 10**6, 10**6 - 1, 0, 1, 0)])
    assert html.count("&lt;0.1") == 3
    parse(html)
