"""evaluate.py: figures by hand and against slow loops, sheets of pictures, image search, `load`, and mistakes."""
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
import evaluate
import liteclip
import shapes
from test_train import content, mistake, pictures, printed, run, small  # noqa: F401, fixtures


class Table:
    """A model whose similarities are a given table: features are row and column numbers."""
    logit_scale = torch.zeros(())

    def __init__(self, table):
        self.table = torch.as_tensor(table)

    def similarity(self, rows, columns):
        return self.table[rows][:, columns]

    def eval(self):
        pass

    def encode_image(self, images):
        return images[:, 0, 0, 0].long()

    def tokenize(self, prompts, tokenizer):
        return torch.tensor([int(prompt) for prompt in prompts])

    def encode_text(self, tokens):
        return tokens


def recall(table, owner, **options):
    features = torch.arange(len(table)), torch.arange(len(owner)), torch.tensor(owner)
    return evaluate.retrieval(Table(table), *features, **options)


# --- figures ---

def test_retrieval_by_hand():
    # Three images; captions 0 and 1 belong to image 0, 2 to image 1, 3 to image 2.
    result = recall([[0.1, 0.9, 0.5, 0.2],    # best: caption 1, its own                      -> found at 1
                     [0.0, 0.3, 0.4, 0.6],    # caption 3 before its own 2                    -> found at 2
                     [0.8, 0.7, 0.6, 0.5]],   # its own caption 3 comes last                  -> found at 4
                    [0, 0, 1, 2])
    # captions: 0 finds image 2, then its own; 1 its own; 2 finds images 2 and 0, then its own; 3 image 1, then its own
    assert result == pytest.approx({"i2t_r1": 100 / 3, "i2t_r5": 100, "i2t_r10": 100,
                                    "t2i_r1": 25, "t2i_r5": 100, "t2i_r10": 100})


def test_retrieval_equals_a_slow_loop_and_chunks_change_nothing():
    owner = [i for i in range(30) for _ in range(1 + i % 4)]
    table = torch.rand(30, len(owner), generator=torch.Generator().manual_seed(0)).tolist()
    for i, t in zip(owner[::2], range(0, len(owner), 2)):
        table[i][t] += 0.4
    slow = {}
    for k in (1, 5, 10):
        slow[f"i2t_r{k}"] = 100 * np.mean([
            any(owner[t] == i for t in sorted(range(len(owner)), key=lambda t: -table[i][t])[:k]) for i in range(30)])
        slow[f"t2i_r{k}"] = 100 * np.mean([
            owner[t] in sorted(range(30), key=lambda i: -table[i][t])[:k] for t in range(len(owner))])
    assert recall(table, owner) == pytest.approx(slow, rel=1e-5)
    assert recall(table, owner, chunk=7) == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize("wrong", [0.5, math.nan])
def test_a_tie_with_a_wrong_one_counts_against_it_and_so_does_nan(wrong):
    """But not a tie of two captions of the same image. A model that cannot tell anything apart scores zero."""
    assert recall([[0.5, 0.5, 0.1], [0.1, 0.1, 0.5]], [0, 0, 1])["i2t_r1"] == 100
    result = recall([[0.5, 0.5, wrong], [0.1, 0.1, 0.5]], [0, 0, 1])  # image 0 and caption 2 are no longer sure
    assert (result["i2t_r1"], result["i2t_r5"]) == (50, 100)
    assert (result["t2i_r1"], result["t2i_r5"]) == (pytest.approx(200 / 3), 100)
    assert set(recall([[wrong] * 40] * 20, [i // 2 for i in range(40)]).values()) == {0}


@pytest.mark.parametrize("method", ["similarity", "classify"])
def test_zero_shot_by_hand(method):
    """Two classes, two prompts each; class 0 wins image 0 by its mean, though class 1 has the best single prompt."""
    model = Table([[0.6, 0.6, 0.9, 0.0], [0.0, 0.1, 0.2, 0.3], [0.9, 0.9, 0.1, 0.1]])
    if method == "classify":  # ProLIP's, which goes before `similarity`
        model.classify, model.similarity = model.similarity, None
    images = np.arange(3, dtype=np.uint8).repeat(3).reshape(3, 1, 1, 3)
    task = shapes.ZeroShot(images, np.array([0, 1, 1]), [["0", "1"], ["2", "3"]],
                           {"seen": np.array([True, True, False]), "unseen": np.array([False, False, True])})
    result = evaluate.zero_shot(model, None, task, "fp32")
    assert result == {"zs_all": pytest.approx(200 / 3), "zs_seen": 100, "zs_unseen": 0}


def test_features_of_a_split_are_those_of_its_pictures_and_captions_one_by_one(run, pictures):
    model, tokenizer, prepare = evaluate.load(str(run.folder))
    split = data.load(pictures, "test", model.config.image_size, cache=pictures / "cache")
    image_features, text_features, owner = evaluate.encode_split(model, tokenizer, split, "fp32")
    assert owner.tolist() == [i for i in range(6) for _ in range(5)]
    for t, (i, caption) in enumerate((i, caption) for i in range(3, 24, 4)  # every fourth picture is in the test split
                                     for caption in shapes.captions(shapes.make_scene(f"test/{i}"))):
        with torch.no_grad():
            image, text = prepare(pictures / f"{i}.png")[None], model.tokenize(caption, tokenizer)
            torch.testing.assert_close(image_features[owner[t]], model.encode_image(image)[0])
            torch.testing.assert_close(text_features[t], model.encode_text(text)[0])


# --- an evaluation and its picture ---

def test_other_data_leave_the_picture_of_the_run_as_it_is(run, pictures, tmp_path):
    """And where the run's own data lay says nothing of where the others are."""
    saved = content(run.folder / "best.pt")
    torch.save({**saved, "args": {**saved["args"], "root": "somewhere"}}, tmp_path / "best.pt")
    (tmp_path / "retrieval.png").write_bytes(b"the run's")
    header, *lines = (pictures / "captions.csv").read_text().replace(",test", ",train").splitlines()
    (tmp_path / "other.csv").write_text("\n".join([header, *(f"{pictures}/{line}" for line in lines)]))
    said = printed(evaluate.main, tmp_path, "--data", tmp_path / "other.csv", "--cache", tmp_path / "cache")
    assert re.search("no picture belongs to the split 'test'; .*validation split", said)
    assert f"| liteclip tiny | {tmp_path}/other.csv val |" in said
    assert (tmp_path / "retrieval.png").read_bytes() == b"the run's"
    assert Image.open(tmp_path / "retrieval-other.png").width > 400
    assert "--data coco needs --root" in mistake(evaluate.main, tmp_path, "--data", "coco")


def test_precision_and_the_folder_of_the_picture_are_as_asked(run, pictures, tmp_path, monkeypatch):
    seen, encode = set(), liteclip.LiteCLIP.encode_image
    monkeypatch.setattr(liteclip.LiteCLIP, "encode_image",
                        lambda self, images: seen.add(torch.is_autocast_enabled("cpu")) or encode(self, images))
    words = [run.folder / "last.pt", "--precision", "bf16", "--cache", pictures / "cache", "--out"]
    said = printed(evaluate.main, *words, tmp_path / "new")
    assert (tmp_path / "new" / "retrieval.png").exists() and seen == {True}
    (tmp_path / "taken" / "retrieval.png").mkdir(parents=True)  # a picture that cannot be written loses no figures
    assert printed(evaluate.main, *words, tmp_path / "taken").splitlines()[-1] == said.splitlines()[-1]


def test_the_sheet_shows_the_five_most_similar_and_frames_the_right_one(tmp_path):
    images = np.stack([np.full((8, 8, 3), (40 * i, 255 - 40 * i, 7), np.uint8) for i in range(6)])
    split = data.Split("here", images, [data.Sample([f"{i}", f"number {i}"]) for i in range(6)], augment=False)
    owner = torch.arange(6).repeat_interleave(2)
    table = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    table[owner, torch.arange(12)] += 0.4  # its own image is among the five
    features = torch.arange(6), torch.arange(12), owner
    evaluate.draw_retrieval(tmp_path / "sheet.png", Table(table), split, images, features)
    pixel = Image.open(tmp_path / "sheet.png").getpixel
    for i, y in enumerate(range(120, 6 * 202, 202)):  # through the middles of the pictures
        best = sorted(range(6), key=lambda k: -table[k, 2 * i + 1])[:5]  # for the longer caption
        assert [pixel((x, y)) for x in range(76, 700, 140)] == [tuple(images[k, 0, 0].tolist()) for k in best]
        assert [pixel((x, y)) == (30, 160, 60) for x in range(10, 600, 140)] == [k == i for k in best]


# --- image search ---

@pytest.fixture
def album(pictures, tmp_path, monkeypatch):
    """A folder in the current one, with 13 pictures and a broken one."""
    (tmp_path / "album" / "more").mkdir(parents=True)
    for i in range(13):
        (tmp_path / "album" / ("more" if i % 3 else "") / f"{i}.png").write_bytes((pictures / f"{i}.png").read_bytes())
    (tmp_path / "album" / "broken.jpg").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    return Path("album")


def search(run, folder, *more):
    words = [run.folder, "--search", folder, "a red star", "--precision", "fp32", *more]
    return printed(evaluate.main, *words).splitlines()


def test_search_finds_the_most_similar_and_shows_them(run, album):
    first, *found, last = search(run, album, "--out", "sheet")
    assert "1 of 14 pictures cannot be read and are left out: album/broken.jpg: " in first
    assert last == "13 pictures searched; contact sheet: sheet/search.png"
    model, tokenizer, prepare = evaluate.load(str(run.folder / "best.pt"))
    with torch.no_grad():
        text = model.encode_text(model.tokenize("a red star", tokenizer))
        images = {str(path): model.encode_image(prepare(path)[None]) for path in album.rglob("*.png")}
    cosines = {path: (image @ text.T).item() for path, image in images.items()}
    best = sorted(cosines, key=lambda path: -cosines[path])[:12]
    assert found == [f"{cosines[path]:+.3f}  {path}" for path in best]
    assert Image.open("sheet/search.png").width > 4 * 180 and Image.open("sheet/search.png").height > 3 * 180


def test_a_folder_is_encoded_once_until_something_changes(run, album, monkeypatch):
    seen, encode = [], liteclip.LiteCLIP.encode_image
    monkeypatch.setattr(liteclip.LiteCLIP, "encode_image",
                        lambda self, images: seen.append(len(images)) or encode(self, images))
    first = search(run, album, "--cache", "cache")
    assert search(run, album, "--cache", "cache") == first[1:] and seen == [13]  # without a word about the broken one
    monkeypatch.chdir(album)
    for folder in ("../album", ".", "."):  # the same by other names; and its own sheet is no picture of it
        assert "13 pictures searched" in search(run, folder, "--cache", "../cache", "--out", ".")[-1] and seen == [13]
    os.replace("0.png", "new.png")
    search(run, ".", "--cache", "../cache")
    assert seen == [13, 13] and len([*Path("../cache/features").iterdir()]) == 1


# --- load ---

def test_load_takes_a_file_or_a_folder(run, pictures):
    for source, file in (("", "best.pt"), ("best.pt", "best.pt"), ("last.pt", "last.pt")):
        model, tokenizer, prepare = evaluate.load(str(run.folder / source))
        assert isinstance(model, liteclip.LiteCLIP) and not model.training
        torch.testing.assert_close(model.state_dict(), content(run.folder / file)["weights"], rtol=0, atol=0)
        assert tokenizer.decode(tokenizer.encode("a red star")) == "a red star"
        pixels = prepare(pictures / "0.png").permute(1, 2, 0).numpy()
        assert (pixels == np.asarray(Image.open(pictures / "0.png"))).all()


def test_published_weights_are_loaded_evaluated_and_searched_with_by_name(pictures, tmp_path, monkeypatch):
    """KoCLIP, with a small model and vocabulary in place of what would be downloaded."""
    letters = "abcdefghijklmnopqrstuvwxyz빨간색별"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    monkeypatch.setitem(clip.CONFIGS, "koclip-base", replace(clip.CONFIGS["koclip-tiny"], vocab_size=len(vocabulary)))
    state = clip.CLIP(clip.CONFIGS["koclip-base"]).state_dict()

    def download(url, path, **checks):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path) if url.endswith(".bin") else Path(path).write_bytes("\n".join(vocabulary).encode())
        return path
    monkeypatch.setattr(data, "download", download)
    monkeypatch.chdir(tmp_path)
    model, tokenizer, _ = evaluate.load("koclip/koclip-base")
    assert isinstance(model, clip.CLIP) and not model.training and len(tokenizer.encode("빨간색 별")) == 4
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    said = printed(evaluate.main, "koclip/koclip-base", "--data", pictures)
    assert f"| koclip koclip-base | {pictures} test |" in said and Path(f"retrieval-{pictures.name}.png").exists()
    said = printed(evaluate.main, "koclip/koclip-base", "--search", pictures, "빨간색 별")
    assert "24 pictures searched; contact sheet: search.png" in said
    monkeypatch.setattr(data, "download", lambda url, path, **checks: Path(path).write_bytes(b"damaged") and path)
    assert "koclip-base" in mistake(evaluate.main, "koclip/koclip-base", "--data", pictures)


# --- mistakes ---

def test_a_mistake_gets_one_line(run, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    torch.save({**content(run.folder / "best.pt"), "model": "clop"}, "model.pt")
    of_run = str(run.folder)
    said = {
        (): "the following arguments are required: checkpoint",
        ("nowhere",): "nowhere: no such checkpoint; published weights go by name: clip/vit-b-32, ",
        ("clip/koclip-base",): "clip/koclip-base: no such checkpoint; published weights go by name: ",
        ("empty",): "empty/best.pt: no such checkpoint",
        (f"{pictures}/0.png",): "0.png is no checkpoint of train.py",
        ("model.pt",): "model.pt holds a model 'clop'; known: clip, koclip, ",
        (of_run, "--data", "nowhere"): r"--data nowhere: neither a data set \(",
        (of_run, "--out", "model.pt"): "File exists",
        (of_run, "--precision", "fp16"): "--precision fp16 needs a GPU",
        (of_run, "--search", "nowhere", "a star"): "nowhere: expected a folder of pictures",
        (of_run, "--search", "empty", "a star"): "no picture that can be read",
        (of_run, "--search", "empty"): "argument --search: expected 2 arguments"}
    found = {words: mistake(evaluate.main, *words) for words in said}
    assert {words: line for words, line in found.items() if not re.search(said[words], line)} == {}
