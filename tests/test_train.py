"""train.py: a run from its first step to its figures, what must not be lost on the way, settings, and mistakes."""
import contextlib
import csv
import functools
import io
import itertools
import math
import os
import re
import runpy
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data
import evaluate
import liteclip
import shapes
import train

ROOT = Path(train.__file__).parent
LESS = dict(dims=(16, 16, 16, 32), image_width=64, image_mlp=64, text_width=32, text_mlp=64, embed_dim=32, dropout=0.3)


def make_small(patch):
    """On the CPU, with tiny sizes that are several times smaller, and with dropout where a model has any."""
    patch.setattr(data, "best_device", lambda: torch.device("cpu"))
    patch.setattr(torch.cuda, "is_available", lambda: False)
    for name in train.MODELS:
        configs, size = train.home(name).CONFIGS, "koclip-tiny" if name == "koclip" else "tiny"
        less = {key: value for key, value in LESS.items() if hasattr(configs[size], key)}
        patch.setitem(configs, size, replace(configs[size], **less))


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 pictures of shapes as somebody's own data: a folder with captions.csv, 12 to train on, 6 and 6 to test."""
    folder = tmp_path_factory.mktemp("own")
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerow(["image", "caption", "split"])
        for i in range(24):
            scene = shapes.make_scene(f"test/{i}")
            Image.fromarray(shapes.draw(scene)).save(folder / f"{i}.png")
            csv.writer(file).writerows([f"{i}.png", caption, ("train", "train", "val", "test")[i % 4]]
                                       for caption in shapes.captions(scene))
    return folder


def arguments(pictures, out, *more):
    """Six steps, three an epoch."""
    return ["--data", str(pictures), "--config", "tiny", "--batch", "4", "--epochs", "2", "--precision", "fp32",
            "--cache", str(pictures / "cache"), "--out", str(out), *map(str, more)]


def printed(main, *words):
    """What a command prints, called in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([*map(str, words)])
    return out.getvalue()


def mistake(main, *words):
    """The one line that a mistake gets; of argparse's, the last."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as end:
        main([*map(str, words)])
    said = end.value.code if end.value.code != 2 else err.getvalue().splitlines()[-1]
    assert "\n" not in said
    return said


def with_signal(patch, step, number, rank=0):
    """Let a signal come in that step of a run, in one of its processes."""
    rate = train.learning_rate
    patch.setattr(train, "learning_rate", lambda done, *rest: (
        signal.raise_signal(number) if (done, train.rank()) == (step - 1, rank) else None, rate(done, *rest))[1])


def stopped(argv, step, number=signal.SIGTERM):
    """Run until that step, in which a signal comes."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        with_signal(patch, step, number)
        train.main([*map(str, argv)])
    assert end.value.code == 128 + number


def content(path):
    return torch.load(path, weights_only=True)


def assert_same(folder, other):
    """The last checkpoints of two runs, to the bit."""
    a, b = content(folder / "last.pt"), content(other / "last.pt")
    assert all(a[key] == b[key] for key in ("step", "config", "tokenizer", "images"))
    torch.testing.assert_close(a["weights"], b["weights"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)


def log(folder):
    """The rows of log.csv without what depends on the clock."""
    with open(folder / "log.csv") as file:
        return [{key: value for key, value in row.items() if key not in ("images_per_s", "wait")}
                for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A whole run that the tests look at: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    return SimpleNamespace(folder=folder, printed=printed(train.main, *arguments(pictures, folder)))


# --- a run ---

def test_a_run_leaves_its_checkpoints_its_log_and_a_picture(run, pictures):
    assert {path.name for path in run.folder.iterdir()} == {"last.pt", "best.pt", "log.csv", "retrieval.png"}
    rows = log(run.folder)
    assert [(row["step"], row["epoch"], row["samples"]) for row in rows] == [("3", "1", "12"), ("6", "2", "24")]
    peak = liteclip.RECIPES["tiny"]["lr"]  # a tenth of six steps is one, and five come after it
    assert [float(row["lr"]) for row in rows] == [
        pytest.approx(peak * (1 + math.cos(math.pi * done / 5)) / 2, rel=1e-5) for done in (1, 4)]
    for group in content(run.folder / "last.pt")["optimizer"]["param_groups"]:
        assert group["lr"] == pytest.approx(float(rows[-1]["lr"]) * group["scale"], rel=1e-5)
    means = [float(row["i2t_r1"]) + float(row["t2i_r1"]) for row in rows]
    best = content(run.folder / "best.pt")
    assert best["step"] == (6 if means[1] > means[0] else 3) and best["best"] == pytest.approx(max(means) / 2, rel=1e-5)
    assert f"liteclip tiny on {pictures}: cpu" in run.printed and "loss of 1.39" in run.printed  # ln 4


def test_the_figures_that_are_printed_and_logged_are_those_of_the_checkpoints(run, pictures):
    row = next(line for line in run.printed.splitlines() if line.startswith(f"| liteclip tiny | {pictures} test |"))
    assert row in printed(evaluate.main, run.folder, "--cache", pictures / "cache", "--precision", "fp32")
    model, tokenizer, _ = liteclip.load(str(run.folder / "last.pt"))
    validation = data.load(pictures, "val", model.config.image_size, cache=pictures / "cache")
    scores, _ = evaluate.evaluate(model, tokenizer, validation, None, "fp32")
    assert {key: float(log(run.folder)[-1][key]) for key in scores} == pytest.approx(scores, rel=1e-5)


@pytest.mark.parametrize("name", train.MODELS)
def test_every_model_trains_resumes_and_is_used(name, pictures, tmp_path, monkeypatch):
    """KoCLIP on generated pictures in Korean, with a zero-shot task; the others on somebody's own."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        monkeypatch.setitem(shapes.COUNTS, split, count)
    monkeypatch.setattr(shapes, "zero_shot", functools.partial(shapes.zero_shot, each=1))
    korean, query = name == "koclip", "빨간색 별" if name == "koclip" else "a red star"
    flags = ["--model", name, *arguments(pictures, "whole", "--cache", "cache")]
    flags += ["--data", "shapes-ko", "--config", "koclip-tiny"] if korean else []
    said = printed(train.main, *flags)
    row = log(Path("whole"))[-1]
    terms = [*row][4:[*row].index("lr")]  # which the loss is the sum of
    assert len(terms) == {"clips": 2, "prolip": 5}.get(name, 0)
    assert not terms or sum(float(row[term]) for term in terms) == pytest.approx(float(row["loss"]), rel=1e-4)
    assert bool(row["zs_all"]) == korean == ("zero-shot seen / unseen / all" in said)
    assert f"\n| {name} {'koclip-' if korean else ''}tiny | " in said

    stopped([word if word != "whole" else "halves" for word in flags], 5)  # in the middle of the second epoch
    train.main(["--resume", "halves"])
    assert_same(Path("whole"), Path("halves"))

    search = ["whole", "--search", pictures, query, "--cache", "cache"]
    found = printed(evaluate.main, *search)
    assert "24 pictures searched" in found and printed(evaluate.main, *search) == found  # with features that were kept
    _, script, checkpoint, _, *labels = shlex.split(re.search("use it: .*", said)[0].removeprefix("use it:"))
    monkeypatch.setattr(sys, "argv", [script, checkpoint, str(pictures / "0.png"), *labels])
    shown = printed(lambda argv: runpy.run_path(str(ROOT / script), run_name="__main__"))
    shares = [float(re.search(rf"(\d+\.\d)%.*{label}", shown)[1]) for label in labels]
    assert sum(shares) == pytest.approx(100, abs=0.2) and len(shares) == 2


# --- nothing is lost ---

@pytest.mark.parametrize("step, number", [(2, signal.SIGTERM), (3, signal.SIGINT)])  # amid an epoch, and at its end
def test_a_signal_saves_and_resumed_equals_uninterrupted_bit_for_bit(run, pictures, tmp_path, step, number, capsys):
    stopped(arguments(pictures, tmp_path), step, number)
    assert f"stopped after step {step} of 6; go on with: python train.py --resume {tmp_path}" in capsys.readouterr().out
    with open(tmp_path / "log.csv", "a") as file:
        file.write("5,1.5,20,0.1\n")  # as if it had gone on and been killed before the next checkpoint
    torch.manual_seed(123)
    train.main(["--resume", str(tmp_path)])
    assert f"goes on after step {step} of 6" in capsys.readouterr().out
    assert_same(tmp_path, run.folder)
    assert [row for row in log(tmp_path) if row["step"] != "2"] == log(run.folder)
    assert [row["step"] for row in log(tmp_path)] == (["2"] if step == 2 else []) + ["3", "6"]


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with train.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_same_command_begins_a_run_goes_on_and_says_when_it_ended(run, pictures, tmp_path):
    """--resume RUN, as torchrun --max-restarts and SLURM start it again, with all of its settings."""
    command = arguments(pictures, tmp_path / "new")
    command[command.index("--out")] = "--resume"
    stopped(command, 4)
    saved = content(tmp_path / "new" / "last.pt")
    torch.save({**saved, "best": 101.0}, tmp_path / "new" / "last.pt")
    train.main(command)
    assert_same(tmp_path / "new", run.folder)
    assert content(tmp_path / "new" / "best.pt")["step"] == 3  # since nothing was better afterwards
    assert "is the end of its run, 6 steps; nothing to resume" in mistake(train.main, *command)


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run_can_go_on(run, pictures, tmp_path):
    resource = pytest.importorskip("resource")
    stopped(arguments(pictures, tmp_path), 3)
    before, limits = (tmp_path / "last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # no file may become larger than that
    try:
        said = mistake(train.main, "--resume", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.match("train.py: cannot write .*t.pt: .*The checkpoint that was there before is untouched", said)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt", "log.csv"]
    train.main(["--resume", str(tmp_path)])
    assert_same(tmp_path, run.folder)


def test_nan_stops_the_run_and_keeps_the_good_checkpoint(pictures, tmp_path, monkeypatch):
    loss, calls = liteclip.LiteCLIP.loss, itertools.count(1)
    monkeypatch.setattr(liteclip.LiteCLIP, "loss", lambda self, **features: {
        "loss": loss(self, **features)["loss"] * (math.nan if next(calls) == 5 else 1)})
    said = mistake(train.main, *arguments(pictures, tmp_path))
    assert re.search("the loss is nan .* at step 6 .*: stopped; ", said)
    saved = content(tmp_path / "last.pt")
    assert saved["step"] == 3 and all(value.isfinite().all() for value in saved["weights"].values())


def test_a_pickle_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    for name in ("last.pt", "best.pt"):
        torch.save({"model": "liteclip", "config": {}, "tokenizer": {}, "weights": Evil(), "args": {}}, tmp_path / name)
    for main, *words in ((train.main, "--resume", tmp_path), (evaluate.main, tmp_path)):
        assert ".pt is no checkpoint of train.py" in mistake(main, *words)
    assert not (tmp_path / "ran").exists()


def test_a_run_is_never_overwritten_nor_gone_on_with_on_other_data(run, pictures, tmp_path, monkeypatch):
    before = (run.folder / "last.pt").read_bytes()
    said = mistake(train.main, *arguments(pictures, run.folder))
    assert re.search(f"--out {run.folder} holds a run already.* --resume", said)
    assert (run.folder / "last.pt").read_bytes() == before
    torch.save({**content(run.folder / "last.pt"), "images": 13, "step": 3}, tmp_path / "last.pt")
    assert "is of a run on 13 training images, here are 12" in mistake(train.main, "--resume", tmp_path)
    monkeypatch.chdir(tmp_path)
    folders = [str(train.make_folder(SimpleNamespace(out=None, model="clip", data="pets.csv"))) for _ in range(3)]
    assert folders == ["runs/clip-pets", "runs/clip-pets-2", "runs/clip-pets-3"]  # without --out


# --- settings and mistakes ---

def settled(*words):
    """The settings of the run that a command would begin."""
    return train.settle(train.parse([*map(str, words)]))


def test_settings_are_defaults_then_the_recipes_then_the_checkpoints_then_what_was_typed(run, pictures):
    args, recipe = settled(), liteclip.RECIPES["tiny"]
    assert (args.model, args.config, args.data, args.seed) == ("liteclip", "tiny", "shapes", 0)
    assert (args.batch, args.lr, args.epochs) == (recipe["batch"], recipe["lr"], recipe["epochs"])
    args = settled("--data", "pets.csv", "--lr", "0.5")
    assert (args.config, args.lr, args.epochs) == ("liteclip", 0.5, liteclip.RECIPES["liteclip"]["epochs"])
    args = settled("--model", "koclip", "--epochs", "3")
    assert (args.config, args.data, args.epochs) == ("koclip-tiny", "shapes-ko", 3)
    recipe = train.home("clip").RECIPES["vit-b-32"]
    args = settled("--model", "clip", "--config", "vit-b-32", "--scratch", "--weight-decay", "0.3")
    assert (args.lr, args.weight_decay, args.warmup) == (recipe["scratch"]["lr"], 0.3, recipe["warmup"])
    args = settled("--resume", run.folder, "--microbatch", "2", "--recompute", "--seed", "0")
    assert (args.batch, args.epochs, args.data, args.microbatch, args.recompute) == (4, 2, str(pictures), 2, True)
    said = mistake(train.main, "--resume", run.folder, "--weight-decay", "0.5")  # which would change the result
    assert re.search("--weight-decay 0.5 does not go with .*last.pt, where it is 0.05; a resumed run", said)


MISTAKES = {
    "--model clop": "invalid choice: 'clop'.*'clip', 'koclip', 'liteclip'",
    "--config huge": "--config huge: .*known: liteclip, small, tiny",
    "--data flickr9k": r"--data flickr9k: .*\(shapes, shapes-ko, flickr8k",
    "--data columns.csv": "columns.csv: .*found: file, text; expected image,caption",
    "--data bare": "--data bare: 1 pictures and not one caption; expected NAME.txt",
    "--data ''": "--data is empty: a variable of the shell",
    "--data coco": "--data coco needs --root: .*dataset_coco.json",
    "--data coco --root nowhere": "nowhere",
    "--batch 13": "--batch 13.*12.*pictures of",
    "--batch 4 --samples 3": "--batch 4.*3.*pictures of",
    "--batch 1": "--batch 1.*one leaves no negatives",
    "--precision fp16": "--precision fp16 needs a GPU",
    "--epochs 0": "--epochs 0.* expected",
    "--lr nan": "--lr nan.* expected",
    "--warmup 1.5": "--warmup 1.5.* expected",
    "--seed=-1": "--seed -1.* expected",
    "--out file/out": "file/out: Not a directory.*--out",
    "--cache file": "'file'.*--cache",
    "--resume damaged": "damaged/last.pt is no checkpoint of train.py"}


def test_a_beginners_mistake_gets_one_line(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("columns.csv").write_text("file,text\n0.png,a star\n")
    for folder, name in (("bare", "0.png"), ("damaged", "last.pt")):
        Path(folder).mkdir()
        Path(folder, name).write_bytes((pictures / "0.png").read_bytes())
    said = {words: mistake(train.main, *arguments(pictures, "out", *shlex.split(words))) for words in MISTAKES}
    assert {words: line for words, line in said.items() if not re.search(MISTAKES[words], line)} == {}
    assert not Path("out", "last.pt").exists()


def test_a_download_that_fails_names_scratch(monkeypatch, pictures, tmp_path):
    def unreachable(url, path, **checks):
        raise data.UserError(f"cannot download {url}: no network")
    monkeypatch.setattr(data, "download", unreachable)
    said = mistake(train.main, *arguments(pictures, tmp_path, "--config", "liteclip"))
    assert re.search("cannot download https://.*: no network.*--scratch.* random weights", said)


# --- the parts of a run ---

def test_learning_rate_by_hand():
    rates = [train.learning_rate(step, 20, 1.0, 0.2) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[12] == pytest.approx(0.5) and 0 < rates[19] < 0.02
    assert train.learning_rate(0, 10, 1.0, 0.0) == 1.0
    assert max(train.learning_rate(step, n, 1.0, 0.1) for n in range(1, 40) for step in range(n)) <= 1.0


def test_no_decay_on_gains_biases_embeddings_and_the_scale():
    model = liteclip.LiteCLIP(liteclip.CONFIGS["tiny"])
    groups = train.make_optimizer(model, 0.1, image_lr=2.0).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["weight_decay"], group["scale"]) for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    expected = {"logit_scale": (0, 1), "text_encoder.token_embedding.weight": (0, 1),
                "text_encoder.blocks.0.ln_1.weight": (0, 1), "text_encoder.blocks.0.attn.in_proj.weight": (0.1, 1),
                "image_encoder.stem.0.bias": (0, 1), "image_encoder.stem.0.weight": (0.1, 2)}
    assert {name: found[name] for name in expected} == expected


def test_precision_follows_the_device(monkeypatch):
    for device, capability, native, expected in (
            ("cuda", (9, 0), False, "bf16"), ("cuda", (7, 5), False, "fp16"), ("cpu", None, True, "bf16"),
            ("cpu", None, False, "fp32"), ("mps", None, False, "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
        assert evaluate.pick_precision(SimpleNamespace(type=device)) == expected, device


def test_a_flat_loss_is_noted_and_the_scale_has_a_limit(run, pictures, tmp_path, monkeypatch):
    """Of several terms it is the contrastive one that must not be flat."""
    assert "as if all pictures" not in run.printed
    monkeypatch.setattr(liteclip.LiteCLIP, "loss", lambda self, image_features, text_features: {
        "loss": image_features.sum() - self.logit_scale, "contrastive": torch.tensor(math.log(4) + 0.005)})
    said = printed(train.main, *arguments(pictures, tmp_path, "--epochs", "1", "--lr", "5"))
    assert said.count("the contrastive loss is 1.39, as if all pictures and all captions were alike.") == 1
    assert float(log(tmp_path)[-1]["logit_scale"]) == pytest.approx(100)
