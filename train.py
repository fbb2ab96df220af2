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
import difflib
import hashlib
import inspect
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import data
import dpo
from model import CheckpointError, ModelConfig, Transformer, load_pretrained, save_pretrained


@dataclass(frozen=True)
class Settings:
    data: str = "reviews"  # built-in experiment, or preference files .jsonl[.gz], comma-separated
    eval_data: str = ""  # held-out preference files; the built-in experiment brings its own
    sft_data: str = ""  # what SFT trains on: files with prompt, response (none: chosen responses)
    init_from: str = ""  # checkpoint directory to start from (none: a new model)
    tokenizer: str = ""  # SentencePiece model for a new model (none: trained on the data)
    out_dir: str = "out/reviews"  # directory of the run
    # objective
    loss: str = "dpo"  # dpo or ipo
    beta: float = 0.1  # strength of the KL to the reference
    label_smoothing: float = 0.0  # rate at which labels are taken to be flipped (conservative DPO)
    # optimisation
    optimizer: str = "adamw"  # adamw, or rmsprop as in the paper
    learning_rate: float = 1e-6  # peak of the DPO stage
    sft_learning_rate: float = 1e-5  # peak of the SFT stage
    lr_schedule: str = "linear"  # after the warmup: constant, linear or cosine (both to 0)
    warmup_steps: int = 20  # of linear warmup, in each stage
    weight_decay: float = 0.0  # decoupled, on matrices; adamw only
    grad_clip: float = 1.0  # largest norm of a step's gradient; 0: no clipping
    batch_size: int = 64  # pairs (SFT: demonstrations) per optimizer step, over all ranks
    epochs: int = 1  # of the DPO stage
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
    review_labels: str = "bradley_terry"  # noisy labels, or deterministic by the true reward
    # running
    dtype: str = "auto"  # of matrix products: bfloat16, float32; auto: bfloat16 on CUDA only
    compile: bool = False  # torch.compile each block
    activation_checkpointing: bool = False  # recompute each block in the backward pass
    log_every: int = 25  # steps
    eval_every: int = 0  # steps; 0: before and after each stage only
    save_every: int = 0  # steps between states that --resume can continue from; 0: none
    resume: bool = False  # continue the run in out_dir from its last saved state
    wandb: str = "disabled"  # Weights & Biases: disabled, offline or online


# What the built-in experiment changes, where the command line does not: a small model from nothing.
REVIEWS = {"beta": 1.0, "batch_size": 32, "learning_rate": 2.5e-4, "sft_learning_rate": 4e-3}
CHOICES = {
    "loss": [name for name in dpo.LOSSES if name != "sft"],
    "optimizer": ["adamw", "rmsprop"],
    "lr_schedule": ["constant", "linear", "cosine"],
    "review_labels": ["bradley_terry", "deterministic"],
    "dtype": ["auto", "bfloat16", "float32"],
    "wandb": ["disabled", "offline", "online"],
}


MAY_CHANGE = {"resume", "log_every", "eval_every", "save_every", "wandb"}  # when resuming


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
    """Command line -> Settings. Each setting's help is its comment above. Raises SettingError."""
    parser = Parser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    comments = dict(
        (line.split(":")[0].strip(), line.split("  # ")[1])
        for line in inspect.getsource(Settings).splitlines()
        if "  # " in line
    )
    for field in dataclasses.fields(Settings):
        default = f"(default {field.default}"
        default += f"; {REVIEWS[field.name]} for --data=reviews)" if field.name in REVIEWS else ")"
        flag = {"nargs": "?", "const": True, "type": boolean} if field.type is bool else {}
        parser.add_argument(
            f"--{field.name}",
            default=argparse.SUPPRESS,
            metavar="|".join(CHOICES.get(field.name, [field.type.__name__])),
            help=f"{comments[field.name]} {default}",
            choices=CHOICES.get(field.name),
            **({"type": field.type} | flag),
        )
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].split("=")[0]
        close = difflib.get_close_matches(
            name, [f"--{f.name}" for f in dataclasses.fields(Settings)]
        )
        hint = f"did you mean {close[0]}?" if close else "--help lists the settings"
        raise SettingError(f"unknown setting {name}: {hint}")
    given = vars(given)
    preset = REVIEWS if given.get("data", Settings.data) == "reviews" else {}
    settings = Settings(**(preset | given))
    check_settings(settings, set(given))
    return settings


def check_settings(s: Settings, given: set[str]):
    """Refuse values out of range, and settings that would be ignored."""
    for field in dataclasses.fields(s):
        value, name = getattr(s, field.name), field.name
        if field.type in (int, float) and not (math.isfinite(value) and value >= 0):
            raise SettingError(f"--{name} must be at least 0, found {value}")
    for name in (
        "beta",
        "batch_size",
        "micro_batch_tokens",
        "max_prompt_length",
        "log_every",
        "epochs",
    ):
        if getattr(s, name) == 0:
            raise SettingError(f"--{name} must be greater than 0")
    if s.max_prompt_length >= s.max_length:
        raise SettingError(
            "--max_prompt_length must be less than --max_length: responses need room"
        )
    if s.label_smoothing >= 0.5:
        raise SettingError("--label_smoothing must be less than 0.5: at 0.5 labels say nothing")
    new_model = {"tokenizer", "vocab_size", "hidden_size", "num_layers", "num_heads"}
    builtin = {name for name in given if name.startswith("review_")}
    ignored = [
        (given & new_model, s.init_from, "--init_from brings its own"),
        (given & {"vocab_size"}, s.tokenizer, "--tokenizer brings its own"),
        (given & {"eval_data", "sft_data"}, s.data == "reviews", "--data=reviews brings its own"),
        (builtin, s.data != "reviews", "it belongs to --data=reviews"),
        (given & {"sft_data", "sft_learning_rate"}, s.sft_epochs == 0, "--sft_epochs is 0"),
        (given & {"weight_decay"}, s.optimizer == "rmsprop", "--optimizer=rmsprop has none here"),
        (
            given & {"eval_every"},
            s.data != "reviews" and not s.eval_data,
            "there is no --eval_data",
        ),
        (given & {"label_smoothing"} - dpo.needs(s.loss), True, f"--loss={s.loss} does not use it"),
    ]
    for names, applies, reason in ignored:
        if names and applies:
            raise SettingError(f"--{min(names)} would be ignored: {reason}")
    if not s.init_from and (s.num_heads == 0 or s.hidden_size % (2 * s.num_heads)):
        raise SettingError("--hidden_size must be a multiple of twice --num_heads")


class Machine:
    """This process among its ranks: device, precision, and the few collectives there are."""

    def __init__(self, settings: Settings):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cpu")
        if cuda:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if "RANK" in os.environ:
            dist.init_process_group("nccl" if cuda else "gloo")
        self.dtype = settings.dtype if settings.dtype != "auto" else ("float32", "bfloat16")[cuda]
        # The one mechanism for bf16: float32 master weights, matrix products under autocast.
        self.autocast = contextlib.nullcontext
        if self.dtype == "bfloat16":
            self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, float64. (all ranks)"""
        values = values.to(self.device, torch.float64)
        if self.world > 1:
            dist.all_reduce(values)
        return values.cpu()

    def wait(self):
        """(all ranks)"""
        if self.world > 1:
            dist.barrier()

    def peak_memory(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux: KiB


class Log:
    """Rank 0's terminal, metrics.jsonl and Weights & Biases; silent on every other rank."""

    def __init__(self, settings: Settings, machine: Machine):
        self.main, self.wandb = machine.rank == 0, None
        if self.main:
            out = Path(settings.out_dir)
            out.mkdir(parents=True, exist_ok=True)
            self.file = open(
                out / "metrics.jsonl", "a" if settings.resume else "w", encoding="utf-8"
            )
        if self.main and settings.wandb != "disabled":
            import wandb

            wandb.init(project="dpo", name=out.name, mode=settings.wandb, dir=out,
                       config=dataclasses.asdict(settings))  # fmt: skip
            self.wandb = wandb

    def say(self, text: str):
        if self.main:
            print(text, flush=True)

    def metrics(self, row: dict):
        if self.main:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log(row)


def load_examples(settings: Settings, grammar: data.Reviews | None):
    """The text: SFT and preference examples, for training and for evaluation."""
    if grammar:
        deterministic = settings.review_labels == "deterministic"
        return (
            grammar.demonstrations(settings.review_demonstrations, "train"),
            grammar.demonstrations(2000, "eval"),
            grammar.preferences(settings.review_pairs, "train", deterministic),
            grammar.preferences(1000, "eval", deterministic),
        )

    def read(paths: str, load) -> list[data.Example]:
        return [example for path in paths.split(",") if path for example in load(path)]

    pairs = read(settings.data, data.load_preferences)
    eval_pairs = read(settings.eval_data, data.load_preferences)
    demonstrations = read(settings.sft_data, data.load_demonstrations)
    demonstrations = demonstrations or [data.demonstration(e) for e in pairs]
    return demonstrations, [data.demonstration(e) for e in eval_pairs], pairs, eval_pairs


def load_tokenizer(settings: Settings, machine: Machine, texts: list[data.Example]):
    """That of --init_from or --tokenizer, or one trained on the data; copied into the run."""
    path = Path(settings.out_dir) / "tokenizer.model"
    source = settings.tokenizer or settings.init_from and f"{settings.init_from}/tokenizer.model"
    if source:
        tokenizer = data.Tokenizer(source)
        if machine.rank == 0:
            path.write_bytes(tokenizer.proto)
        return tokenizer
    if machine.rank == 0 and not settings.resume:
        strings = (text for e in texts for text in (e.prompt, *e.responses))
        data.Tokenizer.train(strings, path, settings.vocab_size)
    machine.wait()
    return data.Tokenizer(path)


def load_model(settings: Settings, vocab_size: int, directory: str | Path) -> Transformer:
    """The checkpoint in `directory`, or without one a new model; whole, on the CPU."""
    if directory:
        return load_pretrained(directory)
    width = settings.hidden_size
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 32) * 32,  # Llama's 8/3, in multiples of 32
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        head_dim=width // settings.num_heads,
        max_position_embeddings=settings.max_length,
        tie_word_embeddings=True,
    )
    return Transformer(config).init_weights(settings.seed)


def distribute(model: Transformer, settings: Settings, machine: Machine) -> Transformer:
    """Device, activation checkpointing, compilation and FSDP2, all from outside the model."""
    model.to(machine.device).activation_checkpointing = settings.activation_checkpointing
    if settings.compile:
        for layer in model.layers:
            layer.compile(dynamic=True)
    if machine.world > 1:
        mesh = init_device_mesh(machine.device.type, (machine.world,))
        precision = MixedPrecisionPolicy(  # weights gathered in bf16, gradients summed in float32
            param_dtype=torch.bfloat16 if machine.dtype == "bfloat16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=precision)
    return model


def full_state(model: Transformer) -> dict:
    """The whole weights on the CPU of rank 0, {} on the others. (all ranks)"""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dcp_state.get_model_state_dict(model, options=options)


def save_model(model, tokenizer, directory: Path, machine: Machine):
    """Write a checkpoint directory in the Llama layout. (all ranks)"""
    weights = full_state(model)
    if machine.rank == 0:
        save_pretrained(model, directory, weights)
        (directory / "tokenizer.model").write_bytes(tokenizer.proto)
    machine.wait()


@dataclass
class Stage:
    """What differs between SFT and DPO; the loop is one and the same."""

    name: str
    loss: str
    train: data.Dataset
    eval: data.Dataset | None
    epochs: int
    learning_rate: float
    reference: torch.Tensor | None = None  # (responses,) log π_ref of the training responses
    eval_reference: torch.Tensor | None = None

    def count(self, examples: np.ndarray) -> int:
        """What a step's summed loss is divided by: its pairs, for SFT its response tokens."""
        if self.loss != "sft":
            return len(examples)
        best = self.train.trees[examples] - examples  # of each example, among all responses
        return int(self.train.response_lengths()[best].sum())


def micro_batches(dataset, plan: list, machine: Machine):
    """This rank's micro-batches of one step of the plan, on its device."""
    for examples in plan[machine.rank]:
        yield data.collate(dataset, examples).to(machine.device)


def whole_plan(dataset, settings: Settings, machine: Machine) -> list:
    """The plan of one pass over a data set without gradients: one step, in longer micro-batches."""
    lengths, budget = dataset.lengths(), 2 * settings.micro_batch_tokens
    return next(data.plan_epoch(lengths, len(lengths), budget, machine.world))


def compute_reference(model, dataset, settings: Settings, machine: Machine, log: Log, what: str):
    """log π_ref of every response, (responses,): from a cache, or by one pass over the data.

    The cache is looked for in this run and in those beside it, under a digest of weights, tokens
    and numerics: a sweep over β or over losses computes it once. (all ranks)
    """
    out = Path(settings.out_dir)
    numerics = f"{machine.dtype} on {machine.device.type}, torch {torch.__version__}"
    key = dpo.reference_key(model, dataset, numerics)
    responses = len(dataset.response_lengths())
    places = [out / "reference", *sorted(out.parent.glob("*/reference"))]
    values = dpo.find_reference(key, places, responses)
    found = machine.sum(torch.tensor([values is not None])).item() == machine.world
    if found:
        log.say(f"reference: {responses:,} log-probs of {what} reused ({key})")
    else:
        started = time.perf_counter()
        batches = micro_batches(dataset, whole_plan(dataset, settings, machine), machine)
        with machine.autocast():
            values, seen = machine.sum(dpo.reference_logps(model, batches, responses))
        assert (seen == 1).all(), "every response is visited exactly once, on one rank"
        values, seconds = values.float().numpy(), time.perf_counter() - started
        log.say(f"reference: {responses:,} log-probs of {what} computed in {seconds:.1f} s ({key})")
    if machine.rank == 0:
        (out / "reference").mkdir(exist_ok=True)
        np.save(out / "reference" / f"{key}.npy", values)
    machine.wait()
    return torch.from_numpy(values).to(machine.device)


def check_start(stage: Stage, model, plan: list, settings: Settings, machine: Machine, log: Log):
    """Before the first step the policy is the reference: check that the numbers say so. (all ranks)

    Raises SettingError if a log-ratio of the first step's responses is out of tolerance, or the
    loss is not what theory gives at a log-ratio of zero (ln 2 for DPO).
    """
    worst, loss, theory = torch.zeros(machine.world), torch.zeros(()), torch.zeros(())
    for batch in micro_batches(stage.train, plan, machine):
        with torch.no_grad(), machine.autocast():
            logps = dpo.sequence_logps(model, batch)
        reference = stage.reference[batch.response_ids]
        options = settings.beta, settings.label_smoothing
        loss += dpo.compute_loss(stage.loss, logps, batch, reference, *options)[0].cpu()
        theory += dpo.compute_loss(stage.loss, reference, batch, reference, *options)[0].cpu()
        gap = (logps - reference).abs().max().cpu()
        worst[machine.rank] = worst[machine.rank].maximum(gap)
    loss, theory, *worst = machine.sum(torch.stack([loss, theory, *worst])).tolist()
    pairs = sum(len(examples) for rank in plan for examples in rank)
    tolerance = 0.5 if machine.dtype == "bfloat16" else 0.01  # nats: other packing, other rounding
    log.say(
        f"step 0: {stage.loss} loss {loss / pairs:.6f}, in theory {theory / pairs:.6f}; "
        f"largest log-ratio {max(worst):.1e} nats, tolerance {tolerance}"
    )
    if not (max(worst) <= tolerance and abs(loss - theory) <= tolerance * max(abs(theory), pairs)):
        raise SettingError(
            f"at step 0 policy and reference must agree to {tolerance} nats, but differ by "
            f"{max(worst):.3g}: delete {settings.out_dir}/reference and compute it anew"
        )


def learning_rate(step: int, steps: int, peak: float, settings: Settings) -> float:
    """A pure function of the step (from 0), so that a resumed run needs no scheduler state."""
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    shape = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
    return peak * shape[settings.lr_schedule]


def make_optimizer(model, settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(model.parameters())
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, fused=True)


class Totals:
    """Sums over pairs, kept on the device: nothing waits for the GPU until they are asked for."""

    def __init__(self, machine: Machine):
        self.machine, self.sums, self.started, self.tokens = machine, {}, time.perf_counter(), 0

    def add(self, sums: dict, batch: data.Batch):
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.tokens += len(batch.tokens)

    def average(self, prefix: str) -> tuple[dict, dict]:
        """(metrics averaged over all pairs of all ranks, rates per second). (all ranks)"""
        values = [float(value) for value in (*self.sums.values(), self.tokens)]
        *values, tokens = self.machine.sum(torch.tensor(values, dtype=torch.float64)).tolist()
        sums = dict(zip(self.sums, values))
        seconds = time.perf_counter() - self.started
        rates = {"pairs_per_second": sums["pairs"] / seconds, "tokens_per_second": tokens / seconds}
        return {f"{prefix}/{k}": v for k, v in dpo.average_metrics(sums).items()}, rates


def evaluate(stage: Stage, model, settings: Settings, machine: Machine) -> dict:
    """The stage's metrics on its fixed evaluation set. (all ranks)"""
    totals, plan = Totals(machine), whole_plan(stage.eval, settings, machine)
    options = settings.beta, settings.label_smoothing
    with torch.no_grad(), machine.autocast():
        for batch in micro_batches(stage.eval, plan, machine):
            reference = (
                None if stage.eval_reference is None else stage.eval_reference[batch.response_ids]
            )
            logps = dpo.sequence_logps(model, batch)
            totals.add(dpo.compute_loss(stage.loss, logps, batch, reference, *options)[1], batch)
    return totals.average("eval")[0]


def train_step(stage: Stage, model, optimizer, plan: list, totals, settings, machine):
    """One optimizer step over the planned micro-batches; returns the gradient norm. (all ranks)"""
    count = stage.count(np.concatenate([examples for rank in plan for examples in rank]))
    options = settings.beta, settings.label_smoothing
    for n, batch in enumerate(micro_batches(stage.train, plan, machine), 1):
        if machine.world > 1:  # gradients are summed over the ranks once, after the last one
            model.set_requires_gradient_sync(n == len(plan[machine.rank]))
        reference = None if stage.reference is None else stage.reference[batch.response_ids]
        with machine.autocast():
            logps = dpo.sequence_logps(model, batch)
        loss, sums = dpo.compute_loss(stage.loss, logps, batch, reference, *options)
        # FSDP averages over ranks: times their number this is the sum over all pairs, divided by
        # the pairs of the step, however they are spread over ranks and micro-batches.
        (loss * machine.world / count).backward()
        totals.add(sums, batch)
    limit = settings.grad_clip or math.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    optimizer.zero_grad()
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def run_stage(stage: Stage, model, tokenizer, settings: Settings, machine: Machine, log: Log):
    """Train one stage to its end, from its start or from the state that --resume finds. (all ranks)"""
    lengths, batch_size = stage.train.lengths(), settings.batch_size
    per_epoch = math.ceil(len(lengths) / batch_size)
    steps = min(stage.epochs * per_epoch, settings.max_steps or math.inf)
    optimizer = make_optimizer(model, settings)
    first = load_resume(model, optimizer, settings) if resume_stage(settings) == stage.name else 0
    log.say(
        f"{stage.name}: {len(lengths):,} examples, {lengths.sum():,} tokens, {steps} steps of "
        f"{batch_size} ({per_epoch} an epoch)" + (f", from step {first}" if first else "")
    )

    def report(step: int, row: dict):
        log.metrics({"stage": stage.name, "step": step, "epoch": step / per_epoch} | row)

    if stage.eval and not first:
        report(0, evaluate(stage, model, settings, machine))
    totals, norms, begun = Totals(machine), [], time.perf_counter()
    plan = None
    for step in range(first, steps):
        epoch, within = divmod(step, per_epoch)
        if plan is None or within == 0:
            seed = (settings.seed, epoch) if settings.shuffle else None
            budget = settings.micro_batch_tokens
            plan = list(data.plan_epoch(lengths, batch_size, budget, machine.world, seed))
        rate = learning_rate(step, steps, stage.learning_rate, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if step == 0 and stage.reference is not None:
            check_start(stage, model, plan[0], settings, machine, log)
        norms.append(train_step(stage, model, optimizer, plan[within], totals, settings, machine))
        done = step + 1
        if done % settings.log_every == 0 or done == steps:
            row, rates = totals.average("train")
            row |= {
                "train/grad_norm": float(torch.stack(norms).mean()),
                "train/learning_rate": rate,
            }
            row |= rates | {"peak_memory_gib": machine.peak_memory()}
            report(done, row)
            left = (time.perf_counter() - begun) / (done - first) * (steps - done)
            log.say(progress(stage, done, steps, row, left))
            if not all(map(math.isfinite, row.values())):
                raise SettingError(
                    f"the {stage.name} loss is not finite at step {done}: lower its learning rate"
                )
            totals, norms = Totals(machine), []
        if stage.eval and (
            done == steps or settings.eval_every and done % settings.eval_every == 0
        ):
            row = evaluate(stage, model, settings, machine)
            report(done, row)
            log.say(f"{stage.name} step {done}/{steps}: " + describe(row))
        if settings.save_every and done % settings.save_every == 0 and done < steps:
            save_resume(stage.name, done, model, optimizer, settings, machine)


def describe(row: dict) -> str:
    names = (
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "rewards/chosen",
        "length_correlation",
    )
    return "  ".join(f"{key} {row[key]:.4f}" for key in row if key.partition("/")[2] in names)


def progress(stage: Stage, done: int, steps: int, row: dict, left: float) -> str:
    return (
        f"{stage.name} {done}/{steps}  {describe(row)}  lr {row['train/learning_rate']:.1e}  "
        f"{row['pairs_per_second']:.0f} pairs/s  {row['tokens_per_second']:.0f} tok/s  {left:.0f} s left"
    )


# The state to resume from: written beside the last one, then renamed.


def resume_state(model, optimizer) -> dict:
    weights, moments = dcp_state.get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def save_resume(stage: str, step: int, model, optimizer, settings: Settings, machine: Machine):
    """(all ranks)"""
    final = Path(settings.out_dir) / "resume"
    new, old = final.with_name("resume.new"), final.with_name("resume.old")
    if machine.rank == 0:
        shutil.rmtree(new, ignore_errors=True)
    machine.wait()
    dcp.save(resume_state(model, optimizer), checkpoint_id=new)
    machine.wait()
    if machine.rank == 0:
        (new / "progress.json").write_text(json.dumps({"stage": stage, "step": step}))
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        new.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    machine.wait()


def resume_progress(settings: Settings) -> dict:
    path = Path(settings.out_dir) / "resume" / "progress.json"
    if not path.is_file():
        raise SettingError(f"--resume: {path} not found; only a run with --save_every leaves it")
    return json.loads(path.read_text())


def resume_stage(settings: Settings) -> str | None:
    return resume_progress(settings)["stage"] if settings.resume else None


def load_resume(model, optimizer, settings: Settings) -> int:
    """Restore weights and moments; returns the number of steps already done. (all ranks)"""
    state = resume_state(model, optimizer)
    dcp.load(state, checkpoint_id=Path(settings.out_dir) / "resume")
    dcp_state.set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return resume_progress(settings)["step"]


def write_run(settings: Settings, machine: Machine, model, datasets: dict):
    """run.json: every setting as resolved, versions, digests. A resumed run must agree with it."""
    digests = {
        name: hashlib.sha256(dataset.tokens.tobytes() + dataset.trees.tobytes()).hexdigest()[:16]
        for name, dataset in datasets.items()
        if dataset
    }
    run = {
        "settings": dataclasses.asdict(settings),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "ranks": machine.world,
        "device": machine.device.type,
        "dtype": machine.dtype,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": digests,
    }
    path = Path(settings.out_dir) / "run.json"
    if settings.resume:
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in (run["settings"] | run["data"]).items():
            was = (before["settings"] | before["data"]).get(name)
            if was != value and name not in MAY_CHANGE:
                raise SettingError(
                    f"--resume: {name} is {value!r} now, but was {was!r} in this run"
                )
    elif machine.rank == 0:
        path.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def train(settings: Settings, machine: Machine):
    """Both stages, from the text to the final checkpoint."""
    log, out = Log(settings, machine), Path(settings.out_dir)
    grammar = data.Reviews(settings.seed) if settings.data == "reviews" else None
    texts = load_examples(settings, grammar)
    tokenizer = load_tokenizer(settings, machine, texts[0] + texts[2])
    encoded = []
    for examples, what in zip(texts, ("SFT", "SFT evaluation", "preferences", "evaluation")):
        limits = settings.max_length, settings.max_prompt_length
        encoded.append(data.encode_examples(examples, tokenizer, *limits) if examples else None)
        if examples:
            log.say(
                f"{what}: " + ", ".join(f"{n:,} {k}" for k, n in encoded[-1].counts.items() if n)
            )
    sft_train, sft_eval, pairs, eval_pairs = encoded

    resumed = resume_stage(settings)
    sft_done = resumed == "dpo" and settings.sft_epochs
    source = out / "reference" / "sft" if sft_done else settings.init_from
    model = load_model(settings, tokenizer.vocab_size, source)
    write_run(settings, machine, model, dict(zip(("sft", "sft_eval", "train", "eval"), encoded)))
    log.say(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {machine.dtype} on "
        f"{machine.world} × {machine.device.type}"
    )
    model = distribute(model, settings, machine)
    if settings.sft_epochs and not sft_done:
        stage = Stage(
            "sft", "sft", sft_train, sft_eval, settings.sft_epochs, settings.sft_learning_rate
        )
        run_stage(stage, model, tokenizer, settings, machine, log)
        save_model(model, tokenizer, out / "reference" / "sft", machine)

    # Before any state is resumed: the reference is the model that DPO starts from.
    stage = Stage("dpo", settings.loss, pairs, eval_pairs, settings.epochs, settings.learning_rate)
    arguments = settings, machine, log
    stage.reference = compute_reference(model, pairs, *arguments, "the training pairs")
    if eval_pairs:
        stage.eval_reference = compute_reference(
            model, eval_pairs, *arguments, "the evaluation pairs"
        )
    run_stage(stage, model, tokenizer, *arguments)
    save_model(model, tokenizer, out, machine)
    log.say(f"saved {out}")


def main():
    try:
        settings = parse_settings(sys.argv[1:])
        machine = Machine(settings)
        train(settings, machine)
    except (SettingError, data.DataError, CheckpointError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()
    if settings.data == "reviews" and machine.rank == 0:
        reference = (
            f"{settings.out_dir}/reference/sft" if settings.sft_epochs else settings.init_from
        )
        sampler = Path(__file__).with_name("sample.py")
        options = [settings.out_dir, f"--compare={reference}", "--report"]
        subprocess.run([sys.executable, sampler, *options], check=True)


if __name__ == "__main__":
    main()
