"""Files outside the dataset that a rule reads: a recipe names them and holds their fingerprint, never a path."""

from __future__ import annotations

from schemas.errors import PairmillError
from shards.files import hash_file


def file_hash(path: str) -> str:
    """sha256 of a file's bytes, hex. Raises PairmillError where it cannot be read."""
    try:
        return hash_file(path)
    except OSError as error:
        raise PairmillError(f"{path} cannot be read: {error.strerror}.") from None


def check_fingerprint(what: str, found: str, expected: str | None) -> None:
    """Raises PairmillError where a recipe was made with something else than what is given now."""
    if expected is not None and expected != found:
        raise PairmillError(
            f"{what} is not what this recipe was made with: its fingerprint is {found}, the recipe has {expected}. "
            "Give that one, or leave `fingerprint` out."
        )
