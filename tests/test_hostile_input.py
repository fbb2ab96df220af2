"""What is not as it should be: data files, rows, chat templates, settings and flags.

Each ends in acceptance or in one sentence, with exit status 2: no traceback, no endless wait, no
silent drop. The tables are small; hypothesis looks for what nobody thought of.
"""

import gzip
import json
import os
import re
import resource
import signal
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, run_here, run_script, save_tokenizer, turns, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import model as llm
import sample
import train
from extra import chat, encoded, files, formats, skipping, templates
from extra.guard import most_resident

PAIR = {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}
IDS = {"prompt": [1, 5], "chosen": [6, 2], "rejected": [7, 2]}
TALK = {"prompt": turns("u: 2+2?"), "chosen": turns("a: 4"), "rejected": turns("a: 5")}
GOOD = json.dumps(PAIR).encode() + b"\n"
FUZZ = settings(
    max_examples=40, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    """A model of 320 pieces, and its tokenizer."""
    place = tmp_path_factory.mktemp("checkpoint")
    config = llm.ModelConfig(320, 16, 32, 1, 2, 2, 8, tie_word_embeddings=True)
    llm.save_pretrained(make_model(config).float(), place)
    return save_tokenizer(tokenizer, place)


def refused(*arguments) -> str:
    """The one sentence of a script, without its name."""
    result = run_here(*arguments, expect=2)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr[:2000]
    assert len(lines[0]) < 4500, "no key and no value is echoed whole"
    return lines[0]


def train_on(path, checkpoint, out, *flags) -> list[str]:
    small = "--sft_epochs=0 --max_steps=1 --batch_size=2 --max_length=64 --max_prompt_length=32"
    where = [f"--data={path}", f"--init_from={checkpoint}", f"--out_dir={out}"]
    return ["train.py", *where, *small.split(), *flags]


def packed(data_: bytes) -> bytes:
    return gzip.compress(data_, mtime=0)


# ------------------------------------------------------------------------------------------ files


def line(**fields) -> bytes:
    return json.dumps(PAIR | fields).encode() + b"\n"


DEEP = b"[" * 100_000
FILES = {  # name: contents, and the sentence
    "empty.jsonl": (b"", "the file is empty"),
    "blank.jsonl": (b"\n  \n\t\r\n", "the file is empty"),
    "bom.jsonl": (b"\xef\xbb\xbf", "cannot be read as JSON lines"),
    "nul.jsonl": (b"\0" * 100, r"nul.jsonl:1: cannot be read as JSON lines"),
    "binary.jsonl": (bytes(range(256)) * 20, r"binary.jsonl:1: cannot be read as JSON lines"),
    "elf.jsonl": (b"\x7fELF\x02\x01" + b"\0" * 90, r"elf.jsonl:1: cannot be read"),
    "pickle.jsonl": (b"\x80\x04\x95\n\0\0\0", r"pickle.jsonl:1: cannot be read .*utf-8"),
    "latin.jsonl": (GOOD + b'{"prompt": "\xe9"}\n', r"latin.jsonl:2: cannot be read .*utf-8"),
    "surrogate.jsonl": (b'{"prompt": "\xed\xa0\x80"}', r":1: cannot be read .*utf-8"),
    "cesu.jsonl": (GOOD + b'{"p": "\xed\xa0\xbd\xed\xb8\x80"}', r":2: cannot be read .*utf-8"),
    "utf16.jsonl": (GOOD.decode().encode("utf-16"), "is UTF-16: write it as UTF-8"),
    "utf16be.jsonl": (b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), "is UTF-16: write it as"),
    "deep.jsonl": (GOOD + DEEP, r"deep.jsonl:2: .*recursion"),
    "deep_object.jsonl": (GOOD + b'{"a":' * 100_000, r"deep_object.jsonl:2: .*recursion"),
    "deep.json": (DEEP, r"deep.json, element 1: cannot be read as a JSON array .*recursion"),
    "digits.jsonl": (GOOD + b'{"prompt": ' + b"9" * 5000 + b"}", r"digits.jsonl:2: .*4300"),
    "digits.json": (b"[{}, " + b"9" * 5000 + b"]", "element 1: has the fields none"),
    "cut.jsonl": (GOOD + GOOD[:20], r"cut.jsonl:2: cannot be read .*Expecting|Unterminated"),
    "two.jsonl": (GOOD[:-1] + GOOD, r"two.jsonl:1: cannot be read .*Extra data"),
    "list.jsonl": (GOOD + b"[1]\n", r"list.jsonl:2: expected a JSON object, found list"),
    "text.jsonl": (GOOD + b'"a"\n', r"text.jsonl:2: expected a JSON object, found str"),
    "null.jsonl": (b"null\n", r"null.jsonl:1: expected a JSON object, found NoneType"),
    "nan.jsonl": (b"NaN\n", r"nan.jsonl:1: expected a JSON object, found float"),
    "comment.jsonl": (b"// a comment\n" + GOOD, r"comment.jsonl:1: cannot be read"),
    "quotes.jsonl": (b"{'prompt': 'a'}\n", r"quotes.jsonl:1: cannot be read .*double quotes"),
    "tab.jsonl": (b'{"prompt": "a\tb"}\n', r"tab.jsonl:1: cannot be read .*control character"),
    "escape.jsonl": (rb'{"prompt": "\x41"}', r"escape.jsonl:1: cannot be read .*escape"),
    "indented.jsonl": (json.dumps(PAIR, indent=1).encode(), r"indented.jsonl:1: cannot be read"),
    "empty.json": (b"[]", "empty.json: the array is empty"),
    "open.json": (b"[", r"open.json, element 1: cannot be read as a JSON array"),
    "comma.json": (b"[" + GOOD + b",]", r"comma.json, element 2: cannot be read as a JSON array"),
    "commas.json": (b"[" + GOOD + b",," + GOOD + b"]", r"element 2: cannot be read as a JSON"),
    "lines.json": (b"[" + GOOD + GOOD + b"]", r"element 2: .*expected ',' or ']', found '{'"),
    "after.json": (b"[" + GOOD + b"] 5", r"something follows the array"),
    "number.json": (b"[" + GOOD + b", 12]", r"number.json, element 2: expected .*found int"),
    "bytes.json": (b"[" + GOOD + b', "\xff"]', r"bytes.json, element 1: .*utf-8"),
    "a.parquet": (b"PAR1\x15\0", r"a.parquet:1: .*load_dataset\('parquet'"),
    "a.arrow": (b"ARROW1\0\0", r"a.arrow:1: .*load_dataset\('arrow'"),
    "a.csv": (b"prompt,chosen\n", r"a.csv:1: .*load_dataset\('csv'"),
    "named.jsonl": (b"PAR1\x15\0", r"named.jsonl:1: .*load_dataset\('parquet'"),
    "packed.jsonl": (packed(GOOD), r"is gzipped: give it a name that ends in .gz"),
    "zip.jsonl": (b"PK\x03\x04" + b"\0" * 50, "is a zip archive: unpack it with unzip"),
    "xz.jsonl": (b"\xfd7zXZ\0", "unpack it with unxz"),
    "bz2.jsonl": (b"BZh91AY", "unpack it with bunzip2"),
    "zstd.jsonl": (b"\x28\xb5\x2f\xfd\0", "unpack it with unzstd"),
    "plain.jsonl.gz": (GOOD, r"plain.jsonl.gz: cannot be read .*[Nn]ot a gzipped file"),
    "short.jsonl.gz": (packed(GOOD)[:-9], r"short.jsonl.gz: cannot be read"),
    "torn.jsonl.gz": (packed(GOOD * 900 + os.urandom(9000).hex().encode())[:-900], r"torn.jsonl.gz:\d+: cannot be read .*end-of-stream"),
    "flipped.jsonl.gz": (packed(GOOD)[:20] + b"\xff\xff" + packed(GOOD)[22:], r"flipped.jsonl.gz.* cannot be read"),
    "junk.jsonl.gz": (packed(GOOD) + b"junk", r"junk.jsonl.gz.* cannot be read"),
    "none.jsonl.gz": (b"", "none.jsonl.gz: cannot be read|the file is empty"),
    "bomb.jsonl.gz": (packed(b"x" * 3 * 2**20), r"bomb.jsonl.gz:1: .*over 1 MiB"),
    "bomb.json.gz": (packed(b'["' + b"x" * 3 * 2**20), r"element 1: .*over 1 MiB"),
    "long.jsonl": (GOOD + b'{"prompt": "' + b"x" * 2**21 + b'"}\n', r"long.jsonl:2: .*over 1 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read(name, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST", 2**20)
    content, sentence = FILES[name]
    (tmp_path / name).write_bytes(content)
    said = refused(*train_on(tmp_path / name, checkpoint, tmp_path / "out"))
    assert re.search(sentence, said) and name in said, said


SPECIAL = {
    "fifo": (os.mkfifo, "a pipe or a device: .* write it to a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a pipe or a device"),
    "terminal": (lambda path: path.symlink_to("/dev/null"), "a pipe or a device"),
    "loop": (lambda path: path.symlink_to(path), "cannot be read"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "directory": (lambda path: path.mkdir(), "it is a directory.* name the files in it"),
    "fifo.jsonl.gz": (os.mkfifo, "a pipe or a device"),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_paths_that_are_no_files(name, checkpoint, tmp_path):
    make, sentence = SPECIAL[name]
    make(tmp_path / name)
    said = refused(*train_on(tmp_path / name, checkpoint, tmp_path / "out"))
    assert re.search(sentence, said), said
    said = refused("sample.py", checkpoint, f"--prompts={tmp_path / name}")
    assert re.search(sentence, said), said


def test_directories_and_names_in_place_of_files(checkpoint, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    for path, sentence in (
        (checkpoint, "a checkpoint, which belongs to --init_from"),
        (tmp_path / "adapter", "a checkpoint, which belongs to --init_from"),
        (tmp_path / "saved", "load_from_disk.*to_json"),
        ("no-org/no-name", "load_dataset.'no-org/no-name', split='train'.*to_json"),
        (f"{tmp_path}/{'n' * 300}", "File name too long"),
        (f"{tmp_path}/a\0b", "--data has characters that are none"),
        (f"{tmp_path}/a\udcffb", "--data has characters that are none"),
        (",,", "--data names no file"),
    ):
        said = refused(*train_on(path, checkpoint, tmp_path / "out"))
        assert re.search(sentence, said), said
    with pytest.raises(data.DataError, match="null byte"):
        next(iter(data.read_jsonl("a\0b")))


def test_a_file_is_read_in_pieces(tmp_path):
    """Memory follows the longest line, not the file; and a line of 50 MB is a line."""
    path, lines = tmp_path / "many.jsonl", 4000
    path.write_bytes(line(chosen="x" * 1000) * lines)  # 4 MB
    array = tmp_path / "many.json"
    array.write_bytes(b"[" + (line(chosen="x" * 1000) + b",") * (lines - 1) + GOOD + b"]")
    packed_path = tmp_path / "many.jsonl.gz"
    packed_path.write_bytes(packed(path.read_bytes()))
    for one in (path, array, packed_path):
        tracemalloc.start()
        count = sum(1 for _ in data.read_jsonl(str(one)))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == lines and peak < 700_000, (one, peak)
    path.write_bytes(GOOD + line(chosen="y" * 50_000_000) + GOOD)
    assert [len(e.responses[0]) for e in data.read_preferences(str(path))] == [2, 50_000_000, 2]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux forgets the most")
def test_two_gibibytes_are_read_in_pieces(tmp_path):
    """In less than 400 MB more than the process had; a bomb of 4 GiB in one line in as much."""
    with open(tmp_path / "large.jsonl", "wb") as file:
        for _ in range(2048):
            file.write(line(chosen="x" * 1000) * 983)
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is from now on
    before = most_resident()
    assert sum(1 for _ in data.read_jsonl(str(tmp_path / "large.jsonl"))) == 2048 * 983
    assert most_resident() - before < 100e6
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(4096):
            file.write(b" " * 2**20)
    with pytest.raises(data.DataError, match="bomb.jsonl.gz:1: .*over 128 MiB"):
        list(data.read_jsonl(str(tmp_path / "bomb.jsonl.gz")))
    assert most_resident() - before < 400e6


# ------------------------------------------------------------------------------------------- rows


def nested(depth: int, of="list"):
    value = 1
    for _ in range(depth):
        value = [value] if of == "list" else {"a": value}
    return value


LONG = "k" * 10**6
ROWS = {
    "nested": (TALK | {"tools": [nested(70, "dict")]}, "nested too deeply, over 64 levels"),
    "nested unknown": (TALK | {"source": nested(400)}, "nested too deeply"),
    "nested prompt": (PAIR | {"prompt": nested(300)}, "nested too deeply"),
    "nested in text": (TALK | {"tools": "[" * 500 + "]" * 500}, "nested too deeply"),
    "nested in text, far": (TALK | {"tools": "[" * 99_999}, "no valid JSON .*recursion"),
    "nested arguments": ({"messages": [*turns("u: a"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a":' * 500 + "1" + "}" * 500}]}]}, "nested too deeply"),
    "digits in text": (TALK | {"tools": "[" + "9" * 5000 + "]"}, "no valid JSON"),
    "nan": (PAIR | {"prompt": float("nan")}, "field 'prompt' must be text or a list, found float"),
    "weight nan": (PAIR | {"weight": float("nan")}, "field 'weight' must be a number from 0 to"),
    "weight inf": (PAIR | {"weight": float("inf")}, "field 'weight' must be a number"),
    "weight -1": (PAIR | {"weight": -1}, "field 'weight' must be a number"),
    "weight 1e7": (PAIR | {"weight": 1e7}, "field 'weight' must be a number"),
    "weight int": (PAIR | {"weight": 10**4000}, "field 'weight' must be a number .*found 1000"),
    "weight bool": (PAIR | {"weight": True}, "field 'weight' must be a number .*found True"),
    "weight text": (PAIR | {"weight": "1" * 10**6}, "field 'weight' must be a number"),
    "weight list": (PAIR | {"weight": [1] * 10**5}, "field 'weight' must be a number"),
    "soft_label": (PAIR | {"soft_label": 1.5}, "field 'soft_label' must be a number from 0 to 1"),
    "soft_label nan": (PAIR | {"soft_label": float("nan")}, "field 'soft_label'"),
    "margin": (PAIR | {"margin": 1e300}, "field 'margin' must be a number"),
    "margin -inf": (PAIR | {"margin": -float("inf")}, "field 'margin' must be a number"),
    "score": (PAIR | {"score_chosen": float("nan"), "score_rejected": 1}, "field 'score_chosen'"),
    "ids bool": (IDS | {"prompt": [True, 5]}, "field 'prompt' must hold token ids"),
    "ids float": (IDS | {"prompt": [1.0, 5]}, "field 'prompt' must hold token ids"),
    "ids negative": (IDS | {"chosen": [-1]}, "field 'chosen' must hold token ids"),
    "ids 2**40": (IDS | {"chosen": [2**40]}, "field 'chosen' must hold token ids"),
    "ids 2**31": (IDS | {"chosen": [2**31]}, "field 'chosen' must hold token ids"),
    "ids huge": (IDS | {"chosen": [10**4000]}, "field 'chosen' must hold token ids"),
    "ids beyond": (IDS | {"chosen": [2**31 - 1]}, "beyond the model's vocabulary"),
    "ids null": (IDS | {"chosen": [None]}, "field 'chosen' must hold token ids"),
    "ids text": (IDS | {"chosen": ["5"]}, "field 'chosen' must hold token ids"),
    "ids nested": (IDS | {"chosen": [[5]]}, "field 'chosen' must hold token ids"),
    "ids and text": (IDS | {"chosen": "a"}, "of the same kind"),
    "ids empty": (IDS | {"prompt": []}, "field 'prompt' must hold token ids"),
    "surrogate": (PAIR | {"chosen": "\ud800"}, "field 'chosen' has half a surrogate pair"),
    "surrogate in a turn": (TALK | {"prompt": turns("u: \udfff")}, "has half a surrogate pair"),
    "surrogate in a key": (TALK | {"tools": [{"\ud800": 1}]}, "has half a surrogate pair"),
    "guard": (PAIR | {"prompt": "\ufdd0"}, "U\\+FDD0"),
    "huge key": ({LONG: 1}, "has the fields kkk.*…"),
    "huge keys": ({LONG + str(i): 1 for i in range(9)}, "has the fields kkk.*…"),
    "huge role": (TALK | {"prompt": [{"role": LONG, "content": "a"}]}, "of role 'kkk.*…'"),
    "huge part": (TALK | {"prompt": [{"role": "user", "content": [{"type": LONG}]}]}, "kkk.*…'"),
    "huge turn key": ({"chosen": [*turns("u: a"), turns("a: b")[0], {"role": "user", "content": "c", LONG: 1}, *turns("a: d")], "rejected": [*turns("u: a"), turns("a: b")[0], *turns("u: c | a: e")]}, "differ in a message's 'kkk.*…' alone"),
    "huge winner": ({"prompt": "a", "response_a": "b", "response_b": "c", "winner": LONG}, "…"),
    "many keys": ({f"k{i}": 1 for i in range(9999)}, "9979 more"),
    "empty": ({}, "has the fields none"),
    "null": (PAIR | {"rejected": None}, "field 'rejected'"),
    "images": (TALK | {"images": ["a.png"]}, "field 'images' is not supported"),
    "no role": (TALK | {"prompt": [{"content": "a"}]}, "must hold token ids, or messages"),
    "content": (TALK | {"prompt": [{"role": "user", "content": {"a": 1}}]}, "content is dict"),
    "turn weight": ({"messages": [*turns("u: a"), {"role": "assistant", "content": "b", "weight": 0.5}]}, "a message of weight 0.5"),
    "turn weight huge": ({"messages": [*turns("u: a"), {"role": "assistant", "content": "b", "weight": LONG}]}, "…"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_cannot_be_used(name, checkpoint, tmp_path):
    """In training, in the doctor, and for the sampler."""
    row, sentence = ROWS[name]
    path = write_jsonl(tmp_path / "rows.jsonl", [PAIR, row])
    sft = ["--sft_epochs=1", "--epochs=0"] if "messages" in row else []
    said = refused(*train_on(path, checkpoint, tmp_path / "out", *sft))
    assert re.search(sentence, said), said[:500]
    assert "rows.jsonl:2: " in said or "token id" in said
    assert "kkkkkkkkkk" * 11 not in said and "1111111111" * 11 not in said
    said = run_here("extra/doctor.py", path, f"--out={tmp_path}/good.jsonl")
    assert "Traceback" not in said.stderr and (said.stderr or "ids beyond" in name)


def test_what_is_only_handed_on_is_not_lost(checkpoint, tmp_path):
    """Fields that nobody reads may hold anything; they come out as they came in."""
    odd = {"id": "\ud800", "source": float("inf"), "n": 10**4000, "note": "\ufdd0\0"}
    path = write_jsonl(tmp_path / "odd.jsonl", [PAIR | odd])
    flags = ["sample.py", checkpoint, f"--compare={checkpoint}", f"--score={path}"]
    run_here("extra/doctor.py", path, f"--out={tmp_path}/good.jsonl")
    run_here(*flags, f"--out={tmp_path}/scored.jsonl")
    for name in ("good", "scored"):
        [(_, row)] = data.read_jsonl(f"{tmp_path}/{name}.jsonl")
        assert {key: row[key] for key in odd} == odd
    path = write_jsonl(tmp_path / "deep.jsonl", [PAIR | {"id": nested(500)}])
    assert "deep.jsonl:1: is nested too deeply" in refused(*flags[:-1], f"--score={path}")


# --------------------------------------------------------------------------------------- skipping


def skip(paths, tokenizer=None, most=99, kind="preferences") -> tuple[int, Counter]:
    """How many examples there are, and the counts, as a run finds them."""
    examples = data.read_examples(str(paths), kind, most)
    ahead = encoded.encode_ahead(examples, tokenizer, examples.attempt)
    dataset, counts = data.encode(ahead, tokenizer, 64, 32)
    return len(dataset), counts + Counter({skipping.SKIPPED: examples.skipped})


def test_bad_rows_are_skipped_counted_and_shown(checkpoint, tmp_path, capsys):
    """Up to N in each set, of every kind; the first three are shown; the next one stops."""
    bad = [b"no JSON\n", b"[1]\n", b'{"a": 1}\n', line(weight=-1), b'{"prompt": "\xff"}\n']
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(GOOD + row for row in bad) + line(chosen=" 5"))
    flags = ["--skip_bad_rows=5", "--sft_epochs=1", f"--eval_data={path}"]
    out = run_here(*train_on(path, checkpoint, tmp_path / "out", *flags)).stdout
    for name in ("sft", "sft eval"):
        assert f"\n{name}: 6 examples, 5 bad rows skipped in {path}" in f"\n{out}"
    for name in ("pairs", "eval pairs"):
        assert f"{name}: 6 examples, 1 dropped: identical responses, 5 bad rows skipped in" in out
    shown = [row for row in out.splitlines() if row.startswith("skipped: ")]
    assert len(shown) == 3 and f"{path}:2: cannot be read as JSON lines" in shown[0]
    assert f"{path}:6: has the fields a" in shown[2]
    said = refused(*train_on(path, checkpoint, tmp_path / "out", "--skip_bad_rows=4"))
    assert f"{path}:10: cannot be read as JSON lines" in said
    assert said.endswith("; 4 bad rows skipped before it")
    for flag in ([], ["--skip_bad_rows=0"]):
        assert f"{path}:2: cannot be" in refused(
            *train_on(path, checkpoint, tmp_path / "out", *flag)
        )
    path.write_bytes(b"".join(bad))
    said = refused(*train_on(path, checkpoint, tmp_path / "out", "--skip_bad_rows=9"))
    assert said.endswith("all 5 rows are bad ones")


def test_skipping_changes_nothing_else(tokenizer, tmp_path):
    """The data set is that of the file without its bad rows; files that end early stop all."""
    good = [PAIR | {"prompt": f"Q{i}"} for i in range(5)] + [TALK, {"text": "b"}]
    rows = [good[0], {"a": 1}, *good[1:4], {"prompt": "\ud800"}, *good[4:]]
    write_jsonl(tmp_path / "bad.jsonl", rows)
    write_jsonl(tmp_path / "good.jsonl", good[:-1])
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    plain, counts = data.encode(
        encoded.encode_ahead(data.read_preferences(f"{tmp_path}/good.jsonl"), tokenizer),
        tokenizer,
        64,
        32,
    )
    for name in ("bad.jsonl", "bad.json"):
        examples = data.read_preferences(f"{tmp_path}/{name}", skip_bad_rows=3)
        ahead = encoded.encode_ahead(examples, tokenizer, examples.attempt)
        dataset, again = data.encode(ahead, tokenizer, 64, 32)
        assert examples.skipped == 3 and again == counts
        assert (dataset.tokens == plain.tokens).all() and np.array_equal(
            dataset.facts, plain.facts, equal_nan=True
        )
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(packed(GOOD * 999 + os.urandom(9000).hex().encode())[:-900])
    with pytest.raises(data.DataError, match="end-of-stream"):
        list(data.read_preferences(str(torn), skip_bad_rows=9))


def test_conversations_that_a_template_refuses_are_skipped(tokenizer, tmp_path):
    strict = (
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    place = save_tokenizer(tokenizer, tmp_path / "t")
    (place / "chat_template.jinja").write_text(strict)
    rows = [TALK, TALK | {"prompt": turns("u: bad")}, TALK | {"chosen": turns("a: bad")}, TALK]
    path = write_jsonl(tmp_path / "talks.jsonl", rows)
    found, counts = skip(path, data.Tokenizer(place))
    assert found == 2 and counts["bad rows skipped"] == 2 and counts["examples"] == 2
    with pytest.raises(data.DataError, match=r"talks.jsonl:3: .*no.; 1 bad rows skipped before it"):
        skip(path, data.Tokenizer(place), most=1)


# -------------------------------------------------------------------------------------- templates


def doubled(what: str, by: str) -> str:
    return f"{{% set ns = namespace(x={what}) %}}{{% for i in range(99) %}}{{% set ns.x = ns.x {by} ns.x %}}{{% endfor %}}{{{{ ns.x }}}}"


def loops(depth: int) -> str:
    each = "".join(f"{{% for a{i} in range(99999) %}}" for i in range(depth))
    return each + "{% endfor %}" * depth


LIMITED = "has not ended after 1 s|it wants over 0.25 GiB of memory|a number is too large|over 10,000,000 characters"
REFUSED = "refuses the turns"
BROKEN = "its chat template cannot be compiled"
TEMPLATES = {
    "loops": (loops(3), LIMITED),
    "pow": ("{{ 2**(10**9) }}", LIMITED),
    "powers": ("{{ 9**(9**9) % 7 }}", LIMITED),
    "digits": ("{{ 10**5000 }}", LIMITED),
    "product": ("{% set x = 2**4000 %}{{ x * x * x }}", LIMITED),
    "repeated": ("{{ 'x' * 10**10 }}", LIMITED),
    "repeated list": ("{{ messages * 10**10 }}", LIMITED),
    "doubled ~": (doubled("'x'", "~"), LIMITED),
    "doubled +": (doubled("'x'", "+"), LIMITED),
    "doubled list": (doubled("[1]", "+"), LIMITED),
    "center": ("{{ 'x'|center(10**10) }}", LIMITED),
    "center, method": ("{{ 'x'.center(10**8) }}", LIMITED),
    "constant": ("{{ 'x'|center(99999999) }}", LIMITED),
    "indent": ("{{ 'x\ny'|indent(10**10) }}", LIMITED),
    "format": ("{{ '%10000000000d' % 1 }}", LIMITED),
    "format, method": ("{{ '{:9999999999}'.format(1) }}", LIMITED),
    "format, filter": ("{{ '%*d'|format(2000000000, 1) }}", LIMITED),
    "zfill": ("{{ '1'.zfill(10**10) }}", LIMITED),
    "expandtabs": ("{{ '\t'.expandtabs(10**8) }}", LIMITED),
    "replace": ("{{ ('x' * 10**6)|replace('x', 'x' * 10**6) }}", LIMITED),
    "join": ("{{ ('x' * 10**6)|join('x' * 10**6) }}", LIMITED),
    "json": ("{{ messages|tojson(indent=10**9) }}", LIMITED),
    "lipsum": ("{{ lipsum(n=10**9) }}", LIMITED),
    "batch": ("{{ [1]|batch(10**9, 1)|list }}", LIMITED),
    "graph": ("{% set ns = namespace(a=[1]) %}{% for i in range(40) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}", LIMITED),
    "range": ("{{ range(10**9)|list }}", "Range too big"),
    "recursive macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "recursive loop": ("{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}", "recursion"),
    "nested ifs": ("{% if 1 %}" * 2000 + "{% endif %}" * 2000, BROKEN),
    "nested brackets": ("{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}", BROKEN),
    "nested loops": ("{% for a in [1] %}" * 40 + "{% endfor %}" * 40, BROKEN),
    "many nots": ("{{ " + "not " * 3000 + "1 }}", BROKEN),
    "many filters": ("{{ a" + "|upper" * 3000 + " }}", BROKEN),
    "megabytes": ("x" * 2 * 10**6, "it has 2,000,000 characters: 1,048,576 are allowed"),
    "syntax": ("{% if %}", BROKEN),
    "open": ("{{", BROKEN),
    "unknown tag": ("{% frobnicate %}", BROKEN),
    "unknown filter": ("{{ a|nope }}", BROKEN),
    "block": ("{% block a %}{% endblock %}{% block a %}{% endblock %}", BROKEN),
    "surrogate": ("{{ '\\ud800' }}", "half a surrogate pair"),
    "half": ("{{ messages[0].content[0] }}{{ '\\ud83d' }}", "half a surrogate pair"),
    "raise": ("{{ raise_exception('y' * 10**6) }}", "refuses the turns .yyy.*…"),
    "raise, no text": ("{{ raise_exception(messages) }}", REFUSED),
    "undefined": ("{{ a.b.c }}", "'a' is undefined"),
    "call": ("{{ nothing() }}", "'nothing' is undefined"),
    "division": ("{{ 1 // 0 }}", REFUSED),
    "no element": ("{{ messages[99].content }}", REFUSED),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('exit') }}", "unsafe"),
    "function": ("{{ raise_exception.__globals__.os.system('exit') }}", "unsafe"),
    "format string": ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
    "change": ("{% for a in range(9) %}{{ messages.append(1) }}{% endfor %}", "unsafe"),
    "include": ("{% include '/etc/passwd' %}", REFUSED),
    "import": ("{% import 'os' as os %}", REFUSED),
    "extends": ("{% extends 'x' %}", REFUSED),
    "date": ("{{ strftime_now(5) }}", REFUSED),
    "date, nul": ("{{ strftime_now('\\x00') }}", REFUSED),
}  # fmt: skip


@pytest.fixture
def tight(monkeypatch):
    """Bounds that are reached at once."""
    for name, value in (("SECONDS", 1), ("MEMORY", 2**28), ("LONGEST", 10**7)):
        monkeypatch.setattr(templates, name, value)


def with_template(source, tokenizer, place) -> data.Tokenizer:
    save_tokenizer(tokenizer, place)
    (place / "chat_template.jinja").write_text(source, encoding="utf-8")
    return data.Tokenizer(place)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_end_and_stay_in_their_sandbox(name, tokenizer, tmp_path, tight):
    source, sentence = TEMPLATES[name]
    t, began = with_template(source, tokenizer, tmp_path / "t"), time.thread_time()
    example = data.Example(turns("u: hi"), (turns("a: ho"),), "talk.jsonl:7")
    with pytest.raises(data.DataError) as error:
        data.token_ids(example, t)
    said = str(error.value)
    assert re.search(sentence, said), said
    assert said.startswith("talk.jsonl:7: ") or str(tmp_path / "t") in said
    assert "\n" not in said and len(said) < 500
    assert time.thread_time() - began < 8


def test_the_bounds_are_gone_afterwards(tokenizer, tmp_path):
    """The process has its own limits, handler and timer again; other threads have none."""

    def mine(*_):
        """Somebody's handler."""

    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, mine)
    signal.setitimer(signal.ITIMER_REAL, 1000, 50)
    try:

        def look():
            assert signal.getsignal(signal.SIGALRM) != mine
            assert resource.getrlimit(resource.RLIMIT_AS) != limits
            raise ValueError

        with pytest.raises(ValueError), templates.BOUNDS:
            templates.bounded(look)
        assert signal.getsignal(signal.SIGALRM) is mine
        assert signal.getitimer(signal.ITIMER_REAL) == pytest.approx((1000, 50), abs=20)
        assert resource.getrlimit(resource.RLIMIT_AS) == limits
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    found = []
    thread = threading.Thread(target=lambda: found.append(templates.bounded(lambda: 5)))
    thread.start()
    thread.join()
    assert found == [5]


# ------------------------------------------------------------------------------ settings and flags


HUGE = str(10**30)
SETTINGS = [
    ("--seed=-1", "at least 0"), (f"--seed={2**63}", "at most"), (f"--seed={2**64 + 5}", "at most"),
    ("--lora_rank=17", "more than the model's width of 16"), (f"--lora_rank={HUGE}", "at most 2,147,483,647"),
    *((f"--{name}={HUGE}", f"--{name} must be at most") for name in """batch_size micro_batch_tokens
        epochs sft_epochs max_steps warmup_steps max_length max_prompt_length log_every save_every
        eval_every skip_bad_rows""".split()),
    *((f"--{name}=-1", f"--{name} must be a number of at least 0") for name in """batch_size epochs
        max_steps warmup_steps skip_bad_rows lora_rank max_length""".split()),
    *((f"--{name}={value}", f"--{name} must be") for value in ("nan", "inf", "-inf", "1e308", "1e-320", "-1e-9")
      for name in ("learning_rate", "beta")),
    ("--sft_weight=1e308", "--sft_weight must be"), ("--grad_clip=1e-320", "--grad_clip must be"),
    ("--weight_decay=inf", "--weight_decay must be"), ("--beta=0", "--beta must be greater than 0"),
    ("--beta=1e30", "--beta must be from 1e-06 to 1e"), ("--label_smoothing=0.5", "less than 0.5"),
    ("--loss=simpo --gamma=1e308", "--gamma must be"), ("--loss=" + "x" * 9, "loss"),
    ("--out_dir=", "--out_dir is empty"), ("--out_dir=a\0b", "--out_dir has characters that are none"),
    ("--out_dir=a\udc80b", "--out_dir has characters that are none"),
    ("--out_dir=/proc/run", "/proc/run cannot be written"),
    ("--out_dir=/dev/null/run", "/dev/null/run cannot be written"),
    ("--out_dir=/dev/null", "/dev/null cannot be written"),
    ("--out_dir=" + "n" * 999, "cannot be written"), ("--eval_data=a\0b", "--eval_data has characters"),
    ("--eval_data=/no/such/file.jsonl", "No such file"), ("--dtype=int8", "--dtype is 'int8'"),
]  # fmt: skip
NEW = [  # of a new model
    (f"--num_layers={HUGE}", "--num_layers must be at most 1,000"), ("--num_layers=0", "greater than 0"),
    (f"--hidden_size={HUGE}", "--hidden_size must be at most"), (f"--vocab_size={HUGE}", "at most"),
    ("--hidden_size=8388608", "lower --hidden_size, --num_layers or --vocab_size"),
    ("--vocab_size=2000000000", "needs [0-9,]+ GiB, and there are"), ("--num_layers=1000 --hidden_size=65536", "GiB"),
    (f"--num_heads={HUGE}", "--num_heads must be at most"), ("--num_heads=3", "multiple of twice --num_heads"),
    ("--vocab_size=-5", "at least 0"), ("--tokenizer=a\0b", "--tokenizer has characters that are none"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "sentence"), SETTINGS, ids=[s[0][:40] for s in SETTINGS])
def test_settings_out_of_their_range(flags, sentence, checkpoint, tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [PAIR])
    said = refused(*train_on(path, checkpoint, tmp_path / "out"), *flags.split(" "))
    assert re.search(sentence, said), said
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(("flags", "sentence"), NEW, ids=[s[0][:40] for s in NEW])
def test_new_models_out_of_their_range(flags, sentence, tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [PAIR])
    said = refused("train.py", f"--data={path}", f"--out_dir={tmp_path}/out", *flags.split(" "))
    assert re.search(sentence, said), said
    assert not (tmp_path / "out").exists(), "before any work"


@pytest.mark.parametrize("name", ["sft", "adapter", "resume", "encoded", "config.json", "run.json"])
def test_what_the_run_could_not_write_is_found_at_once(name, checkpoint, tmp_path):
    """A file where a directory belongs, or the reverse; before the data are looked at."""
    out = tmp_path / "out"
    (out / name).mkdir(parents=True) if "." in name else out.mkdir()
    if "." not in name:
        (out / name).write_text("a file")
    said = refused(*train_on("/no/such/file.jsonl", checkpoint, out))
    assert re.search(f"--out_dir: {out}.* cannot be written", said), said


FLAGS = [
    ("--seed=-1", "--seed must be at least 0"), (f"--seed={2**63}", "--seed must be at most"),
    (f"--max_new_tokens={HUGE}", "at most"), ("--max_new_tokens=2000000000", "GiB of keys and values"),
    ("--max_new_tokens=0", "at least 1"), (f"--n={HUGE}", "at most"), ("--n=2000000000", "at most 1,000,000"),
    ("--n=0", "at least 1"), (f"--top_k={HUGE}", "at most"), ("--top_k=-1", "at least 0"),
    *((f"--temperature={value}", "--temperature must be") for value in ("nan", "inf", "-1", "1e308", "1e-320")),
    *((f"--top_p={value}", "--top_p must be") for value in ("nan", "0", "-1", "1.5", "1e-320", "inf")),
    ("--out=/proc/x", "No such file|cannot"), ("--out=/no/such/dir/x", "No such file"),
    ("--out=/", "directory"), ("--prompt=\udcff", "--prompt has characters that are none"),
    ("--prompts=a\0b", "--prompts has characters that are none"), ("--prompts=/no/such.jsonl", "No such file"),
    ("--compare=a\0b", "--compare has characters that are none"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "sentence"), FLAGS, ids=[s[0][:40] for s in FLAGS])
def test_flags_of_the_sampler_out_of_their_range(flag, sentence, checkpoint):
    said = refused("sample.py", checkpoint, "--prompt=a", *flag.split(" "))
    assert re.search(sentence, said), said


def test_the_least_and_the_most_are_right(checkpoint, tmp_path):
    """What is at the end of a range works."""
    path = write_jsonl(tmp_path / "pairs.jsonl", [PAIR, PAIR | {"chosen": " 6"}])
    most = str(2**31 - 1)
    ends = f"""--seed={2**63 - 1} --batch_size={most} --micro_batch_tokens={most} --warmup_steps={most}
        --max_length={most} --max_prompt_length={2**31 - 2} --log_every={most} --beta=1e-6""".split()
    run_here(*train_on(path, checkpoint, tmp_path / "out", *ends))
    flags = f"--max_new_tokens=3 --temperature=1e6 --top_k={most} --seed={2**63 - 1}".split()
    run_here("sample.py", checkpoint, "--prompt=a", *flags)
    logits = torch.randn(50, 300)
    for shape in ({"temperature": 1e-6}, {"top_p": 1e-6}, {"temperature": 0.5, "top_p": 1e-6}):
        drawn = sample.sample_tokens(logits, torch.Generator().manual_seed(1), **shape)
        assert (drawn == logits.argmax(-1)).all(), "as greedy"
    os.mkfifo(tmp_path / "pipe")
    said = refused("sample.py", checkpoint, "--prompt=a", f"--out={tmp_path}/pipe")
    assert "is a pipe: name a file" in said


def test_the_scripts_themselves(checkpoint, tmp_path):
    """As a user runs them: one line, status 2."""
    (tmp_path / "bad.jsonl").write_bytes(GOOD + b"\xff\n")
    os.mkfifo(tmp_path / "pipe")
    for arguments, sentence in (
        (train_on(tmp_path / "bad.jsonl", checkpoint, tmp_path / "out"), "bad.jsonl:2: cannot be read"),
        (["sample.py", checkpoint, "--prompts", tmp_path / "pipe"], "a pipe or a device"),
    ):  # fmt: skip
        [said] = run_script(*arguments, expect=2).stderr.splitlines()
        assert sentence in said


# ---------------------------------------------------------------------------------------- fuzzing


NUMBERS = st.integers() | st.floats() | st.integers(0, 300) | st.booleans()
TEXTS = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["", "user", "assistant", "\0", "<s>", "Human: a"]
)
VALUES = st.recursive(
    st.none() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["role", "content", "a", "tools", "weight", "text"]) | TEXTS, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
NAMES = sorted({name for fields, _ in formats.KINDS["training"] for name in fields} | {"weight", "soft_label", "margin", "system", "history", "tools", "id"})  # fmt: skip
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]) | TEXTS, "content": TEXTS | VALUES}), max_size=4)  # fmt: skip
ROW = st.dictionaries(st.sampled_from(NAMES) | TEXTS, VALUES | MESSAGES | st.lists(st.integers(-1, 400), max_size=5), max_size=5)  # fmt: skip
ANSWERS = TEXTS | MESSAGES | VALUES
PAIRS = st.fixed_dictionaries({"prompt": ANSWERS, "chosen": ANSWERS, "rejected": ANSWERS}, optional={"weight": NUMBERS, "soft_label": NUMBERS, "margin": NUMBERS, "system": TEXTS, "tools": VALUES})  # fmt: skip


def account_for(path, tokenizer, rows: int | None = None):
    """Whatever is in a file: it is a sentence, or each row is encoded, dropped and counted, or
    skipped and counted."""
    try:
        size, counts = skip(path, tokenizer, most=10**6)
    except data.DataError as error:
        said = str(error)
        assert (
            "\n" not in said and len(said) < 4500 and str(path) in said
        ) or "no example is left" in said
        return
    dropped = sum(count for name, count in counts.items() if name.startswith("dropped: "))
    assert size + dropped == counts["examples"]
    if rows is not None:
        assert counts["examples"] + counts[skipping.SKIPPED] == rows


@FUZZ
@given(rows=st.lists(ROW | PAIRS | VALUES, min_size=1, max_size=6))
def test_any_rows(rows, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [PAIR, *rows]))
    account_for(path, tokenizer, len(rows) + 1)


LINES = {
    "plain": [PAIR] * 3,
    "chat": [TALK, TALK | {"prompt": turns("s: be | u: a | a: b | u: c")}],
    "ids": [IDS, IDS | {"weight": 2}],
    "rankings": [{"prompt": "a", "responses": ["b", "c", "d"]}, {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}],
    "demonstrations": [{"messages": turns("u: a | a: b")}, {"prompt": "a", "response": "b"}],
}  # fmt: skip


@FUZZ
@given(
    name=st.sampled_from(sorted(LINES)), array=st.booleans(), zipped=st.booleans(),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4),
)  # fmt: skip
def test_any_bytes_in_good_files(name, array, zipped, edits, tokenizer, tmp_path):
    rows = LINES[name]
    text = json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows)
    content = packed(text.encode()) if zipped else text.encode()
    for where, new, length in edits:
        start = int(where * len(content))
        content = content[:start] + new + content[start + length :]
    path = tmp_path / f"file.jsonl{'.gz' * zipped}"
    path.write_bytes(content)
    account_for(path, tokenizer)


PIECES = st.sampled_from("""messages m m.role m.content 'x' 1 10**9 -1 none true [] {} loop.index
    bos_token eos_token add_generation_prompt range(9) range(99999) '\\ud800' ''.__class__ cycler ns.x
    tools raise_exception strftime_now namespace(x=1) messages[0] [m,m] {'a':m}""".split())  # fmt: skip
BINARY = st.sampled_from(["+", "-", "*", "**", "~", "//", "%", "==", "<", "in", "and", "is not"])
FILTERS = st.sampled_from(["upper", "trim", "tojson", "length", "list", "join", "center(99)", "int", "string", "nope", "attr('a')", "replace('x', 'xx')", "batch(2)"])  # fmt: skip
EXPRESSIONS = st.recursive(
    PIECES,
    lambda inner: st.tuples(inner, BINARY, inner).map(lambda t: f"({' '.join(t)})")
    | st.tuples(inner, FILTERS).map(lambda t: f"{t[0]}|{t[1]}"),
    max_leaves=5,
)  # fmt: skip
STATEMENTS = st.recursive(
    EXPRESSIONS.map(lambda e: f"{{{{ {e} }}}}") | st.sampled_from(["text", "{{ bos_token }}", "{{ m.content }}", "{%", "}}", "{% else %}"]),
    lambda inner: st.tuples(EXPRESSIONS, inner).map(lambda t: f"{{% if {t[0]} %}}{t[1]}{{% endif %}}")
    | inner.map(lambda body: f"{{% for m in messages %}}{body}{{% endfor %}}")
    | st.tuples(EXPRESSIONS, inner).map(lambda t: f"{{% for m in {t[0]} %}}{t[1]}{{% endfor %}}")
    | st.tuples(inner, inner).map("".join)
    | inner.map(lambda body: f"{{% set ns = namespace(x='x') %}}{{% set ns.x = ns.x ~ ns.x %}}{body}"),
    max_leaves=6,
)  # fmt: skip


@FUZZ
@given(source=STATEMENTS)
def test_any_template(source, tokenizer, tmp_path):
    """It is refused, or what it writes becomes ids."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("SECONDS", 0.5), ("MEMORY", 2**28), ("LONGEST", 10**5)):
            patch.setattr(templates, name, value)
        chat.template_of.cache_clear()
        t = with_template(source, tokenizer, tmp_path / "t")
        example = data.Example(turns("u: a | a: b | u: c"), (turns("a: d"), turns("a: e")), "f:1")
        try:
            trees = data.token_ids(example, t)
        except data.DataError as error:
            said = str(error)
            assert "\n" not in said and len(said) < 700 and ("f:1" in said or str(tmp_path) in said)
        else:
            assert all(isinstance(i, int) and abs(i) < 10**6 for ids in trees for i in ids)


KINDS = {int: st.integers(-5, 20) | st.integers(), float: st.floats() | st.floats(0, 2), str: TEXTS, bool: st.booleans()}  # fmt: skip


@settings(FUZZ, max_examples=30)
@given(drawn=st.data())
def test_any_setting(drawn, checkpoint):
    """It is refused by one sentence that names it or another, or becomes a setting as it is."""
    fields = {f.name: f.type for f in train.dataclasses.fields(train.Settings) if f.name not in ("options", "resume", "wandb")}  # fmt: skip
    names = drawn.draw(
        st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True)
    )
    chosen = {name: drawn.draw(KINDS[fields[name]]) for name in names}
    spelled = {k: json.dumps(v) if isinstance(v, bool) else str(v) for k, v in chosen.items()}
    flags = ["--data=x", f"--init_from={checkpoint}", *(f"--{k}={v}" for k, v in spelled.items())]
    try:
        found = train.parse_settings(flags)
    except (data.DataError, llm.CheckpointError, ImportError) as error:
        assert "\n" not in str(error).strip() or "\n" in "".join(spelled.values())
        assert len(str(error)) < 500
    else:
        for name, value in chosen.items():
            assert getattr(found, name) == value
            if isinstance(value, (int, float)):
                assert 0 <= value < 2**63
