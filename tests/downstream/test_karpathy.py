"""Karpathy split files: what is read, and what each malformed file is told."""

import json

import pytest

from downstream.karpathy import read_karpathy
from schemas.errors import PairmillError


def record(number, split, captions=("a", "b"), **more):
    sentences = [
        {"raw": c, "tokens": c.split(), "imgid": number, "sentid": number * 10 + i} for i, c in enumerate(captions)
    ]
    base = {"filename": f"{number}.jpg", "imgid": number, "sentids": [], "split": split}
    return base | {"sentences": sentences} | more


@pytest.fixture
def write(tmp_path):
    def to_file(content):
        path = tmp_path / "dataset.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return to_file


def test_coco(write):
    name = "COCO_val2014_000000000042.jpg"
    images = [
        record(0, "restval", filename=name, filepath="val2014", cocoid=42),
        record(1, "test", ("A dog. ", "A dog. ", "Zwei Hunde")),
        record(2, "train"),
    ]
    path = write({"dataset": "coco", "images": images})
    got = list(read_karpathy(path))
    assert [i.split for i in got] == ["train", "test", "train"]
    assert [i.source_split for i in got] == ["restval", "test", "train"]
    assert got[0].path == f"val2014/{name}"
    assert (got[0].coco_id, got[1].coco_id) == (42, None)
    # Order kept, the duplicate too: COCO's test split must have 25,010 captions.
    assert got[1].captions == ("A dog. ", "A dog. ", "Zwei Hunde")
    assert got[1].sentence_ids == (10, 11, 12)
    assert [i.image_id for i in read_karpathy(path, splits=("train",))] == [0, 2]


def test_flickr_has_no_folder(write):
    (image,) = read_karpathy(write({"dataset": "flickr30k", "images": [record(7, "val")]}))
    assert image.path == "7.jpg"
    assert image.filepath == ""


def without(name):
    return {k: v for k, v in record(0, "test").items() if k != name}


BAD_SENTENCE = [{"raw": "fine", "sentid": 0}, {"raw": None, "sentid": 1}]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"images": [', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([1, 2], "has no list `images`"),
        ({"images": []}, "has no list `images`"),
        ({"images": [3]}, "image 0: want an object, got 3"),
        ({"images": [record(0, "test"), without("imgid")]}, "image 1: `imgid` is missing"),
        ({"images": [without("filename") | {"file_name": "x"}]}, "Did you mean `file_name`"),
        ({"images": [record(0, "test", filename="")]}, "image 0: `filename` is empty"),
        ({"images": [record(0, "dev")]}, "`split` must be one of train, restval, val, test, got `dev`"),
        ({"images": [record(0, "test", ())]}, "`sentences` is empty"),
        ({"images": [record(0, "test", imgid="0")]}, '`imgid` must be int, got "0"'),
        ({"images": [record(0, "test", imgid=True)]}, "`imgid` must be int, got true"),
        ({"images": [record(0, "test", sentences=BAD_SENTENCE)]}, "sentence 1: `raw` must be str, got null"),
        ({"images": [record(0, "test", filename="../../etc/passwd")]}, "leads out of the images' folder"),
        ({"images": [record(0, "test", filename="/etc/passwd")]}, "leads out of the images' folder"),
        ({"images": [record(0, "test", filepath="..\\x")]}, "leads out of the images' folder"),
    ],
)
def test_malformed_files_are_told(write, content, text):
    with pytest.raises(PairmillError, match=text.replace("[", r"\[")) as error:
        list(read_karpathy(write(content)))
    assert "dataset.json" in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(PairmillError, match=r"Cannot read .*No such file"):
        list(read_karpathy(tmp_path / "none.json"))


def test_not_text(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PairmillError, match="is not JSON"):
        list(read_karpathy(path))


def test_unknown_split(write):
    with pytest.raises(PairmillError, match=r"got `tests`\. Did you mean `test`"):
        list(read_karpathy(write({"images": [record(0, "test")]}), splits=("tests",)))
