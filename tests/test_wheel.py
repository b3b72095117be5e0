"""The wheel has exactly the seven packages and what they need at run time."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("schemas", "shards", "extractors", "curation", "training", "downstream", "cli")


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in tracked.decode().split("\0"):
        if name and (ROOT / name).is_file():  # what git tracks, so that a file nobody added is missed here
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(command, cwd=source, check=True)
    (wheel,) = folder.glob("pairmill-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_packages(names):
    top = {n.split("/")[0] for n in names if not n.split("/")[0].endswith(".dist-info")}
    assert top == set(PACKAGES)


def test_every_module_and_data_file_is_in_it(names):
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    assert {n for n in tracked.split() if n not in names} == set()


@pytest.mark.parametrize(
    "name",
    [
        "training/presets/vilt-tiny.yaml",
        "extractors/regions/tiny.safetensors",
        "extractors/regions/tiny.json",
        "curation/templates/report.html",
        "cli/web/browse.html",
        "cli/web/browse.css",
        "cli/web/browse.js",
        "cli/web/icon.svg",
        "cli/web/broken.svg",
    ],
)
def test_data(names, name):
    assert name in names


def test_licence_and_entry_point(names):
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert any(n.endswith("entry_points.txt") for n in names)
