"""Llip: an image feature for each caption, mixed from several.

Lavoie et al., "Modeling Caption Diversity in Contrastive Vision-Language Pretraining", arXiv 2405.00740 (ICML 2024).

The idea: a photograph has many true captions, one about the dog, one about the weather, and a single image feature has
to lie near all of them. Let the ViT end in K features. Each caption mixes them with its own weights, and is compared
with the mixture.

    image    k_in, v_in = h_in Wk_n, h_in Wv_n      from the last state h_in of mixture token n = 1..K      (B, M, K, d)
    text     q_j, t_j = e_j Wq, e_j Wt              from e_j, the end-of-text state               (B, M, d) and (B, E)
    mixture  z_ij = concat_m [ sum_n softmax_n(k_imn . q_jm / tau) v_imn ] Wo      image i as text j sees it   (B, B, E)
    logits   s_ij = exp(logit_scale) * z_ij/|z_ij| . t_j/|t_j| + logit_bias                                     (B, B)
    loss     sum over all pairs of -ln sigmoid(y_ij s_ij) / B,    y = 1 on the diagonal, else -1

h and e are the states after the towers' last norms. k, v and q are cut into M heads (index m) of d numbers, as in
multi-head attention (in the two largest sizes after a LayerNorm each); tau is a temperature instead of sqrt(d). In the
code: Wk_n, Wv_n are k_proj[n], v_proj[n], one for each token; Wq is q_proj, Wt text_projection, Wo out_proj. The loss
is SigLIP's: each pair is judged separately. An image is also mixed for wrong captions, by their own weights: if it were
mixed only for its right caption, that would give the answer away.

Shapes: B batch, S image side, P patch side, N image tokens (K mixture tokens and patches), L text tokens, D width,
H attention heads, E embedding, M mixing heads, d = E / M, K mixture tokens, I images, T texts, W processes.

Read it beside clip.py. New are the mixture tokens in ImageEncoder, the query in TextEncoder, and the section "new in
Llip". What follows the model is for when you need it: published weights and sizes.

It computes what the published code computes (tests/golden holds the values). What differs:
  - training and `similarity` never build the mixtures: `mixture_cosines` gives the same numbers, faster and in a tenth
    of the memory (batch 256, K = 32, E = 512, on a CPU: python experiments/bench.py llip);
  - a text's state is taken at the first `end_id`, not at the largest id, and texts need not be padded;
  - zero-shot: a class scores the mean similarity of its prompts, as in the other files. The published evaluation
    averages the prompts' queries and targets, and mixes once for each class;
  - every process holds all queries and targets, where the published code passes them around a ring: the same sum;
  - AdamW's second beta is .98 (there .95); the tiny size starts with `sines_and_contrast`.

    python train.py --model llip                                       # the tiny one on generated pictures: 5 minutes
    python train.py --model llip --config vit-b-16-k32 --data flickr8k # goes on from the released weights
    python llip.py runs/llip-shapes/best.pt photo.png "a red star" "a blue circle"
    python llip.py vit-b-16-k32 photo.jpg "a photo of a dog" "a photo of a cat"         # the authors', downloaded once
    python experiments/claims.py llip                                  # the paper's claims, on shapes
"""
import math
import re
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    image_size: int = 224
    patch_size: int = 32
    image_width: int = 768
    image_layers: int = 12
    image_heads: int = 12
    image_mlp: int = 3072            # the hidden width
    vocab_size: int = 49408
    end_id: int = 49407              # the end-of-text token: its state is the text's feature
    context_length: int = 77         # longer texts are cut to this
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    text_mlp: int = 2048
    embed_dim: int = 512
    sines_and_contrast: bool = False  # a better start for a small image tower: see the function of that name
    logit_scale: float = math.log(1 / 0.07)  # initial; tiny starts at ln 30: its steps are few
    logit_bias: float = -10.0                # the initial value: nearly all pairs are wrong ones
    mixture_tokens: int = 64                 # K
    mixing_heads: int = 8                    # M; each has d = embed_dim / M numbers
    temperature: float = 5.0                 # tau, divides the scores in the mixture's softmax: the larger, the flatter
    mixing_norm: bool = False                # only H and G: LayerNorm of keys, values, queries (E)


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


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
    """ViT with K mixture tokens: images (B, 3, S, S), normalised -> keys, values (B, M, K, d) each."""
    def __init__(self, config):
        super().__init__()
        width, grid = config.image_width, config.image_size // config.patch_size
        self.K, self.mixing_heads = config.mixture_tokens, config.mixing_heads
        self.conv1 = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(self.K, width))  # the mixture tokens
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(self.K + grid ** 2, width))
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, config.image_heads, config.image_mlp, quick_gelu)
                                    for _ in range(config.image_layers))
        self.ln_post = nn.LayerNorm(width)
        self.k_proj = nn.Parameter(width ** -0.5 * torch.randn(self.K, width, config.embed_dim))  # for each token
        self.v_proj = nn.Parameter(width ** -0.5 * torch.randn(self.K, width, config.embed_dim))
        norm = nn.LayerNorm if config.mixing_norm else nn.Identity
        self.k_norm, self.v_norm = norm(config.embed_dim), norm(config.embed_dim)
        if config.sines_and_contrast:
            sines_and_contrast(self, grid)

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

    Both come from the state at the first `end_id`. It sees the whole text and nothing after it, so the padding may have
    any ids and any length.
    """
    def __init__(self, config):
        super().__init__()
        width, layers = config.text_width, config.text_layers
        self.end_id, self.mixing_heads = config.end_id, config.mixing_heads
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.blocks = nn.ModuleList(Block(width, config.text_heads, config.text_mlp, quick_gelu)
                                    for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))
        self.q_proj = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))
        self.q_norm = nn.LayerNorm(config.embed_dim) if config.mixing_norm else nn.Identity()
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.blocks:  # the deeper the tower, the less each block adds to x at first
            nn.init.normal_(block.attn.in_proj.weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)

    def forward(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]  # (B, L, D)
        for block in self.blocks:
            x = block(x, causal=True)
        ends = (tokens == self.end_id).int().argmax(dim=1)  # (B,): argmax returns the first of equal values
        x = x[torch.arange(len(x), device=x.device), ends]  # (B, D)
        x = self.ln_final(x)
        query = self.q_norm(x @ self.q_proj).unflatten(1, (self.mixing_heads, -1))  # (B, M, d)
        return query, x @ self.text_projection  # the target: (B, E)


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
    """The definition of the cosines, z_ij/|z_ij| . t_j, with every mixture built: (I, T). See mixture_cosines."""
    z = F.normalize(mixtures(images, texts, out_proj, temperature), dim=-1)
    return torch.einsum("ije,je->ij", z, texts.target)


CHUNK = {"cpu": 2 ** 22, "cuda": 2 ** 26, "mps": 2 ** 24}  # numbers in the tables of a chunk: 16 MiB on a CPU


def mixture_cosines(images, texts, out_proj, temperature):
    """The same numbers without the mixtures, a few images at a time: KeysValues of I, QueryTarget of T -> (I, T).

    With `checkpoint`, the weights of a chunk, (i, M K, T), are not kept for the backward pass but computed again.
    """
    (keys, values), (query, target) = images, texts
    I, M, K, d = keys.shape
    Wo = out_proj.view(M, d, M * d)  # Wo_m, the rows of Wo that belong to head m
    Wo_t = torch.einsum("je,mde->jmd", target, Wo)  # Wo_m t: (T, M, d)
    Wo_Wo = torch.einsum("mde,pfe->mdpf", Wo, Wo)  # Wo_m Wo_p^T: (M, d, M, d)
    numbers = M * K * (len(query) + M * d + M * K)  # in the tables of one image
    chunk = max(1, CHUNK[keys.device.type] // numbers)
    if chunk >= I:
        return chunk_cosines(keys, values, query, Wo_t, Wo_Wo, temperature)
    return torch.cat([checkpoint(chunk_cosines, k, v, query, Wo_t, Wo_Wo, temperature, use_reentrant=False)
                      for k, v in zip(keys.split(chunk), values.split(chunk))])


def chunk_cosines(keys, values, query, Wo_t, Wo_Wo, temperature):
    """The cosines of a few images. With a_mn the weight of token n in head m, an image and a text have
        z       = sum_mn a_mn v_mn Wo_m
        z . t   = sum_mn a_mn (v_mn . Wo_m t)         as cheap as keys times queries
        |z|^2   = a^T G a                             G_(mn)(pl) = v_mn Wo_m . v_pl Wo_p, of the image only: (M K, M K)
    That is less work than building z if M K < E, and always less memory.
    """
    a = mixing_weights(keys, query, temperature)  # (I, M, K, T)
    dot = (a * torch.einsum("imnd,jmd->imnj", values, Wo_t)).sum(dim=(1, 2))  # z . t: (I, T)
    v_Wo_Wo = torch.einsum("imnd,mdpf->ipmnf", values, Wo_Wo).flatten(2, 3)  # (I, M, M K, d)
    G = (values @ v_Wo_Wo.transpose(2, 3)).flatten(1, 2)  # (I, M K, M K)
    a = a.flatten(1, 2)  # (I, M K, T)
    square = (a * (G @ a)).sum(dim=1)  # |z|^2: (I, T)
    return (dot / square.clamp(min=1e-12).sqrt()).clamp(-1, 1)  # if values nearly cancel, |z|^2 is rounding error


def sigmoid_loss(similarities, scale, bias):
    """A yes or no for every pair of B local images and W B texts: is this its caption? Summed, divided by B."""
    first = dist.get_rank() * len(similarities) if dist.is_initialized() else 0  # the column of our row 0
    y = torch.full_like(similarities, -1.0)
    y.diagonal(first).fill_(1.0)
    return -F.logsigmoid(y * (scale * similarities + bias)).sum() / len(similarities)


def mixture_loss(image_features, text_features, out_proj, scale, bias, temperature):
    """The sigmoid loss of the mixtures' cosines over the global batch.

    image_features: KeysValues, text_features: QueryTarget, of which rows i belong together; scale: exp(logit_scale).
    Local images against the texts of all W processes; the sum over pairs is divided by B, not by the number of pairs.
    It starts at about 10: a bias of -10 calls all B true pairs wrong, at a cost of 10 each.
    In fp32: half precision loses 1e-3 to 1e-2 of a cosine.
    """
    with full_precision(out_proj):
        keys, values, query, target = map(upcast, (*image_features, *text_features))
        cosines = mixture_cosines((keys, values), (gather(query), gather(target)), upcast(out_proj), temperature)
        return sigmoid_loss(cosines, scale, bias)


# --- the model ------------------------------------------------------------------------------------------------------

class Llip(nn.Module):
    """Two encoders, the output matrix of the mixing heads, and two learned numbers, logit_scale and logit_bias.

    Its methods are those of CLIP in clip.py. `temperature` may be changed at any time, as in the published evaluation.
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.temperature = config.temperature
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.out_proj = nn.Parameter(config.embed_dim ** -0.5 * torch.randn(config.embed_dim, config.embed_dim))
        # Stretches the cosines. Learned as a logarithm, so that it stays positive; train.py keeps it at most ln 100.
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(config.logit_bias)))
        # The mean and standard deviation of the pictures that CLIP was trained on.
        self.register_buffer("mean", torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1), persistent=False)

    def encode_image(self, images):
        """uint8 pixels, or floats already normalised, (B, 3, S, S), S = image_size -> KeysValues, (B, M, K, d) twice.

        No single vector stands for an image, because its feature depends on the caption. A gallery must keep keys and
        values, 2 K times what CLIP keeps, and a nearest-neighbour index cannot search it.
        """
        if images.shape[1:] != (3, self.config.image_size, self.config.image_size):
            raise ValueError(f"images must be (B, 3, S, S), S = {self.config.image_size}, got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return KeysValues(*map(upcast, self.image_encoder(images)))

    def encode_text(self, tokens):
        """int64 tokens from `tokenize`, (B, L), L at most the number of positions -> QueryTarget: (B, M, d), (B, E)."""
        query, target = self.text_encoder(tokens)
        return QueryTarget(upcast(query), F.normalize(upcast(target), dim=-1))

    def similarity(self, image_features, text_features):
        """KeysValues of I, QueryTarget of T -> cosines (I, T), in fp32: they rank captions, images and labels."""
        with full_precision(self.out_proj):
            keys, values, query, target = map(upcast, (*image_features, *text_features))
            return mixture_cosines((keys, values), (query, target), upcast(self.out_proj), self.temperature)

    def logits(self, images, tokens):
        """I images, T texts -> scaled and shifted cosines (I, T): a sigmoid in training, a softmax in use."""
        similarities = self.similarity(self.encode_image(images), self.encode_text(tokens))
        return self.logit_scale.exp() * similarities + self.logit_bias

    def forward(self, images, tokens):
        """images (B, 3, S, S) and their captions (B, L) -> {"loss": ...}; other models add its terms."""
        return self.loss(**self.encode(images, tokens))

    def encode(self, images, tokens):
        """The arguments of `loss`, a row for each sample. To save memory, train.py may call it on parts of a batch."""
        if len(images) != len(tokens):
            raise ValueError(f"{len(images)} images and {len(tokens)} captions; expected one caption for each image")
        return {"image_features": self.encode_image(images), "text_features": self.encode_text(tokens)}

    def loss(self, image_features, text_features):
        return {"loss": mixture_loss(image_features, text_features, self.out_proj, self.logit_scale.exp(),
                                     self.logit_bias, self.temperature)}

    def tokenize(self, texts, tokenizer):
        """A text or several -> int64 (B, L): start, ids, end, padding. Long texts are cut before the end id."""
        texts = [texts] if isinstance(texts, str) else texts
        room = self.config.context_length - 2
        pieces = [tokenizer.encode(text) for text in texts]
        if cut := sum(len(p) > room for p in pieces):
            warnings.warn(f"texts of more than {room} tokens are cut to that ({cut} of {len(texts)} here)")
        rows = [torch.tensor([tokenizer.start_id, *p[:room], tokenizer.end_id]) for p in pieces]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id)

    def text_batch(self, samples, rngs, tokenizer):
        """What `forward` takes besides images: a caption of each sample (of data.py), drawn by its own generator."""
        return {"tokens": self.tokenize([rng.choice(s.captions) for s, rng in zip(samples, rngs)], tokenizer)}

    # --- published weights --------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source, config=None):
        """Published weights, loaded strictly: a name of PUBLISHED, or a file or a state dict in the published names.
        config: a Config or its name, needed unless source is a name of PUBLISHED. Positions are resized.
        """
        model = cls(config if isinstance(config, Config) else CONFIGS[config or source])
        return load_weights(model, resize_positions(model, read_weights(source, NAMES)))


NAMES = [  # (a pattern in the published name, what it becomes here), all applied in this order:
    # visual.transformer.resblocks.0.attn.in_proj_weight -> image_encoder.blocks.0.attn.in_proj.weight
    (r"^(module\.|_orig_mod\.)+", ""),
    (r"^visual\.", "image_encoder."), (r"\btransformer\.resblocks\.", "blocks."), (r"\.in_proj_", ".in_proj."),
    (r"^(text\.)?(?=(blocks|token_embedding|ln_final)\.|(positional_embedding|text_projection)$)", "text_encoder."),
    (r"^([kv]_proj)$", r"image_encoder.\1"), (r"^q_proj$", "text_encoder.q_proj"), (r"^pred\.", ""),
    (r"^K_norm\.", "image_encoder.k_norm."), (r"^V_norm\.", "image_encoder.v_norm."),
    (r"^Q_norm\.", "text_encoder.q_norm."),
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
                   text_mlp=512, embed_dim=128, sines_and_contrast=True, logit_scale=math.log(30),
                   mixture_tokens=16, mixing_heads=4),
}

MERGES = ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
          "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")
META = "https://dl.fbaipublicfiles.com/llip"
PUBLISHED = {  # the files of a published model: (address, SHA-256 where one is known). Only two sizes were released
    "vit-b-16-k32": {"source": (f"{META}/llip_b16_k32.pt", None), "vocab": MERGES},
    "vit-g-14-k64": {"source": (f"{META}/llip_G14_k64.pt", None), "vocab": MERGES},
}

# The defaults of train.py. files: the weights that a run starts from; tokenizer: the kind of their vocabulary;
# image_lr: the image tower's rate, as a multiple of lr; scratch: what --scratch (from random weights) changes.
# The values in SCRATCH are the paper's, for a batch of 32,768.
FINE = dict(batch=64, epochs=5, lr=1e-5, image_lr=1.0, weight_decay=0.1, warmup=0.1, tokenizer="clip")
SCRATCH = dict(epochs=32, lr=5e-4, weight_decay=0.2)
RECIPES = {
    "vit-b-32-k64": {**FINE, **SCRATCH},
    "vit-b-16-k32": dict(FINE, files=PUBLISHED["vit-b-16-k32"], scratch=SCRATCH),
    "vit-l-14-k32": {**FINE, **SCRATCH, "lr": 4e-4},
    "vit-l-14-k64": {**FINE, **SCRATCH, "lr": 4e-4},
    "vit-h-14-k64": {**FINE, **SCRATCH, "lr": 4e-4},
    "vit-g-14-k64": dict(FINE, files=PUBLISHED["vit-g-14-k64"], scratch=dict(SCRATCH, lr=4e-4)),
    "tiny": dict(batch=64, epochs=8, lr=5e-4, image_lr=1.0, weight_decay=0.05, warmup=0.1),
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
    return data.load_model(Llip, Config, PUBLISHED, RECIPES, source, device)


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
