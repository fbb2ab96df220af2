"""`--sample_every`: what is sampled during training is what the checkpoints of then would write."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import read_metrics, run_here, turns, write_jsonl

import data
import sample
from extra import samples
from model import ModelConfig, Transformer, save_pretrained

WORDS = "good bad fine poor nice dull".split()
FLAGS = """--batch_size=4 --sft_learning_rate=1e-2 --learning_rate=1e-3 --warmup_steps=1
    --log_every=2""".split()
NEW = "--hidden_size=32 --num_layers=2 --num_heads=2 --vocab_size=300".split()


def texts(count: int, start: int = 0) -> list[dict]:
    return [
        {
            "prompt": f"Rate film {i}:",
            "chosen": f" It is {WORDS[i % 3]}.",
            "rejected": f" It is {WORDS[3 + i % 3]} {i}.",
        }
        for i in range(start, start + count)
    ]


def chats(count: int, start: int = 0) -> list[dict]:
    return [
        {
            "prompt": turns(f"u: {row['prompt']}"),
            "chosen": turns(f"a: {row['chosen'].strip()}"),
            "rejected": turns(f"a: {row['rejected'].strip()}"),
        }
        for row in texts(count, start)
    ]


def ids(count: int, start: int = 0) -> list[dict]:
    return [
        {"prompt": [1, 5 + i, 9], "chosen": [20 + i % 3, 2], "rejected": [30 + i % 3, i + 40, 2]}
        for i in range(start, start + count)
    ]


def rendered(count: int, start: int = 0) -> list[dict]:
    return [
        {"prompt": f"<s>{row['prompt']}", "chosen": f"{row['chosen']}</s>",
         "rejected": f"{row['rejected']}</s>"}
        for row in texts(count, start)
    ]  # fmt: skip


KINDS = {"text": texts, "chat": chats, "ids": ids, "rendered": rendered}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("files")
    found = {"root": str(root)}
    for name, make in KINDS.items():
        found[name] = write_jsonl(root / f"{name}.jsonl", make(10))
        found[f"{name} eval"] = write_jsonl(root / f"{name}-eval.jsonl", make(5, 10))
    config = ModelConfig(97, 32, 64, 2, 2, 2, 16, eos_token_id=2, max_position_embeddings=40)
    save_pretrained(Transformer(config).init_weights(0), root / "bare")
    return found


def flags_of(files: dict, kind: str, out, *more) -> list[str]:
    model = [f"--init_from={files['root']}/bare"] if kind == "ids" else NEW
    paths = [f"--data={files[kind]}", f"--eval_data={files[f'{kind} eval']}", f"--out_dir={out}"]
    return [*paths, *FLAGS, *model, *["--rendered"] * (kind == "rendered"), *more]


def rows_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def numbers(out) -> list[dict]:
    timed = lambda name: "second" in name or "memory" in name
    return [{k: v for k, v in row.items() if not timed(k)} for row in read_metrics(out)]


def by_hand(directory, files: dict, kind: str) -> list:
    """Plain samples of a checkpoint, by its own tokenizer, stopped where sample.py would stop."""
    model, tokenizer = sample.load(directory)
    examples = [*data.read_examples(files[f"{kind} eval"], "prompts")][:3]
    if tokenizer:
        tokenizer.rendered = kind == "rendered"
    prompts = [data.token_ids(data.Example(e.prompt, (), ""), tokenizer)[0] for e in examples]
    most = min(64, model.config.max_position_embeddings - max(map(len, prompts)))
    new = sample.generate(model, prompts, most, {2} if tokenizer is None else {tokenizer.eos_id})
    assert all(len(response) == most or response[-1] == 2 for response in new)
    if tokenizer is None:
        return [*zip(prompts, new)]
    decode = tokenizer.decode
    return [(decode(p), decode(r, continuation=True)) for p, r in zip(prompts, new)]


@pytest.mark.parametrize(
    "kind, more",
    [*((kind, []) for kind in KINDS), ("chat", ["--lora_rank=2"]), ("text", ["--dtype=bfloat16"])],
)
def test_they_are_those_of_the_checkpoints(kind, more, files, tmp_path):
    flags = flags_of(files, kind, tmp_path / "with", *more)
    run_here("train.py", *flags, "--sample_every=2")
    rows = rows_of(tmp_path / "with")
    due = [(stage, step) for stage in ("sft", "dpo") for step in (0, 2, 3)]
    assert [(row["stage"], row["step"]) for row in rows] == [x for x in due for _ in range(3)]
    for place, where in (("sft", ("sft", 3)), ("sft", ("dpo", 0)), ("", ("dpo", 3))):
        with torch.autocast("cpu", torch.bfloat16, enabled="--dtype=bfloat16" in more):
            expected = by_hand(tmp_path / "with" / place, files, kind)
        found = [(r["prompt"], r["response"]) for r in rows if (r["stage"], r["step"]) == where]
        assert found == expected, where
    run_here("train.py", *flags, f"--out_dir={tmp_path / 'without'}")
    assert numbers(tmp_path / "with") == numbers(tmp_path / "without")
    weights = lambda out: (tmp_path / out / "model.safetensors").read_bytes()
    assert weights("with") == weights("without"), "not one bit of training is another"
    assert not (tmp_path / "without" / "samples.jsonl").exists()


def test_a_resumed_run_has_each_once(files, tmp_path):
    """Also those of the state's own step, and a line that was torn; a new run leaves none."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = [*flags_of(files, "text", whole), "--sample_every=1", "--save_every=2"]
    run_here("train.py", *flags)
    shutil.copytree(whole, out)
    shutil.rmtree(out / "resume" / "done-0")
    with open(out / "samples.jsonl", "a") as file:
        file.write('{"stage": "dpo", "st')
    flags.append(f"--out_dir={out}")
    run_here("train.py", *flags, "--resume")
    assert rows_of(out) == rows_of(whole) and len(rows_of(out)) == 3 * 8
    run_here("train.py", *flags, "--resume")  # it is finished
    assert rows_of(out) == rows_of(whole)
    run_here("train.py", *flags, "--sample_every=0")
    assert not (out / "samples.jsonl").exists()


def test_which_prompts(files, tmp_path):
    """Different ones, of the held-out data if there is any; fewer than three where there are."""
    path = write_jsonl(tmp_path / "same.jsonl", [texts(1)[0], *texts(2), *texts(1)])
    flags = [*FLAGS, *NEW, f"--data={path}", f"--out_dir={tmp_path / 'out'}", "--sample_every=5"]
    run_here("train.py", *flags)
    rows = rows_of(tmp_path / "out")
    assert [row["prompt"] for row in rows] == ["Rate film 0:", "Rate film 1:"] * 4
    sft = [f for f in flags if not f.startswith("--learning_rate")]
    run_here("train.py", *sft, "--epochs=0", f"--eval_data={files['text eval']}")
    assert [row["prompt"] for row in rows_of(tmp_path / "out")[:3]] == [f"Rate film {i}:" for i in (10, 11, 12)]  # fmt: skip
    run_here("train.py", *sft, "--epochs=0")
    assert [row["prompt"] for row in rows_of(tmp_path / "out")[:2]] == ["Rate film 0:", "Rate film 1:"]  # fmt: skip


def test_weights_and_biases_gets_a_table(files, tmp_path, monkeypatch):
    logged = []
    table = lambda columns, data: (columns, data)
    started = lambda **_: SimpleNamespace(log=logged.append)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=started, Table=table))
    run_here(
        "train.py",
        *flags_of(files, "text", tmp_path / "out", "--sample_every=9", "--wandb=offline"),
    )
    tables = [row for row in logged if any(name.endswith("/samples") for name in row)]
    assert [{*row} for row in tables] == [{f"{s}/samples", f"{s}/step"} for s in ("sft", "sft", "dpo", "dpo")]  # fmt: skip
    columns, cells = tables[-1]["dpo/samples"]
    last = [[row["prompt"], row["response"]] for row in rows_of(tmp_path / "out")[-3:]]
    assert (columns, cells, tables[-1]["dpo/step"]) == (["prompt", "response"], last, 3)


def test_it_stays_within_what_the_model_has_seen(monkeypatch):
    """No further than its positions and its window reach; and all ranks go as far, whatever ends."""
    asked = []
    drawn = lambda model, prompts, most, ends, seed: asked.append((most, ends, seed))
    monkeypatch.setattr(sample, "generate", drawn)
    run = SimpleNamespace(settings=SimpleNamespace(compile=False, seed=7))
    run.autocast = torch.autocast("cpu", enabled=False)
    for positions, window, expected in ((400, None, 64), (60, None, 51), (99, 30, 21), (40, 8, 1)):
        config = SimpleNamespace(max_position_embeddings=positions, sliding_window=window)
        samples.draw(run, SimpleNamespace(config=config), [[1], [1] * 9])
        assert asked[-1] == (expected, (), 7)
    assert samples.printable("a\x1b[2Jb\n  c\x00") == "a\\x1b[2Jb c\\x00"
    assert samples.printable([3, 4]) == "[3, 4]"


def test_compiled_blocks_are_left_alone(files, tmp_path, monkeypatch):
    """Samples run eagerly: other shapes would use up what may be compiled anew."""
    stances, real = [], torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda s: stances.append(s) or real(s))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    run_here(
        "train.py", *flags_of(files, "text", tmp_path / "out", "--sample_every=9", "--compile")
    )
    assert stances == ["force_eager"] * 4
