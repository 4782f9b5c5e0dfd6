"""CLIP: images and texts in one space, learned from captioned pictures alone.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020 (2021).
The last section of this file is KoCLIP: the same loss, in Korean, on two towers that were trained before.

The idea: do not teach a model to name one of 1,000 classes. Show it a batch of B pictures and their B captions, and ask
which caption belongs to which picture. Whoever can answer that for any batch can say in words what a picture shows; and
a new class is then just a new caption.

    image    u = ViT(image)         patches of P x P pixels and a class token, whose last state is projected      (B, E)
    text     v = Transformer(text)  causal; the state at the end-of-text token, projected                         (B, E)
    logits   s_ij = exp(logit_scale) * u_i . v_j      with u and v of length 1                                    (B, B)
    loss     1/2 [ CE(rows of s, diagonal) + CE(columns of s, diagonal) ]                                       Fig. 3

Shapes: B batch, S image side, P patch side, N image tokens (class token and patches), L text tokens, D width,
H attention heads, E embedding, W processes, I images, T texts.

How to read it: Attention, MLP and Block are those of any transformer; ImageEncoder and TextEncoder put an input and an
output around them; contrastive_loss is the paper; CLIP joins the three. That is the lesson. What follows is for when
you need it: published weights, sizes and recipes, a pipeline, KoCLIP.

It computes what OpenAI's code computes (tests/golden holds the values). What differs:
  - the text feature is taken at the first end-of-text id, `end_id`, and not at the largest id: the same token with
    CLIP's tokenizer, but another tokenizer's end may be any id;
  - texts need not be padded to 77: attention is causal, so nothing behind the end of a text can change its feature.
    Longer ones are cut, with a warning, where OpenAI's code refuses them;
  - training, of which OpenAI published the description alone: flips join the random crop where captions allow them,
    and a batch is what your machine holds. (That each process computes its own rows of the global loss is theirs, too.)
  - the tiny size begins with `head_start`; the published sizes begin as published.

    python train.py --model clip                                       # the tiny one on generated pictures: 4 minutes
    python train.py --model clip --config vit-b-32 --data flickr8k     # goes on from OpenAI's weights
    python clip.py runs/clip-shapes/best.pt photo.png "a red star" "a blue circle"
    python clip.py clip/vit-b-32 photo.jpg "a photo of a dog" "a photo of a cat"       # OpenAI's, downloaded once
"""
import math
import os
import re
import sys
import warnings
import zipfile
from dataclasses import dataclass

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
    activation: str = "quick_gelu"   # OpenAI's weights; LAION's need "gelu"
    head_start: bool = False         # for a fresh small image tower: see the function of that name


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
    """ViT: images (B, 3, S, S), normalised -> (B, E)."""
    def __init__(self, config):
        super().__init__()
        width, grid = config.image_width, config.image_size // config.patch_size
        self.conv1 = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(1 + grid ** 2, width))
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList([
            Block(width, config.image_heads, config.image_mlp, ACTIVATIONS[config.activation])
            for _ in range(config.image_layers)])
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, N - 1, D): a token for each patch
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (B, N, D)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj  # (B, E)


class TextEncoder(nn.Module):
    """A causal transformer: tokens (B, L) with `end_id` in every row -> (B, E), from the state at the first `end_id`.

    That state is the first to have read the whole text. What follows cannot influence it: padding may be any id, any
    length.
    """
    def __init__(self, config):
        super().__init__()
        width, layers = config.text_width, config.text_layers
        self.end_id = config.end_id
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.blocks = nn.ModuleList([
            Block(width, config.text_heads, config.text_mlp, ACTIVATIONS[config.activation])
            for _ in range(layers)])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))
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
        return self.ln_final(x) @ self.text_projection  # (B, E)


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


# --- the model ------------------------------------------------------------------------------------------------------

class CLIP(nn.Module):
    """Two encoders and one learned number, logit_scale.

    For use: `encode_image`, `encode_text`, `similarity`, `tokenize`, `from_pretrained`; for a training step:
    `text_batch` and `forward`, or its halves `encode` and `loss`. train.py also reads `Config`, `config`,
    `logit_scale`, `chance_loss` and, for its closing hint, `example_labels`.
    """
    Config = Config
    example_labels = "a photo of a dog", "a photo of a cat"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        if config.head_start:
            head_start(self.image_encoder, config.image_size // config.patch_size)
        # A cosine lies in [-1, 1]; to be sure of anything, a loss needs a larger range, and how large is learned. As an
        # exponent, so that it stays positive and moves by factors. train.py keeps it at most ln 100.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        # The mean and spread of CLIP's own training pictures.
        self.register_buffer("mean", torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1), persistent=False)

    def encode_image(self, images):
        """uint8 pixels, or floats already normalised, (B, 3, S, S), S = image_size -> features of length 1, (B, E)."""
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be (B, 3, {size}, {size}), got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return self.normalize(self.image_encoder(images))

    def encode_text(self, tokens):
        """int64 tokens from `tokenize`, (B, L), L at most the number of positions -> features of length 1, (B, E)."""
        limit = len(self.text_encoder.positional_embedding)
        if tokens.ndim != 2 or tokens.shape[1] > limit:
            raise ValueError(f"tokens must be (B, L) with L <= {limit}, got {tuple(tokens.shape)}")
        return self.normalize(self.text_encoder(tokens))

    def similarity(self, image_features, text_features):
        """(I, E), (T, E) -> cosines (I, T), in fp32: what ranks captions, images and labels."""
        with full_precision(image_features):
            return upcast(image_features) @ upcast(text_features).T

    def forward(self, images, tokens):
        """images (B, 3, S, S) and their captions (B, L) -> {"loss": this process's rows against all columns}.

        A dict, because other models of the family have several terms, which their class names in `terms`.
        """
        return self.loss(**self.encode(images, tokens))

    def encode(self, images, tokens):
        """What each sample brings to the loss, batch first. Apart from `loss`, so that train.py can call it for a few
        samples at a time, and `loss` for all.
        """
        return {"image_features": self.encode_image(images), "text_features": self.encode_text(tokens)}

    def loss(self, image_features, text_features):
        return {"loss": contrastive_loss(image_features, text_features, self.logit_scale.exp())}

    def chance_loss(self, batch):
        """The contrastive loss of a model that tells nothing apart: all its features are alike."""
        return math.log(batch)

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

        source: the name of a published model, such as "vit-b-32" (downloaded once, into `cache`, with its vocabulary;
        checked where PUBLISHED has a SHA-256), or the path of a file, or a state dict; in the names of OpenAI,
        open_clip or Hugging Face. A TorchScript archive may bring code that runs when it is opened: OpenAI's are such
        archives; take none from strangers.
        config: a Config or its name; without one, the size whose parameters have the names and shapes of the file's.
        With another image_size than the file's, the table of positions is resized, with a warning.
        """
        source, config = find_source(source, config, cls, cache)
        state = read_state(torchscript_state(source))
        # OpenAI's archives alone have input_resolution, and all of them need quick_gelu.
        if "input_resolution" not in state and not isinstance(config, Config):
            warnings.warn("the weights do not say which activation they were trained with; taken: quick_gelu, as "
                          "OpenAI's. LAION's need gelu: pass a Config, such as "
                          'dataclasses.replace(CONFIGS["vit-b-32"], activation="gelu")')
        return build(cls, arrange(rename(state)), config)


# --- reading published weights --------------------------------------------------------------------------------------

# No parameters, but in OpenAI's archives, or as Hugging Face's buffers, beside them.
DROPPED = r"(^|\.)(position_ids|input_resolution|context_length|vocab_size)$"
NAMES = [  # (a pattern in the published name, what it becomes here), all are applied, in this order:
    # visual.transformer.resblocks.0.attn.in_proj_weight -> image_encoder.blocks.0.attn.in_proj.weight
    (r"^(module\.|_orig_mod\.)+", ""),
    # OpenAI and open_clip
    (r"^visual\.", "image_encoder."), (r"\btransformer\.resblocks\.", "blocks."), (r"\.in_proj_", ".in_proj."),
    (r"^(text\.)?(?=(blocks|token_embedding|ln_final)\.|(positional_embedding|text_projection)$)", "text_encoder."),
    # Hugging Face; .T says that the matrix is stored transposed
    (r"^vision_model\.(embeddings\.)?", "image_encoder."), (r"^text_model\.(embeddings\.)?", "text_encoder."),
    (r"\bpatch_embedding\.", "conv1."), (r"\bposition_embedding\.weight$", "positional_embedding"),
    (r"\bpre_layrnorm\.", "ln_pre."), (r"\bpost_layernorm\.", "ln_post."), (r"\bfinal_layer_norm\.", "ln_final."),
    (r"\bencoder\.layers\.", "blocks."), (r"\.layer_norm([12])\.", r".ln_\1."), (r"\.self_attn\.", ".attn."),
    (r"\.fc1\.", ".c_fc."), (r"\.fc2\.", ".c_proj."),
    (r"^visual_projection\.weight$", "image_encoder.proj.T"),
    (r"^text_projection\.weight$", "text_encoder.text_projection.T"),
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


def torchscript_state(source):
    """The path of a TorchScript archive, as OpenAI's files are, becomes its state dict; all else stays what it is."""
    if isinstance(source, dict) or not zipfile.is_zipfile(source):
        return source
    try:
        with zipfile.ZipFile(source) as archive:
            if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return source
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated; these files stay what they are
            return torch.jit.load(source, map_location="cpu").state_dict()
    except (RuntimeError, zipfile.BadZipFile):
        raise ValueError(f"{source} is no checkpoint: a damaged archive") from None


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
             text_heads=12, text_mlp=3072, embed_dim=768)
CONFIGS = {
    "vit-b-32": Config(),                              # 151,277,313 parameters
    "vit-b-16": Config(patch_size=16),                 # 149,620,737
    "vit-l-14": Config(**LARGE),                       # 427,616,513
    "vit-l-14-336": Config(image_size=336, **LARGE),   # 427,944,193
    "tiny": Config(image_size=32, patch_size=8, image_width=256, image_layers=2, image_heads=8, image_mlp=1024,
                   vocab_size=1024, end_id=2, context_length=64, text_width=128, text_layers=2, text_heads=4,
                   text_mlp=512, embed_dim=128, head_start=True),
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


VOCABULARY = ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
              "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")
PUBLISHED = {  # name: its files (address, SHA-256)
    name: {"source": (f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}.pt", sha256),
           "vocab": VOCABULARY} for name, file, sha256 in (
        ("vit-b-32", "ViT-B-32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
        ("vit-b-16", "ViT-B-16", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
        ("vit-l-14", "ViT-L-14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
        ("vit-l-14-336", "ViT-L-14-336px", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"))}

# What train.py uses unless told otherwise. `files`: what to start from; `tokenizer`: what its vocabulary is for;
# `image_lr`: the image tower's rate, in multiples of lr; `scratch`: what differs with --scratch, which starts from
# nothing. There epochs, rate and decay are the paper's, whose batch was 32,768.
RECIPES = {
    **{name: dict(batch=64, epochs=5, lr=1e-5, image_lr=1.0, weight_decay=0.1, warmup=0.1, tokenizer="clip",
                  files=files,
                  scratch=dict(epochs=32, lr=4e-4 if CONFIGS[name].image_width > 768 else 5e-4, weight_decay=0.2))
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


# --- KoCLIP ---------------------------------------------------------------------------------------------------------
# The same loss on two towers that were trained alone before: RoBERTa-large, which knows Korean (KLUE's), and an image
# tower (base: CLIP's own ViT-B/32; large: Google's ViT-L/16). github.com/jaketae/koclip, 2021; no paper, no figures.
#
# Quirks that its weights need: RoBERTa's positions count from 0 here, where RoBERTa itself begins at 2; its pooler, and
# the ViT's in the large one, end in tanh; pictures have CLIP's mean and spread for the ViT too.
# Followed, of its training: exp(logit_scale) starts at e, not at 1/0.07. Not followed: negatives from one device's part
# of the batch, weight decay on everything, a scale without bounds.

@dataclass
class KoConfig:
    image_size: int = 224
    patch_size: int = 32
    image_width: int = 768
    image_layers: int = 12
    image_heads: int = 12
    image_mlp: int = 3072
    image_tower: str = "clip"        # or "vit"
    vocab_size: int = 32000
    pad_id: int = 1
    context_length: int = 96         # longer texts are cut here
    positions: int = 514             # rows of RoBERTa's table
    text_width: int = 1024
    text_layers: int = 24
    text_heads: int = 16
    text_mlp: int = 4096
    embed_dim: int = 512
    activation: str = "quick_gelu"   # the image tower; RoBERTa's is always "gelu"
    head_start: bool = False
    dropout: float = 0.1             # in RoBERTa alone
    logit_scale: float = 1.0         # at birth; the tiny size takes CLIP's, or it would spend its minutes on raising it


class PostBlock(nn.Module):
    """A transformer block with the norms after each sum (post-LN), as in BERT."""
    def __init__(self, width, heads, hidden, eps, dropout):
        super().__init__()
        self.attn = Attention(width, heads, dropout)
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask):
        x = self.ln_1(x + self.dropout(self.attn(x, mask)))
        return self.ln_2(x + self.dropout(self.mlp(x)))


class RoBERTa(nn.Module):
    """Tokens (B, L), padded with `pad_id` -> (B, E): the first token's last state through a tanh pooler, projected."""
    def __init__(self, config):
        super().__init__()
        width = config.text_width
        self.pad_id = config.pad_id
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.002 * torch.randn(config.positions, width))
        self.token_type_embedding = nn.Parameter(0.002 * torch.randn(1, width))  # BERT has two types, RoBERTa one
        self.ln_embed = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([
            PostBlock(width, config.text_heads, config.text_mlp, 1e-5, config.dropout)
            for _ in range(config.text_layers)])
        self.pooler = nn.Linear(width, width)
        self.text_projection = nn.Parameter(0.02 * torch.randn(width, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)  # for a fresh tower; KoCLIP's came from KLUE
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features ** -0.5)
                nn.init.zeros_(module.bias)

    def forward(self, tokens):
        visible = tokens != self.pad_id  # (B, L)
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]] + self.token_type_embedding
        x = self.dropout(self.ln_embed(x))  # (B, L, D)
        for block in self.blocks:
            x = block(x, visible[:, None, None])  # the mask is (B, 1, 1, L): the same for every head and every query
        return torch.tanh(self.pooler(x[:, 0])) @ self.text_projection  # (B, E)


class ViT(ImageEncoder):
    """Google's ViT. Unlike CLIP's: a bias at the patches, no norm before the blocks, a tanh pooler, an eps of 1e-12."""
    def __init__(self, config):
        super().__init__(config)
        width = config.image_width
        self.conv1.bias = nn.Parameter(torch.zeros(width))
        self.ln_pre = nn.Identity()
        self.ln_post = nn.Sequential(self.ln_post, nn.Linear(width, width), nn.Tanh())
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-12


class KoCLIP(CLIP):
    """CLIP with other towers."""
    Config = KoConfig
    example_labels = "이것은 강아지 이다.", "이것은 고양이 이다."  # "this is a dog", in the form that KoCLIP's authors advise

    def __init__(self, config):
        nn.Module.__init__(self)  # not CLIP's, which would make its own towers
        self.config = config
        self.image_encoder = {"clip": ImageEncoder, "vit": ViT}[config.image_tower](config)
        self.text_encoder = RoBERTa(config)
        if config.head_start:
            head_start(self.image_encoder, config.image_size // config.patch_size)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale)))
        self.register_buffer("mean", torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, source, config=None, cache="data/cache"):
        """As CLIP.from_pretrained, from KoCLIP's dual encoders: Hugging Face's names, or Flax's .msgpack."""
        source, config = find_source(source, config, cls, cache)
        if not isinstance(source, dict) and str(source).endswith(".msgpack"):
            source = read_flax(source)
        return build(cls, arrange(rename(rename(read_state(source), KOCLIP_NAMES))), config)

    @classmethod
    def from_backbones(cls, image, text, config="koclip-base"):
        """Where KoCLIP's training starts: trained towers, fresh projections (but for CLIP's own), poolers if need be.

        image: OpenAI's CLIP ViT-B/32 or Google's ViT-L/16; text: RoBERTa. As Hugging Face has them, with the heads that
        are dropped here; each a path or a state dict. In training mode.
        """
        model = cls(find_config(config, cls))
        loaded = {}
        for source, tower in ((image, "image_encoder."), (text, "text_encoder.")):
            state = arrange(rename(rename(read_state(source), KOCLIP_NAMES)))  # to CLIPModel's names, then to ours
            loaded |= {name: value for name, value in state.items() if name.startswith(tower)}
        fresh = r"pooler\.|ln_post\.1\.|text_projection$|logit_scale$"
        fresh += "" if model.config.image_tower == "clip" else r"|image_encoder\.proj$"
        load_strictly(model, {n: v for n, v in model.state_dict().items() if re.search(fresh, n)} | loaded)
        return model


KOCLIP_NAMES = [  # applied before NAMES
    (r"^params\.", ""), (r"^vision_model\.vision_model\.", "vision_model."), (r"^vit\.", "vision_model."),
    (r"^roberta\.", "text_model."),
    # RoBERTa and ViT, as Hugging Face names them
    (r"\bword_embeddings\.", "token_embedding."), (r"\bposition_embeddings(\.weight)?$", "positional_embedding"),
    (r"\btoken_type_embeddings\.weight$", "token_type_embedding"), (r"\bembeddings\.LayerNorm\.", "ln_embed."),
    (r"\bcls_token$", "class_embedding"), (r"\bpatch_embeddings\.projection\.", "conv1."),
    (r"\bencoder\.layer\.", "blocks."), (r"\.attention\.(self|attention)\.", ".attn."),
    (r"\.query\.", ".q_proj."), (r"\.key\.", ".k_proj."), (r"\.value\.", ".v_proj."),
    (r"\.attention\.output\.dense\.", ".attn.out_proj."), (r"\.attention\.output\.LayerNorm\.", ".ln_1."),
    (r"\.intermediate\.dense\.", ".mlp.c_fc."), (r"\.output\.dense\.", ".mlp.c_proj."),
    (r"\.output\.LayerNorm\.", ".ln_2."), (r"\.layernorm_before\.", ".ln_1."), (r"\.layernorm_after\.", ".ln_2."),
    (r"^vision_model\.layernorm\.", "vision_model.ln_post.0."),
    (r"^vision_model\.pooler\.dense\.", "vision_model.ln_post.1."), (r"\bpooler\.dense\.", "pooler."),
]


def read_flax(path):
    """KoCLIP's flax_model.msgpack -> a state dict as PyTorch would hold it."""
    def walk(tree, name=()):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, (*name, key))
            elif key == "kernel":  # (in, out), or (height, width, in, out)
                yield ".".join((*name, "weight")), value.T if value.ndim == 2 else value.permute(3, 2, 0, 1)
            else:
                yield ".".join((*name, {"scale": "weight", "embedding": "weight"}.get(key, key))), value

    try:
        import msgpack
        with open(path, "rb") as file:
            return dict(walk(msgpack.unpackb(file.read(), ext_hook=flax_array)))
    except ModuleNotFoundError:
        raise ValueError(f"{path}: reading it needs a package; pip install msgpack") from None
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # half a dozen types, for a file that is no msgpack
        raise ValueError(f"{path} is no Flax checkpoint ({type(error).__name__})") from None


def flax_array(code, content):
    import msgpack
    shape, dtype, values = msgpack.unpackb(content)
    return torch.frombuffer(bytearray(values), dtype=getattr(torch, dtype)).view(shape)


CONFIGS |= {
    "koclip-base": KoConfig(),  # 425,029,889 parameters
    "koclip-large": KoConfig(patch_size=16, image_width=1024, image_layers=24, image_heads=16, image_mlp=4096,
                             image_tower="vit", activation="gelu"),  # 642,056,193
    "koclip-tiny": KoConfig(image_size=32, patch_size=8, image_width=256, image_layers=2, image_heads=8, image_mlp=1024,
                            vocab_size=1024, pad_id=0, context_length=64, positions=64, text_width=128, text_layers=2,
                            text_heads=4, text_mlp=512, embed_dim=128, head_start=True, dropout=0.0,
                            logit_scale=math.log(1 / 0.07)),
}


KLUE = {"text": hub("klue/roberta-large", "pytorch_model.bin"), "vocab": hub("klue/roberta-large", "vocab.txt")}
# The published values, but for the warm-up; on shapes unless --data says more.
KOCLIP = dict(batch=512, epochs=40, lr=5e-5, image_lr=1.0, weight_decay=0.1, warmup=0.01, data="shapes-ko",
              tokenizer="wordpiece-cased", scratch=dict(lr=5e-4))
RECIPES |= {
    "koclip-base": {**KOCLIP, "files": {"image": hub("openai/clip-vit-base-patch32", "pytorch_model.bin"), **KLUE}},
    "koclip-large": {**KOCLIP, "files": {"image": hub("google/vit-large-patch16-224", "pytorch_model.bin"), **KLUE}},
    "koclip-tiny": dict(batch=64, epochs=8, lr=1e-3, image_lr=1.0, weight_decay=0.05, warmup=0.1, data="shapes-ko"),
}
PUBLISHED |= {
    "koclip-base": {"source": hub("koclip/koclip-base-pt", "pytorch_model.bin"), "vocab": KLUE["vocab"]},
    "koclip-large": {"source": hub("koclip/koclip-large", "flax_model.msgpack"), "vocab": KLUE["vocab"]},
}


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit('usage: python clip.py CHECKPOINT IMAGE "a photo of a dog" "a photo of a cat" ...  (two or more)')
    checkpoint, image, *labels = sys.argv[1:]
    try:
        pipeline = ZeroShotPipeline(checkpoint)
        cosines = pipeline.cosines(image, labels)
        probabilities = (pipeline.model.logit_scale.detach().exp() * cosines).softmax(dim=0)
        for i in probabilities.argsort(descending=True).tolist():
            print(f"{probabilities[i]:7.1%}  cosine {cosines[i]:+.3f}  {labels[i]}")
    except ValueError as error:
        sys.exit(f"clip.py: {error}")
