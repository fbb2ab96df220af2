"""What the command lines refuse: values out of range, and flags that would be ignored.

`train.py` and `sample.py` run without this room; with it a mistake is one sentence before any work.
"""

import dataclasses
import math
import os
from pathlib import Path

from data import DataError
from extra.checkpoints import places_of
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
MAY_CHANGE = {"log_every", "eval_every", "save_every", "save_adapter", "wandb"}  # when resuming
MAY_CHANGE |= {"micro_batch_tokens", "activation_checkpointing", "compile"}
PATHS = {"data", "eval_data", "sft_data", "init_from", "tokenizer"}


def check(s, given: dict, point: dict):
    """Raise DataError for a setting that is out of range or would be ignored.

    s: the Settings. given: what the command line says, options of the loss, too. point: what the
    state says that is resumed, or nothing.
    """
    if s.resume:
        check_resumed(Path(s.out_dir), given, point)
    for name, value in (dataclasses.asdict(s) | s.options).items():
        if name in CHOICES and value not in CHOICES[name]:
            raise DataError(f"--{name} is {value!r}: it must be one of {', '.join(CHOICES[name])}")
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise DataError(f"--{name} must be a number of at least 0, found {value}")
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


def refuse_ignored(ignored: list[tuple], given: set[str]):
    for names, applies, reason in ignored:
        if applies and names & given:
            raise DataError(f"--{min(names & given)} would be ignored: {reason}")


def check_arguments(args, given: set[str]):
    """Raise DataError for flags of sample.py that lack something, or would be ignored."""
    least = {"n": 1, "best_of": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "beta": 0}
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
    if args.out:
        open(args.out, "a").close()  # now rather than after an hour of sampling
