"""CLIPS: long synthetic captions, of which a short piece teaches more than the whole.

Liu et al., "CLIPS: An Enhanced CLIP Framework for Learning with Synthetic Captions", arXiv 2411.16828 (2024).

The idea: let a vision-language model describe every picture anew, in a paragraph: the synthetic caption. To contrast
the picture with all of it teaches less than with a part, and the shorter the part the better, down to one sentence (the
paper's inverse effect). So contrast the picture with its caption from the web and with one sentence of the synthetic
one; and so that the rest is not wasted, let a decoder, the captioner, predict all of it.

    image    u = ViT(image)             mean of the patches' states, normed, projected                            (B, E)
    texts    v, w = Transformer(web caption), Transformer(one sentence of the synthetic caption)                  (B, E)
    contrast 1/2 [ CLIP(u, v) + CLIP(u, w) ]     CLIP's symmetric loss, each time over a (B, B) table of its own
    caption  -mean ln p(y_i | image, web caption)    y (B, C): the synthetic caption; its token i is read from slot i
    loss     contrast + 2 caption                    (the mean is over the tokens of all captions, all processes)

In the code: u image_features, v web_features, w sub_features, y targets.

The captioner (autoregressive in the authors' words) is never fed the words of the caption it predicts. In their places
stand C learned vectors, the slots. A slot sees the image, the web caption and the states of the slots before it, but
never a word that was chosen: so all words are computed in one pass, in training and in `caption`. Where several
captions would be right, the slots cannot agree on one: each gives its own most probable word.

Shapes: B batch, S image side, P patch side, N image tokens (class token and patches), L text tokens (always
context_length), C caption slots, V vocabulary, D width, H attention heads, E embedding, W processes, I images, T texts.

How to read it: beside clip.py. The towers differ in details, the section "new in CLIPS" is the paper, `text_batch` says
which captions a step sees. What follows the model is for when you need it: published weights, sizes, recipes.

The towers compute what the published code computes (tests/golden holds the values): no norm before the blocks, pooling
before the last norm, texts without any mask, their class token last, eps 1e-6, the tanh form of GELU in texts alone.
The released PyTorch code leaves the captioner's training open; captions, captioner and loss are as in OpenVision, by
the same group. What differs:
  - where there are no synthetic captions, as in Flickr8k, one caption plays the web's, the others joined the synthetic;
  - the images' positions are learned (there: fixed sines);
  - training: AdamW's second beta is .98 (there .95), crops are of half the picture or more (there 40 %); the tiny size
    begins with `head_start`.

    python train.py --model clips                                      # the tiny one on generated pictures: 12 minutes
    python clips.py runs/clips-shapes/best.pt photo.png "a red star" "a blue circle"      # and what it sees, in words
    python tests/claims.py clips                                       # the paper's claims, on shapes
"""
import math
import os
import re
import sys
import warnings
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    image_size: int = 224
    patch_size: int = 14
    image_width: int = 1024
    image_layers: int = 24
    image_heads: int = 16
    image_mlp: int = 4096            # the hidden width
    fit: str = "squash"              # for train.py: pictures are squeezed into a square, not cropped
    vocab_size: int = 32000          # rows of the table; BERT's vocabulary has 30,522
    pad_id: int = 0                  # attended to like any word, so which id it is matters
    start_id: int = 1                # these two BERT leaves unused; its tokenizer would say 101 and 102
    end_id: int = 2
    class_id: int = 101              # BERT's [CLS], last, after the padding: there a text's feature is taken
    context_length: int = 80         # longer texts are cut here, shorter ones filled
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_mlp: int = 3072
    embed_dim: int = 768
    activation: str = "gelu"
    text_activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    head_start: bool = False         # for a fresh small image tower: see the function of that name
    caption_layers: int = 12         # the captioner's blocks, as wide as the text tower's; 0: no captioner
    caption_length: int = 128        # its slots
    caption_weight: float = 2.0
    shorten: str = "sentence"        # what of a synthetic caption is contrasted: see the function of that name
    shorten_to: int = 0              # its tokens; 0: as many as there is room for


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": gelu_tanh}


class Attention(nn.Module):
    """Multi-head self-attention. mask: True where a key may be seen, broadcast to (B, H, N, N)."""
    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj = nn.Linear(width, 3 * width)  # queries, keys and values in one product
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj.weight)  # this and the zeros: as nn.MultiheadAttention starts
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, mask=None, causal=False):
        B, N, D = x.shape
        q, k, v = self.in_proj(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, N, D/H)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """Two layers with a nonlinearity between them. The names (c for convolution) are GPT-2's, and from there CLIP's."""
    def __init__(self, width, hidden, activation=F.gelu):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.activation = activation
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """A transformer block with the norms before attention and MLP (pre-LN): x itself is only ever added to."""
    def __init__(self, width, heads, hidden, activation, eps=1e-5):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden, activation)

    def forward(self, x, mask=None, causal=False):
        x = x + self.attn(self.ln_1(x), mask, causal)
        return x + self.mlp(self.ln_2(x))


# --- the two towers -------------------------------------------------------------------------------------------------

class ImageEncoder(nn.Module):
    """ViT: images (B, 3, S, S), normalised -> (B, E), and for the captioner the patches' states before the norm."""
    def __init__(self, config):
        super().__init__()
        width, grid = config.image_width, config.image_size // config.patch_size
        self.conv1 = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(1 + grid ** 2, width))
        self.blocks = nn.ModuleList([
            Block(width, config.image_heads, config.image_mlp, ACTIVATIONS[config.activation], config.norm_eps)
            for _ in range(config.image_layers)])
        self.ln_post = nn.LayerNorm(width, eps=config.norm_eps)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, N - 1, D): a token for each patch
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (B, N, D)
        x = x + self.positional_embedding
        for block in self.blocks:
            x = block(x)
        patches = x[:, 1:]  # the class token only takes part in the attention
        return self.ln_post(patches.mean(dim=1)) @ self.proj, patches  # (B, E), (B, N - 1, D)


class TextEncoder(nn.Module):
    """A transformer without any mask: tokens (B, context_length) -> (B, E), and for the captioner the states
    before the norm, without the class token's.

    The feature is taken at the last token, which is the class token; padding, before it, is seen like words.
    """
    def __init__(self, config):
        super().__init__()
        width, layers = config.text_width, config.text_layers
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.blocks = nn.ModuleList([
            Block(width, config.text_heads, config.text_mlp, ACTIVATIONS[config.text_activation], config.norm_eps)
            for _ in range(layers)])
        self.ln_final = nn.LayerNorm(width, eps=config.norm_eps)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.blocks:  # the more blocks, the smaller each one's first contribution to x
            nn.init.normal_(block.attn.in_proj.weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)

    def forward(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding  # (B, L, D)
        for block in self.blocks:
            x = block(x)
        return self.ln_final(x[:, -1]) @ self.text_projection, x[:, :-1]  # (B, E), (B, L - 1, D)


# --- over several processes, in full precision ----------------------------------------------------------------------

class Gather(torch.autograd.Function):
    """The rows of all processes, (B, ...) -> (W B, ...) on W processes, with a gradient.

    Every process brings the same B. Why the result is exact: process r has the loss l_r over its own B rows, and the
    loss of the whole batch is l = 1/W sum_r l_r. It depends on the features x_r of process r through every l_q, so
    dl/dx_r = 1/W sum_q dl_q/dx_r. The backward below adds up, over q, what comes through the gathered copies; what
    comes through the rows of l_r itself, autograd adds; and DDP, which averages gradients over the processes, supplies
    1/W.
    """
    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd's own tensor is not ours to change
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    return Gather.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def upcast(x):
    """Half types to fp32 and nothing else, so that a float64 model stays float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def full_precision(x):
    """Switches autocast off on x's device: towers may run in bf16; normalising, similarities and the loss do not."""
    return torch.autocast(x.device.type, enabled=False)


def mean_of_all(values, counted):
    """This process's share of the mean over all processes of values, where counted, bool of the same shape, is true.

    DDP averages the shares of W processes: a share is the sum here, times W, over how many all of them count.
    """
    total, processes = counted.sum(), 1
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
        processes = dist.get_world_size()
    return (values * counted).sum() * processes / total.clamp(min=1)


# --- the loss -------------------------------------------------------------------------------------------------------

def contrastive_loss(image_features, text_features, scale):
    """The symmetric cross-entropy of CLIP over the global batch (CLIP, Fig. 3).

    image_features, text_features: (B, E) of length 1, row i of one belongs to row i of the other;
    scale: exp(logit_scale).
    Local rows against the columns of all W processes. Features that are all alike give just ln(W B); an untrained
    model lies a little above.
    In fp32: in bf16 and at a scale of 100, logits of right pairs are wrong by up to 0.4, and this product costs next to
    nothing.
    """
    with full_precision(image_features):
        image_features, text_features = upcast(image_features), upcast(text_features)
        logits_per_image = scale * image_features @ gather(text_features).T  # (B, W B)
        logits_per_text = scale * text_features @ gather(image_features).T   # (B, W B)
        first = dist.get_rank() * len(image_features) if dist.is_initialized() else 0  # where our columns begin
        labels = torch.arange(first, first + len(image_features), device=image_features.device)
        return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


# --- new in CLIPS: what of a long caption is contrasted, and the captioner ------------------------------------------

def shorten(text, encode, how, rng, length):
    """A long caption -> the token ids of a part of it, at most `length` of them.

    how: "sentence" (the paper's sub-caption): one sentence, by chance; "first": the first tokens; "block": consecutive
    tokens from anywhere; "random": tokens from anywhere, in any order. rng: a random.Random; encode: text -> ids.
    """
    if how == "sentence":
        sentences = [part for part in re.split(r"[.!]+", text) if part.strip()]  # as published: not at "?"; cuts "3.5"
        return encode(rng.choice(sentences or [text]))[:length]
    ids = encode(text)
    if how == "first":
        return ids[:length]
    if how == "block":
        start = rng.randrange(max(1, len(ids) - length + 1))
        return ids[start:start + length]
    if how == "random":
        return rng.sample(ids, min(length, len(ids)))
    raise ValueError(f"shorten={how!r}: unknown; known: sentence, first, block, random")


def caption_mask(prefix, slots, device=None):
    """Which token (row) may see which (column): bool (prefix + slots, prefix + slots).

    All see the prefix, which sees nothing else; a slot sees the slots up to itself.
    """
    mask = torch.ones(prefix + slots, prefix + slots, dtype=torch.bool, device=device).tril()
    mask[:, :prefix] = True
    return mask


class Captioner(nn.Module):
    """States of the patches (B, N - 1, image width) and of the web caption (B, L - 1, D) -> of the slots (B, C, D).

    D is the text tower's width. The states are those before the towers' last norms. Prefix: all that stands before the
    slots.
    """
    def __init__(self, config):
        super().__init__()
        width = config.text_width
        self.image_proj = nn.Linear(config.image_width, width, bias=False)
        self.text_proj = nn.Linear(width, width, bias=False)
        self.slot_embedding = nn.Parameter(torch.randn(config.caption_length, width))
        self.blocks = nn.ModuleList([
            Block(width, config.text_heads, config.text_mlp, ACTIVATIONS[config.text_activation], config.norm_eps)
            for _ in range(config.caption_layers)])
        self.ln = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = nn.Linear(width, config.vocab_size, bias=False)  # from a slot's state to its token

    def forward(self, image_states, text_states):
        prefix = torch.cat([self.image_proj(image_states), self.text_proj(text_states)], dim=1)  # (B, N + L - 2, D)
        x = torch.cat([prefix, self.slot_embedding.expand(len(prefix), -1, -1)], dim=1)  # (B, N + L - 2 + C, D)
        mask = caption_mask(prefix.shape[1], len(self.slot_embedding), x.device)
        for block in self.blocks:
            x = block(x, mask)
        return self.ln(x[:, prefix.shape[1]:])  # (B, C, D)


def caption_losses(states, head, targets, pad_id):
    """-ln p(y_i), read from slot i: states (B, C, D), targets y (B, C) -> (B, C), and where y has a token, bool (B, C).

    Padding costs nothing, and head is not applied to it: logits of all slots over a large vocabulary would be most of
    the memory.
    """
    real = targets != pad_id
    with full_precision(states):
        logits = F.linear(upcast(states[real]), upcast(head.weight))  # (tokens of all captions, V)
        losses = F.cross_entropy(logits, targets[real], reduction="none")
    return losses.new_zeros(real.shape).masked_scatter(real, losses), real


# --- the model ------------------------------------------------------------------------------------------------------

class CLIPS(nn.Module):
    """Two encoders, one learned number, logit_scale, and, for training and for `caption`, a captioner.

    For its methods see CLIP in clip.py. New: `caption`, and `terms`, which train.py logs.
    """
    Config = Config
    terms = "contrastive", "captioning"
    example_labels = "a photo of a dog", "a photo of a cat"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.captioner = Captioner(config) if config.caption_layers else None
        if config.head_start:
            head_start(self.image_encoder, config.image_size // config.patch_size)
        # A cosine lies in [-1, 1]; to be sure of anything, a loss needs a larger range, and how large is learned. As an
        # exponent, so that it stays positive and moves by factors. train.py keeps it at most ln 100.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        # The mean and spread of ImageNet's pictures.
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1), persistent=False)

    def encode_image(self, images):
        """uint8 pixels, or floats already normalised, (B, 3, S, S), S = image_size -> features of length 1, (B, E)."""
        return self.image_feature_and_states(images)[0]

    def encode_text(self, tokens):
        """int64 tokens from `tokenize`, (B, context_length) -> features of length 1, (B, E)."""
        return self.text_feature_and_states(tokens)[0]

    def image_feature_and_states(self, images):
        """-> the feature of encode_image, (B, E), and the patches' states for the captioner, (B, N - 1, D)."""
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be (B, 3, {size}, {size}), got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        features, states = self.image_encoder(images)
        return self.normalize(features), states

    def text_feature_and_states(self, tokens):
        """-> the feature of encode_text, (B, E), and the tokens' states for the captioner, (B, L - 1, D)."""
        limit = len(self.text_encoder.positional_embedding)
        if tokens.ndim != 2 or tokens.shape[1] != limit:
            raise ValueError(f"tokens must be (B, {limit}), as tokenize makes them, got {tuple(tokens.shape)}")
        features, states = self.text_encoder(tokens)
        return self.normalize(features), states

    def similarity(self, image_features, text_features):
        """(I, E), (T, E) -> cosines (I, T), in fp32: what ranks captions, images and labels."""
        with full_precision(image_features):
            return upcast(image_features) @ upcast(text_features).T

    @torch.no_grad()
    def caption(self, images, tokenizer, web_tokens=None):
        """What the captioner says of images, as encode_image takes them -> a text for each.

        web_tokens: (B, context_length), their web captions, as in training; without them an empty text, as never there.
        """
        if self.captioner is None:
            raise ValueError("this model has no captioner: released weights come without, training makes one")
        if web_tokens is None:
            web_tokens = self.tokenize([""] * len(images), tokenizer).to(images.device)
        states = self.captioner(self.image_feature_and_states(images)[1], self.text_feature_and_states(web_tokens)[1])
        texts = []
        logits = self.captioner.head(states)[..., :len(tokenizer)]  # vocab_size may exceed it: 32,000 for BERT's 30,522
        for ids in logits.argmax(dim=-1).tolist():  # every slot at once: none waits for another's word
            end = ids.index(self.config.end_id) if self.config.end_id in ids else len(ids)
            texts.append(tokenizer.decode([i for i in ids[:end] if i != self.config.pad_id]))
        return texts

    def forward(self, images, web_tokens, sub_tokens, targets):
        """images (B, 3, S, S); web_tokens: their web captions, sub_tokens: parts of their synthetic captions, (B, L);
        targets: the synthetic captions in whole, (B, C).
        -> {"loss": the sum of the others, "contrastive": ..., "captioning": ...}, captioning with its weight in it; it
        is missing where there is no captioner.
        """
        return self.loss(**self.encode(images, web_tokens, sub_tokens, targets))

    def encode(self, images, web_tokens, sub_tokens, targets):
        """What each sample brings to the loss, batch first. Apart from `loss`, so that train.py can call it for a few
        samples at a time, and `loss` for all. What a caption costs concerns no other sample, and is worked out here.
        """
        image_features, image_states = self.image_feature_and_states(images)
        text_features, text_states = self.text_feature_and_states(torch.cat([web_tokens, sub_tokens]))  # in one pass
        web_features, sub_features = text_features.chunk(2)
        features = {"image_features": image_features, "web_features": web_features, "sub_features": sub_features}
        if self.captioner is not None:
            web_states = text_states.chunk(2)[0]  # the captioner reads the web caption alone
            states = self.captioner(image_states, web_states)
            features["caption_losses"], features["counted"] = caption_losses(
                states, self.captioner.head, targets, self.config.pad_id)
        return features

    def loss(self, image_features, web_features, sub_features, caption_losses=None, counted=None):
        scale = self.logit_scale.exp()
        terms = {"contrastive": (contrastive_loss(image_features, web_features, scale)
                                 + contrastive_loss(image_features, sub_features, scale)) / 2}
        if caption_losses is not None:
            terms["captioning"] = self.config.caption_weight * mean_of_all(caption_losses, counted)
        return {"loss": sum(terms.values()), **terms}

    def chance_loss(self, batch):
        """The contrastive loss of a model that tells nothing apart: all its features are alike."""
        return math.log(batch)

    @staticmethod
    def normalize(x):
        with full_precision(x):
            return F.normalize(upcast(x), dim=-1)

    # --- texts: which captions this model wants, and the special tokens around their pieces ---

    def tokenize(self, texts, tokenizer):
        """Texts -> int64 (B, context_length): start, pieces, end, padding, and the class token in the last place."""
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts must be a list of at least one text, got {texts!r}")
        room = self.room
        pieces = [tokenizer.encode(text) for text in texts]
        cut = sum(len(p) > room for p in pieces)
        if cut:
            warnings.warn(f"texts of more than {room} tokens are cut to that ({cut} of {len(texts)} here)")
        return self.lay_out(pieces)

    @property
    def room(self):
        return self.config.context_length - 3  # start, end and class token take the rest

    def lay_out(self, pieces):
        """Token ids of each text, cut without a warning -> (B, L): start, ids, end, padding, class token."""
        config = self.config
        rows = [[config.start_id, *p[:self.room], config.end_id] for p in pieces]
        tokens = torch.full((len(rows), config.context_length), config.pad_id)
        for i, row in enumerate(rows):
            tokens[i, :len(row)] = torch.tensor(row)
        tokens[:, -1] = config.class_id
        return tokens

    def text_batch(self, samples, rngs, tokenizer):
        """What `forward` needs besides the images: of each sample the web caption, a part of the synthetic one, and the
        whole of it. All drawn by that sample's own generator.

        samples: of data.py, each a picture's texts; rngs: a random.Random for each. A sample without a web caption has
        one of its captions in its place; one without a synthetic caption, the others, joined.
        """
        config = self.config
        web, sub, targets = [], [], torch.full((len(samples), config.caption_length), config.pad_id)
        for i, (sample, rng) in enumerate(zip(samples, rngs)):
            captions = rng.sample(sample.captions, len(sample.captions))  # shuffled
            web.append(tokenizer.encode(sample.web or captions[0]))
            others = captions if sample.web or len(captions) == 1 else captions[1:]
            synthetic = sample.long or " ".join(text.rstrip(" .") + "." for text in others)
            sub.append(shorten(synthetic, tokenizer.encode, config.shorten, rng, config.shorten_to or self.room))
            row = [*tokenizer.encode(synthetic)[:config.caption_length - 1], config.end_id]
            targets[i, :len(row)] = torch.tensor(row)
        return {"web_tokens": self.lay_out(web), "sub_tokens": self.lay_out(sub), "targets": targets}

    # --- weights from elsewhere ---

    @classmethod
    def from_pretrained(cls, source, config=None, cache="data/cache"):
        """Published weights, loaded strictly. They have no captioner.

        source: the name of a published model, such as "vit-l-14-224" (downloaded once, into `cache`, with its
        vocabulary), or the path of a file, or a state dict.
        config: a Config or its name; without one, the size whose towers have the names and shapes of the file's. With
        another image_size than the file's, the table of positions is resized, with a warning. A Config with
        caption_layers keeps the source's captioner, or gets a fresh one; a name, or nothing, means none.
        """
        source, config = find_source(source, config, cls, cache)
        state = arrange(rename(read_state(source)))
        fits = None if isinstance(config, cls.Config) else fitting_config(state, Towers)
        size = find_config(config or fits or next(iter(sizes(cls))), cls)
        model = cls(size if isinstance(config, cls.Config) else replace(size, caption_layers=0))
        # Released weights have no captioner: its fresh parameters count as given, unless the source brings some.
        fresh = {name: value for name, value in model.state_dict().items() if name.startswith("captioner.")
                 and not any(given.startswith("captioner.") for given in state)}
        try:
            load_strictly(model, fresh | (resize_positions(state, model) if config else state))
        except ValueError as error:
            hint = f"\n  it would fit config={fits!r}" if fits else ""
            if config is None:
                hint = f"\n  of {', '.join(sizes(cls))} none would fit; this was the first of them"
            raise ValueError(f"{error}{hint}") from None
        return model.eval()


# --- reading published weights --------------------------------------------------------------------------------------

DROPPED = r"(^|\.)position_ids$"
NAMES = [  # (a pattern in the published name, what it becomes here), all are applied, in this order:
    # visual.transformer.resblocks.0.attn.in_proj_weight -> image_encoder.blocks.0.attn.in_proj.weight
    (r"^(module\.|_orig_mod\.)+", ""),
    (r"^visual\.", "image_encoder."), (r"\btransformer\.resblocks\.", "blocks."), (r"\.in_proj_", ".in_proj."),
    (r"^(text\.)?(?=(blocks|token_embedding|ln_final)\.|(positional_embedding|text_projection)$)", "text_encoder."),
]


def rename(state, names=NAMES):
    """A state dict in published names -> the same tensors in the names of this file."""
    renamed = {}
    for name, value in state.items():
        if re.search(DROPPED, name):
            continue
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(f"two tensors of the weights would both be {name}")
        renamed[name] = value
    return renamed


def arrange(state):
    """The layout of this file: queries, keys and values in one matrix; transposed matrices turned back."""
    arranged = {}
    for name, value in state.items():
        if name.endswith(".T"):  # Hugging Face's projections
            name, value = name[:-2], value.T
        elif name.endswith("class_embedding"):  # (1, 1, D) in some files
            value = value.flatten()
        elif name.endswith("positional_embedding"):  # (1, N, D) in some files
            value = value.reshape(-1, value.shape[-1])
        elif re.search(r"\.[kv]_proj\.", name) and re.sub(r"\.[kv]_proj\.", ".q_proj.", name) in state:
            continue  # joined to its q_proj, in the next lines
        elif ".q_proj." in name:
            parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
            name = name.replace(".q_proj.", ".in_proj.")
            value = torch.cat([state[part] for part in parts if part in state])  # one that lacks: a wrong shape
        arranged[name] = value
    return arranged


def find_source(source, config, cls, cache):
    """The name of a published model -> its file, downloaded, and its name as config.

    A path or a state dict stays what it is; an unknown name is an error.
    """
    if isinstance(source, str) and source in PUBLISHED and source in sizes(cls):
        import data  # not at the top: this file works without its siblings
        return data.fetch(PUBLISHED[source], cache)["source"], config or source
    if isinstance(source, str) and not os.path.exists(source) and not os.path.splitext(source)[1]:
        known = ", ".join(name for name in PUBLISHED if name in sizes(cls))
        raise ValueError(f"{source}: no such file, and no published {cls.__name__}; those are {known}")
    return source, config


def read_state(source):
    """A state dict, or the path of a file that holds one: .safetensors or torch.save's. Never runs code from it."""
    what, state = ("the source", source) if isinstance(source, dict) else (source, None)
    try:
        if state is None and str(source).endswith(".safetensors"):
            from safetensors.torch import load_file
            state = load_file(source)
        elif state is None:
            state = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{source}: no such file") from None
    except ModuleNotFoundError as error:
        raise ValueError(f"{source}: reading it needs a package; pip install {error.name.split('.')[0]}") from None
    except Exception as error:  # these libraries raise half a dozen types for a file that is no checkpoint
        raise ValueError(f"{source} is no checkpoint of PyTorch or safetensors ({type(error).__name__}); expected a "
                         "file that holds tensors alone") from None
    if isinstance(state, dict) and "tokenizer" in state:
        raise ValueError(f"{what} was written by train.py: use train.load")
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{what} holds other things than tensors by name; expected a state dict")
    return state


def fitting_config(state, cls):
    """The name of the size whose parameters have the names and shapes of this state dict, or None."""
    shapes = {name: value.shape for name, value in state.items()}
    for name, config in sizes(cls).items():
        with torch.device("meta"):  # shapes without memory
            if {name: value.shape for name, value in cls(config).state_dict().items()} == shapes:
                return name


class Towers(CLIPS):
    """A CLIPS without its captioner, whatever the configuration says: what released weights are compared with."""
    def __init__(self, config):
        super().__init__(replace(config, caption_layers=0))


def resize_positions(state, model):
    """The image tower's table of positions, resized if the file's pictures had more patches than ours, or fewer."""
    name, new = "image_encoder.positional_embedding", model.config.image_size // model.config.patch_size
    table = state.get(name, torch.empty(0))
    special = len(model.image_encoder.positional_embedding) - new ** 2  # rows before those of the patches
    old = math.isqrt(max(len(table) - special, 0))
    if old == new or old ** 2 + special != len(table):
        return state  # nothing to do, or nothing that could be done: load_strictly will tell
    warnings.warn(f"positions for {old} x {old} patches, resized to {new} x {new}")
    table = upcast(table)
    grid = table[special:].T.view(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    return state | {name: torch.cat([table[:special], grid[0].flatten(1).T])}


def load_strictly(model, state):
    """Every tensor of the model from `state` and none left over, or a ValueError that lists what does not fit."""
    own = model.state_dict()
    groups = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "wrong shape": [f"{name} {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
                        for name in own if name in state and state[name].shape != own[name].shape],
    }
    if any(groups.values()):
        raise ValueError(f"the weights do not fit {type(model).__name__}:" + "".join(
            f"\n  {len(names)} {group}: " + "; ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            for group, names in groups.items() if names))
    model.load_state_dict(state)


# --- sizes, and how each is trained ---------------------------------------------------------------------------------

CONFIGS = {
    "vit-l-14-224": Config(),                # 414,247,425 parameters, the captioner apart
    "vit-l-14-336": Config(image_size=336),  # 414,575,105
    "vit-h-14-224": Config(image_width=1280, image_layers=32, image_mlp=5120, text_width=1024, text_layers=24,
                           text_heads=16, text_mlp=4096, embed_dim=1024, caption_layers=24),  # 968,284,161
    "tiny": Config(image_size=32, patch_size=8, image_width=256, image_layers=2, image_heads=8, image_mlp=1024,
                   vocab_size=1024, class_id=3, context_length=36, text_width=128, text_layers=2, text_heads=4,
                   text_mlp=512, embed_dim=128, head_start=True, caption_layers=1, caption_length=80),
}


def sizes(cls):
    """The configurations of a model class, by name."""
    return {name: config for name, config in CONFIGS.items() if type(config) is cls.Config}


def find_config(config, cls):
    """A Config of this class, or the name of one."""
    if isinstance(config, str) and config not in sizes(cls):
        raise ValueError(f"unknown configuration {config!r}; known: {', '.join(sizes(cls))}")
    if not isinstance(config, (str, cls.Config)):
        raise ValueError(f"{cls.__name__} is made of a {cls.Config.__name__}, got a {type(config).__name__}")
    return CONFIGS[config] if isinstance(config, str) else config


@torch.no_grad()
def head_start(encoder, grid):
    """Give an image tower what a ViT learns first, where it has minutes instead of days. All of it goes on learning.

    Positions: sines and cosines of a patch's column and row, so that neighbours are alike. Patch filters: three
    quarters lose their mean and become six times as strong, so that contrast is heard beside brightness. Without it the
    tiny size learns colours in its eight epochs, but hardly any shape.
    """
    table, filters = encoder.positional_embedding, encoder.conv1.weight
    quarter = table.shape[1] // 4
    angles = torch.arange(grid)[:, None] * 30 ** (-torch.arange(quarter) / quarter)  # (grid, D/4): place x frequency
    wave = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D/2)
    table[-grid ** 2:] = torch.cat([wave.repeat(grid, 1), wave.repeat_interleave(grid, dim=0)], dim=1)  # column, row
    contrast = filters[:3 * quarter]
    contrast.copy_(6 * (contrast - contrast.mean(dim=(2, 3), keepdim=True)))


def hub(name, file, sha256=None):
    return f"https://huggingface.co/{name}/resolve/main/{file}", sha256


VOCABULARY = hub("google/bert_uncased_L-4_H-256_A-4", "vocab.txt",  # BERT's
                 "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3")
PUBLISHED = {  # name: its files (address, SHA-256, of which none is published for the weights)
    name: {"source": hub(f"UCSC-VLAA/{repository}", "open_clip_pytorch_model.bin"), "vocab": VOCABULARY}
    for name, repository in (("vit-l-14-224", "ViT-L-14-CLIPS-224-Recap-DataComp-1B"),
                             ("vit-l-14-336", "ViT-L-14-CLIPS-Recap-DataComp-1B"),
                             ("vit-h-14-224", "ViT-H-14-CLIPS-224-Recap-DataComp-1B"))}

# What train.py uses unless told otherwise. `files`: what to start from; `tokenizer`: what its vocabulary is for;
# `image_lr`: the image tower's rate, in multiples of lr; `scratch`: what differs with --scratch, which starts from
# nothing.
RECIPES = {
    **{name: dict(batch=64, epochs=5, lr=1e-5, image_lr=1.0, weight_decay=0.1, warmup=0.1, tokenizer="wordpiece-clips",
                  files=files, scratch=dict(epochs=32, lr=5e-4, weight_decay=0.2))
       for name, files in PUBLISHED.items()},
    "tiny": dict(batch=64, epochs=8, lr=1e-3, image_lr=1.0, weight_decay=0.05, warmup=0.1),
}


class ZeroShotPipeline:
    """The shortest way to use a model: ZeroShotPipeline("best.pt").predict("cat.jpg", ["a cat", "a dog"])."""
    def __init__(self, checkpoint):
        import train  # not at the top: this file works without its siblings
        self.model, self.tokenizer, self.preprocess = train.load(checkpoint)

    @torch.no_grad()
    def cosines(self, image, labels):
        image_features = self.model.encode_image(self.preprocess(image)[None])
        text_features = self.model.encode_text(self.model.tokenize(labels, self.tokenizer))
        return self.model.similarity(image_features, text_features)[0]  # (labels,)

    @torch.no_grad()
    def predict(self, image, labels, top_k=5):
        """image: a path or a PIL image; labels: two texts or more -> the top_k (label, probability), best first."""
        if isinstance(labels, str) or len(labels) < 2:
            raise ValueError(f"predict compares labels: expected a list of two or more, got {labels!r}")
        probabilities = (self.model.logit_scale.exp() * self.cosines(image, labels)).softmax(dim=0)
        return [(labels[i], probabilities[i].item()) for i in probabilities.argsort(descending=True)[:top_k]]


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit('usage: python clips.py CHECKPOINT IMAGE "a photo of a dog" "a photo of a cat" ...  (two or more)')
    checkpoint, image, *labels = sys.argv[1:]
    try:
        pipeline = ZeroShotPipeline(checkpoint)
        cosines = pipeline.cosines(image, labels)
        probabilities = (pipeline.model.logit_scale.detach().exp() * cosines).softmax(dim=0)
        for i in probabilities.argsort(descending=True).tolist():
            print(f"{probabilities[i]:7.1%}  cosine {cosines[i]:+.3f}  {labels[i]}")
        if pipeline.model.captioner is not None:
            print("says:", *pipeline.model.caption(pipeline.preprocess(image)[None], pipeline.tokenizer))
    except ValueError as error:
        sys.exit(f"clips.py: {error}")
