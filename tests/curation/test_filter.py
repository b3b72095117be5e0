import json
import math
from fractions import Fraction

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation.filter import filter_dataset, make_selection
from curation.filter_config import FilterConfig
from curation.report import report
from schemas.config import build_config
from schemas.errors import PairmillError
from schemas.events import Notice
from shards.dataset import Dataset
from shards.locks import lock
from shards.reader import read_table
from shards.select import read_selection
from shards.writer import write_table
from tests.curation.scored import numbered, write_dataset, write_scores

SCORES = [0.1, 0.2, 0.3, 0.4, None, math.nan, 0.25, 0.35]


@pytest.fixture
def dataset(tmp_path):
    statuses = ["success", "success", "timeout", "success", "success", "success", "no_image", "success"]
    rows = numbered(8, status=statuses, width=[100, 300, None, 300, 300, 300, None, 100])
    made = write_dataset(tmp_path / "ds", rows)
    write_scores(made, "clip", {"clip_score": SCORES})
    return made


def kept(dataset, name="best"):
    return np.flatnonzero(read_selection(dataset, name).keep).tolist()


def reasons(dataset, name="best"):
    return read_table(dataset.folder, f"selections/{name}.parquet", ["reason"])["reason"].to_pylist()


def test_a_recipe_from_flags_keeps_reasons_and_the_funnel(dataset):
    config = FilterConfig(output="best", where=("clip_score >= 0.2", "width >= 200"))
    result = filter_dataset(dataset, config)
    assert (result.kept, result.rows, result.path) == (2, 8, "selections/best.parquet")
    assert kept(dataset) == [1, 3]
    first, null = "clip_score >= 0.2", "clip_score >= 0.2:null"
    assert reasons(dataset) == [first, None, "status", None, null, null, "width >= 200:null", "width >= 200"]
    steps = [(s.rule, s.rows_in, s.dropped, s.nulls, s.left, s.alone) for s in result.funnel]
    # Row 0 fails both rules; rows 4 and 5 fail the first only, 6 and 7 the second only.
    assert steps == [("status", 8, 1, 0, 7, 0), (first, 7, 3, 2, 4, 2), ("width >= 200", 4, 2, 1, 2, 2)]
    about = json.loads((dataset.folder.local / "selections/best.json").read_text())
    assert [s["rule"] for s in about["funnel"]] == ["status", first, "width >= 200"]
    assert about["recipe"]["rules"] == [{"where": {"expr": "clip_score >= 0.2"}}, {"where": {"expr": "width >= 200"}}]
    assert about["thresholds"][0] == {"rule": first, "column": "clip.clip_score", "op": ">=", "value": 0.2}


def test_the_same_recipe_gives_the_same_bytes(dataset):
    out = []
    for _ in range(2):
        filter_dataset(dataset, FilterConfig(output="best", where=("clip_score > 0.1",), sample=0.9))
        folder = dataset.folder.local / "selections"
        out.append([(folder / n).read_bytes() for n in ("best.parquet", "best.json")])
    assert out[0] == out[1]


def test_flags_run_in_the_documented_order(dataset):
    top = {"top": 2, "by": "clip_score"}
    config = FilterConfig(split=0.5, sample=0.5, where=("1 = 1",), preset="datacomp-clip-l14-30", dry_run=True, **top)
    result = filter_dataset(dataset, config)
    names = [s.rule for s in result.funnel]
    assert names == ["status", "clip_score top 30 %", "1 = 1", "top 2 by clip_score", "sample 0.5", "split 0.5 first"]


def test_nothing_left_is_an_error_and_writes_nothing(dataset):
    with pytest.raises(PairmillError, match=r"No row is left, nothing written. `clip_score > 0.9` dropped the last 7"):
        filter_dataset(dataset, FilterConfig(output="best", where=("clip_score > 0.9",)))
    assert not dataset.folder.names("selections")


def test_dry_run_writes_nothing_and_shows_the_curve(dataset):
    before = sorted(p.name for p in dataset.folder.local.rglob("*"))
    result = filter_dataset(dataset, FilterConfig(dry_run=True, where=("clip_score >= 0.25 and width >= 200",)))
    assert sorted(p.name for p in dataset.folder.local.rglob("*")) == before
    assert (result.path, result.kept) == (None, 1)
    by_score, by_width = result.curves
    assert dict(by_score.points)[0.25] == 1
    assert min(by_score.points)[1] == 2  # row 1, at 0.2, comes in
    assert (by_width.column, dict(by_width.points)[100.0]) == ("width", 2)  # row 7 comes in


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    limit=st.floats(0, 0.5, width=32), values=st.lists(st.none() | st.floats(0, 0.5, width=32), min_size=1, max_size=20)
)
def test_a_curve_says_what_a_run_with_that_threshold_keeps(tmp_path_factory, limit, values):
    made = write_dataset(tmp_path_factory.mktemp("c"), numbered(len(values)))
    write_scores(made, "clip", {"clip_score": values})
    curve = make_selection(made, None, [{"where": f"clip_score > {limit!r}"}], dry_run=True).curves
    for threshold, left in [p for c in curve for p in c.points][:3]:
        again = make_selection(made, None, [{"where": f"clip_score > {threshold!r}"}], dry_run=True)
        assert again.kept == left


def test_from_starts_from_a_selection(dataset):
    filter_dataset(dataset, FilterConfig(output="wide", where=("width >= 200",)))
    result = filter_dataset(dataset, FilterConfig(output="best", from_="wide", where=("clip_score > 0.2",)))
    assert kept(dataset) == [3]
    assert [s.rule for s in result.funnel] == ["status", "from wide", "clip_score > 0.2"]
    about = json.loads((dataset.folder.local / "selections/best.json").read_text())
    assert about["recipe"]["from"] == {"name": "wide", "recipe": {"rules": [{"where": {"expr": "width >= 200"}}]}}
    with pytest.raises(PairmillError, match=r"no selection `wid`. Did you mean `wide`"):
        filter_dataset(dataset, FilterConfig(output="best", from_="wid"))


def test_a_selection_from_another_goes_stale_with_the_others_scores(dataset):
    filter_dataset(dataset, FilterConfig(output="scored", where=("clip_score > 0.1",)))
    filter_dataset(dataset, FilterConfig(output="best", from_="scored", where=("width > 0",)))
    assert "clip" in read_selection(dataset, "best").about["made_from"]["scores"]


def test_an_unfinished_score_set_is_an_error_that_names_the_command(dataset):
    write_scores(dataset, "late", {"late": [1.0] * 8}, shards=[0])
    with pytest.raises(PairmillError, match=r"scores/late lacks 1 of 2 shards \(the first: 1\).*pairmill score"):
        filter_dataset(dataset, FilterConfig(output="best", where=("late > 0",)))
    assert filter_dataset(dataset, FilterConfig(output="best", where=("width > 0",))).kept == 6  # others do not need it


def test_scores_older_than_their_pairs_are_an_error(dataset):
    file = dataset.stage("scores/clip").file(1)
    write_table(dataset.folder, file, read_table(dataset.folder, file), {}, "another digest")
    with pytest.raises(PairmillError, match=r"lacks 1 of 2 shards"):
        filter_dataset(dataset, FilterConfig(output="best", where=("clip_score > 0",)))


def test_unfinished_pairs_are_an_error(dataset):
    (dataset.folder.local / dataset.stage("pairs").file(1)).unlink()
    with pytest.raises(PairmillError, match=r"pairs for 1 of 2 shards"):
        filter_dataset(dataset, FilterConfig(output="best", where=("width > 0",)))


@pytest.mark.parametrize("name", [None, "", "../x", "a/b", ".hidden", "x" * 101])
def test_names_that_cannot_be_a_file_are_refused(dataset, name):
    with pytest.raises(PairmillError, match=r"selection"):
        filter_dataset(dataset, FilterConfig(output=name, where=("width > 0",)))


def test_a_threshold_on_another_scale_warns(dataset):
    seen = []
    filter_dataset(dataset, FilterConfig(output="best", where=("clip_score <= 28 and width <= 320",)), seen.append)
    (notice,) = [e for e in seen if isinstance(e, Notice)]
    assert notice.warning
    assert "28 lies far outside what `clip.clip_score` holds here, 0.1 to 0.4" in notice.text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("- wher: width > 1", "no rule `wher`. Did you mean `where`"),
        ("- top: {shar: 0.3, by: width}", "unknown key `shar`. Did you mean `share`"),
        ("- top: {by: width}", "give `share` or `count`"),
        ("- top: 0.3", "`top` needs settings"),
        ("- where: width > 1\n  top: 3", "expected one `NAME: settings`"),
        ("rule:\n- where: width > 1", "unknown key `rule`. Did you mean `rules`"),
        ("where: width > 1", "unknown key `where`"),
        ("just text", "expected a list of rules"),
        ("- where: !!python/object/apply:os.system ['true']", "is not YAML"),
        ("- preset: datacomp-clip-l14", "no preset `datacomp-clip-l14`. Did you mean `datacomp-clip-l14-30`"),
        ("[", "is not YAML"),
    ],
)
def test_faults_of_a_rules_file_are_named(dataset, tmp_path, text, found):
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(PairmillError) as error:
        filter_dataset(dataset, FilterConfig(output="best", rules=str(path)))
    assert found in str(error.value)


def test_a_rules_file_runs_in_its_own_order(dataset, tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text("rules:\n- top: {count: 3, by: clip_score}\n- where: {expr: width >= 200, name: wide}\n")
    result = filter_dataset(dataset, FilterConfig(output="best", rules=str(path)))
    assert [s.rule for s in result.funnel] == ["status", "top 3 by clip_score", "wide"]
    assert kept(dataset) == [3]
    with pytest.raises(PairmillError, match=r"no.yaml cannot be read"):
        filter_dataset(dataset, FilterConfig(output="best", rules=str(tmp_path / "no.yaml")))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"top": 0.3}, "--top and --by go together"),
        ({"top": 1.5, "by": "width"}, "a share below 1 or a whole number"),
        ({"rules": "x.yaml", "sample": 0.5}, "--rules holds the whole recipe"),
        ({"wheer": ("a",)}, "Did you mean `where`"),
    ],
)
def test_flags_that_do_not_go_together(values, found):
    with pytest.raises(PairmillError) as error:
        build_config(FilterConfig, values, "filter")
    assert found in str(error.value)


rows = st.lists(
    st.tuples(
        st.sampled_from(["success", "success", "no_image", "timeout"]),
        st.none() | st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4, math.nan]),
        st.none() | st.integers(0, 3),
    ),
    min_size=1,
    max_size=24,
)


@settings(max_examples=40, deadline=None)
@given(
    rows=rows,
    shards=st.integers(1, 3),
    share=st.sampled_from([0.29, 0.3, 0.5, 0.9]),
    of=st.sampled_from(["kept", "all"]),
)
def test_rules_agree_with_plain_python(tmp_path_factory, rows, shards, share, of):
    width = [w for _, _, w in rows]
    made = write_dataset(
        tmp_path_factory.mktemp("p"), numbered(len(rows), shards, status=[s for s, _, _ in rows], width=width)
    )
    write_scores(made, "clip", {"clip_score": [c for _, c, _ in rows]})
    items = [{"where": "width >= 1"}, {"top": {"share": share, "by": "clip_score", "of": of}}]
    good = [i for i, (s, _, _) in enumerate(rows) if s != "timeout"]
    wide = [i for i in good if width[i] is not None and width[i] >= 1]
    base = wide if of == "kept" else good
    ranked = sorted(
        (i for i in base if not (rows[i][1] is None or math.isnan(rows[i][1]))), key=lambda i: (-rows[i][1], i)
    )
    best = set(ranked[: int(Fraction(str(share)) * len(base))])
    want = [i for i in wide if i in best]
    got = make_selection(made, None, items, dry_run=True)
    assert got.kept == len(want)
    assert [s.left for s in got.funnel] == [len(good), len(wide), len(want)]
    if want:
        make_selection(made, "best", items)
        assert kept(made) == want
        assert [r is None for r in reasons(made)] == [i in want for i in range(len(rows))]


def test_a_dataset_on_a_store_gives_the_same_selection(tmp_path):
    out = []
    for place in (tmp_path, f"memory://{tmp_path.name}"):
        made = write_dataset(place, numbered(9, 3, width=list(range(9))))
        write_scores(made, "clip", {"clip_score": [i / 10 for i in range(9)]})
        filter_dataset(place, FilterConfig(output="best", where=("width > 1",), top=3, by="clip_score", sample=0.9))
        report(place)
        out.append([made.folder.read_bytes(f"selections/best.{s}") for s in ("parquet", "json")])
        assert made.folder.names("reports") == ["report.html", "report.json"]
    assert out[0] == out[1]


def test_a_second_copy_of_the_same_filter_is_refused(dataset):
    with lock(dataset.folder, "selections/best"), pytest.raises(PairmillError, match="is being written by process"):
        filter_dataset(dataset, FilterConfig(output="best", where=("width > 0",)))


def test_carried_columns_of_a_later_list_are_null_before_it(tmp_path):
    made = write_dataset(tmp_path, [[{"extra": 1}, {"extra": 5}]], [pa.field("extra", pa.int64())])
    assert make_selection(Dataset.open(made.url), None, [{"where": "extra > 2"}], dry_run=True).kept == 1


def test_config_modules_stay_light():
    assert pl.DataFrame  # the test's own; the module under test must not import it
    import ast
    import inspect

    import curation.filter_config as module

    names = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert names <= {"__future__", "typing", "pydantic", "schemas"}
