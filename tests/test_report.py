"""experiments/report.py, on made-up runs on the exact frontier of the reviews, less a gap."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import read_metrics, run_here, run_script, write_jsonl

import experiments
from experiments import figure, report, runs
from experiments.reviews import Reviews

METHODS = {  # settings, KL at the first of them, gap at KL 1, its growth
    "DPO": ((0.1, 0.3, 0.5, 1.0, 2.0, 5.0), 6.5, 0.12, 0.8),
    "IPO": ((0.05, 0.1, 0.2, 0.5), 5.0, 0.16, 0.9),
    "SimPO": ((2.0, 5.0, 10.0, 20.0), 9.0, 0.5, 1.1),
    "KTO": ((0.1, 0.3, 1.0, 3.0), 5.5, 0.22, 0.9),
    "DPO, length-normalised": ((1.0, 3.0, 10.0, 30.0), 4.0, 0.3, 0.7),
    "RPO": ((0.3, 1.0, 3.0), 2.5, 0.18, 0.7),
    "Preferred-FT": ((1.0,), 0.25, 0.45, 0.3),
    "unlikelihood": ((0.3, 0.6), 1.6, 0.6, 0.4),
}


@pytest.fixture(scope="module")
def grammar() -> Reviews:
    return Reviews()


def make_exact(grammar) -> dict:
    """What exact.json holds: the true frontier, and plausible opponents under it."""
    points = grammar.curve().T
    best = lambda kl: float(np.interp(kl, points[:, 1], points[:, 0]))
    exact = {"frontier": {"kl": points[:, 1].tolist(), "reward": points[:, 0].tolist()}}
    exact["start"] = points[0, 0]
    for n in (2, 4, 8, 16, 64, 256, 1024):
        kl = 0.93 * (math.log(n) - (n - 1) / n)
        row = {"n": n, "kl": kl, "reward": best(kl) - 0.02 * kl}
        exact.setdefault("best_of_n", []).append(row)
    for features, lost in (
        ("words", 0.012),
        ("all words", 0.016),
        ("no adverbs", 0.3),
        ("length", 0.9),
    ):
        for pairs in (100, 1000, 6000, 30000) if "words" in features else (6000,):
            for beta in (0.2, 0.5, 1.0, 2.0, 5.0):
                for seed in range(3):
                    kl = 1.5 / beta**1.6
                    kl = min(kl, 4 + kl / 4)
                    gap = lost * kl**0.9 * (6000 / pairs) ** 0.8 * (1 + 0.05 * seed)
                    row = {
                        "features": features,
                        "pairs": pairs,
                        "seed": seed,
                        "beta": beta,
                        "flips": 0.0,
                    }
                    row |= {"kl": kl, "reward": max(best(kl) - gap, 0.2)}
                    exact.setdefault("rlhf", []).append(row)
                    if pairs == 6000:  # the same pairs, worse labels
                        for flips in (0.1, 0.2):
                            exact["rlhf"].append(
                                row | {"flips": flips, "reward": row["reward"] - flips * gap}
                            )
    return exact


def make_runs(directory: Path, exact: dict, seeds: int) -> list[dict]:
    """Runs of all panels, as experiments/frontier.py leaves them; rows of sweep.json."""
    rng, runs = np.random.default_rng(0), []
    kls, rewards = exact["frontier"]["kl"], exact["frontier"]["reward"]

    def run(panel, method, setting, x, seed, kl, lost, falls=0.0, outside=0.02):
        name = f"{panel}/{method}-{setting}/{seed}".replace(" ", "_")
        runs.append({"run": name, "panel": panel, "method": method, "setting": setting, "x": x, "seed": seed})  # fmt: skip
        name += f"-{x}" * (panel in ("flips", "pairs"))
        runs[-1]["run"] = name
        (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / name / "done").touch()
        rows = [{"stage": "sft", "step": 100, "train/loss": 1.0}]
        kl, lost = kl * rng.lognormal(0, 0.08), lost * rng.lognormal(0, 0.25)
        for step in (47, 94, 141, 188):
            share = 1 - math.exp(-step / 50)
            now, gap = kl * share**2, lost * share**1.2 + rng.normal(0, 0.012)
            rows.append({"stage": "dpo", "step": step, "policy/kl": now, "policy/kl_error": 0.01 * now,
                         "policy/reward": np.interp(now, kls, rewards) - gap, "policy/reward_error": 0.015,
                         "policy/accepted": 1 - outside * share, "policy/samples": 2000,
                         "eval/logps/chosen": -20 - 12 * falls * share, "eval/logps/rejected": -22 - 20 * falls * share - 3 * share})  # fmt: skip
        write_jsonl(directory / name / "metrics.jsonl", rows)
        (directory / name / "run.json").write_text(json.dumps({"settings": {"seed": seed}}))

    for seed in range(seeds):
        for method, (settings, kl, lost, growth) in METHODS.items():
            for x in settings:
                end = kl * (settings[0] / x) ** 0.95
                run("main", method, f"β={x:g}", x, seed, end, lost * end**growth)
                if method in ("DPO", "IPO"):
                    run(
                        "flips main", method, f"β={x:g}", x, seed, 0.7 * end, 2 * lost * end**growth
                    )
        for x in (0.0, 0.1, 0.2, 0.3):
            for method, slope in (("DPO", 6), ("cDPO", 4), ("robust", 3)):
                run("flips", method, "β=1", x, seed, 1.0, 0.1 * (1 + slope * x))
        for x in (100, 300, 1000, 3000, 10000, 30000):
            run("pairs", "DPO", "β=1", x, seed, 1.0, 0.12 * (6000 / x) ** 0.6)
        for x in (0.1, 0.3, 1.0, 3.0):
            run("labels", "Bradley–Terry", f"β={x:g}", x, seed, x**-0.9, 0.12 * x**-0.8)
            run("labels", "always right", f"β={x:g}", x, seed, 1.1 * x**-0.9, 0.3 * x**-0.8)
        for x, lost in ((1, 0.12), (2, 0.09), (3, 0.07)):
            run("rounds", "DPO", f"{x} rounds", x, seed, 1.0, lost)
        for method, falls, outside in (("DPO", 0.1, 0.02), ("f-DPO, JS", 3, 0.98), ("RPO", -0.1, 0.01), ("IPO", 0.4, 0.05)):  # fmt: skip
            run("displacement", method, "β=1", None, seed, 2.0, 0.5, falls, outside)
    return runs


def make_sweep(directory: Path, grammar, seeds: int) -> Path:
    exact = make_exact(grammar)
    runs = make_runs(directory, exact, seeds)
    for n, method in enumerate(("RLOO, learned reward", "RLOO, true reward")):
        for seed in range(seeds):
            for x, kl in ((0.5, 3.5), (1.0, 1.3), (2.0, 0.33)):
                best = np.interp(kl, exact["frontier"]["kl"], exact["frontier"]["reward"])
                reward = best - (0.25, 0.05)[n] * kl**0.8 - 0.01 * seed
                row = {"kl": kl, "kl_error": 0.01, "reward": reward, "reward_error": 0.015}
                row = {f"policy/{name}": value for name, value in row.items()}
                run = f"main/rloo-{n}-{x:g}/{seed}"
                (directory / run).mkdir(parents=True)
                rows = [{"stage": "rloo", "step": 200} | row]
                write_jsonl(directory / run / "metrics.jsonl", rows)
                (directory / run / "done").touch()
                about = {"panel": "main", "method": method, "setting": f"β={x:g}", "x": x}
                runs.append({"run": run, **about, "seed": seed})
    (directory / "exact.json").write_text(json.dumps(exact))
    (directory / "sweep.json").write_text(json.dumps({"about": {"torch": "2.13"}, "runs": runs}))
    return directory


@pytest.fixture(scope="module")
def sweep(grammar, tmp_path_factory) -> Path:
    """Two seeds; of one run there is no end yet, and one diverged."""
    directory = make_sweep(tmp_path_factory.mktemp("report") / "sweep", grammar, 2)
    (directory / "main/DPO-β=0.3/1/done").unlink()
    (directory / "main/IPO-β=0.1/0/failed").write_text("dpo diverged by step 9: lower its rate\n")
    return directory


def made(panel: str, method: str, setting: str, ends: dict, **about) -> report.Group:
    """A group whose runs ended so: {seed: what was measured}."""
    group = report.Group(panel, method, setting, **about)
    for seed, row in ends.items():
        group.rows[seed] = {9: {f"policy/{name}": x for name, x in row.items()}}
    return group


STRAIGHT = report.Frontier([4.0, 0.0], [9.0, 1.0], 1.0)  # R*(KL) = 1 + 2 KL


@pytest.mark.parametrize(
    "errors, found", [(3, True), (1, False), (2.2, True), (1.8, False), (-9, False)]
)
def test_a_point_above_the_frontier_is_found(errors, found):
    """An error of KL counts, too: R* rises by twice as much. Of two seeds that happen to agree, the
    errors of their samples are what is known."""
    error = math.hypot(0.03, 2 * 0.02)
    row = {"kl": 1.0, "kl_error": 0.02, "reward": 3 + errors * error, "reward_error": 0.03}
    assert bool(report.above([made("main", "one", "β=1", {0: row})], STRAIGHT)) == found
    both = {seed: row | {"reward": 3 + errors * error / 2**0.5} for seed in (0, 1)}
    offenders = report.above([made("main", "one", "β=1", both)], STRAIGHT)
    assert bool(offenders) == found
    for group, excess, of in offenders:
        assert group.method == "one" and of == pytest.approx(error / 2**0.5)
        assert excess == pytest.approx(errors * of)


def test_intervals_hold_the_mean_as_often_as_they_say():
    low, high = runs.interval(np.array([0.0, 1.0]))  # percentiles 0 and 1, widened for two values
    assert (low, high) == pytest.approx((0.5 - 4.5855, 0.5 + 4.5855), abs=1e-3)
    assert np.isnan(runs.interval(np.array([1.0]))).all()
    rng = np.random.default_rng(1)
    for count in (5, 12):
        held = 0
        for _ in range(400):
            low, high = runs.interval(rng.normal(3.0, 1.0, count))
            held += low < 3.0 < high
        assert 367 <= held <= 393, count  # 380 ± 3 standard deviations


def test_compared_with_dpo_at_the_same_kl():
    """Exact where DPO's gap is linear in KL, whatever R* is, whatever order its settings have."""
    best = report.Frontier(np.linspace(0, 9, 900), np.linspace(0, 9, 900) ** 0.5, 0.0)
    end = lambda kl, gap: {"kl": kl, "reward": float(best(kl)) - gap}
    dpo = [
        made("main", "DPO", str(kl), {seed: end(kl, 0.1 + (0.2 + seed) * kl) for seed in (0, 1)})
        for kl in (4.0, 0.5, 1.0)
    ]
    ends = {
        seed: end(kl, 0.15 + (0.2 + seed) * kl + 0.01 * seed) for seed, kl in enumerate((0.6, 3.0))
    }
    ends[2] = end(1.0, 9.0)  # of a seed without DPO
    differences = report.beside(made("main", "IPO", "τ=1", ends), dpo, best)
    assert differences == pytest.approx([0.05, 0.06])
    outside = {0: end(0.6, 0.3), 1: end(4.1, 0.3)}
    assert np.isnan(report.beside(made("main", "IPO", "τ=2", outside), dpo, best)).tolist() == [
        False,
        True,
    ]
    table = report.sweep_table([*dpo, made("main", "IPO", "τ=2", outside)], best)
    assert "| outside |" in table.splitlines()[-1]


def test_what_is_said_of_a_sweep(sweep, tmp_path):
    """Tables and figures, and the same bytes from another process, whose hashes are others."""
    first = run_here("experiments/report.py", sweep, "--out", tmp_path / "here")
    second = run_script("experiments/report.py", sweep)
    tables = (sweep / "tables.md").read_text(encoding="utf-8")
    assert first.stdout.startswith(tables) and second.stdout.startswith(tables)
    for name in "tables.md frontier.png frontier.svg panels.png panels.svg".split():
        content = (sweep / name).read_bytes()
        assert content == (tmp_path / "here" / name).read_bytes(), name
        assert len(content) < (250_000 if name.endswith("png") else 300_000), name
    assert tables.startswith("DPO's mean gap at moderate KL (0.5 to 2 nats) is 0.1")
    assert "No point lies above" in tables and "1 runs are not at their end yet" in tables
    rows = [line.split(" | ") for line in tables.splitlines() if line.startswith("| ")]
    cells = {(row[0][2:], row[1]): row[2:] for row in reversed(rows)}  # the first panel counts
    assert cells["IPO", "β=0.1"][0] == "1, 1 diverged: dpo diverged by step 9: lower its rate"
    assert cells["DPO", "β=0.3"][0] == "1" and cells["DPO", "β=1"][0] == "2"
    for panel, flips in (
        ("main", 0.0),
        ("flips main", 0.2),
    ):  # each with the rewards fitted to its labels
        fitted = {"features": "words", "pairs": 6000, "beta": 1.0, "flips": flips}
        exact = json.loads((sweep / "exact.json").read_text())["rlhf"]
        rewards = [row["reward"] for row in exact if row.items() >= fitted.items()]
        text = tables.split(f"### {report.PANELS[panel][0]}\n")[1].split("###")[0]
        [line] = [line for line in text.splitlines() if "perfect RLHF, words | β=1 " in line]
        assert len(rewards) == 3 and f"| {np.mean(rewards):.3f}" in line
    best = report.read_sweep(sweep)[1]
    kls, rewards = (
        np.array(
            [
                read_metrics(sweep / f"main/SimPO-β=5/{seed}")[-1][f"policy/{name}"]
                for seed in (0, 1)
            ]
        )
        for name in ("kl", "reward")
    )
    assert cells["SimPO", "β=5"][1] == f"{kls.mean():.3f} ± {kls.std(ddof=1) / 2**0.5:.3f}"
    gain = best(kls) - best.start
    assert cells["SimPO", "β=5"][3] == f"{((rewards - best.start) / gain).mean():.1%}"
    assert cells["SimPO", "β=5"][4].startswith(f"{(best(kls) - rewards).mean():.3f} [")


def test_the_beginning_of_a_sweep(sweep, tmp_path):
    """One method and seed, no exact.json: R*(KL) from the grammar, no small panels."""
    about = json.loads((sweep / "sweep.json").read_text())
    chosen = [
        run for run in about["runs"] if run["run"].startswith("main/SimPO") and run["seed"] == 0
    ]
    for run in chosen:
        shutil.copytree(sweep / run["run"], tmp_path / run["run"])
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": chosen}))
    result = run_here("experiments/report.py", tmp_path)
    assert result.stdout.startswith("DPO has no setting at moderate KL")
    first, second = (report.read_sweep(directory)[1] for directory in (sweep, tmp_path))
    kls = np.linspace(0, 10, 50)
    assert first(kls) == pytest.approx(second(kls), abs=1e-6)
    assert {path.name for path in tmp_path.glob("*.*g")} == {"frontier.png", "frontier.svg"}


def test_names_stand_beside_their_points(sweep, tmp_path, monkeypatch):
    """At most seven methods, DPO and policy gradient among them; no name hides another, none is in
    the region where no policy can be."""
    figures = []
    monkeypatch.setattr(figure, "save", lambda drawn, *_: figures.append(drawn))
    groups, best, _ = report.read_sweep(sweep)
    methods = report.drawn_methods(groups)
    assert len(methods) == 7 and methods[:2] == ["DPO", "RLOO, learned reward"]
    figure.frontier(groups, best, methods, tmp_path)
    for axes in figures[0].axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        names = [text.get_text() for text in axes.texts]
        assert set(methods) <= set(names)
        for n, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:n]), names[n]
            x, y = axes.transData.inverted().transform((box.x0, box.y1))
            if axes is figures[0].axes[0] and names[n] in methods:
                assert y < best(x), names[n]
    figure.plt.close(figures[0])


def make_own(directory: Path, **settings) -> Path:
    """A run of train.py, of 0.1 more accuracy for each seed, and a last row that is torn."""
    s = {
        "data": f"{directory}/pairs.jsonl",
        "out_dir": str(directory),
        "loss": "dpo",
        "beta": 0.1,
        "log_every": 5,
    }
    directory.mkdir(parents=True)
    (directory / "run.json").write_text(json.dumps({"settings": s | {"options": {}} | settings}))
    rows = [{"stage": "sft", "step": 90, "eval/loss": 3.0}]
    for step in (0, 10, 20):
        rows.append({"stage": "dpo", "step": step, "eval/loss": 0.7 - 0.01 * step, "eval/rewards/margins": step,
                     "eval/rewards/accuracies": 0.5 + 0.01 * step + 0.1 * settings["seed"]})  # fmt: skip
    rows[-1] |= {"policy/kl": 0.4, "policy/reward": 1.5} if settings.get("loss") else {}
    write_jsonl(directory / "metrics.jsonl", rows)
    with open(directory / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"stage": "dpo", "step": 30, "eval/lo')
    return directory


def test_own_runs_from_the_command_line(tmp_path):
    out = tmp_path / "out"
    directories = [make_own(out / f"a{seed}", seed=seed, log_every=seed) for seed in (0, 1)]
    directories.append(make_own(out / "b", seed=0, beta=0.5))
    directories.append(out / "a0" / ".." / "b")  # the same one again
    directories.append(make_own(out / "c", seed=0, loss="simpo", options={"gamma": 0.5}))
    (out / "notes").mkdir()
    result = run_script("experiments/report.py", *directories, out / "notes")
    assert result.stderr == f"report.py: {out / 'notes'} is left out: it has no run.json\n"
    table = [line.strip("| ").split(" | ") for line in result.stdout.splitlines()]
    names = "eval/rewards/accuracies eval/rewards/margins eval/loss policy/kl policy/reward".split()
    assert table[0] == ["run", "seeds", "step", *names]
    assert table[2][:6] == ["loss=dpo beta=0.1", "2", "20", "0.750 ± 0.050", "20.000", "0.500"]
    assert table[3][:4] == ["loss=dpo beta=0.5", "1", "20", "0.700"]
    assert table[4] == [
        "loss=simpo beta=0.1",
        "1",
        "20",
        "0.700",
        "20.000",
        "0.500",
        "0.400",
        "1.500",
    ]
    assert {path.name for path in out.glob("report.*")} == {"report.png", "report.svg"}


def test_equal_runs_are_told_apart_by_where_they_are(tmp_path):
    """Also where their directories have one name, and data within them however it was written."""
    for place in "xy":
        out = tmp_path / place / "a"
        where = {
            "out_dir": f"./{out.relative_to('/')}/",
            "data": f"{out.relative_to('/')}/pairs.jsonl",
        }
        make_own(out, seed=0, **where)
    other = make_own(tmp_path / "z", seed=1, out_dir="z//", data="./z/pairs.jsonl")
    groups = runs.read_runs([tmp_path / "x" / "a", tmp_path / "y" / "a", other])
    assert list(groups) == [str(tmp_path / "x" / "a"), str(tmp_path / "y" / "a"), "all"]


def test_the_headline_is_of_seeds_with_all_settings():
    end = lambda kl, gap: {"kl": kl, "reward": 1 + 2 * kl - gap}
    one = made("main", "DPO", "β=1", {s: end(1.0, 0.3) for s in range(3)})
    two = made("main", "DPO", "β=2", {s: end(0.6, 0.1) for s in (1, 2, 3)})
    far = made("main", "DPO", "β=0.3", {0: end(3.0, 2.0)})
    said = report.headline([one, two, far], STRAIGHT)
    assert " is 0.200, " in said and said.endswith("(2 seeds).")
    two.rows = {3: two.rows[3]}
    assert report.headline([one, two], STRAIGHT).endswith(", of which a seed has all.")
    assert report.headline([far], STRAIGHT).startswith("DPO has no setting at moderate KL")


def test_without_matplotlib_the_tables_are_there(sweep, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "experiments.figure")
    monkeypatch.delattr(experiments, "figure")
    result = run_here("experiments/report.py", sweep, "--out", tmp_path)
    assert result.stderr == "report.py: no figure without matplotlib: pip install matplotlib\n"
    assert result.stdout == (tmp_path / "tables.md").read_text(encoding="utf-8") + "\n"
    assert {path.name for path in tmp_path.iterdir()} == {"tables.md"}


@pytest.mark.parametrize("files, sentence", [
    ({"notes": ""}, "none of these directories is a run of train.py (run.json)"),
    ({"run.json": "{}"}, "a run.json has no settings"),
    ({"run.json": "[1"}, "run.json: cannot be read as JSON"),
    ({"run.json": '{"settings": {}}'}, "none of these runs has rows of metrics yet"),
    ({"run.json": '{"settings": {}}', "metrics.jsonl": '{"step": 1}\nno\n{}\n'}, "metrics.jsonl:2: cannot be read as JSON"),
    ({"sweep.json": '{"runs": ['}, "sweep.json: cannot be read as JSON"),
    ({"sweep.json": '{"runs": [{"run": "a"}]}'}, "sweep.json: not as experiments/frontier.py writes it: KeyError('panel')"),
    ({"sweep.json": '{"runs": []}', "exact.json": '{"best_of_n": [{"n": 2}]}'}, "exact.json: not as experiments/frontier.py writes it: KeyError("),
    ({"sweep.json": '{"runs": []}', "exact.json": '{"frontier": {"kl": [0], "reward": [0]}}'}, "none of its runs has come to its end yet"),
])  # fmt: skip
def test_refusals_are_one_sentence(tmp_path, files, sentence):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    last = run_here("experiments/report.py", tmp_path, expect=2).stderr.splitlines()[-1]
    assert last.startswith("report.py: ") and sentence in last


if __name__ == "__main__":  # a sample of the figures: python tests/test_report.py DIR [SEEDS]
    make_sweep(Path(sys.argv[1]), Reviews(), int(sys.argv[2]))
