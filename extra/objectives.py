"""The other preference losses: a table, each row of which is a function.

Each is `loss(pairs, beta, **options) -> (P,)`: it looks at P pairs (`dpo.Pairs`) and gives the loss
of each, not reduced. Every option has a default, and is a flag: `--loss=simpo --gamma=0.5`. Sums
are over a response's tokens; what is divided by its length is a mean. a and b are the log-ratios
log π/π_ref of chosen and rejected, h = a − b.

A loss of your own is a function with `@loss` above it, and `--loss=mine --gamma=0.7` trains by it:

    @loss
    def mine(pairs, beta, gamma=0.5):
        return -logsigmoid(beta * pairs.h - gamma)

Equal β is not an equal step: the slopes at policy = reference differ up to a factor of four, so a
comparison of losses tunes β or the learning rate for each.
"""

import math

import torch
from torch.nn.functional import logsigmoid, relu

from data import DataError
from dpo import Pairs, dpo


class Table(dict):
    def __missing__(self, name: str):
        raise DataError(f"--loss={name}: extra/objectives.py has none of that name")


LOSSES = Table(dpo=dpo)  # name -> function


def loss(function):
    """Put a loss into the table under its own name."""
    LOSSES[function.__name__] = function
    return function


def swapped(pairs: Pairs) -> Pairs:
    """The same pairs, had the other response been preferred: for soft labels."""
    chosen, rejected, ref_chosen, ref_rejected, length, other, margin, mean = pairs
    return Pairs(rejected, chosen, ref_rejected, ref_chosen, other, length, -margin, mean)


# On h, the difference of the log-ratios: sums over tokens.


@loss
def robust(pairs, beta, label_smoothing=0.1):
    """Robust DPO, 2403.00409: on labels that flip with rate ε its mean is DPO's loss on clean ones.

    Unbounded below, as h grows.
    """
    kept, flipped = -logsigmoid(beta * pairs.h), -logsigmoid(-beta * pairs.h)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@loss
def ipo(pairs, beta):
    """IPO, 2310.12036 Eq. 17 (β is the paper's τ): regress h to 1/(2β)."""
    return (pairs.h - 1 / (2 * beta)) ** 2


@loss
def hinge(pairs, beta):
    """SLiC's hinge on DPO's rewards, 2309.06657: satisfied once βh ≥ 1."""
    return relu(1 - beta * pairs.h)


@loss
def rdpo(pairs, beta, alpha=0.01):
    """R-DPO, 2403.19159: α > 0 discounts what is won by length."""
    longer = pairs.chosen_length - pairs.rejected_length
    return -logsigmoid(beta * pairs.h + alpha * longer)


@loss
def odpo(pairs, beta):
    """DPO with an offset, 2402.10571: the rewards must differ by the pair's margin in the data."""
    if pairs.margin.isnan().any():
        raise DataError("--loss=odpo needs a field 'margin' in every pair")
    return -logsigmoid(beta * pairs.h - pairs.margin)


@loss
def exo(pairs, beta, label_smoothing=1e-3):
    """EXO for pairs, 2402.00856 Eq. 16: reverse KL of σ(βh) from the label (1 − ε, ε); ε > 0."""
    z = beta * pairs.h
    q, log_q, log_not_q = torch.sigmoid(z), logsigmoid(z), logsigmoid(-z)
    won, lost = math.log(1 - label_smoothing), math.log(label_smoothing)
    return q * (log_q - won) + (1 - q) * (log_not_q - lost)


@loss
def discopop(pairs, beta):
    """DiscoPOP, 2406.08414 Eq. 5: logistic where βh < 0, exponential above, blended by σ(βh/0.05).

    It has a local minimum at βh = −0.119, and at βh = 0 its slope has the wrong sign.
    """
    z = beta * pairs.h
    gate = z / 0.05
    exponential = (logsigmoid(gate) - z).exp()  # σ(gate)·e⁻ᶻ in one, as e⁻ᶻ alone can overflow
    return -torch.sigmoid(-gate) * logsigmoid(z) + exponential


# On a and b, the log-ratios of chosen and rejected: sums over tokens, but for the two *_norm.


@loss
def ipo_norm(pairs, beta):
    """IPO on means over tokens, as some trainers have it under the name of IPO."""
    h = pairs.a / pairs.chosen_length - pairs.b / pairs.rejected_length
    return (h - 1 / (2 * beta)) ** 2


@loss
def dpo_norm(pairs, beta=5.0):
    """DPO on means over tokens, Tülu 3, 2411.15124 Eq. 6."""
    return -logsigmoid(beta * (pairs.a / pairs.chosen_length - pairs.b / pairs.rejected_length))


@loss
def dpop(pairs, beta, alpha=50.0):
    """DPO-Positive, 2402.13228 Eq. 3 (α is its λ): penalises a chosen response that falls."""
    return -logsigmoid(beta * (pairs.h - alpha * relu(-pairs.a)))


@loss
def nca(pairs, beta):
    """NCA for pairs, 2402.05369: holds the absolute likelihood of the chosen."""
    held = logsigmoid(-beta * pairs.a) + logsigmoid(-beta * pairs.b)
    return -logsigmoid(beta * pairs.a) - held / 2


@loss
def bco(pairs, beta):
    """BCO, 2404.04656: chosen above, rejected below δ, the mean reward.

    δ is that of the step before, over all its responses and ranks, and 0 in the first step; the
    paper's is a running mean of all steps. No gradient flows through it.
    """
    above, below = pairs.a - pairs.mean_logratio, pairs.mean_logratio - pairs.b
    return -logsigmoid(beta * above) - logsigmoid(beta * below)


@loss
def kto(pairs, beta, alpha=1.0):
    """KTO on pairs, 2402.01306 Eq. 8: λ_w = 1, λ_l = α, z0 = β·max(0, mean log-ratio).

    The mean is that of the step before, over all its responses and ranks, and 0 in the first step;
    the paper's is measured in each step, on mismatched prompts and responses. Without gradient.
    """
    z0 = beta * pairs.mean_logratio * (pairs.mean_logratio > 0)  # β·max(0, ·)
    return torch.sigmoid(z0 - beta * pairs.a) + alpha * torch.sigmoid(beta * pairs.b - z0)


@loss
def apo_zero(pairs, beta):
    """APO-zero, 2408.06266 Eq. 7: chosen up, rejected down, each saturating."""
    return torch.sigmoid(-beta * pairs.a) + torch.sigmoid(beta * pairs.b)


@loss
def apo_down(pairs, beta):
    """APO-down, 2408.06266 Eq. 8, for chosen ones worse than the policy's own: pushes both down."""
    return torch.sigmoid(beta * pairs.a) + torch.sigmoid(-beta * pairs.h)


@loss
def sppo(pairs, beta):
    """SPPO with hard labels, 2405.00675 Eq. 4.7: a to 1/(2β), b to −1/(2β)."""
    return (pairs.a - 1 / (2 * beta)) ** 2 + (pairs.b + 1 / (2 * beta)) ** 2


@loss
def cal_dpo(pairs, beta):
    """Cal-DPO, 2412.14516: DPO with β = 1, and the log-ratios calibrated as in SPPO."""
    return -logsigmoid(pairs.h) + sppo(pairs, beta) / 2


@loss
def chipo(pairs, beta, gamma=5.0):
    """χPO, 2407.13399: the link φ(a) = eᵃ + a of KL plus χ²; rewards clipped to ±2R, R = γ."""
    link = lambda ratio: ratio.clamp(max=80).exp() + ratio  # e⁸⁰ is a float32 still
    z = beta * (link(pairs.a) - link(pairs.b))
    return -logsigmoid(z.clamp(-2 * gamma, 2 * gamma))


@loss
def fdpo_alpha(pairs, beta, alpha=0.5):
    """f-DPO, 2309.16240, α-divergence: f'(π/π_ref) = (1 − e^(−αa))/α. Reverse KL, α → 0, is DPO."""
    link = lambda ratio: -torch.expm1((-alpha * ratio).clamp(max=80)) / alpha
    return -logsigmoid(beta * (link(pairs.a) - link(pairs.b)))


@loss
def fdpo_forward_kl(pairs, beta):
    """f-DPO, 2309.16240, forward KL: f'(π/π_ref) = 1 − e⁻ᵃ."""
    return fdpo_alpha(pairs, beta, alpha=1.0)


@loss
def fdpo_js(pairs, beta):
    """f-DPO, 2309.16240, Jensen-Shannon: f'(π/π_ref) = log σ(a), up to a constant."""
    return -logsigmoid(beta * (logsigmoid(pairs.a) - logsigmoid(pairs.b)))


# Without a reference: sums or means, as each says. A loss without a β of its own takes one all the
# same: it scales the rewards that are logged, and nothing else.


def means(pairs):
    """Mean log-prob of a token of the chosen and of the rejected, (P,) each."""
    return pairs.chosen / pairs.chosen_length, pairs.rejected / pairs.rejected_length


@loss
def simpo(pairs, beta=2.0, gamma=1.0):
    """SimPO, 2405.14734 Eq. 6: means over tokens, with a target margin γ (taken off after β)."""
    chosen, rejected = means(pairs)
    return -logsigmoid(beta * (chosen - rejected) - gamma)


@loss
def cpo(pairs, beta):
    """CPO, 2401.08417 Eq. 3: DPO without a reference, sums; and the chosen's NLL, a mean."""
    return -logsigmoid(beta * (pairs.chosen - pairs.rejected)) - pairs.chosen / pairs.chosen_length


@loss
def orpo(pairs, beta):
    """ORPO, 2403.07691 Eq. 6 (β is its λ): the chosen's NLL and its odds against the rejected's.

    Means over tokens: p = exp(mean log-prob of a token), odds p/(1 − p).
    """
    log_odds = lambda mean: mean - torch.log(-torch.expm1(mean.clamp(max=-1e-6)))
    chosen, rejected = means(pairs)
    return -chosen - beta * logsigmoid(log_odds(chosen) - log_odds(rejected))


@loss
def slic(pairs, beta, alpha=0.1, gamma=1.0):
    """SLiC-HF, 2305.10425 Eq. 4 (α, γ: its λ, δ): margin between sums; the chosen's NLL, a sum.

    It has no β.
    """
    return relu(gamma - pairs.chosen + pairs.rejected) - alpha * pairs.chosen


@loss
def unlikelihood(pairs, beta, alpha=0.1):
    """Chosen up, rejected down, 2305.18290 App. C.3: sums, unbounded below. It has no β."""
    return -pairs.chosen + alpha * pairs.rejected


@loss
def sft(pairs, beta):
    """Preferred-FT, 2305.18290 Sec. 6: NLL of the chosen, a sum over its tokens. It has no β.

    A mean over pairs, where the SFT stage has a mean over tokens.
    """
    return -pairs.chosen
