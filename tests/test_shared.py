"""What several model files have in common is the same to the letter: what differs between them is the papers'."""
import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [name for name in ("clip.py", "liteclip.py", "prolip.py", "llip.py", "clips.py") if (ROOT / name).exists()]
OWN = {"Config", "ImageEncoder", "TextEncoder"}  # of the same name in every file, and every file's own
METHODS = {"similarity", "chance_loss", "normalize", "tokenize", "text_batch", "forward", "encode", "loss"}  # of the model class
DIFFERENT = {  # where a paper, or its published code, wants something else of what the others share
    "prolip.py": {"model.similarity", "model.tokenize", "model.text_batch", "model.forward", "model.encode",
                  "model.loss", "ZeroShotPipeline"},
    "llip.py": {"model.similarity", "model.forward", "model.loss"},
    "clips.py": {"model.tokenize", "model.text_batch", "model.forward", "model.encode", "model.loss"}}


def definitions(name):
    """The source of every class and function at the top of a file, and of the model class's shared methods."""
    source = (ROOT / name).read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    found = {node.name: ast.get_source_segment(source, node) for node in nodes}
    for node in nodes:
        if node.name.lower() == name.removesuffix(".py"):
            found |= {f"model.{method.name}": ast.get_source_segment(source, method) for method in node.body
                      if isinstance(method, ast.FunctionDef) and method.name in METHODS}
    return found


@pytest.mark.parametrize("one, other", list(itertools.combinations(FILES, 2)))
def test_what_two_files_share_is_identical(one, other):
    a, b = definitions(one), definitions(other)
    shared = (a.keys() & b.keys()) - OWN - DIFFERENT.get(one, set()) - DIFFERENT.get(other, set())
    if {one, other} & {"prolip.py", "llip.py"} and {one, other} & {"clip.py", "liteclip.py", "clips.py"}:
        shared.discard("model.chance_loss")  # a sigmoid loss has another than a softmax
    assert {"Attention", "MLP", "gather", "load_strictly", "model.normalize"} <= shared
    assert [name for name in sorted(shared) if a[name] != b[name]] == []
