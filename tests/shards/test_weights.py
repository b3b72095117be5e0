"""Checkpoints from strangers: read what is there, execute nothing."""

import io
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from schemas.errors import PairmillError
from shards.weights import Placeholder, RestrictedUnpickler, read_checkpoint


class Hyper:
    """A class of the project that wrote the checkpoint."""

    def __init__(self):
        self.lr = 1


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def tensors():
    base = torch.arange(24.0).view(4, 6)
    return {"a.weight": base, "b": base.t()[1:3], "c": torch.tensor(3, dtype=torch.int64), "d": torch.ones(2).half()}


def same(found, want):
    assert list(found) == list(want)
    for name in want:
        assert found[name].dtype == want[name].dtype
        assert torch.equal(found[name], want[name])


def test_safetensors(tmp_path, tensors):
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "x.safetensors")
    checkpoint = read_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.kind == "safetensors"
    same(dict(sorted(checkpoint.tensors.items())), tensors)


@pytest.mark.parametrize("new_format", [True, False])
def test_plain_torch_files(tmp_path, tensors, new_format):
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=new_format)
    same(read_checkpoint(tmp_path / "x.pt").tensors, tensors)


@pytest.mark.parametrize("new_format", [True, False])
def test_lightning_checkpoint_with_foreign_classes(tmp_path, tensors, new_format):
    content = {
        "epoch": 3,
        "hyper_parameters": {"lr": 0.1, "name": "vilt"},
        "callbacks": {Hyper: {"best": Hyper()}},
        "state_dict": OrderedDict(tensors),
    }
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=new_format)
    checkpoint = read_checkpoint(tmp_path / "x.ckpt")
    assert checkpoint.kind == "torch"
    same(checkpoint.tensors, tensors)
    assert checkpoint.extra["epoch"] == 3
    assert checkpoint.extra["hyper_parameters"] == {"lr": 0.1, "name": "vilt"}


@pytest.mark.parametrize("as_zip", [True, False])
def test_nothing_in_the_file_is_executed(tmp_path, tensors, as_zip):
    content = {"state_dict": {"w": np.arange(3.0)}, "bomb": Bomb(tmp_path / "executed")}
    if as_zip:
        content["state_dict"] = tensors
        torch.save(content, tmp_path / "x.ckpt")
    else:
        (tmp_path / "x.ckpt").write_bytes(pickle.dumps(content))
    checkpoint = read_checkpoint(tmp_path / "x.ckpt")
    assert len(checkpoint.tensors) == len(content["state_dict"])
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))  # the same bytes do act on an ordinary unpickler
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name", ["os system", "builtins eval", "torch load", "numpy.lib.npyio load", "torch._C _nn.gelu"]
)
def test_unknown_globals_are_inert(name):
    module, _, attribute = name.partition(" ")
    found = RestrictedUnpickler(io.BytesIO()).find_class(module, attribute)
    assert issubclass(found, Placeholder)
    assert isinstance(found("anything"), Placeholder)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2).half())
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Inner(), nn.ReLU())
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * self.scale


def test_torchscript_archives_without_torchscript(tmp_path, monkeypatch):
    model = Outer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(model).save(tmp_path / "x.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("torch.jit.load was called"))
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert checkpoint.kind == "torchscript"
    same(dict(sorted(checkpoint.tensors.items())), dict(sorted(model.state_dict().items())))


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_arrays(tmp_path, protocol):
    content = {
        "model": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.float64(2)},
        "matching_heuristics": True,
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    checkpoint = read_checkpoint(tmp_path / "x.pkl")
    assert checkpoint.kind == "pickle"
    same(checkpoint.tensors, {"w": torch.arange(6.0).view(2, 3)})
    assert checkpoint.extra == {"matching_heuristics": True}


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "module"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_wrappers_and_prefixes(tmp_path, tensors, wrapper, prefix):
    torch.save({wrapper: {prefix + k: v for k, v in tensors.items()}, "epoch": 1}, tmp_path / "x.pt")
    same(read_checkpoint(tmp_path / "x.pt").tensors, tensors)


def test_a_prefix_that_only_some_names_have_stays(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.pt")
    assert set(read_checkpoint(tmp_path / "x.pt").tensors) == {"module.a", "b"}


def test_folders(tmp_path, tensors):
    with pytest.raises(PairmillError, match="no checkpoint in this folder"):
        read_checkpoint(tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    same(read_checkpoint(tmp_path).tensors, tensors)
    save_file({"only": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(read_checkpoint(tmp_path).tensors) == {"only"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.pt", b"not a checkpoint"),
        ("x.pt", b""),
        ("x.pt", pickle.dumps([1, 2])),
        ("x.pt", pickle.dumps({"state_dict": {"a": 1}})),
        ("x.safetensors", b"\xff" * 40),
        ("x.pt", b"PK\x05\x06" + bytes(18)),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PairmillError, match=name):
        read_checkpoint(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PairmillError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "nowhere.pt")


def rewrite(source, target, change):
    """Copy a zip file, each entry's bytes and compression through `change`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            data, compression = change(entry.filename, old.read(entry))
            new.writestr(entry.filename, data, compress_type=compression)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, d: (d[:-8] if "/data/" in n else d, zipfile.ZIP_STORED), "are announced"),
        (lambda n, d: (d, zipfile.ZIP_DEFLATED if "/data/" in n else zipfile.ZIP_STORED), "compressed"),
    ],
)
def test_storages_that_lie(tmp_path, change, message):
    torch.save({"other": Hyper(), "state_dict": {"w": torch.randn(64)}}, tmp_path / "good.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "bad.pt", change)
    assert len(read_checkpoint(tmp_path / "good.pt").tensors) == 1
    with pytest.raises(PairmillError, match=message):
        read_checkpoint(tmp_path / "bad.pt")


def test_an_old_file_that_is_cut_short(tmp_path):
    torch.save({"other": Hyper(), "w": torch.randn(64)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.pt").read_bytes()
    for length in (len(whole) - 1, len(whole) - 300):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        with pytest.raises(PairmillError, match=r"x\.pt"):
            read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (5,), (1,)), (2, (3,), (1,)), (-1, (2,), (1,)), (0, (2, 2), (3, 1)), (0, (2,), (-1,)), (0, (-2,), (1,))],
)
def test_tensors_stay_inside_their_storage(offset, size, stride):
    rebuild = RestrictedUnpickler(io.BytesIO()).find_class("torch._utils", "_rebuild_tensor_v2")
    storage = torch.arange(4.0)
    assert rebuild(storage, 1, (3,), (1,), False, {}).tolist() == [1, 2, 3]
    assert rebuild(storage, 0, (0, 9), (1, 1)).shape == (0, 9)
    with pytest.raises(pickle.UnpicklingError, match="does not fit"):
        rebuild(storage, offset, size, stride)
