"""An import ended at each call that touches a file is completed by a rerun; so is an export."""

from __future__ import annotations

from pathlib import Path

import pandas  # noqa: F401  # pyarrow loads it: once for all children
import pytest

from extractors.imports.config import ExportFeaturesConfig, ImportFeaturesConfig
from extractors.imports.export import export_features
from extractors.imports.run import import_features
from shards.dataset import MANIFEST, Dataset
from tests.atomicity import assert_atomic
from tests.clean_process import in_clean_process
from tests.extractors.imports import written

FILE = 5  # calls of a file


def _tsv(folder: Path) -> Path:
    lines = [written.lxmert(str(i), written.regions(i, 2)) for i in range(3)]
    (folder / "f.tsv").write_text("".join(lines))
    return folder / "f.tsv"


def into_new(folder: Path, every: int) -> int:
    config = ImportFeaturesConfig(new=True, shard_rows=2, workers=0)
    path = str(_tsv(folder))

    def run(root: Path) -> None:
        import_features("tsv", path, root / "ds", config)

    def opens(root: Path) -> None:
        if (root / "ds" / MANIFEST).exists():
            Dataset.open(root / "ds")

    return assert_atomic(lambda: (None, run), folder, opens, every=every)


def exported(folder: Path, format: str) -> int:
    import_features(
        "tsv", str(_tsv(folder)), folder / "start/ds", ImportFeaturesConfig(new=True, shard_rows=2, workers=0)
    )

    def run(root: Path) -> None:
        export_features(format, root / "ds", root / "out", ExportFeaturesConfig())

    return assert_atomic(lambda: (folder / "start", run), folder)


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_an_import(tmp_path, every):
    calls = in_clean_process(into_new, tmp_path, every)
    assert calls > FILE * 7 - every  # two sidecars, two shards of two stages, dataset.json


def test_a_tsv(tmp_path):
    assert in_clean_process(exported, tmp_path, "tsv") >= FILE * 2


def test_an_lmdb(tmp_path):
    assert in_clean_process(exported, tmp_path, "uniter-lmdb") > FILE
