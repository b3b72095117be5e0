"""The routes of `pairmill browse`: what they answer, escape and refuse."""

import io
import json
import re
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from cli.web.browse import FILES, create_app
from curation.browse_config import BrowseConfig
from curation.filter import make_selection
from extractors.clip import score_clip
from extractors.config import ClipScoreConfig
from shards.select import selection_about
from tests.curation.scored import write_scores
from tests.extractors.tiny_clip import save_clip
from tests.make import make_dataset

HOST = "127.0.0.1:8765"
NASTY = '<script>alert(1)</script> <img src=x onerror="alert(2)">'


@pytest.fixture
def dataset(tmp_path):
    made = make_dataset(
        tmp_path / "ds",
        shards=2,
        rows=8,
        fail={(0, 2): "timeout"},
        corrupt=[(0, 3)],
        no_caption=[(1, 1)],
        captions={(0, 1): [NASTY, "two"]},
        image=lambda shard, row: (
            np.full((900, 1200, 3), 40 * (row % 5), np.uint8) if row == 0 else np.zeros((30, 40, 3), np.uint8)
        ),
    )
    write_scores(made, "clip", {"clip_score": [None if i == 2 else i / 16 for i in range(16)]})
    make_selection(made, "best", [{"where": "clip.clip_score >= 0.5"}])
    (tmp_path / "secret.txt").write_text("secret")
    return made


@pytest.fixture
def client(dataset):
    return TestClient(create_app(dataset.url, BrowseConfig()), base_url=f"http://{HOST}")


def post(client, body, **headers):
    return client.post("/api/selections", json=body, headers={"origin": f"http://{HOST}", **headers})


def test_the_page_and_its_files(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"<script>|<style|style=|onclick|https?://", page.text)
    for name in FILES[1:]:
        found = client.get(f"/{name}")
        assert found.status_code == 200
        assert not re.search(r"(src|href)=[\"']?https?:|@import|url\(|innerHTML|insertAdjacent|eval\(", found.text)


def test_about(client):
    about = client.get("/api/about").json()
    assert about["dataset"] == "ds"
    assert (about["rows"], about["shards"], about["selections"]) == (16, 2, ["best"])
    assert about["numbers"] == ["width", "height", "caption_words", "clip.clip_score"]
    assert about["embeddings"] == about["regions"] == []
    assert client.get("/api/model").json() == {"model": None}


def test_rows_come_in_pages(client):
    first = client.get("/api/rows?limit=5&counts=1&histogram=width").json()
    assert first["total"] == 16
    assert [one["number"] for one in first["rows"]] == [0, 1, 2, 3, 4]
    assert sum(first["counts"]["histograms"]["width"]["now"]) == 15
    second = client.get(f"/api/rows?limit=20&after={first['next']}").json()
    assert [one["number"] for one in second["rows"]] == list(range(5, 16))
    assert second["next"] is None
    assert "counts" not in second


def test_captions_are_told_as_they_are_never_as_html(client):
    answer = client.get("/api/rows?q=script")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert [one["caption"] for one in answer.json()["rows"]] == [NASTY]


def test_one_row_with_all_its_columns(client):
    one = client.get("/api/rows/9").json()
    assert (one["number"], one["shard"], one["row"]) == (9, 1, 1)
    assert one["values"]["clip.clip_score"] == 0.5625
    assert one["values"]["caption"] is None
    assert len(one["values"]["uid"]) == 32
    assert "image" not in one["values"]


def test_pictures_are_made_anew_and_bounded(client):
    small = Image.open(io.BytesIO(client.get("/thumbnails/0").content))
    assert (small.format, small.size) == ("JPEG", (320, 240))
    large = client.get("/images/0")
    assert large.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(large.content)).size == (1200, 900)
    for row in (2, 3):  # failed; bytes that are no picture
        assert client.get(f"/thumbnails/{row}").headers["content-type"].startswith("image/svg+xml")


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt",
        "/../secret.txt",
        "/..%2fsecret.txt",
        "/%2e%2e/secret.txt",
        "/dataset.json",
        "/pairs/00000.parquet",
    ],
)
def test_there_are_no_paths_but_the_pages_own(client, path):
    found = client.get(path)
    assert found.status_code == 404
    assert "secret" not in found.text


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/api/rows/16", "There is no row 16"),
        ("/api/rows/x", "not what this page asks for"),
        ("/thumbnails/-1", "There is no row -1"),
        ("/images/99999999999999999999", "There is no row"),
        ("/api/rows?after=x", "no whole number"),
        ("/api/rows?after=99", "There is no row 99"),
        ("/api/rows?limit=501", "1 to 500 rows"),
        ("/api/rows?counts=1&histogram=../../secret", "no column of numbers"),
        ("/api/rows?selection=../../secret&reason=kept", "has no selection"),
        ("/api/rows?like=1", "no image embeddings"),
        ("/api/recipe", "no condition yet"),
    ],
)
def test_wrong_names_are_told(client, path, said):
    found = client.get(path)
    assert found.status_code == 400
    assert said in found.json()["error"]


def test_other_hosts_and_origins_are_refused(client, dataset):
    assert client.get("/api/rows", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/api/rows", headers={"origin": "http://evil.example"}).status_code == 403
    body = {"name": "mine", "query": "range=width:1:"}
    assert post(client, body, origin="http://evil.example").status_code == 403
    assert client.post("/api/selections", json=body).status_code == 403  # no Origin at all
    form = {"origin": f"http://{HOST}", "content-type": "application/x-www-form-urlencoded"}
    assert client.post("/api/selections", content="name=mine", headers=form).status_code == 403
    assert client.get("/api/about").json()["selections"] == ["best"]


def test_a_selection_is_saved_with_its_recipe(client, dataset):
    query = "range=clip.clip_score:0.25:0.75"
    assert "clip.clip_score >= 0.25 and clip.clip_score <= 0.75" in client.get(f"/api/recipe?{query}").json()["yaml"]
    done = post(client, {"name": "middle", "query": query})
    assert done.json() == {"name": "middle", "kept": 9, "rows": 16}
    assert selection_about(dataset, "middle")["kept"] == 9
    assert client.get("/api/rows?selection=middle&reason=kept").json()["total"] == 9
    assert "already" in post(client, {"name": "middle", "query": query}).json()["error"]
    assert post(client, {"name": "middle", "query": "range=width:1:", "replace": True}).json()["kept"] == 15
    assert "is no name" in post(client, {"name": "../middle", "query": query}).json()["error"]
    assert post(client, {"name": "x", "query": query, "path": "/tmp"}).status_code == 400
    assert "No row is left" in post(client, {"name": "none", "query": "q=zzz"}).json()["error"]


def test_a_stage_that_came_is_seen_when_the_page_is_loaded_again(client, dataset):
    write_scores(dataset, "late", {"value": range(16)})
    assert "late.value" in client.get("/api/about").json()["numbers"]
    assert client.get("/api/rows?range=late.value:12:").json()["total"] == 4


def test_without_the_extra_the_error_names_it(dataset):
    code = f"""
import sys
sys.modules["fastapi"] = None
from cli.main import run
sys.exit(run(["browse", {dataset.url!r}, "--port", "0"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'pairmill[serve]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_served_is_told(dataset, tmp_path):
    import socket

    from cli.main import run

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["browse", dataset.url, "--port", str(taken.getsockname()[1])]) == 2
    assert run(["browse", str(tmp_path / "none"), "--port", "0"]) == 2
    assert run(["browse", dataset.url, "--host", "no.such.host.invalid", "--port", "0"]) == 2


def test_the_command_serves_until_it_is_interrupted(dataset):
    script = "import sys; from cli.main import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "browse", dataset.url, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        address = server.stdout.readline().split()[0]
        with urllib.request.urlopen(f"{address}api/about") as answer:
            assert json.load(answer)["rows"] == 16
            assert answer.headers["content-security-policy"].startswith("default-src 'none'")
            assert answer.headers["server"] is None
        server.send_signal(signal.SIGINT)
        _, said = server.communicate(timeout=30)
    assert server.returncode == 130
    assert "Traceback" not in said


def test_words_for_pictures_are_answered_before_anyone_has_asked_for_the_model(dataset, tmp_path):
    model = f"local-dir:{save_clip(tmp_path / 'clip')}"
    score_clip(dataset, ClipScoreConfig(model=model, name="tiny", workers=0, device="cpu"))
    app = create_app(dataset.url, BrowseConfig(model=model))
    found = TestClient(app, base_url=f"http://{HOST}").get("/api/rows?see=a+red+block")
    assert found.status_code == 200
    assert found.json()["rows"]
