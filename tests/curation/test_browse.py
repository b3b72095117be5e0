"""Queries of `browse` against plain Python, and against the selections their recipes make."""

import math
from urllib.parse import parse_qsl

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from curation.browse import View, page
from curation.browse_columns import Memory
from curation.browse_config import Query, Range, parse_query
from curation.filter import make_selection, read_recipe
from schemas.config import StageConfig
from schemas.errors import PairmillError
from schemas.features import clip_embedding_fields, features_schema, scores_schema
from schemas.sidecars import make_sidecar
from shards.dataset import Dataset
from shards.select import read_selection
from shards.writer import write_features, write_table
from tests.curation.scored import numbered, write_dataset, write_scores
from tests.extractors.tiny_clip import save_clip

ROWS = 120
WORDS = ["Red", "dog", "it's", "ÄRGER", "100%", "a_b", "back\\slash", 'quo"te', "犬", "dog's"]


def values(seed, low=-1.0, high=1.0):
    rng = np.random.default_rng(seed)
    made = (high * np.round(rng.uniform(low / high, 1, ROWS), 2)).astype(np.float32).tolist()
    return [None if i % 17 == 3 else math.nan if i % 19 == 5 else v for i, v in enumerate(made)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(dataset, its rows as dicts)."""
    rng = np.random.default_rng(5)
    captions = [None if i % 11 == 0 else " ".join(rng.choice(WORDS, 3)) for i in range(ROWS)]
    urls = [None if i % 13 == 0 else f"http://Host{i % 3}.example/{i}.jpg" for i in range(ROWS)]
    status = ["timeout" if i % 7 == 0 else "no_image" if i % 5 == 0 else "success" for i in range(ROWS)]
    kinds = [[None, "a'b", "plain"][i % 3] for i in range(ROWS)]
    width = [None if s != "success" else int(w) for s, w in zip(status, rng.integers(1, 900, ROWS), strict=True)]
    columns = {"caption": captions, "url": urls, "status": status, "kind": kinds, "width": width}
    rows = numbered(ROWS, 3, **columns)
    dataset = write_dataset(tmp_path_factory.mktemp("browse") / "ds", rows, [pa.field("kind", pa.string())])
    scores = {"score": values(1), "other score": values(2, 0, 1e-5)}
    write_scores(dataset, "clip-b", scores)
    write_scores(dataset, "flags", {"grey": [None if i % 9 == 0 else i % 2 == 0 for i in range(ROWS)]}, pa.bool_())
    write_scores(dataset, "half", {"score": values(3)}, shards=[0])
    make_selection(dataset, "wide", [{"where": "width >= 300"}])
    flat = [row for shard in rows for row in shard]
    for i, row in enumerate(flat):
        row["clip-b.score"], row["clip-b.other score"] = scores["score"][i], scores["other score"][i]
        row["flags.grey"] = None if i % 9 == 0 else i % 2 == 0
    return Dataset.open(dataset.url), flat


@pytest.fixture(scope="module")
def view(data):
    return View(data[0])


def there(value):
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def matches(query, row):
    hay = f"{row['caption'] or ''} {row['url'] or ''}".lower()
    for word in query.text.split():
        if (word.removeprefix("-").lower() in hay) == word.startswith("-"):
            return False
    for one in query.ranges:
        if one.low is None and one.high is None:
            continue
        value = row[one.column]
        # What is stored is fp32; a bound is compared as fp32, too.
        if not there(value) or (one.low is not None and np.float32(value) < np.float32(one.low)):
            return False
        if one.high is not None and np.float32(value) > np.float32(one.high):
            return False
    for column, wanted in query.only.items():
        value = row[column]
        text = "" if value is None else str(value).lower() if isinstance(value, bool) else value
        if text not in wanted:
            return False
    if query.reasons:
        kept = row["status"] in ("success", "no_image") and (row["width"] or 0) >= 300
        if not kept:
            return False
    return True


bounds = st.none() | st.floats(-1, 1).map(lambda v: round(v, 2))
# A part of a word, so that no quote begins and no minus leads.
words = st.sampled_from(
    [
        "red",
        "DOG",
        "it's",
        "ärger",
        "0%",
        "a_b",
        "k\\s",
        "h.st",
        "example/1",
        "(dog",
        "犬",
        "-dog",
        "host1",
        "-'s",
        "zzz",
    ]
)
queries = st.builds(
    Query,
    text=st.lists(words, max_size=2).map(" ".join),
    ranges=st.lists(
        st.builds(Range, column=st.just("clip-b.score"), low=bounds, high=bounds)
        | st.builds(Range, column=st.just("width"), low=st.none() | st.integers(1, 900), high=st.just(None))
        | st.builds(Range, column=st.just("clip-b.other score"), low=st.floats(0, 1e-5), high=st.just(None)),
        max_size=2,
    ).map(tuple),
    only=st.fixed_dictionaries(
        {},
        optional={
            "status": st.lists(st.sampled_from(["success", "timeout", "no_image"]), min_size=1, unique=True).map(tuple),
            "kind": st.lists(st.sampled_from(["", "a'b", "plain"]), min_size=1, unique=True).map(tuple),
            "flags.grey": st.lists(st.sampled_from(["", "true", "false"]), min_size=1, unique=True).map(tuple),
        },
    ),
    reasons=st.sampled_from([(), ("kept",)]),
    selection=st.just("wide"),
    sort=st.sampled_from([None, "width", "clip-b.score"]),
    descending=st.booleans(),
)


@given(queries)
def test_rows_are_those_of_plain_python_in_its_order(data, view, query):
    _, rows = data
    want = [i for i, row in enumerate(rows) if matches(query, row)]
    if query.sort is not None:
        sign = -1 if query.descending else 1
        value = [rows[i][query.sort] for i in range(ROWS)]
        want.sort(key=lambda i: (sign * value[i] if there(value[i]) else math.inf, i))
    found, after = [], None
    while True:
        one = view.search(query, after, 7)
        assert one.total == len(want)
        found += one.rows.tolist()
        after = one.next
        if after is None:
            break
    assert found == want


@given(queries)
def test_a_recipe_keeps_the_rows_that_were_seen(data, view, query):
    dataset, rows = data
    want = [i for i, row in enumerate(rows) if matches(query, row) and row["status"] in ("success", "no_image")]
    assert view.search(query).keepable == len(want)
    if not (query.text or query.only or query.reasons or any(r.low is not r.high for r in query.ranges)):
        with pytest.raises(PairmillError, match="no condition yet"):
            view.recipe(query)
        return
    recipe = view.recipe(query)
    if not want:
        with pytest.raises(PairmillError, match="No row is left"):
            view.save("seen", query, replace=True)
        return
    assert view.save("seen", query, replace=True).kept == len(want)
    assert np.flatnonzero(read_selection(dataset, "seen").keep).tolist() == want
    assert yaml.safe_load(recipe.as_yaml("DS")) == recipe.rules


@given(queries)
def test_counts_leave_out_their_own_condition(data, view, query):
    _, rows = data
    counts = view.counts(query, ["clip-b.score", "width"])
    for column in ("clip-b.score", "width"):
        others = query.model_copy(update={"ranges": tuple(r for r in query.ranges if r.column != column)})
        want = sum(matches(others, row) and there(row[column]) for row in rows)
        histogram = counts["histograms"][column]
        assert sum(histogram["now"]) == want
        assert len(histogram["edges"]) == len(histogram["now"]) + 1
        assert all(now <= every for now, every in zip(histogram["now"], histogram["all"], strict=True))
    for column in ("status", "kind", "flags.grey"):
        others = query.model_copy(update={"only": {c: v for c, v in query.only.items() if c != column}})
        got = {one["value"]: one["rows"] for one in counts["facets"][column]}
        for value, number in got.items():
            want = sum(
                matches(others, r)
                and (None if r[column] is None else str(r[column]).lower() if column == "flags.grey" else r[column])
                == value
                for r in rows
            )
            assert number == want
    reasons = {one["value"]: one["rows"] for one in counts["reasons"]}
    assert sum(reasons.values()) == view.search(query.model_copy(update={"reasons": ()})).total


def test_a_copied_recipe_is_read_by_filter(data, view, tmp_path):
    dataset, _ = data
    query = parse_query([("q", "dog"), ("range", "width:100:"), ("selection", "wide"), ("reason", "kept")])
    text = view.recipe(query).as_yaml("DS")
    assert text.splitlines()[0] == "# pairmill filter DS --rules recipe.yaml -o NAME --from wide"
    (tmp_path / "recipe.yaml").write_text(text)
    done = make_selection(dataset, "copied", read_recipe(tmp_path / "recipe.yaml"), start="wide")
    assert done.kept == view.search(query).keepable


def test_phrases_and_words(view):
    every = view.search(Query()).total
    one = view.search(Query(text='"dog red"')).total
    assert 0 < one < view.search(Query(text="dog red")).total < every
    assert view.search(Query(text='-"dog red"')).total == every - one


@given(st.lists(st.integers(0, 4), max_size=40), st.data())
def test_pages_follow_each_other(keys, more):
    key = np.array(keys, np.float64)
    mask = np.array(more.draw(st.lists(st.booleans(), min_size=len(keys), max_size=len(keys))), bool)
    limit = more.draw(st.integers(1, 5))
    for ordered in (key, None):
        found, after, going = [], None, True
        while going:
            rows, going = page(mask, ordered, after, limit)
            found += rows.tolist()
            assert len(rows) == limit or not going
            after = found[-1] if found else None
        want = np.flatnonzero(mask).tolist()
        assert found == (want if ordered is None else sorted(want, key=lambda i: (key[i], i)))


def test_columns_that_can_be_slid_and_counted(view):
    assert view.columns.numbers == ["width", "height", "caption_words", "clip-b.score", "clip-b.other score"]
    assert view.columns.facets == ["status", "kind", "flags.grey"]
    assert view.columns.unfinished == ["half"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("range=clip-b.scor:0:1", "`clip-b.scor`. Did you mean `clip-b.score`"),
        ("range=width", "expected COLUMN:LOW:HIGH"),
        ("range=width:a:", "expected COLUMN:LOW:HIGH"),
        ("range=width:nan:", "a finite number"),
        ("range=half.score:0:1", "no column of numbers `half.score`"),
        ("only=status", "expected COLUMN:VALUE"),
        ("only=status:sucess", "Did you mean `success`"),
        ("only=url:x", "no facet `url`"),
        ("selection=wid&reason=kept", "has no selection `wid`"),
        ("selection=../../etc/passwd&reason=kept", "has no selection"),
        ("reason=kept", "needs `selection`"),
        ("selection=wide&reason=kep", "Did you mean `kept`"),
        ("sort=clip", "no column of numbers `clip`"),
        ("like=3", "no image embeddings"),
        ("see=dog", "no image embeddings"),
        ("twins=3", "no hashes of its pictures"),
        ("twins=-1", "`twins`"),
        ("twins=120", "There is no row 120"),
        ("like=x", "`like`"),
        ("quer=x", "no `quer`"),
        ("q=" + "x" * 501, "`text`"),
        ("&".join(["only=status:success"] * 101), "at most 100"),
    ],
)
def test_wrong_queries_are_told(view, address, said):
    with pytest.raises(PairmillError) as error:
        view.search(parse_query(parse_qsl(address)))
    assert said in str(error.value)


def test_what_no_rule_can_say(view):
    for address, said in [
        ("", "no condition yet"),
        ("sort=-width", "no condition yet"),
        ("selection=wide&reason=status", "is no rule"),
        ("twins=1", "are no rule"),
    ]:
        with pytest.raises(PairmillError, match=said):
            view.recipe(parse_query(parse_qsl(address)))


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b", "x" * 101])
def test_names_of_selections(view, name):
    with pytest.raises(PairmillError, match="is no name"):
        view.save(name, Query(text="dog"))


def test_a_selection_is_not_overwritten_unasked(data):
    view = View(data[0])
    query = parse_query([("only", "status:success"), ("selection", "wide"), ("reason", "kept")])
    with pytest.raises(PairmillError, match="already"):
        view.save("wide", query)
    with pytest.raises(PairmillError, match="start from"):
        view.save("wide", query, replace=True)
    first = view.save("again", Query(text="dog"), replace=True).kept
    reasons = view.search(Query(selection="again", reasons=("kept",))).total
    assert reasons == first
    second = view.save("again", Query(text="red"), replace=True).kept
    assert second != first
    assert view.search(Query(selection="again", reasons=("kept",))).total == second


def test_unfinished_pairs_are_told(tmp_path):
    dataset = write_dataset(tmp_path / "ds", numbered(4, 2))
    (tmp_path / "ds" / dataset.stage("pairs").file(1)).unlink()
    with pytest.raises(PairmillError, match="1 of 2 shards"):
        View(Dataset.open(tmp_path / "ds"))


def test_memory_is_bounded_and_what_goes_comes_again(data):
    memory = Memory(100)
    made = []

    def value(n):
        return lambda: made.append(n) or n

    for n in (1, 2, 3, 1):
        assert memory.get(n, value(n), lambda _: 40) == n
        assert memory.held <= 100
    assert made == [1, 2, 3, 1]
    small, large = View(data[0], 1000), View(data[0])
    query = Query(text="dog", ranges=(Range(column="width", low=100),), sort="clip-b.score")
    assert small.search(query).rows.tolist() == large.search(query).rows.tolist()
    assert small.memory.held <= 1000 < large.memory.held


@pytest.fixture(scope="module")
def hashed(tmp_path_factory):
    """Rows 0 to 3 a chain of pHashes 4 bits apart, 4 alone, 5 and 6 flat and equal, 7 flat, 8 without a hash."""
    chain = [0x0F0F0F0F0F0F0F0F ^ m for m in (0, 0xF, 0xFF, 0xFFF)]
    phash = [*chain, 0x123456789ABCDEF0, 0, 0, 0, None]
    pixels = [bytes([i]) * 32 for i in (0, 1, 2, 3, 4, 5, 5, 7, 8)]
    dataset = write_dataset(tmp_path_factory.mktemp("hashed") / "ds", numbered(9, 2))
    write_scores(dataset, "hash", {"phash": phash}, pa.uint64())
    stage = dataset.stage("scores/hash")
    start = 0
    for shard, rows in enumerate(dataset.manifest.shards):
        fields = [pa.field("phash", pa.uint64()), pa.field("pixel_sha256", pa.binary(32))]
        columns = [pa.array(v[start : start + rows], f.type) for v, f in zip((phash, pixels), fields, strict=True)]
        table = pa.Table.from_arrays(columns, schema=scores_schema(fields))
        write_table(dataset.folder, stage.file(shard), table, {}, dataset.stage("pairs").digest(shard))
        start += rows
    return View(Dataset.open(dataset.url))


def test_twins_are_near_by_hash_or_equal_in_pixels(hashed):
    found = {row: hashed.search(Query(twins=row)).rows.tolist() for row in range(9)}
    want = {0: [0, 1], 1: [0, 1, 2], 2: [1, 2, 3], 3: [2, 3], 4: [4], 5: [5, 6], 6: [5, 6], 7: [7], 8: []}
    assert found == want


def test_copies_count_groups_and_lay_them_side_by_side(hashed):
    assert hashed.columns.numbers[-1] == "hash.copies"
    assert hashed.number("hash.copies").values.to_list() == [4, 4, 4, 4, 1, 2, 2, 1, None]
    several = parse_query([("range", "hash.copies:2:"), ("sort", "-hash.copies")])
    found = hashed.search(several)
    assert found.rows.tolist() == [0, 1, 2, 3, 5, 6]
    assert found.values == [4, 4, 4, 4, 2, 2]
    assert sum(hashed.counts(several, ["hash.copies"])["histograms"]["hash.copies"]["now"]) == 8
    with pytest.raises(PairmillError, match="is no rule"):
        hashed.recipe(several)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """(view, embeddings fp16 [rows, 8]); every seventh row has none."""
    rows = 1500
    dataset = write_dataset(tmp_path_factory.mktemp("embedded") / "ds", numbered(rows, 3))
    vectors = np.random.default_rng(3).normal(size=(rows, 8)).astype(np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    stage = dataset.stage("features/clip")
    about = {"clip_image": {"what": "image embedding", "model": "toy", "weights": "0"}}
    sidecar = make_sidecar("score clip", "clip", ("features", 1), StageConfig(), columns=about)
    stage.begin(sidecar, "")
    schema = features_schema(clip_embedding_fields(8)[:1])
    for shard in range(3):
        digest = dataset.stage("pairs").digest(shard)
        with write_features(dataset.folder, stage.file(shard), schema, digest) as writer:
            for row in range(500 * shard, 500 * shard + 500):
                there = row % 7 != 0
                writer.append({"state": "ok" if there else "skipped", "clip_image": vectors[row] if there else None})
    return View(Dataset.open(dataset.url)), vectors


def test_likeness_is_the_cosine_and_orders_rows(embedded):
    view, vectors = embedded
    found = view.search(Query(like=8), limit=500)
    want = vectors.astype(np.float32) @ vectors[8].astype(np.float32)
    want[::7] = -np.inf
    assert found.rows[0] == 8
    assert found.rows.tolist() == np.argsort(-want, kind="stable")[:500].tolist()
    assert np.allclose(found.values, want[found.rows], atol=1e-6)
    rest = view.search(Query(like=8), after=found.next, limit=500)
    assert not set(rest.rows) & set(found.rows)
    last = view.search(Query(like=8), after=rest.next, limit=500)
    assert last.values[-1] is None  # rows without an embedding come last
    assert last.total == 1500


def test_what_has_no_embedding_or_no_model_is_told(embedded):
    view, _ = embedded
    with pytest.raises(PairmillError, match="has no embedding"):
        view.search(Query(like=7))
    with pytest.raises(PairmillError, match="is not at hand"):
        view.search(Query(see="a dog"))
    with pytest.raises(PairmillError, match="Did you mean `clip`"):
        view.search(Query(like=8, features="clop"))
    assert view.find_model(None, None) is None


def test_a_model_that_made_none_of_the_embeddings_is_refused(embedded, tmp_path):
    view, _ = embedded
    with pytest.raises(PairmillError, match="made none of the embeddings"):
        view.find_model(str(save_clip(tmp_path / "clip")), None)
