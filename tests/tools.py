"""Used by test_prolip.py, test_llip.py and test_clips.py: small inputs, a tokenizer, training, two processes, published
shapes, and a run's checkpoint."""
import concurrent.futures
import gzip
import importlib
import json
import multiprocessing
import random
import re
import string
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image


class Letters:
    """A tokenizer: every letter is a piece, 46 of them."""
    pad_id, start_id, end_id = 0, 1, 2
    known = string.ascii_lowercase + string.digits + " .!?,'-+*="

    def encode(self, text):
        return [4 + self.known.index(c) for c in text]

    def __len__(self):
        return 4 + len(self.known)

    def decode(self, ids):
        return "".join(self.known[i - 4] if i > 3 else f"<{i}>" for i in ids)


def lively(model):
    """In float64, with every parameter moved a little from its initial value, so that each bias and norm counts."""
    model = model.eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def some_tokens(*lengths, width=10, seed=1):
    """Rows as `tokenize` lays them out: 1 at the start, 2 at the end, 0 behind it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(len(lengths), width, dtype=torch.long)
    for i, n in enumerate(lengths):
        tokens[i, :n] = torch.randint(4, 50, (n,), generator=generator)
        tokens[i, 0], tokens[i, n - 1] = 1, 2
    return tokens


def some_images(n):
    return torch.randint(0, 256, (n, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def assert_close(found, expected, atol=1e-11):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def assert_images_are_normalised(model, mean, std):
    """Pixels equal floats that are already normalised; images of a wrong shape are refused."""
    images = some_images(3)
    floats = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), model.encode_image(floats))
    for shape in ((3, 24, 24), (1, 24, 24, 3), (1, 3, 32, 32)):
        with pytest.raises(ValueError, match=rf"images must be \(B, 3, .*got {re.escape(str(shape))}"):
            model.encode_image(torch.zeros(shape))


# --- training ---

def assert_batches_are_repeatable(model, samples):
    """16 samples: what is drawn for each depends only on its own generator. -> the batch"""
    def batch(start, end, seed=0):
        rngs = [random.Random(f"{seed} {i}") for i in range(16)]
        return model.text_batch(samples[start:end], rngs[start:end], Letters())
    whole, again, other, parts = batch(0, 16), batch(0, 16), batch(0, 16, seed=1), (batch(0, 7), batch(7, 16))
    for name in whole:
        assert torch.equal(whole[name], again[name]) and not torch.equal(whole[name], other[name]), name
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts])), name
    assert model(some_images(16), **whole)["loss"].isfinite()
    return whole


def overfit(model, batch, steps, lr, without=()):
    """The losses of a batch before and after some steps. Every parameter but those gets a gradient in the first."""
    optimizer, history = torch.optim.AdamW(model.train().parameters(), lr=lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        losses = model(**batch)
        losses["loss"].backward()
        if not history:
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
                assert parameter.grad.abs().max() > 0 or name in without, name
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    model.eval()
    return history[0], history[-1]


def losses_and_gradients(model, batch):
    """-> {name: a vector of the loss and all its gradients}"""
    found = {}
    for name, loss in model(**batch).items():
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, materialize_grads=True)
        found[name] = torch.cat([loss.detach().view(1), *(x.flatten() for x in gradients)])
    return found


def work(rank, folder, module, name, config):
    """In a process of its own: the losses of half of each batch, averaged over both processes as DDP does it."""
    module = importlib.import_module(module)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2,
                            timeout=timedelta(seconds=100))
    model = getattr(module, name)(module.Config(**config)).double()
    weights, batches = torch.load(f"{folder}/batches.pt", weights_only=True)
    model.load_state_dict(weights)
    results = []
    for batch in batches:
        results.append(losses_and_gradients(model, {key: x.chunk(2)[rank] for key, x in batch.items()}))
        for x in results[-1].values():
            dist.all_reduce(x.div_(2))
    dist.barrier()
    dist.destroy_process_group()
    return [{key: x.numpy() for key, x in result.items()} for result in results]


def assert_two_processes_equal_one(module, model, batches, folder):
    """In all losses and gradients."""
    torch.save([model.state_dict(), batches], folder / "batches.pt")
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        context.set_forkserver_preload(["train", "pytest"])  # imported once for all pairs of processes
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        futures = [pool.submit(work, rank, folder, module.__name__, type(model).__name__, asdict(model.config))
                   for rank in range(2)]
        halves = [future.result(timeout=120) for future in futures]
    for batch, one, other in zip(batches, *halves, strict=True):
        expected = losses_and_gradients(model, batch)
        assert set(one) == set(expected)
        for name in expected:
            assert np.array_equal(one[name], other[name])
            torch.testing.assert_close(torch.from_numpy(one[name]), expected[name], rtol=1e-9, atol=1e-13)


# --- published shapes, and a run's checkpoint ---

def load_published(Model, entry, name):
    """A checkpoint with the published names and shapes, but without memory, as a training run may have wrapped it."""
    with gzip.open(Path(__file__).parent / "golden" / "shapes.json.gz") as file:
        entry = json.load(file)[entry]
    with torch.device("meta"):
        state = {f"module._orig_mod.{key}": torch.empty(shape) for key, shape in entry["keys"].items()}
        model = Model.from_pretrained({"epoch": 3, "state_dict": state}, name)
    assert sum(p.numel() for p in model.parameters()) == entry["params"]
    return model.config, entry["params"]


def save_run(model, folder):
    """A checkpoint as train.py writes it, whose tokenizer's 260 ids are bytes; a picture. -> their paths, the pixels"""
    torch.save({"model": "of a test", "config": asdict(model.config), "tokenizer": {"kind": "bpe", "merges": []},
                "weights": model.state_dict(), "args": {}}, folder / "best.pt")
    pixels = some_images(1)
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(folder / "cat.png")
    return str(folder / "best.pt"), str(folder / "cat.png"), pixels
