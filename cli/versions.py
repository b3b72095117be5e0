"""`--version`: what a bug report needs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import typer


def version_option(given: bool) -> None:
    """Callback of `--version`."""
    if given:
        print_versions()
        raise typer.Exit()


def print_versions() -> None:
    print(f"pairmill {version('pairmill')} on Python {platform.python_version()}")
    for name in (
        "torch",
        "open_clip_torch",
        "torchvision",
        "transformers",
        "polars",
        "pyarrow",
        "dask",
        "img2dataset",
    ):
        print(f"{name} {_version(name)}")
    import torch

    print(f"CUDA {torch.version.cuda or 'none'}, devices: {torch.cuda.device_count()}")
    print(f"detectron2 {_version('detectron2')}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
