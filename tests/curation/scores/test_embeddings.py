"""`score aesthetic` and `score safety`: alignment, states, resuming, and the CLIP that a head is made for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from curation.export import export_dataset
from curation.filter import filter_dataset
from curation.filter_config import FilterConfig
from curation.maintenance_config import ExportDatasetConfig
from curation.scores.config import AestheticScoreConfig, SafetyScoreConfig
from curation.scores.embeddings import score_aesthetic, score_safety
from curation.scores.made_for import B32, L14, check_clip
from extractors.clip import score_clip
from extractors.config import ClipScoreConfig
from schemas.errors import PairmillError
from schemas.events import Notice, StageFinished, silent
from schemas.sidecars import Sidecar
from shards.dataset import Dataset
from shards.reader import MappedShard, read_table
from tests.curation.samples import all_rows, whole_dataset
from tests.curation.scored import write_scores
from tests.curation.scores.head_files import save_head
from tests.extractors.tiny_clip import save_clip
from tests.make import make_dataset

FAIL = {(0, 1): "timeout", (1, 0): "too_small"}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "ds", shards=2, rows=6, fail=FAIL, corrupt={(1, 3)}, no_caption={(0, 2)})


def clip(dataset: Dataset, folder: Path, **values) -> StageFinished:
    config = ClipScoreConfig(**{"model": f"local-dir:{folder}", "workers": 0, "device": "cpu", **values})
    return score_clip(dataset, config)


@pytest.fixture
def embedded(dataset: Dataset, clip_folder: Path) -> Dataset:
    clip(dataset, clip_folder)
    return dataset


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_head(tmp_path / "head.pth", "aesthetic", "V2 linear layers")
    return tmp_path / "head.pth"


def run(dataset: Dataset, weights: Path, emit=silent, **values) -> StageFinished:
    config = AestheticScoreConfig(**{"weights": weights, "made_for": "tiny", "workers": 0, **values})
    return score_aesthetic(dataset, config, emit)


def test_every_row_has_its_own_score(embedded: Dataset, weights: Path):
    module = save_head(weights, "aesthetic", "V2 linear layers")
    assert run(embedded, weights).counts == {"ok": 9, "timeout": 1, "too_small": 1, "decode_error": 1}
    for shard in range(2):
        mapped = MappedShard(embedded.folder, embedded.stage("features/clip").file(shard))
        rows = read_table(embedded.folder, embedded.stage("scores/aesthetic").file(shard)).to_pylist()
        assert [row["aesthetic_state"] for row in rows] == mapped.states()
        for row, x in zip(rows, mapped.column("clip_image"), strict=True):
            if row["aesthetic_state"] != "ok":
                assert row["aesthetic"] is None
                continue
            x = torch.from_numpy(x.astype(np.float32))
            with torch.no_grad():
                assert row["aesthetic"] == pytest.approx(float(module(x / x.norm())), abs=1e-5)


def test_safety_has_the_columns_laion_has(embedded: Dataset, tmp_path: Path):
    save_head(tmp_path / "nsfw.pth", "safety", "autokeras 4 layers")
    config = SafetyScoreConfig(weights=tmp_path / "nsfw.pth", made_for="tiny", workers=0)
    score_safety(embedded, config)
    rows = all_rows(embedded, "scores/safety")
    assert set(rows[0]) == {"punsafe", "punsafe_state"}
    assert all(0 <= row["punsafe"] <= 1 for row in rows if row["punsafe_state"] == "ok")
    assert embedded.stage("scores/safety").sidecar().columns["punsafe"]["scale"] == "0 to 1, 1 is unsafe"


def test_the_sidecar_tells_head_clip_and_scale_but_no_path(embedded: Dataset, weights: Path, tmp_path: Path):
    run(embedded, weights)
    sidecar = embedded.stage("scores/aesthetic").sidecar()
    features = embedded.stage("features/clip").sidecar()
    told = sidecar.columns["aesthetic"]
    assert told["scale"].startswith("about 1 to 10")
    assert (told["model"], told["clip"]) == ("head.pth", "tiny")
    assert told["clip_weights"] == features.columns["clip_image"]["weights"]
    assert sidecar.identity["embeddings"] == features.fingerprint
    assert str(tmp_path) not in sidecar.model_dump_json()


def test_a_rerun_does_nothing_and_a_lost_shard_comes_back_equal(embedded: Dataset, weights: Path):
    run(embedded, weights)
    stage = embedded.stage("scores/aesthetic")
    before = [embedded.folder.read_bytes(stage.file(s)) for s in range(2)]
    assert run(embedded, weights).done == 0
    embedded.folder.remove(stage.file(0))
    assert run(embedded, weights).done == 1
    assert [embedded.folder.read_bytes(stage.file(s)) for s in range(2)] == before


@pytest.mark.slow
def test_workers_give_the_same_bytes(embedded: Dataset, weights: Path):
    run(embedded, weights)
    run(embedded, weights, name="other", workers=2)
    one, other = (embedded.stage(f"scores/{name}") for name in ("aesthetic", "other"))
    assert [embedded.folder.read_bytes(one.file(s)) for s in range(2)] == [
        embedded.folder.read_bytes(other.file(s)) for s in range(2)
    ]


def test_skipped_embeddings_are_skipped_until_they_are_computed(dataset: Dataset, clip_folder: Path, weights: Path):
    write_scores(dataset, "size", {"size": [float(i) for i in range(12)]})
    filter_dataset(dataset, FilterConfig(output="few", where=("size >= 8",)), silent)
    clip(dataset, clip_folder, selection="few")
    run(dataset, weights)
    states = [row["aesthetic_state"] for row in all_rows(dataset, "scores/aesthetic")]
    assert states == ["skipped", "timeout", *["skipped"] * 4, "too_small", "skipped", "ok", "decode_error", "ok", "ok"]
    clip(dataset, clip_folder)
    assert run(dataset, weights).done == 2
    rows = all_rows(dataset, "scores/aesthetic")
    assert [row["aesthetic_state"] for row in rows].count("ok") == 9
    assert [row["aesthetic"] is None for row in rows] == [row["aesthetic_state"] != "ok" for row in rows]


def test_shards_without_embeddings_are_left(embedded: Dataset, weights: Path):
    embedded.folder.remove(embedded.stage("features/clip").file(1))
    events: list = []
    assert run(embedded, weights, events.append).left == (1,)
    assert [e.text for e in events if isinstance(e, Notice)] == [
        f"{embedded.url}/features/clip: 1 shards are not computed yet: run `pairmill score clip` first."
    ]
    embedded.folder.remove(embedded.stage("features/clip").file(0))
    with pytest.raises(PairmillError, match="no finished shard"):
        run(embedded, weights)


def test_an_exported_copy_keeps_its_scores(embedded: Dataset, weights: Path, tmp_path: Path):
    run(embedded, weights)
    export_dataset(embedded, tmp_path / "copy", ExportDatasetConfig(workers=0, shard_rows=5), silent)
    copy = Dataset.open(tmp_path / "copy")
    assert all_rows(copy, "scores/aesthetic") == all_rows(embedded, "scores/aesthetic")
    assert run(copy, weights).done == 0
    assert all_rows(copy, "scores/aesthetic") == all_rows(embedded, "scores/aesthetic")


def test_without_embeddings_the_command_is_named(dataset: Dataset, weights: Path):
    with pytest.raises(PairmillError, match=r"has no features/clip.*run `pairmill score clip` first"):
        run(dataset, weights)
    assert dataset.folder.folders("scores") == []


def test_features_that_are_no_clip_embeddings_are_refused(tmp_path: Path, weights: Path):
    dataset = whole_dataset(tmp_path / "whole")
    with pytest.raises(PairmillError, match="does not tell which CLIP made it"):
        run(dataset, weights, features="vector")


@pytest.mark.parametrize("word", ["other", "abc"])
def test_a_head_made_for_another_clip_is_refused(embedded: Dataset, weights: Path, word: str):
    with pytest.raises(PairmillError, match=f"made for another CLIP: `--made-for {word}`.*from tiny"):
        run(embedded, weights, made_for=word)
    assert embedded.stage("scores/aesthetic").sidecar() is None


def test_the_clip_may_be_named_by_its_hash(embedded: Dataset, weights: Path):
    sha256 = embedded.stage("features/clip").sidecar().columns["clip_image"]["weights"]
    run(embedded, weights, made_for=sha256[:12].upper())
    with pytest.raises(PairmillError, match="made for another CLIP"):
        run(embedded, weights, made_for=sha256[:11])


def test_a_head_of_another_width_is_refused(embedded: Dataset, tmp_path: Path):
    save_head(tmp_path / "l14.pth", "aesthetic", "V1 linear", dim=768)
    with pytest.raises(PairmillError, match=r"takes embeddings of width 768, .*\(tiny\) has 16.*ViT-L-14-quickgelu"):
        run(embedded, tmp_path / "l14.pth", made_for=None)


def test_embeddings_of_another_model_need_another_name(embedded: Dataset, weights: Path, tmp_path: Path):
    run(embedded, weights)
    save_clip(tmp_path / "tiny", seed=5)
    clip(embedded, tmp_path / "tiny", name="five")
    with pytest.raises(PairmillError, match=r"`embeddings` was.*--name"):
        run(embedded, weights, features="five")


def sidecar(label: str, weights: str = "ab" * 32, dim: int = 768) -> Sidecar:
    return Sidecar(
        stage="score clip",
        name="clip",
        schema_name="features",
        schema_version=1,
        identity={"architecture": {"embed_dim": dim}},
        fingerprint="0",
        columns={"clip_image": {"model": label, "weights": weights}},
    )


@pytest.mark.parametrize(
    ("label", "weights"),
    [("ViT-L-14-quickgelu openai", "0" * 64), ("ViT-L-14-quickgelu mine.pt", L14.sha256), (L14.labels[1], "0" * 64)],
)
def test_openais_l14_is_known(label: str, weights: str):
    assert check_clip(sidecar(label, weights), "aesthetic", 768, "sac+logos+ava1-l14-linearMSE.pth", None, "f") == label


@pytest.mark.parametrize(
    "label", ["ViT-L-14 laion2b_s32b_b82k", "ViT-L-14 datacomp_xl_s13b_b90k", "ViT-L-14-336-quickgelu openai"]
)
def test_another_clip_of_the_same_width_is_refused(label: str):
    with pytest.raises(PairmillError, match=f"made for another CLIP.*OpenAI's ViT-L/14.*{label}.*--made-for '{label}'"):
        check_clip(sidecar(label), "safety", 768, "head.pth", None, "features/clip")
    assert check_clip(sidecar(label), "safety", 768, "head.pth", label, "features/clip") == label


def test_where_the_width_does_not_tell_the_name_does():
    b16 = sidecar("ViT-B-16-quickgelu openai", dim=512)
    assert check_clip(b16, "aesthetic", 512, "sa_0_4_vit_b_16_linear.pth", None, "f")
    with pytest.raises(PairmillError, match="are for OpenAI's ViT-B/32"):
        check_clip(b16, "aesthetic", 512, "sa_0_4_vit_b_32_linear.pth", None, "f")
    with pytest.raises(PairmillError, match="OpenAI's ViT-B/32 or OpenAI's ViT-B/16"):
        check_clip(b16, "aesthetic", 512, "head.pth", None, "f")
    assert check_clip(sidecar("x", B32.sha256, 512), "safety", 512, "head.pth", None, "f") == "x"


def test_a_width_nobody_published_must_be_told():
    with pytest.raises(PairmillError, match=r"no aesthetic head of width 640 is published, .*--made-for 'mine'"):
        check_clip(sidecar("mine", dim=640), "aesthetic", 640, "head.pth", None, "f")
