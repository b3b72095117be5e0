"""`check --reproduce`: scores that are what they say pass, one that was changed is found, in every scorer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from curation.check import Finding, check
from curation.maintenance_config import CheckConfig
from curation.reproduce import REDO
from curation.scores.config import (
    AestheticScoreConfig,
    HashScoreConfig,
    ImageScoreConfig,
    LanguageScoreConfig,
    SafetyScoreConfig,
    TextScoreConfig,
)
from curation.scores.embeddings import score_aesthetic, score_safety
from curation.scores.hashes import score_hash
from curation.scores.image import score_image
from curation.scores.language import score_language
from curation.scores.text import score_text
from extractors.clip import score_clip
from extractors.config import ClipScoreConfig
from schemas.errors import PairmillError
from schemas.events import Notice, silent
from shards.dataset import Dataset
from shards.reader import read_table, stored_counts
from shards.writer import write_table
from tests.curation.scores.head_files import save_head
from tests.extractors.tiny_clip import save_clip
from tests.make import make_dataset

SETS = ("aesthetic", "clip", "hash", "image", "language", "safety", "text")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ds` with every score, and the weights that made them."""
    root = tmp_path_factory.mktemp("reproduce")
    dataset = make_dataset(
        root / "ds",
        shards=2,
        rows=5,
        fail={(0, 1): "timeout"},
        captions={(1, 2): ["one red block", "zwei blaue Kreise", ""]},
        no_caption={(0, 2)},
    )
    clip = ClipScoreConfig(model=f"local-dir:{save_clip(root / 'tiny')}", workers=0, device="cpu")
    score_clip(dataset, clip)
    save_head(root / "pleasing.pth", "aesthetic", "V2 linear layers")
    save_head(root / "unsafe.pth", "safety", "autokeras 3 layers")
    score_aesthetic(dataset, AestheticScoreConfig(weights=root / "pleasing.pth", made_for="tiny", workers=0))
    score_safety(dataset, SafetyScoreConfig(weights=root / "unsafe.pth", made_for="tiny", workers=0))
    score_text(dataset, TextScoreConfig(workers=0))
    score_image(dataset, ImageScoreConfig(workers=0))
    score_hash(dataset, HashScoreConfig(workers=0))
    score_language(dataset, LanguageScoreConfig(workers=0))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


def found(root: Path, emit=silent, weights: tuple[str, ...] = ("tiny", "pleasing.pth", "unsafe.pth"), **values):
    config = CheckConfig(**{"reproduce": 20, "weights": tuple(root / name for name in weights), **values})
    return check(root / "ds", config, emit)


def test_every_score_comes_out_again(root: Path):
    events: list = []
    assert found(root, events.append) == []
    told = [e.text for e in events if isinstance(e, Notice)]
    assert [text.split(":")[0] for text in told] == [f"scores/{name}" for name in SETS]
    assert told[1] == "scores/clip: 9 rows computed again, all within 0.001."
    assert told[2] == "scores/hash: 9 rows computed again, all within 1e-05."
    assert {f"score {name}" for name in SETS} | {"score watermark"} == set(REDO)


def test_nothing_is_left_in_the_dataset(root: Path):
    before = sorted(p.relative_to(root) for p in root.rglob("*"))
    found(root, reproduce=2)
    assert sorted(p.relative_to(root) for p in root.rglob("*")) == before


def change(root: Path, path: str, column: str, value) -> None:
    """`value` in row 0 of shard 0, the footer as it was."""
    dataset = Dataset.open(root / "ds")
    stage = dataset.stage(path)
    table = read_table(dataset.folder, stage.file(0))
    values = table[column].to_pylist()
    values[0] = value(values[0])
    at = table.column_names.index(column)
    changed = table.set_column(at, table.schema.field(column), pa.array(values, table.schema.field(column).type))
    counts, digest = stored_counts(dataset.folder, stage.file(0)), stage.digest(0)
    footer = stage.footer(0)
    whole = footer.get(b"pairmill.whole")
    changed = changed.replace_schema_metadata(
        {k: v for k, v in table.schema.metadata.items() if b"schema" in k or b"version" in k}
    )
    write_table(dataset.folder, stage.file(0), changed, counts, digest, whole.decode() if whole else None)


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("clip", "clip_score", lambda x: x + 0.002),
        ("clip", "clip_scores", lambda x: [*x, 0.5]),
        ("aesthetic", "aesthetic", lambda x: x + 0.01),
        ("safety", "punsafe", lambda x: x - 0.01),
        ("text", "words", lambda x: x + 1),
        ("image", "contrast", lambda x: x * 1.001),
        ("hash", "phash", lambda x: x ^ 1 if isinstance(x, int) else bytes([x[0] ^ 1]) + x[1:]),
        ("language", "language", lambda x: "xx"),
        ("language", "language_probability", lambda x: x - 0.01),
    ],
)
def test_a_changed_value_is_found(root: Path, name: str, column: str, value):
    change(root, f"scores/{name}", column, value)
    (one,) = found(root)
    assert one.error
    assert one.where == f"scores/{name} row 0:0"
    assert one.text.startswith(f"`{column}` is ")
    assert "computed again it is" in one.text


def test_a_difference_within_the_tolerance_passes(root: Path):
    change(root, "scores/clip", "clip_score", lambda x: x + 0.0005)
    assert found(root) == []


def test_weights_that_are_not_given_are_named(root: Path):
    findings = found(root, weights=("pleasing.pth",))
    assert [(f.where, f.error) for f in findings] == [("scores/clip", False), ("scores/safety", False)]
    assert "the weights with sha256" in findings[0].text
    assert "--weights" in findings[0].text
    with pytest.raises(PairmillError, match="no such file or folder"):
        found(root, weights=("none.pth",))


def test_embeddings_that_are_gone_are_told(root: Path):
    shutil.rmtree(root / "ds" / "features")
    texts = {f.where: f.text for f in found(root) if "again" in f.text}
    assert texts == {
        f"scores/{name}": "was not computed again: the embeddings it was made from are gone or were made anew"
        for name in ("aesthetic", "safety")
    }


def test_other_scorers_are_told(root: Path):
    from tests.curation.scored import write_scores

    dataset = Dataset.open(root / "ds")
    write_scores(dataset, "own", {"size": [1.0] * 10})
    sidecar = root / "ds" / "scores" / "own" / "sidecar.json"
    sidecar.write_text(sidecar.read_text().replace('"score clip"', '"score expr"'))
    events: list = []
    assert found(root, events.append) == []
    assert any(isinstance(e, Notice) and e.text.startswith("scores/own: `score expr` is not") for e in events)


def test_without_the_option_nothing_is_computed(root: Path):
    change(root, "scores/clip", "clip_score", lambda x: x + 0.5)
    findings: list[Finding] = check(root / "ds", CheckConfig(), silent)
    assert findings == []
