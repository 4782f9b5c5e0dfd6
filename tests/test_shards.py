"""Tar shards: every sample once a pass, by seed and step, for any number of processes; broken samples; the index."""
import io
import itertools
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from test_data import alone, user_error  # noqa: F401, alone: a fixture for each test

SIZES = (13, 8, 11, 9, 14, 10, 13)  # of the shards that are trained on, 78 samples; then comes the one that is kept


def colour(number):
    return [number % 16 * 16, number // 16 * 16, 0]  # tells the number; no crop changes it


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), tuple(colour(number))).save(buffer, "PNG")
    return buffer.getvalue()


def add(path, files, mode="a"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            entry, content = tarfile.TarInfo(name), content.encode() if isinstance(content, str) else content
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def write_shards(*sizes, folder="shards"):
    Path(folder).mkdir()
    numbers = itertools.count()
    for shard, size in enumerate(sizes):
        add(f"{folder}/{shard:03}.tar", {f"{i:05}.{part}": png(i) if part == "png" else f"number {i}"
                                         for i in itertools.islice(numbers, size) for part in ("png", "txt")}, "w")


def load(pattern="shards/*.tar", split="train"):
    return data.load(pattern, split, 8, cache="cache")


def number_of(sample):
    return int(sample.captions[0].split()[1])


def numbers_of(split):
    """The numbers in the captions, row by row. The pictures are those of the captions."""
    found = [split[row] for row in range(len(split))]
    assert all(pixels[4, 4].tolist() == colour(number_of(sample)) for pixels, sample in found)
    return [number_of(sample) for _, sample in found]


def text_batch(samples, rngs):
    return {"number": torch.tensor([*map(number_of, samples)]), "chance": torch.tensor([rng.random() for rng in rngs])}


def loaders(split, world=1, batch=6, **options):
    return [data.Loader(split, batch, text_batch, rank=rank, world=world, **options) for rank in range(world)]


def batch_of(loaders, step):
    """The numbers in the batch of all processes, and what its samples' generators draw next."""
    parts = [loader.batch_at(step) for loader in loaders]
    batch = {key: torch.cat([part[key] for part in parts]).tolist() for key in parts[0]}
    assert [[channel[4][4] for channel in image] for image in batch["images"]] == list(map(colour, batch["number"]))
    return batch["number"], batch["chance"]


@pytest.mark.parametrize("group", [2, 16])
@pytest.mark.parametrize("turn", [0, 3])
def test_a_pass_has_every_sample_once_and_is_the_same_for_1_2_and_3_processes(monkeypatch, group, turn):
    monkeypatch.setattr(data, "GROUP", group)
    write_shards(*SIZES, 12)
    steps = range(13 * turn, 13 * turn + 13)
    passes = [[batch_of(loaders(load(), world), step) for step in steps] for world in (1, 2, 3)]
    numbers = sum((batch for batch, _ in passes[0]), [])
    assert sorted(numbers) == list(range(78)) != numbers
    assert passes[0] == passes[1] == passes[2]


@pytest.mark.parametrize("group", [1, 3, 16])
def test_the_order_is_random_within_groups_of_random_shards(monkeypatch, group):
    monkeypatch.setattr(data, "GROUP", group)
    write_shards(*SIZES, 12)
    split, starts, shards, expected = load(), np.cumsum([0, *SIZES]), list(range(7)), []
    random.Random("order/5/2").shuffle(shards)
    for g in range(0, 7, group):
        rows = [row for s in shards[g:g + group] for row in range(starts[s], starts[s + 1])]
        places = list(range(len(rows)))
        random.Random(f"order/5/2/{g}").shuffle(places)
        expected += [rows[place] for place in places]
    for first, last in ((0, 78), (0, 1), (20, 50), (77, 78)):
        assert split.order("order/5/2", first, last) == expected[first:last]
    assert split.order("order/6/2", 0, 78) != expected != split.order("order/5/3", 0, 78)


def test_a_run_goes_on_at_any_step_with_any_number_of_processes_and_an_epoch_of_any_size():
    write_shards(*SIZES, 12)
    whole = [batch_of(loaders(load()), step) for step in range(30)]  # more than two passes
    for step, world, epoch in ((29, 2, None), (13, 3, 30), (4, 1, 30), (12, 6, None)):
        made = loaders(load(), world, epoch=epoch)
        assert batch_of(made, step) == whole[step] and made[0].steps_per_epoch == (epoch or 78) // 6
    parts = zip(*(loader.stream(11, 16) for loader in loaders(load(), 2)))
    assert [torch.cat([one["chance"], two["chance"]]).tolist() for one, two in parts] == [c for _, c in whole[11:16]]
    assert batch_of(loaders(load(), seed=1), 0) != whole[0]


@pytest.mark.parametrize("world", [1, 3])
def test_broken_samples_leave_their_places_to_those_of_later_batches_and_are_counted_and_said(capsys, world):
    write_shards(*SIZES, 12)
    add("shards/000.tar", {"b1.png": b"no picture", "b1.txt": "a caption", "b2.png": png(0), "b2.json": "{not json",
                           "b3.png": png(0), "b3.txt": b"\xff\xfe not UTF-8", "b4.png": png(0), "b4.txt": " \n",
                           "b5.png": png(0), "b5.json": "[1]"})
    split, broken, expected = load(), {13, 14, 15, 16, 17}, []  # rows: the last of the first shard's 18
    made = loaders(split, world)
    found = [batch_of(made, step)[0] for step in range(5 * 13)]
    for turn in range(5):
        order = split.order(f"order/0/{turn}", 0, 78)  # 83 samples, of which a pass has 78
        for place in range(78):
            while order[place] in broken:
                place = (place + 6) % 78
            expected.append(number_of(split[order[place]][1]))
    assert sum(found, []) == expected and all(len(set(batch)) == 6 for batch in found)
    assert set.union(*(loader.broken for loader in made)) == broken
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert len(said) == sum(min(3, len(loader.broken)) for loader in made) >= 3  # of more, only the number
    assert all("shards/000.tar" in line and ("identify" in line or "no caption" in line) for line in said)


def test_the_index_is_mapped_has_36_bytes_a_sample_and_is_made_again_only_when_a_shard_changes(monkeypatch):
    write_shards(*SIZES, 12)
    index, row = load().index, itertools.count()
    assert isinstance(index, np.memmap) and index.itemsize == 36 and len(index) == 78
    for shard in range(7):
        with tarfile.open(f"shards/{shard:03}.tar") as tar:
            places = [(member.offset_data, member.size) for member in tar]
        assert all(index[next(row)].tolist() == (*pair, (0, 0)) for pair in zip(places[::2], places[1::2], strict=True))
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        assert (load().index == index).all()
    add("shards/003.tar", {"new.png": png(200), "new.txt": "number 200"})
    assert numbers_of(load()) == [*range(41), 200, *range(41, 78)]
    assert len(list(Path("cache").glob("*.index"))) == 1  # the older one is gone


@pytest.mark.parametrize("damage, kept", [
    (lambda whole, at: whole[:at] + b"x" * 512 + whole[at + 512:], 4), (lambda whole, at: whole[:at], 4),
    (lambda whole, at: whole[:at + 100], 4), (lambda whole, at: whole[:at + 520], 4),
    (lambda whole, at: b"\x1f\x8b compressed, or what else is no tar", 0), (lambda whole, at: b"", 0)],
    ids=["header", "cut before a header", "cut in a header", "cut in a picture", "no tar", "empty"])
def test_a_damaged_shard_says_so_and_its_first_samples_are_used(capsys, damage, kept):
    write_shards(8, 13, 11, 4)
    path = Path("shards/001.tar")
    with tarfile.open(path) as tar:
        at = tar.getmembers()[8].offset  # of the fifth sample
    path.write_bytes(damage(path.read_bytes(), at))
    for _ in range(2):  # also when the index is there already
        assert numbers_of(load()) == [*range(8 + kept), *range(21, 32)]
        assert capsys.readouterr().out.count("shards/001.tar: ") == 1
        data.say_once.cache_clear()


def test_hidden_files_and_samples_without_picture_or_text_are_left_out_with_a_note(capsys):
    write_shards(4, 4)
    add("shards/000.tar", {"b1.png": png(0), "b2.txt": "no picture", "._00000.png": b"macOS", "a.PNG": png(99),
                           "a.mask.png": png(0), "a.txt": "number 99"})
    assert numbers_of(load()) == [0, 1, 2, 3, 99]  # whose picture is not the mask
    assert "shards/000.tar: 2 samples lack a picture or a text" in capsys.readouterr().out


def test_captions_of_every_form():
    write_shards(4, 4)
    forms = [("\ufeffone \n\n two\n", None, data.Sample(["one", "two"])),
             ("", {"caption": "of  json"}, data.Sample(["of json"])),
             ("", {"org_caption": "img 12", "re_caption": "A dog. It runs.", "other": 3},
              data.Sample(["img 12"], "A dog. It runs.", "img 12")),
             ("", {"re_caption": "Only  long."}, data.Sample(["Only long."], "Only long.")),
             ("first", {"caption": "second"}, data.Sample(["first"])),
             (" \n", {"caption": "second", "org_caption": "web"}, data.Sample(["second"], None, "web"))]
    add("shards/000.tar", {f"in/{i}.{suffix}": content for i, (text, fields, _) in enumerate(forms)
                           for suffix, content in (("jpg", png(i)), ("txt", text), ("json", json.dumps(fields or {})))})
    assert load().samples[4:] == [load()[4 + i][1] for i in range(6)] == [expected for *_, expected in forms]


def test_the_last_shard_is_kept_for_validation_and_test(capsys):
    write_shards(*SIZES, 12)
    add("shards/007.tar", {"00080.png": b"no picture"})  # the later one counts
    assert numbers_of(load(split="val")) == [78, 82, 84, 86, 88]
    assert numbers_of(load(split="test")) == list(range(79, 90, 2))
    assert "1 of 6 pictures cannot be read" in capsys.readouterr().out
    train = load("shards/{000..007}.tar")
    assert numbers_of(train) == list(range(78))
    assert list(map(number_of, train.samples)) == list(range(13))  # of the first shard: a tokenizer learns from these


@pytest.mark.parametrize("pattern, expected", [
    ("shards/{000..009}.tar", "008.tar"), ("nothing/*.tar", "0 shards"), ("shards/000.tar", "1 shards"),
    ("few/*.tar", "fewer than four samples"), ("shards/*.tar", "--cache"), ("bad/*.tar", "too few samples")])
def test_mistakes_get_one_line(pattern, expected):
    write_shards(*SIZES, 12)
    write_shards(2, 1, 4, folder="few")
    write_shards(4, 4, folder="bad")
    for i in range(4):
        add("bad/000.tar", {f"{i:05}.png": b"no picture"})
    if expected == "--cache":
        Path("cache").write_text("a file where the folder should be")
    message = user_error(lambda: loaders(load(pattern), batch=2)[0].batch_at(0))
    assert pattern.split("/")[0] in message and expected in message


def test_a_shard_that_vanishes_ends_a_run_and_is_named():
    write_shards(*SIZES, 12)
    loader, = loaders(load())
    for path in Path("shards").iterdir():
        path.unlink()
    with pytest.raises((OSError, data.UserError), match=r"shards/00\d\.tar"):
        loader.batch_at(0)
