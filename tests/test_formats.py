"""Public data as it is distributed: each format by its fields, and what is wrong in one sentence."""

import gzip
import json
import math

import numpy as np
import pytest
from conftest import run_here, sequences, turns, write_jsonl

import data
from extra import conversations, formats, public

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
    said = [turns[0]["content"] if turns else "" for turns in examples[0].responses]
    assert said == [chosen, rejected]
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
    (PAIR | {"system": None, "tools": None}, "Q: 2+2?", (" 4", " 5")),
    (PAIR | {"system": "", "tools": []}, turns("u: Q: 2+2?"), (turns("a:  4"), turns("a:  5"))),
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
    ({"chosen": f"Be kind.{H}a{A}b", "rejected": f"Be kind.{H}a{A}c"}, turns("s: Be kind. | u: a"), (turns("a: b"), turns("a: c"))),
    ({"chosen": f"Human: a{A}b", "rejected": f"Human: a{A}c"}, turns("u: a"), (turns("a: b"), turns("a: c"))),
]  # fmt: skip
SFT_FORMATS = [
    ({"prompt": "p", "response": " r"}, "p", (" r",)),
    ({"prompt": ASKED, "response": "4"}, ASKED, (YES,)),
    ({"messages": ASKED + YES}, turns("s: be brief | u: hi"), (turns("a: lo | u: 2+2? | a: 4"),)),
    ({"messages": ASKED}, turns("s: be brief | u: hi"), (turns("a: lo"),)),
    ({"prompt": "p", "completion": " r"}, "p", (" r",)),
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
    for row, prompt, responses in SFT_FORMATS[:6]:
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
    with pytest.raises(data.DataError, match="x.jsonl:2: has the fields prompt, candidates; expec"):
        list(data.read_examples(path, "demonstrations"))


NO_NUMBER = (True, "1", math.inf, -math.inf, math.nan, 2e6, 10**400, [1])
BAD_ROWS = [
    ({"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
    ({"chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
    ({"chosen": "a", "rejected": f"{H}a{A}b"}, "field 'prompt' is missing"),
    ({"chosen": f"Once.{A}b", "rejected": f"Once.{A}c"}, "field 'prompt' is missing"),
    ({"prompt": "a", "chosen": 3, "rejected": "b"}, "'chosen' must be text or a list, found int"),
    ({"prompt": None, "chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
    ({"prompt": "a", "chosen": "\ud800", "rejected": "b"}, "'chosen' has half a surrogate pair"),
    (PAIR | {"rejected": "x\ufdd1"}, "'rejected' has half a surrogate pair, or U.FDD0 or U.FDD1"),
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
    (PAIR | {"tools": [{"name": "add"}]}, "'tools' belongs to a conversation"),
    (PAIR | {"documents": [{"text": "d"}]}, "'documents' belongs to a conversation"),
    (PAIR | {"system": 3}, "'system' must be text, found int"),
    (PAIR | {"prompt": "", "system": "be brief"}, "'system' belongs to a conversation, or to a prompt of text"),
    (IDS | {"system": "be brief"}, "'system' belongs to a conversation, or to a prompt of text"),
    (PAIR | {"images": ["x.png"]}, "'images' is not supported"),
    (PAIR | {"context": "of this"}, "'context' is not supported"),
    (PAIR | {"history": [["q"]]}, "'history' must hold pairs of texts"),
    ({"prompt": ASKED, "chosen": YES, "rejected": NO, "system": "another"}, "another system message"),
    ({"prompt": ASKED, "chosen": YES, "rejected": NO, "tools": "[{]"}, "'tools' holds no valid JSON"),
    ({"prompt": ASKED, "chosen": YES, "rejected": NO, "tools": "{}}"}, "'tools' holds no valid JSON"),
    ({"prompt": ASKED, "chosen": YES, "rejected": NO, "tools": {"name": "add"}}, "'tools' must be a list, found dict"),
    ({"prompt": ASKED, "chosen": YES, "rejected": NO, "tools": ["add"]}, "'tools' must be a list of objects"),
    ({"prompt": ASKED, "chosen": YES, "rejected": [NO[0] | {"x": json.loads('{"a":' * 900 + "1" + "}" * 900)}]}, "is nested too deeply"),
    ({}, "has the fields none; expected those of a format"),
    ({"prompt": ASKED, "chosen": YES, "rejected": NO, "chat_template_kwargs": {"messages": []}}, "must leave the messages"),
    ({"prompt": [{"role": "narrator", "content": "x"}], "chosen": YES, "rejected": NO}, "message of role 'narrator': known are system"),
    ({"prompt": [{"role": "user", "content": 3}], "chosen": YES, "rejected": NO}, "content is int, not text"),
    ({"prompt": [{"role": "user", "content": [{"type": "image_url"}]}], "chosen": YES, "rejected": NO}, "part of type 'image_url', not text"),
    ({"prompt": [{"role": "user", "content": None}], "chosen": YES, "rejected": NO}, "'prompt' must hold token ids, or"),
    ({"prompt": [ASKED[1] | {"name": "x\ud800"}], "chosen": YES, "rejected": NO}, "'prompt' has half a surrogate pair"),
    ({"prompt": "p", "chosen": [YES[0] | {"weight": 0.5}], "rejected": NO}, "message of weight 0.5: 0 or 1"),
    ({"prompt": "p", "chosen": [YES[0] | {"train": "no"}], "rejected": NO}, "'train' is neither true nor false"),
    ({"prompt": "p", "chosen": [YES[0] | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "rejected": NO},
     "'arguments' holds no valid JSON"),
    ({"prompt": "p", "chosen": [YES[0] | {"tool_calls": [{"function": "f"}]}], "rejected": NO}, "no functions with a name"),
    ({"chosen": [ASKED[1] | {"mood": "x"}, *YES, ASKED[1], *YES], "rejected": [ASKED[1], *NO, ASKED[1], *NO]}, "must begin alike"),
    ({"chosen": [*ASKED[:2], ASKED[1] | {"mood": 1}, *YES], "rejected": [*ASKED[:2], ASKED[1] | {"mood": 2}, *NO]},
     "differ in a message's 'mood' alone"),
    ({"prompt": "a", "responses": ["b", "c"], "scores": [1]}, "'scores' must have a number for each"),
    ({"prompt": "a", "answers": [{"answer": "b", "rank": 1}, {"answer": "c"}]}, "'rank' must have a number for each"),
    ({"prompt": "a", "answers": [{"answer": "b", "rank": 1}, {"rank": 2}]}, "'response' must be text or a list, found None"),
    ({"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": -1}, "0 or 1 for the better"),
    ({"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": "2"}, "'preference_strength' must be a number"),
    ({"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": None}, "'preference_strength' must be given"),
    ({"question": {"id": 1}, "answer_0": "a", "answer_1": "b", "score_0": 0, "score_1": 1}, "'question.full_text' must be text"),
    ({"question": {"full_text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": 0, "score_1": math.nan}, "'score_1' must be a number"),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "winner_model_a": 1, "winner_model_b": 1}, "winner_tie must be 1, the others 0"),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "winner_model_a": 0, "winner_model_b": 0}, "winner_tie must be 1, the others 0"),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "winner": "a"}, "'winner' must be model_a, model_b or tie, found a"),
    ({"prompt": '["p", "q"]', "response_a": '["a", "c"]', "response_b": '["b"]', "winner": "model_a"}, "must have as many turns"),
    ({"prompt": "p", "response_a": 3, "response_b": "b", "winner": "model_a"}, "'response_a' must be a list, found int"),
    ({"input": {"prompt": "x"}, "preferred_output": YES, "non_preferred_output": NO}, "'input.messages' must be a list, found None"),
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
    """And their own fields, whose names may be anything, and many."""
    for kind, first in (("preferences", "question"), ("demonstrations", "prompt, response")):
        for names in (["ask", "output"], ["prompt", "reply"], ["chosen", "ask"]):
            expected = f"^x: has the fields {', '.join(names)}; expected those of a format: {first}"
            with pytest.raises(data.DataError, match=expected):
                formats.parse("x", dict.fromkeys(names, "a"), kind)
    with pytest.raises(data.DataError, match="^x: has the fields a b; expected"):
        formats.parse("x", {"a\nb": 1}, "preferences")
    with pytest.raises(
        data.DataError, match="transcripts .* has the fields ask, chosen, rejected;"
    ):
        formats.parse("x", {"ask": "q", "chosen": "a", "rejected": "b"}, "preferences")
    for row in ({f"field {n}": 1 for n in range(500)}, {"y" * 10**6: 1}):
        with pytest.raises(data.DataError, match="has the fields .*; expected") as error:
            formats.parse("x", row, "training")
        assert len(str(error.value)) < 4000
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
        fields = [frozenset(fields) for fields, _ in known]
        assert len(set(fields)) == len(fields), kind
    every = {frozenset(f) for known in formats.KINDS.values() for f, _ in known}
    assert every - {frozenset(f) for f, _ in formats.KINDS["prompts"]} == {
        frozenset(public.KTO[0][0])
    }


# Data sets under their own names for things: rows of our own writing with their fields

USER = turns("u: Name a fruit")
GOOD, BAD = turns("a: Apple"), turns("a: Brick")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"town": "Oslo"}},
}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
WRITTEN = {**CALL, "function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}
TEXTS = {"chosen": "Apple", "rejected": "Brick"}
ARENA = {"prompt": '["Name a fruit"]', "response_a": '["Apple"]', "response_b": '["Brick"]'}
FLAGS = {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 0}
TALKS = {"conversation_a": USER + GOOD, "conversation_b": USER + BAD}
SAFE = {
    "prompt": "Name a fruit",
    "response_0": "Brick",
    "response_1": "Apple",
    "safer_response_id": 0,
}
STEER = {"prompt": "Name a fruit", "response_1": "Brick", "response_2": "Apple"}
WEBGPT = {
    "question": {"full_text": "Name a fruit", "id": "1"},
    "answer_0": "Brick",
    "answer_1": "Apple",
    "tokens_0": {},
}
SHARE = [{"from": "human", "value": "Name a fruit"}]
ANSWERS = [
    {"answer": "Brick", "model": "m", "rank": 2.0},
    {"answer": "Apple", "model": "n", "rank": 1.0},
]


def parts(text: str) -> list[dict]:
    return [{"type": "text", "text": text, "image": None, "mimeType": None}]


PAIRED = [  # read as the user's question, Apple before Brick; with this margin
    ({"system": None, "question": "Name a fruit", **TEXTS}, None),
    ({"input": "Name a fruit", "generations": ["Apple", "Brick"], "rating": [9.0, 2.0], "order": ["A", "B"], **TEXTS}, None),
    ({"instruction": "Name a fruit", "input": "", **TEXTS}, None),
    ({"instruction": "Name a fruit", "chosen_response": "Apple", "rejected_response": "Brick", "chosen_rating": 5}, None),
    ({"instruction": "Name", "prompt": "Name a fruit", "chosen": USER + GOOD, "rejected": USER + BAD}, None),
    ({"prompt": "Name it", "conversation": [{"input": "Name a fruit", "output": "Apple"}], "rating_chosen": 4,
      "chosen": USER + GOOD, "rejected": USER + BAD}, None),
    ({"dataset": "own", "chosen": USER + GOOD, "rejected": USER + BAD, "chosen_rating": 5.0}, None),
    ({"prompt": "Name a fruit", "prompt_id": "x", "messages": USER + GOOD, "chosen": USER + GOOD, "rejected": USER + BAD,
      "score_chosen": 8.0, "score_rejected": 8.0}, 0.0),
    ({"messages": USER, "chosen": GOOD, "rejected": BAD}, None),
    ({"messages": USER, "chosen": GOOD[0], "rejected": BAD[0]}, None),
    ({"messages": USER, **TEXTS}, None),
    ({"messages": USER + GOOD, "chosen": GOOD, "rejected": BAD}, None),
    ({"messages": USER + GOOD, "chosen": USER + GOOD, "rejected": USER + BAD}, None),
    ({"conversation": USER, "chosen": GOOD[0], "rejected": BAD[0]}, None),
    ({"conversations": SHARE, "chosen": {"from": "gpt", "value": "Apple"}, "rejected": {"from": "gpt", "value": "Brick"}}, None),
    ({"input": {"messages": USER, "tools": []}, "preferred_output": GOOD, "non_preferred_output": BAD}, None),
    ({"messages": USER + GOOD, "rejected_response": "Brick"}, None),
    ({"messages": USER + GOOD, "rejected_messages": USER + BAD}, None),
    ({"query": "Name a fruit", "response": "Apple", "rejected_response": "Brick"}, None),
    (SAFE | {"better_response_id": 1, "is_response_0_safe": True, "is_response_1_safe": False}, None),
    (STEER | {"preference_strength": 2, "preference_statement": "x"}, 2.0),
    (STEER | {"preference_strength": -1, "response_1": "Apple", "response_2": "Brick"}, 1.0),
    ({"context": USER, "response1": "Brick", "response2": "Apple", "overall_preference": 3, "individual_preference": [{}]}, 3.0),
    (WEBGPT | {"score_0": -0.5, "score_1": 0.25}, 0.75),
    (ARENA | FLAGS | {"winner_model_a": 1, "model_a": "x", "id": 7}, None),
    (ARENA | FLAGS | {"winner_model_b": 1, "response_a": '["Brick"]', "response_b": '["Apple"]'}, None),
    (ARENA | {"prompt": "Name a fruit", "response_a": "Apple", "response_b": ["Brick"], "winner": "model_a"}, None),
    (TALKS | {"winner": "model_a", "judge": "j", "turn": 1}, None),
    ({"conversation_a": json.dumps(USER + BAD), "conversation_b": json.dumps(USER + GOOD), "winner": "model_b"}, None),
    ({"conversation_a": [{"role": "user", "content": parts("Name a fruit")}, {"role": "assistant", "content": parts("Apple"), "num_tokens": 1}],
      "conversation_b": USER + BAD, "winner": "model_a", "full_conversation": [{"user": {}}]}, None),
    ({"prompt": f"{H}Name a fruit{A}", "answers": ANSWERS, "turns": 1, "good_natured": True}, None),
    ({"prompt": USER, "answers": ANSWERS}, None),
    ({"instruction": "Name a fruit", "generations": ["Brick", "Apple"], "ratings": [1, 4]}, None),
    ({"prompt": USER, "responses": ["Brick", "Apple"], "scores": [-2, 0.5]}, None),
    ({"prompt": f"{H}Name a fruit\n\nAssistant:", "chosen": f"{H}Name a fruit{A}Apple", "rejected": f"{H}Name a fruit{A}Brick"}, None),
    ({"prompt": "Name a fruit", "chosen": f"{H}Name a fruit{A}Apple", "rejected": f"{H}Name a fruit{A}Brick"}, None),
    ({"chosen": [{"role": "Human", "content": "Name a fruit"}, {"role": "Assistant", "content": "Apple"}],
      "rejected": [{"from": "prompter", "value": "Name a fruit"}, {"from": "gpt", "value": "Brick"}]}, None),
    ({"prompt": [{"role": "user", "content": parts("Name a fruit")}], "chosen": GOOD, "rejected": BAD}, None),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["preferences", "demonstrations", "training", "prompts"])
def test_data_sets_by_their_own_names_for_things(kind):
    """And with a system message, a weight and tools beside them, whatever the format is."""
    for row, margin in PAIRED:
        e = formats.parse("x:1", row, kind)
        answers = (GOOD,) if kind == "demonstrations" else (GOOD, BAD)
        alone = kind == "demonstrations" and (  # for SFT they have other fields that come first
            "query" in row or row.get("messages") == USER + GOOD
        )
        assert (e.prompt, e.responses) == (USER, answers), row
        assert (e.where, e.weight, e.label, e.context, e.notes) == ("x:1", 1.0, 1.0, None, ()), row
        if kind != "demonstrations":
            assert e.margin == margin or (margin is None and math.isnan(e.margin)), (row, e.margin)
        more = {"system": "Be brief.", "weight": 2, "tools": json.dumps([TOOL])}
        more |= {} if alone else {"soft_label": 0.75}
        e = formats.parse("x:1", row | more, kind)
        assert e.prompt == turns("s: Be brief.") + USER and e.responses == answers, row
        assert (e.weight, e.context) == (2.0, {"tools": [TOOL]}), row
        assert e.label == 0.75 or alone


SFT_PAIRED = [
    {"instruction": "Name a fruit", "input": "", "output": "Apple", "text": "Below is …"},
    {"instruction": "Name a fruit", "context": "", "response": "Apple", "category": "open_qa"},
    {"system_prompt": None, "question": "Name a fruit", "response": "Apple"},
    {"question": "Name a fruit", "answer": "Apple"},
    {"query": "Name a fruit", "response": "Apple", "history": []},
    {"conversations": [*SHARE, {"from": "gpt", "value": "Apple"}]},
    {"conversation": USER + GOOD},
    {"prompt": USER, "completion": GOOD},
    {"prompt": USER, "completion": "Apple"},
    {"prompt": "Name a fruit", "completion": GOOD},
    {"prompt": USER, "response": GOOD[0]},
]


def test_demonstrations_by_their_own_names_for_things():
    for row in SFT_PAIRED:
        for kind in ("demonstrations", "training", "prompts"):
            e = formats.parse("x", row, kind)
            assert (e.prompt, e.responses, e.weight) == (USER, (GOOD,), 1.0), (kind, row)


def test_what_stands_before_a_question():
    """Alpaca's input and history, system messages of either name, one that is there already."""
    row = {"instruction": "Name one", "input": "a fruit", "history": [["hi", "lo"], ["a", "b"]]}
    row |= {"system_prompt": "Be brief."} | TEXTS
    before = turns("s: Be brief. | u: hi | a: lo | u: a | a: b | u: Name one\na fruit")
    for kind in ("preferences", "demonstrations"):
        assert formats.parse("x", row, kind).prompt == before
    e = formats.parse("x", {"prompt": "p", "response": "r", "history": [["hi", "lo"]]}, "training")
    assert (e.prompt, e.responses) == (turns("u: hi | a: lo | u: p"), (turns("a: r"),))
    for system in ("be brief", "", None):
        row = {"prompt": ASKED, "chosen": YES, "rejected": NO, "system": system}
        assert formats.parse("x", row, "preferences").prompt == ASKED, "there once"
    row |= {"system": "be brief", "history": [["x", "y"]]}
    expected = [ASKED[0], *turns("u: x | a: y"), *ASKED[1:]]
    assert formats.parse("x", row, "preferences").prompt == expected
    lighthouse = {"id": "a1", "source": "own", "system": "You are Bo.", "prompt": "Who are you?"}
    e = formats.parse("x", lighthouse | {"chosen": "Bo.", "rejected": "A model."}, "preferences")
    assert e.prompt == turns("s: You are Bo. | u: Who are you?")
    assert e.responses == (turns("a: Bo."), turns("a: A model."))
    steered = STEER | {"preference_strength": 1}
    steered["prompt"] = "hi\n<extra_id_1>Assistant\nlo\n<extra_id_1>User\nName\na fruit"
    e = formats.parse("x", steered, "preferences")
    assert e.prompt == turns("u: hi | a: lo | u: Name\na fruit")


def test_arena_of_several_turns():
    row = {"prompt": '["a", "b"]', "response_a": '["1", "2"]', "response_b": '["3", null]'}
    e = formats.parse("x", row | FLAGS | {"winner_model_b": 1}, "preferences")
    assert e.prompt == turns("u: a")
    assert e.responses == ([], turns("a: 1 | u: b | a: 2")), "an answer that says nothing is none"
    row["response_b"] = '[null, "3"]'
    e = formats.parse("x", row | FLAGS | {"winner_model_b": 1}, "preferences")
    silent = turns("a: ")[0] | {"train": False}
    assert e.responses[0] == [silent, *turns("u: b | a: 3")], "before others it is not learnt"
    row = {"prompt": "[a", "response_a": "[b", "response_b": "[c]", "winner": "model_a"}
    assert formats.parse("x", row, "preferences").responses == (turns("a: [b"), turns("a: [c]"))


TIES = [
    STEER | {"preference_strength": 0},
    WEBGPT | {"score_0": 0.5, "score_1": 0.5},
    ARENA | FLAGS | {"winner_tie": 1},
    *(TALKS | {"winner": name} for name in ("tie", "tie (bothbad)", "both_bad")),
    {"prompt": USER, "answers": [answer | {"rank": 1} for answer in ANSWERS]},
    {"prompt": USER, "responses": ["Apple", "Brick"], "scores": [2, 2]},
]


def test_ties_are_left_out_and_counted(tokenizer, tmp_path):
    """Where the data says that neither is better; with a soft_label in the row they are learnt."""
    pair = {"prompt": USER, "chosen": GOOD, "rejected": BAD, "margin": 0}
    path = write_jsonl(tmp_path / "x.jsonl", [*TIES, pair])
    for kind in ("preferences", "demonstrations"):
        examples = list(data.read_examples(path, kind))
        assert [e.responses for e in examples[:-1]] == [()] * len(TIES)
        dataset, counts = encode(examples, tokenizer)
        assert len(dataset) == 1, "a margin of 0 is no tie: chosen is chosen"
        assert +counts == {"examples": len(TIES) + 1, "dropped: tie": len(TIES)}
        examples = list(data.read_examples(path, "prompts"))
    for e in examples[:-1]:
        assert len(e.responses) == 2 and e.label == 0.5, "a prompt has its answers, whoever won"
    soft = write_jsonl(tmp_path / "soft.jsonl", [tie | {"soft_label": 0.5} for tie in TIES])
    dataset, counts = encode(data.read_preferences(soft), tokenizer)
    assert +counts == {"examples": len(TIES)} and dataset.facts[:, 1].tolist() == [0.5] * len(TIES)
    out = run_here(
        "train.py", f"--data={path}", f"--out_dir={tmp_path / 'out'}", "--max_steps=1",
        "--hidden_size=32", "--num_heads=2", "--num_layers=1", "--vocab_size=300",
    ).stdout  # fmt: skip
    assert f"pairs: {len(TIES) + 1} examples, {len(TIES)} dropped: tie in" in out
    assert f" {len(TIES)} ties, left out\n" in run_here("extra/doctor.py", path).stdout


def test_rankings_hold_no_equals():
    """Of equal ranks the first is kept, the others are counted."""
    ranks = [3, 1, 2, 1, 3]
    answers = [{"answer": f"{n}", "rank": rank} for n, rank in enumerate(ranks)]
    e = formats.parse("x", {"prompt": USER, "answers": answers}, "preferences")
    assert [response[0]["content"] for response in e.responses] == ["1", "2", "0"]
    assert e.notes == (public.OF_EQUAL_RANK,) * 2
    row = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 2]}
    assert formats.parse("x", row, "preferences")[:2] == ("p", ("b", "c", "a"))


def test_repeated_prompts_are_taken_out_and_counted(tokenizer, tmp_path):
    repeated = {"prompt": "Q: fruit?", "chosen": "Q: fruit? Apple", "rejected": "Q: fruit?\nBrick"}
    once = [
        repeated | {"chosen": "Apple"},  # one alone may begin so by chance
        {"prompt": "the", "chosen": "the film", "rejected": "thesis"},  # a word that begins so
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"prompt": " ", "chosen": " a", "rejected": " b"},
        {"prompt": "Q: fruit?", "chosen": f" Apple{H}x{A}y", "rejected": f" Brick{H}x{A}y"},
        {"prompt": "Q: fruit?", "chosen": f"{H}x{A}y", "rejected": f"{H}x{A}z"},
    ]
    three = {"prompt": "p:", "responses": ["p: a", "p: b", "p: c"]}
    path = write_jsonl(tmp_path / "x.jsonl", [repeated, three, *once])
    examples = list(data.read_preferences(path))
    assert examples[0][:2] == ("Q: fruit?", (" Apple", "\nBrick"))
    assert examples[1][:2] == ("p:", (" a", " b", " c"))
    for e, row in zip(examples[2:], once):
        assert e[:2] == (row["prompt"], (row["chosen"], row["rejected"])) and e.notes == ()
    counts = encode(examples, tokenizer)[1]
    assert +counts == {"examples": 8, public.REPEATED: 2}
    assert data.plain("x", repeated, "preferences") is None, "the spine asks the room"
    sft = {"prompt": "The", "response": "The end"}
    assert formats.parse("x", sft, "demonstrations").responses == ("The end",)


def test_messages_keep_what_a_template_may_read():
    """Calls of tools with their arguments as objects, names, reasoning; nulls are absent."""
    chosen = [
        {"role": "assistant", "content": None, "tool_calls": [WRITTEN], "refusal": None, "id": 5},
        {"role": "function", "name": "weather", "content": "rain", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It rains.", "reasoning_content": "so", "tool_calls": []},
    ]
    row = {"prompt": turns("u: Weather?"), "chosen": chosen, "rejected": turns("a: No idea.")}
    e = formats.parse("x", row | {"tools": [TOOL], "documents": [{"text": "d"}]}, "preferences")
    assert e.responses[0] == [
        CALLED,
        {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It rains.", "reasoning_content": "so"},
    ]
    assert e.context == {"tools": [TOOL], "documents": [{"text": "d"}]}
    legacy = {"role": "assistant", "content": None, "function_call": WRITTEN["function"]}
    [turn] = formats.parse("x", row | {"chosen": [legacy]}, "preferences").responses[0]
    assert turn["tool_calls"] == [{"type": "function", "function": CALL["function"]}]
    assert not conversations.said_nothing([turn])
    share = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
    ]
    share += [{"from": "observation", "value": "rain"}, {"from": "gpt", "value": "It rains."}]
    [said] = formats.parse("x", {"conversations": share}, "demonstrations").responses
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": CALL["function"]}]}
    assert said == [called, *turns("t: rain | a: It rains.")]
    openai = {"messages": row["prompt"], "tools": [TOOL], "parallel_tool_calls": False}
    sides = {"preferred_output": chosen, "non_preferred_output": row["rejected"]}
    again = formats.parse("x", {"input": openai, **sides}, "preferences")
    assert again.responses == e.responses
    assert again.context == {"tools": [TOOL], "parallel_tool_calls": False}
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    assert formats.parse("x", row | kwargs, "preferences").context == kwargs
    assert (
        formats.parse("x", row | {"tools": "[]", "documents": None}, "preferences").context is None
    )


def test_turns_that_are_not_learnt_are_marked():
    flags = (
        {"weight": 0},
        {"train": False},
        {"training": False},
        {"weight": 1},
        {"train": True},
        {"weight": None},
        {},
    )
    talk = []
    for flag in flags:
        talk += [ASKED[1], YES[0] | flag]
    [response] = formats.parse("x", {"messages": talk}, "demonstrations").responses
    assert [turn.get("train") for turn in response[::2]] == [False] * 3 + [None] * 4
    assert all(turn.keys() - {"train"} == {"role", "content"} for turn in response)
    chosen = [ASKED[1], YES[0] | {"weight": 0}, ASKED[1], *YES]
    rejected = [ASKED[1], *YES, ASKED[1], *NO]
    e = formats.parse("x", {"chosen": chosen, "rejected": rejected}, "preferences")
    assert e.responses == (YES, NO), "of a history it says nothing"


def test_roles_by_any_name_and_content_in_parts():
    names = {
        "user": ["Human", "human", "USER", "prompter"], "system": ["system", "developer"],
        "assistant": ["gpt", "Assistant", "model", "bot", "chatgpt"], "tool": ["function", "observation"],
    }  # fmt: skip
    for role, known in names.items():
        for name in known:
            talk = [{"from": name, "value": "x"}, *turns("u: hi")]
            row = {"prompt": talk, "chosen": "a", "rejected": "b"}
            prompt = formats.parse("x", row, "preferences").prompt
            assert prompt[0] == {"role": role, "content": "x"}
    talk = [{"role": "user", "content": [*parts("one"), "two", {"text": "three"}]}]
    row = {"prompt": talk, "chosen": [GOOD[0] | {"content": parts("x")}], "rejected": BAD}
    e = formats.parse("x", row, "preferences")
    assert (e.prompt, e.responses) == (turns("u: one\ntwo\nthree"), (turns("a: x"), BAD))


def test_answers_that_are_no_pairs_are_refused_by_name():
    for row in (
        {"prompt": "p", "completion": "c", "label": True},
        {"prompt": USER, "completion": GOOD, "label": False},
        {"messages": USER + GOOD, "label": True},
    ):
        for kind in ("preferences", "demonstrations", "training"):
            if kind == "preferences" and "messages" in row:
                continue
            with pytest.raises(data.DataError, match=r"'label' for one answer \(KTO\)"):
                formats.parse("x", row, kind)
    for rejected, what in (
        ("x", "'messages' must end with the chosen answer"),
        (None, "'rejected_re"),
    ):
        row = {"messages": USER, "rejected_response": rejected}
        with pytest.raises(data.DataError, match=what):
            formats.parse("x", row, "preferences")
    with pytest.raises(data.DataError, match="one message of a tree"):
        formats.parse("x", {"text": "a", "role": "prompter", "parent_id": None}, "demonstrations")


def test_nulls_beside_a_format_are_absent():
    """As tables that were joined have them."""
    nulls = {"response": None, "messages": None, "images": None, "history": None, "label": None}
    for kind in ("preferences", "demonstrations", "training", "prompts"):
        e = formats.parse("x", nulls | PAIR, kind)
        assert e.prompt == PAIR["prompt"] and e.responses[0] == PAIR["chosen"]


# Files


def test_arrays_are_read(tmp_path):
    """On one line or indented, gzipped or not, whatever their name; elements are named."""
    rows = [PAIR, {"prompt": USER, "chosen": GOOD, "rejected": BAD}]
    for name, text in (
        ("a.json", json.dumps(rows)),
        ("b.json", json.dumps(rows, indent=2)),
        ("c.jsonl", "\ufeff\n " + json.dumps(rows, indent=2)),
        ("d.json.gz", json.dumps(rows, indent=1)),
    ):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        examples = list(data.read_preferences(str(path)))
        assert contents(examples) == [("Q: 2+2?", (" 4", " 5")), (USER, (GOOD, BAD))]
        assert [e.where for e in examples] == [f"{path}, element {n}" for n in (1, 2)]
    for text, message in (
        (json.dumps([PAIR, 3]), "x.json, element 2: expected a JSON object, found int"),
        (json.dumps([PAIR, {"text": "a"}]), "x.json, element 2: has the fields text"),
        (
            json.dumps(rows, indent=1)[:-9],
            "x.json, element 2: cannot be read as a JSON array .Expecting ',' d",
        ),
        ("[]", "x.json: the array is empty"),
        (json.dumps(PAIR, indent=1), "x.json:1: cannot be read as JSON lines"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(data.DataError, match=message) as error:
            list(data.read_preferences(str(tmp_path / "x.json")))
        assert "load_dataset" not in str(error.value)


def test_other_files_are_told_how_to_become_json_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {
        "a.parquet": b"PAR1\x15\x00",
        "b.bin": b"PAR1\x15",
        "c.arrow": b"ARROW1",
        "d.csv": b"prompt,chosen\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    kinds = {"a.parquet": "parquet", "b.bin": "parquet", "c.arrow": "arrow", "d.csv": "csv"}
    for name, kind in kinds.items():
        command = (
            f"load_dataset('{kind}', data_files='{name}', split='train').to_json('{name[0]}.jsonl')"
        )
        with pytest.raises(data.DataError) as error:
            list(data.read_preferences(name))
        assert str(error.value).startswith(f"{name}:1: cannot be read") and command in str(
            error.value
        )
    for name in ("org/some-data.v2", "imdb"):
        with pytest.raises(data.DataError) as error:
            list(data.read_preferences(name))
        assert f"load_dataset('{name}', split='train')" in str(error.value)
        assert str(error.value).startswith(f"{name}: cannot be read as JSON lines (No such file")
    for name in ("org/missing.jsonl", "missing.json", "gone.jsonl.gz", "/no/such/file", "a.csv"):
        with pytest.raises(data.DataError, match="No such file") as error:
            list(data.read_preferences(name))
        assert "load_dataset" not in str(error.value)
