"""`score expr`: values, aggregates of the whole dataset, nulls, what it was made from, and errors."""

import math

import polars as pl
import pytest

from curation.filter import make_selection
from curation.scores.config import ExprScoreConfig
from curation.scores.expr import score_expr
from schemas.config import build_config
from schemas.errors import PairmillError
from shards.scan import scan
from tests.curation.scored import numbered, write_dataset, write_scores
from tests.curation.scores.test_text import extend


@pytest.fixture
def dataset(tmp_path):
    shards = numbered(6, width=[100, 200, 300, None, 500, 600], caption=["a", "b", None, "d", "e", "f"])
    made = write_dataset(tmp_path / "data", shards)
    write_scores(made, "clip", {"clip_score": [0.1, 0.2, 0.3, 0.4, math.nan, 0.6]})
    return made


def config(expr, column="value", name="expr"):
    return ExprScoreConfig(expr=expr, column=column, name=name)


def values(dataset, column="value", name="expr"):
    return scan(dataset.stage(f"scores/{name}")).collect()[column]


@pytest.mark.parametrize(
    ("text", "kind", "want"),
    [
        ("width * 2", pl.Int32, [200, 400, 600, None, 1000, 1200]),
        ("width / 200.0", pl.Float64, [0.5, 1.0, 1.5, None, 2.5, 3.0]),
        ("width >= 300", pl.Boolean, [False, False, True, None, True, True]),
        ("upper(caption)", pl.String, ["A", "B", None, "D", "E", "F"]),
        ("clip_score", pl.Float32, pytest.approx([0.1, 0.2, 0.3, 0.4, None, 0.6])),
        ("clip.clip_score > 0.25", pl.Boolean, [False, False, True, True, None, True]),
        ("avg(width)", pl.Float64, [340.0] * 6),
        ("width - min(width)", pl.Int32, [0, 100, 200, None, 400, 500]),
        ("count(*) over (partition by caption = 'a')", pl.Int64, [1, 4, 1, 4, 4, 4]),
        ("sqrt(width - 200)", pl.Float64, [None, 0.0, 10.0, None, pytest.approx(17.32, abs=0.01), 20.0]),
        ("1", pl.Int32, [1] * 6),
    ],
)
def test_values(dataset, text, kind, want):
    score_expr(dataset, config(text))
    found = values(dataset)
    assert found.dtype == kind
    assert found.to_list() == want


def test_the_new_column_is_one_like_any_other(dataset):
    score_expr(dataset, config("clip_score * 2", "double"))
    score_expr(dataset, config("expr.double + 1", "more", "second"))
    assert make_selection(dataset, "s", [{"where": "more > 1.5"}, {"top": {"count": 2, "by": "double"}}]).kept == 2
    assert score_expr(dataset, config("clip_score * 2", "double")).done == 0


def test_the_sidecar_tells_which_scores_it_read(dataset):
    score_expr(dataset, config("clip_score * 2"))
    sidecar = dataset.stage("scores/expr").sidecar()
    assert sidecar.identity["scores"] == {"clip": dataset.stage("scores/clip").sidecar().fingerprint}
    assert sidecar.columns["value"]["what"] == "clip_score * 2"
    with pytest.raises(PairmillError, match="`expr` was 'clip_score"):
        score_expr(dataset, config("clip_score * 3"))


def test_a_grown_dataset_is_computed_anew(dataset):
    score_expr(dataset, config("count(*)"))
    grown = extend(dataset, ["x", "y"])
    assert score_expr(grown, config("count(*)")).done == 3
    assert values(grown).to_list() == [8] * 8


def test_scores_that_are_unfinished_are_not_read(dataset):
    grown = extend(dataset, ["x"])
    with pytest.raises(PairmillError, match="scores/clip lacks 1 of 3 shards"):
        score_expr(grown, config("clip_score * 2"))
    assert not dataset.folder.exists("scores/expr/sidecar.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip_scor * 2", "Did you mean `clip_score`"),
        ("clip_score *", "is not an expression"),
        ("captions", "a score is a number, a text"),
        ("sum(caption)", "cannot be computed"),
        ("width, height", "something follows its end|is not an expression"),
        ("select 1", "SELECT"),
        ("cast(caption as int)", "cannot be computed"),
        ("0.0 / (width - 100)", "cannot be computed: division by zero"),
    ],
)
def test_errors_name_the_fault_and_write_nothing(dataset, text, message):
    with pytest.raises(PairmillError, match=message):
        score_expr(dataset, config(text))
    assert "expr" not in dataset.folder.folders("scores")


def test_names_that_would_mislead(dataset):
    with pytest.raises(PairmillError, match="`--column caption` is a column of pairs"):
        score_expr(dataset, config("width", "caption"))
    with pytest.raises(PairmillError, match="`column`"):
        build_config(ExprScoreConfig, {"expr": "width", "column": "a b"}, "expr")
    score_expr(dataset, config("width"))
    with pytest.raises(PairmillError, match="which it would write"):
        score_expr(dataset, config("expr.value + 1"))
