import math

import polars as pl
import pyarrow as pa
import pytest

from curation.expressions import Threshold, compile_predicate, compile_value
from curation.table import Table
from schemas.errors import PairmillError
from tests.curation.scored import numbered, write_dataset, write_scores

NAN = math.nan
A = [0.5, NAN, None, -1.0]


@pytest.fixture
def table(tmp_path):
    captions = ["two words", None, "x\x1cy\u3000z  ", ""]
    rows = numbered(4, width=[100, 200, 300, None], height=[0, 0, 2, 2], caption=captions)
    carried = [pa.field("odd name", pa.int32()), pa.field("like", pa.int32()), pa.field("score", pa.float32())]
    rows = [[{**r, "odd name": 1, "like": 2, "score": 0.0} for r in shard] for shard in rows]
    dataset = write_dataset(tmp_path, rows, carried)
    write_scores(dataset, "clip", {"clip_score": A, "zero": [0.0] * 4})
    write_scores(dataset, "clip-l14", {"clip_score": [0.1, 0.2, 0.3, 0.4], "score": [1.0, 2.0, 3.0, 4.0]})
    return Table(dataset)


def verdicts(table, text):
    compiled = compile_predicate(text, table)
    return table.frame(compiled.columns).with_columns(z=compiled.expr).select("z").collect()["z"].to_list()


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("clip.clip_score >= 0.28", [True, None, None, False]),
        ("clip.clip_score <= 0.28", [False, None, None, True]),
        ("not (clip.clip_score < 0.28)", [True, None, None, False]),
        ("clip.clip_score <> 0.5", [False, None, None, True]),
        ("clip.clip_score between -2 and 0", [False, None, None, True]),
        ("clip.clip_score is null", [False, True, True, False]),
        ("clip.clip_score >= 0.28 or width >= 150", [True, True, True, None]),
        ("clip.clip_score >= 0.28 and width >= 150", [False, None, None, False]),
        ("clip-l14.clip_score > 0.25", [False, False, True, True]),
        ('"clip-l14".clip_score > 0.25', [False, False, True, True]),
        ('"clip-l14"."clip_score" > 0.25', [False, False, True, True]),
        ('"clip-l14.clip_score" > 0.25', [False, False, True, True]),
        ("clip-l14.clip_score-clip.zero > 0.25", [False, False, True, True]),
        ("width > avg(width)", [False, False, True, None]),
        ("row_number() over (order by width) >= 1", [True] * 4),
        ("count(*) = 4", [True] * 4),
        ("1 < 2", [True] * 4),
        ("caption_words = 2", [True, None, False, False]),
        ("caption_words = 3", [False, None, True, False]),
        ("caption_collapsed_characters = 5", [False, None, True, False]),
        ("char_length(caption) > 5", [True, None, True, False]),
        ("caption like 'two%'", [True, None, False, False]),
        ("caption = 'it''s width'", [False, None, False, False]),
        ('"odd name" = 1', [True] * 4),
        ('"like" = 2', [True] * 4),
        ("cast(width as double) > 150", [False, True, True, None]),
        ("width::double > 150", [False, True, True, None]),
        ("fetched_at > date '2024-01-01'", [None] * 4),
        ("extract(year from fetched_at) > 2000", [None] * 4),
        ("width in (100, 300)", [True, False, True, None]),
        ("case when width > 150 then 1 else 0 end = 1", [False, True, True, False]),
    ],
)
def test_what_a_predicate_says_of_each_row(table, text, want):
    assert verdicts(table, text) == want


@pytest.mark.parametrize(
    "text",
    [
        "clip.zero / clip.zero >= 0.28",
        "sqrt(clip.zero - 1) > 0",
        "ln(clip.zero - 1) > 0",
        "width > 0 and clip.zero / clip.zero > 0 - 1",
        "not (clip.zero / clip.zero < 1)",
        "greatest(clip.zero / clip.zero, 1.0) > 2 or width < 0",
    ],
)
def test_nan_that_arithmetic_makes_never_passes(table, text):
    assert True not in verdicts(table, text)


def test_nan_in_one_half_of_an_or_leaves_the_other_half(table):
    assert verdicts(table, "clip.zero / clip.zero > 1 or width >= 200") == [None, True, True, None]


def test_an_aggregate_means_the_whole_dataset_not_a_shard(table):
    # Shard 0 holds 1 and 2, shard 1 holds 3 and 4: by shards the answer would be F T F T.
    assert verdicts(table, "clip-l14.score > avg(clip-l14.score)") == [False, False, True, True]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("clip_score >= 0.28", "write `clip-l14.clip_score` or `clip.clip_score`"),
        ("score >= 1", "write `clip-l14.score` or `score`"),
        ("widht >= 200", "Did you mean `width`"),
        ("nonsense_column > 1", "It has: uid,"),
        ("width >=", "is not an expression"),
        ("width >= 200 height", "is not an expression"),
        ("width >= 200; 1 = 1", "is not an expression"),
        ("width) or (height", "is not an expression"),
        ("width + 1", "gives Int"),
        ("caption > (select 1)", "`SELECT` does not belong"),
        ("read_parquet('/etc/passwd') = 1", "read_parquet"),
        ("read_csv('/etc/passwd') = 1", "read_csv"),
        ("width > 1 -- and more", "comments"),
        ("width > 'text'", "cannot be computed"),
        ("", "is not an expression"),
    ],
)
def test_errors_show_the_text_and_what_to_do(table, text, found):
    with pytest.raises(PairmillError) as error:
        verdicts(table, text)
    assert found in str(error.value)


def test_thresholds_of_a_conjunction(table):
    compiled = compile_predicate("clip.clip_score >= 0.28 and 200 > width and (height < 3 or height > 9)", table)
    assert compiled.thresholds == (Threshold("clip.clip_score", ">=", 0.28), Threshold("width", "<", 200.0))
    assert compile_predicate("width > height and width + 1 > 3", table).thresholds == ()
    assert compile_predicate("clip.clip_score > -1", table).thresholds == (Threshold("clip.clip_score", ">", -1.0),)


def test_a_value_is_a_number_and_nan_is_null(table):
    compiled = compile_value("-clip.clip_score", table)
    got = table.frame(compiled.columns).select(z=compiled.expr).collect()["z"].to_list()
    assert got == [-0.5, None, None, 1.0]
    assert compile_value("clip.zero", table).column == "clip.zero"
    with pytest.raises(PairmillError, match="a ranking needs a number"):
        compile_value("caption", table)


def test_a_double_minus_is_arithmetic_with_a_space(table):
    assert verdicts(table, "width - -1 > 150")[:2] == [False, True]


def test_the_language_of_the_type_is_polars(table):
    assert table.columns["clip.clip_score"] == pl.Float32
