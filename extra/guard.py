"""What keeps a run and its directory from harm: a lock, signals, digests of all that it reads, and
sentences in place of tracebacks.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from data import DataError
from extra.checkpoints import places_of
from extra.files import first_bytes
from extra.reading import parse_json, read_bytes, size_of
from model import CheckpointError, load_config, write_whole

HELD = WeakValueDictionary()  # the locks of this process, by the paths of the directories
STATUS = Path("/proc/self/status")  # of Linux
SIGNALS = (signal.SIGTERM, signal.SIGINT)
MISTAKES = (DataError, CheckpointError, OSError, ImportError)
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
LARGE, UNMOVED = 1e3, 1e-4  # root mean square of weights; share of the loss
FAR = 0.01  # of a mean reward, in nats


class Stopped(Exception):
    """A signal asked for it; the message is its name."""


def protect(run):
    """Hold the run's directory, catch signals, and make what fails on one rank known to all.

    It gives the run what `train.Run` only has the outlines of.
    Raises DataError if another run works in that directory.
    """
    from extra import states

    run.signal, run.handlers = 0, {}
    run.watch = lambda items, together=True: watch(run, items, together)
    run.alone = lambda work, *inputs: alone(run, work, *inputs)
    run.saved_if_stopped = saved_if_stopped(run)
    run.skipped, run.skip = {}, partial(skip, run)
    run.save_state, run.load_state = partial(states.save, run), partial(states.load, run)
    run.restore, run.memory = partial(states.restore, run), peak_memory
    if run.settings.sample_every:
        from extra.samples import look

        run.look = partial(look, run)
    catch_signals(run)
    run.alone(begin, run)


def begin(run):
    run.lock = hold(run.out)
    if not run.settings.resume:
        refuse_missing(run.settings)
    found = digests(run.settings)
    run.about |= {"torch": torch.__version__, "cwd": os.getcwd(), "digests": found}
    if run.settings.resume:
        from extra.states import newest

        before = newest(run.out, whole=False).get("digests", found)
        for name in sorted(found.keys() | before.keys()):
            if found.get(name) != before.get(name):
                for path in filter(None, getattr(run.settings, name).split(",")):
                    if not os.path.exists(path):
                        raise DataError(f"--resume: {path}: --{name} names it, but it is not there")
                what = f"what --{name} names is not what this run began with"
                raise DataError(f"--resume: {what}: begin another run, in another --out_dir")
        if before is not found and not is_json(run.out / "run.json"):  # it was lost, or torn
            write_whole(run.out / "run.json", json.dumps(run.about, indent=2).encode())


def refuse_missing(s):
    """What a setting names but is not there, before the run that is in the directory is forgotten.
    Raises DataError, CheckpointError."""
    for path in filter(None, ",".join((s.data, s.eval_data, s.sft_data)).split(",")):
        if not os.path.exists(path):
            first_bytes(path)  # which says what is to be done
    if s.init_from:
        load_config(s.init_from)
    if s.tokenizer and not os.path.exists(s.tokenizer):
        raise DataError(f"{s.tokenizer}: cannot be read (--tokenizer: there is no such file)")


def is_json(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return isinstance(parse_json(read_bytes(path)), dict)
    return False


def hold(out: Path):
    """Keep other runs out of a directory, which is made, for as long as what this returns is there;
    the kernel frees the lock whatever ends the process. Raises DataError, OSError."""
    out.mkdir(parents=True, exist_ok=True)
    key = str(out.resolve())
    if key in HELD:
        return HELD[key]
    if (out / "lock").exists():
        size_of(out / "lock")  # to open a pipe might never end
    file = open(out / "lock", "a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{out}: another run works there: give another --out_dir") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        print(f"{out}: this file system has no locks: start no second run there", flush=True)
    HELD[key] = file
    return file


def catch_signals(run):
    """SIGTERM and SIGINT set `run.signal`, which every loop looks at. A second one, over a second
    after the first (a launcher may repeat it at once), ends the process."""
    first = None

    def handle(number, _):
        nonlocal first
        if first and time.monotonic() - first > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        first = first or time.monotonic()
        run.signal = number

    if threading.current_thread() is threading.main_thread():  # no other may
        run.handlers = {number: signal.signal(number, handle) for number in SIGNALS}


def watch(run, items: Iterable, together: bool) -> Iterator:
    """The items of a loop, until a signal asks to stop: then raises Stopped, before the same item
    on all ranks that are at it together. They ask each other over the CPU: no GPU waits for it."""
    for item in items:
        asked = run.signal
        if run.world > 1 and together:
            of_any = torch.tensor(asked)
            dist.all_reduce(of_any, dist.ReduceOp.MAX)
            asked = int(of_any)
        if asked:
            raise Stopped(signal.Signals(asked).name)
        yield item


def alone(run, work: Callable, *inputs):
    """What rank 0 gets from it, for all ranks; what fails there, fails on all. (all ranks)"""
    outcome = [None, None]
    if run.rank == 0:
        try:
            outcome[0] = work(*inputs)
        except (*MISTAKES, Stopped) as error:
            outcome[1] = error
    if run.world > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1]:
        if run.rank > 0 and not isinstance(outcome[1], Stopped):
            sys.exit(2)  # rank 0 says why
        raise outcome[1]
    return outcome[0]


@contextlib.contextmanager
def saved_if_stopped(run):
    """Save a state when a signal ends what is done in it; and one sentence in place of exceptions
    that are no mistake in the code."""
    try:
        yield
    except Stopped as stopped:
        run.save()
        if run.rank == 0:
            how = "the same command with --resume goes on from there"
            where = " step ".join(run.point["state"].split("-")) if run.point else "the beginning"
            print(f"train.py: stopped by {stopped} at {where}: {how}", file=sys.stderr)
        sys.exit(128 + signal.Signals[str(stopped)])
    except OSError as error:
        if error.filename is None and error.errno in FULL:  # write() does not say where
            raise DataError(f"{run.out}: cannot be written ({error.strerror})") from None
        raise
    except (MemoryError, RuntimeError) as error:
        reason = one_line(error) or "memory"
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in reason:
            mend = "lower --micro_batch_tokens, or use more GPUs"
            raise DataError(f"out of memory: {mend} ({reason})") from None
        if run.world > 1 and ("closed by peer" in reason or "reset by peer" in reason):
            raise DataError(f"rank {run.rank} stops, as another rank has ended") from None
        raise
    finally:
        for number, handler in run.handlers.items():
            signal.signal(number, handler)


def skip(run, stage: str, step: int, train=None, examples=()):
    """What is done about a step without a finite loss and gradient, which changed nothing: it is
    counted and logged, with the examples that were in it; ten in a row end the run, as does an
    evaluation that is not finite. (all ranks) Raises DataError."""
    steps = run.skipped.setdefault(stage, [])
    steps.append(step)
    if steps in ([-1], [*range(10)]):  # no step has changed anything yet
        what = f"{stage}: loss or gradient is not finite from the start"
        raise DataError(f"{what}: look at the weights that it starts from, and at --beta")
    if train is None or steps[-10:] == [*range(step - 9, step + 1)]:
        raise DataError(f"{stage} diverged by step {step + 1}: lower its learning rate")
    where = b", ".join(train.where[examples]).decode()
    row = {"step": step + 1, "train/skipped_steps": len(steps)}
    run.record(stage, row, f"is skipped, as loss or gradient is not finite: {where}")


def prepare(model, directory: Path, run):
    """Look at a model that is to be saved, and merge its adapters into it. (all ranks)

    Raises DataError for weights that no training leads to, as no loss is computed after the last
    step; says so if the whole stage has changed nothing.
    """
    weights = [parameter.detach() for parameter in model.parameters()]
    norm = torch.nn.utils.get_total_norm(weights)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    size = norm / sum(weight.numel() for weight in weights) ** 0.5
    if not size < LARGE:
        what = f"the model diverged: its weights, {size:.1e} by root mean square, are not saved"
        raise DataError(f"{what}: lower the learning rate")
    if run.rank == 0:
        say_if_unmoved(run.out / "metrics.jsonl")
    if run.settings.lora_rank:
        from extra.adapters import finish

        finish(model, directory, run)


def say_if_unmoved(metrics: Path):
    """If the loss of the last stage is what it was when it began, and its rewards, too: a loss that
    saturates, as KTO's, is the same again where the policy has run far away."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["stage"] == rows[-1]["stage"]]
    prefix = "eval" if any("eval/loss" in row for row in rows) else "train"
    rows = [row for row in rows if f"{prefix}/loss" in row]
    losses = [row[f"{prefix}/loss"] for row in rows]
    rewards = [row.get(f"{prefix}/rewards/chosen", 0.0) for row in rows]
    still = len(losses) > 1 and abs(rewards[-1] - rewards[0]) < FAR
    if still and abs(losses[-1] - losses[0]) < UNMOVED * abs(losses[0]):
        why = "is the learning rate too small, or the warmup as long as the run?"
        print(f"{rows[0]['stage']}: the loss has not moved from {losses[0]:.6g}: {why}", flush=True)


def peak_memory() -> dict[str, float]:
    """The most so far, in GiB, of the GPU; without CUDA what this process had in RAM."""
    return {"peak_memory_gib": (torch.cuda.max_memory_allocated() or most_resident()) / 2**30}


def most_resident() -> int:
    """The most RAM that this process had so far, in bytes. Linux's getrusage would count what the
    process that started this one had, too; its status is right within some pages of each core, so
    that a later answer may be a little smaller (proc_pid_status(5))."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 2**10
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes; elsewhere KiB
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def one_line(what, most: int = 200) -> str:
    """As one line of a message."""
    text = " ".join(str(what).split())
    return text if len(text) <= most else f"{text[:most]}…"


def sha256(path: Path) -> str:
    """Raises OSError, also for what is no file: a pipe might never end."""
    size_of(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(settings) -> dict[str, str]:
    """SHA-256 of the contents of what a setting names, where it is a file or a checkpoint."""
    found = {}
    for name in ("data", "eval_data", "sft_data", "tokenizer", "init_from"):
        paths = [Path(path) for path in getattr(settings, name).split(",") if path]
        if name in ("tokenizer", "init_from"):
            paths = [file for path in paths for file in files_of(path)]
        if paths and all(path.is_file() for path in paths):
            found[name] = hashlib.sha256("".join(map(sha256, paths)).encode()).hexdigest()
    return found


def files_of(checkpoint: Path) -> list[Path]:
    """Those that say what a checkpoint is: its weights, configuration and tokenizer."""
    if not checkpoint.is_dir():
        return [checkpoint]
    files = [file for place in places_of(checkpoint) for file in sorted(place.iterdir())]
    kinds = (".safetensors", ".bin", ".json", ".model", ".jinja", ".txt")
    files = [file for file in files if file.suffix in kinds and file.name != "run.json"]
    return [file for file in files if file.is_file()]
