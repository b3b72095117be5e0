"""`history` tells every stage as its sidecar, footers and logs do."""

from __future__ import annotations

import json
import socket

from curation.history import history
from shards.dataset import Dataset
from tests.curation.samples import select, whole_dataset, write_tasks


def test_every_stage_and_selection(tmp_path):
    dataset = whole_dataset(tmp_path / "d")
    select(dataset, [0, 2, 3])
    write_tasks(dataset, [[(0, 0)]])
    stages = {s.path: s for s in history(tmp_path / "d")}
    assert list(stages) == ["pairs", "scores/size", "features/vector", "tasks/vqa", "selections/best"]
    assert stages["pairs"].counts == {"http_error": 1, "success": 10, "timeout": 1}
    assert (stages["pairs"].runs, stages["pairs"].shards) == (0, (3, 3))
    scores = stages["scores/size"]
    assert (scores.made_by, scores.identity) == ("score size", {"factor": 1.0})
    assert scores.fingerprint == dataset.stage("scores/size").sidecar().fingerprint
    assert (scores.runs, scores.hosts, scores.shards) == (1, (socket.gethostname(),), (3, 3))
    assert 0 < scores.seconds < 60
    assert stages["features/vector"].counts == {"http_error": 1, "ok": 10, "timeout": 1}
    assert stages["tasks/vqa"].shards == (1, 1)
    assert stages["selections/best"].counts == {"kept": 3, "dropped": 9}


def test_seconds_of_finished_killed_and_idle_runs_add_up(tmp_path):
    dataset = whole_dataset(tmp_path / "d", shards=1)
    for log in (tmp_path / "d/logs").glob("*.jsonl"):
        log.unlink()
    done = {"event": "ShardDone", "at": 100.0, "seconds": 2.0}
    runs = {
        "20250101T000000.my.host.1": [done, {"event": "StageFinished", "at": 103.0, "seconds": 5.0}],
        "20250102T000000.other.2": [done, done | {"at": 107.5}, '{"event": "Shar'],
        "20250103T000000.other.3": [{"event": "StageFinished", "at": 1.0, "seconds": 9.0}],
    }
    for name, lines in runs.items():
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / f"d/logs/scores.size.{name}.jsonl").write_text(text)
    (tmp_path / "d/logs/scores.size.v2.20250101T000000.host.1.jsonl").write_text(json.dumps(done))
    scores = next(s for s in history(Dataset.open(dataset.url)) if s.path == "scores/size")
    assert (scores.seconds, scores.runs, scores.hosts) == (5.0 + 7.5 + 2.0, 2, ("my.host", "other"))


def test_unfinished_stages_and_stale_selections_show(tmp_path):
    dataset = whole_dataset(tmp_path / "d")
    select(dataset, [1])
    (tmp_path / "d/scores/size/00001.parquet").unlink()
    stages = {s.path: s for s in history(dataset)}
    assert stages["scores/size"].shards == (2, 3)
    assert stages["selections/best"].shards == (3, 3)
