"""Adapters as they are passed around: the layout of peft, written and read.

A directory with adapter_config.json, which says what the adapters belong to, and their factors in
adapter_model.safetensors. Read, they are merged into that base: W + scale·B·A.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from extra import lora
from extra.checkpoints import places_of, read_json
from extra.reading import short
from extra.weights import read_file, read_files
from model import CheckpointError, write_safetensors

PROJECTIONS = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
FACTOR = re.compile(  # layers.0.self_attn.q_proj and A or B
    r"base_model\.model\.model\.(layers\.\d+\.(?:self_attn|mlp)\.[a-z]+_proj)\.lora_(A|B)\.weight"
)
# What an adapter_config.json may say beside r, lora_alpha and use_rslora without meaning other
# sums; of anything else only what switches it off.
HARMLESS = {
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "inference_mode", "task_type"),
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "eva_config"),  # parts of what is switched elsewhere
}
IMPLEMENTED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base
}
OFF = (None, False, [], {}, "")


def finish(model, directory: Path, run):
    """What becomes of adapters when their model is saved. (all ranks)"""
    save(model, directory, run)  # first: once they are merged they begin anew
    lora.merge(model, run.settings.seed)


def save(model, directory: Path, run):
    """Write adapters that are not merged yet to <out_dir>/adapter, if --save_adapter asks for it.

    Only with the run's own model, not with sft/, which DPO's are adapters of. (all ranks)
    """
    s = run.settings
    if not s.save_adapter or directory != run.out:
        return
    factors = {"lora.0": "lora_A", "lora.1": "lora_B"}
    named, out = {}, directory / "adapter"
    for name, parameter in model.named_parameters():
        stem, _, factor = name.removesuffix(".weight").rpartition(".lora.")
        if stem:
            named[f"base_model.model.model.{stem}.{factors[f'lora.{factor}']}.weight"] = parameter
    if run.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "adapter_config.json").unlink(missing_ok=True)  # nothing opens without it
    write_safetensors(out / "adapter_model.safetensors", named, run.rank == 0)
    if run.rank == 0:
        base = run.out / "sft" if s.sft_epochs and s.epochs else Path(s.init_from)
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base.resolve()),
            "r": s.lora_rank,
            "lora_alpha": 2 * s.lora_rank,  # as extra/lora.py scales them
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": list(PROJECTIONS),
            "inference_mode": True,
        }
        text = json.dumps(settings, indent=2) + "\n"
        (out / "adapter_config.json").write_text(text, encoding="utf-8")


def read_settings(directory: Path) -> dict:
    """adapter_config.json. Raises CheckpointError naming what is wrong or not implemented."""
    path = directory / "adapter_config.json"
    given = read_json(path)
    for key, allowed in IMPLEMENTED.items():
        if given.get(key, allowed[0]) not in allowed:
            raise CheckpointError(f"{path}: {key} {short(given[key])} is not implemented here")
    for key, value in given.items():
        if key not in HARMLESS and key not in IMPLEMENTED and value not in OFF:
            raise CheckpointError(f"{path}: {key} {short(value)} is not implemented here")
    targets = given.get("target_modules")
    for name in targets if isinstance(targets, list) else ():  # else a pattern: the weights tell
        if str(name).rpartition(".")[2] not in PROJECTIONS:
            what = f"target_modules: {short(name)} is no projection of a block"
            raise CheckpointError(f"{path}: {what}")
    for key in ("r", "lora_alpha"):
        value = given.get(key)
        kinds = (int,) if key == "r" else (int, float)
        if type(value) not in kinds or not 0 < value < 1e9:
            raise CheckpointError(f"{path}: {key} {short(value)} is not a positive number")
    if given.get("use_rslora") not in (True, False, None):
        value = short(given["use_rslora"])
        raise CheckpointError(f"{path}: use_rslora {value} is neither true nor false")
    return given


def read_factors(directory: Path) -> dict[tuple[str, str], Tensor]:
    """The adapters' A (r, inputs) and B (outputs, r), by the projection's name and "A" or "B".

    Raises CheckpointError naming the file, and what is no adapter of a projection.
    """
    path = directory / "adapter_model.safetensors"
    if not path.exists() and (directory / "adapter_model.bin").exists():
        path = directory / "adapter_model.bin"
    factors = {}
    for name, weight in read_file(path).items():
        match = FACTOR.fullmatch(name)
        if not match:
            raise CheckpointError(f"{path}: {name} is no adapter of a projection of a block")
        factors[match.groups()] = weight
    return factors


def read_merged(directory: Path) -> dict[str, Tensor]:
    """The base's weights by their names there, mapped, but with the adapters added in float32:
    what they change is in memory as a whole, on every rank. Raises CheckpointError."""
    given, factors = read_settings(directory), read_factors(directory)
    rank, path = given["r"], directory / "adapter_config.json"
    scale = given["lora_alpha"] / (rank**0.5 if given.get("use_rslora") else rank)
    weights = {n.removeprefix("model."): w for n, w in read_files(places_of(directory)[1]).items()}
    for stem in sorted({stem for stem, _ in factors}):
        a, b, weight = (
            factors.get((stem, "A")),
            factors.get((stem, "B")),
            weights.get(f"{stem}.weight"),
        )
        shapes = [None if x is None else tuple(x.shape) for x in (a, b, weight)]
        fits = None not in shapes and all(len(shape) == 2 for shape in shapes)
        if not fits or shapes != [(rank, weight.shape[1]), (len(weight), rank), shapes[2]]:
            found = "A {}, B {} and base {}".format(*shapes)
            raise CheckpointError(f"{path}: {stem} does not fit r {rank} and the base: {found}")
        weights[f"{stem}.weight"] = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
    return weights
