"""What an evaluation leaves behind: results.json, predictions.json, and on the way blocks of scores."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from schemas.errors import PairmillError
from shards.files import atomic_file, is_left_over, open_folder
from shards.locks import lock

RESULTS, PREDICTIONS = "results.json", "predictions.json"
BLOCKS_OF = "scores.json"
VERSION = 1


@dataclass(frozen=True)
class Identity:
    """What decides an evaluation's numbers. No folders of this machine, no times.

    task           such as retrieval
    split          of the task set
    checkpoint     {"name", "sha256"}
    dataset        {"name", "task", "fingerprint"}
    tokenizer      its fingerprint
    configuration  the identity fields of the evaluation's configuration
    """

    task: str
    split: str
    checkpoint: Mapping[str, Any]
    dataset: Mapping[str, Any]
    tokenizer: str
    configuration: Mapping[str, Any]

    def values(self) -> dict[str, Any]:
        """As JSON reads it back."""
        return dict(json.loads(json.dumps(self.__dict__)))

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """`what was A, now B` for each thing that differs from an older evaluation's values."""
        old, new = _flat(other), _flat(self.values())
        names = [n for n in sorted({*old, *new}) if old.get(n) != new.get(n)]
        return [f"`{n}` was {old.get(n)!r}, now {new.get(n)!r}" for n in names]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested names joined with dots; the checkpoint's name is left out: its sha256 tells it."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        inner = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        out |= inner
    return {k: v for k, v in out.items() if k not in ("checkpoint.name", "dataset.name")}


def write_results(
    folder: Path, identity: Identity, metric: Mapping[str, float], counts: Mapping[str, int], seed: int | None
) -> dict[str, Any]:
    """Writes FOLDER/results.json, whole, and returns what is in it."""
    content = {
        "version": VERSION,
        "metric": dict(metric),
        "counts": dict(counts),
        **identity.values(),
        "seed": seed,
        "versions": {"pairmill": version("pairmill")},
    }
    _write_json(folder / RESULTS, content, indent=1)
    return content


def write_predictions(folder: Path, predictions: Any) -> None:
    """Writes FOLDER/predictions.json, whole."""
    _write_json(folder / PREDICTIONS, predictions)


def _write_json(path: Path, content: Any, indent: int | None = None) -> None:
    with atomic_file(path) as stream:
        stream.write((json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode())


def read_results(path: str | Path) -> dict[str, Any]:
    """The results in a file, or in an evaluation's folder.

    Raises PairmillError: no results there, damaged ones, or some of a newer pairmill.
    """
    path = Path(path)
    file = path / RESULTS if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PairmillError(f"{file}: {error.strerror}. `pairmill evaluate` writes it.") from None
    except ValueError as error:
        raise PairmillError(f"{file} is damaged ({error}). Delete it and evaluate again.") from None
    if not isinstance(content, dict) or not isinstance(content.get("metric"), dict):
        raise PairmillError(f"{file} holds no results of pairmill.")
    if content.get("version", 0) > VERSION:
        raise PairmillError(
            f"{file} was written as version {content['version']}; this pairmill reads {VERSION}. Install a newer one."
        )
    return content


def standing_results(folder: Path) -> dict[str, Any] | None:
    """The results of an evaluation that ended in this folder, or None. Raises PairmillError for damaged ones."""
    return read_results(folder) if (folder / RESULTS).is_file() else None


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Holds the folder for one evaluation. Raises PairmillError that says which process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock(open_folder(folder), "evaluation"):
        for file in folder.iterdir():
            if is_left_over(file.name):
                file.unlink()
        yield


class Blocks:
    """Arrays of a long evaluation, each a whole file FOLDER/NAME.npy: a killed one goes on where it was."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        """Raises PairmillError: arrays of an evaluation with other settings stand there."""
        self.folder, self.identity = folder, identity
        self.owner = folder / BLOCKS_OF
        if not self.owner.is_file():
            self._delete()  # arrays that belong to nobody
            _write_json(self.owner, identity.values(), indent=1)
        elif differences := self._differences():
            raise PairmillError(
                f"{folder} holds an unfinished evaluation with other settings: {'; '.join(differences)}. "
                f"Finish it with its own settings, give another -o, or delete {self.owner.name} there."
            )

    def _differences(self) -> list[str]:
        return self.identity.differences(json.loads(self.owner.read_text(encoding="utf-8")))

    def load(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The array, or None where it is still to do. Raises PairmillError where it is not of that shape."""
        file = self._file(name)
        if not file.is_file():
            return None
        try:
            array = np.load(file, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise PairmillError(f"{file} is damaged ({error}). Delete it and run the same command again.") from None
        if array.shape != shape:
            raise PairmillError(f"{file} has shape {list(array.shape)}, want {list(shape)}. Delete it.")
        return array

    def save(self, name: str, array: np.ndarray) -> None:
        with atomic_file(self._file(name)) as stream:
            np.save(stream, array, allow_pickle=False)

    def remove(self) -> None:
        """All arrays, when the results stand."""
        self.owner.unlink(missing_ok=True)
        self._delete()

    def _file(self, name: str) -> Path:
        return self.folder / f"scores-{name}.npy"

    def _delete(self) -> None:
        for file in self.folder.glob("scores-*.npy"):
            file.unlink()
