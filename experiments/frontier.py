"""Reward against KL for every method, under the exact optimum: one command makes all the runs.

    python experiments/frontier.py                  # 2 hours on two cores; --quick: 7 minutes
    python experiments/report.py out/frontier       # the figures and tables, at any time

All runs are train.py's own loop, but for RLOO's (experiments/rlhf.py), on the built-in experiment
(experiments/reviews.py), from one SFT model. A seed is a set of pairs, their labels and their
order: the same for every method and setting, so that differences are paired. While a run goes on,
and at its end, samples of held-out prompts tell its true reward and its KL from the SFT model.
Every run has a directory of its own; a second start goes on where the first one was stopped. A run
is known by its settings: after a change of the code give another --out_dir.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch._dynamo  # an optimizer would, in each run anew

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import sample
import train
from experiments import exact, reviews, rlhf
from extra.guard import hold, sha256
from extra.reward import measure_kl
from model import CheckpointError, write_whole

STEPS, BATCH = 188, 32  # of a run, at least: an epoch of the usual number of pairs
RLOO_STEPS = 200  # of 128 samples each
RATE = 2e-4  # the learning rate of all but RLOO
DEMONSTRATIONS, PAIRS = 60_000, 6_000
SAMPLES = 250, 1_500  # of a look on the way, and at the end
METHODS = {  # name: loss and flags; what is varied, and its symbol; its values
    "DPO": ("dpo", "beta", "β", (0.05, 0.3, 1, 2, 5)),
    "IPO": ("ipo", "beta", "τ", (0.02, 0.06, 0.17, 0.4, 1)),
    "KTO": ("kto", "beta", "β", (0.3, 1, 2, 4, 8)),
    "SimPO": ("simpo --gamma=0.5", "beta", "β", (2, 5, 10, 20, 40)),
    "Preferred-FT": ("sft", "learning_rate", "lr ", (5e-5, 1e-4, 2e-4, 5e-4, 1e-3)),
    "RPO": ("dpo --sft_weight=1", "beta", "β", (0.05, 0.3, 1, 2, 5)),
    "DPO, mean log-probs": ("dpo_norm", "beta", "β", (2, 5, 10, 20, 40)),
    "unlikelihood": ("unlikelihood", "alpha", "α", (0.1, 0.3, 0.6, 0.8, 0.95)),
    "f-DPO, JS": ("fdpo_js", "beta", "β", (0.3, 0.5, 1, 2, 3)),
}
HEADLINE = ("DPO", "IPO", "KTO", "SimPO")  # of ten seeds, the others of five
BETWEEN = {"DPO": ("dpo", "beta", "β", (0.5, 0.7, 1.4))}  # all others are compared with its curve
FLIPPED = {  # what is done about labels that flip with a known rate
    "DPO": ("dpo", "beta", "β", (0.05, 0.3, 1, 2, 5)),
    "cDPO": ("dpo --label_smoothing={}", "beta", "β", (0.05, 0.3, 1, 2, 5)),
    "robust DPO": ("robust --label_smoothing={}", "beta", "β", (0.05, 0.3, 1, 2, 5)),
}
PRICES = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)  # β of RLHF that is exact
DISPLACED = {("DPO", "β=1"), ("RPO", "β=1"), ("SimPO", "β=20"), ("Preferred-FT", "lr 0.0002"),
             ("f-DPO, JS", "β=1")}  # fmt: skip
SIZES = (100, 300, 1000, 3000, 10_000, 30_000)


class Entry(NamedTuple):
    """A run of the sweep, as sweep.json lists it; one run may stand in several panels."""

    run: str  # its directory
    panel: str
    method: str
    setting: str
    x: float  # where on the panel's axis
    seed: int
    flags: str = ""  # of train.py
    pairs: int = PAIRS
    flips: float = 0.0  # share of the labels that are turned round
    right: bool = False  # labels by the true reward, not drawn from it
    rounds: int = 1  # between which new pairs are sampled from the policy
    rloo: str = ""  # instead of train.py policy gradient, with this reward: learned or true


def entries_of(panel: str, methods: dict, seeds, values=slice(None), **rest) -> list[Entry]:
    found = []
    for seed, (method, (loss, flag, symbol, settings)) in itertools.product(seeds, methods.items()):
        for value in settings[values]:
            name = loss.format("").replace(" --", "-")
            where = f"{panel}/{name}-{value}/{seed}"
            if "flips" in rest:
                where = f"{panel}-{rest['flips']}/{name}-{value}/{seed}"
            flags = f"--loss={loss} --{flag}={value}".format(rest.get("flips"))
            entry = Entry(where, panel, method, f"{symbol}={value:g}", value, seed, flags, **rest)
            found.append(entry._replace(setting=entry.setting.replace(" =", " ")))
    return found


def plan(quick: bool) -> list[Entry]:
    """All runs, what matters most first."""
    middle, few = slice(1, 4), range(5)
    if quick:
        again = entries_of("main", {"DPO": METHODS["DPO"]}, range(1, 3), middle)
        return entries_of("main", METHODS, range(1), middle) + again
    found = entries_of("main", METHODS, few)
    for reward, beta, seed in itertools.product(("true", "learned"), (0.3, 1), few):
        where, method = f"main/rloo-{reward}-{beta}/{seed}", f"RLOO, {reward} reward"
        found.append(Entry(where, "main", method, f"β={beta}", beta, seed, rloo=reward))
    dpo = [e for e in found if e.method == "DPO"]
    usual = [e for e in dpo if e.setting == "β=1"]

    found += [e._replace(panel="pairs", x=PAIRS) for e in usual]
    for size, seed in itertools.product(SIZES, few):
        what = "pairs", "DPO", "β=1", size, seed, "--loss=dpo --beta=1", size
        found.append(Entry(f"pairs/{size}/{seed}", *what))

    noisy = entries_of("flips", FLIPPED, few, middle, flips=0.2)
    found += [e._replace(panel="flips main") for e in noisy]
    found += [e._replace(x=0.2) for e in noisy if e.setting == "β=1"]
    found += [e._replace(panel="flips", method=name, x=0.0) for e in usual for name in FLIPPED]

    found += [e._replace(panel="rounds", setting="1 round", x=1) for e in usual]
    for rounds, seed in itertools.product((2, 3), few):
        what = "rounds", "DPO", f"{rounds} rounds", rounds, seed, f"--loss=dpo --beta={rounds}"
        found.append(Entry(f"rounds/{rounds}/{seed}", *what, rounds=rounds))

    shown = [e for e in found if e.panel == "main" and (e.method, e.setting) in DISPLACED]
    found += [e._replace(panel="displacement") for e in shown]

    found += [e._replace(panel="labels", method="Bradley–Terry") for e in dpo]
    right = entries_of("labels", {"DPO": METHODS["DPO"]}, few, middle, right=True)
    found += [e._replace(method="always right") for e in right]

    found += entries_of("main", {name: METHODS[name] for name in HEADLINE}, range(5, 10))
    found += entries_of("main", BETWEEN, range(10))
    for rate in (0.1, 0.3):
        some = entries_of("flips", FLIPPED, few, slice(2, 3), flips=rate)
        found += [e._replace(x=rate) for e in some]
    return found


def write_rows(path: Path, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def examples_of(entry: Entry) -> list[data.Example]:
    """Its preferences: fewer pairs are the first of more, fewer flips are among more."""
    grammar = reviews.Reviews(entry.seed)
    examples = grammar.preferences(entry.pairs, "train")
    if entry.right:
        for i, example in enumerate(examples):
            better, worse = (grammar.score(example.prompt, y)[1] for y in example.responses)
            if round(better, 6) < round(worse, 6):
                examples[i] = example._replace(responses=example.responses[::-1])
    return exact.flip_labels(examples, entry.flips, entry.seed)


def pairs_of(entry: Entry) -> list[dict]:
    names = "prompt", "chosen", "rejected"
    return [dict(zip(names, (e.prompt, *e.responses))) for e in examples_of(entry)]


def sampled_pairs(checkpoint: Path, count: int, seed: int, number: int) -> list[dict]:
    """Pairs of the policy's own samples for round `number`, labelled as all others are. Raises
    DataError if too few of them are pairs."""
    grammar, rng = reviews.Reviews(seed), np.random.default_rng([seed, 4, number])
    model, tokenizer = sample.load(checkpoint)
    prompts = np.repeat(rng.choice(grammar.prompts["train"], 2 * count), 2).tolist()
    trees = sample.draw(model, tokenizer, prompts, max_new_tokens=64, seed=1000 * number + seed)
    texts = [tokenizer.decode(ids, continuation=True) for _, ids in trees]
    rows = []
    for prompt, a, b in zip(prompts[::2], texts[::2], texts[1::2]):
        if a != b and len(rows) < count:
            better, worse = reviews.prefer(grammar, prompt, a, b, rng)
            rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
    if len(rows) < count:
        raise data.DataError(f"{checkpoint}: of its samples only {len(rows)} pairs differ")
    return rows


def measure(policy, reference, tokenizer, count: int, seed: int) -> dict[str, float]:
    """True reward and KL from the reference, ± one standard error, of samples of the evaluation
    prompts. What the grammar cannot write has reward 0."""
    grammar = reviews.Reviews()
    prompts = np.random.default_rng(seed).choice(grammar.prompts["eval"], count).tolist()
    trees = sample.draw(policy, tokenizer, prompts, max_new_tokens=64, seed=seed)
    rewards = reviews.rewards_of(grammar, prompts, trees, tokenizer)
    kl, accepted = measure_kl(policy, reference, trees), np.isfinite(rewards)
    rewards = np.where(accepted, rewards, 0.0)
    row = {"samples": count, "accepted": float(accepted.mean())}
    for name, values in (("reward", rewards), ("kl", kl)):
        row |= {name: float(values.mean()), f"{name}_error": float(reviews.error(values))}
    return {f"policy/{name}": value for name, value in row.items()}


def run_stages(flags: dict, also=(), look=None):
    """What `python train.py` does with these flags; `look` sees the model after each step."""
    words = [*(f"--{name}={value}" for name, value in flags.items()), "--resume", *also]
    run = train.Run(train.parse_settings(words))
    if look:
        run.look = partial(look, run)
    with run.saved_if_stopped:
        train.train(run)


def work(entry: Entry, root: Path, samples: tuple[int, int]):
    """Make one run, and measure it on its way. Raises DataError where it diverges."""
    out, start = root / entry.run, root / "reference"
    begin(out, identity(entry, root, samples))
    if entry.rloo:
        return replaced(entry, root, samples[-1])
    reference, tokenizer = sample.load(start)
    count = entry.pairs // entry.rounds
    epochs = max(1, STEPS * BATCH // entry.rounds // count)
    each = math.ceil(math.ceil(count / BATCH) * epochs / 4)  # steps between two looks

    def look(run, stage, step, steps, model):
        if step == steps or (step > 0 and step % each == 0):
            number = samples[1] if step == steps else samples[0]
            row = measure(model, reference, tokenizer, number, entry.seed)
            run.record(stage, {"step": step} | row)

    for number in range(1, entry.rounds + 1):
        where = out if number == entry.rounds else out / f"round{number}"
        path = where / "pairs.jsonl"
        if not path.exists():
            first = number == 1
            rows = pairs_of(entry) if first else sampled_pairs(start, count, entry.seed, number)
            write_rows(path, rows[:count])
        flags = {"data": path, "eval_data": root / "eval.jsonl", "init_from": start}
        flags |= {"sft_epochs": 0, "epochs": epochs, "batch_size": BATCH, "eval_every": each}
        flags |= {"learning_rate": RATE, "seed": entry.seed, "out_dir": where}
        run_stages(flags, entry.flags.split(), look)
        start = where


def replaced(entry: Entry, root: Path, count: int):
    """The pipeline that DPO replaces, on the same pairs: a reward model and policy gradient."""
    start, out, model = root / "reference", root / entry.run, None
    write_rows(out / "pairs.jsonl", pairs_of(entry))
    if entry.rloo == "learned":
        model = rlhf.train_reward_model(start, out / "pairs.jsonl", seed=entry.seed)
    policy = rlhf.rloo(start, model, entry.x, RLOO_STEPS, seed=entry.seed)
    row = measure(policy, *sample.load(start), count, entry.seed)
    write_rows(out / "metrics.jsonl", [{"stage": "rloo", "step": RLOO_STEPS} | row])


def make_reference(root: Path):
    """The SFT model that all runs start from, and the held-out pairs that all are evaluated on."""
    demonstrations = root / "demonstrations"
    reviews.write(demonstrations, demonstrations=DEMONSTRATIONS, pairs=PAIRS)
    held_out = (demonstrations / "eval.jsonl").read_text(encoding="utf-8").splitlines(True)
    (root / "eval.jsonl").write_text("".join(held_out[:300]), encoding="utf-8")
    pairs, shown = demonstrations / "pairs.jsonl", demonstrations / "sft.jsonl"
    flags = {"data": pairs, "sft_data": shown, "epochs": 0, "batch_size": 32}
    run_stages(flags | {"sft_learning_rate": 4e-3, "out_dir": root / "reference"})


def identity(entry: Entry, root: Path, samples: tuple[int, int]) -> dict:
    """What makes it the run that it is; the other fields of an entry say where it is shown."""
    about = {"steps": STEPS, "batch": BATCH, "rate": RATE, "samples": list(samples)}
    about |= {"torch": torch.__version__} | ({"rloo_steps": RLOO_STEPS} if entry.rloo else {})
    about["reference"] = sha256(root / "reference" / "model.safetensors")
    own = entry._replace(panel="", method="", setting="", x=entry.x if entry.rloo else 0.0)
    return own._asdict() | about


def is_of(out: Path, wanted: dict) -> bool:
    about = out / "entry.json"
    return about.is_file() and json.loads(about.read_text(encoding="utf-8")) == wanted


def ended(out: Path) -> bool:
    return any((out / name).exists() for name in ("done", "failed"))


def begin(out: Path, wanted: dict):
    """Go on in the run's directory, or empty it, if what is there is another one."""
    if not is_of(out, wanted):
        for path in out.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "log":
                path.unlink()
        write_whole(out / "entry.json", json.dumps(wanted).encode())


def write_exact(path: Path, entries: list[Entry]):
    """What is known without a run: the frontier, best of n, and RLHF with perfect optimisation, its
    reward fitted to the very pairs that the runs of DPO get."""
    wanted = {(e.pairs, e.flips, e.seed): e for e in entries if not e.right and e.rounds == 1}
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))["rlhf"]
        case = lambda row: (row["pairs"], row["flips"], row["seed"])
        known = {(case(row), row["features"], row["beta"]) for row in there}
        if {*itertools.product(wanted, exact.FEATURES, PRICES)} <= known:
            return
    grammar, rows = reviews.Reviews(), []
    tables = {features: exact.feature_tables(grammar, features) for features in exact.FEATURES}
    for case in sorted(wanted):
        located = exact.locate(grammar, examples_of(wanted[case]))
        about = dict(zip(("pairs", "flips", "seed"), case))
        for features, table in tables.items():
            for point in exact.rlhf(grammar, table, located, PRICES):
                rows.append({"features": features} | about | point)
    found = exact.curves(grammar) | {"rlhf": rows}
    write_whole(path, json.dumps(found).encode())


def job(task, out: Path, threads: int):
    """What a process of its own does: the task, its words in the file log, its end in a file."""
    torch.set_num_threads(threads)
    log = open(out / "log", "a", encoding="utf-8")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    try:
        task()
    except data.DataError as error:
        if "diverged" not in str(error) and "not finite" not in str(error):
            raise
        (out / "failed").write_text(f"{error}\n", encoding="utf-8")
        return
    (out / "done").touch()
    if (out / "entry.json").exists():  # of a run only what is small stays
        for path in [*out.rglob("*.safetensors"), *out.rglob("encoded"), *out.rglob("resume")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def summary(out: Path) -> str:
    if (out / "failed").exists():
        return (out / "failed").read_text(encoding="utf-8").strip()
    metrics = out / "metrics.jsonl"
    row = json.loads(metrics.read_text("utf-8").splitlines()[-1]) if metrics.exists() else {}
    shown = ("eval/loss", "train/loss", "policy/reward", "policy/kl")
    return ", ".join(f"{name} {row[name]:.3f}" for name in shown if name in row)


def run_all(tasks: dict, root: Path, workers: int):
    """Each task, by its directory, in a process of its own, `workers` at a time. They are forked,
    so that they need no imports; nothing is asked of torch in this one."""
    fork, threads = multiprocessing.get_context("fork"), max(1, os.cpu_count() // workers)
    waiting, running, began = list(tasks), {}, time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop(0)
                (root / name).mkdir(parents=True, exist_ok=True)
                process = fork.Process(target=job, args=(tasks[name], root / name, threads))
                process.start()
                running[process.sentinel] = process, name
            for sentinel in multiprocessing.connection.wait(list(running)):
                process, name = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    raise data.DataError(f"{name} has ended: {root / name / 'log'} says why")
                number = len(tasks) - len(waiting) - len(running)
                minutes = (time.monotonic() - began) / 60 / number * (len(tasks) - number)
                where = f"[{number}/{len(tasks)}] {name}: {summary(root / name)}"
                print(f"{where}; {minutes:.0f} min left", flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()  # it saves its state
        for process, _ in running.values():
            process.join()


def sweep(root: Path, entries: list[Entry], workers: int, samples: tuple[int, int]):
    """All runs that have not ended, and what is exact; sweep.json says what there is."""
    path, about, before = root / "sweep.json", {"torch": torch.__version__}, 0.0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # of a start before
        before = float(json.loads(path.read_text(encoding="utf-8"))["about"]["seconds"])
    about["seconds"] = before
    listed, began = [e._asdict() for e in entries], time.monotonic()
    try:
        write_whole(path, json.dumps({"about": about, "runs": listed}, indent=1).encode())
        if not (root / "reference" / "done").exists():
            run_all({"reference": partial(make_reference, root)}, root, 1)
            if (root / "reference" / "failed").exists():
                raise data.DataError(f"the SFT model: {summary(root / 'reference')}")
        run_all({"exact": partial(write_exact, root / "exact.json", entries)}, root, 1)
        tasks = {}
        for entry in entries:
            out = root / entry.run
            if not (ended(out) and is_of(out, identity(entry, root, samples))):
                for name in ("done", "failed"):  # of another run: the report must not count it
                    (out / name).unlink(missing_ok=True)
                tasks[entry.run] = partial(work, entry, root, samples)
        run_all(tasks, root, workers)
    finally:
        about["seconds"] = before + time.monotonic() - began
        write_whole(path, json.dumps({"about": about, "runs": listed}, indent=1).encode())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out_dir", type=Path, help="(default out/frontier, or out/frontier-quick)")
    add("--quick", action="store_true", help="fewer settings and seeds, one panel")
    add("--workers", type=int, default=os.cpu_count(), help="runs at a time (default: cores)")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    root = args.out_dir or Path("out/frontier-quick" if args.quick else "out/frontier")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        lock = hold(root)  # noqa: F841, until this process ends
        sweep(root, plan(args.quick), args.workers, SAMPLES)
    except KeyboardInterrupt:
        print("frontier.py: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (data.DataError, CheckpointError, OSError) as error:
        print(f"frontier.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"python experiments/report.py {root} draws it")


if __name__ == "__main__":
    main()
