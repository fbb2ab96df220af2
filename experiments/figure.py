"""What experiments/report.py draws, by matplotlib. Each function writes NAME.png and NAME.svg, the
same bytes each time, and returns their names.

Colours are Okabe and Ito's, which the colour-blind tell apart; each method has its marker, too, and
its name stands beside its points.
"""

import itertools
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.collections import LineCollection

from experiments.report import Frontier, Group
from experiments.runs import average, curve

LOOKS = (  # colour and marker of a method; the first is DPO
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"),
    ("#56B4E9", "P"), ("#882255", "X"),
)  # fmt: skip
EXACT = {  # colour and line of what is calculated
    "best of N, true reward": ("#888888", "-"), "perfect RLHF, words": ("black", "-"),
    "perfect RLHF, all words": ("black", "-."), "perfect RLHF, no adverbs": ("black", "--"),
    "perfect RLHF, length": ("black", ":"),
}  # fmt: skip
TICKS = (0, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 14, 20, 30, 50)  # of KL
# Where a name may stand: so far from the end of its text, in dots, and in these directions
FAR, ANGLES = (9, 14, 24, 40, 60, 85, 110), np.arange(16) * np.pi / 8
NEAR = 16  # in dots: within it no line is needed to see whose name it is
SQUARE, MARKER = 8, 6  # pixels; as many points of a line as a marker counts for
plt.rcParams.update({
    "font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#555555",
    "axes.grid": True, "grid.color": "#eeeeee", "savefig.dpi": 150, "svg.hashsalt": "dpo",
    "legend.frameon": False, "legend.fontsize": 9, "figure.constrained_layout.use": True,
})  # fmt: skip


def save(figure, out: Path, name: str) -> str:
    """Write both files, without dates and versions; the PNG with a palette of 256 colours."""
    figure.savefig(out / f"{name}.png")
    with Image.open(out / f"{name}.png") as image:
        image.convert("RGB").quantize(256).save(out / f"{name}.png", optimize=True)
    figure.savefig(out / f"{name}.svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return f"{out / name}.png and .svg"


def write(axes, x: float, y: float, text: str, color: str, **how):
    how = {"fontsize": 9.5, "ha": "center", "va": "center"} | how
    return axes.text(x, y, text, color=color, zorder=6, **how)


def settle(figure):
    """Lay the figure out, once and for all."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def every_few_pixels(line: np.ndarray) -> np.ndarray:
    """Points on a line, (n, 2), so near each other that a text cannot be between them."""
    length = np.append(0, np.linalg.norm(np.diff(line, axis=0), axis=1).cumsum())
    at = np.arange(0, length[-1] + 1, 6)
    return np.transpose([np.interp(at, length, values) for values in line.T])


class Names:
    """Where the names of methods may stand among what is drawn: all in pixels, and once the layout
    is settled. `bound` is a curve above which nothing is written."""

    def __init__(self, axes, points: list[np.ndarray], bound: Frontier | None = None):
        self.axes, self.points, self.bound = axes, points, bound
        self.frame, self.dot = axes.get_window_extent(), axes.figure.dpi / 72
        drawn = [line.get_xydata() for line in axes.lines if line.get_zorder() > 1]
        for collection in axes.collections:
            if isinstance(collection, LineCollection):  # error bars
                drawn += collection.get_segments()
        lines = [every_few_pixels(axes.transData.transform(xy)) for xy in drawn if len(xy)]
        self.taken = np.concatenate(lines + MARKER * points)
        self.crowded = np.zeros(self.square_of(self.frame.max) + 1, dtype=bool)
        self.crowded[tuple(self.square_of(self.taken).T)] = True
        self.boxes = []  # of the names that stand, (low, high)

    def square_of(self, xy: np.ndarray) -> np.ndarray:
        """Of those that the frame is divided into."""
        return (np.clip(xy, 0, self.frame.max) / SQUARE).astype(int)

    def costs(self, number: int, point, low, high, far) -> tuple[np.ndarray, np.ndarray]:
        """What each box (corners: (ways, 2)) costs as the name of a method's point: what it hides,
        and how hard it is to see whose name it is. And where a line to the point would begin."""
        below, above = low[:, None] - 3 * self.dot, high[:, None] + 3 * self.dot
        hidden = ((self.taken > below) & (self.taken < above)).all(2).sum(1)
        start = np.clip(point, low, high)  # the side of the text that looks at the point
        line = start + np.linspace(0, 0.7, 15)[:, None, None] * (point - start)
        crossed = self.crowded[tuple(self.square_of(line).T)].mean(1) * far
        nowhere = np.full((1, 2), -1e6)  # if nothing else is named
        others = [xy for n, xy in enumerate(self.points) if n != number]
        others = np.concatenate([nowhere, *others])
        passed = np.linalg.norm(line[:, :, None] - others, axis=3).min((0, 2)) < NEAR / 2 * self.dot
        meant = (np.linalg.norm(others - point, axis=1) < NEAR * self.dot).sum()
        cost = 3.0 * hidden + 0.2 * far + (0.6 * crossed + 40.0 * passed) * (far > NEAR) + meant
        for box in self.boxes:
            cost += 60 * ((low < box[1] + 6) & (box[0] - 6 < high)).all(1)
        cost += 1000 * ((low < self.frame.min + 2) | (high > self.frame.max - 2)).any(1)
        if self.bound:
            corners = np.transpose([low[:, 0], high[:, 1]])
            x, y = self.axes.transData.inverted().transform(corners).T
            cost += 1000 * (y > self.bound(x))
        return cost, start

    def occupy(self, low: np.ndarray, high: np.ndarray):
        """A name stands there."""
        self.boxes.append((low, high))
        (left, bottom), (right, top) = self.square_of(np.array([low, high]))
        self.crowded[left : right + 1, bottom : top + 1] = True


def name_points(axes, named: list[tuple[str, str, np.ndarray]], bound: Frontier | None = None):
    """Write each name, (text, colour, points (n, 2)), near one of its points, where it costs the
    least; with a line to the point, if that is far. Above the frontier nothing is written."""
    to_pixels, to_data = axes.transData.transform, axes.transData.inverted().transform
    names = Names(axes, [to_pixels(xy) for _, _, xy in named], bound)
    far, angles = (values.ravel() for values in np.meshgrid(FAR, ANGLES, indexing="ij"))
    ways = np.transpose([np.cos(angles), np.sin(angles)])
    for number, (text, color, _) in enumerate(named):
        sample = write(axes, 0, 0, text, color)
        half = np.diff(sample.get_window_extent().get_points(), axis=0) / 2
        sample.remove()
        shift = far[:, None] * names.dot * ways + half * np.abs(ways)  # of the text's middle
        least, place = np.inf, None
        for n, point in enumerate(names.points[number]):
            low, high = point + shift - half, point + shift + half
            cost, start = names.costs(number, point, low, high, far)
            way = cost.argmin()
            price = cost[way] - 0.2 * n  # rather a late point: there they differ
            if names.frame.contains(*point) and price < least:
                least, place = price, (low[way], high[way], start[way], point)
        if place:
            low, high, start, point = place
            names.occupy(low, high)
            write(axes, *to_data((low + high) / 2), text, color)
            if np.linalg.norm(start - point) > NEAR * names.dot:
                ends = np.transpose([to_data(start), to_data(point)])
                axes.plot(*ends, color=color, linewidth=0.6, alpha=0.8, zorder=1)


def center(group: Group, best: Frontier | None = None) -> tuple[float, float, float, float]:
    """KL and its error, reward (with `best` the gap to it) and its error."""
    if best is None:
        return *group.point("kl"), *group.point("reward")
    return *group.point("kl"), *average(best.gap(group), best.gap_error(group))


def along(group: Group, name: str) -> tuple[list[int], np.ndarray]:
    """Steps at which all runs of a group recorded something, and what, (steps, seeds)."""
    found = [{n for n, row in rows.items() if name in row} for rows in group.rows.values()]
    steps = sorted(set.intersection(*found))
    values = [[rows[step][name] for rows in group.rows.values()] for step in steps]
    return steps, np.array(values).reshape(len(steps), -1)


def path_of(group: Group, best: Frontier) -> tuple[np.ndarray, np.ndarray]:
    """KL and reward as it trained, mean over seeds where they were measured, from the reference."""
    kls, rewards = along(group, "policy/kl")[1], along(group, "policy/reward")[1]
    return np.append(0.0, kls.mean(1)), np.append(best.start, rewards.mean(1))


def setting_of(group: Group) -> float:
    return group.x or 0.0


def draw_methods(axes, groups: list[Group], best: Frontier, methods: list[str], gap: bool) -> list:
    """Markers, paths and what is calculated; returns what `name_points` is to name."""
    named, bound, floor = [], best if gap else None, axes.get_ylim()[0]
    for method, (color, marker) in zip(methods, LOOKS):
        own = sorted((group for group in groups if group.method == method), key=setting_of)
        x, x_error, y, y_error = np.transpose([center(group, bound) for group in own])
        if gap:  # at the edge those that have none, on a log scale
            y = np.maximum(y, 1.03 * floor)
        size = 8.5 if marker in "PX" else 6.5
        axes.errorbar(x, y, y_error, x_error, linestyle="", color=color, elinewidth=1.1, zorder=4)
        axes.plot(x, y, color=color, linewidth=4, alpha=0.25, zorder=2)
        axes.plot(x, y, linestyle="", marker=marker, markersize=size, color=color,
                  markeredgecolor="white", markeredgewidth=0.7, zorder=5)  # fmt: skip
        usual = min(own, key=lambda group: abs(np.log(max(group.point("kl")[0], 1e-9))))
        if not gap and len(along(usual, "policy/kl")[0]) > 1:  # few samples: too noisy for a gap
            axes.plot(*path_of(usual, best), color=color, linewidth=0.9, zorder=3)
        named.append((method, color, np.transpose([x, y])))
    for method in dict.fromkeys(group.method for group in groups if group.exact):
        color, dashes = EXACT.get(method, ("#555555", "-."))
        own = sorted(center(group, bound) for group in groups if group.method == method)
        x, _, y, _ = np.transpose(own)
        marker = "." if method == "best of N, true reward" else ""
        axes.plot(x, y, dashes, color=color, linewidth=1.1, marker=marker, zorder=2)
        line = np.interp(fine := np.linspace(x[0], x[-1], 12), x, y)  # may be named anywhere
        if gap or (best(x) - y).max() > 0.5:  # else the frontier hides it
            named.append((method, color, np.transpose([fine, line])))
    return named


def frontier(groups: list[Group], best: Frontier, methods: list[str], out: Path) -> str:
    """frontier.png: reward against KL, below it the gap to R*(KL)."""
    groups = [group for group in groups if group.panel == "main" and group.rows]
    furthest = lambda method: max(g.point("kl")[0] for g in groups if g.method == method)
    groups = [group for group in groups if not group.exact or furthest(group.method) > 0.5]
    drawn = [group for group in groups if group.method in methods]
    if not drawn:
        return "no figure, as none of its runs is at its end"
    most = max(sum(group.point("kl")) for group in drawn)
    right = min(1.04 * most, 1.2 * best.kl[-1])  # beyond it nothing is to be gained
    inside = [group for group in drawn if group.point("kl")[0] <= right]
    shape = {"sharex": True, "figsize": (8.3, 9), "height_ratios": (1, 1.2)}
    figure, (upper, lower) = plt.subplots(2, 1, **shape)
    upper.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    upper.set_xlim(0, right)
    upper.set_xticks([tick for tick in TICKS if tick < right])
    upper.xaxis.set_major_formatter("{x:g}")
    kls = np.linspace(0, right**0.5, 100) ** 2
    top = 1.03 * best(right)
    upper.set_ylim(min([0, *(group.point("reward")[0] for group in inside)]), top)
    upper.fill_between(kls, best(kls), top, color="#e9e9e9", linewidth=0)
    upper.plot(kls, best(kls), color="black", linewidth=2.2)
    write(upper, 0.22 * right, 0.87 * top, "no policy can be here", "#777777", style="italic")
    write(upper, 0.22 * right, 0.79 * top, "edge: R*(KL), the exact optimum", "black")
    named = draw_methods(upper, groups, best, methods, gap=False)
    upper.set_ylabel("true reward")
    upper.set_title("Reward for distance: what a policy gains by leaving its reference")

    shown = inside + [group for group in groups if group.exact and group.point("kl")[0] > 1]
    gaps = [center(group, best)[2] for group in shown]
    floor = 0.7 * min((gap for gap in gaps if gap > 0), default=0.01)
    lower.set_yscale("log")
    lower.set_ylim(floor, 1.5 * max(*gaps, 2 * floor))
    lower.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    lower.yaxis.set_major_formatter("{x:g}")
    lower.yaxis.set_minor_formatter("")
    named_below = draw_methods(lower, groups, best, methods, gap=True)
    lower.set_ylabel("gap (log scale)")
    lower.set_title("Where they differ: what is missing to the optimum, R*(KL) − reward")
    lower.set_xlabel("KL(π‖π_ref), nats (square-root scale)")
    seeds = max(len(group.rows) for group in drawn)
    beyond = len(drawn) - len(inside)
    calculated = ""
    if any(group.exact for group in groups):
        calculated = "Grey and black are calculated: perfect RLHF fits\na reward to the same "
        calculated += "pairs, and optimises it exactly."
    figure.supxlabel(
        f"Each marker is a method at one setting, the mean of up to {seeds} seeds ± one standard "
        "error;\nthin lines follow one setting during training. " + calculated,
        fontsize=9, color="#555555", x=0.07, ha="left", multialignment="left",
    )  # fmt: skip
    if beyond:
        lower.annotate(f"{beyond} further right →", (1, 0.01), xycoords="axes fraction", ha="right")
    settle(figure)
    name_points(upper, named, best)
    name_points(lower, named_below)
    return save(figure, out, "frontier")


def looks_of(names, methods: list[str]) -> dict[str, tuple[str, str]]:
    """{method: colour, marker}: as in the large figure where it is there, else one that is free."""
    known = dict(zip(methods, LOOKS))
    free = [look for look in LOOKS if look not in {known[n] for n in names if n in known}]
    free = itertools.cycle(free or LOOKS)
    return {name: known.get(name) or next(free) for name in dict.fromkeys(names)}


def draw_lines(axes, lines: dict[str, list], looks: dict, dashes: str = "-"):
    """A line with error bars for each name, [(x, y, error), …]; dotted ones are not named."""
    for name, points in lines.items():
        x, y, error = np.transpose(sorted(points))
        color, marker = looks.get(name) or (EXACT.get(name, ("#555555",))[0], "")
        style = EXACT[name][1] if name in EXACT else dashes
        axes.errorbar(x, y, error, color=color, elinewidth=1, linewidth=1.3, linestyle=style,
                      marker=marker, markersize=4.5, zorder=3,
                      label=name if dashes == "-" else None)  # fmt: skip


def percent(group: Group, best: Frontier) -> tuple[float, float]:
    """The gap in % of what R*(KL) gains over the start, and its standard error."""
    gain = best.gain(group)
    return average(100 * best.gap(group) / gain, 100 * best.gap_error(group) / gain)


def panels(groups: list[Group], best: Frontier, methods: list[str], out: Path) -> str:
    """panels.png: pairs, flipped labels, kinds of labels, on-policy rounds, displacement."""
    shown = {"pairs": "Number of pairs", "flips": "Share of flipped labels", "labels": "Labels",
             "rounds": "On-policy rounds"}  # fmt: skip
    figure, axes = plt.subplots(2, 3, figsize=(8.3, 5.8))
    places = dict(zip((*shown, "logps", "outside"), axes.flat))
    for panel, title in shown.items():
        own = [group for group in groups if group.panel == panel and group.rows]
        lines, place = {}, places[panel]
        place.set_title(title)
        trained = [group for group in own if not group.exact]
        for group in trained:
            x = group.point("kl")[0] if panel == "labels" else group.x
            lines.setdefault(group.method, []).append((x, *percent(group, best)))
        if panel == "pairs":
            place.set_xscale("log")
            place.set_yscale("log")
            place.yaxis.set_major_formatter("{x:g}")
            place.yaxis.set_minor_formatter("")
        if panel == "rounds":
            place.set_xticks(sorted({group.x for group in trained}))
        if panel == "flips":
            place.xaxis.set_major_formatter("{x:.0%}")
        place.set_xlabel({"labels": "KL, nats", "flips": "", "rounds": "rounds"}.get(panel, panel))
        if panel in ("pairs", "flips"):
            lines |= learned_rewards(own, best)
        if lines:
            place.margins(x=0.08, y=0.2)
            looks = looks_of([group.method for group in trained], methods)
            draw_lines(place, lines, looks)
            if panel != "pairs":
                place.set_ylim(bottom=0)
    for place in axes[:, 0]:
        place.set_ylabel("gap, % of what R* gains")
    own = [group for group in groups if group.panel == "displacement" and group.rows]
    looks = looks_of([group.method for group in own], methods)
    places["logps"].set_title("log π of chosen (–), rejected (‥)")
    places["outside"].set_title("Mass on what is no review")
    places["outside"].yaxis.set_major_formatter("{x:.0%}")
    for name, place, dashes in (("eval/logps/chosen", places["logps"], "-"),
                                ("eval/logps/rejected", places["logps"], ":"),
                                ("policy/accepted", places["outside"], "-")):  # fmt: skip
        lines = {}
        for group in own:
            steps, values = along(group, name)
            values = 1 - values if name == "policy/accepted" else values
            if steps:
                lines[group.method] = [(n, *average(row)) for n, row in zip(steps, values)]
        place.set_xlabel("step")
        draw_lines(place, lines, looks, dashes)
    for place in axes.flat:
        if place.has_data():
            low = place in (places["pairs"], places["logps"])
            where = "lower left" if low else "upper left"
            place.legend(loc=where, fontsize=8, handlelength=1.4, labelspacing=0.3)
        else:
            place.set_axis_off()
    return save(figure, out, "panels")


def learned_rewards(groups: list[Group], best: Frontier) -> dict[str, list]:
    """RLHF without an optimiser's error, its reward well specified: the gap in % at DPO's KL, for
    each x of DPO, interpolated between its β; none where that would be extrapolation."""
    lines, method = {}, "perfect RLHF, words"
    for dpo in groups:
        own = [group for group in groups if group.method == method and group.x == dpo.x]
        if dpo.method == "DPO" and own:
            points = sorted((group.point("kl")[0], *percent(group, best)) for group in own)
            kls, shares, errors = np.transpose(points)
            kl = dpo.point("kl")[0]
            if kls[0] <= kl <= kls[-1]:
                point = (dpo.x, np.interp(kl, kls, shares), np.interp(kl, kls, errors))
                lines.setdefault(method, []).append(point)
    return lines


def runs(groups: dict[str, list], names: list[str], out: Path) -> str:
    """report.png: accuracy, margins and loss along the steps; where all of a group's runs measured
    their KL, what they ended with against it."""
    measured = [label for label, own in groups.items() if len(curve(own, "policy/kl")[0])]
    shape = (2, 2, (8.3, 6.4)) if measured else (1, 3, (8.3, 3.2))
    figure, axes = plt.subplots(*shape[:2], figsize=shape[2])
    looks = dict(zip(groups, [(*look, dashes) for dashes in ("-", "--") for look in LOOKS]))
    for axis, name in zip(axes.flat, names):
        axis.set_title(name)
        axis.set_xlabel("step")
        for label, (color, marker, dashes) in looks.items():
            steps, mean, error = curve(groups[label], name)
            few = marker if len(steps) < 25 else ""
            axis.plot(steps, mean, dashes, color=color, marker=few, markersize=4, label=label)
            axis.fill_between(steps, mean - error, mean + error, color=color, alpha=0.15, lw=0)
    if measured:
        rewarded = all(len(curve(groups[label], "policy/reward")[0]) for label in measured)
        name, axis = "policy/reward" if rewarded else names[0], axes.flat[3]
        axis.set_title(f"{name} against KL")
        axis.set_xlabel("policy/kl, nats")
        for label in measured:
            color, marker, _ = looks[label]
            (_, x, x_error), (_, y, y_error) = (
                curve(groups[label], n) for n in ("policy/kl", name)
            )
            if len(y):
                end = x[-1], y[-1], y_error[-1], x_error[-1]
                axis.errorbar(*end, color=color, marker=marker, linestyle="")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return save(figure, out, "report")
