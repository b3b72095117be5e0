"""Joining rows and entries by what names the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extractors.imports.keys import NOTHING, Entries, Hashes, join, name_of, number_of
from schemas.errors import PairmillError
from shards.dataset import Dataset
from shards.reader import MappedShard
from tests.extractors.imports import written
from tests.extractors.imports.test_import import run
from tests.make import make_dataset


@pytest.mark.parametrize(
    ("key", "name", "number"),
    [
        (
            "http://images.org/train2014/COCO_train2014_000000391895.jpg?x=1.png",
            "COCO_train2014_000000391895",
            "391895",
        ),
        ("https://host/a%20b_07.JPEG", "a b_07", "7"),
        ("coco_train2014_000000391895.npz", "coco_train2014_000000391895", "391895"),
        ("train/COCO_1.npy", "COCO_1", "1"),
        ("nlvr2_dev-0-0-img0", "nlvr2_dev-0-0-img0", "0"),
        ("000", "000", "0"),
        ("v1.2", "v1.2", "2"),
        ("a.b.jpg.npz", "a.b.jpg", None),
        ("no number here", "no number here", None),
    ],
)
def test_names_and_numbers(key, name, number):
    assert name_of(key) == name
    assert number_of(name) == number


def joined(rows: list[str | None], entries: list[str]):
    left, right = Hashes(), Entries()
    for key in rows:
        left.add(key)
    for place, key in enumerate(entries):
        right.add(key, place)
    return join(left, np.array([key is not None for key in rows], bool), right), right


KEY = st.sampled_from(["a_1", "a_2", "b_1", "b_02", "c", "7", "x/7.jpg", "07"])


@given(st.lists(st.none() | KEY, max_size=8), st.lists(KEY, max_size=8))
def test_a_join_is_that_of_two_loops(rows, entries):
    found, right = joined(rows, entries)

    def plain(rule: str) -> list[int]:
        def value(key):
            return name_of(key) if rule == "name" else number_of(name_of(key))

        def several(keys):
            """Values that stand for more than one key by name, or for more than one name by number."""
            own = {v: {k if rule == "name" else name_of(k) for k in keys if value(k) == v} for v in map(value, keys)}
            return {v for v, found in own.items() if len(found) > 1}

        def shared(key, keys):
            return len({k for k in keys if name_of(k) == name_of(key)}) > 1

        asked = [r for r in rows if r is not None]
        bad = several(asked) | several(entries) | {None}
        out = []
        for row in rows:
            want = None if row is None or shared(row, asked) else value(row)
            same = [i for i, e in enumerate(entries) if value(e) == want and not shared(e, entries)]
            out.append(same[0] if want not in bad and same else NOTHING)
        return out

    def matched(entry):
        return sum(e != NOTHING for e in entry)

    by_name, by_number = plain("name"), plain("number")
    best = by_name if matched(by_name) >= matched(by_number) else by_number
    assert found.rule == ("name" if best is by_name else "number")
    assert found.entry.tolist() == best
    assert found.lonely_rows().tolist() == [i for i, e in enumerate(best) if e == NOTHING and rows[i] is not None]
    firsts = [i for i, e in enumerate(entries) if e not in entries[:i]]
    assert right.hashes.firsts().tolist() == firsts
    assert found.lonely_entries(right).tolist() == [i for i in firsts if i not in best]


def test_a_number_of_two_names_joins_nothing():
    found, _ = joined(["train_5", "val_6"], ["5", "test_6", "other_6"])
    assert found.rule == "number"
    assert found.entry.tolist() == [0, NOTHING]


def test_a_name_of_two_images_joins_nothing():
    left, right = Hashes(), Entries()
    for key, sha256 in (("1/a.jpg", b"1" * 32), ("2/a.jpg", b"2" * 32), ("1/b.jpg", b"3" * 32), ("2/b.jpg", b"3" * 32)):
        left.add(key, sha256)
    for key in ("a", "b"):
        right.add(key)
    assert left.shared().tolist() == [True, True, False, False]
    assert join(left, np.ones(4, bool), right).entry.tolist() == [NOTHING, NOTHING, 1, 1]


def write_tsv(path: Path, keys: list[str]) -> Path:
    path.write_text("".join(written.lxmert(k, written.regions(1, 2, (10, 10))) for k in keys))
    return path


@pytest.fixture
def square(tmp_path: Path) -> Path:
    """200 rows http://example.com/0.jpg ...; `coco` holds COCO_val_000000001000 ..."""
    fields = [pa.field("coco", pa.string()), pa.field("number", pa.int64())]
    make_dataset(
        tmp_path / "ds", shards=2, rows=100, image=lambda s, r: np.zeros((8, 8, 3), np.uint8), carried=fields,
        carry=lambda s, r: {"coco": f"COCO_val_{1000 + 100 * s + r:012}", "number": 1000 + 100 * s + r},
    )  # fmt: skip
    return tmp_path / "ds"


def texts(events: list) -> str:
    return " ".join(getattr(e, "text", "") for e in events)


def test_under_99_percent_is_an_error_that_names_both_sides(tmp_path, square):
    keys = [str(i) for i in range(3, 200)] + ["odd", "even"]
    path = write_tsv(tmp_path / "f.tsv", keys)
    with pytest.raises(PairmillError) as error:
        run("tsv", path, square)
    text = str(error.value)
    assert "Only 197 of 200 rows are in" in text
    assert "Rows without an entry: 3 (http://example.com/0.jpg, http://example.com/1.jpg" in text
    assert "Entries without a row: 2 (odd, even)" in text
    assert not (square / "features").exists()
    events: list = []
    assert run("tsv", path, square, events, allow_missing=True).counts == {"ok": 197, "missing_file": 3}
    assert "197 of 200 rows" in texts(events)
    row = MappedShard(Dataset.open(square).folder, "features/regions/00000.arrow").row(0)
    assert (row["state"], row["features"]) == ("missing_file", None)


def test_99_percent_is_enough_and_said(tmp_path, square):
    events: list = []
    run("tsv", write_tsv(tmp_path / "f.tsv", [str(i) for i in range(2, 200)]), square, events)
    assert "198 of 200 rows are in" in texts(events)
    assert "joined by the name of the image (url)" in texts(events)
    assert any(getattr(e, "warning", False) for e in events)


@pytest.mark.parametrize("column", ["coco", "number"])
def test_a_column_names_the_image(tmp_path, square, column):
    events: list = []
    path = write_tsv(tmp_path / "f.tsv", [str(1000 + i) for i in range(200)])
    assert run("tsv", path, square, events, key=column).counts == {"ok": 200}
    rule = "the number that names end with" if column == "coco" else "the name of the image"
    assert f"joined by {rule} ({column})" in texts(events)
    with pytest.raises(PairmillError, match=r"no such column\. Did you mean `coco`"):
        run("tsv", path, square, key="coca", name="b")


def test_a_rerun_keeps_the_rule(tmp_path, square):
    path = write_tsv(tmp_path / "f.tsv", [str(1000 + i) for i in range(200)])
    run("tsv", path, square, key="coco")
    stage = Dataset.open(square).stage("features/regions")
    assert stage.sidecar().recorded == {"joined_by": "number"}
    (square / "features/regions/00001.arrow").unlink()
    assert run("tsv", path, square, key="coco").counts == {"ok": 100}


def test_an_image_that_comes_twice(tmp_path, square):
    keys = [str(i) for i in range(200)]
    path = write_tsv(tmp_path / "f.tsv", [*keys, "7", "8"])
    events: list = []
    assert run("tsv", path, square, events).counts == {"ok": 200}
    assert "Entries without a row: none" in texts(events)
    run("tsv", path, tmp_path / "new", events, new=True)
    assert len(Dataset.open(tmp_path / "new")) == 200
    assert "2 entries have a key that an earlier one has" in texts(events)


def test_images_of_one_name_are_told_and_joined_by_a_column(tmp_path):
    """Web addresses end in the same file name all the time."""
    field = pa.field("name", pa.string())
    make_dataset(
        tmp_path / "ds", shards=1, rows=8, image=lambda s, r: np.full((8, 8, 3), 9 * (r // 2), np.uint8), kind="png",
        carried=[field], carry=lambda s, r: {"name": f"http://host/{r}/{'image' if r < 4 else r}.png"},
    )  # fmt: skip
    path = write_tsv(tmp_path / "f.tsv", ["image", "4", "5", "6", "7"])
    with pytest.raises(PairmillError) as error:
        run("tsv", path, tmp_path / "ds", key="name")
    assert "Only 4 of 8 rows" in str(error.value)
    assert "another image's, too, and joins nothing: 4 (http://host/0/image.png, " in str(error.value)
    events: list = []
    counts = run("tsv", path, tmp_path / "ds", events, key="name", allow_missing=True).counts
    assert counts == {"ok": 4, "missing_file": 4}

    make_dataset(tmp_path / "same", shards=1, rows=4, image=lambda s, r: np.zeros((8, 8, 3), np.uint8), kind="png",
                 carried=[field], carry=lambda s, r: {"name": f"http://host/{r}/image.png"})  # fmt: skip
    assert run("tsv", path, tmp_path / "same", key="name", allow_missing=True).counts == {"ok": 4}


def test_entries_of_one_name_are_told(tmp_path, square):
    path = write_tsv(tmp_path / "f.tsv", [*(str(i) for i in range(200)), "a/3.jpg"])
    events: list = []
    assert run("tsv", path, square, events).counts == {"ok": 199, "missing_file": 1}
    assert "Entries whose name is another's, too, and joins nothing: 2 (3, a/3.jpg)" in texts(events)
    assert run("tsv", path, tmp_path / "new", new=True).counts == {"ok": 201}
