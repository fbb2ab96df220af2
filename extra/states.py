"""States that a run goes on from: whole or not there, known by their digests, the last two kept.

    resume/new/            written here, synced to the disk, and then renamed to
    resume/dpo-200/        the state after 200 steps of DPO:
        state.safetensors      what is trained, and its moments; none at a stage's start,
        point.json             what else the rest of the run depends on,
        metrics.jsonl          what was logged until then,
        manifest.json          and the size and SHA-256 of each of these files

So a kill, a full disk or a power cut leaves the states before it as they were. No directory is
written twice, and the one before the last goes when the next is there. Nothing is pickled, and each
rank reads its own rows: any number of ranks goes on from what any other saved.
"""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import torch

import model as llm
from data import DataError
from extra.guard import one_line, sha256
from extra.reading import parse_json, read_bytes
from extra.samples import rewind

PATHS = ("data", "eval_data", "sft_data", "tokenizer", "init_from")
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def save(run, stage: str, step: int, totals=(), model=None, optimizer=None):
    """All that the rest of the run depends on; of a stage's start only that it is there, as that
    begins from a checkpoint. totals: the sums since the last row of metrics. (all ranks)"""
    point = run.about | {"stage": stage, "step": step, "state": f"{stage}-{step}"}
    point["totals"] = {name: float(value) for name, value in dict(totals).items()}
    point["mean_logratio"] = float(run.mean_logratio)
    point["skipped"] = run.skipped
    if point["state"] == run.point.get("state"):
        return
    new = run.out / "resume" / "new"
    run.alone(shutil.rmtree, new, True)
    run.alone(lambda: new.mkdir(parents=True))
    if step:
        tensors = tensors_of(model, optimizer)
        llm.write_safetensors(new / "state.safetensors", tensors, writes=run.rank == 0)
    run.alone(finish, run.out, point, run.point.get("state"))
    run.point = point
    if not step:  # until the next stage's first step this is all there is to save
        run.save = lambda: None


def tensors_of(model, optimizer) -> dict[str, torch.Tensor]:
    """What is trained, and its moments, by name."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[name] = parameter
            for moment, value in optimizer.state[parameter].items():
                tensors[f"{name} {moment}"] = value
    return tensors


def finish(out: Path, point: dict, before: str | None):
    """Make a state of what is in resume/new; of the others only the one `before` it stays."""
    new = out / "resume" / "new"
    (new / "point.json").write_text(json.dumps(point), encoding="utf-8")
    rows = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    while rows and is_look(json.loads(rows[-1]), point):
        rows.pop()  # who goes on from here looks at this step again
    (new / "metrics.jsonl").write_text("".join(rows), encoding="utf-8")
    files = sorted(new.iterdir())
    manifest = {file.name: [file.stat().st_size, sha256(file)] for file in files}
    (new / "manifest.json").write_text(json.dumps(manifest, indent=0), encoding="utf-8")
    for path in (*files, new / "manifest.json", new):
        sync(path)
    made = {"dpo-0": out / "sft", "done-0": out}.get(point["state"])  # what that state stands for
    for path in (*filter(Path.is_file, made.iterdir()), made) if made and made.is_dir() else ():
        sync(path)
    place = new.with_name(point["state"])
    remove(place)  # it was passed over
    new.rename(place)
    sync(place.parent)
    for old in place.parent.iterdir():
        if old.name not in (place.name, before):
            remove(old)


def remove(path: Path):
    """A directory; or a file, which a person or a file system may have left among them."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_look(row: dict, point: dict) -> bool:
    """Whether a row of metrics is of the very step that is saved, and not of its training: it is
    the evaluation, or what `run.look` recorded."""
    same = (row["stage"], row["step"]) == (point["stage"], point["step"])
    return same and not any(name.startswith("train/") for name in row)


def sync(path: Path):
    """What was written of a file, or into a directory, is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def restore(run) -> dict:
    """What the last state says, if the run goes on from it, with what was recorded until then: the
    rest will be again. {} where the run begins, and nothing is left of another. (rank 0)"""
    point = newest(run.out, whole=True) if run.settings.resume else {}
    if point:
        rows = run.out / "resume" / point["state"] / "metrics.jsonl"
        llm.write_whole(run.out / "metrics.jsonl", rows.read_bytes())
    else:
        for place in (run.out / "resume", run.out / "adapter"):
            shutil.rmtree(place, ignore_errors=True)
    rewind(run.out / "samples.jsonl", point)
    return point


def load(run, stage: str, model, optimizer) -> tuple[int, Counter]:
    """Restore what this stage left: the steps done, and the sums since the last row. (all ranks)"""
    if run.point.get("stage") != stage:
        return 0, Counter()
    run.mean_logratio.fill_(run.point["mean_logratio"])
    run.skipped = run.point.get("skipped", {})
    if run.point["step"]:
        read_tensors(run.out / "resume" / run.point["state"], model, optimizer)
    return run.point["step"], Counter(run.point["totals"])


def read_tensors(place: Path, model, optimizer):
    path = place / "state.safetensors"
    saved = llm.read_safetensors(path)
    if saved.keys() != tensors_of(model, optimizer).keys():  # but where all steps were skipped
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # so that there are moments, which are read into, as are the weights
        optimizer.zero_grad()
    tensors = tensors_of(model, optimizer)
    if saved.keys() != tensors.keys():
        raise DataError(f"{path}: another model's, another optimizer's or another version's")
    for name, tensor in tensors.items():
        llm.copy_rows(tensor, saved[name])


def newest(out: Path, whole: bool) -> dict:
    """What the last state there says, or the one before it if the last is not whole; {} if there is
    none. whole: all files are compared with their digests. Raises DataError if none is whole."""
    places = places_in(out)
    for place in places:
        try:
            return read(place, whole)
        except UNREADABLE as error:
            if whole:
                print(f"{place} is passed over: it is damaged ({one_line(error)})", flush=True)
    if places and whole:
        what = f"{out / 'resume'}: none of the states there is whole"
        raise DataError(f"{what}: without --resume the run starts from the beginning")
    return {}


def places_in(out: Path) -> list[Path]:
    """The states of a run's directory, the newest first. That the run is done is one of them, as
    long as what it made is there."""
    made = (out / "config.json").is_file() and (out / "model.safetensors").is_file()
    stages, found = ["sft", "dpo", *(["done"] if made else [])], []
    for path in out.glob("resume/*-*"):
        stage, _, step = path.name.partition("-")
        if stage in stages and step.isdecimal():
            found.append((stages.index(stage), int(step), path))
    return [path for _, _, path in sorted(found, reverse=True)]


def read(place: Path, whole: bool) -> dict:
    """What point.json of a state says. Raises ValueError and others for one that is not whole."""
    manifest = parse_json(read_bytes(place / "manifest.json"))
    names = ("point.json", "metrics.jsonl", *manifest) if whole else ("point.json",)
    for name in dict.fromkeys(names):
        size, digest = manifest[name]
        file = place / name
        if not file.is_file() or file.stat().st_size != size or sha256(file) != digest:
            raise ValueError(f"{name} is not what was written")
    point = json.loads((place / "point.json").read_text(encoding="utf-8"))
    settings, digests, here = dict(point["settings"]), dict(point["digests"]), os.getcwd()
    if not isinstance(settings["loss"], str) or not isinstance(settings["options"], dict):
        raise ValueError("its settings are not those of a run")
    if not whole:
        for name in PATHS if point["cwd"] != here else ():  # relative to where it was begun
            paths = filter(None, settings[name].split(","))
            settings[name] = ",".join(os.path.join(point["cwd"], path) for path in paths)
        settings["out_dir"] = str(place.parent.parent)  # where it is now: it may have been moved
        return {"settings": settings, "digests": digests}
    numbers = [point["step"], point["mean_logratio"], *point["totals"].values()]
    names = {place.name, point["state"], f"{point['stage']}-{point['step']}"}
    if len(names) > 1 or not all(type(n) in (int, float) for n in numbers):
        raise ValueError("point.json is not that of a state")
    return point
