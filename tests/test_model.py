"""The packed model against plain computations that share nothing with it but the weights."""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPES, make_model, random_dataset

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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_safetensors", [True, False])
def test_checkpoint_round_trip_and_transformers(shape, with_safetensors, tmp_path, monkeypatch):
    """Bit-identical weights after saving and loading; transformers' Llama gives the same logits."""
    if with_safetensors:
        pytest.importorskip("safetensors")
    else:
        monkeypatch.setattr(model_module, "safetensors", None)
    model = make_model(SHAPES[shape]).float()
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.config == model.config
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(a, b), name
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    ids = [5, 6, 7, 8, 50, 96, 3]
    ours = model(torch.tensor(ids), torch.arange(7), torch.tensor([[0, 0, 0, 7]]), torch.arange(7))
    torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], ours, rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    theirs.save_pretrained(tmp_path / "theirs")  # and their config.json opens here
    again = load_pretrained(tmp_path / "theirs")
    assert torch.equal(again.embed_tokens.weight, model.embed_tokens.weight)
    assert again.config.rope_theta == model.config.rope_theta


def test_unusable_checkpoints_are_refused_by_name(tmp_path):
    model = Transformer(SHAPES["tied"]).init_weights(0)
    save_pretrained(model, tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    cases = [
        ({"model_type": "gpt2"}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "llama3"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": 98}, "do not fit"),
    ]
    for change, message in cases:
        (tmp_path / "config.json").write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(good))
    next(iter(tmp_path.glob("*model.*[snb]"))).write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not found"):
        load_pretrained(tmp_path / "nowhere")
