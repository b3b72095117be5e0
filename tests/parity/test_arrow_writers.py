"""ViLT's, METER's and VLMo's own `.arrow` files: every pair file is read, and written back equal."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pyarrow as pa
import pytest

from curation.exporting import export_pairs
from curation.formats.arrow_layouts import LAYOUTS
from curation.importing import import_pairs
from curation.maintenance_config import ArrowExportConfig, ImportConfig
from schemas.errors import PairmillError
from schemas.events import silent
from shards.dataset import Dataset
from tests.curation.samples import all_rows
from tests.parity.golden import golden

BOX = ("x", "y", "width", "height")
LEFT_OUT = {
    "vqav2": "questions and answers: task sets, which `task import` will read",
    "nlvr2": "statements about two images: task sets, which `task import` will read",
    "snli": "premises and hypotheses: task sets, which `task import` will read",
}
FILES = [
    (case, path.stem) for case in golden("arrow_writers") for path in sorted((case.folder / "arrow").glob("*.arrow"))
]
PAIRS = [(case, name) for case, name in FILES if name.split("_")[0] not in LEFT_OUT]
TASKS = [(case, name) for case, name in FILES if name.split("_")[0] in LEFT_OUT]


def layout_of(name: str) -> tuple[str, str]:
    """(layout, split) whose files bear this name."""
    return next((n, s) for n, one in LAYOUTS.items() for s, names in one.names.items() if name in names)


def table_of(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as stream:
        return pa.ipc.open_file(stream).read_all()


def test_every_file_of_the_case_is_compared_or_left_out():
    for case in golden("arrow_writers"):
        told = json.loads((case.folder / "data.json").read_text(encoding="utf-8"))
        assert {name.removesuffix(".arrow") for name in told} == {
            n for c, n in FILES if c is case or c.folder == case.folder
        }
    kinds = {name.split("_")[0] for _, name in PAIRS}
    assert kinds == {"coco", "f30k", "conceptual", "sbu", "vg", "wikibk"}


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=str)
def test_a_pair_file_is_read(case, name, tmp_path):
    import_pairs("arrow", [str(case.folder / f"arrow/{name}.arrow")], tmp_path / "d", ImportConfig(), silent)
    rows = all_rows(Dataset.open(tmp_path / "d"))
    want = json.loads((case.folder / "data.json").read_text(encoding="utf-8"))[f"{name}.arrow"]["rows"]
    assert len(rows) == len(want)
    for row, one in zip(rows, want, strict=True):
        assert (row["captions"] or [row["caption"]]) == one["caption"]
        if one["image"] == "None":
            assert (row["status"], row["image"]) == ("no_image", None)
        else:
            digest = one["image"].removeprefix("sha256:")
            assert row["status"] == "success"
            assert hashlib.sha256(row["image"]).hexdigest().startswith(digest)
        for key in ("image_id", "split", "source"):
            assert row.get(key) == one.get(key)
        if "x" in one:
            assert json.loads(row["regions"]) == [list(box) for box in zip(*(one[k] for k in BOX), strict=True)]


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=str)
def test_a_pair_file_is_written_back_equal(case, name, tmp_path):
    layout, split = layout_of(name)
    path = case.folder / f"arrow/{name}.arrow"
    import_pairs("arrow", [str(path)], tmp_path / "d", ImportConfig(), silent)
    export_pairs("arrow", tmp_path / "d", tmp_path / "out", ArrowExportConfig(layout=layout), silent)
    first = LAYOUTS[layout].names[split][0]
    theirs, ours = table_of(path), table_of(tmp_path / f"out/{first}.arrow")
    assert ours.schema.equals(theirs.schema)
    assert ours.equals(theirs)
    # every other name their readers look for is there, empty
    rest = {n for names in LAYOUTS[layout].names.values() for n in names} - {first}
    assert {n: len(table_of(tmp_path / f"out/{n}.arrow")) for n in rest} == dict.fromkeys(rest, 0)


@pytest.mark.parametrize("layout", ["coco", "f30k"])
def test_the_files_of_all_splits_are_written_back_equal(layout, tmp_path):
    for case in golden("arrow_writers"):
        root = tmp_path / case.folder.name
        paths = sorted((case.folder / "arrow").glob(f"{layout}_*.arrow"))
        import_pairs("arrow", [str(p) for p in paths], root / "d", ImportConfig(shard_rows=2), silent)
        export_pairs("arrow", root / "d", root / "out", ArrowExportConfig(layout=layout), silent)
        assert {p.name for p in (root / "out").glob("*.arrow")} == {p.name for p in paths}
        for path in paths:
            assert table_of(root / "out" / path.name).equals(table_of(path)), path.name


@pytest.mark.parametrize(("case", "name"), TASKS, ids=str)
def test_a_task_file_is_refused_by_its_columns(case, name, tmp_path):
    path = case.folder / f"arrow/{name}.arrow"
    with pytest.raises(PairmillError, match=rf"{re.escape(name)}\.arrow holds no pairs"):
        import_pairs("arrow", [str(path)], tmp_path / "d", ImportConfig(), silent)
    assert not (tmp_path / "d").exists()
