"""Run folders and a task set that the evaluation's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.downstream.runs import make_run, make_taskset


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Matrices this small are slower on two threads, much slower beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def taskset(tmp_path_factory) -> Path:
    """Three training, three validation, six test images; two of the test images have equal bytes."""
    return make_taskset(tmp_path_factory.mktemp("tasks"), same=(7, 11))


@pytest.fixture(scope="session")
def clip_run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "clip", "clip-tiny")


@pytest.fixture(scope="session")
def vilt_run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "vilt", "vilt-tiny", layers=2)
