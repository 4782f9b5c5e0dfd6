"""Timings, as ratios of two things measured in turn in one process. Not a test: timings vary, tests must not.

    python experiments/bench.py models      # a training step of every model: time, memory, arithmetic
                                            # (or of those named: models clip/vit-b-16 llip/vit-b-16-k32; --compile)
    python experiments/bench.py loading     # batches without a model: from the cache, and from tar shards
    python experiments/bench.py plan        # what the large sizes need of a GPU's memory, worked out without one
    python experiments/bench.py peers       # the next four, as far as the packages are there
    python experiments/bench.py step        # one liteclip training step against the published stack
                                            # (needs: pip install timm transformers)
    python experiments/bench.py clip        # one vit-b-32 training step against open_clip's
                                            # (needs: pip install open_clip_torch)
    python experiments/bench.py prolip      # the pairwise loss against the published formula: time and peak memory
    python experiments/bench.py llip        # the loss over mixtures, likewise
    python experiments/bench.py clips       # what the captioner costs
    python experiments/bench.py shapes      # drawing 10,000 pictures
    python experiments/bench.py tokens      # training the tokenizer and encoding with it
"""
import functools
import io
import itertools
import math
import platform
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip  # noqa: E402
import clips  # noqa: E402
import data  # noqa: E402
import liteclip  # noqa: E402
import llip  # noqa: E402
import prolip  # noqa: E402
import shapes  # noqa: E402
import train  # noqa: E402
from evaluate import MODELS, autocast, home, pick_precision  # noqa: E402
from tokens import BPE  # noqa: E402


def in_turns(functions, turns=5):
    """Seconds of each function, the median over `turns` rounds that call each of them once, after one to warm up."""
    seconds = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}, seconds


def published_stack():
    """liteCLIP as published (timm's ConvNeXt-T, transformers' BERT-mini, two heads), with random weights for timing."""
    import timm
    from transformers import BertConfig, BertModel

    class Head(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.proj, self.ln, self.dropout = nn.Linear(width, 256), nn.LayerNorm(256), nn.Dropout(0.1)

        def forward(self, x):
            p = self.proj(x)
            return p + self.ln(self.dropout(F.gelu(p)))

    class Published(nn.Module):
        def __init__(self):
            super().__init__()
            self.image = timm.create_model("convnext_tiny", pretrained=False, num_classes=0)
            self.text = BertModel(BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
                                             intermediate_size=1024))
            self.image_head, self.text_head = Head(768), Head(256)
            self.scale = nn.Parameter(torch.tensor(2.6592))

        def forward(self, images, ids, mask):
            hidden = self.text(input_ids=ids, attention_mask=mask).last_hidden_state
            mask = mask[..., None].float()
            v = F.normalize(self.text_head((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)), dim=-1)
            u = F.normalize(self.image_head(self.image(images)), dim=-1)
            logits, labels = self.scale.exp() * u @ v.T, torch.arange(len(u))
            return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    return Published().train()


def step(batch=32):
    torch.manual_seed(0)
    tokens = torch.zeros(batch, 128, dtype=torch.long)
    lengths = [8 + i % 16 for i in range(batch)]  # 8 to 23 tokens; Flickr8k's captions: 14 on average, markers included
    for i, n in enumerate(lengths):
        tokens[i, :n] = torch.randint(1000, 30000, (n,))
    pictures = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    floats = torch.randn(batch, 3, 224, 224)

    theirs = published_stack()
    adam = torch.optim.Adam(theirs.parameters(), lr=2e-4)

    def published():
        loss = theirs(floats, tokens, (tokens != 0).long())
        adam.zero_grad()
        loss.backward()
        adam.step()

    functions = {"published, fp32, padded to 128": published}
    for precision in ("fp32", "bf16"):
        model = liteclip.LiteCLIP(liteclip.CONFIGS["liteclip"]).train()
        optimizer = train.make_optimizer(model, 0.05)

        def ours(model=model, optimizer=optimizer, precision=precision):
            with autocast(torch.device("cpu"), precision):
                loss = model(images=pictures, tokens=tokens[:, :max(lengths)])["loss"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        functions[f"liteclip.py, {precision}"] = ours
    medians, _ = in_turns(functions)
    reference = medians["published, fp32, padded to 128"]
    for name, seconds in medians.items():
        print(f"{name:32} {seconds:6.2f} s a step of {batch}   {reference / seconds:4.1f} x")


def clip_step(batch=16):
    """A vit-b-32 training step, ours and open_clip's, in fp32 and in bf16 autocast, the same optimizer for both.

    Captions of 8 to 23 tokens: open_clip pads them to 77; ours are as long as the longest, and also padded to 77.
    """
    import open_clip
    from open_clip.loss import ClipLoss

    torch.manual_seed(0)
    images = torch.randn(batch, 3, 224, 224)
    tokens = torch.zeros(batch, 77, dtype=torch.long)
    for i in range(batch):
        tokens[i, 1:8 + i % 16] = torch.randint(1000, 40000, (7 + i % 16,))
        tokens[i, 0], tokens[i, 8 + i % 16] = 49406, 49407
    theirs = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).train()
    ours = clip.CLIP(clip.CONFIGS["vit-b-32"]).train()
    loss = ClipLoss()

    def their_loss():
        return loss(*theirs(images, tokens))

    functions = {}
    for precision in ("fp32", "bf16"):
        for name, model, forward in (
                ("open_clip, captions padded to 77", theirs, their_loss),
                ("clip.py, captions padded to 77", ours, lambda: ours(images, tokens)["loss"]),
                ("clip.py", ours, lambda: ours(images, tokens[:, :24])["loss"])):
            def step(model=model, forward=forward, precision=precision,
                     optimizer=torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)):
                with autocast(torch.device("cpu"), precision):
                    value = forward()
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
            functions[f"{name}, {precision}"] = step
    medians, _ = in_turns(functions)
    for name, seconds in medians.items():
        reference = medians[f"open_clip, captions padded to 77, {name[-4:]}"]
        print(f"{name:40} {seconds:6.2f} s a step of {batch}   {reference / seconds:4.2f} x")


def pairwise_losses(batch=256, dim=768):
    """ProLIP's pairwise loss: name -> a function that returns it; and the tensors that it depends on."""
    torch.manual_seed(0)
    image, text = (prolip.Gaussian(F.normalize(torch.randn(batch, dim), dim=-1).requires_grad_(),
                                   (torch.randn(batch, dim) - 7).requires_grad_()) for _ in range(2))
    scale, bias = torch.tensor(14.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    y = 2 * torch.eye(batch) - 1

    def published():  # all pairs' variances in every dimension at once, (B, B, E), then their sum
        distance = (image.log_var.exp()[:, None] + text.log_var.exp()[None]).sum(dim=-1)
        return -F.logsigmoid(y * (scale * (image.mean @ text.mean.T - distance / 2) + bias)).sum() / batch

    ours = functools.partial(prolip.pairwise_loss, image, text, scale, bias)
    return {"published formula": published, "prolip.py": ours}, [*image, *text, scale, bias]


def mixture_losses(batch=256, tokens=32, dim=512, heads=8, temperature=5.0):
    """Llip's loss, likewise."""
    torch.manual_seed(0)
    shape = batch, heads, tokens, dim // heads
    images = llip.KeysValues(*(torch.randn(shape).requires_grad_() for _ in range(2)))
    texts = llip.QueryTarget(torch.randn(batch, heads, dim // heads).requires_grad_(),
                             F.normalize(torch.randn(batch, dim), dim=-1).requires_grad_())
    out_proj = (dim ** -0.5 * torch.randn(dim, dim)).requires_grad_()
    scale, bias = torch.tensor(14.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    y = 2 * torch.eye(batch) - 1

    def published():  # every image mixed for every caption, (B, B, E), then normalised, then compared
        logits = scale * llip.plain_cosines(images, texts, out_proj, temperature) + bias
        return -F.logsigmoid(y * logits).sum() / batch

    ours = functools.partial(llip.mixture_loss, images, texts, out_proj, scale, bias, temperature)
    return {"published formula": published, "llip.py": ours}, [*images, *texts, out_proj, scale, bias]


LOSSES = {"prolip": pairwise_losses, "llip": mixture_losses}


def forward_and_backward(function, inputs):
    for tensor in inputs:
        tensor.grad = None
    loss = function()
    loss.backward()
    return loss.item()


def peak(function, inputs=()):
    """The most memory that tensors take at once during a call, in bytes beyond what was taken before (on a CPU).

    inputs: tensors whose gradients are cleared before; else those of the call before would count as taken.
    """
    function()
    for tensor in inputs:
        tensor.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    changes = [event.nbytes() for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
               if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


def loss_of(model):
    """A loss, forward and backward, against its published formula: value, time, peak memory."""
    losses, inputs = LOSSES[model]()
    functions = {name: functools.partial(forward_and_backward, loss, inputs) for name, loss in losses.items()}
    values = {name: function() for name, function in functions.items()}
    memory = {name: peak(function, inputs) for name, function in functions.items()}
    medians, _ = in_turns(functions, turns=15)
    reference = "published formula"
    for name in functions:
        difference = abs(values[name] - values[reference]) / abs(values[reference])
        print(f"{name:20} {1000 * medians[name]:8.1f} ms, {medians[reference] / medians[name]:5.1f} x   "
              f"peak {memory[name] / 2 ** 20:7.1f} MiB, 1/{memory[reference] / max(memory[name], 1):.0f}   "
              f"differs by {difference:.1e}")


def clips_step(batch=64):
    """What CLIPS's captioner costs: of a step of the tiny size, its time; of the large ones, its arithmetic."""
    functions = {}
    for name, layers in (("without the captioner", 0), ("with the captioner", clips.CONFIGS["tiny"].caption_layers)):
        model = clips.CLIPS(replace(clips.CONFIGS["tiny"], vocab_size=len(some_tokenizer()), caption_layers=layers))
        texts, optimizer = texts_of(model, some_tokenizer(), batch), train.make_optimizer(model, 0.05)
        texts["images"] = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)

        def step(model=model.train(), optimizer=optimizer, batch=texts):
            with autocast(torch.device("cpu"), pick_precision(torch.device("cpu"))):
                loss = model(**batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        functions[name] = step
    _, seconds = in_turns(functions, turns=15)
    shares = sorted(1 - a / b for a, b in zip(seconds["without the captioner"], seconds["with the captioner"]))
    print(f"tiny, batch {batch}: {statistics.median(seconds['with the captioner']):.3f} s a step, "
          f"{statistics.median(shares):.0%} of it the captioner's (quartiles {shares[3]:.0%}, {shares[11]:.0%})")
    for size in ("vit-l-14-224", "vit-l-14-336", "vit-h-14-224"):
        config, operations = clips.CONFIGS[size], {}
        for name, layers in (("without the captioner", 0), ("with the captioner", config.caption_layers)):
            with FakeTensorMode(), FlopCounterMode(display=False) as counter:
                model = clips.CLIPS(replace(config, caption_layers=layers))
                images = model.image_feature_and_states(torch.zeros(1, 3, config.image_size, config.image_size))
                texts = model.text_feature_and_states(torch.zeros(2, config.context_length, dtype=torch.long))
                if layers:
                    model.captioner.head(model.captioner(images[1], texts[1][:1]))
            operations[name] = counter.get_total_flops()
        share = 1 - operations["without the captioner"] / operations["with the captioner"]
        print(f"{size}: {share:.0%} of the arithmetic is the captioner's, if captions fill its slots")


def texts_of(model, tokenizer, batch):
    """A batch of generated captions, in the form the model wants."""
    scenes = [shapes.make_scene(f"0/train/{i}") for i in range(batch)]
    samples = [data.Sample(shapes.captions(s), shapes.long_caption(s), shapes.web_caption(s)) for s in scenes]
    return model.text_batch(samples, [random.Random(i) for i in range(batch)], tokenizer)


@functools.cache
def some_tokenizer():
    return BPE.train([shapes.long_caption(shapes.make_scene(f"0/train/{i}")) for i in range(1000)], vocab_size=1024)


def matrix_rate(device, precision, seconds=1.0):
    """Operations a second in a product of square matrices, of which a step can never have more."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, clock(lambda: a @ b, device))
    return 2 * n ** 3 / best


def clock(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


MEASURED = {  # model/size: images a step
    "cpu": {"liteclip/tiny": 64, "clip/tiny": 64, "prolip/tiny": 64, "llip/tiny": 64, "clips/tiny": 64},
    "cuda": {"liteclip/liteclip": 512, "clip/vit-b-32": 2048, "clip/vit-b-16": 1024, "prolip/vit-b-16": 768,
             "llip/vit-b-16-k32": 768, "clips/vit-l-14-224": 256, "clip/vit-l-14": 256},
}


def models(*names, compile=False):
    """A table: training steps of whole models, captions of shapes.py, pictures of noise."""
    device = data.best_device()
    measured = MEASURED["cuda" if device.type == "cuda" else "cpu"]
    precisions = ("bf16", "fp16", "fp32") if device.type == "cuda" else ("bf16", "fp32")
    rates = {precision: matrix_rate(device, precision) for precision in precisions}
    print("matrix products: " + ", ".join(f"{p} {rate / 1e12:.2f} TFLOP/s" for p, rate in rates.items()))
    print("| model | precision | batch | ms a step | images/s | peak GiB | TFLOP/s | of the matrix rate |\n"
          + "|---" * 8 + "|")
    for name in names or measured:
        kind, size = name.split("/")
        config = home(kind).CONFIGS[size]
        for precision in precisions:
            torch.manual_seed(0)
            model = MODELS[kind](config).to(device).train()
            batch = texts_of(model, some_tokenizer(), measured.get(name, 64))
            batch["images"] = torch.randint(0, 256, (len(next(iter(batch.values()))), 3, config.image_size,
                                                     config.image_size), dtype=torch.uint8)
            batch = {key: rows.to(device) for key, rows in batch.items()}
            optimizer = train.make_optimizer(model, 0.05)

            def step():
                with autocast(device, precision):
                    loss = model(**batch)["loss"]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            with FlopCounterMode(display=False) as counter:
                step()
            if compile:
                for tower in model.children():
                    tower.compile()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(3):
                step()
            seconds = statistics.median(clock(step, device) for _ in range(5))
            memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak(step)
            rate = counter.get_total_flops() / seconds
            images = len(batch["images"])
            print(f"| {name} | {precision} | {images} | {1000 * seconds:.0f} | {images / seconds:.0f} | "
                  f"{memory / 2 ** 30:.2f} | {rate / 1e12:.2f} | {rate / rates[precision]:.0%} |", flush=True)
            del model, optimizer, batch, step


def loading(pictures=2000, batch=64):
    """Only the batches, without a model: photographs from the cache and from tar shards, with crops and flips."""
    import tarfile
    import tempfile
    rng = np.random.default_rng(0)
    for size in (64, 224):
        images = rng.integers(0, 256, (pictures if size == 64 else pictures // 8, size, size, 3), dtype=np.uint8)
        split = data.Split("here", images, [data.Sample(["a cat"])] * len(images), augment=True)
        loader = data.Loader(split, batch, lambda samples, rngs: {})
        seconds = min(clock(lambda: [loader.batch_at(step) for step in range(loader.steps_per_epoch)],
                            torch.device("cpu")) for _ in range(3))
        print(f"from the cache, {size} pixels, crops and flips: "
              f"{loader.steps_per_epoch * batch / seconds:.0f} images/s")
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(3):
            with tarfile.open(f"{folder}/{shard}.tar", "w") as tar:
                for i in range(256):
                    noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
                    buffer = io.BytesIO()
                    noise.resize((500, 375), Image.BICUBIC).save(buffer, "JPEG", quality=90)
                    for name, content in (("jpg", buffer.getvalue()), ("txt", b"a cat")):
                        entry = tarfile.TarInfo(f"{i}.{name}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
        shards = data.load(f"{folder}/*.tar", "train", 224, cache=folder)
        loader = data.Loader(shards, batch, lambda samples, rngs: {})
        seconds = min(clock(lambda: list(loader.stream(0, 12)), torch.device("cpu")) for _ in range(3))
        print("from tar shards, JPEGs of 500 x 375 to 224 pixels, crops and flips: "
              f"{12 * batch / seconds:.0f} images/s")


PLANNED = ("clip/vit-b-16", "clip/vit-l-14", "prolip/vit-b-16", "prolip/vit-h-14", "llip/vit-b-16-k32",
           "llip/vit-l-14-k32", "llip/vit-h-14-k64", "llip/vit-g-14-k64", "clips/vit-l-14-224", "clips/vit-h-14-224")


def kept(model, batch):
    """Bytes that the towers keep for the backward pass under bf16 autocast. Nothing is computed, only shapes."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage  # held, so that its place is not given to another
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        if hasattr(model, "captioner"):  # without its logits, of which there are as many as there are words
            image = model.image_feature_and_states(batch["images"])
            text = model.text_feature_and_states(batch["tokens"].repeat(2, 1))
            features = image[0], text[0], model.captioner(image[1], text[1][:len(image[1])])
        else:
            features = model.encode(**batch)
    return sum(storage.nbytes() for storage in found.values()), features


def memory_of(name, recompute=False):
    """-> parameters, bytes that a step keeps for each image, and bytes whatever the batch, of a size of a model."""
    kind, size = name.split("/")
    config, bytes_kept = home(kind).CONFIGS[size], {}
    for images in (4, 8):
        with FakeTensorMode():
            model = MODELS[kind](config).train()
            if recompute:
                train.recompute_blocks(model)
            batch = {"images": torch.zeros(images, 3, config.image_size, config.image_size),
                     "tokens": torch.full((images, config.context_length), config.end_id)}
            bytes_kept[images], _ = kept(model, batch)
            parameters = sum(p.numel() for p in model.parameters())
    each = (bytes_kept[8] - bytes_kept[4]) / 4
    return parameters, each, bytes_kept[4] - 4 * each


def plan(gpus=8, memory=80e9):
    """A table: what weights, gradients and moments take, what each image takes, how many images then fit.

    In fp32: weights 4 bytes a parameter, gradients 4, AdamW's two moments 8. In bf16: copies of the weights, and most
    of what is kept for the backward pass. Left out: buffers of the kernels, and the loss's tables.
    """
    print(f"GB of memory; images on one GPU of {memory / 1e9:.0f} GB; texts of full length\n"
          "| size | parameters, M | weights, gradients | AdamW | one image | images | with --recompute | images "
          f"| and --shard-optimizer, {gpus} GPUs |\n" + "|---" * 9 + "|")
    for name in PLANNED:
        parameters, plain, copies = memory_of(name)
        _, less, _ = memory_of(name, recompute=True)
        left = 0.9 * memory - 16 * parameters - copies
        spared = left + 8 * parameters * (1 - 1 / gpus)
        print(f"| {name} | {parameters / 1e6:.0f} | {8 * parameters / 1e9:.1f} | {8 * parameters / 1e9:.1f} | "
              f"{plain / 1e9:.3f} | {max(0, left / plain):.0f} | {less / 1e9:.4f} | {max(0, left / less):.0f} | "
              f"{max(0, spared / less):.0f} |", flush=True)


def drawing(n=10_000):
    def draw():
        for i in range(n):
            shapes.draw(shapes.make_scene(f"0/train/{i}"), 64)
    medians, _ = in_turns({"draw": draw}, turns=3)
    print(f"{n:,} pictures of 64 x 64 in {medians['draw']:.1f} s on one core")


def tokenizing():
    texts = [text for i in range(6000) for text in shapes.captions(shapes.make_scene(f"0/train/{i}"))]
    medians, _ = in_turns({"train": lambda: BPE.train(texts),
                           "encode": lambda: [BPE.train([]).encode(t) for t in texts[:1000]]}, turns=3)
    print(f"tokenizer of {len(texts):,} captions trained in {medians['train']:.2f} s")


def peers():
    """All that is compared with the published code or formulas, as far as the packages are there."""
    for name, compare in (("liteclip", step), ("clip", clip_step), ("prolip", functools.partial(loss_of, "prolip")),
                          ("llip", functools.partial(loss_of, "llip"))):
        print(f"--- {name}")
        try:
            compare()
        except ModuleNotFoundError as error:
            print(f"left out: {error.name} is not installed")


if __name__ == "__main__":
    commands = {"models": models, "loading": loading, "plan": plan, "peers": peers, "step": step, "clip": clip_step,
                "clips": clips_step, "shapes": drawing, "tokens": tokenizing,
                **{model: functools.partial(loss_of, model) for model in LOSSES}}
    if len(sys.argv) < 2 or sys.argv[1] not in commands or len(sys.argv) > 2 and sys.argv[1] != "models":
        sys.exit(__doc__)
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")
    if "--compile" in sys.argv:
        commands["models"] = functools.partial(models, compile=True)
    try:
        commands[sys.argv[1]](*(name for name in sys.argv[2:] if name != "--compile"))
    except ModuleNotFoundError as error:
        sys.exit(f"bench.py {sys.argv[1]} needs a package that is not here: pip install {error.name}")
