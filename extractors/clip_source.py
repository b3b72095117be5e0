"""Which CLIP is meant: a name and weights, a folder that open_clip can read, or a run of our own training."""

from __future__ import annotations

import json
import logging
import socket
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import open_clip
import torch
from huggingface_hub import constants, hf_hub_download
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.pretrained import download_pretrained, get_pretrained_cfg
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn

from schemas.errors import PairmillError, suggest
from shards.files import hash_file
from shards.weights import FOLDER_FILES, checkpoint_file, read_checkpoint, read_json

CONFIG = "open_clip_config.json"
LOCAL = "local-dir:"
_TORCHSCRIPT_EXTRAS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
_ONLINE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ClipSource:
    """One CLIP, found but not built.

    spec        what open_clip calls it: a built-in name, or local-dir:PATH
    label       what people call it, without a path
    weights     the file, on this machine or a shared filesystem
    sha256      of that file
    model_cfg   open_clip's architecture, as JSON (so that this is hashable)
    preprocess  open_clip's preprocessing, as JSON
    """

    spec: str
    label: str
    weights: str
    sha256: str
    model_cfg: str
    preprocess: str

    @property
    def dim(self) -> int:
        return int(json.loads(self.model_cfg)["embed_dim"])

    def identity(self) -> dict[str, Any]:
        """What the embeddings depend on, besides precision."""
        model, preprocess = json.loads(self.model_cfg), json.loads(self.preprocess)
        return {"weights": self.sha256, "architecture": model, "preprocess": preprocess}

    def build(self, device: torch.device) -> nn.Module:
        """The model with its weights, fp32, in eval mode. Raises PairmillError where they do not fit."""
        with quiet():
            model = open_clip.create_model(self.spec, load_weights=False, pretrained_text=False)
        _load(model, self.weights, self.label)
        return model.to(device).eval()

    def tokenizer(self) -> Any:
        """open_clip's tokenizer of this model. Raises PairmillError where its files cannot be had."""
        try:
            with quiet():
                return open_clip.get_tokenizer(self.spec)
        except Exception as error:  # whatever transformers and the hub raise
            raise PairmillError(
                f"{self.label}: its tokenizer cannot be loaded ({_short(error)}). "
                "Put its files beside the weights, with open_clip_config.json, and pass --model local-dir:PATH."
            ) from None


def find_clip(model: str, pretrained: str | None) -> ClipSource:
    """What `--model` and `--pretrained` mean.

    model       a name that open_clip knows, `local-dir:PATH`, a run folder (its best, else last checkpoint) or a
                checkpoint folder
    pretrained  a tag of that name or a weights file; not for folders

    Raises PairmillError: an unknown name, tag or folder; weights that cannot be fetched; weights trained with
    another activation than the model computes.
    """
    if model.startswith(LOCAL) or Path(model).is_dir():
        if pretrained:
            raise PairmillError(
                f"`--pretrained {pretrained}`: {model} is a folder that holds its own weights. Drop it."
            )
        return _from_folder(_checkpoint_folder(Path(model.removeprefix(LOCAL)).absolute()))
    return _from_name(model, pretrained)


def cached_clip(label: str, sha256: str) -> ClipSource | None:
    """The CLIP that a sidecar names, where open_clip has its weights in its cache already; else None.

    label   ClipSource.label: NAME TAG. A run or a file is known by a name only, not by its place: None
    sha256  of the weights. Nothing is fetched.
    """
    name, _, tag = label.partition(" ")
    if tag not in open_clip.list_pretrained_tags_by_model(name):
        return None
    cfg = get_pretrained_cfg(name, tag)
    try:
        weights = _cached(cfg)
    except FileNotFoundError:
        return None
    source = _source(name, label, weights, open_clip.get_model_config(name), cfg)
    return source if source.sha256 == sha256 else None


def _checkpoint_folder(path: Path) -> Path:
    """A folder with CONFIG: this one, or a run's best, else last checkpoint."""
    if (path / CONFIG).is_file():
        return path
    for pointer in ("best", "last"):
        if (path / pointer).is_file():
            step = Path((path / pointer).read_text().strip()).name
            folder = path / "checkpoints" / step
            if (folder / CONFIG).is_file():
                return folder
            raise PairmillError(f"{folder} has no {CONFIG}: only runs of CLIP models can score.")
    raise PairmillError(
        f"{path}: neither an open_clip folder ({CONFIG} beside the weights) nor a run of `pairmill train`."
    )


def _from_folder(folder: Path) -> ClipSource:
    saved = read_json(folder / CONFIG)
    model_cfg = saved.get("model_cfg")
    if not isinstance(model_cfg, dict):
        raise PairmillError(f"{folder / CONFIG} has no `model_cfg`.")
    label = folder.name if folder.parent.name != "checkpoints" else f"{folder.parent.parent.name} step {folder.name}"
    weights = checkpoint_file(folder)
    _check_activation(weights, None, model_cfg, label)
    return _source(f"{LOCAL}{folder}", label, weights, model_cfg, saved.get("preprocess_cfg") or {})


def _from_name(name: str, pretrained: str | None) -> ClipSource:
    model_cfg = open_clip.get_model_config(name)
    if model_cfg is None:
        raise PairmillError(
            f"`--model {name}`: open_clip knows no such model and there is no such folder."
            f"{suggest(name, open_clip.list_models())}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise PairmillError(
            f"`--model {name}` says which architecture, not which weights. Pass --pretrained with a file, "
            f"or with one of its tags: {', '.join(tags) or 'it has none'}."
        )
    if Path(pretrained).is_file():
        weights = Path(pretrained).absolute()
        _check_activation(weights, None, model_cfg, name)
        return _source(name, f"{name} {weights.name}", weights, model_cfg, {})
    if pretrained in tags:
        tag = get_pretrained_cfg(name, pretrained)
        _check_activation(None, tag, model_cfg, name)
        return _source(name, f"{name} {pretrained}", _fetch(name, pretrained, tag), model_cfg, tag)
    raise PairmillError(
        f"`--pretrained {pretrained}`: neither a file nor a tag of {name}.{suggest(pretrained, tags)} "
        f"Its tags: {', '.join(tags) or 'none'}."
    )


def _source(spec: str, label: str, weights: Path, model_cfg: dict[str, Any], changes: dict[str, Any]) -> ClipSource:
    preprocess = merge_preprocess_dict(asdict(PreprocessCfg()), changes)
    preprocess["size"] = model_cfg.get("vision_cfg", {}).get("image_size", 224)
    text = [json.dumps(part, sort_keys=True) for part in (model_cfg, preprocess)]
    return ClipSource(spec, label, str(weights), hash_file(weights), *text)


def _check_activation(weights: Path | None, tag: dict[str, Any] | None, model_cfg: dict[str, Any], name: str) -> None:
    """OpenAI's weights were trained with QuickGELU: computed with GELU they give worse scores and no error."""
    computes = bool(model_cfg.get("quick_gelu", False))
    if tag is not None:
        trained = bool(tag.get("quick_gelu", False))
    elif weights is not None and _is_openai(weights):
        trained = True
    else:
        return
    if trained == computes:
        return
    other = f"{name}-quickgelu" if trained else name.removesuffix("-quickgelu")
    way = f"Pass --model {other}." if other in open_clip.list_models() else "Set `quick_gelu` in its configuration."
    have, need = ("GELU", "QuickGELU") if trained else ("QuickGELU", "GELU")
    raise PairmillError(
        f"{name}: these weights were trained with {need}, this model computes {have}; every score would be worse. {way}"
    )


def _is_openai(weights: Path) -> bool:
    """OpenAI's own TorchScript archive, or a file that says it holds those weights."""
    if "openai" in weights.stem.lower() or any(part.endswith(".openai") for part in weights.parts):
        return True
    if not zipfile.is_zipfile(weights):
        return False
    with zipfile.ZipFile(weights) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _fetch(name: str, tag: str, cfg: dict[str, Any]) -> Path:
    """The weights of a tag: from the cache, else from where open_clip knows them to be."""
    where = cfg.get("hf_hub") or cfg.get("url", "")
    host = urlsplit(constants.ENDPOINT if cfg.get("hf_hub") else where).hostname or ""
    try:
        if not _online(host):
            return _cached(cfg)
        with quiet():
            return Path(download_pretrained(cfg))
    except Exception as error:  # whatever urllib, requests and the hub raise
        url = f" or {cfg['url']}" if cfg.get("hf_hub") and cfg.get("url") else ""
        raise PairmillError(
            f"`--model {name} --pretrained {tag}`: the weights are not on this machine and {host} cannot be reached "
            f"({_short(error)}). Fetch {where}{url} elsewhere and pass the file: --pretrained FILE."
        ) from None


def _online(host: str) -> bool:
    """Whether a connection is worth trying: the hub's own retries take most of a minute."""
    if urllib.request.getproxies():
        return True
    try:
        socket.create_connection((host, 443), timeout=_ONLINE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _cached(cfg: dict[str, Any]) -> Path:
    repo, _, name = cfg.get("hf_hub", "").rpartition("/")
    for file in [name] if name else FOLDER_FILES:
        try:
            return Path(hf_hub_download(repo, file, local_files_only=True))
        except Exception:
            continue
    old = Path("~/.cache/clip").expanduser() / Path(cfg.get("url", "")).name
    if old.is_file():
        return old
    raise FileNotFoundError("no connection")


def _load(model: nn.Module, weights: str, label: str) -> None:
    """Fits a checkpoint's names and shapes to the model, as open_clip's load_checkpoint does, and loads all of it."""
    read = read_checkpoint(weights)
    state: dict[str, Tensor] = dict(read.tensors)
    if read.kind == "torchscript":
        state = {k: v.float() for k, v in state.items() if not k.endswith(_TORCHSCRIPT_EXTRAS)}
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    if getattr(model, "logit_bias", None) is not None:
        state.setdefault("logit_bias", torch.zeros(()))
    for scalar in {"logit_scale", "logit_bias"} & set(state):  # stored as [] or [1]
        state[scalar] = state[scalar].reshape(getattr(model, scalar).shape)
    state.pop("text.transformer.embeddings.position_ids", None)  # a buffer that transformers dropped
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise PairmillError(f"{weights} does not fit {label}: {_short(error, 600)}") from None


def _short(error: BaseException, most: int = 160) -> str:
    return " ".join(str(error).split())[:most]


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip and the hub tell their own story through logging; ours is in the error or the result.

    Their `logging.info` also gives the root logger a handler, through which Dask would talk from then on.
    """
    before, handlers = logging.root.manager.disable, logging.root.handlers[:]
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
        logging.root.handlers[:] = handlers
