"""Generated scenes: their captions are true, their boxes tight, their bytes the same in every process."""

import hashlib
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest

from cli.demo.captions import GROUNDS, NOUNS, NUMBERS, WORDS
from cli.demo.drawing import PALETTE
from cli.demo.scene_graph import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Claim, Kind
from cli.demo.scenes import encode, generate_scene

SCENES = [generate_scene(seed, 128) for seed in range(300)]


def test_every_attribute_occurs():
    seen = [o for scene in SCENES for o in scene.objects]
    assert {o.shape for o in seen} == set(SHAPES)
    assert {o.colour for o in seen} == set(COLOURS) == set(PALETTE)
    assert {o.texture for o in seen} == set(TEXTURES)
    assert {o.size for o in seen} == set(SIZES)
    assert {scene.background for scene in SCENES} == set(BACKGROUNDS)
    assert {len(scene.objects) for scene in SCENES} == {1, 2, 3, 4, 5, 6}


def test_every_claim_holds():
    for scene in SCENES:
        for caption in scene.described:
            assert caption.claims
            assert scene.fits(caption), caption


# A reading of the sentences that knows nothing of the claims: number, attributes, noun.
_SINGULAR = {one: (shape, False) for shape, nouns in NOUNS.items() for one, _ in nouns} | {"dot": ("circle", False)}
_PLURAL = {many: (shape, True) for shape, nouns in NOUNS.items() for _, many in nouns} | {"dots": ("circle", True)}
_NOUNS = _SINGULAR | _PLURAL
_ATTRIBUTES = {w: name for name in (*SIZES, *TEXTURES, *COLOURS) for w in WORDS.get(name, (name,))}
_COUNTS = {w: n for n, w in enumerate(NUMBERS)} | {"a": 1, "an": 1, "a pair of": 2, "a couple of": 2}
_PHRASE = re.compile(
    rf"\b({'|'.join(sorted(_COUNTS, key=len, reverse=True))})((?: (?:{'|'.join(_ATTRIBUTES)}))*)"
    rf" ({'|'.join(sorted(_NOUNS, key=len, reverse=True))})\b"
)


def _count(scene, words, shape):
    """How many objects are of the shape and have all the attributes named."""
    wanted = [_ATTRIBUTES[w] for w in words]
    return sum(o.shape == shape and all(w in (o.size, o.texture, o.colour) for w in wanted) for o in scene.objects)


def test_numbers_and_attributes_in_the_text_are_those_of_the_objects():
    phrases = 0
    for scene in SCENES:
        for text in scene.captions:
            for number, words, noun in _PHRASE.findall(text.lower()):
                shape, plural = _NOUNS[noun]
                assert plural == (_COUNTS[number] > 1), text
                assert _count(scene, words.split(), shape) == _COUNTS[number], text
                phrases += 1
    assert phrases > 3000


def test_the_first_caption_names_every_object():
    for scene in SCENES:
        found = _PHRASE.findall(scene.captions[0].lower())
        assert sum(_COUNTS[number] for number, _, _ in found) == len(scene.objects)


def test_directions_in_the_text_are_those_of_the_pixels():
    """Checked by the boxes alone, for captions that relate one object to one other."""
    checked = 0
    for scene in SCENES:
        for caption in scene.described:
            text = caption.text.lower()
            found = [m for m in _PHRASE.finditer(text) if _COUNTS[m[1]] == 1]
            axis = 0 if "left" in text or "right" in text else 1
            if len(found) != 2 or not re.search(r"left|right|above|over|higher|below|under|beneath", text):
                continue
            centres = [_only(scene, m).centre[axis] for m in found]
            first_is_less = bool(re.search(r"left|above|over|higher", text))
            assert (centres[0] < centres[1]) == first_is_less, text
            checked += 1
    assert checked > 40


def _only(scene, match):
    words, shape = match[2].split(), _NOUNS[match[3]][0]
    return next(
        o
        for o in scene.objects
        if o.shape == shape and all(_ATTRIBUTES[w] in (o.size, o.texture, o.colour) for w in words)
    )


def test_backgrounds_in_the_text_are_the_scenes():
    spoken = {words: name for name, grounds in GROUNDS.items() for words in grounds}
    for scene in SCENES:
        for ground in re.findall(r"(?:on|against) ((?:a |sand).*?)[.!]?$", scene.captions[0]):
            assert spoken[ground] == scene.background


def test_most_first_captions_fit_one_scene_only():
    fitting = [sum(other.fits(scene.described[0]) for other in SCENES) for scene in SCENES]
    assert np.mean([n == 1 for n in fitting]) > 0.95
    second = [sum(other.fits(scene.described[1]) for other in SCENES) for scene in SCENES]
    assert np.mean([n == 1 for n in second]) > 0.75


def test_captions_vary():
    texts = [t for scene in SCENES for t in scene.captions]
    assert len(set(texts)) > 0.85 * len(texts)
    assert {len(scene.captions) for scene in SCENES} == {5}


def test_boxes_are_tight_and_do_not_meet():
    for seed in range(12):
        scene = generate_scene(seed, (200, 320))
        height, width = scene.image.shape[:2]
        assert (height, width) == (200, 320)
        for o in scene.objects:
            x1, y1, x2, y2 = o.box
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            side = max(x2 - x1, y2 - y1) / height
            assert (0.09 < side < 0.20) if o.size == "small" else (0.16 < side < 0.36)
        for i, a in enumerate(scene.objects):
            for b in scene.objects[:i]:
                assert _overlap(a.box, b.box) < 0.25 * min(_area(a.box), _area(b.box))


def _area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "star", "heart", "cross"])
def test_the_middle_of_a_plain_object_has_its_colour(shape):
    found = 0
    for scene in SCENES:
        for o in scene.objects:
            if o.shape == shape and o.texture == "plain":
                x, y = (round(c) for c in o.centre)
                seen = scene.image[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(0)
                distance = {name: np.abs(seen - rgb).sum() for name, rgb in PALETTE.items()}
                assert min(distance, key=distance.get) == o.colour
                found += 1
    assert found >= 5


def test_relations_are_the_objects():
    for scene in SCENES[:50]:
        for i, name, j in scene.relations:
            a, b = scene.objects[i], scene.objects[j]
            if name == "left of":
                assert a.centre[0] < b.centre[0]
            elif name == "above":
                assert a.centre[1] < b.centre[1]
            else:
                assert _area(a.box) > _area(b.box)


def test_a_false_caption_does_not_fit():
    scene = SCENES[0]
    absent = next(s for s in SHAPES if s not in {o.shape for o in scene.objects})
    assert not scene.fits(_caption(Claim("count", Kind(absent), 1)))
    assert not scene.fits(_caption(Claim("left of", Kind(absent), other=Kind(scene.objects[0].shape))))
    assert not scene.fits(_caption(Claim("where", Kind(absent), value="left")))


def _caption(claim):
    from cli.demo.captions import Caption

    return Caption("", (claim,))


def test_same_seed_same_bytes_in_another_process():
    code = (
        "from cli.demo.scenes import generate_scene as g; import hashlib;"
        "s = g(7, 96); print(hashlib.sha256(s.image.tobytes() + '|'.join(s.captions).encode()).hexdigest())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    scene = generate_scene(7, 96)
    expected = hashlib.sha256(scene.image.tobytes() + "|".join(scene.captions).encode()).hexdigest()
    assert ran.stdout.strip() == expected


def test_a_generator_gives_the_same_scene_as_the_number_it_draws():
    number = int(np.random.default_rng(3).integers(2**62))
    one, other = generate_scene(np.random.default_rng(3), 64), generate_scene(number, 64)
    assert one.captions == other.captions
    assert np.array_equal(one.image, other.image)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_encode_round_trip(kind):
    image = SCENES[1].image
    back = cv2.imdecode(np.frombuffer(encode(image, kind), np.uint8), cv2.IMREAD_COLOR_RGB)
    worst = np.abs(back.astype(int) - image).mean()
    assert worst == 0 if kind == "png" else worst < 6


def test_encode_refuses_another_kind():
    with pytest.raises(ValueError, match="jpeg, png or webp"):
        encode(SCENES[0].image, "tiff")
