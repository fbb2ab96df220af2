"""What people ran into with other programs: one test for each kind that no other file has."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import make_model, run_here, save_tokenizer, turns, write_jsonl

import data
import sample
from extra import chat, encoded, formats
from extra.checkpoints import find_tokenizer
from model import ModelConfig, save_pretrained

IM = ("<|im_start|>", "<|im_end|>")
ADDED = {str(320 + i): {"content": name, "special": True} for i, name in enumerate(IM)}
NO_THOUGHTS = (  # writes of earlier answers only what follows </think>
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content.split('</think>')[-1] "
    "if m.role == 'assistant' and not loop.last else m.content) + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
NEVER = NO_THOUGHTS.replace(" and not loop.last", "")  # nor of the last one
PHI = (  # an end of each turn, and beyond the last one that of the conversation
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else eos_token }}"
)
TALK = turns("u: a | a: <think>x</think>b | u: c | a: <think>y</think>d")


def described(tokenizer, directory, template: str | None = None, **config) -> data.Tokenizer:
    """The tokenizer with control tokens and a template of its own."""
    save_tokenizer(tokenizer, directory)
    config = {"added_tokens_decoder": ADDED, "legacy": False} | config
    config |= {"chat_template": template} if template else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return data.Tokenizer(directory)


def model_beside(directory: Path, **config) -> Path:
    save_pretrained(make_model(ModelConfig(322, 32, 48, 1, 2, 2, 16, **config)), directory)
    return directory


def learnt(example, tokenizer) -> list[str]:
    """What is learnt of each response, control tokens by name."""
    names, found = {i: name for name, i in tokenizer.control.items()}, []
    for ids in chat.encode_chats([example], tokenizer)[0][1:]:
        found.append("".join(names.get(i) or tokenizer.decode([i], True) for i in ids if i >= 0))
    return found


def test_the_doctor_looks_at_conversations_whose_thoughts_are_dropped(tokenizer, tmp_path):
    """One row of two answers becomes two sequences, which it shows and counts."""
    described(tokenizer, tmp_path / "t", NO_THOUGHTS, eos_token=IM[1])
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK}])
    told = run_here("extra/doctor.py", path, "--tokenizer", tmp_path / "t").stdout
    assert "2 sequences to learn in them" in told
    assert "<think>x</think>b⟦<|im_end|>⟧»" in told and "<think>y</think>d⟦<|im_end|>⟧»" in told


def test_thoughts_that_no_answer_would_keep_are_refused(tokenizer, tmp_path):
    t = described(tokenizer, tmp_path / "t", NEVER)
    row = {"prompt": TALK[:3], "chosen": TALK[3:], "rejected": turns("a: no")}
    with pytest.raises(data.DataError, match="f:1: the chat template leaves out what is before"):
        list(encoded.encode_ahead([formats.parse("f:1", row, "preferences")], t))
    t = described(tokenizer, tmp_path / "u", NO_THOUGHTS)
    [example] = encoded.encode_ahead([formats.parse("f:1", row, "preferences")], t)
    assert "<think>x" not in t.decode(example.prompt) and "<think>y" in t.decode(
        example.responses[0], True
    )
    opened = NO_THOUGHTS.replace("assistant\n' if", "assistant\n<think>' if")
    t = described(tokenizer, tmp_path / "v", opened)
    plain = data.Example(turns("u: a"), (turns("a: b"),), "f:1")
    with pytest.raises(
        data.DataError,
        match=r"f:1: the chat template opens answers by .*assistant\\n<think>., and then",
    ):
        chat.encode_chats([plain], t)


def test_the_end_of_a_conversation_is_not_that_of_a_turn(tokenizer, tmp_path):
    """As in Phi-3's template: the answer ends where its turn does, and so does the sampler."""
    t = described(tokenizer, tmp_path / "t", PHI)
    example = data.Example(turns("u: a"), (turns("a: b | u: c | a: d"), turns("a: </s>")))
    assert learnt(example, t) == ["b<|im_end|>d<|im_end|>", "</s><|im_end|>"]
    assert chat.stop_ids(t) == {321, t.eos_id} and len(chat.separate(example, t)) == 1


def test_an_empty_answer_at_the_end_takes_nothing_with_it(tokenizer):
    row = {"messages": turns("u: a | a: b | u: c | a: ")}
    assert formats.parse("f:1", row, "demonstrations").responses == (turns("a: b"),)
    row = {"messages": turns("u: a | a: ")}
    assert formats.parse("f:1", row, "demonstrations").responses == ([],)


def test_data_sets_that_write_their_turns_elsewhere():
    """Capybara's pairs of input and output, whole conversations beside such, tools as texts."""
    talk = turns("u: a | a: b | u: c | a: d")
    pairs = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]
    read = lambda row: formats.parse("f:1", row, "training")
    assert read({"conversation": pairs, "source": "x"})[:2] == (talk[:1], (talk[1:],))
    other = talk[:3] + turns("a: e")
    found = read({"conversation": pairs, "chosen": talk, "rejected": other})
    assert found[:2] == (talk[:3], (talk[3:], other[3:]))
    row = {"messages": talk[:1], "tools": ['{"name": "f"}'], "chosen_response": talk[1]}
    found = read(row | {"rejected_response": "no"})
    assert found[:2] == (talk[:1], (talk[1:2], turns("a: no")))
    assert found.context == {"tools": [{"name": "f"}]}


RENDERED = {
    "prompt": "<|im_start|>user\nThe film<|im_end|>\n<|im_start|>assistant\n",
    "chosen": "was great<|im_end|>\n",
    "rejected": "was bad<|im_end|>\n",
}


def test_a_run_on_rendered_texts_is_sampled_and_scored_as_it_was_trained(tokenizer, tmp_path):
    """Though no template is there; and it stops where the texts end, which EOS is not."""
    described(tokenizer, model_beside(tmp_path / "base"))
    path, out = write_jsonl(tmp_path / "x.jsonl", [RENDERED] * 4), tmp_path / "out"
    flags = ("--max_length=64", "--max_prompt_length=40", "--batch_size=4")
    run = lambda *more, out: run_here(
        "train.py", f"--data={path}", f"--init_from={tmp_path / 'base'}", f"--out_dir={out}",
        *flags, *more,
    )  # fmt: skip
    run("--rendered", f"--eval_data={path}", out=out)
    run(out=tmp_path / "as text")
    for place, rendered in ((out, True), (out / "sft", True), (tmp_path / "as text", False)):
        t = find_tokenizer(place)
        assert t.rendered is rendered and data.find_tokenizer(place).rendered is rendered
        [prompt] = data.token_ids(data.Example(RENDERED["prompt"], ()), t)
        assert (320 in prompt) is rendered
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [t.eos_id, 321]
    model, t = sample.load(out)
    assert set(model.config.eos_token_id) == {t.eos_id, 321}
    printed = run_here("sample.py", out, "--compare", out / "sft", "--score", path).stdout
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"mean log-prob {last['eval/logps/chosen']:.4f}" in printed
    shown = run_here("sample.py", out, "--prompt", RENDERED["prompt"], "--max_new_tokens=3").stdout
    assert RENDERED["prompt"] in shown
    # Without a run.json of its own texts are texts.
    (out / "run.json").unlink()
    assert not find_tokenizer(out).rendered


def test_ends_are_written_where_no_file_has_any(tokenizer, tmp_path):
    """A base whose config.json names no EOS, a template that ends turns by another token."""
    described(tokenizer, model_beside(tmp_path / "base"), PHI.replace("eos_token", "''"))
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": turns("u: a | a: b")}] * 2)
    run_here(
        "train.py", f"--data={path}", f"--init_from={tmp_path / 'base'}", "--epochs=0",
        f"--out_dir={tmp_path / 'out'}",
    )  # fmt: skip
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found["eos_token_id"] == [2, 321]


def test_a_bad_row_is_named_while_a_tokenizer_is_trained(tmp_path):
    """The rows are read by the library that trains it, which has sentences of its own."""
    good = {"prompt": "a", "chosen": " b", "rejected": " c"}
    path = write_jsonl(tmp_path / "x.jsonl", [good, good | {"chosen": None}])
    flags = ("--vocab_size=300", f"--out_dir={tmp_path / 'out'}")
    said = run_here("train.py", f"--data={path}", *flags, expect=2).stderr
    assert said == f"train.py: {path}:2: field 'chosen' must be text or a list, found NoneType\n"


def test_a_tokenizer_json_may_be_named_by_the_config_of_its_model(tmp_path):
    """Where tokenizer_config.json is missing, or names no EOS."""
    test_tokenizers = pytest.importorskip("test_tokenizers")
    directory = Path(test_tokenizers.make_json(tmp_path / "t", "bytes, digits, bos"))
    named = data.Tokenizer(directory)
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(data.DataError, match="names no eos_token .* nor config.json its id"):
        data.Tokenizer(directory)
    for ids in (4, [4, 2]):
        (directory / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": ids}))
        t = data.Tokenizer(directory)
        assert (t.bos_id, t.eos_id, t.names["eos_token"]) == (1, named.eos_id, "<|im_end|>")
    shutil.rmtree(directory)


SMALL = [
    "--sft_epochs=0",
    "--max_steps=1",
    "--batch_size=2",
    "--max_length=64",
    "--max_prompt_length=40",
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
}
CHAT = {"prompt": turns("u: a"), "chosen": "b", "rejected": "c"}


def test_what_sampling_does_not_hand_on_is_refused(tokenizer, tmp_path):
    """Tools are a part of the prompt; --score has them, and refuses what training refuses."""
    described(tokenizer, tmp_path / "m", NEVER, eos_token=IM[1])
    model_beside(tmp_path / "m")
    asked = write_jsonl(tmp_path / "x.jsonl", [CHAT | {"tools": [{"name": "f"}]}])
    told = run_here("sample.py", tmp_path / "m", "--prompts", asked, expect=2)
    assert "x.jsonl:1: field 'tools' is not handed on in sampling" in told.stderr
    told = run_here(
        "sample.py", tmp_path / "m", "--compare", tmp_path / "m", "--score", asked, expect=2
    )
    assert "x.jsonl:1: the chat template leaves out 'tools'" in told.stderr


def test_conversations_are_not_scored_without_a_tokenizer(tmp_path):
    model_beside(tmp_path / "m")
    path = write_jsonl(tmp_path / "x.jsonl", [CHAT])
    flags = ("--compare", tmp_path / "m", "--score", path)
    told = run_here("sample.py", tmp_path / "m", *flags, expect=2)
    assert "x.jsonl:1: text needs a tokenizer" in told.stderr


def test_a_drawn_answer_that_goes_on_keeps_its_space(tokenizer):
    from extra.reward import text_of

    ids = tokenizer.encode(" was bad ", continuation=True)
    assert text_of(tokenizer, turns("u: a"), ids) == "was bad"
    assert text_of(tokenizer, turns("u: a | a: The film"), ids) == " was bad "


def test_the_data_of_another_run_in_the_directory_says_nothing(tokenizer, tmp_path):
    """A base model gets our template with chats; not because a run before had some."""
    save_tokenizer(tokenizer, tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"legacy": false}')
    model_beside(tmp_path / "base", eos_token_id=2)
    texts = write_jsonl(
        tmp_path / "t.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2
    )
    chats = write_jsonl(tmp_path / "c.jsonl", [CHAT] * 2)
    run = lambda path, *flags: run_here(
        "train.py", f"--data={path}", f"--init_from={tmp_path / 'base'}", f"--out_dir={tmp_path / 'o'}", *SMALL, *flags
    )  # fmt: skip
    saved = lambda: json.loads((tmp_path / "o" / "tokenizer_config.json").read_text())
    run(chats, "--sft_epochs=1")
    assert saved()["chat_template"] == chat.PLAIN_TEMPLATE
    run(texts)
    assert saved() == {"legacy": False}


def test_the_ends_that_the_model_has_are_kept(tokenizer, tmp_path):
    """config.json's EOS is another than the tokenizer's: sample.py stops at both, and says so."""
    described(tokenizer, tmp_path / "base", NEVER, eos_token=IM[1])
    model_beside(tmp_path / "base", eos_token_id=7)
    path = write_jsonl(tmp_path / "c.jsonl", [CHAT] * 2)
    run_here(
        "train.py",
        f"--data={path}",
        f"--init_from={tmp_path / 'base'}",
        f"--out_dir={tmp_path / 'o'}",
        *SMALL,
    )
    ends = json.loads((tmp_path / "o" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [321, 2, 7]


def test_the_doctor_leaves_out_what_the_template_refuses(tokenizer, tmp_path):
    described(tokenizer, tmp_path / "t", NEVER, eos_token=IM[1])
    tie = {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 0}
    path = write_jsonl(tmp_path / "x.jsonl", [CHAT, {"messages": [*turns("u: a"), CALL]}, tie])
    out = tmp_path / "usable.jsonl"
    told = run_here("extra/doctor.py", path, "--tokenizer", tmp_path / "t", "--out", out)
    assert f"{out}: 2 rows, 1 left out" in told.stdout, "a tie stays"
    assert "x.jsonl:2: the chat template leaves out 'tool_calls'" in told.stderr
    assert len(out.read_text().splitlines()) == 2


def test_a_run_json_of_another_program_says_nothing(tokenizer, tmp_path):
    described(tokenizer, tmp_path / "m")
    for content in ('{"steps": 3}', "[]", "{"):
        (tmp_path / "m" / "run.json").write_text(content)
        assert find_tokenizer(tmp_path / "m").rendered is False
