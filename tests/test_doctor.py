"""The data doctor: what it counts, what it shows, and what it says of bad files."""

import json

import pytest
from conftest import run_script, save_tokenizer, turns, write_jsonl

from extra import doctor

PAIR = {"prompt": "Q: 2+2?", "chosen": " 4", "rejected": " 5"}


@pytest.fixture
def report(monkeypatch, capsys):
    """What `python data.py ARGUMENTS` writes, without a process for it."""

    def run(*arguments, expect=0):
        monkeypatch.setattr("sys.argv", ["data.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            doctor.main()
        assert end.value.code == expect
        return capsys.readouterr()

    return run


def test_the_doctor_counts(tokenizer, tmp_path):
    rows = [
        PAIR,
        PAIR,  # a duplicate
        PAIR | {"chosen": " 5", "rejected": " 4"},  # a contradiction
        PAIR | {"chosen": " 6", "rejected": " 6"},  # identical
        PAIR | {"rejected": ""},  # empty
        PAIR | {"prompt": "Q: " + "2+" * 99 + "2?"},  # its prompt is cut
        {"prompt": "new", "chosen": " longer", "rejected": " x"},
        {"messages": turns("u: a | a: b")},
    ]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    held_out = write_jsonl(tmp_path / "eval.jsonl", [PAIR | {"prompt": "new"}])
    model = save_tokenizer(tokenizer, tmp_path / "t") / "tokenizer.model"
    flags = [f"--eval={held_out}", f"--tokenizer={model}", "--max_prompt_length=32"]
    out = run_script("data.py", path, *flags).stdout
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
    bad = run_script("data.py", tmp_path / "none.jsonl", expect=2)
    assert "none.jsonl: cannot be read" in bad.stderr and "Traceback" not in bad.stderr


def test_what_is_learnt_of_a_conversation_is_shown(report, tokenizer, tmp_path):
    """The assistant's turns between « and »; --show says of how many examples."""
    talk = [{"messages": turns("u: hi | a: lo | u: 2+2? | a: 4")}]
    path = write_jsonl(tmp_path / "x.jsonl", [*talk, PAIR])
    directory = save_tokenizer(tokenizer, tmp_path / "t")
    one, two = (report(path, f"--tokenizer={directory}", f"--show={n}").out for n in (1, 2))
    shown = "→ « lo»\n\nHuman: 2+2?\n\nAssistant:« 4</s>»"
    assert shown in one and "« 5</s>»" not in one
    assert shown in two and "→ « 4</s>»\n    → « 5</s>»" in two
    alone = report(write_jsonl(tmp_path / "sft.jsonl", talk)).out
    assert "response" in alone and "chosen" not in alone, "one response each"


def test_files_are_a_mixture(report, tmp_path):
    """Each is compared with those before it, separated by spaces or commas."""
    one = write_jsonl(tmp_path / "a.jsonl", [PAIR, {"text": "x"}])
    two = write_jsonl(tmp_path / "b.jsonl", [{"prompt": [5], "chosen": [6], "rejected": [7]}, PAIR])
    out = report(f"{one},{two}").out
    assert "3 examples" not in out and "4 examples in all" in out
    assert out.index("1 duplicates of an earlier") > out.index(f"{two}: 2 examples")
    assert report(one, two).out.startswith(out[: out.index("4 examples in all")])


@pytest.mark.parametrize(("lines", "message"), [
    ('{"prompt": "a", "chosen": "b"}\n', "bad.jsonl:1: field 'rejected' is missing"),
    ('{"prompt": "a"}\n', "bad.jsonl:1: field 'responses' is missing"),
    ("{", "bad.jsonl:1: cannot be read as JSON lines"),
    ("\n", "the file is empty"),
    (None, "cannot be read"),
])  # fmt: skip
def test_files_that_cannot_be_used_are_named(report, lines, message, tmp_path):
    if lines:
        (tmp_path / "bad.jsonl").write_text(lines)
    result = report(tmp_path / "bad.jsonl", expect=2)
    assert message in result.err and result.err.count("\n") <= 2


def test_what_is_unusable_is_counted_and_the_rest_looked_at(report, tmp_path):
    bad = [{"prompt": "a", "chosen": "b"}] * 5
    path = write_jsonl(tmp_path / "odd.jsonl", [*bad, PAIR])
    odd = report(path, expect=2)
    assert "1 examples" in odd.out and "5 unusable" in odd.out
    assert odd.err.count("\n") == 3, "the first three are named"
    assert "odd.jsonl:1: field 'rejected' is missing" in odd.err
    (tmp_path / "nan.jsonl").write_text(json.dumps(PAIR)[:-1] + ', "score_chosen": Infinity}')
    odd = report(tmp_path / "nan.jsonl", expect=2)
    assert "nan.jsonl:1: field 'score_chosen' must be a number" in odd.err
    limits = report(path, "--max_length=8", "--max_prompt_length=8", expect=2)
    assert "--max_prompt_length must be less than --max_length" in limits.err
