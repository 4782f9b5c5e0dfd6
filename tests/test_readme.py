"""README and docs are true: their code runs, their commands are understood, their tables agree with the files."""
import functools
import importlib
import re
import shlex
import sys
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
import train

ROOT = Path(train.__file__).resolve().parent
sys.path.append(str(ROOT / "experiments"))
import results  # noqa: E402, found by the line above
import sizes  # noqa: E402

FILES = {path.name: importlib.import_module(path.stem) for path in ROOT.glob("*.py")}
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README, EVERYTHING = PAGES[ROOT / "README.md"], "\n".join(PAGES.values())


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", EVERYTHING, flags=re.DOTALL)


@pytest.fixture
def few_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "COUNTS", {"train": 32, "val": 8, "test": 16})
    monkeypatch.setattr(shapes, "zero_shot", functools.partial(shapes.zero_shot, each=1))


def test_the_first_command_and_the_code_that_uses_its_checkpoint(capsys, few_pictures):
    train.main(["--epochs", "0.5", "--batch", "8", "--precision", "fp32"])
    printed = capsys.readouterr().out
    row, = re.findall(r"^\| liteclip tiny \| shapes test \|.*", printed, flags=re.MULTILINE)
    assert Path("runs/liteclip-shapes/retrieval.png").exists()
    draw, = re.findall(r'`python -c "(.*photo.*)"`', README)
    code, = [block for block in blocks("python") if "runs/liteclip-shapes" in block]
    call, = re.findall(r"`(liteclip\.ZeroShotPipeline\(.*?)`", README)
    exec(f"{draw}\n{code}", {})
    probabilities = [float(p) for p in re.findall(r"\d\.\d+", capsys.readouterr().out)]
    assert len(probabilities) == 2 and sum(probabilities) == pytest.approx(1, abs=1e-3)
    assert sorted(p for _, p in eval(call)) == pytest.approx(sorted(probabilities), abs=1e-3)
    evaluate.main(shlex.split(re.search(r"again: +python evaluate\.py (.*)", printed)[1]))
    assert row in capsys.readouterr().out


def test_every_command_is_understood(monkeypatch, tmp_path):
    docstrings = "\n".join(module.__doc__ for module in FILES.values())
    text = "\n".join([*blocks("sh"), *re.findall(r"`(python \w+\.py[^`]*|torchrun [^`]*)`", EVERYTHING),
                      *re.findall(r"^    ((?:python|torchrun) .*)$", docstrings, flags=re.MULTILINE)])
    lines = text.replace("\\\n", " ").replace(" && ", "\n").splitlines()
    commands = sorted({line.split("#")[0].strip() for line in lines if re.search(r"\w\.py", line)})
    assert len(commands) > 30
    monkeypatch.chdir(tmp_path)
    for function in ("test", "search"):  # instead of their work
        monkeypatch.setattr(evaluate, function, lambda source, *rest: evaluate.say(f"{source} {rest}"))
    for command in commands:
        words = shlex.split(command)
        number = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script, words = words[number], [word for word in words[number + 1:] if word not in ("...", "--help")]
        if script == "train.py":
            args = train.settle(train.parse(words))
            assert args.data in data.NAMES or args.data.endswith((".csv", ".json", ".tar")), command
        elif script == "evaluate.py":
            evaluate.main(words)
            assert words[0] in evaluate.published() or words[0].startswith("runs/"), command
        elif script in FILES:
            assert words[0] in FILES[script].PUBLISHED or words[0].startswith("runs/"), command
        else:
            assert not words or words[0] in (ROOT / script).read_text(encoding="utf-8"), command


def test_the_example_table_is_one_that_data_reads(tmp_path):
    (tmp_path / "pictures.csv").write_text(blocks("csv")[0])
    for name in ("dogs/1.jpg", "cats/7.png"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    dog, cat = (data.load(tmp_path / "pictures.csv", split, 8, cache=tmp_path).samples for split in ("train", "val"))
    assert [s.captions for s in dog] == [["a dog runs on the beach", "a brown dog, and the sea"]] and len(cat) == 1


def test_sizes():
    row = r"^\| \[(\w+\.py)\]\(\1\) \|[^|]*\| ([\d |]+?) \|(?: \d+\.\d| *$)"
    rows = dict(re.findall(row, README, flags=re.MULTILINE))
    assert set(rows) == set(sizes.FILES) == set(FILES)
    for name, row in rows.items():
        expected = [len(sizes.lines(name))]
        if name in sizes.MODELS:
            expected += [len(sizes.lesson(name)), *([] if name == "clip.py" else [sizes.new(name)])]
        assert [int(cell) for cell in re.findall(r"\d+", row)] == expected, name
    assert f"All ten have {sum(len(sizes.lines(name)) for name in FILES):,} lines." in README


def test_links_and_names_exist():
    for page, text in PAGES.items():
        links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text)
        for path, place in links + [(path, "") for path in re.findall(r'src="([^"]+)"', text)]:
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), path
            headings = re.findall(r"^#+ (.*)", PAGES.get(target, ""), flags=re.MULTILINE)
            assert not place or place in [re.sub(r"[^\w-]", "", line.lower().replace(" ", "-")) for line in headings]
    for name in re.findall(r"`(?:python )?((?:tests|experiments|docs|notebooks)/[\w./-]+)", EVERYTHING):
        assert (ROOT / name).exists(), name
    for module, name in re.findall(r"`(\w+)\.(\w+)\(", EVERYTHING):
        assert hasattr(FILES[f"{module}.py"], name), (module, name)


def test_code_that_loads_released_weights(tmp_path, monkeypatch):
    """With small files of the same names in the place of the released ones."""
    small = dict(image_width=32, image_layers=1, image_mlp=64, text_width=32, text_layers=1, text_mlp=64)
    monkeypatch.setitem(clip.CONFIGS, "vit-b-32", replace(clip.CONFIGS["vit-b-32"], **small))
    monkeypatch.setitem(liteclip.CONFIGS, "liteclip", liteclip.CONFIGS["tiny"])
    monkeypatch.chdir(tmp_path)
    weights = clip.CLIP(clip.CONFIGS["vit-b-32"]).state_dict()
    torch.save(weights, "ViT-B-32.pt")
    torch.save(liteclip.LiteCLIP(liteclip.CONFIGS["liteclip"]).state_dict(), "liteclip2.pt")
    pytest.importorskip("safetensors.torch").save_file(weights, "laion.safetensors")
    code, = [block for block in blocks("python") if "laion.safetensors" in block]
    with pytest.warns(UserWarning, match="resized to 9 x 9"):
        exec(code, {})


def test_the_reference_runs_are_made_evaluated_and_written_as_rows(few_pictures, monkeypatch):
    monkeypatch.setitem(clip.RECIPES, "koclip-tiny", clip.RECIPES["koclip-tiny"] | {"epochs": 1, "batch": 8})
    scores, folder = results.evaluated("koclip", 3)
    assert results.evaluated("koclip", 3) == (scores, folder)  # it is not trained again
    log, = results.read_log(folder / "log.csv")
    assert log["zs_all"] >= 0 and set(scores) >= {key for group in results.GROUPS.values() for key in group}
    first = {"i2t_r1": 20, "i2t_r5": 50, "i2t_r10": 60, "t2i_r1": 3, "t2i_r5": 4, "t2i_r10": 5}
    assert results.rows("clip", {0: first, 1: first | {"i2t_r1": 24}}) == [
        "| `clip` | 20.0 / 50.0 / 60.0 | 3.0 / 4.0 / 5.0 |",
        "| `clip`, `--seed 1` | 24.0 / 50.0 / 60.0 | 3.0 / 4.0 / 5.0 |", "| mean ± sd | 22.0 ± 2.8 | 3.0 ± 0.0 |"]
