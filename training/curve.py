"""`loss.png`: what metrics.jsonl says, drawn."""

from __future__ import annotations

import io

import numpy as np

from shards.files import atomic_file
from training.checkpoint import Run


def draw_losses(run: Run) -> None:
    """Writes RUN/loss.png: the loss of every logged step, its running mean, and the validation's values if any."""
    from matplotlib.figure import Figure

    lines = run.metrics()
    steps = np.array([m["step"] for m in lines if "loss" in m])
    losses = np.array([m["loss"] for m in lines if "loss" in m])
    if not len(steps):
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9db7d5", linewidth=1, label="loss")
    width = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color="#1f4e79", linewidth=2, label=f"mean of {width}")
    held_out = [(m["step"], m["val_loss"]) for m in lines if "val_loss" in m]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#c0504d", marker="o", label="held out")
    axes.set(xlabel="step", ylabel="loss", title=run.path.name)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    with atomic_file(run.path / "loss.png") as stream:
        stream.write(out.getvalue())
