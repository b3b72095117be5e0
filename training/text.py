"""Text in: tokenizers (CLIP's BPE, WordPiece, any Hugging Face one) and the masking of tokens and whole words.

Shape letters: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import gzip
import html
import importlib.util
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from schemas.config import fingerprint
from schemas.errors import PairmillError
from shards.files import atomic_file

# More than any context takes; a caption of megabytes must not hold up a batch.
MAX_TEXT_CHARS = 4000
MAX_FILE_BYTES = 256 << 20
CLIP = "clip"
CLIP_FILE = "clip_tokenizer.json"


class Tokenizer(ABC):
    """Texts to padded ids. Ids: `pad_id`, `cls_id` (start), `sep_id` (end), `mask_id` (None where there is none).

    special       ids that stand for no text
    continuation  [V] bool, True for pieces that go on a word ("##ing")
    """

    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int | None
    vocab_size: int
    special: tuple[int, ...]
    continuation: Tensor

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """32 hex digits: equal where every text gets the same ids."""

    @abstractmethod
    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without start and end, not cut."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special ones included."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` reads back."""

    def encode(self, texts: Sequence[str], max_length: int, fixed: bool = False) -> tuple[Tensor, Tensor]:
        """(input_ids [B, T] int64, mask [B, T] bool, False = padding), see `encode_counted`."""
        return self.encode_counted(texts, max_length, fixed)[:2]

    def encode_counted(self, texts: Sequence[str], max_length: int, fixed: bool = False) -> tuple[Tensor, Tensor, int]:
        """Ids, mask, and how many texts were cut.

        A row is start, pieces, end, padding. A text too long loses its last pieces, never the end token.
        T is the longest row of the batch, or `max_length` where `fixed`.

        Raises PairmillError for a `max_length` that has no room for start and end.
        """
        if max_length < 2:
            raise PairmillError(f"`max_length` must be at least 2 (start and end token), got {max_length}.")
        bodies = self.pieces([_readable(text) for text in texts])
        room = max_length - 2
        rows = [[self.cls_id, *body[:room], self.sep_id] for body in bodies]
        ids, mask = _pad(rows, self.pad_id, max_length if fixed else 0)
        return ids, mask, sum(len(body) > room for body in bodies)


def _readable(text: str) -> str:
    """At most MAX_TEXT_CHARS characters; a lone surrogate, which no tokenizer takes, becomes "?"."""
    return text[:MAX_TEXT_CHARS].encode("utf-8", "replace").decode("utf-8")


def _pad(rows: list[list[int]], pad_id: int, width: int) -> tuple[Tensor, Tensor]:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    mask = np.arange(max(width, int(lengths.max(initial=0)))) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = [i for row in rows for i in row]
    return torch.from_numpy(ids), torch.from_numpy(mask)


# CLIP's own byte-pair encoding (openai/CLIP, clip/simple_tokenizer.py).

_START, _END = "<|startoftext|>", "<|endoftext|>"
_CLIP_MERGES = 49152 - 256 - 2
_CLIP_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@functools.cache
def _byte_letters() -> dict[int, str]:
    """A printable letter for each byte: itself where it is one, else the next from U+0100 on (as in GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@functools.cache
def _clip_vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """(pieces in the order of their ids, merges) from the file that open_clip carries."""
    # find_spec does not import open_clip, which takes seconds.
    spec = importlib.util.find_spec("open_clip")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise PairmillError(
            "CLIP's vocabulary comes with open_clip, which is not installed: pip install open_clip_torch"
        )
    with gzip.open(Path(folders[0]) / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : _CLIP_MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = list(_byte_letters().values())
    joined = [first + second for first, second in merges]
    return [*letters, *(letter + "</w>" for letter in letters), *joined, _START, _END], merges


class ClipTokenizer(Tokenizer):
    """CLIP's lower-cased BPE, 49,408 pieces; ids as OpenAI's code gives them. Padding is id 0, as there."""

    def __init__(self) -> None:
        import regex
        from tokenizers import Tokenizer as Rust
        from tokenizers import models

        self._vocabulary, merges = _clip_vocabulary()
        ids = {piece: i for i, piece in enumerate(self._vocabulary)}
        self._rust = Rust(models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>"))
        self._rust.add_special_tokens([_START, _END])
        self._split = regex.compile(_CLIP_PIECES, regex.IGNORECASE)
        self.vocab_size = len(self._vocabulary)
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = 0, ids[_START], ids[_END], None
        self.special = (self.cls_id, self.sep_id)
        self.continuation = torch.zeros(self.vocab_size, dtype=torch.bool)

    def __reduce__(self) -> tuple[type[ClipTokenizer], tuple[()]]:
        return ClipTokenizer, ()

    @property
    def fingerprint(self) -> str:
        return fingerprint({"kind": "clip-bpe", "vocabulary": self._vocabulary})

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        words = [self._words(text) for text in texts]
        encoded = self._rust.encode_batch(words, is_pretokenized=True, add_special_tokens=False)
        return [one.ids for one in encoded]

    def _words(self, text: str) -> list[str]:
        import ftfy

        clean = html.unescape(html.unescape(ftfy.fix_text(text)))
        letters = _byte_letters()
        words = self._split.findall(" ".join(clean.split()).lower())
        return ["".join(letters[byte] for byte in word.encode("utf-8", "replace")) for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        byte_of = {letter: byte for byte, letter in _byte_letters().items()}
        letters = "".join(self._vocabulary[i] for i in ids)
        return bytes(byte_of[letter] for letter in letters).decode("utf-8", "replace").replace("</w>", " ")

    def save(self, folder: Path) -> None:
        _write_json(folder / CLIP_FILE, {"kind": "clip-bpe", "fingerprint": self.fingerprint})


_ROLES = {
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
}


class SubwordTokenizer(Tokenizer):
    """A Hugging Face tokenizer (WordPiece of BERT, byte-level BPE of RoBERTa) behind our protocol.

    Raises PairmillError where it has no padding, start or end token.
    """

    def __init__(self, rust: Any, source: str = "tokenizer") -> None:
        self._rust = rust
        rust.no_padding()
        rust.no_truncation()
        vocabulary: dict[str, int] = rust.get_vocab(with_added_tokens=True)
        ids = {role: vocabulary[name] for role, names in _ROLES.items() for name in names if name in vocabulary}
        missing = [_ROLES[role][0] for role in ("pad", "cls", "sep") if role not in ids]
        if missing:
            raise PairmillError(
                f"{source}: the vocabulary has no {', '.join(missing)}. Pass --tokenizer with a BERT-like folder."
            )
        self.pad_id, self.cls_id, self.sep_id = ids["pad"], ids["cls"], ids["sep"]
        self.mask_id = ids.get("mask")
        self.special = tuple(sorted(ids.values()))
        self.vocab_size = max(vocabulary.values()) + 1
        self.continuation = torch.zeros(self.vocab_size, dtype=torch.bool)
        self.continuation[[i for piece, i in vocabulary.items() if piece.startswith("##")]] = True

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return _from_json, (self._rust.to_str(),)

    @property
    def fingerprint(self) -> str:
        parts = json.loads(self._rust.to_str())
        vocabulary = sorted(self._rust.get_vocab(with_added_tokens=True).items())
        model = {k: parts["model"].get(k) for k in ("type", "merges", "unk_token", "continuing_subword_prefix")}
        steps = {k: parts[k] for k in ("normalizer", "pre_tokenizer")}
        return fingerprint({"model": model, "vocabulary": vocabulary, **steps})

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self._rust.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._rust.decode(list(ids), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """tokenizer.json, and for WordPiece vocab.txt beside it: transformers' BertTokenizerFast reads the folder."""
        _write_json(folder / "tokenizer.json", json.loads(self._rust.to_str()))
        if json.loads(self._rust.to_str())["model"].get("type") == "WordPiece":
            pieces = sorted(self._rust.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
            with atomic_file(folder / "vocab.txt") as file:
                file.write("".join(f"{piece}\n" for piece, _ in pieces).encode())


def _from_json(text: str) -> SubwordTokenizer:
    from tokenizers import Tokenizer as Rust

    return SubwordTokenizer(Rust.from_str(text))


def _write_json(path: Path, content: Any) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())


# WordPiece as BERT has it, trained on captions.

_BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORD_CHARS = 100
MAX_ALPHABET = 1000
MAX_COUNTED_WORDS = 2_000_000


def bert_pipeline(vocabulary: dict[str, int], lowercase: bool = True) -> Any:
    """BERT's pipeline: clean, lower-case, strip accents, split at spaces, punctuation and Chinese characters."""
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    rust = Rust(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARS))
    rust.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece()
    rust.add_special_tokens([name for name in _BERT_SPECIAL if name in vocabulary])
    if "[CLS]" in vocabulary and "[SEP]" in vocabulary:
        rust.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return rust


def train_wordpiece(captions: Iterable[str], vocab_size: int = 4096) -> SubwordTokenizer:
    """A BERT-uncased vocabulary of at most `vocab_size` pieces, from the captions' words.

    Depends on how often each word occurs and on nothing else: not on order, process or threads. (Beyond two million
    different words the rarest are let go on the way, and the order matters for those.)

    Raises PairmillError: no word at all, or a `vocab_size` below 64.
    """
    from tokenizers import Tokenizer as Rust
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < 64:
        raise PairmillError(f"`vocab_size` must be at least 64, got {vocab_size}.")
    words = _count_words(captions)
    if not words:
        raise PairmillError("There is no word in the captions to train a tokenizer on. Look at the selection.")
    letters, later = _alphabet(words, min(MAX_ALPHABET, (vocab_size - len(_BERT_SPECIAL)) // 2))
    rust = Rust(models.WordPiece(unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        # As special tokens these get their ids in this order. Left to itself the trainer numbers them in the order of
        # a hash table, which differs in every process, and breaks ties between merges by those numbers.
        special_tokens=[*_BERT_SPECIAL, *(f"##{letter}" for letter in later)],
    )
    rust.train_from_iterator(_repeated(words), trainer)
    return SubwordTokenizer(bert_pipeline(rust.get_vocab(with_added_tokens=True)))


def _count_words(captions: Iterable[str]) -> Counter[str]:
    """Words after BERT's cleaning and splitting. Rare ones are let go where there are more than memory is for."""
    bert = bert_pipeline({})
    words: Counter[str] = Counter()
    for caption in captions:
        clean = bert.normalizer.normalize_str(_readable(caption))
        words.update(w for w, _ in bert.pre_tokenizer.pre_tokenize_str(clean) if len(w) <= MAX_WORD_CHARS)
        if len(words) > MAX_COUNTED_WORDS:
            words = _frequent(words, MAX_COUNTED_WORDS // 2)
    return words


def _frequent(words: Counter[str], limit: int) -> Counter[str]:
    """At most `limit` words: those seen once go first, then those seen twice, and so on."""
    rare = 1
    while len(words) > limit:
        words = Counter({word: n for word, n in words.items() if n > rare})
        rare += 1
    return words


def _alphabet(words: Counter[str], limit: int) -> tuple[list[str], list[str]]:
    """(letters, letters that go on a word): the `limit` most frequent ones, each list sorted."""
    counts: Counter[str] = Counter()
    for word, n in words.items():
        for letter in word:
            counts[letter] += n
    kept = set(sorted(counts, key=lambda letter: (-counts[letter], letter))[:limit])
    later = {letter for word in words for letter in word[1:]}
    return sorted(kept), sorted(kept & later)


def _repeated(words: Counter[str], chunk: int = 10_000) -> Iterator[str]:
    """Each word as often as it was counted, in sorted order: the trainer takes text, not counts."""
    for word, n in sorted(words.items()):
        for start in range(0, n, chunk):
            yield " ".join([word] * min(chunk, n - start))


# Loading.


def load_tokenizer(source: str | Path) -> Tokenizer:
    """`clip`, a folder (ours, or with tokenizer.json or vocab.txt), or a name on the Hugging Face hub.

    Raises PairmillError: a folder without a tokenizer, or a name that the hub or its cache does not give.
    """
    if str(source) == CLIP:
        return ClipTokenizer()
    folder = Path(source)
    if folder.is_dir():
        return _from_folder(folder)
    if isinstance(source, Path) or str(source).startswith((".", "/", "~")):
        raise PairmillError(f"There is no folder {source}. Pass --tokenizer with a folder that has tokenizer.json.")
    return _from_hub(source)


def _from_folder(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Rust

    if (folder / CLIP_FILE).is_file():
        return _saved_clip(folder / CLIP_FILE)
    if (folder / "tokenizer.json").is_file():
        try:
            rust = Rust.from_str(_read(folder / "tokenizer.json"))
        except PairmillError:
            raise
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
            raise PairmillError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}.") from None
        return SubwordTokenizer(rust, str(folder))
    if (folder / "vocab.txt").is_file():
        # Not splitlines: some pieces are themselves line separators of Unicode.
        pieces = _read(folder / "vocab.txt").rstrip("\n").split("\n")
        options = folder / "tokenizer_config.json"
        lowercase = _read_object(options).get("do_lower_case", True) if options.is_file() else True
        return SubwordTokenizer(bert_pipeline({p: i for i, p in enumerate(pieces)}, lowercase), str(folder))
    raise PairmillError(f"{folder} has neither tokenizer.json nor vocab.txt. Pass the folder of a tokenizer.")


def _saved_clip(path: Path) -> ClipTokenizer:
    tokenizer = ClipTokenizer()
    saved = _read_object(path).get("fingerprint")
    if saved != tokenizer.fingerprint:
        raise PairmillError(
            f"{path} was written with another CLIP vocabulary ({saved}) than open_clip carries here "
            f"({tokenizer.fingerprint}). Install the open_clip it was trained with."
        )
    return tokenizer


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise PairmillError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes: no tokenizer is.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PairmillError(f"{path} is not UTF-8 text. Download it again.") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise PairmillError(f"{path} is not JSON: {error}. Download it again.") from None
    if not isinstance(content, dict):
        raise PairmillError(f"{path} is not a JSON object. Download it again.")
    return content


def _from_hub(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        fast = AutoTokenizer.from_pretrained(name, use_fast=True)
    except (OSError, ValueError) as error:
        raise PairmillError(
            f"The tokenizer `{name}` is neither a folder nor in the Hugging Face hub or its cache here "
            f"({str(error).partition(chr(10))[0]}). Download its tokenizer.json (or vocab.txt) into a folder and pass "
            "--tokenizer FOLDER."
        ) from None
    rust = getattr(fast, "backend_tokenizer", None)
    if rust is None:
        raise PairmillError(f"The tokenizer `{name}` has no tokenizer.json form. Pass --tokenizer with one that has.")
    return SubwordTokenizer(rust, name)
