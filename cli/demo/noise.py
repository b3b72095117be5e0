"""A list of image-text pairs as the web has them: noise of every common kind, planted and recorded."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import cv2
import numpy as np

from cli.demo.captions import Caption, Subject
from cli.demo.foreign import LANGUAGES, foreign_caption
from cli.demo.scenes import encode, generate_scene
from cli.demo.web import Page
from schemas.errors import PairmillError, suggest

if TYPE_CHECKING:
    import pyarrow

# Share of the rows of each kind of noise; what is left is clean.
SHARES: dict[str, float] = {
    "wrong_caption": 0.12,
    "dead_link": 0.06,
    "corrupt": 0.03,
    "tiny": 0.03,
    "duplicate": 0.04,
    "reencoded": 0.04,
    "filename": 0.05,
    "language": 0.05,
}
LABELS = ("clean", *SHARES)
_CAPTION_ODDS = (0.40, 0.20, 0.20, 0.15, 0.05)
_DEAD = ("404", "404", "404", "410", "500", "reset", "stall", "redirect_loop")
_CORRUPT = ("truncated", "html", "garbage", "empty")
_FILENAMES = (
    "IMG_{:04d}.jpg",
    "DSC{:05d}.JPG",
    "P101{:04d}.JPG",
    "image ({}).jpeg",
    "Screenshot_{}.png",
    "untitled-{}.psd",
)
# Pages that work although they are odd: a downloader has to get these.
_ODD_SHARE = 0.06
_ODD = ("redirect", "wrong_content_type", "slow")


@dataclass(frozen=True)
class NoisyPair:
    """One row of the list and the truth about it.

    path     of the image on the small web
    truth    one of LABELS
    detail   which variety of the truth: "404", "truncated", "de", ...; "" where there is one only
    scene    the seed of the scene that the image shows
    of       for duplicates the row of their original, else -1
    """

    path: str
    caption: str
    truth: str
    detail: str
    scene: int
    of: int = -1


@dataclass(frozen=True)
class NoisyList:
    """The rows, and the pages that serve their images (`SmallWeb(noisy.pages)`)."""

    pairs: tuple[NoisyPair, ...]
    pages: dict[str, Page]

    def table(self, base_url: str) -> pyarrow.Table:
        """Columns url, caption, truth, truth_detail, truth_scene, truth_of, in row order."""
        import pyarrow as pa

        return pa.table(
            {
                "url": [base_url + p.path for p in self.pairs],
                "caption": [p.caption for p in self.pairs],
                "truth": [p.truth for p in self.pairs],
                "truth_detail": [p.detail for p in self.pairs],
                "truth_scene": pa.array([p.scene for p in self.pairs], pa.int64()),
                "truth_of": pa.array([p.of for p in self.pairs], pa.int64()),
            }
        )


def scene_seed(seed: int, row: int) -> int:
    """The seed of a row's scene."""
    return int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0] >> np.uint64(2))


def plant_noise(
    rows: int,
    seed: int = 0,
    size: int = 256,
    shares: Mapping[str, float] | None = None,
    workers: int = 0,
) -> NoisyList:
    """A list of `rows` pairs, with `shares` of them noisy (default SHARES; kinds left out have none).

    The same arguments give the same rows and bytes, whatever `workers` (processes that draw; 0 = in-process).
    Raises PairmillError: an unknown kind, or shares below 0 or above 1 in sum.
    """
    shares = SHARES if shares is None else shares
    _check(shares)
    rng = np.random.default_rng([seed, 1])
    truths = _deal(rng, rows, shares)
    scenes = _draw_all([scene_seed(seed, row) for row in range(rows)], size, workers)
    pairs: list[NoisyPair] = []
    pages: dict[str, Page] = {}
    for row, truth in enumerate(truths):
        pair, served = _plant(np.random.default_rng([seed, 2, row]), row, truth, truths, scenes)
        pairs.append(pair)
        pages.update(served)
    return NoisyList(tuple(pairs), pages)


def _check(shares: Mapping[str, float]) -> None:
    for name, share in shares.items():
        if name not in SHARES:
            raise PairmillError(f"`shares`: unknown kind of noise `{name}`.{suggest(name, SHARES)}")
        if share < 0:
            raise PairmillError(f"`shares`: `{name}` must be 0 or more, got {share}.")
    if sum(shares.values()) > 1:
        raise PairmillError(f"`shares` must sum to at most 1, got {sum(shares.values()):.3f}.")


def _deal(rng: np.random.Generator, rows: int, shares: Mapping[str, float]) -> list[str]:
    """Each row's truth. A list without a clean row has nothing to duplicate: those rows become clean."""
    truths = [name for name, share in shares.items() for _ in range(round(share * rows))][:rows]
    truths += ["clean"] * (rows - len(truths))
    truths = [truths[i] for i in rng.permutation(rows)]
    if "clean" not in truths:
        truths = ["clean" if t in ("duplicate", "reencoded") else t for t in truths]
    return truths


@dataclass(frozen=True)
class _Drawn:
    """A scene with its JPEG in place of its pixels."""

    seed: int
    subject: Subject
    described: tuple[Caption, ...]
    jpeg: bytes


def _draw_one(size: int, seed: int) -> _Drawn:
    scene = generate_scene(seed, size)
    return _Drawn(seed, scene.subject, scene.described, encode(scene.image))


def _draw_all(seeds: Sequence[int], size: int, workers: int) -> list[_Drawn]:
    if workers == 0:
        return [_draw_one(size, seed) for seed in seeds]
    # Spawned, because the caller may hold threads.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(partial(_draw_one, size), seeds, chunksize=64))


def _plant(
    rng: np.random.Generator, row: int, truth: str, truths: Sequence[str], scenes: Sequence[_Drawn]
) -> tuple[NoisyPair, dict[str, Page]]:
    """The row and its pages."""
    of = -1
    if truth in ("duplicate", "reencoded"):
        of = _choose(rng, [i for i, t in enumerate(truths) if t == "clean"])
    drawn = scenes[of if of >= 0 else row]
    path = f"/{_folder(rng)}/{row:06d}.jpg"
    caption, detail = _caption(rng, truth, drawn, scenes)
    if truth in ("dead_link", "corrupt", "reencoded", "tiny"):
        detail, served = _PAGES[truth](rng, path, drawn)
    elif truth == "clean" and rng.random() < _ODD_SHARE:
        detail, served = _odd_page(rng, path, drawn)
    else:
        served = {path: Page(drawn.jpeg)}
    return NoisyPair(path, caption, truth, detail, drawn.seed, of), served


def _choose(rng: np.random.Generator, choices: Sequence[int]) -> int:
    return choices[int(rng.integers(len(choices)))]


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _folder(rng: np.random.Generator) -> str:
    return _pick(rng, ("img", "photos", "uploads/2019", "cdn/a", "wp-content/uploads", "gallery"))


def _caption(rng: np.random.Generator, truth: str, drawn: _Drawn, scenes: Sequence[_Drawn]) -> tuple[str, str]:
    """(caption, detail) of the row."""
    if truth == "filename":
        return _pick(rng, _FILENAMES).format(int(rng.integers(1, 9999))), ""
    if truth == "language":
        language = _pick(rng, LANGUAGES)
        return foreign_caption(rng, drawn.subject.objects, language), language
    if truth == "wrong_caption":
        return _wrong_caption(rng, drawn.subject, scenes), ""
    return drawn.described[int(rng.choice(5, p=_CAPTION_ODDS))].text, ""


def _wrong_caption(rng: np.random.Generator, subject: Subject, scenes: Sequence[_Drawn]) -> str:
    """A caption of another scene that is false of this one."""
    for i in rng.permutation(len(scenes)):
        caption = scenes[i].described[int(rng.choice(5, p=_CAPTION_ODDS))]
        if not all(subject.true(claim) for claim in caption.claims):
            return caption.text
    # Every other caption fits (a list of one row): say something that never does.
    return "nothing at all, an empty page"


Served = tuple[str, dict[str, Page]]


def _dead_page(rng: np.random.Generator, path: str, drawn: _Drawn) -> Served:
    how = _pick(rng, _DEAD)
    if how.isdigit():
        return how, {path: Page(f"<html>{how}</html>".encode(), int(how), "text/html")}
    if how == "redirect_loop":
        return how, {path: Page(status=302, location=path)}
    return how, {path: Page(behaviour=how)}


def _corrupt_page(rng: np.random.Generator, path: str, drawn: _Drawn) -> Served:
    how = _pick(rng, _CORRUPT)
    bodies = {
        "truncated": drawn.jpeg[: len(drawn.jpeg) // 3],
        "html": b"<!doctype html><html><body>Please log in to see this image.</body></html>",
        "garbage": drawn.jpeg[:64] + rng.bytes(2000),
        "empty": b"",
    }
    return how, {path: Page(bodies[how])}


def _tiny_page(rng: np.random.Generator, path: str, drawn: _Drawn) -> Served:
    side = int(rng.integers(8, 40))
    small = cv2.resize(_pixels(drawn), (side, side), interpolation=cv2.INTER_AREA)
    return f"{side}px", {path: Page(encode(small))}


def _reencoded_page(rng: np.random.Generator, path: str, drawn: _Drawn) -> Served:
    how = _pick(rng, ("jpeg60", "jpeg75", "png", "webp", "resized"))
    image = _pixels(drawn)
    if how == "resized":
        height, width = image.shape[:2]
        smaller = cv2.resize(image, (width * 7 // 8, height * 7 // 8), interpolation=cv2.INTER_AREA)
        return how, {path: Page(encode(smaller))}
    kind = how.rstrip("0123456789")
    quality = int(how[4:]) if kind == "jpeg" else 80
    return how, {path: Page(encode(image, kind, quality), content_type=f"image/{kind}")}


def _odd_page(rng: np.random.Generator, path: str, drawn: _Drawn) -> Served:
    how = _pick(rng, _ODD)
    if how == "redirect":
        target = "/moved" + path
        return how, {path: Page(status=301, location=target), target: Page(drawn.jpeg)}
    if how == "slow":
        return how, {path: Page(drawn.jpeg, behaviour="slow")}
    return how, {path: Page(drawn.jpeg, content_type="text/plain")}


_PAGES = {
    "dead_link": _dead_page,
    "corrupt": _corrupt_page,
    "tiny": _tiny_page,
    "reencoded": _reencoded_page,
}


def _pixels(drawn: _Drawn) -> np.ndarray:
    """The JPEG's pixels, uint8 [H, W, 3] RGB: what a copier of the image would have had."""
    return np.asarray(cv2.imdecode(np.frombuffer(drawn.jpeg, np.uint8), cv2.IMREAD_COLOR_RGB))
