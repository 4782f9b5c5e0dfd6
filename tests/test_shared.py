"""What the files of the repository owe each other: shared code is identical, a model file stands alone, no function is
long, and no two files import each other. Then what differs between the model files is the papers'."""
import ast
import graphlib
import importlib
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import tokens

ROOT = Path(__file__).resolve().parent.parent
FILES = {"clip": "CLIP", "liteclip": "LiteCLIP", "prolip": "ProLIP", "llip": "Llip", "clips": "CLIPS"}
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")}
TREES = {file: ast.parse(source) for file, source in SOURCES.items()}

OWN = {"Config", "ImageEncoder", "TextEncoder", "from_backbones", "model.__init__", "model.encode_image",
       "model.encode_text", "model.from_pretrained"}  # of the same name in every file, and every file's own
DIFFERENT = {  # where a paper, or its published code, wants something else of what the others share
    "prolip": {"model.similarity", "model.logits", "model.tokenize", "model.text_batch", "model.forward",
               "model.encode", "model.loss", "ZeroShotPipeline"},
    "llip": {"model.similarity", "model.logits", "model.loss"},
    "clips": {"model.tokenize", "model.text_batch", "model.forward", "model.encode", "model.loss"}}
IN_ALL = {"Attention", "MLP", "Gather", "gather", "upcast", "full_precision", "read_weights", "load_weights", "load",
          "ZeroShotPipeline", "model.similarity", "model.logits", "model.forward", "model.encode", "model.loss",
          "model.tokenize", "model.text_batch", "the command"}
IN_VITS = {"Block", "resize_positions", "sines_and_contrast"}  # in all files but liteclip.py


def definitions(file):
    """The source of every class and function at the top of a file, and of the methods of the model class."""
    source, found = SOURCES[file], {}
    for node in TREES[file].body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found[node.name] = ast.get_source_segment(source, node)
        if getattr(node, "name", None) == FILES[file]:
            found |= {f"model.{method.name}": ast.get_source_segment(source, method) for method in node.body
                      if isinstance(method, ast.FunctionDef)}
    found["load"] = found["load"].replace(f"({FILES[file]}, ", "(Model, ")
    found["the command"] = source.split('if __name__ == "__main__":')[1]
    return found


DEFINITIONS = {file: definitions(file) for file in FILES}
SHARED = sorted(name for name in set().union(*DEFINITIONS.values()) - OWN
                if sum(name in found for found in DEFINITIONS.values()) > 1)


@pytest.mark.parametrize("name", SHARED)
def test_what_several_files_share_is_identical(name):
    having = [file for file in FILES if name in DEFINITIONS[file]]
    same = [file for file in having if name not in DIFFERENT.get(file, ())]
    assert [file for file in same if DEFINITIONS[file][name] != DEFINITIONS[same[0]][name]] == []
    needless = [file for file in having if file not in same and DEFINITIONS[file][name] == DEFINITIONS[same[0]][name]]
    assert needless == [], "listed as different"


def test_what_every_file_needs_is_there():
    for file, found in DEFINITIONS.items():
        assert IN_ALL | (set() if file == "liteclip" else IN_VITS) <= set(found)
        assert DIFFERENT.get(file, set()) <= set(SHARED)


def imports(nodes):
    """The first part of the name of each module that is imported there."""
    return {name.split(".")[0] for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])}


def test_model_files_import_only_torch_and_the_standard_library():
    for file in FILES:
        assert {"torch"} <= imports(TREES[file].body) <= {"torch", *sys.stdlib_module_names}, file


def test_no_files_import_each_other_not_even_inside_functions():
    needs = {file: imports(ast.walk(tree)) & set(TREES) for file, tree in TREES.items()}
    assert "data" in needs["clip"] and "clip" in needs["evaluate"]  # found inside a function, and at the top
    graphlib.TopologicalSorter(needs).prepare()  # a CycleError names the circle


def test_no_function_is_longer_than_60_lines():
    lines = [(node.end_lineno - node.lineno + 1, f"{file}.py: {node.name}") for file, tree in TREES.items()
             for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert len(lines) > 200 and max(lines)[0] <= 60, max(lines)


def test_every_model_file_stands_alone(tmp_path):
    """Each in a folder of its own: it imports quietly, loads nothing but torch, and its tiny size works."""
    for file in FILES:
        (tmp_path / file).mkdir()
        shutil.copy(ROOT / f"{file}.py", tmp_path / file)
    code = f"""
import importlib, sys, torch
before = set(sys.modules)
for file, Model in {FILES}.items():
    sys.path[0] = file
    module = importlib.import_module(file)
    config = next(module.CONFIGS[name] for name in module.CONFIGS if name.endswith("tiny"))
    model, images = getattr(module, Model)(config).eval(), torch.zeros(2, 3, config.image_size, config.image_size)
    tokens = torch.zeros(2, config.context_length, dtype=torch.long)
    tokens[:, :4] = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]])
    assert model.logits(images, tokens).isfinite().all()
print(sorted({{name.split(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.stderr, result.stdout) == ("", f"{sorted(FILES)}\n")


@pytest.mark.parametrize("file", FILES)
def test_every_size_has_a_recipe_and_every_published_one_its_files(file):
    module = importlib.import_module(file)
    assert set(module.RECIPES) == set(module.CONFIGS) and set(module.PUBLISHED) <= set(module.CONFIGS)
    assert len({files["source"] for files in module.PUBLISHED.values()}) == len(module.PUBLISHED)
    for name, files in module.PUBLISHED.items():
        assert module.RECIPES[name]["tokenizer"].removesuffix("-cased").removesuffix("-clips") in (
            "clip", "unigram", "wordpiece")
        for url, sha256 in (files["source"], files["vocab"]):
            assert url.startswith("https://")
            assert sha256 is None or len(sha256) == 64 and set(sha256) <= set("0123456789abcdef")
            if url.startswith("https://openaipublic"):  # OpenAI's addresses name the checksum
                assert url.split("/")[-2] == sha256 and url.split("/")[-1].lower().startswith(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("file", FILES)
def test_cuda_agrees_with_the_cpu(file):
    torch.manual_seed(0)
    module = importlib.import_module(file)
    model = getattr(module, FILES[file])(module.CONFIGS["tiny"])
    samples = [data.Sample([f"a {name} thing"]) for name in ("red", "blue", "green", "large", "small", "round")]
    batch = model.text_batch(samples, [random.Random(i) for i in range(6)], tokens.BPE([]))
    batch["images"] = torch.randint(0, 256, (6, 3, model.config.image_size, model.config.image_size), dtype=torch.uint8)
    expected = model(**batch)["loss"].item()
    model.cuda()
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = model(**{name: x.cuda() for name, x in batch.items()})["loss"]
        loss.backward()
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=tolerance)
        assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())
