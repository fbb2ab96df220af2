"""Conversations: the checkpoint's chat template, and what is learnt of what it writes.

The template is a program (jinja) that comes with a checkpoint, in a file beside tokenizer.model. It
writes a conversation as one text with control tokens in it, which is split where they stand:

    [{"role": "user", "content": "2+2?"}], answered by "4"
    <s> | [INST] 2+2? [/INST]  | 4 | </s>          control tokens as ids, the rest as texts
          ---- the prompt ----   - learnt -

What users write never becomes a control token. `python sample.py CHECKPOINT --chat` talks.
"""

import contextlib
import functools
import itertools
import json
import re
import time
from typing import NamedTuple

import jinja2.sandbox

import data

# How chats are written when a checkpoint has no template of its own: as in Anthropic's HH files.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ {'system': '', 'user': '\n\nHuman: ', 'assistant': '\n\nAssistant: '}[m.role]"
    " + m.content }}"
    "{% endfor %}{{ '\n\nAssistant:' if add_generation_prompt else '' }}"
)
GUARD = "\ufdd0"  # never a character of text: it keeps user text from spelling a control token


class Part(NamedTuple):
    """A stretch of a sequence: token ids, or text still to be encoded."""

    content: str | list[int]
    start: bool = False  # text that begins the sequence: SentencePiece puts a space before it
    hidden: bool = False  # read, but not learnt: the user's turns within a response


def compile_template(source: str) -> jinja2.Template:
    """As transformers compiles a chat_template, in a sandbox."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    environment.globals |= {"tools": None, "documents": None}
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    for mark, block in (("generation", "if true"), ("endgeneration", "endif")):  # of what is learnt
        source = re.sub(rf"({{%[-+]?\s*){mark}(\s*[-+]?%}})", rf"\1{block}\2", source)
    return environment.from_string(source)


@contextlib.contextmanager
def one_sentence(about: str):
    """Raise DataError for whatever goes wrong in other people's files, and programs."""
    try:
        yield
    except data.DataError:
        raise
    except Exception as error:
        raise data.DataError(f"{about} ({' '.join(str(error).split())})") from None


def beside(tokenizer: data.Tokenizer, name: str) -> str:
    """What is in a file beside its tokenizer.model; "" if there is none."""
    file = tokenizer.path.with_name(name)
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def control_tokens(tokenizer: data.Tokenizer) -> dict[str, int]:
    """Control tokens by name: those of the model, and those that are added beside it."""
    control = {}
    for i in range(tokenizer.vocab_size):
        piece = tokenizer.start.id_to_piece(i)
        if tokenizer.start.is_control(i) or re.fullmatch(r"<\|.+\|>", piece):
            control[piece] = i
    control |= json.loads(beside(tokenizer, "added_tokens.json") or "{}")
    config = json.loads(beside(tokenizer, "tokenizer_config.json") or "{}")
    for i, token in config.get("added_tokens_decoder", {}).items():
        control[token["content"]] = int(i)
    return control


def spell_out(tokenizer: data.Tokenizer) -> dict[int, list[int]]:
    """What SentencePiece would find in any text though it is a control token, a user-defined piece
    like <|im_end|>: its id, and the ids that spell it instead. Raises DataError."""
    with one_sentence(f"{tokenizer.path.parent}: its tokenizer files are not valid"):
        control, spelt = control_tokens(tokenizer), {}
    for i in range(tokenizer.vocab_size):
        piece = tokenizer.start.id_to_piece(i)
        found = not (tokenizer.start.is_control(i) or tokenizer.start.is_unknown(i))
        if found and piece in control:
            spelt[i] = tokenizer.inside.encode(piece[:1]) + tokenizer.inside.encode(piece[1:])
    return spelt


class Template:
    """The chat template of a tokenizer, and its control tokens by name."""

    def __init__(self, tokenizer: data.Tokenizer):
        """From the files beside its tokenizer.model. Raises DataError."""
        self.tokenizer = tokenizer
        with one_sentence(f"{tokenizer.path.parent}: its tokenizer files are not valid"):
            self.configure()

    def configure(self):
        config = json.loads(beside(self.tokenizer, "tokenizer_config.json") or "{}")
        self.control, self.spelt = control_tokens(self.tokenizer), spell_out(self.tokenizer)
        longest_first = sorted(self.control, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        self.control_pattern = re.compile(f"({pattern})")
        self.turn_end = re.compile(rf"({pattern})(\s*)$")

        self.names = {}  # what templates call bos_token and eos_token
        for name, i in (("bos", self.tokenizer.bos_id), ("eos", self.tokenizer.eos_id)):
            token = config.get(f"{name}_token")
            token = token["content"] if isinstance(token, dict) else token
            piece = self.tokenizer.start.id_to_piece(i)
            self.names[f"{name}_token"] = token if token in self.control else piece
        self.bos_id = self.control.get(self.names["bos_token"], self.tokenizer.bos_id)
        self.eos_id = self.control.get(self.names["eos_token"], self.tokenizer.eos_id)
        self.add_bos = config.get("add_bos_token", True)

        template = beside(self.tokenizer, "chat_template.jinja") or config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {t["name"]: t["template"] for t in template}.get("default")
        self.template = compile_template(template or PLAIN_TEMPLATE)

    def render(self, turns: list[dict], answer: bool, where: str = "") -> str:
        """The conversation as the template writes it; if `answer`, up to the assistant's."""
        with one_sentence(f"{where}: the chat template refuses the turns"):
            return self.template.render(messages=turns, add_generation_prompt=answer, **self.names)

    def guard(self, turns: list[dict]) -> list[dict]:
        """The turns, with control tokens that their text spells broken up until they are split."""
        broken = lambda match: match[0][:1] + GUARD + match[0][1:]
        return [{k: self.control_pattern.sub(broken, v) for k, v in t.items()} for t in turns]

    def split(self, text: str, hidden: bool = False) -> list[Part]:
        """Rendered text as parts: the template's control tokens as ids, the rest as text."""
        parts = []
        for piece in filter(None, self.control_pattern.split(text)):
            token = self.control.get(piece)
            content = piece.replace(GUARD, "") if token is None else [token]
            parts.append(Part(content, hidden=hidden))
        return parts

    def layout(self, example: data.Example) -> list[list[Part]]:
        """The parts of an example's sequences: the prompt, then each response; of an empty answer
        none. Raises DataError where the template refuses the turns, or forgets earlier ones."""
        turns, bos = self.guard(example.prompt), Part([self.bos_id])
        answer = all(response[0]["role"] == "assistant" for response in example.responses)
        begun = self.render(turns, answer, example.where)
        head = self.split(begun)
        given = head[:1] == [bos]
        head = [part._replace(start=i == 0) for i, part in enumerate(head[given:])]
        sequences = [[bos] * (given or self.add_bos) + head]
        for response in example.responses:
            parts = []
            if response[-1]["content"]:
                said = self.guard(response)
                parts = self.continuation(turns, begun, answer, said, example.where)
            sequences.append(parts)
        return sequences

    def continuation(
        self, turns: list[dict], begun: str, answer: bool, response: list[dict], where: str
    ) -> list[Part]:
        """The parts of a response to `turns`: what the assistant says, with what ends it; between
        its turns, hidden, those of others. begun: the turns as rendered; answer: do they end where
        the assistant speaks?"""
        parts, done, ended = [], begun, None
        for i, turn in enumerate(response):
            if turn["role"] != "assistant":
                continue
            history = turns + response[:i]
            opened = self.render(history, True, where) if i or not answer else begun
            full = self.render([*history, turn], False, where)
            if not (opened.startswith(done) and full.startswith(opened)):
                raise data.DataError(f"{where}: the chat template rewrites earlier turns")
            said = full[len(opened) :]
            ended = self.turn_end.search(said)
            if ended:  # what follows the token that ends a turn is not learnt
                said = said[: ended.start(2)]
            parts += self.split(opened[len(done) :], hidden=True) + self.split(said)
            done = opened + said
        return parts if ended else [*parts, Part([self.eos_id])]

    def encode(self, texts: list[str], continuation: bool) -> list[list[int]]:
        """The tokenizer's ids of texts, in which user-defined control tokens are spelt out."""
        encoded = self.tokenizer.encode(texts, continuation)
        if not self.spelt:
            return encoded
        return [[j for i in ids for j in self.spelt.get(i, (i,))] for ids in encoded]


@functools.lru_cache(maxsize=8)
def template_of(tokenizer: data.Tokenizer) -> Template:
    """Its chat template, read once. Raises DataError."""
    return Template(tokenizer)


def encode_chats(examples: list[data.Example], tokenizer: data.Tokenizer) -> list[list[list[int]]]:
    """[prompt ids, response ids, …] of each example, all of them conversations, before any cut.

    BOS, where the template or the tokenizer wants one, and what ends a turn are included; of what
    is read but not learnt there is ~id; an empty answer has no ids. Raises DataError.
    """
    template = template_of(tokenizer)
    layouts = list(map(template.layout, examples))
    texts = {True: [], False: []}  # SentencePiece encodes a list at a time, on all cores
    for part in itertools.chain.from_iterable(itertools.chain.from_iterable(layouts)):
        if isinstance(part.content, str):
            texts[part.start].append(part.content)
    encoded = {start: iter(template.encode(texts[start], not start)) for start in texts}

    def ids(part: Part) -> list[int]:
        ids = next(encoded[part.start]) if isinstance(part.content, str) else part.content
        return [~i for i in ids] if part.hidden else ids

    join = lambda sequence: list(itertools.chain.from_iterable(map(ids, sequence)))
    trees = [list(map(join, sequences)) for sequences in layouts]
    for tree in trees:
        tree[0] = tree[0] or [template.bos_id]  # a response needs something that it is read after
    return trees


def end_of_turn(tokenizer: data.Tokenizer) -> int:
    """The id that the template ends the assistant's turn with, or else its EOS."""
    prompt = [{"role": "user", "content": "x"}]
    answer = [{"role": "assistant", "content": "x"}]
    example = data.Example(prompt, (answer,), str(tokenizer.path.parent))
    [end] = template_of(tokenizer).layout(example)[1][-1].content
    return end


def stop_ids(tokenizer: data.Tokenizer) -> set[int]:
    """The ids that end an answer: EOS, and what the template ends the assistant's turn with."""
    return {tokenizer.eos_id, template_of(tokenizer).eos_id, end_of_turn(tokenizer)}


class Stream:
    """Prints one completion as it is sampled; holds back bytes that are not yet a character."""

    def __init__(self, tokenizer: data.Tokenizer, stops: set[int]):
        self.tokenizer, self.stops, self.ids, self.shown = tokenizer, stops, [], 0

    def __call__(self, new: list[int]):
        self.ids += [i for i in new if i not in self.stops]
        text = self.tokenizer.decode(self.ids, continuation=True).rstrip("\ufffd")
        print(text[self.shown :], end="", flush=True)
        self.shown = max(self.shown, len(text))


def talk(args, options: dict):
    """Talk until the end of input; the conversation is rendered as training rendered it.

    args: sample.py's; options: what sample.generate takes. Raises DataError.
    """
    import sample
    from extra.formats import check

    check("--system", args.system)
    model, tokenizer = sample.load(args.checkpoint)
    if tokenizer is None:
        raise data.DataError(f"{args.checkpoint}: --chat needs a tokenizer.model there")
    stops = stop_ids(tokenizer)
    turns = [{"role": "system", "content": args.system}] if args.system else []
    while True:
        try:
            text = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        check("your turn", text)
        turns.append({"role": "user", "content": text})
        stream = Stream(tokenizer, stops)
        [[_, ids]] = sample.draw(model, tokenizer, [turns], **options, on_token=stream)
        said = tokenizer.decode([i for i in ids if i not in stops], continuation=True)
        turns.append({"role": "assistant", "content": said.strip()})  # the template has its space
