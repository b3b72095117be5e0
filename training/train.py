"""From a configuration and datasets to a trained run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from schemas.errors import PairmillError
from schemas.events import Emit, Notice, silent
from shards.dataset import PAIRS
from shards.files import hash_file, place_folder, temporary_name
from shards.reader import read_table
from training.augment import Augmentation
from training.checkpoint import Run
from training.config import TrainConfig, differences
from training.curve import draw_losses
from training.data import Loader, View
from training.loop import Trainer, TrainResult, Validation, sum_losses
from training.models.base import VisionLanguageModel
from training.objectives import Objective
from training.optim import ParameterGroup, parameter_groups
from training.order import make_order
from training.registry import build_model, build_objectives, model_config
from training.sources import IMAGES, Source, parse_source
from training.text import ClipTokenizer, Tokenizer, load_tokenizer, train_wordpiece
from training.weights import read_checkpoint

VALIDATION_BATCHES = 50


def make_view(config: TrainConfig, augment: bool = True) -> View:
    """How the run's model wants its pairs; without augmentation for validation."""
    name = config.augmentation if augment else "none"
    return View(
        transform=config.transform,
        size=config.image_size,
        patch=config.patch,
        max_text_len=config.max_text_len,
        augmentation=Augmentation(name, config.image_size),
        input=config.input,
    )


def open_sources(texts: Sequence[str], config: TrainConfig) -> list[Source]:
    """The datasets of a run. Raises PairmillError: patch tensors cut in another way than the model wants."""
    sources = [Source(i, parse_source(text), config.input) for i, text in enumerate(texts)]
    if config.input != IMAGES:
        for source in sources:
            _check_patches(source, config)
    return sources


def _check_patches(source: Source, config: TrainConfig) -> None:
    sidecar = source.features.sidecar()
    made = sidecar.identity if sidecar else {}
    want = {"layout": config.transform, "size": config.image_size, "patch": config.patch}
    wrong = [f"{k} {made.get(k)!r}, the model wants {v!r}" for k, v in want.items() if made.get(k) != v]
    if wrong:
        again = f"--layout {config.transform} --size {config.image_size} --patch {config.patch} --name ANOTHER"
        raise PairmillError(
            f"{source.dataset.url} features/{config.input} was made with {'; '.join(wrong)}. "
            f"Run: pairmill extract patches {source.spec.url} {again}"
        )


def captions(sources: Sequence[Source]) -> Iterator[str]:
    """Every caption of the rows that take part."""
    for source in sources:
        rows: dict[int, list[int]] = {}
        for group in source.groups():
            rows.setdefault(group.shard, []).extend(group.rows.tolist())
        for shard, wanted in rows.items():
            file = source.dataset.stage(PAIRS).file(shard)
            table = read_table(source.dataset.folder, file, ["caption", "captions"]).take(wanted)
            for one, several in zip(table["caption"].to_pylist(), table["captions"].to_pylist(), strict=True):
                yield from several or [one]


def make_tokenizer(config: TrainConfig, run: Run, sources: Sequence[Source]) -> Tokenizer:
    """RUN/tokenizer where it stands, else the one the configuration names, saved there.

    Raises PairmillError: a tokenizer that cannot be had, or a size that is no number.
    """
    folder = run.path / "tokenizer"
    if folder.is_dir():
        return load_tokenizer(folder)
    kind, _, size = config.tokenizer.partition(":")
    if config.tokenizer == "clip":
        tokenizer: Tokenizer = ClipTokenizer()
    elif kind == "wordpiece":
        if not size.isdigit():
            raise PairmillError(f"tokenizer `{config.tokenizer}`: give wordpiece:SIZE, such as wordpiece:4096.")
        tokenizer = train_wordpiece(captions(sources), int(size))
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    temporary = folder.with_name(temporary_name(folder.name))
    temporary.mkdir(parents=True)
    tokenizer.save(temporary)
    place_folder(temporary, folder)
    return tokenizer


def make_model(config: TrainConfig, tokenizer: Tokenizer) -> tuple[VisionLanguageModel, set[str], str]:
    """(the model, its parameters that came from a checkpoint, what was loaded in a sentence).

    Raises PairmillError: a vocabulary larger than the model's, or a checkpoint that does not fit.
    """
    own = model_config(config.family, config.model)
    vocab = getattr(own, "vocab", None)
    if vocab is not None and tokenizer.vocab_size > vocab:
        raise PairmillError(
            f"the tokenizer has {tokenizer.vocab_size:,} pieces, the model room for {vocab:,}. "
            "Give the model's own --tokenizer, or a model with a larger `vocab`."
        )
    torch.manual_seed(config.seed)
    model = build_model(own)
    if config.weights is None:
        return model, set(), "all parameters are new"
    report = model.load_checkpoint(config.weights)
    if not report.loaded:
        raise PairmillError(f"{config.weights}: none of its weights is of a {config.family}: {report}.")
    return model, set(report.loaded), f"{config.weights}: {report}"


def make_groups(model: VisionLanguageModel, config: TrainConfig, loaded: set[str]) -> list[ParameterGroup]:
    """The run's parameter groups."""
    return parameter_groups(model, config, loaded, model.head_prefixes, model.no_decay())


def describe(config: TrainConfig) -> dict[str, Any]:
    """`--print`: every resolved number, the model's own, and where the run differs from the published one."""
    return {
        "config": config.model_dump(mode="json"),
        "model": model_config(config.family, config.model).model_dump(mode="json"),
        "published": {k: {"published": a, "here": b} for k, (a, b) in differences(config).items()},
    }


def describe_run(config: TrainConfig, datasets: Sequence[str]) -> dict[str, Any]:
    """`describe`, with the pairs of an epoch and the parameter groups.

    Raises PairmillError as `train` does.
    """
    sources = open_sources(datasets, config)
    order = make_order([s.groups() for s in sources], [s.spec.weight for s in sources], config.seed)
    with torch.device("meta"):
        model = build_model(model_config(config.family, config.model))
    groups = [
        {
            "from": g.origin,
            "decay": config.weight_decay if g.decay else 0.0,
            "lr": config.lr * g.factor,
            "numbers": g.numbers,
        }
        for g in make_groups(model, config, set())
    ]
    epochs = config.steps * config.accumulate * config.batch_size / order.length
    return {**describe(config), "pairs": order.length, "epochs": round(epochs, 2), "groups": groups}


def train(
    config: TrainConfig,
    datasets: Sequence[str],
    output: str | Path,
    emit: Emit,
    val: str | Validation | None = None,
) -> TrainResult:
    """Trains in run folder `output`, or goes on with the run that stands there.

    `datasets` are DATASET[@SELECTION][:WEIGHT]; `val` is DATASET@SELECTION, whose loss chooses `best`, or a Validation.

    Raises PairmillError for anything in the configuration or the data that the user can mend.
    """
    from accelerate import PartialState

    state = PartialState(cpu=config.device == "cpu")
    emit = emit if state.is_main_process else silent
    run, sources = Run(output), open_sources(datasets, config)
    order = make_order([s.groups() for s in sources], [s.spec.weight for s in sources], config.seed)
    with state.main_process_first():
        tokenizer = make_tokenizer(config, run, sources)
        fingerprint = {"sources": [s.fingerprint() for s in sources], "tokenizer": tokenizer.fingerprint}
        _begin(run, config, datasets, fingerprint)
    model, loaded, report = make_model(config, tokenizer)
    emit(Notice(f"{order.length:,} pairs an epoch, batches of {config.batch_size}, {config.steps:,} steps; {report}."))
    objectives = build_objectives(config.family, config.objectives, tokenizer)

    def loader(start: int) -> Loader:
        return Loader(
            order,
            sources,
            make_view(config),
            tokenizer,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=state.process_index,
            world=state.num_processes,
            start=start,
            threads=config.threads or os.cpu_count() or 1,
        )

    validation = _loss_on(val, config, tokenizer, objectives) if isinstance(val, str) else val
    trainer = Trainer(
        config,
        model,
        objectives,
        make_groups(model, config, loaded),
        loader,
        run,
        fingerprint,
        validation,
        emit,
    )
    result = trainer.train()
    if trainer.main:
        draw_losses(run)
    return result


def _begin(run: Run, config: TrainConfig, datasets: Sequence[str], fingerprint: dict[str, Any]) -> None:
    identity = {**config.identity_fields(), **fingerprint}
    if config.weights is not None and Path(config.weights).is_file():
        identity["weights"] = f"sha256:{hash_file(config.weights)}"
    text = yaml.safe_dump({"datasets": list(datasets), **describe(config)}, sort_keys=False, allow_unicode=True)
    run.begin(identity, text)


def _loss_on(
    text: str, config: TrainConfig, tokenizer: Tokenizer, objectives: Sequence[tuple[float, Objective]]
) -> Validation:
    """The objectives' loss over at most 50 batches of held-out rows, the same ones at every call."""
    from accelerate import PartialState

    state = PartialState()
    source = Source(0, parse_source(text), config.input)
    order = make_order([source.groups()], [None], 0)
    size = min(config.batch_size, order.length // state.num_processes * state.num_processes)
    loader = Loader(
        order,
        [source],
        make_view(config, augment=False),
        tokenizer,
        batch_size=size,
        seed=0,
        rank=state.process_index,
        world=state.num_processes,
    )

    def run(model: VisionLanguageModel) -> float:
        total = torch.zeros((), device=state.device)
        count = min(VALIDATION_BATCHES, order.length // size)
        for index in range(count):
            generator = torch.Generator().manual_seed(index)
            batch = loader.build(loader.places(index))
            prepared = [o.prepare(batch, generator).to(state.device) for _, o in objectives]
            outputs = [model(b, route=o.route) for b, (_, o) in zip(prepared, objectives, strict=True)]
            total += sum_losses(objectives, outputs, prepared, generator)[0].detach()
        if state.num_processes > 1:
            torch.distributed.all_reduce(total)
        return float(total) / count / state.num_processes

    return Validation("val_loss", run)


def load_run(path: str | Path, device: str = "cpu") -> tuple[VisionLanguageModel, Tokenizer, TrainConfig]:
    """A run's best, else last, checkpoint: (model in eval mode, tokenizer, configuration).

    Raises PairmillError where there is no run or no checkpoint.
    """
    run = Run(path)
    config = run.config()
    tokenizer = load_tokenizer(run.path / "tokenizer")
    model = build_model(model_config(config.family, config.model))
    folder = run.chosen()
    model.load_published(read_checkpoint(folder).tensors, str(folder)).require_whole(str(folder))
    return model.to(device).eval(), tokenizer, config
