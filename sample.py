"""Use a trained checkpoint: sample, chat, compare, draw candidates, and score as a reward model.

    python sample.py out/mine --prompt "Review of the new film Amber:"
    python sample.py out/mine --chat
    python sample.py out/mine --compare=REF --prompt "…" --n=3        side by side
    python sample.py out/mine --prompts=prompts.jsonl --n=4 --out=candidates.jsonl
    python sample.py out/mine --compare=REF --score=pairs.jsonl       implicit rewards, accuracy
    python sample.py out/mine --compare=REF --prompts=… --best_of=8   the best by implicit reward
    python sample.py out/mine --compare=REF --prompts=… --kl          KL(π‖π_ref)

REF is the reference: the checkpoint that DPO started from (out/mine/reference/sft, if it was made
there). The implicit reward of a response is β·log(π(y|x)/π_ref(y|x)) (Rafailov et al., Eq. 5).
"""

import argparse
import contextlib
import itertools
import json
import math
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

import data
import dpo
from model import CheckpointError, Transformer, generate, load_pretrained


class UsageError(ValueError):
    """Arguments that cannot be used; the message is one sentence for the user."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    layout = argparse.RawTextHelpFormatter
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=layout)
    add = parser.add_argument
    add("checkpoint", help="directory with config.json, weights and tokenizer.model")
    add("--prompt", action="append", default=[], help="text to continue; may be given many times")
    add("--prompts", metavar="FILE", default="", help="prompts of a .jsonl file, in any format")
    add("--chat", action="store_true", help="talk to it, by its own chat template")
    add("--system", default="", help="system message of the chat")
    add("--compare", metavar="REF", help="a second checkpoint: side by side, or the reference")
    add("--score", metavar="FILE", help="implicit rewards of the responses in a .jsonl file")
    add("--best_of", type=int, metavar="N", help="the best of N samples, by implicit reward")
    add("--kl", action="store_true", help="KL from REF, estimated from samples")
    add("--out", metavar="FILE", help="write candidates or scores as .jsonl")
    add("--beta", type=float, help="of the implicit reward (default: the run's own, else 0.1)")
    add("--n", type=int, default=1, help="completions of each prompt (default 1)")
    add("--max_new_tokens", type=int, default=256, help="at most so many tokens (default 256)")
    add("--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    add("--top_k", type=int, default=0, help="only the k most probable tokens (default 0: all)")
    add("--top_p", type=float, default=1.0, help="only this much probability mass (default 1)")
    add("--compile", action="store_true", help="torch.compile: pays from thousands of tokens on")
    add("--seed", type=int, default=0, help="of the sampler (default 0)")
    args = parser.parse_args(arguments)
    least = {"n": 1, "best_of": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "beta": 0}
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            raise UsageError(f"--{name} must be at least {low}, and finite")
    if not 0 < args.top_p <= 1:
        raise UsageError("--top_p must be above 0 and at most 1")
    for prompt in (*args.prompt, args.system):
        data.check("--prompt", prompt)
    refuse(args, {word.split("=")[0] for word in arguments if word.startswith("--")})
    if args.out:
        open(args.out, "a").close()  # now rather than after an hour of sampling
    return args


def refuse(args, given: set[str]):
    """Raise UsageError for a combination that lacks something, or would ignore something."""
    prompts, greedy = bool(args.prompt or args.prompts), args.temperature == 0
    shaped = {"--temperature", "--top_k", "--top_p"}
    sampler = shaped | {"--max_new_tokens", "--seed", "--compile"}
    if prompts + args.chat + bool(args.score) != 1:
        raise UsageError("give --prompt or --prompts, or --chat, or --score")
    if (args.score or args.best_of or args.kl) and not args.compare:
        raise UsageError("rewards and KL are measured against a reference: name it with --compare")
    ignored = [  # flags, where they would be ignored, and why
        ({"--compare", "--n", "--out"}, args.chat, "--chat talks to one checkpoint"),
        ({"--best_of", "--kl"}, not prompts, "they need prompts"),
        ({"--n"} | sampler, args.score, "--score draws no samples"),
        ({"--system"}, not args.chat, "it belongs to --chat"),
        ({"--n"}, args.best_of, "--best_of says how many"),
        ({"--beta"}, not (args.score or args.best_of), "nothing is scored"),
        ({"--compare"}, args.out and not (args.score or args.best_of), "candidates come from one"),
        (shaped | {"--best_of", "--out"}, args.kl, "--kl needs plain samples, and all of them"),
        ({"--top_k", "--top_p", "--seed", "--n", "--best_of"}, greedy, "--temperature=0 is greedy"),
    ]
    for flags, applies, reason in ignored:
        if applies and flags & given:
            raise UsageError(f"{min(flags & given)} would be ignored: {reason}")


def options(args) -> dict:
    """What the arguments say to the sampler."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "compile")
    return {name: getattr(args, name) for name in names}


def load(directory: str | Path) -> tuple[Transformer, data.Tokenizer | None]:
    """A checkpoint; without tokenizer.model (None) it can only --score token ids."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_pretrained(directory).to(device).eval()
    path = Path(directory) / "tokenizer.model"
    tokenizer = data.Tokenizer(path) if path.exists() else None
    if tokenizer and tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(f"{directory}: its tokenizer has more pieces than the model")
    return model, tokenizer


def load_both(args) -> tuple[Transformer, Transformer, data.Tokenizer | None]:
    """Policy, reference and the tokenizer that they must share."""
    (policy, tokenizer), (reference, other) = load(args.checkpoint), load(args.compare)
    same = policy.config.vocab_size == reference.config.vocab_size
    if not same or (tokenizer and other and tokenizer.proto != other.proto):
        raise UsageError(f"{args.compare}: the reference has another tokenizer or vocabulary")
    return policy, reference, tokenizer


class Stream:
    """Prints one completion as it is sampled; holds back bytes that are not yet a character."""

    def __init__(self, tokenizer: data.Tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def __call__(self, new: list[int]):
        self.ids += new
        text = self.tokenizer.decode(self.ids, continuation=True).rstrip("\ufffd")
        print(text[self.shown :], end="", flush=True)
        self.shown = max(self.shown, len(text))


def draw(
    model, tokenizer, prompts: list, max_new_tokens: int = 256, seed: int = 0, **options
) -> list[list[list[int]]]:
    """[prompt, response] as ids: one sample for each prompt, text or conversation; see `generate`.

    In blocks whose cached keys and values stay within 4 GiB.
    """
    if tokenizer is None:
        raise UsageError("sampling needs a tokenizer.model in the checkpoint")
    encoded = tokenizer.encode_prompts(prompts)
    stops = set().union(*map(tokenizer.stop_ids, prompts))
    c, longest = model.config, max(map(len, encoded)) + max_new_tokens
    per_token = 8 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # bytes, float32
    size = min(1000, max(1, 2**32 // (per_token * longest)))
    new = []
    for number, first in enumerate(range(0, len(encoded), size), 1):
        block = encoded[first : first + size]
        new += generate(model, block, max_new_tokens, stops, seed=seed + number, **options)
    return [list(tree) for tree in zip(encoded, new)]


def text_of(tokenizer, prompt, ids: list[int]) -> str | list[int]:
    """The response as text, in a conversation without the template's space around it; to a prompt
    of token ids as ids."""
    if isinstance(prompt, list) and not data.is_turns(prompt):
        return ids
    text = tokenizer.decode(ids, continuation=True)
    return text.strip() if data.is_turns(prompt) else text


def response_logps(model, dataset: data.Dataset) -> np.ndarray:
    """log π(y|x) of every response of a data set, (responses,) in nats."""
    lengths, device = dataset.lengths(), model.embed_tokens.weight.device
    [[plan]] = data.plan_epoch(lengths, len(lengths), 8192, 1)
    batches = (data.collate(dataset, examples).to(device) for examples in plan)
    return dpo.reference_logps(model, batches, len(dataset.response_lengths()))[0].numpy()


def implicit_rewards(args, policy, reference, trees: list) -> list[np.ndarray]:
    """β·log(π/π_ref) of the responses of each tree of token ids, (responses,) each."""
    beta = args.beta
    if beta is None:
        path = Path(args.checkpoint) / "run.json"
        try:
            beta = json.loads(path.read_text())["settings"]["beta"] if path.is_file() else 0.1
        except (ValueError, LookupError, TypeError):
            raise UsageError(f"{path}: no β can be read from it: give --beta") from None
    policy.config.check_length(max(len(tree[0]) + max(map(len, tree[1:])) for tree in trees))
    dataset = data.to_arrays(trees)
    ratios = response_logps(policy, dataset) - response_logps(reference, dataset)
    return np.split(beta * ratios, np.cumsum([len(tree) - 1 for tree in trees])[:-1])


def measure_kl(policy, reference, trees: list) -> np.ndarray:
    """Rao–Blackwell KL(π‖π_ref) of each sampled response, (N,) in nats."""
    dataset = data.to_arrays(trees)
    device = policy.embed_tokens.weight.device
    kl = np.zeros(len(trees))
    for [micro_batches] in data.plan_epoch(dataset.lengths(), 256, 4096, 1):
        for examples in micro_batches:
            batch = data.collate(dataset, examples).to(device)
            kl[examples] = dpo.sequence_kl(policy, reference, batch).cpu()
    return kl


def show(prompt, names: list[str], texts: list[str], width: int = 96):
    """Print a prompt and its completions, side by side under their names if there are several."""
    print(f"\n{prompt[-1]['content'] if data.is_turns(prompt) else prompt}")
    if len(texts) == 1:
        return print(texts[0])
    column = width // len(names) - 2
    cells = [textwrap.wrap(f"[{name}]{text}", column) for name, text in zip(names, texts)]
    for row in itertools.zip_longest(*cells, fillvalue=""):
        print("  ".join(cell.ljust(column) for cell in row).rstrip())


def write(args, rows: list[dict]):
    with open(args.out, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"wrote {len(rows):,} lines to {args.out}")


def read_prompts(args) -> list:
    """The prompts of --prompt and --prompts, n times each."""
    formats = data.PREFERENCES + data.DEMONSTRATIONS + data.PLAIN_TEXT + data.CANDIDATES
    found = data.read_examples(args.prompts, formats)
    prompts = args.prompt + [example.prompt for _, example in found]
    return [prompt for prompt in prompts for _ in range(args.best_of or args.n)]


def candidates(prompts: list, texts: list[str], n: int) -> list[dict]:
    """A row for each prompt, with its n candidates."""
    starts = range(0, len(prompts), n)
    return [{"prompt": prompts[i], "candidates": texts[i : i + n]} for i in starts]


def complete(args):
    """Print completions, streamed if there is one, side by side with REF; or write them."""
    prompts, columns = read_prompts(args), {}
    for directory in filter(None, (args.checkpoint, args.compare)):
        model, tokenizer = load(directory)
        if len(prompts) == 1 and not (args.compare or args.out):
            print(prompts[0] if args.prompt else "", end="", flush=True)
            draw(model, tokenizer, prompts, **options(args), on_token=Stream(tokenizer))
            return print()
        trees = draw(model, tokenizer, prompts, **options(args))
        columns[directory] = [text_of(tokenizer, p, ids) for p, (_, ids) in zip(prompts, trees)]
    if args.out:
        return write(args, candidates(prompts, columns[args.checkpoint], args.n))
    for prompt, *texts in zip(prompts, *columns.values()):
        show(prompt, list(columns), texts)
    return None


def best_of(args):
    """Draw N responses of each prompt and print, or write, the best by implicit reward."""
    policy, reference, tokenizer = load_both(args)
    prompts, n = read_prompts(args), args.best_of
    trees = draw(policy, tokenizer, prompts, **options(args))
    rewards = np.concatenate(implicit_rewards(args, policy, reference, trees))
    texts = [text_of(tokenizer, p, ids) for p, (_, ids) in zip(prompts, trees)]
    rows = candidates(prompts, texts, n)
    for row, scores in zip(rows, rewards.reshape(-1, n)):
        row |= {"rewards": scores.tolist(), "response": row["candidates"][scores.argmax()]}
        if not args.out:
            show(row["prompt"], [], [f"{row['response']}   (reward {scores.max():.3f})"])
    if args.out:
        write(args, rows)


def estimate_kl(args):
    """KL(π‖π_ref) from samples of the policy, and its standard error."""
    policy, reference, tokenizer = load_both(args)
    trees = draw(policy, tokenizer, read_prompts(args), **options(args))
    kl = measure_kl(policy, reference, trees)
    error = kl.std(ddof=1) / len(kl) ** 0.5 if len(kl) > 1 else float("nan")
    print(f"KL(π‖π_ref) {kl.mean():.4f} ± {error:.4f} nats per response, {len(kl):,} samples")


def score(args):
    """Implicit rewards of the responses in a file. Of preferences also their accuracy; candidates
    are written as a ranking, best first, which train.py takes as --data."""
    policy, reference, tokenizer = load_both(args)
    formats = data.PREFERENCES + data.CANDIDATES[:1] + data.DEMONSTRATIONS + data.PLAIN_TEXT
    rows, examples = zip(*data.read_examples(args.score, formats))
    trees = data.encode_block(examples, tokenizer)
    rewards = implicit_rewards(args, policy, reference, trees)
    print(f"{sum(map(len, rewards)):,} responses, mean reward {np.concatenate(rewards).mean():.4f}")
    ranked = [r for r, row in zip(rewards, rows) if "candidates" not in row and len(r) > 1]
    if ranked:
        wins = lambda r: np.mean([a > b for a, b in itertools.combinations(r, 2)])
        right = np.array(list(map(wins, ranked)))
        margin, error = np.mean([r[0] - r[-1] for r in ranked]), right.std() / len(right) ** 0.5
        print(
            f"accuracy {right.mean():.1%} ± {error:.1%} of {len(right):,}, mean margin {margin:.4f}"
        )
    for row, scores in zip(rows, rewards):
        if "candidates" in row:
            order, drawn = np.argsort(-scores), row.pop("candidates")
            row["responses"], scores = [drawn[i] for i in order], scores[order]
        row["rewards"] = scores.tolist()
    if args.out:
        write(args, rows)


def chat(args):
    """Talk until the end of input; the conversation is rendered as training rendered it."""
    model, tokenizer = load(args.checkpoint)
    turns = [{"role": "system", "content": args.system}] if args.system else []
    while True:
        try:
            text = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        data.check("your turn", text)
        turns.append({"role": "user", "content": text})
        stream = Stream(tokenizer)
        [[_, ids]] = draw(model, tokenizer, [turns], **options(args), on_token=stream)
        turns.append({"role": "assistant", "content": text_of(tokenizer, turns, ids)})


def main():
    try:
        args = parse_arguments(sys.argv[1:])
        modes = {chat: args.chat, score: args.score, best_of: args.best_of, estimate_kl: args.kl}
        command = next((mode for mode, given in modes.items() if given), complete)
        cuda = torch.cuda.is_available()
        with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
            command(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UsageError, data.DataError, CheckpointError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
