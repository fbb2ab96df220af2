"""Conversations: the checkpoint's chat template, and what is learnt of what it writes.

The template is a program (jinja) that comes with a checkpoint, in a file beside its tokenizer. It
writes a conversation as one text with control tokens in it, which is split where they stand:

    [{"role": "user", "content": "2+2?"}], answered by "4"
    <s> | [INST] 2+2? [/INST]  | 4 | </s>          control tokens as ids, the rest as texts
          ---- the prompt ----   - learnt -

What users write never becomes a control token. `python sample.py CHECKPOINT --chat` talks.
"""

import functools
import itertools
import re
from collections.abc import Collection
from typing import NamedTuple

import data
from extra.templates import BOUNDS, compile_template, one_sentence, render

# How chats are written when a checkpoint has no template of its own: as in Anthropic's HH files,
# and every answer ends.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ {'system': '', 'user': '\n\nHuman: ', 'assistant': '\n\nAssistant: '}[m.role]"
    " + m.content + (eos_token if m.role == 'assistant' else '') }}"
    "{% endfor %}{{ '\n\nAssistant:' if add_generation_prompt else '' }}"
)
GUARD = "\ufdd0"  # never a character of text: it keeps user text from spelling a control token
OPEN_END = GUARD + GUARD  # and this marks where an answer is to be continued
CHATS = "conversations"
SPELT = "with text that spells control tokens, kept text (--rendered reads it as tokens)"


class Part(NamedTuple):
    """A stretch of a sequence: a control token's id, or text still to be encoded."""

    content: str | list[int]
    hidden: bool = False  # read, but not learnt: the user's turns within a response
    place: str = ""  # of a text: first, after or inside, as extra/tokenizers.py has them


class Rewritten(data.DataError):
    """The template writes earlier turns differently once others follow."""


class Template:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: data.Tokenizer):
        """From the files beside its own. Raises DataError."""
        self.tokenizer = tokenizer
        self.source = tokenizer.template or PLAIN_TEMPLATE
        # Phi-3's turns end in <|end|>, its conversations in EOS beyond that, which is no turn's.
        beyond = rf"(?:\s+{re.escape(tokenizer.names['eos_token'])})?\s*$"
        self.turn_end = re.compile(tokenizer.control_pattern.pattern + beyond)
        with one_sentence(f"{tokenizer.path.parent}: its chat template cannot be compiled"):
            self.template = compile_template(self.source)

    def render(self, turns: list[dict], answer: bool, where: str = "", context=None) -> str:
        """The conversation as the template writes it; if `answer`, up to the assistant's. context:
        tools, documents, and what else it is handed."""
        given = dict(context or {})
        given |= given.pop("chat_template_kwargs", None) or {}
        given |= {"messages": turns, "add_generation_prompt": answer}
        with one_sentence(f"{where}: the chat template refuses the turns"):
            return render(self.template, self.tokenizer.names | given)

    def guard(self, value):
        """Turns, or whatever is in them, with control tokens that text spells broken up until the
        rendered text is split."""
        if isinstance(value, str):
            broken = lambda match: re.sub(r"(?<=\S)", GUARD, match[0], count=1)  # within its name
            return self.tokenizer.control_pattern.sub(broken, value)
        if isinstance(value, dict):
            return {self.guard(key): self.guard(inner) for key, inner in value.items()}
        return [self.guard(inner) for inner in value] if isinstance(value, list) else value

    def split(self, text: str, hidden: bool = False) -> list[Part]:
        """Rendered text as parts: the template's control tokens as ids, the rest as text."""
        parts, control = [], self.tokenizer.control
        for n, piece in enumerate(self.tokenizer.control_pattern.split(text)):
            if n % 2:  # some tokens take the space beside them along
                token = control[piece] if piece in control else control[piece.strip()]
                parts.append(Part([token], hidden))
            elif piece:
                parts.append(Part(piece.replace(GUARD, ""), hidden))
        return parts

    def begin(self, turns: list[dict], answer: bool, where: str, context) -> str:
        """The turns as rendered, up to where the assistant speaks if `answer`; within its turn, if
        that was the last: then it is continued."""
        if not answer or turns[-1]["role"] != "assistant":
            return self.render(turns, answer, where, context)
        last = turns[-1] | {"content": (turns[-1]["content"] or "") + OPEN_END}
        begun, mark, _ = self.render([*turns[:-1], last], False, where, context).partition(OPEN_END)
        if not mark:
            raise data.DataError(f"{where}: the chat template does not write the turn to continue")
        return begun

    def layout(self, example: data.Example) -> list[list[Part]]:
        """The parts of an example's sequences: the prompt, then each response. Raises Rewritten
        where the template writes earlier turns differently in the end, DataError where it refuses
        the turns."""
        turns, context = self.guard(example.prompt), self.guard(example.context)
        answer = all(r[0]["role"] == "assistant" for r in example.responses if r)
        begun = self.begin(turns, answer, example.where, context)
        sequences = [self.split(begun)]
        for response in example.responses:
            said, inputs = self.guard(response), (begun, answer, example.where, context)
            sequences.append(self.continuation(turns, said, *inputs) if response else [])
        return self.placed(sequences)

    def placed(self, sequences: list[list[Part]]) -> list[list[Part]]:
        """With the place of every text. A response needs something that it is read after."""
        head, *responses = sequences
        last, placed = None, []
        for parts in ([*head], *responses):
            before, done = last, []
            for part in parts:
                if isinstance(part.content, str):
                    is_text = before and isinstance(before.content, str)
                    place = "inside" if is_text else "after" if before else "first"
                    part = part._replace(place=place)
                done.append(part)
                before = part
            last = last or before  # of the prompt
            placed.append(done)
        placed[0] = placed[0] or [Part(self.tokenizer.opening or [self.tokenizer.eos_id])]
        return placed

    def continuation(
        self, turns: list[dict], response: list[dict], begun: str, answer: bool, where: str, context
    ) -> list[Part]:
        """The parts of a response to `turns`: what the assistant says, each time with what ends it;
        between its turns, hidden, those of others. begun: the turns as rendered; answer: do they
        end where the assistant speaks?"""
        parts, done, history = [], begun, turns
        for i, turn in enumerate(response):
            if i == 0 and answer and turns[-1]["role"] == "assistant":  # the turn goes on
                history, opened = turns[:-1], begun
                turn = turn | {"content": turns[-1]["content"] + turn["content"]}
            elif turn["role"] == "assistant":
                opened = self.render(history, True, where, context) if i or not answer else begun
            if turn["role"] == "assistant":
                full = self.render([*history, turn], False, where, context)
                if not (opened.startswith(done) and full.startswith(opened)):
                    what = "rewrites earlier turns"
                    before = self.render(history, False, where, context)
                    if opened.startswith(done) and full.startswith(before):
                        head = opened.removeprefix(before).replace(GUARD, "")[-60:]
                        what = f"opens answers by {head!r}, and then does not write them so"
                    raise Rewritten(f"{where}: the chat template {what}")
                said = full[len(opened) :]
                hidden = turn.get("train") is False
                parts += self.split(opened[len(done) :], True) + self.answer(said, hidden)
                done = opened + said[: self.length(said)]
            history = [*history, turn]
        return parts

    def length(self, said: str) -> int:
        """Of an answer as rendered, up to what ends it: what follows that is not learnt."""
        ended = self.turn_end.search(said)
        return ended.end(1) if ended else len(said)

    def answer(self, said: str, hidden: bool = False) -> list[Part]:
        """The parts of an answer as rendered, with EOS where the template leaves it open."""
        parts = self.split(said[: self.length(said)], hidden)
        ended = parts and not isinstance(parts[-1].content, str)
        return parts if ended else [*parts, Part([self.tokenizer.eos_id], hidden)]

    def last_answers(self, example: data.Example) -> list[list[Part]]:
        """The layout where the template rewrites earlier turns: everything as rendered for the last
        turn of each response, of which alone something is learnt."""
        turns, context = self.guard(example.prompt), self.guard(example.context)
        heads, answers = [], []
        for response in filter(None, map(self.guard, example.responses)):
            history = [*turns, *response[:-1]]
            begun = self.begin(history, True, example.where, context)
            inputs = begun, True, example.where, context
            answers.append(self.continuation(history, response[-1:], *inputs))
            heads.append(self.split(begun))
        same = lambda column: all(part == column[0] for part in column)
        shared = [column[0] for column in itertools.takewhile(same, zip(*heads))]
        if not shared:
            raise Rewritten(f"{example.where}: the chat template rewrites earlier turns")
        sequences, pairs = [shared], iter(zip(heads, answers))
        for response in example.responses:
            head, answer = next(pairs) if response else (shared, [])
            sequences.append([p._replace(hidden=True) for p in head[len(shared) :]] + answer)
        return self.placed(sequences)

    def rendered(self, example: data.Example) -> list[list[Part]]:
        """The layout of texts that a template wrote: their control tokens are meant. What ends a
        response is not doubled, and what follows it not learnt."""
        sequences, opening = [self.split(example.prompt)], Part(self.tokenizer.opening)
        for text in example.responses:
            ended = self.length(text)
            parts = self.answer(text) + self.split(text[ended:], True) if text else []
            if not example.prompt and parts[:1] == [opening]:
                sequences[0], parts = [opening], parts[1:]  # it brings its own
            sequences.append(parts)
        sequences = self.placed(sequences)
        if opening.content and sequences[0][:1] != [opening]:
            sequences[0].insert(0, opening)  # as texts begin
        return sequences

    def lay_out(self, example: data.Example) -> list[list[Part]]:
        """The parts of an example's sequences, whatever it is."""
        if not data.is_turns(example.prompt):
            return self.rendered(example)
        try:
            return self.layout(example)
        except Rewritten:
            if len(example.responses) == 1 and len(answers_in(example.responses[0])) > 1:
                raise  # separate() makes several examples of it
            return self.last_answers(example)


def answers_in(turns: list[dict]) -> list[int]:
    """Where the assistant's turns are."""
    return [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]


def separate(example: data.Example, tokenizer: data.Tokenizer) -> list[data.Example]:
    """A conversation to be learnt whole, as one example for each answer that is, if the template
    rewrites earlier turns: so each is learnt in the context that the template gives it."""
    if len(example.responses) != 1 or len(answers_in(example.responses[0])) < 2:
        return [example]
    try:
        template_of(tokenizer).layout(example)
        return [example]
    except Rewritten:
        prompt, [turns] = example.prompt, example.responses
        parts = []
        for i in answers_in(turns):
            if turns[i].get("train") is not False:
                parts.append(
                    example._replace(prompt=prompt + turns[:i], responses=(turns[i : i + 1],))
                )
        return parts or [example._replace(responses=(turns[:1],))]  # of which nothing is learnt


def check_written(example: data.Example, tokenizer: data.Tokenizer):
    """Raise DataError naming what the example has and the template leaves out."""
    template, context = template_of(tokenizer), example.context or {}
    for response in example.responses:
        turns = [*example.prompt, *response]
        used = {"tools"} if context.get("tools") else set()
        names = ("tool_calls", "reasoning_content", "thinking")
        used |= {name for turn in turns for name in names if turn.get(name)}
        rest = [turn for turn in turns if turn["role"] != "tool"]
        if len(rest) < len(turns) and "tool" not in template.source:
            whole, without = (template.render(t, False, example.where) for t in (turns, rest))
            used |= {"tool"} if whole == without else set()
        thought = any("</think>" in turn["content"] for turn in response[-1:])
        if thought and "</think>" not in template.render(turns, False, example.where, context):
            what = f"{example.where}: the chat template leaves out what is before </think>"
            raise data.DataError(f"{what}: take it out of the data, or take another template")
        if missing := [name for name in sorted(used) if name not in template.source]:
            what = f"{example.where}: the chat template leaves out '{missing[0]}'"
            raise data.DataError(f"{what}: take it out of the data, or take a template that has it")


def check_rendered(example: data.Example, tokenizer: data.Tokenizer):
    """Raise DataError where the template refuses a conversation, or leaves something out."""
    with BOUNDS:
        check_written(example, tokenizer)
        for part in separate(example, tokenizer):
            template_of(tokenizer).lay_out(part)


@functools.lru_cache(maxsize=8)
def template_of(tokenizer: data.Tokenizer) -> Template:
    """Its chat template, read once. Raises DataError."""
    return Template(tokenizer)


def encode_chats(examples: list[data.Example], tokenizer: data.Tokenizer) -> list[list[list[int]]]:
    """[prompt ids, response ids, …] of each example, before any cut: conversations, or texts that
    a template rendered.

    BOS, where the template writes one, and what ends a turn are included; what is read but not
    learnt is ~id; a response without turns has no ids. Raises DataError.
    """
    with BOUNDS:
        layouts = list(map(template_of(tokenizer).lay_out, examples))
    return encode_layouts(layouts, tokenizer)


def encode_layouts(layouts: Collection, tokenizer: data.Tokenizer) -> list[list[list[int]]]:
    """The ids of layouts, as encode_chats gives them."""
    texts = {"first": [], "after": [], "inside": []}  # encoded a list at a time, on all cores
    for part in itertools.chain.from_iterable(itertools.chain.from_iterable(layouts)):
        if isinstance(part.content, str):
            texts[part.place].append(part.content)
    encoded = {place: iter(tokenizer.encode_at(place, texts[place])) for place in texts}

    def ids(part: Part) -> list[int]:
        ids = next(encoded[part.place]) if part.place else part.content
        return [~i for i in ids] if part.hidden else ids

    join = lambda sequence: list(itertools.chain.from_iterable(map(ids, sequence)))
    return [list(map(join, sequences)) for sequences in layouts]


def merges(example: data.Example, tokenizer: data.Tokenizer) -> bool:
    """Would prompt and best response, encoded as one text, have another token where they meet?"""
    before, after, place = example.prompt, example.responses[0], "first"
    if data.is_turns(before) or (tokenizer.rendered and isinstance(before, str)):
        head, response = template_of(tokenizer).lay_out(example)[:2]
        if not (head and response):
            return False
        before, after, place = head[-1].content, response[0].content, head[-1].place
    if not (isinstance(before, str) and isinstance(after, str) and before and after):
        return False  # token ids, control tokens
    places = ((place, before), ("inside", after), (place, before + after))
    left, right, joint = (tokenizer.encode_at(p, [text])[0] for p, text in places)
    return joint != left + right


def end_of_turn(tokenizer: data.Tokenizer) -> int:
    """The id that the template ends the assistant's turn with, or else its EOS."""
    prompt = [{"role": "user", "content": "x"}]
    answer = [{"role": "assistant", "content": "x"}]
    example = data.Example(prompt, (answer,), str(tokenizer.path.parent))
    return encode_chats([example], tokenizer)[0][1][-1]


def stop_ids(tokenizer: data.Tokenizer) -> set[int]:
    """The ids that end an answer: EOS, what the template ends the assistant's turn with, and what
    generation_config.json names."""
    return {tokenizer.eos_id, end_of_turn(tokenizer), *tokenizer.stops}


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
