"""Samples during training: nothing says more about a run than what it writes.

`--sample_every=N` continues three held-out prompts before the first step of each stage, every N
steps, and after the last; always by the same random numbers, so that what differs is the model.
They are printed, appended to samples.jsonl in the run's directory, and sent to Weights & Biases.
"""

import contextlib
import itertools
import json
import math
from pathlib import Path

import torch

import sample
from extra.checkpoints import encoded_sets, learnt_ends
from extra.encoded import read
from extra.terminal import PLAIN
from model import write_whole

PROMPTS, AMONG = 3, 1000  # so many different ones, of the first examples
NEW_TOKENS = 64  # of a sample, at most
SHOWN = 300  # characters of a prompt's end, and of a sample's beginning, in the terminal
STAGES = ("sft", "dpo", "done")


def look(run, stage: str, step: int, steps: int, model):
    """Sample, if it is due: the run's `look`. (all ranks)"""
    every = run.settings.sample_every
    if step % every and step != steps:
        return
    prompts = find_prompts(run)
    new = draw(run, model, prompts)
    if run.rank > 0:
        return
    stops = stops_of(run, model)
    text = lambda ids, inside: run.tokenizer.decode(ids, inside) if run.tokenizer else ids
    rows = []
    for prompt, ids in zip(prompts, new):
        ids = until(ids, stops)
        row = {"stage": stage, "step": step}
        rows.append(row | {"prompt": text(prompt, False), "response": text(ids, True)})
    with open(run.out / "samples.jsonl", "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        prompt, response = (printable(row[name]) for name in ("prompt", "response"))
        run.say(f"sample of {stage} {step}: {prompt[-SHOWN:]}\n  -> {response[:SHOWN]}")
    if run.wandb:
        import wandb

        cells = [[str(row["prompt"]), str(row["response"])] for row in rows]
        table = wandb.Table(columns=["prompt", "response"], data=cells)
        run.wandb.log({f"{stage}/samples": table, f"{stage}/step": step})


def find_prompts(run) -> list[list[int]]:
    """The first different prompts of the held-out data, or else of what is learnt, as the run has
    encoded them: the same in both stages."""
    s = run.settings
    name = ("eval_pairs" if s.eval_data else "pairs") if s.epochs else "sft"
    if s.eval_data and not s.epochs:
        name = "sft_eval"
    dataset, found = read(run.out / "encoded" / name), {}
    for e in itertools.takewhile(lambda e: len(found) < PROMPTS, range(min(len(dataset), AMONG))):
        found[tuple(dataset.tokens[dataset[e][0]].tolist())] = None
    return [*map(list, found)]


def draw(run, model, prompts: list[list[int]]) -> list[list[int]]:
    """As many new ids of each on all ranks, whatever ends an answer: under FSDP each token gathers
    the weights, and every rank must be there. (all ranks)"""
    c = model.config
    room = min(c.max_position_embeddings, c.sliding_window or math.inf) - max(map(len, prompts))
    eager = contextlib.nullcontext()
    if run.settings.compile:  # what is compiled for training is left as it is
        eager = torch.compiler.set_stance("force_eager")
    with run.autocast, eager:
        size = max(1, min(NEW_TOKENS, room))
        return sample.generate(model, prompts, size, (), seed=run.settings.seed)


def stops_of(run, model) -> set[int]:
    """The ids that end an answer: those of the model and the tokenizer, and what the data that is
    learnt ends in, as a chat template has it."""
    eos, tokenizer = model.config.eos_token_id, run.tokenizer
    stops = {*eos} if isinstance(eos, list) else {eos}
    if tokenizer:
        stops |= {tokenizer.eos_id, *tokenizer.stops, *learnt_ends(encoded_sets(run), tokenizer)}
    return stops


def until(ids: list[int], stops: set[int]) -> list[int]:
    """Up to the first that ends it."""
    end = next((n for n, i in enumerate(ids) if i in stops), len(ids))
    return ids[: end + 1]


def printable(content: str | list[int]) -> str:
    """In one line, and nothing that would move the cursor."""
    return " ".join(str(content).translate(PLAIN).split())


def rewind(path: Path, point: dict):
    """Leave of the file what was sampled before a state: the rest will be again."""
    if not point:
        return path.unlink(missing_ok=True)
    if path.is_file():
        rows = [row for row in path.read_bytes().splitlines(keepends=True) if is_before(row, point)]
        write_whole(path, b"".join(rows))


def is_before(line: bytes, point: dict) -> bool:
    when = lambda row: (STAGES.index(row["stage"]), row["step"])
    with contextlib.suppress(ValueError, LookupError, TypeError):  # a line may be torn
        return when(json.loads(line)) < when(point)
    return False
