"""The reference's log-probs, kept beside the checkpoint that the reference is.

A sweep over β or over losses from one checkpoint, or a resumed run, finds them there, under a
digest of token ids, numerics, and the weight files' names, sizes and times. Where that directory
cannot be written they are in encoded/ in that of the run.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from extra.checkpoints import places_of


def kept(compute: Callable, dataset, model, checkpoint: str | Path, run) -> torch.Tensor:
    """What `compute()` gives, (responses,) in float64, or what an earlier run kept. (all ranks)

    checkpoint: the directory of the reference; of a new model none, and nothing is kept.
    """
    path, values = None, None
    if run.rank == 0 and checkpoint:
        where = Path(checkpoint)
        name = f"reference-{digest(dataset, model, where, run)}.npy"
        path = (where if os.access(where, os.W_OK) else run.out / "encoded") / name
        with contextlib.suppress(OSError, ValueError, EOFError):  # none, or it is not whole
            values = np.load(path)
            if values.shape != (dataset.responses(),) or not np.isfinite(values).all():
                values = None
    if run.total({"": values is not None})[""].item():
        run.say(f"reference: {dataset.responses():,} log-probs found in {path}")
        mine = np.zeros(dataset.responses()) if values is None else values
        return run.total({"": torch.from_numpy(mine)})[""].cpu()
    computed = compute()
    run.say(f"reference: {dataset.responses():,} log-probs computed")
    if path:
        new = path.with_suffix(f".{os.getpid()}.npy")  # another run may be at the same
        np.save(new, computed.numpy())
        new.replace(path)
    return computed


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
