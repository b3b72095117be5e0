from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import extractors.clip_source as clip_source
from extractors.clip import ClipTokenizer, image_resize, score_clip
from extractors.clip_source import find_clip, quiet
from extractors.config import ClipScoreConfig
from schemas.errors import PairmillError
from schemas.events import Event, Notice, StageFinished
from shards.dataset import PAIRS, Dataset
from shards.images import decode_rgb
from shards.reader import MappedShard, read_table
from shards.transforms import normalise
from shards.weights import read_checkpoint
from tests.extractors.conftest import CORRUPT, FAIL
from tests.extractors.tiny_clip import save_clip, save_run
from tests.make import make_dataset, picture

LONG = "a very long caption " * 20


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny")


def run(dataset: Dataset, folder: Path, emit: Any = None, **values: Any) -> StageFinished:
    config = ClipScoreConfig(**{"model": f"local-dir:{folder}", "workers": 0, "device": "cpu", **values})
    return score_clip(dataset, config, emit or (lambda event: None))


def scores(dataset: Dataset, shard: int, name: str = "clip") -> list[dict[str, Any]]:
    return read_table(dataset.folder, dataset.stage(f"scores/{name}").file(shard)).to_pylist()


def embeddings(dataset: Dataset, shard: int) -> MappedShard:
    return MappedShard(dataset.folder, dataset.stage("features/clip").file(shard))


def bare(folder: Path, image: bytes, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(image embedding [D], text embeddings [K, D]) by open_clip alone, one row at a time."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    pixels = preprocess(Image.fromarray(decode_rgb(image)))[None]
    with torch.no_grad():
        one = model.encode_image(pixels, normalize=True)[0]
        text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(texts), normalize=True)
    return one.numpy(), text.numpy()


def test_scores_are_open_clips_own(dataset: Dataset, clip_folder: Path):
    finished = run(dataset, clip_folder)
    assert finished.counts == {"ok": 32, "timeout": 1, "too_small": 1, "decode_error": 2}
    for shard in (0, 1):
        pairs = read_table(dataset.folder, dataset.stage(PAIRS).file(shard)).to_pylist()
        mapped = embeddings(dataset, shard)
        for number, (pair, row) in enumerate(zip(pairs, scores(dataset, shard), strict=True)):
            at = (shard, number)
            if at in FAIL or at in CORRUPT:
                assert row["clip_score"] is None
                assert row["clip_scores"] is None
                assert row["clip_state"] == FAIL.get(at, "decode_error")
                assert mapped.row(number)["clip_image"] is None
                continue
            image, text = bare(clip_folder, pair["image"], [pair["caption"]])
            assert row["clip_score"] == pytest.approx(float(image @ text[0]), abs=2e-6)
            assert row["clip_scores"] == [row["clip_score"]]
            np.testing.assert_allclose(mapped.row(number)["clip_image"], image, atol=1e-3)
            np.testing.assert_allclose(mapped.row(number)["clip_text"], text[0], atol=1e-3)
            assert mapped.row(number)["clip_image"].dtype == np.float16


def test_the_score_is_the_maximum_over_captions(tmp_path: Path, clip_folder: Path):
    captions = ["a red block", "the sea at night", "", "forty two"]
    dataset = make_dataset(tmp_path / "ds", 1, 4, captions={(0, 1): captions}, no_caption={(0, 2)})
    run(dataset, clip_folder)
    pair = read_table(dataset.folder, dataset.stage(PAIRS).file(0)).to_pylist()[1]
    image, text = bare(clip_folder, pair["image"], [captions[0], captions[1], captions[3]])
    rows = scores(dataset, 0)
    want = (text @ image).tolist()
    assert rows[1]["clip_scores"] == [
        pytest.approx(want[0], abs=2e-6),
        pytest.approx(want[1], abs=2e-6),
        None,
        pytest.approx(want[2], abs=2e-6),
    ]
    assert rows[1]["clip_score"] == max(s for s in rows[1]["clip_scores"] if s is not None)
    best = embeddings(dataset, 0).row(1)["clip_text"]
    np.testing.assert_allclose(best, text[int(np.argmax(want))], atol=1e-3)
    assert rows[2]["clip_score"] is None
    assert rows[2]["clip_scores"] == []
    assert rows[2]["clip_state"] == "ok"
    assert embeddings(dataset, 0).row(2)["clip_text"] is None
    assert embeddings(dataset, 0).row(2)["clip_image"] is not None


def test_a_batch_without_any_caption(tmp_path: Path, clip_folder: Path):
    dataset = make_dataset(tmp_path / "ds", 1, 3, no_caption={(0, 0), (0, 1), (0, 2)})
    assert run(dataset, clip_folder).counts == {"ok": 3}
    assert [row["clip_score"] for row in scores(dataset, 0)] == [None] * 3


def test_long_captions_are_cut_with_their_end_token_and_counted(tmp_path: Path, clip_folder: Path):
    dataset = make_dataset(tmp_path / "ds", 2, 2, captions={(0, 1): [LONG, "short", LONG]})
    events: list[Event] = []
    run(dataset, clip_folder, events.append)
    assert [row["clip_truncated"] for row in scores(dataset, 0)] == [0, 2]
    notices = [e.text for e in events if isinstance(e, Notice)]
    assert notices == ["2 captions were longer than the text tower's context and were cut."]


def test_tokenizer_tells_a_full_text_from_a_cut_one():
    own = open_clip.SimpleTokenizer(context_length=6)
    tokenizer = ClipTokenizer(own)
    tokens, cut = tokenizer(["a a a a", "a a a", "a a a a a", ""])
    assert cut == 1
    assert tokens[0, -1] == tokens[2, -1] == own.eot_token_id
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, own(["a a a a", "a a a", "a a a a a", ""]).numpy())


def test_without_embeddings_only_scores_are_written(dataset: Dataset, clip_folder: Path):
    run(dataset, clip_folder, embeddings=False)
    alone = [scores(dataset, s) for s in range(3)]
    assert dataset.folder.names("features/clip") == []
    assert run(dataset, clip_folder).done == 3  # the embeddings are asked for now
    assert [scores(dataset, s) for s in range(3)] == alone
    assert run(dataset, clip_folder, embeddings=False).done == 0


def test_batch_size_and_order_do_not_matter(dataset: Dataset, clip_folder: Path, tmp_path: Path):
    run(dataset, clip_folder, batch_size=1)
    other = make_dataset(tmp_path / "other", 3, 12, FAIL, CORRUPT)
    run(other, clip_folder, batch_size=5)
    for shard in range(3):
        ours = [row["clip_score"] or 0 for row in scores(dataset, shard)]
        np.testing.assert_allclose(ours, [row["clip_score"] or 0 for row in scores(other, shard)], atol=2e-6)


def test_the_sidecar_says_what_the_scores_are(dataset: Dataset, clip_folder: Path):
    run(dataset, clip_folder)
    sidecar = dataset.stage("scores/clip").sidecar()
    column = sidecar.columns["clip_score"]
    assert column["scale"] == "raw cosine"
    assert column["precision"] == "fp32"
    assert column["weights"] == sidecar.identity["weights"] == find_clip(f"local-dir:{clip_folder}", None).sha256
    assert "12 tokens" in column["truncation"]
    assert column["preprocess"]["size"] == 32
    text = json.dumps(sidecar.model_dump(mode="json"))
    assert str(clip_folder.parent) not in text  # a dataset can be moved, and so can weights


def test_moved_weights_are_the_same_weights_and_others_are_refused(dataset: Dataset, clip_folder: Path, tmp_path: Path):
    run(dataset, clip_folder)
    moved = Path(shutil.copytree(clip_folder, tmp_path / "moved"))
    assert run(dataset, moved).done == 0
    with pytest.raises(PairmillError, match=r"`weights` was .*now .*--name"):
        run(dataset, save_clip(tmp_path / "other", seed=1))
    assert run(dataset, tmp_path / "other", name="second").done == 3
    assert scores(dataset, 0, "second") != scores(dataset, 0)


@pytest.mark.parametrize(
    "preprocess",
    [
        {},
        {"resize_mode": "squash"},
        {"resize_mode": "longest", "fill_color": 7},
        {"interpolation": "bilinear"},
        {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    ],
)
def test_preprocessing_is_open_clips_bit_for_bit(tmp_path: Path, preprocess: dict[str, Any]):
    folder = save_clip(tmp_path / "clip", preprocess=preprocess)
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    ours = json.loads(find_clip(f"local-dir:{folder}", None).preprocess)
    resize = image_resize(ours)
    for seed, (width, height) in enumerate([(64, 48), (31, 77), (33, 32), (200, 37), (32, 32), (5, 9)]):
        rgb = picture(width, height, seed)
        pixels = torch.from_numpy(np.ascontiguousarray(resize(rgb)))[None].permute(0, 3, 1, 2)
        want = theirs(Image.fromarray(rgb))
        assert torch.equal(normalise(pixels, tuple(ours["mean"]), tuple(ours["std"]))[0], want)


def test_a_run_folder_means_its_best_else_its_last_checkpoint(tmp_path: Path):
    run_folder = save_run(tmp_path / "run", best=2, last=3)
    assert find_clip(str(run_folder), None).spec.endswith("checkpoints/00002")
    (run_folder / "best").unlink()
    found = find_clip(str(run_folder), None)
    assert found.spec.endswith("checkpoints/00003")
    assert found.label == "run step 00003"
    assert find_clip(str(run_folder / "checkpoints" / "00001"), None).spec.endswith("00001")
    (run_folder / "checkpoints" / "00003" / "open_clip_config.json").unlink()
    with pytest.raises(PairmillError, match="only runs of CLIP models can score"):
        find_clip(str(run_folder), None)


def test_weights_files_of_every_kind_give_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A name and a file: safetensors, torch.save, and a training checkpoint with a prefix and a wrapper."""
    folder = save_clip(tmp_path / "clip")
    model_cfg = open_clip.get_model_config(f"local-dir:{folder}")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "Tiny-Test.json").write_text(json.dumps(model_cfg))
    open_clip.add_model_config(tmp_path / "configs")
    state = read_checkpoint(folder).tensors
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "epoch.pt")
    for file in (folder / "model.safetensors", tmp_path / "plain.pt", tmp_path / "epoch.pt"):
        built = find_clip("Tiny-Test", str(file)).build(torch.device("cpu"))
        assert all(torch.equal(v, state[k]) for k, v in built.state_dict().items())


def test_openai_archives_are_read_without_torchscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save_clip(tmp_path / "clip", quick_gelu=True)
    model_cfg = open_clip.get_model_config(f"local-dir:{folder}")
    (tmp_path / "configs").mkdir()
    for name, quick in (("Tiny-Quick", True), ("Tiny-Plain", False)):
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(model_cfg | {"quick_gelu": quick}))
    open_clip.add_model_config(tmp_path / "configs")
    state = read_checkpoint(folder).tensors

    class Archive(torch.nn.Module):
        """OpenAI's file: half precision, three numbers and the mask among the tensors."""

        def __init__(self) -> None:
            super().__init__()
            for name in state:
                *path, last = name.split(".")
                at: torch.nn.Module = self
                for part in path:
                    if not hasattr(at, part):
                        at.add_module(part, torch.nn.Module())
                    at = getattr(at, part)
                at.register_buffer(last, state[name].half())
            self.register_buffer("input_resolution", torch.tensor(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.script(Archive()).save(str(tmp_path / "ViT-T.pt"))
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("torch.jit.load was called"))
    built = find_clip("Tiny-Quick", str(tmp_path / "ViT-T.pt")).build(torch.device("cpu"))
    for name, tensor in built.state_dict().items():
        torch.testing.assert_close(tensor, state[name].half().float())
    with pytest.raises(PairmillError, match="trained with QuickGELU, this model computes GELU"):
        find_clip("Tiny-Plain", str(tmp_path / "ViT-T.pt"))


def test_openai_weights_need_quick_gelu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clip_source, "_fetch", lambda *a: pytest.fail("fetched before it was checked"))
    with pytest.raises(PairmillError, match=r"computes GELU.*Pass --model ViT-B-32-quickgelu\."):
        find_clip("ViT-B-32", "openai")
    with pytest.raises(PairmillError, match=r"computes QuickGELU.*Pass --model ViT-B-32\."):
        clip_source._check_activation(None, {"quick_gelu": False}, {"quick_gelu": True}, "ViT-B-32-quickgelu")


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(clip_source, "_online", lambda host: False)
    monkeypatch.setattr(clip_source, "_cached", lambda cfg: (_ for _ in ()).throw(FileNotFoundError("no connection")))
    with pytest.raises(PairmillError, match=r"huggingface\.co cannot be reached.*--pretrained FILE"):
        find_clip("ViT-B-32", "laion2b_s34b_b79k")


def test_cached_weights_need_no_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(clip_source, "_online", lambda host: False)
    file = tmp_path / "open_clip_model.safetensors"
    file.write_bytes(b"here")

    def hub(repo: str, name: str, local_files_only: bool) -> str:
        assert local_files_only
        assert repo == "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
        if name != file.name:
            raise FileNotFoundError(name)
        return str(file)

    monkeypatch.setattr(clip_source, "hf_hub_download", hub)
    assert find_clip("ViT-B-32", "laion2b_s34b_b79k").weights == str(file)


@pytest.mark.parametrize(
    ("model", "pretrained", "match"),
    [
        ("ViT-B-23", None, r"open_clip knows no such model.*Did you mean `ViT-B-32`"),
        ("ViT-B-32", None, r"says which architecture, not which weights.*laion2b_s34b_b79k"),
        ("ViT-B-32", "lion2b_s34b_b79k", r"neither a file nor a tag.*Did you mean `laion2b_s34b_b79k`"),
        ("local-dir:/nowhere", None, r"neither an open_clip folder"),
    ],
)
def test_errors_say_what_to_do(model: str, pretrained: str | None, match: str):
    with pytest.raises(PairmillError, match=match):
        find_clip(model, pretrained)


def test_weights_that_do_not_fit_are_an_error(dataset: Dataset, tmp_path: Path):
    folder = save_clip(tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 2
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(PairmillError, match="does not fit clip"):
        run(dataset, folder)
    assert not dataset.stage("scores/clip").standing()


def test_a_model_that_overflows_is_an_error(dataset: Dataset, clip_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "broken"))
    state = read_checkpoint(folder).tensors
    state["visual.proj"][0] = torch.inf
    save_file(state, folder / "model.safetensors")
    with pytest.raises(PairmillError, match="--precision bf16"):
        run(dataset, folder)


def test_a_folder_takes_no_pretrained(clip_folder: Path):
    with pytest.raises(PairmillError, match=r"holds its own weights\. Drop it"):
        find_clip(str(clip_folder), "openai")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_compiled_towers_give_the_same_scores(dataset: Dataset, clip_folder: Path, tmp_path: Path):
    run(dataset, clip_folder)
    other = make_dataset(tmp_path / "other", 3, 12, FAIL, CORRUPT)
    run(other, clip_folder, compile=True)
    ours = [row["clip_score"] or 0 for row in scores(dataset, 2)]
    np.testing.assert_allclose(ours, [row["clip_score"] or 0 for row in scores(other, 2)], atol=1e-5)


def test_models_are_built_without_a_word_and_leave_no_handler(capsys):
    """A handler of the root logger would print Dask's own messages from then on."""
    before, logging.root.handlers[:] = logging.root.handlers[:], []
    try:
        with quiet():
            logging.info("Loaded ViT-B-32 model config.")
        assert logging.root.handlers == []
    finally:
        logging.root.handlers[:] = before
    assert capsys.readouterr() == ("", "")
