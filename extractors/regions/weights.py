"""What detectors share about their weights: the file, names that fit or not, names of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from schemas.errors import PairmillError
from shards.weights import read_json

_SHOWN_NAMES = 4
_VOCABULARIES = {"classes": "objects_vocab.txt", "attributes": "attributes_vocab.txt"}


def given_file(detector: str, weights: str | None, where: str) -> Path:
    """The file of `--weights`. Raises PairmillError: none given (with `where` it is to be had), or no such file."""
    if weights is None:
        raise PairmillError(f"`--detector {detector}` needs weights. Pass --weights FILE: {where}")
    path = Path(weights)
    if not path.is_file():
        raise PairmillError(f"`--weights {weights}`: no such file.")
    return path


def fill(model: nn.Module, state: Mapping[str, Tensor], name: str, path: Path) -> None:
    """Loads every tensor. Counters of batches seen are no weights: they may be there or not.

    Raises PairmillError with the first names that are missing, unexpected or of another shape.
    """
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    theirs = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    complaints = {
        "missing": [k for k in own if k not in theirs],
        "unexpected": [k for k in theirs if k not in own],
        "of another shape": [k for k in own if k in theirs and own[k].shape != theirs[k].shape],
    }
    if any(complaints.values()):
        told = "; ".join(f"{len(v)} {what}: {first_names(v)}" for what, v in complaints.items() if v)
        raise PairmillError(f"`{path}` does not fit `{name}`: {told}. Pass the model that the file was made for.")
    model.load_state_dict(theirs, strict=False)


def require(state: Mapping[str, Tensor], key: str, name: str, path: Path) -> Tensor:
    """A tensor by which the architecture is known. Raises PairmillError where it is not there."""
    if key not in state:
        raise PairmillError(
            f"`{path}` does not fit `{name}`: it has no `{key}`; its first names are {first_names(list(state))}. "
            "Pass the model that the file was made for."
        )
    return state[key]


def first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")


def vocabulary(path: Path, part: str, count: int) -> tuple[str, ...] | None:
    """The names of `count` "classes" or "attributes" that lie beside the weights, None where none do.

    `WEIGHTS.json` with a list of them, or `objects_vocab.txt` and `attributes_vocab.txt`, a line each, as bottom-up
    attention publishes them; of several names for one thing the first is taken.
    Raises PairmillError: another number of names.
    """
    beside, lines = path.with_suffix(".json"), path.with_name(_VOCABULARIES[part])
    if beside.is_file() and (listed := read_json(beside).get(part)):
        source, names = beside, [str(n) for n in listed]
    elif lines.is_file():
        source = lines
        names = [line.split(",")[0].strip() for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        return None
    if len(names) != count:
        raise PairmillError(f"`{source}` names {len(names)} {part}, `{path.name}` has {count}.")
    return tuple(names)
