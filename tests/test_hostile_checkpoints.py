"""Every file of a checkpoint is hostile until checked: read, or refused in one sentence.

Each case changes one thing of a good directory. What comes of it is a sentence that names the file
and what is wrong there, within a time limit; what is made at random may also be right, and then the
package that defines the format reads the same, or the model computes something finite.
"""

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import HANGS, ROOT, run_here, run_script, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import sample
from extra.checkpoints import first_not_finite
from extra.reading import short
from model import CheckpointError, ModelConfig, Transformer, load_config, save_pretrained

LIMIT = 60  # seconds: other processes may be at work, too
SHAPE = ModelConfig(320, 16, 32, 1, 2, 1, 8, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


def attempt(call) -> str:
    """The sentence that it ends in; "" if it is accepted. Whatever else comes of it is raised."""

    def ring(*_):
        raise TimeoutError(f"not done in {LIMIT} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        call()
    except (CheckpointError, data.DataError) as error:
        sentence = str(error)
        assert "\n" not in sentence and len(sentence) < 700, sentence[:2000]
        return sentence
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return ""


@pytest.fixture(scope="module")
def good(tokenizer, tmp_path_factory) -> Path:
    """A checkpoint with a tokenizer, and beside it adapters of it, and one with tokenizer.json."""
    root = tmp_path_factory.mktemp("good")
    save_pretrained(Transformer(SHAPE).init_weights(0), root / "plain")
    shutil.copytree(root / "plain", root / "json")
    (root / "plain" / "tokenizer.model").write_bytes(tokenizer.proto)
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}
    added = [{"id": i, "content": name, "special": True} | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
             for i, name in enumerate(("<s>", "</s>"))]  # fmt: skip
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    spec = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model}  # fmt: skip
    (root / "json" / "tokenizer.json").write_text(json.dumps(spec))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (root / "json" / "tokenizer_config.json").write_text(json.dumps(names))
    out = root / "adapter"
    out.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{stem}A.weight": torch.ones(2, 16), f"{stem}B.weight": torch.ones(16, 2)}
    torch.save(factors, out / "adapter_model.bin")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    said |= {"base_model_name_or_path": str(root / "plain")}
    (out / "adapter_config.json").write_text(json.dumps(said))
    return root


# What is changed, as a function of the directory; `file` and so on make such functions.


def file(name: str, content: bytes | str):
    content = content if isinstance(content, bytes) else content.encode()
    return lambda place: (place / name).write_bytes(content)


def fields(name: str, **values):
    """Some of the fields of a JSON file, which may not be there yet."""

    def change(place):
        path = place / name
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | values))

    return change


def config(**values):
    return fields("config.json", **values)


def rope(**values):
    return config(rope_scaling=LLAMA3 | values)


def fifo(name: str):
    def change(place):
        (place / name).unlink(missing_ok=True)
        os.mkfifo(place / name)

    return change


def folder(name: str):
    def change(place):
        (place / name).unlink(missing_ok=True)
        (place / name).mkdir()

    return change


def split(path: Path) -> tuple[dict, bytes]:
    """The header of a safetensors file, and what follows it."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(header, rest: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + rest


def header(change=None, cut: int = 0, more: bytes = b"", length: int | None = None):
    """Of model.safetensors: `change` gets the header, and returns what is to stand there."""

    def apply(place):
        path = place / "model.safetensors"
        before, rest = split(path)
        after = change(before) if change else before
        path.write_bytes(join(after, rest[: len(rest) - cut] + more, length))

    return apply


def entry(**values):
    """Some of the fields of a weight's entry in the header."""
    return header(lambda before: before | {NORM: before[NORM] | values})


def weights_of(place: Path) -> dict[str, torch.Tensor]:
    before, rest = split(place / "model.safetensors")
    weights = {}
    for name, about in before.items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            flat = torch.frombuffer(bytearray(rest[begin:end]), dtype=torch.float32)
            weights[name] = flat.view(about["shape"])
    return weights


def typed(name: str, dtype: str, size: int):
    """One weight in another type: its bytes are zeros."""

    def change(before):
        count, end = 16 * size, max(e["data_offsets"][1] for n, e in before.items() if n[0] != "_")
        return before | {name: {"dtype": dtype, "shape": [16], "data_offsets": [end, end + count]}}

    return header(change, more=bytes(16 * size))


def binary(make, **options):
    """pytorch_model.bin in place of the safetensors: `make` gets the weights."""

    def change(place):
        content = make(weights_of(place))
        (place / "model.safetensors").unlink()
        torch.save(content, place / "pytorch_model.bin", **options)

    return change


def one(weight):
    return binary(lambda weights: weights | {NORM: weight})


def pickled(program: bytes, compression: int = zipfile.ZIP_STORED):
    """pytorch_model.bin with another pickle in it, written by hand."""

    def change(place):
        binary(lambda weights: weights)(place)
        path = place / "pytorch_model.bin"
        with zipfile.ZipFile(path) as archive:
            parts = {part.filename: archive.read(part) for part in archive.infolist()}
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in parts.items():
                archive.writestr(name, program if name.endswith("data.pkl") else content)

    return change


def index(where, kind: str = "model.safetensors"):
    """An index; what was the only file is a part. Of `PART` all weights are said to be there."""

    def change(place):
        names = [name for name in split(place / "model.safetensors")[0] if name[0] != "_"]
        (place / "model.safetensors").rename(place / "part.safetensors")
        content = dict.fromkeys(names, "part.safetensors") if where is PART else where
        content = content | dict.fromkeys(names, "part.safetensors") if where == LOST else content
        (place / f"{kind}.index.json").write_text(json.dumps({"weight_map": content}))

    return change


def both(*changes):
    return lambda place: [change(place) for change in changes]


def not_finite(value: float):
    def change(place):
        weights = weights_of(place)
        weights["model.layers.0.mlp.up_proj.weight"][3, 5] = value
        weights[NORM][2] = value
        (place / "model.safetensors").unlink()
        torch.save(weights, place / "pytorch_model.bin")

    return change


def added_token(**values):
    def change(place):
        spec = json.loads((place / "tokenizer.json").read_text())
        spec["added_tokens"][1] |= values
        (place / "tokenizer.json").write_text(json.dumps(spec))

    return change


def vocabulary(vocab: dict, **model):
    def change(place):
        spec = json.loads((place / "tokenizer.json").read_text())
        spec["model"] |= {"vocab": vocab} | model
        spec["added_tokens"] = []
        (place / "tokenizer.json").write_text(json.dumps(spec))

    return change


class Call:
    """In a pickle: a call of `os.system`."""

    def __reduce__(self):
        return os.system, ("true",)


DEEP, LONG, MEGABYTE = "[" * 100_000, "9" * 5000, "x" * 2**20
PART, LOST = {"": "all weights"}, {"model.lost.weight": "part.safetensors"}
HALF = torch.quantize_per_tensor(torch.ones(16), 0.5, 0, torch.qint8)
OLD = {"_use_new_zipfile_serialization": False}
BYTEARRAY = (
    b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85Rs."
)
TENSOR = b"\x80\x02}X\x01\x00\x00\x00actorch\nTensor\n\x8a\x05\x00\x00\x00\x00\x10\x85Rs."
ST, CONFIG, BIN = (
    "model.safetensors: cannot be read .",
    "config.json: ",
    "pytorch_model.bin: cannot be read .",
)
INDEX = "model.safetensors.index.json: weight_map names "
GENERATION, SPECIAL, TOKENS = (
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)

CASES = {
    # config.json, and generation_config.json
    "config empty": (file("config.json", ""), CONFIG + "not valid JSON"),
    "config no object": (file("config.json", "[1]"), CONFIG + "not a JSON object"),
    "config deep": (file("config.json", DEEP), CONFIG + "not valid JSON .it is nested too deeply"),
    "config deep field": (file("config.json", '{"model_type": ' + "[" * 900 + "]" * 900 + "}"), CONFIG + "model_type "),
    "config no UTF-8": (file("config.json", b'{"model_type": "\xff"}'), CONFIG + "not valid JSON .'utf-8' codec"),
    "config NaN": (file("config.json", '{"rms_norm_eps": NaN}'), CONFIG + "not valid JSON .'NaN' is not a finite number"),
    "config Infinity": (file("config.json", '{"rms_norm_eps": -Infinity}'), CONFIG + "not valid JSON .'-Infinity' is not"),
    "config 1e999": (file("config.json", '{"rms_norm_eps": 1e999}'), CONFIG + "not valid JSON .'1e999' is not a finite"),
    "config 5,000 digits": (file("config.json", f'{{"vocab_size": {LONG}}}'), CONFIG + "not valid JSON .a number of 5,000 d"),
    "config FIFO": (fifo("config.json"), CONFIG + "not a regular file"),
    "config folder": (folder("config.json"), CONFIG + "not a regular file"),
    "config megabyte": (config(model_type=MEGABYTE), CONFIG + r"model_type 'xxx+ … x+' \(1,048,578 characters\) is not"),
    "config megabyte list": (config(layer_types=[MEGABYTE] * 3), CONFIG + "layer_types "),
    **{f"config {key} {value}": (config(**{key: value}), CONFIG + f"{key} .* is not a positive (whole )?number")
       for key in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "rms_norm_eps", "rope_theta")
       for value in ("97", True, [97], {"a": 1}, -3)},
    **{f"config huge {key}": (config(**{key: 10**12}), CONFIG + f"{key} 1000000000000 is larger than [0-9,]+, which no model is")
       for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                   "num_key_value_heads", "head_dim", "max_position_embeddings")},
    "config large": (config(vocab_size=2**24, hidden_size=2**20, intermediate_size=2**22, head_dim=2**14), r"weight \S+: .* by config.json"),
    "config more layers": (config(num_hidden_layers=90), r"weight layers.\d+.\S+: none in the files, .* by config.json"),
    "config vocabulary": (config(vocab_size=321), r"weight embed_tokens.weight: \(320, 16\) in the files, \(321, 16\) by config"),
    "config eps of 1e300": (config(rms_norm_eps=1e300), CONFIG + r"rms_norm_eps 1e\+300 is not from 1e-30 to 1e30"),
    "config theta of 10**90": (config(rope_theta=10**90), CONFIG + "rope_theta 1000+ … 0+ .91 characters. is not from"),
    "config tie text": (config(tie_word_embeddings="false"), CONFIG + "tie_word_embeddings 'false' is neither true nor false"),
    "config window text": (config(model_type="qwen2", use_sliding_window="no"), CONFIG + "use_sliding_window 'no' is neither"),
    "config heads": (config(num_attention_heads=3, num_key_value_heads=3, head_dim=None), CONFIG + "hidden_size must divide by num_att"),
    "config more heads": (config(num_attention_heads=32, num_key_value_heads=32, head_dim=None), CONFIG + "head_dim is missing|must divide"),
    "config kv heads": (config(num_key_value_heads=4), CONFIG + "heads must divide by key-value heads"),
    **{f"rope {key} {value}": (rope(**{key: value}), CONFIG + f"{key} .* is not a positive number")
       for key in ("factor", "low_freq_factor", "original_max_position_embeddings") for value in ("8", True, [8], -1)},
    "rope factors equal": (rope(low_freq_factor=4), CONFIG + "low_freq_factor must be less than high_freq_factor"),
    "rope without type": (config(rope_scaling={"factor": 2.0}), CONFIG + "rope_type is missing, though a factor is given"),
    "rope type megabyte": (rope(rope_type=MEGABYTE), CONFIG + "rope_type 'xxx"),
    "bos text": (config(bos_token_id="<s>"), CONFIG + "bos_token_id '<s>' is not an id"),
    "bos negative": (config(bos_token_id=-1), CONFIG + "bos_token_id -1 is not an id"),
    "eos flag": (config(eos_token_id=True), CONFIG + "eos_token_id True is neither an id nor several"),
    "eos many": (config(eos_token_id=["</s>"] * 10**5), CONFIG + r"eos_token_id \['</s>.* is neither an id"),
    "eos huge": (config(eos_token_id=[2, 10**12]), CONFIG + "eos_token_id .* is neither an id nor several"),
    "generation text": (fields(GENERATION, eos_token_id="</s>"), GENERATION + ": eos_token_id '</s>' is neither an id"),
    "generation list": (file(GENERATION, "[]"), GENERATION + ": not a JSON object"),
    "generation FIFO": (fifo(GENERATION), GENERATION + ": not a regular file"),
    # model.safetensors
    "file empty": (file("model.safetensors", b""), ST + "it has 0 bytes"),
    "file short": (file("model.safetensors", b"1234567"), ST + "it has 7 bytes"),
    "file FIFO": (fifo("model.safetensors"), ST + "not a regular file"),
    "file folder": (folder("model.safetensors"), ST + "not a regular file"),
    "header 2**64": (header(length=2**64 - 1), ST + "its header would be 18,446,744,073,709,551,615 bytes long"),
    "header negative": (header(length=2**63), ST + "its header would be 9,223,372,036,854,775,808 bytes long"),
    "header beyond": (header(length=10**6), ST + "its header would be 1,000,000 bytes long, of a file of "),
    "header none": (header(length=0), ST + "its header is not right"),
    "header no JSON": (header(lambda _: b"{no"), ST + "its header is not right: Expecting"),
    "header no UTF-8": (header(lambda _: b'{"\xff": 1}'), ST + "its header is not right: 'utf-8'"),
    "header deep": (header(lambda _: DEEP.encode()), ST + "its header is not right: it is nested too deeply"),
    "header digits": (header(lambda _: f'{{"a": {LONG}}}'.encode()), ST + "its header is not right: a number of 5,000 digits"),
    "header list": (header(lambda _: []), ST + "its header is not a JSON object"),
    "header nothing": (header(lambda _: {}), ST + "no weights in it"),
    "header metadata alone": (header(lambda _: {"__metadata__": {}}), ST + "no weights in it"),
    "metadata list": (header(lambda h: h | {"__metadata__": [1]}), ST + "__metadata__ must be an object of texts"),
    "metadata number": (header(lambda h: h | {"__metadata__": {"a": 1}}), ST + "__metadata__ must be an object of texts"),
    "name twice": (header(lambda h: json.dumps(h)[:-1].encode() + b', "%s": {}}' % NORM.encode()), ST + f".*'{NORM}' is there twice"),
    "name megabyte": (header(lambda h: h | {MEGABYTE: h[NORM]}), ST + "a weight is called 'xxx"),
    "name of lines": (header(lambda h: h | {"a\nb": h[NORM]}), ST + r"a weight is called 'a\\nb'"),
    "name empty": (header(lambda h: h | {"": h[NORM]}), ST + "a weight is called ''"),
    "name surrogate": (header(lambda h: h | {"\ud800": h[NORM]}), ST + r"a weight is called '\\ud800'"),
    "name with and without": (typed("norm.weight", "F32", 4), "weight norm.weight is there twice, or in another file"),
    "entry number": (header(lambda h: h | {NORM: 5}), ST + f"weight {NORM} must be an object, found 5"),
    "entry megabyte": (header(lambda h: h | {NORM: MEGABYTE}), ST + f"weight {NORM} must be an object, found 'xxx"),
    "entry empty": (header(lambda h: h | {NORM: {}}), ST + f"weight {NORM}: dtype None"),
    "no shape": (header(lambda h: h | {NORM: {k: v for k, v in h[NORM].items() if k != "shape"}}), ST + f"weight {NORM}: shape None must"),
    "no offsets": (header(lambda h: h | {NORM: {k: v for k, v in h[NORM].items() if k[0] == "s" or k == "dtype"}}), ST + f"weight {NORM}: data_offsets None"),
    "dtype unknown": (entry(dtype="F31"), ST + f"weight {NORM}: dtype 'F31', and only weights of the types F32, BF16, F16, F64 are"),
    "dtype list": (entry(dtype=["F32"]), ST + f"weight {NORM}: dtype "),
    "dtype megabyte": (entry(dtype=MEGABYTE), ST + f"weight {NORM}: dtype 'xxx"),
    **{f"dtype {dtype}": (typed("model.count", dtype, size), ST + f"weight model.count: dtype '{dtype}', and only")
       for dtype, size in {"I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "C64": 8, "F8_E4M3": 1}.items()},
    "shape text": (entry(shape="16"), ST + f"weight {NORM}: shape '16' must be a few whole numbers"),
    "shape of texts": (entry(shape=["16"]), ST + f"weight {NORM}: shape "),
    "shape of flags": (entry(shape=[True] * 4), ST + f"weight {NORM}: shape "),
    "shape of floats": (entry(shape=[16.0]), ST + f"weight {NORM}: shape "),
    "shape negative": (entry(shape=[-4, -4]), ST + f"weight {NORM}: shape "),
    "shape long": (entry(shape=[1] * 10**5), ST + f"weight {NORM}: shape "),
    "shape huge": (entry(shape=[2**62, 2**62]), ST + f"weight {NORM}: data_offsets .* do not fit shape"),
    "shape other": (entry(shape=[15]), ST + f"weight {NORM}: data_offsets .* do not fit shape"),
    "shape zero": (entry(shape=[0], data_offsets=[0, 0]), ST + f"weight {NORM} is empty"),
    "shape of another": (entry(shape=[4, 4]), r"weight norm.weight: \(4, 4\) in the files, \(16,\) by config.json"),
    "offsets negative": (entry(data_offsets=[-64, 0]), ST + f"weight {NORM}: data_offsets "),
    "offsets backwards": (entry(data_offsets=[64, 0]), ST + f"weight {NORM}: data_offsets "),
    "offsets huge": (entry(data_offsets=[2**70, 2**70 + 64]), ST + f"weight {NORM}: data_offsets "),
    "offsets beyond": (entry(data_offsets=[2**40, 2**40 + 64]), ST + f"weight {NORM} leaves a hole before it"),
    "offsets overlap": (entry(data_offsets=[4, 68]), ST + r"weight \S+ (overlaps another|leaves a hole)"),
    "offsets shared": (header(lambda h: h | {NORM: h["model.layers.0.input_layernorm.weight"]}, cut=64), ST + f"weight {NORM} overlaps another"),
    "offsets one": (entry(data_offsets=[64]), ST + f"weight {NORM}: data_offsets "),
    "offsets three": (entry(data_offsets=[0, 64, 64]), ST + f"weight {NORM}: data_offsets "),
    "offsets floats": (entry(data_offsets=[0.0, 64.0]), ST + f"weight {NORM}: data_offsets "),
    "file cut": (header(cut=5), ST + "it has [0-9,]+ bytes, and by its header [0-9,]+"),
    "file longer": (header(more=b"x"), ST + "it has [0-9,]+ bytes, and by its header [0-9,]+"),
    # weights that are not finite, or none at all
    "NaN": (not_finite(float("nan")), "pytorch_model.bin: weight model.layers.0.mlp.up_proj.weight: not finite"),
    "infinity": (not_finite(float("-inf")), "pytorch_model.bin: weight model.layers.0.mlp.up_proj.weight: not finite"),
    "no weights": (lambda place: (place / "model.safetensors").unlink(), "no model.safetensors or pytorch_model.bin in it"),
    # an index
    "index list": (index([1]), "model.safetensors.index.json: weight_map must name a file for each weight"),
    "index number": (index({NORM: 1}), "model.safetensors.index.json: weight_map must name a file for each weight"),
    "index text": (index("part.safetensors"), "model.safetensors.index.json: weight_map must name a file"),
    "index flag": (index(True), "model.safetensors.index.json: weight_map must name a file for each weight"),
    "index of files": (index({NORM: ["part.safetensors"]}), "weight_map must name a file for each weight"),
    **{f"index {name[:9]!r}": (index({NORM: name}), INDEX + ".*: it must be the name of a .safetensors file beside it")
       for name in ("../part.safetensors", "/etc/part.safetensors", "a/part.safetensors", "..", ".", "", "a\0.safetensors",
                    "part.bin", "config.json", MEGABYTE + ".safetensors", "a\n.safetensors", "\ud800.safetensors")},
    "index of bin": (index({NORM: "part.safetensors"}, "pytorch_model.bin"), "it must be the name of a .bin file beside it"),
    "index lost file": (index({NORM: "lost.safetensors"}), "lost.safetensors: cannot be read .there is no such file"),
    "index FIFO file": (both(index({NORM: "a.safetensors"}), fifo("a.safetensors")), "a.safetensors: cannot be read .not a regular"),
    "index lost weight": (index(LOST), "part.safetensors: cannot be read .weight 'model.lost.weight' is not in it, though the index says so"),
    "index same weight": (both(index(PART), lambda place: shutil.copy(place / "part.safetensors", place / "two.safetensors"),
                               fields("model.safetensors.index.json", weight_map={NORM: "part.safetensors", EMBED: "two.safetensors"})),
                          r"two.safetensors: weight \S+ is there twice, or in another file"),
    "index FIFO": (both(index(PART), fifo("model.safetensors.index.json")), "index.json: not a regular file"),
    "index deep": (both(index(PART), file("model.safetensors.index.json", DEEP)), "index.json: not valid JSON .it is nested"),
    # pytorch_model.bin
    "bin tensor": (binary(lambda _: torch.ones(3)), BIN + "not weights by their names, but a Tensor"),
    "bin list": (binary(lambda weights: list(weights.values())), BIN + "not weights by their names, but a list"),
    "bin text": (binary(lambda _: "weights"), BIN + "not weights by their names, but a str"),
    "bin number": (binary(lambda _: 3), BIN + "not weights by their names, but a int"),
    "bin nothing": (binary(lambda _: {}), BIN + "no weights in it"),
    "bin of texts": (one("x" * 2**20), BIN + f"not all of it is weights: {NORM} is a str"),
    "bin nested": (binary(lambda weights: {"model": weights}), BIN + "not all of it is weights: model is a dict"),
    "bin number keys": (binary(lambda weights: dict(enumerate(weights.values()))), BIN + "a weight is called 0"),
    "bin megabyte key": (binary(lambda weights: weights | {MEGABYTE: torch.ones(1)}), BIN + "a weight is called 'xxx"),
    "bin sparse": (one(torch.ones(16).to_sparse()), BIN + "a sparse tensor is in it, and only plain weights are read"),
    "bin sparse csr": (one(torch.ones(4, 4).to_sparse_csr()), BIN + "a sparse tensor is in it"),
    "bin meta": (one(torch.ones(16, device="meta")), BIN + "a meta tensor is in it"),
    "bin quantised": (one(HALF), BIN + "a quantised tensor is in it"),
    **{f"bin {dtype}": (one(torch.ones(16).to(dtype)), BIN + f"weight {NORM} is {dtype}, and only float32, bfloat16, float16, float64")
       for dtype in (torch.int64, torch.bool, torch.complex64, torch.uint8)},
    "bin empty weight": (one(torch.ones(0)), BIN + f"weight {NORM} is empty"),
    "bin code": (one(Call()), BIN + "'posix.system' is in it, and only plain weights are read"),
    "bin old": (binary(lambda weights: weights, **OLD), BIN + "the format of torch before 1.6; it becomes today's by: python -c"),
    "bin pickle": (both(binary(dict), file("pytorch_model.bin", pickle.dumps({}))), BIN + "the format of torch before 1.6"),
    "bin no zip": (both(binary(dict), file("pytorch_model.bin", b"weights")), BIN + "not a file of torch.save"),
    "bin no bytes": (both(binary(dict), file("pytorch_model.bin", b"")), BIN + "not a file of torch.save"),
    "bin FIFO": (both(binary(dict), fifo("pytorch_model.bin")), BIN + "not a regular file"),
    "bin cut": (both(binary(dict), lambda place: os.truncate(place / "pytorch_model.bin", 900)), BIN + "File is not a zip file"),
    "bin compressed": (pickled(pickle.dumps({}, 2), zipfile.ZIP_DEFLATED), BIN + "a part of it is compressed"),
    "bin bytearray": (pickled(BYTEARRAY), BIN + r"'__builtin__.bytearray' is in it"),
    "bin Tensor(n)": (pickled(TENSOR), BIN + r"'torch.Tensor' is in it"),
    "bin cut pickle": (pickled(b"\x80\x02}"), BIN),
    # a path
    "NUL": (lambda place: Path(f"{place}\0b"), "no path holds a NUL character"),
}  # fmt: skip

ADAPTER = "adapter_config.json: "
ADAPTERS = {
    "r float": (fields("adapter_config.json", r=2.0), ADAPTER + "r 2.0 is not a positive number"),
    "r huge": (fields("adapter_config.json", r=10**12), ADAPTER + "r 1000000000000 is not a positive number"),
    "alpha text": (fields("adapter_config.json", lora_alpha="4"), ADAPTER + "lora_alpha '4' is not a positive number"),
    "alpha huge": (fields("adapter_config.json", lora_alpha=1e300), ADAPTER + "lora_alpha .* is not a positive number"),
    "rslora text": (fields("adapter_config.json", use_rslora="no"), ADAPTER + "use_rslora 'no' is neither true nor false"),
    "megabyte": (fields("adapter_config.json", use_dora=MEGABYTE), ADAPTER + "use_dora 'xxx+ … "),
    "targets": (fields("adapter_config.json", target_modules=[MEGABYTE]), ADAPTER + "target_modules: 'xxx"),
    "targets deep": (file("adapter_config.json", DEEP), ADAPTER + "not valid JSON"),
    "base megabyte": (fields("adapter_config.json", base_model_name_or_path=MEGABYTE), ADAPTER + "base_model_name_or_path 'xxx+.* is no path"),
    "base NUL": (fields("adapter_config.json", base_model_name_or_path="a\0b"), ADAPTER + r"base_model_name_or_path 'a\\x00b' is no path"),
    "base number": (fields("adapter_config.json", base_model_name_or_path=3), ADAPTER + "base_model_name_or_path is missing"),
    "tensor": (lambda place: torch.save(torch.ones(3), place / "adapter_model.bin"), "adapter_model.bin: cannot be read .not weights by their names"),
    "integers": (lambda place: torch.save({"a": torch.ones(3).long()}, place / "adapter_model.bin"), "adapter_model.bin: cannot be read .weight a is torch.int64"),
    "NaN": (lambda place: torch.save({"a": torch.ones(3) / 0}, place / "adapter_model.bin"), "adapter_model.bin: weight a: not finite"),
    "FIFO": (fifo("adapter_model.bin"), "adapter_model.bin: cannot be read .not a regular file"),
    "file": (file("adapter_model.safetensors", b"\xff" * 99), "adapter_model.safetensors: cannot be read .its header would be"),
}  # fmt: skip

MODEL = {  # of a directory with tokenizer.model
    "model empty": (file("tokenizer.model", b""), "tokenizer.model: not a SentencePiece model .it is empty"),
    "model garbage": (file("tokenizer.model", b"\xff" * 99), "tokenizer.model: not a SentencePiece model"),
    "added list": (file("added_tokens.json", "[1]"), "added_tokens.json: not a JSON object"),
    "added text": (fields("added_tokens.json", **{"<a>": "320"}), "added_tokens.json: not valid .'<a>' has the id '320'"),
    "added huge": (fields("added_tokens.json", **{"<a>": 10**12}), "added_tokens.json: not valid .'<a>' has the id 1000000000000"),
    "added negative": (fields("added_tokens.json", **{"<a>": -1}), "added_tokens.json: not valid .'<a>' has the id -1"),
    "added no name": (fields("added_tokens.json", **{"": 320}), "added_tokens.json: not valid .'' has the id 320"),
    "decoder list": (fields(TOKENS, added_tokens_decoder=[1]), TOKENS + ": not valid .added_tokens_decoder .1. must have a token"),
    "decoder id": (fields(TOKENS, added_tokens_decoder={"x": {"content": "a"}}), TOKENS + ": not valid .added_tokens_decoder "),
    "decoder huge": (fields(TOKENS, added_tokens_decoder={"9" * 5000: {"content": "a"}}), TOKENS + ": not valid .added_tokens_decoder "),
    "decoder content": (fields(TOKENS, added_tokens_decoder={"320": {"content": ""}}), TOKENS + ": not valid .added_tokens_decoder "),
    "decoder special": (fields(TOKENS, added_tokens_decoder={"320": {"content": "a", "special": "no"}}), TOKENS + ": not valid .added_tokens_decoder "),
    "legacy text": (fields(TOKENS, legacy="no"), TOKENS + ": not valid .legacy 'no' is neither true nor false"),
    "template number": (fields(TOKENS, chat_template=3), TOKENS + ": not valid .chat_template 3 is neither"),
    "template names": (fields(TOKENS, chat_template=[{"name": "default"}]), TOKENS + ": not valid .chat_template "),
    "template FIFO": (fifo("chat_template.jinja"), "chat_template.jinja: cannot be read .not a regular file"),
    "template no UTF-8": (file("chat_template.jinja", b"\xff"), "chat_template.jinja: cannot be read .'utf-8' codec"),
    "tokens FIFO": (fifo(TOKENS), TOKENS + ": cannot be read .not a regular file"),
    "tokens deep": (file(TOKENS, DEEP), TOKENS + ": not valid JSON .it is nested too deeply"),
    "tokens NaN": (file(TOKENS, '{"legacy": NaN}'), TOKENS + ": not valid JSON"),
    "tokens empty": (file(TOKENS, b""), TOKENS + ": not valid JSON"),
    "bos number": (fields(TOKENS, bos_token=3), TOKENS + ": not valid .bos_token 3 is no token"),
    "bos megabyte": (fields(TOKENS, bos_token=[MEGABYTE]), TOKENS + ": not valid .bos_token ..xxx"),
    "special": (fields(SPECIAL, eos_token={"content": 3}), SPECIAL + ": not valid .eos_token .* is no token"),
    "special list": (file(SPECIAL, "[]"), SPECIAL + ": not a JSON object"),
    "ends": (both(lambda place: (place / "config.json").unlink(), fields(GENERATION, eos_token_id="</s>")), GENERATION + ": not valid .eos_token_id"),
}  # fmt: skip
JSON = {  # of a directory with tokenizer.json
    "json empty": (file("tokenizer.json", b""), "tokenizer.json: not a tokenizer.json"),
    "json deep": (file("tokenizer.json", DEEP), "tokenizer.json: not a tokenizer.json .it is nested too deeply"),
    "json no tokens": (vocabulary({}, unk_token=""), "tokenizer.json: not a tokenizer.json"),
    "json no unknown": (vocabulary({"</s>": 0, "<s>": 1}, unk_token="<none>"), "tokenizer.json: not a tokenizer.json"),
    "json huge id": (vocabulary({"</s>": 2**32 - 2, "<s>": 1, "<unk>": 2}), "tokenizer.json: not a tokenizer.json .'</s>' has the id 4294967294"),
    "json id beyond": (added_token(id=2**32), "tokenizer.json: not a tokenizer.json"),
    "json id text": (added_token(id="1"), "tokenizer.json: not a tokenizer.json"),
    "json id other": (added_token(id=7), "tokenizer.json: added_tokens: '</s>' has the id 7, but would be 1"),
    "json id left out": (added_token(id=10**6, content="<new>"), "tokenizer.json: added_tokens: '<new>' has the id 1000000, but would be 5"),
    "json no end": (fields(TOKENS, eos_token="<none>"), "names no eos_token that tokenizer.json has"),
    "config ids": (both(fields(TOKENS, eos_token=None), config(eos_token_id=10**12)), "config.json: not valid .eos_token_id|config.json: eos_token_id"),
}  # fmt: skip


def hyphened(case: str) -> str:
    """A test's name without spaces, as tests/mutations.py wants it."""
    return case.replace(" ", "-")


def tried(good: Path, kind: str, change, tmp_path: Path) -> Path:
    """The directory that a change makes of a good one."""
    place = tmp_path / "checkpoint"
    shutil.copytree(good / kind, place)
    made = change(place)
    return made if isinstance(made, Path) and "\0" in str(made) else place


@pytest.mark.parametrize("case", CASES, ids=hyphened)
def test_each_bad_checkpoint_is_one_sentence(case, good, tmp_path):
    change, expected = CASES[case]
    place = tried(good, "plain", change, tmp_path)
    sentence = attempt(lambda: sample.load(place))
    assert_matches(expected, sentence)


@pytest.mark.parametrize("case", ADAPTERS, ids=hyphened)
def test_each_bad_adapter_is_one_sentence(case, good, tmp_path):
    change, expected = ADAPTERS[case]
    assert attempt(lambda: sample.load(good / "adapter")) == ""
    place = tried(good, "adapter", change, tmp_path)
    assert_matches(expected, attempt(lambda: sample.load(place)))


@pytest.mark.parametrize("case", [*MODEL, *JSON], ids=hyphened)
def test_each_bad_tokenizer_is_one_sentence(case, good, tmp_path):
    kind = "plain" if case in MODEL else "json"
    if kind == "json":
        pytest.importorskip("tokenizers")
    change, expected = (MODEL | JSON)[case]
    assert attempt(lambda: data.Tokenizer(good / kind)) == ""
    place = tried(good, kind, change, tmp_path)
    assert_matches(expected, attempt(lambda: data.Tokenizer(place)))


def assert_matches(expected: str, sentence: str):
    with pytest.raises(ValueError, match=expected):
        raise ValueError(sentence)


def test_good_checkpoints_are_accepted(good, tmp_path):
    """What is unusual, but right: an index, symbolic links, shared and wide weights, names of old."""
    rotary = binary(lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    for n, change in enumerate((
        index(PART),
        both(index(PART), lambda place: (place / "part.safetensors").rename(place / "blob"),
             lambda place: (place / "part.safetensors").symlink_to(place / "blob")),
        rotary,
        binary(lambda weights: {name: weight.double() for name, weight in weights.items()}),
        binary(lambda weights: {name: torch.nn.Parameter(weight) for name, weight in weights.items()}),
        binary(lambda w: {k: x.half() + (60000 if x.dim() == 1 else 0) for k, x in w.items()}),  # whose sum overflows
        config(eos_token_id=[2, 3], tie_word_embeddings=True, rope_scaling=LLAMA3, pretraining_tp=1),
        fields(TOKENS, model_max_length=10**30, chat_template=[{"name": "default", "template": "x"}]),
    )):  # fmt: skip
        place = tried(good, "plain", change, tmp_path / str(n))
        assert attempt(lambda place=place: sample.load(place)) == "", n


def test_the_command_for_old_files_mends_them(good, tmp_path):
    """As it is printed, in a shell."""
    place = tried(good, "plain", binary(lambda weights: weights, **OLD), tmp_path)
    command = attempt(lambda: sample.load(place)).split(" by: python ")[1].removesuffix(")")
    result = subprocess.run(f"{sys.executable} {command}", shell=True, check=True, timeout=HANGS)
    assert result.returncode == 0 and attempt(lambda: sample.load(place)) == ""


def test_the_scripts_end_with_the_sentence(good, tmp_path):
    """Exit status 2, and one line; by sample.py and by train.py."""
    row = {"prompt": "a", "chosen": " b", "rejected": " c"}
    rows = write_jsonl(tmp_path / "rows.jsonl", [row] * 4)
    chosen = [
        "config deep",
        "config huge hidden_size",
        "header 2**64",
        "file FIFO",
        "bin code",
        "NaN",
    ]
    chosen += ["index '../part.s'", "config large", "bin old"]
    for n, case in enumerate(chosen):
        place = tried(good, "plain", CASES[case][0], tmp_path / str(n))
        commands = [["sample.py", place, "--prompt=a"]]
        commands += [
            ["train.py", f"--data={rows}", f"--init_from={place}", f"--out_dir={tmp_path}/out"]
        ]
        for script, *arguments in commands:
            result = run_here(script, *arguments, expect=2)
            assert_matches(CASES[case][1], result.stderr)
            assert result.stderr.startswith(f"{script}: ") and result.stderr.count("\n") == 1
            assert "Traceback" not in result.stdout + result.stderr
    flags = [f"--data={rows}", "--init_from=a\0b", f"--out_dir={tmp_path}/out"]
    said = run_here("train.py", *flags, expect=2).stderr
    assert said == "train.py: --init_from has characters that are none: 'a\\x00b'\n"
    place = tried(good, "plain", MODEL["model empty"][0], tmp_path / "tokenizer")
    result = run_script("sample.py", place, "--prompt=a", expect=2)
    [line] = result.stderr.splitlines()
    assert line.startswith(f"sample.py: {place}/tokenizer.model: not a SentencePiece model")


MEMORY = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import data, sample
from extra.guard import most_resident
from model import CheckpointError
attempts = sys.argv[2:]
for place in attempts:  # once without a limit: what is imported on the way
    try:
        sample.load(place)
    except (CheckpointError, data.DataError):
        pass
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
for place in attempts:
    try:
        sample.load(place)
    except (CheckpointError, data.DataError) as error:
        assert "memory" not in str(error).lower(), error
        print("refused")
print(most_resident() // 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says how much is used")
def test_absurd_sizes_take_no_memory(good, tmp_path):
    """In 64 MiB of address space beyond what is in use; so much memory is not touched either."""
    cases = ["config large", "config huge vocab_size", "header 2**64", "header beyond",
             "shape huge", "offsets beyond", "bin bytearray", "bin Tensor(n)", "bin compressed"]  # fmt: skip
    places = [
        tried(good, "plain", CASES[case][0], tmp_path / str(n)) for n, case in enumerate(cases)
    ]
    command = [sys.executable, "-c", MEMORY, ROOT, *places]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0, result.stderr
    *refused, resident = result.stdout.split()
    assert refused == ["refused"] * len(cases) and int(resident) < 1000, "MiB, most of it torch"


def test_the_first_weight_that_is_not_finite():
    model = Transformer(SHAPE).init_weights(0)
    assert first_not_finite(model) == ""
    names = list(dict(model.named_parameters()))
    for name in reversed(names):
        with torch.no_grad():
            dict(model.named_parameters())[name].view(-1)[-1] = -torch.inf
        assert first_not_finite(model) == name
    wide = Transformer(SHAPE).init_weights(0)
    with torch.no_grad():
        wide.norm.weight.fill_(3e38)  # finite, though its sum is not
    assert first_not_finite(wide) == ""


def test_values_are_quoted_shortly():
    assert (
        short("a\nb") == r"'a\nb'"
        and short([1, None]) == "[1, None]"
        and short("x" * 78) == f"'{'x' * 78}'"
    )
    for value in (MEGABYTE, [MEGABYTE], {MEGABYTE: 1}, list(range(10**5)), 10**4000):
        assert len(short(value)) < 100 and "…" in short(value)
    deep = []
    for _ in range(10**4):
        deep = [deep]
    assert short(deep) == "a list that cannot be printed"
    assert short(10**5000) == "a int that cannot be printed"
    while deep:  # otherwise the interpreter's stack frees it
        deep = deep.pop()


# At random. What is accepted must be right.

FUZZ = settings(
    max_examples=120,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(0, 400)
    | st.text(max_size=9)
)
LEAVES |= st.floats(allow_nan=True) | st.sampled_from(
    ["llama", "qwen3", "F32", "llama3", 1.0, 16, 2, 320]
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*LLAMA3, "a", ""]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


def place_for(good: Path, tmp_path: Path, kind: str = "plain") -> Path:
    """A good directory again, for each example that is tried."""
    place = tmp_path / "again"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(good / kind, place)
    return place


@FUZZ
@given(st.dictionaries(st.sampled_from([*asdict(SHAPE), "rope_parameters", "layer_types", "hidden_act", "max_window_layers"]),
                       VALUES, min_size=1, max_size=3), st.booleans())  # fmt: skip
def test_any_config(good, tmp_path_factory, change, complete):
    """Of what is accepted, the model of the weights that are there is finite."""
    place = place_for(good, tmp_path_factory.getbasetemp() / "configs")
    before = json.loads((place / "config.json").read_text()) if complete else {}
    (place / "config.json").write_text(json.dumps(before | change))
    attempt(lambda: load_config(place))
    model = []
    if not attempt(lambda: model.append(sample.load(place)[0])):
        inputs = torch.arange(5), torch.arange(5), torch.tensor([[0, 0, 0, 5]])
        assert model[0](*inputs).isfinite().all()


@st.composite
def damage(draw, size: int = 4000):
    """A few bytes changed, taken out or put in, as a function of the whole."""
    edits = draw(st.lists(st.tuples(st.integers(0, size), st.integers(0, 3), st.binary(max_size=4)), min_size=1, max_size=4))  # fmt: skip

    def apply(whole: bytes) -> bytes:
        for where, gone, new in edits:
            where %= len(whole) + 1
            whole = whole[:where] + new + whole[where + gone :]
        return whole

    return apply


def theirs(path: Path) -> dict | None:
    """What the package that defines the format reads; None where it does not."""
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except Exception:  # of many kinds
        return None


def check_file(place: Path):
    """What we accept they read, too, and the same."""
    found = []
    path = place / "model.safetensors"
    if not attempt(lambda: found.append(sample.load(place)[0])):
        weights = theirs(path)
        assert weights is not None, "accepted, but not right"
        for name, weight in found[0].named_parameters():
            assert torch.equal(weights[f"model.{name}"].float(), weight)


@FUZZ
@given(damage(size=1500))
def test_any_bytes_of_a_header(good, tmp_path_factory, edit):
    pytest.importorskip("safetensors")
    place = place_for(good, tmp_path_factory.getbasetemp() / "headers")
    path = place / "model.safetensors"
    path.write_bytes(edit(path.read_bytes()))
    check_file(place)


@FUZZ
@given(st.data())
def test_any_header(good, tmp_path_factory, data):
    pytest.importorskip("safetensors")
    place = place_for(good, tmp_path_factory.getbasetemp() / "entries")
    path = place / "model.safetensors"
    before, rest = split(path)
    name = data.draw(st.sampled_from([*before, "new"]))
    about = before.get(name, {})
    offsets = st.lists(st.sampled_from([0, 4, 64, 20480, 20544, len(rest)]), min_size=2, max_size=2)
    change = st.fixed_dictionaries({}, optional={"dtype": VALUES | st.sampled_from(["BF16", "F64", "I8"]),
                                                 "shape": VALUES | st.lists(st.integers(0, 40), max_size=3), "data_offsets": VALUES | offsets})  # fmt: skip
    after = data.draw(change.map(lambda new: about | new) | VALUES)
    path.write_bytes(join(json.dumps(before | {name: after}).encode(), rest))
    check_file(place)


@FUZZ
@given(VALUES | st.dictionaries(st.sampled_from([NORM, EMBED, "a"]), VALUES | st.sampled_from(["part.safetensors", "../x"]), max_size=3))  # fmt: skip
def test_any_index(good, tmp_path_factory, where):
    place = place_for(good, tmp_path_factory.getbasetemp() / "indices")
    index(where)(place)
    attempt(lambda: sample.load(place))


@FUZZ
@given(damage(), st.booleans())
def test_any_bin(good, tmp_path_factory, edit, pickle_only):
    """Bytes anywhere, or in the pickle of an archive that is whole."""
    place = place_for(good, tmp_path_factory.getbasetemp() / "bins")
    if pickle_only:
        binary(lambda weights: weights)(place)
        with zipfile.ZipFile(place / "pytorch_model.bin") as archive:
            [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
            program = archive.read(name)
        shutil.rmtree(place)
        shutil.copytree(good / "plain", place)
        pickled(edit(program))(place)
    else:
        binary(lambda weights: weights)(place)
        path = place / "pytorch_model.bin"
        path.write_bytes(edit(path.read_bytes()))
    attempt(lambda: sample.load(place))


@FUZZ
@given(st.sampled_from([TOKENS, SPECIAL, GENERATION, "added_tokens.json"]), VALUES | st.dictionaries(
    st.sampled_from(["bos_token", "eos_token", "chat_template", "added_tokens_decoder", "legacy", "eos_token_id", "320"]), VALUES, max_size=3))  # fmt: skip
def test_any_file_beside_a_tokenizer(good, tmp_path_factory, name, content):
    """With what is accepted a text is encoded, and there again."""
    place = place_for(good, tmp_path_factory.getbasetemp() / "beside")
    (place / name).write_text(json.dumps(content))
    found = []
    if not attempt(lambda: found.append(data.Tokenizer(place))):
        text = "The film is great, <|a|> and"
        assert found[0].decode(found[0].encode(text)) == text


@FUZZ
@given(damage(size=9000))
def test_any_tokenizer_model(good, tmp_path_factory, edit):
    place = place_for(good, tmp_path_factory.getbasetemp() / "models")
    (place / "tokenizer.model").write_bytes(edit((place / "tokenizer.model").read_bytes()))
    found = []
    if not attempt(lambda: found.append(data.Tokenizer(place))):
        found[0].encode("The film is great")


@FUZZ
@given(st.data())
def test_any_tokenizer_json(good, tmp_path_factory, data):
    pytest.importorskip("tokenizers")
    place = place_for(good, tmp_path_factory.getbasetemp() / "jsons", "json")
    spec = json.loads((place / "tokenizer.json").read_text())
    inner = data.draw(
        st.sampled_from([spec, spec["model"], spec["added_tokens"][1], spec["model"]["vocab"]])
    )
    inner[data.draw(st.sampled_from([*inner, "a"]))] = data.draw(VALUES)
    (place / "tokenizer.json").write_text(json.dumps(spec))
    attempt(lambda: sample.load(place))
