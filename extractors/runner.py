"""Runs an extractor over a dataset: settings, sidecars, what is left to do, workers and GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from extractors.config import DeviceConfig, ExtractorConfig
from extractors.device import pick_batch_size, resolve_device, resolve_precision
from extractors.flow import ExtractWork, Settings, forget_model
from extractors.protocol import Loader
from extractors.resume import Outputs, wanted
from schemas.errors import PairmillError
from schemas.events import Emit, Notice, StageFinished
from schemas.features import FEATURES, SCORES, VERSION
from schemas.sidecars import Sidecar, make_sidecar
from shards.dataset import PAIRS, Dataset, Stage
from shards.locks import lock
from shards.parallel import run_stage, threads_per_worker

_CORES_PER_WORKER = 8  # one model's operations gain little from more cores
_MEND = "Pass the old settings, or --name to start beside it."


def run_extractor(
    dataset: Dataset | str | Path,
    config: ExtractorConfig,
    loader: Loader,
    outputs: Callable[[Dataset], Outputs],
    command: str,
    emit: Emit,
) -> StageFinished:
    """Computes what is missing of the outputs, and returns when every shard was tried.

    Raises PairmillError: other settings than the files that stand were made with, no such selection or device, no
    space, another process at work on the same outputs.
    """
    dataset = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    dataset.require(PAIRS)
    to = outputs(dataset)
    workers, gpus, settings = _settings(config, loader, to)
    settings = _begin(to, config, loader, settings, command, workers == 0)
    want = wanted(dataset, config.selection)
    pending = to.pending(want)
    _tell_space(emit, loader, sum(dataset.manifest.shards[s] for s in pending), to)
    *also, main = to.stages
    try:
        with _locks(also):
            return run_stage(
                main,
                ExtractWork(to, loader, settings, want),
                pending=pending,
                workers=workers,
                scheduler=config.scheduler,
                emit=emit,
                bytes_per_row=loader.bytes_per_row,
                gpus=gpus,
            )
    finally:
        forget_model()


@contextmanager
def _locks(stages: list[Stage]) -> Iterator[None]:
    if not stages:
        yield
        return
    with lock(stages[0].folder, stages[0].path), _locks(stages[1:]):
        yield


def _settings(config: ExtractorConfig, loader: Loader, to: Outputs) -> tuple[int, int, Settings]:
    """(workers, GPUs, settings as the configuration or the standing sidecar says). Batch size 0: to be picked."""
    cores = os.cpu_count() or 1
    workers = max(1, cores // _CORES_PER_WORKER) if config.workers is None else config.workers
    remote = config.scheduler is not None
    if not isinstance(config, DeviceConfig):
        return workers, 0, Settings("cpu", "fp32", 0, threads_per_worker(workers), not remote)
    device = resolve_device(config.device, remote)
    gpus = 0
    if config.num_gpus and (workers == 0 or not device.startswith("cuda")):
        raise PairmillError("`--num-gpus` needs CUDA devices and worker processes. Drop it, or --workers 0.")
    if device.startswith("cuda") and workers:
        visible = 1 if device != "cuda" else torch.cuda.device_count()
        gpus = config.num_gpus or (visible if not remote else 1)
        if gpus > visible and not remote:
            raise PairmillError(f"`--num-gpus {gpus}`: this machine shows {visible}.")
        workers = gpus
    old = to.stages[-1].sidecar()
    precision: str = config.precision
    if precision == "auto" and old is not None:
        precision = old.identity["precision"]
    size = config.batch_size
    if size == "auto":
        size = old.recorded["batch_size"] if old is not None else 0
    precision = resolve_precision(precision, device)
    return workers, gpus, Settings(device, precision, int(size), threads_per_worker(workers), not remote)


def _begin(
    to: Outputs, config: ExtractorConfig, loader: Loader, settings: Settings, command: str, in_process: bool
) -> Settings:
    """Picks the batch size if need be, and writes or checks the sidecars."""
    recorded: dict[str, Any] = {}
    extra = dict(loader.identity)
    if isinstance(config, DeviceConfig):
        extra["precision"] = settings.precision
        if not settings.batch_size:
            for stage in to.stages:  # a mismatch is told before a model is loaded
                _check(stage, config, loader, extra, recorded, command)
            size = pick_batch_size(loader, settings.device, settings.precision, in_process)
            settings = replace(settings, batch_size=size)
        recorded["batch_size"] = settings.batch_size
    for stage in to.stages:
        stage.begin(_sidecar(stage, config, loader, extra, recorded, command), _MEND)
    return settings


def _check(stage: Stage, *args: Any) -> None:
    if stage.sidecar() is not None:
        stage.begin(_sidecar(stage, *args), _MEND)


def _sidecar(
    stage: Stage,
    config: ExtractorConfig,
    loader: Loader,
    extra: dict[str, Any],
    recorded: dict[str, Any],
    command: str,
) -> Sidecar:
    kind = FEATURES if stage.kind == "features" else SCORES
    fields = loader.fields if kind == FEATURES else loader.score_fields
    own = {field.name for field in fields}
    made = {"precision": extra["precision"]} if "precision" in extra else {}
    columns = {name: {**what, **made} for name, what in loader.provenance.items() if name in own}
    return make_sidecar(command, stage.name, (kind, VERSION), config, extra, columns, loader.versions, recorded)


def _tell_space(emit: Emit, loader: Loader, rows: int, to: Outputs) -> None:
    need = rows * loader.bytes_per_row
    if need >= 1 << 30:
        emit(Notice(f"{to.stages[-1].path}: about {need / 2**30:.1f} GiB for {rows:,} rows."))
