"""The loop: batches in, optimizer steps, checkpoints and metrics out. On `accelerate`, so on one process or many."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from schemas.errors import PairmillError
from schemas.events import Emit, Notice, Progress, StageStarted
from shards.system import keep_freed_memory
from training.batch import Batch
from training.checkpoint import METRICS, Run
from training.config import TrainConfig
from training.data import Loader
from training.layers import Blocks
from training.models.base import VisionLanguageModel
from training.objectives import Objective
from training.optim import (
    Average,
    ParameterGroup,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from training.outputs import Outputs
from training.weights import read_checkpoint

Write = Callable[[dict[str, float]], None]

DATA_LIMIT = 0.1  # a step that waits longer than this share for its batch is limited by data


@dataclass(frozen=True)
class Validation:
    """What `best` is chosen by: a function of the model in eval mode, and whether higher is better."""

    name: str
    run: Callable[[VisionLanguageModel], float]
    higher: bool = False


@dataclass(frozen=True)
class TrainResult:
    """Where the run is, how far it came, its last loss, and whether steps are left to do."""

    run: Path
    step: int
    steps: int
    loss: float | None
    best: float | None
    main: bool = True  # whether this process is the one that tells

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


class Passes(nn.Module):
    """All passes of a step and their losses in one forward: DistributedDataParallel sees what the loss hangs on."""

    def __init__(self, model: VisionLanguageModel, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.model = model
        self.objectives = nn.ModuleList(objectives)

    def forward(
        self, objectives: Sequence[tuple[float, Objective]], batches: Sequence[Batch], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = [self.model(b, route=o.route) for b, (_, o) in zip(batches, objectives, strict=True)]
        return sum_losses(objectives, outputs, batches, generator)


def at_step(objectives: Sequence[tuple[float, Objective]], step: int, steps: int) -> list[tuple[float, Objective]]:
    """Those that take part in `step` (from 0): each from round(begin * steps) to before round(end * steps)."""
    return [(w, o) for w, o in objectives if round(o.span[0] * steps) <= step < round(o.span[1] * steps)]


def sum_losses(
    objectives: Sequence[tuple[float, Objective]],
    outputs: Sequence[Outputs],
    prepared: Sequence[Batch],
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the objectives' losses over their own passes, and all their metrics."""
    losses: list[Tensor] = []
    metrics: dict[str, Tensor] = {}
    for (weight, objective), output, batch in zip(objectives, outputs, prepared, strict=True):
        loss, own = objective.loss(output, batch, generator)
        losses.append(weight * loss)
        metrics |= own
    return torch.stack(losses).sum(), metrics


@dataclass
class Trainer:
    """One run: what is trained, on what, and how far it has come."""

    config: TrainConfig
    model: VisionLanguageModel
    objectives: Sequence[tuple[float, Objective]]
    groups: Sequence[ParameterGroup]
    loader: Callable[[int], Loader]
    run: Run
    fingerprint: dict[str, Any]
    validation: Validation | None = None
    emit: Emit = field(default=lambda event: None)

    def __post_init__(self) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState

        # accelerate keeps the first run's precision for the whole process; the next run may want another.
        AcceleratorState._reset_state()
        if self.config.precision == "fp16" and (self.config.device == "cpu" or not torch.cuda.is_available()):
            raise PairmillError("--precision fp16 needs a GPU. Use bf16 or fp32 here.")
        precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[self.config.precision]
        # A head whose objective rests gets no gradient.
        rests = any(objective.span != (0.0, 1.0) for _, objective in self.objectives)
        parallel = DistributedDataParallelKwargs(find_unused_parameters=rests)
        self.accelerator = Accelerator(
            mixed_precision=precision, cpu=self.config.device == "cpu", kwargs_handlers=[parallel]
        )
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        self.step = 0
        self.best: float | None = None
        self.best_step: int | None = None
        self.loss: float | None = None
        self._stop = False
        self._begun = 0
        self._optimizer = make_optimizer(self.model, self.groups, self.config)
        self._names = {id(p): n for n, p in self.model.named_parameters()}
        self._parameters = dict(self.model.named_parameters())
        self._average = Average(self.model, self.config.ema) if self.config.ema else None
        for module in self.model.modules():
            if isinstance(module, Blocks):
                module.checkpointing = self.config.checkpointing
        self._passes = Passes(self.model, [o for _, o in self.objectives])

    @property
    def main(self) -> bool:
        """Whether this process writes files."""
        return bool(self.accelerator.is_main_process)

    def train(self) -> TrainResult:
        """Trains to `steps` (or `stop`) from the last checkpoint that stands, and leaves a checkpoint.

        Raises PairmillError when the loss is no longer a number.
        """
        self._resume()
        passes, optimizer = self.accelerator.prepare(self._passes, self._optimizer)
        if self.config.compile:
            passes = torch.compile(passes)
        if self._average:
            self._average.to(self.accelerator.device)
        end = min(self.config.steps, self.config.stop or self.config.steps)
        self._begun = self.step
        self.emit(StageStarted(f"train {self.run.path.name}", 0, 0, max(0, end - self.step), "steps"))
        with _on_sigterm(self._ask_to_stop), self._metrics() as write:
            self._steps(passes, optimizer, end, write)
        return TrainResult(self.run.path, self.step, self.config.steps, self.loss, self.best, self.main)

    def _steps(self, passes: nn.Module, optimizer: Any, end: int, write: Write) -> None:
        saved = time.monotonic()
        every = self.config.eval_every or max(1, self.config.steps // 10)
        with contextlib.closing(self.loader(self.step * self.config.accumulate).stream()) as stream:
            while self.step < end and not self._agree(self._stop):
                line = self._one_step(passes, optimizer, stream)
                last = self.step == end
                if self.step % self.config.log_every == 0 or last:
                    write(line)
                    self._report(line)
                evaluate = self.validation is not None and (self.step % every == 0 or last)
                if evaluate:
                    self._validate(write)
                due = time.monotonic() - saved >= self.config.save_minutes * 60
                if evaluate or last or self._agree(due or self._stop):
                    self._save()
                    saved = time.monotonic()

    def _one_step(self, passes: nn.Module, optimizer: Any, stream: Iterator[Any]) -> dict[str, float]:
        begin = time.perf_counter()
        config = self.config
        rate = learning_rate(config, self.step)
        set_learning_rate(self._optimizer, rate)
        # Dropout draws from the global generator: seeded by (seed, step, rank), a resumed step draws the same.
        torch.manual_seed(_mix(config.seed, self.step, self.accelerator.process_index))
        passes.train()
        waited = 0.0
        metrics: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.accelerator.device)
        for micro in range(config.accumulate):
            loaded = next(stream)
            waited += loaded.waited_s
            last = micro + 1 == config.accumulate
            with contextlib.nullcontext() if last else self.accelerator.no_sync(passes):
                loss, metrics = self._backward(passes, loaded.batch, loaded.index)
            total += loss / config.accumulate
        if config.clip_norm:
            self.accelerator.clip_grad_norm_(self._parameters.values(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.model.after_step()
        if self._average:
            self._average.update(self.model)
        self.step += 1
        self.loss = float(self.accelerator.reduce(total.detach(), "mean"))
        if not math.isfinite(self.loss):
            raise PairmillError(
                f"the loss became {self.loss} at step {self.step} of {self.run.path}. The last checkpoint stands. "
                "Lower --lr, set --clip-norm, or use --precision bf16 or fp32, in a new run."
            )
        seconds = time.perf_counter() - begin
        line = {"step": self.step, "epoch": loaded.epoch, "loss": self.loss, "lr": rate}
        line |= {k: float(v) for k, v in metrics.items()}
        return line | {"step_s": seconds, "data_s": waited}

    def _backward(self, passes: nn.Module, batch: Batch, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(_mix(self.config.seed, index, 1 << 20))
        objectives = at_step(self.objectives, self.step, self.config.steps)
        with torch.no_grad():
            batch = self.model.prepare(batch, generator)
            prepared = [o.prepare(batch, generator) for _, o in objectives]
        prepared = [b.to(self.accelerator.device, non_blocking=True) for b in prepared]
        with self.accelerator.autocast():
            total, metrics = passes(objectives, prepared, generator)
        self.accelerator.backward(total / self.config.accumulate)
        return total.detach(), metrics

    def _validate(self, write: Write) -> None:
        assert self.validation is not None
        with self._evaluated(), torch.no_grad():
            self.model.eval()
            value = self.validation.run(self.model)
        write({"step": self.step, self.validation.name: value})
        if self.best is None or (value > self.best if self.validation.higher else value < self.best):
            self.best, self.best_step = value, self.step

    def _evaluated(self) -> contextlib.AbstractContextManager[None]:
        """The weights that are evaluated and saved: the running average where there is one."""
        return contextlib.nullcontext() if self._average is None else self._average.swapped(self.model)

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if not self.main:
            return
        tensors = {f"optimizer/{n}": t for n, t in optimizer_tensors(self._optimizer, self._names).items()}
        tensors |= {f"objectives/{n}": t.cpu().contiguous() for n, t in self._passes.objectives.state_dict().items()}
        if self._average:
            # A copy: while the checkpoint is written the parameters hold the average.
            tensors |= {f"weights/{n}": p.detach().cpu().clone() for n, p in self._parameters.items()}
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "global_batch": self.step * self.config.accumulate,
            "epoch": self.step * self.config.accumulate * self.config.batch_size // self.loader(0).order.length,
            "random": "every draw is seeded by (seed, step or row, rank): there is no generator state to keep",
            "scaler": scaler.state_dict() if scaler else None,
            "loss": self.loss,
            "best": self.best,
            "best_step": self.best_step,
            "fingerprint": self.fingerprint,
            "versions": {"pairmill": version("pairmill"), "torch": torch.__version__},
        }
        with self._evaluated():
            self.run.save(self.step, tensors, state, self.model.save)
        self._tidy()

    def _tidy(self) -> None:
        """What follows a checkpoint; called again on resume, since a kill may come in between."""
        if self.best_step is not None and self.best_step != self.run.pointer("best"):
            self.run.point("best", self.best_step)
        self.run.prune(self.config.keep)

    def _resume(self) -> None:
        step = self.run.pointer("last")
        if self.main:
            self.run.cut_metrics(step or 0)
        if step is not None:
            folder = self.run.folder(step)
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            saved = load_file(folder / "optimizer.safetensors")
            self._restore(folder, _under(saved, "weights"))
            self._passes.objectives.load_state_dict(_under(saved, "objectives"))
            load_optimizer_tensors(self._optimizer, self._parameters, _under(saved, "optimizer"))
            if state["scaler"] and self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step, self.loss = state["step"], state["loss"]
            self.best, self.best_step = state["best"], state["best_step"]
            if self.main:
                self._tidy()
            self.emit(Notice(f"{self.run.path}: going on from step {self.step:,}."))
        self.accelerator.wait_for_everyone()

    def _restore(self, folder: Path, raw: dict[str, Tensor]) -> None:
        self.model.load_published(read_checkpoint(folder).tensors, str(folder)).require_whole(str(folder))
        if self._average:  # the checkpoint's model is the average; the weights it averages lie beside the optimizer
            self._average = Average(self.model, self._average.decay)
            self.model.load_state_dict(raw, strict=False)

    def _report(self, line: dict[str, float]) -> None:
        share = line["data_s"] / max(line["step_s"], 1e-9)
        limit = ", limited by data" if share > DATA_LIMIT else ""
        note = f"loss {line['loss']:.4f}, {line['step_s']:.2f} s a step, waiting for data {share:.0%}{limit}"
        self.emit(Progress(f"train {self.run.path.name}", self.step - self._begun, 0, note))

    def _agree(self, flag: bool) -> bool:
        """Whether any process says so: all must stop and save at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        vote = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(vote, "sum") > 0)

    def _ask_to_stop(self, *_: Any) -> None:
        self._stop = True

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[Write]:
        """A function that appends a line to metrics.jsonl (and TensorBoard), on the main process only."""
        if not self.main:
            yield lambda line: None
            return
        board = _tensorboard(self.run.path) if self.config.tensorboard else None
        with (self.run.path / METRICS).open("a", encoding="utf-8") as stream:

            def write(line: dict[str, float]) -> None:
                stream.write(json.dumps(line) + "\n")
                stream.flush()
                if board is not None:
                    for name, value in line.items():
                        board.add_scalar(name, value, int(line["step"]))

            yield write
        if board is not None:
            board.close()


def _tensorboard(path: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise PairmillError("--tensorboard needs the package: pip install tensorboard.") from None
    return SummaryWriter(str(path / "tensorboard"))


def _under(tensors: dict[str, Tensor], folder: str) -> dict[str, Tensor]:
    return {n.split("/", 1)[1]: t for n, t in tensors.items() if n.startswith(f"{folder}/")}


def _mix(seed: int, step: int, salt: int) -> int:
    """One 63-bit seed of three numbers."""
    return int(np.random.SeedSequence([seed, step, salt]).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def _on_sigterm(handler: Callable[..., None]) -> Iterator[None]:
    """Calls `handler` on SIGTERM during the block; where signals are not ours (another thread), nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
