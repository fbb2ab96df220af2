"""What the grammar knows exactly: best of n, a learned reward's tilt, DPO's limit, by brute force."""

import json
import math
from collections import Counter
from math import comb

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

import data
from experiments import exact, reviews

FEATURES = list(exact.FEATURES)


@pytest.fixture
def small(monkeypatch) -> reviews.Reviews:
    """A grammar whose reviews can all be listed, and evaluation prompts of two kinds."""
    monkeypatch.setattr(reviews, "VERBS", {"was": 1.0})
    monkeypatch.setattr(reviews, "ADVERBS", {"": (0.6, 0.0), "sadly": (0.4, -0.8)})
    grammar = reviews.Reviews()
    prompts = {
        kind: [x for x in grammar.prompts["eval"] if f" {kind} " in x] for kind in reviews.KINDS
    }
    grammar.prompts["eval"] = prompts["film"][:3] + prompts["hotel"][:1]
    return grammar


def every_review(grammar, kind: str, rewards=None) -> np.ndarray:
    """Probability, true reward and the sum of `rewards` of each review that there is, (3, reviews)."""
    found, before = [], np.array([[1.0], [0.0], [0.0]])
    for n, c in enumerate(grammar.clauses[kind]):
        learned = c.r if rewards is None else rewards[kind][n]
        before = np.array([np.multiply.outer(before[0], c.p), np.add.outer(before[1], c.r),
                           np.add.outer(before[2], learned)]).reshape(3, -1)  # fmt: skip
        found.append(before * [[reviews.COUNTS[n]], [1], [1]])
    return np.concatenate(found, axis=1)


def mean_of_kinds(policies: dict) -> list[float]:
    """(E r, KL) of {kind: (policy, p, r)} over the small grammar's prompts: three films, a hotel."""
    found = {}
    for kind, (policy, p, r) in policies.items():
        some = policy > 0
        kl = policy[some] @ np.log(policy[some] / p[some])
        found[kind] = np.array([policy @ r, kl])
    return list(0.75 * found["film"] + 0.25 * found["hotel"])


@pytest.mark.parametrize("n", [1, 2, 3, 20])
def test_best_of_n_is_that_of_all_reviews(small, n):
    """A review wins if no draw is better, and one time in j + 1 if j others are as good."""
    policies, simulated = {}, {}
    for kind in ("film", "hotel"):
        p, r, _ = every_review(small, kind)
        r = np.round(r, 6)
        order = np.argsort(r)
        cumulative = np.append(0.0, p[order].cumsum())
        worse = cumulative[np.searchsorted(r[order], r, "left")]
        same = cumulative[np.searchsorted(r[order], r, "right")] - worse
        ways = [comb(n - 1, j) * same**j * worse ** (n - 1 - j) / (j + 1) for j in range(n)]
        policies[kind] = n * p * np.sum(ways, axis=0), p, r
        draws = np.random.default_rng(0).choice(r, (5000, n), p=p / p.sum()).max(1)
        simulated[kind] = draws
    assert policies["film"][0].sum() == pytest.approx(1, abs=1e-9)
    reward, kl = exact.best_of_n(small, n)
    assert [reward, kl] == pytest.approx(mean_of_kinds(policies), rel=1e-9, abs=1e-12)
    mean = 0.75 * simulated["film"].mean() + 0.25 * simulated["hotel"].mean()
    assert reward == pytest.approx(mean, abs=5 * simulated["film"].std() / 5000**0.5)
    if n > 1:  # two draws that tie make it less than what is known of rewards without ties
        assert 0 < kl < math.log(n) - (n - 1) / n


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_tilt_is_that_of_all_reviews(small, beta):
    """By rewards that are not the true ones, so that E r̂ and E r differ."""
    rng = np.random.default_rng(0)
    rewards = {
        kind: [c.r * 0.5 + rng.normal(size=len(c.r)) for c in positions]
        for kind, positions in small.clauses.items()
    }
    policies = {}
    for kind in ("film", "hotel"):
        p, r, learned = every_review(small, kind, rewards)
        policy = p * np.exp(learned / beta)
        policies[kind] = policy / policy.sum(), p, r
    assert exact.tilt(small, rewards, beta) == pytest.approx(mean_of_kinds(policies), rel=1e-9)


def test_tilt_by_the_true_reward_is_the_optimum():
    grammar = reviews.Reviews()
    true = {kind: [c.r for c in positions] for kind, positions in grammar.clauses.items()}
    shifted = {kind: [r + 5 for r in rewards] for kind, rewards in true.items()}
    for beta in (0.1, 0.5, 1.0, 30.0):
        assert exact.tilt(grammar, true, beta) == pytest.approx(grammar.optimum(beta), rel=1e-9)
    assert exact.tilt(grammar, shifted, 1.0)[1] > grammar.optimum(1.0)[1], "longer ones are better"
    none = {kind: [0 * r for r in rewards] for kind, rewards in true.items()}
    assert exact.tilt(grammar, none, 1.0) == pytest.approx(grammar.optimum(math.inf), abs=1e-12)
    reward, kl = exact.tilt(grammar, true, 1e-4)  # exp(r/β) is no longer a number
    best = {k: np.array(sum(c.r.max() for c in cs)) for k, cs in grammar.clauses.items()}
    assert reward == pytest.approx(float(grammar.mean(best)), abs=1e-9) and 12 < kl < 20


@pytest.mark.parametrize("features", FEATURES)
def test_features_are_those_of_the_texts(features):
    """Counted in the texts once more; r is a sum of what "words" and "all words" see, exactly."""
    grammar = reviews.Reviews(seed=3)
    examples = grammar.preferences(500, "train")
    tables = exact.feature_tables(grammar, features)
    x = exact.differences(tables, exact.locate(grammar, examples))

    def count(prompt: str, review: str) -> Counter:
        kind, words = prompt.split()[4], review.replace(",", "").removesuffix(".").split()
        adverbs = [w for w in words if w in reviews.ADVERBS]
        adjectives = [(kind, w) for w in words if w in reviews.ADJECTIVES]
        return Counter({
            "words": adverbs + adjectives,
            "all words": [(kind, w) for w in words],
            "no adverbs": adjectives,
            "length": ["word"] * len(words),
        }[features])  # fmt: skip

    counts = [[count(e.prompt, y) for y in e.responses] for e in examples]
    names = sorted({name for pair in counts for c in pair for name in c}, key=str)
    plain = np.array([[a[name] - b[name] for name in names] for a, b in counts])
    assert np.array_equal(x @ x.T, plain @ plain.T), "the same, whatever the order of the columns"

    true = np.array([grammar.score(e.prompt, a)[1] - grammar.score(e.prompt, b)[1]
                     for e in examples for a, b in [e.responses]])  # fmt: skip
    theta, *_ = np.linalg.lstsq(x, true, rcond=None)
    error = np.abs(x @ theta - true).max()
    assert error < 1e-9 if "words" in features else error > 0.5


def test_the_fit_is_the_maximum_and_finds_the_truth():
    """Autograd's gradient is zero there, also of pairs that can be told apart; and in units of the
    errors that the curvature promises, what is learned of the pairs is the true reward."""
    grammar = reviews.Reviews()
    examples = grammar.preferences(8000, "train")
    tables = exact.feature_tables(grammar, "words")
    x = exact.differences(tables, exact.locate(grammar, examples))
    apart = exact.differences(
        exact.feature_tables(grammar, "all words"), exact.locate(grammar, examples[:60])
    )
    far = np.array(
        [[13.3, 6.9], [-12, -11.5], [0.1, 0], [0.5, -2], [20.1, -3.8]]
    )  # whole steps swing
    for x_, ridge in ((x, 1e-3), (x[:300], 2.0), (apart, 1e-3), (far, 1e-3)):
        theta = torch.tensor(exact.fit(x_, ridge), requires_grad=True)
        loss = ridge / 2 * theta.dot(theta) - logsigmoid(torch.tensor(x_) @ theta).sum()
        loss.backward()
        assert theta.grad.abs().max() < 1e-6
    assert (apart @ exact.fit(apart) > 0).all() and np.abs(exact.fit(apart)).max() < 30

    learned = exact.fit(x)
    sigma = 1 / (1 + np.exp(-x @ learned))
    covariance = np.linalg.inv((x.T * (sigma * (1 - sigma))) @ x + 1e-3 * np.eye(x.shape[1]))
    scores = [[grammar.score(e.prompt, y)[1] for y in e.responses] for e in examples[:500]]
    gaps = np.array(scores) @ [1, -1]
    errors = np.sqrt(np.einsum("pi,ij,pj->p", x[:500], covariance, x[:500]))
    some = errors > 0  # the same words, or others that do not matter
    z = (x[:500] @ learned - gaps)[some] / errors[some]
    assert 0.6 < (z**2).mean() ** 0.5 < 1.4 and errors.mean() < 0.3 and some.mean() > 0.95
    for kind, found in exact.rewards_of(tables, learned).items():
        assert all(np.array_equal(r, t @ learned) for r, t in zip(found, tables[kind]))


def test_dpo_limit_is_where_the_loss_of_all_pairs_ends(small):
    """Minimised once more over a reward for each level, by torch."""
    flip, policies = 0.2, {}
    for kind in ("film", "hotel"):
        p, r, _ = every_review(small, kind)
        r, index = np.unique(np.round(r, 6), return_inverse=True)
        p = np.bincount(index, p)
        m, t = torch.tensor(p), torch.tensor(r)
        right = torch.sigmoid(t[:, None] - t)
        weights = m[:, None] * m * (flip * (1 - right) + (1 - flip) * right)
        learned = torch.zeros_like(t, requires_grad=True)
        scale = m.sqrt()  # of rare levels the loss says little
        options = {"max_iter": 1000, "tolerance_grad": 1e-13, "tolerance_change": 0}
        optimizer = torch.optim.LBFGS(
            [learned], history_size=50, line_search_fn="strong_wolfe", **options
        )

        def closure():
            optimizer.zero_grad()
            h = learned / scale
            loss = -(weights * logsigmoid(h[:, None] - h)).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        policy = p * np.exp((learned / scale).detach().numpy())
        policies[kind] = policy / policy.sum(), p, r
    assert exact.dpo_limit(small, 1.0, flip) == pytest.approx(mean_of_kinds(policies), rel=1e-4)
    for beta in (0.3, 0.7, 3.0):  # with none wrong it is π*
        assert exact.dpo_limit(small, beta, 0.0) == pytest.approx(small.optimum(beta), rel=1e-9)


def rlhf(grammar, examples, features: str, betas) -> list[dict]:
    tables = exact.feature_tables(grammar, features)
    return exact.rlhf(grammar, tables, exact.locate(grammar, examples), betas)


def test_nothing_is_above_the_frontier():
    """E r − β·KL is at most that of the optimum for β, for any β; of some it is close."""
    grammar = reviews.Reviews(seed=1)
    betas = np.geomspace(0.05, 1e4, 150)
    values = np.array(
        [reward - beta * kl for beta in betas for reward, kl in [grammar.optimum(beta)]]
    )
    slack = lambda point: (values - point["reward"] + betas * point["kl"]).min()
    found = exact.curves(grammar)
    examples = grammar.preferences(3000, "train")
    for features in FEATURES:
        for n in (100, 3000):
            points = rlhf(grammar, examples[:n], features, (0.3, 1.0, 3.0))
            assert [point["beta"] for point in points] == [0.3, 1.0, 3.0]
            assert min(map(slack, points)) > 0
            assert points[0]["kl"] > points[1]["kl"] > points[2]["kl"] > 0
    few, many = (rlhf(grammar, examples[:n], "words", [1.0])[0] for n in (100, 3000))
    assert slack(many) < 0.05 < slack(few), "with more pairs it comes near"
    wrong = dict(zip(("reward", "kl"), exact.dpo_limit(grammar, 0.5, 0.2)))
    assert 0.01 < slack(wrong) < 0.1
    assert all(slack(point) > 0.02 for point in found["best_of_n"][1:])
    on_it = [{"kl": kl, "reward": r} for kl, r in zip(*found["frontier"].values())]
    assert all(-1e-9 < slack(point) < 1e-2 for point in on_it)


def test_the_curves_are_what_a_figure_needs():
    found = json.loads(json.dumps(exact.curves(reviews.Reviews())))
    kls, rewards = found["frontier"]["kl"], found["frontier"]["reward"]
    assert len(kls) == len(rewards) > 200 and kls[0] == 0 and 14 < kls[-1] < 15
    assert (np.diff(kls) > 0).all() and (np.diff(rewards) > 0).all()
    assert found["start"] == rewards[0] == pytest.approx(0.36932075)
    assert [point["n"] for point in found["best_of_n"]] == [2**k for k in range(11)]
    first, second, *_ = found["best_of_n"]
    assert first == {
        "n": 1,
        "reward": pytest.approx(found["start"]),
        "kl": pytest.approx(0, abs=1e-12),
    }
    assert (second["reward"], second["kl"]) == pytest.approx((1.321936593, 0.192419248), rel=1e-8)


def test_the_table_has_these_figures(capsys, monkeypatch):
    grammar = reviews.Reviews(seed=2)
    examples = grammar.preferences(300, "train")
    assert examples[:100] == grammar.preferences(100, "train"), "fewer pairs are the first ones"
    turned = exact.flip_labels(examples, 0.2, 2)
    flipped = [a != b for a, b in zip(examples, turned)]
    assert 35 < sum(flipped) < 85
    assert all(
        b.responses == a.responses[:: -1 if f else 1] for a, b, f in zip(examples, turned, flipped)
    )
    monkeypatch.setattr("sys.argv", "exact.py --pairs=300 --seed=2 --flip=0.2".split())
    exact.main()
    printed = capsys.readouterr().out
    start = grammar.optimum(math.inf)[0]
    for features in FEATURES:
        [line] = [line for line in printed.splitlines() if line.startswith(f"  {features}  ")]
        for point in rlhf(grammar, turned, features, exact.BETAS):
            share = (point["reward"] - start) / (grammar.frontier(point["kl"]) - start)
            cell = f"{point['reward'] - start:6.3f} at {point['kl']:6.3f}"
            assert cell in line
            said = float(line.split(cell)[1].split("%")[0])
            assert said == pytest.approx(100 * share, abs=0.3)
    for point in exact.curves(grammar)["best_of_n"][1:]:
        cell = f"  {point['n']:<22}{point['reward'] - start:6.3f} at {point['kl']:6.3f} "
        [line] = [line for line in printed.splitlines() if line.startswith(cell)]
        assert line.endswith(f" {math.log(point['n']) - 1 + 1 / point['n']:.3f}")


def test_many_pairs_are_of_three_seeds(capsys, monkeypatch):
    """More than 6,000 take long: the other seeds are left out."""
    seen, one = [], reviews.Reviews().preferences(1, "train")
    monkeypatch.setattr(exact, "Reviews", lambda seed=0: seen.append(seed) or reviews.Reviews(seed))
    monkeypatch.setattr(reviews.Reviews, "preferences", lambda *_: one)
    exact.show([7000], range(5), 0.0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  words ")]
    assert seen == [0, 0, 1, 2] and len(lines) == 1 and "  7,000 " in lines[0]


def test_what_is_refused(capsys, monkeypatch):
    grammar = reviews.Reviews()
    prompt = "Review of the new film Amber:"
    fine = grammar.write(prompt, np.random.default_rng(0))
    with pytest.raises(data.DataError, match="no such review of a film: ' It was good.'"):
        exact.locate(grammar, [data.Example(prompt, (fine, " It was good."))])
    for flag, why in (("--pairs=0", "--pairs must be at least 1"), ("--flip=1.2", "a share"),
                      ("--flip=nan", "a share"), ("--seed=-1", "--seed must be at least 0")):  # fmt: skip
        monkeypatch.setattr("sys.argv", ["exact.py", flag])
        with pytest.raises(SystemExit, match="2"):
            exact.main()
        assert why in capsys.readouterr().err
