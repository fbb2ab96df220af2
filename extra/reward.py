"""The language model as reward model at work: scoring, candidates, best of n, KL.

The implicit reward of a response is β·log(π(y|x)/π_ref(y|x)) (Rafailov et al., 2305.18290, Eq. 5).
"""

import json
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

import data
import dpo
import sample
from extra.checkpoints import setting
from extra.conversations import check_depth


def run(args, options: dict):
    """What sample.py was asked for, other than to show samples."""
    if not (args.score or args.best_of or args.kl):
        return draw_candidates(args, options)
    with torch.autocast("cuda", enabled=False):  # rewards and KL are those of float32
        if args.score:
            score(args)
        elif args.best_of:
            best_of(args, options)
        else:
            estimate_kl(args, options)


def load_both(args) -> tuple:
    """Policy, reference, and the tokenizer that they must share."""
    (policy, tokenizer), (reference, other) = (
        sample.load(args.checkpoint),
        sample.load(args.compare),
    )
    same = policy.config.vocab_size == reference.config.vocab_size
    if not same or (tokenizer and other and tokenizer.proto != other.proto):
        what = "the reference has another tokenizer or vocabulary"
        raise data.DataError(f"{args.compare}: {what}")
    return policy, reference, tokenizer


def beta_of(args) -> float:
    """--beta, or else what the checkpoint was trained with, or else 0.1."""
    if args.beta is not None:
        return args.beta
    return setting(args.checkpoint, "beta", 0.1, ": give --beta")


def limits_of(args) -> list[int]:
    """max_length and max_prompt_length of the checkpoint's run; without one nothing is cut."""
    names = ("max_length", "max_prompt_length")
    return [setting(args.checkpoint, name, 2**31, ": mend it") for name in names]


def write(path: str, rows: list[dict]):
    text = {"encoding": "utf-8", "errors": "backslashreplace"}  # lone surrogates as they came
    with open(path, "w", **text) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"wrote {len(rows):,} lines to {path}")


def candidates(prompts: list, texts: list[str], n: int) -> list[dict]:
    """A row for each prompt, with its n candidates."""
    starts = range(0, len(prompts), n)
    return [{"prompt": prompts[i], "candidates": texts[i : i + n]} for i in starts]


def text_of(tokenizer, prompt, ids: list[int]) -> str | list[int]:
    """The response as text, in a conversation without the template's space around it; to a prompt
    of token ids as ids."""
    if isinstance(prompt, list) and not data.is_turns(prompt):
        return ids
    text = tokenizer.decode(ids, continuation=True)
    if not data.is_turns(prompt) or prompt[-1]["role"] == "assistant":  # it goes on in a text
        return text
    return text.strip()


def response_logps(model, dataset: data.Dataset) -> np.ndarray:
    """log π(y|x) of every response of a data set, (responses,) in nats."""
    device = model.embed_tokens.weight.device
    [plan] = data.pack(dataset.lengths, np.arange(len(dataset)), 8192, 1)
    batches = (data.collate(dataset, examples).to(device) for examples in plan)
    return dpo.reference_logps(model, batches, dataset.responses()).numpy()


def implicit_rewards(policy, reference, trees: list, beta: float) -> list[np.ndarray]:
    """β·log(π/π_ref) (Eq. 5) of the responses of each tree of token ids, (responses,) each."""
    dataset = data.to_dataset(trees)
    ratios = response_logps(policy, dataset) - response_logps(reference, dataset)
    return np.split(beta * ratios, np.cumsum([len(tree) - 1 for tree in trees])[:-1])


def draw_texts(model, tokenizer, prompts: list, options: dict) -> tuple[list, list[str]]:
    """[prompt, response] ids of a sample for each prompt, and the responses as texts."""
    trees = sample.draw(model, tokenizer, prompts, **options)
    return trees, [text_of(tokenizer, p, ids) for p, (_, ids) in zip(prompts, trees)]


def draw_candidates(args, options: dict):
    """Write n samples of each prompt."""
    prompts = sample.read_prompts(args, args.n)
    _, texts = draw_texts(*sample.load(args.checkpoint), prompts, options)
    write(args.out, candidates(prompts, texts, args.n))


def best_of(args, options: dict):
    """Draw N responses of each prompt and print, or write, the best by implicit reward."""
    policy, reference, tokenizer = load_both(args)
    n = args.best_of
    prompts = sample.read_prompts(args, n)
    trees, texts = draw_texts(policy, tokenizer, prompts, options)
    rewards = implicit_rewards(policy, reference, trees, beta_of(args))
    rows = candidates(prompts, texts, n)
    for row, scores in zip(rows, np.concatenate(rewards).reshape(-1, n)):
        row |= {"rewards": scores.tolist(), "response": row["candidates"][scores.argmax()]}
        if not args.out:
            shown = f"{row['response']}   (reward {scores.max():.3f})"
            sample.show(row["prompt"], [args.checkpoint], [shown])
    if args.out:
        write(args.out, rows)


def with_ends(tree: list, example: data.Example, tokenizer) -> list[list[int]]:
    """The tree, where who says nothing ends at once: an empty text has no ids of its own."""
    if all(tree):
        return tree
    end = tokenizer.eos_id
    if data.is_turns(example.prompt):
        from extra.chat import end_of_turn

        end = end_of_turn(tokenizer)
    return [ids or [end] for ids in tree]


class Item(NamedTuple):
    """A row to be scored, of which something is left."""

    row: dict
    ranked: bool  # of preferences, best first; else each response stands by itself
    tree: list  # [prompt, response, …] as ids, as a run cuts them; equal responses are there once
    places: list[int]  # which of these responses each response of the row is
    facts: tuple  # weight, label and margin


def encode_row(row: dict, example: data.Example, tokenizer, limits: list, counts: Counter):
    """The row as an Item, or None: preferences are cut, dropped and counted as a run does it, by
    `data.fit`; what is not ranked is only cut."""
    if not example.responses:
        raise data.DataError(f"{example.where}: has no response that could be scored")
    if data.is_turns(example.prompt) and tokenizer:
        from extra.chat import check_written

        check_written(example, tokenizer)
    counts.update(example.notes)
    if example.label == 0.5 and row.get("soft_label") is None:  # as a run leaves it out
        counts["dropped: tie"] += 1
        return None
    whole = data.token_ids(example, tokenizer)
    drawn = row.keys() & {"candidates", "chosen", "responses"} == {"candidates"}
    ranked = len(example.responses) > 1 and not drawn
    if ranked:
        tree = data.fit(whole, *limits, counts)
    else:
        whole = with_ends(whole, example, tokenizer)
        tree = fit_each(whole, limits, counts)
    if tree is None:
        return None
    room = limits[0] - len(tree[0])
    places = [tree.index(tuple(ids[:room]), 1) - 1 for ids in whole[1:]]
    return Item(row, ranked, tree, places, (example.weight, example.label, example.margin))


def fit_each(whole: list, limits: list, counts: Counter) -> list | None:
    """A tree of which every response is cut as if it were alone; None if that spoils one."""
    distinct, found = dict.fromkeys(map(tuple, whole[1:])), Counter()
    alone = [data.fit([whole[0], ids], *limits, found) for ids in distinct]
    counts["prompts cut"] += min(1, found.pop("prompts cut", 0))  # they share it
    counts.update(found)
    if None in alone:
        return None
    return [alone[0][0], *dict.fromkeys(response for _, response in alone)]


def evaluate(dataset: data.Dataset, ranked: list[int], logps: np.ndarray, beta: float) -> tuple:
    """What a run logs under `eval/` of these examples, by the same function, and the standard error
    of the accuracy. logps: log π of every response of the data set, (responses,)."""
    sums = []
    for e in ranked:
        batch = data.collate(dataset, np.array([e]))
        own = torch.from_numpy(logps[batch.ids.numpy()]).float()
        sums.append(dpo.preference_loss(own, batch, loss=dpo.dpo, beta=beta)[1])
    totals = {name: sum(float(part[name]) for part in sums) for name in sums[0]}
    averages = dpo.averages(totals, "eval")
    right, weights = (
        np.array([float(part[name]) for part in sums]) for name in ("rewards/accuracies", "count")
    )
    deviations = right - averages["eval/rewards/accuracies"] * weights
    return averages, np.linalg.norm(deviations) / max(weights.sum(), 1e-12)


def score(args):
    """Implicit rewards of the responses in a file, cut as in the checkpoint's own run. Preferences
    are evaluated as the run does it; candidates are written as a ranking, best first, which
    train.py takes as --data. What is dropped is written with null for its rewards."""
    policy, reference, tokenizer = load_both(args)
    beta, limits = beta_of(args), limits_of(args)
    paths = filter(None, args.score.split(","))
    rows = [found for path in paths for found in data.read_jsonl(path)]  # (file:line, row)
    examples = {e.where: e for e in data.read_examples(args.score, "prompts")}
    for where, row in rows:  # of what is only handed on, too
        check_depth(row, f"{where}: ")
    counts = Counter(examples=len(rows))
    items = [encode_row(row, examples[where], tokenizer, limits, counts) for where, row in rows]
    items = [item for item in items if item]
    told = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    if not items:
        raise data.DataError(f"{args.score}: nothing is left to be scored ({told})")
    print(f"{told} in {args.score}")
    trees = [item.tree for item in items]
    dataset = data.to_dataset(trees, [item.facts for item in items])
    window, largest = policy.config.sliding_window, dataset.tokens.max()
    longest = max(len(tree[0]) + max(map(len, tree[1:])) for tree in trees)
    if window and longest > window:
        raise data.DataError(f"{longest} tokens are more than the sliding window of {window}")
    if largest >= policy.config.vocab_size:
        raise data.DataError(f"token id {largest} is beyond the model's vocabulary")
    logps, under = (response_logps(model, dataset) for model in (policy, reference))
    ends = np.cumsum([len(tree) - 1 for tree in trees])
    rewards = np.split(beta * (logps - under), ends[:-1])  # Eq. 5, of each tree
    each = [scores[item.places] for item, scores in zip(items, rewards)]  # of each row
    print(f"{sum(map(len, each)):,} responses, mean reward {np.concatenate(each).mean():.4f}")
    ranked = [e for e, item in enumerate(items) if item.ranked]
    if ranked:
        show_evaluation(*evaluate(replace(dataset, reference=under), ranked, logps, beta), ranked)
    if len(ranked) > 1 and all(len(trees[e]) == 3 for e in ranked):
        show_length_correlation([trees[e] for e in ranked], [rewards[e] for e in ranked])
    for _, row in rows:
        row["rewards"] = None
    for item, scores in zip(items, each):
        if not item.ranked and "candidates" in item.row:
            order, drawn = np.argsort(-scores, kind="stable"), item.row.pop("candidates")
            item.row["responses"], scores = [drawn[i] for i in order], scores[order]
        item.row["rewards"] = scores.tolist()
    if args.out:
        write(args.out, [row for _, row in rows])
    if args.out and len(items) < len(rows):
        print(f"{len(rows) - len(items):,} of them were dropped, and have null for rewards")


def show_evaluation(averages: dict, error: float, ranked: list[int]):
    """In the words of `eval/`, but for its loss."""
    mean = {name.removeprefix("eval/"): value for name, value in averages.items()}
    share = f"accuracy {mean['rewards/accuracies']:.2%} ± {error:.2%} of {len(ranked):,}"
    print(f"{share}, ties {mean['rewards/ties']:.2%}, mean margin {mean['rewards/margins']:.4f}")
    for name in ("chosen", "rejected"):
        reward, logp = mean[f"rewards/{name}"], mean[f"logps/{name}"]
        print(f"{name}: mean reward {reward:.4f}, mean log-prob {logp:.4f}")


def show_length_correlation(trees: list, rewards: list[np.ndarray]):
    """Pearson's, of margins and differences of lengths: is the reward bought by length?"""
    longer = np.array([len(chosen) - len(rejected) for _, chosen, rejected in trees])
    margins = np.array([chosen - rejected for chosen, rejected in rewards])
    if longer.std() > 0 and margins.std() > 0:
        correlation = np.corrcoef(margins, longer)[0, 1]
        print(f"correlation of margin and difference of lengths {correlation:.2f}")


@torch.no_grad()
def sequence_kl(policy, reference, batch: data.Batch) -> torch.Tensor:
    """Rao–Blackwell estimate of KL(π‖π_ref) from responses sampled from the policy, (N,) in nats.

    Sums the exact KL of the next-token distributions over the sampled prefixes: unbiased like the
    plain log-ratio, with far less variance (the mean over samples estimates the sequence-level KL).
    """
    predicting = torch.arange(len(batch.tokens) - len(batch.targets), len(batch.tokens))
    rows = predicting.to(batch.tokens.device)
    inputs = batch.tokens, batch.positions, batch.segments
    p, q = (model(*inputs, rows=rows).log_softmax(-1) for model in (policy, reference))  # (M, V)
    per_token = (p.exp() * (p - q)).sum(-1)  # (M,)
    return per_token.new_zeros(len(batch.lengths)).index_add(0, batch.response, per_token)


def measure_kl(policy, reference, trees: list) -> np.ndarray:
    """Rao–Blackwell KL(π‖π_ref) of each sampled [prompt, response], (N,) in nats."""
    dataset = data.to_dataset(trees)
    device = policy.embed_tokens.weight.device
    kl = np.zeros(len(trees))
    for first in range(0, len(trees), 256):
        some = np.arange(first, min(first + 256, len(trees)))
        [micro_batches] = data.pack(dataset.lengths, some, 4096, 1)
        for examples in micro_batches:
            batch = data.collate(dataset, examples).to(device)
            kl[examples] = sequence_kl(policy, reference, batch).cpu()
    return kl


def estimate_kl(args, options: dict):
    """KL(π‖π_ref) from samples of the policy, and its standard error."""
    policy, reference, tokenizer = load_both(args)
    prompts = sample.read_prompts(args, args.n)
    trees = sample.draw(policy, tokenizer, prompts, **options)
    kl = measure_kl(policy, reference, trees)
    error = kl.std(ddof=1) / len(kl) ** 0.5 if len(kl) > 1 else float("nan")
    print(f"KL(π‖π_ref) {kl.mean():.4f} ± {error:.4f} nats per response, {len(kl):,} samples")
