"""Hugging Face's formats, with `datasets` itself: it reads what we write, we read what it writes."""

from __future__ import annotations

import datetime
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.exporting import export_pairs
from curation.formats import huggingface
from curation.formats.huggingface import image_column
from curation.importing import import_pairs
from curation.maintenance_config import ExportConfig, HuggingFaceImportConfig
from schemas.errors import PairmillError
from schemas.events import silent
from shards.dataset import Dataset
from tests.curation.samples import all_rows, select, whole_dataset
from tests.make import encode, make_dataset, picture

JPEG = encode(picture(40, 30))
PNG = encode(picture(20, 10), "png")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """`datasets` without the network, its cache in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        import datasets

        datasets.disable_progress_bars()
        yield datasets


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    dataset = whole_dataset(
        tmp_path_factory.mktemp("pairs") / "d",
        captions={(1, 1): ["one", "two", "ünï\ncode 😀"]},
        no_caption=[(1, 2)],
        kind="png",
    )
    select(dataset, [0, 1, 4, 5, 6, 9])
    return dataset


def take(place, output, **options) -> list[dict]:
    import_pairs("huggingface", [str(place)], output, HuggingFaceImportConfig(**options), silent)
    return all_rows(Dataset.open(output))


def kept(pairs, selection) -> list[dict]:
    places = [0, 4, 5, 6, 9] if selection else [0, 2, 3, 4, 5, 6, 7, 9, 10, 11]
    return [all_rows(pairs)[i] for i in places]


def bytes_of(image: Image.Image) -> bytes:
    return image.convert("RGB").tobytes()


def decoded(data: bytes) -> bytes:
    return bytes_of(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("selection", [None, "best"])
@pytest.mark.parametrize("by", ["its folder", "parquet"])
def test_datasets_reads_our_parquet(datasets, pairs, tmp_path, selection, by):
    export_pairs("huggingface", pairs, tmp_path / "out", ExportConfig(selection=selection, shard_rows=4), silent)
    name, options = (str(tmp_path / "out"), {}) if by == "its folder" else ("parquet", {"data_dir": tmp_path / "out"})
    loaded = datasets.load_dataset(name, cache_dir=str(tmp_path / "cache"), split="train", **options)
    want = kept(pairs, selection)
    assert isinstance(loaded.features["image"], datasets.Image)
    assert [bytes_of(i) for i in loaded["image"]] == [decoded(r["image"]) for r in want]
    for name in ("caption", "captions", "url", "width", "height", "License", "site.rank"):
        assert list(loaded[name]) == [r[name] for r in want], name
    assert list(loaded["uid"]) == [r["uid"].hex() for r in want]
    raw = loaded.cast_column("image", datasets.Image(decode=False))["image"]
    assert [r["bytes"] for r in raw] == [r["image"] for r in want]


def test_datasets_streams_our_parquet(datasets, pairs, tmp_path):
    export_pairs("huggingface", pairs, tmp_path / "out", ExportConfig(shard_rows=4), silent)
    rows = list(datasets.load_dataset(str(tmp_path / "out"), split="train", streaming=True))
    assert [r["caption"] for r in rows] == [r["caption"] for r in kept(pairs, None)]


@pytest.mark.parametrize("by", ["its folder", "imagefolder"])
def test_datasets_reads_our_image_folder(datasets, pairs, tmp_path, by):
    export_pairs("folder", pairs, tmp_path / "out", ExportConfig(shard_rows=4), silent)
    name, options = (
        (str(tmp_path / "out"), {}) if by == "its folder" else ("imagefolder", {"data_dir": tmp_path / "out"})
    )
    loaded = datasets.load_dataset(name, cache_dir=str(tmp_path / "cache"), split="train", **options)
    want = kept(pairs, None)
    assert [bytes_of(i) for i in loaded["image"]] == [decoded(r["image"]) for r in want]
    for name in ("caption", "url", "License", "site.rank"):
        assert list(loaded[name]) == [r[name] for r in want], name
    captions = [r["captions"] or ([r["caption"]] if r["caption"] is not None else []) for r in want]
    assert list(loaded["captions"]) == captions


def test_datasets_reads_our_tars(datasets, pairs, tmp_path):
    export_pairs("webdataset", pairs, tmp_path / "out", ExportConfig(shard_rows=4), silent)
    files = sorted(str(p) for p in (tmp_path / "out").glob("*.tar"))
    rows = list(datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True))
    want = kept(pairs, None)
    assert [bytes_of(r["png"]) for r in rows] == [decoded(r["image"]) for r in want]
    assert [r["txt"] for r in rows] == [r["caption"] or "" for r in want]


def test_we_read_what_datasets_writes(datasets, tmp_path):
    columns = {
        "picture": [{"bytes": JPEG, "path": "1.jpg"}, Image.open(io.BytesIO(PNG)), None],
        "text": ["one", "two", None],
        "label": [1, 0, 1],
        "when": [datetime.datetime(2020, 1, 2), None, datetime.datetime(2021, 1, 2)],
        "tags": [["a"], [], None],
        "box": [{"x": 1}, {"x": 2}, None],
    }
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "when": datasets.Value("timestamp[s]"),
            "tags": datasets.List(datasets.Value("string")),
            "box": {"x": datasets.Value("int64")},
        }
    )
    made = datasets.Dataset.from_dict(columns, features=features)
    made.to_parquet(str(tmp_path / "in/train.parquet"))
    rows = take(tmp_path / "in", tmp_path / "d")
    assert [r["status"] for r in rows] == ["success", "success", "missing_file"]
    assert [decoded(r["image"]) for r in rows[:2]] == [decoded(JPEG), decoded(PNG)]
    assert [r["caption"] for r in rows] == ["one", "two", None]
    assert [r["label"] for r in rows] == [1, 0, 1]
    assert [r["when"] for r in rows] == ["2020-01-02T00:00:00", None, "2021-01-02T00:00:00"]
    assert [r["tags"] for r in rows] == ['["a"]', "[]", None]
    assert [r["box"] for r in rows] == ['{"x": 1}', '{"x": 2}', None]


def write_parquet(path, rows: list[dict], schema: pa.Schema | None = None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **options)
    return path


def test_paths_are_not_opened_and_other_bytes_not_carried(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(JPEG)
    rows = [
        {
            "image": {"bytes": JPEG, "path": "a.jpg"},
            "mask": {"bytes": PNG, "path": None},
            "sound": b"x",
            "text": ["a", "b"],
        },
        {"image": {"bytes": None, "path": str(secret)}, "mask": None, "sound": None, "text": ["c"]},
        {"image": {"bytes": b"<svg/>", "path": None}, "mask": None, "sound": None, "text": None},
    ]
    kinds = [("image", IMAGE), ("mask", IMAGE), ("sound", pa.binary()), ("text", pa.list_(pa.string()))]
    back = take(write_parquet(tmp_path / "a.parquet", rows, pa.schema(kinds)), tmp_path / "d")
    assert [r["status"] for r in back] == ["success", "missing_file", "not_image"]
    assert [r["captions"] for r in back] == [["a", "b"], None, None]
    assert not {"mask", "sound"} & set(back[0])


def test_which_column_is_the_image():
    def typed(*names):
        return {"huggingface": json.dumps({"info": {"features": {n: {"_type": "Image"} for n in names}}})}

    one, two = pa.field("one", IMAGE), pa.field("two", IMAGE)
    raw = pa.field("raw", pa.large_binary())
    assert image_column(pa.schema([pa.field("x", pa.string()), raw]), None, "f") == "raw"
    assert image_column(pa.schema([raw, two]), None, "f") == "two"
    assert image_column(pa.schema([one, two], metadata=typed("two")), None, "f") == "two"
    assert (
        image_column(pa.schema([one, pa.field("image", IMAGE)], metadata=typed("one", "image")), None, "f") == "image"
    )
    assert image_column(pa.schema([one, two]), "one", "f") == "one"
    with pytest.raises(PairmillError, match=r"several image columns: `one`, `two`\. Name one with --image-key"):
        image_column(pa.schema([one, two], metadata={"huggingface": "{broken"}), None, "f")
    with pytest.raises(PairmillError, match=r"no image column `oen`\. Did you mean `one`\? It has: `one`"):
        image_column(pa.schema([one]), "oen", "f")
    with pytest.raises(
        PairmillError, match=r"no image column \(struct of bytes and path, or binary\)\. It has: `x` string"
    ):
        image_column(pa.schema([("x", pa.string())]), None, "f")


def test_rows_are_read_over_row_groups_and_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "_READ_ROWS", 3)
    images = [encode(picture(20 + i, 10, i)) for i in range(11)]
    rows = [{"image": {"bytes": data, "path": None}, "caption": f"c{i}"} for i, data in enumerate(images)]
    path = write_parquet(tmp_path / "a.parquet", rows, row_group_size=7)
    back = take(path, tmp_path / "d", shard_rows=4)
    assert [(r["image"], r["caption"]) for r in back] == [(data, f"c{i}") for i, data in enumerate(images)]
    with pq.ParquetFile(path) as file:
        reader = huggingface._Images(file, 0, "image", None)
        assert [reader.get(i) for i in (5, 1, 6, 0)] == [images[i] for i in (5, 1, 6, 0)]


def test_row_groups_are_small_and_images_stored_as_they_are(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path / "d", shards=1, rows=11)
    sizes = [len(r["image"]) for r in all_rows(dataset)]
    monkeypatch.setattr(huggingface, "GROUP_ROWS", 4)
    monkeypatch.setattr(huggingface, "GROUP_BYTES", sum(sizes[:3]))
    export_pairs("huggingface", dataset, tmp_path / "out", ExportConfig(), silent)
    assert [p.name for p in (tmp_path / "out/data").iterdir()] == ["train-00000-of-00001.parquet"]
    with pq.ParquetFile(tmp_path / "out/data/train-00000-of-00001.parquet") as file:
        groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
        columns = {groups[0].column(c).path_in_schema: groups[0].column(c) for c in range(groups[0].num_columns)}
        assert sum(g.num_rows for g in groups) == 11
        assert len(groups) > 2
        assert max(g.num_rows for g in groups) <= 4
        assert columns["image.bytes"].compression == "UNCOMPRESSED"
        assert not columns["image.bytes"].is_stats_set
        assert {c.compression for n, c in columns.items() if n != "image.bytes"} == {"ZSTD"}


def test_damaged_files_are_named(tmp_path):
    rows = [{"image": {"bytes": JPEG, "path": None}, "caption": "c"}] * 40
    data = write_parquet(tmp_path / "whole.parquet", rows, compression="none", use_dictionary=False).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-20])
    (tmp_path / "text.parquet").write_bytes(b"PAR1 not really")
    with pq.ParquetFile(tmp_path / "whole.parquet") as file:
        at = file.metadata.row_group(0).column(0).data_page_offset
    (tmp_path / "page.parquet").write_bytes(data[:at] + b"\xff" * 16 + data[at + 16 :])
    for name in ("cut", "text", "page"):
        with pytest.raises(PairmillError, match=rf"{name}\.parquet.* is damaged"):
            take(tmp_path / f"{name}.parquet", tmp_path / f"d-{name}")
    with pytest.raises(PairmillError, match="no Parquet file there"):
        take(tmp_path / "none", tmp_path / "d")
