"""Conversations as people write them down → turns as chat templates take them.

A turn is {"role": "user", "content": "text"}, and whatever else its message has that a template may
read: tool_calls, name, reasoning_content, … What cannot be kept is refused by name.
"""

import json
import re
from collections.abc import Iterator

from data import NO_TEXT, DataError, is_turns

CONTENT = (str, list)  # text; or token ids or messages
ANSWER = (str, list, dict)  # or one message

# What data sets call them, in small letters. A developer's message is OpenAI's newer name of a
# system message.
ROLES = {
    "system": ["system", "developer"],
    "user": ["user", "human", "prompter"],
    "assistant": ["assistant", "gpt", "model", "bot", "chatgpt", "ai"],
    "tool": ["tool", "function", "observation", "ipython"],
}
DEPTH = 64  # of lists and objects in each other
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
TEXT_PARTS = ("text", "input_text", "output_text")
# What only describes a message; every other field of it is kept, and told apart.
METADATA = {"id", "message_id", "parent_id", "turn_identifier", "timestamp", "created_at", "model"}
METADATA |= {"score", "rating", "num_tokens", "token_count", "language", "toxic", "redacted"}
SAID = {"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content"}


def check(name: str, content, kind=CONTENT):
    """Raise DataError unless a field is of its kind: text, token ids or messages by default."""
    kinds = {str: "text", list: "a list", dict: "an object", int: "a whole number"}
    kinds |= {bool: "true or false", object: "given"}
    is_bool = isinstance(content, bool) and kind not in (bool, object)
    if not isinstance(content, kind) or is_bool or content is None:
        expected, found = kinds.get(kind, "text or a list"), type(content).__name__
        raise DataError(f"field '{name}' must be {expected}, found {found}")
    if any(map(NO_TEXT.search, texts_in(content))):
        raise DataError(
            f"field '{name}' has half a surrogate pair, or U+FDD0 or U+FDD1: no characters"
        )


def check_depth(value, where: str = ""):
    """Raise DataError if lists and objects are nested over DEPTH deep; what works through them
    calls itself at each level, and jinja and json do, too."""
    level = [value]
    for _ in range(DEPTH):
        below = []
        for one in level:
            inner = one.values() if isinstance(one, dict) else one
            if not {list, dict}.isdisjoint(map(type, inner)):  # token ids are many
                below += [x for x in inner if isinstance(x, (list, dict))]
        if not (level := below):
            return
    raise DataError(f"{where}is nested too deeply, over {DEPTH} levels: flatten it")


def number(name: str, value, default: float, least: float, most: float) -> float:
    """An optional field. Raises DataError unless it is a number in range."""
    if value is None:
        return default
    if type(value) not in (int, float) or not least <= value <= most:  # a NaN is in no range
        allowed = f"a number from {least:g} to {most:g}"
        raise DataError(f"field '{name}' must be {allowed}, found {short(repr(value))}")
    return float(value)


def short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def texts_in(value) -> Iterator[str]:
    """All texts anywhere inside, names of fields, too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from texts_in(list(pair))
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)


def normal(name: str, content, kind=ANSWER):
    """Text; token ids; or the turns of messages. Raises DataError if a field is none of them."""
    check(name, content, kind)
    if isinstance(content, str):
        return content
    messages = [content] if isinstance(content, dict) else content
    if {*map(type, messages)} == {int} and min(messages) >= 0 and max(messages) < 2**31:
        return messages
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"field '{name}' must hold token ids, or messages of role and content")
    return [turn_of(name, message) for message in messages]


def conversation(name: str, content) -> list[dict]:
    """The turns of a field that holds messages. Raises DataError."""
    check(name, content, list)
    if all(isinstance(m, dict) and m.keys() >= {"input", "output"} for m in content):  # Capybara
        asked_answered = (("user", "input"), ("assistant", "output"))
        content = [{"role": r, "content": m[key]} for m in content for r, key in asked_answered]
    turns = normal(name, content, list)
    if not is_turns(turns):
        raise DataError(f"field '{name}' must hold messages of role and content")
    return turns


def turn_of(name: str, message: dict) -> dict:
    """A message of field `name` as a turn. Raises DataError."""
    rest = {key: x for key, x in message.items() if x is not None and key not in METADATA}
    role, content = rest.pop("role", None), rest.pop("content", None)
    if role is None:  # ShareGPT's names
        role, content = rest.pop("from", None), rest.pop("value", None)
    if not isinstance(role, str):
        raise DataError(f"field '{name}' must hold token ids, or messages of role and content")
    if role == "function_call":  # LlamaFactory's: the assistant's, its content is what it calls
        function = from_json(name, content, dict)
        role, content, rest = "assistant", None, rest | {"tool_calls": [{"function": function}]}
    if role.lower() not in ROLE_OF:
        known = ", ".join(ROLE_OF)
        raise DataError(f"field '{name}' has a message of role '{short(role)}': known are {known}")
    turn = {"role": ROLE_OF[role.lower()], "content": text_of(name, content, rest)}
    if "function_call" in rest:  # as OpenAI wrote a single one once
        rest["tool_calls"] = [{"type": "function", "function": rest.pop("function_call")}]
    if "tool_calls" in rest:
        rest["tool_calls"] = calls(name, rest["tool_calls"])
    if not learnt(name, rest):
        rest["train"] = False
    return turn | {key: x for key, x in rest.items() if x != []}


def text_of(name: str, content, rest: dict) -> str:
    """The text of a message's content, which may be in parts; "" beside calls of tools."""
    if content is None and (rest.get("tool_calls") or rest.get("function_call")):
        return ""
    if isinstance(content, str):
        return content
    if content is None:
        raise DataError(f"field '{name}' must hold token ids, or messages of role and content")
    if not isinstance(content, list):
        found = type(content).__name__
        raise DataError(f"field '{name}' has a message whose content is {found}, not text")
    texts = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise DataError(
                f"field '{name}' has a message with a part of type '{short(str(kind))}', not text"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def calls(name: str, given) -> list[dict]:
    """Calls of tools, their arguments as objects: templates want these, APIs write JSON."""
    found = []
    for call in from_json(name, given, list):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"field '{name}' has 'tool_calls' that are no functions with a name")
        if isinstance(function.get("arguments"), str):
            arguments = from_json("arguments", function["arguments"] or "{}", dict)
            function = function | {"arguments": arguments}
        found.append(call | {"function": function} if "function" in call else function)
    return found


def from_json(name: str, value, kind: type):
    """The value, which may be written as JSON in a text. Raises DataError unless of its kind."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"field '{name}' holds no valid JSON ({error})") from None
        check_depth(value)
    check(name, value, kind)
    return value


def learnt(name: str, rest: dict) -> bool:
    """Is a message's turn to be learnt, if it is the assistant's? Takes what says so from the
    rest."""
    weight, *flags = (rest.pop(key, 1) for key in ("weight", "train", "training"))
    if type(weight) is bool or weight not in (0, 1):
        raise DataError(
            f"field '{name}' has a message of weight {short(repr(weight))}: 0 or 1 are known"
        )
    if not all(flag in (0, 1) for flag in flags):
        raise DataError(f"field '{name}' has a message whose 'train' is neither true nor false")
    return bool(weight and all(flags))


def said_nothing(turns: list[dict]) -> bool:
    """Is the answer that ends the turns empty: no text, and no call of a tool?"""
    return not (turns[-1]["content"] or turns[-1].get("tool_calls"))


# Transcripts


def asked(prompt) -> list:
    """A text as the user's turn; what is no text as it is."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def is_transcript(text) -> bool:
    """Does a text begin as Anthropic's HH files do?"""
    return isinstance(text, str) and bool(re.match(r"(\n\n)?Human:", text))


def are_transcripts(texts: list, prompt) -> bool:
    """Are the texts whole conversations? Beside a prompt only if they have it, too: a response may
    go on with turns that the model made up."""
    if not all(isinstance(text, str) for text in texts):
        return False
    if not prompt:  # a system message may be before the first turn
        return all("\n\nHuman:" in text or is_transcript(text) for text in texts)
    if not isinstance(prompt, str):
        return False
    whole = re.compile(r"\n\nHuman:.*\n\nAssistant:", re.DOTALL)
    return all(whole.match(text) and prompt.strip() in text for text in texts)


def transcript(text: str) -> list[dict]:
    r"""The turns of a text of '\n\nHuman:' and '\n\nAssistant:'; what is before them is the
    system's."""
    before, *parts = re.split(r"(?:\A|\n\n)(Human|Assistant): ?", text)
    turns = [{"role": "system", "content": before.strip()}] if before.strip() else []
    turns += [{"role": ROLE_OF[r.lower()], "content": c} for r, c in zip(parts[::2], parts[1::2])]
    return turns


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
    """Two conversations → the turns that they share, and the rest of each, at least the last.
    Raises DataError."""
    for turns in (chosen, rejected):  # what follows the assistant's last turn answers nothing
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
    limit = min(len(chosen), len(rejected)) - 1
    alike = lambda n: chosen[n] | {"train": None} == rejected[n] | {"train": None}
    shared = next((n for n in range(limit) if not alike(n)), limit)
    if shared < 1:
        raise DataError("the conversations must begin alike, and the assistant must answer")
    if shared < limit:
        tell_apart(chosen[shared], rejected[shared])
    return chosen[:shared], (chosen[shared:], rejected[shared:])


def tell_apart(one: dict, other: dict):
    """Raise DataError if two turns say the same, and differ in a field that only describes."""
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    if not SAID & set(names):
        raise DataError(
            f"the histories of chosen and rejected differ in a message's '{short(names[0])}' "
            "alone: take it out"
        )


def with_turns_before(prompt, system: str | None, history: list):
    """The prompt with a system message and earlier questions and answers, [[q, a], …], before it.
    A text becomes the user's turn. Raises DataError."""
    if system is None and not history:
        return prompt
    if not is_turns(prompt) and not (isinstance(prompt, str) and prompt):
        if not system and not history:
            return prompt
        name = "system" if system else "history"
        raise DataError(f"field '{name}' belongs to a conversation, or to a prompt of text")
    turns = asked(prompt)
    own = turns[0]["content"] if turns[0]["role"] == "system" else None
    if own is not None and system not in (None, "", own):
        raise DataError("field 'system' is another system message than that of the conversation")
    before = []
    for pair in history:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)
        ):
            raise DataError("field 'history' must hold pairs of texts, a question and its answer")
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    if own is not None:
        return turns[:1] + before + turns[1:]
    return [{"role": "system", "content": system}] * bool(system) + before + turns
