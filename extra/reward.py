"""The language model as reward model at work: scoring, candidates, best of n, KL.

The implicit reward of a response is β·log(π(y|x)/π_ref(y|x)) (Rafailov et al., 2305.18290, Eq. 5).
"""

import itertools
import json
from pathlib import Path

import numpy as np
import torch

import data
import sample
from extra.checkpoints import is_adapter


def run(args, options: dict):
    """What sample.py was asked for, other than to show samples."""
    if args.score:
        score(args)
    elif args.best_of:
        best_of(args, options)
    elif args.kl:
        estimate_kl(args, options)
    else:
        draw_candidates(args, options)


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
    place = Path(args.checkpoint)  # an adapter's run is where the merged model is
    path = (place.parent if is_adapter(place) else place) / "run.json"
    if args.beta is not None or not path.is_file():
        return 0.1 if args.beta is None else args.beta
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["settings"]["beta"])
    except (ValueError, LookupError, TypeError):
        raise data.DataError(f"{path}: no β can be read from it: give --beta") from None


def write(path: str, rows: list[dict]):
    with open(path, "w", encoding="utf-8") as file:
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
    return text.strip() if data.is_turns(prompt) else text


def draw_texts(model, tokenizer, prompts: list, options: dict) -> tuple[list, list[str]]:
    """[prompt, response] ids of a sample for each prompt, and the responses as texts."""
    trees = sample.draw(model, tokenizer, prompts, **options)
    return trees, [text_of(tokenizer, p, ids) for p, (_, ids) in zip(prompts, trees)]


def draw_candidates(args, options: dict):
    """Write n samples of each prompt."""
    prompts = sample.read_prompts(args)
    _, texts = draw_texts(*sample.load(args.checkpoint), prompts, options)
    write(args.out, candidates(prompts, texts, args.n))


def best_of(args, options: dict):
    """Draw N responses of each prompt and print, or write, the best by implicit reward."""
    policy, reference, tokenizer = load_both(args)
    prompts, n = sample.read_prompts(args), args.best_of
    trees, texts = draw_texts(policy, tokenizer, prompts, options)
    rewards = sample.implicit_rewards(policy, reference, trees, beta_of(args))
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


def score(args):
    """Implicit rewards of the responses in a file. Of preferences also their accuracy; candidates
    are written as a ranking, best first, which train.py takes as --data."""
    policy, reference, tokenizer = load_both(args)
    examples = list(data.read_examples(args.score, "prompts"))
    rows = [row for path in args.score.split(",") for _, row in data.read_jsonl(path)]
    for example in examples:
        if not example.responses:
            raise data.DataError(f"{example.where}: has no response that could be scored")
    trees = [with_ends(data.token_ids(e, tokenizer), e, tokenizer) for e in examples]
    most = max(i for tree in trees for ids in tree for i in ids)
    if most >= policy.config.vocab_size:
        raise data.DataError(f"token id {most} is beyond the model's vocabulary")
    window = policy.config.sliding_window
    longest = max(len(tree[0]) + max(map(len, tree[1:])) for tree in trees)
    if window and longest > window:
        raise data.DataError(f"{longest} tokens are more than the sliding window of {window}")
    rewards = sample.implicit_rewards(policy, reference, trees, beta_of(args))
    print(f"{sum(map(len, rewards)):,} responses, mean reward {np.concatenate(rewards).mean():.4f}")
    ranked = [r for r, row in zip(rewards, rows) if "candidates" not in row and len(r) > 1]
    if ranked:
        wins = lambda r: np.mean([a > b for a, b in itertools.combinations(r, 2)])
        right = np.array(list(map(wins, ranked)))
        error = right.std() / len(right) ** 0.5
        margin = np.mean([r[0] - r[-1] for r in ranked])
        print(
            f"accuracy {right.mean():.1%} ± {error:.1%} of {len(right):,}, mean margin {margin:.4f}"
        )
    if len(ranked) > 1 and all(len(r) == 2 for r in ranked):
        show_length_correlation(trees, rows, ranked)
    for row, scores in zip(rows, rewards):
        if "candidates" in row:
            order, drawn = np.argsort(-scores), row.pop("candidates")
            row["responses"], scores = [drawn[i] for i in order], scores[order]
        row["rewards"] = scores.tolist()
    if args.out:
        write(args.out, rows)


def show_length_correlation(trees: list, rows: list[dict], ranked: list[np.ndarray]):
    """Pearson's, of margins and differences of lengths: is the reward bought by length?"""
    pairs = [tree for tree, row in zip(trees, rows) if "candidates" not in row and len(tree) == 3]
    longer = np.array([len(chosen) - len(rejected) for _, chosen, rejected in pairs])
    margins = np.array([chosen - rejected for chosen, rejected in ranked])
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
    trees = sample.draw(policy, tokenizer, sample.read_prompts(args), **options)
    kl = measure_kl(policy, reference, trees)
    error = kl.std(ddof=1) / len(kl) ** 0.5 if len(kl) > 1 else float("nan")
    print(f"KL(π‖π_ref) {kl.mean():.4f} ± {error:.4f} nats per response, {len(kl):,} samples")
