"""What every evaluation needs: the model with its tokenizer and its way of seeing images, and the rows of a task."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from schemas.config import StageConfig
from schemas.errors import PairmillError, suggest
from schemas.tasks import TASKS
from shards.dataset import Dataset
from shards.files import hash_file
from shards.reader import read_table
from training.augment import Augmentation
from training.checkpoint import Run
from training.config import TrainConfig
from training.config_models import CLIPConfig, ViLTConfig
from training.data import View, live_pixels
from training.models.base import CONFIG_FILE, VisionLanguageModel
from training.registry import MODELS, build_model, model_config, model_from_checkpoint
from training.sources import IMAGES, Source, SourceSpec
from training.text import ClipTokenizer, Tokenizer, load_tokenizer
from training.train import make_view
from training.weights import read_checkpoint, read_json

AHEAD = 4  # images that wait decoded, for each thread
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    name    of the run and its step, or of the published file; no folder of this machine
    sha256  of the file of weights
    run     the run's folder; None for a published checkpoint
    seed    of the training; None where nobody knows it
    """

    model: VisionLanguageModel
    tokenizer: Tokenizer
    view: View
    name: str
    sha256: str
    run: Path | None = None
    seed: int | None = None

    @property
    def family(self) -> str:
        return str(getattr(self.model.config, "family", ""))


def open_subject(
    path: str | Path, task: str, device: torch.device, tokenizer: str | None = None, activation: str | None = None
) -> Subject:
    """The model of a run (its best, else its last checkpoint), of one checkpoint of a run, or of a published file.

    tokenizer   of a published checkpoint; CLIP's own is known. Given with a run it must be the run's.
    activation  of a published CLIP that does not tell

    Raises PairmillError: nothing there; a model that does not do `task`; a tokenizer that is missing or another one
    than the model was trained with.
    """
    path = Path(path)
    if path.name == "model.safetensors" and (path.parent / "state.json").is_file():
        path = path.parent
    if not path.exists():
        raise PairmillError(
            f"{path}: no such run or checkpoint. Give a run folder (`pairmill train ... -o RUN`), one of its "
            "checkpoints, or a published checkpoint's file."
        )
    run = _run_of(path)
    if run is None:
        subject = _published(path, tokenizer, activation)
    else:
        subject = _trained(run, run.chosen() if path == run.path else path, tokenizer)
    if task not in MODELS[subject.family].tasks:
        able = ", ".join(name for name, entry in MODELS.items() if task in entry.tasks)
        raise PairmillError(f"{path}: {subject.family} cannot be evaluated on {task}. Models that can: {able}.")
    subject.model.to(device).eval()
    return subject


def _run_of(path: Path) -> Run | None:
    """The run whose folder, or one of whose checkpoints, this is."""
    run = Run(path.parent.parent if path.absolute().parent.name == "checkpoints" else path)
    if (run.path / "config.yaml").is_file():
        return run
    if path.is_dir() and (path / "checkpoints").is_dir():
        raise PairmillError(f"{path} is no run folder: it has no config.yaml. Make one with `pairmill train`.")
    return None


def _trained(run: Run, folder: Path, given: str | None) -> Subject:
    config = run.config()
    tokenizer = load_tokenizer(run.path / "tokenizer")
    saved = _tokenizer_of(folder)
    if saved is not None and saved != tokenizer.fingerprint:
        raise PairmillError(
            f"{folder} was trained with the tokenizer {saved}, {run.path / 'tokenizer'} is {tokenizer.fingerprint}. "
            "Put the run's own tokenizer back."
        )
    if given is not None and (other := load_tokenizer(given).fingerprint) != tokenizer.fingerprint:
        raise PairmillError(
            f"{run.path} was trained with the tokenizer {tokenizer.fingerprint}, --tokenizer {given} is {other}. "
            "Leave --tokenizer away: a run brings its own."
        )
    checkpoint = read_checkpoint(folder)
    model = build_model(model_config(config.family, config.model))
    model.load_published(checkpoint.tensors, str(folder)).require_whole(str(folder))
    name = f"{run.path.absolute().name} {folder.name}"
    return Subject(model, tokenizer, view_of_run(config), name, hash_file(checkpoint.path), run.path, config.seed)


def _tokenizer_of(folder: Path) -> str | None:
    """Fingerprint of the tokenizer a checkpoint was trained with, as its state.json tells it."""
    file = folder / "state.json"
    return read_json(file).get("fingerprint", {}).get("tokenizer") if file.is_file() else None


def _published(path: Path, given: str | None, activation: str | None) -> Subject:
    model = model_from_checkpoint(path, **({} if activation is None else {"activation": activation}))
    file = read_checkpoint(path).path
    if given is None and not isinstance(model.config, CLIPConfig):
        raise PairmillError(
            f"{path}: a published {type(model).__name__} needs the tokenizer it was trained "
            "with. Pass --tokenizer FOLDER (with vocab.txt or tokenizer.json) or a name of the hub, bert-base-uncased "
            "for ViLT."
        )
    tokenizer = ClipTokenizer() if given is None else load_tokenizer(given)
    vocab = getattr(model.config, "vocab", None)
    # Our own models may have room for more pieces than their tokenizer has, published ones never do.
    room = (file.parent / CONFIG_FILE).is_file() and given is not None
    if vocab is not None and (tokenizer.vocab_size > vocab if room else tokenizer.vocab_size != vocab):
        raise PairmillError(
            f"{path} was trained with a vocabulary of {vocab:,} pieces, the tokenizer {given or 'clip'} has "
            f"{tokenizer.vocab_size:,}. Pass --tokenizer with the one it was trained with."
        )
    return Subject(model, tokenizer, view_of(model.config), path.name, hash_file(file))


def view_of_run(config: TrainConfig) -> View:
    """How a run's model wants its pairs, without augmentation, from images.

    A run may be trained on stored patch tensors: they are the pixels of this same view.
    """
    return replace(make_view(config, augment=False), input=IMAGES)


def view_of(config: StageConfig) -> View:
    """How a published model wants its pairs, from its own configuration."""
    plain = Augmentation("none")
    if isinstance(config, CLIPConfig):
        return View("clip", config.image_size, config.patch or 32, config.context, plain)
    assert isinstance(config, ViLTConfig)
    return View("vilt", config.image_size, config.patch, config.max_text_len, plain)


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one. Raises PairmillError for a device this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise PairmillError(f"`--device {name}`: this machine shows no CUDA device. Pass --device cpu or auto.")
    try:
        return torch.device(name)
    except RuntimeError:
        raise PairmillError(f"`--device {name}`: no such device. Pass auto, cpu, cuda or cuda:N.") from None


@contextlib.contextmanager
def evaluating(device: torch.device, precision: str) -> Iterator[None]:
    """No gradients, and the model's arithmetic in `precision`: fp32, bf16 or fp16."""
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        if precision in _PRECISIONS:
            stack.enter_context(torch.autocast(device.type, dtype=_PRECISIONS[precision]))
        yield


def read_task(dataset: Dataset, name: str, split: str, columns: Sequence[str]) -> pa.Table:
    """Rows of a task set's split, in order: a table of `columns`.

    Raises PairmillError: no such task set, no such split, shards that are not there.
    """
    have = dataset.folder.folders(TASKS)
    if name not in have:
        there = f"It has the task sets {', '.join(have)}." if have else "It has no task set."
        raise PairmillError(
            f"{dataset.url} has no task set `{name}`.{suggest(name, have)} {there} "
            "`pairmill task import` makes one from a benchmark's files."
        )
    stage = dataset.require(f"{TASKS}/{name}")
    missing = stage.pending()
    if missing:
        raise PairmillError(f"{dataset.url} {stage.path}: {len(missing)} shards are not there. Import it again.")
    wanted = list(dict.fromkeys(["split", *columns]))
    tables = [read_table(dataset.folder, stage.file(s), wanted) for s in range(dataset.num_shards)]
    whole = pa.concat_tables(tables)
    found = whole.filter(pc.equal(whole["split"], split))
    if not len(found):
        counts = {row["values"]: row["counts"] for row in pc.value_counts(whole["split"]).to_pylist()}
        told = ", ".join(f"{k} ({v:,})" for k, v in sorted(counts.items())) or "no row at all"
        near = suggest(split, counts)
        raise PairmillError(f"{dataset.url} {stage.path} has no split `{split}`.{near} It has {told}.")
    return found.select(list(columns))


def pixels(
    dataset: Dataset, places: Sequence[tuple[int, int]], view: View, threads: int | None
) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] of the images at (shard, row), in this order, brought to size as `view` says.

    Threads decode ahead; nothing depends on their number.

    Raises PairmillError for a stored image that does not decode.
    """
    source = Source(0, SourceSpec(dataset.url, None, None), need_text=False)
    source.groups()
    nothing = np.random.default_rng(0)  # a view without augmentation draws nothing
    count = threads or os.cpu_count() or 1
    ahead: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="decode") as pool:
        try:
            for shard, row in places:
                ahead.append(pool.submit(live_pixels, source, shard, row, view, nothing))
                if len(ahead) > AHEAD * count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
