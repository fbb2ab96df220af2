"""Direct Preference Optimization (Rafailov et al., 2305.18290): the objective, and nothing else.

RLHF looks for the policy that maximises  E[r(x, y)] − β·KL(π‖π_ref).             (Eq. 3)
Its solution is known in closed form:     π*(y|x) = π_ref(y|x)·exp(r(x, y)/β) / Z(x).  (Eq. 4)
Solved for the reward:                    r(x, y) = β·log(π*(y|x)/π_ref(y|x)) + β·log Z(x).  (Eq. 5)
People prefer y_w to y_l with probability σ(r(x, y_w) − r(x, y_l)) (Bradley–Terry): in the
difference Z(x) cancels. So the language model is itself the reward model, and the maximum
likelihood of the preferences is a classification loss on log-probabilities alone (Eq. 7):

    L = −log σ( β·log(π(y_w|x)/π_ref(y_w|x)) − β·log(π(y_l|x)/π_ref(y_l|x)) )

The reference π_ref never changes, so here it is data: its log-probabilities are computed once, and
come with the batch. A response's log-probability is the *sum* over its tokens, EOS included: Eq. 7
is about the probability of whole responses, and a mean would be another objective.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Pairs(NamedTuple):
    """All that a loss may look at, of P pairs, (P,) each."""

    chosen: Tensor  # log π(y_w|x) in nats, the sum over its tokens
    rejected: Tensor  # log π(y_l|x)
    ref_chosen: Tensor  # the same under the reference
    ref_rejected: Tensor
    chosen_length: Tensor  # learnt tokens, EOS included
    rejected_length: Tensor
    margin: Tensor  # by how much chosen is better, where the data says so
    mean_logratio: Tensor | float = 0.0  # () of the step before, for losses that ask (KTO, BCO)

    # The log-ratios a and b, and their difference h: β·a and β·b are the implicit rewards (Eq. 5).
    a = property(lambda self: self.chosen - self.ref_chosen)
    b = property(lambda self: self.rejected - self.ref_rejected)
    h = property(lambda self: self.a - self.b)


def dpo(pairs: Pairs, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Eq. 7, (P,). With label_smoothing ε > 0 conservative DPO: labels are flipped with rate ε.

    >>> dpo(Pairs(*torch.tensor([[-4.0], [-6.0], [-5.0], [-5.0], [7.0], [4.0], [0.0]])), beta=0.5)
    tensor([0.3133])
    """
    logits = beta * pairs.h  # the difference of the implicit rewards
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def find_loss(name: str) -> Callable:
    """A loss(pairs, beta, **options) -> (P,) by its name."""
    if name == "dpo":
        return dpo
    from extra.objectives import LOSSES  # 27 others, of the same signature

    return LOSSES[name]


def sequence_logps(model, batch) -> Tensor:
    """log π(y|x) in nats of every response in the batch, (N,): the sum over its tokens, in float64:
    a float32 sum would add ten times the rounding error of all that went before."""
    logps = model(batch.tokens, batch.positions, batch.segments, batch.targets)  # (M,)
    sums = double(torch.zeros(len(batch.lengths), device=logps.device))
    return sums.index_add(0, batch.response, double(logps * batch.learnt)).to(logps.dtype)


def double(x: Tensor) -> Tensor:
    """In float64; on Apple's GPU, which has none, as it is."""
    return x if x.device.type == "mps" else x.double()


def sft_loss(logps: Tensor, batch) -> tuple[Tensor, dict]:
    """Negative log-likelihood of the demonstrations: the sum over their tokens, and for metrics."""
    total = -logps.sum()
    return total, {"loss": double(total.detach()), "count": double(batch.learnt.sum())}


def preference_loss(
    logps: Tensor, batch, mean_logratio=0.0, *, loss, beta: float, sft_weight=0.0, **options
) -> tuple[Tensor, dict]:
    """The loss of a micro-batch, and what is logged, as TRL names and defines it: sums over its
    pairs by their weights, to be divided by the examples of the step, or by `count`. sft_weight: α
    of an added α·NLL of the chosen response, a mean over its tokens (RPO, 2404.19733 Eq. 1)."""
    w, l = batch.chosen, batch.rejected  # noqa: E741
    size, ref, m = batch.lengths.to(logps.dtype), batch.reference, batch.margins
    pairs = Pairs(logps[w], logps[l], ref[w], ref[l], size[w], size[l], m, mean_logratio)
    losses = loss(pairs, beta=beta, **options)  # (P,)
    if batch.soft:  # chosen is better with some probability only: the expectation over the label
        from extra.objectives import swapped

        flipped = loss(swapped(pairs), beta=beta, **options)
        losses = batch.labels * losses + (1 - batch.labels) * flipped
    if sft_weight:
        losses = losses - sft_weight * pairs.chosen / pairs.chosen_length
    margins = beta * pairs.h
    metrics = {
        "loss": losses,
        "rewards/chosen": beta * pairs.a,
        "rewards/rejected": beta * pairs.b,
        "rewards/margins": margins,
        "rewards/accuracies": margins > 0,
        "rewards/ties": margins == 0,
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
        "gradient_weight": torch.sigmoid(-margins),  # Sec. 4: how much a pair still pushes
        "both_fell": (pairs.a < 0) & (pairs.b < 0),
        "count": torch.ones_like(margins),
    }
    add = lambda values: (batch.weights * values).sum()
    return add(losses), {name: add(double(value.detach())) for name, value in metrics.items()}


@torch.no_grad()
def reference_logps(model, batches: Iterable, responses: int) -> Tensor:
    """log π_ref, (responses,) in float64, 0 of those in no batch: by the function of training, and
    under its autocast."""
    values = torch.zeros(responses, dtype=torch.float64)
    for batch in batches:  # a rank without work has a stand-in (data.collate), whose sum is 0
        values[batch.ids] += sequence_logps(model, batch).cpu()
    return values


def averages(sums: dict, prefix: str) -> dict[str, float]:
    """What is logged, of its sums over all examples: divided once."""
    count = max(float(sums["count"]), 1e-12)
    return {f"{prefix}/{name}": float(x) / count for name, x in sums.items() if name != "count"}


def mean_logratio(sums: dict, beta: float) -> Tensor:
    """The mean log-ratio of all responses of a step, of its sums."""
    return (sums["rewards/chosen"] + sums["rewards/rejected"]) / (2 * beta * sums["count"] + 1e-12)


def make_optimizer(model, name: str = "adamw", weight_decay: float = 0.0):
    """AdamW with decoupled weight decay on matrices, or RMSprop as in the paper."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "rmsprop":
        return torch.optim.RMSprop(trained)
    matrices = {"params": [p for p in trained if p.dim() == 2], "weight_decay": weight_decay}
    vectors = {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], fused=True)


def schedule(shape: str, warmup: int, step: int, steps: int) -> float:
    """The learning rate as a share of its peak: a pure function of the step (from 0)."""
    warmup = min(warmup, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return shapes[shape]


@torch.no_grad()
def evaluate(model, batches: Iterable, loss_of, run) -> dict[str, float]:
    """What is logged, of held-out examples. (all ranks)"""
    sums = Counter()
    for batch in batches:
        with run.autocast:
            logps = sequence_logps(model, batch)
        sums.update(loss_of(logps, batch)[1])
    return averages(run.total(sums), "eval")


def take_step(model, optimizer, batches: Iterable, loss_of, scale: float, clip: float, run) -> dict:
    """Forward, loss, backward for each micro-batch; clip; step, if it is finite. (all ranks) scale:
    of the summed losses. Returns the sums for the metrics, over all ranks; {} without a step."""
    sums = Counter()
    for batch in batches:
        with run.autocast:
            logps = sequence_logps(model, batch)
        loss, metrics = loss_of(logps, batch)
        (loss * scale).backward()
        sums.update(metrics)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    sums = run.total(sums)
    usable = torch.isfinite(norm + sums["loss"])  # the same on all ranks
    if usable:
        optimizer.step()
    optimizer.zero_grad()
    return sums | {"grad_norm": norm * sums["count"]} if usable else {}  # before clipping
