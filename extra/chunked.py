"""Log-probs of targets without the full logits.

model.token_logps says what is computed. Here it is done in chunks of the vocabulary, and again in
the backward pass: never more than one chunk of logits, about model.MANY numbers, exists, and each
row of the head's gradient is written once. In bf16 the logits are float32 products of bf16 inputs,
which halves the error of a log-prob (on CUDA by one kernel, which has no derivative of its own).
"""

import torch

import model


class ChunkedLogps(torch.autograd.Function):
    """log p(target | hidden), (M,), of hidden (M, C), weight (V, C), targets (M,); see the module.

    d log p(target) / d logits = onehot(target) − p.
    """

    @staticmethod
    def chunks(hidden, weight, targets):
        """Of each chunk its rows of the weight, their logits (M, v), where in it the targets are
        (M, 1), and which of them are (M, 1)."""
        count = -(-len(hidden) * len(weight) // model.MANY)
        size = -(-len(weight) // count)
        for first in range(0, len(weight), size):
            rows = slice(first, first + size)
            within, last = targets[:, None] - first, len(weight[rows]) - 1
            inside = (within >= 0) & (within <= last)
            # Kept by nobody here: the last logits are gone before the next are made.
            yield rows, model.head_logits(hidden, weight[rows]), within.clamp(0, last), inside

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        target, total = 0.0, torch.full((), -torch.inf, device=hidden.device)
        for _, logits, within, inside in ChunkedLogps.chunks(hidden, weight, targets):
            target = torch.where(inside, logits.gather(1, within), target)  # (M, 1)
            total = torch.logaddexp(total, logits.logsumexp(1, keepdim=True))  # (M, 1)
            del logits
        ctx.save_for_backward(hidden, weight, targets, total)
        return target[:, 0] - total[:, 0]  # FSDP wants no view here

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, total = ctx.saved_tensors
        grad = grad[:, None]  # (M, 1)
        grad_hidden = torch.zeros_like(hidden, dtype=grad.dtype)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for rows, logits, within, inside in ChunkedLogps.chunks(hidden, weight, targets):
            p = logits.sub_(total).exp_()
            d = p.mul_(-grad).scatter_add_(1, within, grad * inside).to(hidden.dtype)  # (M, v)
            del p, logits
            grad_hidden += d @ weight[rows].to(d.dtype)
            if grad_weight is not None:  # each row is written once
                grad_weight[rows] = d.T @ hidden
            del d
        return grad_hidden.to(hidden.dtype), grad_weight, None
