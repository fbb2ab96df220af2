"""From the rows of files to batches, against a plain re-computation from what made the rows.

The rows are random, but the same in every run; RANDOM_CASES=5000 in the environment makes so many
mixtures of files, others in each run. A case that fails is named in what is printed.
"""

import dataclasses
import gzip
import io
import json
import math
import os
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece
from conftest import random_dataset, save_tokenizer, sequences, turns, write_jsonl

import data
import train
from extra import chat, encoded

BOS, EOS = 1, 2
NAN = math.nan


class Draw(random.Random):
    """Random choices of one case."""

    def chance(self, of: int) -> bool:
        """Once in so many times."""
        return self.randrange(of) == 0

    def text(self) -> str:
        kind = self.randrange(3)
        if kind == 0:
            return self.choice(OFTEN)
        if kind == 1:
            return "".join(self.choices(FRAGMENTS, k=self.randint(1, 5)))
        return "".join(chr(self.choice(LETTERS)) for _ in range(self.randint(0, 6)))

    def said(self) -> str:
        """A text that opens no turn of a transcript."""
        while True:
            text = self.text()
            if "\n\nHuman:" not in text and "\n\nAssistant:" not in text:
                return text

    def ids(self) -> list[int]:
        return self.choices(range(400), k=self.randint(1, 6))

    def quarters(self) -> float:
        """A number that float32 holds exactly."""
        return self.randint(-16, 16) / 4


def cases(count: int):
    """So many cases, the same in each run; with RANDOM_CASES so many new ones. Each is named."""
    new = int(os.environ.get("RANDOM_CASES", "0"))
    first = random.SystemRandom().randrange(10**9) if new else 0
    for seed in range(first, first + (new or count)):
        print(f"case {seed}")
        yield Draw(seed)


# Text → ids, by the sentencepiece library and three hand-written renderings of conversations

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}<<{{ m.content }}>>{% endif %}{% endfor %}"
)
IM_START, IM_END = 900, 901  # beside the model's own pieces
ADDED = {str(IM_START): {"content": "<|im_start|>"}, str(IM_END): {"content": "<|im_end|>"}}
CONFIGS = {
    "plain": {},
    "chatml": {"chat_template": CHATML, "added_tokens_decoder": ADDED, "eos_token": "<|im_end|>"},
    "chatml without bos": {
        "chat_template": CHATML,
        "added_tokens_decoder": ADDED,
        "add_bos_token": False,
    },
    "inst": {"chat_template": INST, "add_bos_token": False},  # it writes its own
}


class Spelling:
    """What a text or a conversation is as ids; without data.py and without templates."""

    MARK = "\x02"  # in no piece, so that nothing merges with it

    def __init__(self, tokenizer: data.Tokenizer, style: str):
        self.tokenizer, self.style = tokenizer, style
        self.library = sentencepiece.SentencePieceProcessor(str(tokenizer.path))
        pieces = map(self.library.id_to_piece, range(self.library.vocab_size()))
        assert not any(self.MARK in piece for piece in pieces)
        self.lead = self.library.encode(self.MARK)

    def begins(self, text: str) -> list[int]:
        return self.library.encode(text)

    def continues(self, text: str) -> list[int]:
        ids = self.library.encode(self.MARK + text)
        assert ids[: len(self.lead)] == self.lead
        return ids[len(self.lead) :]

    def ids(self, parts: list, place: str = "inside") -> list[int]:
        """Of texts and control ids; texts side by side are one text, and one at the beginning or
        after a control token gets a space, unless it has one."""
        joined = []
        for part in parts:
            if part == "":
                continue
            if isinstance(part, str) and joined and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        found = []
        for part in joined:
            if isinstance(part, int):
                found.append(part)
                place = "begins"
            elif place == "begins" and not part.startswith(" "):
                found += self.begins(part)
            else:
                found += self.continues(part)
        return found

    def opening(self) -> list:
        """What stands before an answer."""
        if self.style == "plain":
            return ["\n\nAssistant:"]
        return [] if self.style == "inst" else [IM_START, "assistant\n"]

    def answer(self, content: str) -> list:
        """An answer, with the token that ends it."""
        chatml = self.style.startswith("chatml")
        return [content, IM_END] if chatml else [" ", content, EOS]

    def after(self) -> list:
        """What stands after an answer's end."""
        return ["\n"] if self.style.startswith("chatml") else []

    def turn(self, turn: dict) -> list:
        """A whole turn that is only read."""
        role, content = turn["role"], turn["content"]
        if role == "assistant":
            return [*self.opening(), *self.answer(content), *self.after()]
        if self.style == "plain":
            return [{"user": "\n\nHuman: ", "system": ""}[role], content]
        if self.style == "inst":
            return [f"[INST] {content} [/INST]" if role == "user" else f"<<{content}>>"]
        return [IM_START, f"{role}\n{content}", IM_END, "\n"]

    def conversation(self, prompt: list[dict], responses: list[list[dict]]) -> list[list[int]]:
        answered = all(r[0]["role"] == "assistant" for r in responses if r)
        parts = [part for turn in prompt for part in self.turn(turn)]
        parts += self.opening() if answered else []
        bos = [] if self.style.startswith("chatml") else [BOS]  # the templates write it
        tree = [bos + self.ids(parts, "begins")]
        for response in responses:
            place = "begins" if parts and isinstance(parts[-1], int) else "inside"
            tree.append(self.response(response, answered, place) if response else [])
        return tree

    def response(self, response: list[dict], opened: bool, place: str) -> list[int]:
        """~id of what is read: the users' turns, and what stands before an answer."""
        ids, read = [], []
        for turn in response:
            if turn["role"] != "assistant":
                read += self.turn(turn)
                continue
            read += [] if opened else self.opening()
            ids += [~i for i in self.ids(read, place)]
            place = "begins" if read and isinstance(read[-1], int) else "inside"
            said = self.ids(self.answer(turn["content"]), place)
            ids += [~i for i in said] if turn.get("train") is False else said
            read, opened, place = self.after(), False, "begins"  # every answer ends in a token
        return ids

    def tree(self, prompt, responses) -> list[list[int]]:
        """[prompt, response, …] before any cut."""
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            return [prompt, *responses]
        if isinstance(prompt, list):
            return self.conversation(prompt, responses)
        spell = self.continues if prompt else self.begins
        end = IM_END if self.style == "chatml" else EOS  # its eos_token
        return [[BOS, *self.begins(prompt)], *([*spell(r), end] if r else [] for r in responses)]


def make_tokenizer(style: str, directory: Path) -> data.Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(FRAGMENTS * 20), model_writer=model, model_type="bpe", vocab_size=400,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    if CONFIGS[style]:
        (directory / "tokenizer_config.json").write_text(json.dumps(CONFIGS[style]))
    return data.Tokenizer(directory)


@pytest.fixture(scope="module")
def spellings(tmp_path_factory) -> dict[str, Spelling]:
    made = {style: make_tokenizer(style, tmp_path_factory.mktemp("t")) for style in CONFIGS}
    return {style: Spelling(tokenizer, style) for style, tokenizer in made.items()}


# Rows of every format, and what each of them says

FRAGMENTS = [
    "the film ", "was great", " and slow", " ", "  ", "\n", "\n\n", "Human:", "\n\nHuman", "\nHuman: ", "x\n\n Human: y",
    "Assistant", "\n\nAssistant says: ", "</s>", "<s>", "<unk>", "<|im_end|>\n", "<|im_start|>user", "[INST] ", "Ünï",
    "日本", "😀", "é", "2+2=4", "\t", "<", ">", "\u200b", "\r\n", "\x00", "a", "b",
]  # fmt: skip
OFTEN = ["", "a", "b", " a", "the film", "2+2=4 2+2=4 a", "2+2=4 2+2=4 b"]
LETTERS = [
    *range(300),
    *range(0x4E00, 0x4E20),
    *range(0x1F600, 0x1F620),
    0x200D,
    0xFFFD,
    0xFFFE,
    0xD7FF,
]


class Row(NamedTuple):
    """A line of a file, and the example that it is."""

    row: dict
    prompt: str | list
    responses: list
    weight: float = 1.0
    label: float = 1.0
    margin: float = NAN
    repeated: bool = False  # the prompt was taken out of its responses
    tie: bool = False  # left out where something is to be learnt


def unrepeated(prompt, responses: list):
    """Several texts that all begin with the prompt lose it, but not the beginning of a word."""
    if not isinstance(prompt, str) or prompt.strip() == "":
        return responses, False
    rests = []
    for response in responses:
        if response[: len(prompt)] != prompt:
            return responses, False
        rests.append(response[len(prompt) :])
        if rests[-1] and prompt[-1].isalnum() and rests[-1][0].isalnum():
            return responses, False
    return rests, True


def with_facts(draw, row: dict, prompt, responses) -> Row:
    """The row with numbers beside it, or without; perhaps with a system message of no text."""
    row, repeated = dict(row), False
    if len(responses) > 1 and ("chosen" in row or "responses" in row):
        responses, repeated = unrepeated(prompt, responses)
    made = add_facts(draw, row, prompt, responses)
    beside = "system" in made.row and "prompt" in made.row and "candidates" not in made.row
    if beside and isinstance(prompt, str) and prompt:
        said = [[assistant(response)] for response in made.responses]
        made = made._replace(prompt=[user(prompt)], responses=said)
    return made._replace(repeated=repeated)


def add_facts(draw, row: dict, prompt, responses) -> Row:
    weight, label, margin = 1.0, 1.0, NAN
    choice = draw.randint(0, 3)
    if choice == 1:
        row["weight"] = weight = draw.randint(0, 8) / 4
    if choice == 2:
        row["weight"] = None
    if choice == 3:
        row |= draw.choice([{"id": 7}, {"system": "", "tools": None}, {"score": -3}])
    if len(responses) != 2:  # then they are other fields
        row |= draw.choice([{}, {"score_chosen": "A", "score_rejected": None}])
        if len(responses) == 1:
            row |= draw.choice([{}, {"soft_label": 9, "margin": "wide"}])
        return Row(row, prompt, responses, weight)
    if draw.chance(2):
        row["soft_label"] = label = draw.randint(0, 8) / 8
    known = draw.randint(0, 4)
    if known in (1, 2):
        scores = draw.quarters(), draw.quarters()
        row["score_chosen"], row["score_rejected"] = scores
        margin = scores[0] - scores[1]
    if known in (2, 3):
        row["margin"] = margin = draw.quarters()
    if known == 4:
        row |= {"score_chosen": 1.5, "score_rejected": "none"}
    return Row(row, prompt, responses, weight, label, margin)


def compared(draw, row: dict, prompt, responses, margin: float) -> Row:
    """A row of which a field says which is better, and by how much; 0 is a tie, unless it has a
    soft label."""
    made = with_facts(draw, row, prompt, responses)
    if math.isnan(made.margin):
        made = made._replace(margin=margin)
    return made._replace(tie=margin == 0 and "soft_label" not in made.row)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def draw_history(draw, with_system: bool) -> list[dict]:
    """Turns that end with the user's."""
    history = [system(draw.said())] if with_system else []
    history.append(user(draw.said()))
    for _ in range(draw.randint(0, 2)):
        history += [assistant(draw.said()), user(draw.said())]
    return history


def draw_rest(draw) -> list[dict]:
    """Turns after the user's, most often the assistant's at once."""
    rest = [user(draw.said())] * draw.chance(6) + [assistant(draw.said())]
    if draw.randint(0, 2) == 0:
        rest += [user(draw.said()), assistant(draw.said())]
    if draw.randint(0, 3) == 0:
        rest += [user(draw.said())]
    return rest


def split_conversations(chosen: list[dict], rejected: list[dict]):
    """What both begin with, and the rest of each, which has a turn at least."""
    chosen, rejected = list(chosen), list(rejected)
    for talk in (chosen, rejected):
        while talk[-1]["role"] != "assistant":
            del talk[-1]
    shared = 0
    while shared < len(chosen) - 1 and shared < len(rejected) - 1:
        if chosen[shared] != rejected[shared]:
            break
        shared += 1
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def plain_pair(draw) -> Row:
    prompt, chosen, rejected = draw.text(), draw.text(), draw.text()
    if draw.chance(5):
        chosen, rejected = prompt + chosen, prompt + draw.choice(["", " ", "\n"]) + rejected
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return with_facts(draw, row, prompt, [chosen, rejected])


def pair_of_ids(draw) -> Row:
    prompt, chosen, rejected = draw.ids(), draw.ids(), draw.ids()
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return with_facts(draw, row, prompt, [chosen, rejected])


def hh(draw) -> Row:
    history = draw_history(draw, False)
    if len(history) > 2 and draw.chance(2):  # they part at the user's turn
        talks = [[*history[:-1], user(draw.said()), *draw_rest(draw)] for _ in range(2)]
    else:
        talks = [history + draw_rest(draw) for _ in range(2)]
    row = {}
    for name, talk in zip(("chosen", "rejected"), talks):
        row[name] = ""
        for turn in talk:
            row[name] += "\n\n" + {"user": "Human:", "assistant": "Assistant:"}[turn["role"]]
            space = turn["content"][:1] == " " or draw.randint(0, 4)
            row[name] += " " * bool(space) + turn["content"]
    return with_facts(draw, row, *split_conversations(*talks))


def ultrafeedback(draw) -> Row:
    history = draw_history(draw, draw.chance(2))
    chosen, rejected = (history + draw_rest(draw) for _ in range(2))
    row = {"prompt": draw.text(), "chosen": chosen, "rejected": rejected}
    if draw.chance(2):
        row["prompt"] = None
    return with_facts(draw, row, *split_conversations(chosen, rejected))


def prompt_of_messages(draw) -> Row:
    """The answers alone, or after all or the end of the prompt, or after more than it."""
    history = draw_history(draw, draw.chance(2))
    answers = [draw.said(), draw.said()]
    row = {"prompt": history}
    if history[0]["role"] == "system" and draw.chance(2):
        row["prompt"] = history[1:2]
        row |= {"chosen": [*history, assistant(answers[0])]}
        row |= {"rejected": [*history, assistant(answers[1])]}
    elif draw.chance(2):
        row |= {"chosen": answers[0], "rejected": answers[1]}
    else:
        first = int(history[0]["role"] == "system")  # after the system's turn, or all
        start = draw.randint(first, len(history))
        row |= {"chosen": [*history[start:], assistant(answers[0]) | {"id": 1}]}
        row |= {"rejected": [*history, assistant(answers[1])]}
    return with_facts(draw, row, history, [[assistant(answers[0])], [assistant(answers[1])]])


def text_then_messages(draw) -> Row:
    prompt, chosen, rejected = draw.text(), [assistant(draw.text())], [assistant(draw.text())]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return with_facts(draw, row, [user(prompt)], [chosen, rejected])


def question(draw) -> Row:
    """Orca, distilabel, Alpaca: texts of a chat, a system message beside them."""
    asked, good, bad = draw.said() or "q", draw.said(), draw.said()
    name = draw.choice(["question", "instruction", "input"])
    made = with_facts(draw, {name: asked, "chosen": good, "rejected": bad}, [user(asked)],
                      [[assistant(good)], [assistant(bad)]])  # fmt: skip
    if draw.chance(2):
        brief = draw.said()
        before = [system(brief)] if brief else []
        made = made._replace(row=made.row | {"system": brief}, prompt=before + made.prompt)
    return made


def history_beside(draw) -> Row:
    """axolotl, LlamaFactory, OpenAI: the last turns, and what was before them in another field."""
    history = draw_history(draw, draw.chance(2))
    good, bad = assistant(draw.said()), assistant(draw.said())
    way = draw.randint(0, 2)
    if way == 0:
        row = {"messages": history, "chosen": draw.choice([good, [good], good["content"]])}
        row["rejected"] = [bad] if isinstance(row["chosen"], dict | list) else bad["content"]
    elif way == 1:
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        share = lambda turn: {"from": names[turn["role"]], "value": turn["content"]}
        row = {"conversations": list(map(share, history))}
        row |= {"chosen": share(good), "rejected": share(bad)}
    else:
        row = {"input": {"messages": history}, "preferred_output": [good]}
        row["non_preferred_output"] = [bad]
    return with_facts(draw, row, history, [[good], [bad]])


def swift(draw) -> Row:
    """ms-swift: the chosen answer ends the messages (which for SFT are learnt whole)."""
    history, good, bad = draw_history(draw, draw.chance(2)), draw.said(), draw.said()
    row = {"messages": [*history, assistant(good)], "rejected_response": bad}
    return with_facts(draw, row, history, [[assistant(good)], [assistant(bad)]])


def strength(draw) -> Row:
    """HelpSteer, webgpt: by how much one is better."""
    asked, first, second = draw.said(), draw.said(), draw.said()
    by = draw.randint(-3, 3)
    if draw.chance(2):
        row = {
            "prompt": asked,
            "response_1": first,
            "response_2": second,
            "preference_strength": by,
        }
    else:
        row = {"question": {"full_text": asked}, "answer_0": first, "answer_1": second}
        row |= {"score_0": 0.25, "score_1": 0.25 + by}
    best_first = [second, first] if by > 0 else [first, second]
    return compared(draw, row, [user(asked)], [[assistant(a)] for a in best_first], abs(by))


def arena(draw) -> Row:
    """Of one turn or of two; a tie is no margin."""
    asked, answers = [draw.said(), draw.said()], {s: [draw.said(), draw.said()] for s in "ab"}
    count, won = draw.randint(1, 2), draw.choice("abt")
    talk = lambda s: [t for q, a in zip(asked[:count], answers[s]) for t in (user(q), assistant(a))]
    if draw.chance(2):
        row = {"prompt": json.dumps(asked[:count])}
        row |= {f"response_{s}": json.dumps(answers[s][:count]) for s in "ab"}
        row |= {"winner_model_a": int(won == "a"), "winner_model_b": int(won == "b")}
        row |= {"winner_tie": int(won == "t")}
    else:
        row = {f"conversation_{s}": talk(s) for s in "ab"}
        row |= {"winner": {"a": "model_a", "b": "model_b", "t": "tie (bothbad)"}[won]}
    talks = [talk("b"), talk("a")] if won == "b" else [talk("a"), talk("b")]
    return compared(draw, row, *split_conversations(*talks), 0 if won == "t" else NAN)


def ranks(draw) -> Row:
    """Nectar: in any order."""
    asked, answers = draw.said(), [draw.said() or "a" for _ in range(draw.randint(2, 4))]
    listed = [{"answer": answer, "rank": n + 1.0} for n, answer in enumerate(answers)]
    draw.shuffle(listed)
    row = {"prompt": f"\n\nHuman: {asked}\n\nAssistant: ", "answers": listed}
    return with_facts(draw, row, [user(asked)], [[assistant(answer)] for answer in answers])


def stack_exchange(draw) -> Row:
    question, good, bad = draw.text(), draw.text(), draw.text()
    row = {"qid": 1, "question": question, "response_j": good, "response_k": bad}
    return with_facts(draw, row, "Question: " + question + "\n\nAnswer:", [" " + good, " " + bad])


def shp(draw) -> Row:
    history, good, bad = draw.text(), draw.text(), draw.text()
    if draw.chance(2):
        row = {"human_ref_A": good, "human_ref_B": bad, "labels": 1}
    else:
        row = {"human_ref_A": bad, "human_ref_B": good, "labels": 0}
    answers = [[assistant(good)], [assistant(bad)]]
    return with_facts(draw, row | {"history": history}, [user(history)], answers)


def summarize(draw) -> Row:
    good, bad = draw.text(), draw.text()
    info = {"id": "x", "site": None}
    body = draw.choice(["post", "article"])
    info[body] = draw.text() + "p"
    prompt = f"{body.upper()}: {info[body]}\n\nTL;DR:"
    title = draw.choice(["", None, "T", "the film"])
    info["title"] = title
    if title:
        prompt = f"TITLE: {title}\n\n" + prompt
    if draw.chance(2):
        info["subreddit"] = "s"
        prompt = "SUBREDDIT: r/s\n\n" + prompt
    choice = draw.randint(0, 1)
    texts = [bad, good] if choice else [good, bad]
    row = {"info": info, "summaries": [{"text": t} for t in texts], "choice": choice}
    return with_facts(draw, row, prompt, [" " + good.lstrip(), " " + bad.lstrip()])


def several(draw, field: str, least: int) -> Row:
    """Rankings and candidates: texts, token ids, or answers to a conversation."""
    count, content = draw.randint(least, 4), draw.randint(0, 3)
    if content == 0:
        prompt, answers = draw.ids(), [draw.ids() for _ in range(count)]
        return with_facts(draw, {"prompt": prompt, field: answers}, prompt, answers)
    answers = [draw.said() or "a" for _ in range(count)]
    if count > 2 and draw.chance(2):
        answers[-1] = answers[0]
    if draw.chance(9):
        answers[draw.randrange(count)] = ""
    if content == 1:
        prompt = draw_history(draw, draw.chance(2))
        said = [[assistant(answer)] for answer in answers]
        return with_facts(draw, {"prompt": prompt, field: answers}, prompt, said)
    prompt = draw.text()
    return with_facts(draw, {"prompt": prompt, field: answers}, prompt, answers)


def ranking(draw) -> Row:
    return several(draw, "responses", 2)


def candidates(draw) -> Row:
    row = several(draw, "candidates", 1)
    facts = {name: value for name, value in row.row.items() if name in ("prompt", "candidates")}
    extra = draw.choice([{}, {"response": "x"}, {"text": "y"}])
    return Row(facts | extra, row.prompt, row.responses)


def demonstration(draw) -> Row:
    made = several(draw, "response", 1)
    row = made.row | {"response": made.row["response"][0]}
    row |= draw.choice([{}, {"chosen": "c", "rejected": "d"}, {"text": "t"}])
    for name in ("soft_label", "margin", "score_chosen", "score_rejected"):
        row.pop(name, None)
    return Row(row, made.prompt, made.responses[:1], made.weight)


def messages(draw) -> Row:
    talk = draw_history(draw, draw.chance(2)) + draw_rest(draw)
    return with_facts(draw, {"messages": talk}, *first_answers(talk))


def first_answers(talk: list[dict]):
    """The turns before the first answer, and all up to the last that says something."""
    answers = [n for n, turn in enumerate(talk) if turn["role"] == "assistant"]
    says = lambda turn: turn["content"] or turn.get("tool_calls")
    last = ([n for n in answers if says(talk[n])] or answers[:1])[-1]
    return talk[: answers[0]], [talk[answers[0] : last + 1]]


def plain_text(draw) -> Row:
    text = draw.text()
    return with_facts(draw, {"text": text}, "", [text])


def pair_with_messages(draw) -> Row:
    """As UltraFeedback-binarized has them: for SFT the messages count."""
    made = ultrafeedback(draw)
    talk = made.row["chosen"]
    return Row(made.row | {"messages": talk}, *first_answers(talk), made.weight)


def prompt_alone(draw) -> Row:
    prompt = draw.choice([draw.text(), draw.ids(), turns("s: be brief | u: hi")])
    return Row({"prompt": prompt}, prompt, [])


PAIRS = [
    plain_pair, plain_pair, pair_of_ids, hh, hh, ultrafeedback, prompt_of_messages, text_then_messages,
    stack_exchange, shp, summarize, ranking, question, history_beside, strength, arena, ranks,
]  # fmt: skip
KINDS = {
    "preferences": [*PAIRS, swift],
    "demonstrations": [*PAIRS, demonstration, messages, plain_text, pair_with_messages],
    "prompts": [*PAIRS, swift, messages, plain_text, candidates, prompt_alone],
}


def heard(responses: list) -> list:
    """Conversations' responses: an answer that says nothing is none, or not learnt before others."""
    kept = []
    for response in responses:
        if response and isinstance(response[0], dict):
            silent = [t["role"] == "assistant" and t["content"] == "" for t in response]
            told = [t | {"train": False} if s else t for t, s in zip(response, silent)]
            response = [] if silent[-1] else told
        kept.append(response)
    return kept


def mixture(draw, kind: str):
    """Rows of one or two files: [[Row, …], …]."""
    files = [[] for _ in range(draw.randint(1, 2))]
    for file in files:
        for _ in range(draw.randint(1, 6)):
            make = draw.choice(KINDS[kind])
            row = make(draw)
            file.append(row._replace(responses=heard(row.responses)))
    return files


def write_files(files: list[list[Row]], directory: str, blank: int, zipped: bool):
    """The files, joined by commas, and where each row is: file:line."""
    paths, places = [], []
    for n, rows in enumerate(files):
        path = Path(directory) / (f"{n}.jsonl.gz" if zipped and n == 0 else f"{n}.jsonl")
        lines = []
        for row in rows:
            lines += [" \t"] * blank
            lines.append(json.dumps(row.row, ensure_ascii=len(lines) % 2 == 0))
            places.append(f"{path}:{len(lines)}")
        content = "".join(line + "\n" for line in lines).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        paths.append(str(path))
    return ",".join(paths), places


def cut(tree: list[list[int]], max_length: int, max_prompt: int, counts: Counter):
    """The rules of docs/data.md, one after another; None where the example is dropped."""
    prompt, responses = tree[0], tree[1:]
    if [] in responses:
        counts["dropped: empty response"] += 1
        return None
    different = []
    for response in responses:
        if response not in different:
            different.append(response)
    if len(responses) > 1 and len(different) == 1:
        counts["dropped: identical responses"] += 1
        return None
    prompt_cut = len(prompt) > max_prompt
    if prompt_cut:
        kept = max_prompt - 1
        prompt = [prompt[0]] + (prompt[-kept:] if kept else [])
    left = [response[: max(0, max_length - len(prompt))] for response in different]
    for response in left:
        if not [i for i in response if i >= 0]:
            counts["dropped: no room for a response"] += 1
            return None
    if len({tuple(response) for response in left}) < len(left):
        counts["dropped: identical once cut"] += 1
        return None
    counts["prompts cut"] += prompt_cut
    counts["repeated responses left out"] += len(responses) - len(different)
    counts["responses cut"] += sum(a != b for a, b in zip(left, different))
    return [prompt, *left]


class Kept(NamedTuple):
    tree: list[list[int]]
    weight: float
    label: float
    margin: float
    first: int  # number of its first response in the data set


def expected_data(rows: list[Row], spelling: Spelling, limits, kind: str):
    kept, counts, first = [], Counter(examples=len(rows)), 0
    for row in rows:
        responses = row.responses[:1] if kind == "demonstrations" else row.responses
        counts["prompts taken out of responses that repeated them"] += row.repeated
        if row.tie:
            counts["dropped: tie"] += 1
            continue
        tree = cut(spelling.tree(row.prompt, responses), *limits, counts)
        if tree is not None:
            kept.append(Kept(tree, row.weight, row.label, row.margin, first))
            first += len(tree) - 1
    return kept, +counts


def notes_of(row: Row, spelling: Spelling, only: int | None):
    """What is counted of a row that is encoded, beside what was made of it."""
    names = ["<s>", "</s>"] + ["<|im_start|>", "<|im_end|>"] * spelling.style.startswith("chatml")
    if isinstance(row.prompt, list) and isinstance(row.prompt[0], dict):
        yield chat.CHATS
    elif isinstance(row.prompt, str):
        texts = row.prompt, *([] if row.tie else row.responses[:only])
        if any(name in text for name in names for text in texts):
            yield chat.SPELT


def told(i: int) -> int:
    """The token of id or ~id."""
    return ~i if i < 0 else i


def expected_batch(examples: list[Kept], reference: list[float], stand_in: bool) -> dict:
    """All that a batch holds, as lists, one example after another."""
    b = {name: [] for name in BATCH}
    trunks = []
    for example in examples:
        prompt = example.tree[0]
        start = len(b["tokens"])
        for position, token in enumerate(prompt[:-1]):
            b["tokens"].append(token)
            b["positions"].append(position)
        trunks.append((start, len(prompt) - 1))
        if len(prompt) > 1:
            b["segments"].append([0, 0, start, len(prompt) - 1])
    for example, (trunk, size) in zip(examples, trunks):
        prompt, *responses = example.tree
        first = len(b["ids"])
        for n, response in enumerate(responses):
            b["segments"].append([trunk, size, len(b["tokens"]), len(response)])
            before = prompt[-1]
            for place, i in enumerate(response):
                b["tokens"].append(before)
                b["positions"].append(len(prompt) - 1 + place)
                b["targets"].append(told(i))
                b["learnt"].append(0.0 if stand_in or i < 0 else 1.0)
                b["response"].append(first + n)
                before = told(i)
            counted = 0 if stand_in else sum(i >= 0 for i in response)
            b["lengths"].append(max(1, counted))
            b["ids"].append(example.first + n)
            b["reference"].append(reference[example.first + n])
        pairs = [(i, j) for j in range(len(responses)) for i in range(j)]
        for i, j in sorted(pairs):
            b["chosen"].append(first + i)
            b["rejected"].append(first + j)
            b["weights"].append(0.0 if stand_in else example.weight / len(pairs))
            b["labels"].append(example.label)
            b["margins"].append(example.margin)
    return b


BATCH = [field.name for field in dataclasses.fields(data.Batch) if field.name != "soft"]


def compare_batch(batch: data.Batch, expected: dict):
    for name in BATCH:
        found = getattr(batch, name).numpy()
        right = np.array(expected[name], found.dtype).reshape(-1, *found.shape[1:])
        same = np.array_equal(found, right, equal_nan=found.dtype.kind == "f")
        assert same, (name, found, right)
    assert batch.soft == any(label < 1 for label in expected["labels"])


def read_before(batch: data.Batch) -> list[list[int]]:
    """The tokens that each row attends to, its own the last: its trunk, and its segment up to it."""
    tokens, rows = batch.tokens.tolist(), [[] for _ in batch.tokens]
    for trunk, size, start, own in batch.segments.tolist():
        for row in range(start, start + own):
            assert not rows[row], "in one segment"
            rows[row] = tokens[trunk : trunk + size] + tokens[start : row + 1]
    return rows


def encode_by(way: str, examples, tokenizer, limits, directory: str):
    """data.encode alone, or as train.py does it."""
    if way == "alone":
        return data.encode(examples, tokenizer, *limits)
    if way == "ahead":
        return data.encode(encoded.encode_ahead(examples, tokenizer), tokenizer, *limits)
    return encoded.encode_once(run_at(directory), "some pairs", examples, tokenizer, *limits)


LIMITS = [(512, 256), (40, 20), (24, 12), (12, 9), (9, 4), (7, 1), (16, 15), (6, 8)]


@pytest.mark.parametrize("kind", ["preferences", "demonstrations"])
def test_every_row_reaches_its_batch(kind, spellings, tmp_path):
    """Files of all formats through the whole path: examples, ids, cuts, drops, packs, batches."""
    seen, only = Counter(), 1 if kind == "demonstrations" else None
    for draw in cases(300):
        files, limits = mixture(draw, kind), draw.choice(LIMITS)
        spelling = spellings[draw.choice(list(spellings))]
        rows = [row for file in files for row in file]
        kept, counts = expected_data(rows, spelling, limits, kind)
        seen.update(counts)
        paths, places = write_files(files, tmp_path, draw.randint(0, 2), draw.chance(3))
        examples = list(data.read_examples(paths, kind))
        assert [example.where for example in examples] == places
        found = [(example.prompt, list(example.responses)) for example in examples]
        assert found == [(row.prompt, [] if row.tie else row.responses[:only]) for row in rows]
        way = draw.choice(["alone", "ahead", "once"])
        if not kept:
            with pytest.raises(data.DataError, match=f"no example is left .{len(rows)} examples"):
                encode_by(way, examples, spelling.tokenizer, limits, tmp_path)
            continue
        dataset, found = encode_by(way, examples, spelling.tokenizer, limits, tmp_path)
        if way != "alone":
            notes = (note for row in rows for note in notes_of(row, spelling, only))
            counts += Counter(n for n in notes if way == "ahead" or n != chat.CHATS)
        assert +found == counts
        assert sequences(dataset) == [ids for example in kept for ids in example.tree]
        if kind == "preferences":
            facts = np.array([example[1:4] for example in kept], np.float32)
            np.testing.assert_array_equal(dataset.facts, facts)
        check_batches(draw, dataset, kept)
    rules = ["empty response", "no room for a response"]
    if kind == "preferences":
        rules += ["identical responses", "identical once cut"]
        assert seen["repeated responses left out"] > 5
    assert min(seen[f"dropped: {rule}"] for rule in rules) > 5, "there are cases of each rule"
    assert min(seen["prompts cut"], seen["responses cut"]) > 5
    assert min(seen["prompts taken out of responses that repeated them"], seen["dropped: tie"]) > 5


def check_batches(draw, dataset: data.Dataset, kept: list[Kept]):
    """All batches of an epoch, over some ranks, in some order."""
    responses = sum(len(example.tree) - 1 for example in kept)
    reference = [0.0] * responses
    assert (len(dataset), dataset.responses()) == (len(kept), responses)
    if draw.chance(2):
        reference = [-1.5 - n for n in range(responses)]
        dataset = dataclasses.replace(dataset, reference=np.array(reference, np.float32))
    lengths = [sum(map(len, example.tree)) - 1 for example in kept]
    assert dataset.lengths.tolist() == lengths
    order = np.array(draw.sample(range(len(kept)), len(kept)), np.int64)
    world, budget = draw.randint(1, 3), draw.choice([1, 30, 80, 4096])
    ranks = data.pack(dataset.lengths, order, budget, world)
    parts = [part for rank in ranks for part in rank]
    assert sorted(e for part in parts for e in part.tolist()) == list(range(len(kept)))
    idle_parts = [part for part in parts if len(part) == 0]
    for part in [part for part in parts if len(part)] + idle_parts[:1]:
        idle = len(part) == 0
        examples = [kept[0]] if idle else [kept[e] for e in part]
        batch = data.collate(dataset, part).to("cpu")
        compare_batch(batch, expected_batch(examples, reference, idle))
        learnt = sum(i >= 0 for x in examples for response in x.tree[1:] for i in response)
        if not idle:
            assert dataset.targets(part) == learnt == int(batch.learnt.sum())
        targets, contexts = [], []
        for example in examples:
            prompt, *answers = ([told(i) for i in ids] for ids in example.tree)
            for answer in answers:
                targets += answer
                contexts += [prompt + answer[:place] for place in range(len(answer))]
        assert batch.targets.tolist() == targets
        assert read_before(batch)[-len(targets) :] == contexts, "what each is predicted from"


def test_prompts_are_taken_from_every_row(spellings, tmp_path):
    """For sampling and scoring: their ids, and those of the responses that are there."""
    for draw in cases(100):
        files, spelling = mixture(draw, "prompts"), spellings[draw.choice(list(CONFIGS))]
        rows, tokenizer = [row for file in files for row in file], spelling.tokenizer
        paths, places = write_files(files, tmp_path, 0, False)
        examples = list(data.read_examples(paths, "prompts"))
        assert [example.where for example in examples] == places
        trees = [spelling.tree(row.prompt, row.responses) for row in rows]
        assert [data.token_ids(example, tokenizer) for example in examples] == trees
        ahead = encoded.encode_ahead(examples, tokenizer)
        assert [[example.prompt, *example.responses] for example in ahead] == trees


def test_quoted_turns_open_none(spellings, tmp_path):
    """Of an HH transcript: what is no "\\n\\nHuman:" stays in the text of its turn."""
    spelling = spellings["plain"]
    quoted = (
        "He wrote Human: hi", "Human: at the beginning", "one line\nHuman: hi\nAssistant: lo", "x\n\nHuman beings",
        "x\n\nHuman : y", "x\n\n Human: y", "x\n\nhuman: y", "x\n\nHumans: y", "x\n\n\u200bAssistant: y", "x\n",
        "x\n\n", "  two spaces", " ", "", ":", "\nAssistant:", "\n\nAssistant\n\nHuman",
    )  # fmt: skip
    rows = []
    for text in quoted:
        asked = f"\n\nHuman: {text}\n\nAssistant: "
        rows.append({"chosen": f"{asked}good {text}", "rejected": f"{asked}bad {text}"})
    examples = list(data.read_preferences(write_jsonl(tmp_path / "hh.jsonl", rows)))
    dataset, counts = data.encode(examples, spelling.tokenizer, 512, 256)
    assert len(dataset) == len(quoted) and +counts == {"examples": len(quoted)}
    for e, text in enumerate(quoted):
        assert examples[e].prompt == [user(text)]
        assert examples[e].responses == ([assistant(f"good {text}")], [assistant(f"bad {text}")])
        prompt, chosen, rejected = (dataset.tokens[where].tolist() for where in dataset[e])
        assert prompt == [BOS, *spelling.begins(f"\n\nHuman: {text}\n\nAssistant:")]
        assert chosen == [*spelling.continues(f" good {text}"), EOS]
        assert rejected == [*spelling.continues(f" bad {text}"), EOS]


# Conversations


TALK = turns("s: be brief | u: hi </s> | a: lo | u: and <s>2+2? | a:  4 <|im_end|> | u: thanks")
LEARNT = {  # of its answers, in text; with the token that ends a turn
    "plain": [" lo</s>", "  4 <|im_end|></s>"],
    "chatml": ["lo<|im_end|>", " 4 <|im_end|><|im_end|>"],
    "chatml without bos": ["lo<|im_end|>", " 4 <|im_end|><|im_end|>"],
    "inst": [" lo</s>", "  4 <|im_end|></s>"],
}
WHOLE = {  # with SentencePiece's space after each control token
    "plain": "<s> be brief\n\nHuman: hi </s>\n\nAssistant: lo</s> \n\nHuman: and <s>2+2?\n\nAssistant:  4 <|im_end|></s>",
    "chatml": "<|im_start|> system\nbe brief<|im_end|> \n<|im_start|> user\nhi </s><|im_end|> \n<|im_start|> assistant\nlo<|im_end|> \n<|im_start|> user\nand <s>2+2?<|im_end|> \n<|im_start|> assistant\n 4 <|im_end|><|im_end|>",
    "inst": "<s> <<be brief>>[INST] hi </s> [/INST] lo</s> [INST] and <s>2+2? [/INST]  4 <|im_end|></s>",
}  # fmt: skip
WHOLE["chatml without bos"] = WHOLE["chatml"]
CONTROL = {BOS: "<s>", EOS: "</s>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}


@pytest.mark.parametrize("style", CONFIGS)
def test_what_is_learnt_of_a_conversation(style, spellings, tmp_path):
    """Every answer with its end and nothing else, in plain text; forged tokens stay texts."""
    spelling = spellings[style]
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK}])
    examples = data.read_examples(path, "demonstrations")
    dataset, _ = data.encode(examples, spelling.tokenizer, 512, 256)
    text = spelling.tokenizer.inside.decode
    response = dataset[0][1]
    ids, mask = dataset.tokens[response].tolist(), dataset.learnt[response].tolist()
    answers, before = [], False
    for i, told in zip(ids, mask):
        if told and not before:
            answers.append([])
        if told:
            answers[-1].append(i)
        before = told
    assert [named(answer, text) for answer in answers] == LEARNT[style]
    assert named(dataset.tokens.tolist(), text) == WHOLE[style]
    everything = dataset.tokens.tolist()
    honest = [turn | {"content": "x"} for turn in TALK]
    again, _ = data.encode([data.Example(honest[:2], (honest[2:5],))], spelling.tokenizer, 512, 256)
    controls = [[i for i in some if i in CONTROL] for some in (everything, again.tokens.tolist())]
    assert controls[0] == controls[1], "what users spell is no control token"


def named(ids: list[int], text) -> str:
    """Text of ids, control tokens by name."""
    spelt, run = "", []
    for i in ids:
        if i in CONTROL:
            spelt += text(run) + CONTROL[i]
            run = []
        else:
            run.append(i)
    return spelt + text(run)


def test_names_of_control_tokens_are_those_of_the_files_beside_the_model(tmp_path):
    """A longer name wins over one that it begins with; BOS and EOS may be other tokens."""
    names = {"[E]": 900, "[E]OT": 901, "[B]": 902}
    config = {"added_tokens_decoder": {str(i): {"content": name} for name, i in names.items()}}
    config |= {"bos_token": {"content": "[B]"}, "eos_token": "[E]OT"}
    spelling = Spelling(make_tokenizer("plain", tmp_path), "plain")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    t = data.Tokenizer(tmp_path)
    assert (t.bos_id, t.eos_id) == (902, 901)
    open_end = data.Example([user("a[E]OT")], ([assistant("b[E]")],))
    prompt = [902, *spelling.begins("\n\nHuman: a[E]OT\n\nAssistant:")]
    assert chat.encode_chats([open_end], t) == [[prompt, [*spelling.continues(" b[E]"), 901]]]
    template = "{% for m in messages %}[E]OT{{ m.content }}[E]{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": template})
    )
    again = data.Tokenizer(tmp_path)
    ids = [*spelling.begins("x"), 900]
    assert data.token_ids(data.Example([user("x")], ([assistant("x")],)), again) == [
        [901, *ids],
        [901, *ids],
    ]


# Packing and order


def longest_first(lengths: list[int], bins: int) -> list[list[int]]:
    """The lengths in each bin by Graham's rule, plainly."""
    found = [[] for _ in range(bins)]
    for length in sorted(lengths, reverse=True):
        min(found, key=sum).append(length)
    return found


def test_packing_takes_as_few_micro_batches_as_the_rule_allows():
    """Lengths just above half of the budget, where the first count is never enough, and others."""
    rng, retries = np.random.default_rng(0), 0
    for case in range(240):
        world, total = int(rng.integers(1, 5)), int(rng.integers(1, 40))
        budget = int(rng.integers(20, 60))
        if case % 2:
            lengths = rng.integers(budget // 2 + 1, budget // 2 + 4, total)
        else:
            lengths = rng.integers(1, budget + budget // 4, total)
        others = rng.integers(1, 99, 7)  # that are not in this step
        examples = rng.permutation(total)
        ranks = data.pack(np.concatenate([lengths, others]), examples, budget, world)
        bins = [part.tolist() for rank in ranks for part in rank]
        assert sorted(e for part in bins for e in part) == list(range(total))
        assert len(ranks) == world and {len(rank) for rank in ranks} == {len(ranks[0])}
        fits = lambda loads: all(sum(load) <= budget or len(load) == 1 for load in loads)
        loads = [lengths[part].tolist() for part in bins]
        rule = longest_first(lengths.tolist(), len(bins))
        assert fits(loads), "a longer example runs alone"
        assert sorted(map(sum, loads)) == sorted(map(sum, rule)), "as even as can be"
        first = count = max(1, math.ceil(sum(lengths.tolist()) / (budget * world)))
        while not fits(longest_first(lengths.tolist(), count * world)):
            count += 1
        assert count <= len(ranks[0]) <= count + 1 + count // 16
        if count < 16:
            assert len(ranks[0]) == count, "one more at a time"
        retries += len(ranks[0]) > first
    assert retries > 100


def test_a_full_micro_batch_is_within_its_budget():
    for lengths in ([7, 3], [10], [5, 5], [4, 3, 3]):
        [[part]] = data.pack(np.array(lengths), np.arange(len(lengths)), 10, 1)
        assert sorted(part.tolist()) == list(range(len(lengths)))
    one, two = data.pack(np.array([7, 3, 6, 4]), np.arange(4), 10, 2)
    assert len(one) == len(two) == 1
    assert len(data.pack(np.array([7, 3, 6, 4]), np.arange(4), 10, 1)[0]) == 2
    step = data.pack(np.array([30]), np.array([0]), 10, 3)
    assert [[part.tolist() for part in rank] for rank in step] == [[[0]], [[]], [[]]]


def test_every_seed_and_epoch_has_its_own_order():
    orders = {
        (seed, epoch): data.order_of(epoch, 50, seed) for seed in range(5) for epoch in range(5)
    }
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders.values())
    different = {tuple(order.tolist()) for order in orders.values()} | {tuple(range(50))}
    assert len(different) == 26
    for epoch in range(3):
        assert data.order_of(epoch, 50, None).tolist() == list(range(50))
    assert np.array_equal(data.order_of(3, 50, 2), orders[2, 3]), "the same again"


def test_rankings_share_the_weight_of_one_example():
    """K responses are K(K-1)/2 pairs, better before worse, whose weights sum to the example's."""
    dataset = random_dataset([[4, *[3] * count] for count in (1, 2, 3, 4, 5)])
    dataset.facts[:] = [[3.0 + e, 1 - e / 8, e / 2] for e in range(5)]
    batch = data.collate(dataset, np.array([4, 1, 0, 3, 2]))
    first = 0
    for e in (4, 1, 0, 3, 2):
        own = [i for i in range(len(batch.chosen)) if first <= batch.chosen[i] < first + e + 1]
        pairs = [(int(batch.chosen[i]) - first, int(batch.rejected[i]) - first) for i in own]
        assert pairs == [(i, j) for i in range(e + 1) for j in range(i + 1, e + 1)]
        if own:
            assert batch.weights[own].sum().item() == pytest.approx(3.0 + e, rel=1e-6)
        assert batch.labels[own].tolist() == [1 - e / 8] * len(own)
        assert batch.margins[own].tolist() == [e / 2] * len(own)
        first += e + 1
    assert len(batch.chosen) == 0 + 1 + 3 + 6 + 10 and len(batch.ids) == first == 15


# Encoded once


def small(count: int, first: int = 3) -> list[data.Example]:
    return [data.Example([first + e % 90], ([5, 2], [6 + e % 7, 2])) for e in range(count)]


def never():
    raise AssertionError("these examples must not be read")
    yield


def run_at(directory, rank: int = 0, resume=False, rendered=False, **digests) -> SimpleNamespace:
    """As much of a run as encoding looks at; digests: of its files."""
    alone = lambda work, *inputs: work(*inputs) if rank == 0 else None
    settings = SimpleNamespace(resume=resume, rendered=rendered)
    about = {"digests": {"data": "0a", "eval_data": "1b"} | digests}
    run = SimpleNamespace(out=Path(directory), settings=settings, about=about, alone=alone)
    run.watch = lambda items, *_: items
    return run


def test_what_is_encoded_is_kept_for_other_ranks_and_resumed_runs(spellings, tmp_path):
    """Each set under its name; another run encodes again."""
    tokenizer, limits = spellings["inst"].tokenizer, (24, 12)
    examples = [
        data.Example("the film", (" was great", " was slow"), "a.jsonl:1", 2.0, 0.75, 1.5),
        data.Example("x", ("", "y"), "a.jsonl:2", 3.0),
        data.Example(TALK[:2], (TALK[2:5], [assistant("no")]), "long name.jsonl.gz:1234567"),
        data.Example("a" * 40, ("b", "c"), "ä.jsonl:3"),
    ]
    sets = {
        "sft eval": examples[:2],
        "sft": examples[:1],
        "eval pairs": examples[2:],
        "pairs": examples,
    }
    fresh = {name: data.encode(some, tokenizer, *limits) for name, some in sets.items()}
    for name, some in sets.items():
        encoded.encode_once(run_at(tmp_path), name, iter(some), tokenizer, *limits)
    for rank, resume in ((0, True), (1, False), (2, True)):
        for name, (dataset, counts) in fresh.items():
            run = run_at(tmp_path, rank, resume)
            found, again = encoded.encode_once(run, name, never(), tokenizer, *limits)
            assert again == counts and counts["examples"] == len(sets[name])
            for field in ("tokens", "learnt", "offsets", "trees", "facts", "where"):
                kept, right = getattr(found, field), getattr(dataset, field)
                assert kept.dtype == right.dtype and isinstance(kept, np.memmap), field
                np.testing.assert_array_equal(kept, right)
    left = [where.decode() for where in found.where]
    assert left == ["a.jsonl:1", "long name.jsonl.gz:1234567", "ä.jsonl:3"], "one is dropped"
    place = tmp_path / "encoded" / "eval_pairs"
    noted = fresh["eval pairs"][1] + Counter({chat.CHATS: 1})
    assert +Counter(json.loads((place / "counts.json").read_text())) == noted
    names = {"tokens.npy", "learnt.npy", "offsets.npy", "trees.npy", "facts.npy", "where.npy"}
    names |= {"counts.json", "made_of.json"}
    assert {file.name for file in place.iterdir()} == names
    other, counts = encoded.encode_once(run_at(tmp_path), "pairs", small(5), tokenizer, *limits)
    assert len(other) == 5 and counts["examples"] == 5, "of a run that is not resumed"


def test_other_ranks_wait_for_the_first(tmp_path):
    first = lambda: encoded.encode_once(run_at(tmp_path), "pairs", small(3), None, 9, 8)
    run = run_at(tmp_path, rank=1)
    run.alone = lambda *_: first()
    assert len(encoded.encode_once(run, "pairs", never(), None, 9, 8)[0]) == 3


def test_a_resumed_run_encodes_what_was_made_of_something_else(spellings, tmp_path):
    """Other contents of any file, another tokenizer or another file beside it, another limit, texts
    read otherwise; what was made of the same is taken."""
    tokenizer = data.Tokenizer(save_tokenizer(spellings["plain"].tokenizer, tmp_path / "one"))
    texts = [data.Example("the film", (f" was {e}", " was bad")) for e in range(7)]
    base = {"tokenizer": tokenizer, "limits": (24, 12), "files": {}, "rendered": False}

    def count(some, resume=True, **changed) -> int:
        given = base | changed
        run = run_at(tmp_path, 0, resume, given["rendered"], **given["files"])
        given["tokenizer"].rendered = given["rendered"]
        inputs = some, given["tokenizer"], *given["limits"]
        return len(encoded.encode_once(run, "pairs", *inputs)[0])

    data.Tokenizer.train(texts, tmp_path, 280)
    other = data.Tokenizer(tmp_path)
    changes = [{"tokenizer": other}, {"limits": (25, 12)}, {"limits": (24, 11)}]
    changes += [{"limits": (12, 24)}, {"rendered": True}, {"files": {"data": "0b"}}]
    changes += [{"files": {"eval_data": "0a"}}, {"files": {"init_from": "0a"}}]
    changes += [{"files": {"data": "1b", "eval_data": "0a"}}, {"files": {"sft_data": "0a"}}]
    for name, content in (
        ("chat_template.jinja", "{{ messages[0].content }}"),
        ("tokenizer_config.json", '{"legacy": false}'),
        ("special_tokens_map.json", '{"pad_token": "</s>"}'),
        ("added_tokens.json", '{"<pad>": 5}'),
    ):
        place = save_tokenizer(tokenizer, tmp_path / f"with {name}")
        (place / name).write_text(content)
        changes.append({"tokenizer": data.Tokenizer(place)})
    assert count(texts, resume=False) == 7 and count(never()) == 7
    for n, change in enumerate(changes):
        assert count(texts[: 1 + n % 5], **change) == 1 + n % 5, change
        assert count(never(), **change) == 1 + n % 5, change
        assert count(texts) == 7 and count(never()) == 7
    assert count(never(), tokenizer=data.Tokenizer(tmp_path / "one")) == 7


def test_a_resumed_run_encodes_what_is_not_as_it_was_written(tmp_path):
    """A byte that is other, a file that is cut or gone, a manifest that is no manifest."""
    place, resumed = tmp_path / "encoded" / "pairs", run_at(tmp_path, resume=True)
    count = lambda some: len(encoded.encode_once(resumed, "pairs", some, None, 9, 8)[0])
    assert count(small(6)) == 6 and count(never()) == 6, "without any state"
    for file in sorted(place.iterdir()):
        saved = file.read_bytes()
        for damaged in (saved[:-1], saved[:-1] + bytes([saved[-1] ^ 1]), b"", None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            assert count(small(6)) == 6 and file.read_bytes() == saved, file.name
            assert count(never()) == 6
    made_of = place / "made_of.json"
    saved = json.loads(made_of.read_text())
    assert saved["files"].keys() == {file.name for file in place.iterdir()} - {"made_of.json"}
    less = {name: digest for name, digest in saved["files"].items() if name != "facts.npy"}
    for content in ([], None, {}, saved["key"], saved | {"files": less}, saved | {"key": ""}):
        made_of.write_text(json.dumps(content))
        assert count(small(6)) == 6 and json.loads(made_of.read_text()) == saved
    (place / "made_of.new").write_text("of a run that was killed")
    (place / "facts.npy").write_bytes(b"")
    assert count(small(6)) == 6 and count(never()) == 6


def test_what_was_not_finished_is_not_taken(tmp_path, monkeypatch):
    """made_of.json is written last, and what was there goes first, wherever it stops."""
    resumed = run_at(tmp_path, resume=True)
    count = lambda run, some: len(encoded.encode_once(run, "pairs", some, None, 9, 8)[0])
    written = []

    def stopped():
        yield from small(2)
        raise KeyboardInterrupt

    def up_to(number, write):
        """Does what `write` does, but for the call after so many."""

        def wrapped(*given, **options):
            if len(written) == number:
                raise KeyboardInterrupt
            written.append(given)
            return write(*given, **options)

        return wrapped

    count(run_at(tmp_path), small(5))
    with pytest.raises(KeyboardInterrupt):
        count(run_at(tmp_path), stopped())
    assert count(resumed, small(4)) == 4 and count(resumed, never()) == 4
    for number in range(len(encoded.FILES) + 2):
        assert count(run_at(tmp_path), small(5)) == 5
        written.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            names = "write_text", "write_bytes", "replace"
            for place, name in ((np, "save"), *((Path, name) for name in names)):
                patch.setattr(place, name, up_to(number, getattr(place, name)))
            count(run_at(tmp_path), small(5))
        assert count(resumed, small(4)) == 4, "though what there is may be whole"
        assert count(resumed, never()) == 4


def test_files_of_many_blocks_keep_their_order(spellings, monkeypatch):
    """Thousands of examples are encoded at a time: none is lost, doubled or moved."""
    tokenizer, calls = spellings["plain"].tokenizer, []
    examples = small(8195)
    for e in range(0, 8195, 1000):
        examples[e] = data.Example("the film", (f" {e}", "x"))
        examples[e + 1] = data.Example([user(f"{e}")], ([assistant("y")],))
    alone = [data.token_ids(example, tokenizer) for example in examples]
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda *a, **k: calls.append(a) or encode(*a, **k))
    ahead = encoded.encode_ahead(iter(examples), tokenizer)
    assert [[example.prompt, *example.responses] for example in ahead] == alone
    assert len(calls) < 20, "in lists, which SentencePiece encodes on all cores"


# The tokenizer


def test_a_continuation_is_encoded_as_it_stands(tmp_path):
    """Also by models that remove spaces: none of a response is removed or added."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the film was great"] * 20), model_writer=model, model_type="bpe",
        vocab_size=300, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=True,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    t = data.Tokenizer(tmp_path)
    for text in (" was", "was", "  the   film ", " ", "a  b", "\nthe film"):
        ids = t.encode(text, continuation=True)
        assert t.decode(ids, continuation=True) == text
        assert t.decode([*ids, t.vocab_size, 10**6], continuation=True) == text
        assert t.encode([text, "x"], continuation=True)[0] == ids
    assert t.decode(t.encode("  the   film ")) == "the film", "as the model wants it"


def test_a_trained_tokenizer_has_seen_every_text(tmp_path):
    """Prompts, all responses, every turn; its size is what was asked for; no text is lost."""
    marks = "☃☄★☆♠♣♥♦♪♫"
    rows = [
        {"prompt": "☃ the film", "chosen": "☄ was great", "rejected": "★ was slow"},
        {"prompt": "p", "responses": ["a", "b", "☆ and slow"]},
        {"messages": turns("s: ♠ brief | u: ♣ hi | a: ♥ lo | u: ♦ more | a: ♪ end")},
        {"text": "♫ text alone"},
        {"prompt": [5], "chosen": [6], "rejected": [7]},
    ]
    pairs = write_jsonl(tmp_path / "x.jsonl", [*rows[:2], rows[4]] * 3)
    others = write_jsonl(tmp_path / "y.jsonl", rows[2:4] * 3)
    examples = list(data.read_preferences(pairs))
    examples += data.read_examples(others, "demonstrations")
    examples += [data.Example(text, ()) for text in FRAGMENTS]
    tokenizers = {}
    for size in (320, 360):
        (tmp_path / str(size)).mkdir()
        data.Tokenizer.train(iter(examples), tmp_path / str(size), size)
        tokenizers[size] = data.Tokenizer(tmp_path / str(size))
        assert tokenizers[size].vocab_size == size
    t = tokenizers[360]
    for mark in marks:
        assert t.start.piece_to_id(mark) != t.start.unk_id(), f"{mark} was seen"
    learnt = [i for i in range(360) if not (t.start.is_byte(i) or t.start.is_control(i)) and i]
    scores = [t.start.get_score(i) for i in learnt]
    assert scores == [-float(n) for n in range(len(learnt))], "BPE, whose merges are in order"
    assert (t.start.bos_id(), t.start.eos_id(), sum(map(t.start.is_byte, range(360)))) == (
        1,
        2,
        256,
    )

    for draw in cases(300):
        text = draw.text() + draw.text()
        for tokenizer in tokenizers.values():
            ids = tokenizer.encode(text, continuation=True)
            assert tokenizer.decode(ids, continuation=True) == text
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert not {0, BOS, EOS} & set(ids)


# What a run reads


def test_a_run_reads_each_file_for_its_purpose(spellings, tmp_path, capsys):
    """Pairs, evaluation pairs and demonstrations, cut as the settings say, counted in a line."""
    pair = lambda a, b, c: {"prompt": a, "chosen": b, "rejected": c}
    files = {
        "data": [pair("the film", " was", " is"), pair("x" * 30, " a", " b"), pair("q", "", "c")],
        "eval_data": [pair("a b", " yes", " no")],
        "sft_data": [{"prompt": "show", "response": " me 123 456 789 012 345 678 901"}],
    }
    paths = {name: write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}
    spelling, out = spellings["plain"], tmp_path / "out"
    common = {"tokenizer": str(spelling.tokenizer.path), "out_dir": str(out)}
    common |= {"max_length": 20, "max_prompt_length": 8}

    def load(**changes):
        run = train.Run(train.Settings(**common | changes))
        tokenizer, sets = train.load_data(run)
        return tokenizer, {name: sequences(dataset) for name, dataset in sets.items()}

    def trees(name: str, count: int) -> list[list[int]]:
        found = []
        for row in files[name]:
            names = ("chosen", "rejected") if "chosen" in row else ("response",)
            tree = spelling.tree(row["prompt"], [row[n] for n in names][:count])
            found += cut(tree, 20, 8, Counter()) or []
        return found

    expected = {
        "sft": trees("sft_data", 1), "sft eval": trees("eval_data", 1), "pairs": trees("data", 2),
        "eval pairs": trees("eval_data", 2),
    }  # fmt: skip
    tokenizer, sets = load(**paths)
    assert sets == expected and tokenizer.proto == spelling.tokenizer.proto
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"sft: 1 examples, 1 responses cut in {paths['sft_data']}",
        f"sft eval: 1 examples in {paths['eval_data']}",
        f"pairs: 3 examples, 1 prompts cut, 1 dropped: empty response in {paths['data']}",
        f"eval pairs: 1 examples in {paths['eval_data']}",
    ]
    assert set(load(**paths, sft_epochs=0)[1]) == {"pairs", "eval pairs"}
    assert set(load(**paths, epochs=0)[1]) == {"sft", "sft eval"}
    assert set(load(data=paths["data"])[1]) == {"sft", "pairs"}
    assert load(data=paths["data"])[1]["sft"] == trees("data", 1), "the chosen responses"
    trained, _ = load(**paths, tokenizer="", vocab_size=290)
    assert trained.path == out / "encoded" / "tokenizer.model" and trained.vocab_size <= 290
    assert trained.start.piece_to_id("w") != 0, "of the demonstrations"
    assert trained.start.piece_to_id("x") == 0, "not of the pairs"
