"""Every format into a dataset: values, boxes, order, states of rows that cannot be read."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import lz4.frame
import numpy as np
import pytest

from extractors.imports.config import ImportFeaturesConfig
from extractors.imports.run import import_features
from schemas.errors import PairmillError
from schemas.features import about
from shards.dataset import PAIRS, Dataset
from shards.reader import MappedShard, read_table
from tests.extractors.imports import written
from tests.extractors.imports.written import C, D
from tests.make import SIZES, make_dataset

ROWS = 6
VOCABULARY = ["dog", "cat", "car", "tree", "man"]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two shards of three pairs, http://example.com/0.jpg to 5.jpg."""
    make_dataset(tmp_path / "ds", shards=2, rows=3)
    return tmp_path / "ds"


@pytest.fixture
def images() -> dict[str, dict]:
    """Regions of the images as the detector saw them: twice as large as the stored ones."""
    return {str(i): written.regions(i, n=3 + i, size=(2 * SIZES[i % 5][0], 2 * SIZES[i % 5][1])) for i in range(ROWS)}


def rows_of(place: Path, name: str = "regions") -> list[dict]:
    dataset = Dataset.open(place)
    stage = dataset.stage(f"features/{name}")
    shards = [MappedShard(dataset.folder, stage.file(s)) for s in range(dataset.num_shards)]
    return [shard.row(r) for shard in shards for r in range(len(shard))]


def run(format: str, path: Path, dataset: Path, events: list | None = None, **settings):
    config = ImportFeaturesConfig(workers=0, **settings)
    return import_features(format, str(path), dataset, config, (events if events is not None else []).append)


def names_file(tmp_path: Path) -> str:
    (tmp_path / "classes.txt").write_text("".join(f"{name},synonym\n" for name in VOCABULARY))
    return str(tmp_path / "classes.txt")


def written_as(kind: str, place: Path, images: dict) -> tuple[str, Path]:
    """(format, path) of the images written in one of the layouts."""
    lines = {
        "lxmert": written.lxmert,
        "butd": written.butd,
        "vilbert": lambda k, r: written.butd(k, r, probs=True),
        "vinvl": written.vinvl,
        "vinvl3": lambda k, r: written.vinvl(k, r, 3),
        "predictions": lambda k, r: written.predictions(k, r, VOCABULARY),
    }
    if kind in lines:
        (place / "f.tsv").write_text("".join(lines[kind](k, r) for k, r in images.items()))
        return "tsv", place / "f.tsv"
    if kind.startswith("uniter"):
        dumps = {
            "uniter": written.npz,
            "uniter-msgpack": written.numpy_msgpack,
            "uniter-lz4": lambda v: lz4.frame.compress(written.numpy_msgpack(v)),
        }
        return "uniter-lmdb", written.uniter_lmdb(place / "db", images, dumps[kind])
    if kind.startswith("mmf"):
        return "mmf-lmdb", written.mmf_lmdb(place / "db.lmdb", images, 5 if kind == "mmf-5" else 4)
    folder = place / "files"
    folder.mkdir()
    for name, r in images.items():
        if kind == "pythia":
            np.save(folder / f"{name}.npy", r["features"])
            values = written.mmf_values(r)
            np.save(folder / f"{name}_info.npy", {k: v for k, v in values.items() if k != "features"})
        elif kind == "milvlg":
            w, h = r["size"]
            info = {"image_id": name, "objects_id": r["obj"], "objects_conf": r["conf"]}
            whole = {"num_bbox": len(r["boxes"]), "image_h": h, "image_w": w, "info": info}
            np.savez_compressed(folder / f"{name}.npz", x=r["features"], bbox=r["boxes"], **whole)
        else:
            np.savez_compressed(folder / f"{name}.npz", **written.uniter_values(r))
    return "npy" if kind == "pythia" else "npz", folder


KINDS = {
    "lxmert": {"conf", "ids", "attributes"},
    "butd": set(),
    "vilbert": {"probs"},
    "vinvl": set(),
    "vinvl3": set(),
    "predictions": {"conf", "ids", "scale-free"},
    "uniter": {"conf", "probs", "half"},
    "uniter-msgpack": {"conf", "probs", "half"},
    "uniter-lz4": {"conf", "probs", "half"},
    "mmf": {"probs", "ids"},
    "mmf-5": {"probs", "ids"},
    "pythia": {"probs", "ids"},
    "milvlg": {"milvlg"},
    "npz-files": {"conf", "probs", "half"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_format_becomes_regions(tmp_path, dataset, images, kind):
    has = KINDS[kind]
    format, path = written_as(kind, tmp_path, images)
    if "scale-free" in has:  # no image size in the file: boxes are px of the original, which is the stored one here
        images = {k: written.regions(int(k), 3 + int(k), SIZES[int(k) % 5]) for k in images}
        format, path = written_as(kind, tmp_path, images)
    names = {"classes": names_file(tmp_path)} if kind == "predictions" else {}
    assert run(format, path, dataset, **names).counts == {"ok": ROWS}
    for i, row in enumerate(rows_of(dataset)):
        want = images[str(i)]
        width, height = SIZES[i % 5]
        scale = np.array([width, height] * 2) / np.array([*want["size"]] * 2)
        n = len(want["boxes"])
        assert row["num_boxes"] == n
        assert row["error"] is None
        if "milvlg" in has:
            continue
        np.testing.assert_array_equal(row["features"], want["features"].astype(np.float16))
        np.testing.assert_allclose(row["boxes"], want["boxes"] * scale, atol=0.1 if "half" in has else 1e-4)
        assert (row["det_conf"] is None) == ("conf" not in has)
        if "conf" in has:
            np.testing.assert_allclose(row["det_conf"], want["conf"], atol=5e-4)
        if "ids" in has:
            np.testing.assert_array_equal(row["obj_id"], want["obj"])
        if "attributes" in has:
            np.testing.assert_array_equal(row["attr_id"], want["attr"])
            np.testing.assert_allclose(row["attr_conf"], want["attr_conf"])
        if "probs" in has:
            assert row["cls_probs"].shape == (n, C + 1)
            np.testing.assert_allclose(row["cls_probs"], want["probs"], atol=2e-3)
            ids = want["obj"] if "ids" in has else row["cls_probs"][:, 1:].argmax(1)
            np.testing.assert_array_equal(row["obj_id"], ids)
            np.testing.assert_allclose(row["obj_conf"], row["cls_probs"][np.arange(n), ids + 1], atol=1e-6)


def test_the_file_is_identity(tmp_path, dataset, images):
    format, path = written_as("lxmert", tmp_path, images)
    run(format, path, dataset)
    sidecar = Dataset.open(dataset).stage("features/regions").sidecar()
    assert sidecar.identity["file"]["bytes"] == path.stat().st_size
    assert len(sidecar.identity["file"]["sha256"]) == 64
    assert sidecar.identity["file"]["fields"][0] == "img_id"
    assert sidecar.recorded == {"joined_by": "name"}
    path.write_text("".join(written.lxmert(k, written.regions(9, 2)) for k in images))
    with pytest.raises(PairmillError, match="was made with other settings: `file` was"):
        run(format, path, dataset)
    moved = path.rename(tmp_path / "moved.tsv")
    run(format, moved, dataset, name="beside")
    assert about(MappedShard(Dataset.open(dataset).folder, "features/beside/00000.arrow").schema)["classes"][:2] == [
        "0",
        "1",
    ]


def test_milvlg_counts_the_background(tmp_path, dataset, images):
    """Class 0 of its ids is the background: such a box has confidence 0 and goes last."""
    for r in images.values():
        r["obj"] = np.arange(len(r["obj"]))[::-1] % (C + 1)
    format, path = written_as("milvlg", tmp_path, images)
    run(format, path, dataset)
    for i, row in enumerate(rows_of(dataset)):
        ids, conf = images[str(i)]["obj"], images[str(i)]["conf"]
        order = np.argsort(-np.where(ids > 0, conf, 0), kind="stable")
        np.testing.assert_array_equal(row["obj_id"], np.maximum(ids - 1, 0)[order])
        np.testing.assert_allclose(row["det_conf"], np.where(ids > 0, conf, 0)[order])
        np.testing.assert_array_equal(row["features"], images[str(i)]["features"][order].astype(np.float16))


def test_rows_are_sorted_by_confidence(tmp_path, dataset, images):
    for r in images.values():
        r["conf"] = r["conf"][::-1].copy()
    format, path = written_as("lxmert", tmp_path, images)
    run(format, path, dataset)
    for i, row in enumerate(rows_of(dataset)):
        np.testing.assert_allclose(row["det_conf"], images[str(i)]["conf"][::-1])
        np.testing.assert_array_equal(row["features"], images[str(i)]["features"][::-1].astype(np.float16))


def test_bad_lines_become_rows_with_a_reason_and_nothing_is_lost(tmp_path, dataset, images):
    lines = [written.lxmert(k, r) for k, r in images.items()]
    lines[1] = lines[1].replace(written.b64(images["1"]["features"]), "!!no base64!!")
    lines[2] = written.lxmert("2", {**images["2"], "features": images["2"]["features"][:, : D // 2]})
    lines[3] = written.lxmert("3", {**images["3"], "features": images["3"]["features"][:-1]})
    lines[4] = "\n" + written.lxmert("4", {**images["4"], "size": (500, 100)})
    lines[5] = lines[5][:-20]
    path = tmp_path / "f.tsv"
    path.write_text("".join(lines))
    events: list = []
    assert run("tsv", path, dataset, events).counts == {"ok": 1, "decode_error": 4, "truncated": 1}
    rows = rows_of(dataset)
    assert [r["state"] for r in rows] == ["ok", *["decode_error"] * 4, "truncated"]
    assert all(r["features"] is None and r["num_boxes"] is None for r in rows[1:])
    for row, reason in zip(
        rows[1:],
        ["bad base64", "4 wide, those of the set 8", "do not make", "500 x 100 px, this pair's has", "ends inside"],
        strict=True,
    ):
        assert reason in row["error"], row["error"]
    place = len("".join(lines[:5]))
    assert any(f"last line, 7 (byte {place:,}): the file was cut short" in getattr(e, "text", "") for e in events)
    assert f"byte {place}" in rows[5]["error"]


def test_a_line_cut_inside_its_key_is_told(tmp_path, dataset, images):
    (tmp_path / "f.tsv").write_text("".join(written.lxmert(k, r) for k, r in images.items()) + "77")
    events: list = []
    assert run("tsv", tmp_path / "f.tsv", dataset, events).counts == {"ok": ROWS}
    assert any("cut short. It names no image." in getattr(e, "text", "") for e in events)


def test_a_last_line_without_its_newline_is_whole(tmp_path, dataset, images):
    (tmp_path / "f.tsv").write_text("".join(written.lxmert(k, r) for k, r in images.items())[:-1])
    events: list = []
    assert run("tsv", tmp_path / "f.tsv", dataset, events).counts == {"ok": ROWS}
    assert not any("cut short" in getattr(e, "text", "") for e in events)


def test_float16_read_as_float32_is_told(tmp_path, dataset):
    wide = written.regions(0, 2)
    wide["features"] = np.ones((2, 2048), np.float32)
    path = tmp_path / "f.tsv"
    path.write_text("".join(written.vinvl(str(i), wide, 2, "<f2") for i in range(ROWS)))
    with pytest.raises(PairmillError, match=r"1027 numbers are half of VinVL's 2054.*--dtype float16"):
        run("tsv", path, dataset)
    assert not (dataset / "features").exists()
    assert run("tsv", path, dataset, dtype="float16").counts["ok"] >= 1
    assert rows_of(dataset)[0]["features"].shape == (2, 2048)


def test_columns_can_be_named(tmp_path, dataset, images):
    cells = [written.butd(k, r).rstrip("\n").split("\t") for k, r in images.items()]
    path = tmp_path / "f.tsv"
    path.write_text("".join("\t".join([c[1], c[2], "x", *c[3:], c[0]]) + "\n" for c in cells))
    fields = "image_w,image_h,,num_boxes,boxes,features,image_id"
    assert run("tsv", path, dataset, fields=fields).counts == {"ok": ROWS}
    with pytest.raises(PairmillError, match=r"no `image_i`\. Did you mean `image_id`"):
        run("tsv", path, dataset, name="b", fields=fields[:-1])
    path.write_text("".join("\t".join(c[:5]) + "\n" for c in cells))
    with pytest.raises(PairmillError, match="has 5 columns; known are files of 2, 3, 6, 7, 10"):
        run("tsv", path, dataset, name="b")


def test_failed_pairs_keep_their_status(tmp_path, images):
    make_dataset(tmp_path / "ds", shards=2, rows=3, fail={(0, 1): "timeout"})
    format, path = written_as("butd", tmp_path, images)
    assert run(format, path, tmp_path / "ds").counts == {"ok": 5, "timeout": 1}


def test_a_killed_import_goes_on_to_equal_bytes(tmp_path, dataset, images):
    format, path = written_as("uniter", tmp_path, images)
    run(format, path, dataset)
    second = dataset / "features/regions/00001.arrow"
    before = second.read_bytes()
    second.unlink()
    assert run(format, path, dataset).done == 1
    assert second.read_bytes() == before


@pytest.mark.slow
def test_worker_processes_write_the_same(tmp_path, dataset, images):
    format, path = written_as("lxmert", tmp_path, images)
    run(format, path, dataset)
    import_features(format, str(path), dataset, ImportFeaturesConfig(name="two", workers=2))
    for shard in ("00000", "00001"):
        one, two = (dataset / f"features/{name}/{shard}.arrow" for name in ("regions", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_no_class_of_a_pickle_is_made(tmp_path, dataset, images):
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    values = {**written.mmf_values(images["0"]), "features": Evil()}
    records = {k: pickle.dumps(values if k == "0" else written.mmf_values(r)) for k, r in images.items()}
    path = written.write_lmdb(tmp_path / "db", records, (b"keys", pickle.dumps([k.encode() for k in records])))
    assert run("mmf-lmdb", path, dataset).counts == {"ok": 5, "decode_error": 1}
    assert not marker.exists()


def test_a_database_without_its_list_of_keys(tmp_path, dataset, images):
    path = written.uniter_lmdb(tmp_path / "db", images, keys=False)
    with pytest.raises(PairmillError, match="no record `__keys__`, which is written last"):
        run("uniter-lmdb", path, dataset)
    assert run("uniter-lmdb", path, dataset, allow_missing=True).counts == {"ok": ROWS}


def test_a_database_cut_short(tmp_path, dataset, images):
    path = written.uniter_lmdb(tmp_path / "db", images)
    data = (path / "data.mdb").read_bytes()
    (path / "data.mdb").write_bytes(data[: len(data) - 4096])
    with pytest.raises(PairmillError, match="cut short"):
        run("uniter-lmdb", path, dataset)


def test_a_damaged_record_is_one_row(tmp_path, dataset, images):
    records = {f"{k}.npz": written.npz(written.uniter_values(r)) for k, r in images.items()}
    records["2.npz"] = records["2.npz"][:100]
    keys = (b"__keys__", json.dumps(list(records)).encode())
    path = written.write_lmdb(tmp_path / "db", records, keys)
    assert run("uniter-lmdb", path, dataset).counts == {"ok": 5, "decode_error": 1}
    assert "2.npz: a damaged npz file" in rows_of(dataset)[2]["error"]


def test_without_the_package(tmp_path, dataset, images, monkeypatch):
    path = written.uniter_lmdb(tmp_path / "db", images)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(PairmillError, match=r"pip install 'pairmill\[lmdb\]'"):
        run("uniter-lmdb", path, dataset)


@pytest.mark.parametrize(
    ("format", "make", "message"),
    [
        ("tsv", lambda p: p.write_text(""), "is empty"),
        ("tsv", lambda p: None, "no such TSV file"),
        ("tsv", lambda p: p.write_text("1\t2\tA\n"), "none of its first entries can be read"),
        ("npz", lambda p: p.mkdir(), "no .npz file in this folder"),
        ("npy", lambda p: None, "no such file or folder"),
        ("uniter-lmdb", lambda p: p.mkdir(), "no data.mdb there"),
        ("mmf-lmdb", lambda p: p.write_bytes(b"x" * 9000), "cannot be opened as LMDB"),
        ("hdf5", lambda p: None, "There is no format `hdf5`"),
    ],
)
def test_what_is_no_features_file(tmp_path, dataset, format, make, message):
    make(tmp_path / "x")
    with pytest.raises(PairmillError, match=message):
        run(format, tmp_path / "x", dataset)
    assert not (dataset / "features").exists()


def test_new_makes_rows_without_images(tmp_path, images):
    format, path = written_as("lxmert", tmp_path, images)
    assert run(format, path, tmp_path / "new", new=True, shard_rows=4).counts == {"ok": ROWS}
    made = Dataset.open(tmp_path / "new")
    assert made.manifest.shards == (4, 2)
    pairs = [p for s in range(2) for p in read_table(made.folder, made.stage(PAIRS).file(s)).to_pylist()]
    assert [p["key"] for p in pairs] == list(images)
    assert {p["status"] for p in pairs} == {"no_image"}
    for row, pair, r in zip(rows_of(tmp_path / "new"), pairs, images.values(), strict=True):
        assert (pair["original_width"], pair["original_height"]) == r["size"]
        np.testing.assert_allclose(row["boxes"], r["boxes"], atol=1e-4)
    (tmp_path / "new/features/regions/00001.arrow").unlink()
    assert run(format, path, tmp_path / "new", new=True, shard_rows=4).done == 1
    run(format, path, tmp_path / "new", name="again")  # joined on `key`, since there is no url
    assert len(rows_of(tmp_path / "new", "again")) == ROWS
    with pytest.raises(PairmillError, match="holds another dataset"):
        run(format, path, tmp_path / "new", new=True, shard_rows=5)


def test_boxes_of_images_of_unknown_size_are_shares(tmp_path, images):
    path = written.uniter_lmdb(tmp_path / "db", images)
    run("uniter-lmdb", path, tmp_path / "new", new=True)
    for row, r in zip(rows_of(tmp_path / "new"), images.values(), strict=True):
        np.testing.assert_allclose(row["boxes"], r["boxes"] / np.array([*r["size"]] * 2), atol=1e-3)
