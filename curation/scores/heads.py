"""Heads on CLIP image embeddings, in the public formats of LAION: a score from an L2-normalised vector, no pixels.

The layout is read from the tensors' names; widths from their shapes.

aesthetic  `weight`, `bias`: one linear layer (V1, LAION-AI/aesthetic-predictor)
           `layers.{0,2,4,6,7}`: linear layers without activations (V2, christophschuhmann/improved-aesthetic-predictor,
           simple_inference.py); `layers.{0,3,6,9,11}`: the same with ReLU (its avaclipmlp_inf_wds-relu.py)
safety     `norm.mean`, `norm.variance`, `linear_{1..3 or 4}`: the autokeras detectors of ViT-B/32 and ViT-L/14 as
           LAION-AI/CLIP-based-NSFW-Detector converts them to torch (src/models.py); ReLU, sigmoid at the end
           `layers.{0,3,6,9,12,15,16}`: its detector of ViT-H/14 (h14_nsfw_model.py); ReLU, none around the last two
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from schemas.errors import PairmillError
from shards.weights import read_checkpoint

Kind = Literal["aesthetic", "safety"]
_NORM = ("norm.mean", "norm.variance")
_TINY = 1e-10  # as the torch conversion has it; autokeras bounds the root from below instead
_ROWS = 4096  # at once


@dataclass(frozen=True)
class Layout:
    """One public form of a head.

    name     for the sidecar
    layers   names of the linear layers, in order; `relu`: after which of them one follows
    norm     whether the input is standardised first
    sigmoid  whether the output is squashed
    scale    what the score means, for the sidecar
    """

    name: str
    layers: tuple[str, ...]
    relu: tuple[bool, ...]
    scale: str
    norm: bool = False
    sigmoid: bool = False

    def names(self) -> set[str]:
        """Of every tensor."""
        dotted = [f"{layer}." if layer else "" for layer in self.layers]
        return {f"{layer}{part}" for layer in dotted for part in ("weight", "bias")} | set(_NORM if self.norm else ())


def _sequential(*places: int) -> tuple[str, ...]:
    return tuple(f"layers.{place}" for place in places)


def _autokeras(layers: int) -> Layout:
    names = tuple(f"linear_{n}" for n in range(1, layers + 1))
    relu = (*[True] * (layers - 1), False)
    return Layout(f"autokeras {layers} layers", names, relu, _UNSAFE, norm=True, sigmoid=True)


_RATING = "about 1 to 10, higher is more pleasing; not divided by 10"
_UNSAFE = "0 to 1, 1 is unsafe"
LAYOUTS: dict[Kind, tuple[Layout, ...]] = {
    "aesthetic": (
        Layout("V1 linear", ("",), (False,), _RATING),
        Layout("V2 linear layers", _sequential(0, 2, 4, 6, 7), (False,) * 5, _RATING),
        Layout("V2 with ReLU", _sequential(0, 3, 6, 9, 11), (*[True] * 4, False), _RATING),
    ),
    "safety": (
        _autokeras(4),
        _autokeras(3),
        Layout(
            "H/14",
            _sequential(0, 3, 6, 9, 12, 15, 16),
            (*[True] * 5, False, False),
            "fitted to 0 for safe and 1 for unsafe; neither squashed nor cut, so that it may leave 0 to 1",
        ),
    ),
}


@dataclass(frozen=True)
class Head:
    """A head ready to compute.

    layout  its form
    dim     width of the embeddings it takes
    parts   tensors by name, fp32
    """

    layout: Layout
    dim: int
    parts: Mapping[str, Tensor] = field(repr=False)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Scores fp32 [N] of embeddings [N, dim] of any float type, which are brought to length 1 first."""
        if not len(embeddings):
            return torch.empty(0)
        with torch.inference_mode():
            return torch.cat([self._score(part.float()) for part in embeddings.split(_ROWS)])

    def _score(self, x: Tensor) -> Tensor:
        length = x.norm(dim=-1, keepdim=True)
        x = x / torch.where(length == 0, torch.ones_like(length), length)
        if self.layout.norm:
            x = (x - self.parts["norm.mean"]) / (self.parts["norm.variance"].sqrt() + _TINY)
        for layer, relu in zip(self.layout.layers, self.layout.relu, strict=True):
            dotted = f"{layer}." if layer else ""
            x = F.linear(x, self.parts[f"{dotted}weight"], self.parts[f"{dotted}bias"])
            x = x.relu() if relu else x
        return (x.sigmoid() if self.layout.sigmoid else x)[:, 0]


def read_head(path: str | Path, kind: Kind) -> Head:
    """The head of a file.

    Raises PairmillError: as `read_checkpoint` does; names of no known layout, or of the other kind's; shapes that do
    not follow one another; numbers that are not finite.
    """
    path = Path(path)
    _refuse_keras(path)
    tensors = read_checkpoint(path).tensors
    layout = _layout(path, kind, set(tensors))
    parts = {name: tensors[name].float() for name in layout.names()}
    dim = _check_shapes(path, layout, parts)
    broken = [name for name, tensor in parts.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise PairmillError(
            f"`--weights {path}`: {broken[0]} holds infinite or undefined numbers. Fetch the file again."
        )
    return Head(layout, dim, parts)


def _refuse_keras(path: Path) -> None:
    if (path / "saved_model.pb").is_file() or path.name.startswith("clip_autokeras"):
        raise PairmillError(
            f"`--weights {path}`: a model of TensorFlow. Pass LAION's own conversion of it to torch, "
            "clip_ViT-L-14_openai_binary_nsfw_head.pth in `models/` of LAION-AI/CLIP-based-NSFW-Detector."
        )


def _layout(path: Path, kind: Kind, names: set[str]) -> Layout:
    for other, layouts in LAYOUTS.items():
        for layout in layouts:
            if layout.names() == names:
                if other == kind:
                    return layout
                raise PairmillError(
                    f"`--weights {path}`: a head of `pairmill score {other}` ({layout.name}), not of `score {kind}`."
                )
    known = "; ".join(f"{layout.name}: {_some(layout.names())}" for layout in LAYOUTS[kind])
    raise PairmillError(f"`--weights {path}`: no {kind} head. It holds {_some(names)}. Known are {known}.")


def _some(names: Iterable[str], most: int = 6) -> str:
    every = sorted(names)
    return ", ".join(every[:most]) + (f", ... ({len(every)} tensors)" if len(every) > most else "")


def _check_shapes(path: Path, layout: Layout, parts: Mapping[str, Tensor]) -> int:
    """Width of the input."""
    dotted = [f"{layer}." if layer else "" for layer in layout.layers]
    first = parts[f"{dotted[0]}weight"]
    width = dim = first.shape[1] if first.ndim == 2 else 0
    for layer in dotted:
        weight, bias = parts[f"{layer}weight"], parts[f"{layer}bias"]
        if weight.ndim != 2 or weight.shape[1] != width or list(bias.shape) != [weight.shape[0]]:
            raise PairmillError(
                f"`--weights {path}`: {layer}weight {list(weight.shape)} and bias {list(bias.shape)} do not follow "
                f"a layer of width {width}."
            )
        width = weight.shape[0]
    if width != 1:
        raise PairmillError(f"`--weights {path}`: the head gives {width} numbers, one is expected.")
    for name in _NORM if layout.norm else ():
        if list(parts[name].shape) != [dim]:
            raise PairmillError(f"`--weights {path}`: {name} has shape {list(parts[name].shape)}, expected [{dim}].")
    return dim
