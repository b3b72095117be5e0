"""Checkpoints that are whole or absent, and the run folder around them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save
from torch import Tensor

from schemas.errors import PairmillError
from shards.files import atomic_file, is_temporary, place_folder, temporary_name
from training.config import TrainConfig

STEP_WIDTH = 8
METRICS = "metrics.jsonl"


class Run:
    """A run folder: config.yaml, tokenizer/, metrics.jsonl, loss.png, checkpoints/STEP/, best, last."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def begin(self, identity: dict[str, Any], text: str) -> None:
        """Writes config.yaml, or checks that the run that stands is the same.

        Raises PairmillError that names every field that differs.
        """
        file, kept = self.path / "config.yaml", self.path / "identity.json"
        if kept.exists():
            old = json.loads(kept.read_text(encoding="utf-8"))
            names = [k for k in sorted({*old, *identity}) if old.get(k) != identity.get(k)]
            if names:
                parts = "; ".join(f"`{k}` was {old.get(k)!r}, now {identity.get(k)!r}" for k in names)
                raise PairmillError(
                    f"{self.path} holds a run with other settings: {parts}. Nothing written. "
                    "Give the same settings to go on with it, or another -o for a new run."
                )
            return
        write_text(file, text)
        write_text(kept, json.dumps(identity, indent=1, sort_keys=True) + "\n")

    def steps(self) -> list[int]:
        """Steps whose checkpoint stands, in order."""
        if not self.checkpoints.is_dir():
            return []
        names = (p.name for p in self.checkpoints.iterdir() if p.is_dir() and not is_temporary(p.name))
        return sorted(int(n) for n in names if n.isdigit())

    def folder(self, step: int) -> Path:
        return self.checkpoints / f"{step:0{STEP_WIDTH}d}"

    def pointer(self, name: str) -> int | None:
        """The step that `best` or `last` names, if its checkpoint stands."""
        file = self.path / name
        if not file.is_file():
            return None
        step = int(file.read_text(encoding="utf-8"))
        return step if step in self.steps() else None

    def point(self, name: str, step: int) -> None:
        write_text(self.path / name, f"{step:0{STEP_WIDTH}d}\n")

    def save(
        self, step: int, optimizer: dict[str, Tensor], state: dict[str, Any], write_model: Callable[[Path], None]
    ) -> Path:
        """Writes checkpoints/STEP whole and makes it `last`. `write_model` puts the model's files into a folder."""
        target = self.folder(step)
        temporary = target.with_name(temporary_name(target.name))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            write_model(temporary)
            with atomic_file(temporary / "optimizer.safetensors") as stream:
                stream.write(save(optimizer))
            write_text(temporary / "state.json", json.dumps(state, indent=1) + "\n")
            place_folder(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.point("last", step)
        return target

    def prune(self, keep: int) -> None:
        """Removes all but the newest `keep` checkpoints (best and last stay), and what a killed run left."""
        steps = self.steps()
        stay = {*steps[-keep:], self.pointer("best"), self.pointer("last")}
        for step in steps:
            if step not in stay:
                shutil.rmtree(self.folder(step))
        for place in (self.path, self.checkpoints):
            for left in place.iterdir() if place.is_dir() else ():
                if is_temporary(left.name):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()

    def cut_metrics(self, step: int) -> None:
        """Drops lines of metrics.jsonl after `step`, which a resumed run writes again."""
        file = self.path / METRICS
        if file.exists():
            write_text(file, "".join(json.dumps(m) + "\n" for m in self.metrics() if m["step"] <= step))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that was cut short is left out."""
        file = self.path / METRICS
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        out = []
        for line in lines:
            with contextlib.suppress(ValueError):
                out.append(json.loads(line))
        return out

    def config(self) -> TrainConfig:
        """The run's configuration. Raises PairmillError where this is no run folder."""
        file = self.path / "config.yaml"
        if not file.is_file():
            raise PairmillError(f"{self.path} is no run folder: it has no config.yaml. Make one with `pairmill train`.")
        from schemas.config import build_config

        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        return build_config(TrainConfig, values["config"], str(file))

    def chosen(self) -> Path:
        """The best checkpoint's folder, else the last one's. Raises PairmillError where there is none."""
        step = self.pointer("best")
        step = step if step is not None else self.pointer("last")
        if step is None:
            raise PairmillError(f"{self.path} has no checkpoint yet. Let `pairmill train` write one first.")
        return self.folder(step)


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as stream:
        stream.write(text.encode())
