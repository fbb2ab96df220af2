"""experiments/report.py, on made-up runs on the exact frontier of the reviews, less a gap."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_here, run_script, write_jsonl

from experiments import report
from experiments.reviews import Reviews

METHODS = {  # settings, KL at the first of them, gap at KL 1, its growth
    "DPO": ((0.1, 0.3, 0.5, 1.0, 2.0, 5.0), 6.5, 0.12, 0.8),
    "IPO": ((0.05, 0.1, 0.2, 0.5), 5.0, 0.16, 0.9),
    "SimPO": ((2.0, 5.0, 10.0, 20.0), 9.0, 0.5, 1.1),
    "KTO": ((0.1, 0.3, 1.0, 3.0), 5.5, 0.22, 0.9),
    "DPO, length-normalised": ((1.0, 3.0, 10.0, 30.0), 4.0, 0.3, 0.7),
    "RPO": ((0.3, 1.0, 3.0), 2.5, 0.18, 0.7),
    "Preferred-FT": ((1.0,), 0.25, 0.45, 0.3),
    "unlikelihood": ((0.3, 0.6), 1.6, 0.6, 0.4),
}
KLS = 0.02 * 1.03 ** np.arange(225)


@pytest.fixture(scope="module")
def grammar() -> Reviews:
    return Reviews()


def make_exact(grammar) -> dict:
    """What exact.json holds: the true frontier, and plausible opponents under it."""
    points = np.array([grammar.optimum(beta) for beta in np.geomspace(1e5, 0.05, 300)])
    best = lambda kl: float(np.interp(kl, points[:, 1], points[:, 0]))
    exact = {"frontier": {"kl": points[:, 1].tolist(), "reward": points[:, 0].tolist()}}
    exact["start"] = points[0, 0]
    for n in (2, 4, 8, 16, 64, 256, 1024):
        kl = 0.93 * (math.log(n) - (n - 1) / n)
        row = {"n": n, "kl": kl, "reward": best(kl) - 0.02 * kl}
        exact.setdefault("best_of_n", []).append(row)
    for features, lost in (("words", 0.012), ("no adverbs", 0.3), ("length", 0.9)):
        for pairs in (100, 1000, 6000, 30000) if features == "words" else (6000,):
            for beta in (0.2, 0.5, 1.0, 2.0, 5.0):
                for seed in range(3):
                    kl = 1.5 / beta**1.6
                    kl = min(kl, 4 + kl / 4)
                    gap = lost * kl**0.9 * (6000 / pairs) ** 0.8 * (1 + 0.05 * seed)
                    row = {"features": features, "pairs": pairs, "seed": seed, "beta": beta}
                    row |= {"kl": kl, "reward": max(best(kl) - gap, 0.2)}
                    exact.setdefault("rlhf", []).append(row)
    return exact


def make_runs(directory: Path, exact: dict, seeds: int) -> list[dict]:
    """Runs of all panels, as experiments/frontier.py leaves them; rows of sweep.json."""
    rng, runs = np.random.default_rng(0), []
    kls, rewards = exact["frontier"]["kl"], exact["frontier"]["reward"]

    def run(panel, method, setting, x, seed, kl, lost, falls=0.0, outside=0.02):
        name = f"{panel}/{method}-{setting}/{seed}".replace(" ", "_")
        runs.append({"run": name, "panel": panel, "method": method, "setting": setting, "x": x, "seed": seed})  # fmt: skip
        name += f"-{x}" * (panel in ("flips", "pairs"))
        runs[-1]["run"] = name
        (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / name / "done").touch()
        rows = [{"stage": "sft", "step": 100, "train/loss": 1.0}]
        kl, lost = kl * rng.lognormal(0, 0.08), lost * rng.lognormal(0, 0.25)
        for step in (47, 94, 141, 188):
            share = 1 - math.exp(-step / 50)
            now, gap = kl * share**2, lost * share**1.2 + rng.normal(0, 0.012)
            rows.append({"stage": "dpo", "step": step, "policy/kl": now, "policy/kl_error": 0.01 * now,
                         "policy/reward": np.interp(now, kls, rewards) - gap, "policy/reward_error": 0.015,
                         "policy/accepted": 1 - outside * share, "policy/samples": 2000,
                         "eval/logps/chosen": -20 - 12 * falls * share, "eval/logps/rejected": -22 - 20 * falls * share - 3 * share})  # fmt: skip
        write_jsonl(directory / name / "metrics.jsonl", rows)
        (directory / name / "run.json").write_text(json.dumps({"settings": {"seed": seed}}))

    for seed in range(seeds):
        for method, (settings, kl, lost, growth) in METHODS.items():
            for x in settings:
                end = kl * (settings[0] / x) ** 0.95
                run("main", method, f"β={x:g}", x, seed, end, lost * end**growth)
                if method in ("DPO", "IPO"):
                    run(
                        "flips main", method, f"β={x:g}", x, seed, 0.7 * end, 2 * lost * end**growth
                    )
        for x in (0.0, 0.1, 0.2, 0.3):
            for method, slope in (("DPO", 6), ("cDPO", 4), ("robust", 3)):
                run("flips", method, "β=1", x, seed, 1.0, 0.1 * (1 + slope * x))
        for x in (100, 300, 1000, 3000, 10000, 30000):
            run("pairs", "DPO", "β=1", x, seed, 1.0, 0.12 * (6000 / x) ** 0.6)
        for x in (0.1, 0.3, 1.0, 3.0):
            run("labels", "Bradley–Terry", f"β={x:g}", x, seed, x**-0.9, 0.12 * x**-0.8)
            run("labels", "always right", f"β={x:g}", x, seed, 1.6 * x**-0.9, 0.3 * x**-0.8)
        for x, lost in ((1, 0.12), (2, 0.09), (3, 0.07)):
            run("rounds", "DPO", f"{x} rounds", x, seed, 1.0, lost)
        for method, falls, outside in (("DPO", 0.1, 0.02), ("f-DPO, JS", 3, 0.98), ("RPO", -0.1, 0.01), ("IPO", 0.4, 0.05)):  # fmt: skip
            run("displacement", method, "β=1", None, seed, 2.0, 0.5, falls, outside)
    return runs


def make_sweep(directory: Path, grammar, seeds: int) -> Path:
    exact = make_exact(grammar)
    runs = make_runs(directory, exact, seeds)
    for n, method in enumerate(("RLOO, learned reward", "RLOO, true reward")):
        for seed in range(seeds):
            for x, kl in ((0.5, 3.5), (1.0, 1.3), (2.0, 0.33)):
                best = np.interp(kl, exact["frontier"]["kl"], exact["frontier"]["reward"])
                row = {
                    "method": method,
                    "setting": f"β={x:g}",
                    "seed": seed,
                    "kl": kl,
                    "kl_error": 0.01,
                }
                row |= {
                    "reward": best - (0.25, 0.05)[n] * kl**0.8 - 0.01 * seed,
                    "reward_error": 0.015,
                }
                exact.setdefault("rloo", []).append(row)
    (directory / "rlhf.json").write_text(json.dumps(exact.pop("rloo")))
    (directory / "exact.json").write_text(json.dumps(exact))
    (directory / "sweep.json").write_text(json.dumps({"about": {"torch": "2.13"}, "runs": runs}))
    return directory


if __name__ == "__main__":  # a sample of the figures: python tests/test_report.py DIR [SEEDS]
    make_sweep(Path(sys.argv[1]), Reviews(), int(sys.argv[2]))
