"""Attention of packed segments anywhere but in CUDA's bf16, in few calls.

As model.segment_attention, which says what is computed; segments of like lengths are padded to the
longest of them, and attend together. It is several times faster where segments are short.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import rows_seen


def padded_attention(segments: Tensor, device: torch.device) -> Callable:
    """attend(q, k, v) of segments (S, 4), as in model.py; padding never reaches a real query."""
    seen, sizes = rows_seen(segments), segments[:, 3]
    first_query = sizes.cumsum(0) - sizes  # of each segment among all queries
    like = lambda n: round(4 * math.log(n + 48))  # the same within a quarter, or a dozen tokens
    members = defaultdict(list)
    for i, (_, prompt_size, _, size) in enumerate(segments.tolist()):
        members[prompt_size > 0, like(size), like(prompt_size + size)].append(i)
    groups, order, kept, padded = [], [], [], 0
    for (prompted, _, _), group in members.items():
        size = sizes[group][:, None]  # (s, 1)
        query = torch.arange(size.max())  # (m,)
        rows = first_query[group][:, None] + query.minimum(size - 1)  # (s, m) of q
        keys = pad_sequence([seen[i] for i in group], batch_first=True)  # (s, n) of k and v
        mask = None  # plainly causal: what is padded comes after every real query
        if prompted:  # query i of its segment sees key j where j <= prompt_size + i
            last = segments[group, 1][:, None] + query  # (s, m)
            mask = (torch.arange(keys.shape[1]) <= last[:, None, :, None]).to(
                device
            )  # (s, 1, m, n)
        groups.append((rows.to(device), keys.to(device), mask))
        real = query < size  # (s, m), the others are padding
        order.append(rows[real])
        kept.append(padded + real.flatten().nonzero().squeeze(1))
        padded += real.numel()
    # Where each query is among the outputs of all groups.
    places = torch.cat(kept)[torch.cat(order).argsort()].to(device)

    def attend(q, k, v):
        take = lambda x, rows: x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        outputs = []
        for rows, keys, mask in groups:
            qkv = (x.transpose(1, 2) for x in (take(q, rows), take(k, keys), take(v, keys)))
            causal = mask is None
            out = F.scaled_dot_product_attention(*qkv, mask, is_causal=causal, enable_gqa=True)
            outputs.append(out.transpose(1, 2).flatten(0, 1))  # (s, H, m, D) -> (s·m, H, D)
        return torch.cat(outputs).index_select(0, places)

    return attend
