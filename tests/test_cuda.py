"""What only a GPU can show. Each is skipped without one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPES, make_model, random_dataset

import data
import dpo
from model import Transformer, attentions, generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES = [[5, 4, 1], [40, 60, 20, 90], [300, 2, 33], [3, 1, 1], [2, 70]]


def test_the_flash_call_is_the_padded_one():
    """Fewer queries than keys, grouped-query heads: values and gradients, per layer kind."""
    batch = data.collate(random_dataset(SIZES), np.arange(len(SIZES)))
    tokens, device = len(batch.tokens), torch.device("cuda")
    for heads in (4, 2):
        x = [torch.randn(tokens, h, 64, device=device) for h in (4, heads, heads)]
        for ours, plain in zip(
            attentions(batch.branches, device, torch.bfloat16),
            attentions(batch.branches, device, torch.float32),
        ):
            outs = []
            for attend, dtype in ((ours, torch.bfloat16), (plain, torch.float32)):
                q, k, v = (y.bfloat16().to(dtype).requires_grad_() for y in x)
                out = attend(0, q[attend.rows], k, v)
                outs.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
            for a, b in zip(*outs):
                torch.testing.assert_close(a.float(), b.float(), rtol=0.03, atol=0.03)


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


def test_a_step_does_not_wait_for_the_gpu():
    model = Transformer(SHAPES["tied"]).init_weights(0).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    dataset = random_dataset(SIZES)

    def step():
        batch = data.collate(dataset, np.arange(len(SIZES))).to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            logps = dpo.sequence_logps(model, batch)
        loss, _ = dpo.compute_loss("dpo", logps, batch, torch.zeros_like(logps), 0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # memory and kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sampling_agrees_with_the_cpu():
    model = make_model(SHAPES["grouped"], scale=3.0).float()
    prompts = [[5, 6, 7], [3], [9, 8, 7, 6, 5, 4]]
    expected = generate(model, prompts, 12, 2, temperature=0)
    model.cuda()
    assert generate(model, prompts, 12, 2, temperature=0) == expected
    assert generate(model, prompts, 12, 2, temperature=0, compile=True) == expected
