"""The language model: a Llama-style decoder that runs on one packed stream of tokens.

There is no batch dimension and no padding: every tensor inside is `(T, …)`, T tokens of several
sequences laid end to end. Who sees whom is said by *segments* (`PackedAttention`), so that the
responses to one prompt share its computation. `forward` never builds the full `(T, V)` logits in
training: it returns the log-probabilities of given targets only (`TokenLogps`). Modules and
parameters are named as in Hugging Face's Llama checkpoints: what is distributed opens here, and
what is saved here opens there.

    model = load_pretrained("out/reviews")
    ids = generate(model, [[1, 52, 7]], max_new_tokens=20, eos_id=2)

Shapes: T tokens of the stream, C width, H heads, D head size, V vocabulary, N rows that predict,
B sequences (only when sampling).
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

try:
    import safetensors.torch
except ImportError:  # optional: without it checkpoints are pytorch_model.bin
    safetensors = None


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, or not like this; one sentence for the user."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder; the field names are those of a Llama `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's kind only
    tie_word_embeddings: bool = False
    sliding_window: int | None = None  # Mistral's; the attention here is always full
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None

    def check_length(self, length: int):
        """Raise CheckpointError if `length` tokens do not fit into the sliding window."""
        if self.sliding_window and length > self.sliding_window:
            beyond = f"{length} tokens are more than the sliding window of {self.sliding_window}"
            raise CheckpointError(f"{beyond}, and attention with a window is not implemented here")


def matmul_dtype(weight: torch.Tensor) -> torch.dtype:
    """The precision of matrix products with this weight."""
    device = weight.device.type
    enabled = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else weight.dtype


class Normalize(torch.autograd.Function):
    """F.rms_norm, bit by bit; on the CPU twice as fast in training, as it keeps x and 1 / rms(x)
    alone for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, eps: float):
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()  # (T, 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        grad_weight = (grad * unit).sum(0)
        grad = grad * weight
        along = (grad * unit).mean(-1, keepdim=True)  # the norm does not see x grow
        return grad.sub_(unit.mul_(along)).mul_(scale), grad_weight, None


class RMSNorm(nn.RMSNorm):
    """x / rms(x) · weight (Zhang and Sennrich, 1910.07467), computed in the precision of x.

    Returned in that of the products that follow, once for all of them: autocast would make a copy
    for each.
    """

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        if x.requires_grad and not x.is_cuda:
            x = Normalize.apply(x, weight, self.eps)
        else:
            x = F.rms_norm(x, self.normalized_shape, weight, self.eps)
        return x.to(matmul_dtype(self.weight))


def rotary(positions: torch.Tensor, config: ModelConfig, dtype: torch.dtype):
    """cos and sin, (T, 1, D) each, of the rotary embedding (Su et al., 2104.09864, rotate-half).

    Computed from the positions in the residual stream's dtype, at least float32: no buffer that
    could be rounded to bf16.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype)
    frequency = config.rope_theta ** (-exponent / config.head_dim)  # (D/2,), radians per token
    if scaling := config.rope_scaling:  # Llama 3: slow dimensions are slowed down by `factor`
        turns = frequency / (2 * math.pi) * scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1 where there were many turns
        frequency = frequency * (kept + (1 - kept) / scaling["factor"])
    angle = positions[:, None] * frequency  # (T, D/2)
    angle = torch.cat([angle, angle], dim=-1)[:, None]  # (T, 1, D)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


def ragged(starts: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The ranges starts[i] : starts[i] + sizes[i], end to end."""
    shift = torch.repeat_interleave(starts - (sizes.cumsum(0) - sizes), sizes)
    return torch.arange(len(shift)) + shift


class PackedAttention:
    """Attention over a stream of trees, `prompt | response₁ | response₂ … | prompt | …`.

    A token sees earlier tokens of its own tree that belong to the prompt or to its own branch.
    Said by segments, rows `(prompt_start, prompt_end, start, end)`: the keys of each are the rows
    `prompt_start:prompt_end` ++ `start:end` of the stream, its queries the last of these, causal
    from the bottom right. On CUDA all segments are one variable-length flash call; elsewhere those
    of like lengths are padded to the longest of them and called together.

    segments: (S, 4), queries: (S,), how many each has; int64 on the CPU. cache: where sampling
    wants the keys and values kept.
    """

    def __init__(self, segments, queries, device: torch.device, flash: bool, cache=None):
        sizes = segments[:, [1, 3]] - segments[:, [0, 2]]  # (S, 2)
        self.queries, self.keys, self.cache = queries, sizes.sum(1), cache
        self.first_key = self.keys.cumsum(0) - self.keys
        key_rows = ragged(segments[:, [0, 2]].flatten(), sizes.flatten())  # (sum of keys,)
        rows = key_rows[ragged(self.first_key + self.keys - queries, queries)]
        if flash:
            bounds = [F.pad(n.cumsum(0), (1, 0)).int() for n in (queries, self.keys)]  # (S + 1,)
            self.longest = queries.max().item(), self.keys.max().item()
            self.attend, indices = self.flash, [rows, key_rows, *bounds]
        else:
            self.attend, indices = self.padded, [rows, *self.pad(key_rows, device)]
        if device.type == "cuda":  # from pinned memory, so that the host need not wait
            indices = [x.pin_memory().to(device, non_blocking=True) for x in indices]
        self.rows, self.key_rows, *self.others = indices  # the stream rows of all queries; of keys

    def __call__(self, layer: int, q, k, v):
        """q: (queries, H, D); k, v: (T, H_kv, D). Returns (queries, H, D)."""
        if self.cache is not None:
            self.cache.store(layer, k, v)
        k, v = k.index_select(0, self.key_rows), v.index_select(0, self.key_rows)
        return self.attend(q, k, v, *self.others)

    def flash(self, q, k, v, *bounds):
        """CUDA, bf16 or fp16: all segments, end to end, in one call."""
        from torch.nn.attention.varlen import varlen_attn

        repeat = q.shape[1] // k.shape[1]  # torch 2.11 has no grouped-query heads here
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return varlen_attn(q, k, v, *bounds, *self.longest, window_size=(-1, 0))

    def pad(self, key_rows, device) -> tuple:
        """Groups of like segments: the stream rows of their padded keys, which queries the padded
        ones are, and where among those each query is."""
        alike = lambda n: round(4 * math.log(n + 48))  # within a quarter, or a dozen tokens
        sizes = zip(self.keys.tolist(), self.queries.tolist())
        kinds = [(n > m, alike(n), alike(m)) for n, m in sizes]
        order = sorted(range(len(kinds)), key=kinds.__getitem__)
        first_query = self.queries.cumsum(0) - self.queries
        self.groups, keys, queries, total = [], [], [], 0
        place = torch.empty_like(self.queries)  # of each segment's first query among the padded
        for (prefixed, *_), group in groupby(order, kinds.__getitem__):
            at = torch.tensor(list(group))[:, None]
            m, n = self.queries[at], self.keys[at]  # (s, 1)
            query, key = torch.arange(m.max()), torch.arange(n.max())
            queries.append((first_query[at] + query.minimum(m - 1)).flatten())
            keys.append(key_rows[self.first_key[at] + key.minimum(n - 1)].flatten())
            mask = None  # is_causal says it: no query sees padded keys, and nobody reads its own
            if prefixed:  # causal from the bottom right of each, (s, 1, m, n)
                mask = (key <= query[:, None] + (n - m)[..., None])[:, None].to(device)
            self.groups.append((len(at), len(query), len(key), mask))
            place[at.squeeze(1)] = total + torch.arange(len(at)) * len(query)
            total += len(at) * len(query)
        return torch.cat(keys), torch.cat(queries), ragged(place, self.queries)

    def padded(self, q, k, v, queries, place):
        """Anywhere, in any precision: one call for each group of segments of like lengths."""
        q, out = q.index_select(0, queries), []
        splits = [[g[0] * g[i] for g in self.groups] for i in (1, 2, 2)]
        groups = zip(self.groups, *(x.split(split) for x, split in zip((q, k, v), splits)))
        for (count, _, n, mask), *qkv in groups:
            qkv = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in qkv)  # (s, H, m or n, D)
            # On short ones the plain kernel is twice as fast as the one that keeps no (m, n).
            with sdpa_kernel(SDPBackend.MATH) if n <= 64 else nullcontext():
                options = {"is_causal": mask is None, "enable_gqa": True}
                x = F.scaled_dot_product_attention(*qkv, mask, **options)
            out.append(x.transpose(1, 2).flatten(0, 1))
        return torch.cat(out).index_select(0, place)


def attentions(branches: torch.Tensor, device, dtype, cache=None) -> tuple:
    """The attention of all layers but the last, and that of the last, of trees of branches.

    A branch is `(prompt_start, prompt_end, start, end)`: where in the stream its prompt is, and its
    own tokens. The first of a tree continues its prompt in one segment; the others have it as a
    prefix. In the last layer only what predicts something asks: of each branch the prompt's last
    token, then its own.
    """
    prompt_start, _, start, end = branches.unbind(1)
    first = prompt_start.diff(prepend=prompt_start.new_tensor([-1])) != 0
    queries = end - torch.where(first, prompt_start, start)
    some = queries > 0  # a response of one token, not the first, brings nothing into the stream
    flash = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    body = PackedAttention(branches[some], queries[some], device, flash, cache)
    return body, PackedAttention(branches, 1 + end - start, device, flash, cache)


class KVCache:
    """Keys and values of B sequences while sampling; a token's slot is its position."""

    def __init__(self, config: ModelConfig, batch: int, size: int):
        self.shape = batch, size, config.num_key_value_heads, config.head_dim
        self.layers = {}
        # Set by generate for the stream that runs next: (T,), (T,), and, once it is one token of
        # each, which of the slots in use it sees, (B, 1, 1, used).
        self.sequences = self.positions = self.mask = None
        self.rows = None  # every token goes on

    def store(self, layer: int, k, v):
        if layer not in self.layers:
            self.layers[layer] = k.new_zeros(self.shape), v.new_zeros(self.shape)
        for cached, new in zip(self.layers[layer], (k, v)):
            cached[self.sequences, self.positions] = new  # (T, H_kv, D) into (B, size, H_kv, D)

    def __call__(self, layer: int, q, k, v):
        """Attention of one new token per sequence, (B, H, D), to itself and all stored before."""
        self.store(layer, k, v)
        used = self.mask.shape[-1]
        qkv = q[:, :, None], *(x[:, :used].transpose(1, 2) for x in self.layers[layer])
        return F.scaled_dot_product_attention(*qkv, self.mask, enable_gqa=True).squeeze(2)


class Unfilled:
    def reset_parameters(self):
        """Nothing: `random_weights` or a checkpoint fills all parameters."""


class Embedding(Unfilled, nn.Embedding):
    pass


class Linear(Unfilled, nn.Linear):
    pass


class Projection(Linear):
    """x·Wᵀ, and with adapters x·(W + 2·B·A)ᵀ (LoRA, Hu et al., 2106.09685, alpha = 2·rank).

    `lora` holds A (rank, inputs) and B (outputs, rank); B starts at zero, so that nothing changes.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.lora = None

    def add_lora(self, rank: int):
        like = {"bias": False, "device": self.weight.device, "dtype": self.weight.dtype}
        # A is drawn at once: what B of zero multiplies must be a number.
        a, b = nn.Linear(self.in_features, rank, **like), Linear(rank, self.out_features, **like)
        nn.init.zeros_(b.weight)
        self.lora = nn.Sequential(a, b)

    def forward(self, x):
        out = super().forward(x)
        return out if self.lora is None else out + 2 * self.lora(x)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; `attend` decides who sees whom."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = Projection(config.hidden_size, queries)
        self.k_proj = Projection(config.hidden_size, keys)
        self.v_proj = Projection(config.hidden_size, keys)
        self.o_proj = Projection(queries, config.hidden_size)

    def forward(self, x, cos, sin, attend, layer: int, rows):
        heads = lambda x: x.unflatten(-1, (-1, self.head_dim))  # (T, C) -> (T, H, D)
        k, v = rotate(heads(self.k_proj(x)), cos, sin), heads(self.v_proj(x))
        if rows is not None:
            x, cos, sin = (y.index_select(0, rows) for y in (x, cos, sin))
        q = rotate(heads(self.q_proj(x)), cos, sin)
        # Lengths change from batch to batch: only what is around packed attention is compiled.
        if torch.compiler.is_compiling() and isinstance(attend, PackedAttention):
            attend = torch.compiler.disable(attend)
        out = attend(layer, q, k, v)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer, 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Projection(config.hidden_size, config.intermediate_size)
        self.up_proj = Projection(config.hidden_size, config.intermediate_size)
        self.down_proj = Projection(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend, rows=None):
        """x: (T, C). rows: those of them to go on with, (N,), None: all. Returns (N, C)."""
        attended = self.self_attn(self.input_layernorm(x), cos, sin, attend, self.layer, rows)
        x = (x if rows is None else x.index_select(0, rows)) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


def head_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(n, C) · (V, C)ᵀ -> (n, V), at least float32: bf16 logits are log-probs' largest error."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    logits = hidden @ weight.T
    return logits if logits.dtype == torch.float64 else logits.float()


class TokenLogps(torch.autograd.Function):
    """log p(target | hidden) = logit of the target − logsumexp of the logits, (N,), float32.

    Done in chunks of the vocabulary, and again in the backward pass, all but the last, so that
    never more than one chunk of logits exists. The gradient of a log-prob with respect to its
    logits is onehot(target) − p.
    """

    CHUNK = 2**24  # logits at a time: 64 MiB of float32

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        dtype = matmul_dtype(weight)
        hidden, target, normalizers, ctx.exps = hidden.to(dtype), 0.0, [], None
        ctx.chunks = max(1, -(-len(hidden) * len(weight) // TokenLogps.CHUNK))
        for w, within, inside in TokenLogps.parts(weight, targets, ctx.chunks):
            ctx.exps = None  # before the next are made
            ctx.exps = head_logits(hidden, w.to(dtype))  # (N, words)
            target = torch.where(inside, ctx.exps.gather(1, within), target)  # (N, 1)
            largest = ctx.exps.amax(1, keepdim=True)
            total = ctx.exps.sub_(largest).exp_().sum(1, keepdim=True)
            normalizers.append(largest + total.log())
        normalizer = torch.cat(normalizers, 1).logsumexp(1, keepdim=True)
        ctx.scale = (largest - normalizer).exp()  # by it the last chunk's exps are probabilities
        ctx.save_for_backward(hidden, weight, targets, normalizer)
        return (target - normalizer).squeeze(1)

    @staticmethod
    def parts(weight, targets, chunks: int) -> list[tuple]:
        """Of each chunk the rows of the weight, (words, C), and of each target, (N, 1), where in
        the chunk it is, and whether it is there."""
        parts, first = [], 0
        for w in weight.chunk(chunks):
            within = targets[:, None] - first
            parts.append((w, within.clamp(0, len(w) - 1), (within >= 0) & (within < len(w))))
            first += len(w)
        return parts

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, normalizer = ctx.saved_tensors
        g, exps, ctx.exps = grad[:, None], ctx.exps, None
        grad_hidden, grad_weight = torch.zeros_like(hidden, dtype=grad.dtype), None
        parts, rows = TokenLogps.parts(weight, targets, ctx.chunks), [None] * ctx.chunks
        if ctx.needs_input_grad[1]:  # frozen weights need none
            grad_weight = torch.empty_like(weight, dtype=grad.dtype)
            rows = grad_weight.chunk(ctx.chunks)
        for (w, within, inside), grad_w in reversed([*zip(parts, rows)]):
            w = w.to(hidden.dtype)
            if exps is None:
                p = head_logits(hidden, w).sub_(normalizer).exp_()  # (N, words)
            else:
                p, exps = exps.mul_(ctx.scale), None
            d = p.mul_(-g).scatter_add_(1, within, g * inside)  # (onehot − p) · grad
            d, p = d.to(hidden.dtype), None
            grad_hidden += d @ w
            if grad_w is not None:
                same = grad_w.dtype == d.dtype
                torch.mm(d.T, hidden, out=grad_w) if same else grad_w.copy_(d.T @ hidden)
        return grad_hidden, grad_weight, None  # autograd casts to the dtypes of the inputs


class Transformer(nn.Module):
    """The decoder with its head. One entry point, `forward`, so that FSDP can wrap it whole."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.activation_checkpointing = False  # set from outside

    def init_weights(self, seed: int) -> "Transformer":
        """Fill all parameters from `random_weights`."""
        return fill(self, random_weights(self, seed))

    def add_lora(self, rank: int) -> "Transformer":
        """Freeze the model and give every projection adapters, which alone are trained."""
        self.requires_grad_(False)
        for module in [m for m in self.modules() if isinstance(m, Projection)]:
            module.add_lora(rank)
        return self

    def flops(self, tokens: float, predicted: float, attended: float) -> float:
        """Floating-point operations of a forward pass over so many tokens of a stream, of which
        so many predict, with so many pairs of a token and one that it sees.

        Two for each token and weight of a matrix that it meets, the last block and the head at the
        rows that predict, and four for each pair, layer and width of the heads.
        """
        c, width = self.config, self.config.num_attention_heads * self.config.head_dim
        keys = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim
        block = 2 * c.hidden_size * width + keys + 3 * c.hidden_size * c.intermediate_size
        every = (c.num_hidden_layers - 1) * block + keys
        some = block - keys + c.vocab_size * c.hidden_size
        dense = 2 * (every * tokens + some * predicted)
        return dense + 4 * c.num_hidden_layers * width * attended

    @torch.no_grad()
    def merge_lora(self):
        """Add the adapters to the weights, W + 2·B·A, and set B to zero. (all ranks)"""
        for module in self.modules():
            if isinstance(module, Projection) and module.lora is not None:
                a, b = (factor.weight for factor in module.lora)
                module.weight.add_(b @ a, alpha=2)
                b.zero_()

    def forward(self, tokens, positions, branches, rows, targets=None, cache=None):
        """Log-probs of `targets`, or the logits, where the branches predict.

        tokens, positions: (T,) int64. branches: (B, 4) int64 on the CPU, see `attentions`; None to
        continue the sequences of `cache` by one token each. rows: (N,) what of the branches
        predicts, counted over all of them, of each the prompt's last token and its own. targets:
        (N,) token ids. Returns (N,) log-probs in nats, float32 (float64 if the model is), or
        without targets (N, V) logits.
        """
        x = self.embed_tokens(tokens)  # (T, C)
        weight = (self.lm_head or self.embed_tokens).weight  # (V, C)
        body = last = cache
        if branches is not None:
            body, last = attentions(branches, x.device, matmul_dtype(weight), cache)
        # The residual stream stays in float32 even when FSDP gathers the weights in bf16.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        cos, sin = rotary(positions, self.config, x.dtype)
        for layer in self.layers:
            ends = layer is self.layers[-1]
            inputs = x, cos, sin, *((last, last.rows) if ends else (body,))
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        hidden = self.norm(x.index_select(0, rows))  # (N, C)
        if targets is None:
            return head_logits(hidden.to(weight.dtype), weight)
        return TokenLogps.apply(hidden, weight, targets)


def sample_tokens(logits, temperature: float, top_k: int, top_p: float, generator):
    """One token id of each row of (B, V) logits: temperature, then top-k, then top-p (nucleus)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # those before it suffice
        probabilities = torch.zeros_like(probabilities).scatter(1, index, ordered)
    # Where a uniform number falls among the summed probabilities: far faster than multinomial.
    sums = probabilities.cumsum(-1)
    drawn = torch.rand(len(sums), 1, device=sums.device, generator=generator).clamp(max=1 - 1e-6)
    return torch.searchsorted(sums, drawn * sums[:, -1:], right=True).squeeze(1)


def read_prompts(model: Transformer, prompts: list[list[int]], cache: KVCache) -> torch.Tensor:
    """Fill the cache with the prompts, run as one packed stream; the logits after each, (B, V)."""
    device = model.embed_tokens.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])  # (B,)
    ends = lengths.cumsum(0)
    starts = ends - lengths
    branches = torch.stack([starts, ends, ends, ends], dim=1)  # the prompts alone
    cache.sequences = torch.repeat_interleave(lengths).to(device)  # (T,)
    cache.positions = ragged(torch.zeros_like(lengths), lengths).to(device)
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    rows = torch.arange(len(prompts), device=device)
    return model(tokens, cache.positions, branches, rows, cache=cache)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_id: int | Collection[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token=None,
    compile: bool = False,
) -> list[list[int]]:
    """Sample one continuation of every prompt; temperature 0 is greedy.

    prompts: token ids, at least one each, of any lengths. eos_id: one id or several. Returns the
    new ids of each, ending in an `eos_id` unless cut off at `max_new_tokens`. `on_token` is called
    with the B ids of every step. Raises CheckpointError if it could outgrow a sliding window.
    The prompts run as one packed stream, by the same attention as in training; then every step is
    a stream of one token per sequence. A sequence that has ended runs on unseen until all have.
    compile: that step by torch.compile, in one graph, which takes some ten seconds at first.
    """
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and at least one token in each")
    device, longest = model.embed_tokens.weight.device, max(map(len, prompts))
    model.config.check_length(longest + max_new_tokens)
    generator = torch.Generator(device).manual_seed(seed)
    stops = torch.tensor([eos_id] if isinstance(eos_id, int) else list(eos_id), device=device)
    cache = KVCache(model.config, len(prompts), longest + max_new_tokens)
    logits = read_prompts(model, prompts, cache)
    step = torch.compile(model.forward) if compile else model
    rows = torch.arange(len(prompts), device=device)
    cache.sequences = rows
    cache.positions = torch.tensor([len(prompt) for prompt in prompts], device=device)
    steps, ended = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    while True:
        tokens = sample_tokens(logits, temperature, top_k, top_p, generator)  # (B,)
        steps.append(tokens)
        if on_token:
            on_token(tokens.tolist())
        ended |= torch.isin(tokens, stops)
        if len(steps) == max_new_tokens or ended.all():
            break
        used = cache.shape[1] if compile else longest + len(steps)  # compiled: of one shape
        slots = torch.arange(used, device=device)
        cache.mask = (slots <= cache.positions[:, None])[:, None, None]
        logits = step(tokens, cache.positions, None, rows, cache=cache)
        cache.positions = cache.positions + 1
    new = torch.stack(steps, dim=1)  # (B, steps)
    before_stop = (torch.isin(new, stops).cumsum(1) == 0).sum(1).tolist()
    return [ids[: n + 1] for ids, n in zip(new.tolist(), before_stop)]


# What a config.json may say beyond `ModelConfig`; anything else is another model.
IMPLEMENTED = {
    "model_type": ("llama", "mistral"),
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rope_type": ("default", "llama3", None),
    "layer_types": (None,),
    "quantization_config": (None,),
}
FORMATS = "model.safetensors", "pytorch_model.bin"
WEIGHT_FILE = r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
SHARD_BYTES = 2 * 10**9  # at most in a file, and so in memory while saving


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{path}: not found; a checkpoint directory has one") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def load_config(directory: str | Path) -> ModelConfig:
    """Read `config.json`. Raises CheckpointError naming what is missing or not implemented."""
    path = Path(directory) / "config.json"
    given = read_json(path)
    # Transformers 5 puts into rope_parameters what was in rope_scaling and beside it.
    ropes = [given.pop(key, None) or {} for key in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(rope, dict) for rope in ropes):
        raise CheckpointError(f"{path}: rope_scaling and rope_parameters must be objects")
    rope = ropes[0] | ropes[1]
    given |= {"rope_type": rope.get("type")} | rope
    for key, allowed in IMPLEMENTED.items():
        if given.get(key) not in allowed:
            raise CheckpointError(f"{path}: {key} {given.get(key)!r} is not implemented here")
    if given["rope_type"] == "llama3":
        keys = "rope_type factor low_freq_factor high_freq_factor original_max_position_embeddings"
        given["rope_scaling"] = {key: given.get(key) for key in keys.split()}
    if given["model_type"] == "mistral":
        given.setdefault("sliding_window", 4096)  # as in transformers; none is null
    shape = {f.name: given[f.name] for f in fields(ModelConfig) if given.get(f.name) is not None}
    required = [field.name for field in fields(ModelConfig) if field.default is MISSING]
    whole = {*required, "max_position_embeddings", "sliding_window"}
    for name in shape.keys() & whole:
        if type(shape[name]) is not int or shape[name] < 1:
            raise CheckpointError(f"{path}: {name} {shape[name]!r} is not a positive whole number")
    shape.setdefault("num_key_value_heads", shape.get("num_attention_heads"))
    shape.setdefault("head_dim", shape.get("hidden_size", 0) // shape.get("num_attention_heads", 1))
    scaling = shape.get("rope_scaling", {})
    if missing := [key for key in (*required, *scaling) if not (shape | scaling).get(key)]:
        raise CheckpointError(f"{path}: {missing[0]} is missing")
    if shape["num_attention_heads"] % shape["num_key_value_heads"] or shape["head_dim"] % 2:
        raise CheckpointError(f"{path}: heads must divide by key-value heads, head_dim by two")
    return ModelConfig(**shape)


def weight_files(directory: Path) -> list[Path]:
    """The files with weights: safetensors before .bin, those of an index before the only one."""
    for name in FORMATS:
        index = directory / f"{name}.index.json"
        if index.is_file() and (where := read_json(index).get("weight_map")):
            return [directory / file for file in sorted(set(where.values()))]
        if (directory / name).is_file():
            return [directory / name]
    raise CheckpointError(f"{directory}: no {' or '.join(FORMATS)} in it")


def read_weights(directory: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameter names and values of a checkpoint directory, in the precision of the files.

    The files are mapped into memory: what is not used of a tensor is not read. Raises
    CheckpointError naming a file that is missing or cannot be read.
    """
    directory = Path(directory)
    tied = load_config(directory).tie_word_embeddings
    for file in weight_files(directory):
        if file.suffix == ".safetensors" and safetensors is None:
            raise CheckpointError(f"{file}: reading it needs `pip install safetensors`")
        try:
            if file.suffix == ".safetensors":
                weights = safetensors.torch.load_file(file)
            else:
                weights = dict(torch.load(file, "cpu", weights_only=True, mmap=True))
            if not weights:
                raise ValueError("no weights in it")
        except Exception as error:  # each format has its own exceptions
            raise CheckpointError(f"{file}: cannot be read ({error})") from None
        for name, tensor in weights.items():
            name = name.removeprefix("model.")
            # Old checkpoints have rotary's frequencies, some tied ones the embedding twice.
            if "rotary_emb" not in name and not (tied and name == "lm_head.weight"):
                yield name, tensor


def random_weights(model: Transformer, seed: int, only_adapters: bool = False) -> Iterator[tuple]:
    """Names and initial values of all parameters, each one whole, in float32 on the CPU.

    GPT-2's: N(0, 0.02²), the residual projections smaller by √(2 layers), norms one. Adapters have
    a generator of their own: A is N(0, 1/inputs), B zero.
    """
    base, adapters = (torch.Generator().manual_seed(seed) for _ in range(2))
    for name, parameter in model.named_parameters():
        if only_adapters and ".lora." not in name:
            continue
        value = torch.ones(parameter.shape)
        if ".lora.0." in name:
            value.normal_(0, parameter.shape[1] ** -0.5, generator=adapters)
        elif ".lora.1." in name:
            value.zero_()
        elif value.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            depth = 2 * model.config.num_hidden_layers if residual else 1
            value.normal_(0, 0.02 / math.sqrt(depth), generator=base)
        yield name, value


@torch.no_grad()
def fill(model: Transformer, weights: Iterable[tuple], place: Callable = torch.Tensor.copy_):
    """Copy weights, names and tensors, into the parameters, each by `place(parameter, weight)`.

    Raises CheckpointError naming a weight that is unexpected, misshaped or missing. The adapters
    and all the others are two sets: one of which nothing is given stays as it is.
    """
    parameters, filled = dict(model.named_parameters()), set()
    for name, weight in weights:
        if name not in parameters:
            raise CheckpointError(f"the model that config.json describes has no weight {name}")
        given, expected = tuple(weight.shape), tuple(parameters[name].shape)
        if given != expected:
            raise CheckpointError(f"weight {name} has shape {given}, by config.json {expected}")
        place(parameters[name], weight)
        filled.add(name)
    begun = {".lora." in name for name in filled}
    missing = [n for n in parameters if n not in filled and (".lora." in n) in begun]
    if missing:
        raise CheckpointError(f"weight {missing[0]} is missing ({len(missing)} in all)")
    return model


def load_pretrained(directory: str | Path) -> Transformer:
    """Read a checkpoint directory in the Llama layout; weights become float32, on the CPU.

    Raises CheckpointError when a file is missing, or the weights are not those of config.json.
    """
    with torch.device("meta"):  # no time for initial values
        model = Transformer(load_config(directory))
    model.to_empty(device="cpu")
    return fill(model, read_weights(directory))


def plan_files(model: Transformer) -> dict[str, dict[str, nn.Parameter]]:
    """File name -> Llama name -> parameter, without adapters; at most SHARD_BYTES in a file."""
    shards, size = [], math.inf
    for name, parameter in model.named_parameters():
        if ".lora." not in name:
            size += 4 * parameter.numel()
            if size > SHARD_BYTES:
                shards.append({})
                size = 4 * parameter.numel()
            shards[-1][name if name == "lm_head.weight" else f"model.{name}"] = parameter
    file = FORMATS[safetensors is None]
    part = "-{:05d}-of-{:05d}." if len(shards) > 1 else "."
    return {file.replace(".", part.format(n, len(shards))): s for n, s in enumerate(shards, 1)}


def describe(model: Transformer, files: dict, source: str | Path | None) -> dict[str, dict]:
    """The JSON files beside the weights, by name; what else those of `source` say is kept."""
    paths = [Path(source or "", name) for name in ("config.json", "generation_config.json")]
    given, generation = (read_json(path) if source and path.is_file() else {} for path in paths)
    given.pop("rope_parameters", None)  # rope_theta and rope_scaling are read everywhere
    kind = "Mistral" if model.config.sliding_window else "Llama"
    config = {"architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower()}
    config |= {"hidden_act": "silu"} | given
    config |= {key: value for key, value in asdict(model.config).items() if value is not None}
    config |= {"dtype": "float32", "torch_dtype": "float32"}  # its new name and its old
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    texts = {"config.json": config, "generation_config.json": generation or ids}
    if len(files) > 1:
        where = {name: file for file, shard in files.items() for name in shard}
        size = sum(4 * weight.numel() for shard in files.values() for weight in shard.values())
        index = f"{FORMATS[safetensors is None]}.index.json"
        texts[index] = {"metadata": {"total_size": size}, "weight_map": where}
    return {file: content for file, content in texts.items() if content}


@torch.no_grad()
def save_pretrained(
    model: Transformer,
    directory: str | Path,
    source: str | Path | None = None,
    gather: Callable = lambda parameter: parameter,
    write: bool = True,
):
    """Write a checkpoint directory in the Llama layout, in float32, file by file. (all ranks)

    source: the checkpoint directory the model comes from; whatever else its config says is kept.
    gather: makes a sharded parameter whole; all ranks take part, the one with `write` writes.
    Adapters are not written: `merge_lora` first. A kill leaves the old checkpoint, or one without
    config.json, which nothing opens, but never a mixture of two.
    """
    directory, new = Path(directory), Path(directory, ".saving")
    if write:
        shutil.rmtree(new, ignore_errors=True)  # of a save that was killed
        new.mkdir(parents=True)
    files = plan_files(model)
    for file, shard in files.items():
        weights = {}
        for name, parameter in shard.items():
            weight = gather(parameter)  # (all ranks)
            if write:
                weights[name] = weight.detach().to("cpu", torch.float32).contiguous()
        if write and safetensors:
            safetensors.torch.save_file(weights, new / file, metadata={"format": "pt"})
        elif write:
            torch.save(weights, new / file)
    if not write:
        return
    for file, content in describe(model, files, source).items():
        (new / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (directory / "config.json").unlink(missing_ok=True)  # nothing opens without it
    for old in sorted(directory.iterdir()):
        if re.fullmatch(WEIGHT_FILE, old.name):
            old.unlink()
    for file in sorted(new.iterdir(), key=lambda file: file.name == "config.json"):  # it last
        file.replace(directory / file.name)
    new.rmdir()
