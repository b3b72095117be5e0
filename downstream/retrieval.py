"""`pairmill evaluate retrieval`: a model and a task set in, recalls out.

A dual encoder ranks everything by dot products. A single-stream model scores every pair, or re-ranks the top k of a
dual encoder. Choose models on `val` and report `test`: ViLT and METER chose theirs on the test split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from downstream.base import Subject, open_subject, pick_device, view_of_run
from downstream.config import RetrievalConfig
from downstream.encode import PAIR_HEADS, is_dual_encoder
from downstream.pair_scores import Candidates, choose, score_pairs
from downstream.recall import KS, Recall, Ties, retrieval_recall
from downstream.results import (
    RESULTS,
    Blocks,
    Identity,
    standing_results,
    write_predictions,
    write_results,
    writing,
)
from downstream.retrieval_set import RetrievalSet, read_retrieval
from downstream.scores import Machine, Scores, chunks, embed, top
from schemas.errors import PairmillError
from schemas.events import Emit, Notice, silent
from training.config import TrainConfig
from training.loop import Validation
from training.models.base import VisionLanguageModel
from training.registry import MODELS, model_config
from training.text import load_tokenizer

TASK = "retrieval"
TOP = 10
# How much of the validation split a run's best checkpoint is chosen on.
VALIDATION_IMAGES = 1000
VALIDATION_IMAGES_OF_PAIRS = 50


@dataclass(frozen=True)
class RetrievalResult:
    """The recalls, and where they and the predictions are written. `content` is what results.json holds."""

    folder: Path
    metric: dict[str, float]
    content: dict[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """The table a person reads: recall at k in percent, each way."""
        names = {"image_to_text": "image to text", "text_to_image": "text to image"}
        return [{"": told, **{f"R@{k}": self.metric[f"{name}_r{k}"] for k in KS}} for name, told in names.items()]


def evaluate_retrieval(
    checkpoint: str | Path,
    taskset: str | Path,
    config: RetrievalConfig,
    emit: Emit,
    output: str | Path | None = None,
) -> RetrievalResult:
    """Recalls of a run or checkpoint on a split of a dataset's retrieval task.

    output  where results.json and predictions.json go [default: RUN/evaluations/TASK-SPLIT]

    A killed evaluation goes on with the scores it has; one that has ended is told, not computed again.
    Raises PairmillError: see `open_subject` and `read_retrieval`; folds that cannot be equal; options that do not go
    with the model; no `output` for a published checkpoint.
    """
    data = read_retrieval(str(taskset), config.task, config.split, emit)
    data.image_fold(config.folds)
    machine = Machine(pick_device(config.device), config.precision, config.batch_size, config.threads)
    subject = open_subject(checkpoint, TASK, machine.device, config.tokenizer, config.activation)
    rival = _candidates_of(config, subject, machine.device)
    folder = _output(output, subject, config)
    identity = _identity(subject, rival, data, config)
    with writing(folder):
        done = _standing(folder, identity, emit)
        if done is None:
            blocks = None if is_dual_encoder(subject) else Blocks(folder, identity)
            scores = _scores(subject, rival, data, config, machine, blocks, emit)
            metric, predictions = measure(data, scores, config.ties, config.folds)
            write_predictions(folder, predictions)
            done = write_results(folder, identity, metric, _counts(data), subject.seed)
            if blocks is not None:
                blocks.remove()
    return RetrievalResult(folder, done["metric"], done)


def _candidates_of(config: RetrievalConfig, subject: Subject, device: torch.device) -> Subject | None:
    if config.candidates is None:
        return None
    if is_dual_encoder(subject):
        raise PairmillError(f"{subject.name} is a dual encoder and ranks everything itself: leave --candidates away.")
    rival = open_subject(config.candidates, TASK, device, activation=config.activation)
    if not is_dual_encoder(rival):
        raise PairmillError(f"--candidates {config.candidates}: {rival.family} is no dual encoder. Give a CLIP.")
    return rival


def _output(output: str | Path | None, subject: Subject, config: RetrievalConfig) -> Path:
    if output is not None:
        return Path(output)
    if subject.run is None:
        raise PairmillError(f"{subject.name} is no run: say with -o which folder the results go to.")
    return subject.run / "evaluations" / f"{config.task}-{config.split}"


def _identity(subject: Subject, rival: Subject | None, data: RetrievalSet, config: RetrievalConfig) -> Identity:
    """Files are told by their hashes, not by where they lie."""
    settings = config.identity_fields() | {"candidates": rival.sha256 if rival else None}
    for name in ("tokenizer", "split", "task"):
        del settings[name]
    if rival is None:
        settings["top_k"] = None
    return Identity(
        task=TASK,
        split=config.split,
        checkpoint={"name": subject.name, "sha256": subject.sha256},
        dataset={"name": data.dataset.url.rsplit("/", 1)[-1], "task": data.name, "fingerprint": data.fingerprint},
        tokenizer=subject.tokenizer.fingerprint,
        configuration=settings,
    )


def _counts(data: RetrievalSet) -> dict[str, int]:
    images, captions = data.left_out
    return {
        "images": len(data.images),
        "captions": len(data.captions),
        "images_left_out": images,
        "captions_left_out": captions,
    }


def _standing(folder: Path, identity: Identity, emit: Emit) -> dict[str, Any] | None:
    """The results of this very evaluation, where they stand; others are told and will be replaced."""
    old = standing_results(folder)
    if old is None:
        return None
    differences = identity.differences({k: old[k] for k in identity.values() if k in old})
    if not differences:
        emit(Notice(f"{folder / RESULTS} stands already. Delete it to compute it again."))
        return old
    emit(Notice(f"{folder / RESULTS} is replaced: {'; '.join(differences)}."))
    return None


def _scores(
    subject: Subject,
    rival: Subject | None,
    data: RetrievalSet,
    config: RetrievalConfig,
    machine: Machine,
    blocks: Blocks | None,
    emit: Emit,
) -> Scores:
    if is_dual_encoder(subject):
        return embed(subject, data, machine, emit)
    chosen = None
    if rival is not None:
        chosen = _stored_candidates(data, config.top_k, blocks)
        if chosen is None:
            chosen = choose(embed(rival, data, machine, emit), data, config.top_k, config.folds)
            _store_candidates(chosen, blocks)
    return score_pairs(
        subject, data, machine, emit, head=config.head, candidates=chosen, num_folds=config.folds, store=blocks
    )


def _stored_candidates(data: RetrievalSet, top_k: int, blocks: Blocks | None) -> Candidates | None:
    """What a killed evaluation chose: another batch size could choose otherwise where scores are nearly equal."""
    if blocks is None:
        return None
    images, captions = len(data.images), len(data.captions)
    texts = blocks.load("candidate-texts", (images, min(top_k, captions)))
    of_texts = blocks.load("candidate-images", (captions, min(top_k, images)))
    return None if texts is None or of_texts is None else Candidates(texts, of_texts)


def _store_candidates(chosen: Candidates, blocks: Blocks | None) -> None:
    if blocks is not None:
        blocks.save("candidate-texts", chosen.texts)
        blocks.save("candidate-images", chosen.images)


def measure(
    data: RetrievalSet, scores: Scores, ties: Ties = "pessimistic", num_folds: int = 1
) -> tuple[dict[str, float], dict[str, Any]]:
    """(metric, predictions) of scores.

    Metric: `image_to_text_r1` ... `text_to_image_r10` in percent, their sum `rsum` and mean `mean`.
    Predictions: of each query its ten best candidates with their scores, best first, those of its own fold only;
    of equal ones the first in the task set, whatever `ties` says about the metric.
    """
    fold = data.image_fold(num_folds)
    caption_fold = fold[data.caption_image]
    of_images, of_texts = Best(fold, caption_fold), Best(caption_fold, fold)
    recall = retrieval_recall(
        of_images.watch(scores.of_images(part) for part in chunks(len(data.images))),
        of_texts.watch(scores.of_texts(part) for part in chunks(len(data.captions))),
        data.caption_image,
        ties=ties,
        num_folds=num_folds,
    )
    return flat(recall), _predictions(data, of_images, of_texts)


def flat(recall: Recall) -> dict[str, float]:
    """Recalls under the names results.json has."""
    ways = {"image_to_text": recall.image_to_text, "text_to_image": recall.text_to_image}
    values = {f"{way}_r{k}": value for way, found in ways.items() for k, value in found.items()}
    return values | {"rsum": recall.rsum, "mean": recall.mean}


def _predictions(data: RetrievalSet, of_images: Best, of_texts: Best) -> dict[str, Any]:
    places = [f"{shard}:{row}" for shard, row in data.images]
    captions = [
        {"image": place, "image_id": name, "captions": [data.caption_ids[j] for j in best], "scores": scores}
        for place, name, (best, scores) in zip(places, data.image_ids, of_images.found, strict=True)
    ]
    images = [
        {"caption": name, "images": [places[i] for i in best], "scores": scores}
        for name, (best, scores) in zip(data.caption_ids, of_texts.found, strict=True)
    ]
    return {"image_to_text": captions, "text_to_image": images}


class Best:
    """Takes the ten best candidates of each query from the blocks that pass by."""

    def __init__(self, query_fold: np.ndarray, candidate_fold: np.ndarray) -> None:
        self.query_fold, self.candidate_fold = query_fold, candidate_fold
        self.whole = not query_fold.any()  # one fold: nothing to leave out
        self.found: list[tuple[list[int], list[float]]] = []

    def watch(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            for row in block:
                own = self.query_fold[len(self.found)]
                self.found.append(best_of(row if self.whole else np.where(self.candidate_fold == own, row, -np.inf)))
            yield block


def best_of(row: np.ndarray) -> tuple[list[int], list[float]]:
    """(candidates, scores) of the ten best of [M], without those that were not ranked."""
    best = [i for i in top(row, TOP).tolist() if row[i] > -np.inf]
    return best, [round(float(row[i]), 6) for i in best]


def validation_metric(
    taskset: str | Path,
    config: TrainConfig,
    run: str | Path,
    *,
    task: str = TASK,
    split: str = "val",
    num_images: int | None = None,
) -> Validation:
    """What chooses a run's best checkpoint: the mean of all six recalls on the task's validation split.

    num_images  only the first so many [default: 1000; 50 for single-stream models, which score every pair]

    Raises PairmillError: no such task set or split; a model that cannot score pairs.
    """
    data = read_retrieval(str(taskset), task, split, silent)
    if TASK not in MODELS[config.family].tasks:
        raise PairmillError(f"--val {taskset}: {config.family} cannot be evaluated on {TASK}.")
    heads = getattr(model_config(config.family, config.model), "model_heads", None)
    if heads is not None and not set(heads) & set(PAIR_HEADS):
        raise PairmillError(
            f"--val {taskset}: this {config.family} has no {' or '.join(PAIR_HEADS)} head to rank with."
        )
    most = num_images or (VALIDATION_IMAGES if heads is None else VALIDATION_IMAGES_OF_PAIRS)
    few = data.first(min(most, len(data.images)))

    def mean_recall(model: VisionLanguageModel) -> float:
        tokenizer = load_tokenizer(Path(run) / "tokenizer")
        subject = Subject(model, tokenizer, view_of_run(config), Path(run).name, "")
        device = next(iter(model.parameters())).device
        machine = Machine(device, threads=config.threads)
        score = embed if is_dual_encoder(subject) else score_pairs
        return measure(few, score(subject, few, machine, silent))[0]["mean"]

    return Validation("retrieval_mean", mean_recall, higher=True)
