"""Train any of the models, and go on where a run stopped.

    python train.py                                          # liteclip tiny on generated pictures: 3 minutes
    python train.py --model liteclip --data flickr8k         # real photographs, from ImageNet and BERT-mini weights
    python train.py --model liteclip --data my_pictures.csv --epochs 20
    python train.py --resume runs/liteclip-shapes            # goes on bit for bit (on a CPU), all settings as they were
    torchrun --nproc_per_node 8 train.py --model liteclip --data flickr8k      # eight GPUs, the same global batch

A run writes into its folder: last.pt (every epoch, and when interrupted), best.pt (by mean validation R@1), log.csv,
retrieval.png. Everything random in a step depends only on the seed and the step, and so does the learning rate. So a
run resumes by loading weights and optimizer and counting on. --resume RUN begins there if RUN is empty: the same
command, started again by torchrun or SLURM, goes on by itself.
"""
import argparse
import collections
import contextlib
import csv
import functools
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

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import tokens
from data import UserError, say
from evaluate import (MODELS, autocast, describe, each, evaluate, gallery, home, join, load, pick_precision, rank,
                      sizes, test, world)


# --- the run --------------------------------------------------------------------------------------------------------

def train(args):
    """One run, from the first step or from that of a checkpoint."""
    run = set_up(args)
    model, network, optimizer, scaler, loader = run.model, run.network, run.optimizer, run.scaler, run.loader
    step, steps, first_step, began = run.step, run.steps, run.step, time.time()
    with Interrupt() as interrupt, tqdm(total=steps, initial=step, unit=" steps", **data.bar_options()) as bar:
        for batch in loader.stream(step, steps):
            batch = {name: tensor.to(run.device) for name, tensor in batch.items()}
            lr = learning_rate(step, steps, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            network.train()  # evaluation switches it off
            if run.in_parts:
                losses = backward_in_parts(model, batch, args.microbatch, run, seed=f"{args.seed}/{step}/{rank()}")
            else:
                torch.manual_seed((args.seed * 1_000_003 + step) * 4_099 + rank())  # dropout's
                with autocast(run.device, run.precision):
                    losses = network(**batch)
                scaler.scale(losses["loss"]).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))  # as in the CLIP paper: more makes training unstable
            step += 1
            bar.update()

            losses, stop = over_processes(losses, interrupt.signal)
            epoch_ends = step % loader.steps_per_epoch == 0 or step == steps
            if not (epoch_ends or stop or step % 20 == 0):
                continue
            seconds = time.time() - began
            row = dict(step=step, epoch=step / loader.steps_per_epoch, samples=step * args.batch,
                       **{name: float(loss) for name, loss in losses.items()}, lr=lr,
                       logit_scale=model.logit_scale.exp().item(),
                       images_per_s=(step - first_step) * args.batch / seconds, wait=loader.waited / seconds)
            stop_if_not_finite(row, float(norm), scaler)
            bar.set_postfix_str("loss {loss:.3f}, lr {lr:.1e}, {images_per_s:.0f} images/s, {wait:.0%} waiting for data"
                                .format(**row), refresh=False)
            scores = {}
            if epoch_ends:
                scores, _ = evaluate(model, run.tokenizer, run.validation, run.task, run.precision)
                bar.clear()
                say("epoch {epoch:.3g}: loss {loss:.3f}, {images_per_s:.0f} images/s, {wait:.1%} waiting for data; "
                    .format(**row) + describe(scores) + remarks(run, row))
            write_log(run.folder, row, scores)
            if epoch_ends or stop:
                keep(run, args, step, scores)
                first_step, began, loader.waited = step, time.time(), 0.0
            if stop and step < steps:
                say(f"stopped after step {step} of {steps}; go on with: python train.py --resume "
                    + shlex.quote(str(run.folder)))
                sys.exit(128 + (interrupt.signal or signal.SIGTERM))
    return run


def set_up(args):
    """Everything that the loop needs, in a namespace: data, model, optimizer, and where the run is."""
    run = SimpleNamespace(device=data.best_device(), began=time.time(), step=0, best=-1.0, minutes=0.0)
    run.precision = pick_precision(run.device, args.precision)
    config = home(args.model).CONFIGS[args.config]
    split = functools.partial(data.load, args.data, size=config.image_size, root=args.root,
                              fit=getattr(config, "fit", "crop"), cache=args.cache)
    training, run.validation = first_on_each_machine(lambda: [split("train"), split("val")])
    run.task = data.load_zero_shot(args.data, config.image_size)
    run.loader = data.Loader(
        training, args.batch, lambda samples, rngs: run.model.text_batch(samples, rngs, run.tokenizer),
        seed=args.seed, rank=rank(), world=world(), epoch=args.samples)
    run.steps = math.ceil(args.epochs * run.loader.steps_per_epoch)

    torch.manual_seed(args.seed)
    if args.checkpoint:
        model, run.tokenizer, _ = load(args.checkpoint, run.device)
    else:
        model, run.tokenizer = make_model(args, config, training)
    run.model = model = model.to(run.device)
    check_texts(model, run.tokenizer, training)
    if args.recompute:
        recompute_blocks(model)
    if args.compile:
        torch._dynamo.config.optimize_ddp = not args.recompute  # older versions of torch cannot have all three
        for tower in model.children():
            tower.compile()  # in place: the parameters, and so the checkpoints, keep their names
    run.in_parts, run.network = 0 < args.microbatch < args.batch // world(), model
    if world() > 1 and run.in_parts:
        for tensor in model.state_dict().values():  # all processes start from the same, as with DistributedDataParallel
            dist.broadcast(tensor, 0)
    elif world() > 1:
        run.network = DistributedDataParallel(model, device_ids=[run.device] if run.device.type == "cuda" else None)

    run.optimizer = make_optimizer(model, args.weight_decay, args.image_lr, args.shard_optimizer)
    run.scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16")
    if args.checkpoint:
        go_on(run, args.checkpoint)
    run.folder = (Path(args.checkpoint).parent if args.checkpoint else make_folder(args)) if rank() == 0 else None
    trim_log(run.folder, run.step)
    run.chance = chance_loss(model, args.batch)
    say(f"{args.model} {args.config} on {args.data}: {run.device.type} x {world()}, {run.precision}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(training):,} training images, "
        f"batch {args.batch}, {run.loader.steps_per_epoch} steps an epoch, {run.steps:,} in all; a model that tells "
        f"nothing apart has a contrastive loss of {run.chance:.2f}")
    say(gallery(run.validation))
    return run


def first_on_each_machine(function):
    """Call it in one process of each machine, then in the others: the first one builds the caches and downloads."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = function() if first else None
    if world() > 1:
        dist.barrier()
    return result if first else function()


def go_on(run, path):
    """Put the optimizer, the scaler and the counters where the checkpoint has them."""
    saved = data.read_checkpoint(path)
    if saved["images"] != len(run.loader.split):
        raise UserError(f"{path} is of a run on {saved['images']:,} training images, here are "
                        f"{len(run.loader.split):,}; with other data it would not be the same run")
    if saved["step"] >= run.steps:
        raise UserError(f"{path} is the end of its run, {run.steps} steps; nothing to resume. Its figures: "
                        f"python evaluate.py {Path(path).parent}")
    for group, new in zip(saved["optimizer"]["param_groups"], run.optimizer.param_groups):
        group["fused"] = new.get("fused")  # a matter of this call's device and flags, not of the checkpoint
    run.optimizer.load_state_dict(saved["optimizer"])
    if hasattr(run.optimizer, "consolidate_state_dict"):
        run.optimizer.state.clear()  # it keeps the moments twice; its own are in optimizer.optim
    if run.scaler.is_enabled() and saved["scaler"]:
        run.scaler.load_state_dict(saved["scaler"])
    run.step, run.best, run.minutes = saved["step"], saved["best"], saved["minutes"]
    say(f"goes on after step {run.step} of {run.steps}")


def keep(run, args, step, scores):
    """Write last.pt, and best.pt if these validation scores are the best.

    All processes call it: with --shard-optimizer each holds a part of the optimizer's state. Only the first writes.
    """
    mean = (scores["i2t_r1"] + scores["t2i_r1"]) / 2 if scores else -1.0
    # best.pt first: a run that is killed between the two does this epoch again. The other way round it would go on, and
    # believe that best.pt was written.
    names = ["best.pt", "last.pt"] if mean > run.best else ["last.pt"]
    run.best = max(mean, run.best)
    if hasattr(run.optimizer, "consolidate_state_dict"):
        run.optimizer.consolidate_state_dict()
    if rank() > 0:
        return
    content = dict(model=args.model, config=asdict(run.model.config), tokenizer=run.tokenizer.state(),
                   weights=run.model.state_dict(), optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict(),
                   step=step, images=len(run.loader.split), best=run.best, args=vars(args),
                   minutes=run.minutes + (time.time() - run.began) / 60, torch=str(torch.__version__))
    for name in names:
        try:
            with data.writing(run.folder / name) as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's, of a disk that is full
            raise UserError(f"cannot write {run.folder / name}: {error}. The checkpoint that was there before is "
                            "untouched; make room, then go on with --resume") from None


def finish(args, run):
    """The end of a run: best.pt on the test split, its picture, and the commands that use it."""
    first = rank() == 0
    if world() > 1:  # the test is for one process, after the last checkpoint is on the disk
        dist.barrier()
        run.network = None  # DistributedDataParallel holds the process group, whose threads abort a process at its exit
        dist.destroy_process_group()
    if first:
        labels = '"a red star" "a blue circle"' if args.data == "shapes" else '"a photo of a dog" "a photo of a cat"'
        labels = '"빨간색 별" "파란색 원"' if args.data == "shapes-ko" else labels
        folder = shlex.quote(str(run.folder))
        say(f"\n{test(run.folder / 'best.pt', cache=args.cache, precision=args.precision)}\n\n"
            f"use it:   python {home(args.model).__name__}.py {folder}/best.pt PICTURE {labels}\n"
            f"again:    python evaluate.py {folder}")


# --- the pieces of a step -------------------------------------------------------------------------------------------

def learning_rate(step, steps, peak, warmup):
    """Linear up to the peak over the first `warmup` of the steps, then half a cosine down to zero."""
    ramp = round(warmup * steps)
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def make_optimizer(model, weight_decay, image_lr=1.0, shard=False):
    """AdamW. Only matrices decay: not gains, biases, embeddings or logit_scale.

    image_lr: the learning rate of the image tower's matrices, as a multiple of the others'.
    shard: whether each process keeps only the moments of its part of the parameters, and updates these for all.
    """
    groups = {}
    for name, p in model.named_parameters():
        decay = p.ndim >= 2 and "embedding" not in name
        scale = image_lr if decay and name.startswith("image_encoder.") else 1.0
        groups.setdefault((decay, scale), []).append(p)
    groups = [{"params": params, "weight_decay": weight_decay * decay, "scale": scale}
              for (decay, scale), params in groups.items()]
    options = dict(betas=(0.9, 0.98), eps=1e-6)
    if shard and world() > 1:  # not fused: a loaded `step` would lie on the CPU, and fused AdamW needs it on the GPU
        from torch.distributed.optim import ZeroRedundancyOptimizer  # not at the top: it takes a second to import
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
    return torch.optim.AdamW(groups, fused=model.logit_scale.device.type in ("cuda", "cpu"), **options)


def backward_in_parts(model, batch, size, run, seed):
    """The loss of a whole batch and its gradient, with the activations of only `size` samples in memory at a time.

    Adding up the gradients of small batches would be another loss: no picture would ever be compared with the captions
    of another part. Here all are compared (GradCache: Gao et al., arXiv 2101.06983): encode the parts without a graph,
    take the loss of all features and its gradient at each of them, then encode the parts again and send each feature's
    gradient on. It costs a second forward pass. seed: what dropout draws from, the same both times.
    """
    parts = [{name: rows[i:i + size] for name, rows in batch.items()} for i in range(0, len(batch["images"]), size)]

    def encode(number):
        torch.manual_seed(zlib.crc32(f"{seed}/{number}".encode()))
        with autocast(run.device, run.precision):
            return model.encode(**parts[number])

    with torch.no_grad():
        encoded = [encode(number) for number in range(len(parts))]
    # The features of the whole batch, as the leaves of a graph that contains only the loss. Counts have no gradient.
    whole = {name: each(join([part[name] for part in encoded]), lambda x: x.requires_grad_(x.is_floating_point()))
             for name in encoded[0]}
    with autocast(run.device, run.precision):
        losses = model.loss(**whole)
    run.scaler.scale(losses["loss"]).backward()
    done = dict.fromkeys(whole, 0)
    for number in range(len(parts)):
        pairs = []
        for name, features in encode(number).items():
            some, of_all = (x if isinstance(x, tuple) else (x,) for x in (features, whole[name]))
            rows = slice(done[name], done[name] + len(some[0]))
            done[name] = rows.stop
            pairs += [(x, y.grad[rows]) for x, y in zip(some, of_all) if x.requires_grad and y.grad is not None]
        outputs, gradients = zip(*pairs)
        torch.autograd.backward(outputs, gradients)
    if world() > 1:  # what DistributedDataParallel does in its one backward pass
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
            parameter.grad /= world()
    return losses


def recompute_blocks(model):
    """Keep only the inputs of the towers' blocks for the backward pass, which computes the rest again."""
    for name, blocks in model.named_modules():
        if name.endswith("blocks"):
            for block in blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def over_processes(losses, stop):
    """The losses' means over the processes, and whether any process was asked to stop."""
    if world() == 1:
        return {name: loss.detach() for name, loss in losses.items()}, bool(stop)
    table = torch.stack([*losses.values(), losses["loss"].new_tensor(float(bool(stop)))]).detach()
    dist.all_reduce(table)
    *means, stop = (table / world()).tolist()
    return dict(zip(losses, means)), stop > 0


def stop_if_not_finite(row, norm, scaler):  # called at the steps that are logged, and so before every checkpoint
    if not math.isfinite(row["loss"]) or not (math.isfinite(norm) or scaler.is_enabled()):
        raise UserError("the loss is {loss:.4g} and the gradient's norm {0:.4g} at step {step} (learning rate "
                        "{lr:.2g}, logit scale {logit_scale:.1f}): stopped; the checkpoint is from before. Try a new "
                        "run with a lower --lr, or --precision fp32".format(norm, **row))


def chance_loss(model, batch):
    """The contrastive loss of a model to which all pictures and all captions are alike.

    With a softmax all features are the same. With a sigmoid loss, which has a logit_bias, each pair has the probability
    1 / batch, the best one if nothing can be told apart.
    """
    extra = (batch - 1) * math.log(batch / (batch - 1)) if hasattr(model, "logit_bias") else 0.0
    return math.log(batch) + extra


class Interrupt:
    """In a with block, SIGINT and SIGTERM ask the loop to stop after its step; a second Ctrl-C stops at once."""
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
        if self.signal and number == signal.SIGINT:  # a second SIGTERM is often torchrun's copy of the first
            raise KeyboardInterrupt
        self.signal = number


SCORES = [*(f"{d}_r{k}" for d in ("i2t", "t2i") for k in (1, 5, 10)), "zs_all", "zs_seen", "zs_unseen"]


def write_log(folder, row, scores):
    """Append a row to log.csv, with the validation figures if it is the last row of an epoch. Only one process does."""
    row = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in {**row, **scores}.items()}
    try:
        if folder is not None:
            with open(folder / "log.csv", "a", newline="") as file:
                log = csv.DictWriter(file, [*(name for name in row if name not in SCORES), *SCORES])
                if file.tell() == 0:
                    log.writeheader()
                log.writerow(row)
    except OSError as error:  # a lost row is no reason to lose the run
        say(f"cannot write {error.filename}: {error.strerror}")


def trim_log(folder, step):
    """Remove from log.csv what comes after the checkpoint: it will be logged again."""
    if folder is not None and (folder / "log.csv").exists():
        header, *lines = (folder / "log.csv").read_text().splitlines(keepends=True) or [""]
        lines = [line for line in lines if (at := line.partition(",")[0]).isdecimal() and int(at) <= step]
        with data.writing(folder / "log.csv") as file:
            file.write("".join([header, *lines] if lines else []).encode())


def remarks(run, row):
    """What else the end of an epoch has to say."""
    text = f"; {len(run.loader.broken)} broken samples left out so far" if run.loader.broken else ""
    contrastive = row.get("contrastive", row.get("ppcl", row["loss"]))
    if abs(contrastive - run.chance) < 0.01 * run.chance:
        text += (f". Note: the contrastive loss is {run.chance:.2f}, as if all pictures and all captions were alike. A "
                 "lower --lr or a longer --warmup may help; and do the captions belong to their pictures?")
    return text


# --- the beginning of a run -----------------------------------------------------------------------------------------

def make_model(args, config, training):
    """-> model, tokenizer: from the files of the recipe, or new, with a tokenizer trained on the captions."""
    Model, recipe = MODELS[args.model], home(args.model).RECIPES[args.config]
    if "files" in recipe and not args.scratch:
        try:
            files = first_on_each_machine(lambda: data.fetch(recipe["files"], args.cache))
            tokenizer = tokens.read_vocabulary(recipe["tokenizer"], files.pop("vocab"))
            start = Model.from_pretrained if "source" in files else home(args.model).from_backbones
            return start(**files, config=config), tokenizer
        except Exception as error:  # damaged files fail in many ways
            raise UserError(f"cannot start from the recipe's weights, in {args.cache}/weights: "
                            f"{' '.join(str(error).split())[:300]}; --scratch starts from random weights") from None
    texts = [text for s in training.samples for text in (*s.captions, s.long, s.web) if text]
    tokenizer = tokens.BPE.train(texts, vocab_size=min(config.vocab_size, 8192))
    special = {name: getattr(tokenizer, name) for name in ("pad_id", "start_id", "end_id", "mask_id", "class_id")
               if hasattr(config, name)}
    return Model(replace(config, vocab_size=len(tokenizer), **special)), tokenizer


def check_texts(model, tokenizer, split):
    """Say how long the captions are in tokens, and how many are cut; of many captions, by 10,000 of them."""
    texts = [caption for sample in split.samples for caption in sample.captions]
    number, texts = len(texts), random.Random(0).sample(texts, min(len(texts), 10_000))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        total = (model.tokenize(texts, tokenizer) != tokenizer.pad_id).sum()
    warnings.filterwarnings("ignore", message="texts of more than")  # said here, once, for all of them
    pictures = collections.Counter(text for sample in split.samples for text in set(sample.captions))
    shared = sum(count for count in pictures.values() if count > 1) / sum(pictures.values())
    say(f"{number:,} captions{' of the first shard' if isinstance(split, data.Shards) else ''}, of "
        f"{total / len(texts):.1f} tokens on average; vocabulary {len(tokenizer):,}"
        + (f"; {shared:.0%} of them are said of several pictures, and count as wrong for each other's in a batch"
           if shared > 0.1 else "") + "".join(f"; {w.message}" for w in caught))


def make_folder(args):
    """The run's folder: --out or --resume, or the first of runs/MODEL-DATA, ...-2, ...-3 that is not there yet."""
    place = Path(args.data).resolve()
    name = f"{args.model}-{place.parent.name if place.suffix == '.tar' else place.stem}"
    try:
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            return Path(args.out)
        for i in itertools.count(1):
            folder = Path("runs") / (name if i == 1 else f"{name}-{i}")
            with contextlib.suppress(FileExistsError):  # so that two runs at once never share a folder
                folder.mkdir(parents=True)
                return folder
    except OSError as error:
        raise UserError(f"cannot make {args.out or 'runs'}: {error.strerror}; name another folder with --out") from None


# --- the command line -----------------------------------------------------------------------------------------------

DEFAULTS = dict(model="liteclip", config=None, data=None, root=None, cache="data/cache", out=None, scratch=False,
                samples=None, seed=0, precision=None, microbatch=0, recompute=False, compile=False,
                shard_optimizer=False)
MAY_CHANGE = ("root", "cache", "out", "microbatch", "recompute", "compile", "shard_optimizer")  # on --resume


def parse(argv):
    """What was typed, and nothing else."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, description="Train a CLIP-family model. The "
                                     "defaults of the second group are the recipe of the size, in the model's file.")
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", choices=MODELS, help="(liteclip)", metavar="NAME")
    add("--config", help="a size of that model (the tiny one for shapes, else the published one)")
    add("--data", help=f"{', '.join(data.NAMES)}, or your own folder, .csv, .tsv, .json or shards, such as "
                       "'shards/{00000..00099}.tar' (shapes, in the model's language)")
    add("--root", help="the folder with the files of a named data set (flickr8k is downloaded to data/flickr8k)")
    add("--cache", help="the folder for decoded pictures and downloaded weights (data/cache)")
    add("--out", help="the run's folder (runs/MODEL-DATA)")
    add("--resume", metavar="RUN", help="go on with the run in this folder, or begin it there")
    add("--scratch", action="store_true", help="start from random weights where the recipe starts from published ones")
    add("--samples", type=int, help="pictures in an epoch, after which a run is evaluated and saved (all)")
    add = parser.add_argument_group("the recipe").add_argument
    add("--epochs", type=float, help="passes over the training images")
    add("--batch", type=int, help="images a step, over all processes together")
    add("--lr", type=float, help="peak learning rate")
    add("--image-lr", type=float, help="that of the image tower's matrices, as a multiple of --lr")
    add("--weight-decay", type=float)
    add("--warmup", type=float, help="the share of the steps in which the learning rate rises, 0 to 1")
    add("--seed", type=int)
    add = parser.add_argument_group("how it is computed; except for --precision, the result is the same up to rounding "
                                    "and dropout").add_argument
    add("--precision", choices=("fp32", "bf16", "fp16"), help="(what the device is best at)")
    add("--microbatch", type=int, metavar="N", help="encode N images a process at a time: less memory, a "
                                                                 "second forward pass, and still one batch (0: all)")
    add("--recompute", action=switch, help="keep only the inputs of blocks for the backward pass: much less memory, a "
                                           "second forward pass")
    add("--compile", action=switch, help="compile the towers: a minute's wait, then faster on a GPU")
    add("--shard-optimizer", action=switch, help="divide AdamW's moments among the processes")
    return vars(parser.parse_args(argv))


def settle(typed):
    """The settings of a run: defaults < recipe < checkpoint < what was typed."""
    for name, value in typed.items():
        if value == "":
            raise UserError(f"--{name.replace('_', '-')} is empty: a variable of the shell that is not set?")
    resume, saved, path = typed.pop("resume", None), {}, None
    if resume is not None:
        folder = Path(resume).parent if Path(resume).is_file() else Path(resume)
        path, typed["out"] = folder / "last.pt", str(folder)
        saved = data.read_checkpoint(path)["args"] if path.exists() else {}
        if not saved:
            say(f"{path}: no checkpoint yet; a new run begins there")
    for name, value in typed.items():
        if saved and name not in MAY_CHANGE and value != saved.get(name):
            raise UserError(f"--{name.replace('_', '-')} {value} does not go with {path}, where it is "
                            f"{saved.get(name)}; a resumed run takes its settings from the checkpoint")
    args = {**DEFAULTS, **saved, **typed, "checkpoint": str(path) if saved else None}
    known = sizes(args["model"])
    generated = args["data"] in (None, *data.GENERATED)
    args["config"] = args["config"] or next(size for size in known if not generated or size.endswith("tiny"))
    if args["config"] not in known:
        raise UserError(f"--config {args['config']}: {args['model']} has no such size; known: {', '.join(known)}")
    recipe = home(args["model"]).RECIPES[args["config"]]
    recipe = {**recipe, **recipe.get("scratch", {})} if args["scratch"] else recipe
    args = {**{name: recipe[name] for name in ("epochs", "batch", "lr", "image_lr", "weight_decay", "warmup")}, **args}
    args["data"] = args["data"] or recipe.get("data", "shapes")
    for name, low, high in (("epochs", 1e-6, 1e6), ("lr", 0, 1e9), ("warmup", 0, 1), ("samples", 2, 1e12),
                            ("seed", 0, 2e9)):
        if args[name] is not None and not low <= args[name] <= high:
            raise UserError(f"--{name} {args[name]}: expected {low:g} to {high:g}")
    if args["out"] and (Path(args["out"]) / "last.pt").exists() and not saved:
        raise UserError(f"--out {args['out']} holds a run already; go on with --resume, or name another folder")
    return argparse.Namespace(**args)


def join_processes():
    """Under torchrun: one of several processes, with a GPU of its own if there are any."""
    gpu = torch.cuda.is_available()
    try:
        if gpu:
            torch.cuda.set_device(data.best_device())
        # A long timeout: the others wait while one process downloads and decodes.
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=6))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes ({' '.join(str(error).split())[:200]}); start them with "
                        "torchrun, at most one for each GPU of a machine") from None


def main(argv=None):
    typed = parse(argv)
    with data.entrance("train.py"):
        try:
            args = settle(typed)
            if "WORLD_SIZE" in os.environ:  # under torchrun
                join_processes()
            finish(args, train(args))
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise UserError(f"--compile does not work here ({str(error).strip().splitlines()[0]}); go on without it, "
                            "with --resume and --no-compile if the run has begun") from None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    main()
