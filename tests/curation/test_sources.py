import gzip
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.list_config import ListConfig
from curation.sources import cut, sampled_input
from schemas.config import build_config
from schemas.errors import PairmillError
from schemas.events import Notice
from schemas.pairs import given_uid, pair_uid, uid_share
from shards.dataset import Dataset
from shards.reader import read_table

ROWS = [
    {"url": "http://h/a,b.jpg", "caption": 'a "quoted" cat'},
    {"url": "http://h/ü b.jpg", "caption": "two\nlines, and a\ttab"},
    {"url": "http://h/c.jpg", "caption": "nul \0 byte"},
    {"url": "http://h/d.jpg", "caption": "Ünïcödé 漢字 \u2028 here"},
    {"url": "http://h/c.jpg", "caption": "nul \0 byte"},
]
PAIRS = [(r["url"], r["caption"]) for r in ROWS]


def rows_of(dataset):
    shards = (read_table(dataset.folder, dataset.stage("input").file(s)) for s in range(dataset.num_shards))
    return [row for shard in shards for row in shard.to_pylist()]


def pairs_of(dataset):
    return [(r["url"], r["caption"]) for r in rows_of(dataset)]


def cut_and_tell(lists, output, **options):
    said = []
    dataset = cut([str(p) for p in lists], output, ListConfig(**options), said.append)
    return dataset, " ".join(e.text for e in said if isinstance(e, Notice))


def cut_text(folder, name, text, **options):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return cut([str(path)], folder / "ds", ListConfig(**options))


def encoded(kind, rows):
    """A list of `kind` as another program would write it."""
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2 if len(rows) < 100 else len(rows))
        return sink.getvalue().to_pybytes()
    if kind == "arrow":
        table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return sink.getvalue().to_pybytes()
    if kind == "json":
        return json.dumps(rows, indent=1).encode()
    if kind == "jsonl":
        return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    separator = {"csv": ",", "tsv": "\t"}[kind]
    quoted = [separator.join('"' + v.replace('"', '""') + '"' for v in r.values()) for r in rows]
    return "\n".join([separator.join(rows[0]), *quoted, ""]).encode()


def packed(data, packing):
    if packing == ".gz":
        return gzip.compress(data)
    if packing == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return data


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "json", "jsonl", "arrow"])
def test_every_kind_and_packing_gives_the_same_rows(tmp_path, kind, packing):
    path = tmp_path / f"list.{kind}{packing}"
    path.write_bytes(packed(encoded(kind, ROWS), packing))
    dataset = cut([str(path)], tmp_path / "ds", ListConfig(shard_rows=2))
    assert pairs_of(dataset) == PAIRS
    assert dataset.manifest.shards == (2, 2, 1)
    assert [s.shards for s in dataset.manifest.lists] == [3]
    assert [r["uid"] for r in rows_of(dataset)] == [pair_uid(*p) for p in PAIRS]


@pytest.mark.parametrize("kind", ["csv", "json", "parquet", "arrow"])
@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_list_cut_short_is_named(tmp_path, kind, packing):
    path = tmp_path / f"list.{kind}{packing}"
    data = packed(encoded(kind, ROWS * 400), packing)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(PairmillError, match=rf"list\.{kind}\{packing} .*(damaged|cut short)"):
        cut([str(path)], tmp_path / "ds", ListConfig())
    assert not (tmp_path / "ds" / "dataset.json").exists()


def test_arrow_stream_files_are_read(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(tmp_path / "list.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert pairs_of(cut([str(tmp_path / "list.arrow")], tmp_path / "ds", ListConfig())) == PAIRS


_2 = "http://h/2"
TEXTS = {
    "stray quotes": (
        "l.tsv",
        'url\tcaption\nhttp://h/1\t"hello" said he\nhttp://h/2\t5" disk\nhttp://h/3\tplain\n',
        [("http://h/1", '"hello" said he'), ("http://h/2", '5" disk'), ("http://h/3", "plain")],
    ),
    "a quote that never closes": (
        "l.csv",
        'url,caption\nhttp://h/1,"open\n' + "".join(f"http://h/{i},c{i}\n" for i in range(2, 400)),
        [("http://h/1", '"open')] + [(f"http://h/{i}", f"c{i}") for i in range(2, 400)],
    ),
    "cc3m": (
        "Train_GCC.tsv",
        "a boat, at sea\thttp://h/1\nquiet\thttp://h/2,x\n",
        [("http://h/1", "a boat, at sea"), ("http://h/2,x", "quiet")],
    ),
    "cc12m": (
        "cc12m.tsv",
        "http://h/1\ta <PERSON>\nhttp://h/2\tb\n",
        [("http://h/1", "a <PERSON>"), ("http://h/2", "b")],
    ),
    "txt": ("l.txt", "http://h/a,b\n\nhttp://h/b \r\n", [("http://h/a,b", None), ("http://h/b", None)]),
    "one column with commas": ("l.csv", "url\nhttp://h/a,b,c\n", [("http://h/a,b,c", None)]),
    "unquoted comma in the caption": ("l.csv", "url,caption\nhttp://h/1,a, b\n", [("http://h/1", "a, b")]),
    "unquoted comma before the url": ("l.csv", "caption,url\na, b,http://h/1\n", [("http://h/1", "a, b")]),
    "semicolons": ("l.csv", "url;caption\nhttp://h/1;a, b\n", [("http://h/1", "a, b")]),
    "carriage returns": ("l.csv", "url,caption\r\nhttp://h/1,a\r\n", [("http://h/1", "a")]),
    "old line ends": ("l.csv", "url,caption\rhttp://h/1,a\rhttp://h/2,b", [("http://h/1", "a"), ("http://h/2", "b")]),
    "short rows and blank lines": ("l.csv", "url,caption\n\nhttp://h/1\n", [("http://h/1", None)]),
    "byte order mark": ("l.csv", b"\xef\xbb\xbfurl,caption\nhttp://h/1,a\n", [("http://h/1", "a")]),
    "utf-16": ("l.csv", "url,caption\nhttp://h/1,ü漢\n".encode("utf-16"), [("http://h/1", "ü漢")]),
    "latin-1": ("l.csv", "url,caption\nhttp://h/1,café – ok\n".encode("cp1252"), [("http://h/1", "café – ok")]),
    "undefined bytes": ("l.csv", b"url,caption\nhttp://h/1,a\x81b\xff\n", [("http://h/1", "a\x81bÿ")]),
    "sbu": (
        "sbu.json",
        json.dumps({"image_urls": ["http://h/1", "http://h/2"], "captions": ["a", "b"]}),
        [("http://h/1", "a"), ("http://h/2", "b")],
    ),
    "redcaps": (
        "cats_2017.json",
        json.dumps({"info": {"v": 1}, "annotations": [{"url": "http://h/1", "raw_caption": "A!", "caption": "a"}]}),
        [("http://h/1", "a")],
    ),
    "lines in .json": (
        "l.json",
        '{"captions": ["a", "b"], "url": "http://h/1"}\n{"url": "http://h/2"}\n',
        [("http://h/1", "a"), ("http://h/2", None)],
    ),
    "pandas columns": (
        "l.json",
        json.dumps({"URL": {"0": "http://h/1", "1": "http://h/2"}, "TEXT": {"0": "a", "1": None}}),
        [("http://h/1", "a"), ("http://h/2", None)],
    ),
    "array of urls": ("l.json", '["http://h/1", "http://h/2"]', [("http://h/1", None), ("http://h/2", None)]),
    "half a surrogate pair": ("l.jsonl", '{"url": "http://h/1", "text": "a\\ud800b"}\n', [("http://h/1", "a\ufffdb")]),
    "null and empty": (
        "l.jsonl",
        '{"url": null, "text": ""}\n{"url": " ", "text": "b"}\n',
        [(None, None), (None, "b")],
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_lists_as_they_are_found(tmp_path, case):
    name, text, expected = TEXTS[case]
    assert pairs_of(cut_text(tmp_path, name, text)) == expected


def test_odd_bytes_are_told_and_another_encoding_can_be_given(tmp_path):
    path = tmp_path / "l.csv"
    path.write_bytes("url,caption\nhttp://h/1,日本\n".encode("shift_jis"))
    _, said = cut_and_tell([path], tmp_path / "guess")
    assert "no UTF-8" in said
    dataset, said = cut_and_tell([path], tmp_path / "told", encoding="shift_jis")
    assert pairs_of(dataset) == [("http://h/1", "日本")]
    assert "UTF-8" not in said
    with pytest.raises(PairmillError, match="'klingon', which no codec has"):
        cut_and_tell([path], tmp_path / "wrong", encoding="klingon")


def test_json_values_longer_than_a_read_and_numbers_at_its_edge(tmp_path):
    rows = [{"url": f"http://h/{i}", "text": "x" * (i * 997 % 70_000), "n": i * 12345} for i in range(60)]
    dataset = cut_text(tmp_path, "l.json", json.dumps(rows), shard_rows=7)
    assert [(r["url"], r["caption"] or "", r["n"]) for r in rows_of(dataset)] == [tuple(r.values()) for r in rows]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.jsonl", '{"url": "http://h/1"}\n{"url": \n', r"l.jsonl line 2 is no JSON"),
        ("l.json", '[{"url": "http://h/1"}, {"url"', r"l.json is damaged JSON"),
        ("l.json", "hello", r"begins with 'h'"),
        ("l.json", '{"a": 1, "b": [1, 2]}', r"a \(one value\), b \(2 items\)"),
        ("l.json", "[1, 2]", r"a row must be an object or a URL"),
        ("l.json", "[" * 100_000, r"nested too deeply|damaged"),
        ("l.csv", "url,caption,n\nhttp://h/1,a,b,c\n", r"l.csv line 2 has 4 fields, the list has 3 columns"),
        ("l.csv", "", r"no rows"),
        ("l.csv", "url,caption\n", r"no rows"),
        ("l.json", "[]", r"no rows"),
        ("l.parquet", "url\nhttp://h/1\n", r"l.parquet is no Parquet file"),
        ("l.arrow", "url\nhttp://h/1\n", r"l.arrow is no Arrow file"),
        ("l.csv", "link,words\nx,y\n", r"no column of URLs that I know .* It has: link, words. Pass --url NAME"),
        ("l.xlsx", "", r"its name must end in"),
    ],
)
def test_a_bad_list_says_what_and_where_and_leaves_no_dataset(tmp_path, name, text, message):
    with pytest.raises(PairmillError, match=message):
        cut_text(tmp_path, name, text)
    assert not (tmp_path / "ds" / "input").exists()


def test_a_wrong_column_name_fails_at_once_with_the_nearest(tmp_path):
    for flag, near in (("url", "image_link"), ("caption", "words"), ("uid", "words"), ("sha256", "words")):
        with pytest.raises(PairmillError, match=rf"--{flag}\). Did you mean `{near}`\? It has: image_link, words"):
            cut_text(
                tmp_path,
                "l.csv",
                "image_link,words\nhttp://h/1,a\n",
                **{flag: near.replace("r", "rr").replace("g", "gg")},
            )
    assert not (tmp_path / "ds").exists()


@pytest.mark.parametrize(
    ("header", "url", "caption"),
    [
        ("URL,TEXT,WIDTH,similarity", "URL", "TEXT"),  # LAION
        ("id,url,text,image_phash", "url", "text"),  # COYO
        ("image_id,author,url,raw_caption,caption,subreddit", "url", "caption"),  # RedCaps
        ("uid,url,text,original_width,sha256", "url", "text"),  # DataComp
        ("image_url,top_caption", "image_url", "top_caption"),
        ("Image_URL,Caption", "Image_URL", "Caption"),
        ("url,no_such", "url", None),
    ],
)
def test_columns_of_the_public_lists_are_known(tmp_path, header, url, caption):
    names = header.split(",")
    values = ["http://h/1" if n == url else "words" if n == caption else "7" for n in names]
    dataset = cut_text(tmp_path, "l.csv", f"{header}\n{','.join(values)}\n")
    assert pairs_of(dataset) == [("http://h/1", "words" if caption else None)]


def test_given_columns_win_and_none_takes_no_column(tmp_path):
    path = tmp_path / "l.jsonl"
    sha = "ab" * 32
    path.write_text(
        json.dumps({"u": "http://h/1", "url": "http://h/2", "c": "c", "caption": "d", "key": "k1", "sha256": sha})
        + "\n"
    )
    dataset, said = cut_and_tell([path], tmp_path / "a", url="u", caption="c", uid="key")
    row = rows_of(dataset)[0]
    assert (row["url"], row["caption"], row["expected_hash"]) == ("http://h/1", "c", f"sha256:{sha}")
    assert (row["uid"], row["input_uid"]) == given_uid("k1")
    assert row["input_uid"] == "k1"
    assert (row["input_url"], row["input_caption"]) == ("http://h/2", "d")
    assert "column `url` is carried as `input_url`" in said
    dataset, _ = cut_and_tell([path], tmp_path / "b", caption="none", sha256="none")
    row = rows_of(dataset)[0]
    assert row["caption"] is None
    assert row["expected_hash"] is None
    assert (row["input_caption"], row["input_sha256"]) == ("d", sha)


def test_uids_hashes_and_attribution(tmp_path):
    hexid, md5 = "0123456789abcdef" * 2, "d" * 32
    rows = [
        {
            "uid": hexid,
            "url": "http://h/1",
            "md5": md5.upper(),
            "licence": "CC BY",
            "creator": "Ann",
            "page_url": "http://p",
        },
        {"uid": "", "url": "http://h/2", "md5": "not one", "licence": None, "creator": None, "page_url": None},
    ]
    dataset, said = cut_and_tell([_jsonl(tmp_path / "l.jsonl", rows)], tmp_path / "ds")
    one, two = rows_of(dataset)
    assert (one["uid"], one["input_uid"], one["expected_hash"]) == (bytes.fromhex(hexid), None, f"md5:{md5}")
    assert (one["license"], one["author"], one["source_url"]) == ("CC BY", "Ann", "http://p")
    assert (two["uid"], two["expected_hash"]) == (pair_uid("http://h/2", None), None)
    assert dataset.manifest.columns == {"license": "licence", "author": "creator", "source_url": "page_url"}
    assert "`licence` is carried as `license`" in said


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_lists_of_captions(tmp_path):
    rows = [
        {"url": "http://h/1", "captions": ["a", "", "b"]},
        {"url": "http://h/2", "captions": []},
        {"url": "http://h/3", "captions": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "l.parquet")
    for name in (tmp_path / "l.parquet", _jsonl(tmp_path / "l.jsonl", rows)):
        found = rows_of(cut([str(name)], tmp_path / f"ds-{name.suffix}", ListConfig()))
        assert [(r["caption"], r["captions"]) for r in found] == [("a", ["a", "b"]), (None, []), (None, None)]


def test_carried_columns_keep_their_types(tmp_path):
    table = pa.table(
        {
            "url": ["http://h/1"],
            "width": pa.array([3], pa.int16()),
            "tags": [["x", "y"]],
            "face": [[{"x": 1.5}]],
            "host": pa.array(["h"]).dictionary_encode(),
            "when": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns", "UTC")),
            "nothing": pa.nulls(1),
        }
    )
    pq.write_table(table, tmp_path / "l.parquet")
    dataset = cut([str(tmp_path / "l.parquet")], tmp_path / "ds", ListConfig())
    row = rows_of(dataset)[0]
    assert (row["input_width"], row["tags"], row["face"], row["host"], row["nothing"]) == (
        3,
        ["x", "y"],
        [{"x": 1.5}],
        "h",
        None,
    )
    assert row["when"].microsecond == 123456


def test_json_types_come_from_the_first_rows_and_can_be_given(tmp_path):
    rows = [{"url": f"http://h/{i}", "a": i, "b": 0.5, "c": True, "d": {"k": [i]}, "e": None} for i in range(3)]
    row = rows_of(cut_text(tmp_path, "l.json", json.dumps(rows), column_types=("a=double",)))[1]
    assert (row["a"], row["b"], row["c"], json.loads(row["d"]), row["e"]) == (1.0, 0.5, True, {"k": [1]}, None)
    assert isinstance(row["a"], float)
    text = "url,n,f,b\nhttp://h/1,7,0.25,true\nhttp://h/2,,,\n"
    typed = tmp_path / "typed"
    typed.mkdir()
    found = rows_of(cut_text(typed, "l.csv", text, column_types=("n=int64", "f=double", "b=bool")))
    assert [(r["n"], r["f"], r["b"]) for r in found] == [(7, 0.25, True), (None, None, None)]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert rows_of(cut_text(plain, "l.csv", text))[0]["n"] == "7"
    with pytest.raises(PairmillError, match="must be NAME=TYPE"):
        build_config(ListConfig, {"column_types": ("n=float",)}, "download")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    with pytest.raises(PairmillError, match=r"column `f` is int64 .*'0.25'.*--column-types f=string"):
        cut_text(wrong, "l.csv", text, column_types=("f=int64",))


def test_later_lists_follow_the_first_ones_columns(tmp_path):
    pq.write_table(
        pa.table({"url": ["http://h/1"], "n": pa.array([1], pa.int64()), "m": ["x"]}), tmp_path / "1.parquet"
    )
    pq.write_table(
        pa.table({"URL": ["http://h/2"], "n": pa.array([2], pa.int32()), "new": [1]}), tmp_path / "2.parquet"
    )
    dataset, said = cut_and_tell([tmp_path / "*.parquet"], tmp_path / "ds")
    assert [(r["url"], r["n"], r["m"]) for r in rows_of(dataset)] == [("http://h/1", 1, "x"), ("http://h/2", 2, None)]
    assert "2.parquet lacks columns of the first list; they are null: m" in said
    assert "2.parquet: not carried, since the first rows had no such column: new" in said
    pq.write_table(pa.table({"url": ["http://h/3"], "n": ["three"]}), tmp_path / "3.parquet")
    with pytest.raises(PairmillError, match=r"3.parquet rows 0 to 0: column `n` is int64 .* string there"):
        cut_and_tell([tmp_path / "*.parquet"], tmp_path / "other")
    assert not (tmp_path / "other" / "dataset.json").exists()


def test_folders_globs_and_urls(tmp_path):
    lists = tmp_path / "lists"
    (lists / "deep").mkdir(parents=True)
    for name, row in (("b.csv", ROWS[1]), ("a.csv", ROWS[0]), ("deep/c.csv", ROWS[2])):
        (lists / name).write_bytes(encoded("csv", [row]))
    (lists / "README.md").write_text("no list")
    (lists / ".hidden.csv").write_text("nonsense")
    for number, given in enumerate(([lists], [f"file://{lists}"], [f"{lists}/*.csv", lists / "deep"])):
        dataset = cut([str(g) for g in given], tmp_path / f"ds{number}", ListConfig())
        assert pairs_of(dataset) == PAIRS[:3]
    (lists / "x.jsonl").write_text("")
    with pytest.raises(PairmillError, match=r"several kinds \(csv, jsonl\).*Give a glob"):
        cut([str(lists)], tmp_path / "no", ListConfig())
    with pytest.raises(PairmillError, match=r"No list at .*gone"):
        cut([str(tmp_path / "gone.csv")], tmp_path / "no", ListConfig())
    with pytest.raises(PairmillError, match="No list given"):
        cut([], tmp_path / "no", ListConfig())


def test_a_store_is_read_and_written(tmp_path):
    import fsspec

    with fsspec.open("memory://lists/l.parquet.gz", "wb") as stream:
        stream.write(packed(encoded("parquet", ROWS), ".gz"))
    dataset = cut(["memory://lists/l.parquet.gz"], "memory://made", ListConfig(shard_rows=2))
    assert pairs_of(Dataset.open("memory://made")) == PAIRS
    assert cut(["memory://lists/l.parquet.gz"], "memory://made", ListConfig()).manifest == dataset.manifest


def test_output_inside_the_input_folder_does_not_read_itself(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "l.parquet")
    for output in (tmp_path, tmp_path / "out"):
        for _ in range(2):
            assert pairs_of(cut([str(tmp_path)], output, ListConfig())) == PAIRS


def test_limit_and_sample(tmp_path):
    assert [uid_share(bytes([b]) + bytes(15)) for b in (0, 64, 128)] == [0, 0.25, 0.5]
    assert uid_share(b"\xff" * 6 + bytes(10)) < 1
    rows = [{"url": f"http://h/{i}", "caption": "c"} for i in range(3000)]
    path = _jsonl(tmp_path / "l.jsonl", rows)
    assert pairs_of(cut([str(path)], tmp_path / "limit", ListConfig(limit=7, shard_rows=3))) == [
        (f"http://h/{i}", "c") for i in range(7)
    ]
    tenth, third = (cut([str(path)], tmp_path / str(p), ListConfig(sample=p)) for p in (0.1, 0.3))
    expected = [(r["url"], "c") for r in rows if uid_share(pair_uid(r["url"], "c")) < 0.1]
    assert pairs_of(tenth) == expected
    assert 200 < len(expected) < 400
    assert set(pairs_of(tenth)) < set(pairs_of(third))
    both = cut([str(path)], tmp_path / "both", ListConfig(sample=0.1, limit=5))
    assert pairs_of(both) == expected[:5]
    with pytest.raises(PairmillError, match="no rows to take"):
        cut([str(path)], tmp_path / "none", ListConfig(sample=1e-9))


def test_probe_rows_are_the_smallest_uids_in_order(tmp_path):
    rows = [{"url": f"http://h/{i}", "caption": "c"} for i in range(25_000)]
    table, total = sampled_input([str(_jsonl(tmp_path / "l.jsonl", rows))], ListConfig(), 50)
    assert total == 25_000
    uids = {pair_uid(r["url"], "c") for r in rows}
    smallest = set(sorted(uids)[:50])
    assert table["url"].to_pylist() == [r["url"] for r in rows if pair_uid(r["url"], "c") in smallest]


def test_the_same_lists_again_resume_and_others_are_refused(tmp_path):
    one, two = _jsonl(tmp_path / "1.jsonl", ROWS), _jsonl(tmp_path / "2.jsonl", ROWS[:2])
    made = cut([str(one)], tmp_path / "ds", ListConfig(limit=4))
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(one.read_bytes())
    assert cut([str(moved)], tmp_path / "ds", ListConfig()).manifest == made.manifest
    assert cut([], tmp_path / "ds", ListConfig()).manifest == made.manifest
    with pytest.raises(PairmillError, match=r"made from other lists \(1.jsonl\): 2.jsonl .* --extend"):
        cut([str(two)], tmp_path / "ds", ListConfig())
    with pytest.raises(PairmillError, match="with `limit` 4, now it is 5"):
        cut([str(one)], tmp_path / "ds", ListConfig(limit=5))
    with pytest.raises(PairmillError, match="shards of 10,000 rows, --shard-rows says 3"):
        cut([str(one)], tmp_path / "ds", ListConfig(shard_rows=3))
    one.write_bytes(one.read_bytes().replace(b"nul", b"nil"))
    with pytest.raises(PairmillError, match="or has changed"):
        cut([str(one)], tmp_path / "ds", ListConfig())


def test_extend_appends_once(tmp_path):
    one, two = _jsonl(tmp_path / "1.jsonl", ROWS), _jsonl(tmp_path / "2.jsonl", [{**r, "extra": 1} for r in ROWS])
    cut([str(one)], tmp_path / "ds", ListConfig(shard_rows=2))
    before = (tmp_path / "ds/input/00002.parquet").read_bytes()
    for _ in range(2):
        grown, said = cut_and_tell([one, two], tmp_path / "ds", extend=True)
        assert grown.manifest.shards == (2, 2, 1, 2, 2, 1)
        assert [(s.name, s.shards) for s in grown.manifest.lists] == [("1.jsonl", 3), ("2.jsonl", 3)]
        assert "lists are in" in said
    assert pairs_of(grown) == PAIRS * 2
    assert (tmp_path / "ds/input/00002.parquet").read_bytes() == before
    assert cut([str(two)], tmp_path / "ds", ListConfig()).manifest == grown.manifest


def test_a_cut_stopped_anywhere_ends_in_the_same_bytes(tmp_path, monkeypatch):
    lists = [_jsonl(tmp_path / f"{n}.jsonl", [{"url": f"http://h/{n}/{i}"} for i in range(10)]) for n in (1, 2)]
    given = [str(p) for p in lists]
    cut(given, tmp_path / "whole", ListConfig(shard_rows=3))
    expected = {p.name: p.read_bytes() for p in (tmp_path / "whole/input").iterdir()}
    import curation.sources as sources

    write = sources._write_shard
    for stop in range(7):
        calls = []

        def stopping(*args, calls=calls, stop=stop):
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(1)
            write(*args)

        monkeypatch.setattr(sources, "_write_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            cut(given, tmp_path / f"ds{stop}", ListConfig(shard_rows=3))
        monkeypatch.setattr(sources, "_write_shard", write)
        stands = {p: p.stat().st_mtime_ns for p in (tmp_path / f"ds{stop}").glob("input/*.parquet")}
        cut(given, tmp_path / f"ds{stop}", ListConfig(shard_rows=3))
        assert {p.name: p.read_bytes() for p in (tmp_path / f"ds{stop}/input").iterdir()} == expected
        assert all(p.stat().st_mtime_ns == at for p, at in stands.items())


def test_what_another_cut_left_is_not_kept(tmp_path, monkeypatch):
    import curation.sources as sources

    path = _jsonl(tmp_path / "l.jsonl", [{"url": f"http://h/{i}"} for i in range(10)])

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sources, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            cut([str(path)], tmp_path / "ds", ListConfig(shard_rows=2))
    dataset = cut([str(path)], tmp_path / "ds", ListConfig(shard_rows=3, limit=5))
    assert [r["url"] for r in rows_of(dataset)] == [f"http://h/{i}" for i in range(5)]
    assert sorted(p.name for p in (tmp_path / "ds/input").iterdir()) == ["00000.parquet", "00001.parquet"]


KILLED = """
import sys, time
import curation.sources as sources
from curation.list_config import ListConfig
write = sources._write_shard
def slow(*args):
    time.sleep(0.01)
    write(*args)
sources._write_shard = slow
print("ready", flush=True)
sources.cut([sys.argv[1]], sys.argv[2], ListConfig(shard_rows=50))
"""


def test_a_killed_cut_goes_on_to_the_same_bytes(tmp_path):
    path = _jsonl(tmp_path / "l.jsonl", [{"url": f"http://h/{i}", "caption": "c"} for i in range(3000)])
    cut([str(path)], tmp_path / "whole", ListConfig(shard_rows=50))
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, path, tmp_path / "ds"], stdout=subprocess.PIPE, cwd=_root()
        )
        child.stdout.readline()
        time.sleep(random.Random(1).uniform(0.1, 0.5))
        child.send_signal(signal.SIGKILL)
        child.communicate()
    cut([str(path)], tmp_path / "ds", ListConfig(shard_rows=50))
    for name in ("dataset.json", *(f"input/{i:05d}.parquet" for i in range(60))):
        assert (tmp_path / "ds" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def _root():
    return Path(__file__).parents[2]


PEAK = r"""
import re, sys
from curation.list_config import ListConfig
from curation.sources import cut
cut([sys.argv[1]], sys.argv[2], ListConfig(shard_rows=1000))
print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_memory_does_not_grow_with_the_list(tmp_path, kind):
    peaks = []
    for rows in (80_000, 240_000):
        path = tmp_path / f"{rows}.{kind}"
        path.write_bytes(
            encoded(kind, [{"url": f"http://h/{i}", "caption": f"{i} " + "word " * 240} for i in range(rows)])
        )
        child = [sys.executable, "-c", PEAK, path, tmp_path / f"ds{rows}"]
        peaks.append(int(subprocess.run(child, capture_output=True, check=True, cwd=_root()).stdout))
    # Captions of 190 MB more; allocators alone make two runs of one list differ by 20 MB.
    assert peaks[1] - peaks[0] < 80_000, f"peak {peaks[0]} kB at 80 000 rows, {peaks[1]} kB at 240 000"
