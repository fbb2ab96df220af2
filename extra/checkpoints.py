"""Llama checkpoints as other programs write them: their config.json, several files, torch's format.

`model.py` reads what it wrote. Here is what else is distributed: configurations of transformers 4
and 5 with keys that are missing, renamed or not implemented, weights in shards with an index, and
pytorch_model.bin.
"""

import json
import shutil
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from torch import Tensor

from extra.chat import PLAIN_TEMPLATE
from model import CheckpointError, ModelConfig, read_safetensors

TOKENIZER_FILES = {  # that may lie beside the weights, and go where they go
    *("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "tokenizer.json"),
    *("chat_template.jinja", "generation_config.json"),
}
# What a config.json may say beyond `ModelConfig`; anything else is another model.
IMPLEMENTED = {
    "model_type": ("llama", "mistral"),
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rope_type": ("default", "llama3", None),
    "layer_types": (None,),
    "quantization_config": (None,),
}
REQUIRED = [field.name for field in fields(ModelConfig) if field.default is MISSING]
WHOLE = {*REQUIRED, "max_position_embeddings", "sliding_window"}
# Of Llama 3's scaling of the rotary frequencies, all of which must be given.
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_json(path: Path) -> dict:
    """A JSON object. Raises CheckpointError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "not found; a checkpoint directory has one" if not path.exists() else error.strerror
        raise CheckpointError(f"{path}: {hint}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def translate(path: Path) -> ModelConfig:
    """A config.json of any program as ours; what early checkpoints lack is transformers' default.

    Raises CheckpointError naming what is missing, wrong or not implemented.
    """
    given = read_json(path)
    # Transformers 5 puts into rope_parameters what was in rope_scaling and beside it.
    ropes = [given.pop(key, None) or {} for key in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(rope, dict) for rope in ropes):
        raise CheckpointError(f"{path}: rope_scaling and rope_parameters must be objects")
    rope = ropes[0] | ropes[1]
    given |= {"rope_type": rope.get("type")} | rope  # the kind's name now, and before
    for key, allowed in IMPLEMENTED.items():
        if given.get(key) not in allowed:
            raise CheckpointError(f"{path}: {key} {given.get(key)!r} is not implemented here")
    if given["model_type"] == "mistral":
        given.setdefault("sliding_window", 4096)  # as in transformers; none is null

    given["eos_token_id"] = ends(path, given.get("eos_token_id"))
    shape = {f.name: given[f.name] for f in fields(ModelConfig) if given.get(f.name) is not None}
    for name in shape.keys() & WHOLE:
        if type(shape[name]) is not int or shape[name] < 1:
            raise CheckpointError(f"{path}: {name} {shape[name]!r} is not a positive whole number")
    shape.setdefault("num_key_value_heads", shape.get("num_attention_heads"))
    shape.setdefault("head_dim", shape.get("hidden_size", 0) // shape.get("num_attention_heads", 1))
    positive = {name: shape[name] for name in ("rms_norm_eps", "rope_theta") if name in shape}
    needed = {name: shape.get(name) for name in REQUIRED}
    if given["rope_type"] == "llama3":
        scaling = {key: given.get(key) for key in SCALING}
        shape["rope_scaling"] = {"rope_type": "llama3"} | scaling
        positive |= scaling
        needed |= scaling
    if missing := [key for key, value in needed.items() if not value]:
        raise CheckpointError(f"{path}: {missing[0]} is missing")
    for key, value in positive.items():
        if type(value) not in (int, float) or not value > 0:
            raise CheckpointError(f"{path}: {key} {value!r} is not a positive number")
    if shape["num_attention_heads"] % shape["num_key_value_heads"] or shape["head_dim"] % 2:
        raise CheckpointError(f"{path}: heads must divide by key-value heads, head_dim by two")
    return ModelConfig(**shape)


def ends(path: Path, own: int | list | None) -> int | list | None:
    """The ids that end a text: those of config.json, and what generation_config.json adds to them
    (Llama 3's has three). Raises CheckpointError."""
    beside, found = path.parent / "generation_config.json", {}
    more = read_json(beside).get("eos_token_id") if beside.is_file() else None
    for file, value in ((path, own), (beside, more)):
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            raise CheckpointError(f"{file}: eos_token_id {value!r} is neither an id nor several")
        found |= dict.fromkeys(ids)
    return own if len(found) < 2 and own is not None else [*found] or None


def weight_files(directory: Path) -> list[Path]:
    """Those with weights: safetensors before .bin, those that an index names before the only one.

    Raises CheckpointError if there are none.
    """
    formats = "model.safetensors", "pytorch_model.bin"
    for name in formats:
        index = directory / f"{name}.index.json"
        if index.is_file():
            where = read_json(index).get("weight_map") or {}
            if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
                raise CheckpointError(f"{index}: weight_map must name a file for each weight")
            if where:
                return [directory / file for file in sorted(set(where.values()))]
        if (directory / name).is_file():
            return [directory / name]
    raise CheckpointError(f"{directory}: no {' or '.join(formats)} in it")


def read_bin(path: Path) -> dict[str, Tensor]:
    """A file of torch.save, mapped; code that it may hold is not run."""
    return dict(torch.load(path, "cpu", weights_only=True, mmap=True))


def read_files(directory: Path) -> dict[str, Tensor]:
    """The weights of all files by the names there, in their precision; mapped, not read.

    Raises CheckpointError naming a file that is missing or cannot be read.
    """
    weights = {}
    for file in weight_files(directory):
        try:
            found = (read_safetensors if file.suffix == ".safetensors" else read_bin)(file)
            if not all(isinstance(weight, Tensor) for weight in found.values()):
                raise ValueError("not all of it is weights")
            if not found:
                raise ValueError("no weights in it")
        except FileNotFoundError:
            raise CheckpointError(f"{file}: cannot be read (there is no such file)") from None
        except Exception as error:  # each format has its own exceptions
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{file}: cannot be read ({reason})") from None
        weights |= found
    return weights


def complete(directory: Path, source: str | Path = "", tokenizer: str | Path = ""):
    """Put beside saved weights what other programs want there.

    source: the checkpoint they come from, or nothing: all else that its config.json says, and its
    tokenizer's files. tokenizer: where that of a new model was, if it was not trained here.
    """
    if source:
        saved, given = read_json(directory / "config.json"), read_json(Path(source) / "config.json")
        given.pop("rope_parameters", None)  # rope_theta and rope_scaling are read everywhere
        own = ("model_type", "architectures", "eos_token_id")
        kind = {key: given[key] for key in own if key in given}
        new = directory / "config.new"
        new.write_text(json.dumps(given | saved | kind, indent=2) + "\n", encoding="utf-8")
        new.replace(directory / "config.json")
    beside = Path(source or tokenizer)
    beside = beside if beside.is_dir() else beside.parent
    for file in beside.iterdir() if source or tokenizer else ():
        if file.name in TOKENIZER_FILES and file.parent != directory:
            shutil.copy(file, directory)
    if not (directory / "tokenizer_config.json").exists() and not source:
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
        config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config["chat_template"] = PLAIN_TEMPLATE
        text = json.dumps(config, indent=2) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
