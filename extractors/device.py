"""The device a batch is computed on: copies to and from it, precision, batch size."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from extractors.protocol import Extractor, Loader
from schemas.errors import PairmillError

Batch = dict[str, Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MOST_ROWS = 1024  # a larger batch is no faster on any GPU we know
_SHARE = 0.6  # of the free memory; the rest is for the batches on their way in and out
_PROBES = (4, 16)


def resolve_device(name: str, remote: bool) -> str:
    """'cpu', 'cuda' or 'cuda:N' for `--device`. `remote`: the workers are on other machines.

    Raises PairmillError where this machine has no such device.
    """
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if visible else "cpu"
    index = int(name.partition(":")[2] or 0)
    if name != "cpu" and not remote and index >= visible:
        raise PairmillError(f"`--device {name}`: this machine shows {visible} CUDA devices. Pass --device cpu or auto.")
    return name


def resolve_precision(name: str, device: str) -> str:
    """'fp32', 'bf16' or 'fp16' for `--precision` on that device.

    auto on CUDA is fp16: against fp32 its error is an eighth of bfloat16's.
    """
    if name != "auto":
        return name
    return "fp32" if device == "cpu" else "fp16"


def worker_device(device: str, own_cluster: bool) -> str:
    """The device of this process. On our own cluster worker N, as it is named, takes GPU N.

    Workers of another scheduler see only their own GPU (CUDA_VISIBLE_DEVICES), which is number 0.
    """
    if device != "cuda":
        return device
    return f"cuda:{_worker_number() % torch.cuda.device_count()}" if own_cluster else "cuda:0"


def _worker_number() -> int:
    from distributed import get_worker

    try:
        return int(get_worker().name)
    except ValueError:  # not in a worker: in-process
        return 0


class Device:
    """One device with its copy streams. All methods but `pin` belong to the thread that computes."""

    def __init__(self, name: str, precision: str) -> None:
        self.device = torch.device("cuda:0" if name == "cuda" else name)
        self.precision = precision
        self.cuda = self.device.type == "cuda"
        self.cores_free = threading.Event()
        self.cores_free.set()
        if self.cuda:
            torch.cuda.set_device(self.device)
            self._in, self._out = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Reduced precision where the model's operations take it; nothing in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """While a batch is computed on the CPU, `cores_free` is unset.

        A model's threads wait for each other at every operation: a decoder on one core holds up all of them, and costs
        its time once for each core. Decoding between two batches, on all cores, costs it once.
        """
        if self.cuda:
            yield
            return
        self.cores_free.clear()
        try:
            yield
        finally:
            self.cores_free.set()

    def pin(self, batch: Batch) -> Batch:
        """The batch in page-locked memory, from which a copy does not block. For any thread."""
        if not self.cuda:
            return batch
        with torch.cuda.device(self.device):  # this thread's own idea of the current device is GPU 0
            return {k: v.pin_memory() for k, v in batch.items()}

    def upload(self, batch: Batch) -> Batch:
        """The batch on the device. The copy runs beside the batch that is being computed."""
        if not self.cuda:
            return batch
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._in):
            there = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        compute.wait_stream(self._in)
        for tensor in there.values():
            tensor.record_stream(compute)  # its memory belongs to the copy stream's pool
        return there

    def download(self, outputs: Mapping[str, Tensor]) -> Callable[[], dict[str, np.ndarray]]:
        """Starts the copy back beside the next batch; the function waits for it and gives arrays.

        bfloat16, which numpy does not know, comes back as float32.
        """
        outputs = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in outputs.items()}
        if not self.cuda:
            arrays = {k: v.numpy() for k, v in outputs.items()}
            return lambda: arrays
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        there: dict[str, Tensor] = {}
        with torch.cuda.stream(self._out):
            for name, tensor in outputs.items():
                there[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                there[name].copy_(tensor, non_blocking=True)
                tensor.record_stream(self._out)  # not reused before it is copied
            done = torch.cuda.Event()
            done.record(self._out)

        def wait() -> dict[str, np.ndarray]:
            done.synchronize()
            return {k: v.numpy() for k, v in there.items()}

        return wait

    def forget(self) -> None:
        """After an out-of-memory: gives cached memory back before the next try."""
        if self.cuda:
            torch.cuda.empty_cache()


def pick_batch_size(loader: Loader, device: str, precision: str, in_process: bool) -> int:
    """Rows a batch for `--batch-size auto`: on CPU the extractor's own number, on CUDA what the memory takes.

    Without `in_process` the measuring is left to a process that ends, and its GPU memory with it.
    """
    if not device.startswith("cuda"):
        return loader.cpu_batch
    if in_process:
        return _measure(loader, device, precision)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, loader, device, precision).result()


def _measure(loader: Loader, device: str, precision: str) -> int:
    on = Device(device, precision)
    extractor = cast(Extractor, loader.load(on.device))
    few, many = (_peak_bytes(extractor, on, rows) for rows in _PROBES)
    per_row = max(1, (many - few) // (_PROBES[1] - _PROBES[0]))
    on.forget()
    return fitting_batch(torch.cuda.mem_get_info(on.device)[0], few, per_row)


def _peak_bytes(extractor: Extractor, on: Device, rows: int) -> int:
    torch.cuda.reset_peak_memory_stats(on.device)
    before = torch.cuda.memory_allocated(on.device)
    with torch.inference_mode(), on.autocast():
        extractor(on.upload(on.pin(extractor.collate([extractor.example()] * rows))))
    torch.cuda.synchronize(on.device)
    return torch.cuda.max_memory_allocated(on.device) - before


def fitting_batch(free: int, fixed: int, per_row: int) -> int:
    """The largest power of two up to 1024 whose rows fit into a share of `free` bytes."""
    rows = max(1, int((free * _SHARE - fixed) // per_row))
    return min(MOST_ROWS, 1 << (rows.bit_length() - 1))
