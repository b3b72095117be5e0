"""From `--detector` to a detector."""

from __future__ import annotations

from extractors.regions.config import RegionsConfig
from extractors.regions.protocol import Detector
from schemas.errors import PairmillError


def load_detector(config: RegionsConfig) -> Detector:
    """The detector that the configuration names, on the CPU.

    Raises PairmillError: an unknown backend, what the backend itself finds wrong with name and weights, or fewer
    classes than are to be stored.
    """
    detector = _load(config)
    if config.top_classes > len(detector.classes):
        raise PairmillError(
            f"`--cls-probs {config.cls_probs}`: `{config.detector}` knows {len(detector.classes)} classes only."
        )
    return detector


def _load(config: RegionsConfig) -> Detector:
    backend, _, name = config.detector.partition(":")
    if backend == "torchvision" and name:
        from extractors.regions.torchvision import TorchvisionDetector

        return TorchvisionDetector(config)
    if backend == "rcnn" and name:
        from extractors.regions.rcnn_detector import plain_detector

        return plain_detector(config)
    if backend == "butd":
        from extractors.regions.butd import butd_detector

        return butd_detector(config)
    if backend == "vinvl" and not name:
        from extractors.regions.vinvl import vinvl_detector

        return vinvl_detector(config)
    if backend == "detectron2" and name:
        from extractors.regions.detectron2 import Detectron2Detector

        return Detectron2Detector(config)
    raise PairmillError(
        f"`--detector {config.detector}`: no such backend. Pass torchvision:tiny, or with --weights torchvision:NAME, "
        "rcnn:C4, rcnn:FPN, butd, vinvl or detectron2:CONFIG."
    )
