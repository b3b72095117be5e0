"""Heads equal the modules they were saved from; what is no head of the kind, or is broken, is told."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import save_file

from curation.scores.heads import LAYOUTS, Layout, read_head
from schemas.errors import PairmillError
from tests.curation.scores.head_files import FORMS, InLayers, save_head, v2


def unit(rows: int, dim: int = 16, seed: int = 1) -> torch.Tensor:
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_scores_are_those_of_the_saved_module(tmp_path: Path, kind: str, form: str):
    module = save_head(tmp_path / "head.pth", kind, form)
    head = read_head(tmp_path / "head.pth", kind)
    assert (head.layout.name, head.dim) == (form, 16)
    x = unit(5000)  # more than one part
    with torch.no_grad():
        want = module(x)[:, 0]
    torch.testing.assert_close(head(x), want, rtol=1e-5, atol=1e-6)
    assert want.std() > 1e-3
    torch.testing.assert_close(head(x.half() * 3), want, rtol=1e-2, atol=2e-3)  # brought to length 1 again
    assert head(x[:0]).shape == (0,)


def test_published_widths(tmp_path: Path):
    """V2 as LAION has it: 768-1024-128-64-16-1, in a Lightning checkpoint and as safetensors."""
    torch.manual_seed(0)
    module = v2(768, (1024, 128, 64, 16)).eval()
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, tmp_path / "head.ckpt")
    save_file(module.state_dict(), tmp_path / "head.safetensors")
    x = unit(3, 768)
    with torch.no_grad():
        want = module(x)[:, 0]
    for name in ("head.ckpt", "head.safetensors"):
        torch.testing.assert_close(read_head(tmp_path / name, "aesthetic")(x), want, rtol=1e-5, atol=1e-6)


@given(arrays(np.float16, (4, 16), elements=st.floats(-1, 1, width=16)), st.integers(0, 3))
def test_a_row_does_not_depend_on_its_neighbours(tmp_path_factory, x, at):
    path = tmp_path_factory.getbasetemp() / "neighbours.pth"
    if not path.exists():
        save_head(path, "safety", "autokeras 4 layers")
    head = read_head(path, "safety")
    together, alone = head(torch.from_numpy(x)), head(torch.from_numpy(x[at : at + 1]))
    assert torch.allclose(together[at], alone[0], atol=1e-6)
    assert bool(((together >= 0) & (together <= 1)).all())


def test_the_other_kind_is_named(tmp_path: Path):
    save_head(tmp_path / "head.pth", "safety", "H/14")
    with pytest.raises(PairmillError, match="a head of `pairmill score safety`"):
        read_head(tmp_path / "head.pth", "aesthetic")
    save_head(tmp_path / "head.pth", "aesthetic", "V1 linear")
    with pytest.raises(PairmillError, match="a head of `pairmill score aesthetic`"):
        read_head(tmp_path / "head.pth", "safety")


def test_other_weights_list_what_they_hold(tmp_path: Path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(PairmillError, match=r"no aesthetic head. It holds conv1.weight. Known are V1 linear: bias"):
        read_head(tmp_path / "x.pth", "aesthetic")


def test_the_keras_original_names_its_conversion(tmp_path: Path):
    (tmp_path / "clip_autokeras_binary_nsfw").mkdir()
    (tmp_path / "clip_autokeras_binary_nsfw" / "saved_model.pb").write_bytes(b"")
    with pytest.raises(PairmillError, match=r"clip_ViT-L-14_openai_binary_nsfw_head.pth"):
        read_head(tmp_path / "clip_autokeras_binary_nsfw", "safety")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers.2.weight": torch.zeros(10, 11)}, r"layers.2.weight \[10, 11\]"),
        ({"layers.2.bias": torch.zeros(9)}, "do not follow a layer of width 12"),
        ({"layers.7.weight": torch.zeros(2, 6), "layers.7.bias": torch.zeros(2)}, "gives 2 numbers"),
        ({"layers.0.bias": torch.full((12,), float("nan"))}, "infinite or undefined"),
        ({"layers.0.weight": torch.zeros(12)}, "layers.0.weight"),
    ],
)
def test_a_damaged_head_is_told(tmp_path: Path, change, says: str):
    state = save_head(tmp_path / "head.pth", "aesthetic", "V2 linear layers").state_dict()
    torch.save({**state, **change}, tmp_path / "head.pth")
    with pytest.raises(PairmillError, match=says):
        read_head(tmp_path / "head.pth", "aesthetic")


def test_a_norm_of_another_width_is_told(tmp_path: Path):
    state = save_head(tmp_path / "head.pth", "safety", "autokeras 3 layers").state_dict()
    torch.save({**state, "norm.mean": torch.zeros(3)}, tmp_path / "head.pth")
    with pytest.raises(PairmillError, match=r"norm.mean has shape \[3\], expected \[16\]"):
        read_head(tmp_path / "head.pth", "safety")


def test_nothing_in_the_file_is_executed(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    state = save_head(tmp_path / "head.pth", "aesthetic", "V1 linear").state_dict()
    torch.save({"state_dict": state, "evil": Evil()}, tmp_path / "head.pth")
    assert read_head(tmp_path / "head.pth", "aesthetic").dim == 16
    assert not (tmp_path / "ran").exists()


def test_layouts_have_a_relu_flag_for_each_layer():
    every: list[Layout] = [layout for layouts in LAYOUTS.values() for layout in layouts]
    assert [len(layout.layers) for layout in every] == [len(layout.relu) for layout in every]
    assert len({frozenset(layout.names()) for layout in every}) == len(every)
    assert set(InLayers(torch.nn.Linear(2, 1)).state_dict()) == {"layers.0.weight", "layers.0.bias"}
