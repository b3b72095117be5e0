"""What a training run is: `TrainConfig`, built from a preset, a YAML file and flags. Imports no torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from schemas.config import StageConfig, build_config, execution, identity
from schemas.errors import PairmillError, suggest


class ObjectiveConfig(StageConfig):
    """One loss of a run."""

    name: str = Field(description="its name in `pairmill models`")
    weight: float = identity(1.0, "factor in the sum of losses", ge=0)
    begin: float = identity(0.0, "share of the steps after which it takes part", ge=0, lt=1)
    end: float = identity(1.0, "share of the steps after which it no longer does", gt=0, le=1)
    options: dict[str, Any] = identity({}, "settings of the objective")


class TrainConfig(StageConfig):
    """Every number of a run. A preset gives the model's; flags and YAML replace some."""

    preset: str = identity("", "the preset it came from")
    base: str = identity("", "the published preset its numbers are compared with")
    family: str = identity(..., "model family")
    model: dict[str, Any] = identity({}, "the model's configuration")
    weights: str | None = identity(None, "checkpoint to start from")

    tokenizer: str = identity("clip", "clip, wordpiece:SIZE (trained on the captions), a folder, or a hub name")
    input: str = identity("images", "images, or the name of a set of patch tensors")
    transform: Literal["vilt", "square", "clip"] = identity("clip", "how an image is brought to size")
    image_size: int = identity(224, "side (vilt: shorter side), px", gt=0)
    patch: int = identity(32, "side of a patch, px", gt=0)
    max_text_len: int = identity(77, "most text tokens", gt=1)
    augmentation: str = identity("none", "none, flip, clip-crop or vilt-randaug")

    objectives: tuple[ObjectiveConfig, ...] = identity((), "losses, summed by weight, each with its own pass")

    batch_size: int = identity(256, "pairs a batch, over all processes", gt=0)
    accumulate: int = identity(1, "batches a step", gt=0)
    steps: int = identity(1000, "optimizer steps", gt=0)
    lr: float = identity(5e-4, "learning rate at its peak", gt=0)
    new_lr: float = identity(1.0, "factor on the learning rate of parameters no checkpoint gave", gt=0)
    head_lr: float = identity(1.0, "factor on the learning rate of task heads", gt=0)
    warmup: float = identity(0.0, "steps of linear warm-up; below 1, a share of all steps", ge=0)
    schedule: Literal["linear", "cosine", "constant"] = identity("cosine", "after the warm-up")
    min_lr: float = identity(0.0, "learning rate at the end of the schedule", ge=0)
    weight_decay: float = identity(0.01, "decoupled weight decay", ge=0)
    beta1: float = identity(0.9, "AdamW", ge=0, lt=1)
    beta2: float = identity(0.98, "AdamW", ge=0, lt=1)
    eps: float = identity(1e-8, "AdamW", gt=0)
    clip_norm: float | None = identity(None, "gradients are scaled down to this norm", gt=0)
    ema: float | None = identity(
        None, "decay of a running average of the weights, which is then what is saved", gt=0, lt=1
    )
    precision: Literal["fp32", "bf16", "fp16"] = identity("fp32", "fp32, bf16 or fp16")
    seed: int = identity(0, "of initialisation, order and every draw", ge=0)

    device: str = execution("auto", "auto, cpu or cuda")
    threads: int | None = execution(None, "threads that prepare batches [default: the cores]", gt=0)
    stop: int | None = execution(None, "stop after this step, to go on later", gt=0)
    log_every: int = execution(10, "steps between two lines of metrics.jsonl", gt=0)
    eval_every: int | None = execution(None, "steps between two evaluations on --val [default: a tenth of all]", gt=0)
    save_minutes: float = execution(10.0, "minutes between two checkpoints", ge=0)
    keep: int = execution(3, "checkpoints kept; best and last stay in any case", gt=0)
    compile: bool = execution(False, "compile the model with torch.compile")
    checkpointing: bool = execution(False, "compute activations again in the backward pass: less memory, more time")
    tensorboard: bool = execution(False, "also write TensorBoard event files")

    @model_validator(mode="after")
    def _always_learns(self) -> TrainConfig:
        """Raises ValueError where a part of the run has no objective."""
        reached = 0.0
        for one in sorted(self.objectives, key=lambda o: o.begin):
            if one.begin >= one.end:
                raise ValueError(f"objective {one.name} begins at {one.begin:g} of the run and ends at {one.end:g}")
            if one.begin > reached:
                break
            reached = max(reached, one.end)
        if self.objectives and reached < 1:
            raise ValueError(f"no objective takes part after {reached:g} of the run: change a `begin` or an `end`")
        return self

    @property
    def warmup_steps(self) -> int:
        """Warm-up in steps."""
        return round(self.warmup * self.steps) if self.warmup < 1 else round(self.warmup)


def preset_names() -> list[str]:
    """Presets that come with pairmill."""
    return sorted(f.name.removesuffix(".yaml") for f in files("training").joinpath("presets").iterdir())


def read_preset(name: str) -> dict[str, Any]:
    """The values of a preset by name, or of a YAML file.

    Raises PairmillError: no such preset or file, or no YAML mapping. A file may name a preset as its `base_preset`.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise PairmillError(f"{name}: no such file. Presets by name: {', '.join(preset_names())}.")
        values = _mapping(path.read_text(encoding="utf-8"), name)
        base = values.pop("base_preset", None)
        return {**(read_preset(base) if base else {}), **values}
    if name not in preset_names():
        raise PairmillError(
            f"`{name}` is no preset.{suggest(name, preset_names())} There are: {', '.join(preset_names())}; "
            "or give a YAML file."
        )
    text = files("training").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    return {"preset": name, **_mapping(text, name)}


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PairmillError(f"{where} is no YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(values, dict):
        raise PairmillError(f"{where} must be a mapping of settings, for example `lr: 1e-4`.")
    return values


def resolve(preset: str, overrides: dict[str, Any]) -> TrainConfig:
    """The run's configuration: the preset's values, then the flags that were given."""
    return build_config(TrainConfig, {**read_preset(preset), **overrides}, f"preset {preset}")


def differences(config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Field -> (published value, ours) where the run differs from its published preset (`base`, else `preset`)."""
    reference = config.base or config.preset
    if not reference or reference not in preset_names():
        return {}
    published = build_config(TrainConfig, read_preset(reference), reference).identity_fields()
    ours = config.identity_fields()
    return {k: (published[k], ours[k]) for k in ours if k not in ("preset", "base") and published[k] != ours[k]}
