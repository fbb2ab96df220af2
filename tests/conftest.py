"""What the tests share: a tokenizer, data sets, models, and the scripts as processes."""

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
HANGS = 900  # seconds after which a process is taken to hang
torch.backends.mps.is_available = lambda: False  # the tests are the CPU's; CUDA has its own

import data  # noqa: E402
from extra import checkpoints  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402

SHAPES = {  # tied and untied, multi-head and grouped-query, head_dim other than C / H; Qwens
    "tied": ModelConfig(97, 32, 64, 2, 4, 4, 8, tie_word_embeddings=True),
    "grouped": ModelConfig(97, 32, 48, 3, 4, 2, 16, rope_theta=500.0),
    "biased": ModelConfig(97, 32, 48, 2, 4, 1, 8, tie_word_embeddings=True, model_type="qwen2"),
    "normed": ModelConfig(97, 32, 48, 2, 4, 2, 16, rms_norm_eps=1e-2, model_type="qwen3"),
}


@torch.no_grad()
def init_small(model: Transformer, seed: int = 1) -> Transformer:
    """GPT-2's initial weights, N(0, 0.02²), smaller in the residual projections; norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        if parameter.dim() == 2:
            std = 0.02 / (2 * len(model.layers)) ** (residual / 2)
            parameter.normal_(0, std, generator=generator)
        else:
            parameter.fill_(0 if name.endswith("bias") else 1)
    return model


def make_model(config: ModelConfig, scale: float = 8.0) -> Transformer:
    """A random model in float64 whose probabilities are far from uniform."""
    model = init_small(Transformer(config)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() == 2 else 1.0)
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model


def save_tokenizer(tokenizer: data.Tokenizer, directory) -> Path:
    """Copy a tokenizer and what belongs to it into a directory, which is made; returns it."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    (Path(directory) / "tokenizer.model").write_bytes(tokenizer.proto)
    for name in checkpoints.TOKENIZER_FILES:
        if (tokenizer.path.parent / name).is_file():
            shutil.copy(tokenizer.path.parent / name, directory)
    return Path(directory)


def random_dataset(sizes: list[list[int]], vocab: int = 97, seed: int = 0) -> data.Dataset:
    """Trees of random ids; each of sizes is [prompt length, response lengths …]."""
    rng = np.random.default_rng(seed)
    return data.to_dataset([[rng.integers(3, vocab, n).tolist() for n in tree] for tree in sizes])


def run_script(
    *arguments, ranks: int = 1, expect: int = 0, cwd=None
) -> subprocess.CompletedProcess:
    """Run train.py or sample.py as a user would; with ranks > 1 under torchrun."""
    script, *rest = map(str, arguments)
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(ROOT / script), *rest]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=HANGS,
        env=environment,
        cwd=cwd,
        check=False,
    )
    assert result.returncode == expect, (
        f"exit {result.returncode}:\n{result.stdout}\n{result.stderr}"
    )
    return result


def assert_same_change(before, one, many, most: float = 0.005):
    """Of each tensor of two trainings from the same weights, {name: tensor} each, up to that part of
    it. AdamW divides by √v: where the gradient is rounding alone, so is the step, and no bound for
    single numbers would hold; a lost or doubled gradient is a difference of the size of the change."""
    assert before.keys() == one.keys() == many.keys()
    for name, start in before.items():
        apart, change = (one[name] - many[name]).norm(), (one[name] - start).norm()
        assert apart <= most * change, f"{name}: {apart:.3g} apart after a change of {change:.3g}"


def run_here(*arguments, expect: int = 0) -> SimpleNamespace:
    """As `run_script`, in this process: a new one costs seconds."""
    script, *rest = map(str, arguments)
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    out, err, status, before = io.StringIO(), io.StringIO(), 0, sys.argv
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sys.argv = [script, *rest]
            main(rest) if script == "train.py" else main()
        except SystemExit as end:
            status = end.code or 0
        finally:
            sys.argv = before
    assert status == expect, f"exit {status}:\n{out.getvalue()}\n{err.getvalue()}"
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def read_metrics(out_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def turns(text: str) -> list[dict]:
    """'u: hi | a: yes' -> messages."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    pairs = (turn.split(": ", 1) for turn in text.split(" | "))
    return [{"role": roles[role], "content": content} for role, content in pairs]


def sequences(dataset: data.Dataset) -> list[list[int]]:
    """All prompts and responses of a data set, in its order, as ids; ~id: read, but not learnt."""
    ids = np.where(dataset.learnt, dataset.tokens, ~dataset.tokens)
    bounds = dataset.offsets.tolist()
    return [ids[a:b].tolist() for a, b in zip(bounds, bounds[1:])]


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """What a module's fixture draws does not depend on the tests that ran before it."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signals():
    """A run in this process that was not ended by `main` leaves its handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> data.Tokenizer:
    texts = ["The film is great, and the plot was slow.", "A hotel  was bad!", "2+2=4"] * 20
    directory = tmp_path_factory.mktemp("tokenizer")
    data.Tokenizer.train([data.Example(text, ()) for text in texts], directory, 320)
    return data.Tokenizer(directory)
