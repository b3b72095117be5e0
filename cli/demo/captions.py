"""What people might write under a scene: varied, always true, each with the claims that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cli.demo.scene_graph import INVERSE, Claim, Kind, SceneObject, holds

NOUNS: dict[str, tuple[tuple[str, str], ...]] = {
    "circle": (("circle", "circles"), ("disc", "discs"), ("circle", "circles")),
    "square": (("square", "squares"), ("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"),),
    "star": (("star", "stars"),),
    "heart": (("heart", "hearts"),),
    "cross": (("cross", "crosses"), ("plus sign", "plus signs")),
    "ring": (("ring", "rings"), ("ring", "rings"), ("hoop", "hoops")),
    "moon": (("moon", "moons"), ("crescent", "crescents")),
}
WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "big", "big", "huge"),
    "plain": ("plain", "solid"),
    "striped": ("striped", "striped", "stripy"),
    "dotted": ("dotted", "spotted", "polka-dot"),
    "checked": ("checked", "checkered"),
    "purple": ("purple", "purple", "violet"),
}
GROUNDS: dict[str, tuple[str, ...]] = {
    "sky": ("a light blue background", "a pale blue sky"),
    "sand": ("a beige background", "sand"),
    "mint": ("a mint background", "a pale green background"),
    "lavender": ("a lavender background", "a lilac background"),
    "grey": ("a grey background", "a gray wall"),
    "night": ("a dark background", "a night sky"),
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_LINKS: dict[str, tuple[str, ...]] = {
    "left of": ("to the left of", "left of", "on the left side of"),
    "right of": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "over", "higher up than"),
    "below": ("below", "under", "beneath"),
    "bigger than": ("bigger than", "larger than"),
    "smaller than": ("smaller than",),
}
_PLACES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "middle": ("in the middle", "in the centre"),
}
_OPENINGS = (
    "a picture of {}",
    "an illustration showing {}",
    "there is {}",
    "here we have {}",
    "I can see {}",
    "someone drew {}",
    "a drawing with {}",
    "a card with {}",
    "look: {}!",
)


@dataclass(frozen=True)
class Caption:
    """A sentence and everything it claims."""

    text: str
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class Subject:
    """What there is to write about. image_size is (height, width), px."""

    objects: tuple[SceneObject, ...]
    background: str
    image_size: tuple[int, int]

    def true(self, claim: Claim) -> bool:
        """Whether the claim holds here."""
        return holds(claim, self.objects, self.background, self.image_size)

    def kinds(self) -> list[Kind]:
        """The full kinds that occur, in drawing order, each once."""
        return list(dict.fromkeys(Kind(o.shape, o.colour, o.texture, o.size) for o in self.objects))


Phrase = tuple[str, Kind, Claim]


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _say(rng: np.random.Generator, kind: Kind, number: int, small: bool) -> str:
    """'two small striped red circles'; a small circle may be called a dot."""
    nouns = (*NOUNS[str(kind.shape)], ("dot", "dots")) if small else NOUNS[str(kind.shape)]
    noun = nouns[int(rng.integers(len(nouns)))][number > 1]
    words = [w for w in (kind.size, kind.texture, kind.colour) if w]
    text = " ".join([*(_pick(rng, WORDS.get(w, (w,))) for w in words), noun])
    if number == 1:
        return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"
    if number == 2 and rng.random() < 0.15:
        return f"{_pick(rng, ('a pair of', 'a couple of'))} {text}"
    return f"{NUMBERS[number]} {text}"


def _phrase(rng: np.random.Generator, subject: Subject, kind: Kind, said: Sequence[str]) -> Phrase:
    """Name the objects of `kind` by shape and the attributes in `said`, and by more where others fit too."""
    number = sum(kind.fits(o) for o in subject.objects)
    told = Kind(kind.shape)
    for name in [*said, "colour"]:
        if name in said or sum(told.fits(o) for o in subject.objects) != number:
            told = replace(told, **{name: getattr(kind, name)})
    small_circle = kind.size == "small" and kind.shape == "circle" and told.size is None
    return _say(rng, told, number, small_circle), told, Claim("count", told, number)


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _list_all(rng: np.random.Generator, subject: Subject, said: Sequence[str]) -> Caption:
    kinds = subject.kinds()
    phrases = [_phrase(rng, subject, kinds[i], said) for i in rng.permutation(len(kinds))]
    return Caption(_join([p[0] for p in phrases]), tuple(p[2] for p in phrases))


def _detailed(rng: np.random.Generator, subject: Subject) -> Caption:
    """Everything, with every attribute, and now and then the background."""
    caption = _list_all(rng, subject, ("size", "texture", "colour"))
    return _on_ground(rng, subject, caption) if rng.random() < 0.5 else caption


def _on_ground(rng: np.random.Generator, subject: Subject, caption: Caption) -> Caption:
    ground = _pick(rng, GROUNDS[subject.background])
    text = f"{caption.text} {_pick(rng, ('on', 'on', 'against'))} {ground}"
    return Caption(text, (*caption.claims, Claim("background", value=subject.background)))


def _links(rng: np.random.Generator, subject: Subject) -> list[tuple[Kind, str, Kind]]:
    """Every (kind, word, other kind) that is true between two groups, in random order."""
    kinds = subject.kinds()
    pairs = [(a, word, b) for a in kinds for b in kinds for word in _LINKS if a != b]
    found = [link for link in pairs if subject.true(_relation(link[1], link[0], link[2]))]
    return [found[i] for i in rng.permutation(len(found))]


def _related(rng: np.random.Generator, subject: Subject) -> Caption:
    """One relation between two groups; where none holds, one place; else a plain list."""
    links = _links(rng, subject)
    said = ("texture", "colour") if rng.random() < 0.5 else ("size", "colour")
    if not links:
        return _placed(rng, subject, said)
    a, word, b = links[0]
    first, second = _phrase(rng, subject, a, said), _phrase(rng, subject, b, said)
    verb = "" if rng.random() < 0.6 and "than" not in word else _is(first[2].number)
    text = f"{first[0]} {verb}{_pick(rng, _LINKS[word])} {second[0]}"
    return Caption(text, (first[2], second[2], _relation(word, first[1], second[1])))


def _relation(word: str, a: Kind, b: Kind) -> Claim:
    """The claim "a WORD b" in the relation's canonical direction."""
    return Claim(INVERSE[word], b, other=a) if word in INVERSE else Claim(word, a, other=b)


def _is(number: int) -> str:
    return "is " if number == 1 else "are "


def _placed(rng: np.random.Generator, subject: Subject, said: Sequence[str]) -> Caption:
    """The first group with where it is in the image, when that is plain to see."""
    text, told, count = _phrase(rng, subject, subject.kinds()[0], said)
    places = [p for p in _PLACES if subject.true(Claim("where", told, value=p))]
    if not places:
        return _list_all(rng, subject, said)
    place = _pick(rng, places)
    return Caption(f"{text} {_pick(rng, _PLACES[place])}", (count, Claim("where", told, value=place)))


def _opened(rng: np.random.Generator, subject: Subject) -> Caption:
    said = [("colour",), ("colour", "texture"), ("size", "colour"), ("texture", "colour", "size")]
    caption = _list_all(rng, subject, said[int(rng.integers(len(said)))])
    opening = _pick(rng, _OPENINGS)
    if opening == "there is {}" and caption.claims[0].number > 1:
        opening = "there are {}"
    return Caption(opening.format(caption.text), caption.claims)


def _short(rng: np.random.Generator, subject: Subject) -> Caption:
    """Shapes only, or only how many there are."""
    number = len(subject.objects)
    if number > 2 and rng.random() < 0.2:
        shared = [Kind(colour=c) for c in {o.colour for o in subject.objects}]
        colours = [k.colour for k in shared if all(k.fits(o) for o in subject.objects)]
        word = f"{colours[0]} shapes" if colours else "shapes"
        kind = Kind(colour=colours[0]) if colours else Kind()
        return Caption(f"{NUMBERS[number]} {word}", (Claim("count", kind, number),))
    return _list_all(rng, subject, ())


def _punctuate(rng: np.random.Generator, caption: Caption) -> Caption:
    """Some people write sentences, some do not."""
    text = caption.text
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
        if text[-1] not in "!." and rng.random() < 0.7:
            text += "."
    return replace(caption, text=text)


def describe(rng: np.random.Generator, subject: Subject) -> tuple[Caption, ...]:
    """Five captions: the most detailed, a relation, a sentence, colours and shapes, a short one."""
    drafts = (
        _detailed(rng, subject),
        _related(rng, subject),
        _opened(rng, subject),
        _list_all(rng, subject, ("colour",)),
        _short(rng, subject),
    )
    return tuple(_punctuate(rng, draft) for draft in drafts)
