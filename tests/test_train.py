"""The real scripts, end to end: one process and several, stopped and resumed, misused."""

import functools
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SHAPES,
    assert_same_change,
    make_model,
    read_metrics,
    run_here,
    run_script,
    write_jsonl,
)

import data
import dpo
import train
from experiments import reviews
from extra import kept, states
from extra.objectives import LOSSES
from model import load_config, load_pretrained, save_pretrained

RECIPE = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")

SMALL = "--hidden_size=32 --num_layers=2 --num_heads=2 --vocab_size=400".split()
TINY = """--batch_size=8 --micro_batch_tokens=110 --log_every=2 --warmup_steps=2 --beta=1
    --learning_rate=2e-4""".split()
SFT = "--sft_learning_rate=4e-3"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """The built-in experiment's data, small: 29 pairs, 58 held out, 70 demonstrations."""
    paths = reviews.write(tmp_path_factory.mktemp("reviews"), 0, 70, 29)
    return [f"--{name}={path}" for name, path in zip(("data", "eval_data", "sft_data"), paths)]


def fewer(flag: str, count: int, directory) -> str:
    """The same setting, with only the first so many rows of its file."""
    name, path = flag.split("=")
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    directory.mkdir(exist_ok=True)
    (directory / f"{name[2:]}.jsonl").write_text("".join(lines), encoding="utf-8")
    return f"{name}={directory / name[2:]}.jsonl"


def train_here(out_dir, *flags, small=SMALL) -> train.Run:
    """train.py in this process."""
    if not any(flag.startswith("--sft_") for flag in flags if "--sft_data" not in flag):
        flags = [*flags, SFT]
    run = train.Run(train.parse_settings([*small, *TINY, f"--out_dir={out_dir}", *flags]))
    train.train(run)
    return run


def weights(out_dir) -> dict[str, torch.Tensor]:
    return load_pretrained(out_dir).state_dict()


def without_rates(rows: list[dict]) -> list[dict]:
    rates = ("pairs_per_second", "tokens_per_second", "peak_memory_gib")
    return [{k: v for k, v in row.items() if k not in rates} for row in rows]


@pytest.fixture(scope="module")
def done(tmp_path_factory, files):
    """A finished tiny run by the script itself, in a directory of its own."""
    out = tmp_path_factory.mktemp("runs") / "first"
    return out, run_script("train.py", *SMALL, *TINY, SFT, *files, f"--out_dir={out}").stdout


def test_from_text_to_checkpoint(done):
    out, printed = done
    assert "step 0: the largest log-ratio is 0.0e+00 nats" in printed
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model", "run.json", "sft"} <= names
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["beta"] == 1 and run["settings"]["options"] == {"label_smoothing": 0}
    rows = read_metrics(out)
    assert [(r["stage"], r["step"]) for r in rows if "eval/loss" in r] == [
        ("sft", 0), ("sft", 9), ("dpo", 0), ("dpo", 4)
    ]  # fmt: skip
    last = next(r for r in reversed(rows) if "train/loss" in r)
    names = """loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies rewards/ties
        logps/chosen logps/rejected gradient_weight both_fell grad_norm learning_rate""".split()
    assert all(math.isfinite(last[f"train/{name}"]) for name in names)
    rates = {"pairs_per_second", "tokens_per_second", "peak_memory_gib", "epoch", "step", "stage"}
    assert last.keys() == {f"train/{name}" for name in names} | rates and last["epoch"] == 1
    sft = [r["train/loss"] for r in rows if r["stage"] == "sft" and "train/loss" in r]
    assert sft[-1] < sft[0], "it learns something"
    reference, policy = weights(out / "sft"), weights(out)
    moved = [not torch.equal(policy[name], reference[name]) for name in policy]
    assert all(moved), "DPO reaches every parameter, and the reference is kept apart"


def test_the_built_in_experiment_end_to_end(tmp_path, monkeypatch, capsys):
    """`python train.py`, small: its data, its presets, its report; a loss with a β of its own."""
    for name, count in (("DEMONSTRATIONS", 70), ("PAIRS", 29), ("SAMPLES", 100)):
        monkeypatch.setattr(reviews, name, count)
    tiny = [*SMALL, "--batch_size=8", "--micro_batch_tokens=110", "--log_every=2"]
    train.main([*tiny, f"--out_dir={tmp_path}"])
    printed = capsys.readouterr().out
    for phrase in ("R*(KL)", "accepted", "KL(π‖π_ref)", "100 samples of the evaluation prompts"):
        assert phrase in printed
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert settings["beta"] == reviews.SETTINGS["beta"] == 1
    assert settings["sft_learning_rate"] == reviews.SETTINGS["sft_learning_rate"]
    train.main([*tiny, f"--out_dir={tmp_path}", "--loss=simpo", "--max_steps=2", "--save_every=1"])
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["beta"] == 2
    before, _ = weights(tmp_path), (tmp_path / "model.safetensors").unlink()
    train.main(["--resume", f"--out_dir={tmp_path}"])
    assert all(torch.equal(x, weights(tmp_path)[name]) for name, x in before.items())
    again = [f"--init_from={tmp_path / 'sft'}", f"--out_dir={tmp_path / 'again'}"]
    train.main([*again, "--sft_epochs=0", "--batch_size=8", "--beta=0.3"])
    train.main(["--epochs=0", *tiny, f"--out_dir={tmp_path / 'alone'}"])
    assert "R*(KL)" in capsys.readouterr().out
    for wrong in ("--beta=-1", "--loss=nope"):
        with pytest.raises(SystemExit):
            train.main([wrong])
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "--loss=nope: extra/objectives.py has none" in errors[1]


def test_reference_is_reused_and_checked(done, files, tmp_path):
    """Another β finds it beside the checkpoint; another precision does not; a torn file counts for
    none; a corrupted one is refused at step 0, and within tolerance the loss moves as predicted."""
    base = tmp_path / "base"
    shutil.copytree(done[0] / "sft", base)
    start = [*TINY, *files[:2], f"--init_from={base}", "--sft_epochs=0"]
    run = lambda name, *flags, expect=0: run_here(
        "train.py", *start, *flags, f"--out_dir={tmp_path / name}", expect=expect
    )
    first = run("first", "--beta=0.3").stdout
    assert first.count("log-probs found in") == 2 and "computed" not in first, "the first run's own"
    for path in base.glob("reference-*.npy"):
        path.unlink()
    assert run("second", "--beta=0.3").stdout.count("log-probs computed") == 2
    assert run("third", "--beta=0.7").stdout.count("log-probs found in") == 2
    assert run("half", "--dtype=bfloat16").stdout.count("log-probs computed") == 2
    originals = {path: np.load(path) for path in base.glob("reference-*.npy")}
    assert len(originals) == 4
    for path in originals:
        path.write_bytes(path.read_bytes()[:-9])  # as if it had been killed
    assert run("torn").stdout.count("log-probs computed") == 2
    size = lambda values: values.nbytes + 128 + 32  # with numpy's header, and the digest
    whole = [path for path, x in originals.items() if path.stat().st_size == size(x)]
    assert len(whole) == 2 and all((np.load(path) == originals[path]).all() for path in whole)

    def run_with(shift: float, expect: int):
        for path, values in originals.items():
            values = values.copy()
            values[0::2] += shift  # the chosen responses
            kept.write(path, values)
        return run("shifted", "--max_steps=1", expect=expect)

    refused = run_with(1.0, expect=2).stderr
    assert "must agree at step 0, but differ by 1" in refused and refused.count("\n") == 1
    assert str(base) in refused
    run_with(0.005, expect=0)
    loss = read_metrics(tmp_path / "shifted")[0]["eval/loss"]
    assert loss == pytest.approx(math.log1p(math.exp(0.005)), abs=1e-5)
    weight = next(base.glob("model.safetensors"))
    weight.write_bytes(
        weight.read_bytes()
    )  # written again: another checkpoint, as far as one can see
    assert run("again").stdout.count("log-probs computed") == 2


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(3, []), (2, ["--lora_rank=3"]), (2, ["--loss=bco", "--activation_checkpointing"])],
)
def test_several_ranks_equal_one(ranks, flags, files, tmp_path):
    """Weights, metrics and samples, with clipping active, accumulation, packing that differs
    between ranks, and a last batch smaller than the ranks, so that one has nothing to do."""
    files = [fewer(files[0], 25, tmp_path / "few"), files[1], fewer(files[2], 25, tmp_path / "few")]
    flags = [*files, *flags, "--grad_clip=0.05", "--eval_every=3", "--max_steps=4"]
    flags += ["--weight_decay=0.1", "--dtype=float32", "--learning_rate=3e-3", "--log_every=1"]
    flags += ["--sample_every=3"]
    train_here(tmp_path / "one", *flags)
    result = run_script(
        "train.py", *SMALL, *TINY, SFT, *flags, f"--out_dir={tmp_path / 'many'}", ranks=ranks
    )
    assert result.stdout.count("sample of dpo 0: ") == 3, "rank 0 alone says them"
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("one", "many")]
    assert samples[0] == samples[1] and samples[0].count("\n") >= 12
    one, many = (without_rates(read_metrics(tmp_path / name)) for name in ("one", "many"))
    assert len(one) == len(many) > 6
    assert all(row["train/grad_norm"] > 0.05 for row in one if "train/grad_norm" in row)
    for a, b in zip(one, many):
        names = a.keys() - {"train/rewards/ties", "eval/rewards/ties"}  # exact zeros
        if (a["stage"], a["step"]) in (("dpo", 0), ("dpo", 1)):  # of the reference itself:
            names -= {name for name in a if name.endswith(("accuracies", "both_fell"))}  # rounding
        for name in names:
            value = a[name]
            close = value if isinstance(value, str) else pytest.approx(value, rel=2e-3, abs=2e-4)
            assert b[name] == close, (a["stage"], a["step"], name)
    start = train.llm.Transformer(load_config(tmp_path / "one")).init_weights(0).state_dict()
    assert_same_change(start, weights(tmp_path / "one"), weights(tmp_path / "many"))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_and_does_not_depend_on_micro_batches(loss, files, tmp_path):
    """With each loss one micro-batch a step, and several. All it logs is finite."""
    few = fewer(files[0], 12, tmp_path / "few")
    flags = [few, f"--loss={loss}", "--sft_epochs=0", "--epochs=2", "--learning_rate=1e-3"]
    train_here(tmp_path / "one", *flags, "--micro_batch_tokens=4096")
    train_here(tmp_path / "many", *flags, "--micro_batch_tokens=60")
    one, many = (without_rates(read_metrics(tmp_path / name)) for name in ("one", "many"))
    for a, b in zip(one, many):
        for name, value in a.items():
            assert isinstance(value, str) or math.isfinite(value), name
            if name.endswith(("loss", "grad_norm", "rewards/chosen")):
                assert b[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    config = load_pretrained(tmp_path / "one").config
    start, all_moved = train.llm.Transformer(config).init_weights(0).state_dict(), 0.0
    for (name, a), b in zip(weights(tmp_path / "one").items(), weights(tmp_path / "many").values()):
        moved = torch.dist(a, start[name])  # where a gradient is 0 up to rounding, Adam still moves
        assert torch.dist(a, b) <= 1e-2 * moved, name
        all_moved += moved
    assert all_moved > 0


@pytest.mark.parametrize("loss", ["bco", "kto"])
def test_the_mean_of_the_step_before_is_what_the_loss_gets(loss, files, tmp_path, monkeypatch):
    """0 in the first step, then the mean of all log-ratios of the one before, whatever the
    micro-batches; evaluation takes the last."""
    seen, real = [], LOSSES[loss]

    def watched(pairs, beta, **options):
        seen.append((float(pairs.mean_logratio), torch.cat([pairs.a, pairs.b]).detach()))
        return real(pairs, beta, **options)

    watched.__signature__ = train.inspect.signature(real)
    monkeypatch.setitem(LOSSES, loss, watched)
    flags = [f"--loss={loss}", "--sft_epochs=0", "--learning_rate=3e-3", "--warmup_steps=0"]
    run = train_here(tmp_path, fewer(files[0], 24, tmp_path / "few"), *flags, "--log_every=1")
    given = list(dict.fromkeys(round(mean, 5) for mean, _ in seen))  # 0 up to rounding
    expected = []
    for row in read_metrics(tmp_path)[:-1]:
        both = row["train/rewards/chosen"] + row["train/rewards/rejected"]
        expected.append(both / (2 * run.settings.beta))
    assert abs(expected[0]) < 1e-5, "in the first step the policy is the reference"
    assert (
        len(given) == 2 and given == pytest.approx(expected, rel=1e-6, abs=1e-5) and given[1] != 0
    )
    second = torch.cat([ratios for mean, ratios in seen if abs(mean) < 1e-5])[16:]  # after 8 pairs
    assert given[1] == pytest.approx(second.mean().item(), abs=1e-5)


def test_all_features_on_two_ranks_and_resumed(files, tmp_path):
    """What needs all ranks, all at once, under a time limit: nothing hangs, and resuming agrees."""
    flags = """--loss=bco --sft_weight=0.1 --lora_rank=2 --activation_checkpointing --dtype=bfloat16
        --eval_every=2 --save_every=3 --lr_schedule=cosine --epochs=2""".split()
    out, again = tmp_path / "whole", tmp_path / "again"
    run_script("train.py", *SMALL, *TINY, SFT, *files, *flags, f"--out_dir={out}", ranks=2)
    shutil.copytree(out, again)
    assert {p.name for p in (again / "resume").iterdir()} == {"dpo-6", "done-0"}
    (again / "config.json").unlink()  # as if it had been killed in its last step
    other = f"--data={files[1].split('=')[1]}"
    refused = run_script("train.py", f"--out_dir={again}", other, "--resume", ranks=2, expect=1)
    sentence = """train.py: --resume: what --data names is not what this run began with: begin
        another run, in another --out_dir\n"""
    assert refused.stderr.count(" ".join(sentence.split())) == 1, "rank 0 alone says so"
    resumed = run_script("train.py", files[0], f"--out_dir={again}", "--resume", ranks=2)
    assert "steps 6 to 8" in resumed.stdout
    rows = [without_rates(read_metrics(directory)) for directory in (out, again)]
    assert rows[0] == rows[1] and rows[0][-1]["step"] == 8
    last = [directory / "resume/dpo-6/state.safetensors" for directory in (out, again)]
    assert last[0].read_bytes() == last[1].read_bytes()
    assert all(torch.equal(w, weights(again)[name]) for name, w in weights(out).items())


def test_every_pair_is_seen_once_an_epoch(files, tmp_path, monkeypatch):
    seen, collate = [], data.collate
    monkeypatch.setattr(
        data, "collate", lambda d, e: seen.append((len(d), e.tolist())) or collate(d, e)
    )
    train_here(tmp_path, *files[:2], "--epochs=2", "--sft_epochs=0")
    examples = [i for size, batch in seen if size == 29 for i in batch]
    epochs = np.array(examples[-2 * 29 :]).reshape(2, 29)
    assert all(set(epoch) == set(range(29)) for epoch in epochs)
    assert (epochs[0] != epochs[1]).any(), "each epoch has an order of its own"
    # twice in training, once for the reference, and a step's worth once more for its check
    counts = np.bincount(examples)
    assert sorted(counts.tolist()) == [3] * 21 + [4] * 8


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Makes a run with these flags, once."""
    made = {}

    def whole_run(flags: list[str]):
        key = tuple(flags)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            train_here(made[key], *flags)
        return made[key]

    return whole_run


@pytest.mark.parametrize(  # in SFT, at its last state, at the start of DPO, in DPO
    ("stop_at", "first"), [(4, "sft-3"), (8, "sft-6"), (10, "dpo-0"), (12, "dpo-3")]
)
@pytest.mark.parametrize("extra", [[], ["--lora_rank=3"], ["--loss=kto", "--optimizer=rmsprop"]])
def test_resume_is_bit_identical(
    stop_at, first, extra, files, whole_runs, tmp_path, monkeypatch, capsys
):
    """Stopped at a step and resumed, with the reference cache gone: the same weights, moments and
    metrics."""
    flags = [*files, "--save_every=3", "--epochs=2", *extra]
    ends = whole_runs(flags), tmp_path / "parts"
    step, calls = dpo.take_step, itertools.count(1)

    def stopping(*arguments):
        if next(calls) == stop_at + 1:
            raise Stop
        return step(*arguments)

    monkeypatch.setattr(dpo, "take_step", stopping)
    with pytest.raises(Stop):
        train_here(tmp_path / "parts", *flags)
    monkeypatch.undo()
    for cached in [*tmp_path.glob("*/sft/reference-*.npy")]:
        cached.unlink()
    out = f"--out_dir={tmp_path / 'parts'}"
    with pytest.raises(data.DataError, match="beta is 0.7, but was 1.0"):
        train.parse_settings([*files, out, "--resume", "--beta=0.7"])
    capsys.readouterr()
    train.train(train.Run(train.parse_settings([files[0], out, "--resume"])))  # by its own settings
    printed, (stage, step) = capsys.readouterr().out, first.split("-")
    steps = [line for line in printed.splitlines() if " examples, steps " in line]
    assert steps[0].startswith(f"{stage}: ") and f"steps {step} to " in steps[0]
    last = [end / "resume/dpo-6/state.safetensors" for end in ends]
    assert last[0].read_bytes() == last[1].read_bytes()
    whole, parts = map(weights, ends)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    rows = [without_rates(read_metrics(end)) for end in ends]
    assert rows[0] == rows[1]


def test_a_fresh_start_removes_what_another_run_left(files, tmp_path):
    """A state is resumed by its own run alone: not by one with other settings that died before its
    first state."""
    train_here(tmp_path, *files, "--save_every=3")
    names = [path.name for path in states.places_in(tmp_path)]
    assert names == ["done-0", "dpo-3"]
    train.Run(train.parse_settings([*SMALL, *TINY, *files, f"--out_dir={tmp_path}", "--beta=0.5"]))
    with pytest.raises(data.DataError, match="no state to resume; with --data the run begins$"):
        train.Run(train.parse_settings([f"--out_dir={tmp_path}", "--resume"]))
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["beta"] == 0.5


def test_your_own_files(tmp_path):
    """Preference files, a ranking among them, from scratch; then bad input, through the script."""
    words = "good bad fine poor nice dull".split()
    rows = [{"prompt": f"Rate film {i}:", "chosen": f" It is {words[i % 3]}.",
             "rejected": f" It is {words[3 + i % 3]} {i}."} for i in range(12)]  # fmt: skip
    rows.append({"prompt": "Rank:", "responses": [" a b", " c d", " e f"], "weight": 0.25})
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    out = tmp_path / "out"
    model = "--hidden_size=16 --num_layers=1 --num_heads=1 --vocab_size=300 --learning_rate=1e-3".split()
    files = [f"--data={path},{path}", f"--eval_data={path}", f"--sft_data={path}"]
    printed = run_here(
        "train.py", *model, *files, f"--out_dir={out}", "--lr_schedule=cosine"
    ).stdout
    assert "pairs: 26 examples" in printed
    losses = [row["eval/loss"] for row in read_metrics(out) if "eval/loss" in row]
    assert losses[2] == pytest.approx(math.log(2), abs=1e-6), "before DPO, whatever the weights"
    assert read_metrics(out)[-1]["eval/loss"] == pytest.approx(0.69, abs=0.1)
    assert load_pretrained(out).config.hidden_size == 16
    shown = run_here("sample.py", out, "--prompt", "Rate film 3:", "--max_new_tokens=5").stdout
    assert shown.startswith("\nRate film 3:\n")
    both = run_here("sample.py", out, "--compare", out / "sft", "--prompt", "A",
                      "--prompt", "B", "--n=2", "--max_new_tokens=4").stdout  # fmt: skip
    assert both.count("\nA\n") == both.count("\nB\n") == 2

    bad = write_jsonl(tmp_path / "bad.jsonl", [rows[0], {"prompt": "x", "chosen": "y"}])
    for script, arguments, message in (
        (
            "train.py",
            [f"--data={bad}", f"--out_dir={out}2"],
            f"{bad}:2: field 'rejected' is missing",
        ),
        ("train.py", ["--data=x", "--betta=0.1"], "unrecognized arguments: --betta=0.1"),
        ("train.py", [f"--data={path}", "--out_dir=/proc/x"], "No such file or directory"),
        ("sample.py", [tmp_path / "none", "--prompt=x"], "config.json: not found"),
    ):
        error = run_here(script, *arguments, expect=2).stderr
        assert error.startswith(f"{script}: ") and message in error
        assert error.count("\n") == 1 and "Traceback" not in error


def test_llama_on_stack_exchange_paired(tmp_path):
    """The recipe of docs/checkpoints.md on a tiny random Llama and a hand-made file in that format: SFT and
    DPO with adapters, on two ranks, from and to a checkpoint in the Llama layout."""
    rows = [{"qid": i, "question": f"How do I add {i} and {i}?", "response_j": f"It is {2 * i}.",
             "response_k": f"Nobody knows {i}."} for i in range(20)]  # fmt: skip
    path, base = write_jsonl(tmp_path / "rl.jsonl", rows), tmp_path / "base"
    run_here("experiments/random_llama.py", base, f"--texts={path}")
    config = json.loads((base / "config.json").read_text()) | {"pretraining_tp": 1, "note": "kept"}
    (base / "config.json").write_text(json.dumps(config))
    recipe = re.search(r"```sh\n(torchrun.*?stack-exchange.*?)```", RECIPE, re.DOTALL)[1]
    sft, dpo = (
        [word for word in command.replace("\\\n", " ").split() if word.startswith("--")][1:]
        for command in recipe.strip().split("\ntorchrun")
    )
    small = [
        "--max_steps=3",
        "--warmup_steps=1",
        "--batch_size=4",
        "--max_length=64",
        "--max_prompt_length=48",
    ]
    mine = {"--init_from": base, "--data": path, "--out_dir": tmp_path / "sft"}
    for flags, run in ((sft, run_here), (dpo, functools.partial(run_script, ranks=2))):
        same = [flag for flag in flags if flag.split("=")[0] not in (*mine, "--eval_data")]
        given = [f"{name}={value}" for name, value in mine.items()]
        printed = run("train.py", *same, *given, *small).stdout
        assert "40 examples" not in printed and "20 examples" in printed
        mine = {"--init_from": tmp_path / "sft", "--data": path, "--out_dir": tmp_path / "dpo"}
    assert "step 0: the largest log-ratio" in printed
    before, after = weights(base), weights(tmp_path / "dpo")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert moved == {name for name in before if "_proj" in name}, (
        "the adapters, merged, and no more"
    )
    saved = json.loads((tmp_path / "dpo" / "config.json").read_text())
    assert saved["note"] == "kept" and saved["architectures"] == ["LlamaForCausalLM"]
    tokenizer = data.Tokenizer(tmp_path / "dpo" / "tokenizer.model")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dpo")
    [ids] = data.token_ids(data.Example("Question: How?\n\nAnswer:", ()), tokenizer)
    ours, size = load_pretrained(tmp_path / "dpo"), len(ids)
    segment = torch.tensor([[0, 0, 0, size]])
    logits = ours(torch.tensor(ids), torch.arange(size), segment)
    torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], logits, rtol=1e-4, atol=1e-4)


def test_ids_for_other_tokenizers(tmp_path):
    """A checkpoint without a tokenizer that is read here trains on ids; its files go along."""
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(3, 97, n).tolist()
    rows = [{"prompt": ids(4), "chosen": ids(3), "rejected": ids(5)} for _ in range(9)]
    path = write_jsonl(tmp_path / "ids.jsonl", rows)
    save_pretrained(make_model(SHAPES["grouped"]).float(), tmp_path / "base")
    (tmp_path / "base" / "vocab.json").write_text("{}")
    out, flags = tmp_path / "out", ["--max_steps=1", "--max_length=64", "--max_prompt_length=48"]
    files = [f"--init_from={tmp_path / 'base'}", f"--data={path}", f"--out_dir={out}"]
    assert "9 examples" in run_here("train.py", *files, *flags).stdout
    assert (out / "vocab.json").read_text() == "{}"
    rows[4]["chosen"] = [3, 97]
    write_jsonl(tmp_path / "ids.jsonl", rows)
    assert "beyond the model's vocabulary" in run_here("train.py", *files, *flags, expect=2).stderr
    text = write_jsonl(tmp_path / "text.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    files[1] = f"--data={text}"
    assert (
        f"{text}:1: text needs a tokenizer.model"
        in run_here("train.py", *files, *flags, expect=2).stderr
    )


def test_sft_alone(tmp_path):
    """--epochs=0 stops after SFT, on a file of conversations, and leaves no reference."""
    turns = lambda i: [
        {"role": "user", "content": f"{i}?"},
        {"role": "assistant", "content": f"{i}!"},
    ]
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": turns(i) * 2} for i in range(20)])
    model = ["--hidden_size=16", "--num_layers=1", "--num_heads=1", "--vocab_size=300"]
    flags = [f"--data={path}", f"--eval_data={path}", "--epochs=0", f"--out_dir={tmp_path / 'out'}"]
    run_here("train.py", *model, *flags)
    assert {row["stage"] for row in read_metrics(tmp_path / "out")} == {"sft"}
    assert load_pretrained(tmp_path / "out") and not (tmp_path / "out" / "sft").exists()


@pytest.mark.parametrize(("flags", "message"), [
    ("--beta=much", "argument --beta: invalid float value: 'much'"),
    ("--batch_size=1.5", "argument --batch_size: invalid int value"),
    ("--resume=maybe", "argument --resume: invalid"),
    ("--loss=ipo --label_smoothing=0.1", "unrecognized arguments: --label_smoothing=0.1"),
    ("--loss=rdpo --gamma=1", "unrecognized arguments: --gamma=1"),
    ("--alpha=1", "unrecognized arguments: --alpha=1"),
    ("--learning=1", "unrecognized arguments: --learning=1"),
])  # fmt: skip
def test_what_is_no_setting_is_refused(flags, message, capsys):
    """Also an option that the loss does not take, by its signature."""
    with pytest.raises(SystemExit):
        train.parse_settings(["--data=x", *flags.split()])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_more_misuse_is_refused(files, tmp_path, capsys):
    sentence = f"^{tmp_path}: there is no state to resume; with --data the run begins$"
    with pytest.raises(data.DataError, match=sentence):
        train.parse_settings([f"--out_dir={tmp_path}", "--resume"])
    with pytest.raises(data.DataError, match="^the model diverged: its weights, .* are not saved"):
        train_here(tmp_path, *files, "--sft_learning_rate=1e30", "--max_steps=4")
    (tmp_path / "junk.model").write_bytes(b"junk")
    small = [flag for flag in SMALL if "vocab" not in flag]
    with pytest.raises(data.DataError, match="not a SentencePiece model"):
        train_here(tmp_path / "out", *files, f"--tokenizer={tmp_path}/junk.model", small=small)
    for flag in ("--eval_data=x", "--sft_data=x"):
        with pytest.raises(SystemExit, match="the built-in experiment brings its own"):
            train.main([flag])
    for flags, message in (
        ([], "give --prompt"), (["--bogus", "--prompt=x"], "unrecognized"),
    ):  # fmt: skip
        error = run_here("sample.py", tmp_path, *flags, expect=2).stderr
        assert message in error and error.count("\n") == 1


def test_what_the_pairs_must_bring(tmp_path):
    """odpo needs margins; an infinite score is none."""
    words = ["one", "two", "three", "four"]
    rows = [{"prompt": f"{w}?", "chosen": f" {w}.", "rejected": " no."} for w in words]
    rows[3]["margin"] = 0.5
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    small = ["--hidden_size=16", "--num_layers=1", "--num_heads=1", "--vocab_size=300"]
    run = lambda *flags: train.train(train.Run(train.parse_settings(
        [*small, f"--data={path}", f"--out_dir={tmp_path / 'out'}", "--sft_epochs=0", *flags])))  # fmt: skip
    with pytest.raises(data.DataError, match="--loss=odpo needs a field 'margin' in every pair"):
        run("--loss=odpo")
    run("--loss=dpo")
    rows = [row | {"margin": 0.5} for row in rows]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    run("--loss=odpo")
    rows[2] |= {"score_chosen": math.inf, "score_rejected": 1.0, "margin": None}
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(data.DataError, match=r"pairs.jsonl:3: .*score_chosen"):
        run("--loss=odpo")


def test_a_loss_brings_its_own_defaults():
    """They stand in run.json as any setting; what is given on the command line comes first."""
    parse = lambda text: train.parse_settings(["--data=x", *text.split()])
    simpo = parse("--loss=simpo")
    assert (simpo.beta, simpo.options) == (2.0, {"gamma": 1.0})
    assert parse("--loss=simpo --beta=3").beta == 3
    assert parse("--loss=exo").options == {"label_smoothing": 1e-3}
    assert parse("").options == {"label_smoothing": 0} and parse("").beta == 0.1
    assert parse("--loss=dpop --alpha=5").options == {"alpha": 5}
    assert parse("--loss=ipo").beta == train.Settings.beta


def test_a_step_at_5e_7_moves_most_parameters(files, tmp_path):
    """Master weights are float32 also under bf16: in bf16 such a step would round to nothing."""
    flags = [
        files[0],
        "--sft_epochs=0",
        "--learning_rate=5e-7",
        "--max_steps=1",
        "--warmup_steps=0",
    ]
    train_here(tmp_path, *flags, "--dtype=bfloat16")
    after, config = weights(tmp_path), load_pretrained(tmp_path).config
    before = train.llm.Transformer(config).init_weights(0).state_dict()
    matrices = [name for name in before if "layers" in name and before[name].dim() == 2]
    moved = torch.cat([(before[name] != after[name]).flatten() for name in matrices])
    assert moved.float().mean() > 0.9


def test_wandb_offline(files, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # seconds until its process has to be there
    flags = [files[0], "--max_steps=1", "--sft_epochs=0", "--wandb=offline"]
    train_here(tmp_path, *flags).wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_compile(files, tmp_path, monkeypatch):
    """The same weights; and lengths that change from step to step compile nothing anew."""
    flags, graphs, step = [files[0], "--max_steps=4", "--sft_epochs=0"], [], dpo.take_step
    train_here(tmp_path / "eager", *flags)

    def counting(*arguments):
        sums = step(*arguments)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return sums

    monkeypatch.setattr(dpo, "take_step", counting)
    train_here(tmp_path / "compiled", *flags, "--compile")
    assert len(graphs) == 4 and graphs[0] > 0 and len(set(graphs[1:])) == 1, graphs
    eager, compiled = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)
