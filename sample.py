"""Use a trained checkpoint: sample it, compare two, and measure them on the built-in experiment.

python sample.py out/reviews --prompt "Review of the new film Amber:"
python sample.py out/reviews --compare out/reviews/reference/sft --prompt "…" --n 3
python sample.py out/reviews --compare out/reviews/reference/sft --report
"""

import argparse
import json
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
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="directory with config.json, weights and tokenizer.model")
    add("--prompt", action="append", default=[], help="text to continue; may be given many times")
    add("--compare", metavar="OTHER", help="a second checkpoint, shown side by side")
    add(
        "--report",
        type=int,
        nargs="?",
        const=2000,
        metavar="N",
        help="measure reward and KL to --compare on N samples of the reviews (default 2000)",
    )
    add("--n", type=int, default=1, help="completions of each prompt (default 1)")
    add("--max_new_tokens", type=int, default=256, help="at most so many tokens (default 256)")
    add("--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    add("--top_k", type=int, default=0, help="only the k most probable tokens (default 0: all)")
    add("--top_p", type=float, default=1.0, help="only this much probability mass (default 1)")
    add("--seed", type=int, default=0, help="of the sampler (default 0)")
    args = parser.parse_args(arguments)
    for name, low in (("n", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if getattr(args, name) < low:
            raise UsageError(f"--{name} must be at least {low}")
    if not 0 < args.top_p <= 1:
        raise UsageError("--top_p must be above 0 and at most 1")
    if args.report and not args.compare:
        raise UsageError("--report measures against a reference: name it with --compare")
    if bool(args.prompt) == bool(args.report):
        raise UsageError("give --prompt (as often as you like), or --report")
    return args


def load(directory: str) -> tuple[Transformer, data.Tokenizer]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_pretrained(directory).to(device).eval()
    return model, data.Tokenizer(Path(directory) / "tokenizer.model")


class Stream:
    """Prints one completion as it is sampled; holds back bytes that are not yet a character."""

    def __init__(self, tokenizer: data.Tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def __call__(self, new: list[int | None]):
        self.ids += new
        text = self.tokenizer.decode(self.ids, continuation=True).rstrip("\ufffd")
        print(text[self.shown :], end="", flush=True)
        self.shown = max(self.shown, len(text))


def complete(model, tokenizer, prompts: list[str], args, on_token=None) -> list[str]:
    """One completion of each prompt."""
    ids = generate(
        model,
        [tokenizer.encode_prompt(prompt) for prompt in prompts],
        args.max_new_tokens,
        tokenizer.eos_id,
        args.temperature,
        args.top_k,
        args.top_p,
        args.seed,
        on_token,
    )
    return [tokenizer.decode(response, continuation=True) for response in ids]


def sample(args):
    """Print the completions of every prompt; streamed if there is one, side by side with OTHER."""
    model, tokenizer = load(args.checkpoint)
    prompts = [prompt for prompt in args.prompt for _ in range(args.n)]
    if len(prompts) == 1 and not args.compare:
        print(prompts[0], end="", flush=True)
        complete(model, tokenizer, prompts, args, on_token=Stream(tokenizer))
        print()
        return
    columns = {args.checkpoint: complete(model, tokenizer, prompts, args)}
    if args.compare:
        columns[args.compare] = complete(*load(args.compare), prompts, args)
    for prompt, *completions in zip(prompts, *columns.values()):
        print(f"\n{prompt}")
        side_by_side(list(columns), completions)


def side_by_side(names: list[str], texts: list[str], width: int = 96):
    if len(names) == 1:
        return print(texts[0])
    column = width // len(names) - 2
    cells = [textwrap.wrap(f"[{n}]{t}", column) for n, t in zip(names, texts)]
    for row in range(max(map(len, cells))):
        print("  ".join((c[row] if row < len(c) else "").ljust(column) for c in cells).rstrip())


@torch.no_grad()
def report(args, samples: int):
    """Measure a policy trained on the built-in experiment against its reference and the optimum."""
    policy, tokenizer = load(args.checkpoint)
    reference, _ = load(args.compare)
    run = json.loads((Path(args.checkpoint) / "run.json").read_text(encoding="utf-8"))
    grammar = data.Reviews(run["settings"]["seed"])
    prompts = [
        str(x) for x in np.random.default_rng(args.seed).choice(grammar.prompts["eval"], samples)
    ]
    encoded = [tokenizer.encode_prompt(prompt) for prompt in prompts]

    results = {}
    for name, model in (("SFT", reference), ("DPO", policy)):
        ids = generate(model, encoded, 64, tokenizer.eos_id, seed=args.seed)
        texts = [tokenizer.decode(response, continuation=True) for response in ids]
        rewards = np.array([grammar.score(x, y)[1] for x, y in zip(prompts, texts)])
        accepted = np.isfinite(rewards) & np.array([y[-1] == tokenizer.eos_id for y in ids])
        results[name] = ids, texts, np.where(accepted, rewards, 0.0), accepted
    kl = measure_kl(policy, reference, encoded, results["DPO"][0])

    before, after = results["SFT"][2], results["DPO"][2]
    error = lambda values: values.std(ddof=1) / len(values) ** 0.5
    gain, best = after.mean() - before.mean(), grammar.frontier(kl.mean()) - grammar.frontier(0.0)
    lines = {
        "true reward before": f"{before.mean():.3f} ± {error(before):.3f}  (grammar {grammar.frontier(0):.3f})",
        "true reward after": f"{after.mean():.3f} ± {error(after):.3f}",
        "KL(π‖π_ref)": f"{kl.mean():.3f} ± {error(kl):.3f} nats",
        "gain": f"{gain:.3f}, {gain / best:.1%} of R*(KL) = {best:.3f}",
        "accepted": f"before {results['SFT'][3].mean():.1%}, after {results['DPO'][3].mean():.1%}",
    }
    for name, line in lines.items():
        print(f"{name:>20}  {line}")
    for i in range(3):
        print(f"\n{prompts[i]}")
        side_by_side(["SFT", "DPO"], [results["SFT"][1][i], results["DPO"][1][i]])


def measure_kl(policy, reference, prompts, responses) -> np.ndarray:
    """Rao–Blackwell KL(π‖π_ref) of each sampled response, (N,) in nats."""
    dataset = data.to_arrays([[x, y] for x, y in zip(prompts, responses)])
    device = policy.embed_tokens.weight.device
    kl = np.zeros(len(responses))
    for [[*micro_batches]] in data.plan_epoch(dataset.lengths(), 256, 4096, 1):
        for examples in micro_batches:
            batch = data.collate(dataset, examples).to(device)
            kl[examples] = dpo.sequence_kl(policy, reference, batch).cpu()
    return kl


def main():
    try:
        args = parse_arguments(sys.argv[1:])
        report(args, args.report) if args.report else sample(args)
    except (UsageError, data.DataError, CheckpointError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
