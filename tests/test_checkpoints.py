"""Checkpoint directories: read, refused, saved, sharded; transformers reads and writes the same."""

import builtins
import contextlib
import json
from dataclasses import asdict, replace
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    SHAPES,
    assert_same_change,
    make_model,
    run_here,
    run_script,
    save_tokenizer,
    write_jsonl,
)
from test_model import sequence

from extra import lora
from extra.checkpoints import bring, complete
from model import (
    CheckpointError,
    ModelConfig,
    Transformer,
    fill,
    load_config,
    load_pretrained,
    read_safetensors,
    read_weights,
    save_pretrained,
)
from sample import generate

# The shapes of published models, small.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
CHECKPOINTS = {
    "Llama 2": ModelConfig(97, 32, 64, 2, 4, 4, 8, bos_token_id=1, eos_token_id=2),
    "Llama 3.2": ModelConfig(97, 32, 64, 2, 4, 2, 16, rope_scaling=LLAMA3, tie_word_embeddings=True, eos_token_id=[2, 5]),
    "Mistral": ModelConfig(97, 32, 64, 2, 4, 2, 8, sliding_window=400, model_type="mistral"),
    "Mistral v0.3": ModelConfig(97, 32, 64, 2, 4, 2, 16, rope_theta=1e6, model_type="mistral"),
    "Qwen2.5": ModelConfig(97, 32, 64, 2, 4, 2, 8, rope_theta=1e6, model_type="qwen2"),
    "Qwen2.5 0.5B": ModelConfig(97, 32, 64, 2, 4, 2, 16, tie_word_embeddings=True, model_type="qwen2"),
    "Qwen3": ModelConfig(97, 32, 64, 2, 4, 2, 16, rms_norm_eps=1e-3, model_type="qwen3"),
    "Qwen3 0.6B": ModelConfig(97, 32, 64, 2, 4, 4, 8, tie_word_embeddings=True, model_type="qwen3"),
    "SmolLM": SHAPES["tied"],
    "wide heads": SHAPES["grouped"],
}  # fmt: skip


def assert_same_weights(a, b, dtype=torch.float32):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name].to(dtype).float(), b[name]), name


def llama_names(model) -> dict[str, torch.Tensor]:
    """The weights as they are named in files."""
    whole = lambda name: name if name == "lm_head.weight" else f"model.{name}"
    return {whole(name): p.detach() for name, p in model.named_parameters()}


def write_shards(weights: dict, directory: Path, count: int = 3):
    """pytorch_model.bin in so many files with an index, as transformers 4 distributed them."""
    names, where = sorted(weights), {}
    for n in range(count):
        file = f"pytorch_model-{n + 1:05d}-of-{count:05d}.bin"
        where |= dict.fromkeys(names[n::count], file)
        torch.save({name: weights[name] for name in names[n::count]}, directory / file)
    index = {"metadata": {}, "weight_map": where}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shape", CHECKPOINTS)
def test_round_trip_and_transformers(shape, tmp_path):
    """Bit-identical after saving and loading; transformers gives the same logits, and vice versa."""
    transformers = pytest.importorskip("transformers")
    model = make_model(CHECKPOINTS[shape], scale=4.0).float()
    directory = tmp_path / "new" / "place"
    save_pretrained(model, directory)
    loaded = load_pretrained(directory)
    assert loaded.config == model.config
    assert_same_weights(model, loaded)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert type(theirs).__name__ == f"{model.config.model_type.capitalize()}ForCausalLM"
    ids = torch.randint(97, (300,)).tolist()  # far beyond Llama 3's original context
    ours = model(*sequence(ids))
    torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], ours, rtol=1e-4, atol=1e-4)
    if model.config.rope_scaling:
        unscaled = Transformer(replace(model.config, rope_scaling=None))
        unscaled.load_state_dict(model.state_dict())
        assert (unscaled(*sequence(ids)) - ours).abs().max() > 0.1, "scaling matters here"

    theirs.save_pretrained(tmp_path / "theirs")  # with rope_parameters in its config.json
    again = load_pretrained(tmp_path / "theirs")
    assert_same_weights(model, again)
    theirs_ids = {
        "bos_token_id": again.config.bos_token_id,
        "eos_token_id": again.config.eos_token_id,
    }
    assert again.config == replace(model.config, **theirs_ids), "transformers fills in ids"
    save_pretrained(again, tmp_path / "again")
    bring(tmp_path / "again", tmp_path / "theirs")
    third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(third(torch.tensor([ids])).logits[0], ours, rtol=1e-4, atol=1e-4)


BASE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
        "max_position_embeddings": 640}  # fmt: skip
THEIRS = {  # by transformers' class: what is special about the models of today
    "Qwen2": {"rms_norm_eps": 1e-6, "head_dim": 16, "max_window_layers": 21, "sliding_window": 50,
              "use_sliding_window": False, "rope_parameters": {"rope_theta": 1e4}},
    "Qwen3": {"rms_norm_eps": 1e-2, "head_dim": 16, "attention_bias": False, "max_window_layers": 2,
              "sliding_window": 50, "use_sliding_window": True, "rope_parameters": {"rope_theta": 1e6}},
    "Llama": {"rms_norm_eps": 1e-5, "head_dim": 16, "mlp_bias": False, "pretraining_tp": 1,
              "rope_parameters": LLAMA3 | {"rope_theta": 500000.0}},
    "Mistral": {"head_dim": 16, "sliding_window": None, "attention_dropout": 0.0},
    "SmolLM": {"num_attention_heads": 2, "num_key_value_heads": 1, "is_llama_config": True, "rope_interleaved": False,
               "rope_parameters": {"rope_theta": 1e5}},
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", THEIRS)
def test_models_of_today_are_those_of_transformers(name, tied, tmp_path):
    """One of theirs with random weights, biases and norms, in one file and in shards: the same
    logits and greedy samples here, and there again once it is saved from here."""
    transformers = pytest.importorskip("transformers")
    kind = "Llama" if name == "SmolLM" else name
    values = BASE | THEIRS[name] | {"tie_word_embeddings": tied}
    theirs = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{kind}Config")(**values)
    )
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(0, 0.2).add_(weight.dim() == 1)
    extras = {
        "Qwen2": "q_proj.bias k_proj.bias v_proj.bias",
        "Qwen3": "q_norm.weight k_norm.weight",
    }
    per_layer = {
        name.split("self_attn.")[1] for name, _ in theirs.named_parameters() if "self" in name
    }
    assert per_layer == {f"{p}_proj.weight" for p in "qkvo"} | {*extras.get(name, "").split()}
    ids = torch.randint(3, 97, (200,)).tolist()
    logits = theirs(torch.tensor([ids])).logits[0]
    longer = theirs.generate(
        torch.tensor([ids[:9]]), max_new_tokens=30, do_sample=False, pad_token_id=0
    )
    for place, size in (("whole", "1GB"), ("shards", "20KB")):
        theirs.save_pretrained(tmp_path / place, max_shard_size=size)
        assert (len([*(tmp_path / place).glob("*.safetensors")]) == 1) is (place == "whole")
        ours = load_pretrained(tmp_path / place)
        assert ours.config.model_type == kind.lower() and (ours.lm_head is None) is tied
        assert ours.config.head_dim == 16 and ours.config.sliding_window is None
        torch.testing.assert_close(ours(*sequence(ids)), logits, rtol=1e-4, atol=1e-4)
        greedy = generate(ours, [ids[:9], ids[:4]], 30, 2, temperature=0)[0]
        assert greedy == longer[0, 9:].tolist()
        if kind.startswith("Qwen"):
            plain = Transformer(replace(ours.config, model_type="llama"))
            fill(plain, {n: p for n, p in ours.named_parameters() if n in plain.state_dict()})
            assert (plain(*sequence(ids)) - logits).abs().max() > 0.1, "they matter"

        save_pretrained(ours, tmp_path / "out")
        for completed in (False, True):
            if completed:
                bring(tmp_path / "out", tmp_path / place)
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
            assert type(again) is type(theirs)
            back = again(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(back, logits, rtol=1e-4, atol=1e-4)


FOLLOWED = """num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings
    sliding_window model_type""".split()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_config_leaves_out_is_as_in_transformers(kind, tmp_path):
    """Each key absent, null where that means something, and given."""
    transformers = pytest.importorskip("transformers")
    needed = {"model_type": kind, "vocab_size": 97, "hidden_size": 256, "intermediate_size": 64,
              "num_hidden_layers": 2, "num_attention_heads": 32}  # fmt: skip
    changes = [{"num_key_value_heads": 8}, {"num_key_value_heads": None}, {"head_dim": 16},
               {"max_position_embeddings": 77}, {"rms_norm_eps": 0.25}, {"rope_theta": 9.0},
               {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
               {"rope_scaling": LLAMA3, "rope_theta": 8.0}, {"rope_parameters": LLAMA3},
               {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
               {"tie_word_embeddings": True}, {"sliding_window": 33}, {"sliding_window": None},
               {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0},
               {"layer_types": ["full_attention"] * 2}]  # fmt: skip
    changes += [{}] if kind == "qwen3" else [{"head_dim": None}, {}]
    if kind == "mistral":
        changes.remove({"num_key_value_heads": None})  # which transformers refuses
        changes.remove({"layer_types": ["full_attention"] * 2})  # and makes this a ministral
    for change in changes:
        (tmp_path / "config.json").write_text(json.dumps(needed | change))
        ours, theirs = load_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
        expected = {name: getattr(theirs, name, None) for name in FOLLOWED}
        if kind == "llama":
            expected["sliding_window"] = None  # it has none, whatever its config.json says
        if kind == "qwen2":  # where transformers computes it when it is used
            expected["head_dim"] = change.get("head_dim") or 256 // 32
        assert {name: getattr(ours, name) for name in FOLLOWED} == expected, change
        rope = theirs.rope_parameters
        assert ours.rope_theta == rope["rope_theta"], change
        scaled = {name: rope[name] for name in LLAMA3} if rope["rope_type"] == "llama3" else None
        assert ours.rope_scaling == scaled, change


def test_our_file_is_safetensors(tmp_path):
    """Bit for bit in the package that defines the format, and theirs in our reader."""
    safetensors = pytest.importorskip("safetensors.torch")
    for shape in ("tied", "grouped"):
        model = make_model(SHAPES[shape]).float()
        save_pretrained(model, tmp_path)
        expected = llama_names(model)
        theirs = safetensors.load_file(tmp_path / "model.safetensors")
        assert theirs.keys() == expected.keys()
        assert all(torch.equal(theirs[name], expected[name]) for name in expected)
        with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}  # without which transformers refuses it
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            weights = {name: weight.to(dtype) for name, weight in expected.items()}
            safetensors.save_file(weights, tmp_path / "theirs.safetensors")
            ours = read_safetensors(tmp_path / "theirs.safetensors")
            assert ours.keys() == weights.keys()
            assert all(torch.equal(ours[n], weights[n]) for n in weights)
            assert {weight.dtype for weight in ours.values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_file_in_any_precision(dtype, tmp_path):
    """Of safetensors and of torch's format, read in the file's precision, loaded as float32."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = make_model(CHECKPOINTS["Llama 2"]).float()
    save_pretrained(model, tmp_path)
    weights = {name: weight.to(dtype) for name, weight in llama_names(model).items()}
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    assert {weight.dtype for weight in read_weights(tmp_path).values()} == {dtype}
    assert_same_weights(model, load_pretrained(tmp_path), dtype)
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert {weight.dtype for weight in read_weights(tmp_path).values()} == {dtype}
    assert_same_weights(model, load_pretrained(tmp_path), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_in_half_precision_as_distributed(dtype, suffix, tmp_path):
    """Shards with an index, by transformers (or as it used to write them), read whole."""
    model = make_model(CHECKPOINTS["Llama 2"]).float()
    if suffix == "safetensors":
        transformers = pytest.importorskip("transformers")
        save_pretrained(model, tmp_path)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        (tmp_path / "model.safetensors").unlink()
        theirs.save_pretrained(tmp_path, max_shard_size="20KB")
        torch.save({}, tmp_path / "pytorch_model.bin")  # the other format beside it is not read
    else:
        (tmp_path / "config.json").write_text(
            json.dumps(asdict(model.config) | {"model_type": "llama"})
        )
        weights = {name: weight.to(dtype) for name, weight in llama_names(model).items()}
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        write_shards(weights, tmp_path)
    assert len(list(tmp_path.glob(f"*model-*-of-*.{suffix}"))) > 2
    (tmp_path / f"consolidated.{suffix}").write_bytes(b"Mistral's own format")
    assert_same_weights(model, load_pretrained(tmp_path), dtype)

    assert {weight.dtype for weight in read_weights(tmp_path).values()} == {dtype}

    lost = sorted(tmp_path.glob(f"*model-*-of-*.{suffix}"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        load_pretrained(tmp_path)


def test_a_tied_head_that_is_there_twice_is_read_once(tmp_path):
    model = make_model(SHAPES["tied"]).float()
    save_pretrained(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = llama_names(model)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    torch.save(weights | head, tmp_path / "pytorch_model.bin")
    assert_same_weights(model, load_pretrained(tmp_path))


def test_saving_over_what_was_there(tmp_path):
    """Every save leaves its own weight file only, whatever the format and number before."""
    transformers = pytest.importorskip("transformers")
    other = make_model(SHAPES["tied"]).float()
    for step, before in enumerate(["nothing", "own", "safetensors", "bin", "one bin"]):
        if before == "safetensors":
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
            theirs.save_pretrained(tmp_path, max_shard_size="20KB")
        elif before == "bin":
            write_shards(llama_names(other), tmp_path)
        elif before == "one bin":
            torch.save(llama_names(other), tmp_path / "pytorch_model.bin")
        for name in ("tokenizer.model", "reference-0123456789abcdef.npy"):
            (tmp_path / name).write_bytes(b"kept, and the log-probs of weights that go")
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        model = Transformer(SHAPES["tied" if step % 2 else "grouped"]).init_weights(step)
        save_pretrained(model, tmp_path)
        files = {path.name for path in tmp_path.iterdir()}
        assert files == {"config.json", "model.safetensors", "tokenizer.model"}, before
        assert_same_weights(model, load_pretrained(tmp_path))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        for name, weight in theirs.named_parameters():
            assert torch.equal(weight, llama_names(model)[name]), name


@pytest.mark.parametrize("before", ["own", "shards"])
def test_a_killed_save_never_leaves_a_mixture(before, tmp_path, monkeypatch):
    """Stopped before any of its changes to files: the directory is the old one, the new, or none."""
    old, new = (Transformer(SHAPES["tied"]).init_weights(seed) for seed in (1, 2))
    outcomes = []

    class Dying:
        """A file whose writes count, too."""

        def __init__(self, file, count):
            self.file, self.count = file, count

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, content):
            return self.count(self.file.write, content)

    while "new" not in outcomes:
        save_pretrained(old, tmp_path)
        if before == "shards":
            write_shards(llama_names(old), tmp_path)
            (tmp_path / "model.safetensors").unlink()
        budget = len(outcomes)

        def count(change, *arguments, **options):
            nonlocal budget
            budget -= 1
            if budget < 0:
                raise KeyboardInterrupt
            return change(*arguments, **options)

        def counted_open(file, mode="r", *rest, original=builtins.open, **options):
            opened = original(file, mode, *rest, **options)
            return Dying(opened, count) if "w" in mode and Path(file).parent == tmp_path else opened

        with monkeypatch.context() as patch:
            patch.setattr(builtins, "open", counted_open)
            for name in ("mkdir", "write_text", "write_bytes", "unlink", "replace", "rename"):
                patch.setattr(Path, name, partialmethod(partial(count, getattr(Path, name))))
            with contextlib.suppress(KeyboardInterrupt):
                save_pretrained(new, tmp_path)
        try:
            loaded = load_pretrained(tmp_path)
        except CheckpointError as error:
            assert "config.json: not found" in str(error)
            outcomes.append("none")
        else:
            is_old = torch.equal(loaded.embed_tokens.weight, old.embed_tokens.weight)
            assert_same_weights(old if is_old else new, loaded)
            outcomes.append("old" if is_old else "new")
    save_pretrained(new, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert outcomes == sorted(outcomes, key=["old", "none", "new"].index)
    assert {*outcomes} == {"old", "none", "new"}
    assert outcomes.count("old") > len(list(new.parameters())), "also amid the weights"


def test_saving_keeps_what_the_source_says(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    model = Transformer(CHECKPOINTS["Mistral"]).init_weights(0)
    save_pretrained(model, source)
    config = json.loads((source / "config.json").read_text())
    extra = {"pretraining_tp": 1, "attention_dropout": 0.1,
             "pad_token_id": 0, "dtype": "bfloat16", "torch_dtype": "bfloat16"}  # fmt: skip
    del config["rope_theta"]
    rope = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "eos_token_id": [2, 7],
    }
    (source / "config.json").write_text(json.dumps(config | extra | rope))
    generation = {"eos_token_id": [2, 7, 8], "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "tokens.bin").write_text("somebody's data")
    model = load_pretrained(source)
    assert model.config.rope_theta == 500 and model.config.eos_token_id == [2, 7, 8]
    save_pretrained(model, out)
    bring(out, source)
    saved = json.loads((out / "config.json").read_text())
    expected = config | extra | {"rope_theta": 500.0, "eos_token_id": [2, 7]}
    assert saved == expected | {"dtype": "float32", "torch_dtype": "float32"}
    assert saved["model_type"] == "mistral" and saved["sliding_window"] == 400
    assert load_config(out) == model.config
    assert_same_weights(model, load_pretrained(out))
    assert json.loads((out / "generation_config.json").read_text()) == generation
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == names


def test_a_source_keeps_its_architecture(tmp_path):
    """A Mistral whose window is null (v0.2 on) stays one, a Qwen whose window is not used, too."""
    for name, kind in (("Mistral v0.3", "Mistral"), ("Qwen3", "Qwen3")):
        source, out = tmp_path / kind, tmp_path / kind / "out"
        model = Transformer(CHECKPOINTS[name]).init_weights(0)
        save_pretrained(model, source)
        config = json.loads((source / "config.json").read_text())
        assert config["sliding_window"] is None
        if kind == "Qwen3":
            config |= {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1}
            (source / "config.json").write_text(json.dumps(config))
        for complete_too in (False, True):
            save_pretrained(model, out)
            if complete_too:
                bring(out, source)
            saved = json.loads((out / "config.json").read_text())
            assert saved["model_type"] == kind.lower()
            assert saved["architectures"] == [f"{kind}ForCausalLM"]
            assert load_config(out) == model.config
        assert saved["sliding_window"] == (4096 if kind == "Qwen3" else None)


def test_a_new_tokenizer_is_saved_with_what_others_want(tokenizer, tmp_path):
    """transformers gives the same ids, and writes chats as here."""
    transformers = pytest.importorskip("transformers")
    model = Transformer(replace(SHAPES["tied"], vocab_size=320, bos_token_id=1, eos_token_id=2))
    save_pretrained(model.init_weights(0), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.proto)
    # A new model, whatever it was trained on.
    settings = SimpleNamespace(init_from="", tokenizer="", sft_epochs=1, epochs=1)
    complete(tmp_path, tokenizer, SimpleNamespace(settings=settings, out=tmp_path / "run"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The film was great."
    assert theirs(text)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
    chat = [{"role": "user", "content": "2+2?"}]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<s>\n\nHuman: 2+2?\n\nAssistant:"


OTHERS = """gemma gemma2 gemma3_text phi phi3 mixtral qwen2_moe qwen3_moe qwen2_vl smollm3 granite
    olmo2 cohere stablelm starcoder2 ministral mistral3 llama4_text gpt_oss""".split()
MISMATCH = r"weight {}: {} in the files, {} by config.json"
REFUSED = [
    ({"model_type": "gpt2"}, "model_type 'gpt2'"),
    ({"model_type": None}, "model_type None"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    *[({"model_type": kind}, f"model_type '{kind}' is not implemented here") for kind in OTHERS],
    ({"model_type": ["llama"]}, r"model_type \['llama'\]"),
    ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, r"layer_types \['chunked_attention'\]"),
    ({"layer_types": "full_attention"}, "layer_types 'full_attention'"),
    ({"rope_interleaved": True}, "rope_interleaved True"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 9.0}}}, "rope_parameters of each kind of layer"),
    *[({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": count}, "use_sliding_window True is not implemented")
      for count in (0, 1, "2", None)],
    ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention"] * 2}, "layer_types"),
    *[({"model_type": kind, "attention_bias": True}, "attention_bias") for kind in ("qwen2", "qwen3", "mistral")],
    ({"model_type": "qwen2"}, MISMATCH.format(r"\S+_proj\.bias", "none", r"\(32,\)")),
    ({"model_type": "qwen3"}, MISMATCH.format(r"\S+_norm\.weight", "none", r"\(8,\)")),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
    ({"rope_parameters": [1]}, "rope_scaling and rope_parameters must be objects"),
    ({"rope_scaling": "linear"}, "rope_scaling and rope_parameters must be objects"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type 'yarn'"),
    ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "factor"}}, "factor is missing"),
    ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "factor '8' is not a positive number"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"vocab_size": "97"}, "vocab_size '97' is not a positive whole number"),
    ({"hidden_size": 32.0}, r"hidden_size 32.0 is not a positive whole number"),
    ({"num_hidden_layers": True}, "num_hidden_layers True is not a positive whole number"),
    ({"intermediate_size": -64}, "intermediate_size -64 is not a positive whole number"),
    ({"num_attention_heads": 0}, "num_attention_heads 0 is not a positive whole number"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps 'small' is not a positive number"),
    ({"rope_theta": -1}, "rope_theta -1 is not a positive number"),
    ({"num_key_value_heads": 3}, "heads must divide by key-value heads"),
    ({"head_dim": 7}, "head_dim by two"),
    ({"vocab_size": 98}, MISMATCH.format("embed_tokens.weight", r"\(97, 32\)", r"\(98, 32\)")),
    ({"num_hidden_layers": 1}, MISMATCH.format(r"layers\.1\.\S+", r"\(\d+,.*\)", "none")),
    ({"num_hidden_layers": 3}, MISMATCH.format(r"layers\.2\.\S+", "none", r"\(\d+,.*\)")),
    ({"tie_word_embeddings": False}, MISMATCH.format(r"lm_head\.weight", "none", r"\(97, 32\)")),
]  # fmt: skip


@pytest.mark.parametrize("change, message", REFUSED)
def test_unusable_checkpoints_are_refused_by_name(change, message, tmp_path):
    """Also those that differ in one value from what we wrote."""
    save_pretrained(Transformer(SHAPES["tied"]).init_weights(0), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def refused(directory: Path, message: str):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(directory)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_damaged_checkpoints_are_refused_by_name(tmp_path):
    refused(tmp_path / "nowhere", "config.json: not found")
    save_pretrained(Transformer(SHAPES["tied"]), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    size = (len(json.dumps([])) + 8).to_bytes(8, "little")
    for damaged in (b"no weights", b"", b"short", whole[:-5], whole[:100], size + b"[]" + b" " * 8,
                    whole.replace(b'"F32"', b'"I99"'), whole.replace(b"data_offsets", b"data_offsetz")):  # fmt: skip
        file.write_bytes(damaged)
        refused(tmp_path, "model.safetensors: cannot be read")
    where = {"weight_map": {"model.norm.weight": "part.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(where))
    file.rename(tmp_path / "part.safetensors")
    refused(tmp_path, "part.safetensors: cannot be read")
    (tmp_path / "part.safetensors").unlink()
    refused(tmp_path, "part.safetensors: cannot be read")
    index = tmp_path / "model.safetensors.index.json"
    for damaged, message in (
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"weight_map": [1]}', "weight_map must name a file for each weight"),
        ('{"weight_map": {"a": 1}}', "weight_map must name a file for each weight"),
    ):
        index.write_text(damaged)
        refused(tmp_path, f"{index.name}: {message}")
    index.write_text("{}")
    refused(tmp_path, "no model.safetensors or pytorch_model.bin in it")
    for content, message in (({}, "no weights in it"), ([1], ""), ({"a": 1}, "not all of it is")):
        torch.save(content, tmp_path / "pytorch_model.bin")
        refused(tmp_path, f"pytorch_model.bin: cannot be read .*{message}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"no weights")
    refused(tmp_path, "pytorch_model.bin: cannot be read")
    for damaged, message in (("{", "not valid JSON"), ("[1]", "not a JSON object"), ("", "not")):
        (tmp_path / "config.json").write_text(damaged)
        refused(tmp_path, f"config.json: {message}")
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    refused(tmp_path, "config.json: not valid JSON")


def test_code_in_a_file_is_not_run(tmp_path):
    """Torch's format is a pickle, which can hold any call."""
    save_pretrained(Transformer(SHAPES["tied"]), tmp_path)
    (tmp_path / "model.safetensors").unlink()

    class Call:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was run",)

    torch.save({"model.norm.weight": Call()}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin: cannot be read")
    assert not (tmp_path / "was run").exists()


def test_old_and_sparse_configs_open(tmp_path):
    """Keys that early checkpoints lack have transformers' defaults."""
    path = tmp_path / "config.json"
    config, write = vars(CHECKPOINTS["Llama 2"]), lambda c: path.write_text(json.dumps(c))
    kept = "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    given = {key: config[key] for key in kept}
    write(given | {"rope_scaling": None, "pretraining_tp": 2})
    loaded = load_config(tmp_path)
    assert loaded == replace(CHECKPOINTS["Llama 2"], bos_token_id=None, eos_token_id=None)
    assert loaded.rms_norm_eps == 1e-6
    given["num_key_value_heads"] = 4
    write(given | {"model_type": "mistral"})
    assert load_config(tmp_path).sliding_window == 4096
    write(given | {"model_type": "mistral", "sliding_window": None})
    assert load_config(tmp_path).sliding_window is None
    old = {"type": "llama3"} | {k: v for k, v in LLAMA3.items() if k != "rope_type"}
    write(given | {"rope_scaling": old, "rope_theta": 7.0})
    loaded = load_config(tmp_path)
    assert loaded.rope_scaling == LLAMA3 and loaded.rope_theta == 7
    write(given | {"rope_parameters": LLAMA3 | {"rope_theta": 9.0}})
    loaded = load_config(tmp_path)
    assert loaded.rope_scaling == LLAMA3 and loaded.rope_theta == 9


def test_fill_is_strict():
    """Every weight once, of the right shape; with adapters those, too."""
    model = Transformer(SHAPES["tied"]).init_weights(0)
    base = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    fill(model, base)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())
    less = lambda weights, name: {k: v for k, v in weights.items() if k != name}
    last = "layers.1.mlp.down_proj.lora.1.weight"
    cases = [
        (less(base, "embed_tokens.weight"), ("embed_tokens.weight", "none", r"\(97, 32\)")),
        ({"norm.weight": base["norm.weight"]}, (r"\S+", "none", r"\(\d+.*\)")),
        (base | {"score.weight": torch.ones(2)}, ("score.weight", r"\(2,\)", "none")),
        (base | {"norm.weight": torch.ones(33)}, ("norm.weight", r"\(33,\)", r"\(32,\)")),
    ]
    for given, names in cases:
        with pytest.raises(CheckpointError, match=f"^{MISMATCH.format(*names)}$"):
            fill(model, given)
    weights = base | lora.add(model, 2, seed=0)
    fill(model, weights)
    with pytest.raises(CheckpointError, match=MISMATCH.format(last, "none", r"\(32, 2\)")):
        fill(model, less(weights, last))
    with pytest.raises(CheckpointError, match=r"\.lora\."):
        fill(model, base)


SHARDED = """
import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from model import Transformer, fill, load_config, read_weights, save_pretrained

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (world,))
share = lambda shape: -(-shape[0] // world) * shape[1:].numel()


def is_mapped(weight):
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [m[0].split("-") for m in maps if m[-1].strip().endswith((".bin", ".safetensors"))]
    return any(int(a, 16) <= weight.data_ptr() < int(b, 16) for a, b in spans)


def watched(weight, mesh, placements, **options):
    global held
    assert is_mapped(weight) or sys.platform != "linux", "not all of it is in memory"
    rows = distribute_tensor(weight, mesh, placements, **options)
    first = rank * -(-len(weight) // world)
    own = rows.to_local()
    assert torch.equal(own, weight[first : first + len(own)]), "this rank's rows"
    assert own.numel() <= share(weight.shape)
    held += own.numel()
    return rows


distribute_tensor = torch.distributed.tensor.distribute_tensor
torch.distributed.tensor.distribute_tensor = watched
for source, out in zip(sys.argv[1::2], sys.argv[2::2]):
    with torch.device("meta"):
        model = Transformer(load_config(source))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    model.to_empty(device="cpu")
    held = 0
    fill(model, read_weights(source))
    parameters = list(model.parameters())
    allowed = sum(share(p.shape) for p in parameters)
    assert sum(p.to_local().numel() for p in parameters) == held <= allowed
    storages = {p.to_local().untyped_storage() for p in parameters}
    assert sum(storage.nbytes() for storage in storages) <= 4 * allowed
    save_pretrained(model, out, writes=rank == 0)
    dist.barrier()
gc.collect()  # see train.main
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("ranks", "kind"), [(2, "llama"), (4, "qwen2"), (3, "qwen3")])
def test_shards_of_several_processes(ranks, kind, tmp_path, monkeypatch):
    """Each reads and holds its rows only, some none; saved together, they are the same weights."""
    # Two rows of k and v, of their biases and of the norms.
    config = ModelConfig(97, 32, 50, 2, 4, 1, 2, eos_token_id=2, model_type=kind)
    model = make_model(config).float()
    for name in ("safetensors", "bin"):
        save_pretrained(model, tmp_path / name)
    (tmp_path / "bin" / "model.safetensors").unlink()
    write_shards(llama_names(model), tmp_path / "bin")
    (tmp_path / "sharded.py").write_text(SHARDED)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    places = [tmp_path / name for name in ("safetensors", "out", "bin", "out_bin")]
    run_script(tmp_path / "sharded.py", *places, ranks=ranks)
    for out in places[1::2]:
        assert_same_weights(model, load_pretrained(out))
        assert load_config(out) == config


def write_pairs(path: Path, vocab: int = 97) -> str:
    """Pairs of token ids: no tokenizer is needed."""
    draw = lambda size: torch.randint(3, vocab, (size,)).tolist()
    rows = [{"prompt": draw(3 + n % 5), "chosen": draw(2 + n % 4), "rejected": draw(2 + n % 3)} for n in range(10)]  # fmt: skip
    return write_jsonl(path, rows)


STAGES = """--sft_epochs=2 --epochs=2 --batch_size=4 --learning_rate=1e-2 --sft_learning_rate=1e-2
    --warmup_steps=0 --micro_batch_tokens=60 --beta=0.5 --dtype=float32 --max_length=40
    --max_prompt_length=20 --log_every=1""".split()


@pytest.mark.parametrize(("name", "ranks"), [("Qwen3", 2), ("Qwen2", 3), ("Llama", 1)])
def test_sft_then_dpo_opens_in_transformers(name, ranks, tmp_path):
    """Of a checkpoint of theirs, by the real script; several processes make the same model, also
    where some have no row of a bias or a norm."""
    transformers = pytest.importorskip("transformers")
    values = BASE | THEIRS[name] | {"tie_word_embeddings": True}
    if ranks > 1:
        values |= {"head_dim": 2, "num_key_value_heads": 1}
    config = getattr(transformers, f"{name}Config")(**values)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(0, 0.2).add_(weight.dim() == 1)
    theirs.save_pretrained(tmp_path / "base")
    flags = [f"--data={write_pairs(tmp_path / 'pairs.jsonl')}", f"--init_from={tmp_path / 'base'}"]
    run_here(
        "train.py", *flags, *STAGES, "--activation_checkpointing", f"--out_dir={tmp_path / 'out'}"
    )
    ids = torch.randint(3, 97, (50,)).tolist()
    before = theirs(torch.tensor([ids])).logits[0]
    for place in (tmp_path / "out" / "sft", tmp_path / "out"):
        trained = transformers.AutoModelForCausalLM.from_pretrained(place)
        assert type(trained) is type(theirs)
        ours, logits = load_pretrained(place), trained(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(ours(*sequence(ids)), logits, rtol=1e-4, atol=1e-4)
        assert (logits - before).abs().max() > 0.1
        old, new = (
            json.loads((where / "config.json").read_text()) for where in (tmp_path / "base", place)
        )
        rope = old.pop("rope_parameters")
        assert new["rope_theta"] == rope["rope_theta"]
        kept = {key: value for key, value in new.items() if key in old}
        assert kept == old | {"dtype": "float32"}
    moved = {n for n, p in load_pretrained(tmp_path / "base").named_parameters()
             if not torch.equal(p, dict(ours.named_parameters())[n])}  # fmt: skip
    assert moved == {n for n, _ in ours.named_parameters()}, "biases and norms are trained, too"
    if ranks > 1:
        run_script("train.py", *flags, *STAGES, f"--out_dir={tmp_path / 'many'}", ranks=ranks)
        names = ("base", "out", "many")
        assert_same_change(*(load_pretrained(tmp_path / name).state_dict() for name in names))


def test_vocabularies_of_another_size_than_the_tokenizers(tokenizer, tmp_path):
    """Padded, larger ones; and smaller ones (a piece added, the embeddings not resized), as long as
    no text has such a piece; then it is one sentence, of both scripts."""
    few, many = tokenizer.encode("film was"), tokenizer.encode("The film is great, and the plot")
    size = max(few) + 1
    assert max(many) >= size
    row = {"prompt": "film", "chosen": " was", "rejected": " was was"}
    highest = lambda *texts: max(
        i for text in texts for i in tokenizer.encode(text, continuation=True)
    )
    assert max(highest(*row.values()), *few) < size
    data = f"--data={write_jsonl(tmp_path / 'few.jsonl', [row] * 4)}"
    flags = [*STAGES[2:], "--sft_epochs=0"]
    flags = [flag for flag in flags if not flag.startswith("--sft_learning")]
    for name, vocab in (("larger", tokenizer.vocab_size + 40), ("smaller", size)):
        start, out = tmp_path / name, tmp_path / f"{name}_out"
        config = ModelConfig(vocab, 16, 32, 1, 2, 2, 8, eos_token_id=2, max_position_embeddings=99)
        save_pretrained(Transformer(config).init_weights(0), start)
        save_tokenizer(tokenizer, start)
        run_here("train.py", data, f"--init_from={start}", *flags, f"--out_dir={out}")
        assert load_config(out).vocab_size == vocab
        shown = run_here("sample.py", out, "--prompt=film was", "--max_new_tokens=50").stdout
        assert "film was" in shown
        shown = run_here("sample.py", out, "--compare", start, "--score", tmp_path / "few.jsonl")
        assert "8 responses" in shown.stdout
    row["chosen"] = "The film is great, and the plot"
    more = write_jsonl(tmp_path / "many.jsonl", [row] * 4)
    beyond = "beyond the model's vocabulary\n"
    for arguments in (["train.py", f"--data={more}", f"--init_from={start}", *flags, f"--out_dir={out}"],
                      ["sample.py", start, f"--prompt={row['chosen']}"],
                      ["sample.py", start, "--compare", start, "--score", more]):  # fmt: skip
        error = run_here(*arguments, expect=2).stderr
        assert error.endswith(beyond) and error.count("\n") == 1
