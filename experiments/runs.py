"""Files of runs, statistics over their seeds, tables; and the report of anybody's own runs, without
a known optimum, of experiments/report.py.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

DRAWN = 14  # runs of the figure
NO_SETTINGS = """out_dir resume log_every eval_every sample_every save_every save_adapter wandb seed
    micro_batch_tokens activation_checkpointing compile""".split()  # do not make another setting
# t of 97.5 % for 2, 3, … values, which have one degree of freedom less
STUDENT = dict(enumerate((12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26), 2))


class ReportError(Exception):
    """One sentence for whoever started it."""


def read_json(path: Path):
    """What a JSON file holds. Raises ReportError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read as JSON ({error})") from error


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, none if it is not there; a last line that is torn, of a run that
    was killed or still writes, is left out. Raises ReportError for any other."""
    lines, rows = path.read_bytes().splitlines() if path.is_file() else [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise ValueError("it is no row of metrics")
            rows.append(row)
        except ValueError as error:
            if number < len(lines):
                raise ReportError(f"{path}:{number}: cannot be read as JSON ({error})") from error
    return rows


def average(values: np.ndarray, errors: np.ndarray | float = 0.0) -> tuple[float, float]:
    """Mean, and its standard error: over the values, but at least what their own errors give."""
    count = len(values)
    own = np.linalg.norm(np.broadcast_to(np.nan_to_num(errors), count)) / count
    spread = values.std(ddof=1) / count**0.5 if count > 1 else 0.0
    return float(values.mean()), float(max(own, spread))


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean; nan of fewer than two values."""
    count, mean = len(values), np.mean(values)
    if count < 2:
        return math.nan, math.nan
    means = np.random.default_rng(0).choice(values, (10_000, count)).mean(1)
    student = STUDENT.get(count, 1.96 + 2.6 / (count - 1))
    widen = (count / (count - 1)) ** 0.5 * student / 1.96
    return tuple((mean + widen * (np.quantile(means, (0.025, 0.975)) - mean)).tolist())


def table(head: str, rows: list[list[str]]) -> str:
    """A table in Markdown; columns are named in `head`, separated by semicolons."""
    names = head.split("; ")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def show(mean: float, error: float, digits: int = 3) -> str:
    """mean ± error, without what is not known."""
    text = "—" if math.isnan(mean) else f"{mean:.{digits}f}"
    return f"{text} ± {error:.{digits}f}" if error > 0 else text


def show_interval(values: np.ndarray, sign: str = "") -> str:
    low, high = interval(values)
    text = f"{values.mean():{sign}.3f}"
    return text if math.isnan(low) else f"{text} [{low:{sign}.3f}, {high:{sign}.3f}]"


def draw(work: Callable):
    """Let figure.py draw, if it can."""
    try:
        from experiments import figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("report.py: no figure without matplotlib: pip install matplotlib", file=sys.stderr)
        return
    print(*work(figure), sep="\n", flush=True)


def settings_of(run: Path) -> dict:
    """The settings of a run, with its loss's options among them; paths within the run's directory
    are the same ones in each."""
    settings = dict(read_json(run / "run.json")["settings"])
    settings |= settings.pop("options", None) or {}
    own = f"{Path(settings.get('out_dir') or '.')}/"
    return {
        name: value.removeprefix("./").removeprefix(own) if isinstance(value, str) else value
        for name, value in settings.items()
    }


def read_runs(directories: list[Path]) -> dict[str, list[list[dict]]]:
    """{label: rows of each of its runs}: the label is what differs among all runs, but for the seed
    and what is no setting. Directories that are no runs are named. Raises ReportError."""
    directories = list({path.resolve(): path for path in directories}.values())
    runs = [path for path in directories if (path / "run.json").is_file()]
    for path in directories:
        if path not in runs:
            print(f"report.py: {path} is left out: it has no run.json", file=sys.stderr)
    if not runs:
        raise ReportError("none of these directories is a run of train.py (run.json)")
    try:
        settings = [settings_of(run) for run in runs]
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError("a run.json has no settings, as those of train.py have") from error
    values = {}
    for s in settings:  # an older run may lack some
        for name, value in s.items():
            values.setdefault(name, set()).add(str(value))
    differ = [name for name, found in values.items() if len(found) > 1 and name not in NO_SETTINGS]
    labels = [" ".join(f"{n}={s[n]}" for n in differ if n in s) for s in settings]
    twice = Counter((label, s.get("seed")) for label, s in zip(labels, settings))
    names = Counter(run.name for run in runs)
    groups = {}
    for run, s, label in zip(runs, settings, labels):
        rows = read_rows(run / "metrics.jsonl")
        if twice[label, s.get("seed")] > 1 or len(runs) == 1:  # nothing but its name tells it apart
            label = f"{label} {run.name if names[run.name] == 1 else run}".strip()
        if rows:
            groups.setdefault(label or "all", []).append(rows)
        else:
            print(f"report.py: {run} is left out: it has no rows of metrics", file=sys.stderr)
    if not groups:
        raise ReportError("none of these runs has rows of metrics yet")
    return groups


def curve(runs: list[list[dict]], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all runs of a group have, mean and standard error of a metric there; of DPO, or
    of SFT where that is all there is."""
    tables = []
    for rows in runs:
        stage = "dpo" if any(row.get("stage") == "dpo" for row in rows) else "sft"
        tables.append({r["step"]: r[name] for r in rows if r.get("stage") == stage and name in r})
    steps = sorted(set.intersection(*map(set, tables)))
    values = np.array([[found[step] for found in tables] for step in steps]).reshape(-1, len(runs))
    points = [average(row) for row in values]
    mean, error = np.array(points).reshape(-1, 2).T
    return np.array(steps), mean, error


def metric_of(groups: dict, name: str) -> str:
    """On held-out pairs, if all runs have it there; else in training."""
    everywhere = all(len(curve(runs, f"eval/{name}")[0]) for runs in groups.values())
    return f"eval/{name}" if everywhere else f"train/{name}"


def report_runs(directories: list[Path], out: Path):
    """Print the table of anybody's runs, what they ended with, draw their curves."""
    groups = read_runs(directories)
    names = [metric_of(groups, n) for n in ("rewards/accuracies", "rewards/margins", "loss")]
    kept = [*names, "policy/kl", "policy/reward"]
    kept = [n for n in kept if any(len(curve(runs, n)[0]) for runs in groups.values())]
    lines = []
    for label, runs in groups.items():
        curves = [curve(runs, name) for name in kept]
        end = max((steps[-1] for steps, _, _ in curves if len(steps)), default="")
        cells = [label, str(len(runs)), str(end)]
        cells += [show(mean[-1], error[-1]) if len(mean) else "" for _, mean, error in curves]
        lines.append(cells)
    print(table("; ".join(["run", "seeds", "step", *kept]), lines), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    if len(groups) > DRAWN:
        print(f"report.py: the figure shows the first {DRAWN} of {len(groups)}", file=sys.stderr)
    first = dict(list(groups.items())[:DRAWN])
    draw(lambda figure: [figure.runs(first, names, out)])
