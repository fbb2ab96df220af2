"""What the grammar of reviews.py knows exactly of other ways to spend a KL, without a model.

    python experiments/exact.py                                   # the table
    python experiments/exact.py --pairs=300 --seed=4 --flip=0.2   # a part of it, from worse labels

R*(KL) is the highest expected reward of any policy: `Reviews.optimum` for each β.

Best of n: of n reviews the one with the highest true reward. log n − (n−1)/n, which stands for its
KL elsewhere, is exact for rewards without ties, and else an upper bound (Beirami et al.,
2401.01879). Here one pair of reviews in twenty ties, and the exact point lies left of it.

RLHF with perfect optimisation: a Bradley-Terry reward r̂ is fitted to the pairs that DPO gets, by
maximum likelihood, and p·exp(r̂/β)/Z is where reinforcement learning would end if it made no error.
What is lost is lost by the reward: because pairs are few, or because its features miss something.
r̂ is a sum over the words of a review, and so over its clauses, which keeps the tilt exact.

DPO on all the pairs there are, of which a share ε is labelled the other way round: a is preferred
with probability ε + (1−2ε)·σ(r(a) − r(b)), which is Bradley-Terry of no reward. The one that
fits best shrinks differences, the large ones most, and its tilt is a little below the frontier.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from experiments.reviews import ADVERBS, COUNTS, Reviews

Tables = dict[str, list[np.ndarray]]  # of each kind: for each position (clauses, …)
SIZES, SEEDS, BETAS = (100, 300, 1000, 3000, 6000, 30_000), 10, (0.5, 1.0, 2.0)
RIDGE = 1e-3  # of the Gaussian prior N(0, 1/RIDGE) on each weight, the same for any number of pairs

# What a reward model sees of a clause: its names, each with a weight of its own. The true reward is
# a sum over those of "words"; "all words" has to find out which ones matter; two miss some.
FEATURES: dict[str, Callable[[str, list[str]], list]] = {
    "words": lambda kind, words: [w for w in words if w in ADVERBS] + [(kind, words[-1])],
    "all words": lambda kind, words: [(kind, w) for w in words],
    "no adverbs": lambda kind, words: [(kind, words[-1])],
    "length": lambda kind, words: ["word"] * len(words),
}


def merge(rewards: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A distribution's levels, ascending, and their mass; what differs by rounding is one level."""
    levels, index = np.unique(np.round(rewards, 6), return_inverse=True)
    return levels, np.bincount(index.ravel(), p.ravel())


def distribution(grammar: Reviews, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(levels, mass) of the true reward of a review: clauses add up, so their tables convolve."""
    rewards, p = np.zeros(1), np.ones(1)
    found = []  # of one, two, three clauses
    for clauses, count in zip(grammar.clauses[kind], COUNTS):
        r, mass = merge(clauses.r, clauses.p)
        rewards, p = merge(np.add.outer(rewards, r), np.outer(p, mass))
        found.append((rewards, count * p))
    return merge(*map(np.concatenate, zip(*found)))


def mean(grammar: Reviews, results: dict[str, np.ndarray]) -> tuple[float, float]:
    """(E r, KL) over the evaluation prompts, of those of each kind."""
    reward, kl = grammar.mean(results)
    return float(reward), max(float(kl), 0.0)  # no −1e-16


def best_of_n(grammar: Reviews, n: int) -> tuple[float, float]:
    """(E r, KL(best of n ‖ p)), mean over evaluation prompts. The best of n has reward r with
    probability F(r)ⁿ − F(r⁻)ⁿ, and within a level it is distributed as p is, for ties are broken
    by chance: so KL is that between the two distributions of levels."""
    results = {}
    for kind in grammar.clauses:
        levels, mass = distribution(grammar, kind)
        best = np.diff(np.minimum(mass.cumsum(), 1) ** n, prepend=0)
        some = best > 0  # of low levels nothing is left
        kl = best[some] @ np.log(best[some] / mass[some])
        results[kind] = np.array([best @ levels, kl])
    return mean(grammar, results)


def feature_tables(grammar: Reviews, features: str) -> Tables:
    """How often each feature is in each clause: (clauses, features) for each kind and position."""
    look = lambda kind, text: FEATURES[features](kind, re.findall(r"\w+", text))
    column, tables = {}, {}
    for kind, positions in grammar.clauses.items():
        for name in (name for c in positions for text in c.texts for name in look(kind, text)):
            column.setdefault(name, len(column))
    for kind, positions in grammar.clauses.items():
        tables[kind] = [np.zeros((len(c.texts), len(column))) for c in positions]
        for table, clauses in zip(tables[kind], positions):
            for row, text in zip(table, clauses.texts):
                for name in look(kind, text):
                    row[column[name]] += 1
    return tables


def locate(grammar: Reviews, examples: list[data.Example]) -> np.ndarray:
    """The clauses of pairs, (pairs, chosen and rejected, 3): a row in the stack of all tables, -1
    where a review has ended. Raises DataError for a response that is no review of the grammar's."""
    sizes = [len(c.texts) for positions in grammar.clauses.values() for c in positions]
    first = dict(zip(grammar.clauses, np.cumsum([0, *sizes])[:-1].reshape(-1, len(COUNTS))))
    rows = np.full((len(examples), 2, len(COUNTS)), -1)
    for i, example in enumerate(examples):
        kind = example.prompt.split()[4]
        chosen, rejected = example.responses
        for j, response in enumerate((chosen, rejected)):
            if grammar.score(example.prompt, response)[0] == -math.inf:
                raise data.DataError(f"the grammar has no such review of a {kind}: {response!r}")
            for n, text in enumerate(re.split("(?=,)", response.removesuffix("."))):
                rows[i, j, n] = first[kind][n] + grammar.clauses[kind][n].index[text]
    return rows


def differences(tables: Tables, rows: np.ndarray) -> np.ndarray:
    """Features of chosen − of rejected, (pairs, features), of pairs that were located."""
    found = [table for positions in tables.values() for table in positions]
    stack = np.concatenate([*found, np.zeros((1, found[0].shape[1]))])  # row -1: no clause
    return sum(stack[rows[:, 0, n]] - stack[rows[:, 1, n]] for n in range(len(COUNTS)))


def fit(x: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """θ (features,) that maximises Σ log σ(x·θ) − ½ ridge·|θ|², x (pairs, features), by Newton's
    method. Concave, and thanks to the prior with one maximum even where the pairs can be told apart
    without an error, or do not tell two features apart."""
    theta = np.zeros(x.shape[1])
    value = lambda theta: -np.logaddexp(0, -x @ theta).sum() - ridge / 2 * theta @ theta
    while True:
        wrong = np.exp(-np.logaddexp(0, x @ theta))  # σ(−x·θ)
        gradient = x.T @ wrong - ridge * theta
        curvature = (x.T * (wrong * (1 - wrong))) @ x + ridge * np.eye(len(theta))
        step = np.linalg.solve(curvature, gradient)
        if gradient @ step < 1e-9:  # twice what is still to be gained
            return theta + step
        while value(theta + step) < value(theta):  # too far, for the curvature has changed
            step = step / 2
        theta = theta + step


def rewards_of(tables: Tables, theta: np.ndarray) -> Tables:
    """r̂ of each clause, (clauses,) for each kind and position."""
    return {kind: [table @ theta for table in found] for kind, found in tables.items()}


def tilted(p: np.ndarray, true: np.ndarray, learned: np.ndarray, beta: float) -> tuple:
    """(log Z, E r, E r̂) of p·exp(r̂/β)/Z, given p, r and r̂ of everything there is."""
    weights = p * np.exp((learned - learned.max()) / beta)
    z = weights.sum()
    return math.log(z) + learned.max() / beta, weights @ true / z, weights @ learned / z


def tilt(grammar: Reviews, rewards: Tables, beta: float) -> tuple[float, float]:
    """(E r, KL(π‖p)) of π ∝ p·exp(r̂/β), r the true reward and r̂ the sum of `rewards` over clauses
    (from `rewards_of`), mean over evaluation prompts. Of r̂ = r it is `Reviews.optimum`."""
    results = {}
    for kind, positions in grammar.clauses.items():
        found = [tilted(c.p, c.r, learned, beta) for c, learned in zip(positions, rewards[kind])]
        log_z, true, learned = np.cumsum(found, axis=0).T  # of one, two, three clauses
        weights = np.log(COUNTS) + log_z
        log_total = np.logaddexp.reduce(weights)
        counts = np.exp(weights - log_total)  # probability of one, two, three clauses under π
        results[kind] = np.array([counts @ true, counts @ learned / beta - log_total])
    return mean(grammar, results)


def rlhf(grammar: Reviews, tables: Tables, located: np.ndarray, betas) -> list[dict]:
    """True reward and KL of RLHF that optimises perfectly the reward that a Bradley-Terry model of
    these features learns from pairs that were located."""
    rewards = rewards_of(tables, fit(differences(tables, located)))
    points = [(beta, *tilt(grammar, rewards, beta)) for beta in betas]
    return [dict(zip(("beta", "reward", "kl"), point)) for point in points]


def dpo_limit(grammar: Reviews, beta: float, flip: float) -> tuple[float, float]:
    """(E r, KL) of the policy that minimises DPO's loss on all the pairs there are, of which a
    share `flip` (below ½) is labelled the other way round, mean over evaluation prompts. Its
    implicit reward is a function of the true one, as the labels are: one number for each level."""
    results = {}
    for kind in grammar.clauses:
        levels, mass = distribution(grammar, kind)
        wins = flip + (1 - 2 * flip) / (1 + np.exp(levels - levels[:, None]))  # row against column
        learned, step = np.zeros(len(levels)), np.inf
        while np.abs(step).max() > 1e-9:  # Newton, to where each level wins as often as believed
            believed = 1 / (1 + np.exp(learned - learned[:, None]))
            slope = believed * (1 - believed) * mass
            slope = np.diag(slope.sum(1)) - slope + mass  # + mass: a constant is not determined
            step = np.linalg.solve(slope, (wins - believed) @ mass)
            learned = learned + step
        log_z, true, implicit = tilted(mass, levels, learned, beta)
        results[kind] = np.array([true, implicit / beta - log_z])
    return mean(grammar, results)


def curves(grammar: Reviews) -> dict:
    """What a figure of reward against KL draws: R*(KL), best of 1, 2, 4 … 1024."""
    start = grammar.optimum(math.inf)[0]
    rewards, kls = grammar.curve().tolist()
    best = [(n, *best_of_n(grammar, n)) for n in 2 ** np.arange(11)]
    return {
        "start": start,
        "frontier": {"kl": [0.0, *kls], "reward": [start, *rewards]},
        "best_of_n": [dict(zip(("n", "reward", "kl"), (int(n), *point))) for n, *point in best],
    }


def flip_labels(examples: list[data.Example], share: float, seed: int) -> list[data.Example]:
    """The other response is the chosen one in about this share of the pairs."""
    flipped = np.random.default_rng([seed, 3]).random(len(examples)) < share
    return [e._replace(responses=e.responses[::-1]) if f else e for e, f in zip(examples, flipped)]


def show(sizes: list[int], seeds: list[int], flip: float):
    """Print the table: rewards gained, KL and the share of what is possible at that KL."""
    grammar = Reviews()
    found = curves(grammar)
    start, kls, rewards = found["start"], *found["frontier"].values()
    best = lambda kl: np.interp(kl, kls, rewards) - start

    def cell(points) -> str:
        """Of one (reward, KL), or of several their mean gain, by the mean of what is possible."""
        gain, kl = np.reshape(points, (-1, 2)).T - [[start], [0]]
        return f"{gain.mean():6.3f} at {kl.mean():6.3f} {gain.mean() / best(kl).mean():6.1%}"

    print(f"reward at the start {start:.3f}; at most gained, R*(KL) - start, at a KL of")
    print("  " + ", ".join(f"{kl:g}: {best(kl):.3f}" for kl in (0.1, 0.25, 0.5, 1, 2, 4, 8)))
    print("\nbest of n: gained, at a KL of, share of what is possible there; KL if nothing tied")
    for point in found["best_of_n"][1:]:
        n = point["n"]
        bound = math.log(n) - (n - 1) / n
        print(f"  {n:<22}{cell((point['reward'], point['kl']))}   {bound:6.3f}")
    print("\n" + " " * 24 + "   ".join(f"{f'β = {beta:g}':23}" for beta in BETAS))
    print("DPO on all pairs, of which wrong")
    for share in (0.0, 0.1, 0.2, 0.3):
        cells = [cell(dpo_limit(grammar, beta, share)) for beta in BETAS]
        print(f"  {share:<22.0%}" + "   ".join(cells))

    print("RLHF, perfectly optimised: features, pairs")
    located = {}
    for seed in seeds:
        known = [n for n in sizes if n <= 6000 or seed in seeds[:3]]  # more of them take long
        if known:
            pairs = flip_labels(Reviews(seed).preferences(max(known), "train"), flip, seed)
            located[seed] = locate(grammar, pairs), known
    for features in FEATURES:
        points, tables = {}, feature_tables(grammar, features)
        for rows, known in located.values():
            for n in known:
                made = rlhf(grammar, tables, rows[:n], BETAS)
                points.setdefault(n, []).append([(p["reward"], p["kl"]) for p in made])
        for n, made in points.items():  # (seeds, β, 2)
            cells = [cell(points) for points in np.swapaxes(made, 0, 1)]
            print(f"  {features:12}{n:7,}   " + "   ".join(cells), flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, help=f"how many (default each of {SIZES})")
    parser.add_argument("--seed", type=int, help=f"of the pairs (default a mean over {SEEDS})")
    parser.add_argument("--flip", type=float, default=0.0, help="share of wrong labels (default 0)")
    args = parser.parse_args()
    if args.pairs is not None and args.pairs < 1:
        parser.error("--pairs must be at least 1")
    if args.seed is not None and args.seed < 0:
        parser.error("--seed must be at least 0")
    if not 0 <= args.flip <= 1:
        parser.error("--flip is a share, from 0 to 1")
    sizes = SIZES if args.pairs is None else [args.pairs]
    show(sizes, range(SEEDS) if args.seed is None else [args.seed], args.flip)


if __name__ == "__main__":
    main()
