"""The docs say what the program does: help texts are equal, blocks run.

`PAIRMILL_WRITE_DOCS=1 pytest tests/cli/test_docs.py` writes the help texts and tables into docs/commands.md anew.
"""

import contextlib
import http.server
import io
import os
import re
import shlex
import threading
from functools import partial
from pathlib import Path

import pytest

from cli.main import COMMANDS, load, run
from tests.cli.test_main import EVERY

ROOT = Path(__file__).parent.parent.parent
COMMANDS_PAGE = ROOT / "docs" / "commands.md"
WRITE = os.environ.get("PAIRMILL_WRITE_DOCS") == "1"


def help_text(words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        patch.setenv("TERMINAL_WIDTH", "100")
        assert run([*words, "--help"]) == 0
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def statuses():
    from schemas.status import STATUSES, is_transient

    def tried_again(status):
        return "408, 425, 429, 5xx" if status == "http_error" else "yes" if is_transient(status) else ""

    rows = [f"| `{s}` | {tried_again(s)} |" for s in STATUSES]
    return "\n".join(["| status | tried again |", "| --- | --- |", *rows])


def presets():
    from curation.presets import PRESETS

    rows = [f"| `{name}` | {p.comparisons} | {p.lacks or 'nothing'} | {p.source} |" for name, p in PRESETS.items()]
    return "\n".join(["| preset | keeps where | leaves out | source |", "| --- | --- | --- | --- |", *rows])


def block(name):
    if name == "statuses":
        return statuses()
    if name == "presets":
        return presets()
    return f"```text\n{help_text(name.split())}\n```"


def page_with_blocks(text):
    return re.sub(
        r"<!-- begin (.+?) -->\n.*?<!-- end -->",
        lambda m: f"<!-- begin {m.group(1)} -->\n{block(m.group(1))}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def test_help_in_the_docs_is_what_the_commands_print():
    text = COMMANDS_PAGE.read_text()
    fresh = page_with_blocks(text)
    if WRITE:
        COMMANDS_PAGE.write_text(fresh)
    assert text == fresh or WRITE, "run PAIRMILL_WRITE_DOCS=1 pytest tests/cli/test_docs.py and commit docs/commands.md"


def test_every_command_and_status_is_in_the_docs():
    text = COMMANDS_PAGE.read_text()
    assert [" ".join(w) for w, _ in EVERY if f"<!-- begin {' '.join(w)} -->" not in text] == []
    assert "<!-- begin statuses -->" in text
    assert set(COMMANDS) == {w[0] for w, _ in EVERY}
    assert all(load(n) is not None for n in COMMANDS)


def test_links_between_pages_lead_somewhere():
    pages = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []


def blocks_of(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.fixture
def place(tmp_path_factory):
    """A folder with `list.parquet`, whose images are served on loopback, and a retrieval split with its images."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    from cli.demo.scenes import encode, generate_scene

    folder = tmp_path_factory.mktemp("docs")
    images = folder / "images"
    images.mkdir()
    rows, held_out = [], []
    for i in range(48):
        scene = generate_scene(i, 96)
        (images / f"{i:03}.jpg").write_bytes(encode(scene.image))
        rows.append((f"{i:03}.jpg", scene.captions[0]))
        if i >= 40:
            sentences = [{"raw": c, "sentid": 5 * i + k, "imgid": i} for k, c in enumerate(scene.captions)]
            held_out.append({"filename": f"{i:03}.jpg", "imgid": i, "split": "test", "sentences": sentences})
    (folder / "karpathy.json").write_text(json.dumps({"dataset": "flickr30k", "images": held_out}))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(images)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}/"
    table = pa.table({"url": [base + n for n, _ in rows[:40]], "caption": [c for _, c in rows[:40]]})
    pq.write_table(table, folder / "list.parquet")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)
    server.shutdown()


def commands_of(page):
    lines = [line for text in blocks_of(page, "console") for line in text.splitlines()]
    return [shlex.split(line[2:]) for line in lines if line.startswith("$ pairmill ")]


# The docs show numbers for a real set; here 40 pairs and few steps do.
SMALL = {"train": ["--steps", "2", "--batch-size", "8"]}


@pytest.mark.slow
def test_commands_of_the_tutorial_run_in_order(place, capsys):
    commands = commands_of(ROOT / "docs" / "tutorial.md")
    assert len(commands) > 8
    for words in commands:
        code = run([*words[1:], *SMALL.get(words[1], [])])
        assert code == 0, (words, capsys.readouterr().err)


@pytest.mark.slow
def test_python_blocks_run(place):
    for words in (
        "download list.parquet -o DS --allow-private 127.0.0.1 --shard-rows 20",
        "train clip-tiny DS -o runs/small --steps 2 --batch-size 8",
        "score clip DS --model runs/small --workers 0",
        "filter DS -o best --top 0.6 --by clip_score",
        "extract patches DS --size 64 --patch 16 --workers 0",
    ):
        assert run(words.split()) == 0
    for page in sorted((ROOT / "docs").glob("*.md")):
        names = {}
        for code in blocks_of(page, "python"):
            exec(compile(code, str(page), "exec"), names)
