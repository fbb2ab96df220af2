"""Every setting of train.py acts as it says, and changes nothing else.

A small run is watched while it works, and then recomputed by hand, step by step. A table says for
each setting what it changes in the run; all else must be the same to the last bit.
"""

import contextlib
import dataclasses
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, read_metrics, save_tokenizer, write_jsonl
from torch.nn.functional import logsigmoid
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import data
import dpo
import model as llm
import train
from experiments import reviews
from extra import encoded, guard, kept, states
from extra.guard import Stopped
from extra.objectives import LOSSES

STAGES = ("sft", "dpo")


# ------------------------------------------------------------------------------ a run, watched


WORDS = "amber birch cedar dahlia ember fern garnet hazel indigo jasper lotus maple".split()


def make_pairs(count: int, start: int) -> list[dict]:
    word = lambda i: WORDS[i % len(WORDS)]
    return [
        {
            "prompt": f"{word(i)} {word(5 * i + 1)}?"[-4 - i % 9 :],
            "chosen": f" {word(i + 2)[: 3 + i % 4]} {i % 10}",
            "rejected": f" no{'!' * (1 + i % 3)} {word(7 * i)}"[: 5 + i % 5],
        }
        for i in range(start, start + count)
    ]


def make_demonstrations(count: int, start: int) -> list[dict]:
    rows = make_pairs(count, start)
    return [
        {"prompt": row["prompt"], "response": f"{row['chosen']}{i}!"} for i, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    """Files that runs start from, by a short name each."""
    root = tmp_path_factory.mktemp("world")
    files = {
        "pairs": make_pairs(10, 0),
        "pairs2": make_pairs(7, 40),
        "eval": make_pairs(9, 60),
        "eval2": make_pairs(3, 80),
        "sft": make_demonstrations(11, 20),
        "sft2": make_demonstrations(6, 90),
        "spelt": [
            {
                "prompt": f"<s>{row['prompt']}</s> so:",
                "chosen": row["chosen"] + "</s>" * (i % 2),
                "rejected": row["rejected"],
            }
            for i, row in enumerate(make_pairs(10, 0))
        ],
    }
    paths = {name: write_jsonl(root / f"{name}.jsonl", rows) for name, rows in files.items()}
    for name, pieces, start in (("tokenizer", 310, 0), ("tokenizer2", 330, 50)):
        texts = [text for row in make_pairs(60, start) for text in row.values()]
        texts += ["ÄÖÜ"] * (name == "tokenizer2")  # the last pieces: no example has them
        (root / name).mkdir()
        data.Tokenizer.train([data.Example(x, ()) for x in texts], root / name, pieces)
        paths[name] = str(root / name / "tokenizer.model")
    config = llm.ModelConfig(330, 16, 48, 3, 2, 1, 12, tie_word_embeddings=False)
    llm.save_pretrained(make_model(config, scale=6).float(), root / "checkpoint")
    paths["checkpoint"] = str(
        save_tokenizer(data.Tokenizer(paths["tokenizer2"]), root / "checkpoint")
    )
    return paths


BASE = {  # of the runs; names after @ are files of the world
    "data": "@pairs", "eval_data": "@eval", "sft_data": "@sft", "tokenizer": "@tokenizer",
    "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_length": 96, "max_prompt_length": 48,
    "batch_size": 4, "epochs": 2, "sft_epochs": 2, "micro_batch_tokens": 40, "warmup_steps": 2,
    "learning_rate": 0.004, "sft_learning_rate": 0.01, "beta": 0.5, "log_every": 1,
}  # fmt: skip


class Clock:
    """Time that passes only where the test says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Run:
    """A run of train.py in this process: what it did, in `steps` by stage, and in facets."""

    def __init__(self, world: dict, given: dict, out: Path, cwd: Path):
        given = {"out_dir": out} | given
        files = lambda value: re.sub("@([a-z0-9]+)", lambda match: world[match[1]], str(value))
        self.given = {name: files(value) for name, value in given.items() if value is not None}
        self.out, self.phase, self.stage, self.clock = out, "", "", Clock()
        self.steps = {stage: [] for stage in STAGES}  # a record each
        self.evaluations = {stage: [] for stage in STAGES}
        self.model, self.names, self.precision = None, {}, set()
        self.compiled, self.states, self.wandb, self.asked = [], [], [], []
        flags = [f"--{name}={value}" for name, value in self.given.items()]
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            cwd.mkdir(exist_ok=True)
            patch.chdir(cwd)
            handles = self.watch(patch)
            try:
                train.main(flags)
            finally:
                for handle in handles:
                    handle.remove()
        self.printed = printed.getvalue().splitlines()
        self.rows = read_metrics(out)
        self.about = json.loads((out / "run.json").read_text())
        self.tokenizer = data.Tokenizer(out)
        self.settings = train.Settings(**self.about["settings"])
        self.facets = self.describe()

    def watch(self, patch) -> list:
        """Spies on the functions between the trainer and the rest; returns what is to be removed."""

        def during(phase: str, function, seconds: float) -> Callable:
            def wrapped(*arguments, **options):
                before, self.phase = self.phase, phase
                if phase == "step":
                    self.steps[self.stage].append(SimpleNamespace(batches=[], blocks=0))
                elif phase == "evaluate":
                    weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
                    record = SimpleNamespace(batches=[], weights=weights)
                    self.evaluations[self.stage].append(record)
                result = function(*arguments, **options)
                self.clock.now += seconds
                self.phase = before
                return result

            return wrapped

        def train_stage(stage, model, *rest):
            self.stage = stage
            return real_stage(stage, model, *rest)

        def load_model(*arguments):
            model = real_load(*arguments)
            self.model = model
            self.start = {n: p.detach().clone() for n, p in model.named_parameters()}
            self.names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
            return model

        def collate(dataset, examples):
            trees = [[dataset.tokens[where].tolist() for where in dataset[e]] for e in examples]
            record = {"step": self.steps, "evaluate": self.evaluations}.get(self.phase)
            if record:
                record[self.stage][-1].batches.append(trees)
            return real_collate(dataset, examples)

        def find_loss(name):
            function = real_find(name)

            def called(pairs, beta, **options):
                asked = {"loss": name, "beta": beta} | options
                self.asked += [asked] * (asked not in self.asked)
                return function(pairs, beta, **options)

            called.__signature__ = inspect.signature(function)
            return called

        def before_step(optimizer, *_):
            if self.phase != "step":  # a state is asked for
                return
            record = self.steps[self.stage][-1]
            record.kind, record.groups = type(optimizer).__name__, []
            for group in optimizer.param_groups:
                options = {k: v for k, v in group.items() if k not in ("params", "lr")}
                names = [self.names[id(p)] for p in group["params"]]
                record.groups.append(options | {"names": names})
            [record.rate] = {group["lr"] for group in optimizer.param_groups}
            record.before = {self.names[id(p)]: p.detach().clone() for p in trained(optimizer)}
            record.grads = {self.names[id(p)]: p.grad.clone() for p in trained(optimizer)}

        def after_step(optimizer, *_):
            if self.phase == "step":
                weights = {self.names[id(p)]: p.detach().clone() for p in trained(optimizer)}
                self.steps[self.stage][-1].after = weights

        def after_forward(module, _, output):
            if isinstance(module, torch.nn.Linear):
                self.precision.add(("products", output.dtype))
            elif isinstance(module, llm.Transformer):
                self.precision.add(("log-probs", output.dtype))
                self.precision |= {("weights", p.dtype) for p in module.parameters()}

        def before_forward(module, _):
            if isinstance(module, llm.Block) and self.phase == "step":
                self.steps[self.stage][-1].blocks += 1

        def log(row):
            self.wandb.append({k: v for k, v in row.items() if not k.endswith("peak_memory_gib")})

        trained = lambda optimizer: [p for group in optimizer.param_groups for p in group["params"]]
        real_stage, real_load, real_collate = train.train_stage, train.load_model, data.collate
        real_find, real_save = dpo.find_loss, states.save

        def save(run, stage, step, *rest):
            self.states.append(f"{stage}-{step}")
            real_save(run, stage, step, *rest)

        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(train, "time", self.clock)
        patch.setattr(train, "train_stage", train_stage)
        patch.setattr(train, "load_model", load_model)
        patch.setattr(data, "collate", collate)
        patch.setattr(dpo, "find_loss", find_loss)
        patch.setattr(dpo, "take_step", during("step", dpo.take_step, 2.0))
        patch.setattr(dpo, "evaluate", during("evaluate", dpo.evaluate, 100.0))
        patch.setattr(states, "save", during("save", save, 1000.0))
        record = lambda layer, **options: self.compiled.append(options)
        patch.setattr(llm.Block, "compile", record)
        started = lambda **options: self.wandb.append(options) or SimpleNamespace(log=log)
        patch.setitem(sys.modules, "wandb", SimpleNamespace(init=started))
        return [
            register_optimizer_step_pre_hook(before_step),
            register_optimizer_step_post_hook(after_step),
            register_module_forward_pre_hook(before_forward),
            register_module_forward_hook(after_forward),
        ]

    def text(self, tree: list[list[int]]) -> tuple[str, ...]:
        """A prompt and its responses as text, with the control tokens that are there."""
        prompt, *responses = tree
        tokenizer = self.tokenizer
        texts = ["<s>" * (prompt[0] == tokenizer.bos_id) + tokenizer.decode(prompt)]
        for ids in responses:
            end = "</s>" * (ids[-1] == tokenizer.eos_id)
            texts.append(tokenizer.decode(ids, continuation=True) + end)
        return tuple(texts)

    def texts(self, record) -> list[tuple]:
        """What a step, or an evaluation, was about."""
        return sorted(self.text(tree) for batch in record.batches for tree in batch)

    def describe(self) -> dict:
        files = [str(path.relative_to(self.out)) for path in self.out.rglob("*") if path.is_file()]
        row_line = re.compile(r"(sft|dpo) \d+  |saved ")
        printed = [line for line in self.printed if not row_line.match(line)]
        facets = {
            "files": sorted(re.sub("reference-[0-9a-f]{16}", "reference", f) for f in files),
            "printed": [re.sub("log-ratio is .* nats", "log-ratio", line) for line in printed],
            "tokenizer": self.tokenizer.proto,
            "shape": json.loads((self.out / "config.json").read_text()),
            "start": self.start,
            "trained": sorted(self.names.values()),
            "precision": self.precision,
            "compiled": self.compiled,
            "states": self.states,
            "wandb": self.wandb,
            "objective": self.asked,
        }
        both = self.settings.epochs and self.settings.sft_epochs
        places = {"sft": self.out / "sft" if both else self.out, "dpo": self.out}
        for stage in STAGES:
            steps, rows = self.steps[stage], [r for r in self.rows if r["stage"] == stage]
            of = lambda prefix: {
                r["step"]: {k: v for k, v in r.items() if k != "peak_memory_gib"}
                for r in rows
                if f"{prefix}/loss" in r
            }
            evaluations = self.evaluations[stage]
            own = {
                "texts": [self.texts(step) for step in steps],
                "micro-batches": [row_counts(step) for step in steps],
                "rates": [step.rate for step in steps],
                "optimizer": [(step.kind, step.groups) for step in steps[:1]],
                "gradients": [step.grads for step in steps],
                "blocks": {step.blocks / len(step.batches) for step in steps},
                "weights": llm.read_weights(places[stage]) if rows else None,
                "rows": [(r["step"], "eval" if "eval/loss" in r else "train") for r in rows],
                "logged": of("train"),
                "evaluated": of("eval"),
                "evaluated texts": [self.texts(evaluation) for evaluation in evaluations],
                "evaluated micro-batches": [row_counts(evaluation) for evaluation in evaluations],
            }
            facets |= {f"{stage} {name}": facet for name, facet in own.items()}
        return facets


def row_counts(record) -> list[int]:
    return sorted(rows_in([batch]) for batch in record.batches)


# ------------------------------------------------------------------------- the same, by hand


def logps_by_hand(model: llm.Transformer, trees: list) -> tuple[list, list[int]]:
    """log π(y|x) of every response of the trees, each with its prompt in a stream of its own, and
    their numbers of tokens."""
    both = [(prompt, response) for prompt, *responses in trees for response in responses]
    sizes = [len(prompt) + len(response) for prompt, response in both]
    starts = np.cumsum([0, *sizes]).tolist()
    tokens = torch.tensor([i for prompt, response in both for i in prompt + response])
    positions = torch.cat([torch.arange(size) for size in sizes])
    segments = torch.tensor([(0, 0, start, size) for start, size in zip(starts, sizes)])
    logps = model(tokens, positions, segments).log_softmax(-1)
    sums = []
    for start, (prompt, response) in zip(starts, both):
        first = start + len(prompt) - 1  # the row that predicts the response's first token
        rows = torch.arange(first, first + len(response))
        sums.append(logps[rows, torch.tensor(response)].sum())
    return sums, [len(response) for _, response in both]


def dpo_by_hand(p, beta, label_smoothing=0.0):
    kept, flipped = logsigmoid(beta * (p.a - p.b)), logsigmoid(-beta * (p.a - p.b))
    return -(1 - label_smoothing) * kept - label_smoothing * flipped


BY_HAND = {
    "dpo": dpo_by_hand,
    "ipo": lambda p, beta: (p.a - p.b - 1 / (2 * beta)) ** 2,
    "rdpo": lambda p, beta, alpha: -logsigmoid(beta * (p.a - p.b) + alpha * (p.size_w - p.size_l)),
    "simpo": lambda p, beta, gamma: -logsigmoid(beta * (p.w / p.size_w - p.l / p.size_l) - gamma),
}


class ByHand:
    """The objective of both stages in float64, from the weights and the reference's."""

    def __init__(self, run: Run, reference: dict):
        config = llm.load_config(run.out)
        self.s, self.model = run.settings, llm.Transformer(config).double()
        self.reference = llm.Transformer(config).double()
        if reference:
            self.reference.load_state_dict(reference)

    def sums(self, stage: str, weights: dict, batches: list) -> tuple[torch.Tensor, dict]:
        """The loss summed over the examples (SFT: tokens) and what is logged, summed likewise."""
        self.model.load_state_dict(weights)
        trees, s = [tree for batch in batches for tree in batch], self.s
        logps, sizes = logps_by_hand(self.model, trees)
        if stage == "sft":
            loss = -torch.stack(logps).sum()
            return loss, {"loss": loss.item(), "count": sum(sizes)}
        with torch.no_grad():
            reference, _ = logps_by_hand(self.reference, trees)
        total, sums = 0.0, dict.fromkeys(("loss", "chosen", "rejected", "right", "count"), 0.0)
        for n in range(0, len(logps), 2):
            (w, l), (size_w, size_l) = logps[n : n + 2], sizes[n : n + 2]  # noqa: E741
            a, b = w - reference[n], l - reference[n + 1]
            pair = SimpleNamespace(w=w, l=l, a=a, b=b, size_w=size_w, size_l=size_l)
            loss = BY_HAND[s.loss](pair, s.beta, **s.options) - s.sft_weight * w / size_w
            total = total + loss
            sums["loss"] += loss.item()
            sums["chosen"] += s.beta * a.item()
            sums["rejected"] += s.beta * b.item()
            sums["count"] += 1
        return total, sums


def share(shape: str, warmup: int, step: int, steps: int) -> float:
    """Of the peak learning rate, in a step counted from 1."""
    warmup = min(warmup, steps // 2)
    if step <= warmup:
        return step / warmup
    left = (steps - step + 1) / (steps - warmup)  # 1 in the first step after the warmup
    return {"constant": 1, "linear": left, "cosine": math.sin(math.pi / 2 * left) ** 2}[shape]


def close(a, b, rtol: float):
    """In norm: |a − b| is at most rtol·|b|."""
    a, b = a.double(), b.double()
    assert (a - b).norm() <= rtol * b.norm() + 1e-9, f"off by {(a - b).norm() / b.norm():.1e}"


def plainly(t: data.Tokenizer, text: str, response: bool) -> list[int]:
    """A prompt, or a response with its end."""
    return [*t.encode(text, True), t.eos_id] if response else [t.bos_id, *t.encode(text)]


def rendered_by_hand(t: data.Tokenizer, text: str, response: bool) -> list[int]:
    """The same of text in which <s> and </s> are meant: a response may bring its end."""
    ids = []
    for piece in re.findall("</?s>|(?:(?!</?s>).)+", text, re.S):
        if piece in ("<s>", "</s>"):
            ids.append(t.bos_id if piece == "<s>" else t.eos_id)
        else:
            continues = piece.startswith(" ") or (response and not ids)
            ids += t.encode(piece, continuation=continues)
    if response:
        return ids if text.endswith("</s>") else [*ids, t.eos_id]
    return ids if text.startswith("<s>") else [t.bos_id, *ids]


def examples_by_hand(run: Run, stage: str, paths: str) -> list[list[list[int]]]:
    """What the rows of files are as token ids, cut to the run's lengths, in the files' order."""
    t, s, trees = run.tokenizer, run.settings, []
    for path in paths.split(","):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            read = rendered_by_hand if s.rendered else plainly
            prompt = read(t, row["prompt"], False)
            if len(prompt) > s.max_prompt_length:
                prompt = [t.bos_id, *prompt[1 - s.max_prompt_length :]]
            names = ("chosen", "rejected") if stage == "dpo" else ("response",)
            texts = [row.get(name, row.get("chosen")) for name in names]
            responses = [read(t, text, True) for text in texts]
            trees.append([prompt, *(ids[: s.max_length - len(prompt)] for ids in responses)])
    return trees


def rows_in(batches: list) -> int:
    """Rows of the stream: a prompt's last token opens every response."""
    return sum(sum(map(len, tree)) - 1 for batch in batches for tree in batch)


def check_examples(run: Run, stage: str):
    """Each step has batch_size of the files' examples, the last of an epoch what is left; each
    epoch has all of them, in an order of its own or in the files'."""
    s, steps = run.settings, [sum(step.batches, []) for step in run.steps[stage]]
    paths, name = (s.data, "pairs") if stage == "dpo" else (s.sft_data or s.data, "sft")
    expected = examples_by_hand(run, stage, paths)
    epochs = s.epochs if stage == "dpo" else s.sft_epochs
    starts = range(0, len(expected), s.batch_size)
    in_order = [expected[start : start + s.batch_size] for start in starts]
    assert len(steps) == min(epochs * len(starts), s.max_steps or 10**9)
    orders = [steps[n : n + len(starts)] for n in range(0, len(steps), len(starts))]
    for order in orders:
        assert list(map(len, order)) == list(map(len, in_order))[: len(order)]
        assert len(order) < len(starts) or sorted(sum(order, [])) == sorted(expected)
        as_in_the_file = all(sorted(x) == sorted(y) for x, y in zip(order, in_order))
        assert as_in_the_file is not s.shuffle
    if s.shuffle and len(orders) > 1:
        assert sorted(orders[0][0]) != sorted(orders[1][0])
    counted = f"{len(expected)} examples"
    assert f"{stage}: {counted}, steps 0 to {len(steps)} of {s.batch_size}" in run.printed
    held_out = examples_by_hand(run, stage, s.eval_data) if s.eval_data else []
    tell = {(name, paths): expected}
    if held_out:
        tell[("eval pairs" if stage == "dpo" else "sft eval"), s.eval_data] = held_out
    for (name, paths), examples in tell.items():
        begins, ends = f"{name}: {len(examples)} examples", f" in {paths}"
        assert any(line.startswith(begins) and line.endswith(ends) for line in run.printed)
        assert stage == "sft" or f"reference: {2 * len(examples)} log-probs computed" in run.printed
    for evaluation in run.evaluations[stage]:
        assert sorted(sum(evaluation.batches, [])) == sorted(held_out)
        most = 2 * s.micro_batch_tokens  # nothing is kept for a backward pass
        assert all(len(batch) == 1 or rows_in([batch]) <= most for batch in evaluation.batches)
        least = -(-rows_in(evaluation.batches) // s.micro_batch_tokens)  # as in training
        assert len(evaluation.batches) < least or least == 1


def check_by_hand(run: Run):
    """All steps of a run: examples, rates, gradients, clipping, updates, and what is logged."""
    s = run.settings
    reference = llm.read_weights(run.out / "sft") if s.sft_epochs and s.epochs else run.start
    by_hand = None  # adapters and bfloat16 are checked by what they leave
    if not s.lora_rank and s.dtype != "bfloat16":
        by_hand = ByHand(run, reference)
    for stage, steps in run.steps.items():
        if not steps:
            continue
        check_examples(run, stage)
        logged, evaluated = run.facets[f"{stage} logged"], run.facets[f"{stage} evaluated"]
        peak, total = s.learning_rate if stage == "dpo" else s.sft_learning_rate, len(steps)
        sums, moments = Counter(), {}
        for number, step in enumerate(steps, 1):
            of_peak = share(s.lr_schedule, s.warmup_steps, number, total)
            assert step.rate == pytest.approx(of_peak * peak, rel=1e-9)
            assert all(len(b) == 1 or rows_in([b]) <= s.micro_batch_tokens for b in step.batches)
            check_update(step, number, s, moments)
            if by_hand:
                sums.update(check_gradient(by_hand, stage, step))
            sums.update(pairs=sum(map(len, step.batches)), tokens=rows_in(step.batches), seconds=2)
            assert (number in logged) == (number % s.log_every == 0 or number == total)
            if number in logged:
                assert logged[number]["train/learning_rate"] == step.rate
                check_row(logged[number], sums)
                sums.clear()
        due = [n for n in range(total + 1) if s.eval_every and n % s.eval_every == 0]
        assert [*evaluated] == (sorted({0, *due, total}) if s.eval_data else [])
        for number, evaluation in zip(evaluated, run.evaluations[stage]):
            for name, weight in (steps[number - 1].after if number else steps[0].before).items():
                assert torch.equal(evaluation.weights[name], weight)
            if by_hand:
                _, sums = by_hand.sums(stage, evaluation.weights, evaluation.batches)
                assert evaluated[number]["eval/loss"] == near(sums["loss"] / sums["count"])
    check_printed(run)
    ids = {"bos_token_id": run.tokenizer.bos_id, "eos_token_id": run.tokenizer.eos_id}
    assert s.init_from or ids.items() <= run.facets["shape"].items()
    trained = sum(run.start[name].numel() for name in run.names.values())
    assert f"{trained:,} parameters are trained, on 1 cpu process(es)" in run.printed
    for line in run.printed:
        found = re.match(r"step 0: the largest log-ratio is (.*) nats \(tolerance (.*)\)", line)
        if found:
            assert float(found[1]) < (1e-4 if by_hand else 0.5)
            assert float(found[2]) == (0.5 if s.dtype == "bfloat16" else 0.01)


def near(value: float):
    return pytest.approx(value, rel=2e-4, abs=2e-5)


def check_gradient(by_hand: ByHand, stage: str, step) -> dict:
    """What was applied in a step is the clipped gradient of the mean over its pairs, or tokens;
    returns the sums of what is logged."""
    loss, sums = by_hand.sums(stage, step.before, step.batches)
    weights, clip = dict(by_hand.model.named_parameters()), by_hand.s.grad_clip
    grads = torch.autograd.grad(loss / sums["count"], [weights[name] for name in step.grads])
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    factor = min(1, clip / norm) if clip else 1
    for theirs, grad in zip(step.grads.values(), grads):
        close(theirs, factor * grad, 1e-3)
    return sums | {"grad_norm": norm.item() * sums["count"]}


def check_row(row: dict, sums: dict):
    """What is logged of the steps since the last row, from their sums."""
    names = {"loss": "loss", "grad_norm": "grad_norm"}
    names |= {"chosen": "rewards/chosen", "rejected": "rewards/rejected"}
    for ours, theirs in names.items():
        if ours in sums:
            assert row[f"train/{theirs}"] == near(sums[ours] / sums["count"]), theirs
    for name in ("pairs", "tokens"):  # evaluation and saving take no part
        assert row[f"{name}_per_second"] == pytest.approx(sums[name] / sums["seconds"]), name


def check_printed(run: Run):
    """A line for each row of metrics: what is most worth seeing of it."""
    shown = {"loss", "rewards/accuracies", "rewards/margins", "rewards/chosen"}
    s, lines = run.settings, [line for line in run.printed if re.match(r"(sft|dpo) \d", line)]
    assert run.printed[-1] == f"saved {s.out_dir}"
    assert len(lines) == len(run.rows)
    for line, row in zip(lines, run.rows):
        names = [name for name in row if "/" in name and name.split("/", 1)[1] in shown]
        words = [f"{row['stage']} {row['step']}", *(f"{name} {row[name]:.4g}" for name in names)]
        if "train/loss" in row:
            steps, rate = len(run.steps[row["stage"]]), row["pairs_per_second"]
            left = (steps - row["step"]) * s.batch_size / rate
            words.append(f"{rate:.0f} pairs/s, {left:.0f} s left")
            paths = s.data if row["stage"] == "dpo" else s.sft_data or s.data
            count = sum(len(Path(p).read_text().splitlines()) for p in paths.split(","))
            per_epoch = -(-count // s.batch_size)
            assert row["epoch"] == pytest.approx(row["step"] / per_epoch)
            memory = guard.most_resident() / 2**30  # Linux counts it within some pages of each core
            assert 0.5 * memory < row["peak_memory_gib"] < 1.1 * memory
        assert line.rstrip() == "  ".join(words)


def check_update(step, number: int, s: train.Settings, moments: dict):
    """The weights after a step, from those before and the gradient that was applied."""
    for name, grad in step.grads.items():
        g, weight = grad.double(), step.before[name].double()
        first, second = moments.get(name, (0.0, 0.0))
        if s.optimizer == "rmsprop":
            second = 0.99 * second + 0.01 * g**2
            after = weight - step.rate * g / (second.sqrt() + 1e-8)
        else:
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            decay = s.weight_decay if weight.dim() == 2 else 0.0
            ahead = first / (1 - 0.9**number), second / (1 - 0.999**number)
            step_by = ahead[0] / (ahead[1].sqrt() + 1e-8)
            after = weight * (1 - step.rate * decay) - step.rate * step_by
        moments[name] = first, second
        close(step.after[name], after, 1e-6)
        close(step.after[name] - step.before[name], after - weight, 1e-3)


# ---------------------------------------------------------------- what each setting changes


def learnt(*stages: str) -> set[str]:
    kinds = ("gradients", "logged", "evaluated", "weights")
    return {f"{stage} {kind}" for stage in stages for kind in kinds}


def fed(*stages: str) -> set[str]:
    return {f"{stage} {kind}" for stage in stages for kind in ("texts", "micro-batches")}


def of(kind: str, *stages: str) -> set[str]:
    return {f"{stage} {kind}" for stage in stages or STAGES}


def all_of(stage: str) -> set[str]:
    held_out = of("evaluated texts", stage) | of("evaluated micro-batches", stage)
    rest = of("rates", stage) | of("optimizer", stage) | of("blocks", stage) | of("rows", stage)
    return learnt(stage) | fed(stage) | held_out | rest


DPO, BOTH = learnt("dpo"), learnt("sft", "dpo")


class Case(NamedTuple):
    """A setting: what is given, what that changes in the run, to the last bit nothing else, and
    what is to be seen there. base: what else is given, also to the run it is compared with."""

    setting: str
    given: dict
    changes: set[str]
    check: Callable = lambda before, after: None
    base: dict = MappingProxyType({})
    rounded: set[str] = frozenset()  # the same but for rounding


# Each check has the run without the setting, and the run with it.


def other_pairs(before: Run, after: Run):
    assert after.facets["dpo evaluated"][0] == before.facets["dpo evaluated"][0]


def chosen_responses(before: Run, after: Run):
    pairs = {text[:2] for step in after.facets["dpo texts"] for text in step}
    assert pairs == {text for step in after.facets["sft texts"] for text in step}


def begins_as_checkpoint(before: Run, after: Run):
    given = llm.read_weights(after.given["init_from"])
    assert same(after.start, given)
    assert after.tokenizer.proto == data.Tokenizer(after.given["init_from"]).proto
    config = json.loads((Path(after.given["init_from"]) / "config.json").read_text())
    assert config == after.facets["shape"]
    assert len([*(after.out / "sft").glob("reference-*.npy")]) == 2, "the reference is SFT's model"


def has_tokenizer(before: Run, after: Run):
    proto = Path(after.given["tokenizer"]).read_bytes()
    assert proto == after.tokenizer.proto != before.tokenizer.proto
    assert proto == data.Tokenizer(after.out / "sft").proto
    assert after.facets["shape"]["vocab_size"] == after.tokenizer.vocab_size


def trains_tokenizer(before: Run, after: Run):
    """On what SFT trains on, as many pieces as it may have."""
    path = after.settings.sft_data or after.settings.data
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    texts = [(row["prompt"], row.get("response", row.get("chosen"))) for row in rows]
    examples = [data.Example(prompt, (response,)) for prompt, response in texts]
    place = after.out / "by_hand"
    place.mkdir()
    data.Tokenizer.train(examples, place, after.settings.vocab_size)
    assert after.tokenizer.proto == data.Tokenizer(place).proto
    assert after.tokenizer.vocab_size == after.settings.vocab_size
    assert after.facets["shape"]["vocab_size"] == after.settings.vocab_size


def is_elsewhere(before: Run, after: Run):
    assert after.about["settings"]["out_dir"] == "out/reviews"


def goes_on(before: Run, after: Run):
    assert after.states == ["done-0"] and "dpo-4" in before.states
    whole = before.facets["dpo texts"]
    assert after.facets["dpo texts"] == whole[4:] and len(whole) == 6
    assert after.facets["dpo rates"] == before.facets["dpo rates"][4:]
    assert same(after.facets["dpo gradients"], before.facets["dpo gradients"][4:])
    assert same(after.start, before.facets["sft weights"])
    assert "dpo: 10 examples, steps 4 to 6 of 4" in after.printed


def logs_as_before(before: Run, after: Run):
    """Also of the steps since the last row that were before the state; but for their speed."""
    goes_on(before, after)
    for step, row in before.facets["dpo logged"].items():
        again = after.facets["dpo logged"][step]
        assert again.keys() == row.keys() and step in (5, 6)
        different = {name for name in row if again[name] != row[name]}
        assert different <= {"pairs_per_second", "tokens_per_second"}, step


def same_first_gradient(before: Run, after: Run):
    assert same(before.steps["dpo"][0].grads, after.steps["dpo"][0].grads)


def rates(stage: str, *shares: float) -> Callable:
    """The learning rates of a stage, as shares of its peak."""

    def check(before: Run, after: Run):
        s = after.settings
        peak = s.learning_rate if stage == "dpo" else s.sft_learning_rate
        assert [rate / peak for rate in after.facets[f"{stage} rates"]] == pytest.approx(shares)

    return check


def shares(*expected: float) -> Callable:
    """The learning rates of both stages, as shares of their peaks."""

    def check(before: Run, after: Run):
        for stage in STAGES:
            rates(stage, *expected)(before, after)

    return check


def decays_matrices(before: Run, after: Run):
    for _, groups in after.facets["sft optimizer"] + after.facets["dpo optimizer"]:
        decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
        assert decay == {
            n: 0.0 if "norm" in n else after.settings.weight_decay for n in after.start
        }


def clips(before: Run, after: Run):
    """Base clips at 1; the first gradient of SFT is the same but for its length."""
    limit = after.settings.grad_clip
    for stage in STAGES:
        logged = [row["train/grad_norm"] for row in after.facets[f"{stage} logged"].values()]
        applied = [
            torch.stack([g.norm() for g in step.grads.values()]).norm().item()
            for step in after.steps[stage]
        ]
        assert min(logged) > 0.05 and max(logged) > 1
        assert applied == pytest.approx([limit or norm for norm in logged], rel=1e-4)
    first = [run.facets["sft logged"][1]["train/grad_norm"] for run in (before, after)]
    assert first[0] == first[1], "what is logged is the norm before clipping"


def sizes(*expected: int) -> Callable:
    def check(before: Run, after: Run):
        assert [len(step) for step in after.facets["dpo texts"]] == list(expected)

    return check


def ends_after_sft(before: Run, after: Run):
    assert not after.steps["dpo"] and not (after.out / "sft").exists()
    assert after.states == ["done-0"]
    assert same(after.steps["sft"][-1].after, llm.read_weights(after.out))


def begins_with_dpo(before: Run, after: Run):
    assert not after.steps["sft"] and not (after.out / "sft").exists()
    assert after.states == ["done-0"]
    assert same(after.steps["dpo"][0].before, after.start)


def stops_early(before: Run, after: Run):
    """After two steps; the schedule is that of two steps, and so reaches the end of its own."""
    shares(1.0, 1.0)(before, after)
    for stage in STAGES:
        assert after.facets[f"{stage} texts"] == before.facets[f"{stage} texts"][:2]


def another_initialisation(before: Run, after: Run):
    for name, weight in after.start.items():
        assert ("norm" in name) == torch.equal(weight, before.start[name]), name


def other_adapters(before: Run, after: Run):
    for name, weight in after.start.items():
        assert (".lora.0." not in name) == torch.equal(weight, before.start[name]), name


def reads_tokens(before: Run, after: Run):
    hint = "10 with text that spells control tokens, kept text (--rendered reads it as tokens)"
    for run, hints in ((before, 2), (after, 0)):
        assert sum(hint in line for line in run.printed) == hints, "of both stages"
    eos, fed = (
        after.tokenizer.eos_id,
        [sum(run.steps["dpo"][0].batches, []) for run in (before, after)],
    )
    assert [{tree[0].count(eos) for tree in trees} for trees in fed] == [{0}, {1}]


def cuts_responses(before: Run, after: Run):
    for stage in STAGES:
        whole = [x.endswith("</s>") for text in flat(after, stage) for x in text[1:]]
        assert any(whole) and not all(whole), "what is cut has no end"
        assert {text[0] for text in flat(before, stage)} == {text[0] for text in flat(after, stage)}
    assert after.facets["shape"]["max_position_embeddings"] == after.settings.max_length


def cuts_prompts(before: Run, after: Run):
    for stage in STAGES:
        whole, cut = (
            sorted(flat(run, stage), key=lambda text: text[1:]) for run in (before, after)
        )
        assert [text[1:] for text in whole] == [text[1:] for text in cut]
        for (long, *_), (short, *_) in zip(whole, cut):
            assert short[:3] == "<s>" == long[:3] and long.endswith(short[3:].strip())
        assert any(map(same, whole, cut)) and whole != cut


def flat(run: Run, stage: str) -> list[tuple]:
    return [text for step in run.facets[f"{stage} texts"] for text in step]


def more_micro_batches(before: Run, after: Run):
    for stage in STAGES:
        few, many = (run.facets[f"{stage} micro-batches"] for run in (before, after))
        assert all(len(b) > len(a) and sum(a) == sum(b) for a, b in zip(few, many))


def one_micro_batch(before: Run, after: Run):
    for stage in STAGES:
        assert all(len(step) == 1 for step in after.facets[f"{stage} micro-batches"])


def shaped(**fields) -> Callable:
    def check(before: Run, after: Run):
        shape = after.facets["shape"]
        assert {name: shape[name] for name in fields} == fields

    return check


def half_precision(before: Run, after: Run):
    assert after.facets["precision"] == {
        ("products", torch.bfloat16), ("log-probs", torch.float32), ("weights", torch.float32)
    }  # fmt: skip
    assert all(w.dtype == torch.float32 for w in after.facets["dpo weights"].values())
    for name, weight in after.facets["dpo weights"].items():
        close(weight, before.facets["dpo weights"][name], 0.5)


def trains_adapters(before: Run, after: Run):
    """Only projections move, by 2·B·A of that rank, and from what the base begins with."""
    sft, dpo = after.facets["sft weights"], after.facets["dpo weights"]
    stages = ((before.start, after.steps["sft"], sft), (sft, after.steps["dpo"], dpo))
    adapted = {name for name in before.start if "_proj" in name}
    assert {name.split(".lora.")[0] + ".weight" for name in after.names.values()} == adapted
    for begins, steps, ends in stages:
        for name, weight in begins.items():
            stem = name.removesuffix(".weight")
            if name in adapted:
                a, b = (steps[-1].after[f"{stem}.lora.{i}.weight"] for i in (0, 1))
                assert not steps[0].before[f"{stem}.lora.1.weight"].any(), "what is merged is gone"
                assert len(a) == b.shape[1] == after.settings.lora_rank
                close(ends[name] - weight, 2 * b @ a, 1e-4)
                assert torch.linalg.matrix_rank(ends[name] - weight, rtol=1e-3) <= len(a)
            else:
                assert torch.equal(ends[name], weight), name


def writes_adapters(before: Run, after: Run):
    """What the last step of DPO left, by peft's names, beside the model that it is merged into."""
    files = [name for name in after.facets["files"] if name not in before.facets["files"]]
    assert files == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    saved = llm.read_safetensors(after.out / files[1])
    last = after.steps["dpo"][-1].after
    assert len(saved) == len(last)
    for name, weight in last.items():
        name = name.replace("lora.0", "lora_A").replace("lora.1", "lora_B")
        assert torch.equal(saved[f"base_model.model.model.{name}"], weight), name


def compiles_blocks(before: Run, after: Run):
    assert after.compiled == [{"dynamic": True}] * after.settings.num_layers


def recomputes(before: Run, after: Run):
    for stage in STAGES:
        assert before.facets[f"{stage} blocks"] == {2} and after.facets[f"{stage} blocks"] == {4}


def averages_rows(before: Run, after: Run):
    """A row is about all steps since the last; each step counts by its examples, or tokens."""
    for stage in STAGES:
        rows = before.facets[f"{stage} logged"]
        for last, first in ((4, 1), (6, 5)):
            numbers = range(first, last + 1)
            steps = [sum(before.steps[stage][n - 1].batches, []) for n in numbers]
            tokens = [sum(len(ids) for tree in step for ids in tree[1:]) for step in steps]
            weights = list(map(len, steps)) if stage == "dpo" else tokens
            for name in rows[1]:
                if name.startswith("train/") and name != "train/learning_rate":
                    expected = np.average([rows[n][name] for n in numbers], weights=weights)
                    found = after.facets[f"{stage} logged"][last][name]
                    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), name


def evaluates_more(before: Run, after: Run):
    for stage in STAGES:
        assert [n for n, kind in after.facets[f"{stage} rows"] if kind == "eval"] == [0, 4, 6]
        rows, fewer = (run.facets[f"{stage} evaluated"] for run in (after, before))
        assert fewer == {n: rows[n] for n in (0, 6)}


def evaluates_nothing(before: Run, after: Run):
    assert all(kind == "train" for stage in STAGES for _, kind in after.facets[f"{stage} rows"])


def samples(before: Run, after: Run):
    """Of three held-out prompts, by each stage's model as it was then."""
    new = [name for name in after.facets["files"] if name not in before.facets["files"]]
    assert new == ["samples.jsonl"]
    rows = [json.loads(line) for line in (after.out / "samples.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in make_pairs(3, 60)]
    due = [(stage, step, prompt) for stage in STAGES for step in (0, 4, 6) for prompt in prompts]
    assert [(row["stage"], row["step"], row["prompt"]) for row in rows] == due
    said = [line for line in after.facets["printed"] if line.startswith(("sample of ", "  -> "))]
    assert len(said) == 2 * len(rows)
    assert [line for line in after.facets["printed"] if line not in said] == before.facets[
        "printed"
    ]


def saves_states(before: Run, after: Run):
    """None after a stage's last step, but where each stage is done; of these the newest two stay.
    What was logged since the last row goes on: to log is no reason to save, nor the reverse."""
    assert before.states == ["dpo-0", "done-0"]
    assert after.states == ["sft-2", "sft-4", "dpo-0", "dpo-2", "dpo-4", "done-0"]
    assert {path.name for path in (after.out / "resume").iterdir()} == {"dpo-4", "done-0"}
    files = {"point.json", "metrics.jsonl", "manifest.json"}
    for name, step in (("dpo-4", 4), ("done-0", 0)):
        state = after.out / "resume" / name
        tensors = {"state.safetensors"} if step else set()
        assert {path.name for path in state.iterdir()} == files | tensors
        point = json.loads((state / "point.json").read_text())
        totals, ratio = point.pop("totals"), point.pop("mean_logratio")
        where = {"stage": name[:-2], "step": step, "state": name, "skipped": {}}
        assert point == after.about | where
        by_hand, sums = ByHand(after, llm.read_weights(after.out / "sft")), Counter()
        for done in after.steps["dpo"][: step or 6]:
            _, last = by_hand.sums("dpo", done.before, done.batches)
            sums.update(last)
        of_step = (last["chosen"] + last["rejected"]) / (2 * after.settings.beta * last["count"])
        assert ratio == near(of_step), "() of the step before"
        if name == "done-0":
            assert totals == {}
            continue
        row = after.facets["dpo logged"][5]
        logged = {k.removeprefix("train/") for k in row if k.startswith("train/")}
        assert totals.keys() == logged - {"learning_rate"} | {"count"}
        assert totals["count"] == sums["count"] == 14
        assert totals["loss"] == near(sums["loss"])
        for which in ("chosen", "rejected"):
            assert totals[f"rewards/{which}"] == near(sums[which])


def reports_to_wandb(before: Run, after: Run):
    begin, *rows = after.wandb
    about = {"project": "dpo", "name": "out", "dir": after.out, "mode": after.settings.wandb}
    assert begin == about | {"config": after.about["settings"]}
    left_out = ("stage", "peak_memory_gib")
    assert rows == [
        {f"{row['stage']}/{name}": value for name, value in row.items() if name not in left_out}
        for row in after.rows
    ]


def asks(**expected) -> Callable:
    """What the loss is asked for, the same in each of its calls."""

    def check(before: Run, after: Run):
        assert after.asked == [expected]

    return check


def begins_with_checkpoint(before: Run, after: Run):
    begins_with_dpo(before, after)
    kept = [path.name for path in Path(after.given["init_from"]).glob("reference-*.npy")]
    assert len(kept) == 2, "of the pairs and of the held-out ones, beside what they are of"


SPELT = {"data": "@spelt", "sft_data": None, "eval_data": "@pairs2"}  # with "</s>" in its texts
NEW = {"tokenizer": None, "vocab_size": 310}  # a tokenizer trained on the data
CHECKPOINT = dict.fromkeys(("tokenizer", "hidden_size", "num_layers", "num_heads"))
CHECKPOINT |= {"init_from": "@checkpoint"}
NO_SFT = {"sft_epochs": 0, "sft_data": None, "sft_learning_rate": None}
NO_DPO = {"epochs": 0, "learning_rate": None, "beta": None}
ALL_FED = fed("sft", "dpo")
HELD_OUT = of("evaluated texts") | of("evaluated micro-batches")
PACKED = of("micro-batches") | of("evaluated micro-batches")
RESUMED = ALL_FED | HELD_OUT | of("rates") | of("gradients")
RESUMED |= {"start", "states", "printed", "sft optimizer", "sft blocks"}
NEW_SHAPE = {"shape", "start", "printed"} | BOTH

CASES = [
    Case("data", {"data": "@pairs2"}, DPO | fed("dpo") | {"dpo rates", "dpo rows", "printed"}, other_pairs),
    Case("data", {"data": "@pairs,@pairs2"}, DPO | fed("dpo") | {"dpo rates", "dpo rows", "printed"}, other_pairs),
    Case("eval_data", {"eval_data": "@eval2"}, of("evaluated") | HELD_OUT | {"printed"}),
    Case("eval_data", {"eval_data": None}, of("evaluated") | HELD_OUT | of("rows") | {"printed", "files"}, evaluates_nothing),
    Case("sft_data", {"sft_data": "@sft2"}, BOTH | fed("sft") | {"sft rates", "sft rows", "printed"}),
    Case("sft_data", {"sft_data": None}, BOTH | fed("sft") | {"printed"}, chosen_responses),
    Case("init_from", CHECKPOINT, NEW_SHAPE | {"tokenizer", "trained", "files"} | of("micro-batches") | of("blocks") | of("optimizer") | of("evaluated micro-batches"), begins_as_checkpoint),
    Case("tokenizer", {"tokenizer": "@tokenizer2"}, NEW_SHAPE | {"tokenizer"} | PACKED, has_tokenizer),
    Case("out_dir", {"out_dir": None}, set(), is_elsewhere),
    Case("resume", {"resume": "true"}, RESUMED, goes_on, {"save_every": 4}),
    Case("resume", {"resume": "true"}, RESUMED | {"dpo logged"}, logs_as_before, {"save_every": 4, "log_every": 5}),
    Case("loss", {"loss": "ipo"}, DPO | {"objective"}, asks(loss="ipo", beta=0.5)),
    Case("beta", {"beta": 2.0}, DPO | {"objective"}, asks(loss="dpo", beta=2.0, label_smoothing=0.0)),
    Case("sft_weight", {"sft_weight": 0.7}, DPO),
    Case("optimizer", {"optimizer": "rmsprop"}, BOTH | of("optimizer")),
    Case("learning_rate", {"learning_rate": 0.001}, DPO | {"dpo rates"}, same_first_gradient),
    Case("sft_learning_rate", {"sft_learning_rate": 0.02}, BOTH | {"sft rates"}, rates("sft", 0.5, 1, 1, 0.75, 0.5, 0.25)),
    Case("lr_schedule", {"lr_schedule": "constant"}, BOTH | of("rates"), shares(0.5, 1, 1, 1, 1, 1)),
    Case("lr_schedule", {"lr_schedule": "cosine"}, BOTH | of("rates"), shares(0.5, 1, 1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4)),
    Case("lr_schedule", {"lr_schedule": "linear"}, set(), shares(0.5, 1, 1, 0.75, 0.5, 0.25)),
    Case("warmup_steps", {"warmup_steps": 0}, BOTH | of("rates"), shares(1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)),
    Case("warmup_steps", {"warmup_steps": 50}, BOTH | of("rates"), shares(1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3)),
    Case("weight_decay", {"weight_decay": 3.0}, BOTH | of("optimizer"), decays_matrices),
    Case("grad_clip", {"grad_clip": 0.05}, BOTH, clips),
    Case("grad_clip", {"grad_clip": 0}, BOTH, clips),
    Case("batch_size", {"batch_size": 6}, BOTH | ALL_FED | of("rates") | of("rows") | {"printed"}, sizes(6, 4, 6, 4)),
    Case("epochs", {"epochs": 1}, DPO | fed("dpo") | {"dpo rates", "dpo rows", "printed"}, rates("dpo", 1, 1, 0.5)),
    Case("epochs", NO_DPO, all_of("dpo") | {"printed", "files", "states", "objective"}, ends_after_sft),
    Case("sft_epochs", {"sft_epochs": 1}, BOTH | fed("sft") | {"sft rates", "sft rows", "printed"}, rates("sft", 1, 1, 0.5)),
    Case("sft_epochs", NO_SFT, all_of("sft") | DPO | {"printed", "files", "states"}, begins_with_dpo),
    Case("max_steps", {"max_steps": 2}, BOTH | ALL_FED | of("rates") | of("rows") | {"printed"}, stops_early),
    Case("max_steps", {"max_steps": 50}, set()),
    Case("rendered", {"rendered": "true"}, BOTH | ALL_FED | HELD_OUT | PACKED | {"printed"}, reads_tokens, SPELT),
    Case("shuffle", {"shuffle": "false"}, BOTH | ALL_FED),
    Case("seed", {"seed": 1}, BOTH | ALL_FED | {"start"}, another_initialisation),
    Case("seed", {"seed": 1}, BOTH | ALL_FED, base=CHECKPOINT),
    Case("seed", {"seed": 1}, BOTH | ALL_FED | {"start"}, other_adapters, CHECKPOINT | {"lora_rank": 2}),
    Case("max_length", {"max_length": 15}, BOTH | ALL_FED | HELD_OUT | {"shape", "printed"}, cuts_responses, {"max_prompt_length": 13}),
    Case("max_prompt_length", {"max_prompt_length": 9}, BOTH | ALL_FED | HELD_OUT | {"printed"}, cuts_prompts),
    Case("skip_bad_rows", {"skip_bad_rows": 3}, set()),
    Case("micro_batch_tokens", {"micro_batch_tokens": 19}, PACKED, more_micro_batches, rounded=BOTH),
    Case("micro_batch_tokens", {"micro_batch_tokens": 4096}, PACKED, one_micro_batch, rounded=BOTH),
    Case("sft_epochs", NO_SFT, all_of("sft") | DPO | {"printed", "files", "states"}, begins_with_checkpoint, CHECKPOINT),
    Case("tokenizer", NEW | {"vocab_size": 316}, NEW_SHAPE | {"tokenizer", "files"} | PACKED, trains_tokenizer),
    Case("sft_data", {"sft_data": None}, BOTH | {"tokenizer", "printed", "sft texts"} | PACKED, trains_tokenizer, NEW),
    Case("vocab_size", {"vocab_size": 316}, NEW_SHAPE | {"tokenizer"} | PACKED, trains_tokenizer, NEW),
    Case("hidden_size", {"hidden_size": 24}, NEW_SHAPE, shaped(hidden_size=24, intermediate_size=64, head_dim=12, num_attention_heads=2, num_hidden_layers=2)),
    Case("num_layers", {"num_layers": 3}, NEW_SHAPE | {"trained"} | of("optimizer") | of("blocks"), shaped(hidden_size=16, num_hidden_layers=3)),
    Case("num_heads", {"num_heads": 4}, {"shape"} | BOTH, shaped(num_attention_heads=4, num_key_value_heads=4, head_dim=4, hidden_size=16)),
    Case("dtype", {"dtype": "bfloat16"}, BOTH | {"precision", "printed"}, half_precision),
    Case("dtype", {"dtype": "float32"}, set()),
    Case("lora_rank", {"lora_rank": 3}, BOTH | {"start", "trained", "printed"} | of("optimizer"), trains_adapters),
    Case("save_adapter", {"save_adapter": "true"}, {"files"}, writes_adapters, {"lora_rank": 3}),
    Case("compile", {"compile": "true"}, {"compiled"}, compiles_blocks),
    Case("activation_checkpointing", {"activation_checkpointing": "true"}, of("blocks"), recomputes),
    Case("log_every", {"log_every": 4}, of("rows") | of("logged"), averages_rows),
    Case("eval_every", {"eval_every": 4}, of("rows") | of("evaluated") | HELD_OUT, evaluates_more),
    Case("sample_every", {"sample_every": 4}, {"files", "printed"}, samples),
    Case("save_every", {"save_every": 2}, {"files", "states"}, saves_states, {"log_every": 5}),
    Case("wandb", {"wandb": "offline"}, {"wandb"}, reports_to_wandb),
    Case("wandb", {"wandb": "online"}, {"wandb"}, reports_to_wandb),
    Case("label_smoothing", {"label_smoothing": 0.2}, DPO | {"objective"}, asks(loss="dpo", beta=0.5, label_smoothing=0.2)),
    Case("alpha", {"alpha": 0.3}, DPO | {"objective"}, asks(loss="rdpo", beta=0.5, alpha=0.3), {"loss": "rdpo"}),
    Case("gamma", {"gamma": 0.3}, DPO | {"objective"}, asks(loss="simpo", beta=0.5, gamma=0.3), {"loss": "simpo"}),
]  # fmt: skip


def name_of(case: Case) -> str:
    """The setting with its value; and "again" as often as that was there before."""
    name = lambda c: f"{c.setting}={c.given.get(c.setting)}".replace("@", "").lower()
    earlier = [name(c) for c in CASES[: CASES.index(case)]]
    return name(case) + "-again" * earlier.count(name(case))


def same(a, b) -> bool:
    """To the last bit, tensors within anything."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def alike(a, b):
    """But for rounding: without what counts exact zeros."""
    if isinstance(a, torch.Tensor):
        close(a, b, 1e-3)
    elif isinstance(a, float):
        assert a == near(b)
    elif isinstance(a, (dict, list)):
        for key in a if isinstance(a, dict) else range(len(a)):
            if not str(key).endswith(("ties", "accuracies", "both_fell")):
                alike(a[key], b[key])
    else:
        assert a == b


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory) -> Callable:
    """The run that a case is compared with, made once."""
    runs = {}

    def find(base: dict) -> Run:
        key = json.dumps(dict(base), sort_keys=True)
        if key not in runs:
            root = tmp_path_factory.mktemp("base")
            runs[key] = Run(world, BASE | base, root / "out", root / "cwd")
            check_by_hand(runs[key])
        return runs[key]

    return find


def settings_by_hand(run: Run) -> dict:
    """What run.json says: the defaults, what is given, and the options of the loss."""
    default = {f.name: f.default for f in dataclasses.fields(train.Settings) if f.name != "options"}
    options = [*inspect.signature(LOSSES[run.given.get("loss", "dpo")]).parameters.values()][2:]
    given, settings = run.given, {}
    for name, old in default.items():
        convert = (lambda text: text.lower() == "true") if isinstance(old, bool) else type(old)
        settings[name] = convert(given[name]) if name in given else old
    return settings | {"options": {o.name: float(given.get(o.name, o.default)) for o in options}}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_setting_acts_as_it_says_and_changes_nothing_else(case, compared, world, tmp_path):
    before = compared(case.base)
    out, cwd = tmp_path / "out", tmp_path / "cwd"
    if case.setting == "out_dir":
        out = cwd / train.Settings.out_dir
    if "resume" in case.given:
        shutil.copytree(before.out, out)
        shutil.rmtree(out / "resume" / "done-0")  # as if it had been killed in its last steps
        after = Run(world, {"data": BASE["data"]} | case.given, out, cwd)
        after.given = before.given | after.given
    else:
        after = Run(world, BASE | case.base | case.given, out, cwd)
        check_by_hand(after)
        assert after.about["settings"] == settings_by_hand(after)
        assert after.about["ranks"] == 1 and after.about["torch"] == torch.__version__
    changed = {name for name, facet in before.facets.items() if not same(facet, after.facets[name])}
    changed -= case.rounded
    found = {"changes too": changed - case.changes, "does not change": case.changes - changed}
    assert not any(found.values()), found
    for name in case.rounded:
        alike(before.facets[name], after.facets[name])
    case.check(before, after)
    assert [path.name for path in cwd.iterdir()] == ["out"] * (case.setting == "out_dir")


PROMISED = {
    "data": "reviews", "eval_data": "", "sft_data": "", "init_from": "", "tokenizer": "", "out_dir": "out/reviews",
    "resume": False, "loss": "dpo", "beta": 0.1, "sft_weight": 0.0, "optimizer": "adamw", "learning_rate": 1e-6,
    "sft_learning_rate": 1e-5, "lr_schedule": "linear", "warmup_steps": 20, "weight_decay": 0.0, "grad_clip": 1.0,
    "batch_size": 64, "epochs": 1, "sft_epochs": 1, "max_steps": 0, "shuffle": True, "seed": 0, "rendered": False, "max_length": 512,
    "max_prompt_length": 256, "micro_batch_tokens": 4096, "skip_bad_rows": 0, "vocab_size": 640, "hidden_size": 128, "num_layers": 2,
    "num_heads": 4, "dtype": "auto", "lora_rank": 0, "save_adapter": False, "compile": False, "activation_checkpointing": False,
    "log_every": 25, "eval_every": 0, "sample_every": 0, "save_every": 0, "wandb": "disabled", "options": {"label_smoothing": 0.0},
}  # fmt: skip


def test_a_default_is_a_promise():
    """Another one makes another run of every command that does not give that setting."""
    assert dataclasses.asdict(train.parse_settings(["--data=reviews"])) == PROMISED


def test_every_setting_has_its_case():
    fields = {field.name for field in dataclasses.fields(train.Settings)} - {"options"}
    for loss in LOSSES.values():
        fields |= set([*inspect.signature(loss).parameters][2:])
    assert {case.setting for case in CASES} == fields


# ------------------------------------------------------------------ what no single run shows


def test_bfloat16_is_the_default_on_cuda_only(tmp_path, monkeypatch):
    made = lambda dtype: train.Run(
        train.Settings(data=__file__, out_dir=str(tmp_path), dtype=dtype)
    )
    devices = []
    monkeypatch.setattr(torch, "autocast", lambda *given, enabled: (*given, enabled))
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(()))  # there is none such
    monkeypatch.setenv("LOCAL_RANK", "3")
    for cuda, expected in ((False, [False, True, False]), (True, [True, True, False])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        runs = list(map(made, ("auto", "bfloat16", "float32")))
        assert [run.bf16 for run in runs] == expected
        assert {run.device for run in runs} == {torch.device("cuda:3" if cuda else "cpu")}
        kind = "cuda" if cuda else "cpu"
        assert [run.autocast for run in runs] == [(kind, torch.bfloat16, on) for on in expected]
    assert devices == [torch.device("cuda:3")] * 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_a_step_is_shared_by_all_ranks(world_size):
    """Together their micro-batches are the step's examples, once each; all have as many, and none
    is over the budget."""
    rng = np.random.default_rng(world_size)
    trees = [[[1] * rng.integers(1, 9), [2] * rng.integers(1, 9), [3, n]] for n in range(20)]
    dataset = data.to_dataset(trees)
    step = np.array([3, 1, 4, 15, 9, 2])
    settings = SimpleNamespace(micro_batch_tokens=25)
    parts = []
    for rank in range(world_size):
        run = SimpleNamespace(world=world_size, rank=rank, settings=settings, device="cpu")
        run.watch = lambda items: items
        parts.append(list(train.micro_batches(dataset, step, run)))
        assert all(len(batch.tokens) <= 25 for batch in parts[-1])
    assert len(set(map(len, parts))) == 1
    real = [batch for part in parts for batch in part if batch.weights.any()]
    found = sorted(int(n) for batch in real for n in batch.ids)
    assert found == sorted(2 * n + k for n in step.tolist() for k in (0, 1))


def test_help_shows_every_setting_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--data=x", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and " ".join(train.__doc__.split()) in shown
    source = (ROOT / "train.py").read_text(encoding="utf-8").split("class Settings:")[1]
    lines = source.split("\n\n")[0].strip().splitlines()
    entries = [re.fullmatch(r"    (\w+): \w+ = (.+?)  # (.+)", f"    {x.strip()}") for x in lines]
    assert all(entries) and len(entries) == len(dataclasses.fields(train.Settings))
    for name, value, comment in (entry.groups() for entry in entries[:-1]):
        default = f"{getattr(train.Settings, name)!r}"
        assert default == value.replace('"', "'") or float(default) == float(value)
        assert re.search(
            rf"--{name} ([^-]\S* )?{re.escape(comment)} \(default {re.escape(default)}\)", shown
        ), name
    assert entries[-1][1] == "options" and "--options" not in shown


def test_flags_are_read_as_their_settings_are_typed():
    parse = lambda *flags: train.parse_settings(["--data=x", *flags])
    assert parse("--resume=false").resume is False
    for flags in (["--compile"], ["--compile=true"], ["--compile", "true"]):
        assert parse(*flags).compile is True
    assert parse("--shuffle=false").shuffle is False and parse().shuffle is True
    s = parse("--beta", "2", "--max_steps=7", "--out_dir=7", "--label_smoothing=0.25")
    assert (s.beta, s.max_steps, s.out_dir, s.options) == (2.0, 7, "7", {"label_smoothing": 0.25})
    assert parse("--beta=3", "--beta=4").beta == 4, "the last one counts"


def test_what_goes_wrong_is_one_line(tmp_path, capsys):
    for flags in (["--beta=-1"], [f"--out_dir={tmp_path / 'out'}", "--sft_epochs=0"]):
        with pytest.raises(SystemExit) as stopped:
            train.main([f"--data={tmp_path / 'none.jsonl'}", *flags])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.startswith("train.py: ") and error.count("\n") == 1
        assert ("--beta must be" in error) != ("none.jsonl" in error)
    with pytest.raises(SystemExit, match="2"):
        train.main(["--seed=1", "--data"])
    assert (
        capsys.readouterr().err.split(": ", 1)[1]
        == "error: argument --data: expected one argument\n"
    )


# ------------------------------------------------------------------- the built-in experiment


@pytest.fixture
def experiment(monkeypatch, tmp_path) -> Callable:
    """What run_experiment writes, trains by and reports, without doing it."""

    def run(*flags: str, rank: int = 0) -> SimpleNamespace:
        seen = SimpleNamespace(written=[], trained=[], reported=[])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(reviews, "write", lambda *given: seen.written.append(given))
        monkeypatch.setattr(reviews, "report", lambda *given: seen.reported.append(given))
        with monkeypatch.context() as patch:
            main = train.main
            patch.setattr(
                train, "main", lambda words: seen.trained.append(train.parse_settings(words))
            )
            main(list(flags))
        [seen.settings] = seen.trained
        return seen

    return run


PRESETS = {"beta": 1.0, "batch_size": 32, "learning_rate": 2e-4, "sft_learning_rate": 5e-3}
DEFAULTS = {name: getattr(train.Settings, name) for name in PRESETS}


@pytest.mark.parametrize(("flags", "expected"), [
    ("", PRESETS),
    ("--data=reviews", PRESETS),
    ("--data reviews --seed 1", PRESETS | {"seed": 1}),
    ("--beta=0.1", PRESETS | {"beta": 0.1}),
    ("--beta 3", PRESETS | {"beta": 3.0}),
    ("--batch_size=8", PRESETS | {"batch_size": 8}),
    ("--learning_rate=1e-6", PRESETS | {"learning_rate": 1e-6}),
    ("--sft_learning_rate=1", PRESETS | {"sft_learning_rate": 1.0}),
    ("--warmup_steps=3 --seed=7", PRESETS | {"warmup_steps": 3, "seed": 7}),
    ("--out_dir=elsewhere", PRESETS | {"out_dir": "elsewhere"}),
    ("--loss=simpo", PRESETS | {"loss": "simpo", "beta": 2.0, "options": {"gamma": 1.0}}),
    ("--loss=simpo --beta=4", PRESETS | {"loss": "simpo", "beta": 4.0, "options": {"gamma": 1.0}}),
    ("--loss=ipo", PRESETS | {"loss": "ipo", "options": {}}),
    ("--epochs=0", PRESETS | {"epochs": 0} | {x: DEFAULTS[x] for x in ("beta", "learning_rate")}),
    ("--init_from=start", PRESETS | {"init_from": "start"}),
    ("--sft_epochs=0 --init_from=start", PRESETS | {"sft_epochs": 0, "init_from": "start",
     "sft_data": "", "sft_learning_rate": DEFAULTS["sft_learning_rate"]}),
])  # fmt: skip
def test_the_experiment_sets_what_the_command_line_does_not(flags, expected, experiment, tmp_path):
    """Its four settings, its files and its directory; all else has its default."""
    llm.save_pretrained(llm.Transformer(llm.ModelConfig.new(9, 4, 1, 1)), tmp_path / "start")
    seen = experiment(*flags.split())
    out = Path(expected.get("out_dir", "out/reviews"))
    files = {"data": "pairs", "eval_data": "eval", "sft_data": "sft"}
    files = {name: str(out / f"{file}.jsonl") for name, file in files.items()}
    default = dataclasses.asdict(train.Settings()) | {"options": {"label_smoothing": 0.0}}
    assert dataclasses.asdict(seen.settings) == default | {"out_dir": str(out)} | files | expected
    s = seen.settings
    assert seen.written == [(out, s.seed, 20_000 if s.sft_epochs else 1, 6_000)]
    reference = out / "sft" if s.sft_epochs else s.init_from
    assert seen.reported == ([(out, reference)] if s.epochs else [])


def test_only_one_process_writes_and_reports(experiment):
    seen = experiment("--seed=2", rank=1)
    assert (seen.written, seen.reported) == ([], []) and seen.settings.seed == 2


def test_the_seed_of_the_run_is_that_of_its_data(tmp_path):
    """Another seed, other files, of the sizes that were asked for; the same, the same."""
    texts = {}
    for name, seed in (("one", 0), ("two", 1), ("again", 0)):
        paths = reviews.write(tmp_path / name, seed, 12, 5)
        assert [Path(path).name for path in paths] == ["pairs.jsonl", "eval.jsonl", "sft.jsonl"]
        texts[name] = [Path(path).read_text() for path in paths]
        assert [text.count("\n") for text in texts[name]] == [5, 10, 12]
    assert texts["one"] == texts["again"]
    assert all(one != two for one, two in zip(texts["one"], texts["two"]))


# ---------------------------------------------------------------------------- what is refused


CHOICES = {
    "optimizer": "adamw, rmsprop",
    "lr_schedule": "constant, linear, cosine",
    "dtype": "auto, bfloat16, float32",
    "wandb": "disabled, offline, online",
}
ABOVE_0 = """beta batch_size micro_batch_tokens max_prompt_length log_every vocab_size hidden_size
    num_layers num_heads""".split()
OTHER = {  # a value of each setting that is neither its default nor refused for itself
    "data": "z", "eval_data": "f", "sft_data": "s", "init_from": "@", "tokenizer": "t", "out_dir": "o",
    "loss": "ipo", "beta": 2.0, "sft_weight": 0.5, "optimizer": "rmsprop", "learning_rate": 0.5,
    "sft_learning_rate": 0.5, "lr_schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.5,
    "grad_clip": 2.0, "batch_size": 7, "epochs": 3, "sft_epochs": 3, "max_steps": 7, "shuffle": False,
    "seed": 9, "max_length": 600, "max_prompt_length": 99, "micro_batch_tokens": 99,
    "vocab_size": 700, "hidden_size": 64, "num_layers": 3, "num_heads": 2, "dtype": "float32",
    "lora_rank": 4, "compile": True, "activation_checkpointing": True, "log_every": 7,
    "eval_every": 7, "save_every": 7, "wandb": "offline", "label_smoothing": 0.25,
}  # fmt: skip


@pytest.fixture
def refusal(monkeypatch, world) -> Callable:
    """What parse_settings says against flags; nothing if it takes them."""
    source = inspect.getsource(train.Settings)
    monkeypatch.setattr(train.inspect, "getsource", lambda _: source)  # it takes long

    def find(**given) -> str:
        given = {"data": "x"} | given
        flags = [
            f"--{name}={str(x).lower() if x in (True, False) and isinstance(x, bool) else x}"
            for name, x in given.items()
        ]
        try:
            train.parse_settings([flag.replace("@", world["checkpoint"]) for flag in flags])
        except data.DataError as error:
            return str(error)
        return ""

    return find


def test_a_setting_of_words_takes_those_alone(refusal):
    for name, words in CHOICES.items():
        for word in words.split(", "):
            assert refusal(**{name: word}) == ""
        message = f"--{name} is 'other': it must be one of {words}"
        assert refusal(**{name: "other"}) == message


def test_numbers_are_refused_where_they_mean_nothing(refusal):
    """Below 0, not finite, and 0 where something must be there; 0 elsewhere is a value."""
    for field in dataclasses.fields(train.Settings):
        name = field.name
        if field.type not in (int, float):
            continue
        base = {"eval_data": "e"}
        low = field.type(-1)
        assert (
            refusal(**base, **{name: low})
            == f"--{name} must be a number of at least 0, found {low}"
        )
        for value in ("nan", "inf", "-inf") if field.type is float else ():
            expected = f"--{name} must be a number of at least 0, found {value}"
            assert refusal(**base, **{name: value}) == expected
        expected = f"--{name} must be greater than 0" if name in ABOVE_0 else ""
        if name == "max_length":
            expected = "--max_prompt_length must be less than --max_length"
        assert refusal(**base, **{name: 0}) == expected


def test_options_of_losses_are_refused_where_they_mean_nothing(refusal):
    above_0 = {("exo", "label_smoothing"), ("chipo", "gamma"), ("fdpo_alpha", "alpha")}
    half = "--label_smoothing must be less than 0.5: at 0.5 labels say nothing"
    for loss, function in LOSSES.items():
        for option in [*inspect.signature(function).parameters][2:]:
            about = lambda value: refusal(loss=loss, **{option: value})
            assert about(-1) == f"--{option} must be a number of at least 0, found -1.0"
            zero = f"--{option} must be greater than 0" if (loss, option) in above_0 else ""
            assert about(0) == zero
            assert about(0.49) == "" and about(0.5) == (half if option == "label_smoothing" else "")


def test_flags_that_would_be_ignored_are_refused_and_no_others(refusal):
    new = {"tokenizer", "vocab_size", "hidden_size", "num_layers", "num_heads"}
    objective = {"loss", "beta", "sft_weight", "learning_rate", "label_smoothing"}
    held_out = {"eval_data": "e"}
    for given, ignored, reason in (
        (held_out | {"init_from": "@"}, new, "--init_from brings its own"),
        (held_out | {"tokenizer": "t"}, {"vocab_size"}, "--tokenizer brings its own"),
        (held_out | {"sft_epochs": 0}, {"sft_data", "sft_learning_rate"}, "--sft_epochs is 0"),
        (held_out | {"epochs": 0}, objective, "--epochs is 0"),
        (held_out | {"optimizer": "rmsprop"}, {"weight_decay"}, "rmsprop here has none"),
        ({}, {"eval_every"}, "there is no --eval_data"),
        (held_out | {"loss": "sft"}, {"sft_weight"}, "--loss=sft is that term alone"),
        (held_out, set(), ""),
    ):
        assert refusal(**given) == ""
        for name, value in OTHER.items():
            if name in given or (name == "label_smoothing" and given.get("loss") == "sft"):
                continue
            if name == "init_from" and "tokenizer" in given:
                continue  # the tokenizer would be ignored
            expected = f"--{name} would be ignored: {reason}" if name in ignored else ""
            assert refusal(**given, **{name: value}) == expected, (given, name)


def test_settings_that_contradict_each_other_are_refused(refusal, world, tmp_path):
    less = "--max_prompt_length must be less than --max_length"
    assert refusal(max_length=80, max_prompt_length=80) == less
    assert refusal(max_length=80, max_prompt_length=79) == ""
    heads = "--hidden_size must be a multiple of twice --num_heads"
    shapes = {(24, 4): "", (20, 4): heads, (12, 4): heads, (8, 4): "", (4, 4): heads}
    for (width, count), expected in shapes.items():
        assert refusal(hidden_size=width, num_heads=count) == expected
    assert refusal(epochs=0, sft_epochs=0).startswith("with --sft_epochs=0 and --epochs=0")
    assert refusal(data=",") == refusal(data="") == "--data names no file"

    start = tmp_path / "run"
    for place in (start, start / "sft"):
        shutil.copytree(world["checkpoint"], place)
    over = "--out_dir is --init_from, which it would overwrite"
    about = lambda place, **given: refusal(init_from=place, out_dir=start, **given)
    assert about(start) == about(tmp_path / "x" / ".." / "run") == about(start / "sft") == over
    assert about(start, sft_epochs=0) == about(start, epochs=0) == over
    assert about(start / "sft", sft_epochs=0) == about(start / "sft", epochs=0) == ""

    adapters = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    for place, base in (
        ("adapter", "sft"),
        ("other", "sft"),
        ("again", "other"),
        ("far", "checkpoint"),
    ):
        (start / place).mkdir()
        named = {
            "base_model_name_or_path": str(
                {"checkpoint": world["checkpoint"]}.get(base, start / base)
            )
        }
        (start / place / "adapter_config.json").write_text(json.dumps(adapters | named))
    assert about(start / "adapter") == about(start / "adapter", sft_epochs=0) == over
    base = "--out_dir is the base of --init_from, which it would overwrite"
    assert about(start / "other") == about(start / "again") == base
    assert about(start / "other", sft_epochs=0) == about(start / "again", epochs=0) == ""
    assert about(start / "far") == ""

    need = "--save_adapter needs adapters: give --lora_rank"
    assert refusal(save_adapter=True) == refusal(save_adapter=True, init_from="@") == need
    need = "--save_adapter needs a base: give --init_from, or let SFT come before DPO"
    saved = {"save_adapter": True, "lora_rank": 2}
    assert refusal(**saved, epochs=0) == refusal(**saved, sft_epochs=0) == need
    for given in (
        {},
        {"init_from": "@"},
        {"init_from": "@", "sft_epochs": 0},
        {"init_from": "@", "epochs": 0},
    ):
        assert refusal(**saved, **given) == ""
    assert refusal(save_adapter=False) == ""

    config = json.loads((start / "config.json").read_text())
    config |= {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 64,
    }
    (start / "config.json").write_text(json.dumps(config))
    about = lambda length: refusal(init_from=start, max_length=length, max_prompt_length=9)
    assert about(64) == "" and "is beyond the sliding window of 64" in about(65)


def write_point(out: Path, settings: train.Settings, cwd: Path, digests: dict | None = None):
    """A state, as far as the command line looks at it."""
    state = out / "resume" / "dpo-4"
    state.mkdir(parents=True, exist_ok=True)
    point = {"settings": dataclasses.asdict(settings), "cwd": str(cwd), "digests": digests or {}}
    (state / "point.json").write_text(json.dumps(point))
    size, digest = (state / "point.json").stat().st_size, guard.sha256(state / "point.json")
    (state / "manifest.json").write_text(json.dumps({"point.json": [size, digest]}))


def changes_said(capsys) -> str:
    """What was printed, but for the settings that a run has from its beginning."""
    lines = capsys.readouterr().out.splitlines(keepends=True)
    return "".join(line for line in lines if "by this run's own settings" not in line)


def test_a_resumed_run_keeps_its_settings_but_for_where_and_how_often(refusal, tmp_path, capsys):
    """What was given then need not be given again, and may be; another value is refused, but for
    ten settings, which count from then on, and for the names of files, not their contents."""
    before = train.Settings(
        data="x", eval_data="e", out_dir="then", options={"label_smoothing": 0.0}
    )
    write_point(tmp_path, before, Path.cwd())
    free = {"log_every", "eval_every", "save_every", "wandb", "micro_batch_tokens", "compile"}
    free |= {"activation_checkpointing"}
    about = {"resume": True, "out_dir": tmp_path}
    resumed = ["--resume", f"--out_dir={tmp_path}"]
    old = dataclasses.asdict(before) | before.options
    flag = lambda name, value: f"--{name}={str(value).lower() if value in (True, False) else value}"
    for name, value in OTHER.items():
        if name in ("init_from", "out_dir"):
            continue
        expected = f"--resume: {name} is {value!r}, but was {old[name]!r} in this run"
        changes = f"--resume: {name} is {value!r} from here on, and was {old[name]!r}\n"
        named = name in ("data", "eval_data")  # what they name is compared later
        assert refusal(**(about | {name: value})) == ("" if name in free or named else expected)
        assert changes_said(capsys) == (changes if name in free else "")
        assert refusal(**(about | {name: old[name]})) == ""
        settings = train.parse_settings([*resumed, flag(name, old[name])])
        assert settings == dataclasses.replace(before, resume=True, out_dir=str(tmp_path))
        assert changes_said(capsys) == ""
        if name in free or named:
            settings = train.parse_settings([*resumed, f"{flag(name, value)}"])
            changed = {name: value, "resume": True, "out_dir": str(tmp_path)}
            assert settings == dataclasses.replace(before, **changed)
            capsys.readouterr()
    for name, value, was in (("init_from", "@", ""), ("eval_data", "", "e")):
        message = refusal(**about, **{name: value})
        assert re.fullmatch(f"--resume: {name} is '.*', but was {was!r} in this run", message)
    write_point(tmp_path, dataclasses.replace(before, lora_rank=4), Path.cwd())
    assert refusal(**about, save_adapter=True) == ""
    assert "save_adapter is True from here on, and was False" in capsys.readouterr().out


def test_a_resumed_run_finds_its_files_from_anywhere(tmp_path, monkeypatch):
    """Their names are relative to where it was begun; those of the command line to where it is."""
    cwd = tmp_path / "then"
    names = {"data": "x,sub/y", "eval_data": str(tmp_path / "e"), "sft_data": "s", "tokenizer": "t"}
    before = train.Settings(**names, out_dir=str(tmp_path), options={"label_smoothing": 0.0})
    write_point(tmp_path, before, cwd)
    s = train.parse_settings(["--resume", f"--out_dir={tmp_path}", "--sft_data=z"])
    moved = {"data": f"{cwd / 'x'},{cwd / 'sub/y'}", "tokenizer": str(cwd / "t"), "sft_data": "z"}
    assert s == dataclasses.replace(before, **moved, resume=True)
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    s = train.parse_settings(["--resume", f"--out_dir={tmp_path}"])
    assert s == dataclasses.replace(before, resume=True)


def test_a_resumed_run_is_of_the_contents_that_it_began_with(world, tmp_path):
    """Whatever the files are called now; in their order."""
    for name in ("pairs", "pairs2", "eval", "sft"):
        shutil.copy(world[name], tmp_path / name)
    shutil.copytree(world["checkpoint"], tmp_path / "checkpoint")
    shutil.copy(world["tokenizer"], tmp_path / "tokenizer.model")
    place = lambda *names: ",".join(str(tmp_path / name) for name in names)
    given = {"data": place("pairs", "pairs2"), "eval_data": place("eval"), "sft_data": place("sft")}
    given |= {"init_from": place("checkpoint"), "tokenizer": place("tokenizer.model")}
    before = train.Settings(**given, out_dir=str(tmp_path / "run"), resume=True)
    digests = guard.digests(before)
    assert digests.keys() == given.keys() and len({*digests.values()}) == 5
    write_point(tmp_path / "run", before, tmp_path, digests)

    def begin(**changed) -> str:
        settings = dataclasses.replace(before, **changed)
        run = SimpleNamespace(out=Path(before.out_dir), settings=settings, about={"ranks": 1})
        try:
            guard.begin(run)
        except data.DataError as error:
            return str(error)
        assert run.about.pop("torch") == torch.__version__
        assert run.about == {"ranks": 1, "cwd": str(Path.cwd()), "digests": digests}
        return ""

    refused = "--resume: what --{} names is not what this run began with: begin another run, "
    refused += "in another --out_dir"
    assert begin() == ""
    assert begin(data=place("pairs2", "pairs")) == refused.format("data")
    for name, folder, file in (
        ("data", "", "pairs2"),
        ("eval_data", "", "eval"),
        ("sft_data", "", "sft"),
        ("tokenizer", "", "tokenizer.model"),
        ("init_from", "checkpoint", "model.safetensors"),
        ("init_from", "checkpoint", "config.json"),
        ("init_from", "checkpoint", "tokenizer.model"),
    ):
        moved = (tmp_path / (folder or file)).rename(tmp_path / "moved")
        changed = {name: place("pairs", "moved") if name == "data" else place("moved")}
        assert begin(**changed) == "", "by another name"
        path = moved / file if folder else moved
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        assert begin(**changed) == refused.format(name)
        path.write_bytes(content)
        moved.rename(tmp_path / (folder or file))


# --------------------------------------------------------- what is kept for another run, or a rank


def run_of_a_reference(out: Path, **changed) -> SimpleNamespace:
    """As much of a run as what keeps its reference looks at; `said` is what it says."""
    settings, said = SimpleNamespace(micro_batch_tokens=8, batch_size=4), []
    (out / "encoded").mkdir(parents=True, exist_ok=True)
    run = {"rank": 0, "world": 1, "out": out, "settings": settings, "bf16": False, "said": said}
    run |= {"device": torch.device("cpu"), "alone": lambda work, *given: work(*given)}
    return SimpleNamespace(**(run | {"say": said.append} | changed))


def test_a_reference_is_found_again_by_whatever_it_depends_on(tmp_path, monkeypatch):
    """Computed anew if anything of the tokens, the weight files or the numerics is other; found by
    any other run, and by one that could not write beside the checkpoint where that left it."""
    place, calls = tmp_path / "checkpoint", []
    place.mkdir()
    for name in ("model.safetensors", "config.json"):
        (place / name).write_text("one")
    ids = [[[5, 6], [7, 8, ~9], [10]], [[5], [11], [12, 13]]]
    config, numbers = llm.ModelConfig.new(20, 8, 1, 1), torch.tensor([-1.5, -2, -3, -4])

    def compute(examples, factor=2):
        if factor == 2:  # else it is the check
            calls.append(examples.tolist())
        return numbers.double()

    def look(trees=ids, config=config, checkpoint=place, out=tmp_path / "run", **changed) -> bool:
        """Whether it is found; either way it is the same."""
        calls.clear()
        now = run_of_a_reference(out, **changed)
        model = SimpleNamespace(config=config)
        values = kept.kept(compute, data.to_dataset(trees), model, checkpoint, now)
        assert values.dtype == torch.float64 and torch.equal(values, numbers.double())
        first, check = now.said
        assert check == "step 0: the largest log-ratio is 0.0e+00 nats (tolerance 0.01)" or now.bf16
        if calls:
            assert first == "reference: 4 log-probs computed"
        else:
            assert re.fullmatch(r"reference: 4 log-probs found in \S+/reference-\S+\.npy", first)
        return not calls

    assert not look() and look() and look(out=tmp_path / "other")
    for trees in (
        [[[5, 6], [7, 8, ~9], [10]], [[5], [11], [12, 14]]],  # another token
        [[[5, 6], [7, 8, 9], [10]], [[5], [11], [12, 13]]],  # one that is learnt
        [[[5, 6], [7, 8], [~9, 10]], [[5], [11], [12, 13]]],  # another border
        [[[5, 6], [7, 8, ~9], [10], [5]], [[11], [12, 13]]],  # another tree
    ):
        assert not look(trees) and look(trees), trees
    other = dataclasses.replace(config, rope_theta=5.0)
    assert not look(config=other) and not look(bf16=True) and not look(device=torch.device("meta"))
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert not look()
    monkeypatch.undo()
    assert look()
    (place / "config.json").write_text("two")
    assert look(), "the weights decide"
    assert look(config=dataclasses.replace(config, eos_token_id=[7])), "ends change no log-prob"
    (place / "model.safetensors").write_text("seven")
    assert not look() and look()
    assert not look(checkpoint="") and not look(checkpoint=""), "a new model is nowhere"
    assert not list((tmp_path / "run" / "encoded").iterdir())
    for file in place.glob("reference-*"):
        file.unlink()
    monkeypatch.setattr(kept.os, "access", lambda path, mode: False)
    assert not look() and look() and not look(out=tmp_path / "fourth")


@pytest.fixture
def reference(tmp_path, monkeypatch) -> Callable:
    """Keeps the reference of some pairs, in parts; what each part gives depends on all of it."""
    rng, place = np.random.default_rng(3), tmp_path / "checkpoint"
    place.mkdir()
    (place / "model.safetensors").write_text("one")
    trees = [[[1] * n, [2] * m, [3, 4]] for n, m in rng.integers(1, 9, (20, 2))]
    dataset, model = data.to_dataset(trees), SimpleNamespace(config=llm.ModelConfig.new(9, 8, 1, 1))
    monkeypatch.setattr(kept, "MICRO_BATCHES", 1)
    whole = torch.zeros(40, dtype=torch.float64)

    def find(stop_at=None, error=KeyboardInterrupt, look=lambda: None, at=place, **changed):
        """The parts that were computed, and all values; None if it stopped at part `stop_at`."""
        parts, run = [], run_of_a_reference(tmp_path / "run", **changed)

        def compute(examples, factor=2):
            if factor == 1:  # the check
                return whole * (torch.arange(40) < 8)
            look()
            if len(parts) == stop_at:
                raise error("stopped")
            parts.append(examples.tolist())
            values = torch.zeros(40, dtype=torch.float64)
            for e in examples:
                values[2 * e : 2 * e + 2] = -math.pi * (e + 1) / len(examples)
            return values

        if not whole.any():  # once, by all parts
            for examples, _ in kept.parts_of(dataset, 16):
                whole.add_(compute(examples))
            parts.clear()
        values = None
        with pytest.raises(error) if stop_at is not None else contextlib.nullcontext():
            values = kept.kept(compute, dataset, model, at, run)
            assert torch.equal(values, whole)
        return SimpleNamespace(parts=parts, values=values, said=run.said)

    def file() -> Path:
        [path] = place.glob("reference-*")
        return path

    find.place, find.file = place, file
    return find


def test_a_reference_pass_that_was_interrupted_is_gone_on_with(reference):
    """Wherever it stops, and by whatever: the next computes only the rest, in the same parts, and
    all is the same to the last bit; once more it has nothing to do."""
    whole = reference().parts
    assert sum(whole, []) == list(range(20)) and len(whole) > 5
    saved = reference.file().read_bytes()
    for stop_at in range(len(whole)):
        for error in (KeyboardInterrupt, Stopped, data.DataError, MemoryError):
            reference.file().unlink()
            before = reference(stop_at, error).parts
            assert before == whole[:stop_at]
            assert len([*reference.place.glob("reference-*")]) == (stop_at > 0)
            again = reference()
            assert again.parts == whole[stop_at:]
            done = 2 * len(sum(before, []))
            found = [f"reference: {done} log-probs found in {reference.file()}"] * (done > 0)
            assert again.said[:-1] == [*found, f"reference: {40 - done} log-probs computed"]
            assert reference.file().read_bytes() == saved
            last = reference()
            assert not last.parts and "reference: 40 log-probs found" in last.said[0]
    reference.file().unlink()
    for stop_at in (2, 1, 0, 1):  # again and again
        reference(stop_at)
    assert reference().parts == whole[4:] and reference.file().read_bytes() == saved


def test_a_run_stopped_in_its_reference_pass_goes_on_with_it(world, tmp_path, monkeypatch):
    """A signal, an exit, the same command with --resume: what is trained is the same to the bit."""
    monkeypatch.setattr(kept, "MICRO_BATCHES", 1)
    logps, calls = dpo.reference_logps, []

    def signalled(*given):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return logps(*given)

    whole = Run(world, BASE, tmp_path / "whole", tmp_path / "cwd")
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(dpo, "reference_logps", signalled)
        Run(world, BASE, out, tmp_path / "cwd")
    assert stopped.value.code == 128 + signal.SIGTERM and len(calls) == 2
    after = Run(world, BASE | {"resume": "true"}, out, tmp_path / "cwd")
    counts = [re.findall(r"reference: (\d+) log-probs (\w+)", line) for line in after.printed]
    (found, how), (computed, why), *others = sum(counts, [])
    assert (how, why, others) == ("found", "computed", [("18", "computed")])
    assert 0 < int(found) < 20 and int(found) + int(computed) == 20
    assert not after.steps["sft"] and same(after.start, whole.facets["sft weights"])
    for name, facet in whole.facets.items():
        assert not name.startswith("dpo ") or same(facet, after.facets[name]), name


def test_a_reference_pass_that_lasts_is_written_each_minute(reference, monkeypatch):
    """As nothing is written when it is killed; but not after every part, and by one rank only."""
    whole, now, finite, parts = reference().parts, [0.0], [], []
    monkeypatch.setattr(kept, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def look():
        """How many values are on the disk as a part begins, each of which takes 25 seconds."""
        files = [*reference.place.glob("reference-*")]
        finite.append(sum(int(np.isfinite(np.load(file)).sum()) for file in files))
        now[0] += 25

    reference.file().unlink()
    parts = reference(look=look).parts
    done = [0, *np.cumsum([2 * len(part) for part in parts]).tolist()]
    assert finite == [done[n // 3 * 3] for n in range(len(parts))] and parts == whole
    reference.file().unlink()
    finite.clear()
    reference(len(whole) - 1, look=look, rank=1)
    assert not any(finite) and not [*reference.place.iterdir()][1:]


def test_a_reference_is_written_whole_or_not_at_all(reference, monkeypatch):
    """What cannot be written does not hide why a pass stopped; a file is replaced, not changed."""
    reference()
    saved, written = reference.file().read_bytes(), []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda path, _: written.append(path) or 1 / 0)
        reference.file().unlink()
        with pytest.raises(ZeroDivisionError):
            reference()
    assert written and not [*reference.place.glob("reference-*")]

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        reference(2, Stopped)
    assert not [*reference.place.glob("reference-*")]
    reference()
    assert reference.file().read_bytes() == saved


def test_a_reference_that_was_damaged_is_computed_anew(reference):
    """A byte that is other, a file that ends early, one of another shape or type, one without a
    digest: all is computed again. What is not finite is not known yet."""
    whole = reference().parts
    path = reference.file()
    saved = path.read_bytes()
    for n in {0, 9, 127, 128, 200, len(saved) - 33, len(saved) - 32, len(saved) - 1}:
        path.write_bytes(saved[:n] + bytes([saved[n] ^ 1]) + saved[n + 1 :])
        assert reference().parts == whole and path.read_bytes() == saved, n
    values = np.load(path)
    for content in (b"", saved[:100], saved[:-1], saved[:-32], saved + b"\0"):
        path.write_bytes(content)
        assert reference().parts == whole and path.read_bytes() == saved
    for other in (values[:-1], values[None], values.astype(np.float32), values.astype(object)):
        with contextlib.suppress(ValueError):  # as for objects, which would be pickled
            kept.write(path, other)
        assert reference().parts == whole or other.dtype == object
        assert path.read_bytes() == saved
    for bad in (math.nan, math.inf, -math.inf):
        values[2 * whole[3][0]] = bad
        kept.write(path, values)
        found = reference()
        assert found.parts == [whole[3]] and path.read_bytes() == saved
        assert found.said[0] == f"reference: 39 log-probs found in {path}"
        assert found.said[1] == f"reference: {2 * len(whole[3])} log-probs computed"


def test_log_probs_that_are_not_finite_are_refused_and_not_taken(tmp_path):
    place, tree = tmp_path / "checkpoint", [[5, 6], [7, 8], [10]]
    place.mkdir()
    (place / "model.safetensors").write_text("one")
    model, dataset = (
        SimpleNamespace(config=llm.ModelConfig.new(9, 8, 1, 1), named_parameters=dict),
        data.to_dataset([tree]),
    )
    for checkpoint, named in ((place, str(place)), ("", "the new model")):
        for bad in (math.nan, math.inf, -math.inf):
            run = run_of_a_reference(tmp_path / "run")
            compute = lambda *_, bad=bad: torch.tensor([-1.0, bad], dtype=torch.float64)
            with pytest.raises(data.DataError) as error:
                kept.kept(compute, dataset, model, checkpoint, run)
            assert str(error.value) == f"{named}: log-probs by these weights are not finite"
    good = lambda *_: torch.tensor([-1.0, -2.0], dtype=torch.float64)
    run = run_of_a_reference(tmp_path / "run")
    assert kept.kept(good, dataset, model, place, run).tolist() == [-1, -2]
    assert "reference: 2 log-probs computed" in run.said


def test_the_parts_of_a_reference_are_always_the_same():
    """All examples, in their order, of about so many rows each; which responses are theirs."""
    rng = np.random.default_rng(5)
    for trial in range(200):
        sizes = rng.integers(1, rng.choice([4, 40]), (rng.integers(1, 30), 3)).tolist()
        trees = [[[1] * n, *[[2] * m] * rng.integers(1, 4)] for n, m, _ in sizes]
        dataset, rows = data.to_dataset(trees), int(rng.integers(1, 120))
        parts = [(e.tolist(), responses) for e, responses in kept.parts_of(dataset, rows)]
        again = [(e.tolist(), responses) for e, responses in kept.parts_of(dataset, rows)]
        assert parts == again
        assert sum((e for e, _ in parts), []) == list(range(len(trees)))
        total, longest, first = int(dataset.lengths.sum()), int(dataset.lengths.max()), 0
        for examples, responses in parts:
            last = first + sum(len(trees[e]) - 1 for e in examples)
            assert responses == slice(first, last) and last > first
            assert dataset.lengths[examples].sum() < rows + longest
            first = last
        assert first == dataset.responses() and len(parts) <= total // rows + 1, trial


def test_data_is_encoded_once_by_one_rank_and_read_by_all(tmp_path, monkeypatch, tokenizer):
    """By the first rank, anew in each run; a resumed one takes what is there, if it is whole."""
    example = lambda n: data.Example(f"film {n}?", (f" {n} good", f" {n} bad"), "x", 0.5, 0.75, n)
    examples, calls, waits = [example(n) for n in range(9)], [], []
    real = data.encode
    expected, counts = real(examples, tokenizer, 11, 5)
    monkeypatch.setattr(data, "encode", lambda *given: calls.append(1) or real(*given))

    def encode(some, rank=0, resume=False) -> int:
        """How often it is encoded; what comes back is the same all the same."""
        calls.clear()
        alone = lambda work, *given: waits.append(1) or (work(*given) if rank == 0 else None)
        settings = SimpleNamespace(resume=resume, rendered=False)
        about = {"digests": {"data": "0a"}}
        run = SimpleNamespace(out=tmp_path, settings=settings, about=about, alone=alone)
        run.watch = lambda items, *_: items
        dataset, found = encoded.encode_once(run, "eval pairs", some, tokenizer, 11, 5)
        assert found == counts and counts["prompts cut"] > 0
        for field in dataclasses.fields(data.Dataset):
            ours, theirs = getattr(dataset, field.name), getattr(expected, field.name)
            assert ours is theirs is None or ours.dtype == theirs.dtype
            floats = field.name == "facts"
            assert ours is theirs is None or np.array_equal(ours, theirs, equal_nan=floats)
        return len(calls)

    assert encode(examples) == 1 and encode(iter(examples)) == 1
    assert encode([], rank=1) == 0 and encode([], resume=True) == 0 and len(waits) == 4
    place = tmp_path / "encoded" / "eval_pairs"
    np.save(place / "tokens.npy", expected.tokens[:3])
    (place / "made_of.json").unlink()
    assert encode(examples, resume=True) == 1, "it was killed while it encoded"
    assert encode([], resume=True) == 0
    with pytest.raises(AttributeError):  # as if it were killed again
        encode([None])
    assert not (place / "made_of.json").exists()


def test_a_run_that_begins_again_takes_what_it_has_encoded(compared, world, tmp_path, monkeypatch):
    """With --resume and without a state it is the same run from its beginning, of data that are
    encoded already; of other data, or other limits, nothing that was there is taken."""
    before, out, encode, calls = compared({}), tmp_path / "out", data.encode, []
    monkeypatch.setattr(data, "encode", lambda *given: calls.append(1) or encode(*given))
    shutil.copytree(before.out, out)
    for change, count in (({}, 0), ({"max_length": 15, "max_prompt_length": 13}, 4), ({}, 4),
                          ({"data": "@pairs2"}, 4), ({"data": "@pairs2"}, 0)):  # fmt: skip
        calls.clear()
        shutil.rmtree(out / "resume")
        after = Run(world, BASE | change | {"resume": "true"}, out, tmp_path / "cwd")
        assert (
            after.printed[0] == f"{out} has no saved state yet: the run starts from the beginning"
        )
        assert len(calls) == count, "of both stages, each with what is held out"
        if not change:
            rest = before.facets.keys() - {"files", "printed"}
            assert not [name for name in rest if not same(before.facets[name], after.facets[name])]
        check_examples(after, "sft")


def test_thousands_are_encoded_in_blocks_and_in_their_order(tokenizer):
    examples = [data.Example(f"{n}", ("a", f"{n}")) for n in range(2 * 4096 + 3)]
    ahead = list(encoded.encode_ahead(examples, tokenizer))
    assert len(ahead) == len(examples)
    for n in (0, 1, 4095, 4096, 8191, 8192, len(examples) - 1):
        assert [ahead[n].prompt, *ahead[n].responses] == data.token_ids(examples[n], tokenizer)


def test_orders_of_seeds_and_epochs_are_all_different():
    """Each a permutation; no epoch of one seed is an epoch of another."""
    orders = [tuple(data.order_of(epoch, 40, seed)) for epoch in range(4) for seed in range(4)]
    assert len(set(orders)) == 16 and all(sorted(order) == list(range(40)) for order in orders)
    assert orders == [
        tuple(data.order_of(epoch, 40, seed)) for epoch in range(4) for seed in range(4)
    ]
    assert data.order_of(3, 40, None).tolist() == list(range(40))
