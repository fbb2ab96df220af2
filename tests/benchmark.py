"""What a DPO step costs here, and as it is usually written: `python tests/benchmark.py [SECTION …]`

Sections (without any all of them, about half an hour on two cores):
    steps      time of forward and backward against the standard step, one lever after the other
    memory     peak memory of both, each in a process of its own
    growth     how the time grows with each size
    sampling   tokens per second against transformers' generate
    plan       planning and packing an epoch of a million pairs
    ranks      cost per pair of two FSDP processes against one
    start      seconds until --help
    startup    encoding 100,000 pairs of text at a first start, and finding them again

The standard step pads 2B whole sequences to the longest, computes the prompt twice, the logits of
every position, their log-softmax, and a forward of the reference. Both sides have the same weights,
pairs and kernels, threads and allocator, and run in turn; ratios are medians over the rounds, with
the quartiles, of CPU time of the process (on CUDA of wall time). The optimizer's step, which is the
same on both sides, is left out.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# By default glibc gives large blocks back to the kernel and takes new ones at every step, which
# costs the standard step's large logits most. With these it keeps them: kinder to the other side.
KEEP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import data  # noqa: E402
import dpo  # noqa: E402
from extra.guard import most_resident  # noqa: E402
from model import ModelConfig, Transformer, rotary, rotate, save_pretrained  # noqa: E402
from sample import generate  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
SHAPE |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}


def new_model(vocab: int = 32000, dtype=torch.float32, **shape) -> Transformer:
    return Transformer(ModelConfig(vocab, **(SHAPE | shape))).init_weights(0).to(DEVICE, dtype)


# Floating-point operations.


def work(dataset: data.Dataset) -> tuple[int, int, int, int]:
    """What a data set asks of the model: rows of the stream, targets, pairs of a row and one that
    it sees, and those of them that responses ask for."""
    sizes = np.diff(dataset.offsets)
    is_prompt = np.zeros(len(sizes), bool)
    is_prompt[dataset.trees[:-1]] = True
    prompts = sizes[is_prompt] - 1  # rows: the last token opens the responses
    own = sizes[~is_prompt]
    before = np.repeat(prompts, np.diff(dataset.trees) - 1)  # of each response
    asked = (own * before + own * (own + 1) // 2).sum()
    seen = asked + (prompts * (prompts + 1) // 2).sum()
    return tuple(map(int, (dataset.lengths.sum(), own.sum(), seen, asked)))


def flops(config: ModelConfig, rows: int, targets: int, seen: int, asked: int) -> int:
    """Of a forward pass; a backward pass is two of them.

    Two for each row and weight of a matrix that it meets, the last layer and the head at the rows
    that predict (keys and values at all), and four for each pair, layer and width of the heads.
    """
    c, width = config, config.num_attention_heads * config.head_dim
    keys = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim
    block = 2 * c.hidden_size * width + keys + 3 * c.hidden_size * c.intermediate_size
    every = (c.num_hidden_layers - 1) * block + keys
    some = block - keys + c.vocab_size * c.hidden_size
    attention = (c.num_hidden_layers - 1) * seen + asked
    return 2 * (every * rows + some * targets) + 4 * width * attention


# The standard step, plainly.


def standard_logps(model, ids, prompts, lengths):
    """log π(y|x) of right-padded rows: ids (2B, T), lengths of prompts and of whole rows (2B,)."""
    c, w, (rows, time) = model.config, dict(model.named_parameters()), ids.shape
    x = F.embedding(ids, w["embed_tokens.weight"])
    cos, sin = rotary(torch.arange(time, device=ids.device), c, x.dtype)
    norm = lambda x, name: F.rms_norm(x, (c.hidden_size,), w[f"{name}.weight"], c.rms_norm_eps)
    for layer in range(c.num_hidden_layers):
        at = f"layers.{layer}"
        project = lambda x, name, at=at: F.linear(x, w[f"{at}.{name}_proj.weight"])
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            project(h, f"self_attn.{n}").view(rows, time, -1, c.head_dim) for n in ("q", "k", "v")
        )
        qkv = (y.transpose(1, 2) for y in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        h = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
        x = x + project(h.transpose(1, 2).flatten(2), "self_attn.o")
        h = norm(x, f"{at}.post_attention_layernorm")
        x = x + project(F.silu(project(h, "mlp.gate")) * project(h, "mlp.up"), "mlp.down")
    logits = F.linear(norm(x, "norm"), w.get("lm_head.weight", w["embed_tokens.weight"]))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    at = torch.arange(1, time, device=ids.device)
    return (logps * ((at >= prompts[:, None]) & (at < lengths[:, None]))).sum(1)


def padded_rows(trees: list) -> tuple:
    rows = [prompt + response for prompt, *responses in trees for response in responses]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    prompts = torch.tensor([len(prompt) for prompt, *responses in trees for _ in responses])
    return tuple(x.to(DEVICE) for x in (ids, prompts, torch.tensor(list(map(len, rows)))))


def autocast(bf16: bool):
    return torch.autocast(DEVICE.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def make_step(logps_of, model, reference, bf16: bool):
    """Forward and backward of a step; reference: a model, or None where its log-probs are data."""

    def step():
        with autocast(bf16):
            logps, ref = logps_of(model), 0.0
            if reference is not None:
                with torch.no_grad():
                    ref = logps_of(reference)
        ref = torch.zeros_like(logps) + ref
        nothing = torch.zeros_like(logps[::2])  # lengths and margins, which Eq. 7 does not ask for
        pairs = dpo.Pairs(logps[::2], logps[1::2], ref[::2], ref[1::2], nothing, nothing, nothing)
        dpo.dpo(pairs, beta=0.1).mean().backward()
        return logps

    return step


# The levers, each as another layout of the same pairs for the same model.


def unshared(trees: list) -> list:
    """Every response with a prompt of its own."""
    return [[prompt, response] for prompt, *responses in trees for response in responses]


def unpacked(trees: list) -> list:
    """Filled up to the longest with tokens that are read but not learnt."""
    longest = max(len(p) + len(r) for p, *responses in trees for r in responses)
    fill = lambda p, r: r + [~0] * (longest - len(p) - len(r))
    return [[p, *(fill(p, r) for r in responses)] for p, *responses in trees]


def our_logps(trees: list):
    dataset = data.to_dataset(trees)

    def logps(model):
        batch = data.collate(dataset, np.arange(len(dataset))).to(DEVICE)
        return dpo.sequence_logps(model, batch)

    return logps


def ladder(trees: list, model, reference, bf16=False) -> dict:
    """Name -> step: the standard one, then one lever more each time."""
    rows = padded_rows(trees)
    standard = lambda model: standard_logps(model, *rows)
    layouts = {
        "response log-probs": unpacked(unshared(trees)),
        "packing": unshared(trees),
        "shared prompt": trees,
    }
    steps = {
        "standard": make_step(standard, model, reference, bf16),
        "cached reference": make_step(standard, model, None, bf16),
    }
    steps |= {n: make_step(our_logps(t), model, None, bf16) for n, t in layouts.items()}
    return steps | {"ours, live": make_step(our_logps(trees), model, reference, bf16)}


def draw_trees(sizes: list, vocab: int = 32000) -> list:
    """Trees of random ids; sizes: (prompt, response, response) each."""
    rng = np.random.default_rng(0)
    return [[rng.integers(3, vocab, n).tolist() for n in tree] for tree in sizes]


def mixture(pairs: int) -> list:
    """Lognormal lengths, of median 192 and 64 tokens and spread 0.8, from 8 to 1,024."""
    rng = np.random.default_rng(1)
    draw = lambda median: int(np.clip(median * np.exp(0.8 * rng.standard_normal()), 8, 1024))
    return [[draw(192), draw(64), draw(64)] for _ in range(pairs)]


CASES = {f"{p}:{r}": [[p, r, r]] * 4 for p, r in ((64, 64), (192, 64), (512, 64), (1024, 128))}


def clock() -> float:
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(actions: dict, rounds: int, after=lambda: None) -> dict[str, list[float]]:
    """Seconds of each action in each round, after one round to warm up."""
    seconds = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            begun = clock()
            action()
            if number:
                seconds[name].append(clock() - begun)
            after()
    return seconds


def ratio(seconds: dict, slow: str, fast: str) -> str:
    """How many times as long the slow one takes: median and quartiles over the rounds."""
    ratios = [a / b for a, b in zip(seconds[slow], seconds[fast])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def bf16_is_native() -> bool:
    return DEVICE.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def steps(args):
    print("\nTime of the standard step as a multiple: the levers one after the other; ours is the")
    print("last but one, `live` with a reference forward on our side too. Median [quartiles]")
    model, reference = new_model(), new_model()
    cases = CASES | {"mixture": mixture(8)}
    cases = {name: cases[name] for name in args.cases.split(",")}
    for bf16 in [False] + [True] * bf16_is_native():
        for case, sizes in cases.items():
            trees = draw_trees(sizes)
            blocks = [trees[i : i + 4] for i in range(0, len(trees), 4)]  # four pairs at a time
            ladders = [ladder(block, model, reference, bf16) for block in blocks]
            run = lambda name, ladders=ladders: [steps[name]() for steps in ladders]
            actions = {name: (lambda name=name, run=run: run(name)) for name in ladders[0]}
            seconds = in_turn(actions, args.rounds, model.zero_grad)
            median, asks = statistics.median(seconds["shared prompt"]), work(data.to_dataset(trees))
            pairs, tokens = len(trees) / median, asks[0] / median
            speed = 3 * flops(model.config, *asks) / median / 1e12  # MFU is this by the peak
            print(f"{'bf16' if bf16 else 'float32'} {case}: {pairs:.2f} pairs per second", end="")
            print(f"{' of CPU time' if DEVICE.type == 'cpu' else ''}, ", end="")
            print(f"{tokens:,.0f} tokens, {speed:.3f} TFLOP; ", end="")
            print(f"arithmetic {arithmetic(trees, blocks, model.config)}")
            for name in list(seconds)[1:]:
                print(f"    {name:20} {ratio(seconds, 'standard', name)}", flush=True)
    if not bf16_is_native():
        print("bf16: left out, as this CPU has no instructions for it")


def arithmetic(trees: list, blocks: list, config: ModelConfig) -> str:
    """The ratio of floating-point operations, with the reference cached and live."""
    ours, standard = flops(config, *work(data.to_dataset(trees))), 0
    for block in blocks:
        rows, longest = 2 * len(block), max(len(t[0]) + max(map(len, t[1:])) for t in block)
        seen = rows * longest * (longest + 1) // 2
        standard += flops(config, rows * longest, rows * longest, seen, seen)
    return f"{4 * standard / (3 * ours):.2f}, live {standard / ours:.2f}"


# Memory.


class Tracker(TorchDispatchMode):
    """Bytes of the tensors that live, at most, as torch.cuda.max_memory_allocated counts them.

    bf16 products on a CPU that has none go by way of float32, block by block: else they take hours.
    """

    def __init__(self):
        super().__init__()
        self.seen, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        slow = op is torch.ops.aten.mm.default and args[0].dtype == torch.bfloat16
        result = self.product(*args) if slow else op(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor.untyped_storage())
        return result

    def watch(self, storage):
        key = storage._cdata
        if key not in self.seen and (size := storage.nbytes()):

            def forget():
                self.live -= size
                self.seen.pop(key, None)

            self.live += size
            self.peak = max(self.peak, self.live)
            self.seen[key] = weakref.finalize(storage, forget)

    @staticmethod
    def product(a, b):
        out = a.new_empty(len(a), b.shape[1])
        size = 2**20 // max(a.shape[1], 512) + 1
        for columns, right in zip(out.split(size, 1), b.split(size, 1)):
            right = right.float()
            for rows, left in zip(columns.split(size), a.split(size)):
                rows.copy_(left.float() @ right)
        return out


def measure(which: str, prompt: int, vocab: int):
    """In a process of its own: peak of live tensors and of the process, above its start, in MiB."""
    resident = lambda: most_resident() / 2**20
    start, trees = resident(), draw_trees([[prompt, 128, 128]] * 4, vocab)
    with Tracker() as tracker:
        model = new_model(vocab)
        ladder(trees, model, model, bf16=True)[which]()
    if DEVICE.type == "cuda":
        tracker.peak = torch.cuda.max_memory_allocated()
    print(json.dumps([tracker.peak / 2**20, resident() - start]))


def memory(args):
    print("\nPeak memory in bf16, MiB: live tensors, and what the process grew by; four pairs")
    for prompt, vocab in ((1024, 32000), (384, 128000)):
        found = {}
        for which in ("standard", "shared prompt"):
            command = [sys.executable, __file__, "--measure", which, str(prompt), str(vocab)]
            usual = {name: value for name, value in os.environ.items() if name not in KEEP}
            options = {"capture_output": True, "text": True, "env": usual}
            result = subprocess.run(command, check=True, **options)
            found[which] = json.loads(result.stdout)
        (a, b), (c, d) = found.values()
        print(
            f"    {prompt}:128, vocabulary {vocab:,}: standard {a:,.0f} and {b:,.0f}, ours", end=""
        )
        print(f" {c:,.0f} and {d:,.0f}; ratio {c / a:.3f} and {d / b:.3f}", flush=True)


# Growth.


def growth(args):
    print("\nSeconds of a step, reference cached, as one size doubles")
    base = {"prompt": 192, "response": 64, "pairs": 4, "vocabulary": 32000, "width": 512}
    for size, value in base.items():
        actions = {}
        for factor in (0.5, 1, 2, 4):
            s = base | {size: int(value * factor)}
            width = {"hidden_size": s["width"], "intermediate_size": s["width"] * 43 // 16}
            width |= {"num_attention_heads": s["width"] // 64}
            model = new_model(s["vocabulary"], **width, num_key_value_heads=s["width"] // 64)
            sizes = [[s["prompt"], s["response"], s["response"]]] * s["pairs"]
            trees = draw_trees(sizes, s["vocabulary"])
            actions[s[size]] = make_step(our_logps(trees), model, None, False)
        seconds = in_turn(actions, args.rounds)
        medians = [f"{n:,}: {statistics.median(t):.2f}" for n, t in seconds.items()]
        print(f"    {size:11} " + "   ".join(medians), flush=True)


# Sampling.

SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOL |= {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}


def sampling(args):
    import transformers

    print("\nNew tokens per second against transformers' generate: prompts of 32 tokens, 64 new")
    for name, vocab, shape in (("tiny", 640, SMALL), ("135M", 49152, SMOL)):
        model = new_model(vocab, **shape, tie_word_embeddings=True).eval()
        with tempfile.TemporaryDirectory() as directory:
            save_pretrained(model, directory)
            other = transformers.AutoModelForCausalLM.from_pretrained(directory).to(DEVICE).eval()
        for batch in (1, 32):
            prompts = [tree[0] for tree in draw_trees([[32]] * batch, vocab)]
            ids = torch.tensor(prompts, device=DEVICE)
            length = {"min_new_tokens": 64, "max_new_tokens": 64, "pad_token_id": 0}
            theirs = lambda o=other, i=ids, n=length: o.generate(i, do_sample=True, top_k=0, **n)
            ours = lambda m=model, p=prompts, **o: generate(m, p, 64, [], **o)
            actions = {"theirs": theirs, "ours": ours, "compiled": lambda f=ours: f(compile=True)}
            with torch.no_grad():
                seconds = in_turn(actions, args.rounds)
            speed = batch * 64 / statistics.median(seconds["ours"])
            print(f"    {name}, batch {batch}: {speed:,.0f} a second of CPU time, ", end="")
            print(f"{ratio(seconds, 'theirs', 'ours')} times as many; ", end="")
            print(f"compiled {ratio(seconds, 'theirs', 'compiled')}", flush=True)


# The rest.


def plan(args):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 0.6, 10**6), 16, 2048).astype(np.int64)
    begun, most, tokens = time.perf_counter(), 0, 0
    order = data.order_of(0, len(lengths), seed=0)
    for first in range(0, len(order), 64):
        step = data.pack(lengths, order[first : first + 64], 16384, 8)
        loads = [lengths[examples].sum() for rank in step for examples in rank]
        most, tokens = most + len(loads) * max(loads), tokens + sum(loads)
    seconds = time.perf_counter() - begun
    print(
        f"\nAn epoch of a million pairs planned and packed for 8 ranks: {seconds:.1f} s; the",
        end="",
    )
    print(f" longest micro-batch of a step is {most / tokens - 1:.1%} above the mean")


def start(args):
    print("\nSeconds until --help, against `import torch`")
    python = lambda *command: (
        lambda: subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, check=True
        )
    )
    scripts = {name: python(f"{name}.py", "--help") for name in ("train", "sample")}
    actions = {"torch": python("-c", "import torch")} | scripts
    seconds = {name: [] for name in actions}
    for _ in range(args.rounds):
        for name, action in actions.items():
            begun = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - begun)
    for name in scripts:
        print(f"    {name}.py: {ratio(seconds, name, 'torch')} times as long")


def ranks(args):
    """The real trainer, one thread each, as many pairs for each process."""
    print("\nSeconds of a step of train.py, FSDP on gloo with two processes, against one process")
    with tempfile.TemporaryDirectory() as directory:
        here, seconds = Path(directory), {}
        names, trees = ("prompt", "chosen", "rejected"), draw_trees([[192, 64, 64]] * 48)
        rows = "".join(json.dumps(dict(zip(names, tree))) + "\n" for tree in trees)
        (here / "pairs.jsonl").write_text(rows)
        save_pretrained(new_model().cpu(), here / "model")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        fixed = [str(ROOT / "train.py"), f"--init_from={here / 'model'}", "--max_steps=4"]
        fixed += [f"--data={here / 'pairs.jsonl'}", "--sft_epochs=0", "--epochs=4", "--log_every=1"]
        kinds = {  # at a time, launcher, flags
            "one": (1, [], ["--batch_size=24"]),
            "two that share nothing": (2, [], ["--batch_size=24"]),
            "FSDP": (1, launcher, ["--batch_size=48"]),
        }
        for name, (copies, before, flags) in kinds.items():
            outs = [here / f"{name}{n}" / "out" for n in range(copies)]
            command = [sys.executable, *before, *fixed, *flags]
            started = [
                subprocess.Popen(
                    [*command, f"--out_dir={out}"], env=environment, stdout=subprocess.DEVNULL
                )
                for out in outs
            ]
            assert not any(process.wait() for process in started)
            lines = (outs[0] / "metrics.jsonl").read_text().splitlines()
            pairs = 48 if before else 24
            seconds[name] = [pairs / json.loads(line)["pairs_per_second"] for line in lines][1:]
            print(f"    {name}: {ratio(seconds, name, 'one')} times as long", flush=True)


def startup(args):
    """What a run does with its data before it has a model: a file of text, two limits."""
    from extra.encoded import encode_once
    from extra.guard import sha256

    count, rng = 100_000, np.random.default_rng(0)
    words = np.array(
        ["".join(rng.choice(list("etaoinshrdlu"), n)) for n in rng.integers(2, 9, 4000)]
    )
    text = lambda n: " ".join(words[rng.zipf(1.2, n) % len(words)])
    with tempfile.TemporaryDirectory() as directory:
        here, names = Path(directory), ("prompt", "chosen", "rejected")
        rows = (dict(zip(names, map(text, (60, 40, 40)))) for _ in range(count))
        with open(here / "pairs.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        examples = lambda: data.read_preferences(str(here / "pairs.jsonl"))
        data.Tokenizer.train(itertools.islice(examples(), 1000), here, 2000)
        tokenizer = data.Tokenizer(here)
        settings = SimpleNamespace(resume=False, rendered=False)
        run = SimpleNamespace(out=here, settings=settings, about={})
        run.alone = lambda work, *inputs: work(*inputs)
        run.watch = lambda items, *_: items
        seconds, found = [], []
        for settings.resume in (False, True):
            begun = time.perf_counter()
            run.about["digests"] = {"data": sha256(here / "pairs.jsonl")}
            dataset, _ = encode_once(run, "pairs", examples(), tokenizer, 512, 256)
            seconds.append(time.perf_counter() - begun)
            found.append((len(dataset), len(dataset.tokens)))
        assert found[0] == found[1]
        pairs, tokens = found[0]
        print(f"\nEncoding {pairs:,} pairs, {tokens:,} tokens: {seconds[0]:.1f} s; ", end="")
        print(f"found again in {seconds[1] * 1000:.1f} ms")


SECTIONS = {f.__name__: f for f in (steps, memory, growth, sampling, plan, ranks, start, startup)}


def main():
    layout = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    cases = ",".join([*CASES, "mixture"])
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (default 5)")
    parser.add_argument("--cases", default=cases, help=f"prompt:response lengths (default {cases})")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--default_malloc", action="store_true", help="let glibc give memory back")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.sections) - SECTIONS.keys():
        parser.error(f"no section {min(unknown)}; there are {', '.join(SECTIONS)}")
    if args.measure:
        which, prompt, vocab = args.measure
        return measure(which, int(prompt), int(vocab))
    if not args.default_malloc and not KEEP.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)
    torch.set_num_threads(args.threads)
    what = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{args.threads} CPU threads"
    print(f"torch {torch.__version__}, {what}")
    for name in args.sections or SECTIONS:
        SECTIONS[name](args)
    return None


if __name__ == "__main__":
    main()
