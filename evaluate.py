"""What a trained model can do: retrieval and zero-shot figures, and a search through your own pictures.

    python evaluate.py runs/liteclip-shapes                          # the run's best.pt on the test split of its data
    python evaluate.py clip/vit-b-32 --data flickr8k                 # published weights, by MODEL/SIZE
    python evaluate.py runs/liteclip-shapes --search my_pictures "a red star"

The first two print a table row and draw retrieval.png; the last prints the best matches and draws them on search.png.
train.py evaluates with the same functions, on one process or several.
"""
import argparse
import concurrent.futures
import contextlib
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import clip
import clips
import data
import liteclip
import llip
import prolip
from data import UserError, say

MODELS = {"clip": clip.CLIP, "koclip": clip.CLIP, "liteclip": liteclip.LiteCLIP, "prolip": prolip.ProLIP,
          "llip": llip.Llip, "clips": clips.CLIPS}  # KoCLIP is CLIP with other towers, in sizes of its own


def home(model):
    """The file of a model, with its CONFIGS, RECIPES, PUBLISHED and `load`."""
    return sys.modules[MODELS[model].__module__]


def sizes(model):
    return [size for size in home(model).CONFIGS if size.startswith("koclip") == (model == "koclip")]


def published():
    return [f"{model}/{size}" for model in MODELS for size in sizes(model) if size in home(model).PUBLISHED]


def load(source, device=None, cache="data/cache"):
    """`load` for any model: a checkpoint, its run's folder, or MODEL/SIZE -> model, tokenizer, preprocess."""
    saved = settings(source)
    file = home(saved["model"])
    source = saved["config"] if source in published() else source
    return data.load_model(MODELS[saved["model"]], file.Config, file.PUBLISHED, file.RECIPES, source, device, cache)


def settings(source):
    """What a checkpoint or a published model is: its model, config, data, root, step and minutes of training."""
    if source in published():
        model, size = source.split("/")
        own = home(model).RECIPES[size].get("data", "shapes")
        return {"model": model, "config": size, "data": own, "root": None, "step": 0, "minutes": 0.0}
    if not Path(source).exists():
        raise UserError(f"{source}: no such checkpoint; published weights go by name: {', '.join(published())}")
    content = data.read_checkpoint(source)
    if content["model"] not in MODELS:
        raise UserError(f"{source} holds a model {content['model']!r}; known: {', '.join(MODELS)}")
    return {**content["args"], "model": content["model"], "step": content.get("step", 0),
            "minutes": content.get("minutes", 0.0)}


# --- processes and precision ----------------------------------------------------------------------------------------

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def pick_precision(device, asked=None):
    """"bf16", "fp16" or "fp32": what was asked for, else bf16 where the hardware computes in it, fp16 on older GPUs."""
    if asked == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    if asked:
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu" and hasattr(torch.cpu, "_is_avx512_bf16_supported"):  # else bf16 is emulated, and slow
        return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    return "fp32"


def autocast(device, precision):
    """The context of every encoder call. Weights stay fp32; the models leave it for logits and losses."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


# --- features -------------------------------------------------------------------------------------------------------
# A model's features are a tensor, or a named tuple of tensors, with the batch first.

def each(features, function):
    """A function of each tensor of the features."""
    return type(features)(*map(function, features)) if isinstance(features, tuple) else function(features)


def join(parts):
    """The features of several batches, one after the other."""
    return type(parts[0])(*map(torch.cat, zip(*parts))) if isinstance(parts[0], tuple) else torch.cat(parts)


def take(features, device, rows=slice(None)):
    """Some rows of the features, or all, on the device."""
    return each(features, lambda tensor: tensor[rows].to(device))


def spread(n, encode, batch=256):
    """encode(rows) for rows 0 to n - 1 in batches, divided among the processes -> all features, on every CPU."""
    parts = {first: each(encode(range(first, min(first + batch, n))), torch.Tensor.cpu)
             for first in range(rank() * batch, n, world() * batch)}
    if world() > 1:
        everyone = [None] * world()
        dist.all_gather_object(everyone, parts)
        parts = {first: part for some in everyone for first, part in some.items()}
    return join([parts[first] for first in sorted(parts)])


def pixels(images, rows):
    """Some rows (a range) of uint8 (N, S, S, 3) in NumPy -> (n, 3, S, S) in torch, channels last in memory."""
    return torch.from_numpy(images[rows.start:rows.stop].copy()).permute(0, 3, 1, 2)


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


# --- figures --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def retrieval(model, image_features, text_features, owner, chunk=256):
    """Recall at 1, 5 and 10 over a whole gallery, in both directions, in percent.

    i2t_r5: the share of images with at least one of their own captions among the five most similar of all captions.
    t2i_r5: the share of captions whose own image is among the five most similar of all images.
    A tie with the right one counts against it, and so does NaN: a collapsed model scores zero, not 100.
    """
    device = model.logit_scale.device
    images, texts, own = len(owner.unique()), len(owner), owner.to(device)
    image_ranks, text_ranks = [], []
    all_images, all_texts = take(image_features, device), take(text_features, device)
    for first in range(0, images, chunk):
        rows = torch.arange(first, min(first + chunk, images))
        table = model.similarity(take(image_features, device, rows), all_texts)  # (i, T)
        mine = own[None] == rows.to(device)[:, None]
        best = table.masked_fill(~mine, -math.inf).amax(dim=1, keepdim=True)
        image_ranks.append((~(table < best) & ~mine).sum(dim=1))  # not table >= best, which is false for NaN
    for first in range(0, texts, chunk):
        rows = torch.arange(first, min(first + chunk, texts))
        table = model.similarity(all_images, take(text_features, device, rows))  # (I, t)
        right = table.gather(0, own[rows][None])
        text_ranks.append((~(table < right)).sum(dim=0) - 1)
    return {f"{direction}_r{k}": 100 * (torch.cat(ranks) < k).float().mean().item()
            for direction, ranks in (("i2t", image_ranks), ("t2i", text_ranks)) for k in (1, 5, 10)}


@torch.no_grad()
def zero_shot(model, tokenizer, task, precision):
    """Accuracy in percent, for each group of pictures. A class scores the mean similarity of its prompts."""
    model.eval()
    similarity = getattr(model, "classify", model.similarity)  # ProLIP compares images with classes by their means
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
    groups = {"all": slice(None), **task.groups}
    return {f"zs_{name}": float(100 * right[mask].mean()) for name, mask in groups.items()}


def evaluate(model, tokenizer, split, task, precision):
    """-> the figures of a split, and of a zero-shot task if there is one; and the features of encode_split."""
    features = encode_split(model, tokenizer, split, precision)
    scores = retrieval(model, *features)
    if task:
        scores |= zero_shot(model, tokenizer, task, precision)
    return scores, features


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


def test(source, name=None, root=None, cache="data/cache", precision=None, out=None):
    """A checkpoint, or published weights, on a test split, by default that of its own data -> its table row.

    The picture goes into `out`, by default to the checkpoint.
    """
    saved = settings(source)
    own = name in (None, saved["data"])
    name, root = name or saved["data"], root or (saved["root"] if own else None)
    model, tokenizer, _ = load(source, cache=cache)
    precision = pick_precision(model.logit_scale.device, precision)
    split = load_test_split(name, model.config, root, cache)
    task = data.load_zero_shot(name, model.config.image_size)
    scores, features = evaluate(model, tokenizer, split, task, precision)
    shown = split  # small models see small pictures; on the sheet they are drawn larger
    if model.config.image_size < 128:
        shown = load_test_split(name, replace(model.config, image_size=128), root, cache)
    folder = Path() if source in published() else Path(source) if Path(source).is_dir() else Path(source).parent
    sheet = Path(out or folder) / ("retrieval.png" if own else f"retrieval-{Path(name).stem}.png")
    draw_retrieval(sheet, model, split, shown.images, features)
    say(gallery(split))
    say(f"picture: {sheet}")
    columns = {"model": f"{saved['model']} {saved['config']}", "data": split.name,
               "I2T R@1 / 5 / 10": " / ".join(f"{scores[f'i2t_r{k}']:.1f}" for k in (1, 5, 10)),
               "T2I R@1 / 5 / 10": " / ".join(f"{scores[f't2i_r{k}']:.1f}" for k in (1, 5, 10))}
    if task:
        columns["zero-shot seen / unseen / all"] = "{zs_seen:.1f} / {zs_unseen:.1f} / {zs_all:.1f}".format(**scores)
    columns |= {"step": f"{saved['step']:,}", "minutes": f"{saved['minutes']:.1f}"}
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), columns.values()))


def load_test_split(name, config, root, cache):
    options = dict(size=config.image_size, root=root, fit=getattr(config, "fit", "crop"), cache=cache)
    try:
        return data.load(name, "test", **options)
    except data.EmptySplit as error:
        data.say_once(f"{error}; these figures are of the validation split, on which the checkpoint was chosen")
        return data.load(name, "val", **options)


# --- pictures of what was found -------------------------------------------------------------------------------------

def draw_retrieval(path, model, split, pictures, features, rows=6):
    """A sheet of captions, each with the five images most similar to it; its own image is framed in green.

    pictures: uint8 (N, S, S, 3), what to show of each image of the split, at any size.
    """
    image_features, text_features, owner = features
    device = model.logit_scale.device
    captions = [caption for sample in split.samples for caption in sample.captions]
    chosen = []
    for i in torch.linspace(0, len(split) - 1, min(rows, len(split))).long().tolist():  # the longest caption of each
        chosen.append(max((owner == i).nonzero()[:, 0].tolist(), key=lambda t: len(captions[t])))
    with torch.no_grad():
        table = model.similarity(take(image_features, device), take(text_features, device, chosen)).T.cpu()
    draw_sheet(path, [(captions[t], [(pictures[i], f"similarity {similarities[i]:.2f}", bool(i == owner[t]))
                                     for i in similarities.argsort(descending=True)[:5].tolist()])
                      for t, similarities in zip(chosen, table)])


def draw_sheet(path, rows, side=128, gap=12):
    """rows: a title, or "", and pictures in a row: (uint8 (S, S, 3), the label below it, whether it is framed)."""
    titles = [title for title, _ in rows if title]
    font, small = load_font(15, "".join(titles)), ImageFont.load_default(11)
    if font is None:
        say("no font for Hangul here (NotoSansCJK or NanumGothic, for example), so the picture numbers its titles: "
            + "; ".join(f"({i + 1}) {title}" for i, title in enumerate(titles)))
        font = ImageFont.load_default(15)
        rows = [(f"({titles.index(title) + 1})" if title else "", cells) for title, cells in rows]
    tops, y = [], gap
    for title, _ in rows:
        tops.append(y + (44 if title else 0))  # the pictures begin below two lines of title
        y = tops[-1] + side + 2 * gap + 6
    width = max(len(cells) for _, cells in rows) * (side + gap) + gap
    sheet = Image.new("RGB", (width, y), "white")
    pen = ImageDraw.Draw(sheet)
    for (title, cells), top in zip(rows, tops):
        lines = [""]
        for word in title.split():
            longer = f"{lines[-1]} {word}".strip()
            fits = pen.textlength(longer, font=font) < width - 4 * gap
            lines[-1:] = [longer] if fits else [lines[-1], word]
        pen.multiline_text((gap, top - 6), "\n".join(lines[:2]) + (" ..." if len(lines) > 2 else ""), fill="black",
                           font=font, anchor="ld", spacing=3)
        for x, (picture, label, framed) in zip(range(gap, width, side + gap), cells):
            sheet.paste(Image.fromarray(picture).resize((side, side), Image.BICUBIC), (x, top))
            while pen.textlength(label, font=small) > side:
                label = label[:-4] + "..."
            pen.text((x, top + side + 4), label, fill="gray", font=small)
            if framed:
                pen.rectangle((x - 4, top - 4, x + side + 3, top + side + 3), outline=(30, 160, 60), width=4)
    try:
        sheet.save(path)
    except OSError as error:
        say(f"cannot write the picture {path}: {error.strerror}; --out names another folder")


def load_font(size, text):
    """Pillow's own font; for Hangul the first of the usual system fonts that is here, or None."""
    if any("\uac00" <= c <= "\ud7a3" for c in text):
        for name in ("NotoSansCJK-Regular.ttc", "NanumGothic.ttf", "AppleSDGothicNeo.ttc", "malgun.ttf"):
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
        return None
    return ImageFont.load_default(size)


# --- image search ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def search(source, folder, query, cache="data/cache", precision=None, out=None, best=12):
    """The pictures of a folder that are most similar to a query: as lines of score and path, and as a contact sheet.

    The features of the folder are kept in CACHE/features. The file's name contains a fingerprint of the checkpoint and
    of every picture, so if one of them changes, the features are made anew.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: expected a folder of pictures")
    model, tokenizer, prepare = load(source, cache=cache)
    device, sheet = model.logit_scale.device, Path(out or ".") / "search.png"
    weights = Path(source) / "best.pt" if Path(source).is_dir() else source
    paths = [path for path in data.list_pictures(folder) if path.resolve() != sheet.resolve()]
    key = data.fingerprint(str(source), os.path.abspath(folder), precision)
    file = Path(cache) / "features" / f"{key}-{data.fingerprint(*map(data.stamp, [weights, *paths]))}.pt"
    with autocast(device, pick_precision(device, precision)):
        if not file.exists():
            features, kept = encode_files(model, prepare, paths)
            file.parent.mkdir(parents=True, exist_ok=True)
            with data.writing(file) as content:
                torch.save((features, kept), content)
            for old in set(file.parent.glob(f"{key}-*.pt")) - {file}:
                old.unlink(missing_ok=True)
        try:
            with torch.serialization.safe_globals([prolip.Gaussian, llip.KeysValues]):
                features, kept = torch.load(file, weights_only=True)
        except Exception as error:  # torch.load raises half a dozen types
            raise UserError(f"{file} is damaged ({type(error).__name__}); delete it") from None
        text_features = model.encode_text(model.tokenize(query, tokenizer).to(device))
    scores = model.similarity(take(features, device), text_features)[:, 0]
    found = [(scores[i].item(), paths[kept[i]]) for i in scores.argsort(descending=True)[:best].tolist()]
    cells = [(data.read_picture(path, 180), f"{score:+.3f}  {path.name}", False) for score, path in found]
    draw_sheet(sheet, [(query if i == 0 else "", cells[i:i + 4]) for i in range(0, len(cells), 4)], side=180)
    return "\n".join([*(f"{score:+.3f}  {path}" for score, path in found),
                      f"{len(kept):,} pictures searched; contact sheet: {sheet}"])


def encode_files(model, prepare, paths, batch=64):
    """-> the image features of pictures, and the numbers of those that could be read."""
    def read(path):
        try:
            return prepare(path)
        except UserError as error:
            return str(error)

    parts, kept, bad = [], [], []
    with (concurrent.futures.ThreadPoolExecutor() as pool,
          tqdm(total=len(paths), desc="pictures, once", unit=" pictures", **data.bar_options()) as bar):
        for first in range(0, len(paths), batch):
            found = list(enumerate(pool.map(read, paths[first:first + batch]), first))
            bad += [picture for _, picture in found if isinstance(picture, str)]
            good = {i: picture for i, picture in found if not isinstance(picture, str)}
            if good:
                features = model.encode_image(torch.stack([*good.values()]).to(model.logit_scale.device))
                parts.append(each(features, torch.Tensor.cpu))
                kept += good
            bar.update(len(found))
    if bad:
        say(f"{len(bad)} of {len(paths)} pictures cannot be read and are left out: "
            + "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else ""))
    if not kept:
        raise UserError(f"no picture that can be read in this folder ({', '.join(data.PICTURE_SUFFIXES[:4])}, ...)")
    return join(parts), kept


# --- the command line -----------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description="Evaluate a model, or search pictures with it.")
    add = parser.add_argument
    add("checkpoint", help="a checkpoint, its run's folder, or published weights such as clip/vit-b-32")
    add("--data", help="the test split of this data set (default: of the data that it was trained on)")
    add("--root", help="the folder with the files of a named data set")
    add("--search", nargs=2, metavar=("FOLDER", "QUERY"), help="find the pictures of a folder that fit a query best")
    add("--cache", default="data/cache", help="the folder for decoded pictures, weights and features (data/cache)")
    add("--out", help="the folder for the picture (default: the run's; for a search: this one)")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="(default: what the device is best at)")
    args = parser.parse_args(argv)
    if args.search and (args.data or args.root):
        parser.error("--search does not go with --data or --root")
    with data.entrance("evaluate.py"):
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        if args.search:
            say(search(args.checkpoint, *args.search, args.cache, args.precision, args.out))
        else:
            say(test(args.checkpoint, args.data, args.root, args.cache, args.precision, args.out))


if __name__ == "__main__":
    main()
