"""Chat templates are programs of other people, in jinja. Here they are compiled and run: in jinja's
sandbox, where they reach nothing but what they are handed, and within bounds of time and memory.
"""

import contextlib
import functools
import json
import math
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jinja2.sandbox

import data
from extra.conversations import short

SECONDS = 10  # of this thread on a processor; a conversation takes a thousandth of one
MEMORY = 2**30  # bytes beyond what the process has when the template starts
LONGEST = 2**24  # characters that it may write
BITS = 2**12  # bits of a number that is multiplied
SOURCE = 2**20  # characters that it may have; those of today have 10,000


class Endless(Exception):
    """The time is over."""


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's, whose numbers stay small: of huge ones one step takes minutes, in which no signal is
    looked at. Products are computed when the template runs, not when it is compiled."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context, operator: str, left, right):
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length()
            if max(bits, right.bit_length()) > BITS:
                raise OverflowError("a number is too large")
        return super().call_binop(context, operator, left, right)


def compile_template(source: str) -> jinja2.Template:
    """As transformers compiles a chat_template, in a sandbox."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    extensions = ["jinja2.ext.loopcontrols"]
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    now = time.localtime()  # one date for all examples, whenever midnight is
    environment.globals |= {"raise_exception": refuse}
    environment.globals |= {"strftime_now": lambda form: time.strftime(form, now)}
    environment.globals |= {"tools": None, "documents": None}
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    for mark, block in (("generation", "if true"), ("endgeneration", "endif")):  # of what is learnt
        source = re.sub(rf"({{%[-+]?\s*){mark}(\s*[-+]?%}})", rf"\1{block}\2", source)
    if len(source) > SOURCE:
        raise ValueError(f"it has {len(source):,} characters: {SOURCE:,} are allowed")
    return bounded(environment.from_string, source)  # which computes what is constant


def render(template: jinja2.Template, given: dict) -> str:
    """What a template writes. Raises ValueError where that is no text, and whatever it raises."""
    text = bounded(template.render, given)
    if len(text) > LONGEST:
        raise ValueError(f"it writes over {LONGEST:,} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it writes half a surrogate pair, which is no character") from None
    return text


@contextlib.contextmanager
def one_sentence(about: str):
    """Raise DataError for whatever goes wrong in other people's files, and programs."""
    try:
        yield
    except data.DataError:
        raise
    except MemoryError:
        raise data.DataError(f"{about} (it wants over {MEMORY / 2**30:g} GiB of memory)") from None
    except Exception as error:
        raise data.DataError(f"{about} ({short(' '.join(str(error).split()), 200)})") from None


class Bounds:
    """Within, programs run in bounds: `with BOUNDS` once, around many, as each costs 50 µs."""

    depth, started, measured, memory = 0, math.inf, -math.inf, None

    def __enter__(self):
        self.depth += 1
        if self.depth == 1:
            self.handler = signal.signal(signal.SIGALRM, self.ring)
            self.timer = signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
            self.memory = resource.getrlimit(resource.RLIMIT_AS)

    def __exit__(self, *_):
        self.depth -= 1
        if self.depth == 0:
            signal.setitimer(signal.ITIMER_REAL, *self.timer)
            signal.signal(signal.SIGALRM, self.handler or signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_AS, self.memory)
            self.measured = -math.inf

    def ring(self, *_):
        """Twice a second, between two steps of Python."""
        if time.thread_time() - self.started > SECONDS:
            raise Endless(f"it has not ended after {SECONDS} s")

    def limit_memory(self):
        """This process may have MEMORY more than it has now; where it can be told (on Linux)."""
        with contextlib.suppress(OSError, ValueError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            soft, hard = self.memory
            most = pages * resource.getpagesize() + MEMORY
            if soft == resource.RLIM_INFINITY or most < soft:
                resource.setrlimit(resource.RLIMIT_AS, (most, hard))


BOUNDS = Bounds()


def bounded(function: Callable, *inputs):
    """What the function gives. Raises Endless after SECONDS, MemoryError beyond MEMORY; but in the
    main thread alone: no other is interrupted by a signal."""
    if threading.get_ident() != threading.main_thread().ident:
        return function(*inputs)
    with BOUNDS:
        now = time.monotonic()
        if now - BOUNDS.measured > 0.05:  # what else is done meanwhile takes memory, too
            BOUNDS.limit_memory()
            BOUNDS.measured = now
        BOUNDS.started = time.thread_time()
        try:
            return function(*inputs)
        finally:
            BOUNDS.started = math.inf
