"""Public data as it is distributed, a function for each format: row → (prompt, responses).

To add a format, write such a function and name its fields in the table at the end. It may return
texts, token ids, or turns; a text that follows turns becomes the assistant's.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from data import DataError, is_turns
from extra.conversations import (
    ANSWER,
    CONTENT,
    are_transcripts,
    asked,
    check,
    continued,
    conversation,
    from_json,
    is_transcript,
    normal,
    number,
    said_nothing,
    shared_history,
    short,
    transcript,
)

ANY = object
QUESTIONS = ["question", "query", "instruction", "input"]  # what a question to a chat is called
REPEATED = "prompts taken out of responses that repeated them"
OF_EQUAL_RANK = "responses of equal rank left out"


class Found(NamedTuple):
    """What a reader returns; a plain tuple of the first two will do."""

    prompt: str | list
    responses: tuple  # best first
    margin: float = math.nan  # by how much the first is better than the second; 0: neither is
    notes: tuple = ()  # see Example


def fits_none(row: dict, formats: list) -> str:
    """A row's own fields, and those of the formats."""
    own = [short(name, 40) for name in list(row)[:20]]
    own += [f"{len(row) - 20} more"] * (len(row) > 20)
    known = "; ".join(", ".join(fields) for fields, _ in formats)
    return f"has the fields {', '.join(own) or 'none'}; expected those of a format: {known}"


# Pairs: prompt, chosen, rejected, and the same under other names


def pair(row: dict):
    """prompt, chosen, rejected: texts or token ids; or messages (as UltraFeedback-binarized has
    them), where the history that both share is the prompt; or transcripts (HH), prompt or not."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if are_transcripts([chosen, rejected], prompt):
        return shared_history(transcript(chosen), transcript(rejected))
    if prompt is None and not (is_turns(chosen) and is_turns(rejected)):
        raise DataError(
            "field 'prompt' is missing, and 'chosen', 'rejected' are no transcripts of turns that "
            rf"begin '\n\nHuman:' and '\n\nAssistant:'; {fits_none(row, PREFERENCES)}"
        )
    if is_turns(chosen) and is_turns(rejected):
        if chosen[0]["role"] == "assistant":
            prompt = asked(prompt)
        if is_turns(prompt):
            chosen, rejected = (continued(prompt, turns) for turns in (chosen, rejected))
            for turns in (chosen, rejected):
                if "assistant" not in [turn["role"] for turn in turns[len(prompt) :]]:
                    raise DataError("the assistant must answer after the prompt")
        return shared_history(chosen, rejected)
    return without_prompt(prompt, (chosen, rejected))


def without_prompt(prompt, responses: tuple):
    """Responses of which each begins by repeating the prompt, as text, lose it: a guess, so it is
    counted. One of several may begin so by chance, and so may any with the beginning of a word."""
    if not isinstance(prompt, str) or not prompt.strip():
        return prompt, responses
    for response in responses:
        if not isinstance(response, str) or not response.startswith(prompt):
            return prompt, responses
        if prompt[-1].isalnum() and response[len(prompt) :][:1].isalnum():
            return prompt, responses
    return Found(prompt, tuple(r[len(prompt) :] for r in responses), notes=(REPEATED,))


def question_pair(row: dict):
    """Orca, distilabel, Alpaca, LlamaFactory: a question in a chat, chosen, rejected."""
    return pair_with(question(row), row)


def pair_with(history: list[dict], row: dict):
    """chosen, rejected, and the turns before them, unless they have these themselves."""
    return pair(row | {"prompt": None if is_whole(row["chosen"]) else history})


def is_whole(answer) -> bool:
    """Is an answer the whole conversation?"""
    return is_turns(answer) and answer[0]["role"] in ("system", "user")


def question(row: dict) -> list[dict]:
    """The user's turn, of whichever field has it; what an instruction is about stands below it."""
    texts = []
    for name in (*QUESTIONS, "context"):
        if row.get(name):
            check(name, row[name], str)
            texts.append(row[name])
    return asked("\n".join(texts))


def pair_after(name: str) -> Callable:
    """axolotl, LlamaFactory: the history is in field `name`, chosen and rejected are last turns.
    Where these are whole conversations (UltraFeedback-binarized) they have it themselves."""

    def read(row: dict):
        if is_whole(chosen := row["chosen"]):
            return pair(row | {"prompt": None})
        history = conversation(name, row[name])
        last = chosen if is_turns(chosen) else [{"role": "assistant", "content": chosen}]
        if history[-1:] == last:  # it has the chosen answer, too
            history = history[:-1]
        return pair_with(history, row)

    return read


def renamed(chosen: str, rejected: str, read: Callable = pair) -> Callable:
    """Pairs whose responses have other names."""
    return lambda row: read(row | {"chosen": row[chosen], "rejected": row[rejected]})


def openai(row: dict):
    """OpenAI, Together, Fireworks: the history is in input.messages, tools beside it."""
    history = conversation("input.messages", row["input"].get("messages"))
    names = {"chosen": "preferred_output", "rejected": "non_preferred_output"}
    return pair({"prompt": history} | {new: row[name] for new, name in names.items()})


def swift(row: dict):
    """ms-swift: the chosen answer ends the messages; the rejected one is a text beside them."""
    turns = conversation("messages", row["messages"])
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise DataError("field 'messages' must end with the chosen answer")
    return turns[:-1], (turns[-1:], row["rejected_response"])


def swift_messages(row: dict):
    """ms-swift: messages, and rejected_messages in their place."""
    names = ("messages", "rejected_messages")
    return shared_history(*(conversation(name, row[name]) for name in names))


def stack_exchange(row: dict):
    """stack-exchange-paired: response_j is the better; prompted as in TRL's Llama 2 recipe."""
    answers = (" " + row["response_j"], " " + row["response_k"])
    return f"Question: {row['question']}\n\nAnswer:", answers


# Pairs of which a field says which is the better one


def pick(responses: list, better: int) -> tuple:
    """The better of two responses first."""
    if better not in (0, 1) or len(responses) != 2:
        raise DataError("expected two responses, and 0 or 1 for the better one")
    return responses[better], responses[1 - better]


def shp(row: dict):
    """Stanford Human Preferences: labels is 1 where A is better, 0 where B is."""
    answers = [row["human_ref_A"], row["human_ref_B"]]
    return asked(row["history"]), pick(answers, 1 - row["labels"])


def summarize(row: dict):
    """summarize-from-feedback, comparisons: a post or an article, and which summary is better."""
    info, names = row["info"], ("subreddit", "title", "post", "article")
    names = [name for name in names if info.get(name)]
    texts = [summary.get("text") for summary in row["summaries"] if isinstance(summary, dict)]
    for name in names:
        check(name, info[name], str)
    for text in texts:
        check("summaries", text, str)
    if not {"post", "article"} & set(names):
        raise DataError("field 'info' has neither a post nor an article")
    lines = [f"{n.upper()}: {'r/' * (n == 'subreddit')}{info[n]}" for n in names]
    return "\n\n".join([*lines, "TL;DR:"]), pick([f" {t.lstrip()}" for t in texts], row["choice"])


def safe(row: dict):
    """PKU-SafeRLHF: better_response_id names the more helpful one; which is safer is another
    question (safer_response_id)."""
    answers = [row["response_0"], row["response_1"]]
    return asked(row["prompt"]), pick(answers, row["better_response_id"])


def compared(prompt, first, second, by: float, margin: float | None = None) -> Found:
    """A pair of which the second is better if `by` is above 0; 0 is a tie. margin: else it is what
    `by` says."""
    answers = (second, first) if by > 0 else (first, second)
    return Found(prompt, answers, abs(by) if margin is None or by == 0 else margin)


def webgpt(row: dict):
    """webgpt_comparisons: the better answer has the higher score."""
    text = row["question"].get("full_text")
    check("question.full_text", text, str)
    low, high = (number(n, row[n], math.nan, -1e6, 1e6) for n in ("score_0", "score_1"))
    return compared(asked(text), row["answer_0"], row["answer_1"], high - low)


def help_steer(prompt: str, first: str, second: str, strength: str) -> Callable:
    """HelpSteer2 and 3: strengths from -3, the first response is much better, to 3, the second is.
    prompt … strength: the names of the fields."""

    def read(row: dict):
        by = number(strength, row[strength], math.nan, -1e6, 1e6)
        turns = row[prompt]
        if isinstance(turns, str):  # after the first, they are marked in the text
            text, *parts = re.split(r"\n<extra_id_1>(User|Assistant)\n", turns)
            pairs = zip(["user", *parts[::2]], [text, *parts[1::2]])
            turns = [{"role": role.lower(), "content": content} for role, content in pairs]
        return compared(turns, row[first], row[second], by)

    return read


def arena(row: dict):
    """Chatbot arena, 55k: each turn's prompt and answers, as lists that are written as JSON."""
    talks = []
    for name in ("response_a", "response_b"):
        prompts, answers = listed("prompt", row["prompt"]), listed(name, row[name])
        if len(prompts) != len(answers):
            raise DataError(f"fields 'prompt' and '{name}' must have as many turns")
        talk = []
        for prompt, answer in zip(prompts, answers):
            talk += [*asked(prompt), {"role": "assistant", "content": answer}]
        talks.append(talk)
    prompt, answers = shared_history(*talks)
    return compared(prompt, *answers, winner(row), math.nan)


def arena_talks(row: dict):
    """Chatbot arena, lmsys and 140k: two conversations."""
    names = ("conversation_a", "conversation_b")
    prompt, answers = shared_history(*(conversation(n, from_json(n, row[n], list)) for n in names))
    return compared(prompt, *answers, winner(row), math.nan)


def listed(name: str, value) -> list[str]:
    """The texts of a field: one; or a list, which may be written as JSON."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):  # a text that begins so
            value = json.loads(value)
    texts = [value] if isinstance(value, str) else value
    check(name, texts, list)
    texts = ["" if text is None else text for text in texts]  # an answer that failed
    for text in texts:
        check(name, text, str)
    return texts


def winner(row: dict) -> float:
    """-1 if a is the winner, 1 if b is, 0 for a tie (of bad ones, too)."""
    sides = {"model_a": -1, "model_b": 1}
    if row.get("winner") is not None:
        name = str(row["winner"])
        if name not in sides and not re.search("tie|bad", name):
            raise DataError(f"field 'winner' must be model_a, model_b or tie, found {short(name)}")
        return sides.get(name, 0)
    names = ["winner_model_a", "winner_model_b", "winner_tie"]
    flags = [row.get(name) or 0 for name in names]
    if flags.count(1) != 1 or flags.count(0) != 2:
        raise DataError(f"one of the fields {', '.join(names)} must be 1, the others 0")
    return [-1, 1, 0][flags.index(1)]


# Rankings


def ranking(row: dict):
    """prompt, and a list of responses, best first; or with scores in any order."""
    if len(row["responses"]) < 2:
        raise DataError("field 'responses' must list two responses or more")
    if isinstance(row.get("scores"), list):
        return ranked(row["prompt"], row["responses"], "scores", row["scores"], -1)
    return without_prompt(row["prompt"], several("response", row["responses"]))


def several(name: str, values: list) -> tuple:
    """A list of responses, each as normal() has it."""
    return tuple(normal(name, value) for value in values)


def ranked(prompt, responses: list, name: str, values: list, sign: int) -> Found:
    """The responses by their values, the lowest of sign·value first. Of equals, which no ranking
    can hold, the first is kept; if nothing else is left it is a tie."""
    responses = several("response", responses)
    numbers = [number(name, value, math.nan, -1e6, 1e6) for value in values]
    if len(responses) < 2 or len(numbers) != len(responses) or any(map(math.isnan, numbers)):
        raise DataError(f"field '{name}' must have a number for each of two responses or more")
    best_first = sorted(range(len(numbers)), key=lambda i: sign * numbers[i])
    kept = []
    for i in best_first:
        if not kept or numbers[i] != numbers[kept[-1]]:
            kept.append(i)
    if len(kept) == 1:
        return Found(prompt, responses[:2], 0.0)
    notes = (OF_EQUAL_RANK,) * (len(responses) - len(kept))
    return Found(prompt, tuple(responses[i] for i in kept), notes=notes)


def nectar(row: dict):
    """Nectar: answers with their ranks, 1 is the best; the prompt is a transcript."""
    answers = [answer if isinstance(answer, dict) else {} for answer in row["answers"]]
    texts, ranks = ([answer.get(name) for answer in answers] for name in ("answer", "rank"))
    prompt = row["prompt"]
    if is_transcript(prompt):
        prompt = transcript(prompt)
        if not prompt[-1]["content"].strip():  # where the answer is to be written
            prompt.pop()
    return ranked(asked(prompt), texts, "rank", ranks, 1)


def distilabel(row: dict):
    """distilabel: instruction, generations and their ratings, before they become pairs."""
    return ranked(question(row), row["generations"], "ratings", row["ratings"], -1)


def candidates(row: dict):
    """Responses of a prompt that are not ranked yet, as sample.py writes them."""
    if not row["candidates"]:
        raise DataError("field 'candidates' must list a response or more")
    return row["prompt"], several("response", row["candidates"])


# Demonstrations, for SFT


def demonstration(answer: str) -> Callable:
    """A prompt and its response, by the name that it has."""
    return lambda row: (row["prompt"], (row[answer],))


def answered(answer: str) -> Callable:
    """A question in a chat and its answer, by the name that it has: Alpaca, Dolly, ms-swift."""
    return lambda row: (question(row), (row[answer],))


def messages(name: str) -> Callable:
    """A conversation in field `name`, every turn of the assistant to be learnt."""

    def read(row: dict):
        turns = conversation(name, row[name])
        roles = [turn["role"] for turn in turns]
        if roles[-1] != "assistant" and row.keys() >= TWO.keys():  # perhaps the history of a pair
            answers = {key: normal(key, row[key]) for key in TWO}
            if not is_whole(answers["chosen"]):
                return pair_after(name)(row | answers)
        if isinstance(row.get("label"), bool):
            kto(row)
        if "assistant" not in roles[1:] or roles[0] == "assistant":
            raise DataError(f"field '{name}' must hold a turn and the assistant's answer to it")
        answers = [i for i, role in enumerate(roles) if role == "assistant"]
        said = [i for i in answers if not said_nothing([turns[i]])] or answers[:1]
        return turns[: answers[0]], (turns[answers[0] : said[-1] + 1],)

    return read


def kto(row: dict):
    raise DataError("has a 'label' for one answer (KTO), and is no pair: give chosen and rejected")


def plain_text(row: dict):
    """A text without a prompt."""
    if "role" in row:
        raise DataError("has one message of a tree ('text', 'role'): join them to conversations")
    return "", (row["text"],)


def prompt_alone(row: dict):
    return row["prompt"], ()


# The fields of each format and what they must hold; a row is of the first that it has all of.

TWO = {"chosen": ANSWER, "rejected": ANSWER}
STRENGTH_2 = ("prompt", "response_1", "response_2", "preference_strength")
STRENGTH_3 = ("context", "response1", "response2", "overall_preference")
NAMED = ("chosen_response", "rejected_response")
PREFERENCES = [
    ({"question": str, "response_j": str, "response_k": str}, stack_exchange),
    ({"history": str, "human_ref_A": str, "human_ref_B": str, "labels": int}, shp),
    ({"info": dict, "summaries": list, "choice": int}, summarize),
    ({"prompt": CONTENT} | TWO, pair),
    ({"messages": list} | TWO, pair_after("messages")),
    ({"conversations": list} | TWO, pair_after("conversations")),
    ({"conversation": list} | TWO, pair_after("conversation")),
    ({"question": str} | TWO, question_pair),
    ({"instruction": str} | TWO, question_pair),
    ({"input": str} | TWO, question_pair),
    (TWO, pair),
    ({"prompt": CONTENT} | dict.fromkeys(NAMED, ANSWER), renamed(*NAMED)),
    ({"instruction": str} | dict.fromkeys(NAMED, ANSWER), renamed(*NAMED, question_pair)),
    ({"input": dict, "preferred_output": ANSWER, "non_preferred_output": ANSWER}, openai),
    ({"messages": list} | dict.fromkeys(NAMED, ANSWER), renamed(*NAMED, pair_after("messages"))),
    ({"messages": list, "rejected_response": ANSWER}, swift),
    ({"messages": list, "rejected_messages": list}, swift_messages),
    (
        {"query": str, "response": str, "rejected_response": str},
        renamed("response", "rejected_response", question_pair),
    ),
    ({"prompt": CONTENT, "response_0": str, "response_1": str, "better_response_id": int}, safe),
    ({"question": dict, "answer_0": str, "answer_1": str, "score_0": ANY, "score_1": ANY}, webgpt),
    (dict(zip(STRENGTH_2, (CONTENT, str, str, ANY))), help_steer(*STRENGTH_2)),
    (dict(zip(STRENGTH_3, (CONTENT, str, str, ANY))), help_steer(*STRENGTH_3)),
    ({"prompt": ANY, "response_a": ANY, "response_b": ANY, "winner_model_a": ANY}, arena),
    ({"prompt": ANY, "response_a": ANY, "response_b": ANY, "winner": ANY}, arena),
    ({"conversation_a": ANY, "conversation_b": ANY, "winner": ANY}, arena_talks),
    ({"prompt": CONTENT, "answers": list}, nectar),
    ({"instruction": str, "generations": list, "ratings": list}, distilabel),
    ({"prompt": CONTENT, "responses": list}, ranking),
]
DEMONSTRATIONS = [
    ({"prompt": CONTENT, "response": ANSWER}, demonstration("response")),
    ({"messages": list}, messages("messages")),
    ({"instruction": str, "output": str}, answered("output")),
    ({"instruction": str, "response": str}, answered("response")),
    ({"question": str, "response": str}, answered("response")),
    ({"question": str, "answer": str}, answered("answer")),
    ({"query": str, "response": str}, answered("response")),
]
TALKS = [  # after the pairs, beside which they are a history, or of another layout
    ({"conversations": list}, messages("conversations")),
    ({"conversation": list}, messages("conversation")),
]
KTO = [({"prompt": CONTENT, "completion": ANSWER, "label": bool}, kto)]
COMPLETIONS = [({"prompt": CONTENT, "completion": ANSWER}, demonstration("completion"))]
CANDIDATES = [({"prompt": CONTENT, "candidates": list}, candidates)]
PLAIN_TEXT = [({"text": str}, plain_text)]  # late: rows of other formats have a text, too
PROMPTS = [({"prompt": CONTENT}, prompt_alone)]
SINGLE = TALKS + COMPLETIONS + PLAIN_TEXT
KINDS = {
    "preferences": PREFERENCES + KTO,
    "demonstrations": DEMONSTRATIONS + PREFERENCES + KTO + SINGLE,
    "training": PREFERENCES + DEMONSTRATIONS + KTO + SINGLE,  # either, as the doctor takes it
    "prompts": PREFERENCES + CANDIDATES + DEMONSTRATIONS + SINGLE + PROMPTS,
}
