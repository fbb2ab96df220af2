"""From text to packed batches: tokenizer, chat template, preference files, encoding, packing.

A preference example is a tree: one prompt (the trunk) and its responses (the branches), best first:
two for DPO, one for SFT, K for a ranking. One line of JSON becomes a gradient like this:

    {"prompt": "Q: 2+2?", "chosen": " 4", "rejected": " 5"}        load_preferences -> Example
    [BOS] Q: 2 + 2 ? | ▁4 [EOS] | ▁5 [EOS]                         encode_examples  -> Dataset
    [BOS] Q: 2 + 2 ? ▁4 ▁5 [BOS] …  one stream, no padding         collate          -> Batch

The last token of a response is predicted but never read, so it is not in the stream.

The data doctor looks at files before you train on them:

    python data.py train.jsonl,more.jsonl.gz --eval=held_out.jsonl --tokenizer=DIR
"""

import gzip
import hashlib
import heapq
import io
import itertools
import json
import math
import re
import shutil
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jinja2.sandbox
import numpy as np
import sentencepiece
import torch

# How chats are written when a checkpoint has no template of its own: as in Anthropic's HH files.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ {'system': '', 'user': '\n\nHuman: ', 'assistant': '\n\nAssistant: '}[m.role]"
    " + m.content }}"
    "{% endfor %}{{ '\n\nAssistant:' if add_generation_prompt else '' }}"
)
TOKENIZER_FILES = (  # that may lie beside a tokenizer.model, and go where it goes
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "chat_template.jinja",
)
GUARD = "\ufdd0"  # never a character of text: it keeps user text from spelling a control token
NO_TEXT = re.compile(f"[\ud800-\udfff{GUARD}]")


class DataError(ValueError):
    """Input that cannot be used; the message is one sentence naming the file and line."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())


class Example(NamedTuple):
    """A prompt and its responses, best first.

    Each is text, or token ids; or the prompt is a conversation, [{"role": …, "content": …}, …], and
    a response the turns that follow it, of which the assistant's are learnt.
    """

    prompt: str | list
    responses: tuple
    weight: float = 1.0
    where: str = ""  # file:line, for messages
    label: float = 1.0  # probability that chosen is better than rejected
    margin: float = math.nan  # by how much, for the losses that ask; nan: not known

    chosen = property(lambda self: self.responses[0])
    rejected = property(lambda self: self.responses[1])


class Part(NamedTuple):
    """A stretch of a sequence: token ids, or text still to be encoded."""

    content: str | list[int]
    start: bool = False  # text that begins the sequence: SentencePiece puts a space before it
    hidden: bool = False  # read, but not learnt: the user's turns within a response


class Tokenizer:
    """A SentencePiece model, with the one rule that DPO needs: responses continue their prompt.

    Prompt and response are encoded apart and joined, so that a prompt's ids never depend on its
    response, and `decode(prompt_ids + response_ids) == prompt + response` (for models without text
    normalisation, as Llama's, and texts without ▁, their space; others decode to the normalised
    text). User text never yields control ids such as BOS and EOS.
    """

    # Protobuf messages concatenate by merging: this sets normalizer_spec.add_dummy_prefix and
    # remove_extra_whitespaces to false, for a second processor that invents and removes no space.
    CONTINUE = b"\x1a\x04\x18\x00\x20\x00"

    def __init__(self, path: str | Path):
        """Read a tokenizer.model, or the one in a directory, and the files beside it."""
        path = Path(path)
        path = path / "tokenizer.model" if path.is_dir() else path
        try:
            self.proto = path.read_bytes()
            self.start = sentencepiece.SentencePieceProcessor(model_proto=self.proto)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except RuntimeError:
            raise DataError(f"{path}: not a SentencePiece model") from None
        self.inside = sentencepiece.SentencePieceProcessor(model_proto=self.proto + self.CONTINUE)
        if min(self.start.bos_id(), self.start.eos_id()) < 0:
            raise DataError(f"{path}: the tokenizer needs a BOS and an EOS piece")
        beside = [path.with_name(name) for name in TOKENIZER_FILES]
        self.files = {file.name: file.read_bytes() for file in beside if file.is_file()}
        try:
            self.configure()
        except (ValueError, TypeError, LookupError, AttributeError, jinja2.TemplateError) as error:
            raise DataError(f"{path.parent}: its tokenizer files are not valid ({error})") from None

    def configure(self):
        """Control tokens by name, of the model and those added beside it, and the chat template."""
        config, added = (json.loads(self.files.get(f, b"{}")) for f in TOKENIZER_FILES[:2])
        pieces = [self.start.id_to_piece(i) for i in range(self.start.vocab_size())]
        self.control = {piece: i for i, piece in enumerate(pieces) if self.start.is_control(i)}
        self.control |= {p: i for i, p in enumerate(pieces) if re.fullmatch(r"<\|.+\|>", p)} | added
        for i, token in config.get("added_tokens_decoder", {}).items():
            self.control[token["content"]] = int(i)
        self.vocab_size = max(len(pieces), *(i + 1 for i in self.control.values()))
        pattern = lambda names: "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        self.control_pattern = re.compile(f"({pattern(self.control)})")
        self.turn_end = re.compile(self.control_pattern.pattern + r"(\s*)$")
        # What SentencePiece finds in text all the same, user-defined pieces, is spelt out instead.
        spell = lambda piece: self.inside.encode(piece[:1]) + self.inside.encode(piece[1:])
        found = lambda i: not (self.start.is_control(i) or self.start.is_unknown(i))
        plain = {i: p for i, p in enumerate(pieces) if p in self.control and found(i)}
        self.spelt = {i: spell(piece) for i, piece in plain.items()}
        self.names = {}  # what templates call bos_token and eos_token
        for name in ("bos", "eos"):
            token = config.get(f"{name}_token")
            token = token["content"] if isinstance(token, dict) else token
            piece = self.start.id_to_piece(getattr(self.start, f"{name}_id")())
            self.names[f"{name}_token"] = token if token in self.control else piece
        self.bos_id, self.eos_id = map(self.control.get, self.names.values())
        self.add_bos = config.get("add_bos_token", True)
        file = self.files.get("chat_template.jinja", b"").decode()
        template = file or config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {t["name"]: t["template"] for t in template}.get("default")
        self.template = compile_template(template or PLAIN_TEMPLATE)

    @staticmethod
    def train(texts: Iterable[str], path: str | Path, vocab_size: int) -> "Tokenizer":
        """Train a byte-fallback BPE tokenizer, lossless as Llama's, write it to `path`, load it."""
        options = {"vocab_size": vocab_size, "model_type": "bpe", "byte_fallback": True}
        options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        options |= {"hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2}
        options |= {"input_sentence_size": 10**6, "shuffle_input_sentence": True}
        options |= {"sentence_iterator": iter(texts), "model_writer": (model := io.BytesIO())}
        try:
            sentencepiece.SentencePieceTrainer.train(**options)
        except (RuntimeError, ValueError) as error:  # the latter for token ids
            why = f"vocab_size {vocab_size}: no tokenizer can be trained"
            why += f" ({str(error).rsplit('] ', 1)[-1].strip() or error})"
            raise DataError(why) from None
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(model.getvalue())
        return Tokenizer(path)

    def save(self, directory: str | Path):
        """Write tokenizer.model and what lay beside it, or what other programs want there."""
        files = {"tokenizer.model": self.proto} | self.files
        if "tokenizer_config.json" not in files:
            config = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
            config |= {"add_bos_token": True, "add_eos_token": False}
            config |= self.names | {"unk_token": self.start.id_to_piece(self.start.unk_id())}
            config["chat_template"] = PLAIN_TEMPLATE
            files["tokenizer_config.json"] = json.dumps(config, indent=2).encode() + b"\n"
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (Path(directory) / name).write_bytes(content)

    def encode(self, text: str | list[str], continuation: bool = False):
        """Ids of a text (or of each of a list), without BOS and EOS; decode gives the text back.

        A list is encoded by as many threads as there are cores.
        """
        ids = (self.inside if continuation else self.start).encode(text)
        spell = lambda ids: [j for i in ids for j in self.spelt.get(i, (i,))] if self.spelt else ids
        return list(map(spell, ids)) if isinstance(text, list) else spell(ids)

    def encode_prompts(self, prompts: list) -> list[list[int]]:
        """The ids of prompts, texts or conversations, BOS included: what training sees before a
        response, and what the sampler starts from."""
        examples = [Example(prompt, (), where="prompt") for prompt in prompts]
        return [sequences[0] for sequences in encode_block(examples, self)]

    def stop_ids(self, prompt: str | list) -> set[int]:
        """The ids that end a response: EOS, and in a chat what its template ends a turn with."""
        if not is_turns(prompt):
            return {self.eos_id}
        answer = [{"role": "assistant", "content": "x"}]
        return {self.eos_id, *self.layout(Example(prompt, (answer,)))[1][-1].content}

    def decode(self, ids: list[int], continuation: bool = False) -> str:
        """The text of ids, control tokens left out; with `continuation` that of a response alone,
        its first space kept."""
        known = [i for i in ids if i < self.start.vocab_size()]
        return (self.inside if continuation else self.start).decode(known)

    def render(self, turns: list[dict], answer: bool, where: str = "") -> str:
        """The conversation as the chat template writes it; if `answer`, up to the assistant's."""
        try:
            return self.template.render(messages=turns, add_generation_prompt=answer, **self.names)
        except Exception as error:  # the template is someone's program
            raise DataError(f"{where}: the chat template refuses the turns ({error})") from None

    def guard(self, turns: list[dict]) -> list[dict]:
        """The turns, with control tokens that their text spells broken up until they are split."""
        broken = lambda match: match[0][:1] + GUARD + match[0][1:]
        return [{k: self.control_pattern.sub(broken, v) for k, v in t.items()} for t in turns]

    def split(self, text: str, hidden: bool = False) -> list[Part]:
        """Rendered text as parts: the template's control tokens as ids, the rest as text."""
        pieces = filter(None, self.control_pattern.split(text))
        contents = (
            [self.control[p]] if p in self.control else p.replace(GUARD, "") for p in pieces
        )
        return [Part(content, hidden=hidden) for content in contents]

    def layout(self, example: Example) -> list[list[Part]]:
        """The parts of an example's sequences: the prompt, then each response."""
        prompt, responses, where = example.prompt, example.responses, example.where
        bos, eos = [Part([self.bos_id])], [Part([self.eos_id])]
        if not is_turns(prompt):
            head = [*bos, Part(prompt, start=True)]
            return [head] + [[Part(r, start=not prompt), *eos] for r in responses]
        turns = self.guard(prompt)
        answer = all(response[0]["role"] == "assistant" for response in responses)
        begun = self.render(turns, answer, where)
        head = self.split(begun)
        given = head[:1] == bos
        head = [part._replace(start=i == 0) for i, part in enumerate(head[given:])]
        sequences = [bos * (given or self.add_bos) + head]
        for response in map(self.guard, responses):
            parts, done = [], begun
            for i, turn in enumerate(response):
                if turn["role"] == "assistant":
                    history = turns + response[:i]
                    opened = self.render(history, True, where) if i or not answer else begun
                    full = self.render([*history, turn], False, where)
                    if not (opened.startswith(done) and full.startswith(opened)):
                        raise DataError(f"{where}: the chat template rewrites earlier turns")
                    said = full[len(opened) :]
                    ended = self.turn_end.search(said)
                    if ended:  # what follows the token that ends a turn is not learnt
                        said = said[: ended.start(2)]
                    parts += self.split(opened[len(done) :], hidden=True) + self.split(said)
                    done = opened + said
            sequences.append(parts if ended else parts + eos)
        return sequences


def compile_template(source: str) -> jinja2.Template:
    """As transformers compiles a chat_template."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    environment.globals |= {"tools": None, "documents": None}
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    for mark, block in (("generation", "if true"), ("endgeneration", "endif")):  # of what is learnt
        source = re.sub(rf"({{%[-+]?\s*){mark}(\s*[-+]?%}})", rf"\1{block}\2", source)
    return environment.from_string(source)


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield ("file:line", object) of a `.jsonl` or `.jsonl.gz` file; blank lines are skipped."""
    where, empty = str(path), True
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if not line.strip():
                    continue
                row, empty = json.loads(line.decode("utf-8-sig")), False
                if not isinstance(row, dict):
                    raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
                yield where, row
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: invalid UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: invalid JSON: {error.msg}, column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{where}: invalid JSON: nested too deeply") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{where}: cannot be read ({reason})") from None
    if empty:
        raise DataError(f"{path}: the file is empty")


def is_turns(content) -> bool:
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict)


def check(name: str, content, kind=(str, list)):
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


# The formats of public data, recognised by their fields: a row -> (prompt, responses, best first).


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


def bare(turns: list[dict]) -> list[dict]:
    """The turns' roles and contents alone."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def continued(history: list[dict], turns: list[dict]) -> list[dict]:
    """The history and the turns after it, which may begin by repeating the end of it."""
    if turns[0]["role"] == "system":
        return turns  # whole by itself
    starts = (n for n in range(len(history) + 1) if history[n:] == turns[: len(history) - n])
    return history[: next(starts)] + turns


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


def shared_history(chosen: list[dict], rejected: list[dict]):
    """Two conversations -> the turns that they share, and the rest of each, at least the last."""
    for turns in (chosen, rejected):  # what follows the assistant's last turn answers nothing
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
    limit = min(len(chosen), len(rejected)) - 1
    shared = next((n for n in range(limit) if chosen[n] != rejected[n]), limit)
    if shared < 1:
        raise DataError("the conversations must begin alike, and the assistant must answer")
    return chosen[:shared], (chosen[shared:], rejected[shared:])


def stack_exchange(row: dict):
    """stack-exchange-paired: response_j is the better; prompted as in TRL's Llama 2 recipe."""
    answers = (" " + row["response_j"], " " + row["response_k"])
    return f"Question: {row['question']}\n\nAnswer:", answers


def shp(row: dict):
    """Stanford Human Preferences: labels is 1 where A is better, 0 where B is."""
    answers = [row["human_ref_A"], row["human_ref_B"]]
    return [{"role": "user", "content": row["history"]}], pick(answers, 1 - row["labels"])


def summarize(row: dict):
    """summarize-from-feedback, comparisons: a post or an article, and which summary is better."""
    info, names = row["info"], ("subreddit", "title", "post", "article")
    names = [name for name in names if info.get(name)]
    texts = [summary.get("text") for summary in row["summaries"] if isinstance(summary, dict)]
    for name, text in [*((n, info[n]) for n in names), *(("summaries", t) for t in texts)]:
        check(name, text, str)
    if not {"post", "article"} & set(names):
        raise DataError("field 'info' has neither a post nor an article")
    lines = [f"{n.upper()}: {'r/' * (n == 'subreddit')}{info[n]}" for n in names]
    return "\n\n".join([*lines, "TL;DR:"]), pick([f" {t.lstrip()}" for t in texts], row["choice"])


def pick(responses: list, better: int) -> tuple:
    if better not in (0, 1) or len(responses) != 2:
        raise DataError("expected two responses, and 0 or 1 for the better one")
    return responses[better], responses[1 - better]


def ranking(row: dict):
    """prompt, and a list of responses, best first."""
    if len(row["responses"]) < 2:
        raise DataError("field 'responses' must list two responses or more")
    return row["prompt"], tuple(row["responses"])


def candidates(row: dict):
    """Responses of a prompt that are not ranked yet."""
    if not row["candidates"]:
        raise DataError("field 'candidates' must list a response or more")
    return row["prompt"], tuple(row["candidates"])


def messages(row: dict):
    """SFT: a conversation, every turn of the assistant to be learnt."""
    turns = row["messages"]
    check("messages", turns)
    roles = [turn["role"] for turn in turns] if is_turns(turns) else []
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise DataError("field 'messages' must hold a turn and the assistant's answer to it")
    first, last = roles.index("assistant"), len(roles) - roles[::-1].index("assistant")
    return turns[:first], (turns[first:last],)


DEMONSTRATIONS = [  # fields and what they must hold, what turns them into an example
    ({"prompt": (str, list), "response": (str, list)}, lambda r: (r["prompt"], (r["response"],))),
    ({"messages": list}, messages),
]
PLAIN_TEXT = [({"text": str}, lambda r: ("", (r["text"],)))]  # the last of all: others have a text
PREFERENCES = [
    ({"question": str, "response_j": str, "response_k": str}, stack_exchange),
    ({"history": str, "human_ref_A": str, "human_ref_B": str, "labels": int}, shp),
    ({"info": dict, "summaries": list, "choice": int}, summarize),
    ({"chosen": (str, list), "rejected": (str, list)}, pair),
    ({"prompt": (str, list), "responses": list}, ranking),
]
CANDIDATES = [  # sampled, and not ranked yet; or prompts alone
    ({"prompt": (str, list), "candidates": list}, candidates),
    ({"prompt": (str, list)}, lambda r: (r["prompt"], ())),
]


def parse(where: str, row: dict, formats: list) -> Example:
    """A row as an example, by the first format whose fields it has. Raises DataError."""
    complete = [f for f in formats if f[0].keys() <= row.keys()]
    shared = lambda f: f[0].keys() & row.keys()
    nearest = max(formats, key=lambda f: (len(shared(f) - {"prompt"}), len(shared(f))))
    fields, convert = complete[0] if complete else nearest
    try:
        if not fields.keys() & row.keys():
            known = "; ".join(", ".join(names) for names, _ in formats)
            raise DataError(f"has the fields {', '.join(row)}; expected those of a format: {known}")
        for name, kind in fields.items():
            if name not in row:
                raise DataError(f"field '{name}' is missing")
            check(name, row[name], kind)
        prompt, responses = convert(row)
        if is_turns(prompt):  # a text answers a conversation
            prompt, answer = bare(prompt), lambda text: [{"role": "assistant", "content": text}]
            responses = tuple(answer(r) if isinstance(r, str) else r for r in responses)
        for response in responses:
            check("response", response)
            if (type(response), is_turns(response)) != (type(prompt), is_turns(prompt)):
                raise DataError("prompt and responses must be of the same kind")
            if is_turns(response) and response[-1]["role"] != "assistant":
                raise DataError("a conversation must end with the assistant's turn")
        responses = tuple(bare(r) if is_turns(r) else r for r in responses)
        weight, label, margin = number(row, "weight", 1.0, 0, 1e6), 1.0, math.nan
        if len(responses) > 1:
            label = number(row, "soft_label", 1.0, 0, 1)
            scores = row.get("score_chosen"), row.get("score_rejected")
            known = all(type(score) in (int, float) for score in scores)
            margin = scores[0] - scores[1] if known else math.nan
            margin = number(row, "margin", margin, -1e6, 1e6)
        if len(responses) > 2 and (label < 1 or not math.isnan(margin)):
            raise DataError("fields 'soft_label', 'margin' and scores belong to pairs")
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return Example(prompt, responses, weight, where, label, margin)


def number(row: dict, name: str, default: float, least: float, most: float) -> float:
    """An optional field of a row. Raises DataError unless it is a number in range."""
    if (value := row.get(name)) is None:
        return default
    if type(value) not in (int, float) or not least <= value <= most:
        allowed = f"a number from {least:g} to {most:g}"
        raise DataError(f"field '{name}' must be {allowed}, found {value!r}")
    return float(value)


def read_examples(paths: str, formats: list) -> Iterator[tuple[dict, Example]]:
    """The rows of files (comma-separated), one at a time, and what they are by the formats."""
    for path in filter(None, paths.split(",")):
        for where, row in read_jsonl(path):
            yield row, parse(where, row, formats)


def read_preferences(paths: str) -> Iterator[Example]:
    """The preferences in files, one at a time."""
    yield from (example for _, example in read_examples(paths, PREFERENCES))


def read_demonstrations(paths: str) -> Iterator[Example]:
    """What SFT trains on: demonstrations, or the best responses of preferences."""
    for _, example in read_examples(paths, DEMONSTRATIONS + PREFERENCES + PLAIN_TEXT):
        yield example._replace(responses=example.responses[:1])


def texts(example: Example) -> Iterator[str]:
    """Every text in it, for training a tokenizer."""
    for content in (example.prompt, *example.responses):
        yield from (turn["content"] for turn in content) if is_turns(content) else [content]


def load_preferences(path: str | Path) -> list[Example]:
    """Read a preference file whole. Raises DataError naming file, line and field."""
    return list(read_preferences(str(path)))


@dataclass(frozen=True)
class Dataset:
    """Encoded examples in flat arrays, so that a million of them fit in memory."""

    tokens: np.ndarray  # int32, sequences end to end: prompt, responses, prompt, …; ~id: hidden
    offsets: np.ndarray  # sequence s is tokens[offsets[s] : offsets[s + 1]]
    learnt: np.ndarray  # how many of a sequence's tokens are learnt; of a prompt none
    trees: np.ndarray  # example e is sequences trees[e] : trees[e + 1], its prompt first
    facts: np.ndarray  # (examples, 3) float32: weight, label and margin of an Example
    counts: Counter  # what encoding cut and dropped, to be printed

    def __len__(self) -> int:
        return len(self.facts)

    def lengths(self) -> np.ndarray:
        """Tokens that each example brings into the stream, (examples,)."""
        tokens = np.diff(self.offsets[self.trees])
        return tokens - (np.diff(self.trees) - 1)  # the last token of a response is never read

    def work(self) -> np.ndarray:
        """What each example asks of the model, (examples, 3): tokens of the stream, tokens to
        predict, and pairs of a token and one that it sees."""
        sizes = np.diff(self.offsets).astype(np.float64)
        prompt = np.repeat(sizes[self.trees[:-1]], np.diff(self.trees))
        own, first = sizes - 1, self.trees[:-1]  # the last token of a response is never read
        seen = own * prompt + own * (own + 1) / 2
        seen[first] = sizes[first] * (sizes[first] + 1) / 2
        predicted, seen = (np.add.reduceat(x, first) for x in (self.learnt, seen))
        return np.stack([self.lengths(), predicted, seen], axis=1)

    def response_lengths(self) -> np.ndarray:
        """Learnt tokens of each response, EOS included, (responses,), in the examples' order."""
        return np.delete(self.learnt, self.trees[:-1])


def fit(prompt: list[int], responses: list[list[int]], max_length: int, max_prompt: int, counts):
    """Cut one example's ids (BOS and EOS included) to size; None if that spoils it."""
    distinct = list(dict.fromkeys(map(tuple, responses)))
    if len(distinct) < min(2, len(responses)):
        counts["dropped: identical responses"] += 1
        return None
    counts["repeated responses left out"] += len(responses) - len(distinct)
    if len(prompt) > max_prompt:  # keep BOS and the end of the prompt
        prompt = prompt[:1] + prompt[len(prompt) - max_prompt + 1 :]
        counts["prompts cut"] += 1
    room = max(max_length - len(prompt), 0)
    cut = list(dict.fromkeys(ids[:room] for ids in distinct))  # a response that is cut has no EOS
    if any(max(ids, default=-1) < 0 for ids in cut):
        counts["dropped: no room for a response"] += 1
        return None
    if len(cut) < len(distinct):
        counts["dropped: identical once cut"] += 1
        return None
    counts["responses cut"] += sum(len(ids) > room for ids in distinct)
    return [prompt, *cut]


def to_arrays(trees: Iterable[list[list[int]]], facts=None, counts=None) -> Dataset:
    """Trees of token ids, [prompt, response, …] each, as a data set."""
    tokens, sizes, branches, trees = [np.zeros(0, np.int32)], [0], [0], iter(trees)
    while block := list(itertools.islice(trees, 4096)):
        sequences = [ids for tree in block for ids in tree]
        tokens.append(np.fromiter(itertools.chain(*sequences), np.int32))
        sizes += map(len, sequences)
        branches += map(len, block)
    tokens, offsets, trees = np.concatenate(tokens), np.cumsum(sizes), np.cumsum(branches)
    hidden = np.searchsorted(offsets, np.flatnonzero(tokens < 0), side="right") - 1
    learnt = np.diff(offsets) - np.bincount(hidden, minlength=len(offsets) - 1)
    learnt[trees[:-1]] = 0
    facts = np.array(facts or [(1.0, 1.0, math.nan)] * (len(trees) - 1), np.float32)
    return Dataset(tokens, offsets, learnt, trees, facts, counts or Counter(examples=len(facts)))


def encode_block(examples: list[Example], tokenizer: Tokenizer | None) -> list[list[list[int]]]:
    """The ids of each example's sequences, its prompt first, before any cut; hidden ones as ~id."""

    def layout(example: Example) -> list[list[Part]]:
        if isinstance(example.prompt, list) and not is_turns(example.prompt):
            return [[Part(ids)] for ids in (example.prompt, *example.responses)]
        if tokenizer is None:
            raise DataError(f"{example.where}: text needs a tokenizer.model; else give token ids")
        return tokenizer.layout(example)

    layouts = list(map(layout, examples))
    parts = [part for sequences in layouts for sequence in sequences for part in sequence]
    encoded = {}
    for start in (True, False):  # SentencePiece encodes a list at a time, on all cores
        texts = [p.content for p in parts if p.start == start and isinstance(p.content, str)]
        encoded[start] = iter(tokenizer.encode(texts, continuation=not start) if texts else [])

    def ids(part: Part) -> list[int]:
        ids = next(encoded[part.start]) if isinstance(part.content, str) else part.content
        return [~i for i in ids] if part.hidden else ids

    join = lambda sequence: list(itertools.chain.from_iterable(map(ids, sequence)))
    return [list(map(join, sequences)) for sequences in layouts]


def is_empty(response) -> bool:
    """Has the response no text (or ids) at all?"""
    return not (response[-1]["content"] if is_turns(response) else response)


def encode_examples(
    examples: Iterable[Example], tokenizer: Tokenizer, max_length: int, max_prompt_length: int
) -> Dataset:
    """Encode, cut what is too long, drop what that spoils, and count both.

    A prompt over `max_prompt_length` tokens (BOS included) loses its beginning, keeping BOS. A
    response that would pass `max_length` together with its prompt loses its end, and has no EOS
    then. Examples with an empty response, without room for one, or without two that differ (or
    where the cut makes two the same) are dropped. Raises DataError if none remain.
    """
    counts, facts, examples = Counter(examples=0), [], iter(examples)

    def trees():
        while block := list(itertools.islice(examples, 4096)):
            counts["examples"] += len(block)
            full = [e for e in block if not any(map(is_empty, e.responses))]
            counts["dropped: empty response"] += len(block) - len(full)
            for example, (prompt, *responses) in zip(full, encode_block(full, tokenizer)):
                tree = fit(prompt, responses, max_length, max_prompt_length, counts)
                if tree:
                    facts.append((example.weight, example.label, example.margin))
                    yield tree

    dataset = to_arrays(trees(), facts, counts)
    if not len(dataset):
        reasons = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
        raise DataError(f"no example is left ({reasons}): raise --max_length, or mend the data")
    return dataset


def encode_files(
    paths: str,
    read: Callable,
    tokenizer: Tokenizer | None,
    max_length: int,
    max_prompt_length: int,
    cache: Path,
) -> Dataset:
    """`encode_examples` of what `read` finds in the files, kept in `cache` under a digest of the
    files' contents, the tokenizer and the limits; a hit is mapped, not read."""
    limits = max_length, max_prompt_length
    version = "encoding 2"  # to be raised when its result changes
    digest = hashlib.sha256(f"{version}, {read.__name__} {limits}".encode())
    for name, content in [("", tokenizer.proto), *tokenizer.files.items()] if tokenizer else []:
        digest.update(f"{name} {len(content)} ".encode() + content)
    for path in filter(None, paths.split(",")):
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    place = cache / digest.hexdigest()[:32]
    names = ("tokens", "offsets", "learnt", "trees", "facts")
    if not (place / "counts.json").is_file():
        dataset = encode_examples(read(paths), tokenizer, *limits)
        cache.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=cache))
        new.chmod(0o755)  # others may read what is theirs to read
        for name in names:
            np.save(new / f"{name}.npy", getattr(dataset, name))
        (new / "counts.json").write_text(json.dumps(dataset.counts), encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        new.rename(place)
    arrays = [np.load(place / f"{name}.npy", mmap_mode="r") for name in names]
    return Dataset(*arrays, Counter(json.loads((place / "counts.json").read_text("utf-8"))))


@dataclass(frozen=True)
class Batch:
    """A micro-batch: one stream of packed trees, and where to read the log-probs off it."""

    tokens: torch.Tensor  # (T,) token ids
    positions: torch.Tensor  # (T,) restart at the end of the prompt for every branch
    branches: torch.Tensor  # (N, 4) of each response: where its prompt is, and where its own
    #                         tokens, the last left out, are; stays on the CPU
    rows: torch.Tensor  # (M,) which predict, counted over each prompt's last and each branch's own
    targets: torch.Tensor  # (M,) the response tokens they predict, EOS included
    response: torch.Tensor  # (M,) which of the batch's responses each target belongs to
    response_ids: torch.Tensor  # (N,) which of the data set's responses these are
    lengths: torch.Tensor  # (N,) targets of each response
    chosen: torch.Tensor  # (P,) the responses that are preferred …
    rejected: torch.Tensor  # (P,) … to these; empty for SFT
    best: torch.Tensor  # (E,) the best response of each example
    weights: torch.Tensor  # (P,) weight of each pair; those of an example sum to its own
    labels: torch.Tensor  # (P,) probability that chosen is better
    margins: torch.Tensor  # (P,) by how much
    example_weights: torch.Tensor  # (E,)
    sizes: tuple[int, ...]  # responses of each example
    soft: bool  # is any label below 1?

    def to(self, device: torch.device | str) -> "Batch":
        """The same on `device`, copied asynchronously where it can be."""
        stays = ("branches", "sizes", "soft")
        move = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in stays}
        if torch.device(device).type == "cuda":
            move = {name: tensor.pin_memory() for name, tensor in move.items()}
        return replace(self, **{k: t.to(device, non_blocking=True) for k, t in move.items()})


def ragged(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The ranges starts[i] : starts[i] + sizes[i], end to end: [5, 0], [2, 3] -> [5 6 0 1 2]."""
    shift = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    return np.arange(len(shift)) + shift


def collate(dataset: Dataset, examples: np.ndarray) -> Batch:
    """Pack the examples (indices) into one stream.

    Without any, a rank that has no work in this round gets a stand-in: the first example's tokens,
    but no pairs and no best response, so that it takes part in every collective and adds nothing.
    """
    real = len(examples) > 0
    examples = np.asarray(examples) if real else np.array([0])
    counts = dataset.trees[examples + 1] - dataset.trees[examples]  # sequences of each tree
    prompt = np.cumsum(counts) - counts  # where its prompt is among those of the batch
    sequence = ragged(dataset.trees[examples], counts)
    begin = dataset.offsets[sequence]
    size = dataset.offsets[sequence + 1] - begin
    learnt = dataset.learnt[sequence]
    read = size - 1  # the last token of a response is never read
    read[prompt] += 1
    start = np.cumsum(read) - read  # of each sequence in the stream
    trunk = np.repeat(prompt, counts)  # the prompt of each sequence
    positions = ragged(np.where(trunk == np.arange(len(trunk)), 0, size[trunk]), read)

    response = np.delete(np.arange(len(trunk)), prompt)
    trunk, lengths = trunk[response], size[response]
    targets = dataset.tokens[ragged(begin[response], lengths)]
    told = targets >= 0  # the user's turns within a response are read, not learnt
    tokens = dataset.tokens[ragged(begin, read)]
    prompts = start[trunk], start[trunk] + size[trunk]
    branches = np.stack([*prompts, start[response], start[response] + read[response]], axis=1)

    best = prompt - np.arange(len(prompt))  # where its best response is among the batch's
    ranked = [range(b, b + n - 1) for b, n in zip(best, counts)]  # responses of each, best first
    pairs = [list(itertools.combinations(responses, 2)) for responses in ranked]
    chosen, rejected = np.array([p for tree in pairs for p in tree] * real).reshape(-1, 2).T
    facts, count = dataset.facts[examples], np.array(list(map(len, pairs)))
    weights, labels, margins = np.repeat(facts, count * real, axis=0).T
    weights = weights / np.repeat(count, count * real)
    integers = {
        "tokens": np.where(tokens < 0, ~tokens, tokens),
        "positions": positions,
        "branches": branches,
        # The first token of every response is predicted from the last one of the prompt.
        "rows": np.flatnonzero(told),
        "targets": targets[told],
        "response": np.repeat(np.arange(len(lengths)), lengths)[told],
        "response_ids": ragged(dataset.trees[examples] - examples, counts - 1),
        "lengths": learnt[response],
        "chosen": chosen,
        "rejected": rejected,
        "best": best[: len(best) * real],
    }
    floats = {"weights": weights, "labels": labels, "margins": margins}
    floats["example_weights"] = facts[: len(best) * real, 0]
    tensors = {k: torch.from_numpy(v.astype(np.int64)) for k, v in integers.items()}
    tensors |= {k: torch.from_numpy(v.astype(np.float32)) for k, v in floats.items()}
    return Batch(**tensors, sizes=tuple((counts - 1).tolist()), soft=bool((labels < 1).any()))


def pack(lengths: np.ndarray, examples: np.ndarray, budget: int, world_size: int) -> list[list]:
    """Spread the examples of one step over ranks and micro-batches, as evenly as lengths allow.

    Returns [rank][micro-batch] -> indices; the same number of micro-batches on every rank, as few
    as keep each within `budget` tokens (an example longer than that runs alone). Longest first to
    the least loaded (Graham's LPT rule); some may be empty.
    """
    order = examples[np.argsort(-lengths[examples], kind="stable")]
    count = max(1, math.ceil(lengths[order].sum() / (budget * world_size)))
    while True:
        heap = [(0, i) for i in range(count * world_size)]
        bins = [[] for _ in heap]
        for e in order.tolist():
            load, i = heap[0]
            bins[i].append(e)
            heapq.heapreplace(heap, (load + int(lengths[e]), i))
        over = any(load > budget and len(bins[i]) > 1 for load, i in heap)
        if not over:
            return [[np.array(b, np.int64) for b in bins[r::world_size]] for r in range(world_size)]
        count += 1 + count // 16


def examples_of(step: list[list]) -> np.ndarray:
    """The examples of a planned step, of all its ranks and micro-batches."""
    return np.concatenate([examples for rank in step for examples in rank])


def plan_epoch(
    lengths: np.ndarray, batch_size: int, budget: int, world_size: int, seed: tuple | None = None
) -> Iterator[list[list]]:
    """The steps of an epoch, each as `pack` returns it: a pure function of its arguments.

    With a seed the order is shuffled, without it is kept. The last step takes what is left.
    """
    order = np.arange(len(lengths))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    for first in range(0, len(order), batch_size):
        yield pack(lengths, order[first : first + batch_size], budget, world_size)


if __name__ == "__main__":
    from experiments.doctor import main

    main()
