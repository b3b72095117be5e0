"""What the demo starts from: its settings, the noisy list, and clean held-out scenes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.errors import PairmillError

if TYPE_CHECKING:
    from cli.demo.noise import NoisyList
    from cli.demo.scenes import Scene

SETTINGS = "demo.json"
LIST = "list.parquet"
HELD_OUT = "held-out"
PORT = 8642
WORTH_PROCESSES = 1000
# Clean rows and held-out scenes draw from seeds that never meet.
_HELD_OUT_SEED = 1 << 40


@dataclass(frozen=True)
class DemoSettings:
    """What decides a demo's files; kept in demo.json, so that a later run goes on with the same.

    rows      of the list
    size      side of a scene, px
    held_out  clean scenes to evaluate on, each with two captions
    steps     of every training, None for the presets'
    port      of the small web on 127.0.0.1, part of every URL of the list
    """

    seed: int = 0
    rows: int = 2000
    size: int = 192
    held_out: int = 100
    steps: int | None = None
    port: int = PORT


def begin(folder: Path, wanted: DemoSettings) -> DemoSettings:
    """The folder's settings: written at the first run, checked at a later one.

    Raises PairmillError: the folder holds other files, or a demo with other settings.
    """
    from shards.files import atomic_file

    file = folder / SETTINGS
    if file.is_file():
        return _standing(file, wanted)
    if folder.is_dir() and any(folder.iterdir()):
        raise PairmillError(f"{folder} holds files, but no demo. Give another folder with -o, or empty this one.")
    folder.mkdir(parents=True, exist_ok=True)
    settings = DemoSettings(**{**asdict(wanted), "port": free_port(wanted.port)})
    with atomic_file(file) as stream:
        stream.write((json.dumps(asdict(settings), indent=1) + "\n").encode())
    return settings


def _standing(file: Path, wanted: DemoSettings) -> DemoSettings:
    try:
        found = DemoSettings(**json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise PairmillError(f"{file} is damaged: {error}. Delete {file.parent} and start again.") from None
    other = [
        f"{name} {value}, this run wants {asdict(wanted)[name]}"
        for name, value in asdict(found).items()
        if name != "port" and value != asdict(wanted)[name]
    ]
    if other:
        raise PairmillError(f"{file.parent} holds a demo with {'; '.join(other)}. Give another folder with -o.")
    return found


def free_port(first: int) -> int:
    """`first` where nobody listens there on 127.0.0.1, else one that the system chooses."""
    import socket

    for port in (first, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise PairmillError("No port of 127.0.0.1 is free for the demo's small web.")


def make_list(folder: Path, settings: DemoSettings) -> NoisyList:
    """The rows with their planted noise and the pages of the web; writes list.parquet where it does not stand."""
    import os

    import pyarrow.parquet as pq

    from cli.demo.noise import plant_noise
    from shards.files import atomic_file

    # Starting a process takes as long as drawing a few hundred scenes.
    workers = min(4, os.cpu_count() or 1) if settings.rows >= WORTH_PROCESSES else 0
    noisy = plant_noise(settings.rows, settings.seed, settings.size, workers=workers)
    if not (folder / LIST).is_file():
        with atomic_file(folder / LIST) as stream:
            pq.write_table(noisy.table(f"http://127.0.0.1:{settings.port}"), stream)
    return noisy


def make_held_out(folder: Path, settings: DemoSettings) -> None:
    """held-out/images/*.jpg and held-out/karpathy.json, the form in which retrieval benchmarks come."""
    from cli.demo.noise import scene_seed
    from cli.demo.scenes import encode, generate_scene
    from shards.files import atomic_file

    place = folder / HELD_OUT
    if (place / "karpathy.json").is_file():
        return
    (place / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(settings.held_out):
        scene = generate_scene(scene_seed(settings.seed, _HELD_OUT_SEED + i), settings.size)
        with atomic_file(place / "images" / f"{i:06d}.jpg") as stream:
            stream.write(encode(scene.image))
        records.append(_record(i, scene))
    with atomic_file(place / "karpathy.json") as stream:
        stream.write(json.dumps({"dataset": "scenes", "images": records}).encode())


def _record(i: int, scene: Scene) -> dict[str, Any]:
    """One image with its two most telling captions; a short one such as `a star` fits many scenes."""
    sentences = [
        {"raw": text, "tokens": text.lower().split(), "imgid": i, "sentid": 2 * i + j}
        for j, text in enumerate(scene.captions[:2])
    ]
    return {
        "filename": f"{i:06d}.jpg",
        "imgid": i,
        "sentids": [s["sentid"] for s in sentences],
        "split": "test",
        "sentences": sentences,
    }


def is_downloaded(dataset: Path) -> bool:
    """Whether every shard of the pairs stands, so that the web need not be served."""
    from shards.dataset import Dataset

    try:
        return not Dataset.open(dataset).stage("pairs").pending()
    except PairmillError:
        return False
