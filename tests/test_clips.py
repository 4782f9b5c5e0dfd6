"""clips.py: who sees whom, in towers and captioner; its losses against slow loops; which captions a step sees; what the
captioner says; published shapes. That the towers compute what the published code computes is in test_golden.py."""
import collections
import itertools
import math
import random
import runpy
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clips
import tokens as tokenizers
from clips import CLIPS, CONFIGS, Config, caption_losses, caption_mask, mean_of_all, shorten
from data import Sample
from tools import (Letters, assert_batches_are_repeatable, assert_close, assert_images_are_normalised,
                   assert_two_processes_equal_one, lively, load_published, overfit, save_run, some_images, some_tokens)

SMALL = Config(image_size=24, patch_size=8, image_width=32, image_layers=2, image_heads=4, image_mlp=64, vocab_size=50,
               class_id=3, context_length=12, text_width=24, text_layers=2, text_heads=4, text_mlp=48, embed_dim=16,
               caption_layers=2, caption_length=8)


def small(**changes):
    torch.manual_seed(0)
    return CLIPS(replace(SMALL, **changes)).eval()


def some_texts(*lengths, seed=1):
    tokens = some_tokens(*lengths, width=12, seed=seed)
    tokens[:, -1] = 3  # the class token
    return tokens


def some_batch(*lengths):
    """What forward needs for as many pictures, in float64; lengths: of the whole synthetic captions."""
    generator, n = torch.Generator().manual_seed(3), len(lengths)
    targets = torch.randint(4, 50, (n, 8), generator=generator)
    return {"images": torch.randn(n, 3, 24, 24, dtype=torch.float64, generator=generator),
            "web_tokens": some_texts(*(4 + i % 6 for i in range(n))),
            "sub_tokens": some_texts(*(9 - i % 5 for i in range(n)), seed=4),
            "targets": targets.masked_fill(torch.arange(8) >= torch.tensor(lengths)[:, None], 0)}


def caption_states(model, batch):
    return model.captioner(model.image_feature_and_states(batch["images"])[1],
                           model.text_feature_and_states(batch["web_tokens"])[1])


# --- the towers ---

@torch.no_grad()
def test_a_text_is_seen_whole_and_its_padding_too():
    model, tokens = lively(small()), some_texts(6)
    for place in range(12):
        changed = tokens.clone()
        changed[0, place] = 40
        assert (model.encode_text(changed) - model.encode_text(tokens)).abs().max() > 1e-4


def test_pixels_equal_normalised_floats_and_wrong_shapes_are_named():
    model = small()
    assert_images_are_normalised(model, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for shape in ((12,), (1, 7), (2, 13)):
        with pytest.raises(ValueError, match=r"tokens must be \(B, 12\), as tokenize makes them, got \("):
            model.encode_text(torch.full(shape, 2))
    with pytest.raises(ValueError, match="3 images, 2 captions; expected one caption for each image"):
        model(some_images(3), some_texts(4, 5), some_texts(4, 5), torch.zeros(2, 8))


def test_layout_cuts_and_keeps_the_end_and_the_class_token():
    model = small(context_length=7, pad_id=9)
    assert model.tokenize(["", "ab"], Letters()).tolist() == [[1, 2, 9, 9, 9, 9, 3], [1, 4, 5, 2, 9, 9, 3]]
    with pytest.warns(UserWarning, match=r"more than 4 tokens are cut to that \(1 of 2 here\)"):
        tokens = model.tokenize(["abcdefgh", "a"], Letters())
    assert tokens.tolist() == [[1, 4, 5, 6, 7, 2, 3], [1, 4, 2, 9, 9, 9, 3]] and tokens.dtype == torch.long
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # four pieces are not too many
        assert torch.equal(tokens[:1], model.tokenize("abcd", Letters()))


def test_layout_with_the_tokenizers_of_the_sizes():
    wordpiece = tokenizers.WordPiece([*(f"[unused{i}]" for i in range(97)), "[PAD]", "[UNK]", "[CLS]", "[SEP]", "a",
                                      "##s", "dog"], clean=True)  # whose own ids for start and end play no part
    with torch.device("meta"):
        published, tiny = (CLIPS(replace(CONFIGS[name], caption_layers=0)) for name in ("vit-l-14-224", "tiny"))
    expected = torch.tensor([[1, 101, 103, 102, 2] + [0] * 74 + [101], [1, 2] + [0] * 77 + [101]])
    assert torch.equal(published.tokenize(["A dogs", ""], wordpiece), expected)
    assert tiny.tokenize(["A dog"], tokenizers.BPE([])).tolist() == [
        [1, *(4 + byte for byte in b" a dog"), 2] + [0] * 27 + [3]]


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
    assert set(drawn("", "sentence")) == {()} and set(drawn(" ..! ", "sentence")) == {("..!",)}


def test_the_first_tokens_and_a_block():
    text = "a b. c d e"
    assert set(drawn(text, "first", 3)) == {("a", "b.", "c")}
    found = drawn(text, "block", 3, n=3000)
    assert set(found) == {("a", "b.", "c"), ("b.", "c", "d"), ("c", "d", "e")}
    assert all(900 < count < 1100 for count in found.values())
    for how in ("first", "block"):
        assert set(drawn(text, how, 6)) == {("a", "b.", "c", "d", "e")} and set(drawn("", how)) == {()}


def test_tokens_from_anywhere_in_any_order():
    found = drawn("a a b. c d", "random", 3, n=6000)
    expected = collections.Counter(itertools.permutations("a a b. c d".split(), 3))  # 60, none twice at the same place
    assert set(found) == set(expected)
    assert all(found[words] == pytest.approx(100 * ways, abs=50 * ways) for words, ways in expected.items())
    assert {tuple(sorted(words)) for words in drawn("a a b. c d", "random", 9)} == {("a", "a", "b.", "c", "d")}
    with pytest.raises(ValueError, match="'middle'.*known: sentence, first, block, random"):
        drawn("a b", "middle")


# --- the captioner: who sees whom ---

def test_the_mask_entry_by_entry():
    assert caption_mask(2, 3).int().tolist() == [[1, 1, 0, 0, 0],
                                                 [1, 1, 0, 0, 0],
                                                 [1, 1, 1, 0, 0],
                                                 [1, 1, 1, 1, 0],
                                                 [1, 1, 1, 1, 1]]
    assert caption_mask(2, 3).dtype == torch.bool and caption_mask(0, 1).tolist() == [[True]]


@torch.no_grad()
def test_the_captioner_slot_by_slot_without_a_mask():
    """The image and the web caption by themselves, then each slot as the last of those that it sees."""
    model, batch = lively(small()), some_batch(8, 8)
    captioner, found = model.captioner, caption_states(model, batch)
    prefix = torch.cat([captioner.image_proj(model.image_feature_and_states(batch["images"])[1]),
                        captioner.text_proj(model.text_feature_and_states(batch["web_tokens"])[1])], dim=1)
    slots = captioner.slot_embedding.expand(2, 8, 24)
    assert prefix.shape == (2, 9 + 11, 24)  # without the two class tokens
    for block in captioner.blocks:
        slots, prefix = (torch.stack([block(torch.cat([prefix, slots[:, :j + 1]], dim=1))[:, -1] for j in range(8)],
                                     dim=1), block(prefix))
    assert_close(found, captioner.ln(slots))


# --- the loss ---

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
    expected = slow_caption_loss(states, head.weight, targets, pad_id)
    states[targets == pad_id] = math.nan  # nobody looks
    states.requires_grad_()
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


def slow_contrast(image, text, scale):
    """CLIP's loss, one picture and one text at a time."""
    logits, n = (scale * image @ text.T).tolist(), len(image)
    by_row = [math.log(sum(math.exp(x) for x in logits[i])) - logits[i][i] for i in range(n)]
    by_column = [math.log(sum(math.exp(row[i]) for row in logits)) - logits[i][i] for i in range(n)]
    return (sum(by_row) + sum(by_column)) / (2 * n)


@torch.no_grad()
@pytest.mark.parametrize("changes, weight, pad_id", [({}, 2, 0), (dict(caption_weight=0.7, pad_id=9), 0.7, 9)])
def test_every_term_equals_a_slow_loop(changes, weight, pad_id):
    model, batch, calls = lively(small(**changes)), some_batch(3, 8, 1, 2), []
    batch["targets"][batch["targets"] == 0] = pad_id
    image, web, sub = (encode(batch[name]) for encode, name in (
        (model.encode_image, "images"), (model.encode_text, "web_tokens"), (model.encode_text, "sub_tokens")))
    states = caption_states(model, batch)
    for tower in (model.image_encoder, model.text_encoder):
        tower.register_forward_hook(lambda module, args, output: calls.append(tuple(args[0].shape)))
    losses, scale = model(**batch), model.logit_scale.exp().item()
    assert calls == [(4, 3, 24, 24), (8, 12)]  # texts of both kinds in one call
    halves = slow_contrast(image, web, scale), slow_contrast(image, sub, scale)
    said = slow_caption_loss(states, model.captioner.head.weight, batch["targets"], pad_id)
    assert abs(halves[0] - halves[1]) > 1e-2
    expected = {"loss": sum(halves) / 2 + weight * said, "contrastive": sum(halves) / 2, "captioning": weight * said}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-11)


@torch.no_grad()
def test_without_a_captioner_and_with_equal_captions_it_is_clip():
    model, batch = lively(small(caption_layers=0)), some_batch(8, 8, 8, 8, 8)
    assert model.captioner is None and not any("captioner" in name for name in model.state_dict())
    losses = model(**batch | {"sub_tokens": batch["web_tokens"]})
    expected = slow_contrast(model.encode_image(batch["images"]), model.encode_text(batch["web_tokens"]),
                             model.logit_scale.exp().item())
    assert set(losses) == {"loss", "contrastive"} and losses["loss"].item() == pytest.approx(expected, rel=1e-11)


@torch.no_grad()
def test_the_first_losses_also_under_autocast():
    model = small(vocab_size=500)
    batch = some_batch(*[8] * 16) | {"images": some_images(16)}
    losses = model(**batch)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert math.log(16) < losses["contrastive"] < math.log(16) + 3
    assert losses["captioning"].item() == pytest.approx(2 * math.log(500), abs=1)
    with torch.autocast("cpu", torch.bfloat16):
        for name, rough in model(**batch).items():
            assert rough.dtype == torch.float32 and rough.item() == pytest.approx(losses[name].item(), rel=0.05)


def test_the_initialisation():
    model = small(text_width=256, text_layers=6, text_mlp=1024, image_width=192, image_size=96, embed_dim=128)
    text, image, captioner = model.text_encoder, model.image_encoder, model.captioner
    expected = [(text.token_embedding.weight, 0.02), (text.positional_embedding, 0.01), (text.text_projection, 1 / 16),
                (image.positional_embedding, 192 ** -0.5), (image.proj, 192 ** -0.5), (captioner.slot_embedding, 1)]
    for block in text.blocks:
        expected += [(block.attn.in_proj.weight, 1 / 16), (block.mlp.c_fc.weight, 512 ** -0.5),
                     *((x.weight, (2 * 6 * 256) ** -0.5) for x in (block.attn.out_proj, block.mlp.c_proj))]
    for tensor, std in expected:
        assert tensor.std().item() == pytest.approx(std, rel=0.04) and abs(tensor.mean().item()) < 0.05 * std
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_two_processes_equal_one(tmp_path):
    """With as many caption tokens in both halves of the batch, with more in one, with none in one, with none."""
    batches = [some_batch(*lengths) for lengths in ((3, 5, 8, 8, 4, 4), (1, 8, 8, 2, 1, 1), (0, 0, 0, 2, 5, 8),
                                                    (0, 0, 0, 0, 0, 0))]
    assert_two_processes_equal_one(clips, lively(small()), batches, tmp_path)


# --- which captions a step sees ---

def said(batch):
    """Of every sample: web caption, part of the synthetic one, the whole of it."""
    return [tuple(Letters().decode(token for token in batch[name][i].tolist() if token > 3).strip()
                  for name in ("web_tokens", "sub_tokens", "targets")) for i in range(len(batch["targets"]))]


LONG = "c d! e. f"
OTHERS = {(web, part, f"{a}. {b}.") for (web, _), (_, a), (_, b) in
          itertools.permutations([("a b", "a b"), ("c.", "c"), ("d .", "d")]) for part in (a, b)}


@pytest.mark.parametrize("sample, expected", [
    (Sample(["a"], LONG, "w w"), {("w w", part, LONG) for part in ("c d", "e", "f")}),
    (Sample(["a", "b"], LONG), {(web, part, LONG) for part in ("c d", "e", "f") for web in "ab"}),
    (Sample(["a b", "c.", "d ."]), OTHERS), (Sample(["a b"]), {("a b", "a b", "a b.")}),
], ids=["both", "no web", "captions", "one caption"])
def test_web_and_synthetic_captions_of_a_sample(sample, expected):
    model = small(caption_length=16)
    batch = model.text_batch([sample] * 200, [random.Random(i) for i in range(200)], Letters())
    assert set(said(batch)) == expected


def test_the_rows_of_a_batch():
    model = small(caption_length=6, pad_id=9)
    longs = ["abc", "abcde", "abcdef", "abcdefghijklmnop"]
    batch = model.text_batch([Sample([], text, "xyz") for text in longs], [random.Random(0)] * 4, Letters())
    assert batch["targets"].tolist() == [[4, 5, 6, 2, 9, 9], *[[4, 5, 6, 7, 8, 2]] * 3]
    assert torch.equal(batch["web_tokens"], model.tokenize(["xyz"] * 4, Letters()))
    assert batch["sub_tokens"].tolist() == [[1, *range(4, 4 + n), 2, *[9] * (9 - n), 3] for n in (3, 5, 6, 9)]


@pytest.mark.parametrize("how, length, count", [("first", 3, 1), ("block", 3, 8), ("block", 0, 2), ("sentence", 4, 1)])
def test_how_captions_are_shortened_is_configured(how, length, count):
    model, sample = small(shorten=how, shorten_to=length), Sample([], "abcdefghij", "x")
    found = model.text_batch([sample] * 200, [random.Random(i) for i in range(200)], Letters())["sub_tokens"]
    pieces, n = {tuple(row) for row in found[:, 1:].tolist()}, length or 9  # as many as there is room for
    assert len(pieces) == count
    assert all(p == (*range(p[0], p[0] + n), 2, *[0] * (9 - n), 3) and p[n - 1] < 14 for p in pieces)


def test_a_batch_is_the_same_again_and_however_it_is_split():
    samples = [Sample([f"a{i}", f"b{i}. c"], *(["d. e. f"] if i % 2 else [])) for i in range(16)]
    assert set(assert_batches_are_repeatable(small(), samples)) == {"web_tokens", "sub_tokens", "targets"}


# --- what the captioner says ---

def test_every_parameter_gets_a_gradient_and_a_batch_is_learned_by_heart():
    """What to say depends on both the picture and the web caption; the longest has no room for its end."""
    model, tokenizer, images = small(caption_length=10), Letters(), some_images(2)[[0, 0, 0, 1, 1, 1]]
    webs, texts = ["", "one", "two"] * 2, ["a red star", "b", "a star", "b", "two crosses.", ""]
    pieces = [tokenizer.encode(text) for text in texts]
    tokens, targets = model.tokenize(webs, tokenizer), torch.tensor([[*p, 2, *[0] * 10][:10] for p in pieces])
    batch = {"images": images, "web_tokens": tokens, "sub_tokens": model.lay_out(pieces), "targets": targets}
    last = overfit(model, batch, steps=80, lr=4e-3)[1]
    assert last["captioning"] < 0.2
    assert model.caption(images, tokenizer, tokens) == [text[:10] for text in texts]
    assert model.caption(images[[3, 0]], tokenizer) == [texts[3], texts[0]]  # given an empty text


def test_a_caption_ends_at_the_first_end_and_has_no_padding():
    model, read = small(pad_id=9, vocab_size=60), []
    model.captioner.forward = lambda image_states, text_states: F.one_hot(torch.tensor(
        [[4, 9, 5, 2, 6, 2], [2, 4, 5, 6, 7, 8], [4, 5, 6, 9, 7, 9], [9, 9, 1, 0, 9, 4]]), 24).float()
    with torch.no_grad():
        model.captioner.head.weight.copy_(torch.cat([torch.eye(50, 24), 2 * torch.eye(10, 24)]))  # ids of no piece win
    model.text_encoder.register_forward_hook(lambda module, args, output: read.append(args[0].tolist()))
    assert model.caption(some_images(4), Letters()) == ["ab", "", "abcd", "<1><0>a"]
    assert read == [[[1, 2, *[9] * 9, 3]] * 4]  # an empty text, where none is given


@pytest.mark.parametrize("captioner", [True, False])
def test_the_command_also_prints_a_caption(captioner, tmp_path, monkeypatch, capsys):
    model = lively(small(vocab_size=260, caption_layers=2 * captioner)).float()
    checkpoint, picture, pixels = save_run(model, tmp_path)
    monkeypatch.setattr(sys, "argv", ["clips.py", checkpoint, picture, "a cat", "a dog", "x"])
    runpy.run_path(clips.__file__, run_name="__main__")
    lines = capsys.readouterr().out.split("\n")
    assert {line.split("  ")[-1] for line in lines[:3]} == {"a cat", "a dog", "x"}
    if captioner:
        says = model.caption(pixels, tokenizers.BPE([]))[0]
        assert "\n".join(lines[3:]) == f"says: {says}\n" and len(says) > 2
    else:
        assert lines[3:] == [""]


# --- published weights ---

def test_released_weights_have_no_captioner_unless_a_config_asks_for_one(monkeypatch):
    reference = torch.load(Path(__file__).parent / "golden" / "clips.pt", weights_only=True)
    fitting = replace(SMALL, vocab_size=64, image_mlp=128, text_mlp=96)
    monkeypatch.setitem(CONFIGS, "vit-l-14-224", fitting)  # a small one in its place
    torch.manual_seed(5)
    fresh = CLIPS(fitting).captioner.state_dict()
    torch.manual_seed(5)
    own, named = (CLIPS.from_pretrained(reference["state_dict"], config) for config in (fitting, "vit-l-14-224"))
    assert all(torch.equal(value, fresh[name]) for name, value in own.captioner.state_dict().items())
    assert named.captioner is None and named.config == replace(fitting, caption_layers=0)
    for model in (named, own):
        assert_close(model.double().encode_image(reference["image"].double()), reference["image_features"], atol=1e-8)


def test_a_model_with_its_captioner_comes_back():
    model, batch = lively(small()).float(), some_batch(8, 3) | {"images": some_images(2)}
    again = CLIPS.from_pretrained(model.state_dict(), SMALL)
    assert torch.equal(again(**batch)["loss"], model(**batch)["loss"])
    state = {name: value for name, value in model.state_dict().items() if name != "captioner.ln.bias"}
    with pytest.raises(RuntimeError, match="Missing key.*captioner.ln.bias"):
        CLIPS.from_pretrained(state, SMALL)


@pytest.mark.parametrize("name, published, parameters", [
    ("vit-l-14-224", "ViT-L-14-CLIPS-224", 414_247_425), ("vit-l-14-336", "ViT-L-14-CLIPS-336", 414_575_105),
    ("vit-h-14-224", "ViT-H-14-CLIPS-224", 968_284_161)])
def test_released_weights_load_strictly_and_have_the_published_size(name, published, parameters):
    config, found = load_published(CLIPS, f"clips/{published}", name)
    assert found == parameters and config == replace(CONFIGS[name], caption_layers=0)
    c = CONFIGS[name]  # what shapes do not tell
    assert (c.pad_id, c.start_id, c.end_id, c.class_id, c.fit, c.norm_eps) == (0, 1, 2, 101, "squash", 1e-6)
    assert (c.image_heads, c.text_heads) == ((16, 16) if "-h-" in name else (16, 12)) and c.vocab_size == 32000
    assert (c.caption_weight, c.caption_length, c.shorten, c.shorten_to) == (2, 128, "sentence", 0)
    assert c.caption_layers == c.text_layers
