"""The reference's log-probs, kept beside the checkpoint that the reference is.

A sweep over β or over losses from one checkpoint, or a resumed run, finds them there, under a
digest of token ids, numerics, and the weight files' names, sizes and times. Where that directory
cannot be written they are in encoded/ in that of the run. A pass that was interrupted has left
what it had; what is missing, nan, is computed then. A file ends with the SHA-256 of the rest.
"""

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data import DataError
from extra.checkpoints import first_not_finite, places_of

MICRO_BATCHES = 64  # of each rank, between two looks at the time
SECONDS = 60  # between two writes of a pass that lasts


def kept(compute: Callable, dataset, model, checkpoint: str | Path, run) -> torch.Tensor:
    """log π_ref, (responses,) in float64: what an earlier run kept, and of other examples what
    `compute(examples)` gives, (responses,), 0 of those that were not asked for. (all ranks)

    checkpoint: the directory of the reference; of a new model none, and nothing is kept.
    """
    count = dataset.responses()
    path, values = run.alone(find, dataset, model, checkpoint, run) if checkpoint else (None, None)
    values = np.full(count, np.nan) if values is None else values
    known = np.isfinite(values)
    if known.any():
        run.say(f"reference: {known.sum():,} log-probs found in {path}")
    written, new = time.monotonic(), 0
    rows = MICRO_BATCHES * 2 * run.settings.micro_batch_tokens * run.world
    try:
        for examples, responses in parts_of(dataset, rows):
            if known[responses].all():
                continue
            values[responses] = compute(examples)[responses].numpy()
            new += responses.stop - responses.start
            if run.rank == 0 and path and time.monotonic() - written > SECONDS:
                write(path, values)
                written = time.monotonic()
    except BaseException:
        if run.rank == 0 and path and new:
            with contextlib.suppress(OSError):
                write(path, values)
        raise
    if new:
        run.say(f"reference: {new:,} log-probs computed")
        if path:
            run.alone(write, path, values)
    values = torch.from_numpy(values)
    check(values, compute, dataset, model, checkpoint, run)
    return values


def check(values, compute: Callable, dataset, model, checkpoint: str | Path, run):
    """Raise DataError if they are not the policy's: it is still the reference, and in the
    micro-batches of training, too, both must agree."""
    again = compute(np.arange(min(len(dataset), run.settings.batch_size)), 1)
    if not (values.isfinite().all() and again.isfinite().all()):
        weight = first_not_finite(model)
        what = f"weight {weight} is not" if weight else "log-probs by these weights are not"
        raise DataError(f"{checkpoint or 'the new model'}: {what} finite")
    worst, tolerance = (again - values)[again != 0].abs().max().item(), 0.5 if run.bf16 else 0.01
    run.say(f"step 0: the largest log-ratio is {worst:.1e} nats (tolerance {tolerance})")
    if not worst <= tolerance:
        what = f"policy and reference must agree at step 0, but differ by {worst:.3g} nats"
        raise DataError(f"{what}: delete reference-*.npy in {checkpoint} or {run.out}/encoded")


def parts_of(dataset, rows: int) -> Iterator[tuple[np.ndarray, slice]]:
    """The examples in parts of about so many rows of the stream each, and which responses are
    theirs; always the same parts, so that it does not matter where a pass was interrupted."""
    ends = np.cumsum(dataset.lengths)
    bounds = [0, *np.searchsorted(ends, np.arange(rows, ends[-1], rows)).tolist(), len(dataset)]
    for first, last in zip(bounds, bounds[1:]):
        if first < last:
            responses = slice(*(int(dataset.trees[e]) - e for e in (first, last)))
            yield np.arange(first, last), responses


def find(dataset, model, checkpoint: str | Path, run) -> tuple[Path, np.ndarray | None]:
    """Where they are kept, and what is there; None if there is nothing that can be used."""
    where = Path(checkpoint)
    name = f"reference-{digest(dataset, model, where, run)}.npy"
    path = (where if os.access(where, os.W_OK) else run.out / "encoded") / name
    with contextlib.suppress(OSError, ValueError, EOFError):
        content = path.read_bytes()
        if hashlib.sha256(content[:-32]).digest() == content[-32:]:
            values = np.load(io.BytesIO(content))
            if values.shape == (dataset.responses(),) and values.dtype == np.float64:
                return path, values
    return path, None


def write(path: Path, values: np.ndarray):
    content = io.BytesIO()
    np.save(content, values)
    new = path.with_suffix(f".{os.getpid()}.npy")  # another run may be at the same
    new.write_bytes(content.getvalue() + hashlib.sha256(content.getvalue()).digest())
    new.replace(path)


def digest(dataset, model, checkpoint: Path, run) -> str:
    config = replace(model.config, bos_token_id=None, eos_token_id=None)  # they change no log-prob
    key = f"{config} {run.bf16} {run.device.type} {torch.__version__}"
    files = {file for place in places_of(checkpoint) for file in place.iterdir()}
    for file in sorted(files):
        if file.suffix in (".safetensors", ".bin") or file.name == "adapter_config.json":
            key += f" {file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
    hashed = hashlib.sha256(key.encode())
    for array in (dataset.tokens, dataset.learnt, dataset.offsets, dataset.trees):
        hashed.update(np.ascontiguousarray(array))
    return hashed.hexdigest()[:16]
