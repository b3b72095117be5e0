"""Rows taken out on request: everywhere, whole or not at all, and nothing else touched."""

import json

import numpy as np
import pyarrow as pa
import pytest

from curation.check import check
from curation.filter import make_selection
from curation.maintenance_config import CheckConfig, RemoveConfig
from curation.remove import Removal, remove
from extractors.config import PatchesConfig
from extractors.patches import extract_patches
from schemas.config import StageConfig
from schemas.errors import PairmillError
from schemas.pairs import INPUT_FIELDS, input_schema
from schemas.sidecars import make_sidecar
from schemas.tasks import tasks_schema
from shards.dataset import Dataset
from shards.reader import MappedShard, read_table
from shards.select import read_selection
from shards.writer import write_table
from tests import atomic_stages as stages
from tests.clean_process import in_clean_process
from tests.curation.scored import write_scores
from tests.make import make_dataset

FIELD = pa.field("author", pa.string())


@pytest.fixture
def dataset(tmp_path):
    """Two shards of four pairs with an input, a score, patches, a selection, a task set and a report."""
    found = make_dataset(
        tmp_path / "ds", shards=2, rows=4, fail={(0, 2): "timeout"}, carried=[FIELD], carry=lambda s, r: {"author": "A"}
    )
    for shard in range(2):
        pairs = read_table(found.folder, found.stage("pairs").file(shard)).to_pylist()
        rows = [{**{f.name: row.get(f.name) for f in INPUT_FIELDS}, "author": "A"} for row in pairs]
        schema = input_schema([FIELD]).with_metadata({**input_schema().metadata, b"cut": b"mark"})
        table = pa.Table.from_pylist(rows, schema=schema)
        write_table(found.folder, f"input/{shard:05d}.parquet", table, {"rows": 4})
    write_scores(found, "s", {"value": [float(i) for i in range(8)]})
    extract_patches(found, PatchesConfig(size=32, patch=16, workers=0))
    make_selection(found, "best", [{"where": "s.value >= 1"}])
    found.folder.write_bytes("selections/best.matches.json", b"{}")
    found.folder.write_bytes("reports/report.html", b"<p>pictures")
    refs = [{"id": str(i), "split": "test", "images": [{"shard": i // 4, "row": i % 4}], "text": "t"} for i in range(8)]
    write_table(
        found.folder, "tasks/retrieval/00000.parquet", pa.Table.from_pylist(refs, schema=tasks_schema()), {"test": 8}
    )
    found.stage("tasks/retrieval").begin(make_sidecar("task import", "retrieval", ("tasks", 1), StageConfig()), "")
    return Dataset.open(found.folder.url)


def requests(tmp_path, *lines):
    file = tmp_path / "requests.txt"
    file.write_text("\n".join(lines) + "\n")
    return RemoveConfig(list=str(file))


def rows_of(dataset, path, shard):
    return read_table(dataset.folder, dataset.stage(path).file(shard)).to_pylist()


def test_a_removed_row_is_blank_everywhere_and_the_others_are_as_they_were(tmp_path, dataset):
    before = {p: [rows_of(dataset, p, s) for s in range(2)] for p in ("pairs", "input", "scores/s")}
    uid = before["pairs"][1][3]["uid"]
    mapped = [MappedShard(dataset.folder, dataset.stage("features/patches").file(s)) for s in range(2)]
    patches = {(s, r): mapped[s].row(r)["patches"] for s in range(2) for r in range(4)}
    gone = {(0, 1), (1, 3)}
    done = remove(dataset, requests(tmp_path, "http://example.com/1.jpg", uid.hex(), "http://example.com/none.jpg"))
    assert (done.rows, done.unknown) == (2, 1)
    for shard in range(2):
        for row in range(4):
            pair, given, score = (rows_of(dataset, p, shard)[row] for p in before)
            if (shard, row) in gone:
                left = {k: v for k, v in pair.items() if v is not None}
                want = {"uid": before["pairs"][shard][row]["uid"], "status": "removed", "error": "removed: on request"}
                assert left == want
                assert {k: v for k, v in given.items() if v is not None} == {"uid": want["uid"]}
                assert score == {"value": None}
            else:
                assert (pair, given, score) == tuple(before[p][shard][row] for p in before)
    for shard in range(2):
        again = MappedShard(dataset.folder, dataset.stage("features/patches").file(shard))
        for row in range(4):
            old, new = patches[shard, row], again.row(row)["patches"]
            if (shard, row) in gone:
                assert (again.states()[row], new) == ("removed", None)
            elif old is not None:
                assert np.array_equal(old, new)
    for path in ("scores/s", "features/patches"):
        assert dataset.stage(path).pending() == []
    assert extract_patches(dataset, PatchesConfig(size=32, patch=16, workers=0)).done == 0
    assert [f for f in check(dataset, CheckConfig(), lambda event: None) if f.error] == []


def test_what_shows_or_asks_about_a_removed_row_goes_with_it(tmp_path, dataset):
    remove(dataset, requests(tmp_path, "http://example.com/1.jpg"))
    assert dataset.folder.names("reports") == []
    assert "best.matches.json" not in dataset.folder.names("selections")
    assert [r["id"] for r in rows_of(dataset, "tasks/retrieval", 0)] == ["0", *"234567"]
    with pytest.raises(PairmillError, match="made before the pairs of shard 0 changed"):
        read_selection(dataset, "best")
    assert dataset.stage("input").footer(0)[b"cut"] == b"mark"
    (name,) = [n for n in dataset.folder.names("logs") if n.startswith("remove.")]
    head, row = map(json.loads, dataset.folder.read_bytes(f"logs/{name}").splitlines())
    assert (head["rows"], head["list"]) == (1, "requests.txt")
    assert (row["shard"], row["row"]) == (0, 1)


def test_a_second_request_adds_to_the_first_and_the_same_one_changes_nothing(tmp_path, dataset):
    first = requests(tmp_path, "http://example.com/1.jpg")
    remove(dataset, first)
    assert remove(dataset, first) == Removal(0, 1, 0)  # its url is gone from the dataset
    dataset.folder.write_bytes("reports/report.html", b"made since")
    assert remove(dataset, first) == Removal(0, 1, 0)
    assert dataset.folder.names("reports") == ["report.html"]
    remove(dataset, requests(tmp_path, "http://example.com/5.jpg"))
    assert dataset.folder.names("reports") == []
    kept = read_table(dataset.folder, "removed.parquet").to_pylist()
    assert sorted(r["url"] for r in kept if r["url"]) == ["http://example.com/1.jpg", "http://example.com/5.jpg"]
    assert sum(r["uid"] is not None for r in kept) == 2


def test_scores_that_were_out_of_date_stay_so(tmp_path, dataset):
    table = read_table(dataset.folder, "scores/s/00000.parquet")
    write_table(dataset.folder, "scores/s/00000.parquet", table, {}, "older")
    remove(dataset, requests(tmp_path, "http://example.com/1.jpg"))
    assert rows_of(dataset, "scores/s", 0)[1] == {"value": None}
    assert dataset.stage("scores/s").pending() == [0]


def test_an_id_as_it_was_given_is_understood(tmp_path, dataset):
    file = tmp_path / "ids.csv"
    uid = rows_of(dataset, "pairs", 0)[0]["uid"].hex()
    file.write_text(f"UID,note\n{uid},please\n")
    assert remove(dataset, RemoveConfig(list=str(file))).rows == 1


@pytest.mark.parametrize(
    ("text", "says"), [("name\nx\n", "no column `uid` or `url`. It has: name"), ("url\n", "names no uid and no url")]
)
def test_a_list_that_names_nothing_is_refused_and_nothing_written(tmp_path, dataset, text, says):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(PairmillError, match=says):
        remove(dataset, RemoveConfig(list=str(tmp_path / "list.csv")))
    assert not dataset.folder.exists("removed.parquet")
    assert dataset.folder.names("reports") == ["report.html"]


def test_a_removal_ended_at_any_call_is_completed_by_a_rerun(tmp_path):
    assert in_clean_process(stages.removal, tmp_path, 3) > 5 * 4 - 3
