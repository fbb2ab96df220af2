"""Every number that a run logs and prints, against a trainer that is as plain as it can be: one
sequence at a time, in float64, each formula written out."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import make_model, random_dataset, read_metrics, save_tokenizer, turns, write_jsonl
from test_model import plain_logits

import data
import dpo
import train
from extra import encoded, guard, kept, states
from model import ModelConfig, load_pretrained, save_pretrained

RATES = ("pairs_per_second", "tokens_per_second", "peak_memory_gib")
MAX_LENGTH, MAX_PROMPT = 64, 32


# The data: trees that a run learns from, and the files that say so.


class Tree(NamedTuple):
    """A prompt and its responses, best first, as ids; ~id: read, but not learnt."""

    prompt: list
    responses: list
    weight: float = 1.0
    label: float = 1.0


class World(NamedTuple):
    """A checkpoint far from uniform, files of each kind, and the trees that are in them."""

    base: Path
    paths: dict[str, str]  # of a setting: its file
    trees: dict[str, list[Tree]]
    tokenizer: data.Tokenizer


def ids(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 250, n).tolist()


def as_tree(row: dict, tokenizer) -> Tree:
    """The tree of a row of token ids, of texts or of a conversation."""
    prompt, answers = row.get("prompt"), row.get("responses") or [row["chosen"], row["rejected"]]
    if isinstance(answers[0][0], dict):  # the first turn is shared, and the prompt
        prompt, answers = answers[0][:1], [answer[1:] for answer in answers]
    prompt, *answers = data.token_ids(data.Example(prompt, tuple(answers)), tokenizer)
    if len(prompt) > MAX_PROMPT:
        prompt = prompt[:1] + prompt[-(MAX_PROMPT - 1) :]
    answers = [answer[: MAX_LENGTH - len(prompt)] for answer in answers]
    return Tree(prompt, answers, row.get("weight", 1.0), row.get("soft_label", 1.0))


PAIRS = [  # a weight, a soft label, a ranking of three, a user's turn within a response, texts
    {"prompt": ids(5, 1), "chosen": ids(4, 2), "rejected": ids(7, 3), "weight": 0.5},
    {"prompt": ids(3, 4), "chosen": ids(6, 5), "rejected": ids(2, 6), "soft_label": 0.8},
    {"prompt": ids(6, 7), "responses": [ids(3, 8), ids(5, 9), ids(1, 10)], "weight": 2.0},
    {"chosen": turns("u: 2+2=4 | a: good | u: was bad | a: 4"), "rejected": turns("u: 2+2=4 | a: slow")},
    {"prompt": "The film", "chosen": " is great.", "rejected": " was bad!"},
    {"prompt": ids(9, 11), "chosen": ids(60, 12), "rejected": ids(4, 13), "weight": 3.0, "soft_label": 0.6},
    {"prompt": ids(40, 14), "chosen": ids(2, 15), "rejected": ids(3, 16), "weight": 0.25},
]  # fmt: skip
HELD_OUT = [
    {"prompt": "A hotel ", "chosen": " was bad!", "rejected": " is great", "weight": 2.0},
    {"prompt": ids(2, 21), "responses": [ids(5, 22), ids(2, 23), ids(4, 24)], "weight": 0.4},
    {"prompt": ids(4, 25), "chosen": ids(3, 26), "rejected": ids(6, 27), "soft_label": 0.7},
    {"chosen": turns("u: was bad | a: 4 | u: 2+2 | a: great"), "rejected": turns("u: was bad | a: no")},
]  # fmt: skip
SAME = {"prompt": ids(3, 41), "chosen": ids(3, 42), "rejected": ids(3, 42)}  # dropped, but by SFT
SHOWN = [*PAIRS[:3], {"prompt": ids(5, 31), "chosen": ids(9, 32), "rejected": ids(1, 33)}, PAIRS[4]]


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def world(tokenizer, tmp_path_factory) -> World:
    directory = tmp_path_factory.mktemp("metrics")
    shape = tokenizer.vocab_size, 16, 24, 2, 4, 2, 8
    torch.manual_seed(5)
    save_pretrained(make_model(ModelConfig(*shape, tie_word_embeddings=True), 4.0), directory / "a")
    save_tokenizer(tokenizer, directory / "a")
    rows = {"data": [*PAIRS[:2], SAME, *PAIRS[2:]], "eval_data": HELD_OUT}
    best = [row if "chosen" in row else row | {"chosen": row["responses"][0]} for row in SHOWN]
    rows["sft_data"] = [{"prompt": r["prompt"], "response": r["chosen"]} for r in best]
    paths = {name: write_jsonl(directory / f"{name}.jsonl", rows[name]) for name in rows}
    trees = {"data": PAIRS, "eval_data": HELD_OUT, "sft_data": SHOWN, "best of data": rows["data"]}
    trees = {name: [as_tree(row, tokenizer) for row in rows] for name, rows in trees.items()}
    return World(directory / "a", paths, trees, tokenizer)


# The plain trainer.


def plain_logp(config, weights: dict, prompt: list, response: list) -> torch.Tensor:
    """log π of a response, the sum over its learnt tokens."""
    model = SimpleNamespace(config=config, named_parameters=weights.items)
    sequence = [i if i >= 0 else ~i for i in prompt + response]
    logps = plain_logits(model, sequence).log_softmax(-1)
    learnt = [n for n in range(len(prompt), len(sequence)) if response[n - len(prompt)] >= 0]
    return sum(logps[n - 1, sequence[n]] for n in learnt)


def learnt_tokens(response: list) -> int:
    return sum(i >= 0 for i in response)


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


# log π and log π_ref of chosen and rejected (c, r, C, R), their lengths, the mean log-ratio of the
# step before, β, and the option of the loss.
PLAIN_LOSSES = {
    "dpo": lambda c, r, C, R, n, m, mean, beta, option: (
        -(1 - option) * log_sigmoid(beta * (c - r - C + R))
        - option * log_sigmoid(-beta * (c - r - C + R))
    ),
    "simpo": lambda c, r, C, R, n, m, mean, beta, option: (
        -log_sigmoid(beta * (c / n - r / m) - option)
    ),
    "bco": lambda c, r, C, R, n, m, mean, beta, option: (
        -log_sigmoid(beta * (c - C - mean)) - log_sigmoid(beta * (mean - r + R))
    ),
}


class PlainTrainer:
    """Both stages, one sequence at a time. `rows` is what is to be logged, but for rates and
    memory; `saved` the weights at the end of each stage. shift: what is added to each reference."""

    def __init__(self, world: World, settings: dict, shift):
        self.s, self.rows, self.saved, self.reference = settings, [], {}, {}
        model = load_pretrained(world.base)
        self.config = model.config
        self.weights = {n: p.detach().double() for n, p in model.named_parameters()}
        self.trained = self.adapters() if settings["lora_rank"] else self.weights
        for parameter in self.trained.values():
            parameter.requires_grad_()
        held_out = world.trees["eval_data"] if "eval_data" in settings["files"] else []
        shown = "sft_data" if "sft_data" in settings["files"] else "best of data"
        self.stage("sft", world.trees[shown], held_out)
        self.save("sft")
        for trees in (world.trees["data"], world.trees["eval_data"]):
            self.measure_reference(trees, shift)
        self.stage("dpo", world.trees["data"], held_out)
        self.save("dpo")

    # The policy.

    def adapters(self) -> dict:
        """A and B of each projection, drawn in the order of the model."""
        generator, rank, result = (
            torch.Generator().manual_seed(self.s["seed"]),
            self.s["lora_rank"],
            {},
        )
        names = [f"self_attn.{x}_proj" for x in "qkvo"]
        names += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
        for layer, name in itertools.product(range(self.config.num_hidden_layers), names):
            key = f"layers.{layer}.{name}.weight"
            outputs, inputs = self.weights[key].shape
            first = torch.randn(rank, inputs, generator=generator)
            result[key, "A"] = first.double() / inputs**0.5
            result[key, "B"] = torch.zeros(outputs, rank).double()
        return result

    def effective(self) -> dict:
        """The weights that the policy computes with."""
        result = dict(self.weights)
        for name in self.weights:
            if (name, "A") in self.trained:
                change = self.trained[name, "B"] @ self.trained[name, "A"]
                result[name] = self.weights[name] + 2 * change
        return result

    def save(self, stage: str):
        """Adapters become part of the weights, and begin anew."""
        with torch.no_grad():
            self.saved[stage] = {n: w.detach().clone() for n, w in self.effective().items()}
            if self.s["lora_rank"]:
                self.weights = self.saved[stage]
                for name, first in self.adapters().items():
                    self.trained[name].copy_(first)

    def logp(self, tree: Tree, i: int) -> torch.Tensor:
        return plain_logp(self.config, self.effective(), tree.prompt, tree.responses[i])

    @torch.no_grad()
    def measure_reference(self, trees: list[Tree], shift):
        of = [(tree, i) for tree in trees for i in range(len(tree.responses))]
        for (tree, i), by in zip(of, shift(len(of))):
            self.reference[id(tree), i] = self.logp(tree, i) + by

    # The losses: of some examples the sum, and the sums for the metrics.

    def sft_sums(self, trees: list[Tree], mean: float) -> tuple[torch.Tensor, dict]:
        total = -sum(self.logp(tree, 0) for tree in trees)
        count = sum(learnt_tokens(tree.responses[0]) for tree in trees)
        return total, {"loss": total.item(), "count": count}

    def dpo_sums(self, trees: list[Tree], mean: float) -> tuple[torch.Tensor, dict]:
        total, sums = 0.0, Counter()
        for tree in trees:
            logps = [self.logp(tree, i) for i in range(len(tree.responses))]
            pairs = list(itertools.combinations(range(len(logps)), 2))
            for pair in pairs:
                value, metrics = self.pair(tree, logps, *pair, mean)
                weight = tree.weight / len(pairs)
                total = total + weight * value
                for name, x in metrics.items():
                    sums[name] += weight * x
        return total, sums

    def pair(self, tree: Tree, logps: list, w: int, r: int, mean: float):
        """The loss of a pair of responses, and what is logged of it."""
        beta, option, loss = self.s["beta"], self.s["option"], PLAIN_LOSSES[self.s["loss"]]
        (c, C, n), (d, D, m) = (
            (logps[i], self.reference[id(tree), i], learnt_tokens(tree.responses[i]))
            for i in (w, r)
        )
        value = tree.label * loss(c, d, C, D, n, m, mean, beta, option)
        value = value + (1 - tree.label) * loss(d, c, D, C, m, n, mean, beta, option)
        value = value - self.s["sft_weight"] * c / n
        a, b = (c - C).item(), (d - D).item()
        return value, {
            "loss": value.item(),
            "rewards/chosen": beta * a,
            "rewards/rejected": beta * b,
            "rewards/margins": beta * a - beta * b,
            "rewards/accuracies": a > b,
            "rewards/ties": a == b,
            "logps/chosen": c.item(),
            "logps/rejected": d.item(),
            "gradient_weight": 1 / (1 + math.exp(beta * (a - b))),
            "both_fell": a < 0 and b < 0,
            "count": 1,
        }

    # A stage.

    def stage(self, stage: str, trees: list[Tree], held_out: list[Tree]):
        s, window, mean = self.s, Counter(), 0.0
        everything = self.dpo_sums if stage == "dpo" else self.sft_sums
        peak = s["learning_rate"] if stage == "dpo" else s["sft_learning_rate"]
        per_epoch = math.ceil(len(trees) / s["batch_size"])
        steps = s["epochs" if stage == "dpo" else "sft_epochs"] * per_epoch
        steps = min(steps, s["max_steps"]) if s["max_steps"] else steps
        self.moments = dict.fromkeys(self.trained, (0.0, 0.0))
        if held_out:
            self.log({"stage": stage, "step": 0}, "eval", everything(held_out, mean)[1])
        for step in range(steps):
            chosen = self.examples_of(trees, step // per_epoch, step % per_epoch)
            total, sums = everything(chosen, mean)
            rate = peak * plain_schedule(s["lr_schedule"], s["warmup_steps"], step, steps)
            norm = self.descend(
                total / (len(chosen) if stage == "dpo" else sums["count"]), rate, step
            )
            if stage == "dpo":
                both = sums["rewards/chosen"] + sums["rewards/rejected"]
                mean = both / s["beta"] / (2 * sums["count"])
            window.update(sums | {"grad_norm": norm * sums["count"]})
            done = step + 1
            due = lambda every, done=done: every > 0 and done % every == 0
            if due(s["log_every"]) or done == steps:
                about = {"stage": stage, "step": done, "epoch": done / per_epoch}
                self.log(about | {"train/learning_rate": rate}, "train", window)
                window = Counter()
            if held_out and (done == steps or due(s["eval_every"])):
                self.log({"stage": stage, "step": done}, "eval", everything(held_out, mean)[1])

    def log(self, row: dict, prefix: str, sums: dict):
        averages = {f"{prefix}/{n}": x / sums["count"] for n, x in sums.items() if n != "count"}
        self.rows.append(row | averages)

    def examples_of(self, trees: list[Tree], epoch: int, within: int) -> list[Tree]:
        order = np.arange(len(trees))
        if self.s["shuffle"]:
            order = np.random.default_rng((self.s["seed"], epoch)).permutation(order)
        begin = within * self.s["batch_size"]
        return [trees[e] for e in order[begin : begin + self.s["batch_size"]]]

    def descend(self, loss: torch.Tensor, rate: float, step: int) -> float:
        """Clip the gradient, and a step by Adam or RMSprop; returns the norm before clipping."""
        grads = torch.autograd.grad(loss, list(self.trained.values()))
        norm = math.sqrt(sum(g.pow(2).sum().item() for g in grads))
        share = min(1.0, self.s["grad_clip"] / norm) if self.s["grad_clip"] else 1.0
        with torch.no_grad():
            for (name, p), g in zip(self.trained.items(), grads):
                g, (first, second) = share * g, self.moments[name]
                if self.s["optimizer"] == "rmsprop":
                    second = 0.99 * second + 0.01 * g**2
                    p -= rate * g / (second.sqrt() + 1e-8)
                else:
                    first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
                    p *= 1 - rate * self.s["weight_decay"] * (p.dim() == 2)
                    unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
                    p -= rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
                self.moments[name] = first, second
        return norm


def plain_schedule(shape: str, warmup: int, step: int, steps: int) -> float:
    """Up in a line for the warmup, which is at most half of the steps; then down to 0."""
    warmup = min(warmup, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    if shape == "constant":
        return 1.0
    left = (steps - step) / (steps - warmup)
    return left if shape == "linear" else math.sin(left * math.pi / 2) ** 2


# The runs: three that differ in nearly all settings.

COMMON = {
    "loss": "dpo", "beta": 0.5, "sft_weight": 0.0, "lr_schedule": "linear", "warmup_steps": 2,
    "optimizer": "adamw", "weight_decay": 0.0, "grad_clip": 1.0, "learning_rate": 4e-3,
    "sft_learning_rate": 6e-3, "batch_size": 3, "epochs": 2, "sft_epochs": 2, "max_steps": 0,
    "shuffle": True, "seed": 3, "max_length": MAX_LENGTH, "max_prompt_length": MAX_PROMPT,
    "micro_batch_tokens": 30, "log_every": 2, "eval_every": 0, "save_every": 0, "lora_rank": 0,
    "dtype": "float32",
}  # fmt: skip
CASES = {
    "dpo": {"label_smoothing": 0.1, "weight_decay": 0.5, "log_every": 3, "save_every": 2,
            "eval_every": 2, "wandb": "offline", "files": ("data", "eval_data", "sft_data")},
    "simpo": {"loss": "simpo", "beta": 2.0, "gamma": 0.5, "sft_weight": 0.3, "optimizer": "rmsprop",
              "lr_schedule": "cosine", "max_steps": 5, "shuffle": False, "warmup_steps": 1,
              "learning_rate": 1e-3, "sft_learning_rate": 1e-3, "files": ("data",)},
    "bco": {"loss": "bco", "lora_rank": 2, "lr_schedule": "constant", "grad_clip": 0.0,
            "learning_rate": 2e-2, "save_every": 4, "files": ("data", "eval_data", "sft_data")},
}  # fmt: skip
OPTIONS = ("label_smoothing", "gamma")
OBJECTIVE = ("loss", "beta", "learning_rate", "sft_weight")  # refused without the DPO stage


class Logged:
    """Stands in for the package wandb: it keeps what it is given."""

    def __init__(self):
        self.given, self.rows = None, []

    def init(self, **given):
        self.given = given
        return self

    def log(self, row):
        self.rows.append(row)


class Done(NamedTuple):
    """A finished run, and what the plain trainer says of it."""

    out: Path
    settings: dict
    printed: list[str]
    plain: PlainTrainer
    wandb: Logged


def shift(responses: int) -> torch.Tensor:
    """By how much the reference of these tests is another than the policy at the start."""
    return torch.from_numpy(np.random.default_rng(responses).uniform(-2, 2, responses))


def train_here(*flags) -> list[str]:
    """train.py in this process; the lines that it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train.train(train.Run(train.parse_settings(list(map(str, flags)))))
    return printed.getvalue().splitlines()


def flags_of(settings: dict, world: World) -> list[str]:
    ignored = {"files", "option"}
    ignored |= {"weight_decay"} if settings["optimizer"] == "rmsprop" else set()
    ignored |= {"eval_every"} if "eval_data" not in settings["files"] else set()
    values = {name: x for name, x in settings.items() if name not in ignored}
    values |= {name: world.paths[name] for name in settings["files"]}
    return [f"--{name}={str(x).lower() if x in (True, False) else x}" for name, x in values.items()]


@pytest.fixture(scope="module")
def shifted():
    """In place of dpo.reference_logps, for models that are far apart from the first step on."""
    reference_logps = dpo.reference_logps

    def shifted(model, batches, responses):
        values = reference_logps(model, batches, responses)
        return torch.where(values == 0, 0.0, values + shift(responses))

    return shifted


@pytest.fixture(scope="module")
def finish(world, shifted, tmp_path_factory):
    """Runs by name, each made once."""
    runs = {}

    def make(name: str) -> Done:
        settings = COMMON | CASES[name]
        settings["option"] = next((settings[name] for name in OPTIONS if name in settings), None)
        out, wandb = tmp_path_factory.mktemp(name) / "out", Logged()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dpo, "reference_logps", shifted)
            patch.setitem(sys.modules, "wandb", wandb)
            flags = [f"--init_from={world.base}", f"--out_dir={out}"]
            printed = train_here(*flags_of(settings, world), *flags)
        return Done(out, settings, printed, PlainTrainer(world, settings, shift), wandb)

    def finished(name: str) -> Done:
        if name not in runs:
            runs[name] = make(name)
        return runs[name]

    return finished


def numbers(out: Path) -> list[dict]:
    """What was logged, without what depends on the machine."""
    return [{n: x for n, x in row.items() if n not in RATES} for row in read_metrics(out)]


def assert_row(row: dict, expected: dict):
    """All but the rates: the same names, and the same numbers to what float32 allows."""
    rates = RATES if "epoch" in expected else ()
    assert row.keys() == expected.keys() | set(rates)
    for name, value in expected.items():
        exact = isinstance(value, str) or name in ("step", "epoch")
        near = value if exact else pytest.approx(value, rel=2e-4, abs=2e-5)
        assert row[name] == near, (row["stage"], row["step"], name)


@pytest.mark.parametrize("name", CASES)
def test_every_row_is_that_of_the_plain_trainer(name, finish):
    done = finish(name)
    rows = read_metrics(done.out)
    known = [(row["stage"], row["step"], "epoch" in row) for row in done.plain.rows]
    assert [(row["stage"], row["step"], "epoch" in row) for row in rows] == known
    for row, expected in zip(rows, done.plain.rows):
        assert_row(row, expected)


def test_a_learning_rate_at_each_step_by_hand():
    """All schedules, with every number of steps and of warmup."""
    for shape in ("constant", "linear", "cosine"):
        for steps in range(1, 13):
            for warmup in range(15):
                rates = [dpo.schedule(shape, warmup, step, steps) for step in range(steps)]
                expected = [plain_schedule(shape, warmup, step, steps) for step in range(steps)]
                assert rates == pytest.approx(expected, abs=1e-12), (shape, warmup, steps)
                assert max(rates) == 1 and min(rates) > 0, "it has a peak, and no step is in vain"


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_are_the_weights_of_the_last_step(name, finish, world):
    """Of each stage, adapters merged, with the tokenizer; DPO starts from what SFT saved."""
    done = finish(name)
    for directory, stage in ((done.out / "sft", "sft"), (done.out, "dpo")):
        saved = dict(load_pretrained(directory).named_parameters())
        assert saved.keys() == done.plain.saved[stage].keys()
        for weight, expected in done.plain.saved[stage].items():
            torch.testing.assert_close(saved[weight].double(), expected, rtol=1e-3, atol=1e-4)
        assert (directory / "tokenizer.model").read_bytes() == world.tokenizer.proto


def test_the_last_two_states_are_kept(finish):
    """With their rows, and never that of a last step: the stage itself saves that. That SFT is done
    and that the run is done are states without tensors, which there are always."""
    for name, before in (("dpo", "dpo-4"), ("bco", "dpo-4"), ("simpo", "dpo-0")):
        done = finish(name)
        places = {path.name: path for path in (done.out / "resume").iterdir()}
        assert places.keys() == {"done-0", before}
        about, rows = json.loads((done.out / "run.json").read_text()), read_metrics(done.out)
        for place in places.values():
            point = json.loads((place / "point.json").read_text())
            stage, step = place.name.split("-")
            where = {"stage": stage, "step": int(step), "state": place.name, "skipped": {}}
            totals, mean = point.pop("totals"), point.pop("mean_logratio")
            assert point == about | where
            assert bool(totals) == (name == "dpo" and step == "4"), "rows of three steps, then"
            assert (mean != 0) == (place.name not in ("dpo-0",)) and math.isfinite(mean)
            files = {path.name for path in place.iterdir()}
            own = {"state.safetensors"} if step == "4" else set()
            assert files == {"point.json", "metrics.jsonl", "manifest.json"} | own
        assert read_metrics(places["done-0"]) == rows
        kept_rows = read_metrics(places[before])
        assert kept_rows == rows[: len(kept_rows)]
        after, stage = rows[len(kept_rows)], before.split("-")[0]
        evaluated = "eval/loss" in after and after["step"] == int(before.split("-")[1])
        assert after["stage"] == stage and (evaluated or after["step"] > int(before[-1]))
        assert evaluated == (name == "dpo"), "what is evaluated at that step is evaluated again"


def test_a_new_run_reads_its_own_data(world, tmp_path):
    """Not what another run left in that directory."""
    settings = COMMON | {"epochs": 0, "max_steps": 1, "files": ("data",)}
    for name in OBJECTIVE:
        del settings[name]
    for name, out in (("eval_data", "out"), ("data", "out"), ("data", "fresh")):
        where = [f"--init_from={world.base}", f"--out_dir={tmp_path / out}"]
        train_here(*flags_of(settings, world), *where, f"--data={world.paths[name]}")
    assert numbers(tmp_path / "out") == numbers(tmp_path / "fresh")


def test_no_example_is_lost_between_blocks():
    """Encoding ahead, thousands at a time."""
    examples = [data.Example([n, n + 1], ([n], [n, n])) for n in range(2 * 4096 + 5)]
    assert list(encoded.encode_ahead(iter(examples), None)) == examples


@pytest.mark.parametrize(
    ("killed_at", "left"), [("dpo-2", ["dpo-0", "sft-2"]), ("dpo-4", ["dpo-2", "dpo-0"])]
)
def test_a_run_killed_while_saving_has_its_state_before(
    killed_at, left, finish, world, shifted, tmp_path, monkeypatch
):
    """And the one before; when an old state goes, the new one is there, which is whole."""
    done, out = finish("dpo"), tmp_path / "out"
    write, rmtree, removed = train.llm.write_safetensors, shutil.rmtree, []
    monkeypatch.setattr(dpo, "reference_logps", shifted)
    monkeypatch.setitem(sys.modules, "wandb", Logged())

    def killed(path, tensors, writes=True):
        write(path, tensors, writes)
        there = [place.name for place in states.places_in(out)]
        if path.name == "state.safetensors" and there == left and left[0] != "sft-2":
            raise KeyboardInterrupt

    def watched(path, *rest, **options):
        if Path(path).parent == out / "resume" and Path(path).is_dir() and path.name != "new":
            new, before, *others = states.places_in(out)
            assert path in others and states.read(new, whole=True) and states.read(before, True)
            assert read_metrics(new) == read_metrics(out)
            removed.append(path.name)
        rmtree(path, *rest, **options)

    monkeypatch.setattr(train.llm, "write_safetensors", killed)
    monkeypatch.setattr(shutil, "rmtree", watched)
    where = [f"--init_from={world.base}", f"--out_dir={out}"]
    with pytest.raises(KeyboardInterrupt):
        train_here(*flags_of(done.settings, world), *where)
    monkeypatch.setattr(train.llm, "write_safetensors", write)
    assert [place.name for place in states.places_in(out)] == left
    assert {path.name for path in (out / "resume").iterdir()} == {*left, "new"}
    train_here(f"--data={world.paths['data']}", f"--out_dir={out}", "--resume")
    assert removed == ["sft-2", "dpo-0", "dpo-2"], "each once"
    assert {path.name for path in (out / "resume").iterdir()} == {"dpo-4", "done-0"}
    whole, parts = (load_pretrained(path).state_dict() for path in (done.out, out))
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())
    assert numbers(out) == numbers(done.out)


@pytest.mark.parametrize("name", ["dpo", "bco"])
def test_each_stage_can_be_run_alone(name, finish, world, shifted, tmp_path, monkeypatch):
    """SFT, and DPO from what it saved, bit by bit as in one run, also with adapters; each reads its
    own data."""
    done = finish(name)
    monkeypatch.setattr(dpo, "reference_logps", shifted)
    sft = done.settings | {"epochs": 0, "wandb": "disabled"}
    tune = done.settings | {"sft_epochs": 0, "wandb": "disabled", "files": ("data", "eval_data")}
    for ignored in (*OBJECTIVE, "label_smoothing"):
        sft.pop(ignored, None)
    del tune["sft_learning_rate"]
    for stage, settings, start, whole, read in (
        ("sft", sft, world.base, done.out / "sft", ["sft", "sft eval"]),
        ("dpo", tune, done.out / "sft", done.out, ["pairs", "eval pairs"]),
    ):
        out = tmp_path / stage
        where = [f"--init_from={start}", f"--out_dir={out}"]
        printed = train_here(*flags_of(settings, world), *where)
        lines = [line for line in printed if re.search(r"examples.* in /", line)]
        assert [line.split(":")[0] for line in lines] == read
        assert not (out / "sft").exists()
        alone, same = (load_pretrained(path).state_dict() for path in (out, whole))
        assert all(torch.equal(weight, same[name]) for name, weight in alone.items())
        assert numbers(out) == [row for row in numbers(done.out) if row["stage"] == stage]


# What is said of a run.


def shown_of(row: dict, settings: dict, steps: int) -> str:
    """The line of a row: stage and step, the loss and three figures of the rewards, the rates."""
    names = [f"{split}/{name}" for split in ("train", "eval") for name in
             ("loss", "rewards/chosen", "rewards/margins", "rewards/accuracies")]  # fmt: skip
    words = [f"{row['stage']} {row['step']}"]
    words += [f"{name} {row[name]:.4g}" for name in names if name in row]
    if "epoch" in row:
        rate = row["pairs_per_second"]
        left = (steps - row["step"]) * settings["batch_size"] / rate
        words.append(f"{rate:.0f} pairs/s, {left:.0f} s left")
    return "  ".join(words)


def expected_lines(done: Done, world: World, out: Path, first: int = 0) -> list[str]:
    """All that a run says, line by line; resumed from a state at the DPO step `first`, or whole."""
    s, files = done.settings, {name: world.paths[name] for name in done.settings["files"]}
    of = {"sft": "5 examples", "sft eval": "4 examples", "eval pairs": "4 examples"}
    of["pairs"] = "8 examples, 1 responses cut, 1 dropped: identical responses, 1 prompts cut"
    if "sft_data" not in files:  # the chosen responses, of which none is dropped
        of["sft"] = "8 examples, 1 responses cut, 1 prompts cut"
    shown = files.get("sft_data", files["data"])
    lines = [f"sft: {of['sft']} in {shown}", f"pairs: {of['pairs']} in {files['data']}"]
    if "eval_data" in files:
        lines.insert(1, f"sft eval: {of['sft eval']} in {files['eval_data']}")
        lines.append(f"eval pairs: {of['eval pairs']} in {files['eval_data']}")
    weights = load_pretrained(world.base).named_parameters()
    shapes = {name: tuple(p.shape) for name, p in weights}
    count = sum(math.prod(shape) for shape in shapes.values())
    if s["lora_rank"]:
        count = s["lora_rank"] * sum(sum(x) for name, x in shapes.items() if "_proj" in name)
    lines.append(f"{count // 1000},{count % 1000:03d} parameters are trained, on 1 cpu process(es)")
    for stage, examples, steps in (("sft", int(of["sft"][0]), 4), ("dpo", 7, 6)):
        steps = s["max_steps"] or steps
        if first and stage == "sft":
            continue
        if stage == "dpo":
            for responses in (15, 9)[: 1 + ("eval_data" in files)]:
                found = f"found in {out}/sft/reference-X.npy" if first else "computed"
                lines.append(f"reference: {responses} log-probs {found}")
                lines.append("step 0: the largest log-ratio is X nats (tolerance 0.01)")
        lines.append(f"{stage}: {examples} examples, steps {first} to {steps} of 3")
        for row in read_metrics(out):
            again = row["step"] == first and "eval/loss" in row  # a state is from before it
            if row["stage"] == stage and (row["step"] > first or again):
                lines.append(shown_of(row, s, steps))
    return [*lines, f"saved {out}"]


def assert_says(printed: list[str], expected: list[str]):
    """Line by line, but for rounding errors, and the digest in the name of a file."""
    rounding = r"(?<=log-ratio is )(0\.0e\+00|\d\.\de-(0[5-9]))(?= nats)"
    said = [re.sub(rounding, "X", line.rstrip()) for line in printed]
    said = [re.sub(r"(?<=reference-)[0-9a-f]{16}(?=\.npy)", "X", line) for line in said]
    assert said == expected


@pytest.mark.parametrize("name", CASES)
def test_what_is_printed_is_what_is_logged(name, finish, world):
    done = finish(name)
    assert_says(done.printed, expected_lines(done, world, done.out))


@pytest.mark.parametrize("name", ["dpo", "bco"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    name, finish, world, shifted, tmp_path, monkeypatch
):
    """In the middle of an epoch, from the data and the reference as they were: what it prints, and
    each row once. run.json stays as it is."""
    done, out = finish(name), tmp_path / "again"
    shutil.copytree(done.out, out)
    for path in (out / "config.json", out / "model.safetensors"):
        path.unlink()  # as if it had been killed in its last step
    before = (out / "run.json").read_bytes()
    monkeypatch.setattr(dpo, "reference_logps", shifted)
    monkeypatch.setitem(sys.modules, "wandb", Logged())
    other = [data.Example([5, 6], ([7, 8], [9]))] * 9  # the file was changed since
    monkeypatch.setattr(data, "read_examples", lambda *_: iter(other))
    own, *printed = train_here(f"--data={world.paths['data']}", f"--out_dir={out}", "--resume")
    assert own.startswith("--resume: by this run's own settings: --batch_size=3 --beta=0.5 ")
    assert "--data=" not in own and " --loss=bco" * (name == "bco") in own
    assert_says(printed, expected_lines(done, world, out, first=4))
    assert numbers(out) == numbers(done.out)
    assert (out / "run.json").read_bytes() == before
    whole, parts = (load_pretrained(path).state_dict() for path in (done.out, out))
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())


def digest_of(files: list[Path]) -> str:
    """SHA-256 of the files' own, in hexadecimal, one after the other."""
    own = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return hashlib.sha256(own.encode()).hexdigest()


def test_run_json_holds_the_settings_as_they_are(finish, world):
    for name in CASES:
        done = finish(name)
        about = json.loads((done.out / "run.json").read_text())
        assert about.keys() == {"settings", "ranks", "torch", "cwd", "digests"}
        assert about["ranks"] == 1 and about["torch"] == torch.__version__
        assert about["cwd"] == os.getcwd()
        names = ("config.json", "model.safetensors", "tokenizer.model")
        files = {name: [Path(world.paths[name])] for name in done.settings["files"]}
        files["init_from"] = [world.base / name for name in names]
        assert about["digests"] == {name: digest_of(each) for name, each in files.items()}
        settings = {n: x for n, x in done.settings.items() if n not in ("files", "option")}
        options = {n: settings.pop(n) for n in OPTIONS if n in settings}
        given = {name: world.paths[name] for name in done.settings["files"]} | settings
        given |= {"options": options, "out_dir": str(done.out), "init_from": str(world.base)}
        assert about["settings"] == vars(train.Settings()) | given


def test_weights_and_biases_gets_each_row(finish):
    """Under the stage's name, with the settings; and nothing unless it is asked for."""
    done = finish("dpo")
    settings = json.loads((done.out / "run.json").read_text())["settings"]
    where = {"project": "dpo", "name": "out", "dir": done.out, "mode": "offline"}
    assert done.wandb.given == where | {"config": settings}
    rows = read_metrics(done.out)
    assert len(rows) == len(done.plain.rows)
    for logged, row in zip(done.wandb.rows, rows, strict=True):
        stage = row.pop("stage")
        assert logged == {f"{stage}/{name}": x for name, x in row.items()}
    assert finish("bco").wandb.given is None


# Time and memory.


def test_rates_count_training_alone(world, tmp_path, monkeypatch):
    """By a clock on which step n takes n seconds, and evaluating, saving and loading 1000: pairs
    and rows of the stream a second, the seconds left; and the most memory, the GPU's if it is."""
    now, taken = [5e4], []

    def slowly(module, name, seconds):
        real = getattr(module, name)

        def call(*arguments, **options):
            now[0] += seconds()
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    def a_step():
        taken.append(len(taken) + 1)
        return taken[-1]

    slowly(dpo, "take_step", a_step)
    for module, name in ((dpo, "evaluate"), (dpo, "reference_logps"), (states, "save"),
                         (train, "save_model"), (train, "load_model"), (states, "load"),
                         (train, "load_data")):  # fmt: skip
        slowly(module, name, lambda: 1000.0)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    status = tmp_path / "status"
    status.write_text("VmPeak:\t 9999999 kB\nVmHWM:\t 1572864 kB\nVmRSS:\t 1024 kB\n")
    monkeypatch.setattr(guard, "STATUS", status)
    usage = {guard.resource.RUSAGE_SELF: SimpleNamespace(ru_maxrss=9 * 2**19)}  # of a parent
    monkeypatch.setattr(guard.resource, "getrusage", usage.get)
    settings = COMMON | {"files": ("data", "eval_data", "sft_data"), "shuffle": False}
    settings |= {"eval_every": 1, "save_every": 5}
    run = lambda out: train_here(*flags_of(settings, world), f"--init_from={world.base}", out)
    printed = run(f"--out_dir={tmp_path}")
    rows = [row for row in read_metrics(tmp_path) if "epoch" in row]
    steps = {"sft": [[1, 2], [3, 4]], "dpo": [[5, 6], [7, 8], [9, 10]]}  # logged together
    batches = {"sft": [[0, 1, 2], [3, 4]] * 2, "dpo": [[0, 1, 2], [3, 4, 5], [6]] * 2}
    trees = {"sft": world.trees["sft_data"], "dpo": world.trees["data"]}
    for stage, windows in steps.items():
        examples, begin = iter(batches[stage]), windows[0][0]
        count = sum(map(len, windows))
        for seconds in windows:
            chosen = [trees[stage][e] for _ in seconds for e in next(examples)]
            learnt = [tree.responses[: 1 if stage == "sft" else None] for tree in chosen]
            stream = sum(len(tree.prompt) - 1 + sum(map(len, r)) for tree, r in zip(chosen, learnt))
            row, done = rows.pop(0), seconds[-1] - begin + 1
            assert (row["stage"], row["step"]) == (stage, done)
            assert row["pairs_per_second"] == pytest.approx(len(chosen) / sum(seconds))
            assert row["tokens_per_second"] == pytest.approx(stream / sum(seconds))
            assert row["peak_memory_gib"] == 1.5
            left = (count - done) * 3 * sum(seconds) / len(chosen)
            said = f"{len(chosen) / sum(seconds):.0f} pairs/s, {left:.0f} s left"
            [line] = [x for x in printed if x.startswith(f"{stage} {done}  train/")]
            assert line.endswith(f"  {said}")
    assert not rows
    for text in ("Name:\tpython\n", None):  # as some containers have it, and other systems
        status.write_text(text) if text else status.unlink()
        assert guard.peak_memory() == {"peak_memory_gib": 4.5}
    usage[guard.resource.RUSAGE_SELF].ru_maxrss *= 2**10  # bytes, as macOS counts
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert guard.peak_memory() == {"peak_memory_gib": 4.5}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**29)
    run(f"--out_dir={tmp_path / 'cuda'}")
    rows = [row for row in read_metrics(tmp_path / "cuda") if "epoch" in row]
    assert len(rows) == 5 and all(row["peak_memory_gib"] == 2.5 for row in rows)


def test_rates_are_those_of_all_ranks_together(world, tmp_path, monkeypatch):
    """On one of two ranks, a step of which takes two seconds."""
    run, now = a_run(world, tmp_path, "--log_every=1"), [0.0]
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    step = dpo.take_step

    def slowly(*arguments):
        now[0] += 2
        return step(*arguments)

    monkeypatch.setattr(dpo, "take_step", slowly)
    run.total = lambda sums: {name: torch.as_tensor(x).double() for name, x in sums.items()}
    run.world, run.watch = 2, lambda items: items
    dataset, model = dataset_of(world.trees["sft_data"][:3]), load_pretrained(world.base)
    train.train_stage("sft", model, dataset, None, dpo.sft_loss, 1, 1e-3, run)
    [row] = read_metrics(tmp_path)
    assert row["pairs_per_second"] == 3 / 2
    assert row["tokens_per_second"] == (len(dataset.tokens) - 3) / 2


# The reference, and the check at step 0.


def a_run(world: World, out: Path, *flags) -> train.Run:
    names = {"batch_size": 3, "micro_batch_tokens": 90, "max_length": 64, "max_prompt_length": 32}
    given = [f"--{name}={x}" for name, x in names.items()]
    return train.Run(
        train.parse_settings([*given, f"--data={__file__}", f"--out_dir={out}", *flags])
    )


def dataset_of(trees: list[Tree]) -> data.Dataset:
    facts = [(tree.weight, tree.label, math.nan) for tree in trees]
    return data.to_dataset([[tree.prompt, *tree.responses] for tree in trees], facts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_is_that_of_the_plain_model(dtype, world, tmp_path):
    """Each response's own, found by its place, and in the precision of the run."""
    run, model = a_run(world, tmp_path, f"--dtype={dtype}"), load_pretrained(world.base)
    dataset = train.with_reference(dataset_of(world.trees["data"]), model, "", run)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    responses = [(tree.prompt, response) for tree in world.trees["data"] for response in tree[1]]
    expected = torch.stack([plain_logp(model.config, weights, *each) for each in responses])
    error = (torch.from_numpy(dataset.reference) - expected).abs() / expected.abs()
    assert dataset.reference.dtype == np.float32 and len(error) == 15
    assert error.max() < 1e-5 if dtype == "float32" else 1e-4 < error.max() < 2e-2
    assert dataset.tokens.tolist() == dataset_of(world.trees["data"]).tokens.tolist()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.01), ("bfloat16", 0.5)])
def test_a_reference_that_is_not_the_policy_is_refused(
    dtype, tolerance, world, tmp_path, monkeypatch, capsys
):
    """Whichever response of the first batch it is, in either direction; what is said is by how much
    the worst differs. Not a number is refused, too."""
    run, model = a_run(world, tmp_path, f"--dtype={dtype}"), load_pretrained(world.base)
    dataset, by, exact = dataset_of(world.trees["data"]), np.zeros(15), []
    with monkeypatch.context() as patch:
        patch.setattr(kept, "check", lambda values, *_: exact.append(values.numpy()))
        train.with_reference(dataset, model, "", run)
    monkeypatch.setattr(kept, "find", lambda *_: (tmp_path / "kept.npy", exact[0] + by))
    check = lambda: train.with_reference(dataset, model, "place", run)
    for response in range(7):  # of three examples, one of which is a ranking
        for sign in (-1, 1):
            by[:] = 0
            by[response], by[(response + 1) % 7] = sign * 0.95 * tolerance, -sign * 0.7 * tolerance
            capsys.readouterr()
            check()
            said = capsys.readouterr().out
            words = f"found in {tmp_path}/kept.npy\nstep 0: the largest log-ratio is"
            worst = float(
                re.fullmatch(rf"reference: 15 log-probs {words} (\S+) nats .*\n", said)[1]
            )
            assert worst == pytest.approx(0.95 * tolerance, rel=0.1)
            assert said.endswith(f"(tolerance {tolerance})\n")
            by[response] = sign * 1.2 * tolerance
            with pytest.raises(data.DataError) as error:
                check()
            number = re.search(
                r"must agree at step 0, but differ by (\S+) nats: ", str(error.value)
            )
            assert float(number[1]) == pytest.approx(1.2 * tolerance, rel=0.1)
            where = f"delete reference-*.npy in place or {tmp_path}/encoded"
            assert str(error.value).endswith(where)
    by[:] = 0
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    sentence = "^place: weight norm.weight is not finite$"
    with pytest.raises(data.DataError, match=sentence):
        check()  # what is kept is finite, and what these weights say is not
    by[3] = math.nan  # not kept, and so computed
    with pytest.raises(data.DataError, match=sentence):
        check()
    sentence = "^the new model: weight norm.weight is not finite$"
    with pytest.raises(data.DataError, match=sentence):
        train.with_reference(dataset, model, "", run)


def test_both_data_sets_are_checked_and_bf16_begins_at_log_2(world, tmp_path, monkeypatch):
    """Pairs and evaluation pairs. Where they agree, also in bfloat16, the first evaluation finds
    ties alone, and so does the first step: policy and reference are computed alike."""
    settings = COMMON | {"files": ("data", "eval_data"), "dtype": "bfloat16", "max_steps": 1}
    settings |= {"sft_epochs": 0, "batch_size": 7, "micro_batch_tokens": 999, "shuffle": False}
    del settings["sft_learning_rate"]
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(world.base, base)  # the reference will be kept there
    flags = [*flags_of(settings, world), f"--init_from={base}", f"--out_dir={out}"]
    train_here(*flags)
    first, second, _ = read_metrics(out)
    assert (first["stage"], first["step"], second["step"]) == ("dpo", 0, 1)
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["eval/rewards/accuracies"] == second["train/rewards/accuracies"] == 0
    assert first["eval/rewards/ties"] == second["train/rewards/ties"] == pytest.approx(1)
    find = kept.find
    for shifted_one in (15, 9):  # responses of the pairs, and of the evaluation pairs

        def wrong(dataset, *others, one=shifted_one):
            path, values = find(dataset, *others)
            return path, values + 1.0 * (dataset.responses() == one)

        monkeypatch.setattr(kept, "find", wrong)
        with pytest.raises(data.DataError, match="must agree at step 0, but differ by 1 nats"):
            train_here(*flags)


@pytest.fixture
def keep(world, tmp_path, capsys, monkeypatch):
    """Ask for a reference of a data set: whether it was computed, what came, what was said. What
    comes, and nothing else, is checked, once."""
    base, run = tmp_path / "base", a_run(world, tmp_path / "out")
    shutil.copytree(world.base, base)
    model, count = load_pretrained(base), [0.0]
    dataset = random_dataset([[2, 3, 4], [3, 2, 2, 5]], vocab=200)

    def ask(dataset=dataset, model=model, directory=base):
        before, checked = count[0], []

        def compute(examples):
            assert examples.tolist() == [0, 1]
            count[0] += 1
            return torch.arange(5).double() / 3 + count[0]

        capsys.readouterr()
        monkeypatch.setattr(kept, "check", lambda *inputs: checked.append(inputs))
        values = kept.kept(compute, dataset, model, directory, run)
        assert checked == [(values, compute, dataset, model, directory, run)]
        assert values.dtype == torch.float64 and values.shape == (5,)
        return count[0] > before, values.tolist(), capsys.readouterr().out

    return SimpleNamespace(ask=ask, base=base, run=run, model=model, dataset=dataset)


def test_a_reference_is_found_again(keep):
    """Exactly, and said; whatever else changes in that directory, and whatever the pairs weigh."""
    computed, values, said = keep.ask()
    assert computed and said == "reference: 5 log-probs computed\n"
    [path] = keep.base.glob("reference-*")
    assert path.suffix == ".npy" and np.load(path).dtype == np.float64
    (keep.base / "tokenizer.model").write_bytes(b"another")
    (keep.base / "note.txt").write_text("another")
    same = random_dataset([[2, 3, 4], [3, 2, 2, 5]], vocab=200)
    same.facts[:] = 7.0, 0.6, 2.0
    again = keep.ask(same, load_pretrained(keep.base), str(keep.base))
    assert again == (False, values, f"reference: 5 log-probs found in {path}\n")
    assert list(keep.base.glob("reference-*")) == [path], "nothing else is left there"


def test_what_makes_another_reference(keep, monkeypatch):
    """Any change to token ids, to what is learnt, to which is whose; to the model, the numerics and
    the weights' files."""
    was, d = keep.ask()[1], keep.dataset
    change = lambda **arrays: dataclasses.replace(d, **arrays)
    for other in (
        change(tokens=np.concatenate([d.tokens[:-1], [5]]).astype(np.int32)),
        change(learnt=np.arange(len(d.learnt)) != 11),
        change(offsets=d.offsets + (np.arange(len(d.offsets)) == 2)),
        change(trees=np.array([0, 4, 7])),
    ):
        assert keep.ask(other)[0] and not keep.ask(other)[0]
    config = dataclasses.replace(keep.model.config, rope_theta=2.0)
    assert keep.ask(model=SimpleNamespace(config=config))[0]
    keep.run.bf16 = True
    assert keep.ask()[0]
    keep.run.bf16 = False
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.1")
        assert keep.ask()[0]
    with monkeypatch.context() as patch:
        patch.setattr(keep.run, "device", torch.device("meta"))
        assert keep.ask()[0]
    assert keep.ask()[:2] == (False, was)
    file = keep.base / "model.safetensors"
    content, times = file.read_bytes(), (10**18, 10**18)
    for name, written in (
        (file.name, content),
        (file.name, content + b" "),
        ("pytorch_model.bin", b""),
    ):
        (keep.base / name).write_bytes(written)
        train.os.utime(keep.base / name, ns=times)
        assert keep.ask()[0] and not keep.ask()[0]
    (keep.base / "pytorch_model.bin").rename(keep.base / "pytorch_other.bin")
    assert keep.ask()[0]
    train.os.utime(file, ns=(10**18, 10**18 + 1))
    assert keep.ask()[0], "the same content, written anew"


def test_what_is_kept_and_cannot_be_used_is_computed_anew(keep, monkeypatch):
    """Torn, of another size, not finite. Where a directory cannot be written it is in the run's; of
    a new model nothing is kept."""
    was = keep.ask()[1]
    [path] = keep.base.glob("reference-*")
    for wrong in (was[:4], was + was, [*was[:4], math.nan], [math.inf, *was[1:]], [was]):
        kept.write(path, np.array(wrong))
        computed, values, _ = keep.ask()
        assert computed and values != was and keep.ask()[:2] == (False, values)
    kept.write(path, np.array(was, np.float32))
    assert keep.ask()[0]
    whole = path.read_bytes()
    flipped = whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]
    for content in (b"", whole[:-1], whole[:-32], flipped, b"junk"):
        path.write_bytes(content)
        assert keep.ask()[0] and not keep.ask()[0]
    access = train.os.access
    may = lambda place, mode: Path(place) != keep.base or mode != train.os.W_OK
    locked = lambda place, mode: may(place, mode) and access(place, mode)
    monkeypatch.setattr(kept.os, "access", locked)
    assert keep.ask()[0], "what lies beside the checkpoint is not looked for"
    [elsewhere] = (keep.run.out / "encoded").glob("reference-*")
    assert elsewhere.name == path.name
    assert keep.ask()[::2] == (False, f"reference: 5 log-probs found in {elsewhere}\n")
    assert all(keep.ask(directory="")[0] for _ in range(2))


# What is refused, and who reports.


def test_a_run_that_diverges_says_where(world, tmp_path):
    """Its stage and step; what it logged before is there, and its settings, and no checkpoint. A
    step that is not finite is skipped; ten of them, or the weights, end the run."""
    settings = COMMON | {"files": ("data", "sft_data"), "learning_rate": 1e30, "log_every": 1}
    where = [f"--init_from={world.base}", f"--out_dir={tmp_path}"]
    weights = r"the model diverged: its weights, \S+ by root mean square, are not saved: lower the"
    sft, finite, skipped = [("sft", n) for n in (1, 2, 3, 4)], [("dpo", 1)], []
    for step in range(2, 12):
        skipped += [("dpo", step, step - 1), ("dpo", step)]  # the second is without a loss
    for flags, sentence, rows in (
        ([], f"^{weights} learning rate$", [*sft, *finite, *skipped[:10]]),
        (["--epochs=9"], "^dpo diverged by step 11: lower its learning rate$",
         [*sft, *finite, *skipped[:18]]),
    ):  # fmt: skip
        with pytest.raises(data.DataError, match=sentence):
            train_here(*flags_of(settings, world), *where, *flags)
        found = read_metrics(tmp_path)
        names = ("stage", "step", "train/skipped_steps")
        assert [tuple(row[name] for name in names if name in row) for row in found] == rows
        counted = [row for row in found if "train/skipped_steps" in row]
        assert all(row.keys() == {*names} for row in counted)
        assert (tmp_path / "run.json").is_file() and not (tmp_path / "config.json").exists()
        shutil.rmtree(tmp_path / "resume")


def test_one_process_alone_reports(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    wandb = Logged()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = a_run(world, tmp_path / "out", "--wandb=offline")
    run.say("nothing")
    run.record("sft", {"step": 1, "eval/loss": 2.0})
    assert capsys.readouterr().out == "" and wandb.given is None and not run.out.exists()


def test_sums_are_added_up_in_float64(world, tmp_path):
    """Whatever they come as."""
    run, exact = a_run(world, tmp_path), torch.tensor(1 + 1e-9, dtype=torch.float64)
    given = {"a": torch.tensor(2**24 + 1), "b": exact}
    given |= {"c": torch.tensor(True), "d": torch.tensor(0.1)}
    sums = run.total(given)
    assert all(x.dtype == torch.float64 and x.shape == () for x in sums.values())
    values = {name: x.item() for name, x in sums.items()}
    assert values == {"a": 2**24 + 1, "b": 1 + 1e-9, "c": 1.0, "d": float(np.float32(0.1))}
