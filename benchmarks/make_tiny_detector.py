"""Train `torchvision:tiny` on generated scenes and write its weights and their description.

    python -m benchmarks.make_tiny_detector [--steps 900] [--out extractors/regions]

Prints the loss while it trains, then recall on held-out scenes: the share of true objects for which a stored
row has IoU 0.5 or more and the right class.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from cli.demo.scene_graph import COLOURS, SHAPES
from cli.demo.scenes import Scene, generate_scene
from extractors.regions.tiny import TRAINED_PX, build_tiny, pair_names

BATCH = 8
SCENES = 4000
HELD_OUT_SEED = 10_000_000
NAMES = pair_names(SHAPES, COLOURS)


def label(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 [N, 4] px, classes int64 [N], 1 and up."""
    boxes = np.array([o.box for o in scene.objects], np.float32)
    return boxes, np.array([1 + NAMES.index(f"{o.colour} {o.shape}") for o in scene.objects])


def crop(rng: np.random.Generator, image: np.ndarray, boxes: np.ndarray, classes: np.ndarray) -> tuple:
    """A random square, scaled to TRAINED_PX, perhaps mirrored; objects that are seen by half stay."""
    size = image.shape[0]
    side = int(size * rng.uniform(0.4, 1.0)) if rng.random() < 0.5 else size
    x, y = (int(v) for v in rng.integers(0, size - side + 1, 2))
    scale = TRAINED_PX / side
    cut = boxes.reshape(-1, 2, 2) - (x, y)
    seen = cut.clip(0, side)
    share = (seen[:, 1] - seen[:, 0]).prod(1) / (cut[:, 1] - cut[:, 0]).prod(1)
    boxes, classes = seen.reshape(-1, 4)[share > 0.5] * scale, classes[share > 0.5]
    method = cv2.INTER_AREA if rng.random() < 0.5 else cv2.INTER_LINEAR
    image = cv2.resize(image[y : y + side, x : x + side], (TRAINED_PX, TRAINED_PX), interpolation=method)
    if rng.random() < 0.5:
        image, boxes = image[:, ::-1], boxes.copy()
        boxes[:, [0, 2]] = TRAINED_PX - boxes[:, [2, 0]]
    return image, boxes, classes


def batch(rng: np.random.Generator, pool: list[tuple]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """BATCH images [3, H, W] in 0 to 1, and their targets."""
    images, targets = [], []
    for i in rng.integers(len(pool), size=BATCH):
        image, boxes, classes = crop(rng, *pool[i])
        image = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / 255
        images.append(torch.from_numpy(np.clip(image * rng.uniform(0.85, 1.15), 0, 1)))
        boxes = torch.from_numpy(boxes.astype(np.float32).reshape(-1, 4))
        targets.append({"boxes": boxes, "labels": torch.from_numpy(classes)})
    return images, targets


def train(steps: int, threads: int) -> torch.nn.Module:
    """Train from scratch: AdamW, a short warm-up, then a cosine to zero."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    scenes = [generate_scene(seed, 2 * TRAINED_PX) for seed in range(SCENES)]
    pool = [(scene.image, *label(scene)) for scene in scenes]
    model = build_tiny(len(SHAPES), len(COLOURS)).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(NAMES)} classes")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=1e-4)
    start, mean = time.perf_counter(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        losses = model(*batch(rng, pool))
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  loss {mean:.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


def recall(folder: Path, count: int = 300) -> dict[str, float]:
    """Share of true objects found at IoU 0.5, with any and with the right class, from the stored weights."""
    from extractors.regions.config import RegionsConfig
    from extractors.regions.protocol import find_regions
    from extractors.regions.selection import rows_from_proposals
    from extractors.regions.torchvision import TorchvisionDetector

    found = {}
    for source in ("proposal", "regressed"):
        config = RegionsConfig(
            detector="torchvision:tiny", weights=str(folder / "tiny.safetensors"), box_source=source, min_boxes=1
        )
        detector = TorchvisionDetector(config)
        hits = np.zeros(3)
        for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + count):
            scene = generate_scene(seed, 2 * TRAINED_PX)
            rows = rows_from_proposals(find_regions(detector, [scene.image])[0], config)
            boxes, classes = label(scene)
            near = torchvision.ops.box_iou(torch.from_numpy(boxes), torch.from_numpy(rows["boxes"])) >= 0.5
            right = near.numpy() & (rows["obj_id"][None] == classes[:, None] - 1)
            hits += near.any(1).sum().item(), right.any(1).sum(), len(boxes)
        found[f"any_class_{source}"] = round(float(hits[0] / hits[2]), 4)
        found[f"right_class_{source}"] = round(float(hits[1] / hits[2]), 4)
    return found


def write(model: torch.nn.Module, folder: Path, command: str) -> None:
    """Write the weights as fp16 and describe them."""
    weights = folder / "tiny.safetensors"
    state = {k: v.half().contiguous() for k, v in model.state_dict().items() if v.is_floating_point()}
    save_file(state, weights)
    about = {
        "classes": list(NAMES),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "command": command,
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    path = folder / "tiny.json"
    path.write_text(json.dumps(about, indent=1) + "\n")
    about["recall_iou50"] = recall(folder)
    path.write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about["recall_iou50"]))


def main() -> None:
    """Parse the arguments, train, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("extractors/regions"))
    args = parser.parse_args()
    command = f"python -m benchmarks.make_tiny_detector --steps {args.steps} --threads {args.threads}"
    write(train(args.steps, args.threads), args.out, command)


if __name__ == "__main__":
    main()
