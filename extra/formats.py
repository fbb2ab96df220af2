"""A row of a file → an example: public preference and SFT data, recognised by its fields.

data.py itself knows rows of texts alone; every other row of a file comes here. The formats are in
extra/public.py; one file may mix them, and a mixture of files, too. What may stand beside any of
them is here: a system message, tools, weights, labels.
"""

import math
from collections.abc import Callable

from data import DataError, Example, is_turns
from extra.conversations import (
    ANSWER,
    CONTENT,
    asked,
    check,
    check_depth,
    from_json,
    normal,
    number,
    said_nothing,
    short,
    with_turns_before,
)
from extra.public import KINDS, QUESTIONS, Found, fits_none, prompt_alone

# They would change what the prompt is, and nothing here could honour them.
NOT_HONOURED = ["images", "image", "videos", "video", "audios", "audio"]
NOTHING = (None, "", "[]", "{}", [], {})  # said of tools


def parse(where: str, row: dict, kind: str) -> Example:
    """A row as an example, by the first format of its kind whose fields it has.

    where: "file:line", which begins the message of every DataError raised. kind: see
    data.read_examples. A prompt without responses (kind "prompts") gives responses (), and so does
    a tie, of which nothing is learnt, but where the row has a soft_label of its own.
    """
    try:
        check_depth(row)
        found, context = convert(row, KINDS[kind])
        prompt, responses, margin, notes = found
        weight = number("weight", row.get("weight"), 1.0, 0, 1e6)
        label, margin = facts_of_pair(row, margin) if len(responses) > 1 else (1.0, math.nan)
        if len(responses) > 2 and (label < 1 or not math.isnan(margin)):
            raise DataError("fields 'soft_label', 'margin' and scores belong to pairs")
    except RecursionError:
        raise DataError(f"{where}: is nested too deeply") from None
    except DataError as error:
        sentence = short(" ".join(str(error).split()), 4000)  # names of fields may be anything
        raise DataError(f"{where}: {sentence}") from None
    if found.margin == 0 and row.get("soft_label") is None:
        label, responses = 0.5, responses if kind == "prompts" else ()
    if kind == "demonstrations":
        responses = responses[:1]
    return Example(prompt, responses, where, weight, label, margin, context, notes)


def convert(row: dict, formats: list[tuple[dict, Callable]]) -> tuple[Found, dict | None]:
    """What a row holds, all texts, all token ids or all conversations, and the context of these."""
    fields, reader = nearest(row, formats)
    for name in NOT_HONOURED:
        if row.get(name):
            raise DataError(f"field '{name}' is not supported: text alone is learnt from")
    row = dict(row)
    for name, kind in fields.items():
        if name not in row:
            raise DataError(f"field '{name}' is missing")
        if kind in (CONTENT, ANSWER):
            row[name] = normal(name, row[name], kind)
        else:
            check(name, row[name], kind)
    found = Found(*reader(row))
    said = asked(found.prompt) if all(map(is_turns, found.responses or [""])) else found.prompt
    prompt = with_turns_before(said, *before(row, fields))
    chat = is_turns(prompt)
    answer = lambda text: [{"role": "assistant", "content": text}]  # a text answers a conversation
    responses = [answer(r) if chat and isinstance(r, str) else r for r in found.responses]
    for response in responses:
        if (type(response), is_turns(response)) != (type(prompt), chat):
            raise DataError("prompt and responses must be of the same kind")
        if chat and response[-1]["role"] != "assistant":
            raise DataError("a conversation must end with the assistant's turn")
    if chat:
        responses = list(map(answered, responses))
    return found._replace(prompt=prompt, responses=tuple(responses)), context_of(row, chat)


def answered(turns: list[dict]) -> list[dict]:
    """The turns, of which one that says nothing is not learnt; none if that is the last: then the
    response is empty."""
    if said_nothing(turns):
        return []
    silent = lambda turn: turn["role"] == "assistant" and said_nothing([turn])
    return [turn | {"train": False} if silent(turn) else turn for turn in turns]


def before(row: dict, fields: dict) -> tuple[str | None, list]:
    """The system message and the history that stand beside a prompt, in fields of their own.
    Raises DataError, also for a context that the format does not know."""
    names = [name for name in ("system", "system_prompt") if row.get(name) is not None]
    system = row[names[0]] if names else None
    if names:
        check(names[0], system, str)
    if system == "" and "prompt" not in fields:  # no text becomes a chat by that
        system = None
    history = row.get("history") if "history" not in fields else None
    if history is not None:
        check("history", history, list)
    if row.get("context") and not {"context", "text", *QUESTIONS} & fields.keys():
        raise DataError("field 'context' is not supported in this format: write it into the prompt")
    return system, history or []


def context_of(row: dict, chat: bool) -> dict | None:
    """What a chat template is handed beside the turns; tools may be written as JSON."""
    inside = row["input"] if isinstance(row.get("input"), dict) else {}
    context = {}
    kinds = {"tools": list, "documents": list, "chat_template_kwargs": dict}
    kinds["parallel_tool_calls"] = bool
    for name, kind in kinds.items():
        values = [v for v in (inside.get(name), row.get(name)) if v not in NOTHING]
        if not values:
            continue
        if not chat:
            raise DataError(
                f"field '{name}' belongs to a conversation: give the prompt as messages"
            )
        context[name] = from_json(name, values[0], kind)
        if kind is list:
            is_json = lambda thing: isinstance(thing, str) and thing.startswith("{")
            context[name] = [
                from_json(name, thing, dict) if is_json(thing) else thing for thing in context[name]
            ]
        if kind is list and not all(isinstance(thing, dict) for thing in context[name]):
            raise DataError(f"field '{name}' must be a list of objects")
    if {"messages", "add_generation_prompt"} & context.get("chat_template_kwargs", {}).keys():
        raise DataError("field 'chat_template_kwargs' must leave the messages to the prompt")
    return context or None


def nearest(row: dict, formats: list) -> tuple[dict, Callable]:
    """The first format whose fields the row has, if possible none of them null; else one of which
    it lacks a single field. Raises DataError."""
    said = {name for name, value in row.items() if value is not None}
    for names in (said, row.keys()):
        for fields, reader in formats:
            if fields.keys() <= names and not (names is said and reader is prompt_alone):
                return fields, reader
    for fields, reader in formats:
        shared = fields.keys() & row.keys()
        if len(shared) == len(fields) - 1 and len(shared) > 1:
            return fields, reader
    raise DataError(fits_none(row, formats))


def facts_of_pair(row: dict, margin: float) -> tuple[float, float]:
    """soft_label, and margin, which may be given as two scores; 1 and nan where they are not.
    margin: what the format says."""
    label = number("soft_label", row.get("soft_label"), 1.0, 0, 1)
    scores = []
    for name in ("score_chosen", "score_rejected"):
        if type(row.get(name)) in (int, float):  # elsewhere such a name may be a text
            scores.append(number(name, row[name], math.nan, -1e6, 1e6))
    if len(scores) == 2:
        margin = scores[0] - scores[1]
    return label, number("margin", row.get("margin"), margin, -1e6, 1e6)
