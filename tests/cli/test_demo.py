"""The demo: its marks for the filter, its folder, its page, and a very small one from end to end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cli.demo import truth
from cli.demo.page import render
from cli.demo.prepare import DemoSettings, begin, free_port, make_held_out
from cli.demo.results import chance, result_rows, smooth
from cli.demo.run import Clock
from cli.demo.steps import CURATED, UNCURATED, Places, Step, quoted, require_done, tour
from cli.demo.truth import Kind
from downstream.karpathy import read_karpathy
from schemas.errors import PairmillError

SMALL = ("--rows", "60", "--steps", "2")


def rows(*groups):
    """(truth, status, keep) a row."""
    return pl.DataFrame(
        [{"truth": t, "status": s, "keep": k} for t, s, k in groups],
        schema={"truth": pl.String, "status": pl.String, "keep": pl.Boolean},
    )


def test_kinds_and_their_marks_by_hand():
    frame = rows(
        ("clean", "success", True),
        ("clean", "success", True),
        ("clean", "success", False),
        ("clean", "timeout", False),
        ("dead_link", "http_error", False),
        ("wrong_caption", "success", False),
        ("wrong_caption", "success", True),
        ("duplicate", "success", True),
    )
    found = truth.kinds(frame)
    assert found == [
        Kind("clean", 4, 1, 1, 2),
        Kind("wrong_caption", 2, 0, 1, 1),
        Kind("dead_link", 1, 1, 0, 0),
        Kind("duplicate", 1, 0, 0, 1),
    ]
    assert [k.found for k in found] == [0.5, 0.5, 1.0, 0.0]
    # Gone are 4 rows, 2 of them noise; noise are 4 rows, 3 without the duplicate.
    assert truth.quality(found) == truth.Quality(precision=0.5, recall=0.5, thrown=4, noise=4)
    assert truth.quality(found, truth.DUPLICATES) == truth.Quality(0.5, 2 / 3, 4, 3)


def test_nothing_gone_and_nothing_planted_is_no_division_by_zero():
    assert truth.quality([Kind("clean", 3, 0, 0, 3)]) == truth.Quality(0.0, 0.0, 0, 0)


def test_threshold_curve_by_hand():
    score = np.array([0.4, 0.1, 0.3, 0.2])
    noisy = np.array([False, True, False, True])
    points = truth.threshold_curve(score, noisy, points=3)
    # Thresholds at the quantiles 1/4, 2/4, 3/4 of 0.1 .. 0.4: 0.175, 0.25, 0.325.
    assert [round(p.threshold, 3) for p in points] == [0.175, 0.25, 0.325]
    assert [(p.precision, p.recall, p.left) for p in points] == [(1.0, 0.5, 3), (1.0, 1.0, 2), (2 / 3, 1.0, 1)]


def test_threshold_curve_of_equal_and_of_no_scores():
    assert truth.threshold_curve(np.full(5, 0.3), np.ones(5, bool)) == []
    assert truth.threshold_curve(np.array([]), np.array([], bool)) == []


def test_ranking_quality_by_hand():
    noisy = np.array([True, False, True, False])
    # Of the four (right, noise) pairs three are in order and one is a tie.
    assert truth.ranking_quality(np.array([0.1, 0.2, 0.2, 0.3]), noisy) == 3.5 / 4
    assert truth.ranking_quality(np.array([0.1, 0.2]), np.array([False, False])) == 0.5


def test_chance_is_what_random_orders_give():
    found = chance(images=6, captions=12)
    assert found["text_to_image_r1"] == pytest.approx(100 / 6)
    assert found["text_to_image_r10"] == 100
    rng = np.random.default_rng(0)
    places = np.array([rng.permutation(12)[:2].min() for _ in range(20_000)])
    for k in (1, 5, 10):
        assert found[f"image_to_text_r{k}"] == pytest.approx(100 * (places < k).mean(), abs=1.2)


def test_smooth_is_a_running_mean():
    assert smooth([(1, 2.0), (2, 4.0), (3, 6.0)], 2) == [(1, 2.0), (2, 3.0), (3, 5.0)]


def test_a_folder_keeps_its_settings(tmp_path):
    folder = tmp_path / "demo"
    first = begin(folder, DemoSettings(rows=60))
    assert begin(folder, DemoSettings(rows=60)) == first
    with pytest.raises(PairmillError, match=r"holds a demo with rows 60, this run wants 80"):
        begin(folder, DemoSettings(rows=80))


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(PairmillError, match=r"holds files, but no demo"):
        begin(tmp_path, DemoSettings())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_damaged_settings_are_told(tmp_path):
    (tmp_path / "demo.json").write_text("{")
    with pytest.raises(PairmillError, match=r"demo\.json is damaged"):
        begin(tmp_path, DemoSettings())


def test_a_taken_port_is_not_chosen():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert free_port(taken.getsockname()[1]) != taken.getsockname()[1]


def test_held_out_scenes_are_a_karpathy_file(tmp_path):
    make_held_out(tmp_path, DemoSettings(held_out=3, size=64))
    images = list(read_karpathy(tmp_path / "held-out" / "karpathy.json"))
    assert [len(i.captions) for i in images] == [2, 2, 2]
    assert all((tmp_path / "held-out" / "images" / i.filename).is_file() for i in images)


def test_a_stage_keeps_the_seconds_of_the_run_that_did_it(tmp_path):
    Clock(tmp_path / "times.json").add("score", 12.345)
    again = Clock(tmp_path / "times.json")
    again.add("score", 0.1)
    assert Clock(tmp_path / "times.json").seconds == {"score": 12.35} == again.seconds


def test_a_command_is_printed_so_that_a_shell_reads_it_back():
    import shlex

    from cli.demo.steps import curation

    for step in curation(Places(Path("my demo"))):
        assert shlex.split(step.command) == ["pairmill", *step.arguments]


@pytest.mark.parametrize("word", ["plain", "a b", "it's", "it's $HOME", "'\"", "a\\'b", "!x'", ""])
def test_words_survive_a_shell(word):
    import shlex

    assert shlex.split(quoted(word)) == [word]


def test_a_failed_stage_stops_the_demo():
    step = Step("score", "", "", ("score", "clip"))
    require_done(0, step)
    with pytest.raises(PairmillError, match=r"`pairmill score clip` ended with 1"):
        require_done(1, step)


def metric(value):
    recalls = {f"{way}_r{k}": value for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    return {**recalls, "mean": value}


def found():
    """Numbers of a demo as `gather` gives them, small and by hand."""
    kinds = [Kind("clean", 4, 1, 1, 2), Kind("wrong_caption", 2, 0, 1, 1)]
    line = [(10, 3.0), (20, 2.0)]
    return {
        "settings": asdict(DemoSettings(rows=6, held_out=2)),
        "rows": 6,
        "images": 5,
        "kept": 3,
        "kinds": [k.as_dict() for k in kinds],
        "quality": asdict(truth.quality(kinds)),
        "noise_in": 0.4,
        "noise_left": 0.33,
        "curve": [asdict(truth.CurvePoint(0.1, 0.5, 0.5, 3)), asdict(truth.CurvePoint(0.2, 0.4, 1.0, 1))],
        "ranking_quality": 0.75,
        "threshold": 0.15,
        "histogram": {"edges": [0.0, 0.1, 0.2], "all": [2, 3], "right": [1, 2]},
        "funnel": [
            {"rule": "a < b & c", "rows_in": 6, "dropped": 3, "nulls": 0, "left": 3, "alone": 3},
        ],
        "losses": {"clip": {"loss": line}, CURATED: {"loss": line, "itm_accuracy": line}, UNCURATED: {"loss": line}},
        "retrieval": {"clip": metric(10.0), CURATED: metric(20.0), UNCURATED: metric(15.0)},
        "chance": chance(2, 4),
        "steps": [
            {"name": "x", "title": "Do it", "why": "Why not", "command": "pairmill x '<a>'", "seconds": 1.5},
            {"name": "y", "title": "Not timed", "why": "", "command": "pairmill y", "seconds": None},
        ],
        "seconds": {"x": 1.5, "old": 60.0},
    }


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


def test_the_page_escapes_captions_and_loads_nothing():
    figure = {"data": "AAAA", "caption": HOSTILE, "value": "0.10", "tag": HOSTILE, "tone": "bad"}
    gallery = {"title": "Kept", "text": "", "mark": "kept", "figures": [figure, {**figure, "data": None}]}
    page = render(found(), [gallery], [{"data": "AAAA", "caption": HOSTILE, "count": 2}])
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page


def test_the_page_tells_the_numbers():
    page = render(found(), [], [])
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "3 pairs kept of 6" in text
    assert "10 % of captions find their picture" in text.replace("\u00a0", " ")
    assert "1:01 minutes for everything" in text
    assert "a &lt; b &amp; c" in page
    assert "$ pairmill x &#39;&lt;a&gt;&#39;" in page
    best = re.findall(r'class="n best">\s*([\d.]+)', page)
    assert best == ["20.0"] * 6


def test_result_rows_end_with_chance():
    table = result_rows(found())
    assert [r["model"] for r in table] == ["CLIP", "ViLT, curated pairs", "ViLT, uncurated pairs", "chance"]
    assert table[1]["i2t R@5"] == "20.0"


def demo(folder, *more):
    return [sys.executable, "-m", "cli.main", "demo", "-o", str(folder), *SMALL, *more]


def files(folder):
    """Content of all that a second run must not change: all but what is made anew every time."""
    made = {"report.html", "report.json"}
    wanted = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in made and "logs" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in wanted}


@pytest.mark.slow
def test_a_small_demo_is_killed_goes_on_and_does_nothing_twice(tmp_path):
    folder = tmp_path / "d"
    log = tmp_path / "log"
    for marker in ("$ pairmill train clip-tiny", "$ pairmill extract regions", "$ pairmill evaluate"):
        killed_at(demo(folder), marker, log)
    subprocess.run(demo(folder, "--tour"), check=True, capture_output=True, timeout=280)
    before = files(folder)
    page = (folder / "report.html").read_text()
    assert 50_000 < len(page) < 5_000_000
    assert "<script" not in page
    done = subprocess.run(demo(folder), check=True, capture_output=True, text=True, timeout=120)
    assert files(folder) == before
    assert "nothing to do" in done.stderr
    assert "precision " in done.stdout
    told = json.loads((folder / "report.json").read_text())
    assert told["rows"] == 60
    assert sum(k["planted"] for k in told["kinds"]) == 60
    assert told["kept"] == sum(k["kept"] for k in told["kinds"])
    assert {s.name for s in tour(Places(folder))} <= set(told["seconds"]) | set(
        json.loads((folder / "times.json").read_text())
    )


def killed_at(command, marker, log):
    """Runs until `marker` is printed, lets it work a moment, then SIGKILL."""
    with log.open("wb") as stream:
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        deadline = time.monotonic() + 200
        while marker.encode() not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        time.sleep(1.0)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_of_a_picture_and_its_copy_it_does_not_matter_which_one_went():
    frame = pl.DataFrame(
        {
            "index": [0, 1, 2, 3],
            "truth": ["clean", "duplicate", "clean", "reencoded"],
            "truth_of": [None, 0, None, 2],
            "keep": [False, True, False, True],
            "reason": ["dedup near hash.phash, 4 bits", None, "top 0.85 by clip_score", None],
        }
    )
    found = truth._one_of_each(frame)
    assert found["keep"].to_list() == [True, False, False, True]  # the second went for another reason
    assert found["reason"].to_list() == [None, "dedup near hash.phash, 4 bits", "top 0.85 by clip_score", None]
