"""One global batch, however it is split: over processes, microbatches, or both; and what saves memory or time."""
import contextlib
import io
import math
import multiprocessing
import os
import random
import signal
import socket
import sys
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import shapes
import tokens
import train
from test_train import (arguments, assert_same, content, make_small, mistake, pictures, small, stopped,  # noqa: F401
                        with_signal)

FP32 = SimpleNamespace(device=torch.device("cpu"), precision="fp32", scaler=torch.amp.GradScaler("cpu", enabled=False))


# --- several processes, as under torchrun ---

def start(world, folder, function, *args):
    """Begin function(*args) in several processes; what they say goes into files of the folder."""
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        context.set_forkserver_preload(["train", "pytest"])  # imported once for all processes
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = [context.Process(target=as_process, daemon=True,
                             args=(rank, world, port, str(folder), function, *args))
             for rank in range(world)]
    for process in found:
        process.start()
    return found


def as_process(rank, world, port, folder, function, *args):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    make_small(pytest.MonkeyPatch())
    with open(Path(folder, f"said-{rank}.txt"), "w") as out, contextlib.redirect_stdout(out):
        function(*args)


def ends(processes):
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def example(name, **changes):
    """A small model of any kind, 16 pictures with captions, and what makes a text batch of them."""
    scenes = [shapes.make_scene(f"0/train/{i}") for i in range(16)]
    samples = [data.Sample(shapes.captions(s), shapes.long_caption(s), shapes.web_caption(s)) for s in scenes]
    tokenizer = tokens.BPE.train([t for s in samples for t in (*s.captions, s.long, s.web)], vocab_size=400)
    torch.manual_seed(0)
    config = train.home(name).CONFIGS["koclip-tiny" if name == "koclip" else "tiny"]
    changes = {key: value for key, value in changes.items() if hasattr(config, key)}
    model = train.MODELS[name](replace(config, vocab_size=len(tokenizer), **changes))
    images = np.stack([shapes.draw(s, config.image_size) for s in scenes])
    return (model, data.Split("here", images, samples, augment=False),
            lambda samples, rngs: model.text_batch(samples, rngs, tokenizer))


def two_steps(folder, sizes):
    """What two steps do to every model in float64, in MODEL-PROCESSES-MICROBATCH.pt."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for name, size in ((name, size) for name in train.MODELS for size in sizes):
        model, split, text_batch = example(name)
        model = model.double().eval()  # without dropout, which no split could draw alike
        loader = data.Loader(split, 8, text_batch, rank=train.rank(), world=train.world())
        optimizer = train.make_optimizer(model, 0.05)
        network = DistributedDataParallel(model) if train.world() > 1 and not size else model
        found = {}
        for step in range(2):
            if size:
                losses = train.backward_in_parts(model, loader.batch_at(step), size, FP32, f"0/{step}")
            else:
                losses = network(**loader.batch_at(step))
                losses["loss"].backward()
            means, _ = train.over_processes(losses, None)
            found |= {f"{step} {term}": torch.tensor(float(x), dtype=torch.double) for term, x in means.items()}
            if step == 0:
                found |= {f"gradient of {key}": p.grad.clone() for key, p in model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
        found |= {f"{key} after two steps": p.detach() for key, p in model.named_parameters()}
        with torch.no_grad():
            x = evaluate.spread(16, lambda rows: model.encode_image(evaluate.pixels(split.images, rows)), batch=3)
        found |= {f"features {i}": tensor for i, tensor in enumerate(x if isinstance(x, tuple) else (x,))}
        if train.rank() == train.world() - 1:  # the last one has the same as the first
            torch.save(found, f"{folder}/{name}-{train.world()}-{size}.pt")
    if train.world() > 1:
        dist.barrier()
        dist.destroy_process_group()


SPLITS = {1: [0, 3, 8], 2: [0, 3], 4: [0, 1]}  # processes: microbatches (0: none); of 8, 4 and 2 samples a process


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """-> a folder with what two steps did to every model, for every split of the batch."""
    folder = tmp_path_factory.mktemp("splits")
    running = [start(world, folder, two_steps, str(folder), SPLITS[world]) for world in (2, 4)]
    two_steps(folder, SPLITS[1])
    assert ends(sum(running, [])) == [0] * 6
    return folder


@pytest.mark.parametrize("name", train.MODELS)
def test_a_batch_is_the_same_however_it_is_split(splits, name):
    """Losses, gradients, parameters after two steps, and the features that are evaluated."""
    whole = content(splits / f"{name}-1-0.pt")
    for processes, size in [(processes, size) for processes in SPLITS for size in SPLITS[processes]][1:]:
        split = content(splits / f"{name}-{processes}-{size}.pt")
        assert whole.keys() == split.keys()
        for key in whole:
            scale = 1.0 if "two" in key else max(whole[key].norm().item(), 1e-6)  # Adam makes as much of tiny gradients
            assert (whole[key] - split[key]).norm() <= 1e-9 * scale, (processes, size, key)


# --- runs of several processes ---

@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """The folder of a run on one process with no flag of this file's. CLIP has no dropout, so all splits are alike."""
    folder = tmp_path_factory.mktemp("run")
    train.main(arguments(pictures, folder, "--model", "clip"))
    return folder


def assert_near(folder, other):
    a, b = content(folder / "last.pt"), content(other / "last.pt")
    assert a["step"] == b["step"] and a["tokenizer"] == b["tokenizer"]
    torch.testing.assert_close(a["weights"], b["weights"], rtol=1e-3, atol=2e-5)
    a, b = ({number: moments["exp_avg"] for number, moments in x["optimizer"]["state"].items()} for x in (a, b))
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)  # whole, though each process may have had a part of them


def train_until(step, number, argv):
    """A run whose second process gets a signal in that step."""
    with_signal(pytest.MonkeyPatch(), step, number, rank=1)
    train.main(argv)


def test_a_run_goes_on_with_other_processes_microbatches_and_a_sharded_optimizer(run, pictures, tmp_path):
    """One process, then two, of which one is asked to stop, then one: each takes over what the others left."""
    out = tmp_path / "out"
    stopped(arguments(pictures, out, "--model", "clip"), 2)
    flags = ["--resume", str(out), "--microbatch", "1", "--shard-optimizer", "--recompute"]
    assert ends(start(2, tmp_path, train_until, 4, signal.SIGTERM, flags)) == [128 + signal.SIGTERM] * 2
    assert "stopped after step 4 of 6" in (tmp_path / "said-0.txt").read_text()
    assert (tmp_path / "said-1.txt").read_text() == ""  # only one process talks
    assert content(out / "last.pt")["step"] == 4
    train.main(["--resume", str(out), "--no-recompute", "--microbatch", "0"])
    assert_near(run, out)


def test_when_a_process_is_killed_the_same_command_goes_on(run, pictures, tmp_path):
    """As torchrun --max-restarts does it: the other process is ended, too, and both are started again."""
    command = arguments(pictures, tmp_path / "out", "--model", "clip")
    command[command.index("--out")] = "--resume"
    one, other = start(2, tmp_path, train_until, 5, signal.SIGKILL, command)
    other.join(60)
    one.join(10)
    one.kill()
    assert ends([other, one])[0] == -signal.SIGKILL and one.exitcode != 0
    assert content(tmp_path / "out" / "last.pt")["step"] == 3
    assert ends(start(2, tmp_path, train.main, command)) == [0, 0]
    said = (tmp_path / "said-0.txt").read_text()
    assert "goes on after step 3 of 6" in said and said.count("| clip tiny |") == 1
    assert_near(run, tmp_path / "out")


def test_a_run_on_shards_resumes_bit_for_bit_and_with_other_processes(pictures, tmp_path):
    """Three shards of five pictures to train on; an epoch of eight, so that the second one ends a pass over them."""
    for i in range(20):
        with tarfile.open(tmp_path / f"{i // 5}.tar", "a") as tar:
            caption = tarfile.TarInfo(f"{i}.txt")
            caption.size = len(text := "\n".join(shapes.captions(shapes.make_scene(f"test/{i}"))).encode())
            tar.addfile(caption, io.BytesIO(text))
            tar.add(pictures / f"{i}.png", f"{i}.png")
    whole, half, other = (tmp_path / name for name in ("whole", "half", "other"))
    flags = ["--data", f"{tmp_path}/{{0..3}}.tar", "--model", "clip", "--samples", "8", "--epochs", "3"]
    train.main(arguments(tmp_path, whole, *flags))
    for folder in (half, other):
        stopped(arguments(tmp_path, folder, *flags), 3)
    train.main(["--resume", str(half)])
    assert_same(whole, half)
    assert ends(start(2, tmp_path, train.main, ["--resume", str(other)])) == [0, 0]
    assert_near(whole, other)


# --- one process: microbatches, and what saves memory or time ---

def batch_of(split, text_batch):
    images = torch.from_numpy(split.images[:8]).permute(0, 3, 1, 2)
    return {"images": images, **text_batch(split.samples[:8], [random.Random(i) for i in range(8)])}


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_is_the_same_in_both_passes(precision):
    model, *rest = example("liteclip", dropout=0.5)
    batch, of_run = batch_of(*rest), SimpleNamespace(**{**vars(FP32), "precision": precision})
    loss = train.backward_in_parts(model.train(), batch, 3, of_run, "5")["loss"]
    found, encoded = gradients(model), []
    with evaluate.autocast(torch.device("cpu"), precision):
        for number in range(3):  # one graph over all parts
            torch.manual_seed(zlib.crc32(f"5/{number}".encode()))
            encoded.append(model.encode(**{key: rows[3 * number:3 * number + 3] for key, rows in batch.items()}))
        expected = model.loss(**{name: torch.cat([part[name] for part in encoded]) for name in encoded[0]})["loss"]
    expected.backward()
    near = 1e-5 if precision == "fp32" else 2e-2
    assert torch.allclose(loss, expected)
    for name, grad in gradients(model).items():
        assert found[name].dtype == torch.float32 and (found[name] - grad).norm() <= near * grad.norm() + 1e-8, name
    assert not torch.allclose(train.backward_in_parts(model, batch, 3, of_run, "6")["loss"], expected)  # it does matter


def saved_bytes(function):
    """What a forward pass keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(kept.values()), result


@pytest.mark.parametrize("name", train.MODELS)
def test_recomputed_blocks_change_nothing_and_keep_less(name):
    model, *rest = example(name)  # KoCLIP and liteclip with dropout
    batch, names, found = batch_of(*rest), list(model.train().state_dict()), []
    for again in (False, True):
        if again:
            train.recompute_blocks(model)
        torch.manual_seed(1)
        kept, losses = saved_bytes(lambda: model(**batch))
        losses["loss"].backward()
        found.append((kept, gradients(model)))
    (before, expected), (after, grads) = found
    assert after < 0.7 * before and list(model.state_dict()) == names
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["liteclip", "prolip", "llip"])  # the others have towers of the same blocks
def test_compiled_towers_change_nothing(name):
    """Traced as with --compile, but not turned into machine code, which would take minutes."""
    torch._dynamo.reset()
    model, *rest = example(name, image_layers=1, text_layers=1)
    batch, names = batch_of(*rest), list(model.eval().state_dict())
    model(**batch)["loss"].backward()
    expected = gradients(model)
    for tower in model.children():
        tower.compile(backend="eager", fullgraph=True)
    model(**batch)["loss"].backward()
    assert list(model.state_dict()) == names
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_compiled_gets_one_line(pictures, tmp_path, monkeypatch):
    def failing(tower):
        def broken(*inputs):
            raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no compiler"), None)
        tower.forward = broken
    monkeypatch.setattr(torch.nn.Module, "compile", failing)
    said = mistake(train.main, *arguments(pictures, tmp_path, "--compile"))
    assert said.startswith("train.py: --compile does not work here") and "go on without it" in said


@pytest.mark.parametrize("name", train.MODELS)
def test_the_loss_of_a_model_that_tells_nothing_apart(name):
    """All features alike; the sigmoid losses at the best scale and bias that there is."""
    model, *rest = example(name)
    encoded = model.eval().encode(**batch_of(*rest))
    features = {key: evaluate.each(x, lambda y: y[:1].expand_as(y)) for key, x in encoded.items()}
    if hasattr(model, "logit_bias"):
        model.logit_scale.data.fill_(-30.0)
        model.logit_bias.data.fill_(-math.log(7))
    losses = {name: x.item() for name, x in model.loss(**features).items()}
    contrast = next((x for name, x in losses.items() if name != "loss"), losses["loss"])
    assert contrast == pytest.approx(train.chance_loss(model, 8), rel=1e-4)
