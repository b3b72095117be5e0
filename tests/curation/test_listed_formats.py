"""Formats that list images by name: what goes out comes back, what others write is taken, no name leaves its folder."""

from __future__ import annotations

import gzip
import json
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation.exporting import export_pairs
from curation.formats.listed import joined
from curation.formats.samples import Sample
from curation.importing import import_pairs
from curation.maintenance_config import CsvImportConfig, ExportConfig, ImagesImportConfig, ImportConfig
from schemas.errors import PairmillError
from schemas.events import silent
from shards.dataset import Dataset
from tests.atomicity import assert_atomic, tree
from tests.curation.samples import all_rows, select, whole_dataset
from tests.make import encode, make_dataset, picture
from tests.strategies import texts

FORMATS = ("albef", "llava", "csv", "coco")
INDEX = {"albef": "pairs.json", "llava": "llava.json", "csv": "pairs.tsv", "coco": "captions.json"}
SAME = ("uid", "input_uid", "url", "caption", "captions", "image", "format", "width", "height", "original_width")
SAME += ("original_height", "sha256", "stored_sha256", "status")
JPEG = encode(picture(40, 30))


def take(format: str, place, output, config: type[ImportConfig] = ImagesImportConfig, **options) -> list[dict]:
    """Rows of the dataset that an import makes."""
    import_pairs(format, [str(place)], output, config(**options), silent)
    return all_rows(Dataset.open(output))


def put_images(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(picture(40 + number, 30, number)))
    return root


def put_list(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def told(rows: list[dict], *names: str) -> list[tuple]:
    return [tuple(row[n] for n in names) for row in rows]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    dataset = whole_dataset(
        tmp_path_factory.mktemp("source") / "d",
        captions={(0, 0): ["one", "two", "ünï\ncode 😀", "one"], (1, 1): ["only"]},
        no_caption=[(1, 2)],
    )
    select(dataset, [0, 1, 4, 5, 6, 9])
    return dataset


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("selection", [None, "best"])
def test_export_then_import_gives_the_same_pairs(source, tmp_path, format, selection):
    export_pairs(format, source.url, tmp_path / "out", ExportConfig(selection=selection, shard_rows=4), silent)
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file() and p.name != "PAIRMILL") == sorted(
        [INDEX[format], "README.md"]
    )
    back = take(format, tmp_path / "out", tmp_path / "back", shard_rows=3)
    kept = [0, 4, 5, 6, 9] if selection else [0, 2, 3, 4, 5, 6, 7, 9, 10, 11]
    want = [all_rows(source)[k] for k in kept]
    for old in want:
        old["captions"] = None if old["captions"] == ["only"] else old["captions"]
    assert [{n: r[n] for n in SAME} for r in back] == [{n: r[n] for n in SAME} for r in want]
    assert told(back, "license", "site.rank") == [(r["License"], r["site.rank"]) for r in want]
    assert "5 pairs of 12" in (tmp_path / "out/README.md").read_text() or selection is None


# Names that formats use themselves, and any other.
_NAMES = st.sampled_from(
    ["filepath", "image_id", "id", "title", "prompt", "text", "key", "file_name", "pairmill", "conversations", "a b"]
)
_VALUES = {pa.string(): texts, pa.int64(): st.integers(-(2**63), 2**63 - 1), pa.bool_(): st.booleans()}
_VALUES[pa.float64()] = st.floats(allow_nan=False, allow_infinity=False)
_CAPTIONS = st.none() | st.lists(texts | st.sampled_from(['a "b', "a\tb", "a\r\nb", '"', "  ", "<image>"]), min_size=1)


@st.composite
def tables(draw):
    """Carried fields, and for each of three rows its captions and the fields' values, of which the first has all."""
    names = draw(st.lists(_NAMES, max_size=3, unique=True))
    fields = [pa.field(name, draw(st.sampled_from(list(_VALUES)))) for name in names]
    rows = []
    for number in range(3):
        values = {f.name: draw(_VALUES[f.type] if number == 0 else st.none() | _VALUES[f.type]) for f in fields}
        rows.append((draw(_CAPTIONS), values))
    return fields, rows


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(table=tables())
def test_any_captions_and_columns_come_back(format, table):
    fields, rows = table
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        made = make_dataset(
            root / "d",
            shards=1,
            rows=3,
            no_caption=[(0, i) for i, (captions, _) in enumerate(rows) if captions is None],
            captions={(0, i): captions for i, (captions, _) in enumerate(rows) if captions},
            carried=fields,
            carry=lambda s, r: rows[r][1] | ({} if rows[r][0] and len(rows[r][0]) > 1 else {"captions": None}),
        )
        export_pairs(format, made, root / "out", ExportConfig(shard_rows=2), silent)
        back = take(format, root / "out", root / "back")
        want = all_rows(made)
        same = (*SAME, *(f.name for f in fields))
        assert [{n: r[n] for n in same} for r in back] == [{n: r[n] for n in same} for r in want]
        assert set(back[0]) == set(want[0])


@pytest.mark.parametrize("format", FORMATS)
def test_odd_captions_come_back_as_they_were(tmp_path, format):
    odd = ["a\r\nb", "a\tb", "", " ", 'say "x', "<image>", "\u2028", "a\0b", "null"]
    captions = {(0, i): [c] for i, c in enumerate(odd)}
    made = make_dataset(
        tmp_path / "d", shards=1, rows=len(odd), captions=captions, carry=lambda s, r: {"captions": None}
    )
    export_pairs(format, made, tmp_path / "out", ExportConfig(), silent)
    assert told(take(format, tmp_path / "out", tmp_path / "back"), "caption") == [(c,) for c in odd]


@pytest.mark.parametrize("format", FORMATS)
def test_equal_datasets_give_equal_exports_and_a_rerun_does_nothing(source, tmp_path, format):
    for name in ("a", "b"):
        export_pairs(format, source, tmp_path / name, ExportConfig(shard_rows=4), silent)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("0000*")}
    assert export_pairs(format, source, tmp_path / "a", ExportConfig(shard_rows=4), silent).done == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("0000*")} == before


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_ended_at_any_call_a_rerun_completes_it(tmp_path, format, every):
    start = tmp_path / "start"
    make_dataset(start / "d", shards=1, rows=3, captions={(0, 1): ["a", "b"]})

    def run(root):
        export_pairs(format, root / "d", root / "out", ExportConfig(shard_rows=2), silent)
        import_pairs(format, [str(root / "out")], root / "back", ImagesImportConfig(shard_rows=2), silent)

    assert assert_atomic(lambda: (start, run), tmp_path, every=every) >= 30


_ENTRIES = {
    "albef": lambda name: json.dumps([{"image": name, "caption": "x"}]),
    "llava": lambda name: json.dumps([{"id": "1", "image": name, "conversations": [{"from": "gpt", "value": "x"}]}]),
    "csv": lambda name: f"filepath\ttitle\n{name}\tx\n",
    "coco": lambda name: json.dumps(
        {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "x"}]}
    ),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "name", ["../a.jpg", "/etc/a.jpg", "x/../../a.jpg", "https://x/a.jpg", "x\\a.jpg", "a\0.jpg", "."]
)
def test_names_that_leave_their_folder_are_refused(tmp_path, format, name):
    put_images(tmp_path, "a.jpg", "in/x/y.jpg")
    path = put_list(tmp_path / "in" / INDEX[format], _ENTRIES[format](name))
    with pytest.raises(PairmillError, match="refused the unsafe name"):
        take(format, path, tmp_path / "d")
    assert not (tmp_path / "d/dataset.json").exists()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["gone.jpg", "in", "a.jpg/b.jpg", "a::b.jpg", "*.jpg", "n" * 300])
def test_what_is_no_file_becomes_a_row(tmp_path, format, name):
    put_images(tmp_path, "a.jpg", "in/x.jpg")
    path = put_list(tmp_path / INDEX[format], _ENTRIES[format](name))
    assert told(take(format, path, tmp_path / "d"), "status", "caption", "image") == [("missing_file", "x", None)]


@pytest.mark.parametrize("format", FORMATS)
def test_images_may_lie_elsewhere_and_their_names_be_absolute(tmp_path, format):
    first, second = put_images(tmp_path / "1", "a.jpg"), put_images(tmp_path / "2", "a.jpg", "b.jpg")
    for number, (name, image) in enumerate(
        [("a.jpg", first / "a.jpg"), ("b.jpg", second / "b.jpg"), (f"{second}/a.jpg", first / "a.jpg")]
    ):
        path = put_list(tmp_path / f"lists{number}" / INDEX[format], _ENTRIES[format](name))
        rows = take(format, path, tmp_path / f"d{number}", images=(str(first), str(second)))
        assert told(rows, "image") == [(image.read_bytes(),)]


@pytest.mark.parametrize("format", FORMATS)
def test_lists_may_be_packed(tmp_path, format):
    put_images(tmp_path, "a.jpg")
    text = _ENTRIES[format]("a.jpg").encode()
    (tmp_path / f"{INDEX[format]}.gz").write_bytes(gzip.compress(text))
    with zipfile.ZipFile(tmp_path / f"{INDEX[format]}.zip", "w") as file:
        file.writestr("inside.json", text)
    for ending in ("gz", "zip"):
        rows = take(format, tmp_path / f"{INDEX[format]}.{ending}", tmp_path / f"d-{ending}")
        assert told(rows, "status", "caption") == [("success", "x")]
    (tmp_path / f"{INDEX[format]}.gz").write_bytes(gzip.compress(text)[:-9])
    with pytest.raises(PairmillError, match="is damaged"):
        take(format, tmp_path / f"{INDEX[format]}.gz", tmp_path / "cut")


@pytest.mark.parametrize("format", [*FORMATS, "text"])
def test_nothing_there(tmp_path, format):
    (tmp_path / "in").mkdir()
    with pytest.raises(PairmillError, match=r"no .* there"):
        take(format, tmp_path / "in", tmp_path / "d")


# albef


def test_albef_lists_of_others(tmp_path):
    put_images(tmp_path, *(f"i/{n}.jpg" for n in "abc"))
    entries = [
        {"image": "i/a.jpg", "caption": "a1", "image_id": "coco_1"},
        {"image": "i/a.jpg", "caption": "a2", "image_id": "coco_1"},
        {"image": "i/b.jpg", "caption": ["b1", "b2"], "image_id": "coco_2", "url": "http://x/b.jpg", "dataset": "vg"},
        {"image": "i/a.jpg", "caption": "a3", "image_id": "coco_1"},
        {"image": "i/a.jpg", "caption": "a4", "image_id": "other"},
        {"image": "i/c.jpg", "caption": None},
        {"caption": "no image"},
        {"image": 7, "caption": "no name"},
    ]
    rows = take("albef", put_list(tmp_path / "train.json", entries), tmp_path / "d")
    assert told(rows, "caption", "captions", "image_id", "status") == [
        ("a1", ["a1", "a2"], "coco_1", "success"),
        ("b1", ["b1", "b2"], "coco_2", "success"),
        ("a3", None, "coco_1", "success"),
        ("a4", None, "other", "success"),
        (None, None, None, "success"),
        ("no image", None, None, "no_image"),
        ("no name", None, None, "missing_file"),
    ]
    assert told(rows, "url", "dataset")[1] == ("http://x/b.jpg", "vg")


def test_albef_reads_what_we_write(source, tmp_path):
    """As dataset/caption_dataset.py does: `caption` a text or a list of texts, `image` below `image_root`."""
    export_pairs("albef", source, tmp_path / "out", ExportConfig(shard_rows=4), silent)
    entries = json.loads((tmp_path / "out/pairs.json").read_text())
    rows = [r for r in all_rows(source) if r["status"] == "success"]
    assert [e["caption"] for e in entries] == [
        r["captions"] if r["captions"] and len(r["captions"]) > 1 else r["caption"] or "" for r in rows
    ]
    assert [(tmp_path / "out" / e["image"]).read_bytes() for e in entries] == [r["image"] for r in rows]
    assert len({e["image_id"] for e in entries}) == len(rows)


def test_captions_of_one_image_are_bounded(monkeypatch):
    monkeypatch.setattr("curation.formats.listed.MAX_CAPTIONS", 3)
    samples = list(joined(("a.jpg", Sample("x", None, [str(i)])) for i in range(7)))
    assert [s.captions for s in samples] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]


# llava


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_llava_lists_of_others(tmp_path):
    put_images(tmp_path, "a.jpg", "b.jpg")
    entries = [
        {"id": "1", "image": "a.jpg", "conversations": turns("Say it.\n<image>", "a cat"), "blip_caption": "cat"},
        {"id": "2", "image": "b.jpg", "conversations": turns("<image>\nWhat?", "a dog", "Where?", "on a mat")},
        {"id": "3", "conversations": turns("Hello", "Hi")},
        {"id": 4, "image": "a.jpg", "conversations": [{"from": "human"}, 3, {"from": "gpt", "value": 5}]},
        {"id": "5", "image": "b.jpg"},
    ]
    rows = take("llava", put_list(tmp_path / "x.json", entries), tmp_path / "d")
    assert told(rows, "id", "caption", "captions", "prompt", "status", "blip_caption") == [
        ("1", "a cat", None, "Say it.", "success", "cat"),
        ("2", "a dog", ["a dog", "on a mat"], None, "success", None),
        ("3", "Hi", None, "Hello", "no_image", None),
        ("4", None, None, None, "success", None),
        ("5", None, None, None, "success", None),
    ]
    export_pairs("llava", tmp_path / "d", tmp_path / "out", ExportConfig(), silent)
    again = json.loads((tmp_path / "out/llava.json").read_text())
    assert [e["id"] for e in again] == ["1", "2", "4", "5"]
    assert again[0]["conversations"] == turns("<image>\nSay it.", "a cat")
    assert again[1]["conversations"] == entries[1]["conversations"]
    back = take("llava", tmp_path / "out", tmp_path / "back")
    same = ("id", "caption", "captions", "prompt", "conversations", "image")
    assert told(back, *same) == [t for t, r in zip(told(rows, *same), rows, strict=True) if r["status"] == "success"]


def test_llava_pretraining_reads_what_we_write(source, tmp_path):
    """As train.py's `preprocess_plain` does: two turns, the first with the image's token; ids are unique."""
    export_pairs("llava", source, tmp_path / "out", ExportConfig(shard_rows=4), silent)
    entries = json.loads((tmp_path / "out/llava.json").read_text())
    assert all(len(e["conversations"]) == 2 and "<image>" in e["conversations"][0]["value"] for e in entries)
    assert len({e["id"] for e in entries}) == len(entries) == 13
    assert [e["conversations"][1]["value"] for e in entries][:4] == ["one", "two", "ünï\ncode 😀", "one"]


# csv


def test_open_clip_reads_what_we_write(source, tmp_path, monkeypatch):
    data = pytest.importorskip("open_clip_train.data", reason="open_clip_train is not installed")
    export_pairs("csv", source, tmp_path / "out", ExportConfig(shard_rows=4), silent)
    monkeypatch.chdir(tmp_path / "out")
    read = data.CsvDataset("pairs.tsv", lambda image: image.size, "filepath", "title", tokenizer=lambda texts: texts)
    rows = [r for r in all_rows(source) if r["status"] == "success"]
    assert [read[i][0] for i in range(len(read))] == [(r["width"], r["height"]) for r in rows]
    assert [read[i][1] for i in range(len(read)) if rows[i]["caption"]] == [r["caption"] for r in rows if r["caption"]]


def test_csvs_of_others(tmp_path):
    put_images(tmp_path, "a, b.jpg", "c.jpg")
    text = 'path,caption,license,extra\n"a, b.jpg","one ""quoted""\nlong",CC0,\nc.jpg,,CC-BY,3\n,text only,,\n'
    rows = take("csv", put_list(tmp_path / "x.csv", text), tmp_path / "d")
    assert told(rows, "caption", "license", "extra", "status") == [
        ('one "quoted"\nlong', "CC0", None, "success"),
        (None, "CC-BY", "3", "success"),
        ("text only", None, None, "no_image"),
    ]
    rows = take("csv", tmp_path / "x.csv", tmp_path / "e", CsvImportConfig, image_key="path", caption_key=("license",))
    assert told(rows, "caption") == [("CC0",), ("CC-BY",), (None,)]
    with pytest.raises(PairmillError, match=r"no column `pth` of image names\. Did you mean `path`"):
        take("csv", tmp_path / "x.csv", tmp_path / "f", CsvImportConfig, image_key="pth")
    with pytest.raises(PairmillError, match=r"no column `filepath` of image names.*It has: url, caption"):
        take("csv", put_list(tmp_path / "y.csv", "url,caption\nx,y\n"), tmp_path / "g")
    with pytest.raises(PairmillError, match="column `pairmill` is no JSON"):
        take("csv", put_list(tmp_path / "z.csv", "filepath,title,pairmill\nx,y,z\n"), tmp_path / "h")


# coco


def coco(images, annotations, **more) -> dict:
    return {"info": {"year": 2014}, **more, "images": images, "annotations": annotations}


def test_coco_as_it_is_published(tmp_path):
    put_images(tmp_path / "val2014", "COCO_1.jpg", "COCO_2.jpg", "COCO_4.jpg")
    images = [
        {"id": 2, "file_name": "COCO_2.jpg", "width": 41, "height": 30, "license": 3, "coco_url": "http://c/2.jpg"},
        {"id": 1, "file_name": "COCO_1.jpg", "license": 9, "flickr_url": "http://f/1.jpg"},
        {"id": 3, "file_name": "COCO_3.jpg"},
        {"id": 4, "file_name": "COCO_4.jpg"},
        {"id": 5},
    ]
    captions = [(1, "one"), (2, "two"), (1, "uno"), (7, "nobody's"), (3, "three"), (2, "due"), (7, "nor this")]
    annotations = [{"id": 50 - i, "image_id": image, "caption": c} for i, (image, c) in enumerate(captions)]
    licences = [{"id": 3, "name": "Attribution License", "url": "http://cc/by"}]
    annotations.insert(3, {"id": 51, "image_id": 2, "caption": None})
    whole = coco(images, annotations, licenses=licences)
    for order in (list(whole), list(whole)[::-1]):
        path = put_list(tmp_path / "annotations/captions_val2014.json", {k: whole[k] for k in order})
        put_list(tmp_path / "annotations/instances_val2014.json", {"images": []})
        rows = take("coco", tmp_path / "annotations", tmp_path / f"d-{order[0]}")
        assert told(rows, "image_id", "caption", "captions", "status") == [
            (2, "two", ["two", "due"], "success"),
            (1, "one", ["one", "uno"], "success"),
            (3, "three", None, "missing_file"),
            (4, None, None, "success"),
            (5, None, None, "missing_file"),
            (7, "nobody's", ["nobody's", "nor this"], "missing_file"),
        ]
        assert told(rows, "url", "license", "license_url", "flickr_url")[:2] == [
            ("http://c/2.jpg", "Attribution License", "http://cc/by", None),
            (None, "9", None, "http://f/1.jpg"),
        ]
    (row,) = take(
        "coco", _german(tmp_path), tmp_path / "german", images=(str(tmp_path / "val2014"),), caption_key=("de",)
    )
    assert (row["caption"], row["status"]) == ("eins", "success")
    export_pairs("coco", tmp_path / "d-info", tmp_path / "out", ExportConfig(), silent)
    again = json.loads((tmp_path / "out/captions.json").read_text())
    assert [i["id"] for i in again["images"]] == [2, 1, 4]  # their own: scores against the published set stay possible
    assert path.exists()


def _german(root: Path) -> Path:
    annotations = [{"image_id": 1, "caption": "one", "de": "eins"}]
    return put_list(root / "german.json", coco([{"id": 1, "file_name": "COCO_1.jpg"}], annotations))


def test_coco_that_is_none(tmp_path):
    for number, value in enumerate(
        [{"images": [], "licenses": []}, coco([{"id": 1}], [{"image_id": 1, "bbox": [1]}]), {"images": [{"id": 1}]}]
    ):
        with pytest.raises(PairmillError, match="holds no COCO captions"):
            take("coco", put_list(tmp_path / "x.json", value), tmp_path / f"d{number}")
    with pytest.raises(PairmillError, match="is no JSON object"):
        take("coco", put_list(tmp_path / "x.json", [1]), tmp_path / "e")
    with pytest.raises(PairmillError, match="is damaged JSON"):
        take("coco", put_list(tmp_path / "x.json", '{"images": [{"id": 1}, '), tmp_path / "f")
    with pytest.raises(PairmillError, match=r"no COCO captions .* there"):
        take("coco", put_list(tmp_path / "in/instances_x.json", {}).parent, tmp_path / "g")


def test_coco_ids_of_an_export_are_one_each(source, tmp_path):
    export_pairs("coco", source, tmp_path / "out", ExportConfig(shard_rows=4), silent)
    whole = json.loads((tmp_path / "out/captions.json").read_text())
    rows = [r for r in all_rows(source) if r["status"] == "success"]
    assert [i["id"] for i in whole["images"]] == list(range(len(rows)))
    assert [(i["width"], i["height"]) for i in whole["images"]] == [(r["width"], r["height"]) for r in rows]
    assert [a["id"] for a in whole["annotations"]] == list(range(1, 13))
    assert [a["caption"] for a in whole["annotations"] if a["image_id"] == 0] == ["one", "two", "ünï\ncode 😀", "one"]
    assert whole["licenses"] == []


# visual_genome


def region(image: int, number: int, phrase, **more) -> dict:
    return {"region_id": number, "image_id": image, "phrase": phrase, "x": 1, "y": 2, "width": 30, "height": 20, **more}


def test_visual_genome_is_a_pair_an_image(tmp_path):
    put_images(tmp_path, "VG_100K/1.jpg", "VG_100K_2/3.jpg")
    regions = [
        {"id": 1, "regions": [region(1, 11, "a clock"), region(1, 12, None), region(1, 13, "a street", x=5)]},
        {"id": 3, "regions": [region(3, 31, "a dog"), region(3, 32, " ")]},
        {"id": 2, "regions": [region(2, 21, "gone")]},
        {"id": "../x", "regions": []},
    ]
    put_list(tmp_path / "region_descriptions.json", regions)
    put_list(tmp_path / "attributes.json", [])
    about = [{"image_id": 3, "url": "http://vg/3.jpg", "coco_id": 77, "width": 800}, {"image_id": 1, "url": None}]
    put_list(tmp_path / "image_data.json", about)
    rows = take("visual_genome", tmp_path, tmp_path / "d")
    assert told(rows, "image_id", "caption", "captions", "status", "url", "coco_id") == [
        ("1", "a clock", ["a clock", "a street"], "success", None, None),
        ("3", "a dog", None, "success", "http://vg/3.jpg", 77),
        ("2", "gone", None, "missing_file", None, None),
        ("../x", None, None, "missing_file", None, None),
    ]
    assert json.loads(rows[0]["regions"]) == [[1, 2, 30, 20], [5, 2, 30, 20]]
    assert json.loads(rows[0]["region_ids"]) == [11, 13]
    assert rows[0]["image"] == (tmp_path / "VG_100K/1.jpg").read_bytes()
    only = take("visual_genome", tmp_path / "region_descriptions.json", tmp_path / "e", images=(f"{tmp_path}/VG_100K",))
    assert told(only, "status")[:2] == [("success",), ("missing_file",)]


def test_visual_genome_that_is_none(tmp_path):
    with pytest.raises(PairmillError, match="has no `regions`"):
        take("visual_genome", put_list(tmp_path / "x.json", [{"id": 1}]), tmp_path / "d")
    with pytest.raises(PairmillError, match=r"no Visual Genome regions .* there"):
        take("visual_genome", put_list(tmp_path / "in/image_data.json", []), tmp_path / "e")


# text


def test_text_is_a_caption_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\n  two \nünï".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"caf\xe9\n"))
    (tmp_path / ".hidden.txt").write_text("no")
    rows = take("text", tmp_path, tmp_path / "d", ImportConfig)
    assert told(rows, "caption", "status", "image") == [
        (text, "no_image", None) for text in ("one", "  two ", "ünï", "café")
    ]
    assert len({r["uid"] for r in rows}) == 4
