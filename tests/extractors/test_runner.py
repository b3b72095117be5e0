from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import shards.files
from extractors.device import Device, fitting_batch, resolve_device, resolve_precision
from extractors.flow import WINDOW, group_items
from extractors.resume import MARKS, Outputs, row_marks
from schemas.errors import PairmillError
from schemas.events import Event, ShardDone, ShardFailed
from schemas.pairs import pairs_schema
from shards.dataset import PAIRS, Dataset
from shards.reader import MappedShard, read_table
from shards.select import made_from, write_selection
from shards.writer import write_pairs
from tests.extractors.conftest import CORRUPT, FAIL
from tests.extractors.toy import LOADED, ToyLoader, run_toy
from tests.make import SIZES, make_dataset, picture

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def shard(dataset: Dataset, number: int, path: str = "features/toy") -> MappedShard:
    return MappedShard(dataset.folder, dataset.stage(path).file(number))


def hashes(dataset: Dataset) -> dict[str, str]:
    """sha256 of every file of the toy's outputs, nothing temporary among them."""
    root = Path(dataset.url)
    files = [f for kind in ("features", "scores") for f in (root / kind).rglob("*") if f.is_file()]
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def select(dataset: Dataset, name: str, rows: set[int]) -> None:
    keep = np.array([i in rows for i in range(len(dataset))])
    reasons = pa.array([None if k else "not_wanted" for k in keep], pa.string())
    write_selection(dataset, name, keep, reasons, {}, made_from(dataset, []))


def test_every_row_has_its_own_answer_in_its_place(dataset: Dataset):
    finished = run_toy(dataset)
    assert finished.counts == {"ok": 32, "timeout": 1, "too_small": 1, "decode_error": 2}
    images = {
        (s, r): np.asarray(row)
        for s in range(3)
        for r, row in enumerate(read_table(dataset.folder, dataset.stage(PAIRS).file(s))["image"].to_pylist())
    }
    from shards.images import decode_rgb

    for s in range(3):
        mapped = shard(dataset, s)
        assert len(mapped) == 12
        for r in range(12):
            row = mapped.row(r)
            if (s, r) in FAIL or (s, r) in CORRUPT:
                assert row["state"] == FAIL.get((s, r), "decode_error")
                assert row["mean"] is None
                assert row["bytes"] is None
            else:
                mean = decode_rgb(images[s, r].item()).reshape(-1, 3).mean(0)
                np.testing.assert_allclose(row["mean"], mean, atol=0.1)
                assert row["bytes"].shape == (1, 3)


def test_results_do_not_depend_on_batch_size_or_workers(dataset: Dataset, tmp_path: Path):
    run_toy(dataset, batch_size=1)
    other = make_dataset(tmp_path / "other", 3, 12, FAIL, CORRUPT)
    run_toy(other, batch_size=7)
    for s in range(3):
        np.testing.assert_allclose(shard(dataset, s).column("mean"), shard(other, s).column("mean"), atol=1e-2)
        assert shard(dataset, s).states() == shard(other, s).states()


@pytest.mark.slow
def test_on_dask_workers_the_bytes_are_the_same(dataset: Dataset, tmp_path: Path):
    run_toy(dataset)
    other = make_dataset(tmp_path / "other", 3, 12, FAIL, CORRUPT)
    run_toy(other, workers=2)
    assert hashes(dataset) == hashes(other)


@pytest.mark.slow
def test_a_decoder_that_takes_its_worker_down_loses_one_row(dataset: Dataset):
    loader = ToyLoader(kill="number 15")  # dies in `prepare`, beside the decoder
    finished = run_toy(dataset, workers=1, loader=loader)
    assert finished.counts["decoder_crash"] == 1
    assert shard(dataset, 1).row(3)["state"] == "decoder_crash"
    assert finished.counts["ok"] == 31


def test_batches_share_a_shape_and_never_cross_a_window():
    size = 2
    shapes = "aab" + "a" * (WINDOW * size) + "b"
    items = ((i, {"state": "ok", "shape": s}) for i, s in enumerate(shapes))
    groups = [rows for rows, _ in group_items(items, size, lambda item: item["shape"], [])]
    assert sorted(i for rows in groups for i in rows) == list(range(len(shapes)))
    assert all(len({shapes[i] for i in rows}) == 1 and len(rows) <= size for rows in groups)
    assert [2] in groups  # the first b does not wait for the last one


def test_failed_rows_after_the_last_batch_are_let_through():
    failed: list[Any] = []
    items = iter([(0, {"state": "ok"}), (1, {"state": "decode_error"})])
    groups = list(group_items(items, 4, lambda item: 0, failed))
    assert [rows for rows, _ in groups] == [[0], []]
    assert failed == [(1, {"state": "decode_error"})]


def test_auto_batch_size_is_recorded_and_kept(dataset: Dataset):
    run_toy(dataset)
    assert dataset.stage("features/toy").sidecar().recorded == {"batch_size": 4}
    dataset.folder.remove("features/toy/00001.arrow")
    before = hashes(dataset)
    run_toy(dataset, loader=ToyLoader(cpu_batch=9))
    assert max(LOADED[-1].seen) <= 4
    assert set(hashes(dataset)) - set(before) == {"features/toy/00001.arrow"}


def test_out_of_memory_halves_the_batch(tmp_path: Path):
    dataset = make_dataset(tmp_path / "ds", 1, 16, image=lambda s, r: picture(32, 32, r))
    run_toy(dataset, batch_size=16, loader=ToyLoader(most=5))
    assert LOADED[-1].seen == [16, 8, 4, 4, 4, 4]
    other = make_dataset(tmp_path / "other", 1, 16, image=lambda s, r: picture(32, 32, r))
    run_toy(other, batch_size=16)
    np.testing.assert_array_equal(shard(dataset, 0).column("mean"), shard(other, 0).column("mean"))


def test_a_single_image_that_does_not_fit_is_an_error(dataset: Dataset):
    with pytest.raises(PairmillError, match=r"row 0:0: a single image does not fit"):
        run_toy(dataset, loader=ToyLoader(most=0))
    assert not dataset.stage("features/toy").standing()


def test_an_error_of_the_extractor_stops_that_shard_only(dataset: Dataset, monkeypatch: pytest.MonkeyPatch):
    from tests.extractors.toy import ToyExtractor

    rows = ToyExtractor.rows
    calls: list[int] = []

    def break_once(self: ToyExtractor, items: Any, outputs: Any) -> Any:
        calls.append(len(items))
        if len(calls) == 1:
            raise ArithmeticError("in the writer's thread")
        return rows(self, items, outputs)

    monkeypatch.setattr(ToyExtractor, "rows", break_once)
    events: list[Event] = []
    finished = run_toy(dataset, events.append)
    assert finished.left == (0,)
    assert "in the writer's thread" in next(e for e in events if isinstance(e, ShardFailed)).error
    assert run_toy(dataset).done == 1


def test_other_settings_are_refused_and_named(dataset: Dataset):
    run_toy(dataset)
    with pytest.raises(PairmillError, match=r"`scale` was 1.0, now 2.0.*--name"):
        run_toy(dataset, scale=2.0)
    with pytest.raises(PairmillError, match=r"`precision` was 'fp32', now 'bf16'"):
        run_toy(dataset, precision="bf16")
    assert run_toy(dataset).done == 0


def test_precision_auto_keeps_what_was_begun(dataset: Dataset):
    run_toy(dataset, precision="bf16")
    dataset.folder.remove("features/toy/00001.arrow")
    assert run_toy(dataset).done == 1


def test_selection_then_another_computes_only_what_is_new(dataset: Dataset):
    select(dataset, "first", set(range(6)))
    select(dataset, "second", {2, 7, 20})
    first = run_toy(dataset, selection="first")
    assert first.counts == {"ok": 4, "skipped": 29, "timeout": 1, "too_small": 1, "decode_error": 1}
    states = shard(dataset, 0).states()
    assert states[:7] == ["ok", "timeout", "ok", "ok", "ok", "decode_error", "skipped"]
    before = shard(dataset, 0).column("mean")
    LOADED.clear()
    finished = run_toy(dataset, selection="second")
    assert finished.done == 2  # the third shard holds no row of it
    assert sum(LOADED[-1].seen) == 2  # rows 7 and 20; row 2 is copied
    after = shard(dataset, 0)
    assert after.states()[7] == "ok"
    np.testing.assert_array_equal(after.column("mean")[:5], before[:5])
    assert run_toy(dataset, selection="second").done == 0
    assert "skipped" not in run_toy(dataset).counts
    assert run_toy(dataset).done == 0


def test_a_selection_remade_under_the_same_name_is_read_again(dataset: Dataset):
    select(dataset, "best", {0})
    run_toy(dataset, selection="best")
    select(dataset, "best", {0, 2})
    run_toy(dataset, selection="best")
    assert shard(dataset, 0).states()[:4] == ["ok", "timeout", "ok", "skipped"]


def rewrite_pairs(dataset: Dataset, number: int, change: dict[int, dict[str, Any]]) -> None:
    """What `--retry-failed` and `remove` do: the same rows with some of them changed."""
    name = dataset.stage(PAIRS).file(number)
    rows = read_table(dataset.folder, name).to_pylist()
    with write_pairs(dataset.folder, name, pairs_schema()) as writer:
        for r, row in enumerate(rows):
            writer.append(row | change.get(r, {}))


@pytest.mark.parametrize("scores", [False, True])
def test_changed_pairs_are_computed_and_the_rest_is_copied(dataset: Dataset, scores: bool):
    run_toy(dataset, scores=scores)
    old = shard(dataset, 0).column("mean")
    good = read_table(dataset.folder, dataset.stage(PAIRS).file(2)).to_pylist()[0]
    retried = {k: good[k] for k in ("image", "sha256", "status", "width", "height")}
    rewrite_pairs(dataset, 0, {1: retried, 3: {"image": None, "status": "removed"}})
    LOADED.clear()
    finished = run_toy(dataset, scores=scores)
    assert finished.done == 1
    assert sum(LOADED[-1].seen) == 1
    now = shard(dataset, 0)
    assert now.states()[:6] == ["ok", "ok", "ok", "removed", "ok", "decode_error"]
    np.testing.assert_array_equal(now.column("mean")[4:], old[4:])
    assert not np.isnan(now.row(1)["mean"]).any()
    assert now.row(3)["mean"] is None
    assert run_toy(dataset, scores=scores).done == 0


def test_row_marks_tell_status_and_image():
    marks = row_marks(["success", "success", "timeout"], [b"a", b"b", None])
    assert len(set(marks.tolist())) == 3
    assert marks[0] == row_marks(["success"], [b"a"])[0]


def test_a_shard_is_done_when_both_files_stand(dataset: Dataset):
    run_toy(dataset, scores=True)
    want = hashes(dataset)
    for name in ("features/toy/00001.arrow", "scores/toy/00001.parquet"):
        dataset.folder.remove(name)
        assert run_toy(dataset, scores=True).done == 1
        assert hashes(dataset) == want


def test_scores_older_than_features_are_made_again(dataset: Dataset):
    """A kill between the two renames of a second selection leaves new features beside old scores."""
    select(dataset, "few", {0, 2})
    run_toy(dataset, scores=True, selection="few")
    stale = Path(dataset.url, "scores/toy/00000.parquet").read_bytes()
    run_toy(dataset, scores=True)
    want = hashes(dataset)
    Path(dataset.url, "scores/toy/00000.parquet").write_bytes(stale)
    outputs = Outputs(dataset, "features/toy", "scores/toy", "toy_state")
    assert outputs.old(0) is None
    assert run_toy(dataset, scores=True).done == 1
    assert read_table(dataset.folder, "scores/toy/00000.parquet")["toy_state"].to_pylist().count("ok") == 10
    assert set(hashes(dataset)) == set(want)


def test_scores_alone(dataset: Dataset):
    run_toy(dataset, scores=True, features=False)
    table = read_table(dataset.folder, "scores/toy/00000.parquet")
    assert table["toy_state"].to_pylist()[:3] == ["ok", "timeout", "ok"]
    assert table["score"][1].as_py() is None
    assert table["words"].to_pylist()[0] == 5
    assert run_toy(dataset, scores=True, features=False).done == 0


class Stop(BaseException):
    """Ends the run like a signal: nothing catches it."""


@pytest.mark.parametrize("call", ["_open", "_write", "_fsync", "_rename"])
def test_stopped_at_any_call_a_rerun_gives_the_same_bytes(
    call: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = make_dataset(tmp_path / "whole", 3, 12, FAIL, CORRUPT)
    run_toy(whole, scores=True)
    real = getattr(shards.files, call)
    for stop_at in range(100):
        count = iter(range(1000))

        def stopping(*args: Any, count: Any = count, stop_at: int = stop_at) -> Any:
            if next(count) == stop_at:
                raise Stop
            return real(*args)

        monkeypatch.setattr(shards.files, call, stopping)
        try:
            run_toy(dataset, scores=True)
        except Stop:
            monkeypatch.setattr(shards.files, call, real)
            Dataset.open(dataset.url)
            if stop_at % 3 == 0:  # go on from here now and then; else start over at the next call
                run_toy(dataset, scores=True)
                assert hashes(dataset) == hashes(whole)
                for name in hashes(dataset):
                    Path(dataset.url, name).unlink()
        else:
            break
    assert stop_at >= 3
    assert hashes(dataset) == hashes(whole)


def test_threads_are_those_of_the_worker_and_given_back(dataset: Dataset, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("extractors.runner.threads_per_worker", lambda workers: 3)
    from tests.extractors.toy import ToyExtractor

    seen: list[int] = []
    collate = ToyExtractor.collate
    monkeypatch.setattr(
        ToyExtractor, "collate", lambda self, items: seen.append(torch.get_num_threads()) or collate(self, items)
    )
    before = torch.get_num_threads()
    run_toy(dataset)
    assert set(seen) == {3}
    assert torch.get_num_threads() == before


def test_progress_counts_rows_and_failures(dataset: Dataset):
    events: list[Event] = []
    run_toy(dataset, events.append)
    done = [e for e in events if isinstance(e, ShardDone)]
    assert [e.rows for e in done] == [12, 12, 12]
    assert done[0].counts == {"ok": 10, "timeout": 1, "decode_error": 1}


def test_marks_are_in_the_file_and_the_schema_is_named(dataset: Dataset):
    run_toy(dataset)
    meta = shard(dataset, 0).schema.metadata
    assert MARKS in meta
    assert b'"toy": true' in meta[b"pairmill.about"]


def test_no_dataset_no_pairs_no_selection(tmp_path: Path, dataset: Dataset):
    with pytest.raises(PairmillError, match="is not a dataset"):
        run_toy(str(tmp_path / "none"))
    with pytest.raises(PairmillError, match="has no selection `nope`"):
        run_toy(dataset, selection="nope")


def test_device_is_checked_before_anything_is_written(dataset: Dataset):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(PairmillError, match=r"shows 0 CUDA devices\. Pass --device cpu"):
        run_toy(dataset, device="cuda")
    assert dataset.stage("features/toy").sidecar() is None
    assert resolve_device("auto", remote=False) == "cpu"
    assert resolve_device("cuda", remote=True) == "cuda"


def test_num_gpus_without_a_gpu_is_an_error(dataset: Dataset):
    with pytest.raises(PairmillError, match="`--num-gpus` needs CUDA devices and worker processes"):
        run_toy(dataset, num_gpus=2)


def test_on_a_store_as_in_a_folder(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PAIRMILL_CACHE", str(tmp_path / "cache"))
    store = make_dataset(f"memory://{tmp_path.name}/ds", 3, 12, FAIL, CORRUPT)
    select(store, "few", {0, 14})
    assert run_toy(store, scores=True, selection="few").counts["ok"] == 2
    run_toy(store, scores=True)
    run_toy(dataset, scores=True)
    for s in range(3):
        np.testing.assert_allclose(shard(store, s).column("mean"), shard(dataset, s).column("mean"), atol=1e-2)
        assert shard(store, s).states() == shard(dataset, s).states()
    assert run_toy(store, scores=True).done == 0


def test_precision_auto_depends_on_the_device():
    assert resolve_precision("auto", "cpu") == "fp32"
    assert resolve_precision("auto", "cuda:1") == "fp16"
    assert resolve_precision("bf16", "cpu") == "bf16"


def test_bfloat16_comes_back_as_float32():
    out = Device("cpu", "bf16").download({"x": torch.ones(2, dtype=torch.bfloat16)})()
    assert out["x"].dtype == np.float32


def test_disk_need_is_checked_first(dataset: Dataset):
    with pytest.raises(PairmillError, match="needs about"):
        run_toy(dataset, loader=ToyLoader(bytes_per_row=1 << 50))
    assert not dataset.stage("features/toy").standing()


@pytest.mark.parametrize(
    ("free", "fixed", "per_row", "want"),
    [(1 << 34, 1 << 30, 1 << 24, 512), (1 << 40, 0, 1, 1024), (1000, 5000, 10, 1), (100, 0, 10, 4)],
)
def test_fitting_batch_is_a_power_of_two_that_fits(free: int, fixed: int, per_row: int, want: int):
    assert fitting_batch(free, fixed, per_row) == want


def test_autocast_on_cpu_lowers_precision_only_when_asked():
    a = torch.ones(2, 2)
    with Device("cpu", "bf16").autocast():
        assert (a @ a).dtype == torch.bfloat16
    with Device("cpu", "fp32").autocast():
        assert (a @ a).dtype == torch.float32


@pytest.mark.gpu
@gpu
def test_cuda_gives_the_same_rows(dataset: Dataset, tmp_path: Path):
    run_toy(dataset)
    other = make_dataset(tmp_path / "other", 3, 12, FAIL, CORRUPT)
    run_toy(other, device="cuda", precision="fp32")
    for s in range(3):
        np.testing.assert_allclose(shard(dataset, s).column("mean"), shard(other, s).column("mean"), atol=0.1)


@pytest.mark.gpu
@gpu
def test_cuda_copies_come_back_whole():
    device = Device("cuda:0", "fp32")
    for seed in range(50):
        host = {"x": torch.randn(64, 1024, generator=torch.Generator().manual_seed(seed))}
        there = device.upload(device.pin(host))
        wait = device.download({"y": there["x"] * 2})
        del there
        np.testing.assert_array_equal(wait()["y"], host["x"].numpy() * 2)


def test_the_pictures_differ_in_shape():
    assert len(set(SIZES)) == 5  # batches by shape are tested with them


def test_decoders_wait_while_a_batch_is_computed_on_the_cpu(dataset: Dataset, monkeypatch: pytest.MonkeyPatch):
    device = Device("cpu", "fp32")
    with device.computing():
        assert not device.cores_free.is_set()
    assert device.cores_free.is_set()
    with pytest.raises(ZeroDivisionError), device.computing():
        raise ZeroDivisionError
    assert device.cores_free.is_set()
    seen = []
    waits = Device.computing

    def watched(self: Device) -> Any:
        seen.append(self)
        return waits(self)

    monkeypatch.setattr(Device, "computing", watched)
    run_toy(dataset)
    assert seen
