"""Data sets, tokenizers, the picture cache and the loader. Nothing here knows any of the models.

A data set is a `Split`: pictures as uint8 (N, S, S, 3), memory-mapped, each with its captions. Every source ends there
but tar shards, which are streamed:

    load("shapes", "train", size=64)                      generated, no download: the first half of this file
    load("flickr8k", "train", size=224, root="data")      downloads both archives, or reads what lies in root
    load("pictures.csv", "train", size=224)               one's own: a folder, a .csv or a .json

A picture is split off whole, never a caption of it, and is in a batch at most once. Each is decoded once, into a cache
(of shards, the validation and test pictures alone). Whatever is random (caption, crop, order) is a function of (seed,
epoch or step), never of what ran before (with shards, also of how many readers there are).
"""
import collections
import concurrent.futures
import contextlib
import csv
import functools
import glob
import gzip
import hashlib
import heapq
import html
import http.client
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import string
import sys
import tarfile
import time
import unicodedata
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as vision
from PIL import Image, ImageOps
from tqdm import tqdm


class UserError(ValueError):
    """What the user gave does not work; the message says in one line what was found, what was expected, what to do."""


class EmptySplit(UserError):
    """A data set has no picture in the split that was asked for."""


# === shapes: pictures and captions made from (seed, index) ===========================================================
# One to three objects on a plain or textured background. Only +, -, *, /, sqrt and what is exact touch the pixels, each
# one a numpy call of its own, and only Python's own generator draws, so that a picture is the same to the bit on every
# platform.

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLOURS = {"red": (214, 48, 49), "orange": (240, 138, 36), "yellow": (247, 208, 58), "green": (64, 160, 74),
           "cyan": (66, 196, 212), "blue": (44, 92, 214), "purple": (128, 62, 176), "pink": (242, 130, 178)}
SIZES = {"small": 0.19, "large": 0.27}  # radius in picture widths
FILLS = ("plain", "striped", "dotted")
SHAPES_VERSION = 1  # to be raised with every change of the drawing: caches of older pictures are then made anew
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
        raise UserError(f"make_scene: count={count}; expected 1, 2 or 3")
    if not unseen and (fixed.get("shape"), fixed.get("colour")) in UNSEEN:
        raise UserError("make_scene: a {colour} {shape} is kept from training; unseen=True draws it".format(**fixed))
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


# === pictures ========================================================================================================

class PictureError(Exception):
    """One picture cannot be read; the message says why. Such a picture is listed, counted and left out."""


def read_picture(source, size, fit="crop"):
    """A path, the bytes of a file or a PIL image -> uint8 (size, size, 3).

    fit "crop" (OpenAI's): shortest side to `size`, bicubic, then the centre; "squash" (CLIPS): both sides, bilinear.
    Turned upright as its EXIF data asks, transparency on white, 16 bits to 8, of an animation the first frame.
    """
    try:
        if not isinstance(source, Image.Image):
            source = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        image = ImageOps.exif_transpose(source)
        if image.mode.startswith(("I", "F")):  # more than 8 bits a pixel, which Pillow would clip to white
            deep = np.asarray(image, dtype=np.float64)
            top = (65535 if image.mode.startswith("I;16") or deep.max() > 255 else
                   1 if image.mode == "F" and deep.max() <= 1 else 255)
            image = Image.fromarray((deep * (255 / top)).clip(0, 255).round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if fit == "squash":
            return np.asarray(vision.resize(image, [size, size], vision.InterpolationMode.BILINEAR))
        w, h = image.size
        image = vision.center_crop(image, [min(h, 16 * w), min(w, 16 * h)])  # a 1 x 9999 strip would grow to gigabytes
        image = vision.resize(image, size, vision.InterpolationMode.BICUBIC)
        return np.asarray(vision.center_crop(image, [size, size]))
    except FileNotFoundError:
        raise PictureError("no such file") from None
    except Exception as error:  # broken files fail in ways of their own: none may end a run
        raise PictureError(" ".join(str(error).split()) or type(error).__name__) from None


@functools.lru_cache
def open_zip(path):
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no zip file ({error}); download it again") from None


def read_source(source, size, fit):
    """read_picture for a path, or for (path of a zip, name in it)."""
    if isinstance(source, tuple):
        try:
            source = open_zip(source[0]).read(source[1])
        except (OSError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:  # Runtime: encrypted
            raise PictureError(f"damaged in the zip: {error}") from None
    return read_picture(source, size, fit)


def cache_pictures(name, sources, size, fit, folder, read=read_source):
    """Decode every source once -> (uint8 (N, size, size, 3) memory-mapped, the places in `sources` of these N).

    Files `NAME-SIZE-FIT-KEY.u8` and `.json` in `folder`; the key hangs on all that the pixels depend on, so a changed
    source or size makes a new cache (and removes the old one). The .json is written last and by rename: without it
    there is no cache, so neither a build that was interrupted nor one that runs beside it in another process does harm.
    """
    paths = [source[0] if isinstance(source, tuple) else source for source in sources]
    stats = {path: Path(path).stat() for path in set(paths) if os.path.exists(path)}
    seen = [(os.path.abspath(path) if path in stats else str(path), *(source[1:] if isinstance(source, tuple) else ()),
             *((stats[path].st_mtime_ns, stats[path].st_size) if path in stats else ()))
            for source, path in zip(sources, paths)]
    key = hashlib.sha256(json.dumps([1, size, fit, seen]).encode()).hexdigest()[:16]
    folder = Path(folder)
    name = f"{name}-{size}-{fit}"
    pixels, listing = folder / f"{name}-{key}.u8", folder / f"{name}-{key}.json"
    try:
        found = json.loads(listing.read_text())
        kept, bad = found["kept"], found["bad"]
        whole = pixels.stat().st_size == len(kept) * size * size * 3
    except (OSError, ValueError, KeyError):
        whole = False
    if not whole:
        kept, bad = build_cache(name, sources, size, fit, read, pixels, listing)
    if bad:
        say(f"{name}: {len(bad)} of {len(sources)} pictures cannot be read and are left out "
            f"(all of them in {listing}; delete it to try them again): "
            + "; ".join(f"{source}: {why}" for source, why in bad[:3]) + ("; ..." if len(bad) > 3 else ""))
    if not kept:
        raise UserError(f"{name}: none of the {len(sources)} pictures can be read"
                        + "".join(f"; {source}: {why}" for source, why in bad[:1]))
    return np.memmap(pixels, np.uint8, "r", shape=(len(kept), size, size, 3)), kept


def build_cache(name, sources, size, fit, read, pixels, listing):
    need = len(sources) * size * size * 3
    try:
        pixels.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(pixels.parent).free
    except OSError as error:
        raise UserError(f"cannot make the cache folder {pixels.parent}: {error.strerror}; "
                        "name another one with --cache") from None
    if need > free:
        raise UserError(f"the picture cache needs {need / 1e9:.2f} GB in {pixels.parent}, "
                        f"where {free / 1e9:.2f} GB are free; name another folder with --cache")

    def decode(source):
        try:
            return read(source, size, fit).tobytes()
        except PictureError as error:
            return error

    kept, bad = [], []
    part = part_of(pixels)
    try:  # threads, not processes: Pillow decodes and resizes without holding Python's lock
        with open(part, "wb") as file, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, \
                tqdm(total=len(sources), desc=f"{name}, once", unit=" pictures", **bar_options()) as bar:
            for first in range(0, len(sources), 256):
                for place, row in enumerate(pool.map(decode, sources[first:first + 256]), first):
                    if isinstance(row, PictureError):
                        bad.append((str(sources[place]), str(row)))
                    else:
                        file.write(row)
                        kept.append(place)
                    bar.update()
            file.flush()
            os.fsync(file.fileno())
        if not kept:
            return kept, bad  # nothing worth keeping: the next run tries again
        for old in pixels.parent.glob(f"{name}-*"):  # of other sources under this name, or left by a killed build
            with contextlib.suppress(OSError):  # gone already; or on Windows, where another process has it mapped
                if old.stem != pixels.stem and (old.suffix != ".part" or time.time() - old.stat().st_mtime > 86_400):
                    old.unlink()
        os.replace(part, pixels)
        write_atomically(listing, json.dumps({"kept": kept, "bad": bad}).encode())
        return kept, bad
    except OSError as error:
        raise UserError(f"cannot write the picture cache {pixels}: {error.strerror}; "
                        "name another folder with --cache") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def part_of(path):
    """A name for what is not whole yet, which no other process takes, on no machine that shares the folder."""
    return Path(f"{path}.{platform.node()}-{os.getpid()}.part")


def write_atomically(path, content):
    """Write a file whole or not at all: into a temporary file beside it, onto the disk, then rename."""
    part = part_of(path)
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def quiet():
    """Whether another process of this run is the one that talks."""
    return os.environ.get("RANK", "0") != "0"


def say(text):
    if not quiet():
        print(text, flush=True)


@functools.lru_cache
def say_once(text):
    """What is found in a data set: its files are read for each split, but told of once."""
    say(text)


def bar_options():
    """For tqdm: on a terminal a living bar, in a log file a line now and then."""
    return {"disable": quiet(), "dynamic_ncols": True, "mininterval": 0.2 if sys.stderr.isatty() else 30}


def download(url, path, md5=None, sha256=None):
    """Fetch url to path, with a progress bar, unless it is there. A part or a damaged file never gets that name."""
    path = Path(path)
    if path.exists():
        return path
    part = part_of(path)
    digests = {name: (hashlib.new(name), wanted) for name, wanted in (("md5", md5), ("sha256", sha256)) if wanted}
    say(f"downloading {url}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as answer, open(part, "wb") as file:
            expected = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=expected or None, unit="B", unit_scale=True, desc=path.name, **bar_options()) as bar:
                while block := answer.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
                    for digest, _ in digests.values():
                        digest.update(block)
        if expected and part.stat().st_size != expected:
            raise OSError(f"the download broke off at {part.stat().st_size:,} of {expected:,} bytes")
        for name, (digest, wanted) in digests.items():
            if not digest.hexdigest().startswith(wanted):
                raise OSError(f"the file's {name} is {digest.hexdigest()}, expected {wanted}")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        raise UserError(f"cannot download {url}: {error}. "
                        f"Try again, or fetch it by hand and put it at {path}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return path


def fetch(files, cache="data/cache"):
    """{kind: (address, SHA-256 or None)} -> {kind: path}, downloaded once, each to a name made from its address."""
    return {kind: download(url, Path(cache) / "weights" / re.sub(r"[^\w.-]+", "-", url.split("://")[1]), sha256=sha256)
            for kind, (url, sha256) in files.items()}


# === data sets =======================================================================================================

@dataclass
class Sample:
    """What is said about one picture."""
    captions: list
    long: str | None = None  # a long synthetic caption
    web: str | None = None   # a short noisy one

    @functools.cached_property
    def mirrored_is_true(self):
        """Whether the picture may be flipped: nothing that is said of it speaks of left and right."""
        text = " ".join([*self.captions, self.long or "", self.web or ""]).lower()
        return not re.search(r"\b(left|right)(most)?\b|왼|오른|좌측|우측", text)


@dataclass
class Split:
    name: str
    images: np.ndarray  # uint8 (N, S, S, 3)
    samples: list       # N of Sample
    augment: bool       # whether crops and flips leave the captions true

    def __len__(self):
        return len(self.samples)


SHAPES_COUNTS = {"train": 20_000, "val": 500, "test": 500}
FLICKR8K = {
    "Flickr8k_Dataset.zip": "f18a1e2920de5bd84dae7cf08ec78978", "Flickr8k_text.zip": "bf6c1abcb8e4a833b7f922104de18627"}
FLICKR8K_URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
FLICKR8K_COUNTS = {"train": 6000, "val": 1000, "test": 1000}
GENERATED = ("shapes", "shapes-ko")
NAMES = (*GENERATED, "flickr8k", "flickr30k", "coco")


def load(name, split, size, root=None, fit="crop", cache="data/cache", seed=0, samples=None):
    """The "train", "val" or "test" split of a data set (a name of NAMES, or one's own folder, .csv or .json) -> Split.

    Of tar shards ("shards/{00000..00099}.tar", or with *) "train" is Shards, which are streamed.
    size: pixels a side; root: where the files of a named data set lie; cache: where decoded pictures are kept; samples:
    how many pictures of shards are an epoch (without it: as many as there are).
    Raises UserError, in one line, for whatever the user can mend.
    """
    if split not in SHAPES_COUNTS:
        raise UserError(f"split {split!r}; known: {', '.join(SHAPES_COUNTS)}")
    if name in GENERATED:
        return load_shapes("ko" if name.endswith("ko") else "en", split, size, cache, seed)
    if root is not None and not Path(root).is_dir():
        found = "a file; expected the folder that holds it" if Path(root).exists() else "no such folder"
        raise UserError(f"--root {root}: {found}")
    if is_shards(name):
        return load_shards(str(name), split, size, fit, cache, samples)
    if name == "flickr8k":
        records = flickr8k(root)
    elif name in ("flickr30k", "coco"):
        if root is None:
            raise UserError(f"--data {name} needs --root: the folder with dataset_{name}.json (the Karpathy split) "
                            "and the images")
        records = read_json(Path(root) / f"dataset_{name}.json")
    else:
        records = own_pictures(name)
    records = [r for r in records if r.split == split]
    if not records:
        raise EmptySplit(f"{name}: no picture belongs to the split {split!r}")
    label = re.sub(r"\W+", "-", Path(name).stem) + f"-{split}"
    where = hashlib.sha256(os.path.abspath(root or name).encode()).hexdigest()[:6]  # two folders, two caches
    images, kept = cache_pictures(f"{label}-{where}", [r.source for r in records], size, fit, cache)
    return Split(f"{name} {split}", images, [Sample(records[i].captions, records[i].long) for i in kept], augment=True)


def load_shapes(language, split, size, cache, seed):
    keys = [f"{seed}/{split}/{i}" for i in range(SHAPES_COUNTS[split])]
    images, _ = cache_pictures(f"shapes-{split}-{seed}", keys, size, f"v{SHAPES_VERSION}", cache,
                               read=lambda key, size, fit: draw(make_scene(key), size))
    samples = [Sample(captions(scene, language), long_caption(scene, language), web_caption(scene, language))
               for scene in map(make_scene, keys)]
    return Split(f"{'shapes-ko' if language == 'ko' else 'shapes'} {split}", images, samples, augment=False)


@dataclass
class ZeroShot:
    """Pictures of one object, to be told apart by prompts."""
    images: np.ndarray  # uint8 (N, S, S, 3)
    labels: np.ndarray  # (N,) number of the class
    prompts: list       # for each class its prompts
    groups: dict        # name -> bool (N,): which pictures count for this figure


def load_zero_shot(name, size, seed=0, each=10):
    """64 classes, 8 shapes x 8 colours; "unseen": the pairs in no training picture. None where there are no classes."""
    if name not in GENERATED:
        return None
    words = KOREAN if name == "shapes-ko" else ENGLISH
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


@dataclass
class Record:
    source: object  # a path, or (path of a zip, name in it)
    captions: list
    split: str
    long: str | None = None


PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


def is_picture(name):
    return str(name).lower().endswith(PICTURE_SUFFIXES) and not Path(name).name.startswith(".")


def files_below(folder):
    """All files below a folder, also in folders that are links, as data sets on another disk are; hidden ones not."""
    return sorted(Path(folder, name) for name in glob.glob("**/*", root_dir=folder, recursive=True))


def list_pictures(folder):
    return [path for path in files_below(folder) if is_picture(path)]


def flickr8k(root=None):
    """Flickr8k from root (the two zips, what they unpack to, or Kaggle's Images/ and captions.txt), else downloaded."""
    home = Path(root or "data/flickr8k")
    if root is None:
        for name, md5 in FLICKR8K.items():
            download(FLICKR8K_URL + name, home / name, md5=md5)
    sources = flickr8k_images(home)
    texts = flickr8k_texts(home)
    captions_of = collections.defaultdict(list)
    if "Flickr8k.token.txt" in texts:
        for line in texts["Flickr8k.token.txt"].splitlines():
            name, _, caption = line.partition("\t")
            captions_of[name.split("#")[0]] += [caption] if caption.strip() else []
    elif "captions.txt" in texts:  # Kaggle's
        for row in read_rows(home / "captions.txt"):
            captions_of[row["image"]] += [row["caption"]] if row["caption"] else []
    else:
        raise UserError(f"{home} holds pictures but no captions: "
                        "expected Flickr8k_text.zip, Flickr8k.token.txt or captions.txt")
    lists = flickr8k_lists(home, texts)
    if lists is None:
        names = sorted(set(sources) & set(captions_of), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        eighth = min(1000, len(names) // 8)
        lists = {"val": names[:eighth], "test": names[eighth:2 * eighth], "train": names[2 * eighth:]}
        say_once("flickr8k: the official split lists are neither here nor to be had; this split by image is "
                 "UNOFFICIAL, and its figures compare with no published ones")
    records = [Record(sources[name], captions_of[name], split) for split, names in lists.items() for name in names
               if name in sources and captions_of.get(name)]
    found = collections.Counter(r.split for r in records)
    per_image = collections.Counter(len(r.captions) for r in records)
    as_published = dict(found) == FLICKR8K_COUNTS and set(per_image) == {5}
    say_once("flickr8k: " + ", ".join(f"{split} {found[split]:,}" for split in FLICKR8K_COUNTS)
             + " images, captions an image: " + ", ".join(str(n) for n in sorted(per_image))
             + ("" if as_published else " (the published set has 6,000 / 1,000 / 1,000 with 5 captions)"))
    lost = [name for names in lists.values() for name in names if name not in sources or not captions_of.get(name)]
    if lost:
        say_once(f"flickr8k: {len(lost)} listed images have no picture or no caption here and are left out: "
                 + ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else ""))
    if not records:
        raise UserError(f"{home}: none of the {len(lost)} listed images is among the {len(sources)} pictures here")
    return records


def flickr8k_images(home):
    """File name -> source, from Flickr8k_Dataset.zip or any folder below home."""
    archive = home / "Flickr8k_Dataset.zip"
    if archive.exists():
        names = [name for name in open_zip(str(archive)).namelist() if is_picture(name) and "__MACOSX" not in name]
        return {name.split("/")[-1]: (str(archive), name) for name in names}
    sources = {path.name: str(path) for path in list_pictures(home)}
    if not sources:
        raise UserError(f"{home} holds no pictures: expected Flickr8k_Dataset.zip, a folder Flicker8k_Dataset/ or "
                        "Images/. Without --root, flickr8k is downloaded to data/flickr8k")
    return sources


def flickr8k_texts(home):
    """File name -> text, of the caption and list files in Flickr8k_text.zip or below home."""
    wanted = re.compile(r"(Flickr8k\.token|Flickr_8k\.(train|dev|test)Images|captions)\.txt$")
    archive = home / "Flickr8k_text.zip"
    if archive.exists():
        names = [name for name in open_zip(str(archive)).namelist() if wanted.search(name) and "__MACOSX" not in name]
        return {name.split("/")[-1]: open_zip(str(archive)).read(name).decode() for name in names}
    return {path.name: read_text(path) for path in files_below(home) if wanted.search(path.name)}


def flickr8k_lists(home, texts):
    """The official lists of image names by split; Kaggle's layout lacks them: then from the text archive; else None."""
    files = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
    if not all(name in texts for name in files.values()):
        try:
            name = "Flickr8k_text.zip"
            archive = download(FLICKR8K_URL + name, Path("data/flickr8k") / name, md5=FLICKR8K[name])
        except UserError as error:
            say_once(f"flickr8k: {error}")
            return None
        texts = flickr8k_texts(archive.parent)
    return {split: texts[name].split() for split, name in files.items()}


def own_pictures(name):
    """A folder (captions.csv or captions.json in it, or NAME.txt beside NAME.jpg), a .csv or a .json -> records."""
    path = Path(name)
    if not path.exists():
        raise UserError(f"--data {name}: neither a data set ({', '.join(NAMES)}) nor a file or folder that exists")
    if path.is_dir():
        for table in ("captions.csv", "captions.json"):
            if (path / table).exists():
                return own_pictures(path / table)
        return read_folder(path)
    if path.suffix.lower() not in (".csv", ".json"):
        raise UserError(f"--data {name}: expected a folder, a .csv, a .json or shards (.tar)")
    return group(read_rows(path), path.parent, path) if path.suffix.lower() == ".csv" else read_json(path)


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror[0].lower() + error.strerror[1:]}") from None


def read_rows(path):
    """The rows of a table with columns image and caption, as dicts, without spaces around the fields."""
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        rows.fieldnames = [column.strip() for column in rows.fieldnames or ()]
        if not {"image", "caption"} <= set(rows.fieldnames):
            raise UserError(f"{path}: columns found: {', '.join(rows.fieldnames) or 'none'}; "
                            "expected image,caption (and, if you like, long,split), separated by commas")
        found = []
        for row in rows:
            if None in row:
                raise UserError(f"{path}, line {rows.line_num}: more fields than the header has; "
                                "put captions with commas in quotes")
            found.append({column: (field or "").strip() for column, field in row.items()})
        return found
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}; is a quote not closed?") from None


def read_folder(folder):
    pictures = list_pictures(folder)
    if not pictures:
        raise UserError(f"--data {folder}: no pictures in this folder; "
                        "expected files such as NAME.jpg with NAME.txt beside them")
    rows = []
    for picture in pictures:
        text = picture.with_suffix(".txt")
        for line in read_text(text).splitlines() if text.exists() else ():
            rows.append({"image": str(picture.relative_to(folder)), "caption": line})
    with_captions = {row["image"] for row in rows}
    if not rows:
        raise UserError(f"--data {folder}: {len(pictures)} pictures and not one caption; expected NAME.txt beside "
                        "NAME.jpg (a caption a line), or a captions.csv with columns image,caption")
    if len(with_captions) < len(pictures):
        say_once(f"{folder}: {len(pictures) - len(with_captions)} of {len(pictures)} pictures have no .txt beside them "
                 "and are left out")
    return group(rows, folder, folder)


def read_json(path):
    """A list of {image, caption(s), long?, split?}, also with KoCLIP's file_path and caption_ko, or a Karpathy file."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON ({error})") from None
    folder, rows = Path(path).parent, []
    if isinstance(content, dict) and "images" in content:  # Karpathy's: names, and of COCO the folders, too
        pictures = [str(picture.relative_to(folder)) for picture in list_pictures(folder)]
        places = {os.path.basename(picture): picture for picture in pictures} | {name: name for name in pictures}

        def place_of(entry):
            whole = os.path.join(entry.get("filepath") or "", entry["filename"])
            return places.get(whole) or places.get(entry["filename"]) or entry["filename"]
        try:
            content = [{"image": place_of(entry), "split": entry["split"],
                        "captions": [sentence["raw"] for sentence in entry["sentences"]]}
                       for entry in content["images"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: an entry of its images lacks {error}; expected a Karpathy split file, "
                            "with filename, split and sentences (COCO's own annotation files are none)") from None
    for n, entry in enumerate(content if isinstance(content, list) else ()):
        entry = entry if isinstance(entry, dict) else {}
        image = entry.get("image", entry.get("file_path"))
        texts = next((entry[key] for key in ("captions", "caption_ko", "caption") if key in entry), None)
        texts = [texts] if isinstance(texts, str) else texts
        extra = {key: entry.get(key) or "" for key in ("long", "split")}
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in (image, *texts, *extra.values()))):
            raise UserError(f"{path}: entry {n + 1} is {json.dumps(content[n], ensure_ascii=False)[:80]}; "
                            "expected an object with image and caption (or captions), all of them texts")
        rows += [{"image": image, "caption": text, **extra} for text in texts or [""]]
    if not rows:
        raise UserError(f"{path}: no entries; expected a list of objects with image and caption")
    return group(rows, folder, path)


SPLITS = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "test": "test"}


def group(rows, folder, origin):
    """Rows of image, caption, long?, split? -> a record per image. Without a split: 80/10/10 by a hash of the name."""
    records, empty = {}, 0
    for row in rows:
        caption, split = (row["caption"] or "").strip(), (row.get("split") or "").strip().lower()
        if not caption:
            empty += 1
            continue
        if split and split not in SPLITS:
            raise UserError(f"{origin}: split {split!r}; known: {', '.join(SPLITS)}")
        if not row["image"]:
            raise UserError(f"{origin}: the caption {caption[:40]!r} has no image")
        name = os.path.normpath(row["image"]).replace(os.sep, "/")
        record = records.setdefault(name, Record(str(folder / name), [], SPLITS.get(split)))
        if record.split != SPLITS.get(split):
            raise UserError(f"{origin}: {name} is in two splits, {record.split} and {split or 'none'}; "
                            "an image belongs to one")
        record.captions.append(caption)
        record.long = record.long or (row.get("long") or "").strip() or None
    if empty:
        say_once(f"{origin}: {empty} of {len(rows)} captions are empty and are left out")
    if not records:
        raise UserError(f"{origin}: no image with a caption")
    missing = [r.source for r in records.values() if not os.path.exists(r.source)]
    if len(missing) == len(records):
        raise UserError(f"{origin}: none of its {len(records)} images exists; looked, for one, for {missing[0]}")
    undecided = sorted((name for name in records if records[name].split is None),
                       key=lambda name: hashlib.sha256(os.fsencode(name)).hexdigest())
    tenth = -(-len(undecided) // 10)
    for i, name in enumerate(undecided):
        records[name].split = "val" if i < tenth else "test" if i < 2 * tenth else "train"
    counts = collections.Counter(r.split for r in records.values())
    say_once(f"{origin}: {len(records)} images, {sum(len(r.captions) for r in records.values())} captions; "
             + ", ".join(f"{split} {counts[split]}" for split in ("train", "val", "test"))
             + (f" ({len(undecided)} without a split: 80/10/10, by a hash of the name)" if undecided else ""))
    return list(records.values())


# === the loader ======================================================================================================

class Loader:
    """Training batches. `batch_at(step)` is a function of seed and step alone: that is all there is to resuming.

    text_batch(samples, rngs) -> dict of tensors: the model's say in which captions it trains on and in what form.
    batch: the global batch, of which this process gets the rank-th part of `world`; what is drawn is drawn for all of
    it, so that the processes together see the very batch that one process would.
    """
    def __init__(self, split, batch, text_batch, seed=0, rank=0, world=1):
        if batch > len(split):
            raise UserError(f"--batch {batch} is larger than the {len(split)} pictures of {split.name}")
        if batch < 2:
            raise UserError(f"--batch {batch}: a batch must be >= 2 (1 leaves no negatives)")
        if batch % world:
            raise UserError(f"--batch {batch} does not divide among {world} processes")
        self.split, self.batch, self.text_batch = split, batch, text_batch
        self.seed, self.rank, self.world = seed, rank, world
        self.steps_per_epoch = len(split) // batch
        self.broken = 0  # as ShardLoader's; here broken pictures were left out when the cache was made
        self.pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count()))

    @functools.lru_cache(2)
    def order(self, epoch):
        rows = list(range(len(self.split)))
        random.Random(f"order/{self.seed}/{epoch}").shuffle(rows)
        return rows

    def state(self):
        return None  # the step is enough

    def batch_at(self, step):
        """-> {"images": uint8 (B / world, 3, S, S), and what text_batch returns}."""
        epoch, i = divmod(step, self.steps_per_epoch)
        share = self.batch // self.world
        first = i * self.batch + self.rank * share
        rows = self.order(epoch)[first:first + share]
        rngs = [random.Random(f"sample/{self.seed}/{epoch}/{row}") for row in rows]
        samples = [self.split.samples[row] for row in rows]
        images = self.split.images[rows]  # (b, S, S, 3)
        if self.split.augment:
            images = np.stack(list(self.pool.map(augment, images, rngs, [s.mirrored_is_true for s in samples])))
        return {"images": torch.from_numpy(images).permute(0, 3, 1, 2), **self.text_batch(samples, rngs)}

    def stream(self, first, last, ahead=2):
        """The batches of steps first to last - 1, made in a thread that runs `ahead` of the training step."""
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            pending = collections.deque(thread.submit(self.batch_at, step)
                                        for step in range(first, min(first + ahead, last)))
            for step in range(first, last):
                batch = pending.popleft().result()
                if step + ahead < last:
                    pending.append(thread.submit(self.batch_at, step + ahead))
                yield batch


def augment(pixels, rng, flip, scale=(0.5, 1.0)):
    """Random resized crop of uint8 (S, S, 3) to that size, `scale` the share of the area, and a random flip if `flip`.

    With Pillow, on the cached pixels: on one thread it is as fast as torch, and it keeps off the cores that train.
    """
    size = len(pixels)
    area, ratio = rng.uniform(*scale), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = min(size, size * math.sqrt(area * ratio)), min(size, size * math.sqrt(area / ratio))
    left, top = rng.uniform(0, size - w), rng.uniform(0, size - h)
    image = Image.fromarray(pixels).resize((size, size), Image.BILINEAR, box=(left, top, left + w, top + h))
    return np.asarray(ImageOps.mirror(image) if flip and rng.random() < 0.5 else image)


# === shards: tar files of pictures and captions, streamed ============================================================
# For what fits neither into memory nor into a cache. A shard is a plain .tar with KEY.jpg (.png, .webp, ...) and, next
# to it, KEY.txt (a caption a line) or KEY.json with "caption", or Recap-DataComp's "org_caption" and "re_caption".

BUFFER = 5000  # samples, as places in the files, among which a reader draws the next one

Place = collections.namedtuple("Place", "turn drawn")  # of a reader: its pass over the shards, samples drawn in it


@dataclass
class Shards:
    """Training pictures in shards. An epoch is `count` of them, wherever the readers are then."""
    name: str
    paths: list
    samples: list  # those of the first shard, for a tokenizer to learn from; without the pictures
    count: int
    size: int
    fit: str

    def __len__(self):
        return self.count


def is_shards(name):
    return str(name).endswith(".tar")


def shard_paths(pattern):
    """"shards/{00000..00099}.tar" or "shards/*.tar" -> the paths."""
    brace = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if brace:
        first, last = brace.groups()
        paths = [Path(pattern[:brace.start()] + str(i).zfill(len(first)) + pattern[brace.end():])
                 for i in range(int(first), int(last) + 1)]
    else:
        paths = sorted(map(Path, glob.glob(pattern)))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"--data {pattern}: {len(missing)} of {len(paths)} shards are not there: "
                        + ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else ""))
    if len(paths) < 2:
        raise UserError(f"--data {pattern}: {len(paths)} shards found; expected two or more, as the last one is kept "
                        "for validation and test")
    return paths


@functools.lru_cache(4)
def shard_index(path):
    """-> where the samples of a shard lie, [(key, {"jpg": (offset, bytes), ...}), ...], and what broke it off, or None.

    Reads the headers alone. Nothing is ever unpacked, so that no name in an archive can do any harm.
    """
    samples, error = {}, None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                if member.isfile() and not name.startswith("."):  # such as macOS's ._NAME beside every NAME
                    key, _, suffix = name.partition(".")
                    samples.setdefault(os.path.join(folder, key), {})[suffix.lower()] = member.offset_data, member.size
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # at a damaged header tarfile ends as at the end
                error = f"damaged or cut off at byte {tar.offset:,}"
    except (OSError, tarfile.TarError) as problem:
        error = f"{problem}; expected a .tar that is not compressed"
    return list(samples.items()), error


def read_part(path, place):
    try:
        with open(path, "rb") as file:
            file.seek(place[0])
            content = file.read(place[1])
    except OSError as error:
        raise PictureError(f"the shard cannot be read: {error.strerror}") from None
    if len(content) < place[1]:
        raise PictureError("the shard ends in the middle of it")
    return content


def read_captions(path, parts):
    """The texts of a sample of a shard -> Sample."""
    try:
        lines = read_part(path, parts["txt"]).decode("utf-8-sig").splitlines() if "txt" in parts else []
        entry = json.loads(read_part(path, parts["json"])) if "json" in parts else {}
    except ValueError as error:
        raise PictureError(f"its captions cannot be read ({type(error).__name__})") from None
    entry = entry if isinstance(entry, dict) else {}
    texts = {key: " ".join(entry[key].split()) if isinstance(entry.get(key), str) else ""
             for key in ("caption", "org_caption", "re_caption")}
    web, long = texts["org_caption"] or None, texts["re_caption"] or None
    captions = [line.strip() for line in lines if line.strip()] or list(filter(None, [texts["caption"] or web or long]))
    if not captions:
        raise PictureError("no caption: expected KEY.txt, or KEY.json with caption, or org_caption and re_caption")
    return Sample(captions, long, web)


def read_shard_sample(path, parts, size, fit):
    """-> uint8 (size, size, 3), Sample; or a PictureError for one that is broken."""
    picture = next((suffix for suffix in parts if f".{suffix}" in PICTURE_SUFFIXES), None)
    if picture is None:
        raise PictureError("no picture")
    sample = read_captions(path, parts)
    return read_picture(read_part(path, parts[picture]), size, fit), sample


def load_shards(pattern, split, size, fit, cache, count):
    """"train" -> Shards; "val" and "test" -> a Split each, of one half of the last shard, 1,000 pictures at most."""
    *paths, held_out = shard_paths(pattern)
    if split != "train":
        entries, error = shard_index(held_out)
        if error:
            say(f"{held_out}: its first {len(entries)} samples alone can be read: {error}")
        entries = [(str(held_out), key, parts) for key, parts in entries[1 if split == "test" else 0::2]][:1000]
        if len(entries) < 2:
            raise UserError(f"{held_out}: {error or 'it holds fewer than four samples'}; as the last shard it is kept "
                            "for validation and test")

        def read(source, size, fit):
            return read_shard_sample(source[0], parts_of[source], size, fit)[0]
        parts_of = {entry[:2]: entry[2] for entry in entries}
        where = hashlib.sha256(os.path.abspath(pattern).encode()).hexdigest()[:6]  # two folders, two caches
        name = re.sub(r"\W+", "-", Path(pattern).parent.name) + f"-{split}-{where}"
        images, kept = cache_pictures(name, list(parts_of), size, fit, cache, read)
        kept = [entries[i] for i in kept]
        samples = [read_captions(path, parts) for path, _, parts in kept]
        return Split(f"{pattern} {split}", images, samples, augment=True)
    samples = []
    for _, parts in shard_index(paths[0])[0]:
        with contextlib.suppress(PictureError):
            samples.append(read_captions(paths[0], parts))
    if not samples:
        raise UserError(f"{paths[0]}: {shard_index(paths[0])[1] or 'no sample with a caption'}; expected KEY.jpg with "
                        "KEY.txt, or KEY.json, for each picture (a KEY ends at the first dot)")
    if count is None:
        bar = tqdm(paths, desc="counting the samples (or say --samples)", unit=" shards", **bar_options())
        count = sum(len(shard_index(path)[0]) for path in bar)
    return Shards(f"{pattern} train", paths, samples, count, size, fit)


class ShardReader(torch.utils.data.IterableDataset):
    """Batches of pictures and texts, read by `workers` processes for each of `world` training processes, or by none.

    Every pass over the shards deals them out anew: reader g of G gets each G-th of the shuffled list, so that together
    they read every sample once. What does not fill a batch at the end of a reader's pass is dropped. A reader draws
    from a buffer of places in the files; which one follows from the seed alone, so a place is all there is to resuming.
    """
    def __init__(self, shards, batch, seed, rank, world, workers, places, step):
        self.shards, self.batch, self.seed, self.places, self.step = shards, batch, seed, places, step
        self.rank, self.world, self.workers = rank, world, max(1, workers)

    def draw(self, reader, turn):
        """The samples of a reader's pass, in order: (path, key, parts) each, or (path, None, what broke it off)."""
        paths = list(self.shards.paths)
        random.Random(f"shards/{self.seed}/{turn}").shuffle(paths)
        rng, buffer = random.Random(f"buffer/{self.seed}/{turn}/{reader}"), []
        for path in paths[reader::self.world * self.workers]:
            entries, error = shard_index(path)
            for entry in [(path, *entry) for entry in entries] + ([(path, None, error)] if error else []):
                if len(buffer) < BUFFER:
                    buffer.append(entry)
                else:
                    i = rng.randrange(BUFFER)
                    yield buffer[i]
                    buffer[i] = entry
        rng.shuffle(buffer)
        yield from buffer

    def __iter__(self):
        process = torch.utils.data.get_worker_info()
        if process:  # what ends a run is for the training process, which finishes its step and then ends its workers
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        worker = ((process.id if process else 0) + self.step) % self.workers  # resumed, another one's turn is first
        reader = self.rank * self.workers + worker
        (turn, drawn), broken = self.places[worker], []
        while True:
            full, images, samples, rngs = False, [], [], []
            for number, (path, key, parts) in enumerate(self.draw(reader, turn), 1):
                if number <= drawn:
                    continue
                try:
                    if key is None:
                        raise PictureError(parts)
                    pixels, sample = read_shard_sample(path, parts, self.shards.size, self.shards.fit)
                except Exception as error:  # the web has files that fail in ways of their own: none may end a run
                    broken.append(f"{path}{f', {key}' if key else ''}: {error or type(error).__name__}")
                    continue
                rng = random.Random(f"sample/{self.seed}/{turn}/{reader}/{number}")
                images.append(augment(pixels, rng, sample.mirrored_is_true))
                samples.append(sample)
                rngs.append(rng)
                if len(images) == self.batch:
                    yield np.stack(images), samples, rngs, broken, worker, Place(turn, number)
                    full, images, samples, rngs, broken = True, [], [], [], []
            if not full and not drawn:  # a whole pass did not fill one batch: the user is told
                yield None, [], [], broken, worker, Place(turn, 0)
            turn, drawn = turn + 1, 0


def as_it_is(batch):
    return batch


class ShardLoader:
    """As Loader, for Shards. state: of all processes, what `state()` was in each, to go on from there."""
    def __init__(self, shards, batch, text_batch, seed=0, rank=0, world=1, workers=2, state=None):
        readers = world * max(1, workers)
        if batch < 2 or batch % world:
            raise UserError(f"--batch {batch}: expected two or more, a multiple of the {world} processes")
        if batch > len(shards):
            raise UserError(f"--batch {batch} is larger than an epoch of {len(shards)} pictures (--samples)")
        if len(shards.paths) < readers:
            raise UserError(f"{len(shards.paths)} shards to train on, for {world} processes with {max(1, workers)} "
                            "workers each: every reader needs one; lower --workers, or make more and smaller shards")
        names = zlib.crc32("".join(path.name for path in shards.paths).encode())
        self.dealt = {"processes": world, "workers": workers, "shards": len(shards.paths), "names": names}
        before = {key: value for key, value in state[0].items() if key != "places"} if state else self.dealt
        if before != self.dealt:
            found = "{processes} processes with {workers} workers each and {shards} shards"
            raise UserError(f"this run was on {found.format(**before)}; here are {found.format(**self.dealt)}"
                            + (" of other names" if before["names"] != names else "")
                            + ". It can only go on with the same: they are dealt out among the readers")
        self.shards, self.batch, self.text_batch = shards, batch, text_batch
        self.seed, self.rank, self.world, self.workers = seed, rank, world, workers
        self.steps_per_epoch, self.broken = len(shards) // batch, 0
        self.places = [Place(*place) for place in state[rank]["places"]] if state else [Place(0, 0)] * max(1, workers)

    def state(self):
        """Of this process, in plain types: how far its readers are, and what that depends on."""
        return {**self.dealt, "places": [list(place) for place in self.places]}

    def stream(self, first, last, ahead=2):
        """The batches of steps first to last - 1, put together in a thread that runs `ahead` of the training step."""
        reader = ShardReader(self.shards, self.batch // self.world, self.seed, self.rank, self.world, self.workers,
                             list(self.places), first)
        read = iter(torch.utils.data.DataLoader(reader, batch_size=None, num_workers=self.workers, collate_fn=as_it_is,
                                                prefetch_factor=2 if self.workers else None))

        def make():
            images, samples, rngs, *rest = next(read)
            if images is None:
                return None, *rest
            return {"images": torch.from_numpy(images).permute(0, 3, 1, 2), **self.text_batch(samples, rngs)}, *rest

        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            pending = collections.deque(thread.submit(make) for _ in range(first, min(first + ahead, last)))
            for step in range(first, last):
                batch, broken, worker, place = pending.popleft().result()
                for problem in broken:
                    self.broken += 1
                    if self.broken <= 3:
                        say(f"left out: {problem}" + ("; of more like it, only the number" if self.broken == 3 else ""))
                if batch is None:
                    raise UserError(f"{self.shards.name}: a reader's share of the shards has fewer good pictures than "
                                    f"the {self.batch // self.world} of its batch; lower --workers or --batch"
                                    + (f". The first that is not good: {broken[0]}" if broken else ""))
                if step + ahead < last:
                    pending.append(thread.submit(make))
                self.places[worker] = place
                yield batch


# === tokenizers ======================================================================================================
# Each offers encode(text) -> ids of its pieces, decode(ids) -> text, pad_id, start_id, end_id, len(), and state():
# plain types, which go into every checkpoint, so that a model is never parted from its vocabulary. Special tokens
# around the pieces are the model files' business.

WORDS_KEPT = 250_000  # whose ids a tokenizer remembers: the web has more different words than memory has room for


class BPE:
    """Byte-level byte-pair encoding, trained on the captions at hand: any language, no unknown characters.

    Text is lower-cased and split into words, each with the space before it; a word is its UTF-8 bytes; then the pair of
    neighbours that was most frequent in training becomes one symbol, and so on, in the order training found them.
    Ids: 0 pad, 1 start, 2 end, 3 mask (or class), 4 to 259 the bytes, then the merges.

    >>> t = BPE.train(["low lower lowest"] * 9, vocab_size=264)    # four merges: ' l', 'ow', ' low', ' lowe'
    >>> [t.decode([i]) for i in t.encode("Lowest slow")], t.encode("low")
    (['lowe', 's', 't', '', 's', 'l', 'ow'], [262])
    """
    pad_id, start_id, end_id, mask_id, first_byte = 0, 1, 2, 3, 4
    class_id = 3  # no model wants both

    def __init__(self, merges):
        self.merges = [tuple(pair) for pair in merges]
        self.ranks = {pair: i for i, pair in enumerate(self.merges)}
        self.symbols = [b""] * self.first_byte + [bytes([i]) for i in range(256)]
        for a, b in self.merges:
            self.symbols.append(self.symbols[a] + self.symbols[b])
        self.cache = {}

    def __len__(self):
        return len(self.symbols)

    @staticmethod
    def words(text):
        text = " " + " ".join(unicodedata.normalize("NFC", text).lower().split())
        return re.findall(r" ?[^\W\d_]+| ?\d| ?(?:[^\w\s]|_)+| ", text)

    @classmethod
    def train(cls, texts, vocab_size=8192):
        counts = collections.Counter(word for text in texts for word in cls.words(text))
        words = [[cls.first_byte + byte for byte in word.encode(errors="replace")] for word in counts]
        pairs, where = collections.Counter(), collections.defaultdict(set)
        for i, (word, n) in enumerate(zip(words, counts.values())):
            for pair in zip(word, word[1:]):
                pairs[pair] += n
                where[pair].add(i)
        heap = [(-n, pair) for pair, n in pairs.items()]
        heapq.heapify(heap)
        merges, frequencies = [], list(counts.values())
        while heap and cls.first_byte + 256 + len(merges) < vocab_size:
            n, pair = heapq.heappop(heap)
            if pairs[pair] != -n:
                continue  # an outdated entry: this pair was pushed again when its count changed
            if n > -2:
                break
            changed = set()
            for i in list(where[pair]):
                for p in zip(words[i], words[i][1:]):
                    pairs[p] -= frequencies[i]
                    changed.add(p)
                words[i] = merge(words[i], pair, cls.first_byte + 256 + len(merges))
                for p in zip(words[i], words[i][1:]):
                    pairs[p] += frequencies[i]
                    where[p].add(i)
                    changed.add(p)
            merges.append(pair)
            for p in changed - {pair}:
                heapq.heappush(heap, (-pairs[p], p))
        return cls(merges)

    def encode(self, text):
        ids = []
        for word in self.words(text):
            symbols = self.cache.get(word)
            if symbols is None:
                symbols = [self.first_byte + byte for byte in word.encode(errors="replace")]
                while len(symbols) > 1:
                    pair = min(zip(symbols, symbols[1:]), key=lambda p: self.ranks.get(p, len(self)))
                    if pair not in self.ranks:
                        break
                    symbols = merge(symbols, pair, self.first_byte + 256 + self.ranks[pair])
                if len(self.cache) < WORDS_KEPT:
                    self.cache[word] = symbols
            ids += symbols
        return ids

    def decode(self, ids):
        return b"".join(self.symbols[i] for i in ids).decode(errors="replace").strip()

    def state(self):
        return {"kind": "bpe", "merges": self.merges}


def merge(symbols, pair, new):
    """[a, b, c, a, b] with (a, b) -> new: [new, c, new]."""
    merged, i = [], 0
    while i < len(symbols):
        found = tuple(symbols[i:i + 2]) == pair
        merged.append(new if found else symbols[i])
        i += 1 + found
    return merged


class CLIPBPE:
    """CLIP's tokenizer, from its published list of merges, bpe_simple_vocab_16e6.txt.gz.

    Clean, lower-case, split into words; a word is its UTF-8 bytes, the last one marked with </w>; then, again and
    again, the two neighbours that come first in the list become one. Ids: the 256 bytes, the same as ends of words, the
    merges, start 49406, end 49407. Padding is 0, which also is "!": models look for the end, not for the padding.

    >>> CLIPBPE.from_file("bpe_simple_vocab_16e6.txt.gz").encode("A photo of a dog")
    [320, 1125, 539, 320, 1929]
    """
    pad_id = 0

    def __init__(self, merges):
        self.merges = list(merges)
        # The file writes printable bytes as themselves, the other 68 as the characters from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        order = printable + [byte for byte in range(256) if byte not in printable]
        alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(68)]
        self.character, self.byte = dict(zip(order, alphabet)), dict(zip(alphabet, order))
        self.pieces = [*alphabet, *(c + "</w>" for c in alphabet), *(m.replace(" ", "") for m in self.merges),
                       "<|startoftext|>", "<|endoftext|>"]
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        self.start_id, self.end_id = len(self.pieces) - 2, len(self.pieces) - 1
        self.ranks = {tuple(merge.split()): i for i, merge in enumerate(self.merges)}
        numbers = more_numbers()
        self.word = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)"
                               rf"|[^\W\d_{numbers}]+|[\d{numbers}]|(?:[^\s\w\u0345]|_)+", re.IGNORECASE)
        self.cache = {}

    @classmethod
    def from_file(cls, path):
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = file.read().split("\n")
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (OSError, EOFError, UnicodeDecodeError, zlib.error):
            raise UserError(f"{path} is no CLIP vocabulary (expected bpe_simple_vocab_16e6.txt.gz)") from None
        merges = lines[1:49152 - 256 - 2 + 1]  # the first line is a comment, and the file lists more than CLIP uses
        if len(merges) != 48894 or any(merge.count(" ") != 1 for merge in merges):
            raise UserError(f"{path} is no CLIP vocabulary: expected a comment and at least 48,894 merges of two")
        return cls(merges)

    def __len__(self):
        return len(self.pieces)

    @staticmethod
    def clean(text):
        return " ".join(basic_clean(text).split()).lower()

    def encode(self, text):
        ids = []
        for word in self.word.findall(self.clean(text)):
            found = self.cache.get(word)
            if found is None:
                found = self.encode_word(word)
                if len(self.cache) < WORDS_KEPT:
                    self.cache[word] = found
            ids += found
        return ids

    def encode_word(self, word):
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return [self.ids[word]]
        symbols = [self.character[byte] for byte in word.encode(errors="replace")]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            pair = min(zip(symbols, symbols[1:]), key=lambda p: self.ranks.get(p, len(self)))
            if pair not in self.ranks:
                break
            symbols = merge(symbols, pair, "".join(pair))
        return [self.ids[symbol] for symbol in symbols]

    def decode(self, ids):
        text = "".join(self.pieces[i] for i in ids if i < self.start_id).replace("</w>", " ")
        return bytes(self.byte.get(c, 32) for c in text).decode(errors="replace").strip()

    def state(self):
        return {"kind": "clip", "merges": self.merges}


def basic_clean(text):
    """As ftfy (but broken encodings stay as they are), then HTML entities, twice: what CLIP's and ProLIP's code do."""
    tags, before = "<" in text, None  # as ftfy: text with tags may be HTML, where entities mean themselves
    while text != before:  # what an entity stands for may itself need cleaning
        before = text
        if not tags:
            text = re.sub(r"&#?[0-9A-Za-z]{1,24};", lambda entity: html.unescape(entity[0]), text)
        text = unicodedata.normalize("NFC", text.translate(CLEANED))
    return html.unescape(html.unescape(text))


@functools.cache
def more_numbers():
    """Numbers beyond re's digits: Roman numerals, superscripts, fractions. CLIP takes them one by one, like digits."""
    return "".join(chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) in ("Nl", "No"))


# What ftfy makes of some characters: straight quotes, ligatures and full-width letters as plain ones, no controls.
CLEANED = {code: unicodedata.normalize("NFKC", chr(code)) for code in (
    *range(0xFF01, 0xFFF0), *range(0xFB00, 0xFB07), 0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), 0x1F1, 0x1F2, 0x1F3)}
CLEANED |= dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
CLEANED |= {code: c for code in range(128, 160) for c in bytes([code]).decode("cp1252", "ignore")} | {0xFB05: "\u017ft"}
CLEANED |= dict.fromkeys((*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)))


class WordPiece:
    """BERT's tokenizer, from a published vocab.txt (one piece a line, the line number is the id).

    Clean, split at spaces and punctuation, then take from each word the longest piece in the vocabulary, again and
    again; a piece inside a word starts with ##. A word of over 100 characters or with a rest nothing matches is [UNK].

    >>> WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "!"]).encode("Unaffable! Ugh")
    [4, 5, 6, 7, 1]
    """
    def __init__(self, vocab, lower=True, clean=False):
        self.vocab, self.lower, self.clean = list(vocab), lower, clean  # clean: by basic_clean before all else
        self.ids = {piece: i for i, piece in enumerate(self.vocab)}
        required = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
        missing = [token for token in required if token not in self.ids]
        if missing:
            raise UserError("this is no WordPiece vocabulary: "
                            f"{', '.join(missing)} not among its {len(self.vocab)} lines")
        self.pad_id, self.unk_id, self.start_id, self.end_id = (self.ids[token] for token in required)
        self.special = re.compile(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])")
        self.cache = {}

    @classmethod
    def from_file(cls, path, lower=True, clean=False):
        try:
            return cls(Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n"), lower, clean)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{path} is no vocab.txt; expected UTF-8 text, one piece a line") from None

    def __len__(self):
        return len(self.vocab)

    def words(self, text):
        kept = []
        for c in text:
            if c in "\t\n\r" or unicodedata.category(c) == "Zs":
                kept.append(" ")
            elif unicodedata.category(c)[0] != "C" and c != "\ufffd":  # no control or format characters
                kept.append(f" {c} " if is_cjk(ord(c)) else c)
        text = "".join(kept)
        if self.lower:
            text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn").lower()
        text = "".join(f" {c} " if c in string.punctuation or unicodedata.category(c)[0] == "P" else c for c in text)
        return text.split()

    def pieces(self, word):
        if len(word) > 100:
            return [self.unk_id]
        ids, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.ids:
                    break
            else:
                return [self.unk_id]
            ids.append(self.ids[piece])
            start = end
        return ids

    def encode(self, text):
        ids, text = [], basic_clean(text) if self.clean else text
        for i, part in enumerate(self.special.split(text)):
            if i % 2:  # [CLS] and the like, spelled out in the text
                ids.append(self.ids.get(part, self.unk_id))
                continue
            for word in self.words(part):
                found = self.cache.get(word)
                if found is None:
                    found = self.pieces(word)
                    if len(self.cache) < WORDS_KEPT:
                        self.cache[word] = found
                ids += found
        return ids

    def decode(self, ids):
        return " ".join(self.vocab[i] for i in ids if i != self.pad_id).replace(" ##", "")

    def state(self):
        return {"kind": "wordpiece", "vocab": self.vocab, "lower": self.lower, "clean": self.clean}


def is_cjk(code):
    """Chinese characters, which have no spaces between words (Hangul and kana are none of them)."""
    return any(first <= code <= last for first, last in ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF),
               (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)))


class Unigram:
    """SentencePiece's Unigram model as ProLIP uses it (with T5's vocabulary), from a published tokenizer.json.

    Clean; write each space as ▁, and one in front; cut before each ▁; then, of all ways to spell such a word in pieces,
    take the one with the largest sum of scores, which are log probabilities. A character that no piece has costs ten
    more than the rarest piece, and a run of them is one <unk>. The end of a text, 1, is its padding too; no start.

    >>> pieces = [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁", -5], ["▁a", -2], ["▁do", -4], ["g", -3], ["dog", -3]]
    >>> Unigram(pieces).encode("A dog!")    # ▁do g has -7, ▁ dog has -8
    [4, 5, 6]
    """
    start_id, pad_id, end_id = None, 1, 1

    def __init__(self, pieces, unk_id=2):
        self.pieces, self.unk_id = [(piece, float(score)) for piece, score in pieces], unk_id
        self.ids = {piece: i for i, (piece, _) in enumerate(self.pieces)}
        self.longest = max(map(len, self.ids))
        self.unknown = min(score for _, score in self.pieces) - 10
        self.cache = {}

    @classmethod
    def from_file(cls, path):
        try:
            model = json.loads(Path(path).read_text(encoding="utf-8"))["model"]
            if model["type"] != "Unigram" or model.get("byte_fallback"):
                found = model["type"] + (" with byte_fallback" if model.get("byte_fallback") else "")
                raise UserError(f"{path}: expected a Unigram model without byte_fallback, found {found}")
            return cls(model["vocab"], model["unk_id"])
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except UserError:
            raise
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(f"{path} is no tokenizer.json with a Unigram model (type, vocab, unk_id)") from None

    def __len__(self):
        return len(self.pieces)

    @staticmethod
    def clean(text):
        """ProLIP's `canonical`: basic_clean, no punctuation, lower case, single spaces."""
        text = basic_clean(text).strip().replace("_", " ").translate(str.maketrans("", "", string.punctuation))
        return " ".join(text.lower().split())

    def encode(self, text):
        text = unicodedata.normalize("NFKC", self.clean(text)).replace(" ", "▁")
        if not text:
            return []
        ids = []
        for word in re.findall("▁?[^▁]+|▁", text if text[0] == "▁" else "▁" + text):
            found = self.cache.get(word)
            if found is None:
                found = self.encode_word(word)
                if len(self.cache) < WORDS_KEPT:
                    self.cache[word] = found
            ids += found
        return ids

    def encode_word(self, word):
        """Viterbi: the best spelling of word[:end] is the best of word[:start], for some start, and one more piece."""
        best = [(0.0, None, None)] + [(-math.inf, None, None)] * len(word)  # for each end: score, start, id
        for start in range(len(word)):
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                i = self.ids.get(word[start:end])
                if i is None and end > start + 1:
                    continue
                score = best[start][0] + (self.unknown if i is None else self.pieces[i][1])
                if score > best[end][0]:
                    best[end] = score, start, self.unk_id if i is None else i
        ids, end = [], len(word)
        while end:
            _, end, i = best[end]
            if i != self.unk_id or ids[-1:] != [i]:
                ids.append(i)
        return ids[::-1]

    def decode(self, ids):
        return "".join(self.pieces[i][0] for i in ids if i != self.pad_id).replace("▁", " ").strip()

    def state(self):
        return {"kind": "unigram", "pieces": self.pieces, "unk_id": self.unk_id}


def read_vocabulary(kind, path):
    """A published vocabulary: "clip" (merges), "unigram" (T5's), "wordpiece" (BERT's), "wordpiece-cased", "-clips"."""
    if kind == "clip":
        return CLIPBPE.from_file(path)
    if kind == "unigram":
        return Unigram.from_file(path)
    return WordPiece.from_file(path, lower=kind != "wordpiece-cased", clean=kind == "wordpiece-clips")


def tokenizer_from(state):
    """The tokenizer that wrote this state()."""
    if state["kind"] == "bpe":
        return BPE(state["merges"])
    if state["kind"] == "clip":
        return CLIPBPE(state["merges"])
    if state["kind"] == "wordpiece":
        return WordPiece(state["vocab"], state["lower"], state.get("clean", False))
    if state["kind"] == "unigram":
        return Unigram(state["pieces"], state["unk_id"])
    raise UserError(f"unknown kind of tokenizer {state['kind']!r}; known: bpe, clip, unigram, wordpiece")
