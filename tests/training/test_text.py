"""Tokenizers: equal to the originals' libraries, deterministic, saved and read back, patient with strange text."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from schemas.errors import PairmillError
from training import text
from training.text import ClipTokenizer, SubwordTokenizer, bert_pipeline, load_tokenizer, train_wordpiece

WORDS = ["a", "man", "riding", "two", "horses", "on", "the", "beach", "playfully", "near", "some", "café", "dogs"]
WORDS += ["running", "skateboarders", "42", "red-blue"]
CAPTIONS = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) for i in range(1, 40)]


@pytest.fixture(scope="module")
def clip():
    return ClipTokenizer()


@pytest.fixture(scope="module")
def wordpiece():
    return train_wordpiece(CAPTIONS, vocab_size=120)


@pytest.fixture(scope="module")
def open_clip_tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=4))
def test_clip_equals_open_clip(clip, open_clip_tokenizer, texts):
    # Control words differ: open_clip writes them <start_of_text>. OpenAI's are in the golden case.
    assume(not any("<|" in t or "_of_text" in t.lower() for t in texts))
    texts = [t.encode("utf-8", "replace").decode() for t in texts]
    assert clip.pieces(texts) == [open_clip_tokenizer.encode(t) for t in texts]


def test_clip_context_keeps_the_end_and_counts_the_cut(clip, open_clip_tokenizer):
    texts = ["word " * 100, "a cat", "", "word " * 75, "word " * 76]
    ids, mask, num_cut = clip.encode_counted(texts, 77, fixed=True)
    assert torch.equal(ids, open_clip_tokenizer(texts, 77))
    assert num_cut == 2
    assert ids.gather(1, mask.sum(1, keepdim=True) - 1).eq(clip.sep_id).all()
    short, mask = clip.encode(["a", "a b c"], 77)
    assert short.shape == (2, 5)
    assert mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]


def test_clip_reads_control_words_as_the_original(clip):
    # Golden case, but here as a rule: they become the control tokens, in any case of letters.
    assert clip.pieces(["<|STARTOFTEXT|> x<|endoftext|>"])[0] == [clip.cls_id, *clip.pieces(["x"])[0], clip.sep_id]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=5), st.integers(2, 12), st.booleans())
def test_encode_keeps_its_promises(wordpiece, texts, max_length, fixed):
    ids, mask, num_cut = wordpiece.encode_counted(texts, max_length, fixed)
    lengths = [min(len(body) + 2, max_length) for body in wordpiece.pieces([text._readable(t) for t in texts])]
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert ids.shape == mask.shape == (len(texts), max_length if fixed else max(lengths, default=0))
    assert mask.sum(1).tolist() == lengths
    for row, length in zip(ids.tolist(), lengths, strict=True):
        assert row[0] == wordpiece.cls_id
        assert row[length - 1] == wordpiece.sep_id
        assert set(row[length:]) <= {wordpiece.pad_id}
    assert num_cut <= len(texts)


def test_wordpiece_properties(wordpiece):
    assert wordpiece.vocab_size <= 120
    assert wordpiece.special == (0, 1, 2, 3, 4)
    assert (wordpiece.pad_id, wordpiece.cls_id, wordpiece.sep_id, wordpiece.mask_id) == (0, 2, 3, 4)
    names = {i: piece for piece, i in wordpiece._rust.get_vocab().items()}
    assert [names[i].startswith("##") for i in range(wordpiece.vocab_size)] == wordpiece.continuation.tolist()
    assert wordpiece.continuation.any()
    ids = wordpiece.pieces(["Two HORSES near the Café!"])[0]
    assert wordpiece.decode(ids) == "two horses near the cafe [UNK]"


def test_wordpiece_depends_on_counts_alone(wordpiece):
    again = train_wordpiece(reversed(CAPTIONS), vocab_size=120)
    assert again.fingerprint == wordpiece.fingerprint
    assert train_wordpiece(CAPTIONS[:20], vocab_size=120).fingerprint != wordpiece.fingerprint


def test_wordpiece_is_the_same_in_every_process(wordpiece):
    """The library's own trainer numbers pieces by a hash table that differs in every process."""
    code = (
        f"from training.text import train_wordpiece; print(train_wordpiece({CAPTIONS!r}, vocab_size=120).fingerprint)"
    )
    prints = []
    for seed, threads in (("1", "1"), ("2", "2")):
        env = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        prints.append(done.stdout.strip())
    assert prints == [wordpiece.fingerprint] * 2


def test_rare_words_go_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(text, "MAX_COUNTED_WORDS", 20)
    captions = ["often often again again", *(f"once{i}" for i in range(100)), "often again"]
    counted = text._count_words(captions)
    assert len(counted) <= 20
    assert counted["often"] == counted["again"] == 3


def test_alphabet_never_outgrows_the_vocabulary():
    captions = ["".join(chr(0x1000 + (i * 7 + k) % 300) for k in range(5)) for i in range(300)]
    assert train_wordpiece(captions, vocab_size=64).vocab_size <= 64


def test_saved_folder_is_ours_and_transformers(wordpiece, tmp_path):
    wordpiece.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "vocab.txt"]
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == wordpiece.fingerprint
    want = [ids[mask].tolist() for ids, mask in zip(*loaded.encode(CAPTIONS, 99), strict=True)]
    assert [wordpiece._rust.encode(c).ids for c in CAPTIONS] == want
    from transformers import BertTokenizerFast

    assert BertTokenizerFast.from_pretrained(tmp_path)(CAPTIONS)["input_ids"] == want
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(str(tmp_path)).fingerprint == wordpiece.fingerprint
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = load_tokenizer(tmp_path)
    assert cased.fingerprint != wordpiece.fingerprint
    assert cased.decode(cased.pieces(["DOGS dogs"])[0]) == "[UNK] dogs"


def test_clip_saved_and_read_back(clip, tmp_path):
    clip.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, ClipTokenizer)
    assert loaded.fingerprint == clip.fingerprint == load_tokenizer("clip").fingerprint
    (tmp_path / text.CLIP_FILE).write_text('{"fingerprint": "other"}')
    with pytest.raises(PairmillError, match="another CLIP vocabulary"):
        load_tokenizer(tmp_path)


def test_byte_level_tokenizer_of_roberta(tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        CAPTIONS, 300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False
    )
    trained.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.cls_id, loaded.pad_id, loaded.sep_id, loaded.mask_id) == (0, 1, 2, 4)
    assert not loaded.continuation.any()
    ids, mask = loaded.encode(["a man", "a man riding horses"], 6)
    assert ids.shape[1] <= 6
    assert (ids == 1).equal(~mask)
    assert loaded.decode(ids[0][mask[0]].tolist()) == "<s>a man</s>"


@pytest.mark.parametrize("kind", ["clip", "wordpiece"])
def test_strange_text_is_no_obstacle(kind, request):
    tokenizer = request.getfixturevalue(kind)
    strange = ["\ud800 lone", "\0\x1c", "a" * 10_000_000, "ab" * 2000, " " * 9000, "\u200d" * 99, "[MASK] <b>"]
    begin = time.perf_counter()
    _, mask, num_cut = tokenizer.encode_counted(strange, 32)
    assert time.perf_counter() - begin < 2.0
    assert mask.sum(1).ge(2).all()
    assert num_cut <= len(strange)


@pytest.mark.parametrize("kind", ["clip", "wordpiece"])
def test_a_tokenizer_goes_to_another_process(kind, request):
    tokenizer = request.getfixturevalue(kind)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.pieces(["a dog"]) == tokenizer.pieces(["a dog"])


def test_from_the_hub(wordpiece, tmp_path, monkeypatch):
    from transformers import AutoTokenizer, BertTokenizerFast

    wordpiece.save(tmp_path)
    fast = BertTokenizerFast.from_pretrained(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, use_fast: fast)
    assert load_tokenizer("some/bert").pieces(["two dogs"]) == wordpiece.pieces(["two dogs"])
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, use_fast: object())
    with pytest.raises(PairmillError, match=r"`some/slow` has no tokenizer\.json form"):
        load_tokenizer("some/slow")


def test_offline_says_what_to_download(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(PairmillError, match=r"`no/such-model` is neither a folder.*--tokenizer FOLDER"):
        load_tokenizer("no/such-model")


def folder_with(path: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (path / name.replace("_json", ".json").replace("_txt", ".txt")).write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither tokenizer.json nor vocab.txt"),
        ({"tokenizer_json": "{}"}, "is not a tokenizer"),
        ({"tokenizer_json": b"\xff\xfe"}, "is not UTF-8"),
        ({"vocab_txt": "a\nb\n"}, r"the vocabulary has no \[PAD\], \[CLS\], \[SEP\]"),
        ({"vocab_txt": "a\n", "tokenizer_config_json": "[1]"}, "is not a JSON object"),
        ({"vocab_txt": "a\n", "tokenizer_config_json": "{"}, "is not JSON"),
        ({"clip_tokenizer_json": "{"}, "is not JSON"),
    ],
)
def test_folders_without_a_tokenizer(tmp_path, files, message):
    with pytest.raises(PairmillError, match=message):
        load_tokenizer(folder_with(tmp_path, **files))


def test_other_errors(wordpiece, tmp_path, monkeypatch):
    with pytest.raises(PairmillError, match="There is no folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(PairmillError, match="There is no folder"):
        load_tokenizer("./none")
    with pytest.raises(PairmillError, match="no word in the captions"):
        train_wordpiece(["", "   "])
    with pytest.raises(PairmillError, match="at least 64, got 5"):
        train_wordpiece(CAPTIONS, vocab_size=5)
    with pytest.raises(PairmillError, match=r"at least 2 .*, got 1"):
        wordpiece.encode(["a"], 1)
    monkeypatch.setattr(text, "MAX_FILE_BYTES", 1)
    with pytest.raises(PairmillError, match="larger than 1 bytes"):
        load_tokenizer(folder_with(tmp_path, vocab_txt="[PAD]\n"))


def test_vocabulary_with_line_separators(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2028", "dog"]
    loaded = load_tokenizer(folder_with(tmp_path, vocab_txt="\n".join(pieces) + "\n"))
    assert loaded.pieces(["dog"]) == [[6]]
    direct = SubwordTokenizer(bert_pipeline({p: i for i, p in enumerate(pieces)}))
    assert direct.fingerprint == loaded.fingerprint
