"""DPO beside what it replaces: how far each comes, and what it needs.

    python experiments/rlhf.py out/reviews --beta 0.3 1 3 --out=rows.json

A row for each method: its true reward and KL(π‖π_ref) on held-out prompts with their standard
errors, its share of what R*(KL) gains, how many responses are reviews that end (others count as
reward 0), and the learned reward that it thinks it has. Then what it took: seconds (of DPO those of
its steps by its log, without the one pass of the reference), samples drawn (of best of N for these
answers: it has no training, and so no end), models in memory, and beyond what SFT has already lines
of code and knobs.
"""

import argparse
import inspect
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import dpo
import sample
from experiments import rlhf
from experiments.reviews import error
from extra.reward import measure_kl
from model import CheckpointError

# What each needs beyond SFT: models in memory, code, and knobs.
MODEL = rlhf.read_rewards, rlhf.bradley_terry, rlhf.train_reward_model
POLICY = rlhf.rloo_loss, rlhf.rloo
SAMPLING = sample.sample_tokens, sample.generate, sample.draw, rlhf.rewards_of
KNOBS = "β, rate, steps, prompts, k, longest response, reward without end"
NEEDS = {
    "SFT": (1, (), ""),
    "DPO": (1, (dpo.Pairs, dpo.dpo, dpo.preference_loss, dpo.reference_logps), "β, rate, batch"),
    "best of N": (2, (*MODEL, *SAMPLING, rlhf.best_of_n), "rate, batch, epochs; N"),
    "RLOO": (3, (*MODEL, *SAMPLING, *POLICY), f"rate, batch, epochs; {KNOBS}"),
    "RLOO, true reward": (2, (*SAMPLING, *POLICY), KNOBS),
}


def compare(run: Path, betas: list[float], steps: int, count: int, seed: int) -> list[dict]:
    """Print and return a row of each method, on `count` held-out prompts. Raises DataError."""
    for name in ("run.json", "metrics.jsonl", "sft.jsonl", "pairs.jsonl", "config.json", "sft"):
        if not (run / name).exists():
            why = "give a finished run of the built-in experiment, as python train.py makes it"
            raise data.DataError(f"{run / name} is missing: {why}")
    settings = data.read_row(str(run / "run.json"), (run / "run.json").read_bytes())["settings"]
    if Path(settings["data"]).name != "pairs.jsonl":
        raise data.DataError(f"{run}: this run was trained on {settings['data']}, not on reviews")
    if settings.get("loss") != "dpo" or settings.get("sft_weight"):
        raise data.DataError(f"{run}: this run was not trained with DPO's own loss (--loss=dpo)")
    if count < 2 or min(steps, seed) < 0 or not all(0 <= beta < math.inf for beta in betas):
        raise data.DataError("--count must be at least 2, --steps, --seed and --beta at least 0")
    log = [row for _, row in data.read_jsonl(str(run / "metrics.jsonl")) if row["stage"] == "dpo"]
    rates = {row["step"]: row["pairs_per_second"] for row in log if "pairs_per_second" in row}
    prompts = np.random.default_rng(0).choice(rlhf.GRAMMAR.prompts["eval"], count).tolist()
    (policy, tokenizer), (reference, _) = sample.load(run), sample.load(run / "sft")
    rows, show = [], lambda cells: print("|", " | ".join(map(str, cells)), "|", flush=True)

    def add(method: str, setting: str, trees: list, kl: np.ndarray, samples: int, seconds: float):
        true, learned = (
            rlhf.rewards_of(prompts, trees, tokenizer, m) for m in (None, reward_model)
        )
        accepted, true = true > rlhf.WORST, np.where(true > rlhf.WORST, true, 0.0)
        best = rlhf.GRAMMAR.frontier(kl.mean()) - rlhf.GRAMMAR.frontier(0.0)
        gain = true.mean() - (rows[0]["reward"] if rows else true.mean())
        row = {"reward": true.mean(), "reward_error": error(true), "kl": kl.mean()}
        row |= {"kl_error": error(kl), "share": gain / (best or 1.0), "accepted": accepted.mean()}
        row |= {"learned": learned.mean(), "seconds": seconds}
        row = {name: round(float(x), 4) for name, x in row.items()}
        models, code, knobs = NEEDS[method]
        lines = sum(inspect.getsource(part).count("\n") for part in code)
        needs = {"samples": samples, "models": models, "lines": lines, "knobs": knobs}
        rows.append({"method": method, "setting": setting, "seed": seed} | row | needs)
        if len(rows) == 1:
            show(rows[0])
            show("---" for _ in rows[0])
        show(rows[-1].values())

    clock = time.perf_counter
    began = clock()
    reward_model = rlhf.train_reward_model(run / "sft", run / "pairs.jsonl", seed=seed)
    learning, began = clock() - began, clock()
    asked = np.repeat(prompts, 16).tolist()
    drawn = sample.draw(reference, tokenizer, asked, 64)
    rewards, drawing = rlhf.rewards_of(asked, drawn, tokenizer, reward_model), clock() - began
    add("SFT", "", drawn[::16], np.zeros(count), 0, 0.0)
    pairs = settings["batch_size"] * np.diff([0, *rates])  # of the run, by its own log
    seconds = sum(pairs / list(rates.values()))
    trees = sample.draw(policy, tokenizer, prompts, 64)
    kl = measure_kl(policy, reference, trees)
    add("DPO", f"beta={settings['beta']:g}", trees, kl, 0, seconds)
    for n in (4, 16):
        trees, kl = rlhf.best_of_n(drawn, rewards, 16, n), np.full(count, math.log(n) - (n - 1) / n)
        add("best of N", f"N={n}", trees, kl, n * count, learning + drawing * n / 16)
    for beta, method in itertools.product(betas, ("RLOO", "RLOO, true reward")):
        began, model = clock(), reward_model if method == "RLOO" else None
        policy = rlhf.rloo(run / "sft", model, beta, steps, seed=seed)
        seconds = clock() - began + (learning if model else 0.0)
        trees = sample.draw(policy, tokenizer, prompts, 64)
        kl = measure_kl(policy, reference, trees)
        add(method, f"beta={beta:g}", trees, kl, steps * 32 * 4, seconds)
    return rows


def main():
    layout = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("--beta", type=float, nargs="+", default=[1.0], help="of RLOO (default 1)")
    for name, value in (("steps", 200), ("count", 2000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"(default {value})")
    parser.add_argument("--out", type=Path, help="write the rows there, as one list of JSON")
    args = parser.parse_args()
    try:
        rows = compare(args.run, args.beta, args.steps, args.count, args.seed)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    except (data.DataError, CheckpointError, OSError) as problem:
        sys.exit(f"rlhf.py: {problem}")


if __name__ == "__main__":
    main()
