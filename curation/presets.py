"""Published filters as recipes: exact comparisons, source, and what of each cannot be had from pairs and scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from schemas.errors import PairmillError, suggest

TARGET = "{against}"  # stands for the target set that the user names


@dataclass(frozen=True)
class Preset:
    """A published filter.

    `needs`: columns that a score set must bring -> the command that makes them. `model`: the model its numbers are for,
    as a score set's configuration names it. `lacks`: what the published filter also does and this one leaves out.
    """

    rules: tuple[dict[str, Any], ...]
    source: str
    comparisons: str
    lacks: str = ""
    needs: tuple[tuple[str, str], ...] = ()
    model: str | None = None

    @property
    def targeted(self) -> bool:
        """Whether it compares with a target set, `--against`."""
        return any(TARGET in rule.values() for item in self.rules for rule in item.values())

    def resolved(self, against: str | None, name: str) -> list[dict[str, Any]]:
        """The rules, the target set filled in. Raises PairmillError where it is missing, or is none of its settings."""
        if self.targeted and against is None:
            raise PairmillError(f"Preset {name} compares with a target set: --against DATASET, or an .npy file.")
        if against is not None and not self.targeted:
            raise PairmillError(f"Preset {name} compares with no target set: leave --against out.")
        return [
            {kind: {k: against if v == TARGET else v for k, v in rule.items()}}
            for item in self.rules
            for kind, rule in item.items()
        ]


def _where(expr: str, name: str) -> dict[str, Any]:
    return {"where": {"expr": expr, "name": name}}


def _aspect(most: float) -> dict[str, Any]:
    sides = "original_width, original_height"
    return _where(f"greatest({sides}) <= {most} * least({sides})", f"aspect at most {most:g}")


_DATACOMP = "mlfoundations/datacomp@4a8df19 baselines/apply_filter.py"
_CLIP = ("clip_score", "pairmill score clip DATASET")
_LANGUAGE = ("language", "pairmill score language DATASET")
_HASH = ("phash", "pairmill score hash DATASET")
_TEXT = ("caption_count", "pairmill score text DATASET")
_WORDS = ("unique_words", "pairmill score text DATASET")
_L14 = "ViT-L-14"

_ENGLISH = _where("language = 'en'", "language en")
_SIDE_200 = _where("least(original_width, original_height) >= 200", "shorter side 200 px")
_SIDE_400 = _where("least(original_width, original_height) > 400", "shorter side over 400 px")
_LONGER_5 = _where("char_length(caption) > 5", "more than 5 characters")
_FROM_5 = _where("char_length(caption) >= 5", "5 characters")
_WORDS_3_256 = _where("caption_words between 3 and 256", "3 to 256 words")
_TOP_30 = {"top": {"share": 0.3, "by": "clip_score", "of": "all", "ties": "datacomp", "name": "clip_score top 30 %"}}
_CAPTION = (_ENGLISH, _where("caption_words > 1", "more than 1 word"), _LONGER_5)
_CLUSTER = {"cluster": {"against": TARGET, "of": "all", "name": "clusters of the target set"}}
_CAPTION_AS_CODED = "fastText label == `en`, len(fasttext.tokenize(text)) > 1, len(text) > 5"
_CLUSTER_AS_CODED = "the nearest centroid is that of at least one target image"
_CLUSTER_LACKS = "their 100 000 centroids (fitted here on this dataset, one for every 1000 rows)"

PRESETS: dict[str, Preset] = {
    "datacomp-basic": Preset(
        (_ENGLISH, _where("caption_words > 2", "more than 2 words"), _LONGER_5, _SIDE_200, _aspect(3.0)),
        f"{_DATACOMP}, basic_filter",
        "fastText label == `en`, len(text.split()) > 2, len(text) > 5, min(original side) >= 200, max / min <= 3.0",
        needs=(_LANGUAGE,),
    ),
    "datacomp-clip-l14-30": Preset(
        (_TOP_30,),
        f"{_DATACOMP}, clip_score with --arch l14 --fraction 0.3",
        "clip_score >= t, t = the score at place int(n * 0.3) (from 0) of all n successes, highest first",
        needs=(_CLIP,),
        model=_L14,
    ),
    "datacomp-text": Preset(
        (_ENGLISH,),
        f"{_DATACOMP}, text_based",
        "fastText label == `en`",
        lacks="the condition that some word's first WordNet synset is one of ImageNet-21k's",
        needs=(_LANGUAGE,),
    ),
    "datacomp-image": Preset(
        (*_CAPTION, _CLUSTER),
        f"{_DATACOMP}, image_based",
        f"{_CAPTION_AS_CODED}; {_CLUSTER_AS_CODED}",
        lacks=_CLUSTER_LACKS,
        needs=(_LANGUAGE, _CLIP),
        model=_L14,
    ),
    "datacomp-image-and-clip": Preset(
        (_TOP_30, *_CAPTION, _CLUSTER),
        f"{_DATACOMP}, image_based_intersect_clip_score with --arch l14 --fraction 0.3",
        f"clip_score >= t of the whole pool; {_CAPTION_AS_CODED}; {_CLUSTER_AS_CODED}",
        lacks=_CLUSTER_LACKS,
        needs=(_LANGUAGE, _CLIP),
        model=_L14,
    ),
    "laion400m": Preset(
        (_FROM_5, _where("clip_score >= 0.3", "clip_score 0.3"), {"dedup": {"by": ["url", "caption"]}}),
        "LAION-AI/laion.ai blog/laion-400-open-dataset.md, steps 1, 3 and 5",
        "len(text) >= 5, cosine >= 0.3, equal URL and text kept once",
        lacks="files under 5 KB, URLs that timed out before, NSFW and category rules",
        needs=(_CLIP,),
        model="ViT-B-32",
    ),
    "laion2b-en": Preset(
        (_ENGLISH, _FROM_5, _where("clip_score >= 0.28", "clip_score 0.28"), {"dedup": {"by": "url"}}),
        "LAION-AI/laion.ai blog/laion-5b.md; mlfoundations/datacomp baselines, laion2b",
        "language == `en`, len(text) >= 5, cosine >= 0.28, equal URL kept once",
        lacks="cld3 for the language (fastText here), files under 5 KB",
        needs=(_LANGUAGE, _CLIP),
        model="ViT-B-32",
    ),
    "coyo": Preset(
        (
            _SIDE_200,
            _aspect(3.0),
            _ENGLISH,
            _WORDS_3_256,
            _where("caption_collapsed_characters between 6 and 1000", "6 to 1000 characters"),
            _where("caption_count <= 10", "text at most 10 times"),
            {"dedup": {"by": ["hash.phash", "caption"]}},
        ),
        "kakaobrain/coyo-dataset README",
        "min side >= 200, aspect <= 3.0, language == `en`, 3 <= words <= 256, 5 < characters <= 1000 after white space "
        "is collapsed, a text at most 10 times, equal (image pHash, text) kept once",
        lacks="cld3 for the language (fastText here), files under 5 KB, NSFW, their benchmarks (rule `decontaminate`), "
        "nouns, profanity",
        needs=(_LANGUAGE, _TEXT, _HASH),
    ),
    "cc3m-like": Preset(
        (_SIDE_400, _aspect(2.0)),
        "ai.google.com/research/ConceptualCaptions, Sharma et al. 2018",
        "each side > 400 px, aspect <= 2",
        lacks="JPEG only, adult filter, noun and determiner and preposition, image labels in the text, hypernyms",
    ),
    "cc12m-like": Preset(
        (
            _SIDE_400,
            _aspect(2.5),
            _WORDS_3_256,
            _where("words - unique_words <= 0.2 * words", "repeated words at most 0.2"),
        ),
        "google-research-datasets/conceptual-12m, quoting Changpinyo et al. 2021",
        "each side > 400 px, aspect <= 2.5, 3 <= words <= 256, repeated words / words <= 0.2",
        lacks="JPEG only, adult filter, noun and determiner, rare words, `<PERSON>` for names",
        needs=(_WORDS,),
    ),
}


def preset(name: str) -> Preset:
    """Raises PairmillError for an unknown name, with the list."""
    if name not in PRESETS:
        raise PairmillError(f"There is no preset `{name}`.{suggest(name, PRESETS)} There are: {', '.join(PRESETS)}.")
    return PRESETS[name]
