"""The language model: a Llama-style decoder that runs on one packed stream of tokens.

There is no batch dimension and no padding: a micro-batch is one stream, all its prompts first, then
all their responses, and every tensor inside is (T, …). Only responses are predicted, and few logits
exist at a time. Parameters are named as in Hugging Face's Llama checkpoints.

Shapes: T rows of the stream, M targets, S segments, C width, H heads, D head size, V vocabulary.
"""

import contextlib
import json
import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
MANY = 2**24  # logits at a time: 64 MiB of float32


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
    sliding_window: int | None = None  # Mistral's; nothing longer is accepted
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    model_type: str = "llama"  # or mistral; qwen2 adds biases to q, k, v, qwen3 norms to q, k

    @staticmethod
    def new(vocab_size: int, width: int, layers: int, heads: int, **rest) -> "ModelConfig":
        """A shape like Llama's: feed-forward of 8/3 of the width, rounded up to 32; tied."""
        feed_forward = -(-8 * width // 3 // 32) * 32
        shape = vocab_size, width, feed_forward, layers, heads, heads, width // heads
        return ModelConfig(*shape, tie_word_embeddings=True, **rest)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) · weight (Zhang and Sennrich, 1910.07467), computed in the precision of x."""

    def forward(self, x):
        inputs = x, self.normalized_shape, self.weight.to(x.dtype), self.eps
        if x.is_cuda or torch.compiler.is_compiling() or x.numel() < 2**20:
            x = F.rms_norm(*inputs)
        else:  # where it is not one kernel keep only x for the backward pass, if it is large
            x = checkpoint(F.rms_norm, *inputs, use_reentrant=False, preserve_rng_state=False)
        if torch.is_autocast_enabled(x.device.type):  # here: each product that follows would copy
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x


def rotary(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, 1, D) each, of the rotary embedding (Su et al., 2104.09864, rotate-half)."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype)
    frequency = config.rope_theta ** (-exponent / config.head_dim)  # (D/2,), radians per token
    if config.rope_scaling:
        from extra.checkpoints import slowed_down

        frequency = slowed_down(frequency, config.rope_scaling)
    angle = (positions[:, None] * frequency).repeat(1, 2)[:, None]  # (T, 1, D), twice D/2
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


def segment_attention(segments: Tensor, device: torch.device) -> Callable:
    """Who sees whom: a row of the stream sees the rows of its prompt, and those of its own segment
    up to itself. Segments, (S, 4) on the CPU, are rows (prompt_start, prompt_size, start, size), in
    order; a prompt is one without a prompt. Returns attend(q, k, v): queries (Q, H, D) of the
    segments, one after the other, keys and values (T, H_kv, D) of the whole stream -> (Q, H, D).
    extra/attention.py has it in far fewer calls."""

    def attend(q, k, v):
        outputs = []
        queries = q.split(segments[:, 3].tolist())
        for own, (prompt_start, prompt_size, start, size) in zip(queries, segments.tolist()):
            rows = [*range(prompt_start, prompt_start + prompt_size), *range(start, start + size)]
            sees = torch.ones(size, len(rows), dtype=torch.bool, device=device)  # (m, n)
            sees = sees.tril(prompt_size)  # all of the prompt, and its own rows up to itself
            qkv = (x.transpose(0, 1)[None] for x in (own, k[rows], v[rows]))  # (1, H, m or n, D)
            out = F.scaled_dot_product_attention(*qkv, sees, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    return attend


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; `attend` decides who sees whom."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        bias = config.model_type == "qwen2"
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        norm = RMSNorm if config.model_type == "qwen3" else nn.Identity  # of each head of q and k
        self.q_norm, self.k_norm = (norm(config.head_dim, config.rms_norm_eps) for _ in range(2))

    def forward(self, x, cos, sin, attend: Callable, last: int):
        """x: (T, C), of which the last `last` rows ask. Returns (last, C)."""
        heads = lambda x: x.unflatten(-1, (-1, self.head_dim))  # (T, H·D) -> (T, H, D)
        k, v = self.k_norm(heads(self.k_proj(x))), heads(self.v_proj(x))
        q = self.q_norm(heads(self.q_proj(x[-last:])))
        q, k = rotate(q, cos[-last:], sin[-last:]), rotate(k, cos, sin)
        if torch.compiler.is_compiling() and isinstance(attend, FunctionType):  # not of the cache
            attend = torch.compiler.disable(attend)
        return self.o_proj(attend(q, k, v).flatten(1))


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
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend: Callable, last: int):
        """x: (T, C), of which the last `last` rows go on. Returns (last, C)."""
        x = x[-last:] + self.self_attn(self.input_layernorm(x), cos, sin, attend, last)
        return x + self.mlp(self.post_attention_layernorm(x))


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(M, C) · (V, C)ᵀ -> (M, V), at least float32: bf16 logits are log-probs' largest error."""
    weight = weight.to(hidden.dtype)
    if hidden.is_cuda and hidden.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # this has no derivative
    logits = hidden @ weight.T
    return logits if logits.dtype == torch.float64 else logits.float()


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log p(target | hidden), (M,): the target's logit less the logsumexp of all logits."""
    with torch.autocast(hidden.device.type, enabled=False):
        if len(hidden) * len(weight) > MANY or hidden.dtype == torch.bfloat16:
            with contextlib.suppress(ImportError):
                from extra.chunked import ChunkedLogps  # the full logits never exist

                return ChunkedLogps.apply(hidden, weight, targets)
        return -F.cross_entropy(head_logits(hidden, weight), targets, reduction="none")


class Transformer(nn.Module):
    """The decoder with its head. One entry point, `forward`, so that FSDP can wrap it whole."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.activation_checkpointing = False  # set from outside

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Transformer":
        """N(0, 1/2C), residual projections smaller by √(2 layers), embeddings N(0, 4/C)."""
        generator, width = torch.Generator().manual_seed(seed), self.config.hidden_size
        for name, parameter in self.named_parameters():
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            share = 2 * len(self.layers) if residual else 0.125 if "embed" in name else 1
            if parameter.dim() == 2:
                parameter.normal_(0, (2 * width * share) ** -0.5, generator=generator)
            else:
                parameter.fill_(0 if name.endswith("bias") else 1)
        return self

    def forward(self, tokens, positions, attention, targets=None, rows=None):
        """Log-probs of the targets, (M,), in nats, which the stream's last M rows predict. tokens,
        positions: (T,). attention: segments (S, 4), prompts first; or, when sampling, what attends
        in each layer. Without targets: logits, (·, V), of the given rows, or of all."""
        x = self.embed_tokens(tokens)  # (T, C)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # also where FSDP gathers bf16
        cos, sin = rotary(positions, self.config, x.dtype)
        last = len(tokens) if targets is None else len(targets)
        attends = attention
        if isinstance(attention, Tensor):
            packed = segment_attention
            with contextlib.suppress(ImportError):
                from extra.attention import fast_attention as packed
            asking = attention[:, 2] >= len(tokens) - last  # the segments of the last rows
            attends = [packed(attention, x.device)] * (len(self.layers) - 1)
            attends.append(packed(attention[asking], x.device))
        recomputed = self.activation_checkpointing and torch.is_grad_enabled()
        for layer, attend in zip(self.layers, attends):
            # Of the last layer only what predicts something is needed.
            inputs = x, cos, sin, attend, last if layer is self.layers[-1] else len(tokens)
            x = checkpoint(layer, *inputs, use_reentrant=False) if recomputed else layer(*inputs)
        weight = (self.lm_head or self.embed_tokens).weight  # (V, C)
        if targets is None:
            return head_logits(self.norm(x if rows is None else x[rows]), weight)
        return token_logps(self.norm(x), weight, targets)


def shard(model: Transformer, device: str, world_size: int, gathered: torch.dtype | None):
    """FSDP2: each rank keeps its rows of every weight, which are gathered, in that precision, where
    a block runs; gradients are summed in float32. (all ranks)"""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device, (world_size,))
    precision = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, model):  # the root, too, frees its weights after a forward
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


def load_config(directory: str | Path) -> ModelConfig:
    """Read `config.json`. Raises CheckpointError naming what is missing or not implemented."""
    path = Path(directory) / "config.json"
    with contextlib.suppress(ImportError):
        from extra.checkpoints import translate  # other programs', and what is wrong with one

        return translate(path)
    given = json.loads(path.read_text(encoding="utf-8"))
    return ModelConfig(**{f.name: given[f.name] for f in fields(ModelConfig) if f.name in given})


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A u64, the header's length; the header, JSON; raw bytes, which are mapped, not read."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    begin = 8 + struct.unpack_from("<Q", mapped)[0]
    weights = {}
    for name, entry in json.loads(mapped[8:begin]).items():
        if name != "__metadata__":
            dtype, offset = DTYPES[entry["dtype"]], begin + entry["data_offsets"][0]
            size = math.prod(entry["shape"])
            flat = torch.frombuffer(mapped, dtype=dtype, count=size, offset=offset)
            weights[name] = flat.view(entry["shape"])
    return weights


def write_safetensors(path: Path, weights: dict[str, Tensor], writes: bool = True):
    """A file in float32, one whole weight after another. (all ranks, one of which writes)"""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, weight in weights.items():
        begin, end = end, end + 4 * weight.numel()
        header[name] = {"dtype": "F32", "shape": [*weight.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with open(path, "wb") if writes else contextlib.nullcontext() as file:
        if writes:
            file.write(struct.pack("<Q", len(text)) + text)
        for weight in weights.values():
            whole = weight.full_tensor() if hasattr(weight, "placements") else weight
            if writes:
                file.write(whole.detach().to("cpu", torch.float32).contiguous().numpy())


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """Weights by their names here, in the precision of the files. Raises CheckpointError."""
    config = load_config(directory)
    read = lambda place: read_safetensors(place / "model.safetensors")
    with contextlib.suppress(ImportError):
        from extra.weights import read_files as read  # several, in torch's format; all are checked
    weights = read(Path(directory))
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # some have the embedding twice
    # Old checkpoints have rotary's frequencies, too.
    weights = {k.removeprefix("model."): w for k, w in weights.items() if "rotary_emb" not in k}
    with torch.device("meta"):
        fill(Transformer(config), weights)  # they fit, before there is memory for a model
    return weights


@torch.no_grad()
def fill(model: Transformer, weights: dict[str, Tensor]) -> Transformer:
    """Copy weights into the model's parameters, or, where those are sharded, this rank's rows.
    Raises CheckpointError naming a weight that is missing, unexpected or misshaped."""
    parameters = dict(model.named_parameters())
    shapes = lambda tensors: {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, _ in shapes(weights).items() ^ shapes(parameters).items():
        found, expected = (shapes(x).get(name, "none") for x in (weights, parameters))
        raise CheckpointError(f"weight {name}: {found} in the files, {expected} by config.json")
    for name, parameter in parameters.items():
        copy_rows(parameter, weights[name])
    return model


@torch.no_grad()
def copy_rows(target: Tensor, whole: Tensor):
    """Copy into a tensor, or, where that is sharded, only this rank's rows."""
    if hasattr(target, "placements"):
        from torch.distributed.tensor import distribute_tensor

        where = target.device_mesh, target.placements
        whole = distribute_tensor(whole, *where, src_data_rank=None)
    target.copy_(whole)


def load_pretrained(directory: str | Path) -> Transformer:
    """A checkpoint in the Llama layout, in float32 on the CPU. Raises CheckpointError."""
    weights = read_weights(directory)
    with torch.device("meta"):  # no time for initial values
        model = Transformer(load_config(directory))
    return fill(model.to_empty(device="cpu"), weights)


def write_whole(path: Path, content: bytes):
    """Beside it, and then in its place: never half of it."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.replace(path)


def save_pretrained(model: Transformer, directory: str | Path, writes: bool = True):
    """Write a checkpoint in the Llama layout, in float32. (all ranks, one of which writes) A kill
    leaves the old one, or one without config.json, which nothing opens, but never a mixture."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    in_file = lambda name: name if name == "lm_head.weight" else f"model.{name}"
    own = {in_file(n): p for n, p in model.named_parameters() if ".lora." not in n}  # it is merged
    new = directory / "saving.tmp"
    write_safetensors(new, own, writes)
    if not writes:
        return
    (directory / "config.json").unlink(missing_ok=True)  # nothing opens without it: written last
    for pattern in ("model*.safetensors*", "pytorch_model*.bin*", "reference-*.npy"):
        for old in directory.glob(pattern):
            old.unlink()
    new.replace(directory / "model.safetensors")
    kind = f"{model.config.model_type.capitalize()}ForCausalLM"
    content = {"architectures": [kind]} | asdict(model.config) | {"hidden_act": "silu"}
    content |= {"dtype": "float32", "torch_dtype": "float32"}
    write_whole(directory / "config.json", (json.dumps(content, indent=2) + "\n").encode())
