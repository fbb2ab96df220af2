"""Public preference and SFT data as it is distributed, recognised by its fields: row → example.

data.py itself knows rows of three texts; every other row of a file comes here. What each format
looks like is in its function; one file may mix them, and a mixture of files, too.
"""

import math
import re
from collections.abc import Callable

from data import NO_TEXT, DataError, Example, is_turns

CONTENT = (str, list)  # text; or token ids or messages


def check(name: str, content, kind=CONTENT):
    """Raise DataError unless a field is of its kind: text, token ids or messages by default."""
    kinds = {str: "text", list: "a list", dict: "an object", int: "a whole number"}
    if not isinstance(content, kind) or isinstance(content, bool):
        expected, found = kinds.get(kind, "text or a list"), type(content).__name__
        raise DataError(f"field '{name}' must be {expected}, found {found}")
    texts = [content] if isinstance(content, str) else []
    if isinstance(content, list) and kind is not list:
        if content and all(type(i) is int and 0 <= i < 2**31 for i in content):
            return
        messages = [m if isinstance(m, dict) else {} for m in content]
        texts = [m.get(key) for m in messages for key in ("role", "content")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"field '{name}' must hold token ids, or messages of role and content")
    if any(map(NO_TEXT.search, texts)):
        raise DataError(f"field '{name}' has half a surrogate pair or U+FDD0: no characters")


def number(name: str, value, default: float, least: float, most: float) -> float:
    """An optional field. Raises DataError unless it is a number in range."""
    if value is None:
        return default
    if type(value) not in (int, float) or not least <= value <= most:  # a NaN is in no range
        allowed = f"a number from {least:g} to {most:g}"
        raise DataError(f"field '{name}' must be {allowed}, found {value!r}")
    return float(value)


# Conversations


def bare(turns: list[dict]) -> list[dict]:
    """The turns' roles and contents alone. Raises DataError where more would be lost by that."""
    for turn in turns:
        if turn.get("tool_calls") or turn.get("weight", 1) not in (1, None):
            raise DataError("a message's 'tool_calls' and 'weight' are not supported")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def transcript(text: str) -> list[dict]:
    """The turns of an Anthropic HH transcript."""
    roles = {"Human": "user", "Assistant": "assistant"}
    before, *parts = re.split(r"\n\n(Human|Assistant): ?", text)
    if before or not parts:
        raise DataError(
            "field 'prompt' is missing, and 'chosen', 'rejected' are no transcripts of turns that "
            r"begin '\n\nHuman:' and '\n\nAssistant:'"
        )
    return [{"role": roles[r], "content": c} for r, c in zip(parts[::2], parts[1::2])]


def continued(history: list[dict], turns: list[dict]) -> list[dict]:
    """The history and the turns after it, which may begin by repeating the end of it."""
    if turns[0]["role"] == "system":
        return turns  # whole by itself
    for start in range(len(history) + 1):
        repeated = history[start:]
        if repeated == turns[: len(repeated)]:
            return history[:start] + turns
    raise AssertionError("an empty end is always repeated")


def shared_history(chosen: list[dict], rejected: list[dict]):
    """Two conversations → the turns that they share, and the rest of each, at least the last."""
    for turns in (chosen, rejected):  # what follows the assistant's last turn answers nothing
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
    limit = min(len(chosen), len(rejected)) - 1
    shared = next((n for n in range(limit) if chosen[n] != rejected[n]), limit)
    if shared < 1:
        raise DataError("the conversations must begin alike, and the assistant must answer")
    return chosen[:shared], (chosen[shared:], rejected[shared:])


# The formats: a row → (prompt, responses, best first)


def pair(row: dict):
    """prompt, chosen, rejected: texts or token ids; or messages (as UltraFeedback-binarized has
    them), where the history that both share is the prompt; or without a prompt transcripts (HH)."""
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if prompt is not None:
        check("prompt", prompt)
    if is_turns(chosen) and is_turns(rejected):
        chosen, rejected = bare(chosen), bare(rejected)
        if isinstance(prompt, str) and chosen[0]["role"] == "assistant":
            prompt = [{"role": "user", "content": prompt}]
        if is_turns(prompt):
            chosen, rejected = (continued(bare(prompt), turns) for turns in (chosen, rejected))
            for turns in (chosen, rejected):
                if "assistant" not in [turn["role"] for turn in turns[len(prompt) :]]:
                    raise DataError("the assistant must answer after the prompt")
        return shared_history(chosen, rejected)
    if prompt is not None:
        return prompt, (chosen, rejected)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise DataError("field 'prompt' is missing")
    return shared_history(transcript(chosen), transcript(rejected))


def stack_exchange(row: dict):
    """stack-exchange-paired: response_j is the better; prompted as in TRL's Llama 2 recipe."""
    answers = (" " + row["response_j"], " " + row["response_k"])
    return f"Question: {row['question']}\n\nAnswer:", answers


def pick(responses: list, better: int) -> tuple:
    """The better of two responses first."""
    if better not in (0, 1) or len(responses) != 2:
        raise DataError("expected two responses, and 0 or 1 for the better one")
    return responses[better], responses[1 - better]


def shp(row: dict):
    """Stanford Human Preferences: labels is 1 where A is better, 0 where B is."""
    answers = [row["human_ref_A"], row["human_ref_B"]]
    return [{"role": "user", "content": row["history"]}], pick(answers, 1 - row["labels"])


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


def ranking(row: dict):
    """prompt, and a list of responses, best first."""
    if len(row["responses"]) < 2:
        raise DataError("field 'responses' must list two responses or more")
    return row["prompt"], tuple(row["responses"])


def candidates(row: dict):
    """Responses of a prompt that are not ranked yet, as sample.py writes them."""
    if not row["candidates"]:
        raise DataError("field 'candidates' must list a response or more")
    return row["prompt"], tuple(row["candidates"])


def demonstration(row: dict):
    """SFT: a prompt and its response."""
    return row["prompt"], (row["response"],)


def messages(row: dict):
    """SFT: a conversation, every turn of the assistant to be learnt."""
    turns = row["messages"]
    check("messages", turns)
    roles = [turn["role"] for turn in turns] if is_turns(turns) else []
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise DataError("field 'messages' must hold a turn and the assistant's answer to it")
    first, last = roles.index("assistant"), len(roles) - roles[::-1].index("assistant")
    return turns[:first], (turns[first:last],)


def plain_text(row: dict):
    """SFT: a text without a prompt."""
    return "", (row["text"],)


def prompt_alone(row: dict):
    return row["prompt"], ()


# The fields of each format and what they must hold; a row is of the first that it has all of.

PREFERENCES = [
    ({"question": str, "response_j": str, "response_k": str}, stack_exchange),
    ({"history": str, "human_ref_A": str, "human_ref_B": str, "labels": int}, shp),
    ({"info": dict, "summaries": list, "choice": int}, summarize),
    ({"chosen": CONTENT, "rejected": CONTENT}, pair),
    ({"prompt": CONTENT, "responses": list}, ranking),
]
DEMONSTRATIONS = [
    ({"prompt": CONTENT, "response": CONTENT}, demonstration),
    ({"messages": list}, messages),
]
CANDIDATES = [({"prompt": CONTENT, "candidates": list}, candidates)]
PLAIN_TEXT = [({"text": str}, plain_text)]  # late: rows of other formats have a text, too
PROMPTS = [({"prompt": CONTENT}, prompt_alone)]
KINDS = {
    "preferences": PREFERENCES,
    "demonstrations": DEMONSTRATIONS + PREFERENCES + PLAIN_TEXT,
    "training": PREFERENCES + DEMONSTRATIONS + PLAIN_TEXT,  # either, as the doctor takes it
    "prompts": PREFERENCES + CANDIDATES + DEMONSTRATIONS + PLAIN_TEXT + PROMPTS,
}


def parse(where: str, row: dict, kind: str) -> Example:
    """A row as an example, by the first format of its kind whose fields it has.

    where: "file:line", which begins the message of every DataError raised. kind: see
    data.read_examples. A prompt without responses (kind "prompts") gives responses ().
    """
    try:
        prompt, responses = convert(row, KINDS[kind])
        weight = number("weight", row.get("weight"), 1.0, 0, 1e6)
        paired = len(responses) > 1  # else they are other fields
        label, margin = facts_of_pair(row) if paired else (1.0, math.nan)
        if len(responses) > 2 and (label < 1 or not math.isnan(margin)):
            raise DataError("fields 'soft_label', 'margin' and scores belong to pairs")
    except DataError as error:
        sentence = " ".join(str(error).split("\n"))  # names of fields may be anything
        raise DataError(f"{where}: {sentence}") from None
    return Example(prompt, responses, where, weight, label, margin)


def convert(row: dict, formats: list[tuple[dict, Callable]]) -> tuple[str | list, tuple]:
    """The prompt and the responses of a row, all texts, all token ids or all conversations."""
    fields, reader = nearest(row, formats)
    for name, kind in fields.items():
        if name not in row:
            raise DataError(f"field '{name}' is missing")
        check(name, row[name], kind)
    for name in ("system", "tools"):  # they say what the prompt is
        if row.get(name):
            raise DataError(f"field '{name}' is not supported: write it into the prompt")
    prompt, responses = reader(row)
    if is_turns(prompt):  # a text answers a conversation
        prompt, answer = bare(prompt), lambda text: [{"role": "assistant", "content": text}]
        responses = tuple(answer(r) if isinstance(r, str) else r for r in responses)
    for response in responses:
        check("response", response)
        if (type(response), is_turns(response)) != (type(prompt), is_turns(prompt)):
            raise DataError("prompt and responses must be of the same kind")
        if is_turns(response) and response[-1]["role"] != "assistant":
            raise DataError("a conversation must end with the assistant's turn")
    return prompt, tuple(answered(bare(r)) if is_turns(r) else r for r in responses)


def answered(turns: list[dict]) -> list[dict]:
    """The turns, or none if the last says nothing: then the response is empty."""
    return turns if turns[-1]["content"] else []


def nearest(row: dict, formats: list) -> tuple[dict, Callable]:
    """The first format whose fields the row has; else the one of which it has the most."""
    for fields, reader in formats:
        if fields.keys() <= row.keys():
            return fields, reader
    shared = lambda format: format[0].keys() & row.keys()
    best = max(formats, key=lambda format: (len(shared(format) - {"prompt"}), len(shared(format))))
    if not shared(best):
        known = "; ".join(", ".join(names) for names, _ in formats)
        raise DataError(f"has the fields {', '.join(row)}; expected those of a format: {known}")
    return best


def facts_of_pair(row: dict) -> tuple[float, float]:
    """soft_label, and margin, which may be given as two scores; 1 and nan where they are not."""
    label = number("soft_label", row.get("soft_label"), 1.0, 0, 1)
    scores = []
    for name in ("score_chosen", "score_rejected"):
        if type(row.get(name)) in (int, float):  # elsewhere such a name may be a text
            scores.append(number(name, row[name], math.nan, -1e6, 1e6))
    difference = scores[0] - scores[1] if len(scores) == 2 else math.nan
    return label, number("margin", row.get("margin"), difference, -1e6, 1e6)
