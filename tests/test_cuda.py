"""What only a GPU can show. Each is skipped without one."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPES, make_model, random_dataset

import data
import dpo
import model as model_module
import train
from extra.attention import flash_attention, padded_attention
from model import Transformer, segment_attention, token_logps
from sample import generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES = [[5, 4, 1], [40, 60, 20, 90], [300, 2, 33], [3, 1, 1], [2, 70], [1, 6, 2]]


def attended(attend, qkv: list, dtype: torch.dtype, rows: int) -> list:
    """The output for the last rows and the gradients, from inputs rounded to bf16."""
    q, k, v = (x.bfloat16().to(dtype).requires_grad_() for x in qkv)
    out = attend(q[-rows:], k, v)
    return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]


@pytest.mark.parametrize("heads", [4, 2])
def test_the_flash_call_is_the_plain_one(heads):
    """Fewer queries than keys, grouped-query heads: values and gradients, in every layer."""
    batch = data.collate(random_dataset(SIZES), np.arange(len(SIZES)))
    rows, device = len(batch.tokens), torch.device("cuda")
    qkv = [torch.randn(rows, h, 64, device=device) for h in (4, heads, heads)]
    predicting = batch.segments[:, 2] >= rows - len(batch.targets)
    for segments, last in (
        (batch.segments, rows),
        (batch.segments[predicting], len(batch.targets)),
    ):
        flash = attended(flash_attention(segments, device), qkv, torch.bfloat16, last)
        for other in (padded_attention, segment_attention):
            exact = attended(other(segments, device), qkv, torch.float32, last)
            for a, b in zip(flash, exact):
                torch.testing.assert_close(a.float(), b.float(), rtol=0.03, atol=0.03)


def test_grouped_queries_in_the_kernel_are_repeated_keys(monkeypatch):
    """`enable_gqa`, where torch has it, and keys and values repeated by hand, as before 2.12."""
    batch = data.collate(random_dataset(SIZES), np.arange(len(SIZES)))
    rows, device = len(batch.tokens), torch.device("cuda")
    qkv = [torch.randn(rows, h, 64, device=device) for h in (4, 2, 2)]
    found = []
    for version in (torch.__version__, "2.11.0"):
        monkeypatch.setattr(torch, "__version__", version)
        attend = flash_attention(batch.segments, device)
        found.append(attended(attend, qkv, torch.bfloat16, rows))
    for a, b in zip(*found):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_near_float32(shape):
    model = make_model(SHAPES[shape], scale=2.0).float()
    batch = data.collate(random_dataset(SIZES), np.arange(len(SIZES)))
    expected = dpo.sequence_logps(model, batch)
    expected.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        logps = dpo.sequence_logps(model, batch.to("cuda"))
    logps.sum().backward()
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.cpu(), expected, rtol=0.02, atol=0.5)
    for p, grad in zip(model.parameters(), grads):
        assert F.cosine_similarity(p.grad.cpu().flatten(), grad.flatten(), dim=0) > 0.99


def test_log_probs_in_chunks_are_those_at_once(monkeypatch):
    """In float32 on the GPU, values and gradients."""
    inputs = torch.randn(40, 64, device="cuda"), torch.randn(500, 64, device="cuda")
    targets = torch.randint(500, (40,), device="cuda")
    found = []
    for many in (2**24, 2000):
        monkeypatch.setattr(model_module, "MANY", many)
        hidden, weight = (x.clone().requires_grad_() for x in inputs)
        logps = token_logps(hidden, weight, targets)
        found.append([logps, *torch.autograd.grad(logps.sum(), (hidden, weight))])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_step_waits_for_the_gpu_once(monkeypatch):
    """To learn whether it is finite, when all its micro-batches are under way; never otherwise."""
    model = Transformer(SHAPES["tied"]).init_weights(0).cuda()
    optimizer = dpo.make_optimizer(model)
    dataset = random_dataset([size for size in SIZES if len(size) > 2])
    run = SimpleNamespace(world=1, device=torch.device("cuda"), asked=0)
    run.autocast = torch.autocast("cuda", torch.bfloat16)
    run.total = lambda sums: train.Run.total(run, sums)
    loss_of = partial(dpo.preference_loss, loss=dpo.dpo, beta=0.1)
    isfinite = torch.isfinite

    def asked(value) -> bool:
        run.asked += 1
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        finite = bool(isfinite(value))
        torch.cuda.set_sync_debug_mode(mode)
        return finite

    def step() -> dict:
        batches = (data.collate(dataset, np.array([e])).to("cuda") for e in range(len(dataset)))
        sums = dpo.take_step(model, optimizer, batches, loss_of, 1 / len(dataset), 1.0, run)
        return sums | {"mean": dpo.mean_logratio(sums, 0.1)}

    monkeypatch.setattr(torch, "isfinite", asked)
    before = model.norm.weight.detach().clone()
    step()  # memory and kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.asked == 2 and float(sums["count"]) > len(dataset)
    assert not torch.equal(model.norm.weight, before)


def test_sampling_agrees_with_the_cpu():
    model = make_model(SHAPES["grouped"], scale=3.0).float()
    prompts = [[5, 6, 7], [3], [9, 8, 7, 6, 5, 4]]
    expected = generate(model, prompts, 12, 2, temperature=0)
    model.cuda()
    assert generate(model, prompts, 12, 2, temperature=0) == expected
    assert generate(model, prompts, 12, 2, temperature=0, compile=True) == expected
