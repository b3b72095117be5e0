"""Golden case region_selection: Caffe's, UNITER's, airsplay's and VisualBERT's selection code."""

import numpy as np
import pytest

from extractors.regions.selection import (
    best_class_boxes,
    keep_boxes,
    max_confidence,
    max_nms,
    per_class_detections,
    uniter_num_boxes,
    visualbert_rows,
)
from tests.parity.golden import check_outputs, golden

# generate_tsv.py: cfg.TEST.NMS and conf_thresh.
CAFFE = {"nms": 0.3, "inclusive": True}
CONF = 0.2
UNITER = {"min_boxes": 10, "max_boxes": 100}
UNITER_EXTRACTED = 100


def _inputs(case, name):
    prefix = name + "."
    return {k.removeprefix(prefix): v.numpy() for k, v in case.inputs.items() if k.startswith(prefix)}


def _caffe_outputs(given):
    low, high = given["limits"].tolist()
    out = {}
    for suffix, equal in (("", False), ("_cpu_nms", True)):
        confidence = max_confidence(given["boxes"], given["probs"], suppress_equal=equal, **CAFFE)
        out["max_conf" + suffix] = confidence
        out["keep" + suffix] = keep_boxes(confidence, CONF, low, high, by_confidence=False)
    extracted = keep_boxes(confidence, CONF, UNITER_EXTRACTED, UNITER_EXTRACTED)
    stored = confidence[extracted].astype(np.float16)
    out["uniter_keep"] = extracted[: uniter_num_boxes(stored, CONF, **UNITER)]
    return out


def _airsplay_outputs(given):
    low, high = given["limits"].tolist()
    size = tuple(given["image_hw"].tolist())
    boxes, labels = best_class_boxes(given["reg_boxes"], given["probs"], size)
    scores = given["probs"][np.arange(len(boxes)), labels + 1]
    kept, threshold = max_nms(boxes, scores, low, high)
    rows, classes, values = per_class_detections(given["reg_boxes"], given["probs"], size, high, CONF)
    return {
        "maxnms_keep": kept,
        "maxnms_class": labels[kept],
        "maxnms_score": scores[kept],
        "maxnms_boxes": boxes[kept],
        "maxnms_thresh": np.float32(threshold),
        "perclass_keep": rows,
        "perclass_class": classes,
        "perclass_score": values,
    }


def _screen_rows(confidence, params):
    """`image_feature_cap` is the older name of a cap that works as `max_cap` does."""
    cap = params.get("max_cap", params.get("image_feature_cap"))
    return visualbert_rows(confidence, params["confidence_cap"], params.get("min_cap"), cap)


def _outputs(case):
    out = {}
    for name, numbers in case.config["cases"].items():
        given = _inputs(case, name)
        found = _caffe_outputs(given) | (_airsplay_outputs(given) if numbers.get("maxnms") else {})
        out |= {f"{name}.{k}": v for k, v in found.items()}
    for i in range(len(case.config["conf_rows"])):
        confidence = case.inputs[f"conf_list.{i}"].numpy()
        out[f"conf_list.{i}.num_bb"] = uniter_num_boxes(confidence, CONF, **UNITER)
        for j, params in enumerate(case.config["screen_params"]):
            out[f"conf_list.{i}.screen.{j}"] = _screen_rows(confidence, params)
    return out


def _tied(case):
    """Names of the outputs in which the originals' unstable sorts chose among equal scores."""
    names = [n for n, numbers in case.config["cases"].items() if numbers.get("tie")]
    return [o for o in case.outputs if o.split(".")[0] in names]


@pytest.mark.parametrize("case", golden("region_selection"), ids=str)
def test_selection_matches_the_originals(case):
    ours = _outputs(case)
    tied = dict.fromkeys(_tied(case), "exact ties: compared by test_ties_are_equal_up_to_their_order")
    check_outputs(case, {k: v for k, v in ours.items() if k not in tied}, left_out=tied)


@pytest.mark.parametrize("case", golden("region_selection"), ids=str)
def test_ties_are_equal_up_to_their_order(case):
    ours, tied = _outputs(case), _tied(case)
    assert tied, "the case has no ties to compare"
    for output in tied:
        name, kind = output.split(".")
        theirs = case.outputs[output].numpy()
        if kind.startswith("max_conf"):
            # Which of two equal boxes suppresses the other is a matter of order; what is kept is not.
            kept = len(case.outputs[output.replace("max_conf", "keep")])
            assert np.array_equal(np.sort(ours[output])[-kept:], np.sort(theirs)[-kept:]), output
            continue
        confidence = "max_conf" if kind == "keep" else "max_conf_cpu_nms"
        mine, their = ours[f"{name}.{confidence}"], case.outputs[f"{name}.{confidence}"].numpy()
        kept = ours[output]
        assert np.array_equal(np.sort(mine[kept]), np.sort(their[theirs])), output
        assert set(np.flatnonzero(mine > mine[kept].min())) <= set(kept), output


@pytest.mark.parametrize("case", golden("region_selection"), ids=str)
def test_stopping_early_changes_nothing(case):
    for name in case.config["cases"]:
        given = _inputs(case, name)
        low, high = given["limits"].tolist()
        limits = {"conf": CONF, "min_boxes": low, "max_boxes": high}
        whole = max_confidence(given["boxes"], given["probs"], **CAFFE)
        short = max_confidence(given["boxes"], given["probs"], **CAFFE, **limits)
        kept = keep_boxes(whole, **limits)
        again = keep_boxes(short, **limits)
        assert np.array_equal(whole[kept], short[again])
        positive = whole[kept] > 0
        assert np.array_equal(kept[positive], again[positive])
