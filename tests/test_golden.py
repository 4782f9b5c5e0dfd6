"""Every model against what the published implementation returned on small random weights, in float64.

    pytest tests/test_golden.py -k liteclip            # GOLDEN=folder for other sizes of the same files

Features, logits and loss to 1e-8 of the largest reference entry; every gradient's norm to 1e-6 of itself.
"""
import os
from pathlib import Path

import pytest
import torch

import liteclip

GOLDEN = Path(os.environ.get("GOLDEN", Path(__file__).parent / "golden"))


def build_liteclip(golden):
    c = golden["config"]
    config = liteclip.Config(
        image_size=c["image_size"], depths=tuple(c["depths"]), dims=tuple(c["dims"]), vocab_size=c["vocab_size"],
        positions=c["max_positions"], text_width=c["text_width"], text_layers=c["text_layers"],
        text_heads=c["text_heads"], text_mlp=c["text_mlp"], embed_dim=c["proj_dim"])
    return liteclip.LiteCLIP.from_pretrained(golden["state_dict"], config), liteclip.rename


BUILD = {"liteclip": build_liteclip}


def assert_close(ours, reference):
    assert ours.shape == reference.shape and ours.dtype == torch.float64
    assert (ours - reference).abs().max() <= 1e-8 * reference.abs().max()


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in sorted(GOLDEN.glob("*.pt")) if p.stem in BUILD])
def test_golden(path):
    golden = torch.load(path, weights_only=True)
    model, rename = BUILD[path.stem](golden)
    model.double().eval()
    images, tokens = golden["image"].double(), golden["text"]

    image_features, text_features = model.encode_image(images), model.encode_text(tokens)
    assert_close(image_features, golden["image_features"])
    assert_close(text_features, golden["text_features"])
    assert_close(model.logit_scale.exp() * image_features @ text_features.T, golden["logits_per_image"])

    loss = model(images=images, tokens=tokens)["loss"]
    assert_close(loss, golden["loss"])
    loss.backward()
    reference = rename({name: norm for name, norm in golden["grad_norm"].items()})
    parameters = dict(model.named_parameters())
    assert set(reference) == set(parameters)
    for name, norm in reference.items():
        assert abs(parameters[name].grad.norm() - norm) <= 1e-6 * norm + 1e-12, name
