"""What is printed about a run: the built-in experiment's report, the table of losses, the benchmark.

Each number against a plain computation of its own, on a stopped clock where it is one of time.
"""

import fcntl
import functools
import json
import math
import re
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import benchmark
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    SHAPES,
    make_model,
    random_dataset,
    run_here,
    save_tokenizer,
    write_jsonl,
)
from test_model import plain_logits, sequence

import data
import dpo
import model as model_module
import train
from experiments import losses, reviews
from extra import attention, checkpoints, encoded
from extra.chunked import ChunkedLogps
from extra.guard import sha256
from extra.objectives import LOSSES
from model import (
    CheckpointError,
    ModelConfig,
    RMSNorm,
    Transformer,
    load_config,
    load_pretrained,
    save_pretrained,
    token_logps,
)

# The grammar, once more, from its published tables alone.


def adjectives_of(kind: str) -> dict[str, tuple[float, float]]:
    """Adjective -> probability and reward, for this kind of thing."""
    words = {a: reviews.TASTES.get((kind, a), entry) for a, entry in reviews.ADJECTIVES.items()}
    total = sum(weight for weight, _ in words.values())
    return {adjective: (weight / total, reward) for adjective, (weight, reward) in words.items()}


def parse_review(prompt: str, review: str) -> list[dict] | None:
    """The words of each clause; None where the grammar cannot write the review."""
    kind, clauses = re.fullmatch(r"Review of the \w+ (\w+) \w+:", prompt).group(1), []
    if not review.endswith("."):
        return None
    for n, text in enumerate(review[:-1].split(", ")):
        found = re.fullmatch(r"( The|\w+ the) (\w+) (\w+)(?: (\w+))? (\w+)", text)
        if not found or n == 3:
            return None
        link, aspect, verb, adverb, adjective = found.groups(default="")
        clause = {"link": link if n == 0 else f", {link}", "aspect": aspect, "verb": verb}
        clause |= {"adverb": adverb, "adjective": adjective}
        known = {"link": reviews.LINKS[n], "aspect": reviews.KINDS[kind][n].split()}
        known |= {"verb": reviews.VERBS, "adverb": reviews.ADVERBS, "adjective": reviews.ADJECTIVES}
        if any(word not in known[name] for name, word in clause.items()):
            return None
        clauses.append(clause)
    return clauses


def plain_score(prompt: str, review: str) -> tuple[float, float]:
    """log p(y|x) and the true reward, one word after the other."""
    kind, clauses = prompt.split()[4], parse_review(prompt, review)
    if clauses is None:
        return -math.inf, math.nan
    p, reward = reviews.COUNTS[len(clauses) - 1], 0.0
    for n, clause in enumerate(clauses):
        p *= reviews.LINKS[n][clause["link"]] * reviews.VERBS[clause["verb"]]
        p /= len(reviews.KINDS[kind][n].split())
        adverb, adjective = (
            reviews.ADVERBS[clause["adverb"]],
            adjectives_of(kind)[clause["adjective"]],
        )
        p *= adverb[0] * adjective[0]
        reward += adverb[1] + adjective[1]
    return math.log(p), reward


@functools.cache
def kinds_of_evaluation() -> Counter:
    return Counter(prompt.split()[4] for prompt in reviews.Reviews().prompts["eval"])


def mean_of_evaluation(values: dict[str, float]) -> float:
    kinds = kinds_of_evaluation()
    return sum(values[kind] * count for kind, count in kinds.items()) / sum(kinds.values())


def plain_entropy() -> float:
    """A clause's entropy is that of its words, which are independent."""
    entropy = lambda values: -sum(p * math.log(p) for p in values)
    found = {}
    for kind, aspects in reviews.KINDS.items():
        of_words = entropy(reviews.VERBS.values())
        of_words += entropy(p for p, _ in reviews.ADVERBS.values())
        of_words += entropy(p for p, _ in adjectives_of(kind).values())
        found[kind] = entropy(reviews.COUNTS)
        for n, reached in enumerate((1.0, 0.7, 0.3)):
            own = of_words + entropy(reviews.LINKS[n].values()) + math.log(len(aspects[n].split()))
            found[kind] += reached * own
    return mean_of_evaluation(found)


@functools.cache
def distribution_of_reward(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """All values of a review's reward, and their probabilities under the grammar."""
    of_clause, so_far, found = Counter(), Counter({0.0: 1.0}), Counter()
    for p, r in reviews.ADVERBS.values():
        for q, s in adjectives_of(kind).values():
            of_clause[round(r + s, 6)] += p * q
    for share in reviews.COUNTS:
        longer = Counter()
        for r, p in so_far.items():
            for s, q in of_clause.items():
                longer[round(r + s, 6)] += p * q
        so_far = longer
        for r, p in so_far.items():
            found[r] += share * p
    return np.array([*found]), np.array([*found.values()])


def plain_optimum(beta: float) -> tuple[float, float]:
    """E r and KL from the grammar of π* ∝ p·exp(r/β): a tilted sum over the reward's values."""
    rewards, kls = {}, {}
    for kind in reviews.KINDS:
        r, p = distribution_of_reward(kind)
        tilted = p * np.exp(r / beta)
        tilted /= tilted.sum()
        rewards[kind], kls[kind] = tilted @ r, tilted @ np.log(tilted / p)
    return mean_of_evaluation(rewards), mean_of_evaluation(kls)


def plain_frontier(kl: float) -> float:
    """The reward of the optimal policy at this KL, whose β is found by bisection."""
    low, high = math.log(0.05), math.log(1e5)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if plain_optimum(math.exp(middle))[1] > kl else (low, middle)
    return plain_optimum(math.exp(low))[0]


def test_the_grammar_samples_by_its_tables():
    """Words, links, aspects and numbers of clauses by their probabilities, in every kind; and each
    review's log-probability and reward are those of its words."""
    grammar, rng = reviews.Reviews(), np.random.default_rng(5)
    prompts = {prompt.split()[4]: prompt for prompt in grammar.prompts["train"]}
    assert prompts.keys() == reviews.KINDS.keys()
    for kind, prompt in prompts.items():
        written = [grammar.write(prompt, rng) for _ in range(3000)]
        parsed = [parse_review(prompt, review) for review in written]
        seen = {"count": Counter(map(len, parsed))}
        expected = {"count": dict(zip((1, 2, 3), reviews.COUNTS))}
        for n in range(3):
            clauses = [clauses[n] for clauses in parsed if len(clauses) > n]
            for name in ("link", "aspect"):
                seen[name, n] = Counter(clause[name] for clause in clauses)
            aspects = reviews.KINDS[kind][n].split()
            expected["aspect", n] = dict.fromkeys(aspects, 1 / len(aspects))
            expected["link", n] = reviews.LINKS[n]
        for n in (0, 1):  # a clause says nothing about the next
            both = [clauses[n : n + 2] for clauses in parsed if len(clauses) > n + 1]
            seen["next", n] = Counter((a["aspect"], b["link"]) for a, b in both)
            expected["next", n] = {
                (aspect, link): p * q
                for aspect, p in expected["aspect", n].items()
                for link, q in expected["link", n + 1].items()
            }
        clauses = [clause for clauses in parsed for clause in clauses]
        for name in ("verb", "adverb", "adjective"):
            seen[name] = Counter(clause[name] for clause in clauses)
        expected["verb"] = reviews.VERBS
        expected["adverb"] = {word: p for word, (p, _) in reviews.ADVERBS.items()}
        expected["adjective"] = {word: p for word, (p, _) in adjectives_of(kind).items()}
        assert seen.keys() == expected.keys()
        for name, probabilities in expected.items():
            assert sum(probabilities.values()) == pytest.approx(1)
            assert seen[name].keys() <= probabilities.keys()
            for word, p in probabilities.items():
                total = seen[name].total()
                error = math.sqrt(p * (1 - p) / total) + 1e-9
                share = seen[name][word] / total
                assert share == pytest.approx(p, abs=4.5 * error), (kind, name, word)
        for review in written[:200]:
            assert grammar.score(prompt, review) == pytest.approx(plain_score(prompt, review))


def test_optimum_and_frontier_are_tilted_sums_over_rewards():
    """Means over the evaluation prompts, of all kinds."""
    grammar = reviews.Reviews()
    assert grammar.entropy() == pytest.approx(plain_entropy(), rel=1e-9)
    for beta in (0.3, 1.0, 4.0):
        assert grammar.optimum(beta) == pytest.approx(plain_optimum(beta), rel=1e-9)
    for kl in (0.0, 0.2, 1.1, 3.0, 6.0):
        assert grammar.frontier(kl) == pytest.approx(plain_frontier(kl), abs=2e-3)


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_the_files_of_the_experiment_say_what_they_are_for(tmp_path):
    """Names, sizes, prompts of the right split, the margin as the true reward has it, the seed."""
    prompts = reviews.Reviews(3).prompts
    held_out, others = set(prompts["eval"]), set(prompts["train"])
    assert (len(held_out), len(others), len(held_out & others)) == (200, 1400, 0)
    paths = reviews.write(tmp_path / "new" / "a", 3, 120, 90)
    names = ("pairs.jsonl", "eval.jsonl", "sft.jsonl")
    assert paths == tuple(str(tmp_path / "new" / "a" / name) for name in names)
    pairs, evaluation, demonstrations = map(read_rows, paths)
    assert (len(pairs), len(evaluation), len(demonstrations)) == (90, 180, 120)
    for row in demonstrations:
        assert row.keys() == {"prompt", "response"} and row["prompt"] in others
        assert parse_review(row["prompt"], row["response"])
    for rows, split in ((pairs, others), (evaluation, held_out)):
        margins = []
        for row in rows:
            assert row.keys() == {"prompt", "chosen", "rejected", "margin"}
            assert row["prompt"] in split
            better, worse = (plain_score(row["prompt"], row[k])[1] for k in ("chosen", "rejected"))
            assert row["margin"] == pytest.approx(better - worse, abs=1e-6)
            margins.append(row["margin"])
        assert np.mean(np.array(margins) > 0) > 0.7 and min(margins) < -0.2, "labels are noisy"
    sure = [read_rows(path) for path in reviews.write(tmp_path / "sure", 3, 1, 600, True)[:2]]
    assert list(map(len, sure)) == [600, 1000], "no more than a thousand are held out"
    assert min(row["margin"] for rows in sure for row in rows) >= 0
    again, other = (reviews.write(tmp_path / str(seed), seed, 120, 90) for seed in (3, 4))
    for path, same, different in zip(paths, again, other):
        assert Path(path).read_bytes() == Path(same).read_bytes() != Path(different).read_bytes()
        rows = list(zip(read_rows(path), read_rows(different)))
        assert sum(a == b for a, b in rows) < 0.1 * len(rows)
    grammar = reviews.Reviews()
    both = (grammar.demonstrations(300, split) for split in ("train", "eval"))
    alike = sum(a.responses == b.responses for a, b in zip(*both))
    assert alike < 15, "what is held out is not what was trained on, under other prompts"


def test_sure_labels_are_of_different_rewards():
    """A tie, be it only up to rounding, has no better one: it is not a pair."""
    for example in reviews.Reviews().preferences(400, "train", deterministic=True):
        better, worse = (plain_score(example.prompt, y)[1] for y in example.responses)
        assert better > worse + 0.01, example


def test_mistakes_are_sentences(tmp_path, monkeypatch):
    """Of reviews.py, losses.py, and of `python train.py`, before anything is trained."""

    def refused(*words) -> str:
        monkeypatch.setattr("sys.argv", ["reviews.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            reviews.main()
        return str(end.value)

    prompt = str(reviews.Reviews().prompts["eval"][0])
    rows = [{"prompt": "Who?", "candidates": ["a", "b"]}, {"prompt": [3], "candidates": ["a"]},
            {"prompt": prompt, "responses": ["a", "b"]}, {"prompt": prompt, "candidates": [[1]]}]  # fmt: skip
    path, out = tmp_path / "candidates.jsonl", tmp_path / "out"
    for row in rows:
        write_jsonl(path, [row])
        why = f"reviews.py: {path}:1: the row needs a prompt of the grammar's, and candidates"
        assert refused("label", path, out).startswith(why)
    assert not out.exists()
    write_jsonl(path, [{"prompt": prompt, "candidates": ["a", "b"]}])
    assert re.fullmatch("reviews.py: .*No such file.*/no/x.*", refused("label", path, "/no/x"))
    assert re.fullmatch("reviews.py: .*/proc/x'", refused("write", "/proc/x"))
    for words in (("report", "a", "b", "--count=1"), ("write", out, "--seed=-1"),
                  ("write", out, "--demonstrations=-1"), ("write", out, "--pairs=-1")):  # fmt: skip
        said = run_here("experiments/reviews.py", *words, expect=2).stderr
        assert f"{words[-1].split('=')[0]} must be at least " in said
    said = run_here("experiments/losses.py", "--count=1", expect=2).stderr
    assert "--count must be at least 2" in said
    said = run_here("train.py", "--sft_epochs=0", f"--out_dir={out}", expect=2).stderr
    assert said == "train.py: --sft_epochs=0: DPO needs a model to begin from, --init_from\n"
    assert not (out / "run.json").exists()


def test_label_pairs_neighbours(tmp_path, capsys):
    """First with second, third with fourth; the odd one and what is the same twice is left out; the
    better by Bradley-Terry, by more than noise; what the grammar cannot write is worse."""
    grammar, rng = reviews.Reviews(), np.random.default_rng(2)
    prompt = str(grammar.prompts["train"][1])
    good = " The " + reviews.KINDS[prompt.split()[4]][0].split()[0] + " was ordinary."
    rows = []
    for _ in range(500):
        texts = [grammar.write(prompt, rng) for _ in range(5)]
        rows.append({"prompt": prompt, "candidates": [*texts[:4], good, good, texts[4]]})
    rows += [{"prompt": prompt, "candidates": [good, "nonsense", "nonsense", good]}] * 100
    path, out = tmp_path / "candidates.jsonl", tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reviews.label(path, str(out))
    found = read_rows(out)
    assert capsys.readouterr().out == f"{len(found):,} labelled pairs in {out}\n"
    expected = []
    for row in rows:
        texts = row["candidates"]
        neighbours = [texts[n : n + 2] for n in range(0, len(texts) - 1, 2)]
        expected += [{*pair} for pair in neighbours if pair[0] != pair[1]]
    assert [{row["chosen"], row["rejected"]} for row in found] == expected
    assert all(row["prompt"] == prompt and len(row) == 3 for row in found)
    right, probabilities = [], []
    for row in found:
        if "nonsense" in (row["chosen"], row["rejected"]):
            assert row["rejected"] == "nonsense"
        else:
            a, b = (plain_score(prompt, row[name])[1] for name in ("chosen", "rejected"))
            if abs(a - b) > 1e-9:
                right.append(a > b)
                probabilities.append(1 / (1 + math.exp(-abs(a - b))))
    probabilities = np.array(probabilities)
    error = (probabilities * (1 - probabilities)).mean() ** 0.5 / len(right) ** 0.5
    assert np.mean(right) == pytest.approx(probabilities.mean(), abs=4 * error)
    assert probabilities.mean() < 1 - 8 * error


def run_reviews(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["reviews.py", *map(str, words)])
    reviews.main()


def test_each_flag_of_the_reviews_script_acts(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(reviews, "report", lambda *given: asked.append(given))
    run_reviews(monkeypatch, "report", "policy", "reference", "--count=7")
    run_reviews(monkeypatch, "report", "policy", "reference")
    assert asked == [("policy", "reference", 7), ("policy", "reference", 5000)]
    assert reviews.SAMPLES == 5000
    flags = ["--seed=5", "--demonstrations=6", "--pairs=4"]
    run_reviews(monkeypatch, "write", tmp_path / "noisy", *flags)
    run_reviews(monkeypatch, "write", tmp_path / "sure", "--deterministic", *flags)
    for name, sure in (("noisy", False), ("sure", True)):
        reviews.write(tmp_path / "expected", 5, 6, 4, sure)
        for file in ("pairs", "eval", "sft"):
            written, expected = (tmp_path / d / f"{file}.jsonl" for d in (name, "expected"))
            assert written.read_bytes() == expected.read_bytes()
    pairs = [(tmp_path / name / "eval.jsonl").read_bytes() for name in ("noisy", "sure")]
    assert pairs[0] != pairs[1]
    monkeypatch.setattr(reviews, "write", lambda *given: asked.append(given))
    run_reviews(monkeypatch, "write", "somewhere")
    assert asked[2:] == [(Path("somewhere"), 0, 20_000, 6_000, False)]
    monkeypatch.setattr(reviews, "label", lambda *given: asked.append(given))
    run_reviews(monkeypatch, "label", "candidates.jsonl", "pairs.jsonl")
    assert asked[3:] == [("candidates.jsonl", "pairs.jsonl")]
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["reviews.py", "report", str(tmp_path / "no"), "no"])
    with pytest.raises(SystemExit, match=r"reviews\.py: .*config\.json: not found"):
        reviews.main()


# The report.


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    """A policy and its reference, a few nats apart, with a tokenizer of reviews."""
    root = tmp_path_factory.mktemp("checkpoints")
    data.Tokenizer.train(reviews.Reviews().demonstrations(300, "train"), root, 340)
    tokenizer = data.Tokenizer(root)
    reference = make_model(ModelConfig(tokenizer.vocab_size, 16, 32, 1, 2, 2, 8), 2.0)
    for name, noise in (("reference", 0.0), ("policy", 0.06)):
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(noise * torch.randn(parameter.shape))
        save_pretrained(reference, save_tokenizer(tokenizer, root / name))
    return root / "policy", root / "reference"


def invented(
    prompts: list[str], tokenizer, seed: int, best_of: int
) -> tuple[list, list[str], list]:
    """Samples of the prompts that the grammar might have written, better with best_of, among them
    some that it cannot write, and some that were cut off: trees of ids, texts, and what counts."""
    grammar, rng, trees, texts, accepted = (
        reviews.Reviews(),
        np.random.default_rng(seed),
        [],
        [],
        [],
    )
    for prompt in prompts:
        drawn = [grammar.write(prompt, rng) for _ in range(best_of)]
        text = max(drawn, key=lambda review, prompt=prompt: plain_score(prompt, review)[1])
        kind = rng.choice(["whole", "cut", "unfinished", "nonsense"], p=[0.7, 0.1, 0.1, 0.1])
        text = {"unfinished": text[:-1], "nonsense": " The sea was good."}.get(kind, text)
        ids = tokenizer.encode(text, continuation=True)
        response = ids if kind == "cut" else [*ids, tokenizer.eos_id]
        trees.append([[tokenizer.bos_id, *tokenizer.encode(prompt)], response])
        texts.append(text)
        accepted.append(kind == "whole")
    return trees, texts, accepted


def plain_response_logp(model, prompt: list[int], response: list[int]) -> float:
    logps = plain_logits(model, prompt + response).log_softmax(-1)
    first = len(prompt) - 1
    return sum(logps[first + i, token].item() for i, token in enumerate(response))


def plain_kl(policy, reference, prompt: list[int], response: list[int]) -> float:
    """Over every prefix of the response, the KL of the next token, a sum over the vocabulary."""
    logp, logq = (plain_logits(m, prompt + response).log_softmax(-1) for m in (policy, reference))
    rows = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return sum((logp[t].exp() * (logp[t] - logq[t])).sum().item() for t in rows)


@torch.no_grad()
def test_every_figure_of_the_report_is_a_plain_sum(two_checkpoints, monkeypatch):
    """Two models, and samples of each that are partly no review, partly cut off."""
    policy, reference = (load_pretrained(directory).double() for directory in two_checkpoints)
    tokenizer, count, asked = data.Tokenizer(two_checkpoints[0]), 60, []

    def draw(model, given, prompts, **options):
        is_policy = torch.equal(model.norm.weight, policy.norm.weight.float())
        asked.append(("DPO" if is_policy else "SFT", prompts, options))
        assert given.proto == tokenizer.proto
        return invented(prompts, tokenizer, *((8, 2) if is_policy else (9, 1)))[0]

    monkeypatch.setattr(reviews, "draw", draw)
    found = reviews.measure(*map(str, two_checkpoints), count)
    prompts, grammar = found["prompts"], reviews.Reviews()
    assert [name for name, _, _ in asked] == ["SFT", "DPO"]
    assert all(
        given == prompts and options == {"max_new_tokens": 64} for _, given, options in asked
    )
    assert len(prompts) == count and {*prompts} <= {*grammar.prompts["eval"].tolist()}
    assert len({*prompts}) > count / 2

    plain_error = lambda x: statistics.stdev(x) / math.sqrt(len(x))
    rewards, errors = {}, {}
    for name, seed, best_of in (("SFT", 9, 1), ("DPO", 8, 2)):
        trees, texts, accepted = invented(prompts, tokenizer, seed, best_of)
        scores = [plain_score(x, y) for x, y in zip(prompts, texts)]
        rewards[name] = [r if good else 0.0 for good, (_, r) in zip(accepted, scores)]
        errors[name] = plain_error(rewards[name])
        part = found[name]
        assert part["texts"] == texts and part["accepted"].tolist() == accepted
        assert 0.5 < np.mean(accepted) < 0.9
        assert part["rewards"] == pytest.approx(rewards[name])
        assert part["grammar"] == pytest.approx([logp for logp, _ in scores])
        assert part["trees"] == trees
        assert reviews.error(part["rewards"]) == pytest.approx(errors[name])
    kl = [plain_kl(policy, reference, *tree) for tree in trees]  # of the policy's samples
    assert found["KL"] == pytest.approx(kl, rel=1e-3)
    assert 0.3 < np.mean(kl) < 4

    written = grammar.demonstrations(count, "eval")
    ids = [data.token_ids(example, tokenizer) for example in written]
    tokens = sum(len(response) for _, response in ids)
    logps = [plain_response_logp(reference, *tree) for tree in ids]
    assert found["loss"] == pytest.approx(-sum(logps) / tokens, rel=1e-4)
    assert found["entropy"] == pytest.approx(plain_entropy() * count / tokens, rel=1e-9)
    right = []
    for example in grammar.preferences(count, "eval"):
        prompt, *responses = data.token_ids(example, tokenizer)
        chosen, rejected = (
            plain_response_logp(policy, prompt, y) - plain_response_logp(reference, prompt, y)
            for y in responses
        )
        right.append(chosen > rejected)
    assert found["accuracy"] == pytest.approx(np.mean(right))

    start, gain = plain_frontier(0.0), np.mean(rewards["DPO"]) - np.mean(rewards["SFT"])
    best = plain_frontier(np.mean(kl)) - start
    assert gain > 0.3 and abs(start) > 0.1
    assert found["start"] == pytest.approx(start, abs=1e-3)
    assert found["gain"] == pytest.approx(gain)
    assert found["best"] == pytest.approx(best, abs=5e-3)
    share_error = math.sqrt(errors["SFT"] ** 2 + errors["DPO"] ** 2) / best
    assert found["share_error"] == pytest.approx(share_error, rel=1e-2)


def test_at_most_two_thousand_held_out_labels(two_checkpoints, monkeypatch):
    """As many demonstrations and pairs as samples, up to there."""
    monkeypatch.setattr(reviews, "draw", lambda m, t, prompts, **_: [[[1], [5, t.eos_id]]] * len(prompts))  # fmt: skip
    monkeypatch.setattr(reviews, "measure_kl", lambda p, r, trees: np.ones(len(trees)))
    sizes = []
    empty = lambda m, dataset: sizes.append(len(dataset)) or np.zeros(dataset.responses())
    monkeypatch.setattr(reviews, "response_logps", empty)
    found = reviews.measure(*two_checkpoints, 2100)
    assert sizes == [2000, 2000, 2000]
    assert not found["SFT"]["accepted"].any() and found["accuracy"] == 0


def test_the_report_prints_these_figures_and_samples(monkeypatch, capsys):
    """Line by line; three prompts, SFT on the left and DPO on the right."""
    rng = np.random.default_rng(0)

    def samples(name, reward, accepted):
        texts = [f" {name} wrote review number {n} of the film, at some length." for n in range(9)]
        return {"texts": texts, "rewards": rng.normal(reward, 1, 9), "accepted": np.arange(9) < accepted}  # fmt: skip

    figures = {
        "SFT": samples("before", 0.7, 6), "DPO": samples("after", 2.1, 8), "KL": rng.normal(1, 0.2, 9),
        "prompts": [f"Review of the new film {n}:" for n in range(9)], "loss": 0.87654, "entropy": 0.76543,
        "accuracy": 0.7512, "start": 0.3456, "gain": 1.4321, "best": 1.7531, "share_error": 0.0234,
    }  # fmt: skip
    asked = []
    monkeypatch.setattr(reviews, "measure", lambda *given: asked.append(given) or figures)
    reviews.report("policy", "reference", 9)
    printed = capsys.readouterr().out
    mean = lambda x: f"{sum(x) / 9:.3f} ± {statistics.stdev(x) / 3:.3f}"
    sft, dpo_, kl = (figures["SFT"], figures["DPO"], figures["KL"])
    expected = f"""
9 samples of the evaluation prompts, ± one standard error
  SFT loss per token   0.8765 nats; entropy of the grammar 0.7654
  reward accuracy      75.1% of 9 held-out noisy labels
  true reward of SFT   {mean(sft["rewards"])}  (of the grammar itself 0.346)
  true reward of DPO   {mean(dpo_["rewards"])}
  KL(π‖π_ref)          {mean(kl)} nats
  reward gained        1.432 of R*(KL) − 0.346 = 1.753: 81.7% ± 2.3%
  accepted             SFT 66.7%, DPO 88.9%
"""
    head, *shown = printed.split("\nReview of ")
    assert head == expected
    for n, block in enumerate(shown):
        prompt, *lines = block.splitlines()
        assert prompt == f"the new film {n}:"
        columns = [" ".join(line[a:b].strip() for line in lines) for a, b in ((0, 46), (46, 99))]
        assert columns == [f"[{name}]{figures[name]['texts'][n]}" for name in ("SFT", "DPO")]
    assert len(shown) == 3
    reviews.report("policy", "reference")
    printed = capsys.readouterr().out
    assert printed.startswith("\n5,000 samples") and " of 2,000 held-out" in printed
    assert asked == [("policy", "reference", 9), ("policy", "reference", 5000)]


def test_the_experiment_trains_on_its_files_and_reports(tmp_path, monkeypatch, capsys):
    """What `python train.py` gives to the trainer and to the report, for the flags there are."""
    calls = []
    monkeypatch.setattr(train, "main", lambda words: calls.append(("train", words)))
    monkeypatch.setattr(reviews, "report", lambda *given: calls.append(("report", *given)))
    monkeypatch.setattr(reviews, "write", lambda *given: calls.append(("write", *given)))
    save_pretrained(Transformer(SHAPES["tied"]), tmp_path / "start")

    def run(*flags, ranked="0"):
        monkeypatch.setenv("RANK", ranked)
        calls.clear()
        reviews.run_experiment([f"--out_dir={tmp_path / 'run'}", *flags])
        found = {name: given for name, *given in calls}
        assert len(found) == len(calls)
        return found | {"settings": train.parse_settings(found["train"][0])}

    out, usual = tmp_path / "run", train.Settings()
    found = run()
    s = found["settings"]
    assert (s.beta, s.batch_size, s.learning_rate, s.sft_learning_rate) == (1, 32, 2e-4, 5e-3)
    files = [str(out / f"{name}.jsonl") for name in ("pairs", "eval", "sft")]
    assert [s.data, s.eval_data, s.sft_data] == files
    names = ("data", "eval_data", "sft_data", "out_dir", "beta", "batch_size", "learning_rate")
    names += ("sft_learning_rate", "options")
    assert s == replace(usual, **{name: getattr(s, name) for name in names})
    assert found["write"] == [out, 0, 20_000, 6_000]
    assert found["report"] == [out, out / "sft"]
    found = run("--beta=0.3", "--seed=4", "--batch_size=8", "--learning_rate=1e-5")
    s = found["settings"]
    assert (s.beta, s.batch_size, s.learning_rate, s.seed) == (0.3, 8, 1e-5, 4)
    assert found["write"][1] == 4
    assert run("--loss=simpo")["settings"].beta == 2, "its own"
    assert run("--loss=ipo")["settings"].beta == 1
    found = run("--sft_epochs=0", f"--init_from={tmp_path / 'start'}")
    assert found["report"] == [out, str(tmp_path / "start")] and found["write"][2] == 1
    assert not found["settings"].sft_data
    found = run("--epochs=0")
    assert "report" not in found and found["settings"].sft_data == files[2]
    found = run(ranked="1")
    assert found.keys() == {"train", "settings"}, "rank 0 alone writes and reports"
    with pytest.raises(SystemExit, match="--eval_data would be ignored"):
        run("--eval_data=mine.jsonl")
    with pytest.raises(SystemExit) as error:
        run("--beta=-1")
    assert error.value.code == 2 and not calls
    calls.clear()
    reviews.run_experiment(["--max_steps=1"])
    assert calls[0][1] == Path("out/reviews") and "--out_dir=out/reviews" in calls[1][1]

    capsys.readouterr()
    found = run("--resume", "--seed=3")
    said = f"{out} has no saved state yet: the run starts from the beginning\n"
    assert capsys.readouterr().out == said, "as the trainer reads its flags, once"
    assert found["write"][1] == found["settings"].seed == 3 and found["settings"].resume
    assert found["report"] == [out, out / "sft"], "without a state it begins"
    assert found.keys() == {"write", "train", "report", "settings"}

    state = out / "resume" / "dpo-4" / "point.json"
    state.parent.mkdir(parents=True)
    content = {"settings": vars(replace(usual, data=files[0], out_dir=str(out)))}
    content |= {"cwd": str(Path.cwd()), "digests": {}}

    def leave():
        state.write_text(json.dumps(content))
        manifest = {state.name: [state.stat().st_size, sha256(state)]}
        state.with_name("manifest.json").write_text(json.dumps(manifest))

    leave()
    assert "report" not in run("--resume"), "somebody's own run"
    (out / "sft.jsonl").write_text("")
    found = run("--resume")
    assert found["settings"].data == files[0] and "write" not in found
    assert found["report"] == [out, out / "sft"]
    content["settings"]["data"] = "mine.jsonl"
    leave()
    assert "report" not in run("--resume"), "on files of one's own, beside an old experiment"


def test_the_experiment_leaves_another_run_alone(tmp_path, monkeypatch, capsys):
    """Nothing is written where a run is at work; what it works on stays what it is."""
    calls = []
    monkeypatch.setattr(train, "main", calls.append)
    monkeypatch.setattr(reviews, "report", lambda *given: calls.append(given))
    monkeypatch.setattr(reviews, "DEMONSTRATIONS", 3)
    monkeypatch.setattr(reviews, "PAIRS", 2)
    with open(tmp_path / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for flags in ([], ["--resume"]):
            with pytest.raises(SystemExit) as stopped:
                reviews.run_experiment([f"--out_dir={tmp_path}", *flags])
            assert stopped.value.code == 2 and not calls
            sentence = f"train.py: {tmp_path}: another run works there: give another --out_dir\n"
            assert capsys.readouterr().err == sentence
            assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    reviews.run_experiment([f"--out_dir={tmp_path}"])
    assert len(calls) == 2 and len((tmp_path / "sft.jsonl").read_text().splitlines()) == 3


def test_the_table_of_losses(tmp_path, monkeypatch, capsys):
    """A row for each loss: trained from the same SFT model, by its own settings; the figures of the
    policy against that model."""
    rng, commands, measured = np.random.default_rng(0), [], []
    figures = {"KL": rng.normal(0.9, 0.3, 50), "gain": 1.5, "best": 1.9, "share_error": 0.034}
    for name, reward in (("SFT", 0.5), ("DPO", 2.0)):
        figures[name] = {"rewards": rng.normal(reward, reward, 50), "accepted": np.arange(50) < 20 * reward}  # fmt: skip

    def run(command, **options):
        commands.append(list(map(str, command)))
        return SimpleNamespace(returncode="--loss=kto" in commands[-1])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(losses, "measure", lambda *given: measured.append(given) or figures)
    base = tmp_path / "base"
    save_pretrained(Transformer(SHAPES["tied"]), base / "sft")
    main = lambda *words: monkeypatch.setattr(sys, "argv", ["losses.py", *words]) or losses.main()
    lines = losses.SETTINGS.splitlines()
    monkeypatch.setattr(losses, "SETTINGS", "\n".join(lines).replace("kto ", "dpo "))
    main(f"--base={base}", "--count=77")
    printed = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == LOSSES.keys()
    assert len({*lines}) == len(lines) == len(printed) - 2 == len(commands) == len(measured)
    mean = lambda x: f"{x.mean():.2f} ± {statistics.stdev(x) / 50**0.5:.2f}"
    head = "loss and settings | KL | true reward | share of what R\\* gains | accepted"
    assert printed[0] == f"| {head} |"
    expected = f"| {mean(figures['KL'])} | {mean(figures['DPO']['rewards'])} | 79% ± 3% | 80.0% |"
    for line, row in zip(lines, printed[2:]):
        assert row == f"| {line.replace('kto ', 'dpo ').replace(' --', ' ')} {expected}"
    outs = set()
    for line, command, (out, start, count) in zip(lines, commands, measured):
        name, *flags = line.replace("kto ", "dpo ").split()
        assert command[:2] == [sys.executable, str(ROOT / "train.py")]
        found = vars(train.parse_settings(command[2:]))
        own = vars(train.parse_settings(["--data=x", f"--loss={name}", *flags]))
        rate = found["learning_rate"]
        assert rate == (own["learning_rate"] if "--learning_rate" in line else 2e-4)
        changed = {name for name in found if found[name] != own[name]} - {"learning_rate"}
        fixed = ("data", "eval_data", "init_from", "out_dir", "sft_epochs", "batch_size")
        assert changed == {*fixed}
        files = [str(base / f"{file}.jsonl") for file in ("pairs", "eval")]
        assert [found[name] for name in fixed] == [*files, str(base / "sft"), str(out), 0, 32]
        assert (start, count) == (base / "sft", 77)
        assert out.parent == tmp_path / "losses"
        outs.add(out)
    assert len(outs) >= len(lines) - 1
    monkeypatch.chdir(tmp_path)
    main("dpo --beta=0.3")
    assert capsys.readouterr().out.splitlines()[2:] == [f"| dpo beta=0.3 {expected}"]
    assert measured[-1] == (Path("out/losses/dpo-beta0.3"), Path("out/reviews/sft"), 5000)
    measured.clear()
    with pytest.raises(SystemExit) as error:
        main(f"--base={base}", "kto --beta=1", "sft")
    assert error.value.code == 2 and not measured, "what failed is not measured"


# The benchmark, on a clock that only its actions move.


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    stopped = SimpleNamespace(now=0.0)
    monkeypatch.setattr(benchmark, "clock", lambda: stopped.now)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: stopped.now)
    return stopped


def moves(clock, *seconds):
    """An action that takes so long, each time it is called."""
    left = list(seconds)

    def action(*_, **__):
        clock.now += left.pop(0)

    return action


def test_measurements_in_turn(clock, monkeypatch):
    """Round by round, the first not counted, and nothing of what comes after each action."""
    actions = {"a": moves(clock, 100, 1, 2, 3), "b": moves(clock, 200, 4, 8, 6)}
    after = moves(clock, *[1000] * 8)
    assert benchmark.in_turn(actions, 3, after) == {"a": [1, 2, 3], "b": [4, 8, 6]}
    order = []
    benchmark.in_turn({name: lambda name=name: order.append(name) for name in "xy"}, 2)
    assert order == list("xyxyxy")
    fast = [1.0, 2, 3, 4, 5, 6, 7]
    slow = [a * b for a, b in zip(fast, (5, 1, 4, 2, 70, 3, 6))]
    assert benchmark.ratio({"s": slow, "f": fast}, "s", "f") == "4.00 [2.00, 6.00]"
    monkeypatch.undo()
    monkeypatch.setattr(benchmark.time, "process_time", lambda: 42.0)
    assert benchmark.clock() == 42 or benchmark.DEVICE.type == "cuda"


def plain_forward(config: ModelConfig, sizes: list, asking: list, head: int) -> int:
    """Operations of a forward pass, layer by layer. sizes: (before, own) rows of each segment, of
    which those that `asking` says go through the last layer, and `head` rows through the head."""
    c, total = config, 0
    width, shared = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for layer in range(c.num_hidden_layers):
        last = layer == c.num_hidden_layers - 1
        for (before, own), asks in zip(sizes, asking):
            total += 2 * 2 * own * c.hidden_size * shared  # keys and values
            if asks or not last:
                total += 2 * own * c.hidden_size * (2 * width + 3 * c.intermediate_size)
                for query in range(own):
                    total += 2 * 2 * (before + query + 1) * width  # scores, and what they weigh
    return total + 2 * head * c.vocab_size * c.hidden_size


def plain_costs(config: ModelConfig, sizes: list) -> tuple[int, int]:
    """Forward operations of [prompt, response, response] sizes: ours, and the standard step's, four
    pairs at a time."""
    segments, asking, standard = [], [], 0
    for prompt, *responses in sizes:
        segments += [(0, prompt - 1)] + [(prompt - 1, own) for own in responses]
        asking += [False] + [True] * len(responses)
    targets = sum(own for _, *responses in sizes for own in responses)
    for first in range(0, len(sizes), 4):
        block = sizes[first : first + 4]
        longest = max(prompt + max(responses) for prompt, *responses in block)
        rows = [(0, longest)] * 2 * len(block)
        standard += plain_forward(config, rows, [True] * len(rows), longest * len(rows))
    return plain_forward(config, segments, asking, targets), standard


RUNGS = ["standard", "cached reference", "response log-probs", "packing", "shared prompt"]
RUNGS.append("ours, live")


@pytest.mark.parametrize("native", [False, True])
def test_the_table_of_steps(native, clock, monkeypatch, capsys):
    """Every number of every row, and nothing but what --cases asks for."""
    config = replace(SHAPES["grouped"], vocab_size=50)
    mixed = [[9, 5, 3], [4, 2, 7], [30, 1, 6], [2, 2, 2], [12, 8, 3], [3, 4, 11]]
    cases = {"6:4": [[6, 4, 4]] * 4, "70:9": [[70, 9, 9]] * 4}
    monkeypatch.setattr(benchmark, "CASES", cases)
    monkeypatch.setattr(benchmark, "mixture", lambda pairs: mixed * (pairs == 8))
    monkeypatch.setattr(benchmark, "bf16_is_native", lambda: native)
    models, blocks, cleared = [], [], []

    def new_model():
        model, number = Transformer(config), len(models)
        model.zero_grad = lambda: cleared.append((number, clock.now))
        models.append(model)
        return model

    def ladder(block, model, reference, bf16):
        assert [model, reference] == models
        blocks.append((bf16, [list(map(len, tree)) for tree in block]))
        steps = {}
        for n, name in enumerate(RUNGS):  # the first round, which warms up, takes longest
            pace = 1e-7 * (8 - n) * len(block) * (2 if bf16 else 1)
            steps[name] = moves(clock, pace * 99, pace, pace * (3 + n), pace * 2)
        return steps

    monkeypatch.setattr(benchmark, "new_model", new_model)
    monkeypatch.setattr(benchmark, "ladder", ladder)
    benchmark.steps(SimpleNamespace(rounds=3, cases="6:4,mixture"))
    # After each of six rungs, in four rounds, of two cases.
    assert len(cleared) == 6 * 4 * 2 * (1 + native) and len({*cleared}) == len(cleared)
    assert {number for number, _ in cleared} == {0}, "the policy's gradients"
    expected, kinds = [], [("float32", 1)] + [("bf16", 2)] * native
    assert blocks == [
        (kind == "bf16", part) for kind, _ in kinds for part in (cases["6:4"], mixed[:4], mixed[4:])
    ]
    for kind, factor in kinds:
        for case, sizes in (("6:4", cases["6:4"]), ("mixture", mixed)):
            pairs, tokens = len(sizes), sum(p - 1 + a + b for p, a, b in sizes)
            ours, standard = plain_costs(config, sizes)
            work = benchmark.work(random_dataset(sizes))
            assert benchmark.flops(config, *work) == ours
            seconds = 1e-7 * 4 * pairs * factor * 2  # the median of ours: its second pace
            of = " of CPU time" if benchmark.DEVICE.type == "cpu" else ""
            expected.append(
                f"{kind} {case}: {pairs / seconds:.2f} pairs per second{of}, {tokens / seconds:,.0f} tokens, "
                f"{3 * ours / seconds / 1e12:.3f} TFLOP; "
                f"arithmetic {4 * standard / (3 * ours):.2f}, live {2 * standard / (2 * ours):.2f}"
            )
            for n, name in enumerate(RUNGS[1:], 1):
                a, b, c = sorted(8 / (8 - n) * x for x in (1, 3 / (3 + n), 1))
                expected.append(f"    {name:20} {b:.2f} [{a:.2f}, {c:.2f}]")
    printed = capsys.readouterr().out.splitlines()[3:]
    if not native:
        assert printed.pop() == "bf16: left out, as this CPU has no instructions for it"
    assert printed == expected


@pytest.mark.parametrize("bf16", [False, True])
def test_each_row_of_the_ladder_runs_what_it_is_named_for(bf16, monkeypatch):
    """Which model runs, on how many rows, with a graph or without; in bf16 all under autocast."""
    sizes = [[9, 5, 3], [4, 2, 7], [6, 1, 6]]
    trees = benchmark.draw_trees(sizes, vocab=97)
    assert [list(map(len, tree)) for tree in trees] == sizes
    model, reference = (make_model(SHAPES["tied"]).float() for _ in range(2))
    calls, standard, forward = [], benchmark.standard_logps, Transformer.forward
    device = benchmark.DEVICE.type
    model.to(device), reference.to(device)

    def note(name, which, rows, way, *inputs):
        assert torch.is_autocast_enabled(device) == bf16
        who = "policy" if which is model else "reference"
        calls.append((name, who, rows, torch.is_grad_enabled()))
        return way(which, *inputs)

    noted = lambda m, ids, *rest: note("padded", m, ids.numel(), standard, ids, *rest)
    monkeypatch.setattr(benchmark, "standard_logps", noted)
    streamed = lambda m, tokens, *rest: note("stream", m, len(tokens), forward, tokens, *rest)
    monkeypatch.setattr(Transformer, "forward", streamed)
    found = {}
    for name, step in benchmark.ladder(trees, model, reference, bf16).items():
        calls.clear()
        step()
        found[name] = calls.copy()
        assert all(p.grad is None for p in reference.parameters())
    longest, rows = 14, [p + r - 1 for p, *responses in sizes for r in responses]
    shared = sum(p - 1 + a + b for p, a, b in sizes)
    assert list(found) == RUNGS
    assert found == {
        "standard": [("padded", "policy", 6 * longest, True), ("padded", "reference", 6 * longest, False)],
        "cached reference": [("padded", "policy", 6 * longest, True)],
        "response log-probs": [("stream", "policy", 6 * (longest - 1), True)],
        "packing": [("stream", "policy", sum(rows), True)],
        "shared prompt": [("stream", "policy", shared, True)],
        "ours, live": [("stream", "policy", shared, True), ("stream", "reference", shared, False)],
    }  # fmt: skip


def test_the_mixture_has_the_lengths_it_says():
    sizes = np.array(benchmark.mixture(4000))
    assert sizes.shape == (4000, 3) and sizes.min() == 8 and sizes.max() == 1024
    for column, median in zip(sizes.T, (192, 64, 64)):
        assert np.median(column) == pytest.approx(median, rel=0.06)
        within = (column > 8) & (column < 1024)
        low, high = np.quantile(np.log(column[within]), (0.1587, 0.8413))  # one σ either side
        assert (high - low) / 2 == pytest.approx(0.8, rel=0.08)
    assert abs(np.corrcoef(np.log(sizes[:, 1:]).T)[0, 1]) < 0.08
    shapes = {"64:64": 64, "192:64": 192, "512:64": 512, "1024:128": 1024}
    expected = {name: [[n, int(name.split(":")[1]), int(name.split(":")[1])]] * 4 for name, n in shapes.items()}  # fmt: skip
    assert expected == benchmark.CASES


def test_the_table_of_memory(monkeypatch, capsys):
    """Each step in a process of its own, whose allocator is as glibc has it."""
    peaks = {"standard": [4000, 5000], "shared prompt": [1000, 2500]}
    commands = []

    def run(command, check, env, **options):
        assert check and env["KEPT"] == "1" and not env.keys() & benchmark.KEEP.keys()
        commands.append(command)
        which, prompt, vocab = command[3:]
        live, grown = peaks[which]
        grown += 300 * (prompt == "384")
        return SimpleNamespace(stdout=json.dumps([live + int(vocab) / 1000, grown]))

    for name, value in (benchmark.KEEP | {"KEPT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    benchmark.memory(None)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "    1024:128, vocabulary 32,000: standard 4,032 and 5,000, ours 1,032 and 2,500; ratio 0.256 and 0.500",
        "    384:128, vocabulary 128,000: standard 4,128 and 5,300, ours 1,128 and 2,800; ratio 0.273 and 0.528",
    ]  # fmt: skip
    assert all(c[:3] == [sys.executable, benchmark.__file__, "--measure"] for c in commands)


def test_peak_memory_is_that_of_live_tensors(monkeypatch, capsys):
    """What is freed counts no more, a view nothing; the model counts, and the process from its start."""
    with benchmark.Tracker() as tracker:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:]
        c = a + 1
        del a, c  # b keeps the first 4,000 bytes
        d = torch.zeros(300, dtype=torch.float64)
        assert (tracker.live, tracker.peak) == (6400, 8000)
        e = torch.zeros(1200)
        assert (tracker.live, tracker.peak) == (11200, 11200)
        del b, d, e
        assert (tracker.live, tracker.peak) == (0, 11200)
        left, right = torch.randn(70, 40).bfloat16(), torch.randn(40, 60).bfloat16()
        product = left @ right
    exact = left.double() @ right.double()
    torch.testing.assert_close(product.double(), exact, rtol=1e-2, atol=1e-2)

    def ladder(trees, model, reference, bf16=False):
        assert bf16 and model is reference
        assert [list(map(len, tree)) for tree in trees] == [[30, 128, 128]] * 4
        assert max(max(map(max, tree)) for tree in trees) in range(80, 97)
        return {"standard": lambda: torch.zeros(3 * 2**18), "shared prompt": lambda: torch.zeros(2**18)}  # fmt: skip

    monkeypatch.setattr(benchmark, "ladder", ladder)
    monkeypatch.setattr(benchmark, "new_model", lambda vocab: torch.zeros(vocab * 2**18 // 97))
    for which, expected in (("standard", [4.0, 5.5]), ("shared prompt", [2.0, 5.5])):
        resident = iter([3 * 2**20, 8.5 * 2**20])
        monkeypatch.setattr(benchmark, "most_resident", lambda resident=resident: next(resident))
        benchmark.measure(which, 30, 97)
        if benchmark.DEVICE.type == "cpu":
            assert json.loads(capsys.readouterr().out) == expected


def test_the_table_of_growth(clock, monkeypatch, capsys):
    """One size at a time at half, once, twice and four times, the reference cached, in float32."""
    seen = []
    monkeypatch.setattr(benchmark, "new_model", lambda vocab, **shape: (vocab, shape))
    monkeypatch.setattr(benchmark, "our_logps", lambda trees: trees)

    def seconds_of(prompt, response, pairs, vocabulary, width):
        return 1e-3 * (prompt + 7 * response + 100 * pairs + vocabulary / 100 + 3 * width)

    def make_step(trees, model, reference, bf16):
        assert reference is None and bf16 is False
        [vocab, shape], [[prompt, response, other]] = model, {tuple(map(len, t)) for t in trees}
        width = shape["hidden_size"]
        heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
        assert shape == heads | {"hidden_size": width, "intermediate_size": width * 43 // 16}
        assert response == other and max(max(map(max, tree)) for tree in trees) < vocab
        seen.append((prompt, response, len(trees), vocab, width))
        pace = seconds_of(*seen[-1])
        return moves(clock, 50 * pace, pace, 3 * pace, 2 * pace)

    monkeypatch.setattr(benchmark, "make_step", make_step)
    benchmark.growth(SimpleNamespace(rounds=3))
    base = {"prompt": 192, "response": 64, "pairs": 4, "vocabulary": 32000, "width": 512}
    expected, sizes = [], []
    for name, value in base.items():
        cells = []
        for n in (value // 2, value, 2 * value, 4 * value):
            shape = base | {name: n}
            sizes.append(tuple(shape.values()))
            cells.append(f"{n:,}: {2 * seconds_of(**shape):.2f}")
        expected.append(f"    {name:11} " + "   ".join(cells))
    assert capsys.readouterr().out.splitlines()[2:] == expected
    assert seen == sizes


def test_the_table_of_sampling(clock, monkeypatch, capsys):
    """64 new tokens of each sequence, by both: nothing stops before."""
    tiny, made = make_model(SHAPES["tied"]).float(), []

    def their_generate(ids, **options):
        assert (options["min_new_tokens"], options["max_new_tokens"]) == (64, 64)
        assert options["do_sample"] and options["top_k"] == 0 and ids.shape[1] == 32
        clock.now += [9.0, 0.1 * len(ids)][bool(clock.now)]

    def our_generate(model, prompts, new, stops, compile=False):
        assert model is tiny and new == 64 and stops == [] and {*map(len, prompts)} == {32}
        clock.now += len(prompts) * (0.02 if compile else 0.05)

    their_model = SimpleNamespace(generate=their_generate)
    their_model.to = lambda device: their_model
    their_model.eval = lambda: their_model
    auto = SimpleNamespace(from_pretrained=lambda d: load_config(d) == tiny.config and their_model)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoModelForCausalLM=auto))
    monkeypatch.setattr(benchmark, "generate", our_generate)
    monkeypatch.setattr(benchmark, "new_model", lambda *a, **k: made.append((a, k)) or tiny)
    benchmark.sampling(SimpleNamespace(rounds=3))
    of, same = "a second of CPU time", lambda x: f"{x:.2f} [{x:.2f}, {x:.2f}]"
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"    {name}, batch {batch}: 1,280 {of}, {same(2)} times as many; compiled {same(5)}"
        for name in ("tiny", "135M")
        for batch in (1, 32)
    ]
    tied = {"tie_word_embeddings": True}
    small, smol = [[("hidden_size", a), ("intermediate_size", b), ("num_hidden_layers", c), ("num_attention_heads", d), ("num_key_value_heads", e), ("head_dim", f)]
                   for a, b, c, d, e, f in ((128, 352, 2, 4, 4, 32), (576, 1536, 30, 9, 3, 64))]  # fmt: skip
    assert made == [((640,), dict(small) | tied), ((49152,), dict(smol) | tied)]


def test_the_figures_of_planning_and_start(clock, monkeypatch, capsys):
    """By how much the longest micro-batch is above the mean; each script against `import torch`."""
    first, pack, lengths = np.arange(640) * 1500, data.pack, []

    def count(all_lengths, examples, budget, ranks):
        assert len(all_lengths) == 10**6 and (budget, ranks) == (16384, 8) and len(examples) == 64
        found = pack(all_lengths, examples, budget, ranks)
        lengths.append([[all_lengths[part].sum() for part in rank] for rank in found])
        clock.now += 0.5
        return found

    monkeypatch.setattr(data, "order_of", lambda epoch, total, seed: first[:: 1 + (total != 10**6)])
    monkeypatch.setattr(data, "pack", count)
    benchmark.plan(None)
    longest = total = 0
    for step in lengths:
        parts = [load for rank in step for load in rank]
        longest, total = longest + max(parts) * len(parts), total + sum(parts)
    printed = capsys.readouterr().out.strip()
    assert printed.startswith("An epoch of a million pairs planned and packed for 8 ranks: 5.0 s;")
    assert printed.endswith(f" longest micro-batch of a step is {longest / total - 1:.1%} above the mean")  # fmt: skip
    assert longest > 1.01 * total
    ran = []

    def run(command, cwd, check, **options):
        assert check and cwd == ROOT and command[0] == sys.executable
        ran.append(command[1:])
        clock.now += {"train.py": 3.0, "sample.py": 2.5}.get(command[1], 2.0)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    benchmark.start(SimpleNamespace(rounds=2))
    assert ran == 2 * [["-c", "import torch"], ["train.py", "--help"], ["sample.py", "--help"]]
    assert capsys.readouterr().out.splitlines()[2:] == [
        "    train.py: 1.50 [1.50, 1.50] times as long",
        "    sample.py: 1.25 [1.25, 1.25] times as long",
    ]


def test_the_table_of_ranks(monkeypatch, capsys):
    """Seconds of a step without the first, of as many pairs for each process."""
    started = []

    def begin(command, env, **options):
        assert env["OMP_NUM_THREADS"] == "1"
        flags = dict(
            word[2:].split("=") for word in command if word.startswith("--") and "=" in word
        )
        out, rows = Path(flags["out_dir"]), read_rows(flags["data"])
        assert [list(map(len, row.values())) for row in rows] == [[192, 64, 64]] * 48
        assert load_config(flags["init_from"]) == SHAPES["tied"]
        sharded = "torch.distributed.run" in command
        assert flags["batch_size"] == ("48" if sharded else "24")
        assert flags.get("nproc_per_node") == ("2" if sharded else None)
        fixed = {"max_steps": "4", "sft_epochs": "0", "epochs": "4", "log_every": "1"}
        assert fixed.items() <= flags.items() and str(ROOT / "train.py") in command
        pace = 0.5 if "nothing" in str(out) else 1.0  # pairs per second of each process
        pace = 1.5 if sharded else pace
        out.mkdir(parents=True)
        speeds = [0.01, pace, pace, pace]
        (out / "metrics.jsonl").write_text("".join(json.dumps({"pairs_per_second": s}) + "\n" for s in speeds))  # fmt: skip
        started.append(out.parent.name)
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(benchmark.subprocess, "Popen", begin)
    monkeypatch.setattr(benchmark, "new_model", lambda: Transformer(SHAPES["tied"]))
    benchmark.ranks(None)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "    one: 1.00 [1.00, 1.00] times as long",
        "    two that share nothing: 2.00 [2.00, 2.00] times as long",
        "    FSDP: 1.33 [1.33, 1.33] times as long",
    ]
    assert started == ["one0", "two that share nothing0", "two that share nothing1", "FSDP0"]


def test_the_figures_of_a_first_start(clock, monkeypatch, capsys):
    """Encoded once, then found; here of a few pairs."""
    few = lambda n: range(min(n, 40))
    monkeypatch.setattr(benchmark, "range", few, raising=False)
    original = (data.encode, encoded.encode_once, data.Tokenizer.train)
    encodes, found = [], []
    monkeypatch.setattr(data, "encode", lambda *a: encodes.append(1) or original[0](*a))
    times = [7.0, 0.25]

    def encode_once(run, *inputs):
        assert inputs[0] == "pairs" and inputs[3:] == (512, 256)
        found.append(original[1](run, *inputs)[0])
        clock.now += times.pop(0)
        return found[-1], None

    monkeypatch.setattr(encoded, "encode_once", encode_once)
    smaller = lambda examples, out, size: original[2](examples, out, 300)
    monkeypatch.setattr(data.Tokenizer, "train", staticmethod(smaller))
    benchmark.startup(None)
    tokens = int(found[0].offsets[-1])
    expected = f"\nEncoding 40 pairs, {tokens:,} tokens: 7.0 s; found again in 250.0 ms\n"
    assert capsys.readouterr().out == expected
    assert len(encodes) == 1 and tokens > 40 * 140


def test_the_benchmark_runs_the_sections_it_is_asked_for(monkeypatch, capsys):
    ran, restarted, threads = [], [], []
    sections = {
        name: lambda args, name=name: ran.append((name, args)) for name in benchmark.SECTIONS
    }
    assert [*sections] == "steps memory growth sampling plan ranks start startup".split()
    monkeypatch.setattr(benchmark, "SECTIONS", sections)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(benchmark.os, "execve", lambda *given: restarted.append(given))
    for name in benchmark.KEEP:
        monkeypatch.delenv(name, raising=False)

    def main(*words):
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
        benchmark.main()
        return [name for name, _ in ran]

    assert main("--default_malloc", "growth", "plan", "--rounds=2", "--threads=3") == [
        "growth",
        "plan",
    ]
    assert ran[0][1].rounds == 2 and threads == [3] and not restarted
    assert main("--default_malloc", "--cases=mixture") == [*sections]
    assert ran[0][1].cases == "mixture" and ran[0][1].rounds == 5
    assert threads[1] == benchmark.os.cpu_count()
    if benchmark.DEVICE.type == "cpu":
        assert f", {threads[1]} CPU threads" in capsys.readouterr().out
    main("plan")
    [[_, command, environment]] = restarted
    assert command[1:] == ["benchmark.py", "plan"] and benchmark.KEEP.items() <= environment.items()
    assert ran[0][1].cases == "64:64,192:64,512:64,1024:128,mixture"
    for name, value in benchmark.KEEP.items():
        monkeypatch.setenv(name, value)
    assert main("plan") == ["plan"] and len(restarted) == 1, "not restarted twice"
    measured = []
    monkeypatch.setattr(benchmark, "measure", lambda *given: measured.append(given))
    assert main("--measure", "standard", "384", "128000") == []
    assert measured == [("standard", 384, 128000)]
    with pytest.raises(SystemExit):
        main("nothing")


# The model and its rooms, where two checkpoints of the usual settings would not tell.


@pytest.mark.parametrize("tied", [False, True])
def test_eps_and_theta_of_the_config_are_used(tied):
    """Far from the defaults; and Llama 3's scaling, by the published rule for each wavelength."""
    config = replace(SHAPES["grouped"], rms_norm_eps=0.4, rope_theta=77.0, tie_word_embeddings=tied)
    model, ids = make_model(config, 4.0), [5, 90, 3, 17, 17, 60, 8]
    torch.testing.assert_close(
        model(*sequence(ids)), plain_logits(model, ids), rtol=1e-9, atol=1e-9
    )
    usual = Transformer(replace(config, rms_norm_eps=1e-6)).double()
    usual.load_state_dict(model.state_dict())
    assert (usual(*sequence(ids)) - model(*sequence(ids))).abs().max() > 0.1
    norms = [m for m in model.modules() if isinstance(m, RMSNorm)]
    assert len(norms) == 7 and {norm.eps for norm in norms} == {0.4}, "each of them"

    scaling = {
        "rope_type": "llama3",
        "factor": 6.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 5.0,
    }
    scaling["original_max_position_embeddings"] = 50
    scaled = replace(config, head_dim=32, rope_scaling=scaling)
    cos, sin = model_module.rotary(torch.arange(40), scaled, torch.float64)
    assert cos.shape == (40, 1, 32)
    slowed = Counter()
    for i in range(16):
        frequency = 77.0 ** (-2 * i / 32)
        wavelength = 2 * math.pi / frequency
        if wavelength > 50 / 1.5:
            kind, frequency = "slow", frequency / 6
        elif wavelength >= 50 / 5:
            smooth = (50 / wavelength - 1.5) / (5 - 1.5)
            kind, frequency = "between", (1 - smooth) * frequency / 6 + smooth * frequency
        else:
            kind = "fast"
        slowed[kind] += 1
        for position in (1, 7, 39):
            for dimension in (i, i + 16):
                angle = position * frequency
                assert cos[position, 0, dimension].item() == pytest.approx(math.cos(angle))
                assert sin[position, 0, dimension].item() == pytest.approx(math.sin(angle))
    assert len(slowed) == 3, "all three are there"


def test_checkpointing_runs_each_block_again(monkeypatch):
    """In the backward pass, and only where there is one. A large norm keeps its input alone."""
    model, ids, runs = make_model(SHAPES["grouped"]), [4, 5, 6, 7], []
    for n, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, n=n: runs.append(n))
    inputs = (*sequence(ids), torch.tensor(ids))
    for model.activation_checkpointing, expected in ((False, [1] * 3), (True, [2] * 3)):
        runs.clear()
        model(*inputs).sum().backward()
        assert [runs.count(n) for n in range(3)] == expected
        runs.clear()
        with torch.no_grad():
            model(*inputs)
        assert runs == [0, 1, 2]
    kept = lambda rows: saved_numbers(RMSNorm(256), torch.randn(rows, 256, requires_grad=True))
    assert kept(4096) <= 4096 * 256 + 256 < kept(4095), "beside the weight"


@torch.no_grad()
def test_bf16_is_of_products_alone(monkeypatch):
    """Norms are computed in float32 and handed on in bf16; weights that are gathered in bf16 are the
    rounded ones, between which all is float32; and the head's log-probs are made in chunks."""
    norm, x, apply, ways = RMSNorm(64, 0.1), 3 * torch.randn(5, 64), ChunkedLogps.apply, []
    norm.weight.copy_(torch.randn(64))
    exact = x / (x.pow(2).mean(1, keepdim=True) + 0.1).sqrt() * norm.weight
    monkeypatch.setattr(ChunkedLogps, "apply", lambda *given: ways.append(1) or apply(*given))
    model = make_model(SHAPES["grouped"], 4.0).bfloat16()
    rounded = Transformer(model.config)
    rounded.load_state_dict(model.state_dict())
    inputs = (*sequence([5, 6, 7, 90]), torch.tensor([6, 7, 90, 2]))
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
        assert found.dtype == torch.bfloat16 and norm(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(model(*inputs), rounded(*inputs))
        of_head = token_logps(x, norm.weight[:, None] * torch.eye(64), torch.arange(5))
    assert ways == [1, 1]
    logits = x.double() * norm.weight.double()
    torch.testing.assert_close(
        of_head.double(), logits.log_softmax(1).diagonal(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=0)
    torch.testing.assert_close(norm(x), exact)


def saved_numbers(module, x) -> int:
    """Numbers kept for the backward pass, by all storages together."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x).sum().backward()
    return sum(tensor.numel() for tensor in kept.values())


@pytest.mark.parametrize("rows", [60, 30, 7, 1])
def test_never_more_logits_than_many_at_a_time(rows, monkeypatch):
    """Every id as a target, so also the first and last of each chunk; values and gradients."""
    many, vocab = 480, 120
    monkeypatch.setattr(model_module, "MANY", many)
    sizes, original = [], model_module.head_logits

    def head_logits(hidden, weight):
        sizes.append(len(hidden) * len(weight))
        return original(hidden, weight)

    monkeypatch.setattr(model_module, "head_logits", head_logits)
    for first in range(0, vocab, rows):
        hidden = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(vocab, 8, dtype=torch.float64, requires_grad=True)
        targets = torch.arange(first, first + rows) % vocab
        ours = token_logps(hidden, weight, targets)
        plain = (hidden @ weight.T).log_softmax(-1)[range(rows), targets]
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-11)
        factor = torch.randn(rows, dtype=torch.float64)
        grads = [torch.autograd.grad((x * factor).sum(), (hidden, weight)) for x in (ours, plain)]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    chunks = -(-rows * vocab // many)
    times = 2 if chunks > 1 else 1  # in chunks again for the gradients
    assert max(sizes) <= many
    assert len(sizes) == times * chunks * -(-vocab // rows), "and no more of them than needed"


def test_a_new_shape_is_llamas():
    """Feed-forward of 8/3 of the width, up to a multiple of 32; tied; as many heads of each."""
    tied = {"tie_word_embeddings": True}
    assert ModelConfig.new(640, 128, 2, 4) == ModelConfig(640, 128, 352, 2, 4, 4, 32, **tied)
    assert ModelConfig.new(99, 48, 5, 3) == ModelConfig(99, 48, 128, 5, 3, 3, 16, **tied)
    new = ModelConfig.new(99, 60, 1, 2, max_position_embeddings=7, eos_token_id=2)
    expected = {"max_position_embeddings": 7, "eos_token_id": 2} | tied
    assert new == ModelConfig(99, 60, 160, 1, 2, 2, 30, **expected)


def test_padding_of_attention_is_bounded(monkeypatch):
    """Segments of like lengths share a call, and no others: within a quarter, or a dozen tokens."""
    rng = np.random.default_rng(0)
    owns = np.where(rng.random(150) < 0.5, rng.integers(1, 8, 150), rng.integers(90, 130, 150))
    prompts = rng.integers(131, 200, 150) - owns
    segments, start = [], 0
    for size in prompts:
        segments.append((0, 0, start, size))
        start += size
    for trunk, size in zip(segments.copy(), owns):
        segments.append((*trunk[2:], start, size))
        start += size
    segments, padded, original = torch.tensor(segments), Counter(), F.scaled_dot_product_attention

    def note(q, k, v, *rest, **options):
        kind = "prompts" if rest[0] is None else "responses"
        padded[kind, "queries"] += q.shape[0] * q.shape[2]
        padded[kind, "keys"] += k.shape[0] * k.shape[2]
        padded["calls"] += 1
        return original(q, k, v, *rest, **options)

    q, k, v = torch.randn(3, start, 2, 4, dtype=torch.float64)
    expected = model_module.segment_attention(segments, q.device)(q, k, v)
    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    found = attention.padded_attention(segments, q.device)(q, k, v)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    most = lambda n: math.exp(1 / 4) * (n + 48) - 48
    queries, keys = segments[:, 3].tolist(), (segments[:, 1] + segments[:, 3]).tolist()
    for kind, which in (("prompts", slice(150)), ("responses", slice(150, None))):
        for name, sizes in (("queries", queries[which]), ("keys", keys[which])):
            assert sum(sizes) <= padded[kind, name] <= sum(map(most, sizes)), (kind, name)
    assert padded["calls"] < 40, "for 300 segments"


def test_each_option_has_its_papers_default():
    """Those of the table in docs/objectives.md."""
    text = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    names = {"ε": "label_smoothing", "α": "alpha", "γ": "gamma", "β": "beta"}
    documented = {}
    rows = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("| `")]
    for _, name, _, options, _, _ in rows:
        found = re.findall(r"([εαγβ]) \(([\d.]+)\)", options)
        documented[name.strip(" `")] = {names[letter]: float(value) for letter, value in found}
    defaults = {
        "dpo": {"label_smoothing": 0}, "robust": {"label_smoothing": 0.1}, "rdpo": {"alpha": 0.01},
        "exo": {"label_smoothing": 1e-3}, "dpo_norm": {"beta": 5}, "dpop": {"alpha": 50},
        "kto": {"alpha": 1}, "chipo": {"gamma": 5}, "fdpo_alpha": {"alpha": 0.5},
        "simpo": {"beta": 2, "gamma": 1}, "slic": {"alpha": 0.1, "gamma": 1}, "unlikelihood": {"alpha": 0.1},
    }  # fmt: skip
    assert documented == {name: defaults.get(name, {}) for name in LOSSES}
    numbers = [-20.0, -11.0, -19.0, -11.5, 7.0, 4.0, 0.9, 0.4]
    pairs = dpo.Pairs(*torch.tensor(numbers, dtype=torch.float64).unsqueeze(1))
    for name, loss in LOSSES.items():
        given = {"beta": 0.3} | defaults.get(name, {})
        by_default = {} if "beta" in defaults.get(name, {}) else {"beta": 0.3}
        assert loss(pairs, **by_default) == loss(pairs, **given), name
        for option in defaults.get(name, {}):  # where it acts on this pair, it acts
            other = loss(pairs, **(given | {option: given[option] * 1.5 + 0.1}))
            assert other != loss(pairs, **given) or name in ("dpop", "chipo"), (name, option)


def test_the_file_is_aligned_and_its_config_says_float32(tmp_path):
    """Whatever the precision of the model; every field of the configuration is kept."""
    values = {
        "max_position_embeddings": 99,
        "rms_norm_eps": 0.25,
        "rope_theta": 7.5,
        "bos_token_id": 0,
    }
    values |= {"sliding_window": 120, "eos_token_id": [2, 3], "tie_word_embeddings": True}
    values["model_type"] = "mistral"
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    scaling["original_max_position_embeddings"] = 64
    for vocab in range(90, 98):  # headers of several lengths
        config = ModelConfig(vocab, 16, 32 + vocab, 1, 2, 1, 8, rope_scaling=scaling, **values)
        model = make_model(config)
        save_pretrained(model, tmp_path)
        content = (tmp_path / "model.safetensors").read_bytes()
        assert int.from_bytes(content[:8], "little") % 8 == 0, "numbers begin at a multiple of 8"
        assert len(content) % 4 == 0 and load_config(tmp_path) == config
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["dtype"] == saved["torch_dtype"] == "float32"
        assert saved["hidden_act"] == "silu" and saved["model_type"] == "mistral"
        loaded = load_pretrained(tmp_path).state_dict()
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded[name], weight.float()) and loaded[name].dtype == torch.float32


def test_configs_of_others(tmp_path):
    """What is refused, what comes first where two say it, and which file of several is read."""
    model = Transformer(SHAPES["tied"]).init_weights(0)
    save_pretrained(model, tmp_path)
    path, usual = tmp_path / "config.json", json.loads((tmp_path / "config.json").read_text())
    change = lambda **values: path.write_text(json.dumps(usual | values))
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 64
    for key in (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ):
        change(rope_scaling={k: v for k, v in llama3.items() if k != key})
        with pytest.raises(CheckpointError, match=f"{key} is missing"):
            load_config(tmp_path)
        change(rope_scaling=llama3 | {key: -1})
        with pytest.raises(CheckpointError, match=f"{key} -1 is not a positive number"):
            load_config(tmp_path)
    for key in ("sliding_window", "max_position_embeddings"):
        for value in (0, 2.5, "many"):
            change(**{key: value})
            with pytest.raises(CheckpointError, match=f"{key} {value!r} is not a positive whole"):
                load_config(tmp_path)
    for key, value in (("hidden_act", "swish"), ("hidden_act", None), ("attention_bias", None),
                       ("mlp_bias", None), ("partial_rotary_factor", 1.0), ("layer_types", None),
                       ("layer_types", ["full_attention"] * 2), ("rope_interleaved", False),
                       ("sliding_window", 300),  # which a llama does not have
                       ("rope_scaling", {"type": "default"}), ("quantization_config", None)):  # fmt: skip
        change(**{key: value})
        assert load_config(tmp_path) == model.config, (key, value)
    change(model_type="mistral")
    assert load_config(tmp_path).sliding_window is None, "that is what null says"
    change(model_type="mistral", sliding_window=300)
    assert load_config(tmp_path).sliding_window == 300
    change(rope_theta=10.0, rope_parameters={"rope_type": "default", "rope_theta": 30.0})
    assert load_config(tmp_path).rope_theta == 30
    change()
    weights = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    (tmp_path / "model.safetensors").unlink()
    torch.save(
        {name: weight + 1 for name, weight in weights.items()}, tmp_path / "pytorch_model.bin"
    )
    assert torch.equal(load_pretrained(tmp_path).norm.weight, model.norm.weight + 1)
    torch.save(weights, tmp_path / "part.bin")
    index = {"weight_map": dict.fromkeys(weights, "part.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert torch.equal(load_pretrained(tmp_path).norm.weight, model.norm.weight)


def test_what_lies_beside_weights_goes_along(tmp_path):
    """All files of a tokenizer, and generation_config.json; nothing else, and nothing invented."""
    names = """tokenizer_config.json added_tokens.json special_tokens_map.json tokenizer.json
        chat_template.jinja generation_config.json""".split()
    config = SHAPES["tied"]
    for given in (names, names[1:], []):
        source, out = tmp_path / f"source{len(given)}", tmp_path / f"out{len(given)}"
        for directory in (source, out):
            save_pretrained(Transformer(config), directory)
        for name in [*given, "notes.txt"]:
            (source / name).write_text(f"{name} of the source")
        checkpoints.bring(out, source)
        beside = {path.name for path in out.iterdir()} - {"config.json", "model.safetensors"}
        assert beside == {*given}
        assert all((out / name).read_text() == f"{name} of the source" for name in given)
    for given in (tmp_path / "source6", tmp_path / "source6" / "tokenizer.model"):
        checkpoints.bring(tmp_path / "out5", "", given)  # a new model of a given tokenizer
        assert (tmp_path / "out5" / "tokenizer.json").read_text() == "tokenizer.json of the source"
