"""The model card: `README.md` in the directory of a run, as the Hugging Face hub has them.

What was trained, on what, how it went, how to load it and how to go on. It is written with the
checkpoint, and is the same however often the run was stopped. One that somebody else has written is
left as it is. What the command line said stands in it as code, so that no name is Markdown or YAML.
"""

import contextlib
import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import torch

from extra.checkpoints import HUB
from model import Transformer, load_config, write_whole

OURS = "---\n# Written by train.py. Without this line it is yours, and train.py leaves it alone.\n"
# Of the settings: told in any case; of one stage alone; and told elsewhere, or without effect.
TOLD = {"loss", "beta", "learning_rate", "sft_learning_rate", "lr_schedule", "optimizer"}
TOLD |= {"batch_size", "epochs", "sft_epochs", "max_length", "max_prompt_length", "seed"}
OF_DPO, OF_SFT = {"loss", "beta", "learning_rate"}, {"sft_learning_rate"}
FILES = ("data", "eval_data", "sft_data", "tokenizer", "init_from")
ELSEWHERE = {*FILES, "out_dir", "resume", "options", "log_every", "eval_every", "sample_every"}
ELSEWHERE |= {"save_every", "wandb"}


def write(directory: Path, tokenizer, run):
    """Write the card of the checkpoint there, unless somebody else has written one. (rank 0)"""
    path = directory / "README.md"
    if os.path.lexists(path) and not is_ours(path):
        return run.say(f"{path} is not train.py's, and stays as it is")
    write_whole(path, card(directory, tokenizer, run).encode())


def is_ours(path: Path) -> bool:
    with contextlib.suppress(OSError):
        if path.is_file():
            return path.open("rb").read(len(OURS)) == OURS.encode()
    return False


def card(directory: Path, tokenizer, run) -> str:
    s, config = run.settings, load_config(directory)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in Transformer(config).parameters())
    products = "bfloat16" if run.bf16 else "float32"
    parts = [
        front_matter(s, tokenizer),
        f"# {code(directory.resolve().name)}",
        f"A `{config.model_type}` decoder of {size:,} parameters, in float32: {origin(s)}.",
        "## Settings",
        table(["setting", "value"], told_settings(s)),
        f"All are in `run.json`. {run.world} process(es) on {run.device.type}, matrix products in "
        f"{products}, torch {torch.__version__}, numpy {np.__version__}.",
        "## Data",
        table(["setting", "files", "SHA-256"], told_files(s, run.about["digests"])),
        "The SHA-256 is that of the files' own, in hexadecimal, one after the other.",
        "## Last metrics",
        *last_metrics(directory / "metrics.jsonl"),
        "## How to load it",
        loading(tokenizer, s),
        "## How to go on",
        going_on(),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(s, tokenizer) -> str:
    """YAML between its lines; strings are written as JSON's, which YAML's are, too."""
    lines = ["library_name: transformers"]
    if tokenizer:
        lines.append("pipeline_tag: text-generation")
    if base := hub_name(s.init_from):
        lines.append(f"base_model: {json.dumps(base)}")
    tags = ["sft"] * bool(s.sft_epochs) + [s.loss] * bool(s.epochs) + ["lora"] * bool(s.lora_rank)
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags))]
    return OURS + "\n".join(lines) + "\n---"


def hub_name(init_from: str) -> str:
    """What may be the base's name on the hub, which refuses a card with any other path there."""
    base = Path(init_from)
    of_a_run = (base / "run.json").is_file() or (base.parent / "run.json").is_file()
    return init_from if HUB.fullmatch(init_from) and not of_a_run else ""


def origin(s) -> str:
    """What it was made of, and how, in words."""
    words = [named(s.init_from) if s.init_from else "a new model"]
    if s.sft_epochs:
        words.append(f"{s.sft_epochs} epoch(s) of SFT")
    if s.epochs:
        words.append(f"{s.epochs} epoch(s) of the loss {code(s.loss)} with β = {s.beta:g}")
    if s.max_steps:
        words.append(f"at most {s.max_steps:,} steps of each")
    if s.lora_rank:
        words.append(f"by adapters of rank {s.lora_rank}, which are merged")
    return ", ".join(words)


def told_settings(s) -> list[list[str]]:
    """Rows of those that say what was done, and of all that are not the default."""
    silent = ELSEWHERE | (set() if s.epochs else OF_DPO) | (set() if s.sft_epochs else OF_SFT)
    found = {}
    for field in dataclasses.fields(s):
        value = getattr(s, field.name)
        if field.name not in silent and (field.name in TOLD or value != field.default):
            found[field.name] = value
    if s.epochs:
        found |= s.options
    return [[code(name), code(value)] for name, value in found.items()]


def told_files(s, digests: dict) -> list[list[str]]:
    rows = []
    for name in FILES:
        paths = [named(path) for path in getattr(s, name).split(",") if path]
        if paths:
            rows.append([code(name), ", ".join(paths), digests.get(name, "")])
    return rows


def last_metrics(path: Path) -> list[str]:
    """Of each stage what was logged last, but for times and memory."""
    last, steps, parts = {}, {}, []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        steps[row["stage"]] = row["step"]
        for name, value in row.items():
            kind, _, metric = name.partition("/")
            if kind in ("train", "eval"):
                found = last.setdefault(row["stage"], {}).setdefault(metric, {})
                found[kind] = f"{value:.6g}"
    for stage, metrics in last.items():
        rows = [[code(m), x.get("train", ""), x.get("eval", "")] for m, x in metrics.items()]
        parts.append(f"After {steps[stage]:,} steps of {stage}:")
        parts.append(table(["metric", "train", "eval"], rows))
    return parts


def loading(tokenizer, s) -> str:
    """Commands, DIR being wherever the directory is then."""
    asked = '--prompt "…"' if tokenizer else "--prompts prompts.jsonl"
    lines = ["DIR is this directory:", "```sh", f"python sample.py DIR {asked}", "```"]
    lines += ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines.append('model = AutoModelForCausalLM.from_pretrained("DIR")')
    if tokenizer:
        lines.append('tokenizer = AutoTokenizer.from_pretrained("DIR")')
    else:
        lines[-3] = "from transformers import AutoModelForCausalLM"
    lines.append("```")
    if s.epochs:
        reference = "`DIR/sft`" if s.sft_epochs else named(s.init_from)
        lines.append(f"The reference, for `--compare`, is {reference}.")
    if s.save_adapter:
        lines.append("The adapters alone, as peft reads them, are in `DIR/adapter`.")
    return "\n".join(lines)


def going_on() -> str:
    return """This model is then the reference of another run:
```sh
python train.py --init_from=DIR --data=more.jsonl --sft_epochs=0 --out_dir=out/next
```
A run that was stopped goes on by its own command with `--resume`."""


def named(path: str) -> str:
    """A file's or a checkpoint's name; where it lay is in run.json, and need not go further."""
    place = Path(os.path.abspath(path))
    own = f"{place.parent.name}/{place.name}" if place.name in ("sft", "adapter") else place.name
    return code(hub_name(path) or own)


def code(value) -> str:
    """As a span of code: in one line, between as many backticks as it takes."""
    text = str(value)
    text = text if text.isprintable() else ascii(text)
    marks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text or not text.strip() else ""
    return f"{marks}{space}{text}{space}{marks}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)
