"""Published filters as recipes, as far as pairs and scores allow; what one leaves out is in its name and `lacks`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from schemas.errors import PairmillError, suggest


@dataclass(frozen=True)
class Preset:
    """A published filter.

    `needs`: columns that a score set must bring -> the command that makes them. `model`: the model its numbers are for,
    as a score set's configuration names it.
    """

    rules: tuple[dict[str, Any], ...]
    source: str
    comparisons: str
    lacks: str = ""
    needs: tuple[tuple[str, str], ...] = ()
    model: str | None = None


_DATACOMP = "mlfoundations/datacomp@4a8df19 baselines/apply_filter.py"
_CLIP = (("clip_score", "pairmill score clip DATASET"),)

PRESETS: dict[str, Preset] = {
    "datacomp-clip-l14-30": Preset(
        ({"top": {"share": 0.3, "by": "clip_score", "of": "all", "ties": "datacomp", "name": "clip_score top 30 %"}},),
        f"{_DATACOMP}, clip_score with --arch l14 --fraction 0.3",
        "clip_score >= t, t = the score at place int(n * 0.3) (from 0) of all n successes, highest first",
        needs=_CLIP,
        model="ViT-L-14",
    ),
    "datacomp-basic-size": Preset(
        (
            {"where": {"expr": "caption_words > 2", "name": "more than 2 words"}},
            {"where": {"expr": "char_length(caption) > 5", "name": "more than 5 characters"}},
            {"where": {"expr": "least(original_width, original_height) >= 200", "name": "shorter side 200 px"}},
            {
                "where": {
                    "expr": "greatest(original_width, original_height) <= 3.0 * least(original_width, original_height)",
                    "name": "aspect at most 3",
                }
            },
        ),
        f"{_DATACOMP}, basic_filter",
        "len(text.split()) > 2, len(text) > 5, min(original side) >= 200, max / min <= 3.0",
        lacks="the language condition (fastText label `en`)",
    ),
    "laion400m-clip": Preset(
        (
            {"where": {"expr": "char_length(caption) >= 5", "name": "5 characters"}},
            {"where": {"expr": "clip_score >= 0.3", "name": "clip_score 0.3"}},
        ),
        "LAION-AI/laion.ai blog/laion-400-open-dataset.md, steps 1 and 5",
        "fewer than 5 characters dropped, cosine below 0.3 dropped",
        lacks="files under 5 KB, duplicates by URL and text, NSFW and category rules",
        needs=_CLIP,
        model="ViT-B-32",
    ),
    "laion2b-clip": Preset(
        (
            {"where": {"expr": "char_length(caption) >= 5", "name": "5 characters"}},
            {"where": {"expr": "clip_score >= 0.28", "name": "clip_score 0.28"}},
        ),
        "LAION-AI/laion.ai blog/laion-5b.md",
        "fewer than 5 characters dropped, cosine >= 0.28",
        lacks="the language condition (cld3 `en`), files under 5 KB, duplicates by URL",
        needs=_CLIP,
        model="ViT-B-32",
    ),
    "coyo-size": Preset(
        (
            {"where": {"expr": "least(original_width, original_height) >= 200", "name": "shorter side 200 px"}},
            {
                "where": {
                    "expr": "greatest(original_width, original_height) <= 3.0 * least(original_width, original_height)",
                    "name": "aspect at most 3",
                }
            },
            {"where": {"expr": "caption_words between 3 and 256", "name": "3 to 256 words"}},
            {"where": {"expr": "caption_collapsed_characters between 6 and 1000", "name": "6 to 1000 characters"}},
        ),
        "kakaobrain/coyo-dataset README",
        "min side >= 200, aspect <= 3.0, 3 <= words <= 256, 5 < characters <= 1000 after whitespace is collapsed",
        lacks="files under 5 KB, NSFW, decontamination, language, noun, profanity, frequent texts, duplicates",
    ),
    "cc12m-size": Preset(
        (
            {"where": {"expr": "least(original_width, original_height) > 400", "name": "shorter side over 400 px"}},
            {
                "where": {
                    "expr": "greatest(original_width, original_height) <= 2.5 * least(original_width, original_height)",
                    "name": "aspect at most 2.5",
                }
            },
            {"where": {"expr": "caption_words between 3 and 256", "name": "3 to 256 words"}},
        ),
        "google-research-datasets/conceptual-12m, quoting Changpinyo et al. 2021",
        "sides > 400 px, aspect <= 2.5, 3 <= words <= 256",
        lacks="JPEG only, adult filter, noun and determiner, repeated words, rare words",
    ),
}


def preset(name: str) -> Preset:
    """Raises PairmillError for an unknown name, with the list."""
    if name not in PRESETS:
        raise PairmillError(f"There is no preset `{name}`.{suggest(name, PRESETS)} There are: {', '.join(PRESETS)}.")
    return PRESETS[name]
