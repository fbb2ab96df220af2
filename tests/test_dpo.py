"""DPO itself: log-probs of responses, the gradient, what is logged, the reference as data."""

import dataclasses
import doctest
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHAPES, make_model, random_dataset
from test_objectives import options_of
from torch.nn.functional import logsigmoid

import data
import dpo
from extra.objectives import LOSSES

FIXTURE = json.loads((Path(__file__).parent / "losses.json").read_text())


def make_batch(reference, lengths, weights=None):
    """P pairs as `preference_loss` wants them; of each vector, (2P,), the first half is chosen."""
    pairs = len(lengths) // 2
    index, one = torch.arange(2 * pairs), torch.ones(pairs)
    return SimpleNamespace(
        chosen=index[:pairs], rejected=index[pairs:], lengths=lengths, reference=reference,
        weights=one if weights is None else weights, labels=one, margins=one * math.nan, soft=False,
    )  # fmt: skip


def averages(sums: dict) -> dict[str, float]:
    """What is logged of sums: each divided by the count."""
    return {k: float(v) / float(sums["count"]) for k, v in sums.items() if k != "count"}


def test_docstring_example():
    assert doctest.testmod(dpo).attempted > 0 == doctest.testmod(dpo).failed


def test_metrics_parity_with_trl():
    case = next(c for c in FIXTURE["cases"] if "metrics" in c)
    given = {k: torch.tensor(v, dtype=torch.float64) for k, v in FIXTURE["inputs"].items()}
    logps = torch.cat([given["chosen"], given["rejected"]])
    reference = torch.cat([given["ref_chosen"], given["ref_rejected"]])
    lengths = torch.cat([given["chosen_length"], given["rejected_length"]]).long()
    batch = make_batch(reference, lengths)
    total, sums = dpo.preference_loss(logps, batch, loss=dpo.dpo, beta=case["beta"])
    assert sums["count"] == 64 and total.item() == pytest.approx(64 * case["mean"], rel=1e-9)
    average = averages(sums)
    for name, value in case["metrics"].items():
        assert average[name] == pytest.approx(value, abs=1e-6)
    # Those that TRL does not have, from their definitions.
    a, b = (logps - reference).chunk(2)
    margins = case["beta"] * (a - b)
    expected = {
        "loss": case["mean"],
        "rewards/ties": (margins == 0).double().mean(),
        "logps/chosen": given["chosen"].mean(),
        "logps/rejected": given["rejected"].mean(),
        "gradient_weight": (1 / (1 + margins.exp())).mean(),
        "both_fell": (torch.maximum(a, b) < 0).double().mean(),
    }
    assert average.keys() == case["metrics"].keys() | expected.keys()
    for name, value in expected.items():
        assert average[name] == pytest.approx(float(value), abs=1e-6), name
    assert 0 < expected["both_fell"] < 1


def test_metrics_are_averages_by_weight():
    """A margin of exactly zero is a tie and no success; each pair counts by its weight."""
    h = torch.tensor([0.0, 1.0, 2.0, -9.0])
    batch = make_batch(torch.zeros(8), torch.ones(8), torch.tensor([1.0, 2.0, 0.0, 5.0]))
    logps = torch.cat([h - 1, h * 0 - 1]).requires_grad_()
    _, sums = dpo.preference_loss(logps, batch, loss=dpo.dpo, beta=0.5)
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in sums.values())
    average = averages(sums)
    shares = {"rewards/ties": 1 / 8, "rewards/accuracies": 2 / 8, "both_fell": 6 / 8}
    shares |= {"rewards/margins": 0.5 * (2 - 45) / 8, "rewards/rejected": -0.5}
    shares |= {"logps/chosen": (-1 + 0 - 50) / 8}
    assert sums["count"] == 8 and shares == {name: average[name] for name in shares}


def test_mean_logratio_of_a_step():
    """What KTO and BCO know of the step before: a mean by weight, from the sums that are logged."""
    weights = torch.tensor([1.0, 0.0, 3.0])  # a pair of weight 0 does not count, one of 3 thrice
    logps, reference = torch.tensor([1.0, 50, 2, 3, 50, 0]) - 60, torch.full((6,), -60.0)
    batch = make_batch(reference, torch.ones(6), weights)
    _, sums = dpo.preference_loss(logps, batch, loss=dpo.dpo, beta=0.3)
    assert dpo.mean_logratio(sums, 0.3).item() == pytest.approx((2 + 3 * 1) / 4)
    average = {f"train/{name}": value for name, value in averages(sums).items()}
    assert dpo.averages(sums, "train") == average
    nothing = {name: value * 0 for name, value in sums.items()}  # every pair has weight 0
    assert dpo.mean_logratio(nothing, 0.3) == 0 and not any(dpo.averages(nothing, "").values())


def test_gradient_of_section_4():
    """∇L = −β·σ(−βh)·(∇log π(y_w) − ∇log π(y_l)), for the parameters of the real model."""
    model, dataset, beta = make_model(SHAPES["grouped"]), random_dataset([[4, 5, 3]]), 0.4
    reference = np.array([-20.0, -15.0])
    batch = data.collate(dataclasses.replace(dataset, reference=reference), np.array([0]))
    logps = dpo.sequence_logps(model, batch)
    parameters = list(model.parameters())
    loss, _ = dpo.preference_loss(logps, batch, loss=dpo.dpo, beta=beta)
    whole = torch.autograd.grad(loss, parameters, retain_graph=True)
    chosen = torch.autograd.grad(logps[0], parameters, retain_graph=True)
    rejected = torch.autograd.grad(logps[1], parameters)
    h = (logps[0] - reference[0]) - (logps[1] - reference[1])
    factor = -beta * torch.sigmoid(-beta * h).item()
    for a, w, l in zip(whole, chosen, rejected):  # noqa: E741
        torch.testing.assert_close(a, factor * (w - l), rtol=1e-8, atol=1e-8)


SIZES = [
    *([3, 40, 2], [1, 1, 1], [20, 3, 3], [2, 2, 30]),
    *([5, 1, 9, 4], [1, 2, 2], [9, 9, 9], [2, 5, 1]),  # the first is a ranking
]


@pytest.mark.parametrize("name", [*LOSSES, "the SFT stage"])
def test_gradient_does_not_depend_on_micro_batches(name):
    """1×8 = 2×4 = 8×1 = 3+0+3+2, in float64, with very unequal lengths, a ranking, weights, soft
    labels, margins, and the batch of a rank without work: each loss from real batches."""
    model, dataset = make_model(SHAPES["tied"]), random_dataset(SIZES)
    dataset.facts[:] = np.stack([np.arange(8) / 4, np.full(8, 0.9), np.arange(8) / 3], axis=1)
    with torch.no_grad():
        start = dpo.sequence_logps(model, data.collate(dataset, np.arange(8)))
    reference = (start + torch.randn(17, dtype=torch.float64)).numpy()
    dataset = dataclasses.replace(dataset, reference=reference)
    given = {"loss": LOSSES.get(name), "sft_weight": 0.3}

    def gradient(split):
        totals = Counter()
        model.zero_grad()
        for examples in split:
            batch = data.collate(dataset, np.array(examples, dtype=int))
            logps = dpo.sequence_logps(model, batch)
            if name in LOSSES:
                total, sums = dpo.preference_loss(logps, batch, 0.3, **given, **options_of(name))
            else:
                total, sums = dpo.sft_loss(logps, batch)
            total.backward()
            totals.update({k: float(v) for k, v in sums.items()})
        return [p.grad.clone() for p in model.parameters()], totals

    whole, sums = gradient([range(8)])
    assert sums["loss"] != 0 and any(g.abs().max() > 1e-6 for g in whole)
    count = dataset.facts[:, 0].sum() if name in LOSSES else sum(sum(tree[1:]) for tree in SIZES)
    assert sums["count"] == pytest.approx(count, rel=1e-6)
    for split in (
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[i] for i in range(8)],
        [[7, 0, 3], [], [1, 2, 5], [4, 6]],
    ):
        grads, same = gradient(split)
        assert same == pytest.approx(sums, rel=1e-9, abs=1e-12)
        for a, b in zip(whole, grads):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_rank_without_work_adds_nothing():
    """Its stand-in runs an example, so that it takes part, with no loss, metric or gradient."""
    model, dataset = make_model(SHAPES["tied"]), random_dataset(SIZES)
    dataset = dataclasses.replace(dataset, reference=np.full(17, -50.0))
    for name in LOSSES:
        dataset.facts[0] = 3.0, 0.9, 1.0 if name == "odpo" else math.nan
        batch = data.collate(dataset, np.array([], dtype=int))
        model.zero_grad()
        logps = dpo.sequence_logps(model, batch)
        given = {"loss": LOSSES[name], "sft_weight": 0.3}
        total, sums = dpo.preference_loss(logps, batch, 0.3, **given, **options_of(name))
        total.backward()
        assert total == 0 and not any(sums.values()), name
        assert all((p.grad == 0).all() for p in model.parameters()), name


def test_sft_by_hand():
    """The sum over all learnt tokens of the demonstrations, and how many these are."""
    dataset = data.to_dataset([[[5, 6], [7, 8, 9]], [[5], [~7, 8, ~9, 10]]])
    batch = data.collate(dataset, np.array([0, 1]))
    total, sums = dpo.sft_loss(torch.tensor([-1.0, -4.0]), batch)
    assert total.item() == 5.0 and averages(sums) == {"loss": 5 / (3 + 2)}


def test_pairs_of_a_ranking_share_its_weight():
    """Three ranked responses are three pairs; the loss is that of one example, not of three."""
    dataset = random_dataset([[2, 3, 2, 2], [1, 4]])
    dataset.facts[0, 0] = 3.0
    batch = data.collate(dataset, np.array([0]))
    logps = torch.tensor([-1.0, -2.0, -4.0])
    total, sums = dpo.preference_loss(logps, batch, loss=dpo.dpo, beta=1.0)
    gaps = torch.tensor([1.0, 3.0, 2.0])
    assert total.item() == pytest.approx(3 * -logsigmoid(gaps).mean().item())
    assert sums["count"].item() == pytest.approx(3)
    assert averages(sums)["rewards/margins"] == pytest.approx(2.0)


def test_sft_term_by_hand():
    """α·NLL of each pair's chosen response, a mean over its tokens, by the pair's weight and
    whatever its soft label."""
    dataset = random_dataset([[2, 3, 2, 2], [1, 4, 5]])
    dataset.facts[:, 0] = 3.0, 0.5
    dataset.facts[:, 1] = 1.0, 0.8
    dataset.facts[:, 2] = 0.0
    batch, logps = data.collate(dataset, np.arange(2)), -torch.arange(1.0, 6.0).double()
    # The first example's pairs are (0, 1), (0, 2), (1, 2), of weight 1 each; 4 has 4 tokens.
    term = 1 / 3 + 1 / 3 + 2 / 2 + 0.5 * 4 / 4
    for name in LOSSES:
        plain, with_term = (
            dpo.preference_loss(
                logps, batch, loss=LOSSES[name], sft_weight=alpha, **options_of(name)
            )
            for alpha in (0, 0.7)
        )
        for one, other in ((with_term[0], plain[0]), (with_term[1]["loss"], plain[1]["loss"])):
            assert (one - other).item() == pytest.approx(0.7 * term, rel=1e-5)


def test_logps_are_summed_in_float64():
    """A response of 4,000 tokens in float32: its log-prob is as exact as float32 can say it."""
    config = dataclasses.replace(SHAPES["grouped"], max_position_embeddings=5000)
    model, dataset = make_model(config).float(), random_dataset([[3, 4000, 2]])
    batch = data.collate(dataset, np.array([0]))
    with torch.no_grad():
        tokens = model(batch.tokens, batch.positions, batch.segments, batch.targets)
        logps = dpo.sequence_logps(model, batch)
    assert tokens.dtype == logps.dtype == torch.float32
    exact = torch.stack([part.double().sum() for part in tokens.split([4000, 2])])
    assert ((logps.double() - exact) / exact).abs().max() < 1e-7


def test_only_what_is_learnt_counts():
    """A user's turn within a response is read, and neither its log-probs nor its length count."""
    model = make_model(SHAPES["tied"])
    trees = [[[5, 6], [7, ~8, ~9, 10], [11, 12]]]
    batch = data.collate(data.to_dataset(trees), np.array([0]))
    with torch.no_grad():
        tokens = model(batch.tokens, batch.positions, batch.segments, batch.targets)
        logps = dpo.sequence_logps(model, batch)
    by_hand = torch.stack([tokens[0] + tokens[3], tokens[4] + tokens[5]])
    torch.testing.assert_close(logps, by_hand, rtol=1e-12, atol=0)
    assert batch.lengths.tolist() == [2, 2]


def test_reference_values_belong_to_their_responses():
    """Any packing and order, with a stand-in among the batches, gives every response its own; one
    that is in no batch has 0. Training finds them at the responses they are of."""
    sizes = [[3, 4, 2], [2, 2, 9, 1], [1, 3], [2, 6, 2]]
    model, dataset = make_model(SHAPES["tied"]).float(), random_dataset(sizes)
    with torch.no_grad():
        alone = [dpo.sequence_logps(model, data.collate(dataset, np.array([i]))) for i in range(3)]
    orders = [np.array([2, 0]), np.array([], dtype=int), np.array([1])]
    values = dpo.reference_logps(model, (data.collate(dataset, o) for o in orders), 8)
    assert values.shape == (8,) and values.dtype == torch.float64 and not values.requires_grad
    torch.testing.assert_close(values[:6].float(), torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert values[6:].tolist() == [0, 0]
    dataset = dataclasses.replace(dataset, reference=values.numpy())
    batch = data.collate(dataset, np.array([2, 0]))
    expected = torch.cat([alone[2], alone[0]])
    torch.testing.assert_close(batch.reference, expected, rtol=1e-5, atol=1e-5)
