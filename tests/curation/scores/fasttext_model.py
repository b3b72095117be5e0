"""A small fastText classifier as a file, byte for byte as fastText writes one that is not quantised."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path


def save_classifier(path: Path, words: Mapping[str, str]) -> Path:
    """Each word points to one label, with a vector of its own; a text gets the label most of its words point to."""
    vocabulary = [*words, "</s>"]
    labels = sorted(set(words.values()))
    dim = len(labels)
    settings = (dim, 5, 5, 1, 5, 1, 3, 3, 0, 0, 0, 100)  # loss softmax, model supervised, no n-grams
    out = [struct.pack("<ii12id", 793712314, 12, *settings, 1e-4)]
    out.append(struct.pack("<iiiqq", len(vocabulary) + dim, len(vocabulary), dim, 100, -1))
    out += [word.encode() + struct.pack("<xqb", 10, 0) for word in vocabulary]
    out += [f"__label__{label}".encode() + struct.pack("<xqb", 10, 1) for label in labels]
    rows = [[20.0 * (words.get(word) == label) for label in labels] for word in vocabulary]
    out.append(struct.pack(f"<?qq{dim * len(rows)}f", False, len(rows), dim, *[v for row in rows for v in row]))
    eye = [float(i == j) for i in range(dim) for j in range(dim)]
    out.append(struct.pack(f"<?qq{dim * dim}f", False, dim, dim, *eye))
    path.write_bytes(b"".join(out))
    return path
