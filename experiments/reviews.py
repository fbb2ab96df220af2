"""The built-in experiment: reviews written by a grammar in which everything is known exactly.

    Review of the new film Amber: The plot was sadly slow, but the cast seemed superb.

A review has one to three clauses, drawn independently given what is reviewed, from the tables of
probabilities below. Its true reward is the sum of its adverbs' and adjectives' rewards. Hence the
probability of a review, the entropy and the optimal policy are sums over small tables, and a run
can be told how much of what is possible it reached. `python train.py` trains on it and ends with

    python experiments/reviews.py report out/reviews out/reviews/sft

responses that sample.py wrote are labelled, Bradley-Terry with the true reward, by

    python experiments/reviews.py label candidates.jsonl pairs.jsonl

and files of another size, or with labels that are always right, are written by

    python experiments/reviews.py write DIR --pairs=20000 --deterministic
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from extra.guard import hold
from extra.reward import measure_kl, response_logps
from model import CheckpointError, write_whole
from sample import draw, load, show

# What the built-in experiment changes, where the command line does not: a small model from nothing.
SETTINGS = {"beta": 1.0, "batch_size": 32, "learning_rate": 2e-4, "sft_learning_rate": 5e-3}
DEMONSTRATIONS, PAIRS, SAMPLES = 20_000, 6_000, 5_000  # for SFT, for DPO, of the report

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
        return float(np.interp(kl, *self.curve()[::-1]))

    def curve(self) -> np.ndarray:
        """(R*, KL) of π*, (2, points), from a β where it is the grammar to one that gains all."""
        return np.transpose([self.optimum(beta) for beta in np.geomspace(1e5, 0.05, 300)])

    def demonstrations(self, count: int, split: str) -> list[data.Example]:
        """What SFT trains on: plain samples of the grammar."""
        rng = np.random.default_rng([self.seed, 1, split == "eval"])
        prompts = rng.choice(self.prompts[split], count).tolist()
        return [data.Example(prompt, (self.write(prompt, rng),)) for prompt in prompts]

    def preferences(
        self, count: int, split: str, deterministic: bool = False
    ) -> list[data.Example]:
        """Pairs of samples, labelled by Bradley–Terry, P(a ≻ b) = σ(r(a) − r(b)), or by r."""
        rng = np.random.default_rng([self.seed, 2, split == "eval"])
        examples = []
        while len(examples) < count:
            prompt = str(rng.choice(self.prompts[split]))
            a, b = self.write(prompt, rng), self.write(prompt, rng)
            difference = round(self.score(prompt, a)[1] - self.score(prompt, b)[1], 6)
            noise = 0.0 if deterministic else rng.logistic()
            if a != b and difference + noise != 0:
                examples.append(data.Example(prompt, (a, b) if difference + noise > 0 else (b, a)))
        return examples


def rewards_of(grammar: Reviews, prompts: list[str], trees: list, tokenizer) -> np.ndarray:
    """True reward of each sampled [prompt, response], (N,); nan of one that has no end or is no
    review of the grammar's."""
    texts = [tokenizer.decode(response, continuation=True) for _, response in trees]
    ended = [response[-1] == tokenizer.eos_id for _, response in trees]
    return np.where(ended, [grammar.score(x, y)[1] for x, y in zip(prompts, texts)], np.nan)


def measure(checkpoint: str, other: str, count: int) -> dict:
    """A policy trained on the reviews, against its reference and the optimum: arrays over `count`
    samples of the evaluation prompts, and figures made of them."""
    policy, tokenizer = load(checkpoint)
    reference, _ = load(other)
    grammar = Reviews()
    prompts = np.random.default_rng(0).choice(grammar.prompts["eval"], count).tolist()
    found = {"prompts": prompts}
    for name, model in (("SFT", reference), ("DPO", policy)):
        trees = draw(model, tokenizer, prompts, max_new_tokens=64)
        texts = [tokenizer.decode(response, continuation=True) for _, response in trees]
        logps = np.array([grammar.score(x, y)[0] for x, y in zip(prompts, texts)])
        rewards = rewards_of(grammar, prompts, trees, tokenizer)
        accepted = np.isfinite(rewards)
        rewards = np.where(accepted, rewards, 0.0)
        found[name] = {"trees": trees, "texts": texts, "grammar": logps}
        found[name] |= {"rewards": rewards, "accepted": accepted}
    found["KL"] = measure_kl(policy, reference, trees)

    held_out = min(count, 2000)
    written, _ = data.encode(grammar.demonstrations(held_out, "eval"), tokenizer, 512, 256)
    tokens = written.targets(np.arange(len(written)))
    loss = -response_logps(reference, written).sum() / tokens
    entropy = grammar.entropy() / (tokens / len(written))
    pairs, _ = data.encode(grammar.preferences(held_out, "eval"), tokenizer, 512, 256)
    ratios = response_logps(policy, pairs) - response_logps(reference, pairs)  # w l w l …
    accuracy = (ratios[::2] > ratios[1::2]).mean()

    start = grammar.frontier(0.0)
    gain = found["DPO"]["rewards"].mean() - found["SFT"]["rewards"].mean()
    best = grammar.frontier(found["KL"].mean()) - start
    share_error = math.hypot(*(error(found[name]["rewards"]) for name in ("SFT", "DPO"))) / best
    figures = {"loss": loss, "entropy": entropy, "accuracy": accuracy, "start": start}
    return found | figures | {"gain": gain, "best": best, "share_error": share_error}


def error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return values.std(ddof=1) / len(values) ** 0.5


def report(checkpoint: str, other: str, count: int | None = None):
    """Print what `measure` finds, and a few samples."""
    count = SAMPLES if count is None else count
    m = measure(checkpoint, other, count)
    sft, dpo = m["SFT"], m["DPO"]
    show_mean = lambda values: f"{values.mean():.3f} ± {error(values):.3f}"
    share = f"{m['gain'] / m['best']:.1%} ± {m['share_error']:.1%}"
    print(f"""
{count:,} samples of the evaluation prompts, ± one standard error
  SFT loss per token   {m["loss"]:.4f} nats; entropy of the grammar {m["entropy"]:.4f}
  reward accuracy      {m["accuracy"]:.1%} of {min(count, 2000):,} held-out noisy labels
  true reward of SFT   {show_mean(sft["rewards"])}  (of the grammar itself {m["start"]:.3f})
  true reward of DPO   {show_mean(dpo["rewards"])}
  KL(π‖π_ref)          {show_mean(m["KL"])} nats
  reward gained        {m["gain"]:.3f} of R*(KL) − {m["start"]:.3f} = {m["best"]:.3f}: {share}
  accepted             SFT {sft["accepted"].mean():.1%}, DPO {dpo["accepted"].mean():.1%}""")
    for i in range(min(3, count)):
        show(m["prompts"][i], ["SFT", "DPO"], [sft["texts"][i], dpo["texts"][i]])


def write(
    out: Path,
    seed: int = 0,
    demonstrations: int = DEMONSTRATIONS,
    pairs: int = PAIRS,
    deterministic: bool = False,
) -> tuple[str, str, str]:
    """Write the files that train.py trains on; the paths of pairs, of held-out ones, for SFT."""
    grammar = Reviews(seed)
    files = {
        "pairs": grammar.preferences(pairs, "train", deterministic),
        "eval": grammar.preferences(min(1000, 2 * pairs), "eval", deterministic),
        "sft": grammar.demonstrations(demonstrations, "train"),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, examples in files.items():
        names = ("prompt", "response") if name == "sft" else ("prompt", "chosen", "rejected")
        rows = [dict(zip(names, (e.prompt, *e.responses))) for e in examples]
        if name != "sft":  # by how much the true reward prefers the chosen one, for --loss=odpo
            rewards = ([grammar.score(e.prompt, y)[1] for y in e.responses] for e in examples)
            rows = [row | {"margin": round(w - r, 6)} for row, (w, r) in zip(rows, rewards)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tuple(str(out / f"{name}.jsonl") for name in files)


def run_experiment(arguments: list[str]):
    """What `python train.py` does without other data: write the files, train on them, report."""
    import train

    given = {word.split("=")[0][2:] for word in arguments}
    for name in given & {"eval_data", "sft_data"}:
        sys.exit(f"train.py: --{name} would be ignored: the built-in experiment brings its own")
    first = os.environ.get("RANK", "0") == "0"
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--out_dir", default="out/reviews", type=Path)
    parser.add_argument("--resume", default="false", const="true", nargs="?")
    known, _ = parser.parse_known_args(arguments)
    out, arguments = known.out_dir, [f"--out_dir={known.out_dir}", *arguments]
    saved = train.read_point(out).get("settings") if known.resume == "true" else None
    if saved:
        train.main([f"--data={saved['data']}", *arguments])
        if Path(saved["data"]).name != "pairs.jsonl" or not (out / "sft.jsonl").is_file():
            return  # it was a run on somebody's own files
        settings = SimpleNamespace(**saved)
    else:
        try:
            later = ["--data=later", "--eval_data=later", *arguments, "--resume=false"]
            settings = train.parse_settings(later)  # whatever it says of --resume, train.main does
            if not (settings.sft_epochs or settings.init_from):
                raise data.DataError("--sft_epochs=0: DPO needs a model to begin from, --init_from")
            own = (out / "run.json").is_file() and not (out / "pairs.jsonl").is_file()
            if own and known.resume == "true":  # somebody's, on other files
                raise data.DataError(f"{out}: there is no state to resume; with --data it begins")
            if first:
                lock = hold(out)  # noqa: F841, until the run holds it, too
                write(out, settings.seed, DEMONSTRATIONS if settings.sft_epochs else 1, PAIRS)
        except (data.DataError, CheckpointError, OSError) as error:
            print(f"train.py: {error}", file=sys.stderr)
            sys.exit(2)
        files = {"data": "pairs", "eval_data": "eval", "sft_data": "sft"}
        unused = set() if settings.sft_epochs else {"sft_data", "sft_learning_rate"}
        unused |= set() if settings.epochs else {"beta", "learning_rate"}
        if settings.beta != train.Settings.beta:  # the loss has its own
            unused.add("beta")
        flags = SETTINGS | {name: out / f"{file}.jsonl" for name, file in files.items()}
        flags = {name: x for name, x in flags.items() if name not in given | unused}
        train.main([*[f"--{name}={x}" for name, x in flags.items()], *arguments])
    if first and settings.epochs:
        try:
            report(out, out / "sft" if settings.sft_epochs else settings.init_from)
        except KeyboardInterrupt:  # the run is saved
            sys.exit(130)
        except (data.DataError, CheckpointError, OSError) as error:
            sys.exit(f"train.py: the run is saved, but there is no report of it: {error}")


def prefer(grammar: Reviews, prompt: str, a: str, b: str, rng) -> tuple[str, str]:
    """The better and the worse one, by Bradley–Terry. One that the grammar cannot write is worse
    than any that it can."""
    better, worse = (np.nan_to_num(grammar.score(prompt, y)[1], nan=-9) for y in (a, b))
    return (b, a) if better - worse + rng.logistic() < 0 else (a, b)


def label(candidates: str, out: str):
    """Pairs from sampled responses: neighbours in each list, as `prefer` has it."""
    grammar, rng, lines, prompts = Reviews(), np.random.default_rng(0), [], set()
    prompts.update(*grammar.prompts.values())
    for where, row in data.read_jsonl(str(candidates)):
        prompt, texts = row.get("prompt"), row.get("candidates")
        fine = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        if str(prompt) not in prompts or not fine:
            wanted = "a prompt of the grammar's, and candidates, as sample.py --out writes them"
            raise data.DataError(f"{where}: the row needs {wanted}")
        for a, b in zip(texts[::2], texts[1::2]):
            if a != b:
                chosen, rejected = prefer(grammar, prompt, a, b, rng)
                pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                lines.append(json.dumps(pair) + "\n")
    write_whole(Path(out), "".join(lines).encode())
    print(f"{len(lines):,} labelled pairs in {out}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    reporting = commands.add_parser(
        "report", help="measure a run against its reference and the optimum"
    )
    reporting.add_argument("checkpoint")
    reporting.add_argument("reference")
    reporting.add_argument("--count", type=int, default=5000, help="samples (default 5000)")
    writing = commands.add_parser("write", help="write the files that train.py trains on")
    writing.add_argument("directory")
    for name, count in (("seed", 0), ("demonstrations", DEMONSTRATIONS), ("pairs", PAIRS)):
        writing.add_argument(f"--{name}", type=int, default=count, help=f"(default {count})")
    writing.add_argument("--deterministic", action="store_true", help="label by the true reward")
    labelling = commands.add_parser("label", help="label candidates: pairs from sampled responses")
    labelling.add_argument("candidates")
    labelling.add_argument("out")
    args = parser.parse_args()
    for name, least in (("count", 2), ("seed", 0), ("demonstrations", 0), ("pairs", 0)):
        if getattr(args, name, least) < least:
            parser.error(f"--{name} must be at least {least}")
    try:
        if args.command == "report":
            report(args.checkpoint, args.reference, args.count)
        elif args.command == "write":
            sizes = args.seed, args.demonstrations, args.pairs
            write(Path(args.directory), *sizes, args.deterministic)
        else:
            label(args.candidates, args.out)
    except (data.DataError, CheckpointError, OSError) as error:
        sys.exit(f"reviews.py: {error}")


if __name__ == "__main__":
    main()
