"""Masking: against a naive greedy loop, and what must hold for every draw."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import PairmillError
from training.masking import IGNORED, Masker, choose_words, find_words
from training.text import ClipTokenizer, SubwordTokenizer, bert_pipeline

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", *(f"##{c}" for c in "klmnopqrst")]
TOKENIZER = SubwordTokenizer(bert_pipeline({piece: i for i, piece in enumerate(PIECES)}))
PAD, CLS, SEP, MASK = TOKENIZER.pad_id, TOKENIZER.cls_id, TOKENIZER.sep_id, TOKENIZER.mask_id
bodies = st.lists(st.lists(st.integers(5, len(PIECES) - 1) | st.just(1), max_size=12), min_size=1, max_size=5)
modes = st.fixed_dictionaries({"whole_words": st.booleans(), "quirks": st.booleans()})


def batch(rows, extra=0):
    width = max(len(row) for row in rows) + 2 + extra
    return torch.tensor([[CLS, *row, SEP, *[PAD] * (width - len(row) - 2)] for row in rows])


def naive_words(ids, masker):
    """Lists of token places, as BERT's own code groups them."""
    words = []
    for place, i in enumerate(ids):
        if masker.skipped[i]:
            continue
        if words and PIECES[i].startswith("##"):
            words[-1].append(place)
        else:
            words.append([place])
    return words


@settings(max_examples=100, deadline=None)
@given(bodies, st.booleans(), st.integers(1, 8), st.randoms(use_true_random=False))
def test_words_are_chosen_as_a_greedy_loop_does(rows, quirks, budget, random):
    masker = Masker(TOKENIZER, quirks=quirks)
    ids = batch(rows)
    words = find_words(ids, masker.continuation, masker.skipped)
    order = torch.full_like(ids, -1)
    want = torch.zeros_like(ids, dtype=torch.bool)
    for b, row in enumerate(ids.tolist()):
        groups = naive_words(row, masker)
        shuffled = random.sample(range(len(groups)), len(groups))
        order[b, : len(shuffled)] = torch.tensor(shuffled, dtype=torch.int64)
        left = budget
        for k in shuffled:
            if len(groups[k]) <= left:
                want[b, groups[k]] = True
                left -= len(groups[k])
    assert torch.equal(choose_words(words, order, torch.full((len(ids),), budget)), want)


@settings(max_examples=100, deadline=None)
@given(bodies, modes, st.integers(0, 2**31))
def test_what_every_masking_keeps(rows, mode, seed):
    masker = Masker(TOKENIZER, **mode)
    ids = batch(rows)
    before = ids.clone()
    masked, labels = masker(ids, torch.Generator().manual_seed(seed))
    chosen = labels != IGNORED
    assert torch.equal(ids, before)
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert not masker.special[ids][chosen].any()
    assert not masker.special[masked][chosen & (masked != MASK)].any(), "random pieces are words, not control tokens"
    if mode["whole_words"]:
        assert (chosen.sum(1) <= masker.budget(ids)).all()
        for b, row in enumerate(ids.tolist()):
            for word in naive_words(row, masker):
                ordinary = [place for place in word if row[place] not in TOKENIZER.special]
                assert chosen[b, ordinary].unique().numel() <= 1, "a word is masked whole or not at all"
    again = masker(ids, torch.Generator().manual_seed(seed))
    assert torch.equal(masked, again[0])
    assert torch.equal(labels, again[1])


@settings(max_examples=50, deadline=None)
@given(bodies, st.booleans(), st.integers(0, 7))
def test_with_seeds_neither_padding_nor_neighbours_matter(rows, whole_words, extra):
    masker = Masker(TOKENIZER, whole_words=whole_words)
    seeds = [100 + b for b in range(len(rows))]
    masked, labels = masker(batch(rows, extra), seeds)
    for b, row in enumerate(rows):
        alone = masker(batch([row]), torch.Generator().manual_seed(seeds[b]))
        length = len(row) + 2
        assert torch.equal(masked[b, :length], alone[0][0])
        assert torch.equal(labels[b, :length], alone[1][0])


def many(length, count=4000):
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(5, 15, (count, length), generator=generator)
    edge = torch.full((count, 1), CLS), torch.full((count, 1), SEP)
    return torch.cat([edge[0], words, edge[1]], 1)


@pytest.mark.parametrize("whole_words", [True, False])
def test_shares_are_those_of_bert(whole_words):
    ids = many(18)
    masked, labels = Masker(TOKENIZER, whole_words=whole_words)(ids, torch.Generator().manual_seed(0))
    chosen = labels != IGNORED
    # Whole words: exactly round(20 * 0.15) one-piece words of 18; tokens: 15 % each.
    assert chosen[:, 1:-1].float().mean().item() == pytest.approx(3 / 18 if whole_words else 0.15, abs=0.005)
    assert chosen[:, 1:-1].float().mean(0).std() < 0.02, "every place is as likely"
    assert (masked[chosen] == MASK).float().mean().item() == pytest.approx(0.8, abs=0.02)
    # A random piece is the true one in 1 of 20.
    assert (masked[chosen] == ids[chosen]).float().mean().item() == pytest.approx(0.1 + 0.1 / 20, abs=0.01)
    drawn = masked[chosen & (masked != MASK) & (masked != ids)]
    assert set(drawn.tolist()) == set(range(5, len(PIECES)))


def test_padding_takes_nothing_from_a_short_caption():
    ids = batch([[5, 6, 7]], extra=35)  # 5 tokens of 40
    ours, quirks = (Masker(TOKENIZER, quirks=q) for q in (False, True))
    assert ours.budget(ids).tolist() == [1]
    assert quirks.budget(ids).tolist() == [6]
    counts = [
        [(m(ids, torch.Generator().manual_seed(s))[1] != IGNORED).sum().item() for s in range(60)]
        for m in (ours, quirks)
    ]
    assert set(counts[0]) == {1}
    assert 0 in counts[1], "the original may leave nothing to predict"


def test_budget_rounds_half_to_even_as_python_does():
    masker = Masker(TOKENIZER)
    for length in range(2, 60):
        assert masker.budget(batch([[5] * (length - 2)])).item() == max(1, round(length * 0.15))


def test_a_batch_is_masked_in_a_few_milliseconds():
    ids = many(38, count=64)
    masker = Masker(TOKENIZER)
    times = []
    for seed in range(15):
        begin = time.perf_counter()
        masker(ids, [seed + row for row in range(64)])
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.02  # 1 ms alone on one core


def test_what_cannot_mask():
    with pytest.raises(PairmillError, match="CLIP's has none"):
        Masker(ClipTokenizer())
    with pytest.raises(PairmillError, match=r"above 0 and at most 1, got 0"):
        Masker(TOKENIZER, probability=0)
