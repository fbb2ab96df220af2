"""Sampling with a cache: the keys and values of what was read are kept.

Shapes: B sequences, of which R still run, t new tokens of each, else as in model.py.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from model import CheckpointError, Transformer


class KVCache:
    """Called with the next token of each of B sequences, gives the logits of the ones after.

    It is the attention of all layers: a token's slot is its position. The stream is (B·t,): at
    first the prompts, padded on the right, then one new token of each. What padding leaves in a
    slot is overwritten by the token that belongs there before anyone sees it. Sequences that have
    ended leave, and the logits of those that did are 0.
    """

    def __init__(
        self, model: Transformer, prompts: list[list[int]], size: int, compile=False, stops=()
    ):
        """size: slots, as many as the longest sequence may have tokens. compile: run each new token
        as one graph, of one shape, by torch.compile; none leaves. stops: ids that end one."""
        c, weight = model.config, model.embed_tokens.weight
        if c.sliding_window and size > c.sliding_window:
            beyond = f"{size} tokens are more than the sliding window of {c.sliding_window}"
            raise CheckpointError(f"{beyond}, and attention with a window is not implemented here")
        if (most := max(map(max, prompts))) >= c.vocab_size:
            raise CheckpointError(f"token id {most} is beyond the model's vocabulary")
        shape = c.num_hidden_layers, 2, len(prompts), size, c.num_key_value_heads, c.head_dim
        self.model, self.compile, self.size = model, compile, size
        kind = weight.device.type
        dtype = weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        self.stored = torch.zeros(shape, dtype=dtype, device=weight.device)  # of each layer
        self.layers = [partial(self.attend, layer) for layer in range(c.num_hidden_layers)]
        # What runs next: tokens and positions (R, t), and where in the stream each sequence ends.
        tokens = pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)
        self.tokens, self.used = tokens.to(weight.device), tokens.shape[1]
        self.positions = torch.arange(self.used, device=weight.device).expand_as(self.tokens)
        self.sequences = torch.arange(len(prompts), device=weight.device)
        self.lengths = torch.tensor(list(map(len, prompts)), device=weight.device)
        self.ends = self.sequences * self.used + self.lengths - 1
        self.stops = torch.tensor(sorted(stops), dtype=torch.long, device=weight.device)
        self.running = self.sequences  # (R,) which of all sequences are in the stream
        self.ended = torch.zeros_like(self.running, dtype=torch.bool)  # (B,)

    def __call__(self, new: torch.Tensor | None) -> torch.Tensor:
        """new: (B,) token ids; None for the prompts. Returns (B, V) logits."""
        used = self.used
        if new is not None:
            self.ended |= torch.isin(new, self.stops)
            if not self.compile:
                self.leave()
            new = new[self.running]
            self.tokens, self.positions = new[:, None], self.lengths[:, None]
            self.ends, self.lengths = self.sequences, self.lengths + 1
            self.used += 1
            used = self.size if self.compile else self.used
        slots = torch.arange(used, device=self.positions.device)
        self.mask = (slots <= self.positions[..., None])[:, None]  # (R, 1, t, used)
        tokens, positions = self.tokens.flatten(), self.positions.flatten()
        logits = self.model(tokens, positions, self.layers, rows=self.ends)
        if new is None and self.compile:
            self.model = torch.compile(self.model.forward)
        if len(self.running) == len(self.ended):
            return logits
        whole = logits.new_zeros(len(self.ended), logits.shape[-1])
        return whole.index_copy(0, self.running, logits)

    def leave(self):
        """Those that have ended leave, once they are a quarter: the others are copied."""
        going = ~self.ended[self.running]  # (R,)
        if 4 * going.sum() > 3 * len(going) or not going.any():
            return
        self.running, self.lengths = self.running[going], self.lengths[going]
        self.sequences = self.sequences[: len(self.running)]
        kept = self.stored[:, :, going, : self.used]
        self.stored = self.stored[:, :, : len(self.running)]
        self.stored[:, :, :, : self.used] = kept

    def attend(self, layer: int, q, k, v):
        """q: (R·t, H, D); k, v: (R·t, H_kv, D). Returns (R·t, H, D)."""
        q, *new = (x.unflatten(0, self.positions.shape) for x in (q, k, v))  # (R, t, H, D)
        for stored, x in zip(self.stored[layer], new):
            stored[self.sequences[:, None], self.positions] = x.to(stored.dtype)
        k, v = self.stored[layer, :, :, : self.mask.shape[-1]].to(q.dtype)
        qkv = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*qkv, self.mask, enable_gqa=True)  # (R, H, t, D)
        return out.transpose(1, 2).flatten(0, 1)
