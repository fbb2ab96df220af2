"""The optimum: where every response can be listed, the real trainer reaches what theory says.

The vocabulary is two words and EOS, a response has at most three tokens, and so there are fifteen:
their probabilities, any policy's KL and the optimal policies are sums over a list.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import init_small, make_model, read_metrics, write_jsonl

import data
import dpo
import train
from extra import reward
from model import ModelConfig, Transformer, load_pretrained, save_pretrained
from sample import generate

EOS, LONGEST, WORDS = 2, 3, (0, 1)
SPACE = [[*head, EOS] for n in range(LONGEST) for head in itertools.product(WORDS, repeat=n)]
SPACE += [list(response) for response in itertools.product(WORDS, repeat=LONGEST)]  # cut, no EOS
# A distinct first token as BOS is: after [0] alone the prefixes 0, 00, 000 would all look the same to
# attention with rotary positions, which are relative.
PROMPTS = [[EOS, 0], [EOS, 1, 0]]
RNG = np.random.default_rng(0)
REWARDS = RNG.normal(size=(len(PROMPTS), len(SPACE)))  # r(x, y)
BETTER = 1 / (1 + np.exp(REWARDS[:, None] - REWARDS[:, :, None]))  # P(y ≻ y'), (prompts, y, y')
ALL_PAIRS = list(itertools.combinations(range(len(SPACE)), 2))
BETA = 0.5


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The checkpoint that is the reference, and its log-probs: far from uniform."""
    directory = tmp_path_factory.mktemp("optimum") / "start"
    config = ModelConfig(3, 32, 64, 2, 2, 2, 16, rope_theta=10.0, tie_word_embeddings=True)
    model = init_small(Transformer(config)).double()
    torch.manual_seed(5)  # after all that the layers draw for themselves
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    save_pretrained(model.float(), directory)
    logps = enumerate_logps(load_pretrained(directory))
    assert 0.2 < np.exp(logps).max() < 0.9
    return directory, logps


def enumerate_logps(model) -> np.ndarray:
    """log π(y|x) of all responses, (prompts, responses), in float64."""
    dataset = data.to_dataset([[prompt, *SPACE] for prompt in PROMPTS])
    batch = data.collate(dataset, np.arange(len(PROMPTS)))
    with torch.no_grad():
        return dpo.sequence_logps(model.double(), batch).view(len(PROMPTS), -1).numpy()


def kl(logp: np.ndarray, logq: np.ndarray) -> np.ndarray:
    """KL(p‖q) for each prompt."""
    return (np.exp(logp) * (logp - logq)).sum(-1)


def tilted(logps: np.ndarray, by: np.ndarray) -> np.ndarray:
    """log of π ∝ π_ref·exp(by), normalised for each prompt (Eq. 4)."""
    logits = logps + by
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def rows(pairs, label, weight=None) -> list[dict]:
    """A preference of each pair at each prompt, the better response as chosen, and the probability
    that it is preferred as soft label."""
    result = []
    for n, prompt in enumerate(PROMPTS):
        for i, j in (sorted(pair, key=lambda y, n=n: -REWARDS[n, y]) for pair in pairs):
            row = {"prompt": prompt, "chosen": SPACE[i], "rejected": SPACE[j]}
            row["soft_label"] = label[n, i, j]
            result.append(row if weight is None else row | {"weight": weight[n, i, j]})
    return result


def optimise(directory, rows, out, *flags) -> np.ndarray:
    """Train on the rows with the real loop; the policy's log-probs. Its probabilities sum to 1."""
    path = write_jsonl(out.with_suffix(".jsonl"), rows)
    settings = f"""--init_from={directory} --data={path} --out_dir={out} --sft_epochs=0 --epochs=200
        --batch_size={len(rows)} --learning_rate=1e-2 --warmup_steps=10 --grad_clip=0 --log_every=10
        --max_length=8 --max_prompt_length=4 --micro_batch_tokens=800""".split()
    train.train(train.Run(train.parse_settings([*settings, *flags])))
    logps = enumerate_logps(load_pretrained(out))
    assert np.exp(logps).sum(-1) == pytest.approx(1, abs=1e-6)
    return logps


def assert_reached(policy, reference, by):
    """KL(π‖π*) is below 1e-4, and log(π/π_ref) is `by` up to a constant for each prompt."""
    best = tilted(reference, by)
    assert (kl(reference, best) > 0.2).all(), "there is a way to go"
    assert (kl(policy, best) < 1e-4).all(), kl(policy, best)
    spread = np.ptp(policy - reference - by, axis=1)
    assert (spread < 0.02).all(), spread


# Any pairs that connect all responses will do for DPO: neighbours and some others.
SOME_PAIRS = [(i, j) for i, j in ALL_PAIRS if j - i in (1, 4, 9)]


@pytest.fixture(scope="module")
def tuned(start, tmp_path_factory):
    """DPO on exact Bradley-Terry labels: its directory and log-probs."""
    out = tmp_path_factory.mktemp("tuned") / "dpo"
    return out, optimise(start[0], rows(SOME_PAIRS, BETTER), out, f"--beta={BETA}")


def test_dpo_reaches_the_optimum(start, tuned):
    """π* ∝ π_ref·exp(r/β) (Eq. 4), and so the reward is recovered up to a constant (Eq. 5)."""
    assert_reached(tuned[1], start[1], REWARDS / BETA)


def test_ipo_reaches_its_optimum(start, tmp_path):
    """π ∝ π_ref·exp(E[P(y ≻ y')]/τ), y' ~ μ: with pairs weighted by μ(y)·μ(y'), here μ = π_ref."""
    directory, reference = start
    mu = np.exp(reference)
    weight = mu[:, :, None] * mu[:, None] * len(ALL_PAIRS)
    pairs = [row for row in rows(ALL_PAIRS, BETTER, weight) if row["prompt"] == PROMPTS[1]]
    flags = "--loss=ipo", "--beta=0.2", "--learning_rate=5e-3"
    policy = optimise(directory, pairs, tmp_path / "ipo", *flags)
    by = np.einsum("nij,nj->ni", BETTER, mu) / 0.2
    assert_reached(policy[1:], reference[1:], by[1:])


def test_conservative_dpo_stops_at_its_margin(start, tmp_path):
    """With certain labels there is no optimum; smoothed by ε it is h = log((1 − ε)/ε)/β a pair."""
    directory, reference = start
    pairs = [(i, i + 1) for i in range(0, len(SPACE) - 1, 2)]  # disjoint: each can have its own h
    certain = np.ones_like(BETTER)
    flags = f"--beta={BETA}", "--label_smoothing=0.2"
    policy = optimise(directory, rows(pairs, certain), tmp_path / "cdpo", *flags)
    for n, ratios in enumerate(policy - reference):
        h = [abs(ratios[i] - ratios[j]) for i, j in pairs]
        assert h == pytest.approx([math.log(4) / BETA] * len(pairs), abs=0.02), n


def test_swapped_labels_mirror_the_curves(start, tuned, tmp_path):
    """The same pairs with their labels swapped: the logged margins mirror each other, and what one
    gains in reward the other loses: π ∝ π_ref·exp(−r/β)."""
    out = tmp_path / "swapped"
    policy = optimise(start[0], rows(SOME_PAIRS, 1 - BETTER), out, f"--beta={BETA}")
    assert_reached(policy, start[1], -REWARDS / BETA)
    up, down = (
        np.array([r["train/rewards/margins"] for r in read_metrics(d) if "train/loss" in r])
        for d in (tuned[0], out)
    )
    assert len(up) == len(down) == 20 and (np.abs(up + down) < 0.3 * up).all()
    assert up[-1] + down[-1] == pytest.approx(0, abs=2e-3) and up[-1] > 0.9
    rewards = [(np.exp(logps) * REWARDS).sum(-1) for logps in (tuned[1], start[1], policy)]
    assert (rewards[0] > rewards[1] + 0.3).all() and (rewards[1] > rewards[2] + 0.3).all()


@pytest.mark.parametrize("prompt", range(len(PROMPTS)))
def test_sampled_kl_agrees_with_the_enumerated(start, tuned, prompt):
    """k1 and Rao–Blackwell from the policy's own samples; the latter has the smaller error."""
    policy, reference = (load_pretrained(directory) for directory in (tuned[0], start[0]))
    exact = kl(tuned[1], start[1])[prompt]
    samples = generate(policy, [PROMPTS[prompt]] * 4000, LONGEST, EOS, seed=1)
    counts = np.bincount([SPACE.index(ids) for ids in samples], minlength=len(SPACE))
    p = np.exp(tuned[1][prompt])
    assert (np.abs(counts / 4000 - p) < 4 * np.sqrt(p / 4000) + 1e-3).all(), "they are samples of π"
    dataset = data.to_dataset([[PROMPTS[prompt], ids] for ids in samples])
    batch = data.collate(dataset, np.arange(4000))
    with torch.no_grad():
        k1 = dpo.sequence_logps(policy, batch) - dpo.sequence_logps(reference, batch)
        rao_blackwell = reward.sequence_kl(policy, reference, batch)
    error = {}
    for name, estimate in (("k1", k1), ("rb", rao_blackwell)):
        error[name] = estimate.std().item() / 4000**0.5
        assert estimate.mean().item() == pytest.approx(exact, abs=3 * error[name])
    assert error["rb"] < error["k1"] < 0.2 * exact


def test_sequence_kl_is_unbiased():
    """Averaged over all sampled sequences with their exact probabilities, the Rao–Blackwell
    estimate equals the enumerated KL: here over every response of two tokens or EOS."""
    torch.manual_seed(1)
    config = ModelConfig(4, 16, 32, 1, 2, 2, 8, tie_word_embeddings=True)
    policy, reference = make_model(config), make_model(config)
    space = [[2], *([a, b] for a in (0, 1, 3) for b in range(4))]
    batch = data.collate(data.to_dataset([[[1, 3], *space]]), np.array([0]))
    with torch.no_grad():
        log_p, log_q = (dpo.sequence_logps(m, batch) for m in (policy, reference))
        estimate = reward.sequence_kl(policy, reference, batch)
    assert estimate.shape == (len(space),)
    exact = (log_p.exp() * (log_p - log_q)).sum().item()
    assert exact > 0.1 and (log_p.exp() @ estimate).item() == pytest.approx(exact, rel=1e-9)
