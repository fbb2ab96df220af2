"""The table of losses: values, slopes, identities, and parity with two other implementations."""

import inspect
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid

import dpo
from extra import objectives
from extra.objectives import LOSSES, swapped

FIXTURE = json.loads((Path(__file__).parent / "losses.json").read_text())
LN2 = math.log(2)
B, E, A, G = 0.3, 0.2, 0.7, 1.3  # β, ε, α, γ


def options_of(name: str) -> dict:
    """β, and a setting for each option that the loss takes, not at its default."""
    given = {"beta": B, "label_smoothing": E, "alpha": A, "gamma": G}
    return {
        k: value for k, value in given.items() if k in inspect.signature(LOSSES[name]).parameters
    }


def pairs_of(logps, reference, lengths, margin, mean_logratio=0.0) -> dpo.Pairs:
    """Pairs of vectors that hold what is of the chosen responses first, then of the rejected."""
    halves = [half for both in (logps, reference, lengths) for half in both.chunk(2)]
    return dpo.Pairs(*halves, margin, mean_logratio)


def losses_and_slopes(
    name, a, b, lengths=(7, 4), margin=0.0, reference=(-20.0, -11.0), label=1.0, mean=0.0, **options
):
    """(P,) losses of pairs with log-ratios a and b, and their slopes in a and in b, in float64.

    label: probability that chosen is better; mean: log-ratio of the step before.
    """
    a, b = (torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in (a, b))
    of_each = lambda two: torch.tensor(two, dtype=torch.float64).repeat_interleave(len(a))
    logps = (of_each(reference) + torch.cat([a, b])).requires_grad_()
    pairs = pairs_of(logps, of_each(reference), of_each(lengths), margin + 0 * a, mean)
    losses = LOSSES[name](pairs, **options)
    if label < 1:
        losses = label * losses + (1 - label) * LOSSES[name](swapped(pairs), **options)
    slopes = torch.autograd.grad(losses.sum(), logps)[0].chunk(2)
    return losses.detach(), *slopes


@pytest.mark.parametrize("name", LOSSES)
def test_one_signature(name):
    """loss(pairs, beta, **options with defaults) -> (P,), documented, and found by its name."""
    assert dpo.find_loss(name) is LOSSES[name] and LOSSES[name].__name__ == name
    first, second, *options = inspect.signature(LOSSES[name]).parameters.values()
    assert (first.name, second.name) == ("pairs", "beta")
    assert {option.name for option in options} <= {"label_smoothing", "alpha", "gamma"}
    assert all(isinstance(option.default, float) for option in options)
    defaults = {"dpo_norm": 5.0, "simpo": 2.0}
    assert second.default == defaults.get(name, second.empty)
    paper = r"Eq\. 7" if name == "dpo" else r"\d{4}\.\d{5}"  # dpo.py is about one paper
    assert re.search(paper, LOSSES[name].__doc__) or name == "ipo_norm"
    assert losses_and_slopes(name, [1.0, 2.0, 3.0], [0.0, 1.0, -1.0], beta=0.1)[0].shape == (3,)


def test_a_loss_of_ones_own(monkeypatch):
    """The example in the docstring: a function with the decorator is known by its name."""
    monkeypatch.setattr(objectives, "LOSSES", dict(LOSSES))
    example = re.search(r"\n    @loss\n(    .+\n)+", objectives.__doc__).group()
    exec(inspect.cleandoc(example), vars(objectives) | {"__builtins__": __builtins__})
    pairs = dpo.Pairs(*torch.tensor([[-4.0], [-6.0], [-5.0], [-5.0], [7.0], [4.0], [0.0]]))
    expected = -logsigmoid(torch.tensor([0.5 * 2.0 - 0.7]))
    torch.testing.assert_close(dpo.find_loss("mine")(pairs, beta=0.5, gamma=0.7), expected)
    assert "mine" not in LOSSES
    with pytest.raises(KeyError):
        dpo.find_loss("yours")


# Parity. TRL's names for what is here; what its conventions leave out or scale is said beside it.
TRL = {
    "sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo_norm", "exo_pair": "exo", "nca_pair": "nca",
    "robust": "robust", "bco_pair": "bco", "sppo_hard": "sppo", "apo_zero": "apo_zero",
    "apo_down": "apo_down", "discopop": "discopop", "sigmoid_norm": "dpo_norm", "simpo": "simpo",
    "forward_kl": "fdpo_forward_kl", "js_divergence": "fdpo_js", "alpha_divergence": "fdpo_alpha",
    "apo_zero_unpaired": "apo_zero", "kto": "kto", "orpo": "orpo", "dpo": "dpo", "sft": "sft",
}  # fmt: skip
CASES = [case for case in FIXTURE["cases"] if case["loss"] != "aot"]  # of a whole batch, not a pair


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
    if "label_smoothing" in options_of(name):
        options["label_smoothing"] = smoothing
    else:  # TRL mixes in the loss of the flipped label: a soft label
        label = 1 - smoothing
    if name == "cpo":  # TRL adds the chosen's NLL afterwards; here it is in the loss
        extra = label * logps[:64] / lengths[:64] + (1 - label) * logps[64:] / lengths[64:]
    if name == "slic":  # max(0, 1 − β·margin) is β·max(0, 1/β − margin); NLL as in cpo
        factor, options = beta, {"beta": beta, "alpha": 0.0, "gamma": 1 / beta}
    if theirs == "simpo":  # TRL's flipped loss has γ turned around as well: −LS(−(β·margin − γ))
        target = beta * (logps[:64] / lengths[:64] - logps[64:] / lengths[64:]) - case["gamma"]
        label, extra = 1.0, smoothing * target
    if theirs == "orpo":  # TRL subtracts this from the NLL: only −β·LS(log odds ratio) is ours
        factor, extra = -1.0, logps[:64] / lengths[:64]
    if name == "sft":  # a mean over all response tokens of the chosen
        factor = 64 / lengths[:64].sum()
    mean = 0.0  # TRL's bco_pair has no δ
    if source == "trl.KTOTrainer":  # a mean over 2·64 responses
        factor, mean = 0.5, case["kl_before_clamp"]
    options = {k: value for k, value in options.items() if k in options_of(name)}
    pairs = pairs_of(logps, reference, lengths, torch.zeros(64), mean)
    losses = LOSSES[name](pairs, **options)
    if label < 1:
        losses = label * losses + (1 - label) * LOSSES[name](swapped(pairs), **options)
    return factor * (losses + extra)


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "-".join(str(v) for v in c.values() if not isinstance(v, (list, dict)))
)  # fmt: skip
def test_parity_with_other_implementations(case):
    """Values and gradients to 1e-6 of TRL and of the original repository, on 64 pairs."""
    given = {k: torch.tensor(v, dtype=torch.float64) for k, v in FIXTURE["inputs"].items()}
    logps = torch.cat([given["chosen"], given["rejected"]]).requires_grad_()
    reference = torch.cat([given["ref_chosen"], given["ref_rejected"]])
    lengths = torch.cat([given["chosen_length"], given["rejected_length"]])
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
    compared = {TRL[case.get("f_divergence_type", case["loss"])] for case in CASES}
    assert {*TRL.values()} == compared and len(CASES) == len(FIXTURE["cases"]) - 4


# Value and slopes dL/da, dL/db where policy = reference, β = 0.3, and the rest as in `options_of`:
# ε = 0.2, α = 0.7, γ = 1.3; chosen 7 tokens, −20 nats, rejected 4 tokens, −11 nats; margin 0.9.
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
    "odpo": (math.log1p(math.exp(0.9)), -B * sigma(0.9)),
    "exo": (-LN2 - math.log(E * (1 - E)) / 2, -B * math.log((1 - E) / E) / 4),
    "discopop": ((LN2 + 1) / 2, 0.784 * B),
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
    "sft": (20, -1, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_slope_at_initialisation(name):
    value, slope, *other = AT_START[name]
    losses, da, db = losses_and_slopes(name, 0.0, 0.0, margin=0.9, **options_of(name))
    assert losses.item() == pytest.approx(value, rel=1e-9)
    tolerance = 1e-3 if name == "discopop" else 1e-9  # the slope is known to three digits
    assert da.item() == pytest.approx(slope, rel=tolerance, abs=1e-12)
    assert db.item() == pytest.approx(*other or [-slope], rel=tolerance, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_slopes_by_finite_differences(name):
    """A little away from the kinks."""
    at = lambda a, b: losses_and_slopes(name, a, b, margin=0.9, mean=0.4, **options_of(name))
    (_, da, db), step = at(0.3, -0.2), 1e-5
    for got, x, y in ((da, step, 0), (db, 0, step)):
        rise = at(0.3 + x, -0.2 + y)[0] - at(0.3 - x, -0.2 - y)[0]
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
    nothing = (0.0, 0.0)
    close(run("cpo", a, b, reference=nothing)[0] + a / 7, loss)
    close(run("simpo", a, b, reference=nothing, lengths=(1, 1), gamma=0.0)[0], loss)
    exact = torch.log1p(-torch.exp(-a.abs()))
    odds = -a.abs() - exact + b.abs() + torch.log1p(-torch.exp(-b.abs()))
    orpo = run("orpo", -a.abs(), -b.abs(), lengths=(1, 1), reference=nothing)[0]
    close(orpo, a.abs() - B * logsigmoid(odds))


@pytest.mark.parametrize("name", LOSSES)
def test_a_soft_label_is_an_expectation(name):
    """With probability p the loss as it is, else that of the pair the other way round: written out
    here, and by `preference_loss`, for pairs of several labels, weights and margins."""
    options, index = options_of(name), torch.arange(10)
    logps, reference, lengths = torch.randn(3, 10, dtype=torch.float64) * 3
    logps, reference, lengths = -8 - logps.abs(), -8 - reference.abs(), lengths.abs().ceil()
    margins, labels, weights = torch.rand(3, 5, dtype=torch.float64)
    batch = SimpleNamespace(
        chosen=index[:5], rejected=index[5:], lengths=lengths, reference=reference,
        weights=weights, labels=labels, margins=margins, soft=True,
    )  # fmt: skip
    total, sums = dpo.preference_loss(logps, batch, 0.4, loss=LOSSES[name], **options)
    as_is = LOSSES[name](pairs_of(logps, reference, lengths, margins, 0.4), **options)
    turned = (torch.cat(x.chunk(2)[::-1]) for x in (logps, reference, lengths))
    other = LOSSES[name](pairs_of(*turned, -margins, 0.4), **options)
    expected = (weights * (labels * as_is + (1 - labels) * other)).sum()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums["loss"], expected, rtol=1e-12, atol=1e-12)
    batch.soft = False  # labels are not looked at
    total, _ = dpo.preference_loss(logps, batch, 0.4, loss=LOSSES[name], **options)
    torch.testing.assert_close(total, (weights * as_is).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mean", [0.7, 0.0, -0.7])
def test_mean_logratio_by_hand(mean):
    """BCO's δ is β times the mean log-ratio of the step before, KTO's z0 that where positive."""
    a, b = torch.randn(2, 9, dtype=torch.float64)
    loss, da, db = losses_and_slopes("bco", a, b, beta=B, mean=mean)
    torch.testing.assert_close(loss, -logsigmoid(B * (a - mean)) - logsigmoid(-B * (b - mean)))
    torch.testing.assert_close(da, -B * torch.sigmoid(-B * (a - mean)))
    torch.testing.assert_close(db, B * torch.sigmoid(B * (b - mean)))
    z0 = B * max(0.0, mean)
    loss, da, db = losses_and_slopes("kto", a, b, beta=B, alpha=A, mean=mean)
    won, lost = torch.sigmoid(B * a - z0), torch.sigmoid(z0 - B * b)
    torch.testing.assert_close(loss, 1 - won + A * (1 - lost))
    torch.testing.assert_close(da, -B * won * (1 - won))
    torch.testing.assert_close(db, A * B * lost * (1 - lost))
    for name in LOSSES:  # the trainer's is a tensor; to the other losses it is nothing
        options = options_of(name)
        number = losses_and_slopes(name, a, b, mean=mean, **options)[0]
        tensor = torch.tensor(mean, dtype=torch.float64)
        assert (losses_and_slopes(name, a, b, mean=tensor, **options)[0] == number).all()
        without = losses_and_slopes(name, a, b, **options)[0]
        matters = {"bco": mean != 0, "kto": mean > 0}.get(name, False)
        assert (without != number).any() == matters


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_ratios_stay_finite(name):
    """a, b = ±1e4 in float32, where e^a overflows and σ is 0 or 1: no inf, no nan."""
    rows = [[1e4, -1e4], [-1e4, 1e4], [1e4, 1e4], [-1e4, -1e4], [0.0, 0.0]]
    a, b = torch.tensor(rows).T
    reference = torch.tensor([-2e4, -2e4]).repeat_interleave(5)
    logps = (reference + torch.cat([a, b])).requires_grad_()
    lengths = torch.tensor([7.0, 4.0]).repeat_interleave(5)
    for mean in (0.0, 1e4, -1e4):
        pairs = pairs_of(logps, reference, lengths, a * 0, mean)
        for given in (pairs, swapped(pairs)):
            losses = LOSSES[name](given, **options_of(name))
            slopes = torch.autograd.grad(losses.sum(), logps)[0]
            assert losses.dtype == torch.float32
            assert torch.isfinite(losses).all() and torch.isfinite(slopes).all()


def test_certain_responses_stay_finite():
    """ORPO where a response's probability rounds to 1."""
    sure, one = torch.zeros(2, requires_grad=True), torch.ones(2)
    losses = LOSSES["orpo"](pairs_of(sure, one * 0, one, torch.zeros(1)), beta=0.3)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(torch.autograd.grad(losses.sum(), sure)[0]).all()


def test_small_orders_of_the_divergence_are_dpo_in_float32_too():
    pairs = pairs_of(torch.randn(18), torch.zeros(18), torch.ones(18), torch.zeros(9))
    for alpha in (1e-8, 1e-6, 1e-4):
        loss = LOSSES["fdpo_alpha"](pairs, B, alpha)
        torch.testing.assert_close(loss, dpo.dpo(pairs, B), rtol=1e-3, atol=1e-4)


def test_dpo_keeps_its_slope_at_extreme_margins():
    for h, slope in ((1e4, 0.0), (-1e4, -1.0)):
        _, da, _ = losses_and_slopes("dpo", h, 0.0, beta=1.0)
        assert da.item() == slope
