import hashlib
import io
import json
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from curation.config import DownloadConfig
from curation.download import download
from curation.engine_img2dataset import _Run, check_engine, fetch_rows, status_of
from curation.rows import Request
from schemas.errors import PairmillError
from shards.dataset import Dataset
from shards.reader import read_table
from tests.curation.loopback import loopback, picture

needs_it = pytest.mark.skipif(sys.version_info >= (3, 13), reason="img2dataset imports imghdr, gone from Python 3.13")


@pytest.fixture
def web():
    with loopback() as state:
        yield state


def config(**options):
    base = {"engine": "img2dataset", "allow_private": ("127.0.0.1",), "workers": 0, "retries": 0, "size": 16}
    return DownloadConfig(**{**base, "connections": 8, "timeout": 5, **options})


@needs_it
def test_their_pixels_in_our_rows_and_order(tmp_path, web):
    import albumentations

    rows = [{"url": f"{web.base}/{'gone' if i % 3 == 2 else 'img'}/{i}", "n": i} for i in range(12)]
    rows += [{"url": "file:///etc/passwd", "n": 12}, {"url": "http://10.0.0.1/x", "n": 13}, {"url": None, "n": 14}]
    path = tmp_path / "l.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = download([str(path)], tmp_path / "ds", config(shard_rows=6))
    assert done.counts == {"success": 8, "http_error": 4, "bad_url": 2, "blocked": 1}
    dataset = Dataset.open(tmp_path / "ds")
    found = [r for s in range(3) for r in read_table(dataset.folder, f"pairs/0000{s}.parquet").to_pylist()]
    assert [r["n"] for r in found] == list(range(15))
    smaller = albumentations.SmallestMaxSize(max_size=16, interpolation=cv2.INTER_AREA, p=1.0)
    for i, row in enumerate(found[:12]):
        if i % 3 == 2:
            assert (row["status"], row["http_status"]) == ("http_error", 404)
            continue
        sent = picture(i)
        pixels = cv2.imdecode(np.frombuffer(sent, np.uint8), cv2.IMREAD_UNCHANGED)
        encoded = cv2.imencode(".jpg", smaller(image=pixels)["image"], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        assert row["image"] == encoded
        assert (row["width"], row["height"], row["original_width"], row["original_height"]) == (21, 16, 40, 30)
        assert row["sha256"] == hashlib.sha256(sent).digest()
        assert row["stored_sha256"] == hashlib.sha256(encoded).digest()
    assert dataset.stage("pairs").sidecar().identity["engine"] == "img2dataset"
    with pytest.raises(PairmillError, match=r"`engine` was 'img2dataset', now 'pairmill'"):
        download([str(path)], tmp_path / "ds", config(engine="pairmill"))


@needs_it
def test_bytes_as_received_hashes_limits_and_opt_out(tmp_path, web):
    urls = [f"{web.base}/img/{i}" for i in range(5)]
    digests = [hashlib.sha256(picture(i)).hexdigest() for i in range(5)]
    (tmp_path / "out.txt").write_text(f"sha256:{digests[3]}\n")
    asked = [
        Request(urls[0], f"sha256:{digests[0]}"),
        Request(urls[1], f"md5:{'0' * 32}"),
        Request(urls[2], f"md5:{hashlib.md5(picture(2)).hexdigest()}"),
        Request(urls[3]),
        Request("data:text/plain,hello"),
    ]
    held = []

    class Hold:
        def __init__(self, row):
            held.append(row)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

    found = fetch_rows(asked, config(resize="none", opt_out=tmp_path / "out.txt"), hold=Hold)
    assert [r.status for r in found] == ["success", "hash_mismatch", "success", "disallowed", "decode_error"]
    assert found[0].image.image == picture(0)
    assert found[0].received_bytes == len(picture(0))
    assert sorted(held) == [0, 2, 4]
    small = fetch_rows([Request(urls[0])], config(max_bytes=100))
    assert small[0].status == "too_large"
    assert fetch_rows([Request(urls[0])], config(min_side=31))[0].status == "too_small"
    assert fetch_rows([Request(urls[0])], config(max_aspect=1.2))[0].status == "bad_aspect"
    assert fetch_rows([Request(urls[0])], config(max_pixels=100))[0].status == "bomb"


@needs_it
@pytest.mark.parametrize(("encode", "kind"), [("png", "PNG"), ("webp", "WEBP")])
def test_formats(web, encode, kind):
    found = fetch_rows([Request(f"{web.base}/img/1")], config(encode=encode, resize="center-crop"))[0]
    assert (found.image.format, found.image.width, found.image.height) == (encode, 16, 16)
    assert Image.open(io.BytesIO(found.image.image)).format == kind


@needs_it
def test_a_run_that_is_given_up_ends_soon_and_raises(web):
    web.delay_s = 0.02
    seen = []

    def give_up(row, result):
        seen.append(row)
        if len(seen) == 10:
            raise PairmillError("enough")
        return result

    with pytest.raises(PairmillError, match="enough"):
        fetch_rows([Request(f"{web.base}/img/{i}") for i in range(300)], config(), on_result=give_up)
    assert len(seen) == 10
    assert sum(web.asked.values()) < 100
    assert fetch_rows([Request(f"{web.base}/img/1")], config())[0].status == "success"


@needs_it
def test_a_row_their_loop_loses_keeps_its_place(web, monkeypatch):
    def fail_first(self, row, data):
        return verify(self, row, data) if row else 1 // row

    verify = _Run.verify
    monkeypatch.setattr(_Run, "verify", fail_first)
    found = fetch_rows([Request(f"{web.base}/img/{i}") for i in range(2)], config())
    assert [r.status for r in found] == ["decode_error", "success"]
    assert "lost the row" in found[0].error


@pytest.mark.parametrize(
    ("message", "status", "http_status"),
    [
        ("HTTP Error 404: Not Found", "http_error", 404),
        ("HTTP Error 302: a redirect error that would lead to an infinite loop.", "redirect_error", 302),
        ("<urlopen error [Errno -2] Name or service not known>", "dns_error", None),
        ("<urlopen error [Errno 111] Connection refused>", "connect_error", None),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", "tls_error", None),
        ("<urlopen error timed out>", "timeout", None),
        ("The read operation timed out", "timeout", None),
        ("IncompleteRead(10 bytes read, 20 more expected)", "truncated", None),
        ("Use of image disallowed by X-Robots-Tag directive", "disallowed", None),
        ("Remote end closed connection without response", "connect_error", None),
        ("got more than 65536 bytes when reading header line", "protocol_error", None),
    ],
)
def test_their_messages_become_our_statuses(message, status, http_status):
    assert status_of(message) == (status, http_status)


def test_where_it_cannot_run_the_error_says_so(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 13, 0))
        with pytest.raises(PairmillError, match=r"needs Python below 3.13 .*this is 3\.13.*Leave --engine out"):
            download(["none.csv"], tmp_path / "ds", config())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 12, 0))
        for name in [n for n in sys.modules if n.startswith("img2dataset")]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "img2dataset", None)
        with pytest.raises(PairmillError, match="pip install img2dataset"):
            check_engine(config())
        with pytest.raises(PairmillError, match="--robots-txt has no counterpart"):
            check_engine(config(robots_txt=True))
    assert not (tmp_path / "ds").exists()
