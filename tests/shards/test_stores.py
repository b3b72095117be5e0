"""The same dataset on a store: a real S3 protocol server on loopback, and memory:// in one process."""

from __future__ import annotations

import contextlib
import uuid

import numpy as np
import pyarrow as pa
import pytest

from schemas.errors import PairmillError
from schemas.events import silent
from shards.dataset import Dataset
from shards.files import StoreFolder, open_folder
from shards.locks import lock
from shards.parallel import run_stage
from shards.reader import MappedShard, read_table, row_groups
from shards.select import made_from, read_selection, write_selection
from tests.make import make_dataset
from tests.shards.toy import SizeWork, ToyConfig, size_scores, vectors

HERE = ToyConfig(workers=0)


@pytest.fixture
def memory_url(monkeypatch, tmp_path) -> str:
    monkeypatch.setenv("PAIRMILL_CACHE", str(tmp_path / "cache"))
    return f"memory://{uuid.uuid4().hex}"


@pytest.mark.parametrize("kind", ["s3_url", "memory_url"])
def test_a_dataset_lives_on_a_store(kind, request, tmp_path):
    url = request.getfixturevalue(kind)
    with pytest.raises(PairmillError, match="is not a dataset"):
        Dataset.open(url)
    dataset = make_dataset(url, shards=2, fail={(0, 1): "timeout"})
    local = make_dataset(tmp_path / "local", shards=2, fail={(0, 1): "timeout"})
    for one in (dataset, local):
        size_scores(one, HERE, silent)
        vectors(one, HERE, silent)
    for name in ("pairs/00000.parquet", "scores/size/00001.parquet", "features/vector/00000.arrow", "dataset.json"):
        assert dataset.folder.read_bytes(name) == local.folder.read_bytes(name), name
    assert [s.path for s in dataset.stages()] == ["pairs", "scores/size", "features/vector"]
    assert dataset.stage("features/vector").pending() == []
    far, near = (MappedShard(d.folder, "features/vector/00000.arrow") for d in (dataset, local))
    for row in range(8):
        np.testing.assert_equal(far.row(row), near.row(row))
    keep = np.arange(16) % 2 == 0
    write_selection(dataset, "even", keep, pa.nulls(16, pa.string()), {}, made_from(dataset, ["size"]))
    assert (read_selection(dataset, "even").keep == keep).all()
    pieces = [t for _, t in row_groups(dataset.folder, "pairs/00001.parquet", ["uid"])]
    assert pa.concat_tables(pieces).equals(read_table(local.folder, "pairs/00001.parquet", ["uid"]))
    with lock(dataset.folder, "pairs"):
        with pytest.raises(PairmillError, match="pairs is being written by process"), lock(dataset.folder, "pairs"):
            raise AssertionError("two writers")
    assert dataset.folder.names("logs/locks") == []


def test_workers_write_to_s3(s3_url):
    dataset = make_dataset(s3_url, shards=2)
    assert size_scores(dataset, ToyConfig(workers=2), silent).done == 2
    assert dataset.stage("scores/size").done() == {0, 1}
    assert any(name.startswith("scores.size") for name in dataset.folder.names("logs"))


def test_a_rewritten_file_is_fetched_again(s3_url):
    folder = open_folder(s3_url)
    folder.write_bytes("a/x", b"one")
    assert folder.map_path("a/x").read_bytes() == b"one"
    open_folder(s3_url).write_bytes("a/x", b"two")
    assert folder.map_path("a/x").read_bytes() == b"two"
    folder.remove("a/x")
    assert not folder.exists("a/x")
    with pytest.raises(FileNotFoundError):
        folder.map_path("a/x")


def test_the_cache_stays_under_its_cap(memory_url, monkeypatch, tmp_path):
    monkeypatch.setenv("PAIRMILL_CACHE_GB", str(3500 / 2**30))
    folder = open_folder(memory_url)
    for i in range(6):
        folder.write_bytes(f"f{i}", bytes([i]) * 1000)
    first = folder.map_path("f0")
    kept_open = first.open("rb")
    for i in range(1, 6):
        assert folder.map_path(f"f{i}").read_bytes() == bytes([i]) * 1000
    assert sum(f.stat().st_size for f in (tmp_path / "cache").iterdir()) <= 3500
    assert not first.exists()
    assert kept_open.read() == bytes(1000), "whoever has a file open keeps it"
    kept_open.close()
    assert folder.map_path("f0").read_bytes() == bytes(1000)


def test_a_failed_upload_leaves_nothing(memory_url, tmp_path):
    folder = open_folder(memory_url)
    with contextlib.suppress(ZeroDivisionError), folder.write("x") as stream:
        stream.write(b"half")
        raise ZeroDivisionError
    assert (folder.exists("x"), folder.names(""), list((tmp_path / "cache").iterdir())) == (False, [], [])


def test_memory_is_refused_for_worker_processes(memory_url):
    dataset = make_dataset(memory_url, shards=1)
    with pytest.raises(PairmillError, match=r"memory:// .* in one process only.*--workers 0"):
        run_stage(dataset.stage("scores/size"), SizeWork(dataset, 1.0), pending=[0], workers=2, emit=silent)


def test_unknown_store_says_what_to_install():
    with pytest.raises(PairmillError, match="no way to reach a `nowhere://` store"):
        StoreFolder("nowhere://bucket/x")


def test_file_urls_are_local(tmp_path):
    make_dataset(tmp_path / "d")
    assert Dataset.open(f"file://{tmp_path}/d").folder.local == tmp_path / "d"
