"""The data doctor: what is in preference or SFT files, before anything is trained on them.

    python data.py train.jsonl,more.jsonl.gz --eval held_out.jsonl --tokenizer DIR

Several files are a mixture: each is looked at in the light of those before it. With `--out FILE`
the rows that can be used are written into one file.
"""

import argparse
import array
import contextlib
import gzip
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import data
from extra import chat, formats
from extra.encoded import encode_ahead
from extra.terminal import show_counts, show_histogram, show_lengths, spell

UNUSABLE = "unusable: train.py would stop there; --out writes the others into a file"
SAMPLE = 10_000  # examples of a file that are encoded, to count tokens
SPELT = "that spells control tokens"
AS_TEXT = ": written as characters"
MERGED = (
    "whose response a joint encoding would merge into the prompt's last token: kept apart, as the "
    "sampler starts there"
)


def survey(
    path: str, seen: set, held_out: set, facts: Counter, tokenizer=None, out=None
) -> Iterator[data.Example]:
    """Pass on the examples of a file, counting on the way; `seen` is what earlier ones held.
    out: a file for the rows that they were."""
    control = tokenizer and tokenizer.control_pattern
    spelt_in_turns, spelt = f"with a turn {SPELT}{AS_TEXT}", f"with text {SPELT}"
    if not (tokenizer and tokenizer.rendered):
        spelt += f"{AS_TEXT}; --rendered makes tokens of them"
    for number, (where, row) in enumerate(data.read_jsonl(path), 1):
        if number % 100_000 == 0:
            print(f"… {number:,} read", file=sys.stderr)
        try:
            example = formats.parse(where, row, "training")
            if tokenizer and data.is_turns(example.prompt):
                chat.check_rendered(example, tokenizer)
        except data.DataError as error:
            facts[UNUSABLE] += 1
            if facts[UNUSABLE] <= 3:
                print(f"data.py: {error}", file=sys.stderr)
            continue
        if out:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
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
        facts["with an empty response"] += not all(example.responses)
        facts["with identical responses"] += len(set(responses)) < len(responses)
        facts["duplicates of an earlier example"] += this in seen
        facts["contradictions of an earlier example"] += reverse in seen and this != reverse
        prompted = bool(example.prompt)  # plain texts have none
        facts["with a prompt seen earlier"] += prompted and prompt in seen
        facts["with a prompt of the evaluation files"] += prompted and prompt in held_out
        seen |= {prompt, this}
        if prompted and isinstance(example.prompt, str):
            repeats = [response.startswith(example.prompt) for response in example.responses]
            facts["with a prompt that ends in a space or a tab"] += example.prompt[-1] in " \t"
            facts["with a response that begins with the whole prompt"] += any(repeats)
            facts["with several responses that all do"] += len(repeats) > 1 and all(repeats)
        if control:
            contents = (example.prompt, *example.responses)
            found = any(map(control.search, itertools.chain(*map(texts, contents))))
            facts[spelt_in_turns if data.is_turns(example.prompt) else spelt] += found
        yield example


def texts(content) -> list[str]:
    """Those of a prompt or a response; of token ids none."""
    turns = content if data.is_turns(content) else [{"content": content}]
    return [turn["content"] for turn in turns if isinstance(turn["content"], str)]


def characters(content) -> int:
    """Of a prompt or a response; of token ids how many they are."""
    return sum(map(len, texts(content))) or (0 if data.is_turns(content) else len(content))


def diagnose(
    path: str, seen: set, held_out: set, tokenizer, limits: tuple, shown: int, out=None
) -> Counter:
    """Print what is in a file, and some examples as the model sees them; return the counts."""
    facts, sizes, sample, rng = Counter(), array.array("q"), [], random.Random(0)
    for example in survey(path, seen, held_out, facts, tokenizer, out):
        prompt, *responses = map(characters, (example.prompt, *example.responses))
        sizes.extend((prompt, responses[0], responses[-1], prompt + max(responses)))
        place = len(sample) if len(sample) < SAMPLE else rng.randrange(facts["examples"])
        if place < SAMPLE:  # every example is as likely to stay
            sample[place : place + 1] = [example._replace(notes=())]  # they are counted
    if not sizes:
        raise data.DataError(f"{path}: no row can be used")
    sizes = np.array(sizes).reshape(-1, 4)
    alone = all(len(example.responses) == 1 for example in sample)
    print(f"\n{path}: {facts['examples']:,} examples")
    show_counts(facts)
    show_lengths("characters", sizes[:, :3], alone)
    if tokenizer:
        show_encoded(sample, facts["examples"], tokenizer, limits, shown, alone)
    else:
        show_histogram("characters", sizes[:, 3])
    return facts


def show_encoded(sample: list, total: int, tokenizer, limits: tuple, shown: int, alone: bool):
    """Print how a sample of a file's `total` examples is encoded, and `shown` of them."""
    found, whole = Counter(), array.array("q")
    talks = {example.where for example in sample if data.is_turns(example.prompt)}
    ends = chat.stop_ids(tokenizer) if talks else set()

    def looked_at() -> Iterator[data.Example]:
        for example in encode_ahead(sample, tokenizer):
            count_cuts(example, example.where in talks, limits, tokenizer, ends, found)
            whole.append(len(example.prompt) + max(map(len, example.responses)))
            yield example._replace(notes=())  # all rows are counted already

    def merges(example: data.Example) -> bool:
        several = example.where in talks and chat.separate(example, tokenizer)
        return any(chat.merges(one, tokenizer) for one in several or [example])

    dataset, counts = data.encode(looked_at(), tokenizer, *limits)
    tokens = len(dataset.tokens) * total / len(sample)
    print(
        f"  encoded, {len(sample):,} of them, to at most {limits[0]} tokens, "
        f"prompts to {limits[1]}:\n  about {tokens:,.0f} tokens in all"
    )
    if counts["examples"] > len(sample):  # where the template writes earlier turns differently
        found["sequences to learn in them"] = counts["examples"]
    found[MERGED] = sum(map(merges, sample))
    show_counts(counts + found)
    lengths = np.diff(dataset.offsets)
    columns = dataset.trees[:-1], dataset.trees[:-1] + 1, dataset.trees[1:] - 1
    show_lengths("tokens", np.stack([lengths[c] for c in columns], 1), alone)
    show_histogram("tokens", np.array(whole), limits[0])
    for e in range(min(shown, len(dataset))):
        prompt, *responses = dataset[e]
        nothing = np.zeros(prompt.stop - prompt.start, bool)
        print("\n  " + spell(dataset.tokens[prompt], nothing, tokenizer))
        for where in responses:
            print("    → " + spell(dataset.tokens[where], dataset.learnt[where], tokenizer))


def count_cuts(example, conversation: bool, limits: tuple, tokenizer, ends: set, found: Counter):
    """Count what the cut does to an encoded example beyond data.fit's own counts.

    ends: the ids that end a turn. A cut just behind one, but for space and a BOS, tears no turn.
    """
    kept = data.fit([example.prompt, *example.responses], *limits, Counter())
    if kept is None:
        return
    distinct = dict.fromkeys(map(tuple, example.responses))
    cut = [len(after) < len(before) for before, after in zip(distinct, kept[1:])]
    found["with one response cut and another whole"] += any(cut) and not all(cut)
    lost = len(example.prompt) - len(kept[0])
    if conversation and lost:
        first, *gone = example.prompt[: lost + 1]  # the first, BOS, is kept
        while gone and (gone[-1] == first or tokenizer.decode(gone[-1:], True).isspace()):
            gone.pop()
        found["prompts cut inside a turn"] += not ends.intersection(gone[-1:])


@contextlib.contextmanager
def usable_rows(out: str, inputs: list[str]):
    """A file for the rows that can be used, or None; it is at `out` once all of them are in it.
    Raises DataError."""
    if not out:
        yield None
        return
    path, new = Path(out), Path(f"{out}.new")
    read = {Path(name).resolve() for name in inputs}
    if {path.resolve(), new.resolve()} & read or (path.exists() and not path.is_file()):
        raise data.DataError(f"--out={out} must be a file of its own: give another name")
    text = {"encoding": "utf-8", "errors": "backslashreplace"}  # lone surrogates as they came
    try:
        with (gzip.open if out.endswith(".gz") else open)(new, "wt", **text) as file:
            yield file
        new.replace(path)
    except OSError as error:
        raise data.DataError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


def main():
    parser = argparse.ArgumentParser(description="Look at preference or SFT files before training.")
    add = parser.add_argument
    add("files", nargs="+", help="JSON lines or arrays, gzipped or not; several are a mixture")
    add("--eval", default="", help="evaluation files, comma-separated: are prompts shared?")
    add("--tokenizer", help="a tokenizer or its directory: count and show tokens")
    add("--rendered", action="store_true", help="as for train.py: texts may hold control tokens")
    add("--max_length", type=int, default=512, help="as for train.py (default 512)")
    add("--max_prompt_length", type=int, default=256, help="as for train.py (default 256)")
    add("--show", type=int, default=2, help="examples to show of each file (default 2)")
    add("--out", default="", help="write the rows that can be used there, .jsonl or .jsonl.gz")
    args = parser.parse_args()
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character
        sys.stdout.reconfigure(errors="backslashreplace")
    held_out, seen, limits = set(), set(), (args.max_length, args.max_prompt_length)
    files = list(filter(None, ",".join(args.files).split(",")))
    evaluation = list(filter(None, args.eval.split(",")))
    try:
        if args.max_prompt_length >= args.max_length:
            raise data.DataError("--max_prompt_length must be less than --max_length")
        if args.rendered and not args.tokenizer:
            raise data.DataError("--rendered says how texts are encoded: give a --tokenizer, too")
        tokenizer = args.tokenizer and data.find_tokenizer(args.tokenizer)
        tokenizer = tokenizer or (args.tokenizer and data.Tokenizer(args.tokenizer))
        if args.rendered:
            tokenizer.rendered = True
        total, unusable = Counter(), 0  # unusable: rows that stay where they are
        with usable_rows(args.out, files + evaluation) as out:
            for path in evaluation:
                unusable += diagnose(path, held_out, set(), tokenizer, limits, 0)[UNUSABLE]
            for path in files:
                total += diagnose(path, seen, held_out, tokenizer, limits, args.show, out)
    except KeyboardInterrupt:
        sys.exit(130)
    except data.DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    if len(files) > 1:
        print(f"\n{total['examples']:,} examples in all, each file compared with those before it")
    if args.out:
        rows = total["examples"] + total["ties, left out"]
        print(f"\n{args.out}: {rows:,} rows, {total[UNUSABLE]:,} left out")
    else:
        unusable += total[UNUSABLE]
    sys.exit(2 if unusable else 0)
