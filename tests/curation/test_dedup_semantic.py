import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation import dedup_semantic
from curation.dedup_semantic import Order, drop_like, find_like
from curation.filter import make_selection
from curation.kmeans import fit, nearest
from curation.matches import read_matches
from schemas.errors import PairmillError
from schemas.events import Notice, StageStarted
from shards.dataset import Dataset
from shards.select import read_selection
from tests.curation.embedded import InMemory, unit_vectors, write_embeddings
from tests.curation.scored import numbered, uid, write_dataset, write_scores


def cosine(a, b):
    """Sums of products of fp16 numbers are exact in fp64 here."""
    a, b = [float(v) for v in a], [float(v) for v in b]
    dot = lambda x, y: math.fsum(p * q for p, q in zip(x, y, strict=True))  # noqa: E731
    size = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / size if size else 0.0


def plain_cluster(raw, cut):
    """M_j = max over i < j of S_ij; j goes when M_j > cut (facebookresearch/SemDeDup, in words)."""
    return [any(cosine(raw[i], raw[j]) > cut for i in range(j)) for j in range(len(raw))]


def plain_semdedup(vectors, uids, labels, centroids, keep, eps, column):
    """Which rows stay, row by row."""
    stays = [True] * len(vectors)
    for cluster in range(len(centroids)):
        members = [i for i in range(len(vectors)) if labels[i] == cluster]
        far = {i: cosine(vectors[i], centroids[cluster]) for i in members}
        key = {i: {"hard": far[i], "easy": -far[i], "column": -column[i]}[keep] for i in members}
        ordered = [i for _, _, i in sorted((key[i], uids[i], i) for i in members)]
        for i, drop in zip(ordered, plain_cluster([vectors[i] for i in ordered], 1 - eps), strict=True):
            stays[i] = not drop
    return stays


# Few values in few dimensions: equal rows, and cosines that are the cut itself.
small = st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=3, max_size=3), min_size=1, max_size=14)


@given(small, st.sampled_from([1e-3, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5]))
@settings(max_examples=300, deadline=None)
def test_a_cluster_in_order_is_thinned_as_the_plain_rule_says(rows, eps):
    raw = np.array(rows, np.float16)
    like = drop_like(raw, 1 - eps)
    assert (like >= 0).tolist() == plain_cluster(raw, 1 - eps)
    assert all(like[i] < 0 for i in like[like >= 0])  # what a row is dropped for stays
    assert (like < np.arange(len(raw))).all()


@given(st.integers(0, 2**32), st.integers(2, 120), st.sampled_from([0.01, 0.05, 0.2]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tiles_change_nothing(monkeypatch, seed, rows, eps):
    monkeypatch.setattr(dedup_semantic, "TILE", 7)
    raw = unit_vectors(np.random.default_rng(seed), rows, 6, groups=3, spread=0.2)
    assert (drop_like(raw, 1 - eps) >= 0).tolist() == plain_cluster(raw, 1 - eps)


@given(
    st.integers(0, 2**32), st.integers(2, 90), st.integers(1, 5), st.sampled_from(["hard", "easy", "column"]),
    st.sampled_from([0.02, 0.1, 0.3]),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_whole_equals_a_plain_implementation(monkeypatch, seed, rows, k, keep, eps):
    monkeypatch.setattr(dedup_semantic, "GROUP_BYTES", 2 * 8 * 20)  # about 20 rows of 8 numbers
    rng, k = np.random.default_rng(seed), min(k, rows)
    vectors = InMemory(unit_vectors(rng, rows, 8))
    uids = rng.integers(0, 6, rows)  # ties of the uid, too
    column = rng.integers(0, 3, rows).astype(float)
    every = np.arange(rows)
    centroids = fit(vectors, every, k, seed=seed)
    labels, _ = nearest(vectors, every, centroids)
    key = -column if keep == "column" else None
    order = Order(keep, key, np.zeros(rows, np.uint64), uids.astype(np.uint64))
    stays: np.ndarray = np.zeros(rows, bool)
    for members, like in find_like(vectors, every, labels, centroids, order, 1 - eps):
        stays[members] = like < 0
        assert all(labels[i] == labels[j] for i, j in zip(members[like >= 0], like[like >= 0], strict=True))
    assert stays.tolist() == plain_semdedup(vectors.array, uids, labels, centroids, keep, eps, column)


def circle(*degrees):
    return [np.array([math.cos(math.radians(d)), math.sin(math.radians(d))], np.float16) for d in degrees]


def select(dataset, *rules, name="s"):
    made = make_selection(dataset, name, list(rules))
    return np.flatnonzero(read_selection(dataset, name).keep).tolist(), made


def test_a_chain_falls_though_its_link_was_dropped(tmp_path):
    """10 degrees apart are 0.985, 20 are 0.940: each falls to the one before, and all but the first go."""
    dataset = write_dataset(tmp_path, numbered(5, 2))
    write_embeddings(dataset, circle(0, 10, 20, 30, 90))
    write_scores(dataset, "clip", {"clip_score": [0.9, 0.8, 0.7, 0.6, 0.5]})
    rule = {"dedup_semantic": {"eps": 0.03, "keep": "clip_score"}}
    assert select(dataset, rule)[0] == [0, 4]
    (label, found), *_ = read_matches(dataset, "s").items()
    assert label == "dedup_semantic 0.03"
    assert [(m.row, m.like, m.group) for m in found] == [(1, 0, 4), (2, 0, 4), (3, 0, 4)]
    assert [m.value for m in found] == pytest.approx([math.cos(math.radians(d)) for d in (10, 20, 30)], abs=1e-3)
    # With row 1 last in order, 0 and 2 do not see each other through it.
    write_scores(dataset, "other", {"rank": [5, 1, 4, 3, 2]})
    assert select(dataset, {"dedup_semantic": {"eps": 0.03, "keep": "rank"}})[0] == [0, 2, 4]
    assert select(dataset, {"dedup_semantic": {"eps": 0.03, "keep": "-rank"}})[0] == [1, 3, 4]


def test_hard_keeps_the_farthest_and_easy_the_nearest_ties_by_uid(tmp_path):
    uids = [uid(n) for n in (4, 3, 2, 1)]
    dataset = write_dataset(tmp_path, numbered(4, 1, uid=uids))
    write_embeddings(dataset, circle(0, 10, 10, 14))  # the mean lies between 8 and 9
    assert select(dataset, {"dedup_semantic": {"eps": 0.1, "keep": "hard"}})[0] == [0]
    assert select(dataset, {"dedup_semantic": {"eps": 0.1, "keep": "easy"}})[0] == [2]
    assert select(dataset, {"dedup_semantic": 0.1})[0] == [0]  # the short form, hard by default


def test_the_cut_is_strict(tmp_path):
    dataset = write_dataset(tmp_path, numbered(2, 1))
    write_embeddings(dataset, [np.array(v, np.float16) for v in ([1, 0], [3, 4])])  # cosine 0.6, of any length
    assert 1 - 0.4 == 0.6
    assert select(dataset, {"dedup_semantic": 0.4})[0] == [0, 1]
    assert len(select(dataset, {"dedup_semantic": 0.400001})[0]) == 1


def test_rows_dropped_before_and_rows_without_an_embedding_take_no_part(tmp_path):
    status = ["success"] * 4 + ["no_image", "success"]
    dataset = write_dataset(tmp_path, numbered(6, 2, width=[1, 9, 9, 9, 9, 9], status=status))
    write_embeddings(dataset, [*circle(0, 0, 0, 90), None, None])
    kept, made = select(dataset, {"where": "width > 5"}, {"dedup_semantic": {"eps": 0.1}})
    assert kept == [1, 3, 4, 5]  # 0 is gone already, 2 falls to 1; 4 and 5 have nothing to be compared by
    assert [(s.dropped, s.nulls) for s in made.funnel][-1] == (1, 0)


def many(tmp_path, rows=600, **options) -> Dataset:
    rng = np.random.default_rng(3)
    dataset = write_dataset(tmp_path, numbered(rows, 4, uid=[rng.bytes(16) for _ in range(rows)]))
    write_embeddings(dataset, list(unit_vectors(rng, rows, 32, groups=40)), **options)
    return dataset


def test_it_is_the_same_for_any_number_of_threads_and_random_hangs_on_the_seed(tmp_path):
    dataset = many(tmp_path)
    rule = {"dedup_semantic": {"eps": 0.2, "keep": "random", "clusters": 10, "seed": 5}}
    before, kept = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            kept.append(select(dataset, rule)[0])
    finally:
        torch.set_num_threads(before)
    assert kept[0] == kept[1] == kept[2]
    assert 40 < len(kept[0]) < 500
    fewer = {"eps": 0.2, "keep": "random", "clusters": 1}
    assert select(dataset, {"dedup_semantic": {**fewer, "seed": 1}})[0] != select(dataset, {"dedup_semantic": fewer})[0]


def test_it_tells_its_steps_and_warns_of_a_cluster_that_is_all_in_one(tmp_path):
    dataset = write_dataset(tmp_path, numbered(300, 2))
    write_embeddings(dataset, [*circle(0) * 240, *circle(*range(10, 70))])
    events = []
    make_selection(dataset, "s", [{"dedup_semantic": {"eps": 0.001, "clusters": 240}}], events.append)
    assert [e.stage.split(": ")[1] for e in events if isinstance(e, StageStarted)] == [
        "fit 240 centroids",
        "nearest centroid",
        "compare within clusters",
    ]
    warnings = [e.text for e in events if isinstance(e, Notice) and e.warning]
    assert len(warnings) == 1
    assert "the largest cluster has 24" in warnings[0]


def test_what_is_missing_is_told_with_its_command(tmp_path):
    dataset = write_dataset(tmp_path, numbered(4, 2))
    rule = {"dedup_semantic": {"eps": 0.1}}
    with pytest.raises(PairmillError, match=r"no embeddings features/clip .*pairmill score clip .* --name clip"):
        select(dataset, rule)
    write_embeddings(dataset, circle(0, 1, 2, 3), shards=[1])
    with pytest.raises(PairmillError, match=r"lacks 1 of 2 shards \(the first: 0\).*pairmill score clip"):
        select(dataset, rule)
    write_embeddings(dataset, [*circle(0, 1, 2), None], absent="skipped")
    with pytest.raises(PairmillError, match=r"Row 1:1 has no embedding yet: .*pairmill score clip"):
        select(dataset, rule)
    with pytest.raises(PairmillError, match=r"has no column `clip_scor`"):
        select(dataset, {"dedup_semantic": {"eps": 0.1, "keep": "clip_scor"}})
    with pytest.raises(PairmillError, match=r"unknown key `epsilon`"):
        select(dataset, {"dedup_semantic": {"epsilon": 0.1}})


def test_a_selection_knows_the_embeddings_it_was_made_from(tmp_path):
    import shutil

    dataset = many(tmp_path, 40)
    select(dataset, {"dedup_semantic": 0.1})
    select(dataset, {"where": "status = 'success'"}, name="plain")
    shutil.rmtree(tmp_path / "features")
    write_embeddings(dataset, list(unit_vectors(np.random.default_rng(0), 40, 8)), weights="other")
    with pytest.raises(PairmillError, match="made from other features/clip"):
        read_selection(dataset, "s")
    read_selection(dataset, "plain")


def test_features_without_image_embeddings_are_refused(tmp_path):
    from tests.curation.samples import whole_dataset

    dataset = whole_dataset(tmp_path)
    with pytest.raises(PairmillError, match="holds no image embeddings `clip_image`"):
        select(dataset, {"dedup_semantic": {"eps": 0.1, "embeddings": "vector"}})


def test_equal_embeddings_fall_to_one_however_many(tmp_path):
    raw = np.repeat(unit_vectors(np.random.default_rng(0), 3, 8), 5000, axis=0)
    assert (drop_like(raw, 1 - 1e-3) < 0).sum() == len(np.unique(raw, axis=0))
