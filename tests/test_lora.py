"""Adapters: they begin as nothing, are all that is trained, and end in the weights."""

import pytest
import torch
from conftest import SHAPES, make_model
from test_model import sequence

from extra import lora
from model import ModelConfig, Transformer, fill, load_pretrained, read_weights, save_pretrained

IDS = [5, 6, 7, 8, 50, 96, 3]
PROJECTIONS = [f"self_attn.{m}_proj" for m in "qkvo"]
PROJECTIONS += [f"mlp.{m}_proj" for m in ("gate", "up", "down")]


def adapted(config: ModelConfig) -> Transformer:
    """Adapters with random A and B on a random model, in float64."""
    model = make_model(config)
    lora.add(model, 3, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora." in name:
                parameter.normal_()
    return model


def merged_by_hand(model: Transformer) -> dict[str, torch.Tensor]:
    """The base weights by name, W + 2·B·A where there are adapters."""
    weights = dict(model.named_parameters())
    merged = {}
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora.0.weight" in weights:
            a, b = (weights[f"{stem}.lora.{i}.weight"] for i in (0, 1))
            merged[name] = weight + 2 * b @ a
        elif ".lora." not in name:
            merged[name] = weight
    return merged


def test_first_values():
    """A is N(0, 1/inputs) from the seed, B zero; each named as the model names it."""
    with torch.device("meta"):  # as the trainer adds them, before anything is filled
        model = Transformer(SHAPES["grouped"])
    first = lora.add(model, 16, seed=5)
    parameters = {name: p for name, p in model.named_parameters() if ".lora." in name}
    assert first.keys() == parameters.keys()
    for name, weight in first.items():
        assert weight.shape == parameters[name].shape and weight.device.type == "cpu"
        std = weight.shape[1] ** -0.5 if ".lora.0." in name else 0
        assert 0.8 * std <= weight.std() <= 1.2 * std, name
    values = lambda seed: lora.add(make_model(SHAPES["grouped"]), 16, seed)
    same, other = values(5), values(6)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if ".lora.0." in name)


def test_adapters_begin_as_the_base_and_alone_are_trained():
    model = make_model(SHAPES["grouped"]).float()
    inputs, targets = sequence(IDS), torch.tensor(IDS)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = model(*inputs, targets).detach()
    fill(model, base | lora.add(model, 4, seed=0))  # as the trainer does
    assert torch.equal(model(*inputs, targets), before)
    model(*inputs, targets).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    adapters = {f"layers.{n}.{p}.lora.{i}.weight" for n in range(3) for p in PROJECTIONS for i in (0, 1)}  # fmt: skip
    assert trained == adapters == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_are_the_merged_model(shape, tmp_path):
    """Log-probs and gradients of the adapters are those of W + 2·B·A; merged, saved and loaded."""
    model = adapted(SHAPES[shape])
    plain, by_hand = Transformer(SHAPES[shape]).double(), merged_by_hand(model)
    inputs = (*sequence(IDS), torch.tensor(IDS))
    logps = model(*inputs)
    expected = torch.func.functional_call(plain, by_hand, inputs)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-10)
    weights = torch.randn(len(IDS), dtype=torch.float64)
    adapters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad((x * weights).sum(), adapters) for x in (logps, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for _ in range(2):  # merging again adds nothing
        lora.merge(model, seed=7)
        named = dict(model.named_parameters())
        fresh = Transformer(SHAPES[shape]).double()
        for name, first in lora.add(fresh, 3, seed=7).items():
            assert torch.equal(named[name], first.double()), "as where this model is loaded"
        torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=1e-10)
    save_pretrained(model, tmp_path)  # without the adapters
    assert read_weights(tmp_path).keys() == by_hand.keys()
    for name, parameter in load_pretrained(tmp_path).named_parameters():
        torch.testing.assert_close(parameter, by_hand[name].float(), rtol=1e-6, atol=1e-6)


def test_adapters_under_activation_checkpointing():
    """Recomputed in the backward pass, the same gradients."""
    model = adapted(SHAPES["tied"])
    inputs = (*sequence(IDS), torch.tensor(IDS))
    adapters = [p for p in model.parameters() if p.requires_grad]
    grads = []
    for model.activation_checkpointing in (False, True):
        grads.append(torch.autograd.grad(model(*inputs).sum(), adapters))
    assert all(map(torch.equal, *grads))
