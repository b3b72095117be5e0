import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import kmeans
from curation.kmeans import fit, in_order, nearest, unit
from schemas.errors import PairmillError
from tests.curation.embedded import InMemory, unit_vectors


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 40), st.integers(2, 9))
@settings(max_examples=40, deadline=None)
def test_every_row_goes_to_the_nearest_centroid_and_every_centroid_to_the_mean_of_its_rows(seed, rows, k, dim):
    rng = np.random.default_rng(seed)
    vectors, k = InMemory(unit_vectors(rng, rows, dim)), min(k, rows)
    every = np.arange(rows)
    centroids = fit(vectors, every, k, per_centroid=rows, iterations=200, seed=1)
    assert centroids.shape == (k, dim)
    labels, cosines = nearest(vectors, every, centroids)
    x = vectors.array.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    products = x @ centroids.astype(np.float64).T
    assert np.allclose(products.max(1), products[every, labels], atol=1e-6)
    assert np.allclose(cosines, products[every, labels], atol=1e-6)
    for c in np.unique(labels):  # converged: 200 steps are more than these need
        mean = x[labels == c].mean(0)
        if np.linalg.norm(mean) > 1e-3:
            assert np.allclose(mean / np.linalg.norm(mean), centroids[c], atol=1e-4)


def test_clusters_that_lie_apart_are_found_and_none_is_empty():
    """From one start Lloyd's steps may end where two centroids share a cluster; of ten starts some find all."""
    rng = np.random.default_rng(0)
    made = np.repeat(np.eye(8), 50, axis=0) + 0.02 * rng.normal(size=(400, 8))
    vectors = InMemory(made.astype(np.float16))
    every = np.arange(400)
    found = [nearest(vectors, every, fit(vectors, every, 8, seed=seed))[0] for seed in range(10)]
    assert all(len(np.unique(labels)) == 8 for labels in found)
    assert any(all(len(np.unique(part)) == 1 for part in labels.reshape(8, 50)) for labels in found)


def test_more_steps_never_make_the_cosines_smaller():
    vectors = InMemory(unit_vectors(np.random.default_rng(5), 3000, 16, groups=60, spread=1.0))
    every = np.arange(3000)
    means = [nearest(vectors, every, fit(vectors, every, 50, iterations=n))[1].mean() for n in (1, 2, 4, 8, 16)]
    assert means == sorted(means)
    assert means[-1] > means[0] + 0.01


@pytest.mark.parametrize("block", [64, 2048])
def test_no_number_of_threads_changes_a_bit(threads, monkeypatch, block):
    monkeypatch.setattr(kmeans, "BLOCK", block)
    monkeypatch.setattr(kmeans, "TILE", 16)
    vectors = InMemory(unit_vectors(np.random.default_rng(7), 5000, 64, groups=50, spread=1.0))
    rows = np.arange(3, 5000, 2)
    found = []
    for count in (1, 2, 5):
        threads(count)
        centroids = fit(vectors, rows, 40, per_centroid=30, seed=2)
        found.append((centroids.tobytes(), *(a.tobytes() for a in nearest(vectors, rows, centroids))))
        assert torch.get_num_threads() == count
    assert found[0] == found[1] == found[2]


def test_tiles_of_centroids_give_what_one_product_gives(monkeypatch):
    """Of equal centroids the first wins; small whole numbers have exact products."""
    rng = np.random.default_rng(1)
    vectors = InMemory(np.eye(8)[rng.integers(8, size=500)].astype(np.float16))
    centroids = rng.integers(-3, 4, (90, 8)).astype(np.float32)
    centroids[:40] = np.minimum(centroids[:40], 2)  # the largest, 3, lies in a later tile
    rows = np.arange(500)
    want = (vectors.array.astype(np.float32) @ centroids.T).argmax(1)
    for tile in (16, 90):
        monkeypatch.setattr(kmeans, "TILE", tile)
        assert np.array_equal(nearest(vectors, rows, centroids)[0], want)


def test_it_is_fitted_on_no_more_points_than_asked_for():
    class Counting(InMemory):
        rows = 0

        def read(self, rows):
            self.rows += len(rows)
            return super().read(rows)

    vectors = Counting(unit_vectors(np.random.default_rng(1), 4000, 8))
    fit(vectors, np.arange(4000), 4, per_centroid=100, iterations=1)
    assert vectors.rows == 4 + 400


def test_in_order_keeps_the_order_and_few_at_a_time(threads):
    threads(3)
    started = []
    answers = in_order(lambda i: started.append(i) or i * i, range(100))
    assert next(answers) == 0
    assert len(started) <= 4
    assert list(answers) == [i * i for i in range(1, 100)]


def test_an_error_in_a_thread_comes_out_and_the_threads_are_given_back(threads):
    threads(2)
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda i: 1 // i, range(5)))
    assert torch.get_num_threads() == 2


def test_nan_is_told():
    with pytest.raises(PairmillError, match="NaN or infinite"):
        unit(np.array([[1, np.nan]], np.float16))
    assert unit(np.zeros((1, 2), np.float16)).tolist() == [[0, 0]]
    given_rows = np.array([[3, 4]], np.float32)
    assert np.allclose(unit(given_rows).numpy(), [[0.6, 0.8]])
    assert given_rows.tolist() == [[3, 4]]
