"""`check` finds what was broken on purpose, and nothing in what was not."""

from __future__ import annotations

import json
import os
import shutil

import pyarrow as pa
import pytest

from curation.check import Finding, check
from curation.maintenance_config import CheckConfig
from schemas.errors import PairmillError
from schemas.events import silent
from schemas.pairs import pairs_schema
from shards.dataset import Dataset
from shards.files import temporary_name
from shards.reader import read_table
from shards.writer import write_pairs, write_table
from tests.curation.samples import select, whole_dataset, write_tasks


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    dataset = whole_dataset(tmp_path_factory.mktemp("sample") / "d")
    select(dataset, [0, 2])
    write_tasks(dataset, [[(0, 0), (2, 3)]])
    return dataset.folder.path


@pytest.fixture
def root(sample, tmp_path):
    shutil.copytree(sample, tmp_path / "d")
    return tmp_path / "d"


def found(root, **options) -> list[Finding]:
    return check(root, CheckConfig(**options), silent)


def texts(root) -> list[str]:
    return [f"{f.where}: {f.text}" for f in found(root)]


def rewrite(root, shard: int, **change) -> None:
    """Row 2 of the shard with these columns changed; the digest and counts follow."""
    dataset = Dataset.open(root)
    name = dataset.stage("pairs").file(shard)
    table = read_table(dataset.folder, name)
    rows = table.to_pylist()
    rows[2].update(change)
    with write_pairs(
        dataset.folder, name, pairs_schema(f for f in table.schema if f.name in ("License", "site.rank"))
    ) as w:
        for row in rows:
            w.append(row)


def test_a_sound_dataset_has_no_findings(root):
    assert found(root) == []


def test_damaged_pixels(root):
    dataset = Dataset.open(root)
    name = "pairs/00001.parquet"
    image = read_table(dataset.folder, name, ["image"])["image"][3].as_py()
    data = bytearray(dataset.folder.read_bytes(name))
    data[data.index(image) + 50] ^= 1
    dataset.folder.write_bytes(name, bytes(data))
    assert [f.where for f in found(root)] == [name]
    rewrite(root, 1)  # fresh page checksums over the damaged pixels
    assert f"{name} row 3: the image's sha256 is not `stored_sha256`: the image is damaged" in texts(root)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image": None}, "a success without an image"),
        ({"format": "png"}, "`format` is png, the image is a jpeg"),
        ({"width": 7}, "`width` and `height` are not those of the image"),
        ({"status": "nonsense"}, "status 'nonsense' is none of ours"),
        ({"status": "timeout"}, "an image though the status is timeout"),
        ({"captions": ["x", "y"]}, "`caption` is not the first of `captions`"),
    ],
)
def test_rows_that_contradict_themselves(root, change, text):
    rewrite(root, 0, **change)
    assert f"pairs/00000.parquet row 2: {text}" in texts(root)


def test_alignment_and_counts(root):
    dataset = Dataset.open(root)
    table = read_table(dataset.folder, "scores/size/00000.parquet")
    digest = dataset.stage("pairs").digest(0)
    write_table(dataset.folder, "scores/size/00000.parquet", table.slice(1), {}, digest)
    manifest = json.loads((root / "dataset.json").read_text())
    manifest["shards"][2] = 3
    (root / "dataset.json").write_text(json.dumps(manifest))
    lines = texts(root)
    assert "scores/size/00000.parquet: has 3 rows, dataset.json says 4" in lines
    for file in ("pairs/00002.parquet", "scores/size/00002.parquet", "features/vector/00002.arrow"):
        assert f"{file}: has 4 rows, dataset.json says 3" in lines
    assert "tasks/vqa/00000.parquet row 0: refers to 2:3, which is no row" in lines


def test_footers_that_lie(root):
    dataset = Dataset.open(root)
    table = read_table(dataset.folder, "pairs/00000.parquet")
    write_table(dataset.folder, "pairs/00000.parquet", table, {"success": 9}, "0" * 32)
    lines = texts(root)
    assert "pairs/00000.parquet: its footer's digest is not that of its rows" in lines
    assert any("its footer counts {'success': 9}, it holds {'success': 3, 'timeout': 1}" in line for line in lines)


def test_stale_and_unfinished_are_no_errors(root):
    rewrite(root, 0, status="timeout", image=None, stored_sha256=None, sha256=None)
    (root / "features/vector/00002.arrow").unlink()
    findings = found(root)
    assert all(not f.error for f in findings)
    assert {f.where for f in findings} == {
        "scores/size/00000.parquet",
        "features/vector/00000.arrow",
        "features/vector/00002.arrow",
        "selections/best.parquet",
    }


def test_cut_and_missing_files(root):
    for name in ("features/vector/00001.arrow", "selections/best.parquet", "pairs/00002.parquet"):
        (root / name).write_bytes((root / name).read_bytes()[:-20])
    (root / "pairs/00001.parquet").unlink()
    (root / "scores/size/sidecar.json").unlink()
    where = {f.where: f.text for f in found(root)}
    assert {"features/vector/00001.arrow", "selections/best.parquet", "pairs/00002.parquet"} <= set(where)
    assert "is missing" in where["pairs/00001.parquet"]
    assert "is missing" in where["scores/size/sidecar.json"]


def test_left_over_files(root):
    dead = temporary_name("00000.parquet").replace(f"-{os.getpid()}.", f"-{2**22 + 1}.")
    (root / "pairs" / dead).write_bytes(b"half")
    shutil.copy(root / "pairs/00000.parquet", root / "pairs/00007.parquet")
    assert [(f.where, f.error) for f in found(root)] == [("pairs/00007.parquet", False), (f"pairs/{dead}", False)]


def test_input_is_aligned(root):
    dataset = Dataset.open(root)
    for shard in range(3):
        uids = read_table(dataset.folder, f"pairs/0000{shard}.parquet", ["uid"])
        table = pa.table({"uid": uids["uid"][::-1] if shard == 1 else uids["uid"]})
        schema = table.schema.with_metadata({b"pairmill.schema": b"input", b"pairmill.version": b"1"})
        write_table(dataset.folder, f"input/0000{shard}.parquet", table.cast(schema), {})
    assert texts(root) == ["input/00001.parquet: its uids are not those of the pairs, row by row"]


def test_many_faults_are_told_shortly(root):
    dataset = Dataset.open(root)
    table = read_table(dataset.folder, "pairs/00001.parquet")
    rows = [row | {"format": "gif"} for row in table.to_pylist()]
    with write_pairs(dataset.folder, "pairs/00001.parquet", table.schema) as writer:
        for row in rows:
            writer.append(row)
    lines = [line for line in texts(root) if "`format`" in line]
    assert len(lines) == 4
    assert lines[-1] == "pairs/00001.parquet: 1 more rows: `format` is gif, the image is a jpeg"
    assert len(found(root, most=2)) == 2


def test_what_is_no_dataset_is_an_error(tmp_path):
    with pytest.raises(PairmillError, match="is not a dataset"):
        found(tmp_path)
