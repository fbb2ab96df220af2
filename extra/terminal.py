"""What the data doctor prints: counts, tables, bars, and sequences as the model reads them."""

import itertools
import math
import sys
from collections import Counter

import numpy as np

import data

BAR = 40  # characters of the histogram's longest bar
# What would move the cursor, or look like a control token's brackets, is shown as other text.
PLAIN = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}
PLAIN |= str.maketrans("⟦⟧", "[]")


def show_counts(facts: Counter):
    for what, count in facts.items():
        if count and what != "examples":
            print(f"  {count:>9,} {what}")


def show_lengths(unit: str, sizes: np.ndarray, alone: bool):
    """A table of the lengths of prompts, best and worst responses, (examples, 3); if `alone` there
    is one response each."""
    heads = ("5 %", "median", "95 %", "longest", "mean")
    print(f"  {unit:<16}" + "".join(f"{head:>10}" for head in heads))
    names = ("prompt", "response") if alone else ("prompt", "chosen", "rejected")
    for name, column in zip(names, sizes.T):
        quantiles = *np.quantile(column, [0.05, 0.5, 0.95, 1]), column.mean()
        print(f"    {name:<14}" + "".join(f"{q:>10,.0f}" for q in quantiles))
    if alone:
        return
    longer = (sizes[:, 1] > sizes[:, 2]).mean(), (sizes[:, 1] < sizes[:, 2]).mean()
    print(f"    chosen is longer in {longer[0]:.1%}, rejected in {longer[1]:.1%}")


def show_histogram(unit: str, lengths: np.ndarray, limit: int = 0):
    """How many of the lengths lie where, as bars. The rows are wider the longer they are, each by
    the same factor, so that a heavy tail fits; one begins behind the limit, where bars are light.
    """
    shortest, longest = int(lengths.min()), int(lengths.max())
    inner = np.geomspace(max(shortest, 1), longest + 1, 11).round().astype(int)[1:-1]
    edges = {shortest, longest + 1, *inner.tolist()}
    if shortest <= limit < longest:
        edges.add(limit + 1)
    edges = sorted(edges)
    counts, _ = np.histogram(lengths, edges)
    print(f"  {unit} of prompt and longest response")
    for low, end, count in zip(edges, edges[1:], counts.tolist()):
        span = f"{low:,}" if end == low + 1 else f"{low:,} – {end - 1:,}"
        bar = ("░" if 0 < limit < low else "█") * math.ceil(BAR * count / counts.max())
        print(f"    {span:>21} " + f"{bar} {count:,}".lstrip())
    if 0 < limit < longest:
        print(f"    {(lengths > limit).mean():.1%} are longer than --max_length={limit}: ░")


def spell(ids: np.ndarray, learnt: np.ndarray, tokenizer: data.Tokenizer) -> str:
    """Text of a sequence with what is learnt in green, or between « » where there is no colour.
    Control tokens are inverse, or in ⟦ ⟧; what merely spells one is the characters it is."""
    colour = sys.stdout.isatty()
    on, off = ("\033[32m", "\033[0m") if colour else ("«", "»")
    mark = "\033[7m{}\033[27m" if colour else "⟦{}⟧"
    names = {i: name for name, i in tokenizer.control.items()}
    text = ""
    for told, run in itertools.groupby(zip(ids.tolist(), learnt.tolist()), lambda pair: pair[1]):
        text += on * told
        for name, part in itertools.groupby((i for i, _ in run), key=names.get):
            part = list(part)
            said = "" if name else tokenizer.decode(part, True).translate(PLAIN)
            text += mark.format(name) * len(part) if name else said
        text += off * told
    return text
