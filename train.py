"""SFT, then DPO: `python train.py`, or on several processes `torchrun --nproc_per_node=N train.py`.

Without --data it runs the built-in experiment from nothing (--beta=1, larger rates); with
--data=pairs.jsonl --init_from=DIR it tunes a checkpoint on your preferences. --help lists all.
"""

import argparse
import contextlib
import dataclasses
import gc
import inspect
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import dpo
import model as llm


@dataclasses.dataclass(frozen=True)
class Settings:
    data: str = "reviews"  # built-in experiment, or preference files .jsonl[.gz], comma-separated
    eval_data: str = ""  # held-out preference files
    sft_data: str = ""  # what SFT trains on: files with prompt, response (none: chosen responses)
    init_from: str = ""  # checkpoint directory to start from (none: a new model)
    tokenizer: str = ""  # tokenizer.model or .json of a new model (none: trained on the data)
    out_dir: str = "out/reviews"  # directory of the run
    resume: bool = False  # go on with the run in out_dir from its last state, by its settings
    loss: str = "dpo"  # or one of extra/objectives.py, whose options are flags: --gamma=0.5
    beta: float = 0.1  # strength of the KL to the reference; some losses have another default
    sft_weight: float = 0.0  # of an added SFT term, the chosen response's NLL per token
    optimizer: str = "adamw"  # adamw, or rmsprop as in the paper
    learning_rate: float = 1e-6  # peak of the DPO stage
    sft_learning_rate: float = 1e-5  # peak of the SFT stage
    lr_schedule: str = "linear"  # after the warmup: constant, linear or cosine (both to 0)
    warmup_steps: int = 20  # of linear warmup, in each stage; at most half of its steps
    weight_decay: float = 0.0  # decoupled, on matrices; adamw only
    grad_clip: float = 1.0  # largest norm of a step's gradient; 0: no clipping
    batch_size: int = 64  # pairs (SFT: demonstrations) per step, over all ranks
    epochs: int = 1  # of the DPO stage; 0: none, stop after SFT
    sft_epochs: int = 1  # of the SFT stage; 0: none, DPO starts from init_from
    max_steps: int = 0  # stop each stage after so many steps; 0: all epochs
    shuffle: bool = True  # a new order each epoch
    seed: int = 0  # of initialisation, order of the data and built-in data
    max_length: int = 512  # tokens of prompt and response; a longer response loses its end
    max_prompt_length: int = 256  # tokens of the prompt; a longer one loses its beginning
    rendered: bool = False  # texts are chats that a template wrote: read their control tokens
    micro_batch_tokens: int = 4096  # tokens of one forward and backward pass on each rank
    skip_bad_rows: int = 0  # go on past so many unusable rows of each set of data; 0: stop there
    vocab_size: int = 640  # of a tokenizer trained here, at most
    hidden_size: int = 128  # width of a new model
    num_layers: int = 2  # layers of a new model
    num_heads: int = 4  # attention heads of a new model
    dtype: str = "auto"  # of matrix products: bfloat16, float32; auto: bfloat16 on CUDA
    lora_rank: int = 0  # train adapters of this rank only (extra/lora.py); 0: all weights
    save_adapter: bool = False  # write the adapters, too, to out_dir/adapter, as peft does
    compile: bool = False  # torch.compile each block
    activation_checkpointing: bool = False  # recompute each block in the backward pass
    log_every: int = 25  # steps between rows of metrics
    eval_every: int = 0  # steps between evaluations; 0: before and after each stage
    sample_every: int = 0  # steps between samples of three held-out prompts; 0: none
    save_every: int = 0  # steps between states that --resume goes on from; 0: none
    wandb: str = "disabled"  # Weights & Biases: disabled, offline or online
    options: dict = dataclasses.field(default_factory=dict)  # of the loss


def parse_settings(arguments: list[str]) -> Settings:
    """Command line -> Settings; the help of each is its comment above. Raises DataError."""
    layout = {"formatter_class": argparse.RawTextHelpFormatter, "usage": argparse.SUPPRESS}
    layout |= {"argument_default": argparse.SUPPRESS, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **layout)
    lines = [line for line in inspect.getsource(Settings).splitlines() if "  # " in line]
    comments = {line.split(":")[0].strip(): line.split("  # ")[1] for line in lines}
    for field in dataclasses.fields(Settings)[:-1]:
        kind = {"type": field.type, "help": f"{comments[field.name]} (default {field.default!r})"}
        if field.type is bool:  # --resume is --resume=true
            kind |= {"choices": [True, False], "nargs": "?", "const": True}
            kind["type"] = {"true": True, "false": False}.get
        parser.add_argument(f"--{field.name}", **kind)
    given, point = vars(parser.parse_known_args(arguments)[0]), {}
    if given.get("resume"):
        point = read_point(Path(given.get("out_dir", Settings.out_dir)))
    base = dict(point.get("settings", {}))
    loss = dpo.find_loss((base | given).get("loss", Settings.loss))  # whose options are flags, too
    _, beta, *options = inspect.signature(loss).parameters.values()
    if beta.default is not beta.empty:
        base.setdefault("beta", beta.default)
    saved, base["options"] = base.get("options", {}), {}
    for option in options:
        base["options"][option.name] = saved.get(option.name, option.default)
        parser.add_argument(f"--{option.name}", type=float)
    given = vars(parser.parse_args(arguments))
    known = base | given
    known["options"] = {name: known.pop(name, default) for name, default in base["options"].items()}
    settings = Settings(**{name: known[name] for name in comments if name in known})
    with contextlib.suppress(ImportError):
        from extra.refusals import check  # what is out of range, or would be ignored

        check(settings, given, point)
    return settings


class Run:
    """This process: settings, rank, device and precision, and where rank 0 reports."""

    def __init__(self, settings: Settings):
        self.settings, self.out, self.wandb = settings, Path(settings.out_dir), None
        self.since, self.counts = 0.0, Counter()  # for `rates`
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        other = "mps" if mps and self.world == 1 else "cpu"  # gloo, for several, has no mps
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else other)
        # The one mechanism for bf16: float32 master weights, matrix products under autocast.
        self.bf16 = settings.dtype == "bfloat16" or (settings.dtype == "auto" and cuda)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        if cuda:
            torch.cuda.set_device(self.device)
        self.mean_logratio = dpo.double(torch.zeros((), device=self.device))  # the last step's
        if self.world > 1:
            patience = timedelta(hours=4)  # while rank 0 encodes a large file
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience)
        self.about = {"settings": dataclasses.asdict(settings), "ranks": self.world}
        # Stand-ins: extra/guard.py saves and loads states, and a signal ends what is watched.
        self.save_state, self.load_state = lambda *_: None, lambda *_: (0, Counter())
        self.watch, self.saved_if_stopped = lambda items, *_: items, contextlib.nullcontext()
        self.save, self.restore, self.memory = lambda: None, dict, dict
        self.look = lambda stage, step, steps, model: None  # at the model, after so many steps
        with contextlib.suppress(ImportError):
            from extra.guard import protect

            protect(self)
        self.point = self.alone(self.begin)  # what the last state says, if the run goes on from it

    def begin(self) -> dict:
        """Make or find the directory of the run. (rank 0)"""
        (self.out / "encoded").mkdir(parents=True, exist_ok=True)
        point = self.restore()
        if not point:
            (self.out / "metrics.jsonl").write_text("")
            llm.write_whole(self.out / "run.json", json.dumps(self.about, indent=2).encode())
        if (mode := self.settings.wandb) != "disabled":
            import wandb

            where = {"project": "dpo", "name": self.out.name, "dir": self.out}
            self.wandb = wandb.init(**where, mode=mode, config=self.about["settings"])
        return point

    def alone(self, work: Callable, *inputs):
        """What rank 0 gets from it, for all ranks. (all ranks)"""
        found = [work(*inputs) if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def total(self, sums: dict) -> dict[str, torch.Tensor]:
        """The sums over the ranks, in one all_reduce in float64. (all ranks)"""
        values = dpo.double(torch.stack([x.to(self.device) for x in sums.values()]))
        if self.world > 1:
            dist.all_reduce(values)
        return dict(zip(sums, values))

    def rates(self) -> dict[str, float]:
        """What was counted, a second since the last call; and the most memory so far."""
        seconds, self.since = time.perf_counter() - self.since, time.perf_counter()
        rates = {f"{name}_per_second": float(n) / seconds for name, n in self.counts.items()}
        self.counts.clear()
        return rates | self.memory()

    def skip(self, stage: str, step: int, *_):
        """A step without a finite loss and gradient. Raises DataError. (all ranks)"""
        raise data.DataError(f"{stage} diverged by step {step + 1}: lower its learning rate")

    def say(self, text: str):
        if self.rank == 0:
            print(text, flush=True)

    def record(self, stage: str, row: dict, note: str = ""):
        """A row of metrics, to the terminal, metrics.jsonl and Weights & Biases."""
        shown = ("/loss", "/rewards/accuracies", "/rewards/margins", "/rewards/chosen")
        words = [f"{name} {row[name]:.4g}" for name in row if name.endswith(shown)]
        self.say("  ".join([f"{stage} {row['step']}", *words, note]))
        if not all(map(math.isfinite, row.values())):
            self.skip(stage, row["step"] - 1)
        if self.rank == 0:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": stage} | row) + "\n")
        if self.wandb:
            self.wandb.log({f"{stage}/{name}": value for name, value in row.items()})


def load_data(run: Run) -> tuple[data.Tokenizer | None, dict[str, data.Dataset]]:
    """The tokenizer, and, encoded, what both stages learn and are evaluated on. (all ranks)"""
    s, sets, encode = run.settings, {}, lambda run, name, *inputs: data.encode(*inputs)
    with contextlib.suppress(ImportError):
        from extra.encoded import encode_once as encode  # on disk, for all ranks
    if not (s.init_from or s.tokenizer or run.point):
        examples = data.read_examples(s.sft_data or s.data, "demonstrations", s.skip_bad_rows)
        run.alone(data.Tokenizer.train, examples, run.out / "encoded", s.vocab_size)
    find = data.find_tokenizer if s.init_from else data.Tokenizer
    tokenizer = run.tokenizer = find(s.init_from or s.tokenizer or run.out / "encoded")
    if tokenizer:
        tokenizer.rendered = s.rendered
    for name, paths, kind, epochs in (
        ("sft", s.sft_data or s.data, "demonstrations", s.sft_epochs),
        ("sft eval", s.eval_data, "demonstrations", s.sft_epochs),
        ("pairs", s.data, "preferences", s.epochs),
        ("eval pairs", s.eval_data, "preferences", s.epochs),
    ):
        if paths and epochs:
            examples = data.read_examples(paths, kind, s.skip_bad_rows)
            inputs = examples, tokenizer, s.max_length, s.max_prompt_length
            sets[name], counts = encode(run, name, *inputs)
            found = [f"{count:,} {what}" for what, count in counts.items() if count]
            run.say(f"{name}: {', '.join(found)} in {paths}")
    return tokenizer, sets


def load_model(run: Run, directory: str | Path, new: llm.ModelConfig | None) -> llm.Transformer:
    """The checkpoint in `directory`, or a new model, on its device, sharded before it has memory:
    each rank reads its own rows. (all ranks)"""
    s = run.settings
    with torch.device("meta"):
        model = llm.Transformer(new or llm.load_config(directory))
    made = lambda: llm.Transformer(new).init_weights(s.seed).state_dict()
    weights = made() if new else llm.read_weights(directory)
    if s.lora_rank:
        from extra import lora

        weights |= lora.add(model, s.lora_rank, s.seed)
    model.activation_checkpointing = s.activation_checkpointing
    for layer in model.layers if s.compile else ():
        layer.compile(dynamic=True)
    if run.world > 1:
        llm.shard(model, run.device.type, run.world, torch.bfloat16 if run.bf16 else None)
    return llm.fill(model.to_empty(device=run.device), weights)


def save_model(model, tokenizer, directory: Path, run: Run):
    """Write a checkpoint directory, one whole weight at a time. (all ranks)"""
    prepare = complete = lambda *_: None
    with contextlib.suppress(ImportError):
        from extra.checkpoints import complete  # with what other programs want beside it
        from extra.guard import prepare  # merges adapters, refuses what has diverged
    prepare(model, directory, run)
    llm.save_pretrained(model, directory, writes=run.rank == 0)
    if tokenizer and run.rank == 0:
        llm.write_whole(directory / f"tokenizer{tokenizer.path.suffix}", tokenizer.proto)
    run.alone(complete, directory, tokenizer, run)


def micro_batches(dataset, examples, run: Run, factor: int = 1) -> Iterator[data.Batch]:
    """This rank's micro-batches of the examples, as many as each rank has. On CUDA each is made
    and copied while the GPU still works on the last one."""
    inputs = dataset.lengths, examples, factor * run.settings.micro_batch_tokens, run.world
    for part in run.watch(data.pack(*inputs)[run.rank]):
        yield data.collate(dataset, part).to(run.device)


def with_reference(dataset, model, checkpoint: str | Path, run: Run) -> data.Dataset:
    """The data set with log π_ref of every response, computed once, by one pass. (all ranks)"""
    count, kept = dataset.responses(), lambda compute, *_: compute(np.arange(len(dataset)))
    with contextlib.suppress(ImportError):
        from extra.kept import kept  # computed once by a sweep from one checkpoint, and checked

    def logps(examples: np.ndarray, factor: int = 2) -> torch.Tensor:
        batches = micro_batches(dataset, examples, run, factor)
        with run.autocast:
            return run.total({"": dpo.reference_logps(model, batches, count).float()})[""].cpu()

    values = kept(logps, dataset, model, checkpoint, run)
    return dataclasses.replace(dataset, reference=values.float().numpy())


def train_stage(stage: str, model, train, held_out, loss_of, epochs: int, peak: float, run: Run):
    """Train to the end of a stage, from its start or a state. (all ranks) SFT and DPO differ in
    their data and in `loss_of(log-probs, batch)`: summed loss, and sums for the metrics."""
    s = run.settings
    optimizer = dpo.make_optimizer(model, s.optimizer, s.weight_decay)
    per_epoch = math.ceil(len(train) / s.batch_size)
    steps = min(epochs * per_epoch, s.max_steps or math.inf)
    first, totals = run.load_state(stage, model, optimizer)
    run.say(f"{stage}: {len(train):,} examples, steps {first} to {steps} of {s.batch_size}")
    run.since = time.perf_counter()
    run.save = lambda: run.save_state(stage, step, totals, model, optimizer)
    for step in range(first, steps + 1):  # of which so many are done
        paused = time.perf_counter()
        if s.save_every and step % s.save_every == 0 and first < step < steps:
            run.save()
        if held_out and (step in (0, steps) or (s.eval_every and step % s.eval_every == 0)):
            batches = micro_batches(held_out, np.arange(len(held_out)), run, 2)
            run.record(stage, {"step": step} | dpo.evaluate(model, batches, loss_of, run))
        run.look(stage, step, steps, model)
        run.since += time.perf_counter() - paused
        if step == steps:
            break
        # Which examples: a pure function of the step, as is which of them are this rank's.
        order = data.order_of(step // per_epoch, len(train), s.seed if s.shuffle else None)
        examples = order[step % per_epoch * s.batch_size :][: s.batch_size]
        for group in optimizer.param_groups:
            group["lr"] = peak * dpo.schedule(s.lr_schedule, s.warmup_steps, step, steps)
        # FSDP averages over ranks: times their number this is the sum over the step's examples,
        # divided by their number (SFT: of tokens), whatever the ranks and the micro-batches.
        scale = run.world / (len(examples) if stage == "dpo" else train.targets(examples))
        batches = micro_batches(train, examples, run)
        sums = dpo.take_step(model, optimizer, batches, loss_of, scale, s.grad_clip, run)
        totals.update(sums)
        if not sums:
            run.skip(stage, step, train, examples)
        run.counts.update(pairs=len(examples), tokens=train.lengths[examples].sum())
        if stage == "dpo" and sums:
            run.mean_logratio.copy_(dpo.mean_logratio(sums, s.beta))
        done = step + 1
        if done % s.log_every == 0 or done == steps:
            row = {"step": done, "epoch": done / per_epoch, "train/learning_rate": group["lr"]}
            row |= dpo.averages(totals, "train") | run.rates()
            left = (steps - done) * s.batch_size / row["pairs_per_second"]
            run.record(stage, row, f"{row['pairs_per_second']:.0f} pairs/s, {left:.0f} s left")
            totals.clear()


def read_point(out: Path) -> dict:
    """What the last state of the run there says; {} if there is none."""
    with contextlib.suppress(ImportError):
        from extra.states import newest

        return newest(out, whole=False)
    path = out / "run.json"  # without that room from its beginning
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def train(run: Run):
    """Both stages, from the text to the final checkpoint. (all ranks)"""
    s, sft_dir = run.settings, run.out / "sft"  # what DPO starts from
    if run.point.get("stage") == "done":
        return run.say(f"{run.out}: this run is finished")
    tokenizer, sets = load_data(run)
    vocab_size = 1 + max(int(dataset.tokens.max()) for dataset in sets.values())
    sft_done = run.point.get("stage") == "dpo" and s.sft_epochs > 0
    start, new = sft_dir if sft_done else s.init_from, None
    if not start:
        shape = max(vocab_size, tokenizer.vocab_size), s.hidden_size, s.num_layers, s.num_heads
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        new = llm.ModelConfig.new(*shape, max_position_embeddings=s.max_length, **ids)
    model = load_model(run, start, new)
    if vocab_size > model.config.vocab_size:
        raise data.DataError(f"token id {vocab_size - 1} is beyond the model's vocabulary")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.say(f"{trained:,} parameters are trained, on {run.world} {run.device.type} process(es)")
    if s.sft_epochs and not sft_done:
        both = sets["sft"], sets.get("sft eval")
        train_stage("sft", model, *both, dpo.sft_loss, s.sft_epochs, s.sft_learning_rate, run)
        save_model(model, tokenizer, sft_dir if s.epochs else run.out, run)
        run.save_state("dpo" if s.epochs else "done", 0)
    if s.epochs:
        options = {"loss": dpo.find_loss(s.loss), "beta": s.beta, "sft_weight": s.sft_weight}
        options |= {"mean_logratio": run.mean_logratio, **s.options}
        loss_of = partial(dpo.preference_loss, **options)
        checkpoint = sft_dir if s.sft_epochs else s.init_from
        both = (sets.get(name) for name in ("pairs", "eval pairs"))
        both = [dataset and with_reference(dataset, model, checkpoint, run) for dataset in both]
        train_stage("dpo", model, *both, loss_of, s.epochs, s.learning_rate, run)
        save_model(model, tokenizer, run.out, run)
        run.save_state("done", 0)
    run.say(f"saved {run.out}")


def main(arguments: list[str]):
    reader = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    reader.add_argument("--data", default=Settings.data)
    given, others = reader.parse_known_args(arguments)
    if given.data == Settings.data:
        from experiments.reviews import run_experiment

        return run_experiment(others)
    try:
        run = Run(parse_settings(arguments))
        with run.saved_if_stopped:
            train(run)
    except (data.DataError, llm.CheckpointError, OSError, ImportError) as error:  # on any rank
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    if run.world > 1:
        dist.barrier()
        gc.collect()  # nothing may hold gloo's threads when the interpreter ends
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
