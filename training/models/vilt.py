"""ViLT whole: Kim et al. 2021, one transformer over text tokens and linear patches (dandelin/ViLT vilt_module.py).

Shape letters: B pairs, T text tokens, N patches, P side of a patch in px, D width, g side of the position table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.errors import PairmillError
from training.batch import Batch
from training.config_models import ViLTConfig, ViLTHead
from training.key_maps import KeyMap, LoadReport, rules
from training.layers import (
    Blocks,
    MaskedLanguageHead,
    Normalise,
    Pooler,
    PreNormBlock,
    TextEmbeddings,
    classifier,
    init_normal,
)
from training.models.base import VisionLanguageModel
from training.outputs import Outputs
from training.weights import Checkpoint, read_checkpoint

MEAN = STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ImageTokens:
    """An embedded image: the class token, then the patches.

    tokens  [B, 1+N, D]  with positions; 0 at padding
    mask    [B, 1+N]     bool
    place   [B, N, 2]    int64, (row, column) of each patch
    """

    tokens: Tensor
    mask: Tensor
    place: Tensor


def extents(pixels: Tensor, patch: int) -> Tensor:
    """(rows, columns) of patches with a pixel other than 0, of float images padded bottom and right: [B, 2].

    The original looks at the first pixel of each patch; a black line there loses patches.
    """
    used = F.max_pool2d((pixels != 0).any(1, keepdim=True).float(), patch)[:, 0] > 0
    return torch.stack([used.any(2).sum(1), used.any(1).sum(1)], dim=1)


def draw_patches(counts: Tensor, length: int, seeds: list[int], permute: bool = False) -> Tensor:
    """Which of `counts` [B] valid patches to keep, at most `length`: [B, length] raster indices, -1 = none.

    A random subset, in raster order, where there are more; with `permute` in random order and also where there are
    exactly as many (the original, through torch.multinomial).
    """
    choice = torch.full((len(counts), length), -1, dtype=torch.int64)
    for row, (count, seed) in enumerate(zip(counts.tolist(), seeds, strict=True)):
        kept = torch.arange(min(count, length))
        if count > length or (permute and count == length):
            kept = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:length]
            kept = kept if permute else kept.sort().values
        choice[row, : len(kept)] = kept
    return choice


def interpolation(index: Tensor, length: Tensor, side: int) -> Tensor:
    """Weights of bilinear interpolation along one axis, corners aligned.

    index [B, N] places 0 .. length-1, length [B] -> [B, N, side]: place i lies at i*(side-1)/(length-1).
    """
    step = (side - 1) / (length - 1).clamp(min=1).float()
    at = index * torch.where(length > 1, step, 0.0)[:, None]
    return (1 - (at[..., None] - torch.arange(side, device=index.device)).abs()).clamp(min=0)


class ViLT(VisionLanguageModel):
    """One transformer reads [text | image class token | patches]; heads read its tokens or its pooled vector."""

    config: ViLTConfig
    head_prefixes = ("heads.",)

    def __init__(self, config: ViLTConfig) -> None:
        super().__init__(config)
        D = config.width
        self.routes = ("tokens", *config.model_heads)
        self.normalise = Normalise(MEAN, STD)
        self.text_embeddings = TextEmbeddings(config.vocab, config.max_text_len, D, eps=1e-12, dropout=config.dropout)
        self.token_type = nn.Embedding(1 + config.image_types, D)  # 0 text, 1 image, 2 the second image
        self.patch_embed = nn.Conv2d(3, D, config.patch, stride=config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, D))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = Blocks(
            PreNormBlock(D, config.heads, config.mlp_ratio * D, eps=1e-6, dropout=config.dropout)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.pooler = Pooler(D)
        self.heads = nn.ModuleDict({name: make_head(name, config) for name in config.model_heads})
        self.apply(partial(init_normal, std=config.init_std))
        nn.init.normal_(self.patch_embed.weight, std=config.init_std)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    @property
    def key_map(self) -> KeyMap:
        """The names of dandelin/ViLT's checkpoints."""
        return KEY_MAP

    def no_decay(self) -> set[str]:
        """Vectors; with quirks the classifiers' LayerNorm decays, whose name the original's rule does not know."""
        decayed = {"heads.vqa.1.weight", "heads.nlvr2.1.weight"} if self.config.quirks else set()
        return super().no_decay() - decayed

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """`input_ids` [B, T] int64 -> [B, T, D], with the token type of text.

        Raises PairmillError: more tokens than the model has positions for.
        """
        if input_ids.shape[1] > self.config.max_text_len:
            raise PairmillError(
                f"texts of {input_ids.shape[1]} tokens: this model has positions for {self.config.max_text_len}. "
                "Tokenize with its max_text_len."
            )
        return self.text_embeddings(input_ids) + self.token_type.weight[0]

    def embed_image(self, batch: Batch) -> ImageTokens:
        """Patches of `pixel_values` or `patches`, with positions, without token type."""
        sizes = self.patch_grid(batch)
        counts = sizes.prod(1)
        choice = batch.patch_choice
        if choice is None:
            length = int(counts.max()) if batch.patches is None else batch.patches.shape[1]
            choice = torch.arange(length, device=counts.device).expand(len(counts), -1)
            valid = choice < counts[:, None]
        else:
            valid = choice >= 0
        choice = choice.clamp(min=0)
        place = torch.stack([choice // sizes[:, 1:], choice % sizes[:, 1:]], dim=2) * valid[..., None]
        patches = self._project(batch, choice, place) + self._positions(place, sizes)
        patches = self.dropout(patches) * valid[..., None]
        first = self.dropout(self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        mask = torch.cat([valid.new_ones(len(valid), 1), valid], dim=1)
        return ImageTokens(torch.cat([first.to(patches.dtype), patches], dim=1), mask, place)

    def patch_grid(self, batch: Batch) -> Tensor:
        """(rows, columns) of patches of each image: [B, 2] int64."""
        if batch.patches is not None:
            if batch.grid is None:
                raise PairmillError("a batch of patches needs the `grid` they form")
            return batch.grid
        if batch.pixel_values is None:
            raise PairmillError("ViLT needs images: the batch has neither `pixel_values` nor `patches`")
        if batch.image_sizes is not None:
            return (batch.image_sizes // self.config.patch).clamp(min=1)
        if batch.pixel_values.dtype != torch.uint8:
            return extents(batch.pixel_values, self.config.patch)
        whole = torch.tensor(batch.pixel_values.shape[2:], device=batch.pixel_values.device)
        return (whole // self.config.patch).expand(len(batch.pixel_values), 2)

    def _project(self, batch: Batch, choice: Tensor, place: Tensor) -> Tensor:
        """The chosen patches [B, N], at `place` [B, N, 2], through the linear layer: [B, N, D]."""
        if batch.patches is not None:
            kept = batch.patches.gather(1, choice[..., None].expand(-1, -1, batch.patches.shape[2]))
            pixels = kept if kept.is_floating_point() else kept / 127.5 - 1
            weight = self.patch_embed.weight.permute(0, 2, 3, 1).flatten(1)  # stored patches are row, column, channel
            return F.linear(pixels.to(weight.dtype), weight, self.patch_embed.bias)
        assert batch.pixel_values is not None
        grid = self.patch_embed(self.normalise(batch.pixel_values))
        flat = place[..., 0] * grid.shape[3] + place[..., 1]
        return grid.flatten(2).transpose(1, 2).gather(1, flat[..., None].expand(-1, -1, grid.shape[1]))

    def _positions(self, place: Tensor, sizes: Tensor) -> Tensor:
        """The g x g table, stretched over each image's own grid, at `place` [B, N, 2]: [B, N, D]."""
        side = self.config.grid
        with torch.autocast(place.device.type, enabled=False):
            down = interpolation(place[..., 0], sizes[:, 0], side)
            right = interpolation(place[..., 1], sizes[:, 1], side)
            return (down[..., :, None] * right[..., None, :]).flatten(2) @ self.pos_embed[0, 1:].float()

    def fuse(self, text: Tensor, text_mask: Tensor, image: ImageTokens, image_types: Tensor | None = None) -> Outputs:
        """The transformer over embedded text [B, T, D] and images; `image_types` [B] int64, 1 when not given."""
        types = self.token_type.weight[1] if image_types is None else self.token_type(image_types)[:, None]
        T = text.shape[1]
        tokens = torch.cat([text, image.tokens + types], dim=1)
        tokens = self.norm(self.blocks(tokens, torch.cat([text_mask, image.mask], dim=1)))
        return Outputs(
            text=tokens[:, :T],
            text_mask=text_mask,
            image=tokens[:, T:],
            image_mask=image.mask,
            pooled=self.pooler(tokens),
        )

    def forward(self, batch: Batch, route: str = "tokens") -> Outputs:
        """One pass, and the head that `route` names ('tokens': none).

        Route 'nlvr2' takes B statements and 2B images: all left ones, then all right ones.

        Raises PairmillError: the model was built without that head.
        """
        if route not in self.routes:
            raise PairmillError(f"this ViLT has no `{route}` head, it has {', '.join(self.routes)}")
        assert batch.input_ids is not None
        ids, mask = batch.input_ids, batch.text_mask
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        types = None
        if route == "nlvr2":
            types = torch.tensor([1, 2], device=ids.device).repeat_interleave(len(ids))
            ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
        outputs = self.fuse(self.embed_text(ids), mask, self.embed_image(batch), types)
        return self._with_head(outputs, route)

    def _with_head(self, outputs: Outputs, route: str) -> Outputs:
        pooled = outputs.need("pooled")
        if route == "masked_language":
            return outputs.replace(token_logits=self.heads[route](outputs.text))
        if route == "matching":
            return outputs.replace(match_logits=self.heads[route](pooled))
        if route == "ranking":
            return outputs.replace(rank_scores=self.heads[route](pooled)[:, 0])
        if route == "vqa":
            return outputs.replace(answer_logits=self.heads[route](pooled))
        if route == "nlvr2":
            both = torch.cat(pooled.chunk(2), dim=1)
            return outputs.replace(answer_logits=self.heads[route](both))
        return outputs

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Of images with more than `max_image_len` patches keep a random subset (training)."""
        limit, quirks = self.config.max_image_len, self.config.quirks
        counts = self.patch_grid(batch).prod(1).cpu()
        if limit < 0 or (int(counts.max()) <= limit and not quirks):
            return batch
        length = min(int(counts.max()), limit)
        choice = draw_patches(counts, length, batch.draw_seeds(generator), permute=quirks)
        return batch.replace(patch_choice=choice.to(batch.device))

    def load_published(self, tensors: Mapping[str, Tensor], where: str = "the checkpoint") -> LoadReport:
        """Copy the original's weights in, as it starts a fine-tuning from them.

        A second image's token type starts as the first's, the ranking head as the matching head's row 1.

        Raises PairmillError: a shape that is not ours.
        """
        tensors = dict(tensors)
        types = tensors.get("token_type_embeddings.weight")
        if types is not None and len(types) == 2 and self.config.image_types == 2:
            tensors["token_type_embeddings.weight"] = torch.cat([types, types[1:]])
        if "ranking" in self.heads and "rank_output.weight" not in tensors and "itm_score.fc.weight" in tensors:
            tensors["rank_output.weight"] = tensors["itm_score.fc.weight"][1:]
            tensors["rank_output.bias"] = tensors["itm_score.fc.bias"][1:]
        return super().load_published(tensors, where)

    @classmethod
    def from_checkpoint(cls, checkpoint: str | Path | Checkpoint) -> ViLT:
        """The model of a published `vilt_*.ckpt`, with the heads that are in it.

        Raises PairmillError: the file's weights are not a ViLT's.
        """
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = read_checkpoint(checkpoint)
        model, where = cls(config_from_shapes(checkpoint.tensors)), str(checkpoint.path)
        model.load_published(checkpoint.tensors, where).require_whole(where)
        return model


def make_head(name: str, config: ViLTConfig) -> nn.Module:
    """The named task head."""
    D = config.width
    if name == "masked_language":
        return MaskedLanguageHead(D, config.vocab)
    if name == "vqa":
        return classifier(D, 2 * D, config.answers)
    if name == "nlvr2":
        return classifier(2 * D, 2 * D, 2)
    return nn.Linear(D, {"matching": 2, "ranking": 1}[name])


# dandelin/ViLT's Lightning checkpoints.
KEY_MAP = KeyMap(
    rules(
        ("text_embeddings.word_embeddings.weight", "text_embeddings.word.weight"),
        ("text_embeddings.position_embeddings.weight", "text_embeddings.position.weight"),
        ("text_embeddings.token_type_embeddings.weight", "text_embeddings.token_type.weight"),
        ("text_embeddings.LayerNorm.**", "text_embeddings.norm.**"),
        ("token_type_embeddings.weight", "token_type.weight"),
        ("transformer.patch_embed.proj.**", "patch_embed.**"),
        ("transformer.cls_token", "cls_token"),
        ("transformer.pos_embed", "pos_embed"),
        ("transformer.blocks.**", "blocks.**"),
        ("transformer.norm.**", "norm.**"),
        ("pooler.**", "pooler.**"),
        ("mlm_score.transform.dense.**", "heads.masked_language.dense.**"),
        ("mlm_score.transform.LayerNorm.**", "heads.masked_language.norm.**"),
        ("mlm_score.decoder.weight", "heads.masked_language.decoder.weight"),
        ("mlm_score.bias", "heads.masked_language.decoder.bias"),
        ("itm_score.fc.**", "heads.matching.**"),
        ("rank_output.**", "heads.ranking.**"),
        ("vqa_classifier.**", "heads.vqa.**"),
        ("nlvr2_classifier.**", "heads.nlvr2.**"),
    ),
    ignored=("text_embeddings.position_ids",),
)
# Which tensor tells that a checkpoint has the head.
HEAD_MARKS: dict[ViLTHead, str] = {
    "masked_language": "mlm_score.bias",
    "matching": "itm_score.fc.bias",
    "ranking": "rank_output.bias",
    "vqa": "vqa_classifier.3.bias",
    "nlvr2": "nlvr2_classifier.3.bias",
}


def config_from_shapes(tensors: Mapping[str, Tensor], heads: int | None = None) -> ViLTConfig:
    """The configuration that a published state dict's shapes imply; attention heads are width/64 unless given.

    Raises PairmillError: a tensor every ViLT has is not there.
    """
    try:
        D, _, patch, _ = tensors["transformer.patch_embed.proj.weight"].shape
        side = round((tensors["transformer.pos_embed"].shape[1] - 1) ** 0.5)
        vocab = len(tensors["text_embeddings.word_embeddings.weight"])
        positions = len(tensors["text_embeddings.position_embeddings.weight"])
        types = len(tensors["token_type_embeddings.weight"]) - 1
        hidden = len(tensors["transformer.blocks.0.mlp.fc1.bias"])
    except KeyError as error:
        raise PairmillError(f"not a ViLT checkpoint: it has no {error}") from None
    depth = {name.split(".")[2] for name in tensors if name.startswith("transformer.blocks.")}
    answers = tensors.get(HEAD_MARKS["vqa"])
    default = ViLTConfig.model_fields["answers"].default
    return ViLTConfig(
        width=D,
        layers=len(depth),
        heads=heads or max(1, D // 64),
        mlp_ratio=hidden // D,
        vocab=vocab,
        max_text_len=positions,
        image_size=side * patch,
        patch=patch,
        image_types=types,
        model_heads=tuple(name for name, mark in HEAD_MARKS.items() if mark in tensors),
        answers=default if answers is None else len(answers),
    )
