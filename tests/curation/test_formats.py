"""Formats: what goes out comes back, what comes from others is taken as it is, what is unsafe is refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.exporting import export_pairs
from curation.formats.img2dataset import status_of
from curation.formats.samples import find_files, safe_name, to_json
from curation.importing import import_pairs
from curation.maintenance_config import ArrowExportConfig, ExportConfig, ImportConfig
from schemas.errors import PairmillError
from schemas.events import Notice, silent
from schemas.status import STATUSES
from shards.dataset import Dataset
from tests.atomicity import assert_atomic, tree
from tests.curation.samples import all_rows, select, whole_dataset
from tests.make import encode, make_dataset, picture

FORMATS = ("webdataset", "img2dataset", "folder", "huggingface", "arrow")
SAME = ("uid", "url", "caption", "captions", "image", "format", "width", "height", "original_width")
SAME += ("original_height", "sha256", "stored_sha256", "status")


def export_config(format: str, **options) -> ExportConfig:
    """As the command builds it; `arrow` under names that make few files."""
    return ArrowExportConfig(layout="f30k", **options) if format == "arrow" else ExportConfig(**options)


def take(format: str, place, output, **options) -> list[dict]:
    """Rows of the dataset that an import makes."""
    import_pairs(format, [str(place)], output, ImportConfig(**options), silent)
    return all_rows(Dataset.open(output))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    dataset = whole_dataset(
        tmp_path_factory.mktemp("source") / "d",
        captions={(0, 0): ["one", "two", "ünï\ncode 😀"], (1, 1): ["only"]},
        no_caption=[(1, 2)],
    )
    select(dataset, [0, 1, 4, 5, 6, 9])
    return dataset


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("selection", [None, "best"])
def test_export_then_import_gives_the_same_pairs(source, tmp_path, format, selection):
    config = export_config(format, selection=selection, shard_rows=4)
    export_pairs(format, source.url, tmp_path / "out", config, silent)
    back = take(format, tmp_path / "out", tmp_path / "back", shard_rows=3)
    kept = [0, 4, 5, 6, 9] if selection else [0, 2, 3, 4, 5, 6, 7, 9, 10, 11]
    want = [all_rows(source)[k] for k in kept]
    for old in want:
        old["captions"] = None if old["captions"] == ["only"] else old["captions"]
    assert [{n: r[n] for n in SAME} for r in back] == [{n: r[n] for n in SAME} for r in want]
    assert [(r["license"], r["site.rank"]) for r in back] == [(r["License"], r["site.rank"]) for r in want]


@pytest.mark.parametrize("format", FORMATS)
def test_equal_datasets_give_equal_exports(source, tmp_path, format):
    for name in ("a", "b"):
        export_pairs(format, source, tmp_path / name, export_config(format, shard_rows=4), silent)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    files = [p for p in (tmp_path / "a").rglob("*.*") if p.name != "README.md" and p.name != "sizes.json"]
    before = {p: p.stat().st_mtime_ns for p in files}
    assert len(before) >= 3
    assert export_pairs(format, source, tmp_path / "a", export_config(format, shard_rows=4), silent).done == 0
    assert {p: p.stat().st_mtime_ns for p in files} == before


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_ended_at_any_call_a_rerun_completes_it(tmp_path, format, every):
    start = tmp_path / "start"
    make_dataset(start / "d", shards=1, rows=3)

    def run(root):
        export_pairs(format, root / "d", root / "out", export_config(format, shard_rows=2), silent)
        import_pairs(format, [str(root / "out")], root / "back", ImportConfig(shard_rows=2), silent)

    assert assert_atomic(lambda: (start, run), tmp_path, every=every) >= 25


@pytest.mark.parametrize("format", FORMATS)
def test_the_card_tells_sources_filters_and_licences(source, tmp_path, format):
    export_pairs(format, source, tmp_path / "out", export_config(format, selection="best"), silent)
    card = (tmp_path / "out/README.md").read_text()
    assert "5 pairs of 12 rows" in card
    assert "| timeout | 1 |" in card
    assert "Selection `best` keeps 6 of 12 rows." in card
    assert "| too small | 6 |" in card
    assert '"where": "size > 100"' in card
    assert "| CC-BY | 2 |" in card
    assert "| not given | 3 |" in card


def test_refusals(source, tmp_path):
    with pytest.raises(PairmillError, match=r"no format `webdatset`\. Did you mean `webdataset`"):
        export_pairs("webdatset", source, tmp_path / "x", ExportConfig(), silent)
    export_pairs("webdataset", source, tmp_path / "out", ExportConfig(), silent)
    with pytest.raises(PairmillError, match="holds another export"):
        export_pairs("webdataset", source, tmp_path / "out", ExportConfig(selection="best"), silent)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    with pytest.raises(PairmillError, match="is not empty"):
        export_pairs("folder", source, tmp_path / "full", ExportConfig(), silent)
    for format, text in (("webdataset", "no tar"), ("img2dataset", "no img2dataset"), ("folder", "no images")):
        with pytest.raises(PairmillError, match=text):
            take(format, tmp_path / "full", tmp_path / "y")
    take("webdataset", tmp_path / "out", tmp_path / "z")
    export_pairs("webdataset", source, tmp_path / "other", ExportConfig(selection="best"), silent)
    with pytest.raises(PairmillError, match="`input` was"):
        take("webdataset", tmp_path / "other", tmp_path / "z")
    failed = make_dataset(tmp_path / "failed", shards=1, rows=1, fail={(0, 0): "timeout"})
    with pytest.raises(PairmillError, match="no pair with an image is kept"):
        export_pairs("folder", failed, tmp_path / "q", ExportConfig(), silent)


# webdataset


def test_the_webdataset_library_reads_our_tars(source, tmp_path):
    import webdataset

    export_pairs("webdataset", source, tmp_path / "out", ExportConfig(shard_rows=4), silent)
    urls = sorted(str(p) for p in (tmp_path / "out").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    rows = [r for r in all_rows(source) if r["status"] == "success"]
    assert [s["jpg"] for s in samples] == [r["image"] for r in rows]
    assert [s["txt"].decode() for s in samples] == [r["caption"] or "" for r in rows]
    assert {frozenset(k for k in s if not k.startswith("__")) for s in samples} == {frozenset(("jpg", "txt", "json"))}
    assert json.loads((tmp_path / "out/sizes.json").read_text()) == {"00000.tar": 4, "00001.tar": 4, "00002.tar": 2}
    assert [s["__key__"] for s in samples] == sorted(s["__key__"] for s in samples)


def test_the_index_points_at_the_bytes(source, tmp_path):
    export_pairs("webdataset", source, tmp_path / "out", ExportConfig(), silent)
    data = (tmp_path / "out/00000.tar").read_bytes()
    head, *lines = (tmp_path / "out/00000.idx").read_text().splitlines()
    assert head == f"v1.2 {len(lines)}" == "v1.2 10"
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        members = tar.getmembers()
        found = []
        for line in lines:
            words = line.split()
            for suffix, offset, size, name in zip(*(words[i::4] for i in range(4)), strict=True):
                assert name.endswith(f".{suffix}")
                found.append(name)
                assert data[int(offset) : int(offset) + int(size)] == tar.extractfile(name).read()
    assert found == [m.name for m in members]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def write_tar(path, members: list[tuple[str, bytes]], mode: str = "w", **attributes):
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in attributes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return path


JPEG = encode(picture(40, 30))
PNG = encode(picture(20, 10), "png")


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")])
def test_tars_of_others(tmp_path, name, mode):
    members = [
        ("./", b""),
        ("x/a.b.JPG", JPEG),  # key x/a, suffix b.jpg: no image of that sample
        ("x/a.txt", b"dotted"),
        ("b.PNG", PNG),
        ("b.json", json.dumps({"caption": "from json", "license": "CC0", "n": 3, "sha256": "zz"}).encode()),
        ("b.txt", b"from txt"),
        ("c.txt", b"text only"),
        ("__meta__.json", b"{}"),
        ("d.jpeg", JPEG),
        ("d.json", b"{broken"),
        ("e.webp", b"<html>no image</html>"),
        ("f.cls", b"3"),
        ("f.jpg", JPEG),
        ("f.txt", b"caf\xe9"),
        ("g.jpg", JPEG),
        ("g.json", b'{"caption": null, "n": "many", "late": [1, {"x": "\\ud800"}]}'),
    ]
    rows = take("webdataset", write_tar(tmp_path / name, members[1:], mode), tmp_path / "d")
    assert [r["status"] for r in rows] == [
        "no_image",
        "success",
        "no_image",
        "success",
        "not_image",
        "success",
        "success",
    ]
    assert [r["caption"] for r in rows] == ["dotted", "from json", "text only", None, None, "caf\ufffd", None]
    assert [r["format"] for r in rows] == [None, "png", None, "jpeg", None, "jpeg", "jpeg"]
    assert (rows[1]["license"], rows[1]["width"], rows[1]["height"]) == ("CC0", 20, 10)
    assert (rows[1]["n"], rows[6]["n"]) == ("3", "many")  # one type for a column
    assert rows[3]["error"].startswith("json: ")
    assert rows[6]["late"] == '[1, {"x": "?"}]'


def test_several_captions_by_key(tmp_path):
    data = json.dumps({"alt": "a", "blip": ["b", "c"], "caption": "no"}).encode()
    tar = write_tar(tmp_path / "a.tar", [("1.jpg", JPEG), ("1.json", data)])
    (row,) = take("webdataset", tar, tmp_path / "d", caption_key=("alt", "blip", "none"))
    assert (row["caption"], row["captions"]) == ("a", ["a", "b", "c"])


def test_given_ids_stay(tmp_path):
    uid = "0123456789abcdef0123456789abcdef"
    members = [("1.jpg", JPEG), ("1.json", to_json({"uid": uid})), ("2.jpg", JPEG), ("2.json", to_json({"uid": "me"}))]
    one, two = take("webdataset", write_tar(tmp_path / "a.tar", members), tmp_path / "d")
    assert (one["uid"].hex(), one["input_uid"], two["input_uid"]) == (uid, None, "me")


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "x/../../a.jpg", "x\\a.jpg"])
def test_unsafe_names_are_refused(tmp_path, name):
    with pytest.raises(PairmillError, match="refused the unsafe name"):
        take("webdataset", write_tar(tmp_path / "a.tar", [(name, JPEG)]), tmp_path / "d")
    with pytest.raises(PairmillError, match="refused the unsafe name"):
        safe_name(name, "x")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    tar = write_tar(tmp_path / "a.tar", [("a.jpg", b"")], type=kind, linkname="/etc/passwd")
    with pytest.raises(PairmillError, match="is a link or a device"):
        take("webdataset", tar, tmp_path / "d")


def test_damaged_tars_and_doubled_suffixes(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [("1.jpg", JPEG), ("1.jpg", JPEG)])
    with pytest.raises(PairmillError, match=r"two members with the suffix \.jpg"):
        take("webdataset", whole, tmp_path / "d")
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 99)
    (tmp_path / "c.tar").write_bytes(whole.read_bytes()[:700])
    (tmp_path / "d.tar.gz").write_bytes(gzip.compress(whole.read_bytes())[:200])
    for name in ("b.tar", "c.tar", "d.tar.gz"):
        with pytest.raises(PairmillError, match=rf"{name} is damaged"):
            take("webdataset", tmp_path / name, tmp_path / f"out-{name}")


def test_bounds(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("1.jpg", JPEG), ("2.png", PNG)])
    rows = take("webdataset", tar, tmp_path / "d", max_bytes=len(PNG), max_pixels=150)
    assert [r["status"] for r in rows] == ["too_large", "bomb"]


def test_braces_globs_and_no_such_file(tmp_path):
    for i in (8, 9, 10):
        write_tar(tmp_path / f"t/{i:03d}.tar", [(f"{i}.jpg", JPEG)])
    names = [s.name for s in find_files([f"{tmp_path}/t/{{008..010}}.tar"], lambda n: True, "tar")]
    assert names == ["008.tar", "009.tar", "010.tar"]
    assert [s.name for s in find_files([f"{tmp_path}/t/0*.tar"], lambda n: True, "tar")] == names
    with pytest.raises(PairmillError, match=r"011\.tar: no tar there"):
        find_files([f"{tmp_path}/t/{{010..011}}.tar"], lambda n: True, "tar")


def test_columns_that_come_late_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("curation.importing.LOOKED_AT", 1)
    members = [("1.jpg", JPEG), ("1.json", b'{"n": 1}'), ("2.jpg", JPEG), ("2.json", b'{"n": "x", "late": 1}')]
    tar = write_tar(tmp_path / "a.tar", members)
    events: list = []
    import_pairs("webdataset", [str(tar)], tmp_path / "d", ImportConfig(), events.append)
    texts = [e.text for e in events if isinstance(e, Notice)]
    assert len(texts) == 2
    assert texts[0].endswith("has them: late.")
    assert texts[1].endswith("became null in: n.")
    events.clear()
    import_pairs("webdataset", [str(tar)], tmp_path / "d", ImportConfig(), events.append)
    assert "is finished already" in events[0].text


# folder


def test_folders_with_sidecars_and_metadata(tmp_path):
    root = tmp_path / "in"
    for name in ("b.jpg", "a.PNG", "sub/1.jpg", "sub/2.jpg", "csv/x.jpg", "pq/y.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PNG if name.endswith("PNG") else JPEG)
    (root / "a.txt").write_text("the a\n")
    (root / "b.json").write_text('{"captions": ["b1", "b2"], "author": "me"}')
    lines = [{"file_name": "2.jpg", "text": "two"}, {"file_name": "gone.jpg", "text": "three"}]
    (root / "sub/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    with (root / "csv/metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["file_name", "caption", "author"], ["x.jpg", 'a "quoted", one', "you"]])
    pq.write_table(pa.table({"file_name": ["y.jpg"], "caption": [["p", "q"]]}), root / "pq/metadata.parquet")
    rows = take("folder", root, tmp_path / "d")
    told = [(r["caption"], r["captions"], r["author"], r["status"]) for r in rows]
    assert told == [
        ('a "quoted", one', None, "you", "success"),
        ("p", ["p", "q"], None, "success"),
        ("two", None, None, "success"),
        ("three", None, None, "missing_file"),
        ("the a", None, None, "success"),
        ("b1", ["b1", "b2"], "me", "success"),
        (None, None, None, "success"),
    ]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"file_name": "../x.jpg"}', "refused the unsafe name"),
        ('{"file_name": "/etc/x.jpg"}', "refused the unsafe name"),
        ('{"file_name": "https://x/y.jpg"}', "refused the unsafe name"),
        ('{"text": "no name"}', "has no `file_name`"),
        ('{"file_name": "x.jpg"', "is damaged"),
    ],
)
def test_metadata_that_is_refused(tmp_path, line, text):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/metadata.jsonl").write_text(line + "\n")
    with pytest.raises(PairmillError, match=text):
        take("folder", tmp_path / "in", tmp_path / "d")


# img2dataset


@pytest.mark.parametrize(
    ("status", "message", "ours"),
    [
        ("failed_to_download", "HTTP Error 404: Not Found", ("http_error", 404)),
        ("failed_to_download", "<urlopen error [Errno -2] Name or service not known>", ("dns_error", None)),
        ("failed_to_download", "<urlopen error [Errno 111] Connection refused>", ("connect_error", None)),
        ("failed_to_download", "The read operation timed out", ("timeout", None)),
        ("failed_to_download", "<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED]>", ("tls_error", None)),
        ("failed_to_download", "IncompleteRead(10 bytes read, 90 more expected)", ("truncated", None)),
        ("failed_to_download", "hash mismatch", ("hash_mismatch", None)),
        ("failed_to_download", "Use of image disallowed by X-Robots-Tag directive", ("disallowed", None)),
        ("failed_to_download", "unknown url type: 'x'", ("bad_url", None)),
        ("failed_to_download", "what is this", ("protocol_error", None)),
        ("failed_to_resize", "Image decoding error", ("decode_error", None)),
        ("failed_to_resize", "image too small", ("too_small", None)),
        ("failed_to_resize", "aspect ratio too large", ("bad_aspect", None)),
        ("failed_to_resize", "image area too large", ("bomb", None)),
    ],
)
def test_their_statuses_become_ours(status, message, ours):
    assert status_of(status, message) == ours
    assert ours[0] in STATUSES


def test_tars_without_their_parquet_are_refused(tmp_path):
    write_tar(tmp_path / "in/00000.tar", [("000000000.jpg", JPEG)])
    with pytest.raises(PairmillError, match=r"not beside it. Use `pairmill import webdataset`"):
        take("img2dataset", tmp_path / "in", tmp_path / "d")
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "in/00000.parquet")
    with pytest.raises(PairmillError, match="has no column key, status"):
        take("img2dataset", tmp_path / "in", tmp_path / "e")
