"""The pipeline that DPO replaces (Ouyang et al., 2203.02155), on the built-in experiment.

    python train.py                             # a run: its SFT model, its pairs, and DPO
    python experiments/rlhf.py out/reviews      # the same by a reward model, and by sampling

1. Reward model: a decoder whose head gives one number, trained so that the chosen response gets
   more than the rejected one. Its loss, −log σ(r_w − r_l), is DPO's, where r is β·log(π/π_ref):
   there nothing would be left to do.
2. Best of N: of N responses that of the highest reward. No policy is trained; each answer costs N,
   for ever. Its KL is log N − (N−1)/N as long as no two responses share a reward.
3. Policy gradient: maximise E[r(x, y)] − β·KL(π‖π_ref) (Eq. 3 of DPO) by the policy's own samples.
   RLOO (Ahmadian et al., 2402.14740) is REINFORCE on whole responses, each compared with the mean
   of the others to its prompt. PPO would add a network of values, and clipping.

The true reward, which only the grammar knows, can take the reward model's place: what is then
missing to R*(KL) is the optimiser's error alone. The table is experiments/replaced.py's.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import dpo
import sample
from experiments import reviews

GRAMMAR = reviews.Reviews()
WORST = -9.0  # reward of a response without an end, or that the grammar cannot write


def take_step(model, optimizer, loss: Tensor, learning_rate: float):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()


def read_rewards(model, batch: data.Batch) -> Tensor:
    """r(x, y) of every response of the batch, (N,): what the head makes of the last row, which has
    seen all words, and from which the language model predicts EOS."""
    last = batch.segments[-len(batch.lengths) :, 2:].sum(1) - 1  # start + size − 1 of the responses
    return model(batch.tokens, batch.positions, batch.segments, rows=last)[:, 0]


def bradley_terry(rewards: Tensor, batch: data.Batch) -> Tensor:
    """−log P(chosen ≻ rejected), the mean over the pairs of the batch."""
    return -logsigmoid(rewards[batch.chosen] - rewards[batch.rejected]).mean()


def train_reward_model(sft, pairs, learning_rate=2e-3, batch_size=32, epochs=1, seed=0):
    """A reward model from the checkpoint `sft` and a preference file, in the batches of DPO. Its
    head has one row, instead of one for each word of the vocabulary."""
    model, tokenizer = sample.load(sft)
    weight = model.embed_tokens.weight
    model.lm_head = nn.Linear(weight.shape[1], 1, bias=False, device=weight.device)
    nn.init.zeros_(model.lm_head.weight)
    dataset, _ = data.encode(data.read_preferences(str(pairs)), tokenizer, 512, 256)
    optimizer, per_epoch = dpo.make_optimizer(model), math.ceil(len(dataset) / batch_size)
    for n in range(epochs * per_epoch):
        order = data.order_of(n // per_epoch, len(dataset), seed)
        batch = data.collate(dataset, order[n % per_epoch * batch_size :][:batch_size])
        loss = bradley_terry(read_rewards(model, batch.to(weight.device)), batch)
        rate = learning_rate * dpo.schedule("linear", 20, n, epochs * per_epoch)
        take_step(model, optimizer, loss, rate)
    return model


@torch.no_grad()
def rewards_of(prompts: list[str], trees: list, tokenizer, reward_model=None) -> np.ndarray:
    """The rewards of sampled [prompt, response] ids, (N,): of a reward model, or the true ones."""
    if reward_model is None:
        return np.nan_to_num(reviews.rewards_of(GRAMMAR, prompts, trees, tokenizer), nan=WORST)
    parts = (data.to_dataset(trees[i : i + 256]) for i in range(0, len(trees), 256))
    batches = (data.collate(part, np.arange(len(part))) for part in parts)
    device = reward_model.lm_head.weight.device
    found = torch.cat([read_rewards(reward_model, b.to(device)).cpu() for b in batches]).numpy()
    ended = np.array([response[-1] == tokenizer.eos_id for _, response in trees])
    return np.where(ended, found, WORST)


def best_of_n(trees: list, rewards: np.ndarray, drawn: int, n: int) -> list:
    """Of the first n of the `drawn` samples to each prompt that of the highest reward."""
    best = rewards.reshape(-1, drawn)[:, :n].argmax(1)
    return [trees[i * drawn + j] for i, j in enumerate(best)]


def rloo_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Of k ≥ 2 samples to each of P prompts, (P, k). Its gradient is on average that of
    β·KL − E[r]: a sample's −∇log π, times how much better it is than the mean of the others. That
    does not depend on the sample: it takes away variance, and adds no bias."""
    returns = rewards - beta * (logps.detach() - ref_logps)  # Eq. 3, of one sample
    others = (returns.sum(1, keepdim=True) - returns) / (returns.shape[1] - 1)
    return -((returns - others) * logps).mean()


def rloo(sft, reward_model=None, beta=1.0, steps=200, prompts=32, k=4, learning_rate=5e-4, seed=0):
    """A policy from the checkpoint `sft`: each step draws k samples to each of some prompts from
    the policy as it is now, has them rewarded, and follows the gradient once."""
    (policy, tokenizer), (reference, _) = sample.load(sft), sample.load(sft)
    optimizer, rng = dpo.make_optimizer(policy), np.random.default_rng(seed)
    for n in range(steps):
        asked = np.repeat(rng.choice(GRAMMAR.prompts["train"], prompts), k).tolist()
        drawn = sample.draw(policy, tokenizer, asked, 64, seed=1 + n + seed * 10**6)
        trees = [[drawn[i][0], *(y for _, y in drawn[i : i + k])] for i in range(0, len(drawn), k)]
        batch = data.collate(data.to_dataset(trees), np.arange(prompts))
        batch = batch.to(policy.embed_tokens.weight.device)
        logps = dpo.sequence_logps(policy, batch)  # (P·k,), in the order of `drawn`
        with torch.no_grad():
            ref_logps = dpo.sequence_logps(reference, batch)
        rewards = torch.from_numpy(rewards_of(asked, drawn, tokenizer, reward_model)).to(logps)
        table = (x.view(prompts, k) for x in (logps, ref_logps, rewards))
        rate = learning_rate * dpo.schedule("linear", 20, n, steps)
        take_step(policy, optimizer, rloo_loss(*table, beta), rate)
    return policy


if __name__ == "__main__":
    from experiments.replaced import main

    main()
