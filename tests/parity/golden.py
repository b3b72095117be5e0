"""Golden cases: what the originals' own code computed, and the comparison of ours with it.

    @pytest.mark.parametrize("case", golden("clip_vit"), ids=str)
    def test_embeddings(case):
        got = {"image_features": model(case.inputs["image"]), ...}
        check_outputs(case, got, left_out={"name": "why nobody compares it"})

A case is a folder with case.json (`config`, `tolerance`, `quirks`) and either tensors.safetensors (`in.*`,
`out.*`) or data.json (`in`, `out`); weights.safetensors where the original had weights. Cases lie in the
folder named by PAIRMILL_PARITY, by default tests/parity/cases.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor


def cases_folder() -> Path:
    """Where the cases lie: $PAIRMILL_PARITY, or tests/parity/cases."""
    return Path(os.environ.get("PAIRMILL_PARITY") or Path(__file__).parent / "cases")


@dataclass(frozen=True)
class Case:
    """One recorded run of an original."""

    folder: Path
    info: dict[str, Any]

    def __str__(self) -> str:
        return self.folder.name

    @property
    def config(self) -> dict[str, Any]:
        """The numbers the original was built with."""
        return self.info["config"]

    @property
    def tolerance(self) -> tuple[float, float]:
        """(atol, rtol); what the case does not give is 0: exact."""
        given = self.info.get("tolerance")
        given = given if isinstance(given, dict) else {}
        numbers = {k: v for k, v in given.items() if isinstance(v, int | float)}
        return float(numbers.get("atol", 0.0)), float(numbers.get("rtol", 0.0))

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The original's state dict, under its own names."""
        return load_file(self.folder / "weights.safetensors")

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """`in.*` without the prefix: torch tensors, or the plain values of data.json."""
        return self._part("in")

    @cached_property
    def outputs(self) -> dict[str, Any]:
        """`out.*` without the prefix: torch tensors, or the plain values of data.json."""
        return self._part("out")

    def _part(self, part: str) -> dict[str, Any]:
        data = self.folder / "data.json"
        if data.exists():
            return json.loads(data.read_text(encoding="utf-8"))[part]
        tensors = load_file(self.folder / "tensors.safetensors")
        prefix = part + "."
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def golden(family: str) -> list[Case]:
    """Every case of the family: the folders whose case.json says `case: FAMILY` (or that are named so).

    Raises FileNotFoundError when there is none: nothing skips silently.
    """
    found = []
    for path in sorted(cases_folder().glob("*/case.json")):
        info = json.loads(path.read_text(encoding="utf-8"))
        if info.get("case", path.parent.name) == family:
            found.append(Case(path.parent, info))
    if not found:
        raise FileNotFoundError(f"no golden case of `{family}` in {cases_folder()}")
    return found


def check_outputs(
    case: Case,
    got: Mapping[str, Any],
    *,
    left_out: Mapping[str, str] | None = None,
    where: Mapping[str, Tensor] | None = None,
    tolerance: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Compare `got` with every output of the case, at the case's tolerance.

    left_out   outputs nobody compares, each with the reason
    where      output -> bool mask of its leading dimensions: only those entries are compared
    tolerance  output -> (atol, rtol) where a case states another one for it in words

    Raises AssertionError: a value that differs, an output neither compared nor left out, a name that the case
    does not have.
    """
    left_out, where, tolerance = left_out or {}, where or {}, tolerance or {}
    named = {*got, *left_out}
    assert set(case.outputs) == named, (
        f"{case}: nobody compares {sorted(set(case.outputs) - named)}; "
        f"not in the case: {sorted(named - set(case.outputs))}"
    )
    both = sorted(set(got) & set(left_out))
    assert not both, f"{case}: {both} are left out and compared"
    unused = sorted({*where, *tolerance} - set(got))
    assert not unused, f"{case}: masks or tolerances of {unused}, which are not compared"
    for name, value in got.items():
        atol, rtol = tolerance.get(name, case.tolerance)
        _same(f"{case} {name}", value, case.outputs[name], where.get(name), atol, rtol)


def _same(name: str, ours: Any, theirs: Any, mask: Tensor | None, atol: float, rtol: float) -> None:
    """Tensors and arrays by number; lists and dicts item by item; everything else must be equal."""
    if isinstance(theirs, Tensor | np.ndarray):
        _same_numbers(name, ours, theirs, mask, atol, rtol)
    elif isinstance(theirs, dict):
        assert set(ours) == set(theirs), f"{name}: keys {sorted(set(ours) ^ set(theirs))} on one side only"
        for key in theirs:
            _same(f"{name}.{key}", ours[key], theirs[key], None, atol, rtol)
    elif isinstance(theirs, list):
        ours = ours.tolist() if isinstance(ours, Tensor | np.ndarray) else list(ours)
        assert len(ours) == len(theirs), f"{name}: {len(ours)} items, the original has {len(theirs)}"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            _same(f"{name}[{i}]", a, b, None, atol, rtol)
    elif isinstance(theirs, float):
        assert math.isclose(ours, theirs, abs_tol=atol, rel_tol=rtol), f"{name}: {ours}, the original has {theirs}"
    else:
        assert ours == theirs, f"{name}: {ours!r}, the original has {theirs!r}"


def _same_numbers(name: str, ours: Any, theirs: Any, mask: Tensor | None, atol: float, rtol: float) -> None:
    ours, theirs = torch.as_tensor(ours).detach().cpu(), torch.as_tensor(theirs)
    assert ours.shape == theirs.shape, f"{name}: shape {tuple(ours.shape)}, the original has {tuple(theirs.shape)}"
    if mask is not None:
        assert mask.any(), f"{name}: the mask leaves nothing to compare"
        ours, theirs = ours[mask], theirs[mask]
    error = (ours.double() - theirs.double()).abs()
    allowed = atol + rtol * theirs.double().abs()
    # Written so that a NaN on either side fails.
    good = (error <= allowed) | (ours.double() == theirs.double())
    assert bool(good.all()), f"{name}: max |difference| {error.max():.2e}, {int((~good).sum())} of {good.numel()} off"
