"""Bottom-up attention's detector: every public file form loads, converts and describes images as the others do."""

from __future__ import annotations

import pickle
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from extractors.regions.backends import load_detector
from extractors.regions.butd import AIRSPLAY, MILVLG, from_caffe, read_butd, to_airsplay
from extractors.regions.caffemodel import read_caffemodel
from extractors.regions.config import RegionsConfig
from extractors.regions.extractor import extract_regions
from extractors.regions.protocol import find_regions
from extractors.regions.rcnn import ANCHORS, FasterRcnn, caffe_cell_anchors, cell_anchors, decode
from schemas.errors import PairmillError
from shards.reader import MappedShard
from tests.make import make_dataset
from tests.parity.golden import golden

MILVLG_FILE, AIRSPLAY_FILE = golden("butd_milvlg")[0], golden("butd_attr")[0]
PLAIN = {"rcnn:C4": golden("d2_c4")[0], "rcnn:FPN": golden("d2_fpn")[0]}
BGR_SEEN = {"size": 128, "proposals": 20}


def picture(seed, height=96, width=130):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.ascontiguousarray(noise.repeat(8, 0).repeat(8, 1)[:height, :width])


def config(detector, path, **options):
    return RegionsConfig(detector=detector, weights=str(path), **{**BGR_SEEN, **options})


def milvlg(folder):
    """As MILVLG publishes it: a torch file with the state dict under `model`."""
    torch.save({"model": MILVLG_FILE.weights, "iteration": 3}, folder / "bua.pth")
    return folder / "bua.pth"


def airsplay(folder):
    """As airsplay publishes it: a pickle of numpy arrays."""
    arrays = {name: tensor.numpy() for name, tensor in AIRSPLAY_FILE.weights.items()}
    (folder / "attr.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "converted from caffe"}))
    return folder / "attr.pkl"


def varint(number):
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def chunk(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def blob(tensor, old):
    """A BlobProto: four sides and single numbers, as Caffe wrote before 2015, or a shape and packed numbers."""
    data = tensor.numpy().astype("<f4").tobytes()
    if not old:
        return chunk(7, chunk(1, b"".join(map(varint, tensor.shape)))) + chunk(5, data)
    sides = [1] * (4 - tensor.dim()) + list(tensor.shape)
    numbers = b"".join(varint(5 << 3 | 5) + data[i : i + 4] for i in range(0, len(data), 4))
    return b"".join(varint(n << 3) + varint(side) for n, side in enumerate(sides, 1)) + numbers


def caffemodel(folder, state=None, old=False, name="butd.caffemodel"):
    """The golden case's tensors in Caffe's layers; its statistics as sums over a weight, as Caffe stores them."""
    state = dict(MILVLG_FILE.weights if state is None else state)
    layers = {}

    def convolution(layer, suffix, source):
        layers[layer] = [state[f"{source}.weight"]]
        mean, variance = state[f"{source}.norm.running_mean"], state[f"{source}.norm.running_var"]
        layers[f"bn{suffix}"] = [mean * 4, variance * 4, torch.tensor([4.0])]
        layers[f"scale{suffix}"] = [state[f"{source}.norm.weight"], state[f"{source}.norm.bias"]]

    convolution("conv1", "_conv1", "backbone.stem.conv1")
    for stage in range(2, 6):
        whole = "roi_heads.res5" if stage == 5 else f"backbone.res{stage}"
        count = sum(f"{whole}.{i}.conv1.weight" in state for i in range(50))
        for i in range(count):
            block = f"{stage}a" if not i else f"{stage}b{i}" if stage in (3, 4) else f"{stage}{'abc'[i]}"
            for part, branch in (("conv1", "2a"), ("conv2", "2b"), ("conv3", "2c"), ("shortcut", "1")):
                if f"{whole}.{i}.{part}.weight" in state:
                    convolution(f"res{block}_branch{branch}", f"{block}_branch{branch}", f"{whole}.{i}.{part}")
    rpn, head = "proposal_generator.rpn_head", "roi_heads.box_predictor"
    named = {"rpn_conv/3x3": f"{rpn}.conv", "rpn_cls_score": f"{rpn}.objectness_logits"}
    named |= {"rpn_bbox_pred": f"{rpn}.anchor_deltas", "cls_score": f"{head}.cls_score"}
    named |= {"bbox_pred": f"{head}.bbox_pred", "fc_attr": f"{head}.attr_linear1", "attr_score": f"{head}.attr_linear2"}
    for layer, source in named.items():
        layers[layer] = [state[f"{source}.weight"], state[f"{source}.bias"]]
    layers["cls_embedding"] = [state[f"{head}.cls_embed.weight"]]
    layers["relu"] = []
    written = chunk(1, b"ResNet-101")
    for layer, blobs in layers.items():
        body = chunk(1, layer.encode()) + chunk(2, b"Layer") + b"".join(chunk(7, blob(b, old)) for b in blobs)
        written += chunk(100, body)
    (folder / name).write_bytes(written)
    return folder / name


@pytest.mark.parametrize("old", [False, True])
def test_a_caffemodel_holds_what_milvlgs_file_holds(tmp_path, old):
    kind, state = read_butd(caffemodel(tmp_path, old=old), "butd")
    _, want = read_butd(milvlg(tmp_path), "butd")
    assert kind == "caffe"
    want = {k: v for k, v in want.items() if not k.startswith(ANCHORS)}
    assert set(state) == set(want)
    for name, tensor in want.items():
        assert state[name].shape == tensor.shape, name
        assert torch.allclose(state[name], tensor, rtol=1e-6), name


def test_the_form_is_read_from_the_file_and_can_be_named(tmp_path):
    paths = {"milvlg": milvlg(tmp_path), "airsplay": airsplay(tmp_path), "caffe": caffemodel(tmp_path)}
    for form, path in paths.items():
        detector = load_detector(config("butd", path))
        assert detector.inclusive is (form != "airsplay")
        assert detector.rules.resize == ("pillow" if form == "airsplay" else "opencv")
        assert len(detector.attributes) > 0
        assert load_detector(config(f"butd:{form}", path)).fingerprint != detector.fingerprint
    assert load_detector(config("butd:airsplay-pad1", paths["airsplay"])).rules.caffe_pool is False


def test_milvlgs_weights_in_airsplays_form_mean_the_same(tmp_path):
    """butd.md 5.3: the same scores for the same features, and the same boxes from the same proposals."""
    _, state = read_butd(milvlg(tmp_path), "butd")
    own = FasterRcnn(state, MILVLG)
    own.load_state_dict({k: v for k, v in state.items() if not k.startswith(ANCHORS)})
    turned = to_airsplay(state)
    other = FasterRcnn(turned, AIRSPLAY)
    other.load_state_dict(turned)
    features = torch.rand(7, own.feature_dim)
    with torch.inference_mode():
        logits, deltas, marks = own.roi_heads["box_predictor"](features)
        logits2, deltas2, marks2 = other.roi_heads["box_predictor"](features)
        x = torch.rand(1, state["proposal_generator.rpn_head.conv.weight"].shape[1], 3, 4)
        (scores, moves), (scores2, moves2) = (net.proposal_generator["rpn_head"](x) for net in (own, other))
    assert torch.allclose(logits.roll(-1, 1), logits2, atol=1e-5)
    assert torch.allclose(marks.roll(-1, 1), marks2, atol=1e-5)
    boxes = torch.tensor([[3.0, 4, 60, 50]]).repeat(7, 1)
    theirs = decode(deltas.view(7, -1, 4), boxes, (1, 1, 1, 1))[:, 1:]
    assert torch.allclose(theirs, decode(deltas2.view(7, -1, 4), boxes, AIRSPLAY.box_weights), rtol=1e-4, atol=1e-3)
    # Anchor (ratio r, size s) is 4 r + s there and 3 s + r here.
    background, foreground = scores[0].chunk(2)
    by_ratio = (foreground - background).unflatten(0, (3, 4))
    assert torch.allclose(by_ratio.transpose(0, 1).flatten(0, 1), scores2[0], atol=1e-5)
    by_ratio = moves[0].unflatten(0, (3, 4, 4))
    assert torch.allclose(by_ratio.transpose(0, 1).flatten(0, 2), moves2[0], atol=1e-5)


def test_anchors_are_those_of_the_two_families():
    """The numbers of butd.md, which were printed by the originals' own code."""
    caffe = caffe_cell_anchors((4, 8, 16, 32))
    assert caffe[:2].tolist() == [[-38, -16, 53, 31], [-84, -40, 99, 55]]
    assert caffe[-1].tolist() == [-168, -344, 183, 359]
    own = cell_anchors((64, 128, 256, 512))
    assert torch.allclose(own[0], torch.tensor([-45.2548, -22.6274, 45.2548, 22.6274]), atol=1e-3)
    assert own[1].tolist() == [-32, -32, 32, 32]


@pytest.mark.parametrize("detector", ["butd:milvlg", "butd:caffe", "butd:airsplay", *PLAIN])
def test_rows_depend_on_no_other_image(tmp_path, detector):
    path = milvlg(tmp_path)
    if detector in PLAIN:
        path = tmp_path / "plain.safetensors"
        save_file(PLAIN[detector].weights, path)
    own = load_detector(config(detector, path))
    images = [picture(0), picture(1, 60, 150), picture(2), np.zeros((1, 1, 3), np.uint8), picture(3, 200, 3)]
    together = find_regions(own, images)
    for image, found in zip(images, together, strict=True):
        (alone,) = find_regions(own, [image])
        height, width = image.shape[:2]
        assert torch.isfinite(found.features).all()
        assert found.boxes.shape == alone.boxes.shape
        assert torch.allclose(found.boxes, alone.boxes, atol=1e-2)
        assert torch.allclose(found.features, alone.features, atol=1e-2, rtol=1e-3)
        assert torch.allclose(found.image_feature, alone.image_feature, atol=1e-2, rtol=1e-3)
        assert (found.boxes <= torch.tensor([width, height] * 2) + 1e-3).all()
        assert (found.regressed >= 0).all()
        assert torch.allclose(found.class_probs.sum(1), torch.ones(len(found.boxes)), atol=1e-4)


@pytest.mark.parametrize("detector", ["butd:milvlg", "butd:airsplay", "rcnn:FPN"])
def test_proposals_that_are_given_back_get_their_features(tmp_path, detector):
    path = milvlg(tmp_path)
    if detector in PLAIN:
        path = tmp_path / "plain.safetensors"
        save_file(PLAIN[detector].weights, path)
    own = load_detector(config(detector, path))
    images = [picture(4), picture(5, 70, 70)]
    proposed = find_regions(own, images)
    for a, b in zip(proposed, find_regions(own, images, [p.boxes for p in proposed]), strict=True):
        assert len(a.boxes) > 2
        assert torch.allclose(a.boxes, b.boxes, atol=1e-3)
        assert torch.allclose(a.features, b.features, atol=1e-2, rtol=1e-2)
        assert b.regressed is None
    (none,) = find_regions(own, images[:1], [torch.zeros(0, 4)])
    assert none.features.shape == (0, own.feature_dim)


def test_a_very_long_image_has_regions(tmp_path):
    own = load_detector(config("butd", milvlg(tmp_path)))
    (found,) = find_regions(own, [np.zeros((10, 20000, 3), np.uint8)])
    assert torch.isfinite(found.features).all()


def test_extraction_stores_names_and_attributes(tmp_path):
    path = milvlg(tmp_path)
    classes, attributes = (
        len(MILVLG_FILE.weights[f"roi_heads.box_predictor.{n}.weight"]) - 1 for n in ("cls_score", "attr_linear2")
    )
    (tmp_path / "objects_vocab.txt").write_text("".join(f"thing {i},synonym\n" for i in range(classes)))
    (tmp_path / "attributes_vocab.txt").write_text("".join(f"kind {i}\n" for i in range(attributes)))
    dataset = make_dataset(tmp_path / "ds", shards=1, rows=2)
    extract_regions(dataset, config("butd", path, workers=0, min_boxes=3, max_boxes=9))
    mapped = MappedShard(dataset.folder, dataset.stage("features/regions").file(0))
    row = mapped.row(0)
    assert row["state"] == "ok"
    assert 3 <= row["num_boxes"] <= 9
    assert len(row["attr_id"]) == row["num_boxes"]
    assert b"thing 3" in mapped.schema.metadata[b"pairmill.about"]
    assert b"synonym" not in mapped.schema.metadata[b"pairmill.about"]
    (tmp_path / "objects_vocab.txt").write_text("one\ntwo\n")
    with pytest.raises(PairmillError, match=r"objects_vocab.txt` names 2 classes"):
        load_detector(config("butd", path))


def test_what_is_wrong_with_weights_is_said(tmp_path):
    with pytest.raises(PairmillError, match=r"needs weights.*bua-caffe-frcn"):
        load_detector(RegionsConfig(detector="butd"))
    with pytest.raises(PairmillError, match=r"no such file"):
        load_detector(config("butd", tmp_path / "none.pth"))
    with pytest.raises(PairmillError, match=r"no such form.*Did you mean `?milvlg"):
        load_detector(config("butd:milvl", milvlg(tmp_path)))
    with pytest.raises(PairmillError, match="airsplay's weights"):
        load_detector(config("butd:caffe", airsplay(tmp_path)))
    torch.save({"layer1.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(PairmillError, match=r"it has no `proposal_generator.*first names are layer1.weight"):
        load_detector(config("butd", tmp_path / "other.pth"))
    state = dict(MILVLG_FILE.weights)
    state["roi_heads.extra.weight"] = torch.zeros(1)
    del state["backbone.res3.0.conv2.norm.bias"]
    torch.save(state, tmp_path / "changed.pth")
    with pytest.raises(
        PairmillError, match=r"1 missing: backbone.res3.0.conv2.norm.bias; 1 unexpected: roi_heads.extra"
    ):
        load_detector(config("butd", tmp_path / "changed.pth"))
    save_file(PLAIN["rcnn:FPN"].weights, tmp_path / "fpn.safetensors")
    with pytest.raises(PairmillError, match="Pass --detector rcnn:FPN"):
        load_detector(config("rcnn:C4", tmp_path / "fpn.safetensors"))
    with pytest.raises(PairmillError, match="pass rcnn:C4 or rcnn:FPN"):
        load_detector(config("rcnn:DC5", tmp_path / "fpn.safetensors"))


def test_what_is_wrong_with_a_caffemodel_is_said(tmp_path):
    whole = caffemodel(tmp_path)
    (tmp_path / "cut.caffemodel").write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(PairmillError, match=r"cut.caffemodel`: not a .caffemodel, or one that was cut short"):
        read_caffemodel(tmp_path / "cut.caffemodel")
    (tmp_path / "none.caffemodel").write_bytes(chunk(1, b"nothing"))
    with pytest.raises(PairmillError, match="no layer with weights"):
        read_caffemodel(tmp_path / "none.caffemodel")
    (tmp_path / "text.caffemodel").write_bytes(b"<html>not found</html>")
    with pytest.raises(PairmillError, match=r"not a .caffemodel"):
        read_caffemodel(tmp_path / "text.caffemodel")
    layers = read_caffemodel(whole)
    del layers["rpn_bbox_pred"]
    with pytest.raises(PairmillError, match=r"layer `rpn_bbox_pred` has 0 of 2 blobs"):
        from_caffe(layers, "butd", whole)


def test_statistics_that_a_file_leaves_out_are_0_and_1(tmp_path):
    arrays = {k: v.numpy() for k, v in AIRSPLAY_FILE.weights.items() if "running_" not in k}
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}))
    _, state = read_butd(tmp_path / "bare.pkl", "butd")
    assert state["backbone.stem.conv1.norm.running_var"].eq(1).all()
    assert state["backbone.stem.conv1.norm.running_mean"].eq(0).all()


def test_numbers_of_ten_bytes_and_more_are_no_varints(tmp_path):
    (tmp_path / "long.caffemodel").write_bytes(b"\xff" * 40 + struct.pack("<q", 0))
    with pytest.raises(PairmillError, match="more than ten bytes"):
        read_caffemodel(tmp_path / "long.caffemodel")
