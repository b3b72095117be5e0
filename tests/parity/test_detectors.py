"""Golden cases butd, butd_attr, butd_pad1, butd_milvlg, d2_c4, d2_fpn: detectors of our own parts, no detectron2."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from extractors.regions.butd import AIRSPLAY, FORMS, MILVLG, read_butd
from extractors.regions.rcnn import Rules, clip_boxes, decode, grid_anchors, pyramid_level
from extractors.regions.rcnn_detector import C4, FPN, Scale, build, enlarged_by, network_input, resized
from extractors.regions.selection import (
    best_class_boxes,
    keep_boxes,
    max_confidence,
    max_nms,
    per_class_detections,
)
from tests.parity.golden import Case, check_outputs, golden

FEATURES, PROBS, BOXES = (1e-4, 1e-4), (2e-5, 0.0), (2e-3, 1e-4)
LIMITS = ("10_100", "12_12", "4_9")
# Where features count in tens, float32's own noise (`float32_vs_float64_max_abs_diff`) exceeds the stated bound.
NOISE = 2.0
_BOX_LIKE = ("bbox", "proposals", "anchors", "rpn_decoded_unclipped")


def _tolerances(case: Case, names) -> dict[str, tuple[float, float]]:
    """The case's three bounds by kind of output, and never below the noise that it states for the original."""
    noise = case.info["float32_vs_float64_max_abs_diff"]
    out = {}
    for name in names:
        last = name.rsplit(".", 1)[-1]
        if not case.outputs[name].is_floating_point():
            atol, rtol = 0.0, 0.0
        elif "prob" in last or "conf" in last or last == "scores":
            atol, rtol = PROBS
        elif last in _BOX_LIKE or "boxes" in last:
            atol, rtol = BOXES
        else:
            atol, rtol = FEATURES
        out[name] = (max(atol, NOISE * noise.get(f"out.{name}", 0.0)), rtol)
    return out


class Run:
    """One image of a case through the network, part by part."""

    def __init__(self, model, rules: Rules, bgr: Tensor) -> None:
        self.model, self.rules = model, rules
        self.raw = (bgr.shape[0], bgr.shape[1])
        self.small = resized(np.ascontiguousarray(bgr.numpy()[:, :, ::-1]), rules)
        self.size = (self.small.shape[1], self.small.shape[2])
        self.scale = Scale(self.raw, self.size, rules)
        self.input = network_input([self.small], rules, model.kind)
        self.of(model.maps(self.input), 0)

    def of(self, maps, at: int) -> None:
        """Everything from the maps of a batch, of which this is image `at`."""
        model = self.model
        self.heads = [(s[at], d[at]) for s, d in model.rpn(maps)]
        self.maps = [m[at : at + 1] for m in maps]
        self.candidates = [model.candidates(s, d, level) for level, (s, d) in enumerate(self.heads)]
        self.proposals, self.scores = model.proposals(self.candidates, self.size, enlarged_by(*self.raw, self.rules))
        self.found = model.describe(self.maps, self.proposals)
        self.probs = self.found.logits.softmax(1)

    @property
    def foreground_last(self) -> np.ndarray:
        """Probabilities with the background first, as our rules of selection take them."""
        return (self.probs if self.rules.background_first else self.probs.roll(1, 1)).numpy()

    def class_boxes(self) -> Tensor:
        """[R, K, 4], px of the network's input."""
        return decode(self.found.deltas, self.proposals, self.rules.box_weights)

    def anchors(self, level: int) -> Tensor:
        height, width = self.heads[level][1].shape[1:]
        cell = self.model.get_buffer(f"cell_anchors_{level}")
        return grid_anchors(cell, height, width, self.model.strides[level])

    def stored(self, boxes) -> Tensor:
        """Boxes in raw pixels, clipped to the image."""
        return clip_boxes(self.scale.to_stored(torch.as_tensor(boxes)), *self.raw)

    def detections(self, conf: float, nms: float, most: int):
        boxes = self.class_boxes().flatten(1).numpy()
        return per_class_detections(boxes, self.foreground_last, self.size, most, conf, nms)


def _rules(case: Case, base: Rules) -> Rules:
    numbers = case.info["config_numbers"]
    sizes = numbers.get("SIZES") or numbers["SCALES"]
    nested = sizes if isinstance(sizes[0], list) else [sizes]
    return replace(
        base,
        anchor_sizes=tuple(tuple(s) for s in nested),
        shorter=numbers["MIN"],
        longer=numbers["MAX"],
        before_nms=numbers["PRE"],
        proposals=numbers["POST"],
        min_side=float(numbers.get("MINS", 0)),
    )


def _runs(case: Case, base: Rules) -> tuple[Rules, list[Run]]:
    rules = _rules(case, base)
    _, state = read_butd(case.folder / "weights.safetensors", str(case))
    model = build(state, rules, str(case), case.folder).eval()
    images = [case.inputs[f"img{i}.raw_bgr"] for i in range(len(case.info["config_numbers"]["imgs"]))]
    return rules, [Run(model, rules, image) for image in images]


def _together(runs: list[Run]) -> list[int]:
    """The images of a case as one batch, filled with zeros to the largest: the originals' batches; its shape."""
    sides = [max(r.input.shape[side] for r in runs) for side in (2, 3)]
    batch = torch.zeros(len(runs), 3, *sides)
    for i, run in enumerate(runs):
        batch[i, :, : run.input.shape[2], : run.input.shape[3]] = run.input[0]
    maps = runs[0].model.maps(batch)
    for i, run in enumerate(runs):
        run.of(maps, i)
    return list(batch.shape)


def _check(case: Case, got: dict) -> None:
    got = {name: value for name, value in got.items() if name in case.outputs}
    check_outputs(case, got, tolerance=_tolerances(case, got))


def _stem(run: Run) -> Tensor:
    return run.model.backbone.stem(run.input)[0]


def _proposal_outputs(i: int, run: Run) -> dict:
    """What the airsplay and the Caffe forms are compared in alike. Names the case does not have are left aside."""
    scores, deltas = run.heads[0]
    boxes, flat = run.candidates[0]
    pooled = run.model.pool(run.maps, run.proposals[:1])
    out = {
        "input": run.input[0],
        "stem": _stem(run),
        "res4": run.maps[0][0],
        "anchors": run.anchors(0),
        "rpn_deltas": deltas,
        "rpn_decoded_unclipped": boxes,
        "proposals": run.proposals,
        "box_features": run.found.features,
        "cls_logits": run.found.logits,
        "cls_prob": run.probs,
        "bbox_deltas": run.found.deltas.flatten(1),
        "roi_pool_first": pooled,
        "res5_first": run.model.roi_heads["res5"](pooled),
        "rpn_objectness": scores,
        "rpn_cls_score": scores,
        "rpn_logits_flat": flat,
        "rpn_fg_prob": flat,
        "proposal_logits": run.scores,
        "proposal_scores": run.scores,
        "attr_embed_class": run.found.logits.argmax(1),
    }
    if not run.small.is_floating_point():
        out["resized_bgr"] = run.small.flip(0).permute(1, 2, 0)
    return {f"img{i}.{name}": value for name, value in out.items()}


def _airsplay_outputs(case: Case, i: int, run: Run) -> dict:
    out = {"class_boxes": run.class_boxes()}
    scale = enlarged_by(*run.raw, run.rules)
    confidence = max_confidence(run.proposals.numpy() / scale, run.foreground_last, 0.3, inclusive=True)
    out |= {"butd_rule.im_scale": torch.tensor(scale, dtype=torch.float64), "butd_rule.max_conf": confidence}
    for limits in LIMITS:
        low, high = map(int, limits.split("_"))
        out[f"butd_rule.keep_{limits}"] = keep_boxes(confidence, 0.2, low, high, by_confidence=False)
    rows, labels, scores = run.detections(0.2, 0.6, 100)
    at = run.class_boxes()[rows, labels]
    whole = torch.as_tensor(clip_boxes(at, *run.size))
    named = {"proposal_index": rows, "classes": labels, "scores": scores, "boxes": whole}
    out |= {f"cfg_nms.{name}": value for name, value in named.items()}
    call = {"classes": labels, "scores": scores, "boxes": run.stored(whole)}
    out |= {f"model_call.{name}": value for name, value in call.items()}
    wanted, counts = case.info["config_numbers"]["NUM_OBJECTS"], []
    for overlap in np.arange(0.5, 1, 0.1):
        rows, labels, scores = run.detections(0.2, float(overlap), wanted)
        counts.append(len(rows))
        if len(rows) == wanted:
            break
    at = run.stored(clip_boxes(run.class_boxes()[rows, labels], *run.size))
    demo = {"proposal_index": rows, "classes": labels, "scores": scores, "boxes": at}
    demo |= {"counts_per_nms": np.array(counts), "features": run.found.features[rows]}
    logits = run.found.attribute_logits
    if logits is not None:
        without = logits[:, :-1].softmax(1)
        out |= {"attr_logits": logits, "attr_prob_full": logits.softmax(1), "attr_prob_no_last": without}
        demo |= {"attr_scores": without[rows].max(1).values, "attr_classes": without[rows].argmax(1)}
    out |= {f"demo.{name}": value for name, value in demo.items()}
    return {f"img{i}.{name}": value for name, value in out.items()}


def _maxnms(i: int, run: Run, how: str) -> dict:
    boxes, labels = best_class_boxes(run.class_boxes().flatten(1).numpy(), run.foreground_last, run.size)
    scores = run.foreground_last[np.arange(len(boxes)), labels + 1]
    kept, _ = max_nms(boxes, scores, 10, 12)
    found = {
        "boxes": run.stored(boxes[kept]),
        "classes": labels[kept],
        "scores": scores[kept],
        "features": run.found.features[kept],
    }
    return {f"img{i}.maxnms_{how}.{name}": value for name, value in found.items()}


@pytest.mark.parametrize("case", [*golden("butd"), *golden("butd_attr"), *golden("butd_pad1")], ids=str)
@torch.inference_mode()
def test_airsplay(case):
    pad1 = case.info["config_effective"]["CAFFE_MAXPOOL"] is False
    _, runs = _runs(case, FORMS["airsplay-pad1"] if pad1 else AIRSPLAY)
    got: dict = {}
    for i, run in enumerate(runs):
        got |= _proposal_outputs(i, run) | _airsplay_outputs(case, i, run) | _maxnms(i, run, "single")
    got["maxnms_batch.input_shape"] = torch.tensor(_together(runs))
    for i, run in enumerate(runs):
        got |= _maxnms(i, run, "batch")
    _check(case, got)


@pytest.mark.parametrize("case", golden("butd_milvlg"), ids=str)
@torch.inference_mode()
def test_milvlg(case):
    rules, runs = _runs(case, MILVLG)
    got: dict = {}
    for i, run in enumerate(runs):
        scale = enlarged_by(*run.raw, rules)
        raw = run.scale.to_stored(run.proposals)
        attributes = run.found.attribute_logits.softmax(1)
        confidence = max_confidence(raw.numpy(), run.probs.numpy(), 0.3, inclusive=True, suppress_equal=True)
        own = {
            "im_scale": torch.tensor(scale, dtype=torch.float64),
            "class_boxes_raw_px": decode(run.found.deltas, raw, rules.box_weights, inclusive=True),
            "attr_prob": attributes,
            "max_conf": confidence,
        }
        for limits in LIMITS:
            low, high = map(int, limits.split("_"))
            kept = keep_boxes(confidence, case.info["config_numbers"]["CONF"], low, high, by_confidence=False)
            probs, marks = run.probs[kept, 1:], attributes[kept, 1:]
            stored = {
                "bbox": raw[kept],
                "x": run.found.features[kept],
                "objects_id": probs.argmax(1),
                "objects_conf": probs.max(1).values,
                "attrs_id": marks.argmax(1),
                "attrs_conf": marks.max(1).values,
            }
            own |= {f"extract_{limits}.{name}": value for name, value in stored.items()}
        got |= _proposal_outputs(i, run) | {f"img{i}.{name}": value for name, value in own.items()}
    _check(case, got)


def _plain_outputs(case: Case, i: int, run: Run) -> dict:
    out = _proposal_outputs(i, run) if run.model.kind == "C4" else {}
    names = ["res4"] if run.model.kind == "C4" else ["p2", "p3", "p4", "p5", "p6"]
    own: dict = {}
    for level, name in enumerate(names):
        scores, deltas = run.heads[level]
        own |= {
            name: run.maps[level][0],
            f"{name}.rpn_objectness": scores,
            f"{name}.rpn_deltas": deltas,
            f"{name}.anchors": run.anchors(level),
            f"{name}.rpn_decoded_unclipped": run.candidates[level][0],
        }
    own |= {
        "input": run.input[0],
        "resized_bgr": run.small.flip(0).permute(1, 2, 0),
        "proposals": run.proposals,
        "proposal_logits": run.scores,
        "proposal_level": pyramid_level(run.proposals),
        "pooled_first4": run.model.pool(run.maps, run.proposals[:4])[:, :, :7, :7],
        "box_features": run.found.features,
        "cls_logits": run.found.logits,
        "cls_prob": run.probs,
        "bbox_deltas": run.found.deltas.flatten(1),
        "class_boxes": run.class_boxes(),
    }
    rows, labels, scores = run.detections(0.05, 0.5, case.info["config_numbers"]["DET"])
    seen = clip_boxes(run.class_boxes()[rows, labels], *run.size)
    own |= {
        "det.proposal_index": rows,
        "det.classes": labels,
        "det.scores": scores,
        "det.features": run.found.features[rows],
        "det.boxes_network_px": seen,
        "det.boxes": run.stored(seen),
    }
    return out | {f"img{i}.{name}": value for name, value in own.items()}


@pytest.mark.parametrize("case", [*golden("d2_c4"), *golden("d2_fpn")], ids=str)
@torch.inference_mode()
def test_detectron2(case):
    _, runs = _runs(case, C4 if case.info["case"] == "d2_c4" else FPN)
    got: dict = {}
    for i, run in enumerate(runs):
        got |= _plain_outputs(case, i, run)
    if "level_boxes" in case.inputs:
        boxes = case.inputs["level_boxes"]
        got |= {"level_assign": pyramid_level(boxes), "level_pooled": runs[2].model.pool(runs[2].maps, boxes)}
    got["batch.input_shape"] = torch.tensor(_together(runs))
    for i, run in enumerate(runs):
        rows, labels, scores = run.detections(0.05, 0.5, case.info["config_numbers"]["DET"])
        seen = clip_boxes(run.class_boxes()[rows, labels], *run.size)
        got |= {
            f"img{i}.batch.boxes": run.stored(seen),
            f"img{i}.batch.classes": labels,
            f"img{i}.batch.scores": scores,
        }
    _check(case, got)
