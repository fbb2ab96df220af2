"""The packed model against plain computations that share nothing with it but the weights."""

import json
import math
from dataclasses import replace
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
from model import (
    CheckpointError,
    ModelConfig,
    TokenLogps,
    Transformer,
    generate,
    load_pretrained,
    random_weights,
    read_weights,
    save_pretrained,
)


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
        q, k, v = ((h @ p(f"self_attn.{m}_proj").T).view(time, -1, c.head_dim) for m in "qkv")
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
    prompt, *responses = (dataset.tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:]))
    result = []
    for response in responses:
        logps = plain_logits(model, prompt + response).log_softmax(-1)
        steps = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        result.append(sum(logps[t, token] for t, token in zip(steps, response)))
    return result


def sequence(ids: list[int]):
    """The inputs of `forward` for one sequence, all of whose rows predict."""
    positions = torch.arange(len(ids))
    return torch.tensor(ids), positions, torch.tensor([[0, 1, 1, len(ids)]]), positions


SIZES = [[5, 4, 1], [1, 6, 2, 9], [30, 20, 33], [3, 1, 1], [2, 7]]


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_shared_chunked_equals_plain(shape, monkeypatch):
    """Values to 1e-9 and every gradient, in float64, with trees of one to three branches."""
    monkeypatch.setattr(TokenLogps, "CHUNK", 97 * 7)  # seven rows a chunk: several, one not full
    model, dataset = make_model(SHAPES[shape]), random_dataset(SIZES)
    batch = data.collate(dataset, np.arange(len(SIZES)))
    logps = dpo.sequence_logps(model, batch)
    plain = torch.stack(
        [x for tree in range(len(SIZES)) for x in plain_logps(model, dataset, tree)]
    )
    torch.testing.assert_close(logps, plain, rtol=0, atol=1e-9)
    weights = torch.randn(len(plain), dtype=torch.float64)
    packed_grads = torch.autograd.grad((logps * weights).sum(), list(model.parameters()))
    plain_grads = torch.autograd.grad((plain * weights).sum(), list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), packed_grads, plain_grads):
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_batch_mates_order_and_checkpointing_do_not_matter():
    model, dataset = make_model(SHAPES["grouped"]), random_dataset(SIZES)
    everyone = dpo.sequence_logps(model, data.collate(dataset, np.arange(len(SIZES))))
    with torch.no_grad():  # as the reference is computed
        again = dpo.sequence_logps(model, data.collate(dataset, np.arange(len(SIZES))))
    assert torch.equal(again, everyone)
    for order in ([4, 3, 2, 1, 0], [2], [3, 3, 0]):
        batch = data.collate(dataset, np.array(order))
        logps = dpo.sequence_logps(model, batch)
        torch.testing.assert_close(logps, everyone[batch.response_ids], rtol=0, atol=1e-11)
        model.activation_checkpointing = True
        again = dpo.sequence_logps(model.train(), batch)
        grads = [torch.autograd.grad(x.sum(), list(model.parameters())) for x in (logps, again)]
        assert torch.equal(logps, again) and all(map(torch.equal, *grads)), (
            "recomputed, not changed"
        )
        model.activation_checkpointing = False


@pytest.mark.parametrize("shape", SHAPES)
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
    model, dataset = make_model(SHAPES["grouped"]), random_dataset([[9, 5, 3], [4, 2, 7]])
    batch, work = data.collate(dataset, np.arange(2)), dataset.work().sum(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dpo.sequence_logps(model, batch)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert model.flops(work[0], work[1], 0) == counted
    assert model.flops(0, 0, work[2]) == 4 * 3 * 4 * 16 * work[2]  # layers, heads, head_dim


def test_a_branch_sees_its_own_tree_only():
    """Change one token anywhere: only the log-probs that may depend on it move."""
    model, dataset = make_model(SHAPES["tied"]), random_dataset([[4, 3, 3], [4, 3, 3]])
    before = dpo.sequence_logps(model, data.collate(dataset, np.arange(2)))
    for sequence, moved in enumerate(([0, 1], [0], [1], [2, 3], [2], [3])):
        changed = random_dataset([[4, 3, 3], [4, 3, 3]])
        changed.tokens[dataset.offsets[sequence]] += 1
        after = dpo.sequence_logps(model, data.collate(changed, np.arange(2)))
        assert torch.nonzero((after - before).abs() > 1e-12).flatten().tolist() == moved


def test_probabilities_of_all_sequences_sum_to_one():
    """Every response of up to three tokens, ended by EOS or cut: catches shift, mask, EOS errors."""
    config = ModelConfig(5, 16, 32, 2, 2, 1, 8, tie_word_embeddings=True)
    model, eos = make_model(config), 2
    others = [t for t in range(5) if t != eos]
    short = [[*head, eos] for n in range(3) for head in product(others, repeat=n)]
    cut = [list(response) for response in product(others, repeat=3)]
    dataset = data.to_arrays([[[1, 3, 4], *short, *cut]])
    logps = dpo.sequence_logps(model, data.collate(dataset, np.array([0])))
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_prompt_logits_do_not_count(monkeypatch):
    """Only rows that predict a response token reach the head."""
    model, dataset = make_model(SHAPES["tied"]), random_dataset([[6, 3, 2]])
    rows = []
    original = model_module.head_logits
    monkeypatch.setattr(
        model_module, "head_logits", lambda h, w: rows.append(len(h)) or original(h, w)
    )
    dpo.sequence_logps(model, data.collate(dataset, np.array([0])))
    assert rows == [5], "three and two response tokens, and nothing of the six of the prompt"


def test_token_logps_parity_with_other_implementations():
    """The log-probs that TRL and the original DPO code make of the same logits."""
    fixture = json.loads((Path(__file__).parent / "losses.json").read_text())["batch_logps"]
    for logits, labels, expected in zip(*(fixture[k] for k in ("logits", "labels", "sums"))):
        logits, targets = torch.tensor(logits).double()[:-1], torch.tensor(labels)[1:]  # shifted
        kept = targets != -100
        identity = torch.eye(logits.shape[1]).double()
        ours = TokenLogps.apply(logits[kept], identity, targets[kept]).sum().item()
        assert ours == pytest.approx(expected, abs=1e-6)


def test_token_logps_in_bfloat16():
    """V = 32,000, 512 tokens: the sum stays near float64's, where bf16 log-softmax is nats away."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 64), torch.randn(32000, 64) / 8
    targets = torch.randint(32000, (512,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = TokenLogps.apply(hidden, weight, targets)
        naive = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])
    exact = (hidden.bfloat16().double() @ weight.bfloat16().double().T).log_softmax(-1)
    exact = exact.gather(1, targets[:, None])[:, 0]
    assert ours.dtype == torch.float32
    error = (ours.double() - exact).pow(2).mean().sqrt().item()
    naive_error = (naive.bfloat16().double()[:, 0] - exact).pow(2).mean().sqrt().item()
    assert error < 0.006 and naive_error > 1.5 * error


def test_generate_agrees_with_teacher_forcing():
    """Greedy: each token is the argmax of the plain model, alone and in a batch. Sampled: the
    frequencies of first and second tokens are the plain model's probabilities."""
    model, eos = make_model(SHAPES["grouped"], scale=3.0).float(), 2
    prompts = [[5, 6, 7], [3], [9, 8, 7, 6, 5, 4, 3, 9, 10, 11], [4, 4]]
    together = generate(model, prompts, 12, eos, temperature=0)
    for prompt, response in zip(prompts, together):
        assert generate(model, [prompt], 12, eos, temperature=0) == [response]
        logits = plain_logits(model.double(), prompt + response)[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == response
        assert len(response) == 12 or response[-1] == eos
        model.float()
    count = 4000
    samples = generate(model, [[5, 6, 7]] * count, 2, eos, seed=3)
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


def test_sampling_options():
    model = make_model(SHAPES["tied"], scale=2.0).float()
    run = lambda **options: generate(model, [[5, 6]] * 50, 8, 2, **options)
    assert run(seed=1) == run(seed=1) != run(seed=2)
    greedy = run(temperature=0)
    assert run(top_k=1) == greedy == run(top_p=1e-9) == run(temperature=1e-4)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(3000, 1)  # 0.64, 0.24, 0.09, 0.03
    draw = lambda k, p: set(
        model_module.sample_tokens(logits, 1.0, k, p, torch.Generator().manual_seed(0)).tolist()
    )
    assert draw(0, 1.0) == {0, 1, 2, 3} and draw(2, 1.0) == {0, 1}
    assert draw(0, 0.6) == {0} and draw(0, 0.65) == {0, 1} and draw(0, 0.9) == {0, 1, 2}


def test_generate_stops_at_any_of_several_ids():
    model = make_model(SHAPES["tied"], scale=2.0).float()
    for ids in generate(model, [[5, 6]] * 200, 30, {2, 7, 8}, seed=1):
        assert not {2, 7, 8} & set(ids[:-1]) and (len(ids) == 30 or ids[-1] in {2, 7, 8})
    run = lambda eos: generate(model, [[5, 6]] * 20, 30, eos, seed=1)
    assert run(2) == run([2]) != run([2, 7])


@pytest.mark.slow
def test_compiled_sampling_is_the_same_in_one_graph():
    model = make_model(SHAPES["grouped"], scale=2.0).float()
    prompts = [[5, 6, 7], [3], [9, 8, 7, 6, 5]]
    run = lambda **options: generate(model, prompts, 20, 2, seed=1, **options)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    assert run(compile=True) == run()
    assert graphs["unique_graphs"] == before + 1, "every step of one shape"


def test_nothing_is_longer_than_the_sliding_window():
    model = Transformer(replace(SHAPES["tied"], sliding_window=10)).init_weights(0)
    model.config.check_length(10)
    assert len(generate(model, [[5, 6], [3] * 6], 4, [])[0]) == 4
    with pytest.raises(CheckpointError, match="11 tokens are more than the sliding window of 10"):
        generate(model, [[5, 6], [3] * 6], 5, 2)


# Adapters.


def make_lora(config: ModelConfig) -> Transformer:
    """Adapters with random B on a random model, in float64."""
    model = make_model(config).add_lora(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora.1." in name:
                parameter.normal_()
    return model


def merged_by_hand(model: Transformer) -> dict[str, torch.Tensor]:
    """The base weights by name, W + 2·B·A where there are adapters."""
    weights = dict(model.named_parameters())
    return {
        name: weight + 2 * weights[f"{stem}.lora.1.weight"] @ weights[f"{stem}.lora.0.weight"]
        if f"{(stem := name.removesuffix('.weight'))}.lora.0.weight" in weights
        else weight
        for name, weight in weights.items()
        if ".lora." not in name
    }


def test_random_weights():
    """GPT-2's, in the order of the parameters; adapters change nothing and begin with B = 0."""
    model = Transformer(SHAPES["grouped"]).init_weights(5)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        expected = torch.ones(parameter.shape)
        if parameter.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected.normal_(0, 0.02 / math.sqrt(6) if residual else 0.02, generator=generator)
        assert torch.equal(parameter, expected), name
    with torch.device("meta"):
        adapted = Transformer(SHAPES["grouped"]).add_lora(2)
    drawn = dict(random_weights(adapted, 5))
    assert list(drawn) == [name for name, _ in adapted.named_parameters()]
    assert all(torch.equal(drawn[name], parameter) for name, parameter in model.named_parameters())
    only = dict(random_weights(adapted, 5, only_adapters=True))
    assert {*only} == {name for name in drawn if ".lora." in name}
    for name, weight in only.items():
        assert torch.equal(weight, drawn[name]) and weight.device.type == "cpu"
        std = weight.shape[1] ** -0.5 if ".lora.0." in name else 0
        assert 0.7 * std <= weight.std() <= 1.3 * std, name


def test_lora_begins_as_the_base_and_trains_only_adapters():
    model = make_model(SHAPES["grouped"]).float()
    tokens, *where = sequence([5, 6, 7, 8, 50, 96, 3])
    before = model(tokens, *where)
    model.add_lora(4)
    assert torch.equal(model(tokens, *where), before)
    model(tokens, *where, tokens).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    projections = [
        *(f"self_attn.{m}_proj" for m in "qkvo"),
        *(f"mlp.{m}_proj" for m in ("gate", "up", "down")),
    ]
    assert trained == {
        f"layers.{n}.{p}.lora.{i}.weight" for n in range(3) for p in projections for i in (0, 1)
    }
    generator = torch.Generator().manual_seed(0)
    model.init_weights(0)
    assert torch.equal(
        model.embed_tokens.weight, torch.empty(97, 32).normal_(0, 0.02, generator=generator)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_is_the_merged_model(shape, tmp_path):
    """Log-probs and gradients of the adapters are those of W + 2·B·A; merged, saved and loaded."""
    model = make_lora(SHAPES[shape])
    plain, by_hand = Transformer(SHAPES[shape]).double(), merged_by_hand(model)
    tokens, *where = sequence([5, 6, 7, 8, 50, 96, 3])
    logps = model(tokens, *where, tokens)
    expected = torch.func.functional_call(plain, by_hand, (tokens, *where, tokens))
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-10)
    weights = torch.randn(7, dtype=torch.float64)
    adapters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad((x * weights).sum(), adapters) for x in (logps, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for _ in range(2):  # merging again adds nothing
        model.merge_lora()
        torch.testing.assert_close(model(tokens, *where, tokens), expected, rtol=0, atol=1e-10)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert [*dict(read_weights(tmp_path))] and {*dict(read_weights(tmp_path))} == {*by_hand}
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, by_hand[name].float(), rtol=1e-6, atol=1e-6)


def test_frozen_inputs_of_the_head_cost_nothing(monkeypatch):
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True)
    run = lambda h, w: TokenLogps.apply(h, w, torch.arange(9)).sum().backward()
    run(hidden, weight)
    expected, weight_grad = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    run(hidden.detach(), weight)
    assert torch.equal(weight.grad, weight_grad)
    monkeypatch.setattr(torch, "empty_like", None)  # where the gradient of the weight would begin
    run(hidden, weight.detach())
    assert torch.equal(hidden.grad, expected)
