"""The model card of a run: true, loadable as it says, and never in the place of somebody's own."""

import hashlib
import json
import re

import pytest
import torch
from conftest import read_metrics, run_here, write_jsonl
from huggingface_hub import ModelCard

from extra import card
from model import read_safetensors

FLAGS = """--hidden_size=32 --num_layers=2 --num_heads=2 --vocab_size=300 --batch_size=4
    --learning_rate=1e-3 --log_every=1""".split()
ROWS = [
    {"prompt": f"Rate {i}:", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(12)
]
STRANGE = "a`b``c|d --- [x](y) *z* <b>\n---\ntags: [evil]"
PAIRS, OUT = f"{STRANGE}.jsonl", f"out{STRANGE}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run in a directory, on a file, whose names mean something in Markdown and YAML."""
    root = tmp_path_factory.mktemp("world")
    path = write_jsonl(root / PAIRS, ROWS)
    run_here("train.py", f"--data={path}", f"--eval_data={path}", f"--out_dir={root / OUT}", *FLAGS)
    return root


def parts_of(out) -> tuple[dict, str]:
    """The YAML, as the hub's own library reads it, and the Markdown."""
    read = ModelCard.load(out / "README.md")
    return read.data.to_dict(), read.text


def tables_of(text: str) -> list[list[list[str]]]:
    """Cells of each table; an escaped | does not end one."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    cells = lambda line: [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    return [[cells(line) for line in lines.splitlines()] for lines in tables]


def test_it_says_what_was_done(world):
    out = world / OUT
    about, text = parts_of(out)
    assert about == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sft", "dpo"]}  # fmt: skip
    size = sum(w.numel() for w in read_safetensors(out / "model.safetensors").values())
    assert f"A `llama` decoder of {size:,} parameters, in float32: a new model, 1 epoch(s) of SFT, 1 epoch(s) of the loss `dpo` with β = 0.1." in text  # fmt: skip
    settings, files, *metrics = tables_of(text)
    given = {name.strip("`"): value.strip("`") for name, value in settings[2:]}
    assert given["learning_rate"] == "0.001" and given["hidden_size"] == "32"
    assert given["label_smoothing"] == "0.0" and given["beta"] == "0.1"
    assert not given.keys() & {"grad_clip", "log_every", "out_dir", "data", "resume"}
    own = hashlib.sha256((world / PAIRS).read_bytes()).hexdigest()
    digest = hashlib.sha256(own.encode()).hexdigest()
    shown = card.code(PAIRS).replace("|", r"\|")
    assert files[2:] == [[f"`{name}`", shown, digest] for name in ("data", "eval_data")]
    for stage, cells in zip(("sft", "dpo"), metrics, strict=True):
        last = {}
        for row in read_metrics(out):
            last |= row if row["stage"] == stage else {}
        found = {}
        for name, train, evaluated in cells[2:]:
            found |= {f"train/{name.strip('`')}": train, f"eval/{name.strip('`')}": evaluated}
        expected = {name: f"{x:.6g}" for name, x in last.items() if "/" in name}
        assert {name: x for name, x in found.items() if x} == expected
        assert f"After {last['step']} steps of {stage}:" in text
    assert "second" not in text and "memory" not in text, "two runs have the same card"
    assert torch.__version__ in text


def test_it_loads_as_it_says(world):
    text = (world / OUT / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found = {}
    exec(code.replace('"DIR"', repr(str(world / OUT))), found)
    ids = found["tokenizer"]("Rate 3:")["input_ids"]
    assert found["model"](torch.tensor([ids])).logits.shape == (1, len(ids), 300)
    shell = [block.split() for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]
    assert [block[1] for block in shell] == ["sample.py", "train.py"]
    assert "The reference, for `--compare`, is `DIR/sft`." in text
    put = lambda word, at: word.replace("DIR", str(world / at))
    words = [put(word, OUT) for word in shell[0][1:]]
    run_here(*words, "--max_new_tokens=3", f"--compare={world / OUT / 'sft'}")
    paths = {"--data=more.jsonl": f"--data={world / PAIRS}", "--out_dir=out/next": f"--out_dir={world / 'next'}"}  # fmt: skip
    words = [paths.get(word, put(word, OUT)) for word in shell[1][1:]]
    run_here(*words)
    about, text = parts_of(world / "next")
    assert about["tags"] == ["dpo"] and "base_model" not in about
    assert f"The reference, for `--compare`, is {card.code(OUT)}." in text


def test_it_is_one_line_each(world):
    """No name begins a line, a cell or a block of its own, or ends the YAML."""
    text = (world / OUT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n---\n") == 1 and "\ntags: [evil]" not in text
    for rows in tables_of(text):
        assert len({len(cells) for cells in rows}) == 1
    assert card.code("x") == "`x`" and card.code("a`b") == "`` a`b ``" and card.code("") == "`  `"
    assert (
        card.code("`a``") == "``` `a`` ```"
        and card.code("a\nb\u2028\x1b") == "`'a\\nb\\u2028\\x1b'`"
    )


@pytest.mark.parametrize("own", ["# mine\n", "", "---\ntags: [mine]\n---\n", b"\xff\x00", "link", "directory"])  # fmt: skip
def test_somebodys_own_is_left_alone(own, world, tmp_path):
    path = tmp_path / "README.md"
    if own == "link":
        path.symlink_to(tmp_path / "nowhere")
    elif own == "directory":
        path.mkdir()
    else:
        path.write_bytes(own if isinstance(own, bytes) else own.encode())
    before = path.read_bytes() if path.is_file() else None
    data, short = f"--data={world / PAIRS}", ["--max_steps=1", "--epochs=0"]
    flags = [flag for flag in FLAGS if not flag.startswith("--learning_rate")]
    printed = run_here("train.py", data, *flags, *short, f"--out_dir={tmp_path}").stdout
    assert printed.count(f"{path} is not train.py's, and stays as it is") == 1
    assert path.is_symlink() == (own == "link") and path.is_dir() == (own == "directory")
    assert before is None or path.read_bytes() == before
    if own == "# mine\n":  # in its place, and again: its own it writes anew
        path.unlink()
        for steps in (1, 2):
            run_here("train.py", data, *flags, "--epochs=0", f"--max_steps={steps}", f"--out_dir={tmp_path}")  # fmt: skip
            about, text = parts_of(tmp_path)
            assert about["tags"] == ["sft"] and f"After {steps} steps of sft:" in text
            assert f"1 epoch(s) of SFT, at most {steps} steps of each." in text
            assert "`beta`" not in text and "reference, for" not in text
        assert not (tmp_path / "README.md.new").exists()


def test_adapters_and_bases(world, tmp_path, monkeypatch):
    """The base is named where it may be on the hub: not a path, and not another run."""
    monkeypatch.chdir(tmp_path)
    flags = ["--lora_rank=2", "--save_adapter", f"--data={world / PAIRS}", "--batch_size=4"]
    base = tmp_path / "somebody" / "model"
    base.parent.mkdir()
    base.symlink_to(world / "next" if (world / "next").exists() else world / OUT)
    assert card.hub_name("somebody/model") == "", "a run is there"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    base.unlink()
    base.mkdir()
    for file in (world / OUT).iterdir():
        if file.suffix in (".json", ".model", ".safetensors") and file.name != "run.json":
            (base / file.name).write_bytes(file.read_bytes())
    run_here("train.py", *flags, "--init_from=somebody/model", "--sft_epochs=0", "--out_dir=out")
    about, text = parts_of(tmp_path / "out")
    assert about["base_model"] == "somebody/model" and about["tags"] == ["dpo", "lora"]
    assert "`somebody/model`, 1 epoch(s) of the loss" in text
    assert "by adapters of rank 2, which are merged" in text and "`DIR/adapter`" in text
    assert "`save_adapter` | `True`" in text and "sft_learning_rate" not in text
    assert card.named("a/b/sft") == "`b/sft`" and card.named("/a/b.jsonl") == "`b.jsonl`"
    names = ("", "./somebody/model", "model", "/somebody/model", "a/b/c", "a b/c")
    assert not any(map(card.hub_name, names))


def test_a_model_of_token_ids(tmp_path):
    rows = [{"prompt": [1, 5 + i], "chosen": [7, 2], "rejected": [8, 2]} for i in range(8)]
    path = write_jsonl(tmp_path / "ids.jsonl", rows)
    config = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "model_type": "llama"}
    from model import Transformer, load_config, save_pretrained

    (tmp_path / "config.json").write_text(json.dumps(config))
    model = Transformer(load_config(tmp_path)).init_weights(0)
    save_pretrained(model, tmp_path / "base")
    run_here("train.py", f"--data={path}", f"--init_from={tmp_path / 'base'}", "--sft_epochs=0", f"--out_dir={tmp_path / 'out'}")  # fmt: skip
    about, text = parts_of(tmp_path / "out")
    assert "pipeline_tag" not in about and "AutoTokenizer" not in text
    assert "python sample.py DIR --prompts prompts.jsonl" in text
