"""Download and resize: pairmill and img2dataset as their users start them, on one loopback server.

Both run as a command of their own with two worker processes, the same connections, resizing, quality and hashes, and
write Parquet. Each is timed on a short and on a long list: the difference is the steady rate, what is left of the short
one is start-up. The bound is what two processes do with the same bytes and no network at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.compare import ROOT, Check, Result, medians, peak_memory, python, run_quietly, script
from benchmarks.photographs import QUALITY, jpegs
from cli.demo.web import Page, SmallWeb
from curation.config import DownloadConfig
from curation.resize import process
from shards.images import decode_rgb

WORKERS = 2
CONNECTIONS = 16  # of one worker
SIDE = 384
PICTURES = 24  # different ones; a list asks for them again and again under other names
LEAST_PSNR = 38.0  # two resizers and two encoders of one picture agree so far
OFFLINE = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
SERVER = "from benchmarks.download import serve; serve({}, {}, {})"


@dataclass(frozen=True)
class Load:
    """Images of one size: `short` and `long` lists in shards of `shard_rows`, and the goal for the steady rate."""

    width: int
    height: int
    shard_rows: int
    short: int
    long: int
    goal: float

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}"


LOADS = (Load(640, 480, 500, 1000, 5000, 1.2), Load(1600, 1200, 150, 300, 1800, 1.6))
QUICK = (Load(640, 480, 4, 8, 16, 1.2),)


def serve(width: int, height: int, count: int) -> None:
    """The server's process: tells its address, serves until its input is closed."""
    pages = {f"/{i}.jpg": Page(data) for i, data in enumerate(jpegs(width, height, count))}
    with SmallWeb(pages) as web:
        print(web.url, flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def server(load: Load, pictures: int = PICTURES) -> Iterator[str]:
    """The address of a server in another process."""
    command = python("-c", SERVER.format(load.width, load.height, pictures))
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        yield child.stdout.readline().strip()
        child.stdin.close()


def write_list(folder: Path, address: str, rows: int, pictures: int = PICTURES) -> Path:
    """A Parquet list of `rows` different URLs and captions."""
    path = folder / f"list-{rows}.parquet"
    urls = [f"{address}/{i % pictures}.jpg?row={i}" for i in range(rows)]
    pq.write_table(pa.table({"url": urls, "caption": [f"picture {i}" for i in range(rows)]}), path)
    return path


def ours(urls: Path, output: Path, shard_rows: int) -> list[str]:
    """Our command. --per-host counts over the whole run, so it is both workers' connections."""
    options = {
        "--workers": WORKERS,
        "--connections": CONNECTIONS,
        "--per-host": WORKERS * CONNECTIONS,
        "--allow-private": "127.0.0.1",
        "--size": SIDE,
        "--quality": QUALITY,
        "--retries": 2,
        "--timeout": 30,
        "--shard-rows": shard_rows,
    }
    return [script("pairmill"), "download", str(urls), "-o", str(output), "--quiet", *_words(options)]


def peer(urls: Path, output: Path, shard_rows: int) -> list[str]:
    """img2dataset's command, with what ours does: no EXIF column, sha256, keep ratio, area filter."""
    options = {
        "--url_list": urls,
        "--output_folder": output,
        "--input_format": "parquet",
        "--output_format": "parquet",
        "--url_col": "url",
        "--caption_col": "caption",
        "--processes_count": WORKERS,
        "--thread_count": CONNECTIONS,
        "--image_size": SIDE,
        "--resize_mode": "keep_ratio",
        "--resize_only_if_bigger": True,
        "--encode_quality": QUALITY,
        "--compute_hash": "sha256",
        "--extract_exif": False,
        "--retries": 2,
        "--timeout": 30,
        "--number_sample_per_shard": shard_rows,
    }
    return [script("img2dataset"), *_words(options)]


def _words(options: dict[str, Any]) -> list[str]:
    return [str(word) for pair in options.items() for word in pair]


Command = Callable[[Path, Path, int], list[str]]


def fetch_seconds(command: Command, urls: Path, shard_rows: int) -> float:
    """Seconds of one command from start to end, into a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        return run_quietly(command(urls, Path(folder) / "out", shard_rows), OFFLINE)


def fetch_memory(command: Command, urls: Path, shard_rows: int) -> int:
    """Peak bytes (PSS) of one command and its workers."""
    with tempfile.TemporaryDirectory() as folder:
        return peak_memory(command(urls, Path(folder) / "out", shard_rows), OFFLINE)["pss"]


def fetched(command: Command, urls: Path, shard_rows: int) -> list[dict[str, Any]]:
    """The rows one command wrote, by URL: url, caption, sizes, sha256 (hex) and the picture's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        run_quietly(command(urls, output, shard_rows), OFFLINE)
        pairs = output / "pairs" if command is ours else output
        rows = [row for path in sorted(pairs.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    names = ("url", "caption", "status", "width", "height", "original_width", "original_height", "sha256")
    kept = [{**{n: row[n] for n in names}, "image": row.get("image") or row.get("jpg")} for row in rows]
    for row in kept:
        row["sha256"] = row["sha256"].hex() if isinstance(row["sha256"], bytes) else row["sha256"]
    return sorted(kept, key=lambda row: row["url"])


def check_equal(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> None:
    """The same rows, hashes and sizes; pictures as alike as two good resizers make them."""
    assert len(a) == len(b), f"{len(a)} rows against {len(b)}"
    for one, other in zip(a, b, strict=True):
        same = [name for name in one if name != "image"]
        assert {n: one[n] for n in same} == {n: other[n] for n in same}
        assert one["status"] == "success"
        alike = cv2.PSNR(decode_rgb(one["image"]), decode_rgb(other["image"]))
        assert alike >= LEAST_PSNR, f"{one['url']}: {alike:.1f} dB"


def bare(data: bytes) -> tuple[bytes, str]:
    """What every download with this decoder must do: whole decode, area filter, encode, hash (hex)."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    scale = SIDE / min(image.shape[:2])
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    stored = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
    return stored, hashlib.sha256(data).hexdigest()


def reduced(data: bytes) -> None:
    """The same with our decoder's smaller DCT scales and our resizer."""
    process(data, DownloadConfig(size=SIDE, quality=QUALITY))


_together: Any = None  # a process's barrier


def _begin(barrier: Any) -> None:
    global _together
    _together = barrier
    cv2.setNumThreads(1)


def _repeat(step: Callable[[bytes], object], pictures: list[bytes], count: int) -> tuple[float, float]:
    step(pictures[0])
    _together.wait()
    start = time.perf_counter()
    for i in range(count):
        step(pictures[i % len(pictures)])
    return start, time.perf_counter()


def bound(step: Callable[[bytes], object], pictures: list[bytes], count: int) -> float:
    """Images a second of WORKERS processes that each do `count`."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, context, _begin, (context.Barrier(WORKERS),)) as pool:
        spans = list(pool.map(_repeat, [step] * WORKERS, [pictures] * WORKERS, [count] * WORKERS))
    return WORKERS * count / (max(end for _, end in spans) - min(start for start, _ in spans))


def measure(load: Load, rounds: int, folder: Path, pictures: int = PICTURES) -> tuple[dict[str, float], list[Check]]:
    """Medians and checks of one image size."""
    made = jpegs(load.width, load.height, pictures)
    with server(load, pictures) as address:
        short, long = (write_list(folder, address, rows, pictures) for rows in (load.short, load.long))
        check_equal(fetched(ours, short, load.shard_rows), fetched(peer, short, load.shard_rows))
        steps = {"ours": ours, "img2dataset": peer}
        runs = {
            f"{name} {which}": lambda c=command, u=urls: fetch_seconds(c, u, load.shard_rows)
            for which, urls in (("short", short), ("long", long))
            for name, command in steps.items()
        }
        bounds = {
            "bound": lambda: bound(bare, made, load.short // 2),
            "our bound": lambda: bound(reduced, made, load.short // 2),
        }
        middle = medians({**runs, **bounds}, rounds)
        memory = {name: fetch_memory(command, long, load.shard_rows) / 2**20 for name, command in steps.items()}
    out, checks = {}, []
    rates = {n: (load.long - load.short) / (middle[f"{n} long"] - middle[f"{n} short"]) for n in steps}
    for name in steps:
        out[f"{load.name} {name}, steady images/s"] = rates[name]
        out[f"{load.name} {name}, start-up s"] = middle[f"{name} short"] - load.short / rates[name]
        out[f"{load.name} {name}, whole run of {load.long}, s"] = middle[f"{name} long"]
        out[f"{load.name} {name}, peak memory MiB"] = memory[name]
    out[f"{load.name} bare cv2 in {WORKERS} processes, images/s"] = middle["bound"]
    out[f"{load.name} our decode and resize in {WORKERS} processes, images/s"] = middle["our bound"]
    checks.append(Check(f"{load.name}, times img2dataset's rate", rates["ours"] / rates["img2dataset"], load.goal))
    whole = middle["img2dataset long"] / middle["ours long"]
    checks.append(Check(f"{load.name}, times as fast with start-up, {load.long} images", whole))
    share = memory["ours"] / memory["img2dataset"]
    checks.append(Check(f"{load.name}, share of img2dataset's memory", share, 0.333, at_least=False))
    return out, checks


def run(rounds: int, quick: bool) -> Result:
    """Both image sizes."""
    loads, pictures = (QUICK, 4) if quick else (LOADS, PICTURES)
    found: dict[str, float] = {}
    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as folder:
        for load in loads:
            more, judged = measure(load, 1 if quick else rounds, Path(folder), pictures)
            found, checks = found | more, checks + judged
    if not quick and min(found.values()) <= 0:
        raise RuntimeError("a long list took no longer than a short one: the machine is too busy to measure on")
    sizes = {load.name: f"{load.long} images in shards of {load.shard_rows}" for load in loads}
    return Result(
        "download",
        "URL list to resized images in Parquet, against img2dataset: one loopback server, equal options",
        1 if quick else rounds,
        {**sizes, "workers": WORKERS, "connections of a worker": CONNECTIONS},
        found,
        checks,
        ["pairmill", "img2dataset", "opencv-python-headless", "aiohttp", "pyarrow"],
        ["The server shares the cores. Memory is one more run's peak PSS of the command and its workers."],
    )
