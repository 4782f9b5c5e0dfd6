"""liteCLIP: a 39-million-parameter CLIP from a small ConvNet and a small BERT.

liteCLIP is shreydan's (github.com/shreydan/liteCLIP), after CLIP (Radford et al., arXiv 2103.00020).
Image tower: ConvNeXt-T (Liu et al., arXiv 2201.03545). Text tower: BERT-mini (Turc et al., arXiv 1908.08962).

The idea: CLIP needs neither its own architecture nor 400 million pairs. Take a ConvNet that knows ImageNet and a BERT
that knows English, put a small head on each, and let 6,000 captioned photographs align the two.

    image    u = head_i( ConvNeXt(image) )        mean over the last feature map, then LayerNorm                  (B, E)
    text     v = head_t( BERT(tokens) )           mean over the tokens that are not padding                       (B, E)
    head     p = W x + b;   head(x) = p + LayerNorm(dropout(GELU(p)))        norm in the branch, not after the sum
    logits   s_ij = exp(logit_scale) * u_i . v_j  with u and v of length 1                                        (B, B)
    loss     1/2 [ CE(rows of s, diagonal) + CE(columns of s, diagonal) ]                                   CLIP, Fig. 3

Shapes: B batch, S image side, C channels, h x w feature map, L text tokens (N in Attention), D width, H attention
heads, E embedding, W processes, I images, T texts.

Read it beside clip.py. The towers are new (a ConvNet, not a ViT; a bidirectional BERT, whose tokens are averaged, not a
causal transformer that is read at the end token), and so are the two heads. The loss is the same.

It computes what the published code computes (tests/golden holds the values). What differs:
  - BERT's unused pooler is left out: 39,188,577 parameters instead of the published 39,254,369;
  - negatives come from the whole batch of all processes (there: from one GPU's part of it);
  - data.py splits by image (the notebook splits by caption, so its validation images were trained on), and an image
    gives one caption an epoch, with a random crop and flip (there: five rows, no augmentation);
  - AdamW with warm-up, cosine and gradient clipping, logit_scale at most ln 100 (there: Adam at a constant 2e-4);
  - the ImageNet weights are torchvision's, not Facebook's;
  - new towers (`small`, `tiny`, --scratch) start as in `init_weights`; the published model has pretrained ones.

    python train.py                                        # the tiny one on generated pictures: 3 minutes
    python train.py --model liteclip --data flickr8k       # the real one, from ImageNet and BERT-mini weights
    python liteclip.py runs/liteclip-flickr8k/best.pt photo.jpg "a photo of a dog" "a photo of a cat"
"""
import math
import re
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    image_size: int = 224
    depths: tuple = (3, 3, 9, 3)         # blocks in each stage; every stage but the first halves the resolution
    dims: tuple = (96, 192, 384, 768)    # channels of each stage
    layer_scale: float = 1e-6            # the initial gamma: near 0 a block starts as the identity; small towers want 1
    vocab_size: int = 30522
    pad_id: int = 0
    context_length: int = 128            # longer texts are cut to this
    positions: int = 512                 # rows of BERT's table of positions
    text_width: int = 256
    text_layers: int = 4
    text_heads: int = 4
    text_mlp: int = 1024
    embed_dim: int = 256
    dropout: float = 0.1


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


# --- the two towers -------------------------------------------------------------------------------------------------

class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w). Nothing is copied if the tensor is channels_last."""
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvBlock(nn.Module):
    """x + gamma * MLP(LayerNorm(depthwise 7x7 convolution of x)): mixing in space, then in channels, as in a ViT."""
    def __init__(self, dim, layer_scale):
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x):
        y = self.conv_dw(x).permute(0, 2, 3, 1)  # (B, h, w, C)
        y = self.gamma * self.mlp(self.norm(y))
        return x + y.permute(0, 3, 1, 2)  # (B, C, h, w)


class ImageEncoder(nn.Module):
    """ConvNeXt: images (B, 3, S, S), normalised -> (B, dims[-1])."""
    def __init__(self, config):
        super().__init__()
        dims = config.dims
        self.stem = nn.Sequential(nn.Conv2d(3, dims[0], kernel_size=4, stride=4), ChannelNorm(dims[0], eps=1e-6))
        self.stages = nn.ModuleList()
        for i, depth in enumerate(config.depths):
            stage = nn.Module()  # a container, for the published names
            stage.downsample = nn.Identity() if i == 0 else nn.Sequential(
                ChannelNorm(dims[i - 1], eps=1e-6), nn.Conv2d(dims[i - 1], dims[i], kernel_size=2, stride=2))
            stage.blocks = nn.Sequential(*[ConvBlock(dims[i], config.layer_scale) for _ in range(depth)])
            self.stages.append(stage)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)

    def forward(self, x):
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # (B, C, S/4, S/4)
        for stage in self.stages:
            x = stage.blocks(stage.downsample(x))
        return self.norm(x.mean(dim=(2, 3)))  # (B, C)


class TextEncoder(nn.Module):
    """BERT: tokens (B, L), padded with `pad_id` -> (B, D), the mean over the tokens that are not padding.

    The mask follows from the ids, so padding never changes a feature: a batch is as long as its longest text.
    """
    def __init__(self, config):
        super().__init__()
        width, self.pad_id = config.text_width, config.pad_id
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Embedding(config.positions, width)
        self.token_type_embedding = nn.Embedding(2, width)  # BERT's "sentence A" and "B"; a caption is A
        self.ln_embed = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(PostBlock(width, config.text_heads, config.text_mlp, 1e-12, config.dropout)
                                    for _ in range(config.text_layers))

    def forward(self, tokens):
        visible = tokens != self.pad_id  # (B, L)
        x = self.token_embedding(tokens) + self.positional_embedding.weight[:tokens.shape[1]]
        x = self.dropout(self.ln_embed(x + self.token_type_embedding.weight[0]))  # (B, L, D)
        for block in self.blocks:
            x = block(x, visible[:, None, None])  # the mask is (B, 1, 1, L): the same for every head and every query
        visible = visible[..., None].to(x.dtype)
        return (x * visible).sum(dim=1) / visible.sum(dim=1).clamp(min=1e-9)  # (B, D)


class Head(nn.Module):
    """p + LayerNorm(dropout(GELU(p))) with p the projection: (B, D) -> (B, E)."""
    def __init__(self, width, config):
        super().__init__()
        self.proj = nn.Linear(width, config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.ln = nn.LayerNorm(config.embed_dim, eps=1e-5)

    def forward(self, x):
        p = self.proj(x)
        return p + self.ln(self.dropout(F.gelu(p)))


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


# --- the model ------------------------------------------------------------------------------------------------------

class LiteCLIP(nn.Module):
    """Two encoders, a head on each, and one learned number, logit_scale."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.apply(init_weights)  # not the heads, which keep torch's initialisation
        with torch.no_grad():  # with positions as large as words, learning starts much later
            self.text_encoder.positional_embedding.weight *= 0.1
            self.text_encoder.token_type_embedding.weight *= 0.1
        self.img_projection = Head(config.dims[-1], config)
        self.txt_projection = Head(config.text_width, config)
        # Stretches the cosines. Learned as a logarithm, so that it stays positive; train.py keeps it at most ln 100.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        # The mean and standard deviation of the pictures that CLIP was trained on: liteCLIP's too, not ImageNet's.
        self.register_buffer("mean", torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1), persistent=False)

    def encode_image(self, images):
        """uint8 pixels, or floats already normalised, (B, 3, height, width) -> features of length 1, (B, E)."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, height, width), got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return F.normalize(upcast(self.img_projection(self.image_encoder(images))), dim=-1)

    def encode_text(self, tokens):
        """int64 tokens from `tokenize`, (B, L), L at most the number of positions -> features of length 1, (B, E)."""
        return F.normalize(upcast(self.txt_projection(self.text_encoder(tokens))), dim=-1)

    def similarity(self, image_features, text_features):
        """(I, E), (T, E) -> cosines (I, T), in fp32: they rank captions, images and labels."""
        with full_precision(image_features):
            return upcast(image_features) @ upcast(text_features).T

    def logits(self, images, tokens):
        """I images, T texts -> scaled cosines (I, T): their softmax over T is the probability of each text."""
        return self.logit_scale.exp() * self.similarity(self.encode_image(images), self.encode_text(tokens))

    def forward(self, images, tokens):
        """images (B, 3, S, S) and their captions (B, L) -> {"loss": ...}; other models add its terms."""
        return self.loss(**self.encode(images, tokens))

    def encode(self, images, tokens):
        """The arguments of `loss`, a row for each sample. To save memory, train.py may call it on parts of a batch."""
        if len(images) != len(tokens):
            raise ValueError(f"{len(images)} images and {len(tokens)} captions; expected one caption for each image")
        return {"image_features": self.encode_image(images), "text_features": self.encode_text(tokens)}

    def loss(self, image_features, text_features):
        return {"loss": contrastive_loss(image_features, text_features, self.logit_scale.exp())}

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
    def from_pretrained(cls, source, config="liteclip"):
        """A published checkpoint, loaded strictly: a name of PUBLISHED, a file or a state dict."""
        model = cls(config if isinstance(config, Config) else CONFIGS[config])
        return load_weights(model, read_weights(source, NAMES))


def from_backbones(imagenet, bert, config="liteclip"):
    """The start of liteCLIP's training: pretrained towers, new heads.

    imagenet: torchvision's `convnext_tiny` weights; bert: BERT-mini's; files or state dicts. Strict: each must hold its
    whole tower; their heads are dropped.
    """
    model = LiteCLIP(config if isinstance(config, Config) else CONFIGS[config])
    load_weights(model.image_encoder, read_weights(imagenet, NAMES))
    load_weights(model.text_encoder, read_weights(bert, NAMES))
    return model.train()


NAMES = [  # (a pattern in the published name, what it becomes here), all applied in this order:
    # image_encoder.backbone.stages.0.blocks.1.mlp.fc1.weight -> image_encoder.stages.0.blocks.1.mlp.c_fc.weight
    (r"^(module\.|_orig_mod\.)+", ""),
    # BERT's other heads and ImageNet's classes, which are never used
    (r"^(.*\.)?(pooler|cls)\..*$|^.*\bposition_ids$|^classifier\.2\..*$", ""),
    (r"_encoder\.backbone\.", "_encoder."), (r"^bert\.", ""),
    # BERT, as Hugging Face names it (files of 2019 call a norm's weight gamma and its bias beta)
    (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"embeddings\.LayerNorm\.", "ln_embed."), (r"embeddings\.word_embeddings\.", "token_embedding."),
    (r"embeddings\.position_embeddings\.", "positional_embedding."),
    (r"embeddings\.token_type_embeddings\.", "token_type_embedding."), (r"\bencoder\.layer\.", "blocks."),
    (r"\.attention\.self\.query\.", ".attn.q_proj."),
    (r"\.attention\.self\.key\.", ".attn.k_proj."), (r"\.attention\.self\.value\.", ".attn.v_proj."),
    (r"\.attention\.output\.dense\.", ".attn.out_proj."),
    (r"\.attention\.output\.LayerNorm\.", ".ln_1."), (r"\.intermediate\.dense\.", ".mlp.c_fc."),
    (r"\.output\.dense\.", ".mlp.c_proj."), (r"\.output\.LayerNorm\.", ".ln_2."),
    # ConvNeXt, as timm names it
    (r"\.fc1\.", ".c_fc."), (r"\.fc2\.", ".c_proj."), (r"\bhead\.norm\.", "norm."),
    # ConvNeXt, as torchvision names it: stages at odd places of `features`, what halves the resolution at even ones
    (r"^classifier\.0\.", "norm."), (r"^features\.0\.", "stem."),
    *[(rf"^features\.{2 * i + 1}\.", f"stages.{i}.blocks.") for i in range(4)],
    *[(rf"^features\.{2 * i}\.", f"stages.{i}.downsample.") for i in range(1, 4)],
    (r"\.block\.0\.", ".conv_dw."), (r"\.block\.2\.", ".norm."), (r"\.block\.3\.", ".mlp.c_fc."),
    (r"\.block\.5\.", ".mlp.c_proj."), (r"\.layer_scale$", ".gamma"),
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


# --- sizes, and how each is trained ---------------------------------------------------------------------------------

CONFIGS = {
    "liteclip": Config(),  # 39,188,577 parameters: the published model without the pooler
    "small": Config(image_size=112, depths=(2, 2, 4, 2), dims=(48, 96, 192, 384), layer_scale=1.0, vocab_size=8192,
                    context_length=64, positions=64, text_width=192, text_layers=2, text_mlp=768, embed_dim=192),
    "tiny": Config(image_size=64, depths=(1, 1, 2, 1), dims=(32, 64, 128, 256), layer_scale=1.0, vocab_size=1024,
                   context_length=64, positions=64, text_width=128, text_layers=1, text_mlp=512, embed_dim=128,
                   dropout=0.0),
}

HUB = "https://huggingface.co"
BERT_MINI = f"{HUB}/google/bert_uncased_L-4_H-256_A-4/resolve/main"
VOCABULARY = (f"{BERT_MINI}/vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3")
LITECLIP2 = "https://github.com/shreydan/liteCLIP/releases/download/model/liteclip2.pt"
PUBLISHED = {"liteclip": {"source": (LITECLIP2, None), "vocab": VOCABULARY}}  # files: (address, SHA-256 if known)

# The defaults of train.py. files: the weights that a run starts from; tokenizer: the kind of their vocabulary;
# image_lr: the image tower's rate, as a multiple of lr; scratch: what --scratch (from random weights) changes.
# A new ConvNet learns best at twice the rate that a post-LN transformer can stand: with one rate for both, one seed in
# three had not learned the shapes in time.
RECIPES = {
    # 25 epochs, one caption per image, see as many captions as the published 5 epochs, five per image
    "liteclip": dict(batch=64, epochs=25, lr=2e-4, image_lr=1.0, weight_decay=0.05, warmup=0.1, tokenizer="wordpiece",
                     files={"imagenet": ("https://download.pytorch.org/models/convnext_tiny-983f1562.pth", "983f1562"),
                            "bert": (f"{BERT_MINI}/pytorch_model.bin", None), "vocab": VOCABULARY}),
    "small": dict(batch=64, epochs=40, lr=1e-3, image_lr=2.0, weight_decay=0.1, warmup=0.05),
    "tiny": dict(batch=64, epochs=8, lr=1e-3, image_lr=2.0, weight_decay=0.05, warmup=0.1),
}


def init_weights(module):
    """New towers: normal weights with a std of inputs^-1/2, embeddings of width^-1/2, zero biases.

    BERT's and ConvNeXt's own std of 0.02 suits wide towers and long training. Depthwise filters start with a mean of
    zero: they see contrast and not brightness, and a small tower learns shapes sooner.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        nn.init.zeros_(module.bias)
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            with torch.no_grad():
                module.weight -= module.weight.mean(dim=(2, 3), keepdim=True)
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=module.embedding_dim ** -0.5)


def load(source, device=None):
    """A checkpoint of train.py, its run's folder, or a name of PUBLISHED -> model, tokenizer, preprocess."""
    import data  # only here, so that the rest of the file needs nothing but torch
    return data.load_model(LiteCLIP, Config, PUBLISHED, RECIPES, source, device)


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
