"""Encoded data on disk: rank 0 encodes once, all ranks map it, and so does a resumed run.

In the directory of the run, `encoded/<name>/`: an array a file, counts.json, and, written last,
made_of.json: the digest of what it was made of, and of each of these files.
"""

import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

import data
from extra.guard import sha256
from extra.reading import parse_json, read_bytes
from model import write_whole

ARRAYS = ("tokens", "learnt", "offsets", "trees", "facts", "where")
FILES = (*(f"{array}.npy" for array in ARRAYS), "counts.json")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
BESIDE += ("chat_template.jinja",)  # what a tokenizer reads beside its own file


def encode_once(run, name: str, examples, tokenizer, *limits) -> tuple[data.Dataset, Counter]:
    """`data.encode(examples, tokenizer, *limits)`, kept under that name. (all ranks)"""
    place = run.out / "encoded" / name.replace(" ", "_")
    run.alone(encode_in, place, run, examples, tokenizer, *limits)
    found = Counter(json.loads((place / "counts.json").read_text(encoding="utf-8")))
    found.pop("conversations", None)  # is there for extra/checkpoints.py
    return read(place), found


def read(place: Path) -> data.Dataset:
    """What is kept there, mapped."""
    return data.Dataset(*(np.load(place / f"{array}.npy", mmap_mode="r") for array in ARRAYS))


def encode_in(place: Path, run, examples, tokenizer, *limits):
    """Write the encoded examples there, unless a run that is resumed has done so."""
    made_of = place / "made_of.json"
    key = digest(run, tokenizer, limits)
    if run.settings.resume and is_whole(made_of, key):
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    attempt = getattr(examples, "attempt", call)  # bad rows may be skipped, and are counted
    ahead = encode_ahead(run.watch(examples, False), tokenizer, attempt)
    dataset, found = data.encode(ahead, tokenizer, *limits)
    found["bad rows skipped"] = getattr(examples, "skipped", 0)
    for array in ARRAYS:
        np.save(place / f"{array}.npy", getattr(dataset, array))
    (place / "counts.json").write_text(json.dumps(found), encoding="utf-8")
    files = {name: sha256(place / name) for name in FILES}
    write_whole(made_of, json.dumps({"key": key, "files": files}).encode())


def digest(run, tokenizer, limits: tuple) -> str:
    """Of all that the encoded examples depend on: contents of files, cuts, the tokenizer."""
    said = [run.about["digests"], run.settings.rendered, limits]
    if tokenizer:
        said += [tokenizer.proto, *map(tokenizer.beside, BESIDE)]
    return hashlib.sha256(repr(said).encode()).hexdigest()


def is_whole(made_of: Path, key: str) -> bool:
    """Whether what is there was made of the same, and is as it was written."""
    try:
        made = parse_json(read_bytes(made_of))
        files = {name: sha256(made_of.parent / name) for name in FILES}
    except (OSError, ValueError):
        return False
    return made == {"key": key, "files": files}


def call(function, *inputs):
    return function(*inputs)


def encode_ahead(
    examples: Iterable[data.Example], tokenizer, attempt=call
) -> Iterator[data.Example]:
    """The examples with token ids in place of texts and conversations.

    As data.token_ids encodes them, but thousands at a time, which is done on all cores; and a
    conversation may become several examples (extra/chat.py). What should be counted is in `notes`.
    attempt: calls a function of one example; where it gives None that is left out.
    """
    from extra.templates import BOUNDS

    examples = iter(examples)
    while block := list(itertools.islice(examples, 4096)):
        layouts = {}  # of conversations, by the id of their example
        if tokenizer:
            with BOUNDS:
                block = list(prepare(block, tokenizer, attempt, layouts))
        texts = [e for e in block if tokenizer and is_plain_text(e, tokenizer)]
        trees = {id(e): tree for e, tree in zip(texts, encode_texts(texts, tokenizer))}
        if layouts:
            from extra.chat import encode_layouts

            trees |= zip(layouts, encode_layouts(layouts.values(), tokenizer))
        for example in block:  # what is left are ids, and texts without a prompt
            prompt, *responses = trees.get(id(example)) or data.token_ids(example, tokenizer)
            yield example._replace(prompt=prompt, responses=tuple(responses))


def is_chat(example: data.Example, tokenizer) -> bool:
    """Is it a conversation, or one that was rendered before?"""
    is_text = isinstance(example.prompt, str)
    return data.is_turns(example.prompt) or (is_text and tokenizer.rendered)


def is_plain_text(example: data.Example, tokenizer) -> bool:
    return isinstance(example.prompt, str) and bool(example.prompt) and not tokenizer.rendered


def prepare(
    block: list[data.Example], tokenizer, attempt: Callable, layouts: dict
) -> Iterator[data.Example]:
    """The examples as they are encoded, and the layouts of conversations."""
    from extra import chat

    for example in block:
        if is_chat(example, tokenizer):
            chat.template_of(tokenizer)  # an error of its own is none of the row
            for part, layout in attempt(laid_out, example, tokenizer) or ():
                layouts[id(part)] = layout
                yield part
            continue
        if isinstance(example.prompt, str):
            texts = (example.prompt, *example.responses)
            if any(map(tokenizer.control_pattern.search, texts)):
                example = example._replace(notes=(*example.notes, chat.SPELT))
        yield example


def laid_out(example: data.Example, tokenizer) -> list[tuple[data.Example, list]]:
    """A conversation as the examples that are learnt of it, each with its layout. Raises DataError,
    also for what the chat template leaves out."""
    from extra import chat

    examples = [example]
    if data.is_turns(example.prompt):
        chat.check_written(example, tokenizer)
        first, *others = chat.separate(example, tokenizer)
        examples = [first._replace(notes=(*example.notes, chat.CHATS))]
        examples += [other._replace(notes=()) for other in others]
    lay_out = chat.template_of(tokenizer).lay_out
    return [(example, lay_out(example)) for example in examples]


def encode_texts(examples: list[data.Example], tokenizer) -> Iterator[list[list[int]]]:
    if not examples:
        return
    prompts = tokenizer.encode([example.prompt for example in examples])
    responses = [response for example in examples for response in example.responses]
    encoded = iter(tokenizer.encode(responses, continuation=True))
    for example, prompt in zip(examples, prompts):
        tree = [[*tokenizer.opening, *prompt] or [tokenizer.eos_id]]
        for text in example.responses:
            ids = next(encoded)
            tree.append([*ids, tokenizer.eos_id] if text else [])
        yield tree
