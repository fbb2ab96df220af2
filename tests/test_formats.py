"""Public data as it is distributed: each format by its fields, and what is wrong in one sentence."""

import itertools
import json
import math

import numpy as np
import pytest
from conftest import sequences, turns, write_jsonl

import data
from extra import formats

PAIR = {"prompt": "Q: 2+2?", "chosen": " 4", "rejected": " 5"}
IDS = {"prompt": [5], "chosen": [6, 2], "rejected": [7, 2]}
H, A = "\n\nHuman: ", "\n\nAssistant: "


def read(tmp_path, *rows) -> list[data.Example]:
    return list(data.read_preferences(write_jsonl(tmp_path / "x.jsonl", rows)))


def encode(examples, tokenizer, max_length=512, max_prompt=256):
    return data.encode(examples, tokenizer, max_length, max_prompt)


def test_files_of_pairs_rankings_and_demonstrations(tmp_path):
    rows = [PAIR | {"weight": 2, "margin": 1.5}, {"prompt": "", "responses": ["a", "b", "c"]}, PAIR]
    weighted, ranking, plain = read(tmp_path, *rows)
    path = tmp_path / "x.jsonl"
    assert weighted == data.Example("Q: 2+2?", (" 4", " 5"), f"{path}:1", 2.0, 1.0, 1.5)
    assert ranking.responses == ("a", "b", "c") and ranking.where == f"{path}:2"
    assert plain[:5] == ("Q: 2+2?", (" 4", " 5"), f"{path}:3", 1.0, 1.0)
    assert repr(formats.parse(plain.where, PAIR, "preferences")) == repr(plain), "as data.plain"
    sft = write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "p", "response": "r", "weight": 3}, PAIR])
    found = list(data.read_examples(sft, "demonstrations"))
    assert [(e.responses, e.weight) for e in found] == [(("r",), 3.0), ((" 4",), 1.0)]


@pytest.mark.parametrize(("chosen", "rejected"), [
    ("yes", "yes, sure"), ("yes, sure", "yes"), ("yes", "yet"), ("yes", "no"), ("a", "b"), ("yes", ""), ("x", "x"),
])  # fmt: skip
def test_a_prompt_is_no_common_prefix(chosen, rejected, tokenizer, tmp_path):
    """Transcripts share turns, not letters: what both answers begin with stays in both answers;
    an empty or an identical pair is dropped and counted."""
    talk = "\n\nHuman: Is it?\n\nAssistant: "
    other = {"chosen": talk + "fine", "rejected": talk + "bad"}
    examples = read(tmp_path, {"chosen": talk + chosen, "rejected": talk + rejected}, other)
    assert examples[0].prompt == [{"role": "user", "content": "Is it?"}]
    assert [turns[0]["content"] for turns in examples[0].responses] == [chosen, rejected]
    dataset, counts = encode(examples, tokenizer, 99, 64)
    dropped = counts["dropped: empty response"] + counts["dropped: identical responses"]
    assert len(dataset) == 2 - dropped and dropped == (chosen == rejected or not rejected)
    if not dropped:
        prompt, *responses = sequences(dataset)[:3]
        texts = [tokenizer.decode(prompt + response) for response in responses]
        assert texts == [talk + chosen, talk + rejected]


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
    (PAIR | {"system": "", "tools": None}, "Q: 2+2?", (" 4", " 5")),
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
PROMPTS = [
    ({"prompt": "p", "candidates": ["a", "b", "a"]}, "p", ("a", "b", "a")),
    ({"prompt": "p", "candidates": ["a"], "response": "a"}, "p", ("a",)),
    ({"prompt": ASKED, "candidates": ["4", "5"]}, ASKED, (YES, NO)),
    ({"prompt": ASKED}, ASKED, ()),
    ({"prompt": "p"}, "p", ()),
    ({"prompt": [5, 6]}, [5, 6], ()),
]


def contents(examples) -> list[tuple]:
    return [(example.prompt, example.responses) for example in examples]


def test_public_formats_as_distributed(tmp_path):
    expected = [(p, r) for _, p, r in FORMATS]
    assert contents(read(tmp_path, *(row for row, _, _ in FORMATS))) == expected
    path = write_jsonl(tmp_path / "sft.jsonl", [row for row, _, _ in SFT_FORMATS])
    assert contents(data.read_examples(path, "demonstrations")) == [
        (p, r) for _, p, r in SFT_FORMATS
    ]


def test_a_prompt_can_be_taken_from_any_row():
    """Kind "prompts": what train.py takes, candidates, and prompts alone."""
    for row, prompt, responses in FORMATS + PROMPTS:
        example = formats.parse("x", row, "prompts")
        assert (example.prompt, example.responses) == (prompt, responses)
    for row, prompt, responses in SFT_FORMATS[:5]:
        example = formats.parse("x", row, "prompts")
        assert (example.prompt, example.responses) == (prompt, responses)


def test_the_three_readers_take_rows_of_either_file(tmp_path):
    """Through data.read_examples, plain rows and others, in one file."""
    rows = [PAIR, PROMPTS[0][0], {"prompt": "p"}, {"prompt": "p", "response": "r"}, FORMATS[0][0]]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    found = list(data.read_examples(path, "prompts"))
    responses = [(" 4", " 5"), ("a", "b", "a"), (), ("r",), FORMATS[0][2]]
    assert [e.responses for e in found] == responses
    assert [e.where for e in found] == [f"{path}:{n}" for n in range(1, 6)]
    with pytest.raises(data.DataError, match="x.jsonl:2: field 'response' is missing"):
        list(data.read_examples(path, "demonstrations"))


NO_NUMBER = (True, "1", math.inf, -math.inf, math.nan, 2e6, 10**400, [1])
BAD_ROWS = [
    ({"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
    ({"chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
    ({"chosen": "a", "rejected": f"{H}a{A}b"}, "field 'prompt' is missing"),
    ({"chosen": f"Once.{H}a{A}b", "rejected": f"Once.{H}a{A}c"}, "field 'prompt' is missing"),
    ({"prompt": "a", "chosen": 3, "rejected": "b"}, "'chosen' must be text or a list, found int"),
    ({"prompt": None, "chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
    ({"prompt": "a", "chosen": "\ud800", "rejected": "b"}, "'chosen' has half a surrogate pair"),
    ({"prompt": "a", "responses": ["b"]}, "two responses or more"),
    ({"prompt": "a", "responses": ["b", 4]}, "'response' must be text or a list, found int"),
    ({"prompt": "a", "responses": ["b", None]}, "'response' must be text or a list, found NoneType"),
    ({"prompt": "a", "responses": ["b", "c", "d"], "soft_label": 0.7}, "'soft_label', 'margin' and scores belong to pairs"),
    ({"prompt": "a", "responses": ["b", "c", "d"], "margin": 2}, "'soft_label', 'margin' and scores belong to pairs"),
    ({"prompt": "a", "responses": ["b", "c", "d"], "score_chosen": 2, "score_rejected": 1}, "and scores belong to pairs"),
    (PAIR | {"weight": -1}, "'weight' must be a number from 0 to 1e.06, found -1"),
    (PAIR | {"soft_label": 1.2}, "'soft_label' must be a number from 0 to 1, found 1.2"),
    *((PAIR | {name: value}, f"'{name}' must be a number from") for name in ("weight", "soft_label", "margin") for value in NO_NUMBER),
    *((PAIR | {"score_chosen": 1, "score_rejected": 1, name: value}, f"'{name}' must be a number from")
      for name in ("score_chosen", "score_rejected") for value in (math.inf, -math.inf, math.nan)),
    (PAIR | {"score_chosen": math.inf}, "'score_chosen' must be a number from"),
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
    ({"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": True}, "'labels' must be a whole number, found bool"),
    ({"info": POST, "summaries": RATED[:1], "choice": 0}, "expected two responses"),
    ({"info": POST, "summaries": [{"text": 3}, {}], "choice": 0}, "'summaries' must be text, found int"),
    ({"info": {}, "summaries": RATED, "choice": 0}, "neither a post nor an article"),
    ({"info": {"post": 3}, "summaries": RATED, "choice": 0}, "'post' must be text, found int"),
    ({"messages": YES}, "'messages' must hold a turn and the assistant's answer"),
    ({"messages": turns("u: a")}, "'messages' must hold a turn and the assistant's answer"),
    ({"messages": turns("a: b | u: c | a: d")}, "'messages' must hold a turn and the assistant's answer"),
    ({"messages": ["a"]}, "'messages' must hold token ids, or messages"),
    ({"prompt": "p", "response": None}, "'response' must be text or a list, found None"),
    (PAIR | {"system": "be brief"}, "'system' is not supported: write it into the prompt"),
    ({"messages": ASKED, "tools": [{"name": "add"}]}, "'tools' is not supported"),
    ({"messages": [ASKED[1], ASKED[2] | {"tool_calls": [{}]}]}, "'tool_calls' and 'weight' are not supported"),
    ({"messages": [ASKED[1], ASKED[2] | {"weight": 0}]}, "'tool_calls' and 'weight' are not supported"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["preferences", "demonstrations", "training", "prompts"])
def test_bad_rows_of_each_format_are_one_sentence(kind):
    """Named by file and line; by the same words in every kind that takes the format."""
    for row, message in BAD_ROWS:
        if kind == "preferences" and {"messages", "response"} & row.keys():
            continue
        if kind == "prompts" and row.keys() == {"prompt", "chosen"}:
            continue  # a prompt alone, with a field that nobody asks for
        if kind == "prompts" and row.keys() == {"prompt", "response"} and row["response"] is None:
            message = "'response' must be text or a list, found None"
        with pytest.raises(data.DataError, match=message) as error:
            formats.parse("f.jsonl:7", row, kind)
        assert str(error.value).startswith("f.jsonl:7: ") and "\n" not in str(error.value)


def test_unknown_rows_name_the_formats(tmp_path):
    for kind, first in (("preferences", "question"), ("demonstrations", "prompt, response")):
        row = {"instruction": "a", "output": "b"}
        expected = f"has the fields instruction, output; expected those of a format: {first}"
        with pytest.raises(data.DataError, match=expected):
            formats.parse("x", row, kind)
    with pytest.raises(data.DataError, match="^x: has the fields a b; expected"):
        formats.parse("x", {"a\nb": 1}, "preferences")
    path = write_jsonl(tmp_path / "bad.jsonl", [PAIR, {"text": "a"}])
    with pytest.raises(data.DataError, match="has the fields text; expected") as error:
        list(data.read_preferences(path))
    assert str(error.value).startswith(f"{path}:2: ")
    (tmp_path / "bad.jsonl").write_text(json.dumps(PAIR)[:-1] + ', "weight": NaN}')
    with pytest.raises(data.DataError, match="bad.jsonl:1: field 'weight' .* found nan"):
        list(data.read_preferences(path))


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
    dataset, counts = encode(read(tmp_path, *rows), tokenizer)
    assert len(dataset) == 2 and counts["examples"] == 7
    assert np.diff(dataset.trees).tolist() == [3, 3]
    assert counts["repeated responses left out"] == 1
    assert counts["dropped: empty response"] == 3
    assert counts["dropped: identical responses"] == 2


def test_token_ids_are_taken_as_given(tokenizer, tmp_path):
    row = {"prompt": [5, 6], "chosen": [7, 2], "rejected": [8]}
    for known in (None, tokenizer):
        dataset, _ = encode(read(tmp_path, row), known, 9, 9)
        assert dataset.tokens.tolist() == [5, 6, 7, 2, 8]


def test_kinds_hold_each_format_once():
    for kind, known in formats.KINDS.items():
        readers = [reader for _, reader in known]
        assert len(set(readers)) == len(readers), kind
    longest = formats.KINDS["prompts"]
    every = itertools.chain.from_iterable(formats.KINDS.values())
    assert {reader for _, reader in every} == {reader for _, reader in longest}
