"""CLIP's tokenizer and whole-word masking, against the originals."""

import pytest
import torch

from tests.parity.golden import check_outputs, golden
from training.masking import Draws, Masker, choose_words, find_words, replace_tokens
from training.text import ClipTokenizer, SubwordTokenizer, bert_pipeline


@pytest.mark.parametrize("case", golden("clip_tokenizer"), ids=str)
def test_clip_tokenizer(case):
    tokenizer = ClipTokenizer()
    texts = case.inputs["texts"]
    ids = tokenizer.pieces(texts)
    encoded, mask, _ = tokenizer.encode_counted(texts, 77, fixed=True)
    assert encoded.shape == (len(texts), 77)
    assert not encoded[~mask].any()
    places = torch.arange(77).where(encoded != 0, -1)
    got = {
        "ids": ids,
        "decoded": [tokenizer.decode(one) for one in ids],
        "padded_len": (encoded != 0).sum(1).tolist(),
        "last_id": encoded.gather(1, places.max(1, keepdim=True).values)[:, 0].tolist(),
    }
    check_outputs(case, got)


@pytest.mark.parametrize("case", golden("whole_word_masking"), ids=str)
def test_whole_word_masking(case):
    tokenizer = SubwordTokenizer(bert_pipeline({piece: i for i, piece in enumerate(case.info["vocabulary"])}))
    # Flag: the original lets [PAD] and [UNK] use up the budget.
    masker = Masker(tokenizer, probability=case.config["prob"], quirks=True)
    ids = case.inputs["input_ids"]
    words = find_words(ids, masker.continuation, masker.skipped)
    draws = Draws(
        order=case.inputs["order"],
        replace=case.inputs["draw_replace"].bool(),
        random=case.inputs["draw_random"].bool(),
        random_words=case.inputs["random_words"],
    )
    chosen = choose_words(words, draws.order, masker.budget(ids))
    predicted = masker.choose(ids, words, draws.order, torch.empty(0))
    masked, labels = replace_tokens(ids, predicted, draws, masker.mask_id)
    check_outputs(case, {"input_ids": masked, "labels": labels, "mask_labels": chosen.long()})
