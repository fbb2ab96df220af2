"""What keeps a run from harm: steps that are not finite, weights that diverged, a loss that does not
move, data that is another than it was, and signals at any moment."""

import dataclasses
import itertools
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHAPES, make_model, read_metrics, run_here, run_script, write_jsonl
from test_lora import adapted, merged_by_hand

import data
import dpo
import train
from experiments import reviews
from extra import doctor, guard, refusals, states
from extra import weights as files_of_weights
from model import Transformer, load_pretrained, read_safetensors, save_pretrained

POISON = 96  # a token whose gradient is not finite, though the loss is
TAKE_STEP = dpo.take_step
SKIPPED = "is skipped, as loss or gradient is not finite: "


def poison(replace):
    """Make POISON one, by replace(module, name, function)."""
    logps_of = dpo.sequence_logps

    def sequence_logps(model, batch):
        logps = logps_of(model, batch)
        if torch.is_grad_enabled() and (batch.targets == POISON).any():
            logps.register_hook(lambda gradient: gradient * math.inf)
        return logps

    replace(dpo, "sequence_logps", sequence_logps)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """On the CPU; and signals end the tests again."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    poison(monkeypatch.setattr)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def pairs(count: int, bad=()) -> list[dict]:
    """Rows of token ids; those in `bad` are learnt with no finite gradient."""
    rng = np.random.default_rng(count)
    ids = lambda: rng.integers(3, POISON, rng.integers(2, 7)).tolist()
    rows = [{"prompt": ids(), "chosen": ids(), "rejected": ids()} for _ in range(count)]
    for n in bad:
        rows[n]["chosen"].append(POISON)
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("base")
    torch.manual_seed(3)
    save_pretrained(make_model(SHAPES["tied"], scale=3.0).float(), where)
    return where


@pytest.fixture
def start(base, tmp_path):
    """Runs train.py in this process, on pairs of ids, from that checkpoint."""
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs(12))
    held_out = write_jsonl(tmp_path / "eval.jsonl", pairs(5))

    def start(name: str, *flags: str, expect: int = 0) -> SimpleNamespace:
        given = {"data": path, "eval_data": held_out, "init_from": base, "batch_size": 3}
        given |= {"max_length": 32, "max_prompt_length": 16, "log_every": 1, "warmup_steps": 0}
        given |= {"micro_batch_tokens": 30, "learning_rate": 1e-2, "beta": 0.5}
        given |= {"out_dir": tmp_path / name} | dict(flag[2:].split("=") for flag in flags)
        given = {key: value for key, value in given.items() if value != "-"}  # without it
        done = run_here("train.py", *(f"--{n}={x}" for n, x in given.items()), expect=expect)
        if expect == 2:
            [sentence] = done.stderr.splitlines()
            assert sentence.startswith("train.py: ") and "Traceback" not in sentence
            done.sentence = sentence.removeprefix("train.py: ")
        return done

    return start


def numbers(out: Path) -> list[dict]:
    rates = ("pairs_per_second", "tokens_per_second", "peak_memory_gib")
    return [{n: x for n, x in row.items() if n not in rates} for row in read_metrics(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(out).state_dict()


def assert_same(one: Path, other: Path):
    """Weights and rows, bit by bit."""
    assert numbers(one) == numbers(other)
    a, b = weights(one), weights(other)
    assert all(torch.equal(a[name], b[name]) for name in a)


# Steps that are not finite


def spoilt(monkeypatch, steps: set[int], what: str):
    """Spoil one micro-batch of each of these steps, counted from 0."""
    step, logps_of, now = dpo.take_step, dpo.sequence_logps, iter(itertools.count())
    left = []

    def take_step(*arguments):
        left[:] = [what] if next(now) in steps else []
        return step(*arguments)

    def sequence_logps(model, batch):
        logps = logps_of(model, batch)
        if left and torch.is_grad_enabled():
            if left.pop() == "loss":
                return logps * math.nan
            logps.register_hook(lambda gradient: gradient * math.inf)
        return logps

    monkeypatch.setattr(dpo, "take_step", take_step)
    monkeypatch.setattr(dpo, "sequence_logps", sequence_logps)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("flags", [
    ["--sft_epochs=0"], ["--sft_epochs=0", "--loss=bco", "--optimizer=rmsprop"],
    ["--epochs=0", "--learning_rate=-", "--beta=-", "--sft_learning_rate=1e-2", "--lora_rank=2"],
])  # fmt: skip
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(what, flags, start, tmp_path):
    """It changes neither weights nor moments; what follows is as if nobody had taken it. It is
    counted, and its examples are named by file and line."""
    rows = pairs(12)
    rows.insert(1, rows[0] | {"rejected": rows[0]["chosen"]})  # dropped, but by SFT
    path, stage = write_jsonl(tmp_path / "rows.jsonl", rows), "sft" if len(flags) > 3 else "dpo"
    flags = [*flags, f"--data={path}", "--log_every=2", "--seed=4"]

    def watching(model, optimizer, *arguments):
        copies = lambda: [
            tensor.clone() for tensor in states.tensors_of(model, optimizer).values()
        ]  # fmt: skip
        before = copies()
        sums = step(model, optimizer, *arguments)
        same = [torch.equal(*each) for each in zip(before, copies(), strict=False)]
        assert all(same) if not sums else not all(same)
        assert all(parameter.grad is None for parameter in model.parameters())
        kinds.append(bool(sums))
        return sums

    with pytest.MonkeyPatch.context() as patch:
        kinds = []
        spoilt(patch, {1, 2}, what)
        step = dpo.take_step
        patch.setattr(dpo, "take_step", watching)
        printed = start("spoilt", *flags).stdout
    assert kinds == [n not in (1, 2) for n in range(len(kinds))]
    with pytest.MonkeyPatch.context() as patch:
        now = iter(itertools.count())
        patch.setattr(dpo, "take_step", lambda *a: {} if next(now) in (1, 2) else TAKE_STEP(*a))
        start("left out", *flags)
    assert_same(tmp_path / "spoilt", tmp_path / "left out")
    counted = [row for row in numbers(tmp_path / "spoilt") if "train/skipped_steps" in row]
    assert counted == [
        {"stage": stage, "step": step, "train/skipped_steps": step - 1} for step in (2, 3)
    ]
    start("whole", *flags, "--log_every=1")
    first = next(row for row in numbers(tmp_path / "whole") if row["step"] == 1)
    second = [row for row in numbers(tmp_path / "spoilt") if row["step"] == 2]
    assert second[1]["train/loss"] == first["train/loss"], "the mean of those that were taken"
    lines = [*range(1, 14)] if stage == "sft" else [1, *range(3, 14)]
    order = np.random.default_rng((4, 0)).permutation(len(lines))
    for step in (2, 3):
        names = [f"{path}:{lines[e]}" for e in order[3 * step - 3 : 3 * step]]
        assert f"\n{stage} {step}  {SKIPPED}{', '.join(names)}\n" in printed
    assert printed.count(SKIPPED) == 2


def test_ten_in_a_row_end_the_run(start, tmp_path):
    """Nine do not, and not ten with one among them that is finite. The states before are whole."""
    ends = []
    for name, bad in (
        ("nine", range(9, 36)), ("broken", [*range(9, 27), *range(30, 45)]), ("ten", range(9, 48)),
    ):  # fmt: skip
        path = write_jsonl(tmp_path / f"{name}.jsonl", pairs(48, bad))
        flags = [f"--data={path}", "--shuffle=false", "--sft_epochs=0", "--save_every=2"]
        done = start(name, *flags, expect=2 if name == "ten" else 0)
        ends.append(numbers(tmp_path / name)[-1].get("train/skipped_steps"))
    assert done.sentence == "dpo diverged by step 13: lower its learning rate"
    assert ends[:2] == [None, None] and not (tmp_path / "ten" / "config.json").exists()
    assert states.newest(tmp_path / "ten", whole=True)["state"] == "dpo-12"
    names = [place.name for place in states.places_in(tmp_path / "ten")]
    assert names == ["dpo-12", "dpo-10"]
    for name in names:
        assert states.read(tmp_path / "ten" / "resume" / name, whole=True)["step"] == int(name[4:])
    start("three", f"--data={path}", "--shuffle=false", "--sft_epochs=0", "--lr_schedule=constant",
          "--max_steps=3")  # fmt: skip
    start("constant", *flags, "--lr_schedule=constant", expect=2)
    saved = read_safetensors(tmp_path / "constant" / "resume" / "dpo-12" / "state.safetensors")
    for name, weight in weights(tmp_path / "three").items():
        assert torch.equal(saved[name], weight)
    again = ["--resume=true", *flags, "--lr_schedule=constant"]
    resumed = start("constant", *again, expect=2)  # goes on counting, and ends at once
    assert resumed.sentence == "dpo diverged by step 13: lower its learning rate"


def test_ten_in_a_row_on_two_ranks(start, base, tmp_path):
    """The same rows, and the same state as on one."""
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(48, range(9, 48)))
    flags = [f"--data={path}", "--shuffle=false", "--sft_epochs=0", "--save_every=4"]
    start("one", *flags, expect=2)
    settings = states.newest(tmp_path / "one", whole=False)["settings"]
    names = ("beta", "batch_size", "learning_rate", "log_every", "micro_batch_tokens", "eval_data",
             "warmup_steps", "init_from", "max_length", "max_prompt_length")  # fmt: skip
    given = [f"--{name}={settings[name]}" for name in names]
    script = tmp_path / "poisoned.py"
    where = [str(place) for place in (ROOT, ROOT / "tests")]
    script.write_text(f"import sys\nsys.path[:0] = {where}\nimport test_guard, train\n"
                      "test_guard.poison(setattr)\ntrain.main(sys.argv[1:])\n")  # fmt: skip
    out = f"--out_dir={tmp_path / 'two'}"
    done = run_script(script, *given, *flags, out, ranks=2, expect=1)
    assert "train.py: dpo diverged by step 13: lower its learning rate\n" in done.stderr
    assert done.stdout.count(SKIPPED) == 9
    one, two = (numbers(tmp_path / name) for name in ("one", "two"))
    signs = ("rewards/ties", "rewards/accuracies", "both_fell")  # of exact zeros, at first
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name, x in a.items():
            if a["step"] > 1 or not name.endswith(signs):
                assert b[name] == (x if name == "stage" else pytest.approx(x, rel=1e-3, abs=1e-4))
    places = [tmp_path / name / "resume" / "dpo-12" for name in ("one", "two")]
    one, two = (read_safetensors(place / "state.safetensors") for place in places)
    assert states.read(places[1], whole=True)["skipped"] == {"dpo": [*range(3, 12)]}
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)


def test_an_evaluation_that_is_not_finite_ends_the_run(start, tmp_path, monkeypatch):
    evaluate, now = dpo.evaluate, iter(itertools.count())
    wrong = lambda *a: evaluate(*a) | ({"eval/rewards/chosen": math.nan} if next(now) == 1 else {})
    monkeypatch.setattr(dpo, "evaluate", wrong)
    done = start("out", "--sft_epochs=0", "--eval_every=2", expect=2)
    assert done.sentence == "dpo diverged by step 2: lower its learning rate"
    assert [row["step"] for row in read_metrics(tmp_path / "out")] == [0, 1, 2]
    assert not (tmp_path / "out" / "config.json").exists()


# What is saved


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_weights_that_diverged_in_the_last_step_are_not_saved(stage, start, tmp_path):
    """No loss is computed after it."""
    rate = "--sft_learning_rate=1e30" if stage == "sft" else "--learning_rate=1e30"
    done = start("out", rate, "--max_steps=1", "--eval_data=-", expect=2)
    sentence = r"the model diverged: its weights, \S+ by root mean square, are not saved: lower the"
    assert re.fullmatch(f"{sentence} learning rate", done.sentence)
    assert not (tmp_path / "out" / "config.json").exists()
    assert (tmp_path / "out" / "sft" / "config.json").exists() == (stage == "dpo")
    names = {path.name for path in (tmp_path / "out" / "resume").glob("*-*")}
    assert names == (set() if stage == "sft" else {"dpo-0"})


def a_run(out: Path, lora_rank: int = 0) -> SimpleNamespace:
    out.joinpath("metrics.jsonl").write_text('{"stage": "sft", "step": 1}\n')
    settings = dataclasses.replace(train.Settings(), lora_rank=lora_rank)
    return SimpleNamespace(out=out, rank=0, settings=settings)


def test_how_large_weights_may_be(tmp_path):
    """By root mean square; not a number is too large."""
    model = Transformer(SHAPES["grouped"])
    for value, fine in ((999.0, True), (1001.0, False), (math.nan, False), (math.inf, False)):
        for parameter in model.parameters():
            parameter.data.fill_(value)
        if fine:
            guard.prepare(model, tmp_path, a_run(tmp_path))
            continue
        with pytest.raises(data.DataError, match="^the model diverged: its weights, "):
            guard.prepare(model, tmp_path, a_run(tmp_path))
    model = make_model(SHAPES["grouped"])
    model.norm.weight.data[0] = math.nan  # one is enough
    with pytest.raises(data.DataError, match="weights, nan by root mean square, are not saved"):
        guard.prepare(model, tmp_path, a_run(tmp_path))


def test_adapters_are_merged_before_a_model_is_saved(tmp_path):
    model = adapted(SHAPES["grouped"])
    expected = {name: weight.clone() for name, weight in merged_by_hand(model).items()}
    guard.prepare(model, tmp_path, a_run(tmp_path, lora_rank=3))
    save_pretrained(model, tmp_path)
    for name, weight in load_pretrained(tmp_path).named_parameters():
        torch.testing.assert_close(weight, expected[name].float(), rtol=1e-6, atol=1e-6)


def test_a_loss_that_did_not_move_is_said(start, tmp_path):
    """Once, of the stage in which it did not."""
    said = r"^(\w+): the loss has not moved from (\S+): is the learning rate too small, or the warmup as long as the run\?$"  # fmt: skip
    found = lambda *flags: re.findall(said, start("out", *flags).stdout, re.MULTILINE)
    loss = lambda stage: next(r["eval/loss"] for r in numbers(tmp_path / "out") if r["stage"] == stage)  # fmt: skip
    sft = "--sft_learning_rate"
    assert found(f"{sft}=1e-2") == []
    assert found(f"{sft}=1e-2", "--learning_rate=0") == [("dpo", "0.693147")]
    assert found(f"{sft}=0") == [("sft", f"{loss('sft'):.6g}")]
    assert found(f"{sft}=1e-2", "--learning_rate=0", "--eval_data=-") == [("dpo", "0.693147")]


@pytest.mark.parametrize(("rows", "moved"), [
    ("eval 1, eval 1.0002", True), ("eval 1, eval 1.00005", False), ("eval 1, eval 0.9998", True),
    ("eval 1, train 5, eval 2, train 5", True), ("eval 1, train 5, eval 1, train 9", False),
    ("train 5, train 9", True), ("train 5, none, train 5", False), ("train 5", True), ("none", True),
    ("other 1, eval 2, other 2, eval 2", False), ("other 2, other 2, eval 2, eval 3", True),
])  # fmt: skip
def test_which_losses_are_compared(rows, moved, tmp_path, capsys):
    """The first and the last of the last stage's evaluations, or of its steps if there are none."""
    names = {"eval": "eval/loss", "train": "train/loss", "other": "eval/loss"}
    written = []
    for n, (kind, *value) in enumerate(row.split() for row in rows.split(", ")):
        row = {"stage": "sft" if kind == "other" else "dpo", "step": n}
        written.append(row | ({names[kind]: float(value[0])} if value else {}))
    guard.say_if_unmoved(Path(write_jsonl(tmp_path / "metrics.jsonl", written)))
    assert bool(capsys.readouterr().out) == (not moved)


def test_a_loss_that_is_the_same_again_has_moved_where_rewards_have(tmp_path, capsys):
    """KTO's is 1 at the start, and 1 again where it is saturated."""
    for reward, said in ((-15.0, False), (0.02, False), (0.001, True)):
        rows = [{"stage": "dpo", "eval/loss": 1.0, "eval/rewards/chosen": x} for x in (0, reward)]
        guard.say_if_unmoved(Path(write_jsonl(tmp_path / "metrics.jsonl", rows)))
        assert ("has not moved" in capsys.readouterr().out) == said


# What is not finite from the start


def test_a_checkpoint_that_is_not_finite(start, base, tmp_path, monkeypatch):
    """The advice is about the weights, not about what is kept of the reference."""
    place = tmp_path / "broken"
    model = load_pretrained(base)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    save_pretrained(model, place)
    given, sft = f"--init_from={place}", "--sft_learning_rate=1e-3"
    done = start("dpo", given, "--sft_epochs=0", expect=2)
    weight = "model.layers.1.mlp.up_proj.weight"
    assert done.sentence == f"{place}/model.safetensors: weight {weight}: not finite"
    assert not list(place.glob("reference-*.npy"))
    monkeypatch.setattr(
        files_of_weights, "is_finite", lambda _: True
    )  # as if it had come about later
    done = start("dpo", given, "--sft_epochs=0", expect=2)
    assert done.sentence == f"{place}: weight {weight.removeprefix('model.')} is not finite"
    sentence = """sft: loss or gradient is not finite from the start: look at the weights that it
        starts from, and at --beta"""
    many = ["--eval_data=-", "--sft_epochs=3"]
    for flags in ([], many):
        assert start("sft", given, sft, *flags, expect=2).sentence == " ".join(sentence.split())
    few = start("sft", given, sft, "--eval_data=-", expect=2).sentence
    assert few.startswith("the model diverged: its weights, nan by root mean square, are not saved")


@pytest.mark.parametrize("flags", [[], ["--eval_data=-", "--epochs=3"], ["--loss=ipo"]])
def test_a_beta_beyond_float32_is_one_sentence(flags, start, monkeypatch):
    """By its range; and where that is not looked at, by what comes of it."""
    done = start("out", "--beta=1e308", "--sft_epochs=0", *flags, expect=2)
    assert done.sentence == "--beta must be from 1e-06 to 1e+06, found 1e+308"
    monkeypatch.setattr(refusals, "check_range", lambda *_: None)
    done = start("out", "--beta=1e308", "--sft_epochs=0", *flags, expect=2)
    assert "dpo: loss or gradient is not finite from the start" in done.sentence
    assert done.sentence.endswith("and at --beta")


# What a run is resumed with


@pytest.mark.parametrize(("flag", "said"), [
    ("--data=/no/x.jsonl", "/no/x.jsonl: cannot be read as JSON lines (No such file"),
    ("--eval_data=no", "no: cannot be read as JSON lines (No such file or directory); a data set"),
    ("--sft_data=/no/x.jsonl", "/no/x.jsonl: cannot be read as JSON lines (No such file"),
    ("--init_from=/no", "/no/config.json: not found"),
    ("--init_from=org/model", "org/model: there is no such directory; a model of the Hugging"),
    ("--tokenizer=/no.model", "/no.model: cannot be read (--tokenizer: there is no such file)"),
])  # fmt: skip
def test_a_mistyped_path_costs_no_run(flag, said, start, tmp_path):
    """What is in the directory already stays as it is."""
    start("run", "--sft_epochs=0", "--max_steps=1", "--save_every=1")
    files = lambda: {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    before, flags = files(), [flag]
    if flag.startswith("--tokenizer"):
        flags.append("--init_from=-")
    assert start("run", *flags, expect=2).sentence.startswith(said)
    assert files() == before and len(before) > 5


def test_another_tokenizer_is_refused(tokenizer, tmp_path):
    """The same under another path is taken."""
    rows = [{"prompt": "The film", "chosen": " was great", "rejected": " was bad"}]
    path, here = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "a" / "tokenizer.model"
    for name, more in (("a", b""), ("b", b""), ("c", b"\x1a\x00")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(tokenizer.proto + more)
    flags = [f"--data={path}", f"--out_dir={tmp_path / 'out'}"]
    train.Run(train.parse_settings([*flags, f"--tokenizer={here}"])).save_state("dpo", 0)
    resume = lambda *given: train.Run(train.parse_settings([*flags, "--resume", *given]))
    assert resume().settings.tokenizer == str(here)
    assert resume(f"--tokenizer={tmp_path / 'b'}").point["state"] == "dpo-0"
    with pytest.raises(data.DataError, match="^--resume: what --tokenizer names is not what"):
        resume(f"--tokenizer={tmp_path / 'c'}")
    with pytest.raises(data.DataError, match="^--resume: tokenizer is '', but was "):
        resume("--tokenizer=")


def test_what_is_harmless_may_change_and_is_said(start, tmp_path, monkeypatch):
    flags = ["--sft_epochs=0", "--save_every=2"]
    start("whole", *flags)
    stopped(monkeypatch, "take_step", 2)
    start("out", *flags, expect=128 + signal.SIGTERM)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    other = {"log_every": 2, "eval_every": 3, "save_every": 1, "micro_batch_tokens": 90}
    other |= {"activation_checkpointing": True}
    was = {"log_every": 1, "eval_every": 0, "save_every": 2, "micro_batch_tokens": 30}
    was |= {"activation_checkpointing": False}
    given = [f"--{name}={str(x).lower() if x is True else x}" for name, x in other.items()]
    refused = start("out", *flags, "--resume=true", *given, "--seed=5", expect=2)
    assert refused.sentence == "--resume: seed is 5, but was 0 in this run"
    printed = start("out", *flags, "--resume=true", *given).stdout.splitlines()
    expected = {
        f"--resume: {n} is {x!r} from here on, and was {was[n]!r}" for n, x in other.items()
    }
    assert {line for line in printed if line.startswith("--resume: ")} == expected
    steps = [(row["step"], "eval/loss" in row) for row in read_metrics(tmp_path / "out")]
    assert steps == [(0, True), (1, False), (2, False), (3, True), (4, False), (4, True)]
    whole = weights(tmp_path / "whole")
    for name, weight in weights(tmp_path / "out").items():
        torch.testing.assert_close(weight, whole[name], rtol=1e-3, atol=1e-4)


def test_a_finished_run_that_is_resumed_says_so_and_changes_nothing(start, tmp_path, monkeypatch):
    start("out", "--save_every=3")
    files = lambda: {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    before = files()
    monkeypatch.setattr(train, "load_data", None)
    printed = start("out", "--save_every=3", "--resume=true").stdout
    assert printed == f"{tmp_path / 'out'}: this run is finished\n"
    assert files() == before


# Stopped at any moment


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing is saved."""


def stopped(monkeypatch, name: str, call: int, how=signal.SIGTERM):
    """End the run at the n-th call of a function of dpo.py, counted from 0."""
    real, calls = getattr(dpo, name), iter(itertools.count())

    def ending(*arguments):
        if next(calls) == call:
            if how is Killed:
                raise Killed
            os.kill(os.getpid(), how)
        return real(*arguments)

    monkeypatch.setattr(dpo, name, ending)


FLAGS = """--sft_epochs=2 --epochs=2 --sft_learning_rate=1e-3 --log_every=3 --save_every=2 --loss=bco
    --eval_every=2""".split()
# Of 8 steps each; evaluated at 0, 2, 4, 6 and 8.
MOMENTS = [
    ("take_step", 0, "sft-0"), ("take_step", 4, "sft-4"), ("take_step", 7, "sft-7"),
    ("evaluate", 0, "sft-0"), ("evaluate", 2, "sft-4"), ("evaluate", 4, "sft-8"),
    ("reference_logps", 0, "dpo-0"), ("reference_logps", 1, "dpo-0"),
    ("evaluate", 5, "dpo-0"), ("evaluate", 7, "dpo-4"), ("evaluate", 9, "dpo-8"),
    ("take_step", 8, "dpo-0"), ("take_step", 12, "dpo-4"), ("take_step", 15, "dpo-7"),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {}


@pytest.mark.parametrize(("name", "call", "where"), MOMENTS)
def test_a_run_that_is_stopped_loses_nothing(
    name, call, where, start, tmp_path, monkeypatch, whole
):
    """Neither the evaluation that it was in, nor a sum between two rows; nor is anything there twice.
    In each epoch of either stage a step is skipped, which is counted on."""
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(12, bad=[5]))
    flags = [*FLAGS, f"--data={path}"]
    if not whole:
        start("whole", *flags)
        whole["rows"], whole["weights"] = numbers(tmp_path / "whole"), weights(tmp_path / "whole")
        counts = [row.get("train/skipped_steps") for row in whole["rows"]]
        assert [n for n in counts if n] == [1, 2, 1, 2]
    how, place = signal.SIGINT if call % 2 else signal.SIGTERM, where.replace("-", " step ")
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, name, call, how)
        done = start("out", *flags, expect=128 + how)
    sentence = (
        f"stopped by {how.name} at {place}: the same command with --resume goes on from there"
    )
    assert done.stderr == f"train.py: {sentence}\n"
    resumed = start("out", *flags, "--resume=true").stdout
    stage, step = where.split("-")
    assert f"{stage}: 12 examples, steps {step} to 8 of 3\n" in resumed
    assert numbers(tmp_path / "out") == whole["rows"]
    found = weights(tmp_path / "out")
    assert all(torch.equal(weight, found[name]) for name, weight in whole["weights"].items())


@pytest.mark.parametrize(
    ("call", "first"), [(5, "sft-4"), (8, "dpo-0"), (11, "dpo-2"), (13, "dpo-4")]
)
def test_sums_between_two_rows_survive_a_kill(call, first, start, tmp_path):
    """log_every=3, save_every=2: a state is saved in the middle of what a row is the mean of."""
    flags = [*FLAGS, "--lora_rank=2"]
    start("whole", *flags)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        stopped(patch, "take_step", call, Killed)
        start("out", *flags)
    stage, step = first.split("-")
    resumed = start("out", *flags, "--resume=true").stdout
    assert f"{stage}: 12 examples, steps {step} to 8 of 3\n" in resumed
    assert_same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_a_stop_before_any_step_was_taken(optimizer, start, tmp_path, monkeypatch):
    """All steps until then were skipped: the optimizer has no moments yet."""
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(12, bad=range(6)))
    flags = [f"--data={path}", "--shuffle=false", "--sft_epochs=0", f"--optimizer={optimizer}"]
    start("whole", *flags)
    with monkeypatch.context() as patch:
        stopped(patch, "take_step", 2)
        start("out", *flags, expect=128 + signal.SIGTERM)
    assert "steps 2 to 4 of 3\n" in start("out", *flags, "--resume=true").stdout
    assert_same(tmp_path / "whole", tmp_path / "out")


def interrupted(*_):
    raise KeyboardInterrupt


def test_what_follows_a_run_and_what_comes_before_it_may_be_interrupted(tmp_path, monkeypatch):
    """The report of the built-in experiment, and the look at data: no traceback, nothing half."""
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3
    path, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "usable.jsonl"
    monkeypatch.setattr(doctor, "diagnose", interrupted)
    done = run_here("extra/doctor.py", path, f"--out={out}", expect=130)
    assert not done.stderr and not list(tmp_path.glob("usable*"))
    files = [tmp_path / "out" / f"{name}.jsonl" for name in ("pairs", "eval", "sft")]
    monkeypatch.setattr(reviews, "write", lambda *_: [write_jsonl(p, rows) for p in files])
    monkeypatch.setattr(reviews, "report", interrupted)
    monkeypatch.setattr(train, "train", lambda run: run.say("saved"))
    done = run_here("train.py", f"--out_dir={tmp_path / 'out'}", expect=130)
    assert done.stdout == "saved\n" and not done.stderr
