"""The whole way over a store: a real S3 protocol server on loopback."""

import http.server
import threading
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cli.demo.scenes import encode, generate_scene
from cli.main import run
from shards.dataset import Dataset


@pytest.fixture
def web(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    names, captions = [], []
    for i in range(24):
        scene = generate_scene(i, 64)
        (folder / f"{i}.jpg").write_bytes(encode(scene.image))
        names.append(f"{i}.jpg")
        captions.append(scene.captions[0])
    names[5] = "missing.jpg"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}/"
    file = tmp_path / "list.parquet"
    pq.write_table(pa.table({"url": [base + n for n in names], "caption": captions}), file)
    yield file
    server.shutdown()


@pytest.mark.slow
def test_download_score_filter_extract_train_over_s3(tmp_path, web, s3_url, monkeypatch, capsys):
    monkeypatch.setenv("PAIRMILL_CACHE", str(tmp_path / "cache"))
    ds, clip = f"{s3_url}/DS", str(tmp_path / "clip")
    small = ["--steps", "2", "--batch-size", "4", "--device", "cpu"]
    lines = [
        ["download", str(web), "-o", ds, "--allow-private", "127.0.0.1", "--shard-rows", "10"],
        ["train", "clip-tiny", ds, "-o", clip, *small],
        ["score", "clip", ds, "--model", clip],
        ["filter", ds, "-o", "best", "--top", "0.5", "--by", "clip_score"],
        ["extract", "patches", ds, "--size", "64", "--patch", "16", "--selection", "best"],
        ["extract", "regions", ds, "--selection", "best"],
        ["train", "vilt-tiny", ds, "--selection", "best", "--input", "patches", "-o", str(tmp_path / "vilt"), *small],
        ["history", ds],
        ["check", ds],
    ]
    for words in lines:
        assert run(words) == 0, (words, capsys.readouterr().err)
    dataset = Dataset.open(ds)
    assert dataset.manifest.shards == (10, 10, 4)
    counts = [dataset.stage("pairs").counts(s) for s in range(3)]
    assert counts == [{"http_error": 1, "success": 9}, {"success": 10}, {"success": 4}]
    patches = [dataset.stage("features/patches").counts(s) for s in range(3)]
    assert sum(c.get("ok", 0) for c in patches) == 11  # half of 23 successes, rounded down
    assert any((tmp_path / "cache").iterdir())  # features were fetched whole, and mapped there
    for words in lines[:-3]:
        assert run(words) == 0  # again: nothing to do
    assert [dataset.stage("pairs").counts(s) for s in range(3)] == counts
