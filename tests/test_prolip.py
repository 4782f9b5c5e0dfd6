"""prolip.py: its losses against slow loops, integrals and the published formulas; its towers by hand; what is masked;
weights in the hub's form; and what it says of unfit input."""
import copy
import gzip
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import prolip
from prolip import (CONFIGS, PUBLISHED, Config, Gaussian, ProLIP, csd, inclusion_loss, inclusion_test, mix,
                    pairwise_loss, reweight_prompts, vib)

HERE = Path(__file__).parent
SMALL = Config(image_size=24, patch_size=8, image_width=32, image_layers=2, image_heads=4, image_mlp=64, vocab_size=50,
               pad_id=0, end_id=2, mask_id=3, context_length=10, text_width=24, text_layers=2, text_heads=4,
               text_mlp=48, embed_dim=16)
# weights and a hinge so gentle that every term of the loss is felt
GENTLE = replace(SMALL, image_in_text=0.3, original_in_masked=0.7, vib=0.2, inclusion_eps=-2.0, inclusion_scale=3.0)


def small(config=SMALL, **changes):
    torch.manual_seed(0)
    return ProLIP(replace(config, **changes)).eval()


def lively(config=SMALL, **changes):
    """In float64, with every parameter moved a little from its start, so that each bias and norm has an effect."""
    model = small(config, **changes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def felt():
    """A lively model in whose loss every term and every pair is felt: no sigmoid is near its end."""
    model = lively(GENTLE, log_var=-3.0, logit_bias=3.0)
    with torch.no_grad():
        model.logit_scale.fill_(1.0)
    return model


def some_tokens(*lengths, width=10):
    """Rows as `tokenize` lays them out: 1 at the start, 2 at the end, 0 behind it."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.zeros(len(lengths), width, dtype=torch.long)
    for i, n in enumerate(lengths):
        tokens[i, :n] = torch.randint(4, 50, (n,), generator=generator)
        tokens[i, 0], tokens[i, n - 1] = 1, 2
    return tokens


def some_images(n, size=24):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


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


class Words:
    """A tokenizer for tests: every letter is a piece."""
    pad_id, start_id, end_id = 0, 1, 2

    def encode(self, text):
        return [4 + ord(c) % 40 for c in text]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# --- the similarity of two Gaussians ---

def test_csd_equals_a_slow_loop():
    one, other = some_gaussians(3, seed=1), some_gaussians(4, seed=2)
    one = Gaussian(1.5 * one.mean, one.log_var)  # the formula itself asks for no length
    found = csd(one, other)
    for i, j in itertools.product(range(3), range(4)):
        expected = sum(float(one.mean[i, e] * other.mean[j, e])
                       - (math.exp(one.log_var[i, e]) + math.exp(other.log_var[j, e])) / 2 for e in range(5))
        assert found[i, j].item() == pytest.approx(expected, abs=1e-13)
    assert found.shape == (3, 4) and found.dtype == torch.float64


def test_csd_is_a_sampled_distance():
    """1 - half the mean squared distance of samples; of 100,000 of them the mean is known to about 0.005."""
    one, other = some_gaussians(3, seed=1), some_gaussians(2, seed=2)
    generator = torch.Generator().manual_seed(0)

    def draw(x):
        noise = torch.randn(100_000, *x.mean.shape, dtype=torch.float64, generator=generator)
        return x.mean + noise * (x.log_var / 2).exp()
    a, b = draw(one), draw(other)
    for i, j in itertools.product(range(3), range(2)):
        distance = (a[:, i] - b[:, j]).square().sum(dim=1).mean()
        assert csd(one, other)[i, j].item() == pytest.approx(1 - distance.item() / 2, abs=0.02)
    assert (one.mean @ other.mean.T - csd(one, other)).min() > 0.2  # the cosines alone would be far off


def test_uncertainty_is_the_sum_of_the_variances():
    x = Gaussian(torch.zeros(2, 3), torch.tensor([[0.0, math.log(2), math.log(3)], [-10.0, -10.0, -10.0]]))
    assert x.uncertainty.tolist() == pytest.approx([6.0, 3 * math.exp(-10)], rel=1e-6)
    assert Gaussian(x.mean.bfloat16(), x.log_var.bfloat16()).uncertainty.dtype == torch.float32
    assert Gaussian(x.mean.double(), x.log_var.double()).uncertainty.dtype == torch.float64


# --- PPCL ---

def broadcast_loss(image, text, scale, bias):
    """The published form: tables of (B, B, E), and squared distances in place of cosines."""
    distance = (image.mean[:, None] - text.mean[None]) ** 2
    variance = image.log_var.exp()[:, None] + text.log_var.exp()[None]
    logits = scale * (1 - (distance + variance).sum(dim=-1) / 2) + bias
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return torch.log1p(torch.exp(-labels * logits)).sum() / len(logits)


def test_pairwise_loss_and_its_gradients_equal_the_published_form():
    inputs = [some_gaussians(6, seed=1)[0] * 3, some_gaussians(6, seed=1)[1], some_gaussians(6, seed=2)[0] * 2,
              some_gaussians(6, seed=2)[1], torch.tensor(2.5, dtype=torch.float64), torch.tensor(-1.5).double()]
    results = []
    for form in (pairwise_loss, broadcast_loss):
        a, v, b, w, scale, bias = leaves = [x.clone().requires_grad_() for x in inputs]
        loss = form(Gaussian(F.normalize(a, dim=1), v), Gaussian(F.normalize(b, dim=1), w), scale, bias)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert theirs.abs().max() > 1e-2
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_without_variance_it_is_siglips_loss():
    (a, v), (b, _) = some_gaussians(7, seed=1), some_gaussians(7, seed=2)
    narrow = torch.full_like(v, -32.0)
    logits = 4 * a @ b.T - 3
    siglip = -F.logsigmoid((2 * torch.eye(7) - 1) * logits).sum() / 7
    found = pairwise_loss(Gaussian(a, narrow), Gaussian(b, narrow), torch.tensor(4.0), torch.tensor(-3.0))
    assert found.item() == pytest.approx(siglip.item(), abs=1e-12)
    assert pairwise_loss(Gaussian(a, v), Gaussian(b, narrow), torch.tensor(4.0), torch.tensor(-3.0)) - found > 0.01


def test_pairwise_loss_of_two_pairs_by_hand():
    image = Gaussian(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.1, 0.3], [0.2, 0.2]]).log())
    text = Gaussian(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.5, 0.1], [0.1, 0.1]]).log())
    # sums of variances: 0.4, 0.4 and 0.6, 0.2; CSD: [[1 - 0.5, 0.6 - 0.3], [0 - 0.5, 0.8 - 0.3]]; at scale 2, bias -1:
    logits = [[0.0, -0.4], [-2.0, 0.0]]
    expected = -(math.log(sigmoid(logits[0][0])) + math.log(sigmoid(-logits[0][1]))
                 + math.log(sigmoid(-logits[1][0])) + math.log(sigmoid(logits[1][1]))) / 2
    assert pairwise_loss(image, text, torch.tensor(2.0), torch.tensor(-1.0)).item() == pytest.approx(expected, rel=1e-6)


def losses_of(image, text):
    """Every number that is made of Gaussians, at settings where it is neither zero nor huge."""
    return {"pairwise": pairwise_loss(image, text, torch.tensor(50.0), torch.tensor(-10.0)),
            "inclusion": inclusion_loss(image, text, -2.0, 10.0), "vib": vib(image),
            "similarity": small().similarity(image, text), "classify": small().classify(image, text)}


def test_losses_are_computed_in_fp32_under_autocast_and_stay_float64():
    exact = some_gaussians(16, 32, seed=1, log_var=-6.0), some_gaussians(16, 32, seed=2, log_var=-6.0)
    single = [Gaussian(*(x.float() for x in features)) for features in exact]
    half = [Gaussian(*(x.bfloat16() for x in features)) for features in exact]
    back = [Gaussian(*(x.float() for x in features)) for features in half]
    with torch.autocast("cpu", torch.bfloat16):
        autocast, from_half = losses_of(*single), losses_of(*half)
    plain, from_back, double = losses_of(*single), losses_of(*back), losses_of(*exact)
    for name in plain:
        assert plain[name].dtype == torch.float32 and torch.equal(autocast[name], plain[name]), name
        assert torch.equal(from_half[name], from_back[name]), name
        assert double[name].dtype == torch.float64, name
        torch.testing.assert_close(double[name], plain[name].double(), rtol=1e-4, atol=1e-4)
        assert (double[name] - plain[name]).abs().max() > 0, name  # not merely fp32 in a wider type


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
    assert found.shape == (50, 8)
    torch.testing.assert_close(found, published_test(first, second, eps), rtol=1e-12, atol=1e-12)
    if eps == 0:
        assert torch.equal(found, inclusion_test(first, second))  # the default
    moved = Gaussian(first.mean + 1, first.log_var)
    assert ((inclusion_test(moved, second, eps) - found).abs().max() > 0.1) == (eps > -10)  # what a mean weighs


def log_integral(first, second):
    """ln of the integral of p1^2 p2 by the trapezoidal rule, which is all but exact for what falls off like this."""
    (mu1, v1), (mu2, v2) = first, second
    grid = torch.linspace(-60, 60, 60_001, dtype=torch.float64)

    def density(mu, v):
        return torch.exp(-(grid - mu) ** 2 / (2 * math.exp(v))) / math.sqrt(2 * math.pi * math.exp(v))
    return math.log(torch.trapezoid(density(mu1, v1) ** 2 * density(mu2, v2), grid).item())


@pytest.mark.parametrize("mu1, v1, mu2, v2", [(0.0, 0.0, 0.0, 0.0), (0.5, -1.0, -0.3, 1.5), (-1.0, 2.0, 1.0, -2.0),
                                              (0.2, -3.0, 0.3, -3.5), (2.0, 1.0, -2.0, 3.0)])
def test_inclusion_test_is_the_integral_with_twice_the_prefactor(mu1, v1, mu2, v2):
    first, second = (Gaussian(*torch.tensor(x, dtype=torch.float64)) for x in ((mu1, v1), (mu2, v2)))
    there, back = log_integral(first, second), log_integral(second, first)
    constant = math.log(math.pi) / 2 - 1.5 * math.log(2 * math.pi)
    assert there == pytest.approx(inclusion_test(first, second).item() + v1 + v2 / 2 + constant, abs=1e-9)
    difference = inclusion_test(first, second) - inclusion_test(second, first)
    assert difference.item() == pytest.approx(there - back + (v2 - v1) / 2, abs=1e-9)


@pytest.mark.parametrize("eps", [-10.0, -20.0, -100.0])
def test_at_a_low_eps_inclusion_compares_variances_alone(eps):
    mean, other = some_gaussians(2)[0]
    for v in (-12.0, -3.0, 0.0):
        narrow, wide = Gaussian(mean, torch.full_like(mean, v)), Gaussian(other, torch.full_like(mean, v + 1))
        h = inclusion_test(narrow, wide, eps) - inclusion_test(wide, narrow, eps)
        if v > -3 or eps < -10:
            torch.testing.assert_close(h, torch.full_like(h, 0.8447), rtol=0, atol=2e-4)


@pytest.mark.parametrize("eps", [0.0, -2.0, -20.0, -100.0])
def test_inclusion_tells_which_is_the_wider_wherever_the_means_lie(eps):
    first, second = some_gaussians(200, 8, seed=1, log_var=0), some_gaussians(200, 8, seed=2, log_var=0.5)
    first = Gaussian(20 * first.mean, first.log_var)
    h = inclusion_test(first, second, eps) - inclusion_test(second, first, eps)
    assert ((h > 0) == (second.log_var > first.log_var)).all()


@pytest.mark.parametrize("eps", [0.0, -20.0, -100.0])
def test_inclusion_of_the_narrowest_and_the_widest_is_finite(eps):
    v1, v2 = (torch.tensor(v).requires_grad_() for v in zip(*itertools.product((-30.0, 0.0, 30.0), repeat=2)))
    mu1, mu2 = torch.full((9,), -0.7).requires_grad_(), torch.full((9,), 0.7).requires_grad_()
    loss = inclusion_loss(Gaussian(mu1[None], v1[None]), Gaussian(mu2[None], v2[None]), eps, 10.0)
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    for gradient in torch.autograd.grad(loss.sum(), (mu1, v1, mu2, v2)):
        assert gradient.isfinite().all()


def test_inclusion_loss_is_a_mean_over_dimensions_of_each_row():
    first, second = some_gaussians(4, 3, seed=1, log_var=0), some_gaussians(4, 3, seed=2, log_var=0)
    found = inclusion_loss(first, second, -1.0, 2.0)
    h = published_test(first, second, -1.0) - published_test(second, first, -1.0)
    for i in range(4):
        expected = sum(-math.log(sigmoid(2 * h[i, e].item())) for e in range(3)) / 3
        assert found[i].item() == pytest.approx(expected, rel=1e-10)
    assert found.shape == (4,)


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


def test_vib_is_the_kl_of_a_gaussian_of_half_the_log_variance():
    def kl(mean, log_var):
        standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        own = torch.distributions.Normal(mean, (log_var / 2).exp())
        return torch.distributions.kl_divergence(own, standard).mean()
    mean, log_var = some_gaussians(6)
    torch.testing.assert_close(vib(Gaussian(mean, log_var)), kl(mean, log_var / 2), rtol=1e-12, atol=1e-12)
    assert (vib(Gaussian(mean, log_var)) - kl(mean, log_var)).abs() > 0.1  # which is not that of the Gaussian


# --- the image tower ---

def norm(x, layer, eps):
    """LayerNorm, by its definition."""
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


@pytest.mark.parametrize("keep", [None, [[0, 1, 4, 5, 7, 8], [1, 2, 3, 4, 5, 6]]], ids=["all", "some"])
def test_the_image_tower_step_by_step(keep):
    model, images = lively(), torch.randn(2, 3, 24, 24, dtype=torch.float64)
    tower, rows = model.image_encoder, []
    with torch.no_grad():
        for i in range(2):
            patches = [tower.conv1.weight.flatten(1) @ images[i, :, y:y + 8, x:x + 8].flatten()
                       for y in (0, 8, 16) for x in (0, 8, 16)]
            tokens = [tower.class_embedding, tower.unc_embedding, *patches]
            tokens = [token + position for token, position in zip(tokens, tower.positional_embedding, strict=True)]
            if keep is not None:
                tokens = tokens[:2] + [tokens[2 + k] for k in keep[i]]
            x = norm(torch.stack(tokens)[None], tower.ln_pre, 1e-5)
            for block in tower.blocks:
                x = x + block.attn(norm(x, block.ln_1, 1e-5))
                x = x + block.mlp(norm(x, block.ln_2, 1e-5))
            rows.append(norm(x[0, :2], tower.ln_post, 1e-5))
        states = torch.stack(rows)
        mean = norm(states[:, 0], tower.ln_post, 1e-5) @ tower.proj  # the norm a second time
        log_var = states[:, 1] @ tower.uncertainty_proj.weight.T + tower.uncertainty_proj.bias
        found = model.encode_image(images, None if keep is None else torch.tensor(keep))
    torch.testing.assert_close(found.mean, mean / mean.square().sum(dim=1, keepdim=True).sqrt(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.log_var, log_var, rtol=0, atol=1e-11)
    once = F.normalize(states[:, 0] @ tower.proj, dim=1)
    assert (found.mean - once).abs().max() > 1e-3  # here a single norm is something else


def test_all_patches_in_their_order_are_the_whole_picture():
    model, images = lively(), torch.randn(3, 3, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        whole, all_of_it = model.encode_image(images), model.encode_image(images, torch.arange(9).expand(3, 9))
        turned = model.encode_image(images, torch.arange(8, -1, -1).expand(3, 9))  # each takes its position with it
    for other in (all_of_it, turned):
        for found, expected in zip(other, whole):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_only_the_kept_patches_are_looked_at():
    model, images = lively(), torch.randn(2, 3, 24, 24, dtype=torch.float64)
    keep = torch.tensor([[0, 2, 3, 4, 7, 8], [1, 3, 5, 6, 7, 8]])
    with torch.no_grad():
        features = model.encode_image(images, keep)
        for row, patch in itertools.product(range(2), range(9)):
            changed = images.clone()
            changed[row, :, 8 * (patch // 3):, 8 * (patch % 3):][:, :8, :8] += 1
            for found, expected in zip(model.encode_image(changed, keep), features):
                difference = (found - expected).abs().amax(dim=1)
                assert (difference[row] > 1e-4) == (patch in keep[row].tolist())
                assert difference[1 - row] < 1e-12


def test_pictures_and_texts_of_a_batch_do_not_mix():
    model, images, tokens = lively(), torch.randn(3, 3, 24, 24, dtype=torch.float64), some_tokens(4, 7, 9)
    keep = torch.tensor([[0, 1, 2], [3, 5, 8], [2, 4, 6]])
    with torch.no_grad():
        for encode, inputs in ((model.encode_image, (images, keep)), (model.encode_text, (tokens,))):
            for i in range(3):
                alone = encode(*(x[i:i + 1] for x in inputs))
                for found, expected in zip(encode(*inputs), alone):
                    torch.testing.assert_close(found[i:i + 1], expected, rtol=0, atol=1e-11)


def test_pixels_equal_normalised_floats():
    model, images = small(), some_images(3)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        for found, expected in zip(model.encode_image(images), model.encode_image((images / 255 - mean) / std)):
            torch.testing.assert_close(found, expected)


# --- the text tower ---

def test_the_text_tower_step_by_step():
    model, tokens = lively(text_eps=1e-3), some_tokens(4, 7, 10)
    tower, rows = model.text_encoder, []
    with torch.no_grad():
        for row in tokens.tolist():
            x = [tower.token_embedding.weight[i] for i in row] + [tower.unc_embedding, tower.class_embedding]
            x = torch.stack([token + position for token, position in zip(x, tower.positional_embedding, strict=True)])
            x = x[None]
            for block in tower.blocks:
                x = x + block.attn(norm(x, block.ln_1, 1e-3))
                x = x + block.mlp(norm(x, block.ln_2, 1e-3))
            rows.append(norm(x[0, -1], tower.ln_final, 1e-3))
        mean = torch.stack(rows) @ tower.text_projection.weight.T + tower.text_projection.bias
        head = tower.text_uncertainty_projection
        log_var, found = mean @ head.weight.T + head.bias, model.encode_text(tokens)
    length = mean.square().sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(found.mean, mean / length, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.log_var, log_var, rtol=0, atol=1e-11)
    # from the mean before it has length 1
    assert (found.log_var - (mean / length @ head.weight.T + head.bias)).abs().max() > 1e-2


def test_a_text_is_seen_whole_and_its_padding_too():
    model, tokens = lively(), some_tokens(6)
    first = []
    model.text_encoder.blocks[0].register_forward_hook(lambda module, args, output: first.append(output))
    with torch.no_grad():
        features = model.encode_text(tokens)
        for place in range(10):
            changed = tokens.clone()
            changed[0, place] = 40
            for found, expected in zip(model.encode_text(changed), features):
                assert (found - expected).abs().max() > 1e-4
            states = (first[-1] - first[0]).abs().amax(dim=2)[0]
            assert states.shape == (12,) and states.min() > 1e-6  # the first word sees the last


# --- precision, limits, the start ---

def heads(model):
    return model.image_encoder.uncertainty_proj, model.text_encoder.text_uncertainty_projection


def test_means_have_length_one_and_variances_full_precision_even_under_autocast(monkeypatch):
    model, seen, head = small(), [], prolip.variance_head
    monkeypatch.setattr(prolip, "variance_head", lambda *args: seen.append((*args, head(*args))) or seen[-1][-1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = model.encode_image(some_images(3)), model.encode_text(some_tokens(4, 7, 5))
    assert [layer for layer, _, _ in seen] == list(heads(model))
    for (mean, log_var), (layer, x, output) in zip(features, seen):
        assert {mean.dtype, log_var.dtype, output.dtype} == {torch.float32}
        torch.testing.assert_close(mean.norm(dim=1), torch.ones(3))
        with torch.no_grad():
            assert torch.equal(output, F.linear(x.float(), layer.weight, layer.bias))
        assert (log_var != log_var.bfloat16().float()).float().mean() > 0.9  # finer than the steps of bf16
    with torch.no_grad():
        exact = model.encode_image(some_images(3)), model.encode_text(some_tokens(4, 7, 5))
    for rough, fine in zip(features, exact):
        assert (rough.mean * fine.mean).sum(dim=1).min() > 0.999
        assert (rough.log_var - fine.log_var).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_encodes(dtype):
    """All of it, as for inference, not by autocast."""
    model = small()
    with torch.no_grad():
        exact = model.encode_image(some_images(3)), model.encode_text(some_tokens(4, 7, 5))
        model = model.to(dtype)
        rough = model.encode_image(some_images(3)), model.encode_text(some_tokens(4, 7, 5))
    for one, other in zip(rough, exact):
        assert {one.mean.dtype, one.log_var.dtype} == {torch.float32}
        assert (one.mean * other.mean).sum(dim=1).min() > 0.995
        assert (one.log_var - other.log_var).abs().max() < 0.2


def test_log_variances_are_kept_within_30():
    model = small()
    with torch.no_grad():
        for head in heads(model):
            head.bias[:8], head.bias[8:] = 100.0, -100.0
        for features in (model.encode_image(some_images(2)), model.encode_text(some_tokens(4, 7))):
            assert (features.log_var[:, :8] == 30).all() and (features.log_var[:, 8:] == -30).all()


def test_the_values_at_birth():
    model = small()
    assert model.logit_scale.item() == pytest.approx(2.6592, abs=1e-4) and model.logit_bias.item() == -10
    with torch.no_grad():
        for features in (model.encode_image(some_images(8)), model.encode_text(some_tokens(*range(3, 11)))):
            assert features.log_var.mean().item() == pytest.approx(-10, abs=0.5)
            assert features.log_var.std() < 2
        losses = model(some_images(8), some_tokens(*range(3, 11)))
    # every pair is called wrong, with no more than cosines of +-1/2 at a scale of 14
    expected = math.log(1 + math.exp(10)) + 7 * math.log(1 + math.exp(-10))
    assert losses["ppcl"].item() == pytest.approx(expected, abs=7.5)
    other = small(logit_bias=-3.0, log_var=-5.0)
    assert other.logit_bias.item() == -3
    with torch.no_grad():
        assert other.encode_image(some_images(8)).log_var.mean().item() == pytest.approx(-5, abs=0.5)
        assert other.encode_text(some_tokens(4, 5)).log_var.mean().item() == pytest.approx(-5, abs=0.5)


def test_the_initialisation():
    torch.manual_seed(0)
    width, layers = 256, 6
    config = Config(image_size=96, patch_size=8, image_width=192, image_layers=2, image_heads=3, image_mlp=768,
                    vocab_size=2000, context_length=77, text_width=width, text_layers=layers, text_heads=4,
                    text_mlp=4 * width, embed_dim=128)
    model = ProLIP(config)
    text, image = model.text_encoder, model.image_encoder

    def check(tensor, std):
        assert tensor.std().item() == pytest.approx(std, rel=0.03)
        assert abs(tensor.mean().item()) < 0.05 * std
    check(text.token_embedding.weight, 0.02)
    check(text.positional_embedding, 0.01)
    for block in text.blocks:
        check(block.attn.in_proj.weight, width ** -0.5)
        check(block.attn.out_proj.weight, width ** -0.5 * (2 * layers) ** -0.5)
        check(block.mlp.c_fc.weight, (2 * width) ** -0.5)
        check(block.mlp.c_proj.weight, width ** -0.5 * (2 * layers) ** -0.5)
    for head, bias in ((text.text_projection, 0), (text.text_uncertainty_projection, -10)):
        check(head.weight, head.in_features ** -0.5)
        assert (head.bias == bias).all()
    assert (text.text_projection.in_features, text.text_uncertainty_projection.in_features) == (256, 128)
    check(image.positional_embedding, 192 ** -0.5)
    check(image.proj, 192 ** -0.5)
    check(image.uncertainty_proj.weight, 192 ** -0.5)
    assert (image.uncertainty_proj.bias == -10).all()
    for tower, std in ((text, 0.01), (image, 192 ** -0.5)):
        for token in (tower.class_embedding, tower.unc_embedding):
            assert token.std().item() == pytest.approx(std, rel=0.2)
    assert {m.eps for m in image.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {m.eps for m in text.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_head_start_leaves_the_two_special_positions_alone():
    plain, tiny = small(image_width=64), small(image_width=64, head_start=True)
    before, after = (model.image_encoder.positional_embedding for model in (plain, tiny))
    assert torch.equal(before[:2], after[:2]) and (before[2:] != after[2:]).all()
    ones = torch.ones(1)  # the first patch lies at place 0: sines of 0, cosines of 1
    assert torch.equal(after[2, [0, 16, 32, 48]], torch.cat([0 * ones, ones, 0 * ones, ones]))
    white = tiny.image_encoder.conv1(torch.ones(1, 3, 24, 24)).abs().amax(dim=(0, 2, 3))
    assert white[:48].max() < 1e-4 < 1e-2 < white[48:].mean()
    assert torch.equal(plain.text_encoder.positional_embedding, tiny.text_encoder.positional_embedding)


# --- similarity, classes ---

def test_an_images_vagueness_moves_no_ranking_of_texts_but_texts_own_does():
    image, text = some_gaussians(4, seed=1), some_gaussians(6, seed=2)
    vague = Gaussian(image.mean, image.log_var + torch.arange(4)[:, None])
    model = small()
    before, after = model.similarity(image, text), model.similarity(vague, text)
    assert torch.equal(before.argsort(dim=1), after.argsort(dim=1))
    fall = (vague.log_var.exp() - image.log_var.exp()).sum(dim=1) / 2
    torch.testing.assert_close(before - after, fall[:, None].expand(4, 6))
    wider = Gaussian(text.mean, text.log_var + torch.tensor([0, 0, 3.0, 0, 0, 0])[:, None])
    table = model.similarity(image, wider)
    assert (before.argmax(dim=1) == 2).any() and (table.argmin(dim=1) == 2).all()
    for other in (text, wider):  # labels: their vagueness is no evidence against them
        for own in (image, vague):
            torch.testing.assert_close(model.classify(own, other), F.cosine_similarity(
                image.mean[:, None], text.mean[None], dim=-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.classify(image, text) - before,
                               (image.uncertainty[:, None] + text.uncertainty) / 2)


# --- the terms of the loss ---

def expected_terms(model, batch):
    """Every term anew from the features, by the published formulas, one sample at a time."""
    config, found = model.config, {}
    image, text = model.encode_image(batch["images"]), model.encode_text(batch["tokens"])

    def inclusion(pairs):
        values = []
        for one, other in pairs:
            h = published_test(one, other, config.inclusion_eps) - published_test(other, one, config.inclusion_eps)
            values.append(-F.logsigmoid(config.inclusion_scale * h).mean())
        return sum(values) / max(len(values), 1)

    def row(features, i):
        return Gaussian(features.mean[i], features.log_var[i])
    rows = batch["masked"].nonzero()[:, 0].tolist()
    masked_image = model.encode_image(batch["images"], batch["kept_patches"])
    masked_text = model.encode_text(batch["masked_tokens"])
    everything = range(len(batch["images"]))
    found["ppcl"] = broadcast_loss(image, text, model.logit_scale.exp(), model.logit_bias)
    found["image_in_text"] = config.image_in_text * inclusion((row(image, i), row(text, i)) for i in everything)
    found["image_in_masked"] = config.original_in_masked * inclusion((row(image, i), row(masked_image, i))
                                                                     for i in rows)
    found["text_in_masked"] = config.original_in_masked * inclusion((row(text, i), row(masked_text, i)) for i in rows)
    found["vib"] = config.vib * sum(
        -0.5 * (1 + v / 2 - mu ** 2 - (v / 2).exp()).mean() for mu, v in (image, text))
    return found


@pytest.mark.parametrize("masked", [(1, 4), (0, 1, 2, 3, 4, 5), (5,)])
def test_every_term_equals_the_published_formulas(masked):
    model, batch = felt(), some_batch(6, *masked)
    losses, expected = model(**batch), expected_terms(model, batch)
    assert set(expected) == set(ProLIP.terms) == set(losses) - {"loss"}
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-10), name
        assert losses[name].item() > 1e-2, name
        gradients = (torch.autograd.grad(loss, model.parameters(), retain_graph=True, materialize_grads=True)
                     for loss in (losses[name], value))
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-9 * theirs.norm() + 1e-12, name
    assert losses["loss"].item() == pytest.approx(sum(value.item() for value in expected.values()), rel=1e-12)


def test_without_masked_rows():
    model, batch, sizes = lively(GENTLE), some_batch(4), []
    for tower in (model.image_encoder, model.text_encoder):
        tower.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    losses = model(**batch)
    assert len(sizes) == 4 and min(sizes) > 0  # on a GPU, attention over an empty batch may fail
    assert losses["image_in_masked"].item() == losses["text_in_masked"].item() == 0
    losses["loss"].backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    model.zero_grad()
    short = model(batch["images"], batch["tokens"])
    assert set(short) == {"loss", "ppcl", "image_in_text", "vib"} and torch.equal(short["loss"], losses["loss"])
    short["loss"].backward()
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("masked", [(), (1, 2)])
def test_the_loss_under_autocast_stays_near_fp32(masked):
    model, batch = small(GENTLE), some_batch(6, *masked)
    batch["images"] = batch["images"].float()
    with torch.no_grad():
        exact = model(**batch)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(**batch)
    for name in exact:
        assert rough[name].dtype == torch.float32, name
        assert rough[name].item() == pytest.approx(exact[name].item(), rel=0.1, abs=1e-3), name


def test_every_parameter_gets_a_gradient():
    model, batch = small().train(), some_batch(6, 0, 3)
    model(**batch | {"images": some_images(6)})["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_one_batch_overfits():
    model, batch = small().train(), some_batch(8, 2, 5) | {"images": some_images(8)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3)
    first = None
    for _ in range(100):
        losses = model(**batch)
        first = losses["ppcl"].item() if first is None else first
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        table = model.similarity(model.encode_image(batch["images"]), model.encode_text(batch["tokens"]))
    assert losses["ppcl"] < first / 20
    assert (table.argmax(dim=1) == torch.arange(8)).all() and (table.argmax(dim=0) == torch.arange(8)).all()


# --- several processes ---

GRADIENTS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import prolip
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)
content = torch.load("batches.pt", weights_only=True)
model = prolip.ProLIP(prolip.Config(**content["config"])).double()
model.load_state_dict(content["weights"])
results = []
for batch in content["batches"]:
    losses = model(**{name: x.chunk(2)[rank] for name, x in batch.items()})
    results.append({})
    for name in losses:  # each by itself, averaged as DistributedDataParallel does
        gradients = torch.autograd.grad(losses[name], model.parameters(), retain_graph=True, materialize_grads=True)
        results[-1][name] = [x.clone() / 2 for x in (losses[name].detach(), *gradients)]
        for x in results[-1][name]:
            dist.all_reduce(x)
if rank == 0:
    torch.save(results, "results.pt")
del losses, gradients  # or the process group outlives its end
dist.barrier()
dist.destroy_process_group()
"""


def test_gradients_of_two_processes_equal_one(tmp_path):
    """With masked copies in both halves of the batch, as many or not, in one of the halves, and in none."""
    model = felt()
    batches = [some_batch(6, *masked) for masked in ((0, 5), (0, 1, 2, 4), (0, 2), (4,), ())]
    torch.save({"config": asdict(model.config), "weights": model.state_dict(), "batches": batches},
               tmp_path / "batches.pt")
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    command = [sys.executable, "gradients.py", str(Path(prolip.__file__).parent)]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], cwd=tmp_path, text=True,
                                  stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
                 for rank in range(2)]
    for process in processes:
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 0, error[-3000:]
    for batch, two in zip(batches, torch.load(tmp_path / "results.pt", weights_only=True), strict=True):
        losses = model(**batch)
        assert set(two) == set(losses) == {"loss", *ProLIP.terms}
        for name, loss in losses.items():
            gradients = torch.autograd.grad(loss, model.parameters(), retain_graph=True, materialize_grads=True)
            assert any(x.any() for x in gradients) or "masked" in name and not batch["masked"].any()
            for one, other in zip((loss.detach(), *gradients), two[name], strict=True):
                assert (one - other).norm() <= 1e-12 * one.norm() + 1e-14, name


# --- texts, captions, what is masked ---

def test_layout_cuts_and_keeps_the_end():
    model = small(context_length=6)
    assert model.tokenize(["", "ab"], Words()).tolist() == [[1, 2, 0, 0, 0, 0], [1, 4 + 97 % 40, 4 + 98 % 40, 2, 0, 0]]
    with pytest.warns(UserWarning, match=r"more than 4 tokens are cut to that \(1 of 2 here\)"):
        tokens = model.tokenize(["abcdefgh", "a"], Words())
    assert tokens.shape == (2, 6) and tokens.dtype == torch.long and tokens[0, -1] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # four pieces are not too many
        assert tokens[0].tolist() == model.tokenize(["abcd"], Words())[0].tolist()
    assert model.encode_text(tokens).mean.shape == (2, 16)


def test_layout_with_the_tokenizer_of_the_published_models():
    unigram = data.Unigram([["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁a", -2], ["▁dog", -3], ["s", -3]])
    model = small(pad_id=1, end_id=1, context_length=5)
    tokens = model.tokenize(["A dog!", "dogs", ""], unigram)
    assert tokens.tolist() == [[3, 4, 1, 1, 1], [4, 5, 1, 1, 1], [1, 1, 1, 1, 1]]
    with pytest.warns(UserWarning, match=r"more than 4 tokens are cut to that \(1 of 1 here\)"):
        assert model.tokenize(["a dog a dogs"], unigram).tolist() == [[3, 4, 3, 4, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.tokenize(["a dogs a"], unigram).tolist() == [[3, 4, 5, 3, 1]]


def some_samples(n):
    """Two captions for each of n pictures, all different."""
    return [SimpleNamespace(captions=[letter + "abcde"[:1 + i % 5] for letter in "xy"]) for i in range(n)]


def test_a_batch_takes_one_caption_of_each_picture():
    model, samples = small(), [SimpleNamespace(captions=["a", "bb"]), SimpleNamespace(captions=["cc", "d", "e"])]
    drawn = set()
    for seed in range(40):
        tokens = model.text_batch(samples, [random.Random(seed), random.Random(99)], Words())["tokens"]
        drawn.add(tuple(tuple(row[row > 2].tolist()) for row in tokens))
    pieces = [[tuple(Words().encode(caption)) for caption in sample.captions] for sample in samples]
    assert {first for first, _ in drawn} == set(pieces[0])
    assert len({second for _, second in drawn}) == 1 and drawn.pop()[1] in pieces[1]


def test_a_batch_is_the_same_again_and_however_it_is_split():
    model, samples = small(masked_share=0.5), some_samples(16)

    def batch(part, seed=2):
        rngs = [random.Random(f"{seed} {i}") for i in range(16)]
        return model.text_batch(samples[part], rngs[part], Words())
    whole, again, other = batch(slice(16)), batch(slice(16)), batch(slice(16), seed=3)
    assert set(whole) == {"tokens", "masked", "masked_tokens", "kept_patches"}
    halves = [batch(slice(7)), batch(slice(7, 16))]
    assert all(1 < half["masked"].sum() < len(half["masked"]) for half in halves)
    for name in whole:
        assert torch.equal(whole[name], again[name]) and not torch.equal(whole[name], other[name]), name
        assert torch.equal(whole[name], torch.cat([half[name] for half in halves])), name
    assert model(some_images(16), **whole)["loss"].isfinite()


def test_what_is_masked():
    n, config = 4000, replace(SMALL, context_length=8)
    batch = small(config).text_batch(some_samples(n), [random.Random(i) for i in range(n)], Words())
    tokens, masked, copies, kept = (batch[name] for name in ("tokens", "masked", "masked_tokens", "kept_patches"))
    assert masked.dtype == torch.bool and masked.shape == (n,) and tokens.shape == copies.shape == (n, 8)
    assert masked.float().mean().item() == pytest.approx(1 / 8, abs=0.02)  # four standard deviations
    assert torch.equal(tokens[~masked], copies[~masked])  # the others have no masked copy
    tokens, copies, kept = tokens[masked], copies[masked], kept[masked]
    changed, words = tokens != copies, tokens > 3
    assert (copies[changed] == config.mask_id).all() and not (tokens == config.mask_id).any()
    assert not changed[(tokens == 0) | (tokens == 2)].any()  # padding and ends stay
    assert changed[words].float().mean().item() == pytest.approx(0.75, abs=0.04)
    lengths, shares = words.sum(dim=1), (changed & words).sum(dim=1)
    assert (shares < lengths).any() and (shares == lengths).any() and (shares == 0).any()  # word by word
    for i in range(1, 4):  # whatever the place
        assert changed[words[:, i], i].float().mean().item() == pytest.approx(0.75, abs=0.09)
    assert kept.shape == (len(tokens), 6) and kept.min() == 0 and kept.max() == 8
    assert (kept.diff(dim=1) > 0).all()  # in order, none twice
    share = torch.bincount(kept.flatten(), minlength=9) / len(kept)
    assert (share - 6 / 9).abs().max() < 0.09
    assert len(kept.unique(dim=0)) > 60  # of 84 ways
    assert ((batch["kept_patches"] >= 0) & (batch["kept_patches"] < 9)).all()


@pytest.mark.parametrize("changes, patches, share", [(dict(keep_patches=0.5), 4, 0.75), (dict(mask_text=0.2), 6, 0.2),
                                                     (dict(image_size=32, patch_size=4), 48, 0.75)])
def test_how_much_is_masked_is_configured(changes, patches, share):
    model = small(masked_share=1.0, **changes)
    batch = model.text_batch(some_samples(500), [random.Random(i) for i in range(500)], Words())
    words = batch["tokens"] > 3
    assert batch["masked"].all() and batch["kept_patches"].shape == (500, patches)
    assert batch["kept_patches"].max() == (model.config.image_size // model.config.patch_size) ** 2 - 1
    assert (batch["masked_tokens"] == 3)[words].float().mean().item() == pytest.approx(share, abs=0.05)
    assert not small(masked_share=0.0).text_batch(some_samples(50), [random.Random(i) for i in range(50)],
                                                  Words())["masked"].any()


@pytest.mark.parametrize("call, message", [
    (lambda m: m.tokenize("a red star", Words()), r"texts must be a list of at least one text, got 'a red star'"),
    (lambda m: m.tokenize([], Words()), r"texts must be a list of at least one text, got \[\]"),
    (lambda m: m.encode_text(torch.zeros(10, dtype=torch.long)), r"tokens must be \(B, 10\).*got \(10,\)"),
    (lambda m: m.encode_text(torch.full((1, 7), 2)), r"tokens must be \(B, 10\), as tokenize makes them, got \(1, 7\)"),
    (lambda m: m.encode_text(torch.full((2, 12), 2)), r"tokens must be \(B, 10\).*got \(2, 12\)"),
    (lambda m: m.encode_image(torch.zeros(3, 24, 24)), r"images must be \(B, 3, 24, 24\), got \(3, 24, 24\)"),
    (lambda m: m.encode_image(torch.zeros(1, 24, 24, 3)), r"images must be \(B, 3, 24, 24\), got \(1, 24, 24, 3\)"),
    (lambda m: m.encode_image(torch.zeros(1, 3, 32, 32)), r"images must be \(B, 3, 24, 24\), got \(1, 3, 32, 32\)"),
])
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())


# --- prompts ---

def slow_weights(image, prompts, noise, alpha, steps, floor):
    """Expectation and maximisation for one sample, one prompt and one dimension at a time."""
    (mean, log_var), (mu, v) = (tuple(x.numpy() for x in features) for features in (image, prompts))
    samples = [mean[i] + np.exp(log_var[i] / 2) * noise[k, i].numpy()
               for k in range(len(noise)) for i in range(len(mean))]
    prior = [1 / np.mean(np.exp(row)) for row in v]
    prior = [p / sum(prior) for p in prior]
    weights = list(prior)
    for _ in range(steps):
        counts = [alpha * len(mu) * p for p in prior]
        for x in samples:
            densities = []
            for p in range(len(mu)):
                density = weights[p]
                for e in range(mu.shape[1]):
                    variance = math.exp(v[p, e]) + floor
                    density *= math.exp(-(x[e] - mu[p, e]) ** 2 / (2 * variance)) / math.sqrt(2 * math.pi * variance)
                densities.append(density)
            counts = [count + density / sum(densities) for count, density in zip(counts, densities)]
        weights = [count / sum(counts) for count in counts]
    return weights


@pytest.mark.parametrize("options", [{}, dict(alpha=0.5, draws=7, steps=3, floor=0.1)])
def test_weights_of_prompts_equal_a_slow_loop(options):
    image, prompts = some_gaussians(3, 4, seed=1, log_var=-1), some_gaussians(5, 4, seed=2, log_var=-1)
    values = dict(alpha=2.0, draws=20, steps=10, floor=0.02) | options
    noise = torch.randn(values.pop("draws"), 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = reweight_prompts(image, prompts, **options, generator=torch.Generator().manual_seed(5))
    assert found.tolist() == pytest.approx(slow_weights(image, prompts, noise, **values), rel=1e-9)
    assert found.sum().item() == pytest.approx(1, abs=1e-12) and found.max() - found.min() > 0.1


def test_prompts_that_fit_the_pictures_gain_weight():
    mean = F.normalize(torch.eye(4) + 0.1, dim=1)
    pictures = Gaussian(F.normalize(mean[2] + 0.1 * some_gaussians(10, 4)[0].float(), dim=1), torch.full((10, 4), -5.0))
    prompts = Gaussian(mean, torch.full((4, 4), -3.0))
    weights = reweight_prompts(pictures, prompts, generator=torch.Generator().manual_seed(0))
    assert weights[2] > 0.9 and weights.sum().item() == pytest.approx(1, abs=1e-6)
    narrow = torch.tensor([-3.0, -4.0, -3.0, -2.0])[:, None].expand(4, 4)
    prior = reweight_prompts(pictures, Gaussian(mean, narrow), alpha=1e9, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([math.e ** 3, math.e ** 4, math.e ** 3, math.e ** 2])
    torch.testing.assert_close(prior, expected / expected.sum(), rtol=1e-4, atol=0)


def test_a_class_mixed_of_its_prompts_by_hand():
    prompts = Gaussian(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0, 1.0], [8.0, 16.0]]).log())
    mixed = mix(prompts, torch.tensor([0.75, 0.25]))
    assert mixed.mean.tolist() == [[0.75, 0.25]]
    assert mixed.log_var.exp()[0].tolist() == pytest.approx([0.5625 * 4 + 0.0625 * 8, 0.5625 + 0.0625 * 16], rel=1e-6)
    half = mix(Gaussian(*(x.bfloat16() for x in prompts)), torch.tensor([0.75, 0.25]))
    assert half.mean.dtype == half.log_var.dtype == torch.float32 and torch.equal(half.mean, mixed.mean)
    assert mix(prompts, torch.tensor([0.0, 1.0])).uncertainty.tolist() == pytest.approx([24.0])


# --- weights in the hub's form ---
# The golden file holds small weights in published names, and what the published implementation makes of them.

def golden():
    return torch.load(HERE / "golden" / "prolip.pt", weights_only=True)


def config_of(reference):
    c = reference["config"]
    return Config(
        image_size=c["image_size"], patch_size=c["patch_size"], image_width=c["vision_width"],
        image_layers=c["vision_layers"], image_heads=c["vision_heads"], image_mlp=4 * c["vision_width"],
        vocab_size=c["vocab_size"], context_length=c["context_length"], text_width=c["text_width"],
        text_layers=c["text_layers"], text_heads=c["text_heads"], text_mlp=4 * c["text_width"],
        text_eps=c["text_norm_eps"], embed_dim=c["embed_dim"])


def open_clips(reference):
    """The config.json of the hub for these sizes."""
    c = reference["config"]
    return {"embed_dim": c["embed_dim"], "quick_gelu": False,
            "vision_cfg": {"image_size": c["image_size"], "patch_size": c["patch_size"], "width": c["vision_width"],
                           "layers": c["vision_layers"], "head_width": c["vision_width"] // c["vision_heads"],
                           "mlp_ratio": 4.0},
            "text_cfg": {"context_length": c["context_length"], "vocab_size": c["vocab_size"],
                         "width": c["text_width"], "heads": c["text_heads"], "layers": c["text_layers"],
                         "norm_kwargs": {"eps": c["text_norm_eps"]}}}


def hub_folder(folder, content, state=None):
    """model.safetensors and config.json, as a published model's folder has them."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder.mkdir(exist_ok=True)
    state = golden()["state_dict"] if state is None else state
    safetensors.save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    if content is not None:
        (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def assert_features(model, reference, tolerance=1e-8):
    """In float64: the features that the published implementation returned."""
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for ours, name in ((model.encode_image(reference["image"].double()), "image_features"),
                           (model.encode_text(reference["text"]), "text_features")):
            for part in ("mean", "log_var"):
                expected = reference[name][part]
                assert (getattr(ours, part) - expected).abs().max() <= tolerance * expected.abs().max()


FORMATS = {  # what becomes of a state dict in the published names
    "published": lambda state: state,
    "a training checkpoint": lambda state: {"epoch": 3, "state_dict": {f"module.{n}": v for n, v in state.items()}},
    "compiled": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_published_features(tmp_path, form):
    reference = golden()
    torch.save(FORMATS[form](reference["state_dict"]), tmp_path / "weights.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_features(ProLIP.from_pretrained(tmp_path / "weights.pt", config_of(reference)), reference)
        assert_features(ProLIP.from_pretrained(str(tmp_path / "weights.pt"), config_of(reference)), reference)


@pytest.fixture
def few_sizes(monkeypatch):
    """So that none of the published ones needs to be tried. All of them are in the tests of sizes."""
    monkeypatch.setattr(prolip, "CONFIGS", {"one": SMALL, "another": GENTLE})
    return prolip.CONFIGS


def test_a_folder_of_the_hub_tells_its_sizes(tmp_path, few_sizes):
    reference = golden()
    for folder in (hub_folder(tmp_path, open_clips(reference)), str(tmp_path)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = ProLIP.from_pretrained(folder)
        assert model.config == config_of(reference)
        assert_features(model, reference)
    assert_features(ProLIP.from_pretrained(tmp_path / "model.safetensors", config_of(reference)), reference)


def test_what_config_json_leaves_out_has_open_clips_values(tmp_path):
    (tmp_path / "config.json").write_text('{"embed_dim": 640, "vision_cfg": {"width": 1152, "layers": 3, "head_width": '
                                          '72, "mlp_ratio": 3.7362}, "text_cfg": {"mlp_ratio": 2}, "quick_gelu": true}')
    found = prolip.read_config(tmp_path / "config.json")
    assert found == Config(image_size=224, patch_size=16, image_width=1152, image_layers=3, image_heads=16,
                           image_mlp=4304, vocab_size=49408, pad_id=0, end_id=49407,  # CLIP's, by its size
                           context_length=77, text_width=512, text_layers=12, text_heads=8, text_mlp=1024,
                           text_eps=1e-5, embed_dim=640, activation="quick_gelu")


def test_a_config_or_a_known_size_makes_config_json_needless(tmp_path, few_sizes):
    reference = golden()
    hub_folder(tmp_path, None)
    assert_features(ProLIP.from_pretrained(tmp_path, config_of(reference)), reference)
    few_sizes["fitting"] = replace(config_of(reference), vib=0.5)
    for config in (None, "fitting"):
        model = ProLIP.from_pretrained(tmp_path, config)
        assert model.config.vib == 0.5  # the size is known by its shapes
        assert_features(model, reference)


@pytest.mark.parametrize("content, message", [
    (None, "config.json: no such file, and the weights have the shapes of no known size"),
    ("", "config.json: expected open_clip's embed_dim, vision_cfg and text_cfg"),
    ("[1, 2]", "config.json: expected open_clip's embed_dim, vision_cfg and text_cfg"),
    ('{"embed_dim": 24, "vision_cfg": {}}', "expected open_clip's.*text_cfg"),
    ('{"embed_dim": 24, "vision_cfg": {"width": "wide"}, "text_cfg": {}}', "expected open_clip's"),
    ('{"embed_dim": 24, "vision_cfg": 3, "text_cfg": {}}', "expected open_clip's"),
    ('{"vision_cfg": {}, "text_cfg": {}}', "expected open_clip's.*embed_dim"),
    ("\udcff", "expected open_clip's"),
], ids=["missing", "empty", "list", "no text_cfg", "no number", "no object", "no embed_dim", "no UTF-8"])
def test_a_folder_without_a_proper_config(tmp_path, few_sizes, content, message):
    folder = hub_folder(tmp_path / "hub", None)
    if content is not None:
        (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        ProLIP.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_folder_without_weights(tmp_path):
    pytest.importorskip("safetensors.torch")
    with pytest.raises(ValueError, match="model.safetensors: no such file"):
        ProLIP.from_pretrained(tmp_path)


def test_its_own_names_load_too():
    model = small()
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = ProLIP.from_pretrained(state, model.config).state_dict()
    assert set(loaded) == set(state) and all(torch.equal(loaded[name], state[name]) for name in state)


# --- sizes ---

@pytest.mark.parametrize("name, published, parameters", [
    ("vit-b-16", "ViT-B-16-ProLIP", 197_923_586), ("vit-b-16-long", "ViT-B-16-ProLIP-long", 198_071_042),
    ("vit-l-16", "ViT-L-16-ProLIP", 642_814_978), ("vit-so400m-14", "ViT-SO400M-14-ProLIP", 866_286_434),
    ("vit-h-14", "ViT-H-14-ProLIP", 988_478_466)])
def test_published_checkpoints_load_strictly_and_have_the_published_size(name, published, parameters):
    entry = json.loads(gzip.open(HERE / "golden" / "shapes.json.gz").read())[f"prolip/{published}"]
    with torch.device("meta"):  # shapes without memory
        state = {key: torch.empty(shape) for key, shape in entry["keys"].items()}
        model = ProLIP.from_pretrained(state)  # the size is found by names and shapes
        assert model.config == CONFIGS[name]
        assert sum(p.numel() for p in model.parameters()) == entry["params"] == parameters
        with pytest.raises(ValueError, match="1 unexpected: surplus"):  # one tensor more or one less, and it is refused
            ProLIP.from_pretrained(state | {"surplus": torch.empty(1)}, CONFIGS[name])
        del state["logit_bias"]
        with pytest.raises(ValueError, match="1 missing: logit_bias"):
            ProLIP.from_pretrained(state, CONFIGS[name])
    c = model.config  # what shapes do not tell
    assert c.image_size == (256 if name == "vit-l-16" else 224)
    words = (c.activation, c.pad_id, c.end_id, c.context_length)
    assert words == {"vit-h-14": ("quick_gelu", 0, 49407, 77), "vit-b-16-long": ("gelu", 1, 1, 256)}.get(
        name, ("gelu", 1, 1, 64))


def test_the_published_settings():
    paper = dict(logit_bias=-10, log_var=-10, image_in_text=1e-7, original_in_masked=1e-3, vib=1e-4, inclusion_eps=-20,
                 inclusion_scale=1000, masked_share=1 / 8, mask_text=0.75, keep_patches=0.75, mask_id=32000)
    for name in PUBLISHED:
        settings = paper | (dict(inclusion_eps=-100, inclusion_scale=10) if name == "vit-b-16-long" else {})
        assert {key: getattr(CONFIGS[name], key) for key in settings} == settings


def test_every_published_name_is_a_size_and_has_its_own_address():
    assert set(PUBLISHED) == {name for name in CONFIGS if name.startswith("vit-")}
    assert len({files["source"][0] for files in PUBLISHED.values()}) == len(PUBLISHED)
    for name, files in PUBLISHED.items():
        assert set(files) == {"source", "vocab"}
        url = files["source"][0]
        assert url.startswith("https://huggingface.co/SanghyukChun/") and url.endswith("/model.safetensors")
        assert name.removesuffix("-long") in url.lower() and ("LongProLIP" in url) == name.endswith("-long")
        assert files["vocab"][0].startswith("https://")
        assert files["vocab"][0].endswith(".txt.gz" if name == "vit-h-14" else "/tokenizer.json")


def test_published_names_are_downloaded(tmp_path, monkeypatch):
    safetensors, reference, asked = pytest.importorskip("safetensors.torch"), golden(), []

    def download(url, path, md5=None, sha256=None):
        asked.append(url)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        safetensors.save_file({name: value.contiguous() for name, value in reference["state_dict"].items()}, path)
        return Path(path)
    monkeypatch.setattr(data, "download", download)
    monkeypatch.setitem(CONFIGS, "vit-b-16", config_of(reference))  # a small one in its place
    assert_features(ProLIP.from_pretrained("vit-b-16", cache=tmp_path / "cache"), reference)
    assert PUBLISHED["vit-b-16"]["source"][0] in asked
    with pytest.warns(UserWarning, match="resized to 6 x 6"):  # a config of one's own wins over the name's
        model = ProLIP.from_pretrained("vit-b-16", replace(config_of(reference), image_size=48),
                                       cache=tmp_path / "cache")
    assert model.config.image_size == 48


def test_unknown_names_list_the_known(tmp_path):
    with pytest.raises(ValueError, match="vit-b-32: no such file, and no published ProLIP") as error:
        ProLIP.from_pretrained("vit-b-32", cache=tmp_path)
    assert all(name in str(error.value) for name in PUBLISHED)
    with pytest.raises(ValueError, match="'huge'; known:") as error:
        ProLIP.from_pretrained({}, "huge")
    assert all(name in str(error.value) for name in CONFIGS)
    with pytest.raises(ValueError, match="ProLIP is made of a Config, got a dict"):
        ProLIP.from_pretrained({}, {"image_size": 24})


# --- positions for longer texts, and for pictures of another size ---

def stretched(table, old, new):
    state = small(context_length=old).state_dict() | {"text_encoder.positional_embedding": table}
    with pytest.warns(UserWarning, match=f"texts of {old} tokens, stretched to {new}"):
        model = ProLIP.from_pretrained(state, replace(SMALL, context_length=new))
    with torch.no_grad():
        assert model.encode_text(some_tokens(5, 9, width=new)).mean.isfinite().all()
    return model.text_encoder.positional_embedding.detach()


@pytest.mark.parametrize("old, new", [(30, 50), (21, 40), (64, 256), (40, 41)])
def test_positions_of_longer_texts(old, new):
    """The first 20 stay, and the last two, of [UNC] and [CLS]; between them, straight lines."""
    table = torch.randn(old + 2, 24, generator=torch.Generator().manual_seed(0))
    found = stretched(table, old, new)
    assert found.shape == (new + 2, 24)
    assert torch.equal(found[:20], table[:20]) and torch.equal(found[-2:], table[-2:])
    places = (np.arange(new - 20) + 0.5) * (old - 20) / (new - 20) - 0.5  # middles of cells; np.interp stays in range
    for channel in range(24):
        expected = np.interp(places, np.arange(old - 20), table[20:-2, channel].numpy())
        np.testing.assert_allclose(found[20:-2, channel].numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("old, new", [(30, 25), (20, 30), (12, 30)])
def test_other_positions_of_texts_are_refused(old, new):
    with pytest.raises(ValueError, match=rf"text_encoder.positional_embedding \({old + 2}, 24\), expected \({new + 2}"):
        ProLIP.from_pretrained(small(context_length=old).state_dict(), replace(SMALL, context_length=new))


@pytest.mark.parametrize("old, new", [(2, 4), (3, 7), (4, 2)])
def test_resized_positions_equal_pillows(old, new):
    table = torch.randn(2 + old ** 2, 32, generator=torch.Generator().manual_seed(0))
    state = small(image_size=8 * old).state_dict() | {"image_encoder.positional_embedding": table}
    with pytest.warns(UserWarning, match=f"{old} x {old} patches, resized to {new} x {new}"):
        model = ProLIP.from_pretrained(state, replace(SMALL, image_size=8 * new))
    found = model.image_encoder.positional_embedding.detach()
    assert torch.equal(found[:2], table[:2])  # [CLS] and [UNC] are nowhere on the picture
    for channel in range(32):
        grid = Image.fromarray(table[2:, channel].reshape(old, old).numpy())
        expected = torch.from_numpy(np.array(grid.resize((new, new), Image.Resampling.BICUBIC)))
        torch.testing.assert_close(found[2:, channel].view(new, new), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert model.encode_image(some_images(2, 8 * new)).mean.isfinite().all()


# --- what does not fit ---

def test_what_does_not_fit_is_reported_in_groups():
    reference = golden()
    state = dict(reference["state_dict"])
    state["visual.conv1.weight"] = torch.zeros(32, 3, 4, 4)
    state["surplus"] = torch.zeros(1)
    for i in range(2):
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.bias"):
            del state[f"visual.transformer.resblocks.{i}.{name}"]
    with pytest.raises(ValueError) as error:
        ProLIP.from_pretrained(state, config_of(reference))
    message = str(error.value)
    assert "do not fit ProLIP" in message
    assert "6 missing: image_encoder.blocks.0.ln_1.weight; " in message and ", ..." in message
    assert "1 unexpected: surplus" in message
    assert "1 wrong shape: image_encoder.conv1.weight (32, 3, 4, 4), expected (32, 3, 8, 8)" in message


def test_the_size_that_would_fit_is_named(few_sizes):
    reference = golden()
    few_sizes["other"], few_sizes["fitting"] = replace(config_of(reference), text_layers=1), config_of(reference)
    with pytest.raises(ValueError, match="unexpected: text_encoder.blocks.1(.|\n)*'fitting'"):
        ProLIP.from_pretrained(reference["state_dict"], "other")
    del few_sizes["fitting"]
    with pytest.raises(ValueError, match="unexpected: text_encoder.blocks.1") as error:
        ProLIP.from_pretrained(reference["state_dict"], "other")
    assert "fit config" not in str(error.value) and "fitting" not in str(error.value)


def test_weights_of_no_size_are_refused(few_sizes):
    with pytest.raises(ValueError, match="do not fit ProLIP(.|\n)*of one, another none would fit"):
        ProLIP.from_pretrained(golden()["state_dict"])
    few_sizes["one"] = replace(SMALL, context_length=40)
    for changes in (dict(context_length=30), dict(context_length=40, image_size=32)):
        with pytest.raises(ValueError, match="wrong shape: .*positional_embedding(.|\n)*none would fit"):
            ProLIP.from_pretrained(small(**changes).state_dict())  # positions are changed only if one asks for a size
    clip = torch.load(HERE / "golden" / "clip_gelu.pt", weights_only=True)["state_dict"]
    with pytest.raises(ValueError, match="missing: logit_bias"):
        ProLIP.from_pretrained(clip, SMALL)


def test_files_of_another_kind_are_named(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"model": "prolip", "tokenizer": {}, "weights": {}}, tmp_path / "ours.pt")
    (tmp_path / "rubbish.pt").write_bytes(b"not a checkpoint")
    for name, message in (("list.pt", "holds other things than tensors"), ("rubbish.pt", "is no checkpoint"),
                          ("ours.pt", "was written by train.py: use train.load"), ("nowhere.pt", ": no such file")):
        with pytest.raises(ValueError, match=rf"{name} ?{message}"):
            ProLIP.from_pretrained(tmp_path / name, SMALL)


# --- in use ---

@pytest.fixture
def loaded(monkeypatch):
    """Where train.load would be: a small model, and a picture whatever the path."""
    model, picture = lively(log_var=-3.0).float(), some_images(1)[0]
    found = model, Words(), lambda image: picture
    monkeypatch.setitem(sys.modules, "train", SimpleNamespace(load=lambda path: found))
    return model, picture


def scores_of(model, picture, labels):
    """The softmax of scaled cosines, and the sums of variances, each text by itself."""
    with torch.no_grad():
        image = model.encode_image(picture[None])
        scores, vagueness = {}, {None: image.log_var.exp().sum().item()}
        for label in labels:
            row = [1, *Words().encode(label), 2]
            text = model.encode_text(torch.tensor([row + [0] * (10 - len(row))]))
            cosine = float((image.mean * text.mean).sum())
            scores[label] = math.exp(model.logit_scale.exp().item() * cosine)
            vagueness[label] = text.log_var.exp().sum().item()
    return {label: score / sum(scores.values()) for label, score in scores.items()}, vagueness


def test_the_pipeline_ranks_labels_by_the_softmax_of_scaled_cosines(loaded):
    pipeline, labels = prolip.ZeroShotPipeline("best.pt"), ["a cat", "a dog", "x"]
    scores, vagueness = scores_of(*loaded, labels)
    best = sorted(labels, key=scores.get, reverse=True)
    found = pipeline.predict("cat.jpg", labels)
    assert [label for label, _ in found] == best
    assert [p for _, p in found] == pytest.approx([scores[label] for label in best], rel=1e-3)
    assert pipeline.predict("cat.jpg", labels, top_k=1) == found[:1]
    image, texts = pipeline.encode("cat.jpg", labels)
    assert image.uncertainty.tolist() == pytest.approx([vagueness[None]], rel=1e-4)
    assert texts.uncertainty.tolist() == pytest.approx([vagueness[label] for label in labels], rel=1e-4)
    for wrong in ("a cat", ["a cat"], []):
        with pytest.raises(ValueError, match="two or more"):
            pipeline.predict("cat.jpg", wrong)


def test_the_command_prints_probabilities_and_uncertainties(loaded, monkeypatch, capsys):
    labels = ["a cat", "a dog", "x"]
    scores, vagueness = scores_of(*loaded, labels)
    monkeypatch.setattr(sys, "argv", ["prolip.py", "best.pt", "cat.jpg", *labels])
    runpy.run_path(prolip.__file__, run_name="__main__")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith("cat.jpg") and f"{vagueness[None]:.4f}" in first
    assert [line.split("  ")[-1] for line in lines] == sorted(labels, key=scores.get, reverse=True)
    for line in lines:
        label = line.split("  ")[-1]
        assert float(re.search(r"([\d.]+)%", line)[1]) == pytest.approx(100 * scores[label], abs=0.1)
        assert float(re.search(r"uncertainty ([\d.]+)", line)[1]) == pytest.approx(vagueness[label], abs=2e-4)
    monkeypatch.setattr(sys, "argv", ["prolip.py", "best.pt", "cat.jpg", "a cat"])
    with pytest.raises(SystemExit, match="usage: python prolip.py .*two or more"):
        runpy.run_path(prolip.__file__, run_name="__main__")


def test_a_config_survives_being_written_down():
    for config in (SMALL, *CONFIGS.values()):
        assert Config(**json.loads(json.dumps(asdict(config)))) == config


def test_the_file_stands_alone(tmp_path):
    shutil.copy(prolip.__file__, tmp_path)
    code = ("import sys; before = set(sys.modules); import torch; import prolip\n"
            "config = prolip.CONFIGS['tiny']\n"
            "images = torch.zeros(2, 3, config.image_size, config.image_size)\n"
            "tokens = torch.full((2, config.context_length), config.pad_id); tokens[:, 0] = config.end_id\n"
            "masked, kept = torch.tensor([True, False]), torch.zeros(2, 3, dtype=torch.long)\n"
            "assert prolip.ProLIP(config)(images, tokens, masked, tokens, kept)['loss'].isfinite()\n"
            "print(not {'data', 'train', 'clip', 'torchvision', 'PIL', 'safetensors'} & set(sys.modules) - before)")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("True\n", "")
