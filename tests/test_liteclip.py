"""liteclip.py: its towers against torchvision's and BERT's published names, published weights, padding, the start, and
learning. What it shares with clip.py is tested in test_clip.py, what the published code computes in test_golden.py."""
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

import liteclip
from liteclip import CONFIGS, LiteCLIP, from_backbones
from tools import assert_close, overfit, some_images, some_tokens


def tiny(**changes):
    torch.manual_seed(0)
    return LiteCLIP(replace(CONFIGS["tiny"], vocab_size=50, **changes)).eval()


def published():
    """A state dict with the published names and shapes, BERT's pooler among them."""
    with gzip.open(Path(__file__).parent / "golden" / "shapes.json.gz") as file:
        shapes = json.load(file)["liteclip/liteclip"]["keys"]
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_published_checkpoint_loads_strictly_and_has_the_published_size():
    state = published()
    assert sum(value.numel() for value in state.values()) == 39_254_369
    with torch.device("meta"):
        model = LiteCLIP.from_pretrained({**state, "text_encoder.backbone.embeddings.position_ids": torch.arange(512)})
    assert sum(p.numel() for p in model.parameters()) == 39_188_577  # without the pooler


def test_backbones_from_torchvision_and_from_berts_file_of_2019(tmp_path):
    torch.manual_seed(0)
    config = liteclip.Config(depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), vocab_size=64, text_layers=2)
    shape = [CNBlockConfig(*row) for row in ((8, 12, 1), (12, 16, 1), (16, 24, 2), (24, None, 1))]
    convnext, images = ConvNeXt(shape, layer_scale=0.7).eval(), torch.randn(2, 3, 64, 64)
    bert = {f"bert.{name.removeprefix('text_encoder.backbone.')}": torch.randn(value.shape)
            for name, value in published().items() if name.startswith("text_encoder") and ".layer.3." not in name
            and ".layer.2." not in name} | {"cls.seq_relationship.bias": torch.zeros(2)}
    bert["bert.embeddings.word_embeddings.weight"] = torch.randn(64, 256)
    torch.save({name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
                for name, value in bert.items()}, tmp_path / "bert.bin")
    model = from_backbones(convnext.state_dict(), tmp_path / "bert.bin", config)
    assert model.training
    with torch.no_grad():
        theirs = convnext.classifier[1](convnext.classifier[0](convnext.avgpool(convnext.features(images))))
        torch.testing.assert_close(model.eval().image_encoder(images), theirs, rtol=1e-4, atol=1e-5)
    block = model.text_encoder.blocks[1]
    assert torch.equal(block.ln_2.bias, bert["bert.encoder.layer.1.output.LayerNorm.bias"])
    keys = block.attn.in_proj.weight.chunk(3)[1]
    assert torch.equal(keys, bert["bert.encoder.layer.1.attention.self.key.weight"])


# --- texts and pictures ---

def test_padding_changes_nothing_and_order_does():
    model, tokens = tiny(), some_tokens(9, 5, width=9)
    with torch.no_grad():
        features = model.encode_text(tokens)
        assert_close(model.encode_text(F.pad(tokens, (0, 20))), features, atol=1e-6)
        assert_close(model.encode_text(tokens[1:, :5]), features[1:], atol=1e-6)
        assert (model.encode_text(tokens[:1].flip(1)) - features[:1]).abs().max() > 1e-3


def test_pictures_of_any_size_as_pixels_or_normalised_give_fp32_features_even_under_autocast():
    model, images = tiny(), some_images(3).repeat(1, 1, 2, 3)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), model.encode_image((images / 255 - mean) / std))
        with torch.autocast("cpu", torch.bfloat16):
            features = torch.cat([model.encode_image(images), model.encode_text(some_tokens(4, 7, 5))])
    assert features.dtype == torch.float32
    assert_close(features.norm(dim=1), torch.ones(6), atol=1e-6)
    with pytest.raises(ValueError, match=r"images must be .*got \(1, 64, 64, 3\)"):
        model.encode_image(torch.zeros(1, 64, 64, 3))


# --- the start, and learning ---

def test_new_towers_start_with_a_std_of_inputs_to_the_minus_half():
    torch.manual_seed(0)
    model = LiteCLIP(CONFIGS["small"])
    text, stages = model.text_encoder, model.image_encoder.stages
    depthwise, mlp = stages[3].blocks[0].conv_dw, stages[3].blocks[0].mlp
    for tensor, std in [
        (text.token_embedding.weight, 192 ** -0.5), (text.positional_embedding.weight, 0.1 * 192 ** -0.5),
        (text.blocks[0].mlp.c_fc.weight, 192 ** -0.5), (text.blocks[0].mlp.c_proj.weight, 768 ** -0.5),
        (mlp.c_fc.weight, 384 ** -0.5), (stages[1].downsample[1].weight, (4 * 48) ** -0.5), (depthwise.weight, 1 / 7)]:
        assert tensor.std().item() == pytest.approx(std, rel=0.05)
    assert depthwise.weight.mean(dim=(2, 3)).abs().max() < 1e-6  # they see contrast and not brightness
    assert not mlp.c_fc.bias.any() and (stages[3].blocks[0].gamma == 1).all()
    assert model.logit_scale.item() == pytest.approx(2.6592, abs=1e-4)


def test_every_parameter_gets_a_gradient_and_one_batch_overfits():
    model, images, tokens = tiny(), some_images(8).repeat(1, 1, 2, 2), some_tokens(*range(4, 12), width=12)
    _, last = overfit(model, {"images": images, "tokens": tokens}, steps=30, lr=1e-3)
    with torch.no_grad():
        table = model.logits(images, tokens)
    assert last["loss"] < 0.1 and (table.argmax(dim=1) == torch.arange(8)).all()
