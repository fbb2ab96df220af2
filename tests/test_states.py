"""What a run resumes from, when much is wrong: a full disk, damaged files, another run's states, a
lock, signals, ranks that die, another number of ranks. Runs are forks, as in tests/killing.py."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import killing
import numpy as np
import pytest
from conftest import HANGS, ROOT
from killing import FINE, NEVER, STATE, Toy, leaves, newest_complete, outcome, resume

from extra import states
from model import load_pretrained


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy, the end of its run, its operations, and what is left of it once dpo-2 is saved."""
    toy = Toy(tmp_path_factory.mktemp("toy"))
    whole = toy.whole()
    toy.clear()
    trace = toy.run(at=NEVER).trace
    toy.clear()
    assert toy.run(at=leaves(trace, "dpo-2")).status == -signal.SIGKILL
    assert toy.states() == ["dpo-1", "dpo-2"]
    stopped = toy.keep("stopped")
    yield SimpleNamespace(toy=toy, whole=whole, trace=trace, stopped=stopped)
    toy.close()


@pytest.fixture
def stopped(world):
    """The toy, with the states dpo-1 and dpo-2 in its directory."""
    world.toy.put_back(world.stopped)
    return world.toy


def one_sentence(result, words: str = "", status: int = 2):
    assert result.status == status, result
    [sentence] = result.sentences
    assert sentence.startswith("train.py: ") and re.search(words, sentence), sentence


def goes_on(world, *flags, **options) -> str:
    """Resume, to the same end; returns what the run said."""
    found, result = resume(world.toy, world.whole, *flags, **options)
    assert found in FINE, (found, result)
    return result.out + result.err


# A full disk.


def first(trace: list[str], pattern: str, nth: int = 1) -> int:
    """The nth operation that matches."""
    return [n for n, line in enumerate(trace, 1) if re.search(pattern, line)][nth - 1]


FULL = {  # where the disk is full: the operation, of several that match the nth
    "run.json": (r"write run\.json", 1),
    "tokenizer": (r"half encoded/tokenizer", 1),
    "encoded": (r"half encoded/pairs/", 2),
    "metrics": (r"half metrics\.jsonl", 3),
    "first state": (r"half resume/new/", 1),
    "manifest": (r"half resume/\S+/manifest", 2),
    "a later state": (r"half resume/new/\S*", 12),
    "sft": (r"half sft/saving", 1),
    "reference": (r"half sft/reference-", 1),
    "checkpoint": (r"half saving", 1),
    "config": (r"half (saving|config)", 2),
}


@pytest.mark.parametrize("place", FULL)
def test_a_full_disk_is_one_sentence_and_costs_no_state(place, world):
    """From one operation on nothing can be written. What was saved until then is there."""
    toy, at = world.toy, first(world.trace, *FULL[place])
    toy.clear()
    result = toy.run(at=at, number=None)
    one_sentence(result, "No space left on device|space|written|write")
    assert newest_complete(result.trace) in ["", *toy.states()]
    goes_on(world)


@pytest.mark.parametrize("limit", [4_000, 20_000, 60_000])
def test_files_that_cannot_get_long(limit, world):
    """Likewise, by the kernel: the tokenizer, the model or the state does not fit."""
    world.toy.clear()
    one_sentence(
        world.toy.run(limit=limit), r"^train.py: out: cannot be written \(File too large\)"
    )
    goes_on(world)


@pytest.mark.parametrize("size", [60, 180, 400])
def test_a_small_disk(size, world):
    """A file system of so many KiB, where one can be mounted."""
    toy = world.toy
    toy.clear()
    toy.out.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(toy.out)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:  # fmt: skip
        pytest.skip("no file system can be mounted here")
    try:
        result = toy.run()
        left = shutil.copytree(toy.out, toy.place / "left", dirs_exist_ok=True)
    finally:
        subprocess.run(["umount", str(toy.out)], check=True)
    one_sentence(result, "No space left on device|space|written|write")
    toy.put_back(left)
    shutil.rmtree(left)
    goes_on(world)


def test_a_directory_that_cannot_be_written(world, tmp_path):
    (tmp_path / "file").write_text("")
    result = world.toy.run(f"--out_dir={tmp_path / 'file' / 'out'}")
    one_sentence(result, "file")
    if os.geteuid():
        tmp_path.chmod(0o555)
        one_sentence(world.toy.run(f"--out_dir={tmp_path / 'out'}"), "Permission denied")


# Damaged files.


def flip(path, at: float = 0.5):
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1 << 3
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "flipped": flip,
    "flipped at its end": lambda path: flip(path, 0.97),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_passed_over(damage, world, stopped):
    """Any of its files; one sentence names it, and the state before it is taken."""
    names = sorted(path.name for path in (stopped.out / "resume" / "dpo-2").iterdir())
    assert {"manifest.json", "metrics.jsonl", "point.json"} < {*names}
    for name in names:
        stopped.put_back(world.stopped)
        DAMAGES[damage](stopped.out / "resume" / "dpo-2" / name)
        said = goes_on(world)
        assert len([line for line in said.splitlines() if "dpo-2" in line]) == 1, f"{name}: {said}"
        assert "dpo: 12 examples, steps 1 to 3" in said, name


SETTINGS = ("loss", "grad_clip", "weight_decay", "learning_rate", "max_length", "step", "digests")


def test_a_flipped_bit_of_a_setting_is_noticed(world, stopped):
    """Before the settings that a damaged state gives are compared with the command's, or used."""
    path = stopped.out / "resume" / "dpo-2" / "point.json"
    text = path.read_text()
    for name in SETTINGS:
        stopped.put_back(world.stopped)
        # The first character of its value, and what is JSON again: a digit or a letter.
        at = re.search(rf'"{name}": (?:\{{"\w+": )?"?(\w)', text).start(1)
        path.write_text(text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :])
        found, result = resume(stopped, world.whole)
        assert found == "exact" and "dpo: 12 examples, steps 1 to 3" in result.out, (name, result)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_no_state_is_whole(damage, stopped):
    for place in sorted((stopped.out / "resume").iterdir()):
        largest = max(place.iterdir(), key=lambda path: path.stat().st_size)
        DAMAGES[damage](largest)
    one_sentence(stopped.run("--resume"), "whole")
    assert stopped.states() == ["dpo-1", "dpo-2"], "nothing is removed"


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone", "flipped"])
def test_other_damaged_files_are_no_matter(damage, world, stopped):
    """Of a run's own files, what is not in a state is made again."""
    for pattern in ("run.json", "metrics.jsonl", "sft/reference-*.npy", "lock"):
        stopped.put_back(world.stopped)
        for path in [*stopped.out.glob(pattern)]:
            if path.stat().st_size or damage != "flipped":
                DAMAGES[damage](path)
        found, result = resume(stopped, world.whole)
        assert found == "exact", (pattern, found, result)


def test_damaged_encoded_data(world, stopped):
    """It is encoded again, or one sentence says what to remove."""
    names = ("tokens", "offsets", "trees", "learnt", "facts")
    files = [*((f"{name}.npy", "truncated") for name in names), ("tokens.npy", "gone")]
    files += [("facts.npy", "empty"), ("tokens.npy", "flipped")]
    for name, damage in [*files, *(("counts.json", damage) for damage in DAMAGES)]:
        stopped.put_back(world.stopped)
        DAMAGES[damage](stopped.out / "encoded" / "pairs" / name)
        result = stopped.run("--resume")
        if result.status:
            one_sentence(result, "encoded")
        else:
            assert outcome(result, stopped.end(), world.whole) == "exact", (name, damage)


def test_a_torn_line_of_metrics(world, stopped):
    with open(stopped.out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"stage": "dpo", "step": 3, "train/lo')
    goes_on(world)


def test_what_a_kill_leaves_is_no_matter(world, stopped):
    """Half of a state, of a checkpoint, of a reference."""
    shutil.copytree(stopped.out / "resume" / "dpo-1", stopped.out / "resume" / "new")
    (stopped.out / "resume" / "new" / "manifest.json").unlink(missing_ok=True)
    (stopped.out / "saving.tmp").write_bytes(b"x" * 99)
    (stopped.out / "sft" / "reference-0123456789abcdef.99.npy").write_bytes(b"x" * 99)
    assert "steps 2 to 3" in goes_on(world)
    assert (
        not (stopped.out / "resume" / "new").exists() and not (stopped.out / "saving.tmp").exists()
    )


def forge(place, changes: dict):
    """Change what point.json of a state says, and its digest with it."""
    point = json.loads((place / "point.json").read_text())
    for name, value in changes.items():
        merged = isinstance(value, dict) and name == "settings"
        point[name] = point[name] | value if merged else value
    content = json.dumps(point).encode()
    (place / "point.json").write_bytes(content)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["point.json"] = [len(content), hashlib.sha256(content).hexdigest()]
    (place / "manifest.json").write_text(json.dumps(manifest))


FORGED = [
    *({"step": step} for step in (-1, 2.0, 2.5, True, None, "2", 3)),
    *({"stage": stage} for stage in ("sft", None)),
    *({"settings": {"loss": loss}} for loss in (["dpo"], {"dpo": 1})),
    *({"settings": {"options": options}} for options in ([1], 3, None)),
    *({name: "x"} for name in ("settings", "digests", "totals", "mean_logratio")),
]


@pytest.mark.parametrize("forged", FORGED)
def test_a_state_with_other_things_in_it_is_passed_over(forged, world, stopped):
    """Though its digests are right."""
    forge(stopped.out / "resume" / "dpo-2", forged)
    assert "steps 1 to 3" in goes_on(world)


def test_pipes_in_place_of_files(world, stopped):
    """Nothing waits for what might never be written."""
    for name in ("resume/dpo-2/manifest.json", "encoded/pairs/made_of.json",
                 "encoded/pairs/tokens.npy", "resume/dpo-7", "sft/reference-0123456789abcdef.npy"):  # fmt: skip
        stopped.put_back(world.stopped)
        path = stopped.out / name
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        assert resume(stopped, world.whole)[0] == "exact", name
    for name in ("lock", "metrics.jsonl", "run.json"):
        for flags in ([], ["--resume"]):
            stopped.put_back(world.stopped)
            (stopped.out / name).unlink()
            os.mkfifo(stopped.out / name)
            one_sentence(stopped.run(*flags), f"{name} there is not a regular file")


def test_files_among_the_states_are_no_matter(stopped, world):
    """Whoever left them; a link is removed, and not what it leads to."""
    for name in (".nfs0001", "notes", "dpo-9"):
        (stopped.out / "resume" / name).write_text("")
    shutil.rmtree(stopped.out / "resume" / "dpo-2")
    (stopped.out / "resume" / "dpo-2").write_text("")
    (stopped.out / "resume" / "link").symlink_to(stopped.place)
    assert "steps 1 to 3" in goes_on(world)
    names = sorted(path.name for path in (stopped.out / "resume").iterdir())
    assert names == ["done-0", "dpo-2"] and (stopped.place / "pairs.jsonl").exists()


def test_a_directory_that_was_moved_is_resumed_where_it_is(world, stopped):
    """Its settings name the place where it began: nobody writes there."""
    moved = stopped.place / "out" / "reviews"
    kept = stopped.keep("moved")
    stopped.clear()
    moved.parent.mkdir()
    kept.rename(moved)
    flags = [flag for flag in stopped.flags if not flag.startswith("--out_dir")]
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=stopped.place, env=environment, text=True, capture_output=True, check=True
    )
    assert "steps 2 to 3" in done.stdout and done.stdout.endswith("saved out/reviews\n")
    assert [path.name for path in (stopped.place / "out").iterdir()] == ["reviews"]


def test_data_that_is_gone_is_said_to_be(stopped):
    one_sentence(
        stopped.run("--resume", "--data=gone.jsonl"),
        "gone.jsonl: --data names it, but it is not there",
    )


def test_a_finished_run_says_so(world):
    toy = world.toy
    assert toy.whole() == world.whole
    result = toy.run("--resume")
    assert result.status == 0 and "finished" in result.out + result.err
    assert toy.end() == world.whole


# States of another run.

OTHER = ["--beta=0.5", "--sft_learning_rate=2e-3"]


def test_a_state_is_resumed_by_no_other_run(world):
    """Run A leaves states; run B, in the same directory with other settings, is killed at its first
    operations. With B's flags --resume begins B anew, or is refused by name; with A's it goes on
    with A, or begins anew; neither ever mixes them."""
    toy = world.toy
    of_b = toy.whole(*OTHER)
    toy.put_back(world.stopped)
    trace = toy.run(*OTHER, at=NEVER).trace
    end = first(trace, r"encoded/sft/")
    found = set()
    for at in killing.distinct(trace[:end])[::3]:
        toy.put_back(world.stopped)
        toy.run(*OTHER, at=at)
        left = toy.keep("left")
        for flags, whole in ((OTHER, of_b), ([], world.whole)):
            toy.put_back(left)
            result = toy.run("--resume", *flags)
            if result.status:
                one_sentence(result, "beta|sft_learning_rate|whole")
                found.add("refused")
            else:
                became = outcome(result, toy.end(), whole)
                assert became in FINE, (trace[at - 1], flags, became, result)
                found.add(became)
    assert "began anew" in found and len(found) > 1


@pytest.mark.parametrize(
    "flag", ["--beta=0.5", "--batch_size=6", "--loss=ipo", "--seed=1", "--data=held.jsonl", "--hidden_size=32", "--max_length=300"]
)  # fmt: skip
def test_another_experiment_is_refused_by_name(flag, stopped):
    one_sentence(stopped.run("--resume", flag), f"--resume: .*{flag[2:].split('=')[0]}")


def test_data_that_changed_is_refused(world, stopped):
    path = stopped.place / "pairs.jsonl"
    text = path.read_text()
    try:
        path.write_text(text.replace("film 3", "film 9"))
        one_sentence(stopped.run("--resume"), "data|pairs.jsonl")
    finally:
        path.write_text(text)
    goes_on(world)


def test_paths_may_be_written_otherwise(world, stopped):
    assert "steps 2 to 3" in goes_on(world, f"--data={stopped.place / 'pairs.jsonl'}")


# The lock.


def test_a_directory_is_locked_for_the_life_of_a_run(world, stopped):
    toy = world.toy
    for place, nth in (("data.encode", 1), ("dpo.evaluate", 2), ("model.save_pretrained", 2)):
        toy.clear()
        result = toy.run(call=place, nth=nth, number=None)
        assert "the directory is locked" in result.out, place
    toy.put_back(world.stopped)
    before = {path: path.read_bytes() for path in toy.out.rglob("*") if path.is_file()}
    with open(toy.out / "lock", "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for flags in ([], ["--resume"], OTHER):
            one_sentence(toy.run(*flags), "another run")
        after = {path: path.read_bytes() for path in toy.out.rglob("*") if path.is_file()}
        assert before == after, "it has touched nothing"
    goes_on(world)


# Signals.

MOMENTS = {  # the function at whose nth call, while the other runs, the signal comes
    "before the first step": ("train.load_model", 1, ""),
    "in encoding": ("data.fit", 5, ""),
    "in the encoding of pairs": ("data.fit", 20, ""),
    "in the first evaluation": ("dpo.sequence_logps", 1, "dpo.evaluate"),
    "in a later evaluation": ("dpo.sequence_logps", 4, "dpo.evaluate"),
    "in the first micro-batch": ("dpo.sequence_logps", 1, "dpo.take_step"),
    "between accumulation and step": ("torch.nn.utils.clip_grad_norm_", 2, ""),
    "between micro-batches": ("dpo.sequence_logps", 5, "dpo.take_step"),
    "in the checkpoint of SFT": ("model.save_pretrained", 1, ""),
    "between the stages": ("train.with_reference", 1, ""),
    "in the reference pass": ("dpo.sequence_logps", 2, "dpo.reference_logps"),
    "in the second reference pass": ("dpo.sequence_logps", 5, "dpo.reference_logps"),
    "in the last step": ("dpo.take_step", 6, ""),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_saves_a_state(moment, world):
    """Exit status 128 + its number, one sentence, and, resumed, the same end."""
    toy, (call, nth, inside) = world.toy, MOMENTS[moment]
    number = [signal.SIGTERM, signal.SIGINT][len(moment) % 2]
    toy.clear()
    result = toy.run("--save_every=0", call=call, nth=nth, inside=inside, number=number)
    one_sentence(result, "--resume", 128 + number)
    assert signal.Signals(number).name in result.err
    found, result = resume(toy, world.whole, "--save_every=0")
    assert found in FINE, (found, result.out)
    after_the_first_step = ("later", "accumulation", "pass", "last", "stages", "between")
    assert found == "exact" or not any(word in moment for word in after_the_first_step)


@pytest.mark.parametrize("nth", range(1, 9, 3))
def test_a_signal_while_a_state_is_saved(nth, world):
    toy, at = world.toy, first(world.trace, "resume/new", 5 * nth)
    toy.clear()
    result = toy.run(at=at, number=signal.SIGTERM)
    one_sentence(result, "--resume", 128 + signal.SIGTERM)
    goes_on(world)


def test_a_second_signal_ends_at_once(world):
    """One more than a second later; not one at the same time, as launchers send them."""
    for numbers, status in (([15, 15], 143), ([15, 1.1, 15, 20.0], -15), ([2, 1.1, 2], -2)):
        world.toy.clear()
        result = world.toy.run(call="data.fit", nth=3, number=numbers)
        assert result.status == status and result.seconds[0] < 20, result
        goes_on(world)


# Ranks.


def same_rows(ours: list[dict], theirs: list[dict]):
    """But for rounding."""
    assert len(ours) == len(theirs)
    for row, expected in zip(ours, theirs):
        assert row.keys() == expected.keys() and row["stage"] == expected["stage"]
        for name in row.keys() - {"stage"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), (name, expected)


def close(toy, whole: dict, out) -> None:
    """Weights equal to float32's precision, in both checkpoints."""
    for name in ("", "sft"):
        ours, theirs = (load_pretrained(place / name).state_dict() for place in (toy.out, out))
        for key, weight in theirs.items():
            np.testing.assert_allclose(ours[key], weight, atol=2e-5, err_msg=key)
    same_rows(toy.end()["metrics"], whole["metrics"])


@pytest.fixture(scope="module")
def two(world):
    """The end of a run on two ranks, and a copy of it."""
    world.toy.clear()
    result = world.toy.run(ranks=2)
    assert result.statuses == [0, 0], world.toy.errors(2)
    return SimpleNamespace(whole=world.toy.end(), copy=world.toy.keep("two"))


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 2), (2, 1), pytest.param(1, 4, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow), pytest.param(4, 1, marks=pytest.mark.slow)],
)  # fmt: skip
def test_another_number_of_ranks(before, after, world, two):
    """Stopped on so many, resumed on so many: as on one, but for rounding."""
    toy = world.toy
    toy.clear()
    result = toy.run(ranks=before, call="dpo.take_step", nth=5, number=signal.SIGKILL)
    assert set(result.statuses) != {0}
    assert toy.states()[-1] == "dpo-1"
    result = toy.run("--resume", ranks=after)
    assert result.statuses == [0] * after, toy.errors(after)
    assert "dpo: 12 examples, steps 1 to 3" in result.out
    close(toy, world.whole, two.copy)


RANKED = {name: MOMENTS[name] for name in MOMENTS if name.startswith(("in encoding", "in a later", "between", "in the reference"))}  # fmt: skip


@pytest.mark.parametrize("moment", RANKED)
def test_a_signal_on_two_ranks(moment, world, two):
    """It comes to one of them (only rank 0 encodes); resumed, the same end."""
    call, nth, inside = RANKED[moment]
    toy, rank = world.toy, 0 if "encoding" in moment else 1
    toy.clear()
    result = toy.run(ranks=2, rank=rank, call=call, nth=nth, inside=inside, number=15)
    assert not result.hung and result.statuses == [143, 143], (result, toy.errors(2))
    lines = [line for text in toy.errors(2) for line in text.splitlines()]
    [sentence] = [line for line in lines if "train.py: " in line]
    assert "--resume" in sentence
    result = toy.run("--resume", ranks=2)
    assert result.statuses == [0, 0] and toy.end() == two.whole, toy.errors(2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(rank, world, two):
    """With an error, within a minute; then the run is resumed, to the same end."""
    toy = world.toy
    toy.clear()
    result = toy.run(ranks=2, rank=rank, call="dpo.take_step", nth=5)
    assert not result.hung and result.statuses[rank] == -signal.SIGKILL
    assert result.statuses[1 - rank] not in (0, -signal.SIGKILL)
    result = toy.run("--resume", ranks=2)
    assert result.statuses == [0, 0] and toy.end() == two.whole, toy.errors(2)


def test_a_bad_row_ends_all_ranks_with_one_sentence(world):
    toy = world.toy
    toy.clear()
    (toy.place / "bad.jsonl").write_text(killing.pairs(5) + '{"prompt": "x", "chosen": "y"}\n')
    result = toy.run("--data=bad.jsonl", ranks=2)
    assert not result.hung and 0 not in result.statuses
    lines = [line for text in toy.errors(2) for line in text.splitlines() if "bad.jsonl:6" in line]
    assert len(lines) == 1 and not any("Traceback" in text for text in toy.errors(2))


def test_a_launcher_that_is_stopped(world, two):
    """torchrun itself gets the signal, and passes it on."""
    toy = world.toy
    toy.clear()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    flags = [*toy.flags, "--epochs=400", "--save_every=0", "--eval_every=0"]
    process = subprocess.Popen(
        [*command, str(ROOT / "train.py"), *flags],
        cwd=toy.place, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("dpo 4 "):
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode != 0
    assert len(re.findall("^train.py: stopped", err, re.MULTILINE)) == 1, err
    assert re.fullmatch(r"dpo-\d+", toy.states()[-1]) and toy.states()[-1] != "dpo-0"


# A state of an earlier commit.


@pytest.mark.skipif(not STATE.exists(), reason="none is checked in yet")
def test_a_state_of_an_earlier_commit_is_resumed(world):
    """tests/state/ was written by `python tests/killing.py --write-state`: an upgrade loses no run.
    To the weights that the run came to then, but for rounding, which machines do differently."""
    toy = world.toy
    toy.put_back(STATE / "run")
    for name in ("pairs.jsonl", "held.jsonl"):
        assert (STATE / name).read_text() == (toy.place / name).read_text()
    result = toy.run("--resume", *killing.SMALL)
    assert result.status == 0, result.err
    assert "steps 2 to 3" in result.out
    expected = json.loads((STATE / "end.json").read_text())
    same_rows(toy.end()["metrics"], expected["metrics"])


@pytest.mark.parametrize("torn", [None, "", '{"settings": {"da'])
def test_a_lost_run_json_is_written_when_the_run_is_resumed(torn, world):
    toy = world.toy
    toy.put_back(world.stopped)
    path = toy.out / "run.json"
    about = json.loads(path.read_text())
    path.unlink() if torn is None else path.write_text(torn)
    assert toy.run("--resume").status == 0
    written = json.loads(path.read_text())
    assert written.pop("settings") == about.pop("settings") | {"resume": True}
    assert written == about


def test_the_newest_state_is_the_furthest(tmp_path):
    """By stage, then by steps, which are numbers; that a run is done counts while its end is there."""
    for name in (
        "sft-9",
        "sft-10",
        "dpo-0",
        "dpo-9",
        "dpo-10",
        "done-0",
        "new",
        "dpo-x",
        "other-3",
    ):
        (tmp_path / "resume" / name).mkdir(parents=True)
    order = ["dpo-10", "dpo-9", "dpo-0", "sft-10", "sft-9"]
    assert [place.name for place in states.places_in(tmp_path)] == order
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("")
    assert [place.name for place in states.places_in(tmp_path)] == ["done-0", *order]


def test_a_state_has_no_look_at_its_own_step():
    """Who goes on from it looks at that step; rows of training, and of other steps, stay."""
    point = {"stage": "dpo", "step": 4}
    for row, expected in (
        (point | {"eval/loss": 1.0}, True), (point | {"policy/kl": 1.0}, True),
        (point | {"train/loss": 1.0}, False), (point | {"train/skipped_steps": 2}, False),
        ({"stage": "sft", "step": 4, "eval/loss": 1.0}, False), ({"stage": "dpo", "step": 2, "eval/loss": 1.0}, False),
    ):  # fmt: skip
        assert states.is_look(row, point) is expected
