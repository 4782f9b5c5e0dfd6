"""The notebooks run from the top, with nothing but the files, and are kept as they came out of a run.

They are run short: with few pictures and few steps, and with untrained models. If matplotlib is missing, something that
takes every call stands in for it.
"""
import ast
import functools
import importlib.util
import inspect
import json
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

import evaluate
import shapes
import train
from tokens import BPE

ROOT = Path(train.__file__).resolve().parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FILES = {path.stem: importlib.import_module(path.stem) for path in ROOT.glob("*.py")}
ALLOWED = {"torch", "numpy", "matplotlib", "PIL", *FILES, *sys.stdlib_module_names}
SHORTER = [(r"for step in range\(\d+\)", "for step in range(2)"), (r"for k in range\(9\)", "for k in range(2)"),
           (r"\b(500|250|200)\b", "32"), (r"\b1000\b", "160"), (r"\b32, 128, 256\)", "32)"), (r"\b64, 10,", "64, 1,"),
           (r'(notebook/\{i\}"\) for i in range)\(64', r"\1(8"), (r"one_object\(64", "one_object(4"), (r"\b400\b", "9")]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def sources(path):
    return ["".join(cell["source"]) for cell in cells(path)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint of each tiny model, untrained."""
    scenes, found = [shapes.make_scene(str(i)) for i in range(100)], {}
    tokenizer = BPE.train([*map(shapes.long_caption, scenes), *map(shapes.web_caption, scenes)])
    for model, Model in evaluate.MODELS.items():
        size, = [size for size in evaluate.sizes(model) if size.endswith("tiny")]
        config = replace(evaluate.home(model).CONFIGS[size], vocab_size=len(tokenizer))
        found[model] = tmp_path_factory.mktemp(model) / "best.pt"
        torch.save({"model": model, "config": asdict(config), "tokenizer": tokenizer.state(), "args": {},
                    "weights": Model(config).state_dict(), "step": 0, "minutes": 0.0}, found[model])
    return found


@each_notebook
def test_runs_from_the_top(path, tmp_path, checkpoints, monkeypatch):
    def train_main(argv):  # in the place of train.main
        args = train.settle(train.parse(argv))
        Path(args.out).mkdir(parents=True)
        shutil.copy(checkpoints[args.model], args.out)
    (tmp_path / "notebooks").mkdir()
    for name in [*(path.name for path in ROOT.glob("*.py")), "docs"]:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(shapes, "COUNTS", {"train": 16, "val": 4, "test": 32})
    monkeypatch.setattr(shapes, "zero_shot", functools.partial(shapes.zero_shot, each=1))
    monkeypatch.setattr(train, "main", train_main)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    if importlib.util.find_spec("matplotlib") is None:
        drawing = MagicMock()
        monkeypatch.setitem(sys.modules, "matplotlib", drawing)
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", drawing.pyplot)
    names = {"__name__": "__main__"}
    for number, source in enumerate(sources(path), 1):
        source = functools.reduce(lambda text, pair: re.sub(*pair, text), SHORTER, source)
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), names)


@each_notebook
def test_is_kept_as_it_came_out_of_a_run(path):
    assert not re.search(r"/(tmp|home|root|work|Users)/", path.read_text(encoding="utf-8"))
    for number, cell in enumerate(cells(path), 1):
        assert cell["execution_count"] == number
        assert {output["output_type"] for output in cell["outputs"]} <= {"stream", "display_data", "execute_result"}
        assert not [output for output in cell["outputs"] if output.get("name") == "stderr"]
        printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        for thing in re.findall(r"^code\((.+)\)$", "".join(cell["source"]), flags=re.MULTILINE):
            assert inspect.getsource(eval(thing, FILES)) in printed, f"{thing} has changed since the notebook was run"


@each_notebook
def test_form(path):
    assert sources(path)[0] == sources(NOTEBOOKS[0])[0], "the set-up cell is the same in all"
    for node in ast.walk(ast.parse("\n".join(sources(path)))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert {name.split(".")[0] for name in [getattr(node, "module", None) or node.names[0].name]} <= ALLOWED
    text = "".join(line for cell in cells(path, "markdown") for line in cell["source"])
    exercises = re.findall(r"\*\*Exercise (\d)\.\*\*", text)
    assert exercises == ([] if path.stem == "tour" else list("1234"))
    assert [source[11] for source in sources(path) if source.startswith("# Exercise ")] == exercises  # their solutions
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (path.parent / target).exists(), target
