import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from curation.flow_chart import THICK, Branch, branches_of, fewer, river_svg

names = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=40)
branches = st.lists(st.builds(Branch, names, st.integers(0, 10**6)), max_size=12)


@given(branches)
def test_fewer_branches_hold_the_same_rows(found):
    made = fewer(found)
    assert len(made) <= 6
    assert sum(b.rows for b in made) == sum(b.rows for b in found)
    assert all(b.rows for b in made)


@given(branches, st.integers(0, 10**6))
def test_any_river_is_whole_and_escaped(found, left):
    found = fewer(found)
    whole = sum(b.rows for b in found) + left
    svg = river_svg(whole, found, "<rows>", "kept & told")
    if not whole:
        assert svg == ""
        return
    shapes = [e for e in ET.fromstring(svg).iter() if e.tag == "path"]
    assert len(shapes) == len(found) + 1
    titles = [e.find("title").text for e in shapes if e.find("title") is not None]
    assert [t.rsplit(":", 1)[1].split()[0] for t in titles] == [f"{b.rows:,}" for b in found]


def test_the_band_is_as_thick_as_the_rows_that_are_left():
    svg = ET.fromstring(river_svg(100, [Branch("a", 25), Branch("b", 50)], "rows", "kept"))
    band = next(e for e in svg.iter() if e.get("class") == "kept").get("d")
    edges = [float(part.split()[0]) - 34 for part in band.split("V")[1:]]
    assert edges == [THICK, THICK * 0.75, THICK * 0.25, 0]


def test_failures_are_told_by_cause_only_where_nothing_was_selected():
    causes = [("timeout", 5), ("not_image", 2)]
    assert branches_of(causes, []) == [Branch("timeout", 5, "bad"), Branch("not_image", 2, "bad")]
    assert branches_of(causes, [("rule", 3)]) == [Branch("no image", 7, "bad"), Branch("rule", 3)]
    assert branches_of(causes[:1], [("rule", 3)])[0].name == "timeout"
    assert branches_of([], [("rule", 3)]) == [Branch("rule", 3)]
