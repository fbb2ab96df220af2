"""The real scripts, end to end: one process and several, stopped and resumed, misused."""

import ast
import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, SHAPES, make_model, read_metrics, run_script, write_jsonl

import data
import dpo
import train
from model import ModelConfig, Transformer, load_pretrained, save_pretrained

README = (ROOT / "README.md").read_text(encoding="utf-8")

TINY = (
    "--hidden_size=32 --num_layers=2 --num_heads=2 --vocab_size=400 --review_demonstrations=70 "
    "--review_pairs=29 --review_samples=100 --batch_size=8 --micro_batch_tokens=110 --log_every=2 --warmup_steps=2"
).split()


def train_here(out_dir, *flags) -> train.Run:
    """train.py in this process, without its report."""
    run = train.Run(train.parse_settings([*TINY, f"--out_dir={out_dir}", *flags]))
    train.train(run)
    return run


def weights(out_dir) -> dict[str, torch.Tensor]:
    return load_pretrained(out_dir).state_dict()


def without_rates(rows: list[dict]) -> list[dict]:
    rates = ("pairs_per_second", "tokens_per_second", "peak_memory_gib")
    return [{k: v for k, v in row.items() if k not in rates} for row in rows]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished tiny run by the script itself, with its report, in a directory of its own."""
    out = tmp_path_factory.mktemp("runs") / "first"
    return out, run_script("train.py", *TINY, f"--out_dir={out}", cwd=out.parent).stdout


def test_the_built_in_experiment_end_to_end(done):
    out, printed = done
    for phrase in (
        "step 0: dpo loss 0.693147, in theory 0.693147",
        "R*(KL)",
        "accepted",
        "KL(π‖π_ref)",
    ):
        assert phrase in printed
    assert {"config.json", "tokenizer.model", "run.json", "metrics.jsonl"} <= {
        p.name for p in out.iterdir()
    }
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["beta"] == train.REVIEWS["beta"] and run["torch"] == torch.__version__
    rows = read_metrics(out)
    assert [(r["stage"], r["step"]) for r in rows if "eval/loss" in r] == [
        ("sft", 0), ("sft", 9), ("dpo", 0), ("dpo", 4)
    ]  # fmt: skip
    last = next(r for r in reversed(rows) if "train/loss" in r)
    names = """loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies rewards/ties
        logps/chosen logps/rejected logps_per_token/chosen gradient_weight saturated both_fell
        length_correlation grad_norm learning_rate""".split()
    assert all(math.isfinite(last[f"train/{name}"]) for name in names)
    sft = [r["train/loss"] for r in rows if r["stage"] == "sft" and "train/loss" in r]
    assert sft[-1] < sft[0], "it learns something"
    reference, policy = weights(out / "reference" / "sft"), weights(out)
    moved = [not torch.equal(policy[name], reference[name]) for name in policy]
    assert all(moved), "DPO reaches every parameter, and the reference is kept apart"


def test_reference_is_reused_and_checked(done, tmp_path):
    """Another β beside it reuses; another precision does not; a corrupted cache is refused at step
    0, and where it is within tolerance the loss moves as predicted."""
    out, _ = done
    start = [*TINY[4:], f"--init_from={out / 'reference' / 'sft'}", "--sft_epochs=0"]
    start.append("--review_samples=0")
    again = run_script(
        "train.py", *start, "--beta=0.3", f"--out_dir={out.parent / 'second'}"
    ).stdout
    assert again.count("reused") == 2 and "computed" not in again
    half = run_script(
        "train.py", *start, "--dtype=bfloat16", f"--out_dir={out.parent / 'half'}"
    ).stdout
    assert half.count("computed") == 2 and "reused" not in half
    cache = tmp_path / "third" / "reference"
    shutil.copytree(out.parent / "second" / "reference", cache)
    originals = {path: np.load(path) for path in cache.glob("*.npy")}

    def run_with(shift: float, expect: int):
        for path, values in originals.items():
            values = values.copy()
            values[0::2] += shift  # the chosen responses
            np.save(path, values)
        arguments = ["--beta=1", "--max_steps=1", f"--out_dir={cache.parent}"]
        return run_script("train.py", *start, *arguments, expect=expect)

    refused = run_with(1.0, expect=2).stderr
    assert "must agree to 0.01 nats" in refused and "Traceback" not in refused
    run_with(0.005, expect=0)
    loss = read_metrics(cache.parent)[0]["eval/loss"]
    assert loss == pytest.approx(math.log1p(math.exp(0.005)), abs=1e-5)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(2, []), (3, ["--defer_reduce=false"]), (2, ["--lora_rank=3"]), (2, ["--loss=aot"])],
)
def test_several_ranks_equal_one(ranks, flags, tmp_path):
    """Weights and metrics, with clipping active, accumulation, packing that differs between ranks,
    and a last batch smaller than the ranks, so that one of them has nothing to do."""
    flags += ["--grad_clip=0.05", "--review_pairs=25", "--eval_every=3", "--max_steps=4",
             "--review_demonstrations=25", "--weight_decay=0.1", "--dtype=float32",
             "--learning_rate=3e-3", "--review_samples=0"]  # fmt: skip
    train_here(tmp_path / "one", *(flag for flag in flags if "defer_reduce" not in flag))
    run_script("train.py", *TINY, *flags, f"--out_dir={tmp_path / 'many'}", ranks=ranks)
    one, many = (without_rates(read_metrics(tmp_path / name)) for name in ("one", "many"))
    assert len(one) == len(many) > 6
    assert all(row["train/grad_norm"] > 0.05 for row in one if "train/grad_norm" in row)
    for a, b in zip(one, many):
        for name, value in a.items():
            close = value if isinstance(value, str) else pytest.approx(value, rel=2e-3, abs=2e-4)
            assert b[name] == close, name
    for (name, a), b in zip(weights(tmp_path / "one").items(), weights(tmp_path / "many").values()):
        torch.testing.assert_close(
            a, b, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_every_loss_trains_and_does_not_depend_on_micro_batches(loss, tmp_path):
    """The built-in experiment with each loss: one micro-batch a step, and several; statistics of a
    batch are those of the step. All it logs is finite, and before the first step as it should be."""
    flags = (
        f"--loss={loss} --sft_epochs=0 --review_pairs=12 --epochs=2 --learning_rate=1e-2".split()
    )
    train_here(tmp_path / "one", *flags, "--micro_batch_tokens=4096")
    train_here(tmp_path / "many", *flags, "--micro_batch_tokens=60")
    one, many = (without_rates(read_metrics(tmp_path / name)) for name in ("one", "many"))
    for a, b in zip(one, many):
        for name, value in a.items():
            assert isinstance(value, str) or math.isfinite(value), name
            if name.endswith(("loss", "grad_norm", "rewards/chosen")):
                assert b[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    for (name, a), b in zip(weights(tmp_path / "one").items(), weights(tmp_path / "many").values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    moved = train.load_model(train.Run(train.parse_settings([*TINY, f"--out_dir={tmp_path}"])), "",
                             data.Tokenizer(tmp_path / "one" / "tokenizer.model"))  # fmt: skip
    start = moved.state_dict()
    assert any(not torch.equal(start[name], w) for name, w in weights(tmp_path / "one").items())


def test_a_steps_gradient_is_the_sum_over_its_examples_by_their_number(tmp_path):
    """For SFT over its response tokens by theirs: the logged norms of the first steps, against a
    plain computation."""
    flags = ["--max_steps=1", "--log_every=1", "--warmup_steps=0", "--sft_learning_rate=1e-9"]
    run = train_here(tmp_path, *flags, "--review_demonstrations=8", "--review_pairs=8")
    tokenizer = data.Tokenizer(tmp_path / "tokenizer.model")
    sets = train.load_sets(run, train.find_sources(run), tokenizer)
    norms = {r["stage"]: r["train/grad_norm"] for r in read_metrics(tmp_path) if "train/loss" in r}
    for stage, name in (("sft", "sft"), ("dpo", "pairs")):
        model = train.load_model(run, "", tokenizer)  # SFT hardly moved it
        batch = data.collate(sets[name], np.arange(8))
        logps = dpo.sequence_logps(model, batch)
        h = logps[batch.chosen] - logps[batch.rejected]
        zero = torch.nn.functional.logsigmoid(h - h.detach())
        loss = -logps.sum() / batch.lengths.sum() if stage == "sft" else -zero.mean()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.stack([grad.norm() for grad in grads]).norm().item()
        assert norms[stage] == pytest.approx(norm, rel=1e-3), stage


def test_all_features_on_two_ranks_and_resumed(tmp_path):
    """What needs all ranks, all at once, under a time limit: nothing hangs, and resuming agrees."""
    flags = """--loss=bco --sft_weight=0.1 --lora_rank=2 --activation_checkpointing --dtype=bfloat16
        --eval_every=2 --save_every=3 --wandb=offline --lr_schedule=cosine --epochs=2
        --review_samples=0""".split()
    out, again = tmp_path / "whole", tmp_path / "again"
    run_script("train.py", *TINY, *flags, f"--out_dir={out}", ranks=2)
    shutil.copytree(out, again)
    assert [p.name for p in (again / "resume").iterdir()] == ["dpo-6"]
    for file in ("config.json", "metrics.jsonl"):  # as if it had been killed in its last step
        rows = (out / file).read_text().splitlines(keepends=True)
        (again / file).write_text("".join(rows[:-2]))
    run_json = json.loads((out / "run.json").read_text())
    run_json["settings"]["out_dir"] = str(again)
    (again / "run.json").write_text(json.dumps(run_json))
    resumed = run_script("train.py", *TINY, *flags, f"--out_dir={again}", "--resume", ranks=2)
    assert "steps 6 to 8" in resumed.stdout
    rows = [without_rates(read_metrics(directory)) for directory in (out, again)]
    assert rows[0] == rows[1] and rows[0][-1]["step"] == 8
    assert all(torch.equal(w, weights(again)[name]) for name, w in weights(out).items())


def test_every_pair_is_seen_once_an_epoch(tmp_path, monkeypatch):
    seen = []
    collate = data.collate
    monkeypatch.setattr(
        data, "collate", lambda d, e: seen.append((len(d), e.tolist())) or collate(d, e)
    )
    train_here(tmp_path, "--epochs=2", "--sft_epochs=0")
    examples = [i for size, batch in seen if size == 29 for i in batch]
    epochs = np.array(examples[-2 * 29 :]).reshape(2, 29)
    assert all(set(epoch) == set(range(29)) for epoch in epochs)
    assert (epochs[0] != epochs[1]).any(), "each epoch has an order of its own"
    # twice in training, once for the reference, and the first step once more for its check
    counts = np.bincount(examples)
    assert sorted(counts.tolist()) == [3] * 21 + [4] * 8


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [4, 8, 12])  # in SFT, at its last state, in DPO
@pytest.mark.parametrize("lora", [[], ["--lora_rank=3"]])
def test_resume_is_bit_identical(stop_at, lora, tmp_path, monkeypatch):
    """Stopped at a step and resumed, with the reference cache gone: the same weights and metrics."""
    flags = ["--save_every=3", "--epochs=2", *lora]
    train_here(tmp_path / "whole", *flags)
    step, calls = train.train_step, itertools.count(1)

    def stopping(*arguments):
        if next(calls) == stop_at + 1:
            raise Stop
        return step(*arguments)

    monkeypatch.setattr(train, "train_step", stopping)
    with pytest.raises(Stop):
        train_here(tmp_path / "parts", *flags)
    monkeypatch.undo()
    for cached in [*tmp_path.glob("*/reference/*.npy")]:
        cached.unlink()
    with pytest.raises(train.SettingError, match="beta is 0.7, but was 1.0"):
        train_here(tmp_path / "parts", *flags, "--resume", "--beta=0.7")
    train_here(tmp_path / "parts", *flags, "--resume")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    rows = [without_rates(read_metrics(tmp_path / name)) for name in ("whole", "parts")]
    assert [(r["stage"], r["step"]) for r in rows[0]] == [(r["stage"], r["step"]) for r in rows[1]]
    assert rows[0][-1] == rows[1][-1]


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
    printed = run_script(
        "train.py", *model, *files, f"--out_dir={out}", "--lr_schedule=cosine"
    ).stdout
    assert "pairs: 26 examples" in printed and "reward before" not in printed
    assert "step 0: dpo loss 0.693147, in theory 0.693147" in printed, "whatever the weights"
    assert read_metrics(out)[-1]["eval/loss"] == pytest.approx(0.69, abs=0.05)
    assert load_pretrained(out).config.hidden_size == 16
    shown = run_script("sample.py", out, "--prompt", "Rate film 3:", "--max_new_tokens=5").stdout
    assert shown.startswith("Rate film 3:")
    both = run_script("sample.py", out, "--compare", out / "reference" / "sft", "--prompt", "A",
                      "--prompt", "B", "--n=2", "--max_new_tokens=4").stdout  # fmt: skip
    assert both.count("\nA\n") == both.count("\nB\n") == 2

    bad = write_jsonl(tmp_path / "bad.jsonl", [rows[0], {"prompt": "x", "chosen": "y"}])
    for script, arguments, message in (
        (
            "train.py",
            [f"--data={bad}", f"--out_dir={out}2"],
            f"{bad}:2: field 'rejected' is missing",
        ),
        ("train.py", ["--betta=0.1"], "unknown setting --betta: did you mean --beta?"),
        ("sample.py", [tmp_path / "none", "--prompt=x"], "config.json: not found"),
    ):
        error = run_script(script, *arguments, expect=2).stderr
        assert error == f"{script}: {message}\n" or message in error
        assert error.count("\n") == 1 and "Traceback" not in error


def test_llama_on_stack_exchange_paired(tmp_path):
    """The recipe of the README on a tiny random Llama and a hand-made file in that format: SFT and
    DPO with adapters, on two ranks, from and to a checkpoint in the Llama layout."""
    rows = [{"qid": i, "question": f"How do I add {i} and {i}?", "response_j": f"It is {2 * i}.",
             "response_k": f"Nobody knows {i}."} for i in range(20)]  # fmt: skip
    path, base = write_jsonl(tmp_path / "rl.jsonl", rows), tmp_path / "base"
    run_script("experiments/random_llama.py", base, f"--texts={path}")
    config = json.loads((base / "config.json").read_text()) | {"pretraining_tp": 1, "note": "kept"}
    (base / "config.json").write_text(json.dumps(config))
    recipe = re.search(r"```sh\n(torchrun.*?stack-exchange.*?)```", README, re.DOTALL)[1]
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
    for flags, ranks in ((sft, 1), (dpo, 2)):
        kept = [flag for flag in flags if flag.split("=")[0] not in (*mine, "--eval_data")]
        given = [f"{name}={value}" for name, value in mine.items()]
        printed = run_script("train.py", *kept, *given, *small, ranks=ranks).stdout
        assert "40 examples" not in printed and "20 examples" in printed
        mine = {"--init_from": tmp_path / "sft", "--data": path, "--out_dir": tmp_path / "dpo"}
    assert "step 0: dpo loss 0.693147" in printed
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
    ids = tokenizer.encode_prompts(["Question: How?\n\nAnswer:"])[0]
    ours, size = load_pretrained(tmp_path / "dpo"), len(ids)
    branches, rows = torch.tensor([[0, 1, 1, size]]), torch.arange(size)
    logits = ours(torch.tensor(ids), rows, branches, rows)
    torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], logits, rtol=1e-4, atol=1e-4)


def test_ids_for_other_tokenizers(tmp_path):
    """A checkpoint without tokenizer.model trains on token ids; its tokenizer's files go along."""
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(3, 97, n).tolist()
    rows = [{"prompt": ids(4), "chosen": ids(3), "rejected": ids(5)} for _ in range(9)]
    path = write_jsonl(tmp_path / "ids.jsonl", rows)
    save_pretrained(make_model(SHAPES["grouped"]).float(), tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    out, flags = tmp_path / "out", ["--max_steps=1", "--max_length=64", "--max_prompt_length=48"]
    files = [f"--init_from={tmp_path / 'base'}", f"--data={path}", f"--out_dir={out}"]
    assert "9 examples" in run_script("train.py", *files, *flags).stdout
    assert (out / "tokenizer.json").read_text() == "{}"
    rows[4]["chosen"] = [3, 97]
    write_jsonl(tmp_path / "ids.jsonl", rows)
    assert (
        "beyond the model's vocabulary" in run_script("train.py", *files, *flags, expect=2).stderr
    )
    text = write_jsonl(tmp_path / "text.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    files[1] = f"--data={text}"
    assert (
        f"{text}:1: text needs a tokenizer.model"
        in run_script("train.py", *files, *flags, expect=2).stderr
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
    run_script("train.py", *model, *flags)
    assert {row["stage"] for row in read_metrics(tmp_path / "out")} == {"sft"}
    assert load_pretrained(tmp_path / "out") and not (tmp_path / "out" / "reference").exists()


@pytest.mark.parametrize(("flags", "message"), [
    ("--beta=much", "argument --beta: invalid float value: 'much'"),
    ("--batch_size=1.5", "argument --batch_size: invalid int value"),
    ("--loss=dpoo", "argument --loss: invalid choice: 'dpoo'"),
    ("--resume=maybe", "expected true or false"),
    ("--beta=0", "--beta must be greater than 0"),
    ("--learning_rate=-1", "--learning_rate must be a number of at least 0"),
    ("--learning_rate=nan", "--learning_rate must be a number of at least 0"),
    ("--max_prompt_length=512", "must be less than --max_length"),
    ("--label_smoothing=0.5", "less than 0.5"),
    ("--hidden_size=30", "multiple of twice --num_heads"),
    ("--loss=ipo --label_smoothing=0.1", "--label_smoothing would be ignored: --loss=ipo"),
    ("--loss=slic --beta=1", "--beta would be ignored: --loss=slic does not use it"),
    ("--defer_reduce=false", "--defer_reduce would be ignored: there is only one process"),
    ("--alpha=1", "--alpha would be ignored: --loss=dpo does not use it"),
    ("--loss=rdpo --gamma=1", "--gamma would be ignored: --loss=rdpo does not use it"),
    ("--loss=exo --label_smoothing=0", "--label_smoothing must be greater than 0 for --loss=exo"),
    ("--loss=fdpo_alpha --alpha=0", "--alpha must be greater than 0 for --loss=fdpo_alpha"),
    ("--loss=sft --sft_weight=1", "--sft_weight would be ignored: --loss=sft is that term alone"),
    ("--epochs=0 --sft_weight=1", "--sft_weight would be ignored: --epochs is 0"),
    ("--init_from=x --num_layers=3", "--num_layers would be ignored: --init_from"),
    ("--tokenizer=x --vocab_size=30", "--vocab_size would be ignored: --tokenizer"),
    ("--eval_data=x", "--eval_data would be ignored: --data=reviews"),
    ("--data=,", "--data names no file"),
    ("--data=x --init_from=y --out_dir=./y", "--out_dir is --init_from"),
    ("--data=x --init_from=y/reference/sft --out_dir=y", "--out_dir is --init_from"),
    ("--data=x --review_pairs=5", "--review_pairs would be ignored"),
    ("--data=x --eval_every=5", "--eval_every would be ignored"),
    ("--epochs=0 --beta=2", "--beta would be ignored: --epochs is 0"),
    ("--epochs=0 --data=x --sft_data=y", "--sft_data would be ignored: with --epochs=0 SFT trains on"),
    ("--epochs=0 --sft_epochs=0", "nothing to do"),
    ("--sft_epochs=0 --sft_learning_rate=1", "--sft_learning_rate would be ignored"),
    ("--optimizer=rmsprop --weight_decay=1", "--weight_decay would be ignored"),
])  # fmt: skip
def test_unusable_settings_are_refused(flags, message):
    with pytest.raises(train.SettingError, match=re.escape(message)) as error:
        train.parse_settings(flags.split())
    assert "\n" not in str(error.value)


def test_more_misuse_is_refused(tmp_path):
    with pytest.raises(train.SettingError, match="--save_every leaves one"):
        train_here(tmp_path, "--resume")
    with pytest.raises(train.SettingError, match="diverged"):
        train_here(tmp_path, "--sft_learning_rate=1e30", "--max_steps=4")
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(data.DataError, match="not a SentencePiece model"):
        train.train(
            train.Run(
                train.parse_settings(
                    [f"--tokenizer={tmp_path}/junk.model", f"--out_dir={tmp_path}"]
                )
            )
        )
    for flags, message in (
        ([], "give --prompt"), (["--bogus", "--prompt=x"], "unrecognized"),
    ):  # fmt: skip
        error = run_script("sample.py", tmp_path, *flags, expect=2).stderr
        assert message in error and error.count("\n") == 1


def test_what_the_pairs_must_bring(tmp_path):
    """A loss that needs margins refuses pairs without; one that cannot use soft labels, those."""
    words = ["one", "two", "three", "four"]
    rows = [{"prompt": f"{w}?", "chosen": f" {w}.", "rejected": " no."} for w in words]
    rows[2]["soft_label"], rows[3]["margin"] = 0.75, 0.5
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    small = ["--hidden_size=16", "--num_layers=1", "--num_heads=1", "--vocab_size=300"]
    run = lambda *flags: train.train(train.Run(train.parse_settings(
        [*small, f"--data={path}", f"--out_dir={tmp_path / 'out'}", "--sft_epochs=0", *flags])))  # fmt: skip
    with pytest.raises(train.SettingError, match=re.escape(
        "--loss=odpo needs a field 'margin' in every pair: 3 of the 4 pairs have none"
    )):  # fmt: skip
        run("--loss=odpo")
    for loss in ("sft", "plackett_luce"):
        with pytest.raises(train.SettingError, match="would ignore the field 'soft_label'"):
            run(f"--loss={loss}")
    rows[2] = rows[2] | {"soft_label": 1, "weight": 2}
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(train.SettingError, match="would ignore the field 'weight'"):
        run("--loss=sft")
    run("--loss=dpo")
    for row in rows:
        row["margin"] = 0.5
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    run("--loss=odpo")
    with pytest.raises(train.SettingError, match="--resume: pairs is"):  # other margins, other data
        rows[0]["margin"] = 0.7
        write_jsonl(tmp_path / "pairs.jsonl", rows)
        (tmp_path / "out" / "resume" / "dpo-0").mkdir(parents=True)
        (tmp_path / "out" / "resume" / "dpo-0" / "point.json").write_text(
            '{"stage": "dpo", "step": 0}'
        )
        run("--loss=odpo", "--resume")


def test_mfu_is_counted_operations_by_what_the_gpu_can_do(tmp_path, monkeypatch):
    run = train.Run(train.parse_settings(["--dtype=bfloat16", f"--out_dir={tmp_path}"]))
    model, work = Transformer(ModelConfig(97, 32, 64, 2, 4, 4, 8)), np.array([100.0, 40.0, 900.0])
    assert train.utilization(model, work, 2.0, run) == {}, "of a CPU it is not known"
    run.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    block, keys = 4 * 32 * 32 + 3 * 32 * 64, 2 * 32 * 32
    forward = 2 * ((block + keys) * 100 + (block - keys + 97 * 32) * 40) + 4 * 2 * 32 * 900
    expected = {"mfu": pytest.approx(3 * forward / (2 * 989e12))}
    assert train.utilization(model, work, 2.0, run) == expected
    run.dtype = "float32"
    assert train.utilization(model, work, 2.0, run) == {}


def test_a_loss_brings_its_own_defaults():
    """They stand in run.json as any setting; what is given on the command line comes first."""
    parse = lambda text: train.parse_settings(text.split())
    simpo = parse("--loss=simpo")
    assert (simpo.beta, simpo.gamma) == (2.0, 1.0) and parse("--loss=simpo --beta=3").beta == 3
    assert parse("--loss=exo").label_smoothing == 1e-3 and parse("").label_smoothing == 0
    assert parse("--loss=dpop").alpha == 50 and parse("--loss=dpop --alpha=5").alpha == 5
    assert parse("--loss=ipo").beta == train.REVIEWS["beta"]


def test_options_do_something(tmp_path):
    """Each option changes the trained weights; the schedules are the functions they are named for."""
    base = ["--max_steps=4", "--sft_epochs=0"]
    train_here(tmp_path / "base", *base)
    before = weights(tmp_path / "base")
    for n, flag in enumerate((
        "--loss=ipo", "--beta=2", "--label_smoothing=0.3", "--optimizer=rmsprop", "--weight_decay=9",
        "--learning_rate=1e-3", "--lr_schedule=constant", "--warmup_steps=5", "--grad_clip=0.01",
        "--seed=1", "--shuffle=false", "--review_labels=deterministic", "--dtype=bfloat16",
        "--sft_weight=1",
    )):  # fmt: skip
        train_here(tmp_path / str(n), *base, flag)
        after = weights(tmp_path / str(n))
        assert any(before[name].shape != after[name].shape or not torch.equal(before[name], after[name])
                   for name in before), flag  # fmt: skip
    for flags in ("--loss=rdpo --alpha=0.5", "--loss=simpo --gamma=0", "--loss=exo --label_smoothing=0.1",
                  "--loss=simpo --beta=1"):  # fmt: skip
        loss, flag = flags.split()
        for name in ("own", "given"):  # against the default that the loss brings
            train_here(tmp_path / name, *base, loss, *[flag][: name == "given"])
        own, given = weights(tmp_path / "own"), weights(tmp_path / "given")
        assert any(not torch.equal(own[name], given[name]) for name in own), flags
    train_here(tmp_path / "checkpointed", *base, "--activation_checkpointing")
    assert all(
        torch.equal(a, weights(tmp_path / "checkpointed")[name]) for name, a in before.items()
    )
    rates = {
        name: [train.learning_rate(step, 10, 1.0, train.parse_settings(
            ["--warmup_steps=2", f"--lr_schedule={name}"])) for step in range(10)]
        for name in ("constant", "linear", "cosine")
    }  # fmt: skip
    assert all(rate[:3] == [0.5, 1.0, 1.0] for rate in rates.values())
    assert rates["constant"][3:] == [1.0] * 7
    assert rates["linear"][6] == 0.5 == pytest.approx(rates["cosine"][6])
    assert rates["linear"][9] == pytest.approx(1 / 8)


def test_a_step_at_5e_7_moves_most_parameters(tmp_path):
    """Master weights are float32 also under bf16: in bf16 such a step would round to nothing."""
    flags = ["--sft_epochs=0", "--learning_rate=5e-7", "--max_steps=1", "--warmup_steps=0"]
    run = train_here(tmp_path, *flags, "--dtype=bfloat16")
    after = weights(tmp_path)
    tokenizer = data.Tokenizer(tmp_path / "tokenizer.model")
    before = train.load_model(run, "", tokenizer).state_dict()
    matrices = [name for name in before if "layers" in name and before[name].dim() == 2]
    moved = torch.cat([(before[name] != after[name]).flatten() for name in matrices])
    assert moved.float().mean() > 0.9


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    train_here(tmp_path, "--max_steps=1", "--sft_epochs=0", "--wandb=offline").wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_compile(tmp_path, monkeypatch):
    """The same weights; and lengths that change from step to step compile nothing anew."""
    flags, graphs, step = ["--max_steps=4", "--sft_epochs=0"], [], train.train_step
    train_here(tmp_path / "eager", *flags)

    def counting(*arguments):
        norm = step(*arguments)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return norm

    monkeypatch.setattr(train, "train_step", counting)
    train_here(tmp_path / "compiled", *flags, "--compile")
    assert len(graphs) == 4 and graphs[0] > 0 and len(set(graphs[1:])) == 1, graphs
    eager, compiled = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)


def test_readme_settings_and_lines():
    """Every --flag of the README exists, and the line counts it gives are near the truth."""
    readme, scripts = README, ("sample.py", "experiments/doctor.py", "experiments/random_llama.py")
    scripts += ("tests/benchmark.py",)
    text = "".join((ROOT / script).read_text(encoding="utf-8") for script in scripts)
    options = set(re.findall(r'"--(\w+)"', text))
    known = set(train.Settings.__dataclass_fields__) | options
    known |= {"help", "nproc_per_node", "standalone"}
    used = set(re.findall(r"--(\w+)", readme))
    assert used and used <= known, used - known
    for name, lines in re.findall(r"\| `(\w+\.py)` \| (\d+) \|", readme):
        actual = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(actual - int(lines)) <= 10, f"{name} has {actual} lines"


def test_import_order():
    """Leaves know nothing of each other, of ranks or of flags; nobody imports a root."""
    outside = {"torch", "numpy", "sentencepiece", "safetensors", "wandb", "jinja2", "experiments"}
    leaves, roots = {"model", "data", "dpo"}, {"train", "sample"}
    for name in leaves | roots:
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        imported = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        top = {module.split(".")[0] for module in imported}
        assert not top & roots
        if name in leaves:
            assert not top & (leaves | {"os", "wandb"}), name
            assert not any("distributed" in module for module in imported), name
        foreign = top - outside - leaves
        assert all(module in __import__("sys").stdlib_module_names for module in foreign), foreign
