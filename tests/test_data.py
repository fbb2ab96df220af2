"""Text rules, packing, the plan of an epoch, bad input, and the exactness of the grammar."""

import gzip
import importlib.util
import io
import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ROOT, SHAPES, make_model, random_dataset, run_script, write_jsonl

import data
import dpo
from model import attentions

PAIR = {"prompt": "Q: 2+2?", "chosen": " 4", "rejected": " 5"}


def random_text(rng, low=0, high=9) -> str:
    alphabet = " \n\tab\u3000é😀<>/s\u200b\ufffd\r\x000The film was,"
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(low, high)))


def test_decode_gives_prompt_and_response_back(tokenizer):
    """For any strings: ids start with the prompt's, and no space is invented or lost."""
    rng = random.Random(0)
    special = ["</s>", "<s>", "<unk>", "<0x0A>", " ", "  x", "\n", "great ", "Ünï"]
    for _ in range(3000):
        prompt = rng.choice(special) if rng.random() < 0.1 else random_text(rng)
        response = rng.choice(special) if rng.random() < 0.1 else random_text(rng, low=1)
        example = data.Example(prompt, (response, response + "x"))
        dataset = data.encode_examples([example], tokenizer, 512, 256)
        ids, chosen = (
            dataset.tokens[a:b].tolist() for a, b in itertools.pairwise(dataset.offsets[:3])
        )
        assert ids == tokenizer.encode_prompts([prompt])[0], "the sampler starts from the same ids"
        assert tokenizer.decode(ids + chosen) == prompt + response
        if prompt:
            assert tokenizer.decode(chosen, continuation=True) == response
        everything = ids + chosen
        assert everything.count(tokenizer.bos_id) == 1 and everything[0] == tokenizer.bos_id
        assert everything.count(tokenizer.eos_id) == 1 and everything[-1] == tokenizer.eos_id


def test_truncation_is_by_rule_and_counted(tokenizer):
    def encode(prompt, chosen, rejected, max_length, max_prompt):
        example = data.Example(prompt, (chosen, rejected))
        dataset = data.encode_examples([example], tokenizer, max_length, max_prompt)
        ends = itertools.pairwise(dataset.offsets)
        return [dataset.tokens[a:b].tolist() for a, b in ends], dataset.counts

    (prompt, chosen, rejected), counts = encode("abcdef", " ab", " cdcdcdcd", 9, 4)
    assert prompt == [tokenizer.bos_id, *tokenizer.encode("abcdef")[-3:]], (
        "BOS and the end are kept"
    )
    assert chosen[-1] == tokenizer.eos_id and len(chosen) <= 5
    assert rejected == tokenizer.encode(" cdcdcdcd", continuation=True)[:5], "cut: no EOS"
    assert counts["prompts cut"] == 1 and counts["responses cut"] == 1
    good = data.Example("a", (" x", " y"))
    same_once_cut = data.Example("a", (" abababab1", " abababab2"))
    no_room = data.Example("abcdefgh", (" x", " y"))
    dataset = data.encode_examples([good, same_once_cut, no_room], tokenizer, 8, 20)
    assert len(dataset) == 1 and dataset.counts["examples"] == 3
    assert dataset.counts["dropped: identical once cut"] == 1
    assert dataset.counts["dropped: no room for a response"] == 1
    with pytest.raises(data.DataError, match="max_length"):
        data.encode_examples([no_room], tokenizer, 8, 20)


def test_files_of_pairs_rankings_and_demonstrations(tmp_path):
    rows = [PAIR | {"weight": 2, "margin": 1.5}, {"prompt": "", "responses": ["a", "b", "c"]}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    pair, ranking = data.load_preferences(path)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.weight) == ("Q: 2+2?", " 4", " 5", 2.0)
    assert ranking.responses == ("a", "b", "c") and ranking.where == f"{path}:2"
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    zipped = data.load_preferences(tmp_path / "x.jsonl.gz")
    assert [e.responses for e in zipped] == [pair.responses, ranking.responses]
    sft = write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "p", "response": "r"}, PAIR])
    assert [e.responses for e in data.read_demonstrations(sft)] == [("r",), (" 4",)]


@pytest.mark.parametrize(("chosen", "rejected"), [
    ("yes", "yes, sure"), ("yes, sure", "yes"), ("yes", "yet"), ("yes", "no"), ("a", "b"), ("yes", ""), ("x", "x"),
])  # fmt: skip
def test_a_prompt_is_no_common_prefix(chosen, rejected, tokenizer, tmp_path):
    """Transcripts share turns, not letters: what both answers begin with stays in both answers;
    an empty or an identical pair is dropped and counted."""
    talk = "\n\nHuman: Is it?\n\nAssistant: "
    other = {"chosen": talk + "fine", "rejected": talk + "bad"}
    rows = [{"chosen": talk + chosen, "rejected": talk + rejected}, other]
    path = write_jsonl(tmp_path / "hh.jsonl", rows)
    example = data.load_preferences(path)[0]
    assert example.prompt == [{"role": "user", "content": "Is it?"}]
    assert [turns[0]["content"] for turns in example.responses] == [chosen, rejected]
    dataset = data.encode_examples(data.read_preferences(path), tokenizer, 99, 64)
    dropped = (
        dataset.counts["dropped: empty response"] + dataset.counts["dropped: identical responses"]
    )
    assert len(dataset) == 2 - dropped and dropped == (chosen == rejected or not rejected)
    if not dropped:
        ids = [dataset.tokens[a:b].tolist() for a, b in itertools.pairwise(dataset.offsets[:4])]
        texts = [tokenizer.decode(ids[0] + response) for response in ids[1:]]
        assert texts == [talk + chosen, talk + rejected]


def test_soft_labels_and_margins_reach_the_batch(tmp_path):
    """As numbers in the file, margins also as the difference of scores; by pair, K-wise weighted."""
    ids = {"prompt": [5], "chosen": [6, 2], "rejected": [7, 2]}
    rows = [
        ids | {"soft_label": 0.75, "margin": -1.5, "weight": 2},
        ids | {"score_chosen": 8.5, "score_rejected": 6},
        ids | {"score_chosen": 8.5, "score_rejected": 6, "margin": 1},
        {"prompt": [5], "responses": [[6, 2], [7, 2], [8, 2]], "weight": 6, "score_chosen": "A"},
    ]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    dataset = data.encode_examples(data.read_preferences(path), None, 9, 8)
    batch = data.collate(dataset, np.array([1, 0, 3, 2]))
    assert batch.labels.tolist() == [1, 0.75, 1, 1, 1, 1] and batch.soft
    assert batch.margins.tolist() == pytest.approx([2.5, -1.5, *[math.nan] * 3, 1], nan_ok=True)
    assert batch.weights.tolist() == [1, 2, 2, 2, 2, 1] and batch.sizes == (2, 2, 3, 2)
    assert batch.example_weights.tolist() == [1, 2, 6, 1]
    assert not data.collate(dataset, np.array([1, 3])).soft
    sft = write_jsonl(tmp_path / "sft.jsonl", [{"prompt": [5], "response": [6], "soft_label": 9}])
    assert len(list(data.read_demonstrations(sft))) == 1, "in demonstrations they are other fields"
    idle = data.collate(dataset, np.array([], dtype=int))
    assert not idle.soft and len(idle.labels) == len(idle.margins) == len(idle.example_weights) == 0


BAD_LINES = {
    b'{"prompt": "a", "chosen": "b"': "invalid JSON",
    b'["prompt"]': "expected a JSON object",
    b'{"prompt": "a", "chosen": "b"}': "field 'rejected' is missing",
    b'{"chosen": "a", "rejected": "b"}': "field 'prompt' is missing",
    b'{"text": "a"}': "has the fields text; expected those of a format: question,",
    b'{"prompt": "a", "chosen": 3, "rejected": "b"}': "'chosen' must be text or a list, found int",
    b'{"prompt": null, "chosen": "a", "rejected": "b"}': "field 'prompt' is missing",
    b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}': "invalid UTF-8",
    b'{"prompt": "a", "chosen": "\\ud800", "rejected": "b"}': "surrogate",
    b'{"prompt": "a", "responses": ["b"]}': "two responses or more",
    b'{"prompt": "a", "responses": ["b", 4]}': "'response' must be text or a list, found int",
    b'{"prompt": "a", "responses": ["b", null]}': "'response' must be text or a list, found NoneType",
    b'{"prompt": "a", "chosen": "b", "rejected": "c", "weight": -1}': "'weight' must be a number",
    b'{"prompt": "a", "chosen": "b", "rejected": "c", "weight": NaN}': "'weight' must be a number",
    b'{"prompt": "a", "chosen": "b", "rejected": "c", "soft_label": 1.2}': "'soft_label' must be a number from 0 to 1",
    b'{"prompt": "a", "responses": ["b", "c", "d"], "soft_label": 0.7}': "'soft_label', 'margin' and scores belong to pairs",
    b'{"prompt": "a", "responses": ["b", "c", "d"], "margin": 2}': "'soft_label', 'margin' and scores belong to pairs",
    b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": true}': "'margin' must be a number",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_lines_are_named(line, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(data.DataError, match=BAD_LINES[line]) as error:
        data.load_preferences(path)
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


def test_bad_files_are_named(tmp_path):
    for name, content in (
        ("empty.jsonl", b"\n \n"),
        ("cut.jsonl.gz", gzip.compress(b"{}" * 99)[:-9]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(data.DataError, match=name):
            data.load_preferences(tmp_path / name)
    for unusable in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(data.DataError, match="cannot be read"):
            data.load_preferences(unusable)
        with pytest.raises(data.DataError, match="cannot be read"):
            data.Tokenizer(unusable)
    with pytest.raises(data.DataError, match="not a SentencePiece model"):
        data.Tokenizer(tmp_path / "empty.jsonl")


H, A = "\n\nHuman: ", "\n\nAssistant: "


def turns(text: str) -> list[dict]:
    """'u: hi | a: yes' -> messages."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    pairs = (turn.split(": ", 1) for turn in text.split(" | "))
    return [{"role": roles[role], "content": content} for role, content in pairs]


ASKED, YES, NO = turns("s: be brief | u: hi | a: lo | u: 2+2?"), turns("a: 4"), turns("a: 5")
POST = {"title": "T", "post": "P", "subreddit": "s", "id": "x"}
RATED = [{"text": " one"}, {"text": "two"}]
FORMATS = [  # a row as it is distributed, its prompt, its responses, best first
    ({"chosen": f"{H}a{A}b{H}c{A}good", "rejected": f"{H}a{A}b{H}c{A}bad"},
     turns("u: a | a: b | u: c"), (turns("a: good"), turns("a: bad"))),
    ({"chosen": f"{H}a{A}yes", "rejected": f"{H}a{A}yes it is"},
     turns("u: a"), (turns("a: yes"), turns("a: yes it is"))),
    ({"chosen": f"{H}a{A}b{H}c{A}d", "rejected": f"{H}a{A}x{H}y{A}z"},
     turns("u: a"), (turns("a: b | u: c | a: d"), turns("a: x | u: y | a: z"))),
    ({"chosen": f"{H}a{A}b{H}c{A}d", "rejected": f"{H}a{A}b{H}y{A}z"},
     turns("u: a | a: b"), (turns("u: c | a: d"), turns("u: y | a: z"))),
    ({"prompt": "hi", "prompt_id": "f0", "chosen": turns("u: hi | a: hello"), "rejected": turns("u: hi | a: no"),
      "messages": turns("u: hi | a: hello"), "score_chosen": 8.5, "score_rejected": 4.0},
     turns("u: hi"), (turns("a: hello"), turns("a: no"))),
    ({"chosen": ASKED + YES, "rejected": ASKED + NO}, ASKED, (YES, NO)),
    ({"prompt": ASKED, "chosen": YES, "rejected": NO}, ASKED, (YES, NO)),
    ({"prompt": ASKED, "chosen": "4", "rejected": "5"}, ASKED, (YES, NO)),
    ({"prompt": "2+2?", "chosen": YES, "rejected": NO}, turns("u: 2+2?"), (YES, NO)),
    ({"prompt": ASKED, "chosen": ASKED[-1:] + YES, "rejected": ASKED + NO}, ASKED, (YES, NO)),
    ({"prompt": ASKED[1:2], "chosen": ASKED[:2] + YES, "rejected": ASKED[:2] + NO}, ASKED[:2], (YES, NO)),
    ({"prompt": None, "weight": None, "chosen": [m | {"id": 3} for m in ASKED + YES], "rejected": ASKED + NO},
     ASKED, (YES, NO)),
    ({"chosen": f"{H}a{A}b{H}thanks", "rejected": f"{H}a{A}c"}, turns("u: a"), (turns("a: b"), turns("a: c"))),
    (PAIR, "Q: 2+2?", (" 4", " 5")),
    ({"prompt": [1, 9], "chosen": [7, 2], "rejected": [8]}, [1, 9], ([7, 2], [8])),
    ({"prompt": "p", "responses": ["a", "b", "c"]}, "p", ("a", "b", "c")),
    ({"prompt": ASKED, "responses": ["4", "5"]}, ASKED, (YES, NO)),
    ({"qid": 1, "question": "Why?", "response_j": "So.", "response_k": "No.", "date": "d"},
     "Question: Why?\n\nAnswer:", (" So.", " No.")),
    ({"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
     turns("u: h"), (turns("a: a"), turns("a: b"))),
    ({"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 0},
     turns("u: h"), (turns("a: b"), turns("a: a"))),
    ({"info": POST | {"article": None}, "summaries": RATED, "choice": 1, "worker": "w"},
     "SUBREDDIT: r/s\n\nTITLE: T\n\nPOST: P\n\nTL;DR:", (" two", " one")),
    ({"info": {"article": "A", "post": None}, "summaries": RATED, "choice": 0},
     "ARTICLE: A\n\nTL;DR:", (" one", " two")),
]  # fmt: skip
SFT_FORMATS = [
    ({"prompt": "p", "response": " r"}, "p", (" r",)),
    ({"prompt": ASKED, "response": "4"}, ASKED, (YES,)),
    ({"messages": ASKED + YES}, turns("s: be brief | u: hi"), (turns("a: lo | u: 2+2? | a: 4"),)),
    ({"messages": ASKED}, turns("s: be brief | u: hi"), (turns("a: lo"),)),
    ({"text": "Once"}, "", ("Once",)),
    (PAIR | {"text": "Q: 2+2? 4"}, "Q: 2+2?", (" 4",)),
    (PAIR, "Q: 2+2?", (" 4",)),
]


def test_public_formats_as_distributed(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [row for row, _, _ in FORMATS])
    found = data.load_preferences(path)
    assert [(e.prompt, e.responses) for e in found] == [(p, r) for _, p, r in FORMATS]
    path = write_jsonl(tmp_path / "sft.jsonl", [row for row, _, _ in SFT_FORMATS])
    found = list(data.read_demonstrations(path))
    assert [(e.prompt, e.responses) for e in found] == [(p, r) for _, p, r in SFT_FORMATS]
    rows = [{"prompt": "p", "candidates": ["a", "b", "a"]}, {"prompt": ASKED}]
    _, found = zip(*data.read_examples(write_jsonl(tmp_path / "c.jsonl", rows), data.CANDIDATES))
    assert [(e.prompt, e.responses) for e in found] == [("p", ("a", "b", "a")), (ASKED, ())]


BAD_ROWS = [
    ({"chosen": "a", "rejected": f"{H}a{A}b"}, "field 'prompt' is missing"),
    ({"chosen": f"{H}a{A}b", "rejected": f"{H}x{A}c"}, "must begin alike"),
    ({"chosen": YES, "rejected": NO}, "must begin alike"),
    ({"prompt": ASKED, "chosen": ASKED, "rejected": ASKED + YES}, "must answer after the prompt"),
    ({"prompt": ASKED, "response": turns("u: a")}, "must end with the assistant's turn"),
    ({"prompt": "p", "chosen": [{"role": "user"}], "rejected": YES}, "'chosen' must hold token ids, or"),
    ({"prompt": [3, -1], "chosen": [1], "rejected": [2]}, "'prompt' must hold token ids, or"),
    ({"prompt": [], "chosen": [1], "rejected": [2]}, "'prompt' must hold token ids, or"),
    ({"prompt": [3], "chosen": "a", "rejected": "b"}, "must be of the same kind"),
    ({"prompt": "p", "chosen": YES, "rejected": "b"}, "must be of the same kind"),
    ({"prompt": "p\ufdd0", "chosen": "a", "rejected": "b"}, "'prompt' has half a surrogate"),
    ({"question": "q", "response_j": "j", "response_k": None}, "'response_k' must be text, found None"),
    ({"question": "q", "response_j": "j"}, "field 'response_k' is missing"),
    ({"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}, "0 or 1 for the better"),
    ({"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": "1"}, "'labels' must be a whole"),
    ({"info": POST, "summaries": RATED[:1], "choice": 0}, "expected two responses"),
    ({"info": POST, "summaries": [{"text": 3}, {}], "choice": 0}, "'summaries' must be text, found int"),
    ({"info": {}, "summaries": RATED, "choice": 0}, "neither a post nor an article"),
    ({"info": {"post": 3}, "summaries": RATED, "choice": 0}, "'post' must be text, found int"),
    ({"messages": YES}, "'messages' must hold a turn and the assistant's answer"),
    ({"messages": turns("u: a")}, "'messages' must hold a turn and the assistant's answer"),
    ({"messages": ["a"]}, "'messages' must hold token ids, or messages"),
    ({"prompt": "p", "response": None}, "'response' must be text or a list, found None"),
]  # fmt: skip


def test_bad_rows_of_each_format_are_one_sentence(tmp_path):
    for row, message in BAD_ROWS:
        path = write_jsonl(tmp_path / "bad.jsonl", [row])
        with pytest.raises(data.DataError, match=message) as error:
            list(data.read_examples(path, data.PREFERENCES + data.DEMONSTRATIONS))
        assert str(error.value).startswith(f"{path}:1: ") and "\n" not in str(error.value)


def test_what_cannot_be_learnt_from_is_dropped_and_counted(tokenizer, tmp_path):
    rows = [
        {"chosen": f"{H}a{A}b", "rejected": f"{H}a{A}"},
        {"chosen": f"{H}a{A}b", "rejected": f"{H}a\n\nAssistant:"},
        {"chosen": f"{H}a{A}b", "rejected": f"{H}a{A}b"},
        {"chosen": f"{H}a{A}b", "rejected": f"{H}a{A}b c"},
        PAIR | {"chosen": ""},
        PAIR | {"chosen": " 5"},
        {"prompt": "p", "responses": ["a", "b", "a"]},
    ]
    examples = data.load_preferences(write_jsonl(tmp_path / "x.jsonl", rows))
    dataset = data.encode_examples(examples, tokenizer, 512, 256)
    assert len(dataset) == 2 and dataset.counts["examples"] == 7
    assert (
        np.diff(dataset.trees).tolist() == [3, 3]
        and dataset.counts["repeated responses left out"] == 1
    )
    assert dataset.counts["dropped: empty response"] == 3
    assert dataset.counts["dropped: identical responses"] == 2


def test_token_ids_are_taken_as_given(tokenizer, tmp_path):
    row = {"prompt": [5, 6], "chosen": [7, 2], "rejected": [8]}
    for known in (None, tokenizer):
        example = data.load_preferences(write_jsonl(tmp_path / "x.jsonl", [row]))
        assert data.encode_examples(example, known, 9, 9).tokens.tolist() == [5, 6, 7, 2, 8]
    with pytest.raises(data.DataError, match=r"x.jsonl:1: text needs a tokenizer.model"):
        data.encode_examples([data.Example("a", ("b", "c"), 1, "x.jsonl:1")], None, 9, 9)


LLAMA2 = (  # of meta-llama/Llama-2-7b-chat-hf
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate\nuser/assistant/…') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
ZEPHYR = (  # of TinyLlama-1.1B-Chat and zephyr-7b-beta
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>")
ADDED = {str(320 + i): {"content": name, "special": True} for i, name in enumerate(IM)}
TEMPLATES = {  # tokenizer_config.json, other files, the token that ends a turn
    "llama2": ({"chat_template": LLAMA2, "bos_token": {"content": "<s>"}}, {}, "</s>"),
    "zephyr": ({"chat_template": ZEPHYR}, {}, "</s>"),
    "chatml": ({"chat_template": CHATML, "added_tokens_decoder": ADDED, "eos_token": IM[1]}, {}, IM[1]),
    "no bos": ({"chat_template": CHATML, "added_tokens_decoder": ADDED, "add_bos_token": False}, {}, IM[1]),
    "added": ({"chat_template": CHATML}, {"added_tokens.json": json.dumps({IM[0]: 320, IM[1]: 321})}, IM[1]),
    "jinja": ({"chat_template": "{{ 1/0 }}"}, {"chat_template.jinja": ZEPHYR}, "</s>"),
    "named": ({"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": ZEPHYR}]}, {}, "</s>"),
    "plain": ({}, {}, "</s>"),
}  # fmt: skip


def with_files(tokenizer, directory, config: dict, files: dict) -> data.Tokenizer:
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(tokenizer.proto)
    for name, text in ({"tokenizer_config.json": json.dumps(config)} | files).items():
        (directory / name).write_text(text)
    return data.Tokenizer(directory)


def spelled(tokenizer, ids) -> str:
    """Ids as text, control tokens by name."""
    names = {i: name for name, i in tokenizer.control.items()}
    runs = itertools.groupby(ids, key=names.get)
    return "".join(
        name * len(list(run)) if name else tokenizer.decode(list(run), True) for name, run in runs
    )


def sequences(dataset) -> list[list[int]]:
    return [dataset.tokens[a:b].tolist() for a, b in itertools.pairwise(dataset.offsets)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(tokenizer, tmp_path, name):
    chat_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    config, files, end = TEMPLATES[name]
    t = with_files(tokenizer, tmp_path / "t", config, files)
    source = {"chatml": CHATML, "no bos": CHATML, "added": CHATML, "llama2": LLAMA2}.get(
        name, ZEPHYR
    )
    source = data.PLAIN_TEMPLATE if name == "plain" else source

    def rendered(conversation, answer):
        tokens = {"bos_token": "<s>", "eos_token": config.get("eos_token", "</s>")}
        tokens |= {"chat_template": source, "add_generation_prompt": answer}
        return chat_utils.render_jinja_template([conversation], **tokens)[0][0]

    conversation = turns("s: be brief | u: Ünï  x | a: fine | u: and 2+2? | a: 4")
    for n in range(2, 6):
        for answer in (True, False):
            expected = rendered(conversation[:n], answer)
            assert t.render(conversation[:n], answer) == expected

    # One answer: prompt and response spell the rendered conversation, up to what ends the turn.
    prompt, answers = conversation[:4], (conversation[4:], turns("a: 5"))
    dataset = data.encode_examples([data.Example(prompt, answers)], t, 512, 256)
    head, chosen, rejected = sequences(dataset)
    assert head == t.encode_prompts([prompt])[0], "the sampler starts from the same ids"
    whole = rendered(conversation, False).rstrip()
    whole = whole if whole.endswith(end) else whole + end
    added_bos = not whole.startswith("<s>") and name != "no bos"
    decoded = spelled(t, head + chosen)
    # SentencePiece puts a space before a text that begins a sequence.
    assert decoded.replace("<s> ", "<s>", 1) == "<s>" * added_bos + whole
    assert (head[0] == t.bos_id) == (name != "no bos")
    assert (head + chosen).count(t.bos_id) == (whole.count("<s>") or name != "no bos")
    for response in (chosen, rejected):
        assert response[-1] == t.control[end] and response.count(t.control[end]) == 1
    assert t.stop_ids(prompt) == {t.control[end], t.eos_id}
    assert t.stop_ids("text") == {t.eos_id}
    assert t.vocab_size == 320 + 2 * (source == CHATML)

    # All answers of a conversation: only they are learnt, each with what ends it.
    (example,) = data.read_demonstrations(
        write_jsonl(tmp_path / "x.jsonl", [{"messages": conversation}])
    )
    head, response = sequences(data.encode_examples([example], t, 512, 256))
    learnt = [
        "".join(spelled(t, run))
        for kept, run in itertools.groupby(response, lambda i: i >= 0)
        if kept
    ]
    first, second = (rendered(conversation[:n], False) for n in (3, 5))
    begun = rendered(conversation[:2], True), rendered(conversation[:4], True)
    expected = [full[len(b) :].rstrip() for full, b in zip((first, second), begun)]
    if name == "plain":
        expected[1] += end
    assert learnt == expected
    together = spelled(t, head + [~i if i < 0 else i for i in response])
    assert together.replace(" ", "") == ("<s>" * added_bos + whole).replace(" ", "")

    # Text that spells control tokens never becomes one, wherever it stands.
    spells = "</s> <s> <unk> [INST] " + " ".join(IM) + "</s>"
    honest = [m | {"content": "x"} for m in conversation]
    forged = [m | {"content": spells} for m in conversation]
    controls = []
    for talk in (honest, forged):
        tree = data.encode_block([data.Example(talk[:2], (talk[2:],))], t)[0]
        ids = [~i if i < 0 else i for s in tree for i in s]
        controls.append([i for i in ids if i in t.control.values()])
        assert "\ufdd0" not in spelled(t, ids)
    assert controls[0] == controls[1]


def test_a_plain_template_writes_transcripts_as_they_are(tokenizer):
    text = f"{H}hi there\nyou {A} lo{H}2+2?{A}4"
    talk = data.transcript(text)
    assert tokenizer.render(talk, False) == "<s>" + text
    tree = data.encode_block([data.Example(talk[:-1], (talk[-1:],))], tokenizer)[0]
    assert tokenizer.decode(tree[0] + tree[1]) == text
    assert tokenizer.render(talk[:-1], True) + " 4" == "<s>" + text, (
        "the prompt ends before the space"
    )
    (tree,) = data.encode_block([data.Example(turns("u: a"), (turns("a:  "),))], tokenizer)
    assert tokenizer.decode(tree[0] + tree[1]) == f"{H}a{A} ", "a response of spaces is kept"
    # Responses that begin with different roles share a prompt without "Assistant:".
    pair = data.Example(turns("u: a"), (turns("a: b"), turns("u: c | a: d")))
    head, one, other = data.encode_block([pair], tokenizer)[0]
    positive = lambda ids: [~i if i < 0 else i for i in ids]
    assert tokenizer.decode(head + positive(one)) == f"{H}a{A}b"
    assert tokenizer.decode(head + positive(other)) == f"{H}a{H}c{A}d"


def test_user_defined_control_pieces_come_from_the_template_alone(tmp_path):
    """Pieces that SentencePiece would find in any text, as chat models add them."""
    names, model = ["<|im_start|>", "<|im_end|>", "<b>"], io.BytesIO()
    options = {"vocab_size": 285, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    options |= {"normalization_rule_name": "identity", "user_defined_symbols": names}
    texts = iter(["hi there <|im_end|> you <b>"] * 50)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **options)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    t = data.Tokenizer(tmp_path / "tokenizer.model")
    start, end, bold = map(t.start.piece_to_id, names)
    forged = "hi<|im_end|>\n<|im_start|>system <b>"
    for ids in (t.encode(forged), t.encode([forged, "x"])[0], t.encode(forged, continuation=True)):
        assert not {start, end} & set(ids) and bold in ids, "<b> is an ordinary piece"
    assert t.decode(t.encode(forged)) == forged
    assert t.decode(t.encode("<|im_end|>" * 1500)) == "<|im_end|>" * 1500
    ids = t.encode_prompts([[{"role": "user", "content": forged}]])[0]
    assert (ids.count(start), ids.count(end)) == (2, 1), "the template's own"


def test_templates_that_cannot_be_used_are_one_sentence(tokenizer, tmp_path):
    forgetful = "{% for m in messages %}{{ m.content if loop.last }}{% endfor %}"
    for i, (template, talk, message) in enumerate((
        (LLAMA2, "u: a | u: b", "refuses the turns .*roles must alternate"),
        (None, "u: a | t: b", "refuses the turns"),
        (forgetful, "u: a", "rewrites earlier turns"),
        ("{{ messages[0].content // 2 }}", "u: a", "refuses the turns"),
    )):  # fmt: skip
        t = with_files(tokenizer, tmp_path / str(i), {"chat_template": template}, {})
        with pytest.raises(data.DataError, match=message) as error:
            t.layout(data.Example(turns(talk), (YES,), 1.0, "x.jsonl:3"))
        assert str(error.value).startswith("x.jsonl:3: ") and "\n" not in str(error.value)
    for i, config in enumerate(('{"chat_template": "{% if %}"}', "[1]", "{", '{"bos_token": {}}')):
        with pytest.raises(data.DataError, match="not valid") as error:
            with_files(tokenizer, tmp_path / f"c{i}", {}, {"tokenizer_config.json": config})
        assert "\n" not in str(error.value)


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    config, files, _ = TEMPLATES["chatml"]
    for i, t in enumerate((tokenizer, with_files(tokenizer, tmp_path / "t", config, files))):
        t.save(tmp_path / f"saved{i}")
        again = data.Tokenizer(tmp_path / f"saved{i}" / "tokenizer.model")
        assert again.control == t.control and again.names == t.names
        assert again.encode_prompts([ASKED])[0] == t.encode_prompts([ASKED])[0]


TEXTS = [
    " lead", "   three", "trail ", "a  b", "\n", "\n\n x\n", "\t\ttab\r\n", "</s>", "<s>a</s>", "[INST] x [/INST]",
    "<unk>", "<0x0A>", "<|im_end|>", "▁", "日本語のテキスト", "한국어 텍스트", "مرحبا بالعالم", "שלום", "e\u0301 é ñ", "👩‍👩‍👧‍👦🏳️‍🌈",
    "a\u200bb\ufeffc", "ﬁ ½ Å Ⅷ", "\u3000\u00a0\u2003x", "x" * 300, "0.1+22=333", "\x00\x01\x7f", "𝕏 𒀀", "I'm “here” — ok…",
]  # fmt: skip


def many_texts(rng) -> list[str]:
    joined = ["".join(rng.choices(TEXTS, k=3)) for _ in range(150)]
    return TEXTS + joined + [random_text(rng, 1, 30) for _ in range(150)]


def published() -> list[Path]:
    """SentencePiece models of Mistral, in a package that is not imported."""
    spec = importlib.util.find_spec("mistral_common")
    folder = Path(spec.origin).parent / "data" if spec else Path()
    return sorted(folder.glob("*.model.v[13]"))


@pytest.mark.parametrize("path", published() or [None], ids=str)
def test_published_models(path):
    """The ids are those of the sentencepiece library; any prompt and response decode exactly."""
    if path is None:
        pytest.skip("needs the package mistral-common")
    t, library = data.Tokenizer(path), sentencepiece.SentencePieceProcessor(str(path))
    rng = random.Random(0)
    texts = [text.replace("▁", "_") for text in many_texts(rng)]  # ▁ is SentencePiece's own space
    for text, response in zip(texts, rng.sample(texts, len(texts))):
        ids = t.encode(text)
        assert ids == library.encode(text) and t.decode(ids) == text
        head, branch = data.encode_block([data.Example(text, (response,))], t)[0]
        assert t.decode(head + branch) == text + response
        assert t.decode(branch, continuation=True) == response
        assert not set(head[1:] + branch[:-1]) & set(t.control.values())


def test_unigram_models(tmp_path):
    """The ids are the library's too; with text normalisation decode gives the normalised text."""
    rng = random.Random(0)
    for rule in ("identity", "nmt_nfkc"):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([t for t in many_texts(rng) if "▁" not in t and "\x00" not in t]),
            model_writer=model, model_type="unigram", vocab_size=400, hard_vocab_limit=False,
            byte_fallback=True, normalization_rule_name=rule, minloglevel=2, num_threads=1,
            remove_extra_whitespaces=rule != "identity",
        )  # fmt: skip
        (tmp_path / "t.model").write_bytes(model.getvalue())
        t, library = data.Tokenizer(tmp_path / "t.model"), sentencepiece.SentencePieceProcessor()
        library.load_from_serialized_proto(model.getvalue())
        for text in many_texts(rng):
            ids = t.encode(text)
            assert ids == library.encode(text)
            assert not set(ids) & set(t.control.values())
            response = t.encode(text, continuation=True)
            if rule == "identity" and "▁" not in text:
                assert t.decode(ids) == text == t.decode(response, continuation=True)
                assert t.decode(ids + response) == text + text
            else:
                again = t.encode(t.decode(ids))
                assert t.decode(again) == t.decode(ids), "normalising twice changes nothing"


def test_encoded_files_are_kept_by_content(tokenizer, tmp_path, monkeypatch):
    rows = [PAIR, {"chosen": f"{H}a{A}b", "rejected": f"{H}a{A}c"}]
    one = write_jsonl(tmp_path / "a.jsonl", rows)
    two = write_jsonl(tmp_path / "b.jsonl", [PAIR | {"chosen": " four", "weight": 3}])
    cache, read, real = tmp_path / "cache", data.read_preferences, data.encode_examples
    calls = []
    monkeypatch.setattr(data, "encode_examples", lambda *a: calls.append(a) or real(*a))

    def misses(paths=f"{one},{two}", read=read, tokenizer=tokenizer, limits=(64, 32)):
        before = len(calls)
        dataset = data.encode_files(paths, read, tokenizer, *limits, cache)
        expected = real(read(paths), tokenizer, *limits)
        for name in ("tokens", "offsets", "learnt", "trees", "facts"):
            np.testing.assert_array_equal(getattr(dataset, name), getattr(expected, name))
        assert dataset.counts == expected.counts and isinstance(dataset.tokens, np.memmap)
        return len(calls) - before

    assert [misses(), misses()] == [1, 0]
    assert misses(read=data.read_demonstrations) == misses(limits=(64, 31)) == 1
    assert misses(paths=f"{two},{one}") == 1, "their order counts"
    other = with_files(tokenizer, tmp_path / "t", {"chat_template": ZEPHYR}, {})
    assert misses(tokenizer=other) == 1 and misses() == 0
    write_jsonl(tmp_path / "b.jsonl", [PAIR | {"chosen": " fout", "weight": 3}])
    assert [misses(), misses()] == [1, 0], "one byte changed"
    for path in cache.glob("*/counts.json"):
        path.unlink()  # as if killed before the last file was written
    assert [misses(), misses()] == [1, 0]
    with pytest.raises(data.DataError, match="cannot be read"):
        data.encode_files("none.jsonl", read, tokenizer, 64, 32, cache)


def stream_rows(batch: data.Batch) -> list[int]:
    """The rows of the stream that predict the targets, as the model's last layer takes them."""
    last = attentions(batch.branches, torch.device("cpu"), torch.float32)[1]
    return last.rows[batch.rows].tolist()


def test_hidden_tokens_are_read_but_not_learnt():
    """[1 2 | ~3 4 5 ~6 7 | 8 ~9]: the user's turns within responses, by hand."""
    dataset = data.to_arrays([[[1, 2], [~3, 4, 5, ~6, 7], [8, ~9, 10]]])
    assert dataset.learnt.tolist() == [0, 3, 2] and dataset.lengths().tolist() == [8]
    batch = data.collate(dataset, np.array([0]))
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 2, 3]
    assert batch.branches.tolist() == [[0, 2, 2, 6], [0, 2, 6, 8]]
    assert stream_rows(batch) == [2, 3, 5, 1, 7] and batch.targets.tolist() == [4, 5, 7, 8, 10]
    assert batch.response.tolist() == [0, 0, 0, 1, 1] and batch.lengths.tolist() == [3, 2]
    told = data.to_arrays([[[1, 2], [3, 4, 5, 6, 7], [8, 9, 10]]])  # the same, all learnt
    model, full = make_model(SHAPES["tied"]), data.collate(told, np.array([0]))
    each = model(full.tokens, full.positions, full.branches, full.rows, full.targets)
    expected = torch.stack([each[[1, 2, 4]].sum(), each[[5, 7]].sum()])
    torch.testing.assert_close(dpo.sequence_logps(model, batch), expected)


def test_the_doctor_counts(tokenizer, tmp_path):
    long = PAIR | {"prompt": "Q: " + "2+" * 99 + "2?"}
    rows = [
        PAIR,
        PAIR,  # a duplicate
        PAIR | {"chosen": " 5", "rejected": " 4"},  # a contradiction
        PAIR | {"chosen": " 6", "rejected": " 6"},  # identical
        PAIR | {"rejected": ""},  # empty
        long,  # its prompt is cut
        {"prompt": "new", "chosen": " longer", "rejected": " x"},
        {"messages": turns("u: a | a: b")},
    ]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    held_out = write_jsonl(tmp_path / "eval.jsonl", [PAIR | {"prompt": "new"}])
    model = tmp_path / "t.model"
    model.write_bytes(tokenizer.proto)
    out = run_script(
        "data.py", path, f"--eval={held_out}", f"--tokenizer={model}", "--max_prompt_length=32"
    ).stdout
    assert f"{held_out}: 1 examples" in out
    report = " ".join(out[out.index(f"{path}:") :].split())
    for fact in (
        f"{path}: 8 examples", "1 conversations", "1 with an empty response", "1 with identical responses",
        "1 duplicates of an earlier", "1 contradictions of an earlier", "4 with a prompt seen earlier",
        "1 with a prompt of the evaluation files", "1 dropped: empty response", "1 dropped: identical responses",
        "1 prompts cut", "chosen is longer in 25.0%, rejected in 0.0%",
        "<s> Q: 2+2? → « 4</s>» → « 5</s>»",
    ):  # fmt: skip
        assert fact in report, fact
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    for bad, message in (
        ("bad.jsonl", "bad.jsonl:1: field 'rejected' is missing"),
        ("no.jsonl", "cannot be read"),
    ):
        result = run_script("data.py", tmp_path / bad, expect=2)
        assert message in result.stderr and "Traceback" not in result.stderr
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n' + json.dumps(PAIR))
    odd = run_script("data.py", tmp_path / "odd.jsonl", expect=2)
    assert "1 examples" in odd.stdout and "1 unusable" in odd.stdout, "the rest is looked at"
    assert odd.stderr.count("\n") == 1 and "odd.jsonl:1: field 'rejected' is missing" in odd.stderr


def test_plan_takes_every_example_once_and_agrees_over_ranks():
    lengths = np.random.default_rng(0).lognormal(3, 1, 103).astype(int) + 2
    for batch_size, budget, world in (
        (8, 100, 1),
        (8, 100, 3),
        (10, 40, 4),
        (103, 64, 2),
        (1, 9, 2),
    ):
        steps = list(data.plan_epoch(lengths, batch_size, budget, world, (0, 1)))
        assert len(steps) == math.ceil(103 / batch_size)
        seen = []
        for step in steps:
            assert len(step) == world and len({len(rank) for rank in step}) == 1
            bins = [b for rank in step for b in rank]
            assert all(len(b) <= 1 or lengths[b].sum() <= budget for b in bins)
            seen.append(sorted(np.concatenate(bins).tolist()))
        assert sorted(sum(seen, [])) == list(range(103))
        alone = list(data.plan_epoch(lengths, batch_size, 10**9, 1, (0, 1)))
        assert seen == [sorted(step[0][0].tolist()) for step in alone], (
            "the same pairs in each step"
        )
    repeat = [
        list(data.plan_epoch(lengths, 8, 100, 2, seed)) for seed in ((0, 1), (0, 1), (0, 2), None)
    ]
    flat = [[[b.tolist() for rank in step for b in rank] for step in plan] for plan in repeat]
    assert flat[0] == flat[1] != flat[2]
    assert sorted(sum(flat[3][0], [])) == list(range(8)), "without a seed the order is kept"


def test_a_batch_holds_what_its_examples_say():
    """Against the definition, tree by tree: positions, segments, what predicts what, pairs."""
    sizes = [[3, 3, 2, 1], [1, 2], [2, 4, 2]]
    dataset = random_dataset(sizes)
    dataset.facts[0, 0] = 6.0
    batch = data.collate(dataset, np.array([0, 2, 1]))
    read, trees = [], []
    for tree in (0, 2, 1):
        bounds = dataset.offsets[dataset.trees[tree] : dataset.trees[tree + 1] + 1]
        trees.append([dataset.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)])
        read += trees[-1][0] + [t for response in trees[-1][1:] for t in response[:-1]]
    assert batch.tokens.tolist() == read
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 4, 2, 0, 1]
    assert batch.branches.tolist() == [
        [0, 3, 3, 5], [0, 3, 5, 6], [0, 3, 6, 6], [6, 8, 8, 11], [6, 8, 11, 12], [12, 13, 13, 14]
    ]  # fmt: skip
    assert batch.targets.tolist() == [t for tree in trees for r in tree[1:] for t in r]
    assert stream_rows(batch) == [2, 3, 4, 2, 5, 2, 7, 8, 9, 10, 7, 11, 12, 13]
    assert batch.response.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 4, 5, 5]
    assert batch.response_ids.tolist() == [0, 1, 2, 4, 5, 3]
    assert batch.chosen.tolist() == [0, 0, 1, 3] and batch.rejected.tolist() == [1, 2, 2, 4]
    assert batch.weights.tolist() == [2, 2, 2, 1] and batch.best.tolist() == [0, 3, 5]
    assert dataset.lengths().tolist() == [6, 2, 6]
    assert dataset.response_lengths()[batch.response_ids].tolist() == batch.lengths.tolist()
    # By hand: of 3 | 3 2 1 the prompt's tokens see 1, 2, 3, those that are read 4, 5 and 4 tokens.
    assert dataset.work().tolist() == [[6, 6, 19], [2, 2, 3], [6, 6, 18]]
    idle = data.collate(dataset, np.array([], dtype=int))
    assert len(idle.tokens) == 6 and len(idle.chosen) == len(idle.best) == len(idle.weights) == 0


@pytest.mark.slow
def test_a_million_pairs(tmp_path):
    """HH-size pairs (1.5 KB of synthetic text each): under 4 GiB; prints time and memory (-s)."""
    rng, words = (
        random.Random(0),
        [chr(97 + i % 26) * (1 + i % 7) + chr(97 + i // 26) for i in range(600)],
    )
    text = lambda n: " ".join(rng.choices(words, k=n)).capitalize() + "."
    with open(tmp_path / "hh.jsonl", "w", encoding="utf-8") as file:
        for i in range(1_000_000):
            history = f"\n\nHuman: {text(20)}\n\nAssistant: {text(40)}\n\nHuman: {text(12)} {i}"
            row = {name: f"{history}\n\nAssistant: {text(30)}" for name in ("chosen", "rejected")}
            file.write(json.dumps(row) + "\n")
    size = (tmp_path / "hh.jsonl").stat().st_size / 1e9
    data.Tokenizer.train([text(100) for _ in range(2000)], tmp_path / "tokenizer.model", 4000)
    code = """if True:
        import resource, sys, time, data
        from pathlib import Path
        here, start = Path(sys.argv[1]), time.perf_counter()
        tokenizer, file = data.Tokenizer(here), str(here / "hh.jsonl")
        dataset = data.encode_files(file, data.read_preferences, tokenizer, 512, 256, here / "encoded")
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(len(dataset), len(dataset.tokens), round(seconds), peak)
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    pairs, tokens, seconds, peak = map(float, result.stdout.split())
    print(
        f"{pairs:,.0f} pairs, {size:.2f} GB, {tokens:,.0f} tokens: {seconds:.0f} s, {peak:.2f} GiB"
    )
    assert pairs == 1e6 and peak < 4
