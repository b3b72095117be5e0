import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation.cluster import NpyVectors
from curation.filter import make_selection
from schemas.errors import PairmillError
from schemas.events import Notice
from shards.select import read_selection, selection_about
from tests.curation.embedded import unit_vectors, write_embeddings
from tests.curation.scored import numbered, write_dataset


def select(dataset, *rules):
    events = []
    made = make_selection(dataset, "s", list(rules), events.append)
    return np.flatnonzero(read_selection(dataset, "s").keep).tolist(), made, events


def embedded(path, vectors, shards=2, **options):
    dataset = write_dataset(path, numbered(len(vectors), shards))
    write_embeddings(dataset, vectors, **options)
    return dataset


def axes(*numbers, dim=4):
    """Unit vectors along the axes, a little off."""
    rng = np.random.default_rng(0)
    return [(np.eye(dim)[n] + 0.01 * rng.normal(size=dim)).astype(np.float16) for n in numbers]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 20), st.integers(1, 12))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_with_given_centroids_it_is_datacomps_rule(place, seed, rows, targets, k):
    """image_based_clustering.py: argmax of the dot product with the centroids, kept where the target's has it."""
    import shutil

    shutil.rmtree(place / "ds", ignore_errors=True)
    rng = np.random.default_rng(seed)
    pool, target = unit_vectors(rng, rows, 6), unit_vectors(rng, targets, 6)
    centroids = rng.normal(size=(k, 6)).astype(np.float32)  # as they are: not of length 1
    dataset = embedded(place / "ds", list(pool), 1)
    np.save(place / "target.npy", target)
    np.save(place / "centroids.npy", centroids)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (pool.astype(float), target.astype(float))]
    of_pool, of_target = ((x @ centroids.T).argmax(1) for x in unit)
    want = np.flatnonzero(np.isin(of_pool, of_target)).tolist()
    rule = {"cluster": {"against": str(place / "target.npy"), "centroids": str(place / "centroids.npy")}}
    if want:
        assert select(dataset, rule)[0] == want
    else:
        with pytest.raises(PairmillError, match="No row is left"):
            select(dataset, rule)


def test_rows_near_the_target_set_stay(tmp_path):
    dataset = embedded(tmp_path / "pool", axes(0, 1, 2, 3, 0, 1, 2, 3))
    target = embedded(tmp_path / "target", axes(1, 3, 1))
    # Four clusters of eight rows; of ten starts at least one finds the four directions.
    found = [
        select(dataset, {"cluster": {"against": target.url, "clusters": 4, "seed": seed}})[0] for seed in range(10)
    ]
    assert [1, 3, 5, 7] in found
    said = [e.text for e in select(dataset, {"cluster": target.url})[2] if isinstance(e, Notice)]
    assert said == ["cluster target: the target set reaches 1 of 1 clusters."]


def test_centroids_are_fitted_on_rows_left_or_on_all(tmp_path):
    dataset = write_dataset(tmp_path / "pool", numbered(6, 2, width=[9, 9, 1, 1, 1, 1]))
    write_embeddings(dataset, axes(0, 1, 2, 2, 2, 2))
    target = embedded(tmp_path / "target", axes(1))
    where, rule = {"where": "width > 5"}, {"against": target.url, "clusters": 2}
    # Left: rows 0 and 1, a centroid each. Of all six, two clusters hold three directions.
    assert select(dataset, where, {"cluster": rule})[0] == [1]
    assert {tuple(select(dataset, where, {"cluster": {**rule, "of": "all", "seed": s}})[0]) for s in range(8)} > {
        (0, 1)
    }


def test_a_row_without_an_embedding_is_null(tmp_path):
    dataset = embedded(tmp_path / "pool", [*axes(0, 0), None])
    np.save(tmp_path / "t.npy", np.eye(4, dtype=np.float32)[:1])
    kept, made, _ = select(dataset, {"cluster": str(tmp_path / "t.npy")})
    assert kept == [0, 1]
    assert (made.funnel[-1].dropped, made.funnel[-1].nulls) == (1, 1)


def test_a_target_set_without_embeddings_or_of_another_clip_names_the_command(tmp_path):
    dataset = embedded(tmp_path / "pool", axes(0, 1))
    target = write_dataset(tmp_path / "target", numbered(2, 1))
    rule = {"cluster": {"against": target.url}}
    command = r"pairmill score clip \S+target --name {} --model MODEL, where MODEL made \S+pool/features/clip: ViT-B-32"
    with pytest.raises(
        PairmillError, match="target has no embeddings features/clip .*Make them: " + command.format("clip")
    ):
        select(dataset, rule)
    write_embeddings(target, axes(0, 1), weights="another")
    with pytest.raises(PairmillError, match="made by another CLIP.*" + command.format("NAME")):
        select(dataset, rule)
    with pytest.raises(PairmillError, match="is not a dataset"):
        select(dataset, {"cluster": str(tmp_path / "nowhere")})
    with pytest.raises(PairmillError, match="bare has no embeddings features/clip"):
        select(write_dataset(tmp_path / "bare", numbered(2, 1)), {"cluster": dataset.url})
    assert not (tmp_path / "pool/selections").exists()


def test_rows_of_the_target_set_without_an_embedding_are_left_out(tmp_path):
    dataset = embedded(tmp_path / "pool", axes(0, 1))
    target = write_dataset(tmp_path / "target", numbered(2, 2, status=["success", "timeout"]))
    write_embeddings(target, [axes(0)[0], None], absent="timeout")
    assert select(dataset, {"cluster": {"against": target.url, "clusters": 1}})[0] == [0, 1]
    nothing = embedded(tmp_path / "nothing", [None, None])
    with pytest.raises(PairmillError, match="nothing has no row with an embedding in features/clip"):
        select(dataset, {"cluster": nothing.url})
    late = embedded(tmp_path / "late", axes(0, 1), shards=2)
    (tmp_path / "late/features/clip/00001.arrow").unlink()
    with pytest.raises(PairmillError, match="lacks 1 of 2 shards"):
        select(dataset, {"cluster": late.url})


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((2, 7), np.float32),
            r"t.npy holds vectors of 7 numbers, features/clip of 4.*ViT-B-32.*pairmill score clip TARGET --name",
        ),
        (np.zeros(4, np.float32), r"holds float32 \[4\]: floats \[rows, width\]"),
        (np.zeros((2, 4), np.int64), r"holds int64"),
        (np.zeros((0, 4), np.float32), r"\[0, 4\]"),
        (np.full((1, 4), np.nan, np.float32), r"holds NaN"),
        (np.array([{}], object), r"cannot be read as .npy"),
    ],
)
def test_a_bad_file_of_vectors_is_told(tmp_path, array, message):
    dataset = embedded(tmp_path / "pool", axes(0, 1))
    np.save(tmp_path / "t.npy", array)
    good = str(tmp_path / "good.npy")
    np.save(good, np.eye(4, dtype=np.float32))
    bad = str(tmp_path / "t.npy")
    for settings_ in ({"against": bad}, {"against": good, "centroids": bad}):
        with pytest.raises(PairmillError, match=message):
            select(dataset, {"cluster": settings_})


def test_a_missing_or_foreign_file_is_told(tmp_path):
    with pytest.raises(PairmillError, match=r"cannot be read as .npy: .*No such file"):
        NpyVectors(str(tmp_path / "none.npy"))
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(PairmillError, match=r"cannot be read as .npy"):
        NpyVectors(str(tmp_path / "text.npy"))


def test_the_recipe_names_the_target_set_and_runs_again(tmp_path):
    dataset = embedded(tmp_path / "pool", axes(0, 1))
    target = embedded(tmp_path / "target", axes(1))
    with pytest.raises(PairmillError, match="against itself"):
        select(dataset, {"cluster": dataset.url})
    np.save(tmp_path / "c.npy", np.eye(4, dtype=np.float32))
    given = {"against": target.url, "centroids": str(tmp_path / "c.npy")}
    want = select(dataset, {"cluster": given})[0]
    (recorded,) = selection_about(dataset, "s")["recipe"]["rules"]
    settings_ = recorded["cluster"]
    assert (settings_["against"], settings_["centroids"]) == ("target", "c.npy")  # beside the dataset, in this folder
    again = {**settings_, "centroids": given["centroids"]}
    assert select(dataset, {"cluster": again})[0] == want == [1]
    np.save(tmp_path / "c.npy", 2 * np.eye(4, dtype=np.float32))
    with pytest.raises(PairmillError, match="is not what this recipe was made with"):
        select(dataset, {"cluster": again})


def test_clusters_and_centroids_do_not_go_together(tmp_path):
    dataset = embedded(tmp_path, axes(0, 1))
    with pytest.raises(PairmillError, match="leave `clusters` out"):
        select(dataset, {"cluster": {"against": "t.npy", "centroids": "c.npy", "clusters": 3}})


def test_embeddings_that_know_only_their_models_name_go_by_it(tmp_path):
    """As `import datacomp` writes them."""
    pool = embedded(tmp_path / "pool", axes(0, 1), identity={"model": "OpenAI CLIP ViT-L-14"})
    same = embedded(tmp_path / "same", axes(0), identity={"model": "OpenAI CLIP ViT-L-14"})
    assert select(pool, {"cluster": {"against": same.url, "clusters": 2}})[0] == [0]
    for number, identity in enumerate(({"model": "OpenAI CLIP ViT-B-32"}, {"weights": "w"})):
        other = embedded(tmp_path / str(number), axes(0), identity=identity)
        with pytest.raises(PairmillError, match="or nothing tells that it is the same"):
            select(pool, {"cluster": other.url})
