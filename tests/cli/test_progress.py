import json

import pytest

from cli.progress import Drawer, summary
from schemas.events import Notice, Progress, ShardDone, ShardFailed, StageFinished, StageStarted

EVENTS = [
    StageStarted("pairs", 2, 1, 200),
    Notice("one thing to know"),
    ShardDone("pairs", 0, 100, 1.5, {"success": 90, "timeout": 10}),
    ShardFailed("pairs", 1, "ValueError: broken"),
    Notice("look here", warning=True),
    StageFinished("pairs", 1, (1,), 2.0, {"success": 90, "timeout": 10}),
]


def drawn(capsys, events, **settings):
    with Drawer(**settings) as emit:
        for event in events:
            emit(event)
    return capsys.readouterr()


def test_plain_lines_on_stderr(capsys):
    out, err = drawn(capsys, EVENTS)
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "pairs: 200 rows in 2 shards to do, 1 shards stand already"
    assert "one thing to know" in lines
    assert "pairs: shard 1 FAILED: ValueError: broken" in lines
    assert lines[-1] == "pairs: 100 rows in 2.0 s (50/s): success 90, timeout 10"
    assert not any("shard 0 done" in line for line in lines)


def test_verbose_tells_shards_and_quiet_only_faults(capsys):
    assert "pairs: shard 0 done, 100 rows in 1.5 s" in drawn(capsys, EVENTS, verbose=True).err
    quiet = drawn(capsys, EVENTS, quiet=True).err.splitlines()
    assert quiet == ["pairs: shard 1 FAILED: ValueError: broken", "warning: look here"]


def test_log_file_gets_every_event(capsys, tmp_path):
    drawn(capsys, EVENTS, log_file=str(tmp_path / "log.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == [type(e).__name__ for e in EVENTS]
    assert lines[2]["counts"] == {"success": 90, "timeout": 10}


def test_progress_off_a_terminal_is_a_line_every_ten_seconds(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("cli.progress.time.monotonic", lambda: now[0])
    with Drawer() as emit:
        emit(StageStarted("pairs", 1, 0, 1000))
        for second in range(25):
            now[0] = 100.0 + second
            emit(Progress("pairs", second * 10, 1, "one host limits the run"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "/1,000 rows" in line]
    assert lines == [
        "pairs: 100/1,000 rows, 10/s, 1 failed, 1:30 left | one host limits the run",
        "pairs: 200/1,000 rows, 10/s, 1 failed, 1:20 left | one host limits the run",
    ]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (StageFinished("pairs", 0, (), 0.1, {}), "pairs: nothing to do"),
        (StageFinished("pairs", 0, (3,), 0.1, {}), "pairs: no shard done"),
    ],
)
def test_summary_of_nothing(event, text):
    assert summary(event) == text
