"""The packed model against plain computations that share nothing with it but the weights."""

import json
import math
import sys
from itertools import product
from pathlib import Path

import benchmark
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPES, make_model, random_dataset
from torch.utils.flop_counter import FlopCounterMode

import data
import dpo
import model as model_module
from extra import attention
from extra.chunked import ChunkedLogps
from model import ModelConfig, Transformer, token_logps


def plain_logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    """(T, V) logits of one sequence, the textbook way: full masked scores, complex-number rotary."""
    c, w = model.config, dict(model.named_parameters())
    x, time = w["embed_tokens.weight"][ids], len(ids)
    norm = lambda x, g: x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * g
    frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2).double() / c.head_dim)
    turn = torch.polar(torch.ones(time, len(frequency)).double(),
                       torch.arange(time)[:, None] * frequency)[:, None]  # fmt: skip

    def rotate(x):  # dimension i is paired with i + D/2
        pairs = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    for n in range(c.num_hidden_layers):
        p = lambda name, n=n: w[f"layers.{n}.{name}.weight"]
        h = norm(x, p("input_layernorm"))
        bias = lambda m, n=n: w.get(f"layers.{n}.self_attn.{m}_proj.bias", torch.zeros(()))
        q, k, v = (h @ p(f"self_attn.{m}_proj").T + bias(m) for m in "qkv")
        q, k, v = (x.view(time, -1, c.head_dim) for x in (q, k, v))
        if c.model_type == "qwen3":
            q, k = norm(q, p("self_attn.q_norm")), norm(k, p("self_attn.k_norm"))
        repeat = c.num_attention_heads // c.num_key_value_heads
        k, v = rotate(k).repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("ihd,jhd->hij", rotate(q), k) / math.sqrt(c.head_dim)
        scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), -math.inf)
        out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(time, -1)
        x = x + out @ p("self_attn.o_proj").T
        h = norm(x, p("post_attention_layernorm"))
        gated = F.silu(h @ p("mlp.gate_proj").T) * (h @ p("mlp.up_proj").T)
        x = x + gated @ p("mlp.down_proj").T
    head = w.get("lm_head.weight", w["embed_tokens.weight"])
    return norm(x, w["norm.weight"]) @ head.T


def plain_logps(model, dataset: data.Dataset, tree: int) -> list[torch.Tensor]:
    """Log-prob of each response of a tree: one forward per sequence, full logits, log_softmax."""
    bounds = dataset.offsets[dataset.trees[tree] : dataset.trees[tree + 1] + 1]
    learnt = [dataset.learnt[a:b] for a, b in zip(bounds, bounds[1:])]
    prompt, *responses = (dataset.tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:]))
    result = []
    for response, counts in zip(responses, learnt[1:]):
        logps = plain_logits(model, prompt + response).log_softmax(-1)
        steps = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        result.append(sum(logps[t, id] for t, id, c in zip(steps, response, counts) if c))
    return result


def sequence(ids: list[int]):
    """The inputs of `forward` for one sequence, of which all rows predict."""
    return torch.tensor(ids), torch.arange(len(ids)), torch.tensor([[0, 0, 0, len(ids)]])


def everyone(dataset: data.Dataset) -> data.Batch:
    return data.collate(dataset, np.arange(len(dataset)))


# Prompts of one token, BOS alone; responses of one; one to three of them.
SIZES = [[5, 4, 1], [1, 6, 2, 9], [30, 20, 33], [3, 1, 1], [2, 7], [1, 1], [1, 1, 3]]


def without_rooms(monkeypatch):
    """As if extra/ were deleted: attention segment by segment, log-probs from all logits."""
    for room in ("attention", "chunked"):
        monkeypatch.setitem(sys.modules, f"extra.{room}", None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("many", [97 * 7, 97 * 40, 2**24, None])  # many chunks, three, one; no room
def test_packed_shared_chunked_equals_plain(shape, many, monkeypatch):
    """Values to 1e-9 and every gradient, in float64, by every way of attention and log-probs."""
    if many:
        monkeypatch.setattr(model_module, "MANY", many)
    else:
        without_rooms(monkeypatch)
    model, dataset = make_model(SHAPES[shape]), random_dataset(SIZES)
    rng = np.random.default_rng(1)
    dataset.learnt[rng.random(len(dataset.tokens)) < 0.1] = False  # some tokens are only read
    logps = dpo.sequence_logps(model, everyone(dataset))
    plain = [x for tree in range(len(SIZES)) for x in plain_logps(model, dataset, tree)]
    plain = torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in plain])
    torch.testing.assert_close(logps, plain, rtol=0, atol=1e-9)
    weights = torch.randn(len(plain), dtype=torch.float64)
    packed_grads = torch.autograd.grad((logps * weights).sum(), list(model.parameters()))
    plain_grads = torch.autograd.grad((plain * weights).sum(), list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), packed_grads, plain_grads):
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_all_ways_are_taken(monkeypatch):
    """Few logits by torch's cross entropy, many in chunks, attention padded: if the rooms are there."""
    ways, model, dataset = [], make_model(SHAPES["tied"]), random_dataset(SIZES)
    note = lambda name, way: lambda *a, **options: ways.append(name) or way(*a, **options)
    monkeypatch.setattr(F, "cross_entropy", note("at once", F.cross_entropy))
    monkeypatch.setattr(ChunkedLogps, "apply", note("in chunks", ChunkedLogps.apply))
    monkeypatch.setattr(attention, "padded_attention", note("padded", attention.padded_attention))
    alone = note("alone", model_module.segment_attention)
    monkeypatch.setattr(model_module, "segment_attention", alone)
    expected = dpo.sequence_logps(model, everyone(dataset))
    assert ways == ["padded", "padded", "at once"]
    for many, rooms, taken in [(200, True, "in chunks"), (200, False, "at once")]:
        ways.clear()
        monkeypatch.setattr(model_module, "MANY", many)
        if not rooms:
            without_rooms(monkeypatch)
        logps = dpo.sequence_logps(model, everyone(dataset))
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-11)
        assert ways == [*(["padded", "padded"] if rooms else ["alone", "alone"]), taken]


def test_batch_mates_order_and_checkpointing_do_not_matter():
    model, dataset = make_model(SHAPES["grouped"]), random_dataset(SIZES)
    together = dpo.sequence_logps(model, everyone(dataset))
    with torch.no_grad():  # as the reference is computed
        again = dpo.sequence_logps(model, everyone(dataset))
    assert torch.equal(again, together)
    for order in ([4, 3, 2, 1, 0], [2], [3, 3, 0], [5], [6, 5]):
        batch = data.collate(dataset, np.array(order))
        logps = dpo.sequence_logps(model, batch)
        torch.testing.assert_close(logps, together[batch.ids], rtol=0, atol=1e-11)
        model.activation_checkpointing = True
        again = dpo.sequence_logps(model.train(), batch)
        grads = [torch.autograd.grad(x.sum(), list(model.parameters())) for x in (logps, again)]
        assert torch.equal(logps, again) and all(map(torch.equal, *grads)), (
            "recomputed, not changed"
        )
        model.activation_checkpointing = False


@pytest.mark.parametrize("shape", ["tied", "grouped"])  # it is a Llama's
def test_the_standard_step_of_the_benchmark_is_ours(shape):
    """What the benchmark compares is the same: values and gradients to 1e-9, whatever the layout."""
    model, reference = make_model(SHAPES[shape]), make_model(SHAPES[shape])
    with torch.no_grad():
        reference.norm.weight.mul_(1.1)
    trees = benchmark.draw_trees([[9, 5, 3], [4, 2, 70], [80, 1, 6], [20, 20, 20]], vocab=97)
    found = {}
    for name, step in benchmark.ladder(trees, model, reference).items():
        logps = step()
        found[name] = [logps.detach(), *(p.grad.clone() for p in model.parameters())]
        model.zero_grad()
    live = {name: found.pop(name) for name in ("standard", "ours, live")}
    for steps in (found, live):
        first, *others = steps.values()
        for other in others:
            for a, b in zip(first, other):
                torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    moved = found["shared prompt"][1] - live["standard"][1]
    assert len(found) == 4 and moved.abs().max() > 1e-3, "the reference matters"


def test_flops_are_those_that_torch_counts():
    """Of matrix products; attention, which the counter does not know on the CPU, by its formula."""
    model, sizes = make_model(SHAPES["grouped"]), [[9, 5, 3], [4, 2, 7], [1, 3]]
    batch = everyone(random_dataset(sizes))
    work = benchmark.work(random_dataset(sizes))
    assert work[:2] == (len(batch.tokens), len(batch.targets))
    seen = sum(len(rows) - query for rows, size in zip(attention.rows_seen(batch.segments), batch.segments[:, 3].tolist()) for query in range(size))  # fmt: skip
    assert work[2] == seen
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dpo.sequence_logps(model, batch)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    c = model.config
    assert benchmark.flops(c, *work[:2], 0, 0) == counted
    # Three layers; heads, head_dim. Prompts ask in all layers but the last.
    assert benchmark.flops(c, 0, 0, 10, 3) == 4 * 4 * 16 * (2 * 10 + 3)


def test_a_branch_sees_its_own_tree_only():
    """Change one token anywhere: only the log-probs that may depend on it move."""
    model, dataset = make_model(SHAPES["tied"]), random_dataset([[4, 3, 3], [4, 3, 3]])
    before = dpo.sequence_logps(model, everyone(dataset))
    for sequence, moved in enumerate(([0, 1], [0], [1], [2, 3], [2], [3])):
        for token in range(dataset.offsets[sequence], dataset.offsets[sequence + 1]):
            changed = random_dataset([[4, 3, 3], [4, 3, 3]])
            changed.tokens[token] += 1
            after = dpo.sequence_logps(model, everyone(changed))
            assert torch.nonzero((after - before).abs() > 1e-12).flatten().tolist() == moved


def test_what_is_read_but_not_learnt_counts_nothing_and_is_seen():
    """A hidden token (~id) adds no log-prob of its own, and conditions those after it."""
    model, [prompt, response] = make_model(SHAPES["tied"]), [[1, 5, 6], [7, 8, 9, 2]]
    logps = plain_logits(model, prompt + response).log_softmax(-1)
    each = torch.stack([logps[len(prompt) - 1 + i, token] for i, token in enumerate(response)])
    for hidden in ([0], [1, 2], [3], [0, 1, 2], [0, 1, 2, 3]):
        ids = [~token if i in hidden else token for i, token in enumerate(response)]
        batch = everyone(data.to_dataset([[prompt, ids]]))
        found = dpo.sequence_logps(model, batch)
        learnt = [i for i in range(4) if i not in hidden]
        torch.testing.assert_close(found[0], each[learnt].sum(), rtol=0, atol=1e-11)
        assert batch.lengths.item() == max(1, len(learnt))


def test_probabilities_of_all_sequences_sum_to_one():
    """Every response of up to three tokens, ended by EOS or cut: catches shift, mask, EOS errors.

    After a prompt of three tokens, and after BOS alone.
    """
    config = ModelConfig(5, 16, 32, 2, 2, 1, 8, tie_word_embeddings=True)
    model, eos = make_model(config), 2
    others = [t for t in range(5) if t != eos]
    short = [[*head, eos] for n in range(3) for head in product(others, repeat=n)]
    cut = [list(response) for response in product(others, repeat=3)]
    for prompt in ([1, 3, 4], [1]):
        logps = dpo.sequence_logps(model, everyone(data.to_dataset([[prompt, *short, *cut]])))
        assert logps.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_prompt_logits_do_not_count(monkeypatch):
    """Only rows that predict a response token reach the head, and the last feed-forward."""
    model, dataset = make_model(SHAPES["tied"]), random_dataset([[6, 3, 2]])
    rows, original = [], model_module.head_logits
    monkeypatch.setattr(
        model_module, "head_logits", lambda h, w: rows.append(len(h)) or original(h, w)
    )
    for layer in model.layers:
        layer.mlp.register_forward_hook(lambda m, inputs, out: rows.append(len(inputs[0])))
    dpo.sequence_logps(model, everyone(dataset))
    assert rows == [10, 5, 5], "three and two response tokens, and none of the prompt's five rows"


def test_a_prompt_is_kept_in_the_stream_once():
    batch = everyone(random_dataset([[6, 3, 2], [1, 2, 2, 2]]))
    assert len(batch.tokens) == 5 + 3 + 2 + 0 + 2 + 2 + 2 and len(batch.targets) == 11


def test_token_logps_parity_with_other_implementations():
    """The log-probs that TRL and the original DPO code make of the same logits."""
    fixture = json.loads((Path(__file__).parent / "losses.json").read_text())["batch_logps"]
    for logits, labels, expected in zip(*(fixture[k] for k in ("logits", "labels", "sums"))):
        logits, targets = torch.tensor(logits).double()[:-1], torch.tensor(labels)[1:]  # shifted
        kept = targets != -100
        identity = torch.eye(logits.shape[1]).double()
        for logps in (token_logps, ChunkedLogps.apply):
            ours = logps(logits[kept], identity, targets[kept]).sum().item()
            assert ours == pytest.approx(expected, abs=1e-6)


def test_token_logps_in_bfloat16():
    """V = 32,000, 512 tokens: the sum stays near float64's, where bf16 log-softmax is nats away."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 64).bfloat16(), torch.randn(32000, 64) / 8
    targets = torch.randint(32000, (512,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = token_logps(hidden, weight, targets)
        naive = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])
    exact = (hidden.double() @ weight.bfloat16().double().T).log_softmax(-1)
    exact = exact.gather(1, targets[:, None])[:, 0]
    assert ours.dtype == torch.float32
    error = (ours.double() - exact).pow(2).mean().sqrt().item()
    naive_error = (naive.bfloat16().double()[:, 0] - exact).pow(2).mean().sqrt().item()
    assert error < 0.006 and naive_error > 1.5 * error


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_autocast_is_near_float64(shape):
    """The whole model under autocast, as it is trained: log-probs float32, gradients in line."""
    model, dataset = make_model(SHAPES[shape], scale=2.0), random_dataset(SIZES)
    exact = dpo.sequence_logps(model, everyone(dataset))
    expected = torch.autograd.grad(exact.sum(), list(model.parameters()))
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        logps = dpo.sequence_logps(model, everyone(dataset))
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), exact, rtol=0.02, atol=0.5)
    for a, b in zip(torch.autograd.grad(logps.sum(), list(model.parameters())), expected):
        assert F.cosine_similarity(a.flatten(), b.float().flatten(), dim=0) > 0.99


@pytest.mark.parametrize("chunked", [False, True])
def test_frozen_inputs_of_the_head_cost_nothing(chunked, monkeypatch):
    monkeypatch.setattr(model_module, "MANY", 200 if chunked else 2**24)
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True)
    run = lambda h, w: token_logps(h, w, torch.arange(9)).sum().backward()
    run(hidden, weight)
    expected, weight_grad = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    run(hidden.detach(), weight)
    assert torch.equal(weight.grad, weight_grad)
    monkeypatch.setattr(torch, "empty_like", None)  # where the gradient of the weight would begin
    run(hidden, weight.detach())
    assert torch.equal(hidden.grad, expected)


@pytest.mark.parametrize("shape", ["grouped", "biased", "normed"])
def test_initial_weights(shape):
    """By the width, in the order of the parameters, from the seed alone; norms are 1, biases 0."""
    model = Transformer(SHAPES[shape]).init_weights(5)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        expected = torch.full(parameter.shape, 0.0 if "bias" in name else 1.0)
        if parameter.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = math.sqrt(1 / (2 * model.config.hidden_size))
            std = 2 / math.sqrt(model.config.hidden_size) if "embed" in name else std
            std = std / math.sqrt(2 * len(model.layers)) if residual else std
            expected.normal_(0, std, generator=generator)
        torch.testing.assert_close(parameter, expected, msg=name)
