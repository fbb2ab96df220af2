"""Use a trained checkpoint: sample it, compare two, and measure them on the built-in experiment.

python sample.py out/reviews --prompt "Review of the new film Amber:"
python sample.py out/reviews --compare out/reviews/reference/sft --prompt "…" --n 3
python sample.py out/reviews --compare out/reviews/reference/sft --report
"""

import argparse
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
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="directory with config.json, weights and tokenizer.model")
    add("--prompt", action="append", default=[], help="text to continue; may be given many times")
    add("--compare", metavar="OTHER", help="a second checkpoint, shown side by side")
    counted = {"type": int, "nargs": "?", "const": 5000, "metavar": "N"}
    add("--report", **counted, help="measure both on N samples of the reviews (default 5000)")
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
    if args.report is not None and args.report < 2:
        raise UsageError("--report needs at least 2 samples")
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


def draw(model, tokenizer, prompts: list[str], seed: int):
    """Token ids and text of one sample of each prompt, and whether it ended by itself."""
    ids, encoded = [], [tokenizer.encode_prompt(prompt) for prompt in prompts]
    for first in range(0, len(prompts), 1000):
        block = encoded[first : first + 1000]
        ids += generate(model, block, 64, tokenizer.eos_id, seed=seed + first)
    texts = [tokenizer.decode(response, continuation=True) for response in ids]
    return ids, texts, np.array([response[-1] == tokenizer.eos_id for response in ids])


def response_logps(model, dataset: data.Dataset) -> np.ndarray:
    """log π(y|x) of every response of a data set, (responses,) in nats."""
    lengths, device = dataset.lengths(), model.embed_tokens.weight.device
    [[plan]] = data.plan_epoch(lengths, len(lengths), 8192, 1)
    batches = (data.collate(dataset, examples).to(device) for examples in plan)
    return dpo.reference_logps(model, batches, len(dataset.response_lengths()))[0].numpy()


def report(args):
    """Measure a policy trained on the built-in experiment against its reference and the optimum."""
    policy, tokenizer = load(args.checkpoint)
    reference, _ = load(args.compare)
    grammar = data.Reviews()
    rng = np.random.default_rng(args.seed)
    prompts = rng.choice(grammar.prompts["eval"], args.report).tolist()
    rewards, accepted, texts = {}, {}, {}
    for name, model in (("SFT", reference), ("DPO", policy)):
        ids, texts[name], ended = draw(model, tokenizer, prompts, args.seed)
        scores = np.array([grammar.score(x, y)[1] for x, y in zip(prompts, texts[name])])
        accepted[name] = np.isfinite(scores) & ended
        rewards[name] = np.where(accepted[name], scores, 0.0)
    kl = measure_kl(policy, reference, [tokenizer.encode_prompt(x) for x in prompts], ids)

    written = data.encode_examples(grammar.demonstrations(2000, "eval"), tokenizer, 512, 256)
    loss = -response_logps(reference, written).sum() / written.response_lengths().sum()
    entropy = grammar.entropy() / written.response_lengths().mean()
    pairs = data.encode_examples(grammar.preferences(2000, "eval"), tokenizer, 512, 256)
    ratios = response_logps(policy, pairs) - response_logps(reference, pairs)  # w l w l …

    mean = {name: x.mean() for name, x in (rewards | {"KL": kl}).items()}
    error = {name: x.std(ddof=1) / len(x) ** 0.5 for name, x in (rewards | {"KL": kl}).items()}
    start = grammar.frontier(0.0)
    gain, best = mean["DPO"] - mean["SFT"], grammar.frontier(mean["KL"]) - start
    share_error = math.hypot(error["SFT"], error["DPO"]) / best
    print(f"""
{args.report:,} samples of the evaluation prompts, ± one standard error
  SFT loss per token   {loss:.4f} nats; entropy of the grammar {entropy:.4f}
  reward accuracy      {(ratios[::2] > ratios[1::2]).mean():.1%} of 2,000 held-out noisy labels
  true reward of SFT   {mean["SFT"]:.3f} ± {error["SFT"]:.3f}  (of the grammar itself {start:.3f})
  true reward of DPO   {mean["DPO"]:.3f} ± {error["DPO"]:.3f}
  KL(π‖π_ref)          {mean["KL"]:.3f} ± {error["KL"]:.3f} nats
  reward gained        {gain:.3f} of R*(KL) = {best:.3f}: {gain / best:.1%} ± {share_error:.1%}
  accepted             SFT {accepted["SFT"].mean():.1%}, DPO {accepted["DPO"].mean():.1%}""")
    for i in range(min(3, args.report)):
        print(f"\n{prompts[i]}")
        side_by_side(["SFT", "DPO"], [texts["SFT"][i], texts["DPO"][i]])


def measure_kl(policy, reference, prompts, responses) -> np.ndarray:
    """Rao–Blackwell KL(π‖π_ref) of each sampled response, (N,) in nats."""
    dataset = data.to_arrays([[x, y] for x, y in zip(prompts, responses)])
    device = policy.embed_tokens.weight.device
    kl = np.zeros(len(responses))
    for [micro_batches] in data.plan_epoch(dataset.lengths(), 256, 4096, 1):
        for examples in micro_batches:
            batch = data.collate(dataset, examples).to(device)
            kl[examples] = dpo.sequence_kl(policy, reference, batch).cpu()
    return kl


def main():
    try:
        args = parse_arguments(sys.argv[1:])
        (report if args.report else sample)(args)
    except (UsageError, data.DataError, CheckpointError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
