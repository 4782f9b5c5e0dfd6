"""clip.py: the same weights in every format that they are published in, its towers and loss against slow loops, its
sizes against the published ones, and what it says of unfit input."""
import copy
import gzip
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import clip
import data
from clip import CLIP, CONFIGS, PUBLISHED, Attention, Config, KoCLIP, KoConfig, contrastive_loss

HERE = Path(__file__).parent
SMALL = Config(image_size=24, patch_size=8, image_width=32, image_layers=2, image_heads=4, image_mlp=64, vocab_size=50,
               end_id=2, context_length=16, text_width=24, text_layers=2, text_heads=4, text_mlp=48, embed_dim=16)
SMALL_KO = KoConfig(image_size=24, patch_size=8, image_width=32, image_layers=2, image_heads=4, image_mlp=64,
                    vocab_size=50, pad_id=0, context_length=16, positions=20, text_width=24, text_layers=2,
                    text_heads=4, text_mlp=48, embed_dim=16, dropout=0.0)


def small(**changes):
    torch.manual_seed(0)
    return CLIP(replace(SMALL, **changes)).eval()


def small_ko(**changes):
    torch.manual_seed(0)
    return KoCLIP(replace(SMALL_KO, **changes)).eval()


both = pytest.mark.parametrize("make", [small, small_ko, lambda: small_ko(image_tower="vit", activation="gelu")],
                               ids=["clip", "koclip", "koclip-vit"])


def some_tokens(*lengths):
    """Rows as `tokenize` lays them out: 1 at the start, 2 at the end, 0 behind it."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for i, n in enumerate(lengths):
        tokens[i, :n] = torch.randint(4, 50, (n,), generator=generator)
        tokens[i, 0], tokens[i, n - 1] = 1, 2
    return tokens


def some_images(n, size=24):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


class Words:
    """A tokenizer for tests: every letter is a piece."""
    pad_id, start_id, end_id = 0, 1, 2

    def encode(self, text):
        return [3 + ord(c) % 40 for c in text]


# --- reading published weights, in every format ---
# The golden files hold small weights in published names, and what the published implementation makes of them.

def golden(name):
    return torch.load(HERE / "golden" / f"{name}.pt", weights_only=True)


def config_of(golden):
    c = golden["config"]
    common = dict(
        image_size=c["image_size"], patch_size=c["patch_size"], image_width=c["vision_width"],
        image_layers=c["vision_layers"], image_heads=c["vision_heads"], vocab_size=c["vocab_size"],
        text_width=c["text_width"], text_layers=c["text_layers"], text_heads=c["text_heads"])
    if "vision" in c:
        return KoConfig(**common, image_mlp=c["vision_mlp"], text_mlp=c["text_mlp"], positions=c["max_positions"],
                        context_length=c["max_positions"], embed_dim=c["proj_dim"], image_tower=c["vision"],
                        activation="quick_gelu" if c["vision"] == "clip" else "gelu")
    return Config(**common, image_mlp=4 * c["vision_width"], text_mlp=4 * c["text_width"], embed_dim=c["embed_dim"],
                  end_id=c["vocab_size"] - 1, context_length=c["context_length"],
                  activation="quick_gelu" if c["quick_gelu"] else "gelu")


def assert_features(model, golden, tolerance=1e-8):
    """In float64: the features that the published implementation returned."""
    assert all(p.dtype == torch.float32 for p in model.parameters())
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for ours, reference in ((model.encode_image(golden["image"].double()), golden["image_features"]),
                                (model.encode_text(golden["text"]), golden["text_features"])):
            assert (ours - reference).abs().max() <= tolerance * reference.abs().max()


class Tree(nn.Module):
    """Modules within modules that hold tensors under given names."""
    def __init__(self, state):
        super().__init__()
        for name in dict.fromkeys(name.split(".")[0] for name in state):
            inside = {n.removeprefix(f"{name}."): v for n, v in state.items() if n.startswith(f"{name}.")}
            if inside:
                self.add_module(name, Tree(inside))
            elif state[name].is_floating_point():
                self.register_parameter(name, nn.Parameter(state[name]))
            else:
                self.register_buffer(name, state[name])

    def forward(self, x):
        return x


def torchscript(state, config, path):
    """As OpenAI's files are: a TorchScript archive, the large tensors in half precision, three sizes beside them."""
    state = {name: value.half() if value.ndim > 1 else value.clone() for name, value in state.items()}
    sizes = {"input_resolution": config.image_size, "context_length": config.context_length,
             "vocab_size": config.vocab_size}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; the published files stay what they are
        torch.jit.script(Tree(state | {name: torch.tensor(size) for name, size in sizes.items()})).save(path)


def huggingface(state):
    """OpenAI's names and layout -> those of Hugging Face's CLIPModel."""
    rest, found = dict(state), {}
    single = {"visual.class_embedding": "vision_model.embeddings.class_embedding",
              "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
              "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
              "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
              "positional_embedding": "text_model.embeddings.position_embedding.weight", "logit_scale": "logit_scale"}
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
             "ln_final": "text_model.final_layer_norm"}
    inside = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
              "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for i in range(sum(name.endswith("ln_1.bias") for name in state)):
        for ours, theirs in (("visual.transformer.resblocks", "vision_model"), ("transformer.resblocks", "text_model")):
            norms |= {f"{ours}.{i}.{a}": f"{theirs}.encoder.layers.{i}.{b}" for a, b in inside.items()
                      if f"{ours}.{i}.ln_1.bias" in state}
            for kind in ("weight", "bias"):
                joined = rest.pop(f"{ours}.{i}.attn.in_proj_{kind}", None)
                if joined is not None:
                    parts = zip("qkv", joined.chunk(3))
                    found |= {f"{theirs}.encoder.layers.{i}.self_attn.{x}_proj.{kind}": part for x, part in parts}
    single |= {f"{a}.{kind}": f"{b}.{kind}" for a, b in norms.items() for kind in ("weight", "bias")}
    found |= {theirs: rest.pop(ours) for ours, theirs in single.items()}
    found |= {"visual_projection.weight": rest.pop("visual.proj").T,
              "text_projection.weight": rest.pop("text_projection").T}
    for tower in ("vision_model", "text_model"):
        length = len(found[f"{tower}.embeddings.position_embedding.weight"])
        found[f"{tower}.embeddings.position_ids"] = torch.arange(length)[None]
    assert not rest
    return found


def text_apart(state):
    """open_clip's names where the text tower is a module of its own."""
    return {name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": value
            for name, value in state.items()}


FORMATS = {  # what becomes of a state dict in OpenAI's names
    "openai": lambda state: state,
    "open_clip with a text module": text_apart,
    "hugging face": huggingface,
    "a training checkpoint of open_clip": lambda state: {
        "epoch": 3, "name": "run", "state_dict": {f"module.{name}": value for name, value in state.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "compiled and distributed": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("activation", ["clip_quickgelu", "clip_gelu"])
def test_every_format_gives_the_published_features(tmp_path, form, activation):
    reference = golden(activation)
    torch.save(FORMATS[form](reference["state_dict"]), tmp_path / "weights.pt")
    assert_features(CLIP.from_pretrained(tmp_path / "weights.pt", config_of(reference)), reference)
    assert_features(CLIP.from_pretrained(str(tmp_path / "weights.pt"), config_of(reference)), reference)


@pytest.mark.parametrize("form", ["openai", "hugging face"])
def test_safetensors_give_the_published_features(tmp_path, form):
    safetensors = pytest.importorskip("safetensors.torch")
    reference = golden("clip_quickgelu")
    state = {name: value.contiguous() for name, value in FORMATS[form](reference["state_dict"]).items()}
    safetensors.save_file(state, tmp_path / "weights.safetensors")
    assert_features(CLIP.from_pretrained(tmp_path / "weights.safetensors", config_of(reference)), reference)


def test_openais_archives_in_half_precision(tmp_path):
    reference = golden("clip_quickgelu")
    torchscript(reference["state_dict"], config_of(reference), tmp_path / "ViT.pt")
    with zipfile.ZipFile(tmp_path / "ViT.pt") as archive:  # what tells it from a file of torch.save
        assert any(name.endswith("/constants.pkl") for name in archive.namelist())
    model = CLIP.from_pretrained(tmp_path / "ViT.pt", config_of(reference))
    assert_features(model, reference, tolerance=3e-3)
    rounded = {name: v.half().float() if v.ndim > 1 else v for name, v in reference["state_dict"].items()}
    expected = CLIP.from_pretrained(rounded, config_of(reference)).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@both
def test_its_own_names_load_too(make):
    model = make()
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    loaded = type(model).from_pretrained(state, model.config).state_dict()
    assert set(loaded) == set(state) and all(torch.equal(loaded[name], state[name]) for name in state)


def flax(state):
    """KoCLIP's names in PyTorch -> the nested tree of Flax, in its layouts."""
    tree = {}
    for name, value in state.items():
        *path, last = name.split(".")
        if last == "weight" and value.ndim == 4:
            last, value = "kernel", value.permute(2, 3, 1, 0)
        elif last == "weight" and path[-1].endswith(("embedding", "embeddings")):
            last = "embedding"
        elif last == "weight":
            last, value = ("kernel", value.T) if value.ndim == 2 else ("scale", value)
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = value.contiguous().numpy()
    return tree


def write_flax(tree, path):
    """As flax.serialization does: an array is extension 1, and that holds (shape, dtype, bytes), packed again."""
    msgpack = pytest.importorskip("msgpack")

    def array(x):
        return msgpack.ExtType(1, msgpack.packb((x.shape, x.dtype.name, x.tobytes())))
    path.write_bytes(msgpack.packb(tree, default=array, strict_types=True))


@pytest.mark.parametrize("name", ["koclip", "koclip_large"])
@pytest.mark.parametrize("form", ["pytorch", "safetensors", "flax", "flax with params"])
def test_koclip_in_every_format_gives_the_published_features(tmp_path, name, form):
    reference = golden(name)
    state = {**reference["state_dict"], "text_model.embeddings.position_ids": torch.arange(24)[None]}
    file = {"pytorch": "pytorch_model.bin", "safetensors": "model.safetensors"}.get(form, "flax_model.msgpack")
    path = tmp_path / file
    if form == "pytorch":
        torch.save(state, path)
    elif form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file({n: v.contiguous() for n, v in state.items()}, path)
    else:  # Flax has no position_ids
        tree = flax(reference["state_dict"])
        write_flax({"params": tree} if form == "flax with params" else tree, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = KoCLIP.from_pretrained(path, config_of(reference))
    assert_features(model, reference)


def test_koclip_in_bfloat16_flax(tmp_path):
    msgpack = pytest.importorskip("msgpack")
    reference = golden("koclip")

    def array(x):  # NumPy has no bfloat16: its bytes are the upper half of the float's
        halves = torch.from_numpy(x).bfloat16().view(torch.int16).numpy()
        return msgpack.ExtType(1, msgpack.packb((x.shape, "bfloat16", halves.tobytes())))
    packed = msgpack.packb(flax(reference["state_dict"]), default=array, strict_types=True)
    (tmp_path / "flax_model.msgpack").write_bytes(packed)
    assert_features(KoCLIP.from_pretrained(tmp_path / "flax_model.msgpack", config_of(reference)), reference, 0.03)


# --- KoCLIP from towers that were trained alone ---

def roberta(reference):
    """KoCLIP's text tower as a RoBERTa with its language-model head would be published: no pooler."""
    state = {name.replace("text_model.", "roberta.", 1): value for name, value in reference["state_dict"].items()
             if name.startswith("text_model.") and ".pooler." not in name}
    return state | {"roberta.embeddings.position_ids": torch.arange(24)[None], "lm_head.bias": torch.zeros(64)}


def finish_text(model, reference):
    """The trained pooler and projection, which backbones do not bring."""
    state = reference["state_dict"]
    with torch.no_grad():
        model.text_encoder.pooler.weight.copy_(state["text_model.pooler.dense.weight"])
        model.text_encoder.pooler.bias.copy_(state["text_model.pooler.dense.bias"])
        model.text_encoder.text_projection.copy_(state["text_projection.weight"].T)


def test_backbones_of_koclip_base():
    image, text = golden("clip_quickgelu"), golden("koclip")
    config = replace(config_of(text), image_mlp=config_of(image).image_mlp)
    model = KoCLIP.from_backbones(huggingface(image["state_dict"]), roberta(text), config)
    assert model.logit_scale == 1  # not the scale of the CLIP that the image tower comes from
    finish_text(model, text)
    assert_features(model, {**text, "image": image["image"], "image_features": image["image_features"]})


def test_backbones_of_koclip_large(tmp_path):
    reference = golden("koclip_large")
    state = {name.replace("vision_model.", "vit.", 1): value for name, value in reference["state_dict"].items()
             if name.startswith("vision_model.") and ".pooler." not in name}
    torch.save(state | {"classifier.weight": torch.zeros(10, 32), "classifier.bias": torch.zeros(10)}, tmp_path / "vit")
    torch.save(roberta(reference), tmp_path / "roberta")
    model = KoCLIP.from_backbones(tmp_path / "vit", tmp_path / "roberta", config_of(reference))
    finish_text(model, reference)
    with torch.no_grad():
        pooler = model.image_encoder.ln_post[1]
        pooler.weight.copy_(reference["state_dict"]["vision_model.pooler.dense.weight"])
        pooler.bias.copy_(reference["state_dict"]["vision_model.pooler.dense.bias"])
        model.image_encoder.proj.copy_(reference["state_dict"]["visual_projection.weight"].T)
    assert_features(model, reference)


def test_backbones_take_the_name_of_a_config(monkeypatch):
    image, text = golden("clip_quickgelu"), golden("koclip")
    monkeypatch.setitem(CONFIGS, "koclip-base", replace(config_of(text), image_mlp=config_of(image).image_mlp))
    model = KoCLIP.from_backbones(huggingface(image["state_dict"]), roberta(text))
    assert model.config == CONFIGS["koclip-base"]


def test_a_backbone_of_another_size_does_not_fit():
    image, text = golden("clip_quickgelu"), golden("koclip")
    config = replace(config_of(text), text_layers=3)  # and with an image_mlp that is KoCLIP's, not this CLIP's
    with pytest.raises(ValueError, match=r"missing: text_encoder.blocks.2(.|\n)*shape: image_encoder.blocks.0.mlp"):
        KoCLIP.from_backbones(huggingface(image["state_dict"]), roberta(text), config)


# --- sizes ---

@pytest.mark.parametrize("name, published, parameters", [
    ("vit-b-32", "ViT-B-32-quickgelu", 151_277_313), ("vit-b-16", "ViT-B-16-quickgelu", 149_620_737),
    ("vit-l-14", "ViT-L-14-quickgelu", 427_616_513), ("vit-l-14-336", "ViT-L-14-336-quickgelu", 427_944_193),
    ("koclip-base", "koclip-base", 425_029_889), ("koclip-large", "koclip-large", 642_056_193)])
def test_published_checkpoints_load_strictly_and_have_the_published_size(name, published, parameters):
    entry = json.loads(gzip.open(HERE / "golden" / "shapes.json.gz").read())[f"clip/{published}"]
    Model = KoCLIP if name.startswith("koclip") else CLIP
    with torch.device("meta"), warnings.catch_warnings():  # shapes without memory
        warnings.simplefilter("ignore")
        state = {key: torch.empty(shape) for key, shape in entry["keys"].items()}
        model = Model.from_pretrained(state)  # the size is found by names and shapes
        assert model.config == CONFIGS[name]
        assert sum(p.numel() for p in model.parameters()) == entry["params"] == parameters
        # what shapes do not tell: heads are 64 wide everywhere, OpenAI's last token ends a text
        c = model.config
        assert c.image_width == 64 * c.image_heads and c.text_width == 64 * c.text_heads
        assert c.image_size == (336 if "336" in name else 224)
        assert c.activation == ("gelu" if name == "koclip-large" else "quick_gelu")
        assert c.pad_id == 1 if Model is KoCLIP else c.end_id == c.vocab_size - 1 == 49407
        with pytest.raises(ValueError, match="1 unexpected: surplus"):  # one tensor more or one less, and it is refused
            Model.from_pretrained(state | {"surplus": torch.empty(1)}, name)
        del state["logit_scale"]
        with pytest.raises(ValueError, match="1 missing: logit_scale"):
            Model.from_pretrained(state, name)


def test_every_published_name_is_a_size_and_openais_addresses_name_their_checksums():
    names = {"vit-b-32", "vit-b-16", "vit-l-14", "vit-l-14-336"}
    assert names <= set(PUBLISHED) <= set(CONFIGS)
    assert len({files["source"][0] for files in PUBLISHED.values()}) == len(PUBLISHED)
    for name, files in PUBLISHED.items():
        for url, sha256 in files.values():
            assert url.startswith("https://")
            assert sha256 is None or len(sha256) == 64 and set(sha256) <= set("0123456789abcdef")
        if name in names:
            url, sha256 = files["source"]
            assert url.split("/")[-2] == sha256 and name in url.split("/")[-1].lower() and url.endswith(".pt")
            assert files["vocab"][1] == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def test_openais_names_are_downloaded_with_their_checksums(tmp_path, monkeypatch):
    reference, asked = golden("clip_quickgelu"), {}

    def download(url, path, md5=None, sha256=None):
        asked[url] = sha256
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torchscript(reference["state_dict"], config_of(reference), path)
        return Path(path)
    monkeypatch.setattr(data, "download", download)
    monkeypatch.setitem(CONFIGS, "vit-b-32", config_of(reference))  # a small one in its place
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # OpenAI's file says which activation it needs
        model = CLIP.from_pretrained("vit-b-32", cache=tmp_path / "cache")
    assert_features(model, reference, tolerance=3e-3)
    url = next(url for url in asked if url.endswith("/ViT-B-32.pt"))
    assert url.startswith("https://openaipublic.azureedge.net/clip/models/") and asked[url] == url.split("/")[-2]
    assert None not in asked.values()
    assert [p.parent.name for p in (tmp_path / "cache").rglob("*ViT-B-32.pt")] == ["weights"]
    with pytest.warns(UserWarning, match="resized to 6 x 6"):  # a config of one's own wins over the name's
        model = CLIP.from_pretrained("vit-b-32", replace(config_of(reference), image_size=48), cache=tmp_path / "cache")
    assert model.config.image_size == 48


@pytest.mark.parametrize("name", sorted(name for name in PUBLISHED if name.startswith("koclip")))
def test_koclips_names_are_downloaded(tmp_path, monkeypatch, name):
    reference, asked = golden("koclip" if name == "koclip-base" else "koclip_large"), []

    def download(url, path, md5=None, sha256=None):
        asked.append(url)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if url.endswith(".msgpack"):
            write_flax(flax(reference["state_dict"]), Path(path))
        else:
            torch.save(reference["state_dict"], path)
        return Path(path)
    monkeypatch.setattr(data, "download", download)
    monkeypatch.setitem(CONFIGS, name, config_of(reference))
    assert_features(KoCLIP.from_pretrained(name, cache=tmp_path / "cache"), reference)
    assert PUBLISHED[name]["source"][0] in asked


def test_a_name_of_the_other_model_is_refused_before_any_download(tmp_path, monkeypatch):
    def download(*args, **kwargs):
        raise AssertionError("asked for gigabytes that cannot fit")
    monkeypatch.setattr(data, "download", download)
    for Model, Other in ((CLIP, KoCLIP), (KoCLIP, CLIP)):
        for name in set(PUBLISHED) & set(clip.sizes(Other)):
            with pytest.raises(ValueError):
                Model.from_pretrained(name, cache=tmp_path / "cache")


# --- the activation, which no tensor tells ---

ACTIVATION = "do not say which activation.*quick_gelu"


def test_weights_that_do_not_tell_their_activation_get_a_warning(tmp_path, monkeypatch):
    reference = golden("clip_quickgelu")
    monkeypatch.setitem(CONFIGS, "small", config_of(reference))
    for state in (reference["state_dict"], huggingface(reference["state_dict"])):
        with pytest.warns(UserWarning, match=ACTIVATION):
            assert_features(CLIP.from_pretrained(state, "small"), reference)
        with pytest.warns(UserWarning, match=ACTIVATION):
            assert_features(CLIP.from_pretrained(state), reference)
    torchscript(reference["state_dict"], config_of(reference), tmp_path / "ViT.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CLIP.from_pretrained(reference["state_dict"], config_of(reference))  # a Config says it
        CLIP.from_pretrained(tmp_path / "ViT.pt", "small")                   # OpenAI's own file
        CLIP.from_pretrained(tmp_path / "ViT.pt")


def test_koclips_activation_is_known(monkeypatch):
    reference = golden("koclip")
    monkeypatch.setitem(CONFIGS, "small", config_of(reference))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_features(KoCLIP.from_pretrained(reference["state_dict"]), reference)


# --- positions for pictures of another size ---

def resized(table, old, new):
    """A model for `new` x `new` patches from weights for `old` x `old`, whose table this is -> its own table."""
    state = small(image_size=8 * old).state_dict() | {"image_encoder.positional_embedding": table}
    with pytest.warns(UserWarning, match=f"{old} x {old} patches, resized to {new} x {new}"):
        model = CLIP.from_pretrained(state, replace(SMALL, image_size=8 * new))
    with torch.no_grad():
        assert model.eval().encode_image(some_images(2, 8 * new)).isfinite().all()
    return model.image_encoder.positional_embedding.detach()


@pytest.mark.parametrize("old, new", [(2, 4), (3, 7), (4, 2), (7, 3)])
def test_resized_positions_equal_pillows(old, new):
    table = torch.randn(1 + old ** 2, 32, generator=torch.Generator().manual_seed(0))
    found = resized(table, old, new)
    assert torch.equal(found[0], table[0])  # the class token is nowhere on the picture
    for channel in range(32):
        grid = Image.fromarray(table[1:, channel].reshape(old, old).numpy())
        expected = torch.from_numpy(np.array(grid.resize((new, new), Image.Resampling.BICUBIC)))
        torch.testing.assert_close(found[1:, channel].view(new, new), expected, rtol=0, atol=1e-5)


def test_resized_positions_keep_constants_and_order():
    table = torch.full((5, 32), 0.25)
    torch.testing.assert_close(resized(table, 2, 4), torch.full((17, 32), 0.25))
    table[1:, 0] = torch.tensor([0.0, 1.0, 0.0, 1.0])  # grows to the right
    table[1:, 1] = torch.tensor([0.0, 0.0, 1.0, 1.0])  # grows downwards
    right, down = resized(table, 2, 4)[1:, :2].T.reshape(2, 4, 4)
    assert (right.diff(dim=1) > 0).all() and (down.diff(dim=0) > 0).all()
    for same in (right.diff(dim=0), down.diff(dim=1)):
        torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-6)


def test_positions_of_the_same_size_are_left_alone():
    state = {name: torch.randn_like(value) for name, value in small().state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = CLIP.from_pretrained(state, SMALL)
    assert torch.equal(model.image_encoder.positional_embedding, state["image_encoder.positional_embedding"])


def test_koclips_pictures_may_have_another_size_too():
    state = small_ko().state_dict()
    with pytest.warns(UserWarning, match="3 x 3 patches, resized to 5 x 5"):
        model = KoCLIP.from_pretrained(state, replace(SMALL_KO, image_size=40))
    assert model.image_encoder.positional_embedding.shape == (26, 32)


def test_positions_of_texts_are_never_resized():
    with pytest.raises(ValueError, match=r"shape: text_encoder.positional_embedding \(16, 24\), expected \(9, 24"):
        CLIP.from_pretrained(small().state_dict(), replace(SMALL, context_length=9))


# --- what does not fit ---

def test_what_does_not_fit_is_reported_in_groups():
    reference = golden("clip_quickgelu")
    state = dict(reference["state_dict"])
    state["visual.conv1.weight"] = torch.zeros(32, 3, 4, 4)
    state["surplus"] = torch.zeros(1)
    for i in range(2):
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.bias"):
            del state[f"visual.transformer.resblocks.{i}.{name}"]
    with pytest.raises(ValueError) as error:
        CLIP.from_pretrained(state, config_of(reference))
    message = str(error.value)
    assert "do not fit CLIP" in message
    assert "6 missing: image_encoder.blocks.0.ln_1.weight; " in message and ", ..." in message
    assert "1 unexpected: surplus" in message
    assert "1 wrong shape: image_encoder.conv1.weight (32, 3, 4, 4), expected (32, 3, 8, 8)" in message


@pytest.mark.filterwarnings("ignore:the weights do not say")
@pytest.mark.parametrize("Model, name", [(CLIP, "clip_quickgelu"), (KoCLIP, "koclip")])
def test_the_size_that_would_fit_is_named(monkeypatch, Model, name):
    reference = golden(name)
    config = config_of(reference)
    monkeypatch.setitem(CONFIGS, "other", replace(config, text_layers=1))
    monkeypatch.setitem(CONFIGS, "fitting", config)
    with pytest.raises(ValueError, match="unexpected: text_encoder.blocks.1(.|\n)*'fitting'"):
        Model.from_pretrained(reference["state_dict"], "other")
    monkeypatch.delitem(CONFIGS, "fitting")
    with pytest.raises(ValueError, match="unexpected: text_encoder.blocks.1") as error:
        Model.from_pretrained(reference["state_dict"], "other")
    assert "fit config" not in str(error.value) and "fitting" not in str(error.value)


@pytest.mark.filterwarnings("ignore:the weights do not say")
@pytest.mark.parametrize("Model", [CLIP, KoCLIP])
def test_an_unknown_config_lists_the_known(Model):
    with pytest.raises(ValueError, match="huge.*known:") as error:
        Model.from_pretrained({}, "huge")
    assert all(name in str(error.value) for name in clip.sizes(Model))


@pytest.mark.filterwarnings("ignore:the weights do not say")
def test_a_config_of_the_other_model_is_refused():
    for Model, name, config in ((CLIP, "koclip-tiny", SMALL_KO), (KoCLIP, "tiny", SMALL)):
        for wrong in (name, config):
            with pytest.raises(ValueError, match=f"{Model.__name__}|{Model.Config.__name__}|[Cc]onfig"):
                Model.from_pretrained({}, wrong)


def test_weights_of_the_other_model_are_refused():
    with pytest.raises(ValueError, match="do not fit KoCLIP"):
        KoCLIP.from_pretrained(golden("clip_quickgelu")["state_dict"], SMALL_KO)
    with pytest.raises(ValueError, match="do not fit CLIP"):
        CLIP.from_pretrained(golden("koclip")["state_dict"], SMALL)


def test_weights_without_a_table_of_positions_are_refused_like_all_others():
    state = golden("clip_quickgelu")["state_dict"]
    resnet = {name: value for name, value in state.items() if not name.startswith("visual.")}
    resnet |= {"visual.attnpool.positional_embedding": torch.zeros(50, 2048), "visual.conv1.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match="missing: image_encoder") as error:  # OpenAI's RN50 is such a file
        CLIP.from_pretrained(resnet, config_of(golden("clip_quickgelu")))
    assert "unexpected: image_encoder.attnpool.positional_embedding" in str(error.value)


# --- files of another kind ---

def test_files_of_another_kind_are_named(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"model": "clip", "tokenizer": {}, "weights": {}}, tmp_path / "ours.pt")
    for Model in (CLIP, KoCLIP):
        with pytest.raises(ValueError, match="list.pt holds other things than tensors"):
            Model.from_pretrained(tmp_path / "list.pt")
        with pytest.raises(ValueError, match="ours.pt was written by train.py: use train.load"):
            Model.from_pretrained(tmp_path / "ours.pt")


@pytest.mark.filterwarnings("ignore:the weights do not say")
@pytest.mark.parametrize("content", [{"epoch": 1, "model": {"visual.proj": torch.zeros(2, 2)}}, {"state_dict": 3},
                                     {"visual.positional_embedding": [1.0, 2.0]}], ids=["nested", "number", "list"])
def test_a_file_that_holds_other_things_than_tensors(tmp_path, monkeypatch, content):
    monkeypatch.setitem(CONFIGS, "small", SMALL)
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError):
        CLIP.from_pretrained(tmp_path / "other.pt", "small")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_file_that_is_no_checkpoint(tmp_path, content, name):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors.torch")
    (tmp_path / name).write_bytes(content)
    for Model in (CLIP, KoCLIP):
        with pytest.raises(ValueError, match=f"{name} is no checkpoint"):
            Model.from_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"nowhere-{name}: no such file"):
            Model.from_pretrained(f"nowhere-{name}")


def test_a_damaged_archive_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "damaged.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", b"rubbish")
    with pytest.raises(ValueError, match="damaged.pt is no checkpoint"):
        CLIP.from_pretrained(tmp_path / "damaged.pt", SMALL)


class Payload:
    """Unpickling it makes a folder."""
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_file_is_never_run(tmp_path):
    torch.save({"x": Payload(tmp_path / "run")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt is no checkpoint"):
        CLIP.from_pretrained(tmp_path / "x.pt")
    assert not (tmp_path / "run").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "run")))  # it would have
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["nothing", "text", "list", "number", "no array"])
def test_a_msgpack_file_that_is_no_checkpoint(tmp_path, content):
    msgpack = pytest.importorskip("msgpack")
    (tmp_path / "flax_model.msgpack").write_bytes(
        {"nothing": b"", "text": b"not a checkpoint", "list": msgpack.packb([1, 2]), "number": msgpack.packb(3),
         "no array": msgpack.packb({"text_model": {"kernel": 3}})}[content])
    with pytest.raises(ValueError, match="flax_model.msgpack is no Flax checkpoint"):
        KoCLIP.from_pretrained(tmp_path / "flax_model.msgpack", SMALL_KO)
    with pytest.raises(ValueError, match="nowhere.msgpack: no such file"):
        KoCLIP.from_pretrained("nowhere.msgpack")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    for name in ("safetensors", "safetensors.torch", "msgpack"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "x.safetensors").write_bytes(b"x")
    (tmp_path / "x.msgpack").write_bytes(b"x")
    with pytest.raises(ValueError, match="x.safetensors: reading it needs a package; pip install safetensors$"):
        CLIP.from_pretrained(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.msgpack: reading it needs a package; pip install msgpack$"):
        KoCLIP.from_pretrained(tmp_path / "x.msgpack")


# --- the towers ---

def slow_attention(attention, x, seen):
    """One query at a time, one head at a time. seen(b, i, j): whether query i of row b may see key j."""
    B, N, D = x.shape
    H, size = attention.heads, D // attention.heads
    (wq, wk, wv), (bq, bk, bv) = attention.in_proj.weight.chunk(3), attention.in_proj.bias.chunk(3)
    out = torch.zeros(B, N, D, dtype=x.dtype)
    for b in range(B):
        q, k, v = ([w @ x[b, n] + bias for n in range(N)] for w, bias in ((wq, bq), (wk, bk), (wv, bv)))
        for h in range(H):
            part = slice(h * size, (h + 1) * size)
            for i in range(N):
                weights = {j: math.exp(float(q[i][part] @ k[j][part]) / math.sqrt(size))
                           for j in range(N) if seen(b, i, j)}
                out[b, i, part] = sum(w * v[j][part] for j, w in weights.items()) / sum(weights.values())
    return out @ attention.out_proj.weight.T + attention.out_proj.bias


@pytest.mark.parametrize("kind", ["all", "causal", "padding", "any"])
def test_attention_equals_a_slow_loop(kind):
    torch.manual_seed(0)
    attention, x = Attention(12, 3).double().eval(), torch.randn(2, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_()
        visible = torch.tensor([[True] * 5, [True, True, True, False, False]])
        anything = torch.rand(2, 5, 5) < 0.5
        anything |= torch.eye(5, dtype=torch.bool)
        found, seen = {
            "all": lambda: (attention(x), lambda b, i, j: True),
            "causal": lambda: (attention(x, causal=True), lambda b, i, j: j <= i),
            "padding": lambda: (attention(x, visible[:, None, None]), lambda b, i, j: visible[b, j]),
            "any": lambda: (attention(x, anything[:, None]), lambda b, i, j: anything[b, i, j]),
        }[kind]()
        torch.testing.assert_close(found, slow_attention(attention, x, seen), rtol=1e-10, atol=1e-10)


def test_quick_gelu_by_hand():
    x = torch.linspace(-6, 6, 49, dtype=torch.float64)
    expected = torch.tensor([v / (1 + math.exp(-1.702 * v)) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(clip.quick_gelu(x), expected)
    assert (clip.quick_gelu(x) - F.gelu(x)).abs().max() > 0.01  # LAION's weights need the other one


def test_a_text_is_read_up_to_its_end_and_no_further():
    model, tokens = small(), some_tokens(9, 6, 3)
    tokens = F.pad(tokens, (0, 4))
    with torch.no_grad():
        features = model.encode_text(tokens)
        for i, end in enumerate((8, 5, 2)):
            behind = tokens.clone()
            behind[i, end + 1:] = torch.tensor([7, 2, 0, 49, 2, 5, 11, 2, 3, 2, 9, 1])[:tokens.shape[1] - end - 1]
            torch.testing.assert_close(model.encode_text(behind), features, rtol=0, atol=1e-6)
            for place in range(end):  # every token before it counts, and in its own row alone
                before = tokens.clone()
                before[i, place] = 40
                change = (model.encode_text(before) - features).abs().amax(dim=1)
                assert change[i] > 1e-4 and change.sum() - change[i] < 1e-5
            alone = model.encode_text(tokens[i:i + 1, :end + 1])
            torch.testing.assert_close(alone, features[i:i + 1], rtol=0, atol=1e-6)


def test_a_text_means_something_else_in_another_order():
    model = small()
    with torch.no_grad():
        one, other = model.encode_text(torch.tensor([[1, 5, 9, 2], [1, 9, 5, 2]]))
    assert (one - other).abs().max() > 1e-4


@both
def test_the_length_of_padding_changes_nothing(make):
    model, tokens = make(), some_tokens(9, 5, 3)
    with torch.no_grad():
        features = model.encode_text(tokens)
        torch.testing.assert_close(model.encode_text(F.pad(tokens, (0, 7))), features, rtol=0, atol=1e-6)
        for i, length in enumerate((9, 5, 3)):
            alone = model.encode_text(tokens[i:i + 1, :length])
            torch.testing.assert_close(alone, features[i:i + 1], rtol=0, atol=1e-6)


def test_roberta_sees_the_whole_text_and_counts_positions_from_0():
    model, tokens = small_ko(), some_tokens(6)
    with torch.no_grad():
        features = model.encode_text(tokens)
        for place in range(6):
            changed = tokens.clone()
            changed[0, place] = 40
            assert (model.encode_text(changed) - features).abs().max() > 1e-4
    (model.encode_text(tokens) * torch.randn(16)).sum().backward()
    used = model.text_encoder.positional_embedding.grad.abs().sum(dim=1) > 0
    assert used.tolist() == [True] * 6 + [False] * 14


def test_only_roberta_has_dropout():
    model, images, tokens = small_ko(dropout=0.3).train(), some_images(2), some_tokens(5, 6)
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), model.encode_image(images))
        assert not torch.equal(model.encode_text(tokens), model.encode_text(tokens))
        model.eval()
        assert torch.equal(model.encode_text(tokens), model.encode_text(tokens))
        assert torch.equal(model.encode_text(tokens), small_ko().encode_text(tokens))


@both
def test_patches_are_told_apart_by_their_positions_alone(make):
    """Shuffled patches change the feature; if their positions are shuffled with them, nothing has changed."""
    model, order = make().double(), torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5])
    images, shuffled = torch.randn(2, 3, 24, 24, dtype=torch.float64), torch.empty(2, 3, 24, 24, dtype=torch.float64)
    corner = [(8 * (k // 3), 8 * (k % 3)) for k in range(9)]
    for (y, x), (from_y, from_x) in zip(corner, (corner[k] for k in order)):
        shuffled[:, :, y:y + 8, x:x + 8] = images[:, :, from_y:from_y + 8, from_x:from_x + 8]
    with torch.no_grad():
        features = model.encode_image(images)
        assert (model.encode_image(shuffled) - features).abs().max() > 1e-3
        table = model.image_encoder.positional_embedding
        table[1:] = table[1:][order]
        torch.testing.assert_close(model.encode_image(shuffled), features, rtol=0, atol=1e-12)


@both
def test_pictures_of_a_batch_do_not_mix(make):
    model, images = make().double(), torch.randn(3, 3, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        alone = torch.cat([model.encode_image(image[None]) for image in images])
        torch.testing.assert_close(model.encode_image(images), alone, rtol=0, atol=1e-12)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


@both
def test_pixels_equal_normalised_floats(make):
    model, images = make(), some_images(3)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), model.encode_image((images / 255 - mean) / std))


@both
def test_features_have_length_one_and_fp32_even_under_autocast(make):
    model = make()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        image_features, text_features = model.encode_image(some_images(3)), model.encode_text(some_tokens(4, 7, 5))
        table = model.similarity(image_features, text_features)
    for features in (image_features, text_features):
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(table, image_features @ text_features.T, rtol=0, atol=0)


@both
def test_bf16_stays_near_fp32(make):
    model, images, tokens = make(), some_images(4), some_tokens(4, 7, 5, 9)
    with torch.no_grad():
        for encode, inputs in ((model.encode_image, images), (model.encode_text, tokens)):
            exact = encode(inputs)
            with torch.autocast("cpu", torch.bfloat16):
                rough = encode(inputs)
            assert (exact * rough).sum(dim=1).min() > 0.999


# --- the loss, and learning ---

def test_loss_of_two_pairs_by_hand():
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # logits at scale 2: [[2, 1.2], [0, 1.6]]
    rows = (math.log(1 + math.exp(1.2 - 2)) + math.log(1 + math.exp(0 - 1.6))) / 2
    columns = (math.log(1 + math.exp(0 - 2)) + math.log(1 + math.exp(1.2 - 1.6))) / 2
    assert contrastive_loss(images, texts, torch.tensor(2.0)).item() == pytest.approx((rows + columns) / 2, rel=1e-6)


@both
def test_loss_of_a_model_equals_a_slow_loop(make):
    model, images, tokens = make().double(), some_images(5), some_tokens(4, 7, 5, 9, 3)
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        images = (images / 255 - model.mean) / model.std
        loss = model(images=images, tokens=tokens)["loss"]
        a, b = model.encode_image(images), model.encode_text(tokens)
    total = 0.0
    for one, other in ((a, b), (b, a)):
        for i in range(5):
            scores = [math.exp(math.exp(1.5) * float(one[i] @ other[j])) for j in range(5)]
            total -= math.log(scores[i] / sum(scores))
    assert loss.item() == pytest.approx(total / 10, rel=1e-10)


def test_loss_of_a_collapsed_model_is_ln_batch():
    same = F.normalize(torch.ones(128, 8), dim=-1)
    assert contrastive_loss(same, same, torch.tensor(50.0)).item() == pytest.approx(math.log(128), rel=1e-5)


def test_loss_is_computed_in_fp32_under_autocast():
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(64, 32), dim=-1) for _ in range(2))
    exact = contrastive_loss(images, texts, torch.tensor(100.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(images, texts, torch.tensor(100.0)), exact)
    a, b = images.bfloat16(), texts.bfloat16()
    assert torch.equal(contrastive_loss(a, b, torch.tensor(100.0)),
                       contrastive_loss(a.float(), b.float(), torch.tensor(100.0)))


def test_logit_scale_starts_at_ln_of_one_over_007_and_koclips_at_1():
    assert small().logit_scale.item() == pytest.approx(2.6592, abs=1e-4)
    assert small_ko().logit_scale.item() == 1.0


@both
def test_every_parameter_gets_a_gradient(make):
    model = make().train()
    model(images=some_images(6), tokens=some_tokens(4, 5, 6, 7, 8, 9))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@both
def test_one_batch_overfits(make):
    model, images, tokens = make().train(), some_images(8), some_tokens(*range(4, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = None
    for _ in range(50):
        loss = model(images=images, tokens=tokens)["loss"]
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        table = model.similarity(model.encode_image(images), model.encode_text(tokens))
    # at KoCLIP's scale of e, eight pairs cannot get below ln(1 + 7 exp(-8e/7)) = 0.27
    assert first > 1.5 and loss < first / 4 and (table.argmax(dim=1) == torch.arange(8)).all()


# --- the start ---

def test_the_published_initialisation():
    torch.manual_seed(0)
    width, layers = 256, 6
    config = Config(image_size=96, patch_size=8, image_width=192, image_layers=2, image_heads=3, image_mlp=768,
                    vocab_size=2000, end_id=2, context_length=77, text_width=width, text_layers=layers, text_heads=4,
                    text_mlp=4 * width, embed_dim=256)
    model = CLIP(config)
    text, image = model.text_encoder, model.image_encoder

    def check(tensor, std):
        assert tensor.std().item() == pytest.approx(std, rel=0.03)
        assert abs(tensor.mean().item()) < 0.05 * std
    check(text.token_embedding.weight, 0.02)
    check(text.positional_embedding, 0.01)
    check(text.text_projection, width ** -0.5)
    for block in text.blocks:
        check(block.attn.in_proj.weight, width ** -0.5)
        check(block.attn.out_proj.weight, width ** -0.5 * (2 * layers) ** -0.5)
        check(block.mlp.c_fc.weight, (2 * width) ** -0.5)
        check(block.mlp.c_proj.weight, width ** -0.5 * (2 * layers) ** -0.5)
    check(image.positional_embedding, 192 ** -0.5)
    check(image.proj, 192 ** -0.5)
    theirs = nn.MultiheadAttention(192, 3)
    for block in image.blocks:  # as PyTorch's own module starts
        check(block.attn.in_proj.weight, theirs.in_proj_weight.std().item())
        check(block.attn.out_proj.weight, theirs.out_proj.weight.std().item())
    for block in (*text.blocks, *image.blocks):
        assert not block.attn.in_proj.bias.any() and not block.attn.out_proj.bias.any()
        assert (block.ln_1.weight == 1).all() and not block.ln_1.bias.any()


# --- texts, captions and messages ---

@both
def test_layout_cuts_and_keeps_the_end(make):
    model = make()
    model.config = replace(model.config, context_length=6)
    assert model.tokenize(["", "ab"], Words()).tolist() == [[1, 2, 0, 0], [1, 3 + 97 % 40, 3 + 98 % 40, 2]]
    with pytest.warns(UserWarning, match=r"more than 4 tokens are cut to that \(1 of 2 here\)"):
        tokens = model.tokenize(["abcdefgh", "a"], Words())
    assert tokens.shape == (2, 6) and tokens.dtype == torch.long and tokens[0, -1] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # four pieces are not too many
        assert tokens[0].tolist() == model.tokenize(["abcd"], Words())[0].tolist()
    assert model.encode_text(tokens).shape == (2, 16)


def test_a_batch_takes_one_caption_of_each_picture():
    model, samples = small(), [SimpleNamespace(captions=["a", "bb"]), SimpleNamespace(captions=["cc", "d", "e"])]
    drawn = set()
    for seed in range(40):
        batches = [model.text_batch(samples, [random.Random(seed), random.Random(99)], Words())["tokens"]
                   for _ in range(2)]
        assert torch.equal(*batches)  # the generators decide, and nothing else
        drawn.add(tuple(tuple(row[row > 2].tolist()) for row in batches[0]))
    pieces = [[tuple(Words().encode(caption)) for caption in sample.captions] for sample in samples]
    assert {first for first, _ in drawn} == set(pieces[0])
    assert len({second for _, second in drawn}) == 1 and drawn.pop()[1] in pieces[1]


@pytest.mark.parametrize("call, message", [
    (lambda m: m.tokenize("a red star", Words()), r"texts must be a list of at least one text, got 'a red star'"),
    (lambda m: m.tokenize([], Words()), r"texts must be a list of at least one text, got \[\]"),
    (lambda m: m.encode_text(torch.zeros(5, dtype=torch.long)), r"tokens must be \(B, L\).*got \(5,\)"),
    (lambda m: m.encode_text(torch.full((1, 21), 2)), r"L <= (16|20), got \(1, 21\)"),
    (lambda m: m.encode_image(torch.zeros(3, 24, 24)), r"images must be \(B, 3, 24, 24\), got \(3, 24, 24\)"),
    (lambda m: m.encode_image(torch.zeros(1, 24, 24, 3)), r"images must be \(B, 3, 24, 24\), got \(1, 24, 24, 3\)"),
    (lambda m: m.encode_image(torch.zeros(1, 3, 32, 32)), r"images must be \(B, 3, 24, 24\), got \(1, 3, 32, 32\)"),
])
@both
def test_wrong_arguments_are_named(make, call, message):
    with pytest.raises(ValueError, match=message):
        call(make())


def test_a_text_without_an_end_is_refused():
    with pytest.raises(ValueError, match="end-of-text id 2"):
        small().encode_text(torch.tensor([[1, 5, 6, 2], [1, 5, 6, 7]]))


def test_the_pipeline_ranks_labels_by_the_softmax_of_scaled_cosines(monkeypatch):
    model, picture = small(), some_images(1)[0]
    loaded = (model, Words(), lambda image: picture)
    monkeypatch.setitem(sys.modules, "train", SimpleNamespace(load=lambda path: loaded))
    pipeline, labels = clip.ZeroShotPipeline("best.pt"), ["a cat", "a dog", "x"]
    with torch.no_grad():
        image = model.encode_image(picture[None])[0]
        scores = {}
        for label in labels:
            text = model.encode_text(torch.tensor([[1, *Words().encode(label), 2]]))[0]
            scores[label] = math.exp(float(image @ text) / 0.07)
    best = sorted(labels, key=scores.get, reverse=True)
    found = pipeline.predict("cat.jpg", labels)
    assert [label for label, _ in found] == best
    assert [p for _, p in found] == pytest.approx([scores[label] / sum(scores.values()) for label in best], rel=1e-4)
    assert pipeline.predict("cat.jpg", labels, top_k=1) == found[:1]
    for wrong in ("a cat", ["a cat"], []):
        with pytest.raises(ValueError, match="two or more"):
            pipeline.predict("cat.jpg", wrong)


@both
def test_a_config_survives_being_written_down(make):
    model = make()
    assert type(model).Config(**json.loads(json.dumps(asdict(model.config)))) == model.config


def test_the_file_stands_alone(tmp_path):
    shutil.copy(clip.__file__, tmp_path)
    code = ("import sys; before = set(sys.modules); import torch; import clip; from dataclasses import replace\n"
            "for Model, config in ((clip.CLIP, replace(clip.CONFIGS['tiny'], end_id=2)),\n"
            "                      (clip.KoCLIP, clip.CONFIGS['koclip-tiny'])):\n"
            "    images = torch.zeros(2, 3, config.image_size, config.image_size)\n"
            "    assert Model(config)(images, torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]]))['loss'].isfinite()\n"
            "print(not {'data', 'train', 'liteclip', 'torchvision', 'PIL', 'msgpack', 'safetensors'} & set(sys.modules)"
            " - before)")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("True\n", "")


# --- on a GPU, where there is one ---

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@both
def test_cuda_agrees_with_the_cpu(make, dtype, tolerance):
    model, images, tokens = make(), some_images(12), some_tokens(*range(4, 16))
    expected = model(images=images, tokens=tokens)["loss"]
    expected.backward()
    scale_gradient = model.logit_scale.grad.item()
    model.zero_grad()
    model.cuda()
    with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
        loss = model(images=images.cuda(), tokens=tokens.cuda())["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert model.logit_scale.grad.item() == pytest.approx(scale_gradient, rel=tolerance, abs=tolerance)


# --- the head start of small towers ---

def test_head_start_makes_neighbours_alike_and_three_filters_of_four_blind_to_brightness():
    config = replace(CONFIGS["tiny"], image_size=64, patch_size=8)
    assert config.head_start and not CONFIGS["vit-b-32"].head_start
    torch.manual_seed(0)
    tower = CLIP(config).image_encoder
    torch.manual_seed(0)
    plain = CLIP(replace(config, head_start=False)).image_encoder
    width, table = config.image_width, tower.positional_embedding.detach()
    assert torch.equal(table[0], plain.positional_embedding[0])  # the class token is nowhere
    row, column = 5, 2  # of 8 x 8, by hand: the first half tells the column, the second the row
    for half, place in ((0, column), (1, row)):
        for i in (0, 3, width // 4 - 1):
            angle = place * 30 ** (-i / (width // 4))
            at = table[1 + 8 * row + column, half * width // 2 + i:][:width // 4 + 1]
            assert at[0].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert at[-1].item() == pytest.approx(math.cos(angle), abs=1e-5)
    alike = F.cosine_similarity(table[1:, None], table[None, 1:], dim=-1)[8 * 4 + 4].view(8, 8)
    assert alike[4, 5] > alike[4, 6] > alike[4, 7] and alike[3, 4] > alike[2, 4] and alike[4, 5] > alike[0, 0]
    white = tower.conv1(torch.ones(1, 3, 64, 64)).abs().amax(dim=(0, 2, 3))
    assert white[:3 * width // 4].max() < 1e-5 < 1e-2 < white[3 * width // 4:].mean()
    assert torch.equal(tower.conv1.weight[3 * width // 4:], plain.conv1.weight[3 * width // 4:])
