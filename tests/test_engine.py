"""One global batch, however it is split: over processes, microbatches, or both; and what else the engine does."""
import json
import math
import os
import random
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import train

ROOT = Path(train.__file__).parent

# Three steps of every model in float64, under any number of processes. Names of the files: MODEL-PROCESSES-MICROBATCH.
STEPS = """
import sys
sys.path.insert(0, sys.argv[1])
import json, os, warnings
import numpy as np, torch, torch.distributed as dist
import data, train
from dataclasses import replace
from torch.nn.parallel import DistributedDataParallel

warnings.filterwarnings("ignore", message="texts of more than")
world, sizes = int(os.environ["WORLD_SIZE"]), json.loads(sys.argv[2])
if world > 1:
    dist.init_process_group("gloo")
scenes = [data.make_scene(f"0/train/{i}") for i in range(16)]
samples = [data.Sample(data.captions(s), data.long_caption(s), data.web_caption(s)) for s in scenes]
tokenizer = data.BPE.train([t for s in samples for t in (*s.captions, s.long, s.web)], vocab_size=400)

def steps(name, size):
    home = train.home(train.MODELS[name])
    config = home.CONFIGS["koclip-tiny" if name == "koclip" else "tiny"]
    less = dict(dims=(16, 16, 16, 32), image_width=64, image_mlp=64, text_width=32, text_mlp=64, embed_dim=32)
    config = replace(config, vocab_size=len(tokenizer), **{key: less[key] for key in less if hasattr(config, key)})
    torch.manual_seed(0)
    model = train.MODELS[name](config).double().eval()  # without dropout, which no split could draw alike
    images = np.stack([data.draw(s, config.image_size) for s in scenes])
    loader = data.Loader(data.Split("here", images, samples, augment=False), 8,
                         lambda samples, rngs: model.text_batch(samples, rngs, tokenizer),
                         rank=train.rank(), world=train.world())
    optimizer = train.make_optimizer(model, 0.05)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    network = DistributedDataParallel(model) if train.world() > 1 and not size else model
    found = {}
    for step in range(3):
        batch = loader.batch_at(step)
        if size:
            losses = train.backward_in_parts(model, batch, size, torch.device("cpu"), "fp32", scaler, f"0/{step}")
        else:
            losses = network(**batch)
            losses["loss"].backward()
        found |= {f"{step} {term}": torch.tensor(train.mean_over_processes(x)) for term, x in losses.items()}
        if step == 0:
            found |= {f"gradient of {key}": p.grad.clone() for key, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    found |= {f"{key} after three steps": p.detach() for key, p in model.named_parameters()}
    if train.rank() == 0:
        torch.save(found, f"{name}-{world}-{size}.pt")

for name in train.MODELS:
    for size in sizes:
        steps(name, size)
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
"""
SPLITS = {1: [0, 3, 8], 2: [0, 3], 4: [0, 1]}  # processes: microbatches (0: none); of 8, 4 and 2 samples a process


def torchrun(processes, *command, cwd, **variables):
    """--standalone lets the system choose a free port, so that no other run on this machine is in the way."""
    return subprocess.run(command_of(processes, command), capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **variables})


def command_of(processes, command):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
            "--nproc_per_node", str(processes), *map(str, command)]


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """-> a folder with what three steps did to every model, for every split of the batch."""
    folder = tmp_path_factory.mktemp("splits")
    (folder / "steps.py").write_text(STEPS)
    running = []
    for processes, sizes in SPLITS.items():  # all at once: most of their time they spend on starting
        with open(folder / f"{processes}.txt", "w") as said:
            running.append(subprocess.Popen(command_of(processes, ["steps.py", ROOT, json.dumps(sizes)]), cwd=folder,
                                            stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    assert [process.wait() for process in running] == [0, 0, 0], \
        "".join((folder / f"{processes}.txt").read_text()[-2000:] for processes in SPLITS)
    return folder


@pytest.mark.parametrize("processes, size", [(n, size) for n, sizes in SPLITS.items() for size in sizes][1:])
@pytest.mark.parametrize("name", train.MODELS)
def test_a_batch_is_the_same_however_it_is_split(splits, name, processes, size):
    whole = torch.load(splits / f"{name}-1-0.pt", weights_only=True)
    split = torch.load(splits / f"{name}-{processes}-{size}.pt", weights_only=True)
    assert whole.keys() == split.keys()
    for key in whole:
        scale = 1.0 if "three" in key else max(whole[key].norm().item(), 1e-6)  # Adam makes as much of tiny gradients
        assert (whole[key] - split[key]).norm() <= 1e-9 * scale, key


def small(name, **changes):
    """A small model of any kind, a tokenizer and a batch of eight samples."""
    home = train.home(train.MODELS[name])
    scenes = [data.make_scene(f"0/train/{i}") for i in range(8)]
    samples = [data.Sample(data.captions(s), data.long_caption(s), data.web_caption(s)) for s in scenes]
    tokenizer = data.BPE.train([t for s in samples for t in (*s.captions, s.long, s.web)], vocab_size=400)
    torch.manual_seed(0)
    config = home.CONFIGS["koclip-tiny" if name == "koclip" else "tiny"]
    model = train.MODELS[name](replace(config, vocab_size=len(tokenizer), **changes))
    images = torch.stack([torch.from_numpy(data.draw(s, config.image_size)).permute(2, 0, 1) for s in scenes])
    rngs = [random.Random(i) for i in range(8)]
    return model, tokenizer, {"images": images, **model.text_batch(samples, rngs, tokenizer)}


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def in_parts(model, batch, size, precision="fp32", seed="0"):
    device, scaler = torch.device("cpu"), torch.amp.GradScaler("cpu", enabled=False)
    return train.backward_in_parts(model, batch, size, device, precision, scaler, seed)["loss"]


def test_adding_up_gradients_of_small_batches_would_be_something_else():
    model, _, batch = small("clip")
    in_parts(model, batch, 4)
    exact = gradients(model)
    for part in train.split_batch(batch, 4):
        (model(**part)["loss"] / 2).backward()
    added = gradients(model)
    assert all((exact[name] - added[name]).norm() > 0.1 * exact[name].norm() for name in exact
               if exact[name].norm() > 1e-6)


def test_dropout_is_the_same_in_both_passes():
    model, _, batch = small("liteclip", dropout=0.5)
    model.train()
    loss = in_parts(model, batch, 3, seed="5")
    found, encoded = gradients(model), []
    for number, part in enumerate(train.split_batch(batch, 3)):  # one graph over all parts
        torch.manual_seed(zlib.crc32(f"5/{number}".encode()))
        encoded.append(model.encode(**part))
    expected = model.loss(**{name: torch.cat([part[name] for part in encoded]) for name in encoded[0]})["loss"]
    expected.backward()
    assert torch.allclose(loss, expected)
    for name, grad in gradients(model).items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-8, name
    assert not torch.allclose(in_parts(model, batch, 3, seed="6"), expected)  # there is dropout


@pytest.mark.parametrize("name", train.MODELS)
def test_microbatches_in_bf16_are_as_near_as_bf16_is(name):
    model, _, batch = small(name)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch)["loss"]
    loss.backward()
    whole = gradients(model)
    assert torch.allclose(in_parts(model, batch, 3, "bf16"), loss, rtol=1e-2)
    found = gradients(model)
    assert all(grad.dtype == torch.float32 for grad in found.values())
    error = sum((found[key] - whole[key]).square().sum() for key in whole).sqrt()
    assert error <= 0.05 * sum(grad.square().sum() for grad in whole.values()).sqrt()


# --- memory and speed, which change nothing ---

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
    model, _, batch = small(name)
    model.train()
    names = list(model.state_dict())
    torch.manual_seed(1)
    before, losses = saved_bytes(lambda: model(**batch))
    losses["loss"].backward()
    expected = gradients(model)
    train.recompute_blocks(model)
    torch.manual_seed(1)
    after, losses = saved_bytes(lambda: model(**batch))
    losses["loss"].backward()
    assert after < 0.7 * before
    assert list(model.state_dict()) == names
    for key, grad in gradients(model).items():
        assert torch.allclose(grad, expected[key], rtol=1e-5, atol=1e-7), key


@pytest.mark.parametrize("name", train.MODELS)
def test_compiled_towers_change_nothing(name, monkeypatch):
    """Traced as with --compile, though not turned into machine code, for which one would wait for minutes."""
    torch._dynamo.reset()
    model, _, batch = small(name)
    names = list(model.state_dict())
    model(**batch)["loss"].backward()
    expected = gradients(model)
    for tower in model.children():
        tower.compile(backend="aot_eager")
    model(**batch)["loss"].backward()
    assert list(model.state_dict()) == names
    for key, grad in gradients(model).items():
        assert torch.allclose(grad, expected[key], rtol=1e-4, atol=1e-6), key


# --- runs ---

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """20 pictures of shapes as somebody's own data: 12 to train on, 4 and 4 to test."""
    folder = tmp_path_factory.mktemp("own")
    rows = ["image,caption,split"]
    for i in range(20):
        scene = data.make_scene(f"test/{i}")
        Image.fromarray(data.draw(scene)).save(folder / f"{i}.png")
        rows += [f'{i}.png,"{caption}",{("train", "train", "train", "val", "test")[i % 5]}'
                 for caption in data.captions(scene)]
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    return folder


def arguments(pictures, out, *more):
    return ["--model", "clip", "--data", str(pictures), "--config", "tiny", "--batch", "6", "--epochs", "3",
            "--precision", "fp32", "--cache", str(pictures / "cache"), "--out", str(out), *more]


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A run of three epochs, six steps, with no flag of this file's."""
    folder = tmp_path_factory.mktemp("run")
    train.main(arguments(pictures, folder))
    return torch.load(folder / "last.pt", weights_only=True)


def assert_near(one, two):
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-3, atol=2e-5), name


def test_two_processes_with_microbatches_and_a_shared_optimizer(run, pictures, tmp_path):
    flags = arguments(pictures, tmp_path / "out", "--microbatch", "2", "--shard-optimizer", "--recompute")
    result = torchrun(2, ROOT / "train.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    split = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert_near(run["weights"], split["weights"])
    one, two = run["optimizer"], split["optimizer"]  # whole, and of use for a run without the flag
    assert [g["params"] for g in one["param_groups"]] == [g["params"] for g in two["param_groups"]]
    assert one["state"].keys() == two["state"].keys()
    for number in one["state"]:
        assert torch.allclose(one["state"][number]["exp_avg"], two["state"][number]["exp_avg"], rtol=1e-2, atol=1e-5)


def test_a_shared_optimizer_goes_on_with_other_processes(run, pictures, tmp_path, monkeypatch):
    """Begun on one process without the flag, gone on with on two with it; and the copy of the moments is let go."""
    stopped_after_an_epoch(arguments(pictures, tmp_path / "out"), monkeypatch)
    result = torchrun(2, ROOT / "train.py", "--resume", tmp_path / "out", "--shard-optimizer", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    content = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert_near(run["weights"], content["weights"])
    assert [group["fused"] for group in run["optimizer"]["param_groups"]] == [True] * len(
        run["optimizer"]["param_groups"])
    assert not any(group["fused"] for group in content["optimizer"]["param_groups"])  # which it cannot be when shared


def test_what_cannot_be_compiled_gets_one_line(pictures, tmp_path, monkeypatch):
    torch._dynamo.reset()

    def failing(tower):
        def broken(*inputs):
            raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no compiler"), None)
        tower.forward = broken
    monkeypatch.setattr(torch.nn.Module, "compile", failing)
    with pytest.raises(SystemExit, match="train.py: --compile does not work here .*; go on without it"):
        train.main(arguments(pictures, tmp_path, "--compile"))


def test_a_profile_is_written(pictures, tmp_path, capsys):
    train.main(arguments(pictures, tmp_path, "--epochs", "5", "--profile"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])
    assert "trace of 3 steps" in capsys.readouterr().out
    train.main(["--eval", str(tmp_path / "best.pt")])
    assert "trace" not in capsys.readouterr().out


def test_a_run_too_short_for_a_profile_says_so(pictures, tmp_path, capsys):
    train.main(arguments(pictures, tmp_path, "--epochs", "2", "--profile"))
    assert not (tmp_path / "trace.json").exists()
    assert "no trace: it begins after 5 steps" in capsys.readouterr().out


def test_peak_memory_is_told(pictures, tmp_path, capsys):
    train.main(arguments(pictures, tmp_path, "--epochs", "1"))
    found = re.search(r"peak memory: ([\d.]+) GiB a process", capsys.readouterr().out)
    assert 0.1 < float(found[1]) < 20


class Stop(Exception):
    pass


def stopped_after_an_epoch(flags, monkeypatch):
    """A run that is lost after its first checkpoint."""
    keep = train.save

    def save_once(path, **content):
        keep(path, **content)
        if path.name == "last.pt":
            raise Stop
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", save_once)
        with pytest.raises(Stop):
            train.main(flags)


def test_a_restarted_job_goes_on(run, pictures, tmp_path, monkeypatch, capsys):
    """torchrun --max-restarts and SLURM's --requeue start the same command again."""
    flags = arguments(pictures, tmp_path)
    stopped_after_an_epoch(flags, monkeypatch)
    with pytest.raises(SystemExit, match="holds a run already"):  # the same command by hand is a mistake
        train.main(flags)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.main(flags)
    assert "goes on after step 2" in capsys.readouterr().out
    resumed = torch.load(tmp_path / "last.pt", weights_only=True)["weights"]
    assert all(torch.equal(resumed[name], run["weights"][name]) for name in resumed)
    train.main(flags)  # lost again, after its last checkpoint: what is left is the test
    assert "| clip tiny |" in capsys.readouterr().out


def test_a_restarted_job_does_not_go_on_with_anothers_run(pictures, tmp_path, monkeypatch, capsys):
    flags = arguments(pictures, tmp_path / "taken")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    stopped_after_an_epoch(flags, monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(SystemExit, match="holds a run already"):
        train.main(flags)
    monkeypatch.chdir(tmp_path)
    place = flags.index("--out")
    train.main([*flags[:place], *flags[place + 2:], "--epochs", "0.5"])
    assert "started again, but without --out nobody knows from where" in capsys.readouterr().out


def test_a_killed_process_is_started_again_by_torchrun(run, pictures, tmp_path):
    """torchrun ends the other process, too, and starts both again, which go on from the last checkpoint."""
    (tmp_path / "killed.py").write_text(KILLED)
    result = torchrun(2, "--max-restarts", "1", "killed.py", ROOT, *arguments(pictures, tmp_path / "out"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "goes on after step 2" in result.stdout and (tmp_path / "killed").exists()
    assert_near(run["weights"], torch.load(tmp_path / "out" / "last.pt", weights_only=True)["weights"])


KILLED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import os, signal, pathlib
import torch, train

asked = train.Interrupt.asked
def die(self, device, steps=[0]):  # after the third step, once: as if the system had killed one of the processes
    steps[0] += 1
    if steps[0] == 3 and os.environ["RANK"] == "1" and not pathlib.Path("killed").exists():
        pathlib.Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return asked(self, device)
train.Interrupt.asked = die
train.main(sys.argv[1:])
"""


# --- what a run says of itself ---

def said(watch, capsys, losses, scale=14.0):
    for loss in losses:
        watch.look({"loss": loss} if isinstance(loss, float) else loss, scale)
    return capsys.readouterr().out


def test_a_flat_loss_is_noticed_once(capsys):
    assert said(train.Watch(4.16, patience=5), capsys, [4.16, 4.17, 4.15, 4.16]) == ""
    watch = train.Watch(4.16, patience=5)
    assert "stays at 4.16" in said(watch, capsys, [4.16, 4.17, 4.15, 4.16, 4.16])
    assert said(watch, capsys, [4.16] * 9) == ""
    assert said(train.Watch(4.16, patience=5), capsys, [4.3, 4.25, 4.16, 4.1, 4.0, 3.9]) == ""  # on its way through


def test_of_several_terms_the_contrastive_one_is_watched(capsys):
    rows = [{"loss": 9.0 - i, "contrastive": 2.08, "captioning": 7.0 - i} for i in range(5)]
    assert "stays at 2.08" in said(train.Watch(2.08, patience=5), capsys, rows)


def test_a_scale_at_its_limit_is_noticed(capsys):
    watch = train.Watch(4.16)
    assert said(watch, capsys, [3.0], scale=99.0) == ""
    assert "limit of 100" in said(watch, capsys, [3.0], scale=100.0)
    assert said(watch, capsys, [3.0], scale=100.0) == ""
    assert said(train.Watch(4.16, scale=100.0), capsys, [3.0], scale=100.0) == ""  # as OpenAI's weights begin


@pytest.mark.parametrize("captions, said", [
    ([["a cat", "a dog"], ["a cat"], ["a bird"]], "50% of them are said of several pictures"),  # two of four
    ([["a cat", "a cat"], ["a dog"], ["a bird"]], None)])
def test_captions_of_several_pictures_are_noticed(captions, said, capsys):
    model, tokenizer, _ = small("clip")
    samples = [data.Sample(texts) for texts in captions]
    train.check_texts(model, tokenizer, data.Split("here", None, samples, augment=False))
    printed = capsys.readouterr().out
    assert said in printed if said else "several" not in printed


@pytest.mark.parametrize("name", train.MODELS)
def test_the_loss_of_a_model_that_tells_nothing_apart(name):
    """All features alike; the sigmoid losses at the best scale and bias that there is."""
    model, _, batch = small(name)
    features = {key: train.each(x, lambda y: y[:1].expand_as(y)) for key, x in model.encode(**batch).items()}
    if hasattr(model, "logit_bias"):
        model.logit_scale.data.fill_(-30.0)
        model.logit_bias.data.fill_(-math.log(7))
    losses = {name: x.item() for name, x in model.loss(**features).items()}
    contrast = next((x for name, x in losses.items() if name != "loss"), losses["loss"])
    assert contrast == pytest.approx(model.chance_loss(8), rel=1e-4)
