"""Train any of the models, evaluate it, go on where a run stopped, search pictures with it.

    python train.py                                          # liteclip tiny on generated pictures: 3 minutes
    python train.py --model liteclip --data flickr8k         # real photographs, from ImageNet and BERT-mini weights
    python train.py --model liteclip --data my_pictures.csv --epochs 20
    python train.py --resume runs/liteclip-shapes            # goes on bit for bit (on a CPU), all settings as they were
    python train.py --eval runs/liteclip-shapes/best.pt      # figures and picture again, from the checkpoint alone
    python train.py --search runs/liteclip-shapes/best.pt my_pictures "a red star"     # the best matches, and a sheet
    torchrun --nproc_per_node 8 train.py --model liteclip --data flickr8k      # eight GPUs, the same global batch

A run writes into its folder: last.pt (every epoch, and when interrupted), best.pt (by mean validation R@1), log.csv,
retrieval.png. The order of the pictures and the captions, crops and dropout of a step follow from (seed, step) alone,
and so does the learning rate: to resume is to load weights and optimizer and to start counting at another step. (With
tar shards, also to know how far each reader was.)
"""
import argparse
import collections
import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import math
import os
import random
import shlex
import signal
import sys
import time
import warnings
import zlib
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import clip
import clips
import data
import liteclip
import llip
import prolip
from data import UserError, say

MODELS = {"clip": clip.CLIP, "koclip": clip.KoCLIP, "liteclip": liteclip.LiteCLIP, "prolip": prolip.ProLIP,
          "llip": llip.Llip, "clips": clips.CLIPS}


def home(Model):
    """The file of a model, with its RECIPES and what it knows of published weights."""
    return sys.modules[Model.__module__]


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


# === device and precision ============================================================================================

def from_all(value):
    """A value of plain types from each process, as a list."""
    values = [value]
    if world() > 1:
        values = [None] * world()
        dist.all_gather_object(values, value)
    return values


def first_on_each_machine(function):
    """Call it in one process a machine, then in the others: the first one builds the caches and downloads."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = function() if first else None
    if world() > 1:
        dist.barrier()
    return result if first else function()


def mean_over_processes(value):
    value = value.detach().clone()
    if world() > 1:
        dist.all_reduce(value)
    return value.item() / world()


def pick_device():
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    alone = "RANK" not in os.environ  # processes cannot exchange what lies on Apple's GPU
    return torch.device("mps" if alone and torch.backends.mps.is_available() else "cpu")


def pick_precision(device, asked=None):
    """"bf16", "fp16" or "fp32": what was asked for, else bf16 where the hardware computes in it, fp16 on older GPUs."""
    if asked:
        if asked == "fp16" and device.type == "cpu":
            raise UserError("--precision fp16 needs a GPU (its gradients need a scaler); on a CPU use bf16 or fp32")
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        return "bf16"  # without these instructions bf16 is emulated, and slower than fp32
    return "fp32"


def autocast(device, precision):
    """The context of every encoder call. Weights stay fp32; the models leave it for lengths, logits and losses."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


# === evaluation ======================================================================================================

def spread(n, encode, batch=256):
    """encode(rows) for rows 0 to n - 1 in batches, shared out over the processes -> all features, in order, everywhere.

    Features are a tensor or a named tuple of tensors; they come to rest on the CPU.
    """
    parts = {first: each(encode(range(first, min(first + batch, n))), torch.Tensor.cpu)
             for first in range(rank() * batch, n, world() * batch)}
    parts = {first: part for some in from_all(parts) for first, part in some.items()}
    return join([parts[first] for first in sorted(parts)])


def each(features, function):
    """A function of features, which are a tensor or a named tuple of tensors."""
    return type(features)(*map(function, features)) if isinstance(features, tuple) else function(features)


def join(parts):
    """Features of several batches, one after the other."""
    return type(parts[0])(*map(torch.cat, zip(*parts))) if isinstance(parts[0], tuple) else torch.cat(parts)


def flat(features):
    """The tensors of features, in a tuple."""
    return features if isinstance(features, tuple) else (features,)


def take(features, device, rows=slice(None)):
    """Some rows of features, or all, on the device."""
    return each(features, lambda tensor: tensor[rows].to(device))


@torch.no_grad()
def encode_split(model, tokenizer, split, precision):
    """-> image features (I), text features (T) of every caption, owner (T,): the number of each caption's image."""
    model.eval()
    device = model.logit_scale.device
    texts = [caption for sample in split.samples for caption in sample.captions]
    owner = torch.tensor([i for i, sample in enumerate(split.samples) for _ in sample.captions])
    with autocast(device, precision):
        image_features = spread(len(split), lambda rows: model.encode_image(pixels(split.images, rows).to(device)))
        text_features = spread(len(texts), lambda rows: model.encode_text(
            model.tokenize([texts[i] for i in rows], tokenizer).to(device)))
    return image_features, text_features, owner


def pixels(images, rows):
    """The rows (a range) of uint8 (N, S, S, 3) in NumPy -> (n, 3, S, S) in torch, in the same layout: channels last."""
    return torch.from_numpy(np.array(images[rows.start:rows.stop])).permute(0, 3, 1, 2)


@torch.no_grad()
def retrieval(model, image_features, text_features, owner, chunk=256):
    """Recall at 1, 5 and 10 over a whole gallery, in both directions, in percent.

    i2t_r5: the share of images with at least one of their own captions among the five most similar of all captions.
    t2i_r5: the share of captions whose own image is among the five most similar of all images.
    What is as similar as the right one counts as more similar, and so does NaN: a collapsed model scores zero, not 100.
    """
    device = model.logit_scale.device
    images, texts = len(owner.unique()), len(owner)
    own = owner.to(device)
    image_ranks, text_ranks = [], []
    all_images, all_texts = take(image_features, device), take(text_features, device)
    for first in range(0, images, chunk):
        rows = torch.arange(first, min(first + chunk, images))
        table = model.similarity(take(image_features, device, rows), all_texts)  # (i, T)
        mine = own[None] == rows.to(device)[:, None]
        best = table.masked_fill(~mine, -math.inf).amax(dim=1, keepdim=True)
        image_ranks.append((~(table < best) & ~mine).sum(dim=1))  # not table >= best: so that NaN counts
    for first in range(0, texts, chunk):
        rows = torch.arange(first, min(first + chunk, texts))
        table = model.similarity(all_images, take(text_features, device, rows))  # (I, t)
        right = table.gather(0, own[rows][None])
        text_ranks.append((~(table < right)).sum(dim=0) - 1)
    result = {}
    for direction, ranks in (("i2t", torch.cat(image_ranks)), ("t2i", torch.cat(text_ranks))):
        for k in (1, 5, 10):
            result[f"{direction}_r{k}"] = 100 * (ranks < k).float().mean().item()
    return result


@torch.no_grad()
def zero_shot(model, tokenizer, task, precision):
    """Accuracy in percent, for each group of pictures. A class scores the mean similarity of its prompts."""
    model.eval()
    similarity = getattr(model, "classify", model.similarity)  # where classes are told apart by another measure
    device = model.logit_scale.device
    prompts = [prompt for prompts in task.prompts for prompt in prompts]
    with autocast(device, precision):
        image_features = spread(len(task.images), lambda rows: model.encode_image(pixels(task.images, rows).to(device)))
        text_features = model.encode_text(model.tokenize(prompts, tokenizer).to(device))
    found = []
    for first in range(0, len(task.images), 256):
        table = similarity(take(image_features, device, slice(first, first + 256)), text_features)
        table = table.view(len(table), len(task.prompts), -1)  # (images, classes, prompts)
        found.append(table.mean(dim=2).argmax(dim=1).cpu())
    right = torch.cat(found).numpy() == task.labels
    groups = {f"zs_{name}": 100 * right[mask].mean() for name, mask in task.groups.items()}
    return {"zs_all": 100 * right.mean(), **groups}


def evaluate(model, tokenizer, split, task, precision):
    features = encode_split(model, tokenizer, split, precision)
    scores = retrieval(model, *features)
    if task:
        scores |= zero_shot(model, tokenizer, task, precision)
    return {name: float(value) for name, value in scores.items()}, features


def describe(scores):
    text = "; ".join(f"{name} R@1/5/10 " + " / ".join(f"{scores[f'{key}_r{k}']:.1f}" for k in (1, 5, 10))
                     for name, key in (("image to text", "i2t"), ("text to image", "t2i")))
    if "zs_all" in scores:
        text += "; zero-shot {zs_all:.1f} (seen pairs {zs_seen:.1f}, unseen {zs_unseen:.1f})".format(**scores)
    return text


def gallery(split):
    texts = sum(len(sample.captions) for sample in split.samples)
    return (f"{split.name}: {len(split)} images x {texts} captions; chance R@1 is {100 / len(split):.2f} % "
            "(an image may find any caption of its own)")


def draw_retrieval(path, model, split, pictures, features, rows=6):
    """A picture: captions, each with the five images most similar to it; its own image is framed in green.

    pictures: uint8 (N, S, S, 3), what to show of each image of the split, at any size.
    """
    image_features, text_features, owner = features
    device = model.logit_scale.device
    captions = [caption for sample in split.samples for caption in sample.captions]
    chosen = []
    for i in torch.linspace(0, len(split) - 1, min(rows, len(split))).long().tolist():  # the longest caption of each
        chosen.append(max((t for t in range(len(owner)) if owner[t] == i), key=lambda t: len(captions[t])))
    with torch.no_grad():
        table = model.similarity(take(image_features, device), take(text_features, device, chosen)).T.cpu()
    side, gap, text_height = 128, 12, 44
    texts = [captions[t] for t in chosen]
    font, small = load_font(15, "".join(texts)), ImageFont.load_default(11)
    if font is None:
        say("no font for Hangul here (NotoSansCJK or NanumGothic, for example), so the picture numbers its captions: "
            + "; ".join(f"({i + 1}) {text}" for i, text in enumerate(texts)))
        font, texts = ImageFont.load_default(15), [f"caption {i + 1}" for i in range(len(texts))]
    sheet = Image.new("RGB", (5 * (side + gap) + gap, len(chosen) * (side + text_height + 3 * gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, t in enumerate(chosen):
        y = gap + row * (side + text_height + 3 * gap)
        lines = [""]
        for word in texts[row].split():  # two lines at most, both just above the images
            longer = f"{lines[-1]} {word}".strip()
            fits = pen.textlength(longer, font=font) < sheet.width - 4 * gap
            lines[-1:] = [longer] if fits else [lines[-1], word]
        text = "\n".join(lines[:2]) + (" ..." if len(lines) > 2 else "")
        pen.multiline_text((gap, y + text_height - 6), text, fill="black", font=font, anchor="ld", spacing=3)
        for column, i in enumerate(table[row].argsort(descending=True)[:5].tolist()):
            x, top = gap + column * (side + gap), y + text_height
            sheet.paste(Image.fromarray(pictures[i]).resize((side, side), Image.BICUBIC), (x, top))
            pen.text((x, top + side + 4), f"similarity {table[row, i]:.2f}", fill="gray", font=small)
            if i == owner[t]:
                pen.rectangle((x - 4, top - 4, x + side + 3, top + side + 3), outline=(30, 160, 60), width=4)
    sheet.save(path)


def load_font(size, text):
    """Pillow's own font; for Hangul the first of the usual system fonts that is here, or None."""
    if any("\uac00" <= c <= "\ud7a3" for c in text):
        for name in ("NotoSansCJK-Regular.ttc", "NanumGothic.ttf", "AppleSDGothicNeo.ttc", "malgun.ttf"):
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
        return None
    return ImageFont.load_default(size)


# === checkpoints =====================================================================================================

def save(path, **content):
    """Write a checkpoint, whole or not at all; plain types and tensors only, so that loading it runs no code."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        data.write_atomically(path, buffer.getbuffer())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. The checkpoint that was there before is untouched; "
                        "make room, then go on with --resume") from None


def released_names():
    """The names of released weights that are known here: "clip/vit-b-32" and the like, as MODEL/SIZE."""
    return [f"{model}/{size}" for model, Model in MODELS.items() for size in home(Model).sizes(Model)
            if size in getattr(home(Model), "PUBLISHED", {})]


def released(path):
    """("clip", "vit-b-32") for the name "clip/vit-b-32" of released weights; None for anything else."""
    name = Path(path).as_posix()
    return tuple(name.split("/")) if name in released_names() and not Path(path).exists() else None


def read_checkpoint(path, cache="data/cache"):
    """What a checkpoint of train.py holds, or what it would hold for the name of released weights."""
    if released(path):
        return read_released(*released(path), cache)
    path, hint = Path(path), f"released weights go by name: {', '.join(released_names())}"
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; {hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for a file that is none
        raise UserError(f"{path} is no checkpoint of train.py ({type(error).__name__}); {hint}") from None
    if not isinstance(content, dict) or not {"model", "config", "tokenizer", "weights", "args"} <= set(content):
        raise UserError(f"{path} is no checkpoint of train.py; published weights are for the models' from_pretrained")
    if content["model"] not in MODELS:
        raise UserError(f"{path} holds a model {content['model']!r}; known: {', '.join(MODELS)}")
    return content


def read_released(model, size, cache):
    Model, recipe = MODELS[model], home(MODELS[model]).RECIPES[size]
    files = data.fetch(home(Model).PUBLISHED[size], cache)
    try:
        weights = Model.from_pretrained(files["source"], size)
        tokenizer = data.read_vocabulary(recipe["tokenizer"], files["vocab"])
    except ValueError as error:
        raise UserError(f"{model}/{size}: {error}") from None
    return {"model": model, "config": asdict(weights.config), "tokenizer": tokenizer.state(),
            "weights": weights.state_dict(), "args": saved_flags(f"{model}/{size}"), "step": 0, "minutes": 0.0}


def saved_flags(path):
    """The flags that a checkpoint was made with; for released weights, which need not be opened for that, a few."""
    if not released(path):
        return read_checkpoint(path)["args"]
    model, size = released(path)
    return {"model": model, "config": size, "data": home(MODELS[model]).RECIPES[size].get("data", "shapes")}


def load(path, device="cpu", cache="data/cache", content=None):
    """A checkpoint -> (model in evaluation mode, tokenizer, preprocess), all that is needed to use it.

    path: of a file that train.py wrote, or the name of released weights, such as "clip/vit-b-32", which are downloaded
    into `cache`; content: what `read_checkpoint` made of it, where that is at hand.
    preprocess(picture): a path, bytes or a PIL image -> uint8 (3, S, S); encode_image takes a batch of them.
    """
    content = content or read_checkpoint(path, cache)
    Model = MODELS[content["model"]]
    try:
        model = Model(Model.Config(**content["config"]))
        home(Model).load_strictly(model, content["weights"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} was written by another version of {home(Model).__name__}.py: {error}") from None
    tokenizer = data.tokenizer_from(content["tokenizer"])
    return model.eval().to(device), tokenizer, functools.partial(preprocess, model.config)


def preprocess(config, picture):
    try:
        image = data.read_picture(picture, config.image_size, getattr(config, "fit", "crop"))
    except data.PictureError as error:
        raise UserError(f"{'the picture' if isinstance(picture, bytes) else picture}: {error}") from None
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


# === training ========================================================================================================

def learning_rate(step, steps, peak, warmup):
    """Linear up to the peak over the first `warmup` of the steps, then half a cosine down to zero."""
    ramp = round(warmup * steps)
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def make_optimizer(model, weight_decay, image_lr=1.0, shard=False):
    """AdamW; no decay on gains, biases, embeddings and logit_scale, which a pull to zero would not make simpler.

    image_lr: the learning rate of the image tower's matrices, as a multiple of the others'.
    shard: whether each process keeps the moments of its part of the parameters alone, and updates these for all.
    """
    groups = {}
    for name, p in model.named_parameters():
        decay = p.ndim >= 2 and "embedding" not in name
        scale = image_lr if decay and name.startswith("image_encoder.") else 1.0
        groups.setdefault((decay, scale), []).append(p)
    groups = [{"params": params, "weight_decay": weight_decay * decay, "scale": scale}
              for (decay, scale), params in groups.items()]
    options = dict(betas=(0.9, 0.98), eps=1e-6)
    if shard and world() > 1:  # not fused: on a GPU, what it loads would lie where fused AdamW does not look for it
        from torch.distributed.optim import ZeroRedundancyOptimizer  # not at the top: it takes a second to import
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
    return torch.optim.AdamW(groups, fused=model.logit_scale.device.type in ("cuda", "cpu"), **options)


def split_batch(batch, size):
    """The batch in parts of `size` samples, the last one with what is left."""
    return [{name: rows[i:i + size] for name, rows in batch.items()} for i in range(0, len(batch["images"]), size)]


def backward_in_parts(model, batch, size, device, precision, scaler, seed):
    """The loss of a whole batch and its gradient, with the activations of only `size` samples in memory at a time.

    To add up gradients of small batches would be another loss, as none of their pictures would ever be compared with
    the captions of another part. Here all are compared (GradCache: Gao et al., arXiv 2101.06983): encode the parts
    without a graph, take the loss of all features and its gradient at each of them, then encode the parts again and
    send each feature's gradient on. It costs a second forward pass. seed: what dropout draws from, the same both times.
    """
    parts = split_batch(batch, size)

    def encode(number):
        torch.manual_seed(zlib.crc32(f"{seed}/{number}".encode()))
        with autocast(device, precision):
            return model.encode(**parts[number])

    with torch.no_grad():
        encoded = [encode(number) for number in range(len(parts))]
    # The features of the whole batch, as leaves of a graph of their own, in which there is nothing but the loss.
    whole = {name: each(join([part[name] for part in encoded]), lambda x: x.requires_grad_(x.is_floating_point()))
             for name in encoded[0]}  # counts and masks have no gradient
    with autocast(device, precision):
        losses = model.loss(**whole)
    scaler.scale(losses["loss"]).backward()
    done = dict.fromkeys(whole, 0)
    for number in range(len(parts)):
        tensors, grads = [], []
        for name, features in encode(number).items():
            first, done[name] = done[name], done[name] + len(flat(features)[0])
            for tensor, of_all in zip(flat(features), flat(whole[name])):
                if tensor.requires_grad and of_all.grad is not None:
                    tensors.append(tensor)
                    grads.append(of_all.grad[first:done[name]])
        torch.autograd.backward(tensors, grads)
    if world() > 1:  # what DistributedDataParallel does in its one backward pass
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for sending in [dist.all_reduce(parameter.grad, async_op=True) for parameter in model.parameters()]:
            sending.wait()
        for parameter in model.parameters():
            parameter.grad /= world()
    return losses


def recompute_blocks(model):
    """Keep only the inputs of the towers' blocks for the backward pass, which computes the rest again."""
    for name, layers in model.named_modules():
        for block in layers if name.endswith("blocks") else []:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def peak_memory(device):
    """Bytes: what this process has had allocated at most, on its GPU or, on a CPU, in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):  # there is none on Windows
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class Interrupt:
    """In a with block, SIGINT and SIGTERM ask the loop to stop after its step; the second one stops at once."""
    def __enter__(self):
        self.signal, self.before = None, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread, as in some notebooks
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def asked(self, device):
        """Whether any process was asked, so that all of them stop after the same step. On several GPUs this waits for
        the step to be done."""
        if world() == 1:
            return bool(self.signal)
        flag = torch.tensor(float(bool(self.signal)), device=device)
        dist.all_reduce(flag)
        return bool(flag)


class Watch:
    """Says, once each, what in a run's figures wants a look.

    chance: the contrastive loss of a model that tells nothing apart; scale: exp(logit_scale) at the start.
    """
    def __init__(self, chance, scale=1.0, patience=10):
        self.chance, self.said = chance, {"scale"} if scale > 99 else set()  # OpenAI's weights begin at the limit
        self.recent = collections.deque(maxlen=patience)

    def look(self, terms, scale):
        """terms: a step's losses by name, the contrastive one first of its parts; scale: exp(logit_scale)."""
        self.recent.append(next((value for name, value in terms.items() if name != "loss"), terms["loss"]))
        if len(self.recent) == self.recent.maxlen and all(
                abs(loss - self.chance) < 0.01 * self.chance for loss in self.recent):
            self.say("flat", f"the contrastive loss stays at {self.chance:.2f}, that of a model to which all pictures "
                             "and all captions are alike. A lower --lr or a longer --warmup may help; and do the "
                             "captions belong to their pictures?")
        if scale > 99.9:
            self.say("scale", "the logit scale has reached its limit of 100. Late in a run that is usual; early, it "
                              "says that the model learns by heart: fewer --epochs, or more pictures")

    def say(self, kind, text):
        if kind not in self.said:
            self.said.add(kind)
            if rank() == 0:
                tqdm.write(f"note: {text}")


@contextlib.contextmanager
def profile(path, wait=3, warmup=2, active=3):
    """torch's profiler over a few steps, whose trace goes to `path`, for ui.perfetto.dev; without a path, nothing."""
    if path is None:
        yield SimpleNamespace(step=lambda: None)
        return
    path.unlink(missing_ok=True)
    with torch.profiler.profile(schedule=torch.profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=1),
                                on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path))) as profiler:
        yield profiler
    say(f"trace of {active} steps: {path}, for ui.perfetto.dev" if path.exists() else
        f"no trace: it begins after {wait + warmup} steps, and this run had fewer")


class Log:
    """log.csv: a row now and then, with the validation figures in the last row of an epoch.

    terms: the names of what a model's loss is the sum of, a column each.
    """
    def __init__(self, path, step=0, terms=()):
        self.path = path
        self.columns = ["step", "epoch", "samples", "loss", *terms, "lr", "logit_scale", "images_per_s", "wait",
                        *(f"{d}_r{k}" for d in ("i2t", "t2i") for k in (1, 5, 10)), "zs_all", "zs_seen", "zs_unseen"]
        kept = []
        if step and path.exists():  # resumed: what was logged after the checkpoint will be logged again
            with open(path, newline="") as file:
                kept = [row for row in csv.DictReader(file)
                        if (row.get("step") or "").isdecimal() and int(row["step"]) <= step]
        content = io.StringIO()
        writer = csv.DictWriter(content, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        data.write_atomically(path, content.getvalue().encode())

    def write(self, **row):
        row = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        try:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        except OSError as error:  # a lost row is no reason to lose the run
            say(f"cannot write {self.path}: {error.strerror}")


def make_model(args, Model, config, recipe, texts):
    """-> model, tokenizer: from the files of the recipe, or fresh with a tokenizer trained on the captions."""
    if recipe.get("files") and not args.scratch:
        try:
            files = data.fetch(recipe["files"], args.cache)
        except UserError as error:
            raise UserError(f"{error}; or train from random weights with --scratch") from None
        paths = ", ".join(map(str, files.values()))
        try:
            tokenizer = data.read_vocabulary(recipe["tokenizer"], files.pop("vocab"))
            start = Model.from_pretrained if "source" in files else Model.from_backbones
            return start(**files, config=config), tokenizer
        except ValueError as error:
            raise UserError(f"{error}\nDelete what is wrong, of {paths}, to download it again; or use "
                            "--scratch") from None
    tokenizer = data.BPE.train(texts, vocab_size=min(config.vocab_size, 8192))
    special = {name: getattr(tokenizer, name) for name in ("pad_id", "start_id", "end_id", "mask_id", "class_id")
               if hasattr(config, name)}
    return Model(replace(config, vocab_size=len(tokenizer), **special)), tokenizer


def check_texts(model, tokenizer, split):
    """Say how long the captions are in tokens, and how many are cut; of many captions, by 10,000 of them."""
    texts = [caption for sample in split.samples for caption in sample.captions]
    number, texts = len(texts), random.Random(0).sample(texts, min(len(texts), 10_000))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = model.tokenize(texts, tokenizer)
    warnings.filterwarnings("ignore", message="texts of more than")  # said here, once, for all of them
    length = (tokens != tokenizer.pad_id).sum() / len(texts)
    pictures = collections.Counter(text for sample in split.samples for text in set(sample.captions))
    shared = sum(number for number in pictures.values() if number > 1) / sum(pictures.values())
    where = "captions of the first shard" if isinstance(split, data.Shards) else "captions"
    say(f"{where}: {number:,} of {length:.1f} tokens on average; vocabulary {len(tokenizer):,}"
        + (f"; {shared:.0%} of them are said of several pictures, and count as wrong for each other's in a batch"
           if shared > 0.1 else "") + "".join(f"; {w.message}" for w in caught))


def choose(args):
    """The model's class, configuration and recipe; flags that were not given get the recipe's values."""
    if args.model not in MODELS:
        raise UserError(f"--model {args.model}: unknown; known: {', '.join(MODELS)}")
    Model = MODELS[args.model]
    sizes = list(home(Model).sizes(Model))
    generated = args.data is None or args.data in data.GENERATED
    args.config = args.config or next(name for name in sizes if not generated or name.endswith("tiny"))
    if args.config not in sizes:
        known = ", ".join(sizes)
        raise UserError(f"--config {args.config}: {args.model} has no such configuration; known: {known}")
    recipe = home(Model).RECIPES[args.config]
    recipe = {**recipe, **recipe.get("scratch", {})} if args.scratch else recipe
    args.data = args.data or recipe.get("data", "shapes")
    for name in ("batch", "epochs", "lr", "image_lr", "weight_decay", "warmup"):
        if getattr(args, name) is None:
            setattr(args, name, recipe[name])
    if not 0 <= args.warmup < 1:
        raise UserError(f"--warmup {args.warmup}: a fraction of the run, 0 <= warmup < 1; else --lr is never reached")
    for name in ("epochs", "lr", "image_lr"):
        if not 0 < getattr(args, name) < 1e9:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a number above zero (and below "
                            "a billion)")
    if not 0 <= args.weight_decay < math.inf:
        raise UserError(f"--weight-decay {args.weight_decay}: expected zero or more")
    for name, least in (("samples", 2), ("workers", 0)):
        if getattr(args, name) is not None and not data.is_shards(args.data):
            raise UserError(f"--{name} is for shards (--data 'shards/*.tar'), not for {args.data}")
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: expected {least} or more")
    if args.microbatch < 0:
        raise UserError(f"--microbatch {args.microbatch}: expected one image or more, or 0 for all at once")
    if not 0 <= args.seed < 2 ** 31:
        raise UserError(f"--seed {args.seed}: expected 0 to 2147483647")
    if args.out and (Path(args.out) / "last.pt").exists() and not args.checkpoint:
        raise UserError(f"--out {args.out} holds a run already: go on with --resume {args.out}, or name another folder")
    return Model, home(Model).sizes(Model)[args.config], recipe


def make_loader(args, training, text_batch, resumed):
    options = dict(seed=args.seed, rank=rank(), world=world())
    if isinstance(training, data.Shards):
        if args.workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            args.workers = min(from_all(max(1, min(8, cores, len(training.paths) // world()))))
        return data.ShardLoader(training, args.batch, text_batch, workers=args.workers,
                                state=resumed and resumed["loader"], **options)
    return data.Loader(training, args.batch, text_batch, **options)


def make_folder(args):
    """The run's folder: --out, or the first of runs/MODEL-DATA, ...-2, ...-3 that is not there yet."""
    try:
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            return Path(args.out)
        place = Path(args.data).resolve()
        name = f"{args.model}-{place.parent.name if data.is_shards(place) else place.stem}"
        for i in itertools.count(1):
            folder = Path("runs") / (name if i == 1 else f"{name}-{i}")
            with contextlib.suppress(FileExistsError):  # so that two runs at once never share a folder
                folder.mkdir(parents=True)
                return folder
    except OSError as error:
        raise UserError(f"cannot make {args.out or 'runs'}: {error.strerror}; name another folder with --out") from None


def train(args):
    """One run, from the first step or from a checkpoint's, to its table row."""
    device = pick_device()
    began = time.time()
    resumed = read_checkpoint(args.checkpoint) if args.checkpoint else None
    Model, config, recipe = choose(args)
    precision = pick_precision(device, args.precision)

    # --- data ---
    training, validation = first_on_each_machine(lambda: [load_split(args, config, name) for name in ("train", "val")])
    task = data.load_zero_shot(args.data, config.image_size)

    # --- model ---
    torch.manual_seed(args.seed)
    if resumed:
        model, tokenizer, _ = load(args.checkpoint, content=resumed)
    else:
        texts = [text for s in training.samples for text in (*s.captions, s.long, s.web) if text]
        model, tokenizer = first_on_each_machine(lambda: make_model(args, Model, config, recipe, texts))
    model.to(device)
    check_texts(model, tokenizer, training)
    if args.recompute:
        recompute_blocks(model)
    if args.compile:
        torch._dynamo.config.optimize_ddp = not args.recompute  # older versions of torch cannot have all three
        for tower in model.children():
            tower.compile()  # in place: the names of the parameters, and so the checkpoints, stay what they are
    loader = make_loader(args, training, lambda samples, rngs: model.text_batch(samples, rngs, tokenizer), resumed)
    optimizer = make_optimizer(model, args.weight_decay, args.image_lr, args.shard_optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    network, in_parts = model, 0 < args.microbatch < args.batch // world()
    if world() > 1 and in_parts:
        for tensor in model.state_dict().values():  # as DistributedDataParallel does: all start from the same
            dist.broadcast(tensor, 0)
    elif world() > 1:
        network = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    # --- the run ---
    per_epoch = loader.steps_per_epoch
    steps, step, best, minutes = math.ceil(args.epochs * per_epoch), 0, -1.0, 0.0
    if resumed:
        for saved, fresh in zip(resumed["optimizer"]["param_groups"], optimizer.param_groups):
            saved["fused"] = fresh.get("fused")  # a matter of this call's device and flags, not of the checkpoint
        optimizer.load_state_dict(resumed["optimizer"])
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.state.clear()  # it keeps the moments twice; its own are in optimizer.optim
        if scaler.is_enabled() and resumed["scaler"]:
            scaler.load_state_dict(resumed["scaler"])
        step, best, minutes = resumed["step"], resumed["best"], resumed["minutes"]
        if resumed["images"] != len(training):
            raise UserError(f"{args.checkpoint} is of a run on {resumed['images']:,} training images; here are "
                            f"{len(training):,}: with other data it would not be the same run")
        if step >= steps and not restarted():
            raise UserError(f"{args.checkpoint} is the end of its run: {step} steps of {steps}; nothing to resume. Its "
                            f"figures: python train.py --eval {Path(args.checkpoint).parent / 'best.pt'}")
        say(f"goes on after step {step} of {steps}")
        resumed = None  # a copy of all that is in the model and the optimizer now
    if rank() == 0:
        folder = Path(args.checkpoint).parent if args.checkpoint else make_folder(args)
        try:
            log = Log(folder / "log.csv", step, getattr(Model, "terms", ()))
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {error.strerror}; name another folder with --out") from None
    processes = f" x {world()}" if world() > 1 else ""
    say(f"{args.model} {args.config} on {args.data}: {device.type}{processes}, {precision}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(training):,} training images, "
        f"{len(validation):,} validation; batch {args.batch}, {per_epoch} steps an epoch, {steps:,} in all; "
        f"a model that tells nothing apart has a contrastive loss of {model.chance_loss(args.batch):.2f}")
    say(gallery(validation) + (f"; zero-shot: {len(task.images)} pictures, {len(task.prompts)} classes, chance "
                               f"{100 / len(task.prompts):.1f} %" if task else ""))

    def keep(*names):
        """Write checkpoints; to be called by all processes, as each has a part of what goes into them."""
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict()
        places = from_all(loader.state())
        if rank() == 0:
            content = dict(model=args.model, config=asdict(model.config), tokenizer=tokenizer.state(),
                           weights=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                           step=step, loader=places, images=len(training), best=best, job=job(), args=vars(args),
                           minutes=minutes + (time.time() - began) / 60, torch=str(torch.__version__))
            for name in names:
                save(folder / name, **content)

    # --- the loop ---
    waited, since, seen = 0.0, time.time(), 0
    watch = Watch(model.chance_loss(args.batch), model.logit_scale.exp().item())
    batches = loader.stream(step, steps)
    trace = folder / "trace.json" if args.profile and rank() == 0 else None
    with (Interrupt() as interrupt, profile(trace) as profiler,
          tqdm(total=steps, initial=step, unit=" steps", **data.bar_options()) as bar):
        while step < steps:
            network.train()  # evaluation switches it off
            fetched = time.time()
            batch = next(batches)
            waited += time.time() - fetched
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            lr = learning_rate(step, steps, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            if in_parts:
                losses = backward_in_parts(model, batch, args.microbatch, device, precision, scaler,
                                           seed=f"{args.seed}/{step}/{rank()}")
            else:
                torch.manual_seed((args.seed * 1_000_003 + step) * 4_099 + rank())  # dropout's
                with autocast(device, precision):
                    losses = network(**batch)
                scaler.scale(losses["loss"]).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))  # as in the CLIP paper: more makes training unstable
            step, seen = step + 1, seen + args.batch
            bar.update()
            profiler.step()

            stop = interrupt.asked(device)
            ended = step % per_epoch == 0 or step == steps
            if ended or stop or step % 20 == 0:
                terms = {name: mean_over_processes(value) for name, value in losses.items()}
                loss, scale = terms["loss"], model.logit_scale.exp().item()
                if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
                    raise UserError(f"the loss is {loss:.4g} and the gradient's norm {norm:.4g} at step {step} "
                                    f"(learning rate {lr:.2g}, logit scale {scale:.1f}): stopped; what was saved is "
                                    "from before. Try a new run with a lower --lr, or --precision fp32")
                rate, wait = seen / (time.time() - since), waited / (time.time() - since)
                bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {rate:.0f} images/s, {wait:.0%} waiting for data")
                watch.look(terms, scale)
                row = dict(step=step, epoch=step / per_epoch, samples=step * args.batch, lr=lr, logit_scale=scale,
                           images_per_s=rate, wait=wait, **terms)
                scores = {}
                if ended:
                    if broken := sum(from_all(loader.broken)):
                        say(f"{broken:,} broken samples of the shards left out since the run began or went on")
                    scores, _ = evaluate(model, tokenizer, validation, task, precision)
                    bar.clear()
                    say(f"epoch {step / per_epoch:.3g}: loss {loss:.3f}, {rate:.0f} images/s, "
                        f"{wait:.1%} waiting for data; {describe(scores)}")
                if rank() == 0:
                    log.write(**row, **scores)
                if ended:
                    mean = (scores["i2t_r1"] + scores["t2i_r1"]) / 2
                    better, best = mean > best, max(mean, best)
                    # best.pt first: a run that is killed between the two does this epoch again. The other way round it
                    # would go on, and take for the best what was never written.
                    keep(*(["best.pt"] if better else []), "last.pt")
                    since, seen, waited = time.time(), 0, 0.0
                elif stop:
                    keep("last.pt")
                if stop and step < steps:
                    if rank() == 0:
                        say(f"stopped after step {step} of {steps}; go on with: python train.py "
                            f"--resume {shlex.quote(str(folder))}")
                    network = losses = None  # see the end of this function
                    sys.exit(128 + (interrupt.signal or signal.SIGTERM))
    first = rank() == 0  # asked now: without a process group every process is the first
    if world() > 1:  # the test is for one process, after the last checkpoint is on the disk
        dist.barrier()
        network = losses = None  # they hold the process group, whose threads abort a process that exits with them
        dist.destroy_process_group()
    if first:
        if peak := peak_memory(device):
            say(f"peak memory: {peak / 2 ** 30:.2f} GiB{' of the GPU' if device.type == 'cuda' else ''} a process")
        finish(args, folder, minutes + (time.time() - began) / 60)


def finish(args, folder, minutes):
    """The end of a run: best.pt on the test split, its table row, its picture and the commands that use it."""
    row = test(args, folder / "best.pt", pick_device(), minutes)
    labels = {"shapes": ("a red star", "a blue circle"), "shapes-ko": ("빨간색 별", "파란색 원")}.get(
        args.data, MODELS[args.model].example_labels)
    best = shlex.quote(f"{folder}/best.pt")
    say(f"\n{row}\n\npicture:  {folder}/retrieval.png\n"
        f'use it:   python {home(MODELS[args.model]).__name__}.py {best} PICTURE "{labels[0]}" "{labels[1]}"\n'
        f"again:    python train.py --eval {best}")


def load_split(args, config, name):
    return data.load(args.data, name, config.image_size, args.root, getattr(config, "fit", "crop"), args.cache,
                     samples=args.samples)


def load_test_split(args, config):
    try:
        return load_split(args, config, "test")
    except data.EmptySplit as error:
        say(f"{error}; the figures are those of its validation split, which chose the checkpoint")
        return load_split(args, config, "val")


def test(args, path, device, minutes=None):
    """A checkpoint on the test split -> its table row; the picture goes beside the checkpoint."""
    content = first_on_each_machine(lambda: read_checkpoint(path, args.cache))
    model, tokenizer, _ = load(path, device, content=content)
    split = first_on_each_machine(lambda: load_test_split(args, model.config))
    task = data.load_zero_shot(args.data, model.config.image_size)
    scores, features = evaluate(model, tokenizer, split, task, pick_precision(device, args.precision))
    if rank() == 0:
        sheet = (Path() if released(path) else Path(path).parent) / "retrieval.png"
        try:
            shown = split  # on a sheet, the pictures of small models are drawn larger than the models see them
            if model.config.image_size < 128:
                shown = load_test_split(args, replace(model.config, image_size=128))
            draw_retrieval(sheet, model, split, shown.images, features)
            if args.eval:
                say(f"picture: {sheet}")
        except (OSError, UserError) as error:
            say(f"cannot write the picture: {error}")
    say(gallery(split))
    columns = {"model": f"{content['model']} {content['args']['config']}", "data": split.name,
               "I2T R@1 / 5 / 10": " / ".join(f"{scores[f'i2t_r{k}']:.1f}" for k in (1, 5, 10)),
               "T2I R@1 / 5 / 10": " / ".join(f"{scores[f't2i_r{k}']:.1f}" for k in (1, 5, 10))}
    if task:
        columns["zero-shot seen / unseen / all"] = "{zs_seen:.1f} / {zs_unseen:.1f} / {zs_all:.1f}".format(**scores)
    minutes = content["minutes"] if minutes is None else minutes
    columns |= {"step": f"{content['step']:,}", "minutes": f"{minutes:.1f}"}
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), columns.values()))


# === image search ====================================================================================================

def search(args, best=12):
    """The pictures of a folder that are most similar to a query: as lines of score and path, and as a contact sheet."""
    checkpoint, folder, query = args.search
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: " + ("a file; expected a folder" if Path(folder).exists() else "no such folder"))
    sheet = Path(args.out or ".") / "search.png"
    try:
        sheet.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {sheet.parent}: {error.strerror}; name another folder with --out") from None
    paths = [path for path in data.list_pictures(folder) if path.resolve() != sheet.resolve()]
    device = pick_device()
    precision = pick_precision(device, args.precision)
    model, tokenizer, prepare = load(checkpoint, device, args.cache)
    with torch.no_grad(), autocast(device, precision):
        image_features, paths = folder_features(model, prepare, paths, (checkpoint, folder, precision), args.cache)
        text_features = model.encode_text(model.tokenize([query], tokenizer).to(device))
    scores = model.similarity(take(image_features, device), text_features)[:, 0].tolist()
    found = sorted(zip(scores, paths), reverse=True)[:best]
    try:
        draw_search(sheet, query, found)
    except (OSError, data.PictureError) as error:
        raise UserError(f"cannot write {sheet}: {error}; name another folder with --out") from None
    return "\n".join([*(f"{score:+.3f}  {path}" for score, path in found),
                      f"{len(paths):,} pictures searched; contact sheet: {sheet}"])


def folder_features(model, prepare, paths, origin, cache, batch=64):
    """Image features of pictures, and the paths of those that could be read. Computed once, kept in CACHE/features.

    origin: (checkpoint, folder, precision). The file's name hangs on it and on every picture's name, size and time of
    change: when one changes, the features of the folder are made anew, and the old file goes.
    """
    checkpoint, folder, precision = origin
    place = hashlib.sha256(repr((str(checkpoint), str(Path(folder).resolve()))).encode()).hexdigest()[:8]
    depends = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
               for path in (Path(checkpoint), *paths) if path.exists()]
    key = hashlib.sha256(repr((precision, depends)).encode()).hexdigest()[:16]
    file = Path(cache) / "features" / f"{place}-{key}.pt"
    device, side = model.logit_scale.device, model.config.image_size
    if file.exists():
        content = torch.load(file, weights_only=True)
        features = content["features"]
        if isinstance(features, tuple):  # a named tuple is kept as a plain one: any picture tells its name
            blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)
            features = type(model.encode_image(blank))(*features)
        return features, [str(paths[i]) for i in content["kept"]]

    def read(path):
        try:
            return prepare(path)
        except UserError as error:
            return error

    parts, kept, bad = [], [], []
    with concurrent.futures.ThreadPoolExecutor() as pool, \
            tqdm(total=len(paths), desc="pictures, once", unit=" pictures", **data.bar_options()) as bar:
        for first in range(0, len(paths), batch):
            pictures = dict(enumerate(pool.map(read, paths[first:first + batch]), first))
            bad += [picture for picture in pictures.values() if isinstance(picture, UserError)]
            pictures = {i: picture for i, picture in pictures.items() if not isinstance(picture, UserError)}
            if pictures:
                features = model.encode_image(torch.stack([*pictures.values()]).to(device))
                parts.append(each(features, torch.Tensor.cpu))
                kept += pictures
            bar.update(min(batch, len(paths) - first))
    if bad:
        say(f"{len(bad)} of {len(paths)} pictures cannot be read and are left out: "
            + "; ".join(map(str, bad[:3])) + ("; ..." if len(bad) > 3 else ""))
    if not kept:
        raise UserError(f"{folder}: no picture that can be read ({', '.join(data.PICTURE_SUFFIXES[:4])}, ...)")
    features = join(parts)
    content = io.BytesIO()
    torch.save({"kept": kept, "features": tuple(features) if isinstance(features, tuple) else features}, content)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        data.write_atomically(file, content.getbuffer())
        for old in file.parent.glob(f"{place}-*.pt"):
            if old != file:
                old.unlink(missing_ok=True)
    except OSError as error:
        say(f"cannot keep the features in {file}: {error.strerror}; --cache names another folder")
    return features, [str(paths[i]) for i in kept]


def draw_search(path, query, found, columns=4):
    """A contact sheet: the query, then the pictures found, best first, each with its score and its file's name."""
    side, gap, caption = 180, 14, 40
    font = load_font(17, query)
    small = ImageFont.load_default(11)
    rows = -(-len(found) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, 34 + rows * (side + caption) + 2 * gap), "white")
    pen = ImageDraw.Draw(sheet)
    title = query if font else "the query (no font here has its letters)"
    pen.text((gap, gap), title, fill="black", font=font or ImageFont.load_default(17))
    for i, (score, name) in enumerate(found):
        x, y = gap + i % columns * (side + gap), 34 + gap + i // columns * (side + caption)
        sheet.paste(Image.fromarray(data.read_picture(name, side)), (x, y))
        label = f"{score:+.3f}  {Path(name).name}"
        while pen.textlength(label, font=small) > side:
            label = label[:-4] + "..."
        pen.text((x, y + side + 3), label, fill="gray", font=small)
    sheet.save(path)


# === the command line ================================================================================================

def parse(argv):
    parser = argparse.ArgumentParser(description="Train or evaluate a CLIP-family model, or search pictures with it.")
    add = parser.add_argument
    add("--model", default="liteclip", help=f"one of {', '.join(MODELS)} (default liteclip)")
    add("--config", help="a size of that model (default: the tiny one for shapes, else the published one)")
    add("--data", help=f"{', '.join(data.NAMES)}, or your own folder, .csv, .json or shards, such as "
                       "'shards/{00000..00099}.tar' (default: shapes, in the model's language)")
    add("--root", help="where the files of a named data set lie (default: download flickr8k to data/flickr8k)")
    add("--cache", default="data/cache", help="where decoded pictures, weights and features go (default data/cache)")
    add("--out", help="the run's folder (default runs/MODEL-DATA); of --search: the sheet's (default here)")
    add("--scratch", action="store_true", help="start from random weights where the recipe starts from published ones")
    add("--samples", type=int, help="of tar shards: how many pictures are an epoch (default: all of them, counted)")
    add("--workers", type=int, help="of tar shards: reading processes for each training process (0: none; default: one "
                                    "a core, 8 at most)")
    # training; what is not given comes from the recipe of the configuration
    add("--epochs", type=float, help="passes over the training images")
    add("--batch", type=int, help="images a step, over all processes together")
    add("--lr", type=float, help="peak learning rate")
    add("--image-lr", type=float, help="that of the image tower's matrices, as a multiple of --lr")
    add("--weight-decay", type=float)
    add("--warmup", type=float, help="share of the steps in which the learning rate rises, 0 to 1")
    add("--seed", type=int, default=0)
    # how it is computed: but for the first, with the same result, up to rounding and to what dropout draws
    add("--precision", choices=("fp32", "bf16", "fp16"), help="(default: what the device is best at)")
    add("--microbatch", type=int, default=0, metavar="N", help="encode N images a process at a time: less memory, a "
                                                               "second forward pass, and still one batch (0: all)")
    switch = argparse.BooleanOptionalAction
    add("--recompute", action=switch, default=False, help="keep the inputs of blocks alone for the backward pass: much "
                                                          "less memory, a second forward pass")
    add("--compile", action=switch, default=False, help="compile the towers: a minute's wait, then faster")
    add("--shard-optimizer", action=switch, default=False, help="share AdamW's moments out over the processes")
    add("--profile", action=switch, default=False, help="write trace.json, a profile of three steps")
    # instead of a new run
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", metavar="RUN", help="go on with the run in this folder; its settings come from its last.pt")
    add("--eval", metavar="CHECKPOINT", help="evaluate it, or released weights such as clip/vit-b-32, on the test "
                                             "split of its data or of --data")
    add("--search", nargs=3, metavar=("CHECKPOINT", "FOLDER", "QUERY"),
        help="find the pictures of a folder that fit a query best; writes search.png (into --out)")
    parser.set_defaults(checkpoint=None)
    return parser, parser.parse_args(argv)


def restarted():
    """Whether torchrun (--max-restarts) or SLURM (--requeue) runs the same command again, after a process was lost."""
    return any(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def job():
    """What tells a job that was started again from another one with the same --out."""
    name = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID", "")
    one_machine = int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1
    if name in ("", "none") and one_machine:
        return f"parent {os.getppid()}"  # torchrun, which outlives the processes that it starts
    return name


def settle(argv):
    """The flags; for --resume and --eval those of the checkpoint, but for where files lie and how it is computed."""
    parser, args = parse(argv)
    for name in ("model", "config", "data", "root", "out", "resume", "eval"):
        if getattr(args, name) == "":
            raise UserError(f"--{name} is empty: a variable of the shell that is not set?")
    if args.search:
        for name, value in vars(args).items():
            if name not in ("search", "cache", "out", "precision") and value != parser.get_default(name):
                raise UserError(f"--{name.replace('_', '-')} does not go with --search")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("--search is for one process: start it with python, not with torchrun")
        return args
    if restarted() and not (args.resume or args.eval):
        last = Path(args.out or "") / "last.pt"
        if not args.out:
            say("started again, but without --out nobody knows from where: this is a new run")
        elif last.exists() and read_checkpoint(last).get("job") == job():
            argv = [*(sys.argv[1:] if argv is None else argv), "--resume", args.out]  # the same command, but not anew
            args = parser.parse_args(argv)
    path = args.resume or args.eval
    if path and Path(path).is_dir() and not released(path):
        path = Path(path) / ("last.pt" if args.resume else "best.pt")
        if not path.exists():
            raise UserError(f"no {path.name} in {path.parent}: no epoch of a run was finished there")
    if path:
        if args.resume and released(path):
            raise UserError("--resume {0}/{1}: released weights are no run; to start from them: "
                            "--model {0} --config {1}".format(*released(path)))
        saved = {**vars(parser.parse_args([])), **saved_flags(path)}
        own = "resume", "eval", "profile"  # of this call alone
        parser.set_defaults(**{name: value for name, value in saved.items() if name not in own})
        args = parser.parse_args(argv)  # again: what was typed goes before what was saved
        if args.data != saved["data"] and args.root == saved["root"]:
            args.root = None  # it was the other data set's
        movable = {"resume", "eval", "cache", "root", "checkpoint", "microbatch", "recompute", "compile",
                   "shard_optimizer", "profile"} | ({"data", "precision"} if args.eval else set())
        for name, value in vars(args).items():
            if name not in movable and value != saved.get(name, value):
                what = "an evaluation" if args.eval else "a resumed run"
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {value} does not go with {path}, where it is {saved[name]}; "
                                f"{what} takes its settings from the checkpoint")
    args.checkpoint, args.eval = (str(path), None) if args.resume else (None, args.eval and str(path))
    return args


def main(argv=None):
    with contextlib.suppress(AttributeError):  # notebooks and tests put something else in its place
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to stop
    try:
        args = settle(argv)
        if "RANK" in os.environ:  # under torchrun
            gpu = torch.cuda.is_available()
            if gpu and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                raise UserError(f"{torch.cuda.device_count()} GPUs here: lower --nproc_per_node to that")
            if gpu:
                torch.cuda.set_device(pick_device())
            # A long timeout: the others wait while one process downloads and decodes. A prefix: after a restart
            # torchrun's store still holds the addresses of the processes that were lost, and some would try these.
            store, number, processes = next(rendezvous("env://"))
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=number, world_size=processes,
                                    timeout=timedelta(hours=6))
            if len(set(from_all(bool(args.checkpoint)))) > 1:
                raise UserError(f"--out {args.out}: some processes see a checkpoint there, others do not; it must be a "
                                "folder that all machines share")
        if args.search:
            say(search(args))
        elif args.eval:
            say(test(args, args.eval, pick_device()))
        else:
            train(args)
    except UserError as error:
        sys.exit(f"train.py: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"train.py: out of GPU memory ({str(error).splitlines()[0]}); --microbatch 32 or --recompute need "
                 "less and change nothing else; or lower --batch, or use more GPUs")
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        sys.exit(f"train.py: --compile does not work here ({str(error).strip().splitlines()[0]}); go on without it, "
                 "with --resume and --no-compile if the run has begun")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
