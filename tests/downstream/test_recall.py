"""Recall at k: worked by hand, and against a naive sort."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from downstream.recall import matrix_recall, ranks, retrieval_recall, score_blocks
from schemas.errors import PairmillError


@st.composite
def retrieval(draw, max_folds=1):
    """Scores with many ties, captions of each image in any order: (scores, text_image, num_folds)."""
    num_folds = draw(st.integers(1, max_folds))
    num_images = num_folds * draw(st.integers(1, 5))
    extra = draw(st.lists(st.integers(0, num_images - 1), max_size=12))
    text_image = draw(st.permutations([*range(num_images), *extra]))
    seed = draw(st.integers(0, 2**32 - 1))
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    scores = np.random.default_rng(seed).integers(0, levels, (num_images, len(text_image))) / levels
    return scores, np.array(text_image), num_folds


def naive_rank(row, own, candidates):
    """Sort candidates by score, foreign ones first among equals; the place of the first own one."""
    order = sorted(candidates, key=lambda j: (-row[j], own[j]))
    return next(place for place, j in enumerate(order) if own[j])


def naive_recall(scores, text_image, k, num_folds):
    """(image to text, text to image) percent, mean over folds."""
    size = len(scores) // num_folds
    both = []
    for fold in range(num_folds):
        images = range(fold * size, fold * size + size)
        texts = [j for j, i in enumerate(text_image) if i in images]
        tr = [naive_rank(scores[i], text_image == i, texts) < k for i in images]
        own = np.arange(len(scores))
        ir = [naive_rank(scores[:, j], own == text_image[j], images) < k for j in texts]
        both.append((np.mean(tr) * 100, np.mean(ir) * 100))
    return np.mean(both, axis=0)


@settings(max_examples=150, deadline=None)
@given(retrieval(max_folds=4))
def test_equals_the_naive_form(drawn):
    scores, text_image, num_folds = drawn
    recall = matrix_recall(scores, text_image, num_folds=num_folds)
    for k in (1, 5, 10):
        want = naive_recall(scores, text_image, k, num_folds)
        assert (recall.image_to_text[k], recall.text_to_image[k]) == pytest.approx(want)
    assert recall.rsum == pytest.approx(recall.mean * 6)


@settings(max_examples=50, deadline=None)
@given(retrieval())
def test_albef_order_equals_albef(drawn):
    scores, text_image, _ = drawn
    found = ranks([scores], np.arange(len(scores)), text_image, ties="albef")
    for i, row in enumerate(scores):
        order = np.argsort(row)[::-1]
        assert found[i] == min(np.flatnonzero(order == j)[0] for j in np.flatnonzero(text_image == i))


@settings(max_examples=50, deadline=None)
@given(retrieval(), st.integers(1, 7), st.sampled_from(["pessimistic", "albef"]))
def test_blocks_of_any_size_give_the_same(drawn, rows, ties):
    scores, text_image, _ = drawn
    whole = matrix_recall(scores, text_image, ties=ties)
    blocks = [[m[s : s + rows] for s in range(0, len(m), rows)] for m in (scores, scores.T)]
    assert retrieval_recall(*map(iter, blocks), text_image, ties=ties) == whole


def test_worked_by_hand():
    scores = np.array([[0.9, 0.1, 0.8, 0.7], [0.2, 0.3, 0.4, 0.4]])  # texts 0, 1 of image 0; 2, 3 of image 1
    recall = retrieval_recall([scores], [scores.T], np.array([0, 0, 1, 1]), ks=(1, 2))
    assert recall.image_to_text == {1: 100.0, 2: 100.0}
    assert recall.text_to_image == {1: 25.0, 2: 100.0}  # text 0 alone scores higher with its own image
    assert recall.rsum == 325.0
    assert (recall.num_images, recall.num_texts) == (2, 4)


@pytest.mark.parametrize("num_folds", [1, 5])
def test_a_constant_scorer_gets_no_more_than_chance(num_folds):
    text_image = np.repeat(np.arange(100), 5)
    recall = matrix_recall(np.zeros((100, 500)), text_image, num_folds=num_folds)
    assert recall.rsum == 0.0


def test_a_masked_candidate_may_be_minus_infinity():
    scores = np.array([[-np.inf, 1.0], [2.0, -np.inf]])
    assert matrix_recall(scores, np.array([0, 1])).image_to_text[1] == 0.0
    assert ranks([scores], np.arange(2), np.array([1, 0])).tolist() == [0, 0]


def test_score_blocks_cover_all_queries():
    rng = np.random.default_rng(0)
    queries, candidates = rng.normal(size=(7, 3)), rng.normal(size=(4, 3))
    blocks = list(score_blocks(queries, candidates, rows=3))
    assert [len(b) for b in blocks] == [3, 3, 1]
    np.testing.assert_allclose(np.concatenate(blocks), queries @ candidates.T, rtol=1e-5)


NAN = np.array([[1.0, 0.0], [0.0, np.nan]])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: matrix_recall(NAN, np.array([0, 1])), r"score of query 1 is NaN \(1 such rows"),
        (lambda: matrix_recall(np.zeros((3, 2)), np.array([0, 2])), "Query 1 has no candidate"),
        (lambda: matrix_recall(np.zeros((2, 3)), np.array([0, 1])), r"shape \[2, 3\], want 2 x 2"),
        (lambda: ranks([np.zeros((1, 2))], np.arange(2), np.arange(2)), "have 1 rows, there are 2 queries"),
        (lambda: ranks([np.zeros((3, 2))], np.arange(2), np.arange(2)), r"shape \[3, 2\], want 2 x 2"),
        (lambda: matrix_recall(np.zeros((3, 3)), np.arange(3), num_folds=2), "3 images cannot be cut into 2"),
        (lambda: matrix_recall(np.zeros((2, 2)), np.arange(2), ties="lucky"), "got `lucky`"),
        (lambda: matrix_recall(np.zeros((0, 0)), np.arange(0)), "no captions"),
    ],
)
def test_what_means_nothing_is_an_error(call, text):
    with pytest.raises(PairmillError, match=text):
        call()
