"""Attention of packed segments in few calls.

As model.segment_attention, which says what is computed: on CUDA in bf16 all segments in one call
of variable lengths, anywhere else those of like lengths padded to the longest of them, one call a
group.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def rows_seen(segments: Tensor) -> list[Tensor]:
    """Of each segment the rows of the stream that it sees: its prompt's, then its own."""
    seen = []
    for prompt_start, prompt_size, start, size in segments.tolist():
        prompt = torch.arange(prompt_start, prompt_start + prompt_size)
        seen.append(torch.cat([prompt, torch.arange(start, start + size)]))
    return seen


def fast_attention(segments: Tensor, device: torch.device) -> Callable:
    """attend(q, k, v) of segments (S, 4), as in model.py."""
    flash = device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return (flash_attention if flash else padded_attention)(segments, device)


def flash_attention(segments: Tensor, device: torch.device) -> Callable:
    """On CUDA, in bf16: all segments in one variable-length call, causal from the bottom right."""
    from torch.nn.attention.varlen import varlen_attn

    queries, keys = segments[:, 3], segments[:, 1] + segments[:, 3]  # of each segment
    longest = queries.max().item(), keys.max().item()
    bounds = [F.pad(sizes.cumsum(0), (1, 0)).int() for sizes in (queries, keys)]  # (S + 1,) each
    pinned = [index.pin_memory() for index in (torch.cat(rows_seen(segments)), *bounds)]
    seen, *bounds = [index.to(device, non_blocking=True) for index in pinned]
    options = {"window_size": (-1, 0)}  # causal: nothing to the right
    if torch.__version__ >= "2.12":
        options["enable_gqa"] = True

    def attend(q, k, v):
        k, v = k.index_select(0, seen), v.index_select(0, seen)
        if not options.get("enable_gqa"):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return varlen_attn(q, k, v, *bounds, *longest, **options)

    return attend


def padded_attention(segments: Tensor, device: torch.device) -> Callable:
    """attend(q, k, v) of segments (S, 4), as in model.py; padding never reaches a real query."""
    first_query = segments[:, 3].cumsum(0) - segments[:, 3]  # of each segment among all queries
    like = lambda n: round(4 * math.log(n + 48))  # the same within a quarter, or a dozen tokens
    members = defaultdict(list)
    for i, (_, prompt_size, _, size) in enumerate(segments.tolist()):
        members[prompt_size > 0, like(size), like(prompt_size + size)].append(i)
    groups, order, kept, padded = [], [], [], 0
    for (prompted, _, _), group in members.items():
        prompt, prompt_size, start, size = segments[group].T[:, :, None]  # (s, 1) each
        query, key = torch.arange(size.max()), torch.arange((prompt_size + size).max())
        rows = first_query[group][:, None] + query.minimum(size - 1)  # (s, m) of q
        own = start + (key - prompt_size).minimum(size - 1)
        keys = torch.where(key < prompt_size, prompt + key, own)  # (s, n) of k and v
        mask = None  # plainly causal: what is padded comes after every real query
        if prompted:  # query i of its segment sees key j where j <= prompt_size + i
            mask = (key <= (prompt_size + query)[:, None, :, None]).to(device)  # (s, 1, m, n)
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
