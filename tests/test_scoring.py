"""A trained checkpoint at work: what --score says is what the run's evaluation said; ids in, ids
out; a run that may be stopped at any time; a tokenizer from long texts."""

import io
import itertools
import json
import random
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import SHAPES, make_model, read_metrics, run_here, turns, write_jsonl

import data
import sample
import train
from extra import reward, states
from extra.checkpoints import ends
from model import CheckpointError, load_pretrained, save_pretrained

SMALL = """--hidden_size=32 --num_layers=1 --num_heads=2 --vocab_size=300 --batch_size=4
    --log_every=1""".split()
FRUIT = [{"prompt": f"Name fruit {i}", "chosen": f" Apple {i}", "rejected": f" Brick {i}"} for i in range(8)]  # fmt: skip


# Scoring is evaluation


EVALUATION = [  # all that a run cuts, drops, weighs and counts
    *FRUIT[:5],
    FRUIT[5] | {"weight": 3, "soft_label": 0.75},
    FRUIT[6] | {"weight": 0.5, "rejected": " Apple"},
    FRUIT[7] | {"rejected": " Brick" + " and stone" * 30},  # its end is cut
    {"prompt": "Once upon a time, " * 9 + "name a fruit", "chosen": " Brick", "rejected": " Pear"},
    {"prompt": "Same", "chosen": " twin", "rejected": " twin"},
    {"prompt": "Once cut", "chosen": " and" * 60, "rejected": " and" * 61},
    {"prompt": "None", "chosen": "", "rejected": " a brick"},
    {"prompt": "None", "chosen": " a brick", "rejected": ""},
    {"prompt": "Rank", "responses": [" Brick", " Apple", " Brick", " Pear 3"], "weight": 2},
    {"prompt": "Rank", "responses": [" Apple", "", " Pear 3"]},
    {"prompt": "Two", "chosen": " Pear", "rejected": " Stone", "response": " nothing"},
    {"prompt": turns("u: Name a fruit"), "chosen": "Apple", "rejected": turns("a: Brick")},
    {"prompt": [5, 6, 7], "chosen": [8, 9, 2], "rejected": [9, 8, 2]},
]
LEFT = [*range(9), 13, 15, 16, 17]  # the rows that are not dropped


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run, and the files it was evaluated on."""
    where = tmp_path_factory.mktemp("trained")
    pairs, held_out = (
        write_jsonl(where / f"{name}.jsonl", rows)
        for name, rows in (("pairs", FRUIT * 4), ("eval", EVALUATION))
    )
    flags = [f"--data={pairs}", f"--eval_data={held_out}", f"--out_dir={where / 'out'}"]
    flags += ["--max_length=40", "--max_prompt_length=24", "--beta=0.5", "--epochs=2"]
    flags += ["--learning_rate=3e-3", "--sft_learning_rate=3e-3"]
    printed = run_here("train.py", *SMALL, *flags).stdout
    return SimpleNamespace(out=where / "out", held_out=held_out, printed=printed)


def score(out, *flags) -> list[str]:
    compared = run_here("sample.py", out, "--compare", out / "sft", *flags)
    return compared.stdout.splitlines()


def test_scoring_is_evaluation(trained, tmp_path):
    """With the run's own limits, drops, weights and β: its last row of `eval/`, to rounding, and
    the same words on what was cut and dropped."""
    told, responses, *printed = score(trained.out, "--score", trained.held_out)
    assert f"eval pairs: {told}\n" in trained.printed
    for what in ("18 examples", "1 responses cut", "2 prompts cut", "3 dropped: empty response", "1 dropped: identical once cut"):  # fmt: skip
        assert what in told.removesuffix(f" in {trained.held_out}").split(", ")
    assert responses.startswith("28 responses, mean reward -")
    rows = [row for row in read_metrics(trained.out) if "eval/rewards/ties" in row]
    before, last = rows[0], {k.removeprefix("eval/"): x for k, x in rows[-1].items()}
    percent = r"(\S+)%"
    pattern = (
        rf"accuracy {percent} ± {percent} of 13, ties {percent}, mean margin (\S+)\n"
        r"chosen: mean reward (\S+), mean log-prob (\S+)\n"
        r"rejected: mean reward (\S+), mean log-prob (\S+)"
    )
    found = re.fullmatch(pattern, "\n".join(printed[:3]))
    right, _, ties, *others = map(float, found.groups())
    assert right / 100 == pytest.approx(last["rewards/accuracies"], abs=1e-4)
    assert ties / 100 == pytest.approx(last["rewards/ties"], abs=1e-4)
    names = ["rewards/margins", "rewards/chosen", "logps/chosen", "rewards/rejected", "logps/rejected"]  # fmt: skip
    assert others == [pytest.approx(last[name], abs=2e-4) for name in names]
    assert abs(last["rewards/margins"]) > 0.5 and before["eval/rewards/ties"] == 1
    assert 0.3 < last["rewards/accuracies"] < 1


def test_a_row_is_written_for_each_row(trained, tmp_path):
    """What was dropped has null for its rewards; a repeated response has those of the first."""
    out = tmp_path / "scored.jsonl"
    *_, wrote, dropped = score(trained.out, "--score", trained.held_out, "--out", out)
    assert wrote == f"wrote 18 lines to {out}"
    assert dropped == "5 of them were dropped, and have null for rewards"
    written = [json.loads(line) for line in out.read_text().splitlines()]
    rewards = [row.pop("rewards") for row in written]
    assert written == EVALUATION
    assert [n for n, found in enumerate(rewards) if found is not None] == LEFT
    brick, _, again, _ = rewards[13]
    assert again == brick and len(set(rewards[13])) == 3
    margins, weights = [], []
    for n in LEFT:
        pairs = itertools.combinations(dict.fromkeys(rewards[n]), 2)
        margins.append(np.mean([better - worse for better, worse in pairs]))
        weights.append(EVALUATION[n].get("weight", 1))
    last = [row for row in read_metrics(trained.out) if "eval/rewards/ties" in row][-1]
    assert np.average(margins, weights=weights) == pytest.approx(last["eval/rewards/margins"], 1e-4)
    only = write_jsonl(tmp_path / "only.jsonl", EVALUATION[9:11])
    error = run_here(
        "sample.py", trained.out, "--compare", trained.out / "sft", "--score", only, expect=2
    ).stderr
    assert error.startswith(f"sample.py: {only}: nothing is left to be scored (2 examples, 1 dro")
    assert error.count("\n") == 1
    nothing = write_jsonl(tmp_path / "0.jsonl", [row | {"weight": 0} for row in FRUIT])
    assert score(trained.out, "--score", nothing)[2].startswith("accuracy 0.00% ± 0.00% of 8, ")


def test_candidates_are_cut_by_themselves(trained, tmp_path):
    """By the run's limits; equal ones, also once cut, have equal scores, and none is dropped: who
    says nothing ends at once. The ranking is one that training reads."""
    long = " and stone" * 30
    rows = [
        {"prompt": "A", "candidates": [" Brick", "", " Apple", long + "!", " Brick", long + "?"]},
        {"prompt": "A b c. " * 9, "candidates": [" Pear", " Plum", " Pear"]},
        {"prompt": "A", "response": long},
        {"prompt": "A", "candidates": [turns("u: " + "why " * 60 + "| a: so"), " Brick"]},
    ]
    rows[3]["prompt"] = turns("u: hi")
    path, out = write_jsonl(tmp_path / "x.jsonl", rows), tmp_path / "ranked.jsonl"
    told, responses, *_ = printed = score(trained.out, "--score", path, "--out", out)
    told = told.removesuffix(f" in {path}").split(", ")
    expected = "4 examples", "3 responses cut", "1 prompts cut", "1 dropped: no room for a response"
    assert sorted(told) == sorted(expected)
    assert responses.startswith("10 responses") and len(printed) == 4
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert written[3] == rows[3] | {"rewards": None}, "it has no ranking"
    ranked, rewards = written[0]["responses"], written[0]["rewards"]
    assert sorted(ranked) == sorted(rows[0]["candidates"]) and "candidates" not in written[0]
    assert rewards == sorted(rewards, reverse=True)
    of = {}
    for text, reward_ in zip(ranked, rewards):
        of.setdefault(text[:300], set()).add(reward_)
    assert {len(found) for found in of.values()} == {1} and len(of) == 4
    assert [text[-1] for text in ranked if len(text) > 300] == ["!", "?"], "their order stays"
    assert len(set(written[1]["rewards"])) == 2
    models = [load_pretrained(place) for place in (trained.out, trained.out / "sft")]
    tokenizer = data.Tokenizer(trained.out)
    for row, (prompt, *texts) in ((written[0], ("A", *ranked)), (written[2], ("A", long))):
        start, *ids = data.token_ids(data.Example(prompt, tuple(texts)), tokenizer)
        trees = [[start, (i or [tokenizer.eos_id])[: 40 - len(start)]] for i in ids]
        found = [float(r[0]) for r in reward.implicit_rewards(*models, trees, 0.5)]
        assert row["rewards"] == pytest.approx(found, abs=1e-4)
    taken = write_jsonl(tmp_path / "taken.jsonl", [written[0], FRUIT[0]])
    dataset, counts = data.encode(data.read_preferences(taken), tokenizer, 40, 24)
    assert len(dataset) == 1 and counts["dropped: empty response"] == 1


def test_without_a_run_nothing_is_cut(trained, tmp_path):
    """The limits are in run.json."""
    out = tmp_path / "out"
    shutil.copytree(trained.out, out)
    about = json.loads((out / "run.json").read_text())
    (out / "run.json").unlink()
    path = write_jsonl(tmp_path / "x.jsonl", EVALUATION[7:11])
    told = score(out, "--score", path)[0]
    assert told == f"4 examples, 1 dropped: identical responses in {path}"
    assert score(trained.out, "--score", path)[0] != told
    for name in ("max_length", "max_prompt_length"):
        settings = about["settings"].copy()
        del settings[name]
        (out / "run.json").write_text(json.dumps({"settings": settings}))
        with pytest.raises(data.DataError, match=f"run.json: no {name} can be read from it"):
            reward.limits_of(SimpleNamespace(checkpoint=out))
    (out / "run.json").write_text(json.dumps(about))
    assert reward.limits_of(SimpleNamespace(checkpoint=out)) == [40, 24]


# Ids in, ids out


IDS = [{"prompt": [5, 6, 7]}, {"prompt": [9], "response": [8, 2]}]


@pytest.fixture(scope="module")
def without_tokenizer(tmp_path_factory):
    """Two checkpoints that have none, and prompts of token ids."""
    where = tmp_path_factory.mktemp("ids")
    for n, name in enumerate(("policy", "reference")):
        torch.manual_seed(n)
        config = replace(SHAPES["tied"], eos_token_id=[2, 7, 11])
        save_pretrained(make_model(config, scale=4.0 - n).float(), where / name)
    return SimpleNamespace(
        policy=where / "policy",
        compare=f"--compare={where / 'reference'}",
        prompts=f"--prompts={write_jsonl(where / 'ids.jsonl', IDS)}",
    )


def test_ids_are_sampled_without_a_tokenizer(without_tokenizer, tmp_path):
    """As `generate` draws them, ended by what config.json names: printed, side by side, written,
    the best of several, and scored."""
    w, out, few = without_tokenizer, tmp_path / "out.jsonl", "--max_new_tokens=30"
    model, prompts = load_pretrained(w.policy), [row["prompt"] for row in IDS]
    greedy = sample.generate(model, prompts, 30, [2, 7, 11], temperature=0)
    assert any(len(ids) < 30 for ids in greedy), "one ends before"
    printed = run_here("sample.py", w.policy, w.prompts, "--temperature=0", few).stdout
    assert printed == "".join(f"\n{p}\n{ids}\n" for p, ids in zip(prompts, greedy))
    both = run_here("sample.py", w.policy, w.prompts, w.compare, few).stdout
    assert both.startswith("\n[5, 6, 7]\n[") and "reference][" in both
    run_here("sample.py", w.policy, w.prompts, "--n=20", few, "--out", out)
    drawn = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in drawn] == prompts
    several = [ids for row in drawn for ids in row["candidates"]]
    assert len(several) == 40 and all(type(i) is int for ids in several for i in ids)
    assert all(ids[-1] in (2, 7, 11) or len(ids) == 30 for ids in several)
    assert not {2, 7, 11} & {i for ids in several for i in ids[:-1]}
    assert {ids[-1] for ids in several} >= {2, 7, 11}
    ranked = tmp_path / "ranked.jsonl"
    run_here("sample.py", w.policy, w.compare, "--score", out, "--out", ranked)
    assert all(len(e.responses) == 20 for e in data.read_preferences(str(ranked)))
    best = run_here("sample.py", w.policy, w.compare, w.prompts, "--best_of=3", few).stdout
    assert re.match(r"\n\[5, 6, 7\]\n\[.*\]   \(reward ", best)
    assert "2 samples" in run_here("sample.py", w.policy, w.compare, w.prompts, "--kl", few).stdout


def test_text_is_refused_before_anything_is_printed(without_tokenizer, tmp_path):
    w, beyond = without_tokenizer, write_jsonl(tmp_path / "x.jsonl", [{"prompt": [5, 97]}])
    texts = write_jsonl(tmp_path / "y.jsonl", [*IDS, {"prompt": turns("u: hi")}])
    needs = "sample.py: a prompt: text needs a tokenizer.model; else give token ids\n"
    for flags, sentence in (
        ([w.prompts, "--prompt=Hello"], needs),
        ([f"--prompts={texts}", w.compare], needs),
        ([f"--prompts={texts}", f"--out={tmp_path / 'out'}"], needs),
        ([f"--prompts={beyond}"], "sample.py: token id 97 is beyond the model's vocabulary\n"),
    ):
        refused = run_here("sample.py", w.policy, *flags, expect=2)
        assert (refused.stdout, refused.stderr) == ("", sentence)
    path = write_jsonl(tmp_path / "z.jsonl", [{"prompt": [5], "chosen": [97, 2], "rejected": [6]}])
    refused = run_here("sample.py", w.policy, w.compare, "--score", path, expect=2)
    assert "token id 97 is beyond the model's vocabulary" in refused.stderr


@pytest.mark.parametrize(("own", "more", "expected"), [
    (None, None, None), (2, None, 2), (None, 2, [2]), (2, 2, 2), (2, [2, 7], [2, 7]), ([2], [7, 2, 9], [2, 7, 9]),
])  # fmt: skip
def test_a_generation_config_adds_its_ends(own, more, expected, tmp_path):
    """Llama 3's has three ids. The saved config.json stays what it was."""
    save_pretrained(make_model(replace(SHAPES["tied"], eos_token_id=own)), tmp_path)
    if more is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": more}))
    assert load_pretrained(tmp_path).config.eos_token_id == expected
    stops = []
    model = SimpleNamespace(config=replace(SHAPES["tied"], eos_token_id=expected))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "generate", lambda m, p, n, eos, **_: stops.append(eos) or [[2]])
        sample.draw(model, None, [[5]])
    assert stops == [{*([expected] if isinstance(expected, int) else expected or [])}]


def test_a_conversation_ends_by_all_of_them(trained):
    """What config.json names, the tokenizer's EOS and what ends a turn."""
    tokenizer, stops = data.Tokenizer(trained.out), []
    model = SimpleNamespace(config=replace(SHAPES["tied"], eos_token_id=[11, 12]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "generate", lambda m, p, n, eos, **_: stops.append(eos) or [[2]])
        sample.draw(model, tokenizer, [turns("u: hi")])
        sample.draw(model, tokenizer, ["hi"])
    assert stops == [{11, 12, tokenizer.eos_id}] * 2


@pytest.mark.parametrize("wrong", ["</s>", [2, "7"], [[2]], True])
def test_an_end_is_an_id(wrong, tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: eos_token_id .* neither an id nor"):
        ends(tmp_path / "config.json", wrong)


# --resume, always given


def test_a_run_that_may_be_stopped_says_resume_always(tmp_path, monkeypatch):
    """Its first start begins, and says so; the next continues, also from another directory, where
    the same files have other names."""
    here, there = tmp_path / "here", tmp_path / "there"
    (there / "deep").mkdir(parents=True)
    here.mkdir()
    for name in ("pairs", "eval", "sft"):
        write_jsonl(here / f"{name}.jsonl", FRUIT)
    flags = [*SMALL, "--epochs=2", "--save_every=3", "--learning_rate=1e-3"]
    files = ["--data=pairs.jsonl,./eval.jsonl", "--eval_data=eval.jsonl", "--sft_data=sft.jsonl"]
    monkeypatch.chdir(here)
    run_here("train.py", *flags, *files, "--out_dir=whole")
    begun = run_here("train.py", *flags, *files, "--out_dir=o", "--resume").stdout
    assert begun.splitlines()[0] == "o has no saved state yet: the run starts from the beginning"
    assert begun.count("no saved state") == 1 and "sft: 8 examples, steps 0 to 2" in begun
    whole, saved = ((here / out / "model.safetensors").read_bytes() for out in ("whole", "o"))
    assert saved == whole
    assert [place.name for place in states.places_in(here / "o")] == ["done-0", "dpo-6"]
    point = json.loads((here / "o" / "resume" / "dpo-6" / "point.json").read_text())
    assert point["step"] == 6 and point["cwd"] == str(here)
    assert point["settings"]["data"] == "pairs.jsonl,./eval.jsonl"
    monkeypatch.chdir(there)
    moved = [f"--data={here}/pairs.jsonl,../here/eval.jsonl", "--eval_data=../here/eval.jsonl"]
    moved += [f"--sft_data={here}/../here/sft.jsonl", "--out_dir=../here/o", "--resume"]
    for flags in (moved, ["--data=../here/eval.jsonl,../here/sft.jsonl", *moved[3:]]):
        (here / "o" / "model.safetensors").unlink()  # the other files have the same contents
        resumed = run_here("train.py", *flags).stdout
        assert "steps 6 to 8" in resumed and "no saved state" not in resumed
        assert (here / "o" / "model.safetensors").read_bytes() == whole


def test_the_same_contents_are_the_same_setting(tmp_path, monkeypatch):
    """Wherever they are, and wherever the run is resumed. Others are refused by name, and so is what
    comes, goes or has changed where it is, and a run that is not there, or not whole."""
    started, out = tmp_path / "started", tmp_path / "out"
    started.mkdir()
    (tmp_path / "link").symlink_to(started)
    rows = {"a": FRUIT[:3], "b": FRUIT[3:], "c": FRUIT[1:], "copy of c": FRUIT[1:], "d": FRUIT[2:]}
    for name, each in rows.items():
        write_jsonl(started / f"{name}.jsonl", each)
    config = replace(SHAPES["tied"], vocab_size=300)
    for name in ("base", "other"):
        save_pretrained(make_model(config), started / name)
        make_model(config)  # draws
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "base").mkdir(exist_ok=True)
        shutil.copy(started / "base" / name, tmp_path / "base")
    monkeypatch.chdir(started)
    names = ["--data=a.jsonl,b.jsonl", "--eval_data=c.jsonl", "--init_from=base"]
    train.Run(train.parse_settings([*names, f"--out_dir={out}"])).save_state("dpo", 0)
    monkeypatch.chdir(tmp_path)

    def resume(*flags) -> train.Settings:
        run = train.Run(train.parse_settings(["--resume", "--out_dir=out", *flags]))
        assert run.point["state"] == "dpo-0"
        return run.settings

    both = f"--data={started}/a.jsonl,link/b.jsonl"
    own = resume()
    assert own.data == f"{started}/a.jsonl,{started}/b.jsonl" and own.init_from == f"{started}/base"
    assert own.eval_data == f"{started}/c.jsonl" and own.sft_data == own.tokenizer == ""
    settings = resume(both, "--eval_data=./started/copy of c.jsonl", "--init_from=base")
    assert settings.eval_data == "./started/copy of c.jsonl", "as it is now"
    resume("--init_from=started/base/")
    refused = "^--resume: what --{} names is not what this run began with: begin another run, in"
    for flags in (
        [f"--data={started}/b.jsonl,{started}/a.jsonl"], [f"--data={started}/a.jsonl"],
        ["--eval_data=started/d.jsonl"],
        ["--init_from=started/other"],
    ):  # fmt: skip
        with pytest.raises(data.DataError, match=refused.format(flags[0][2:].split("=")[0])):
            resume(*flags)
    with pytest.raises(data.DataError, match="none.jsonl: --data names it, but it is not there$"):
        resume(f"--data={started}/none.jsonl")
    for flag in (
        "--eval_data=",
        "--sft_data=started/a.jsonl",
        "--init_from=",
        "--tokenizer=started",
    ):
        with pytest.raises(data.DataError, match=f"^--resume: {flag[2:].split('=')[0]} is '"):
            resume(flag)
    before = (started / "c.jsonl").read_text()
    write_jsonl(started / "c.jsonl", [*FRUIT[1:-1], FRUIT[-1] | {"id": 1}])
    with pytest.raises(data.DataError, match=refused.format("eval_data")):
        resume()
    (started / "c.jsonl").write_text(before)
    write_jsonl(started / "base" / "tokenizer_config.json", [{}])
    with pytest.raises(data.DataError, match=refused.format("init_from")):
        resume()
    (started / "base" / "tokenizer_config.json").unlink()
    resume()
    (out / "resume" / "dpo-0" / "point.json").write_text('{"stage": "d')
    sentence = (
        "^out/resume: none of the states there is whole: without --resume the run starts from"
    )
    with pytest.raises(data.DataError, match=sentence):
        resume(both)
    shutil.rmtree(out / "resume")
    with pytest.raises(data.DataError, match="^out: there is no state to resume; with --data the"):
        resume("--eval_data=c.jsonl")
    assert train.parse_settings(["--resume", "--out_dir=out", both]).data == both[7:]


def test_one_process_says_where_a_run_begins(tmp_path, monkeypatch, capsys):
    flags = ["--resume", "--data=x", f"--out_dir={tmp_path}"]
    for rank, said in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        train.parse_settings(flags)
        assert capsys.readouterr().out.count("has no saved state yet") == said


# A tokenizer from long texts


def pieces(proto: bytes) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    return [model.id_to_piece(i) for i in range(model.vocab_size())]


def trained_whole(texts: list[str], size: int, **options) -> bytes:
    """SentencePiece's own model of whole texts."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=(model := io.BytesIO()), model_type="bpe",
        vocab_size=size, byte_fallback=True, hard_vocab_limit=False, minloglevel=2, num_threads=1,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        input_sentence_size=10**6, shuffle_input_sentence=True, **options,
    )  # fmt: skip
    return model.getvalue()


def test_long_texts_train_a_tokenizer(tmp_path):
    """As if SentencePiece took texts of any length: the same pieces, none of which crosses a space
    or begins where a text was split."""
    rng = random.Random(0)
    names = "apple brick pear stone river cloud window quiet green seven".split()
    words = lambda n: "".join(
        word + rng.choice([" ", " ", "  ", "\n", " \n"])
        for word in rng.choices(names, range(10, 0, -1), k=n)
    )
    texts = ["Write."] * 6 + [words(1200) for _ in range(12)] + [words(3) + "é" * 30]
    examples = [data.Example(text, ()) for text in texts]
    data.Tokenizer.train(examples, tmp_path, 340)
    t = data.Tokenizer(tmp_path)
    found = pieces(t.proto)
    expected = pieces(trained_whole(texts, 340, max_sentence_length=10**6))
    assert sorted(found) == sorted(expected) and "▁apple" in found
    assert len(t.encode(" apple brick pear stone river cloud")) <= 8
    assert "▁apple" not in pieces(trained_whole(texts, 340)), "it leaves long texts out"


def test_a_text_without_spaces_trains_a_tokenizer(tmp_path):
    rng = random.Random(0)
    text = "".join(rng.choices(["苹果", "石头", "河流", "云", "窗"], k=20_000))
    data.Tokenizer.train([data.Example(text, ())], tmp_path, 300)
    t = data.Tokenizer(tmp_path)
    assert {"苹果", "石头", "河流"} <= set(pieces(t.proto))
    assert t.decode(t.encode(text[:3000])) == text[:3000]


def test_short_texts_train_the_tokenizer_that_they_did(tmp_path):
    """Byte for byte."""
    rng = random.Random(1)
    texts = [f"Film {n}: " + "".join(rng.choices("abc é\n  ", k=rng.randint(0, 900))) for n in range(80)]  # fmt: skip
    data.Tokenizer.train([data.Example(text, ()) for text in texts], tmp_path, 330)
    assert (tmp_path / "tokenizer.model").read_bytes() == trained_whole(texts, 330)
