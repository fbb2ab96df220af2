"""The built-in experiment: the grammar against brute force, its labels, its files."""

import itertools
import math

import numpy as np
import pytest
from conftest import read_metrics, write_jsonl
from test_reports import plain_score

import data
import train
from experiments import reviews
from extra.reward import response_logps
from sample import load


def test_grammar_is_exact(monkeypatch):
    """Probabilities sum to 1; entropy, π* and the frontier agree with brute force over all reviews
    of one and two clauses, and with samples."""
    monkeypatch.setattr(reviews, "VERBS", {"was": 0.7, "felt": 0.3})  # so that all can be listed
    monkeypatch.setattr(reviews, "ADVERBS", {"": (0.6, 0.0), "sadly": (0.4, -0.8)})
    grammar = reviews.Reviews(seed=1)
    for clauses in itertools.chain(*grammar.clauses.values()):
        assert clauses.p.sum() == pytest.approx(1, abs=1e-12)
        assert len(set(clauses.texts)) == len(clauses.texts)
    assert reviews.COUNTS.sum() == pytest.approx(1)
    assert len(set(grammar.prompts["train"])) > 1000
    assert not set(grammar.prompts["train"]) & set(grammar.prompts["eval"])

    # Brute force: log Z, E r and KL of π* from the list of all one- and two-clause reviews, the
    # three-clause ones as the product that the definition says they are.
    beta, kind = 1.3, "cafe"
    c = grammar.clauses[kind]
    p = [reviews.COUNTS[0] * c[0].p, reviews.COUNTS[1] * np.outer(c[0].p, c[1].p).ravel()]
    r = [c[0].r, np.add.outer(c[0].r, c[1].r).ravel()]
    third, reward3 = np.outer(p[1], c[2].p).ravel(), np.add.outer(r[1], c[2].r).ravel()
    p, r = (
        np.concatenate([*p, third * reviews.COUNTS[2] / reviews.COUNTS[1]]),
        np.concatenate([*r, reward3]),
    )
    assert p.sum() == pytest.approx(1, abs=1e-9)
    best = p * np.exp(r / beta)
    best /= best.sum()
    only = reviews.Reviews(seed=1)
    only.prompts["eval"] = [x for x in grammar.prompts["eval"] if f" {kind} " in x]
    reward, kl = only.optimum(beta)
    assert reward == pytest.approx(best @ r, rel=1e-9)
    assert kl == pytest.approx(best @ np.log(best / p), rel=1e-9)
    assert only.entropy() == pytest.approx(-(p @ np.log(p)), rel=1e-9)
    assert only.frontier(kl) == pytest.approx(reward, abs=1e-3)
    tilted = p * np.exp(r / 0.9 + 0.3 * np.sin(np.arange(len(p))))  # some other policy
    tilted /= tilted.sum()
    assert tilted @ r < only.frontier(tilted @ np.log(tilted / p)), (
        "nothing lies above the frontier"
    )

    written = grammar.demonstrations(4000, "eval")
    scores = np.array([grammar.score(e.prompt, e.responses[0]) for e in written])
    error = scores[:, 0].std() / 4000**0.5
    assert -scores[:, 0].mean() == pytest.approx(grammar.entropy(), abs=5 * error)
    assert scores[:, 1].mean() == pytest.approx(
        grammar.frontier(0), abs=5 * scores[:, 1].std() / 60
    )


def test_the_grammar_is_the_one_of_the_published_figures():
    """With another table, size or preset those of the README are no longer true."""
    grammar = reviews.Reviews()
    assert grammar.entropy() == pytest.approx(12.851348809, rel=1e-9)
    assert grammar.optimum(1.0) == pytest.approx((3.258591643, 1.452245875), rel=1e-9)
    assert grammar.frontier(0.0) == pytest.approx(0.369349598, rel=1e-8)
    assert grammar.frontier(0.82) - grammar.frontier(0.0) == pytest.approx(2.167422410, rel=1e-6)
    rewards = {kind: clauses[0].p @ clauses[0].r for kind, clauses in grammar.clauses.items()}
    expected = {"film": 0.167272727, "novel": 0.312727273, "hotel": 0.04, "cafe": 0.209811321}
    assert rewards == pytest.approx(expected | {"game": 0.153207547}, rel=1e-7)
    for clauses in grammar.clauses.values():
        assert [len(c.texts) for c in clauses] == [256, 1152, 768]
    assert len(grammar.prompts["train"]) == 1400 and len(grammar.prompts["eval"]) == 200
    assert (reviews.DEMONSTRATIONS, reviews.PAIRS, reviews.SAMPLES) == (20_000, 6_000, 5_000)
    presets = {"beta": 1.0, "batch_size": 32, "learning_rate": 2e-4, "sft_learning_rate": 5e-3}
    assert presets == reviews.SETTINGS


def test_grammar_labels_and_acceptance():
    grammar = reviews.Reviews(seed=1)
    pairs = grammar.preferences(4000, "train")
    gaps = np.array([grammar.score(e.prompt, e.responses[0])[1] - grammar.score(e.prompt, e.responses[1])[1]
                     for e in pairs])  # fmt: skip
    sizes = np.abs(gaps)
    for low, high in ((0.5, 1.5), (1.5, 3), (3, 9)):  # P(a ≻ b) = σ(r(a) − r(b))
        here = (sizes > low) & (sizes < high)
        expected = 1 / (1 + np.exp(-sizes[here]))
        error = (expected * (1 - expected)).mean() ** 0.5 / here.sum() ** 0.5
        assert (gaps[here] > 0).mean() == pytest.approx(expected.mean(), abs=4 * error)
    sharp = grammar.preferences(500, "train", deterministic=True)
    assert all(
        grammar.score(e.prompt, e.responses[0])[1] > grammar.score(e.prompt, e.responses[1])[1]
        for e in sharp
    )
    assert pairs == reviews.Reviews(seed=1).preferences(4000, "train") != reviews.Reviews(seed=2)
    prompt = "Review of the new film Amber:"
    assert grammar.score(prompt, " The plot was sadly slow, but the cast seemed superb.")[
        1
    ] == pytest.approx(0.6)
    for broken in ("", ".", " The plot was slow", " The coffee was slow.", " The plot was slow..",
                   " the plot was slow.", " The plot was slow, but the plot was slow."):  # fmt: skip
        assert grammar.score(prompt, broken)[0] == -math.inf


# Runs on the grammar itself, from one small SFT model.

LABELS = ("true", "swapped", "random")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[dict, list[dict]]]:
    """What DPO makes of the experiment's labels, of swapped and of random ones: for each the
    figures of `measure` and the metrics, all evaluated on true labels."""
    root, results = tmp_path_factory.mktemp("reviews"), {}
    run = lambda out, *flags: train.train(
        train.Run(train.parse_settings([*flags, f"--out_dir={out}", "--log_every=10"]))
    )
    files = reviews.write(root / "files", 0, 7000, 1600)
    sft = f"""--data={files[2]} --epochs=0 --hidden_size=64 --num_heads=2 --batch_size=32
        --sft_learning_rate=6e-3""".split()
    run(root / "sft", *sft)
    pairs, held_out = (
        [row for _, row in data.read_jsonl(str(root / "files" / f"{name}.jsonl"))]
        for name in ("pairs", "eval")
    )
    held_out = write_jsonl(root / "eval.jsonl", held_out[:300])
    rng = np.random.default_rng(0)
    for label in LABELS:
        turned = {"true": [0] * len(pairs), "swapped": [1] * len(pairs)}.get(label)
        rows = [
            row | ({"chosen": row["rejected"], "rejected": row["chosen"]} if turn else {})
            for row, turn in zip(pairs, turned or rng.integers(0, 2, len(pairs)))
        ]
        settings = f"""--init_from={root / "sft"} --sft_epochs=0 --beta=1 --learning_rate=3e-4
            --batch_size=32 --data={write_jsonl(root / f"{label}.jsonl", rows)}
            --eval_data={held_out} --eval_every=20 --micro_batch_tokens=1024""".split()
        run(root / label, *settings)
        found = reviews.measure(root / label, root / "sft", 600)
        for name, place in (("SFT", "sft"), ("DPO", label)):
            trees = data.to_dataset(found[name]["trees"])
            found[name]["logps"] = response_logps(load(root / place)[0], trees)
        results[label] = found, read_metrics(root / label)
    return results


def test_swapped_labels_mirror_and_random_ones_gain_nothing(runs):
    """True reward, KL, accuracy and the margins on held-out true labels."""
    gains = {label: found["gain"] for label, (found, _) in runs.items()}
    error = np.hypot(*(reviews.error(runs["true"][0][n]["rewards"]) for n in ("SFT", "DPO")))
    assert gains["true"] > 10 * error and gains["swapped"] < -10 * error
    assert abs(gains["random"]) < 4 * error < 0.5 * gains["true"]
    curves = {
        label: np.array([row["eval/rewards/margins"] for row in rows if "eval/loss" in row])
        for label, (_, rows) in runs.items()
    }
    assert len(curves["true"]) == 4 and curves["true"][0] == curves["swapped"][0] == 0
    assert (np.diff(curves["true"]) > 0).all() and curves["true"][-1] > 0.3
    both = curves["true"][1:], curves["swapped"][1:]
    assert both[1] == pytest.approx(-both[0], rel=0.35)
    assert (np.abs(curves["random"]) < 0.15 * curves["true"][-1]).all()
    accuracy = {label: rows[-1]["eval/rewards/accuracies"] for label, (_, rows) in runs.items()}
    assert accuracy["true"] > 0.7 and accuracy["swapped"] < 0.3
    assert accuracy["random"] == pytest.approx(0.5, abs=0.1)


def test_no_policy_is_above_the_frontier(runs):
    """E r(y) is at most R*(KL(π‖p)), p the grammar: exact for any policy, and so up to the standard
    errors of the two estimates. Of the samples that the grammar could have written, π given that
    it writes one of those; KL by k1, for p is known and π is its own log-prob (of the tokens that
    it wrote: the same text may have others, so this is a little less than KL, and stricter)."""
    frontier = reviews.Reviews().frontier
    policies = {label: found["DPO"] for label, (found, _) in runs.items()}
    for label, policy in (policies | {"SFT": runs["true"][0]["SFT"]}).items():
        kept = policy["accepted"]
        k1 = policy["logps"][kept] - policy["grammar"][kept] - math.log(kept.mean())
        reward, kl = policy["rewards"][kept].mean(), k1.mean()
        slope = (frontier(kl + 0.01) - frontier(max(kl - 0.01, 0))) / 0.02
        error = math.hypot(reviews.error(policy["rewards"][kept]), slope * reviews.error(k1))
        assert kept.mean() > 0.5 and kl > -2 * reviews.error(k1), label
        assert reward <= frontier(max(kl, 0)) + error, label
    true = runs["true"][0]
    assert 0.5 < true["gain"] / true["best"] < 1 + true["share_error"]


def test_the_figures_of_real_runs_are_plausible(runs):
    """Each review's score is that of its words; SFT comes near the entropy, and DPO tells the noisy
    labels apart, or the other way round, about as well as the metrics of training say."""
    for label, (found, rows) in runs.items():
        for name in ("SFT", "DPO"):
            part, scores = found[name], []
            for prompt, text in zip(found["prompts"], part["texts"]):
                scores.append(plain_score(prompt, text))
            logps, rewards = np.transpose(scores)
            assert part["grammar"] == pytest.approx(logps)
            accepted = part["accepted"]
            assert not (accepted & np.isnan(rewards)).any(), "what is accepted is a review"
            assert (accepted | np.isnan(rewards)).mean() > 0.98, "of 64 tokens few reach the end"
            assert part["rewards"][accepted] == pytest.approx(rewards[accepted])
            assert not part["rewards"][~accepted].any()
        assert 0 < found["loss"] - found["entropy"] < 0.2
        logged = rows[-1]["eval/rewards/accuracies"]
        assert found["accuracy"] == pytest.approx(logged, abs=0.08), label
        assert found["KL"].min() >= 0 and found["KL"].mean() > 10 * reviews.error(found["KL"])
    before = [found["SFT"]["texts"] for found, _ in runs.values()]
    after = [found["DPO"]["texts"] for found, _ in runs.values()]
    assert before[0] == before[1] == before[2], "of the same model, prompts and seed"
    assert after[0] != after[1] != after[2]
