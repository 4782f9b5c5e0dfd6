"""ProLIP: a Gaussian for each image and text instead of a point.

Chun, Kim, Park, Yun, "Probabilistic Language-Image Pre-Training", arXiv 2410.18857 (ICLR 2025); and for long texts
"LongProLIP", arXiv 2503.08048.

The idea: "a shape" is true of a million pictures, "a large striped red star above a blue moon" of few. A point cannot
say so. Let each encoder return a Gaussian with a diagonal covariance, N(mu, sigma^2): where, and how certain. In a
batch a text counts as right for one picture and as wrong for all others, though a vague one fits many. A large variance
lowers its similarity to all of them, so the model can hedge. (The published models do; in the tiny one the variance
marks what was masked: docs/claims.md has the figures.)

    image    mu, v = ViT(image)          [CLS] gives the mean; a second token, [UNC], gives v = ln sigma^2        (B, E)
    text     nu, w = Transformer(text)   the same, except that w is computed from nu: see TextEncoder             (B, E)
    CSD      d_ij = mu_i . nu_j - 1/2 sum_e (exp v_ie + exp w_je)         with means of length 1                  (B, B)
    loss     sum over all pairs of -ln sigmoid(y_ij (s d_ij + b)) / B,    y = 1 on the diagonal, else -1          (PPCL)
             + alpha_1 inclusion(image in its text)
             + alpha_2 inclusion(original in its masked copy), for images and for texts
             + beta KL to N(0, 1), for images and for texts                                                        (VIB)
    inclusion(p in q) = mean over dimensions of -ln sigmoid(c (T(p, q) - T(q, p))),    T(p, q) = ln integral of p^2 q

s = exp(logit_scale), b = logit_bias. CSD: closed-form sampled distance (1 - E|x_i - y_j|^2 / 2 for samples x_i, y_j: a
similarity here, larger is nearer), PPCL: probabilistic pairwise contrastive loss, VIB: variational information
bottleneck. In each dimension T(p, q) > T(q, p) if q is the wider: then p lies in q. A caption leaves much open, so its
picture should lie in it. A masked input fits many originals, so its own original should lie in it.

Shapes: B batch, S image side, P patch side, N image tokens ([CLS], [UNC], patches), L text tokens, D width,
H attention heads, E embedding, K kept patches, W processes, I images, T texts.

Read it beside clip.py. Attention, MLP and Block are the same; the encoders have one more token and one more output; the
losses are the paper. What follows the model is for when you need it: published weights, sizes, re-weighted prompts.

It computes what the published code computes (tests/golden holds the values). Kept from that code, against the paper or
the mathematics:
  - the inclusion test has twice the prefactor: see inclusion_test. At the published eps of -20 the means have almost no
    weight in it, and its loss compares variances only;
  - the KL has v / 2 where a Gaussian's has v: see vib;
  - masked texts lose 75 % of their words, as in the paper, but masked images only 25 % of their patches.
What differs:
  - on W processes every term means what it means on one (there, a ring exchange adds all terms but PPCL W times, and
    pairs images and masked texts with other samples' texts);
  - which samples are masked, and how, is drawn for each sample separately (there: the first eighth of the batch, all
    with one set of patches), so that a batch stays the same however it is split;
  - log-variances are kept within +-30, far from any value they take (there: a term that explodes is dropped);
  - AdamW's second beta is .98 (there .95); the tiny size starts with `sines_and_contrast`.

    python train.py --model prolip                                     # the tiny one on generated pictures: 5 minutes
    python train.py --model prolip --config vit-b-16 --data flickr8k   # goes on from the released weights
    python prolip.py runs/prolip-shapes/best.pt photo.png "a red star" "some shapes"
    python experiments/claims.py prolip                                # the paper's claims, on shapes
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


@dataclass
class Config:
    image_size: int = 224
    patch_size: int = 16
    image_width: int = 768
    image_layers: int = 12
    image_heads: int = 12
    image_mlp: int = 3072            # the hidden width
    vocab_size: int = 32100
    pad_id: int = 1                  # it is attended to like a word, so the id matters
    end_id: int = 1
    mask_id: int = 32000
    context_length: int = 64         # longer texts are cut to this, shorter ones padded
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_mlp: int = 3072
    embed_dim: int = 768
    activation: str = "gelu"
    text_eps: float = 1e-6           # of the text tower's norms; the image tower's have 1e-5
    sines_and_contrast: bool = False  # a better start for a small image tower: see the function of that name
    logit_bias: float = -10.0        # the initial value: nearly all pairs are wrong ones
    log_var: float = -10.0           # the initial value, in each dimension
    image_in_text: float = 1e-7      # alpha_1, the weight of "image in its text"
    original_in_masked: float = 1e-3  # alpha_2, of "original in its masked copy"
    vib: float = 1e-4                # beta, of the KL
    inclusion_eps: float = -20.0
    inclusion_scale: float = 1000.0
    masked_share: float = 0.125      # of the samples of a batch
    mask_text: float = 0.75          # share of the words masked
    keep_patches: float = 0.75       # share of the patches kept


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
    """ViT: images (B, 3, S, S), normalised -> mean, log_var (B, E) each.

    keep: (B, K), indices of the patches to keep, or None for all.
    """
    def __init__(self, config):
        super().__init__()
        width, grid = config.image_width, config.image_size // config.patch_size
        self.conv1 = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.unc_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(2 + grid ** 2, width))
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, config.image_heads, config.image_mlp, ACTIVATIONS[config.activation])
                                    for _ in range(config.image_layers))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))
        self.uncertainty_proj = nn.Linear(width, config.embed_dim)
        nn.init.normal_(self.uncertainty_proj.weight, std=width ** -0.5)
        nn.init.constant_(self.uncertainty_proj.bias, config.log_var)
        if config.sines_and_contrast:
            sines_and_contrast(self, grid)

    def forward(self, x, keep=None):
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, N - 2, D): a token for each patch
        special = torch.stack([self.class_embedding, self.unc_embedding])  # [CLS], [UNC]
        x = torch.cat([special.expand(len(x), 2, -1), x], dim=1) + self.positional_embedding  # (B, N, D)
        if keep is not None:
            patches = x[:, 2:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
            x = torch.cat([x[:, :2], patches], dim=1)  # (B, 2 + K, D)
        x = self.ln_pre(x)
        for block in self.blocks:
            x = block(x)
        x = self.ln_post(x[:, :2])
        mean = self.ln_post(x[:, 0]) @ self.proj  # the norm a second time, as in the published code
        return mean, variance_head(self.uncertainty_proj, x[:, 1])


class TextEncoder(nn.Module):
    """A transformer without any mask: tokens (B, L), all of one length -> mean, log_var (B, E) each.

    [UNC] and [CLS] follow the text. The published code, unlike the paper, computes log_var from the mean before its
    normalisation. [UNC] only takes part in the attention; its own state is not used. Padding is seen like words, so a
    text must be padded to context_length with pad_id.
    """
    def __init__(self, config):
        super().__init__()
        width, layers = config.text_width, config.text_layers
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.unc_embedding = nn.Parameter(0.01 * torch.randn(width))
        self.class_embedding = nn.Parameter(0.01 * torch.randn(width))
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length + 2, width))
        self.blocks = nn.ModuleList(
            Block(width, config.text_heads, config.text_mlp, ACTIVATIONS[config.activation], config.text_eps)
            for _ in range(layers))
        self.ln_final = nn.LayerNorm(width, eps=config.text_eps)
        self.text_projection = nn.Linear(width, config.embed_dim)
        self.text_uncertainty_projection = nn.Linear(config.embed_dim, config.embed_dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.blocks:  # the deeper the tower, the less each block adds to x at first
            nn.init.normal_(block.attn.in_proj.weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)
        for head, bias in ((self.text_projection, 0.0), (self.text_uncertainty_projection, config.log_var)):
            nn.init.normal_(head.weight, std=head.in_features ** -0.5)
            nn.init.constant_(head.bias, bias)

    def forward(self, tokens):
        special = torch.stack([self.unc_embedding, self.class_embedding])  # in this order
        x = torch.cat([self.token_embedding(tokens), special.expand(len(tokens), 2, -1)], dim=1)
        x = x + self.positional_embedding  # (B, L + 2, D)
        for block in self.blocks:
            x = block(x)
        mean = self.text_projection(self.ln_final(x[:, -1]))  # [CLS] is last
        return mean, variance_head(self.text_uncertainty_projection, mean)


def variance_head(head, x):
    """ln sigma^2, as an fp32 product: near -10, bf16 has steps of 1/16, which are 6 % of sigma^2."""
    with full_precision(x):
        return F.linear(upcast(x), upcast(head.weight), upcast(head.bias)).clamp(-30, 30)


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


# --- new in ProLIP: how near two Gaussians are, and whether one lies in the other ------------------------------------

class Gaussian(NamedTuple):
    """Images or texts as Gaussians with diagonal covariance: mean and log_var = ln sigma^2, both (B, E)."""
    mean: torch.Tensor
    log_var: torch.Tensor

    @property
    def uncertainty(self):
        """The sum of the variances, (B,): how vague an image or a text is."""
        return upcast(self.log_var).exp().sum(dim=-1)


def csd(one, other):
    """Gaussians (I, E) and (T, E) -> their similarity (I, T): cosine of the means, less half the sum of all variances.

    The closed form of a sampled distance: for x and y drawn from the two, and means of length 1,
    E|x - y|^2 = 2 - 2 mu_x . mu_y + sum_e (sigma_x^2 + sigma_y^2). Each Gaussian's variances are summed first, so no
    tensor of (I, T, E) is made.
    """
    with full_precision(one.mean):
        return upcast(one.mean) @ upcast(other.mean).T - (one.uncertainty[:, None] + other.uncertainty) / 2


def sigmoid_loss(similarities, scale, bias):
    """A yes or no for every pair of B local images and W B texts: is this its caption? Summed, divided by B."""
    first = dist.get_rank() * len(similarities) if dist.is_initialized() else 0  # the column of our row 0
    y = torch.full_like(similarities, -1.0)
    y.diagonal(first).fill_(1.0)
    return -F.logsigmoid(y * (scale * similarities + bias)).sum() / len(similarities)


def pairwise_loss(image_features, text_features, scale, bias):
    """PPCL, the probabilistic pairwise contrastive loss: is this the caption of that image? For every pair.

    image_features, text_features: Gaussians (B, E), row i of one belongs to row i of the other;
    scale: exp(logit_scale).
    Local images against the texts of all W processes; the sum over pairs is divided by B, not by the number of pairs.
    With no variance it is SigLIP's sigmoid loss. It starts at about 10: a bias of -10 calls all B true pairs wrong, at
    a cost of 10 each.
    """
    with full_precision(image_features.mean):
        similarities = csd(image_features, Gaussian(*(gather(upcast(x)) for x in text_features)))  # (B, W B)
        return sigmoid_loss(similarities, scale, bias)


def inclusion_test(first, second, eps=0.0):
    """ln of the integral of p1^2 p2, up to a constant: large where `first` lies within `second`. For each dimension.

    first, second: Gaussians (..., E) -> (..., E). In each dimension test(first, second) - test(second, first) is
    positive if `second` is the wider, at any eps and wherever the means lie. The means only change by how much.
    eps: 0 for a trained model, as in the published evaluation; -20 in training.

    The integral has three factors. Their logarithms are -v1 - v2 / 2, from the normalising constants (the prefactor);
    -1/2 ln a, where a = 1 / sigma1^2 + 1 / (2 sigma2^2); and -(mu1 - mu2)^2 / (sigma1^2 + 2 sigma2^2). The published
    code has twice the first, as if v were ln sigma, and the released weights were trained with it. Its eps multiplies
    every 1 / sigma^2 by exp(eps). In the difference of the two tests eps cancels, except in front of the means: at -20
    they have almost no weight. The published form, with exp(eps - v), underflows in fp32 at LongProLIP's eps of -100.
    This is the same, rearranged.
    """
    (mu1, v1), (mu2, v2) = first, second
    log_a = torch.logaddexp(-v1, -v2 - math.log(2)) + eps
    return -2 * v1 - v2 - log_a / 2 - math.exp(eps) * (mu1 - mu2) ** 2 / (v1.exp() + 2 * v2.exp())


def inclusion_loss(first, second, eps=-20.0, scale=1000.0):
    """-ln sigmoid(scale * H), H = test(1 in 2) - test(2 in 1), mean over the dimensions: (B, E) twice -> (B,).

    At a scale of 1000 it is a hinge in each dimension: zero if `second` is the wider one, linear if it is not.
    """
    with full_precision(first.mean):
        first, second = Gaussian(*map(upcast, first)), Gaussian(*map(upcast, second))
        h = inclusion_test(first, second, eps) - inclusion_test(second, first, eps)
        return -F.logsigmoid(scale * h).mean(dim=-1)


def vib(features):
    """KL to a standard normal, averaged over rows and dimensions: Gaussian (B, E) -> ().

    Means of length 1 add a constant, so its effect is to keep variances from vanishing. The KL of a Gaussian has
    v = ln sigma^2 where this has v / 2 = ln sigma: as in the published code.
    """
    with full_precision(features.mean):
        mu, t = upcast(features.mean), upcast(features.log_var) / 2
        return -0.5 * (1 + t - mu ** 2 - t.exp()).mean()


# --- the model ------------------------------------------------------------------------------------------------------

class ProLIP(nn.Module):
    """Two encoders of Gaussians, and two learned numbers, logit_scale and logit_bias.

    Its methods are those of CLIP in clip.py, and `classify`, which compares images with classes.
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        # Stretches the cosines. Learned as a logarithm, so that it stays positive; train.py keeps it at most ln 100.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(float(config.logit_bias)))
        # The mean and standard deviation of the pictures that CLIP was trained on.
        self.register_buffer("mean", torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1), persistent=False)

    def encode_image(self, images, keep=None):
        """uint8 pixels, or floats already normalised, (B, 3, S, S), S = image_size -> Gaussian (B, E).

        keep: (B, K), indices of the patches to keep, or None for all.
        """
        if images.shape[1:] != (3, self.config.image_size, self.config.image_size):
            raise ValueError(f"images must be (B, 3, S, S), S = {self.config.image_size}, got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        mean, log_var = self.image_encoder(images, keep)
        return Gaussian(F.normalize(upcast(mean), dim=-1), log_var)

    def encode_text(self, tokens):
        """int64 tokens from `tokenize`, (B, context_length) -> Gaussian (B, E)."""
        limit = len(self.text_encoder.positional_embedding) - 2
        if tokens.ndim != 2 or tokens.shape[1] != limit:
            raise ValueError(f"tokens must be (B, {limit}), as tokenize makes them, got {tuple(tokens.shape)}")
        mean, log_var = self.text_encoder(tokens)
        return Gaussian(F.normalize(upcast(mean), dim=-1), log_var)

    def similarity(self, image_features, text_features):
        """Gaussians (I, E), (T, E) -> CSD (I, T), in fp32: what ranks captions and images.

        In a ranking the candidates' variances count; the query's is the same for all of them.
        """
        return csd(image_features, text_features)

    def classify(self, image_features, text_features):
        """Gaussians (I, E), (T, E) -> products of the means (I, T), in fp32: only means, as published for classes."""
        with full_precision(image_features.mean):
            return upcast(image_features.mean) @ upcast(text_features.mean).T

    def logits(self, images, tokens):
        """I images, T texts -> scaled and shifted CSD (I, T): a sigmoid in training, a softmax over texts in use."""
        similarities = self.similarity(self.encode_image(images), self.encode_text(tokens))
        return self.logit_scale.exp() * similarities + self.logit_bias

    def forward(self, images, tokens, masked=None, masked_tokens=None, kept_patches=None):
        """images (B, 3, S, S) and their captions (B, L) -> {"loss": the sum of the others, "ppcl": ..., ...}.

        masked: bool (B,), the samples that have a masked copy: their rows of masked_tokens (B, L), kept_patches (B, K).
        """
        return self.loss(**self.encode(images, tokens, masked, masked_tokens, kept_patches))

    def encode(self, images, tokens, masked=None, masked_tokens=None, kept_patches=None):
        """The arguments of `loss`, a row for each sample. To save memory, train.py may call it on parts of a batch.

        The loss of an original and its masked copy involves no other sample, so it is computed here: a row for each
        masked sample.
        """
        if len(images) != len(tokens):
            raise ValueError(f"{len(images)} images and {len(tokens)} captions; expected one caption for each image")
        image, text = self.encode_image(images), self.encode_text(tokens)
        features = {"image_features": image, "text_features": text}
        if masked is not None:
            rows = masked.nonzero()[:, 0]
            rows = rows if len(rows) else rows.new_zeros(1)  # one that is not counted: a batch may not be empty
            image, text = (Gaussian(*(x[rows] for x in original)) for original in (image, text))
            features["image_in_masked"] = self.inclusion(image, self.encode_image(images[rows], kept_patches[rows]))
            features["text_in_masked"] = self.inclusion(text, self.encode_text(masked_tokens[rows]))
            features["counted"] = masked[rows]
        return features

    def loss(self, image_features, text_features, image_in_masked=None, text_in_masked=None, counted=None):
        config = self.config
        terms = {
            "ppcl": pairwise_loss(image_features, text_features, self.logit_scale.exp(), self.logit_bias),
            "image_in_text": config.image_in_text * self.inclusion(image_features, text_features).mean(),
            "vib": config.vib * (vib(image_features) + vib(text_features))}
        if counted is not None:
            for name, losses in (("image_in_masked", image_in_masked), ("text_in_masked", text_in_masked)):
                terms[name] = config.original_in_masked * mean_of_all(losses, counted)
        return {"loss": sum(terms.values()), **terms}

    def inclusion(self, first, second):
        """How far each of the first Gaussians lies outside its counterpart, (B, E) twice -> (B,)."""
        return inclusion_loss(first, second, self.config.inclusion_eps, self.config.inclusion_scale)

    def tokenize(self, texts, tokenizer):
        """A text or several -> int64 (B, context_length): (start, if the tokenizer has one,) ids, end, padding."""
        texts = [texts] if isinstance(texts, str) else texts
        start = [] if tokenizer.start_id is None else [tokenizer.start_id]
        room = self.config.context_length - 1 - len(start)
        pieces = [tokenizer.encode(text) for text in texts]
        if cut := sum(len(p) > room for p in pieces):
            warnings.warn(f"texts of more than {room} tokens are cut to that ({cut} of {len(texts)} here)")
        rows = [[*start, *p[:room], tokenizer.end_id] for p in pieces]
        tokens = torch.full((len(rows), self.config.context_length), tokenizer.pad_id)
        for i, row in enumerate(rows):
            tokens[i, :len(row)] = torch.tensor(row)
        return tokens

    def text_batch(self, samples, rngs, tokenizer):
        """What `forward` needs besides the images: a caption of each sample of data.py; which samples have a masked
        copy, about every eighth; and what is left of text and image in it. All drawn by that sample's own generator.
        """
        config = self.config
        tokens = self.tokenize([rng.choice(s.captions) for s, rng in zip(samples, rngs)], tokenizer)
        masked = torch.tensor([rng.random() < config.masked_share for rng in rngs])
        patches = (config.image_size // config.patch_size) ** 2
        kept = torch.zeros(len(samples), int(patches * config.keep_patches), dtype=torch.int64)
        masked_tokens = tokens.clone()
        for i in masked.nonzero()[:, 0].tolist():
            hide = torch.tensor([rngs[i].random() < config.mask_text for _ in range(tokens.shape[1])])
            words = (tokens[i] != config.pad_id) & (tokens[i] != config.end_id)  # a start token counts as a word
            masked_tokens[i, hide & words] = config.mask_id
            kept[i] = torch.tensor(sorted(rngs[i].sample(range(patches), kept.shape[1])))
        return {"tokens": tokens, "masked": masked, "masked_tokens": masked_tokens, "kept_patches": kept}

    # --- published weights --------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source, config=None):
        """Published weights, loaded strictly: a name of PUBLISHED, or a file or a state dict in the published names.
        config: a Config or its name, needed unless source is a name of PUBLISHED.

        For a longer context_length than the file's, the text tower's positions are stretched as LongProLIP's were; for
        another image_size, the image tower's are resized.
        """
        model = cls(config if isinstance(config, Config) else CONFIGS[config or source])
        state = read_weights(source, NAMES)
        return load_weights(model, stretch_texts(model, resize_positions(model, state)))


NAMES = [  # (a pattern in the published name, what it becomes here), all applied in this order:
    # visual.transformer.resblocks.0.attn.in_proj_weight -> image_encoder.blocks.0.attn.in_proj.weight
    (r"^(module\.|_orig_mod\.)+", ""),
    (r"^visual\.", "image_encoder."), (r"\btransformer\.resblocks\.", "blocks."), (r"\.in_proj_", ".in_proj."),
    (r"^text\.", "text_encoder."), (r"\bcls_emb$", "class_embedding"), (r"\bunc_emb$", "unc_embedding"),
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


def stretch_texts(model, state, head=20, tail=2):
    """The text tower's table of positions for longer texts, as LongProLIP has it.

    The first 20 rows stay, and so do the last two, those of [UNC] and [CLS]. The rows between are interpolated.
    """
    name, rows = "text_encoder.positional_embedding", len(model.text_encoder.positional_embedding)
    table = upcast(state[name]).flatten(0, -2)
    if head + tail < len(table) < rows:
        warnings.warn(f"positions for texts of {len(table) - tail} tokens, stretched to {rows - tail}")
        middle = F.interpolate(table[head:-tail].T[None], size=rows - head - tail, mode="linear")[0].T
        state[name] = torch.cat([table[:head], middle, table[-tail:]])
    return state


# --- sizes, and how each is trained ---------------------------------------------------------------------------------

CLIP_TOKENS = dict(pad_id=0, end_id=49407)  # it has no mask token: 32000 is an ordinary piece
LONG = dict(context_length=256, inclusion_eps=-100.0, inclusion_scale=10.0)
CONFIGS = {
    "vit-b-16": Config(),             # 197,923,586 parameters
    "vit-b-16-long": Config(**LONG),  # 198,071,042
    "vit-l-16": Config(image_size=256, image_width=1024, image_layers=24, image_heads=16, image_mlp=4096,
                       text_width=1024, text_layers=24, text_heads=16, text_mlp=4096, embed_dim=1024),  # 642,814,978
    "vit-so400m-14": Config(patch_size=14, image_width=1152, image_layers=27, image_heads=16, image_mlp=4304,
                            text_width=1152, text_layers=27, text_heads=16, text_mlp=4304,
                            embed_dim=1152),  # 866,286,434
    # with CLIP's tokenizer and QuickGELU, as in DFN's weights, its origin
    "vit-h-14": Config(patch_size=14, image_width=1280, image_layers=32, image_heads=16, image_mlp=5120,
                       vocab_size=49408, **CLIP_TOKENS, context_length=77, text_width=1024, text_layers=24,
                       text_heads=16, text_mlp=4096, text_eps=1e-5, embed_dim=1024,
                       activation="quick_gelu"),  # 988,478,466
    "tiny": Config(image_size=32, patch_size=8, image_width=256, image_layers=2, image_heads=8, image_mlp=1024,
                   vocab_size=1024, pad_id=0, end_id=2, mask_id=3, context_length=32, text_width=128, text_layers=2,
                   text_heads=4, text_mlp=512, embed_dim=128, sines_and_contrast=True),
}

HUB = "https://huggingface.co"
CHUN = f"{HUB}/SanghyukChun/%s/resolve/main/model.safetensors"
SIGLIP = (f"{HUB}/timm/ViT-B-16-SigLIP/resolve/main/tokenizer.json", None)
SO400M = (f"{HUB}/timm/ViT-SO400M-14-SigLIP/resolve/main/tokenizer.json", None)
MERGES = ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
          "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")
PUBLISHED = {  # the files of a published model: (address, SHA-256 where one is known)
    "vit-b-16": {"source": (CHUN % "ProLIP-ViT-B-16-DC-1B-12_8B", None), "vocab": SIGLIP},
    "vit-b-16-long": {"source": (CHUN % "LongProLIP-ViT-B-16-SHD128M", None), "vocab": SIGLIP},
    "vit-l-16": {"source": (CHUN % "ProLIP-ViT-L-16-FT-DC-1B-1_28B", None), "vocab": SIGLIP},
    "vit-so400m-14": {"source": (CHUN % "ProLIP-ViT-SO400M-14-FT-DC-1B-1_28B", None), "vocab": SO400M},
    "vit-h-14": {"source": (CHUN % "ProLIP-ViT-H-14-FT-DC-1B-1_28B", None), "vocab": MERGES},
}

# The defaults of train.py. files: the weights that a run starts from; tokenizer: the kind of their vocabulary;
# image_lr: the image tower's rate, as a multiple of lr; scratch: what --scratch (from random weights) changes.
# The scratch values are the paper's for B/16.
FINE = dict(batch=64, epochs=5, lr=1e-5, image_lr=1.0, weight_decay=0.1, warmup=0.1, tokenizer="unigram",
            scratch=dict(epochs=32, lr=5e-4, weight_decay=0.2))
RECIPES = {
    "vit-b-16": dict(FINE, files=PUBLISHED["vit-b-16"]),
    "vit-b-16-long": dict(FINE, files=PUBLISHED["vit-b-16-long"]),
    "vit-l-16": dict(FINE, files=PUBLISHED["vit-l-16"]),
    "vit-so400m-14": dict(FINE, files=PUBLISHED["vit-so400m-14"]),
    "vit-h-14": dict(FINE, files=PUBLISHED["vit-h-14"], tokenizer="clip"),
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
    return data.load_model(ProLIP, Config, PUBLISHED, RECIPES, source, device)


class ZeroShotPipeline:
    """ZeroShotPipeline("best.pt").predict("cat.jpg", ["a cat", "a dog"]) -> [(label, probability), ...], best first."""
    def __init__(self, source, device=None):
        self.model, self.tokenizer, self.preprocess = load(source, device)

    @torch.no_grad()
    def predict(self, image, labels, top_k=5):
        """image: a path or a PIL image; labels: two texts or more."""
        device = self.model.logit_scale.device
        image_features = self.model.encode_image(self.preprocess(image)[None].to(device))
        text_features = self.model.encode_text(self.model.tokenize(labels, self.tokenizer).to(device))
        cosines = self.model.classify(image_features, text_features)[0]  # means only, as published for classes
        probabilities = (self.model.logit_scale.exp() * cosines).softmax(dim=0).tolist()
        return sorted(zip(labels, probabilities), key=lambda pair: -pair[1])[:top_k]


# --- prompts, weighted by how well they describe a class's pictures -------------------------------------------------

def reweight_prompts(image_features, prompt_features, alpha=2.0, draws=20, steps=10, floor=0.02, generator=None):
    """Bayesian prompt re-weighting (the paper's BPRW): which of a class's prompts describe its pictures?

    image_features: Gaussian (I, E), some pictures of the class, or those nearest to it;
    prompt_features: Gaussian (J, E), its prompts.
    -> weights (J,), with a sum of 1: those of a mixture of the prompts' Gaussians (with `floor` more variance) that is
    fitted to `draws` samples of each picture, in `steps` of expectation and maximisation. The prior prefers
    narrow prompts: a Dirichlet of alpha J counts, shared out as 1 / mean variance.
    The paper's Algorithm 1 (appendix A.8). alpha and floor are those published for a few labelled pictures (alpha is 5
    for nearest ones); how the prior counts, and the numbers of draws and steps, are our reading.
    """
    with torch.no_grad(), full_precision(image_features.mean):
        (mean, log_var), (mu, v) = (Gaussian(*map(upcast, x)) for x in (image_features, prompt_features))
        noise = torch.randn(draws, *mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
        samples = (mean + noise * (log_var / 2).exp()).flatten(0, 1)  # (draws I, E)
        variance = v.exp() + floor  # (J, E)
        # ln N(x; mu, variance) for all samples and prompts, as products of matrices: (x - mu)^2 = x^2 - 2 x mu + mu^2
        square = samples ** 2 @ (1 / variance).T - 2 * samples @ (mu / variance).T + (mu ** 2 / variance).sum(dim=1)
        likelihood = -(square + variance.log().sum(dim=1)) / 2  # (draws I, J)
        prior = 1 / v.exp().mean(dim=1)
        prior = prior / prior.sum()
        weights = prior
        for _ in range(steps):
            responsibility = (likelihood + weights.log()).softmax(dim=1)
            counts = responsibility.sum(dim=0) + alpha * len(mu) * prior
            weights = counts / counts.sum()
        return weights


def mix(features, weights):
    """Gaussian (J, E) and weights (J,) -> Gaussian (1, E): a class made of its prompts (the mean not of length 1)."""
    with full_precision(weights):
        mean, log_var = map(upcast, features)
        return Gaussian((weights @ mean)[None], (weights ** 2 @ log_var.exp()).log()[None])


if __name__ == "__main__":
    import data
    data.command(load)
