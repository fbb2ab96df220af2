"""Text rules, packing, the plan of an epoch, bad input, and the exactness of the grammar."""

import gzip
import itertools
import json
import math
import random

import numpy as np
import pytest
from conftest import random_dataset, write_jsonl

import data

PAIR = {"prompt": "Q: 2+2?", "chosen": " 4", "rejected": " 5"}


def random_text(rng, low=0, high=9) -> str:
    alphabet = " \n\tab\u3000é😀<>/s\u200b\ufffd\r\x000The film was,"
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(low, high)))


def test_decode_gives_prompt_and_response_back(tokenizer):
    """For any strings: ids start with the prompt's, and no space is invented or lost."""
    rng = random.Random(0)
    special = ["</s>", "<s>", "<unk>", "<0x0A>", " ", "  x", "\n", "great ", "Ünï"]
    for _ in range(3000):
        prompt = rng.choice(special) if rng.random() < 0.1 else random_text(rng)
        response = rng.choice(special) if rng.random() < 0.1 else random_text(rng, low=1)
        example = data.Example(prompt, (response, response + "x"))
        dataset = data.encode_examples([example], tokenizer, 512, 256)
        ids, chosen = (
            dataset.tokens[a:b].tolist() for a, b in itertools.pairwise(dataset.offsets[:3])
        )
        assert ids == tokenizer.encode_prompt(prompt), "the sampler starts from the same ids"
        assert tokenizer.decode(ids + chosen) == prompt + response
        if prompt:
            assert tokenizer.decode(chosen, continuation=True) == response
        everything = ids + chosen
        assert everything.count(tokenizer.bos_id) == 1 and everything[0] == tokenizer.bos_id
        assert everything.count(tokenizer.eos_id) == 1 and everything[-1] == tokenizer.eos_id


def test_truncation_is_by_rule_and_counted(tokenizer):
    def encode(prompt, chosen, rejected, max_length, max_prompt):
        example = data.Example(prompt, (chosen, rejected))
        dataset = data.encode_examples([example], tokenizer, max_length, max_prompt)
        ends = itertools.pairwise(dataset.offsets)
        return [dataset.tokens[a:b].tolist() for a, b in ends], dataset.counts

    (prompt, chosen, rejected), counts = encode("abcdef", " ab", " cdcdcdcd", 9, 4)
    assert prompt == [tokenizer.bos_id, *tokenizer.encode("abcdef")[-3:]], (
        "BOS and the end are kept"
    )
    assert chosen[-1] == tokenizer.eos_id and len(chosen) <= 5
    assert rejected == tokenizer.encode(" cdcdcdcd", continuation=True)[:5], "cut: no EOS"
    assert counts["prompts cut"] == 1 and counts["responses cut"] == 1
    good = data.Example("a", (" x", " y"))
    same_once_cut = data.Example("a", (" abababab1", " abababab2"))
    no_room = data.Example("abcdefgh", (" x", " y"))
    dataset = data.encode_examples([good, same_once_cut, no_room], tokenizer, 8, 20)
    assert len(dataset) == 1 and dataset.counts["examples"] == 3
    assert dataset.counts["dropped: identical once cut"] == 1
    assert dataset.counts["dropped: no room for a response"] == 1
    with pytest.raises(data.DataError, match="max_length"):
        data.encode_examples([no_room], tokenizer, 8, 20)


def test_files_of_pairs_rankings_and_demonstrations(tmp_path):
    rows = [PAIR | {"weight": 2, "margin": 1.5}, {"prompt": "", "responses": ["a", "b", "c"]}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    pair, ranking = data.load_preferences(path)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.weight) == ("Q: 2+2?", " 4", " 5", 2.0)
    assert ranking.responses == ("a", "b", "c") and ranking.where == f"{path}:2"
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    zipped = data.load_preferences(tmp_path / "x.jsonl.gz")
    assert [e.responses for e in zipped] == [pair.responses, ranking.responses]
    sft = write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "p", "response": "r"}, PAIR])
    assert [e.responses for e in data.load_demonstrations(sft)] == [("r",), (" 4",)]


BAD_LINES = {
    b'{"prompt": "a", "chosen": "b"': "invalid JSON",
    b'["prompt"]': "expected a JSON object",
    b'{"prompt": "a", "chosen": "b"}': "field 'rejected' is missing",
    b'{"chosen": "a", "rejected": "b"}': "field 'prompt' is missing",
    b'{"prompt": "a", "chosen": "", "rejected": "b"}': "field 'chosen' is empty",
    b'{"prompt": "a", "chosen": "b", "rejected": "b"}': "identical",
    b'{"prompt": "a", "chosen": 3, "rejected": "b"}': "'chosen' must be text, found int",
    b'{"prompt": null, "chosen": "a", "rejected": "b"}': "'prompt' must be text, found NoneType",
    b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}': "invalid UTF-8",
    b'{"prompt": "a", "chosen": "\\ud800", "rejected": "b"}': "surrogate",
    b'{"prompt": "a", "responses": ["b"]}': "two responses or more",
    b'{"prompt": "a", "responses": ["b", "c", "b"]}': "identical",
    b'{"prompt": "a", "responses": ["b", 4]}': "'responses' must be text",
    b'{"prompt": "a", "responses": ["b", null]}': "'responses' must be text",
    b'{"prompt": "a", "chosen": "b", "rejected": "c", "weight": -1}': "'weight' must be a number",
    b'{"prompt": "a", "chosen": "b", "rejected": "c", "weight": NaN}': "'weight' must be a number",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_lines_are_named(line, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(data.DataError, match=BAD_LINES[line]) as error:
        data.load_preferences(path)
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


def test_bad_files_are_named(tmp_path):
    for name, content in (
        ("empty.jsonl", b"\n \n"),
        ("cut.jsonl.gz", gzip.compress(b"{}" * 99)[:-9]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(data.DataError, match=name):
            data.load_preferences(tmp_path / name)
    for unusable in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(data.DataError, match="cannot be read"):
            data.load_preferences(unusable)
        with pytest.raises(data.DataError, match="cannot be read"):
            data.Tokenizer(unusable)
    with pytest.raises(data.DataError, match="not a SentencePiece model"):
        data.Tokenizer(tmp_path / "empty.jsonl")


def test_plan_takes_every_example_once_and_agrees_over_ranks():
    lengths = np.random.default_rng(0).lognormal(3, 1, 103).astype(int) + 2
    for batch_size, budget, world in (
        (8, 100, 1),
        (8, 100, 3),
        (10, 40, 4),
        (103, 64, 2),
        (1, 9, 2),
    ):
        steps = list(data.plan_epoch(lengths, batch_size, budget, world, (0, 1)))
        assert len(steps) == math.ceil(103 / batch_size)
        seen = []
        for step in steps:
            assert len(step) == world and len({len(rank) for rank in step}) == 1
            bins = [b for rank in step for b in rank]
            assert all(len(b) <= 1 or lengths[b].sum() <= budget for b in bins)
            seen.append(sorted(np.concatenate(bins).tolist()))
        assert sorted(sum(seen, [])) == list(range(103))
        alone = list(data.plan_epoch(lengths, batch_size, 10**9, 1, (0, 1)))
        assert seen == [sorted(step[0][0].tolist()) for step in alone], (
            "the same pairs in each step"
        )
    repeat = [
        list(data.plan_epoch(lengths, 8, 100, 2, seed)) for seed in ((0, 1), (0, 1), (0, 2), None)
    ]
    flat = [[[b.tolist() for rank in step for b in rank] for step in plan] for plan in repeat]
    assert flat[0] == flat[1] != flat[2]
    assert sorted(sum(flat[3][0], [])) == list(range(8)), "without a seed the order is kept"


def test_a_batch_holds_what_its_examples_say():
    """Against the definition, tree by tree: positions, segments, what predicts what, pairs."""
    sizes = [[3, 3, 2, 1], [1, 2], [2, 4, 2]]
    dataset = random_dataset(sizes)
    dataset.weights[0] = 6.0
    batch = data.collate(dataset, np.array([0, 2, 1]))
    read, trees = [], []
    for tree in (0, 2, 1):
        bounds = dataset.offsets[dataset.trees[tree] : dataset.trees[tree + 1] + 1]
        trees.append([dataset.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)])
        read += trees[-1][0] + [t for response in trees[-1][1:] for t in response[:-1]]
    assert batch.tokens.tolist() == read
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 4, 2, 0, 1]
    assert batch.segments.tolist() == [
        [0, 0, 0, 5], [0, 3, 5, 6], [6, 6, 6, 11], [6, 8, 11, 12], [12, 12, 12, 14]
    ]  # fmt: skip
    assert batch.targets.tolist() == [t for tree in trees for r in tree[1:] for t in r]
    assert batch.rows.tolist() == [2, 3, 4, 2, 5, 2, 7, 8, 9, 10, 7, 11, 12, 13]
    assert batch.response.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 4, 5, 5]
    assert batch.response_ids.tolist() == [0, 1, 2, 4, 5, 3]
    assert batch.chosen.tolist() == [0, 0, 1, 3] and batch.rejected.tolist() == [1, 2, 2, 4]
    assert batch.weights.tolist() == [2, 2, 2, 1] and batch.best.tolist() == [0, 3, 5]
    assert dataset.lengths().tolist() == [6, 2, 6]
    assert dataset.response_lengths()[batch.response_ids].tolist() == batch.lengths.tolist()
    idle = data.collate(dataset, np.array([], dtype=int))
    assert len(idle.tokens) == 6 and len(idle.chosen) == len(idle.best) == len(idle.weights) == 0


def test_grammar_is_exact():
    """Probabilities sum to 1; entropy, π* and the frontier agree with brute force over all reviews
    of one and two clauses, and with samples."""
    grammar = data.Reviews(seed=1)
    for clauses in itertools.chain(*grammar.clauses.values()):
        assert clauses.p.sum() == pytest.approx(1, abs=1e-12)
        assert len(set(clauses.texts)) == len(clauses.texts)
    assert data.COUNTS.sum() == pytest.approx(1)
    assert len(set(grammar.prompts["train"])) > 1000
    assert not set(grammar.prompts["train"]) & set(grammar.prompts["eval"])

    # Brute force: log Z, E r and KL of π* from the list of all one- and two-clause reviews, the
    # three-clause ones as the product that the definition says they are.
    beta, kind = 1.3, "cafe"
    c = grammar.clauses[kind]
    p = [data.COUNTS[0] * c[0].p, data.COUNTS[1] * np.outer(c[0].p, c[1].p).ravel()]
    r = [c[0].r, np.add.outer(c[0].r, c[1].r).ravel()]
    third, reward3 = np.outer(p[1], c[2].p).ravel(), np.add.outer(r[1], c[2].r).ravel()
    p, r = (
        np.concatenate([*p, third * data.COUNTS[2] / data.COUNTS[1]]),
        np.concatenate([*r, reward3]),
    )
    assert p.sum() == pytest.approx(1, abs=1e-9)
    best = p * np.exp(r / beta)
    best /= best.sum()
    only = data.Reviews(seed=1)
    only.prompts["eval"] = [x for x in grammar.prompts["eval"] if f" {kind} " in x]
    reward, kl = only.optimum(beta)
    assert reward == pytest.approx(best @ r, rel=1e-9)
    assert kl == pytest.approx(best @ np.log(best / p), rel=1e-9)
    assert only.entropy() == pytest.approx(-(p @ np.log(p)), rel=1e-9)
    assert only.frontier(kl) == pytest.approx(reward, abs=1e-3)
    tilted = p * np.exp(r / 0.9 + 0.3 * np.sin(np.arange(len(p))))  # some other policy
    tilted /= tilted.sum()
    assert tilted @ r < only.frontier(tilted @ np.log(tilted / p)), (
        "nothing lies above the frontier"
    )

    written = grammar.demonstrations(4000, "eval")
    scores = np.array([grammar.score(e.prompt, e.chosen) for e in written])
    error = scores[:, 0].std() / 4000**0.5
    assert -scores[:, 0].mean() == pytest.approx(grammar.entropy(), abs=5 * error)
    assert scores[:, 1].mean() == pytest.approx(
        grammar.frontier(0), abs=5 * scores[:, 1].std() / 60
    )


def test_grammar_labels_and_acceptance():
    grammar = data.Reviews(seed=1)
    pairs = grammar.preferences(4000, "train")
    gaps = np.array([grammar.score(e.prompt, e.chosen)[1] - grammar.score(e.prompt, e.rejected)[1]
                     for e in pairs])  # fmt: skip
    sizes = np.abs(gaps)
    for low, high in ((0.5, 1.5), (1.5, 3), (3, 9)):  # P(a ≻ b) = σ(r(a) − r(b))
        here = (sizes > low) & (sizes < high)
        expected = 1 / (1 + np.exp(-sizes[here]))
        error = (expected * (1 - expected)).mean() ** 0.5 / here.sum() ** 0.5
        assert (gaps[here] > 0).mean() == pytest.approx(expected.mean(), abs=4 * error)
    sharp = grammar.preferences(500, "train", deterministic=True)
    assert all(
        grammar.score(e.prompt, e.chosen)[1] > grammar.score(e.prompt, e.rejected)[1] for e in sharp
    )
    assert pairs == data.Reviews(seed=1).preferences(4000, "train") != data.Reviews(seed=2)
    prompt = "Review of the new film Amber:"
    assert grammar.score(prompt, " The plot was sadly slow, but the cast seemed superb.")[
        1
    ] == pytest.approx(0.6)
    for broken in ("", ".", " The plot was slow", " The coffee was slow.", " The plot was slow..",
                   " the plot was slow.", " The plot was slow, but the plot was slow."):  # fmt: skip
        assert grammar.score(prompt, broken)[0] == -math.inf
