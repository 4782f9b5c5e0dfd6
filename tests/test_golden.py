"""Every model against what the published implementation returned on small random weights, in float64.

    pytest tests/test_golden.py -k liteclip            # GOLDEN=folder for other sizes of the same files

Features, logits and loss to 1e-8 of the largest reference entry; every gradient's norm to 1e-6 of itself.
"""
import os
from pathlib import Path

import pytest
import torch

import clip
import liteclip

GOLDEN = Path(os.environ.get("GOLDEN", Path(__file__).parent / "golden"))


def build_clip(golden):
    c = golden["config"]
    config = clip.Config(
        image_size=c["image_size"], patch_size=c["patch_size"], image_width=c["vision_width"],
        image_layers=c["vision_layers"], image_heads=c["vision_heads"], image_mlp=4 * c["vision_width"],
        vocab_size=c["vocab_size"], end_id=c["vocab_size"] - 1, context_length=c["context_length"],
        text_width=c["text_width"], text_layers=c["text_layers"], text_heads=c["text_heads"],
        text_mlp=4 * c["text_width"], embed_dim=c["embed_dim"],
        activation="quick_gelu" if c["quick_gelu"] else "gelu")
    return clip.CLIP.from_pretrained(golden["state_dict"], config), clip.rename


def build_koclip(golden):
    c = golden["config"]
    config = clip.KoConfig(
        image_size=c["image_size"], patch_size=c["patch_size"], image_width=c["vision_width"],
        image_layers=c["vision_layers"], image_heads=c["vision_heads"], image_mlp=c["vision_mlp"],
        image_tower=c["vision"], vocab_size=c["vocab_size"], pad_id=1, positions=c["max_positions"],
        context_length=c["max_positions"], text_width=c["text_width"], text_layers=c["text_layers"],
        text_heads=c["text_heads"], text_mlp=c["text_mlp"], embed_dim=c["proj_dim"],
        activation="quick_gelu" if c["vision"] == "clip" else "gelu")
    return (clip.KoCLIP.from_pretrained(golden["state_dict"], config),
            lambda state: clip.rename(clip.rename(state, clip.KOCLIP_NAMES)))


def build_liteclip(golden):
    c = golden["config"]
    config = liteclip.Config(
        image_size=c["image_size"], depths=tuple(c["depths"]), dims=tuple(c["dims"]), vocab_size=c["vocab_size"],
        positions=c["max_positions"], text_width=c["text_width"], text_layers=c["text_layers"],
        text_heads=c["text_heads"], text_mlp=c["text_mlp"], embed_dim=c["proj_dim"])
    return liteclip.LiteCLIP.from_pretrained(golden["state_dict"], config), liteclip.rename


BUILD = {"clip_quickgelu": build_clip, "clip_gelu": build_clip, "koclip": build_koclip, "koclip_large": build_koclip,
         "liteclip": build_liteclip}


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


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in sorted(GOLDEN.glob("*.pt")) if p.stem in BUILD])
def test_golden(path):
    golden = torch.load(path, weights_only=True)
    model, rename = BUILD[path.stem](golden)
    model.double().eval()
    images, tokens = golden["image"].double(), golden["text"]

    image_features, text_features = model.encode_image(images), model.encode_text(tokens)
    assert_close(image_features, golden["image_features"])
    assert_close(text_features, golden["text_features"])
    logits = model.logit_scale.exp() * image_features @ text_features.T
    if "logits_per_image" in golden:
        assert_close(logits, golden["logits_per_image"])
    if "logits_per_text" in golden:
        assert_close(logits.T, golden["logits_per_text"])

    loss = model(images=images, tokens=tokens)["loss"]
    assert_close(loss, golden["loss"])
    loss.backward()
    reference = {name.removesuffix(".T"): norm for name, norm in rename(golden["grad_norm"]).items()}
    found = gradients(model, reference)
    assert set(reference) == set(found)
    for name, norm in reference.items():
        assert abs(found[name].norm() - norm) <= 1e-6 * norm + 1e-12, name
