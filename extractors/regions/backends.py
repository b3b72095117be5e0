"""From `--detector` to a detector."""

from __future__ import annotations

from extractors.regions.config import RegionsConfig
from extractors.regions.protocol import Detector
from schemas.errors import PairmillError


def load_detector(config: RegionsConfig) -> Detector:
    """The detector that the configuration names, on the CPU.

    Raises PairmillError: an unknown backend, or what the backend itself finds wrong with name and weights.
    """
    backend, _, name = config.detector.partition(":")
    if backend == "torchvision" and name:
        from extractors.regions.torchvision import TorchvisionDetector

        return TorchvisionDetector(config)
    raise PairmillError(
        f"`--detector {config.detector}`: no such backend. Pass torchvision:tiny, or torchvision:NAME with --weights."
    )
