"""Region sets as TSV and LMDB: read by small readers of the layouts, and imported again."""

from __future__ import annotations

import base64
import csv
import io
import json
import sys
from pathlib import Path

import lmdb
import msgpack
import numpy as np
import pytest

from extractors.imports.config import ExportFeaturesConfig
from extractors.imports.export import export_features
from schemas.errors import PairmillError
from tests.extractors.imports import written
from tests.extractors.imports.test_import import ROWS, rows_of, run
from tests.make import SIZES, make_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Six rows with regions, class probabilities and attributes included; the fourth pair has failed."""
    place = tmp_path / "ds"
    make_dataset(place, shards=2, rows=3, fail={(1, 0): "timeout"})
    images = {str(i): written.regions(i, 3 + 5 * i, SIZES[i % 5]) for i in range(ROWS)}
    lines = []
    for key, r in images.items():
        r["probs"][np.arange(len(r["obj"])), 1 + r["obj"]] += 4  # the class is the likeliest one
        r["probs"] /= r["probs"].sum(1, keepdims=True)
        lines.append(written.lxmert(key, r).rstrip("\n") + "\t" + written.b64(r["probs"]) + "\n")
    (tmp_path / "f.tsv").write_text("".join(lines))
    fields = "img_id,img_h,img_w,objects_id,objects_conf,attrs_id,attrs_conf,num_boxes,boxes,features,cls_prob"
    run("tsv", tmp_path / "f.tsv", place, fields=fields)
    return place


def export(format: str, dataset: Path, target: Path, **settings):
    events: list = []
    export_features(format, dataset, target, ExportFeaturesConfig(**settings), events.append)
    return events


LXMERT = ["img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf"]
LXMERT += ["num_boxes", "boxes", "features"]
BUTD = ["image_id", "image_w", "image_h", "num_boxes", "boxes", "features"]


def read_tsv(path: Path, fields: list[str]) -> dict[str, dict]:
    """As LXMERT's loader reads it."""
    csv.field_size_limit(sys.maxsize)
    out = {}
    with path.open() as stream:
        for item in csv.DictReader(stream, fields, delimiter="\t"):
            n = int(item["num_boxes"])
            for name in fields[1:]:
                if name.endswith(("_h", "_w", "num_boxes")):
                    item[name] = int(item[name])
                    continue
                dtype = np.int64 if name.endswith("s_id") else np.float32
                shape = (n, -1) if name in ("boxes", "features") else (n,)
                item[name] = np.frombuffer(base64.b64decode(item[name]), dtype).reshape(shape)
            out[item[fields[0]]] = item
    return out


def same(one: dict, two: dict, columns, **tolerance) -> None:
    assert one["state"] == two["state"]
    for name in columns:
        if one[name] is None:
            assert two[name] is None
        else:
            np.testing.assert_allclose(two[name], one[name], err_msg=name, **tolerance)


@pytest.mark.parametrize("fields", ["lxmert", "butd"])
def test_tsv_is_what_the_layout_says(tmp_path, dataset, fields):
    export("tsv", dataset, tmp_path / "out.tsv", fields=fields)
    found = read_tsv(tmp_path / "out.tsv", LXMERT if fields == "lxmert" else BUTD)
    rows = [r for r in rows_of(dataset) if r["state"] == "ok"]
    assert list(found) == ["0", "1", "2", "4", "5"]
    for (key, item), row in zip(found.items(), rows, strict=True):
        width, height = SIZES[int(key) % 5]
        sides = ("img_w", "img_h") if fields == "lxmert" else ("image_w", "image_h")
        assert tuple(item[name] for name in sides) == (width, height)
        np.testing.assert_array_equal(item["features"].astype(np.float16), row["features"])
        np.testing.assert_array_equal(item["boxes"], row["boxes"])
        if fields == "lxmert":
            np.testing.assert_array_equal(item["objects_id"], row["obj_id"])
            np.testing.assert_array_equal(item["objects_conf"], row["obj_conf"])
            np.testing.assert_array_equal(item["attrs_id"], row["attr_id"])


def test_tsv_comes_back_equal(tmp_path, dataset):
    export("tsv", dataset, tmp_path / "out.tsv")
    run("tsv", tmp_path / "out.tsv", dataset, name="back")
    for one, two in zip(rows_of(dataset), rows_of(dataset, "back"), strict=True):
        exact = ("features", "det_conf", "obj_id", "obj_conf", "attr_id", "attr_conf", "num_boxes")
        same(one, two, exact, rtol=0)
        same(one, two, ["boxes"], rtol=1e-6)


def nd(value: dict) -> np.ndarray:
    return np.frombuffer(value[b"data"], np.dtype(value[b"type"])).reshape(value[b"shape"])


@pytest.mark.parametrize("compress", [True, False])
def test_lmdb_is_what_uniters_loader_opens_and_comes_back(tmp_path, dataset, compress):
    export("uniter-lmdb", dataset, tmp_path / "img_db", compress=compress)
    name = "feat_th0.2_max100_min10" + ("_compressed" if compress else "")
    counts = json.loads((tmp_path / "img_db/nbb_th0.2_max100_min10.json").read_text())
    env = lmdb.open(str(tmp_path / "img_db" / name), readonly=True, create=False, lock=False)
    rows = {str(i): r for i, r in enumerate(rows_of(dataset)) if r["state"] == "ok"}
    with env.begin() as transaction:
        assert json.loads(transaction.get(b"__keys__")) == list(counts) == [f"{k}.npz" for k in rows]
        for key, row in rows.items():
            data = transaction.get(f"{key}.npz".encode())
            if compress:
                dump = dict(np.load(io.BytesIO(data)))
            else:
                dump = {k: nd(v) for k, v in msgpack.unpackb(data).items()}
            assert {a.dtype for a in dump.values()} == {np.dtype(np.float16)}
            np.testing.assert_array_equal(dump["features"], row["features"])
            np.testing.assert_array_equal(dump["soft_labels"], row["cls_probs"])
            width, height = SIZES[int(key) % 5]
            shares = row["boxes"] / np.array([width, height, width, height])
            want = np.concatenate([shares, shares[:, 2:] - shares[:, :2]], axis=1)
            np.testing.assert_allclose(dump["norm_bb"], want, atol=1e-3)
            n = row["num_boxes"]
            assert counts[f"{key}.npz"] == min(n, np.clip((dump["conf"] > 0.2).sum(), 10, 100))
    env.close()
    run("uniter-lmdb", tmp_path / "img_db", dataset, name="back")
    for one, two in zip(rows_of(dataset), rows_of(dataset, "back"), strict=True):
        same(one, two, ("features", "cls_probs", "obj_id", "num_boxes"), rtol=0)
        same(one, two, ["det_conf"], atol=1e-3)
        same(one, two, ["boxes"], atol=0.1)  # norm_bb is float16


def test_an_export_is_not_made_twice_and_never_over_another_file(tmp_path, dataset):
    export("tsv", dataset, tmp_path / "out.tsv")
    before = (tmp_path / "out.tsv").read_bytes()
    assert any("stands already" in getattr(e, "text", "") for e in export("tsv", dataset, tmp_path / "out.tsv"))
    with pytest.raises(PairmillError, match="is something else already"):
        export("tsv", dataset, tmp_path / "out.tsv", fields="butd")
    assert (tmp_path / "out.tsv").read_bytes() == before


def test_what_cannot_be_exported(tmp_path, dataset):
    (tmp_path / "npy").mkdir()
    for i in range(ROWS):
        np.save(tmp_path / f"npy/{i}.npy", written.regions(i)["features"])
    run("npy", tmp_path / "npy", dataset, name="grid")
    with pytest.raises(PairmillError, match="row 0:0 has no boxes"):
        export("uniter-lmdb", dataset, tmp_path / "x", name="grid")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ds", "f.tsv", "npy", "x.PAIRMILL"]
    with pytest.raises(PairmillError, match=r"has no features/grit\. Did you mean `features/grid`"):
        export("tsv", dataset, tmp_path / "x", name="grit")
    with pytest.raises(PairmillError, match="There is no format `mmf-lmdb`"):
        export("mmf-lmdb", dataset, tmp_path / "x")
    (dataset / "features/regions/00001.arrow").unlink()
    with pytest.raises(PairmillError, match="1 shards are not up to date"):
        export("tsv", dataset, tmp_path / "x")


def test_images_of_one_name_are_not_lost(tmp_path):
    import pyarrow as pa

    make_dataset(
        tmp_path / "ds", shards=2, rows=2, carried=[pa.field("place", pa.string())],
        carry=lambda s, r: {"place": f"{s}{r}/{'image' if r else s}.jpg"},
    )  # fmt: skip
    lines = [written.lxmert(f"http://example.com/{i}.jpg", written.regions(i, 2, SIZES[i])) for i in range(4)]
    (tmp_path / "f.tsv").write_text("".join(lines))
    run("tsv", tmp_path / "f.tsv", tmp_path / "ds")
    with pytest.raises(PairmillError, match=r"2 rows have the name of another .* row 0:1, 01/image\.jpg.*such as uid"):
        export("tsv", tmp_path / "ds", tmp_path / "out.tsv", key="place")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ds", "f.tsv"]
    export("tsv", tmp_path / "ds", tmp_path / "out.tsv", key="uid")
    assert len(read_tsv(tmp_path / "out.tsv", LXMERT)) == 4


def test_an_image_of_several_rows_is_written_once(tmp_path):
    import pyarrow as pa

    make_dataset(
        tmp_path / "ds", shards=1, rows=4, carried=[pa.field("image_id", pa.string())],
        carry=lambda s, r: {"image_id": f"img{r // 2}"}, image=lambda s, r: np.zeros((8, 8, 3), np.uint8),
    )  # fmt: skip
    lines = [written.lxmert(f"img{i}", written.regions(i, 2, (8, 8))) for i in range(2)]
    (tmp_path / "f.tsv").write_text("".join(lines))
    run("tsv", tmp_path / "f.tsv", tmp_path / "ds", key="image_id")
    events = export("tsv", tmp_path / "ds", tmp_path / "out.tsv", key="image_id")
    assert list(read_tsv(tmp_path / "out.tsv", LXMERT)) == ["img0", "img1"]
    assert any("2 rows show an image that an earlier row has" in getattr(e, "text", "") for e in events)
