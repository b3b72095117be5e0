import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

import curation.rows
from curation.config import DownloadConfig
from curation.download import download, fetching, one_cause, run
from curation.download_shard import DownloadShard
from curation.probe import probe
from schemas.errors import PairmillError
from schemas.events import Notice, Progress, ShardDone, StageFinished, silent
from schemas.pairs import TIMING_COLUMNS, pair_uid, pairs_schema
from shards.dataset import Dataset
from shards.reader import open_parquet, read_table
from shards.writer import write_table
from tests.curation.loopback import loopback, picture

LOCAL = {"allow_private": ("127.0.0.1",), "workers": 0, "retries": 0, "shard_rows": 5, "size": 16}


def config(**options):
    return DownloadConfig(**{**LOCAL, **options})


@pytest.fixture
def web():
    with loopback() as state:
        yield state


def list_of(folder, rows, name="l.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return [str(path)]


def rows_of(dataset):
    dataset = Dataset.open(dataset)
    pairs = dataset.stage("pairs")
    return [r for s in sorted(pairs.standing()) for r in read_table(dataset.folder, pairs.file(s)).to_pylist()]


def timeless(rows):
    return [{k: v for k, v in row.items() if k not in TIMING_COLUMNS} for row in rows]


def told(events):
    return " ".join(e.text for e in events if isinstance(e, Notice))


def mixed(web, count, bad="gone"):
    return [{"url": f"{web.base}/{bad if i % 4 == 3 else 'img'}/{i}", "caption": f"c{i}", "n": i} for i in range(count)]


def test_rows_come_out_in_their_order_with_every_column(tmp_path, web):
    rows = [
        *mixed(web, 11),
        {"url": None, "caption": "no url", "n": 11},
        {"url": "ftp://h/x", "caption": None, "n": 12},
    ]
    done = download(list_of(tmp_path, rows), tmp_path / "ds", config())
    assert (done.rows, done.counts) == (13, {"success": 9, "http_error": 2, "bad_url": 2})
    assert (done.finished.done, done.finished.left) == (3, ())
    found = rows_of(done.dataset)
    assert [(r["url"], r["caption"], r["n"]) for r in found] == [(r["url"], r["caption"], r["n"]) for r in rows]
    for i, row in enumerate(found[:11]):
        assert row["uid"] == pair_uid(rows[i]["url"], rows[i]["caption"])
        if i % 4 == 3:
            assert (row["status"], row["http_status"], row["image"], row["width"]) == ("http_error", 404, None, None)
            continue
        sent = picture(i)
        assert (row["status"], row["http_status"], row["attempts"], row["error"]) == ("success", 200, 1, None)
        assert row["sha256"] == hashlib.sha256(sent).digest()
        assert row["stored_sha256"] == hashlib.sha256(row["image"]).digest()
        assert (row["width"], row["height"], row["original_width"], row["original_height"]) == (21, 16, 40, 30)
        assert row["format"] == "jpeg"
    assert found[11]["error"].startswith("bad_url: ")
    with open_parquet(Dataset.open(done.dataset).folder, "pairs/00000.parquet") as file:
        found, expected = file.schema_arrow, pairs_schema([pa.field("n", pa.int64())])
        assert found.names == expected.names
        assert {n: f.type for n, f in zip(found.names, found, strict=True) if n != "captions"} == {
            f.name: f.type for f in expected if f.name != "captions"
        }
        assert found.metadata.items() >= expected.metadata.items()


def test_bytes_as_received_are_kept_and_verified(tmp_path, web):
    good, bad = hashlib.sha256(picture(1)).hexdigest(), "0" * 64
    rows = [{"url": f"{web.base}/img/1", "sha256": s} for s in (good, bad, None)]
    found = rows_of(download(list_of(tmp_path, rows), tmp_path / "ds", config(resize="none")).dataset)
    assert [r["status"] for r in found] == ["success", "hash_mismatch", "success"]
    assert found[0]["image"] == picture(1)
    assert found[0]["sha256"] == found[0]["stored_sha256"]


def test_a_finished_download_does_nothing_and_says_so(tmp_path, web):
    lists = list_of(tmp_path, [{"url": f"{web.base}/{kind}"} for kind in ("img/1", "busy/2")])
    download(lists, tmp_path / "ds", config())
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "ds").rglob("*.parquet")}
    asked, said = sum(web.asked.values()), []
    for given in (lists, []):
        done = download(given, tmp_path / "ds", config(), said.append)
        assert (done.finished.done, done.counts) == (0, {"success": 1, "http_error": 1})
    assert "Nothing to do" in told(said)
    assert sum(web.asked.values()) == asked
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "ds").rglob("*.parquet")} == before


def test_other_settings_are_refused_with_the_difference(tmp_path, web):
    lists = list_of(tmp_path, mixed(web, 2))
    download(lists, tmp_path / "ds", config())
    with pytest.raises(PairmillError, match=r"`size` was 16, now 32"):
        download(lists, tmp_path / "ds", config(size=32))
    download(lists, tmp_path / "ds", config(timeout=3, connections=2, per_host=1))


def test_extend_downloads_what_is_new_only(tmp_path, web):
    one, two = list_of(tmp_path, mixed(web, 7), "1.jsonl"), list_of(tmp_path, mixed(web, 3), "2.jsonl")
    download(one, tmp_path / "ds", config())
    before = (tmp_path / "ds/pairs/00001.parquet").read_bytes()
    with pytest.raises(PairmillError, match="--extend"):
        download(two, tmp_path / "ds", config())
    done = download(two, tmp_path / "ds", config(extend=True))
    assert (done.rows, done.finished.done) == (10, 1)
    assert (tmp_path / "ds/pairs/00001.parquet").read_bytes() == before
    assert [r["n"] for r in rows_of(done.dataset)] == [*range(7), *range(3)]


def test_removed_rows_are_not_fetched(tmp_path, web):
    rows = mixed(web, 6)
    (tmp_path / "ds").mkdir()
    folder = Dataset.open(download(list_of(tmp_path, rows[:1]), tmp_path / "other", config()).dataset).folder
    web.asked.clear()
    removed = pa.table(
        {"uid": pa.array([pair_uid(rows[1]["url"], "c1"), None], pa.binary(16)), "url": [None, rows[4]["url"]]}
    )
    write_table(type(folder)(tmp_path / "ds"), "removed.parquet", removed, {"rows": 2})
    found = rows_of(download(list_of(tmp_path, rows), tmp_path / "ds", config()).dataset)
    assert [r["status"] for r in found] == ["success", "removed", "success", "http_error", "removed", "success"]
    assert (found[1]["image"], found[1]["attempts"], found[1]["error"]) == (None, 0, "removed: on request")
    assert not web.asked.keys() & {"/img/1", "/img/4"}


def test_retry_tries_what_may_pass_and_touches_nothing_else(tmp_path, web):
    lists = list_of(tmp_path, [*mixed(web, 8, "flaky"), *({"url": f"{web.base}/gone/{i}"} for i in (8, 9))])
    download(lists, tmp_path / "ds", config(retries=1))
    first = rows_of(tmp_path / "ds")
    assert [r["status"] for r in first].count("http_error") == 4
    said = []
    asked = web.asked.copy()
    download([], tmp_path / "ds", config(retry_failed=True))
    assert [r["attempts"] for r in rows_of(tmp_path / "ds")] == [3 if i in (3, 7) else 1 for i in range(10)]
    web.heal.set()
    done = download([], tmp_path / "ds", config(retry_failed=True), said.append)
    again = rows_of(tmp_path / "ds")
    assert done.counts == {"success": 8, "http_error": 2}
    for i, (old, new) in enumerate(zip(first, again, strict=True)):
        if i in (3, 7):
            assert (new["status"], new["attempts"], new["error"], new["http_status"]) == ("success", 4, None, 200)
            assert new["sha256"] == hashlib.sha256(picture(i)).digest()
        else:
            assert new == old
    assert {p for p in web.asked if web.asked[p] != asked[p]} == {"/flaky/3", "/flaky/7"}
    download([], tmp_path / "ds", config(retry_failed=True), said.append)
    assert "no row whose failure may pass" in told(said)


def test_retry_of_a_removed_row_takes_it_out(tmp_path, web):
    lists = list_of(tmp_path, [{"url": f"{web.base}/busy/1"}])
    folder = Dataset.open(download(lists, tmp_path / "ds", config()).dataset).folder
    write_table(folder, "removed.parquet", pa.table({"url": [f"{web.base}/busy/1"]}), {"rows": 1})
    assert download([], tmp_path / "ds", config(retry_failed=True)).counts == {"removed": 1}


def test_retry_leaves_undone_shards_to_the_download(tmp_path, web):
    lists = list_of(tmp_path, mixed(web, 12, "flaky"))
    download(lists, tmp_path / "ds", config())
    (tmp_path / "ds/pairs/00001.parquet").unlink()
    said = []
    done = download([], tmp_path / "ds", config(retry_failed=True), said.append)
    assert "1 shards are still to download" in told(said)
    assert done.finished.done == 2


@pytest.mark.parametrize("shard_rows", [100, 600])
def test_a_hopeless_run_stops_and_says_the_cause(tmp_path, web, shard_rows):
    rows = [{"url": f"{web.base}/gone/{i}"} for i in range(1200)]
    lists = list_of(tmp_path, rows)
    with pytest.raises(PairmillError, match=r"Over 95 % of .* one cause: http_error: 404.*--keep-going"):
        download(lists, tmp_path / "ds", config(shard_rows=shard_rows))
    assert len(web.asked) < 700
    standing = Dataset.open(tmp_path / "ds").stage("pairs").standing()
    assert len(standing) == (5 if shard_rows == 100 else 0)
    done = download(lists, tmp_path / "ds", config(keep_going=True, shard_rows=shard_rows))
    assert (done.counts, done.finished.left) == ({"http_error": 1200}, ())


def test_hope_is_not_given_up_for_mixed_causes_or_after_the_first_rows(tmp_path, web):
    rows = [{"url": f"{web.base}/{('gone', 'busy')[i % 2]}/{i}"} for i in range(520)]
    assert download(list_of(tmp_path, rows), tmp_path / "a", config(shard_rows=520)).rows == 520
    late = [
        *({"url": f"{web.base}/img/{i}"} for i in range(30)),
        *({"url": f"{web.base}/gone/{i}"} for i in range(600)),
    ]
    assert download(list_of(tmp_path, late), tmp_path / "b", config(shard_rows=90)).rows == 630


def test_one_cause():
    failed, good = ("dns_error", None, "dns_error: no such name"), ("success", 200, None)
    assert one_cause([failed] * 96 + [good] * 4) == "dns_error: no such name"
    assert one_cause([failed] * 95 + [good] * 5) is None
    assert one_cause([]) is None


def test_a_small_run_that_fails_whole_is_told(tmp_path, web):
    said = []
    download(
        list_of(tmp_path, [{"url": f"{web.base}/gone/{i}"} for i in range(9)]), tmp_path / "ds", config(), said.append
    )
    assert "Nearly all rows failed for one cause: http_error" in told(said)


def test_a_host_that_alone_limits_the_run_is_told(tmp_path, web):
    web.delay_s = 0.1
    said = []
    lists = list_of(tmp_path, [{"url": f"{web.base}/img/{i}"} for i in range(20)])
    download(lists, tmp_path / "ds", config(per_host=2, shard_rows=20), said.append)
    notes = {e.note for e in said if isinstance(e, Progress)}
    assert any(n == "127.0.0.1 alone limits the run (--per-host)" for n in notes), notes


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["shards.files._write", "shards.files._fsync", "curation.download_shard.tempfile"])
def test_a_full_disk_stops_cleanly_and_the_rerun_goes_on(tmp_path, web, monkeypatch, where):
    lists = list_of(tmp_path, mixed(web, 12))
    download(lists, tmp_path / "whole", config())
    download(lists, tmp_path / "ds", config())
    (tmp_path / "ds/pairs/00001.parquet").unlink()
    with monkeypatch.context() as patch:
        if where.endswith("tempfile"):
            file = type("Full", (), {"seek": lambda *a: None, "write": full_disk, "close": lambda *a: None})
            patch.setattr("curation.download_shard.tempfile.TemporaryFile", lambda **options: file())
        else:
            patch.setattr(where, full_disk)
        with pytest.raises(PairmillError, match="No space left"):
            download(lists, tmp_path / "ds", config())
    assert [p.name for p in (tmp_path / "ds/pairs").iterdir() if p.name.startswith(".tmp")] == []
    download(lists, tmp_path / "ds", config())
    assert timeless(rows_of(tmp_path / "ds")) == timeless(rows_of(tmp_path / "whole"))


def test_a_disk_that_cannot_take_the_list_is_refused_before_a_row_is_fetched(tmp_path, web, monkeypatch):
    monkeypatch.setattr("shards.files.LocalFolder.free_bytes", lambda self: 10_000)
    with pytest.raises(PairmillError, match="GiB free"):
        download(list_of(tmp_path, mixed(web, 12)), tmp_path / "ds", config(size=384))
    assert not web.asked


@dataclass(frozen=True)
class CrashingShard(DownloadShard):
    """Takes its worker down while it decodes picture 6."""

    def __call__(self, shard, hand):
        def process(data, config, expected_hash):
            if data == picture(6):
                os.kill(os.getpid(), signal.SIGKILL)
            return decode(data, config, expected_hash)

        decode, curation.rows.process = curation.rows.process, process
        return super().__call__(shard, hand)


def test_a_decoder_that_crashes_loses_one_row(tmp_path, web):
    lists = list_of(tmp_path, [{"url": f"{web.base}/img/{i}"} for i in range(10)])
    settings = config(workers=1)
    dataset = Dataset.open(download(lists, tmp_path / "ds", config()).dataset)
    for path in (tmp_path / "ds/pairs").glob("*.parquet"):
        path.unlink()
    done = run(dataset.stage("pairs"), CrashingShard(dataset, fetching(settings, 1)), [0, 1], settings, silent)
    assert done.counts == {"success": 9, "decoder_crash": 1}
    row = rows_of(dataset.url)[6]
    assert (row["status"], row["error"]) == ("decoder_crash", "decoder_crash: the decoder took its worker down")


def test_on_worker_processes_the_rows_are_the_same(tmp_path, web):
    lists = list_of(tmp_path, mixed(web, 12))
    download(lists, tmp_path / "one", config())
    said = []
    web.delay_s, web.open_most = 0.03, 0
    download(lists, tmp_path / "two", config(workers=2, per_host=3), said.append)
    assert web.open_most <= 2, "each of two workers has its share of three connections, one"
    assert timeless(rows_of(tmp_path / "one")) == timeless(rows_of(tmp_path / "two"))
    assert sum(isinstance(e, ShardDone) for e in said) == 3


def test_probe_estimates_the_whole_list(tmp_path, web):
    lists = list_of(tmp_path, mixed(web, 400))
    found = probe(lists, config(probe=40, resize="none"))
    assert (found.rows, found.list_rows, sum(found.counts.values())) == (40, 400, 40)
    assert found.success_share == found.counts["success"] / 40
    assert 0.5 < found.success_share < 0.95
    size = sum(len(picture(i)) for i in range(20)) / 20
    assert found.stored_bytes == pytest.approx(size, rel=0.05)
    assert found.received_bytes == pytest.approx(found.stored_bytes)
    assert found.disk_bytes == pytest.approx(400 * found.success_share * size, rel=0.05)
    assert found.hours == pytest.approx(400 / found.rows_per_s / 3600)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.jsonl"]


def test_a_list_behind_a_signed_url(tmp_path, web):
    """Its contents look like a page of links, and its signature must not be kept."""
    web.files["/lists/l.csv?sig=secret"] = f"url\n{web.base}/img/1\n".encode()
    for _ in range(2):
        done = download([f"{web.base}/lists/l.csv?sig=secret"], tmp_path / "ds", config())
    assert done.counts == {"success": 1}
    assert [s.name for s in Dataset.open(done.dataset).manifest.lists] == ["l.csv"]
    assert not [p for p in (tmp_path / "ds").rglob("*") if p.is_file() and b"secret" in p.read_bytes()]


def test_a_store_in_one_process(tmp_path, web):
    done = download(list_of(tmp_path, mixed(web, 6)), "memory://download-test", config())
    assert timeless(rows_of(done.dataset)) == timeless(
        rows_of(download(list_of(tmp_path, mixed(web, 6)), tmp_path / "ds", config()).dataset)
    )


COMMAND = """
import sys
from curation.config import DownloadConfig
from curation.download import download
print("ready", flush=True)
options = dict(allow_private=("127.0.0.1",), workers=int(sys.argv[3]), retries=0, shard_rows=25, size=16, per_host=16)
download([sys.argv[1]], sys.argv[2], DownloadConfig(**options))
"""


def start(lists, output, workers):
    command = [sys.executable, "-c", COMMAND, lists[0], str(output), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2])


def kill_often(web, lists, output, kills, most_requests, workers=(0,)):
    """SIGKILL after seeded numbers of requests, again and again; how many shards stood after each."""
    moments, stood = random.Random(0), []
    for number in range(kills):
        wanted = sum(web.asked.values()) + moments.randint(0, most_requests)
        child = start(lists, output, workers[number % len(workers)])
        child.stdout.readline()
        while sum(web.asked.values()) < wanted and child.poll() is None:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        stood.append(len(list((output / "pairs").glob("[0-9]*.parquet"))))
    return stood


def finish(lists, output, workers):
    child = start(lists, output, workers)
    assert child.wait(120) == 0
    child.stdout.close()


def test_killed_runs_end_in_the_same_rows(tmp_path, web):
    lists = list_of(tmp_path, mixed(web, 400))
    web.delay_s = 0.02
    stood = kill_often(web, lists, tmp_path / "ds", 3, 150)
    assert 0 < stood[-1] < 16, stood
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "ds", moved)
    shutil.rmtree(tmp_path / "ds")
    whole = download(lists, tmp_path / "whole", config(shard_rows=25, per_host=16))
    done = download(lists, moved, config(shard_rows=25, per_host=16))
    assert done.finished.left == ()
    assert timeless(rows_of(moved)) == timeless(rows_of(whole.dataset))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_end_in_the_same_rows(tmp_path, web):
    lists = list_of(tmp_path, mixed(web, 3000))
    web.delay_s = 0.02
    stood = kill_often(web, lists, tmp_path / "ds", 20, 300, workers=(0, 2))
    assert stood == sorted(stood)
    assert 0 < stood[-1] < 120, stood
    finish(lists, tmp_path / "ds", 2)
    download(lists, tmp_path / "whole", config(shard_rows=25, per_host=64, workers=2))
    assert timeless(rows_of(tmp_path / "ds")) == timeless(rows_of(tmp_path / "whole"))
    assert Dataset.open(tmp_path / "ds").manifest == Dataset.open(tmp_path / "whole").manifest


def test_a_folder_copied_in_mid_run_goes_on_elsewhere(tmp_path, web):
    """The copy is taken while the run writes: temporary files come along and are nobody's."""
    lists = list_of(tmp_path, mixed(web, 200))
    web.delay_s = 0.02
    copies = []

    def copy_once(event):
        if isinstance(event, ShardDone) and event.shard == 2:
            copies.append(shutil.copytree(tmp_path / "ds", tmp_path / "copy"))

    download(lists, tmp_path / "ds", config(shard_rows=25, per_host=32), copy_once)
    done = download(lists, tmp_path / "copy", config(shard_rows=25, per_host=32))
    assert isinstance(done.finished, StageFinished)
    assert (done.finished.done, len(copies)) == (5, 1)
    assert timeless(rows_of(tmp_path / "copy")) == timeless(rows_of(tmp_path / "ds"))
