"""Karpathy files into datasets: every caption and image in place, and a killed import goes on."""

import json
import shutil

import pytest

from downstream.config import RetrievalImportConfig
from downstream.retrieval_import import import_retrieval
from schemas.errors import PairmillError
from schemas.events import Notice, silent
from shards.dataset import Dataset
from shards.reader import read_table
from tests.atomicity import assert_atomic, tree
from tests.make import encode, picture

SPLITS = ("train", "val", "test", "test", "restval", "test", "test")


def karpathy(folder, splits=SPLITS, coco=False, captions=5):
    """A split file and its images below `folder`; image i has the captions `i: caption j`."""
    records = []
    for i, split in enumerate(splits):
        name = f"COCO_val2014_{i:012}.jpg" if coco else f"{i}.jpg"
        path = folder / "images" / ("val2014" if coco else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(48, 32, seed=i)))
        sentences = [{"raw": f"{i}: caption {j}. ", "imgid": i, "sentid": 10 * i + j} for j in range(captions)]
        place = {"filepath": "val2014", "cocoid": 1000 + i} if coco else {}
        records.append({"filename": name, "imgid": i, "split": split, "sentences": sentences, **place})
    file = folder / "dataset_test.json"
    file.write_text(json.dumps({"dataset": "test", "images": records}))
    return file


def config(folder, **more):
    values = {"karpathy": folder / "dataset_test.json", "images": folder / "images", "shard_rows": 3, "threads": 2}
    return RetrievalImportConfig(**values | more)


def columns(dataset, stage, names):
    tables = [read_table(dataset.folder, dataset.stage(stage).file(s), names) for s in range(dataset.num_shards)]
    return [row for table in tables for row in table.to_pylist()]


def test_rows_are_images_and_captions_in_order(tmp_path):
    karpathy(tmp_path, coco=True)
    result = import_retrieval(tmp_path / "ds", config(tmp_path), silent)
    assert result.captions == {"test": 20, "train": 10, "val": 5}  # restval is COCO's train
    assert (result.images, result.missing, result.statuses) == (7, 0, {"success": 7})

    dataset = Dataset.open(tmp_path / "ds")
    assert dataset.manifest.shards == (3, 3, 1)
    pairs = columns(dataset, "pairs", None)
    for i, row in enumerate(pairs):
        name = f"val2014/COCO_val2014_{i:012}.jpg"
        assert row["image"] == (tmp_path / "images" / name).read_bytes()
        assert row["captions"] == [f"{i}: caption {j}. " for j in range(5)]
        assert row["caption"] == row["captions"][0]
        assert (row["image_id"], row["coco_id"], row["input_uid"]) == (i, 1000 + i, name)
        assert (row["width"], row["height"], row["format"]) == (48, 32, "jpeg")
    assert [r["source_split"] for r in pairs] == list(SPLITS)
    assert [r["split"] for r in pairs] == ["train", "val", "test", "test", "train", "test", "test"]

    tasks = columns(dataset, "tasks/retrieval", None)
    want = [(f"{10 * i + j}", f"{i}: caption {j}. ", [{"shard": i // 3, "row": i % 3}])
            for i in range(7) for j in range(5)]  # fmt: skip
    assert [(t["id"], t["text"], t["images"]) for t in tasks] == want
    assert [t["split"] for t in tasks] == [r["split"] for r in pairs for _ in range(5)]


def test_images_of_coco_are_found_without_their_folder_too(tmp_path):
    karpathy(tmp_path, coco=True)
    result = import_retrieval(tmp_path / "ds", config(tmp_path, images=tmp_path / "images" / "val2014"), silent)
    assert result.missing == 0


def test_one_split_and_another_name(tmp_path):
    karpathy(tmp_path)
    result = import_retrieval(tmp_path / "ds", config(tmp_path, split=("test",), name="flickr"), silent)
    assert (result.images, result.captions) == (4, {"test": 20})
    assert Dataset.open(tmp_path / "ds").require("tasks/flickr").counts(0) == {"test": 15}


def test_nothing_depends_on_the_threads_and_a_rerun_changes_nothing(tmp_path):
    karpathy(tmp_path)
    import_retrieval(tmp_path / "a", config(tmp_path, threads=1), silent)
    import_retrieval(tmp_path / "b", config(tmp_path, threads=4), silent)
    want = tree(tmp_path / "a")
    assert tree(tmp_path / "b") == want
    import_retrieval(tmp_path / "a", config(tmp_path), silent)
    assert tree(tmp_path / "a") == want


def test_killed_at_any_call_it_goes_on_to_the_same_bytes(tmp_path):
    karpathy(tmp_path, splits=("val", "test"), captions=2)

    def run(root):
        import_retrieval(root, config(tmp_path, threads=1, shard_rows=1), silent)

    run(tmp_path / "first")  # here, once, what pyarrow imports when it is first used
    calls = assert_atomic(lambda: (None, run), tmp_path / "tries", every=3)
    assert calls > 20


def test_missing_images_are_listed_and_refused(tmp_path):
    karpathy(tmp_path)
    (tmp_path / "images" / "1.jpg").unlink()
    (tmp_path / "images" / "5.jpg").unlink()
    with pytest.raises(PairmillError, match=r"2 of 7 images are not in .*: 1\.jpg, 5\.jpg\. .*--allow-missing"):
        import_retrieval(tmp_path / "ds", config(tmp_path), silent)
    assert not (tmp_path / "ds").exists()


def test_missing_and_broken_images_keep_their_rows(tmp_path):
    karpathy(tmp_path)
    images = tmp_path / "images"
    (images / "1.jpg").unlink()
    (images / "3.jpg").write_text("<html>gone</html>")
    (images / "4.jpg").write_bytes((images / "4.jpg").read_bytes()[:40])
    said = []
    result = import_retrieval(tmp_path / "ds", config(tmp_path, allow_missing=True), said.append)
    assert result.statuses == {"decode_error": 1, "missing_file": 1, "not_image": 1, "success": 4}
    assert result.missing == 3
    assert result.captions == {"test": 20, "train": 10, "val": 5}  # none dropped
    warnings = [e.text for e in said if isinstance(e, Notice) and e.warning]
    assert any("1 of 7 images" in w and "1.jpg" in w for w in warnings)
    assert any(w.startswith("2 files are no images") for w in warnings)
    rows = columns(Dataset.open(tmp_path / "ds"), "pairs", ["status", "image", "captions"])
    assert [r["status"] for r in rows][1] == "missing_file"
    assert all((r["image"] is None) == (r["status"] != "success") for r in rows)
    assert all(len(r["captions"]) == 5 for r in rows)


def test_errors_name_what_to_do(tmp_path):
    karpathy(tmp_path, splits=("train", "val"))
    with pytest.raises(PairmillError, match="has no image of the split test"):
        import_retrieval(tmp_path / "ds", config(tmp_path, split=("test",)), silent)
    with pytest.raises(PairmillError, match=r"There is no folder .*nowhere\. Pass --images"):
        import_retrieval(tmp_path / "ds", config(tmp_path, images=tmp_path / "nowhere"), silent)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PairmillError, match="is not JSON"):
        import_retrieval(tmp_path / "ds", config(tmp_path, karpathy=tmp_path / "bad.json"), silent)
    with pytest.raises(ValueError, match="must be the name of a folder"):
        config(tmp_path, name="../x")


def test_another_file_into_the_same_folder_is_refused(tmp_path):
    karpathy(tmp_path)
    import_retrieval(tmp_path / "ds", config(tmp_path), silent)
    before = tree(tmp_path / "ds")
    other = tmp_path / "other"
    karpathy(other, splits=("test",))
    with pytest.raises(PairmillError, match=r"`karpathy` was '[0-9a-f]{64}', now .*another -o"):
        import_retrieval(tmp_path / "ds", config(other), silent)
    assert tree(tmp_path / "ds") == before
    shutil.rmtree(other)
