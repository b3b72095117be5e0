import numpy as np
import pyarrow as pa
import pytest

from schemas.config import StageConfig
from schemas.errors import PairmillError
from schemas.features import FEATURES, VERSION, features_schema, patch_fields
from schemas.sidecars import make_sidecar
from shards.select import made_from, write_selection
from shards.writer import write_features
from tests.make import make_dataset
from training.sources import Source, SourceSpec, choose_caption, parse_source


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("DS", SourceSpec("DS", None, None)),
        ("a/DS@best", SourceSpec("a/DS", "best", None)),
        ("DS@best:0.5", SourceSpec("DS", "best", 0.5)),
        ("DS:2", SourceSpec("DS", None, 2.0)),
        ("s3://bucket/DS@best", SourceSpec("s3://bucket/DS", "best", None)),
        ("s3://bucket/DS:3", SourceSpec("s3://bucket/DS", None, 3.0)),
    ],
)
def test_source_text(text, spec):
    assert parse_source(text) == spec


@pytest.mark.parametrize("text", ["DS:x", "DS:0", "DS:-1"])
def test_bad_weight(text):
    with pytest.raises(PairmillError, match="weight"):
        parse_source(text)


def taken(source):
    return {(g.shard, int(r)) for g in source.groups() for r in g.rows}


def test_rows_that_take_part(tmp_path):
    dataset = make_dataset(tmp_path / "ds", fail={(0, 1): "timeout"}, no_caption={(1, 2)})
    every = {(s, r) for s in range(2) for r in range(8)}
    assert taken(Source(0, SourceSpec(dataset.url, None, None))) == every - {(0, 1), (1, 2)}
    keep = np.arange(16) % 2 == 0
    write_selection(dataset, "even", keep, pa.nulls(16, pa.string()), {}, made_from(dataset, []))
    want = {(s, r) for s, r in every if (s * 8 + r) % 2 == 0} - {(1, 2)}
    source = Source(0, SourceSpec(dataset.url, "even", None))
    assert taken(source) == want
    for shard, row in want:
        uid, caption, _ = source.text(shard, row)
        assert len(uid) == 16
        assert caption.endswith(f"number {shard * 8 + row}")
        assert source.image(shard, row).startswith(b"\xff\xd8")


def test_nothing_to_train_on(tmp_path):
    dataset = make_dataset(tmp_path / "ds", shards=1, rows=2, fail={(0, 0): "timeout", (0, 1): "timeout"})
    with pytest.raises(PairmillError, match="no row to train on"):
        Source(0, SourceSpec(dataset.url, None, None)).groups()


def write_patches(dataset, states, name="patches"):
    stage = dataset.stage(f"features/{name}")
    stage.begin(make_sidecar("extract patches", name, (FEATURES, VERSION), StageConfig()), "")
    schema = features_schema(patch_fields(2))
    for shard in range(dataset.num_shards):
        with write_features(dataset.folder, stage.file(shard), schema, dataset.stage("pairs").digest(shard)) as writer:
            for state in states:
                tensor = np.full((2, 12), shard, np.uint8)
                values = {"rows": 1, "cols": 2, "num_patches": 2, "patches": tensor} if state == "ok" else {}
                writer.append({"state": state, **values})


def test_features_that_were_skipped_name_the_command(tmp_path):
    dataset = make_dataset(tmp_path / "ds", rows=2)
    write_patches(dataset, ["ok", "skipped"])
    with pytest.raises(PairmillError, match="1 selected rows of shard 0 are skipped") as error:
        Source(0, SourceSpec(dataset.url, None, None), "patches").groups()
    assert f"pairmill extract patches {dataset.url} --name patches" in str(error.value)


def test_features_of_rows_that_failed_take_no_part(tmp_path):
    dataset = make_dataset(tmp_path / "ds", rows=2)
    write_patches(dataset, ["ok", "decode_error"])
    source = Source(0, SourceSpec(dataset.url, None, None), "patches")
    assert taken(source) == {(0, 0), (1, 0)}
    assert source.feature(1, 0, ("patches",))["patches"].tolist() == np.full((2, 12), 1).tolist()


def test_caption_is_drawn_from_seed_epoch_and_uid():
    captions = ["a", "b", "c"]
    drawn = [choose_caption("a", captions, 0, epoch, b"x" * 16) for epoch in range(60)]
    assert set(drawn) == set(captions)
    assert drawn == [choose_caption("a", captions, 0, epoch, b"x" * 16) for epoch in range(60)]
    assert choose_caption("only", None, 0, 3, b"x" * 16) == "only"
    assert choose_caption("only", ["only"], 0, 3, b"x" * 16) == "only"
