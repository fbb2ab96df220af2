"""The language model: a Llama-style decoder that runs on one packed stream of tokens.

There is no batch dimension and no padding: every tensor inside is `(T, …)`, T tokens of several
sequences laid end to end. Who sees whom is said by *segments* (`PackedAttention`), so that the
responses to one prompt share its computation. `forward` never builds the full `(T, V)` logits in
training: it returns the log-probabilities of given targets only (`TokenLogps`).

Modules and parameters are named as in Hugging Face's Llama checkpoints, so loading one is
strip-prefix and `strict=True`, and what is saved here opens there.

    model = load_pretrained("out/reviews")
    ids = generate(model, [[1, 52, 7]], max_new_tokens=20, eos_id=2)

Shapes: T tokens of the stream, C width, H heads, D head size, V vocabulary, N rows that predict,
B sequences (only when sampling).
"""

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    import safetensors.torch as safetensors
except ImportError:  # optional: without it checkpoints are pytorch_model.bin
    safetensors = None
if torch.cuda.is_available():
    from torch.nn.attention.varlen import varlen_attn


class CheckpointError(ValueError):
    """A checkpoint directory that cannot be used; the message is one sentence for the user."""


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
    tie_word_embeddings: bool = False


class RMSNorm(nn.Module):
    """x / rms(x) · weight (Zhang and Sennrich, 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotary(positions: torch.Tensor, config: ModelConfig, dtype: torch.dtype):
    """cos and sin, (T, 1, D) each, of the rotary embedding (Su et al., 2104.09864, rotate-half).

    Computed from the positions in the residual stream's dtype, at least float32: no buffer that
    could be rounded to bf16.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype)
    frequency = config.rope_theta ** (-exponent / config.head_dim)  # (D/2,)
    angle = positions[:, None] * frequency  # (T, D/2)
    angle = torch.cat([angle, angle], dim=-1)[:, None]  # (T, 1, D)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


class PackedAttention:
    """Attention over a stream of trees, `prompt | response₁ | response₂ … | prompt | …`.

    A token sees earlier tokens of its own tree that belong to the prompt or to its own branch.
    Said by segments, one row `(prefix_start, prefix_end, start, end)` each: the queries
    `start:end` attend to the keys `prefix_start:prefix_end` ++ `start:end`, causal from the bottom
    right. The queries of all segments, in order, are the stream. The first response continues its
    prompt in one segment with an empty prefix; every other response has the prompt as its prefix.

    segments: (S, 4) int64 on the CPU. cache: where sampling wants the keys and values kept.
    """

    def __init__(
        self, segments: torch.Tensor, device: torch.device, cache: "KVCache | None" = None
    ):
        prefix_start, prefix_end, start, end = segments.unbind(1)  # (S,) each
        prefix, queries = prefix_end - prefix_start, end - start
        keys = prefix + queries
        # The stream row of every segment's every key, end to end: (sum of keys,)
        segment = torch.repeat_interleave(keys)
        offset = torch.arange(len(segment)) - (keys.cumsum(0) - keys)[segment]
        shift = torch.where(
            offset < prefix[segment], prefix_start[segment], (start - prefix)[segment]
        )
        self.key_rows = (offset + shift).to(device, non_blocking=True)
        self.queries, self.keys, self.device, self.cache = queries, keys, device, cache
        self.masks = self.bounds = None  # made by the first layer, for the others too

    def __call__(self, layer: int, q, k, v):
        """q: (T, H, D); k, v: (T, H_kv, D). Returns (T, H, D)."""
        if self.cache is not None:
            self.cache.store(layer, k, v)
        k, v = k.index_select(0, self.key_rows), v.index_select(0, self.key_rows)
        on_gpu = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
        return (self.flash if on_gpu else self.loop)(q, k, v)

    def loop(self, q, k, v):
        """Anywhere, in any precision: one call per segment."""
        queries, keys = self.queries.tolist(), self.keys.tolist()
        if self.masks is None:  # is_causal would mean causal from the top left
            shapes = [(m, n) if m < n else None for m, n in zip(queries, keys)]
            self.masks = [s and torch.ones(s, dtype=bool).tril(s[1] - s[0]) for s in shapes]
            self.masks = [m if m is None else m.to(self.device) for m in self.masks]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, T, D)
        segments = zip(q.split(queries, 2), k.split(keys, 2), v.split(keys, 2), self.masks)
        out = [
            F.scaled_dot_product_attention(*qkv, mask, is_causal=mask is None, enable_gqa=True)
            for *qkv, mask in segments
        ]
        return torch.cat(out, 2)[0].transpose(0, 1)

    def flash(self, q, k, v):
        """CUDA, bf16 or fp16: one variable-length call for all segments."""
        if self.bounds is None:
            sizes = (self.queries, self.keys)
            starts = [F.pad(n.cumsum(0), (1, 0)).to(self.device, torch.int32) for n in sizes]
            self.bounds = *starts, int(self.queries.max()), int(self.keys.max())
        repeat = q.shape[1] // k.shape[1]  # torch 2.11 has no grouped-query heads here
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return varlen_attn(q, k, v, *self.bounds, window_size=(-1, 0))  # causal, bottom right


class KVCache:
    """Keys and values of B sequences while sampling; a token's slot is its position."""

    def __init__(self, config: ModelConfig, batch: int, size: int):
        self.shape = batch, size, config.num_key_value_heads, config.head_dim
        self.layers = {}
        # Set by generate for the stream that runs next: (T,), (T,), and the slots then in use.
        self.sequences = self.positions = self.used = None

    def store(self, layer: int, k, v):
        if layer not in self.layers:
            self.layers[layer] = k.new_zeros(self.shape), v.new_zeros(self.shape)
        for cached, new in zip(self.layers[layer], (k, v)):
            cached[self.sequences, self.positions] = new  # (T, H_kv, D) into (B, size, H_kv, D)

    def __call__(self, layer: int, q, k, v):
        """Attention of one new token per sequence, (B, H, D), to itself and all stored before."""
        self.store(layer, k, v)
        keys, values = (x[:, : self.used].transpose(1, 2) for x in self.layers[layer])
        slots = torch.arange(self.used, device=q.device)
        mask = (slots <= self.positions[:, None])[:, None, None]  # (B, 1, 1, used)
        attend = F.scaled_dot_product_attention
        return attend(q[:, :, None], keys, values, mask, enable_gqa=True).squeeze(2)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; `attend` decides who sees whom."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width, query_width = config.hidden_size, config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=False)
        self.k_proj = nn.Linear(width, key_width, bias=False)
        self.v_proj = nn.Linear(width, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, width, bias=False)

    def forward(self, x, cos, sin, attend, layer: int):
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))  # (T, C) -> (T, H, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Lengths change from batch to batch: only the products around this are compiled.
        out = torch.compiler.disable(attend)(layer, q, k, v)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer, 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

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

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend, self.layer)
        return x + self.mlp(self.post_attention_layernorm(x))


def head_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(n, C) · (V, C)ᵀ -> (n, V), at least float32: bf16 logits are log-probs' largest error."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    logits = hidden @ weight.T
    return logits if logits.dtype == torch.float64 else logits.float()


class TokenLogps(torch.autograd.Function):
    """log p(target | hidden) = logit of the target − logsumexp of the logits, (N,), float32.

    Done in chunks of rows, and again in the backward pass, so that never more than one chunk of
    logits exists. The gradient of a log-prob with respect to its logits is onehot(target) − p.
    """

    CHUNK = 2**22  # logits at a time: 16 MiB of float32

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        device = hidden.device.type
        ctx.dtypes = hidden.dtype, weight.dtype
        if torch.is_autocast_enabled(device):  # once for all chunks: autocast would do it for each
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        ctx.rows = max(1, TokenLogps.CHUNK // weight.shape[0])
        logps, normalizers = [], []
        for h, t in zip(hidden.split(ctx.rows), targets.split(ctx.rows)):
            logits = head_logits(h, weight)  # (rows, V)
            normalizers.append(logits.logsumexp(-1))
            logps.append(logits.gather(1, t[:, None]).squeeze(1) - normalizers[-1])
        ctx.save_for_backward(hidden, weight, targets, torch.cat(normalizers))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, normalizers = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, grad.dtype))
        inputs = (hidden, targets, normalizers, grad, grad_hidden)
        for h, t, z, g, out in zip(*(x.split(ctx.rows) for x in inputs)):
            p = head_logits(h, weight).sub_(z[:, None]).exp_()  # (rows, V)
            p.mul_(-g[:, None]).scatter_add_(1, t[:, None], g[:, None])  # (onehot − p) · grad
            d = p.to(weight.dtype)
            out.copy_(d @ weight)
            grad_weight += d.T @ h
        return grad_hidden.to(ctx.dtypes[0]), grad_weight.to(ctx.dtypes[1]), None


class Transformer(nn.Module):
    """The decoder with its head. One entry point, `forward`, so that FSDP can wrap it whole."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.activation_checkpointing = False  # set from outside

    def init_weights(self, seed: int) -> "Transformer":
        """GPT-2's initialisation: N(0, 0.02), the residual projections smaller by √(2 layers)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers) if residual else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
        return self

    def forward(self, tokens, positions, segments, rows, targets=None, cache=None):
        """Log-probs of `targets` after `rows` of the stream, or the logits there.

        tokens, positions: (T,) int64. segments: (S, 4) int64 on the CPU, see `PackedAttention`;
        None to continue the sequences of `cache` by one token each. rows: (N,) stream rows that
        predict. targets: (N,) token ids. Returns (N,) log-probs in nats, float32 (float64 if the
        model is), or without targets (N, V) logits.
        """
        device = tokens.device
        attend = cache if segments is None else PackedAttention(segments, device, cache)
        x = self.embed_tokens(tokens)  # (T, C)
        # The residual stream stays in float32 even when FSDP gathers the weights in bf16.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        cos, sin = rotary(positions, self.config, x.dtype)
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend)
        hidden = self.norm(x.index_select(0, rows))  # (N, C)
        weight = (self.lm_head or self.embed_tokens).weight  # (V, C)
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
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token=None,
) -> list[list[int]]:
    """Sample one continuation of every prompt; temperature 0 is greedy.

    prompts: token ids, at least one each, of any lengths. Returns the new ids of each, ending in
    `eos_id` unless cut off at `max_new_tokens`. `on_token` is called with the B ids of every step.
    The prompts run as one packed stream, by the same attention as in training; then every step is
    a stream of one token per sequence. A sequence that has ended runs on unseen until all have.
    """
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and at least one token in each")
    device = model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor([len(prompt) for prompt in prompts])  # (B,)
    ends = lengths.cumsum(0)
    starts = ends - lengths
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)  # (T,)
    cache = KVCache(model.config, len(prompts), int(lengths.max()) + max_new_tokens)
    cache.sequences = torch.repeat_interleave(lengths).to(device)  # (T,)
    cache.positions = torch.arange(len(tokens), device=device) - starts.to(device)[cache.sequences]
    segments = torch.stack([starts, starts, starts, ends], dim=1)
    logits = model(tokens, cache.positions, segments, (ends - 1).to(device), cache=cache)

    cache.sequences = rows = torch.arange(len(prompts), device=device)
    cache.positions = lengths.to(device)
    steps, ended = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    while True:
        tokens = sample_tokens(logits, temperature, top_k, top_p, generator)  # (B,)
        steps.append(tokens)
        if on_token:
            on_token(tokens.tolist())
        ended |= tokens == eos_id
        if len(steps) == max_new_tokens or ended.all():
            break
        cache.used = int(lengths.max()) + len(steps)
        logits = model(tokens, cache.positions, None, rows, cache=cache)
        cache.positions = cache.positions + 1
    new = torch.stack(steps, dim=1).tolist()  # (B, steps)
    return [ids[: ids.index(eos_id) + 1] if eos_id in ids else ids for ids in new]


# What a Llama config.json may say beyond the shape; anything else is another model.
IMPLEMENTED = {
    "model_type": ("llama", "mistral"),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "quantization_config": (None,),
}


def load_config(directory: str | Path) -> ModelConfig:
    """Read `config.json`. Raises CheckpointError naming what is missing or not implemented."""
    path = Path(directory) / "config.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{path}: not found; a checkpoint directory has one") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    rope = given.get("rope_parameters") or {}  # where transformers 5 puts both
    given.setdefault("rope_theta", rope.get("rope_theta", ModelConfig.rope_theta))
    if rope.get("rope_type", "default") != "default":
        given["rope_scaling"] = rope["rope_type"]
    for key, allowed in IMPLEMENTED.items():
        if given.get(key) not in allowed:
            raise CheckpointError(f"{path}: {key} {given.get(key)!r} is not implemented here")
    shape = {f.name: given[f.name] for f in fields(ModelConfig) if given.get(f.name) is not None}
    shape.setdefault("num_key_value_heads", shape.get("num_attention_heads"))
    shape.setdefault("head_dim", given.get("hidden_size", 0) // given.get("num_attention_heads", 1))
    for field in fields(ModelConfig):
        if field.default is MISSING and not shape.get(field.name):
            raise CheckpointError(f"{path}: {field.name} is missing")
    return ModelConfig(**shape)


def load_pretrained(directory: str | Path) -> Transformer:
    """Read a checkpoint directory in the Llama layout; weights become float32, on the CPU.

    Raises CheckpointError when a file is missing, or the weights are not those of config.json.
    """
    directory = Path(directory)
    model = Transformer(load_config(directory))
    files = sorted(directory.glob("model*.safetensors")) or sorted(
        directory.glob("pytorch_model*.bin")
    )
    if not files:
        raise CheckpointError(f"{directory}: no model*.safetensors or pytorch_model*.bin in it")
    weights = {}
    for file in files:
        if file.suffix == ".safetensors" and safetensors is None:
            raise CheckpointError(f"{file}: reading it needs `pip install safetensors`")
        try:
            if file.suffix == ".safetensors":
                weights |= safetensors.load_file(file)
            else:
                weights |= torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # each format has its own exceptions
            raise CheckpointError(f"{file}: cannot be read ({error})") from None
    weights = {k.removeprefix("model."): w for k, w in weights.items() if "rotary_emb" not in k}
    if model.lm_head is None:
        weights.pop("lm_head.weight", None)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory}: weights do not fit config.json: {reason}") from None
    return model


def save_pretrained(model: Transformer, directory: str | Path, state_dict: dict | None = None):
    """Write config.json and the weights (`state_dict`, or the model's own) in the Llama layout."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    config = kind | asdict(model.config) | {"torch_dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {
        (name if name.startswith("lm_head") else f"model.{name}"): tensor.contiguous()
        for name, tensor in (state_dict or model.state_dict()).items()
    }
    if safetensors is not None:
        safetensors.save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(weights, directory / "pytorch_model.bin")
