import json

import pytest

from curation.filter_config import ReportConfig
from curation.report import report
from curation.report_runs import POINTS, evaluation_tables, read_runs
from schemas.errors import PairmillError
from tests.curation.reported import EVIL, write_run
from tests.make import make_dataset
from training.sources import Source, parse_source


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "ds", shards=2, rows=3)


def test_a_run_tells_its_losses_and_results(dataset, tmp_path):
    run = write_run(tmp_path / "elsewhere" / "one", sources=[{"selection": "best"}, {"selection": None}])
    (found,) = read_runs(dataset, [str(run)])
    assert (found["name"], found["family"], found["steps"]) == ("one", "vilt", 50)
    assert found["selections"] == ["best", "all pairs"]
    assert list(found["curves"]) == ["loss", "itm_accuracy"]  # no learning rate
    assert found["curves"]["loss"][0] == (1, pytest.approx(2.99))
    assert found["evaluations"][0]["metric"] == {"rsum": 50}
    assert read_runs(dataset, [str(run), str(run.parent)]) == [found]  # once


def test_long_curves_are_means_of_neighbours(dataset, tmp_path):
    run = write_run(tmp_path / "elsewhere", steps=1000)
    points = read_runs(dataset, [str(run)])[0]["curves"]["loss"]
    assert len(points) <= POINTS
    assert points[-1][0] == 1000
    assert points[0] == (5, pytest.approx(3 - 3 / 100))


def test_runs_beside_the_dataset_are_read_when_they_say_they_are_of_it(dataset, tmp_path):
    digests = Source(0, parse_source(str(dataset.url))).fingerprint()["pairs"]
    write_run(tmp_path / "runs" / "mine", sources=[{"pairs": digests, "selection": None}])
    write_run(tmp_path / "runs" / "other", sources=[{"pairs": "0" * 32, "selection": None}])
    write_run(tmp_path / "ds" / "runs" / "inside")
    assert [r["name"] for r in read_runs(dataset, [])] == ["inside", "mine"]


def test_a_folder_without_runs_is_an_error_that_names_it(dataset, tmp_path):
    with pytest.raises(PairmillError, match="holds no run"):
        report(dataset, ReportConfig(run=(str(tmp_path / "nothing"),)))
    assert not (tmp_path / "ds" / "reports").exists()


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"metric": [1]}', '{"metric": {"a": 1e999, "b": "x", "c": true}}'])
def test_strange_files_are_left_out(dataset, tmp_path, text):
    run = write_run(tmp_path / "strange")
    (run / "evaluations/x/results.json").write_text(text)
    (run / "identity.json").write_text(text)
    (run / "metrics.jsonl").write_text(
        f'{{"step": 1, "loss": NaN}}\n{{"step": 2, "loss": 2}}\n{text}\n"x"\n{{"loss": 1}}\n'
    )
    (found,) = read_runs(dataset, [str(run)])
    assert found["curves"] == {"loss": [(2, 2)]}
    assert [e["metric"] for e in found["evaluations"]] in ([], [{}])


def test_one_table_for_each_task_with_the_best_marked(dataset, tmp_path):
    for name, steps in (("a", 10), ("b", 20)):
        write_run(tmp_path / "some" / name, steps=steps)
    write_run(tmp_path / "some" / "c", name="vqa")
    tables = evaluation_tables(read_runs(dataset, [str(tmp_path / "some")]))
    assert [(t["task"], [r["run"] for r in t["rows"]], t["best"]) for t in tables] == [
        ("retrieval", ["a", "b"], {"rsum": 20}),
        ("vqa", ["c"], {}),
    ]


def test_the_page_shows_runs_and_escapes_their_words(dataset, tmp_path):
    run = write_run(tmp_path / "one", name=EVIL, family=EVIL)
    report(dataset, ReportConfig(run=(str(run),)))
    text = (tmp_path / "ds/reports/report.html").read_text()
    assert "<script" not in text
    assert "<polyline" in text
    numbers = json.loads((tmp_path / "ds/reports/report.json").read_text())
    assert numbers["evaluations"][0]["task"] == EVIL
    assert numbers["runs"][0]["steps"] == 50
