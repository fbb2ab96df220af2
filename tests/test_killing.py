"""Runs that are killed, at operations on files and at random moments: the fast form of killing.py.

Each is killed by SIGKILL in a fork and resumed; it must end bit for bit as one that nobody killed.
"""

import random
import re
import signal
from types import SimpleNamespace

import pytest
from killing import CHECKPOINTING, FINE, LORA, NEVER, Toy, distinct, kill, leaves, resume


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy, the end of its run, and the operations of it."""
    toy = Toy(tmp_path_factory.mktemp("toy"), "--sft_data=held.jsonl")  # one step of SFT
    whole = toy.whole()
    toy.clear()
    trace = toy.run(at=NEVER).trace
    assert toy.end() == whole, "counting changes nothing, and two runs are the same"
    yield SimpleNamespace(toy=toy, whole=whole, trace=trace)
    toy.close()


def wrong(cases) -> list:
    return [case for case in cases if case.found not in FINE]


def operations_of_a_save(trace: list[str]) -> list[int]:
    """From the first of those that write the state dpo-2 to the last that removes an older one."""
    begin, end = leaves(trace, "dpo-1"), leaves(trace, "dpo-2")
    return [n for n in distinct(trace) if begin <= n < end]


def operations_of_references(trace: list[str]) -> list[int]:
    return [n for n in distinct(trace) if "reference-" in trace[n - 1]]


def operations_of_the_end(trace: list[str]) -> list[int]:
    """What the last step, its evaluation and the final checkpoint write: every third of it here."""
    last = operations_of_a_save(trace)[-1]
    return [n for n in distinct(trace) if n > last][::3]


PARTS = (operations_of_a_save, operations_of_references, operations_of_the_end)


@pytest.mark.parametrize("chosen", PARTS)
def test_a_run_killed_at_every_operation_ends_as_if_it_had_not_been(chosen, world):
    operations = chosen(world.trace)
    assert len(operations) >= 6
    cases = [kill(world.toy, world.whole, at) for at in operations]
    assert not wrong(cases)
    assert {case.found for case in cases} == {"exact"}, "nothing begins anew"


def test_a_run_killed_at_other_operations(world):
    taken = {n for chosen in PARTS for n in chosen(world.trace)}
    others = [n for n in distinct(world.trace) if n not in taken]
    sample = random.Random(0).sample(others, 16)
    assert not wrong(kill(world.toy, world.whole, at) for at in sample)


def test_samples_are_there_once(world):
    """Killed wherever one is written, a run has each of them once in the end."""
    flag = "--sample_every=2"
    whole = world.toy.whole(flag)
    world.toy.clear()
    trace = world.toy.run(flag, at=NEVER).trace
    operations = [n for n in distinct(trace) if "samples.jsonl" in trace[n - 1]]
    assert "samples.jsonl" in whole and len(operations) > 10
    assert not wrong(kill(world.toy, whole, at, flag) for at in operations[::3])


def test_two_kills(world):
    """The resumed run is killed, too."""
    choose = random.Random(1)
    for _ in range(5):
        first, second = (choose.randint(1, len(world.trace)) for _ in range(2))
        assert not wrong([kill(world.toy, world.whole, first, again=second)])


@pytest.mark.parametrize(
    ("flags", "without"), [([], ""), (LORA, ""), (CHECKPOINTING, ""), ([], "reference-*.npy")]
)
def test_kills_at_random_moments(flags, without, world):
    toy, choose = world.toy, random.Random(f"{flags}{without}")
    whole = toy.whole(*flags) if flags else world.whole
    seconds = toy.run(*flags).seconds[0]
    for _ in range(2):
        toy.clear()
        result = toy.run(*flags, delay=choose.uniform(0.2, 1) * seconds)
        assert result.status in (-signal.SIGKILL, 0), result.err
        for path in toy.out.rglob(without) if without else ():
            path.unlink()
        found, result = resume(toy, whole, *flags)
        assert found in FINE, result


def test_every_operation_is_counted(world):
    """The harness itself: what a run leaves was written through what is counted; when a write is
    half done half of it is on the disk; and a kill is no exit."""
    toy, written = world.toy, {"lock"}
    toy.clear()
    trace = toy.run(at=NEVER).trace
    for line in trace:
        what, *paths = line.split()
        if what in ("open", "os.open", "mkdir", "rename", "replace"):
            written.add(paths[-1])
    for path in toy.out.rglob("*"):
        name = str(path.relative_to(toy.out))
        renamed = name.startswith("resume/")  # with their directory
        assert path.is_dir() or renamed or name in written, name
    assert any(re.search(r"re(name|place) resume/\S+ resume/", line) for line in trace)
    at = next(n for n, line in enumerate(trace, 1) if line.startswith("half encoded/tokenizer"))
    size = (toy.out / "encoded" / "tokenizer.model").stat().st_size
    toy.clear()
    result = toy.run(at=at)
    assert result.status == -signal.SIGKILL and not result.err
    [torn] = (toy.out / "encoded").glob("tokenizer*")
    assert torn.stat().st_size == size // 2
