"""Data sets, the picture cache and the loader. Nothing here knows any of the models.

    split = load("shapes", "train", size=64)              generated, no download: shapes.py
    split = load("flickr8k", "train", size=224)           downloads both archives, or reads what lies in root
    split = load("pictures.csv", "train", size=224)       your own: a folder, a .csv, .tsv or .json
    split = load("shards/*.tar", "train", size=224)       tar shards, read where they lie

    loader = Loader(split, batch=64, text_batch=...)      text_batch: the captions that the model wants
    loader.batch_at(step)                                 the training batch of that step

Data sets are split by picture, and a picture is in a batch at most once. It is decoded once, into a cache. Whatever is
random (the order, the caption, the crop) is a function of (seed, epoch or step), never of what ran before.
"""
import collections
import concurrent.futures
import contextlib
import csv
import errno
import functools
import glob
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import platform
import random
import re
import sys
import tarfile
import time
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as vision
from PIL import Image, ImageOps
from tqdm import tqdm

import shapes
from tokens import UserError, from_state, read_vocabulary


# --- a data set -----------------------------------------------------------------------------------------------------

@dataclass
class Sample:
    """What is said about one picture."""
    captions: list
    long: str | None = None  # a long synthetic caption
    web: str | None = None   # a short noisy one

    @functools.cached_property
    def may_be_flipped(self):
        """Whether a mirrored picture leaves all of it true: nothing here speaks of left and right."""
        text = " ".join([*self.captions, self.long or "", self.web or ""]).lower()
        return not re.search(r"\b(left|right)(most)?\b|왼|오른|좌측|우측", text)


@dataclass
class Split:
    """The training, validation or test pictures of a data set. split[row] is a picture and its Sample."""
    name: str
    images: np.ndarray  # uint8 (N, S, S, 3), memory-mapped
    samples: list       # N of Sample
    augment: bool       # whether the training pictures are cropped and flipped

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, row):
        return self.images[row], self.samples[row]

    def order(self, key, first, last):
        """The rows at the places first to last - 1 of a random order; each key has its own."""
        return shuffled(len(self), key)[first:last]


@functools.lru_cache(8)
def shuffled(n, key):
    rows = list(range(n))
    random.Random(key).shuffle(rows)
    return rows


class EmptySplit(UserError):
    """A data set has no picture in the split that was asked for."""


GENERATED = {"shapes": "en", "shapes-ko": "ko"}
NAMES = (*GENERATED, "flickr8k", "flickr30k", "coco")


def load(name, split, size, root=None, fit="crop", cache="data/cache", seed=0):
    """The "train", "val" or "test" split of a data set, with pictures of size x size pixels.

    name: one of NAMES, or the path of your own folder, table (.csv, .tsv, .json) or tar shards ("shards/*.tar").
    root: the folder with the files of a named data set; cache: where decoded pictures are kept;
    fit: "crop" or "squash", see read_picture; seed: of generated pictures.
    Raises UserError.
    """
    name = str(name)
    if split not in shapes.COUNTS:
        raise UserError(f"split {split!r}; known: {', '.join(shapes.COUNTS)}")
    if root is not None and not Path(root).is_dir():
        raise UserError(f"--root {root}: expected the folder that holds the files of {name}")
    try:
        if name in GENERATED:
            return load_shapes(name, split, size, cache, seed)
        if name.endswith(".tar"):
            return load_shards(name, split, size, fit, cache)
        found = [(source, sample) for source, belongs, sample in records(name, root) if belongs == split]
        if not found:
            raise EmptySplit(f"{name}: no picture belongs to the split {split!r}")
        sources, samples = zip(*found)
        images, kept = cache_pictures(f"{cache_name(root or name, split)}-{size}-{fit}", sources, size, cache,
                                      functools.partial(read_picture, size=size, fit=fit))
        return Split(f"{name} {split}", images, [samples[i] for i in kept], augment=True)
    except UserError:
        raise
    except (OSError, csv.Error, zipfile.BadZipFile, ValueError, LookupError, TypeError, AttributeError,
            RecursionError) as error:
        raise UserError(f"--data {name}: {type(error).__name__}: {error}. A table has the columns image,caption (and "
                        "perhaps long,split), a .json is a list of objects with these, all in UTF-8; --root and "
                        "--cache name other folders") from None


def records(name, root):
    """The pictures of a data set -> [(source, split, Sample)]."""
    if name == "flickr8k":
        return flickr8k(root)
    if name in NAMES and root is None:
        raise UserError(f"--data {name} needs --root: the folder with dataset_{name}.json (the Karpathy split) and the "
                        "images")
    path = Path(name) if name not in NAMES else Path(root, f"dataset_{name}.json")
    readers = {".csv": read_table, ".tsv": read_table, ".json": read_json}
    if not path.exists():
        raise UserError(f"--data {path}: neither a data set ({', '.join(NAMES)}) nor a file or folder that exists")
    if path.is_dir():
        path = next((table for suffix in readers if (table := path / f"captions{suffix}").exists()), path)
    if not path.is_dir() and path.suffix.lower() not in readers:
        raise UserError(f"--data {path}: expected a folder, a .csv, .tsv or .json, or shards (.tar)")
    return group(readers.get(path.suffix.lower(), read_folder)(path), path if path.is_dir() else path.parent, path)


def load_shapes(name, split, size, cache, seed):
    language = GENERATED[name]
    keys = [f"{seed}/{split}/{i}" for i in range(shapes.COUNTS[split])]
    images, _ = cache_pictures(f"shapes-{split}-{seed}-{size}-v{shapes.VERSION}", keys, size, cache,
                               lambda key: shapes.draw(shapes.make_scene(key), size))
    samples = [Sample(shapes.captions(scene, language), shapes.long_caption(scene, language),
                      shapes.web_caption(scene, language)) for scene in map(shapes.make_scene, keys)]
    return Split(f"{name} {split}", images, samples, augment=False)  # crops and flips would make captions false


def load_zero_shot(name, size, seed=0):
    """The zero-shot task that belongs to a data set, or None: only the generated ones have classes."""
    return shapes.zero_shot(GENERATED[name], size, seed) if name in GENERATED else None


# --- the loader -----------------------------------------------------------------------------------------------------

class Loader:
    """Training batches. `batch_at(step)` depends only on the seed and the step: a resumed run sees the same batches.

    text_batch(samples, rngs) -> dict of tensors: the captions that the model trains on, in its own form.
    batch: the global batch, of which this process gets the rank-th part of `world`. Each sample has its own random
    generator, so all processes together see the same batch as one process would.
    epoch: how many pictures are an epoch, if not all of them; evaluation and checkpoints come after each epoch.
    """
    def __init__(self, split, batch, text_batch, seed=0, rank=0, world=1, epoch=None):
        epoch = epoch or len(split)
        if not 2 <= batch <= min(epoch, len(split)) or batch % world:
            raise UserError(f"--batch {batch}: expected 2 (one leaves no negatives) to {min(epoch, len(split))} (the "
                            f"pictures of {split.name}), and a multiple of the {world} processes")
        self.split, self.batch, self.text_batch = split, batch, text_batch
        self.seed, self.rank, self.world = seed, rank, world
        self.steps_per_pass, self.steps_per_epoch = len(split) // batch, epoch // batch
        self.broken = set()  # rows whose picture or caption could not be read
        self.waited = 0.0    # seconds that training has waited in `stream`
        self.pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count()))

    def batch_at(self, step):
        """-> {"images": uint8 (B / world, 3, S, S), and what text_batch returns}."""
        turn, i = divmod(step, self.steps_per_pass)
        share = self.batch // self.world
        first = i * self.batch + self.rank * share
        rows = self.split.order(f"order/{self.seed}/{turn}", first, first + share)
        run = self.pool.map if self.split.augment else map  # otherwise a row is only copied
        images, samples, rngs = zip(*run(functools.partial(self.read, turn), range(first, first + share), rows))
        return {"images": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), **self.text_batch(samples, rngs)}

    def read(self, turn, place, row):
        """The picture at a place of a pass, its sample and its random generator, which also draws its caption.

        If a sample of a shard is broken, the one a batch later in the order replaces it. So no picture is twice in a
        batch, and the batch still depends only on the seed and the step.
        """
        for _ in range(self.steps_per_pass):
            try:
                pixels, sample = self.split[row]
            except PictureError as error:
                if row not in self.broken and len(self.broken) < 3:  # train.py says how many there are
                    say(f"left out: {error}")
                self.broken.add(row)
                place = (place + self.batch) % (self.steps_per_pass * self.batch)
                row, = self.split.order(f"order/{self.seed}/{turn}", place, place + 1)
                continue
            rng = random.Random(f"sample/{self.seed}/{turn}/{row}")
            if self.split.augment:
                pixels = augment(pixels, rng, sample.may_be_flipped)
            return pixels, sample, rng
        raise UserError(f"{self.split.name}: too few samples can be read for a batch of {self.batch}")

    def stream(self, first, last, ahead=2):
        """The batches of steps first to last - 1, made in a thread that runs `ahead` of the training step."""
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            pending = collections.deque(thread.submit(self.batch_at, step)
                                        for step in range(first, min(first + ahead, last)))
            for step in range(first, last):
                began = time.time()
                batch = pending.popleft().result()
                self.waited += time.time() - began
                if step + ahead < last:
                    pending.append(thread.submit(self.batch_at, step + ahead))
                yield batch


def augment(pixels, rng, flip, scale=(0.5, 1.0)):
    """A random crop of uint8 (S, S, 3), resized to the same size; `scale` is its share of the area. A flip, if allowed.

    Done with Pillow on the cached pixels: as fast as torch on one thread, and the other cores are free to train.
    """
    size = len(pixels)
    area, ratio = rng.uniform(*scale), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = min(size, size * math.sqrt(area * ratio)), min(size, size * math.sqrt(area / ratio))
    left, top = rng.uniform(0, size - w), rng.uniform(0, size - h)
    image = Image.fromarray(pixels).resize((size, size), Image.BILINEAR, box=(left, top, left + w, top + h))
    return np.asarray(ImageOps.mirror(image) if flip and rng.random() < 0.5 else image)


# --- pictures -------------------------------------------------------------------------------------------------------

class PictureError(Exception):
    """One picture cannot be read; the message says why. Such a picture is listed, counted and left out."""


PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
TRANSIENT = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM)  # errors of the machine, not of the picture


def read_picture(source, size, fit="crop"):
    """A path, (path of a zip, name in it), the bytes of a file, or a PIL image -> uint8 (size, size, 3).

    fit "crop" (OpenAI's): shortest side to `size`, bicubic, then the centre; "squash" (CLIPS): both sides, bilinear.
    Turned upright as its EXIF data asks; transparency on white; 16 bits to 8; the first frame of an animation.
    """
    try:
        if isinstance(source, tuple):
            source = read_bytes(source)
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
    except Exception as error:  # broken files fail in ways of their own, and none may end a run
        if isinstance(error, (MemoryError, UserError)) or getattr(error, "errno", None) in TRANSIENT:
            raise
        raise PictureError(" ".join(str(error).split()) or type(error).__name__) from None


def preprocess(picture, size, fit="crop"):
    """read_picture as a tensor, uint8 (3, S, S): what `load` of a model file returns, with size and fit filled in."""
    try:
        return torch.from_numpy(read_picture(picture, size, fit).copy()).permute(2, 0, 1)
    except PictureError as error:
        raise UserError(f"{picture if isinstance(picture, (str, Path)) else 'the picture'}: {error}") from None


def files_below(folder):
    """All files below a folder, sorted, without hidden ones. Links are followed, but no folder is visited twice."""
    visited, found = set(), []
    for place, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(found)


def list_pictures(folder):
    return [path for path in files_below(folder) if path.suffix.lower() in PICTURE_SUFFIXES]


# --- the picture cache ----------------------------------------------------------------------------------------------

VERSION = 2  # raised when the same file would give other pixels, or another index


def cache_pictures(name, sources, size, cache, read):
    """Decode every source once -> (uint8 (N, size, size, 3), memory-mapped; the numbers of the sources that it holds).

    read(source) -> uint8 (size, size, 3), or a PictureError. The file's name contains a fingerprint of the sources, so
    a source that changes makes a new cache; what else the pixels depend on belongs into `name`.
    """
    def pixels(source):
        try:
            return read(source).tobytes(), ""
        except PictureError as error:
            return b"", str(error)  # the error itself would keep the picture's memory

    def build(file):
        kept, bad = [], []
        with (concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,  # Pillow does not hold Python's lock
              tqdm(total=len(sources), desc=f"{name}, once", unit=" pictures", **bar_options()) as bar):
            for first in range(0, len(sources), 256):
                for i, (content, why) in enumerate(pool.map(pixels, sources[first:first + 256]), first):
                    if why:
                        bad.append((str(sources[i]), why))
                    else:
                        kept.append(i)
                        file.write(content)
                    bar.update()
        return {"kept": kept, "bad": bad}

    path = Path(cache) / f"{name}-{fingerprint(*map(stamp, sources))}.u8"
    found = once(path, build)
    kept, bad = found["kept"], found["bad"]
    if bad:
        say(f"{name}: {len(bad)} of {len(sources)} pictures cannot be read and are left out "
            f"(all of them in {path.with_suffix('.json')}; delete it to try them again): "
            + "; ".join(f"{source}: {why}" for source, why in bad[:3]) + ("; ..." if len(bad) > 3 else ""))
    if not kept:
        path.with_suffix(".json").unlink()  # the next run tries again
        raise UserError(f"{name}: none of the {len(sources)} pictures can be read; {': '.join(bad[0])}")
    return np.memmap(path, np.uint8, "r", shape=(len(kept), size, size, 3)), kept


def once(path, build):
    """Make the file `path` by build(file), if it is not there -> what build returned, which is kept beside it.

    The .json is written last and by rename: without it the file is not finished, or being made by another process.
    Older files of this name, up to the fingerprint at its end, are removed.
    """
    listing = path.with_suffix(".json")
    if not (listing.exists() and path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as file:
            found = build(file)
        with writing(listing) as file:
            file.write(json.dumps(found).encode())
        for old in path.parent.glob(f"{path.stem.rpartition('-')[0]}-*"):
            with contextlib.suppress(OSError):  # gone already; or on Windows, where another process has it mapped
                if old.stem != path.stem and (old.suffix != ".part" or time.time() - old.stat().st_mtime > 86_400):
                    old.unlink()
    return json.loads(listing.read_text())


def cache_name(place, split):
    """Of a split of a data set: readable, and another one for each folder."""
    return re.sub(r"\W+", "-", Path(place).stem) + f"-{split}-{fingerprint(os.path.abspath(place))[:6]}"


def fingerprint(*what):
    return hashlib.sha256(repr((VERSION, *what)).encode(errors="surrogateescape")).hexdigest()[:16]


def stamp(source):
    """What tells that a source has changed: the size and the time of its file."""
    path, *rest = source if isinstance(source, tuple) else (source,)
    try:
        stat = os.stat(path)
    except OSError:  # not a file: the key of a generated picture, or a path that is missing
        return str(path), *rest
    return os.path.abspath(path), *rest, stat.st_mtime_ns, stat.st_size


def part_of(path):
    """A name for what is not whole yet, which no other process takes, on no machine that shares the folder."""
    return Path(f"{path}.{platform.node()}-{os.getpid()}.part")


@contextlib.contextmanager
def writing(path):
    """with writing(path) as file: a file that appears under its name when it is whole, or not at all."""
    part = part_of(path)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# --- your own pictures ----------------------------------------------------------------------------------------------
# Each reader returns rows: dicts with image (a name below the folder), caption, and perhaps split and long.

SPLITS = {"": None, "train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val",
          "dev": "val", "test": "test"}


def read_bytes(source):
    """The content of a path, or of (path of a zip, name in it)."""
    return open_zip(source[0]).read(source[1]) if isinstance(source, tuple) else Path(source).read_bytes()


def read_text(source):
    try:
        return read_bytes(source).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


@functools.lru_cache
def open_zip(path):
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise UserError(f"{path} is no zip file; download it again") from None


def read_table(path):
    """Columns image and caption, or open_clip's filepath and title; separated by commas, or by tabs."""
    text = read_text(path)
    table = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in text.partition("\n")[0] else ",",
                       skipinitialspace=True, strict=True)
    header = [{"filepath": "image", "title": "caption"}.get(name.strip(), name.strip()) for name in next(table, [])]
    if not {"image", "caption"} <= set(header):
        raise UserError(f"{path}: columns found: {', '.join(header) or 'none'}; expected image,caption (and perhaps "
                        "long,split), separated by commas")
    rows = []
    for fields in filter(None, table):  # without empty lines
        if len(fields) > len(header):
            raise UserError(f"{path}, line {table.line_num}: more fields than the header has; put captions with commas "
                            "in quotes")
        rows.append(dict(itertools.zip_longest(header, map(str.strip, fields), fillvalue="")))
    return rows


def read_folder(folder):
    """NAME.txt beside NAME.jpg, a caption a line."""
    pictures = list_pictures(folder)
    texts = {picture: text for picture in pictures if (text := picture.with_suffix(".txt")).exists()}
    if not texts:
        raise UserError(f"--data {folder}: {len(pictures)} pictures and not one caption; expected NAME.txt beside "
                        "NAME.jpg (a caption a line), or a captions.csv with columns image,caption")
    if len(texts) < len(pictures):
        say_once(f"{folder}: {len(pictures) - len(texts)} of {len(pictures)} pictures have no .txt beside them "
                 "and are left out")
    return [{"image": str(picture.relative_to(folder)), "caption": line.strip()}
            for picture, text in texts.items() for line in read_text(text).strip().split("\n")]


def read_json(path):
    """A list of {image, caption(s), long?, split?}, also with KoCLIP's file_path and caption_ko, or a Karpathy file."""
    content, rows = json.loads(read_text(path)), []
    for entry in karpathy(content["images"], path.parent) if isinstance(content, dict) else content:
        texts = next((entry[key] for key in ("captions", "caption_ko", "caption") if key in entry), None)
        if not isinstance(texts, (str, list)):
            raise UserError(f"{path}: found {json.dumps(entry, ensure_ascii=False)[:80]}; expected an object with "
                            "image and caption, or captions")
        row = {"image": entry["image"] if "image" in entry else entry["file_path"],
               "split": entry.get("split") or "", "long": (entry.get("long") or "").strip()}
        rows += [{**row, "caption": text.strip()} for text in ([texts] if isinstance(texts, str) else texts)]
    return rows


def karpathy(entries, folder):
    """The entries of a Karpathy split file, as read_json expects them; the pictures may lie anywhere below folder."""
    pictures = [str(path.relative_to(folder)) for path in list_pictures(folder)]
    places = {os.path.basename(picture): picture for picture in pictures} | {name: name for name in pictures}
    for entry in entries:
        name = entry["filename"]  # COCO's entries have the folder in filepath
        image = places.get(os.path.join(entry.get("filepath") or "", name)) or places.get(name) or name
        yield {"image": image, "split": entry["split"], "captions": [text["raw"] for text in entry["sentences"]]}


def group(rows, folder, origin):
    """Rows -> [(source, split, Sample)], one for each image. Without splits: 80/10/10 by a hash of the image's name."""
    samples, splits = {}, {}
    for row in rows:
        name, split = os.path.normpath(row["image"]).replace(os.sep, "/"), row.get("split", "").lower()
        if not row["caption"]:
            continue
        if split not in SPLITS or not row["image"]:
            raise UserError(f"{origin}: the row of {name!r}, {row['caption'][:40]!r} has the split {split!r}; expected "
                            f"an image, and a split of {', '.join(filter(None, SPLITS))}, or none")
        if splits.setdefault(name, SPLITS[split]) != SPLITS[split]:
            raise UserError(f"{origin}: {name} is in two splits, {splits[name]} and {split or 'none'}; expected one")
        sample = samples.setdefault(name, Sample([]))
        sample.captions.append(row["caption"])
        sample.long = sample.long or row.get("long") or None
    if not samples:
        raise UserError(f"{origin}: no image with a caption")
    if empty := sum(not row["caption"] for row in rows):
        say_once(f"{origin}: {empty} of {len(rows)} captions are empty and are left out")
    undecided = sorted((name for name in samples if splits[name] is None),
                       key=lambda name: hashlib.sha256(os.fsencode(name)).hexdigest())
    tenth = -(-len(undecided) // 10)
    for i, name in enumerate(undecided):
        splits[name] = "val" if i < tenth else "test" if i < 2 * tenth else "train"
    counts = collections.Counter(splits.values())
    say_once(f"{origin}: {len(samples)} images, {sum(len(s.captions) for s in samples.values())} captions; "
             + ", ".join(f"{split} {counts[split]}" for split in shapes.COUNTS)
             + (f" ({len(undecided)} without a split: 80/10/10, by a hash of the name)" if undecided else ""))
    return [(str(folder / name), splits[name], sample) for name, sample in samples.items()]


# --- Flickr8k -------------------------------------------------------------------------------------------------------

FLICKR8K_URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
FLICKR8K = {"Flickr8k_Dataset.zip": "f18a1e2920de5bd84dae7cf08ec78978",  # MD5
            "Flickr8k_text.zip": "bf6c1abcb8e4a833b7f922104de18627"}
FLICKR8K_LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt",
                  "test": "Flickr_8k.testImages.txt"}


def flickr8k(root=None):
    """Flickr8k from root (the two zips, what they unpack to, or Kaggle's Images/ and captions.txt), else downloaded.

    The official lists say which image is in which split; the 91 unlisted images stay out.
    """
    home, archives = Path(root or "data/flickr8k"), list(FLICKR8K)
    if root is None:
        for name in archives:
            download(FLICKR8K_URL + name, home / name, md5=FLICKR8K[name])
    pictures, texts = (members(home, name) for name in archives)
    rows = []
    if "Flickr8k.token.txt" in texts:
        for line in read_text(texts["Flickr8k.token.txt"]).split("\n"):
            name, _, caption = line.partition("\t")
            rows.append({"image": name.split("#")[0], "caption": caption.strip()})
    elif "captions.txt" in texts:  # Kaggle's
        rows = read_table(texts["captions.txt"])
    if not all(name in texts for name in FLICKR8K_LISTS.values()):  # as in Kaggle's
        lists = Path("data/flickr8k") / archives[1]
        texts = members(download(FLICKR8K_URL + lists.name, lists, md5=FLICKR8K[lists.name]).parent, lists.name)
    listed = {name: split for split, file in FLICKR8K_LISTS.items()
              for name in read_text(texts[file]).split()}
    places = {name: place for place, name in enumerate(listed)}
    rows = [{**row, "split": listed[row["image"]]} for row in rows if row["image"] in listed.keys() & pictures.keys()]
    found = group(sorted(rows, key=lambda row: places[row["image"]]), home, home)
    if len(found) < len(listed) or any(len(sample.captions) != 5 for _, _, sample in found):
        say_once(f"flickr8k: {len(listed) - len(found)} of {len(listed)} listed images have no picture or no caption "
                 "here and are left out; the published set has 6,000 / 1,000 / 1,000, with 5 captions each")
    return [(pictures[Path(source).name], split, sample) for source, split, sample in found]


def members(home, archive):
    """File name -> where it is: in the archive, or else anywhere below home."""
    path = str(home / archive)
    if os.path.exists(path):
        return {Path(name).name: (path, name) for name in open_zip(path).namelist() if "__MACOSX" not in name}
    return {path.name: str(path) for path in files_below(home)}


# --- tar shards -----------------------------------------------------------------------------------------------------
# For what fits neither into memory nor into a cache. A shard is a plain .tar with KEY.jpg (.png, .webp, ...) and, next
# to it, KEY.txt (a caption a line) or KEY.json with "caption", or Recap-DataComp's "org_caption" and "re_caption".
# The headers of the shards are read once, into an index that says where the parts of each sample lie. With it a sample
# is read at random, so shards are a Split like any other: nothing is streamed, and there is no state to save.

PLACE = np.dtype([("at", "<i8"), ("bytes", "<i4")])
ENTRY = np.dtype([("picture", PLACE), ("txt", PLACE), ("json", PLACE)])  # 36 bytes a sample; 0 bytes: no such part
GROUP = 16  # how many shards' samples are mixed, so that a pass over the data reads from few files at a time


@dataclass(eq=False)
class Shards(Split):
    """Training pictures in tar shards: a Split whose pictures are decoded when they are asked for.

    samples: those of the first shard, for a tokenizer to learn from.
    """
    paths: list
    index: np.ndarray   # ENTRY (N,), memory-mapped
    bounds: np.ndarray  # (shards + 1,): shard s has the rows bounds[s] to bounds[s + 1] - 1
    size: int
    fit: str

    def __len__(self):
        return len(self.index)

    def __getitem__(self, row):
        path = self.paths[np.searchsorted(self.bounds, row, side="right") - 1]
        return read_shard(path, self.index[row], self.size, self.fit)

    def order(self, key, first, last):
        """The shards in random order, and in each GROUP of them the samples in random order."""
        shards, rows, begin = shuffled(len(self.paths), key), [], 0
        for g in range(0, len(shards), GROUP):
            group = [range(self.bounds[s], self.bounds[s + 1]) for s in shards[g:g + GROUP]]
            end = begin + sum(map(len, group))
            if begin < last and first < end:
                places = shuffled(end - begin, f"{key}/{g}")[max(0, first - begin):last - begin]
                rows += np.concatenate(group)[places].tolist()
            begin = end
        return rows


def load_shards(pattern, split, size, fit, cache):
    """"train" -> Shards; "val" and "test" -> a Split each, of one half of the last shard, 1,000 pictures at most."""
    brace = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)  # "shards/{00000..00099}.tar", else "shards/*.tar"
    paths = sorted(glob.glob(pattern)) if brace is None else [
        pattern[:brace.start()] + str(i).zfill(len(brace[1])) + pattern[brace.end():]
        for i in range(int(brace[1]), int(brace[2]) + 1)]
    if len(paths) < 2:
        raise UserError(f"--data {pattern}: {len(paths)} shards; expected two or more, as the last one is kept for "
                        "validation and test")
    *paths, held_out = paths
    paths = paths if split == "train" else [held_out]
    index, bounds = index_shards(paths, cache_name(pattern, f"index-{split}"), cache)
    if split == "train":
        samples = [sample for entry in index[:bounds[1]] if (sample := read_captions(paths[0], entry)).captions]
        return Shards(f"{pattern} train", images=None, samples=samples, augment=True, paths=paths, index=index,
                      bounds=bounds, size=size, fit=fit)
    rows = range(1 if split == "test" else 0, len(index), 2)[:1000]
    images, kept = cache_pictures(
        f"{cache_name(pattern, split)}-{size}-{fit}", [(held_out, row) for row in rows], size, cache,
        lambda source: read_shard(held_out, index[source[1]], size, fit)[0])
    samples = [read_captions(held_out, index[rows[i]]) for i in kept]
    return Split(f"{pattern} {split}", images, samples, augment=True)


def index_shards(paths, name, cache):
    """Where the parts of all samples lie: ENTRY (N,), memory-mapped, and the bounds of each shard's rows. Made once."""
    def build(file):
        counts, notes = [], []
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            indexed = tqdm(pool.map(index_shard, paths), "headers of the shards, once", len(paths), **bar_options())
            for path, (entries, note) in zip(paths, indexed):
                counts.append(len(entries))
                notes += [f"{path}: {note}"] if note else []
                file.write(entries.tobytes())
        return {"counts": counts, "notes": notes}

    file = Path(cache) / f"{name}-{fingerprint(*map(stamp, paths))}.index"
    found = once(file, build)
    for note in found["notes"][:3]:
        say_once(note)
    if sum(found["counts"]) < 4:
        raise UserError(f"{paths[0]}: fewer than four samples; expected KEY.jpg with KEY.txt, or KEY.json, for each "
                        "picture (a KEY ends at the first dot)")
    return np.memmap(file, ENTRY, "r"), np.cumsum([0, *found["counts"]])


def index_shard(path):
    """One shard's headers -> ENTRY (n,) of the samples with a picture and a text, and a note of what is wrong.

    Nothing is ever unpacked, so no name in an archive can do any harm.
    """
    samples, notes = {}, []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                if member.isfile() and member.size < 2 ** 31 and not name.startswith("."):  # as macOS's ._NAME files
                    key, _, suffix = name.partition(".")
                    part = "picture" if f".{suffix.lower()}" in PICTURE_SUFFIXES else suffix.lower()
                    samples.setdefault(os.path.join(folder, key), {})[part] = member.offset_data, member.size
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # at a damaged header tarfile ends as at the end
                notes.append(f"damaged or cut off at byte {tar.offset:,}; what comes before it is used")
    except tarfile.TarError as error:
        notes.append(f"{error}; expected a .tar that is not compressed")
    entries = [tuple(parts.get(part, (0, 0)) for part in ENTRY.names) for parts in samples.values()
               if "picture" in parts and ("txt" in parts or "json" in parts)]
    if len(entries) < len(samples):
        notes.append(f"{len(samples) - len(entries)} samples lack a picture or a text and are left out")
    return np.array(entries, ENTRY), "; ".join(notes)


def read_shard(path, entry, size, fit):
    """A sample of a shard -> uint8 (size, size, 3), Sample; a PictureError if it is broken."""
    sample = read_captions(path, entry)
    try:
        if not sample.captions:
            raise PictureError("no caption; expected KEY.txt, or KEY.json with caption, or org_caption and re_caption")
        return read_picture(read_part(path, entry["picture"]), size, fit), sample
    except PictureError as error:
        raise PictureError(f"{path}, the picture at byte {entry['picture']['at']:,}: {error}") from None


def read_part(path, place):
    with open(path, "rb") as file:
        file.seek(place["at"])
        return file.read(place["bytes"])


def read_captions(path, entry):
    """The texts of a sample of a shard; captions is [] if they cannot be read."""
    try:
        lines = read_part(path, entry["txt"]).decode("utf-8-sig").split("\n") if entry["txt"]["bytes"] else []
        fields = json.loads(read_part(path, entry["json"])) if entry["json"]["bytes"] else {}
        texts = {key: " ".join(value.split()) for key, value in fields.items() if isinstance(value, str)}
    except (ValueError, RecursionError, AttributeError):
        return Sample([])
    web, long = texts.get("org_caption") or None, texts.get("re_caption") or None
    captions = list(filter(None, map(str.strip, lines))) or list(filter(None, [texts.get("caption") or web or long]))
    return Sample(captions, long, web)


# --- downloads, checkpoints, messages -------------------------------------------------------------------------------

def download(url, path, md5=None, sha256=None):
    """Fetch url to path, unless it is there. An incomplete or damaged file never gets that name."""
    path = Path(path)
    if path.exists():
        return path
    say(f"downloading {url}")
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
        torch.hub.download_url_to_file(url, part, hash_prefix=sha256, progress=not quiet())
        if size and part.stat().st_size != size:
            raise OSError(f"it broke off at {part.stat().st_size:,} of {size:,} bytes")
        if md5 and hashlib.file_digest(open(part, "rb"), "md5").hexdigest() != md5:
            raise OSError(f"its MD5 is not {md5}")
        os.replace(part, path)
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: torch's, of a wrong SHA-256
        raise UserError(f"cannot download {url}: {error}; try again, or put the file at {path} yourself") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def fetch(files, cache="data/cache"):
    """{kind: (address, SHA-256 or None)} -> {kind: path}, downloaded once, each to a name made from its address."""
    return {kind: download(url, Path(cache) / "weights" / re.sub(r"[^\w.-]+", "-", url.split("://")[1]), sha256=sha256)
            for kind, (url, sha256) in files.items()}


def read_checkpoint(path):
    """What a checkpoint of train.py holds. path: the file, or its run's folder, of which best.pt is read."""
    path = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises half a dozen types for a file that is none
        raise UserError(f"{path} is no checkpoint of train.py ({type(error).__name__})") from None
    if not isinstance(content, dict) or not {"model", "config", "tokenizer", "weights", "args"} <= set(content):
        raise UserError(f"{path} is no checkpoint of train.py; published weights go through from_pretrained")
    return content


def load_model(Model, Config, published, recipes, source, device=None, cache="data/cache"):
    """What `load` of a model file does: a checkpoint or a published name -> model, tokenizer, preprocess.

    The model is in evaluation mode, on `device`, by default the best there is. preprocess: a path or a PIL image ->
    uint8 (3, S, S). Raises UserError.
    """
    try:
        if source in published:
            files = fetch(published[source], cache)
            model = Model.from_pretrained(files["source"], source)
            tokenizer = read_vocabulary(recipes[source]["tokenizer"], files["vocab"])
        elif not Path(source).exists():
            raise UserError(f"{source}: no such checkpoint; published weights go by name: {', '.join(published)}")
        else:
            checkpoint = read_checkpoint(source)
            model = Model(Config(**checkpoint["config"])).eval()
            model.load_state_dict(checkpoint["weights"])
            tokenizer = from_state(checkpoint["tokenizer"])
    except UserError:
        raise
    except Exception as error:  # files that are damaged, or of another model, fail in many ways
        again = f"; delete {files['source']} to download it again" if source in published else ""
        raise UserError(f"{source} does not fit {Model.__name__} ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:200]}){again}") from None
    prepare = functools.partial(preprocess, size=model.config.image_size, fit=getattr(model.config, "fit", "crop"))
    return model.to(device or best_device()), tokenizer, prepare


def command(load):
    """What `python MODEL.py CHECKPOINT IMAGE LABEL LABEL ...` does, with the `load` of that file."""
    program, *arguments = Path(sys.argv[0]).name, *sys.argv[1:]
    if len(arguments) < 4:
        sys.exit(f'usage: python {program} CHECKPOINT IMAGE "a photo of a dog" "a photo of a cat" ...  (two or more)')
    source, image, *labels = arguments
    with entrance(program), torch.no_grad():
        model, tokenizer, prepare = load(source)
        images = prepare(image)[None].to(model.logit_scale.device)
        text_features = model.encode_text(model.tokenize(labels, tokenizer).to(images.device))
        cosines = getattr(model, "classify", model.similarity)(model.encode_image(images), text_features)[0]
        probabilities = (model.logit_scale.exp() * cosines).softmax(dim=0)
        for i in probabilities.argsort(descending=True).tolist():
            vague = f"  uncertainty {text_features.uncertainty[i]:.4f}" if hasattr(model, "classify") else ""
            say(f"{probabilities[i]:7.1%}  cosine {cosines[i]:+.3f}{vague}  {labels[i]}")
        if getattr(model, "captioner", None):
            say("says: " + model.caption(images, tokenizer)[0])


@contextlib.contextmanager
def entrance(program):
    """Around a whole program: a user's mistake ends it with one line, and no traceback."""
    with contextlib.suppress(AttributeError):  # a name that the terminal cannot show is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except torch.OutOfMemoryError as error:
        sys.exit(f"{program}: out of GPU memory ({str(error).splitlines()[0]}); in training, --microbatch 32 or "
                 "--recompute need less and change nothing else; or lower --batch, or use more GPUs")
    except (UserError, OSError) as error:
        sys.exit(f"{program}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def best_device():
    """The GPU of this process, else Apple's, else the CPU. (Several processes cannot exchange what Apple's holds.)"""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if "RANK" not in os.environ and torch.backends.mps.is_available() else "cpu")


def quiet():
    """True in all processes of a run but the first, which is the only one that prints."""
    return os.environ.get("RANK", "0") != "0"


def say(text):
    if not quiet():
        print(text, flush=True)


@functools.lru_cache
def say_once(text):
    """say, but each text only once: the files of a data set are read again for each split."""
    say(text)


def bar_options():
    """For tqdm: on a terminal a living bar, in a log file a line every 30 seconds."""
    return {"disable": quiet(), "dynamic_ncols": True, "mininterval": 0.2 if sys.stderr.isatty() else 30}
