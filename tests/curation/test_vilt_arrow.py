"""`.arrow` files of ViLT, METER and VLMo: what their readers need, what is refused. Their own files: tests/parity."""

from __future__ import annotations

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.exporting import export_pairs
from curation.formats import vilt_arrow
from curation.formats.arrow_layouts import LAYOUTS, number_of
from curation.importing import import_pairs
from curation.maintenance_config import ArrowExportConfig, ImportConfig
from schemas.errors import PairmillError
from schemas.events import Notice, silent
from shards.dataset import Dataset
from tests.curation.samples import all_rows
from tests.make import encode, make_dataset, picture

JPEG = encode(picture(20, 10))


def take(place, output, **options) -> list[dict]:
    import_pairs("arrow", [str(place)], output, ImportConfig(**options), silent)
    return all_rows(Dataset.open(output))


def give(dataset, output, emit=silent, **options):
    export_pairs("arrow", dataset, output, ArrowExportConfig(**options), emit)


def write_arrow(path, columns: dict, kinds: dict | None = None, batch_rows: int = 1000):
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = LAYOUTS["coco"].schema
    kinds = kinds or {}
    schema = pa.schema([(n, kinds.get(n, schema.field(n).type if n in schema.names else pa.string())) for n in columns])
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
        writer.write_table(pa.table(columns, schema=schema), max_chunksize=batch_rows)
    return path


def as_their_reader(folder, names: list[str]) -> pa.Table:
    """All tables under these names, as `BaseDataset.__init__` loads them: mapped, joined, each with its own name."""
    tables = []
    for name in names:
        if (folder / f"{name}.arrow").is_file():
            tables.append(pa.ipc.RecordBatchFileReader(pa.memory_map(str(folder / f"{name}.arrow"), "r")).read_all())
    assert len(tables) == len(names), "a missing name shifts all that follow"
    return pa.concat_tables(tables, promote_options="default")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Twelve pairs, of which one failed and one has no image, in three splits."""
    splits = ["train", "val", None, "test"]
    return make_dataset(
        tmp_path_factory.mktemp("pairs") / "d",
        shards=3,
        rows=4,
        fail={(0, 1): "timeout", (2, 0): "no_image"},
        captions={(1, 1): ["one", "two", "two"]},
        carried=[pa.field("split", pa.string()), pa.field("License", pa.string())],
        carry=lambda s, r: {"split": splits[r], "License": f"{s}.{r}"},
    )


def test_their_reader_finds_every_name_and_row(pairs, tmp_path):
    give(pairs, tmp_path / "out", layout="conceptual", split="train", shard_rows=4)
    names = [f"conceptual_caption_train_{i}" for i in range(30)]
    table = as_their_reader(tmp_path / "out", names)
    rows = [r for r in all_rows(pairs) if r["status"] == "success"]
    assert table["image"].to_pylist() == [r["image"] for r in rows]
    assert table["caption"].to_pylist() == [r["captions"] or [r["caption"]] for r in rows]
    assert set(table["split"].to_pylist()) == {"train"}
    numbers = [int(i.split(".")[0].split("_")[-1]) for i in table["image_id"].to_pylist()]
    assert numbers == list(range(10))
    assert len(as_their_reader(tmp_path / "out", ["conceptual_caption_val_0"])) == 0
    assert len(as_their_reader(tmp_path / "out", names[:1])) == 4


def test_rows_go_where_their_split_says(pairs, tmp_path):
    give(pairs, tmp_path / "out", layout="f30k")
    rows = [r for r in all_rows(pairs) if r["status"] == "success"]
    for split in ("train", "val", "test"):
        table = as_their_reader(tmp_path / "out", [f"f30k_caption_karpathy_{split}"])
        want = [r["image"] for r in rows if (r["split"] or "train") == split]
        assert table["image"].to_pylist() == want
        assert len(want) >= 2
    assert {r["license"] for r in take(tmp_path / "out", tmp_path / "back")} == {r["License"] for r in rows}


def test_splits_that_have_no_file(pairs, tmp_path):
    with pytest.raises(PairmillError, match=r"2 of 'val'.*There are the splits train.*--split"):
        give(pairs, tmp_path / "out", layout="sbu")
    with pytest.raises(PairmillError, match=r"--split trian: there is no such split.*`train`"):
        give(pairs, tmp_path / "out", layout="sbu", split="trian")
    with pytest.raises(PairmillError, match=r"10 rows .* sbu_0 to sbu_8 of 1 rows each.* --shard-rows 2 or more"):
        give(pairs, tmp_path / "out", layout="sbu", split="train", shard_rows=1)
    assert not (tmp_path / "out").exists()
    give(pairs, tmp_path / "out", layout="sbu", split="train", shard_rows=2)
    assert len(as_their_reader(tmp_path / "out", [f"sbu_{i}" for i in range(9)])) == 10


def test_a_file_has_several_batches(pairs, tmp_path, monkeypatch):
    whole = [r for r in all_rows(pairs) if r["status"] == "success"]
    monkeypatch.setattr(vilt_arrow, "BATCH_BYTES", 2 * max(len(r["image"]) for r in whole))
    monkeypatch.setattr(vilt_arrow, "BATCH_ROWS", 3)
    give(pairs, tmp_path / "out", layout="vg", split="train")
    with pa.OSFile(str(tmp_path / "out/vg.arrow")) as stream, pa.ipc.open_file(stream) as reader:
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    sizes = [sum(len(i) for i in b["image"].to_pylist()) for b in batches]
    assert len(batches) >= 4
    assert max(sizes) <= vilt_arrow.BATCH_BYTES < 2**31
    assert [i for b in batches for i in b["image"].to_pylist()] == [r["image"] for r in whole]


def test_a_caption_without_a_box_has_the_whole_image(pairs, tmp_path):
    give(pairs, tmp_path / "out", layout="vg", split="train")
    table = as_their_reader(tmp_path / "out", ["vg"])
    for row, one in zip([r for r in all_rows(pairs) if r["status"] == "success"], table.to_pylist(), strict=True):
        n = len(one["caption"])
        boxes = [one[k] for k in ("x", "y", "width", "height")]
        assert boxes == [[0] * n, [0] * n, [row["width"]] * n, [row["height"]] * n]


def test_text_only_rows_go_into_wikibk(pairs, tmp_path):
    events: list = []
    give(pairs, tmp_path / "out", events.append, layout="wikibk", split="train")
    table = as_their_reader(tmp_path / "out", [f"wikibk_train_{i}" for i in range(50)])
    assert len(table) == 11
    assert set(table["image"].to_pylist()) == {"None"}
    assert any(isinstance(e, Notice) and e.text.startswith("1 kept rows") for e in events)
    assert {r["status"] for r in take(tmp_path / "out", tmp_path / "back")} == {"no_image"}


@pytest.mark.parametrize(
    ("ids", "kept", "note"),
    [
        (["COCO_val2014_000000000042.jpg", "7.png", "train_00012"], True, None),
        (["a_1.jpg", "b_1.jpg", "c_2.jpg"], False, "share a number"),
        (["a_1.jpg", "photo.jpg", "c_2.jpg"], False, "none that ends in digits"),
        (["a_1.jpg", None, "c_2.jpg"], False, "none that ends in digits"),
    ],
)
def test_image_ids_stay_where_their_retrieval_can_use_them(tmp_path, ids, kept, note):
    dataset = make_dataset(
        tmp_path / "d",
        shards=1,
        rows=3,
        carried=[pa.field("image_id", pa.string())],
        carry=lambda s, r: {"image_id": ids[r]},
    )
    events: list = []
    give(dataset, tmp_path / "out", events.append, layout="f30k")
    found = as_their_reader(tmp_path / "out", ["f30k_caption_karpathy_train"])["image_id"].to_pylist()
    assert found == (ids if kept else [f"train_{i:09d}.jpg" for i in range(3)])
    assert [e.text for e in events if isinstance(e, Notice) and "image_id" in e.text and note in e.text] or note is None
    assert [r["image_id"] for r in take(tmp_path / "out", tmp_path / "back")] == ids


@pytest.mark.parametrize(
    ("text", "number"),
    [("a_12.jpg", 12), ("12", 12), ("a_b_007.tar.gz", 7), ("a_.jpg", None), ("12a.jpg", None), ("", None), ("٣", None)],
)
def test_the_number_of_an_image_id(text, number):
    assert number_of(text) == number
    if number is not None:
        assert int(text.split(".")[0].split("_")[-1]) == number


def test_files_of_a_folder_come_in_the_order_of_their_numbers(tmp_path):
    for i in (10, 9, 1):
        columns = {"image": [JPEG], "caption": [[f"of {i}"]], "image_id": [f"{i}.jpg"], "split": ["train"]}
        write_arrow(tmp_path / f"in/conceptual_caption_train_{i}.arrow", columns)
    rows = take(tmp_path / "in", tmp_path / "d")
    assert [r["caption"] for r in rows] == ["of 1", "of 9", "of 10"]


def test_odd_columns_and_values(tmp_path):
    columns = {
        "image": [JPEG, None, b"", b"<html>"],
        "caption": [[], None, ["", "b"], ["c"]],
        "image_id": [1, 2, None, 4],
        "note": ["n", None, "m", ""],
        "more": [b"x"] * 4,
    }
    kinds = {"image": pa.large_binary(), "image_id": pa.int64(), "more": pa.binary()}
    rows = take(write_arrow(tmp_path / "x.arrow", columns, kinds, batch_rows=3), tmp_path / "d")
    assert [r["status"] for r in rows] == ["success", "no_image", "not_image", "not_image"]
    assert [(r["caption"], r["captions"]) for r in rows] == [(None, None), (None, None), ("", ["", "b"]), ("c", None)]
    assert [(r["image_id"], r["note"]) for r in rows] == [(1, "n"), (2, None), (None, "m"), (4, "")]
    assert "more" not in rows[0]


def test_the_parquet_beside_it_must_be_its_own(pairs, tmp_path):
    give(pairs, tmp_path / "out", layout="vg", split="train")
    for n, rows in (("less", slice(0, 9)), ("more", [*range(10), 0])):
        shutil.copytree(tmp_path / "out", tmp_path / n)
        table = pq.read_table(tmp_path / "out/vg.parquet")
        table = table[rows] if isinstance(rows, slice) else table.take(pa.array(rows))
        pq.write_table(table, tmp_path / n / "vg.parquet")
        with pytest.raises(PairmillError, match="beside it has another number of rows"):
            take(tmp_path / n, tmp_path / f"{n}-d")
    (tmp_path / "less/vg.parquet").unlink()
    rows = take(tmp_path / "less/vg.arrow", tmp_path / "alone")
    assert len(rows) == 10
    assert rows[0]["url"] is None
    assert take(tmp_path / "out/vg.arrow", tmp_path / "both")[0]["url"] == "http://example.com/0.jpg"


def test_damaged_files_are_named(tmp_path):
    columns = {"image": [JPEG] * 9, "caption": [["c"]] * 9, "image_id": ["1.jpg"] * 9, "split": ["train"] * 9}
    data = write_arrow(tmp_path / "whole.arrow", columns).read_bytes()
    (tmp_path / "cut.arrow").write_bytes(data[:-40])
    (tmp_path / "text.arrow").write_bytes(b"no arrow file at all" * 99)
    (tmp_path / "empty.arrow").write_bytes(b"")
    # offsets of the images, which lie one after the other: let one point far outside
    at = data.index(b"".join((len(JPEG) * i).to_bytes(4, "little") for i in range(4)))
    (tmp_path / "offset.arrow").write_bytes(data[: at + 8] + (2**31 - 1).to_bytes(4, "little") + data[at + 12 :])
    for name in ("cut", "text", "empty", "offset"):
        with pytest.raises(PairmillError, match=rf"{name}\.arrow is damaged, or no Arrow IPC file"):
            take(tmp_path / f"{name}.arrow", tmp_path / f"d-{name}")
    with pytest.raises(PairmillError, match=r"no \.arrow file there"):
        take(tmp_path / "none", tmp_path / "d")
    write_arrow(tmp_path / "q.arrow", {"image": [JPEG], "questions": [["?"]]}, {"questions": pa.list_(pa.string())})
    with pytest.raises(PairmillError, match=r"q\.arrow holds no pairs: .* found image binary, questions list"):
        take(tmp_path / "q.arrow", tmp_path / "d")


def test_a_store_gives_and_takes_them(pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("PAIRMILL_CACHE", str(tmp_path / "cache"))
    give(pairs, "memory://vilt/out", layout="sbu", split="train", shard_rows=5)
    rows = take("memory://vilt/out", tmp_path / "d")
    assert [r["uid"] for r in rows] == [r["uid"] for r in all_rows(pairs) if r["status"] == "success"]
