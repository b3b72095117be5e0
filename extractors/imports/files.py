"""What a large file or a folder of files is, without reading it whole."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_BLOCK = 1 << 16
_BLOCKS = 1024  # up to 64 MiB a file is hashed whole
_FILES = 64


def sampled_hash(path: Path) -> dict[str, Any]:
    """Size, and sha256 of the file's bytes; above 64 MiB of 1024 blocks of 64 KiB at even distances."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    whole = size <= _BLOCK * _BLOCKS
    with path.open("rb") as stream:
        for block in range(_BLOCKS):
            stream.seek(block * _BLOCK if whole else block * (size - _BLOCK) // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))
    return {"bytes": size, "sha256" if whole else "sha256_of_1024_blocks": digest.hexdigest()}


def folder_hash(root: Path, names: Sequence[str]) -> dict[str, Any]:
    """Number of files, and sha256 of all names and sizes and of the bytes of 64 files at even distances."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{(root / name).stat().st_size}\n".encode("utf-8", "surrogateescape"))
    for at in sorted({i * len(names) // _FILES for i in range(_FILES)} if names else set()):
        digest.update((root / names[at]).read_bytes())
    return {"files": len(names), "sha256_of_names_sizes_and_64_files": digest.hexdigest()}
