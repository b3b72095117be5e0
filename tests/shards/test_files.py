"""A file is whole or absent: ended at every call, resumed, moved in mid-run, damaged, newer."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import shutil

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import PairmillError
from schemas.events import silent
from schemas.pairs import pairs_schema
from schemas.tables import VERSIONS
from shards import files
from shards.dataset import Dataset
from shards.files import LocalFolder, check_space, open_folder, temporary_name
from shards.reader import MappedShard, open_parquet, read_table, row_groups, stored_counts
from shards.writer import write_pairs
from tests.atomicity import assert_atomic, tree
from tests.make import make_dataset
from tests.shards.toy import ToyConfig, size_scores, vectors

HERE = ToyConfig(workers=0)


@pytest.mark.parametrize("stage", [size_scores, vectors])
def test_a_stage_ended_at_any_call_is_completed_by_a_rerun(tmp_path, stage):
    start = tmp_path / "start"
    make_dataset(start, shards=1, rows=4, fail={(0, 1): "timeout"})

    def run(root):
        stage(Dataset.open(root), HERE, silent)

    calls = assert_atomic(lambda: (start, run), tmp_path, check=Dataset.open)
    assert calls >= 10  # sidecar and one shard, each: open, write, fsync, rename, fsync of the folder


def test_making_pairs_ended_at_any_call_is_completed_by_a_rerun(tmp_path):
    calls = assert_atomic(lambda: (None, lambda root: make_dataset(root, shards=2, rows=3) and None), tmp_path)
    assert calls >= 20


def test_resume_and_a_move_in_mid_run_give_the_same_bytes(tmp_path):
    make_dataset(tmp_path / "a", shards=4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    whole = Dataset.open(tmp_path / "a")
    size_scores(whole, HERE, silent)
    vectors(whole, HERE, silent)

    class Stop(BaseException):
        pass

    def stop(event):
        if type(event).__name__ == "ShardDone" and event.shard == 1:
            raise Stop

    with pytest.raises(Stop):
        size_scores(Dataset.open(tmp_path / "b"), HERE, stop)
    shutil.move(tmp_path / "b", tmp_path / "elsewhere")
    moved = Dataset.open(tmp_path / "elsewhere")
    assert moved.stage("scores/size").pending() == [2, 3]
    size_scores(moved, HERE, silent)
    vectors(moved, HERE, silent)
    assert tree(tmp_path / "elsewhere") == tree(tmp_path / "a")
    assert "b" not in json.dumps(moved.stage("scores/size").sidecar().model_dump()).split("/")


def test_a_failed_write_leaves_nothing_and_touches_no_other_file(tmp_path):
    folder = LocalFolder(tmp_path)
    with contextlib.suppress(RuntimeError), write_pairs(folder, "a.parquet", pairs_schema()) as writer:
        writer.append({"uid": bytes(16), "status": "success", "image": b"x"})
        raise RuntimeError("stop")
    with folder.write("other") as stream:  # takes the descriptor that was given up
        stream.write(b"mine")
        del writer
        gc.collect()
    assert os.listdir(tmp_path) == ["other"]
    assert folder.read_bytes("other") == b"mine"


def test_left_over_files_are_seen_by_nobody_and_removed_by_the_stage(tmp_path):
    dataset = make_dataset(tmp_path / "d")
    size_scores(dataset, HERE, silent)
    place = tmp_path / "d/scores/size"
    dead = place / temporary_name("00000.parquet").replace(str(os.getpid()), str(2**22 + 1))
    alive = place / temporary_name("00001.parquet")
    dead.write_bytes(b"half")
    alive.write_bytes(b"half")
    stage = dataset.stage("scores/size")
    assert stage.standing() == {0, 1}
    assert dataset.folder.names("scores/size") == ["00000.parquet", "00001.parquet", "sidecar.json"]
    assert dataset.folder.left_over("scores/size") == [dead.name]
    size_scores(dataset, HERE, silent)
    assert (dead.exists(), alive.exists()) == (False, True)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_cut_files_name_themselves(tmp_path_factory, data):
    root = tmp_path_factory.getbasetemp() / "cut"
    if not root.exists():
        dataset = make_dataset(root)
        size_scores(dataset, HERE, silent)
        vectors(dataset, HERE, silent)
    folder = LocalFolder(root)
    name = data.draw(
        st.sampled_from(["pairs/00000.parquet", "scores/size/00000.parquet", "features/vector/00000.arrow"])
    )
    whole = folder.read_bytes(name)
    cut = name.replace("00000", "00009")
    folder.write_bytes(cut, whole[: data.draw(st.integers(0, len(whole) - 1))])
    read = (lambda: MappedShard(folder, cut)) if cut.endswith(".arrow") else (lambda: read_table(folder, cut))
    with pytest.raises(PairmillError, match=cut) as caught:
        read()
    assert "damaged" in str(caught.value)


def test_damaged_bytes_never_escape_as_another_error(tmp_path):
    dataset = make_dataset(tmp_path / "d", shards=1)
    vectors(dataset, HERE, silent)
    rng, refused = random.Random(0), 0
    for name in ("pairs/00000.parquet", "features/vector/00000.arrow"):
        whole = dataset.folder.read_bytes(name)
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(rng.choice([1, 3])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            dataset.folder.write_bytes(name, bytes(data))
            try:
                if name.endswith("parquet"):
                    list(row_groups(dataset.folder, name, verify=True))
                    stored_counts(dataset.folder, name)
                else:
                    shard = MappedShard(dataset.folder, name)
                    [shard.row(i) for i in range(len(shard))]
                    stored_counts(dataset.folder, name)
            except PairmillError:
                refused += 1
    assert refused > 50


def test_page_checksums_tell_damaged_pixels(tmp_path):
    dataset = make_dataset(tmp_path / "d", shards=1)
    name = "pairs/00000.parquet"
    image = read_table(dataset.folder, name, ["image"])["image"][3].as_py()
    data = bytearray(dataset.folder.read_bytes(name))
    data[data.index(image) + 100] ^= 1
    dataset.folder.write_bytes(name, bytes(data))
    read_table(dataset.folder, name)
    with pytest.raises(PairmillError, match=r"00000\.parquet is damaged"):
        list(row_groups(dataset.folder, name, verify=True))


def test_missing_file_says_so(tmp_path):
    dataset = make_dataset(tmp_path / "d", shards=1)
    for read in (open_parquet, MappedShard):
        with pytest.raises(PairmillError, match=r"x\.parquet is missing"):
            read(dataset.folder, "x.parquet")


@pytest.mark.parametrize("name", ["pairs/00000.parquet", "features/vector/00000.arrow"])
def test_newer_table_is_a_clear_error(tmp_path, monkeypatch, name):
    dataset = make_dataset(tmp_path / "d", shards=1)
    vectors(dataset, HERE, silent)
    monkeypatch.setitem(VERSIONS, name.split("/")[0], 0)
    read = MappedShard if name.endswith("arrow") else read_table
    with pytest.raises(PairmillError, match=rf"{name} was written as \w+ version 1.*Install a newer pairmill"):
        read(dataset.folder, name)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m | {"version": 2}, "has format version 2.*newer pairmill"),
        (lambda m: m | {"format": "x"}, "not a pairmill dataset"),
        (lambda m: m | {"shards": "x"}, "is damaged"),
        (lambda m: m | {"more": 1}, "is damaged"),
        (lambda m: [m], "not a pairmill dataset"),
    ],
)
def test_manifests_that_are_none(tmp_path, change, text):
    make_dataset(tmp_path / "d")
    path = tmp_path / "d/dataset.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(PairmillError, match=text):
        Dataset.open(tmp_path / "d")


def test_damaged_json_and_no_dataset(tmp_path):
    make_dataset(tmp_path / "d")
    (tmp_path / "d/pairs/sidecar.json").write_text("{")
    with pytest.raises(PairmillError, match=r"sidecar\.json is damaged"):
        Dataset.open(tmp_path / "d").stage("pairs").sidecar()
    (tmp_path / "d/dataset.json").unlink()
    with pytest.raises(PairmillError, match="unfinished"):
        Dataset.open(tmp_path / "d")
    with pytest.raises(PairmillError, match="is not a dataset"):
        Dataset.open(tmp_path / "nothing")


def test_rows_are_located(tmp_path):
    dataset = make_dataset(tmp_path / "d", shards=3, rows=4)
    assert dataset.locate("5") == (1, 1) == dataset.locate("1:1")
    for text in ("12", "-1", "3:0", "0:4", "1:1:1", "x"):
        with pytest.raises(PairmillError):
            dataset.locate(text)


def test_other_settings_are_refused_and_named(tmp_path):
    dataset = make_dataset(tmp_path / "d")
    size_scores(dataset, HERE, silent)
    with pytest.raises(PairmillError, match=r"`factor` was 1.0, now 2.0. Nothing written. Pass --name."):
        size_scores(dataset, ToyConfig(workers=0, factor=2.0), silent)
    size_scores(dataset, ToyConfig(workers=0, scheduler=None), silent)


def test_stale_shards_are_pending(tmp_path):
    dataset = make_dataset(tmp_path / "d", fail={(1, 0): "timeout"})
    size_scores(dataset, HERE, silent)
    make_dataset(tmp_path / "d2")
    shutil.copy(tmp_path / "d2/pairs/00001.parquet", tmp_path / "d/pairs/00001.parquet")
    stage = dataset.stage("scores/size")
    assert (stage.standing(), stage.done(), stage.pending()) == ({0, 1}, {0}, [1])


def test_space_is_refused_before_writing(tmp_path):
    folder = open_folder(tmp_path / "not" / "there")
    check_space(folder, 1000, "x")
    with pytest.raises(PairmillError, match=r"scores/x needs about 1048576\.0 GiB"):
        check_space(folder, 2**50, "scores/x")


def test_writes_go_through_the_counted_calls(tmp_path, monkeypatch):
    seen = []
    for name in ("_open", "_write", "_fsync", "_rename"):
        call = getattr(files, name)
        monkeypatch.setattr(files, name, lambda *a, n=name, c=call: (seen.append(n), c(*a))[1])
    LocalFolder(tmp_path).write_bytes("x", bytes(3 << 20))
    assert (seen[0], seen[-4:]) == ("_open", ["_write", "_fsync", "_rename", "_fsync"])


def test_arrow_with_offsets_outside_the_file_is_damaged(tmp_path):
    batch = pa.table({"x": pa.array([b"abc" * 1234567], pa.large_binary())}).to_batches()[0]
    folder = LocalFolder(tmp_path)
    with folder.write("x.arrow") as stream, pa.ipc.new_file(stream, batch.schema) as writer:
        writer.write_batch(batch)
    length = (3 * 1234567).to_bytes(8, "little")
    data = folder.read_bytes("x.arrow")
    at = data.rindex(length, 0, data.index(b"abc"))  # the offset, just before the values
    folder.write_bytes("x.arrow", data[:at] + (10**9).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(PairmillError, match=r"x\.arrow is damaged"):
        MappedShard(folder, "x.arrow")
