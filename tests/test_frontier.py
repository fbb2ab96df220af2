"""The sweep of the frontier: its pairs, its plan, its runs, and that nothing is done twice."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import read_metrics
from test_reports import plain_score

import data
import sample
from experiments import exact, frontier, report, reviews

DPO = "--loss=dpo --beta=1"
ENTRY = partial(frontier.Entry, panel="main", setting="β=1", x=1, pairs=64)


def test_pairs_of_a_seed_are_paired():
    """Fewer pairs are the first of more; fewer flips are among more; right labels turn round those,
    and only those, of which the rejected one is better; the rest is what the experiment writes."""
    entry = ENTRY(run="", method="DPO", seed=3, pairs=400)
    plain = frontier.pairs_of(entry)
    written = reviews.Reviews(3).preferences(400, "train")
    assert [tuple(row.values()) for row in plain] == [(e.prompt, *e.responses) for e in written]
    assert frontier.pairs_of(entry._replace(pairs=100)) == plain[:100]
    turned = {}
    for rate in (0.1, 0.4):
        rows = frontier.pairs_of(entry._replace(flips=rate))
        turned[rate] = {i for i, row in enumerate(rows) if row != plain[i]}
        flipped = exact.flip_labels(written, rate, 3)  # those of exact.py's table
        assert [row["chosen"] for row in rows] == [e.responses[0] for e in flipped]
        assert all(rows[i]["chosen"] == plain[i]["rejected"] for i in turned[rate])
        assert len(turned[rate]) == pytest.approx(400 * rate, abs=4 * (400 * rate) ** 0.5)
    assert turned[0.1] < turned[0.4]
    wrong = 0
    for row, before in zip(frontier.pairs_of(entry._replace(right=True)), plain):
        better, worse = (plain_score(row["prompt"], row[y])[1] for y in ("chosen", "rejected"))
        assert better >= worse - 1e-9
        assert row == before or better > worse
        wrong += row != before
    assert 40 < wrong < 200


def test_the_plan():
    """Nine methods, ten seeds for some of them, as many settings for each, and more of DPO's curve
    between them; a run that stands in several panels is one run; train.py takes its flags."""
    entries = frontier.plan(quick=False)
    main = [e for e in entries if e.panel == "main"]
    for method in frontier.METHODS:
        settings = {e.setting for e in main if e.method == method}
        seeds = sorted(e.seed for e in main if e.method == method)
        count = 10 if method in frontier.HEADLINE else 5
        many = 8 if method == "DPO" else 5
        assert len(settings) == many and seeds == sorted([*range(count)] * many), method
    one = {}
    for e in entries:
        own = e._replace(panel="", method="", setting="", x=0)
        assert one.setdefault(e.run, own) == own
    assert len({e.panel for e in entries}) == 7
    for flags in {e.flags for e in entries if not e.rloo}:
        frontier.train.parse_settings(["--data=x", *flags.split()])
    quick = frontier.plan(quick=True)
    assert {e.run for e in quick} < {e.run for e in entries} and len(quick) < 40


@pytest.fixture
def small(monkeypatch):
    for name, value in (("DEMONSTRATIONS", 320), ("PAIRS", 64), ("STEPS", 4), ("BATCH", 16)):
        monkeypatch.setattr(frontier, name, value)
    monkeypatch.setattr(frontier.os, "cpu_count", lambda: 1)  # threads of a process


def test_what_is_measured(small, tmp_path):
    """Of samples of the policy itself; with the reference as policy KL is 0."""
    frontier.make_reference(tmp_path)
    model, tokenizer = sample.load(tmp_path / "reference")
    other, _ = sample.load(tmp_path / "reference")
    row = frontier.measure(model, other, tokenizer, 40, seed=2)
    assert row["policy/kl"] == row["policy/kl_error"] == 0 and row["policy/samples"] == 40
    with torch.no_grad():
        model.norm.weight.mul_(1.5)  # sharper
    row = frontier.measure(model, other, tokenizer, 40, seed=2)
    prompts = np.random.default_rng(2).choice(reviews.Reviews().prompts["eval"], 40).tolist()
    trees = sample.draw(model, tokenizer, prompts, max_new_tokens=64, seed=2)
    texts = [tokenizer.decode(ids, continuation=True) for _, ids in trees]
    rewards = np.array([plain_score(x, y)[1] for x, y in zip(prompts, texts)])
    rewards[[ids[-1] != tokenizer.eos_id for _, ids in trees]] = np.nan
    assert row["policy/accepted"] == np.isfinite(rewards).mean()
    rewards = np.nan_to_num(rewards)
    assert row["policy/reward"] == pytest.approx(rewards.mean(), abs=1e-9)
    assert row["policy/reward_error"] == pytest.approx(rewards.std(ddof=1) / 40**0.5)
    assert row["policy/kl"] > 0.1
    [first] = frontier.sampled_pairs(tmp_path / "reference", 1, seed=5, number=2)
    assert first["prompt"] in reviews.Reviews().prompts["train"]
    assert first["chosen"] != first["rejected"]


def test_a_sweep_is_made_once_and_goes_on(small, tmp_path, capfd, monkeypatch):
    """Each run is measured four times; one that diverges is marked, and the others go on; rounds
    begin where the last one ended, with pairs of its policy; a second start makes only what is
    missing, and what was made for another entry is made anew."""
    entries = [
        ENTRY(run="a/0", method="DPO", seed=0, flags=DPO),
        ENTRY(run="b/0", method="lost", seed=0, flags=f"{DPO} --learning_rate=1e18"),
        ENTRY(run="c/0", method="twice", seed=0, flags=DPO, rounds=2),
    ]
    frontier.sweep(tmp_path, entries, workers=2, samples=(6, 8))
    printed = capfd.readouterr().out
    rows = [row for row in read_metrics(tmp_path / "a/0") if "policy/kl" in row]
    assert [(row["step"], row["policy/samples"]) for row in rows] == [
        (1, 6),
        (2, 6),
        (3, 6),
        (4, 8),
    ]
    assert "diverged" in (tmp_path / "b/0/failed").read_text()
    assert "[3/3]" in printed and "diverged" in printed
    about = json.loads((tmp_path / "c/0/run.json").read_text())["settings"]
    assert about["init_from"] == str(tmp_path / "c/0/round1")
    first, second = (
        [row for _, row in data.read_jsonl(str(tmp_path / "c/0" / name))]
        for name in ("round1/pairs.jsonl", "pairs.jsonl")
    )
    assert len(first) == len(second) == 32
    assert first == frontier.pairs_of(entries[0])[:32] and first != second
    assert not list((tmp_path / "a/0").rglob("*.safetensors")), "only what is small stays"
    listed = json.loads((tmp_path / "sweep.json").read_text())
    assert [run["run"] for run in listed["runs"]] == ["a/0", "b/0", "c/0"]
    seconds = listed["about"]["seconds"]
    assert seconds > 0

    with monkeypatch.context() as patch:  # stopped before any run: of other ones nothing counts
        patch.setattr(frontier, "run_all", lambda tasks, *_: lost.extend(tasks))
        lost, done = [], tmp_path / "a/0/done"
        patch.setattr(frontier, "RATE", 1e-4)
        frontier.sweep(tmp_path, entries[:1], workers=2, samples=(6, 8))
        assert lost == ["exact", "a/0"] and not done.exists()
        assert report.read_sweep(tmp_path)[2] == {"a/0"}
        done.touch()
    log, known = (tmp_path / "a/0/log").read_text(), (tmp_path / "exact.json").stat()
    entries[2] = entries[2]._replace(rounds=1)
    frontier.sweep(tmp_path, entries, workers=2, samples=(6, 8))
    printed = capfd.readouterr().out
    assert "[1/1] c/0" in printed and (tmp_path / "a/0/log").read_text() == log
    assert not (tmp_path / "c/0/round1").exists()
    again = (tmp_path / "exact.json").stat()
    assert again.st_mtime_ns == known.st_mtime_ns, "nothing of it was missing"
    monkeypatch.setattr(frontier, "PRICES", (1.0, 4.0))
    frontier.write_exact(tmp_path / "exact.json", entries)
    fits = json.loads((tmp_path / "exact.json").read_text())["rlhf"]
    assert {row["beta"] for row in fits} == {1.0, 4.0}
    assert json.loads((tmp_path / "sweep.json").read_text())["about"]["seconds"] > seconds
    ours, theirs = (read_metrics(tmp_path / name) for name in ("a/0", "c/0"))
    same = lambda row: {k: x for k, x in row.items() if "second" not in k and "memory" not in k}
    assert list(map(same, ours)) == list(map(same, theirs)), "the same entry is the same run"
