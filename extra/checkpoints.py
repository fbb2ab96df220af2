"""Checkpoints as other programs write them: their config.json, and what lies beside.

`model.py` reads what it wrote. Here is what else is distributed: configurations of transformers 4
and 5 with keys that are missing, renamed or not implemented. Weights in shards or in torch's format
are in extra/weights.py, adapters, whose base is elsewhere, in extra/adapters.py.
"""

import json
import math
import re
import shutil
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import torch

import data
from extra.chat import CHATS, PLAIN_TEMPLATE, end_of_turn
from extra.reading import parse_json, read_bytes, short
from model import CheckpointError, ModelConfig

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is a tokenizer
TOKENIZER_FILES = {  # that may lie beside the weights, and go where they go
    *("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "merges.txt"),
    *("chat_template.jinja", "generation_config.json", *VOCABULARIES),
}
# The models that are implemented, and of each what transformers 5 takes where its config.json says
# nothing; what else is missing has ModelConfig's default. None: hidden_size // heads, or heads.
WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32} | WINDOW
DEFAULTS = {
    "llama": {},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": QWEN,
    "qwen3": QWEN | {"head_dim": 128},
}
# What a config.json may say beyond `ModelConfig`; anything else is another model.
IMPLEMENTED = {
    "model_type": tuple(DEFAULTS),
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "rope_type": ("default", "llama3", None),
    "layer_types": (None, []),
    "quantization_config": (None,),
}
REQUIRED = [field.name for field in fields(ModelConfig) if field.default is MISSING]
# Whole numbers, and up to what they are believed: far beyond any model that there is.
WHOLE = dict.fromkeys([*REQUIRED, "max_position_embeddings", "sliding_window"], 2**31)
WHOLE |= {"vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**22}
WHOLE |= {"num_hidden_layers": 2**10, "num_attention_heads": 2**14, "num_key_value_heads": 2**14}
WHOLE |= {"head_dim": 2**14}
# Of Llama 3's scaling of the rotary frequencies, all of which must be given.
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE = ("rope_type", "rope_theta", "partial_rotary_factor", *SCALING)  # of rope_parameters
HUB = re.compile(r"[\w.-]+/[\w.-]+")  # what may be a name on the Hugging Face hub


def read_json(path: Path) -> dict:
    """A JSON object. Raises CheckpointError naming the file."""
    try:
        content = parse_json(read_bytes(path))
    except OSError as error:
        hint = "not found; a checkpoint directory has one" if not path.exists() else error.strerror
        raise CheckpointError(f"{path}: {hint}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def is_adapter(directory: Path) -> bool:
    """Whether adapters in peft's layout are there, and no model that they belong to."""
    there = lambda name: (directory / name).is_file()
    return there("adapter_config.json") and not there("config.json")


def places_of(directory: str | Path) -> list[Path]:
    """The directory; of adapters also that of their base, which may be adapters again.

    Raises CheckpointError where a base is not there.
    """
    if "\0" in str(directory):
        raise CheckpointError(f"{short(str(directory))}: no path holds a NUL character")
    places = [Path(directory)]
    while is_adapter(places[-1]):
        path = places[-1] / "adapter_config.json"
        name = read_json(path).get("base_model_name_or_path")
        if not name or not isinstance(name, str):
            raise CheckpointError(f"{path}: base_model_name_or_path is missing")
        if len(name) > 1000 or "\0" in name:
            raise CheckpointError(f"{path}: base_model_name_or_path {short(name)} is no path")
        found = [place for place in (places[-1] / name, Path(name)) if place.is_dir()]
        if not found:
            mend = "write there where its base is"
            if HUB.fullmatch(name):
                mend = f"`hf download {name} --local-dir DIR`, then write DIR there"
            raise CheckpointError(
                f"{path}: base_model_name_or_path {short(name)} is not here: {mend}"
            )
        if found[0].resolve() in [place.resolve() for place in places]:
            raise CheckpointError(f"{path}: base_model_name_or_path {short(name)} leads back to it")
        places.append(found[0])
    return places


def base_of(directory: str | Path) -> Path:
    """Where the model is that adapters belong to; of an ordinary checkpoint its own directory."""
    return places_of(directory)[-1]


def with_tokenizer(directory: str | Path) -> Path:
    """Where a checkpoint's tokenizer is: of adapters with them, or else with their base."""
    places = places_of(directory)
    has_one = lambda place: any((place / name).is_file() for name in VOCABULARIES)
    return next(filter(has_one, places), places[-1])


def setting(directory: str | Path, name: str, default, mend: str = ""):
    """What a checkpoint was trained with, by its run.json; the default where there is none. Of
    adapters and the reference it is where the run's own checkpoint is. Raises DataError, which says
    the mend; without one the file may be another program's, or older."""
    places = [Path(directory)]
    if places[0].resolve().name in ("sft", "adapter"):
        places.append(places[0].resolve().parent)
    for place in places:
        path = place / "run.json"
        if path.is_file():
            try:
                settings = parse_json(path.read_bytes())["settings"]
                return type(default)(settings[name] if mend else settings.get(name, default))
            except (ValueError, LookupError, TypeError, AttributeError):
                if not mend:
                    return default
                raise data.DataError(f"{path}: no {name} can be read from it{mend}") from None
    return default


def find_tokenizer(directory: str | Path) -> data.Tokenizer | None:
    """A checkpoint's tokenizer, which reads texts as its run did; None if there is none."""
    place = with_tokenizer(directory)
    if not any((place / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    tokenizer = data.Tokenizer(place)
    tokenizer.rendered = setting(directory, "rendered", False)
    return tokenizer


def read_config(directory: Path) -> tuple[Path, dict]:
    """The config.json that counts, of adapters that of their base, and what it says.

    Raises CheckpointError, also for adapters that are not implemented.
    """
    if HUB.fullmatch(str(directory)) and not directory.exists():
        mend = f"a model of the Hugging Face hub comes by `hf download {directory} --local-dir DIR`"
        raise CheckpointError(f"{directory}: there is no such directory; {mend}")
    *adapters, base = places_of(directory)
    for place in adapters:
        from extra.adapters import read_settings

        read_settings(place)
    return base / "config.json", read_json(base / "config.json")


def translate(path: Path) -> ModelConfig:
    """A config.json of any program as ours; what early checkpoints lack is transformers' default.

    Raises CheckpointError naming what is missing, wrong or not implemented.
    """
    path, given = read_config(path.parent)
    kind = given.get("model_type")
    given = DEFAULTS.get(kind if isinstance(kind, str) else "", {}) | given
    # Transformers 5 puts into rope_parameters what was in rope_scaling and beside it.
    ropes = [given.pop(key, None) or {} for key in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(rope, dict) for rope in ropes):
        raise CheckpointError(f"{path}: rope_scaling and rope_parameters must be objects")
    rope = ropes[0] or ropes[1]
    if any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"{path}: rope_parameters of each kind of layer: not implemented")
    if "factor" in rope and not (rope.get("rope_type") or rope.get("type")):
        raise CheckpointError(f"{path}: rope_type is missing, though a factor is given")
    given["rope_type"] = rope.get("type")  # the kind's name before, and now
    given |= {key: rope[key] for key in ROPE if key in rope}
    if isinstance(layers := given.get("layer_types"), list):
        given["layer_types"] = [layer for layer in layers if layer != "full_attention"]
    for key, allowed in IMPLEMENTED.items():
        if given.get(key) not in allowed:
            raise CheckpointError(f"{path}: {key} {short(given.get(key))} is not implemented here")
    for key in ("tie_word_embeddings", "use_sliding_window"):
        if given.get(key) not in (True, False, None):
            raise CheckpointError(f"{path}: {key} {short(given[key])} is neither true nor false")

    given["eos_token_id"] = ends(path, given.get("eos_token_id"))
    first = given.get("bos_token_id")
    if first is not None and not (type(first) is int and 0 <= first < WHOLE["vocab_size"]):
        raise CheckpointError(f"{path}: bos_token_id {short(first)} is not an id")
    shape = {f.name: given[f.name] for f in fields(ModelConfig) if given.get(f.name) is not None}
    for name in sorted(shape.keys() & WHOLE):
        if type(shape[name]) is not int or shape[name] < 1:
            what = f"{name} {short(shape[name])} is not a positive whole number"
            raise CheckpointError(f"{path}: {what}")
        if shape[name] > WHOLE[name]:
            what = f"{name} {short(shape[name])} is larger than {WHOLE[name]:,}"
            raise CheckpointError(f"{path}: {what}, which no model is")
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
            raise CheckpointError(f"{path}: {key} {short(value)} is not a positive number")
        if not 1e-30 <= value <= 1e30:  # float32 has no room for what is made of it
            raise CheckpointError(f"{path}: {key} {short(value)} is not from 1e-30 to 1e30")
    if given["rope_type"] == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise CheckpointError(f"{path}: low_freq_factor must be less than high_freq_factor")
    if given.get("head_dim") is None and shape["hidden_size"] % shape["num_attention_heads"]:
        raise CheckpointError(f"{path}: hidden_size must divide by num_attention_heads")
    if shape["num_attention_heads"] % shape["num_key_value_heads"] or shape["head_dim"] % 2:
        raise CheckpointError(f"{path}: heads must divide by key-value heads, head_dim by two")
    if kind != "mistral":
        shape.pop("sliding_window", None)  # it means something only where it is switched on
    if kind in ("qwen2", "qwen3") and given["use_sliding_window"] and given["sliding_window"]:
        first = given["max_window_layers"]  # whose attention has a window; or layer_types says
        if not layers and not (type(first) is int and first >= shape["num_hidden_layers"]):
            raise CheckpointError(f"{path}: use_sliding_window True is not implemented here")
    return ModelConfig(**shape)


def ends(path: Path, own: int | list | None) -> int | list | None:
    """The ids that end a text: those of config.json, and what generation_config.json adds to them
    (Llama 3's has three). Raises CheckpointError."""
    beside, found = path.parent / "generation_config.json", {}
    more = read_json(beside).get("eos_token_id") if beside.exists() else None
    for file, value in ((path, own), (beside, more)):
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < WHOLE["vocab_size"] for i in ids):
            what = f"eos_token_id {short(value)} is neither an id nor several"
            raise CheckpointError(f"{file}: {what}")
        found |= dict.fromkeys(ids)
    return own if len(found) < 2 and own is not None else [*found] or None


def slowed_down(frequency: torch.Tensor, scaling: dict) -> torch.Tensor:
    """The frequencies of rotary, (D/2,) in radians per token, for contexts longer than the model's
    original one: as in Llama 3 slow dimensions are slowed down by `factor`."""
    turns = frequency / (2 * math.pi) * scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1 where there were many turns
    return frequency * (kept + (1 - kept) / scaling["factor"])


@torch.no_grad()
def first_not_finite(model) -> str:
    """The first parameter with a NaN or an infinity in it, by its name; "" if there is none. Of a
    sharded model it is what this rank has of it that counts."""
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.to_local() if hasattr(parameter, "placements") else parameter):
            return name
    return ""


def is_finite(x: torch.Tensor) -> bool:
    """In one pass without a copy, unless the sum overflows or there is something to find."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def complete(directory: Path, tokenizer, run):
    """Put beside saved weights what other programs want there, so that they encode, render and stop
    as we do."""
    s = run.settings
    bring(directory, s.init_from, s.tokenizer)
    if tokenizer:
        if not s.init_from and tokenizer.path.parent.resolve() != directory.resolve():
            for name in {*VOCABULARIES} - {f"tokenizer{tokenizer.path.suffix}"}:
                (directory / name).unlink(missing_ok=True)  # another run's, which might count first
        sets = encoded_sets(run)
        chats = any(CHATS in read_json(place / "counts.json") for place in sets)
        if tokenizer.rendered:  # texts of any template end as that ends them
            tokenizer.stops += learnt_ends(sets, tokenizer)
        complete_tokenizer(directory, tokenizer, chats or not s.init_from)
    if directory == run.out:
        from extra import card

        card.write(directory, tokenizer, run)


def encoded_sets(run) -> list[Path]:
    """Where the data lies that this run encoded to learn from: another may have been there."""
    stages = {"sft": run.settings.sft_epochs, "pairs": run.settings.epochs}
    places = [run.out / "encoded" / name for name, epochs in stages.items() if epochs]
    return [place for place in places if (place / "counts.json").is_file()]


def learnt_ends(sets: list[Path], tokenizer) -> list[int]:
    """The control tokens that what is learnt ends in, by the data that the run encoded."""
    found = set()
    for place in sets:
        arrays = (place / f"{name}.npy" for name in ("tokens", "learnt", "offsets"))
        tokens, learnt, offsets = (np.load(path, mmap_mode="r") for path in arrays)
        is_last = learnt & ~np.append(learnt[1:], False)
        is_last[offsets[1:] - 1] |= learnt[offsets[1:] - 1]  # where the next is learnt, too
        found |= set(np.unique(tokens[is_last]).tolist())
    return sorted(found & tokenizer.control_ids)


def bring(directory: Path, source: str | Path = "", tokenizer: str | Path = ""):
    """All else that the config.json of the source says, which the weights come from, and its
    tokenizer's files; or those of a new model's tokenizer, if it was not trained here. What another
    run left there goes."""
    if source:
        path, kept = directory / "config.json", read_json(base_of(source) / "config.json")
        kept.pop("rope_parameters", None)  # rope_theta and rope_scaling are read everywhere
        saved = {key: value for key, value in read_json(path).items() if value is not None}
        if "eos_token_id" in kept:  # ours has those of generation_config.json, too
            saved.pop("eos_token_id", None)
        write_json(path, kept | saved)
        for name in TOKENIZER_FILES:
            beside = base_of(source) if name == "generation_config.json" else with_tokenizer(source)
            if not (beside / name).is_file():
                (directory / name).unlink(missing_ok=True)  # another run's
            elif beside.resolve() != directory.resolve():
                shutil.copyfile(beside / name, directory / name)
    else:
        beside = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
        for name in TOKENIZER_FILES - {*VOCABULARIES}:  # the one that counts is written already
            if not (tokenizer and (beside / name).is_file()):
                (directory / name).unlink(missing_ok=True)
            elif beside.resolve() != directory.resolve():
                shutil.copyfile(beside / name, directory / name)


def complete_tokenizer(directory: Path, tokenizer, chats: bool):
    """The template, if chats were trained and it is our own; a tokenizer_config.json, if there is
    none; and what ends an answer, if the other files do not say it."""
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if not config:
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
        config |= {"unk_token": "<unk>"}
        if tokenizer.path.suffix == ".json":  # that says the rest
            config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= tokenizer.names
    if chats and not tokenizer.template:
        config["chat_template"] = PLAIN_TEMPLATE
    if not path.is_file() or config != read_json(path):
        write_json(path, config)
    own = read_json(directory / "config.json").get("eos_token_id")
    own = own if isinstance(own, list) else [] if own is None else [own]
    ends = [tokenizer.eos_id, *([end_of_turn(tokenizer)] if chats else []), *tokenizer.stops, *own]
    ends = list(dict.fromkeys(ends))  # those that sample.py stops at
    said = ends if len(ends) > 1 else ends[0]
    path = directory / "generation_config.json"
    content = read_json(path if path.is_file() else directory / "config.json")
    if content.get("eos_token_id") not in (ends, said):
        content = read_json(path) if path.is_file() else {"bos_token_id": tokenizer.bos_id}
        write_json(path, content | {"eos_token_id": said})


def write_json(path: Path, content: dict):
    """Beside, and then in its place: never half of it."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)
