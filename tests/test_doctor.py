"""The data doctor: what it counts, what it shows, and what it says of bad files."""

import gzip
import itertools
import json
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
from conftest import run_script, save_tokenizer, turns, write_jsonl
from test_data_path import (
    Spelling,
    assistant,
    cut,
    first_answers,
    heard,
    make_tokenizer,
    unrepeated,
    user,
)

import data
import train
from extra import doctor, terminal

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
        "⟦<s>⟧ Q: 2+2? → « 4⟦</s>⟧» → « 5⟦</s>⟧»",
    ):  # fmt: skip
        assert fact in report, fact


def test_what_is_learnt_of_a_conversation_is_shown(report, tokenizer, tmp_path):
    """The assistant's turns between « and »; --show says of how many examples."""
    talk = [{"messages": turns("u: hi | a: lo | u: 2+2? | a: 4")}]
    path = write_jsonl(tmp_path / "x.jsonl", [*talk, PAIR])
    directory = save_tokenizer(tokenizer, tmp_path / "t")
    one, two = (report(path, f"--tokenizer={directory}", f"--show={n}").out for n in (1, 2))
    shown = "→ « lo⟦</s>⟧» \n\nHuman: 2+2?\n\nAssistant:« 4⟦</s>⟧»"
    assert shown in one and "« 5⟦</s>⟧»" not in one
    assert shown in two and "→ « 4⟦</s>⟧»\n    → « 5⟦</s>⟧»" in two
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
ROW = re.compile(r" +([\d,]+)(?: – ([\d,]+))? (█* ?|░* ?)([\d,]+)")
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
        elif match := re.fullmatch(r"  (\w+) of prompt and longest response", line):
            about["histogram of"], rows = match[1], about.setdefault("histogram", [])
        elif match := ROW.fullmatch(line):
            low, high, count = (number(match[i] or match[1]) for i in (1, 2, 4))
            rows.append((low, high, match[3].strip(), count))
        elif match := re.fullmatch(r"    (.*)% are longer than --max_length=(.*): ░", line):
            about["longer"] = float(match[1]), number(match[2])
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


def check_histogram(about: dict, lengths: list[int], limit: int):
    """Side by side, of growing widths, from the shortest to the longest; with every length once."""
    rows = about["histogram"]
    assert rows[0][0] == min(lengths) and rows[-1][1] == max(lengths) and len(rows) <= 11
    assert all(a[1] + 1 == b[0] for a, b in zip(rows, rows[1:]))
    assert sum(row[3] for row in rows) == len(lengths)
    most = max(row[3] for row in rows)
    for low, high, bar, count in rows:
        assert count == sum(low <= length <= high for length in lengths)
        assert len(bar) == math.ceil(40 * count / most)
        assert set(bar) <= {"░" if limit and low > limit else "█"}
        assert not limit or high <= limit or low > limit, "no row on both sides of the limit"
    beyond = sum(length > limit for length in lengths) if limit else 0
    assert ("longer" in about) == (beyond > 0)
    if beyond:
        assert about["longer"] == (pytest.approx(100 * beyond / len(lengths), abs=0.0501), limit)


def random_row(rng: random.Random):
    """A row, its prompt and its responses; of few texts, so that they come again."""
    row, prompt, responses = written_row(rng)
    return row, prompt, heard(responses)


def written_row(rng: random.Random):
    texts = ["", "a", "a b", " film", "Ünï</s>", "was great and slow " * rng.randint(1, 4)]
    prompts = ["a", "Q: 2+2?", "the film was " * rng.randint(2, 9), "great<s>"]
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
        if isinstance(prompt, str) and prompt:
            repeats = [text[: len(prompt)] == prompt for text in responses]
            counts["with a prompt that ends in a space or a tab"] += prompt.endswith((" ", "\t"))
            counts["with a response that begins with the whole prompt"] += sum(repeats) > 0
            counts["with several responses that all do"] += sum(repeats) == len(repeats) > 1
        if isinstance(prompt, str):
            spelt = [text for text in [prompt, *responses] if "<s>" in text or "</s>" in text]
            counts[IN_TEXT] += len(spelt) > 0
        elif isinstance(prompt[0], dict):
            spelt = json.dumps([prompt, responses])
            counts[IN_TURNS] += "<s>" in spelt or "</s>" in spelt
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


IN_TURNS = "with a turn that spells control tokens: written as characters"
IN_TEXT = "with text that spells control tokens"
HINT = ": written as characters; --rendered makes tokens of them"
HALF = "with one response cut and another whole"
TORN = "prompts cut inside a turn"


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
        counts = expected_counts(rows, earlier[path], outside)
        if IN_TEXT in counts:
            counts[IN_TEXT + HINT] = counts.pop(IN_TEXT)
        assert about["counts"] == counts
        alone = all(len(example.responses) == 1 for example in sample)
        names = ["prompt", "response"] if alone else ["prompt", "chosen", "rejected"]
        sizes = [(letters(p), letters(r[0]), letters(r[-1])) for p, r in examples]
        check_table(about["characters"], sizes, names)
        drawn = [int(example.where.rsplit(":", 1)[1]) - 1 for example in sample]
        assert len(set(drawn)) == len(drawn) == min(doctor.SAMPLE, len(rows))
        assert [(x.prompt, list(x.responses)) for x in sample] == [examples[n] for n in drawn]
        counts = Counter(examples=len(drawn))
        whole = [spelling.tree(*examples[n]) for n in drawn]
        trees = [cut(tree, *limits, counts) for tree in whole]
        for n, before, after in zip(drawn, whole, trees):
            prompt, responses = examples[n]
            talk = isinstance(prompt, list) and isinstance(prompt[0], dict)
            if after:
                lost = [ids not in after[1:] for ids in before[1:]]
                counts[HALF] += True in lost and False in lost
                counts[TORN] += talk and len(before[0]) > limits[1]  # they have one turn
            if talk:
                prompt = f"\n\nHuman: {prompt[0]['content']}\n\nAssistant:"
                said = " " + responses[0][0]["content"] if responses[0] else ""
            else:
                said = responses[0]
            if prompt and said and isinstance(prompt, str):
                apart = spelling.begins(prompt) + spelling.continues(said)
                counts[doctor.MERGED] += spelling.begins(prompt + said) != apart
        trees = [tree for tree in trees if tree]
        del counts["examples"]
        assert about["encoded"] == [len(drawn), *limits]
        assert about["encoded counts"] == +counts
        tokens = sum(len(ids) for tree in trees for ids in tree) * len(rows) / len(drawn)
        assert abs(about["tokens in all"] - tokens) <= 0.5 + 1e-9
        sizes = [(len(tree[0]), len(tree[1]), len(tree[-1])) for tree in trees]
        check_table(about["tokens"], sizes, names)
        assert about["histogram of"] == "tokens"
        check_histogram(about, [len(t[0]) + max(map(len, t[1:])) for t in whole], limits[0])


def test_large_numbers_have_commas_and_bad_rows_leave_the_rest(report, tmp_path):
    rows = [{"prompt": "p", "chosen": "a" * 2345, "rejected": "b"}] * 1200
    path = write_jsonl(tmp_path / "x.jsonl", [*rows, {"prompt": 3}, *rows[:100], {"chosen": ""}])
    result = report(path, expect=2)
    assert f"\n{path}: 1,300 examples\n" in result.out
    lines = [line.split() for line in result.out.splitlines()]
    assert ["1,299", "duplicates", "of", "an", "earlier", "example"] in lines
    assert ["chosen", *["2,345"] * 5] in lines and ["rejected", *"11111"] in lines
    assert "  2 unusable: train.py would stop there; --out writes the others" in result.out
    assert [line.split(": ")[1] for line in result.err.splitlines()] == [
        f"{path}:1201",
        f"{path}:1302",
    ]
    assert "in all" not in result.out, "one file is no mixture"
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": 3}, PAIR])
    good = write_jsonl(tmp_path / "good.jsonl", [PAIR, PAIR])
    out = report(good, f"--eval={bad}", expect=2).out
    assert found_counts(out, bad) == {"examples": 1, doctor.UNUSABLE: 1}
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

    b, e = "⟦<s>⟧", "⟦</s>⟧"  # the tokens, not their spelling
    ranked = [f"  {b} </s></s> a", *[f"    → « {n}{e}»" for n in ("one", "two", "three")]]
    long = [f"  {b} abcdef", f"    → « x{e}»", f"    → « abababab2{e}»"]
    piece = tokenizer.inside.decode([5]).translate(terminal.PLAIN)
    ids = [f"  {b}{b}{piece}{e}{e}{e}", f"    → «{e}{e}»", f"    → «{b}»"]
    talk = f"  {b} \n\nHuman: hi\n\nAssistant:\n    → « lo{e}» \n\nHuman: q\n\nAssistant:« 4{e}»"
    both = {two: talk, one: "\n".join(ranked + long)}
    assert shown(two, one) == both, "two by default; what is dropped is not shown"
    assert shown(one, two, "--show=1") == {one: "\n".join(ranked), two: talk}
    assert shown(one, "--show=9") == {one: "\n".join(ranked + long + ids)}
    assert shown(one, "--show=0") == {one: ""}
    out = shown(one, "--max_length=9", "--max_prompt_length=4")[one]
    cut_prompt = tokenizer.start.encode("abcdef")[-3:]
    kept = Spelling(tokenizer, "plain").continues(" abababab2")[:5]
    lines = [
        f"{b}{tokenizer.inside.decode(cut_prompt)}",
        f"→ « x{e}»",
        f"→ «{tokenizer.inside.decode(kept)}»",
    ]
    assert [line.strip() for line in out.splitlines()[-3:]] == lines


def shown_of(out: str) -> dict[str, str]:
    """What is shown of each file, after its tables."""
    found = {}
    for part in re.split(r"\n(?=/\S+: [\d,]+ examples\n)", out)[1:]:
        path, rest = part.split(": ", 1)
        begins = "\n  ⟦<s>⟧"
        text = rest[rest.find(begins) :] if begins in rest else ""
        text = re.sub(r"\n+\d+ examples in all.*\n", "", text)
        found[path] = text.replace("\n" + begins, begins)
    return {path: text.strip("\n") for path, text in found.items()}


def test_colours_stand_for_what_is_learnt_on_a_terminal(tokenizer, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    ids = tokenizer.encode("ab", continuation=True)
    assert len(ids) == 2, "two letters that are two pieces"
    text = terminal.spell(np.array([*ids, 2]), np.array([False, True, True]), tokenizer)
    assert text == "a\033[32mb\033[7m</s>\033[27m\033[0m"


def test_the_limits_are_those_of_training(report, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [PAIR])
    s = train.Settings()
    flags = path, f"--tokenizer={tokenizer.path}"
    expected = [1, s.max_length, s.max_prompt_length]
    assert parse_report(report(*flags, "--show=0").out)[path]["encoded"] == expected
    asked = report(*flags, "--show=0", "--max_length=33", "--max_prompt_length=32").out
    assert parse_report(asked)[path]["encoded"] == [1, 33, 32]
    none = report(*flags, "--max_length=3", "--max_prompt_length=1", "--show=0")
    counts = {"prompts cut": 1, "responses cut": 2}
    assert parse_report(none.out)[path]["encoded counts"] == counts


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


# Spelt control tokens, boundaries and cuts, on crafted files with exact numbers


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    """A tokenizer whose chats are ChatML's."""
    return make_tokenizer("chatml", tmp_path_factory.mktemp("chatml"))


def pair(prompt, chosen=" x", rejected=" y") -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_shapes_of_text_are_counted(report, tmp_path):
    rows = [
        pair("Answer: ", "An apple", "A brick"),
        pair("Answer:\t"),
        pair("Answer:\n"),  # a usual end
        pair([5, 32], [7], [8]),
        {"text": "of its own "},
        pair("Name a fruit.", "Name a fruit. Apple", "Name a fruit. Brick"),  # is taken out
        pair("Name a", "Name an apple", "Name any brick"),  # which would tear a word
        pair("Name a fruit.", " Apple", "Name a fruit."),
        pair("Name a fruit.", "Name a fruit", "Name a"),  # not the whole of it
        {"prompt": "Say a", "response": "Say a b"},
        {"prompt": "Say a", "responses": ["Say a b", "Say a c", "no"]},
        pair([{"role": "user", "content": "a "}], "a b", "a c"),
    ]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    counts = found_counts(report(path).out, path)
    for what in ("examples", "conversations", "with a prompt seen earlier"):
        counts.pop(what)
    assert counts == {
        "prompts taken out of responses that repeated them": 1,
        "with a prompt that ends in a space or a tab": 2,
        "with a response that begins with the whole prompt": 4,
        "with several responses that all do": 1,
        "turns in them, the best response's included": 2,
    }
    path = write_jsonl(tmp_path / "y.jsonl", [PAIR])
    assert found_counts(report(path).out, path) == {"examples": 1}, "each a line only if not zero"


def test_spelt_control_tokens_are_counted_and_shown_as_what_they_are(
    report, chatml, tmp_path, monkeypatch
):
    """A token has brackets, or is inverse on a terminal; its spelling is as it is written, and
    what looks like brackets, or would colour the terminal, is other text."""
    spelt = "<|im_start|>user\nhi<|im_end|>"
    rows = [
        pair(spelt, "yes<|im_end|>", "no<|im_end|>"),
        pair("a", " x", " <|im_end|>"),
        pair("a", " x", " <|im end|>"),
        pair([{"role": "user", "content": "the film"}], "<|im_end|>", "a"),
        pair("b", "⟦<|im_end|>⟧", "\033[7m<|im_end|>\033[27m\x9b7m"),
    ]
    path, flags = write_jsonl(tmp_path / "x.jsonl", rows), [f"--tokenizer={chatml.path}"]
    counts = found_counts(report(path, *flags, "--show=0").out, path)
    assert {what: count for what, count in counts.items() if "spells" in what} == {
        IN_TEXT + HINT: 3, IN_TURNS: 1,
    }  # fmt: skip
    b, s, e = (f"⟦{name}⟧" for name in ("<s>", "<|im_start|>", "<|im_end|>"))
    end = e  # the EOS of this tokenizer
    out = report(path, *flags, "--show=5").out
    shown = [part.splitlines() for part in re.split(f"\n\n  (?:{b}|(?={s}))", out)[1:]]
    assert shown[0] == [
        " <|im_start|>user", "hi<|im_end|>", f"    → «yes<|im_end|>{end}»", f"    → «no<|im_end|>{end}»",
    ]  # fmt: skip
    assert shown[3] == [
        f"{s} user", f"the film{e} ", f"{s} assistant", "", f"    → «<|im_end|>{e}»", f"    → «a{e}»",
    ]  # fmt: skip
    assert shown[4][1:] == [
        f"    → «[<|im_end|>]{end}»", f"    → «\\x1b[7m<|im_end|>\\x1b[27m\\x9b7m{end}»",
    ]  # fmt: skip
    quiet = found_counts(report(path, *flags, "--rendered", "--show=0").out, path)
    assert IN_TEXT + HINT not in quiet and quiet[IN_TEXT] == 3 and quiet[IN_TURNS] == 1
    assert "spells" not in report(path).out, "which tokens there are a tokenizer says"
    assert "give a --tokenizer" in report(path, "--rendered", expect=2).err
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    ids = chatml.encode("<|im_end|>", True)
    text = terminal.spell(np.array([901, *ids]), np.zeros(1 + len(ids), bool), chatml)
    assert text == "\033[7m<|im_end|>\033[27m<|im_end|>"


def test_rendered_reaches_the_tokenizer(report, chatml, tmp_path, monkeypatch):
    path, made = write_jsonl(tmp_path / "x.jsonl", [PAIR]), []
    record = lambda sample, total, tokenizer, *_: made.append(tokenizer.rendered)
    monkeypatch.setattr(doctor, "show_encoded", record)
    report(path, f"--tokenizer={chatml.path}", "--rendered")
    assert made == [True]


@pytest.mark.parametrize("style", ["chatml", "inst"])
def test_a_cut_is_inside_a_turn_unless_one_ends_there(report, tmp_path, style):
    """At every place of a conversation's prompt; the same text without turns has none to tear."""
    tokenizer = make_tokenizer(style, tmp_path)
    spelling, flag = Spelling(tokenizer, style), f"--tokenizer={tokenizer.path.parent}"
    talk = turns("u: the film | a: was great | u: b") if style == "inst" else turns("s: a | u: b")
    path = write_jsonl(tmp_path / "x.jsonl", [pair(talk), pair("the film was great " * 9)])
    [prompt, *_] = spelling.tree(talk, [[assistant(" x")], [assistant(" y")]])
    whole = [n for n in range(2, len(prompt)) if prompt[n - 1] in (901, 2)]
    for n in list(whole):  # space belongs to no turn, and the first token is always kept
        while prompt[n] == prompt[0] or tokenizer.decode([prompt[n]], True).isspace():
            n += 1
            whole.append(n)
    assert whole, "there is a place"
    for place in range(2, len(prompt)):  # prompt[place] is the first that is kept, after BOS
        limits = [f"--max_prompt_length={len(prompt) - place + 1}", "--max_length=99", "--show=0"]
        counts = parse_report(report(path, flag, *limits).out)[path]["encoded counts"]
        assert counts["prompts cut"] == 2
        assert counts.get(TORN, 0) == (place not in whole), place


def test_responses_of_which_only_some_keep_their_end(report, tokenizer, tmp_path):
    """Of what is kept; of a ranking's equal responses one counts."""
    spelling, long = Spelling(tokenizer, "plain"), " was great" * 20
    rows = [
        pair("a", " x", long),
        pair("a", long, " x"),
        pair("a", long, " and slow" * 20),  # neither
        pair("a"),  # both
        pair("a", long, ""),  # dropped
        pair("a", long + "1", long + "2"),  # dropped: identical once cut
        {"prompt": "a", "response": long},  # alone
        {"prompt": "a", "responses": [" x", long, long]},
        {"prompt": "a", "responses": [long, long, " x"]},
        {"prompt": "a", "responses": [" x", " x", " y"]},
    ]
    prompt, short = map(len, spelling.tree("a", [" x"]))
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    flags = [f"--tokenizer={tokenizer.path}", f"--max_prompt_length={prompt}", "--show=0"]
    out = report(path, *flags, f"--max_length={prompt + short}").out  # what the short ones need
    counts = parse_report(out)[path]["encoded counts"]
    assert counts.pop(doctor.MERGED, 0) >= 0
    assert counts == {
        "dropped: empty response": 1, "dropped: identical once cut": 1, "responses cut": 7,
        "repeated responses left out": 3, HALF: 4,
    }  # fmt: skip


def test_boundaries_that_a_joint_encoding_merges(report, chatml, tmp_path):
    """Beside them others whose joint encoding is the same, or that have no boundary of texts."""
    merged = [pair("the fi", "lm"), pair("a ", "the film"), {"prompt": "the fi", "response": "lm"}]
    apart = [
        pair("the film", " was"),
        pair("the film", "", "lm"),
        pair([5, 6], [7], [8]),
        {"text": "the film"},
        pair([{"role": "user", "content": "the fi"}], "lm", "x"),  # <|im_end|> is between
    ]
    count = lambda rows, tokenizer: parse_report(
        report(
            write_jsonl(tmp_path / "x.jsonl", rows), f"--tokenizer={tokenizer.path}", "--show=0"
        ).out
    )[str(tmp_path / "x.jsonl")]["encoded counts"].get(doctor.MERGED, 0)
    assert count(merged, chatml) == 3 and count(merged + apart, chatml) == 3
    assert count(apart, chatml) == 0
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # nothing is between
    config = tmp_path / "bare" / "tokenizer_config.json"
    save_tokenizer(chatml, config.parent)
    config.write_text(json.dumps({"chat_template": template}))
    talk = lambda said, *more: pair([{"role": "user", "content": said}], *more)
    rows = [talk("the fi", "lm", "x"), talk("the film", " was", "x"), talk("the fi", "", "lm")]
    assert count(rows, data.Tokenizer(config.parent)) == 1


def test_what_the_template_writes_again_is_encoded_as_often(
    report, tokenizer, tmp_path, monkeypatch
):
    """An example may become several: all of them are counted, and scaled to the file."""
    ahead = doctor.encode_ahead
    twice = lambda *rest: (copy for example in ahead(*rest) for copy in [example] * 2)
    monkeypatch.setattr(doctor, "encode_ahead", twice)
    path = write_jsonl(tmp_path / "x.jsonl", [pair(f"a{n}") for n in range(3)])
    about = parse_report(report(path, f"--tokenizer={tokenizer.path}", "--show=0").out)[path]
    assert about["encoded"][0] == 3 and about["encoded counts"]["sequences to learn in them"] == 6
    tokens = [
        len(t) for n in range(3) for t in Spelling(tokenizer, "plain").tree(f"a{n}", [" x", " y"])
    ]
    assert about["tokens in all"] == 2 * sum(tokens)
    assert sum(row[3] for row in about["histogram"]) == 6


# The histogram


@pytest.mark.parametrize("lengths", [
    [7], [0], [0, 0, 1], [5] * 99, [1, 2], [100, 101, 102], [0, 1_000_000],
    [*range(1, 400)], [3] * 500 + [90_000],
])  # fmt: skip
@pytest.mark.parametrize("limit", [0, 1, 7, 100, 512, 10**7])
def test_every_length_is_in_one_bar(capsys, lengths, limit):
    terminal.show_histogram("tokens", np.array(lengths), limit)
    out = capsys.readouterr().out
    about = parse_report(f"x: {len(lengths)} examples\n{out}")["x"]
    assert about["histogram of"] == "tokens"
    check_histogram(about, lengths, limit)


def test_bars_of_a_heavy_tail(capsys):
    """Rows of equal width would put all but one into the first."""
    terminal.show_histogram("characters", np.array([10] * 300 + [40] * 150 + [10_000]))
    rows = parse_report(f"x: 1 examples\n{capsys.readouterr().out}")["x"]["histogram"]
    assert len(rows) == 10 and [row[3] for row in rows] == [300, 0, 150, *[0] * 6, 1]
    assert [len(row[2]) for row in rows] == [40, 0, 20, *[0] * 6, 1]


def test_without_a_tokenizer_the_bars_are_of_characters(report, tmp_path):
    """Of the whole file, though no more than a sample would be encoded; of a ranking's longest."""
    rows = [{"prompt": "abc", "responses": ["x", "y" * (n % 9 + 2), "z"]} for n in range(40)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    about = parse_report(report(path, "--max_length=5", "--max_prompt_length=2").out)[path]
    assert about["histogram of"] == "characters"
    check_histogram(about, [3 + n % 9 + 2 for n in range(40)], 0)


# The rows that can be used


@pytest.mark.parametrize("name", ["kept.jsonl", "kept.jsonl.gz"])
def test_out_writes_the_rows_that_can_be_used(report, tmp_path, name):
    """As they came, of all files, with duplicates; half a surrogate in another field stays."""
    good = [
        PAIR | {"id": 7, "note": "Ünï 😀"},
        PAIR,
        PAIR,
        {"messages": turns("u: a | a: b"), "x": None},
        PAIR | {"source": "cut \ud83d", "score": 1.5},
    ]
    bad = [PAIR | {"rejected": None}, PAIR | {"chosen": " cut \ud83d"}, {"prompt": "a"}]
    one = write_jsonl(tmp_path / "a.jsonl", [good[0], bad[0], good[1], bad[1]])
    two = write_jsonl(tmp_path / "b.jsonl", [*bad, *good[2:]])
    held_out = write_jsonl(tmp_path / "e.jsonl", [PAIR])
    out = report(one, two, f"--eval={held_out}", f"--out={tmp_path / name}").out
    assert out.endswith(f"\n{tmp_path / name}: 5 rows, 5 left out\n")
    assert "  2 unusable" in out and "  3 unusable" in out
    assert [row for _, row in data.read_jsonl(str(tmp_path / name))] == good
    raw = (tmp_path / name).read_bytes()
    text = gzip.decompress(raw) if name.endswith(".gz") else raw
    assert "Ünï 😀".encode() in text and text.count(b"\n") == 5
    report(tmp_path / name)
    again = report(tmp_path / name, f"--out={tmp_path / 'again.jsonl'}").out
    assert again.endswith("5 rows, 0 left out\n")
    assert (tmp_path / "again.jsonl").read_bytes() == text
    report(one, f"--eval={two}", f"--out={tmp_path / name}", expect=2)  # those stay unusable


def test_out_is_a_file_of_its_own(report, tmp_path, monkeypatch):
    """Nothing that is read is overwritten, by whatever name; nor what is no file."""
    path = write_jsonl(tmp_path / "a.jsonl", [PAIR, {"prompt": 3}])
    held_out, before = (
        write_jsonl(tmp_path / "e.jsonl", [PAIR]),
        (tmp_path / "a.jsonl").read_bytes(),
    )
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "b.jsonl.new").write_bytes(before)
    monkeypatch.chdir(tmp_path)
    for files, out in (
        ([path], path), ([path], "a.jsonl"), ([path], "link.jsonl"), (["link.jsonl"], path),
        ([path, f"--eval={held_out}"], "e.jsonl"), ([path], tmp_path), ([path], "/dev/null"),
        (["b.jsonl.new"], "b.jsonl"),
    ):  # fmt: skip
        result = report(*files, f"--out={out}", expect=2)
        message = f"data.py: --out={out} must be a file of its own: give another name\n"
        assert result.err == message and result.out == ""
    for out in ("none/x.jsonl", "a.jsonl/x.jsonl"):
        result = report(path, f"--out={out}", expect=2)
        assert result.err.startswith(f"data.py: {out}: cannot be written (")
        assert result.err.count("\n") == 1
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl.new").read_bytes() == before


def test_out_leaves_no_half_file(report, tmp_path):
    """Where the doctor stops, what was there before stays."""
    good = write_jsonl(tmp_path / "good.jsonl", [PAIR] * 9)
    (tmp_path / "bad.jsonl").write_text(json.dumps(PAIR) + "\n{\n")
    (tmp_path / "kept.jsonl").write_text("before")
    report(good, tmp_path / "bad.jsonl", f"--out={tmp_path / 'kept.jsonl'}", expect=2)
    assert (tmp_path / "kept.jsonl").read_text() == "before"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"good.jsonl", "bad.jsonl", "kept.jsonl"}


def test_a_terminal_without_the_characters(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    out = run_script("data.py", write_jsonl(tmp_path / "x.jsonl", [PAIR])).stdout
    assert "\\u2588" * 40 + " 1" in out
