"""Every flag of sample.py acts as it says, and every number that it prints is computed again here:
from the full logits of one sequence at a time, by plain sums."""

import argparse
import copy
import json
import math
import re
import shlex
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHAPES, make_model, random_dataset, save_tokenizer, turns, write_jsonl
from test_chat import ADDED, CHATML, IM, ZEPHYR, type_in, user_defined, with_files
from test_model import plain_logits

import data
import sample
from extra import cache, chat, reward
from model import CheckpointError, ModelConfig, load_pretrained, save_pretrained

SAID = turns("u: hi | a: lo | u: 2+2?")
ROWS = [  # of several formats
    {"prompt": "The film", "chosen": " is great.", "rejected": " was bad!"},
    {"prompt": SAID},
    {"prompt": [5, 6, 7], "response": [8, 9, 2]},
]


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):
    """A directory with a policy and a reference: random models far apart, and their tokenizer."""
    where = tmp_path_factory.mktemp("place")
    config = ModelConfig(tokenizer.vocab_size, 32, 64, 2, 4, 2, 8)
    for name, scale in (("policy", 16.0), ("reference", 4.0)):
        torch.manual_seed(int(scale))
        save_pretrained(make_model(config, scale).float(), where / name)
        save_tokenizer(tokenizer, where / name)
    write_jsonl(where / "rows.jsonl", ROWS)
    write_jsonl(where / "texts.jsonl", ROWS[:1])
    return where


@pytest.fixture
def run(place, monkeypatch, capsys):
    """sample.py in this process, where the checkpoints are; returns what it prints."""
    monkeypatch.chdir(place)

    def main(*flags) -> str:
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
        capsys.readouterr()
        sample.main()
        return capsys.readouterr().out

    return main


@pytest.fixture
def drawn(monkeypatch):
    """[prompt, response] as ids of all that is sampled, in order."""
    trees, generate = [], sample.generate

    def record(model, prompts, *arguments, **options):
        new = generate(model, prompts, *arguments, **options)
        trees.extend(map(list, zip(copy.deepcopy(prompts), new)))
        return new

    monkeypatch.setattr(sample, "generate", record)
    return trees


def both_models(place) -> list:
    return [load_pretrained(place / name).double() for name in ("policy", "reference")]


def plain_logp(model, prompt: list[int], response: list[int]) -> float:
    """log π(y|x), of what is learnt of y; of what is only read there is ~id."""
    read = [~token if token < 0 else token for token in response]
    with torch.no_grad():
        logps = plain_logits(model, prompt + read).log_softmax(-1)
    rows = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return sum(logps[row, token].item() for row, token in zip(rows, response) if token >= 0)


def plain_rewards(models, tree: list[list[int]], beta: float) -> list[float]:
    """β·log(π/π_ref) of each response of a tree."""
    policy, reference = models
    prompt, *responses = tree
    ratio = lambda y: plain_logp(policy, prompt, y) - plain_logp(reference, prompt, y)
    return [beta * ratio(response) for response in responses]


def plain_divergence(models, prompt: list[int], response: list[int]) -> float:
    """Over the tokens of a response the sum of KL(π‖π_ref) of what could come next."""
    with torch.no_grad():
        p, q = (plain_logits(m, prompt + response).softmax(-1).numpy() for m in models)
    total = 0.0
    for row in range(len(prompt) - 1, len(prompt) + len(response) - 1):
        total += sum(p[row] * np.log(p[row] / q[row]))
    return total


def near(expected, digits: int = 4):
    """As float32 computes it and so many digits show it."""
    return pytest.approx(expected, rel=1e-4, abs=0.6 * 10**-digits)


# The flags


ANY = object()  # another value than before; which one another test says
FIRST, HOTEL = ["film"], ["film", "hotel"]
CHAT = ["\n\nHuman: hello\n\nAssistant:"]
FILE = ["The film", "\n\nHuman: hi\n\nAssistant: lo \n\nHuman: 2+2?\n\nAssistant:", [5, 6, 7]]
TWO = "policy --compare=reference --prompt=film"
SCORE = "policy --compare=reference --score=texts.jsonl"
CASES = {  # flags without it, with it, and what is another then
    "checkpoint": ("policy --prompt=film", "reference --prompt=film", {"loaded": ["reference"], "by": ["reference"], "printed": ANY}),
    "prompt": ("policy --prompt=film", "policy --prompt=film --prompt=hotel", {"prompts": [HOTEL], "printed": ANY}),
    "prompts": ("policy --prompt=film", "policy --prompts=rows.jsonl --prompt=film", {"prompts": [FIRST + FILE], "printed": ANY}),
    "chat": ("policy --prompt=film", "policy --chat", {"prompts": [CHAT], "told": [True], "printed": ANY}),
    "system": ("policy --chat", "policy --chat --system=Be.", {"prompts": [["Be." + CHAT[0]]]}),
    "compare": ("policy --prompt=film", TWO, {"loaded": ["policy", "reference"], "by": ["policy", "reference"], "prompts": [FIRST, FIRST], "printed": ANY}),
    "score": (f"{TWO} --best_of=2", SCORE, {"by": [], "prompts": [], "scored": ["policy", 3, "reference", 3], "printed": ANY}),
    "best_of": (TWO, f"{TWO} --best_of=3", {"by": ["policy"], "prompts": [FIRST * 3], "scored": ["policy", 2, 2, 2, "reference", 2, 2, 2], "printed": ANY}),
    "kl": (TWO, f"{TWO} --kl", {"by": ["policy"], "prompts": [FIRST], "kl": [("policy", "reference")], "printed": ANY}),
    "out": ("policy --prompt=film", "policy --prompt=film --out={out}", {"written": ANY, "printed": ANY}),
    "beta": (SCORE, f"{SCORE} --beta=0.3", {"printed": ANY}),
    "n": ("policy --prompt=film --prompt=hotel", "policy --prompt=film --prompt=hotel --n=2", {"prompts": [["film", "film", "hotel", "hotel"]], "printed": ANY}),
    "max_new_tokens": ("policy --prompt=film", "policy --prompt=film --max_new_tokens=7", {"max_new_tokens": [7]}),
    "temperature": ("policy --prompt=film", "policy --prompt=film --temperature=0.5", {"temperature": [0.5]}),
    "top_k": ("policy --prompt=film", "policy --prompt=film --top_k=5", {"top_k": [5]}),
    "top_p": ("policy --prompt=film", "policy --prompt=film --top_p=0.5", {"top_p": [0.5]}),
    "compile": ("policy --prompt=film", "policy --prompt=film --compile", {"compile": [True]}),
    "seed": ("policy --prompt=film", "policy --prompt=film --seed=5", {"seed": ANY}),
}  # fmt: skip
SAMPLER = {"max_new_tokens": 256, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "compile": False}


def parser_of(monkeypatch) -> argparse.ArgumentParser:
    """The parser that sample.py makes."""
    made, parse = [], argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch:
        keep = lambda self, arguments: made.append(self) or parse(self, arguments)
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        sample.parse_arguments(["checkpoint", "--prompt=x"])
    return made[0]


def test_every_flag_has_a_case(monkeypatch):
    """And the default that its help names."""
    actions = [a for a in parser_of(monkeypatch)._actions if a.dest != "help"]
    assert {action.dest for action in actions} == CASES.keys()
    named = {}
    for action in actions:
        assert action.option_strings in ([], [f"--{action.dest}"]) and action.help
        if found := re.search(r"\(default (\d+)", action.help):
            named[action.dest] = float(found[1])
            assert action.default == named[action.dest]
    assert named.keys() == {"n", "max_new_tokens", "temperature", "top_k", "top_p", "seed"}


@pytest.fixture
def observe(run, place, tokenizer, tmp_path, monkeypatch):
    """All that can be seen of a run of sample.py, whose samples are invented: the text of a sample
    names its model and counts the prompts."""

    def look(flags: str) -> dict:
        seen = {key: [] for key in ("loaded", "by", "prompts", "stops", "seed", "told", *SAMPLER)}
        seen |= {"scored": [], "kl": []}
        names, out = {}, tmp_path / "out.jsonl"
        load, logps, divergence = sample.load, reward.response_logps, reward.measure_kl

        def spy_load(directory):
            model, found = load(directory)
            names[model] = str(directory)
            seen["loaded"].append(str(directory))
            return model, found

        def spy_generate(model, prompts, max_new_tokens, eos_id, **options):
            seen["by"].append(names[model])
            as_text = lambda ids: ids if ids == [5, 6, 7] else tokenizer.decode(ids)
            seen["prompts"].append(list(map(as_text, prompts)))
            seen["stops"].append(eos_id)
            seen["told"].append(bool(options.pop("on_token", None)))
            for name, value in (options | {"max_new_tokens": max_new_tokens}).items():
                seen[name].append(value)
            texts = [f" {names[model]} says {n}" for n in range(len(prompts))]
            encoded = [tokenizer.encode(text, continuation=True) for text in texts]
            return [[*ids, tokenizer.eos_id] for ids in encoded]

        def spy_logps(model, dataset):
            seen["scored"] += [names[model], *np.diff(dataset.trees).tolist()]
            return logps(model, dataset)

        def spy_divergence(policy, reference, trees):
            seen["kl"].append((names[policy], names[reference]))
            return divergence(policy, reference, trees)

        with monkeypatch.context() as patch:
            patch.setattr(sample, "load", spy_load)
            patch.setattr(sample, "generate", spy_generate)
            patch.setattr(reward, "response_logps", spy_logps)
            patch.setattr(reward, "measure_kl", spy_divergence)
            type_in(patch, ["hello"])
            seen["printed"] = run(*flags.format(out=out).split())
        seen["written"] = out.read_text() if out.exists() else None
        return seen

    return look


@pytest.mark.parametrize("name", CASES)
def test_a_flag_changes_what_it_says_and_nothing_else(observe, name):
    flags, more, changes = CASES[name]
    before, after = observe(flags), observe(more)
    for key, value in before.items():
        if key not in changes:
            calls = max(len(before["by"]), len(after["by"]))
            per_call = key in SAMPLER or key in ("stops", "seed", "told")
            if per_call and len(before["by"]) != len(after["by"]):
                assert len(set(map(str, value + after[key]))) == 1, key
                assert max(len(value), len(after[key])) == calls, key
            else:
                assert after[key] == value, key
        else:
            assert after[key] != value, key
            assert changes[key] is ANY or after[key] == changes[key], key
    for key, value in SAMPLER.items():
        assert set(before[key]) <= {value}, f"the default of {key}"


def test_seeds(run, drawn):
    """The same samples from one seed, others from another; without a seed those of 0."""

    def samples(*flags):
        drawn.clear()
        run("policy", "--prompt=film", "--n=20", "--max_new_tokens=5", *flags)
        return copy.deepcopy(drawn)

    first = samples("--seed=3")
    assert samples("--seed=3") == first != samples("--seed=4")
    assert samples() == samples("--seed=0") != first
    assert len(set(map(str, first))) > 15


def test_the_examples_of_the_help_are_taken(monkeypatch, tmp_path):
    """Every line of them, as its words are."""
    monkeypatch.chdir(tmp_path)
    text = parser_of(monkeypatch).description
    lines = [line.strip() for line in text.splitlines() if "python sample.py" in line]
    assert len(lines) == 7
    for line in lines:
        command = re.split(r"\s{3,}", line)[0]  # what it does is said beside it
        args = sample.parse_arguments(shlex.split(command)[2:])
        assert args.checkpoint == "out/mine"


# Refusals


MODES = {  # what is asked for, and by flag why it is refused beside that; others are taken
    "--prompt=x": {"chat": "give", "score": "give", "system": "belongs to --chat", "best_of": "name it", "kl": "name it", "beta": "nothing is scored"},
    "--prompts=x": {"chat": "give", "score": "give", "system": "belongs to --chat", "best_of": "name it", "kl": "name it", "beta": "nothing is scored"},
    "--prompt=x --compare=y": {"chat": "give", "score": "give", "system": "belongs to --chat", "out": "--compare would be ignored: candidates come from one", "beta": "nothing is scored"},
    "--chat": {"prompt": "give", "prompts": "give", "score": "give", "compare": "one checkpoint", "n": "one checkpoint", "out": "one checkpoint", "best_of": "name it", "kl": "name it", "beta": "nothing is scored"},
    "--score=x --compare=y": {"prompt": "give", "prompts": "give", "chat": "give", "system": "belongs to --chat", "best_of": "need prompts", "kl": "need prompts"}
    | dict.fromkeys(["n", "max_new_tokens", "temperature", "top_k", "top_p", "compile", "seed"], "draws no samples"),
    "--prompt=x --compare=y --best_of=2": {"chat": "give", "score": "give", "system": "belongs to --chat", "n": "says how many", "kl": "--best_of would be ignored: --kl needs plain samples"},
    "--prompt=x --compare=y --kl": {"chat": "give", "score": "give", "system": "belongs to --chat", "beta": "nothing is scored", "out": "--out would be ignored"}
    | dict.fromkeys(["best_of", "temperature", "top_k", "top_p"], "--kl needs plain samples"),
    "--prompt=x --out={out}": {"chat": "give", "score": "give", "system": "belongs to --chat", "compare": "candidates come from one", "best_of": "name it", "kl": "name it", "beta": "nothing is scored"},
    "--prompt=x --temperature=0": {"chat": "give", "score": "give", "system": "belongs to --chat", "best_of": "name it", "kl": "name it", "beta": "nothing is scored"}
    | dict.fromkeys(["top_k", "top_p", "seed", "n"], "--temperature=0 is greedy"),
    "--prompt=x --compare=y --temperature=0": {"chat": "give", "score": "give", "system": "belongs to --chat", "kl": "--kl needs plain samples", "out": "from one", "beta": "nothing is scored"}
    | dict.fromkeys(["top_k", "top_p", "seed", "n", "best_of"], "--temperature=0 is greedy"),
    "--chat --temperature=0": {"prompt": "give", "prompts": "give", "score": "give", "compare": "one checkpoint", "n": "one checkpoint", "out": "one checkpoint", "best_of": "name it", "kl": "name it", "beta": "nothing is scored"}
    | dict.fromkeys(["top_k", "top_p", "seed"], "--temperature=0 is greedy"),
}  # fmt: skip
VALUES = {
    "prompt": "=z", "prompts": "=z", "chat": "", "system": "=z", "compare": "=z", "score": "=z", "best_of": "=3", "kl": "",
    "out": "={out}", "beta": "=0.2", "n": "=3", "max_new_tokens": "=9", "temperature": "=0.5", "top_k": "=4", "top_p": "=0.9",
    "compile": "", "seed": "=1",
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_flags_are_refused_where_they_would_be_ignored(mode, tmp_path):
    """Each flag beside each thing that can be asked for; all others are taken, with their value."""
    assert VALUES.keys() | {"checkpoint"} == CASES.keys()
    for name, value in VALUES.items():
        if f"--{name}" in mode.replace("=", " ").split():
            continue
        words = f"checkpoint {mode} --{name}{value}".format(out=tmp_path / "out").split()
        if name in MODES[mode]:
            with pytest.raises(data.DataError) as error:
                sample.parse_arguments(words)
            sentence = str(error.value)
            assert MODES[mode][name] in sentence and "\n" not in sentence
            if "would be ignored" in sentence:
                given = [word.split("=")[0] for word in words]
                assert sentence.split(maxsplit=1)[0] in given
        else:
            taken = getattr(sample.parse_arguments(words), name)
            assert taken not in (None, False, [], "")


@pytest.mark.parametrize(("flags", "good", "bad"), [
    ("--prompt=x --n=", "1 2", "0 -1"),
    ("--prompt=x --compare=y --best_of=", "1 2", "0 -1"),
    ("--prompt=x --max_new_tokens=", "1 2", "0 -1"),
    ("--prompt=x --temperature=", "0 0.1 9", "-0.1 nan inf -inf"),
    ("--prompt=x --top_k=", "0 1", "-1"),
    ("--prompt=x --top_p=", "0.001 1", "0 1.01 -0.5 nan inf"),
    ("--score=x --compare=y --beta=", "0 0.1 9", "-0.1 nan inf"),
])  # fmt: skip
def test_values_out_of_range_are_refused(flags, good, bad):
    for value in good.split():
        sample.parse_arguments(["checkpoint", *(flags + value).split()])
    name = flags.split("--")[-1][:-1]
    for value in bad.split():
        with pytest.raises(data.DataError, match=f"--{name} must be"):
            sample.parse_arguments(["checkpoint", *(flags + value).split()])


@pytest.mark.parametrize("flags", ["", "--compare=y", "--n=2", "--kl --compare=y", "--best_of=2"])
def test_something_must_be_asked_for(flags):
    with pytest.raises(data.DataError, match="give --prompt or --prompts, or --chat, or --score"):
        sample.parse_arguments(["checkpoint", *flags.split()])


@pytest.mark.parametrize("flags", ["--score=x", "--prompt=x --kl", "--prompts=x --best_of=2"])
def test_a_reward_needs_a_reference(flags):
    with pytest.raises(data.DataError, match="against a reference: name it with --compare"):
        sample.parse_arguments(["checkpoint", *flags.split()])
    sample.parse_arguments(["checkpoint", "--compare=y", *flags.split()])


def test_out_is_opened_before_the_work(tmp_path):
    """What cannot be written is noticed at once, and what is there stays until there is more."""
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    sample.parse_arguments(["checkpoint", "--prompt=x", f"--out={out}"])
    assert out.read_text() == "old"
    with pytest.raises(OSError, match="No such file"):
        sample.parse_arguments(["checkpoint", "--prompt=x", f"--out={tmp_path}/none/y"])
    sample.parse_arguments(["checkpoint", "--prompt=x"])


def test_errors_are_one_sentence_and_a_status(run, monkeypatch, capsys):
    for error, status, sentence in (
        (data.DataError("a\n b"), 2, "sample.py: a b\n"),
        (CheckpointError("no weights"), 2, "sample.py: no weights\n"),
        (OSError("no disk"), 2, "sample.py: no disk\n"),
        (ImportError("no room"), 2, "sample.py: no room\n"),
        (KeyboardInterrupt(), 130, ""),
    ):

        def fail(*arguments, error=error):
            raise error

        monkeypatch.setattr(sample, "load", fail)
        with pytest.raises(SystemExit) as ended:
            run("policy", "--prompt=film")
        printed = capsys.readouterr()
        assert (ended.value.code, printed.out, printed.err) == (status, "", sentence)


# The sampler


def plain_distribution(logits, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Of one row: the tempered softmax of the k largest, of which the most probable are kept until
    they have the mass."""
    order = np.argsort(-logits)[: top_k or len(logits)]
    weights = np.exp((logits[order] - logits.max()) / temperature)
    weights /= weights.sum()
    kept, mass = np.zeros(len(logits)), 0.0
    for i, weight in zip(order, weights):
        if mass < top_p:
            kept[i] = weight
        mass += weight
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (0.5, 0, 0.8), (2.0, 0, 0.8), (2.0, 5, 0.7),
    (0.5, 4, 0.95), (2.0, 3, 1.0), (1.0, 99, 0.9), (1.0, 1, 1.0), (1.0, 0, 1e-6),
])  # fmt: skip
def test_frequencies_are_those_of_a_plain_sampler(temperature, top_k, top_p):
    """Of four rows with logits of their own, many times each, mixed in one batch."""
    rows, times, pieces = 4, 20_000, 11
    logits = np.random.default_rng(5).normal(0, 1.5, (rows, pieces))
    batch = torch.tensor(logits).float().repeat(times, 1)
    generator = torch.Generator().manual_seed(1)
    ids = sample.sample_tokens(batch, generator, temperature, top_k, top_p).numpy()
    kept_by_temperature = []
    for row in range(rows):
        expected = plain_distribution(logits[row], temperature, top_k, top_p)
        share = np.bincount(ids[row::rows], minlength=pieces) / times
        assert not share[expected == 0].any() and share[expected > 1e-3].all()
        error = np.sqrt(expected * (1 - expected) / times)
        assert (np.abs(share - expected) <= 5 * error + 1e-12).all()
        plain = plain_distribution(logits[row], 1.0, top_k, top_p)
        kept_by_temperature.append((plain > 0).sum() != (expected > 0).sum())
    if 1e-3 < top_p < 1 and temperature != 1:
        assert any(kept_by_temperature), "here the order of temperature and nucleus matters"


def test_ties():
    """A nucleus ends where its mass is reached; of equal ones top-k takes all."""

    def kept(logits, **shape):
        batch = torch.tensor([logits]).repeat(2000, 1)
        return set(sample.sample_tokens(batch, torch.Generator().manual_seed(0), **shape).tolist())

    assert len(kept([0.0] * 4, top_p=0.5)) == 2
    assert len(kept([0.0] * 4, top_p=0.51)) == 3
    assert kept([2.0, 1.0, 1.0, 0.0], top_k=2) == {0, 1, 2}
    assert kept([-math.inf, 0.0, 0.0, -math.inf]) == {1, 2}, "what has no probability never comes"


def test_greedy_asks_no_generator():
    logits, generator = torch.randn(50, 9), torch.Generator().manual_seed(3)
    before = generator.get_state()
    for shape in ({}, {"top_k": 3}, {"top_p": 0.1}):
        ids = sample.sample_tokens(logits, generator, temperature=0, **shape)
        assert ids.tolist() == [row.argmax() for row in logits.numpy()]
    assert torch.equal(generator.get_state(), before)
    assert not torch.equal(sample.sample_tokens(logits, generator), ids)


def test_every_step_is_shaped():
    """Each token of each sample is among those that temperature, top-k and top-p leave."""
    model = make_model(SHAPES["grouped"], scale=2.0).float()
    shape = {"temperature": 2.0, "top_k": 4, "top_p": 0.7}
    prompts = [[5, 6, 7], [3]] * 60
    samples = sample.generate(model, prompts, 3, set(), seed=2, **shape)
    model.double()
    found = {}
    for prompt, new in zip(prompts, samples):
        for n, token in enumerate(new):
            found.setdefault((*prompt, *new[:n]), set()).add(token)
    for prefix, tokens in found.items():
        with torch.no_grad():
            logits = plain_logits(model, list(prefix))[-1].numpy()
        left = set(np.flatnonzero(plain_distribution(logits, **shape)))
        assert tokens <= left
        if len(prefix) in (1, 3) and prefix in ((3,), (5, 6, 7)):
            assert tokens == left and 1 < len(left) <= 4


def test_each_sequence_is_cut_where_it_ends():
    """By any of several ids, which it keeps, or else after max_new_tokens; its mates run on, and
    nobody draws another token than without an end. Sampling stops when all have ended."""
    model, stops = make_model(SHAPES["tied"], scale=2.0).float(), set(range(2, 90, 9))
    prompts, steps = [[5, 6], [3], [9, 9, 9]] * 3, []
    draw = lambda n, ends: sample.generate(model, prompts, n, ends, seed=1, on_token=steps.append)
    endless = draw(90, set())
    assert {len(ids) for ids in endless} == {90}
    for limit in (1, 8, 90):
        steps.clear()
        found = draw(limit, stops)
        for ids, whole in zip(found, endless):
            ends = [n for n, i in enumerate(whole[:limit]) if i in stops]
            assert ids == whole[: ends[0] + 1 if ends else limit]
        assert len(steps) == max(map(len, found))
        assert len({len(ids) for ids in found}) > 1 or limit == 1
    assert len(steps) < 90, "all have ended before"
    assert len({ids[-1] for ids in found}) > 3


def test_only_conversations_end_with_a_turn(tokenizer, tmp_path, monkeypatch):
    """Beside EOS; in a batch with a conversation all do."""
    config = {"chat_template": CHATML, "added_tokens_decoder": ADDED}
    t, found = with_files(tokenizer, tmp_path / "t", config, {}), []
    model = SimpleNamespace(config=SHAPES["tied"])

    def generate(model, prompts, max_new_tokens, eos_id, **options):
        found.append((max_new_tokens, set(eos_id), options))
        return [[t.eos_id] for _ in prompts]

    monkeypatch.setattr(sample, "generate", generate)
    for prompts in (["a", [5, 6]], [turns("u: a")], ["a", turns("u: a")]):
        trees = sample.draw(model, t, prompts, 9, seed=4, top_k=3)
        assert [tree[1] for tree in trees] == [[t.eos_id]] * len(prompts)
    ends = [{t.eos_id}, {t.eos_id, 321}, {t.eos_id, 321}]
    assert found == [(9, stops, {"seed": found[0][2]["seed"], "top_k": 3}) for stops in ends]


@pytest.mark.parametrize(("shape", "lengths", "new"), [
    ({"num_hidden_layers": 32, "num_key_value_heads": 8, "num_attention_heads": 32, "head_dim": 128}, [40, 900, 3, 7], 2000),
    ({"num_hidden_layers": 3, "num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 16}, [5], 40_000),
    ({"num_hidden_layers": 7, "num_key_value_heads": 1, "num_attention_heads": 8, "head_dim": 40}, [9, 3], 10_000),
])  # fmt: skip
def test_blocks_stay_within_four_gibibytes(shape, lengths, new, tokenizer, monkeypatch):
    """Of keys and values, in float32, for the longest prompt and all that may be sampled; one more
    would not fit. The blocks have seeds of their own, and are put together in order."""
    bytes_per_token = 2 * 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"]
    bytes_per_token *= shape["head_dim"]
    fit = 4 * 2**30 // (bytes_per_token * (max(lengths) + new))
    assert 3 < fit < 1000
    model, seen = SimpleNamespace(config=replace(SHAPES["tied"], **shape)), []

    def generate(model, prompts, max_new_tokens, eos_id, seed):
        seen.append((len(prompts), seed))
        return [[*ids, 7] for ids in prompts]

    monkeypatch.setattr(sample, "generate", generate)
    sizes = (lengths * 3 * fit)[: 2 * fit + 1][::-1]  # a long one in each block
    prompts = [[3 + n % 50] * size for n, size in enumerate(sizes)]
    trees = sample.draw(model, tokenizer, prompts, new, seed=6)
    assert trees == [[ids, [*ids, 7]] for ids in prompts]
    assert [size for size, _ in seen] == [fit, fit, 1]
    assert len({seed for _, seed in seen}) == 3
    again, seen[:] = list(seen), []
    sample.draw(model, tokenizer, prompts, new, seed=6)
    assert seen == again, "the same seeds"
    seen.clear()
    sample.draw(model, tokenizer, prompts[:3], 10**9)
    assert [size for size, _ in seen] == [1, 1, 1], "one at a time, if even that is too much"


def test_no_block_is_that_of_another_seed(tokenizer, monkeypatch):
    """Who draws again with the next seed gets other samples, all of them. At most 1,000 at once."""
    seeds, sizes = [], []

    def generate(model, prompts, max_new_tokens, eos_id, seed):
        seeds.append(seed)
        sizes.append(len(prompts))
        return [[7] for _ in prompts]

    monkeypatch.setattr(sample, "generate", generate)
    for seed in range(4):
        sample.draw(SimpleNamespace(config=SHAPES["tied"]), tokenizer, [[5]] * 2001, 3, seed=seed)
    assert sizes == [1000, 1000, 1] * 4
    assert len(seeds) == len(set(seeds)) == 12


def test_each_step_is_compiled_in_one_shape(monkeypatch):
    """Each new token runs in what torch.compile gives, always beside as many slots."""
    model = make_model(SHAPES["grouped"], scale=2.0).float()
    run = lambda **options: sample.generate(model, [[5, 6, 7], [3]], 6, set(), seed=1, **options)
    plain, compiled, ran = run(), [], []

    def compile(forward):
        compiled.append(forward)

        def step(tokens, positions, attends, rows):
            ran.append((len(tokens), attends[0].func.__self__.mask.shape[-1]))
            return forward(tokens, positions, attends, rows=rows)

        return step

    monkeypatch.setattr(torch, "compile", compile)
    assert run() == plain and not compiled and not ran
    assert run(compile=True) == plain
    assert compiled == [model.forward] and ran == [(2, 3 + 6)] * 5


def test_the_cache_has_the_precision_in_use():
    model = make_model(SHAPES["tied"])
    assert cache.KVCache(model, [[5]], 3).stored.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert cache.KVCache(model.float(), [[5]], 3).stored.dtype == torch.bfloat16


# What is shown


def test_completions_are_printed_under_their_prompts(run, drawn, tokenizer):
    """Prompts of flags, then those of a file in its order; n completions of each, together."""
    flags = ["--prompt=A hotel", "--prompt=", "--prompts=rows.jsonl,texts.jsonl", "--n=2"]
    printed = run("policy", *flags, "--max_new_tokens=6")
    shown = ["A hotel", "", "The film", "2+2?", "[5, 6, 7]", "The film"]
    assert len(drawn) == 12
    texts = [tokenizer.decode(ids, continuation=True) for _, ids in drawn]
    expected = [f"\n{shown[n // 2]}\n{text}\n" for n, text in enumerate(texts)]
    assert printed == "".join(expected)
    prompts = ["A hotel", "", "The film", SAID, [5, 6, 7], "The film"]
    ids = [data.token_ids(data.Example(prompt, ()), tokenizer)[0] for prompt in prompts]
    assert [prompt for prompt, _ in drawn] == [ids[n // 2] for n in range(12)]


def plain_wrap(text: str, width: int) -> list[str]:
    """Words, none of them too long, in lines of at most so many characters."""
    lines = [""]
    for word in text.split():
        if len(f"{lines[-1]} {word}".strip()) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def test_two_checkpoints_side_by_side(run, place, tokenizer, tmp_path, monkeypatch):
    """On the left the checkpoint, on the right the reference, each with its own tokenizer and
    samples under its name; no word is lost. Three prompts, of which the last is answered shortly."""
    texts = ["Zebras quickly jump over fuzzy walls", "x y z"] * 20
    examples = [data.Example(text, ()) for text in texts]
    data.Tokenizer.train(examples, tmp_path, 300)
    other = data.Tokenizer(tmp_path)
    said = {
        "policy": [" The film is great" * 6, " was\nbad", " so"],
        "reference": [" zebras jump", " quickly over fuzzy walls and" * 7, ""],
    }
    owners = {"policy": tokenizer, "reference": other}
    load = lambda name: (SimpleNamespace(name=name, config=SHAPES["tied"]), owners[name])

    def generate(model, prompts, max_new_tokens, eos_id, **options):
        t = owners[model.name]
        assert prompts == [[t.bos_id, *t.encode(p)] for p in ("film", "hotel", "last")]
        return [[*t.encode(text, continuation=True), t.eos_id] for text in said[model.name]]

    monkeypatch.setattr(sample, "load", load)
    monkeypatch.setattr(sample, "generate", generate)
    assert other.encode("film") != tokenizer.encode("film")
    flags = ["--prompt=film", "--prompt=hotel", "--prompt=last"]
    printed = run("policy", "--compare=reference", *flags)
    expected, width = "", 96 // 2 - 2
    for n, prompt in enumerate(("film", "hotel", "last")):
        left, right = (plain_wrap(f"[{name}]{said[name][n]}", width) for name in said)
        expected += f"\n{prompt}\n"
        for row in range(max(len(left), len(right))):
            first, second = ("".join(cell[row : row + 1]) for cell in (left, right))
            expected += f"{first:{width}}  {second}".rstrip() + "\n"
    assert printed == expected
    assert max(map(len, printed.splitlines())) <= 96


def test_candidates_are_the_samples_of_their_prompts(run, tokenizer, tmp_path, monkeypatch):
    """Texts as they are, answers without the template's space, ids to ids; ready to be scored."""
    samples = []

    def generate(model, prompts, max_new_tokens, eos_id, **options):
        for n in range(len(prompts)):
            ids = tokenizer.encode(f" film {n} \n", continuation=True)
            samples.append([*ids, tokenizer.eos_id])
        return samples

    monkeypatch.setattr(sample, "generate", generate)
    out = tmp_path / "candidates.jsonl"
    flags = ["--prompt=A hotel", "--prompts=rows.jsonl", "--n=3"]
    assert run("policy", *flags, f"--out={out}") == f"wrote 4 lines to {out}\n"
    expected = [
        {"prompt": "A hotel", "candidates": [" film 0 \n", " film 1 \n", " film 2 \n"]},
        {"prompt": "The film", "candidates": [" film 3 \n", " film 4 \n", " film 5 \n"]},
        {"prompt": SAID, "candidates": ["film 6", "film 7", "film 8"]},
        {"prompt": [5, 6, 7], "candidates": samples[9:]},
    ]
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    assert len(list(data.read_examples(str(out), "prompts"))) == 4


# Rewards


def test_rewards_belong_to_their_responses():
    """Of trees of many sizes, more than one micro-batch of them."""
    models = [make_model(SHAPES["tied"], scale) for scale in (6.0, 4.0)]
    rng = np.random.default_rng(0)
    sizes = [[1, 1], [1, 2, 5], [4, 3, 3, 3, 1, 9], *([9, 60, 45, 50] for _ in range(50))]
    sizes += [rng.integers(1, 12, rng.integers(2, 6)).tolist() for _ in range(15)]
    dataset = random_dataset([sizes[n] for n in rng.permutation(len(sizes))])
    assert dataset.lengths.sum() > 8192
    trees = [[dataset.tokens[part].tolist() for part in dataset[e]] for e in range(len(dataset))]
    found = reward.implicit_rewards(*models, trees, 0.3)
    assert [len(rewards) for rewards in found] == [len(tree) - 1 for tree in trees]
    plain = [[plain_logp(m, x, y) for x, *responses in trees for y in responses] for m in models]
    for model, expected in zip(models, plain):
        logps = reward.response_logps(model, dataset)
        assert logps.tolist() == pytest.approx(expected, rel=1e-6)
    expected = [0.3 * (p - q) for p, q in zip(*plain)]
    assert np.concatenate(found).tolist() == pytest.approx(expected, rel=1e-6)


WORDS = "The film is great and the plot was slow A hotel bad Ünï 2+2=4".split()


def random_text(rng, least: int, most: int) -> str:
    return "".join(f" {word}" for word in rng.choice(WORDS, rng.integers(least, most)))


def random_pairs(rng, count: int) -> list[dict]:
    text = lambda: random_text(rng, 1, 7)
    return [{"prompt": "The", "chosen": text(), "rejected": text(), "id": n} for n in range(count)]


def trees_of(files: str, tokenizer) -> list[list[list[int]]]:
    return [data.token_ids(e, tokenizer) for e in data.read_examples(files, "prompts")]


def numbers(printed: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+\.?\d*", printed)]


def test_scores_of_rows_of_all_kinds(run, place, tokenizer, tmp_path):
    """Two files of pairs, rankings, candidates and a demonstration: what is printed, by the
    examples' weights as in training, and the rows as they are written."""
    rng = np.random.default_rng(1)
    text = lambda: random_text(rng, 1, 7)
    rankings = [{"prompt": "A", "responses": [text(), text(), text()]} for _ in range(4)]
    rankings[1]["weight"], both = 2.5, {"response": "x", "candidates": ["y"], "soft_label": 0.75}
    candidates = [{"prompt": "A", "candidates": [text() for _ in range(n)]} for n in (2, 4, 1)]
    answers = {"prompt": SAID, "chosen": "4", "rejected": "5 or so", "why": {"Ü": 1}}
    longer = {"prompt": SAID, "chosen": turns("a: 4 | u: why? | a: so"), "rejected": turns("a: 5")}
    ids = {"prompt": [5, 6], "chosen": [7, 8, 2], "rejected": [9, 2]}
    alone = {"prompt": "A", "response": text(), "rewards": "old"}
    several = {"responses": rankings[-1]["responses"][:2], "prompt": "The"}
    pairs = random_pairs(rng, 6)
    pairs[2]["weight"], pairs[4]["weight"] = 0.25, 0
    first = [*pairs[:5], pairs[5] | both, candidates[0], answers, rankings[0]]
    second = [alone, ids, longer, candidates[1], *rankings[1:], several, candidates[2]]
    files = [write_jsonl(tmp_path / "1.jsonl", first), write_jsonl(tmp_path / "2.jsonl", second)]
    out = tmp_path / "scored.jsonl"
    flags = ["--compare=reference", "--score", ",".join(files), "--beta=0.3"]
    printed = run("policy", *flags)
    wrote = f"wrote {len(first + second)} lines to {out}\n"
    assert run("policy", *flags, f"--out={out}") == printed + wrote, "and a file, if asked for"
    found, printed = printed.split("\n", 1)
    assert found == f"{len(first + second)} examples in {','.join(files)}", "nothing was cut"

    rows, models = first + second, both_models(place)
    trees = trees_of(",".join(files), tokenizer)
    rewards = [plain_rewards(models, tree, 0.3) for tree in trees]
    flat = [r for several in rewards for r in several]
    logps = [[plain_logp(models[0], tree[0], y) for y in tree[1:]] for tree in trees]
    shares, weights, margins, chosen, rejected, likely, unlikely = ([] for _ in range(7))
    for row, r, logp in zip(rows, rewards, logps):
        if "chosen" in row or "responses" in row:
            several = [(i, j) for i in range(len(r)) for j in range(i + 1, len(r))]
            mean = lambda values: sum(values) / len(several)
            shares.append(mean([r[i] > r[j] for i, j in several]))
            margins.append(mean([r[i] - r[j] for i, j in several]))
            chosen.append(mean([r[i] for i, _ in several]))
            rejected.append(mean([r[j] for _, j in several]))
            likely.append(mean([logp[i] for i, _ in several]))
            unlikely.append(mean([logp[j] for _, j in several]))
            weights.append(row.get("weight", 1))
    average = lambda values: sum(w * x for w, x in zip(weights, values)) / sum(weights)
    accuracy = average(shares)
    spread = math.sqrt(sum(w**2 * (x - accuracy) ** 2 for w, x in zip(weights, shares)))
    assert accuracy != sum(shares) / len(shares)
    lines = (
        r"(\d+) responses, mean reward (\S+)\n"
        r"accuracy (\S+)% ± (\S+)% of (\d+), ties 0.00%, mean margin (\S+)\n"
        r"chosen: mean reward (\S+), mean log-prob (\S+)\n"
        r"rejected: mean reward (\S+), mean log-prob (\S+)\n"
    )
    counted, mean, share, error, of, *others = re.fullmatch(lines, printed).groups()
    assert (int(counted), int(of)) == (len(flat), 14) == (40, 14)
    assert float(mean) == near(sum(flat) / len(flat))
    assert float(share) == near(100 * accuracy, 2) and 20 < float(share) < 80
    assert float(error) == near(100 * spread / sum(weights), 2)
    expected = [average(x) for x in (margins, chosen, likely, rejected, unlikely)]
    assert [float(number) for number in others] == [near(x) for x in expected]
    assert abs(expected[0]) > 0.1
    assert {len(number.split(".")[1]) for number in (mean, *others)} == {4}

    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert '"Ü"' in out.read_text(encoding="utf-8"), "readable"
    for row, new, r in zip(rows, written, rewards):
        if "candidates" in row and "chosen" not in row:
            order = sorted(range(len(r)), key=lambda i: -r[i])
            best_first = [row["candidates"][i] for i in order]
            row = {"prompt": row["prompt"], "responses": best_first}
            r = [r[i] for i in order]
        assert new.pop("rewards") == pytest.approx(r, rel=1e-4, abs=1e-4)
        row.pop("rewards", None)
        assert new == row
    moved = [sorted(r, reverse=True) != r for r, row in zip(rewards, rows) if "candidates" in row]
    assert any(moved)


def test_margins_and_lengths_of_pairs(run, place, tokenizer, tmp_path):
    """Pearson's correlation, of pairs alone: candidates and demonstrations between them do not
    count. It is not shown where there are rankings, one pair, or pairs of equal lengths."""
    rng, models = np.random.default_rng(2), both_models(place)
    pairs = random_pairs(rng, 12)
    between = [
        {"prompt": "A", "candidates": [random_text(rng, 9, 12), " A"]},
        {"prompt": "A", "response": random_text(rng, 9, 12)},
    ]
    rows = [between[0], *pairs[:5], between[1], *pairs[5:]]

    def score(rows) -> str:
        path = write_jsonl(tmp_path / "x.jsonl", rows)
        return run("policy", "--compare=reference", "--score", path, "--beta=0.3")

    margins, longer = [], []
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    for tree in trees_of(str(tmp_path / "pairs.jsonl"), tokenizer):
        chosen, rejected = plain_rewards(models, tree, 0.3)
        margins.append(chosen - rejected)
        longer.append(len(tree[1]) - len(tree[2]))
    x = [margin - sum(margins) / 12 for margin in margins]
    y = [difference - sum(longer) / 12 for difference in longer]
    product = sum(a * b for a, b in zip(x, y))
    expected = product / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    printed = score(rows)
    last = printed.splitlines()[-1]
    found = re.fullmatch(r"correlation of margin and difference of lengths (-?\d\.\d\d)", last)
    assert float(found[1]) == pytest.approx(expected, abs=0.006) and 0.1 < abs(expected) < 0.97
    counted = f"accuracy {sum(m > 0 for m in margins) / 12:.2%}"
    assert "\n27 responses" in printed and counted in printed and "of 12," in printed
    assert "correlation" not in score(rows[:2])
    assert "correlation" not in score([*rows, {"prompt": "A", "responses": [" a", " b", " c"]}])
    assert "accuracy" not in score(between)
    equal = [{"prompt": [5, n], "chosen": [n, 2], "rejected": [n + 1, 2]} for n in (7, 8, 9)]
    assert "accuracy" in score(equal) and "correlation" not in score(equal)


def test_ties_are_no_wins(run, tmp_path):
    """With β = 0 all rewards are equal."""
    path = write_jsonl(tmp_path / "x.jsonl", random_pairs(np.random.default_rng(3), 4))
    printed = run("policy", "--compare=reference", "--score", path, "--beta=0")
    assert "\n8 responses, mean reward 0.0000\n" in printed
    share = "accuracy 0.00% ± 0.00% of 4, ties 100.00%, mean margin 0.0000"
    assert share in printed and "mean reward 0.0000, mean log-prob -" in printed
    same = run("policy", "--compare=policy", "--score", path, "--beta=9")
    assert share in same, "they agree to the last bit"


def test_who_says_nothing_is_scored_by_the_end(run, place, tokenizer, tmp_path):
    """A sample that ends at once is an empty text; its reward is that of the id that ends it."""
    rows = [
        {"prompt": "A", "candidates": [" film", "", " bad hotel"]},
        {"prompt": SAID, "candidates": ["", "4"]},
        {"prompt": "The", "response": ""},
    ]
    path, out = write_jsonl(tmp_path / "x.jsonl", rows), tmp_path / "out.jsonl"
    run("policy", "--compare=reference", "--score", path, "--beta=0.3", "--out", out)
    models, written = both_models(place), map(json.loads, out.read_text().splitlines())
    for tree, row in zip(trees_of(path, tokenizer), written):
        tree[1:] = [ids or [tokenizer.eos_id] for ids in tree[1:]]
        expected = plain_rewards(models, tree, 0.3)
        if "responses" in row:
            expected = sorted(expected, reverse=True)
        assert row["rewards"] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_beta_is_given_or_of_the_checkpoint_or_a_tenth(run, place, tokenizer, tmp_path):
    """The reference's run has another, and does not matter."""
    path = write_jsonl(tmp_path / "x.jsonl", random_pairs(np.random.default_rng(4), 3))
    checkpoints = [tmp_path / "policy", tmp_path / "reference"]
    models = both_models(place)
    for model, directory in zip(models, checkpoints):
        save_pretrained(model, directory)
        save_tokenizer(tokenizer, directory)
    sizes = {"max_length": 512, "max_prompt_length": 256, "out_dir": "x"}
    settings = lambda beta: json.dumps({"settings": sizes | {"beta": beta}})
    flags = [checkpoints[0], "--compare", checkpoints[1], "--score", path]
    plain = [r for tree in trees_of(path, tokenizer) for r in plain_rewards(models, tree, 1.0)]
    mean = lambda *more: numbers(run(*flags, *more).split("\n")[1])[1]
    (checkpoints[1] / "run.json").write_text(settings(0.7))
    assert mean() == near(0.1 * np.mean(plain))
    (checkpoints[0] / "run.json").write_text(settings(0.25))
    assert mean() == near(0.25 * np.mean(plain)) and abs(np.mean(plain)) > 1
    assert mean("--beta=2") == near(2 * np.mean(plain)) and mean("--beta=0") == 0
    best = run(*flags[:3], "--prompt=film", "--best_of=2", "--max_new_tokens=4")
    tenfold = run(*flags[:3], "--prompt=film", "--best_of=2", "--max_new_tokens=4", "--beta=2.5")
    assert 10 * numbers(best)[-1] == pytest.approx(numbers(tenfold)[-1], abs=0.006)
    for text in ("{", "[]", '{"settings": {}}', '{"settings": {"beta": "x"}}', '{"settings": 1}'):
        (checkpoints[0] / "run.json").write_text(text)
        with pytest.raises(
            data.DataError, match="run.json: no beta can be read from it: give --beta"
        ):
            reward.beta_of(SimpleNamespace(checkpoint=str(checkpoints[0]), beta=None))
        assert reward.beta_of(SimpleNamespace(checkpoint=str(checkpoints[0]), beta=0.2)) == 0.2


def test_the_best_of_several(run, drawn, place, tokenizer, tmp_path):
    """Of each prompt N samples of the policy, and of these the one with the largest reward."""
    out, prompts = tmp_path / "best.jsonl", ["A hotel", "The film", SAID, [5, 6, 7]]
    flags = ["--compare=reference", "--prompt=A hotel", "--prompts=rows.jsonl", "--best_of=3"]
    flags += ["--max_new_tokens=6", "--beta=0.3", "--seed=2"]
    printed = run("policy", *flags)
    trees = copy.deepcopy(drawn)
    assert run("policy", *flags, f"--out={out}") == f"wrote 4 lines to {out}\n"
    assert drawn == trees * 2 and len(trees) == 12
    models, expected, best, places = both_models(place), [], [], []
    for n, prompt in enumerate(prompts):
        several = trees[3 * n : 3 * n + 3]
        rewards = [plain_rewards(models, tree, 0.3)[0] for tree in several]
        texts = [tokenizer.decode(ids, continuation=True) for _, ids in several]
        if prompt == SAID:
            texts = [text.strip() for text in texts]
        if prompt == [5, 6, 7]:
            texts = [ids for _, ids in several]
        places.append(max(range(3), key=lambda i: rewards[i]))
        best.append((texts[places[-1]], rewards[places[-1]]))
        expected.append((prompt, texts, rewards, texts[places[-1]]))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row, (prompt, texts, rewards, response) in zip(rows, expected):
        assert row.pop("rewards") == pytest.approx(rewards, rel=1e-4, abs=1e-4)
        assert row == {"prompt": prompt, "candidates": texts, "response": response}
    assert len(set(places)) > 1 and len(rows) == 4
    pattern = ""
    for shown, (response, _) in zip(["A hotel", "The film", "2+2?", "[5, 6, 7]"], best):
        pattern += re.escape(f"\n{shown}\n{response}   (reward ") + r"(-?\d+\.\d{3})\)\n"
    found = re.fullmatch(pattern, printed)
    assert [float(x) for x in found.groups()] == [near(r, 3) for _, r in best]
    # The policy draws: what it draws is likelier under it.
    logp = lambda model: sum(plain_logp(model, *tree) for tree in trees)
    assert logp(models[0]) > logp(models[1])


def test_a_reference_has_the_same_tokenizer(run, place, tokenizer, tmp_path, capsys):
    """Or one of the two has none, where rows are of token ids."""
    path = write_jsonl(tmp_path / "x.jsonl", [ROWS[2]])
    examples = [data.Example("zebras jump over walls", ()) for _ in range(20)]
    config = load_pretrained(place / "policy").config
    for name in ("other", "none", "fewer"):
        size = config.vocab_size - (name == "fewer")
        save_pretrained(make_model(replace(config, vocab_size=size)), tmp_path / name)
    data.Tokenizer.train(examples, tmp_path / "other", 300)
    scores = lambda *names: run(names[0], f"--compare={names[1]}", "--score", path)
    assert "\n1 responses" in scores("policy", tmp_path / "none")
    assert "\n1 responses" in scores(tmp_path / "none", "policy")
    for pair in (["policy", tmp_path / "other"], [tmp_path / "none", tmp_path / "fewer"]):
        with pytest.raises(SystemExit):
            scores(*pair)
        sentence = f"{pair[1]}: the reference has another tokenizer or vocabulary\n"
        assert capsys.readouterr().err == f"sample.py: {sentence}"
    with pytest.raises(SystemExit):
        run("policy", "--compare=policy", "--score", write_jsonl(tmp_path / "y.jsonl", ROWS[1:2]))
    assert capsys.readouterr().err.endswith("y.jsonl:1: has no response that could be scored\n")


def test_nothing_beyond_the_window_is_scored(run, tmp_path, capsys):
    """The longest prompt with its longest response may be just as long."""
    model = make_model(replace(SHAPES["tied"], sliding_window=10, model_type="mistral"))
    save_pretrained(model, tmp_path / "m")
    flags = [tmp_path / "m", "--compare", tmp_path / "m", "--score"]
    row = {"prompt": [5] * 4, "chosen": [6, 2], "rejected": [7] * 6}
    short = {"prompt": [5] * 5, "chosen": [6, 2], "rejected": [7] * 3}
    assert "\n4 responses" in run(*flags, write_jsonl(tmp_path / "x.jsonl", [row, short]))
    row["rejected"].append(8)
    with pytest.raises(SystemExit):
        run(*flags, write_jsonl(tmp_path / "x.jsonl", [row, short]))
    assert "11 tokens are more than the sliding window of 10" in capsys.readouterr().err


# Divergence


def test_divergences_belong_to_their_responses():
    """Of trees of many sizes, in more than one block and more than one micro-batch; and of trees
    with several responses."""
    models = [make_model(SHAPES["grouped"], scale=s) for s in (6.0, 4.0)]
    rng = np.random.default_rng(0)
    sizes = [[int(rng.integers(1, 28)), int(rng.integers(1, 14))] for _ in range(259)]
    dataset = random_dataset(sizes)
    assert dataset.lengths[:256].sum() > 4096
    trees = [[dataset.tokens[part].tolist() for part in dataset[e]] for e in range(len(dataset))]
    found = reward.measure_kl(*models, trees)
    expected = [plain_divergence(models, *tree) for tree in trees]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    several = random_dataset([[3, 2, 4, 1], [1, 5], [2, 1, 3]], seed=1)
    found = reward.sequence_kl(*models, data.collate(several, np.array([2, 0, 1]))).tolist()
    expected = []
    for e in (2, 0, 1):
        prompt, *responses = (several.tokens[part].tolist() for part in several[e])
        expected += [plain_divergence(models, prompt, response) for response in responses]
    assert found == pytest.approx(expected, rel=1e-6)


def test_divergence_is_a_plain_sum_over_the_samples(run, drawn, place):
    """KL(π‖π_ref), of responses of the policy: mean, standard error and how many."""
    flags = [
        "--compare=reference",
        "--prompt=A hotel",
        "--prompts=rows.jsonl",
        "--max_new_tokens=6",
    ]
    printed = run("policy", *flags, "--kl", "--n=4", "--seed=3")
    models = both_models(place)
    trees = copy.deepcopy(drawn)
    values = [plain_divergence(models, *tree) for tree in trees]
    mean = sum(values) / 16
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / 15 / 16)
    pattern = r"KL\(π‖π_ref\) (\d+\.\d{4}) ± (\d+\.\d{4}) nats per response, (\d+) samples\n"
    found = re.fullmatch(pattern, printed)
    assert float(found[1]) == near(mean) and float(found[2]) == near(error)
    assert int(found[3]) == len(trees) == 16
    backwards = sum(plain_divergence(models[::-1], *tree) for tree in trees) / 16
    assert abs(backwards - mean) > 0.02 * mean, "the direction matters"
    drawn.clear()
    run("policy", *flags, "--n=4", "--seed=3")
    assert drawn[:16] == trees, "the same samples of the policy as are shown without --kl"
    assert "± nan nats per response, 1 samples" in run("policy", *flags[:2], "--kl")


# Conversations


def test_a_conversation_grows(tmp_path, monkeypatch, capsys):
    """By what was said, as it was shown, without what ends a turn and the template's space."""
    template = {"chat_template": CHATML}
    t = user_defined(tmp_path / "t", [*IM, "<b>"], template)
    answers = [" It is 4, Ünï.  ", "\nyou", " hi"]
    end, begin = t.start.piece_to_id(IM[1]), t.start.piece_to_id(IM[0])
    ends, seen, calls, asked = iter([end, t.eos_id, 270]), [], [], []
    lines, draw = iter(["2+2?", "there <|im_end|>", "again", EOFError]), sample.draw

    def read(prompt):
        asked.append((prompt, capsys.readouterr().out))
        line = next(lines)
        if line is EOFError:
            raise line
        return line

    def spy_draw(model, tokenizer, prompts, **options):
        seen.extend(copy.deepcopy(prompts))
        return draw(model, tokenizer, prompts, **options)

    def generate(model, prompts, max_new_tokens, eos_id, on_token, **options):
        calls.append((prompts, max_new_tokens, set(eos_id), options))
        ids = [*t.encode(answers[len(calls) - 1], continuation=True), next(ends)]
        for i in ids:
            on_token([i])
        return [ids]

    monkeypatch.setattr("builtins.input", read)
    load = lambda directory: (SimpleNamespace(config=SHAPES["tied"]), t)
    monkeypatch.setattr(sample, "load", load)
    monkeypatch.setattr(sample, "draw", spy_draw)
    monkeypatch.setattr(sample, "generate", generate)
    words = "x --chat --system=Be --max_new_tokens=99 --temperature=0.5 --top_k=7 --top_p=0.9"
    monkeypatch.setattr(sys, "argv", ["sample.py", *words.split(), "--seed=2", "--compile"])
    sample.main()
    last = t.decode([270], continuation=True)
    assert seen == [
        turns("s: Be | u: 2+2?"),
        turns("s: Be | u: 2+2? | a: It is 4, Ünï. | u: there <|im_end|>"),
        turns("s: Be | u: 2+2? | a: It is 4, Ünï. | u: there <|im_end|> | a: you | u: again"),
    ]
    assert {prompt for prompt, _ in asked} == {"\n> "}
    assert [out for _, out in asked] == ["", *answers[:2], answers[2] + last]
    assert capsys.readouterr().out == "\n"
    for conversation, ([ids], limit, stops, options) in zip(seen, calls):
        assert ids == data.token_ids(data.Example(conversation, ()), t)[0]
        assert ids.count(begin) == len(conversation) + 1
        assert (limit, stops) == (99, {t.eos_id, end})
        shape = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "compile": True}
        assert options == shape | {"seed": calls[0][3]["seed"]}


def test_without_a_system_message_there_is_none(place, monkeypatch, tokenizer):
    """Nor is anything said before the first turn."""
    seen = []
    monkeypatch.setattr(
        sample, "draw", lambda m, t, prompts, **o: seen.extend(prompts) or [[0, []]]
    )
    type_in(monkeypatch, ["hello"])
    chat.talk(SimpleNamespace(system="", checkpoint=place / "policy"), {})
    assert seen[0][:1] == turns("u: hello")
    type_in(monkeypatch, [])
    with pytest.raises(data.DataError, match="'--system' has half a surrogate pair"):
        chat.talk(SimpleNamespace(system="\udcff", checkpoint=place / "policy"), {})


@pytest.mark.parametrize(("template", "eos", "ends"), [
    (CHATML, None, {2, 321}),
    (CHATML, "<|im_start|>", {2, 320, 321}),
    (ZEPHYR, None, {2}),
    (ZEPHYR, "<|im_end|>", {2, 321}),
    ("{{ messages[-1].content }}", "<|im_end|>", {2, 321}),
])  # fmt: skip
def test_what_ends_an_answer(tokenizer, tmp_path, template, eos, ends):
    """The tokenizer's EOS, the one that is named beside it, and what the template writes."""
    config = {"chat_template": template, "added_tokens_decoder": ADDED, "eos_token": eos}
    t = with_files(tokenizer, tmp_path / "t", config, {})
    assert chat.stop_ids(t) == ends


@pytest.mark.parametrize(("template", "end"), [(CHATML, 321), (ZEPHYR, 2)])
def test_who_says_nothing_in_a_conversation_ends_the_turn(tokenizer, tmp_path, template, end):
    """In a text the sequence; what is said stays as it is."""
    config = {"chat_template": template, "added_tokens_decoder": ADDED}
    t = with_files(tokenizer, tmp_path / "t", config, {})
    silent, told = [[5, 6], [], [7, 2], []], [[5, 6], [7, 2]]
    talk = data.Example(turns("u: hello"), ())
    assert reward.with_ends(silent, talk, t) == [[5, 6], [end], [7, 2], [end]]
    assert reward.with_ends(silent, data.Example("hello", ()), t) == [[5, 6], [2], [7, 2], [2]]
    assert reward.with_ends(told, talk, t) == told
