"""Reading checkpoints that come from strangers: nothing in the file is ever executed.

safetensors, torch files (`weights_only=True`), and for what that refuses one unpickler that knows tensors and arrays
and turns every other class into an inert placeholder: Lightning checkpoints, detectron2's .pkl, and OpenAI's
TorchScript archives, which are read as zip files. `torch.jit.load` is never called.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from schemas.errors import PairmillError

# A pickle beside the tensors of the largest published checkpoints has a few MB.
MAX_PICKLE_BYTES = 1 << 28
WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
MAX_WRAPPERS = 4
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
PREFIXES = ("module.", "_orig_mod.")
FOLDER_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, wrappers and prefixes removed, and where they come from.

    kind   'safetensors', 'torch', 'torchscript' or 'pickle'
    extra  small plain values beside the tensors (epoch, hyper-parameters), unchecked
    """

    path: Path
    kind: str
    tensors: dict[str, Tensor]
    extra: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a file, or in a folder that holds one under a usual name.

    Raises PairmillError: no such file, a format nobody knows, a damaged or empty file.
    """
    path = checkpoint_file(Path(path))
    if path.suffix == ".safetensors":
        return Checkpoint(path, "safetensors", _unprefixed(_safetensors(path)))
    kind, content = _read_pickled(path)
    tensors, extra = _unwrapped(content)
    if not tensors:
        raise PairmillError(f"{path}: no weights found in it. Expected a state dict, or one under {WRAPPERS}.")
    return Checkpoint(path, kind, _unprefixed(tensors), extra)


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file beside a checkpoint.

    Raises PairmillError: it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PairmillError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise PairmillError(f"{path}: a JSON object is expected, found {type(value).__name__}")
    return value


def checkpoint_file(path: Path) -> Path:
    """The file itself, or the one of a usual name in a folder. Raises PairmillError where there is none."""
    if path.is_dir():
        for name in FOLDER_FILES:
            if (path / name).is_file():
                return path / name
        raise PairmillError(f"{path}: no checkpoint in this folder. Looked for {', '.join(FOLDER_FILES)}.")
    if not path.is_file():
        raise PairmillError(f"{path}: no such checkpoint")
    return path


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise PairmillError(f"{path}: a damaged safetensors file: {error}. Fetch it again.") from None


def _read_pickled(path: Path) -> tuple[str, Any]:
    """(kind, content) of a torch file, a TorchScript archive or a plain pickle."""
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        return _read_legacy(path)
    except PairmillError:
        raise
    except Exception as error:  # a stranger's bytes can fail in any way; none of them is our bug
        raise PairmillError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {str(error)[:200]}). "
            "Known: safetensors, torch.save files, TorchScript archives, pickles of arrays."
        ) from None


def _read_zip(path: Path) -> tuple[str, Any]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [n for n in names if n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise PairmillError(f"{path}: a zip file without one data.pkl is no checkpoint")
        script = any(n.endswith("/constants.pkl") for n in names)
        if not script:
            try:
                return "torch", torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                pass  # it carries other classes: our unpickler leaves them inert
        content = _ZipReader(archive, pickles[0].removesuffix("data.pkl")).read()
    return ("torchscript", _module_state(content)) if script else ("torch", content)


def _read_legacy(path: Path) -> tuple[str, Any]:
    """torch files from before 1.6, and plain pickles of arrays (detectron2, maskrcnn-benchmark)."""
    with warnings.catch_warnings(), contextlib.suppress(pickle.UnpicklingError, RuntimeError, EOFError):
        warnings.simplefilter("ignore")  # about the pickle protocol
        return "torch", torch.load(path, map_location="cpu", weights_only=True)
    with path.open("rb") as stream:
        first = RestrictedUnpickler(stream, encoding="latin1").load()
        if first != LEGACY_MAGIC:
            return "pickle", first
        return "torch", _LegacyReader(stream, path.stat().st_size).read()


class Placeholder:
    """Stands for an object of a class we do not know: keeps what was stored, does nothing."""

    state: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        self = super().__new__(cls)  # pickle may build an object without calling __init__
        self.state = {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes whatever the class took."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.state.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state[key] = value

    def append(self, item: Any) -> None:
        self.state[len(self.state)] = item

    def extend(self, items: Any) -> None:
        for item in items:
            self.append(item)


def _array(*args: Any) -> np.ndarray:
    """An empty array whose content numpy's own __setstate__ checks."""
    return np.ndarray((0,), np.uint8)


def _scalar(dtype: np.dtype, data: Any = b"") -> Any:
    """One number of a plain dtype."""
    raw = data.encode("latin1") if isinstance(data, str) else data
    if dtype.hasobject or not isinstance(raw, bytes) or len(raw) != dtype.itemsize:
        raise pickle.UnpicklingError("a numpy scalar that is not a number")
    return np.frombuffer(raw, dtype)[0]


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage; refused where it would leave it."""
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    empty = 0 in size
    if offset < 0 or min((*size, *stride, 0)) < 0 or (not empty and last >= storage.numel()):
        raise pickle.UnpicklingError(f"a tensor of size {size} does not fit its storage of {storage.numel()}")
    return torch.empty(size, dtype=storage.dtype) if empty else storage.as_strided(size, stride, offset)


def _first(value: Any, *_: Any) -> Any:
    return value


_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    "torch.jit._pickle.build_intlist": list,
    "torch.jit._pickle.build_boollist": list,
    "torch.jit._pickle.build_doublelist": list,
    "torch.jit._pickle.build_tensorlist": list,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "_codecs.encode": lambda text, encoding="latin1": text.encode("latin1"),
}


class RestrictedUnpickler(pickle.Unpickler):
    """Knows tensors, arrays and containers; any other global becomes an inert Placeholder class."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _DTYPES and module in ("torch", "torch.storage"):
            return _DTYPES[name]
        known = _KNOWN.get(f"{module}.{name}")
        return known or type(name.rpartition(".")[2] or "Unknown", (Placeholder,), {"source": module})


class _ZipReader:
    """data.pkl of a torch archive, with the storages beside it."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def read(self) -> Any:
        unpickler = RestrictedUnpickler(io.BytesIO(self._bytes("data.pkl", MAX_PICKLE_BYTES)))
        unpickler.persistent_load = self._storage  # type: ignore[method-assign]
        return unpickler.load()

    def _storage(self, saved: Any) -> Tensor:
        """A storage as a flat tensor: ('storage', type, key, location, number of elements)."""
        _, dtype, key, _, count = saved
        if key not in self.storages:
            if not isinstance(dtype, torch.dtype):
                raise pickle.UnpicklingError(f"a storage of unknown type {dtype!r}")
            need = int(count) * dtype.itemsize
            data = self._bytes(f"data/{key}", need)
            if len(data) < need:
                raise pickle.UnpicklingError(f"storage {key} has {len(data)} bytes, {need} are announced")
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if need else torch.empty(0, dtype=dtype)
        return self.storages[key]

    def _bytes(self, name: str, most: int) -> bytearray:
        """At most `most` bytes of an entry, which must not be compressed (torch never does)."""
        entry = self.archive.getinfo(self.root + name)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"entry {name} is compressed, as torch never writes it")
        if name == "data.pkl" and entry.file_size > most:
            raise pickle.UnpicklingError(f"data.pkl has {entry.file_size:,} bytes, at most {most:,} are read")
        with self.archive.open(entry) as stream:
            return bytearray(stream.read(most))


class _LegacyReader:
    """A torch file from before 1.6, behind its first number: three pickles, then the storages one by one."""

    def __init__(self, stream: BinaryIO, most: int) -> None:
        self.stream, self.left = stream, most
        self.storages: dict[str, Tensor] = {}

    def read(self) -> Any:
        self._pickle(), self._pickle()  # protocol, machine
        content, keys = self._pickle(), self._pickle()
        for key in keys:
            storage = self.storages[key]
            if int.from_bytes(self.stream.read(8), "little") != storage.numel():
                raise pickle.UnpicklingError(f"storage {key} has another size than announced")
            flat = storage.view(torch.uint8).numpy() if storage.numel() else np.empty(0, np.uint8)
            if self.stream.readinto(flat) != flat.nbytes:  # type: ignore[attr-defined]
                raise pickle.UnpicklingError(f"the file ends inside storage {key}")
        return content

    def _pickle(self) -> Any:
        unpickler = RestrictedUnpickler(self.stream, encoding="latin1")
        unpickler.persistent_load = self._storage  # type: ignore[method-assign]
        return unpickler.load()

    def _storage(self, saved: Any) -> Tensor:
        """An empty storage as a flat tensor; its bytes stand behind the pickles."""
        _, dtype, key, _, count, _ = saved
        if key not in self.storages:
            self.left -= int(count) * dtype.itemsize
            if self.left < 0 or count < 0:
                raise pickle.UnpicklingError(f"storage {key} is larger than the file")
            self.storages[key] = torch.empty(count, dtype=dtype)
        return self.storages[key]


def _module_state(module: Any, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript module (a placeholder), by their dotted names."""
    found: dict[str, Tensor] = {}
    for name, value in getattr(module, "state", {}).items():
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, Placeholder):
            found |= _module_state(value, f"{prefix}{name}.")
    return found


def _unwrapped(content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the state dict, small values beside it) of what a file held."""
    for _ in range(MAX_WRAPPERS):
        if not isinstance(content, dict):
            break
        if tensors := _tensors(content):
            return tensors, _plain(content)
        inner = next((content[w] for w in WRAPPERS if isinstance(content.get(w), dict)), None)
        if inner is not None and (tensors := _tensors(inner)):
            return tensors, _plain(content)
        content = inner
    return {}, {}


def _tensors(content: dict[Any, Any]) -> dict[str, Tensor]:
    """The tensors and the arrays of numbers among the values."""
    return {
        str(name): value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        for name, value in content.items()
        if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub")
    }


def _plain(content: dict[Any, Any]) -> dict[str, Any]:
    """The numbers, strings and flat dicts of them."""
    simple = (str, int, float, bool, type(None))
    found: dict[str, Any] = {str(k): v for k, v in content.items() if isinstance(v, simple)}
    for key, value in content.items():
        if isinstance(value, dict) and value and all(isinstance(v, simple) for v in value.values()):
            found[str(key)] = dict(value)
    return found


def _unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes that DistributedDataParallel and torch.compile add to all of them."""
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
