"""The pipeline that DPO replaces: reward model, best of N, RLOO, and the table beside DPO."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    SHAPES,
    make_model,
    random_dataset,
    read_metrics,
    run_here,
    run_script,
    save_tokenizer,
)
from transformers import LlamaForSequenceClassification

import data
import sample
import train
from experiments import replaced, reviews, rlhf
from model import ModelConfig, Transformer, load_pretrained, save_pretrained


@pytest.fixture(scope="module")
def sft(tokenizer, tmp_path_factory):
    """A small random checkpoint with a tokenizer."""
    directory = save_tokenizer(tokenizer, tmp_path_factory.mktemp("sft"))
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = ModelConfig.new(tokenizer.vocab_size, 32, 2, 2, **ids)
    save_pretrained(Transformer(config).init_weights(0), directory)
    return directory


def test_the_reward_model_is_a_sequence_classifier_of_transformers(tmp_path):
    """Rewards, Bradley–Terry loss and gradient of packed pairs are those of a Llama classifier that
    reads each sequence alone, up to the word before EOS."""
    save_pretrained(make_model(SHAPES["grouped"]), tmp_path)
    ours = load_pretrained(tmp_path).double()
    theirs = LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=1).double()
    ours.lm_head = torch.nn.Linear(32, 1, bias=False).double()
    theirs.score.load_state_dict(ours.lm_head.state_dict())
    dataset = random_dataset([[5, 4, 7], [1, 3, 1], [8, 6, 6]])
    batch = data.collate(dataset, np.array([2, 0, 1]))
    rewards = rlhf.read_rewards(ours, batch)
    loss = rlhf.bradley_terry(rewards, batch)
    loss.backward()
    expected = []
    for e in (2, 0, 1):
        prompt, *responses = (torch.from_numpy(dataset.tokens[part]).long() for part in dataset[e])
        for response in responses:
            read = torch.cat([prompt, response[:-1]])[None]
            expected.append(theirs(input_ids=read).logits[0, 0])
    pairs = torch.stack(expected).view(3, 2)
    assert rewards.tolist() == pytest.approx(pairs.flatten().tolist(), rel=1e-5)
    plain = torch.log1p(torch.exp(pairs[:, 1] - pairs[:, 0])).mean()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    gradients = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    gradients["lm_head.weight"] = gradients.pop("score.weight")
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


def test_the_reward_model_learns_its_pairs(sft, tmp_path):
    """What is better can be told from the second word only; and a seed is another order."""
    grammar = np.random.default_rng(0)
    rows = []
    for i in range(160):
        words = [f" {w} {grammar.integers(9)}." for w in ("good", "bad")]
        rows.append({"prompt": f"Film {i % 5}:", "chosen": words[0], "rejected": words[1]})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [rlhf.train_reward_model(sft, path, 1e-2, 16, 2, seed) for seed in (0, 0, 1)]
    heads = [model.lm_head.weight for model in models]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    tokenizer = data.find_tokenizer(sft)
    prompt = tokenizer.encode("Film 7:")
    response = lambda text: [*tokenizer.encode(text, continuation=True), tokenizer.eos_id]
    trees = [[prompt, response(f" {word} 3.")] for word in ("good", "bad")] * 150  # two batches
    trees += [[prompt, trees[0][1][:-1]]]  # it has no end
    found = rlhf.rewards_of([], trees, tokenizer, models[0])
    assert found[-1] == rlhf.WORST
    assert found[:-1].reshape(-1, 2).std(0) == pytest.approx(0, abs=1e-4)
    assert found[0] - found[1] > 2


def test_the_true_reward_and_the_best_of_n(tokenizer):
    prompt = "Review of the new film Amber:"
    texts = (" The plot was sadly slow, but the cast seemed superb.", " The plot was good.",
             " The plot was made.", " The plot was good.")  # fmt: skip
    ids = [[*tokenizer.encode(text, continuation=True), tokenizer.eos_id] for text in texts]
    ids[3] = ids[3][:-1]  # as if it had been cut off
    trees = [[[1], response] for response in ids]
    rewards = rlhf.rewards_of([prompt] * 4, trees, tokenizer)
    assert rewards == pytest.approx([0.6, 0.8, rlhf.WORST, rlhf.WORST])
    lowest = sum(
        min(c.r.min() for c in place) for place in zip(*reviews.Reviews().clauses.values())
    )
    assert lowest > rlhf.WORST, "no review is as bad as what is none"
    order = np.array([1.0, 3.0, 9.0, 2.0, 1.0, 0.0])
    assert rlhf.best_of_n(list("abcdef"), order, 3, 3) == ["c", "d"]
    assert rlhf.best_of_n(list("abcdef"), order, 3, 2) == ["b", "d"]
    assert rlhf.best_of_n(list("abcdef"), order, 3, 1) == ["a", "d"]


@pytest.mark.parametrize("k", [2, 3])
def test_the_gradient_of_rloo_is_exact_on_average(k):
    """Over all draws of k samples from each of two policies over three responses, each by its
    probability, it is the gradient of β·KL(π‖π_ref) − E[r], not only near it."""
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(2, 3, dtype=torch.float64).log_softmax(-1)
    rewards, beta = torch.randn(2, 3, dtype=torch.float64), 0.7
    logps = logits.log_softmax(-1)
    objective = (logps.exp() * (rewards - beta * (logps - ref))).sum(-1).mean()  # Eq. 3
    [exact] = torch.autograd.grad(-objective, logits, retain_graph=True)
    total, average = 0.0, torch.zeros_like(exact)
    for draws in itertools.product(range(3), repeat=2 * k):
        y = torch.tensor(draws).view(2, k)
        chosen = [x.gather(1, y) for x in (logps, ref, rewards)]
        weight = chosen[0].sum().exp().detach()
        [gradient] = torch.autograd.grad(rlhf.rloo_loss(*chosen, beta), logits, retain_graph=True)
        total, average = total + weight, average + weight * gradient
    assert total.item() == pytest.approx(1)
    torch.testing.assert_close(average, exact, rtol=1e-10, atol=1e-12)


def test_the_advantages_of_rloo():
    """Each sample against the mean of the others, in words; those of a prompt add to nothing."""
    logps = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -3.0, -3.0]], requires_grad=True)
    ref, rewards = torch.zeros(2, 3), torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    rlhf.rloo_loss(logps, ref, rewards, beta=0.5).backward()
    returns = [1.5, 3.0, 8.0]
    advantages = [1.5 - 5.5, 3.0 - 4.75, 8.0 - 2.25]
    assert (rewards + 0.5 * -logps)[0].tolist() == returns
    assert logps.grad[0].tolist() == pytest.approx([-a / 6 for a in advantages])
    assert logps.grad.sum(1).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_the_steps_of_rloo(sft, monkeypatch):
    """The gradient of its second step is put together again from the samples, each alone: those of
    the policy as it is by then, against the reference as it was, compared within their prompts."""
    monkeypatch.setattr(rlhf, "rewards_of", lambda prompts, trees, *_: np.array(
        [len(prompt) + sum(y) % 7 for prompt, (_, y) in zip(prompts, trees)]))  # fmt: skip
    real_draw, real_step, drawn, losses = sample.draw, rlhf.take_step, [], []

    def draw(policy, tokenizer, prompts, *args, **options):
        options["seed"] %= 1000
        trees = real_draw(policy, tokenizer, prompts, 6, **options)
        before = {name: p.detach().clone() for name, p in policy.named_parameters()}
        drawn.append((prompts, trees, before, options["seed"]))
        return trees

    def take_step(policy, optimizer, loss, rate):
        losses.append(
            torch.autograd.grad(loss, policy.layers[0].mlp.up_proj.weight, retain_graph=True)
        )
        real_step(policy, optimizer, loss, rate)

    monkeypatch.setattr(sample, "draw", draw)
    monkeypatch.setattr(rlhf, "take_step", take_step)
    rlhf.rloo(sft, None, beta=0.3, steps=2, prompts=3, k=2, learning_rate=0.05, seed=4)
    (asked, trees, before, seed), first = drawn[1], drawn[0]
    assert seed != first[3] and asked[::2] == asked[1::2] and len(set(asked)) > 1
    policy, reference = load_pretrained(sft), load_pretrained(sft)
    policy.load_state_dict(before)
    assert not torch.equal(policy.norm.weight, reference.norm.weight), "it has learnt"

    def logp(model, prompt: list, response: list):
        tokens = torch.tensor([*prompt, *response])
        segments = torch.tensor([[0, 0, 0, len(tokens)]])
        logits = model(tokens, torch.arange(len(tokens)), segments)[len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[range(len(response)), response].sum()

    total = 0.0
    for i in range(0, 6, 2):
        own = [logp(policy, *trees[j]) for j in (i, i + 1)]
        value = [len(asked[j]) + sum(trees[j][1]) % 7
                 - 0.3 * (own[j - i] - logp(reference, *trees[j])).item()
                 for j in (i, i + 1)]  # fmt: skip
        total = total - (value[0] - value[1]) * own[0] / 6 - (value[1] - value[0]) * own[1] / 6
    expected = torch.autograd.grad(total, policy.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(losses[1], expected, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the built-in experiment, but small."""
    out = tmp_path_factory.mktemp("runs") / "reviews"
    files = zip(("data", "eval_data", "sft_data"), reviews.write(out, 0, 3000, 200))
    shape = "--hidden_size=64 --num_layers=1 --num_heads=2 --batch_size=32 --beta=0.5"
    rates = "--sft_learning_rate=1e-2 --learning_rate=1e-3"
    flags = f"{shape} {rates} --out_dir={out}".split()
    train.main([*(f"--{name}={file}" for name, file in files), *flags])
    return out


def test_the_table(run, tmp_path):
    """The script itself: DPO as the report has it, and of each method what it took."""
    out = tmp_path / "rows.json"
    small = "--count=40 --steps=1 --seed=3 --beta 0.5 2".split()
    printed = run_script("experiments/rlhf.py", run, *small, f"--out={out}").stdout.splitlines()
    rows = json.loads(out.read_text())
    assert len(printed) == 2 + len(rows) and printed[0].startswith("| method | setting | seed |")
    names = [(row["method"], row["setting"]) for row in rows]
    trained = [
        (method, f"beta={beta}") for beta in (0.5, 2) for method in ("RLOO", "RLOO, true reward")
    ]
    assert names[:2] == [("SFT", ""), ("DPO", "beta=0.5")] and names[4:] == trained
    assert names[2:4] == [("best of N", "N=4"), ("best of N", "N=16")]
    assert {row["seed"] for row in rows} == {3}
    assert [row["models"] for row in rows] == [1, 1, 2, 2, 3, 2, 3, 2]
    assert [row["samples"] for row in rows] == [0, 0, 160, 640, 128, 128, 128, 128]
    assert (
        rows[2]["kl"] == pytest.approx(math.log(4) - 3 / 4, abs=1e-4) and rows[2]["kl_error"] == 0
    )
    assert rows[0]["learned"] < rows[2]["learned"] < rows[3]["learned"]
    assert rows[1]["lines"] < rows[5]["lines"] < rows[4]["lines"]
    measured = reviews.measure(run, run / "sft", 40)
    dpo, kl = measured["DPO"], measured["KL"]
    expected = {"reward": dpo["rewards"].mean(), "reward_error": reviews.error(dpo["rewards"])}
    expected |= {"kl": kl.mean(), "kl_error": reviews.error(kl), "accepted": dpo["accepted"].mean()}
    assert {name: rows[1][name] for name in expected} == pytest.approx(expected, abs=1e-3)
    gain = rows[1]["reward"] - rows[0]["reward"]
    assert rows[1]["share"] == pytest.approx(gain / measured["best"], abs=1e-3)


def test_seconds_are_of_what_each_needs(run, tmp_path, monkeypatch):
    """On a clock that only learning (100), drawing (10) and policy gradient (1) advance; DPO's are
    of its log."""
    now = [0.0]

    def takes(module, name: str, seconds: float):
        real = getattr(module, name)

        def call(*arguments, **options):
            now[0] += seconds
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    takes(rlhf, "train_reward_model", 100.0)
    takes(sample, "draw", 10.0)
    takes(rlhf, "rloo", 1.0)
    monkeypatch.setattr(replaced, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    out = tmp_path / "rows.json"
    run_here("experiments/replaced.py", run, "--count=4", "--steps=2", f"--out={out}")
    log = [row for row in read_metrics(run) if row["stage"] == "dpo" and "train/loss" in row]
    ends = [0, *(row["step"] for row in log)]
    dpo = sum((b - a) * 32 / row["pairs_per_second"] for a, b, row in zip(ends, ends[1:], log))
    seconds = [row["seconds"] for row in json.loads(out.read_text())]
    assert seconds[1] == pytest.approx(dpo, abs=1e-3) and dpo > 0
    assert seconds[:1] + seconds[2:] == [0, 100 + 10 * 4 / 16, 110, 100 + 1 + 2 * 10, 1 + 2 * 10]


def test_what_is_no_run_is_one_sentence(run, tmp_path):
    why = "give a finished run of the built-in experiment, as python train.py makes it"
    say = lambda what: f"rlhf.py: {what}"
    missing = tmp_path / "none"
    run_here(
        "experiments/replaced.py", missing, expect=say(f"{missing / 'run.json'} is missing: {why}")
    )
    other = tmp_path / "other"
    (other / "sft").mkdir(parents=True)
    for name in ("metrics.jsonl", "sft.jsonl", "pairs.jsonl", "config.json"):
        (other / name).write_text("")
    (other / "run.json").write_text(json.dumps({"settings": {"data": "my.jsonl"}}))
    trained = say(f"{other}: this run was trained on my.jsonl, not on reviews")
    run_here("experiments/replaced.py", other, expect=trained)
    settings = {"data": "pairs.jsonl", "loss": "ipo", "sft_weight": 0.0}
    (other / "run.json").write_text(json.dumps({"settings": settings}))
    (other / "pairs.jsonl").touch()
    loss = say(f"{other}: this run was not trained with DPO's own loss (--loss=dpo)")
    run_here("experiments/replaced.py", other, expect=loss)
    limits = say("--count must be at least 2, --steps, --seed and --beta at least 0")
    for flag in ("--count=1", "--steps=-1", "--beta=-1", "--beta=nan"):
        run_here("experiments/replaced.py", run, flag, expect=limits)
