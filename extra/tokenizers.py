"""Tokenizers as checkpoints bring them: tokenizer.json, and what lies beside a tokenizer.model.

`data.Tokenizer(path)` is one of the two classes here. Beyond text and ids they know the control
tokens, which no text yields; tokens that are found in text, like Qwen's <think>; and what becomes
of the space that SentencePiece and its like put first, which depends on the place of a text:

    first     it begins a sequence                 "hi" -> ▁hi
    after     it follows a control token           by the tokenizer's own rule
    inside    it continues a text, as a response   "hi" -> hi
"""

import copy
import json
import re
from pathlib import Path

import data
from extra.reading import parse_json, read_bytes, short

LARGEST = 2**29  # bytes of a tokenizer; the largest have some 40 MB
IDS = range(2**24)  # of tokens, far beyond any vocabulary that there is
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def find_class(path: str | Path) -> type:
    """Which of the two reads this file, or what is in this directory: tokenizer.json first."""
    path = Path(path)
    is_json = (path / "tokenizer.json").is_file() if path.is_dir() else path.suffix == ".json"
    return JsonTokenizer if is_json else ModelTokenizer


def pattern_of(tokens: dict[str, str]) -> re.Pattern:
    """Finds tokens in text, the longest first, as re.split wants it; values are their patterns."""
    choices = [tokens[name] for name in sorted(tokens, key=len, reverse=True)]
    return re.compile(f"({'|'.join(choices)})" if choices else "((?!))")


def is_id(value) -> bool:
    return type(value) is int and value in IDS


def is_token(value) -> bool:
    """As files name a token: its text, or an object with its content; "" and null for none."""
    text = value.get("content") if isinstance(value, dict) else value
    return value is None or isinstance(text, str)


def is_ids(value) -> bool:
    return value is None or all(map(is_id, value if isinstance(value, list) else [value]))


def is_template(value) -> bool:
    """One, or several by their names."""
    if not isinstance(value, list):
        return value is None or isinstance(value, str)
    if not all(isinstance(one, dict) for one in value):
        return False
    return all(isinstance(one.get(key), str) for one in value for key in ("name", "template"))


def is_decoder(value) -> bool:
    """Added tokens by their ids, which are texts there."""
    if not isinstance(value, dict):
        return False
    for i, token in value.items():
        if not (i.isascii() and i.isdecimal() and len(i) < 10 and int(i) in IDS):
            return False
        if not isinstance(token, dict) or token.get("special") not in (True, False, None):
            return False
        if not isinstance(token.get("content"), str) or not token["content"]:
            return False
    return True


FIELDS = dict.fromkeys(NAMED, (is_token, "is no token"))
FIELDS |= dict.fromkeys(("bos_token_id", "eos_token_id"), (is_ids, "is neither an id nor several"))
FIELDS |= {
    "chat_template": (is_template, "is neither a template nor several with their names"),
    "added_tokens_decoder": (is_decoder, "must have a token with its content for each id"),
    "legacy": (lambda value: value in (True, False, None), "is neither true nor false"),
}


class Described(data.Tokenizer):
    """What other files say of a tokenizer.

    control: ids by name of the tokens that no text yields. names: what chat templates call
    bos_token, eos_token, …. template: the chat template's source, or None. opening: what a text
    begins with. stops: ids that end an answer by generation_config.json.
    """

    def read_beside(self):
        """Read the files beside. Raises DataError."""
        config = self.fields_beside("tokenizer_config.json")
        special = self.fields_beside("special_tokens_map.json")
        # As transformers has it: of two names, older checkpoints' is in the other file.
        is_new = "added_tokens_decoder" in config
        special = special | config if is_new else config | special
        self.names = {}
        for name in NAMED:
            token = special.get(name)
            if token not in (None, ""):
                self.names[name] = token["content"] if isinstance(token, dict) else token
        template = self.beside("chat_template.jinja") or config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {t["name"]: t["template"] for t in template}.get("default")
        self.template = template
        stops = self.fields_beside("generation_config.json").get("eos_token_id")
        stops = [] if stops is None else stops
        self.stops = list(stops) if isinstance(stops, list) else [stops]
        self.find_tokens(config)
        self.control_ids = set(self.control.values())

    def beside(self, name: str) -> str:
        """What is in a file beside; "" if there is none. Raises DataError."""
        file = self.path.with_name(name)
        try:
            return read_bytes(file).decode("utf-8") if file.exists() else ""
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise data.DataError(f"{file}: cannot be read ({reason})") from None

    def fields_beside(self, name: str) -> dict:
        """What a JSON object in a file beside says; {} if there is none. Raises DataError, also for
        a field that is not what it must be."""
        file, content = self.path.with_name(name), {}
        if file.exists():
            try:
                content = parse_json(self.beside(name).encode())
            except data.DataError:
                raise
            except ValueError as error:
                raise data.DataError(f"{file}: not valid JSON ({error})") from None
        if not isinstance(content, dict):
            raise data.DataError(f"{file}: not a JSON object")
        for key, (is_right, what) in FIELDS.items():
            if key in content and not is_right(content[key]):
                raise data.DataError(f"{file}: not valid ({key} {short(content[key])} {what})")
        return content

    def encode(self, text: str | list[str], continuation: bool = False):
        """Ids of a text (or of each of a list), without BOS and EOS."""
        texts = text if isinstance(text, list) else [text]
        encoded = self.encode_at("inside" if continuation else "first", texts)
        return encoded if isinstance(text, list) else encoded[0]

    def spell_out(self, encoded: list[list[int]]) -> list[list[int]]:
        """Control tokens that were found in text, as the ids that spell their names."""
        for n, ids in enumerate(encoded):
            if not self.control_ids.isdisjoint(ids):
                encoded[n] = [j for i in ids for j in self.spelt.get(i, (i,))]
        return encoded


class ModelTokenizer(Described):
    """A SentencePiece model, and what the files beside it say and add."""

    def __init__(self, path: str | Path):
        """Read a tokenizer.model, or the one in a directory. Raises DataError."""
        path = Path(path)
        path = path / "tokenizer.model" if path.is_dir() else path
        try:
            if not read_bytes(path, LARGEST):
                raise data.DataError(f"{path}: not a SentencePiece model (it is empty)")
        except OSError as error:
            raise data.DataError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            super().__init__(path)
            self.pieces = {self.start.id_to_piece(i): i for i in range(self.vocab_size)}
        except UnicodeDecodeError as error:
            raise data.DataError(f"{path}: not a SentencePiece model ({error})") from None
        self.read_beside()
        self.spelt = {}  # user-defined pieces that are control tokens: found in any text
        for piece, i in self.pieces.items():
            if i in self.control_ids and not self.is_reserved(i):
                self.spelt[i] = self.inside.encode(piece[:1]) + self.inside.encode(piece[1:])

    def is_reserved(self, i: int) -> bool:
        """Does SentencePiece itself never find this piece in text?"""
        return self.start.is_control(i) or self.start.is_unknown(i)

    def find_tokens(self, config: dict):
        """Tokens beside the model's pieces, those of its pieces that are control tokens, BOS and
        EOS. Found in text is only what is said not to be special."""
        self.control, self.added = {}, {}
        for piece, i in self.pieces.items():
            if self.start.is_control(i) or re.fullmatch(r"<\|.+\|>", piece):
                self.control[piece] = i
        added = self.fields_beside("added_tokens.json")
        for name, i in added.items():
            if not name or not is_id(i):
                file = self.path.with_name("added_tokens.json")
                raise data.DataError(f"{file}: not valid ({short(name)} has the id {short(i)})")
        self.control |= added
        for i, token in config.get("added_tokens_decoder", {}).items():
            name = token["content"]
            self.control[name] = int(i)
            if token.get("special") is False and name not in self.names.values():
                del self.control[name]
                if name not in self.pieces:
                    self.added[name] = int(i)
        for name, i in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if self.names.get(name) not in self.control:
                self.names[name] = self.start.id_to_piece(i)
        self.stops.append(self.eos_id)  # the model's own, whatever the files name
        self.bos_id = self.control.get(self.names["bos_token"], self.bos_id)
        self.eos_id = self.control.get(self.names["eos_token"], self.eos_id)
        self.opening = [self.bos_id]
        self.legacy = config.get("legacy", True)  # a text after a control token begins with ▁
        self.control_pattern = pattern_of({name: re.escape(name) for name in self.control})
        self.added_pattern = pattern_of({name: re.escape(name) for name in self.added})
        self.added_names = {i: name for name, i in self.added.items()}

    def encode(self, text: str | list[str], continuation: bool = False):
        """Ids of a text (or of each of a list), without BOS and EOS; decode gives the text back."""
        texts = text if isinstance(text, list) else [text]
        encoded = self.with_added(texts, self.inside if continuation else self.start)
        return encoded if isinstance(text, list) else encoded[0]

    def encode_at(self, place: str, texts: list[str]) -> list[list[int]]:
        """Ids of texts that stand at that place in chats, where no space is put before a space."""
        spaced = place == "first" or (place == "after" and self.legacy)
        if not spaced:
            return self.with_added(texts, self.inside)
        processors = [self.inside if text.startswith(" ") else self.start for text in texts]
        return [self.with_added([t], p)[0] for t, p in zip(texts, processors)]

    def with_added(self, texts: list[str], processor) -> list[list[int]]:
        """Ids of texts in which added tokens are found; what follows one is spaced like a text
        that follows a control token, but for exactness before a space, too."""
        if not self.added:
            return self.spell_out(processor.encode(texts))
        again, encoded = self.start if self.legacy else self.inside, []
        for text in texts:
            ids = []
            for n, piece in enumerate(self.added_pattern.split(text)):
                if piece in self.added:
                    ids.append(self.added[piece])
                elif piece:
                    ids += (again if n else processor).encode(piece)
            encoded.append(ids)
        return self.spell_out(encoded)

    def decode(self, ids: list[int], continuation: bool = False) -> str:
        """The text of ids, without control tokens; with `continuation` its first space is kept."""
        processor, text, run = self.inside if continuation else self.start, "", []
        for i in [*ids, None]:
            if i is None or i in self.added_names:
                text += processor.decode(run) + self.added_names.get(i, "")
                processor, run = self.start if self.legacy else self.inside, []
            elif i < self.vocab_size:
                run.append(i)
        return text


class JsonTokenizer(Described):
    """A tokenizer.json, read by the package `tokenizers`: what it says is the truth."""

    def __init__(self, path: str | Path):
        """Read a tokenizer.json, or the one in a directory. Raises DataError."""
        path = Path(path)
        self.path = path / "tokenizer.json" if path.is_dir() else path
        try:
            import tokenizers
        except ImportError:
            what = f"{self.path}: is read by a package that is missing: pip install tokenizers"
            raise data.DataError(what) from None
        try:
            self.proto = read_bytes(self.path, LARGEST)
            given = parse_json(self.proto)
            check_vocabulary(given)
            self.at = self.open_at(tokenizers.Tokenizer)
        except OSError as error:
            raise data.DataError(f"{self.path}: cannot be read ({error.strerror})") from None
        except BaseException as error:  # the package has its own Exception, and panics
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            why = " ".join(str(error).split())[:200]
            raise data.DataError(f"{self.path}: not a tokenizer.json ({why})") from None
        self.check_ids(given.get("added_tokens") or ())
        self.vocab_size = 1 + max(self.at["first"].get_vocab().values())
        self.read_beside()
        self.spelt = {}
        for name, i in self.control.items():  # not special, but named as if, or of a unigram model
            encode = lambda text: self.at["inside"].encode(text, add_special_tokens=False).ids
            self.spelt[i] = encode(name[:1]) + encode(name[1:])

    def open_at(self, kind) -> dict:
        """The package's tokenizer for texts of each place. Raises what the package does."""
        spec = json.loads(kind.from_buffer(self.proto).to_str())
        spec |= {"truncation": None, "padding": None}
        opened, made = {}, []
        for place in ("first", "after", "inside"):
            variant = without_space(spec, place)
            same = [t for v, t in made if v == variant]  # most put no space anywhere
            opened[place] = same[0] if same else kind.from_str(json.dumps(variant))
            opened[place].encode_special_tokens = True  # as text: user text yields none
            opened[place].encode("\ue000")  # which none knows, and each must say so in some way
            made.append((variant, opened[place]))
        return opened

    def check_ids(self, added: list[dict]):
        """Are there tokens, with the ids that the file says? Raises DataError."""
        ids = self.at["first"].get_vocab()
        if not ids:
            raise data.DataError(f"{self.path}: not a tokenizer.json (it has no tokens)")
        for token in added:
            name, i = token["content"], token["id"]
            if ids.get(name) != i:
                what = f"added_tokens: {short(name)} has the id {i}, but would be {ids.get(name)}"
                raise data.DataError(f"{self.path}: {what}: no id may be left out")

    def find_tokens(self, config: dict):
        """Control tokens, BOS and EOS. What a text begins with, the post-processor says."""
        whole, patterns = self.at["first"], {}
        beside = self.fields_beside("config.json")
        for name in ("bos_token", "eos_token"):  # not named: then the model's config has its id
            ids = beside.get(f"{name}_id")
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if ids and name not in self.names:
                self.names[name] = whole.id_to_token(ids[0]) or ""
        self.control = {}
        for i, token in whole.get_added_tokens_decoder().items():
            if token.special or token.content in self.names.values():
                self.control[token.content] = i
                left, right = r"\s*" * token.lstrip, r"\s*" * token.rstrip
                patterns[token.content] = left + re.escape(token.content) + right
        self.control_pattern = pattern_of(patterns)
        self.bos_id = whole.token_to_id(self.names.get("bos_token", ""))
        self.eos_id = whole.token_to_id(self.names.get("eos_token", ""))
        if self.eos_id is None:
            what = "tokenizer_config.json names no eos_token that tokenizer.json has"
            raise data.DataError(f"{self.path.parent}: {what}, nor config.json its id")
        plain, processed = (whole.encode("a", add_special_tokens=x).ids for x in (False, True))
        starts = (n for n in range(len(processed)) if processed[n:][: len(plain)] == plain)
        self.opening = processed[: next(starts, 0)]

    def encode_at(self, place: str, texts: list[str]) -> list[list[int]]:
        """Ids of texts that stand at that place of a sequence."""
        encoded = self.at[place].encode_batch(texts, add_special_tokens=False)
        return self.spell_out([e.ids for e in encoded])

    def decode(self, ids: list[int], continuation: bool = False) -> str:
        """The text of ids, without control tokens; with `continuation` its first space is kept."""
        known = [i for i in ids if i < self.vocab_size and i not in self.control_ids]
        place = "inside" if continuation else "first"
        return self.at[place].decode(known, skip_special_tokens=False)


def check_vocabulary(given):
    """Raises ValueError for ids up to which the package would count for minutes."""
    model = given.get("model") if isinstance(given, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    for name, i in vocabulary.items() if isinstance(vocabulary, dict) else ():
        if not is_id(i):
            raise ValueError(f"{short(name)} has the id {short(i)}")


# Where a tokenizer.json puts or takes spaces, and what it calls the steps of a sequence there.
PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def without_space(spec: dict, place: str) -> dict:
    """A tokenizer.json for texts at that place: after a control token Metaspace's `first` puts no
    space, inside a text nothing does, and the decoder takes none away."""
    if place == "first":
        return spec
    changed = {}
    for part, inner in PARTS.items():
        steps = copy.deepcopy(spec[part]) or {"type": "Sequence", inner: []}
        steps = steps[inner] if steps["type"] == "Sequence" else [steps]
        for step in steps:
            first = step.get("prepend_scheme") == "first"
            if step["type"] == "Metaspace" and (first or place == "inside"):
                step["prepend_scheme"] = "never"
            if step["type"] == "ByteLevel" and place == "inside":
                step["add_prefix_space"] = False
        if place == "inside":
            steps = [step for step in steps if step["type"] not in ("Prepend", "Strip")]
        changed[part] = {"type": "Sequence", inner: steps} if steps else None
    return spec | changed
