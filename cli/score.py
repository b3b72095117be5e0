"""`pairmill score ...`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cli.options import Common, command, finish, new_app
from curation.scores.config import (
    AestheticScoreConfig,
    ExprScoreConfig,
    HashScoreConfig,
    ImageScoreConfig,
    LanguageScoreConfig,
    SafetyScoreConfig,
    TextScoreConfig,
    UserScoreConfig,
    WatermarkScoreConfig,
)
from extractors.config import ClipScoreConfig


class Scorers(TyperGroup):
    """Our scorers, and those of installed packages by their entry points, which are looked up only when asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        from curation.scores.entry_points import scorers

        own = super().list_commands(ctx)
        return [*own, *(name for name in scorers() if name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        from curation.scores.entry_points import scorers

        own = super().get_command(ctx, cmd_name)
        if own is not None or cmd_name not in scorers():
            return own
        return user_command(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if self.get_command(ctx, args[0]) is None:
            from curation.scores.entry_points import find_scorer

            find_scorer(args[0], super().list_commands(ctx))
        return super().resolve_command(ctx, args)


app = new_app()
score = new_app(help="Score every pair; scores lie beside the pairs.", cls=Scorers)
app.add_typer(score, name="score")
DATASET = Annotated[str, typer.Argument(help="The dataset, a folder or URL.")]


@score.callback()
def _score() -> None:
    """Score every pair; scores lie beside the pairs."""


@command(score, "clip", ClipScoreConfig, example="pairmill score clip DATASET --model runs/clip")
def clip(config: ClipScoreConfig, common: Common, dataset: DATASET) -> int:
    """Score how well caption and image go together: the raw cosine of a CLIP, and both embeddings as features."""
    from extractors.clip import score_clip

    with common.drawer() as emit:
        return finish(score_clip(dataset, config, emit))


@command(score, "text", TextScoreConfig, example="pairmill score text DATASET")
def text(config: TextScoreConfig, common: Common, dataset: DATASET) -> int:
    """Count each caption's characters, words and repetitions, and how often the dataset has it."""
    from curation.scores.text import score_text

    with common.drawer() as emit:
        return finish(score_text(dataset, config, emit))


@command(score, "language", LanguageScoreConfig, example="pairmill score language DATASET")
def language(config: LanguageScoreConfig, common: Common, dataset: DATASET) -> int:
    """Tell which language each caption is written in, and how sure the model is."""
    from curation.scores.language import score_language

    with common.drawer() as emit:
        return finish(score_language(dataset, config, emit))


@command(score, "image", ImageScoreConfig, example="pairmill score image DATASET")
def image(config: ImageScoreConfig, common: Common, dataset: DATASET) -> int:
    """Measure each image: aspect, light, contrast, sharpness, entropy, colours."""
    from curation.scores.image import score_image

    with common.drawer() as emit:
        return finish(score_image(dataset, config, emit))


@command(score, "hash", HashScoreConfig, example="pairmill score hash DATASET")
def hash_(config: HashScoreConfig, common: Common, dataset: DATASET) -> int:
    """Hash each image: pHash and dHash, which near copies share, and a hash of its very pixels."""
    from curation.scores.hashes import score_hash

    with common.drawer() as emit:
        return finish(score_hash(dataset, config, emit))


@command(score, "aesthetic", AestheticScoreConfig, example="pairmill score aesthetic DATASET --weights linearMSE.pth")
def aesthetic(config: AestheticScoreConfig, common: Common, dataset: DATASET) -> int:
    """Rate how pleasing each image is, about 1 to 10, by a LAION head on the stored CLIP embeddings."""
    from curation.scores.embeddings import score_aesthetic

    with common.drawer() as emit:
        return finish(score_aesthetic(dataset, config, emit))


@command(score, "safety", SafetyScoreConfig, example="pairmill score safety DATASET --weights nsfw_head.pth")
def safety(config: SafetyScoreConfig, common: Common, dataset: DATASET) -> int:
    """Tell how likely each image is unsafe, 0 to 1, by a LAION head on the stored CLIP embeddings."""
    from curation.scores.embeddings import score_safety

    with common.drawer() as emit:
        return finish(score_safety(dataset, config, emit))


@command(
    score,
    "expr",
    ExprScoreConfig,
    example='pairmill score expr DATASET --expr "clip_score / aspect" --column clip_by_aspect',
)
def expr(config: ExprScoreConfig, common: Common, dataset: DATASET) -> int:
    """Compute a new column from columns that stand, by an expression as in `pairmill filter --where`.

    An aggregate, such as avg(clip_score), is that of the whole dataset.
    """
    from curation.scores.expr import score_expr

    with common.drawer() as emit:
        return finish(score_expr(dataset, config, emit))


def user_command(name: str) -> Any:
    """The command of an installed package's scorer. Its code is loaded when it runs, not for the help."""
    from curation.scores.entry_points import find_scorer, package_of

    point = find_scorer(name)
    single = new_app()

    @command(single, name, UserScoreConfig, example=f"pairmill score {name} DATASET")
    def run(config: UserScoreConfig, common: Common, dataset: DATASET) -> int:
        from curation.scores.user import score_user

        with common.drawer() as emit:
            return finish(score_user(dataset, name, config, emit))

    found = typer.main.get_command(single)
    found.help = f"{package_of(point)}: {point.value}\n\nExample: pairmill score {name} DATASET"
    return found


@command(
    score,
    "watermark",
    WatermarkScoreConfig,
    example="pairmill score watermark DATASET --weights watermark_model_v1.pt",
)
def watermark(config: WatermarkScoreConfig, common: Common, dataset: DATASET) -> int:
    """Tell how likely each image bears a watermark, 0 to 1, by LAION's detector."""
    from curation.scores.watermark import score_watermark

    with common.drawer() as emit:
        return finish(score_watermark(dataset, config, emit))
