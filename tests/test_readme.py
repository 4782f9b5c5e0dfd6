"""README and docs are true: their code runs, their commands are understood, their tables agree with the files."""
import functools
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import clips
import data
import liteclip
import llip
import prolip
import results
import sizes
import train

ROOT = Path(train.__file__).parent
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README, EVERYTHING = PAGES[ROOT / "README.md"], "\n".join(PAGES.values())
DOCSTRINGS = "".join(module.__doc__ for module in (train, clip, liteclip, prolip, llip, clips))


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", EVERYTHING, flags=re.DOTALL)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """runs/liteclip-shapes/best.pt as the first command leaves it, but hardly trained, and a picture."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHAPES_COUNTS", {"train": 64, "val": 16, "test": 16})
    train.main(["--epochs", "0.5", "--batch", "8", "--precision", "fp32"])
    Image.fromarray(data.draw(data.make_scene("readme"))).save("photo.png")
    return tmp_path / "runs" / "liteclip-shapes" / "best.pt"


def test_the_first_command_and_the_code_that_uses_its_checkpoint(capsys, checkpoint):
    assert checkpoint.exists()
    printed = capsys.readouterr().out
    assert "| liteclip tiny | shapes test |" in printed
    assert "use it:   python liteclip.py runs/liteclip-shapes/best.pt" in printed
    (code,) = [block for block in blocks("python") if "runs/liteclip-shapes" in block]
    exec(code, {})
    probabilities = [float(p) for p in re.findall(r"\d\.\d+", capsys.readouterr().out)]
    assert len(probabilities) == 2 and sum(probabilities) == pytest.approx(1, abs=1e-3)
    train.main(["--eval", str(checkpoint)])
    assert "| liteclip tiny | shapes test |" in capsys.readouterr().out


def commands():
    text = "\n".join([*blocks("sh"), *re.findall(r"`(python train\.py[^`]*|torchrun [^`]*)`", EVERYTHING),
                      *re.findall(r"^    ((?:python|torchrun) .*)$", DOCSTRINGS, flags=re.MULTILINE)])
    return sorted({line.split("#")[0].strip() for part in text.replace(" && ", "\n").splitlines() for line in [part]
                   if "train.py" in line})


@pytest.mark.parametrize("command", commands())
def test_every_command_is_understood(command):
    words = shlex.split(command)
    words = [word for word in words[words.index("train.py") + 1:] if word != "..."]
    if words == ["--help"]:
        return
    _, args = train.parse(words)
    if args.search:
        assert args.search[0] == "clip/vit-b-32" or args.search[0].startswith("runs/")
    elif not (args.resume or args.eval):
        Model, config, recipe = train.choose(args)
        assert "--config" in words or args.config.endswith("tiny" if args.data in data.GENERATED else "liteclip")
        assert args.data in data.NAMES or args.data.endswith((".csv", ".json", ".tar"))
    elif args.eval in ("clip/vit-b-32", "koclip/koclip-base"):
        model, size = args.eval.split("/")
        assert size in train.home(train.MODELS[model]).PUBLISHED


def test_the_example_table_is_one_that_data_reads(tmp_path):
    (table,) = blocks("csv")
    (tmp_path / "pictures.csv").write_text(table)
    for name in ("dogs/1.jpg", "cats/7.png"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    dog, cat = data.own_pictures(str(tmp_path / "pictures.csv"))
    assert dog.captions == ["a dog runs on the beach", "a brown dog, and the sea"]
    assert (dog.split, cat.split) == ("train", "val")


def test_sizes():
    rows = re.findall(r"^\| \[(\w+\.py)\]\(.*?\| (\d+) \| (\d+) \| (\d*) ?\| ", README, flags=re.MULTILINE)
    assert [row[0] for row in rows] == list(sizes.FILES)
    for name, *found in rows:
        assert tuple(int(n or 0) for n in found) == sizes.sizes(name), name


def heading(line):
    return re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", PAGES[page]) + [
        (path, "") for path in re.findall(r'src="([^"]+)"', PAGES[page])]
    for path, place in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        headings = [heading(line) for line in PAGES.get(target, "").splitlines() if line.startswith("#")]
        assert not place or place in headings, place


def test_code_that_loads_released_weights(tmp_path, monkeypatch):
    """With files of one's own in the place of the released ones: of the same names, shapes and kinds, but small."""
    small = dict(image_width=32, image_layers=1, image_heads=2, image_mlp=64, text_width=32, text_layers=1,
                 text_heads=2, text_mlp=64)
    monkeypatch.setitem(clip.CONFIGS, "vit-b-32", replace(clip.CONFIGS["vit-b-32"], **small))
    monkeypatch.setitem(liteclip.CONFIGS, "liteclip", liteclip.CONFIGS["tiny"])
    monkeypatch.chdir(tmp_path)
    weights = clip.CLIP(clip.CONFIGS["vit-b-32"]).state_dict()
    torch.save(weights, "ViT-B-32.pt")
    torch.save(liteclip.LiteCLIP(liteclip.CONFIGS["tiny"]).state_dict(), "liteclip2.pt")
    pytest.importorskip("safetensors.torch").save_file(weights, "laion.safetensors")
    (code,) = [block for block in blocks("python") if "laion.safetensors" in block]
    found = {}
    with pytest.warns(UserWarning, match="resized to 9 x 9"):
        exec(code, found)
    assert isinstance(found["model"], liteclip.LiteCLIP)


def test_nothing_but_the_requirements_is_imported():
    allowed = {"torch", "torchvision", "PIL", "numpy", "tqdm", "data", "train", "clip", "liteclip", "prolip", "llip", "clips"}
    import ast
    import sys
    models = ("clip.py", "liteclip.py", "prolip.py", "llip.py", "clips.py")
    for name, extra in [*((name, {"torch"}) for name in models), ("data.py", allowed), ("train.py", allowed)]:
        for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body:
            for module in [a.name for a in node.names] if isinstance(node, ast.Import) else \
                    [node.module] if isinstance(node, ast.ImportFrom) else []:
                assert module.split(".")[0] in extra | set(sys.stdlib_module_names), (name, module)


def test_the_reference_runs_are_made_evaluated_and_written_as_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHAPES_COUNTS", {"train": 64, "val": 16, "test": 16})
    monkeypatch.setattr(data, "load_zero_shot", functools.partial(data.load_zero_shot, each=2))
    monkeypatch.setattr(clip, "CONFIGS", dict(clip.CONFIGS))
    monkeypatch.setattr(clip, "RECIPES", clip.RECIPES | {"koclip-tiny": clip.RECIPES["koclip-tiny"] | {"epochs": 1}})
    scores, folder = results.evaluated("koclip", 3)
    assert results.evaluated("koclip", 3) == (scores, folder)  # it is not trained again
    log = results.read_log(folder / "log.csv")
    assert len(log) == 1 and log[-1]["zs_all"] >= 0 and folder.name == "koclip-3"
    assert set(scores) >= {key for group in results.GROUPS.values() for key in group}
    first, second = ({"i2t_r1": a, "i2t_r5": 50, "i2t_r10": 60, "t2i_r1": 3, "t2i_r5": 4, "t2i_r10": 5} for a in (20, 24))
    assert results.rows("clip", {0: first, 1: second}) == [
        "| `clip` | 20.0 / 50.0 / 60.0 | 3.0 / 4.0 / 5.0 |", "| `clip`, `--seed 1` | 24.0 / 50.0 / 60.0 | 3.0 / 4.0 / 5.0 |",
        "| mean ± sd | 22.0 ± 2.8 | 3.0 ± 0.0 |"]
