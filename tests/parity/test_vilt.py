"""ViLT against dandelin/ViLT's own infer, objectives and visual_embed."""

from __future__ import annotations

import pytest
import torch

from tests.parity.golden import check_outputs, golden
from training.batch import Batch
from training.config_models import ViLTConfig
from training.models.vilt import KEY_MAP, ViLT, config_from_shapes
from training.objectives import Together
from training.objectives.alignment import WordPatchAlignment
from training.objectives.masked_language import MaskedLanguage
from training.objectives.matching import Matching, Ranking, match_labels

FROM_CASE = {"heads": "heads", "width": "hidden", "layers": "layers", "mlp_ratio": "mlp_ratio"} | {
    "vocab": "vocab_size",
    "max_text_len": "max_text_len",
    "image_size": "image_size",
    "patch": "patch",
}


def build(case, *heads: str) -> ViLT:
    numbers = {ours: case.config[theirs] for ours, theirs in FROM_CASE.items()}
    config = ViLTConfig(**numbers, model_heads=heads)
    model = ViLT(config).eval()
    report = model.load_published(case.weights)
    assert report.missing == ()
    assert report.unexpected == ()
    assert config_from_shapes(case.weights, case.config["heads"]) == config
    return model


def grads(model: ViLT, loss: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Gradients of `loss` under the original's parameter names."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    found = KEY_MAP.to_published({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    return {name: found[name] for name in names}


def names_under(case, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in case.outputs if name.startswith(prefix)]


def subset_choice(case, counts: torch.Tensor) -> torch.Tensor:
    """The case's recorded choice; its rows of -1 keep all their patches in order."""
    choice = case.inputs["subset_choice"].clone()
    for row in (choice < 0).all(1).nonzero()[:, 0].tolist():
        choice[row, : counts[row]] = torch.arange(int(counts[row]))
    return choice


@pytest.mark.parametrize("case", golden("vilt_pretrain"), ids=str)
def test_pretraining(case):
    model = build(case, "masked_language", "matching")
    given = case.inputs
    batch = Batch(input_ids=given["text_ids"], text_mask=given["text_masks"].bool(), pixel_values=given["image"])
    sizes = torch.tensor(case.config["sizes"])
    assert torch.equal(model.patch_grid(batch), sizes)

    image = model.embed_image(batch)
    tokens = model(batch, route="tokens")
    assert torch.equal(tokens.image_mask, image.mask)
    chosen = model.embed_image(batch.replace(patch_choice=subset_choice(case, sizes.prod(1))))

    masked = batch.replace(input_ids=given["text_ids_mlm"], labels=given["text_labels_mlm"])
    mlm = MaskedLanguage(masker=None)
    mlm_outputs = model(masked, route=mlm.route)
    mlm_loss, _ = mlm.loss(mlm_outputs, masked)

    labels = match_labels(given["itm_perm"], len(batch))
    paired = batch.choose_images(Batch(pixel_values=given["false_image_0"]), labels == 1)
    paired = paired.replace(match_labels=labels)
    matching, alignment = Matching(), WordPatchAlignment()
    itm_outputs = model(paired, route=matching.route)
    itm_loss, _ = matching.loss(itm_outputs, paired)
    wpa_loss, _ = alignment.loss(itm_outputs, paired)
    distance, cost, plan = alignment.distances(itm_outputs)
    shared, _ = Together([(1.0, matching), (0.1, alignment)]).loss(itm_outputs, paired)
    total = mlm_loss + shared

    got = {
        "text_feats": tokens.text,
        "image_feats": tokens.image,
        "cls_feats": tokens.pooled,
        "raw_cls_feats": tokens.text[:, 0],
        "image_embeds": image.tokens,
        "image_masks": image.mask.long(),
        "patch_index": image.place,
        "subset_embeds": chosen.tokens,
        "subset_masks": chosen.mask.long(),
        "subset_patch_index": chosen.place,
        "mlm_logits": mlm_outputs.token_logits,
        "mlm_loss": mlm_loss,
        "itm_labels": labels.float(),
        "itm_logits": itm_outputs.match_logits,
        "itm_loss": itm_loss,
        "itm_wpa_loss": 0.1 * wpa_loss,
        "ot_cost": cost,
        "ot_T": plan,
        "ot_distance": distance,
        "total_loss": total,
    }
    got |= {f"grad.{n}": g for n, g in grads(model, total, names_under(case, "grad.")).items()}
    wpa_names = names_under(case, "wpa_grad.")
    got |= {f"wpa_grad.{n}": g for n, g in grads(model, 0.1 * wpa_loss, wpa_names).items()}
    # Padding holds random patches in the original, zeros in ours; nobody attends to it.
    where = {
        "image_feats": image.mask,
        "image_embeds": image.mask,
        "patch_index": image.mask[:, 1:],
        "subset_embeds": chosen.mask,
        "subset_patch_index": chosen.mask[:, 1:],
    }
    check_outputs(case, got, where=where)


@pytest.mark.parametrize("case", golden("vilt_irtr"), ids=str)
def test_retrieval(case):
    model = build(case, "masked_language", "matching", "ranking")
    given = case.inputs
    mask = given["text_masks"].bool()
    batch = Batch(
        input_ids=given["text_ids"],
        text_mask=mask,
        false_ids=given["false_ids"],
        false_mask=given["false_masks"].bool(),
        pixel_values=given["image"],
    )
    ranking = Ranking()
    prepared = ranking.prepare(batch, torch.Generator())
    outputs = model(prepared, route=ranking.route)
    loss, _ = ranking.loss(outputs, prepared)

    P = case.config["patch"]
    rows = []
    for (height, width), image in zip(case.config["sizes"], given["image"], strict=True):
        alone = Batch(
            input_ids=given["text_ids"],
            text_mask=mask,
            pixel_values=image[None, :, : height * P, : width * P].expand(len(mask), -1, -1, -1),
        )
        rows.append(model(alone, route="ranking").rank_scores)
    got = {
        "irtr_loss": loss,
        "score": outputs.rank_scores.view(len(mask), -1),
        "rank_matrix": torch.stack(rows),
    }
    check_outputs(case, got)
