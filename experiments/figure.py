"""What experiments/report.py draws, by matplotlib. Each function writes NAME.png and NAME.svg, the
same bytes each time, and returns their names.

Colours are Okabe and Ito's, which the colour-blind tell apart; each method has its marker, too, and
its name stands beside its points.
"""

import itertools
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from experiments.report import Frontier, Group, average, curve  # noqa: E402

LOOKS = (  # colour and marker of a method; the first is DPO
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"),
    ("#56B4E9", "P"), ("#882255", "X"),
)  # fmt: skip
EXACT = {  # colour and line of what is calculated
    "best of N": ("#888888", "-"), "perfect RLHF, words": ("black", "-"),
    "perfect RLHF, no adverbs": ("black", "--"), "perfect RLHF, length": ("black", ":"),
}  # fmt: skip
TICKS = (0, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 14, 20, 30, 50)  # of KL
plt.rcParams.update({
    "font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#555555",
    "axes.grid": True, "grid.color": "#eeeeee", "savefig.dpi": 150, "svg.hashsalt": "dpo",
    "legend.frameon": False, "legend.fontsize": 9, "figure.constrained_layout.use": True,
})  # fmt: skip


def save(figure, out: Path, name: str) -> str:
    """Write both files, without dates and versions; the PNG with a palette of 256 colours."""
    palette = {"optimize": True}
    figure.savefig(out / f"{name}.png", metadata={"Software": None}, pil_kwargs=palette)
    figure.savefig(out / f"{name}.svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return f"{out / name}.png and .svg"


def write(axes, x: float, y: float, text: str, color: str, **how):
    how = {"fontsize": 9.5, "ha": "center", "va": "center"} | how
    return axes.text(x, y, text, color=color, zorder=6, **how)


def name_points(axes, named: list[tuple[str, str, np.ndarray]], bound: Frontier | None):
    """Write each name, (text, colour, points (n, 2)), near one of its points, where it hides the
    least; with a line to the point, if that is far. Above the frontier nothing is written."""
    axes.figure.canvas.draw()  # now the layout is known
    frame, dot = axes.get_window_extent(), axes.figure.dpi / 72
    to_pixels, to_data = axes.transData.transform, axes.transData.inverted().transform
    lines = [line.get_path().interpolated(8).vertices for line in axes.lines if line.get_zorder() > 1]
    points = [to_pixels(xy) for _, _, xy in named]
    taken = np.concatenate([to_pixels(line) for line in lines] + 6 * points)  # points count more
    boxes = []  # left, bottom, right, top
    for (text, color, _), own in zip(named, points):
        sample = write(axes, 0, 0, text, color)
        extent = sample.get_window_extent()
        sample.remove()
        half = np.array([extent.width, extent.height]) / 2
        choices = []
        for point in own[[frame.contains(*point) for point in own]]:
            for far, angle in itertools.product((9, 14, 24, 40, 60, 85, 110), np.arange(16) / 8):
                way = np.array([np.cos(np.pi * angle), np.sin(np.pi * angle)])
                middle = point + way * (far * dot + half * np.abs(way))
                box = np.array([middle - half, middle + half])
                hidden = ((taken > box[0] - 3 * dot) & (taken < box[1] + 3 * dot)).all(1).sum()
                for other in boxes:
                    hidden += 60 * ((box[0] < other[1]) & (other[0] < box[1])).all()
                outside = (box[0] < frame.min + 2).any() or (box[1] > frame.max - 2).any()
                if bound and not outside:
                    corner = to_data((box[0][0], box[1][1]))
                    outside = corner[1] > bound(corner[0])
                choices.append((hidden + far / 12 + 1000 * outside, len(choices), box, point))
        if choices:
            _, _, box, point = min(choices, key=lambda choice: choice[:2])
            boxes.append(box)
            write(axes, *to_data(box.mean(0)), text, color)
            near = np.clip(point, *box)  # the side of the box that looks at the point
            if np.linalg.norm(near - point) > 16 * dot:
                way = np.array([to_data(near), to_data(point)]).T
                axes.plot(*way, color=color, linewidth=0.6, alpha=0.8, zorder=1)


def center(group: Group, best: Frontier | None = None) -> tuple[float, float, float, float]:
    """KL and its error, reward (with `best` the gap to it) and its error."""
    if best is None:
        return *group.point("kl"), *group.point("reward")
    return *group.point("kl"), *average(best.gap(group), best.gap_error(group))


def path_of(group: Group, best: Frontier, gap: bool) -> tuple[list, list]:
    """KL, and reward or gap, where the run was measured, mean over seeds, from its start on."""
    measured = [{n for n, row in rows.items() if "policy/kl" in row} for rows in group.rows.values()]
    kls, values = [0.0], [0.0 if gap else best.start]
    for step in sorted(set.intersection(*measured)):
        rows = [rows[step] for rows in group.rows.values()]
        kl = np.array([row["policy/kl"] for row in rows])
        reward = np.array([row["policy/reward"] for row in rows])
        kls.append(kl.mean())
        values.append((best(kl) - reward if gap else reward).mean())
    return kls, values


def draw_methods(axes, groups: list[Group], best: Frontier, methods: list[str], gap: bool):
    """Markers, paths, what is calculated, and all their names."""
    named, bound, floor = [], best if gap else None, axes.get_ylim()[0]
    for method, (color, marker) in zip(methods, LOOKS):
        own = [group for group in groups if group.method == method]
        x, x_error, y, y_error = np.transpose(sorted(center(group, bound) for group in own))
        if gap:  # at the edge those that have none, on a log scale
            y = np.maximum(y, 1.03 * floor)
        size = 8.5 if marker in "PX" else 6.5
        axes.errorbar(x, y, y_error, x_error, linestyle="", color=color, elinewidth=1.1, zorder=4)
        axes.plot(x, y, color=color, linewidth=4, alpha=0.18, zorder=2)
        axes.plot(x, y, linestyle="", marker=marker, markersize=size, color=color,
                  markeredgecolor="white", markeredgewidth=0.7, zorder=5)  # fmt: skip
        usual = min(own, key=lambda group: abs(np.log(max(group.point("kl")[0], 1e-9))))
        axes.plot(*path_of(usual, best, gap), color=color, linewidth=0.9, zorder=3)
        named.append((method, color, np.transpose([x, y])))
    for method in dict.fromkeys(group.method for group in groups if group.exact):
        color, dashes = EXACT.get(method, ("black", "-."))
        own = sorted(center(group, bound) for group in groups if group.method == method)
        x, _, y, _ = np.transpose(own)
        marker = "." if method == "best of N" else ""
        axes.plot(x, y, dashes, color=color, linewidth=1.1, marker=marker, zorder=2)
        line = np.interp(fine := np.linspace(x[0], x[-1], 12), x, y)  # may be named anywhere
        named.append((method, color, np.transpose([fine, line])))
    name_points(axes, named, None if gap else best)


def frontier(groups: list[Group], best: Frontier, methods: list[str], out: Path) -> str:
    """frontier.png: reward against KL, below it the gap to R*(KL)."""
    groups = [group for group in groups if group.panel == "main" and group.rows]
    drawn = [group for group in groups if group.method in methods]
    right = 1.1 * max(group.point("kl")[0] for group in drawn)
    shape = {"sharex": True, "figsize": (8.3, 9), "height_ratios": (1, 1.2)}
    figure, (upper, lower) = plt.subplots(2, 1, **shape)
    upper.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    upper.set_xlim(0, right)
    upper.set_xticks([tick for tick in TICKS if tick < right])
    upper.xaxis.set_major_formatter("{x:g}")
    kls = np.linspace(0, right**0.5, 100) ** 2
    top = 1.03 * best(right)
    upper.set_ylim(min(0, *(group.point("reward")[0] for group in drawn)), top)
    upper.fill_between(kls, best(kls), top, color="#e9e9e9", linewidth=0)
    upper.plot(kls, best(kls), color="black", linewidth=2.2)
    write(upper, 0.22 * right, 0.87 * top, "no policy can be here", "#777777", style="italic")
    write(upper, 0.22 * right, 0.79 * top, "edge: R*(KL), the exact optimum", "black")
    draw_methods(upper, groups, best, methods, gap=False)
    upper.set_ylabel("true reward")
    upper.set_title("Reward for distance: what a policy gains by leaving its reference")

    shown = [group for group in groups if group in drawn or group.point("kl")[0] > 1]
    gaps = [center(group, best)[2] for group in shown]
    floor = 0.7 * min((gap for gap in gaps if gap > 0), default=0.01)
    lower.set_yscale("log")
    lower.set_ylim(floor, 1.5 * max(*gaps, 2 * floor))
    lower.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    lower.yaxis.set_major_formatter("{x:g}")
    lower.yaxis.set_minor_formatter("")
    draw_methods(lower, groups, best, methods, gap=True)
    lower.set_ylabel("gap (log scale)")
    lower.set_title("Where they differ: what is missing to the optimum, R*(KL) − reward")
    seeds = max(len(group.rows) for group in drawn)
    lower.set_xlabel(
        "KL(π‖π_ref) in nats (square-root scale)\n"
        f"A marker is a method at one setting: mean of up to {seeds} seeds ± one standard error. "
        "Thin lines: the way there while training."
    )
    return save(figure, out, "frontier")


def panels(groups, best, out):
    return ""


def runs(groups, names, out):
    return ""
