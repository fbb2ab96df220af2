"""What sample.py does with a checkpoint: rewards against plain sums, candidates, chat, misuse."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import SHAPES, make_model, run_here, save_tokenizer, write_jsonl

import data
import sample
from experiments import reviews
from extra import cache, chat
from model import ModelConfig, load_pretrained, save_pretrained

ROWS = [
    {"prompt": "The film", "chosen": " is great.", "rejected": " was bad!", "id": 7},
    {"prompt": "A hotel", "chosen": " was slow.", "rejected": " is great, and slow"},
    {"prompt": [{"role": "user", "content": "2+2?"}], "chosen": "4", "rejected": "5 or so"},
]


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory):
    """A policy and a reference: random models that differ, with a tokenizer."""
    where = tmp_path_factory.mktemp("checkpoints")
    config = ModelConfig(tokenizer.vocab_size, 32, 64, 2, 4, 2, 8)
    for n, name in enumerate(("policy", "reference")):
        torch.manual_seed(n)
        save_pretrained(make_model(config, scale=4.0).float(), where / name)
        save_tokenizer(tokenizer, where / name)
    return where / "policy", where / "reference"


def plain_logp(model, ids: list[int], start: int) -> float:
    """log π of ids[start:] given what is before, from full logits of one sequence."""
    time = len(ids)
    segment = torch.tensor([[0, 0, 0, time]])
    with torch.no_grad():
        logits = model(torch.tensor(ids), torch.arange(time), segment)
    logps = logits.log_softmax(-1)[torch.arange(start - 1, time - 1), torch.tensor(ids[start:])]
    return logps.double().sum().item()


def plain_rewards(checkpoints, tokenizer, example, beta: float) -> list[float]:
    policy, reference = map(load_pretrained, checkpoints)
    prompt, *responses = data.token_ids(example, tokenizer)
    both = [
        [plain_logp(m, prompt + r, len(prompt)) for m in (policy, reference)] for r in responses
    ]
    return [beta * (p - q) for p, q in both]


def test_score_is_the_implicit_reward(checkpoints, tokenizer, tmp_path):
    """β·log(π/π_ref) of each response, the accuracy, and the rows given back with their rewards."""
    path, out = write_jsonl(tmp_path / "pairs.jsonl", ROWS), tmp_path / "scored.jsonl"
    arguments = ["--compare", checkpoints[1], "--score", path, "--beta=0.3", "--out", out]
    printed = run_here("sample.py", checkpoints[0], *arguments).stdout
    examples = list(data.read_preferences(path))
    expected = [plain_rewards(checkpoints, tokenizer, e, 0.3) for e in examples]
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    for row, before, rewards in zip(scored, ROWS, expected):
        assert row.pop("rewards") == pytest.approx(rewards, abs=1e-4)
        assert row == before, "the row's own fields are kept"
    accuracy = np.mean([chosen > rejected for chosen, rejected in expected])
    assert f"accuracy {accuracy:.1%}" in printed and "6 responses" in printed


def test_candidates_become_a_ranking(checkpoints, tokenizer, tmp_path):
    """Sample, score, and train on: candidates of every prompt, best first once they are scored."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "The film"}, *ROWS[1:]])
    drawn, ranked = tmp_path / "candidates.jsonl", tmp_path / "ranked.jsonl"
    few = ["--n=3", "--max_new_tokens=5", "--out", drawn]
    run_here("sample.py", checkpoints[0], "--prompts", prompts, *few)
    rows = [json.loads(line) for line in drawn.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["The film", "A hotel", ROWS[2]["prompt"]]
    assert all(len(row["candidates"]) == 3 for row in rows)
    assert any(len(set(row["candidates"])) > 1 for row in rows)
    score = ["--compare", checkpoints[1], "--score", drawn, "--out", ranked]
    assert "accuracy" not in run_here("sample.py", checkpoints[0], *score).stdout
    for example, row in zip(data.read_preferences(str(ranked)), rows):
        rewards = plain_rewards(checkpoints, tokenizer, example, 0.1)
        assert rewards == sorted(rewards, reverse=True) and len(rewards) == 3
        texts = [r[0]["content"] if data.is_turns(r) else r for r in example.responses]
        assert sorted(texts) == sorted(row["candidates"])


def test_best_of_and_kl(checkpoints, tokenizer, tmp_path):
    out = tmp_path / "best.jsonl"
    arguments = ["--compare", checkpoints[1], "--prompt=The film", "--max_new_tokens=6"]
    run_here("sample.py", checkpoints[0], *arguments, "--best_of=4", "--out", out)
    row = json.loads(out.read_text())
    best = row["rewards"].index(max(row["rewards"]))
    assert len(row["candidates"]) == 4 and row["response"] == row["candidates"][best]
    shown = run_here("sample.py", checkpoints[0], *arguments, "--best_of=4").stdout
    assert f"(reward {max(row['rewards']):.3f})" in shown
    kl = run_here("sample.py", checkpoints[0], *arguments, "--kl", "--n=300").stdout
    mean, error = float(kl.split()[1]), float(kl.split()[3])
    # The plain estimate from the same samples, mean of log π/π_ref, has the same expectation.
    models = list(map(load_pretrained, checkpoints))
    trees = sample.draw(models[0], tokenizer, ["The film"] * 600, 6, seed=5)
    ratios = [
        plain_logp(models[0], x + y, len(x)) - plain_logp(models[1], x + y, len(x))
        for x, y in trees
    ]
    spread = np.std(ratios) / len(ratios) ** 0.5
    assert mean == pytest.approx(np.mean(ratios), abs=4 * (error + spread)) and error < mean
    same = ["--compare", checkpoints[0], "--prompt=The film", "--max_new_tokens=6", "--kl", "--n=5"]
    assert run_here("sample.py", checkpoints[0], *same).stdout.startswith(
        "KL(π‖π_ref) 0.0000 ± 0.0000"
    )


def test_chat_renders_as_training_does(checkpoints, tokenizer, monkeypatch, capsys):
    """Every turn's prompt is the whole conversation, encoded by the function that training uses."""
    lines, seen, generate = iter(["hello </s>", "and 2+2?"]), [], sample.generate

    def talk(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", talk)
    monkeypatch.setattr(
        sample, "generate", lambda m, p, *a, **k: seen.append(p) or generate(m, p, *a, **k)
    )
    flags = [str(checkpoints[0]), "--chat", "--system=Be brief.", "--max_new_tokens=8"]
    chat.talk(sample.parse_arguments(flags), {"max_new_tokens": 8})
    first, second = (prompts[0] for prompts in seen)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello </s>"}]
    assert [first] == data.token_ids(data.Example(turns, ()), tokenizer)
    assert first.count(tokenizer.eos_id) == 0, "what the user writes is never a control token"
    assert tokenizer.decode(first) == "Be brief.\n\nHuman: hello </s>\n\nAssistant:"
    assert tokenizer.decode(second).endswith("\n\nHuman: and 2+2?\n\nAssistant:")
    assert tokenizer.decode(second).startswith(tokenizer.decode(first))
    assert capsys.readouterr().out


def test_labels_of_the_grammar(tmp_path, capsys):
    """Candidates labelled by the true reward: pairs that train.py takes; the better one is chosen
    by Bradley-Terry, and what the grammar cannot write loses."""
    grammar, rng = reviews.Reviews(), np.random.default_rng(1)
    prompt = grammar.prompts["train"][0]
    rows = [
        {"prompt": prompt, "candidates": [grammar.write(prompt, rng), "nonsense"]}
        for _ in range(50)
    ]
    path = write_jsonl(tmp_path / "candidates.jsonl", rows)
    reviews.label(path, tmp_path / "pairs.jsonl")
    pairs = list(data.read_preferences(str(tmp_path / "pairs.jsonl")))
    assert len(pairs) == 50 and sum(e.responses[1] == "nonsense" for e in pairs) > 45


@pytest.mark.parametrize(("flags", "message"), [
    ("", "give --prompt or --prompts, or --chat, or --score"),
    ("--chat --prompt=x", "give --prompt or --prompts, or --chat, or --score"),
    ("--prompt=x --top_p=0", "--top_p must be"),
    ("--prompt=x --n=0", "--n must be at least 1"),
    ("--prompt=x --best_of=0", "--best_of must be at least 1"),
    ("--score=f", "name it with --compare"),
    ("--prompt=x --kl", "name it with --compare"),
    ("--prompt=x --kl --compare=y --temperature=0.5", "--temperature would be ignored: --kl needs plain"),
    ("--prompt=x --temperature=nan", "--temperature must be at least 0, and finite"),
    ("--prompt=x --temperature=0 --top_k=3", "--top_k would be ignored: --temperature=0 is greedy"),
    ("--score=x --compare=y --beta=-1", "--beta must be at least 0"),
    ("--score=x --compare=y --top_p=0.5", "--top_p would be ignored"),
    ("--chat --n=3", "--n would be ignored"),
    ("--chat --compare=y", "--compare would be ignored"),
    ("--prompt=x --system=y", "--system would be ignored"),
    ("--prompt=x --beta=1", "--beta would be ignored"),
    ("--prompt=x --best_of=2 --n=2 --compare=y", "--n would be ignored"),
    ("--chat --out=y", "--out would be ignored"),
    ("--prompt=x --compare=y --out=z", "--compare would be ignored"),
    ("--score=x --compare=y --n=2", "--n would be ignored"),
    ("--score=x --compare=y --best_of=2", "--best_of would be ignored: they need prompts"),
])  # fmt: skip
def test_misuse_is_refused(flags, message):
    with pytest.raises(data.DataError) as error:
        sample.parse_arguments(["checkpoint", *flags.split()])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("flags", ["--bogus --prompt=x", "--prompt=x --temp=1", "--prompt=x --n=a"])
def test_what_is_no_flag_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        sample.parse_arguments(["checkpoint", *flags.split()])
    assert capsys.readouterr().err.count("\n") == 1


def test_unusable_checkpoints_and_files_are_one_sentence(checkpoints, tmp_path):
    save_pretrained(make_model(SHAPES["tied"]).float(), tmp_path)
    for arguments, message in (
        ([tmp_path / "none", "--prompt=x"], "config.json: not found"),
        ([tmp_path, "--prompt=x"], "sampling needs a tokenizer.model"),
        (
            [checkpoints[0], "--score=x", "--compare", tmp_path],
            "has another tokenizer or vocabulary",
        ),
        ([checkpoints[0], "--prompt=x", "--out=/nonexistent/y"], "No such file"),
        ([checkpoints[0], "--prompts", tmp_path / "none"], "none: cannot be read"),
    ):
        error = run_here("sample.py", *arguments, expect=2).stderr
        assert message in error and error.count("\n") == 1 and error.startswith("sample.py: ")


def test_blocks_of_samples_are_the_samples(checkpoints, tokenizer, monkeypatch):
    """Many prompts in blocks of bounded memory: as many responses, different seeds in each."""
    model, sizes, generate = load_pretrained(checkpoints[0]), [], sample.generate
    monkeypatch.setattr(
        sample,
        "generate",
        lambda m, p, *a, **k: sizes.append((len(p), k["seed"])) or generate(m, p, *a, **k),
    )
    trees = sample.draw(model, tokenizer, ["The film"] * 1500, 2)
    assert len(trees) == 1500 and [n for n, _ in sizes] == [1000, 500]
    assert len({seed for _, seed in sizes}) == 2
    assert len(set(map(str, itertools.chain.from_iterable(trees)))) > 20


def test_with_and_without_the_cache(checkpoints, monkeypatch):
    """Sampling that runs everything again for each token draws the same tokens."""
    model = load_pretrained(checkpoints[0])
    prompts = [[5, 6, 7], [3], [9, 8, 7, 6, 5, 4, 3, 9, 10, 11]]
    run = lambda **options: sample.generate(model, prompts, 12, 2, seed=1, **options)
    kept = [run(), run(temperature=0), run(top_k=3, temperature=2.0)]
    used = []
    original = cache.KVCache.__call__
    monkeypatch.setattr(cache.KVCache, "__call__", lambda *a: used.append(1) or original(*a))
    assert run() == kept[0] and used
    monkeypatch.delattr(cache, "KVCache")  # as if the room was deleted
    used.clear()
    assert [run(), run(temperature=0), run(top_k=3, temperature=2.0)] == kept and not used
