"""Use a trained checkpoint: sample, and compare.

    python sample.py out/mine --prompt "Review of the new film Amber:"
    python sample.py out/mine --compare=REF --prompt "…" --n=3         side by side
REF is the reference: the checkpoint that DPO started from (out/mine/sft, if it was made there).
"""

import argparse
import contextlib
import itertools
import sys
import textwrap
from functools import partial
from pathlib import Path

import torch

import data
from model import CheckpointError, Transformer, load_pretrained


def sample_tokens(logits, generator, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """One token id of each row of (B, V) logits: temperature, then top-k, then top-p (nucleus)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # those before it suffice
        probabilities = torch.zeros_like(probabilities).scatter(1, index, ordered)
    # Where a uniform number falls among the summed probabilities: far faster than multinomial.
    sums = probabilities.cumsum(-1)
    drawn = torch.rand(len(sums), 1, device=sums.device, generator=generator).clamp(max=1 - 1e-6)
    return torch.searchsorted(sums, drawn * sums[:, -1:], right=True).squeeze(1)


@torch.no_grad()
def generate(
    model, prompts: list, max_new_tokens: int, eos_id, seed=0, on_token=None, compile=False, **shape
) -> list[list[int]]:
    """Sample one continuation of every prompt, of one token id or more. Returns the new ids of
    each, ending in an eos_id (one or several) unless cut off at max_new_tokens. on_token: is called
    with the B ids of every step. compile: each step as one graph. shape: temperature (0: greedy),
    top_k, top_p. Raises CheckpointError beyond a sliding window or the vocabulary."""
    assert prompts and all(prompts), "at least one prompt, and at least one token in each"
    generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)
    stops = {eos_id} if isinstance(eos_id, int) else {*eos_id}
    new, drawn, longest = [[] for _ in prompts], None, max(map(len, prompts))
    next_logits = lambda drawn: run_again(model, prompts, new)
    with contextlib.suppress(ImportError):
        from extra.cache import KVCache  # keys and values are kept

        next_logits = KVCache(model, prompts, longest + max_new_tokens, compile, stops)
    for _ in range(max_new_tokens):
        drawn = sample_tokens(next_logits(drawn), generator, **shape)  # (B,)
        if on_token:
            on_token(drawn.tolist())
        for ids, token in zip(new, drawn.tolist()):
            if not ids or ids[-1] not in stops:  # others have ended: what is drawn is nothing
                ids.append(token)
        if all(ids[-1] in stops for ids in new):
            break
    return new


def run_again(model, prompts: list, new: list) -> torch.Tensor:
    """The logits, (B, V), after each prompt and its new ids: each a stream of its own."""
    logits = []
    for prompt, ids in zip(prompts, new):
        tokens = torch.tensor([*prompt, *ids], device=model.embed_tokens.weight.device)
        positions = torch.arange(len(tokens), device=tokens.device)
        logits.append(model(tokens, positions, torch.tensor([[0, 0, 0, len(tokens)]]))[-1])
    return torch.stack(logits)


def load(directory: str | Path) -> tuple[Transformer, data.Tokenizer | None]:
    other = "mps" if torch.backends.mps.is_available() else "cpu"  # Apple's GPU
    device = "cuda" if torch.cuda.is_available() else other
    return load_pretrained(directory).to(device).eval(), data.find_tokenizer(directory)


def draw(model, tokenizer, prompts: list, max_new_tokens=256, seed=0, **options) -> list:
    """[prompt, response] as ids: a sample of each prompt, text, ids or chat, in blocks whose cached
    keys and values stay within 4 GiB. Raises DataError for text without a tokenizer."""
    encoded = [data.token_ids(data.Example(p, (), "a prompt"), tokenizer)[0] for p in prompts]
    eos = model.config.eos_token_id
    stops = {eos} if isinstance(eos, int) else {*(eos or ())}
    stops |= {tokenizer.eos_id} if tokenizer else set()
    if any(map(data.is_turns, prompts)):
        from extra.chat import stop_ids

        stops |= stop_ids(tokenizer)
    c, longest = model.config, max(map(len, encoded)) + max_new_tokens
    per_token = 8 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # bytes, float32
    size, new = min(1000, max(1, 2**32 // (per_token * longest))), []
    for first in range(0, len(encoded), size):
        block, own = encoded[first : first + size], seed + 1 + first * 10**6  # no other run's seed
        new += generate(model, block, max_new_tokens, stops, seed=own, **options)
    return [list(tree) for tree in zip(encoded, new)]


def show(prompt, names: list[str], texts: list[str]):
    """Print a prompt and its completions, if there are several side by side with their names."""
    print(f"\n{prompt[-1]['content'] if data.is_turns(prompt) else prompt}")
    if len(texts) == 1:
        return print(texts[0])
    column = 96 // len(names) - 2
    cells = [textwrap.wrap(f"[{name}]{text}", column) for name, text in zip(names, texts)]
    for row in itertools.zip_longest(*cells, fillvalue=""):
        print("  ".join(cell.ljust(column) for cell in row).rstrip())


def read_prompts(args, n: int) -> list:
    """The prompts of --prompt and --prompts, n times each."""
    prompts = [*args.prompt]
    for example in data.read_examples(args.prompts, "prompts"):
        if example.context:
            what = f"{example.where}: field '{min(example.context)}' is not handed on in sampling"
            raise data.DataError(f"{what}: write it into the conversation")
        prompts.append(example.prompt)
    return [prompt for prompt in prompts for _ in range(n)]


def complete(args, options: dict):
    """Print completions, side by side with those of REF."""
    prompts, columns = read_prompts(args, args.n), {}
    for directory in filter(None, (args.checkpoint, args.compare)):
        model, tokenizer = load(directory)
        trees = draw(model, tokenizer, prompts, **options)
        text = partial(tokenizer.decode, continuation=True) if tokenizer else str
        columns[directory] = [text(ids) for _, ids in trees]
    for prompt, *texts in zip(prompts, *columns.values()):
        show(prompt, list(columns), texts)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    layout = {"formatter_class": argparse.RawTextHelpFormatter, "usage": argparse.SUPPRESS}
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, **layout)
    add = parser.add_argument
    add("checkpoint", help="directory with config.json, weights and a tokenizer")
    add("--prompt", action="append", default=[], help="text to continue; may be given many times")
    add("--prompts", metavar="FILE", default="", help="prompts of a .jsonl file, in any format")
    add("--compare", metavar="REF", help="a second checkpoint: side by side, or the reference")
    add("--n", type=int, default=1, help="completions of each prompt (default 1)")
    add("--max_new_tokens", type=int, default=256, help="at most so many tokens (default 256)")
    add("--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    add("--top_k", type=int, default=0, help="only the k most probable tokens (default 0: all)")
    add("--top_p", type=float, default=1.0, help="only this much probability mass (default 1)")
    add("--compile", action="store_true", help="torch.compile: pays from thousands of tokens on")
    add("--seed", type=int, default=0, help="of the sampler (default 0)")
    parser.set_defaults(command=complete)
    with contextlib.suppress(ImportError):
        from extra.commands import parse  # --chat, --score and others, and what is refused

        return parse(parser, arguments)
    return parser.parse_args(arguments)


def main():
    try:
        args = parse_arguments(sys.argv[1:])
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "compile")
        options = {name: getattr(args, name) for name in names}
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
            args.command(args, options)
    except KeyboardInterrupt:
        sys.exit(130)
    except (data.DataError, CheckpointError, OSError, ImportError) as error:
        print(f"sample.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
