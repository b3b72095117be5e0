"""Names of published weights and ours: one table of rules per model, read in both directions.

A rule is a pair of dotted names. `*` stands for one part (a layer's number), `**` at the end for what remains:

    ("transformer.resblocks.*.ln_1.**", "text.blocks.*.norm1.**")

Several published names may be one of ours: stacked, in the order given (BERT's query, key, value).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from schemas.errors import PairmillError


@dataclass(frozen=True)
class Rule:
    """`published` (one name, or several that are stacked along dimension 0) is `ours`."""

    published: tuple[str, ...]
    ours: str


def rules(*pairs: tuple[str | tuple[str, ...], str]) -> tuple[Rule, ...]:
    """Rules from (published, ours) pairs."""
    return tuple(Rule((p,) if isinstance(p, str) else p, ours) for p, ours in pairs)


def _match(template: str, name: str) -> tuple[str, ...] | None:
    """What the wildcards of `template` stand for in `name`, or None where it does not fit."""
    pattern = re.escape(template).replace(r"\*\*", "(.+)").replace(r"\*", "([^.]+)")
    found = re.fullmatch(pattern, name)
    return found.groups() if found else None


def _fill(template: str, parts: Iterable[str]) -> str:
    """`template` with its wildcards replaced, in order."""
    left = iter(parts)
    return re.sub(r"\*\*|\*", lambda _: next(left), template)


@dataclass(frozen=True)
class KeyMap:
    """The rules of one published format, the first match wins; `ignored` names hold no weights."""

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()

    def to_ours(self, published: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """(tensors under our names, published names that no rule knows)."""
        ours: dict[str, Tensor] = {}
        left = []
        for name in published:
            if any(_match(pattern, name) is not None for pattern in self.ignored):
                continue
            found = self._ours_of(name, published)
            if found is None:
                left.append(name)
            else:
                ours.setdefault(*found)
        return ours, left

    def _ours_of(self, name: str, published: Mapping[str, Tensor]) -> tuple[str, Tensor] | None:
        for rule in self.rules:
            for template in rule.published:
                parts = _match(template, name)
                if parts is None:
                    continue
                names = [_fill(t, parts) for t in rule.published]
                if len(names) == 1:
                    return _fill(rule.ours, parts), published[name]
                if all(n in published for n in names):
                    return _fill(rule.ours, parts), torch.cat([published[n] for n in names])
        return None

    def to_published(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under their published names; stacked ones are cut into equal parts.

        Raises KeyError: a name that no rule knows.
        """
        published: dict[str, Tensor] = {}
        for name, tensor in ours.items():
            for rule in self.rules:
                parts = _match(rule.ours, name)
                if parts is not None:
                    names = [_fill(t, parts) for t in rule.published]
                    cut = [tensor] if len(names) == 1 else tensor.chunk(len(names))
                    published.update(zip(names, cut, strict=True))
                    break
            else:
                raise KeyError(f"no rule of the key map knows `{name}`")
        return published


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint: our names `loaded`, our names still `new`, its names `left` over."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """Torch's word for `new`."""
        return self.new

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Torch's word for `left`."""
        return self.left

    def require_whole(self, where: str) -> LoadReport:
        """Itself.

        Raises PairmillError: something is new or left over.
        """
        if self.new or self.left:
            raise PairmillError(
                f"{where}: these weights are not of this model: {_few(self.new)} not in the file, "
                f"{_few(self.left)} in the file but not in the model. Check the configuration."
            )
        return self

    def __str__(self) -> str:
        return f"{len(self.loaded)} loaded, {_few(self.new)} new, {_few(self.left)} left"


def _few(names: tuple[str, ...], limit: int = 4) -> str:
    """'0', or '7 (a, b, c, d, ...)'."""
    if not names:
        return "0"
    return f"{len(names)} ({', '.join(names[:limit])}{', ...' if len(names) > limit else ''})"


def load_mapped(
    model: nn.Module, published: Mapping[str, Tensor], key_map: KeyMap, where: str = "the checkpoint"
) -> LoadReport:
    """Copy published weights into the model, in the model's own precision.

    Raises PairmillError: a tensor whose shape is not the model's, with both shapes.
    """
    ours, left = key_map.to_ours(published)
    own = model.state_dict()
    left += key_map.to_published({n: t for n, t in ours.items() if n not in own})
    known = {name: tensor for name, tensor in ours.items() if name in own}
    for name, tensor in known.items():
        if tensor.numel() == own[name].numel() == 1:  # a scalar is stored as () or (1,)
            known[name] = tensor.reshape(own[name].shape)
        elif tensor.shape != own[name].shape:
            raise PairmillError(
                f"{where}: `{name}` has shape {tuple(tensor.shape)}, the model's is "
                f"{tuple(own[name].shape)}. Build the model with the configuration of these weights."
            )
    model.load_state_dict(known, strict=False)
    return LoadReport(tuple(known), tuple(name for name in own if name not in known), tuple(left))
