"""`show`: rows as asked for, and a sheet with their pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from curation.maintenance_config import ShowConfig
from curation.show import ShownRow, _lines, show
from schemas.errors import PairmillError
from tests.curation.samples import select, whole_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    made = whole_dataset(tmp_path_factory.mktemp("show") / "d")
    select(made, [0, 3, 4])
    return made


def places(rows):
    return [(r.shard, r.row) for r in rows]


def test_named_rows_come_in_the_order_asked_for(dataset):
    rows = show(dataset.url, ShowConfig(rows=("2:1", "5", "0:1", "5")))
    assert places(rows) == [(2, 1), (1, 1), (0, 1), (1, 1)]
    values = rows[1].values
    assert values["caption"] == "a green block, number 5"
    assert (values["License"], values["site.rank"], len(values["uid"])) == ("CC-BY", 101, 32)
    assert values["size.size"] == len(rows[1].image) == values["vector.n"]
    assert (rows[2].image, rows[2].values["status"], rows[2].values["size.size"]) == (None, "timeout", None)
    assert not any(k.startswith("vector.bytes") for k in values)


def test_a_sample_is_seeded(dataset):
    some = show(dataset, ShowConfig(count=5))
    assert places(some) == sorted(places(some)) == places(show(dataset, ShowConfig(count=5)))
    assert places(some) != places(show(dataset, ShowConfig(count=5, seed=1)))
    assert len(show(dataset, ShowConfig(count=100))) == 12


def test_selections_and_statuses(dataset):
    assert places(show(dataset, ShowConfig(selection="best"))) == [(0, 0), (0, 3), (1, 0)]
    dropped = show(dataset, ShowConfig(selection="best", dropped=True, count=50))
    assert len(dropped) == 9
    assert {r.values["reason"] for r in dropped} == {"too small"}
    assert places(show(dataset, ShowConfig(status="timeout"))) == [(0, 1)]


def test_columns_and_errors(dataset):
    assert show(dataset, ShowConfig(rows=("0",), columns=("caption", "size.size")))[0].values.keys() == {
        "caption",
        "size.size",
    }
    with pytest.raises(PairmillError, match=r"no column `captoin`. Did you mean `caption`"):
        show(dataset, ShowConfig(rows=("0",), columns=("captoin",)))
    with pytest.raises(PairmillError, match=r"`timeot` is no status. Did you mean `timeout`"):
        show(dataset, ShowConfig(status="timeot"))
    with pytest.raises(PairmillError, match="give --selection"):
        show(dataset, ShowConfig(dropped=True))
    with pytest.raises(PairmillError, match="has no row 99"):
        show(dataset, ShowConfig(rows=("99",)))


def test_contact_sheet(dataset, tmp_path):
    show(dataset, ShowConfig(count=12, output=tmp_path / "sheet.png", thumbnail=96))
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape == (12 + 2 * (96 + 92 + 12), 12 + 6 * (96 + 12), 3)
    colourful = (pixels.max(-1).astype(int) - pixels.min(-1)) > 60
    cards = [colourful[12 : 12 + 96, 12 + i * 108 : 12 + i * 108 + 96].mean() for i in range(6)]
    assert cards[0] > 0.05  # a picture
    assert cards[1] < 0.05  # the timeout: grey with its status in words
    assert pixels[112:200, 12:108].min() < 60  # ink under the picture


def test_a_sheet_with_what_does_not_decode(tmp_path):
    made = whole_dataset(tmp_path / "d", shards=1, corrupt=[(0, 2)], no_caption=[(0, 3)], fail={})
    show(made, ShowConfig(output=tmp_path / "sheet.png"))
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_a_sheet_shows_whole_numbers_whole():
    row = ShownRow(0, 3, {"caption": "a", "hash.phash": 13790233847282611876, "clip.clip_score": 0.80367}, None)
    assert _lines(row, 600)[-1][0] == "phash 13790233847282611876 clip_score 0.804"
