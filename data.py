"""From text to packed batches: tokenizer, preference files, packing, and the built-in experiment.

A preference example is a tree: one prompt (the trunk) and its responses (the branches), best first:
two for DPO, one for SFT, K for a ranking. One line of JSON becomes a gradient like this:

    {"prompt": "Q: 2+2?", "chosen": " 4", "rejected": " 5"}        load_preferences -> Example
    [BOS] Q: 2 + 2 ? | ▁4 [EOS] | ▁5 [EOS]                         encode_examples  -> Dataset
    [BOS] Q: 2 + 2 ? ▁4 ▁5 [BOS] …  one stream, no padding         collate          -> Batch

The last token of a response is predicted but never read, so it is not in the stream.
"""

import gzip
import heapq
import io
import itertools
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch


class DataError(ValueError):
    """Input that cannot be used; the message is one sentence naming the file and line."""


class Tokenizer:
    """A SentencePiece model, with the one rule that DPO needs: responses continue their prompt.

    Prompt and response are encoded apart and joined, so that a prompt's ids never depend on its
    response, and `decode(prompt_ids + response_ids) == prompt + response` (for models without text
    normalisation, as Llama's). User text never yields control ids such as BOS and EOS.
    """

    # Protobuf messages concatenate by merging: this sets normalizer_spec.add_dummy_prefix and
    # remove_extra_whitespaces to false, for a second processor that invents and removes no space.
    CONTINUE = b"\x1a\x04\x18\x00\x20\x00"

    def __init__(self, path: str | Path):
        """Raises DataError if the file is missing, not SentencePiece, or without BOS or EOS."""
        try:
            self.proto = Path(path).read_bytes()
            self.start = sentencepiece.SentencePieceProcessor(model_proto=self.proto)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except RuntimeError:
            raise DataError(f"{path}: not a SentencePiece model") from None
        self.inside = sentencepiece.SentencePieceProcessor(model_proto=self.proto + self.CONTINUE)
        self.vocab_size = self.start.vocab_size()
        self.bos_id, self.eos_id = self.start.bos_id(), self.start.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise DataError(f"{path}: the tokenizer needs a BOS and an EOS piece")

    @staticmethod
    def train(texts: Iterator[str], path: str | Path, vocab_size: int) -> "Tokenizer":
        """Train a byte-fallback BPE tokenizer, lossless as Llama's, write it to `path`, load it."""
        model = io.BytesIO()
        options = {"byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2}
        options |= {"remove_extra_whitespaces": False, "hard_vocab_limit": False, "num_threads": 1}
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                vocab_size=vocab_size,
                model_type="bpe",
                **options,
            )
        except RuntimeError as error:
            reason = str(error).rsplit("] ", 1)[-1].strip() or error
            raise DataError(
                f"vocab_size {vocab_size}: no tokenizer can be trained ({reason})"
            ) from None
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(model.getvalue())
        return Tokenizer(path)

    def encode(self, text: str | list[str], continuation: bool = False):
        """Ids of a text (or of each of a list), without BOS and EOS; decode gives the text back."""
        return (self.inside if continuation else self.start).encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """BOS and the prompt: what training sees before a response, and what the sampler starts."""
        return [self.bos_id] + self.encode(text)

    def decode(self, ids: list[int], continuation: bool = False) -> str:
        """The text of ids; with `continuation` that of a response alone, its first space kept."""
        return (self.inside if continuation else self.start).decode(ids)


class Example(NamedTuple):
    """A prompt and its responses, best first. `where` is file:line, for messages."""

    prompt: str
    responses: tuple[str, ...]
    weight: float = 1.0
    where: str = ""

    chosen = property(lambda self: self.responses[0])
    rejected = property(lambda self: self.responses[1])


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield ("file:line", object) of a `.jsonl` or `.jsonl.gz` file; blank lines are skipped."""
    where, empty = str(path), True
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if not line.strip():
                    continue
                row, empty = json.loads(line.decode("utf-8")), False
                if not isinstance(row, dict):
                    raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
                yield where, row
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: invalid UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: invalid JSON: {error.msg}, column {error.colno}") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{where}: cannot be read ({reason})") from None
    if empty:
        raise DataError(f"{path}: the file is empty")


def text_field(row: dict, name: str, where: str) -> str:
    if name not in row:
        raise DataError(f"{where}: field '{name}' is missing")
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: field '{name}' must be text, found {type(value).__name__}")
    if name != "prompt" and not value:
        raise DataError(f"{where}: field '{name}' is empty")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise DataError(f"{where}: field '{name}' has half a surrogate pair; write the character")
    return value


def parse_preference(where: str, row: dict) -> Example:
    prompt = text_field(row, "prompt", where)
    if "responses" in row:
        ranked = row["responses"]
        if not isinstance(ranked, list) or len(ranked) < 2:
            raise DataError(f"{where}: field 'responses' must list two responses or more")
        responses = tuple(text_field({"responses": text}, "responses", where) for text in ranked)
    else:
        responses = tuple(text_field(row, name, where) for name in ("chosen", "rejected"))
    if len(set(responses)) < len(responses):
        raise DataError(f"{where}: two responses are identical, so there is nothing to prefer")
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 1e6:
        raise DataError(f"{where}: field 'weight' must be a number of at least 0, found {weight!r}")
    return Example(prompt, responses, float(weight), where)


def parse_demonstration(where: str, row: dict) -> Example:
    if "response" not in row:
        return demonstration(parse_preference(where, row))
    prompt, response = (text_field(row, name, where) for name in ("prompt", "response"))
    return Example(prompt, (response,), where=where)


def demonstration(example: Example) -> Example:
    """What SFT takes from a preference: its best response."""
    return example._replace(responses=example.responses[:1])


def load_preferences(path: str | Path) -> list[Example]:
    """Read a preference file: `prompt`, `chosen`, `rejected` or `prompt`, `responses` (best first),
    and an optional `weight`, on every line. Other fields are left alone. Raises DataError."""
    return [parse_preference(where, row) for where, row in read_jsonl(path)]


def load_demonstrations(path: str | Path) -> list[Example]:
    """Read what SFT trains on: `prompt`, `response` on every line, or the best of a preference."""
    return [parse_demonstration(where, row) for where, row in read_jsonl(path)]


@dataclass(frozen=True)
class Dataset:
    """Encoded examples in flat arrays, so that a million of them fit in memory."""

    tokens: np.ndarray  # every sequence, end to end: prompt, responses, prompt, responses, …
    offsets: np.ndarray  # sequence s is tokens[offsets[s] : offsets[s + 1]]
    trees: np.ndarray  # example e is sequences trees[e] : trees[e + 1], its prompt first
    weights: np.ndarray  # (examples,) float32
    counts: Counter  # what encoding cut and dropped, to be printed

    def __len__(self) -> int:
        return len(self.weights)

    def lengths(self) -> np.ndarray:
        """Tokens that each example brings into the stream, (examples,)."""
        tokens = np.diff(self.offsets[self.trees])
        return tokens - (np.diff(self.trees) - 1)  # the last token of a response is never read

    def response_lengths(self) -> np.ndarray:
        """Tokens of each response, EOS included, (responses,), in the order of the examples."""
        return np.delete(np.diff(self.offsets), self.trees[:-1])


def fit(prompt: list[int], responses: list[list[int]], max_length: int, max_prompt: int, counts):
    """Cut one example's ids (BOS and EOS included) to size; None if that spoils it."""
    if len(prompt) > max_prompt:  # keep BOS and the end of the prompt
        prompt = prompt[:1] + prompt[len(prompt) - max_prompt + 1 :]
        counts["prompts cut"] += 1
    room = max_length - len(prompt)
    if room <= 0:
        counts["dropped: no room for a response"] += 1
        return None
    cut = [ids[:room] for ids in responses]  # a response that is cut has no EOS
    if len(set(map(tuple, cut))) < len(cut):
        counts["dropped: identical once cut"] += 1
        return None
    counts["responses cut"] += sum(len(ids) > room for ids in responses)
    return [prompt, *cut]


def to_arrays(trees: list[list], weights=None, counts=None) -> Dataset:
    """Trees of token ids, [prompt, response, …] each, as a data set."""
    sequences = [np.asarray(ids, np.int32) for tree in trees for ids in tree]
    return Dataset(
        np.concatenate(sequences),
        np.cumsum([0, *map(len, sequences)]),
        np.cumsum([0, *map(len, trees)]),
        np.array(weights or [1.0] * len(trees), np.float32),
        counts or Counter(examples=len(trees)),
    )


def encode_examples(
    examples: list[Example], tokenizer: Tokenizer, max_length: int, max_prompt_length: int
) -> Dataset:
    """Encode, cut what is too long, drop what that spoils, and count both.

    A prompt over `max_prompt_length` tokens (BOS included) loses its beginning, keeping BOS. A
    response that would pass `max_length` together with its prompt loses its end, and has no EOS
    then. Examples left without a response, or with two identical ones, are dropped. Raises
    DataError if none remain.
    """
    counts, trees, weights = Counter(examples=len(examples)), [], []
    for first in range(0, len(examples), 4096):  # in blocks: SentencePiece encodes lists faster
        block = examples[first : first + 4096]
        prompts = tokenizer.encode([e.prompt for e in block])
        flat = iter(tokenizer.encode([r for e in block for r in e.responses], continuation=True))
        for example, prompt in zip(block, prompts):
            responses = [next(flat) for _ in example.responses]
            if not example.prompt:  # nothing to continue: the response starts the text
                responses = tokenizer.encode(list(example.responses))
            ended = [[*ids, tokenizer.eos_id] for ids in responses]
            tree = fit([tokenizer.bos_id, *prompt], ended, max_length, max_prompt_length, counts)
            if tree:
                trees.append([np.array(ids, np.int32) for ids in tree])
                weights.append(example.weight)
    if not trees:
        raise DataError(f"no example is left of {len(examples)}: raise --max_length")
    return to_arrays(trees, weights, counts)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: one stream of packed trees, and where to read the log-probs off it."""

    tokens: torch.Tensor  # (T,) token ids
    positions: torch.Tensor  # (T,) restart at the end of the prompt for every branch
    segments: torch.Tensor  # (S, 4) prefix_start, prefix_end, start, end; stays on the CPU
    rows: torch.Tensor  # (M,) stream rows that predict: the prompt's last, then the response's
    targets: torch.Tensor  # (M,) the response tokens they predict, EOS included
    response: torch.Tensor  # (M,) which of the batch's responses each target belongs to
    response_ids: torch.Tensor  # (N,) which of the data set's responses these are
    lengths: torch.Tensor  # (N,) targets of each response
    chosen: torch.Tensor  # (P,) the responses that are preferred …
    rejected: torch.Tensor  # (P,) … to these; empty for SFT
    best: torch.Tensor  # (E,) the best response of each example
    weights: torch.Tensor  # (P,) weight of each pair; those of an example sum to its own

    def to(self, device: torch.device | str) -> "Batch":
        """The same on `device`, copied asynchronously where it can be."""
        move = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "segments"}
        if torch.device(device).type == "cuda":
            move = {name: tensor.pin_memory() for name, tensor in move.items()}
        return replace(self, **{k: t.to(device, non_blocking=True) for k, t in move.items()})


def ragged(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The ranges starts[i] : starts[i] + sizes[i], end to end: [5, 0], [2, 3] -> [5 6 0 1 2]."""
    shift = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    return np.arange(len(shift)) + shift


def collate(dataset: Dataset, examples: np.ndarray) -> Batch:
    """Pack the examples (indices) into one stream.

    Without any, a rank that has no work in this round gets a stand-in: the first example's tokens,
    but no pairs and no best response, so that it takes part in every collective and adds nothing.
    """
    real = len(examples) > 0
    examples = np.asarray(examples) if real else np.array([0])
    counts = dataset.trees[examples + 1] - dataset.trees[examples]  # sequences of each tree
    prompt = np.cumsum(counts) - counts  # where its prompt is among those of the batch
    sequence = ragged(dataset.trees[examples], counts)
    begin = dataset.offsets[sequence]
    size = dataset.offsets[sequence + 1] - begin
    read = size - 1  # the last token of a response is never read
    read[prompt] += 1
    start = np.cumsum(read) - read  # of each sequence in the stream
    trunk = np.repeat(prompt, counts)  # the prompt of each sequence
    positions = ragged(np.where(trunk == np.arange(len(trunk)), 0, size[trunk]), read)

    response = np.delete(np.arange(len(trunk)), prompt)
    trunk, lengths = trunk[response], size[response]
    rows = ragged(start[response] - 1, lengths)
    # The first token of every response is predicted from the last one of the prompt.
    rows[np.cumsum(lengths) - lengths] = start[trunk] + size[trunk] - 1
    ends = start[response] + read[response]
    first = response == trunk + 1  # continues the prompt in one segment; the others are prefixed
    prefixed = start[trunk], start[trunk] + size[trunk], start[response], ends
    segments = np.stack(np.where(first, (start[trunk],) * 3 + (ends,), prefixed), axis=1)

    best = prompt - np.arange(len(prompt))  # where its best response is among the batch's
    ranked = [range(b, b + n - 1) for b, n in zip(best, counts)]  # responses of each, best first
    pairs = [list(itertools.combinations(responses, 2)) for responses in ranked]
    weights = [w / len(p) for w, p in zip(dataset.weights[examples], pairs) for _ in p]
    chosen, rejected = np.array([p for tree in pairs for p in tree] * real).reshape(-1, 2).T
    integers = {
        "tokens": dataset.tokens[ragged(begin, read)],
        "positions": positions,
        "segments": segments[segments[:, 2] < segments[:, 3]],  # one-token responses read nothing
        "rows": rows,
        "targets": dataset.tokens[ragged(begin[response], lengths)],
        "response": np.repeat(np.arange(len(lengths)), lengths),
        "response_ids": ragged(dataset.trees[examples] - examples, counts - 1),
        "lengths": lengths,
        "chosen": chosen,
        "rejected": rejected,
        "best": best[: len(best) * real],
    }
    tensors = {k: torch.from_numpy(v.astype(np.int64)) for k, v in integers.items()}
    return Batch(**tensors, weights=torch.tensor(weights * real, dtype=torch.float32))


def pack(lengths: np.ndarray, examples: np.ndarray, budget: int, world_size: int) -> list[list]:
    """Spread the examples of one step over ranks and micro-batches, as evenly as lengths allow.

    Returns [rank][micro-batch] -> indices; the same number of micro-batches on every rank, as few
    as keep each within `budget` tokens (an example longer than that runs alone). Longest first to
    the least loaded (Graham's LPT rule); some may be empty.
    """
    order = examples[np.argsort(-lengths[examples], kind="stable")]
    count = max(1, math.ceil(lengths[order].sum() / (budget * world_size)))
    while True:
        heap = [(0, i) for i in range(count * world_size)]
        bins = [[] for _ in heap]
        for e in order.tolist():
            load, i = heap[0]
            bins[i].append(e)
            heapq.heapreplace(heap, (load + int(lengths[e]), i))
        over = any(load > budget and len(bins[i]) > 1 for load, i in heap)
        if not over:
            return [[np.array(b, np.int64) for b in bins[r::world_size]] for r in range(world_size)]
        count += 1 + count // 16


def examples_of(step: list[list]) -> np.ndarray:
    """The examples of a planned step, of all its ranks and micro-batches."""
    return np.concatenate([examples for rank in step for examples in rank])


def plan_epoch(
    lengths: np.ndarray, batch_size: int, budget: int, world_size: int, seed: tuple | None = None
) -> Iterator[list[list]]:
    """The steps of an epoch, each as `pack` returns it: a pure function of its arguments.

    With a seed the order is shuffled, without it is kept. The last step takes what is left.
    """
    order = np.arange(len(lengths))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    for first in range(0, len(order), batch_size):
        yield pack(lengths, order[first : first + batch_size], budget, world_size)


# The built-in experiment: reviews written by a grammar in which everything is known exactly.
#
#   Review of the new film Amber: The plot was sadly slow, but the cast seemed superb.
#
# A review has one to three clauses, drawn independently given what is reviewed, from the tables of
# probabilities below. Its true reward is the sum of its adverbs' and adjectives' rewards. Hence the
# probability of a review, the entropy and the optimal policy are sums over small tables.

KINDS = {  # what is reviewed: the aspects of a first, second and third clause
    "film": ("plot story", "cast lead director", "music pace ending"),
    "novel": ("plot story", "hero narrator villain", "prose pace ending"),
    "hotel": ("room lobby", "staff manager porter", "pool view breakfast"),
    "cafe": ("coffee cake", "staff waiter owner", "music view terrace"),
    "game": ("plot world", "hero boss villain", "music pace ending"),
}
EPITHETS = "new latest famous old local little celebrated other".split()
NAMES = """Amber Aurora Basil Birch Cedar Clover Cobalt Coral Cosmo Dahlia Delta Echo Ember Fern
    Garnet Harbor Hazel Indigo Iris Ivory Jasper Juniper Laurel Lotus Lunar Maple Marble Meadow
    Nova Olive Onyx Opal Orchid Pearl Raven Saffron Sierra Tulip Willow Zephyr""".split()
COUNTS = np.array([0.3, 0.4, 0.3])  # probability of one, two, three clauses
LINKS = ({" The": 1.0}, {", and the": 0.5, ", but the": 0.3, ", while the": 0.2},
         {", and the": 0.7, ", though the": 0.3})  # fmt: skip
VERBS = {"was": 0.5, "seemed": 0.2, "felt": 0.2, "remained": 0.1}
ADVERBS = {  # probability, reward
    "": (0.4, 0.0), "delightfully": (0.2, 0.8), "fairly": (0.25, 0.0), "sadly": (0.15, -0.8),
}  # fmt: skip
ADJECTIVES = {
    "superb": (0.06, 2.0), "charming": (0.12, 1.4), "good": (0.2, 0.8), "ordinary": (0.2, 0.0),
    "slow": (0.12, -0.6), "dark": (0.1, -0.6), "bad": (0.14, -1.4), "awful": (0.06, -2.0),
}  # fmt: skip
TASTES = {  # where a kind of thing differs: weight in place of probability, reward
    ("film", "dark"): (0.2, 0.4), ("novel", "dark"): (0.2, 1.2), ("hotel", "slow"): (0.06, -1.2),
    ("cafe", "slow"): (0.18, 0.6), ("game", "superb"): (0.12, 2.0),
}  # fmt: skip


class Clauses:
    """All clauses of a kind at one position: texts, probabilities p and rewards r, (clauses,)."""

    def __init__(self, kind: str, position: int):
        words = {a: TASTES.get((kind, a), (p, r)) for a, (p, r) in ADJECTIVES.items()}
        total, aspects = sum(p for p, _ in words.values()), KINDS[kind][position].split()
        tables = LINKS[position].items(), aspects, VERBS.items(), ADVERBS.items(), words.items()
        self.texts, p, r = [], [], []
        for (link, p1), aspect, (verb, p2), (adverb, (p3, r3)), (
            adjective,
            (p4, r4),
        ) in itertools.product(*tables):
            self.texts.append(" ".join(filter(None, (link, aspect, verb, adverb, adjective))))
            p.append(p1 / len(aspects) * p2 * p3 * p4 / total)
            r.append(r3 + r4)
        self.p, self.r, self.cumulative = np.array(p), np.array(r), np.cumsum(p)
        self.index = {text: i for i, text in enumerate(self.texts)}

    def tilt(self, beta: float) -> tuple[float, float]:
        """(Z, E r) of the distribution p·exp(r/β)/Z."""
        weights = self.p * np.exp(self.r / beta)
        return weights.sum(), weights @ self.r / weights.sum()


class Reviews:
    """The grammar: p(y|x), the true reward r(x, y), and π* ∝ p·exp(r/β) in closed form."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.clauses = {kind: [Clauses(kind, n) for n in range(3)] for kind in KINDS}
        names = itertools.product(EPITHETS, KINDS, NAMES)
        prompts = np.array(
            [f"Review of the {epithet} {kind} {name}:" for epithet, kind, name in names]
        )
        order = np.random.default_rng(0).permutation(len(prompts))
        self.prompts = {"eval": prompts[order[:200]], "train": prompts[order[200:]]}  # disjoint

    def clauses_for(self, prompt: str) -> list[Clauses]:
        return self.clauses[prompt.split()[4]]

    def score(self, prompt: str, response: str) -> tuple[float, float]:
        """(log p(y|x) in nats, r(x, y)); (-inf, nan) if the grammar cannot write the response."""
        texts = re.split("(?=,)", response.removesuffix("."))
        logp, reward = -math.inf, math.nan
        if response.endswith(".") and len(texts) <= len(COUNTS):
            pairs = list(zip(self.clauses_for(prompt), texts))
            if all(text in clauses.index for clauses, text in pairs):
                found = [(c.p[c.index[text]], c.r[c.index[text]]) for c, text in pairs]
                logp = math.log(COUNTS[len(texts) - 1]) + sum(math.log(p) for p, _ in found)
                reward = float(sum(r for _, r in found))
        return logp, reward

    def write(self, prompt: str, rng: np.random.Generator) -> str:
        """Draw y from p(y|x)."""
        count, *draws = rng.random(1 + len(COUNTS))
        clauses = self.clauses_for(prompt)[: 1 + np.searchsorted(COUNTS.cumsum(), count)]
        return "".join(c.texts[c.cumulative.searchsorted(u)] for c, u in zip(clauses, draws)) + "."

    def mean(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """Mean over the evaluation prompts of something known for each kind."""
        counts = Counter(prompt.split()[4] for prompt in self.prompts["eval"])
        return sum(count * values[kind] for kind, count in counts.items()) / counts.total()

    def entropy(self) -> float:
        """Exact entropy of a response given its prompt, in nats, mean over evaluation prompts."""
        reach = COUNTS[::-1].cumsum()[::-1]  # probability that there is an n-th clause
        own = -(COUNTS @ np.log(COUNTS))
        return float(self.mean({
            kind: own + sum(w * -(c.p @ np.log(c.p)) for w, c in zip(reach, clauses))
            for kind, clauses in self.clauses.items()
        }))  # fmt: skip

    def optimum(self, beta: float) -> tuple[float, float]:
        """(E r, KL(π*‖p)) of π* ∝ p(y|x)·exp(r/β) (Eq. 4), mean over evaluation prompts."""
        results = {}
        for kind, clauses in self.clauses.items():
            z, rewards = np.transpose([c.tilt(beta) for c in clauses])
            weights = COUNTS * z.cumprod()  # of one, two, three clauses under π*
            reward = weights @ rewards.cumsum() / weights.sum()
            results[kind] = np.array([reward, reward / beta - math.log(weights.sum())])
        reward, kl = self.mean(results)
        return float(reward), float(kl)

    def frontier(self, kl: float) -> float:
        """R*(KL): the highest expected reward of any policy at this KL from the grammar."""
        rewards, kls = np.transpose([self.optimum(beta) for beta in np.geomspace(1e5, 0.05, 300)])
        return float(np.interp(kl, kls, rewards))

    def demonstrations(self, count: int, split: str) -> list[Example]:
        """What SFT trains on: plain samples of the grammar."""
        rng = np.random.default_rng([self.seed, 1, split == "eval"])
        prompts = rng.choice(self.prompts[split], count).tolist()
        return [Example(prompt, (self.write(prompt, rng),)) for prompt in prompts]

    def preferences(self, count: int, split: str, deterministic: bool = False) -> list[Example]:
        """Pairs of samples, labelled by Bradley–Terry, P(a ≻ b) = σ(r(a) − r(b)), or by r."""
        rng = np.random.default_rng([self.seed, 2, split == "eval"])
        examples = []
        while len(examples) < count:
            prompt = str(rng.choice(self.prompts[split]))
            a, b = self.write(prompt, rng), self.write(prompt, rng)
            difference = self.score(prompt, a)[1] - self.score(prompt, b)[1]
            noise = 0.0 if deterministic else rng.logistic()
            if a != b and difference + noise != 0:
                examples.append(Example(prompt, (a, b) if difference + noise > 0 else (b, a)))
        return examples
