"""The torchvision backend: equal to torchvision's own parts, blind to batch neighbours, strict with weights."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import get_model

from cli.demo.scenes import generate_scene
from extractors.regions import torchvision as backend
from extractors.regions.backends import load_detector
from extractors.regions.config import RegionsConfig
from extractors.regions.protocol import find_regions
from extractors.regions.selection import rows_from_proposals
from extractors.regions.torchvision import TorchvisionDetector, weights_file
from schemas.errors import PairmillError
from shards.weights import read_checkpoint

NAME = "fasterrcnn_mobilenet_v3_large_320_fpn"
CLASSES = 7


def _image(seed, size):
    return torch.from_numpy(generate_scene(seed, size).image).permute(2, 0, 1).contiguous()


@pytest.fixture(scope="module")
def tiny():
    return TorchvisionDetector(RegionsConfig())


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of a real architecture, as torchvision's training scripts save them."""
    torch.manual_seed(0)
    model = get_model(NAME, weights=None, weights_backbone=None, num_classes=CLASSES)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({"model": model.state_dict(), "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def mobile(weights):
    config = RegionsConfig(detector=f"torchvision:{NAME}", weights=str(weights), size=96, proposals=20)
    return TorchvisionDetector(config)


def _find(detector, images, boxes=None):
    """Images as uint8 [3, H, W] tensors."""
    return find_regions(detector, [image.permute(1, 2, 0).numpy() for image in images], boxes)


def _close(a, b, tolerance=1e-4):
    for name in ("boxes", "features", "class_probs", "image_feature", "regressed"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.shape == y.shape, name
        assert torch.allclose(x, y, atol=tolerance, rtol=tolerance), (name, (x - y).abs().max())


def test_shapes(mobile):
    (found,) = _find(mobile, [_image(0, (120, 200))])
    count = len(found.boxes)
    assert 0 < count <= 20
    assert found.features.shape == (count, mobile.feature_dim) == (count, 1024)
    assert found.class_probs.shape == (count, CLASSES)
    assert len(mobile.classes) == CLASSES - 1
    assert torch.allclose(found.class_probs.sum(1), torch.ones(count), atol=1e-5)
    assert found.boxes.min() >= 0
    assert (found.boxes <= torch.tensor([200.0, 120, 200, 120])).all()
    assert found.attribute_probs is None


def test_equal_to_torchvisions_own_forward(mobile):
    """Proposals, features and scores as hooks see them while torchvision runs the same image."""
    image = _image(1, (150, 230))
    seen = {}
    model = mobile.model
    parts = {"rpn": model.rpn, "head": model.roi_heads.box_head, "predictor": model.roi_heads.box_predictor}
    hooks = [
        m.register_forward_hook(lambda _m, _i, out, key=key: seen.__setitem__(key, out)) for key, m in parts.items()
    ]
    with torch.inference_mode():
        model([image.float() / 255])
    for hook in hooks:
        hook.remove()
    (found,) = _find(mobile, [image])
    height, width = mobile._prepare(image)[1]
    proposals = seen["rpn"][0][0] * torch.tensor([230 / width, 150 / height] * 2)
    assert torch.allclose(found.boxes, proposals, atol=1e-3)
    assert torch.allclose(found.features, seen["head"], atol=1e-5)
    assert torch.allclose(found.class_probs, seen["predictor"][0].softmax(1), atol=1e-6)


@pytest.mark.parametrize("name", ["tiny", "mobile"])
def test_rows_do_not_depend_on_the_batch(name, request):
    detector = request.getfixturevalue(name)
    sizes = [128, (96, 160), 128, 64]
    images = [_image(seed, size) for seed, size in enumerate(sizes)]
    together = _find(detector, images)
    for image, found in zip(images, together, strict=True):
        _close(found, _find(detector, [image])[0])
    backwards = _find(detector, images[::-1])[::-1]
    for a, b in zip(together, backwards, strict=True):
        _close(a, b)


@pytest.mark.parametrize("size", [(128, 128), (96, 161), (1, 900), (517, 300)])
def test_key_is_the_padded_size(size, mobile):
    padded, _ = mobile._prepare(torch.zeros(3, *size, dtype=torch.uint8))
    assert mobile.key(*size) == tuple(padded.shape[-2:])


def test_given_boxes_get_the_features_of_equal_proposals(mobile):
    images = [_image(3, (140, 200)), _image(4, 100)]
    proposed = _find(mobile, images)
    described = _find(mobile, images, [p.boxes for p in proposed])
    for a, b in zip(proposed, described, strict=True):
        assert torch.allclose(a.boxes, b.boxes, atol=1e-3)
        assert torch.allclose(a.features, b.features, atol=1e-3, rtol=1e-3)
        assert torch.allclose(a.class_probs, b.class_probs, atol=1e-4)
        assert torch.allclose(a.image_feature, b.image_feature, atol=1e-4)
        assert b.regressed is None


def test_no_given_boxes_and_no_images(tiny):
    (found,) = _find(tiny, [_image(0, 128)], [torch.zeros(0, 4)])
    assert found.boxes.shape == (0, 4)
    assert found.features.shape == (0, tiny.feature_dim)
    assert found.image_feature.shape == (tiny.feature_dim,)
    assert _find(tiny, []) == []


@pytest.mark.parametrize("size", [(1, 900), (900, 1), (2, 2), (33, 500)])
def test_extreme_shapes(size, tiny):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    (found,) = _find(tiny, [image])
    assert torch.isfinite(found.features).all()
    _close(_find(tiny, [_image(5, 128), image])[1], found)


def test_a_narrow_first_image_changes_nothing(tiny):
    other = TorchvisionDetector(RegionsConfig())
    _find(other, [torch.zeros(3, 8, 500, dtype=torch.uint8)])
    _close(_find(other, [_image(6, 128)])[0], _find(tiny, [_image(6, 128)])[0])


def _recall(detector, config, seeds):
    hit = total = 0
    for seed in seeds:
        scene = generate_scene(seed, 256)
        image = torch.from_numpy(scene.image).permute(2, 0, 1)
        rows = rows_from_proposals(_find(detector, [image])[0], config)
        names = [detector.classes[i] for i in rows["obj_id"]]
        for thing in scene.objects:
            near = _iou(np.array(thing.box, np.float32), rows["boxes"]) >= 0.5
            hit += any(n == f"{thing.colour} {thing.shape}" for n in np.array(names)[near])
            total += 1
    return hit / total


def _iou(box, boxes):
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    shared = (high - low).clip(0).prod(1)
    return shared / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - shared)


@pytest.mark.parametrize("source", ["proposal", "regressed"])
def test_tiny_finds_and_names_what_is_there(tiny, source):
    config = RegionsConfig(min_boxes=1, box_source=source)
    assert _recall(tiny, config, range(20_000_000, 20_000_025)) > 0.85


def test_tiny_names_little_that_is_not_there(tiny):
    config = RegionsConfig(min_boxes=0, conf=0.5)
    named = []
    for seed in range(20_000_000, 20_000_020):
        scene = generate_scene(seed, 256)
        rows = rows_from_proposals(_find(tiny, [torch.from_numpy(scene.image).permute(2, 0, 1)])[0], config)
        there = {f"{o.colour} {o.shape}" for o in scene.objects}
        named += [tiny.classes[i] in there for i in rows["obj_id"]]
    assert np.mean(named) > 0.85


def test_tiny_weights_are_those_described(tiny):
    about = json.loads(Path(backend.__file__).with_name("tiny.json").read_text())
    assert about["sha256"] in tiny.fingerprint
    assert tuple(about["classes"]) == tiny.classes
    assert about["recall_iou50"]["right_class_proposal"] >= 0.8
    state = load_file(Path(backend.__file__).with_name("tiny.safetensors"))
    assert {t.dtype for t in state.values()} == {torch.float16}


def test_fingerprint_follows_what_changes_the_rows(weights, mobile):
    config = RegionsConfig(detector=f"torchvision:{NAME}", weights=str(weights), size=96, proposals=20)
    assert TorchvisionDetector(config).fingerprint == mobile.fingerprint
    for change in ({"size": 128}, {"proposals": 21}):
        other = TorchvisionDetector(config.model_copy(update=change))
        assert other.fingerprint != mobile.fingerprint


def test_weights_from_safetensors_are_the_same(weights, mobile, tmp_path):
    state = read_checkpoint(weights).tensors
    path = tmp_path / "same.safetensors"
    save_file({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    config = RegionsConfig(detector=f"torchvision:{NAME}", weights=str(path), size=96, proposals=20)
    _close(_find(TorchvisionDetector(config), [_image(1, 96)])[0], _find(mobile, [_image(1, 96)])[0], 0)


def test_class_names_beside_the_weights(weights, tmp_path):
    path = tmp_path / "named.pth"
    shutil.copy(weights, path)
    path.with_suffix(".json").write_text(json.dumps({"classes": list("abcdef")}))
    config = RegionsConfig(detector=f"torchvision:{NAME}", weights=str(path))
    assert TorchvisionDetector(config).classes == tuple("abcdef")
    path.with_suffix(".json").write_text(json.dumps({"classes": ["a"]}))
    with pytest.raises(PairmillError, match="names 1 classes"):
        TorchvisionDetector(config)


def _fails(message, **values):
    with pytest.raises(PairmillError, match=message):
        load_detector(RegionsConfig(**values))


@pytest.mark.parametrize("detector", ["torchvision", "detectron:x", ""])
def test_unknown_backend_is_named(detector):
    with pytest.raises(PairmillError, match=r"no such backend.*torchvision:tiny"):
        load_detector(RegionsConfig(detector=detector))


def test_loading_by_name():
    assert isinstance(load_detector(RegionsConfig()), TorchvisionDetector)


def test_unknown_detector_is_suggested():
    _fails("fasterrcnn_resnet50_fpn`", detector="torchvision:fasterrcnn_resnet50_fpm")


def test_missing_weights_are_named(tmp_path):
    _fails("needs weights", detector=f"torchvision:{NAME}")
    _fails("no such file", detector=f"torchvision:{NAME}", weights=str(tmp_path / "none.pth"))


def test_weights_of_another_architecture_are_named(weights):
    _fails("unexpected: .*fpn", detector="torchvision:fasterrcnn_resnet50_fpn", weights=str(weights))
    _fails("shape.weight", detector="torchvision:tiny", weights=str(weights))


def test_weights_of_another_shape_are_named(weights, tmp_path):
    state = read_checkpoint(weights).tensors
    state["rpn.head.cls_logits.weight"] = state["rpn.head.cls_logits.weight"][:2]
    torch.save(state, tmp_path / "cut.pth")
    _fails(
        "another shape: rpn.head.cls_logits.weight", detector=f"torchvision:{NAME}", weights=str(tmp_path / "cut.pth")
    )


class _Trap:
    """Unpickling it would create the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["pickle", "torch", "noise", "empty", "safetensors"])
def test_hostile_and_broken_files_are_refused(kind, tmp_path):
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    trap = tmp_path / "run"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"a": _Trap(trap)}, 2))
    elif kind == "torch":
        torch.save({"a": _Trap(trap)}, path)
    else:
        path.write_bytes(b"" if kind == "empty" else b"\x00nonsense" * 40)
    _fails(str(path), detector=f"torchvision:{NAME}", weights=str(path))
    assert not trap.exists()


def test_a_file_of_other_things_is_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "x.pth")
    _fails(r"x\.pth", detector=f"torchvision:{NAME}", weights=str(tmp_path / "x.pth"))


def test_more_top_classes_than_there_are():
    _fails("knows 80 classes only", cls_probs="topk:81")


def test_default_weights_offline_name_url_and_place(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(PairmillError, match=r"https://.*\.pth could not be fetched.*--weights FILE") as caught:
        weights_file("fasterrcnn_resnet50_fpn", "DEFAULT")
    assert str(tmp_path) in str(caught.value)


def test_default_weights_in_the_cache_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
    cached.parent.mkdir()
    cached.write_bytes(b"x")
    assert weights_file("fasterrcnn_resnet50_fpn", "DEFAULT") == cached


def test_the_first_coco_files_run_with_an_epsilon_of_zero():
    """As in torchvision, which sets it when it loads these two files itself; told by their hash."""
    coco = "258fb6c6" + "0" * 56
    assert backend._is_first_coco_file("fasterrcnn_resnet50_fpn", coco)
    assert not backend._is_first_coco_file("fasterrcnn_resnet50_fpn", coco[::-1])
    assert not backend._is_first_coco_file("fasterrcnn_resnet50_fpn_v2", coco)
    model = backend.build_tiny(2, 2)
    backend._set_epsilon(model, 0.0)
    assert {m.eps for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.0}
