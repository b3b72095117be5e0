"""Evaluating retrieval: what the numbers are, that nothing but the model decides them, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from downstream import pair_scores, scores
from downstream.base import open_subject
from downstream.config import RetrievalConfig, RetrievalImportConfig
from downstream.encode import Texts, image_batch
from downstream.pair_scores import choose, score_pairs
from downstream.retrieval import best_of, evaluate_retrieval, measure, validation_metric
from downstream.retrieval_import import import_retrieval
from downstream.retrieval_set import read_retrieval
from downstream.scores import Machine, duration, embed
from schemas.errors import PairmillError
from schemas.events import Notice, Progress, StageStarted, silent
from shards.images import decode_rgb
from shards.reader import read_table
from tests.downstream.runs import captions_of, make_run, make_taskset
from training.batch import Batch
from training.checkpoint import Run
from training.config import resolve
from training.data import resized
from training.train import train

CPU = torch.device("cpu")


@dataclass
class Given:
    """Scores from a matrix [images, captions]."""

    matrix: np.ndarray

    def of_images(self, images):
        return self.matrix[images]

    def of_texts(self, texts):
        return self.matrix[:, texts].T


@pytest.fixture(scope="module")
def data(taskset):
    return read_retrieval(taskset, "retrieval", "test", silent)


@pytest.fixture(scope="module")
def vilt(vilt_run):
    return open_subject(vilt_run, "retrieval", CPU)


@pytest.fixture(scope="module")
def clip(clip_run):
    return open_subject(clip_run, "retrieval", CPU)


def owns(data):
    return np.equal.outer(np.arange(len(data.images)), data.caption_image)


def test_the_split_is_read_in_order(data):
    assert data.images == ((1, 1), (1, 2), (1, 3), (1, 4), (2, 0), (2, 1))
    assert data.image_ids == tuple(f"{i}.jpg" for i in range(6, 12))
    assert list(data.captions) == [c for i in range(6, 12) for c in captions_of(i)]
    assert list(data.caption_ids) == [str(100 * i + j) for i in range(6, 12) for j in range(5)]
    assert data.caption_image.tolist() == [i for i in range(6) for _ in range(5)]
    assert data.image_hashes[1] == data.image_hashes[5] != data.image_hashes[0]


def test_an_oracle_gets_everything(data):
    metric, predictions = measure(data, Given(owns(data).astype(np.float32)))
    assert [metric[n] for n in metric if "_r" in n] == [100.0] * 6
    assert (metric["rsum"], metric["mean"]) == (600.0, 100.0)
    for i, one in enumerate(predictions["image_to_text"]):
        assert one["captions"][:5] == [data.caption_ids[j] for j in range(5 * i, 5 * i + 5)]
        assert len(one["captions"]) == len(one["scores"]) == 10
    assert [p["images"][0] for p in predictions["text_to_image"][:6]] == ["1:1"] * 5 + ["1:2"]


def test_a_scorer_that_knows_nothing_gets_no_more_than_chance(data):
    metric, _ = measure(data, Given(np.ones((6, 30), np.float32)))
    chance = 100 / 6
    assert metric["text_to_image_r1"] <= chance
    assert metric["image_to_text_r1"] <= chance
    assert metric["text_to_image_r5"] <= 5 * chance


def test_folds_meet_only_their_own(data):
    wrong = np.where(owns(data), 1.0, 0.0)
    wrong[:3, 15:] = 2.0  # another fold's captions, ahead of everything
    assert measure(data, Given(wrong))[0]["image_to_text_r10"] == 50.0
    metric, predictions = measure(data, Given(wrong), num_folds=2)
    assert metric["rsum"] == 600.0
    assert {c for p in predictions["image_to_text"][:3] for c in p["captions"]} == set(data.caption_ids[:15])
    with pytest.raises(PairmillError, match=r"6 images cannot be cut into 4 equal folds \(--folds\)"):
        measure(data, Given(wrong), num_folds=4)


def test_best_of():
    row = np.array([0.5, -np.inf, 2.0, 0.5, *[0.1] * 20], np.float32)
    assert best_of(row)[0] == [2, 0, 3, 4, 5, 6, 7, 8, 9, 10]
    assert best_of(np.array([-np.inf, 3.0], np.float32)) == ([1], [3.0])


def test_a_dual_encoder_is_its_towers_dot_products(data, clip):
    found = embed(clip, data, Machine(CPU), silent).of_images(np.arange(6))
    table = [read_table(data.dataset.folder, data.dataset.stage("pairs").file(s), ["image"])["image"] for s in range(3)]
    pictures = [resized(decode_rgb(table[s][r].as_py()), clip.view) for s, r in data.images]
    ids, _ = clip.tokenizer.encode(list(data.captions), clip.view.max_text_len)
    with torch.no_grad():
        images = clip.model.encode_image(image_batch(pictures, CPU).pixel_values, normalise=True)
        texts = clip.model.encode_text(ids, normalise=True)
    np.testing.assert_allclose(found, (images @ texts.T).numpy(), atol=2e-6)
    assert np.ptp(found) > 1e-3


def test_a_single_stream_model_is_its_forward_pass(data, vilt):
    found = score_pairs(vilt, data, Machine(CPU, batch_size=7), silent).of_images(np.arange(6))
    image, which = 3, [0, 4, 8, 29]
    shard, row = data.images[image]
    stored = read_table(data.dataset.folder, data.dataset.stage("pairs").file(shard), ["image"])["image"][row].as_py()
    pictures = [resized(decode_rgb(stored), vilt.view)] * len(which)
    ids, mask = vilt.tokenizer.encode([data.captions[j] for j in which], vilt.view.max_text_len)
    batch = image_batch(pictures, CPU).replace(input_ids=ids, text_mask=mask)
    assert isinstance(batch, Batch)
    with torch.no_grad():
        want = vilt.model(batch, route="matching").match_logits[:, 1]
    np.testing.assert_allclose(found[image, which], want.numpy(), atol=1e-5)
    assert np.ptp(found) > 1e-2


@pytest.mark.parametrize("kind", ["clip", "vilt"])
def test_batch_size_and_threads_change_nothing(kind, data, request):
    subject = request.getfixturevalue(kind)
    score = embed if kind == "clip" else score_pairs
    one = score(subject, data, Machine(CPU, batch_size=64, threads=1), silent)
    other = score(subject, data, Machine(CPU, batch_size=3, threads=3), silent)
    first, second = one.of_images(np.arange(6)), other.of_images(np.arange(6))
    np.testing.assert_allclose(first, second, atol=2e-5)
    assert measure(data, one)[0] == measure(data, other)[0]
    for found in (first, second):
        # Equal captions and equal images tie to the last bit: images 6 and 10 are of one colour, 7 and 11 of one file.
        np.testing.assert_array_equal(found[:, 0], found[:, 20])
        np.testing.assert_array_equal(found[1], found[5])
    for scorer in (one, other):
        np.testing.assert_array_equal(scorer.of_texts(np.arange(30)).T.shape, first.shape)
        np.testing.assert_allclose(scorer.of_texts(np.arange(30)).T, first, atol=2e-5)


def test_candidates_are_the_best_of_their_own_fold(data):
    matrix = np.arange(180, dtype=np.float32).reshape(6, 30)
    chosen = choose(Given(matrix), data, 2)
    assert chosen.texts.tolist() == [[29, 28]] * 6
    assert chosen.images.tolist() == [[5, 4]] * 30
    folded = choose(Given(matrix), data, 2, num_folds=2)
    assert folded.texts.tolist() == [[14, 13]] * 3 + [[29, 28]] * 3
    assert folded.images.tolist() == [[2, 1]] * 15 + [[5, 4]] * 15


def test_reranking_all_is_full_scoring_and_less_is_fewer_passes(data, clip, vilt):
    said = []
    whole = score_pairs(vilt, data, Machine(CPU), said.append)
    rival = embed(clip, data, Machine(CPU), silent)
    all_chosen = choose(rival, data, 1000)
    again = score_pairs(vilt, data, Machine(CPU), said.append, candidates=all_chosen)
    np.testing.assert_array_equal(whole.of_images(np.arange(6)), again.of_images(np.arange(6)))
    np.testing.assert_array_equal(whole.of_texts(np.arange(30)), again.of_texts(np.arange(30)))
    assert measure(data, whole) == measure(data, again)

    few = choose(rival, data, 2)
    ranked = score_pairs(vilt, data, Machine(CPU), said.append, candidates=few)
    rows = ranked.of_images(np.arange(6))
    np.testing.assert_array_equal(np.isfinite(rows).sum(1), 2)
    np.testing.assert_allclose(
        np.take_along_axis(rows, few.texts, 1),
        np.take_along_axis(whole.of_images(np.arange(6)), few.texts, 1),
        atol=2e-5,
    )
    np.testing.assert_array_equal(np.isfinite(ranked.of_texts(np.arange(30))).sum(1), 2)
    started = [e.rows for e in said if isinstance(e, StageStarted)]
    assert started[0] == started[1] == 5 * 28  # distinct images by distinct captions
    assert started[2] < 5 * 28


def test_folds_score_only_their_own_pairs(data, vilt):
    said = []
    found = score_pairs(vilt, data, Machine(CPU), said.append, num_folds=2)
    whole = score_pairs(vilt, data, Machine(CPU), silent)
    assert next(e.rows for e in said if isinstance(e, StageStarted)) < 5 * 28
    assert measure(data, found, num_folds=2)[0] == measure(data, whole, num_folds=2)[0]


def test_the_ranking_head_where_there_is_one(data, tmp_path):
    run = make_run(tmp_path / "run", "vilt-tiny", layers=1, model_heads=("matching", "ranking"))
    subject = open_subject(run, "retrieval", CPU)
    auto, ranking, matching = (
        score_pairs(subject, data, Machine(CPU), silent, head=h).matrix for h in ("auto", "ranking", "matching")
    )
    np.testing.assert_array_equal(auto, ranking)
    assert np.abs(ranking - matching).max() > 1e-3


def test_texts_are_padded_and_put_back(vilt):
    captions = ["a much longer caption than the others", "red", "a blue block", "red"]
    texts = Texts(captions, vilt.tokenizer, 20)
    assert len(texts) == 3
    assert texts.number.tolist() == [2, 0, 1, 0]
    ids, mask = texts.batch([2, 0], CPU)
    assert mask.sum(1).tolist() == [ids.shape[1], 3]
    want, _ = vilt.tokenizer.encode([captions[0], captions[1]], 20)
    assert torch.equal(ids, want)
    assert Texts(captions, vilt.tokenizer, 4).cut == 2


def test_results_and_predictions_are_written(taskset, clip_run, tmp_path):
    result = evaluate_retrieval(clip_run, taskset, RetrievalConfig(ties="albef"), silent, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content == result.content
    assert content["counts"] == {"images": 6, "captions": 30, "images_left_out": 0, "captions_left_out": 0}
    assert content["checkpoint"]["name"] == "clip 00000001"
    assert content["dataset"] == {
        "name": "taskset",
        "task": "retrieval",
        "fingerprint": content["dataset"]["fingerprint"],
    }
    assert content["configuration"]["ties"] == "albef"
    assert content["seed"] == 0
    assert str(tmp_path) not in json.dumps(content)
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(predictions["image_to_text"]) == 6
    assert len(predictions["text_to_image"]) == 30
    assert [r[""] for r in result.rows()] == ["image to text", "text to image"]
    assert result.rows()[0]["R@5"] == result.metric["image_to_text_r5"]
    assert not list((tmp_path / "out").glob("scores*"))


def test_the_default_place_and_what_stands_there(taskset, clip_run, tmp_path):
    run = shutil.copytree(clip_run, tmp_path / "run")
    result = evaluate_retrieval(run, taskset, RetrievalConfig(split="val"), silent)
    assert result.folder == run / "evaluations" / "retrieval-val"
    before = (result.folder / "results.json").stat().st_mtime_ns
    said = []
    again = evaluate_retrieval(run, taskset, RetrievalConfig(split="val", batch_size=2), said.append)
    assert again == result
    assert (result.folder / "results.json").stat().st_mtime_ns == before
    assert any("stands already" in e.text for e in said if isinstance(e, Notice))
    said.clear()
    evaluate_retrieval(run, taskset, RetrievalConfig(split="val", ties="albef"), said.append)
    told = next(e.text for e in said if isinstance(e, Notice))
    assert "is replaced: `configuration.ties` was 'pessimistic', now 'albef'" in told


def test_cost_is_told_before_and_progress_while(taskset, vilt_run, tmp_path):
    said = []
    evaluate_retrieval(vilt_run, taskset, RetrievalConfig(), said.append, tmp_path / "out")
    cost = next(i for i, e in enumerate(said) if isinstance(e, Notice) and "pair passes lie ahead: about" in e.text)
    assert said[cost].text.startswith("140 pair passes")
    assert cost < min(i for i, e in enumerate(said) if isinstance(e, (Progress, StageStarted)))
    assert [e for e in said if isinstance(e, Progress)][-1].rows == 140


def test_durations():
    assert [duration(s) for s in (12.3, 600, 7200)] == ["12 s", "10 min", "2.0 h"]


class Stop(Exception):
    pass


def stop_after(blocks, folder):
    def emit(event):
        if isinstance(event, Progress) and len(list(folder.glob("scores-0*.npy"))) >= blocks:
            raise Stop

    return emit


@pytest.mark.parametrize("reranked", [False, True])
def test_a_stopped_evaluation_goes_on(taskset, vilt_run, clip_run, tmp_path, monkeypatch, reranked):
    monkeypatch.setattr(pair_scores, "PAIRS_PER_BLOCK", 30)
    monkeypatch.setattr(scores, "REPORT_S", 0.0)
    options = {"candidates": str(clip_run), "top_k": 3} if reranked else {}
    want = evaluate_retrieval(vilt_run, taskset, RetrievalConfig(**options), silent, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(Stop):
        evaluate_retrieval(vilt_run, taskset, RetrievalConfig(**options), stop_after(2, out), out)
    standing = {p.name: p.stat().st_mtime_ns for p in out.glob("scores-0*.npy")}
    assert len(standing) >= 2
    assert not (out / "results.json").exists()

    with pytest.raises(PairmillError, match=r"unfinished evaluation with other settings: `configuration.precision`"):
        evaluate_retrieval(vilt_run, taskset, RetrievalConfig(**options, precision="bf16"), silent, out)

    said = []
    got = evaluate_retrieval(vilt_run, taskset, RetrievalConfig(**options, batch_size=64), said.append, out)
    assert got.content == want.content
    assert (out / "predictions.json").read_bytes() == (tmp_path / "whole" / "predictions.json").read_bytes()
    (started,) = [e for e in said if isinstance(e, StageStarted)]  # the candidates stand, too
    assert started.standing == len(standing)
    assert not list(out.glob("scores*"))


def test_a_killed_evaluation_goes_on(taskset, vilt_run, tmp_path):
    out = tmp_path / "out"
    code = f"""
import os, signal
from pathlib import Path
from downstream import pair_scores, scores
from downstream.config import RetrievalConfig
from downstream.retrieval import evaluate_retrieval
from schemas.events import Progress
pair_scores.PAIRS_PER_BLOCK, scores.REPORT_S = 30, 0.0
out = Path({str(out)!r})
def emit(event):
    if isinstance(event, Progress) and len(list(out.glob("scores-0*.npy"))) >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
evaluate_retrieval({str(vilt_run)!r}, {str(taskset)!r}, RetrievalConfig(threads=1), emit, out)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(list(out.glob("scores-0*.npy"))) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_scores, "PAIRS_PER_BLOCK", 30)
        got = evaluate_retrieval(vilt_run, taskset, RetrievalConfig(), silent, out)
        want = evaluate_retrieval(vilt_run, taskset, RetrievalConfig(), silent, tmp_path / "whole")
    assert got.content == want.content


def test_damaged_blocks_are_named(taskset, vilt_run, tmp_path, monkeypatch):
    monkeypatch.setattr(pair_scores, "PAIRS_PER_BLOCK", 30)
    monkeypatch.setattr(scores, "REPORT_S", 0.0)
    out = tmp_path / "out"
    with pytest.raises(Stop):
        evaluate_retrieval(vilt_run, taskset, RetrievalConfig(), stop_after(1, out), out)
    (out / "scores-00000.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(PairmillError, match=r"scores-00000\.npy is damaged .*Delete it"):
        evaluate_retrieval(vilt_run, taskset, RetrievalConfig(), silent, out)


def test_images_without_pixels_are_left_out_and_told(tmp_path, clip_run):
    taskset = make_taskset(tmp_path / "tasks", test=4)
    shutil.rmtree(taskset)
    images = tmp_path / "tasks" / "images"
    (images / "7.jpg").unlink()
    config = RetrievalImportConfig(karpathy=tmp_path / "tasks" / "dataset.json", images=images, allow_missing=True)
    import_retrieval(taskset, config, silent)
    said = []
    result = evaluate_retrieval(clip_run, taskset, RetrievalConfig(), said.append, tmp_path / "out")
    assert result.content["counts"] == {"images": 3, "captions": 15, "images_left_out": 1, "captions_left_out": 5}
    assert any(e.warning and "not comparable" in e.text for e in said if isinstance(e, Notice))


def test_training_chooses_its_best_by_the_metric(taskset, tmp_path):
    config = resolve("clip-tiny", {"steps": 2, "batch_size": 4, "eval_every": 1, "device": "cpu", "threads": 1})
    run = tmp_path / "run"
    result = train(config, [str(taskset)], run, silent, validation_metric(taskset, config, run))
    lines = [m["retrieval_mean"] for m in Run(run).metrics() if "retrieval_mean" in m]
    assert len(lines) == 2
    assert result.best == max(lines)
    found = evaluate_retrieval(run, taskset, RetrievalConfig(split="val"), silent)
    assert found.metric["mean"] == pytest.approx(result.best)


def test_validation_of_a_single_stream_model(taskset, tmp_path, vilt_run):
    config = Run(vilt_run).config()
    metric = validation_metric(taskset, config, vilt_run, num_images=2)
    assert (metric.name, metric.higher) == ("retrieval_mean", True)
    subject = open_subject(vilt_run, "retrieval", CPU)
    few = read_retrieval(taskset, "retrieval", "val", silent).first(2)
    assert len(few.captions) == 10
    assert metric.run(subject.model) == measure(few, score_pairs(subject, few, Machine(CPU), silent))[0]["mean"]
    blind = config.model_copy(update={"model": {"size": "tiny", "model_heads": ["masked_language"]}})
    with pytest.raises(PairmillError, match="this vilt has no ranking or matching head"):
        validation_metric(taskset, blind, vilt_run)
    with pytest.raises(PairmillError, match=r"has no split `dev`.*It has test \(30\), train \(15\), val \(15\)"):
        validation_metric(taskset, config, vilt_run, split="dev")


def refused(checkpoint, taskset, tmp_path, **options):
    with pytest.raises(PairmillError) as error:
        evaluate_retrieval(checkpoint, taskset, RetrievalConfig(**options), silent, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    return str(error.value)


def test_what_is_refused(taskset, clip_run, vilt_run, tmp_path):
    assert "has no split `tset`. Did you mean `test`? It has test (30)" in refused(
        clip_run, taskset, tmp_path, split="tset"
    )
    told = refused(clip_run, taskset, tmp_path, task="retreival")
    assert "has no task set `retreival`. Did you mean `retrieval`?" in told
    assert "`pairmill task import`" in told
    assert "is not a dataset" in refused(clip_run, tmp_path, tmp_path)
    assert "no such run or checkpoint" in refused(tmp_path / "none", taskset, tmp_path)
    assert "cannot be cut into 4 equal folds" in refused(clip_run, taskset, tmp_path, folds=4)
    assert "leave --candidates away" in refused(clip_run, taskset, tmp_path, candidates=str(clip_run))
    assert "vilt is no dual encoder" in refused(vilt_run, taskset, tmp_path, candidates=str(vilt_run))
    assert "has no ranking head. It has matching." in refused(vilt_run, taskset, tmp_path, head="ranking")
    assert "no such device" in refused(clip_run, taskset, tmp_path, device="abacus")


def test_a_dataset_without_tasks_is_told_how_to_get_one(clip_run, taskset, tmp_path):
    bare = shutil.copytree(taskset, tmp_path / "bare")
    shutil.rmtree(bare / "tasks")
    assert "It has no task set. `pairmill task import` makes one" in refused(clip_run, bare, tmp_path)


def test_a_folder_that_is_no_run(taskset, clip_run, tmp_path):
    broken = shutil.copytree(clip_run, tmp_path / "broken")
    (broken / "config.yaml").unlink()
    assert "is no run folder: it has no config.yaml" in refused(broken, taskset, tmp_path)
    empty = shutil.copytree(clip_run, tmp_path / "empty")
    shutil.rmtree(empty / "checkpoints")
    assert "has no checkpoint yet" in refused(empty, taskset, tmp_path)


def test_another_tokenizer_is_refused(taskset, clip_run, vilt_run, tmp_path):
    told = refused(vilt_run, taskset, tmp_path, tokenizer=str(clip_run / "tokenizer"))
    assert "was trained with the tokenizer" in told
    assert "a run brings its own" in told
    swapped = shutil.copytree(vilt_run, tmp_path / "swapped")
    shutil.rmtree(swapped / "tokenizer")
    shutil.copytree(clip_run / "tokenizer", swapped / "tokenizer")
    assert "Put the run's own tokenizer back" in refused(swapped, taskset, tmp_path)


def test_one_checkpoint_and_published_files(taskset, clip_run, vilt_run, tmp_path):
    want = evaluate_retrieval(clip_run, taskset, RetrievalConfig(), silent, tmp_path / "run")
    step = clip_run / "checkpoints" / "00000001"
    one = evaluate_retrieval(step, taskset, RetrievalConfig(), silent, tmp_path / "step")
    assert one.content == want.content
    folder = tmp_path / "published"  # a CLIP's checkpoint is an open_clip folder
    shutil.copytree(step, folder, ignore=shutil.ignore_patterns("optimizer*", "state*", "model.json"))
    other = evaluate_retrieval(folder, taskset, RetrievalConfig(), silent, tmp_path / "other")
    assert other.metric == want.metric
    assert other.content["checkpoint"]["sha256"] == want.content["checkpoint"]["sha256"]
    assert other.content["seed"] is None
    with pytest.raises(PairmillError, match=r"published is no run: say with -o"):
        evaluate_retrieval(folder, taskset, RetrievalConfig(), silent)


def test_a_published_vilt_needs_its_tokenizer(taskset, vilt_run, tmp_path):
    subject = open_subject(vilt_run, "retrieval", CPU)
    file = tmp_path / "vilt.ckpt"
    torch.save({"state_dict": subject.model.published_state()}, file)
    assert "a published ViLT needs the tokenizer it was trained with" in refused(file, taskset, tmp_path)
    told = refused(file, taskset, tmp_path, tokenizer=str(vilt_run / "tokenizer"))
    assert f"was trained with a vocabulary of {subject.model.config.vocab:,} pieces, the tokenizer" in told
    exported = tmp_path / "exported"  # our own, with its model.json: a vocabulary may be smaller than its room
    shutil.copytree(vilt_run / "checkpoints" / "00000001", exported, ignore=shutil.ignore_patterns("state*"))
    config = RetrievalConfig(tokenizer=str(vilt_run / "tokenizer"))
    found = evaluate_retrieval(exported, taskset, config, silent, tmp_path / "a")
    assert found.metric == evaluate_retrieval(vilt_run, taskset, RetrievalConfig(), silent, tmp_path / "b").metric
