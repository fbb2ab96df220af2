"""Adapters in peft's layout: ours in the peft package, and its in ours, with the same logits."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHAPES, make_model, run_here, run_script, write_jsonl
from test_model import sequence

import data
from extra import checkpoints
from extra.checkpoints import base_of, bring, with_tokenizer
from model import (
    CheckpointError,
    load_config,
    load_pretrained,
    read_safetensors,
    read_weights,
    save_pretrained,
)

IDS = [5, 6, 7, 8, 50, 96, 3, 11, 12]
FLAGS = """--sft_epochs=1 --epochs=2 --batch_size=4 --learning_rate=1e-2 --sft_learning_rate=1e-2
    --warmup_steps=0 --micro_batch_tokens=60 --beta=0.5 --dtype=float32 --max_length=40
    --max_prompt_length=20""".split()


def rows(count: int) -> list[dict]:
    """Pairs of token ids: no tokenizer is needed."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda size: torch.randint(3, 97, (size,), generator=generator).tolist()
    return [{"prompt": draw(3 + n % 5), "chosen": draw(2 + n % 4), "rejected": draw(2 + n % 3)}
            for n in range(count)]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Pairs, and a base of each shape, as transformers writes what bring() adds to."""
    root = tmp_path_factory.mktemp("adapters")
    write_jsonl(root / "pairs.jsonl", rows(10))
    for shape, config in SHAPES.items():
        config = replace(config, bos_token_id=1, eos_token_id=2, max_position_embeddings=100)
        save_pretrained(make_model(config, 4.0).float(), root / shape)
    return root


def logits_of(directory) -> torch.Tensor:
    return load_pretrained(directory)(*sequence(IDS))


def with_peft(directory, base=None) -> torch.Tensor:
    """The logits of an adapter directory in transformers and peft."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    named = json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = transformers.AutoModelForCausalLM.from_pretrained(base or named)
    model = peft.PeftModel.from_pretrained(model, directory).eval()
    return model(torch.tensor([IDS])).logits[0].detach()


def same(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("shape", ["biased", "normed"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_train_saves_is_the_merged_model_in_peft(shape, ranks, place, tmp_path):
    """Of both stages that of DPO, on the model that SFT made; the same from several processes."""
    out = tmp_path / "out"
    flags = [f"--data={place / 'pairs.jsonl'}", f"--init_from={place / shape}", *FLAGS]
    flags += ["--lora_rank=3", "--save_adapter", f"--out_dir={out}"]
    if ranks == 1:
        run_here("train.py", *flags)
    else:
        run_script("train.py", *flags, ranks=ranks)
    assert not (out / "sft" / "adapter").exists()
    merged, base = logits_of(out), logits_of(out / "sft")
    assert (merged - base).abs().max() > 0.1
    same(with_peft(out / "adapter"), merged)
    same(logits_of(out / "adapter"), merged)
    weights = read_safetensors(out / "adapter" / "adapter_model.safetensors")
    names = [f"self_attn.{m}_proj" for m in "qkvo"] + [
        f"mlp.{m}_proj" for m in ("gate", "up", "down")
    ]
    stem = "base_model.model.model.layers"
    assert weights.keys() == {f"{stem}.{n}.{name}.lora_{factor}.weight"
                              for n in range(2) for name in names for factor in "AB"}  # fmt: skip
    assert {w.dtype for w in weights.values()} == {torch.float32}
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((out / "sft").resolve())
    assert (settings["r"], settings["lora_alpha"], settings["bias"]) == (3, 6, "none")
    assert settings["peft_type"] == "LORA" and settings["task_type"] == "CAUSAL_LM"
    assert sorted(settings["target_modules"]) == sorted(n.split(".")[1] for n in names)


def test_one_stage_hangs_its_adapters_on_the_checkpoint_it_starts_from(place, tmp_path):
    """And what is trained from an adapter goes on from the merged model; the next adapters hang on
    adapters. What another run left does not stay."""
    data, first, second = f"--data={place / 'pairs.jsonl'}", tmp_path / "first", tmp_path / "second"
    lora = ["--lora_rank=2", "--save_adapter"]
    sft = [
        "--epochs=0" if "--epochs" in f else f for f in FLAGS if not re.match("--(beta|learn)", f)
    ]
    run_here(
        "train.py", data, f"--init_from={place / 'grouped'}", *sft, *lora, f"--out_dir={first}"
    )
    assert base_of(first / "adapter") == place / "grouped"
    same(with_peft(first / "adapter"), logits_of(first))
    same(logits_of(first / "adapter"), logits_of(first))
    assert not torch.allclose(logits_of(first), logits_of(place / "grouped"), atol=0.01)

    dpo = ["--sft_epochs=0", *(f for f in FLAGS if "--sft_" not in f)]
    start = first / "adapter"
    shown = run_here("train.py", data, f"--init_from={start}", *dpo, *lora, f"--out_dir={second}")
    assert "the largest log-ratio is" in shown.stdout
    assert len([*start.glob("reference-*.npy")]) == 1, "beside what it is of"
    again = run_here("train.py", data, f"--init_from={start}", *dpo, f"--out_dir={tmp_path / 'x'}")
    assert "log-probs found in" in again.stdout
    save_pretrained(load_pretrained(place / "grouped"), place / "grouped")  # written again
    again = run_here("train.py", data, f"--init_from={start}", *dpo, f"--out_dir={tmp_path / 'x'}")
    assert "log-probs computed" in again.stdout, "the base's files count, too"
    assert [p.name for p in checkpoints.places_of(second / "adapter")] == [
        "adapter",
        "adapter",
        "grouped",
    ]
    same(logits_of(second / "adapter"), logits_of(second), atol=1e-3)
    merged = json.loads((second / "config.json").read_text())
    assert merged == json.loads((place / "grouped" / "config.json").read_text())
    out = run_here(
        "sample.py", second / "adapter", "--compare", start, "--score", place / "pairs.jsonl"
    )
    assert "20 responses, mean reward" in out.stdout
    assert json.loads((second / "run.json").read_text())["settings"]["beta"] == 0.5
    tenth = run_here("sample.py", second / "adapter", "--compare", start, "--score",
                     place / "pairs.jsonl", "--beta=0.5")  # fmt: skip
    assert out.stdout == tenth.stdout, "the run's own β"

    run_here("train.py", data, f"--init_from={place / 'grouped'}", *dpo, f"--out_dir={second}")
    assert not (second / "adapter").exists(), "it was another run's"


PEFTS = {
    "alpha 5 of rank 3": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "some projections, some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "a pattern": {"target_modules": r".*self_attn\.(k|o)_proj", "lora_dropout": 0.1},
    "all": {"target_modules": "all-linear"},
    "gaussian": {"init_lora_weights": "gaussian", "lora_alpha": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("case", PEFTS)
@pytest.mark.parametrize("shape", ["tied", "biased", "normed"])
def test_what_peft_saves_is_read_as_peft_reads_it(case, shape, place, tmp_path, monkeypatch):
    """Its scale and its targets; from a safetensors file or torch's; by a name relative to the
    adapter or to the working directory, or absolute."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(place / shape)
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", **({"target_modules": every} | PEFTS[case]))
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3)
    expected = model.eval()(torch.tensor([IDS])).logits[0]
    out = tmp_path / "adapter"
    model.save_pretrained(out)
    same(logits_of(out), expected)
    assert (logits_of(place / shape) - expected).abs().max() > 0.1
    assert load_config(out) == load_config(place / shape) and base_of(out) == place / shape
    shutil.copytree(place / shape, tmp_path / "base")
    named, path = json.loads((out / "adapter_config.json").read_text()), out / "adapter_config.json"
    monkeypatch.chdir(tmp_path)
    for name in ("../base", "base"):
        path.write_text(json.dumps(named | {"base_model_name_or_path": name}))
        assert base_of("adapter").resolve() == tmp_path / "base"
        same(logits_of("adapter"), expected)
    torch.save(read_safetensors(out / "adapter_model.safetensors"), out / "adapter_model.bin")
    (out / "adapter_model.safetensors").unlink()
    same(logits_of(out), expected)


def test_only_what_has_adapters_is_changed(place, tmp_path):
    """In any precision of the base, and of a base in several files."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        place / "normed", dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.get_peft_model(
        base, peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    expected = model.eval()(torch.tensor([IDS])).logits[0]
    same(logits_of(tmp_path / "adapter"), expected)
    plain, merged = read_weights(tmp_path / "base"), read_weights(tmp_path / "adapter")
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert changed == {f"layers.{n}.self_attn.v_proj.weight" for n in range(2)}
    assert {w.dtype for name, w in merged.items() if name not in changed} == {torch.bfloat16}


USUAL = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
REFUSED = [
    ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    ({"use_dora": True}, "use_dora True"),
    ({"bias": "all"}, "bias 'all'"),
    ({"bias": "lora_only"}, "bias 'lora_only'"),
    ({"lora_bias": True}, "lora_bias True"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\]"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"target_parameters": ["x"]}, "target_parameters"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    ({"something_new": {"of": "peft"}}, "something_new"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "'embed_tokens' is no projection of a block"),
    ({"target_modules": ["lm_head"]}, "'lm_head' is no projection of a block"),
    ({"r": 0}, "r 0 is not a positive number"),
    ({"r": True}, "r True is not a positive number"),
    ({"lora_alpha": None}, "lora_alpha None is not a positive number"),
    ({"r": 3}, r"layers.0.self_attn.q_proj does not fit r 3 and the base: A \(2, 32\), B \(32, 2\) and base \(32, 32\)"),
    ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
    ({"base_model_name_or_path": "."}, "base_model_name_or_path '.' leads back to it"),
    ({"base_model_name_or_path": "/nowhere/at/all"}, "base_model_name_or_path '/nowhere/at/all' is not here: write there where"),
    ({"base_model_name_or_path": "org/name-1.5"}, "'org/name-1.5' is not here: `hf download org/name-1.5 --local-dir DIR`, then write DIR there"),
]  # fmt: skip


@pytest.fixture
def adapter(place, tmp_path) -> Path:
    """Adapters of one projection, written by hand."""
    out = tmp_path / "adapter"
    out.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {
        f"{stem}.lora_A.weight": torch.ones(2, 32),
        f"{stem}.lora_B.weight": torch.ones(32, 2),
    }
    torch.save(weights, out / "adapter_model.bin")
    settings = USUAL | {"base_model_name_or_path": str(place / "tied")}
    (out / "adapter_config.json").write_text(json.dumps(settings))
    return out


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_unusable_adapters_are_refused_by_name(change, message, adapter):
    path = adapter / "adapter_config.json"
    usual = json.loads(path.read_text())
    assert logits_of(adapter).isfinite().all()
    path.write_text(json.dumps(usual | change))
    with pytest.raises(CheckpointError, match=f"adapter_config.json: .*{message}") as caught:
        load_pretrained(adapter)
    assert "\n" not in str(caught.value)
    if "does not fit" not in message:  # that is seen when the weights are read
        with pytest.raises(CheckpointError):
            load_config(adapter)


def test_damaged_adapters_are_refused_by_name(adapter):
    weights = torch.load(adapter / "adapter_model.bin")
    a, b = weights
    for change, message in (
        ({"base_model.model.lm_head.lora_A.weight": weights[a]}, "lm_head.lora_A.weight is no adapter"),
        ({"base_model.model.model.embed_tokens.weight": weights[a]}, "embed_tokens.weight is no"),
        ({a.replace("lora_A", "lora_magnitude_vector"): weights[a]}, "magnitude_vector.weight is no"),
        ({a.replace("layers.0", "layers.7"): weights[a]}, r"layers.7.\S+ does not fit .*base None"),
        ({b: weights[b][:, :1]}, r"does not fit r 2 and the base: A \(2, 32\), B \(32, 1\)"),
        ({b: weights[b][:5]}, r"does not fit r 2 and the base: A \(2, 32\), B \(5, 2\)"),
    ):  # fmt: skip
        torch.save(weights | change, adapter / "adapter_model.bin")
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(adapter)
    for content, message in ({}, "no weights in it"), ({a: weights[a]}, "B None"):
        torch.save(content, adapter / "adapter_model.bin")
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="adapter_model.bin: cannot be read"):
        load_pretrained(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: cannot be read"):
        load_pretrained(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="adapter_config.json: not valid JSON"):
        load_config(adapter)


def test_names_of_the_hub_are_told_how_to_come(place, tmp_path, monkeypatch):
    """By both scripts, in one sentence; other names are just not there."""
    monkeypatch.chdir(tmp_path)
    get = "`hf download org/name-1.5B --local-dir DIR`"
    data = f"--data={place / 'pairs.jsonl'}"
    for arguments in (["train.py", data, "--init_from=org/name-1.5B"],
                      ["sample.py", "org/name-1.5B", "--prompt=x"],
                      ["sample.py", place / "tied", "--compare=org/name-1.5B", "--score", place / "pairs.jsonl"]):  # fmt: skip
        error = run_here(*arguments, expect=2).stderr
        assert (
            f"org/name-1.5B: there is no such directory; a model of the Hugging Face hub comes by {get}"
            in error
        )
        assert error.count("\n") == 1
    for name in ("nowhere", "/no/where", "a/b/c"):
        error = run_here("train.py", data, f"--init_from={name}", expect=2).stderr
        assert "config.json: not found; a checkpoint directory has one" in error
    (tmp_path / "org" / "name-1.5B").mkdir(parents=True)
    assert "config.json: not found" in run_here(*arguments, expect=2).stderr


def test_a_tokenizer_is_that_of_the_adapters_or_of_their_base(adapter, place, tmp_path):
    """All of its files from one place; what generation does is the base's."""
    base = tmp_path / "base"
    shutil.copytree(place / "tied", base)
    for name in (
        "tokenizer.model",
        "tokenizer_config.json",
        "generation_config.json",
        "merges.txt",
    ):
        (base / name).write_text(json.dumps({name: "of the base"}))
    path = adapter / "adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)})
    )
    out = tmp_path / "out"
    names = lambda: {p.name: p.read_text() for p in out.iterdir() if p.name in checkpoints.TOKENIZER_FILES}  # fmt: skip
    save_pretrained(load_pretrained(adapter), out)
    (out / "chat_template.jinja").write_text("of another run")
    bring(out, adapter)
    assert with_tokenizer(adapter) == base_of(adapter) == base
    with pytest.raises(data.DataError, match=f"{base}/tokenizer.model: not a SentencePiece model"):
        data.find_tokenizer(adapter)
    given = {"tokenizer.model", "tokenizer_config.json", "generation_config.json", "merges.txt"}
    assert names() == {name: json.dumps({name: "of the base"}) for name in given}
    for name in ("tokenizer.json", "chat_template.jinja"):
        (adapter / name).write_text(json.dumps({name: "of the adapter"}))
    bring(out, adapter)
    assert with_tokenizer(adapter) == adapter and with_tokenizer(base) == base_of(base) == base
    expected = {
        name: json.dumps({name: "of the adapter"})
        for name in ("tokenizer.json", "chat_template.jinja")
    }
    assert names() == expected | {
        "generation_config.json": json.dumps({"generation_config.json": "of the base"})
    }
    saved = json.loads((out / "config.json").read_text())
    assert saved == json.loads((base / "config.json").read_text())


def test_nothing_is_written_unless_it_is_asked_for(place, tmp_path):
    run_here("train.py", f"--data={place / 'pairs.jsonl'}", f"--init_from={place / 'tied'}", *FLAGS,
             "--lora_rank=2", f"--out_dir={tmp_path}")  # fmt: skip
    assert not (tmp_path / "adapter").exists()
