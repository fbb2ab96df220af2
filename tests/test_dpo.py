"""The objectives: values, slopes, identities, parity; the reference as data; the KL estimate."""

import doctest
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHAPES, make_model, random_dataset
from torch.nn.functional import logsigmoid

import data
import dpo
from model import ModelConfig

FIXTURE = json.loads((Path(__file__).parent / "losses.json").read_text())
LN2 = math.log(2)


def make_batch(lengths, label: float = 1.0, margins=None):
    """P pairs as `pair_vectors` wants them: their chosen responses, then their rejected ones.
    lengths: (2P,)."""
    pairs = len(lengths) // 2
    index, one = torch.arange(2 * pairs), torch.ones(pairs, dtype=torch.float64)
    margins = one * math.nan if margins is None else margins
    common = {"lengths": lengths, "margins": margins, "labels": label * one, "weights": one}
    common |= {"sizes": (2,) * pairs, "example_weights": one, "soft": label < 1}
    return SimpleNamespace(
        chosen=index[:pairs], rejected=index[pairs:], best=index[:pairs], **common
    )


def losses_and_slopes(name, a, b, lengths=(7, 4), label=1.0, margin=0.0, reference=None, **options):
    """(P,) losses of pairs with log-ratios a and b, and their slopes in a and in b, in float64.

    The log-probs of the reference are −20 and −11 where none are given.
    """
    a, b = (torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in (a, b))
    reference = torch.tensor([-20.0, -11.0]) if reference is None else reference
    reference = reference.double().repeat_interleave(len(a))
    logps = (reference + torch.cat([a, b])).requires_grad_()
    batch = make_batch(torch.tensor(lengths).repeat_interleave(len(a)), label, margin + 0 * a)
    v = dpo.pair_vectors(logps.detach(), reference, batch)
    statistics = {n: dpo.call(function, v) for n, function in dpo.STATISTICS.items()}
    losses = dpo.pair_losses(name, logps, reference, batch, statistics, options)
    slopes = torch.autograd.grad(losses.sum(), logps, allow_unused=True)[0].chunk(2)
    return losses.detach(), *slopes


PAIRWISE = [name for name in dpo.LOSSES if name not in ("sft", "plackett_luce")]


def options_of(name: str) -> dict:
    """A setting for each that the loss takes, not at its default."""
    given = {"beta": 0.3, "label_smoothing": 0.2, "alpha": 0.7, "gamma": 1.3}
    return {k: value for k, value in given.items() if k in dpo.needs(name)}


def test_docstring_example():
    assert doctest.testmod(dpo).attempted > 0 == doctest.testmod(dpo).failed


# Parity. TRL's names for what is here; what its conventions leave out or scale is said beside it.
TRL = {
    "sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo_norm", "exo_pair": "exo", "nca_pair": "nca",
    "robust": "robust", "bco_pair": "bco", "sppo_hard": "sppo", "aot": "aot", "apo_zero": "apo_zero",
    "apo_down": "apo_down", "discopop": "discopop", "sigmoid_norm": "dpo_norm", "simpo": "simpo",
    "forward_kl": "fdpo_forward_kl", "js_divergence": "fdpo_js", "alpha_divergence": "fdpo_alpha",
    "apo_zero_unpaired": "apo_zero", "kto": "kto", "orpo": "orpo", "dpo": "dpo", "sft": "sft",
}  # fmt: skip


def ours(case: dict, logps, reference, lengths):
    """The losses of the fixture's pairs, (64,), as the case's implementation means them."""
    source, theirs = case["source"], case.get("f_divergence_type", case["loss"])
    name, beta, label, factor = TRL[theirs], case["beta"], 1.0, 1.0
    options = {"beta": beta, "alpha": case.get("f_alpha_divergence_coef", 1.0)}
    options["gamma"] = case.get("gamma")
    extra = torch.zeros(64, dtype=torch.float64)
    if source == "reference" and theirs == "ipo":
        name = "ipo"  # the sum over tokens, which is the paper's
    if case.get("reference_free"):
        reference = torch.zeros_like(reference)
    smoothing = case.get("label_smoothing", 0.0)
    if source == "trl.CPOTrainer" and theirs in ("sigmoid", "hinge"):
        name = {"sigmoid": "cpo", "hinge": "slic"}[theirs]
    if "label_smoothing" in dpo.needs(name):
        options["label_smoothing"] = smoothing
    else:  # TRL mixes in the loss of the flipped label: a soft label
        label = 1 - smoothing
    if name == "cpo":  # TRL adds the chosen's NLL afterwards; here it is in the loss
        extra = label * logps[:64] / lengths[:64] + (1 - label) * logps[64:] / lengths[64:]
    if name == "slic":  # max(0, 1 − β·margin) is β·max(0, 1/β − margin); NLL as in cpo
        factor, options = beta, {"alpha": 0.0, "gamma": 1 / beta}
    if theirs == "simpo":  # TRL's flipped loss has γ turned around as well: −LS(−(β·margin − γ))
        target = beta * (logps[:64] / lengths[:64] - logps[64:] / lengths[64:]) - case["gamma"]
        label, extra = 1.0, smoothing * target
    if theirs == "orpo":  # TRL subtracts this from the NLL: only −β·LS(log odds ratio) is ours
        factor, extra = -1.0, logps[:64] / lengths[:64]
    statistics = {"mean_logratio": torch.zeros(64)}  # TRL's bco_pair has no δ
    if source == "trl.KTOTrainer":  # a mean over 2·64 responses
        factor, statistics = 0.5, {"mean_logratio": torch.tensor(case["kl_before_clamp"])}
    batch = make_batch(lengths, label)
    v = dpo.pair_vectors(logps.detach(), reference, batch)
    statistics["matched_margin"] = dpo.call(dpo.matched_margin, v)
    if name == "sft":  # a mean over all response tokens of the chosen
        return dpo.sft(logps[:64]) * 64 / lengths[:64].sum()
    return factor * (dpo.pair_losses(name, logps, reference, batch, statistics, options) + extra)


@pytest.mark.parametrize(
    "case", FIXTURE["cases"], ids=lambda c: "-".join(str(v) for v in c.values() if not isinstance(v, (list, dict)))
)  # fmt: skip
def test_parity_with_other_implementations(case):
    """Values and gradients to 1e-6 of TRL and of the original repository, on 64 pairs."""
    given = {k: torch.tensor(v, dtype=torch.float64) for k, v in FIXTURE["inputs"].items()}
    logps = torch.cat([given["chosen"], given["rejected"]]).requires_grad_()
    reference = torch.cat([given["ref_chosen"], given["ref_rejected"]])
    lengths = torch.cat([given["chosen_length"], given["rejected_length"]]).long()
    losses = ours(case, logps, reference, lengths)
    rtol = 1e-5 if case.get("precision") == "float32" else 1e-6
    assert losses.mean().item() == pytest.approx(case["mean"], rel=rtol)
    if "per_pair" in case:
        expected = torch.tensor(case["per_pair"], dtype=torch.float64)
        torch.testing.assert_close(losses, expected, rtol=rtol, atol=rtol)
    chosen, rejected = torch.autograd.grad(losses.mean(), logps)[0].chunk(2)
    for got, side in ((chosen, "chosen"), (rejected, "rejected")):
        expected = torch.tensor(case[f"grad_{side}"], dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol / 64)


def test_every_loss_of_others_is_compared():
    compared = {TRL[case.get("f_divergence_type", case["loss"])] for case in FIXTURE["cases"]}
    assert {*TRL.values()} == compared


def test_metrics_parity_with_trl():
    case = next(c for c in FIXTURE["cases"] if "metrics" in c)
    given = {k: torch.tensor(v, dtype=torch.float64) for k, v in FIXTURE["inputs"].items()}
    logps = torch.cat([given["chosen"], given["rejected"]])
    reference = torch.cat([given["ref_chosen"], given["ref_rejected"]])
    lengths = torch.cat([given["chosen_length"], given["rejected_length"]]).long()
    batch = make_batch(lengths)
    _, sums = dpo.compute_loss("dpo", logps, batch, reference, beta=case["beta"])
    average = dpo.average_metrics({k: float(v) for k, v in sums.items()})
    for name, value in case["metrics"].items():
        assert average[name] == pytest.approx(value, abs=1e-6)
    # Those that TRL does not have, from their definitions.
    a, b = (logps - reference).chunk(2)
    margins, longer = case["beta"] * (a - b), (lengths[:64] - lengths[64:]).double()
    expected = {
        "loss": case["mean"],
        "rewards/ties": (margins == 0).double().mean(),
        "logps/chosen": given["chosen"].mean(),
        "logps/rejected": given["rejected"].mean(),
        "logps_per_token/chosen": (given["chosen"] / lengths[:64]).mean(),
        "logps_per_token/rejected": (given["rejected"] / lengths[64:]).mean(),
        "gradient_weight": (1 / (1 + margins.exp())).mean(),
        "saturated": (margins > math.log(99)).double().mean(),
        "both_fell": (torch.maximum(a, b) < 0).double().mean(),
        "length_correlation": np.corrcoef(margins.numpy(), longer.numpy())[0, 1],
    }
    assert average.keys() == case["metrics"].keys() | expected.keys()
    for name, value in expected.items():
        assert average[name] == pytest.approx(float(value), abs=1e-6), name
    assert 0 < expected["both_fell"] < 1


def test_saturation_and_ties_are_counted():
    """σ(−βh) < 0.01 from βh = ln 99 on; a margin of exactly zero is a tie and no success."""
    h = torch.tensor([0.0, math.log(99) - 0.01, math.log(99) + 0.01, -9.0])
    batch = make_batch(torch.ones(8, dtype=torch.long))
    _, sums = dpo.compute_loss("dpo", torch.cat([h, h * 0]), batch, torch.zeros(8), beta=1.0)
    average = dpo.average_metrics({k: float(v) for k, v in sums.items()})
    shares = {"saturated": 0.25, "rewards/ties": 0.25, "rewards/accuracies": 0.5, "both_fell": 0}
    assert shares == {name: average[name] for name in shares}


# LOSSES.md: value and slopes dL/da, dL/db where policy = reference, β = 0.3, and the rest as in
# `options_of`: ε = 0.2, α = 0.7, γ = 1.3; chosen 7 tokens, −20 nats, rejected 4 tokens, −11 nats.
B, E, A, G = 0.3, 0.2, 0.7, 1.3
sigma = lambda x: 1 / (1 + math.exp(-x))
OFFSET, TARGET = A * 3, B * (-20 / 7 + 11 / 4) - G  # of rdpo; of simpo
P_WON, P_LOST = math.exp(-20 / 7), math.exp(-11 / 4)
ODDS = math.log(P_WON / (1 - P_WON)) - math.log(P_LOST / (1 - P_LOST))
PENALTY = lambda odds, p, length: B * (1 - sigma(odds)) / (1 - p) / length
AT_START = {
    "dpo": (LN2, -(1 - 2 * E) * B / 2),
    "robust": (LN2, -B / (2 * (1 - 2 * E))),
    "ipo": (1 / (4 * B**2), -1 / B),
    "hinge": (1, -B),
    "rdpo": (math.log1p(math.exp(-OFFSET)), -B * sigma(-OFFSET)),
    "odpo": (math.log1p(math.exp(0.9)), -B * sigma(0.9)),  # margin 0.9
    "exo": (-LN2 - math.log(E * (1 - E)) / 2, -B * math.log((1 - E) / E) / 4),
    "discopop": ((LN2 + 1) / 2, 0.784 * B),
    "aot": (LN2, -B / 2),
    "ipo_norm": (1 / (4 * B**2), -1 / (B * 7), 1 / (B * 4)),
    "dpo_norm": (LN2, -B / (2 * 7), B / (2 * 4)),
    "dpop": (LN2, -B / 2),
    "nca": (2 * LN2, -B / 4),
    "bco": (2 * LN2, -B / 2),
    "kto": ((1 + A) / 2, -B / 4, A * B / 4),
    "apo_zero": (1, -B / 4),
    "apo_down": (1, 0, B / 4),
    "sppo": (1 / (2 * B**2), -1 / B),
    "cal_dpo": (LN2 + 1 / (4 * B**2), -1 / 2 - 1 / (2 * B)),
    "chipo": (LN2, -B),
    "fdpo_alpha": (LN2, -B / 2),
    "fdpo_forward_kl": (LN2, -B / 2),
    "fdpo_js": (LN2, -B / 4),
    "simpo": (math.log1p(math.exp(-TARGET)), -B * sigma(-TARGET) / 7, B * sigma(-TARGET) / 4),
    "cpo": (math.log1p(math.exp(9 * B)) + 20 / 7, -B * sigma(9 * B) - 1 / 7, B * sigma(9 * B)),
    "orpo": (20 / 7 + B * math.log1p(math.exp(-ODDS)), -1 / 7 - PENALTY(ODDS, P_WON, 7),
             PENALTY(ODDS, P_LOST, 4)),
    "slic": (G + 9 + A * 20, -1 - A, 1),
    "unlikelihood": (20 - A * 11, -1, A),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRWISE)
def test_value_and_slope_at_initialisation(name):
    value, slope, *other = AT_START[name]
    losses, da, db = losses_and_slopes(name, 0.0, 0.0, margin=0.9, **options_of(name))
    assert losses.item() == pytest.approx(value, rel=1e-9)
    tolerance = 1e-3 if name == "discopop" else 1e-9  # LOSSES.md gives three digits
    assert da.item() == pytest.approx(slope, rel=tolerance, abs=1e-12)
    assert db.item() == pytest.approx(*other or [-slope], rel=tolerance, abs=1e-12)
    # The slopes are what the loss does, by finite differences a little away from the kinks.
    at = lambda a, b: losses_and_slopes(name, a, b, margin=0.9, **options_of(name))
    (_, da, db), step = at(0.3, -0.2), 1e-5
    if name not in ("bco", "kto"):  # their statistic moves with a and b, and has no gradient
        for got, x, y in ((da, step, 0), (db, 0, step)):
            rise = at(0.3 + x, -0.2 + y)[0] - at(0.3 - x, -0.2 - y)[0]
            if name != "aot":  # one pair alone is matched with itself; so is its difference
                assert got.item() == pytest.approx(rise.item() / (2 * step), rel=1e-5, abs=1e-7)


LOGIT = math.log((1 - E) / E)
STATIONARY = {  # where the slopes vanish: a and b
    "dpo": (LOGIT / B, 0), "ipo": (1 / (2 * B), 0), "hinge": (1 / B + 0.01, 0), "exo": (LOGIT / B, 0),
    "sppo": (1 / (2 * B), -1 / (2 * B)), "ipo_norm": (7 / (2 * B), 0),
    "apo_zero": (1000, -1000), "chipo": (3, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", list(STATIONARY))
def test_stationary_point(name):
    _, da, db = losses_and_slopes(name, *STATIONARY[name], **options_of(name))
    assert da.item() == pytest.approx(0, abs=1e-12) == db.item()
    near = losses_and_slopes(name, 0.5 * STATIONARY[name][0], 0.0, **options_of(name))
    assert abs(near[1].item()) > 1e-3 or name == "apo_zero", "and not everywhere"


def test_stationary_points_beside_one():
    """DiscoPOP's local minimum at βh = −0.119 and bump at 0.072; those of soft labels."""
    slope = lambda z: losses_and_slopes("discopop", z / B, 0.0, beta=B)[1].item()
    assert slope(-0.13) < 0 < slope(-0.11) and slope(0.068) > 0 > slope(0.076)
    for p in (0.1, 0.5, 0.8):  # a soft label p: DPO's h is logit(p)/β, IPO's (2p − 1)/(2β)
        h = {"dpo": math.log(p / (1 - p)) / B, "ipo": (2 * p - 1) / (2 * B)}
        for name, at in h.items():
            _, da, _ = losses_and_slopes(name, at, 0.0, label=p, beta=B)
            assert da.item() == pytest.approx(0, abs=1e-12)


def test_identities():
    """Exact, on random tensors in float64."""
    a, b = torch.randn(2, 50, dtype=torch.float64) * 3
    run = lambda name, a, b, **options: losses_and_slopes(name, a, b, **{"beta": B} | options)
    close = lambda x, y: torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    loss, da, db = run("dpo", a, b)
    flipped, flipped_da, _ = run("dpo", b, a)  # the same pair with its labels swapped
    close(flipped - loss, B * (a - b))
    close(da, -B * torch.sigmoid(-B * (a - b)))  # Sec. 4
    close(db, -da)
    assert (da * flipped_da > 0).all() and (da < 0).all(), "each pushes its own chosen up"
    close(run("dpo", a, b, label_smoothing=E)[0], (1 - E) * loss + E * flipped)
    kept, lost = (run("robust", *x, label_smoothing=E)[0] for x in ((a, b), (b, a)))
    close((1 - E) * kept + E * lost, loss)
    nearly_reverse = run("fdpo_alpha", a, b, alpha=1e-7)[0]
    torch.testing.assert_close(nearly_reverse, loss, rtol=1e-5, atol=1e-5)
    close(run("fdpo_alpha", a, b, alpha=1.0)[0], run("fdpo_forward_kl", a, b)[0])
    js = torch.log(a.exp() / (1 + a.exp())) - torch.log(b.exp() / (1 + b.exp()))
    close(run("fdpo_js", a, b)[0], -logsigmoid(B * js))
    close(run("rdpo", a, b, alpha=0.0)[0], loss)
    close(run("odpo", a, b, margin=0.0)[0], loss)
    close(run("dpop", a, b, alpha=0.0)[0], loss)
    close(run("dpop", a.abs(), b, alpha=9.0)[0], run("dpo", a.abs(), b)[0])
    close(run("dpo_norm", a, b, lengths=(1, 1))[0], loss)
    close(run("ipo_norm", a, b, lengths=(1, 1))[0], run("ipo", a, b)[0])
    close(run("cal_dpo", a, b)[0], run("dpo", a, b, beta=1.0)[0] + run("sppo", a, b)[0] / 2)
    nothing = torch.zeros(2)
    close(run("cpo", a, b, reference=nothing)[0] + a / 7, loss)
    close(run("simpo", a, b, reference=nothing, lengths=(1, 1), gamma=0.0)[0], loss)
    exact = torch.log1p(-torch.exp(-a.abs()))
    odds = -a.abs() - exact + b.abs() + torch.log1p(-torch.exp(-b.abs()))
    orpo = run("orpo", -a.abs(), -b.abs(), lengths=(1, 1), reference=nothing)[0]
    close(orpo, a.abs() - B * logsigmoid(odds))
    # A soft label is the expectation of the loss over the label, for every loss.
    for name in PAIRWISE:
        options = options_of(name) | {"margin": 0.4}
        w = losses_and_slopes(name, a, b, lengths=(7, 4), **options)[0]
        mixed = losses_and_slopes(name, a, b, lengths=(7, 4), label=0.8, **options)[0]
        if name != "aot":  # whose pairs meet others when all labels are swapped
            options["margin"] = -0.4
            turned = torch.tensor([-11.0, -20.0])
            l = losses_and_slopes(name, b, a, lengths=(4, 7), reference=turned, **options)[0]  # noqa: E741
            close(mixed, 0.8 * w + 0.2 * l)


def test_batch_statistics_by_hand():
    """AOT against its definition, sorted vectors; BCO and KTO against the mean of all log-ratios,
    through which no gradient flows."""
    a, b = torch.randn(2, 9, dtype=torch.float64)
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 9, dtype=torch.float64)
    matched = dpo.matched_margin(chosen, rejected, ref_chosen, ref_rejected)
    delta = (chosen - rejected).sort().values - (ref_chosen - ref_rejected).sort().values
    expected = -logsigmoid(B * delta).sum()
    torch.testing.assert_close(dpo.aot(chosen, rejected, matched, B).sum(), expected)
    flip = -logsigmoid(-B * delta).sum()
    again = dpo.aot(rejected, chosen, -matched, B).sum()
    torch.testing.assert_close(again, flip)
    w = torch.tensor([1.0, 0.0, 3.0])  # a pair of weight 0 does not count, one of 3 thrice
    by_weight = dpo.mean_logratio(torch.tensor([1.0, 50, 2]), torch.tensor([3.0, 50, 0]), w)
    assert by_weight.tolist() == pytest.approx([(2 + 3 * 1) / 4] * 3)
    mean = torch.cat([a, b]).mean().item()
    loss, da, _ = losses_and_slopes("bco", a, b, beta=B)
    torch.testing.assert_close(loss, -logsigmoid(B * (a - mean)) - logsigmoid(-B * (b - mean)))
    torch.testing.assert_close(da, -B * torch.sigmoid(-B * (a - mean)))
    for shift in (2.0, -2.0):  # z0 is 0 where the mean is below
        z0 = B * max(0.0, mean + shift)
        loss, _, db = losses_and_slopes("kto", a + shift, b + shift, beta=B, alpha=A)
        won, lost = torch.sigmoid(B * (a + shift) - z0), torch.sigmoid(z0 - B * (b + shift))
        torch.testing.assert_close(loss, 1 - won + A * (1 - lost))
        torch.testing.assert_close(db, A * B * lost * (1 - lost))


def test_plackett_luce():
    """log K! at initialisation; DPO for two; for three the product of the two choices."""
    ratios = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64, requires_grad=True)
    assert dpo.plackett_luce(ratios * 0, B).item() == pytest.approx(math.log(6))
    two, three = dpo.plackett_luce(ratios[:2], B), dpo.plackett_luce(ratios, B)
    assert two.item() == pytest.approx(losses_and_slopes("dpo", 0.7, -0.4, beta=B)[0].item())
    e = (B * ratios.detach()).exp()
    assert three.item() == pytest.approx(-math.log(e[0] / e.sum() * e[1] / (e[1] + e[2])))
    slope = torch.autograd.grad(three, ratios)[0]
    assert slope[0].item() == pytest.approx(-B * (1 - e[0] / e.sum()))
    # The whole of compute_loss: rankings of any length in one batch, each with its weight.
    dataset = random_dataset([[2, 3, 2, 2], [1, 4, 1]])
    dataset.facts[:, 0] = 3.0, 0.5
    batch = data.collate(dataset, np.arange(2))
    logps, zero = torch.cat([ratios.detach(), ratios[:2].detach()]), torch.zeros(5).double()
    total, sums = dpo.compute_loss("plackett_luce", logps, batch, zero, beta=B)
    assert total.item() == pytest.approx(3 * three.item() + 0.5 * two.item())
    assert sums["count"].item() == 3.5
    idle = data.collate(dataset, np.array([], dtype=int))
    logps = torch.zeros(3, requires_grad=True)
    total, sums = dpo.compute_loss("plackett_luce", logps, idle, torch.zeros(3), beta=B)
    total.backward()
    assert total.item() == 0 == sums["count"] and logps.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", PAIRWISE)
def test_extreme_log_ratios_stay_finite(name):
    """a, b = ±1e4 in float32, where e^a overflows and σ is 0 or 1: no inf, no nan."""
    rows = [[1e4, -1e4], [-1e4, 1e4], [1e4, 1e4], [-1e4, -1e4], [0.0, 0.0]]
    a, b = torch.tensor(rows).T
    reference = torch.tensor([-2e4, -2e4]).repeat_interleave(5)
    logps = (reference + torch.cat([a, b])).requires_grad_()
    batch = make_batch(torch.tensor([7, 4]).repeat_interleave(5), label=0.9, margins=a * 0)
    statistics = {"mean_logratio": a * 0, "matched_margin": a * 0}
    losses = dpo.pair_losses(name, logps, reference, batch, statistics, options_of(name))
    slopes = torch.autograd.grad(losses.sum(), logps)[0]
    assert torch.isfinite(losses).all() and torch.isfinite(slopes).all()


def test_certain_responses_and_long_rankings_stay_finite():
    """ORPO where a response's probability rounds to 1; Plackett-Luce at ratios of ±1e4."""
    sure = torch.zeros(2, requires_grad=True)
    loss = dpo.orpo(sure[:1], sure[1:], torch.ones(1), torch.ones(1), beta=0.3)
    ratios = torch.tensor([1e4, -1e4, 0.0, 1e4], requires_grad=True)
    for value, given in ((loss.sum(), sure), (dpo.plackett_luce(ratios, B), ratios)):
        assert torch.isfinite(value) and torch.isfinite(torch.autograd.grad(value, given)[0]).all()


def test_small_orders_of_the_divergence_are_dpo_in_float32_too():
    a, b = torch.randn(2, 9)
    for alpha in (1e-8, 1e-6, 1e-4):
        loss = dpo.fdpo_alpha(a, b, B, alpha)
        torch.testing.assert_close(loss, -logsigmoid(B * (a - b)), rtol=1e-3, atol=1e-4)


def test_dpo_keeps_its_slope_at_extreme_margins():
    for h, slope in ((1e4, 0.0), (-1e4, -1.0)):
        _, da, _ = losses_and_slopes("dpo", h, 0.0, beta=1.0)
        assert da.item() == slope


def test_sft_term_by_hand():
    """α·NLL of each example's best response, per token of it, by the example's weight."""
    dataset = random_dataset([[2, 3, 2, 2], [1, 4, 5]])
    dataset.facts[:, 0] = 3.0, 0.5
    batch = data.collate(dataset, np.arange(2))
    logps, zero = -torch.arange(1.0, 6.0), torch.zeros(5)
    for loss in ("dpo", "simpo", "plackett_luce"):
        plain, with_term = (
            dpo.compute_loss(loss, logps, batch, zero, B, sft_weight=w)[0].item() for w in (0, 0.7)
        )
        assert with_term - plain == pytest.approx(0.7 * (3 * 1 / 3 + 0.5 * 4 / 4), rel=1e-5)


def test_gradient_of_section_4():
    """∇L = −β·σ(−βh)·(∇log π(y_w) − ∇log π(y_l)), for the parameters of the real model."""
    model, dataset, beta = make_model(SHAPES["grouped"]), random_dataset([[4, 5, 3]]), 0.4
    batch = data.collate(dataset, np.array([0]))
    logps = dpo.sequence_logps(model, batch)
    reference = torch.tensor([-20.0, -15.0], dtype=torch.float64)
    parameters = list(model.parameters())
    loss, _ = dpo.compute_loss("dpo", logps, batch, reference, beta)
    whole = torch.autograd.grad(loss, parameters, retain_graph=True)
    chosen = torch.autograd.grad(logps[0], parameters, retain_graph=True)
    rejected = torch.autograd.grad(logps[1], parameters)
    h = (logps[0] - reference[0]) - (logps[1] - reference[1])
    factor = -beta * torch.sigmoid(-beta * h).item()
    for a, w, l in zip(whole, chosen, rejected):  # noqa: E741
        torch.testing.assert_close(a, factor * (w - l), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_gradient_does_not_depend_on_micro_batches(loss):
    """1×8 = 2×4 = 8×1 = 3+3+2, in float64, with very unequal lengths, a ranking, weights, margins
    and (where they are not refused) soft labels: each loss from real batches."""
    sizes = [
        [3, 40, 2],
        [1, 1, 1],
        [20, 3, 3],
        [2, 2, 30],
        [5, 1, 9, 4],
        [1, 2, 2],
        [9, 9, 9],
        [2, 5, 1],
    ]
    model, dataset = make_model(SHAPES["tied"]), random_dataset(sizes)
    dataset.facts[:, 0] = np.arange(8) / 4
    dataset.facts[:, 1] = 1.0 if loss in ("sft", "plackett_luce") else 0.9
    dataset.facts[:, 2] = np.arange(8) / 3
    whole = data.collate(dataset, np.arange(8))
    with torch.no_grad():
        start = dpo.sequence_logps(model, whole)
    reference = start + torch.randn(17, dtype=torch.float64)
    v = dpo.pair_vectors(start, reference, whole)
    known = {name: dpo.call(function, v) for name, function in dpo.STATISTICS.items()}
    pairs = {
        tuple(p): i for i, p in enumerate(torch.stack([whole.chosen, whole.rejected], 1).tolist())
    }

    def gradient(split):
        totals = {}
        model.zero_grad()
        for examples in split:
            batch = data.collate(dataset, np.array(examples, dtype=int))
            logps = dpo.sequence_logps(model, batch)
            ids = batch.response_ids.tolist()
            here = [pairs[ids[w], ids[r]] for w, r in zip(batch.chosen, batch.rejected)]
            total, sums = dpo.compute_loss(
                loss, logps, batch, reference[batch.response_ids], sft_weight=0.3,
                statistics={name: value[here] for name, value in known.items()},
                **({"beta": B} | options_of(loss)),
            )  # fmt: skip
            total.backward()
            totals = {k: totals.get(k, 0) + float(v) for k, v in sums.items()}
        return [p.grad.clone() for p in model.parameters()], dpo.average_metrics(totals)

    whole, metrics = gradient([range(8)])
    assert metrics["loss"] != 0 and any(g.abs().max() > 1e-6 for g in whole)
    for split in (
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[i] for i in range(8)],
        [[7, 0, 3], [], [1, 2, 5], [4, 6]],
    ):
        grads, same = gradient(split)
        assert same == pytest.approx(metrics, rel=1e-9, abs=1e-12)
        for a, b in zip(whole, grads):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_sft_and_ranking_by_hand():
    dataset = random_dataset([[2, 3, 2, 2], [1, 4]])
    batch = data.collate(dataset, np.array([0, 1]))
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    total, sums = dpo.compute_loss("sft", logps, batch)
    assert total.item() == 9.0 and int(sums["count"]) == 7
    assert dpo.average_metrics({k: float(v) for k, v in sums.items()}) == {"loss": 9 / 7}
    batch = data.collate(dataset, np.array([0]))
    total, sums = dpo.compute_loss("dpo", logps[:3], batch, torch.zeros(3), beta=1.0)
    gaps = torch.tensor([1.0, 3.0, 2.0])  # the three pairs of a ranking of three share its weight
    assert total.item() == pytest.approx(-torch.nn.functional.logsigmoid(gaps).mean().item())
    logged = dpo.average_metrics({name: float(value) for name, value in sums.items()})
    assert logged["loss"] == pytest.approx(total.item()), "the loss of an example, not of a third"


def test_reference_values_belong_to_their_responses():
    """Any packing and order, with a stand-in among the batches, gives every response its own."""
    model, dataset = (
        make_model(SHAPES["tied"]).float(),
        random_dataset([[3, 4, 2], [2, 2, 9, 1], [1, 3]]),
    )
    alone = torch.cat([
        dpo.sequence_logps(model, data.collate(dataset, np.array([i]))) for i in range(3)
    ]).detach()  # fmt: skip
    orders = [np.array([2, 0]), np.array([], dtype=int), np.array([1])]
    values, seen = dpo.reference_logps(model, (data.collate(dataset, o) for o in orders), 6)
    assert (seen == 1).all()
    torch.testing.assert_close(values.float(), alone, rtol=1e-5, atol=1e-5)


def test_reference_key_and_cache(tmp_path):
    """A hit for the same content; a miss after one weight, one token or the precision changed."""
    model, dataset = make_model(SHAPES["tied"]).float(), random_dataset([[3, 4, 2], [2, 2, 9]])
    key = dpo.reference_key(model, dataset, "float32")
    assert key == dpo.reference_key(model, random_dataset([[3, 4, 2], [2, 2, 9]]), "float32")
    assert key != dpo.reference_key(model, dataset, "bfloat16")
    assert key != dpo.reference_key(model, random_dataset([[4, 3, 2], [2, 2, 9]]), "float32")
    dataset.tokens[-1] += 1
    assert key != dpo.reference_key(model, dataset, "float32")
    dataset.tokens[-1] -= 1
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[3, 4] += 1e-6
    assert key != dpo.reference_key(model, dataset, "float32")
    np.save(tmp_path / f"{key}.npy", np.arange(4, dtype=np.float32))
    empty = tmp_path / "empty"
    assert dpo.find_reference(key, [empty, tmp_path], 4).tolist() == [0, 1, 2, 3]
    assert (
        dpo.find_reference(key, [tmp_path], 5) is None
        and dpo.find_reference("k", [tmp_path], 4) is None
    )


def test_sequence_kl_is_unbiased():
    """Averaged over all sampled sequences with their exact probabilities, the Rao–Blackwell
    estimate equals the enumerated KL: here over every response of two tokens or EOS."""
    torch.manual_seed(1)
    config = ModelConfig(4, 16, 32, 1, 2, 2, 8, tie_word_embeddings=True)
    policy, reference = make_model(config), make_model(config)
    space = [[2], *([a, b] for a in (0, 1, 3) for b in range(4))]
    dataset = data.to_arrays([[[1, 3], *space]])
    batch = data.collate(dataset, np.array([0]))
    with torch.no_grad():
        log_p, log_q = (dpo.sequence_logps(m, batch) for m in (policy, reference))
        estimate = dpo.sequence_kl(policy, reference, batch)
    exact = (log_p.exp() * (log_p - log_q)).sum().item()
    assert exact > 0.1 and (log_p.exp() @ estimate).item() == pytest.approx(exact, rel=1e-9)
