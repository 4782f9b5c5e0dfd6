"""data.py: reading pictures, the cache, downloads, every source on tiny files, a beginner's mistakes, the loader.

No network but a server on 127.0.0.1, and no photographs. Shards have their own file, test_shards.py.
"""
import contextlib
import csv
import errno
import functools
import hashlib
import http.server
import io
import json
import math
import multiprocessing
import os
import random
import re
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

import data
import tokens


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Each test in its own folder, as the only process, with no network but 127.0.0.1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "FLICKR8K_URL", "http://127.0.0.1:9/")


def user_error(call, *args, **kwargs):
    """The message of the UserError that the call must raise: one line, and not an empty one."""
    with pytest.raises(data.UserError) as raised:
        call(*args, **kwargs)
    assert str(raised.value) and "\n" not in str(raised.value)
    return str(raised.value)


def painting(w, h):
    """A colourful (h, w, 3) array, smooth with a little noise."""
    y, x = np.mgrid[0:h, 0:w] / max(w, h)
    smooth = np.stack([0.5 + 0.5 * np.sin(5 * x + 3 * y + k) for k in (0, 2, 4)], -1)
    return (smooth * 220 + np.random.default_rng(0).integers(0, 35, (h, w, 3))).astype(np.uint8)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def plain(i, format="PNG"):
    """The file of a picture whose colour tells its number."""
    return encoded(Image.new("RGB", (20, 20), (20 * i, 255 - 20 * i, 7 * i)), format)


def which(images):
    """The numbers of the pictures, read off their colours."""
    return [round(float(image[..., 0].mean()) / 20) for image in images]


def write_files(home, files):
    for name, content in files.items():
        path = Path(home) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def folder_of_pictures(folder, n=5, **bad):
    """0.png, 1.png, ... and bad: name -> bytes of files that are no pictures."""
    files = {f"{i}.png": plain(i) for i in range(n)} | {f"{name}.png": content for name, content in bad.items()}
    write_files(folder, files)
    return [f"{folder}/{name}" for name in files]


def zipped(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


# --- reading pictures ---

@pytest.mark.parametrize("w, h", [(60, 40), (37, 91), (24, 24), (300, 31), (9, 7)])
def test_crop_and_squash_are_torchvisions(w, h):
    image = Image.fromarray(painting(w, h))
    crop = transforms.Compose([transforms.Resize(24, InterpolationMode.BICUBIC), transforms.CenterCrop(24)])
    squash = transforms.Resize((24, 24), InterpolationMode.BILINEAR)
    np.testing.assert_array_equal(data.read_picture(encoded(image), 24), np.asarray(crop(image)))
    np.testing.assert_array_equal(data.read_picture(image, 24, "squash"), np.asarray(squash(image)))


def test_every_kind_of_source_gives_the_same_pixels():
    content = encoded(painting(30, 20))
    write_files(".", {"a.png": content, "a.zip": zipped({"in/a.png": content})})
    expected = data.read_picture(content, 16)
    for source in (Path("a.png"), "a.png", (os.path.abspath("a.zip"), "in/a.png"), Image.open("a.png")):
        np.testing.assert_array_equal(data.read_picture(source, 16), expected)


def test_exif_orientation_turns_the_picture_upright():
    stored, exif = painting(20, 20), Image.Exif()
    upright = [stored, np.fliplr(stored), np.rot90(stored, 2), np.flipud(stored), stored.transpose(1, 0, 2),
               np.rot90(stored, -1), np.rot90(stored, 2).transpose(1, 0, 2), np.rot90(stored)]
    for exif[0x0112], expected in enumerate(upright, 1):
        np.testing.assert_array_equal(data.read_picture(encoded(stored, exif=exif), 20), expected)


def rgba(colour, alpha):
    return Image.fromarray(np.dstack([np.full((12, 12, 3), colour, np.uint8), np.full((12, 12), alpha, np.uint8)]))


PALETTE = Image.fromarray(np.arange(3, dtype=np.uint8).repeat(4)[None].repeat(12, 0), "P")
PALETTE.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
RAMP = np.arange(0, 144 * 455, 455).reshape(12, 12)
JPEG = encoded(painting(64, 64), "JPEG")
GIF = encoded(rgba((255, 0, 0), 255).convert("RGB"), "GIF", save_all=True, append_images=[Image.new("RGB", (12, 12))])
MODES = {
    "cmyk": (encoded(Image.fromarray(painting(12, 12)).convert("CMYK"), "TIFF"), painting(12, 12)),
    "gray": (encoded(painting(12, 12)[..., 0]), painting(12, 12)[..., :1]),
    "1-bit": (encoded(Image.new("1", (12, 12), 1)), 255),
    "palette": (encoded(PALETTE, transparency=1), np.array([[255, 0, 0], [255, 255, 255], [0, 0, 255]]).repeat(4, 0)),
    "transparent": (encoded(rgba((10, 200, 30), 0)), 255),
    "a fifth, on white": (encoded(rgba((0, 100, 255), 51)), (204, 224, 255)),
    "gray and alpha": (encoded(rgba((0, 0, 0), 0).convert("LA")), 255),
    "animation": (GIF, (255, 0, 0)),
    "gray-16": (encoded(RAMP.astype(np.uint16)), RAMP[..., None] / 257),
    "dark gray-16": (encoded(np.full((12, 12), 200, np.uint16)), 1),  # although these values would fit into 8 bits
    "float": (encoded(np.full((12, 12), 0.5, np.float32), "TIFF"), 128),
    "int-32": (encoded(RAMP.astype(np.int32), "TIFF"), RAMP[..., None] / 257),
    "small int-32": (encoded(np.full((12, 12), 90, np.int32), "TIFF"), 90)}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_rgb_that_one_sees(mode):
    content, expected = MODES[mode]
    picture = data.read_picture(content, 12)
    assert picture.dtype == np.uint8 and picture.shape == (12, 12, 3)
    assert abs(picture.astype(float) - expected).max() <= 1


def test_long_strips_show_their_middle_and_stay_small(monkeypatch):
    grown, resize = [], data.vision.resize
    monkeypatch.setattr(data.vision, "resize", lambda image, *args: grown.append(resize(image, *args)) or grown[-1])
    tall = Image.linear_gradient("L").resize((1, 5000))
    for strip in (tall, tall.transpose(Image.Transpose.ROTATE_90)):
        assert abs(data.read_picture(strip, 32).astype(int) - 128).max() <= 3
        assert grown[-1].width * grown[-1].height <= 17 * 32 * 32


def test_what_cannot_be_read_is_a_picture_error_with_a_reason_in_one_line(monkeypatch):
    damaged = zipped({"a.jpg": JPEG}).replace(JPEG[99:], JPEG[:-99])
    write_files(".", {"half.jpg": JPEG[:len(JPEG) // 2], "bad.zip": damaged})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4096)  # a larger one is refused before it is decoded
    for source, why in (("half.jpg", "truncated"), (b"", "cannot identify"), (b"<html>", "cannot identify"),
                        (encoded(painting(64, 64))[:900], "(?i)truncated|broken"), (GIF[:20], "."), (JPEG[:30], "."),
                        ((os.path.abspath("bad.zip"), "a.jpg"), "CRC"), ("none.jpg", "no such file"),
                        (".", "directory"), (encoded(painting(100, 90)), "9000 pixels")):
        with pytest.raises(data.PictureError, match=why) as raised:
            data.read_picture(source, 16)
        assert "\n" not in str(raised.value)


def test_pictures_below_a_folder_are_found_through_links_and_each_folder_once():
    folder_of_pictures("elsewhere", 2)
    write_files("mine", {".hidden/0.png": JPEG, "b/._0.png": JPEG, "b/0.txt": "text", "b/2.png": JPEG, "c/3.JPG": JPEG})
    for target, link in (("../elsewhere", "mine/linked"), ("..", "mine/b/circle"), ("../../elsewhere", "mine/c/again"),
                         ("b", "mine/beside")):
        os.symlink(target, link)
    assert sorted(path.name for path in data.list_pictures("mine")) == ["0.png", "1.png", "2.png", "3.JPG"]


# --- the cache ---

def unread(source, size, fit):
    raise AssertionError("a picture was read although it is cached")


def cached(sources, size=16, fit="crop", read=data.read_picture):
    read = functools.partial(read, size=size, fit=fit)
    return data.cache_pictures(f"some-{size}-{fit}", sources, size, "cache", read)


def test_cache_is_built_once_and_again_when_a_picture_the_size_the_fit_or_the_list_changes():
    sources = folder_of_pictures("in")
    images, kept = cached(sources)
    assert kept == [0, 1, 2, 3, 4] and isinstance(images, np.memmap) and not images.flags.writeable
    np.testing.assert_array_equal(images, [data.read_picture(source, 16) for source in sources])
    cached(sources, fit="squash")
    absolute = [os.path.abspath(source) for source in sources]
    assert which(cached(absolute, read=unread)[0]) == kept  # the same pictures, otherwise written; both fits stay
    Path(sources[2]).write_bytes(plain(9))
    os.utime(sources[2], (1, 1))
    write_files("cache", {"some-16-crop-1.u8.x.part": b"of a build that was killed", "some-16-crop-2.u8.x.part": b""})
    os.utime("cache/some-16-crop-1.u8.x.part", (time.time() - 90_000,) * 2)
    assert which(cached(sources)[0]) == [0, 1, 9, 3, 4]
    assert cached(sources, size=8)[0].shape == (5, 8, 8, 3)
    assert which(cached(sources[::-1])[0]) == [4, 3, 9, 1, 0]
    assert which(cached(sources[:2])[0]) == [0, 1]
    assert [path.suffix for path in sorted(Path("cache").glob("some-16-crop-*"), key=os.path.getsize)] == [
        ".part", ".json", ".u8"]  # the older ones of this size are gone; what another process is making now is not


ONE = {"t.csv": "image,caption,split\na.png,a dog,train\n", "a.png": plain(3)}


def load_one(cache="cache"):
    return which(data.load("t.csv", "train", 16, cache=cache).images)


@pytest.mark.parametrize("where, stop", [
    ((Image, "open"), KeyboardInterrupt()), ((Image, "open"), OSError(errno.EMFILE, "trouble")),
    ((Image, "open"), OSError(errno.EIO, "trouble")), ((os, "fsync"), OSError(errno.ENOSPC, "trouble"))],
    ids=["interrupted", "too many files", "I/O error", "disk full"])
def test_a_build_that_ends_early_leaves_nothing_and_the_machines_trouble_is_no_verdict_on_a_picture(where, stop):
    def failing(*_):
        raise stop

    write_files(".", ONE)
    with pytest.MonkeyPatch.context() as patch, pytest.raises((KeyboardInterrupt, data.UserError)) as raised:
        patch.setattr(*where, failing)
        load_one()
    assert isinstance(stop, KeyboardInterrupt) or all(part in str(raised.value) for part in ("trouble", "--cache"))
    assert list(Path("cache").iterdir()) == []
    assert load_one() == [3]
    assert "--cache" in user_error(load_one, "a.png/below")  # a file where a folder should be


@pytest.mark.parametrize("suffix, content", [(".u8", b"half"), (".json", None), (".json", b"")])
def test_a_damaged_cache_is_made_again_or_is_one_line(suffix, content):
    write_files(".", ONE)
    load_one()
    path = next(Path("cache").glob("*" + suffix))
    path.unlink() if content is None else path.write_bytes(content)  # None: as when killed between its two files
    with contextlib.suppress(data.UserError):
        assert load_one() == [3]


def test_bad_pictures_are_listed_dropped_and_counted_every_time(capsys):
    sources = folder_of_pictures("in", 4, empty=b"", text=b"hello", half=encoded(painting(50, 50))[:300], fine=plain(7))
    sources.insert(1, "in/gone.png")
    for read in (data.read_picture, unread):
        images, kept = cached(sources, read=read)
        assert kept == [0, 2, 3, 4, 8] and which(images) == [0, 1, 2, 3, 7]
        said = capsys.readouterr().out
        assert "4 of 9 pictures cannot be read" in said and "gone.png: no such file" in said
    listed = json.loads(next(Path("cache").glob("*.json")).read_text())["bad"]
    assert [Path(path).stem for path, why in listed if why] == ["gone", "empty", "text", "half"]
    tried = []
    for _ in range(2):
        assert "none of the 2 pictures can be read" in user_error(
            cached, sources[5:7], read=lambda source, size, fit: tried.append(1) or data.read_picture(source, size))
    assert len(tried) == 4  # the second time they are tried again


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_two_processes_that_build_at_once_both_get_the_right_pixels():
    sources, context = folder_of_pictures("in", 8), multiprocessing.get_context("fork")
    barrier, found = context.Barrier(2, timeout=20), context.Queue()

    def slow(source, size, fit):
        if source == sources[0]:
            barrier.wait()  # both have begun
        time.sleep(0.02)
        return data.read_picture(source, size, fit)

    def build():
        images, kept = cached(sources, read=slow)
        found.put((which(images), kept))

    other = context.Process(target=build)
    other.start()
    build()
    assert [found.get(timeout=20) for _ in range(2)] == [(list(range(8)), list(range(8)))] * 2
    other.join()
    assert sorted(path.suffix for path in Path("cache").iterdir()) == [".json", ".u8"]
    assert which(cached(sources, read=unread)[0]) == list(range(8))


# --- downloads ---

@pytest.fixture
def server():
    """-> its address, what it serves (name -> bytes, or (bytes,) to break off half-way), the paths it was asked for."""
    files, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            content = files.get(self.path[1:])
            if content is None:
                return self.send_error(404)
            whole = content if isinstance(content, bytes) else content[0]
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole if isinstance(content, bytes) else whole[:len(whole) // 2])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,)).start()
        yield f"http://127.0.0.1:{running.server_port}/", files, asked
        running.shutdown()


CONTENT = random.Random(0).randbytes(300_000)
MD5, SHA256 = hashlib.md5(CONTENT).hexdigest(), hashlib.sha256(CONTENT).hexdigest()


def test_a_file_is_fetched_once_with_any_sum_and_has_a_name_for_its_address(server):
    url, files, asked = server
    files |= {"one/file.bin": CONTENT, "two/file.bin": b"another"}
    for name, sums in (("a", {}), ("b", {"md5": MD5}), ("c", {"sha256": SHA256})):
        for _ in range(2):
            asked.clear()
            assert data.download(url + "one/file.bin", f"new/folder/{name}.bin", **sums).read_bytes() == CONTENT
        assert not asked  # the second time
    assert sorted(path.name for path in Path("new/folder").iterdir()) == ["a.bin", "b.bin", "c.bin"]
    found = data.fetch({"a": (url + "one/file.bin", SHA256), "b": (url + "two/file.bin", None)}, "cache")
    assert [found[kind].read_bytes() for kind in "ab"] == [CONTENT, b"another"]


@pytest.mark.parametrize("served, sums, expected", [
    (CONTENT, {"md5": "0" * 32}, "MD5"), (CONTENT, {"sha256": "0" * 64}, SHA256), (None, {"md5": MD5}, "Not Found"),
    ((CONTENT,), {}, "150,000 of 300,000"), ("nobody", {}, "refused")],
    ids=["md5", "sha256", "404", "broken off", "down"])
def test_failed_download_is_a_clear_error_and_leaves_no_file(server, served, sums, expected):
    url, files, _ = server
    if served == "nobody":
        with http.server.HTTPServer(("127.0.0.1", 0), None) as closed:
            url = f"http://127.0.0.1:{closed.server_port}/"
    elif served:
        files["file.bin"] = served
    message = user_error(data.download, url + "file.bin", "folder/file.bin", **sums)
    assert all(part in message for part in (url + "file.bin", "folder/file.bin", expected)), message
    assert list(Path("folder").iterdir()) == []


# --- Flickr8k ---

LISTS = {"train": [0, 1, 2, 3, 4, 5], "dev": [6, 7], "test": [8, 9, 10]}  # 11 is in no list; of 5 there is no picture
OFFICIAL = {"train": [0, 1, 2, 3, 4], "val": [6, 7], "test": [8, 9, 10]}
JPG = [f"{1000 + i}_abc.jpg" for i in range(12)]
LINES = [[f"a dog , number {i} , says 'k{k}' ." for k in range(5)] for i in range(12)]
PICTURES = {JPG[i]: plain(i, "JPEG") for i in range(12) if i != 5}
TEXTS = {f"Flickr_8k.{name}Images.txt": "".join(JPG[i] + "\n" for i in numbers) for name, numbers in LISTS.items()} | {
    "Flickr8k.token.txt": "".join(f"{JPG[i]}#{k}\t{line}\n" for i in range(12) for k, line in enumerate(LINES[i]))}
ZIPS = {"Flickr8k_text.zip": zipped(TEXTS | {"__MACOSX/._Flickr8k.token.txt": b"\x00\xff"}),
        "Flickr8k_Dataset.zip": zipped({f"Flicker8k_Dataset/{name}": content for name, content in PICTURES.items()})}
FOLDERS = {f"Flicker8k_Dataset/{name}": content for name, content in PICTURES.items()} | TEXTS
KAGGLE = {f"Images/{name}": content for name, content in PICTURES.items()} | {
    "captions.txt": "image,caption\n" + "".join(f'{JPG[i]},"{line}"\n' for i in range(12) for line in LINES[i])}


def check_flickr8k(root, splits=OFFICIAL):
    """The pictures (by their colours) are the official ones, and each has its own five captions."""
    for name, numbers in splits.items():
        split = data.load("flickr8k", name, 16, root=root)
        assert which(split.images) == numbers and split.augment
        assert [sample.captions for sample in split.samples] == [LINES[i] for i in numbers]


@pytest.mark.parametrize("files", [ZIPS, FOLDERS], ids=["zips", "folders"])
def test_flickr8k_layouts_give_the_official_lists(tmp_path, files, capsys):
    write_files("home", files)
    check_flickr8k(tmp_path / "home")
    said = capsys.readouterr().out  # once, of three splits
    assert said.count("train 5, val 2, test 3") == 1 and said.count("1 of 11 listed images have no picture") == 1


def test_flickr8k_is_downloaded_and_of_kaggles_only_the_lists(server, monkeypatch, tmp_path):
    write_files("kaggle", KAGGLE)
    assert "cannot download" in user_error(data.load, "flickr8k", "val", 16, root=tmp_path / "kaggle")
    monkeypatch.setattr(data, "FLICKR8K_URL", server[0])
    monkeypatch.setattr(data, "FLICKR8K", {name: hashlib.md5(ZIPS[name]).hexdigest() for name in data.FLICKR8K})
    data.open_zip.cache_clear()  # it knows archives by their paths, and other tests may have others at these
    server[1].update(ZIPS)
    check_flickr8k(tmp_path / "kaggle")
    assert set(server[2]) == {"/Flickr8k_text.zip"}  # never the gigabyte of pictures
    check_flickr8k(None, {"val": OFFICIAL["val"]})
    data.open_zip.cache_clear()


@pytest.mark.parametrize("files, expected", [
    (TEXTS, "no image with a caption"), (ZIPS | {"Flickr8k_Dataset.zip": b"PK broken"}, "home/Flickr8k_Dataset.zip"),
    (KAGGLE | {"captions.txt": "picture,caption\n0.png,a dog\n"}, "home/captions.txt.* expected image,caption"),
    (KAGGLE | {"captions.txt": 'image,caption\n0.png,"a dog\n'}, "."),
    (FOLDERS | {"Flickr8k.token.txt": b"1000_abc.jpg#0\tcaf\xe9\n"}, "home/Flickr8k.token.txt.* byte 18"),
    (ZIPS | {"Flickr8k_text.zip": ZIPS["Flickr8k_text.zip"].replace(b"a dog", b"a cat", 1)}, "flickr8k")],
    ids=["no pictures", "broken zip", "columns", "open quote", "latin-1", "damaged zip"])
def test_flickr8k_that_is_not_there_is_a_clear_error(tmp_path, files, expected):
    write_files("home", files)
    assert re.search(expected, user_error(data.load, "flickr8k", "train", 16, root=tmp_path / "home"))


# --- your own pictures ---

def load_own(name, split, **options):
    loaded = data.load(name, split, 16, **options)
    return dict(zip(which(loaded.images), loaded.samples, strict=True))


def table(*rows, delimiter=","):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(rows)
    return file.getvalue()


def entries(image, captions):
    return json.dumps([{image: f"in/{i}.png", captions: SAID[i], "split": SPLIT[i]} for i in SAID], ensure_ascii=False)


SAID = {i: [f"picture {i}", f"bild, nr. {i} 별"] for i in range(6)}
SPLIT = {i: ("train", "val", "test")[i % 3] for i in range(6)}  # 0 and 3, 1 and 4, 2 and 5
ROWS = [(f"in/{i}.png", text, SPLIT[i]) for i in SAID for text in SAID[i]]
CSV = table(("image", "caption", "split"), *ROWS)
KARPATHY = json.dumps({"images": [{"filename": f"{i}.png", "split": "restval" if i == 3 else SPLIT[i], "sentences": [
    {"raw": text, "tokens": text.split()} for text in SAID[i]]} for i in SAID]})
TABLES = {
    "csv": ("t.csv", CSV), "Excel's csv": ("t.csv", CSV.encode("utf-8-sig")), "in the folder": ("captions.csv", CSV),
    "tsv": ("t.tsv", table(("image", "caption", "split"), *ROWS, delimiter="\t")),
    "open_clip's": ("t.csv", table(("filepath", "title", "split"), *ROWS, delimiter="\t")),
    "json, captions": ("t.json", entries("image", "captions")), "Karpathy's": ("t.json", KARPATHY),
    "json, caption": ("t.json", json.dumps([dict(zip(("image", "caption", "split"), row)) for row in ROWS])),
    "KoCLIP's": ("t.json", entries("file_path", "caption_ko").encode("utf-8-sig")),
    "flickr30k": ("dataset_flickr30k.json", KARPATHY), "coco": ("dataset_coco.json", KARPATHY)}


@pytest.mark.parametrize("kind", TABLES)
def test_own_tables_keep_their_splits_pictures_and_captions(kind):
    folder_of_pictures("own/in", 6)
    name, content = TABLES[kind]
    write_files("own", {name: content})
    for split in ("train", "val", "test"):
        found = (load_own(kind, split, root="own") if kind in data.NAMES else
                 load_own("own" if kind == "in the folder" else f"own/{name}", split))
        assert {i: sample.captions for i, sample in found.items()} == {i: SAID[i] for i in SAID if SPLIT[i] == split}


def test_folder_with_texts_beside_the_pictures_is_split_by_a_hash_of_the_names(capsys):
    folder_of_pictures("own", 10)
    folder_of_pictures(os.fsdecode(b"own/caf\xe9"), 13)  # a name that is not UTF-8
    names = [f"{os.fsdecode(b'caf%c/' % 0xe9) * (i > 9)}{i}" for i in range(13)]
    write_files("own", {f"{name}.txt": f"\ufeffpicture {i}\n  별 {i}  \n" for i, name in enumerate(names)})
    splits = {name: load_own("own", name) for name in ("train", "val", "test")}
    order = sorted(range(13), key=lambda i: hashlib.sha256(os.fsencode(f"{names[i]}.png")).hexdigest())
    assert {name: sorted(split) for name, split in splits.items()} == {
        "val": sorted(order[:2]), "test": sorted(order[2:4]), "train": sorted(order[4:])}
    for split in splits.values():
        assert {i: sample.captions for i, sample in split.items()} == {i: [f"picture {i}", f"별 {i}"] for i in split}
    said = capsys.readouterr().out
    assert "10 of 23 pictures have no .txt beside them" in said and "empty" not in said
    assert said.count("13 images, 26 captions; train 9, val 2, test 2 (13 without a split") == 1  # of three splits


def test_texts_of_a_table_arrive_whole_and_what_is_missing_is_counted(capsys):
    folder_of_pictures("in", 5)
    texts = ["x" * 5000, "👨\u200d👩\u200d👧 😀🇰🇷", "two\u2028lines\tand \"quotes\""]
    write_files(".", {"t.csv": table(
        ("image ", " caption", "split", "long"), ("in/gone.png", "d", "val", ""),
        *((f" in/{i}.png ", f" {texts[i]} ", "val", "") for i in range(3)), ("in/3.png", "b", "val", " "),
        ("in/3.png", "c", "val", " A long one. Of two. "), ("in/3.png", "e", "val", ""), ("in/3.png", "", "val", ""),
        ("in/4.png", "  ", "val", ""))})
    found = load_own("t.csv", "val")
    assert [found.pop(i).captions for i in range(3)] == [[text] for text in texts]
    assert found == {3: data.Sample(["b", "c", "e"], "A long one. Of two.")}
    said = capsys.readouterr().out
    assert "2 of 9 captions are empty" in said and "1 of 5 pictures" in said and "gone.png: no such file" in said


MISTAKES = {  # what is in the folder, what is loaded, and what the message says
    "missing": ({}, "nothing", "nothing.*shapes.*flickr8k.*file or folder that exists"),
    "root": ({}, "flickr8k", "nowhere"), "no root": ({}, "coco", "--data coco needs --root.*dataset_coco.json"),
    "split": ({}, "shapes:validation", "'validation'; known: train, val, test"),
    "no pictures": ({"own/notes": ""}, "own", "own: 0 pictures and not one caption; expected NAME.txt.* captions.csv"),
    "no captions": ({"own/a.png": JPEG, "own/b.png": JPEG}, "own", "own: 2 pictures and not one caption"),
    "latin-1 txt": ({"own/a.png": JPEG, "own/a.txt": b"caf\xe9"}, "own", "a.txt.*UTF-8|a.txt.*utf-8"),
    "suffix": ({"t.txt": "a dog"}, "t.txt", "t.txt: expected a folder, a .csv, .tsv or .json"),
    "semicolons": ({"t.csv": "file;text\na.png;dog"}, "t.csv", "t.csv.*found: file;text; expected image,caption"),
    "columns": ({"t.csv": "picture,text,x\na.png,dog,1"}, "t.csv", "t.csv.*: picture, text, x; expected image,caption"),
    "empty csv": ({"t.csv": ""}, "t.csv", "t.csv.*found: none"),
    "no captions in it": ({"t.csv": "image,caption\na.png, \nb.png,\n"}, "t.csv", "t.csv: no image with a caption"),
    "no image": ({"t.csv": "image,caption\na.png,dog\nb.png,cat\nc.png,cow\n"}, "t.csv", "none of the 1 .*no such f"),
    "split of a row": ({"t.csv": "image,caption,split\na.png,dog,holdout\n"}, "t.csv", "a.png.*'holdout'; expected"),
    "two splits": ({"t.csv": "image,caption,split\na.png,dog,val\na.png,a,test"}, "t.csv", "a.png is in two splits"),
    "no name": ({"t.csv": "image,caption\n,dog\n"}, "t.csv", "'dog'.* expected an image"),
    "latin-1": ({"t.csv": b"image,caption\na.png,caf\xe9\n"}, "t.csv", "t.csv.* (byte|position) 23.*UTF-8"),
    "open quote": ({"t.csv": 'image,caption\na.png,"a dog\n' + "b.png,x\n" * 20_000}, "t.csv", "t.csv.*(quote|larger)"),
    "commas": ({"t.csv": "image,caption\na.png,a dog, running\n"}, "t.csv", "t.csv, line 2: .*quotes"),
    "no val": ({"t.csv": "image,caption,split\na.png,dog,train\n", "a.png": JPEG}, "t.csv:val", "no picture .*'val'"),
    "broken json": ({"t.json": '[{"image": "a.png", '}, "t.json", "t.json.*JSON"),
    "names only": ({"t.json": '["a.png"]'}, "t.json", 't.json.*"a.png"; .*image and caption'),
    "keys": ({"t.json": '[{"file": "a.png", "text": "dog"}]'}, "t.json", 'found {"file": "a.png", .*image and caption'),
    "COCO's own": ({"t.json": '{"images": [{"file_name": "a.png"}], "annotations": []}'}, "t.json", "filename")}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_beginners_mistake_is_one_line_that_says_what_was_found_and_expected(mistake):
    files, name, expected = MISTAKES[mistake]
    write_files(".", files)
    name, _, split = name.partition(":")
    message = user_error(data.load, name, split or "train", 16, root=None if name != "flickr8k" else "nowhere")
    assert re.search(expected, message), message


# --- the loader ---

def numbered(n, augment=True, size=16):
    """Picture i: red rises to the right, green downwards, blue is i. Every other one has a caption about a side."""
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    images = np.empty((n, size, size, 3), np.uint8)
    images[..., 0], images[..., 1], images[..., 2] = ramp, ramp[:, None], np.arange(n)[:, None, None]
    said = ["a cleft rock", "on the left"]
    return data.Split("numbered", images, [data.Sample([f"dog {i}", said[i % 2]]) for i in range(n)], augment)


def text_batch(samples, rngs):
    """The number in the first caption, and which caption is drawn."""
    return {"number": torch.tensor([int(sample.captions[0].split()[1]) for sample in samples]),
            "drawn": torch.tensor([rng.choice((0, 1)) for rng in rngs])}


@pytest.mark.parametrize("augment, world", [(True, 1), (False, 1), (True, 2), (True, 4)])
def test_a_batch_is_what_a_slow_loop_draws_with_the_same_seed(augment, world):
    size, n, seed, flips = 16, 10, 3, []
    ramp = np.linspace(0, 255, size).astype(np.uint8).astype(float)
    loaders = [data.Loader(numbered(n, augment), 4, text_batch, seed, rank, world) for rank in range(world)]
    for step in (11, 3, 7, 0, 8, 2, 5):  # what ran before does not matter
        turn, i = divmod(step, 2)  # 2 batches of 4 are a pass over 10
        order = list(range(n))
        random.Random(f"order/{seed}/{turn}").shuffle(order)
        parts = [loader.batch_at(step) for loader in loaders]
        assert all(part["images"].shape == (4 // world, 3, size, size) for part in parts)
        batch = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        assert batch["images"].dtype == torch.uint8 and batch["number"].tolist() == order[4 * i:4 * i + 4]
        for row, image, drawn in zip(order[4 * i:], batch["images"].numpy().astype(float), batch["drawn"]):
            rng, red, green, flip = random.Random(f"sample/{seed}/{turn}/{row}"), ramp, ramp, False
            if augment:
                area, ratio = rng.uniform(0.5, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
                w, h = min(size, size * (area * ratio) ** 0.5), min(size, size * (area / ratio) ** 0.5)
                left, top = rng.uniform(0, size - w), rng.uniform(0, size - h)
                red, green = (np.interp(start + (np.arange(size) + 0.5) * side / size - 0.5, np.arange(size), ramp)
                              for start, side in ((left, w), (top, h)))
                flip = row % 2 == 0 and rng.random() < 0.5
                flips += [flip] * (row % 2 == 0)
            assert abs(image[0] - red[::-1 if flip else 1]).max() < 1.5  # it is rounded twice at most
            assert abs(image[1] - green[:, None]).max() < 1.5 and (image[2] == row).all()
            assert drawn == rng.choice((0, 1))
    assert not augment or 0.2 < np.mean(flips) < 0.8


def test_a_picture_is_flipped_only_where_no_text_speaks_of_left_or_right():
    for text, flips in {"a dog in the grass": True, "A cleft rock, brightly lit": True, "하트가 있다": True,
                        "Left: a dog": False, "turning RIGHT.": False, "the leftmost dog": False, "왼쪽에 있는 별": False,
                        "별의 오른쪽에": False, "좌측의 개": False}.items():
        for sample in (data.Sample(["a dog", text]), data.Sample(["a dog"], text), data.Sample(["a dog"], None, text)):
            assert sample.may_be_flipped == flips


def test_a_stream_is_the_batches_made_ahead_counts_its_waiting_and_passes_errors_on():
    made = []

    def slow_texts(samples, rngs):
        if len(made) == 7:
            raise data.UserError("the eighth batch")
        made.append(time.sleep(0.1))
        return {}

    loader = data.Loader(numbered(40), 8, slow_texts)
    assert len(list(loader.stream(0, 2))) == len(made) == 2
    stream = loader.stream(3, 20)
    assert torch.equal(next(stream)["images"], loader.batch_at(3)["images"]) and loader.waited > 0.09
    deadline = time.time() + 10
    while len(made) < 6 and time.time() < deadline:
        time.sleep(0.01)
    assert len(made) == 6  # two more than were asked for
    assert user_error(list, stream) == "the eighth batch"


@pytest.mark.parametrize("options, expected", [
    (dict(batch=11), "--batch 11.* 10"), (dict(batch=1), "--batch 1.* leaves no negatives"),
    (dict(batch=9, world=2), "--batch 9.* 2 processes"), (dict(batch=8, epoch=6), "--batch 8.* 6")])
def test_impossible_batches_are_said(options, expected):
    assert re.search(expected, user_error(data.Loader, numbered(10), text_batch=text_batch, **options))


# --- checkpoints ---

@dataclass
class Config:
    image_size: int = 8


class Model(torch.nn.Linear):
    def __init__(self, config):
        super().__init__(2, 1)
        self.config = config

    @classmethod
    def from_pretrained(cls, source, name):
        assert source.read_bytes() == b"weights"
        return cls(Config(12))


def checkpoint(**changes):
    return {"model": "some", "config": {"image_size": 8}, "weights": Model(Config()).state_dict(), "args": {},
            "tokenizer": tokens.BPE.train(["a dog"], 262).state()} | changes


def test_load_model_reads_a_checkpoint_and_fetches_published_weights(server):
    url, files, _ = server
    files |= {"weights": b"weights", "good.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\ndog", "bad.txt": b"\xff"}
    published = {name: {"source": (url + "weights", None), "vocab": (url + f"{name}.txt", None)}
                 for name in ("good", "bad", "gone")}
    recipes = dict.fromkeys(published, {"tokenizer": "wordpiece"})
    load = functools.partial(data.load_model, Model, Config, published, recipes, device="cpu")
    write_files(".", {"a.png": encoded(painting(20, 30)), "run/log.csv": ""})
    torch.save(saved := checkpoint(), "run/best.pt")
    for source in ("run/best.pt", "run", Path("run")):
        model, tokenizer, preprocess = load(source)
        assert not model.training and torch.equal(model.weight, saved["weights"]["weight"])
        assert tokenizer.state() == saved["tokenizer"]
        np.testing.assert_array_equal(preprocess("a.png").permute(1, 2, 0), data.read_picture("a.png", 8))
    _, tokenizer, preprocess = load("good")
    assert tokenizer.encode("dog") == [4] and preprocess(Image.new("RGB", (20, 20))).shape == (3, 12, 12)
    assert user_error(preprocess, "b.png") == "b.png: no such file"
    assert re.search("bad.txt is no .*vocabulary", user_error(load, "bad")) and "Not Found" in user_error(load, "gone")


@pytest.mark.parametrize("saved, expected", [
    (None, "no such checkpoint"), (b"no file of torch", "is no checkpoint"), (zipped({"a": b"b"}), "is no checkpoint"),
    ({"weight": torch.zeros(2)}, "is no checkpoint.* from_pretrained"), ([1, 2], "is no checkpoint"),
    (checkpoint(args=re.compile("x")), "is no checkpoint"),  # not of plain types
    (checkpoint(config={"depth": 3}), "does not fit Model .*depth"),
    (checkpoint(weights={}), "does not fit Model .*Missing key"),
    (checkpoint(tokenizer={"kind": "other"}), "does not fit Model .*other"),
], ids=["missing", "text", "zip", "published weights", "a list", "objects", "config", "weights", "tokenizer"])
def test_a_checkpoint_that_is_none_is_one_line(saved, expected):
    if isinstance(saved, bytes):
        Path("x.pt").write_bytes(saved)
    elif saved:
        torch.save(saved, "x.pt")
    message = user_error(data.load_model, Model, Config, {"named": {}}, {}, "x.pt", "cpu")
    assert message.startswith("x.pt") and re.search(expected, message), message
