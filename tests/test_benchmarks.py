"""Benchmarks run at tiny sizes, both sides give equal answers, and the page tells the numbers that stand."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest
import torch

from benchmarks import (
    browse,
    cli_help,
    clip_score,
    compare,
    costs,
    curation_quality,
    download,
    extract,
    features,
    memory,
    near_duplicates,
    report,
    semantic_dedup,
    statistics,
    training_input,
)
from benchmarks.__main__ import NAMES
from benchmarks.compare import Check
from benchmarks.filter import SHARD_ROWS, Peers, check_equal, generate
from benchmarks.make_pairs import make_pairs
from benchmarks.photographs import jpegs
from cli.demo.noise import plant_noise
from extractors.config import PatchesConfig
from extractors.patches import extract_patches
from extractors.regions.backends import load_detector
from extractors.regions.config import RegionsConfig
from extractors.regions.extractor import extract_regions
from extractors.regions.protocol import find_regions
from schemas.errors import PairmillError
from schemas.features import region_fields
from schemas.pairs import pairs_schema
from shards.reader import read_table
from shards.writer import write_pairs

LOAD = download.Load(640, 480, 2, 4, 4, 1.2)


def test_rounds_are_interleaved_and_the_median_is_told():
    seen = []
    answers = {"ours": iter([3.0, 1.0, 2.0]), "peer": iter([9.0, 8.0, 1.0])}
    runs = {name: lambda n=name: seen.append(n) or next(answers[n]) for name in answers}
    assert compare.medians(runs, 3) == {"ours": 2.0, "peer": 8.0}
    assert seen == ["ours", "peer"] * 3


@pytest.mark.parametrize(
    ("check", "met"),
    [
        (Check("ratio", 1.2, 1.2), True),
        (Check("ratio", 1.1, 1.2), False),
        (Check("seconds", 0.4, 0.4, at_least=False), True),
        (Check("seconds", 0.5, 0.4, at_least=False), False),
        (Check("shown", 0.5), None),
    ],
)
def test_a_goal_is_a_floor_or_a_ceiling(check, met):
    assert check.met is met


def test_timed_answers_with_seconds():
    assert 0.02 <= compare.timed(lambda: time.sleep(0.02))() < 5


def test_peak_memory_counts_children_and_anonymous_pages():
    child = "x = b'1' * (96 << 20); import time; time.sleep(0.6)"
    parent = f"import subprocess, sys; subprocess.check_call([sys.executable, '-c', {child!r}])"
    peak = compare.peak_memory([sys.executable, "-c", parent])
    assert 96 << 20 <= peak["anonymous"] <= peak["pss"] < 400 << 20


def test_a_command_that_fails_says_what_it_said():
    with pytest.raises(RuntimeError, match="no such thing"):
        compare.run_quietly([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_photographs_weigh_what_photographs_weigh():
    assert all(60_000 < len(data) < 130_000 for data in jpegs(640, 480, 2))
    assert jpegs(64, 48, 2) == jpegs(64, 48, 2)


def test_our_download_makes_what_bare_opencv_makes(tmp_path):
    made = [download.bare(data) for data in jpegs(LOAD.width, LOAD.height, 2)]
    with download.server(LOAD, pictures=2) as address:
        urls = download.write_list(tmp_path, address, LOAD.short, pictures=2)
        ours = download.fetched(download.ours, urls, LOAD.shard_rows)
        assert download.fetch_seconds(download.ours, urls, LOAD.shard_rows) > 0
    size = {"width": 512, "height": 384, "original_width": LOAD.width, "original_height": LOAD.height}
    want = [
        {"url": f"{address}/{i % 2}.jpg?row={i}", "caption": f"picture {i}", "status": "success", **size}
        | {"sha256": made[i % 2][1], "image": made[i % 2][0]}
        for i in range(LOAD.short)
    ]
    want.sort(key=lambda row: row["url"])
    download.check_equal(ours, want)
    with pytest.raises(AssertionError, match="dB"):
        download.check_equal(ours, [{**row, "image": made[(i + 1) % 2][0]} for i, row in enumerate(want)])
    with pytest.raises(AssertionError):
        download.check_equal(ours, want[:-1])


@pytest.mark.slow
def test_img2dataset_makes_the_same_rows(tmp_path):
    with download.server(LOAD, pictures=2) as address:
        urls = download.write_list(tmp_path, address, LOAD.short, pictures=2)
        sides = [download.fetched(one, urls, LOAD.shard_rows) for one in (download.ours, download.peer)]
    download.check_equal(*sides)


def test_the_bound_is_a_rate_of_two_processes():
    assert download.bound(download.reduced, jpegs(640, 480, 1), 2) > 0


def test_clip_scores_equal_the_bare_model(tmp_path):
    model = clip_score.random_clip(tmp_path / "clip", clip_score.TINY)
    dataset = make_pairs(tmp_path / "ds", [4, 8])
    ours, bare = clip_score.Ours(dataset, model, 4), clip_score.Bare(dataset, model, 4)
    assert ours.seconds() > 0
    clip_score.check_equal(ours.scores(), bare.scores())
    with pytest.raises(AssertionError):
        clip_score.check_equal(ours.scores() + 1e-4, bare.scores())
    assert bare.seconds() > 0


@pytest.mark.parametrize("kind", features.KINDS.values(), ids=list(features.KINDS))
def test_every_feature_store_answers_with_the_same_arrays(tmp_path, kind):
    readers = list(features.open_stores(tmp_path / "stores", 5, kind).values())
    features.check_equal(readers, [4, 0, 3], kind)
    with pytest.raises(AssertionError):
        features.check_equal([lambda number: readers[0](number - 1)], [3], kind)
    for read in readers:
        features.read_batches(read, [1, 4], kind)


def test_feature_rows_are_those_of_the_regions_schema():
    own = {field.name for field in region_fields(features.DIM, features.CLASSES)} - {"num_boxes"}
    assert set(features.ALL) == own


def test_extractors_are_measured_beside_what_they_cannot_do_without():
    result = extract.run(1, quick=True)
    goals = {check.what: check.goal for check in result.checks}
    for layout in ("vilt", "square"):
        assert goals[f"extract patches, {layout}, share of decode, resize and numpy's writing, flushed"] == 0.9
    for detector, goal in (("torchvision:tiny", None), ("rcnn:FPN", 0.95)):
        assert goals[f"extract regions, {detector}, cpu, share of the bare forward's speed"] == goal
    assert all(value > 0 for value in result.medians.values())
    skipped = any("DefaultPredictor" in note for note in result.notes)
    assert skipped is ("extract regions, rcnn:FPN, cpu, times DefaultPredictor" not in goals)


def test_extracted_rows_that_are_not_the_plain_ones_are_not_timed(tmp_path):
    dataset = make_pairs(tmp_path / "ds", [2, 2])
    config = PatchesConfig(name=extract.NAME, size=64, workers=0)
    stage = extract.Stage(dataset, extract_patches, config)
    stage.run()
    extract.check_patches(stage, config)
    with pytest.raises(AssertionError):
        extract.check_patches(stage, config.model_copy(update={"layout": "square"}))
    config = RegionsConfig(name=extract.NAME, device="cpu", workers=0, batch_size=2)
    stage = extract.Stage(dataset, extract_regions, config)
    assert stage.seconds() > 0
    bare = extract.Bare(dataset, config)
    extract.check_regions(stage, bare)
    bare.images = bare.images[::-1]
    with pytest.raises(AssertionError):
        extract.check_regions(stage, bare)
    boxes = np.arange(400, dtype=np.float32).reshape(100, 4)
    extract.check_proposals(boxes, boxes[:60] + 0.5)
    with pytest.raises(AssertionError):
        extract.check_proposals(boxes, boxes[:60] + 1.5)


def test_the_cost_of_a_row_is_told_for_every_extractor(tmp_path):
    found = costs.costs(tmp_path, quick=True)
    assert all(seconds > 0 for seconds, _ in found.values())
    sizes = {name: size for name, (_, size) in found.items()}
    assert 384 * 512 * 3 <= sizes["extract patches, vilt, 384 px"] < 384 * 512 * 3 + 2000
    assert 384 * 384 * 3 <= sizes["extract patches, square, 384 px"] < 384 * 384 * 3 + 2000
    for name in ("torchvision:tiny", "rcnn:FPN, 36 boxes", "rcnn:C4, 36 boxes"):
        assert sizes[f"extract regions, {name}"] > 1000
    assert len(sizes) == 7


def test_the_cost_of_reading_is_told_for_patches_and_jpegs(tmp_path):
    found = costs.reading(tmp_path, quick=True)
    assert list(found) == ["JPEGs", "patch tensors"]
    assert all(core > 0 and passed > 0 for core, passed, _ in found.values())
    assert found["patch tensors"][2] > 384 * 512 * 3 > found["JPEGs"][2]


@pytest.mark.parametrize("kind", ["C4", "FPN"])
def test_random_detectors_of_both_kinds_load_and_propose(tmp_path, kind):
    path = extract.random_rcnn(tmp_path / "rcnn.pth", kind, 8)
    detector = load_detector(RegionsConfig(detector=f"rcnn:{kind}", weights=str(path), size=64, proposals=20))
    found = find_regions(detector, [np.random.default_rng(0).integers(0, 256, (96, 128, 3)).astype(np.uint8)])[0]
    assert len(found.boxes) == 20
    assert 0 < found.features.abs().max() < 1000


def test_training_input_gives_the_same_pairs_either_way(tmp_path):
    dataset = make_pairs(tmp_path / "ds", [4, 8])
    ours = training_input.Ours(dataset, 2, 4)
    tars = training_input.Tars(training_input.write_tars(dataset, tmp_path / "tars"), 0, 4)
    read = training_input.read_counts(ours.read())
    assert read == training_input.read_counts(tars.read())
    assert read.total() == 12
    assert training_input.batch_counts(ours.batches()) == training_input.batch_counts(tars.batches())
    assert 12 <= training_input.drain_batches(ours) <= 12 + 3 * 4
    assert training_input.drain_batches(tars) == 12


def test_statistics_are_told_beside_decoding_for_both_sizes():
    result = statistics.run(1, quick=True)
    assert [check.goal for check in result.checks] == [0.9, None, 0.9, None]
    assert all(check.value > 0 for check in result.checks)
    assert len(result.medians) == 16


def test_statistics_that_do_not_fit_the_pictures_are_not_timed(tmp_path):
    stages = statistics.Stages(make_pairs(tmp_path / "ds", [4]))
    stages.image()
    stages.check()
    pairs = read_table(stages.dataset.folder, "pairs/00000.parquet").to_pylist()
    pairs[0]["image"] = jpegs(90, 40, 1)[0]
    with write_pairs(stages.dataset.folder, "pairs/00000.parquet", pairs_schema()) as writer:
        for row in pairs:
            writer.append(row)
    with pytest.raises(AssertionError):
        stages.check()


def test_filters_decide_alike(tmp_path):
    peers = Peers(generate(tmp_path / "scored", 2 * SHARD_ROWS), tmp_path)
    assert 0 < check_equal(peers) < 2 * SHARD_ROWS


def test_both_kmeans_end_with_centroids_as_near(tmp_path):
    dataset = semantic_dedup.generate(tmp_path / "ds", 3000)
    assert (len(dataset), dataset.num_shards) == (3000, 1)
    ours, peer = semantic_dedup.pairmill(dataset), semantic_dedup.faiss(dataset)
    assert ours["mean cosine"] == pytest.approx(peer["mean cosine"], rel=0.05)
    again = semantic_dedup.rule(dataset)
    assert 2000 < again["kept"] < 2800  # every fourth row is nearly an earlier one, or is it
    assert again["kept"] == semantic_dedup.rule(dataset)["kept"]


def test_a_report_of_generated_rows_has_all_its_parts(tmp_path):
    dataset = report.generate(tmp_path / "ds", 400, 200)
    assert (len(dataset), dataset.num_shards) == (400, 2)
    result = report.run(1, quick=True)
    assert result.sizes["histograms"] == 17
    assert result.sizes["pictures"] > 60
    assert [check.goal for check in result.checks] == [30.0, 5.0]


def test_help_is_timed():
    result = cli_help.run(1, quick=True)
    assert all(seconds > 0 for seconds in result.medians.values())
    with pytest.raises(RuntimeError, match="No such command"):
        cli_help.help_seconds(["no-such-command"], 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    clip_score.random_clip(folder / "clip", clip_score.TINY)
    with download.server(download.Load(memory.WIDTH, memory.HEIGHT, memory.ROWS, 0, 0, 0), 4) as address:
        memory.prepare(folder / "1", 1, address, ["filter"])
        yield folder


@pytest.mark.parametrize("stage", [s for s in memory.STAGES if s != "download"])
def test_every_stage_whose_memory_is_measured_runs(data, stage, monkeypatch):
    threads = torch.get_num_threads()
    memory.STAGES[stage](data / "1", 1)
    assert torch.get_num_threads() == threads


def test_memory_of_a_stage_is_that_of_its_own_process(data):
    assert 20 << 20 < memory.measure(data, "training input", 1, 0) < 2 << 30
    assert sorted(path.name for path in data.iterdir()) == ["1", "clip"]


def test_every_question_of_browse_is_answered():
    result = browse.run(1, quick=True)
    assert result.sizes == {"rows": 2 * browse.SHARD_ROWS, "embedding": 32}
    assert len(result.checks) == len(browse.KINDS) + 1
    assert all(value > 0 for value in result.medians.values())


def test_a_result_says_where_and_when_it_was_made():
    result = compare.Result("x", "what", 3, {"rows": 1}, {"ours_s": 0.123456}, [Check("r", 2.34567, 2)], ["numpy"])
    made = json.loads(json.dumps(result.as_json()))
    assert made["medians"] == {"ours_s": 0.1235}
    assert made["checks"] == [{"what": "r", "value": 2.346, "goal": 2, "at_least": True, "met": True}]
    assert made["versions"] == {"numpy": np.__version__}
    assert made["machine"].keys() == {"cpu", "cores", "memory_gib", "python", "load"}
    assert made["rounds"] == 3


def test_the_table_is_made_from_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(compare, "PAGE", tmp_path / "page.md")
    compare.PAGE.write_text(f"before\n{compare.START}\nold\n{compare.END}\nafter\n")
    checks = [Check("ratio", 1.25, 1.2), Check("seconds", 0.5, 0.4, at_least=False), Check("shown", 7)]
    compare.write(compare.Result("one", "what", 5, {}, {}, checks).as_json())
    text = compare.PAGE.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| one | ratio | 1.25 | ≥ 1.2 | met |" in text
    assert "| one | seconds | 0.5 | ≤ 0.4 | missed |" in text
    assert "| one | shown | 7 |  |  |" in text


def test_the_page_tells_the_results_that_stand():
    results = list(compare.standing())
    assert {result["benchmark"] for result in results} <= set(NAMES)
    assert compare.table() in compare.PAGE.read_text()


def test_memory_is_held_to_the_bytes_a_row_that_the_page_lists():
    page = (compare.ROOT / "docs" / "scale.md").read_text()
    for stage, most in memory.LISTED.items():
        assert any(f"`{stage}`" in line and f"| {most} " in line for line in page.splitlines()), stage


def test_near_duplicates_are_those_of_all_pairs_and_the_filter_is_measured():
    found = near_duplicates.run(5, quick=True)
    assert found.sizes["rows"] == 20_000
    assert 10_000 < found.sizes["kept"] < 19_000
    assert 500 < found.sizes["groups there"] < 2000
    assert 0 < found.medians["search alone, s"] < found.medians["filter, s"] < 120


def test_an_interval_is_students():
    found = curation_quality.interval([1.0, 2.0, 3.0])
    # s = 1, t(0.975, 2) = 4.3027, over the root of 3.
    assert (found.mean, round(found.half, 3), round(found.low, 3)) == (2.0, 2.484, -0.484)


def test_arms_of_curation_are_compared_seed_by_seed():
    names = (*curation_quality.RECALLS, curation_quality.MEAN)
    rest = {"rows": 5, "spoiled": 0.1, "wrong captions": 0.1, "ranking": 0.8, "ranking of wrong captions": 0.7}

    def seed(**recall):
        return {arm: {"recall": dict.fromkeys(names, value), **rest} for arm, value in recall.items()}

    # Seeds differ by far more than the arms, which always lie 2 apart: paired, the interval is nothing.
    seeds = [seed(all=x, random=x - 1, filtered=x + 2) for x in (10.0, 30.0, 50.0)]
    checks = curation_quality.summary(seeds, curation_quality.FULL).checks
    assert [check.value for check in checks[:4]] == [2, 2, 3, 3]
    assert [check.met for check in checks[:4]] == [None, True, None, True]
    worse = [seed(all=x, random=x, filtered=x + d) for x, d in ((10.0, 4.0), (30.0, -3.0), (50.0, 1.0))]
    assert curation_quality.summary(worse, curation_quality.FULL).checks[1].met is False


def test_noisy_scenes_become_a_dataset_that_is_made_once(tmp_path):
    noisy = plant_noise(40, 3, 64, curation_quality.SHARES)
    dataset = curation_quality.write_dataset(tmp_path / "ds", noisy)
    rows = read_table(dataset.folder, "pairs/00000.parquet").to_pylist()
    assert [row["truth"] for row in rows] == [pair.truth for pair in noisy.pairs]
    assert [row["caption"] for row in rows] == [pair.caption for pair in noisy.pairs]
    assert len({row["uid"] for row in rows}) == 40
    assert all(row["width"] < 64 for row in rows if row["truth"] == "tiny")
    before = (tmp_path / "ds" / "pairs" / "00000.parquet").stat().st_mtime_ns
    curation_quality.write_dataset(tmp_path / "ds", noisy)
    assert (tmp_path / "ds" / "pairs" / "00000.parquet").stat().st_mtime_ns == before


@pytest.mark.slow
def test_curation_is_measured_and_goes_on_with_the_arms_that_stand(tmp_path):
    load = curation_quality.QUICK
    first = curation_quality.measure(tmp_path, load)
    assert 0 < first.sizes["rows filtered"] < load.rows
    for arm in ("all", "random", "filtered"):
        assert 0 < first.medians[f"{arm}, text_to_image_r10, %"] <= 100
    assert first.medians["filtered, share spoiled"] < first.medians["all, share spoiled"]
    one = tmp_path / "seed-1"
    sizes = {arm: json.loads((one / f"{arm}.json").read_bytes())["rows"] for arm in curation_quality.ARMS}
    assert sizes["random"] == sizes["filtered"] < sizes["all"] == load.rows
    stands = (one / "all" / "config.yaml", one / "all" / "metrics.jsonl", one / "random.json")
    times = [path.stat().st_mtime_ns for path in stands]
    (one / "filtered.json").unlink()
    curation_quality.results(one / "filtered").unlink()
    assert curation_quality.measure(tmp_path, load) == first
    assert [path.stat().st_mtime_ns for path in stands] == times
    with pytest.raises(PairmillError, match="other settings"):
        curation_quality.measure(tmp_path, curation_quality.FULL)
