"""train.py: the metrics by hand, resuming bit for bit, two processes against one, and each message for a mistake."""
import csv
import errno
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
import liteclip
import train

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """40 pictures of shapes as somebody's own data: a folder with captions.csv, 24 to train on, 8 and 8 to test."""
    folder = tmp_path_factory.mktemp("own")
    with open(folder / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        for i in range(40):
            scene = data.make_scene(f"test/{i}")
            Image.fromarray(data.draw(scene)).save(folder / f"{i}.png")
            for caption in data.captions(scene):
                writer.writerow([f"{i}.png", caption, ("train", "val", "test")[max(0, i - 24) // 8 + (i >= 24)]])
    return folder


def arguments(pictures, out, *more):
    return ["--data", str(pictures), "--config", "tiny", "--batch", "8", "--epochs", "3", "--precision", "fp32",
            "--cache", str(pictures / "cache"), "--out", str(out), *more]


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A whole run of three epochs, nine steps, that the tests below look at."""
    folder = tmp_path_factory.mktemp("run")
    train.main(arguments(pictures, folder))
    return folder


# --- metrics ---

class Table:
    """A model whose similarities are a given table: features are row and column numbers."""
    logit_scale = torch.zeros(())

    def __init__(self, table):
        self.table = torch.tensor(table)

    def similarity(self, rows, columns):
        return self.table[rows][:, columns]


def recall(table, owner, **options):
    model = Table(table)
    return train.retrieval(model, torch.arange(len(table)), torch.arange(len(owner)), torch.tensor(owner), **options)


def test_retrieval_by_hand():
    # Three images; captions 0 and 1 belong to image 0, 2 to image 1, 3 to image 2.
    result = recall([[0.1, 0.9, 0.5, 0.2],    # best: caption 1, its own                      -> found at 1
                     [0.0, 0.3, 0.4, 0.6],    # caption 3 before its own 2                    -> found at 2
                     [0.8, 0.7, 0.6, 0.5]],   # its own caption 3 comes last                  -> found at 4
                    [0, 0, 1, 2])
    # captions: 0 finds image 2, then its own; 1 its own; 2 finds images 2 and 0, then its own; 3 image 1, then its own
    assert result["i2t_r1"] == pytest.approx(100 / 3) and result["i2t_r5"] == pytest.approx(100)
    assert result["t2i_r1"] == pytest.approx(25) and result["t2i_r5"] == pytest.approx(100)


def test_retrieval_equals_a_slow_loop_and_chunks_change_nothing():
    generator = torch.Generator().manual_seed(0)
    owner = [i for i in range(30) for _ in range(1 + i % 4)]
    table = torch.rand(30, len(owner), generator=generator).tolist()
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


def test_a_model_that_cannot_tell_anything_apart_scores_zero():
    for value in (0.5, math.nan):
        result = recall([[value] * 40] * 20, [i // 2 for i in range(40)])
        assert result["i2t_r10"] == result["t2i_r10"] == 0


def test_zero_shot_by_hand():
    class Model(Table):
        def eval(self): pass
        def encode_image(self, images): return images[:, 0, 0, 0].long()
        def tokenize(self, prompts, tokenizer): return torch.tensor([int(p) for p in prompts])
        def encode_text(self, tokens): return tokens
    # two classes with two prompts each; class 0 wins by its mean for image 0 though class 1 has the best single prompt
    model = Model([[0.6, 0.6, 0.9, 0.0], [0.0, 0.1, 0.2, 0.3], [0.9, 0.9, 0.1, 0.1]])
    images = np.arange(3, dtype=np.uint8).repeat(3).reshape(3, 1, 1, 3)
    task = data.ZeroShot(images, np.array([0, 1, 1]), [["0", "1"], ["2", "3"]],
                         {"seen": np.array([True, True, False]), "unseen": np.array([False, False, True])})
    result = train.zero_shot(model, None, task, "fp32")
    assert result == {"zs_all": pytest.approx(200 / 3), "zs_seen": 100, "zs_unseen": 0}


# --- the parts of a run ---

def test_learning_rate_by_hand():
    rates = [train.learning_rate(step, 20, 1.0, 0.2) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[12] == pytest.approx(0.5) and 0 < rates[19] < 0.02
    assert train.learning_rate(0, 10, 1.0, 0.0) == 1.0
    assert max(train.learning_rate(step, n, 1.0, 0.1) for n in range(1, 40) for step in range(n)) <= 1.0


def test_no_decay_on_gains_biases_embeddings_and_the_scale():
    model = liteclip.LiteCLIP(liteclip.CONFIGS["tiny"])
    groups = train.make_optimizer(model, 0.1, image_lr=2.0).param_groups
    decayed, kept = ({id(p) for group in groups if bool(group["weight_decay"]) == decay for p in group["params"]}
                     for decay in (True, False))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = {names[p] for p in decayed}, {names[p] for p in kept}
    assert decayed == {name for name, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in name}
    faster = {names[id(p)] for group in groups if group["scale"] == 2 for p in group["params"]}
    assert faster == {name for name in decayed if name.startswith("image_encoder.")}
    assert {"logit_scale", "text_encoder.token_embedding.weight", "image_encoder.stem.0.bias"} <= kept


@pytest.mark.parametrize("device, capability, native, expected", [
    ("cuda", (9, 0), False, "bf16"), ("cuda", (7, 5), False, "fp16"), ("cpu", None, True, "bf16"),
    ("cpu", None, False, "fp32"), ("mps", None, False, "fp32")])
def test_precision_follows_the_device(monkeypatch, device, capability, native, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    assert train.pick_precision(SimpleNamespace(type=device)) == expected


def test_a_run_leaves_what_it_promises(run):
    assert {"last.pt", "best.pt", "log.csv", "retrieval.png"} == {path.name for path in run.iterdir()}
    rows = list(csv.DictReader(open(run / "log.csv")))
    assert [int(row["step"]) for row in rows] == [3, 6, 9] and all(row["i2t_r1"] for row in rows)
    assert math.isfinite(float(rows[-1]["loss"])) and float(rows[-1]["lr"]) < float(rows[0]["lr"])
    assert Image.open(run / "retrieval.png").size[0] > 400


def test_load_gives_all_that_is_needed(run, pictures):
    model, tokenizer, preprocess = train.load(run / "best.pt")
    assert not model.training and tokenizer.decode(tokenizer.encode("a red star")) == "a red star"
    image = preprocess(pictures / "0.png")
    assert image.dtype == torch.uint8 and image.shape == (3, 64, 64)
    assert (image.permute(1, 2, 0).numpy() == np.asarray(Image.open(pictures / "0.png"))).all()


def test_zero_shot_pipeline(run, pictures):
    pipeline = liteclip.ZeroShotPipeline(run / "best.pt")
    labels = ["a red star", "a blue circle", "a dark background"]
    predictions = pipeline.predict(pictures / "0.png", labels)
    assert sorted(label for label, _ in predictions) == sorted(labels)
    assert sum(p for _, p in predictions) == pytest.approx(1, abs=1e-5)
    cosines = pipeline.cosines(pictures / "0.png", labels)
    assert predictions[0][0] == labels[cosines.argmax()]
    assert len(pipeline.predict(pictures / "0.png", labels, top_k=1)) == 1
    with pytest.raises(ValueError, match="a list of two or more, got"):
        pipeline.predict(pictures / "0.png", ["a red star"])


# --- nothing lost ---

def stop_after(monkeypatch, step):
    """As if a signal came in that step."""
    steps = iter(range(1, 1000))
    monkeypatch.setattr(train.Interrupt, "asked", lambda self, device: next(steps) == step)


@pytest.mark.parametrize("step", [2, 3])  # in the middle of an epoch, and at its end
def test_resumed_equals_uninterrupted_bit_for_bit(run, pictures, tmp_path, monkeypatch, step, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments(pictures, tmp_path))
        assert stopped.value.code == 128 + signal.SIGTERM
    assert f"stopped after step {step} of 9; go on with: python train.py --resume {tmp_path}" in capsys.readouterr().out
    torch.manual_seed(123)
    train.main(["--resume", str(tmp_path)])
    assert_same_weights(weights(tmp_path / "last.pt"), weights(run / "last.pt"))
    assert [row["step"] for row in csv.DictReader(open(tmp_path / "log.csv")) if row["i2t_r1"]] == ["3", "6", "9"]


def test_sigterm_saves_and_resume_goes_on(pictures, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *arguments(pictures, tmp_path / "out"), "--epochs", "1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("epoch 2:"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 128 + signal.SIGTERM
    step = int(re.search(r"stopped after step (\d+) of 3000", rest)[1])
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"] == step >= 6


def test_a_full_disk_keeps_the_old_checkpoint(run, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    train.save(path, step=1)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    message = "No space left on device. The checkpoint that was there before is untouched"
    with pytest.raises(data.UserError, match=message):
        train.save(path, step=2)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_nan_stops_the_run_and_keeps_the_good_checkpoint(pictures, tmp_path, monkeypatch, capsys):
    forward, calls = liteclip.LiteCLIP.forward, iter(range(100))
    monkeypatch.setattr(liteclip.LiteCLIP, "forward", lambda self, **batch: {
        "loss": forward(self, **batch)["loss"] * (math.nan if next(calls) >= 4 else 1)})
    message = r"the loss is nan .* at step 6 \(learning rate .*, logit scale .*\): stopped; what was saved"
    with pytest.raises(SystemExit, match=message):
        train.main(arguments(pictures, tmp_path))
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert content["step"] == 3 and all(value.isfinite().all() for value in content["weights"].values())


def test_a_pickle_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    torch.save({"model": "liteclip", "config": {}, "tokenizer": {}, "weights": Evil()}, tmp_path / "x.pt")
    with pytest.raises(data.UserError, match="no checkpoint of train.py"):
        train.load(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


# --- the other models ---

def test_clip_trains_goes_on_and_is_evaluated_like_any_model(pictures, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main(arguments(pictures, whole, "--model", "clip", "--epochs", "1"))
    row = capsys.readouterr().out.splitlines()[-5]
    assert row.startswith(f"| clip tiny | {pictures} test |")
    train.main(["--eval", str(whole / "best.pt")])
    assert row.split("|")[3:5] == capsys.readouterr().out.splitlines()[-1].split("|")[3:5]
    model, tokenizer, _ = train.load(whole / "best.pt")
    assert isinstance(model, clip.CLIP) and model.config.end_id == tokenizer.end_id == 2

    forward, calls = clip.CLIP.forward, []

    def interrupted(self, **batch):  # during the second step
        if self.training and len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        calls.append(1)
        return forward(self, **batch)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(clip.CLIP, "forward", interrupted)
        train.main(arguments(pictures, parts, "--model", "clip", "--epochs", "1"))
    assert torch.load(parts / "last.pt", weights_only=True)["step"] == 2
    train.main(["--resume", str(parts)])
    assert_same_weights(weights(whole / "last.pt"), weights(parts / "last.pt"))


@pytest.fixture(scope="module")
def korean(tmp_path_factory):
    """Pictures with KoCLIP's own table: file_path and captions, as in its Korean COCO."""
    folder = tmp_path_factory.mktemp("korean")
    entries = []
    for i in range(24):
        scene = data.make_scene(f"korean/{i}")
        Image.fromarray(data.draw(scene)).save(folder / f"{i}.png")
        captions = data.captions(scene, "ko")
        entries.append({"file_path": f"{i}.png", "split": ("train", "val", "test")[i // 8],
                        "captions" if i % 2 else "caption_ko": captions})
    (folder / "coco_ko.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    return folder


def test_koclip_trains_on_korean_captions_in_its_own_form(korean, tmp_path, capsys):
    train.main(["--model", "koclip", "--config", "koclip-tiny", "--data", str(korean / "coco_ko.json"), "--batch", "8",
                "--epochs", "2", "--precision", "fp32", "--cache", str(tmp_path), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert f"| koclip koclip-tiny | {korean / 'coco_ko.json'} test |" in printed
    assert f'python clip.py {tmp_path}/out/best.pt PICTURE "이것은 강아지 이다." "이것은 고양이 이다."' in printed
    model, tokenizer, _ = train.load(tmp_path / "out" / "best.pt")
    assert isinstance(model, clip.KoCLIP) and model.config.pad_id == tokenizer.pad_id == 0
    assert tokenizer.decode(tokenizer.encode("빨간색 별")) == "빨간색 별"


def test_koclip_takes_korean_shapes_unless_told_otherwise():
    _, args = train.parse(["--model", "koclip"])
    train.choose(args)
    assert (args.config, args.data) == ("koclip-tiny", "shapes-ko")
    assert "빨간색" in " ".join(sum(data.load_zero_shot(args.data, 64).prompts, []))


@pytest.fixture(params=["clip/vit-b-32", "koclip/koclip-base"])
def small_release(request, tmp_path, monkeypatch):
    """The name of released weights, with a small model of ours in the place of the file that would be downloaded."""
    model, size = request.param.split("/")
    Model, fetched = train.MODELS[model], []
    tiny = next(config for key, config in train.home(Model).sizes(Model).items() if key.endswith("tiny"))
    monkeypatch.setitem(clip.CONFIGS, size, tiny)
    torch.save(Model(tiny).state_dict() | ({"input_resolution": torch.tensor(32)} if model == "clip" else {}),
               tmp_path / "source.pt")

    def fetch(files, cache):
        fetched.append(cache)
        return {"source": tmp_path / "source.pt", "vocab": files["vocab"][0]}
    monkeypatch.setattr(data, "fetch", fetch)
    tokenizer = data.BPE.train(["a red star"])
    monkeypatch.setattr(data, "read_vocabulary", lambda kind, path: tokenizer)
    monkeypatch.chdir(tmp_path)
    return request.param, fetched


def test_released_weights_load_by_name(small_release):
    name, fetched = small_release
    model, tokenizer, preprocess = train.load(name)
    assert isinstance(model, train.MODELS[name.split("/")[0]]) and not model.training and len(tokenizer) > 4
    assert fetched == ["data/cache"]


def test_released_weights_are_evaluated_and_searched_with(small_release, pictures, tmp_path, capsys):
    name, fetched = small_release
    train.main(["--eval", name, "--data", str(pictures), "--cache", str(tmp_path / "cache")])
    assert f"| {name.replace('/', ' ')} | {pictures} test |" in capsys.readouterr().out
    assert (tmp_path / "retrieval.png").exists() and fetched == [str(tmp_path / "cache")]
    train.main(["--search", name, str(pictures), "a red star", "--cache", str(tmp_path / "cache")])
    assert "40 pictures searched; contact sheet: search.png" in capsys.readouterr().out


def test_mistakes_with_released_weights_get_one_line(small_release, tmp_path):
    name, _ = small_release
    for words, message in ((["--resume", name], f"--resume {name}: released weights are no run"),
                           (["--eval", name, "--batch", "9"], f"--batch 9 does not go with {name}"),
                           (["--eval", "clip/koclip-base"], "clip/koclip-base: no such checkpoint; released weights go"),
                           (["--search", name, str(tmp_path), "x", "--lr", "1"], "--lr does not go with --search")):
        with pytest.raises(SystemExit, match=message):
            train.main(words)
    (tmp_path / "source.pt").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=f"train.py: {name}: .*source.pt is no checkpoint"):
        train.main(["--eval", name])


# --- image search ---

def search(pictures, *words, capsys, **options):
    train.main(["--search", *map(str, words), "--cache", str(pictures / "cache"),
                *(f"--{name}={value}" for name, value in options.items())])
    return capsys.readouterr()


def test_search_finds_what_similarity_says_and_encodes_a_folder_once(run, pictures, tmp_path, monkeypatch, capsys):
    out, query = tmp_path / "sheet", "a red star"
    printed = search(pictures, run / "best.pt", pictures, query, out=out, capsys=capsys).out.splitlines()
    assert printed[-1] == f"40 pictures searched; contact sheet: {out / 'search.png'}" and len(printed) == 13
    model, tokenizer, preprocess = train.load(run / "best.pt")
    with torch.no_grad():
        text = model.encode_text(model.tokenize([query], tokenizer))
        cosines = {str(path): (model.encode_image(preprocess(path)[None]) @ text.T).item()
                   for path in pictures.glob("*.png")}
    for line in printed[:-1]:
        score, path = line.split(maxsplit=1)
        assert float(score) == pytest.approx(cosines[path], abs=2e-2)  # features may have been made in bf16
    assert Image.open(out / "search.png").width > 4 * 180
    calls = []
    encode = liteclip.LiteCLIP.encode_image
    monkeypatch.setattr(liteclip.LiteCLIP, "encode_image", lambda self, images: calls.append(1) or encode(self, images))
    again = search(pictures, run / "best.pt", pictures, query, out=out, capsys=capsys).out.splitlines()
    assert again == printed and not calls


def test_a_sheet_in_the_folder_is_no_picture_of_it_and_any_folder_may_be_the_current_one(run, tmp_path, monkeypatch,
                                                                                       capsys):
    cache = tmp_path / "cache"
    (tmp_path / "album").mkdir()
    for i in range(3):
        Image.fromarray(data.draw(data.make_scene(f"album/{i}"))).save(tmp_path / "album" / f"{i}.png")
    for folder, where in (("album", tmp_path), (".", tmp_path / "album"), ("../album", tmp_path / "album")):
        monkeypatch.chdir(where)
        train.main(["--search", str(run / "best.pt"), folder, "a star", "--cache", str(cache), "--out",
                    str(tmp_path / "album")])
        assert "3 pictures searched" in capsys.readouterr().out
        assert len(list((cache / "features").iterdir())) == 1


def test_search_leaves_out_what_it_cannot_read_and_says_so(run, pictures, tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes((pictures / f"{i}.png").read_bytes())
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    printed = search(pictures, run / "best.pt", tmp_path, "별", out=tmp_path / "out", capsys=capsys).out
    assert "1 of 4 pictures cannot be read and are left out" in printed and "broken.jpg" in printed
    assert "3 pictures searched" in printed


def test_search_mistakes_get_one_line(run, pictures, tmp_path, capsys):
    for folder, message in ((tmp_path / "nowhere", "nowhere: no such folder"),
                            (tmp_path, "no picture that can be read")):
        with pytest.raises(SystemExit, match=message):
            search(pictures, run / "best.pt", folder, "a red star", capsys=capsys)
    with pytest.raises(SystemExit, match="nowhere.pt: no such checkpoint"):
        search(pictures, "nowhere.pt", pictures, "a red star", capsys=capsys)


# --- two processes ---

def torchrun(processes, *command, cwd):
    """--standalone lets the system choose a free port, so that no other run on this machine is in the way."""
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                             "--local-addr", "127.0.0.1", "--nproc_per_node", str(processes), *command],
                            capture_output=True, text=True, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def test_two_processes_train_like_one(run, pictures, tmp_path):
    result = torchrun(2, str(ROOT / "train.py"), *arguments(pictures, tmp_path / "out"), cwd=tmp_path)
    assert result.stdout.count("epoch 3:") == 1  # one process talks
    one, two = weights(run / "last.pt"), weights(tmp_path / "out" / "last.pt")
    start = liteclip_at_birth(run)
    for name in one:  # Adam divides by tiny gradients, so compare with how far training moved
        moved = (one[name] - start[name]).norm()
        if not name.endswith("key.bias"):  # its gradient is zero but for rounding
            assert (one[name] - two[name]).norm() <= 2e-2 * moved + 1e-6, name


def liteclip_at_birth(run):
    content = torch.load(run / "last.pt", weights_only=True)
    torch.manual_seed(0)
    return liteclip.LiteCLIP(liteclip.Config(**content["config"])).state_dict()


# --- messages ---

@pytest.mark.parametrize("more, message", [
    (["--model", "clop"], "--model clop: unknown; known: clip, koclip, liteclip"),
    (["--config", "huge"], "--config huge: liteclip has no such configuration; known: liteclip, small, tiny"),
    (["--data", "flickr9k"], "--data flickr9k: neither a data set (shapes, shapes-ko, flickr8k"),
    (["--batch", "1"], "--batch 1: a batch must be >= 2 (1 leaves no negatives)"),
    (["--batch", "25"], "--batch 25 is larger than the 24 pictures"),
    (["--warmup", "1.5"], "--warmup 1.5: a fraction of the run"),
    (["--epochs", "0"], "--epochs 0.0: expected a number above zero"),
    (["--lr", "nan"], "--lr nan: expected a number above zero"),
    (["--weight-decay", "-1"], "--weight-decay -1.0: expected zero or more"),
    (["--seed", "-1"], "--seed -1: expected 0 to 2147483647"),
    (["--precision", "fp16"], "--precision fp16 needs a GPU"),
    (["--root", "nowhere", "--data", "flickr8k"], "--root nowhere: no such folder"),
    (["--resume", "nowhere"], "nowhere: no such checkpoint"),
    (["--eval", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
    (["--epochs", "1e308"], "--epochs 1e+308: expected a number above zero (and below a billion)"),
    (["--resume", ""], "--resume is empty: a variable of the shell"),
    (["--data", ""], "--data is empty"),
])
def test_mistakes_get_one_line(pictures, tmp_path, more, message, capsys):
    with pytest.raises(SystemExit) as error:
        train.main(arguments(pictures, tmp_path / "out", *more))
    assert str(error.value).startswith("train.py: ") and message in str(error.value) and "\n" not in str(error.value)


def test_a_run_is_never_overwritten(run, pictures):
    before = (run / "last.pt").read_bytes()
    with pytest.raises(SystemExit, match="holds a run already: go on with --resume"):
        train.main(arguments(pictures, run))
    with pytest.raises(SystemExit, match="is the end of its run: 9 steps of 9"):
        train.main(["--resume", str(run)])
    with pytest.raises(SystemExit, match="--batch 4 does not go with .*last.pt, where it is 8"):
        train.main(["--resume", str(run), "--batch", "4"])
    assert (run / "last.pt").read_bytes() == before


def test_a_folder_stands_for_its_checkpoint(run, tmp_path, capsys):
    train.main(["--eval", str(run)])
    assert "| liteclip tiny |" in capsys.readouterr().out
    for flag, name in (("--eval", "best.pt"), ("--resume", "last.pt")):
        with pytest.raises(SystemExit, match=f"no {name} in .*: no epoch of a run was finished there"):
            train.main([flag, str(tmp_path)])


def test_an_evaluation_on_other_data_forgets_where_the_first_lay(run, pictures, tmp_path):
    content = torch.load(run / "best.pt", weights_only=True)
    content["args"] |= {"data": "flickr8k", "root": "somewhere"}
    torch.save(content, tmp_path / "best.pt")
    assert train.settle(["--eval", str(tmp_path)]).root == "somewhere"
    assert train.settle(["--eval", str(tmp_path), "--data", str(pictures)]).root is None
    assert train.settle(["--eval", str(tmp_path), "--data", "flickr30k", "--root", "there"]).root == "there"


def test_without_test_pictures_the_figures_are_the_validations(pictures, tmp_path, capsys):
    table = (pictures / "captions.csv").read_text().splitlines()
    kept = [line.replace(",test", ",train") for line in table]
    kept = [kept[0], *(str(pictures / line) for line in kept[1:])]
    (tmp_path / "mine.csv").write_text("\n".join(kept))
    train.main(arguments(tmp_path / "mine.csv", tmp_path / "out", "--epochs", "0.5", "--cache", str(tmp_path / "cache")))
    printed = capsys.readouterr().out
    assert "no picture belongs to the split 'test'; the figures are those of its validation split" in printed
    assert "mine.csv val |" in printed and (tmp_path / "out" / "retrieval.png").exists()


def test_two_runs_without_out_never_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = SimpleNamespace(out=None, model="liteclip", data="shapes")
    folders = [str(train.make_folder(args)) for _ in range(3)]
    assert folders == ["runs/liteclip-shapes", "runs/liteclip-shapes-2", "runs/liteclip-shapes-3"]


def test_an_unwritable_folder(pictures, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot make .*: Not a directory; name another folder with --out"):
        train.main(arguments(pictures, tmp_path / "file" / "out"))


def test_no_traceback_from_the_command_line(tmp_path):
    messages = {"train.py --model clop": "train.py: --model clop: unknown",
                "liteclip.py nowhere.pt x.jpg a b": "liteclip.py: nowhere.pt: no such checkpoint",
                "liteclip.py nowhere.pt": "usage: python liteclip.py CHECKPOINT IMAGE"}
    running = {}
    for command in messages:  # all at once: most of their time they spend on starting
        script, *rest = shlex.split(command)
        running[command] = subprocess.Popen([sys.executable, str(ROOT / script), *rest], stderr=subprocess.PIPE, text=True,
                                            cwd=tmp_path)
    for command, process in running.items():
        said = process.communicate()[1]
        assert process.returncode == 1 and said.startswith(messages[command]) and said.count("\n") == 1


def test_a_missing_download_names_scratch(monkeypatch, pictures, tmp_path):
    def unreachable(url, path, **checks):
        raise data.UserError(f"cannot download {url}: no network")
    monkeypatch.setattr(data, "download", unreachable)
    with pytest.raises(SystemExit, match="cannot download .*; or train from random weights with --scratch"):
        train.main(["--data", str(pictures), "--config", "liteclip", "--cache", str(tmp_path),
                    "--out", str(tmp_path / "out")])


# --- every model ---

@pytest.mark.parametrize("name", ["clip", "prolip", "llip", "clips"])
def test_a_model_trains_resumes_and_is_used(name, pictures, tmp_path, monkeypatch, capsys):
    """From the first step to the last: what a run needs of a model, for the models that have no such test of their own."""
    monkeypatch.chdir(tmp_path)
    flags = arguments(pictures, tmp_path / "whole", "--model", name)
    flags[flags.index("--epochs") + 1] = "2"
    train.main(flags)
    printed = capsys.readouterr().out
    Model = train.MODELS[name]
    rows = list(csv.DictReader(open(tmp_path / "whole" / "log.csv")))
    terms = [float(rows[-1][term]) for term in getattr(Model, "terms", ())]
    assert not terms or sum(terms) == pytest.approx(float(rows[-1]["loss"]), rel=1e-4)
    assert f"| {name} tiny | " in printed and "a model that tells nothing apart has a contrastive loss of" in printed
    command = re.search(rf'use it:   python ({name}.py \S+) PICTURE "(.*)" "(.*)"', printed)

    flags[flags.index(str(tmp_path / "whole"))] = str(tmp_path / "halves")
    stop_after(monkeypatch, 4)  # in the middle of the second epoch
    with pytest.raises(SystemExit) as stopped:
        train.main(flags)
    assert stopped.value.code == 128 + signal.SIGTERM
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", str(tmp_path / "halves")])
    assert_same_weights(weights(tmp_path / "whole" / "last.pt"), weights(tmp_path / "halves" / "last.pt"))

    capsys.readouterr()
    train.main(["--eval", "whole/best.pt"])
    assert f"| {name} tiny | " in capsys.readouterr().out
    train.main(["--search", "whole/best.pt", str(pictures), "a red star", "--cache", str(tmp_path / "cache")])
    first = capsys.readouterr().out.splitlines()[0]
    train.main(["--search", "whole/best.pt", str(pictures), "a red star", "--cache", str(tmp_path / "cache")])
    assert capsys.readouterr().out.splitlines()[0] == first  # with the features that were kept
    script, checkpoint = command[1].split()
    labels = command.group(2, 3)
    result = subprocess.run([sys.executable, str(ROOT / script), checkpoint, str(pictures / "0.png"), *labels],
                            capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    shares = [float(share) for share in re.findall(r"(\d+\.\d)%", result.stdout)]
    assert sum(shares) == pytest.approx(100, abs=0.2) and all(label in result.stdout for label in labels)
