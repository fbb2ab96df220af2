"""Apple's GPU, which no machine of ours has: what can be known of it without one.

It has no float64, and none is made there: the CPU is watched in its place. What it computes has not
been seen.
"""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_dataset, read_metrics, run_here, write_jsonl
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import dpo
import sample
import train


class NoFloat64(TorchDispatchMode):
    """No operation may give it, unless it is allowed for a while."""

    calls, allowed = 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and not self.allowed:
                assert x.dtype != torch.float64, function
                self.calls += 1
        return out


def a_batch() -> data.Batch:
    trees = random_dataset([[5, 4, 3], [6, 2, 7], [1, 3, 3]])
    trees = dataclasses.replace(trees, reference=np.zeros(6, np.float32))
    return data.collate(trees, np.arange(3))


def test_double_is_float64_but_on_apples_gpu():
    fake = FakeTensorMode()
    there = FakeTensor(fake, torch.zeros((), device="meta"), torch.device("mps:0"))
    assert there.device.type == "mps" and dpo.double(there) is there
    assert dpo.double(torch.zeros(())).dtype == torch.float64
    assert "mps" in _get_fused_kernels_supported_devices(), "AdamW is fused there, too"


@pytest.mark.parametrize(
    "more", [["--loss=kto", "--lora_rank=2"], ["--dtype=bfloat16", "--optimizer=rmsprop"]]
)
def test_a_run_makes_no_float64_but_on_the_cpu(more, tmp_path, monkeypatch):
    """Both stages, evaluation, samples and states, the CPU in the place of the GPU; what is kept of
    the reference is on the CPU anyway. The results are the same but for rounding."""
    rows = [
        {"prompt": f"Rate {i}:", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(12)
    ]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    flags = f"""--data={path} --eval_data={path} --hidden_size=32 --num_layers=2 --num_heads=2
        --vocab_size=300 --batch_size=4 --micro_batch_tokens=64 --learning_rate=1e-3 --log_every=1
        --sample_every=9 --save_every=1 --max_steps=2""".split()
    flags += more
    run_here("train.py", *flags, f"--out_dir={tmp_path / 'plain'}")
    watch, real = NoFloat64(), train.with_reference

    def with_reference(*arguments):
        watch.allowed = True
        try:
            return real(*arguments)
        finally:
            watch.allowed = False

    monkeypatch.setattr(train, "with_reference", with_reference)
    monkeypatch.setattr(dpo, "double", lambda x: x)
    with watch:
        run_here("train.py", *flags, f"--out_dir={tmp_path / 'out'}")
    assert watch.calls > 1000
    for ours, plain in zip(*(read_metrics(tmp_path / x) for x in ("out", "plain")), strict=True):
        for name, value in plain.items():
            if "/" in name:
                assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_it_is_taken_where_it_is(tmp_path, monkeypatch):
    """By a single process: gloo knows no such tensors. CUDA comes first; bfloat16 on request."""
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(()))  # there is none such
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = lambda dtype: train.Run(
        train.Settings(data=__file__, out_dir=str(tmp_path), dtype=dtype)
    )
    runs = [made(dtype) for dtype in ("auto", "float32", "bfloat16")]
    assert {run.device.type for run in runs} == {"mps"}
    assert [run.bf16 for run in runs] == [False, False, True]
    assert {run.autocast.device for run in runs} == {"mps"}
    placed = []
    stub = SimpleNamespace(to=lambda place: placed.append(place) or stub, eval=lambda: stub)
    monkeypatch.setattr(sample, "load_pretrained", lambda _: stub)
    sample.load(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        sample.load(tmp_path)
    assert placed == ["mps", "cuda"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    begun = []
    monkeypatch.setattr(train.dist, "init_process_group", lambda how, **_: begun.append(how))
    monkeypatch.setattr(train.dist, "broadcast_object_list", lambda found: None)
    run = made("auto")
    assert (run.device.type, begun) == ("cpu", ["gloo"])
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["ranks"] == 1, "the one before"


def test_only_cuda_copies_while_it_works(monkeypatch):
    """Elsewhere the memory that is copied from may be used again before it has been."""
    asked, real = [], torch.Tensor.to

    def to(x, *given, **options):
        asked.append(options.get("non_blocking"))
        return real(x, *given, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    a_batch().to("meta")
    assert set(asked) == {False}
