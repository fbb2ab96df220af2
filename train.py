"""SFT, then DPO: `python train.py`, or on several processes `torchrun --nproc_per_node=N train.py`.

Without arguments it runs the built-in experiment from nothing, on whatever hardware is there. With
    --data=pairs.jsonl --eval_data=… --init_from=DIR
it tunes a checkpoint on your preferences. `--help` lists the settings; every ablation is a loop:
    for beta in 0.05 0.1 0.5; do python train.py --beta=$beta --out_dir=out/beta$beta; done

In order: settings, machine, data, model, reference, the loop, checkpoints, report.
"""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import gc
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import dpo
from model import (
    CheckpointError,
    ModelConfig,
    Transformer,
    fill,
    load_config,
    random_weights,
    read_weights,
    save_pretrained,
)


@dataclass(frozen=True)
class Settings:
    data: str = "reviews"  # built-in experiment, or preference files .jsonl[.gz], comma-separated
    eval_data: str = ""  # held-out preference files; the built-in experiment brings its own
    sft_data: str = ""  # what SFT trains on: files with prompt, response (none: chosen responses)
    init_from: str = ""  # checkpoint directory to start from (none: a new model)
    tokenizer: str = ""  # SentencePiece model for a new model (none: trained on the data)
    out_dir: str = "out/reviews"  # directory of the run
    # objective
    loss: str = "dpo"  # objective of the DPO stage; dpo.py has them all, each in a few lines
    beta: float = 0.1  # strength of the KL to the reference; dpo_norm, simpo have other defaults
    label_smoothing: float = 0.0  # rate at which labels are taken to be flipped; robust, exo: own
    alpha: float = 0.0  # α of the losses that have one, each with its own default in dpo.py
    gamma: float = 0.0  # γ of the losses that have one, each with its own default in dpo.py
    sft_weight: float = 0.0  # of an added SFT term, the chosen response's NLL per token
    # optimisation
    optimizer: str = "adamw"  # adamw, or rmsprop as in the paper
    learning_rate: float = 1e-6  # peak of the DPO stage
    sft_learning_rate: float = 1e-5  # peak of the SFT stage
    lr_schedule: str = "linear"  # after the warmup: constant, linear or cosine (both to 0)
    warmup_steps: int = 20  # of linear warmup, in each stage
    weight_decay: float = 0.0  # in both stages; decoupled, on matrices; adamw only
    grad_clip: float = 1.0  # largest norm of a step's gradient; 0: no clipping
    batch_size: int = 64  # pairs (SFT: demonstrations) per optimizer step, over all ranks
    epochs: int = 1  # of the DPO stage; 0: none, stop after SFT
    sft_epochs: int = 1  # of the SFT stage; 0: none, start DPO from init_from as it is
    max_steps: int = 0  # stop each stage after so many steps; 0: run all epochs
    shuffle: bool = True  # a new order each epoch
    seed: int = 0  # of initialisation, order of the data and built-in data
    # sizes
    max_length: int = 512  # tokens of prompt and response; a longer response loses its end
    max_prompt_length: int = 256  # tokens of the prompt; a longer one loses its beginning
    micro_batch_tokens: int = 4096  # tokens of one forward and backward pass on each rank
    vocab_size: int = 640  # of a tokenizer trained here, at most
    hidden_size: int = 128  # width of a new model
    num_layers: int = 2  # layers of a new model
    num_heads: int = 4  # attention heads of a new model
    # the built-in experiment
    review_demonstrations: int = 60000  # reviews for SFT
    review_pairs: int = 6000  # labelled pairs for DPO
    review_samples: int = 5000  # of the report at the end; 0: no report
    review_labels: str = "bradley_terry"  # noisy labels, or deterministic by the true reward
    # running
    dtype: str = "auto"  # of matrix products: bfloat16, float32; auto: bfloat16 on CUDA only
    lora_rank: int = 0  # train adapters of this rank only, merged when saved; 0: all weights
    compile: bool = False  # torch.compile each block
    defer_reduce: bool = True  # FSDP: sum gradients over ranks once a step; false: after each pass
    activation_checkpointing: bool = False  # recompute each block in the backward pass
    log_every: int = 25  # steps
    eval_every: int = 0  # steps; 0: before and after each stage only
    save_every: int = 0  # steps between states that --resume can continue from; 0: none
    resume: bool = False  # continue the run in out_dir from its last saved state
    wandb: str = "disabled"  # Weights & Biases: disabled, offline or online


# What the built-in experiment changes, where the command line does not: a small model from nothing.
REVIEWS = {"beta": 1.0, "batch_size": 32, "learning_rate": 2e-4, "sft_learning_rate": 4e-3}
CHOICES = {
    "loss": list(dpo.LOSSES),
    "optimizer": ["adamw", "rmsprop"],
    "lr_schedule": ["constant", "linear", "cosine"],
    "review_labels": ["bradley_terry", "deterministic"],
    "dtype": ["auto", "bfloat16", "float32"],
    "wandb": ["disabled", "offline", "online"],
}
NEW_MODEL = {"vocab_size", "hidden_size", "num_layers", "num_heads"}
POSITIVE = NEW_MODEL | {"beta", "batch_size", "micro_batch_tokens", "max_prompt_length"}
POSITIVE |= {"log_every", "review_demonstrations", "review_pairs"}
# What a loss must have above 0:
NOT_ZERO = {"exo": "label_smoothing", "chipo": "gamma", "fdpo_alpha": "alpha"}
# What may change when resuming:
MAY_CHANGE = {"resume", "log_every", "eval_every", "save_every", "wandb", "review_samples"}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
SHOWN = ("/loss", "/rewards/accuracies", "/rewards/margins", "/rewards/chosen")  # in the terminal


warnings.filterwarnings("ignore", "torch.distributed is disabled")  # of saving in one process


class SettingError(ValueError):
    """A setting that cannot be used; the message is one sentence for the user."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise SettingError(message)


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")
    return text.lower() == "true"


def parse_settings(arguments: list[str]) -> Settings:
    """Command line -> Settings; the help of each is its comment above. Raises SettingError."""
    layout = argparse.RawTextHelpFormatter
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=layout)
    lines = [line for line in inspect.getsource(Settings).splitlines() if "  # " in line]
    comments = {line.split(":")[0].strip(): line.split("  # ")[1] for line in lines}
    for field in dataclasses.fields(Settings):
        preset = f"; {REVIEWS[field.name]} for reviews" if field.name in REVIEWS else ""
        options = {"type": field.type, "choices": CHOICES.get(field.name)}
        if field.type is bool:  # --resume is --resume=true
            options = {"type": boolean, "nargs": "?", "const": True}
        parser.add_argument(
            f"--{field.name}",
            default=argparse.SUPPRESS,
            metavar="|".join(CHOICES.get(field.name, [field.type.__name__])),
            help=f"{comments[field.name]} (default {field.default!r}{preset})",
            **options,
        )
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].split("=")[0]
        close = difflib.get_close_matches(name, [f"--{setting}" for setting in comments], n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists the settings"
        raise SettingError(f"unknown setting {name}: {hint}")
    given = vars(given)
    preset = REVIEWS if given.get("data", Settings.data) == "reviews" else {}
    settings = Settings(**(preset | dpo.defaults(given.get("loss", Settings.loss)) | given))
    check_settings(settings, set(given))
    return settings


def check_settings(s: Settings, given: set[str]):
    """Refuse values out of range, and settings that would be ignored."""
    for name, value in dataclasses.asdict(s).items():
        if isinstance(value, (int, float)) and not (0 <= value < math.inf):
            raise SettingError(f"--{name} must be a number of at least 0, found {value}")
        if name in POSITIVE and value == 0:
            raise SettingError(f"--{name} must be greater than 0")
    if not s.data.strip(","):
        raise SettingError("--data names no file")
    written = [Path(s.out_dir), Path(s.out_dir, "reference", "sft")][: 2 if s.sft_epochs else 1]
    if s.init_from and Path(s.init_from).resolve() in [path.resolve() for path in written]:
        raise SettingError("--out_dir is --init_from, which it would overwrite")
    if s.max_prompt_length >= s.max_length:
        raise SettingError("--max_prompt_length must be less than --max_length")
    if s.label_smoothing >= 0.5:
        raise SettingError("--label_smoothing must be less than 0.5: at 0.5 labels say nothing")
    if (name := NOT_ZERO.get(s.loss)) and not getattr(s, name):
        raise SettingError(f"--{name} must be greater than 0 for --loss={s.loss}")
    if not s.epochs and not s.sft_epochs:
        raise SettingError("with --sft_epochs=0 and --epochs=0 there is nothing to do")
    if s.hidden_size % (2 * s.num_heads):
        raise SettingError("--hidden_size must be a multiple of twice --num_heads")
    builtin = {name for name in given if name.startswith("review_")}
    no_eval = s.data != "reviews" and not s.eval_data
    objective = {"beta", "label_smoothing", "alpha", "gamma"}
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    ignored = [  # settings, where they would be ignored, and why
        ({"tokenizer", *NEW_MODEL}, s.init_from, "--init_from brings its own"),
        ({"vocab_size"}, s.tokenizer, "--tokenizer brings its own"),
        ({"eval_data", "sft_data"}, s.data == "reviews", "--data=reviews brings its own"),
        (builtin, s.data != "reviews", "it belongs to --data=reviews"),
        ({"sft_data", "sft_learning_rate"}, s.sft_epochs == 0, "--sft_epochs is 0"),
        ({"loss", "sft_weight", "learning_rate"} | objective, s.epochs == 0, "--epochs is 0"),
        ({"sft_data"}, s.epochs == 0, "with --epochs=0 SFT trains on --data"),
        ({"weight_decay"}, s.optimizer == "rmsprop", "rmsprop here has none"),
        ({"defer_reduce"}, alone, "there is only one process"),
        ({"eval_every"}, no_eval, "there is no --eval_data"),
        (objective - dpo.needs(s.loss), True, f"--loss={s.loss} does not use it"),
        ({"sft_weight"}, s.loss == "sft", "--loss=sft is that term alone"),
    ]
    for names, applies, reason in ignored:
        if applies and names & given:
            raise SettingError(f"--{min(names & given)} would be ignored: {reason}")


class Run:
    """This process: its settings, rank, device and precision, and where rank 0 reports."""

    def __init__(self, settings: Settings):
        self.settings, self.out = settings, Path(settings.out_dir)
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        cuda = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if "RANK" in os.environ:
            patience = datetime.timedelta(hours=4)  # while rank 0 encodes a large file
            dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)
        auto = "bfloat16" if cuda else "float32"
        self.dtype = auto if settings.dtype == "auto" else settings.dtype
        self.wandb = None
        if self.rank == 0:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SettingError(f"--out_dir={self.out}: {error.strerror}") from None
        if self.rank == 0 and settings.wandb != "disabled":
            import wandb

            where = {"project": "dpo", "name": self.out.name, "dir": self.out}
            config = dataclasses.asdict(settings)
            self.wandb = wandb.init(**where, mode=settings.wandb, config=config)

    def autocast(self):
        """The one mechanism for bf16: float32 master weights, matrix products under autocast."""
        if self.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def reduce(self, values, operation=dist.ReduceOp.SUM) -> torch.Tensor:
        """Sum (or other reduction) over the ranks, in float64, on the CPU. (all ranks)"""
        values = torch.as_tensor(values, dtype=torch.float64).to(self.device)
        if self.world > 1:
            dist.all_reduce(values, operation)
        return values.cpu()

    def gather(self, values: torch.Tensor) -> tuple[torch.Tensor, slice]:
        """The (n, P) of all ranks side by side, (n, sum of P), in float64 on the CPU, and where
        this rank's own are in it. (all ranks)"""
        counts = torch.zeros(self.world)
        counts[self.rank] = values.shape[1]
        ends = self.reduce(counts).long().cumsum(0).tolist()
        own = slice(ends[self.rank] - values.shape[1], ends[self.rank])
        whole = torch.zeros(len(values), ends[-1], dtype=torch.float64)
        whole[:, own] = values.cpu()
        return self.reduce(whole), own

    def wait(self):
        """(all ranks)"""
        if self.world > 1:
            dist.barrier()

    def say(self, text: str):
        if self.rank == 0:
            print(text, flush=True)

    def record(self, row: dict):
        """A row of metrics, to metrics.jsonl and Weights & Biases."""
        if self.rank == 0:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log({f"{row['stage']}/{name}": value for name, value in row.items()})


def find_sources(run: Run) -> dict[str, tuple]:
    """What SFT and DPO train on, and are evaluated on: name -> (files, how to read them). Those of
    the built-in experiment are written first. (all ranks)"""
    s, read_pairs, read_sft = run.settings, data.read_preferences, data.read_demonstrations
    pairs, held_out, demonstrations = s.data, s.eval_data, s.sft_data
    if s.data == "reviews":
        from experiments.reviews import write_files

        if run.rank == 0:
            sharp = s.review_labels == "deterministic"
            count = s.review_demonstrations if s.sft_epochs else 0
            write_files(run.out, s.seed, count, s.review_pairs, sharp)
        run.wait()
        names = ("pairs", "eval", "sft")
        pairs, held_out, demonstrations = (str(run.out / f"{name}.jsonl") for name in names)
    sources = {}
    if s.epochs:
        sources |= {"pairs": (pairs, read_pairs), "eval pairs": (held_out, read_pairs)}
    if s.sft_epochs:  # without demonstrations of its own it takes the best of the pairs
        sources |= {"sft": (demonstrations or pairs, read_sft), "sft eval": (held_out, read_sft)}
    return {name: source for name, source in sources.items() if source[0]}


def load_tokenizer(run: Run, sources: dict[str, tuple]) -> data.Tokenizer | None:
    """That of --init_from or --tokenizer, or one trained on the data; None if there is none."""
    s, path = run.settings, run.out / "tokenizer.model"
    if s.init_from and not (Path(s.init_from) / "tokenizer.model").exists():
        return None
    source = s.tokenizer or (s.init_from and Path(s.init_from) / "tokenizer.model")
    if source:
        return data.Tokenizer(source)
    if run.rank == 0 and not s.resume:
        trained_on = {sources[n][0]: sources[n] for n in ("sft", "pairs") if n in sources}
        examples = (example for paths, read in trained_on.values() for example in read(paths))
        texts = (text for example in examples for text in data.texts(example))
        data.Tokenizer.train(list(itertools.islice(texts, 10**6)), path, s.vocab_size)
    run.wait()
    return data.Tokenizer(path)


def load_sets(run: Run, sources: dict[str, tuple], tokenizer) -> dict[str, data.Dataset]:
    """The sources, encoded. (all ranks)"""
    s, sets, cache = run.settings, {}, run.out.parent / "encoded"
    limits = s.max_length, s.max_prompt_length
    for turn in (True, False):  # rank 0 encodes, then the others find the cache
        if (run.rank == 0) == turn:
            for name, (paths, read) in sources.items():
                run.say(f"{name}: reading {paths}")
                sets[name] = data.encode_files(paths, read, tokenizer, *limits, cache)
        run.wait()
    for name, dataset in sets.items():
        counts = [f"{count:,} {what}" for what, count in dataset.counts.items() if count]
        run.say(f"{name}: {', '.join(counts)}")
    return sets


def check_pairs(loss: str, sets: dict[str, data.Dataset]):
    """Raise SettingError if the pairs lack what the loss needs, or have what it would ignore."""
    for name in sets.keys() & {"pairs", "eval pairs"}:
        weights, labels, margins = sets[name].facts.T
        if "margin" in dpo.needs(loss) and (without := int(np.isnan(margins).sum())):
            where = f"{without:,} of the {len(margins):,} {name} have none"
            raise SettingError(f"--loss={loss} needs a field 'margin' in every pair: {where}")
        ignored = {
            "soft_label": loss in ("sft", "plackett_luce") and (labels < 1).any(),
            "weight": loss == "sft" and (weights != 1).any(),
        }
        for field in [field for field, applies in ignored.items() if applies]:
            where = f"some of the {name} have one that is not 1"
            raise SettingError(f"--loss={loss} would ignore the field '{field}': {where}")


def new_config(s: Settings, tokenizer: data.Tokenizer) -> ModelConfig:
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=s.hidden_size,
        intermediate_size=-(-8 * s.hidden_size // 3 // 32) * 32,  # Llama's 8/3, by 32
        num_hidden_layers=s.num_layers,
        num_attention_heads=s.num_heads,
        num_key_value_heads=s.num_heads,
        head_dim=s.hidden_size // s.num_heads,
        max_position_embeddings=s.max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )


def load_model(run: Run, directory: str | Path, tokenizer) -> Transformer:
    """The checkpoint in `directory`, or without one a new model, on its device and sharded.

    Built without memory and sharded first, then filled weight by weight, so that no process ever
    holds more than its own shard and one weight. (all ranks)
    """
    s = run.settings
    config = load_config(directory) if directory else new_config(s, tokenizer)
    with torch.device("meta"):
        model = Transformer(config)
    if s.lora_rank:
        model.add_lora(s.lora_rank)
    shard(model, run).to_empty(device=run.device)

    def keep_own_rows(parameter, weight):  # FSDP2 splits the first dimension as torch.chunk does
        own = parameter.to_local()
        first = run.rank * -(-len(parameter) // run.world)
        if len(own):
            own.copy_(weight[first : first + len(own)])

    place = {"place": keep_own_rows} if run.world > 1 else {}
    if directory:
        fill(model, read_weights(directory), **place)
    if s.lora_rank or not directory:
        fill(model, random_weights(model, s.seed, only_adapters=bool(directory)), **place)
    return model


def shard(model: Transformer, run: Run) -> Transformer:
    """Activation checkpointing, compilation and FSDP2, all from outside the model."""
    model.activation_checkpointing = run.settings.activation_checkpointing
    if run.settings.compile:
        for layer in model.layers:
            layer.compile(dynamic=True)
    if run.world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(run.device.type, (run.world,))
        precision = MixedPrecisionPolicy(  # weights gathered in bf16, gradients summed in float32
            param_dtype=torch.bfloat16 if run.dtype == "bfloat16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=precision)
    return model


@dataclass
class Stage:
    """What differs between SFT and DPO; the loop is one and the same."""

    name: str
    loss: str
    train: data.Dataset
    eval: data.Dataset | None
    epochs: int
    learning_rate: float
    options: dict[str, float]  # settings of the loss
    reference: torch.Tensor | None = None  # (responses,) log π_ref of the training responses
    eval_reference: torch.Tensor | None = None

    def count(self, examples: np.ndarray) -> int:
        """What a step's summed loss is divided by: its examples, for SFT its response tokens."""
        if self.loss != "sft":
            return len(examples)
        return int(self.train.learnt[self.train.trees[examples] + 1].sum())  # after each prompt


def micro_batches(dataset: data.Dataset, plan: list, run: Run):
    """This rank's micro-batches of one step of the plan, on its device.

    On CUDA each is made and copied, from pinned memory, while the GPU still works on the last one:
    nothing in a step waits for it, but for the statistics of the losses that need some.
    """
    for examples in plan[run.rank]:
        yield data.collate(dataset, examples).to(run.device)


def whole_plan(dataset: data.Dataset, run: Run) -> list:
    """One pass without gradients as the plan of a single step, with longer micro-batches."""
    lengths, budget = dataset.lengths(), 2 * run.settings.micro_batch_tokens
    return next(data.plan_epoch(lengths, len(lengths), budget, run.world))


@contextlib.contextmanager
def inference(model, run: Run):
    """Forward passes without gradients. (all ranks)

    FSDP leaves the root's weights gathered after a forward that no backward follows. Sharded again
    they are what an optimizer or a checkpoint must take for the parameters.
    """
    with torch.no_grad():
        yield
    if run.world > 1:
        model.reshard()


def compute_reference(model, dataset: data.Dataset, run: Run, what: str) -> torch.Tensor:
    """log π_ref of every response, (responses,): from a cache, or by one pass over the data.

    The cache is looked for in this run and in those beside it, under a digest of weights, tokens
    and numerics: a sweep over β or over losses computes it once. (all ranks)
    """
    numerics = f"{model.config}, {run.dtype} on {run.device.type}, torch {torch.__version__}"
    key, size = dpo.reference_key(model, dataset, numerics), len(dataset.response_lengths())
    places = [run.out / "reference", *sorted(run.out.parent.glob("*/reference"))]
    values, verb = dpo.find_reference(key, places, size), "reused"
    if run.reduce(values is not None) < run.world:
        verb = "computed"
        with inference(model, run), run.autocast():
            batches = micro_batches(dataset, whole_plan(dataset, run), run)
            values, seen = run.reduce(dpo.reference_logps(model, batches, size))
        assert (seen == 1).all(), "every response is visited exactly once, on one rank"
        values = values.float().numpy()
    run.say(f"reference: {size:,} log-probs of the {what} {verb} ({key})")
    if run.rank == 0:
        (run.out / "reference").mkdir(exist_ok=True)
        np.save(run.out / "reference" / f"{key}.npy", values)
    run.wait()
    return torch.from_numpy(values).to(run.device)


def batch_statistics(stage: Stage, model, dataset, plan: list, reference, run: Run) -> list[dict]:
    """What the loss must know of the whole step, for each micro-batch of this rank: for the losses
    that ask, from one more forward pass over the step. (all ranks)"""
    wanted = dpo.STATISTICS.keys() & dpo.needs(stage.loss)
    if not wanted:
        return [{}] * len(plan[run.rank])
    parts = []
    with inference(model, run), run.autocast():
        for batch in micro_batches(dataset, plan, run):
            logps = dpo.sequence_logps(model, batch)
            vectors = dpo.pair_vectors(logps, reference[batch.response_ids], batch)
            parts.append(torch.stack(list(vectors.values())))  # (vectors, P)
    sizes = [part.shape[1] for part in parts]
    whole, own = run.gather(torch.cat(parts, dim=1))  # (vectors, pairs of the step)
    step = dict(zip(vectors, whole))
    values = {name: dpo.call(dpo.STATISTICS[name], step)[own].float() for name in wanted}
    values = {name: value.to(run.device) for name, value in values.items()}
    return [dict(zip(values, split)) for split in zip(*(v.split(sizes) for v in values.values()))]


def forward(stage: Stage, model, plan: list, run: Run, held_out: bool = False) -> Iterator[tuple]:
    """One step's micro-batches of this rank: log-probs (N,), the reference's, and the loss as a
    function of log-probs, `dpo.compute_loss` with all else given. (all ranks)"""
    dataset = stage.eval if held_out else stage.train
    reference = stage.eval_reference if held_out else stage.reference
    statistics = batch_statistics(stage, model, dataset, plan, reference, run)
    for batch, known in zip(micro_batches(dataset, plan, run), statistics):
        with run.autocast():
            logps = dpo.sequence_logps(model, batch)
        given = {"batch": batch, "statistics": known} | stage.options
        given["reference"] = None if reference is None else reference[batch.response_ids]
        yield logps, given["reference"], partial(dpo.compute_loss, stage.loss, **given)


def averages(totals: Counter, prefix: str, run: Run) -> dict[str, float]:
    """The sums of all ranks -> metrics averaged over their pairs, in one all_reduce. (all ranks)"""
    values = run.reduce([float(value) for value in totals.values()]).tolist()
    metrics = dpo.average_metrics(dict(zip(totals, values)))
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def evaluate(stage: Stage, model, run: Run) -> dict:
    """The stage's metrics on its fixed evaluation set. (all ranks)"""
    totals = Counter()
    plan = whole_plan(stage.eval, run)
    with inference(model, run):
        for logps, _, loss_of in forward(stage, model, plan, run, held_out=True):
            totals.update(loss_of(logps)[1])
    return averages(totals, "eval", run)


def check_start(stage: Stage, model, plan: list, run: Run):
    """Before the first step the policy is the reference: check that the numbers say so. (all ranks)

    Raises SettingError if a log-ratio of the first step's responses is out of tolerance, or the
    loss is not what it is at log-ratios of zero (ln 2 for DPO, whatever the data).
    """
    sums, worst = np.zeros(3), 0.0
    tolerance = 0.5 if run.dtype == "bfloat16" else 0.01  # nats
    with inference(model, run):
        for logps, reference, loss_of in forward(stage, model, plan, run):
            (loss, got), (at_zero, _) = loss_of(logps), loss_of(reference)
            sums += loss.item(), at_zero.item(), float(got["count"])
            worst = max(worst, (logps - reference).abs().max().item())
    *losses, count = run.reduce(sums).tolist()
    loss, initial = (value / max(count, 1e-12) for value in losses)
    worst = run.reduce(worst, dist.ReduceOp.MAX).item()
    run.say(
        f"step 0: {stage.loss} loss {loss:.6f}, in theory {initial:.6f}; "
        f"largest log-ratio {worst:.1e} nats (tolerance {tolerance})"
    )
    if not (worst <= tolerance and abs(loss - initial) <= tolerance * (1 + abs(initial))):
        raise SettingError(
            f"before the first step policy and reference must agree to {tolerance} nats, but "
            f"differ by {worst:.3g}: delete {run.out / 'reference'} to have it computed anew"
        )


def learning_rate(step: int, steps: int, peak: float, settings: Settings) -> float:
    """A pure function of the step (from 0), so that a resumed run needs no scheduler state."""
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return peak * shapes[settings.lr_schedule]


def make_optimizer(model, settings: Settings) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(trained)
    matrices = [p for p in trained if p.dim() == 2]
    vectors = [p for p in trained if p.dim() < 2]
    decayed = {"params": matrices, "weight_decay": settings.weight_decay}
    return torch.optim.AdamW([decayed, {"params": vectors, "weight_decay": 0.0}], fused=True)


def train_step(stage: Stage, model, optimizer, plan: list, totals: Counter, run: Run):
    """One optimizer step over the planned micro-batches. (all ranks)"""
    count = stage.count(data.examples_of(plan))
    last = len(plan[run.rank]) - 1
    for number, (logps, _, loss_of) in enumerate(forward(stage, model, plan, run)):
        loss, sums = loss_of(logps)
        if run.world > 1 and run.settings.defer_reduce:
            model.set_requires_gradient_sync(number == last)
        # FSDP averages over ranks: times their number this is the sum over all pairs, divided by
        # the pairs of the step, however they are spread over ranks and micro-batches.
        (loss * run.world / count).backward()
        totals.update(sums)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.settings.grad_clip or math.inf)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    optimizer.step()
    optimizer.zero_grad()
    return norm


def utilization(model, work: np.ndarray, seconds: float, run: Run) -> dict[str, float]:
    """`mfu`: floating-point operations that the work asks for, a backward pass as two forward ones
    (with LoRA as one), by what the GPUs could do in that time; of known ones, in bf16 alone."""
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else ""
    peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
    if not peak or run.dtype != "bfloat16":
        return {}
    passes = 2 if run.settings.lora_rank else 3
    return {"mfu": passes * model.flops(*work) / (seconds * peak * run.world)}


def run_stage(stage: Stage, model, run: Run):
    """Train one stage to its end, from its start or from where --resume left it. (all ranks)"""
    s, work_of = run.settings, stage.train.work()
    lengths = work_of[:, 0].astype(np.int64)
    per_epoch = math.ceil(len(lengths) / s.batch_size)
    steps = min(stage.epochs * per_epoch, s.max_steps or math.inf)
    optimizer = make_optimizer(model, s)
    first = load_resume(model, optimizer, run) if resume_point(run)["stage"] == stage.name else 0
    run.say(f"{stage.name}: {len(lengths):,} examples, steps {first} to {steps} of {s.batch_size}")

    def report(done: int, row: dict, note: str = ""):
        run.record({"stage": stage.name, "step": done, "epoch": done / per_epoch} | row)
        shown = "  ".join(f"{name} {row[name]:.4g}" for name in row if name.endswith(SHOWN))
        run.say(f"{stage.name} {done}/{steps}  {shown}{note}")

    if stage.eval and not first:
        report(0, evaluate(stage, model, run))
    totals, norms, work, plan = Counter(), [], np.zeros(4), None
    begun = since = time.perf_counter()
    for step in range(first, steps):
        epoch, within = divmod(step, per_epoch)
        if plan is None or within == 0:
            order = (s.seed, epoch) if s.shuffle else None
            budget = s.micro_batch_tokens
            plan = list(data.plan_epoch(lengths, s.batch_size, budget, run.world, order))
        if step == 0 and stage.reference is not None:
            check_start(stage, model, plan[0], run)
        rate = learning_rate(step, steps, stage.learning_rate, s)
        for group in optimizer.param_groups:
            group["lr"] = rate
        norms.append(train_step(stage, model, optimizer, plan[within], totals, run))
        examples = data.examples_of(plan[within])
        work += len(examples), *work_of[examples].sum(0)
        done = step + 1
        if done % s.log_every == 0 or done == steps:
            row = averages(totals, "train", run)
            now = time.perf_counter()  # once the GPU has done all that was asked of it
            row["train/grad_norm"] = torch.stack(norms).mean().item()
            row["train/learning_rate"] = rate
            if not all(map(math.isfinite, row.values())):
                raise SettingError(f"{stage.name} diverged by step {done}: lower its learning rate")
            row["pairs_per_second"], row["tokens_per_second"] = work[:2] / (now - since)
            row |= utilization(model, work[1:], now - since, run)
            row["peak_memory_gib"] = peak_memory(run.device)
            left = (now - begun) / (done - first) * (steps - done)
            report(done, row, f"  {row['pairs_per_second']:.0f} pairs/s  {left:.0f} s left")
            totals, norms, work, since = Counter(), [], np.zeros(4), now
        paused = time.perf_counter()
        if stage.eval and (done == steps or (s.eval_every and done % s.eval_every == 0)):
            report(done, evaluate(stage, model, run))
        if s.save_every and done % s.save_every == 0 and done < steps:
            save_resume(stage.name, done, model, optimizer, run)
        since += time.perf_counter() - paused


def peak_memory(device: torch.device) -> float:
    """GiB: allocated on the GPU, or resident on the CPU (Linux counts in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def save_model(model, tokenizer, directory: Path, run: Run):
    """Write a checkpoint directory as it was distributed, with new weights. (all ranks)"""
    if run.settings.lora_rank:
        model.merge_lora()
    gather = lambda parameter: parameter.full_tensor() if run.world > 1 else parameter
    source = run.settings.init_from or None
    save_pretrained(model, directory, source, gather=gather, write=run.rank == 0)
    if run.rank == 0 and tokenizer:
        tokenizer.save(directory)
    elif run.rank == 0:
        for name in data.TOKENIZER_FILES:
            if (Path(source) / name).is_file():
                shutil.copy(Path(source) / name, directory)
    run.wait()


def resume_state(model, optimizer) -> dict:
    """Weights that are trained, and the optimizer's moments."""
    from torch.distributed.checkpoint import state_dict as dcp_state

    options = dcp_state.StateDictOptions(ignore_frozen_params=True)
    weights, moments = dcp_state.get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


progress = lambda point: (point["stage"] == "dpo", point["step"])  # in the order of training


def save_resume(stage: str, step: int, model, optimizer, run: Run):
    """A state to resume from; it counts once point.json is in it, then the last one goes. (all
    ranks)"""
    import torch.distributed.checkpoint as dcp

    place = run.out / "resume" / f"{stage}-{step}"
    if run.rank == 0:
        shutil.rmtree(place, ignore_errors=True)
    run.wait()
    dcp.save(resume_state(model, optimizer), checkpoint_id=place, no_dist=run.world == 1)
    if run.rank == 0:
        (place / "point.json").write_text(json.dumps({"stage": stage, "step": step}))
        for other in place.parent.iterdir():
            if other != place:
                shutil.rmtree(other)
    run.wait()


def resume_point(run: Run) -> dict:
    """{stage, step} of the saved state; without --resume a stage of None."""
    if not run.settings.resume:
        return {"stage": None, "step": 0}
    points = map(json.loads, (p.read_text() for p in run.out.glob("resume/*/point.json")))
    if not (points := sorted(points, key=progress)):
        raise SettingError(f"--resume: {run.out} has no saved state; --save_every leaves one")
    return points[-1]


def load_resume(model, optimizer, run: Run) -> int:
    """Restore weights and moments; returns the number of steps already done. (all ranks)"""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dcp_state

    point, state = resume_point(run), resume_state(model, optimizer)
    place = run.out / "resume" / f"{point['stage']}-{point['step']}"
    dcp.load(state, checkpoint_id=place, no_dist=run.world == 1)
    dcp_state.set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=dcp_state.StateDictOptions(strict=False),  # without what LoRA freezes
    )
    return point["step"]


def start_records(run: Run, sets: dict[str, data.Dataset]):
    """run.json: settings as resolved, versions, digests of the data. A resumed run must agree with
    it, and forgets the metrics that were recorded after its saved state. Else both start anew."""
    path, metrics = run.out / "run.json", run.out / "metrics.jsonl"
    digests = {
        name: hashlib.sha256(
            b"".join(a.tobytes() for a in (d.tokens, d.trees, d.facts))
        ).hexdigest()
        for name, d in sets.items()
    }
    new = {"settings": dataclasses.asdict(run.settings), "data": digests, "ranks": run.world}
    new |= {"python": platform.python_version(), "torch": torch.__version__, "dtype": run.dtype}
    if run.rank != 0:
        return
    kept = []
    if run.settings.resume:
        point, old = resume_point(run), json.loads(path.read_text(encoding="utf-8"))
        for name, value in (new["settings"] | digests).items():
            before = (old["settings"] | old["data"]).get(name)
            if before != value and name not in MAY_CHANGE:
                raise SettingError(f"--resume: {name} is {value!r}, but was {before!r} in this run")
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        kept = [row for row in rows if progress(row) <= progress(point)]
    path.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
    metrics.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def train(run: Run):
    """Both stages, from the text to the final checkpoint. (all ranks)"""
    s, resumed = run.settings, resume_point(run)["stage"]
    if s.init_from:
        config = load_config(s.init_from)  # refuse what cannot be used before anything else
        config.check_length(s.max_length)
        if s.max_length > config.max_position_embeddings:
            made = config.max_position_embeddings
            run.say(f"note: --max_length is beyond the {made} positions the model was made for")
    sources = find_sources(run)
    tokenizer = load_tokenizer(run, sources)
    sets = load_sets(run, sources, tokenizer)
    check_pairs(s.loss, sets)
    start_records(run, sets)
    sft_done = s.sft_epochs and resumed == "dpo"
    source = run.out / "reference" / "sft" if sft_done else s.init_from
    model = load_model(run, source, tokenizer)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = sum(p.numel() for name, p in model.named_parameters() if ".lora." not in name)
    for name, dataset in sets.items():
        if max(dataset.tokens.max(), ~dataset.tokens.min()) >= model.config.vocab_size:
            raise SettingError(f"the {name} have token ids beyond the model's vocabulary")
    run.say(
        f"model: {size:,} parameters, {trained:,} trained, {run.dtype} on {run.world} "
        f"{run.device.type} process(es)"
    )
    if s.sft_epochs and not sft_done:
        sft, sft_eval = sets["sft"], sets.get("sft eval")
        stage = Stage("sft", "sft", sft, sft_eval, s.sft_epochs, s.sft_learning_rate, {})
        run_stage(stage, model, run)
        save_model(model, tokenizer, run.out / "reference" / "sft" if s.epochs else run.out, run)
    if not s.epochs:
        return

    # Before any state of this stage is resumed: the reference is the model that DPO starts from.
    names = ("beta", "label_smoothing", "alpha", "gamma", "sft_weight")
    options = {name: getattr(s, name) for name in names}
    pairs, held_out = sets["pairs"], sets.get("eval pairs")
    stage = Stage("dpo", s.loss, pairs, held_out, s.epochs, s.learning_rate, options)
    stage.reference = compute_reference(model, stage.train, run, "training pairs")
    if stage.eval:
        stage.eval_reference = compute_reference(model, stage.eval, run, "evaluation pairs")
    run_stage(stage, model, run)
    save_model(model, tokenizer, run.out, run)


def main():
    try:
        run = Run(parse_settings(sys.argv[1:]))
        train(run)
        run.say(f"saved {run.out}")
    except (SettingError, data.DataError, CheckpointError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        run.wait()
        gc.collect()  # nothing may hold gloo's threads when the interpreter ends, or it can abort
        dist.destroy_process_group()
    s = run.settings
    reference = run.out / "reference" / "sft" if s.sft_epochs else s.init_from
    wanted = s.data == "reviews" and s.epochs and s.review_samples
    if wanted and reference and run.rank == 0:
        report = Path(__file__).parent / "experiments" / "reviews.py"
        command = [sys.executable, report, "report", run.out, reference]
        command.append(f"--count={s.review_samples}")
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
