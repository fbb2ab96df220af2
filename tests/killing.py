"""Kills train.py at every operation on files, and resumes it: `python tests/killing.py [WORD …]`

A process that has imported torch and train.py forks for every case, so that a whole toy run costs
less than a second. In the fork `open`, the writes to the files it gives, and what of `os` changes
files are counted; at the n-th (before it, and for a write also when half of it is on disk) the run
kills itself by SIGKILL, for every n. Then the same command with --resume must end bit for bit as
the run that nobody interrupted. This is the long form, all of it; with words only the parts whose
names have all of them. tests/test_killing.py takes a part of it, tests/test_states.py the rest.

Not counted are writes that do not go through Python's files (np.memmap, C++); there are none below
a run's directory as it is (strace sees the same files opened for writing, and as many fsyncs).
`--write-state` writes tests/state/.
"""

import builtins
import contextlib
import errno
import faulthandler
import fcntl
import functools
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
STATE = Path(__file__).parent / "state"  # written by `--write-state`, resumed by every later commit
PATIENCE = 300  # seconds after which a case is taken to hang
NEVER = 10**9

# What changes a directory, and what of its arguments are paths.
CHANGES = {"replace": 2, "rename": 2, "link": 2, "symlink": 2, "mkdir": 1, "rmdir": 1, "unlink": 1}
CHANGES |= {"remove": 1, "truncate": 1}
ON_DESCRIPTORS = ("fsync", "fdatasync", "ftruncate", "write", "pwrite")


# In the fork: what is counted, and where it ends.


class Points:
    """The operations on files below `root` of this process, from 1. At the n-th it gets a signal;
    or, if that is None, the disk is full from there on."""

    def __init__(self, root: Path, log: Path, at: int, number: int | None):
        self.root, self.at, self.number, self.count = str(root), at, number, 0
        self.log, self.write = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), os.write

    def inside(self, path, dir_fd: int | None = None) -> str | None:
        """The path below the root, or None: of another file."""
        if isinstance(path, int):
            path = path_of(path)
        elif dir_fd is not None:
            path = os.path.join(path_of(dir_fd), os.fsdecode(path))
        path = os.path.abspath(os.fsdecode(path))
        return os.path.relpath(path, self.root) if f"{path}/".startswith(f"{self.root}/") else None

    def point(self, what: str, path: str):
        self.count += 1
        self.write(self.log, f"{self.count} {what} {path}\n".encode())
        if self.count == self.at and self.number is not None:
            os.kill(os.getpid(), self.number)
        if self.count >= self.at and self.number is None and what in ("write", "half", "mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def install(self):
        """Put what counts in the place of what is counted."""
        for name, paths in CHANGES.items():
            setattr(os, name, self.counted(name, getattr(os, name), paths))
        for name in ON_DESCRIPTORS:
            setattr(os, name, self.counted(name, getattr(os, name), 1))
        os.open = self.counted_open(os.open)
        builtins.open = io.open = functools.wraps(open)(functools.partial(opened, self, io.open))
        shutil._USE_CP_SENDFILE = False  # so that copies are written as other files are
        import numpy.lib._format_impl as arrays

        arrays.isfileobj = lambda file: False  # likewise np.save

    def counted(self, name: str, function, paths: int):
        @functools.wraps(function)
        def call(*given, **options):
            dir_fds = [options.get(key) for key in ("dir_fd", "dst_dir_fd")]
            dir_fd = next((fd for fd in dir_fds if fd is not None), None)
            found = [path for given in given[:paths] if (path := self.inside(given, dir_fd))]
            if found:
                self.point(name, " ".join(found))
            return function(*given, **options)

        return call

    def counted_open(self, function):
        @functools.wraps(function)
        def call(path, flags, *rest, dir_fd=None, **options):
            changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if changes and (found := self.inside(path, dir_fd)):
                self.point("os.open", found)
            return function(path, flags, *rest, dir_fd=dir_fd, **options)

        return call


def path_of(descriptor: int) -> str:
    """Of an open file or directory."""
    if hasattr(fcntl, "F_GETPATH"):  # macOS
        return os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
    return os.readlink(f"/proc/self/fd/{descriptor}")


class Watched(io.FileIO):
    """A file whose every write is two points: before it, and when half of it is on disk."""

    points = None

    def write(self, content) -> int:
        path = self.points.inside(self.name)
        self.points.point("write", path)
        view = memoryview(content).cast("B")
        half = len(view) // 2
        if not half:
            return super().write(view)
        written = super().write(view[:half])
        self.points.point("half", path)
        return written + (super().write(view[half:]) if written == half else 0)


def opened(points, original, file, mode="r", buffering=-1, *text, **options):
    """As `open`; of a file to be written below the root one that is watched."""
    names = dict(zip(("encoding", "errors", "newline", "closefd", "opener"), text)) | options
    path = None if isinstance(file, int) or not set(mode) & set("wax+") else points.inside(file)
    if path is None:
        return original(file, mode, buffering, **names)
    points.point("open", path)
    place, plain = os.path.abspath(os.fspath(file)), mode.replace("b", "").replace("t", "")
    raw = Watched(place, plain, opener=names.get("opener"))
    raw.points = points
    if buffering == 0:
        return raw
    buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
    if "b" in mode:
        return buffered
    wrapper = io.TextIOWrapper(buffered, *(names.get(k) for k in ("encoding", "errors", "newline")))
    wrapper.mode = mode
    return wrapper


def when_called(where: str, nth: int, action, inside: str = ""):
    """Call `action` before the n-th call (from 1) of a function, "module.name"; with `inside` of
    those that are made while that function runs."""
    state = SimpleNamespace(calls=0, depth=0 if inside else 1)

    def patch(name: str, make):
        module, _, attribute = name.rpartition(".")
        owner = sys.modules[module]
        setattr(owner, attribute, make(getattr(owner, attribute)))

    def counting(function):
        @functools.wraps(function)
        def call(*given, **options):
            state.calls += state.depth > 0
            if state.calls == nth and state.depth:
                state.calls = NEVER
                action()
            return function(*given, **options)

        return call

    def around(function):
        @functools.wraps(function)
        def call(*given, **options):
            state.depth += 1
            try:
                return function(*given, **options)
            finally:
                state.depth -= 1

        return call

    patch(where, counting)
    if inside:
        patch(inside, around)


def send(numbers: int | list):
    """Signals to this process; a float is a pause in seconds."""
    for number in numbers if isinstance(numbers, list) else [numbers]:
        if isinstance(number, float):
            time.sleep(number)
        else:
            os.kill(os.getpid(), number)


def expect_locked():
    """Say whether another process could have the directory of this run."""
    with open("out/lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("the directory is locked", flush=True)


# The process that forks.


def begin(case: dict, rank: int, port: int):
    """In the fork: set up what the case asks for, and run train.py; does not return."""
    status = 1
    os.chdir(case["cwd"])
    log = Path("log")
    log.mkdir(exist_ok=True)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(log / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.dump_traceback_later(PATIENCE - 5, exit=True)
    if case["ranks"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"WORLD_SIZE": str(case["ranks"]), "MASTER_PORT": str(port)}
    mine = case["rank"] in (None, rank)
    at = case["at"] if mine else NEVER
    if case["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["limit"], case["limit"]))
    elif at is not None:
        Points(Path.cwd() / "out", log / f"trace-{rank}", at, case["signal"]).install()
    if case["call"] and mine:
        number = case["signal"]
        action = functools.partial(send, number) if number else expect_locked
        when_called(case["call"], case["nth"], action, case["inside"])
    try:
        import train

        train.main(case["arguments"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def finish(pids: list[int], case: dict) -> dict:
    """Wait for the forks, and send the signal that comes from outside; their exit statuses, -9 for
    SIGKILL, and the seconds that each took."""
    since, statuses, seconds, hung = time.monotonic(), {}, {}, False
    waiting = case["delay"] is not None
    while len(statuses) < len(pids):
        time.sleep(0.002)
        passed = time.monotonic() - since
        left = [rank for rank in range(len(pids)) if rank not in statuses]
        if waiting and passed > case["delay"]:
            waiting = False
            for rank in left if case["rank"] is None else {case["rank"]} & {*left}:
                os.kill(pids[rank], case["signal"])
        if passed > PATIENCE:
            hung = True
            for rank in left:
                os.kill(pids[rank], signal.SIGKILL)
        for rank in left:
            pid, status = os.waitpid(pids[rank], 0 if hung else os.WNOHANG)
            if pid:
                statuses[rank], seconds[rank] = os.waitstatus_to_exitcode(status), passed
    in_order = lambda found: [found[rank] for rank in range(len(pids))]
    return {"statuses": in_order(statuses), "seconds": in_order(seconds), "hung": hung}


def preload(arguments: list[str]):
    """Import all that a run imports, by one run in this process."""
    import torch
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp

    import train

    torch.set_num_threads(1)
    redirect = contextlib.redirect_stdout, contextlib.redirect_stderr
    with contextlib.ExitStack() as stack, contextlib.suppress(BaseException):
        nothing = stack.enter_context(open(os.devnull, "w"))
        for stream in redirect:
            stack.enter_context(stream(nothing))
        train.main(arguments)


def free_port() -> int:
    """A port below those that the system hands out to whoever asks for any: none takes it until the
    ranks listen there."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def serve():
    """Read cases, a line of JSON each, from stdin, and answer each by a line on stdout."""
    sys.path.insert(0, str(ROOT))
    preload(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        case = json.loads(line)
        port = free_port()
        pids = []
        for rank in range(case["ranks"]):
            if not (pid := os.fork()):
                begin(case, rank, port)
            pids.append(pid)
        print(json.dumps(finish(pids, case)), flush=True)


# Who asks it: a toy run, its end, and what became of an interrupted one.


class Result(NamedTuple):
    """What a run came to; of several ranks that of rank 0, and the statuses and seconds of all."""

    status: int
    out: str
    err: str
    trace: list[str]  # "open metrics.jsonl", …: the n-th operation is trace[n - 1]
    statuses: list[int]
    seconds: list[float]
    hung: bool

    @property
    def sentences(self) -> list[str]:
        """The lines on stderr, without Python's warnings, which are two lines each."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        warnings = [n for n, line in enumerate(lines) if re.search(r"^\S+:\d+: \w*Warning: ", line)]
        return [line for n, line in enumerate(lines) if not {n, n - 1} & {*warnings}]


WORDS = "good bad fine poor nice dull".split()
FLAGS = """--out_dir=out --data=pairs.jsonl --eval_data=held.jsonl --hidden_size=16 --num_layers=1
    --num_heads=1 --vocab_size=290 --batch_size=4 --micro_batch_tokens=64 --warmup_steps=1
    --learning_rate=1e-3 --sft_learning_rate=1e-2 --log_every=2 --eval_every=2
    --save_every=1""".split()


def pairs(count: int, start: int = 0) -> str:
    rows = []
    for i in range(start, start + count):
        row = {"prompt": f"Rate film {i}:", "chosen": f" It is {WORDS[i % 3]}."}
        rows.append(json.dumps(row | {"rejected": f" It is {WORDS[3 + i % 3]} {i}."}) + "\n")
    return "".join(rows)


class Toy:
    """A directory with data for 3 steps of SFT and 3 of DPO, where runs are made in out/."""

    def __init__(self, directory: Path, *flags: str):
        self.place, self.out, self.flags = (
            Path(directory),
            Path(directory) / "out",
            [*FLAGS, *flags],
        )
        self.place.mkdir(parents=True, exist_ok=True)
        (self.place / "pairs.jsonl").write_text(pairs(12))
        (self.place / "held.jsonl").write_text(pairs(4, 12))
        command = [sys.executable, "-u", __file__, "--serve"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen(command, env=environment, cwd=self.place, **pipes)
        self.ask([*FLAGS, "--out_dir=preload"])

    def ask(self, what):
        print(json.dumps(what), file=self.server.stdin, flush=True)

    def close(self):
        self.server.stdin.close()
        self.server.wait()

    def run(self, *flags, at=None, ranks=1, rank=None, delay=None, limit=None, call="", nth=1,
            inside="", number=signal.SIGKILL) -> Result:  # fmt: skip
        """train.py with the toy's flags and these, in a fork. It gets a signal (SIGKILL), or rank
        `rank` of several does: at the operation `at`; `delay` seconds after its start; or before
        the nth call of a function (as `when_called` says). at=NEVER counts only. number=None: in
        place of a signal the disk is full from `at` on, or at `call` it is looked whether the run
        has locked its directory. A list, at `call`: several signals, and pauses (float) between.
        limit: no file may get longer than so many bytes."""
        case = {"arguments": [*self.flags, *flags], "cwd": str(self.place), "at": at, "rank": rank}
        case |= {"ranks": ranks, "delay": delay, "limit": limit, "call": call, "nth": nth}
        self.ask(case | {"inside": inside, "signal": number})
        answer = json.loads(self.server.stdout.readline())
        log, texts = self.place / "log", []
        for name in ("out", "err", "trace"):
            path = log / f"{name}-0"
            texts.append(path.read_text(errors="replace") if path.exists() else "")
        if at is None:
            texts[2] = ""
        trace = [line.partition(" ")[2] for line in texts[2].splitlines()]
        return Result(answer["statuses"][0], *texts[:2], trace, *answer.values())

    def errors(self, ranks: int) -> list[str]:
        """What each rank of the last run wrote on stderr."""
        return [(self.place / "log" / f"err-{rank}").read_text() for rank in range(ranks)]

    def clear(self):
        shutil.rmtree(self.out, ignore_errors=True)

    def keep(self, name: str) -> Path:
        """A copy of out/ as it is, times and all."""
        shutil.rmtree(self.place / name, ignore_errors=True)
        return shutil.copytree(self.out, self.place / name)

    def put_back(self, copy: Path | None):
        self.clear()
        if copy:
            shutil.copytree(copy, self.out)

    def whole(self, *flags) -> dict:
        """The end of a run that nobody interrupts, from nothing."""
        self.clear()
        result = self.run(*flags)
        assert result.status == 0, result.err
        return self.end()

    def end(self) -> dict:
        """What a run came to: its files' digests, but for what is on the way to them; its metrics
        without what depends on the clock and the machine."""
        found = {}
        for path in sorted(self.out.rglob("*")):
            name = str(path.relative_to(self.out))
            if path.is_file() and not re.match("(resume|encoded|.*reference-)|run.json|lock", name):
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        found.pop("metrics.jsonl", None)
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        timed = lambda name: "second" in name or "memory" in name
        rows = [{k: v for k, v in json.loads(line).items() if not timed(k)} for line in lines]
        return found | {"metrics": rows}

    def states(self) -> list[str]:
        """The names of the states there, the newest last."""
        names = [
            p.name for p in self.out.glob("resume/*-*") if re.search(r"(sft|dpo)-\d+$", p.name)
        ]
        return sorted(names, key=lambda name: (name < "sft", int(name.rpartition("-")[2])))


# What becomes of an interrupted run.

FINE = ("exact", "began anew", "refused")


def outcome(result: Result, end: dict | None, whole: dict) -> str:
    """What became of a run that was resumed: exact or began anew, and ended as `whole` (or `kill`
    found that another run's state was refused, by the name of a setting); it ended
    otherwise (differs, metrics differ), or did not (sentence, traceback, hung)."""
    if result.hung or "Timeout (" in result.err:
        return "hung"
    one = result.status == 2 and len(result.sentences) == 1
    if result.status:
        return "sentence" if one and "Traceback" not in result.err else "traceback"
    for name in {*end, *whole} - {"metrics"}:
        if end.get(name) != whole.get(name):
            return "differs"
    if end["metrics"] != whole["metrics"]:
        return "metrics differ"
    return "began anew" if "from the beginning" in result.out + result.err else "exact"


def resume(toy: Toy, whole: dict, *flags, **options) -> tuple[str, Result]:
    """Resume the run in out/; the outcome, and what was said. What failed is tried again: where it
    fails again the directory is blocked."""
    result = toy.run("--resume", *flags, **options)
    found = outcome(result, toy.end() if result.status == 0 else None, whole)
    if result.status and toy.run("--resume", *flags).status:
        found += ", blocked"
    return found, result


def newest_complete(trace: list[str]) -> str:
    """The newest state that is whole after these operations, "" if none."""
    found = ""
    for line in trace:
        if match := re.match(r"re(?:name|place) resume/\S+ resume/((?:sft|dpo|done)-\d+)$", line):
            found = match[1]
        elif match := re.match(r"replace resume/(\S+)/point.json resume/point.json", line):
            found = match[1]  # as states once were written
    return found


def completes(trace: list[str], state: str) -> int:
    """The operation that makes this state the newest one."""
    return next(n for n, _ in enumerate(trace, 1) if newest_complete(trace[:n]) == state)


def leaves(trace: list[str], state: str) -> int:
    """The first operation that does not belong to saving it, or removing older ones, any more."""
    n = completes(trace, state) + 1
    while "resume" in trace[n - 1]:
        n += 1
    return n


def begun_from(result: Result) -> str:
    """The state that a resumed run says it begins from, "" for none."""
    lines = re.findall(r"^(sft|dpo): .* steps (\d+) to ", result.out, re.MULTILINE)
    if not lines or lines[0] == ("sft", "0"):
        return ""
    return "-".join(lines[0])


class Case(NamedTuple):
    where: str  # the operation, or the moment
    found: str  # the outcome
    said: list[str]  # on stderr, by the resumed run


def kill(toy: Toy, whole: dict, at: int, *flags, start: Path | None = None, first: tuple = (),
         again: int | None = None) -> Case | None:  # fmt: skip
    """Kill a run at an operation, and resume it. None where it has no such operation.

    start: what lies in out/ before. first: flags of the killed run alone. again: the operation
    that the resumed run is killed at, before it is resumed for good.
    """
    toy.put_back(start)
    result = toy.run(*first, *flags, at=at)
    if result.status != -signal.SIGKILL:
        assert result.status == 0, result.err
        return None
    where, newest = result.trace[-1], newest_complete(result.trace[:-1])
    if again is not None:
        result = toy.run("--resume", *flags, at=again)
        newest = newest_complete(result.trace[:-1]) or newest
        where += f" and {result.trace[-1]}" if result.status else " and not again"
    found, result = resume(toy, whole, *flags)
    if found == "sentence, blocked" and start and not first and not newest:
        [sentence] = result.sentences  # what lies there is still another run's
        found = "refused" if re.search("but was|none of the states", sentence) else found
    if found in FINE and newest and not newest.startswith("done") and begun_from(result) != newest:
        found += f", not from {newest}"
    if found in FINE and len(result.sentences) > 1:
        found += ", many sentences"
    return Case(where, found, result.sentences)


def distinct(trace: list[str]) -> list[int]:
    """The operations; of writes to one file that follow each other (torch.save writes a tensor in
    dozens of parts) the first, before it and half done, and the last, half done."""
    chosen, begin = [], 0
    writes = lambda line: line.startswith(("write ", "half "))
    path = lambda line: line.partition(" ")[2]
    for n, line in enumerate(trace, 1):
        if not writes(line):
            chosen.append(n)
            continue
        if n == 1 or not writes(trace[n - 2]) or path(trace[n - 2]) != path(line):
            begin = n
        last = n == len(trace) or not writes(trace[n]) or path(trace[n]) != path(line)
        if last or n <= begin + 1:
            chosen.append(n)
    return chosen


# The long form.

SEED = 0
LORA, CHECKPOINTING = ["--lora_rank=2"], ["--activation_checkpointing"]


class Parts:
    """The parts of the long form: each yields Cases, on a toy of its own."""

    def __init__(self, place: Path):
        self.toy, self.random = Toy(place), random.Random(SEED)

    def traced(self, start: Path | None = None, *flags) -> list[str]:
        """The operations of a run to its end."""
        self.toy.put_back(start)
        result = self.toy.run(*flags, at=NEVER)
        assert result.status == 0, result.err
        return result.trace

    def stopped(self, state: str) -> Path:
        """A copy of what a run leaves that is killed once it is past that state."""
        at = leaves(self.traced(), state)
        self.toy.clear()
        assert self.toy.run(at=at).status == -signal.SIGKILL
        return self.toy.keep("stopped")

    def every_operation_of_a_run(self):
        whole = self.toy.whole()
        for at in range(1, len(self.traced()) + 1):
            yield kill(self.toy, whole, at)

    def every_operation_of_a_resumed_run(self):
        whole = self.toy.whole()
        for state in ("sft-2", "dpo-1"):
            start = self.stopped(state)
            for at in distinct(self.traced(start, "--resume")):
                yield kill(self.toy, whole, at, start=start, first=("--resume",))

    def every_operation_where_another_run_finished(self):
        """The new run's command is without --resume, and its settings are others."""
        whole = self.toy.whole()
        self.toy.whole("--beta=0.5", "--sft_learning_rate=2e-3")
        start = self.toy.keep("finished")
        for at in distinct(self.traced(start)):
            yield kill(self.toy, whole, at, start=start)

    def every_operation_where_another_run_was_stopped(self):
        """It left a state; the new run, with other settings, dies before it has one."""
        whole = self.toy.whole()
        other = "--beta=0.5", "--sft_learning_rate=2e-3"
        self.toy.clear()
        at = len(self.traced(None, *other)) * 3 // 4
        self.toy.clear()
        self.toy.run(*other, at=at)
        start = self.toy.keep("other")
        for at in distinct(self.traced(start)):
            yield kill(self.toy, whole, at, start=start)

    def two_kills(self):
        whole = self.toy.whole()
        count = len(self.traced())
        for _ in range(100):
            first, second = self.random.randint(1, count), self.random.randint(1, count)
            yield kill(self.toy, whole, first, again=second)

    def random_moments(self, count: int = 50, flags: tuple = (), without: str = ""):
        """Killed from outside, again and again until the run is done, then compared. without:
        files that are removed before each resume."""
        whole, toy = self.toy.whole(*flags), self.toy
        seconds = toy.run(*flags).seconds[0]
        killed = 0
        while killed < count:
            toy.clear()
            moments, resuming = [], ()
            result = toy.run(*flags, delay=self.random.uniform(0, seconds))
            while result.status == -signal.SIGKILL and len(moments) < 4:
                moments.append(f"{result.seconds[0]:.3f} s")
                for path in toy.out.rglob(without) if without else ():
                    path.unlink()
                resuming = ("--resume", *flags)
                result = toy.run(*resuming, delay=self.random.uniform(0, 2 * seconds))
            killed += len(moments)
            found = ""
            if result.status not in (0, -signal.SIGKILL):
                found = outcome(result, None, whole)
            else:
                found, result = resume(toy, whole, *flags)
            yield Case(", ".join(moments) or "not killed", found, result.sentences)

    def random_moments_with_adapters(self):
        yield from self.random_moments(20, LORA)

    def random_moments_with_activation_checkpointing(self):
        yield from self.random_moments(20, CHECKPOINTING)

    def random_moments_without_the_reference(self):
        yield from self.random_moments(20, without="reference-*.npy")

    def sigterm_at_every_operation(self):
        """Status 143 and one sentence, or the run was at its end; then exact."""
        whole = self.toy.whole()
        for at in distinct(self.traced()):
            self.toy.clear()
            result = self.toy.run(at=at, number=signal.SIGTERM)
            where = result.trace[at - 1]
            said = result.status == 128 + signal.SIGTERM and len(result.sentences) == 1
            found, again = resume(self.toy, whole)
            if not said and result.status:
                found = f"status {result.status}, {len(result.sentences)} sentences; {found}"
            elif not said and at < 0.95 * len(result.trace):
                found = f"not heard; {found}"
            yield Case(where, found, result.sentences + again.sentences)


# A state for all later commits.

SMALL = ["--hidden_size=4"]


def write_state():
    """Write tests/state/: a run that was stopped after two steps of DPO, no more of it than a
    resume needs, what it reads, and its end."""
    with tempfile.TemporaryDirectory() as directory:
        toy = Toy(Path(directory), *SMALL)
        whole = toy.whole()
        toy.clear()
        trace = toy.run(at=NEVER).trace
        toy.clear()
        toy.run(at=leaves(trace, "dpo-2"))
        toy.close()
        for path in [*toy.out.glob("encoded/*/"), *toy.out.glob("resume/*")]:
            if path.is_dir() and path.name != "dpo-2":
                shutil.rmtree(path)
        for path in [*toy.out.glob("sft/reference-*"), toy.out / "lock"]:
            path.unlink(missing_ok=True)
        shutil.rmtree(STATE, ignore_errors=True)
        shutil.copytree(toy.out, STATE / "run")
        for name in ("pairs.jsonl", "held.jsonl"):
            shutil.copy(toy.place / name, STATE)
        (STATE / "end.json").write_text(json.dumps(whole, indent=1) + "\n")
        for path in (STATE / "run" / "run.json", STATE / "run/resume/dpo-2/point.json"):
            path.write_text(path.read_text().replace(directory, "/anywhere"))
        manifest = path.with_name("manifest.json")
        files = json.loads(manifest.read_text())
        files[path.name] = [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        manifest.write_text(json.dumps(files, indent=0))
    files = [path for path in STATE.rglob("*") if path.is_file()]
    print(f"{STATE}: {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes")


def main(words: list[str]):
    names = [n for n, f in vars(Parts).items() if callable(f) and n not in ("traced", "stopped")]
    names = [n for n in names if not n.startswith("_") and all(word in n for word in words)]
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        parts = Parts(Path(directory))
        for name in names:
            since, found, where = time.monotonic(), Counter(), {}
            for case in getattr(parts, name)():
                found[case.found] += 1
                if case.found not in FINE:
                    path = re.sub(r"reference-.*?npy", "reference.npy", case.where)
                    where.setdefault(case.found, Counter())[path] += 1
            wrong += sum(count for outcome, count in found.items() if outcome not in FINE)
            figures = ", ".join(f"{count} {outcome}" for outcome, count in found.most_common())
            seconds = time.monotonic() - since
            title = name.replace("_", " ")
            print(f"{title}: {found.total()} cases, {seconds:.0f} s: {figures}", flush=True)
            for outcome_, places in where.items():
                for place, count in places.items():
                    print(f"    {outcome_}: {place}" + (f" ({count} times)" if count > 1 else ""))
        parts.toy.close()
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    elif sys.argv[1:] == ["--write-state"]:
        write_state()
    else:
        main(sys.argv[1:])
