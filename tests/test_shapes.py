"""shapes.py: captions against a parser that is written here, drawings, and pictures that are the same to the bit."""
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import data
import shapes

COLOURS = {"red": (214, 48, 49), "orange": (240, 138, 36), "yellow": (247, 208, 58), "green": (64, 160, 74),
           "cyan": (66, 196, 212), "blue": (44, 92, 214), "purple": (128, 62, 176), "pink": (242, 130, 178)}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
ALL_PAIRS = list(itertools.product(SHAPES, COLOURS))


# --- a parser of captions, of both languages at once ------------------------------------------------------------------

MEANING = {"작은": "small", "큰": "large", "줄무늬": "striped", "물방울무늬": "dotted", "어두운": "dark", "밝은": "light",
           "회색": "gray", "체크무늬": "checkered", "가로줄": "lined", "점무늬": "speckled", "왼쪽에": "to the left of",
           "오른쪽에": "to the right of", "위에": "above", "아래에": "below", "a": 1, "an": 1, "one": 1, "two": 2, "three": 3,
           "한": 1, "두": 2, "세": 3}
MEANING |= zip(("빨간색", "주황색", "노란색", "초록색", "하늘색", "파란색", "보라색", "분홍색"), COLOURS)
MEANING |= zip(("원", "사각형", "삼각형", "별", "하트", "십자가", "고리", "초승달"), SHAPES)
PLACES = ("in the top left|at the top|in the top right|on the left|in the middle|on the right|in the bottom left|"
          "at the bottom|in the bottom right|왼쪽 위에|위쪽에|오른쪽 위에|왼쪽에|가운데에|오른쪽에|왼쪽 아래에|아래쪽에|오른쪽 아래에")
THINGS = (r"\b(?P<n>an?|two|three) (?:(?P<size>small|large) )?(?:(?P<fill>striped|dotted) )?"
          rf"(?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<shape>{'|'.join(SHAPES)})(?P<plural>(?<!cross)s|(?<=cross)es)?\b",
          "(?<![가-힣])(?:(?P<size>작은|큰) )?(?:(?P<colour>빨간색|주황색|노란색|초록색|하늘색|파란색|보라색|분홍색) )?"
          "(?:(?P<fill>줄무늬|물방울무늬) )?(?P<shape>원|사각형|삼각형|별|하트|십자가|고리|초승달)(?: (?P<n>두|세) 개)?")
BACKGROUND = r"\ba (\w+) background|\bthe background is (\w+)|(어두운|밝은|회색|체크무늬|가로줄|점무늬) 배경"
COUNT = "(one|two|three) shapes?|도형 (한|두|세) 개"
REL, REL2 = (rf"(?P<{name}>to the left of|to the right of|above|below|왼쪽에|오른쪽에|위에|아래에)" for name in ("rel", "rel2"))
A, B, C = (rf"@(?P<{name}>\d)" for name in "abc")
PLACE = f"(?P<place>{PLACES})"
CLAUSES = (f"{B}의? {REL}(?:, {C}의 {REL2})? 있는 {A}", f"{A}[은는] {B}의 {REL} 있다", f"{B}의 {REL} {A}[이가] 있다",
           f"{PLACE} 있는 {A}", f"{PLACE} {A}[이가] 있다", f"{A}[은는] (?:그림의 )?{PLACE} 있다",
           f"{A}(?: is)? {REL} {B}(?: and {REL2} {C})?", f"{A}(?: is)? {PLACE}(?: of the picture)?")
FILLER = (r"there (is|are) (?=[@#])|a picture of|can be seen here|look,|\bon %|behind|in the picture|exactly|in all|"
          r"the picture shows|nothing else is in the picture|and|%이다|배경은|배경 앞의|앞에서|앞의|앞에|그림에|의 그림|여기에|"
          r"모두|그리고|다른 것은 없다|있다|보인다|@\d[이가과와]?|[#%]이?가?|[:,.]")
GENERAL = (("a shape", "something colourful", "a picture of a shape", "도형", "알록달록한 것", "도형 그림"),
           ("some shapes", "colourful things", "a picture of shapes", "도형들", "알록달록한 것들", "도형들의 그림"))


class Statement:
    """What a text says: things (number, properties), relations (i, word, j), places (i, cell), counts, backgrounds.

    What is understood is replaced by a mark: @0, @1, ... for the things, % for a background, # for a count.
    """
    def __init__(self, text):
        self.text, self.things, self.relations, self.places, self.counts, self.backgrounds = text, [], [], [], [], []
        for pattern in THINGS:
            text = re.sub(pattern, self.take_thing, text.lower())
        text = re.sub(COUNT, lambda m: self.counts.append(MEANING[m[1] or m[2]]) or "#", text)
        text = re.sub(BACKGROUND, lambda m: self.backgrounds.append(m[1] or m[2] or MEANING[m[3]]) or "%", text)
        for clause in CLAUSES:
            text = re.sub(clause, self.take_clause, text)
        self.rest = re.sub(FILLER, "", text).strip()  # what is not understood

    def take_thing(self, match):
        said = {key: MEANING.get(word, word) for key, word in match.groupdict().items() if word}
        n, plural = said.pop("n", 1), said.pop("plural", None)
        assert (plural is not None) == (n > 1) or match.re.pattern == THINGS[1], self.text
        self.things.append((n, said))
        return f"@{len(self.things) - 1}"

    def take_clause(self, match):
        said = match.groupdict()
        if said.get("place"):
            cell = PLACES.split("|").index(said["place"]) % 9
            self.places.append((int(said["a"]), (cell % 3, cell // 3)))
        for word, other in ((said.get("rel"), "b"), (said.get("rel2"), "c")):
            if word:
                self.relations.append((int(said["a"]), MEANING.get(word, word), int(said[other])))
        return "@" + said["a"]

    def holds(self, scene, everything=False):
        """Whether all of it is true of some choice of the scene's things; everything: and it names all of them."""
        assert not self.rest, f"not understood: {self.rest!r} in {self.text!r}"
        slots = [i for i, (n, _) in enumerate(self.things) for _ in range(n)]
        return (set(self.counts) <= {len(scene.things)} and set(self.backgrounds) <= {scene.background}
                and (not everything or len(slots) == len(scene.things))
                and any(self.fits(slots, chosen) for chosen in itertools.permutations(scene.things, len(slots))))

    def fits(self, slots, chosen):
        thing = dict(zip(slots, chosen))
        return (all(self.things[i][1].items() <= vars(t).items() for i, t in zip(slots, chosen))
                and all(relation_holds(thing[i], word, thing[j]) for i, word, j in self.relations)
                and all((int(3 * thing[i].x), int(3 * thing[i].y)) == cell for i, cell in self.places))


def relation_holds(a, word, b):
    """Whether a lies in the quarter turn around that direction, seen from b."""
    x, y = a.x - b.x, a.y - b.y
    along = {"to the left of": -x, "to the right of": x, "above": -y, "below": y}[word]
    return along > 0.1 and along >= max(abs(x), abs(y))


# --- captions ---------------------------------------------------------------------------------------------------------

@functools.cache
def scenes():
    return [shapes.make_scene(f"0/train/{i}") for i in range(300)]


@pytest.mark.parametrize("language", ["en", "ko"])
def test_every_caption_is_true_of_its_scene(language):
    for scene in scenes():
        n = len(scene.things)
        thing, relation, count, background, whole = (Statement(text) for text in shapes.captions(scene, language))
        assert thing.holds(scene) and len(thing.things) == 1 and "colour" in thing.things[0][1], thing.text
        assert relation.holds(scene), relation.text
        assert (len(relation.relations), len(relation.places)) == (n > 1, n == 1), relation.text
        assert count.holds(scene, everything=bool(count.things)) and count.counts, count.text
        assert background.holds(scene, everything=bool(background.things)) and background.backgrounds, background.text
        assert whole.holds(scene, everything=True) and whole.backgrounds, whole.text
        assert (len(whole.relations), len(whole.places)) == (n - 1, n == 1), whole.text
        assert all({"size", "colour", "shape"} <= named.keys() for _, named in whole.things), whole.text

        first, *texts = shapes.ladder(scene, language)
        assert first in GENERAL[n > 1]
        rungs = [Statement(text) for text in texts]
        a, b, c = (sum(count * len(named) for count, named in rung.things) for rung in rungs)  # how much each says
        assert all(rung.holds(scene, everything=True) for rung in rungs) and a < b < c and rungs[2].backgrounds, texts
        kinds = {named["shape"] for _, named in rungs[0].things}
        assert len(kinds) == len(rungs[0].things), texts  # things that read the same are counted: "two stars"

        said = [Statement(sentence) for sentence in shapes.long_caption(scene, language).split(". ")]
        assert all(s.holds(scene) and s.text[0] == s.text[0].upper() for s in said)
        assert [sum(len(vars(s)[part]) for s in said) for part in ("counts", "places", "relations", "backgrounds")] == [
            1, n, n - 1, 1], [s.text for s in said]


def test_nine_in_ten_web_captions_are_about_a_thing_of_the_scene():
    related = 0
    for scene in scenes():
        text = shapes.web_caption(scene)
        for colour, shape in re.findall(rf"({'|'.join(COLOURS)}|) ?({'|'.join(SHAPES)})\b", text):
            assert any(t.shape == shape and colour in ("", t.colour) for t in scene.things), text
            related += 1
    assert 0.87 < related / len(scenes()) < 0.93


@pytest.mark.parametrize("language, swaps", [
    ("en", "left/right above/below top/bottom two/three dark/light striped/dotted red/blue circle/moon small/large"),
    ("ko", "왼쪽/오른쪽 두/세 어두운/밝은 작은/큰 줄무늬/물방울무늬 빨간색/파란색 별/원 하트/고리")], ids=["en", "ko"])
def test_the_parser_of_these_tests_finds_what_is_false(language, swaps):
    found = []
    for scene, pair in itertools.product(scenes()[:150], swaps.split()):
        for a, b in itertools.permutations(pair.split("/")):
            found += [not Statement(re.sub(rf"\b{a}", b, text)).holds(scene)
                      for text in shapes.captions(scene, language)[1:] if re.search(rf"\b{a}", text)]
    assert len(found) > 300 and np.mean(found) > 0.97  # the few others are true of another thing in the picture


def test_grammar_is_right_and_no_placeholder_is_left():
    wrong = (r"\ba [aeiou]|\ban [^aeiou]|there are (one|an?)\b|there is (two|three)\b|\bone \w+s\b|"
             r"\b(two|three) \w*[^s]\b(?= and|$)|  |[{}()]|\bnone\b|\s$|^\s")
    for scene, language in itertools.product(scenes(), ("en", "ko")):
        for text in (*shapes.captions(scene, language), *shapes.ladder(scene, language),
                     shapes.long_caption(scene, language), shapes.web_caption(scene, language)):
            assert not re.search(wrong, text.lower()), text
            for last, particle in re.findall(r"([가-힣])(?<!있)([은는이가과와])\b", text):
                consonant = len(unicodedata.normalize("NFD", last)) == 3  # lead, vowel and a final consonant
                assert particle in ("은이과" if consonant else "는가와"), text


# --- pictures ---------------------------------------------------------------------------------------------------------

FROZEN = {"pictures": "59ac32fd63147284f8efeb7d7b39675b58d791aca819d431bbeec431f737cb66",
          "texts": "2521e1be7575c2ba8c565afd5059fb1497c165404d21b4c476c40d885e2bebf8"}
FREEZE = """import hashlib, json, shapes
scenes = [shapes.make_scene(f"{seed}/{split}/{i}") for seed in (0, 7) for split in ("train", "test") for i in range(15)]
pictures = [shapes.draw(scene, (64, 64, 64, 224, 97)[i % 5], (0, 0, 0.5)[i % 3]) for i, scene in enumerate(scenes)]
texts = [say(scene, language) for scene in scenes for language in ("en", "ko")
         for say in (shapes.captions, shapes.ladder, shapes.long_caption, shapes.web_caption)]
parts = {"pictures": b"".join(picture.tobytes() for picture in pictures), "texts": json.dumps(texts).encode()}
print(json.dumps({name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}))"""


def test_pictures_and_captions_are_the_frozen_ones_in_another_process():
    found = subprocess.run([sys.executable, "-c", FREEZE], cwd=Path(shapes.__file__).parent, check=True, text=True,
                           stdout=subprocess.PIPE, env=os.environ | {"PYTHONHASHSEED": "4321"}).stdout
    assert json.loads(found) == FROZEN, "the drawings or captions changed: raise shapes.VERSION, then freeze these"


# A point of each shape that is surely inside, and one that is surely outside though near; in units of its radius.
INSIDE = {"circle": (0.5, 0.5), "square": (0.6, -0.6), "triangle": (0.0, -0.4), "star": (0.0, -0.5),
          "heart": (-0.42, -0.6), "cross": (0.6, 0.0), "ring": (0.0, 0.67), "moon": (-0.6, 0.2)}
OUTSIDE = {"circle": (0.7, 0.7), "square": (0.0, 0.9), "triangle": (0.6, -0.5), "star": (0.0, 0.6),
           "heart": (0.0, -0.65), "cross": (0.5, 0.5), "ring": (0.0, 0.0), "moon": (0.44, -0.12)}


def pixel(picture, thing, point):
    """The picture's colour at a point that is given in radii from the thing's centre, before its turn."""
    radius, angle = {"small": 0.19, "large": 0.27}[thing.size], 2 * np.arctan(thing.turn)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = thing.x + radius * (cos * point[0] - sin * point[1]), thing.y + radius * (sin * point[0] + cos * point[1])
    return picture[int(y * len(picture)), int(x * len(picture))].astype(float)


def test_each_shape_has_its_form_and_colour():
    for shape, colour in ALL_PAIRS:
        one = shapes.Thing(shape, colour, "large", "plain", 0.5, 0.5, turn=0.1)
        picture = shapes.draw(shapes.Scene([one], "light", "form"), 128)
        assert abs(pixel(picture, one, INSIDE[shape]) - COLOURS[colour]).max() <= 9  # the noise goes from -7.5 to 7.5
        assert abs(pixel(picture, one, OUTSIDE[shape]) - COLOURS[colour]).max() > 40


def test_pictures_show_every_thing_at_its_place():
    right = []
    for scene in scenes():
        picture = shapes.draw(scene)
        for one in scene.things:
            difference = pixel(picture, one, INSIDE[one.shape]) - COLOURS[one.colour]
            right.append(difference.min() >= -9 and (difference.max() <= 9 or one.fill != "plain"))  # patterns lighten
    assert np.mean(right) > 0.98  # the few others are in the shadow of a neighbour


def test_fills_and_backgrounds_look_different():
    squares = [shapes.Thing("square", "blue", "large", fill, 0.5, 0.5, 0) for fill in ("plain", "striped", "dotted")]
    light = [(shapes.draw(shapes.Scene([one], "dark", "fill"))[24:40, 24:40, 0] > 120).mean() for one in squares]
    assert light[0] == 0 and 0.3 < light[1] < 0.6 and 0.1 < light[2] < 0.3
    dark, light, gray, *patterned = (shapes.draw(shapes.Scene([], name, "bg")).mean(-1) for name in shapes.BACKGROUNDS)
    assert dark.mean() < 60 < 120 < gray.mean() < 170 < 220 < light.mean()
    assert max(dark.std(), light.std(), gray.std()) < 6 < min(picture.std() for picture in patterned)


def test_hidden_share_of_tiles_covers_as_much_as_asked():
    for scene, (size, hidden) in itertools.product(scenes()[:10], ((64, 0.5), (70, 0.25), (96, 1.0))):
        whole, part = shapes.draw(scene, size), shapes.draw(scene, size, hidden)
        gray = (part == 128).all(-1)
        np.testing.assert_array_equal(part[~gray], whole[~gray])
        assert gray[size // 8::size // 4, size // 8::size // 4].sum() == 16 * hidden  # the tiles' centres
        assert abs(gray.mean() - hidden) < 0.04


def test_eight_pairs_are_in_no_training_scene_and_the_zero_shot_task_has_all_64():
    assert {shape for shape, _ in shapes.UNSEEN} == set(SHAPES) and {c for _, c in shapes.UNSEEN} == set(COLOURS)
    assert {(t.shape, t.colour) for scene in scenes() for t in scene.things} == set(ALL_PAIRS) - shapes.UNSEEN
    shape, colour = sorted(shapes.UNSEEN)[0]
    with pytest.raises(ValueError, match=f"a {colour} {shape} is kept from training; unseen=True draws it"):
        shapes.make_scene("key", shape=shape, colour=colour)  # does not look for it for ever
    task = shapes.zero_shot(size=64, each=2)
    np.testing.assert_array_equal(task.labels, np.repeat(np.arange(64), 2))
    np.testing.assert_array_equal(task.groups["unseen"], np.repeat([pair in shapes.UNSEEN for pair in ALL_PAIRS], 2))
    np.testing.assert_array_equal(task.groups["seen"], ~task.groups["unseen"])
    for (shape, colour), prompts in zip(ALL_PAIRS, task.prompts, strict=True):
        assert all(re.search(rf"\b(a|an(?= o)) {colour} {shape}\b", prompt) for prompt in prompts)
    palette = np.array(list(COLOURS.values()), float)
    for picture, label in zip(task.images, task.labels, strict=True):  # most of the coloured pixels have its colour
        assert (abs(picture.reshape(-1, 1, 3) - palette).max(-1) < 9).sum(0).argmax() == label % 8


@pytest.mark.parametrize("name, language, prompt", [("shapes", "en", "a red circle"),
                                                    ("shapes-ko", "ko", "이것은 빨간색 원 이다")], ids=["en", "ko"])
def test_shapes_are_loaded_with_their_captions_and_prompts(name, language, prompt, monkeypatch, tmp_path):
    monkeypatch.setattr(shapes, "COUNTS", {"train": 12, "val": 5, "test": 4})
    for split, n in shapes.COUNTS.items():
        loaded = data.load(name, split, 32, cache=tmp_path, seed=3)
        made = [shapes.make_scene(f"3/{split}/{i}") for i in range(n)]
        np.testing.assert_array_equal(loaded.images, [shapes.draw(scene, 32) for scene in made])
        for sample, scene in zip(loaded.samples, made, strict=True):
            assert sample.captions == shapes.captions(scene, language)
            assert sample.long == shapes.long_caption(scene, language)
            assert sample.web == shapes.web_caption(scene, language)
        assert len({image.tobytes() for image in loaded.images}) == n and not loaded.augment
    assert data.load_zero_shot(name, 8).prompts[0][0] == prompt and data.load_zero_shot("flickr8k", 8) is None
