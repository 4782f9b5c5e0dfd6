"""The generated data set: pictures of one to three shapes, and true captions of them in English and Korean.

Everything follows from a key such as "0/train/17" (seed, split, index). Nothing is stored, and nothing is downloaded:

    scene = make_scene("0/test/0")          what is in the picture
    draw(scene, size=64)                    uint8 (64, 64, 3), sharp at any size
    captions(scene), captions(scene, "ko")  five captions, each about something else
    ladder(scene)                           four captions, from general to exact
    web_caption(scene), long_caption(scene) a noisy short caption, and a paragraph
    zero_shot("en", size=64)                64 classes of single objects, some in no training picture

A picture is the same to the bit on every platform: only Python's own generator draws random numbers, and each +, -, *,
/ and sqrt on the pixels is a NumPy call of its own.
"""
import collections
import itertools
import random
import re
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLOURS = {"red": (214, 48, 49), "orange": (240, 138, 36), "yellow": (247, 208, 58), "green": (64, 160, 74),
           "cyan": (66, 196, 212), "blue": (44, 92, 214), "purple": (128, 62, 176), "pink": (242, 130, 178)}
SIZES = {"small": 0.19, "large": 0.27}  # radius in picture widths
FILLS = ("plain", "striped", "dotted")
VERSION = 1  # raised with every change of the drawing, so that cached pictures are drawn anew
COUNTS = {"train": 20_000, "val": 500, "test": 500}
BACKGROUNDS = ("dark", "light", "gray", "checkered", "lined", "speckled")
UNSEEN = {(shape, list(COLOURS)[(3 * i + 1) % 8]) for i, shape in enumerate(SHAPES)}  # pairs in no training picture


@dataclass
class Thing:
    shape: str
    colour: str
    size: str
    fill: str
    x: float  # centre, in picture widths from the left and from the top
    y: float
    turn: float  # tangent of half the angle: a rotation without a sine


@dataclass
class Scene:
    things: list
    background: str
    key: str  # what the generator of its noise, captions and hidden parts starts from


def make_scene(key, unseen=False, count=None, **fixed):
    """The scene that belongs to a key such as "0/train/17". `fixed` sets properties of every thing (shape="star").

    unseen: whether the pairs that are kept from training may appear. count: how many things, else one to three.
    """
    if count not in (None, 1, 2, 3):
        raise ValueError(f"make_scene: count={count}; expected 1, 2 or 3")
    if not unseen and (fixed.get("shape"), fixed.get("colour")) in UNSEEN:
        raise ValueError("make_scene: a {colour} {shape} is kept from training; unseen=True draws it".format(**fixed))
    rng = random.Random(key)
    count = count or rng.choice((1, 1, 2, 3))
    while True:
        things = []
        for cell in rng.sample(range(9), count):  # a grid of 3 x 3 keeps 'left of' and 'above' clear
            thing = Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(SIZES)), rng.choice(FILLS),
                          (cell % 3 + 0.5) / 3 + rng.uniform(-0.06, 0.06),
                          (cell // 3 + 0.5) / 3 + rng.uniform(-0.06, 0.06),
                          rng.uniform(-0.12, 0.12))
            for name, value in fixed.items():
                setattr(thing, name, value)
            radius = SIZES[thing.size] + 0.01
            thing.x, thing.y = (min(max(v, radius), 1 - radius) for v in (thing.x, thing.y))
            things.append(thing)
        apart = all((a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (SIZES[a.size] + SIZES[b.size] + 0.02) ** 2
                    for a, b in itertools.combinations(things, 2))
        if apart and (unseen or not any((t.shape, t.colour) in UNSEEN for t in things)):
            return Scene(things, rng.choice(BACKGROUNDS), key)


def star_distance(x, y):
    # A pentagram is where at least four of its five edge lines have the point on their inner side.
    lines = np.stack([nx * x + ny * y for nx, ny in ((0.0, 1.0), (0.951057, 0.309017), (-0.951057, 0.309017),
                                                     (0.587785, -0.809017), (-0.587785, -0.809017))])
    return np.sort(lines, axis=0)[3] - np.float32(0.30)


# The distance from a shape's edge, negative inside, in units of its radius; x to the right, y downwards.
DISTANCE = {
    "circle": lambda x, y: np.sqrt(x * x + y * y) - 0.92,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.78,
    "triangle": lambda x, y: np.maximum(abs(x) * 0.866025 - (y - 0.15) * 0.5, y - 0.15) - 0.54,
    "star": lambda x, y: star_distance(x, -y),
    "heart": lambda x, y: np.minimum(np.sqrt((abs(x) - 0.42) ** 2 + (y + 0.27) ** 2) - 0.52,
                                     np.maximum((abs(x) + abs(y - 0.06) - 0.80) * 0.707107, -0.27 - y)),
    "cross": lambda x, y: np.minimum(np.maximum(abs(x) - 0.92, abs(y) - 0.31),
                                     np.maximum(abs(x) - 0.31, abs(y) - 0.92)),
    "ring": lambda x, y: abs(np.sqrt(x * x + y * y) - 0.67) - 0.24,
    "moon": lambda x, y: np.maximum(np.sqrt(x * x + y * y) - 0.94, 0.76 - np.sqrt((x - 0.44) ** 2 + (y + 0.12) ** 2)),
}


def draw(scene, size=64, hidden=0.0):
    """A scene -> uint8 (size, size, 3), anti-aliased, sharp at any size. hidden: the share of 4 x 4 tiles covered."""
    rng = random.Random("draw/" + scene.key)
    picture = draw_background(scene.background, size, rng)
    for thing in scene.things:
        draw_thing(picture, thing, size)
    noise = np.frombuffer(rng.randbytes(size * size), np.uint8).reshape(size, size, 1) % 11
    picture += noise
    picture -= 5
    for tile in rng.sample(range(16), round(16 * hidden)):
        top, left = tile // 4 * size // 4, tile % 4 * size // 4
        picture[top:top + -(-size // 4), left:left + -(-size // 4)] = 128
    return np.clip(picture, 0, 255).astype(np.uint8)


def draw_background(kind, size, rng):
    phase = np.float32(rng.random())
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) * np.float32(1 / size) + phase
    edge = np.float32(size / 8)  # turns a distance from an edge, in cells of 1/8, into pixels
    dark, light, gray = (40, 42, 54), (243, 239, 230), (146, 148, 152)
    if kind == "checkered":
        ink = np.clip(((abs(8 * x % 2 - 1) - 0.5) * (abs(8 * y % 2 - 1) - 0.5)) * edge * 4 + 0.5, 0, 1) * 0.22
    elif kind == "lined":
        ink = np.clip((0.12 - abs(8 * y % 1 - 0.5)) * edge + 0.5, 0, 1) * 0.30
    elif kind == "speckled":
        u, v = 8 * x % 1 - 0.5, (8 * y + 0.5 * (8 * x // 1 % 2)) % 1 - 0.5
        ink = np.clip((0.15 - np.sqrt(u * u + v * v)) * edge + 0.5, 0, 1) * 0.30
    else:
        ink = np.zeros_like(x)
    base, tint = (np.array(c, np.float32) for c in ({"dark": dark, "gray": gray}.get(kind, light),
                                                    light if kind == "speckled" else (70, 90, 140)))
    if kind == "speckled":
        base = np.array(dark, np.float32) + 14
    picture = base + ink[..., None] * (tint - base)
    return picture * np.float32(rng.uniform(0.94, 1.06))


def draw_thing(picture, thing, size):
    radius = SIZES[thing.size] * size
    reach = 1.35 * radius + 1  # as far as the shadow
    left, right = max(0, int(thing.x * size - reach)), min(size, int(thing.x * size + reach) + 2)
    top, bottom = max(0, int(thing.y * size - reach)), min(size, int(thing.y * size + reach) + 2)
    px = ((np.arange(left, right, dtype=np.float32) + 0.5 - thing.x * size) / radius).astype(np.float32)
    py = ((np.arange(top, bottom, dtype=np.float32) + 0.5 - thing.y * size) / radius).astype(np.float32)[:, None]
    t = thing.turn
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    x, y = cos * px + sin * py, cos * py - sin * px
    distance = DISTANCE[thing.shape](x, y)
    inside = np.clip(0.5 - distance * radius, 0, 1)[..., None]

    colour = np.array(COLOURS[thing.colour], np.float32)
    paint = colour
    if thing.fill != "plain":
        if thing.fill == "striped":
            mark = 0.25 - abs((x + y) * 1.6 % 1 - 0.5)
        else:
            mark = 0.27 - np.sqrt((2 * x % 1 - 0.5) ** 2 + (2 * y % 1 - 0.5) ** 2)
        mark = np.clip(mark * radius * 0.6 + 0.5, 0, 1)[..., None]
        paint = colour + mark * (255 - colour) * np.float32(0.6)
    patch = picture[top:bottom, left:right]
    shift = max(1, round(radius * 0.14))  # a soft shadow, down and to the right
    shadow = np.clip(0.5 - distance[:-shift, :-shift] * 3, 0, 1)[..., None]
    patch[shift:, shift:] *= 1 - np.float32(0.35) * shadow
    patch += inside * (paint - patch)


# --- what is said about a scene, in English and in Korean ------------------------------------------------------------
# A language is a table: names, and templates in which {a} is a thing, {b} another, {list} all of them, {n} how many.
# Articles, plurals and Korean particles are put right afterwards, by `grammar`.

ENGLISH = {
    "shape": {shape: shape for shape in SHAPES}, "colour": {c: c for c in COLOURS}, "size": {s: s for s in SIZES},
    "fill": {"plain": "", "striped": "striped", "dotted": "dotted"},
    "background": {b: b for b in BACKGROUNDS},
    "order": ("size", "fill", "colour", "shape"), "article": "a ",
    "join": (", ", " and "), "counts": ("one shape", "two shapes", "three shapes"),
    "place": ("in the top left", "at the top", "in the top right", "on the left", "in the middle", "on the right",
              "in the bottom left", "at the bottom", "in the bottom right"),
    "left": "to the left of", "right": "to the right of", "above": "above", "below": "below",
    "object": ("{a}", "a picture of {a}", "there is {a}", "{a} can be seen here", "look, {a}"),
    "relation": ("{a} {rel} {b}", "{a} is {rel} {b}", "there is {a} {rel} {b}"),
    "where": ("{a} {place}", "there is {a} {place}", "{a} is {place} of the picture"),
    "count": ("there are {n} in the picture", "{n}: {list}", "exactly {n}: {list}", "{n}, {list}",
              "{n} in all: {list}"),
    "backdrop": ("the background is {bg}", "{list} on a {bg} background", "a {bg} background behind {list}",
                 "on a {bg} background, {list}", "{list}, the background is {bg}"),
    "whole": ("{all} on a {bg} background", "on a {bg} background, {all}", "a picture of {all} on a {bg} background"),
    "one": "{a} {place}", "two": "{a} {rel} {b}", "three": "{a} {rel} {b} and {rel2} {c}",
    "several": ("two {}s", "three {}s"),
    "some": (("a shape", "something colourful", "a picture of a shape"),
             ("some shapes", "colourful things", "a picture of shapes")),
    "long": ("The picture shows {n}.", "{a} is {place}.", "{a} is {rel} {b}.", "The background is {bg}.",
             "Nothing else is in the picture."),
    "web": ("{a} img {number}", "{a} free download", "{a} - pinterest", "best {a} {number}", "{a}"),
    "unrelated": ("summer sale up to {number} % off", "untitled {number}", "click here to see more",
                  "photo of the day"),
    "prompt": ("a {}", "a picture of a {}", "there is a {}"),
}
KOREAN = {
    "shape": dict(zip(SHAPES, ("원", "사각형", "삼각형", "별", "하트", "십자가", "고리", "초승달"))),
    "colour": dict(zip(COLOURS, ("빨간색", "주황색", "노란색", "초록색", "하늘색", "파란색", "보라색", "분홍색"))),
    "size": {"small": "작은", "large": "큰"}, "fill": {"plain": "", "striped": "줄무늬", "dotted": "물방울무늬"},
    "background": dict(zip(BACKGROUNDS, ("어두운", "밝은", "회색", "체크무늬", "가로줄", "점무늬"))),
    "order": ("size", "colour", "fill", "shape"), "article": "",
    "join": (", ", "(과/와) "), "counts": ("도형 한 개", "도형 두 개", "도형 세 개"),
    "place": ("왼쪽 위에", "위쪽에", "오른쪽 위에", "왼쪽에", "가운데에", "오른쪽에", "왼쪽 아래에", "아래쪽에", "오른쪽 아래에"),
    "left": "왼쪽에", "right": "오른쪽에", "above": "위에", "below": "아래에",
    "object": ("{a}", "{a}의 그림", "{a}(이/가) 있다", "{a}(이/가) 보인다", "여기에 {a}(이/가) 있다"),
    "relation": ("{b} {rel} 있는 {a}", "{a}(은/는) {b}의 {rel} 있다", "{b}의 {rel} {a}(이/가) 있다"),
    "where": ("{place} 있는 {a}", "{place} {a}(이/가) 있다", "{a}(은/는) 그림의 {place} 있다"),
    "count": ("그림에 {n}(이/가) 있다", "{n}: {list}", "모두 {n}: {list}", "{n}, {list}", "{list}, 모두 {n}"),
    "backdrop": ("배경은 {bg} 배경이다", "{bg} 배경 앞의 {list}", "{list}(이/가) {bg} 배경 앞에 있다", "{bg} 배경, {list}",
                 "{list}, 배경은 {bg} 배경이다"),
    "whole": ("{bg} 배경, {all}", "{bg} 배경 앞에서 {all}", "{all}, 그리고 {bg} 배경"),
    "one": "{place} 있는 {a}", "two": "{b}의 {rel} 있는 {a}", "three": "{b}의 {rel}, {c}의 {rel2} 있는 {a}",
    "several": ("{} 두 개", "{} 세 개"),
    "some": (("도형", "알록달록한 것", "도형 그림"), ("도형들", "알록달록한 것들", "도형들의 그림")),
    "long": ("그림에 {n}(이/가) 있다.", "{a}(은/는) {place} 있다.", "{a}(은/는) {b}의 {rel} 있다.", "배경은 {bg} 배경이다.",
             "다른 것은 없다."),
    "web": ("{a} 사진 {number}", "{a} 무료 다운로드", "{a} 모음", "예쁜 {a} {number}", "{a}"),
    "unrelated": ("여름 세일 {number} % 할인", "제목 없음 {number}", "자세히 보기", "오늘의 사진"),
    "prompt": ("이것은 {} 이다", "{}", "{}의 그림"),
}
LANGUAGES = {"en": ENGLISH, "ko": KOREAN}


def grammar(text):
    """'a orange star' -> 'an orange star'; Korean particles by the last sound: '별(이/가)' -> '별이', '하트(이/가)' -> '하트가'."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    text = text.replace("there are one", "there is one").replace("crosss", "crosses")
    # A Hangul syllable's number is (lead * 21 + vowel) * 28 + final: it ends in a consonant unless final is zero.
    return re.sub(r"([가-힣])\((.)/(.)\)", lambda m: m[1] + (m[2] if (ord(m[1]) - 0xAC00) % 28 else m[3]), text)


def describe(thing, words, detail=("size", "fill", "colour", "shape")):
    """'a large striped red star', or as much of it as `detail` names."""
    parts = [words[key][getattr(thing, key)] for key in words["order"] if key in detail]
    return words["article"] + " ".join(filter(None, parts))


def relation(a, b):
    """Where a is, seen from b: the axis on which they are further apart."""
    dx, dy = a.x - b.x, a.y - b.y
    return ("left" if dx < 0 else "right") if abs(dx) >= abs(dy) else ("above" if dy < 0 else "below")


def place(thing, words):
    return words["place"][min(int(thing.y * 3), 2) * 3 + min(int(thing.x * 3), 2)]


def enumerate_things(things, words, detail):
    """'a red star and a moon'; things that read the same are counted: 'two stars'."""
    counts = collections.Counter(describe(t, words | {"article": ""}, detail) for t in things)
    *most, last = [words["article"] + text if n == 1 else words["several"][n - 2].format(text)
                   for text, n in counts.items()]
    comma, conjunction = words["join"]
    return comma.join(most) + conjunction + last if most else last


def arrangement(things, words, detail):
    """All things and how they lie, about the first one: '{a} above {b} and to the left of {c}'."""
    a, b, c = (*things, None, None)[:3]
    said = {"a": describe(a, words, detail), "place": place(a, words)}
    if b:
        said |= {"b": describe(b, words, detail), "rel": words[relation(a, b)]}
    if c:
        said |= {"c": describe(c, words, detail), "rel2": words[relation(a, c)]}
    return words[("one", "two", "three")[len(things) - 1]].format(**said)


def captions(scene, language="en"):
    """Five captions, one each of a thing, a relation (of one thing: its place), the count, the background, all."""
    words, rng = LANGUAGES[language], random.Random("captions/" + scene.key)
    everything, colour_and_shape = ("size", "fill", "colour", "shape"), ("colour", "shape")
    detail = rng.choice((("fill", "colour", "shape"), colour_and_shape, ("shape",), ("shape",)))
    order = rng.sample(scene.things, len(scene.things))
    said = {"n": words["counts"][len(order) - 1], "list": enumerate_things(order, words, detail),
            "bg": words["background"][scene.background], "all": arrangement(order, words, everything),
            "a": describe(order[0], words, detail), "place": place(order[0], words)}
    if len(order) > 1:
        said |= {"b": describe(order[1], words, detail), "rel": words[relation(order[0], order[1])]}
    texts = [
        rng.choice(words["object"]).format(
            a=describe(rng.choice(order), words, rng.choice((everything, colour_and_shape)))),
        rng.choice(words["relation" if len(order) > 1 else "where"]).format(**said),
        rng.choice(words["count"]).format(**said),
        rng.choice(words["backdrop"]).format(**said),
        rng.choice(words["whole"]).format(**said),
    ]
    return [grammar(text) for text in texts]


def ladder(scene, language="en"):
    """Four captions from general to exact, each true and each saying more than the one before."""
    words, rng = LANGUAGES[language], random.Random("ladder/" + scene.key)
    things = scene.things
    texts = [
        rng.choice(words["some"][len(things) > 1]),
        enumerate_things(things, words, ("shape",)),
        arrangement(things, words, ("colour", "shape")),
        words["whole"][0].format(all=arrangement(things, words, ("size", "fill", "colour", "shape")),
                                 bg=words["background"][scene.background]),
    ]
    return [grammar(text) for text in texts]


def long_caption(scene, language="en"):
    """What a captioner would write: several sentences, every one true."""
    words, rng = LANGUAGES[language], random.Random("long/" + scene.key)
    count, where, related, background, end = words["long"]
    things, everything = scene.things, ("size", "fill", "colour", "shape")
    sentences = [count.format(n=words["counts"][len(things) - 1])]
    sentences += [where.format(a=describe(t, words, everything), place=place(t, words)) for t in things]
    sentences += [related.format(a=describe(a, words, ("colour", "shape")), b=describe(b, words, ("colour", "shape")),
                                 rel=words[relation(a, b)]) for a, b in zip(things, things[1:])]
    sentences += [background.format(bg=words["background"][scene.background])] + [end] * (rng.random() < 0.5)
    return " ".join(text[0].upper() + text[1:] for text in map(grammar, sentences))


def web_caption(scene, language="en"):
    """What the web says: short, noisy, and every tenth time about something else."""
    words, rng = LANGUAGES[language], random.Random("web/" + scene.key)
    text = rng.choice(words["unrelated" if rng.random() < 0.1 else "web"])
    thing = describe(rng.choice(scene.things), words | {"article": ""}, rng.choice((("shape",), ("colour", "shape"))))
    return grammar(text.format(a=thing, number=rng.randrange(10, 100)))


# --- zero-shot classification ---------------------------------------------------------------------------------------

@dataclass
class ZeroShot:
    """Pictures of one object each, to be told apart by prompts."""
    images: np.ndarray  # uint8 (N, S, S, 3)
    labels: np.ndarray  # (N,) the number of the class
    prompts: list       # the prompts of each class
    groups: dict        # name -> bool (N,): the pictures that count for this figure


def zero_shot(language="en", size=64, seed=0, each=10):
    """64 classes, 8 shapes x 8 colours, with `each` pictures. "unseen": the pairs that are in no training picture."""
    words = LANGUAGES[language]
    images, labels, prompts, unseen = [], [], [], []
    for label, (shape, colour) in enumerate(itertools.product(SHAPES, COLOURS)):
        noun = f"{words['colour'][colour]} {words['shape'][shape]}"
        prompts.append([grammar(prompt.format(noun)) for prompt in words["prompt"]])
        for i in range(each):
            scene = make_scene(f"{seed}/zero-shot/{label}/{i}", unseen=True, count=1, shape=shape, colour=colour)
            images.append(draw(scene, size))
            labels.append(label)
            unseen.append((shape, colour) in UNSEEN)
    unseen = np.array(unseen)
    return ZeroShot(np.stack(images), np.array(labels), prompts, {"seen": ~unseen, "unseen": unseen})
