"""The data doctor: what it counts, what it shows, and what it says of bad files."""

import itertools
import json
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
from conftest import run_script, save_tokenizer, turns, write_jsonl
from test_data_path import Spelling, assistant, cut, first_answers, unrepeated, user

import train
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
    ('{"prompt": "a"}\n', "bad.jsonl:1: has the fields prompt; expected those of a format: "),
    ("{", "bad.jsonl:1: cannot be read as JSON lines"),
    ("\n", "the file is empty"),
    (None, "cannot be read"),
])  # fmt: skip
def test_files_that_cannot_be_used_are_named(report, lines, message, tmp_path):
    if lines:
        (tmp_path / "bad.jsonl").write_text(lines)
    result = report(tmp_path / "bad.jsonl", expect=2)
    assert message in result.err and "Traceback" not in result.err and result.err.count("\n") <= 2


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


# Every number, against a plain computation

COUNTS = re.compile(r"  +([\d,]+) (.*)")
HEADS = ["5", "%", "median", "95", "%", "longest", "mean"]


def parse_report(out: str) -> dict[str, dict]:
    """What is said of each file, of which no examples are shown: counts, tables, shares."""
    files, table = {}, None
    for line in filter(None, out.splitlines()):
        if match := re.fullmatch(r"(\S+): ([\d,]+) examples", line):
            about = files[match[1]] = {"counts": {"examples": number(match[2])}}
            counts = about["counts"]
        elif line.split()[1:] == HEADS:
            table = about[line.split()[0]] = {}
        elif match := re.fullmatch(r"    (prompt|chosen|rejected|response) +([\d, ]+)", line):
            table[match[1]] = [number(word) for word in match[2].split()]
        elif match := re.fullmatch(r"    chosen is longer in (.*)%, rejected in (.*)%", line):
            table["longer"] = [float(match[1]), float(match[2])]
        elif match := re.fullmatch(
            r"  encoded, (.*) of them, to at most (.*) tokens, prompts to (.*):", line
        ):
            about["encoded"] = [number(word) for word in match.groups()]
            counts = about["encoded counts"] = {}
        elif match := re.fullmatch(r"  about ([\d,]+) tokens in all", line):
            about["tokens in all"] = number(match[1])
        elif match := COUNTS.fullmatch(line):
            counts[match[2]] = number(match[1])
        else:
            assert line.endswith("examples in all, each file compared with those before it"), line
    return files


def number(text: str) -> int:
    return int(text.replace(",", ""))


def quantile(values: list[int], q: float) -> float:
    """Between the two nearest values, in proportion."""
    place = q * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    values = sorted(values)
    return values[low] + (place - low) * (values[high] - values[low])


def check_table(found: dict, sizes: list[tuple], names: list[str]):
    """sizes: of the prompt, the best and the worst response of each example."""
    assert [*found] == [*names, *["longer"] * (len(names) == 3)]
    for name, column in zip(names, zip(*sizes)):
        right = [quantile(column, q) for q in (0.05, 0.5, 0.95, 1)]
        right.append(sum(column) / len(column))
        assert len(found[name]) == 5
        for printed, exact in zip(found[name], right):
            assert abs(printed - exact) <= 0.5 + 1e-9, (name, printed, exact)
    if len(names) == 3:
        chosen = 100 * sum(b > c for _, b, c in sizes) / len(sizes)
        rejected = 100 * sum(b < c for _, b, c in sizes) / len(sizes)
        assert found["longer"] == pytest.approx([chosen, rejected], abs=0.0501)


def random_row(rng: random.Random):
    """A row, its prompt and its responses; of few texts, so that they come again."""
    texts = ["", "a", "a b", " film", "Ünï", "was great and slow " * rng.randint(1, 4)]
    prompts = ["a", "Q: 2+2?", "the film was " * rng.randint(2, 9)]
    prompt, kind = rng.choice(prompts), rng.choice("pppprrrmhtid")
    if kind == "p":
        answers = rng.choices(texts, k=2)
        row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        return row, prompt, unrepeated(prompt, answers)[0]
    if kind == "r":
        answers = rng.choices(texts, k=rng.randint(2, 4))
        return {"prompt": prompt, "responses": answers}, prompt, unrepeated(prompt, answers)[0]
    if kind == "h":
        answers = rng.choices(texts, k=2)
        texts = [f"\n\nHuman: {prompt}\n\nAssistant: {text}" for text in answers]
        row = {"chosen": texts[0], "rejected": texts[1]}
        return row, [user(prompt)], [[assistant(text)] for text in answers]
    if kind == "m":
        talk = [
            user(prompt),
            assistant(rng.choice(texts)),
            user("and?"),
            assistant(rng.choice(texts)),
        ]
        return {"messages": talk}, *first_answers(talk)
    if kind == "t":
        return {"text": prompt}, "", [prompt]
    if kind == "i":
        answers = [[5, 6, 2], [7] * rng.randint(1, 9)]
        return {"prompt": [5], "chosen": answers[0], "rejected": answers[1]}, [5], answers
    answer = rng.choice(texts)
    return {"prompt": prompt, "response": answer}, prompt, [answer]


def expected_counts(rows: list, earlier: list, held_out: list) -> dict:
    """What is in a file after earlier ones; rows: (row, prompt, responses)."""
    counts, examples, before = Counter(), [r[1:] for r in rows], [r[1:] for r in earlier]
    prompts = [prompt for _, prompt, _ in held_out]
    for row, prompt, responses in rows:
        given = row.get("responses", [row.get("chosen"), row.get("rejected")])
        taken = isinstance(prompt, str) and None not in given and given != responses
        counts["prompts taken out of responses that repeated them"] += taken
    for prompt, responses in examples:
        counts["examples"] += 1
        if isinstance(prompt, list) and isinstance(prompt[0], dict):
            counts["conversations"] += 1
            counts["turns in them, the best response's included"] += len(prompt + responses[0])
        texts = [
            r[-1]["content"] if isinstance(r[0:1], list) and r and isinstance(r[-1], dict) else r
            for r in responses
        ]
        counts["with an empty response"] += any(len(text) == 0 for text in texts)
        counts["with identical responses"] += any(
            a == b for a, b in itertools.combinations(responses, 2)
        )
        counts["duplicates of an earlier example"] += (prompt, responses) in before
        turned = responses[::-1]
        counts["contradictions of an earlier example"] += (
            turned != responses and (prompt, turned) in before
        )
        if prompt:
            counts["with a prompt seen earlier"] += prompt in [p for p, _ in before]
            counts["with a prompt of the evaluation files"] += prompt in prompts
        before.append((prompt, responses))
    return +counts


def letters(content) -> int:
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return sum(len(turn["content"]) for turn in content)
    return len(content)


@pytest.mark.parametrize("seed", range(6))
def test_every_number_of_a_random_mixture(report, tokenizer, tmp_path, monkeypatch, seed):
    """Two files and two evaluation files; of each a sample is encoded, if it is longer than that."""
    rng, spelling, samples = random.Random(seed), Spelling(tokenizer, "plain"), []
    limits = rng.choice([(512, 256), (30, 12), (18, 9)])
    monkeypatch.setattr(doctor, "SAMPLE", rng.choice([9, 10_000]))
    show = doctor.show_encoded
    record = lambda sample, *rest: (samples.append(list(sample)), show(sample, *rest))
    monkeypatch.setattr(doctor, "show_encoded", record)
    files = {}
    for name, count in (("e", 5), ("f", 4), ("a", 30), ("b", 25)):
        rows = [random_row(rng) for _ in range(count)]
        rows += rng.choices(rows, k=3)
        if name == "b":  # of SFT alone
            rows = [r for r in (random_row(rng) for _ in range(90)) if len(r[2]) == 1][
                : count + seed
            ]
        files[write_jsonl(tmp_path / f"{name}.jsonl", [r[0] for r in rows])] = rows
    one, two, three, four = files
    flags = [f"--max_length={limits[0]}", f"--max_prompt_length={limits[1]}", "--show=0"]
    out = report(three, four, f"--eval={one},{two}", f"--tokenizer={tokenizer.path}", *flags).out
    found = parse_report(out)
    assert [*found] == [one, two, three, four] and len(samples) == 4
    total = len(files[three]) + len(files[four])
    assert out.endswith(f"\n{total} examples in all, each file compared with those before it\n")
    held_out = files[one] + files[two]
    earlier = {one: [], two: files[one], three: [], four: files[three]}
    for sample, (path, rows) in zip(samples, files.items()):
        about, examples = found[path], [r[1:] for r in rows]
        outside = held_out if path in (three, four) else []
        assert about["counts"] == expected_counts(rows, earlier[path], outside)
        alone = all(len(example.responses) == 1 for example in sample)
        names = ["prompt", "response"] if alone else ["prompt", "chosen", "rejected"]
        sizes = [(letters(p), letters(r[0]), letters(r[-1])) for p, r in examples]
        check_table(about["characters"], sizes, names)
        drawn = [int(example.where.rsplit(":", 1)[1]) - 1 for example in sample]
        assert len(set(drawn)) == len(drawn) == min(doctor.SAMPLE, len(rows))
        assert [(x.prompt, list(x.responses)) for x in sample] == [examples[n] for n in drawn]
        counts = Counter(examples=len(drawn))
        trees = [cut(spelling.tree(*examples[n]), *limits, counts) for n in drawn]
        trees = [tree for tree in trees if tree]
        del counts["examples"]
        assert about["encoded"] == [len(drawn), *limits]
        assert about["encoded counts"] == +counts
        tokens = sum(len(ids) for tree in trees for ids in tree) * len(rows) / len(drawn)
        assert abs(about["tokens in all"] - tokens) <= 0.5 + 1e-9
        sizes = [(len(tree[0]), len(tree[1]), len(tree[-1])) for tree in trees]
        check_table(about["tokens"], sizes, names)


def test_large_numbers_have_commas_and_bad_rows_leave_the_rest(report, tmp_path):
    rows = [{"prompt": "p", "chosen": "a" * 2345, "rejected": "b"}] * 1200
    path = write_jsonl(tmp_path / "x.jsonl", [*rows, {"prompt": 3}, *rows[:100], {"chosen": ""}])
    result = report(path, expect=2)
    assert f"\n{path}: 1,300 examples\n" in result.out
    lines = [line.split() for line in result.out.splitlines()]
    assert ["1,299", "duplicates", "of", "an", "earlier", "example"] in lines
    assert ["chosen", *["2,345"] * 5] in lines and ["rejected", *"11111"] in lines
    assert "  2 unusable: train.py would stop there" in result.out
    assert [line.split(": ")[1] for line in result.err.splitlines()] == [
        f"{path}:1201",
        f"{path}:1302",
    ]
    assert "in all" not in result.out, "one file is no mixture"
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": 3}, PAIR])
    good = write_jsonl(tmp_path / "good.jsonl", [PAIR, PAIR])
    out = report(good, f"--eval={bad}", expect=2).out
    assert found_counts(out, bad) == {"examples": 1, "unusable: train.py would stop there": 1}
    assert found_counts(out, good) == {
        "examples": 2, "duplicates of an earlier example": 1, "with a prompt seen earlier": 1,
        "with a prompt of the evaluation files": 2,
    }  # fmt: skip
    report(good, expect=0)
    assert report(f"{good},{bad}", expect=2).out.endswith(
        "\n3 examples in all, each file compared with those before it\n"
    )


def found_counts(out: str, path: str) -> dict:
    return parse_report(out)[path]["counts"]


def test_every_example_is_as_likely_to_be_in_the_sample(report, tokenizer, tmp_path, monkeypatch):
    """8 examples, 3 of them encoded, by 400 seeds; by its own seed always the same."""
    rows = [{"prompt": "p", "chosen": f"{n}", "rejected": "b"} for n in range(8)]
    path, samples = write_jsonl(tmp_path / "x.jsonl", rows), []
    monkeypatch.setattr(doctor, "SAMPLE", 3)
    record = lambda sample, *_: samples.append([int(e.responses[0]) for e in sample])
    monkeypatch.setattr(doctor, "show_encoded", record)
    look = lambda: doctor.diagnose(path, set(), set(), tokenizer, (9, 8), 0)
    look()
    look()
    assert samples[0] == samples[1]
    new, seeds = random.Random, itertools.count()
    monkeypatch.setattr(doctor.random, "Random", lambda _: new(next(seeds)))
    for _ in range(400):
        look()
    assert all(len(set(sample)) == len(sample) == 3 for sample in samples)
    times = Counter(n for sample in samples[2:] for n in sample)
    assert all(abs(times[n] - 150) < 40 for n in range(8)), "four standard deviations"


def test_what_is_shown_is_what_the_model_reads(report, tokenizer, tmp_path):
    """Cut as in training; as many examples of each file as asked for, of evaluation files none."""
    rows = [
        {"prompt": "</s></s> a", "responses": [" one", " two", " three"]},
        {"prompt": "abcdef", "chosen": " abababab1", "rejected": ""},
        {"prompt": "abcdef", "chosen": " x", "rejected": " abababab2"},
        {"prompt": [1, 1, 5, 2, 2, 2], "chosen": [2, 2], "rejected": [1]},
    ]
    one = write_jsonl(tmp_path / "a.jsonl", rows)
    two = write_jsonl(tmp_path / "b.jsonl", [{"messages": turns("u: hi | a: lo | u: q | a: 4")}])
    held_out = write_jsonl(tmp_path / "e.jsonl", [PAIR])
    flags = [f"--eval={held_out}", f"--tokenizer={tokenizer.path}"]

    def shown(*more):
        found = shown_of(report(*flags, *more).out)
        assert found.pop(held_out) == ""
        return found

    ranked = ["  <s> </s></s> a", *[f"    → « {n}</s>»" for n in ("one", "two", "three")]]
    long = ["  <s> abcdef", "    → « x</s>»", "    → « abababab2</s>»"]
    piece = tokenizer.inside.decode([5])
    ids = [f"  <s><s>{piece}</s></s></s>", "    → «</s></s>»", "    → «<s>»"]
    talk = "  <s> \n\nHuman: hi\n\nAssistant:\n    → « lo»\n\nHuman: q\n\nAssistant:« 4</s>»"
    both = {two: talk, one: "\n".join(ranked + long)}
    assert shown(two, one) == both, "two by default; what is dropped is not shown"
    assert shown(one, two, "--show=1") == {one: "\n".join(ranked), two: talk}
    assert shown(one, "--show=9") == {one: "\n".join(ranked + long + ids)}
    assert shown(one, "--show=0") == {one: ""}
    out = shown(one, "--max_length=9", "--max_prompt_length=4")[one]
    cut_prompt = tokenizer.start.encode("abcdef")[-3:]
    kept = Spelling(tokenizer, "plain").continues(" abababab2")[:5]
    lines = [
        f"<s>{tokenizer.inside.decode(cut_prompt)}",
        "→ « x</s>»",
        f"→ «{tokenizer.inside.decode(kept)}»",
    ]
    assert [line.strip() for line in out.splitlines()[-3:]] == lines


def shown_of(out: str) -> dict[str, str]:
    """What is shown of each file, after its tables."""
    found = {}
    for part in re.split(r"\n(?=/\S+: [\d,]+ examples\n)", out)[1:]:
        path, rest = part.split(": ", 1)
        text = rest[rest.find("\n\n  <s>") :] if "\n\n  <s>" in rest else ""
        found[path] = re.sub(r"\n+\d+ examples in all.*\n", "", text).replace(
            "\n\n  <s>", "\n  <s>"
        )
    return {path: text.strip("\n") for path, text in found.items()}


def test_colours_stand_for_what_is_learnt_on_a_terminal(tokenizer, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    ids = tokenizer.encode("ab", continuation=True)
    assert len(ids) == 2, "two letters that are two pieces"
    text = doctor.spell(np.array([*ids, 2]), np.array([False, True, True]), tokenizer)
    assert text == "a\033[32mb</s>\033[0m"


def test_the_limits_are_those_of_training(report, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [PAIR])
    s = train.Settings()
    flags = path, f"--tokenizer={tokenizer.path}"
    expected = [1, s.max_length, s.max_prompt_length]
    assert parse_report(report(*flags, "--show=0").out)[path]["encoded"] == expected
    asked = report(*flags, "--show=0", "--max_length=33", "--max_prompt_length=32").out
    assert parse_report(asked)[path]["encoded"] == [1, 33, 32]
    none = report(*flags, "--max_length=3", "--max_prompt_length=1", "--show=0")
    assert parse_report(none.out)[path]["encoded counts"] == {"prompts cut": 1, "responses cut": 2}


def test_a_large_file_says_how_far_it_is_read(report, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * 100_001)
    result = report(tmp_path / "x.jsonl")
    assert result.err == "… 100,000 read\n" and ": 100,001 examples\n" in result.out
    assert "  tokens" not in result.out and "encoded" not in result.out, "without a tokenizer"


def test_a_file_of_which_nothing_can_be_used_ends_it(report, tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", [PAIR])
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": 3}] * 9)
    result = report(good, bad, expect=2)
    assert result.err.splitlines()[3:] == [f"data.py: {bad}: no row can be used"]
    assert f"{good}: 1 examples" in result.out and "in all" not in result.out
