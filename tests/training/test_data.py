import numpy as np
import pytest
import torch

from schemas.errors import PairmillError
from shards.images import decode_rgb
from shards.transforms import patchify, resize_vilt
from tests.make import make_dataset
from tests.training.test_sources import write_patches
from training.augment import Augmentation
from training.data import Loader, View
from training.order import make_order
from training.sources import Source, SourceSpec
from training.text import train_wordpiece


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "ds", shards=2, rows=9, fail={(0, 4): "timeout"})


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(["a red green blue yellow block, number 1 2 3 4 5 6 7 8 9"] * 3, 256)


def view(**changes):
    values = {
        "transform": "vilt",
        "size": 64,
        "patch": 16,
        "max_text_len": 16,
        "augmentation": Augmentation("vilt-randaug"),
    }
    return View(**{**values, **changes})


def loader(dataset, tokenizer, make_view=None, **changes):
    source = Source(0, SourceSpec(dataset.url, None, None), (make_view or view()).input)
    order = make_order([source.groups()], [None], 0)
    return Loader(order, [source], make_view or view(), tokenizer, **{"batch_size": 4, "seed": 0, **changes})


def take(loader, count):
    stream = loader.stream()
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def same(a, b):
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())


def test_batches_do_not_depend_on_threads_or_start(dataset, tokenizer):
    one = take(loader(dataset, tokenizer, threads=1), 6)
    many = take(loader(dataset, tokenizer, threads=3), 6)
    late = take(loader(dataset, tokenizer, start=3), 3)
    assert all(same(a.batch, b.batch) for a, b in zip(one, many, strict=True))
    assert all(same(a.batch, b.batch) for a, b in zip(one[3:], late, strict=True))
    assert [loaded.epoch for loaded in one] == [0, 0, 0, 0, 0, 1]  # 17 rows: batch 4 holds the last one of epoch 0


def test_two_ranks_share_a_global_batch(dataset, tokenizer):
    whole = take(loader(dataset, tokenizer), 5)
    ranks = [take(loader(dataset, tokenizer, rank=r, world=2), 5) for r in (0, 1)]
    for index, loaded in enumerate(whole):
        rows = torch.cat([ranks[r][index].batch.rows for r in (0, 1)])
        assert torch.equal(rows, loaded.batch.rows)
        assert [ranks[r][index].batch.start for r in (0, 1)] == [0, 2]


def test_an_epoch_has_every_row_once(dataset, tokenizer):
    rows = torch.cat([loaded.batch.rows for loaded in take(loader(dataset, tokenizer, batch_size=1), 17)])
    want = {(s, r) for s in range(2) for r in range(9)} - {(0, 4)}
    assert {tuple(r) for r in rows.tolist()} == want


def test_batch_from_patch_tensors_equals_live_preprocessing(tmp_path, dataset, tokenizer):
    """Bit for bit, after the same normalisation: one copy of the transforms."""
    from schemas.config import StageConfig
    from schemas.features import FEATURES, VERSION, features_schema, patch_fields
    from schemas.sidecars import make_sidecar
    from shards.reader import read_table
    from shards.writer import write_features

    stage = dataset.stage("features/p16")
    stage.begin(make_sidecar("extract patches", "p16", (FEATURES, VERSION), StageConfig()), "")
    for shard in range(2):
        pairs = dataset.stage("pairs")
        images = read_table(dataset.folder, pairs.file(shard), ["image"])["image"].to_pylist()
        schema = features_schema(patch_fields(16))
        with write_features(dataset.folder, stage.file(shard), schema, pairs.digest(shard)) as writer:
            for data in images:
                if data is None:
                    writer.append({"state": "timeout"})
                    continue
                pixels = resize_vilt(decode_rgb(data), 64, 16)
                patches, rows, cols = patchify(pixels, 16), pixels.shape[0] // 16, pixels.shape[1] // 16
                writer.append(
                    {"state": "ok", "rows": rows, "cols": cols, "num_patches": len(patches), "patches": patches}
                )
    plain = view(augmentation=Augmentation("none"))
    live = take(loader(dataset, tokenizer, plain), 4)
    stored = take(loader(dataset, tokenizer, view(augmentation=Augmentation("none"), input="p16")), 4)
    for a, b in zip(live, stored, strict=True):
        assert torch.equal(a.batch.rows, b.batch.rows)
        for i in range(4):
            height, width = a.batch.image_sizes[i].tolist()
            image = a.batch.pixel_values[i, :, :height, :width].permute(1, 2, 0).numpy()
            count = int(b.batch.patch_mask[i].sum())
            assert np.array_equal(patchify(image, 16), b.batch.patches[i, :count].numpy())
            assert b.batch.grid[i].tolist() == [height // 16, width // 16]
            assert not b.batch.patches[i, count:].any()


def test_other_augmentation_than_flips_on_patches_is_an_error(tmp_path, tokenizer):
    dataset = make_dataset(tmp_path / "ds", rows=2)
    write_patches(dataset, ["ok", "ok"])
    with pytest.raises(PairmillError, match="vilt-randaug"):
        loader(dataset, tokenizer, view(input="patches"), batch_size=2)


def test_batch_must_divide_among_processes(dataset, tokenizer):
    with pytest.raises(PairmillError, match="does not divide by 3"):
        loader(dataset, tokenizer, world=3)


def test_a_stored_image_that_no_longer_decodes_names_its_row(tmp_path, tokenizer):
    dataset = make_dataset(tmp_path / "ds", shards=1, rows=2, corrupt={(0, 1)})
    with pytest.raises(PairmillError, match="shard 0 row 1"):
        take(loader(dataset, tokenizer, batch_size=2), 1)
