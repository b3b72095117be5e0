"""One shard of each stage, the process ended at each call that touches a file; a rerun gives the same bytes.

`task import` is in downstream/test_retrieval_import.py, `import`, `export` and `merge` beside their tests.
"""

from __future__ import annotations

import pytest

from tests import atomic_stages as stages
from tests.clean_process import in_clean_process
from tests.curation.loopback import loopback

FILE = 5  # calls of a file: open, write, fsync, rename, fsync of its folder


HEAVY = pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])


@pytest.mark.parametrize("stage", [stages.patches, stages.selection])  # sidecar and shard; selection and its copy
def test_a_stage_ended_at_any_call_is_completed_by_a_rerun(tmp_path, stage):
    assert in_clean_process(stage, tmp_path, 1) >= FILE * 2


@HEAVY
@pytest.mark.parametrize(("stage", "files"), [(stages.clip_scores, 4), (stages.regions, 2)])
def test_a_stage_with_a_model_ended_at_any_call_is_completed_by_a_rerun(tmp_path, stage, files, every):
    assert in_clean_process(stage, tmp_path, every) > FILE * files - every


def test_checkpoints_ended_at_any_call_are_whole_or_absent(tmp_path):
    assert in_clean_process(stages.checkpoints, tmp_path, 1) >= 40


@HEAVY
def test_a_download_ended_at_any_call_is_completed_by_a_rerun(tmp_path, every):
    with loopback() as web:
        calls = in_clean_process(stages.pairs_from_web, tmp_path, every, web.base)
    assert calls > FILE * 4 - every  # input, dataset.json, the pairs' sidecar and shard


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_ended_at_any_call_is_completed_by_a_rerun(tmp_path):
    assert in_clean_process(stages.training, tmp_path, 1, limit_s=850) >= 80
