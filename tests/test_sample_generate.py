"""`sample.generate` against the plain model: teacher forcing, frequencies, options, stops."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SHAPES, make_model
from test_model import plain_logits

from extra.cache import KVCache
from model import CheckpointError, Transformer
from sample import generate, sample_tokens

PROMPTS = [[5, 6, 7], [3], [9, 8, 7, 6, 5, 4, 3, 9, 10, 11], [4, 4]]


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_agrees_with_teacher_forcing(cached, monkeypatch):
    """Each token is the argmax of the plain model, alone and in a batch, with a cache or without."""
    if not cached:
        monkeypatch.setitem(sys.modules, "extra.cache", None)  # as if it were deleted
    model, eos = make_model(SHAPES["grouped"], scale=3.0).float(), 2
    together = generate(model, PROMPTS, 12, eos, temperature=0)
    for prompt, response in zip(PROMPTS, together):
        assert generate(model, [prompt], 12, eos, temperature=0) == [response]
        logits = plain_logits(model.double(), prompt + response)[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == response
        assert len(response) == 12 or response[-1] == eos
        model.float()


def test_frequencies_are_the_probabilities():
    """Of first and of second tokens, among thousands of samples."""
    model, eos = make_model(SHAPES["grouped"], scale=3.0).float(), 2
    samples = generate(model, [[5, 6, 7]] * 4000, 2, eos, seed=3)
    first = plain_logits(model.double(), [5, 6, 7])[-1].softmax(-1)
    top = first.argmax().item()
    second = plain_logits(model, [5, 6, 7, top])[-1].softmax(-1)
    for observed, p in (
        ([ids[0] for ids in samples], first),
        ([ids[1] for ids in samples if ids[0] == top and len(ids) > 1], second),
    ):
        share = np.bincount(observed, minlength=97) / len(observed)
        error = 5 * np.sqrt(p.detach().numpy() / len(observed)) + 5 / len(observed)
        assert (np.abs(share - p.detach().numpy()) < error).all()


def test_options():
    model = make_model(SHAPES["tied"], scale=2.0).float()
    run = lambda **options: generate(model, [[5, 6]] * 50, 8, 2, **options)
    assert run(seed=1) == run(seed=1) != run(seed=2)
    greedy = run(temperature=0)
    assert run(top_k=1) == greedy == run(top_p=1e-9) == run(temperature=1e-4)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(3000, 1)  # 0.64, 0.24, 0.09, 0.03
    draw = lambda k, p: set(
        sample_tokens(logits, torch.Generator().manual_seed(0), top_k=k, top_p=p).tolist()
    )
    assert draw(0, 1.0) == {0, 1, 2, 3} and draw(2, 1.0) == {0, 1}
    assert draw(0, 0.6) == {0} and draw(0, 0.65) == {0, 1} and draw(0, 0.9) == {0, 1, 2}


def test_stops_at_any_of_several_ids():
    model = make_model(SHAPES["tied"], scale=2.0).float()
    for ids in generate(model, [[5, 6]] * 200, 30, {2, 7, 8}, seed=1):
        assert not {2, 7, 8} & set(ids[:-1]) and (len(ids) == 30 or ids[-1] in {2, 7, 8})
    run = lambda eos: generate(model, [[5, 6]] * 20, 30, eos, seed=1)
    assert run(2) == run({2}) != run({2, 7})
    assert all(len(ids) == 30 for ids in run(set())), "nothing stops it"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cache_changes_nothing(shape, monkeypatch):
    """Sampled, in a batch of several lengths: the same tokens as when all runs again."""
    model = make_model(SHAPES[shape], scale=2.0)
    run = lambda: generate(model, PROMPTS * 5, 12, 2, seed=1, temperature=0.8, top_p=0.9)
    cached = run()
    monkeypatch.setitem(sys.modules, "extra.cache", None)
    assert run() == cached


def test_sequences_that_have_ended_leave(monkeypatch):
    """Each step runs fewer rows, never one that ended long ago, and the others do not notice."""
    model, rows = make_model(SHAPES["grouped"], scale=2.0), []
    run = lambda **o: generate(model, PROMPTS * 10, 40, {2, 7, 8, 9, 10, 11}, seed=1, **o)
    ended = run()
    original = Transformer.forward
    count = lambda self, tokens, *a, **o: (
        rows.append(len(tokens)) or original(self, tokens, *a, **o)
    )
    monkeypatch.setattr(Transformer, "forward", count)
    assert run() == ended
    running = [sum(len(ids) > n for ids in ended) for n in range(1, len(rows))]
    assert all(here <= there < 4 / 3 * here + 1 for here, there in zip(running, rows[1:]))
    assert rows[1:] == sorted(rows[1:], reverse=True) and rows[-1] < 20
    monkeypatch.setattr(KVCache, "leave", lambda self: None)
    assert run() == ended and rows[-1] == 40


def test_every_step_is_told():
    """`on_token` gets the B ids of each step, of sequences that have ended, too."""
    model, steps = make_model(SHAPES["tied"], scale=2.0).float(), []
    found = generate(model, PROMPTS, 9, 2, seed=4, on_token=steps.append)
    assert len(steps) == max(map(len, found)) and {len(step) for step in steps} == {len(PROMPTS)}
    for n, ids in enumerate(found):
        assert [step[n] for step in steps][: len(ids)] == ids


@pytest.mark.parametrize("prompts", [[], [[5], []]])
def test_a_prompt_has_a_token(prompts):
    with pytest.raises(AssertionError, match="at least one"):
        generate(make_model(SHAPES["tied"]).float(), prompts, 3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["grouped", "biased", "normed"])
def test_compiled_sampling_is_the_same_in_one_graph(shape):
    model = make_model(SHAPES[shape], scale=2.0).float()
    prompts = [[5, 6, 7], [3], [9, 8, 7, 6, 5]]
    run = lambda **options: generate(model, prompts, 20, 2, seed=1, **options)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    assert run(compile=True) == run()
    assert graphs["unique_graphs"] == before + 1, "every step of one shape"


def test_nothing_is_longer_than_the_sliding_window():
    config = replace(SHAPES["tied"], sliding_window=10, model_type="mistral")
    model = Transformer(config).init_weights(0)
    assert len(generate(model, [[5, 6], [3] * 6], 4, set())[0]) == 4
    with pytest.raises(CheckpointError, match="11 tokens are more than the sliding window of 10"):
        generate(model, [[5, 6], [3] * 6], 5, 2)
