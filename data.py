"""From text to packed batches: tokenizer, preference files, encoding, packing.

A preference example is a tree: one prompt (the trunk) and its responses (the branches), best first:
two for DPO, one for SFT, K for a ranking. One line of JSON becomes a batch like this:

    {"prompt": "Q: 2+2?", "chosen": " 4", "rejected": " 5"}    read_preferences -> Example
    [BOS] Q: 2 + 2 ?    ▁4 [EOS]    ▁5 [EOS]                   encode           -> Dataset

    stream    [BOS] Q: 2 + 2    ?  ▁4      ?  ▁5               collate          -> Batch
    targets                     ▁4 [EOS]   ▁5 [EOS]

The prompt's last token opens every response, whose first token it predicts. So each row of a
response predicts one target, and the rows of prompts none. As a script it is the data doctor.
"""

import contextlib
import functools
import heapq
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch

NO_TEXT = re.compile("[\ud800-\udfff\ufdd0\ufdd1]")  # half a surrogate pair; no characters


class DataError(ValueError):
    """Input that cannot be used; the message is one sentence naming the file and line."""


class Tokenizer:
    """A SentencePiece model, with the one rule that DPO needs: responses continue their prompt.
    Both are encoded apart and joined, so that a prompt's ids never depend on its response, and
    `decode(prompt_ids + response_ids) == prompt + response` (for models without normalisation, as
    Llama's, and texts without ▁, their space). Text never yields control ids."""

    # Protobuf messages concatenate by merging: this sets normalizer_spec.add_dummy_prefix and
    # remove_extra_whitespaces to false, for a second processor that invents and removes no space.
    CONTINUE = b"\x1a\x04\x18\x00\x20\x00"
    rendered = False  # are texts conversations that a chat template wrote? (extra/chat.py)

    def __new__(cls, path: str | Path):
        """Of the room's classes one, if it is there: they know other files, too."""
        with contextlib.suppress(ImportError):
            from extra.tokenizers import find_class

            return super().__new__(find_class(path) if cls is Tokenizer else cls)
        return super().__new__(cls)

    def __init__(self, path: str | Path):
        """Read a tokenizer.model, or the one in a directory. Raises DataError."""
        path = Path(path)
        path = path / "tokenizer.model" if path.is_dir() else path
        try:
            self.proto = path.read_bytes()
            self.start = sentencepiece.SentencePieceProcessor(model_proto=self.proto)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except RuntimeError:
            raise DataError(f"{path}: not a SentencePiece model") from None
        self.inside = sentencepiece.SentencePieceProcessor(model_proto=self.proto + self.CONTINUE)
        self.path, self.vocab_size = path, self.start.vocab_size()
        self.bos_id, self.eos_id = self.start.bos_id(), self.start.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise DataError(f"{path}: the tokenizer needs a BOS and an EOS piece")
        self.opening = [self.bos_id]  # of a text

    @staticmethod
    def train(examples: Iterable["Example"], directory: Path, vocab_size: int):
        """Train a byte-fallback BPE tokenizer, lossless as Llama's, and write it to a directory."""
        contents = (content for e in examples for content in (e.prompt, *e.responses))
        turns = (t for c in contents for t in (c if is_turns(c) else [{"content": c}]))
        # What is over 4,192 bytes would be left out: in parts, of whole words if there are spaces.
        split = re.compile(r"(?s).{1,1000}(?= |\Z)|.{1,999}\n|.{1000}").findall
        texts = (p for t in turns if isinstance(t["content"], str) for p in split(t["content"]))
        options = {"vocab_size": vocab_size, "model_type": "bpe", "byte_fallback": True}
        options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        options |= {"hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2}
        options |= {"input_sentence_size": 10**6, "shuffle_input_sentence": True}
        options |= {"sentence_iterator": iter(texts), "model_writer": (model := io.BytesIO())}
        try:
            sentencepiece.SentencePieceTrainer.train(**options)
        except RuntimeError as error:
            if said := re.search("DataError: (.*)", str(error)):  # of the file they are read from
                raise DataError(said[1]) from None
            why = str(error).rsplit("] ", 1)[-1].strip() or "is there any text?"
            raise DataError(f"no tokenizer of {vocab_size} pieces can be trained: {why}") from None
        (directory / "tokenizer.model").write_bytes(model.getvalue())

    def encode(self, text: str | list[str], continuation: bool = False):
        """Ids of a text (or of each of a list), without BOS and EOS; decode gives the text back."""
        return (self.inside if continuation else self.start).encode(text)

    def decode(self, ids: list[int], continuation: bool = False) -> str:
        """The text of ids; with `continuation` that of a response alone, its first space kept."""
        known = [i for i in ids if i < self.vocab_size]
        return (self.inside if continuation else self.start).decode(known)


def find_tokenizer(path: str | Path) -> Tokenizer | None:
    """The one there; None for a checkpoint that has none, and takes token ids."""
    with contextlib.suppress(ImportError):
        from extra.checkpoints import find_tokenizer

        return find_tokenizer(path)  # of adapters it is where their base is
    return Tokenizer(path) if (Path(path) / "tokenizer.model").exists() else None


class Example(NamedTuple):
    """A prompt and its responses, best first: texts; or token ids; or a conversation, [{"role": …,
    "content": …}, …], and the turns that follow it."""

    prompt: str | list
    responses: tuple
    where: str = ""  # file:line, for messages
    weight: float = 1.0
    label: float = 1.0  # probability that chosen is better than rejected
    margin: float = math.nan  # by how much, for the losses that ask; nan: not known
    context: dict | None = None  # what a chat template is handed beside the turns: tools, …
    notes: tuple = ()  # what was made of the row, counted when it is encoded


def read_row(where: str, line: bytes | object) -> dict:
    """The object of a line, or that which is an array's element. Raises DataError."""
    try:
        row = json.loads(line.decode("utf-8-sig")) if isinstance(line, bytes) else line
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: cannot be read as JSON lines ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def read_jsonl(path: str) -> Iterator[tuple[str, dict]]:
    """Yield ("file:line", object) of JSON lines; with its room of gzipped ones and arrays, too."""
    lines = lambda p: ((f"{p}:{n}", x) for n, x in enumerate(open(p, "rb"), 1) if x.strip())
    with contextlib.suppress(ImportError):
        from extra.files import read_lines as lines  # of whatever the file may be
    return ((where, read_row(where, line)) for where, line in lines(path))


def plain(where: str, row: dict, kind: str) -> Example | None:
    """A row of texts: prompt, chosen, rejected; or for SFT prompt, response. None: another one."""
    paired = kind == "preferences" or "chosen" in row
    names = ("prompt", "chosen", "rejected") if paired else ("prompt", "response")
    prompt, *rest = texts = [row.get(name) for name in names]
    if row.keys() - {"id", *names} or not all(isinstance(text, str) for text in texts):
        return None
    repeated = all(text.startswith((prompt or "\n\nHuman:", "\n\nHuman:")) for text in rest)
    if repeated or NO_TEXT.search("".join(texts)):
        return None  # responses that repeat the prompt; or no characters
    return Example(prompt, tuple(rest[:1] if kind == "demonstrations" else rest), where)


def read_example(where: str, row: dict, kind: str) -> Example:
    if example := plain(where, row, kind):
        return example
    from extra.formats import parse  # chats, and public data as it is distributed

    return parse(where, row, kind)


def read_examples(paths: str, kind: str, skip_bad_rows: int = 0) -> Iterable[Example]:
    """The rows of files (comma-separated). Raises DataError. kind: preferences; demonstrations, of
    which preferences bring the best; or prompts, of any row."""
    if skip_bad_rows:
        from extra.skipping import Examples

        return Examples(paths, kind, skip_bad_rows)
    return (read_example(*row, kind) for p in paths.split(",") if p for row in read_jsonl(p))


read_preferences = functools.partial(read_examples, kind="preferences")


@dataclass(frozen=True)
class Dataset:
    """Encoded examples in flat arrays, so that a million of them fit in memory."""

    tokens: np.ndarray  # int32, sequences end to end: prompt, responses, prompt, …
    learnt: np.ndarray  # bool, beside the tokens; false: read, but not learnt (a user's turn)
    offsets: np.ndarray  # sequence s is tokens[offsets[s] : offsets[s + 1]]
    trees: np.ndarray  # example e is sequences trees[e] : trees[e + 1], its prompt first
    facts: np.ndarray  # (examples, 3) float32: weight, label and margin of an Example
    where: np.ndarray | None = None  # (examples,) bytes, file:line of each, for messages
    reference: np.ndarray | None = None  # (responses,) log π_ref of each, once it is known

    __len__ = lambda self: len(self.facts)
    responses = lambda self: int(self.trees[-1]) - len(self)  # how many, of all examples

    def __getitem__(self, e: int) -> list[slice]:
        """Where in `tokens` an example's prompt and its responses are."""
        bounds = self.offsets[self.trees[e] : self.trees[e + 1] + 1].tolist()
        return list(map(slice, bounds, bounds[1:]))

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Rows that each example brings into the stream, (examples,)."""
        return np.diff(self.offsets[self.trees]) - 1  # a prompt's last token opens the responses

    def targets(self, examples: np.ndarray) -> int:
        """Learnt tokens of all responses of the examples."""
        return sum(int(self.learnt[where].sum()) for e in examples for where in self[e][1:])


def is_turns(content) -> bool:
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict)


def token_ids(example: Example, tokenizer: Tokenizer | None) -> list[list[int]]:
    """[prompt, response, …] with BOS and EOS, before any cut. An empty response has no ids; what is
    read but not learnt is ~id. Raises DataError for text without a tokenizer."""
    prompt, *responses = example.prompt, *example.responses
    if isinstance(prompt, list) and not is_turns(prompt):
        return [prompt, *responses]
    if tokenizer is None:
        raise DataError(f"{example.where}: text needs a tokenizer.model; else give token ids")
    if is_turns(prompt) or tokenizer.rendered:
        from extra.chat import encode_chats

        return encode_chats([example], tokenizer)[0]
    tree = [[*tokenizer.opening, *tokenizer.encode(prompt)] or [tokenizer.eos_id]]
    for text in responses:
        ids = tokenizer.encode(text, continuation=bool(prompt))
        tree.append([*ids, tokenizer.eos_id] if text else [])
    return tree


def fit(tree: list[list[int]], max_length: int, max_prompt: int, counts: Counter):
    """Cut one example's ids to size; None if that spoils it. Either is counted."""
    prompt, *responses = tree
    room = max(max_length - min(len(prompt), max_prompt), 0)
    distinct = list(dict.fromkeys(map(tuple, responses)))
    cut = list(dict.fromkeys(ids[:room] for ids in distinct))  # what is cut has no EOS
    spoilt = {
        "tie": not responses,  # as the formats' room has it: neither is the better one
        "empty response": not all(responses),
        "identical responses": len(distinct) < min(2, len(responses)),
        "no room for a response": any(max(ids, default=-1) < 0 for ids in cut),
        "identical once cut": len(cut) < len(distinct),
    }
    if any(spoilt.values()):
        counts[f"dropped: {max(spoilt, key=spoilt.get)}"] += 1  # the first that applies
        return None
    counts["repeated responses left out"] += len(responses) - len(distinct)
    counts["responses cut"] += sum(len(ids) > room for ids in distinct)
    if len(prompt) > max_prompt:  # keep BOS and the end of the prompt
        counts["prompts cut"] += 1
        prompt = prompt[:1] + prompt[len(prompt) - max_prompt + 1 :]
    return [prompt, *cut]


def to_dataset(trees: Iterable[list[list[int]]], facts: list | None = None) -> Dataset:
    """Trees of token ids, [prompt, response, …] each, as a data set; ~id: read, but not learnt."""
    flat, sizes, counts = [np.zeros(0, np.int32)], [0], [0]
    for tree in trees:
        flat.append(np.fromiter(itertools.chain(*tree), np.int32))
        sizes += map(len, tree)
        counts.append(len(tree))
    flat = np.concatenate(flat)
    learnt = flat >= 0
    np.invert(flat, out=flat, where=~learnt)
    facts = np.array(facts or [(1.0, 1.0, math.nan)] * (len(counts) - 1), np.float32)
    return Dataset(flat, learnt, np.cumsum(sizes), np.cumsum(counts), facts)


def encode(
    examples: Iterable[Example], tokenizer: Tokenizer | None, max_length: int, max_prompt: int
) -> tuple[Dataset, Counter]:
    """Encode, cut what is too long, drop what that spoils, and count both. A prompt over
    `max_prompt` tokens loses its beginning, but for BOS; a response that passes `max_length` with
    its prompt loses its end, and EOS. Raises DataError if no example remains."""
    counts, facts, where = Counter(examples=0), [], []

    def trees():
        for example in examples:
            counts.update(["examples", *example.notes])
            if tree := fit(token_ids(example, tokenizer), max_length, max_prompt, counts):
                facts.append((example.weight, example.label, example.margin))
                where.append(example.where.encode())
                yield tree

    dataset = to_dataset(trees(), facts)
    if not len(dataset):
        reasons = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
        raise DataError(f"no example is left ({reasons}): raise --max_length, or mend the data")
    return replace(dataset, where=np.array(where)), counts


@dataclass(frozen=True)
class Batch:
    """A micro-batch: one stream of packed trees, all prompts first, then all responses."""

    tokens: torch.Tensor  # (T,) token ids
    positions: torch.Tensor  # (T,) of each token in its own sequence
    segments: torch.Tensor  # (S, 4) prompt_start, prompt_size, start, size; stays on the CPU
    targets: torch.Tensor  # (M,) the response tokens, predicted by the last M rows
    learnt: torch.Tensor  # (M,) 1, or 0 where a target is read but not learnt
    response: torch.Tensor  # (M,) which of the batch's responses each target belongs to
    lengths: torch.Tensor  # (N,) learnt targets of each response
    ids: torch.Tensor  # (N,) which of the data set's responses these are; stays on the CPU
    chosen: torch.Tensor  # (P,) the responses that are preferred …
    rejected: torch.Tensor  # (P,) … to these; empty for SFT
    weights: torch.Tensor  # (P,) of the pairs; those of an example sum to its own
    labels: torch.Tensor  # (P,) probability that chosen is better
    margins: torch.Tensor  # (P,) by how much
    reference: torch.Tensor  # (N,) log π_ref of each response, once it is known
    soft: bool  # is any label below 1?

    def to(self, device: torch.device | str) -> "Batch":
        """The same on `device`; on CUDA copied from pinned memory while the GPU works."""
        move = {k: x for k, x in vars(self).items() if k not in ("segments", "ids", "soft")}
        if pinned := torch.device(device).type == "cuda":
            move = {name: tensor.pin_memory() for name, tensor in move.items()}
        return replace(self, **{k: x.to(device, non_blocking=pinned) for k, x in move.items()})


def collate(dataset: Dataset, examples: np.ndarray) -> Batch:
    """Pack the examples (indices) into one stream. Without any, a rank gets a stand-in, an example
    of weight 0, of which nothing is learnt: it takes part in every collective and adds nothing."""
    real = len(examples) > 0
    examples = examples if real else np.array([0])
    tokens, positions, segments, trunks, start = [], [], [], [], 0
    for e in examples:  # all prompts first, but for their last tokens
        prompt = dataset.tokens[dataset[e][0]]
        size = len(prompt) - 1
        tokens.append(prompt[:-1])
        positions.append(np.arange(size))
        segments += [(0, 0, start, size)] * (size > 0)
        trunks.append((start, size))  # where in the stream it is
        start += size
    targets, learnt, ids, pairs, facts = [], [], [], [], []
    for e, trunk in zip(examples, trunks):  # then all responses
        prompt, *responses = dataset[e]
        ranked = range(len(ids), len(ids) + len(responses))  # among the batch's, best first
        several = list(itertools.combinations(ranked, 2))
        pairs += several
        facts += [dataset.facts[e] / [max(1, len(several)), 1, 1]] * len(several)
        for n, response in enumerate(responses):
            target = dataset.tokens[response]
            size = len(target)
            tokens += [dataset.tokens[prompt][-1:], target[:-1]]  # these rows predict the target
            positions.append(trunk[1] + np.arange(size))
            segments.append((*trunk, start, size))
            targets.append(target)
            learnt.append(real * dataset.learnt[response])
            ids.append(dataset.trees[e] - e + n)
            start += size
    integers = lambda values: torch.from_numpy(np.asarray(values, np.int64))
    floats = lambda values: torch.from_numpy(np.asarray(values, np.float32))
    pairs, facts = integers(pairs).reshape(-1, 2), floats(facts).reshape(-1, 3)
    reference = np.zeros(len(ids)) if dataset.reference is None else dataset.reference[ids]
    return Batch(
        tokens=integers(np.concatenate(tokens)),
        positions=integers(np.concatenate(positions)),
        segments=integers(segments),
        targets=integers(np.concatenate(targets)),
        learnt=floats(np.concatenate(learnt)),
        response=integers(np.repeat(np.arange(len(ids)), list(map(len, targets)))),
        lengths=integers([max(1, mask.sum()) for mask in learnt]),
        ids=integers(ids),
        chosen=pairs[:, 0],
        rejected=pairs[:, 1],
        weights=real * facts[:, 0],
        labels=facts[:, 1],
        margins=facts[:, 2],
        reference=floats(reference),
        soft=bool((facts[:, 1] < 1).any()),
    )


def pack(lengths: np.ndarray, examples: np.ndarray, budget: int, world_size: int) -> list[list]:
    """Spread the examples of one step over ranks and micro-batches evenly, longest first to the
    least loaded (Graham's LPT rule). Returns [rank][micro-batch] -> indices: on every rank as many,
    as few as keep each within `budget` rows (a longer example runs alone); some may be empty."""
    order = examples[np.argsort(-lengths[examples], kind="stable")]
    count = max(1, math.ceil(lengths[order].sum() / (budget * world_size)))
    while True:
        heap = [(0, i) for i in range(count * world_size)]
        bins = [[] for _ in heap]
        for e in order.tolist():
            load, i = heap[0]
            bins[i].append(e)
            heapq.heapreplace(heap, (load + int(lengths[e]), i))
        if all(load <= budget or len(bins[i]) == 1 for load, i in heap):
            return [[np.array(b, np.int64) for b in bins[r::world_size]] for r in range(world_size)]
        count += 1 + count // 16


@functools.lru_cache(maxsize=1)
def order_of(epoch: int, total: int, seed: int | None) -> np.ndarray:
    """The order of the examples in an epoch; without a seed that of the data."""
    order = np.arange(total)
    return order if seed is None else np.random.default_rng((seed, epoch)).permutation(order)


if __name__ == "__main__":
    from extra.doctor import main

    main()
