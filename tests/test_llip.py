"""llip.py: mixtures, cosines and the loss against slow loops and the plain formula, in chunks and in little memory; two
processes; published shapes. That the towers compute what the published code computes is in test_golden.py."""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import llip
from llip import (Config, KeysValues, Llip, QueryTarget, mixing_weights, mixture_cosines, mixture_loss, mixtures,
                  plain_cosines)
from tools import (assert_close, assert_images_are_normalised, assert_two_processes_equal_one, lively, load_published,
                   overfit, some_images, some_tokens)

# heads, tokens and numbers a head are all different: M = 3, K = 5, d = 4
SMALL = Config(image_size=24, patch_size=8, image_width=32, image_layers=2, image_heads=4, image_mlp=64, vocab_size=50,
               end_id=2, context_length=10, text_width=24, text_layers=2, text_heads=4, text_mlp=48, embed_dim=12,
               mixture_tokens=5, mixing_heads=3, temperature=2.0)
KEY_BIAS = "image_encoder.k_norm.bias"  # what is added to all keys alike cancels in the softmax


def small(**changes):
    torch.manual_seed(0)
    return Llip(replace(SMALL, **changes)).eval()


def some_features(images, texts, M=3, K=5, d=4):
    """Keys, values, query, target and out_proj, in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = (images, M, K, d), (images, M, K, d), (texts, M, d), (texts, M * d), (M * d, M * d)
    features = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return *features[:3], F.normalize(features[3], dim=-1), features[4]


def packed(keys, values, query, target, *rest):
    """The same, as the functions take them."""
    return KeysValues(keys, values), QueryTarget(query, target), *rest


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
    assert_close(found, weights, atol=1e-13)
    assert_close(mixtures(*packed(*features), temperature), mixed)
    for length, form in itertools.product((1e-5, 1, 1000), (plain_cosines, mixture_cosines)):  # it changes no cosine
        assert_close(form(*packed(keys, length * values, query, *rest), temperature), cosine)


def test_at_its_limits_temperature_takes_the_mean_or_the_best_token():
    keys, values, query, target, out_proj = features = some_features(4, 6)
    mean = F.normalize(values.mean(dim=2).flatten(1) @ out_proj, dim=-1) @ target.T
    assert_close(mixture_cosines(*packed(*features), 1e12), mean)
    best, chosen = torch.zeros(4, 6, dtype=torch.float64), set()
    for i, j in itertools.product(range(4), range(6)):
        tokens = [max(range(5), key=lambda n: keys[i, m, n] @ query[j, m]) for m in range(3)]
        chosen.add(tuple(tokens))
        z = torch.cat([values[i, m, n] for m, n in enumerate(tokens)]) @ out_proj
        best[i, j] = z @ target[j] / z.norm()
    assert len(chosen) > 10  # every head chooses by itself
    assert_close(mixture_cosines(*packed(*features), 1e-4), best)


def test_cosines_stay_in_range_where_values_nearly_cancel():
    keys, values, query, target, out_proj = (x.float() for x in some_features(64, 64))
    values = torch.cat([values[:, :, :1], -values[:, :, :1] * (1 + 1e-6)], dim=2)  # two tokens with the same key
    found = mixture_cosines((keys[:, :, [0, 0]], 1e4 * values), (query, target), out_proj, 1.0)
    assert found.isfinite().all() and found.abs().max() <= 1


# --- in chunks, in little memory ---

@pytest.mark.parametrize("numbers, expected", [(1, [1] * 7), (3 * 525 + 524, [3, 3, 1]), (2 ** 19, [7])])
def test_in_chunks_cosines_and_their_gradients_equal_the_plain_formula(monkeypatch, numbers, expected):
    sizes, chunk_cosines = [], llip.chunk_cosines
    monkeypatch.setattr(llip, "chunk_cosines", lambda k, *rest: sizes.append(len(k)) or chunk_cosines(k, *rest))
    monkeypatch.setitem(llip.CHUNK, "cpu", numbers)  # 3 heads of 5 tokens, 8 texts, E 12: 15 x (8 + 12 + 15) an image
    upstream = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for form in (mixture_cosines, plain_cosines):
        leaves = [x.requires_grad_() for x in some_features(7, 8)]
        table = form(*packed(*leaves), 0.7)
        if form is mixture_cosines:
            assert sizes == expected
        results.append([table, *torch.autograd.grad((table * upstream).sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert theirs.abs().max() > 1e-2
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


def memory(form):
    """For 64 images and texts, 2 heads of 8 tokens, E = 96: the largest tensor, and the sum of what the backward pass
    finds stored."""
    leaves, stored = [x.requires_grad_() for x in some_features(64, 64, M=2, K=8, d=48)], {}

    def pack(x):
        stored[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 8
        return x
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        form(*packed(*leaves), 1.0).square().sum().backward()
    return largest.numel, sum(stored.values())


def test_neither_mixtures_nor_all_weights_are_held(monkeypatch):
    """Nothing is as large as mixtures, (I, T, E), would be; in chunks, nothing as large as weights, (I, M K, T)."""
    whole, stored = memory(plain_cosines)
    assert whole == 64 * 64 * 96 and stored > 2 * whole
    assert memory(mixture_cosines)[0] == 64 * 16 * 96  # values, seen from each head
    monkeypatch.setitem(llip.CHUNK, "cpu", 1)
    largest, few = memory(mixture_cosines)
    assert largest == 64 * 8 * 96  # keys and values themselves; weights would be 64 * 16 * 64
    assert few < stored / 5


# --- the loss ---

def test_the_loss_of_two_pairs_by_hand():
    """At temperature 2, a score of 2 ln 3 against 0 gives weights of 3/4 and 1/4."""
    keys = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])  # the second image's are all alike
    values = torch.tensor([[[[4.0, 0.0], [0.0, 4.0]]], [[[2.0, 0.0], [0.0, 2.0]]]])
    query, target = 2 * math.log(3) * torch.eye(2)[:, None], torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # mixtures (3, 1), (1, 3) and (1, 1), (1, 1); after out_proj (3, 3), (1, 9) and (1, 3), (1, 3)
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


def numbers(features, autocast):
    """The loss, similarities, and the loss's gradients, at settings where rounding counts."""
    leaves, model = [x.detach().requires_grad_() for x in features], small()
    model.out_proj.data = features[4]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = mixture_loss(*packed(*leaves), torch.tensor(20.0), torch.tensor(-5.0), 0.5)
        table = model.similarity(*packed(*features)[:2]).detach()
    return [loss, table, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("chunk", [1, 2 ** 19])
def test_all_is_computed_in_fp32_under_autocast_and_from_half_precision(monkeypatch, chunk):
    monkeypatch.setitem(llip.CHUNK, "cpu", chunk)
    half = [x.bfloat16() for x in some_features(9, 9)]
    single = [x.float() for x in half]
    plain, autocast, from_half = numbers(single, False), numbers(single, True), numbers(half, True)
    for i in range(len(plain)):
        assert plain[i].dtype == torch.float32 and torch.equal(autocast[i], plain[i])
        assert torch.equal(from_half[i], plain[i].bfloat16() if i > 1 else plain[i])  # gradients have the inputs' type


def test_two_processes_equal_one(tmp_path):
    model = lively(small(mixing_norm=True, temperature=0.5))
    model.logit_scale.data, model.logit_bias.data = torch.tensor([1.0, -1.0]).double()  # so that every pair counts
    batch = {"images": torch.randn(6, 3, 24, 24, dtype=torch.float64), "tokens": some_tokens(4, 5, 6, 7, 8, 9)}
    assert_two_processes_equal_one(llip, model, [batch], tmp_path)


# --- the model ---

@torch.no_grad()
def test_what_follows_a_texts_first_end_has_no_influence():
    model, tokens = lively(small()), some_tokens(4, 7, 10)
    noisy = tokens.clone()
    noisy[0, 4:], noisy[1, 7:] = torch.tensor([9, 49, 2, 7, 2, 2]), torch.tensor([2, 5, 6])
    for found, expected in zip(model.encode_text(noisy), model.encode_text(tokens)):
        assert_close(found, expected)


@torch.no_grad()
def test_features_of_pixels_and_under_autocast():
    model, images, tokens = small(), some_images(3), some_tokens(4, 7, 5)
    assert_images_are_normalised(model, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    exact = [*model.encode_image(images), *model.encode_text(tokens)]
    with torch.autocast("cpu", torch.bfloat16):
        rough, loss = [*model.encode_image(images), *model.encode_text(tokens)], model(images, tokens)["loss"]
    assert {x.dtype for x in (*rough, loss)} == {torch.float32}
    torch.testing.assert_close(rough[3].norm(dim=1), torch.ones(3))  # targets
    for a, b in zip(rough, exact):
        assert 0.99 < F.cosine_similarity(a, b, dim=-1).min() < 1 - 1e-6


@torch.no_grad()
def test_similarity_and_logits_at_any_temperature():
    model, images, tokens = lively(small()), some_images(7), some_tokens(4, 7, 5, 9)
    features = model.encode_image(images), model.encode_text(tokens)
    for model.temperature in (0.5, 2.0):
        expected = slow(*features[0], *features[1], model.out_proj, model.temperature)[2]
        assert_close(model.similarity(*features), expected)
        assert_close(model.logits(images, tokens), model.logit_scale.exp() * expected + model.logit_bias)


def test_every_parameter_has_a_gradient_and_one_batch_overfits():
    model, batch = small(mixing_norm=True), {"images": some_images(8), "tokens": some_tokens(*range(3, 11))}
    first, last = overfit(model, batch, steps=60, lr=2e-3, without=[KEY_BIAS])
    with torch.no_grad():
        table = model.similarity(model.encode_image(batch["images"]), model.encode_text(batch["tokens"]))
    assert last["loss"] < first["loss"] / 20
    assert (table.argmax(dim=1) == torch.arange(8)).all() and (table.argmax(dim=0) == torch.arange(8)).all()


def test_the_initial_values():
    model = small(image_width=64, image_size=96, text_width=256, embed_dim=192, mixture_tokens=8)
    image, text = model.image_encoder, model.text_encoder
    for tensor, std in ((image.k_proj, 1 / 8), (image.v_proj, 1 / 8), (image.class_embedding, 1 / 8),
                        (image.positional_embedding, 1 / 8), (text.q_proj, 1 / 16), (text.text_projection, 1 / 16),
                        (text.positional_embedding, 0.01), (model.out_proj, 192 ** -0.5)):
        assert tensor.std().item() == pytest.approx(std, rel=0.1) and tensor.mean().abs() < 0.15 * std
    for bias in (-10.0, -3.0):
        model = small(logit_bias=bias)
        assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07)) and model.logit_bias.item() == bias
        expected = math.log(1 + math.exp(-bias)) + 7 * math.log(1 + math.exp(bias))
        with torch.no_grad():  # without the scale, cosines hardly count
            model.logit_scale.fill_(-9.0)
            assert model(some_images(8), some_tokens(*range(3, 11)))["loss"].item() == pytest.approx(expected, abs=1e-2)


# --- published weights ---

@pytest.mark.parametrize("name, published, parameters, tokens, head", [
    ("vit-b-32-k64", "ViT-B-32-quickgelu-siglip-ncls:64", 201_836_802, 64, 64),
    ("vit-b-16-k32", "ViT-B-16-quickgelu-siglip-ncls:32", 174_965_250, 32, 64),
    ("vit-l-14-k32", "ViT-L-14-quickgelu-siglip-ncls:32", 478_394_882, 32, 64),
    ("vit-l-14-k64", "ViT-L-14-quickgelu-siglip-ncls:64", 528_802_050, 64, 64),
    ("vit-h-14-k64", "ViT-H-14-quickgelu-siglip-ncls:64-norm", 1_154_835_458, 64, 80),
    ("vit-g-14-k64", "ViT-bigG-14-quickgelu-siglip-ncls:64-norm", 2_813_561_090, 64, 104)])
def test_published_checkpoints_load_strictly_and_have_the_published_size(name, published, parameters, tokens, head):
    c, found = load_published(Llip, f"llip/{published}", name)
    assert found == parameters and (c.mixture_tokens, c.mixing_norm) == (tokens, published.endswith("-norm"))
    assert (c.image_width // c.image_heads, c.text_width // c.text_heads) == (head, 64)  # and the rest no shape tells:
    assert (c.end_id, c.image_size, c.mixing_heads, c.temperature) == (49407, 224, 8, 1 if "-l-" in name else 5)


@pytest.mark.parametrize("shape", [(32,), (1, 32), (1, 1, 32)])
def test_one_token_may_come_as_a_vector_and_out_proj_under_its_own_name(shape):
    model = small(mixture_tokens=1)
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    token = {"image_encoder.class_embedding": state["image_encoder.class_embedding"].view(shape)}
    loaded = Llip.from_pretrained(state | token, model.config).state_dict()
    assert set(loaded) == set(state) and all(torch.equal(loaded[name], state[name]) for name in state)
