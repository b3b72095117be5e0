"""Which CLIP a published head was made for, and whether the stored embeddings come from that one.

A head gives numbers for the embeddings of any CLIP of its width; they mean something for one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from schemas.errors import PairmillError
from schemas.sidecars import Sidecar

COLUMN = "clip_image"
_DIGITS = 12  # of a hash, at least, to name it by


@dataclass(frozen=True)
class Clip:
    """A CLIP as features tell it.

    title    for people
    command  how to make its embeddings
    labels   what `score clip` calls it: open_clip name and tag, or the name of the folder on the hub
    sha256   of its weights where the publisher tells it
    hint     in the file name of a head made for it
    """

    title: str
    command: str
    labels: tuple[str, ...]
    sha256: str = ""
    hint: str = ""


def _openai(title: str, name: str, hub: str, sha256: str, hint: str) -> Clip:
    command = f"--model {name}-quickgelu --pretrained openai"
    return Clip(title, command, (f"{name}-quickgelu openai", hub), sha256, hint)


# The hashes are in the URLs that openai/CLIP gives, the folders in open_clip's table of pretrained weights.
L14 = _openai(
    "OpenAI's ViT-L/14",
    "ViT-L-14",
    "vit_large_patch14_clip_224.openai",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "l14",
)
B32 = _openai(
    "OpenAI's ViT-B/32",
    "ViT-B-32",
    "vit_base_patch32_clip_224.openai",
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "b32",
)
B16 = _openai(
    "OpenAI's ViT-B/16",
    "ViT-B-16",
    "vit_base_patch16_clip_224.openai",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "b16",
)
H14 = Clip(
    "open_clip's ViT-H/14 of LAION-2B",
    "--model ViT-H-14 --pretrained laion2b_s32b_b79k",
    ("ViT-H-14 laion2b_s32b_b79k", "CLIP-ViT-H-14-laion2B-s32B-b79K"),
    hint="h14",
)
# The published heads of each kind, by the width of their embeddings.
PUBLISHED: dict[tuple[str, int], tuple[Clip, ...]] = {
    ("aesthetic", 768): (L14,),
    ("aesthetic", 512): (B32, B16),
    ("safety", 768): (L14,),
    ("safety", 512): (B32,),
    ("safety", 1024): (H14,),
}


def check_clip(sidecar: Sidecar, kind: str, dim: int, file: str, made_for: str | None, where: str) -> str:
    """Whose embeddings they are, as the sidecar of the features tells it.

    kind, dim  of the head; file: its file name, which tells the CLIP where the width does not
    made_for   the user's word for it: the label or the sha256 that the features have
    where      the features, for the message

    Raises PairmillError: no CLIP embeddings, another width, another CLIP, or none can tell.
    """
    told: dict[str, Any] = sidecar.columns.get(COLUMN, {})
    label, weights = str(told.get("model", "")), str(told.get("weights", ""))
    if not label or not weights:
        raise PairmillError(
            f"{where} does not tell which CLIP made it. A head reads what `pairmill score clip` writes: run that first."
        )
    width = sidecar.identity.get("architecture", {}).get("embed_dim")
    if width != dim:
        fit = " or ".join(f"`pairmill score clip DATASET {c.command}`" for c in PUBLISHED.get((kind, dim), ()))
        raise PairmillError(
            f"a head made for another CLIP: {file} takes embeddings of width {dim}, {where} ({label}) has {width}. "
            + (f"Make fitting ones with {fit}, and pass --features where they have a name of their own." if fit else "")
        )
    if made_for is not None:
        if made_for != label and not (len(made_for) >= _DIGITS and weights.startswith(made_for.lower())):
            raise PairmillError(
                f"a head made for another CLIP: `--made-for {made_for}`, but {where} comes from {label} "
                f"({weights[:_DIGITS]}). Pass --features with the embeddings of that CLIP."
            )
        return label
    fitting = _published(kind, dim, file)
    if any(label in clip.labels or weights == clip.sha256 for clip in fitting) and len(fitting) == 1:
        return label
    same = f"If it was made for these very embeddings, say so: --made-for '{label}'."
    if len(fitting) != 1:
        names = " or ".join(clip.title for clip in fitting)
        why = (
            f"{file} may be made for {names}: its name does not tell which"
            if names
            else f"no {kind} head of width {dim} is published, so that nothing tells which CLIP {file} was made for"
        )
        raise PairmillError(f"{why}; {where} comes from {label}. {same}")
    raise PairmillError(
        f"a head made for another CLIP: published {kind} heads of width {dim} are for {fitting[0].title}, {where} "
        f"comes from {label} (weights {weights[:_DIGITS]}). Run `pairmill score clip DATASET {fitting[0].command} "
        f"--name NAME` and pass --features NAME. {same}"
    )


def _published(kind: str, dim: int, file: str) -> tuple[Clip, ...]:
    """The CLIPs it may be for; one where the file's name tells."""
    plain = "".join(c for c in file.lower() if c.isalnum())
    found = PUBLISHED.get((kind, dim), ())
    named = tuple(clip for clip in found if clip.hint in plain)
    return named if len(named) == 1 else found
