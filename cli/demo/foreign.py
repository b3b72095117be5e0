"""Sentences about a scene in languages other than English."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cli.demo.scene_graph import COLOURS, SHAPES, SceneObject

# Per language: how a coloured shape is said, the word for "and", shapes and colours in the order of
# scene_graph, and sentences. The phrasing keeps shape and colour apart, so that nothing has to agree.
_LANGUAGES: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
    "de": (
        "{shape} in {colour}",
        " und ",
        "ein Kreis,ein Quadrat,ein Dreieck,ein Stern,ein Herz,ein Kreuz,ein Ring,ein Mond",
        "Rot,Orange,Gelb,Grün,Blau,Lila,Rosa,Braun,Weiß,Schwarz",
        (
            "Auf diesem Bild sieht man Folgendes: {things}.",
            "Hier ist zu sehen: {things}",
            "Das hat jemand gezeichnet: {things}.",
        ),
    ),
    "fr": (
        "{shape} de couleur {colour}",
        " et ",
        "un cercle,un carré,un triangle,une étoile,un cœur,une croix,un anneau,une lune",
        "rouge,orange,jaune,verte,bleue,violette,rose,marron,blanche,noire",
        (
            "Sur cette image on voit {things}.",
            "Voici {things}, dessinés à la main",
            "Il y a {things} sur le dessin.",
        ),
    ),
    "es": (
        "{shape} de color {colour}",
        " y también ",
        "un círculo,un cuadrado,un triángulo,una estrella,un corazón,una cruz,un anillo,una luna",
        "rojo,naranja,amarillo,verde,azul,morado,rosa,marrón,blanco,negro",
        (
            "En esta imagen se puede ver {things}.",
            "Aquí hay {things}",
            "Alguien ha dibujado {things} sobre el fondo.",
        ),
    ),
    "it": (
        "{shape} di colore {colour}",
        " e poi ",
        "un cerchio,un quadrato,un triangolo,una stella,un cuore,una croce,un anello,una luna",
        "rosso,arancione,giallo,verde,blu,viola,rosa,marrone,bianco,nero",
        ("In questa immagine si vede {things}.", "Qualcuno ha disegnato {things}", "Ecco {things}."),
    ),
    "nl": (
        "{shape}, {colour} van kleur",
        ", en ook ",
        "een cirkel,een vierkant,een driehoek,een ster,een hart,een kruis,een ring,een maan",
        "rood,oranje,geel,groen,blauw,paars,roze,bruin,wit,zwart",
        ("Op deze afbeelding zie je {things}.", "Hier staat {things}", "Iemand tekende {things}."),
    ),
    "pl": (
        "{shape} w kolorze {colour}",
        " oraz ",
        "koło,kwadrat,trójkąt,gwiazda,serce,krzyż,pierścień,księżyc",
        "czerwonym,pomarańczowym,żółtym,zielonym,niebieskim,fioletowym,różowym,brązowym,białym,czarnym",
        ("Na obrazku jest {things}.", "Tutaj widać następujące rzeczy: {things}", "Oto {things}."),
    ),
    "ru": (
        "{shape} {colour} цвета",
        " и ",
        "круг,квадрат,треугольник,звезда,сердце,крест,кольцо,луна",
        "красного,оранжевого,жёлтого,зелёного,синего,фиолетового,розового,коричневого,белого,чёрного",
        ("На картинке изображены {things}.", "Здесь нарисованы {things}", "На этом рисунке есть {things}."),
    ),
    "ja": (
        "{colour}{shape}",
        "と",
        "円,四角形,三角形,星,ハート,十字,輪,月",
        "赤い,オレンジ色の,黄色い,緑色の,青い,紫色の,ピンク色の,茶色の,白い,黒い",
        ("この絵には{things}があります。", "{things}が描かれています", "ここに{things}が見えます。"),
    ),
    "zh": (
        "一个{colour}的{shape}",
        "和",
        "圆形,正方形,三角形,星星,心形,十字,圆环,月亮",
        "红色,橙色,黄色,绿色,蓝色,紫色,粉色,棕色,白色,黑色",
        ("这张图片上有{things}。", "画面中可以看到{things}", "有人画了{things}。"),
    ),
}
LANGUAGES = tuple(_LANGUAGES)


def foreign_caption(rng: np.random.Generator, objects: Sequence[SceneObject], language: str) -> str:
    """A sentence of the language (a code of LANGUAGES) that names at most three of the objects."""
    pattern, joint, shapes, colours, sentences = _LANGUAGES[language]
    nouns = dict(zip(SHAPES, shapes.split(","), strict=True))
    tints = dict(zip(COLOURS, colours.split(","), strict=True))
    kinds = list(dict.fromkeys((o.shape, o.colour) for o in objects))[:3]
    things = joint.join(pattern.format(shape=nouns[s], colour=tints[c]) for s, c in kinds)
    return sentences[int(rng.integers(len(sentences)))].format(things=things)
