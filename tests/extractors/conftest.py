from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.dataset import Dataset
from tests.extractors import toy
from tests.make import make_dataset

FAIL = {(0, 1): "timeout", (2, 11): "too_small"}
CORRUPT = {(0, 5), (1, 0)}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Three shards of twelve rows: two failed pairs, two corrupt stored images, pictures of five shapes."""
    return make_dataset(tmp_path / "ds", shards=3, rows=12, fail=FAIL, corrupt=CORRUPT)


@pytest.fixture(autouse=True)
def _no_toys_left() -> Iterator[None]:
    toy.LOADED.clear()
    yield
    toy.LOADED.clear()
