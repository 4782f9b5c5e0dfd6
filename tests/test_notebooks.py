"""The notebooks run from the top, next to nothing but the files, and are kept as they came out of a run.

They are run short: few pictures, two steps in the place of each training loop's sixty, and no checkpoint at hand, so
that each trains its own. Where matplotlib is missing, something that takes every call stands in for it.
"""
import ast
import functools
import importlib.util
import json
import re
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

import data

ROOT = Path(data.__file__).resolve().parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ALLOWED = {"torch", "numpy", "matplotlib", "PIL", "data", "train", "clip", "liteclip", "prolip", "llip", "clips"}
COUNTS = {"train": 128, "val": 16, "test": 500}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def sources(path):
    return ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def shortened(source):
    return re.sub(r"for step in range\(\d+\)", "for step in range(2)", source)


@pytest.fixture
def folder(tmp_path):
    """A copy of the project without runs and caches: links to its files."""
    (tmp_path / "notebooks").mkdir()
    for name in [*(path.name for path in ROOT.glob("*.py")), "docs"]:
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_there_is_a_tour_and_one_for_each_model():
    assert [path.stem for path in NOTEBOOKS] == ["clip", "clips", "liteclip", "llip", "prolip", "tour"]


@each_notebook
def test_runs_from_the_top(path, folder, monkeypatch):
    monkeypatch.chdir(folder / "notebooks")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(data, "SHAPES_COUNTS", COUNTS)
    if path.stem == "tour":  # it evaluates six models, three times
        monkeypatch.setattr(data, "SHAPES_COUNTS", COUNTS | {"test": 128})
        monkeypatch.setattr(data, "load_zero_shot", functools.partial(data.load_zero_shot, each=2))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    if importlib.util.find_spec("matplotlib") is None:
        drawing = MagicMock()
        monkeypatch.setitem(sys.modules, "matplotlib", drawing)
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", drawing.pyplot)
    names = {"__name__": "__main__"}
    for number, source in enumerate(sources(path)):
        exec(compile(shortened(source), f"{path.name}, code cell {number + 1}", "exec"), names)


@each_notebook
def test_runs_in_jupyter(path, folder):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = shortened(cell.source)
    set_up = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    fewer = nbformat.v4.new_code_cell(f"import data\ndata.SHAPES_COUNTS = {COUNTS}")
    notebook.cells.insert(set_up + 1, fewer)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder / "notebooks")}}).execute()


@each_notebook
def test_is_kept_as_it_came_out_of_a_run(path):
    assert path.stat().st_size < 600_000
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(r"/(tmp|home|root|work|Users)/", json.dumps(read(path)))


@each_notebook
def test_form(path):
    first, *rest = sources(path)
    assert first == sources(NOTEBOOKS[0])[0], "the set-up cell is the same in all"
    for source in sources(path):
        for node in ast.walk(ast.parse(source)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {module.split(".")[0] for module in modules} <= ALLOWED | set(sys.stdlib_module_names)
    text = "".join("".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "markdown")
    exercises = re.findall(r"\*\*Exercise (\d)\.\*\*", text)
    assert path.stem == "tour" or (exercises == list("1234")[:len(exercises)] and len(exercises) >= 3)
    for number in exercises:
        assert any(source.startswith(f"# Exercise {number}") for source in rest), f"a solution of exercise {number}"
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (path.parent / target).exists(), target
