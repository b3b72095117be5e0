"""Reading checkpoints that come from strangers: `shards/weights.py`, which the extractors read with too."""

from shards.weights import (
    Checkpoint,
    Placeholder,
    RestrictedUnpickler,
    read_checkpoint,
    read_json,
)

__all__ = ["Checkpoint", "Placeholder", "RestrictedUnpickler", "read_checkpoint", "read_json"]
