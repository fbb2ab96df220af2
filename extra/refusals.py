"""What the command lines refuse: values out of range, and flags that would be ignored.

`train.py` and `sample.py` run without this room; with it a mistake is one sentence before any work.
"""

import dataclasses
import inspect
import math
import os
import tempfile
from pathlib import Path

import torch

from data import NO_TEXT, DataError
from dpo import find_loss
from extra.checkpoints import places_of
from extra.conversations import short
from model import load_config

CHOICES = {
    "optimizer": ["adamw", "rmsprop"],
    "lr_schedule": ["constant", "linear", "cosine"],
    "dtype": ["auto", "bfloat16", "float32"],
    "wandb": ["disabled", "offline", "online"],
}
NEW_MODEL = {"vocab_size", "hidden_size", "num_layers", "num_heads"}
POSITIVE = NEW_MODEL | {"beta", "batch_size", "micro_batch_tokens", "max_prompt_length"}
POSITIVE |= {"log_every"}
OPTIONS_ABOVE_0 = {"exo": "label_smoothing", "chipo": "gamma", "fdpo_alpha": "alpha"}
MOST = {"seed": 2**63 - 1, "num_layers": 1000}  # of other whole numbers: 2³¹ - 1
BETWEEN = {"beta": (1e-6, 1e6), "temperature": (1e-6, 1e6), "top_p": (1e-6, 1)}  # others: 1e±30
MAY_CHANGE = {"log_every", "eval_every", "sample_every", "save_every", "save_adapter", "wandb"}
MAY_CHANGE |= {"micro_batch_tokens", "activation_checkpointing", "compile"}  # when resuming
PATHS = {"data", "eval_data", "sft_data", "init_from", "tokenizer"}


def check(s, given: dict, point: dict):
    """Raise DataError for a setting that is out of range or would be ignored.

    s: the Settings. given: what the command line says, options of the loss, too. point: what the
    state says that is resumed, or nothing.
    """
    if s.resume:
        for field in dataclasses.fields(s):  # as a state has them
            value = point.get("settings", {}).get(field.name, field.default)
            kinds = (float, int) if field.type is float else field.type
            if field.name != "options" and not isinstance(value, kinds):
                where = f"{s.out_dir}/resume: {field.name} {value!r:.99}"
                raise DataError(f"{where} is not of type {field.type.__name__}")
        check_resumed(Path(s.out_dir), given, point)
        say_settings(s, given, point)
    for name, value in (dataclasses.asdict(s) | s.options).items():
        if name in CHOICES and value not in CHOICES[name]:
            raise DataError(f"--{name} is {value!r}: it must be one of {', '.join(CHOICES[name])}")
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise DataError(f"--{name} must be a number of at least 0, found {short(str(value))}")
        check_range(name, value)
        if value == 0 and (name in POSITIVE or OPTIONS_ABOVE_0.get(s.loss) == name):
            raise DataError(f"--{name} must be greater than 0")
    places = places_of(s.init_from) if s.init_from else []
    reads = [place.resolve() for place in places]  # --init_from; of adapters their base, too
    out = Path(s.out_dir).resolve()
    overwritten = {out, out / "adapter"} | ({out / "sft"} if s.sft_epochs and s.epochs else set())
    wrong = {
        "--data names no file": not s.data.strip(","),
        "--max_prompt_length must be less than --max_length": s.max_prompt_length >= s.max_length,
        "--label_smoothing must be less than 0.5: at 0.5 labels say nothing": (
            s.options.get("label_smoothing", 0) >= 0.5
        ),
        "--hidden_size must be a multiple of twice --num_heads": s.hidden_size % (2 * s.num_heads),
        "--out_dir is --init_from, which it would overwrite": overwritten & {*reads[:1]},
        "--out_dir is the base of --init_from, which it would overwrite": overwritten & {*reads},
        "with --sft_epochs=0 and --epochs=0 there is nothing to do": not s.sft_epochs + s.epochs,
        "--save_adapter needs adapters: give --lora_rank": s.save_adapter and not s.lora_rank,
        "--save_adapter needs a base: give --init_from, or let SFT come before DPO": (
            s.save_adapter and not s.init_from and not (s.sft_epochs and s.epochs)
        ),
    }
    for sentence, applies in wrong.items():
        if applies:
            raise DataError(sentence)
    check_size(s)
    check_writable(out, s.out_dir)
    objective = {"loss", "beta", "sft_weight", "learning_rate", *s.options}
    ignored = [  # settings, where they would be ignored, and why
        ({"tokenizer", *NEW_MODEL}, s.init_from, "--init_from brings its own"),
        ({"vocab_size"}, s.tokenizer, "--tokenizer brings its own"),
        ({"sft_data", "sft_learning_rate"}, not s.sft_epochs, "--sft_epochs is 0"),
        (objective, not s.epochs, "--epochs is 0"),
        ({"weight_decay"}, s.optimizer == "rmsprop", "rmsprop here has none"),
        ({"eval_every"}, not s.eval_data, "there is no --eval_data"),
        ({"sft_weight"}, s.loss == "sft", "--loss=sft is that term alone"),
    ]
    refuse_ignored(ignored, set(given))
    if s.init_from:
        window = load_config(s.init_from).sliding_window
        if window and s.max_length > window:
            beyond = f"--max_length={s.max_length} is beyond the sliding window of {window}"
            raise DataError(f"{beyond}, and attention with a window is not implemented here")


def check_range(name: str, value):
    """Raise DataError for a value that no computer, or no float32, can hold; and for a text with
    characters that no file has."""
    if isinstance(value, str) and ("\0" in value or NO_TEXT.search(value)):
        raise DataError(f"--{name} has characters that are none: {short(ascii(value))}")
    if type(value) is int and value > (most := MOST.get(name, 2**31 - 1)):
        raise DataError(f"--{name} must be at most {most:,}, found {short(str(value))}")
    if type(value) is float:
        least, most = BETWEEN.get(name, (1e-30, 1e30))
        if value and not least <= value <= most:
            raise DataError(f"--{name} must be from {least:g} to {most:g}, found {value:g}")


def check_size(s):
    """Raise DataError if this machine cannot hold what would be trained, before it is tried."""
    width = load_config(s.init_from).hidden_size if s.init_from else s.hidden_size
    if s.lora_rank > width:
        raise DataError(f"--lora_rank={s.lora_rank} is more than the model's width of {width}")
    if s.init_from:
        return
    pieces = 0 if s.tokenizer else s.vocab_size
    count = pieces * width + s.num_layers * 12 * width**2  # parameters, as Llama's
    copies = 1 if torch.cuda.is_available() else 4  # weights, gradients and two moments
    needed, there = 4 * copies * count, memory()
    if needed > there:
        sizes = f"{needed / 2**30:,.0f} GiB, and there are {there / 2**30:,.0f}"
        what = f"a new model of {count:,} parameters needs {sizes}"
        raise DataError(f"{what}: lower --hidden_size, --num_layers or --vocab_size")


def memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_writable(out: Path, given: str):
    """Raise DataError if the run could not write its directory, now rather than at its end."""
    if not given:
        raise DataError("--out_dir is empty: name a directory")
    try:
        for place in (out, out / "sft", out / "adapter", out / "resume", out / "encoded"):
            while not place.exists():
                place = place.parent
            with tempfile.TemporaryFile(dir=place):  # in it, or where it will be made
                pass
        for name in ("model.safetensors", "config.json", "run.json", "metrics.jsonl", "lock"):
            if (out / name).exists() and not (out / name).is_file():
                raise OSError(0, f"{name} there is not a regular file")
    except OSError as error:
        where = short(str(out), 200)
        raise DataError(f"--out_dir: {where} cannot be written ({error.strerror})") from None


def check_resumed(out: Path, given: dict, point: dict):
    """Raise DataError for a setting that would make it another run. With its data named, a run
    without a state begins: whoever may be stopped at any time says --resume always."""
    first = os.environ.get("RANK", "0") == "0"
    if not point and "data" not in given:
        raise DataError(f"{out}: there is no state to resume; with --data the run begins")
    if not point and first:
        print(f"{out} has no saved state yet: the run starts from the beginning", flush=True)
    saved = point.get("settings", {})
    saved = saved | saved.get("options", {})
    for name, value in given.items():
        before = saved.get(name, value)
        if before == value or name in ("resume", "out_dir"):
            continue
        if name in MAY_CHANGE:
            if first:
                print(f"--resume: {name} is {value!r} from here on, and was {before!r}", flush=True)
        elif name not in PATHS or "" in (value, before):  # extra/guard.py compares what they name
            raise DataError(f"--resume: {name} is {value!r}, but was {before!r} in this run")


def say_settings(s, given: dict, point: dict):
    """Which settings a resumed run has from its beginning, and not from this command."""
    usual = {field.name: field.default for field in dataclasses.fields(s)}
    saved, own = point.get("settings", {}), {}
    for name in usual.keys() & saved.keys() - given.keys() - {"resume", "out_dir", "options"}:
        if saved[name] != usual[name]:
            own[name] = saved[name]
    options = inspect.signature(find_loss(saved.get("loss", "dpo"))).parameters
    for name, value in saved.get("options", {}).items():
        if name in options and name not in given and value != options[name].default:
            own[name] = value
    told = " ".join(f"--{name}={short(str(own[name]))}" for name in sorted(own))
    if own and os.environ.get("RANK", "0") == "0":
        print(f"--resume: by this run's own settings: {told}", flush=True)


def refuse_ignored(ignored: list[tuple], given: set[str]):
    for names, applies, reason in ignored:
        if applies and names & given:
            raise DataError(f"--{min(names & given)} would be ignored: {reason}")


def check_arguments(args, given: set[str]):
    """Raise DataError for flags of sample.py that lack something, or would be ignored."""
    for name, value in vars(args).items():
        for one in value if isinstance(value, list) else [value]:
            check_range(name, one)
    least = {"n": 1, "best_of": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "beta": 0}
    least["seed"] = 0
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            raise DataError(f"--{name} must be at least {low}, and finite")
    if not 0 < args.top_p <= 1:
        raise DataError("--top_p must be above 0 and at most 1")
    prompts, greedy = bool(args.prompt or args.prompts), args.temperature == 0
    if prompts + args.chat + bool(args.score) != 1:
        raise DataError("give --prompt or --prompts, or --chat, or --score")
    if (args.score or args.best_of or args.kl) and not args.compare:
        raise DataError("rewards and KL are measured against a reference: name it with --compare")
    shaped = {"temperature", "top_k", "top_p"}
    sampler = shaped | {"max_new_tokens", "seed", "compile"}
    written = args.out and not (args.score or args.best_of or args.kl)
    ignored = [  # flags, where they would be ignored, and why
        ({"compare", "n", "out"}, args.chat, "--chat talks to one checkpoint"),
        ({"best_of", "kl"}, not prompts, "they need prompts"),
        ({"n"} | sampler, args.score, "--score draws no samples"),
        ({"system"}, not args.chat, "it belongs to --chat"),
        ({"n"}, args.best_of, "--best_of says how many"),
        ({"beta"}, not (args.score or args.best_of), "nothing is scored"),
        ({"compare"}, written, "candidates come from one"),
        (shaped | {"best_of", "out"}, args.kl, "--kl needs plain samples, and all of them"),
        ({"top_k", "top_p", "seed", "n", "best_of"}, greedy, "--temperature=0 is greedy"),
    ]
    refuse_ignored(ignored, given)
    if (args.best_of or args.n) > 10**6:
        raise DataError("--n and --best_of must be at most 1,000,000")
    if (Path(args.checkpoint) / "config.json").is_file():  # else what reads it says so
        check_cache(args)
    if args.out and Path(args.out).is_fifo():
        raise DataError(f"--out={args.out} is a pipe: name a file")
    if args.out:
        open(args.out, "a").close()  # now rather than after an hour of sampling


def check_cache(args):
    """Raise DataError if the keys and values of a single sample would not fit into memory."""
    c = load_config(args.checkpoint)
    per_token = 8 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # bytes, float32
    if (needed := per_token * args.max_new_tokens) > memory():
        what = f"--max_new_tokens={args.max_new_tokens} takes {needed / 2**30:,.0f} GiB"
        raise DataError(f"{what} of keys and values: lower it")
