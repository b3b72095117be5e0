"""Imports of what img2dataset itself wrote, in its three layouts, from a server on loopback."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.exporting import export_pairs
from curation.importing import import_pairs
from curation.maintenance_config import ExportConfig, ImportConfig
from schemas.events import silent
from shards.dataset import Dataset
from shards.images import header
from shards.select import made_from, write_selection
from tests.atomicity import tree
from tests.curation.samples import all_rows
from tests.make import encode, picture

PICTURES = {f"/{i}.jpg": encode(picture(60 + i, 40, i)) for i in range(7)}
RUN = """
from img2dataset import download
if __name__ == "__main__":
    import sys
    list_, out, format_ = sys.argv[1:]
    download(
        url_list=list_, input_format="parquet", url_col="url", caption_col="text", save_additional_columns=["license"],
        output_folder=out, output_format=format_, number_sample_per_shard=4, image_size=32, resize_mode="keep_ratio",
        processes_count=1, thread_count=4, timeout=5, enable_wandb=False,
    )
"""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        data = PICTURES.get(self.path.partition("?")[0], b"not an image" if self.path == "/broken.jpg" else None)
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        thread = threading.Thread(target=one.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{one.server_port}"
        one.shutdown()


@pytest.mark.parametrize("layout", ["webdataset", "files", "parquet"])
def test_layouts_as_it_writes_them_are_joined_by_key(tmp_path, layout):
    """The same by hand, in the order in which transfers ended, with one image lost."""
    root = tmp_path / "out"
    root.mkdir()
    keys = ["000000002", "000000000", "000000003", "000000001"]
    images = {key: encode(picture(20 + i, 10, i)) for i, key in enumerate(sorted(keys)[:2])}
    status = ["failed_to_download" if k == "000000002" else "success" for k in keys]
    messages = ["<urlopen error timed out> at http://x.example/secret" if s != "success" else None for s in status]
    rows = {"key": keys, "status": status, "error_message": messages, "caption": [f"c{int(k)}" for k in keys]}
    if layout == "parquet":
        rows["jpg"] = [images.get(k) for k in keys]
    elif layout == "files":
        (root / "00000").mkdir()
        for key, data in images.items():
            (root / f"00000/{key}.jpg").write_bytes(data)
    else:
        with tarfile.open(root / "00000.tar", "w") as tar:
            for key in reversed(images):
                info = tarfile.TarInfo(f"{key}.jpg")
                info.size = len(images[key])
                tar.addfile(info, io.BytesIO(images[key]))
    pq.write_table(pa.table(rows), root / "00000.parquet", row_group_size=2)
    (root / "00000_stats.json").write_text("{}")
    import_pairs("img2dataset", [str(root)], tmp_path / "d", ImportConfig(), silent)
    back = all_rows(Dataset.open(tmp_path / "d"))
    assert [r["caption"] for r in back] == ["c0", "c1", "c2", "c3"]
    assert [r["status"] for r in back] == ["success", "success", "timeout", "missing_file"]
    assert [r["image"] for r in back] == [images["000000000"], images["000000001"], None, None]
    assert back[2]["error"] == "failed_to_download: <urlopen error timed out> at URL"


def run_img2dataset(folder, list_, output, layout):
    """Runs img2dataset itself, in a process of its own."""
    (folder / "run.py").write_text(RUN)
    place = {**os.environ, "WANDB_MODE": "disabled", "NO_ALBUMENTATIONS_UPDATE": "1"}
    command = [sys.executable, "run.py", list_, output, layout]
    done = subprocess.run(command, cwd=folder, env=place, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(1000)  # it imports much, in each of its processes
@pytest.mark.parametrize("layout", ["webdataset", "files", "parquet"])
def test_its_output_is_taken_row_by_row(server, tmp_path, layout):
    pytest.importorskip("img2dataset", reason="img2dataset needs Python < 3.13")
    paths = [*list(PICTURES)[:3], "/none.jpg", "/broken.jpg", *list(PICTURES)[3:]]
    urls = [server + p for p in paths]
    texts = [f"caption, {i}" if i != 1 else None for i in range(len(urls))]
    pq.write_table(pa.table({"url": urls, "text": texts, "license": ["CC0"] * len(urls)}), tmp_path / "list.parquet")
    run_img2dataset(tmp_path, "list.parquet", "out", layout)

    import_pairs("img2dataset", [str(tmp_path / "out")], tmp_path / "d", ImportConfig(shard_rows=5), silent)
    rows = all_rows(Dataset.open(tmp_path / "d"))
    assert [r["url"] for r in rows] == urls
    assert [r["caption"] for r in rows] == texts
    assert {r["license"] for r in rows} == {"CC0"}
    want = ["success"] * 3 + ["http_error", "decode_error"] + ["success"] * 4
    assert [r["status"] for r in rows] == want
    assert rows[3]["http_status"] == 404
    for path, row in zip(paths, rows, strict=True):
        if row["status"] == "success":
            assert row["sha256"] == hashlib.sha256(PICTURES[path]).digest()
            assert row["stored_sha256"] == hashlib.sha256(row["image"]).digest() != row["sha256"]
            assert (row["original_height"], row["height"]) == (40, 32)
            assert (row["width"], row["height"]) == header(row["image"]).upright


@pytest.mark.slow
@pytest.mark.timeout(1000)  # it imports much, in each of its processes
def test_it_goes_on_from_our_export(server, tmp_path):
    """Two shards of a list are ours; img2dataset takes them for done and makes the third."""
    pytest.importorskip("img2dataset", reason="img2dataset needs Python < 3.13")
    urls = [f"{server}/{i % 7}.jpg?{i}" for i in range(11)]
    texts = [f"caption {i}" for i in range(11)]
    pq.write_table(pa.table({"url": urls, "text": texts, "license": ["CC0"] * 11}), tmp_path / "list.parquet")
    run_img2dataset(tmp_path, "list.parquet", "whole", "webdataset")
    import_pairs("img2dataset", [str(tmp_path / "whole")], tmp_path / "d", ImportConfig(shard_rows=8), silent)
    dataset = Dataset.open(tmp_path / "d")
    keep = np.arange(11) < 8
    reasons = pa.array([None if k else "later" for k in keep], pa.string())
    write_selection(dataset, "first", keep, reasons, {"rules": []}, made_from(dataset, []))
    export_pairs("img2dataset", dataset, tmp_path / "out", ExportConfig(selection="first", shard_rows=4), silent)
    ours = tree(tmp_path / "out")
    run_img2dataset(tmp_path, "list.parquet", "out", "webdataset")
    after = tree(tmp_path / "out")
    assert {name: after.get(name) for name in ours} == ours
    assert set(after) - set(ours) == {"00002.tar", "00002.parquet", "00002_stats.json"}
    for shard in ("00000", "00001", "00002"):
        names = {}
        for folder in ("whole", "out"):
            with tarfile.open(tmp_path / folder / f"{shard}.tar") as tar:
                names[folder] = {m.name for m in tar}
        assert names["out"] == names["whole"]
        keys = [set(pq.read_table(tmp_path / f / f"{shard}.parquet")["key"].to_pylist()) for f in ("whole", "out")]
        assert keys[0] == keys[1]
        types = [pq.read_schema(tmp_path / f / f"{shard}.parquet") for f in ("whole", "out")]
        assert set(types[0].names) <= set(types[1].names)
    import_pairs("img2dataset", [str(tmp_path / "out")], tmp_path / "back", ImportConfig(), silent)
    assert [r["url"] for r in all_rows(Dataset.open(tmp_path / "back"))] == urls
