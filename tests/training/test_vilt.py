"""ViLT beyond its golden cases: patches, padding, subsets, heads, checkpoints."""

import pytest
import torch
import torch.nn.functional as F

from schemas.errors import PairmillError
from training.batch import Batch
from training.config_models import VILT_SIZES, ViLTConfig
from training.models.vilt import ViLT, draw_patches, extents, interpolation
from training.registry import parameter_count

P = 8
TINY = ViLTConfig(
    width=32,
    layers=2,
    heads=4,
    mlp_ratio=2,
    vocab=40,
    max_text_len=7,
    image_size=32,
    patch=P,
    max_image_len=5,
    dropout=0.0,
    model_heads=("masked_language", "matching", "ranking", "vqa", "nlvr2"),
    image_types=2,
    answers=11,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return ViLT(TINY).eval()


def text(B=3, T=6):
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 4:] = False
    return {"input_ids": torch.randint(TINY.vocab, (B, T)), "text_mask": mask}


def pixels(sizes, H=None, W=None):
    """uint8 images of (rows, columns) patches in a zero-padded batch, and their sizes in px."""
    sizes = torch.tensor(sizes) * P
    H, W = H or int(sizes[:, 0].max()), W or int(sizes[:, 1].max())
    batch = torch.zeros(len(sizes), 3, H, W, dtype=torch.uint8)
    for image, (h, w) in zip(batch, sizes.tolist(), strict=True):
        image[:, :h, :w] = torch.randint(256, (3, h, w), dtype=torch.uint8)
    return {"pixel_values": batch, "image_sizes": sizes}


def to_patches(images):
    """The same images as stored patches: row, column, channel."""
    grids = images["image_sizes"] // P
    longest = int(grids.prod(1).max()) + 2
    stored = torch.zeros(len(grids), longest, P * P * 3, dtype=torch.uint8)
    for i, (rows, columns) in enumerate(grids.tolist()):
        image = images["pixel_values"][i].permute(1, 2, 0)
        cut = [image[r * P : (r + 1) * P, c * P : (c + 1) * P] for r in range(rows) for c in range(columns)]
        stored[i, : rows * columns] = torch.stack(cut).flatten(1)
    mask = torch.arange(longest)[None] < grids.prod(1)[:, None]
    return {"patches": stored, "grid": grids, "patch_mask": mask}


SIZES = [(2, 3), (4, 1), (1, 1)]


def test_parameter_counts():
    whole = VILT_SIZES["ViLT-B-32"]
    assert parameter_count(whole) == 135_660_092
    assert parameter_count(whole.model_copy(update={"model_heads": ()})) == 111_595_008


def test_stored_patches_give_what_pixels_give(model):
    images, words = pixels(SIZES), text()
    from_pixels = model(Batch(**words, **images))
    from_patches = model(Batch(**words, **to_patches(images)))
    torch.testing.assert_close(from_pixels.pooled, from_patches.pooled)
    N = from_pixels.image.shape[1]
    valid = from_pixels.image_mask
    assert torch.equal(valid, from_patches.image_mask[:, :N])
    assert not from_patches.image_mask[:, N:].any()
    torch.testing.assert_close(from_pixels.image[valid], from_patches.image[:, :N][valid])


def test_uint8_and_normalised_floats_agree(model):
    images, words = pixels(SIZES), text()
    floats = images | {"pixel_values": images["pixel_values"] / 127.5 - 1}
    torch.testing.assert_close(model(Batch(**words, **images)).pooled, model(Batch(**words, **floats)).pooled)


def test_neither_padding_nor_neighbours_change_a_pair(model):
    images, words = pixels(SIZES, 48, 40), text()
    together = model(Batch(**words, **images))
    for i, (rows, columns) in enumerate(SIZES):
        alone = Batch(
            input_ids=words["input_ids"][i : i + 1, : int(words["text_mask"][i].sum())],
            pixel_values=images["pixel_values"][i : i + 1, :, : rows * P, : columns * P],
        )
        torch.testing.assert_close(model(alone).pooled[0], together.pooled[i], rtol=1e-4, atol=1e-5)


def test_evaluation_is_deterministic_and_pads_with_zeros(model):
    batch = Batch(**text(), **pixels(SIZES))
    first, second = model.embed_image(batch), model.embed_image(batch)
    assert torch.equal(first.tokens, second.tokens)
    assert not first.tokens[~first.mask].any()


def test_positions_are_bilinear_with_aligned_corners(model):
    table = model.pos_embed[:, 1:].view(1, 4, 4, -1).permute(0, 3, 1, 2)
    for rows, columns in ((1, 1), (2, 7), (4, 4), (9, 3), (1, 5)):
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))[None]
        found = model._positions(place, torch.tensor([[rows, columns]]))
        want = F.interpolate(table, (rows, columns), mode="bilinear", align_corners=True)
        torch.testing.assert_close(found, want.flatten(2).transpose(1, 2))


def test_interpolation_weights_sum_to_one():
    weights = interpolation(torch.arange(6).expand(2, -1), torch.tensor([6, 11]), 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6))


def test_extents_see_past_a_black_first_pixel():
    image = torch.zeros(1, 3, 4 * P, 4 * P)
    image[:, :, : 2 * P, : 3 * P] = 1
    image[:, :, 0] = 0
    image[:, :, :, 0] = 0
    assert extents(image, P).tolist() == [[2, 3]]


def test_drawn_patches_are_a_random_subset_in_order():
    counts = torch.tensor([9, 4, 6])
    choice = draw_patches(counts, 6, seeds=[1, 2, 3])
    assert choice[1].tolist() == [0, 1, 2, 3, -1, -1]
    assert choice[2].tolist() == [0, 1, 2, 3, 4, 5]
    assert (choice[0].diff() > 0).all()
    assert choice[0].max() < 9
    drawn = torch.cat([draw_patches(counts[:1], 6, [seed]).flatten() for seed in range(300)])
    shares = drawn.bincount(minlength=9) / 300
    assert ((shares - 6 / 9).abs() < 0.12).all()


def test_quirk_permutes_images_at_the_limit():
    choice = draw_patches(torch.tensor([6, 5]), 6, seeds=[1, 2], permute=True)
    assert choice[0].tolist() != list(range(6))
    assert sorted(choice[0].tolist()) == list(range(6))
    assert choice[1].tolist() == [0, 1, 2, 3, 4, -1]


@pytest.mark.parametrize("stored", [False, True])
def test_training_keeps_a_subset_drawn_from_the_generator(model, stored):
    images = pixels([(3, 3), (2, 2), (4, 2)])
    batch = Batch(**text(), **(to_patches(images) if stored else images))
    first = model.prepare(batch, torch.Generator().manual_seed(1))
    again = model.prepare(batch, torch.Generator().manual_seed(1))
    other = model.prepare(batch, torch.Generator().manual_seed(2))
    assert first.patch_choice.shape == (3, TINY.max_image_len)
    assert torch.equal(first.patch_choice, again.patch_choice)
    assert not torch.equal(first.patch_choice, other.patch_choice)
    kept, whole = model.embed_image(first), model.embed_image(batch)
    assert kept.tokens.shape[1] == 1 + TINY.max_image_len
    for row in range(3):
        chosen = first.patch_choice[row]
        chosen = chosen[chosen >= 0]
        torch.testing.assert_close(kept.tokens[row, 1:][: len(chosen)], whole.tokens[row, 1:][chosen])
        assert kept.mask[row].sum() == 1 + len(chosen)


def test_small_images_and_unlimited_models_keep_all(model):
    batch = Batch(**text(), **pixels(SIZES))
    limit = model.config.model_copy(update={"max_image_len": -1})
    big = Batch(**text(), **pixels([(4, 4)] * 3))
    assert ViLT(limit).prepare(big, torch.Generator()) is big
    assert ViLT(limit.model_copy(update={"max_image_len": 6})).prepare(batch, torch.Generator()) is batch


def test_draws_do_not_depend_on_the_number_of_processes(model):
    batch = Batch(**text(4), **pixels([(3, 3), (2, 2), (4, 2), (2, 4)]))
    whole = model.prepare(batch.replace(total=4), torch.Generator().manual_seed(5))
    for start in (0, 2):
        part = Batch(**{n: t[start : start + 2] for n, t in batch.tensors.items()}, start=start, total=4)
        drawn = model.prepare(part, torch.Generator().manual_seed(5))
        assert torch.equal(drawn.patch_choice, whole.patch_choice[start : start + 2])


def test_every_head_and_route(model):
    batch = Batch(**text(), **pixels(SIZES))
    D, V = TINY.width, TINY.vocab
    assert model(batch, route="masked_language").token_logits.shape == (3, 6, V)
    assert model(batch, route="matching").match_logits.shape == (3, 2)
    assert model(batch, route="ranking").rank_scores.shape == (3,)
    assert model(batch, route="vqa").answer_logits.shape == (3, TINY.answers)
    assert model(batch, route="tokens").text.shape == (3, 6, D)
    with pytest.raises(PairmillError, match="gave no `match_logits`"):
        model(batch, route="tokens").need("match_logits")
    with pytest.raises(PairmillError, match="no `matching` head, it has tokens, vqa"):
        ViLT(TINY.model_copy(update={"model_heads": ("vqa",)}))(batch, route="matching")


def test_nlvr2_reads_two_images_with_two_token_types(model):
    words, images = text(2), pixels([(2, 3), (4, 1), (1, 2), (3, 3)])
    outputs = model(Batch(**words, **images), route="nlvr2")
    assert outputs.answer_logits.shape == (2, 2)
    passes = []
    for half, kind in ((slice(0, 2), 1), (slice(2, 4), 2)):
        image = model.embed_image(Batch(**{n: t[half] for n, t in images.items()}))
        types = torch.full((2,), kind)
        passes.append(model.fuse(model.embed_text(words["input_ids"]), words["text_mask"], image, types).pooled)
    torch.testing.assert_close(outputs.answer_logits, model.heads["nlvr2"](torch.cat(passes, 1)))


def test_checkpoints_round_trip(tmp_path, model):
    from training.registry import model_from_checkpoint

    model.save(tmp_path)
    again = model_from_checkpoint(tmp_path)
    assert again.config == TINY
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_published_checkpoints_load_with_their_heads(tmp_path):
    usual = TINY.model_copy(update={"width": 64, "heads": 1, "max_image_len": 200, "dropout": 0.1, "image_types": 1})
    usual = usual.model_copy(update={"model_heads": ("masked_language", "matching"), "answers": 3129})
    source = ViLT(usual)
    state = source.published_state() | {"text_embeddings.position_ids": torch.arange(7)[None]}
    torch.save({"state_dict": state, "hyper_parameters": {"lr": 1e-4}}, tmp_path / "vilt.ckpt")
    model = ViLT.from_checkpoint(tmp_path / "vilt.ckpt")
    assert model.config == usual
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    torch.save({"a": torch.ones(1)}, tmp_path / "other.ckpt")
    with pytest.raises(PairmillError, match="not a ViLT checkpoint"):
        ViLT.from_checkpoint(tmp_path / "other.ckpt")


def test_fine_tuning_starts_from_pretrained_parts():
    pretrained = ViLT(TINY.model_copy(update={"image_types": 1, "model_heads": ("masked_language", "matching")}))
    state = pretrained.published_state()
    model = ViLT(TINY.model_copy(update={"model_heads": ("ranking", "nlvr2")}))
    report = model.load_published(state)
    assert torch.equal(model.token_type.weight[2], pretrained.token_type.weight[1])
    assert torch.equal(model.heads["ranking"].weight[0], pretrained.heads["matching"].weight[1])
    assert {name.split(".")[1] for name in report.missing} == {"nlvr2"}
    assert {name.split(".")[0] for name in report.unexpected} == {"mlm_score", "itm_score"}


def test_no_decay_and_its_quirk(model):
    free = model.no_decay()
    assert {"norm.weight", "pooler.dense.bias", "heads.vqa.1.weight"} <= free
    assert not free & {"pos_embed", "cls_token", "token_type.weight"}
    quirky = ViLT(TINY.model_copy(update={"quirks": True})).no_decay()
    assert free - quirky == {"heads.vqa.1.weight", "heads.nlvr2.1.weight"}


def test_inputs_it_cannot_use_are_errors(model):
    with pytest.raises(PairmillError, match="needs images"):
        model(Batch(**text()))
    with pytest.raises(PairmillError, match="needs the `grid`"):
        model(Batch(**text(), patches=torch.zeros(3, 4, P * P * 3)))
    with pytest.raises(PairmillError, match="positions for 7"):
        model(Batch(**text(3, 8), **pixels(SIZES)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 30}, "not a multiple of patch 8"),
        ({"heads": 5}, "heads 5 does not divide"),
        ({"max_image_len": 0}, "max_image_len"),
        ({"image_types": 1}, "needs image_types 2"),
    ],
)
def test_configurations_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        ViLTConfig(**(TINY.model_dump() | change))
