"""Tar shards: every sample once a pass, whatever the number of processes and workers; broken ones; resuming."""
import collections
import io
import itertools
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train

SIZES = (13, 8, 11, 9, 14, 10, 12)  # of the shards that are trained on; then comes the one that is kept apart


def png(number, size=16):
    """A picture that tells its number: by its red and green."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (number % 16 * 16, number // 16 * 16, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def write_shards(folder, sizes=(*SIZES, 12)):
    folder.mkdir(exist_ok=True)
    numbers = itertools.count()
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for number in itertools.islice(numbers, size):
                add(tar, f"{number:05}.png", png(number))
                add(tar, f"{number:05}.txt", f"number {number}".encode())
    return f"{folder}/{{000..{len(sizes) - 1:03}}}.tar"


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("made") / "shards")


def texts(samples, rngs):
    return {"numbers": torch.tensor([int(sample.captions[0].split()[1]) for sample in samples]),
            "chance": torch.tensor([rng.random() for rng in rngs])}


def load(pattern, tmp_path, count=None):
    return data.load(pattern, "train", 16, cache=tmp_path, samples=count)


def loaders(shards, world, workers, batch=6, **options):
    return [data.ShardLoader(shards, batch, texts, rank=rank, world=world, workers=workers, **options)
            for rank in range(world)]


def test_patterns(pattern, tmp_path):
    braces = data.shard_paths(pattern)
    assert [path.name for path in braces] == [f"{i:03}.tar" for i in range(8)]
    assert data.shard_paths(str(Path(pattern).parent / "*.tar")) == braces
    assert len(load(pattern, tmp_path)) == sum(SIZES) and len(load(pattern, tmp_path, 50)) == 50
    for wrong, message in ((pattern.replace("007", "009"), "2 of 10 shards are not there: .*008.tar"),
                           (str(tmp_path / "*.tar"), "0 shards found; expected two or more"),
                           (str(braces[0]), "1 shards found")):
        with pytest.raises(data.UserError, match=message):
            data.shard_paths(wrong)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("turn", [0, 3])
def test_all_readers_together_draw_every_sample_once(pattern, tmp_path, world, workers, turn):
    shards = load(pattern, tmp_path)
    drawn = [[key for _, key, _ in data.ShardReader(shards, 2, 0, rank, world, workers, [], 0).draw(
        rank * workers + worker, turn)] for rank in range(world) for worker in range(workers)]
    assert sorted(itertools.chain(*drawn)) == [f"{i:05}" for i in range(sum(SIZES))]
    assert drawn[0] != sorted(drawn[0])
    again = data.ShardReader(shards, 2, 0, 0, world, workers, [], 0).draw(0, turn)
    other = data.ShardReader(shards, 2, 0, 0, world, workers, [], 0).draw(0, turn + 1)
    assert [key for _, key, _ in again] == drawn[0] != [key for _, key, _ in other]


def test_a_small_buffer_shuffles_too_and_loses_nothing(pattern, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BUFFER", 5)
    drawn = [key for _, key, _ in data.ShardReader(load(pattern, tmp_path), 2, 0, 0, 1, 1, [], 0).draw(0, 0)]
    assert sorted(drawn) == [f"{i:05}" for i in range(sum(SIZES))] and drawn != sorted(drawn)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_what_is_in_the_shards(pattern, tmp_path, world, workers):
    """One pass: no sample twice, and missing no more than the part of a batch that each reader had left at its end."""
    shards = load(pattern, tmp_path)
    readers, share = world * max(1, workers), 6 // world
    found, places = [], []
    for loader in loaders(shards, world, workers):
        assert loader.steps_per_epoch == sum(SIZES) // 6
        for batch in loader.stream(0, 60):
            if all(place.turn > 0 for place in loader.places):
                break
            numbers = batch["numbers"].tolist()
            assert batch["images"].shape == (share, 3, 16, 16) and len(set(numbers)) == share
            for number, image in zip(numbers, batch["images"]):
                assert image[:, 8, 8].tolist() == [number % 16 * 16, number // 16 * 16, 0]
            found.append((loader.places, numbers))
    first_pass = [number for places, numbers in found for number in numbers]
    counts = collections.Counter(first_pass)
    missing = set(range(sum(SIZES))) - set(counts)
    assert len(missing) <= readers * (share - 1)


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 2), (2, 2), (3, 0)])
def test_a_resumed_stream_is_the_same(pattern, tmp_path, world, workers):
    shards = load(pattern, tmp_path)
    for rank in range(world):
        options = dict(rank=rank, world=world, workers=workers)
        whole = list(data.ShardLoader(shards, 6, texts, **options).stream(0, 27))  # more than a pass
        loader = data.ShardLoader(shards, 6, texts, **options)
        list(loader.stream(0, 13))
        state = json.loads(json.dumps([loader.state()] * world))  # plain types
        resumed = data.ShardLoader(shards, 6, texts, **options, state=state)
        rest = list(resumed.stream(13, 27))
        assert len(rest) == 14
        for a, b in zip(whole[13:], rest):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_seeds_differ(pattern, tmp_path):
    shards = load(pattern, tmp_path)
    one, same, other = (next(data.ShardLoader(shards, 6, texts, seed=seed, workers=0).stream(0, 1))
                        for seed in (0, 0, 1))
    assert torch.equal(one["numbers"], same["numbers"]) and torch.equal(one["chance"], same["chance"])
    assert not torch.equal(one["numbers"], other["numbers"])


def test_broken_samples_are_left_out_and_counted(tmp_path, capsys):
    pattern = write_shards(tmp_path / "shards", (6, 6, 6, 6))
    folder = tmp_path / "shards"
    with tarfile.open(folder / "000.tar", "a") as tar:
        add(tar, "b1.png", b"this is no picture")
        add(tar, "b1.txt", b"a caption")
        add(tar, "b2.png", png(0))  # without a caption
        add(tar, "b3.txt", b"without a picture")
        add(tar, "b4.png", png(0))
        add(tar, "b4.json", b"{not json")
        add(tar, "b5.png", png(0))
        add(tar, "b5.txt", b"\xff\xfe not UTF-8")
    whole = (folder / "001.tar").read_bytes()
    (folder / "001.tar").write_bytes(whole[:512 * 9 + 20])  # in the middle of the third picture
    (folder / "002.tar").write_bytes(b"\x1f\x8b compressed or what else, no tar")
    shards = load(pattern, tmp_path)
    loader = data.ShardLoader(shards, 2, texts, workers=0)
    numbers = []
    for batch in loader.stream(0, 100):
        if loader.places[0].turn:
            break
        numbers += batch["numbers"].tolist()
    assert sorted(numbers) == [*range(8)]
    printed = capsys.readouterr().out
    assert printed.count("left out:") == 3 and "Traceback" not in printed
    reader = data.ShardReader(shards, 2, 0, 0, 1, 1, [data.Place(0, 0)], 0)
    broken = []
    for _, _, _, problems, _, place in reader:
        if place.turn:
            broken += problems
            break
        broken += problems
    text = "\n".join(broken)
    for part in ("b1: cannot identify", "b2: no caption: expected KEY.txt", "b3: no picture",
                 "b4: its captions cannot be", "b5: its captions cannot be read", "001.tar: unexpected end of data",
                 "002.tar: "):
        assert part in text, (part, text)


def test_a_shard_that_is_damaged_in_the_middle_says_so(tmp_path):
    """At a damaged header tarfile ends as if that were the end."""
    write_shards(tmp_path, sizes=(10, 5))
    path = tmp_path / "000.tar"
    with tarfile.open(path) as tar:
        header = [member.offset for member in tar][8]  # of the fifth sample's picture
    whole = path.read_bytes()
    assert data.shard_index.__wrapped__(path) == (data.shard_index(path)[0], None)
    for content, kept in ((whole[:header] + b"x" * 512 + whole[header + 512:], 4), (whole[:header], 4),
                          (whole[:header + 100], 4)):
        path.write_bytes(content)
        entries, error = data.shard_index.__wrapped__(path)
        assert len(entries) == kept and error


def test_captions_of_every_form(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key, parts in {
                "a": {"txt": "one \n\n two\n"}, "b": {"json": json.dumps({"caption": "of  json"})},
                "c": {"json": json.dumps({"org_caption": "img 12", "re_caption": "A dog. It runs.", "other": 3})},
                "d": {"json": json.dumps({"re_caption": "Long alone."})},
                "e.x": {"txt": "first", "json": json.dumps({"caption": "second"})}}.items():
            add(tar, f"folder/{key}.jpg", png(1))
            for suffix, content in parts.items():
                add(tar, f"folder/{key}.{suffix}", content.encode())
    entries = dict(data.shard_index(tmp_path / "0.tar")[0])
    found = {}
    for key, parts in entries.items():
        try:
            found[key] = data.read_captions(tmp_path / "0.tar", parts)
        except data.PictureError as error:
            found[key] = str(error)
    assert found["folder/a"] == data.Sample(["one", "two"])
    assert found["folder/b"] == data.Sample(["of json"])
    assert found["folder/c"] == data.Sample(["img 12"], "A dog. It runs.", "img 12")
    assert found["folder/d"] == data.Sample(["Long alone."], "Long alone.")
    assert "no caption" in found["folder/e"]  # as in WebDataset, a key ends at the first dot: "x.txt" is no caption


@pytest.mark.parametrize("options, message", [
    (dict(batch=7, world=2), "--batch 7: expected two or more, a multiple of the 2 processes"),
    (dict(batch=100), "larger than an epoch of 77 pictures"),
    (dict(world=3, batch=6, workers=4), "7 shards to train on, for 3 processes with 4 workers each"),
    (dict(batch=6, state=[{"processes": 2, "workers": 1, "shards": 7, "names": 0, "places": []}]),
     "was on 2 processes with 1 workers each and 7 shards; here are 1 processes with 2 workers each and 7 shards of o"),
])
def test_mistakes_get_one_line(pattern, tmp_path, options, message):
    with pytest.raises(data.UserError, match=message):
        data.ShardLoader(load(pattern, tmp_path), text_batch=texts, **{"workers": 2, **options})


def test_too_little_for_a_batch(pattern, tmp_path):
    loader = data.ShardLoader(load(pattern, tmp_path), 60, texts, workers=2)
    with pytest.raises(data.UserError, match="fewer good pictures than the 60 of its batch"):
        list(loader.stream(0, 3))


def test_shards_that_vanish_are_named(tmp_path):
    """As when the storage they lie on goes away: the reason is told, not the consequence alone."""
    pattern = write_shards(tmp_path / "shards", (4, 4, 4))
    loader = data.ShardLoader(load(pattern, tmp_path), 2, texts, workers=0)
    for path in (tmp_path / "shards").glob("*.tar"):
        path.unlink()
    data.shard_index.cache_clear()
    with pytest.raises(data.UserError, match="The first that is not good: .*00..tar: .*No such file"):
        list(loader.stream(0, 3))


def test_readers_can_be_sent_to_processes_that_share_nothing(pattern, tmp_path):
    """As on Windows and macOS, where worker processes start from nothing."""
    reader = data.ShardReader(load(pattern, tmp_path), 2, 0, 0, 1, 1, [data.Place(0, 0)], 0)
    again, collate = pickle.loads(pickle.dumps((reader, data.as_it_is)))
    one, two = (next(iter(each)) for each in (reader, again))
    assert (one[0] == two[0]).all() and collate(one) is one


def test_hidden_files_are_no_samples(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "._0.png", b"macOS")
        add(tar, "0.png", png(0))
        add(tar, "0.txt", b"number 0")
    assert [key for key, _ in data.shard_index(tmp_path / "0.tar")[0]] == ["0"]


def test_masks_and_leftovers_are_no_pictures(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.seg.png", "a.jpg", "._a.jpg"):
            add(tar, name, png(5 if name == "a.jpg" else 0))
        add(tar, "a.txt", b"a cat")
    found = {}
    for key, parts in data.shard_index(tmp_path / "0.tar")[0]:
        try:
            found[key] = data.read_shard_sample(tmp_path / "0.tar", parts, 16, "crop")[0][8, 8, 0]
        except data.PictureError as error:
            found[key] = str(error)
    assert found.pop("a") == 5 * 16 and all(isinstance(value, str) for value in found.values())


def test_the_last_shard_is_kept_apart_for_validation_and_test(pattern, tmp_path):
    numbers = {}
    for split in ("val", "test"):
        kept = data.load(pattern, split, 16, cache=tmp_path)
        numbers[split] = [int(sample.captions[0].split()[1]) for sample in kept.samples]
        assert [image[8, 8, 0] for image in kept.images] == [n % 16 * 16 for n in numbers[split]]
    assert sorted(numbers["val"] + numbers["test"]) == [*range(sum(SIZES), sum(SIZES) + 12)]
    assert len(numbers["val"]) == len(numbers["test"]) == 6


def test_a_run_on_shards_resumes_bit_for_bit(pattern, tmp_path, monkeypatch, capsys):
    flags = ["--model", "clip", "--data", pattern, "--config", "tiny", "--batch", "6", "--epochs", "1",
             "--samples", "24", "--precision", "fp32", "--workers", "2", "--cache", str(tmp_path / "cache")]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    asked, steps = train.Interrupt.asked, itertools.count(1)
    monkeypatch.setattr(train.Interrupt, "asked", lambda self, device: next(steps) == 3)
    with pytest.raises(SystemExit):
        train.main([*flags, "--out", str(tmp_path / "halves")])
    monkeypatch.setattr(train.Interrupt, "asked", asked)
    train.main(["--resume", str(tmp_path / "halves")])
    whole, halves = (torch.load(tmp_path / name / "last.pt", weights_only=True)["weights"]
                     for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    with pytest.raises(SystemExit, match="--samples is for shards"):
        train.main(["--data", "shapes", "--samples", "100", "--cache", str(tmp_path / "cache"), "--batch", "6"])
