"""The promise itself: five files for one evening, and rooms that can be deleted."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib

import mutations
import pytest
import yaml
from conftest import ROOT, read_metrics, write_jsonl

import train

LEAVES, ROOTS = ("dpo", "data", "model"), ("train", "sample")
ROOMS = {"extra", "experiments"}
OUTSIDE = {"torch", "numpy", "sentencepiece", "wandb"}


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def imported(nodes) -> set[str]:
    """The modules that are imported there, without what is inside them."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_the_spine_is_short():
    sizes = {name: source(name).count("\n") for name in LEAVES + ROOTS}
    assert sum(sizes.values()) <= 1550, sizes
    assert max(sizes.values()) <= 420, sizes


@pytest.mark.parametrize("name", LEAVES + ROOTS)
def test_import_arrows(name):
    """Leaves know nothing of each other, of ranks or of flags; nobody imports a root; a room is
    imported inside a function."""
    tree = ast.parse(source(name))
    anywhere, top = imported(ast.walk(tree)), imported(tree.body)
    assert not anywhere & set(ROOTS) and not top & ROOMS
    if name in LEAVES:
        assert not anywhere & {*LEAVES, "os", "argparse", "wandb"}
    foreign = anywhere - OUTSIDE - ROOMS - set(LEAVES)
    assert foreign <= sys.stdlib_module_names


def numbers(out) -> list[dict]:
    """What was logged, without what depends on the machine."""
    machine = ("second", "memory")
    return [
        {name: x for name, x in row.items() if not any(word in name for word in machine)}
        for row in read_metrics(out)
    ]


KILLED = """
import os, signal, sys, train
record = train.Run.record

def killed(run, stage, row, *note):
    record(run, stage, row, *note)
    if (stage, row["step"]) == ("sft", 1):
        os.kill(os.getpid(), signal.SIGKILL)

train.Run.record = killed
train.main(sys.argv[1:])
"""


def test_it_runs_without_its_rooms(tmp_path):
    """SFT, DPO, a resume and sampling, on a plain file, in a copy without extra/ and experiments/;
    with the same numbers as with them. Nothing is saved between then, so that a run that was killed
    is resumed from its beginning, by its own settings."""
    house = tmp_path / "house"
    house.mkdir()
    for name in LEAVES + ROOTS:
        shutil.copy(ROOT / f"{name}.py", house)
    words = "good bad fine poor nice dull".split()
    rows = [{"prompt": f"Rate film {i}:", "chosen": f" It is {words[i % 3]}.",
             "rejected": f" It is {words[3 + i % 3]} {i}."} for i in range(24)]  # fmt: skip
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    flags = f"""--data={path} --eval_data={path} --hidden_size=32 --num_layers=2 --num_heads=2
        --vocab_size=300 --batch_size=8 --micro_batch_tokens=64 --learning_rate=1e-3 --epochs=2
        --log_every=1 --save_every=2""".split()

    def run(script, *arguments, where=house) -> str:
        command = [sys.executable, str(where / script), *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=where).stdout

    whole, parts, rooms = (tmp_path / name for name in ("whole", "parts", "rooms"))
    run("train.py", *flags, f"--out_dir={whole}")
    assert not (whole / "resume").exists()
    command = [sys.executable, "-c", KILLED, *flags, f"--out_dir={parts}"]
    killed = subprocess.run(command, check=False, capture_output=True, text=True, cwd=house)
    assert killed.returncode == -signal.SIGKILL and "\nsft 1 " in killed.stdout, killed.stderr
    assert not (parts / "model.safetensors").exists()
    (parts / "encoded" / "tokenizer.model").unlink()  # as if it had been killed before it was there
    printed = run("train.py", flags[0], f"--out_dir={parts}", "--resume")
    assert "sft: 24 examples, steps 0 to 3" in printed
    assert "dpo: 24 examples, steps 0 to 6" in printed
    for name in ("model.safetensors", "sft/model.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert numbers(parts) == numbers(whole)
    about = [json.loads((out / "run.json").read_text()) for out in (whole, parts)]
    about[0]["settings"] |= {"out_dir": str(parts), "resume": True}
    assert about[0] == about[1]
    shown = run(
        "sample.py",
        whole,
        "--prompt=Rate film 3:",
        "--max_new_tokens=8",
        "--compare",
        whole / "sft",
    )
    assert "Rate film 3:" in shown
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(rows[0]) + "\nno JSON\n")
    command = [sys.executable, house / "train.py", f"--data={broken}", f"--init_from={whole}"]
    command.append(f"--out_dir={rooms}")
    refused = subprocess.run(command, check=False, capture_output=True, text=True, cwd=house)
    [sentence] = refused.stderr.splitlines()
    assert refused.returncode == 2
    assert sentence.startswith(f"train.py: {broken}:2: cannot be read as JSON lines (Expecting")
    run("train.py", *flags, f"--out_dir={rooms}", where=ROOT)
    for ours, theirs in zip(numbers(whole), numbers(rooms), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            same = value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-5)
            assert theirs[name] == same, name


def test_readme_is_true_about_flags_and_sizes():
    """Every --flag of the README exists, and the line counts it gives are near the truth."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("\n") <= 210
    scripts = [ROOT / "sample.py", ROOT / "tests/benchmark.py", *ROOT.glob("extra/*.py")]
    scripts += ROOT.glob("experiments/*.py")
    text = "".join(path.read_text(encoding="utf-8") for path in scripts)
    known = set(re.findall(r'"--(\w+)"', text)) | set(train.Settings.__dataclass_fields__)
    known |= {"help", "nproc_per_node", "standalone", "alpha", "gamma", "label_smoothing"}
    known |= {"seed", "demonstrations", "pairs", "tau", "temperature"}
    used = set(re.findall(r"--(\w+)", readme))
    assert used and used <= known, used - known
    links = re.findall(r"\[`([\w.]+)`\]\((\S+)#L(\d+)\)", readme)
    assert len(links) > 8
    for name, path, line in links:  # of a name, to the line that it is in
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        word = rf"\b{name.split('.')[-1]}\b"
        assert re.search(word, lines[int(line) - 1]), f"{name} is not in line {line} of {path}"
    for name, lines in re.findall(r"\| \[?`?(\w+\.py)`?\S* \| (\d+) \|", readme):
        actual = source(name.removesuffix(".py")).count("\n")
        assert abs(actual - int(lines)) <= 10, f"{name} has {actual} lines"


def test_uv_and_pip_install_the_same():
    """`uv run train.py` takes its packages from pyproject.toml, and builds none of this."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pip = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    assert project["project"]["dependencies"] == [line for line in pip if line]
    assert project["tool"]["uv"] == {"package": False}
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    [job] = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    oldest = project["project"]["requires-python"].removeprefix(">=")
    assert min(job["strategy"]["matrix"]["python"]) == oldest


def test_the_list_of_mistakes_fits_the_code():
    """Each patch of tests/mutations.py fits once, and the tests that it names are there."""
    count = len(mutations.MUTATIONS)
    assert count == len(set(mutations.MUTATIONS)) > 80
    assert f"({count} of them)" in (ROOT / "README.md").read_text(encoding="utf-8")
    for mutation in mutations.MUTATIONS:
        mutation.applied()
        for name in mutation.tests.split():
            file, _, test = name.partition("::")
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert f"def {test.partition('[')[0]}(" in text, name
