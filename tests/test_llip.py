"""llip.py: mixtures, cosines and the loss against slow loops and the plain formula; its towers by hand; several
processes; weights in their published forms; and what it says of unfit input."""
import copy
import gzip
import itertools
import json
import math
import os
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
from torch.utils._python_dispatch import TorchDispatchMode

import data
import llip
from llip import (CONFIGS, PUBLISHED, Config, Llip, KeysValues, QueryTarget, mixing_weights, mixture_cosines, mixture_loss,
                  mixtures)
from test_golden import build_llip

HERE = Path(__file__).parent
# heads, tokens and numbers a head are all different: M = 3, K = 5, d = 4
SMALL = Config(image_size=24, patch_size=8, image_width=32, image_layers=2, image_heads=4, image_mlp=64, vocab_size=50,
               end_id=2, context_length=10, text_width=24, text_layers=2, text_heads=4, text_mlp=48, embed_dim=12,
               mixture_tokens=5, mixing_heads=3, temperature=2.0)


def small(**changes):
    torch.manual_seed(0)
    return Llip(replace(SMALL, **changes)).eval()


def lively(**changes):
    """In float64, with every parameter moved a little from its start, so that each bias and norm has an effect."""
    model = small(**changes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
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


def some_features(images, texts, M=3, K=5, d=4):
    """Keys, values, query, target and out_proj, in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = (images, M, K, d), (images, M, K, d), (texts, M, d), (texts, M * d), (M * d, M * d)
    features = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return *features[:3], F.normalize(features[3], dim=-1), features[4]


def packed(keys, values, query, target, *rest):
    """The same, as the functions take them."""
    return KeysValues(keys, values), QueryTarget(query, target), *rest


class Words:
    """A tokenizer for tests: every letter is a piece."""
    pad_id, start_id, end_id = 0, 1, 2

    def encode(self, text):
        return [4 + ord(c) % 40 for c in text]


# --- mixtures and their cosines ---

def slow(*features):
    """Weights (I, M, K, T), mixtures (I, T, E) and cosines (I, T): for each image, text, head and token by itself."""
    keys, values, query, target, out_proj = (x.double().numpy() for x in features[:5])
    (I, M, K, d), T, E = keys.shape, len(query), len(out_proj)
    weights, mixed, cosine = np.zeros((I, M, K, T)), np.zeros((I, T, E)), np.zeros((I, T))
    for i, j in itertools.product(range(I), range(T)):
        joint = []
        for m in range(M):
            scores = [math.exp(sum(keys[i, m, n, e] * query[j, m, e] for e in range(d)) / features[5])
                      for n in range(K)]
            weights[i, m, :, j] = a = [score / sum(scores) for score in scores]
            joint += [sum(a[n] * values[i, m, n, e] for n in range(K)) for e in range(d)]
        mixed[i, j] = z = [sum(joint[a] * out_proj[a, b] for a in range(E)) for b in range(E)]
        cosine[i, j] = sum(a * b for a, b in zip(z, target[j])) / math.sqrt(sum(a * a for a in z))
    return tuple(map(torch.from_numpy, (weights, mixed, cosine)))


@pytest.mark.parametrize("temperature", [0.7, 5])
def test_weights_mixtures_and_cosines_equal_a_slow_loop(temperature):
    keys, values, query, *rest = features = some_features(4, 6)
    weights, mixed, cosine = slow(*features, temperature)
    found = mixing_weights(keys, query, temperature)
    assert found.shape == (4, 3, 5, 6) and found.var(dim=2).min() > 0
    torch.testing.assert_close(found.sum(dim=2), torch.ones(4, 3, 6, dtype=torch.float64))
    torch.testing.assert_close(found, weights, rtol=0, atol=1e-13)
    torch.testing.assert_close(mixtures(*packed(*features), temperature), mixed, rtol=0, atol=1e-12)
    for length in (1e-5, 1, 1000):  # of which a cosine knows nothing
        found = mixture_cosines(*packed(keys, length * values, query, *rest), temperature)
        torch.testing.assert_close(found, cosine, rtol=0, atol=1e-12)


def test_at_its_limits_temperature_takes_the_mean_or_the_best_token():
    keys, values, query, target, out_proj = features = some_features(4, 6)
    mean = F.normalize(values.mean(dim=2).flatten(1) @ out_proj, dim=-1) @ target.T
    torch.testing.assert_close(mixture_cosines(*packed(*features), 1e12), mean, rtol=0, atol=1e-11)
    best, chosen = torch.zeros(4, 6, dtype=torch.float64), set()
    for i, j in itertools.product(range(4), range(6)):
        tokens = [max(range(5), key=lambda n: keys[i, m, n] @ query[j, m]) for m in range(3)]
        chosen.add(tuple(tokens))
        z = torch.cat([values[i, m, n] for m, n in enumerate(tokens)]) @ out_proj
        best[i, j] = z @ target[j] / z.norm()
    assert len(chosen) > 10  # heads choose by themselves
    torch.testing.assert_close(mixture_cosines(*packed(*features), 1e-4), best, rtol=0, atol=1e-12)


def test_it_is_no_similarity_of_single_vectors():
    """Products of vectors of E numbers have rank E at most; and for one target, either image can be the nearer one."""
    features = some_features(7, 7, M=1, K=4, d=2)
    assert torch.linalg.matrix_rank(mixture_cosines(*packed(*features), 0.5), atol=1e-6) == 7
    assert torch.linalg.matrix_rank(mixture_cosines(*packed(*features), 1e15), atol=1e-6) == 2  # the mean of the tokens
    ahead = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    values = torch.stack([ahead, -ahead])[:, None]  # what one image has first, the other has last
    keys, queries = torch.eye(2).expand(2, 1, 2, 2), 3 * torch.eye(2)[:, None]
    table = mixture_cosines((keys, values), (queries, ahead[[0, 0]]), torch.eye(2), 1)
    torch.testing.assert_close(table, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))


# --- the loss ---

def plain_loss(images, texts, out_proj, scale, bias, temperature):
    """As the formula has it, with the mixtures of all pairs."""
    weights = (torch.einsum("imkd,tmd->itmk", images.keys, texts.query) / temperature).softmax(dim=-1)
    mixed = torch.einsum("itmk,imkd->itmd", weights, images.values).flatten(2) @ out_proj
    logits = scale * torch.einsum("ite,te->it", F.normalize(mixed, dim=-1), texts.target) + bias
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return torch.log1p(torch.exp(-labels * logits)).sum() / len(logits)


@pytest.fixture
def sizes(monkeypatch):
    """How many images are compared at a time."""
    found = []
    monkeypatch.setattr(llip, "mixture_cosines",
                        lambda images, *rest: found.append(len(images[0])) or mixture_cosines(images, *rest))
    return found


@pytest.mark.parametrize("chunk, expected", [(1, [1] * 7), (3 * 510 + 509, [3, 3, 1]), (2 ** 19, [7])])
def test_loss_and_gradients_equal_the_plain_formula(monkeypatch, sizes, chunk, expected):
    inputs = [*some_features(7, 7), torch.tensor(2.5).double(), torch.tensor(-1.5).double()]
    monkeypatch.setitem(llip.CHUNK, "cpu", chunk)  # 3 heads of 5 tokens, 7 texts, E 12: 15 x (7 + 12 + 15) an image
    results = []
    for form in (mixture_loss, plain_loss):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = form(*packed(*leaves), 0.7)
        (3 * loss).backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert theirs.abs().max() > 1e-2
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert sizes == expected


def test_the_loss_of_two_pairs_by_hand():
    """At temperature 2, a score of 2 ln 3 against 0 gives weights of 3/4 and 1/4."""
    keys = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])  # the second image's are all alike
    values = torch.tensor([[[[4.0, 0.0], [0.0, 4.0]]], [[[2.0, 0.0], [0.0, 2.0]]]])
    query, target = 2 * math.log(3) * torch.eye(2)[:, None], torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # mixtures (3, 1), (1, 3) and (1, 1), (1, 1); behind out_proj (3, 3), (1, 9) and (1, 3), (1, 3)
    cosine = [3 / math.sqrt(18), 7.8 / math.sqrt(82), 1 / math.sqrt(10), 3 / math.sqrt(10)]
    expected = sum(math.log(1 + math.exp(-y * (2 * c - 1))) for y, c in zip((1, -1, -1, 1), cosine)) / 2
    found = mixture_loss(*packed(keys, values, query, target, torch.diag(torch.tensor([1.0, 3.0]))),
                         torch.tensor(2.0), torch.tensor(-1.0), 2.0)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_one_token_is_a_sigmoid_loss_that_ignores_the_query():
    keys, values, query, target, out_proj = features = some_features(6, 6, K=1)
    keys.requires_grad_(), query.requires_grad_()
    logits = 4 * F.normalize(values.flatten(1) @ out_proj, dim=-1) @ target.T - 3
    expected = -F.logsigmoid((2 * torch.eye(6) - 1) * logits).sum() / 6
    found = mixture_loss(*packed(*features), torch.tensor(4.0), torch.tensor(-3.0), 0.5)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    assert not any(x.any() for x in torch.autograd.grad(found, (keys, query)))


def numbers(*features):
    """The loss, similarities, and the loss's gradients, at settings where rounding is felt."""
    leaves, model = [x.detach().requires_grad_() for x in features], small()
    model.out_proj.data = features[4]
    loss = mixture_loss(*packed(*leaves), torch.tensor(20.0), torch.tensor(-5.0), 0.5)
    return [loss, model.similarity(*packed(*features)[:2]).detach(), *torch.autograd.grad(loss, leaves)]


def test_all_is_computed_in_fp32_under_autocast_and_stays_float64():
    exact = some_features(9, 9)
    single = [x.float() for x in exact]
    half = [*(x.bfloat16() for x in single[:4]), single[4]]
    with torch.autocast("cpu", torch.bfloat16):
        autocast, from_half = numbers(*single), numbers(*half)
    plain, from_back, double = numbers(*single), numbers(*(x.float() for x in half)), numbers(*exact)
    for i in range(len(plain)):
        assert plain[i].dtype == torch.float32 and torch.equal(autocast[i], plain[i])
        assert torch.equal(from_half[i], from_back[i].to(half[0].dtype) if 2 <= i < 6 else from_back[i])
        assert double[i].dtype == torch.float64
        torch.testing.assert_close(double[i], plain[i].double(), rtol=1e-4, atol=1e-4)
        assert (double[i] - plain[i]).abs().max() > 0  # not merely fp32 in a wider type
    assert {x.dtype for x in numbers(*(x.bfloat16() for x in exact))[:2]} == {torch.float32}  # out_proj in bf16, too


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


def test_neither_mixtures_nor_all_weights_are_held(monkeypatch):
    """64 images and texts, 2 heads of 8 tokens, E = 96: nothing is as large as mixtures, (I, T, E), would be."""
    def largest(form):
        leaves = [x.requires_grad_() for x in some_features(64, 64, M=2, K=8, d=48)]
        with Largest() as mode:
            form(*packed(*leaves), torch.tensor(2.0), torch.tensor(-1.0), 1.0).backward()
        return mode.numel
    assert largest(plain_loss) == 64 * 64 * 96
    assert largest(mixture_loss) == 64 * 16 * 96  # values, seen from each head
    monkeypatch.setitem(llip.CHUNK, "cpu", 1)
    assert largest(mixture_loss) == 64 * 8 * 96  # gradients of keys and values; a table of weights has 64 * 16 * 64


# --- several processes ---

GRADIENTS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import llip
llip.CHUNK["cpu"] = 2 * 15 * (6 + 12 + 15)  # two images at a time, then the third
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)
content = torch.load("batch.pt", weights_only=True)
model = llip.Llip(llip.Config(**content["config"])).double()
model.load_state_dict(content["weights"])
loss = model(**{name: x.chunk(2)[rank] for name, x in content["batch"].items()})["loss"]
results = [x.clone() / 2 for x in (loss.detach(), *torch.autograd.grad(loss, model.parameters()))]
for x in results:  # averaged as DistributedDataParallel does
    dist.all_reduce(x)
if rank == 0:
    torch.save(results, "results.pt")
del loss  # or the process group outlives its end
dist.barrier()
dist.destroy_process_group()
"""
KEY_BIAS = "image_encoder.k_norm.bias"  # what is added to all keys alike cancels in the softmax


def test_gradients_of_two_processes_equal_one_and_the_plain_formula(tmp_path):
    model = lively(mixing_norm=True, temperature=0.5)
    model.logit_scale.data, model.logit_bias.data = torch.tensor([1.0, -1.0]).double()  # so that every pair is felt
    batch = {"images": torch.randn(6, 3, 24, 24, dtype=torch.float64), "tokens": some_tokens(4, 5, 6, 7, 8, 9)}
    torch.save({"config": asdict(model.config), "weights": model.state_dict(), "batch": batch}, tmp_path / "batch.pt")
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    command = [sys.executable, "gradients.py", str(Path(llip.__file__).parent)]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], cwd=tmp_path, text=True,
                                  stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
                 for rank in range(2)]
    features = model.encode_image(batch["images"]), model.encode_text(batch["tokens"])
    plain = plain_loss(*features, model.out_proj, model.logit_scale.exp(), model.logit_bias, 0.5)
    one, expected = ([loss.detach(), *torch.autograd.grad(loss, model.parameters())]
                     for loss in (model(**batch)["loss"], plain))
    for process in processes:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error[-3000:]
    two = torch.load(tmp_path / "results.pt", weights_only=True)
    for name, a, b, c in zip(["loss", *dict(model.named_parameters())], one, two, expected, strict=True):
        assert c.norm() > 1e-6 or name == KEY_BIAS, name
        assert max((a - b).norm(), (a - c).norm()) <= 1e-11 * c.norm() + 1e-14, name


# --- the towers ---

def norm(x, layer):
    """LayerNorm, by its definition."""
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def steps(x, blocks, **options):
    for block in blocks:
        x = x + block.attn(norm(x, block.ln_1), **options)
        x = x + block.mlp(norm(x, block.ln_2))
    return x[0]


@pytest.mark.parametrize("mixing_norm", [False, True])
def test_the_image_tower_step_by_step(mixing_norm):
    model, images = lively(mixing_norm=mixing_norm), torch.randn(2, 3, 24, 24, dtype=torch.float64)
    tower, seen = model.image_encoder, []
    tower.ln_post.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    with torch.no_grad():
        found = model.encode_image(images)
        for i in range(2):
            patches = [tower.conv1.weight.flatten(1) @ images[i, :, y:y + 8, x:x + 8].flatten()
                       for y in (0, 8, 16) for x in (0, 8, 16)]
            x = torch.cat([tower.class_embedding, torch.stack(patches)]) + tower.positional_embedding
            x = steps(norm(x[None], tower.ln_pre), tower.blocks)
            for n in range(5):
                for part, matrices, layer in ((found.keys, tower.k_proj, tower.k_norm),
                                              (found.values, tower.v_proj, tower.v_norm)):
                    expected = norm(x[n], tower.ln_post) @ matrices[n]
                    expected = norm(expected, layer) if mixing_norm else expected
                    torch.testing.assert_close(part[i, :, n].flatten(), expected, rtol=0, atol=1e-11)
    assert found.keys.shape == found.values.shape == (2, 3, 5, 4) and seen == [(2, 5, 32)]  # no patch needs ln_post


def test_every_token_has_matrices_of_its_own():
    model, images, order = lively(), some_images(2), torch.tensor([3, 0, 4, 1, 2])
    tower, old = model.image_encoder, copy.deepcopy(model.image_encoder)
    with torch.no_grad():
        before = model.encode_image(images)
        tower.k_proj.copy_(old.k_proj[order])
        other = model.encode_image(images)
        assert torch.equal(other.values, before.values)
        assert ((other.keys - before.keys).abs().amax(dim=(0, 1, 3)) > 0.1).all()
        for name in ("v_proj", "class_embedding"):
            getattr(tower, name).copy_(getattr(old, name)[order])
        tower.positional_embedding[:5] = old.positional_embedding[order]
        for found, expected in zip(model.encode_image(images), before):  # with all that is theirs, they have no order
            torch.testing.assert_close(found, expected[:, :, order], rtol=0, atol=1e-11)


@pytest.mark.parametrize("mixing_norm", [False, True])
def test_the_text_tower_step_by_step(mixing_norm):
    """Each text by itself, cut behind its first end: what follows it has no influence."""
    model, tokens = lively(mixing_norm=mixing_norm), some_tokens(4, 7, 10)
    tokens[0, 4:] = torch.tensor([9, 49, 2, 7, 2, 2])  # noise, and further ends
    tower = model.text_encoder
    with torch.no_grad():
        found = model.encode_text(tokens)
        for i, length in enumerate((4, 7, 10)):
            x = tower.token_embedding.weight[tokens[i, :length]] + tower.positional_embedding[:length]
            state = norm(steps(x[None], tower.blocks, causal=True)[-1], tower.ln_final)
            query, target = state @ tower.q_proj, state @ tower.text_projection
            query = norm(query, tower.q_norm) if mixing_norm else query
            torch.testing.assert_close(found.query[i].flatten(), query, rtol=0, atol=1e-11)
            torch.testing.assert_close(found.target[i], target / target.square().sum().sqrt(), rtol=0, atol=1e-11)
    assert found.query.shape == (3, 3, 4) and found.target.shape == (3, 12)


def test_features_of_pixels_and_under_autocast():
    model, images, tokens = small(), some_images(3), some_tokens(4, 7, 5)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        exact = [*model.encode_image((images / 255 - mean) / std), *model.encode_text(tokens)]
        for found, expected in zip(model.encode_image(images), exact):
            torch.testing.assert_close(found, expected)
        with torch.autocast("cpu", torch.bfloat16):
            rough, loss = [*model.encode_image(images), *model.encode_text(tokens)], model(images, tokens)["loss"]
    assert {x.dtype for x in (*rough, loss)} == {torch.float32}
    torch.testing.assert_close(rough[3].norm(dim=1), torch.ones(3))  # targets
    for a, b in zip(rough, exact):
        assert 0.99 < F.cosine_similarity(a, b, dim=-1).min() < 1 - 1e-6


@pytest.mark.parametrize("call, message", [
    (lambda m: m.encode_text(torch.full((10,), 2)), r"tokens must be \(B, L\) with L <= 10, got \(10,\)"),
    (lambda m: m.encode_text(torch.full((2, 11), 2)), r"tokens must be \(B, L\) with L <= 10, got \(2, 11\)"),
    (lambda m: m.encode_text(torch.tensor([[1, 5, 2], [1, 5, 3]])), "a row of tokens has no end-of-text id 2"),
    (lambda m: m.encode_image(torch.zeros(3, 24, 24)), r"images must be \(B, 3, 24, 24\), got \(3, 24, 24\)"),
    (lambda m: m.encode_image(torch.zeros(1, 24, 24, 3)), r"images must be \(B, 3, 24, 24\), got \(1, 24, 24, 3\)"),
    (lambda m: m.encode_image(torch.zeros(1, 3, 32, 32)), r"images must be \(B, 3, 24, 24\), got \(1, 3, 32, 32\)"),
])
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())


# --- the model ---

def test_similarity_is_the_same_in_chunks_and_at_any_temperature(monkeypatch, sizes):
    *features, out_proj = some_features(7, 4)
    images, texts = packed(*features)
    model = small().double()
    model.out_proj.data = out_proj
    tables = {temperature: slow(*features, out_proj, temperature)[2] for temperature in (0.5, 2.0)}
    with torch.no_grad():
        for chunk in (1, 3 * 465 + 464, 2 ** 19):  # 15 x (4 + 12 + 15) an image
            monkeypatch.setitem(llip.CHUNK, "cpu", chunk)
            for model.temperature in (0.5, 2.0):
                torch.testing.assert_close(model.similarity(images, texts), tables[model.temperature], rtol=0,
                                           atol=1e-12)
        assert sizes == [1] * 14 + [3, 3, 1] * 2 + [7] * 2


def test_every_parameter_has_a_gradient_and_one_batch_overfits():
    model, batch = small(mixing_norm=True).train(), (some_images(8), some_tokens(*range(3, 11)))
    first = model(*batch)["loss"]
    first.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and (parameter.grad.abs().max() > 1e-6) == (name != KEY_BIAS), name
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(*batch)["loss"]
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        table = model.similarity(model.encode_image(batch[0]), model.encode_text(batch[1]))
    assert loss < first / 20
    assert (table.argmax(dim=1) == torch.arange(8)).all() and (table.argmax(dim=0) == torch.arange(8)).all()


def test_the_values_at_birth():
    model = small(image_width=64, image_size=96, text_width=256, embed_dim=192, mixture_tokens=8)
    image, text = model.image_encoder, model.text_encoder
    for tensor, std in ((image.k_proj, 1 / 8), (image.v_proj, 1 / 8), (image.class_embedding, 1 / 8),
                        (image.positional_embedding, 1 / 8), (text.q_proj, 1 / 16), (text.text_projection, 1 / 16),
                        (text.positional_embedding, 0.01), (model.out_proj, 192 ** -0.5)):
        assert tensor.std().item() == pytest.approx(std, rel=0.1) and tensor.mean().abs() < 0.15 * std
    for bias in (-10.0, -3.0):
        model = small(logit_bias=bias)
        assert model.logit_scale.item() == pytest.approx(2.6592, abs=1e-4) and model.logit_bias.item() == bias
        expected = math.log(1 + math.exp(-bias)) + 7 * math.log(1 + math.exp(bias))
        with torch.no_grad():  # without the scale, cosines hardly count
            model.logit_scale.fill_(-9.0)
            assert model(some_images(8), some_tokens(*range(3, 11)))["loss"].item() == pytest.approx(expected, abs=1e-2)
    assert Config().logit_bias == -10 and model.temperature == 2


def test_head_start_leaves_the_special_positions_alone():
    plain, tiny = (small(image_width=64, head_start=head_start).image_encoder for head_start in (False, True))
    before, after = plain.positional_embedding, tiny.positional_embedding
    assert torch.equal(before[:5], after[:5]) and (before[5:] != after[5:]).all()
    assert after[5, [0, 16, 32, 48]].tolist() == [0, 1, 0, 1]  # the first patch lies at place 0: sines and cosines
    white = tiny.conv1(torch.ones(1, 3, 24, 24)).abs().amax(dim=(0, 2, 3))
    assert white[:48].max() < 1e-4 < 1e-2 < white[48:].mean()


# --- published weights ---
# The golden files hold small weights in published names, and what the published implementation makes of them.

def golden(name="llip"):
    """-> the file's content, and its sizes as a Config."""
    reference = torch.load(HERE / "golden" / f"{name}.pt", weights_only=True)
    return reference, build_llip(reference)[0].config


def assert_features(model, reference):
    """In float64: the features and logits that the published implementation returned."""
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        images, texts = model.encode_image(reference["image"].double()), model.encode_text(reference["text"])
        logits = model.logit_scale.exp() * model.similarity(images, texts) + model.logit_bias
    for ours, name in zip((*images, *texts, logits), ("keys", "values", "queries", "text_features", "logits")):
        assert (ours - reference[name]).abs().max() <= 1e-8 * reference[name].abs().max(), name


FORMATS = {  # what becomes of the names, and of the state dict in published names
    "published": (lambda name: name, lambda state: state),
    "a training checkpoint": (lambda name: f"module.{name}", lambda state: {"epoch": 3, "state_dict": state}),
    "compiled, then wrapped": (lambda name: f"module._orig_mod.{name}", lambda state: state),
    "wrapped, then compiled": (lambda name: f"_orig_mod.module.{name}", lambda state: {"state_dict": state}),
    "out_proj at the top": (lambda name: name.removeprefix("pred."), lambda state: state),
    "tokens in a batch": (lambda name: name, lambda state: {
        name: value[None] if name.endswith("class_embedding") else value for name, value in state.items()}),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["llip", "llip_norm"])
def test_every_format_gives_the_published_features(tmp_path, form, name):
    (reference, config), (called, wrapped) = golden(name), FORMATS[form]
    torch.save(wrapped({called(n): value for n, value in reference["state_dict"].items()}), tmp_path / "weights.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_features(Llip.from_pretrained(tmp_path / "weights.pt", config), reference)


@pytest.mark.parametrize("shape", [(32,), (1, 32), (1, 1, 32)])
def test_one_token_may_come_as_a_vector_and_its_own_names_load_too(shape):
    model = small(mixture_tokens=1, mixing_norm=True)
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    token = {"image_encoder.class_embedding": state["image_encoder.class_embedding"].view(shape)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = Llip.from_pretrained(state | token, model.config).state_dict()
    assert set(loaded) == set(state) and all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("name, published, parameters, tokens, head", [
    ("vit-b-32-k64", "ViT-B-32-quickgelu-siglip-ncls:64", 201_836_802, 64, 64),
    ("vit-b-16-k32", "ViT-B-16-quickgelu-siglip-ncls:32", 174_965_250, 32, 64),
    ("vit-l-14-k32", "ViT-L-14-quickgelu-siglip-ncls:32", 478_394_882, 32, 64),
    ("vit-l-14-k64", "ViT-L-14-quickgelu-siglip-ncls:64", 528_802_050, 64, 64),
    ("vit-h-14-k64", "ViT-H-14-quickgelu-siglip-ncls:64-norm", 1_154_835_458, 64, 80),
    ("vit-g-14-k64", "ViT-bigG-14-quickgelu-siglip-ncls:64-norm", 2_813_561_090, 64, 104)])
def test_published_checkpoints_load_strictly_and_have_the_published_size(name, published, parameters, tokens, head):
    entry = json.loads(gzip.open(HERE / "golden" / "shapes.json.gz").read())[f"llip/{published}"]
    with torch.device("meta"):  # shapes without memory
        state = {key: torch.empty(shape) for key, shape in entry["keys"].items()}
        model = Llip.from_pretrained(state)  # the size is found by names and shapes
        assert model.config == CONFIGS[name]
        assert sum(p.numel() for p in model.parameters()) == entry["params"] == parameters
        del state["pred.out_proj"]
        with pytest.raises(ValueError, match="1 missing: out_proj\n  1 unexpected: surplus$"):
            Llip.from_pretrained(state | {"surplus": torch.empty(1)}, CONFIGS[name])
    c = model.config
    assert (c.mixture_tokens, c.mixing_norm) == (tokens, published.endswith("-norm"))
    assert (c.image_width // c.image_heads, c.text_width // c.text_heads) == (head, 64)  # and the rest no shape tells:
    assert (c.activation, c.end_id, c.image_size, c.mixing_heads, c.head_start) == ("quick_gelu", 49407, 224, 8, False)


def test_published_names_are_downloaded(tmp_path, monkeypatch):
    (reference, config), asked = golden(), []

    def download(url, path, md5=None, sha256=None):
        asked.append(url)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"epoch": 1, "state_dict": reference["state_dict"]}, path)
        return Path(path)
    monkeypatch.setattr(data, "download", download)
    monkeypatch.setitem(CONFIGS, "vit-b-16-k32", config)  # a small one in its place
    assert_features(Llip.from_pretrained("vit-b-16-k32", cache=tmp_path / "cache"), reference)
    assert asked == ["https://dl.fbaipublicfiles.com/llip/llip_b16_k32.pt", llip.VOCABULARY[0]]
    with pytest.warns(UserWarning, match="resized to 6 x 6"):  # a config of one's own wins over the name's
        model = Llip.from_pretrained("vit-b-16-k32", replace(config, image_size=48), cache=tmp_path / "cache")
    assert model.config.image_size == 48
    assert PUBLISHED["vit-g-14-k64"]["source"][0] == "https://dl.fbaipublicfiles.com/llip/llip_G14_k64.pt"


def test_unknown_names_list_the_known(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="vit-b-32: no such file, and no published Llip; .*vit-b-16-k32, vit-g-14-k64"):
        Llip.from_pretrained("vit-b-32", cache=tmp_path)
    monkeypatch.setattr(llip, "CONFIGS", {"one": SMALL, "another": SMALL})
    with pytest.raises(ValueError, match="'huge'; known: one, another"):
        Llip.from_pretrained({}, "huge")
    with pytest.raises(ValueError, match="Llip is made of a Config, got a dict"):
        Llip.from_pretrained({}, {"image_size": 24})


@pytest.mark.parametrize("old, new", [(2, 4), (3, 7), (4, 2)])
def test_resized_positions_equal_pillows(old, new):
    table = torch.randn(5 + old ** 2, 32, generator=torch.Generator().manual_seed(0))
    state = small(image_size=8 * old).state_dict() | {"image_encoder.positional_embedding": table}
    with pytest.warns(UserWarning, match=f"{old} x {old} patches, resized to {new} x {new}"):
        model = Llip.from_pretrained(state, replace(SMALL, image_size=8 * new))
    found = model.image_encoder.positional_embedding.detach()
    assert torch.equal(found[:5], table[:5])  # mixture tokens are nowhere on the picture
    for channel in range(32):
        grid = Image.fromarray(table[5:, channel].reshape(old, old).numpy())
        expected = torch.from_numpy(np.array(grid.resize((new, new), Image.Resampling.BICUBIC)))
        torch.testing.assert_close(found[5:, channel].view(new, new), expected, rtol=0, atol=1e-5)
    assert model.encode_image(some_images(2, 8 * new)).values.isfinite().all()


def test_what_does_not_fit_is_reported_in_groups(monkeypatch):
    reference, config = golden()
    state = {name: value for name, value in reference["state_dict"].items() if ".ln_1." not in name}
    state |= {"visual.conv1.weight": torch.zeros(32, 3, 4, 4), "surplus": torch.zeros(1)}
    with pytest.raises(ValueError, match=re.escape("do not fit Llip:\n  8 missing: image_encoder.blocks.0.ln_1.weight; "
                                                   ) + r".*, \.\.\.\n  1 unexpected: surplus\n  1 wrong shape: "
                       r"image_encoder.conv1.weight \(32, 3, 4, 4\), expected \(32, 3, 8, 8\)$"):
        Llip.from_pretrained(state, config)
    monkeypatch.setattr(llip, "CONFIGS", {"other": replace(config, mixture_tokens=6), "one": SMALL})
    with pytest.raises(ValueError, match=r"k_proj \(5, 32, 20\), expected \(6, 32, 20\)") as error:
        Llip.from_pretrained(reference["state_dict"], "other")
    assert "it would fit" not in str(error.value)
    with pytest.raises(ValueError, match="do not fit Llip(.|\n)*of other, one none would fit"):
        Llip.from_pretrained(reference["state_dict"])
    llip.CONFIGS["fitting"] = config
    with pytest.raises(ValueError, match="it would fit config='fitting'"):
        Llip.from_pretrained(reference["state_dict"], "other")
    assert_features(Llip.from_pretrained(reference["state_dict"]), reference)


# --- in use ---

@pytest.fixture
def loaded(monkeypatch):
    """Where train.load would be: a small model, and a picture whatever the path -> each label's cosine and share."""
    model, picture, found = lively().float(), some_images(1)[0], {}
    train = SimpleNamespace(load=lambda path: (model, Words(), lambda image: picture))
    monkeypatch.setitem(sys.modules, "train", train)
    with torch.no_grad():
        for label in ("a cat", "a dog", "x"):  # each by itself
            text = model.encode_text(torch.tensor([[1, *Words().encode(label), 2]]))
            found[label] = slow(*model.encode_image(picture[None]), *text, model.out_proj, 2.0)[2].item()
    weights = {label: math.exp(model.logit_scale.exp().item() * cosine) for label, cosine in found.items()}
    return {label: (found[label], weights[label] / sum(weights.values())) for label in found}


def test_the_pipeline_ranks_labels_by_the_softmax_of_scaled_cosines(loaded):
    pipeline, labels = llip.ZeroShotPipeline("best.pt"), list(loaded)
    best = sorted(labels, key=loaded.get, reverse=True)
    found = pipeline.predict("cat.jpg", labels)
    assert [label for label, _ in found] == best
    assert [p for _, p in found] == pytest.approx([loaded[label][1] for label in best], rel=1e-3)
    assert pipeline.predict("cat.jpg", labels, top_k=1) == found[:1]
    assert pipeline.cosines("cat.jpg", labels).tolist() == pytest.approx([c for c, _ in loaded.values()], abs=1e-5)
    for wrong in ("a cat", ["a cat"], []):
        with pytest.raises(ValueError, match="two or more"):
            pipeline.predict("cat.jpg", wrong)


def test_the_command_prints_probabilities_and_cosines(loaded, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["llip.py", "best.pt", "cat.jpg", *loaded])
    runpy.run_path(llip.__file__, run_name="__main__")
    best = sorted(loaded, key=loaded.get, reverse=True)
    for label, line in zip(best, capsys.readouterr().out.splitlines(), strict=True):
        share, cosine = re.fullmatch(rf" *([\d.]+)%  cosine ([+-]\d\.\d\d\d)  {label}", line).groups()
        assert float(cosine) == pytest.approx(loaded[label][0], abs=6e-4)
        assert float(share) == pytest.approx(100 * loaded[label][1], abs=0.06)
    monkeypatch.setattr(sys, "argv", ["llip.py", "best.pt", "cat.jpg", "a cat"])
    with pytest.raises(SystemExit, match="usage: python llip.py .*two or more"):
        runpy.run_path(llip.__file__, run_name="__main__")


def test_the_file_stands_alone(tmp_path):
    shutil.copy(llip.__file__, tmp_path)
    code = ("import sys; before = set(sys.modules); import torch; import llip\n"
            "config = llip.CONFIGS['tiny']\n"
            "images = torch.zeros(2, 3, config.image_size, config.image_size)\n"
            "tokens = torch.full((2, config.context_length), config.end_id)\n"
            "assert llip.Llip(config)(images, tokens)['loss'].isfinite()\n"
            "print(not {'data', 'train', 'clip', 'torchvision', 'PIL', 'safetensors'} & set(sys.modules) - before)")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("True\n", "")
