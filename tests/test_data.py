"""Text rules, plain files, cutting, packing, and what a batch holds: the spine's data.py alone."""

import dataclasses
import gzip
import importlib.util
import io
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import SHAPES, make_model, random_dataset, save_tokenizer, sequences, write_jsonl

import data
import dpo
from extra import encoded

PAIR = {"prompt": "Q: 2+2?", "chosen": " 4", "rejected": " 5"}


def random_text(rng, low=0, high=9) -> str:
    alphabet = " \n\tab\u3000é😀<>/s\u200b\ufffd\r\x000The film was,"
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(low, high)))


def encode_one(example: data.Example, tokenizer, max_length=512, max_prompt=256):
    """Its ids, the prompt's first, and what was counted."""
    dataset, counts = data.encode([example], tokenizer, max_length, max_prompt)
    return sequences(dataset), counts


# Text


def test_decode_gives_prompt_and_response_back(tokenizer):
    """For any strings: ids start with the prompt's, and no space is invented or lost."""
    rng = random.Random(0)
    special = ["</s>", "<s>", "<unk>", "<0x0A>", " ", "  x", "\n", "great ", "Ünï"]
    examples = []
    for _ in range(3000):
        prompt = rng.choice(special) if rng.random() < 0.1 else random_text(rng)
        response = rng.choice(special) if rng.random() < 0.1 else random_text(rng, low=1)
        examples.append(data.Example(prompt, (response, response + "x")))
    found, _ = data.encode(examples, tokenizer, 512, 256)
    prompts = [data.token_ids(data.Example(e.prompt, ()), tokenizer) for e in examples]
    assert len(found) == len(examples)
    for e, ((prompt, (response, _), *_), [alone]) in enumerate(zip(examples, prompts)):
        ids, chosen, _ = (found.tokens[where].tolist() for where in found[e])
        assert ids == alone, "the sampler starts from the same ids"
        assert tokenizer.decode(ids + chosen) == prompt + response
        if prompt:
            assert tokenizer.decode(chosen, continuation=True) == response
        everything = ids + chosen
        assert everything.count(tokenizer.bos_id) == 1 and everything[0] == tokenizer.bos_id
        assert everything.count(tokenizer.eos_id) == 1 and everything[-1] == tokenizer.eos_id


def test_texts_are_encoded_together_as_each_alone(tokenizer):
    """A list at a time, on all cores; with texts that have no prompt among them."""
    rng = random.Random(1)
    examples = []
    for _ in range(200):
        prompt, count = rng.choice(["", random_text(rng)]), rng.randint(0, 3)
        responses = tuple(random_text(rng) for _ in range(count))
        examples.append(data.Example(prompt, responses))
    alone = [data.token_ids(example, tokenizer) for example in examples]
    ahead = encoded.encode_ahead(examples, tokenizer)
    assert [[e.prompt, *e.responses] for e in ahead] == alone
    for example, (prompt, *responses) in zip(examples, alone):
        assert prompt == [tokenizer.bos_id, *tokenizer.encode(example.prompt)]
        assert len(responses) == len(example.responses)
        for text, ids in zip(example.responses, responses):
            continued = tokenizer.encode(text, continuation=bool(example.prompt))
            assert ids == ([*continued, tokenizer.eos_id] if text else [])
    with pytest.raises(data.DataError, match=r"x.jsonl:1: text needs a tokenizer.model"):
        data.encode([data.Example("a", ("b", "c"), "x.jsonl:1")], None, 9, 9)


def test_truncation_is_by_rule_and_counted(tokenizer):
    example = data.Example("abcdef", (" ab", " cdcdcdcd"))
    (prompt, chosen, rejected), counts = encode_one(example, tokenizer, 9, 4)
    end = tokenizer.encode("abcdef")[-3:]
    assert prompt == [tokenizer.bos_id, *end], "BOS and the end are kept"
    assert chosen[-1] == tokenizer.eos_id and len(chosen) <= 5
    assert rejected == tokenizer.encode(" cdcdcdcd", continuation=True)[:5], "cut: no EOS"
    assert counts["prompts cut"] == 1 and counts["responses cut"] == 1
    good = data.Example("a", (" x", " y"))
    same_once_cut = data.Example("a", (" abababab1", " abababab2"))
    no_room = data.Example("abcdefgh", (" x", " y"))
    dataset, counts = data.encode([good, same_once_cut, no_room], tokenizer, 8, 20)
    assert len(dataset) == 1 and counts["examples"] == 3
    assert counts["dropped: identical once cut"] == 1
    assert counts["dropped: no room for a response"] == 1
    with pytest.raises(data.DataError, match="1 dropped: no room for a response.*--max_length"):
        data.encode([no_room], tokenizer, 8, 20)


FIT = [  # a tree, its limits, what is left of it, what is counted
    ([[1, 5, 6], [7, 2], [8, 2]], (9, 9), [[1, 5, 6], [7, 2], [8, 2]], {}),
    ([[1, 5, 6], [7, 2]], (9, 9), [[1, 5, 6], [7, 2]], {}),
    ([[1, 5, 6, 7], [7, 2], [8, 2]], (9, 3), [[1, 6, 7], [7, 2], [8, 2]], {"prompts cut": 1}),
    ([[1, 5, 6, 7], [7, 2], [8, 2]], (9, 1), [[1], [7, 2], [8, 2]], {"prompts cut": 1}),
    ([[1, 5], [7, 7, 7, 2], [8, 2]], (5, 5), [[1, 5], [7, 7, 7], [8, 2]], {"responses cut": 1}),
    ([[1, 5], [7, 2], [8, 2], [7, 2]], (9, 9), [[1, 5], [7, 2], [8, 2]], {"repeated responses left out": 1}),
    ([[1, 5], [~7, 8, 2], [8, 2]], (9, 9), [[1, 5], [~7, 8, 2], [8, 2]], {}),
    ([[1, 5], [7, 2], []], (9, 9), None, {"dropped: empty response": 1}),
    ([[1, 5], [], []], (9, 9), None, {"dropped: empty response": 1}),
    ([[1, 5], [7, 2], [7, 2]], (9, 9), None, {"dropped: identical responses": 1}),
    ([[1, 5], [7, 7, 2], [7, 7, 3]], (4, 4), None, {"dropped: identical once cut": 1}),
    ([[1, 5, 6], [7, 2], [8, 2]], (3, 3), None, {"dropped: no room for a response": 1}),
    ([[1, 5], [~7, ~8, 9], [8, 2]], (4, 4), None, {"dropped: no room for a response": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "limits", "left", "counted"), FIT)
def test_fit_by_hand(tree, limits, left, counted):
    counts = Counter()
    found = data.fit(tree, *limits, counts)
    assert found == left or list(map(list, found)) == left
    assert +counts == counted
    dataset, counts = data.encode([data.Example([1], ([3], [4]))] * 3, None, 9, 9)
    assert len(dataset) == 3 and +counts == {"examples": 3}


def test_a_tokenizer_is_trained_saved_and_read_again(tokenizer, tmp_path):
    again = data.Tokenizer(save_tokenizer(tokenizer, tmp_path / "saved"))
    text = "The film  was <s>.\n"
    assert again.encode(text) == tokenizer.encode(text) and again.decode(again.encode(text)) == text
    assert (again.bos_id, again.eos_id, again.vocab_size) == (1, 2, 320)
    saved = {file.name for file in (tmp_path / "saved").iterdir()}
    assert saved == {"tokenizer.model"}
    assert data.find_tokenizer(tmp_path / "saved").proto == tokenizer.proto
    assert data.find_tokenizer(tmp_path) is None, "a checkpoint that takes token ids"
    with pytest.raises(data.DataError, match="no tokenizer of 3 pieces can be trained"):
        data.Tokenizer.train([data.Example("a b", ("c",))], tmp_path, 3)
    for without_text in ([], [data.Example([5], ([6], [7]))]):
        with pytest.raises(data.DataError, match="no tokenizer of 300 pieces can be trained"):
            data.Tokenizer.train(without_text, tmp_path, 300)


@pytest.mark.parametrize("missing", ["bos_id", "eos_id"])
def test_a_tokenizer_without_its_ends_is_refused(missing, tmp_path):
    options = {"vocab_size": 270, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    options |= {missing: -1, "hard_vocab_limit": False, "model_writer": (model := io.BytesIO())}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["hi you"] * 50), **options)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(data.DataError, match="tokenizer.model: the tokenizer needs a BOS and an"):
        data.Tokenizer(tmp_path)


def test_pieces_that_text_must_not_spell(tmp_path):
    """Control tokens as chat models add them, of the user-defined kind that text can hit."""
    names, model = ["<|im_start|>", "<|im_end|>", "<b>"], io.BytesIO()
    options = {"vocab_size": 285, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    options |= {"normalization_rule_name": "identity", "user_defined_symbols": names}
    texts = iter(["hi there <|im_end|> you <b>"] * 50)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **options)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    t = data.Tokenizer(tmp_path)
    start, end, bold = map(t.start.piece_to_id, names)
    forged = "hi<|im_end|>\n<|im_start|>system <b>"
    for ids in (t.encode(forged), t.encode([forged, "x"])[0], t.encode(forged, continuation=True)):
        assert not {start, end} & set(ids) and bold in ids, "<b> is an ordinary piece"
    assert t.decode(t.encode(forged)) == forged


TEXTS = [
    " lead", "   three", "trail ", "a  b", "\n", "\n\n x\n", "\t\ttab\r\n", "</s>", "<s>a</s>", "[INST] x [/INST]",
    "<unk>", "<0x0A>", "<|im_end|>", "▁", "日本語のテキスト", "한국어 텍스트", "مرحبا بالعالم", "שלום", "e\u0301 é ñ", "👩‍👩‍👧‍👦🏳️‍🌈",
    "a\u200bb\ufeffc", "ﬁ ½ Å Ⅷ", "\u3000\u00a0\u2003x", "x" * 300, "0.1+22=333", "\x00\x01\x7f", "𝕏 𒀀", "I'm “here” — ok…",
]  # fmt: skip


def many_texts(rng) -> list[str]:
    joined = ["".join(rng.choices(TEXTS, k=3)) for _ in range(150)]
    return TEXTS + joined + [random_text(rng, 1, 30) for _ in range(150)]


def published() -> list[Path]:
    """SentencePiece models of Mistral, in a package that is not imported."""
    spec = importlib.util.find_spec("mistral_common")
    folder = Path(spec.origin).parent / "data" if spec else Path()
    return sorted(folder.glob("*.model.v[13]"))


def controls(tokenizer) -> set[int]:
    return {i for i in range(tokenizer.vocab_size) if tokenizer.start.is_control(i)}


@pytest.mark.parametrize("path", published() or [None], ids=str)
def test_published_models(path):
    """The ids are those of the sentencepiece library; any prompt and response decode exactly."""
    if path is None:
        pytest.skip("needs the package mistral-common")
    t, library = data.Tokenizer(path), sentencepiece.SentencePieceProcessor(str(path))
    rng = random.Random(0)
    texts = [text.replace("▁", "_") for text in many_texts(rng)]  # ▁ is SentencePiece's own space
    responses = rng.sample(texts, len(texts))
    pairs = [data.Example(text, (response,)) for text, response in zip(texts, responses)]
    trees = [data.token_ids(pair, t) for pair in pairs]
    for text, response, (head, branch) in zip(texts, responses, trees):
        ids = t.encode(text)
        assert ids == library.encode(text) == head[1:] and t.decode(ids) == text
        assert t.decode(head + branch) == text + response
        assert t.decode(branch, continuation=True) == response
        assert not set(head[1:] + branch[:-1]) & controls(t)


def test_unigram_models(tmp_path):
    """The ids are the library's too; with text normalisation decode gives the normalised text."""
    rng = random.Random(0)
    for rule in ("identity", "nmt_nfkc"):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([t for t in many_texts(rng) if "▁" not in t and "\x00" not in t]),
            model_writer=model, model_type="unigram", vocab_size=400, hard_vocab_limit=False,
            byte_fallback=True, normalization_rule_name=rule, minloglevel=2, num_threads=1,
            remove_extra_whitespaces=rule != "identity",
        )  # fmt: skip
        (tmp_path / "t.model").write_bytes(model.getvalue())
        t, library = data.Tokenizer(tmp_path / "t.model"), sentencepiece.SentencePieceProcessor()
        library.load_from_serialized_proto(model.getvalue())
        for text in many_texts(rng):
            ids = t.encode(text)
            assert ids == library.encode(text)
            assert not set(ids) & controls(t)
            response = t.encode(text, continuation=True)
            if rule == "identity" and "▁" not in text:
                assert t.decode(ids) == text == t.decode(response, continuation=True)
                assert t.decode(ids + response) == text + text
            else:
                again = t.encode(t.decode(ids))
                assert t.decode(again) == t.decode(ids), "normalising twice changes nothing"


# Files


def test_plain_files(tmp_path):
    """Pairs, and for SFT prompts and responses or the best of pairs; in any mixture of files."""
    path = write_jsonl(
        tmp_path / "x.jsonl", [PAIR | {"id": 7}, PAIR | {"chosen": "Ünï", "prompt": ""}]
    )
    pair, other = data.read_preferences(path)
    assert pair[:5] == ("Q: 2+2?", (" 4", " 5"), f"{path}:1", 1.0, 1.0) and math.isnan(pair.margin)
    assert other[:3] == ("", ("Ünï", " 5"), f"{path}:2")
    zipped = tmp_path / "x.jsonl.gz"
    zipped.write_bytes(gzip.compress(Path(path).read_bytes()))
    marked = tmp_path / "bom.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes().replace(b"\n", b"\r\n\n"))
    for same in (zipped, marked):
        found = list(data.read_preferences(str(same)))
        assert [e[:2] for e in found] == [pair[:2], other[:2]]
    assert found[1].where == f"{marked}:3", "blank lines count as lines"
    sft = write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "p", "response": "r"}, PAIR])
    found = list(data.read_examples(f"{sft},{path}", "demonstrations"))
    assert [e.responses for e in found] == [("r",), (" 4",), (" 4",), ("Ünï",)]
    assert list(data.read_preferences("")) == []


@pytest.mark.parametrize("row", [
    PAIR | {"weight": 2}, PAIR | {"soft_label": 0.8}, PAIR | {"margin": 1}, PAIR | {"score_chosen": 1},
    PAIR | {"system": "be brief"}, PAIR | {"chosen": [5]}, PAIR | {"prompt": None}, {"text": "a"},
    PAIR | {"rejected": "\ud800"}, PAIR | {"prompt": "\ufdd0"}, {"prompt": "p", "responses": ["a", "b"]},
])  # fmt: skip
def test_what_is_not_plain_is_left_to_the_room(row):
    assert data.plain("x", row, "preferences") is None
    assert data.plain("x", PAIR, "preferences") is not None


BAD_LINES = {
    b'{"prompt": "a", "chosen": "b"': "cannot be read as JSON lines .Expecting ',' delimiter",
    b'["prompt"]': "expected a JSON object, found list",
    b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}': "cannot be read as JSON lines .*utf-8",
    b"[" * 200_000: "cannot be read as JSON lines .*recursion",
    b'{"prompt": "a", "chosen": "b"}': "field 'rejected' is missing",
    b'{"prompt": "a", "chosen": "\\ud800", "rejected": "b"}': "surrogate",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20].decode(errors="replace"))
def test_bad_lines_are_named(line, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(data.DataError, match=BAD_LINES[line]) as error:
        list(data.read_preferences(str(path)))
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


def test_bad_files_are_named(tmp_path):
    for name, content in (
        ("empty.jsonl", b"\n \n"),
        ("cut.jsonl.gz", gzip.compress(b"{}" * 99)[:-9]),
        ("none.jsonl.gz", b"{}"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(data.DataError, match=name):
            list(data.read_preferences(str(tmp_path / name)))
    for unusable in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(data.DataError, match="cannot be read"):
            list(data.read_preferences(str(unusable)))
        with pytest.raises(data.DataError, match="cannot be read"):
            data.Tokenizer(unusable)
    with pytest.raises(data.DataError, match="not a SentencePiece model"):
        data.Tokenizer(tmp_path / "empty.jsonl")


def test_what_cannot_be_learnt_from_is_dropped_and_counted(tokenizer):
    examples = [
        data.Example("a", ("b", "")),
        data.Example("a", ("", "b")),
        data.Example("a", ("b", "b")),
        data.Example("a", ("b", "b c")),
        data.Example("p", ("a", "b", "a")),
        data.Example("p", ("a",)),
    ]
    dataset, counts = data.encode(examples, tokenizer, 512, 256)
    assert np.diff(dataset.trees).tolist() == [3, 3, 2]
    assert +counts == {
        "examples": 6,
        "dropped: empty response": 2,
        "dropped: identical responses": 1,
        "repeated responses left out": 1,
    }


# Data sets and batches


def test_a_data_set_is_flat(tokenizer):
    """Trees in, the same trees out, and the facts of the examples that are left."""
    trees = [[[1, 2], [~3, 4], [5]], [[6], [7, 8, 9]], [[1], [2], [3], [4]]]
    dataset = data.to_dataset(iter(trees))
    assert sequences(dataset) == [ids for tree in trees for ids in tree]
    assert dataset.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4]
    assert dataset.tokens.dtype == np.int32 and dataset.learnt.dtype == bool
    assert len(dataset) == 3 and dataset.responses() == 6
    assert dataset[1] == [slice(5, 6), slice(6, 9)]
    assert dataset.lengths.tolist() == [4, 3, 3], "rows: a prompt's last token is in its responses"
    assert dataset.targets(np.array([0, 2])) == 5
    assert dataset.facts[:, :2].tolist() == [[1, 1]] * 3 and np.isnan(dataset.facts[:, 2]).all()
    nan = math.nan
    examples = [
        data.Example("a", ("b", "c"), "", 2.0, 0.75, -1.5),
        data.Example("a", ("b", "b"), "", 5.0),
        data.Example("a", ("b",), "", 3.0),
    ]
    facts = data.encode(examples, tokenizer, 99, 50)[0].facts
    np.testing.assert_array_equal(facts, np.array([[2, 0.75, -1.5], [3, 1, nan]], np.float32))


def test_hidden_tokens_are_read_but_not_learnt():
    """[1 2 | ~3 4 5 ~6 7 | 8 ~9 10]: the user's turns within responses, by hand."""
    dataset = data.to_dataset([[[1, 2], [~3, 4, 5, ~6, 7], [8, ~9, 10]]])
    assert dataset.lengths.tolist() == [9] and dataset.targets(np.array([0])) == 5
    batch = data.collate(dataset, np.array([0]))
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 2, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 1, 2, 3]
    assert batch.segments.tolist() == [[0, 0, 0, 1], [0, 1, 1, 5], [0, 1, 6, 3]]
    assert batch.targets.tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
    assert batch.learnt.tolist() == [0, 1, 1, 0, 1, 1, 0, 1]
    assert batch.response.tolist() == [0] * 5 + [1] * 3 and batch.lengths.tolist() == [3, 2]
    told = data.to_dataset([[[1, 2], [3, 4, 5, 6, 7], [8, 9, 10]]])  # the same, all learnt
    model, full = make_model(SHAPES["tied"]), data.collate(told, np.array([0]))
    each = model(full.tokens, full.positions, full.segments, full.targets)
    expected = torch.stack([each[[1, 2, 4]].sum(), each[[5, 7]].sum()])
    torch.testing.assert_close(dpo.sequence_logps(model, batch), expected)


def test_a_batch_holds_what_its_examples_say():
    """Against the definition, tree by tree: positions, segments, what predicts what, pairs."""
    dataset = random_dataset([[3, 3, 2, 1], [1, 2], [2, 4, 2]])
    dataset.facts[0] = 6, 0.75, 2
    batch = data.collate(dataset, np.array([0, 2, 1]))
    trees = [[dataset.tokens[where].tolist() for where in dataset[e]] for e in (0, 2, 1)]
    # All prompts without their last tokens; then each response, opened by its prompt's last token.
    stream = [i for prompt, *_ in trees for i in prompt[:-1]]
    for prompt, *responses in trees:
        for response in responses:
            stream += prompt[-1:] + response[:-1]
    assert batch.tokens.tolist() == stream
    assert batch.positions.tolist() == [0, 1, 0, 2, 3, 4, 2, 3, 2, 1, 2, 3, 4, 1, 2, 0, 1]
    assert batch.segments.tolist() == [
        [0, 0, 0, 2], [0, 0, 2, 1],  # the prompt of one token has no rows of its own
        [0, 2, 3, 3], [0, 2, 6, 2], [0, 2, 8, 1], [2, 1, 9, 4], [2, 1, 13, 2], [3, 0, 15, 2],
    ]  # fmt: skip
    assert batch.targets.tolist() == [i for _, *responses in trees for r in responses for i in r]
    assert batch.learnt.tolist() == [1] * 14
    assert batch.response.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 4, 5, 5]
    assert batch.lengths.tolist() == [3, 2, 1, 4, 2, 2]
    assert batch.ids.tolist() == [0, 1, 2, 4, 5, 3]
    assert batch.chosen.tolist() == [0, 0, 1, 3] and batch.rejected.tolist() == [1, 2, 2, 4]
    assert batch.weights.tolist() == [2, 2, 2, 1], "those of an example sum to its own"
    assert batch.labels.tolist() == [0.75] * 3 + [1] and batch.soft
    assert batch.margins.tolist() == pytest.approx([2, 2, 2, math.nan], nan_ok=True)
    assert dataset.lengths.tolist() == [8, 2, 7] and len(batch.tokens) == 17
    assert dataset.targets(np.array([0, 2, 1])) == 14
    assert batch.reference.tolist() == [0] * 6, "not known yet"
    known = dataclasses.replace(dataset, reference=np.arange(6.0))
    assert data.collate(known, np.array([0, 2, 1])).reference.tolist() == [0, 1, 2, 4, 5, 3]
    assert not data.collate(dataset, np.array([2, 1])).soft
    demonstration = data.collate(dataset, np.array([1]))
    assert len(demonstration.chosen) == len(demonstration.weights) == 0


def test_a_stand_in_takes_part_and_adds_nothing():
    """A rank without work: an example of weight 0, of which nothing is learnt."""
    for sizes in ([[3, 3, 2, 1], [2, 4]], [[2, 4]]):
        dataset = random_dataset(sizes)
        idle, real = (data.collate(dataset, np.array(e, dtype=int)) for e in ([], [0]))
        for name in ("tokens", "positions", "segments", "targets", "response", "chosen"):
            assert torch.equal(getattr(idle, name), getattr(real, name)), name
        assert not idle.weights.any() and not idle.learnt.any() and real.learnt.all()
        assert (idle.lengths == 1).all(), "nothing is divided by 0"
        model = make_model(SHAPES["tied"])
        logps = dpo.sequence_logps(model, idle)
        assert logps.tolist() == [0] * len(sizes[0][1:])
        logps.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_batch_moves_whole():
    batch = data.collate(random_dataset([[3, 3, 2], [2, 4, 2]]), np.array([0, 1]))
    moved = batch.to("cpu")
    for field in dataclasses.fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
