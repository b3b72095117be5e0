"""Property: an export followed by its import gives the same pairs, whatever is written in them."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation.exporting import export_pairs
from curation.importing import import_pairs
from curation.maintenance_config import ArrowExportConfig, ExportConfig, ImportConfig
from schemas.events import silent
from shards.dataset import Dataset
from shards.select import made_from, write_selection
from tests.curation.samples import all_rows
from tests.make import make_dataset

FORMATS = {
    "webdataset": ExportConfig,
    "img2dataset": ExportConfig,
    "folder": ExportConfig,
    "huggingface": ExportConfig,
    "arrow": lambda **options: ArrowExportConfig(layout="sbu", **options),
}
FIELDS = {
    "license": pa.string(),
    "author": pa.string(),
    "source_url": pa.string(),
    "site.rank": pa.int64(),
    "site.share": pa.float64(),
    "site.good": pa.bool_(),
    "input_width": pa.string(),
}
SAME = ("uid", "input_uid", "url", "caption", "image", "format", "width", "height", "original_width")
SAME += ("original_height", "sha256", "stored_sha256", "status", *FIELDS)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = {
    pa.string(): texts,
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): st.floats(allow_nan=False, allow_infinity=False),
    pa.bool_(): st.booleans(),
}
row = st.fixed_dictionaries(
    {
        "captions": st.lists(texts, max_size=3),
        "kept": st.booleans(),
        "carried": st.fixed_dictionaries({name: st.none() | values[kind] for name, kind in FIELDS.items()}),
    }
)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(row, min_size=1, max_size=6), shard_rows=st.integers(1, 4))
def test_pairs_come_back_as_they_went(tmp_path, format, rows, shard_rows):
    rows[0]["kept"] = True
    shutil.rmtree(tmp_path, ignore_errors=True)
    dataset = make_dataset(
        tmp_path / "d",
        shards=1,
        rows=len(rows),
        captions={(0, i): one["captions"] for i, one in enumerate(rows) if one["captions"]},
        no_caption=[(0, i) for i, one in enumerate(rows) if not one["captions"]],
        carried=[pa.field(name, kind) for name, kind in FIELDS.items()],
        carry=lambda s, r: rows[r]["carried"],
        kind="png" if len(rows) % 2 else "jpeg",
    )
    kept = [i for i, one in enumerate(rows) if one["kept"]]
    keep = np.isin(np.arange(len(rows)), kept)
    reasons = pa.array([None if k else "drawn" for k in keep], pa.string())
    write_selection(dataset, "best", keep, reasons, {"rules": []}, made_from(dataset, []))
    export_pairs(format, dataset, tmp_path / "out", FORMATS[format](selection="best", shard_rows=shard_rows), silent)
    import_pairs(format, [str(tmp_path / "out")], tmp_path / "back", ImportConfig(shard_rows=3), silent)
    back = all_rows(Dataset.open(tmp_path / "back"))
    want = [all_rows(dataset)[i] for i in kept]
    assert [{n: r.get(n) for n in SAME} for r in back] == [{n: r[n] for n in SAME} for r in want]
    several = [r["captions"] if len(r["captions"] or []) > 1 else None for r in want]
    assert [r["captions"] for r in back] == several
