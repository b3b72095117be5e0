"""`score watermark` on a detector of LAION's layout with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision import transforms as T

from curation.maintenance_config import CheckConfig
from curation.reproduce import reproduce
from curation.scores.config import WatermarkScoreConfig
from curation.scores.watermark import score_watermark
from schemas.errors import PairmillError
from schemas.events import Notice, StageFinished
from shards.dataset import PAIRS, Dataset
from shards.images import decode_rgb
from shards.reader import read_table
from tests.curation.samples import all_rows
from tests.curation.scores.head_files import save_head
from tests.make import SIZES, make_dataset, picture

FAIL = {(0, 1): "timeout"}
# As LAION's example_use.py has it.
TRANSFORM = T.Compose([T.Resize((256, 256)), T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """Built by the publisher's description; random weights, with statistics of real pictures so that signals live."""
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_b3", num_classes=2)
    model.classifier = nn.Sequential(
        nn.Linear(1536, 625), nn.ReLU(), nn.Dropout(0.3), nn.Linear(625, 256), nn.ReLU(), nn.Linear(256, 2)
    )
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    # Whole pictures of all sizes: statistics of others would blow the signals up, and every rounding with them.
    pictures = torch.stack([TRANSFORM(Image.fromarray(picture(*SIZES[n % len(SIZES)], n))) for n in range(6)])
    with torch.no_grad():
        model.train()(pictures)
        model.classifier[5].weight *= 20
    path = tmp_path_factory.mktemp("watermark") / "watermark_model_v1.pt"
    torch.save(model.state_dict(), path)
    return path, model.eval()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of 64 px: a sixteenth of the work where the numbers do not matter."""
    monkeypatch.setattr("curation.scores.watermark.SIZE", 64)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "ds", shards=2, rows=3, fail=FAIL, corrupt={(1, 0)})


def run(dataset: Dataset, weights: Path, **values) -> StageFinished:
    config = {"weights": weights, "workers": 0, "device": "cpu", "batch_size": 2, **values}
    return score_watermark(dataset, WatermarkScoreConfig(**config))


def test_scores_are_those_of_the_publishers_code(dataset: Dataset, detector: tuple[Path, nn.Module]):
    path, model = detector
    assert run(dataset, path).counts == {"ok": 4, "timeout": 1, "decode_error": 1}
    seen = []
    for shard in range(2):
        pairs = read_table(dataset.folder, dataset.stage(PAIRS).file(shard)).to_pylist()
        rows = read_table(dataset.folder, dataset.stage("scores/watermark").file(shard)).to_pylist()
        for number, (pair, row) in enumerate(zip(pairs, rows, strict=True)):
            if row["pwatermark_state"] != "ok":
                assert row["pwatermark_state"] == FAIL.get((shard, number), "decode_error")
                assert row["pwatermark"] is None
                continue
            with torch.no_grad():
                logits = model(TRANSFORM(Image.fromarray(decode_rgb(pair["image"])))[None])
            assert row["pwatermark"] == pytest.approx(float(logits.softmax(1)[0, 0]), abs=1e-4)
            seen.append(row["pwatermark"])
    assert max(seen) - min(seen) > 1e-3


@pytest.mark.usefixtures("small")
def test_the_class_is_an_identity_and_told(dataset: Dataset, detector: tuple[Path, nn.Module]):
    path, _ = detector
    run(dataset, path)
    run(dataset, path, name="other", watermark_class=1)
    rows, others = all_rows(dataset, "scores/watermark"), all_rows(dataset, "scores/other")
    scored = [(a["pwatermark"], b["pwatermark"]) for a, b in zip(rows, others, strict=True) if a["pwatermark"]]
    assert [a + b for a, b in scored] == pytest.approx([1] * 4, abs=1e-4)
    told = dataset.stage("scores/other").sidecar().columns["pwatermark"]
    assert told["what"] == "softmax of class 1 of 2, which is watermark"
    assert told["scale"] == "0 to 1, 1 is watermark"
    with pytest.raises(PairmillError, match=r"`watermark_class` was 0, now 1.*--name"):
        run(dataset, path, watermark_class=1)


@pytest.mark.usefixtures("small")
def test_a_rerun_completes_to_the_same_bytes(dataset: Dataset, detector: tuple[Path, nn.Module]):
    run(dataset, detector[0])
    stage = dataset.stage("scores/watermark")
    before = [dataset.folder.read_bytes(stage.file(s)) for s in range(2)]
    assert run(dataset, detector[0]).done == 0
    dataset.folder.remove(stage.file(1))
    assert run(dataset, detector[0]).done == 1
    assert [dataset.folder.read_bytes(stage.file(s)) for s in range(2)] == before


@pytest.mark.usefixtures("small")
def test_check_computes_it_again(dataset: Dataset, detector: tuple[Path, nn.Module]):
    path, _ = detector
    run(dataset, path, watermark_class=1)
    events: list = []
    assert list(reproduce(dataset, CheckConfig(reproduce=2, weights=(path,)), events.append)) == []
    told = [e.text for e in events if isinstance(e, Notice)]
    assert told == ["scores/watermark: 2 rows computed again, all within 0.001."]


def test_another_network_is_refused_and_nothing_written(dataset: Dataset, tmp_path: Path):
    save_head(tmp_path / "head.pth", "safety", "H/14")
    with pytest.raises(PairmillError, match=r"not LAION's watermark detector .*1536-625-256-2"):
        run(dataset, tmp_path / "head.pth")
    assert dataset.folder.folders("scores") == []
