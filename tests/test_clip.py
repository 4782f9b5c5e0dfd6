"""clip.py, CLIP and KoCLIP: the same weights in every format that they are published in, towers and loss by hand and by
slow loops, sizes, and the command. What the model files share word for word (test_shared.py) is tested here for all."""
import gzip
import json
import math
import os
import pickle
import random
import re
import runpy
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import clip
import data
import tokens as tokenizers
from clip import CLIP, CONFIGS, PUBLISHED, Attention, Config, contrastive_loss, from_backbones
from test_golden import build_clip, build_koclip
from tools import (Letters, assert_close, assert_images_are_normalised, assert_two_processes_equal_one, lively,
                   overfit, save_run, some_images, some_tokens)

GOLDEN = Path(__file__).parent / "golden"
SMALL = Config(image_size=24, patch_size=8, image_width=32, image_layers=2, image_heads=4, image_mlp=64, vocab_size=50,
               end_id=2, context_length=16, text_width=24, text_layers=2, text_heads=4, text_mlp=48, embed_dim=16)
KO = dict(text_tower="roberta", pad_id=0, dropout=0.0)
every = pytest.mark.parametrize("kind", [{}, KO, dict(KO, image_tower="vit", activation="gelu")],
                                ids=["clip", "koclip", "koclip-vit"])


def small(**changes):
    torch.manual_seed(0)
    return CLIP(replace(SMALL, **changes)).eval()


# --- reading published weights, in every format ---
# The golden files hold small weights in published names, and what the published implementation makes of them.

def golden(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def config_of(golden):
    return (build_koclip if "vision" in golden["config"] else build_clip)(golden)[0].config


def assert_features(model, golden, tolerance=1e-8):
    """In float64: the features that the published implementation returned."""
    assert all(p.dtype == torch.float32 for p in model.parameters())
    model.double()
    with torch.no_grad():
        for ours, reference in ((model.encode_image(golden["image"].double()), golden["image_features"]),
                                (model.encode_text(golden["text"]), golden["text_features"])):
            assert (ours - reference).abs().max() <= tolerance * reference.abs().max()


HUGGING_FACE = [  # OpenAI's names -> those of Hugging Face's CLIPModel
    (r"^visual\.proj$", "visual_projection.weight"), (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."), (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."), (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."), (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."), (r"\.mlp\.c_fc\.", ".mlp.fc1."), (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def hugging_face(state):
    found = {f"{tower}.embeddings.position_ids": torch.arange(10)[None] for tower in ("text_model", "vision_model")}
    for name, value in state.items():
        for pattern, replacement in HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        if "in_proj_" in name:
            found |= {name.replace("in_proj_", f"{x}_proj."): part for x, part in zip("qkv", value.chunk(3))}
        else:
            found[name] = value.T.contiguous() if name.endswith("_projection.weight") else value
    return found


def write_flax(state, path):
    """KoCLIP's names in PyTorch -> a file as flax.serialization writes it: a nested tree in Flax's names and layouts,
    in which an array is extension 1: (shape, dtype, bytes), packed again."""
    msgpack, tree = pytest.importorskip("msgpack"), {}
    for name, value in state.items():
        *path_to, last = name.split(".")
        if last == "weight" and value.ndim == 2 and path_to[-1].endswith(("embedding", "embeddings")):
            last = "embedding"
        elif last == "weight" and value.ndim > 1:
            last, value = "kernel", value.permute({2: (1, 0), 4: (2, 3, 1, 0)}[value.ndim])
        elif last == "weight":
            last = "scale"
        branch, array = tree, value.contiguous().numpy()
        for part in path_to:
            branch = branch.setdefault(part, {})
        branch[last] = msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))
    Path(path).write_bytes(msgpack.packb(tree))


FORMATS = {  # what becomes of the published names
    "as published": lambda state: state,
    "hugging face": hugging_face,
    "open_clip with a text module": lambda state: {
        name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": value
        for name, value in state.items()},
    "a training checkpoint of open_clip": lambda state: {
        "epoch": 3, "name": "run", "state_dict": {f"module.{name}": value for name, value in state.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "compiled and distributed": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    "with params": lambda state: {f"params.{name}": value for name, value in state.items()},
}


@pytest.mark.parametrize("name, form, file", [
    ("clip_quickgelu", "as published", "weights.pt"), ("clip_quickgelu", "hugging face", "pytorch_model.bin"),
    ("clip_quickgelu", "hugging face", "model.safetensors"),
    ("clip_gelu", "open_clip with a text module", "open_clip_pytorch_model.bin"),
    ("clip_gelu", "a training checkpoint of open_clip", "epoch_3.pt"),
    ("clip_gelu", "compiled and distributed", "weights.pt"),
    ("koclip", "as published", "flax_model.msgpack"), ("koclip_large", "with params", "flax_model.msgpack")])
def test_every_format_gives_the_published_features(tmp_path, name, form, file):
    reference, write = golden(name), torch.save
    if file.endswith(".safetensors"):
        write = pytest.importorskip("safetensors.torch").save_file
    elif file.endswith(".msgpack"):
        write = write_flax
    write(FORMATS[form](reference["state_dict"]), tmp_path / file)
    assert_features(CLIP.from_pretrained(str(tmp_path / file), config_of(reference)), reference)


def torchscript(state, path):
    """As OpenAI's files are: a TorchScript archive, the large tensors in half precision, three sizes beside them."""
    archive = nn.Module()
    for name, value in {**state, **dict.fromkeys(("input_resolution", "context_length", "vocab_size"),
                                                 torch.tensor(12))}.items():
        *path_to, last = name.split(".")
        module = archive
        for part in path_to:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_buffer(last, value.half() if value.ndim > 1 else value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; the published files stay what they are
        torch.jit.script(archive).save(path)


def test_a_square_projection_is_transposed_only_where_the_format_stores_it_so():
    model = small(text_width=16, text_mlp=32)  # as in L/14: its shape does not tell
    openai = {re.sub("^(image|text)_encoder.", lambda tower: "visual." if tower[1] == "image" else "", name)
              .replace("blocks.", "transformer.resblocks.").replace(".in_proj.", ".in_proj_"): value
              for name, value in model.state_dict().items()}
    for state in (openai, hugging_face(openai)):
        found = CLIP.from_pretrained(state, model.config).state_dict()
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_weights_load_strictly():
    reference = golden("clip_quickgelu")
    state = reference["state_dict"] | {"surplus": torch.zeros(1), "visual.conv1.weight": torch.zeros(32, 3, 4, 4),
                                       "positional_embedding": torch.zeros(9, 24)}
    del state["visual.transformer.resblocks.1.ln_1.bias"]
    with pytest.raises(RuntimeError) as error:
        CLIP.from_pretrained(state, config_of(reference))
    for message in ("Missing key.*image_encoder.blocks.1.ln_1.bias", "Unexpected key.*surplus",
                    "mismatch for image_encoder.conv1.weight", "mismatch for text_encoder.positional_embedding"):
        assert re.search(message, str(error.value))


class Payload:
    def __reduce__(self):  # unpickling it makes a folder
        return os.mkdir, ("made",)


def test_code_in_a_file_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Payload()}, "x.pt")
    with pytest.raises(pickle.UnpicklingError):
        CLIP.from_pretrained("x.pt", SMALL)
    with pytest.raises(ValueError, match="x.pt is no checkpoint"):
        clip.load("x.pt")
    assert not Path("made").exists()
    pickle.loads(pickle.dumps(Payload()))  # it would have
    assert Path("made").exists()


@pytest.mark.parametrize("old, new", [(2, 4), (3, 7), (7, 3)])
def test_resized_positions_equal_pillows(old, new):
    table = torch.randn(1 + old ** 2, 32, generator=torch.Generator().manual_seed(0))
    state = small(image_size=8 * old).state_dict() | {"image_encoder.positional_embedding": table}
    with pytest.warns(UserWarning, match=f"{old} x {old} patches, resized to {new} x {new}"):
        model = CLIP.from_pretrained(state, replace(SMALL, image_size=8 * new))
    found = model.image_encoder.positional_embedding.detach()
    assert torch.equal(found[0], table[0])  # the class token is nowhere on the picture
    for channel in range(32):
        grid = Image.fromarray(table[1:, channel].reshape(old, old).numpy())
        expected = torch.from_numpy(np.array(grid.resize((new, new), Image.Resampling.BICUBIC)))
        assert_close(found[1:, channel].view(new, new), expected, atol=1e-5)


@pytest.mark.parametrize("name, published, parameters", [
    ("vit-b-32", "ViT-B-32-quickgelu", 151_277_313), ("vit-b-16", "ViT-B-16-quickgelu", 149_620_737),
    ("vit-l-14", "ViT-L-14-quickgelu", 427_616_513), ("vit-l-14-336", "ViT-L-14-336-quickgelu", 427_944_193),
    ("koclip-base", "koclip-base", 425_029_889), ("koclip-large", "koclip-large", 642_056_193)])
def test_published_checkpoints_load_strictly_and_have_the_published_size(name, published, parameters):
    with gzip.open(GOLDEN / "shapes.json.gz") as file:
        entry = json.load(file)[f"clip/{published}"]
    with torch.device("meta"):  # shapes without memory
        model = CLIP.from_pretrained({key: torch.empty(shape) for key, shape in entry["keys"].items()}, name)
    assert sum(p.numel() for p in model.parameters()) == entry["params"] == parameters
    c = model.config  # what shapes do not tell: heads are 64 wide everywhere, OpenAI's last token ends a text
    assert c.image_width == 64 * c.image_heads and c.text_width == 64 * c.text_heads
    assert c.image_size == (336 if "336" in name else 224)
    assert c.activation == ("gelu" if name == "koclip-large" else "quick_gelu")
    assert c.pad_id == 1 if "koclip" in name else c.end_id == c.vocab_size - 1 == 49407


# --- KoCLIP from towers that were trained by themselves ---

def tower(reference, published, name):
    """A tower of KoCLIP, `published`, as it would be published by itself under another name: without its pooler."""
    return {key.replace(published, name, 1): value for key, value in reference["state_dict"].items()
            if key.startswith(published) and ".pooler." not in key}


def new_names(model, image, text):
    """What a model has in its towers that is neither of the one nor of the other model's."""
    states = {"image": image.state_dict(), "text": text.state_dict()}
    return {name for name, value in model.state_dict().items() if name != "logit_scale"
            and not torch.equal(value, states[name.split("_")[0]][name])}


def test_backbones_of_koclip_base(monkeypatch):
    image, text = golden("clip_quickgelu"), golden("koclip")
    monkeypatch.setitem(CONFIGS, "koclip-base", replace(config_of(text), image_mlp=4 * 32))  # small ones in its place
    roberta = tower(text, "text_model.", "roberta.") | {"roberta.embeddings.position_ids": torch.arange(24)[None]}
    model = from_backbones(hugging_face(image["state_dict"]), roberta)
    assert model.logit_scale == 1 and model.training  # not the scale of the CLIP that the image tower comes from
    assert new_names(model, build_clip(image)[0], build_koclip(text)[0]) == {
        "text_encoder.pooler.weight", "text_encoder.pooler.bias", "text_encoder.text_projection"}


def test_backbones_of_koclip_large(tmp_path):
    reference = golden("koclip_large")
    torch.save(tower(reference, "vision_model.", "vit.") | {"classifier.weight": torch.zeros(10, 32)}, tmp_path / "vit")
    torch.save(tower(reference, "text_model.", "roberta.") | {"lm_head.bias": torch.zeros(64)}, tmp_path / "roberta")
    model = from_backbones(tmp_path / "vit", tmp_path / "roberta", config_of(reference))
    assert new_names(model, *2 * [build_koclip(reference)[0]]) == {
        "text_encoder.pooler.weight", "text_encoder.pooler.bias", "text_encoder.text_projection",
        "image_encoder.ln_post.1.weight", "image_encoder.ln_post.1.bias", "image_encoder.proj"}


# --- the towers ---

def slow_attention(attention, x, seen):
    """One query at a time, one head at a time. seen (B, N, N): whether a query may see a key."""
    B, N, D = x.shape
    size = D // attention.heads
    (wq, wk, wv), (bq, bk, bv) = attention.in_proj.weight.chunk(3), attention.in_proj.bias.chunk(3)
    out = torch.zeros(B, N, D, dtype=x.dtype)
    for b in range(B):
        q, k, v = ([w @ x[b, n] + bias for n in range(N)] for w, bias in ((wq, bq), (wk, bk), (wv, bv)))
        for part in (slice(h * size, (h + 1) * size) for h in range(attention.heads)):
            for i in range(N):
                weights = {j: math.exp(float(q[i][part] @ k[j][part]) / math.sqrt(size))
                           for j in range(N) if seen[b, i, j]}
                out[b, i, part] = sum(w * v[j][part] for j, w in weights.items()) / sum(weights.values())
    return out @ attention.out_proj.weight.T + attention.out_proj.bias


def test_attention_equals_a_slow_loop():
    torch.manual_seed(0)
    attention, x = lively(Attention(12, 3)), torch.randn(2, 5, 12, dtype=torch.float64)
    everything, visible = torch.ones(2, 5, 5, dtype=torch.bool), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    anything = (torch.rand(2, 5, 5) < 0.5) | torch.eye(5, dtype=torch.bool)
    with torch.no_grad():
        for arguments, seen in [({}, everything), ({"causal": True}, everything.tril()),
                                ({"mask": visible[:, None, None]}, visible[:, None] & everything),
                                ({"mask": anything[:, None]}, anything)]:
            assert_close(attention(x, **arguments), slow_attention(attention, x, seen))


def test_a_text_is_read_up_to_its_first_end_and_no_further():
    model, tokens = small(), some_tokens(9, 6, 3, width=13)
    with torch.no_grad():
        features = model.encode_text(tokens)
        for i, end in enumerate((8, 5, 2)):
            behind = tokens.clone()
            behind[i, end + 1:] = torch.tensor([7, 2, 0, 49, 2, 5, 11, 2, 3, 2])[:12 - end]
            assert_close(model.encode_text(behind), features, atol=1e-6)
            for place in range(end):  # every token before it counts, and only in its own row
                before = tokens.clone()
                before[i, place] = 40
                moved = (model.encode_text(before) - features).abs().amax(dim=1)
                assert moved[i] > 1e-4 and moved.sum() - moved[i] < 1e-5


@every
def test_the_length_of_padding_changes_nothing(kind):
    model, tokens = small(**kind), some_tokens(9, 5, 3)
    with torch.no_grad():
        features = model.encode_text(tokens)
        assert_close(model.encode_text(F.pad(tokens, (0, 6))), features, atol=1e-6)
        for i, length in enumerate((9, 5, 3)):
            assert_close(model.encode_text(tokens[i:i + 1, :length]), features[i:i + 1], atol=1e-6)


def test_only_roberta_has_dropout():
    model, images, tokens = small(**KO | {"dropout": 0.3}).train(), some_images(2), some_tokens(5, 6)
    assert torch.equal(model.encode_image(images), model.encode_image(images))
    assert not torch.equal(model.encode_text(tokens), model.encode_text(tokens))


@every
def test_features_are_fp32_of_length_one_even_under_autocast(kind):
    model, images, tokens = small(**kind), some_images(4), some_tokens(4, 7, 5, 9)
    assert_images_are_normalised(model, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    with torch.no_grad():
        exact = model.encode_image(images), model.encode_text(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model.encode_image(images), model.encode_text(tokens)
            table = model.similarity(*rough)
    assert torch.equal(table, rough[0] @ rough[1].T)
    for a, b in zip(rough, exact):
        assert a.dtype == torch.float32 and not torch.equal(a, b) and (a * b).sum(dim=1).min() > 0.999
        torch.testing.assert_close(a.norm(dim=1), torch.ones(4))


# --- the loss, learning, and the start ---

def test_loss_of_two_pairs_by_hand():
    images, texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # logits at scale 2: [[2, 1.2], [0, 1.6]]
    rows = (math.log(1 + math.exp(1.2 - 2)) + math.log(1 + math.exp(0 - 1.6))) / 2
    columns = (math.log(1 + math.exp(0 - 2)) + math.log(1 + math.exp(1.2 - 1.6))) / 2
    assert contrastive_loss(images, texts, torch.tensor(2.0)).item() == pytest.approx((rows + columns) / 2, rel=1e-6)
    same = F.normalize(torch.ones(128, 8), dim=-1)  # a model that tells nothing apart
    assert contrastive_loss(same, same, torch.tensor(50.0)).item() == pytest.approx(math.log(128), rel=1e-5)


def test_loss_is_computed_in_fp32_under_autocast_and_of_half_precision():
    torch.manual_seed(0)
    (images, texts), scale = F.normalize(torch.randn(2, 64, 32), dim=-1), torch.tensor(100.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(images, texts, scale)
    assert torch.equal(found, contrastive_loss(images, texts, scale))
    a, b = images.bfloat16(), texts.bfloat16()
    assert torch.equal(contrastive_loss(a, b, scale), contrastive_loss(a.float(), b.float(), scale))


def test_two_processes_equal_one(tmp_path):
    """What gather does: the loss of the whole batch, and its exact gradient."""
    batch = {"images": torch.randn(6, 3, 24, 24, dtype=torch.float64), "tokens": some_tokens(4, 5, 6, 7, 8, 9)}
    assert_two_processes_equal_one(clip, lively(small()), [batch], tmp_path)


@every
def test_every_parameter_gets_a_gradient_and_one_batch_overfits(kind):
    model, images, tokens = small(**kind), some_images(8), some_tokens(*range(4, 12), width=12)
    first, last = overfit(model, {"images": images, "tokens": tokens}, steps=40, lr=2e-3)
    with torch.no_grad():
        table = model.logits(images, tokens)
    assert first["loss"] > 1.5 and last["loss"] < first["loss"] / 4
    assert (table.argmax(dim=1) == torch.arange(8)).all()


def test_the_published_initialisation():
    torch.manual_seed(0)
    width, layers, theirs = 256, 6, nn.MultiheadAttention(192, 3)
    model = CLIP(Config(image_size=96, patch_size=8, image_width=192, image_layers=2, image_heads=3, image_mlp=768,
                        vocab_size=2000, text_width=width, text_layers=layers, text_heads=4, text_mlp=4 * width))
    for pattern, tensors, std in [
        (r"text_encoder\.token_embedding\.weight", 1, 0.02), (r"text_encoder\.positional_embedding", 1, 0.01),
        (r"text_encoder.*(\.in_proj\.weight|\.text_projection)", layers + 1, width ** -0.5),
        (r"text_encoder.*\.(out|c)_proj\.weight", 2 * layers, (2 * layers * width) ** -0.5),
        (r"text_encoder.*\.c_fc\.weight", layers, (2 * width) ** -0.5),
        (r"image_encoder\.(positional_embedding|proj)", 2, 192 ** -0.5),  # and attention as PyTorch's own starts:
        (r"image_encoder.*\.in_proj\.weight", 2, theirs.in_proj_weight.std().item()),
        (r"image_encoder.*\.out_proj\.weight", 2, theirs.out_proj.weight.std().item()),
        (r".*_encoder.*attn.*\.bias", 2 * (layers + 2), 0.0),
    ]:
        found = [value for name, value in model.state_dict().items() if re.fullmatch(pattern, name)]
        assert len(found) == tensors, pattern
        for tensor in found:
            assert tensor.std().item() == pytest.approx(std, rel=0.03) and abs(tensor.mean().item()) <= 0.05 * std
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_sines_and_contrast():
    """Neighbouring patches start with similar positions, and three filters of four see no brightness."""
    torch.manual_seed(0)
    tower = CLIP(replace(CONFIGS["tiny"], image_size=64)).image_encoder  # 8 x 8 patches
    table, filters = tower.positional_embedding.detach(), tower.conv1.weight.detach()
    quarter, row, column = table.shape[1] // 4, 5, 2
    for first, place in ((0, column), (2 * quarter, row)):  # the first half tells the column, the second the row
        for i in (0, 3, quarter - 1):
            angle = place * 30 ** (-i / quarter)
            sine, cosine = table[1 + 8 * row + column, [first + i, first + quarter + i]].tolist()
            assert (sine, cosine) == pytest.approx((math.sin(angle), math.cos(angle)), abs=1e-5)
    assert table[0].std().item() == pytest.approx(256 ** -0.5, rel=0.2)  # the class token is nowhere
    white = filters.sum(dim=(1, 2, 3)).abs()
    assert white[:3 * quarter].max() < 1e-4 < 1e-2 < white[3 * quarter:].mean()
    assert (filters[:3 * quarter].std() / filters[3 * quarter:].std()).item() == pytest.approx(6, rel=0.05)


def test_layout_cuts_and_keeps_the_end():
    model, (a, b) = small(context_length=6), Letters().encode("ab")
    assert model.tokenize(["", "ab"], Letters()).tolist() == [[1, 2, 0, 0], [1, a, b, 2]]
    assert model.tokenize("ab", Letters()).tolist() == [[1, a, b, 2]]
    with pytest.warns(UserWarning, match=r"more than 4 tokens are cut to that \(1 of 2 here\)"):
        tokens = model.tokenize(["abcdefgh", "a"], Letters())
    assert tokens.dtype == torch.long and tokens[1].tolist() == [1, a, 2, 0, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # four pieces are not too many
        assert tokens[0].tolist() == model.tokenize(["abcd"], Letters())[0].tolist()


def test_a_batch_takes_one_caption_of_each_picture():
    model, samples = small(), [data.Sample(["a", "bb"]), data.Sample(["cc", "d", "e"])]
    drawn = [model.text_batch(samples, [random.Random(seed), random.Random(99)], Letters())["tokens"]
             for seed in (*range(20), *range(20))]
    assert all(torch.equal(a, b) for a, b in zip(drawn[:20], drawn[20:]))  # the generators decide, and nothing else
    first, second = ({tuple(row[row > 2].tolist()) for row in rows} for rows in zip(*drawn))
    pieces = [{tuple(Letters().encode(caption)) for caption in sample.captions} for sample in samples]
    assert first == pieces[0] and len(second) == 1 and second < pieces[1]


def test_each_image_needs_one_caption():
    with pytest.raises(ValueError, match="2 images and 3 captions; expected one caption for each"):
        small()(some_images(2), some_tokens(4, 4, 4))


# --- load, the pipeline and the command ---

def by_hand(model, pixels, tokenizer, labels):
    """-> [(label, probability, cosine), ...], best first, one pair at a time."""
    with torch.no_grad():
        image = model.encode_image(pixels[None])[0]
        rows = [[tokenizer.start_id, *tokenizer.encode(label), tokenizer.end_id] for label in labels]
        cosines = [float(image @ model.encode_text(torch.tensor([row]))[0]) for row in rows]
    scores = [math.exp(cosine * math.exp(model.logit_scale.item())) for cosine in cosines]
    return sorted(zip(labels, [score / sum(scores) for score in scores], cosines), key=lambda row: -row[1])


def test_load_gives_all_that_a_checkpoint_holds(tmp_path):
    expected = small(vocab_size=260)
    checkpoint, picture, pixels = save_run(expected, tmp_path)
    for source in (tmp_path, checkpoint):  # the run's folder, and the file
        model, tokenizer, preprocess = clip.load(source, "cpu")
        assert not model.training and model.config == expected.config
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values()))
        assert tokenizer.state() == {"kind": "bpe", "merges": []}
        assert torch.equal(preprocess(picture), pixels[0]) and torch.equal(preprocess(Image.open(picture)), pixels[0])


def test_the_command_prints_probabilities_and_cosines_and_mistakes_get_one_line(tmp_path, monkeypatch, capsys):
    def command(*words):
        monkeypatch.setattr(sys, "argv", ["clip.py", *map(str, words)])
        runpy.run_path(clip.__file__, run_name="__main__")

    model, labels = small(vocab_size=260), ["a star", "a circle"]
    checkpoint, picture, pixels = save_run(model, tmp_path)
    command(checkpoint, picture, *labels)
    assert capsys.readouterr().out.splitlines() == [
        f"{probability:7.1%}  cosine {cosine:+.3f}  {label}"
        for label, probability, cosine in by_hand(model, pixels[0], tokenizers.BPE([]), labels)]
    for name in ("text.png", "text.pt"):
        (tmp_path / name).write_text("neither a picture nor a checkpoint")
    torch.save({"visual.proj": torch.zeros(2)}, tmp_path / "weights.pt")
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"config": asdict(model.config) | {"mixture_tokens": 5}}, tmp_path / "llip.pt")
    for words, message in [
        ([checkpoint, picture, "one label"], "usage: python .*clip.py CHECKPOINT IMAGE"),
        (["nowhere.pt", picture, *labels], "clip.py: nowhere.pt: no such checkpoint"),
        ([tmp_path / "text.pt", picture, *labels], "text.pt is no checkpoint of train.py"),
        ([tmp_path / "weights.pt", picture, *labels], "published weights go through from_pretrained"),
        ([tmp_path / "llip.pt", picture, *labels], "llip.pt does not fit CLIP.*mixture_tokens"),
        ([checkpoint, "nowhere.png", *labels], "nowhere.png: no such file"),
        ([checkpoint, tmp_path / "text.png", *labels], "text.png: cannot identify image"),
    ]:
        with pytest.raises(SystemExit, match=message) as error:  # Python prints it, with exit status 1
            command(*words)
        assert "\n" not in str(error.value)


# --- published names, with the download replaced ---

def replace_download(monkeypatch, folder, name, reference):
    """Small files in place of a published model's -> what was asked for: {address: SHA-256}."""
    asked = {}

    def download(url, path, md5=None, sha256=None):
        asked[url] = sha256
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if url.endswith(".gz"):
            Path(path).write_bytes(gzip.compress(("#version\n" + "t h\n" * 48894).encode()))
        elif url.endswith("vocab.txt"):
            Path(path).write_text("[CLS] [PAD] [SEP] [UNK] 빨간 별 ##이 원".replace(" ", "\n"), encoding="utf-8")
        else:
            write = write_flax if url.endswith(".msgpack") else torchscript if "openaipublic" in url else torch.save
            write(reference["state_dict"], path)
        return Path(path)
    monkeypatch.setattr(data, "download", download)
    monkeypatch.setitem(CONFIGS, name, config_of(reference))
    monkeypatch.chdir(folder)
    return asked


def test_openais_archives_are_downloaded_with_their_checksums_and_read(tmp_path, monkeypatch):
    reference = golden("clip_quickgelu")
    asked = replace_download(monkeypatch, tmp_path, "vit-b-32", reference)
    model, tokenizer, preprocess = clip.load("vit-b-32", "cpu")
    rounded = {name: v.half().float() if v.ndim > 1 else v for name, v in reference["state_dict"].items()}
    expected = CLIP.from_pretrained(rounded, config_of(reference)).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert_features(model, reference, tolerance=3e-3)
    assert (tokenizer.start_id, tokenizer.end_id) == (49406, 49407) and not model.training
    assert preprocess(Image.new("RGB", (40, 30))).shape == (3, 24, 24)
    url = next(url for url in asked if url.endswith("/ViT-B-32.pt"))
    assert url.startswith("https://openaipublic.azureedge.net/clip/models/") and asked[url] == url.split("/")[-2]
    assert len(asked) == 2 and None not in asked.values()
    with pytest.warns(UserWarning, match="resized to 6 x 6"):  # a config of one's own wins over the name's
        assert CLIP.from_pretrained("vit-b-32", replace(config_of(reference), image_size=48)).config.image_size == 48


@pytest.mark.parametrize("name", ["koclip-base", "koclip-large"])
def test_koclips_names_are_downloaded_and_serve_the_pipeline(tmp_path, monkeypatch, name):
    reference, labels = golden("koclip" if name == "koclip-base" else "koclip_large"), ["빨간 별이", "원"]
    asked = replace_download(monkeypatch, tmp_path, name, reference)
    pipeline, picture = clip.ZeroShotPipeline(name, "cpu"), Image.new("RGB", (24, 24), "red")
    assert [pipeline.tokenizer.encode(label) for label in labels] == [[4, 5, 6], [7]]
    expected = by_hand(pipeline.model, pipeline.preprocess(picture), pipeline.tokenizer, labels)
    found = pipeline.predict(picture, labels)
    assert found == [(label, pytest.approx(p, rel=1e-3)) for label, p, _ in expected]
    assert pipeline.predict(picture, labels, top_k=1) == found[:1]
    assert set(asked) == {url for url, _ in PUBLISHED[name].values()}
    assert_features(pipeline.model, reference)
