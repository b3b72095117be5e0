"""The one table that joins models, objectives, inputs and tasks. Imports torch only when it builds something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.config import StageConfig, build_config
from schemas.errors import PairmillError, suggest
from training.config_models import CLIP_SIZES, VILT_SIZES, CLIPConfig, ViLTConfig

if TYPE_CHECKING:
    from training.config import ObjectiveConfig
    from training.models.base import VisionLanguageModel
    from training.objectives import Objective
    from training.text import Tokenizer


@dataclass(frozen=True)
class ModelEntry:
    """A family of models.

    place       module:class
    config      its configuration
    sizes       named configurations
    inputs      what it can read of an image: 'images', 'patches', 'regions', 'grids'
    objectives  what it can be trained with
    tasks       what it can be evaluated on
    weights     published checkpoints that load
    mark        a published name that tells the family's checkpoints
    """

    place: str
    config: type[StageConfig]
    sizes: Mapping[str, Any]
    inputs: tuple[str, ...]
    objectives: tuple[str, ...]
    tasks: tuple[str, ...]
    weights: tuple[str, ...]
    mark: str


MODELS: dict[str, ModelEntry] = {
    "clip": ModelEntry(
        place="training.models.clip:CLIP",
        config=CLIPConfig,
        sizes=CLIP_SIZES,
        inputs=("images",),
        objectives=("contrastive",),
        tasks=("retrieval",),
        weights=("OpenAI .pt", "open_clip folder or checkpoint"),
        mark="text_projection",
    ),
    "vilt": ModelEntry(
        place="training.models.vilt:ViLT",
        config=ViLTConfig,
        sizes=VILT_SIZES,
        inputs=("images", "patches"),
        objectives=("masked_language", "matching", "alignment", "ranking"),
        tasks=("retrieval",),
        weights=("vilt_*.ckpt",),
        mark="transformer.patch_embed.proj.weight",
    ),
}

# Name -> (module:class, what it learns).
OBJECTIVES: dict[str, tuple[str, str]] = {
    "contrastive": ("training.objectives.contrastive:Contrastive", "which text belongs to which image of a batch"),
    "masked_language": ("training.objectives.masked_language:MaskedLanguage", "the masked words"),
    "matching": ("training.objectives.matching:Matching", "whether text and image belong together"),
    "alignment": ("training.objectives.alignment:WordPatchAlignment", "which words go to which patches"),
    "ranking": ("training.objectives.matching:Ranking", "the true text among false ones"),
}


def _entry(family: str) -> ModelEntry:
    if family not in MODELS:
        raise PairmillError(f"`{family}` is no model family.{suggest(family, MODELS)} There are: {', '.join(MODELS)}.")
    return MODELS[family]


def _load(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(module), name)


def model_config(family: str, values: Mapping[str, Any]) -> StageConfig:
    """The configuration of a model: `size` names where to start, the other values replace some of it.

    Raises PairmillError: an unknown family, size or key, or a value that does not fit.
    """
    entry, given = _entry(family), dict(values)
    size = given.pop("size", None)
    if size is not None and size not in entry.sizes:
        raise PairmillError(
            f"`{size}` is no size of {family}.{suggest(str(size), entry.sizes)} There are: {', '.join(entry.sizes)}."
        )
    start = entry.sizes[size].model_dump() if size is not None else {}
    return build_config(entry.config, {**start, **given}, f"model {family}")


def build_model(config: StageConfig) -> VisionLanguageModel:
    """A model with fresh weights, drawn from torch's global generator."""
    model: VisionLanguageModel = _load(_entry(getattr(config, "family", "")).place)(config)
    return model


def family_of(names: Iterable[str]) -> str | None:
    """The family whose published checkpoints have tensors of these names, or None."""
    known = set(names)
    return next((family for family, entry in MODELS.items() if entry.mark in known), None)


def model_from_checkpoint(path: str | Path, **options: Any) -> VisionLanguageModel:
    """The model of a run's checkpoint folder, or of a published checkpoint.

    `options` go to the family's `from_checkpoint` (CLIP: activation); a run's folder holds its own configuration.

    Raises PairmillError: a file of no family we know, or one that its family refuses.
    """
    from training.models.base import CONFIG_FILE
    from training.weights import read_checkpoint, read_json

    checkpoint = read_checkpoint(path)
    beside = checkpoint.path.parent / CONFIG_FILE
    if beside.is_file():
        values = read_json(beside)
        model = build_model(model_config(str(values.get("family")), values))
        model.load_published(checkpoint.tensors, str(path)).require_whole(str(path))
        return model
    family = family_of(checkpoint.tensors)
    if family is None:
        some = ", ".join(list(checkpoint.tensors)[:3])
        raise PairmillError(f"{path}: weights of no model we know ({some}, ...). `pairmill models` lists those we do.")
    loaded: VisionLanguageModel = _load(MODELS[family].place).from_checkpoint(checkpoint, **options)
    return loaded


def build_objectives(
    family: str, configs: Sequence[ObjectiveConfig], tokenizer: Tokenizer | None = None
) -> list[tuple[float, Objective]]:
    """(weight, objective) for each pass of a step.

    An objective without a pass of its own (alignment) reads that of the one before it: the two become one `Together`.
    Options of masked_language are its Masker's.

    Raises PairmillError: an objective that is unknown, does not go with the model, or has no pass to read; an option
    it does not have.
    """
    from training.objectives import Together

    passes: list[list[tuple[float, Objective]]] = []
    for config in configs:
        objective = _build_objective(family, config, tokenizer)
        objective.span = (config.begin, config.end)
        if objective.route:
            passes.append([(config.weight, objective)])
        elif passes:
            passes[-1].append((config.weight, objective))
        else:
            raise PairmillError(f"`{config.name}` reads the pass of another objective: name that one before it.")
    return [group[0] if len(group) == 1 else (1.0, Together(group)) for group in passes]


def _build_objective(family: str, config: ObjectiveConfig, tokenizer: Tokenizer | None) -> Objective:
    possible = _entry(family).objectives
    if config.name not in possible:
        raise PairmillError(
            f"{family} has no objective `{config.name}`.{suggest(config.name, possible)} It has {', '.join(possible)}."
        )
    objective, options = _load(OBJECTIVES[config.name][0]), dict(config.options)
    try:
        if config.name == "masked_language":
            if tokenizer is None:
                raise PairmillError("masked_language needs a tokenizer with a mask token")
            from training.masking import Masker

            return objective(Masker(tokenizer, **options))
        return objective(**options)
    except TypeError as error:
        raise PairmillError(f"objective {config.name}: {error}") from None


def parameter_count(config: StageConfig) -> int:
    """Trainable numbers of a model with this configuration, without making room for them."""
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config).parameters())


def model_rows() -> list[dict[str, str]]:
    """`pairmill models`: one row per named size."""
    return [
        {
            "model": family,
            "size": size,
            "parameters": f"{parameter_count(config):,}",
            "inputs": ", ".join(entry.inputs),
            "objectives": ", ".join(entry.objectives),
            "tasks": ", ".join(entry.tasks),
            "published weights": ", ".join(entry.weights),
        }
        for family, entry in MODELS.items()
        for size, config in entry.sizes.items()
    ]
