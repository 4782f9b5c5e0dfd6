"""liteclip.py: its loss by hand, its towers against torchvision's, its limits, and what it says of unfit input."""
import gzip
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision

import liteclip
from liteclip import CONFIGS, LiteCLIP, contrastive_loss

HERE = Path(__file__).parent
TINY = replace(CONFIGS["tiny"], vocab_size=50)


def tiny(**changes):
    torch.manual_seed(0)
    return LiteCLIP(replace(TINY, **changes)).eval()


def some_tokens(*lengths, vocab=50):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for i, n in enumerate(lengths):
        tokens[i, :n] = torch.randint(4, vocab, (n,), generator=generator)
    return tokens


def some_images(n, size=64):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


class Words:
    """A tokenizer for tests: every letter is a piece."""
    pad_id, start_id, end_id = 0, 1, 2

    def encode(self, text):
        return [3 + ord(c) % 40 for c in text]


# --- the loss ---

def test_loss_of_two_pairs_by_hand():
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # logits at scale 2: [[2, 1.2], [0, 1.6]]
    rows = (math.log(1 + math.exp(1.2 - 2)) + math.log(1 + math.exp(0 - 1.6))) / 2
    columns = (math.log(1 + math.exp(0 - 2)) + math.log(1 + math.exp(1.2 - 1.6))) / 2
    assert contrastive_loss(images, texts, torch.tensor(2.0)).item() == pytest.approx((rows + columns) / 2, rel=1e-6)


def test_loss_equals_a_slow_loop():
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(7, 5, dtype=torch.float64), dim=-1) for _ in range(2))
    total = 0.0
    for a, b in ((images, texts), (texts, images)):
        for i in range(7):
            scores = [math.exp(3 * float(a[i] @ b[j])) for j in range(7)]
            total -= math.log(scores[i] / sum(scores))
    assert contrastive_loss(images, texts, torch.tensor(3.0)).item() == pytest.approx(total / 14, rel=1e-12)


def test_loss_of_a_collapsed_model_is_ln_batch():
    same = F.normalize(torch.ones(128, 8), dim=-1)
    assert contrastive_loss(same, same, torch.tensor(50.0)).item() == pytest.approx(math.log(128), rel=1e-5)


def test_loss_is_computed_in_fp32_under_autocast():
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(64, 32), dim=-1) for _ in range(2))
    exact = contrastive_loss(images, texts, torch.tensor(100.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(images, texts, torch.tensor(100.0)), exact)


# --- the towers ---

def test_convnext_equals_torchvisions_with_its_weights():
    torch.manual_seed(0)
    published = torchvision.models.convnext_tiny(weights=None).eval()
    for name, parameter in published.named_parameters():  # layer scale at 1e-6 would hide every block
        if name.endswith("layer_scale"):
            torch.nn.init.uniform_(parameter, 0.5, 1.0)
    bert = {f"bert.{name.removeprefix('text_encoder.backbone.')}": value for name, value in published_liteclip().items()
            if name.startswith("text_encoder")}
    model = LiteCLIP.from_backbones(published.state_dict(), bert).eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        theirs = published.classifier[1](published.classifier[0](published.avgpool(published.features(images))))
        torch.testing.assert_close(model.image_encoder(images), theirs, rtol=1e-4, atol=1e-4)


def published_liteclip():
    """A state dict with the published names and shapes, BERT's pooler among them."""
    shapes = json.loads(gzip.open(HERE / "golden" / "shapes.json.gz").read())["liteclip/liteclip"]["keys"]
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def test_published_checkpoint_loads_strictly_and_has_the_published_size():
    state = published_liteclip()
    assert sum(value.numel() for value in state.values()) == 39_254_369
    model = LiteCLIP.from_pretrained({**state, "text_encoder.backbone.embeddings.position_ids": torch.arange(512)})
    assert sum(p.numel() for p in model.parameters()) == 39_188_577


def test_a_file_loads_like_a_state_dict(tmp_path):
    torch.save(published_liteclip(), tmp_path / "liteclip2.pt")
    assert LiteCLIP.from_pretrained(tmp_path / "liteclip2.pt").logit_scale == 0


def test_what_does_not_fit_is_reported_in_groups():
    state = published_liteclip()
    state["image_encoder.backbone.stem.0.weight"] = torch.zeros(96, 3, 2, 2)
    state["surplus"] = torch.zeros(1)
    for i in range(6):
        del state[f"image_encoder.backbone.stages.2.blocks.{i}.gamma"]
    with pytest.raises(ValueError) as error:
        LiteCLIP.from_pretrained(state)
    message = str(error.value)
    assert "6 missing: image_encoder.stages.2.blocks.0.gamma; " in message and ", ..." in message
    assert "1 unexpected: surplus" in message
    assert "1 wrong shape: image_encoder.stem.0.weight (96, 3, 2, 2), expected (96, 3, 4, 4)" in message


def test_files_of_another_kind_are_named(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"model": "liteclip", "tokenizer": {}, "weights": {}}, tmp_path / "ours.pt")
    with pytest.raises(ValueError, match="list.pt holds other things than tensors"):
        LiteCLIP.from_pretrained(tmp_path / "list.pt")
    with pytest.raises(ValueError, match="ours.pt was written by train.py: use train.load"):
        LiteCLIP.from_pretrained(tmp_path / "ours.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="x.pt is no checkpoint of PyTorch or safetensors"):
        LiteCLIP.from_pretrained(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="nowhere.pt: no such file"):
        LiteCLIP.from_pretrained("nowhere.pt")


def test_an_unknown_config_lists_the_known():
    with pytest.raises(ValueError, match="huge.*liteclip, small, tiny"):
        LiteCLIP.from_pretrained({}, "huge")


def test_padding_changes_nothing_and_order_does():
    model, tokens = tiny(), some_tokens(9, 5)
    with torch.no_grad():
        features = model.encode_text(tokens)
        longer = model.encode_text(F.pad(tokens, (0, 20)))
        alone = model.encode_text(tokens[1:, :5])
        turned = model.encode_text(tokens[:1].flip(1))
    torch.testing.assert_close(longer, features, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone, features[1:], rtol=0, atol=1e-6)
    assert (turned - features[:1]).abs().max() > 1e-3


def test_pixels_equal_normalised_floats():
    model, images = tiny(), some_images(3)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), model.encode_image((images / 255 - mean) / std))


def test_features_have_length_one_and_fp32_even_under_autocast():
    model = tiny()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        image_features, text_features = model.encode_image(some_images(3)), model.encode_text(some_tokens(4, 7, 5))
        table = model.similarity(image_features, text_features)
    for features in (image_features, text_features):
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(table, image_features @ text_features.T, rtol=0, atol=0)


def test_bf16_stays_near_fp32():
    model = tiny()
    with torch.no_grad():
        exact = model.encode_image(some_images(4))
        with torch.autocast("cpu", torch.bfloat16):
            rough = model.encode_image(some_images(4))
    assert (exact * rough).sum(dim=1).min() > 0.999


def test_logit_scale_starts_at_ln_of_one_over_007():
    assert tiny().logit_scale.item() == pytest.approx(2.6592, abs=1e-4)


def test_every_parameter_gets_a_gradient():
    model = tiny().train()
    model(images=some_images(6), tokens=some_tokens(4, 5, 6, 7, 8, 9))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not name.endswith("key.bias"):  # softmax does not feel what is added to every key alike
            assert parameter.grad.abs().max() > 0, name


def test_one_batch_overfits():
    model, images, tokens = tiny().train(), some_images(16), some_tokens(*range(4, 20))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        loss = model(images=images, tokens=tokens)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        table = model.similarity(model.encode_image(images), model.encode_text(tokens))
    assert loss < 0.1 and (table.argmax(dim=1) == torch.arange(16)).all()


# --- texts and messages ---

def test_layout_cuts_and_keeps_the_end():
    model = tiny(context_length=6)
    assert model.tokenize(["", "ab"], Words()).tolist() == [[1, 2, 0, 0], [1, 3 + 97 % 40, 3 + 98 % 40, 2]]
    with pytest.warns(UserWarning, match=r"more than 4 tokens are cut to that \(1 of 2 here\)"):
        tokens = model.tokenize(["abcdefgh", "a"], Words())
    assert tokens.shape == (2, 6) and tokens[0, -1] == 2
    assert tokens[0, :5].tolist() == model.tokenize(["abcd"], Words())[0, :5].tolist()


@pytest.mark.parametrize("call, message", [
    (lambda m: m.tokenize("a red star", Words()), r"texts must be a list of at least one text, got 'a red star'"),
    (lambda m: m.tokenize([], Words()), r"texts must be a list of at least one text, got \[\]"),
    (lambda m: m.encode_text(torch.zeros(5, dtype=torch.long)), r"tokens must be \(B, L\).*got \(5,\)"),
    (lambda m: m.encode_text(torch.zeros(1, 500, dtype=torch.long)), r"L <= 64, got \(1, 500\)"),
    (lambda m: m.encode_image(torch.zeros(3, 64, 64)), r"images must be \(B, 3, height, width\), got \(3, 64, 64\)"),
    (lambda m: m.encode_image(torch.zeros(1, 64, 64, 3)), r"images must be \(B, 3, height, width\), got \(1, 64, 64, 3\)"),
])
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny())


def test_the_file_stands_alone(tmp_path):
    shutil.copy(liteclip.__file__, tmp_path)
    code = ("import sys; before = set(sys.modules); import torch; import liteclip; "
            "m = liteclip.LiteCLIP(liteclip.CONFIGS['tiny']); "
            "print(not {'data', 'train', 'torchvision', 'numpy.ma', 'PIL'} & set(sys.modules) - before)")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("True\n", "")


# --- on a GPU, where there is one ---

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_cuda_agrees_with_the_cpu(dtype, tolerance):
    model, images, tokens = tiny(), some_images(16), some_tokens(*range(4, 20))
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
