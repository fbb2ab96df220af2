"""The data doctor: what is in preference or SFT files, before anything is trained on them.

    python data.py train.jsonl,more.jsonl.gz --eval held_out.jsonl --tokenizer DIR

Several files are a mixture: each is looked at in the light of those before it.
"""

import argparse
import itertools
import random
import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np

import data
from extra import chat, conversations, formats

UNUSABLE = "unusable: train.py would stop there"
SAMPLE = 10_000  # examples of a file that are encoded, to count tokens


def survey(path: str, seen: set, held_out: set, facts: Counter) -> Iterator[data.Example]:
    """Pass on the examples of a file, counting on the way; `seen` is what earlier ones held."""
    for number, (where, row) in enumerate(data.read_jsonl(path), 1):
        if number % 100_000 == 0:
            print(f"… {number:,} read", file=sys.stderr)
        try:
            example = formats.parse(where, row, "training")
        except data.DataError as error:
            facts[UNUSABLE] += 1
            if facts[UNUSABLE] <= 3:
                print(f"data.py: {error}", file=sys.stderr)
            continue
        facts.update(example.notes)
        if not example.responses:
            facts["ties, left out"] += 1
            continue
        prompt, *responses = (
            hash(str(content)) for content in (example.prompt, *example.responses)
        )
        this, reverse = (prompt, *responses), (prompt, *reversed(responses))
        facts["examples"] += 1
        if data.is_turns(example.prompt):
            facts["conversations"] += 1
            whole = example.prompt + example.responses[0]
            facts["turns in them, the best response's included"] += len(whole)
        facts["with an empty response"] += any(map(is_empty, example.responses))
        facts["with identical responses"] += len(set(responses)) < len(responses)
        facts["duplicates of an earlier example"] += this in seen
        facts["contradictions of an earlier example"] += reverse in seen and this != reverse
        prompted = bool(example.prompt)  # plain texts have none
        facts["with a prompt seen earlier"] += prompted and prompt in seen
        facts["with a prompt of the evaluation files"] += prompted and prompt in held_out
        seen |= {prompt, this}
        yield example


def is_empty(response) -> bool:
    """Has the response no text at all?"""
    return conversations.said_nothing(response) if data.is_turns(response) else not response


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


def characters(content) -> int:
    """Of a prompt or a response; of token ids how many they are."""
    if data.is_turns(content):
        return sum(len(turn["content"]) for turn in content)
    return len(content)


def diagnose(path: str, seen: set, held_out: set, tokenizer, limits: tuple, shown: int) -> Counter:
    """Print what is in a file, and some examples as the model sees them; return the counts."""
    facts, sizes, sample, rng = Counter(), [], [], random.Random(0)
    for example in survey(path, seen, held_out, facts):
        contents = (example.prompt, example.responses[0], example.responses[-1])
        sizes.append(list(map(characters, contents)))
        place = len(sample) if len(sample) < SAMPLE else rng.randrange(facts["examples"])
        if place < SAMPLE:  # every example is as likely to stay
            sample[place : place + 1] = [example._replace(notes=())]  # they are counted
    if not sizes:
        raise data.DataError(f"{path}: no row can be used")
    alone = all(len(example.responses) == 1 for example in sample)
    print(f"\n{path}: {facts['examples']:,} examples")
    show_counts(facts)
    show_lengths("characters", np.array(sizes), alone)
    if tokenizer:
        show_encoded(sample, facts["examples"], tokenizer, limits, shown, alone)
    return facts


def show_encoded(sample: list, total: int, tokenizer, limits: tuple, shown: int, alone: bool):
    """Print how a sample of a file's `total` examples is encoded, and `shown` of them."""
    dataset, counts = data.encode(sample, tokenizer, *limits)
    tokens = len(dataset.tokens) * total / counts["examples"]
    print(
        f"  encoded, {counts['examples']:,} of them, to at most {limits[0]} tokens, "
        f"prompts to {limits[1]}:\n  about {tokens:,.0f} tokens in all"
    )
    show_counts(counts)
    lengths = np.diff(dataset.offsets)
    columns = dataset.trees[:-1], dataset.trees[:-1] + 1, dataset.trees[1:] - 1
    show_lengths("tokens", np.stack([lengths[c] for c in columns], 1), alone)
    for e in range(min(shown, len(dataset))):
        prompt, *responses = dataset[e]
        nothing = np.zeros(prompt.stop - prompt.start, bool)
        print("\n  " + spell(dataset.tokens[prompt], nothing, tokenizer))
        for where in responses:
            print("    → " + spell(dataset.tokens[where], dataset.learnt[where], tokenizer))


def spell(ids: np.ndarray, learnt: np.ndarray, tokenizer: data.Tokenizer) -> str:
    """Text of a sequence with what is learnt in green, or between « » where there is no colour."""
    on, off = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("«", "»")
    names = {i: name for name, i in chat.template_of(tokenizer).control.items()}
    text = ""
    for told, run in itertools.groupby(zip(ids.tolist(), learnt.tolist()), lambda pair: pair[1]):
        text += on * told
        for name, part in itertools.groupby((i for i, _ in run), key=names.get):
            part = list(part)
            text += name * len(part) if name else tokenizer.decode(part, True)
        text += off * told
    return text


def main():
    parser = argparse.ArgumentParser(description="Look at preference or SFT files before training.")
    add = parser.add_argument
    add("files", nargs="+", help=".jsonl or .jsonl.gz files; several are a mixture")
    add("--eval", default="", help="evaluation files, comma-separated: are prompts shared?")
    add("--tokenizer", help="tokenizer.model, or a directory with one: count and show tokens")
    add("--max_length", type=int, default=512, help="as for train.py (default 512)")
    add("--max_prompt_length", type=int, default=256, help="as for train.py (default 256)")
    add("--show", type=int, default=2, help="examples to show of each file (default 2)")
    args = parser.parse_args()
    held_out, seen, limits = set(), set(), (args.max_length, args.max_prompt_length)
    try:
        if args.max_prompt_length >= args.max_length:
            raise data.DataError("--max_prompt_length must be less than --max_length")
        tokenizer = args.tokenizer and data.Tokenizer(args.tokenizer)
        total = Counter()
        for path in filter(None, args.eval.split(",")):
            total[UNUSABLE] += diagnose(path, held_out, set(), tokenizer, limits, 0)[UNUSABLE]
        for path in filter(None, ",".join(args.files).split(",")):
            total += diagnose(path, seen, held_out, tokenizer, limits, args.show)
    except data.DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    if "," in ",".join(args.files):
        print(f"\n{total['examples']:,} examples in all, each file compared with those before it")
    sys.exit(2 if total[UNUSABLE] else 0)
