"""Every model against what the published implementation returned on small random weights, in float64.

    pytest tests/test_golden.py -k liteclip            # GOLDEN=folder for other sizes of the same files

Features, logits and loss to 1e-8 of the largest reference entry; every gradient's norm to 1e-6 of itself.
"""
import os
from pathlib import Path

import pytest
import torch

import clip
import clips
import liteclip
import llip
import prolip

GOLDEN = Path(os.environ.get("GOLDEN", Path(__file__).parent / "golden"))


def fields(c):
    """What the reference calls the sizes of its towers -> the fields that the Configs have in common."""
    return dict(
        image_size=c["image_size"], patch_size=c["patch_size"], image_width=c["vision_width"],
        image_layers=c["vision_layers"], image_heads=c["vision_heads"],
        image_mlp=c.get("vision_mlp", 4 * c["vision_width"]), vocab_size=c["vocab_size"],
        context_length=c.get("context_length", c.get("max_positions")), text_width=c["text_width"],
        text_layers=c["text_layers"], text_heads=c["text_heads"], text_mlp=c.get("text_mlp", 4 * c["text_width"]),
        embed_dim=c.get("embed_dim", c.get("proj_dim")))


def build_clip(golden):
    c = golden["config"]
    config = clip.Config(**fields(c), end_id=c["vocab_size"] - 1,
                         activation="quick_gelu" if c["quick_gelu"] else "gelu")
    return clip.CLIP.from_pretrained(golden["state_dict"], config), clip.NAMES


def build_koclip(golden):
    c = golden["config"]
    config = clip.Config(**fields(c), image_tower=c["vision"], text_tower="roberta", pad_id=1,
                         activation="quick_gelu" if c["vision"] == "clip" else "gelu")
    return clip.CLIP.from_pretrained(golden["state_dict"], config), clip.KOCLIP_NAMES


def build_liteclip(golden):
    c = golden["config"]
    config = liteclip.Config(
        image_size=c["image_size"], depths=tuple(c["depths"]), dims=tuple(c["dims"]), vocab_size=c["vocab_size"],
        positions=c["max_positions"], text_width=c["text_width"], text_layers=c["text_layers"],
        text_heads=c["text_heads"], text_mlp=c["text_mlp"], embed_dim=c["proj_dim"])
    return liteclip.LiteCLIP.from_pretrained(golden["state_dict"], config), liteclip.NAMES


def build_llip(golden):
    c = golden["config"]
    config = llip.Config(
        **fields(c), end_id=c["vocab_size"] - 1,
        mixture_tokens=c["mixture_tokens"], mixing_heads=c["heads"], temperature=c["temperature"],
        mixing_norm=c["norm"])
    return llip.Llip.from_pretrained(golden["state_dict"], config), llip.NAMES


def build_clips(golden):
    c = golden["config"]
    config = clips.Config(**fields(c), class_id=3, norm_eps=c["norm_eps"], caption_layers=0)
    return clips.CLIPS.from_pretrained(golden["state_dict"], config), clips.NAMES


def build_prolip(golden):
    c, w = golden["config"], golden["weights"]
    config = prolip.Config(
        **fields(c), text_eps=c["text_norm_eps"], image_in_text=w["inclusion_alpha"],
        original_in_masked=w["inclusion_alpha_occ"], vib=w["vib_beta"], inclusion_eps=w["inclusion_loss_eps"],
        inclusion_scale=w["inclusion_loss_scale"])
    return prolip.ProLIP.from_pretrained(golden["state_dict"], config), prolip.NAMES


BUILD = {"clip_quickgelu": build_clip, "clip_gelu": build_clip, "koclip": build_koclip, "koclip_large": build_koclip,
         "liteclip": build_liteclip, "llip": build_llip, "llip_norm": build_llip, "prolip": build_prolip,
         "clips": build_clips}


def assert_close(ours, reference):
    assert ours.shape == reference.shape and ours.dtype == torch.float64
    assert (ours - reference).abs().max() <= 1e-8 * reference.abs().max()


def gradients(model, reference):
    """The model's gradients under the names of the reference, which may keep queries, keys and values apart."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = [name.replace(".in_proj.", f".{part}_proj.") for part in "qkv"]
        if parts[0] in reference and parts[0] != name:
            found |= dict(zip(parts, parameter.grad.chunk(3)))
        else:
            found[name] = parameter.grad
    return found


def check_points(model, names, golden):
    images, tokens = golden["image"].double(), golden["text"]
    assert_close(model.encode_image(images), golden["image_features"])
    assert_close(model.encode_text(tokens), golden["text_features"])
    if "logits_per_image" in golden:
        assert_close(model.logits(images, tokens), golden["logits_per_image"])
    if "logits_per_text" in golden:
        assert_close(model.logits(images, tokens).T, golden["logits_per_text"])
    loss = model(images, tokens)["loss"]
    assert_close(loss, golden["loss"])
    assert_gradients(model, loss, names, golden)


def assert_gradients(model, loss, names, golden):
    loss.backward()
    reference = {name.removesuffix(".T"): norm for name, norm in clip.read_weights(golden["grad_norm"], names).items()}
    found = gradients(model, reference)
    assert set(reference) == set(found)
    for name, norm in reference.items():
        assert abs(found[name].norm() - norm) <= 1e-6 * norm + 1e-12, name


def check_prolip(model, names, golden):
    assert golden["weights"]["ppcl_lambda"] == 1
    images, tokens = golden["image"].double(), golden["text"]
    rows = len(golden["masked_text"])
    masked = torch.arange(len(images)) < rows
    kept = golden["keep_patches"].expand(len(images), -1)
    masked_tokens = torch.cat([golden["masked_text"], tokens[rows:]])
    found = {"image_features": model.encode_image(images), "text_features": model.encode_text(tokens),
             "masked_image_features": model.encode_image(images[:rows], kept[:rows]),
             "masked_text_features": model.encode_text(golden["masked_text"])}
    for name, features in found.items():
        assert_close(features.mean, golden[name]["mean"])
        assert_close(features.log_var, golden[name]["log_var"])
    image, text = found["image_features"], found["text_features"]
    assert_close(model.logits(images, tokens), golden["logits"])
    assert_close(prolip.inclusion_test(image, text, golden["weights"]["inclusion_loss_eps"]), golden["inclusion_test"])

    losses = model(images, tokens, masked, masked_tokens, kept)
    for ours, theirs in (("ppcl", "ppcl"), ("image_in_text", "inclusion"), ("image_in_masked", "img_inclusion"),
                         ("text_in_masked", "txt_inclusion"), ("vib", "vib")):
        assert_close(losses[ours], golden["loss_parts"][theirs])
    assert_close(losses["loss"], golden["loss"])
    assert_gradients(model, losses["loss"], names, golden)


def check_llip(model, names, golden):
    images, tokens = golden["image"].double(), golden["text"]
    image_features, text_features = model.encode_image(images), model.encode_text(tokens)
    assert_close(image_features.keys, golden["keys"])
    assert_close(image_features.values, golden["values"])
    assert_close(text_features.query, golden["queries"])
    assert_close(text_features.target, golden["text_features"])
    mixed = llip.mixtures(image_features, text_features, model.out_proj, model.temperature)
    assert_close(torch.nn.functional.normalize(mixed, dim=-1), golden["mixed_image_features"])
    assert_close(model.logits(images, tokens), golden["logits"])
    loss = model(images, tokens)["loss"]
    assert_close(loss, golden["loss"])
    assert_gradients(model, loss, names, golden)


def check_clips(model, names, golden):
    images = golden["image"].double()
    assert_close(model.encode_image(images), golden["image_features"])
    assert_close(model.encode_text(golden["web_caption"]), golden["web_features"])
    assert_close(model.encode_text(golden["sub_caption"]), golden["sub_features"])
    losses = model(images, golden["web_caption"], golden["sub_caption"], targets=None)
    assert_close(losses["contrastive"], golden["loss_contrastive"])
    assert_gradients(model, losses["contrastive"], names, golden)


CHECK = {"clips": check_clips, "llip": check_llip, "llip_norm": check_llip, "prolip": check_prolip}


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in sorted(GOLDEN.glob("*.pt")) if p.stem in BUILD])
def test_golden(path):
    golden = torch.load(path, weights_only=True)
    model, names = BUILD[path.stem](golden)
    CHECK.get(path.stem, check_points)(model.double().eval(), names, golden)
