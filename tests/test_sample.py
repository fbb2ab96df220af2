"""What sample.py makes of a checkpoint: a ranking of its samples, or one sentence; the cache."""

import json

import pytest
import torch
from conftest import SHAPES, make_model, run_here, save_tokenizer, write_jsonl

import data
import sample
from extra import cache
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


@pytest.mark.parametrize("flags", ["--bogus --prompt=x", "--prompt=x --temp=1", "--prompt=x --n=a"])
def test_what_is_no_flag_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        sample.parse_arguments(["checkpoint", *flags.split()])
    assert capsys.readouterr().err.count("\n") == 1


def test_unusable_checkpoints_and_files_are_one_sentence(checkpoints, tmp_path):
    save_pretrained(make_model(SHAPES["tied"]).float(), tmp_path)
    for arguments, message in (
        ([tmp_path / "none", "--prompt=x"], "config.json: not found"),
        ([tmp_path, "--prompt=x"], "a prompt: text needs a tokenizer.model; else give token ids"),
        (
            [checkpoints[0], "--score=x", "--compare", tmp_path],
            "has another tokenizer or vocabulary",
        ),
        ([checkpoints[0], "--prompt=x", "--out=/nonexistent/y"], "No such file"),
        ([checkpoints[0], "--prompts", tmp_path / "none"], "none: cannot be read"),
    ):
        error = run_here("sample.py", *arguments, expect=2).stderr
        assert message in error and error.count("\n") == 1 and error.startswith("sample.py: ")


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
