"""Figures and tables of runs: of the experiment, against its exact optimum, or of anybody's own.

    python experiments/report.py out/frontier      # what experiments/frontier.py trained
    python experiments/report.py out/*             # any runs of train.py, no optimum known

The first writes frontier.png, panels.png (and .svg) and tables.md beside sweep.json; the second
report.png and report.svg beside the first run; --out=DIR says where else. It reads the runs' files
alone (and calculates R*(KL), where exact.json ends before the runs do), and without matplotlib it
still prints the tables.

How the numbers of the experiment are made:
- A *group* is one method at one setting; its runs differ in their seed alone, that is in their
  pairs, labels and order, which runs of the same seed share. What counts is the last measured row.
- ± is the standard error over seeds, but at least what the samples' errors alone give, which is all
  there is of one seed.
- The *gap* of a run is R*(KL) − R at that run's own KL. R* belongs to the grammar, the KL is from
  the trained reference, which is near it: a point may lie above R* by its noise, and `above` finds
  those that do so by more than two standard errors.
- The *share* of a run is (R − start)/(R*(KL) − start), what it gained of what can be gained.
- [ , ] are 95 % bootstrap intervals of the mean over seeds. Few values spread less than what they
  are drawn from, so that percentiles of 5 seeds hold the truth 5 times in 6; hence the deviations
  are widened by √(n/(n−1))·t/z (after Hesterberg, arXiv:1411.5279), which makes it 95 %.
- Methods end at different KL, where gaps are not comparable. So each run is compared with the gap
  that DPO of the *same seed* has *at its KL*, by linear interpolation between DPO's settings. The
  gap is interpolated, not the reward: what is curved in R* is known and cancels. (DPO's own gap is
  convex in KL, so that between its few settings it is taken as a little too large.) The interval is
  over these differences. Where a seed's KL is outside of that seed's DPO runs, it would be an
  extrapolation: the table says "outside", no number. Seeds without DPO do not count.
"""

import argparse
import dataclasses
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments.runs import (
    ReportError,
    average,
    draw,
    interval,
    read_json,
    read_rows,
    report_runs,
    show,
    show_interval,
    table,
)

MODERATE = 0.5, 2.0  # nats
DRAWN = 7  # methods of the figure
SMALL = "pairs", "flips", "labels", "rounds", "displacement"  # panels of the second figure
PANELS = {  # title; how x is said, where it is not the setting
    "main": ("Methods", ""),
    "flips main": ("Methods, 20 % of the labels flipped", ""),
    "flips": ("Share of flipped labels", "{:.0%} flipped"),
    "pairs": ("Number of pairs", "{:,} pairs"),
    "labels": ("Labels that are always right, and drawn from Bradley–Terry", ""),
    "rounds": ("On-policy rounds, as many pairs in all", ""),
    "displacement": ("Displacement", ""),
}


@dataclasses.dataclass
class Group:
    """One method at one setting: of each seed the rows of its run, by step; the last is its end."""

    panel: str
    method: str
    setting: str
    x: float | None = None
    exact: bool = False  # calculated, not trained
    rows: dict[int, dict[int, dict]] = dataclasses.field(default_factory=dict)
    failed: dict[int, str] = dataclasses.field(default_factory=dict)  # seed: why

    def last(self, name: str) -> np.ndarray:
        """What the runs ended with, (seeds,): of "kl", "reward", "accepted", "kl_error", …"""
        ends = [rows[max(rows)] for rows in self.rows.values()]
        return np.array([row.get(f"policy/{name}", math.nan) for row in ends])

    def point(self, name: str) -> tuple[float, float]:
        """Mean over seeds and its standard error."""
        return average(self.last(name), self.last(f"{name}_error"))


class Frontier:
    """R*(KL), interpolated between points."""

    def __init__(self, kl: list[float], reward: list[float], start: float):
        order = np.argsort(kl)
        self.kl, self.reward = np.array(kl)[order], np.array(reward)[order]
        self.start = start  # reward at KL 0

    def __call__(self, kl):
        return np.interp(kl, self.kl, self.reward)

    def gap(self, group: Group) -> np.ndarray:
        """R*(KL) − R of each seed."""
        return self(group.last("kl")) - group.last("reward")

    def gap_error(self, group: Group) -> np.ndarray:
        """Of each seed, over its samples; an error of KL counts by what R* rises along it."""
        kl, error = group.last("kl"), np.nan_to_num(group.last("kl_error"))
        return np.hypot(np.nan_to_num(group.last("reward_error")), self(kl + error) - self(kl))

    def gain(self, group: Group) -> np.ndarray:
        """R*(KL) − start of each seed, what could be gained."""
        return np.maximum(self(group.last("kl")) - self.start, 1e-9)


def above(groups: list[Group], best: Frontier) -> list[tuple[Group, float, float]]:
    """(group, by how much, standard error) of those above R*(KL) by more than two of them. What is
    exact has none; 0.001 is what interpolation in R* may err."""
    found = []
    for group in groups:
        (reward, reward_error), (kl, kl_error) = group.point("reward"), group.point("kl")
        error = math.hypot(reward_error, best(kl + kl_error) - best(kl))
        excess = reward - float(best(kl))
        if excess > 2 * error + 1e-3:
            found.append((group, excess, error))
    return found


def beside(group: Group, others: list[Group], best: Frontier) -> np.ndarray:
    """Gap of each seed less that of the others (DPO's settings) of this seed at its KL, by linear
    interpolation; nan where that would be extrapolation. Seeds that they lack are left out."""
    differences = []
    for seed, kl, gap in zip(group.rows, group.last("kl"), best.gap(group)):
        curve = [
            (end, below)
            for other in others
            for s, end, below in zip(other.rows, other.last("kl"), best.gap(other))
            if s == seed
        ]
        if curve:
            kls, gaps = np.transpose(sorted(curve))
            differences.append(gap - np.interp(kl, kls, gaps, left=math.nan, right=math.nan))
    return np.array(differences)


def read_run(directory: Path) -> dict[int, dict]:
    """What was recorded at each step of the last stage, in one row; {} of a run that is not at its
    end, which the file `done` tells."""
    steps = {}
    for row in read_rows(directory / "metrics.jsonl") if (directory / "done").exists() else ():
        if row.get("stage") in ("dpo", "rloo"):
            steps.setdefault(row["step"], {}).update(row)
    return steps


def read_sweep(directory: Path) -> tuple[list[Group], Frontier, set[str]]:
    """The groups of a sweep that have a run, what is exact among them; R*(KL); the runs that are
    not at their end yet. Raises ReportError."""
    groups, missing, path = {}, set(), directory / "sweep.json"

    def group_of(panel: str, method: str, setting: str, x=None, exact: bool = False) -> Group:
        key = panel, method, setting, x
        return groups.setdefault(key, Group(*key, exact))

    def add(group: Group, seed, row: dict):
        values = {"kl": row["kl"], "reward": row["reward"]} | row
        group.rows[seed] = {0: {f"policy/{name}": value for name, value in values.items()}}

    try:
        for run in read_json(path)["runs"]:
            group = group_of(run["panel"], run["method"], run["setting"], run.get("x"))
            rows, reason = read_run(directory / run["run"]), directory / run["run"] / "failed"
            if reason.is_file():
                words = reason.read_text(encoding="utf-8").split()
                group.failed[run["seed"]] = " ".join(words)
            elif rows:
                group.rows[run["seed"]] = rows
            else:
                missing.add(run["run"])
        path = directory / "exact.json"
        exact = read_json(path) if path.is_file() else {}
        for row in (row for row in exact.get("best_of_n", ()) if row["n"] > 1):
            n = row["n"]
            add(group_of("main", "best of N, true reward", f"N={n}", n, True), None, row)
        fits = exact.get("rlhf", ())
        [usual] = Counter(row["pairs"] for row in fits).most_common(1) or [(0, 0)]
        for row in fits:
            method, flips = f"perfect RLHF, {row['features']}", row.get("flips", 0.0)
            places = {"flips": flips} if row["pairs"] == usual[0] else {}  # panel: x
            if row["pairs"] == usual[0] and flips in (0.0, 0.2):
                places["flips main" if flips else "main"] = row["beta"]
            if flips == 0.0:
                places["pairs"] = row["pairs"]
            for panel, x in places.items():
                add(group_of(panel, method, f"β={row['beta']:g}", x, True), row["seed"], row)
        curve = exact.get("frontier") or grammars_frontier()
        best = Frontier(curve["kl"], curve["reward"], exact.get("start", min(curve["reward"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"{path}: not as experiments/frontier.py writes it: {error!r}") from error
    return [group for group in groups.values() if group.rows or group.failed], best, missing


def grammars_frontier() -> dict[str, list[float]]:
    """R*(KL) from the grammar itself, if exact.json has none."""
    from experiments.reviews import Reviews

    return dict(zip(("reward", "kl"), Reviews().curve().tolist()))


def drawn_methods(groups: list[Group]) -> list[str]:
    """The methods of the figure, at most DRAWN: DPO, policy gradient, the others as they come."""
    found = [g.method for g in groups if g.panel == "main" and g.rows and not g.exact]
    first = [method for method in found if method == "DPO"]
    first += [method for method in found if method.startswith("RLOO")]
    return list(dict.fromkeys(first + found))[:DRAWN]


def sweep_table(groups: list[Group], best: Frontier) -> str:
    """The table of a panel's groups."""
    first = "DPO" if any(group.method == "DPO" for group in groups) else groups[0].method
    others = [group for group in groups if group.method == first and group.rows]
    said, lines = PANELS.get(groups[0].panel, ("", ""))[1], []
    if said or len(others) < 2:  # no curve of the same data to compare with
        others = []
    trained = {group.setting for group in groups if not group.exact}
    for group in groups:
        if group.method.startswith("perfect RLHF") and group.setting not in trained:
            continue  # of many β those that a method has, too
        setting = group.setting + (f", {said.format(group.x)}" if said else "")
        seeds = str(len(group.rows)) if None not in group.rows else ""
        if group.failed:
            seeds += f", {len(group.failed)} diverged: {next(iter(group.failed.values()))}"
        cells = [group.method, setting, seeds]
        if group.rows:
            share = 1 - best.gap(group) / best.gain(group)
            cells += [show(*group.point("kl")), show(*group.point("reward")), f"{share.mean():.1%}"]
            cells.append(show_interval(best.gap(group)))
            differences = beside(group, others, best) if group.method != first else np.array([])
            versus = show_interval(differences, "+") if len(differences) else ""
            cells.append("outside" if np.isnan(differences).any() else versus)
            accepted = group.last("accepted").mean()
            cells.append("" if math.isnan(accepted) else f"{accepted:.1%}")
        lines.append(cells + [""] * (9 - len(cells)))
    head = "method; setting; seeds; KL, nats; true reward; share of what R\\* gains; "
    head += f"gap R\\* − R [95 %]; gap less that of {first} at this KL [95 %]; accepted"
    return table(head, lines)


def headline(groups: list[Group], best: Frontier) -> str:
    """DPO's gap at moderate KL: of each seed the mean over settings there, then over seeds."""
    low, high = MODERATE
    own = [g for g in groups if g.panel == "main" and g.method == "DPO" and g.rows]
    own = [group for group in own if low <= group.point("kl")[0] <= high]
    gaps = {}
    for group in own:
        gap, most = best.gap(group), best(group.last("kl"))
        for seed, *values in zip(group.rows, gap, gap / most, gap / best.gain(group)):
            gaps.setdefault(seed, []).append(values)
    gaps = {seed: rows for seed, rows in gaps.items() if len(rows) == len(own)}
    where = f"at moderate KL ({low:g} to {high:g} nats)"
    if not gaps:
        return f"DPO has no setting {where}" + (", of which a seed has all." if own else ".")
    values = np.array([np.mean(rows, 0) for rows in gaps.values()])  # (seeds, 3)
    gap, of_reward, of_gain = values.mean(0)
    ends = interval(values[:, 1])
    between = "" if math.isnan(ends[0]) else f" [{ends[0]:.1%}, {ends[1]:.1%}]"
    return (
        f"DPO's mean gap {where} is {gap:.3f}, {of_reward:.1%}{between} of R*(KL), and "
        f"{of_gain:.1%} of what R*(KL) gains over the start ({len(values)} seeds)."
    )


def sweep_text(groups: list[Group], best: Frontier, missing: set[str]) -> str:
    """Everything that is said of a sweep, in Markdown."""
    offenders = above([group for group in groups if group.rows], best)
    names = [f"{g.method} {g.setting} (by {x:.3f} ± {e:.3f})" for g, x, e in offenders]
    check = "No point lies above R*(KL) by more than two standard errors."
    if offenders:
        check = f"Above R*(KL) by more than two standard errors: {', '.join(names)}."
    left = f"{len(missing)} runs are not at their end yet." if missing else ""
    words = [headline(groups, best), check, left]
    lines = [" ".join(filter(None, words)).replace("R*", "R\\*")]
    for panel in dict.fromkeys(group.panel for group in groups):
        chosen = [group for group in groups if group.panel == panel]
        methods = list(dict.fromkeys(group.method for group in chosen))
        chosen.sort(key=lambda group: (methods.index(group.method), group.x or 0.0))
        lines += [f"### {PANELS.get(panel, (panel,))[0]}", sweep_table(chosen, best)]
    return "\n\n".join(lines) + "\n"


def report_sweep(directory: Path, out: Path):
    """Print and write the tables of a sweep, draw its figures."""
    groups, best, missing = read_sweep(directory)
    if not any(group.rows for group in groups if not group.exact):
        raise ReportError(f"{directory}: none of its runs has come to its end yet")
    text = sweep_text(groups, best, missing)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text(text, encoding="utf-8")
    print(text, flush=True)
    inputs = groups, best, drawn_methods(groups), out
    names = ["frontier"] + ["panels"] * any(
        group.panel in SMALL for group in groups if not group.exact
    )
    draw(lambda figure: [getattr(figure, name)(*inputs) for name in names])


def main():
    layout = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("directories", nargs="+", type=Path, help="of a sweep, or of runs")
    parser.add_argument("--out", type=Path, help="where figures and tables go")
    args = parser.parse_args()
    first = args.directories[0]
    try:
        if (first / "sweep.json").is_file() and len(args.directories) == 1:
            report_sweep(first, args.out or first)
        else:
            report_runs(args.directories, args.out or first.parent)
    except (ReportError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
