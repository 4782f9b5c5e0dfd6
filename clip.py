"""CLIP: images and texts in one space, learned from nothing but captioned pictures.
Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020 (2021).

The idea: do not teach a model to name one of 1,000 classes. Show it B pictures and their B captions, and ask which
caption belongs to which picture. A model that can answer that for any batch can pick the text that fits a picture, and
a new class is just a new text.

    image    u = ViT(image)         patches of P x P pixels and a class token, whose last state is projected      (B, E)
    text     v = Transformer(text)  causal; the state at the end-of-text token, projected                         (B, E)
    logits   s_ij = exp(logit_scale) * u_i . v_j      with u and v of length 1                                    (B, B)
    loss     1/2 [ CE(rows of s, diagonal) + CE(columns of s, diagonal) ]                                       Fig. 3

Shapes: B batch, S image side, P patch side, N image tokens (class token and patches), L text tokens, D width,
H attention heads, E embedding, W processes, I images, T texts.

Attention, MLP and Block are a standard transformer; contrastive_loss is the paper; CLIP joins them. Skip the rest at
first: published weights, sizes, and KoCLIP, the same loss in Korean on two pretrained towers.

It computes what OpenAI's code computes (tests/golden holds the values). What differs:
  - a text's feature is taken at the first `end_id`, not at the largest id: the same token with CLIP's tokenizer;
  - texts need not be padded to 77; longer ones are cut, with a warning, where OpenAI's code refuses them;
  - training pictures are flipped as well as cropped, where the captions allow it;
  - the tiny size starts with `sines_and_contrast`.

    python train.py --model clip                                       # the tiny one on generated pictures: 4 minutes
    python train.py --model clip --config vit-b-32 --data flickr8k     # goes on from OpenAI's weights
    python clip.py runs/clip-shapes/best.pt photo.png "a red star" "a blue circle"   # or vit-b-32: OpenAI's
"""
import math
import re
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
    end_id: int = 49407              # the end-of-text token: its state is the text's feature
    context_length: int = 77         # longer texts are cut to this
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    text_mlp: int = 2048
    embed_dim: int = 512
    activation: str = "quick_gelu"   # OpenAI's weights; LAION's need "gelu"
    sines_and_contrast: bool = False  # a better start for a small image tower: see the function of that name
    image_tower: str = "clip"        # or "vit"; the last four fields are for KoCLIP, below
    text_tower: str = "clip"         # or "roberta"
    pad_id: int = 1                  # RoBERTa has to mask the padding
    dropout: float = 0.1             # in RoBERTa only


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
    """ViT: images (B, 3, S, S), normalised -> (B, E)."""
    def __init__(self, config):
        super().__init__()
        width, grid = config.image_width, config.image_size // config.patch_size
        self.conv1 = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(1 + grid ** 2, width))
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, config.image_heads, config.image_mlp, ACTIVATIONS[config.activation])
                                    for _ in range(config.image_layers))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))
        if config.sines_and_contrast:
            sines_and_contrast(self, grid)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, N - 1, D): a token for each patch
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (B, N, D)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj  # (B, E)


class TextEncoder(nn.Module):
    """A causal transformer: tokens (B, L) with `end_id` in every row -> (B, E), from the state at the first `end_id`.

    That token sees the whole text and nothing after it, so the padding may have any ids and any length.
    """
    def __init__(self, config):
        super().__init__()
        width, layers = config.text_width, config.text_layers
        self.end_id = config.end_id
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.blocks = nn.ModuleList(Block(width, config.text_heads, config.text_mlp, ACTIVATIONS[config.activation])
                                    for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))
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
        return self.ln_final(x) @ self.text_projection  # (B, E)


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

class CLIP(nn.Module):
    """Two encoders and one learned number, logit_scale."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.image_encoder = ViT(config) if config.image_tower == "vit" else ImageEncoder(config)
        self.text_encoder = RoBERTa(config) if config.text_tower == "roberta" else TextEncoder(config)
        # Stretches the cosines. Learned as a logarithm, so that it stays positive; train.py keeps it at most ln 100.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        # The mean and standard deviation of the pictures that CLIP was trained on.
        self.register_buffer("mean", torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1), persistent=False)

    def encode_image(self, images):
        """uint8 pixels, or floats already normalised, (B, 3, S, S), S = image_size -> features of length 1, (B, E)."""
        if images.shape[1:] != (3, self.config.image_size, self.config.image_size):
            raise ValueError(f"images must be (B, 3, S, S), S = {self.config.image_size}, got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return F.normalize(upcast(self.image_encoder(images)), dim=-1)

    def encode_text(self, tokens):
        """int64 tokens from `tokenize`, (B, L), L at most the number of positions -> features of length 1, (B, E)."""
        return F.normalize(upcast(self.text_encoder(tokens)), dim=-1)

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
    def from_pretrained(cls, source, config=None):
        """Published weights, loaded strictly: a name of PUBLISHED, or a file or a state dict in the names of OpenAI,
        open_clip or Hugging Face. config: a Config or its name, needed unless source is a name of PUBLISHED.

        OpenAI's files are TorchScript archives, which can contain code: open only trusted ones. LAION's weights need
        replace(CONFIGS["vit-b-32"], activation="gelu"). Positions are resized to the config's image_size.
        """
        config = config if isinstance(config, Config) else CONFIGS[config or source]
        model = cls(config)
        state = read_weights(open_archive(source), KOCLIP_NAMES if config.text_tower == "roberta" else NAMES)
        return load_weights(model, resize_positions(model, state))


NAMES = [  # (a pattern in the published name, what it becomes here), all applied in this order:
    # visual.transformer.resblocks.0.attn.in_proj_weight -> image_encoder.blocks.0.attn.in_proj.weight
    (r"^(module\.|_orig_mod\.)+", ""),
    # Settings of OpenAI's archives and buffers of Hugging Face's models, not weights
    (r"^.*\bposition_ids$|^(input_resolution|context_length|vocab_size)$", ""),
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


def open_archive(source):
    """OpenAI's TorchScript archives and KoCLIP's Flax files -> state dicts. Any other source is returned."""
    if isinstance(source, str) and source in PUBLISHED:
        import data  # only here, so that the rest of the file needs nothing but torch
        source = data.fetch(PUBLISHED[source])["source"]
    if isinstance(source, dict):
        return source
    if str(source).endswith(".msgpack"):
        return read_flax(source)
    if zipfile.is_zipfile(source) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(source).namelist()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, but these files will not change
            return torch.jit.load(source, map_location="cpu").state_dict()
    return source


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
             text_heads=12, text_mlp=3072, embed_dim=768)
TINY = dict(image_size=32, patch_size=8, image_width=256, image_layers=2, image_heads=8, image_mlp=1024,
            vocab_size=1024, context_length=64, text_width=128, text_layers=2, text_heads=4, text_mlp=512,
            embed_dim=128, sines_and_contrast=True)
ROBERTA_LARGE = dict(text_tower="roberta", vocab_size=32000, context_length=514, text_width=1024, text_layers=24,
                     text_heads=16, text_mlp=4096)
CONFIGS = {
    "vit-b-32": Config(),                              # 151,277,313 parameters
    "vit-b-16": Config(patch_size=16),                 # 149,620,737
    "vit-l-14": Config(**LARGE),                       # 427,616,513
    "vit-l-14-336": Config(image_size=336, **LARGE),   # 427,944,193
    "tiny": Config(**TINY, end_id=2),
    "koclip-base": Config(**ROBERTA_LARGE),            # 425,029,889
    "koclip-large": Config(**ROBERTA_LARGE, image_tower="vit", patch_size=16, image_width=1024, image_layers=24,
                           image_heads=16, image_mlp=4096, activation="gelu"),                      # 642,056,193
    "koclip-tiny": Config(**TINY, text_tower="roberta", pad_id=0, dropout=0.0),
}

OPENAI, HUB = "https://openaipublic.azureedge.net/clip/models", "https://huggingface.co"
MERGES = ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
          "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")
B_32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
B_16 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
L_14 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
L_14_336 = "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"
KLUE = (f"{HUB}/klue/roberta-large/resolve/main/vocab.txt", None)
PUBLISHED = {  # the files of a published model: (address, SHA-256 where one is known)
    "vit-b-32": {"source": (f"{OPENAI}/{B_32}/ViT-B-32.pt", B_32), "vocab": MERGES},
    "vit-b-16": {"source": (f"{OPENAI}/{B_16}/ViT-B-16.pt", B_16), "vocab": MERGES},
    "vit-l-14": {"source": (f"{OPENAI}/{L_14}/ViT-L-14.pt", L_14), "vocab": MERGES},
    "vit-l-14-336": {"source": (f"{OPENAI}/{L_14_336}/ViT-L-14-336px.pt", L_14_336), "vocab": MERGES},
    "koclip-base": {"source": (f"{HUB}/koclip/koclip-base-pt/resolve/main/pytorch_model.bin", None), "vocab": KLUE},
    "koclip-large": {"source": (f"{HUB}/koclip/koclip-large/resolve/main/flax_model.msgpack", None), "vocab": KLUE},
}

# The defaults of train.py. files: the weights that a run starts from; tokenizer: the kind of their vocabulary;
# image_lr: the image tower's rate, as a multiple of lr; scratch: what --scratch (from random weights) changes. The
# values in SCRATCH are the paper's, for a batch of 32,768.
FINE = dict(batch=64, epochs=5, lr=1e-5, image_lr=1.0, weight_decay=0.1, warmup=0.1, tokenizer="clip")
SCRATCH = dict(epochs=32, lr=5e-4, weight_decay=0.2)
KO = dict(batch=512, epochs=40, lr=5e-5, image_lr=1.0, weight_decay=0.1, warmup=0.01, tokenizer="wordpiece-cased",
          data="shapes-ko", scratch=dict(lr=5e-4))
CLIP_B_32 = (f"{HUB}/openai/clip-vit-base-patch32/resolve/main/pytorch_model.bin", None)
VIT_L_16 = (f"{HUB}/google/vit-large-patch16-224/resolve/main/pytorch_model.bin", None)
ROBERTA = (f"{HUB}/klue/roberta-large/resolve/main/pytorch_model.bin", None)
RECIPES = {
    "vit-b-32": dict(FINE, files=PUBLISHED["vit-b-32"], scratch=SCRATCH),
    "vit-b-16": dict(FINE, files=PUBLISHED["vit-b-16"], scratch=SCRATCH),
    "vit-l-14": dict(FINE, files=PUBLISHED["vit-l-14"], scratch=dict(SCRATCH, lr=4e-4)),
    "vit-l-14-336": dict(FINE, files=PUBLISHED["vit-l-14-336"], scratch=dict(SCRATCH, lr=4e-4)),
    "tiny": dict(batch=64, epochs=8, lr=1e-3, image_lr=1.0, weight_decay=0.05, warmup=0.1),
    "koclip-base": dict(KO, files={"image": CLIP_B_32, "text": ROBERTA, "vocab": KLUE}),
    "koclip-large": dict(KO, files={"image": VIT_L_16, "text": ROBERTA, "vocab": KLUE}),
    "koclip-tiny": dict(batch=64, epochs=8, lr=1e-3, image_lr=1.0, weight_decay=0.05, warmup=0.1, data="shapes-ko"),
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
    return data.load_model(CLIP, Config, PUBLISHED, RECIPES, source, device)


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


# --- KoCLIP ---------------------------------------------------------------------------------------------------------
# The same loss on two pretrained towers: RoBERTa-large, which knows Korean (KLUE's), and an image tower (base: CLIP's
# own ViT-B/32; large: Google's ViT-L/16). github.com/jaketae/koclip, 2021; no paper, no published scores.
#
# Its weights need these quirks: RoBERTa's positions count from 0, where RoBERTa itself begins at 2; its pooler, and the
# ViT's in the large one, end in tanh; pictures have CLIP's mean and standard deviation for the ViT, too.
# As in its training, exp(logit_scale) starts at e, not at 1/0.07. Unlike there, negatives come from all devices, weight
# decay spares biases and norms, and the scale is capped.

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
        self.positional_embedding = nn.Parameter(0.002 * torch.randn(config.context_length, width))
        self.token_type_embedding = nn.Parameter(0.002 * torch.randn(1, width))  # BERT has two types, RoBERTa one
        self.ln_embed = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(PostBlock(width, config.text_heads, config.text_mlp, 1e-5, config.dropout)
                                    for _ in range(config.text_layers))
        self.pooler = nn.Linear(width, width)
        self.text_projection = nn.Parameter(0.02 * torch.randn(width, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)  # for a new tower; KoCLIP's came from KLUE
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
    """Google's ViT. Unlike CLIP's: a bias in conv1, no norm before the blocks, a tanh pooler, an eps of 1e-12."""
    def __init__(self, config):
        super().__init__(config)
        width = config.image_width
        self.conv1.bias = nn.Parameter(torch.zeros(width))
        self.ln_pre = nn.Identity()
        self.ln_post = nn.Sequential(self.ln_post, nn.Linear(width, width), nn.Tanh())
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-12


def from_backbones(image, text, config="koclip-base"):
    """The start of KoCLIP's training: pretrained towers, new projections (except CLIP's own), new poolers if need be.

    image: OpenAI's CLIP ViT-B/32 or Google's ViT-L/16; text: RoBERTa. Hugging Face's files or state dicts; what else is
    in them is dropped.
    """
    config = config if isinstance(config, Config) else CONFIGS[config]
    model = CLIP(config)
    nn.init.ones_(model.logit_scale)
    new = r"pooler\.|ln_post\.1\.|text_projection$|logit_scale$" + ("" if config.image_tower == "clip" else r"|\.proj$")
    state = {name: value for name, value in model.state_dict().items() if re.search(new, name)}
    for source, tower in ((image, "image_encoder."), (text, "text_encoder.")):
        state |= {name: value for name, value in read_weights(source, KOCLIP_NAMES).items() if name.startswith(tower)}
    return load_weights(model, state).train()


KOCLIP_NAMES = [
    (r"^(module\.|_orig_mod\.|params\.)+", ""),
    (r"^vision_model\.vision_model\.", "vision_model."), (r"^vit\.", "vision_model."), (r"^roberta\.", "text_model."),
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
    *NAMES,
]


def read_flax(path):
    """KoCLIP's flax_model.msgpack -> a state dict in Hugging Face's names for PyTorch."""
    import msgpack  # pip install msgpack

    def array(code, content):
        shape, dtype, values = msgpack.unpackb(content)
        return torch.frombuffer(bytearray(values), dtype=getattr(torch, dtype)).view(shape)

    def walk(tree, path=()):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, (*path, key))
            elif key == "kernel":  # (in, out), or (height, width, in, out)
                yield ".".join((*path, "weight")), value.T if value.ndim == 2 else value.permute(3, 2, 0, 1)
            else:
                yield ".".join((*path, {"scale": "weight", "embedding": "weight"}.get(key, key))), value

    with open(path, "rb") as file:
        return dict(walk(msgpack.unpackb(file.read(), ext_hook=array)))


if __name__ == "__main__":
    import data
    data.command(load)
