"""CLIPS: long synthetic captions, of which a short piece teaches more than the whole.

Liu et al., "CLIPS: An Enhanced CLIP Framework for Learning with Synthetic Captions", arXiv 2411.16828 (2024).

The idea: let a vision-language model describe every picture in a paragraph, the synthetic caption. Contrasting the
picture with all of it teaches less than contrasting it with a part, and the shorter the part the better, down to one
sentence (the paper's inverse effect). So contrast the picture with its caption from the web and with one sentence of
the synthetic one. And so that the rest is not wasted, let a decoder, the captioner, predict all of it.

    image    u = ViT(image)             mean of the patches' states, normed, projected                            (B, E)
    texts    v, w = Transformer(web caption), Transformer(one sentence of the synthetic caption)                  (B, E)
    contrast 1/2 [ CLIP(u, v) + CLIP(u, w) ]     CLIP's symmetric loss, each over its own (B, B) table
    caption  -mean ln p(y_i | image, web caption)    y (B, C): the synthetic caption; its token i is read from slot i
    loss     contrast + 2 caption                    (the mean is over the tokens of all captions, all processes)

In the code: u image_features, v web_features, w sub_features, y targets.

The captioner (autoregressive in the authors' words) is never given the words of the caption it predicts. In their
places are C learned vectors, the slots. A slot sees the image, the web caption and the states of the slots before
it, but never a word that was chosen, so all words are computed in one pass, in training and in `caption`. If several
captions would be right, the slots cannot agree on one: each gives its own most probable word.

Shapes: B batch, S image side, P patch side, N image tokens (class token and patches), L text tokens (always
context_length), C caption slots, V vocabulary, D width, H attention heads, E embedding, W processes, I images, T texts.

Read it beside clip.py. The towers differ in details, the section "new in CLIPS" is the paper, and `text_batch` says
which captions a step sees. What follows the model is for when you need it: published weights and sizes.

The towers compute what the published code computes (tests/golden holds the values): no norm before the blocks, pooling
before the last norm, texts without any mask and with the class token last, eps 1e-6, the tanh form of GELU in the text
tower only. The released PyTorch code cannot train the captioner, so captions, captioner and loss are as in OpenVision,
by the same group. What differs:
  - where there are no synthetic captions, as in Flickr8k, one caption takes the place of the web's, and the others,
    joined, that of the synthetic one;
  - the images' positions are learned (there: fixed sines);
  - AdamW's second beta is .98 (there .95), crops are half the picture or more (there 40 %); the tiny size starts with
    `sines_and_contrast`.

    python train.py --model clips                                      # the tiny one on generated pictures: 12 minutes
    python clips.py runs/clips-shapes/best.pt photo.png "a red star" "a blue circle"      # and what it sees, in words
    python experiments/claims.py clips                                 # the paper's claims, on shapes
"""
import math
import re
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
    fit: str = "squash"              # pictures are squeezed into a square, not cropped
    vocab_size: int = 32000          # rows of the table; BERT's vocabulary has 30,522
    pad_id: int = 0                  # it is attended to like a word, so the id matters
    start_id: int = 1                # this and end_id: unused by BERT itself, which has 101 and 102
    end_id: int = 2
    class_id: int = 101              # BERT's [CLS], after the padding: its state is the text's feature
    context_length: int = 80         # longer texts are cut to this, shorter ones padded
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_mlp: int = 3072
    embed_dim: int = 768
    norm_eps: float = 1e-6
    sines_and_contrast: bool = False  # a better start for a small image tower: see the function of that name
    caption_layers: int = 12         # the captioner's blocks, as wide as the text tower's; 0: no captioner
    caption_length: int = 128        # its slots
    caption_weight: float = 2.0
    shorten: str = "sentence"        # which part of a synthetic caption is contrasted: see the function
    shorten_to: int = 0              # its tokens; 0: as many as there is room for


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


class Attention(nn.Module):
    """Multi-head self-attention. mask: True where a key may be seen, broadcast to (B, H, N, N)."""
    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj = nn.Linear(width, 3 * width)  # queries, keys and values in one product
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj.weight)  # this and the zeros: as in nn.MultiheadAttention
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, mask=None, causal=False):
        B, N, D = x.shape
        q, k, v = self.in_proj(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, N, D/H)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """Linear, nonlinearity, linear. CLIP took the names c_fc and c_proj (c for convolution) from GPT-2."""
    def __init__(self, width, hidden, activation=F.gelu):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.activation = activation
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """A transformer block with the norms before attention and MLP (pre-LN): the sum itself is never normalised."""
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
        self.blocks = nn.ModuleList(Block(width, config.image_heads, config.image_mlp, F.gelu, config.norm_eps)
                                    for _ in range(config.image_layers))
        self.ln_post = nn.LayerNorm(width, eps=config.norm_eps)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))
        if config.sines_and_contrast:
            sines_and_contrast(self, grid)

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
        self.blocks = nn.ModuleList(Block(width, config.text_heads, config.text_mlp, gelu_tanh, config.norm_eps)
                                    for _ in range(layers))
        self.ln_final = nn.LayerNorm(width, eps=config.norm_eps)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.blocks:  # the deeper the tower, the less each block adds to x at first
            nn.init.normal_(block.attn.in_proj.weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)

    def forward(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding  # (B, L, D)
        for block in self.blocks:
            x = block(x)
        return self.ln_final(x[:, -1]) @ self.text_projection, x[:, :-1]  # (B, E), (B, L - 1, D)


# --- several processes, full precision ------------------------------------------------------------------------------

class Gather(torch.autograd.Function):
    """The rows of all processes, (B, ...) -> (W B, ...) on W processes, with a gradient.

    B must be the same on all processes. Why the gradient is exact: process r has the loss l_r of its own B rows, and
    the whole batch has l = 1/W sum_r l_r. Every l_q depends on the features x_r of process r, so dl/dx_r is
    1/W sum_q dl_q/dx_r. `backward` sums over q what flows through the gathered copies; autograd adds what flows
    through r's own rows, which were not gathered. DDP averages gradients, which is the 1/W.
    """
    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # all_reduce works in place
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    return Gather.apply(x.contiguous()) if dist.is_initialized() and dist.get_world_size() > 1 else x


def upcast(x):  # half precision to fp32; leaves fp32 and float64 as they are
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def full_precision(x):  # switches autocast off: the towers may run in bf16, similarities and losses may not
    return torch.autocast(x.device.type, enabled=False)


def mean_of_all(values, counted):
    """The mean of the values where `counted` (bool, same shape) is true, over all W processes: this process's share.

    DDP averages the W shares. So a share is the local sum, times W, divided by the number counted on all processes.
    """
    numbers = gather(counted.sum()[None])  # (W,)
    return (values * counted).sum() * len(numbers) / numbers.sum().clamp(min=1)


# --- the loss -------------------------------------------------------------------------------------------------------

def contrastive_loss(image_features, text_features, scale):
    """The symmetric cross-entropy of CLIP over the global batch (CLIP, Fig. 3).

    image_features, text_features: (B, E) of length 1, row i of both is a pair; scale: exp(logit_scale).
    Rows are local, columns come from all W processes. The loss is ln(W B) if all features are equal.
    It is computed in fp32: in bf16, at a scale of 100, logits of matching pairs are off by up to 0.4.
    """
    with full_precision(image_features):
        image_features, text_features = upcast(image_features), upcast(text_features)
        logits_per_image = scale * image_features @ gather(text_features).T  # (B, W B)
        logits_per_text = scale * text_features @ gather(image_features).T   # (B, W B)
        first = dist.get_rank() * len(image_features) if dist.is_initialized() else 0  # the column of our row 0
        labels = torch.arange(first, first + len(image_features), device=image_features.device)
        return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


# --- new in CLIPS: what of a long caption is contrasted, and the captioner ------------------------------------------

def shorten(text, encode, how, rng, length):
    """A long caption -> the token ids of a part of it, at most `length` of them.

    how: "sentence" (the paper's sub-caption): one random sentence; "first": the first tokens; "block": consecutive
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

    D is the text tower's width. The states are those before the towers' last norms. The prefix is what comes before the
    slots.
    """
    def __init__(self, config):
        super().__init__()
        width = config.text_width
        self.image_proj = nn.Linear(config.image_width, width, bias=False)
        self.text_proj = nn.Linear(width, width, bias=False)
        self.slot_embedding = nn.Parameter(torch.randn(config.caption_length, width))
        self.blocks = nn.ModuleList(Block(width, config.text_heads, config.text_mlp, gelu_tanh, config.norm_eps)
                                    for _ in range(config.caption_layers))
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

    Padding has no loss, and head is not applied to it: the logits of all slots would take most of the memory.
    """
    real = targets != pad_id
    with full_precision(states):
        logits = F.linear(upcast(states[real]), upcast(head.weight))  # (tokens of all captions, V)
        losses = F.cross_entropy(logits, targets[real], reduction="none")
    return losses.new_zeros(real.shape).masked_scatter(real, losses), real


# --- the model ------------------------------------------------------------------------------------------------------

class CLIPS(nn.Module):
    """Two encoders, a learned logit_scale, and a captioner, used in training and by `caption`.

    Its methods are those of CLIP in clip.py, and `caption`.
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.captioner = Captioner(config) if config.caption_layers else None
        # Stretches the cosines. Learned as a logarithm, so that it stays positive; train.py keeps it at most ln 100.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        # The mean and standard deviation of ImageNet's pictures.
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
        if images.shape[1:] != (3, self.config.image_size, self.config.image_size):
            raise ValueError(f"images must be (B, 3, S, S), S = {self.config.image_size}, got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        features, states = self.image_encoder(images)
        return F.normalize(upcast(features), dim=-1), states

    def text_feature_and_states(self, tokens):
        """-> the feature of encode_text, (B, E), and the tokens' states for the captioner, (B, L - 1, D)."""
        limit = len(self.text_encoder.positional_embedding)
        if tokens.ndim != 2 or tokens.shape[1] != limit:
            raise ValueError(f"tokens must be (B, {limit}), as tokenize makes them, got {tuple(tokens.shape)}")
        features, states = self.text_encoder(tokens)
        return F.normalize(upcast(features), dim=-1), states

    def similarity(self, image_features, text_features):
        """(I, E), (T, E) -> cosines (I, T), in fp32: they rank captions, images and labels."""
        with full_precision(image_features):
            return upcast(image_features) @ upcast(text_features).T

    def logits(self, images, tokens):
        """I images, T texts -> scaled cosines (I, T): their softmax over T is the probability of each text."""
        return self.logit_scale.exp() * self.similarity(self.encode_image(images), self.encode_text(tokens))

    @torch.no_grad()
    def caption(self, images, tokenizer, web_tokens=None):
        """The captioner's text for each image.

        web_tokens: their web captions, (B, context_length), as in training; otherwise an empty text, which training
        never shows.
        """
        if self.captioner is None:
            raise ValueError("this model has no captioner: released weights come without, training makes one")
        if web_tokens is None:
            web_tokens = self.tokenize([""] * len(images), tokenizer).to(images.device)
        states = self.captioner(self.image_feature_and_states(images)[1], self.text_feature_and_states(web_tokens)[1])
        texts = []
        logits = self.captioner.head(states)[..., :len(tokenizer)]  # vocab_size may exceed it: 32,000 for BERT's 30,522
        for ids in logits.argmax(dim=-1).tolist():  # all slots at once: none waits for another's word
            end = ids.index(self.config.end_id) if self.config.end_id in ids else len(ids)
            texts.append(tokenizer.decode([i for i in ids[:end] if i != self.config.pad_id]))
        return texts

    def forward(self, images, web_tokens, sub_tokens, targets):
        """images (B, 3, S, S); web_tokens: their web captions, sub_tokens: parts of their synthetic captions, (B, L);
        targets: the whole synthetic captions, (B, C).
        -> {"loss": the sum of the others, "contrastive": ..., "captioning": ...}; captioning includes its weight, and
        is missing if there is no captioner.
        """
        return self.loss(**self.encode(images, web_tokens, sub_tokens, targets))

    def encode(self, images, web_tokens, sub_tokens, targets):
        """The arguments of `loss`, a row for each sample. To save memory, train.py may call it on parts of a batch.

        The loss of a caption involves no other sample, so it is computed here.
        """
        if len(images) != len(web_tokens):
            raise ValueError(f"{len(images)} images, {len(web_tokens)} captions; expected one caption for each image")
        image_features, image_states = self.image_feature_and_states(images)
        text_features, text_states = self.text_feature_and_states(torch.cat([web_tokens, sub_tokens]))  # in one pass
        web_features, sub_features = text_features.chunk(2)
        features = {"image_features": image_features, "web_features": web_features, "sub_features": sub_features}
        if self.captioner is not None:
            web_states = text_states.chunk(2)[0]  # the captioner reads only the web caption
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

    def tokenize(self, texts, tokenizer):
        """A text or several -> int64 (B, context_length): start, ids, end, padding, and the class token last."""
        texts = [texts] if isinstance(texts, str) else texts
        room = self.room
        pieces = [tokenizer.encode(text) for text in texts]
        if cut := sum(len(p) > room for p in pieces):
            warnings.warn(f"texts of more than {room} tokens are cut to that ({cut} of {len(texts)} here)")
        return self.lay_out(pieces)

    @property
    def room(self):
        return self.config.context_length - 3  # start, end and class token take the rest

    def lay_out(self, pieces):
        """Token ids of each text -> (B, L): start, ids (cut without a warning), end, padding, class token."""
        config = self.config
        rows = [[config.start_id, *p[:self.room], config.end_id] for p in pieces]
        tokens = torch.full((len(rows), config.context_length), config.pad_id)
        for i, row in enumerate(rows):
            tokens[i, :len(row)] = torch.tensor(row)
        tokens[:, -1] = config.class_id
        return tokens

    def text_batch(self, samples, rngs, tokenizer):
        """What `forward` needs besides the images: of each sample of data.py the web caption, a part of the synthetic
        one, and the whole synthetic one. All drawn by that sample's own generator.

        Without a web caption, one of the sample's captions takes its place. Without a synthetic one, the others do.
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

    # --- published weights --------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source, config=None):
        """Published weights, loaded strictly: a name of PUBLISHED, or a file or a state dict in the published names.
        config: a Config or its name, needed unless source is a name of PUBLISHED. Positions are resized.

        Released weights have no captioner. A Config with caption_layers gets a new one to train; a name means none.
        """
        model = cls(config if isinstance(config, Config) else replace(CONFIGS[config or source], caption_layers=0))
        state = resize_positions(model, read_weights(source, NAMES))
        if not any(name.startswith("captioner.") for name in state):
            state |= {name: value for name, value in model.state_dict().items() if name.startswith("captioner.")}
        return load_weights(model, state)


NAMES = [  # (a pattern in the published name, what it becomes here), all applied in this order:
    # visual.transformer.resblocks.0.attn.in_proj_weight -> image_encoder.blocks.0.attn.in_proj.weight
    (r"^(module\.|_orig_mod\.)+", ""),
    (r"^visual\.", "image_encoder."), (r"\btransformer\.resblocks\.", "blocks."), (r"\.in_proj_", ".in_proj."),
    (r"^(text\.)?(?=(blocks|token_embedding|ln_final)\.|(positional_embedding|text_projection)$)", "text_encoder."),
]


def read_weights(source, names):
    """A name of PUBLISHED, a file or a state dict -> its tensors, renamed by `names`. Runs no code from a file."""
    if isinstance(source, str) and source in PUBLISHED:
        import data  # only here, so that the rest of the file needs nothing but torch
        source = data.fetch(PUBLISHED[source])["source"]
    if not isinstance(source, dict) and str(source).endswith(".safetensors"):
        from safetensors.torch import load_file  # pip install safetensors
        source = load_file(source)
    state = source if isinstance(source, dict) else torch.load(source, map_location="cpu", weights_only=True)
    renamed = {}
    for name, value in state.get("state_dict", state).items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    renamed.pop("", None)  # `names` empties the names of what is not used
    return renamed


def load_weights(model, state):
    """Load what read_weights returned, strictly: torch's error lists the tensors that do not fit."""
    own = model.state_dict()
    for name in list(state):
        if ".q_proj." in name:  # queries, keys and values become one matrix
            parts = [state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
            state[name.replace(".q_proj.", ".in_proj.")] = torch.cat(parts)
        elif name.endswith(".T"):  # it is stored transposed
            state[name.removesuffix(".T")] = state.pop(name).T
        elif name in own and state[name].squeeze().shape == own[name].squeeze().shape:  # but for axes of length 1
            state[name] = state[name].reshape(own[name].shape)
    model.load_state_dict(state)
    return model.eval()


def resize_positions(model, state):
    """Resize the image tower's table of positions if the file's pictures had more or fewer patches than the model's."""
    name, new = "image_encoder.positional_embedding", model.config.image_size // model.config.patch_size
    table = upcast(state[name]).flatten(0, -2)  # (N, D)
    special = len(model.image_encoder.positional_embedding) - new ** 2  # rows before those of the patches
    old = math.isqrt(len(table) - special)
    if old != new:
        warnings.warn(f"positions for {old} x {old} patches, resized to {new} x {new}")
        grid = F.interpolate(table[special:].T.view(1, -1, old, old), size=(new, new), mode="bicubic", antialias=True)
        state[name] = torch.cat([table[:special], grid[0].flatten(1).T])
    return state


# --- sizes, and how each is trained ---------------------------------------------------------------------------------

CONFIGS = {
    "vit-l-14-224": Config(),                # 414,247,425 parameters, without the captioner
    "vit-l-14-336": Config(image_size=336),  # 414,575,105
    "vit-h-14-224": Config(image_width=1280, image_layers=32, image_mlp=5120, text_width=1024, text_layers=24,
                           text_heads=16, text_mlp=4096, embed_dim=1024, caption_layers=24),  # 968,284,161
    "tiny": Config(image_size=32, patch_size=8, image_width=256, image_layers=2, image_heads=8, image_mlp=1024,
                   vocab_size=1024, class_id=3, context_length=36, text_width=128, text_layers=2, text_heads=4,
                   text_mlp=512, embed_dim=128, sines_and_contrast=True, caption_layers=1, caption_length=80),
}

HUB = "https://huggingface.co"
BERT = (f"{HUB}/google/bert_uncased_L-4_H-256_A-4/resolve/main/vocab.txt",
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3")
UCSC = f"{HUB}/UCSC-VLAA/%s-Recap-DataComp-1B/resolve/main/open_clip_pytorch_model.bin"
PUBLISHED = {  # the files of a published model: (address, SHA-256 where one is known)
    "vit-l-14-224": {"source": (UCSC % "ViT-L-14-CLIPS-224", None), "vocab": BERT},
    "vit-l-14-336": {"source": (UCSC % "ViT-L-14-CLIPS", None), "vocab": BERT},
    "vit-h-14-224": {"source": (UCSC % "ViT-H-14-CLIPS-224", None), "vocab": BERT},
}

# The defaults of train.py. files: the weights that a run starts from; tokenizer: the kind of their vocabulary;
# image_lr: the image tower's rate, as a multiple of lr; scratch: what --scratch (from random weights) changes.
FINE = dict(batch=64, epochs=5, lr=1e-5, image_lr=1.0, weight_decay=0.1, warmup=0.1, tokenizer="wordpiece-clips",
            scratch=dict(epochs=32, lr=5e-4, weight_decay=0.2))
RECIPES = {
    "vit-l-14-224": dict(FINE, files=PUBLISHED["vit-l-14-224"]),
    "vit-l-14-336": dict(FINE, files=PUBLISHED["vit-l-14-336"]),
    "vit-h-14-224": dict(FINE, files=PUBLISHED["vit-h-14-224"]),
    "tiny": dict(batch=64, epochs=8, lr=1e-3, image_lr=1.0, weight_decay=0.05, warmup=0.1),
}


@torch.no_grad()
def sines_and_contrast(encoder, grid):
    """Start an image tower with what a ViT learns first: without it, the tiny size learns colours but hardly any shape.

    Positions: sines and cosines of a patch's column and row, so that neighbours are similar. Patch filters: three
    quarters of them lose their mean and are multiplied by 6, so that contrast counts as much as brightness.
    """
    table, filters = encoder.positional_embedding, encoder.conv1.weight
    quarter = table.shape[1] // 4
    angles = torch.arange(grid)[:, None] * 30 ** (-torch.arange(quarter) / quarter)  # (grid, D/4): place x frequency
    wave = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D/2)
    table[-grid ** 2:] = torch.cat([wave.repeat(grid, 1), wave.repeat_interleave(grid, dim=0)], dim=1)  # column, row
    filters[:3 * quarter] = 6 * (filters - filters.mean(dim=(2, 3), keepdim=True))[:3 * quarter]


def load(source, device=None):
    """A checkpoint of train.py, its run's folder, or a name of PUBLISHED -> model, tokenizer, preprocess."""
    import data  # only here, so that the rest of the file needs nothing but torch
    return data.load_model(CLIPS, Config, PUBLISHED, RECIPES, source, device)


class ZeroShotPipeline:
    """ZeroShotPipeline("best.pt").predict("cat.jpg", ["a cat", "a dog"]) -> [(label, probability), ...], best first."""
    def __init__(self, source, device=None):
        self.model, self.tokenizer, self.preprocess = load(source, device)

    @torch.no_grad()
    def predict(self, image, labels, top_k=5):
        """image: a path or a PIL image; labels: two texts or more."""
        device = self.model.logit_scale.device
        images, tokens = self.preprocess(image)[None].to(device), self.model.tokenize(labels, self.tokenizer).to(device)
        probabilities = self.model.logits(images, tokens)[0].softmax(dim=0).tolist()
        return sorted(zip(labels, probabilities), key=lambda pair: -pair[1])[:top_k]


if __name__ == "__main__":
    import data
    data.command(load)
