"""What the papers claim, put to the test on generated pictures: trains what is not there yet, then prints its tables.

    python experiments/claims.py prolip      # uncertainty, inclusion, prompts; three runs of 5 minutes on two cores
    python experiments/claims.py llip        # numbers of tokens, what is not mixed, temperature; 21 runs
    python experiments/claims.py clips       # which part of a long caption, how much, captioner; 36 runs; matplotlib

Runs go to runs/claims/ and are used again when they are there. --seeds 0 for one run, --out FOLDER for the pictures.
"""
import argparse
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clips  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import llip  # noqa: E402
import prolip  # noqa: E402
import shapes  # noqa: E402
import train  # noqa: E402


def trained(model, seed, variant="", flags=(), **changes):
    """-> model, tokenizer of a tiny model, trained on shapes or as the flags say, with these changes to its Config."""
    home, folder = evaluate.home(model), Path("runs/claims") / f"{model}{variant}-{seed}"
    tiny = "koclip-tiny" if model == "koclip" else "tiny"
    name = tiny + variant
    home.CONFIGS[name], home.RECIPES[name] = replace(home.CONFIGS[tiny], **changes), home.RECIPES[tiny]
    if not (folder / "done").exists():
        train.main(["--resume", str(folder), "--model", model, "--config", name, "--data", "shapes",
                    "--seed", str(seed), *flags])
        (folder / "done").touch()
    model, tokenizer, _ = evaluate.load(folder, device="cpu")
    return model, tokenizer


def add_model(name, Model, file):
    """Make train.py and evaluate.py know a variant of a model, which has the sizes and recipes of that file."""
    Model.__module__, evaluate.MODELS[name] = file.__name__, Model


def encode_pictures(model, pictures):
    """uint8 (N, S, S, 3) in NumPy -> features."""
    with torch.no_grad():
        return evaluate.join([model.encode_image(torch.from_numpy(np.ascontiguousarray(part)).permute(0, 3, 1, 2))
                           for part in np.array_split(pictures, -(-len(pictures) // 256))])


def encode_texts(model, tokenizer, texts):
    with torch.no_grad():
        return evaluate.join([model.encode_text(model.tokenize(texts[i:i + 256], tokenizer))
                           for i in range(0, len(texts), 256)])


def spearman(x, y):
    """Spearman's rank correlation along the last axis; equal values get the mean of their ranks."""
    def ranks(values):
        values = np.asarray(values, float)
        return (values[..., :, None] > values[..., None, :]).sum(-1) + (
            values[..., :, None] == values[..., None, :]).sum(-1) / 2
    a, b = (r - r.mean(-1, keepdims=True) for r in np.broadcast_arrays(ranks(x), ranks(y)))
    return (a * b).sum(-1) / np.sqrt((a ** 2).sum(-1) * (b ** 2).sum(-1)).clip(1e-12)


def table():
    """-> name -> a value for each seed, and the function that adds one."""
    found = {}

    def note(name, value):
        found.setdefault(name, []).append(float(value))
    return found, note


def report(title, found):
    """A line for each name: mean and standard deviation over the seeds."""
    print(f"\n{title}")
    for name, values in found.items():
        sd = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
        each = f"   ({', '.join(f'{v:.4g}' for v in values)})" if len(values) > 1 else ""
        print(f"  {name:66} {statistics.mean(values):.4g}{sd}{each}")


# === ProLIP ==========================================================================================================

SHARES = (0.0, 0.25, 0.5, 0.75)  # of a picture or of a text that is hidden
# Three prompts that fit and three that do not, or not quite: what re-weighting should tell apart.
PROMPTS = ("a {}", "a picture of a {}", "there is a {}", "a {} above a {}", "exactly three shapes: a {} and two moons",
           "on a checkered background, a {}")


def inside(first, second):
    """Whether each Gaussian of `first` lies in that of `second`: the test at eps = 0, summed over the dimensions."""
    return (prolip.inclusion_test(first, second) - prolip.inclusion_test(second, first)).sum(dim=-1) > 0


def prolip_claims(seeds, out, scenes=500):
    keys = [f"0/test/{i}" for i in range(scenes)]
    scenes = [shapes.make_scene(key) for key in keys]
    found, note = table()
    split, task = data.load("shapes", "test", 32), data.load_zero_shot("shapes", 32)
    for seed in seeds:
        model, tokenizer = trained("prolip", seed)
        size = model.config.image_size
        scores, _ = evaluate.evaluate(model, tokenizer, split, task, "fp32")
        for key, what in (("i2t_r1", "I2T R@1"), ("t2i_r1", "T2I R@1"), ("zs_all", "zero-shot")):
            note(f"{what}, %", scores[key])
        pictures = encode_pictures(model, np.stack([shapes.draw(scene, size) for scene in scenes]))

        # --- captions: from general to exact, by length, and with words masked ---
        ladders = [shapes.ladder(scene) for scene in scenes]
        texts = encode_texts(model, tokenizer, [text for ladder in ladders for text in ladder])
        uncertainty = texts.uncertainty.view(-1, 4).numpy()
        for rung in range(4):
            note(f"text: mean uncertainty, rung {rung + 1} of 4", uncertainty[:, rung].mean())
        note("text: % of ladders wholly in order (chance 4.2)", 100 * (np.diff(uncertainty) < 0).all(axis=1).mean())
        note("text: % of rungs 2 to 4 in order (chance 16.7)",
             100 * (np.diff(uncertainty[:, 1:]) < 0).all(axis=1).mean())
        note("text: Spearman's rho of generality and uncertainty (1: in order)",
             spearman((3, 2, 1, 0), uncertainty).mean())
        captions = [caption for sample in split.samples for caption in sample.captions]
        spread = encode_texts(model, tokenizer, captions).uncertainty.numpy()
        note("text: rho of a caption's shortness and uncertainty (1: in order)",
             spearman([-len(caption.split()) for caption in captions], spread))
        tokens = model.tokenize([ladder[3] for ladder in ladders], tokenizer)
        words = (tokens != model.config.pad_id) & (tokens != model.config.end_id)
        draws = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            masked = np.stack([model.encode_text(tokens.masked_fill(words & (draws < share), model.config.mask_id))
                               .uncertainty.numpy() for share in SHARES], axis=1)  # (captions, shares)
        for share, column in zip(SHARES, masked.T):
            note(f"text: mean uncertainty, {share:.0%} of the words of rung 4 masked", column.mean())
        note("text: rho of words masked and uncertainty (1: in order)", spearman(SHARES, masked).mean())

        # --- pictures: with patches left out, as in training, and with gray tiles over them ---
        images = torch.from_numpy(np.stack([shapes.draw(scene, size) for scene in scenes])).permute(0, 3, 1, 2)
        patches = (size // model.config.patch_size) ** 2
        order = torch.stack([torch.randperm(patches, generator=torch.Generator().manual_seed(i))
                             for i in range(len(scenes))])
        with torch.no_grad():
            without = np.stack([
                model.encode_image(images, order[:, :patches - int(share * patches)].sort(dim=1).values)
                .uncertainty.numpy() for share in SHARES], axis=1)  # (scenes, shares)
        covered = np.stack([encode_pictures(model, np.stack([shapes.draw(scene, size, share) for scene in scenes]))
                            .uncertainty.numpy() for share in SHARES], axis=1)
        for what, columns in (("left out", without), ("under gray tiles", covered)):
            for share, column in zip(SHARES, columns.T):
                note(f"image: mean uncertainty, {share:.0%} of it {what}", column.mean())
            note(f"image: rho of the share {what} and uncertainty (1: in order)", spearman(SHARES, columns).mean())

        # --- inclusion ---
        def repeat(features):
            return prolip.Gaussian(*(x.repeat_interleave(4, dim=0) for x in features))
        contained = inside(repeat(pictures), texts).view(-1, 4).float().mean(dim=0)
        for rung in range(4):
            note(f"inclusion: % of pictures in their caption, rung {rung + 1}", 100 * contained[rung])
        test = prolip.inclusion_test(repeat(pictures), texts).sum(dim=-1).view(-1, 4)
        note("inclusion: % where the picture is more in rung 1 than in rung 4", 100 * (test[:, 0] > test[:, 3])
             .float().mean())
        model.config = replace(model.config, masked_share=1.0)  # of every sample a masked copy
        batch = model.text_batch([data.Sample([ladder[3]]) for ladder in ladders], list(map(random.Random, keys)),
                                 tokenizer)
        with torch.no_grad():
            masked_images = model.encode_image(images, batch["kept_patches"])
            masked_texts = model.encode_text(batch["masked_tokens"])
            originals = model.encode_text(batch["tokens"])
        note("inclusion: % of pictures in their masked copy", 100 * inside(pictures, masked_images).float().mean())
        note("inclusion: % of texts in their masked copy", 100 * inside(originals, masked_texts).float().mean())

        for name, value in prompt_accuracy(model, tokenizer, seed).items():
            note(name, value)
        if seed == seeds[0]:
            draw_prolip(out / "prolip.png", model, tokenizer, scenes)
    report(f"ProLIP tiny on shapes, seeds {', '.join(map(str, seeds))}: mean ± sd (each)", found)


def prompt_accuracy(model, tokenizer, seed, shots=5):
    """Zero-shot accuracy with PROMPTS, all alike and re-weighted by `shots` pictures of each class, on the others."""
    task = data.load_zero_shot("shapes", model.config.image_size)
    labels = torch.from_numpy(task.labels)
    pictures = encode_pictures(model, task.images)
    nouns = [prompts[0].split(" ", 1)[1] for prompts in task.prompts]
    texts = encode_texts(model, tokenizer, [shapes.grammar(prompt.replace("{}", noun)) for noun in nouns
                                            for prompt in PROMPTS])
    shown = torch.arange(len(labels)) % 10 < shots  # ten pictures of each class, in a row
    uniform, weighted, good = [], [], []
    for label in range(len(nouns)):
        prompts = prolip.Gaussian(*(x[label * len(PROMPTS):(label + 1) * len(PROMPTS)] for x in texts))
        few = prolip.Gaussian(*(x[shown & (labels == label)] for x in pictures))
        weights = prolip.reweight_prompts(few, prompts, generator=torch.Generator().manual_seed(seed))
        uniform.append(prolip.mix(prompts, torch.full_like(weights, 1 / len(weights))).mean)
        weighted.append(prolip.mix(prompts, weights).mean)
        good.append(weights[:3].sum())

    def accuracy(classes):
        right = (pictures.mean[~shown] @ torch.cat(classes).T).argmax(dim=1) == labels[~shown]
        return 100 * right.float().mean()
    return {"prompts: accuracy, all six alike, %": accuracy(uniform),
            f"prompts: accuracy, re-weighted by {shots} pictures a class, %": accuracy(weighted),
            "prompts: weight of the three that fit, % (alike: 50)": 100 * torch.stack(good).mean()}


def left_out(model, scene, count):
    """A scene with more and more patches left out -> (scene, numbers of these patches, uncertainty) for each."""
    grid = model.config.image_size // model.config.patch_size
    order = random.Random(0).sample(range(grid ** 2), grid ** 2)
    picture = torch.from_numpy(shapes.draw(scene, model.config.image_size)).permute(2, 0, 1)[None]
    found = []
    for i in range(count):
        hidden = order[:i * grid ** 2 // (count + 1)]
        keep = torch.tensor([[patch for patch in range(grid ** 2) if patch not in hidden]])
        with torch.no_grad():
            found.append((scene, hidden, model.encode_image(picture, keep).uncertainty[0]))
    return found


def draw_prolip(path, model, tokenizer, scenes, count=6, side=112, gap=14):
    """The most and the least certain pictures and captions, and what leaving out parts of a picture does."""
    size, grid = model.config.image_size, model.config.image_size // model.config.patch_size
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    uncertainty = encode_pictures(model, np.stack([shapes.draw(scene, size) for scene in scenes])).uncertainty
    order = uncertainty.argsort().tolist()
    rows = [("most certain pictures", [(scenes[i], [], uncertainty[i]) for i in order[:count]]),
            ("least certain pictures", [(scenes[i], [], uncertainty[i]) for i in order[-count:]])]
    rows.append(("one picture, with patches left out", left_out(model, scenes[order[len(order) // 2]], count)))
    width = count * (side + gap) + gap
    captions = sorted({caption for scene in scenes for caption in [*shapes.captions(scene), *shapes.ladder(scene)]})
    spread = encode_texts(model, tokenizer, captions).uncertainty
    ranked = spread.argsort().tolist()
    lists = [("most certain captions", ranked[:count]), ("least certain captions", ranked[:-count - 1:-1])]
    height = len(rows) * (side + 54) + len(lists) * (30 + 21 * count) + 3 * gap
    sheet = Image.new("RGB", (width, height), "white")
    pen, y = ImageDraw.Draw(sheet), gap
    for title, row in rows:
        pen.text((gap, y), title, fill="black", font=font)
        for column, (scene, hidden, value) in enumerate(row):
            x = gap + column * (side + gap)
            sheet.paste(Image.fromarray(shapes.draw(scene, side)), (x, y + 22))
            for patch in hidden:
                left, top = x + patch % grid * side // grid, y + 22 + patch // grid * side // grid
                pen.rectangle((left, top, left + side // grid, top + side // grid), fill=(205, 210, 222))
            pen.text((x, y + 24 + side), f"{value:.4f}", fill="gray", font=small)
        y += side + 54
    longest = spread.max().item()
    for title, chosen in lists:
        pen.text((gap, y), title, fill="black", font=font)
        for line, i in enumerate(chosen):
            top = y + 24 + 21 * line
            pen.rectangle((gap, top + 3, gap + 150 * spread[i].item() / longest, top + 14), fill=(70, 110, 200))
            pen.text((gap + 158, top), f"{spread[i]:.4f}", fill="gray", font=small)
            text = captions[i]
            while pen.textlength(text, font=small) > width - 230 - gap:
                text = text[:-4] + "..."
            pen.text((gap + 212, top), text, fill="black", font=small)
        y += 30 + 21 * count
    sheet.save(path)
    print(f"picture: {path}")


# === Llip ============================================================================================================

class Registers(llip.Llip):
    """K tokens in the ViT, of which only the first is compared: room to think in, but nothing to choose from."""
    def encode_image(self, images):
        return llip.KeysValues(*(x[:, :, :1] for x in super().encode_image(images)))


class LearnedAverage(llip.Llip):
    """The tokens are mixed, but alike for all captions: by one query that is learned."""
    def __init__(self, config):
        super().__init__(config)
        self.query = torch.nn.Parameter(torch.randn(config.mixing_heads, config.embed_dim // config.mixing_heads))

    def encode_text(self, tokens):
        query, target = super().encode_text(tokens)
        return llip.QueryTarget(self.query.expand_as(query), target)


VARIANTS = {  # what is compared: (model, part of the run's name, changes to the tiny configuration)
    "K = 1: only the sigmoid loss": ("llip", "-k1", {"mixture_tokens": 1}),
    "16 tokens, the first compared (registers)": ("llip-registers", "", {}),
    "16 tokens, their mean": ("llip", "-mean", {"temperature": 1e6}),
    "16 tokens, a learned mean": ("llip-learnedaverage", "", {}),
    "K = 4": ("llip", "-k4", {"mixture_tokens": 4}),
    "K = 16": ("llip", "-k16", {"mixture_tokens": 16}),
    "K = 32": ("llip", "-k32", {"mixture_tokens": 32}),
}
TEMPERATURES = (1, 3, 5, 8, 10)  # at test time; trained with 5


def llip_claims(seeds, out):
    split = data.load("shapes", "test", llip.CONFIGS["tiny"].image_size)
    task = data.load_zero_shot("shapes", llip.CONFIGS["tiny"].image_size)
    found, note = table()
    for seed in seeds:
        for name, (model, variant, changes) in VARIANTS.items():
            model, tokenizer = trained(model, seed, variant, **changes)
            scores, features = evaluate.evaluate(model, tokenizer, split, task, "fp32")
            for key, what in (("i2t_r1", "I2T R@1"), ("t2i_r1", "T2I R@1"), ("zs_all", "zero-shot")):
                note(f"{name}: {what}, %", scores[key])
            if name != "K = 16":
                continue
            for model.temperature in TEMPERATURES:
                scores, _ = evaluate.evaluate(model, tokenizer, split, task, "fp32")
                name = f"K = 16 at temperature {model.temperature}"
                note(f"{name}: mean of both R@1, %", (scores["i2t_r1"] + scores["t2i_r1"]) / 2)
                note(f"{name}: zero-shot, %", scores["zs_all"])
            model.temperature = model.config.temperature
            images, texts, owner = features
            weights = torch.cat([llip.mixing_weights(images.keys[i:i + 1], texts.query[owner == i], model.temperature)
                                 for i in range(len(split))])  # (images, M, K, 5 captions of the image)
            entropy = -(weights * weights.clamp(min=1e-12).log()).sum(dim=2)  # (images, M, 5)
            note("K = 16: tokens that a caption uses in a head (exp of the entropy)", entropy.exp().mean())
            moved = (weights[..., :, None] - weights[..., None, :]).abs().sum(dim=2).mean(dim=1) / 2  # (images, 5, 5)
            note("K = 16: weight that moves between two captions of an image, %", 100 * moved.sum() / (20 * len(split)))
            if seed == seeds[0]:
                draw_llip(out / "llip.png", model, tokenizer)
    report(f"Llip tiny on shapes, seeds {', '.join(map(str, seeds))}: mean ± sd (each)", found)


def draw_llip(path, model, tokenizer, key="0/test/20", side=224, gap=16, cell=26):
    """One image, four captions, and what each takes from the image: a row for each mixing head, a column a token."""
    scene, words = shapes.make_scene(key, count=2), shapes.ENGLISH
    captions = [shapes.grammar(text) for text in (
        *(words["object"][2].format(a=shapes.describe(thing, words, ("colour", "shape"))) for thing in scene.things),
        words["count"][0].format(n=words["counts"][1]), words["backdrop"][0].format(bg=scene.background))]
    picture = torch.from_numpy(shapes.draw(scene, model.config.image_size)).permute(2, 0, 1)[None]
    with torch.no_grad():
        images = model.encode_image(picture)
        texts = model.encode_text(model.tokenize(captions, tokenizer))
        weights = llip.mixing_weights(images.keys, texts.query, model.temperature)[0]  # (M, K, captions)
        cosines = model.similarity(images, texts)[0]
    heads, tokens, _ = weights.shape
    font, small, each = ImageFont.load_default(14), ImageFont.load_default(12), heads * cell + 40
    sheet = Image.new("RGB", (side + 3 * gap + tokens * cell, len(captions) * each + 2 * gap + 16), "white")
    pen = ImageDraw.Draw(sheet)
    sheet.paste(Image.fromarray(shapes.draw(scene, side)), (gap, gap))
    x = side + 2 * gap
    for i, caption in enumerate(captions):
        top = gap + i * each
        pen.text((x, top), f"{caption}   (cosine {cosines[i]:.2f})", fill="black", font=font)
        for head in range(heads):
            for token in range(tokens):
                shade = int(255 * (1 - weights[head, token, i].item()))
                place = x + token * cell, top + 22 + head * cell
                pen.rectangle((*place, place[0] + cell - 2, place[1] + cell - 2), fill=(shade, shade, 255),
                              outline=(210, 210, 225))
    pen.text((x, gap + len(captions) * each), f"columns: {tokens} mixture tokens; rows: {heads} heads; blue: weight 1",
             fill="gray", font=small)
    sheet.save(path)
    print(f"picture: {path}")


# === CLIPS ===========================================================================================================

class WebAlone(clips.CLIPS):
    """The web's caption in the place of the synthetic one's part, too."""
    def text_batch(self, samples, rngs, tokenizer):
        batch = super().text_batch(samples, rngs, tokenizer)
        return batch | {"sub_tokens": batch["web_tokens"]}


PARTS = {"first": "the first tokens", "block": "a block of tokens", "random": "tokens from anywhere"}
LENGTHS = (8, 16)  # tokens of the synthetic caption; a whole one has 20 to 75
WHOLE = {"shorten": "first", "shorten_to": 77, "context_length": 80}
ALONE = {"caption_layers": 0}  # without the captioner
TRAININGS = {  # what is compared: (model, part of the run's name, changes to the tiny configuration)
    "web caption alone": ("clips-webalone", "-alone", ALONE),
    **{f"{words}, {length}": ("clips", f"-{how}{length}", {"shorten": how, "shorten_to": length, **ALONE})
       for how, words in PARTS.items() for length in LENGTHS},
    "one sentence": ("clips", "-sentence", ALONE),
    "the whole": ("clips", "-whole", {**WHOLE, **ALONE}),
    "one sentence, and the captioner": ("clips", "-captioner", {}),
}

LONGER = ("web caption alone", "one sentence", "the whole")


def clips_claims(seeds, out, epochs="2"):
    size = clips.CONFIGS["tiny"].image_size
    split, task = data.load("shapes", "test", size), data.load_zero_shot("shapes", size)
    found, note = table()
    points = {}  # name -> mean R@1 and zero-shot of each seed
    for seed in seeds:
        for name, (model, variant, changes) in TRAININGS.items():
            model, tokenizer = trained(model, seed, variant, ("--epochs", epochs), **changes)
            scores, _ = evaluate.evaluate(model, tokenizer, split, task, "fp32")
            for key, what in (("i2t_r1", "I2T R@1"), ("t2i_r1", "T2I R@1"), ("zs_all", "zero-shot")):
                note(f"{name}: {what}, %", scores[key])
            points.setdefault(name, []).append(((scores["i2t_r1"] + scores["t2i_r1"]) / 2, scores["zs_all"]))
        lengths = [len(tokenizer.encode(sample.long)) for sample in split.samples]
        part = [len(tokenizer.encode(text)) for sample in split.samples for text in sentences(sample.long)]

        for name in LONGER if seed == seeds[0] else ():  # as long as the whole recipe
            model, variant, changes = TRAININGS[name]
            model, tokenizer = trained(model, seed, f"{variant}-long", **changes)
            scores, _ = evaluate.evaluate(model, tokenizer, split, task, "fp32")
            for key, what in (("i2t_r1", "I2T R@1"), ("t2i_r1", "T2I R@1"), ("zs_all", "zero-shot")):
                note(f"8 epochs, only seed {seed}, {name}: {what}, %", scores[key])

        model, tokenizer = trained("clips", seed)  # the whole recipe, with its captioner
        scores, _ = evaluate.evaluate(model, tokenizer, split, task, "fp32")
        for key, what in (("i2t_r1", "I2T R@1"), ("t2i_r1", "T2I R@1"), ("zs_all", "zero-shot")):
            note(f"the whole recipe: {what}, %", scores[key])
        for web in (False, True):
            for name, value in caption_quality(model, tokenizer, split, web).items():
                note(name, value)
        if seed == seeds[0]:
            draw_captions(out / "clips-captions.png", model, tokenizer, split)
    draw_lengths(out / "clips.png", points, statistics.mean(lengths), statistics.mean(part))
    report(f"CLIPS tiny on shapes, {epochs} epochs, seeds {', '.join(map(str, seeds))}: mean ± sd (each)", found)


def written(model, tokenizer, split, web=False, rows=slice(None)):
    """What the captioner says of pictures of a split, with or without their web captions."""
    samples = split.samples[rows]
    images = torch.from_numpy(np.array(split.images[rows])).permute(0, 3, 1, 2)
    return model.caption(images, tokenizer, model.tokenize([s.web for s in samples], tokenizer) if web else None)


def sentences(text):
    return [part.strip() for part in text.lower().split(".") if part.strip()]


def caption_quality(model, tokenizer, split, web):
    """How much of the synthetic captions is said, by the number of things in the picture."""
    found = {}
    for i, text in enumerate(written(model, tokenizer, split, web)):
        truth = sentences(split.samples[i].long)
        things = ("one shape", "two shapes", "three shapes").index(truth[0].removeprefix("the picture shows ")) + 1
        truth = [s for s in truth if s != "nothing else is in the picture"]  # said of every second picture, by chance
        said = [s for s in sentences(text) if s != "nothing else is in the picture"]
        found.setdefault(things, []).append((said == truth, sum(s in said for s in truth) / len(truth)))
    given = "with the web caption" if web else "from the picture alone"
    return {f"captions {given}, {things} thing{'s' * (things > 1)}: {what}, %": 100 * statistics.mean(values)
            for things, rows in sorted(found.items())
            for what, values in zip(("all right", "sentences right"), zip(*rows))}


def wrap(text, pen, font, width):
    lines = [""]
    for word in text.split():
        if pen.textlength(f"{lines[-1]} {word}", font=font) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def draw_captions(path, model, tokenizer, split, count=6, side=128, gap=16, width=860, line=19):
    """Pictures, what the web says of them, what a captioner said, and what the model says from the picture alone."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    pen, rows = ImageDraw.Draw(Image.new("RGB", (1, 1))), []
    for sample, text in zip(split.samples, written(model, tokenizer, split, rows=slice(count))):
        words = (("web", sample.web, "gray"), ("synthetic", sample.long, "gray"), ("written", text, "black"))
        rows.append([(label, wrap(text, pen, font, width - side - 4 * gap - 64), colour)
                     for label, text, colour in words])
    heights = [max(side, sum(line * len(lines) + 5 for _, lines, _ in row)) for row in rows]
    sheet = Image.new("RGB", (width, sum(heights) + gap * (count + 1)), "white")
    pen, top = ImageDraw.Draw(sheet), gap
    for i, (row, height) in enumerate(zip(rows, heights)):
        sheet.paste(Image.fromarray(shapes.draw(shapes.make_scene(f"0/test/{i}"), side)), (gap, top))
        y = top
        for label, lines, colour in row:
            pen.text((side + 2 * gap, y), label, fill=(70, 110, 200), font=small)
            for text in lines:
                pen.text((side + 2 * gap + 68, y - 1), text, fill=colour, font=font)
                y += line
            y += 5
        top += height + gap
    sheet.save(path)
    print(f"picture: {path}")


def draw_lengths(path, points, whole, sentence):
    """The inverse effect: accuracy against how much of the synthetic caption is contrasted, a line for each way."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained")
    for panel, (axis, title) in enumerate(zip(axes, ("mean R@1 (%)", "zero-shot (%)"))):
        def mark(tokens, names, **style):
            values = [[seed[panel] for seed in points[name]] for name in names]
            axis.errorbar(tokens, [statistics.mean(v) for v in values],
                          [statistics.stdev(v) if len(v) > 1 else 0 for v in values], capsize=3, marker="o", **style)
        for how, words in PARTS.items():
            mark([*LENGTHS, whole], [*(f"{words}, {length}" for length in LENGTHS), "the whole"], label=words)
        mark([whole], ["the whole"], color="black", label="the whole", linestyle="none")
        mark([sentence], ["one sentence"], color="tab:purple", label="one sentence", linestyle="none")
        alone = statistics.mean(seed[panel] for seed in points["web caption alone"])
        axis.axhline(alone, color="gray", linestyle="--", label="web caption alone")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("tokens of the synthetic caption (mean)", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    print(f"picture: {path}")


# =====================================================================================================================

if __name__ == "__main__":
    claims = {"prolip": prolip_claims, "llip": llip_claims, "clips": clips_claims}
    parser = argparse.ArgumentParser(description="The papers' claims on generated pictures.")
    parser.add_argument("model", choices=claims)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("."), help="where pictures go (default: here)")
    options = parser.parse_args()
    if options.model == "clips":
        try:
            import matplotlib  # noqa: F401, to fail before the training, not after
        except ModuleNotFoundError:
            sys.exit("the plot of the inverse effect needs matplotlib: pip install matplotlib")
    add_model("llip-registers", Registers, llip)
    add_model("llip-learnedaverage", LearnedAverage, llip)
    add_model("clips-webalone", WebAlone, clips)
    claims[options.model](options.seeds, options.out)
