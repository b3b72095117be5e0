"""Our detectors beside detectron2's on the same random weights and pictures: differences and seconds.

    python -m benchmarks.detectron2_parity           # writes the tables of docs/detectron2-parity.md
    python -m benchmarks.detectron2_parity --quick   # small pictures, one round, nothing written: does it run?

It needs detectron2 (docs/dependencies.md). Weights as they are initialised are no test: features would grow with every
block and all boxes score alike, so that suppression decides between ties. They are settled first: see `settle`.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.compare import ROOT, machine, version
from benchmarks.photographs import photograph
from extractors.regions.backends import load_detector
from extractors.regions.config import RegionsConfig
from extractors.regions.detectron2 import build_network, read_config, require_detectron2
from extractors.regions.protocol import Detector, Proposals, find_regions
from extractors.regions.rcnn import FasterRcnn
from extractors.regions.selection import rows_from_proposals

PAGE = ROOT / "docs" / "detectron2-parity.md"
START, END = "<!-- results -->", "<!-- end of results -->"
FAMILIES = {
    "R101-C4": ("COCO-Detection/faster_rcnn_R_101_C4_3x.yaml", "rcnn:C4"),
    "R50-FPN": ("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml", "rcnn:FPN"),
}
SIZES = ((480, 640), (683, 1024), (427, 500))  # height, width
PROPOSALS, SHORTER = 300, 600
SAME_BOX = 0.5  # px within which two programs' proposals are one
COUNTED = ("proposals", "kept", "likeliest")
_LAST_NORMS, _SHIFTS = ("conv3.norm",), {"anchor_deltas": 0.3, "bbox_pred": 1.0, "cls_score": 1.5}


@contextmanager
def _settling(model: Any) -> Iterator[None]:
    """While it is open, the first pass through a layer sets its scale by what it sees."""
    hooks = []

    def norm(factor: float) -> Callable[..., None]:
        def before(module: Any, inputs: tuple[Tensor, ...]) -> None:
            variance, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
            module.running_mean.copy_(mean)
            module.running_var.copy_(variance)
            module.weight.copy_(factor * (0.8 + 0.4 * torch.rand_like(mean)))
            module.bias.copy_(0.1 * torch.randn_like(mean))

        return before

    def layer(deviation: float) -> Callable[..., Tensor | None]:
        def after(module: Any, _: Any, out: Tensor) -> Tensor | None:
            if hasattr(module, "settled"):
                return None
            module.settled = True
            axes = [0, *range(2, out.dim())]
            variance, mean = torch.var_mean(out, axes, correction=0)
            positive = getattr(module, "activation", None) is not None  # its mean cannot be taken away
            scale = deviation / variance.sqrt().clamp(min=1e-6)
            mean = torch.zeros_like(mean) if positive else mean
            module.weight.mul_(scale.reshape(-1, *[1] * (module.weight.dim() - 1)))
            module.bias.copy_((module.bias - mean) * scale)
            shape = (1, -1, *[1] * (out.dim() - 2))
            return (out - mean.reshape(shape)) * scale.reshape(shape)

        return after

    for name, module in model.named_modules():
        if hasattr(module, "running_var"):
            hooks.append(module.register_forward_pre_hook(norm(0.5 if name.endswith(_LAST_NORMS) else 1.0)))
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            hooks.append(module.register_forward_hook(layer(_SHIFTS.get(name.rpartition(".")[2], 1.0))))
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def settle(model: Any, picture: Tensor) -> None:
    """Scales a detectron2 model's random weights by one picture, uint8 [3, h, w], so that its numbers mean something.

    Each normalisation gets the statistics that it sees; each layer without one is scaled and shifted until its outputs
    have mean 0 and deviation 1 over boxes or cells. So features count in ones, logits of classes spread by 1.5, boxes
    move by a tenth of their sides: no ties, and neither all nor no boxes are kept.
    """
    with _settling(model):
        batch = model.preprocess_image([{"image": picture}])
        maps = model.backbone(batch.tensor)
        found, _ = model.proposal_generator(batch, maps, None)
        model.roi_heads(batch, maps, found, None)


def random_weights(config: RegionsConfig, picture: Tensor, path: Path, seed: int = 0) -> Path:
    """Writes settled weights of the configuration's model as detectron2's zoo does: a pickle of arrays."""
    torch.manual_seed(seed)
    model = build_network(read_config(config), config.detector).eval()
    settle(model, picture)
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "random"}))
    return path


def matched(ours: Proposals, theirs: Proposals) -> tuple[Tensor, Tensor]:
    """Rows of ours and rows of theirs that are one proposal: int64 [M] each."""
    far, row = torch.cdist(ours.boxes, theirs.boxes, p=float("inf")).min(1)
    own = (far < SAME_BOX).nonzero()[:, 0]
    return own, row[own]


def differences(ours: tuple[Proposals, dict[str, Any]], theirs: tuple[Proposals, dict[str, Any]]) -> dict[str, float]:
    """Largest absolute difference of every kind, and how many proposals and kept rows only one of them has."""
    (a, kept), (b, wanted) = ours, theirs
    own, row = matched(a, b)
    out = {
        "proposals": float(len(b.boxes)),
        "proposals of one only": float(len(a.boxes) + len(b.boxes) - 2 * len(set(row.tolist()))),
        "proposals in another place": float((own != row).sum()),
        "kept rows": float(len(wanted["boxes"])),
        "kept rows that differ": float(other_rows(kept["boxes"], wanted["boxes"])),
    }
    same = a.class_probs[own, 1:].argmax(1) == b.class_probs[row, 1:].argmax(1)
    out["likeliest classes that differ"] = float((~same).sum())
    for name, kind in (
        ("boxes", "boxes of proposals, px"),
        ("features", "features"),
        ("class_probs", "probabilities"),
        ("regressed", "refined boxes of the same class, px"),
    ):
        apart = (getattr(a, name)[own] - getattr(b, name)[row]).abs()
        out[kind] = float((apart[same] if name == "regressed" else apart).max())
    out["the image's feature"] = float((a.image_feature - b.image_feature).abs().max())
    out["features, root mean square"] = float(b.features.square().mean().sqrt())
    return out


def other_rows(kept: np.ndarray, wanted: np.ndarray) -> int:
    """Rows [N, 4] px that are another box, in order; all where their numbers differ."""
    if len(kept) != len(wanted):
        return max(len(kept), len(wanted))
    return int((np.abs(kept - wanted).max(1, initial=0) >= SAME_BOX).sum())


def predictor(config: RegionsConfig) -> Callable[[np.ndarray], Any]:
    """detectron2's DefaultPredictor at the same size and number of proposals."""
    from detectron2.engine import DefaultPredictor

    cfg = read_config(config)
    cfg.MODEL.WEIGHTS = str(config.weights)
    return DefaultPredictor(cfg)


def compare(family: str, folder: Path, sizes: Sequence[tuple[int, int]], shorter: int, rounds: int) -> dict[str, Any]:
    """The largest differences over all pictures, folded and not, and seconds a picture of the three ways to run it."""
    yaml, own = FAMILIES[family]
    options: dict[str, Any] = {"size": shorter, "proposals": PROPOSALS}
    path = folder / f"{family}.pkl"
    theirs_config = RegionsConfig(detector=f"detectron2:{yaml}", weights=str(path), **options)
    seen = Image.fromarray(photograph(640, 480, len(sizes))).resize((4 * shorter // 3, shorter))
    random_weights(theirs_config, torch.from_numpy(np.array(seen).transpose(2, 0, 1)), path)
    config = RegionsConfig(detector=own, weights=str(path), **options)
    ours, theirs, whole = load_detector(config), load_detector(theirs_config), predictor(theirs_config)
    with patch.object(FasterRcnn, "fold", lambda self: self):
        unfolded = load_detector(config)
    told: dict[str, dict[str, float]] = {family: {}, f"{family} unfolded": {}}
    spent: dict[str, list[float]] = {}
    for seed, (height, width) in enumerate(sizes):
        picture = photograph(width, height, seed)
        bgr = np.ascontiguousarray(picture[:, :, ::-1])
        ways: dict[str, Callable[[], Any]] = {
            own: partial(described, ours, picture, config),
            "detectron2:": partial(described, theirs, picture, config),
            "DefaultPredictor": partial(whole, bgr),
        }
        for _ in range(rounds):  # one after the other: drift hits all
            found = {name: _spent(way, spent.setdefault(name, [])) for name, way in ways.items()}
        both = (found[own], described(unfolded, picture, config))
        for column, one in zip(told.values(), both, strict=True):
            for name, value in differences(one, found["detectron2:"]).items():
                before = column.get(name, 0)
                column[name] = before + value if name.startswith(COUNTED) else max(before, value)
    seconds = {name.replace(own, "rcnn:"): statistics.median(values) for name, values in spent.items()}
    return {"differences": told, "seconds": seconds}


def described(detector: Detector, picture: np.ndarray, config: RegionsConfig) -> tuple[Proposals, dict[str, Any]]:
    """The proposals of a picture as it is decoded, and what is stored of them."""
    found = find_regions(detector, [picture])[0]
    return found, rows_from_proposals(found, config)


def _spent(way: Callable[[], Any], seconds: list[float]) -> Any:
    """What `way` answers; its processor seconds, which other programs on the machine hardly change, are noted."""
    start = time.process_time()
    answer = way()
    seconds.append(time.process_time() - start)
    return answer


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as Markdown; a family has two columns of differences and one of seconds."""
    columns = {name: one for result in results for name, one in result["differences"].items()}
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for kind in next(iter(columns.values())):
        form = ".0f" if kind.startswith(COUNTED) else ".2g"
        lines.append(f"| {kind} | {' | '.join(format(one[kind], form) for one in columns.values())} |")
    for way in results[0]["seconds"]:
        spent = " | | ".join(f"{result['seconds'][way]:.2f}" for result in results)
        lines.append(f"| processor seconds a picture, `{way}` | {spent} | |")
    ratios = [result["seconds"]["DefaultPredictor"] / result["seconds"]["rcnn:"] for result in results]
    lines.append(f"| DefaultPredictor's seconds over those of `rcnn:` | {' | | '.join(f'{r:.2f}' for r in ratios)} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.detectron2_parity", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small pictures, one round, nothing written")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds [default: %(default)s]")
    given = parser.parse_args()
    require_detectron2("detectron2")
    shorter, rounds = (200, 1) if given.quick else (SHORTER, given.rounds)
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(family, Path(folder), SIZES, shorter, rounds) for family in FAMILIES]
    text = f"{table(results)}\n\n{where(rounds, shorter)}"
    print(text)
    if not given.quick:
        before, rest = PAGE.read_text().split(START)
        PAGE.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}")


def where(rounds: int, shorter: int) -> str:
    """Pictures, versions and machine."""
    about = machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("detectron2", "torch", "torchvision"))
    pictures = ", ".join(f"{width}x{height}" for height, width in SIZES)
    return (
        f"Pictures of {pictures} px, seen at {shorter} px (at most {5 * shorter // 3}); {PROPOSALS} proposals; "
        f"medians of {rounds} rounds a picture, batch 1; {versions}; {about['cpu']}, threads: "
        f"{torch.get_num_threads()}, load {about['load']}."
    )


if __name__ == "__main__":
    main()
