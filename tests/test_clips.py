"""clips.py: its towers and captioner by hand, what the captioner may see, its losses against slow loops, which captions
a step sees, weights in the hub's form, and what it says of unfit input."""
import collections
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
import string
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

import clips
import data
from clips import CLIPS, CONFIGS, PUBLISHED, Config, caption_losses, caption_mask, load_strictly, mean_of_all, shorten

HERE = Path(__file__).parent
SMALL = Config(image_size=24, patch_size=8, image_width=32, image_layers=2, image_heads=4, image_mlp=64, vocab_size=50,
               class_id=3, context_length=12, text_width=24, text_layers=2, text_heads=4, text_mlp=48, embed_dim=16,
               caption_layers=2, caption_length=8)


def small(**changes):
    torch.manual_seed(0)
    return CLIPS(replace(SMALL, **changes)).eval()


def lively(**changes):
    """In float64, with every parameter moved a little from its start, so that each bias and norm has an effect."""
    model = small(**changes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def some_tokens(*lengths, seed=1):
    """Rows as `tokenize` lays them out: 1 at the start, 2 at the end, 0 behind it, 3 in the last place."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(len(lengths), 12, dtype=torch.long)
    for i, n in enumerate(lengths):
        tokens[i, :n] = torch.randint(4, 50, (n,), generator=generator)
        tokens[i, 0], tokens[i, n - 1], tokens[i, -1] = 1, 2, 3
    return tokens


def some_images(n, size=24):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def some_batch(*lengths):
    """What forward needs for as many pictures, in float64; lengths: of the whole synthetic captions."""
    generator, n = torch.Generator().manual_seed(3), len(lengths)
    targets = torch.randint(4, 50, (n, 8), generator=generator)
    return {"images": torch.randn(n, 3, 24, 24, dtype=torch.float64, generator=generator),
            "web_tokens": some_tokens(*(4 + i % 6 for i in range(n))),
            "sub_tokens": some_tokens(*(9 - i % 5 for i in range(n)), seed=4),
            "targets": targets.masked_fill(torch.arange(8) >= torch.tensor(lengths)[:, None], 0)}


class Letters:
    """A tokenizer for tests: every letter is a piece, 46 of them."""
    pad_id, start_id, end_id = 0, 1, 2
    known = string.ascii_lowercase + string.digits + " .!?,'-+*="

    def encode(self, text):
        return [4 + self.known.index(c) for c in text]

    def __len__(self):
        return 4 + len(self.known)

    def decode(self, ids):
        return "".join(self.known[i - 4] if i > 3 else f"<{i}>" for i in ids)


# --- by hand ---

def norm(x, layer):
    """LayerNorm, by its definition."""
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))) / 2


def block_by_hand(block, x, seen, activation, heads=4):
    """A pre-LN block for the rows x, which see the rows `seen` and no others."""
    a, m = block.attn, block.mlp
    q = norm(x, block.ln_1) @ a.in_proj.weight.T + a.in_proj.bias
    kv = norm(seen, block.ln_1) @ a.in_proj.weight.T + a.in_proj.bias
    (width, rows), found = (x.shape[1], len(x)), []
    for part in torch.arange(width).chunk(heads):
        weights = q[:, part] @ kv[:, width + part].T / math.sqrt(len(part))
        weights = weights.exp() / weights.exp().sum(dim=1, keepdim=True)
        found.append(weights @ kv[:, 2 * width + part])
    x = x + torch.cat(found, dim=1).view(rows, width) @ a.out_proj.weight.T + a.out_proj.bias
    hidden = activation(norm(x, block.ln_2) @ m.c_fc.weight.T + m.c_fc.bias)
    return x + hidden @ m.c_proj.weight.T + m.c_proj.bias


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@torch.no_grad()
def test_the_image_tower_step_by_step():
    model, images = lively(), torch.randn(2, 3, 24, 24, dtype=torch.float64)
    tower, (features, states) = model.image_encoder, model.image_feature_and_states(images)
    for image, feature, state in zip(images, features, states):
        patches = [tower.conv1.weight.flatten(1) @ image[:, y:y + 8, x:x + 8].flatten()
                   for y in (0, 8, 16) for x in (0, 8, 16)]
        x = torch.stack([tower.class_embedding, *patches]) + tower.positional_embedding
        for block in tower.blocks:
            x = block_by_hand(block, x, x, gelu)
        assert_close(state, x[1:])
        pooled = norm(x[1:].sum(dim=0) / 9, tower.ln_post) @ tower.proj
        assert_close(feature, pooled / pooled.square().sum().sqrt())
    assert torch.equal(features, model.encode_image(images)) and states.shape == (2, 9, 32)


@torch.no_grad()
def test_the_text_tower_step_by_step():
    model, tokens = lively(), some_tokens(4, 7, 11)
    tower, (features, states) = model.text_encoder, model.text_feature_and_states(tokens)
    for row, feature, state in zip(tokens.tolist(), features, states):
        x = torch.stack([tower.token_embedding.weight[i] for i in row]) + tower.positional_embedding
        for block in tower.blocks:
            x = block_by_hand(block, x, x, gelu_tanh)
        assert_close(state, x[:-1])
        last = norm(x[-1], tower.ln_final) @ tower.text_projection
        assert_close(feature, last / last.square().sum().sqrt())
    assert torch.equal(features, model.encode_text(tokens)) and states.shape == (3, 11, 24)


@torch.no_grad()
def test_the_captioner_step_by_step():
    model, images, tokens = lively(), torch.randn(2, 3, 24, 24, dtype=torch.float64), some_tokens(4, 9)
    captioner, patches, words = model.captioner, model.image_feature_and_states(images)[1], model.text_feature_and_states(tokens)[1]
    found = captioner(patches, words)
    for i in range(2):
        prefix = torch.cat([patches[i] @ captioner.image_proj.weight.T, words[i] @ captioner.text_proj.weight.T])
        slots = captioner.slot_embedding
        for block in captioner.blocks:
            slots, prefix = (torch.cat([block_by_hand(block, slots[j:j + 1], torch.cat([prefix, slots[:j + 1]]),
                                                      gelu_tanh) for j in range(8)]),
                             block_by_hand(block, prefix, prefix, gelu_tanh))
        assert_close(found[i], norm(slots, captioner.ln))


@torch.no_grad()
def test_a_text_is_seen_whole_and_its_padding_too():
    model, tokens, first = lively(), some_tokens(6), []
    model.text_encoder.blocks[0].register_forward_hook(lambda module, args, output: first.append(output))
    features = model.encode_text(tokens)
    for place in range(12):
        changed = tokens.clone()
        changed[0, place] = 40
        assert (model.encode_text(changed) - features).abs().max() > 1e-4
        assert (first[-1] - first[0]).abs().amax(dim=2).min() > 1e-6  # the first word sees the last
    padded = [lively(pad_id=pad).tokenize(["a dog"], Letters()) for pad in (0, 7)]
    assert (model.encode_text(padded[0]) - model.encode_text(padded[1])).abs().max() > 1e-3


@torch.no_grad()
def test_pixels_equal_normalised_floats():
    model, images = small(), some_images(3)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(model.encode_image(images), model.encode_image((images / 255 - mean) / std))


@pytest.mark.parametrize("call, message", [
    (lambda m: m.tokenize("a red star", Letters()), r"texts must be a list of at least one text, got 'a red star'"),
    (lambda m: m.tokenize([], Letters()), r"texts must be a list of at least one text, got \[\]"),
    (lambda m: m.encode_text(torch.zeros(12, dtype=torch.long)), r"tokens must be \(B, 12\).*got \(12,\)"),
    (lambda m: m.encode_text(torch.full((1, 7), 2)), r"tokens must be \(B, 12\), as tokenize.*got \(1, 7\)"),
    (lambda m: m.encode_text(torch.full((2, 13), 2)), r"tokens must be \(B, 12\).*got \(2, 13\)"),
    (lambda m: m.encode_image(torch.zeros(3, 24, 24)), r"images must be \(B, 3, 24, 24\), got \(3, 24, 24\)"),
    (lambda m: m.encode_image(torch.zeros(1, 24, 24, 3)), r"images must be \(B, 3, 24, 24\), got \(1, 24, 24, 3\)"),
    (lambda m: m.encode_image(torch.zeros(1, 3, 32, 32)), r"images must be \(B, 3, 24, 24\), got \(1, 3, 32, 32\)"),
])
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())


# --- the layout of texts ---

def test_layout_cuts_and_keeps_the_end_and_the_class_token():
    model = small(context_length=7, pad_id=9)
    assert model.tokenize(["", "ab"], Letters()).tolist() == [[1, 2, 9, 9, 9, 9, 3], [1, 4, 5, 2, 9, 9, 3]]
    with pytest.warns(UserWarning, match=r"more than 4 tokens are cut to that \(1 of 2 here\)"):
        tokens = model.tokenize(["abcdefgh", "a"], Letters())
    assert tokens.tolist() == [[1, 4, 5, 6, 7, 2, 3], [1, 4, 2, 9, 9, 9, 3]] and tokens.dtype == torch.long
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # four pieces are not too many
        assert torch.equal(tokens[:1], model.tokenize(["abcd"], Letters()))


def test_layout_with_the_tokenizers_of_the_sizes():
    wordpiece = data.WordPiece([*(f"[unused{i}]" for i in range(97)), "[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##s",
                                "dog"], clean=True)  # whose own ids for start and end play no part
    with torch.device("meta"):
        published, tiny = clips.Towers(CONFIGS["vit-l-14-224"]), clips.Towers(CONFIGS["tiny"])
    expected = torch.tensor([[1, 101, 103, 102, 2] + [0] * 74 + [101], [1, 2] + [0] * 77 + [101]])
    assert torch.equal(published.tokenize(["A dogs", ""], wordpiece), expected)
    assert CONFIGS["tiny"].context_length == 36 and CONFIGS["tiny"].class_id == data.BPE.mask_id
    expected = [1, *(4 + byte for byte in b" a dog"), 2] + [0] * 27 + [3]
    assert tiny.tokenize(["A dog"], data.BPE([])).tolist() == [expected]
    assert (data.BPE.pad_id, data.BPE.start_id, data.BPE.end_id) == (0, 1, 2)


# --- parts of a long caption; here a word is a token ---

def drawn(text, how, length=9, n=1000):
    return collections.Counter(tuple(shorten(text, str.split, how, random.Random(i), length)) for i in range(n))


def test_a_sentence_by_chance():
    text = "a big dog. it runs!on grass... . ! \n. It is 3 years old"
    found = drawn(text, "sentence", n=4000)
    assert set(found) == {("a", "big", "dog"), ("it", "runs"), ("on", "grass"), ("It", "is", "3", "years", "old")}
    assert all(900 < count < 1100 for count in found.values())  # four standard deviations
    assert set(drawn(text, "sentence", 2)) == {("a", "big"), ("it", "runs"), ("on", "grass"), ("It", "is")}
    assert set(drawn("no stop, but? a comma", "sentence", 3)) == {("no", "stop,", "but?")}
    assert set(drawn("one alone.", "sentence")) == {("one", "alone")}
    assert set(drawn("", "sentence")) == {()} and set(drawn(" ..! ", "sentence")) == {("..!",)}


def test_the_first_tokens_and_a_block():
    text = "a b. c d e"
    assert set(drawn(text, "first", 3)) == {("a", "b.", "c")}
    found = drawn(text, "block", 3, n=3000)
    assert set(found) == {("a", "b.", "c"), ("b.", "c", "d"), ("c", "d", "e")}
    assert all(900 < count < 1100 for count in found.values())
    for how, length in itertools.product(("first", "block"), (5, 6, 99)):
        assert set(drawn(text, how, length)) == {("a", "b.", "c", "d", "e")}
        assert set(drawn("", how, length)) == {()}


def test_tokens_from_anywhere_in_any_order():
    text = "a a b. c d"
    found = drawn(text, "random", 3, n=6000)
    expected = collections.Counter(itertools.permutations(text.split(), 3))  # 60 in all, none twice at the same place
    assert set(found) == set(expected)
    for words, ways in expected.items():
        assert found[words] == pytest.approx(100 * ways, abs=50 * ways)
    assert {tuple(sorted(words)) for words in drawn(text, "random", 9)} == {("a", "a", "b.", "c", "d")}
    assert set(drawn("", "random")) == {()}


def test_an_unknown_way_lists_the_known():
    with pytest.raises(ValueError, match="'middle'.*known: sentence, first, block, random"):
        shorten("a b", str.split, "middle", random.Random(0), 3)
    with pytest.raises(ValueError, match="'last'"):
        small(shorten="last").text_batch([data.Sample(["a", "b"])], [random.Random(0)], Letters())


# --- the captioner: who sees whom ---

def test_the_mask_entry_by_entry():
    assert caption_mask(2, 3).int().tolist() == [[1, 1, 0, 0, 0],
                                                 [1, 1, 0, 0, 0],
                                                 [1, 1, 1, 0, 0],
                                                 [1, 1, 1, 1, 0],
                                                 [1, 1, 1, 1, 1]]
    assert caption_mask(2, 3).dtype == torch.bool and caption_mask(0, 1).tolist() == [[True]]


def test_a_slot_sees_the_image_the_web_caption_and_the_slots_before_it():
    captioner, prefixes = lively().captioner, []
    patches, words = torch.randn(1, 9, 32).double().requires_grad_(), torch.randn(1, 11, 24).double().requires_grad_()
    for block in captioner.blocks:
        block.register_forward_hook(lambda module, args, output: prefixes.append(output[:, :20]))
    states = captioner(patches, words)
    assert states.shape == (1, 8, 24) and len(prefixes) == 2

    def felt(output, inputs):
        direction = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        gradients = torch.autograd.grad((output * direction).sum(), inputs, retain_graph=True)
        return [gradient.reshape(-1, gradient.shape[-1]).abs().amax(dim=1) for gradient in gradients]
    for i in range(8):
        by_slot, by_patch, by_word = felt(states[0, i], (captioner.slot_embedding, patches, words))
        assert (by_slot[i + 1:] == 0).all() and by_slot[:i + 1].min() > 1e-6
        assert by_patch.min() > 1e-6 and by_word.min() > 1e-6
    for prefix in prefixes:
        by_slot, by_patch, by_word = felt(prefix, (captioner.slot_embedding, patches, words))
        assert (by_slot == 0).all() and by_patch.min() > 1e-6 and by_word.min() > 1e-6


# --- the captioner's loss ---

def slow_caption_loss(states, weight, targets, pad_id):
    found = []
    for row, ids in zip(states.tolist(), targets.tolist()):
        for state, token in zip(row, ids):
            if token != pad_id:
                logits = [sum(a * b for a, b in zip(state, w)) for w in weight.tolist()]
                found.append(math.log(sum(map(math.exp, logits))) - logits[token])
    return sum(found) / len(found)


@pytest.mark.parametrize("pad_id", [0, 6])
def test_caption_losses_equal_a_loop_over_the_real_tokens(pad_id):
    torch.manual_seed(0)
    head, states = nn.Linear(7, 11, bias=False).double(), torch.randn(3, 5, 7, dtype=torch.float64)
    targets = torch.tensor([[4, 9, 2, 6, 6], [0, 6, 6, 6, 6], [3, 3, 10, 2, 0]])
    expected = slow_caption_loss(states, 3 * head.weight, targets, pad_id)
    states[targets == pad_id] = math.nan  # nobody looks
    states.requires_grad_()
    head.weight.data *= 3
    losses, counted = caption_losses(states, head, targets, pad_id)
    assert torch.equal(counted, targets != pad_id) and (losses[~counted] == 0).all()
    loss = mean_of_all(losses, counted)
    assert loss.item() == pytest.approx(expected, rel=1e-12) and loss.dtype == torch.float64
    loss.backward()
    assert ((states.grad.abs().amax(dim=2) > 1e-3) == (targets != pad_id)).all() and head.weight.grad.isfinite().all()


def test_caption_losses_are_in_fp32_under_autocast():
    torch.manual_seed(0)
    head, targets = nn.Linear(32, 50, bias=False), torch.randint(0, 50, (4, 8))
    states = 5 * torch.randn(4, 8, 32)
    plain, rough = (caption_losses(x, head, targets, 0)[0] for x in (states, states.bfloat16().float()))
    with torch.autocast("cpu", torch.bfloat16):
        autocast, half = (caption_losses(x, head, targets, 0)[0] for x in (states, states.bfloat16()))
    assert autocast.dtype == half.dtype == torch.float32
    assert torch.equal(autocast, plain) and torch.equal(half, rough) and (rough != plain).any()


def test_the_head_is_applied_to_real_tokens_alone(monkeypatch):
    model, rows, linear = lively(), [], F.linear

    def counting(x, weight, bias=None):
        if len(weight) == 50:
            rows.append(x.numel() // x.shape[-1])
        return linear(x, weight, bias)
    monkeypatch.setattr(F, "linear", counting)
    model(**some_batch(3, 8, 1, 2))
    assert rows == [14]


# --- the loss ---

def slow_contrast(image, text, scale):
    """CLIP's loss, one picture and one text at a time."""
    logits, n = (scale * image @ text.T).tolist(), len(image)
    by_row = [math.log(sum(math.exp(x) for x in logits[i])) - logits[i][i] for i in range(n)]
    by_column = [math.log(sum(math.exp(row[i]) for row in logits)) - logits[i][i] for i in range(n)]
    return (sum(by_row) + sum(by_column)) / (2 * n)


@torch.no_grad()
@pytest.mark.parametrize("changes, weight, pad_id", [({}, 2, 0), (dict(caption_weight=0.7, pad_id=9), 0.7, 9)])
def test_every_term_equals_a_slow_loop(changes, weight, pad_id):
    model, batch, calls = lively(**changes), some_batch(3, 8, 1, 2), []
    batch["targets"][batch["targets"] == 0] = pad_id
    image, web, sub = (encode(batch[name]) for encode, name in (
        (model.encode_image, "images"), (model.encode_text, "web_tokens"), (model.encode_text, "sub_tokens")))
    states = model.captioner(model.image_feature_and_states(batch["images"])[1], model.text_feature_and_states(batch["web_tokens"])[1])
    for tower in (model.image_encoder, model.text_encoder):
        tower.register_forward_hook(lambda module, args, output: calls.append(tuple(args[0].shape)))
    losses, scale = model(**batch), model.logit_scale.exp().item()
    assert calls == [(4, 3, 24, 24), (8, 12)]  # texts of both kinds in one call
    halves = slow_contrast(image, web, scale), slow_contrast(image, sub, scale)
    said = slow_caption_loss(states, model.captioner.head.weight, batch["targets"], pad_id)
    assert set(losses) == {"loss", *CLIPS.terms} and abs(halves[0] - halves[1]) > 1e-2
    assert losses["contrastive"].item() == pytest.approx(sum(halves) / 2, rel=1e-11)
    assert losses["captioning"].item() == pytest.approx(weight * said, rel=1e-11)
    assert losses["loss"].item() == pytest.approx(sum(halves) / 2 + weight * said, rel=1e-11)


@torch.no_grad()
def test_without_a_captioner_and_with_equal_captions_it_is_clip():
    model, batch = lively(caption_layers=0), some_batch(8, 8, 8, 8, 8)
    assert model.captioner is None and not any("captioner" in name for name in model.state_dict())
    losses = model(**batch | {"sub_tokens": batch["web_tokens"]})
    expected = slow_contrast(model.encode_image(batch["images"]), model.encode_text(batch["web_tokens"]),
                             model.logit_scale.exp().item())
    assert set(losses) == {"loss", "contrastive"} and losses["loss"].item() == pytest.approx(expected, rel=1e-11)
    with pytest.raises(ValueError, match="has no captioner: released weights come without"):
        model.caption(batch["images"], Letters())


def test_the_values_at_birth():
    model = small(vocab_size=500)
    batch = some_batch(*[8] * 16) | {"images": some_images(16)}
    with torch.no_grad():
        losses = model(**batch)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(**batch)
    assert model.logit_scale.item() == pytest.approx(2.6592, abs=1e-4)
    assert math.log(16) < losses["contrastive"] < math.log(16) + 3
    chance = math.log(16) + 2 * math.log(model.config.vocab_size)
    assert chance < losses["loss"] < chance + 6
    assert losses["captioning"].item() == pytest.approx(2 * math.log(500), abs=1)
    for name in losses:
        assert rough[name].dtype == torch.float32
        assert rough[name].item() == pytest.approx(losses[name].item(), rel=0.05)


def test_every_parameter_gets_a_gradient():
    model = small().train()
    model(**some_batch(8, 3, 5) | {"images": some_images(3)})["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


GRADIENTS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import clips
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)
content = torch.load("batches.pt", weights_only=True)
model = clips.CLIPS(clips.Config(**content["config"])).double()
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
    """With as many caption tokens in both halves of the batch, with more in one, with none in one, with none."""
    model = lively()
    batches = [some_batch(*lengths) for lengths in ((3, 5, 8, 8, 4, 4), (1, 8, 8, 2, 1, 1), (0, 0, 0, 2, 5, 8),
                                                    (0, 0, 0, 0, 0, 0))]
    torch.save({"config": asdict(model.config), "weights": model.state_dict(), "batches": batches},
               tmp_path / "batches.pt")
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    command = [sys.executable, "gradients.py", str(Path(clips.__file__).parent)]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], cwd=tmp_path, text=True,
                                  stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
                 for rank in range(2)]
    for process in processes:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error[-3000:]
    for batch, two in zip(batches, torch.load(tmp_path / "results.pt", weights_only=True), strict=True):
        losses = model(**batch)
        assert set(two) == set(losses) == {"loss", *CLIPS.terms}
        for name, loss in losses.items():
            gradients = torch.autograd.grad(loss, model.parameters(), retain_graph=True, materialize_grads=True)
            assert any(x.any() for x in gradients) or not batch["targets"].any()
            for one, other in zip((loss.detach(), *gradients), two[name], strict=True):
                assert (one - other).norm() <= 1e-12 * one.norm() + 1e-14, name


# --- which captions a step sees ---

def said(batch):
    """Of every sample: web caption, part of the synthetic one, the whole of it."""
    return [tuple(Letters().decode(token for token in batch[name][i].tolist() if token > 3).strip()
                  for name in ("web_tokens", "sub_tokens", "targets")) for i in range(len(batch["targets"]))]


LONG = "c d! e. f"
OTHERS = {(web, part, f"{a}. {b}.") for (web, _), (_, a), (_, b) in
          itertools.permutations([("a b", "a b"), ("c.", "c"), ("d .", "d")]) for part in (a, b)}


@pytest.mark.parametrize("sample, expected", [
    (data.Sample(["a"], LONG, "w w"), {("w w", part, LONG) for part in ("c d", "e", "f")}),
    (data.Sample(["a", "b"], LONG), {(web, part, LONG) for part in ("c d", "e", "f") for web in "ab"}),
    (data.Sample(["a b", "c.", "d ."]), OTHERS), (data.Sample(["a b"]), {("a b", "a b", "a b.")}),
], ids=["both", "no web", "captions", "one caption"])
def test_web_and_synthetic_captions_of_a_sample(sample, expected):
    model = small(caption_length=16)
    batch = model.text_batch([sample] * 200, [random.Random(i) for i in range(200)], Letters())
    assert set(said(batch)) == expected


def test_the_rows_of_a_batch():
    model = small(caption_length=6, pad_id=9)
    longs = ["abc", "abcde", "abcdef", "abcdefghijklmnop"]
    batch = model.text_batch([data.Sample([], text, "xyz") for text in longs], [random.Random(0)] * 4, Letters())
    assert batch["targets"].tolist() == [[4, 5, 6, 2, 9, 9], *[[4, 5, 6, 7, 8, 2]] * 3]
    assert torch.equal(batch["web_tokens"], model.tokenize(["xyz"] * 4, Letters()))
    assert batch["sub_tokens"].tolist() == model.lay_out([range(4, 4 + n) for n in (3, 5, 6, 9)]).tolist()


@pytest.mark.parametrize("how, length, count", [("first", 3, 1), ("block", 3, 8), ("random", 3, 500), ("first", 0, 1),
                                                ("block", 0, 2), ("sentence", 4, 1)])
def test_how_captions_are_shortened_is_configured(how, length, count):
    model, sample = small(shorten=how, shorten_to=length), data.Sample([], "abcdefghij", "x")
    found = model.text_batch([sample] * 1000, [random.Random(i) for i in range(1000)], Letters())["sub_tokens"]
    n = length or 9
    assert (found[:, 0] == 1).all() and (found[:, n + 1] == 2).all() and (found[:, n + 2:-1] == 0).all()
    pieces = {tuple(row) for row in found[:, 1:n + 1].tolist()}
    assert all(len(set(p)) == n and set(p) <= set(range(4, 14)) for p in pieces)
    assert len(pieces) == count if how != "random" else count < len(pieces) <= 720
    assert how == "random" or all(p == tuple(range(p[0], p[0] + n)) for p in pieces)


def test_a_batch_is_the_same_again_and_however_it_is_split():
    model, samples = small(), [data.Sample([f"a{i}", f"b{i}. c"], *(["d. e. f"] if i % 2 else [])) for i in range(16)]

    def batch(part, seed=0):
        rngs = [random.Random(f"{seed} {i}") for i in range(16)]
        return model.text_batch(samples[part], rngs[part], Letters())
    whole, again, other, halves = batch(slice(16)), batch(slice(16)), batch(slice(16), 1), (slice(7), slice(7, 16))
    assert set(whole) == {"web_tokens", "sub_tokens", "targets"}
    for name in whole:
        assert torch.equal(whole[name], again[name]) and not torch.equal(whole[name], other[name]), name
        assert torch.equal(whole[name], torch.cat([batch(half)[name] for half in halves])), name
    assert model(some_images(16), **whole)["loss"].isfinite()


# --- saying captions ---

def test_the_captioner_learns_a_batch_by_heart():
    """What to say hangs on both the picture and the web caption; the longest has no room for its end."""
    model, tokenizer, images = small(caption_length=10).train(), Letters(), some_images(2)[[0, 0, 0, 1, 1, 1]]
    webs, texts = ["", "one", "two"] * 2, ["a red star", "b", "a star", "b", "two crosses.", ""]
    pieces = [tokenizer.encode(text) for text in texts]
    tokens, targets = model.tokenize(webs, tokenizer), torch.tensor([[*p, 2, *[0] * 10][:10] for p in pieces])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        losses = model(images, tokens, model.lay_out(pieces), targets)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    model.eval()
    assert losses["captioning"] < 0.1
    assert model.caption(images, tokenizer, tokens) == [text[:10] for text in texts]
    assert model.caption(images[[3, 0]], tokenizer) == [texts[3], texts[0]]  # given an empty text
    normalised = (images / 255 - model.mean) / model.std
    assert model.caption(normalised, tokenizer, tokens)[4] == "two crosse"


def test_a_caption_ends_at_the_first_end_and_has_no_padding():
    model, read = small(pad_id=9), []
    model.captioner.forward = lambda image_states, text_states: F.one_hot(torch.tensor(
        [[4, 9, 5, 2, 6, 2], [2, 4, 5, 6, 7, 8], [4, 5, 6, 9, 7, 9], [9, 9, 1, 0, 9, 4]]), 24).float()
    with torch.no_grad():
        model.captioner.head.weight.copy_(torch.eye(50, 24))
    model.text_encoder.register_forward_hook(lambda module, args, output: read.append(args[0].tolist()))
    assert model.caption(some_images(4), Letters()) == ["ab", "", "abcd", "<1><0>a"]
    assert read == [[[1, 2, *[9] * 9, 3]] * 4]  # an empty text, where none is given


# --- weights in the hub's form ---
# The golden file holds small weights in published names, and what the published implementation makes of them.

def golden():
    return torch.load(HERE / "golden" / "clips.pt", weights_only=True)


FITTING = replace(SMALL, vocab_size=64, image_mlp=128, text_mlp=96)


@torch.no_grad()
def assert_features(model, reference):
    """In float64: the features that the published implementation returned."""
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    model = copy.deepcopy(model).double()
    for ours, name in ((model.encode_image(reference["image"].double()), "image_features"),
                       (model.encode_text(reference["web_caption"]), "web_features")):
        assert (ours - reference[name]).abs().max() <= 1e-8 * reference[name].abs().max()


@pytest.fixture
def few_sizes(monkeypatch):
    """So that none of the published ones needs to be tried. All of them are in the tests of sizes."""
    monkeypatch.setattr(clips, "CONFIGS", {"one": SMALL, "fitting": FITTING})
    return clips.CONFIGS


def test_released_weights_have_no_captioner_unless_a_config_asks_for_one(tmp_path, few_sizes):
    reference = golden()
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": v for n, v in reference["state_dict"].items()}},
               tmp_path / "weights.pt")
    torch.save(reference["state_dict"], tmp_path / "plain.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (reference["state_dict"], tmp_path / "weights.pt", str(tmp_path / "plain.bin")):
            for config in (None, "fitting", replace(FITTING, caption_layers=0)):
                model = CLIPS.from_pretrained(source, config)
                assert_features(model, reference)
                assert model.config == replace(FITTING, caption_layers=0) and model.captioner is None
        torch.manual_seed(5)
        model = CLIPS.from_pretrained(reference["state_dict"], FITTING)
    torch.manual_seed(5)
    fresh = CLIPS(FITTING).captioner.state_dict()
    assert_features(model, reference)
    assert model.config == FITTING and len(fresh) == 30
    assert all(torch.equal(value, fresh[name]) for name, value in model.captioner.state_dict().items())
    batch = some_batch(8, 3) | {"images": some_images(2)}
    assert {name for name, value in model(**batch).items() if value.isfinite()} == {"loss", *CLIPS.terms}


def test_a_model_with_its_captioner_comes_back(tmp_path):
    model, batch = lively().float(), some_batch(8, 3) | {"images": some_images(2)}
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other, state = CLIPS(SMALL).eval(), torch.load(tmp_path / "weights.pt", weights_only=True)
    load_strictly(other, state)  # as train.load does
    for again in (other, CLIPS.from_pretrained(tmp_path / "weights.pt", SMALL)):
        assert torch.equal(again(**batch)["loss"], model(**batch)["loss"])
    del state["captioner.ln.bias"]
    with pytest.raises(ValueError, match="1 missing: captioner.ln.bias"):
        load_strictly(other, state)
    with pytest.raises(ValueError, match="unexpected: captioner.slot_embedding"):
        CLIPS.from_pretrained(tmp_path / "weights.pt", replace(SMALL, caption_layers=0))


@pytest.mark.parametrize("name, published, parameters", [
    ("vit-l-14-224", "ViT-L-14-CLIPS-224", 414_247_425), ("vit-l-14-336", "ViT-L-14-CLIPS-336", 414_575_105),
    ("vit-h-14-224", "ViT-H-14-CLIPS-224", 968_284_161)])
def test_released_weights_load_strictly_and_have_the_published_size(name, published, parameters):
    entry = json.loads(gzip.open(HERE / "golden" / "shapes.json.gz").read())[f"clips/{published}"]
    with torch.device("meta"):  # shapes without memory
        state = {key: torch.empty(shape) for key, shape in entry["keys"].items()}
        model = CLIPS.from_pretrained(state)  # the size is found by names and shapes
        assert model.config == replace(CONFIGS[name], caption_layers=0) == clips.Towers(CONFIGS[name]).config
        assert sum(p.numel() for p in model.parameters()) == entry["params"] == parameters
        with pytest.raises(ValueError, match="1 unexpected: surplus"):  # one tensor more, and it is refused
            CLIPS.from_pretrained(state | {"surplus": torch.empty(1)}, name)
    c = CONFIGS[name]  # what shapes do not tell
    assert (c.pad_id, c.start_id, c.end_id, c.class_id, c.fit, c.norm_eps) == (0, 1, 2, 101, "squash", 1e-6)
    assert (c.image_heads, c.text_heads) == ((16, 16) if "-h-" in name else (16, 12)) and c.vocab_size == 32000
    assert (c.caption_weight, c.caption_length, c.shorten, c.shorten_to) == (2, 128, "sentence", 0)
    assert c.caption_layers == c.text_layers
    url = PUBLISHED[name]["source"][0]
    assert url.startswith("https://huggingface.co/UCSC-VLAA/") and url.endswith("/open_clip_pytorch_model.bin")
    assert published[:14] in url and ("CLIPS-224" in url) == name.endswith("-224")


def test_published_names_are_downloaded(tmp_path, monkeypatch):
    reference, asked = golden(), []

    def download(url, path, md5=None, sha256=None):
        asked.append(url)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(reference["state_dict"], path)
        return Path(path)
    monkeypatch.setattr(data, "download", download)
    monkeypatch.setitem(CONFIGS, "vit-l-14-224", FITTING)  # a small one in its place
    model = CLIPS.from_pretrained("vit-l-14-224", cache=tmp_path / "cache")
    assert_features(model, reference)
    assert model.captioner is None and PUBLISHED["vit-l-14-224"]["source"][0] in asked
    with pytest.warns(UserWarning, match="resized to 6 x 6"):  # a config of one's own wins over the name's
        model = CLIPS.from_pretrained("vit-l-14-224", replace(FITTING, image_size=48), cache=tmp_path / "cache")
    assert model.config.image_size == 48 and model.captioner is not None


def test_unknown_names_list_the_known(tmp_path):
    with pytest.raises(ValueError, match="vit-b-32: no such file, and no published CLIPS") as error:
        CLIPS.from_pretrained("vit-b-32", cache=tmp_path)
    assert all(name in str(error.value) for name in PUBLISHED) and len(PUBLISHED) == 3
    with pytest.raises(ValueError, match="'huge'; known: vit-l-14-224, vit-l-14-336, vit-h-14-224, tiny"):
        CLIPS.from_pretrained({}, "huge")
    with pytest.raises(ValueError, match="CLIPS is made of a Config, got a dict"):
        CLIPS.from_pretrained({}, {"image_size": 24})


def test_what_does_not_fit_is_reported(few_sizes):
    state = golden()["state_dict"]
    wrong = state | {"visual.conv1.weight": torch.zeros(32, 3, 4, 4), "surplus": torch.zeros(1)}
    del wrong["ln_final.bias"]
    with pytest.raises(ValueError, match=r"do not fit CLIPS:\s+1 missing: text_encoder.ln_final.bias\s+1 unexpected: "
                       r"surplus\s+1 wrong shape: image_encoder.conv1.weight \(32, 3, 4, 4\), expected \(32, 3, 8, 8"):
        CLIPS.from_pretrained(wrong, FITTING)
    with pytest.raises(ValueError, match="wrong shape: (.|\n)*it would fit config='fitting'"):
        CLIPS.from_pretrained(state, "one")
    with pytest.raises(ValueError, match="of one, fitting none would fit; this was the first"):
        CLIPS.from_pretrained(wrong)


@pytest.mark.parametrize("old, new", [(2, 4), (3, 7), (4, 2)])
def test_resized_positions_equal_pillows(old, new):
    table = torch.randn(1 + old ** 2, 32, generator=torch.Generator().manual_seed(0))
    state = small(image_size=8 * old).state_dict() | {"image_encoder.positional_embedding": table}
    with pytest.warns(UserWarning, match=f"{old} x {old} patches, resized to {new} x {new}"):
        model = CLIPS.from_pretrained(state, replace(SMALL, image_size=8 * new))
    found = model.image_encoder.positional_embedding.detach()
    assert torch.equal(found[0], table[0])  # the class token is nowhere on the picture
    for channel in range(32):
        grid = Image.fromarray(table[1:, channel].reshape(old, old).numpy())
        expected = torch.from_numpy(np.array(grid.resize((new, new), Image.Resampling.BICUBIC)))
        torch.testing.assert_close(found[1:, channel].view(new, new), expected, rtol=0, atol=1e-5)


# --- in use ---

@pytest.mark.parametrize("captioner", [True, False])
def test_the_pipeline_and_the_command(captioner, monkeypatch, capsys):
    """Labels by the softmax of scaled cosines, and what the model says; a small model in place of train.load's."""
    model, picture, cosines = lively().float(), some_images(1)[0], {}
    says = "says: " + model.caption(picture[None], Letters())[0]
    model.captioner = model.captioner if captioner else None
    with torch.no_grad():
        image, scale = model.encode_image(picture[None]), model.logit_scale.exp().item()
        for label in ("a cat", "a dog", "x"):  # each text by itself
            row = [1, *Letters().encode(label), 2]
            cosines[label] = float((image * model.encode_text(torch.tensor([row + [0] * (11 - len(row)) + [3]]))).sum())
    whole = sum(math.exp(scale * cosine) for cosine in cosines.values())
    shares = {label: math.exp(scale * cosines[label]) / whole for label in sorted(cosines, key=cosines.get)[::-1]}

    monkeypatch.setitem(sys.modules, "train", SimpleNamespace(load=lambda path: (model, Letters(), lambda _: picture)))
    pipeline = clips.ZeroShotPipeline("best.pt")
    found = pipeline.predict("cat.jpg", list(cosines))
    assert [label for label, _ in found] == list(shares) and dict(found) == pytest.approx(shares, rel=1e-3)
    assert pipeline.predict("cat.jpg", list(cosines), top_k=1) == found[:1]
    for wrong in ("a cat", ["a cat"], []):
        with pytest.raises(ValueError, match="two or more"):
            pipeline.predict("cat.jpg", wrong)

    monkeypatch.setattr(sys, "argv", ["clips.py", "best.pt", "cat.jpg", *cosines])
    runpy.run_path(clips.__file__, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:] == [says] * captioner and len(says) > 8
    for line, label in zip(lines[:3], shares, strict=True):
        share, cosine, last = re.fullmatch(r" *([\d.]+)%  cosine ([-+][\d.]+)  (.*)", line).groups()
        assert last == label and float(share) == pytest.approx(100 * shares[label], abs=0.1)
        assert float(cosine) == pytest.approx(cosines[label], abs=1e-3)
    monkeypatch.setattr(sys, "argv", ["clips.py", "best.pt", "cat.jpg", "a cat"])
    with pytest.raises(SystemExit, match="usage: python clips.py .*two or more"):
        runpy.run_path(clips.__file__, run_name="__main__")


def test_the_file_stands_alone(tmp_path):
    shutil.copy(clips.__file__, tmp_path)
    code = ("import sys; before = set(sys.modules); import torch; import clips\n"
            "config = clips.CONFIGS['tiny']\n"
            "images = torch.zeros(2, 3, config.image_size, config.image_size)\n"
            "tokens = torch.full((2, config.context_length), config.class_id)\n"
            "targets = torch.full((2, config.caption_length), config.end_id)\n"
            "assert clips.CLIPS(config)(images, tokens, tokens, targets)['loss'].isfinite()\n"
            "print(not {'data', 'train', 'clip', 'torchvision', 'PIL', 'safetensors'} & set(sys.modules) - before)")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("True\n", "")
