"""prolip.py: its losses against slow loops, integrals and the published formulas; what its towers see; what is masked;
prompts; published shapes. That the towers compute what the published code computes is in test_golden.py."""
import itertools
import math
import random
import runpy
import sys
import warnings
from dataclasses import replace
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prolip
import tokens as tokenizers
from prolip import (Config, Gaussian, ProLIP, csd, inclusion_loss, inclusion_test, mix, pairwise_loss, reweight_prompts,
                    vib)
from tools import (Letters, assert_batches_are_repeatable, assert_close, assert_images_are_normalised,
                   assert_two_processes_equal_one, lively, load_published, overfit, save_run, some_images, some_tokens)

SMALL = Config(image_size=24, patch_size=8, image_width=32, image_layers=2, image_heads=4, image_mlp=64, vocab_size=50,
               pad_id=0, end_id=2, mask_id=3, context_length=10, text_width=24, text_layers=2, text_heads=4,
               text_mlp=48, embed_dim=16)
# weights and a hinge so gentle that every term of the loss counts
GENTLE = replace(SMALL, image_in_text=0.3, original_in_masked=0.7, vib=0.2, inclusion_eps=-2.0, inclusion_scale=3.0)


def small(config=SMALL, **changes):
    torch.manual_seed(0)
    return ProLIP(replace(config, **changes)).eval()


def gentle():
    """A lively model in whose loss every term and every pair counts: no sigmoid is near its end."""
    model = lively(small(GENTLE, log_var=-3.0, logit_bias=3.0))
    with torch.no_grad():
        model.logit_scale.fill_(1.0)
    return model


def some_batch(n, *masked):
    """What forward needs for n pictures, of which those in `masked` have a masked copy; pictures in float64."""
    generator = torch.Generator().manual_seed(3)
    tokens = some_tokens(*(4 + i % 6 for i in range(n)))
    hidden = (torch.rand(tokens.shape, generator=generator) < 0.6) & (tokens > 2)
    kept = torch.stack([torch.randperm(9, generator=generator)[:6].sort().values for _ in range(n)])
    return {"images": torch.randn(n, 3, 24, 24, dtype=torch.float64, generator=generator), "tokens": tokens,
            "masked": torch.tensor([i in masked for i in range(n)]), "masked_tokens": tokens.masked_fill(hidden, 3),
            "kept_patches": kept}


def some_gaussians(n, width=5, seed=0, log_var=-2.0):
    generator = torch.Generator().manual_seed(seed)
    mean, noise = torch.randn(2, n, width, dtype=torch.float64, generator=generator)
    return Gaussian(F.normalize(mean, dim=-1), log_var + noise)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# --- the similarity of two Gaussians ---

def test_csd_equals_a_slow_loop():
    one, other = some_gaussians(3, seed=1), some_gaussians(4, seed=2)
    one = Gaussian(1.5 * one.mean, one.log_var)  # the formula does not need means of length 1
    found = csd(one, other)
    assert found.shape == (3, 4)
    for i, j in itertools.product(range(3), range(4)):
        expected = sum(float(one.mean[i, e] * other.mean[j, e])
                       - (math.exp(one.log_var[i, e]) + math.exp(other.log_var[j, e])) / 2 for e in range(5))
        assert found[i, j].item() == pytest.approx(expected, abs=1e-13)


def test_csd_is_a_sampled_distance():
    """1 - half the mean squared distance of samples; 100,000 of them give the mean to about 0.005."""
    one, other = some_gaussians(1, seed=1), some_gaussians(1, seed=2)
    noise = torch.randn(2, 100_000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = (x.mean + n * (x.log_var / 2).exp() for x, n in zip((one, other), noise))
    found = csd(one, other).item()
    assert found == pytest.approx(1 - (a - b).square().sum(dim=1).mean().item() / 2, abs=0.02)
    assert (one.mean @ other.mean.T).item() > found + 0.2  # the cosine is something else


def test_uncertainty_is_the_sum_of_the_variances():
    x = Gaussian(torch.zeros(2, 3), torch.tensor([[0.0, math.log(2), math.log(3)], [-10.0, -10.0, -10.0]]))
    assert x.uncertainty.tolist() == pytest.approx([6.0, 3 * math.exp(-10)], rel=1e-6)


# --- PPCL ---

def broadcast_loss(image, text, scale, bias):
    """The published form: tables of (B, B, E), and squared distances in place of cosines."""
    distance = (image.mean[:, None] - text.mean[None]) ** 2
    variance = image.log_var.exp()[:, None] + text.log_var.exp()[None]
    logits = scale * (1 - (distance + variance).sum(dim=-1) / 2) + bias
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return torch.log1p(torch.exp(-labels * logits)).sum() / len(logits)


def test_without_variance_it_is_siglips_loss():
    (a, v), (b, _) = some_gaussians(7, seed=1), some_gaussians(7, seed=2)
    narrow = torch.full_like(v, -32.0)
    siglip = -F.logsigmoid((2 * torch.eye(7) - 1) * (4 * a @ b.T - 3)).sum() / 7
    found = pairwise_loss(Gaussian(a, narrow), Gaussian(b, narrow), torch.tensor(4.0), torch.tensor(-3.0))
    assert found.item() == pytest.approx(siglip.item(), abs=1e-12)
    assert pairwise_loss(Gaussian(a, v), Gaussian(b, narrow), torch.tensor(4.0), torch.tensor(-3.0)) - found > 0.01


def test_pairwise_loss_of_two_pairs_by_hand():
    image = Gaussian(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.1, 0.3], [0.2, 0.2]]).log())
    text = Gaussian(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.5, 0.1], [0.1, 0.1]]).log())
    # sums of variances: 0.4, 0.4 and 0.6, 0.2; CSD: [[1 - 0.5, 0.6 - 0.3], [0 - 0.5, 0.8 - 0.3]]; at scale 2, bias -1
    # the logits are [[0, -0.4], [-2, 0]]
    expected = -(math.log(sigmoid(0)) + math.log(sigmoid(0.4)) + math.log(sigmoid(2)) + math.log(sigmoid(0))) / 2
    assert pairwise_loss(image, text, torch.tensor(2.0), torch.tensor(-1.0)).item() == pytest.approx(expected, rel=1e-6)


def losses_of(image, text):
    """Every number that is made of Gaussians, at settings where it is neither zero nor huge."""
    return {"pairwise": pairwise_loss(image, text, torch.tensor(50.0), torch.tensor(-10.0)),
            "inclusion": inclusion_loss(image, text, -2.0, 10.0), "vib": vib(image), "sum": image.uncertainty,
            "similarity": small().similarity(image, text), "classify": small().classify(image, text)}


def test_losses_are_computed_in_fp32_under_autocast_and_from_half_precision():
    half = [Gaussian(*(x.bfloat16() for x in some_gaussians(16, 32, seed, log_var=-6.0))) for seed in (1, 2)]
    single = [Gaussian(*(x.float() for x in features)) for features in half]
    plain = losses_of(*single)
    with torch.autocast("cpu", torch.bfloat16):
        for found in (losses_of(*single), losses_of(*half)):
            for name in plain:
                assert found[name].dtype == torch.float32 and torch.equal(found[name], plain[name]), name


# --- inclusion ---

def published_test(first, second, eps):
    """As the published code has it: quotients of sums of 1 / sigma^2, each times exp(eps)."""
    (mu1, v1), (mu2, v2) = first, second
    i1, i2 = (eps - v1).exp(), (eps - v2).exp()
    a, b, c = i1 + i2 / 2, 2 * mu1 * i1 + mu2 * i2, mu1 ** 2 * i1 + mu2 ** 2 * i2 / 2
    return -2 * v1 - v2 - a.log() / 2 + b ** 2 / (4 * a) - c


@pytest.mark.parametrize("eps", [0.0, -2.0, -20.0])
def test_inclusion_test_equals_the_published_formula(eps):
    first, second = some_gaussians(50, 8, seed=1, log_var=0), some_gaussians(50, 8, seed=2, log_var=1)
    found = inclusion_test(first, second, eps)
    torch.testing.assert_close(found, published_test(first, second, eps), rtol=1e-12, atol=1e-12)
    moved = Gaussian(first.mean + 1, first.log_var)
    assert ((inclusion_test(moved, second, eps) - found).abs().max() > 0.1) == (eps > -10)  # the weight of the means


def log_integral(first, second):
    """ln of the integral of p1^2 p2 by the trapezoidal rule, which is nearly exact for such functions."""
    (mu1, v1), (mu2, v2) = first, second
    grid = torch.linspace(-60, 60, 60_001, dtype=torch.float64)

    def density(mu, v):
        return torch.exp(-(grid - mu) ** 2 / (2 * math.exp(v))) / math.sqrt(2 * math.pi * math.exp(v))
    return math.log(torch.trapezoid(density(mu1, v1) ** 2 * density(mu2, v2), grid).item())


@pytest.mark.parametrize("mu1, v1, mu2, v2", [(0.5, -1.0, -0.3, 1.5), (-1.0, 2.0, 1.0, -2.0), (2.0, 1.0, -2.0, 3.0)])
def test_inclusion_test_is_the_integral_with_twice_the_prefactor(mu1, v1, mu2, v2):
    first, second = (Gaussian(*torch.tensor(x, dtype=torch.float64)) for x in ((mu1, v1), (mu2, v2)))
    there, back = log_integral(first, second), log_integral(second, first)
    constant = math.log(math.pi) / 2 - 1.5 * math.log(2 * math.pi)
    assert there == pytest.approx(inclusion_test(first, second).item() + v1 + v2 / 2 + constant, abs=1e-9)
    difference = inclusion_test(first, second) - inclusion_test(second, first)
    assert difference.item() == pytest.approx(there - back + (v2 - v1) / 2, abs=1e-9)


@pytest.mark.parametrize("eps", [0.0, -20.0, -100.0])
def test_inclusion_tells_which_is_the_wider_wherever_the_means_lie_and_stays_finite(eps):
    first, second = some_gaussians(200, 8, seed=1, log_var=0), some_gaussians(200, 8, seed=2, log_var=0.5)
    first = Gaussian(20 * first.mean, first.log_var)
    h = inclusion_test(first, second, eps) - inclusion_test(second, first, eps)
    assert ((h > 0) == (second.log_var > first.log_var)).all()
    v1, v2 = (torch.tensor(v).requires_grad_() for v in zip(*itertools.product((-30.0, 0.0, 30.0), repeat=2)))
    mu1, mu2 = torch.full((9,), -0.7).requires_grad_(), torch.full((9,), 0.7).requires_grad_()
    loss = inclusion_loss(Gaussian(mu1[None], v1[None]), Gaussian(mu2[None], v2[None]), eps, 10.0)
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    for gradient in torch.autograd.grad(loss.sum(), (mu1, v1, mu2, v2)):
        assert gradient.isfinite().all()


def test_inclusion_loss_is_a_mean_over_dimensions_of_each_row():
    first, second = some_gaussians(4, 3, seed=1, log_var=0), some_gaussians(4, 3, seed=2, log_var=0)
    h = published_test(first, second, -1.0) - published_test(second, first, -1.0)
    expected = [sum(-math.log(sigmoid(2 * x)) for x in row) / 3 for row in h.tolist()]
    assert inclusion_loss(first, second, -1.0, 2.0).tolist() == pytest.approx(expected, rel=1e-10)


def test_inclusion_loss_is_a_hinge():
    narrow = Gaussian(torch.full((1, 4), 0.5), torch.full((1, 4), -6.0))
    wide = Gaussian(torch.full((1, 4), -0.5), torch.full((1, 4), -5.0))
    assert inclusion_loss(narrow, wide).item() == 0
    assert inclusion_loss(wide, narrow).item() == pytest.approx(844.7, abs=0.2)
    assert inclusion_loss(narrow, narrow).item() == pytest.approx(math.log(2), rel=1e-4)


# --- VIB ---

def test_vib_by_hand():
    x = Gaussian(torch.tensor([[1.0, 0.0], [0.5, -2.0]]), torch.tensor([[0.0, 2.0], [-4.0, 0.0]]))
    terms = [1 + 0 - 1 - 1, 1 + 1 - 0 - math.e, 1 - 2 - 0.25 - math.exp(-2), 1 + 0 - 4 - 1]
    assert vib(x).item() == pytest.approx(-0.5 * sum(terms) / 4, rel=1e-6)


# --- what the towers see ---

@torch.no_grad()
def test_only_the_kept_patches_are_looked_at_and_pictures_do_not_mix():
    model, images = lively(small()), torch.randn(2, 3, 24, 24, dtype=torch.float64)
    keep = torch.tensor([[0, 2, 3, 4, 7, 8], [1, 3, 5, 6, 7, 8]])
    features = model.encode_image(images, keep)
    for row, patch in itertools.product(range(2), range(9)):
        changed = images.clone()
        changed[row, :, 8 * (patch // 3):, 8 * (patch % 3):][:, :8, :8] += 1
        for found, expected in zip(model.encode_image(changed, keep), features):
            difference = (found - expected).abs().amax(dim=1)
            assert (difference[row] > 1e-4) == (patch in keep[row].tolist())
            assert difference[1 - row] < 1e-12


@torch.no_grad()
def test_a_text_is_seen_whole_and_its_padding_too():
    model, tokens = lively(small()), some_tokens(6)
    for place in range(10):
        changed = tokens.clone()
        changed[0, place] = 40
        for found, expected in zip(model.encode_text(changed), model.encode_text(tokens)):
            assert (found - expected).abs().max() > 1e-4


# --- precision, limits, initial values ---

@pytest.mark.parametrize("how", ["autocast", "weights"])
@torch.no_grad()
def test_in_bf16_means_have_length_one_and_variances_full_precision(monkeypatch, how):
    model, seen, head, tokens = small(GENTLE), [], prolip.variance_head, some_tokens(4, 7, 5)
    exact, losses = [*model.encode_image(some_images(3)), *model.encode_text(tokens)], model(some_images(3), tokens)
    model = model.bfloat16() if how == "weights" else model
    monkeypatch.setattr(prolip, "variance_head", lambda *args: seen.append((*args, head(*args))) or seen[-1][-1])
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        rough = [*model.encode_image(some_images(3)), *model.encode_text(tokens)]
        for name, loss in model(some_images(3), tokens).items():
            assert loss.item() == pytest.approx(losses[name].item(), rel=0.1) and loss.dtype == torch.float32
    for (mean, log_var), fine, (layer, x, output) in zip((rough[:2], rough[2:]), (exact[:2], exact[2:]), seen):
        assert {mean.dtype, log_var.dtype, output.dtype} == {torch.float32}
        torch.testing.assert_close(mean.norm(dim=1), torch.ones(3))
        assert torch.equal(output, F.linear(x.float(), layer.weight.float(), layer.bias.float()))
        assert (log_var != log_var.bfloat16().float()).float().mean() > 0.9  # finer than the steps of bf16
        assert (mean * fine[0]).sum(dim=1).min() > 0.995 and (log_var - fine[1]).abs().max() < 0.2


@torch.no_grad()
def test_log_variances_are_kept_within_30():
    model = small()
    for head in (model.image_encoder.uncertainty_proj, model.text_encoder.text_uncertainty_projection):
        head.bias[:8], head.bias[8:] = 100.0, -100.0
    for features in (model.encode_image(some_images(2)), model.encode_text(some_tokens(4, 7))):
        assert (features.log_var[:, :8] == 30).all() and (features.log_var[:, 8:] == -30).all()


@pytest.mark.parametrize("bias, log_var", [(-10.0, -10.0), (-3.0, -5.0)])
@torch.no_grad()
def test_the_first_loss_and_the_first_variances(bias, log_var):
    model = small(logit_bias=bias, log_var=log_var)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07)) and model.logit_bias.item() == bias
    for features in (model.encode_image(some_images(8)), model.encode_text(some_tokens(*range(3, 11)))):
        assert features.log_var.mean().item() == pytest.approx(log_var, abs=0.5) and features.log_var.std() < 2
    model.logit_scale.fill_(-9.0)  # without the scale, similarities hardly count: the bias calls every pair wrong
    expected = math.log(1 + math.exp(-bias)) + 7 * math.log(1 + math.exp(bias))
    losses = model(some_images(8), some_tokens(*range(3, 11)))
    assert losses["ppcl"].item() == pytest.approx(expected, abs=1e-2)


def test_the_initialisation():
    width, layers = 256, 6
    model = small(image_size=96, image_width=192, image_heads=3, image_mlp=768, vocab_size=2000, context_length=77,
                  text_width=width, text_layers=layers, text_mlp=4 * width, embed_dim=128)
    text, image = model.text_encoder, model.image_encoder
    expected = [(text.token_embedding.weight, 0.02), (text.positional_embedding, 0.01),
                (text.text_projection.weight, 1 / 16), (text.text_uncertainty_projection.weight, 128 ** -0.5),
                *((x, 192 ** -0.5) for x in (image.positional_embedding, image.proj, image.uncertainty_proj.weight))]
    for block in text.blocks:
        expected += [(block.attn.in_proj.weight, 1 / 16), (block.mlp.c_fc.weight, (2 * width) ** -0.5),
                     *((x.weight, (2 * layers * width) ** -0.5) for x in (block.attn.out_proj, block.mlp.c_proj))]
    for tensor, std in expected:
        assert tensor.std().item() == pytest.approx(std, rel=0.03) and abs(tensor.mean().item()) < 0.05 * std
    for tower, std in ((text, 0.01), (image, 192 ** -0.5)):
        for token in (tower.class_embedding, tower.unc_embedding):
            assert token.std().item() == pytest.approx(std, rel=0.2)
    assert {m.eps for m in image.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {m.eps for m in text.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


# --- similarity, classes ---

@torch.no_grad()
def test_a_querys_vagueness_moves_no_ranking_but_the_candidates_does():
    image, text, model = some_gaussians(4, seed=1), some_gaussians(6, seed=2), gentle()
    vague = Gaussian(image.mean, image.log_var + torch.arange(4)[:, None])
    before, after = model.similarity(image, text), model.similarity(vague, text)
    assert torch.equal(before.argsort(dim=1), after.argsort(dim=1)) and (before - after)[3].min() > 1
    wider = Gaussian(text.mean, text.log_var + torch.tensor([0, 0, 3.0, 0, 0, 0])[:, None])
    assert (before.argmax(dim=1) == 2).any() and (model.similarity(image, wider).argmin(dim=1) == 2).all()
    cosines = F.cosine_similarity(image.mean[:, None], text.mean[None], dim=-1)
    for own, other in itertools.product((image, vague), (text, wider)):  # vague labels are no worse
        assert_close(model.classify(own, other), cosines)
    images, tokens = some_batch(3)["images"], some_tokens(4, 7)
    similarities = csd(model.encode_image(images), model.encode_text(tokens))
    assert_close(model.logits(images, tokens), math.e * similarities + model.logit_bias)


# --- the terms of the loss ---

def expected_terms(model, batch):
    """Every term anew from the features, by the published formulas, one sample at a time."""
    config, found = model.config, {}
    image, text = model.encode_image(batch["images"]), model.encode_text(batch["tokens"])
    masked_image = model.encode_image(batch["images"], batch["kept_patches"])
    masked_text = model.encode_text(batch["masked_tokens"])

    def inclusion(first, second, rows):
        values = []
        for i in rows:
            one, other = (Gaussian(x.mean[i], x.log_var[i]) for x in (first, second))
            h = published_test(one, other, config.inclusion_eps) - published_test(other, one, config.inclusion_eps)
            values.append(-F.logsigmoid(config.inclusion_scale * h).mean())
        return sum(values) / len(values)
    rows = batch["masked"].nonzero()[:, 0].tolist()
    found["ppcl"] = broadcast_loss(image, text, model.logit_scale.exp(), model.logit_bias)
    found["image_in_text"] = config.image_in_text * inclusion(image, text, range(len(batch["images"])))
    found["image_in_masked"] = config.original_in_masked * inclusion(image, masked_image, rows)
    found["text_in_masked"] = config.original_in_masked * inclusion(text, masked_text, rows)
    found["vib"] = config.vib * sum(
        -0.5 * (1 + v / 2 - mu ** 2 - (v / 2).exp()).mean() for mu, v in (image, text))
    return found


@pytest.mark.parametrize("masked", [(1, 4), (0, 1, 2, 3, 4, 5)])
def test_every_term_equals_the_published_formulas(masked):
    model, batch = gentle(), some_batch(6, *masked)
    losses, expected = model(**batch), expected_terms(model, batch)
    assert set(expected) == set(losses) - {"loss"}
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-10), name
        assert losses[name].item() > 1e-2, name
        gradients = (torch.autograd.grad(loss, model.parameters(), retain_graph=True, materialize_grads=True)
                     for loss in (losses[name], value))
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-9 * theirs.norm() + 1e-12, name
    assert losses["loss"].item() == pytest.approx(sum(value.item() for value in expected.values()), rel=1e-12)


def test_without_masked_rows():
    model, batch, sizes = gentle(), some_batch(4), []
    for tower in (model.image_encoder, model.text_encoder):
        tower.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    losses = model(**batch)
    assert len(sizes) == 4 and min(sizes) > 0  # on a GPU, attention over an empty batch may fail
    assert losses["image_in_masked"].item() == losses["text_in_masked"].item() == 0
    short = model(batch["images"], batch["tokens"])
    assert set(short) == {"loss", "ppcl", "image_in_text", "vib"} and torch.equal(short["loss"], losses["loss"])
    gradients = [torch.autograd.grad(x["loss"], model.parameters()) for x in (losses, short)]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_every_parameter_gets_a_gradient_and_one_batch_overfits():
    model, batch = small(), some_batch(8, 2, 5) | {"images": some_images(8)}
    first, last = overfit(model, batch, steps=60, lr=2e-3)
    with torch.no_grad():
        table = model.similarity(model.encode_image(batch["images"]), model.encode_text(batch["tokens"]))
    assert last["ppcl"] < first["ppcl"] / 10
    assert (table.argmax(dim=1) == torch.arange(8)).all() and (table.argmax(dim=0) == torch.arange(8)).all()


def test_two_processes_equal_one(tmp_path):
    """With masked copies in both halves of the batch, more of them in one of the halves, none in one, and none."""
    batches = [some_batch(6, *masked) for masked in ((0, 5), (0, 1, 2, 4), (0, 2), ())]
    assert_two_processes_equal_one(prolip, gentle(), batches, tmp_path)


# --- texts, captions, what is masked ---

def test_layout_cuts_and_keeps_the_end():
    model = small(context_length=6)
    assert model.tokenize(["", "ab"], Letters()).tolist() == [[1, 2, 0, 0, 0, 0], [1, 4, 5, 2, 0, 0]]
    with pytest.warns(UserWarning, match=r"more than 4 tokens are cut to that \(1 of 2 here\)"):
        tokens = model.tokenize(["abcdefgh", "a"], Letters())
    assert tokens.dtype == torch.long and tokens.tolist() == [[1, 4, 5, 6, 7, 2], [1, 4, 2, 0, 0, 0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # four pieces are not too many
        assert torch.equal(tokens[:1], model.tokenize("abcd", Letters()))


def test_layout_with_the_tokenizer_of_the_published_models():
    unigram = tokenizers.Unigram([["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁a", -2], ["▁dog", -3], ["s", -3]])
    model = small(pad_id=1, end_id=1, context_length=5)
    tokens = model.tokenize(["A dog!", "dogs", ""], unigram)
    assert tokens.tolist() == [[3, 4, 1, 1, 1], [4, 5, 1, 1, 1], [1, 1, 1, 1, 1]]  # without a start
    with pytest.warns(UserWarning, match=r"more than 4 tokens are cut to that \(1 of 1 here\)"):
        assert model.tokenize(["a dog a dogs"], unigram).tolist() == [[3, 4, 3, 4, 1]]


def some_samples(n):
    """Two captions for each of n pictures, all different."""
    return [SimpleNamespace(captions=[letter + "abcde"[:1 + i % 5] for letter in "xy"]) for i in range(n)]


def drawn(model, n):
    return model.text_batch(some_samples(n), [random.Random(i) for i in range(n)], Letters())


def test_a_batch_is_the_same_again_and_however_it_is_split():
    whole = assert_batches_are_repeatable(small(masked_share=0.5), some_samples(16))
    assert set(whole) == {"tokens", "masked", "masked_tokens", "kept_patches"}


def test_what_is_masked():
    n, model = 4000, small(context_length=8)
    batch = drawn(model, n)
    tokens, masked, copies, kept = (batch[name] for name in ("tokens", "masked", "masked_tokens", "kept_patches"))
    texts = [Letters().decode(row[row > 2].tolist()) for row in tokens]
    assert all(text in sample.captions for text, sample in zip(texts, some_samples(n)))
    assert sum(text[0] == "x" for text in texts) == pytest.approx(n / 2, abs=0.04 * n)  # one of the two, by chance
    assert masked.dtype == torch.bool and masked.float().mean().item() == pytest.approx(1 / 8, abs=0.02)  # 4 deviations
    assert torch.equal(tokens[~masked], copies[~masked])  # the others have no masked copy
    tokens, copies, kept = tokens[masked], copies[masked], kept[masked]
    changed, words = tokens != copies, tokens > 3
    assert (copies[changed] == SMALL.mask_id).all() and not (tokens == SMALL.mask_id).any()
    assert not changed[(tokens == 0) | (tokens == 2)].any()  # padding and ends stay
    lengths, shares = words.sum(dim=1), (changed & words).sum(dim=1)
    assert (shares < lengths).any() and (shares == lengths).any() and (shares == 0).any()  # word by word
    for i in range(1, 4):  # whatever the place
        assert changed[words[:, i], i].float().mean().item() == pytest.approx(0.75, abs=0.09)
    assert kept.shape == (len(tokens), 6) and (kept.diff(dim=1) > 0).all()  # in order, none twice
    share = torch.bincount(kept.flatten(), minlength=9) / len(kept)
    assert (share - 6 / 9).abs().max() < 0.09 and len(kept.unique(dim=0)) > 60  # of 84 ways


@pytest.mark.parametrize("changes, patches, share", [(dict(keep_patches=0.5, mask_text=0.2), 4, 0.2),
                                                     (dict(image_size=32, patch_size=4), 48, 0.75)])
def test_how_much_is_masked_is_configured(changes, patches, share):
    model = small(masked_share=1.0, **changes)
    batch = drawn(model, 500)
    assert batch["masked"].all() and batch["kept_patches"].shape == (500, patches)
    assert batch["kept_patches"].max() == (model.config.image_size // model.config.patch_size) ** 2 - 1
    hidden = (batch["masked_tokens"] == 3)[batch["tokens"] > 3]
    assert hidden.float().mean().item() == pytest.approx(share, abs=0.05)
    assert not drawn(small(masked_share=0.0), 50)["masked"].any()


def test_pixels_equal_normalised_floats_and_wrong_arguments_are_named():
    model = small()
    assert_images_are_normalised(model, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    for shape in ((10,), (1, 7), (2, 12)):
        with pytest.raises(ValueError, match=r"tokens must be \(B, 10\), as tokenize makes them, got \("):
            model.encode_text(torch.full(shape, 2))
    with pytest.raises(ValueError, match="3 images and 2 captions; expected one caption for each image"):
        model(some_images(3), some_tokens(4, 5))


# --- prompts ---

def slow_weights(image, prompts, noise, alpha, steps, floor):
    """Expectation and maximisation for one sample, one prompt and one dimension at a time."""
    (mean, log_var), (mu, v) = (tuple(x.numpy() for x in features) for features in (image, prompts))
    weights = prior = (1 / np.exp(v).mean(axis=1)) / (1 / np.exp(v).mean(axis=1)).sum()
    for _ in range(steps):
        counts = alpha * len(mu) * prior
        for x in (mean + np.exp(log_var / 2) * noise.numpy()).reshape(-1, mu.shape[1]):
            densities = np.array([
                weight * math.prod(NormalDist(m, math.sqrt(math.exp(t) + floor)).pdf(a) for a, m, t in zip(x, *prompt))
                for weight, *prompt in zip(weights, mu, v)])
            counts = counts + densities / densities.sum()
        weights = counts / counts.sum()
    return weights.tolist()


@pytest.mark.parametrize("options", [{}, dict(alpha=0.5, draws=7, steps=3, floor=0.1)])
def test_weights_of_prompts_equal_a_slow_loop(options):
    image, prompts = some_gaussians(3, 4, seed=1, log_var=-1), some_gaussians(5, 4, seed=2, log_var=-1)
    values = dict(alpha=2.0, draws=20, steps=10, floor=0.02) | options
    noise = torch.randn(values.pop("draws"), 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = reweight_prompts(image, prompts, **options, generator=torch.Generator().manual_seed(5))
    assert found.tolist() == pytest.approx(slow_weights(image, prompts, noise, **values), rel=1e-9)
    assert found.sum().item() == pytest.approx(1, abs=1e-12) and found.max() - found.min() > 0.1


def test_a_class_mixed_of_its_prompts_by_hand():
    prompts = Gaussian(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0, 1.0], [8.0, 16.0]]).log())
    mixed = mix(prompts, torch.tensor([0.75, 0.25]))
    assert mixed.mean.tolist() == [[0.75, 0.25]]
    assert mixed.log_var.exp()[0].tolist() == pytest.approx([0.5625 * 4 + 0.0625 * 8, 0.5625 + 0.0625 * 16], rel=1e-6)


# --- published weights ---

@pytest.mark.parametrize("name, published, parameters", [
    ("vit-b-16", "ViT-B-16-ProLIP", 197_923_586), ("vit-b-16-long", "ViT-B-16-ProLIP-long", 198_071_042),
    ("vit-l-16", "ViT-L-16-ProLIP", 642_814_978), ("vit-so400m-14", "ViT-SO400M-14-ProLIP", 866_286_434),
    ("vit-h-14", "ViT-H-14-ProLIP", 988_478_466)])
def test_published_checkpoints_load_strictly_and_have_the_published_size(name, published, parameters):
    c, found = load_published(ProLIP, f"prolip/{published}", name)
    assert found == parameters  # and what shapes do not tell:
    assert c.image_size == (256 if name == "vit-l-16" else 224)
    words = (c.activation, c.pad_id, c.end_id, c.context_length)
    assert words == {"vit-h-14": ("quick_gelu", 0, 49407, 77), "vit-b-16-long": ("gelu", 1, 1, 256)}.get(
        name, ("gelu", 1, 1, 64))
    settings = dict(logit_bias=-10, log_var=-10, image_in_text=1e-7, original_in_masked=1e-3, vib=1e-4,
                    inclusion_eps=-20, inclusion_scale=1000, masked_share=1 / 8, mask_text=0.75, keep_patches=0.75,
                    mask_id=32000) | (dict(inclusion_eps=-100, inclusion_scale=10) if name == "vit-b-16-long" else {})
    assert {key: getattr(c, key) for key in settings} == settings


@pytest.mark.parametrize("old, new", [(30, 50), (64, 256)])
def test_positions_of_longer_texts(old, new):
    """The first 20 stay, and the last two, those of [UNC] and [CLS]; between them, straight lines."""
    table = torch.randn(old + 2, 24, generator=torch.Generator().manual_seed(0))
    state = small(context_length=old).state_dict() | {"text_encoder.positional_embedding": table}
    with pytest.warns(UserWarning, match=f"texts of {old} tokens, stretched to {new}"):
        model = ProLIP.from_pretrained(state, replace(SMALL, context_length=new))
    found = model.text_encoder.positional_embedding.detach()
    assert found.shape == (new + 2, 24)
    assert torch.equal(found[:20], table[:20]) and torch.equal(found[-2:], table[-2:])
    places = (np.arange(new - 20) + 0.5) * (old - 20) / (new - 20) - 0.5  # middles of cells; np.interp stays in range
    for channel in range(24):
        expected = np.interp(places, np.arange(old - 20), table[20:-2, channel].numpy())
        np.testing.assert_allclose(found[20:-2, channel].numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("old, new", [(30, 25), (20, 30), (12, 30)])
def test_other_positions_of_texts_are_refused(old, new):
    with pytest.raises(RuntimeError, match="size mismatch for text_encoder.positional_embedding"):
        ProLIP.from_pretrained(small(context_length=old).state_dict(), replace(SMALL, context_length=new))


# --- in use ---

@torch.no_grad()
def test_the_pipeline_and_the_command(tmp_path, monkeypatch, capsys):
    """Labels by the softmax of the means' scaled cosines, whatever the variances, and each label's own uncertainty."""
    model, scale = lively(small(vocab_size=260, log_var=-3.0)).float(), 3.0
    model.logit_scale.fill_(math.log(scale))
    checkpoint, picture, pixels = save_run(model, tmp_path)
    image, rows = model.encode_image(pixels), []
    for label in ("a cat", "a dog", "x"):  # each text by itself; before its first word, a space
        row = [1, *(4 + byte for byte in b" " + label.encode()), 2]
        text = model.encode_text(torch.tensor([row + [0] * (10 - len(row))]))
        cosine, vague = (image.mean * text.mean).sum().item(), text.log_var.exp().sum().item()
        rows.append((math.exp(scale * cosine), cosine, vague, label))
    whole = sum(row[0] for row in rows)
    rows = sorted(((share / whole, *rest) for share, *rest in rows), reverse=True)
    pipeline, labels = prolip.ZeroShotPipeline(checkpoint, "cpu"), ["a cat", "a dog", "x"]
    for (label, share), row in zip(pipeline.predict(picture, labels), rows, strict=True):
        assert label == row[3] and share == pytest.approx(row[0], abs=1e-5)
    assert pipeline.predict(picture, labels, top_k=2) == pipeline.predict(picture, labels)[:2]
    monkeypatch.setattr(sys, "argv", ["prolip.py", checkpoint, picture, *labels])
    runpy.run_path(prolip.__file__, run_name="__main__")
    for line, (*numbers, label) in zip(capsys.readouterr().out.splitlines(), rows, strict=True):
        share, _, cosine, _, vague, *words = line.split()
        assert [float(share[:-1]) / 100, float(cosine), float(vague)] == pytest.approx(numbers, abs=1e-3)
        assert " ".join(words) == label
