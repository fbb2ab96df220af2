"""LoRA (Hu et al., 2106.09685) from outside the model: W·x + 2·B·A·x, W frozen (alpha = 2·rank)."""

import torch
from torch import nn

from model import copy_rows


def add(model, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """Freeze the model and hang adapters on every projection; returns their first values.

    A is N(0, 1/inputs), B zero, so that nothing changes at first.
    """
    model.requires_grad_(False)
    projections = [m for m in model.layers.modules() if isinstance(m, nn.Linear)]
    for module in projections:
        like = {"bias": False, "device": module.weight.device, "dtype": module.weight.dtype}
        a = nn.Linear(module.in_features, rank, **like)
        b = nn.Linear(rank, module.out_features, **like)
        module.lora = nn.Sequential(a, b)
        module.register_forward_hook(lambda m, inputs, out: out + 2 * m.lora(inputs[0]))
    return first_values(model, seed)


def first_values(model, seed: int) -> dict[str, torch.Tensor]:
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, module in model.layers.named_modules():
        if hasattr(module, "lora"):
            a, b = (factor.weight for factor in module.lora)
            first = torch.randn(a.shape, generator=generator) * a.shape[1] ** -0.5
            weights[f"layers.{name}.lora.0.weight"] = first
            weights[f"layers.{name}.lora.1.weight"] = torch.zeros(b.shape)
    return weights


@torch.no_grad()
def merge(model, seed: int):
    """W + 2·B·A into the weights, and the adapters begin anew, as they do where this model is
    loaded: what follows is the same, whether the run was stopped here or not. (all ranks)"""
    for module in model.modules():
        if hasattr(module, "lora"):
            a, b = (factor.weight for factor in module.lora)
            module.weight.add_(b @ a, alpha=2)
    parameters = dict(model.named_parameters())
    for name, first in first_values(model, seed).items():
        copy_rows(parameters[name], first)
