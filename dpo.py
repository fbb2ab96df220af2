"""Direct Preference Optimization (Rafailov et al., 2305.18290): the objectives, and nothing else.

RLHF looks for the policy that maximises  E[r(x, y)] − β·KL(π‖π_ref).             (Eq. 3)
Its solution is known in closed form:     π*(y|x) = π_ref(y|x)·exp(r(x, y)/β) / Z(x).  (Eq. 4)
Solved for the reward:                    r(x, y) = β·log(π*(y|x)/π_ref(y|x)) + β·log Z(x).  (Eq. 5)
People prefer y_w to y_l with probability σ(r(x, y_w) − r(x, y_l)) (Bradley–Terry): in the
difference Z(x) cancels. So the language model is itself the reward model, and the maximum
likelihood of the preferences is a classification loss on log-probabilities alone (Eq. 7):

    L = −log σ( β·log(π(y_w|x)/π_ref(y_w|x)) − β·log(π(y_l|x)/π_ref(y_l|x)) )

The reference π_ref never changes, so here it is data: its log-probabilities are computed once and
kept on disk. A response's log-probability is the *sum* over its tokens, EOS included: Eq. 7 is
about the probability of whole responses, and a mean would be another objective.
"""

import hashlib
import inspect
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import logsigmoid, relu

# The losses: (P,) vectors of P pairs -> (P,) losses, not reduced. What a loss needs is what its
# signature names:
#   chosen, rejected                  log π(y|x) of both responses in nats, sums over their tokens
#   ref_chosen, ref_rejected          the same under the reference
#   a, b, h                           chosen − ref_chosen, rejected − ref_rejected, a − b
#   chosen_length, rejected_length    response tokens, EOS included
#   margin                            from the data
#   mean_logratio, matched_margin     of the whole step, see STATISTICS
#   logratios                         (K,) of the responses of one example, best first
#   beta, label_smoothing, alpha, gamma    settings; a default given here is the loss's own
# β·a and β·b are the implicit rewards (Eq. 5, up to what cancels).


def dpo(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """DPO, 2305.18290 Eq. 7; with label_smoothing ε > 0 conservative DPO: labels flip with rate ε.

    >>> dpo(*torch.tensor([[-4.0], [-6.0], [-5.0], [-5.0]]), beta=0.5, label_smoothing=0.0)
    tensor([0.3133])
    """
    chosen_logratio = chosen - ref_chosen
    rejected_logratio = rejected - ref_rejected
    h = chosen_logratio - rejected_logratio  # β·h is the difference of the implicit rewards
    return -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)


# On h, the difference of the log-ratios: sums over tokens.


def robust(h, beta, label_smoothing=0.1):
    """Robust DPO, 2403.00409: on labels that flip with rate ε its mean is DPO's loss on clean ones.

    Unbounded below, as h grows.
    """
    kept, flipped = -logsigmoid(beta * h), -logsigmoid(-beta * h)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(h, beta):
    """IPO, 2310.12036 Eq. 17 (β is the paper's τ): regress h to 1/(2β)."""
    return (h - 1 / (2 * beta)) ** 2


def hinge(h, beta):
    """SLiC's hinge on DPO's rewards, 2309.06657: satisfied once βh ≥ 1."""
    return relu(1 - beta * h)


def rdpo(h, chosen_length, rejected_length, beta, alpha=0.01):
    """R-DPO, 2403.19159: α > 0 discounts what is won by length."""
    return -logsigmoid(beta * h + alpha * (chosen_length - rejected_length))


def odpo(h, margin, beta):
    """DPO with an offset, 2402.10571: the rewards must differ by the pair's margin."""
    return -logsigmoid(beta * h - margin)


def exo(h, beta, label_smoothing=1e-3):
    """EXO for pairs, 2402.00856 Eq. 16: reverse KL of σ(βh) from the label (1 − ε, ε); ε > 0."""
    q, log_q, log_not_q = torch.sigmoid(beta * h), logsigmoid(beta * h), logsigmoid(-beta * h)
    won, lost = math.log(1 - label_smoothing), math.log(label_smoothing)
    return q * (log_q - won) + (1 - q) * (log_not_q - lost)


def discopop(h, beta):
    """DiscoPOP, 2406.08414 Eq. 5: logistic where βh < 0, exponential above, blended by σ(βh/0.05).

    It has a local minimum at βh = −0.119, and at βh = 0 its slope has the wrong sign.
    """
    z, gate = beta * h, beta * h / 0.05
    exponential = (logsigmoid(gate) - z).exp()  # σ(gate)·e⁻ᶻ in one, as e⁻ᶻ alone can overflow
    return -torch.sigmoid(-gate) * logsigmoid(z) + exponential


def aot(chosen, rejected, matched_margin, beta):
    """AOT, 2406.05882: the step's k-th largest policy margin against the k-th of the reference."""
    return -logsigmoid(beta * (chosen - rejected - matched_margin))


# On a and b, the log-ratios of chosen and rejected: sums over tokens, but for the two *_norm.


def ipo_norm(a, b, chosen_length, rejected_length, beta):
    """IPO on means over tokens, as some trainers have it under the name of IPO."""
    return (a / chosen_length - b / rejected_length - 1 / (2 * beta)) ** 2


def dpo_norm(a, b, chosen_length, rejected_length, beta=5.0):
    """DPO on means over tokens, Tülu 3, 2411.15124 Eq. 6."""
    return -logsigmoid(beta * (a / chosen_length - b / rejected_length))


def dpop(a, b, beta, alpha=50.0):
    """DPO-Positive, 2402.13228 Eq. 3 (α is its λ): penalises a chosen response that falls."""
    return -logsigmoid(beta * (a - b - alpha * relu(-a)))


def nca(a, b, beta):
    """NCA for pairs, 2402.05369: holds the absolute likelihood of the chosen."""
    return -logsigmoid(beta * a) - (logsigmoid(-beta * a) + logsigmoid(-beta * b)) / 2


def bco(a, b, mean_logratio, beta):
    """BCO, 2404.04656: chosen above, rejected below δ, the mean reward.

    δ is that of the step, not a running mean over steps: a run can then be resumed and repeated.
    """
    return -logsigmoid(beta * (a - mean_logratio)) - logsigmoid(-beta * (b - mean_logratio))


def kto(a, b, mean_logratio, beta, alpha=1.0):
    """KTO on pairs, 2402.01306 Eq. 8: λ_w = 1, λ_l = α, z0 = β·max(0, mean log-ratio of the step).

    The paper's z0 is measured on mismatched prompts and responses, here on the pairs themselves.
    """
    z0 = beta * mean_logratio.clamp(min=0)
    return torch.sigmoid(z0 - beta * a) + alpha * torch.sigmoid(beta * b - z0)


def apo_zero(a, b, beta):
    """APO-zero, 2408.06266 Eq. 7: chosen up, rejected down, each saturating."""
    return torch.sigmoid(-beta * a) + torch.sigmoid(beta * b)


def apo_down(a, b, beta):
    """APO-down, 2408.06266 Eq. 8, for chosen ones worse than the policy's own: pushes both down."""
    return torch.sigmoid(beta * a) + torch.sigmoid(-beta * (a - b))


def sppo(a, b, beta):
    """SPPO with hard labels, 2405.00675 Eq. 4.7: a to 1/(2β), b to −1/(2β)."""
    return (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2


def cal_dpo(a, b, beta):
    """Cal-DPO, 2412.14516: DPO with β = 1, and the log-ratios calibrated as in SPPO."""
    return -logsigmoid(a - b) + sppo(a, b, beta) / 2


def chipo(a, b, beta, gamma=5.0):
    """χPO, 2407.13399: the link φ(a) = eᵃ + a of KL plus χ²; rewards clipped to ±2R, R = γ."""
    link = lambda ratio: ratio.clamp(max=80).exp() + ratio  # e⁸⁰ is a float32 still
    return -logsigmoid((beta * (link(a) - link(b))).clamp(-2 * gamma, 2 * gamma))


def fdpo_alpha(a, b, beta, alpha=0.5):
    """f-DPO, 2309.16240, α-divergence: f'(π/π_ref) = (1 − e^(−αa))/α. Reverse KL, α → 0, is DPO."""
    link = lambda ratio: -torch.expm1((-alpha * ratio).clamp(max=80)) / alpha
    return -logsigmoid(beta * (link(a) - link(b)))


def fdpo_forward_kl(a, b, beta):
    """f-DPO, 2309.16240, forward KL: f'(π/π_ref) = 1 − e⁻ᵃ."""
    return fdpo_alpha(a, b, beta, alpha=1.0)


def fdpo_js(a, b, beta):
    """f-DPO, 2309.16240, Jensen-Shannon: f'(π/π_ref) = log σ(a), up to a constant."""
    return -logsigmoid(beta * (logsigmoid(a) - logsigmoid(b)))


# Without a reference: sums or means, as each says.


def simpo(chosen, rejected, chosen_length, rejected_length, beta=2.0, gamma=1.0):
    """SimPO, 2405.14734 Eq. 6: means over tokens, with a target margin γ (taken off after β)."""
    return -logsigmoid(beta * (chosen / chosen_length - rejected / rejected_length) - gamma)


def cpo(chosen, rejected, chosen_length, beta):
    """CPO, 2401.08417 Eq. 3: DPO without a reference, sums; and the chosen's NLL, a mean."""
    return -logsigmoid(beta * (chosen - rejected)) - chosen / chosen_length


def orpo(chosen, rejected, chosen_length, rejected_length, beta):
    """ORPO, 2403.07691 Eq. 6 (β is its λ): the chosen's NLL and its odds against the rejected's.

    Means over tokens: p = exp(mean log-prob of a token), odds p/(1 − p).
    """
    mean = chosen / chosen_length, rejected / rejected_length
    won, lost = (m - torch.log(-torch.expm1(m.clamp(max=-1e-6))) for m in mean)  # log-odds
    return -mean[0] - beta * logsigmoid(won - lost)


def slic(chosen, rejected, alpha=0.1, gamma=1.0):
    """SLiC-HF, 2305.10425 Eq. 4 (α, γ: its λ, δ): margin between sums; the chosen's NLL, a sum."""
    return relu(gamma - chosen + rejected) - alpha * chosen


def unlikelihood(chosen, rejected, alpha=0.1):
    """Chosen up, rejected down, 2305.18290 App. C.3: sums, unbounded below."""
    return -chosen + alpha * rejected


def sft(chosen):
    """Negative log-likelihood of the best response; the trainer divides the sum by its tokens."""
    return -chosen


# On rankings.


def plackett_luce(logratios, beta):
    """DPO for K ranked responses, 2305.18290 Eq. 20: the best is chosen first, then the next …

    logratios: (K,) of one example, best first. Returns its loss, a scalar. K = 2 is DPO.
    """
    rewards = beta * logratios
    return (rewards.flip(0).logcumsumexp(0).flip(0) - rewards).sum()


OBJECTIVES = (
    *(dpo, robust, ipo, hinge, rdpo, odpo, exo, discopop, aot),
    *(ipo_norm, dpo_norm, dpop, nca, bco, kto, apo_zero, apo_down, sppo, cal_dpo, chipo),
    *(fdpo_alpha, fdpo_forward_kl, fdpo_js),
    *(simpo, cpo, orpo, slic, unlikelihood, sft, plackett_luce),
)
LOSSES = {function.__name__: function for function in OBJECTIVES}


def needs(loss: str) -> set[str]:
    """The names of the arguments that a loss takes."""
    return set(inspect.signature(LOSSES[loss]).parameters)


def defaults(loss: str) -> dict[str, float]:
    """The settings of which a loss brings a default of its own."""
    parameters = inspect.signature(LOSSES[loss]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def call(function, given: dict):
    """A loss or a statistic of those of the given that its signature names."""
    names = inspect.signature(function).parameters.keys() & given.keys()
    return function(**{name: given[name] for name in names})


# What some losses must know of the whole step, all ranks and micro-batches, without gradient:
# (pairs of the step,) vectors -> the same. The trainer takes them in a forward pass of its own.


def mean_logratio(a, b, weight):
    """The mean of all a and b of the step, by the pairs' weights; once for each pair."""
    return ((weight * (a + b) / 2).sum() / weight.sum().clamp(min=1e-12)).expand_as(a)


def matched_margin(chosen, rejected, ref_chosen, ref_rejected):
    """For the pair with the k-th largest policy margin the k-th largest reference margin; every
    pair counts once, whatever its weight."""
    matched = torch.empty_like(ref_chosen)
    matched[(chosen - rejected).argsort()] = (ref_chosen - ref_rejected).sort().values
    return matched


STATISTICS = {"mean_logratio": mean_logratio, "matched_margin": matched_margin}


def sequence_logps(model, batch) -> torch.Tensor:
    """log π(y|x) in nats of every response in the batch, (N,): the sum over its tokens."""
    logps = model(batch.tokens, batch.positions, batch.branches, batch.rows, batch.targets)  # (M,)
    return logps.new_zeros(len(batch.lengths)).index_add(0, batch.response, logps)


def pair_vectors(logps, reference, batch, swapped: bool = False) -> dict[str, torch.Tensor]:
    """All (P,) vectors that a loss can ask for, but for statistics; with the labels as they are, or
    swapped."""
    w, l = (batch.rejected, batch.chosen) if swapped else (batch.chosen, batch.rejected)  # noqa: E741
    v = {"chosen": logps[w], "rejected": logps[l]}
    v |= {"ref_chosen": reference[w], "ref_rejected": reference[l]}
    v |= {"a": v["chosen"] - v["ref_chosen"], "b": v["rejected"] - v["ref_rejected"]}
    v |= {"h": v["a"] - v["b"], "margin": -batch.margins if swapped else batch.margins}
    lengths = batch.lengths.to(logps.dtype)
    v |= {"chosen_length": lengths[w], "rejected_length": lengths[l]}
    return v | {"weight": batch.weights}


def pair_losses(loss: str, logps, reference, batch, statistics: dict, options: dict):
    """The loss of every pair, (P,). A pair whose label is soft, "chosen is better with probability
    p", has p times its loss and 1 − p times what it would be with the labels swapped."""

    def with_labels(swapped: bool):
        given = options | statistics | pair_vectors(logps, reference, batch, swapped)
        if swapped and "matched_margin" in given:
            given["matched_margin"] = -given["matched_margin"]
        return call(LOSSES[loss], given)

    if not batch.soft:
        return with_labels(swapped=False)
    p = batch.labels
    return p * with_labels(swapped=False) + (1 - p) * with_labels(swapped=True)


def compute_loss(
    loss: str, logps, batch, reference=None, beta=None, sft_weight=0.0, statistics=None, **options
):
    """Loss of one micro-batch, summed over its pairs (for sft over its response tokens).

    logps: (N,) from `sequence_logps`; reference: the same under the reference, None in the SFT
    stage (which needs no beta). sft_weight: α of an added α·NLL of each example's best response,
    a mean over its tokens, whatever its soft label (RPO, 2404.19733 Eq. 1). statistics: of
    STATISTICS those that the loss needs, (P,) each. options: other settings of the loss. Returns
    the scalar sum, to be divided by the pairs (tokens) of the whole step, and detached sums for the
    metrics.
    """
    best, best_length = logps[batch.best], batch.lengths[batch.best]  # (E,)
    count = batch.weights.double().sum()
    if loss == "sft":
        total, count = sft(best).sum(), best_length.sum()
    elif loss == "plackett_luce":
        rankings = zip(batch.example_weights, (logps - reference).split(batch.sizes))
        total = sum(w * plackett_luce(ratios, beta) for w, ratios in rankings)
        total = total + logps.sum() * 0  # a stand-in has no ranking, but must reach the backward
    else:
        options |= {"beta": beta}
        losses = pair_losses(loss, logps, reference, batch, statistics or {}, options)
        total = (batch.weights * losses).sum()
    if sft_weight:
        total = total - sft_weight * (batch.example_weights * best / best_length).sum()
    sums = {"loss": total.detach(), "count": count}
    if reference is not None:
        with torch.no_grad():
            metrics = pair_metrics(pair_vectors(logps, reference, batch), beta)
        sums |= {"pairs": len(batch.chosen)} | {k: v.sum() for k, v in metrics.items()}
    return total, sums


def pair_metrics(v: dict[str, torch.Tensor], beta: float) -> dict[str, torch.Tensor]:
    """What is logged, (P,) each, from `pair_vectors`; names and definitions as in TRL where it has
    them."""
    margins = beta * v["h"]
    gradient_weight = torch.sigmoid(-margins)  # Sec. 4: how much the pair still moves the policy
    longer = v["chosen_length"] - v["rejected_length"]
    metrics = {
        "rewards/chosen": beta * v["a"],
        "rewards/rejected": beta * v["b"],
        "rewards/margins": margins,
        "rewards/accuracies": margins > 0,
        "rewards/ties": margins == 0,
        "logps/chosen": v["chosen"],
        "logps/rejected": v["rejected"],
        "logps_per_token/chosen": v["chosen"] / v["chosen_length"],
        "logps_per_token/rejected": v["rejected"] / v["rejected_length"],
        "gradient_weight": gradient_weight,
        "saturated": gradient_weight < 0.01,
        "both_fell": (v["a"] < 0) & (v["b"] < 0),
        "moments/margin²": margins**2,
        "moments/longer": longer,
        "moments/longer²": longer**2,
        "moments/margin·longer": margins * longer,
    }
    return {name: value.double() for name, value in metrics.items()}


def average_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Sums over all pairs of the logged steps on all ranks -> their averages.

    The loss is per pair, by the pairs' weights, for sft per token. `length_correlation` is
    Pearson's, of the margin with the difference of lengths; 0 where either does not vary.
    """
    loss = sums["loss"] / max(sums["count"], 1e-12)
    if "pairs" not in sums:
        return {"loss": loss}
    pairs = max(sums["pairs"], 1)
    mean = {name: value / pairs for name, value in sums.items() if name not in ("count", "pairs")}
    mean["loss"] = loss
    moments = {k: mean.pop(k) for k in list(mean) if k.startswith("moments/")}
    margin, margin2, longer, longer2, product = mean["rewards/margins"], *moments.values()
    spread = max(margin2 - margin**2, 0) * max(longer2 - longer**2, 0)
    covariance = product - margin * longer
    mean["length_correlation"] = covariance / math.sqrt(spread) if spread > 1e-20 else 0.0
    return mean


# The reference, as data.


def reference_key(model, dataset, numerics: str) -> str:
    """Digest of all that the reference log-probs depend on: weights, token ids, numerics.

    Under sharding every rank must call this: each weight is gathered in turn. (all ranks)
    """
    digest = hashlib.sha256(numerics.encode())
    weights = {k: w for k, w in model.state_dict().items() if ".lora." not in k}  # those add zero
    for name, weight in sorted(weights.items()):
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    for array in (dataset.tokens, dataset.offsets, dataset.trees):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:32]


@torch.no_grad()
def reference_logps(model, batches: Iterable, responses: int) -> torch.Tensor:
    """log π_ref of the batches' responses: (2, responses), values and how often each was seen.

    The same function as in training, under the same autocast; summed over ranks by the caller.
    """
    result = torch.zeros(2, responses, dtype=torch.float64)
    for batch in batches:
        logps = sequence_logps(model, batch)
        if len(batch.best):  # not the stand-in of a rank without work
            result[0, batch.response_ids.cpu()] = logps.cpu().double()
            result[1, batch.response_ids.cpu()] += 1
    return result


def find_reference(key: str, directories: Iterable[Path], responses: int) -> np.ndarray | None:
    """The cached log-probs of that key, (responses,) float32, from the first place with them."""
    for directory in directories:
        path = directory / f"{key}.npy"
        if path.is_file():
            values = np.load(path)
            if values.shape == (responses,) and np.isfinite(values).all():
                return values
    return None


@torch.no_grad()
def sequence_kl(policy, reference, batch) -> torch.Tensor:
    """Rao–Blackwell estimate of KL(π‖π_ref) from responses sampled from the policy, (N,) in nats.

    Sums the exact KL of the next-token distributions over the sampled prefixes: unbiased like the
    plain log-ratio, with far less variance (the mean over samples estimates the sequence-level KL).
    """
    inputs = batch.tokens, batch.positions, batch.branches, batch.rows
    p, q = (model(*inputs).log_softmax(-1) for model in (policy, reference))  # (M, V)
    per_token = (p.exp() * (p - q)).sum(-1)  # (M,)
    return per_token.new_zeros(len(batch.lengths)).index_add(0, batch.response, per_token)
