"""DataComp's metadata: scores and embeddings reach the rows they belong to, a filter's choice goes out again."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.check import check
from curation.exporting import export_pairs
from curation.filter import filter_dataset
from curation.filter_config import FilterConfig
from curation.importing import import_pairs
from curation.maintenance_config import CheckConfig, ExportConfig, ImportConfig
from schemas.errors import PairmillError
from schemas.events import silent
from shards.dataset import Dataset
from tests.atomicity import assert_atomic
from tests.curation.samples import all_features, all_rows, whole_dataset

DIMS = {"b32": 4, "l14": 6}


def write_metadata(root, name: str, first: int, rows: int, npz: bool = True, **arrays) -> None:
    root.mkdir(exist_ok=True, parents=True)
    numbers = range(first, first + rows)
    columns = {
        "uid": [f"{7919 * (n + 1) << 64 | n:032x}" for n in numbers],
        "url": [f"http://x/{n}.jpg" for n in numbers],
        "text": [f"caption {n}" if n % 3 else None for n in numbers],
        "original_width": [200 + n for n in numbers],
        "original_height": [100 + n for n in numbers],
        "clip_b32_similarity_score": pa.array([n / 100 for n in numbers], pa.float32()),
        "clip_l14_similarity_score": pa.array([n / 50 for n in numbers], pa.float32()),
        "face_bboxes": [[[0.0, 0.25, 0.5, 1.0]] if n % 2 else [] for n in numbers],
        "sha256": [f"{n:064x}" for n in numbers],
    }
    pq.write_table(pa.table(columns), root / f"{name}.parquet", row_group_size=3)
    if npz:
        rng = np.random.default_rng(first)
        made = {
            f"{model}_{kind}": rng.normal(size=(rows, dim)).astype(np.float16)
            for model, dim in DIMS.items()
            for kind in ("img", "txt")
        }
        np.savez_compressed(root / f"{name}.npz", **(made | arrays))


def take(place, output, **options) -> Dataset:
    import_pairs("datacomp", [str(place)], output, ImportConfig(**options), silent)
    return Dataset.open(output)


def test_scores_and_embeddings_are_row_aligned(tmp_path):
    write_metadata(tmp_path / "m", "a", 0, 7)
    write_metadata(tmp_path / "m", "b", 7, 4, npz=False)
    write_metadata(tmp_path / "m", "c", 11, 2)
    data = take(tmp_path / "m", tmp_path / "d", shard_rows=5)
    rows = all_rows(data)
    assert [r["url"] for r in rows] == [f"http://x/{n}.jpg" for n in range(13)]
    assert {r["status"] for r in rows} == {"no_image"}
    assert [r["caption"] for r in rows][:3] == [None, "caption 1", "caption 2"]
    assert rows[3]["uid"].hex() == f"{7919 * 4 << 64 | 3:032x}"
    assert (rows[3]["original_width"], rows[3]["sha256"].hex(), rows[3]["face_bboxes"]) == (
        203,
        f"{3:064x}",
        "[[0.0, 0.25, 0.5, 1.0]]",
    )
    assert rows[3]["clip_l14_similarity_score"] == pytest.approx(0.06)
    for name, model in (("clip_b32", "b32"), ("clip_l14", "l14")):
        found = all_features(data, f"features/{name}")
        want = [
            list(zip(*(np.load(tmp_path / f"m/{f}.npz")[f"{model}_{k}"].tolist() for k in ("img", "txt")), strict=True))
            for f in "ac"
        ]
        assert [(r["clip_image"], r["clip_text"]) for r in found[:7]] == want[0]
        assert [(r["clip_image"], r["clip_text"]) for r in found[11:]] == want[1]
        assert [r["state"] for r in found] == ["ok"] * 7 + ["missing_file"] * 4 + ["ok"] * 2
    assert check(data, CheckConfig(), silent) == []


def test_what_a_filter_keeps_goes_out_and_comes_back(tmp_path):
    write_metadata(tmp_path / "m", "a", 0, 10)
    data = take(tmp_path / "m", tmp_path / "d", shard_rows=4)
    config = FilterConfig(top=0.3, by="clip_l14_similarity_score", of="all", output="best")
    assert filter_dataset(data, config).kept == 3
    export_pairs("datacomp", data, tmp_path / "out", ExportConfig(selection="best", shard_rows=2), silent)
    back, want = all_rows(take(tmp_path / "out", tmp_path / "back")), all_rows(data)[7:]
    assert back == want
    subset = np.load(tmp_path / "out/subset.npy")  # as datacomp's resharder reads it
    assert subset.dtype == np.dtype("u8,u8")
    assert subset.tolist() == sorted((int(r["uid"].hex()[:16], 16), int(r["uid"].hex()[16:], 16)) for r in want)
    names = pq.read_schema(tmp_path / "out/00000.parquet").names
    assert {"uid", "url", "text", "sha256"} <= set(names)
    assert "captions" not in names


def test_rows_with_images_and_several_captions_go_out_too(tmp_path):
    data = whole_dataset(tmp_path / "d")
    export_pairs("datacomp", data, tmp_path / "out", ExportConfig(), silent)
    back = all_rows(take(tmp_path / "out", tmp_path / "back"))
    want = [r for r in all_rows(data) if r["status"] == "success"]
    same = ("uid", "url", "caption", "captions", "sha256", "original_width", "site.rank")
    assert [[r[n] for n in same] for r in back] == [[r[n] for n in same] for r in want]


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"b32_img": np.zeros((2, 4), np.float16)}, r"b32_img is \[2, 4\]; expected \[3, 4\]"),
        ({"b32_txt": np.zeros((3, 5), np.float16)}, r"b32_txt is \[3, 5\]; expected \[3, 4\]"),
        ({"l14_img": np.zeros(3, np.float16)}, "expected floats"),
        ({"l14_img": np.zeros((3, 6), np.int64)}, "expected floats"),
        ({"l14_img": np.array([[{}] * 6] * 3, object)}, "expected floats"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, arrays, text):
    write_metadata(tmp_path / "m", "a", 0, 3, **arrays)
    with pytest.raises(PairmillError, match=text):
        take(tmp_path / "m", tmp_path / "d")
    assert not (tmp_path / "d/dataset.json").exists()


def test_what_is_no_metadata(tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(PairmillError, match=r"no DataComp metadata .* there"):
        take(tmp_path / "m", tmp_path / "d")
    pq.write_table(pa.table({"uid": ["x"], "url": ["y"]}), tmp_path / "m/a.parquet")
    with pytest.raises(PairmillError, match="has no column text"):
        take(tmp_path / "m", tmp_path / "d")
    (tmp_path / "m/a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(PairmillError, match="is damaged"):
        take(tmp_path / "m", tmp_path / "e")
    write_metadata(tmp_path / "n", "a", 0, 3)
    (tmp_path / "n/a.npz").write_bytes((tmp_path / "n/a.npz").read_bytes()[:-30])
    with pytest.raises(PairmillError, match=r"a\.npz is damaged"):
        take(tmp_path / "n", tmp_path / "f")


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_ended_at_any_call_a_rerun_completes_it(tmp_path, every):
    write_metadata(tmp_path / "start/m", "a", 0, 5)

    def run(root):
        import_pairs("datacomp", [str(root / "m")], root / "d", ImportConfig(shard_rows=3), silent)
        export_pairs("datacomp", root / "d", root / "out", ExportConfig(shard_rows=3), silent)

    assert assert_atomic(lambda: (tmp_path / "start", run), tmp_path, every=every) >= 30
