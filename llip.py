"""Llip: a feature of the image for each caption, mixed from several.

Lavoie et al., "Modeling Caption Diversity in Contrastive Vision-Language Pretraining", arXiv 2405.00740 (ICML 2024).

The idea: a photograph has many true captions, one about the dog, one about the weather, and a single image feature has
to lie near all of them. Let the ViT end in K features; each caption mixes them into one, by weights of its own, and is
compared with that.

    image    k_in, v_in = h_in Wk_n, h_in Wv_n      from the last state h_in of mixture token n = 1..K      (B, M, K, d)
    text     q_j, t_j = e_j Wq, e_j Wt              from e_j, the end-of-text state               (B, M, d) and (B, E)
    mixture  z_ij = concat_m [ sum_n softmax_n(k_imn . q_jm / tau) v_imn ] Wo      image i as text j sees it   (B, B, E)
    logits   s_ij = exp(logit_scale) * z_ij/|z_ij| . t_j/|t_j| + logit_bias                                     (B, B)
    loss     sum over all pairs of -ln sigmoid(y_ij s_ij) / B,    y = 1 on the diagonal, else -1

h and e are behind the towers' last norms. k, v and q are cut into M heads (index m) of d numbers, as in multi-head
attention (in the two largest sizes after a LayerNorm each); tau is the temperature, and stands in the place of sqrt(d).
In the code: Wk_n, Wv_n are k_proj[n], v_proj[n], each token's own; Wq is q_proj, Wt text_projection, Wo out_proj. The
loss is SigLIP's: each pair is judged by itself. The image is mixed for wrong captions too, by their own weights; mixed
for its right caption alone, it would give the answer away.

Shapes: B batch, S image side, P patch side, N image tokens (K mixture tokens and patches), L text tokens, D width,
H attention heads, E embedding, M mixing heads, d = E / M, K mixture tokens, I images, T texts, W processes.

How to read it: beside clip.py. What is new are the mixture tokens in ImageEncoder, the query in TextEncoder, and the
section "new in Llip". What follows the model is for when you need it: published weights, sizes, recipes; and, last,
the same loss without building the (B, B, E) mixtures.

It computes what the published code computes (tests/golden holds the values). What differs:
  - training and `similarity` never build the mixtures, see `mixture_cosines`: the same numbers, 1.7 to 3.9 times as
    fast and in a tenth of the memory (batch 256, K = 32, E = 512, on a CPU: python tests/bench.py llip);
  - the state of a text is taken at the first end-of-text id, `end_id`, and not at the largest id; and it need not be
    padded: attention is causal, so nothing behind the end of a text can change its feature;
  - zero-shot (train.py): a class scores the mean similarity of its prompts, as in the other files; the published
    evaluation averages the prompts' queries and targets, and mixes once for each class;
  - on several processes everybody holds all queries and targets, in the place of a ring exchange: the same sum;
  - training: AdamW's second beta is .98 (there .95), and a batch is what your machine holds (there 32,768); the tiny
    size begins with `head_start`.

    python train.py --model llip                                       # the tiny one on generated pictures: 5 minutes
    python train.py --model llip --config vit-b-16-k32 --data flickr8k # goes on from the released weights
    python llip.py runs/llip-shapes/best.pt photo.png "a red star" "a blue circle"
    python llip.py llip/vit-b-16-k32 photo.jpg "a photo of a dog" "a photo of a cat"    # the authors', downloaded once
    python tests/claims.py llip                                        # the paper's claims, on shapes
"""
import math
import os
import re
import sys
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    image_size: int = 224
    patch_size: int = 32
    image_width: int = 768
    image_layers: int = 12
    image_heads: int = 12
    image_mlp: int = 3072            # the hidden width
    vocab_size: int = 49408
    end_id: int = 49407              # the token at which a text's feature is taken
    context_length: int = 77         # longer texts are cut here
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    text_mlp: int = 2048
    embed_dim: int = 512
    activation: str = "quick_gelu"
    head_start: bool = False         # for a fresh small image tower: see the function of that name
    logit_scale: float = math.log(1 / 0.07)  # at birth; tiny begins at ln 30, with too few steps to climb there
    logit_bias: float = -10.0                # at birth: nearly all pairs are wrong ones
    mixture_tokens: int = 64                 # K
    mixing_heads: int = 8                    # M; each has d = embed_dim / M numbers
    temperature: float = 5.0                 # tau, divides the scores in the mixture's softmax: the larger, the flatter
    mixing_norm: bool = False                # H, G: LayerNorm on all E numbers of a key, value or query


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


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
    """ViT with K mixture tokens: images (B, 3, S, S), normalised -> keys, values (B, M, K, d) each."""
    def __init__(self, config):
        super().__init__()
        width, grid = config.image_width, config.image_size // config.patch_size
        self.K, self.mixing_heads = config.mixture_tokens, config.mixing_heads
        self.conv1 = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(self.K, width))  # the mixture tokens
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(self.K + grid ** 2, width))
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList([
            Block(width, config.image_heads, config.image_mlp, ACTIVATIONS[config.activation])
            for _ in range(config.image_layers)])
        self.ln_post = nn.LayerNorm(width)
        self.k_proj = nn.Parameter(width ** -0.5 * torch.randn(self.K, width, config.embed_dim))  # for each token
        self.v_proj = nn.Parameter(width ** -0.5 * torch.randn(self.K, width, config.embed_dim))
        norm = nn.LayerNorm if config.mixing_norm else nn.Identity
        self.k_norm, self.v_norm = norm(config.embed_dim), norm(config.embed_dim)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, N - K, D): a token for each patch
        x = torch.cat([self.class_embedding.expand(len(x), -1, -1), x], dim=1)  # (B, N, D)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.blocks:
            x = block(x)
        x = self.ln_post(x[:, :self.K])  # (B, K, D)
        keys = self.k_norm(torch.einsum("bnw,nwe->bne", x, self.k_proj))  # (B, K, E), a matrix for each token
        values = self.v_norm(torch.einsum("bnw,nwe->bne", x, self.v_proj))
        return tuple(y.unflatten(2, (self.mixing_heads, -1)).transpose(1, 2) for y in (keys, values))  # (B, M, K, d)


class TextEncoder(nn.Module):
    """A causal transformer: tokens (B, L) with `end_id` in every row -> query (B, M, d), target (B, E).

    Both from the state at the first `end_id`, the first to have read the whole text. What follows cannot influence it:
    padding may be any id, any length.
    """
    def __init__(self, config):
        super().__init__()
        width, layers = config.text_width, config.text_layers
        self.end_id, self.mixing_heads = config.end_id, config.mixing_heads
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.blocks = nn.ModuleList([
            Block(width, config.text_heads, config.text_mlp, ACTIVATIONS[config.activation])
            for _ in range(layers)])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))
        self.q_proj = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))
        self.q_norm = nn.LayerNorm(config.embed_dim) if config.mixing_norm else nn.Identity()
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.blocks:  # the more blocks, the smaller each one's first contribution to x
            nn.init.normal_(block.attn.in_proj.weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)

    def forward(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]  # (B, L, D)
        for block in self.blocks:
            x = block(x, causal=True)
        ends = tokens == self.end_id
        # Checked on a CPU only: on a GPU the check would mean waiting. There, a row without an end gives its first state,
        # for argmax over nothing but zeros is 0.
        if tokens.device.type == "cpu" and not ends.any(dim=1).all():
            raise ValueError(f"a row of tokens has no end-of-text id {self.end_id}: is this the model's own tokenizer?")
        x = x[torch.arange(len(x), device=x.device), ends.int().argmax(dim=1)]  # (B, D), argmax: the first of them
        x = self.ln_final(x)
        query = self.q_norm(x @ self.q_proj).unflatten(1, (self.mixing_heads, -1))  # (B, M, d)
        return query, x @ self.text_projection  # the target: (B, E)


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


# --- new in Llip ----------------------------------------------------------------------------------------------------

class KeysValues(NamedTuple):
    """An image's mixture tokens: what captions choose by, and what they get. Both (B, M, K, d)."""
    keys: torch.Tensor
    values: torch.Tensor


class QueryTarget(NamedTuple):
    """A text's query, (B, M, d), and its target, what the chosen mixture is compared with, (B, E) of length 1."""
    query: torch.Tensor
    target: torch.Tensor


def mixing_weights(keys, query, temperature):
    """What each text takes from each image: keys (I, M, K, d), query (T, M, d) -> (I, M, K, T), summing to 1 over K."""
    return (torch.einsum("imnd,jmd->imnj", keys, query) / temperature).softmax(dim=2)  # no 1 / sqrt(d)


def mixtures(images, texts, out_proj, temperature):
    """Each image as each text sees it, z_ij: KeysValues of I, QueryTarget of T -> (I, T, E), not of length 1."""
    weights = mixing_weights(images.keys, texts.query, temperature)
    return torch.einsum("imnj,imnd->ijmd", weights, images.values).flatten(2) @ out_proj


def plain_cosines(images, texts, out_proj, temperature):
    """z_ij/|z_ij| . t_j with every mixture built: (I, T). The definition; what runs is mixture_cosines, at the end."""
    z = F.normalize(mixtures(images, texts, out_proj, temperature), dim=-1)
    return torch.einsum("ije,je->ij", z, texts.target)


def sigmoid_loss(similarities, first, scale, bias):
    """A yes or no for every pair of I images and T texts: is this its caption? Summed; the caller divides by B.

    similarities: (I, T); the caption of image i is text first + i. first: 0, where one process has all texts to itself.
    """
    own = torch.arange(first, first + len(similarities), device=similarities.device)
    y = torch.full_like(similarities, -1.0).scatter_(1, own[:, None], 1.0)
    return -F.logsigmoid(y * (scale * similarities + bias)).sum()


def mixture_loss(image_features, text_features, out_proj, scale, bias, temperature):
    """sigmoid_loss(plain_cosines(...), ...) / B over the global batch, computed as the last section does: without z.

    image_features: KeysValues, text_features: QueryTarget, of which rows i belong together; scale: exp(logit_scale).
    Local images against the texts of all W processes; the sum over pairs is divided by B, not by the number of pairs.
    Never negative; about 10 at birth, as a bias of -10 calls all B true pairs wrong, at a cost of 10 each.
    In fp32: half types lose 1e-3 to 1e-2 of a cosine.
    """
    with full_precision(out_proj):
        keys, values, query, target = map(upcast, (*image_features, *text_features))
        first = dist.get_rank() * len(keys) if dist.is_initialized() else 0  # where our columns begin
        return MixtureLoss.apply(torch.is_grad_enabled(), temperature, first, keys, values, gather(query),
                                 gather(target), upcast(out_proj), scale, bias)


# --- the model ------------------------------------------------------------------------------------------------------

class Llip(nn.Module):
    """Two encoders, the matrix behind the mixing heads, and two learned numbers, logit_scale and logit_bias.

    For its methods see CLIP in clip.py. `temperature` may be changed at any time, as the published evaluation does.
    """
    Config = Config
    example_labels = "a photo of a dog", "a photo of a cat"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.temperature = config.temperature
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.out_proj = nn.Parameter(config.embed_dim ** -0.5 * torch.randn(config.embed_dim, config.embed_dim))
        if config.head_start:
            head_start(self.image_encoder, config.image_size // config.patch_size)
        # A cosine lies in [-1, 1]; to be sure of anything, a loss needs a larger range, and how large is learned. As an
        # exponent, so that it stays positive and moves by factors. train.py keeps it at most ln 100.
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(config.logit_bias)))
        # The mean and spread of CLIP's own training pictures.
        self.register_buffer("mean", torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1), persistent=False)

    def encode_image(self, images):
        """uint8 pixels, or floats already normalised, (B, 3, S, S), S = image_size -> KeysValues, (B, M, K, d) twice.

        No single vector stands for an image: which feature is compared depends on the caption. A gallery must keep keys
        and values, 2 K times what CLIP keeps, and an index of nearest neighbours cannot search it.
        """
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be (B, 3, {size}, {size}), got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return KeysValues(*map(upcast, self.image_encoder(images)))

    def encode_text(self, tokens):
        """int64 tokens from `tokenize`, (B, L), L at most the number of positions -> QueryTarget: (B, M, d), (B, E)."""
        limit = len(self.text_encoder.positional_embedding)
        if tokens.ndim != 2 or tokens.shape[1] > limit:
            raise ValueError(f"tokens must be (B, L) with L <= {limit}, got {tuple(tokens.shape)}")
        query, target = self.text_encoder(tokens)
        return QueryTarget(upcast(query), self.normalize(target))

    def similarity(self, image_features, text_features):
        """KeysValues of I, QueryTarget of T -> cosines (I, T), in fp32: what ranks captions, images and labels.

        A few images at a time: the weights, (I, M, K, T), are M K times as large as the table that is returned.
        """
        with full_precision(self.out_proj):
            keys, values, query, target = map(upcast, (*image_features, *text_features))
            size = images_per_chunk(keys, query)
            return torch.cat([mixture_cosines(images, (query, target), upcast(self.out_proj), self.temperature)
                              for images in zip(keys.split(size), values.split(size))])

    def forward(self, images, tokens):
        """images (B, 3, S, S) and their captions (B, L) -> {"loss": this process's images against all texts}.

        A dict, because other models of the family have several terms, which their class names in `terms`.
        """
        return self.loss(**self.encode(images, tokens))

    def encode(self, images, tokens):
        """What each sample brings to the loss, batch first. Apart from `loss`, so that train.py can call it for a few
        samples at a time, and `loss` for all.
        """
        return {"image_features": self.encode_image(images), "text_features": self.encode_text(tokens)}

    def loss(self, image_features, text_features):
        return {"loss": mixture_loss(image_features, text_features, self.out_proj, self.logit_scale.exp(),
                                     self.logit_bias, self.temperature)}

    def chance_loss(self, batch):
        """The sigmoid loss of a model that tells no pairs apart and gives each the best probability, which is 1 / B."""
        return math.log(batch) + (batch - 1) * math.log(batch / (batch - 1))

    @staticmethod
    def normalize(x):
        with full_precision(x):
            return F.normalize(upcast(x), dim=-1)

    # --- texts: which captions this model wants, and the special tokens around their pieces ---

    def tokenize(self, texts, tokenizer):
        """Texts -> int64 (B, L): start, pieces, end; cut to context_length with the end kept; padded to the longest."""
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts must be a list of at least one text, got {texts!r}")
        room = self.config.context_length - 2
        pieces = [tokenizer.encode(text) for text in texts]
        cut = sum(len(p) > room for p in pieces)
        if cut:
            warnings.warn(f"texts of more than {room} tokens are cut to that ({cut} of {len(texts)} here)")
        rows = [[tokenizer.start_id, *p[:room], tokenizer.end_id] for p in pieces]
        tokens = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_id)
        for i, row in enumerate(rows):
            tokens[i, :len(row)] = torch.tensor(row)
        return tokens

    def text_batch(self, samples, rngs, tokenizer):
        """What `forward` needs besides the images: one caption of each sample, drawn by that sample's own generator.

        samples: of data.py, each a picture's texts; rngs: a random.Random for each.
        """
        return {"tokens": self.tokenize([rng.choice(s.captions) for s, rng in zip(samples, rngs)], tokenizer)}

    # --- weights from elsewhere ---

    @classmethod
    def from_pretrained(cls, source, config=None, cache="data/cache"):
        """Published weights, loaded strictly.

        source: the name of a published model, such as "vit-b-16-k32" (downloaded once, into `cache`, with its
        vocabulary), or the path of a training checkpoint of the published code, or a state dict.
        config: a Config or its name; without one, the size whose parameters have the names and shapes of the file's.
        With another image_size than the file's, the table of positions is resized, with a warning.
        """
        source, config = find_source(source, config, cls, cache)
        state, name = rename(read_state(source)), "image_encoder.class_embedding"
        if name in state:  # (K, D); one token may come as a vector
            state[name] = state[name].reshape(-1, state[name].shape[-1])
        return build(cls, state, config)


# --- reading published weights --------------------------------------------------------------------------------------

DROPPED = r"(^|\.)position_ids$"
NAMES = [  # (a pattern in the published name, what it becomes here), all are applied, in this order:
    # visual.transformer.resblocks.0.attn.in_proj_weight -> image_encoder.blocks.0.attn.in_proj.weight
    (r"^(module\.|_orig_mod\.)+", ""),
    (r"^visual\.", "image_encoder."), (r"\btransformer\.resblocks\.", "blocks."), (r"\.in_proj_", ".in_proj."),
    (r"^(text\.)?(?=(blocks|token_embedding|ln_final)\.|(positional_embedding|text_projection)$)", "text_encoder."),
    (r"^([kv]_proj)$", r"image_encoder.\1"), (r"^q_proj$", "text_encoder.q_proj"), (r"^pred\.", ""),
    (r"^K_norm\.", "image_encoder.k_norm."), (r"^V_norm\.", "image_encoder.v_norm."),
    (r"^Q_norm\.", "text_encoder.q_norm."),
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


def build(cls, state, config, adapt=resize_positions):
    """A model with these weights, adapted to this size; without one, of the size that they fit."""
    fits = None if isinstance(config, cls.Config) else fitting_config(state, cls)
    model = cls(find_config(config or fits or next(iter(sizes(cls))), cls))
    try:
        load_strictly(model, adapt(state, model) if config else state)
    except ValueError as error:
        hint = f"\n  it would fit config={fits!r}" if fits else ""
        if config is None:
            hint = f"\n  of {', '.join(sizes(cls))} none would fit; this was the first of them"
        raise ValueError(f"{error}{hint}") from None
    return model.eval()


# --- sizes, and how each is trained ---------------------------------------------------------------------------------

LARGE = dict(patch_size=14, image_width=1024, image_layers=24, image_heads=16, image_mlp=4096, text_width=768,
             text_heads=12, text_mlp=3072, embed_dim=768, temperature=1.0)
CONFIGS = {
    "vit-b-32-k64": Config(),                                             # 201,836,802 parameters
    "vit-b-16-k32": Config(patch_size=16, mixture_tokens=32),             # 174,965,250
    "vit-l-14-k32": Config(**LARGE, mixture_tokens=32, context_length=64),  # 478,394,882
    "vit-l-14-k64": Config(**LARGE),                                      # 528,802,050
    "vit-h-14-k64": Config(patch_size=14, image_width=1280, image_layers=32, image_heads=16, image_mlp=5120,
                           text_width=1024, text_layers=24, text_heads=16, text_mlp=4096, embed_dim=1024,
                           mixing_norm=True),                             # 1,154,835,458
    "vit-g-14-k64": Config(patch_size=14, image_width=1664, image_layers=48, image_heads=16, image_mlp=8192,
                           text_width=1280, text_layers=32, text_heads=20, text_mlp=5120, embed_dim=1280,
                           mixing_norm=True),                             # 2,813,561,090: ViT-bigG
    "tiny": Config(image_size=32, patch_size=8, image_width=256, image_layers=2, image_heads=8, image_mlp=1024,
                   vocab_size=1024, end_id=2, context_length=64, text_width=128, text_layers=2, text_heads=4,
                   text_mlp=512, embed_dim=128, head_start=True, logit_scale=math.log(30),
                   mixture_tokens=16, mixing_heads=4),
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


VOCABULARY = ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
              "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")
PUBLISHED = {  # name: its files (address, SHA-256, of which none is published for Llip); only these two were released
    name: {"source": (f"https://dl.fbaipublicfiles.com/llip/{file}.pt", None), "vocab": VOCABULARY}
    for name, file in (("vit-b-16-k32", "llip_b16_k32"), ("vit-g-14-k64", "llip_G14_k64"))}

# What train.py uses unless told otherwise. `files`: what to start from; `tokenizer`: what its vocabulary is for;
# `image_lr`: the image tower's rate, in multiples of lr; `scratch`: what differs with --scratch, which starts from
# nothing. There rate and decay are the paper's.
SCRATCH = {name: dict(epochs=32, lr=4e-4 if config.image_width > 768 else 5e-4, weight_decay=0.2)
           for name, config in CONFIGS.items()}
RECIPES = {
    **{name: dict(batch=64, image_lr=1.0, warmup=0.1, **scratch) for name, scratch in SCRATCH.items()},
    **{name: dict(batch=64, epochs=5, lr=1e-5, image_lr=1.0, weight_decay=0.1, warmup=0.1, tokenizer="clip",
                  files=files, scratch=SCRATCH[name]) for name, files in PUBLISHED.items()},
    "tiny": dict(batch=64, epochs=8, lr=5e-4, image_lr=1.0, weight_decay=0.05, warmup=0.1),
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


# --- the same, without building the mixtures ------------------------------------------------------------------------

def mixture_cosines(images, texts, out_proj, temperature):
    """plain_cosines, to rounding: (I, T).

    Write a_mn for the weight of token n in head m, Wo_m for the d rows of Wo that belong to head m. Then, for a pair,
        z       = sum_mn a_mn v_mn Wo_m
        z . t   = sum_mn a_mn (v_mn . Wo_m t)         costs what keys times queries cost, and
        |z|^2   = a^T G a                             G_(mn)(pl) = v_mn Wo_m . v_pl Wo_p, of the image alone: (M K, M K)
    which is less work while M K < E, from 32 texts on in the tiny size, from 192 in vit-l-14-k64; in vit-b-32-k64,
    where M K = E, it saves memory alone.
    """
    (keys, values), (query, target) = images, texts
    weights = mixing_weights(keys, query, temperature)  # (I, M, K, T)
    cut = keys.shape[1], -1  # E into (M, d)
    Wo_t = torch.einsum("je,mde->jmd", target, out_proj.unflatten(0, cut))  # Wo_m t: (T, M, d)
    dot = (weights * torch.einsum("imnd,jmd->imnj", values, Wo_t)).sum(dim=(1, 2))  # z . t: (I, T)
    Wo_Wo = (out_proj @ out_proj.T).unflatten(0, cut).unflatten(2, cut)  # Wo_m Wo_p^T: (M, d, M, d)
    G = torch.einsum("imnd,mdpf,iplf->imnpl", values, Wo_Wo, values).flatten(3).flatten(1, 2)  # (I, M K, M K)
    a = weights.flatten(1, 2)  # (I, M K, T)
    square = (a * (G @ a)).sum(dim=1)  # |z|^2: (I, T)
    return (dot / square.clamp(min=1e-12).sqrt()).clamp(-1, 1)  # where values nearly cancel, |z|^2 is rounding error


class MixtureLoss(torch.autograd.Function):
    """sigmoid_loss of mixture_cosines, with its gradient computed on the way, a few images at a time.

    Autograd would keep the (I, M K, T) weights of all images for the backward pass. The loss is a sum over images, so
    the gradient of one chunk can be had at once, and be all that is kept. (Recomputing each chunk in the backward pass
    would be less code, and take half as long again, and more memory.)
    """
    @staticmethod
    def forward(ctx, with_grads, temperature, first, keys, values, query, target, out_proj, scale, bias):
        # In here autograd is off: with_grads says whether it was on.
        shared = query, target, out_proj, scale, bias
        size, total = images_per_chunk(keys, query), 0.0
        grads = [torch.zeros_like(x) for x in (keys, values, *shared)] if with_grads else []
        for i in range(0, len(keys), size):
            rows = slice(i, i + size)
            with torch.enable_grad():
                part = [x.detach().requires_grad_(with_grads) for x in (keys[rows], values[rows], *shared)]
                k, v, q, t, Wo, s, b = part
                loss = sigmoid_loss(mixture_cosines((k, v), (q, t), Wo, temperature), first + i, s, b) / len(keys)
            total = total + loss.detach()
            if with_grads:  # keys and values have a row for each image; the rest collects from all chunks
                for grad, new in zip([grads[0][rows], grads[1][rows], *grads[2:]], torch.autograd.grad(loss, part)):
                    grad += new
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, None, None, *(grad * saved for saved in ctx.saved_tensors)


CHUNK = {"cpu": 6 * 2 ** 20, "cuda": 2 ** 26}  # numbers in a chunk's largest tables: 24 MiB on a CPU, 256 MiB on a GPU


def images_per_chunk(keys, query):
    """How many images to compare at a time with all these texts."""
    I, M, K, d = keys.shape
    # For one image mixture_cosines holds weights (M K, T), values times Wo_m Wo_p^T (M K, E) and G (M K, M K).
    return max(1, CHUNK.get(keys.device.type, 2 ** 24) // (M * K * (len(query) + M * d + M * K)))


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit('usage: python llip.py CHECKPOINT IMAGE "a photo of a dog" "a photo of a cat" ...  (two or more)')
    checkpoint, image, *labels = sys.argv[1:]
    try:
        pipeline = ZeroShotPipeline(checkpoint)
        cosines = pipeline.cosines(image, labels)
        probabilities = (pipeline.model.logit_scale.detach().exp() * cosines).softmax(dim=0)
        for i in probabilities.argsort(descending=True).tolist():
            print(f"{probabilities[i]:7.1%}  cosine {cosines[i]:+.3f}  {labels[i]}")
    except ValueError as error:
        sys.exit(f"llip.py: {error}")
